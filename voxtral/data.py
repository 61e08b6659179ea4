"""From clips to batches: cropping while reading, an endless sample stream that resumes anywhere, batches.

Sample number n of a run is the same crop of the same clip whatever the number of processes and workers,
so a run resumes by starting the stream at its step.
`python -m voxtral.data --check CONFIG.yaml` describes the data.
"""
import argparse
import contextlib
import dataclasses
import itertools
import math
from collections import Counter
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import numpy as np
import soundfile
import soxr
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from voxtral.errors import one_sentence
from voxtral.sources import Clip, DataConfig, DataError, find_clips, source_name, split_validation

SAMPLE_RATE = 24000
MIN_SEC = 0.1
EDGE_SEC = 0.03        # this far from the ends of its input, soxr HQ no longer notices them (< 1e-6)
MAX_BAD_IN_A_ROW = 20
ORDER, CROP = 0, 1     # the two random streams of a seed


class BadClip(ValueError):
    """A file that cannot be trained on: unreadable, empty, not finite or shorter than MIN_SEC."""

    def __init__(self, path: str, reason: str):
        super().__init__(f"{path}: {reason}")
        self.reason = reason


# ---------------------------------------------------------------- reading

def load_segment(path: str, position: float, max_sec: float, speed: float = 1.0) -> tuple[np.ndarray, int]:
    """-> float32 [n] mono at 24 kHz with n <= max_sec * 24000 and peaks of at most 1, native rate in Hz.

    `position` in [0, 1) places the crop among all that fit. No more of a long file is decoded than needed.
    The crop is what cutting the resampled file would give, within 1e-6. `speed`: the tape runs so many times as fast,
    pitch and formants too (to within 50 Hz of the rate). Raises BadClip.
    """
    try:
        audio, rate, played, skip = _read_crop(path, position, max_sec, speed)
    except (soundfile.SoundFileError, OSError) as error:
        raise BadClip(path, f"unreadable ({getattr(error, 'error_string', error)})") from error
    audio = audio.mean(axis=1)
    if not np.isfinite(audio).all():
        raise BadClip(path, "holds values that are not finite")
    audio = soxr.resample(audio, played, SAMPLE_RATE, quality="HQ")[skip:skip + round(max_sec * SAMPLE_RATE)]
    if len(audio) < round(min(MIN_SEC, max_sec) * SAMPLE_RATE):
        raise BadClip(path, f"shorter than {MIN_SEC} s" if len(audio) else "empty")
    return audio / max(1.0, np.abs(audio).max()), rate


def _read_crop(path: str, position: float, max_sec: float, speed: float) -> tuple[np.ndarray, int, int, int]:
    """-> native frames [n, channels] with margins for the resampler, their rate, the rate to play them at, 24 kHz
    samples before the crop."""
    def played_at(rate: int) -> int:
        return rate if speed == 1 else round(rate * speed / 100) * 100  # has a large common divisor with 24 kHz

    # Truncated files and some MP3 report frames that are not there: then what can be decoded is the file.
    with contextlib.suppress(soundfile.SoundFileError), soundfile.SoundFile(path) as file:
        rate = file.samplerate
        start, stop, skip = _window(file.frames, played_at(rate), position, max_sec)
        file.seek(start)
        audio = file.read(stop - start, dtype="float32", always_2d=True)
        if len(audio) == stop - start:
            return audio, rate, played_at(rate), skip
    # At once if possible: soundfile seeks after each read, and MP3 decoders do so inexactly. A read that
    # fails gives nothing at all, so small ones come closer to where the file breaks off.
    for block_frames in (2 ** 25, 4096):
        blocks = []
        with soundfile.SoundFile(path) as file, contextlib.suppress(soundfile.SoundFileError):
            while len(block := file.read(block_frames, dtype="float32", always_2d=True)):
                blocks.append(block)
        if blocks:
            break
    audio = np.concatenate(blocks or [np.zeros((0, 1), np.float32)])
    rate = file.samplerate
    start, stop, skip = _window(len(audio), played_at(rate), position, max_sec)
    return audio[start:stop], rate, played_at(rate), skip


def _window(frames: int, rate: int, position: float, max_sec: float) -> tuple[int, int, int]:
    """-> first and last (exclusive) native frame to read, 24 kHz samples of them before the crop."""
    grid = rate // math.gcd(rate, SAMPLE_RATE)  # every so many frames, one coincides with a 24 kHz sample
    margin = math.ceil(EDGE_SEC * rate / grid) * grid
    wanted = math.ceil(max_sec * rate)
    first = int(position * max(frames - wanted + 1, 1)) // grid * grid
    start = max(first - margin, 0)
    return start, min(first + wanted + margin, frames), (first - start) * SAMPLE_RATE // rate


# ---------------------------------------------------------------- samples and batches

class SpeechDataset(Dataset):
    """Crops of clips. Item (number, index) depends on seed, number and index alone.

    A bad clip is replaced by another one, drawn from the same random stream, and reported. With `fixed`,
    crops start at 0 and bad clips are left out from the beginning, listed in `bad`. Otherwise each is played at a speed
    between the two of `speed`. Raises DataError if no clip is left, or after too many bad ones in a row. A subclass says
    what else a clip is read into.
    """

    def __init__(self, clips: list[Clip], max_sec: float, seed: int, fixed: bool = False, speed: Sequence[float] = (1, 1)):
        self.clips, self.max_sec, self.seed, self.fixed, self.speed = clips, max_sec, seed, fixed, speed
        self.bad: list[tuple[str, str]] = []
        if fixed:
            self._keep_usable()
        if not self.clips:
            raise DataError(f"None of the {len(clips)} clips can be read; look at them and at data.sources "
                            f"({'; '.join(f'{path}: {reason}' for path, reason in self.bad[:3])}).")

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, item: tuple[int, int]) -> dict:
        """-> what load() gives, index, bad."""
        number, index = item
        random = np.random.default_rng((CROP, self.seed, number))
        bad = []
        while len(bad) < (1 if self.fixed else MAX_BAD_IN_A_ROW):
            try:
                return {**self.load(index, random), "index": index, "bad": bad}
            except BadClip as error:
                bad.append((self.clips[index].path, error.reason))
                index = int(random.integers(len(self.clips)))
        raise DataError(f"{len(bad)} clips in a row cannot be used, the last is {bad[-1][0]} ({bad[-1][1]}); "
                        "run python -m voxtral.data --check on the config and mend data.sources.")

    def load(self, index: int, random: np.random.Generator) -> dict:
        """-> waveform [1, max_samples] padded with zeros, length (samples), native_rate (Hz). Raises BadClip."""
        position, speed = (0.0, 1.0) if self.fixed else (random.random(), random.uniform(*self.speed))
        return self.padded(*load_segment(self.clips[index].path, position, self.max_sec, speed))

    def padded(self, segment: np.ndarray, rate: int) -> dict:
        """What load_segment() gives -> waveform, length, native_rate: see load()."""
        waveform = torch.zeros(1, round(self.max_sec * SAMPLE_RATE))
        waveform[0, :len(segment)] = torch.from_numpy(segment)
        return {"waveform": waveform, "length": len(segment), "native_rate": rate}

    def _keep_usable(self) -> None:
        """Leaves out the clips that cannot be read, and lists them in `bad`."""
        usable = []
        for index, clip in enumerate(self.clips):
            try:
                self.load(index, np.random.default_rng(0))
                usable.append(clip)
            except BadClip as error:
                self.bad.append((clip.path, error.reason))
        self.clips = usable


class TensorBatch:
    """A dataclass whose tensors (and those of others in it) move together; what else it holds stays as it is."""

    def _map(self, function) -> "TensorBatch":
        moved = {field.name: function(value) for field in dataclasses.fields(self)
                 if isinstance(value := getattr(self, field.name), (Tensor, TensorBatch))}
        return dataclasses.replace(self, **moved)

    def pin_memory(self) -> "TensorBatch":
        """Called by the DataLoader."""
        return self._map(lambda one: one.pin_memory())

    def to(self, device, non_blocking: bool = False) -> "TensorBatch":
        """The same batch with its tensors on `device`."""
        return self._map(lambda one: one.to(device, non_blocking=non_blocking))


@dataclass
class Batch(TensorBatch):
    """B crops of T = max_sec * 24000 samples."""
    waveform: Tensor             # [B, 1, T] float32, zeros after each length
    lengths: Tensor              # [B] int64, samples
    native_rates: Tensor         # [B] int64, Hz
    indices: list[int]           # of the clips in the data set
    bad: list[tuple[str, str]]   # (path, reason) of clips that had to be replaced


def collate(items: list[dict]) -> Batch:
    """Items of SpeechDataset -> Batch."""
    return Batch(torch.stack([item["waveform"] for item in items]),
                 torch.tensor([item["length"] for item in items]),
                 torch.tensor([item["native_rate"] for item in items]),
                 [item["index"] for item in items],
                 [entry for item in items for entry in item["bad"]])


# ---------------------------------------------------------------- the sample stream

class SampleStream:
    """Sample number (0, 1, 2, ...) -> index of the clip. Holds no state but a cache of one epoch's order.

    An epoch has round(weight * clips) entries of each source, at least one: whole passes plus a part that is
    drawn anew each epoch, all shuffled together.
    """

    def __init__(self, clips: list[Clip], config: DataConfig, seed: int):
        self.seed = seed
        owner = np.array([clip.source for clip in clips])
        self.members = {int(source): np.flatnonzero(owner == source) for source in np.unique(owner)}
        self.entries = {source: max(1, round(config.sources[source].weight * len(indices)))
                        for source, indices in self.members.items()}
        self.epoch_size = sum(self.entries.values())
        self._epoch, self._order = -1, np.array([])

    def order(self, epoch: int) -> np.ndarray:
        """[epoch_size] int64 indices of clips."""
        if epoch != self._epoch:
            random = np.random.default_rng((ORDER, self.seed, epoch))
            parts = []
            for source, indices in self.members.items():
                passes, rest = divmod(self.entries[source], len(indices))
                parts += [indices] * passes + [random.permutation(indices)[:rest]]
            self._epoch, self._order = epoch, random.permutation(np.concatenate(parts))
        return self._order

    def __getitem__(self, number: int) -> int:
        epoch, place = divmod(number, self.epoch_size)
        return int(self.order(epoch)[place])


@dataclass
class BatchSampler:
    """Endless lists of (number, index): what this process reads, one micro-batch each, from start_step on.

    A step takes the next batch_size * world_size * accumulation numbers, each micro-batch a slice of them and
    each process a slice of that: two processes see together what one with twice the batch size sees.
    """
    stream: SampleStream
    batch_size: int
    start_step: int = 0
    rank: int = 0
    world_size: int = 1
    accumulation: int = 1

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for micro_batch in itertools.count(self.start_step * self.accumulation):
            first = (micro_batch * self.world_size + self.rank) * self.batch_size
            yield [(number, self.stream[number]) for number in range(first, first + self.batch_size)]


def steps_per_epoch(clips: list[Clip], config: DataConfig, world_size: int = 1,
                    accumulation: int = 1) -> float:
    """Steps in one epoch of these training clips; not whole, as the last step runs into the next epoch."""
    return SampleStream(clips, config, seed=0).epoch_size / (config.batch_size * world_size * accumulation)


def make_loader(dataset: SpeechDataset, config: DataConfig, seed: int, start_step: int = 0, rank: int = 0,
                world_size: int = 1, accumulation: int = 1, collate: Callable[[list[dict]], Any] = collate) -> DataLoader:
    """Endless loader of batches, `accumulation` of them a step, beginning with those of start_step.

    Iterate it once: each iter() begins at start_step again.
    """
    sampler = BatchSampler(SampleStream(dataset.clips, config, seed), config.batch_size, start_step, rank,
                           world_size, accumulation)
    # Each worker runs on one thread (the DataLoader's own rule), so num_workers is the number of cores taken.
    # Forked, whatever started this process: a worker that imports everything anew needs many seconds.
    workers = {"persistent_workers": True, "prefetch_factor": 4, "multiprocessing_context": "fork"} if config.num_workers else {}
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=config.num_workers,
                      pin_memory=torch.cuda.is_available(), **workers)


def validation_batches(clips: list[Clip], config: DataConfig) -> list[Batch]:
    """The validation clips, each from its start to max_sec, loaded once; `indices` are those of `clips`.

    Clips that cannot be used are left out and listed in the first batch's `bad`.
    """
    dataset = SpeechDataset(clips, config.max_sec, seed=0, fixed=True)
    items = [dataset[0, i] | {"index": clips.index(clip)} for i, clip in enumerate(dataset.clips)]
    batches = [collate(items[i:i + config.batch_size]) for i in range(0, len(items), config.batch_size)]
    batches[0].bad.extend(dataset.bad)
    return batches


class BadClipLog:
    """Lists each bad clip once in RUN_FOLDER/bad_files.txt, over resumed runs too.

    `count`: replacements in this run; `seen`: the (path, reason) listed so far.
    """

    def __init__(self, run_folder: str | Path):
        self.path = Path(run_folder) / "bad_files.txt"
        self.count = 0
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.seen = {tuple(line.split("\t", 1)) for line in lines}

    def add(self, bad: list[tuple[str, str]]) -> None:
        """Takes Batch.bad."""
        self.count += len(bad)
        for entry in bad:
            if entry not in self.seen:
                self.seen.add(entry)
                with self.path.open("a") as file:
                    file.write("\t".join(entry) + "\n")


# ---------------------------------------------------------------- python -m voxtral.data --check

def read_header(path: str) -> tuple[float, int, str]:
    """-> seconds, native rate in Hz, why the file is bad (empty: it is not); nothing is decoded."""
    try:
        info = soundfile.info(path)
    except (soundfile.SoundFileError, OSError) as error:
        return 0.0, 0, f"unreadable ({getattr(error, 'error_string', error)})"
    return info.duration, info.samplerate, "" if info.duration >= MIN_SEC else f"shorter than {MIN_SEC} s"


def report(config: DataConfig, audio_sec_per_sec: float | None) -> None:
    """Prints what `data:` holds. Raises DataError."""
    present, absent = find_clips(config)
    train, validation = split_validation(present, config.validation)
    paths = [clip.path for clips in present for clip in clips]
    with ThreadPool(16) as pool:
        headers = pool.imap(read_header, paths, chunksize=16)
        header_of = dict(zip(paths, tqdm(headers, total=len(paths), unit="clip", disable=None)))

    row = "{:<40} {:>8} {:>5} {:>8} {:>8} {:>12}  {}".format
    print(row("source", "clips", "bad", "speakers", "hours", "below 24 kHz", "clips by kHz"))
    everything = [clip for clips in present for clip in clips]
    names = [source_name(config.sources[clips[0].source]) for clips in present]
    for name, clips in zip(names + ["total"], present + [everything]):
        good = [header_of[clip.path][:2] for clip in clips if not header_of[clip.path][2]]
        rates = Counter(rate for _, rate in good)
        low = sum(count for rate, count in rates.items() if rate < SAMPLE_RATE) / max(len(good), 1)
        speakers = {(clip.source, clip.speaker) for clip in clips}
        print(row(name, len(clips), len(clips) - len(good), len(speakers),
                  f"{sum(seconds for seconds, _ in good) / 3600:.2f}", f"{low:.1%}",
                  ", ".join(f"{rate / 1000:g}: {count}" for rate, count in sorted(rates.items()))))
    if low:
        print(f"Warning: {low:.1%} of the clips are stored below 24 kHz. Speech at 16 kHz holds nothing "
              "above 8 kHz, where timbre lives: prefer sources at 24 kHz and more, such as LibriTTS-R.")
    for path, (_, _, reason) in header_of.items():
        if reason:
            print(f"bad: {path}: {reason}")
    for line in absent:
        print(f"absent: {line}")

    stream = SampleStream([clip for clips in train for clip in clips], config, seed=0)
    print(f"{sum(map(len, train))} clips to train on, {len(validation)} to validate on; an epoch is "
          f"{stream.epoch_size} crops of at most {config.max_sec:g} s, or "
          f"{stream.epoch_size / config.batch_size:.1f} steps of {config.batch_size} on one process.")
    if audio_sec_per_sec:
        seconds = 0.0
        for clips in filter(None, train):
            good = [header_of[clip.path][0] for clip in clips if not header_of[clip.path][2]]
            if good:
                seconds += stream.entries[clips[0].source] * float(np.minimum(good, config.max_sec).mean())
        print(f"An epoch is {seconds / 3600:.2f} h of audio: {seconds / audio_sec_per_sec / 60:.1f} min at "
              f"{audio_sec_per_sec:g} s of audio per second.")


def read_config(path: str, overrides: list[str]) -> DataConfig:
    """The `data:` block of a YAML with `data.key=value` overrides. Raises DataError."""
    for override in overrides:
        if not override.startswith("data."):
            raise DataError(f"'{override}': only data.key=value can be set here.")
    try:
        config = OmegaConf.load(path)
        config.merge_with_dotlist(overrides)
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), config.get("data", {})))
    except (OmegaConfBaseException, OSError) as error:
        raise DataError(f"{path}, data: {' '.join(str(error).split())}") from error


def main() -> None:
    parser = argparse.ArgumentParser("python -m voxtral.data", description="Describes the data of a config.")
    parser.add_argument("--check", required=True, metavar="CONFIG.yaml", help="its data: block is read")
    parser.add_argument("overrides", nargs="*", metavar="data.key=value", help="changes to the config")
    parser.add_argument("--audio-sec-per-sec", type=float, metavar="N",
                        help="training speed as train_encoder.py logs it, to estimate the time of an epoch")
    args = parser.parse_intermixed_args()
    with one_sentence():
        report(read_config(args.check, args.overrides), args.audio_sec_per_sec)


if __name__ == "__main__":
    main()
