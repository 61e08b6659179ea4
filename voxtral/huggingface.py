"""A local copy of a Hugging Face data set: encoded files as they are, and a manifest.jsonl of them."""

import os
from itertools import islice
from pathlib import Path

from filelock import FileLock

from voxtral.audio import AUDIO_SUFFIXES
from voxtral.checkpoint import atomic_path
from voxtral.errors import DataError, reason_of
from voxtral.paths import file_name
from voxtral.tables import json_line, row_of


def local_copy(root: Path, key: str, name: str, config: str, split: str, audio_column: str, max_clips: int) -> Path:
    """The folder below `root` with the copy, made by the first process that comes; the others wait for it. `key`: what
    the source is called in the config. Raises DataError when the data set cannot be had."""
    words = (name.strip("/").replace("/", "--"), config, split, str(max_clips))
    folder = root / "huggingface" / file_name("_".join(word for word in words if word))
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if not (folder / "manifest.jsonl").exists():
            try:
                from datasets import load_dataset
            except ImportError as error:
                raise DataError(
                    f"{key}: kind huggingface needs a package that is not installed: pip install datasets."
                ) from error
            try:
                stream = load_dataset(name, config or None, split=split, streaming=True)
            except Exception as error:  # of many packages: no such name, no network, no right to read it, ...
                raise DataError(
                    f"{key}: {name} cannot be loaded ({type(error).__name__}: {reason_of(error)})."
                ) from error
            if audio_column not in (stream.column_names or [audio_column]):
                raise DataError(
                    f"{key}.audio_column: {name} has no column '{audio_column}' "
                    f"(it has {', '.join(stream.column_names)})."
                )
            _copy(stream, f"{key}: {name}", folder, audio_column, max_clips)
    return folder


def _copy(stream, what: str, folder: Path, audio_column: str, max_clips: int) -> None:
    """manifest.jsonl appears, by renaming, when all files are there. Each is listed once it is whole, a row without
    audio with the reason, so an interrupted copy goes on from there."""
    part = folder / "manifest.jsonl.part"
    listed = part.read_bytes() if part.exists() else b""
    listed = listed[: listed.rfind(b"\n") + 1]  # without a line that was cut short
    done = listed.count(b"\n")
    # As Arrow rows the audio stays encoded; the `datasets` way, Audio(decode=False), still needs torchcodec.
    rows = iter(islice(stream.with_format("arrow").skip(done), max_clips - done))
    with part.open("ab") as listing:
        listing.truncate(len(listed))
        while True:
            try:
                table = next(rows, None)
            except Exception as error:
                raise DataError(
                    f"{what} breaks off after row {done} ({type(error).__name__}: {reason_of(error)}): the same "
                    "command goes on from there."
                ) from error
            if table is None:
                break
            (values,) = table.to_pylist()
            row = row_of({name: value for name, value in values.items() if name != audio_column})
            line = {"path": "", "speaker": row.speaker, "text": row.text}
            content, suffix = _encoded(values.get(audio_column))
            if content is None:
                line["left_out"] = f"a row without audio ({suffix})"
            else:
                line["path"] = f"{done:07d}{suffix}"
                with atomic_path(folder / line["path"]) as temporary:
                    temporary.write_bytes(content)
            listing.write(json_line(line).encode())
            listing.flush()
            done += 1
    os.replace(part, folder / "manifest.jsonl")


def _encoded(audio) -> tuple[bytes, str] | tuple[None, str]:
    """A value of the audio column -> the encoded file and its suffix, or None and why there is none."""
    if isinstance(audio, str):
        audio = {"path": audio}
    if not isinstance(audio, dict):
        return None, "nothing is there" if audio is None else f"a {type(audio).__name__} is no encoded audio"
    content, path = audio.get("bytes"), audio.get("path")
    if not content and path:  # the data set names files, here or on a server
        import fsspec

        try:
            with fsspec.open(path, "rb") as file:
                content = file.read()
        except (FileNotFoundError, IsADirectoryError) as error:
            return None, f"{path}: {reason_of(error)}"
    if not isinstance(content, bytes) or not content:
        return None, "it is empty"
    suffix = os.path.splitext(str(path or ""))[1].lower()
    return content, suffix if suffix in AUDIO_SUFFIXES else ""
