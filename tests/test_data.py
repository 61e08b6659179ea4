"""Finding clips, reading crops of them, and the sample stream: all repeats exactly, no bad file is fatal."""

import json
import multiprocessing
import os
import signal
import sys
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import soxr
import torch
from conftest import signal_group
from omegaconf import OmegaConf

from voxtral import data
from voxtral.data import (
    BadClip,
    BatchSampler,
    SampleStream,
    SpeechDataset,
    collate,
    load_segment,
    make_loader,
    steps_per_epoch,
    validation_batches,
)
from voxtral.params import CodecParams
from voxtral.processes import StopSignal, training_process
from voxtral.run import BadClipLog
from voxtral.sources import Clip, DataConfig, DataError, SourceConfig, ValidationConfig, find_clips, split_validation


def noise(seconds, rate, seed=0):
    """White noise below 3 kHz at -20 dB: any crop of it can be told from any other."""
    samples = 0.1 * np.random.default_rng(seed).standard_normal(round(seconds * 8000))
    spectrum = np.fft.rfft(samples)[: len(samples) * 3 // 8]
    return soxr.resample(np.fft.irfft(spectrum, len(samples)), 8000, rate).astype(np.float32)


def write(path, audio, rate, subtype=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, audio, rate, subtype, format="OGG" if path.suffix == ".opus" else None)
    return str(path)


def whole_at_24k(path):
    audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return soxr.resample(audio[:, 0], rate, 24000, quality="HQ")


def best_match(crop, whole):
    """Where `crop` lies in `whole`, samples."""
    size = len(whole) + len(crop)
    product = np.fft.rfft(whole, size) * np.conj(np.fft.rfft(crop, size))
    return int(np.fft.irfft(product, size)[: len(whole)].argmax())


# ---------------------------------------------------------------- reading

FORMATS = [
    ("wav", 8000, "PCM_16", 1),
    ("wav", 11025, "PCM_16", 1),
    ("flac", 16000, None, 2),
    ("wav", 24000, "FLOAT", 1),
    ("flac", 44100, None, 2),
    ("mp3", 44100, None, 1),
    ("ogg", 48000, "VORBIS", 1),
    ("wav", 48000, "PCM_24", 2),
]


@pytest.mark.parametrize("suffix, rate, subtype, channels", FORMATS)
@pytest.mark.parametrize("position", [0.0, 0.37, 0.999999])
def test_crop_equals_part_of_resampled_file(tmp_path, suffix, rate, subtype, channels, position):
    audio = np.stack([noise(5, rate, seed) / 3**seed for seed in range(channels)], axis=1)
    path = write(tmp_path / f"a.{suffix}", audio, rate, subtype)
    crop, native_rate = load_segment(path, position, 1.3)
    whole = whole_at_24k(path)
    start = best_match(crop, whole)
    assert crop.dtype == np.float32 and len(crop) == 31200 and native_rate == rate
    assert abs(start / 24000 - position * (len(whole) / 24000 - 1.3)) < 0.03
    np.testing.assert_allclose(crop, whole[start : start + len(crop)], atol=2e-6)


def test_opus_crop(tmp_path):
    """Opus decoders converge after a seek instead of repeating themselves exactly."""
    path = write(tmp_path / "a.opus", noise(5, 24000), 24000, "OPUS")
    crop, rate = load_segment(path, 0.5, 1.0)
    whole = whole_at_24k(path)
    start = best_match(crop, whole)
    assert rate == 24000 and abs(start - 48000) < 100
    assert np.corrcoef(crop, whole[start : start + 24000])[0, 1] > 0.99


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
def test_sine_keeps_frequency_and_amplitude(tmp_path, rate):
    sine = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(3 * rate) / rate)
    path = write(tmp_path / "a.wav", sine, rate, "FLOAT")
    crop, _ = load_segment(path, 0.4, 1.0)
    spectrum = np.abs(np.fft.rfft(crop * np.hanning(24000))) / 6000  # 1 Hz per bin
    assert spectrum.argmax() == 1000 and spectrum[1000] == pytest.approx(0.5, abs=0.001)


@pytest.mark.parametrize("rate, speed", [(22050, 1.2), (24000, 0.84), (44100, 0.9)])
def test_a_faster_crop_is_higher_and_starts_at_the_same_place(tmp_path, rate, speed):
    """Past its middle the tone doubles: the crop from there on has its second half, at `speed` times its pitch."""
    time = np.arange(4 * rate) / rate
    path = write(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 1000 * time * np.where(time < 2, 1, 2)), rate, "FLOAT")
    crop, native_rate = load_segment(path, 0.5 / (1 - 0.25 * speed), 1.0, speed)
    spectrum = np.abs(np.fft.rfft(crop[1200:] * np.hanning(22800))) / 5700
    heard = spectrum.argmax() / 0.95
    assert native_rate == rate and len(crop) == 24000
    assert heard == pytest.approx(2000 * speed, rel=0.005) and 0.4 < spectrum.max() < 0.52


def test_speeds_are_drawn_between_the_two_and_not_for_fixed_clips(tmp_path, monkeypatch):
    clips = [Clip(write(tmp_path / "a.wav", noise(1, 24000), 24000), "anna", 0)]
    speeds, load = [], data.load_segment
    monkeypatch.setattr(data, "load_segment", lambda *args: speeds.append(args[3]) or load(*args))
    dataset = SpeechDataset(clips, 0.5, seed=0, speed=[0.9, 1.2])
    first = [dataset[number, 0]["waveform"] for number in range(50)]
    assert 0.9 <= min(speeds) < 0.95 and 1.15 < max(speeds) <= 1.2
    assert torch.equal(dataset[7, 0]["waveform"], first[7])
    speeds.clear()
    SpeechDataset(clips, 0.5, seed=0, fixed=True, speed=[0.9, 1.2])[0, 0]
    assert set(speeds) == {1.0}


def test_long_file_is_not_decoded_as_a_whole(tmp_path, monkeypatch):
    path = write(tmp_path / "a.flac", noise(30, 16000), 16000)
    read, decoded = soundfile.SoundFile.read, []
    monkeypatch.setattr(
        soundfile.SoundFile, "read", lambda *args, **options: decoded.append(read(*args, **options)) or decoded[-1]
    )
    load_segment(path, 0.6, 1.0)
    assert sum(map(len, decoded)) < 1.1 * 16000


def test_short_file_comes_whole(tmp_path):
    path = write(tmp_path / "a.wav", noise(0.7, 16000), 16000)
    crop, _ = load_segment(path, 0.9, 4.0)
    np.testing.assert_allclose(crop, whole_at_24k(path), atol=1e-6)


def bad_files(folder):
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0).bytes(20000)
    (folder / "nothing.wav").write_bytes(b"")
    (folder / "random.wav").write_bytes(random)
    (folder / "random.flac").write_bytes(random)
    write(folder / "header.wav", np.zeros(0), 16000)
    write(folder / "short.wav", noise(0.09, 16000), 16000)
    write(folder / "nan.wav", np.where(np.arange(8000) == 5000, np.nan, 0.1), 16000, "FLOAT")
    return {
        "nothing.wav": "is empty",
        "random.wav": "cannot be read",
        "random.flac": "cannot be read",
        "header.wav": "is empty",
        "short.wav": "shorter than 0.1 s",
        "nan.wav": "not finite",
        "gone.wav": "does not exist",
    }


@pytest.mark.parametrize("suffix, rate", [("wav", 16000), ("flac", 16000), ("mp3", 44100)])
def test_truncated_file_gives_what_is_left(tmp_path, suffix, rate):
    path = tmp_path / f"a.{suffix}"
    whole = whole_at_24k(write(path, noise(8, rate), rate))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    for position in (0.0, 0.5, 0.99):
        crop, _ = load_segment(str(path), position, 1.0)
        start = best_match(crop, whole)
        assert len(crop) == 24000 and start + len(crop) <= len(whole) * 0.52
        np.testing.assert_allclose(crop[1000:-1000], whole[start + 1000 : start + 23000], atol=5e-3)


# ---------------------------------------------------------------- samples and batches


@pytest.fixture
def clips(tmp_path):
    """12 clips of 0.4 to 0.95 s at three rates, two sources."""
    paths = [
        write(tmp_path / f"good{i}.wav", noise(0.4 + 0.05 * i, rate, i), rate)
        for i, rate in enumerate([16000, 24000, 44100] * 4)
    ]
    return [Clip(path, f"speaker{i % 3}", int(i >= 8)) for i, path in enumerate(paths)]


def config_for(n_sources=2, weights=(1.0, 1.0), **values):
    listed = [SourceConfig(kind="folder", weight=weight) for weight in weights[:n_sources]]
    return DataConfig(**{"sources": listed, "batch_size": 2, "max_sec": 0.5, "num_workers": 0, **values})


def first(n, clips, config, seed=0, **values):
    return list(islice(make_loader(SpeechDataset(clips, config.max_sec, seed), config, seed, **values), n))


def assert_same(batches, others):
    assert len(batches) == len(others)
    for a, b in zip(batches, others):
        assert a.indices == b.indices and a.bad == b.bad
        for name in ("waveform", "lengths", "native_rates"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


def joined(batches):
    return torch.cat([batch.waveform for batch in batches])


def test_batch_is_padded_and_describes_its_clips(clips):
    for batch in first(6, clips, config_for()):
        assert batch.waveform.shape == (2, 1, 12000) and batch.waveform.dtype == torch.float32
        for i, index in enumerate(batch.indices):
            info = soundfile.info(clips[index].path)
            assert batch.native_rates[i] == info.samplerate
            assert batch.lengths[i] == min(12000, round(info.duration * 24000))
            assert not batch.waveform[i, 0, batch.lengths[i] :].any()
            assert batch.waveform[i, 0, batch.lengths[i] - 200 : batch.lengths[i]].any()
    moved = batch.to("meta")
    assert moved.waveform.device.type == moved.lengths.device.type == moved.native_rates.device.type == "meta"
    assert moved.indices == batch.indices


def test_seed_decides_order_and_crops(clips):
    config = config_for()
    five, again, six = (first(8, clips, config, seed=seed) for seed in (5, 5, 6))
    assert_same(five, again)
    assert [batch.indices for batch in five] != [batch.indices for batch in six]
    long = [clips[-1]]
    assert not torch.equal(joined(first(1, long, config, seed=5)), joined(first(1, long, config, seed=6)))


def test_crops_differ_between_samples(clips):
    (batch,) = first(1, clips[-1:], config_for(batch_size=8))
    assert len({tuple(waveform[0, :50].tolist()) for waveform in batch.waveform}) == 8


@pytest.mark.parametrize("accumulation", [1, 3])
def test_resuming_equals_skipping(clips, accumulation):
    config = config_for()
    through = first(8 * accumulation, clips, config, accumulation=accumulation)
    resumed = first(3 * accumulation, clips, config, accumulation=accumulation, start_step=5)
    assert_same(through[5 * accumulation :], resumed)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_equal_one_with_twice_the_batch(clips, accumulation):
    options = {"accumulation": accumulation, "start_step": 1}
    one = first(8, clips, config_for(batch_size=4), **options)
    two = [first(8, clips, config_for(batch_size=2), **options, rank=rank, world_size=2) for rank in (0, 1)]
    for micro_batch, *parts in zip(one, *two):
        assert micro_batch.indices == parts[0].indices + parts[1].indices
        assert torch.equal(micro_batch.waveform, joined(parts))


def test_accumulation_equals_a_larger_batch(clips):
    large = first(2, clips, config_for(batch_size=6), start_step=3)
    small = first(6, clips, config_for(batch_size=2), start_step=3, accumulation=3)
    assert torch.equal(joined(large), joined(small))


def test_workers_are_forked_whatever_started_this_process(clips, monkeypatch):
    """A worker of the start method forkserver imports the main script anew, which takes it many seconds."""
    monkeypatch.setattr(
        multiprocessing.context._default_context, "_actual_context", multiprocessing.get_context("forkserver")
    )
    assert multiprocessing.get_start_method() == "forkserver"
    loader = make_loader(SpeechDataset(clips, 0.5, 0), config_for(num_workers=1), 0)
    assert loader.multiprocessing_context.get_start_method() == "fork"


def test_workers_change_nothing(clips, tmp_path):
    bad_files(tmp_path / "bad")
    clips = clips + [Clip(str(tmp_path / "bad/random.wav"), "x", 0)]
    alone, helped = (first(14, clips, config_for(num_workers=workers), start_step=3) for workers in (0, 2))
    assert_same(alone, helped)
    assert any(batch.bad for batch in alone)


def test_epoch_has_every_clip_once(clips):
    stream = SampleStream(clips, config_for(), seed=1)
    epochs = [[stream[number] for number in range(12 * epoch, 12 * epoch + 12)] for epoch in range(3)]
    assert stream.epoch_size == 12 and [sorted(epoch) for epoch in epochs] == [list(range(12))] * 3
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])
    assert [stream[number] for number in range(12)] == epochs[0]  # going back is allowed


def test_weights_are_passes_per_epoch(clips):
    config = config_for(weights=(0.25, 2.5), batch_size=4)  # of 8 and of 4 clips
    stream = SampleStream(clips, config, seed=0)
    assert stream.epoch_size == 2 + 10
    counts = np.stack([np.bincount(stream.order(epoch), minlength=12) for epoch in range(20)])
    assert (counts[:, :8].sum(1) == 2).all() and counts[:, :8].max() == 1
    assert set(counts[:, 8:].flatten()) == {2, 3} and (counts[:, 8:].sum(1) == 10).all()
    assert (counts[:, :8].sum(0) > 0).all() and (counts[:, 8:].max(0) == 3).all()  # a new part each epoch
    assert steps_per_epoch(clips, config) == 3 and steps_per_epoch(clips, config, 2, 3) == 0.5


def test_stream_follows_the_steps(clips):
    stream = SampleStream(clips, config_for(), seed=0)
    sampler = BatchSampler(stream, batch_size=2, start_step=4, rank=1, world_size=2, accumulation=3)
    numbers = [[number for number, _ in batch] for batch in islice(sampler, 4)]
    assert numbers == [[50, 51], [54, 55], [58, 59], [62, 63]]  # 4 * 12 + micro-batch * 4 + rank * 2


def test_bad_clips_are_replaced_and_reported(clips, tmp_path):
    reasons = bad_files(tmp_path / "bad")
    bad = [Clip(str(tmp_path / "bad" / name), "x", 0) for name in reasons]
    everything = bad[:4] + clips + bad[4:]
    config = config_for(batch_size=19)
    epoch, again = first(1, everything, config, seed=3), first(1, everything, config, seed=3)
    assert_same(epoch, again)
    reported = dict(epoch[0].bad)
    assert set(reported) == {clip.path for clip in bad}
    assert all(reason in reported[str(tmp_path / "bad" / name)] for name, reason in reasons.items())
    assert all(everything[index] in clips for index in epoch[0].indices)  # those that were read
    assert epoch[0].waveform.abs().amax((1, 2)).min() > 0.01

    log = BadClipLog(tmp_path)
    log.add(epoch[0].bad)
    log.add(epoch[0].bad)
    assert log.count == 2 * len(epoch[0].bad)
    resumed = BadClipLog(tmp_path)
    resumed.add(epoch[0].bad)
    lines = (tmp_path / "bad_files.txt").read_text().splitlines()
    assert sorted(lines) == sorted(f"{path}\t{reason}" for path, reason in reported.items())


@pytest.mark.parametrize("workers", [0, 2])
def test_only_bad_clips_is_an_error(tmp_path, workers, monkeypatch):
    # or the trainer reads the first batch itself
    monkeypatch.setattr("voxtral.loader.SHARED_MEMORY", tmp_path / "unknown")
    bad = [Clip(str(tmp_path / name), "x", 0) for name in bad_files(tmp_path)]
    batches = iter(make_loader(SpeechDataset(bad, 0.5, seed=0), config_for(num_workers=workers), seed=0))
    with pytest.raises(DataError, match="^20 clips in a row [^\n]*$") as error:
        next(batches)
    error.value.__traceback__ = None  # keeps the loader, which then waits 5 s for each of its processes
    del error
    with pytest.raises(DataError, match="None of the 7 clips"):
        validation_batches(bad, config_for())


def test_small_shared_memory_is_found_before_the_first_batch(clips, monkeypatch):
    """Two processes with four batches each on their way, two more in use: ten batches of 2 x 0.5 s (float32)."""
    n_bytes = 2 * 12000 * 4 + 2 * 2 * 8  # waveforms, lengths, rates
    free = {"bytes": 10 * n_bytes}
    monkeypatch.setattr("voxtral.loader.shutil.disk_usage", lambda path: SimpleNamespace(free=free["bytes"]))
    next(iter(make_loader(SpeechDataset(clips, 0.5, 0), config_for(num_workers=2), 0)))
    for n_bytes_free, fits in ((10 * n_bytes - 1, 1), (1, 0)):
        free["bytes"] = n_bytes_free
        with pytest.raises(DataError, match=f"--shm-size=1g, or set data.num_workers={fits}"):
            iter(make_loader(SpeechDataset(clips, 0.5, 0), config_for(num_workers=2), 0))
    iter(make_loader(SpeechDataset(clips, 0.5, 0), config_for(num_workers=0), 0))  # has no need of it
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    free["bytes"] = 10 * n_bytes
    with pytest.raises(DataError, match="needs"):  # the other trainer of this machine needs as much
        iter(make_loader(SpeechDataset(clips, 0.5, 0), config_for(num_workers=2), 0))


def lost(items):
    """A batch that no queue can carry: the worker goes on without it, as it does when shared memory is full."""
    if any(item["index"] == 3 for item in items):
        return lambda: None
    return collate(items)


def killed(items):
    if multiprocessing.parent_process():
        os.kill(os.getpid(), signal.SIGKILL)
    return collate(items)


@pytest.mark.parametrize("collate, reason", [(lost, "timed out after 2 seconds"), (killed, "exited unexpectedly")])
def test_a_lost_batch_ends_the_run_with_a_sentence(clips, monkeypatch, collate, reason):
    monkeypatch.setattr("voxtral.loader.LOST_AFTER_SEC", 2)
    began = time.monotonic()
    dataset, said = SpeechDataset(clips, 0.5, 0), f"a batch was lost .DataLoader.*{reason}[^\\n]*resume=true.$"
    with pytest.raises(SystemExit, match=f"^training stopped: {said}"), training_process("cpu"):
        for _ in zip(range(40), make_loader(dataset, config_for(num_workers=1), 0, collate=collate)):
            pass
    assert time.monotonic() - began < 20


def test_loader_processes_outlive_the_signals_of_a_group_but_not_their_trainer(clips):
    batches = iter(make_loader(SpeechDataset(clips, 0.5, 0), config_for(num_workers=2), 0))
    next(batches)
    stop = StopSignal()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal_group(number)
    for _ in range(20):
        next(batches)
    assert stop.received
    stop.close()
    for worker in multiprocessing.active_children():  # as at the end of a trainer that has failed
        worker.terminate()
        worker.join(10)
        assert worker.exitcode == 0


def test_validation_batches_are_fixed_and_repeatable(clips, tmp_path):
    gone = Clip(str(tmp_path / "gone.wav"), "x", 0)
    batches = validation_batches([gone] + clips[:5], config_for())
    assert [batch.indices for batch in batches] == [[1, 2], [3, 4], [5]]
    assert [path for path, _ in batches[0].bad] == [gone.path] and not batches[1].bad
    for i, waveform in enumerate(joined(batches)):
        start = whole_at_24k(clips[i].path)[:12000]
        np.testing.assert_allclose(waveform[0, : len(start)], start, atol=2e-6)
    assert len(list(batches)) == len(list(batches)) == 3  # iterating twice
    assert_same(batches, validation_batches([gone] + clips[:5], config_for()))


# ---------------------------------------------------------------- sources


def found(tmp_path, **source):
    present, absent = find_clips(DataConfig(data_root=str(tmp_path), sources=[SourceConfig(**source)]))
    return [(os.path.relpath(clip.path, tmp_path), clip.speaker, clip.text) for clip in present[0]], absent


def touch(path, content=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def test_folder(tmp_path):
    for name in ("b/2.WAV", "b/1.flac", "a/x/3.opus", "a/x/notes.txt", "a/.hidden.wav"):
        touch(tmp_path / "mine" / name)
    touch(tmp_path / "elsewhere/linked/4.mp3")
    (tmp_path / "mine/c").symlink_to(tmp_path / "elsewhere")
    clips, left_out = found(tmp_path, kind="folder", path="mine")
    assert clips == [
        ("mine/a/x/3.opus", "x", ""),
        ("mine/b/1.flac", "b", ""),
        ("mine/b/2.WAV", "b", ""),
        ("mine/c/linked/4.mp3", "linked", ""),
    ]
    assert ["hidden" in left_out[0], ".txt: no audio (a/x/notes.txt)" in left_out[1]] == [True, True]
    assert found(tmp_path, kind="folder", path="mine", pattern="b/*")[0] == clips[1:3]
    assert found(tmp_path, kind="folder", path=str(tmp_path / "mine"))[0] == clips


@pytest.mark.parametrize(
    "folder, path", [("LibriSpeech", ""), ("LibriSpeech", "LibriSpeech"), ("LibriTTS_R", ""), ("deep/LibriTTS", "deep")]
)
def test_librispeech(tmp_path, folder, path):
    for name in (
        "train-other-500/20/7/20-7-0.flac",
        "train-clean-360/14/3/14-3-1.wav",
        "train-clean-360/14/3/14-3.trans.txt",
        "train-clean-360/14/3/14-3.trans.tsv",
        "train-clean-360/14/3/14-3-2.m4a",
        "train-clean-360/stray.flac",
        "dev-clean/1/1/1.flac",
    ):
        touch(tmp_path / folder / name)
    subsets = ["train-other-500", "train-clean-100", "train-clean-360"]
    clips, absent = found(tmp_path, kind="librispeech", path=path, name="books", subsets=subsets)
    assert clips == [
        (f"{folder}/train-clean-360/14/3/14-3-1.wav", "14", ""),
        (f"{folder}/train-other-500/20/7/20-7-0.flac", "20", ""),
    ]
    assert absent[0] == f"absent: books: {tmp_path / path / 'train-clean-100'}"
    assert "1 passed over: not where */*/* looks (stray.flac)" in "\n".join(absent)
    assert any(".m4a: " in line for line in absent) and not any(".t" in line for line in absent)  # no word of the texts


@pytest.mark.parametrize("release", ["", "cv-corpus-17.0-2024-03-15/"])
def test_common_voice(tmp_path, release):
    table = f'client_id\tpath\tsentence\n{"ab" * 64}\t2.mp3\t"No\n{"cd" * 64}\t1.mp3\tYes\n'
    touch(tmp_path / f"cv/{release}en/train.tsv", table)
    touch(tmp_path / "cv/cv-corpus-9.0-2022-04-27/en/train.tsv", table.replace("Yes", "old"))
    clips, _ = found(tmp_path, kind="common_voice", path="cv", language="en")
    assert clips == [(f"cv/{release}en/clips/1.mp3", "cd" * 8, "Yes"), (f"cv/{release}en/clips/2.mp3", "ab" * 8, '"No')]


def test_generated(tmp_path):
    rows = [
        {"audio": f"audio/{i}.wav", "codes": f"codes/{i}.npy", "text": "Hello", "voice": "casual_male"} for i in (1, 0)
    ]
    folder = tmp_path / "presets"
    touch(folder / "manifest.jsonl", "\n\n".join(map(json.dumps, rows)))
    source = SourceConfig(kind="generated", path="presets")
    present, _ = find_clips(DataConfig(data_root=str(tmp_path), sources=[source]))
    assert present == [
        [Clip(f"{folder}/audio/{i}.wav", "casual_male", 0, "Hello", f"{folder}/codes/{i}.npy") for i in (0, 1)]
    ]


def test_manifest(tmp_path):
    touch(tmp_path / "sets/a.csv", 'path,speaker,text\nx/2.wav,ann,"Yes, please"\nx/1.wav,,\n')
    assert found(tmp_path, kind="manifest", path="sets/a.csv")[0] == [
        ("sets/x/1.wav", "x", ""),
        ("sets/x/2.wav", "ann", "Yes, please"),
    ]
    touch(tmp_path / "sets/b.jsonl", '{"path": "1.wav", "speaker": 84}\n')
    assert found(tmp_path, kind="manifest", path="sets/b.jsonl")[0] == [("sets/1.wav", "84", "")]
    touch(tmp_path / "sets/c.csv", "file,speaker\n1.wav,ann\n")
    assert found(tmp_path, kind="manifest", path="sets/c.csv")[0] == [("sets/1.wav", "ann", "")]
    touch(tmp_path / "sets/d.jsonl", '{"path": "1.wav"}\n{"path": \n')
    clips, (line,) = found(tmp_path, kind="manifest", path="sets/d.jsonl")
    assert clips == [("sets/1.wav", "sets", "")] and "1 passed over: a line that is no JSON object" in line
    assert "line 2" in line


def test_huggingface_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"data.sources\[0\].*pip install datasets"):
        found(tmp_path, kind="huggingface", path="any/thing")


def test_huggingface_copies_once_and_goes_on_after_an_interruption(tmp_path, monkeypatch):
    folder = tmp_path / "set/data/train"
    for i in range(6):
        write(folder / f"clip{i}.flac", noise(0.3, 24000, i), 24000)
    touch(
        folder / "metadata.csv",
        "file_name,speaker_id,text\n" + "".join(f"clip{i}.flac,s{i % 2},text {i}\n" for i in range(6)),
    )
    source = {"kind": "huggingface", "path": str(tmp_path / "set"), "max_clips": 5}
    replace, written = os.replace, []

    def interrupted(old, new):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(str(new))
        replace(old, new)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        found(tmp_path, **source)
    (part,) = tmp_path.glob("huggingface/*/manifest.jsonl.part")
    assert not part.with_suffix("").exists()
    with part.open("a") as file:
        file.write('{"path": "torn')
    monkeypatch.setattr(os, "replace", lambda old, new: written.append(str(new)) or replace(old, new))
    clips, _ = found(tmp_path, **source)
    assert len(written) == len(set(written)) == 6  # five clips and the manifest, none twice
    assert [(speaker, text) for _, speaker, text in clips] == [(f"s{i % 2}", f"text {i}") for i in range(5)]
    for i, (path, _, _) in enumerate(clips):
        assert (tmp_path / path).read_bytes() == (folder / f"clip{i}.flac").read_bytes()
    monkeypatch.setitem(sys.modules, "datasets", None)  # from now on the copy is enough
    assert found(tmp_path, **source)[0] == clips


def test_present_sources_are_used_and_absent_ones_named(tmp_path):
    touch(tmp_path / "b/1.wav")
    (tmp_path / "c").mkdir()
    config = DataConfig(
        data_root=str(tmp_path),
        sources=[
            SourceConfig(kind="common_voice", path="cv", language="ar"),
            SourceConfig(kind="folder", path="b"),
            SourceConfig(kind="folder", path="c"),
            SourceConfig(kind="manifest", path="m.csv", name="extra"),
        ],
    )
    present, absent = find_clips(config)
    assert [[clip.source for clip in clips] for clips in present] == [[1]]
    assert absent == [
        f"absent: common_voice cv ar: {tmp_path}/cv/ar/train.tsv",
        f"absent: folder c: no audio in {tmp_path}/c",
        f"absent: extra: {tmp_path}/m.csv",
    ]
    with pytest.raises(DataError, match=f"data.sources.*{tmp_path}/gone"):
        found(tmp_path, kind="folder", path="gone")
    with pytest.raises(DataError, match="data.sources is empty"):
        find_clips(DataConfig())


@pytest.mark.parametrize(
    "values, message",
    [
        ({"sources": [SourceConfig(kind="librispech")]}, r"sources\[0\].kind is 'librispech'.* 'librispeech'"),
        ({"sources": [SourceConfig(kind="folder"), SourceConfig(kind="folder", weight=0)]}, "1..weight is 0"),
        ({"sources": [SourceConfig(kind="librispeech")]}, r"sources\[0\].subsets"),
        ({"sources": [SourceConfig(kind="common_voice")]}, r"sources\[0\].language"),
        ({"speed": [1.2, 0.9]}, r"data.speed is \[1.2, 0.9\]"),
        ({"speed": [1.0]}, "data.speed"),
    ],
)
def test_unusable_values_are_named(values, message):
    with pytest.raises(DataError, match=message):
        find_clips(DataConfig(**values))


def made_up(n, source, folder="/data"):
    return [Clip(f"{folder}/speaker{i % 5}/{i}.wav", f"speaker{i % 5}", source) for i in range(n)]


def test_validation_clips_are_never_trained_on():
    sets = [made_up(30, 0), made_up(40, 1, "/data/more") + made_up(30, 1)]  # 30 files are listed twice
    train, validation = split_validation(sets, ValidationConfig(clips=25))
    everything, held_out = {clip.path for clips in sets for clip in clips}, {clip.path for clip in validation}
    assert len(validation) == len(held_out) == 25
    assert {clip.path for clips in train for clip in clips} == everything - held_out
    names = [
        [os.path.basename(clip.path) for clip in split_validation([clips], ValidationConfig(clips=9))[1]]
        for clips in (made_up(30, 0)[::-1], made_up(30, 0, "/mnt/data/moved"))
    ]
    assert names[0] == names[1] and names[0] != [f"{i}.wav" for i in range(9)]


def test_the_choice_of_validation_clips_outlasts_the_process():
    """The hash is a fixed one: a resumed run must hold out the same clips."""
    _, validation = split_validation([made_up(30, 0)], ValidationConfig(clips=3))
    assert [os.path.basename(clip.path) for clip in validation] == ["12.wav", "6.wav", "3.wav"]


def test_held_out_speakers():
    sets = [made_up(30, 0), made_up(40, 1, "/more")]
    train, validation = split_validation(sets, ValidationConfig(clips=4, speakers=["speaker2", "speaker4"]))
    assert {clip.speaker for clips in train for clip in clips} == {"speaker0", "speaker1", "speaker3"}
    assert [len(clips) for clips in train] == [18, 24]
    assert len(validation) == 4 and {clip.speaker for clip in validation} <= {"speaker2", "speaker4"}
    with pytest.raises(DataError, match="nobody is called bob; among the 5 speakers are speaker0"):
        split_validation(sets, ValidationConfig(speakers=["speaker1", "bob"]))
    everybody = [f"speaker{i}" for i in range(5)]
    for validation in (ValidationConfig(clips=70), ValidationConfig(speakers=everybody)):
        with pytest.raises(DataError, match="holds out all 70 clips"):
            split_validation(sets, validation)


# ---------------------------------------------------------------- python -m voxtral.data --check


def check_command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["data", "--check", *map(str, arguments)])
    data.main()


def test_check_reports_the_data(tmp_path, monkeypatch, capsys):
    for i in range(4):
        write(tmp_path / f"a/ann/{i}.wav", noise(3, 16000), 16000)
    for i in range(6):
        write(tmp_path / f"b/{'bob' if i else 'eve'}/{i}.flac", noise(6, 44100), 44100)
    touch(tmp_path / "b/bob/broken.wav", "no audio")
    listed = [
        {"kind": "folder", "path": "a"},
        {"kind": "folder", "path": "b", "name": "second"},
        {"kind": "generated", "path": "g"},
    ]
    block = {"data_root": str(tmp_path), "validation": {"clips": 1, "speakers": ["eve"]}, "sources": listed}
    OmegaConf.save({"data": block, "train": {"steps": 5}}, tmp_path / "c.yaml")
    check_command(
        monkeypatch, tmp_path / "c.yaml", "--audio-sec-per-sec", 0.5, "data.sources.0.weight=2", "data.batch_size=3"
    )
    out = " ".join(capsys.readouterr().out.split())
    assert "folder a 4 0 0 1 0.00 100.0% 16: 4 second 6 1 0 2 0.01 0.0% 44.1: 6 " in out
    assert "total 10 1 0 3 0.01 40.0% 16: 4, 44.1: 6" in out
    assert f"bad: {tmp_path}/b/bob/broken.wav: is text, not audio" in out and "Warning: 40.0%" in out
    assert f"absent: generated g: {tmp_path}/g/manifest.jsonl" in out
    assert "9 clips to train on, 1 to validate on; an epoch is 14 crops of at most 4 s, " in out
    assert "or 4.7 steps of 3 on one process" in out
    # 2 * 4 crops of 3 s, 5 of 4 s, and another of these in place of the broken one: 48 s
    assert "1.6 min at 0.5 s of audio per second" in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["data.batchsize=3"], "batchsize"),
        (["data.max_sec=long"], "max_sec"),
        (["data.sources=[{path: a}]"], "kind"),
        (["data.sources=[{kind: foldr}]"], "'folder'"),
        (["train.steps=3"], "train.steps=3"),
        ([], "data.sources"),
    ],
)
def test_check_ends_with_one_sentence(tmp_path, monkeypatch, refused, arguments, message):
    touch(tmp_path / "c.yaml", "data:\n  sources: []\n")
    monkeypatch.setattr(sys, "argv", ["data", "--check", str(tmp_path / "c.yaml"), *arguments])
    assert message in refused(lambda _: data.main(), [])


def parquet(folder, rows):
    """A data set of encoded audio as people upload it: one Parquet file."""
    import datasets  # takes seconds

    folder.mkdir(parents=True)
    features = datasets.Features(
        {
            "audio": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
            "sentence": datasets.Value("string"),
            "client_id": datasets.Value("string"),
        }
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "train.parquet")


def test_huggingface_rows_without_audio_are_left_out_and_counted(tmp_path):
    """With the real package: what is there is copied, the rest is said, and the second time nothing is asked for."""
    sound = Path(write(tmp_path / "a.flac", noise(0.3, 24000), 24000)).read_bytes()
    text = "one\u2028two\ttabs"
    parquet(
        tmp_path / "set",
        [
            {"audio": {"bytes": sound, "path": "a.flac"}, "sentence": text, "client_id": "c" * 128},
            {"audio": None, "sentence": "b", "client_id": "../../x"},
            {"audio": {"bytes": None, "path": None}, "sentence": "c", "client_id": "x"},
            {"audio": {"bytes": b"", "path": None}, "sentence": "d", "client_id": None},
            {"audio": {"bytes": None, "path": str(tmp_path / "gone.flac")}, "sentence": "e", "client_id": "x"},
            {"audio": {"bytes": None, "path": str(tmp_path / "a.flac")}, "sentence": None, "client_id": "y"},
            {"audio": {"bytes": sound, "path": "../../../evil.sh"}, "sentence": "f", "client_id": "z"},
        ],
    )
    source = {"kind": "huggingface", "path": str(tmp_path / "set"), "max_clips": 100}
    for _ in range(2):
        clips, left_out = found(tmp_path, **source)
        assert [(speaker, text) for _, speaker, text in clips] == [("c" * 16, text), ("y", ""), ("z", "f")]
        assert all(data.read_header(str(tmp_path / path)).frames == 7200 for path, _, _ in clips)
        assert sum(int(line.split(": ")[1].split()[0]) for line in left_out if "without audio" in line) == 4, left_out
    (folder,) = (tmp_path / "huggingface").iterdir()
    assert {path.suffix for path in folder.iterdir()} <= {".flac", ".jsonl", ".lock", ""}
    assert folder.parent == tmp_path / "huggingface"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"path": "empty"}, "cannot be loaded"),
        ({"split": "dev"}, "cannot be loaded"),
        ({"audio_column": "sound"}, "no column 'sound'"),
    ],
)
def test_huggingface_sets_that_cannot_be_had_say_why(tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    parquet(tmp_path / "set", [{"audio": None, "sentence": "b", "client_id": "x"}])
    with pytest.raises(DataError, match=message):
        found(tmp_path, **{"kind": "huggingface", "path": str(tmp_path / "set"), **change})


# ---------------------------------------------------------------- what a finder does not yield


def test_common_voice_takes_the_newest_whole_release_and_says_so(tmp_path):
    table = "client_id\tpath\tsentence\nabc\t1.mp3\tHi\n"
    for release, rows in (
        ("cv-corpus-9.0-2022-04-27", 1),
        ("cv-corpus-24.0-2025-12-05", 2),
        ("cv-corpus-25.0-delta-2026-03-09", 1),
        ("cv-corpus-26.0-singleword", 1),
    ):
        touch(tmp_path / f"cv/{release}/xx/train.tsv", table + "abc\t2.mp3\tHo\n" * (rows - 1))
    clips, left_out = found(tmp_path, kind="common_voice", path="cv", language="xx")
    assert len(clips) == 2 and clips[0][0].startswith("cv/cv-corpus-24.0")
    said = "\n".join(left_out)
    assert "the release used is cv-corpus-24.0-2025-12-05" in said and said.count("is skipped") == 2
    with pytest.raises(DataError, match="delta-2026-03-09 is skipped"):  # nothing else is there
        (tmp_path / "only/cv-corpus-25.0-delta-2026-03-09").mkdir(parents=True)
        found(tmp_path, kind="common_voice", path="only", language="xx")


def test_formats_passed_over_are_counted_by_suffix_with_what_converts_them(tmp_path, monkeypatch, capsys):
    for name in ("a.m4a", "b.M4A", "c.webm", "d.txt", "e", "._f.wav"):
        touch(tmp_path / "d/anna" / name, "x")
    for name in ("g.wave", "h.au", "i.caf", "j.w64"):
        write(tmp_path / "d/anna" / "x.wav", noise(0.5, 24000), 24000)
        containers = {".wave": "WAV", ".au": "AU", ".caf": "CAF", ".w64": "W64"}
        soundfile.write(tmp_path / "d/anna" / name, noise(0.5, 24000), 24000, format=containers[Path(name).suffix])
    touch(
        tmp_path / "c.yaml",
        f"data:\n  data_root: {tmp_path}\n  sources: [{{kind: folder, path: d}}]\n  validation: {{clips: 1}}\n",
    )
    check_command(monkeypatch, tmp_path / "c.yaml")
    out = " ".join(capsys.readouterr().out.split())
    for said in (
        "folder d 5 0 6 1 0.00",
        "2 passed over: .m4a: libsndfile does not read it; convert it: ffmpeg",
        "1 passed over: hidden",
        ".txt: no audio (anna/d.txt)",
        "no suffix: no audio (anna/e)",
    ):
        assert said in out


def test_check_never_counts_what_it_has_not_opened_and_exits_1_when_nothing_is_left(tmp_path, monkeypatch, capsys):
    touch(tmp_path / "m.csv", "path\ngone.wav\nempty.wav\n")
    touch(tmp_path / "empty.wav")
    touch(tmp_path / "c.yaml", f"data:\n  data_root: {tmp_path}\n  sources: [{{kind: manifest, path: m.csv}}]\n")
    with pytest.raises(SystemExit) as stopped:
        check_command(monkeypatch, tmp_path / "c.yaml")
    out = capsys.readouterr().out
    assert stopped.value.code == 1 and "clips to train on" not in out
    assert "1 bad: does not exist" in out and "1 bad: is empty" in out and "total" in out


def test_a_manifest_written_on_windows(tmp_path):
    write(tmp_path / "sets/wavs/a.wav", noise(0.3, 24000), 24000)
    touch(tmp_path / "sets/m.csv", "path,text\nwavs\\a.wav,Hi\n")
    assert found(tmp_path, kind="manifest", path="sets/m.csv")[0] == [("sets/wavs/a.wav", "wavs", "Hi")]


NO_CONFIGS = [b"\xff\xfe\0", b"a: [", b"[]", b"3", b"data: 3", b"data:\n  sources: {a: 1}\n", b"\0", b"data:\n\t- x"]
NO_CONFIGS += [b"!!python/object:os.system {}", b"data: ${a}", b"&a [*a]"]


@pytest.mark.parametrize("content", NO_CONFIGS)
def test_what_is_no_config_is_refused_in_a_sentence(tmp_path, content):
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(DataError, match="c.yaml, data: [^\n]+$"):
        data.read_config(str(tmp_path / "c.yaml"), [])


def test_known_codes_come_with_the_frames_that_they_say(tmp_path):
    """Cut at a frame, at the clip's own speed; recordings beside them are played as ever."""
    params, length, codes = CodecParams(), 1920, np.arange(10)[None].repeat(37, 0)
    spoken = write(tmp_path / "spoken.wav", np.repeat(np.arange(10) / 20, length), 24000, "FLOAT")
    read = write(tmp_path / "read.wav", noise(2, 24000), 24000)
    clips = [Clip(spoken, "a", 0, codes=str(tmp_path / "spoken.npy")), Clip(read, "b", 0)]
    np.save(tmp_path / "spoken.npy", codes)
    dataset = SpeechDataset(clips, 0.3, seed=0, speed=(0.8, 1.2), params=params)
    starts = set()
    for number in range(20):
        item = dataset[number, 0]
        assert item["length"] == 3 * length and item["codes"].shape == (37, 4) and (item["codes"][:, 3] == -1).all()
        said = item["waveform"][0, : 3 * length].view(3, length)
        assert torch.allclose(said, item["codes"][0, :3, None] / 20, atol=1e-4)
        starts.add(item["codes"][0, 0].item())
    assert len(starts) > 4 and max(starts) <= 7
    batch = collate([dataset[0, 0], dataset[1, 1]])
    assert (batch.codes[1] == -1).all() and batch.lengths[1] == 7200
    assert collate([SpeechDataset(clips, 0.3, seed=0)[0, 0]]).codes is None
    np.save(tmp_path / "spoken.npy", codes[:, :9])
    with pytest.raises(BadClip, match="do not belong"):
        dataset.load(0, np.random.default_rng(0))
