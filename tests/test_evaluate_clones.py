"""evaluate_clones.py: who says what, words and voices by hand, paired systems, an adapter, the page, refused inputs."""

import csv
import math
import re
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import soundfile
import torch
from conftest import SPEECH, command_line, read_report, write_encoder
from peft import LoraConfig, get_peft_model

import evaluate_clones
from voxtral.backbone import Backbone
from voxtral.checkpoint import save_tensors
from voxtral.clones import (
    METRICS,
    Item,
    Judge,
    References,
    System,
    adapted,
    digit_words,
    items_of_clips,
    items_of_manifest,
    read_list,
    read_system,
    speak_and_score,
    summarize,
)
from voxtral.data import load_segment
from voxtral.errors import UserError
from voxtral.inject import inject
from voxtral.listening import recording_html, section_html, write_page
from voxtral.reference import prepare_reference
from voxtral.sources import Clip
from voxtral.standin import small_params, write_random_checkpoint
from voxtral.tts import TTS, Take

SAID = {"anna": ["One day.", "Two days."], "ben": ["Three.", "Four."], "eve": ["Five.", 'Six <b> & "more".']}
SOURCES = {"anna": "k_af_heart", "ben": "k_am_adam", "eve": "k_bf_lily"}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """speech.csv: two clips of 2 s of each of three speakers, and one of silence that comes first for anna."""
    folder = tmp_path_factory.mktemp("speech")
    soundfile.write(folder / "silent.wav", np.zeros(48_000), 24_000)
    lines = ["path,speaker,text", "silent.wav,anna,Nothing."]
    for speaker, texts in SAID.items():
        for i, text in enumerate(texts):
            audio, _ = load_segment(str(SPEECH / f"{SOURCES[speaker]}_{i}.opus"), 0.0, 2.0)
            soundfile.write(folder / f"{speaker}{i}.wav", audio, 24_000)
            lines.append(f'{speaker}{i}.wav,{speaker},"{text}"'.replace('"more"', '""more""'))
    (folder / "speech.csv").write_text("\n".join(lines) + "\n")
    return folder / "speech.csv"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Its random clips end after 0 to 40 frames or so, or not at all."""
    folder = tmp_path_factory.mktemp("standin")
    write_random_checkpoint(folder, small_params(), {"alpha": 13}, seed=1)
    return folder


@pytest.fixture(scope="module")
def encoder(checkpoint, tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("encoder") / "encoder.safetensors", checkpoint)


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory):
    """As phase 2 saves it, all of it random."""
    path = tmp_path_factory.mktemp("lora") / "adapter"
    torch.manual_seed(0)
    get_peft_model(
        Backbone.from_checkpoint(checkpoint, dtype=torch.float32).model,
        LoraConfig(r=4, lora_alpha=12, init_lora_weights=False, target_modules=["q_proj", "v_proj"]),
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tts(checkpoint):
    return TTS.from_checkpoint(checkpoint)


@pytest.fixture(scope="module")
def judge(speaker_checkpoint):
    return Judge(speaker_checkpoint)


@pytest.fixture
def run(checkpoint, manifest, speaker_checkpoint, encoder, tmp_path):
    """run(argument, ...) -> the arguments of a short evaluation whose system `a` has the encoder file."""

    def arguments(*more, **changes):
        options = {
            "checkpoint": checkpoint,
            "data": manifest,
            "speaker_model": speaker_checkpoint,
            "max_sec": 1,
            "output": tmp_path / "out",
            "device": "cpu",
            "system": f"a={encoder}",
        } | changes
        return [*command_line(**options), *map(str, more)]

    return arguments


def said_by(items):
    return [(item.speaker, Path(item.reference).name, item.text) for item in items]


# ---------------------------------------------------------------- who says what


def test_lists_of_seed_tts_eval(tmp_path):
    (tmp_path / "wavs").mkdir()
    for name in ("a.wav", "b.wav"):
        (tmp_path / "wavs" / name).touch()
    path = tmp_path / "meta.lst"
    path.write_text("u1|What a said.|wavs/a.wav|New words.\n\nu2|What b said.|wavs/b.wav|More, words |wavs/u2.wav\n")
    assert read_list(path) == [
        Item("u1", "wavs/a.wav", str(tmp_path / "wavs/a.wav"), "New words."),
        Item("u2", "wavs/b.wav", str(tmp_path / "wavs/b.wav"), "More, words"),
    ]


def test_lists_of_librispeech(tmp_path):
    (tmp_path / "audio" / "61" / "70968").mkdir(parents=True)
    (tmp_path / "audio" / "61" / "70968" / "61-70968-0003.flac").touch()
    path = tmp_path / "cross.lst"
    path.write_text("61-70968-0003\t4.1\tHe began.\t61-70970-0010\t5.2\tIt was | late.\n")
    assert read_list(path, tmp_path / "audio") == [
        Item("61-70970-0010", "61", str(tmp_path / "audio/61/70968/61-70968-0003.flac"), "It was | late.")
    ]


@pytest.mark.parametrize(
    "text,message",
    [
        ("u|p|a.wav|x\nu|p|b.wav|y\nv|p|b.wav|z\n", "2 of 2 prompt files are missing, first {folder}/a.wav"),
        ("u|p|a.wav|x\nfour words of text\n", "line 2 has neither"),
        ("\n", "lists nothing"),
        ("u|p|a.wav| \n", "line 1 gives u nothing to say"),
        ("1-2\t1\ta\tb\t1\tc\n", "line 1 has neither"),
    ],
)
def test_lists_that_are_refused(tmp_path, run, refused, text, message):
    (tmp_path / "meta.lst").write_text(text)
    found = refused(evaluate_clones.main, run(data=None, list=tmp_path / "meta.lst", checkpoint="/absent"))
    assert message.format(folder=tmp_path) in found


def test_every_speaker_says_what_others_say(manifest):
    items, bad = items_of_manifest(manifest, per_voice=3)
    references = [("anna", "anna0.wav"), ("ben", "ben0.wav"), ("eve", "eve0.wav")]
    assert list(dict.fromkeys(row[:2] for row in said_by(items))) == references and len(items) == 9
    for speaker, _, text in said_by(items):
        assert text in sum((texts for name, texts in SAID.items() if name != speaker), ["Nothing."])
    assert len(set(items)) == 9 and len({item.name for item in items}) == 9
    assert len(bad) == 1 and "silent.wav is silent" in bad[0]
    assert items_of_manifest(manifest, per_voice=3)[0] == items
    assert items_of_manifest(manifest, per_voice=3, seed=1)[0] != items


def test_prompts_speakers_and_sentences_can_be_chosen(manifest):
    items, bad = items_of_manifest(
        manifest, sentences=["New.", "Three.", "Newer."], speakers=["eve", "ben"], prompts=2, per_voice=2
    )
    assert bad == []
    references = ["ben0.wav", "ben1.wav", "eve0.wav", "eve1.wav"]
    assert [row[1] for row in said_by(items)] == [name for name in references for _ in range(2)]
    assert {item.text for item in items[:2]} == {"New.", "Newer."}  # never what the reference says


def test_equal_texts_count_once_and_the_own_one_never():
    path = str(SPEECH / "k_af_heart_0.opus")
    clips = [Clip(path, "a", 0, "Own."), *(Clip("none", "b", 0, text) for text in ("Own.", "Same.", " Same.", ""))]
    assert [item.text for item in items_of_clips(clips, speakers=["a"], per_voice=1)[0]] == ["Same."]
    with pytest.raises(UserError, match="only 1 of 2 sentences"):
        items_of_clips(clips, speakers=["a"], per_voice=2)


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    "text", "Call one seven eight two eight.|call 17828|Call 1-7-8-2-8!|call 1, 7, 8, 2, 8|Call 17,828.".split("|")
)
def test_numbers_compare_digit_by_digit(text):
    assert digit_words(text, "en") == digit_words("call one 7 eight 28", "en") == "call 1 7 8 2 8"


def test_only_english_one_is_a_digit():
    assert digit_words("One of 21.", "en") == "1 of 2 1" and digit_words("One 21.", "de") == "one 2 1"


def test_word_errors_are_against_the_text(judge, monkeypatch):
    heard = iter([" Number 1 7-8, it's for mister Jones."] * 2)

    class FakeWhisper:
        device = torch.device("cpu")

        @staticmethod
        def transcribe(audio, language, **options):
            assert len(audio) == 16_000 and language == "en" and options["temperature"] == 0
            return {"text": next(heard), "language": language}

    assert judge.words("anything", torch.ones(24_000)) == {}
    monkeypatch.setattr(judge, "whisper", FakeWhisper)
    row = judge.words("Number one seven eight, it is for Mr. Smith.", torch.ones(24_000))
    assert (row["wer"], row["words"]) == (pytest.approx(1 / 9), 9) and row["transcript"].startswith("Number 1 7-8")
    assert judge.words("Two words.", torch.zeros(0)) == {"wer": 1, "words": 2, "transcript": ""}


# ---------------------------------------------------------------- voices


def test_voices_are_compared_with_those_of_other_speakers(manifest, judge):
    folder = manifest.parent
    items = [Item("", name[:-1], str(folder / f"{name}.wav"), "x") for name in ("anna0", "anna1", "ben0", "eve0")]
    references = References([*items, items[0]], judge)
    references.embeddings = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 1, 0], [0.6, 0.8, 0]])
    assert references.compare(items[0], torch.tensor([0.8, 0.6, 0])) == pytest.approx(
        {"own": 0.8, "others": (0.6 + 0.96) / 2, "margin": 0.02, "nearest": 0}
    )
    assert references.compare(items[0], torch.tensor([0.6, 0, 0.8])) == pytest.approx(  # her other clip is no rival
        {"own": 0.6, "others": 0.18, "margin": 0.42, "nearest": 1}
    )
    nothing = references.compare(items[0], judge.embed(torch.zeros(0))[:3])
    assert nothing == dict.fromkeys(("own", "others", "margin", "nearest"), 0)
    alone = References(items[:2], judge).compare(items[0], judge.embed(torch.ones(9600)))
    assert alone["own"] > 0 and all(math.isnan(alone[name]) for name in ("others", "margin", "nearest"))


def test_equal_systems_give_equal_rows_and_the_noise_is_the_items_own(tts, encoder, manifest, judge):
    items, _ = items_of_manifest(manifest)
    systems = [System(name, read_system(f"x={encoder}", tts).encoder) for name in ("a", "b")]
    before = {name: tensor.clone() for name, tensor in tts.codec.state_dict().items()}
    rows, audio = speak_and_score(tts, systems, items, judge, 1.0, n_samples=4)
    first, second = rows[:6], rows[6:]
    assert [row | {"system": "b"} for row in first] == second and {row["system"] for row in first} == {"a"}
    assert [len(clones) for clones in audio.values()] == [4, 4]
    assert [len(clone) / 24_000 for clone in audio["a"]] == [row["seconds"] for row in first[:4]]
    summary = summarize(rows)
    assert all(value == {"value": 0, "interval": [0, 0]} for value in summary["differences"]["b"].values())
    assert summary["margin_kept"]["b"] == {"value": 1, "interval": [1, 1]}
    assert not tts.codec.has_encoder
    assert all(torch.equal(tensor, before[name]) for name, tensor in tts.codec.state_dict().items())
    for change in ({"seed": 1}, {"cfg_alpha": 3.0}):
        again, _ = speak_and_score(tts, systems[:1], items, judge, 1.0, **change)
        assert [row["own"] for row in again] != [row["own"] for row in first]


def test_codes_of_the_systems_own_encoder_are_what_own_codec_compares_with(tts, encoder, manifest, judge):
    items, _ = items_of_manifest(manifest, per_voice=1)
    systems = [read_system(f"a={encoder}", tts), read_system("b=untrained", tts)]
    rows, audio = speak_and_score(tts, systems, items, judge, 1.0, n_samples=3)
    for system, part in zip(systems, (rows[:3], rows[3:])):
        tts.codec.load_encoder(system.encoder)
        for item, clone, row in zip(items, audio[system.name], part):
            waveform = prepare_reference(item.reference).waveform
            with torch.no_grad():
                decoded = tts.codec.decode(tts.codec.encode(waveform))[0, 0, : waveform.shape[-1]]
            clone = judge.embed(clone)
            assert row["own_codec"] == pytest.approx(torch.dot(judge.embed(decoded), clone).item(), abs=1e-5)
            assert row["own"] == pytest.approx(torch.dot(judge.embed(waveform[0, 0]), clone).item(), abs=1e-5)
    tts.codec.has_encoder = False


def test_clones_without_end_and_without_audio_count(
    tts, encoder, manifest, speaker_checkpoint, whisper_checkpoint, monkeypatch
):
    items, _ = items_of_manifest(manifest, per_voice=1)
    judge = Judge(speaker_checkpoint, whisper_checkpoint)
    codes = torch.ones(37, 5, dtype=torch.long)
    takes = [Take(codes), Take(codes[:, :0], ended=True), Take(codes, ended=True)]
    monkeypatch.setattr(tts, "generate", lambda requests, max_frames: takes)
    rows, audio = speak_and_score(tts, [read_system(f"a={encoder}", tts)], items, judge, 0.4, n_samples=9)
    assert [row["ended"] for row in rows] == [0, 1, 1] and [row["seconds"] for row in rows] == [0.4, 0, 0.4]
    assert [len(clone) for clone in audio["a"]] == [9600, 0, 9600]
    silent = {name: rows[1][name] for name in ("wer", "own", "own_codec", "others", "margin", "nearest", "transcript")}
    assert silent == {"wer": 1, "own": 0, "own_codec": 0, "others": 0, "margin": 0, "nearest": 0, "transcript": ""}
    assert rows[0]["own"] > 0 and summarize(rows)["systems"]["a"]["ended"]["value"] == pytest.approx(2 / 3)


def test_batches_give_every_item_its_own(tts, encoder, manifest, judge, monkeypatch):
    items, _ = items_of_manifest(manifest)
    system = [read_system(f"a={encoder}", tts)]
    rows, _ = speak_and_score(tts, system, items, judge, 0.8)
    monkeypatch.setattr("voxtral.clones.BATCH_SIZE", 4)
    parts, _ = speak_and_score(tts, system, items, judge, 0.8)
    assert [row["text"] for row in parts] == [item.text for item in items]
    assert [row["own"] for row in parts] == pytest.approx([row["own"] for row in rows], abs=1e-3)


def test_adapters_change_only_their_own_system(tts, checkpoint, encoder, adapter, manifest, judge, tmp_path):
    items, _ = items_of_manifest(manifest)
    systems = [read_system(text, tts) for text in (f"a={encoder}", f"b={encoder},{adapter}", f"c={encoder}")]
    rows, _ = speak_and_score(tts, systems, items, judge, 1.0)
    a, b, c = ([row["own"] for row in rows if row["system"] == name] for name in "abc")
    assert a == c and a != b
    weights = Backbone.from_checkpoint(checkpoint, dtype=torch.float32).model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in tts.models.backbone.model.state_dict().items())
    served = Backbone.from_checkpoint(inject(checkpoint, encoder, adapter, tmp_path / "clone"), dtype=torch.float32)
    merged = adapted(tts, str(adapter)).models.backbone.model.state_dict()
    for name, tensor in served.model.state_dict().items():
        torch.testing.assert_close(merged[name], tensor, rtol=2**-8, atol=1e-6)  # serving has bf16
        assert torch.equal(merged[name], weights[name]) != (".q_proj" in name or ".v_proj" in name)


# ---------------------------------------------------------------- averages


def test_summary_by_hand():
    def row(system, speaker, wer, words, margin, **more):
        always = {"own": 0.5, "own_codec": 0.5, "nearest": 1.0, "ended": 1.0, "seconds": 2.0}
        given = {"system": system, "speaker": speaker, "wer": wer, "words": words, "margin": margin}
        return always | given | {"others": 0.5 - margin} | more

    rows = [
        row("a", "x", 0.0, 2, 0.4),
        row("a", "x", 0.5, 4, 0.2),
        row("a", "y", 1.0, 4, 0.6, ended=0.0, nearest=0.0),
        row("b", "x", 0.5, 2, 0.2),
        row("b", "x", 0.5, 4, 0.1),
        row("b", "y", 1.0, 4, 0.3),
    ]
    summary = summarize(rows)
    a, b = summary["systems"].values()
    assert list(a) == list(METRICS)
    assert a["wer"]["value"] == pytest.approx(0.6) and b["wer"]["value"] == pytest.approx(0.7)
    assert a["wer"]["interval"] == pytest.approx([2 / 6, 1])  # both draws of x, or both of y
    assert a["margin"]["value"] == pytest.approx(0.4) and a["margin"]["interval"] == pytest.approx([0.3, 0.6])
    assert (a["ended"]["value"], a["nearest"]["value"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    difference = summary["differences"]["b"]
    assert difference["wer"]["value"] == pytest.approx(0.1)
    assert difference["wer"]["interval"] == pytest.approx([0, 1 / 6])
    assert difference["margin"]["interval"] == pytest.approx([-0.3, -0.15])
    kept = summary["margin_kept"]["b"]
    assert kept["value"] == pytest.approx(0.5) and kept["interval"] == pytest.approx([0.5, 0.5])  # paired
    alone = summarize([{name: value for name, value in each.items() if name != "wer"} for each in rows[:2]])
    assert "wer" not in alone["systems"]["a"] and alone["differences"] == alone["margin_kept"] == {}
    assert alone["systems"]["a"]["margin"] == {"value": pytest.approx(0.3), "interval": None}


# ---------------------------------------------------------------- the script and its page


def test_a_whole_evaluation(run, encoder, adapter, whisper_checkpoint, tmp_path, capsys):
    evaluate_clones.main(run("--system", f"b={encoder},{adapter}", "--samples", 5, whisper=whisper_checkpoint))
    output = tmp_path / "out"
    report = read_report(output / "metrics.json")
    assert (report["items"], report["references"], report["speakers"]) == (6, 3, 3)
    assert list(report["systems"]) == ["a", "b"] and list(report["differences"]) == list(report["margin_kept"]) == ["b"]
    assert list(report["systems"]["a"]) == list(report["definitions"]) == list(METRICS)
    assert "silent.wav" in report["left_out"][0] and report["not_measured"] == {} and report["settings"]["seed"] == 0
    with (output / "clips.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["system"] for row in rows] == ["a"] * 6 + ["b"] * 6
    assert np.mean([float(row["own"]) for row in rows[6:]]) == pytest.approx(report["systems"]["b"]["own"]["value"])
    text = (output / "table.md").read_text()
    assert text in capsys.readouterr().out and "| a |" in text and "## Differences to a" in text
    assert "## Left out: 1 clips" in text and "Not measured" not in text

    page = (output / "index.html").read_text()
    links = {unquote(link) for link in re.findall(r'(?:src|href)="([^"]*)"', page)}
    assert all((output / link).is_file() for link in links)
    wavs = {f"clone_{i}_{name}.wav" for i in range(5) for name in ("reference", "a", "b")}
    silent = {f"clone_{i % 6}_{row['system']}.wav" for i, row in enumerate(rows) if float(row["seconds"]) == 0}
    assert {link for link in links if link.endswith(".wav")} == wavs - silent
    assert links >= {"clones.png", "table.md", "clips.csv"} and "http" not in page and "<script" not in page
    assert all(row["text"] in unescape(page) for row in rows[:5])
    shown = [f"{float(row['own']):.2f}" for pair in zip(rows[:5], rows[6:]) for row in pair]
    assert re.findall(r"similarity ([\d.]+)", page) == shown


def test_a_list_says_who_says_what(run, manifest, tmp_path):
    (tmp_path / "meta.lst").write_text("u|x|ben0.wav|New words.\nv|x|anna0.wav|Newer words.\n")
    evaluate_clones.main(run("--samples", 1, data=None, list=tmp_path / "meta.lst", root=manifest.parent))
    with (tmp_path / "out" / "clips.csv").open(newline="") as file:
        assert [(row["item"], row["speaker"], row["text"]) for row in csv.DictReader(file)] == [
            ("u", "ben0.wav", "New words."),
            ("v", "anna0.wav", "Newer words."),
        ]
    reference, _ = soundfile.read(tmp_path / "out" / "clone_0_reference.wav")
    expected = prepare_reference(manifest.parent / "ben0.wav").waveform[0, 0].numpy()
    np.testing.assert_allclose(reference, expected, atol=1e-4)


def test_without_whisper_and_with_one_speaker_the_report_says_what_is_missing(run, tmp_path):
    evaluate_clones.main(run("--speakers", "ben", "--samples", 0))
    report = read_report(tmp_path / "out" / "metrics.json")
    assert "wer" not in report["systems"]["a"] and report["systems"]["a"]["margin"] == {"value": None, "interval": None}
    text = (tmp_path / "out" / "table.md").read_text()
    assert "## Not measured\n\n- word errors: --whisper names" in text and "two speakers" in text
    assert "word errors, %" not in text and not list((tmp_path / "out").glob("*.wav"))


def test_the_default_is_the_checkpoints_own_encoder(run, checkpoint, encoder, tmp_path, refused):
    assert "no encoder of its own" in refused(evaluate_clones.main, run(system=None))
    injected = inject(checkpoint, encoder, output=tmp_path / "injected")
    evaluate_clones.main(run("--samples", 0, checkpoint=injected, system=None))
    report = read_report(tmp_path / "out" / "metrics.json")
    assert list(report["systems"]) == ["own"] and report["differences"] == {}


def test_pages_show_text_as_it_is(tmp_path):
    reference = recording_html(tmp_path, "reference", "reference", torch.zeros(24_000))
    clone = recording_html(tmp_path, "a b", "<i>", torch.zeros(24_000), ["1 < 2"])
    silent = recording_html(tmp_path, "none", "mute", torch.zeros(0))
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{n}.{s}" for n in ("reference", "a b") for s in ("wav", "png")
    }
    write_page(
        tmp_path / "index.html",
        "T & T",
        "<p>hello</p>",
        ["", "h<"],
        [["row", "1\n[0, 2]"]],
        [section_html("v", "a < b", [reference, clone, silent])],
    )
    page = (tmp_path / "index.html").read_text()
    assert all(
        part in page
        for part in (
            "<h1>T &amp; T</h1>",
            "<p>hello</p>",
            "<th>h&lt;</th>",
            "<td>1\n[0, 2]</td>",
            "“a &lt; b”",
            'src="a%20b.wav"',
            "<h3>&lt;i&gt;</h3>",
            "1 &lt; 2",
            "no audio",
        )
    )
    assert page.count("<audio ") == page.count("<img ") == 2


# ---------------------------------------------------------------- refused


def test_mistakes_are_one_sentence(run, encoder, tmp_path, monkeypatch, refused):
    monkeypatch.delenv("VOXTRAL_CKPT", raising=False)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "no.csv").write_text("path,speaker,text\n")
    (tmp_path / "bad.safetensors").write_text("no tensors")
    save_tensors(tmp_path / "other.safetensors", {"x": torch.zeros(1)})
    for message, arguments in [
        ("pass --checkpoint", run(checkpoint="")),
        ("absent.csv does not exist", run(data="absent.csv")),
        ("absent.lst does not exist", run(data=None, list="absent.lst")),
        ("--per-voice goes with --data", run(data=None, list="x.lst", per_voice=1)),
        ("--root goes with --list", run(root="x")),
        ("--prompts is 0", run(prompts=0)),
        ("--max-sec is nan", run(max_sec="nan")),
        ("nobody is called zoe; among the 3 speakers are anna", run(speakers="zoe")),
        ("holds no text", run(sentences=tmp_path / "empty.txt")),
        ("only 4 of 7 sentences to say", run(per_voice=7)),
        ("no clip can be a reference (there is none)", run(data=tmp_path / "no.csv")),
        ("the language is 'xx'", run(language="xx")),
        ("none is neither 'resemblyzer' nor a file", run(speaker_model="none")),
        ("asr.model is 'none'", run(whisper="none")),
        ("absent.safetensors is missing", run(system=f"a={tmp_path}/absent.safetensors")),
        ("bad.safetensors", run(system=f"a={tmp_path}/bad.safetensors")),
        ("other.safetensors", run("--system", f"b={tmp_path}/other.safetensors")),
        ("--system oops: it must be NAME=ENCODER", run(system="oops")),
        ("--system a/b=own", run(system="a/b=own")),
        ("same name", run("--system", f"a={encoder}")),
        ("adapter_config.json", run(system=f"a={encoder},{tmp_path}")),
        ("the model's context has 65536", run(max_sec=6000)),
    ]:
        assert message in refused(evaluate_clones.main, arguments)
