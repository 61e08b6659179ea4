"""From clips to batches: an endless sample stream that resumes anywhere, batches.

Sample number n of a run is the same crop of the same clip whatever the number of processes and workers,
so a run resumes by starting the stream at its step.
`python -m voxtral.data --check CONFIG.yaml` describes the data.
"""

import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from typing import Any

from voxtral.command_line import script_parser

COMMAND_LINE = script_parser("Describes the data of a config.", module="voxtral.data")
option = COMMAND_LINE.add_argument
option("--check", required=True, metavar="CONFIG.yaml", help="its data: block is read")
option("overrides", nargs="*", metavar="data.key=value", help="changes to the config")
option(
    "--audio-sec-per-sec", type=float, metavar="N", help="training speed, as it is logged: tells the time of an epoch"
)

if __name__ == "__main__":
    COMMAND_LINE.parse_intermixed_args()  # --help and mistyped options: before imports that take seconds

import numpy as np
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm
from yaml import YAMLError

from voxtral.audio import SAMPLE_RATE, BadClip, Header, complaints, load_segment, read_header
from voxtral.clip_list import Clip, Clips
from voxtral.codec import ceil_div
from voxtral.errors import DataError, one_line, one_sentence, shown
from voxtral.known_codes import read_coded
from voxtral.loader import Loader, TensorBatch
from voxtral.params import CodecParams
from voxtral.remarks import Remarks
from voxtral.sources import DataConfig, find_sources, split_validation

MAX_BAD_IN_A_ROW = 20
ORDER, CROP = 0, 1  # the two random streams of a seed


# ---------------------------------------------------------------- samples and batches


class SpeechDataset(Dataset):
    """Crops of clips. Item (number, index) depends on seed, number and index alone.

    A bad clip is replaced by another one, drawn from the same random stream, and reported. With `fixed`,
    crops start at 0 and bad clips are left out from the beginning, listed in `bad`. Otherwise each is played at a speed
    between the two of `speed`. With `params`, clips whose codes are known come with them: cut at a code frame, at their
    own speed. Raises DataError if no clip is left, or after too many bad ones in a row. A subclass says what else a
    clip is read into.
    """

    def __init__(
        self,
        clips: list[Clip],
        max_sec: float,
        seed: int,
        fixed: bool = False,
        speed: Sequence[float] = (1, 1),
        params: CodecParams | None = None,
    ):
        self.clips, self.max_sec, self.seed, self.fixed, self.speed = clips, max_sec, seed, fixed, speed
        self.params = params
        self.bad: list[tuple[str, str]] = []
        if fixed:
            self._keep_usable()
        if not self.clips:
            raise DataError(
                f"None of the {len(clips)} clips can be read; look at them and at data.sources "
                f"({'; '.join(f'{path}: {reason}' for path, reason in self.bad[:3])})."
            )

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
        raise DataError(
            f"{len(bad)} clips in a row cannot be used, the last is {bad[-1][0]} ({bad[-1][1]}); "
            "run python -m voxtral.data --check on the config and mend data.sources."
        )

    def load(self, index: int, random: np.random.Generator) -> dict:
        """-> waveform [1, max_samples] padded with zeros, length (samples), native_rate (Hz); with `params` also codes
        [1 + acoustic_dim, max_frames], -1 where they are not known. Raises BadClip."""
        clip, known = self.clips[index], {}
        if self.params:
            n_frames = ceil_div(round(self.max_sec * SAMPLE_RATE), self.params.frame_size)
            known["codes"] = torch.full((self.params.n_codebooks, n_frames), -1)
            if clip.codes:
                return self._cut_at_a_frame(clip, random, **known)
        position, speed = (0.0, 1.0) if self.fixed else (random.random(), random.uniform(*self.speed))
        return self.padded(*load_segment(clip.path, position, self.max_sec, speed)) | known

    def _cut_at_a_frame(self, clip: Clip, random: np.random.Generator, codes: Tensor) -> dict:
        """As load(), of a clip with known codes, which are put into `codes`."""
        frame_size = self.params.frame_size
        known, waveform = read_coded(clip, self.params)
        n_frames = min(known.shape[1], int(self.max_sec * SAMPLE_RATE) // frame_size)
        start = int(random.integers(known.shape[1] - n_frames + 1))
        codes[:, :n_frames] = known[:, start : start + n_frames]
        segment = waveform[start * frame_size : (start + n_frames) * frame_size]
        return self.padded(segment, SAMPLE_RATE) | {"codes": codes}

    def padded(self, segment: np.ndarray, rate: int) -> dict:
        """What load_segment() gives -> waveform, length, native_rate: see load()."""
        waveform = torch.zeros(1, round(self.max_sec * SAMPLE_RATE))
        waveform[0, : len(segment)] = torch.from_numpy(segment)
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


@dataclass
class Batch(TensorBatch):
    """B crops of T = max_sec * 24000 samples."""

    waveform: Tensor  # [B, 1, T] float32, zeros after each length
    lengths: Tensor  # [B] int64, samples
    native_rates: Tensor  # [B] int64, Hz
    indices: list[int]  # of the clips in the data set
    bad: list[tuple[str, str]]  # (path, reason) of clips that had to be replaced
    codes: Tensor | None  # [B, 1 + acoustic_dim, L] int64, -1 where they are not known; None: nobody asked


def collate(items: list[dict]) -> Batch:
    """Items of SpeechDataset -> Batch."""
    return Batch(
        torch.stack([item["waveform"] for item in items]),
        torch.tensor([item["length"] for item in items]),
        torch.tensor([item["native_rate"] for item in items]),
        [item["index"] for item in items],
        [entry for item in items for entry in item["bad"]],
        torch.stack([item["codes"] for item in items]) if "codes" in items[0] else None,
    )


# ---------------------------------------------------------------- the sample stream


class SampleStream:
    """Sample number (0, 1, 2, ...) -> index of the clip. Holds no state but a cache of one epoch's order.

    An epoch has round(weight * clips) entries of each source, at least one: whole passes plus a part that is
    drawn anew each epoch, all shuffled together.
    """

    def __init__(self, clips: list[Clip], config: DataConfig, seed: int):
        self.seed = seed
        owner = clips.source if isinstance(clips, Clips) else np.array([clip.source for clip in clips])
        self.members = {int(source): np.flatnonzero(owner == source) for source in np.unique(owner)}
        self.entries = {
            source: max(1, round(config.sources[source].weight * len(indices)))
            for source, indices in self.members.items()
        }
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


def steps_per_epoch(clips: list[Clip], config: DataConfig, world_size: int = 1, accumulation: int = 1) -> float:
    """Steps in one epoch of these training clips; not whole, as the last step runs into the next epoch."""
    return SampleStream(clips, config, seed=0).epoch_size / (config.batch_size * world_size * accumulation)


def make_loader(
    dataset: SpeechDataset,
    config: DataConfig,
    seed: int,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    accumulation: int = 1,
    collate: Callable[[list[dict]], Any] = collate,
) -> Loader:
    """Endless loader of batches, `accumulation` of them a step, beginning with those of start_step.

    Iterate it once: each iter() begins at start_step again.
    """
    sampler = BatchSampler(
        SampleStream(dataset.clips, config, seed), config.batch_size, start_step, rank, world_size, accumulation
    )
    return Loader(dataset, config, batch_sampler=sampler, collate_fn=collate)


def validation_batches(clips: list[Clip], config: DataConfig) -> list[Batch]:
    """The validation clips, each from its start to max_sec, loaded once; `indices` are those of `clips`.

    Clips that cannot be used are left out and listed in the first batch's `bad`.
    """
    dataset = SpeechDataset(clips, config.max_sec, seed=0, fixed=True)
    items = [dataset[0, i] | {"index": clips.index(clip)} for i, clip in enumerate(dataset.clips)]
    batches = [collate(items[i : i + config.batch_size]) for i in range(0, len(items), config.batch_size)]
    batches[0].bad.extend(dataset.bad)
    return batches


# ---------------------------------------------------------------- python -m voxtral.data --check

ROW = "{:<40} {:>8} {:>5} {:>11} {:>8} {:>8} {:>12}  {}".format


def try_header(path: str) -> Header | BadClip:
    try:
        return read_header(path)
    except BadClip as error:
        return error


def report(config: DataConfig, audio_sec_per_sec: float | None) -> bool:
    """Opens every clip and prints what `data:` holds, and what of it cannot be used; returns whether anything can.
    Raises DataError."""
    sources = find_sources(config)
    paths = [clip.path for source in sources for clip in source.clips]
    with ThreadPool(16) as pool:
        headers = pool.imap(try_header, paths, chunksize=16)
        header_of = dict(zip(paths, tqdm(headers, total=len(paths), unit="clip", disable=None)))
    opened = {path: header for path, header in header_of.items() if isinstance(header, Header)}

    print(ROW("source", "clips", "bad", "passed over", "speakers", "hours", "below 24 kHz", "clips by kHz"))
    for source in sources:
        print_row(source.name, source.clips, len(source.remarks), opened)
    everything = [clip for source in sources for clip in source.clips]
    print_row("total", everything, sum(len(source.remarks) for source in sources), opened)
    for source in sources:
        bad = Remarks()
        for clip in source.clips:
            if isinstance(error := header_of[clip.path], BadClip):
                bad.pass_over(error.reason, clip.path)
        for line in bad.lines("bad") + source.remarks.lines():
            print(f"{shown(source.name)}: {line}")
    for path, header in header_of.items():
        if isinstance(header, BadClip):
            print(shown(f"bad: {path}: {header.reason}"))
    for source in sources:
        for part in source.absent:
            print(shown(f"absent: {part}"))
    print_advice(opened)
    if not opened:
        print("Nothing here can be used.")
        return False
    train, validation = split_validation([source.clips for source in sources if source.clips], config.validation)
    print_epoch(train, sum(clip.path in opened for clip in validation), opened, config, audio_sec_per_sec)
    return True


def print_row(name: str, clips: list[Clip], n_passed_over: int, opened: dict[str, Header]) -> None:
    good = [opened[clip.path] for clip in clips if clip.path in opened]
    rates = Counter(header.rate for header in good)
    low = sum(count for rate, count in rates.items() if rate < SAMPLE_RATE) / max(len(good), 1)
    speakers = {(clip.source, clip.speaker) for clip in clips if clip.path in opened}
    counts = len(good), len(clips) - len(good), n_passed_over, len(speakers)
    hours = sum(header.seconds for header in good) / 3600
    by_rate = ", ".join(f"{rate / 1000:g}: {count}" for rate, count in sorted(rates.items()))
    print(ROW(shown(name), *counts, f"{hours:.2f}", f"{low:.1%}", by_rate))


def print_advice(opened: dict[str, Header]) -> None:
    low = sum(header.rate < SAMPLE_RATE for header in opened.values())
    if low:
        print(
            f"Warning: {low / len(opened):.1%} of the clips are stored below 24 kHz. Speech at 16 kHz holds nothing "
            "above 8 kHz, where timbre lives: prefer sources at 24 kHz and more, such as LibriTTS-R."
        )
    several = sum(header.channels > 1 for header in opened.values())
    if several:
        print(f"{several} clips have several channels: of each crop the channel with most speech is taken.")
    if complaints():
        print(f"Decoders complained {complaints()} times: of damaged frames, or of an MP3 read from its middle.")


def print_epoch(
    train: list[list[Clip]],
    n_validation: int,
    opened: dict[str, Header],
    config: DataConfig,
    audio_sec_per_sec: float | None,
) -> None:
    """train: all clips by source; a bad one has its place in an epoch, which another clip takes."""
    n_train = sum(clip.path in opened for clips in train for clip in clips)
    stream = SampleStream([clip for clips in train for clip in clips], config, seed=0)
    print(
        f"{n_train} clips to train on, {n_validation} to validate on; an epoch is "
        f"{stream.epoch_size} crops of at most {config.max_sec:g} s, or "
        f"{stream.epoch_size / config.batch_size:.1f} steps of {config.batch_size} on one process."
    )
    if audio_sec_per_sec:
        seconds = 0.0
        for clips in filter(None, train):
            good = [opened[clip.path].seconds for clip in clips if clip.path in opened]
            if good:
                seconds += stream.entries[clips[0].source] * float(np.minimum(good, config.max_sec).mean())
        print(
            f"An epoch is {seconds / 3600:.2f} h of audio: {seconds / audio_sec_per_sec / 60:.1f} min at "
            f"{audio_sec_per_sec:g} s of audio per second."
        )


def read_config(path: str, overrides: list[str]) -> DataConfig:
    """The `data:` block of a YAML with `data.key=value` overrides. Raises DataError."""
    for override in overrides:
        if not override.startswith("data."):
            raise DataError(f"'{override}': only data.key=value can be set here.")
    try:
        config = OmegaConf.load(path)
        config.merge_with_dotlist(overrides)
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), config.get("data", {})))
    except (OmegaConfBaseException, YAMLError, OSError, ValueError, TypeError) as error:  # the last two too
        raise DataError(f"{path}, data: {one_line(error)}") from error


def main(arguments=None) -> None:
    options = COMMAND_LINE.parse_intermixed_args(arguments)
    with one_sentence():
        if not report(read_config(options.check, options.overrides), options.audio_sec_per_sec):
            sys.exit(1)


if __name__ == "__main__":
    main()
