"""clone_voice.py on a small random checkpoint with an encoder: its files, what it prints, what it refuses."""

import re
import shutil

import pytest
import soundfile
import torch
from conftest import SPEECH, command_line, write_injected

import clone_voice
from voxtral.acoustic import CFG_ALPHA
from voxtral.text import split_text
from voxtral.tts import TTS, Request, named_voice

CLIP = SPEECH / "k_af_heart_0.opus"
LIMIT = 25  # frames: 2 s


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_injected(tmp_path_factory.mktemp("clone"), {"alpha": 13})


@pytest.fixture(scope="module")
def released(checkpoint):
    return checkpoint.parent / "released"


def words(checkpoint, output, *more):
    return [*command_line(checkpoint=checkpoint, output=output, max_sec=LIMIT * 0.08, device="cpu"), *map(str, more)]


def run(*arguments):
    clone_voice.main(words(*arguments))


def expected_audio(folder, voice, texts):
    """[n] of each text, without streaming."""
    tts = TTS.from_checkpoint(folder)
    takes = tts.generate([Request(text, voice, (0, i)) for i, text in enumerate(texts)], LIMIT)
    with torch.no_grad():
        return [tts.codec.decode(take.codes[None])[0, 0].clamp(-1, 1) for take in takes], takes


def read(path):
    audio, rate = soundfile.read(path, dtype="float32")
    assert rate == 24000 and audio.ndim == 1
    return torch.from_numpy(audio)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg"])
def test_writes_what_the_model_says(released, tmp_path, suffix):
    output = tmp_path / f"out{suffix}"
    run(released, output, "--voice", "alpha", "--text", "Good morning.")
    (audio,), _ = expected_audio(released, named_voice(released, "alpha"), ["Good morning."])
    written = read(output)
    assert len(written) == len(audio) > 0 and [path.name for path in tmp_path.iterdir()] == [output.name]
    tolerance = 1e-4 if suffix != ".ogg" else 0.3
    assert (written - audio).abs().max() < tolerance
    assert soundfile.info(output).format == suffix[1:].upper()


def test_several_texts_give_several_files(released, tmp_path, capsys):
    file = tmp_path / "text.txt"
    file.write_text("Good night.\n", encoding="utf-8")
    run(released, tmp_path / "out.wav", "--voice", "alpha", "--text", "Good morning.", "--text-file", file)
    audio, _ = expected_audio(released, named_voice(released, "alpha"), ["Good morning.", "Good night."])
    shown = capsys.readouterr().out
    for i, samples in enumerate(audio, 1):
        assert (read(tmp_path / f"out-{i}.wav") - samples).abs().max() < 1e-4
        assert f"out-{i}.wav: {len(samples) / 24000:.2f} s of audio" in shown
    assert not (tmp_path / "out.wav").exists()


def test_a_long_text_is_spoken_in_pieces_over_several_batches(released, tmp_path, monkeypatch):
    monkeypatch.setattr(clone_voice, "BATCH_SIZE", 2)
    sentences = [f"This is sentence number {word} of a very long story." for word in ("one", "two", "three")]
    monkeypatch.setattr(clone_voice, "split_text", lambda text: split_text(text, 60))
    run(released, tmp_path / "out.wav", "--voice", "alpha", "--text", " ".join(sentences))
    audio, _ = expected_audio(released, named_voice(released, "alpha"), sentences)
    pause = torch.zeros(4800)
    joined = torch.cat([audio[0], pause, audio[1], pause, audio[2]])
    written = read(tmp_path / "out.wav")
    assert len(written) == len(joined) and (written - joined).abs().max() < 1e-4


def test_reports_speed_and_a_missing_end(released, tmp_path, capsys):
    run(released, tmp_path / "out.wav", "--voice", "alpha", "--text", "hello there")
    _, (take,) = expected_audio(released, named_voice(released, "alpha"), ["hello there"])
    shown = capsys.readouterr()
    assert not take.ended and "warning: no END_AUDIO within 2 s, cut off there: hello there" in shown.err
    match = re.search(
        r"([\d.]+) s for 2\.00 s of audio: real-time factor ([\d.]+), first audio after (\d+) ms", shown.out
    )
    elapsed, factor, first_ms = map(float, match.groups())
    assert factor == pytest.approx(elapsed / 2, abs=0.01) and 0 < first_ms < 1000 * elapsed


def test_clones_a_recording_and_keeps_the_voice(checkpoint, tmp_path, capsys):
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    run(folder, tmp_path / "a.wav", "--reference", CLIP, "--text", "Good morning.", "--save-voice", "anna")
    rows = len(named_voice(folder, "anna"))
    assert f"{rows} rows" in capsys.readouterr().out
    run(folder, tmp_path / "b.wav", "--voice", "anna", "--text", "Good morning.")
    run(folder, tmp_path / "c.wav", "--voice", "alpha", "--text", "Good morning.")
    run(folder, tmp_path / "d.wav", "--voice", "anna", "--text", "Good morning.", "--seed", "1")
    cloned = (tmp_path / "a.wav").read_bytes()
    assert (tmp_path / "b.wav").read_bytes() == cloned
    assert cloned not in ((tmp_path / "c.wav").read_bytes(), (tmp_path / "d.wav").read_bytes())


@pytest.mark.parametrize(
    "more, message",
    [
        (["--voice", "nobody", "--text", "hi"], "no voice nobody: its voices are alpha"),
        (["--reference", CLIP, "--text", "hi"], "inject_encoder.py"),
        (["--reference", "missing.wav", "--text", "hi"], "inject_encoder.py"),
        (["--voice", "alpha"], "nothing to say"),
        (["--voice", "alpha", "--text", "hi", "--text", "  "], "nothing to say"),
        (["--voice", "alpha", "--text-file", "missing.txt"], "missing.txt does not exist"),
        (["--voice", "alpha", "--text", "hi", "--output", "out.mp3"], "must end in .wav, .flac, .ogg"),
        (["--voice", "alpha", "--text", "hi", "--save-voice", "anna"], "--save-voice needs --reference"),
        (["--reference", CLIP, "--text", "hi", "--save-voice", "alpha"], "alpha is a preset"),
        (["--reference", CLIP, "--text", "hi", "--save-voice", "An na"], "'An na' is no voice name"),
        (["--voice", "alpha", "--text", "hi", "--max-sec", "0.01"], "--max-sec is 0.01"),
        (["--voice", "alpha", "--text", "hi", "--seed", "-1"], "--seed is -1"),
        (["--voice", "alpha", "--text", "hi", "--cfg-alpha", "nan"], "--cfg-alpha is nan"),
        (["--voice", "alpha", "--text", "hi", "--device", "tpu"], "device is tpu"),
    ],
)
def test_bad_input_is_one_sentence(released, tmp_path, refused, more, message):
    assert message in refused(clone_voice.main, words(released, tmp_path / "out.wav", *more))
    assert list(tmp_path.iterdir()) == []


def test_a_recording_that_is_no_reference_is_refused(checkpoint, tmp_path, refused):
    soundfile.write(tmp_path / "short.wav", [0.1] * 2400, 24000)
    arguments = words(checkpoint, tmp_path / "out.wav", "--reference", tmp_path / "short.wav", "--text", "hi")
    assert "give 3 to 25 s" in refused(clone_voice.main, arguments)


def test_cfg_alpha_is_servings_unless_it_is_given(released, tmp_path):
    voice = named_voice(released, "alpha")
    for name, alpha, more in (("a", CFG_ALPHA, ()), ("b", 2.0, ("--cfg-alpha", 2))):
        run(released, tmp_path / f"{name}.wav", "--voice", "alpha", "--text", "Good morning.", *more)
        tts = TTS.from_checkpoint(released)
        (take,) = tts.generate([Request("Good morning.", voice, (0, 0), alpha)], LIMIT)
        with torch.no_grad():
            assert (
                read(tmp_path / f"{name}.wav") - tts.codec.decode(take.codes[None])[0, 0].clamp(-1, 1)
            ).abs().max() < 1e-4
    assert not torch.equal(read(tmp_path / "a.wav"), read(tmp_path / "b.wav"))


def test_needs_a_checkpoint(tmp_path, refused, monkeypatch):
    monkeypatch.delenv("VOXTRAL_CKPT", raising=False)
    arguments = command_line(voice="alpha", text="hi", output=tmp_path / "out.wav")
    assert "VOXTRAL_CKPT" in refused(clone_voice.main, arguments)
