"""generate_clips.py: what a clip is, which ones there are, kills, shares of several processes, and what is dropped."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, command_line, stopped

import generate_clips
from voxtral.clips import ClipFolder, defect, plan
from voxtral.codec import VoxtralCodec
from voxtral.errors import UserError
from voxtral.processes import Process
from voxtral.sources import DataConfig, SourceConfig, find_clips
from voxtral.standin import small_params, write_random_checkpoint
from voxtral.tts import TTS, Request, Take, named_voice

SENTENCES = [("en", "One."), ("en", "Two two."), ("de", "Drei drei drei."), ("", "Four, four, four and four.")]
PER_VOICE = 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Its random clips end after 0 to 40 frames or so, or not at all."""
    folder = tmp_path_factory.mktemp("standin")
    write_random_checkpoint(folder, small_params(), {"anna": 13, "de_ben": 31}, seed=1)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.tsv"
    path.write_text("".join(f"{language}\t{text}\n" for language, text in SENTENCES), encoding="utf-8")
    return path


def arguments(checkpoint, texts, output, *more):
    fixed = {"per_voice": PER_VOICE, "batch_size": 4, "max_sec": 3, "device": "cpu"}
    return [*command_line(checkpoint=checkpoint, texts=texts, output=output, **fixed), *map(str, more)]


@pytest.fixture(scope="module")
def whole(checkpoint, texts, tmp_path_factory):
    """A folder made in one go."""
    output = tmp_path_factory.mktemp("whole") / "clips"
    generate_clips.main(arguments(checkpoint, texts, output))
    return output


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def contents(folder):
    """Path -> bytes of codes and manifest, samples of every clip."""
    files = {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.suffix in (".flac", ".npy") or path.name == "manifest.jsonl"
    }
    return {
        name: soundfile.read(path, dtype="int16")[0] if path.suffix == ".flac" else path.read_bytes()
        for name, path in files.items()
    }


def assert_same(folder, other):
    """Another batch may round another way: samples differ by one step of 16 bits at most."""
    ours, theirs = contents(folder), contents(other)
    assert ours.keys() == theirs.keys()
    for name, data in ours.items():
        if name.endswith(".flac"):
            assert len(data) == len(theirs[name]) and abs(data.astype(int) - theirs[name]).max() <= 1
        else:
            assert data == theirs[name]


# ---------------------------------------------------------------- clips


def test_every_clip_is_what_its_codes_decode_to(checkpoint, whole):
    codec, kept = VoxtralCodec.from_checkpoint(checkpoint), rows(whole / "manifest.jsonl")
    assert {row["voice"] for row in kept} == {"anna", "de_ben"}
    for row in kept:
        codes = np.load(whole / row["codes"])
        audio, rate = soundfile.read(whole / row["path"], dtype="float32")
        assert codes.dtype == np.int16 and codes.shape == (37, len(audio) // 1920) and rate == 24000
        assert row["seconds"] == pytest.approx(len(audio) / 24000, abs=0.01)
        with torch.no_grad():
            decoded = codec.decode(torch.from_numpy(codes.astype(np.int64))[None])[0, 0].clamp(-1, 1)
        assert (decoded - torch.from_numpy(audio)).abs().max() < 1e-4


def test_a_clip_is_what_its_voice_says_of_its_text_with_its_seed(checkpoint, whole):
    tts = TTS.from_checkpoint(checkpoint)
    seeds = {row["name"]: row["seed"] for row in rows(whole / "records-0.jsonl")}
    for row in rows(whole / "manifest.jsonl")[:3]:
        request = Request(row["text"], named_voice(checkpoint, row["voice"]), seeds[row["path"].removesuffix(".flac")])
        (take,) = tts.generate([request], 37)
        assert np.array_equal(take.codes.numpy(), np.load(whole / row["codes"]))


def test_training_finds_the_clips_with_text_voice_and_codes(whole):
    config = DataConfig(data_root=str(whole.parent), sources=[SourceConfig(kind="generated", path=whole.name)])
    ((clips,), absent) = find_clips(config)
    expected = {str(whole / row["path"]): row for row in rows(whole / "manifest.jsonl")}
    assert not absent and {clip.path for clip in clips} == set(expected)
    for clip in clips:
        row = expected[clip.path]
        assert (clip.speaker, clip.text, clip.codes) == (row["voice"], row["text"], str(whole / row["codes"]))


# ---------------------------------------------------------------- which ones


def test_voices_speak_their_language():
    spoken = {voice: {clip.text for clip in plan([voice], SENTENCES, 20, 0)} for voice in ("de_ben", "fr_eva", "anna")}
    assert spoken["de_ben"] == {"Drei drei drei.", "Four, four, four and four."}
    assert spoken["anna"] == spoken["fr_eva"] == {"One.", "Two two.", "Four, four, four and four."}
    assert {clip.text for clip in plan(["anna"], [("hi", "हाँ।")], 2, 0)} == {"हाँ।"}


def test_a_plan_grows_without_changing():
    small, large = plan(["anna"], SENTENCES, 4, 0), plan(["de_ben", "anna"], SENTENCES, 9, 0)
    assert large[9:13] == small and len(set(clip.seed for clip in large)) == len(large) == 18
    assert [clip.text for clip in plan(["anna"], SENTENCES, 9, 1)] != [clip.text for clip in large[9:]]
    assert len({clip.text for clip in small[:3]}) == 3  # every sentence once before one comes again


def test_batches_hold_each_clip_once():
    clips = plan(["anna", "de_ben"], SENTENCES, 50, 0)
    batches = generate_clips.batches_of(clips, 4)
    assert sorted(clip.name for batch in batches for clip in batch) == sorted(clip.name for clip in clips)
    assert {len(batch) for batch in batches} == {4}
    assert sum(len({len(clip.text) for clip in batch}) == 1 for batch in batches) > len(batches) / 2


# ---------------------------------------------------------------- what is dropped


def take_of(n_frames, ended=True):
    codes = torch.zeros(37, n_frames, dtype=torch.long)
    codes[0] = torch.arange(n_frames) % 50
    return Take(codes, ended)


def test_each_defect_is_named():
    speech = 0.1 * torch.randn(100 * 1920, generator=torch.Generator().manual_seed(0))
    assert defect(take_of(100), speech, 24000) == ""
    assert defect(take_of(100, ended=False), speech, 24000) == "no END_AUDIO"
    assert defect(take_of(4), speech[: 4 * 1920], 24000) == "too short"
    assert defect(take_of(100), speech * 0.01, 24000) == "silence"
    assert defect(take_of(100), speech * torch.nan, 24000) == "silence"
    stuck = take_of(100)
    stuck.codes[0, 40:66] = 7
    assert defect(stuck, speech, 24000) == "repeated frames"
    stuck.codes[0, 40:66] = torch.tensor([7] * 25 + [8])
    assert defect(stuck, speech, 24000) == ""


def test_dropped_clips_are_counted_and_leave_no_file(checkpoint, texts, whole, capsys):
    generate_clips.main(arguments(checkpoint, texts, whole))
    records = rows(whole / "records-0.jsonl")
    dropped = [row for row in records if row["dropped"]]
    reasons = {row["dropped"] for row in dropped}
    assert {"no END_AUDIO", "too short"} <= reasons
    shown = capsys.readouterr().out
    assert f"0 clips made now; {whole} has {len(records)} of them, {len(records) - len(dropped)} kept" in shown
    for reason in reasons:
        assert f"{reason} {sum(row['dropped'] == reason for row in dropped)}" in shown
    assert len(records) == 2 * PER_VOICE
    assert (
        {row["path"] for row in rows(whole / "manifest.jsonl")}
        == {f"{row['name']}.flac" for row in records if not row["dropped"]}
        == {name for name in contents(whole) if name.endswith(".flac")}
    )


# ---------------------------------------------------------------- kills and shares


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_folder(checkpoint, texts, whole, tmp_path):
    output = tmp_path / "clips"
    # As slow as needed to be killed in the middle of it
    program = (
        "import time, generate_clips as g; make = g.make_batch\n"
        "def slow(*a): r = make(*a); time.sleep(60); return r\n"
        f"g.make_batch = slow; g.main({arguments(checkpoint, texts, output)!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.DEVNULL)
    records = output / "records-0.jsonl"
    deadline = time.monotonic() + 60
    while not (records.is_file() and records.read_bytes().endswith(b"\n")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(rows(records)) == 4 and not (output / "manifest.jsonl").exists()
    # what a kill at a worse moment leaves: half a line, half a clip
    unfinished = next(row for row in rows(whole / "records-0.jsonl")[4:] if not row["dropped"])
    with records.open("a") as file:
        file.write('{"name": "anna/0')
    (output / unfinished["voice"]).mkdir(exist_ok=True)
    (output / f"{unfinished['name']}.flac").write_bytes(b"fLaC")
    generate_clips.main(arguments(checkpoint, texts, output))
    assert_same(output, whole)
    names = [row["name"] for row in rows(records)]
    assert len(names) == len(set(names)) == 2 * PER_VOICE


def test_a_stop_request_ends_after_the_batch_with_a_manifest(checkpoint, texts, whole, tmp_path, monkeypatch, capsys):
    output, make_batch = tmp_path / "clips", generate_clips.make_batch

    def make_and_stop(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return make_batch(*arguments)

    monkeypatch.setattr(generate_clips, "make_batch", make_and_stop)
    stopped(generate_clips.main, arguments(checkpoint, texts, output))
    monkeypatch.undo()
    assert "process 0: 4 clips made now" in capsys.readouterr().out and (output / "manifest.jsonl").exists()
    generate_clips.main(arguments(checkpoint, texts, output))
    assert_same(output, whole)


def test_a_clip_that_cannot_be_written_is_not_recorded(checkpoint, texts, tmp_path, monkeypatch, refused):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    output = tmp_path / "clips"
    monkeypatch.setattr(soundfile, "write", full)
    assert "No space left" in refused(generate_clips.main, arguments(checkpoint, texts, output))
    assert not any(row["dropped"] == "" for path in output.glob("records-*.jsonl") for row in rows(path))


def test_processes_share_the_clips_and_the_folder(checkpoint, texts, whole, tmp_path, monkeypatch):
    output = tmp_path / "clips"
    for rank in (1, 0):
        monkeypatch.setattr(
            generate_clips, "stoppable_process", lambda device: nullcontext(Process(rank, 2, torch.device("cpu")))
        )
        generate_clips.main(arguments(checkpoint, texts, output))
    first, second = ({row["name"] for row in rows(output / f"records-{rank}.jsonl")} for rank in (0, 1))
    assert len(first) == len(second) == PER_VOICE and not first & second
    assert_same(output, whole)


def test_more_clips_come_on_top(checkpoint, texts, whole, tmp_path):
    output = tmp_path / "clips"
    base = arguments(checkpoint, texts, output)
    generate_clips.main([*base, "--per-voice", "6", "--voices", "Anna"])
    before = {path: path.stat().st_mtime_ns for path in (output / "anna").iterdir()}
    assert before and not (output / "de_ben").exists()
    generate_clips.main(base)
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())
    assert_same(output, whole)


# ---------------------------------------------------------------- refusals


def test_a_folder_with_a_torn_record_and_one_that_leads_out_of_it_goes_on(tmp_path):
    """A text with U+2028 is one record, as a version that split there has left it."""
    clips = plan(["anna", "../../x"], [("", "one\u2028two"), ("", "three")], 1, seed=0)
    assert [clip.name.partition("/")[0] for clip in clips][0] == "anna" and ".." not in clips[1].name.split("/")
    folder = ClipFolder(tmp_path / "clips")
    folder.record(clips, ["", "silence"], [1.0, 1.0])
    with folder.own.open("a", encoding="utf-8") as file:
        escaped = {**folder.records[clips[0].name], "name": "../../escaped/00000"}
        file.write(
            '{"name": "torn{"name": "x"}\n[]\n' + json.dumps(escaped) + "\n" + json.dumps({"name": "half"}) + "\n"
        )
    again = ClipFolder(tmp_path / "clips", rank=1)
    assert set(again.records) == {clip.name for clip in clips} and not again.missing(clips)
    assert again.records[clips[0].name]["text"] == clips[0].text
    again.write_manifest()
    assert [row["path"] for row in rows(tmp_path / "clips" / "manifest.jsonl")] == ["anna/00000.flac"]


def test_another_seed_or_other_sentences_are_refused(whole):
    folder = ClipFolder(whole)
    clips = plan(["anna", "de_ben"], SENTENCES, PER_VOICE, 0)
    assert folder.missing(clips) == []
    for other in (plan(["anna"], SENTENCES, PER_VOICE, 1), plan(["anna"], SENTENCES[:1], PER_VOICE, 0)):
        with pytest.raises(UserError, match="other sentences or another seed"):
            folder.missing(other)


@pytest.mark.parametrize(
    "more, message",
    [
        (["--voices", "nobody"], "no voice nobody"),
        (["--texts", "missing.tsv"], "missing.tsv does not exist"),
        (["--checkpoint", "missing"], "missing"),
        (["--per-voice", "0"], "--per-voice is 0"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--max-sec", "0"], "--max-sec is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--device", "tpu"], "device is tpu"),
    ],
)
def test_bad_input_is_one_sentence(checkpoint, texts, tmp_path, refused, more, message):
    assert message in refused(generate_clips.main, arguments(checkpoint, texts, tmp_path / "clips", *more))
