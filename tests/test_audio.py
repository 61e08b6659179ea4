"""The door that audio comes in by: levels, channels, headers that lie, reasons, a silent stderr; a short fuzz."""

import os
from pathlib import Path

import fuzz
import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from voxtral import audio
from voxtral.audio import AUDIO_SUFFIXES, BadClip, load_segment, loudest_channel, read_header
from voxtral.reference import BadReference, prepare_reference

RATE = 24000
SPEECH = Path(__file__).parents[1] / "assets" / "speech" / "k_af_heart_0.opus"
DOORS = [(read_header, BadClip), (lambda p: load_segment(str(p), 0.0, 1.0), BadClip), (prepare_reference, BadReference)]
fast = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def speech(seconds=2.5):
    samples, rate = soundfile.read(SPEECH, dtype="float32")
    assert rate == RATE
    return samples[: round(seconds * RATE)] * np.float32(0.5 / np.abs(samples).max())


def write(path, samples, subtype="FLOAT", rate=RATE, **options):
    soundfile.write(path, samples, rate, subtype, **options)
    return path


def sdr(found, wanted):
    return 10 * np.log10((wanted**2).sum() / max(((found - wanted) ** 2).sum(), 1e-20))


# ---------------------------------------------------------------- levels


@fast
@given(st.floats(-30, 30), st.sampled_from(["FLOAT", "DOUBLE"]))
def test_a_reference_is_the_same_at_any_gain(tmp_path, exponent, subtype):
    wanted = prepare_reference(write(tmp_path / "a.wav", speech()))
    found = prepare_reference(write(tmp_path / "b.wav", speech().astype(np.float64) * 10**exponent, subtype))
    assert found.waveform.shape == wanted.waveform.shape and found.warnings == wanted.warnings
    assert sdr(found.waveform.numpy(), wanted.waveform.numpy()) > 80


def test_values_beyond_float32_are_read(tmp_path):
    wanted = prepare_reference(write(tmp_path / "a.wav", speech()))
    found = prepare_reference(write(tmp_path / "b.wav", speech().astype(np.float64) * 1e300, "DOUBLE"))
    assert sdr(found.waveform.numpy(), wanted.waveform.numpy()) > 80
    crop, _ = load_segment(str(tmp_path / "b.wav"), 0.0, 2.0)
    assert np.abs(crop).max() <= 1 and sdr(crop, speech(2.0) * 2) > 80  # its peak is 0.5


def test_full_scale_is_not_cut_by_the_high_pass(tmp_path):
    """Its overshoot passes 1, where torchaudio's filters clip."""
    n = np.arange(4 * RATE)
    square = np.sign(np.sin(2 * np.pi * 75 * n / RATE)) * (0.5 + 0.5 * (n % RATE > RATE // 3))
    loud, soft = (prepare_reference(write(tmp_path / "a.wav", square * gain)).waveform.numpy() for gain in (1.0, 0.25))
    assert sdr(loud, soft) > 80


def test_all_crops_of_a_loud_file_have_one_level(tmp_path):
    quiet_then_loud = np.concatenate([0.1 * np.ones(2 * RATE), 8 * np.ones(2 * RATE)]) * np.sin(np.arange(4 * RATE))
    path = str(write(tmp_path / "a.wav", quiet_then_loud))
    first, last = (np.abs(load_segment(path, position, 1.0)[0]).max() for position in (0.0, 0.99))
    assert last == pytest.approx(1, abs=0.01) and first == pytest.approx(0.1 / 8, rel=0.02)


# ---------------------------------------------------------------- channels


@fast
@given(st.integers(1, 8), st.data())
def test_the_channel_with_speech_is_taken_whole(tmp_path, n_channels, data):
    """Others hold its opposite, an offset, rumble or nothing."""
    voice, at = speech(2.0), data.draw(st.integers(0, n_channels - 1))
    time = np.arange(len(voice)) / RATE
    others = [0 * voice, -0.9 * voice, 0.4 + 0 * voice, 0.9 * np.sin(2 * np.pi * 30 * time)]
    channels = [others[data.draw(st.integers(0, 3))] for _ in range(n_channels)]
    channels[at] = voice
    path = str(write(tmp_path / "a.wav", np.stack(channels, 1)))
    assert loudest_channel(np.stack(channels, 1), RATE)[1] == at
    crop, _ = load_segment(path, 0.0, 2.0)
    assert sdr(crop, voice) > 80
    reference = prepare_reference(path)
    assert (f"{n_channels} channels: number {at + 1} is taken" in " ".join(reference.notes)) == (n_channels > 1)


# ---------------------------------------------------------------- headers


def patched(content, at, value):
    return content[:at] + value + content[at + len(value) :]


@pytest.mark.parametrize("size", [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f"])
def test_a_wav_of_unknown_length_is_read_as_long_as_it_is(tmp_path, size):
    path = write(tmp_path / "a.wav", speech(), "PCM_16")
    content = path.read_bytes()
    path.write_bytes(patched(patched(content, content.index(b"data") + 4, size), 4, size))
    assert read_header(path).frames == pytest.approx(2.5 * RATE, abs=1)
    assert len(load_segment(str(path), 0.5, 1.0)[0]) == RATE and prepare_reference(path).seconds > 2


def test_a_streamed_flac_and_a_cut_one_have_the_length_that_can_be_decoded(tmp_path):
    path = write(tmp_path / "a.flac", speech(), "PCM_16")
    content = path.read_bytes()
    streaminfo = bytearray(content)
    streaminfo[21] &= 0xF0  # 36 bits: number of samples
    streaminfo[22:26] = bytes(4)
    path.write_bytes(streaminfo)
    assert soundfile.info(path).frames > 2**60 and read_header(path).frames == 2.5 * RATE
    assert len(load_segment(str(path), 0.5, 1.0)[0]) == RATE and prepare_reference(path).seconds > 2
    path.write_bytes(content[: len(content) * 2 // 3])
    assert RATE < read_header(path).frames < 2.2 * RATE
    assert len(load_segment(str(path), 0.9, 1.0)[0]) == RATE and prepare_reference(path).seconds > 1


@pytest.mark.parametrize("rate", [1, 100, 3999, 768_001, 2**31 - 1])
def test_rates_that_no_speech_has_are_refused_alike(tmp_path, rate):
    path = write(tmp_path / "a.wav", speech(), "PCM_16")
    path.write_bytes(patched(path.read_bytes(), 24, rate.to_bytes(4, "little")))
    for door, error in DOORS:
        with pytest.raises(error, match=f"has a rate of {rate} Hz"):
            door(path)


@pytest.mark.parametrize(
    "container, subtype, suffix",
    [
        ("WAV", "PCM_16", ".wave"),
        ("AU", "PCM_16", ".au"),
        ("CAF", "PCM_16", ".caf"),
        ("W64", "PCM_16", ".w64"),
        ("AIFF", "PCM_16", ".aifc"),
        ("NIST", "PCM_16", ".sph"),
        ("RF64", "PCM_16", ".rf64"),
        ("VOC", "PCM_16", ".voc"),
    ],
)
def test_what_libsndfile_reads_is_read(tmp_path, container, subtype, suffix):
    path = write(tmp_path / f"a{suffix}", speech(), subtype, format=container)
    assert suffix in AUDIO_SUFFIXES and read_header(path).frames == 2.5 * RATE


# ---------------------------------------------------------------- reasons


@pytest.mark.parametrize(
    "content, reason",
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>404", "is HTML, not audio"),
        (b"\n <html>", "is HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS"),
        (b"\0\0\0\x18ftypM4A ", "is MP4"),
        (b"\x1aE\xdf\xa3webm", "WebM"),
        (b"PK\3\4", "is an archive"),
        (b'{"a": 1}', "is text, not audio"),
        (bytes(500), "holds zeros only"),
        (b"\0\5\x16\7\0", "of macOS"),
    ],
)
def test_reasons_say_what_a_file_is(tmp_path, content, reason):
    path = tmp_path / "a.wav"
    if content is not None:
        path.write_bytes(content)
    for door, error in DOORS:
        with pytest.raises(error, match=reason):
            door(path)


def test_a_folder_a_pipe_a_device_and_odd_names_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    for path, reason in (
        (tmp_path, "is a folder"),
        (tmp_path / "pipe.wav", "no regular file"),
        ("/dev/zero", "no regular file"),
        ("a\0b.wav", "does not exist"),
        (str(tmp_path / ("x" * 300)), "too long"),
        ("/etc/passwd/a.wav", "does not exist"),
    ):
        with pytest.raises(BadClip, match=reason):
            load_segment(str(path), 0.0, 1.0)


def test_a_name_that_is_no_utf8_is_read(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.wav")
    with open(path, "wb") as file:
        soundfile.write(file, speech(), RATE, "PCM_16", format="WAV")
    assert (
        read_header(path).rate == RATE
        and len(load_segment(path, 0.0, 1.0)[0]) == RATE
        and prepare_reference(path).seconds > 2
    )


def test_decoders_are_quiet_and_counted_and_others_are_heard(tmp_path, capfd):
    path = write(tmp_path / "a.mp3", speech(), None, format="MP3")
    content = bytearray(path.read_bytes())
    content[600:700] = bytes(100)
    path.write_bytes(content)
    before = audio.complaints()
    with audio.quiet_decoders():
        for position in (0.0, 0.3, 0.7):
            load_segment(str(path), position, 0.5)
        os.write(2, b"said meanwhile\n")
    assert capfd.readouterr().err == "said meanwhile\n" and audio.complaints() > before


# ---------------------------------------------------------------- everything that is damaged


def test_fuzz():
    """A part of `python tests/fuzz.py`, which tries thousands."""
    counts, findings = fuzz.run(315, seed=3)
    assert not findings, "\n".join(findings)
    assert sum(counts.values()) == 315 and {outcome for _, outcome in counts} == {"read", "refused"}


def test_the_fuzz_finds_what_is_wrong(monkeypatch):
    monkeypatch.setattr(fuzz, "doors", lambda *_: [lambda: [].pop()])
    counts, findings = fuzz.run(2, seed=0)
    assert len(findings) == 2 and "IndexError" in findings[0]
