"""Lists of a million clips: columns in place of objects, in memory or on disk; a `Clip` is made when asked for."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

STRINGS = ("path", "text", "codes")  # of a Clip that differ from one to the other


@dataclass(frozen=True, slots=True)
class Clip:
    """One audio file; `source`: index in `data.sources`, `codes`: path of its codes, of generated clips."""

    path: str
    speaker: str
    source: int
    text: str = ""
    codes: str = ""


class Strings(Sequence):
    """Strings one after the other: `data` uint8 [bytes], `ends` int64 [n]."""

    def __init__(self, data: np.ndarray, ends: np.ndarray):
        self.data, self.ends = data, ends

    @classmethod
    def of(cls, strings) -> "Strings":
        encoded = [string.encode("utf-8", "surrogateescape") for string in strings]  # names of files need not be UTF-8
        return cls(np.frombuffer(b"".join(encoded), np.uint8), np.cumsum([len(one) for one in encoded], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return self.data[start : self.ends[index]].tobytes().decode("utf-8", "surrogateescape")


class Columns:
    """The clips of one source, sorted by path."""

    def __init__(self, strings: dict[str, Strings], speakers: list[str], speaker: np.ndarray, key: np.ndarray):
        """strings: of each of STRINGS; speaker: int32 [n], which of `speakers`; key: int64 [n], see path_key()."""
        self.strings, self.speakers, self.speaker, self.key = strings, speakers, speaker, key

    @classmethod
    def of(cls, clips: list[Clip]) -> "Columns":
        names = {name: number for number, name in enumerate(dict.fromkeys(clip.speaker for clip in clips))}
        return cls(
            {name: Strings.of(getattr(clip, name) for clip in clips) for name in STRINGS},
            list(names),
            np.array([names[clip.speaker] for clip in clips], np.int32),
            np.array([path_key(clip.path) for clip in clips], np.int64),
        )

    def write(self, folder: Path) -> None:
        """For read()."""
        folder.mkdir()
        np.save(folder / "speaker.npy", self.speaker)
        np.save(folder / "key.npy", self.key)
        for name, strings in {**self.strings, "speakers": Strings.of(self.speakers)}.items():
            np.save(folder / f"{name}_data.npy", strings.data)
            np.save(folder / f"{name}_ends.npy", strings.ends)

    @classmethod
    def read(cls, folder: Path) -> "Columns":
        """Memory-mapped: processes share what they look at, and need no memory for what they do not."""

        def array(name: str) -> np.ndarray:
            return np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)

        strings = {name: Strings(array(f"{name}_data"), array(f"{name}_ends")) for name in (*STRINGS, "speakers")}
        return cls(strings, list(strings.pop("speakers")), array("speaker"), array("key"))


class Clips(Sequence):
    """A list of Clip. Clip i is row `rows[i]` of `parts[part[i]]`, and of `source[i]`, an index in data.sources."""

    def __init__(self, parts: list[Columns], part: np.ndarray, rows: np.ndarray, source: np.ndarray):
        """part, source: int16 [n]; rows: int32 [n]."""
        self.parts, self.part, self.rows, self.source = parts, part, rows, source

    @classmethod
    def of(cls, columns: Columns, source) -> "Clips":
        """All clips of `columns`; source: of all of them, or int [n]."""
        n_clips = len(columns.speaker)
        return cls(
            [columns],
            np.zeros(n_clips, np.int16),
            np.arange(n_clips, dtype=np.int32),
            np.broadcast_to(np.asarray(source, np.int16), n_clips),
        )

    @classmethod
    def of_list(cls, clips: list[Clip]) -> "Clips":
        return cls.of(Columns.of(clips), [clip.source for clip in clips])

    @classmethod
    def join(cls, lists: Sequence["Clips"]) -> "Clips":
        """One list after the other."""
        first = np.cumsum([0, *(len(one.parts) for one in lists)])
        return cls(
            [part for one in lists for part in one.parts],
            np.concatenate([one.part + np.int16(start) for one, start in zip(lists, first)]),
            np.concatenate([one.rows for one in lists]),
            np.concatenate([one.source for one in lists]),
        )

    def where(self, chosen: np.ndarray) -> "Clips":
        """Those for which `chosen` bool [n] is true, or whose indices it holds."""
        return Clips(self.parts, self.part[chosen], self.rows[chosen], self.source[chosen])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.where(np.arange(len(self))[index])
        columns, row = self.parts[self.part[index]], int(self.rows[index])
        path, text, codes = (columns.strings[name][row] for name in STRINGS)
        return Clip(path, columns.speakers[columns.speaker[row]], int(self.source[index]), text, codes)

    def __eq__(self, other) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other))

    def keys(self) -> np.ndarray:
        """int64 [n]: path_key() of each."""
        return self._of_each(np.int64, lambda columns, rows: columns.key[rows])

    def is_by(self, speakers: set[str]) -> np.ndarray:
        """bool [n]: whose speaker is one of these."""

        def chosen(columns: Columns, rows: np.ndarray) -> np.ndarray:
            return np.array([name in speakers for name in columns.speakers], bool)[columns.speaker[rows]]

        return self._of_each(bool, chosen)

    def speakers(self) -> set[str]:
        return {
            columns.speakers[number]
            for place, columns in enumerate(self.parts)
            for number in np.unique(columns.speaker[self.rows[self.part == place]])
        }

    @property
    def any_codes(self) -> bool:
        """Whether one of the sources has clips whose codes are known."""
        return any(len(columns.strings["codes"].data) for columns in self.parts)

    def _of_each(self, dtype, values) -> np.ndarray:
        """[n], of what values(columns, rows) gives for each of the parts."""
        result = np.zeros(len(self), dtype)
        for place, columns in enumerate(self.parts):
            inside = self.part == place
            result[inside] = values(columns, self.rows[inside])
        return result


def path_key(path: str) -> int:
    """63 bits of a hash of the names of file and folder: an order that is the same for data that moved."""
    folder, name = os.path.split(path)
    above = os.path.basename(folder)
    names = "/".join(Path(path).parts[-2:]) if above in ("", ".") else f"{above}/{name}"  # the second is much faster
    return int.from_bytes(hashlib.sha256(names.encode("utf-8", "surrogateescape")).digest()[:8], "big") >> 1
