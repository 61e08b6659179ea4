"""Which clips there are: the `data:` block of a config, and finding the clips of each kind of source.

Only names and manifests are read here, no audio: `voxtral.data` opens the clips.
"""
import csv
import difflib
import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from glob import iglob
from itertools import islice
from pathlib import Path
from typing import Iterator, List

from filelock import FileLock
from omegaconf import MISSING

from voxtral.errors import UserError

AUDIO_SUFFIXES = {".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff"}
LIBRISPEECH_FOLDERS = ("", "LibriSpeech", "LibriTTS_R", "LibriTTS")  # as their archives unpack
CODEC_FRAME_SEC = 0.08  # 1920 samples at 24 kHz


class DataError(UserError):
    """The `data:` block cannot be served as it stands; the message says what to change."""

    def __init__(self, message: str):
        # From a loader process torch hands over the traceback as the message: the sentence is its end.
        super().__init__(message.rsplit("DataError: ", 1)[-1].strip())


@dataclass
class SourceConfig:
    """One entry of `data.sources`; which of the fields count depends on the kind."""
    kind: str = MISSING         # folder | librispeech | common_voice | generated | manifest | huggingface
    path: str = ""              # folder, root, manifest file or Hugging Face name; relative to data.data_root
    name: str = ""              # shown in reports; empty: made from kind and path
    pattern: str = "**/*"       # folder: glob below path; only audio suffixes are kept
    subsets: List[str] = field(default_factory=list)  # librispeech: train-clean-360, ...
    language: str = ""          # common_voice: en, ar, ...
    tsv: str = "train"          # common_voice: train, validated, ...
    config: str = ""            # huggingface: configuration of the data set; empty: its default
    split: str = "train"        # huggingface
    audio_column: str = "audio"  # huggingface
    max_clips: int = 10000      # huggingface: clips streamed into the local copy
    weight: float = 1.0         # passes over this source per epoch; 0.3: a new 30 % each epoch


@dataclass
class ValidationConfig:
    """Fixed clips, never trained on."""
    clips: int = 16             # how many
    speakers: List[str] = field(default_factory=list)  # held out entirely; the clips then come from them


@dataclass
class DataConfig:
    """The `data:` block."""
    data_root: str = "data"     # relative source paths are found below it
    sources: List[SourceConfig] = field(default_factory=list)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    batch_size: int = 4         # clips per process and micro-batch
    max_sec: float = 4.0        # longest crop of a clip, seconds
    speed: List[float] = field(default_factory=lambda: [1.0, 1.0])  # each crop is played between so fast and so fast
    num_workers: int = 4        # loader processes per training process; 0: none


@dataclass(frozen=True, slots=True)
class Clip:
    """One audio file; `source`: index in `data.sources`, `codes`: path of its codes, of generated clips."""
    path: str
    speaker: str
    source: int
    text: str = ""
    codes: str = ""


class Absent(Exception):
    """A source, or a part of it, is not there; the message is the path that was looked for."""


def find_clips(config: DataConfig) -> tuple[list[list[Clip]], list[str]]:
    """-> clips of each source that is present (order of the config, sorted by path), and what is absent.

    Absent sources come as "name: path that was looked for", for the caller to print. With several processes,
    the first to come copies Hugging Face sources, the others wait for it. Raises DataError when the config is
    invalid, a manifest cannot be read, or no clip is found.
    """
    check_config(config)
    present, absent = [], []
    for index, source in enumerate(config.sources):
        clips = []
        # Each part (a subset, for most kinds the whole) may be there without the others.
        for part in source.subsets if source.kind == "librispeech" else [""]:
            try:
                found = list(FINDERS[source.kind](source, index, Path(config.data_root), part))
                if not found:
                    raise Absent(f"no audio in {Path(config.data_root) / source.path / part}")
                clips += found
            except Absent as reason:
                absent.append(f"{source_name(source)}: {reason}")
        if clips:
            present.append(sorted(clips, key=lambda clip: clip.path))
    if not present:
        looked_for = "; ".join(absent) or "data.sources is empty"
        raise DataError(f"No clip was found for data.sources, get one or change its path ({looked_for}).")
    return present, absent


def check_config(config: DataConfig) -> None:
    """Raises DataError naming the first key whose value cannot be used."""
    for index, source in enumerate(config.sources):
        key = f"data.sources[{index}]"
        if source.kind not in FINDERS:
            nearest = difflib.get_close_matches(source.kind, FINDERS, n=1, cutoff=0)[0]
            raise DataError(f"{key}.kind is '{source.kind}'; the nearest valid kind is '{nearest}' "
                            f"(all: {', '.join(FINDERS)}).")
        if not 0 < source.weight < float("inf"):
            raise DataError(f"{key}.weight is {source.weight}; it must be above 0.")
        if source.kind == "librispeech" and not source.subsets:
            raise DataError(f"{key}.subsets is empty; name at least one, such as train-clean-360.")
        if source.kind == "common_voice" and not source.language:
            raise DataError(f"{key}.language is empty; name one, such as en.")
        if source.kind == "huggingface" and source.max_clips < 1:
            raise DataError(f"{key}.max_clips is {source.max_clips}; it must be at least 1.")
    if not config.max_sec >= CODEC_FRAME_SEC:
        raise DataError(f"data.max_sec is {config.max_sec}; a codec frame is {CODEC_FRAME_SEC} s, the least.")
    if len(config.speed) != 2 or not 0.5 <= config.speed[0] <= config.speed[1] <= 2:
        raise DataError(f"data.speed is {list(config.speed)}; it must be two numbers from 0.5 to 2, the lower one first.")
    for key, value, least in (("batch_size", config.batch_size, 1), ("num_workers", config.num_workers, 0),
                              ("validation.clips", config.validation.clips, 1)):
        if value < least:
            raise DataError(f"data.{key} is {value}; it must be at least {least}.")


def source_name(source: SourceConfig) -> str:
    """What reports call a source."""
    return source.name or " ".join(filter(None, dict.fromkeys((source.kind, source.path, source.language))))


def split_validation(clips_per_source: list[list[Clip]],
                     validation: ValidationConfig) -> tuple[list[list[Clip]], list[Clip]]:
    """-> (training clips per source, validation clips); what is held out is in no training list.

    The choice hangs on the names of file and folder alone: the same for every seed, and for data that moved.
    Raises DataError for unknown speakers, and when no training clip would be left.
    """
    clips = {clip.path: clip for source in clips_per_source for clip in source}
    if validation.speakers:
        known = sorted({clip.speaker for clip in clips.values()})
        unknown = sorted(set(validation.speakers) - set(known))
        if unknown:
            raise DataError(f"data.validation.speakers: nobody is called {', '.join(unknown)}; "
                            f"among the {len(known)} speakers are {', '.join(known[:8])}.")
        clips = {path: clip for path, clip in clips.items() if clip.speaker in set(validation.speakers)}
    chosen = sorted(clips.values(), key=lambda clip: (_path_hash(clip.path), clip.path))[:validation.clips]
    held_out = set(clips) if validation.speakers else {clip.path for clip in chosen}
    train = [[clip for clip in source if clip.path not in held_out] for source in clips_per_source]
    if not any(train):
        raise DataError(f"data.validation holds out all {len(held_out)} clips; lower data.validation.clips, "
                        "name fewer speakers or add to data.sources.")
    return train, chosen


def _path_hash(path: str) -> str:
    return hashlib.sha256("/".join(Path(path).parts[-2:]).encode()).hexdigest()


def _audio_files(folder: Path, pattern: str) -> list[str]:
    """Sorted paths relative to `folder`; iglob, as Path.glob does not enter linked folders."""
    if not folder.is_dir():
        raise Absent(str(folder))
    files = iglob(pattern, root_dir=folder, recursive=True)
    return sorted(name for name in files if os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES)


def _folder(source: SourceConfig, index: int, root: Path, _) -> Iterator[Clip]:
    for name in _audio_files(root / source.path, source.pattern):
        path = root / source.path / name
        yield Clip(str(path), path.parent.name, index)


def _librispeech(source: SourceConfig, index: int, root: Path, subset: str) -> Iterator[Clip]:
    """SUBSET/SPEAKER/CHAPTER/*; LibriTTS and LibriTTS-R are laid out alike."""
    candidates = [root / source.path / folder / subset for folder in LIBRISPEECH_FOLDERS]
    folder = next((path for path in candidates if path.is_dir()), candidates[0])
    for name in _audio_files(folder, "*/*/*"):
        yield Clip(str(folder / name), Path(name).parts[0], index)


def _common_voice(source: SourceConfig, index: int, root: Path, _) -> Iterator[Clip]:
    """[cv-corpus-*/]LANGUAGE/TSV.tsv beside clips/; of several releases the newest."""
    base = root / source.path
    releases = sorted(base.glob("cv-corpus-*"), key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)])
    candidates = [folder / source.language / f"{source.tsv}.tsv" for folder in (base, *reversed(releases))]
    table = next((path for path in candidates if path.is_file()), candidates[0])
    return _read_manifest(table, index, table.parent / "clips")


def _generated(source: SourceConfig, index: int, root: Path, _) -> Iterator[Clip]:
    folder = root / source.path
    return _read_manifest(folder / "manifest.jsonl", index, folder)


def _manifest(source: SourceConfig, index: int, root: Path, _) -> Iterator[Clip]:
    manifest = root / source.path
    return _read_manifest(manifest, index, manifest.parent)


def _read_manifest(manifest: Path, index: int, folder: Path) -> Iterator[Clip]:
    """CSV, TSV or JSON lines: path (or audio) relative to `folder`, optionally speaker, text and codes."""
    if not manifest.is_file():
        raise Absent(str(manifest))
    with manifest.open(encoding="utf-8-sig", newline="") as file:
        number = 0
        try:
            for number, row in enumerate(_rows(manifest, file), 1):
                path, codes = _first(row, "path", "audio"), _first(row, "codes")
                if not path:
                    raise DataError(f"{manifest}: row {number} names no file; fill its 'path'.")
                # The client_id of Common Voice has 128 digits.
                speaker = _first(row, "speaker", "voice") or _first(row, "client_id")[:16]
                yield Clip(str(folder / path), speaker or (folder / path).parent.name, index,
                           _first(row, "text", "sentence"), str(folder / codes) if codes else "")
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, csv.Error) as error:
            raise DataError(f"{manifest}: cannot be read after row {number} ({error}); mend it.") from error


def _rows(manifest: Path, file) -> Iterator[dict]:
    if manifest.suffix == ".csv":
        return csv.DictReader(file)
    if manifest.suffix == ".tsv":
        return csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    return (json.loads(line) for line in file if line.strip())


def _first(row: dict, *names: str) -> str:
    """The first of these columns that is there and not empty."""
    return next((str(row[name]) for name in names if row.get(name) not in (None, "")), "")


def _huggingface(source: SourceConfig, index: int, root: Path, _) -> Iterator[Clip]:
    """Read from a local copy, so that sampling is repeatable and needs no network."""
    words = (source.path.strip("/").replace("/", "--"), source.config, source.split, str(source.max_clips))
    folder = root / "huggingface" / "_".join(word for word in words if word)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if not (folder / "manifest.jsonl").exists():
            _stream_huggingface(source, f"data.sources[{index}]", folder)
    return _read_manifest(folder / "manifest.jsonl", index, folder)


def _stream_huggingface(source: SourceConfig, key: str, folder: Path) -> None:
    """Copies the encoded files as they are; manifest.jsonl appears, by renaming, when all are there.

    Each is listed once it is whole, so an interrupted copy goes on from there.
    """
    try:
        import fsspec
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(f"{key}: kind huggingface needs a package that is not installed: "
                        "pip install datasets.") from error
    part = folder / "manifest.jsonl.part"
    listed = part.read_bytes() if part.exists() else b""
    listed = listed[:listed.rfind(b"\n") + 1]  # without a line that was cut short
    done = listed.count(b"\n")
    stream = load_dataset(source.path, source.config or None, split=source.split, streaming=True)
    if source.audio_column not in (stream.column_names or [source.audio_column]):
        raise DataError(f"{key}.audio_column: {source.path} has no column '{source.audio_column}' "
                        f"(it has {', '.join(stream.column_names)}).")
    # As Arrow rows the audio stays encoded; the `datasets` way, Audio(decode=False), still needs torchcodec.
    stream = stream.with_format("arrow").skip(done)
    with part.open("ab") as listing:
        listing.truncate(len(listed))
        for number, table in enumerate(islice(stream, source.max_clips - done), done):
            (row,) = table.to_pylist()
            audio = row[source.audio_column]
            if not audio["bytes"]:  # the data set names files, here or on a server
                with fsspec.open(audio["path"], "rb") as file:
                    audio["bytes"] = file.read()
            path = folder / f"{number:07d}{Path(audio['path'] or '').suffix}"
            partial = path.with_name(path.name + ".part")
            with partial.open("wb") as file:
                file.write(audio["bytes"])
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            line = {"path": path.name, "client_id": _first(row, "client_id"),
                    "speaker": _first(row, "speaker", "speaker_id"),
                    "text": _first(row, "text", "sentence", "transcription")}
            listing.write(json.dumps(line).encode() + b"\n")
            listing.flush()
    os.replace(part, folder / "manifest.jsonl")


FINDERS = {"folder": _folder, "librispeech": _librispeech, "common_voice": _common_voice,
           "generated": _generated, "manifest": _manifest, "huggingface": _huggingface}
