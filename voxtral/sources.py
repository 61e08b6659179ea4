"""Which clips there are: the `data:` block of a config, and finding the clips of each kind of source.

Only names and manifests are read here, no audio.
"""

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
from omegaconf import MISSING

from voxtral import clip_cache
from voxtral.audio import AUDIO_SUFFIXES, CONVERT, OTHER_MEDIA
from voxtral.clip_cache import ClipCache
from voxtral.clip_list import Clip, Clips
from voxtral.errors import DataError, shown
from voxtral.huggingface import local_copy
from voxtral.paths import find_files
from voxtral.remarks import Remarks
from voxtral.tables import is_unicode, read_table

LIBRISPEECH_FOLDERS = ("", "LibriSpeech", "LibriTTS_R", "LibriTTS")  # as their archives unpack
LIBRISPEECH_TEXTS = (".txt", ".tsv")  # beside their clips
CODEC_FRAME_SEC = 0.08  # 1920 samples at 24 kHz


@dataclass
class SourceConfig:
    """One entry of `data.sources`; which of the fields count depends on the kind."""

    kind: str = MISSING  # folder | librispeech | common_voice | generated | manifest | huggingface
    path: str = ""  # folder, root, manifest file or Hugging Face name; relative to data.data_root
    name: str = ""  # shown in reports; empty: made from kind and path
    pattern: str = "**/*"  # folder: glob below path; only audio suffixes are kept
    subsets: list[str] = field(default_factory=list)  # librispeech: train-clean-360, ...
    language: str = ""  # common_voice: en, ar, ...
    tsv: str = "train"  # common_voice: train, validated, ...
    config: str = ""  # huggingface: configuration of the data set; empty: its default
    split: str = "train"  # huggingface
    audio_column: str = "audio"  # huggingface
    max_clips: int = 10000  # huggingface: clips streamed into the local copy
    weight: float = 1.0  # passes over this source per epoch; 0.3: a new 30 % each epoch


@dataclass
class ValidationConfig:
    """Fixed clips, never trained on, the same number from every source if it has so many."""

    clips: int = 16  # heard at every validation; they decide which weights are best
    speakers: list[str] = field(default_factory=list)  # held out entirely; the clips then come from them
    test_clips: int = 0  # others, heard once: by the best weights, at the end of a run


@dataclass
class DataConfig:
    """The `data:` block."""

    data_root: str = "data"  # relative source paths are found below it
    sources: list[SourceConfig] = field(default_factory=list)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    batch_size: int = 32  # clips per process and micro-batch
    max_sec: float = 4.0  # longest crop of a clip, seconds
    speed: list[float] = field(default_factory=lambda: [1.0, 1.0])  # each crop is played between so fast and so fast
    num_workers: int = 4  # loader processes per training process; 0: none
    cache: str | None = "~/.cache/voxtral-voice-clone"  # folder that keeps what long searches found; null: none


class Absent(Exception):
    """A source, or a part of it, is not there; the message is the path that was looked for."""


@dataclass
class Found:
    """What one source has: `clips`, sorted by path; the parts that are `absent` ("name: path that was looked for");
    `remarks`: what was passed over."""

    name: str
    clips: Clips = field(default_factory=lambda: Clips.of_list([]))
    absent: list[str] = field(default_factory=list)
    remarks: Remarks = field(default_factory=Remarks)

    def lines(self) -> list[str]:
        """What was not found, for people."""
        return [f"absent: {part}" for part in self.absent] + [f"{self.name}: {line}" for line in self.remarks.lines()]


def find_clips(config: DataConfig) -> tuple[list[Clips], list[str]]:
    """-> clips of each source that is present (order of the config), and a line each of what is absent or passed over.

    Raises DataError as find_sources(), and when no clip is found.
    """
    sources = find_sources(config)
    present = [source.clips for source in sources if source.clips]
    lines = [line for source in sources for line in source.lines()]
    if not present:
        raise DataError(f"No clip was found for data.sources, get one or change its path ({'; '.join(lines)}).")
    return present, lines


def find_sources(config: DataConfig) -> list[Found]:
    """What every source of the config has. With several processes, the first to come copies Hugging Face sources, the
    others wait for it. Raises DataError when the config is invalid, TableError when a manifest cannot be read."""
    check_config(config)
    if not config.sources:
        raise DataError("data.sources is empty: name at least one.")
    root = Path(config.data_root)
    return [find_source(source, index, root, config.cache) for index, source in enumerate(config.sources)]


def find_source(source: SourceConfig, index: int, root: Path, cache: str | None) -> Found:
    """As it was kept in the folder `cache`, unless something has changed since."""
    description = {**vars(source), "weight": 0, "root": str(root), "folder": os.path.abspath(root)}
    place = ClipCache(cache, description) if cache else None
    if place and (kept := place.read()):
        columns, absent, remarks = kept
        return Found(source_name(source), Clips.of(columns, index), absent, remarks)
    found = look_for_source(source, index, root)
    if place and len(found.clips) >= clip_cache.MIN_CLIPS:
        place.write(found.clips.parts[0], found.absent, found.remarks)
    return found


def look_for_source(source: SourceConfig, index: int, root: Path) -> Found:
    found, clips = Found(source_name(source)), []
    # Each part (a subset, for most kinds the whole) may be there without the others.
    for part in source.subsets if source.kind == "librispeech" else [""]:
        try:
            of_part = list(FINDERS[source.kind](source, index, root, part, found.remarks))
            if not of_part:
                raise Absent(f"no audio in {root / source.path / part}")
            clips += of_part
        except Absent as reason:
            found.absent.append(f"{found.name}: {reason}")
    found.clips = Clips.of_list(sorted(clips, key=lambda clip: clip.path))
    return found


def check_config(config: DataConfig) -> None:
    """Raises DataError naming the first key whose value cannot be used."""
    for index, source in enumerate(config.sources):
        key = f"data.sources[{index}]"
        if source.kind not in FINDERS:
            nearest = difflib.get_close_matches(source.kind, FINDERS, n=1, cutoff=0)[0]
            raise DataError(
                f"{key}.kind is '{source.kind}'; the nearest valid kind is '{nearest}' (all: {', '.join(FINDERS)})."
            )
        if not 0 < source.weight < float("inf"):
            raise DataError(f"{key}.weight is {source.weight}; it must be above 0.")
        if source.kind == "librispeech" and not source.subsets:
            raise DataError(f"{key}.subsets is empty; name at least one, such as train-clean-360.")
        if source.kind == "common_voice" and not source.language:
            raise DataError(f"{key}.language is empty; name one, such as en.")
    if not config.max_sec >= CODEC_FRAME_SEC:
        raise DataError(f"data.max_sec is {config.max_sec}; a codec frame is {CODEC_FRAME_SEC} s, the least.")
    if len(config.speed) != 2 or not 0.5 <= config.speed[0] <= config.speed[1] <= 2:
        raise DataError(
            f"data.speed is {list(config.speed)}; it must be two numbers from 0.5 to 2, the lower one first."
        )
    for key, value, least in (
        *((f"sources[{index}].max_clips", source.max_clips, 1) for index, source in enumerate(config.sources)),
        ("batch_size", config.batch_size, 1),
        ("num_workers", config.num_workers, 0),
        ("validation.clips", config.validation.clips, 1),
        ("validation.test_clips", config.validation.test_clips, 0),
    ):
        if value < least:
            raise DataError(f"data.{key} is {value}; it must be at least {least}.")


def source_name(source: SourceConfig) -> str:
    """What reports call a source."""
    return source.name or " ".join(filter(None, dict.fromkeys((source.kind, source.path, source.language))))


def split_validation(lists: Sequence[Sequence[Clip]], validation: ValidationConfig) -> tuple[list[Clips], list[Clip]]:
    """Clips of each source -> (training clips of each source, validation clips); what is held out, test clips too, is
    in no training list.

    The choice hangs on the names of file and folder alone: the same for every seed, and for data that moved. Sources
    take turns. Raises DataError for unknown speakers, and when no training clip would be left.
    """
    chosen, held_out = _hold_out(lists, validation)
    train = [_as_clips(one).where(~held) for one, held in zip(lists, held_out)]
    if not any(train):
        raise DataError(
            f"data.validation holds out all {sum(map(len, lists))} clips; lower data.validation.clips or "
            "test_clips, name fewer speakers or add to data.sources."
        )
    return train, chosen[: validation.clips]


def final_clips(lists: Sequence[Sequence[Clip]], validation: ValidationConfig) -> list[Clip]:
    """The clips that are held out for the end of a run; split_validation() says which are the others."""
    return _hold_out(lists, validation)[0][validation.clips :]


def _hold_out(lists: Sequence[Sequence[Clip]], validation: ValidationConfig) -> tuple[list[Clip], list[np.ndarray]]:
    """-> validation clips, then test clips; for each list bool [n]: which clips are not trained on."""
    lists = [_as_clips(one) for one in lists]
    may_be = [np.ones(len(one), bool) for one in lists]
    if validation.speakers:
        known = sorted(set().union(*(one.speakers() for one in lists)))
        unknown = sorted(set(validation.speakers) - set(known))
        if unknown:
            raise DataError(
                f"data.validation.speakers: nobody is called {', '.join(unknown)}; "
                f"among the {len(known)} speakers are {', '.join(known[:8])}."
            )
        may_be = [one.is_by(set(validation.speakers)) for one in lists]
    wanted, turns = validation.clips + validation.test_clips, []
    for one, flags in zip(lists, may_be):
        places = np.flatnonzero(flags)
        turns.append(one.where(places[np.argsort(one.keys()[places], kind="stable")[:wanted]]))
    in_turn = {clip.path: clip for clip in chain.from_iterable(zip_longest(*turns)) if clip}  # a file may be in two
    chosen = list(in_turn.values())[:wanted]
    held = Clips.of_list(chosen)
    if validation.speakers:
        held = Clips.join([one.where(flags) for one, flags in zip(lists, may_be)])
    paths, keys = {clip.path for clip in held}, held.keys()
    held_out = [np.isin(one.keys(), keys) for one in lists]
    for one, flags in zip(lists, held_out):
        for place in np.flatnonzero(flags):  # folders of two data sets may have a name in common
            flags[place] = one[place].path in paths
    return chosen, held_out


def _as_clips(clips: Sequence[Clip]) -> Clips:
    return clips if isinstance(clips, Clips) else Clips.of_list(clips)


def _audio_files(folder: Path, pattern: str, remarks: Remarks, expected: tuple[str, ...] = ()) -> Iterator[str]:
    """Paths relative to `folder`; other files are counted by their suffix, but for `expected` ones."""
    if not folder.is_dir():
        raise Absent(str(folder))
    for name in find_files(folder, pattern, remarks):
        suffix = os.path.splitext(name)[1].lower()
        if suffix in AUDIO_SUFFIXES:
            yield name
        elif suffix not in expected:
            reason = CONVERT if suffix in OTHER_MEDIA else "no audio"
            remarks.pass_over(f"{suffix or 'no suffix'}: {reason}", name)


def _folder_name(path: str) -> str:
    """Of the folder that a path lies in, as a text."""
    name = os.path.basename(os.path.dirname(path))
    return name if is_unicode(name) else shown(name)


def _folder(source: SourceConfig, index: int, root: Path, _, remarks: Remarks) -> Iterator[Clip]:
    folder = root / source.path
    for name in _audio_files(folder, source.pattern, remarks):
        path = os.path.join(folder, name)
        yield Clip(path, _folder_name(path), index)


def _librispeech(source: SourceConfig, index: int, root: Path, subset: str, remarks: Remarks) -> Iterator[Clip]:
    """SUBSET/SPEAKER/CHAPTER/*; LibriTTS and LibriTTS-R are laid out alike."""
    candidates = [root / source.path / folder / subset for folder in LIBRISPEECH_FOLDERS]
    for path in candidates:
        remarks.look_at(path)
    folder = next((path for path in candidates if path.is_dir()), candidates[0])
    for name in _audio_files(folder, "*/*/*", remarks, LIBRISPEECH_TEXTS):
        path = os.path.join(folder, name)
        yield Clip(path, _folder_name(os.path.dirname(path)), index)


def _common_voice(source: SourceConfig, index: int, root: Path, _, remarks: Remarks) -> Iterator[Clip]:
    """[cv-corpus-*/]LANGUAGE/TSV.tsv beside clips/; of several releases the newest that is whole."""
    base = root / source.path
    remarks.look_at(base)
    releases = sorted(base.glob("cv-corpus-*"), key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)])
    whole = [folder for folder in releases if not re.search("-(delta|singleword)", folder.name)]
    candidates = [folder / source.language / f"{source.tsv}.tsv" for folder in (base, *reversed(whole))]
    for path in candidates:
        remarks.look_at(path)
    table = next((path for path in candidates if path.is_file()), candidates[0])
    for folder in releases:
        if folder not in whole:
            remarks.note(f"{folder.name} is skipped: it holds a part only, such as what is new since the one before")
    if table != candidates[0]:
        remarks.note(f"the release used is {table.parent.parent.name}")
    return read_manifest(table, index, table.parent / "clips", remarks)


def _generated(source: SourceConfig, index: int, root: Path, _, remarks: Remarks) -> Iterator[Clip]:
    folder = root / source.path
    return read_manifest(folder / "manifest.jsonl", index, folder, remarks)


def _manifest(source: SourceConfig, index: int, root: Path, _, remarks: Remarks) -> Iterator[Clip]:
    manifest = root / source.path
    return read_manifest(manifest, index, manifest.parent, remarks)


def read_manifest(manifest: Path, index: int, folder: Path, remarks: Remarks) -> Iterator[Clip]:
    """The rows of a table; paths are relative to `folder`, and a row without a speaker has that of its folder."""
    remarks.look_at(manifest)
    if not manifest.is_file():
        raise Absent(str(manifest))
    for row in read_table(manifest, remarks):
        path = os.path.join(folder, row.path)
        if "\\" in row.path and not os.path.exists(path):
            path = os.path.join(folder, row.path.replace("\\", "/"))  # written on Windows
        codes = os.path.join(folder, row.codes) if row.codes else ""
        yield Clip(path, row.speaker or _folder_name(path), index, row.text, codes)


def _huggingface(source: SourceConfig, index: int, root: Path, _, remarks: Remarks) -> Iterator[Clip]:
    """Read from a local copy, so that sampling is repeatable and needs no network."""
    folder = local_copy(
        root, f"data.sources[{index}]", source.path, source.config, source.split, source.audio_column, source.max_clips
    )
    return read_manifest(folder / "manifest.jsonl", index, folder, remarks)


FINDERS = {
    "folder": _folder,
    "librispeech": _librispeech,
    "common_voice": _common_voice,
    "generated": _generated,
    "manifest": _manifest,
    "huggingface": _huggingface,
}
