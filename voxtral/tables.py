"""Tables and texts from outside: CSV and its kin, JSON lines, plain lines. Every script reads them here.

Lines end at "\n" alone (or "\r\n"): U+2028, U+0085 and form feeds are part of a text.
"""

import codecs
import csv
import json
import re
from collections import deque
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from voxtral.errors import UserError, reason_of
from voxtral.remarks import Remarks

# What a column holds -> the names it goes by in the world's data sets, best first; case does not count.
COLUMNS = {
    "path": tuple(
        "path audio audio_path audio_file audio_filepath audio_filename file_name filename file file_path filepath "
        "wav wav_path wav_file wav_filename".split()
    ),
    "speaker": ("speaker", "voice", "speaker_id", "speaker_name", "spk", "spk_id", "client_id"),
    "text": ("text", "sentence", "transcription", "transcript", "normalized_text"),
    "codes": ("codes",),
}
JSON_SUFFIXES = {".jsonl", ".ndjson", ".json"}
DELIMITERS = (",", "\t", "|", ";")
MAX_QUOTED_LINES = 50  # of one field
NO_UTF8 = re.compile("[\udc80-\udcff]")  # bytes that are no UTF-8, which a file's name may hold
CLIENT_ID_CHARACTERS = 16  # of Common Voice's 128


class TableError(UserError):
    """A table that cannot be read at all; single rows that cannot are passed over."""


class Row(NamedTuple):
    """What a row says of a clip; empty: nothing. read_table() gives none without a path."""

    path: str
    speaker: str = ""
    text: str = ""
    codes: str = ""


def read_table(path, remarks: Remarks) -> Iterator[Row]:
    """CSV (between , ; | or tabs, with a header), TSV, JSON lines or a JSON list. Rows that name no file, that cannot
    be read or whose text is no Unicode are passed over, and counted.

    Raises TableError when there is no such file, it is empty, or no column names the files.
    """
    path, names = Path(path), {}
    read_rows = _json_rows if path.suffix.lower() in JSON_SUFFIXES else _delimited_rows
    for place, values in read_rows(path, names, remarks):
        row = row_of(values)
        if not row.path:
            remarks.pass_over(str(values.get("left_out") or "a row that names no file"), f"{path}, {place}")
        elif not is_unicode(row.speaker + row.text + NO_UTF8.sub("", row.path + row.codes)):
            remarks.pass_over("a row that is not UTF-8", f"{path}, {place}")
        else:
            yield row
    if not names:
        raise TableError(f"{path} has no row that can be read.")
    used = _columns(tuple(names))
    if not used[0]:
        raise TableError(
            f"{path}: no column names the files; it has {', '.join(map(repr, names))}, and understood are "
            + "; ".join(f"{column}: {', '.join(known)}" for column, known in COLUMNS.items())
            + "."
        )
    unused = [str(name) for name in names if not any(name in known for known in used)]
    if unused and not (used[1] and used[2]):
        missing = "speaker" if used[2] else "text"
        remarks.note(f"{path}: no column says the {missing}; not understood: {', '.join(unused)}")


def row_of(values: dict) -> Row:
    """A row's values by the name of their column -> what they say of a clip."""
    return Row(*(_value(values, known) for known in _columns(tuple(values))))


@lru_cache
def _columns(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The columns of a table -> which of them hold each of COLUMNS, best first."""
    by_name = {str(name).strip().lower(): name for name in reversed(names)}
    return [tuple(by_name[name] for name in known if name in by_name) for known in COLUMNS.values()]


def _value(values: dict, names: tuple[str, ...]) -> str:
    """The first of these columns that is there and not empty."""
    for name in names:
        value = values.get(name)
        if isinstance(value, dict):  # an audio column of the `datasets` package
            value = value.get("path")
        if isinstance(value, (str, int, float)) and not isinstance(value, bool) and value != "":
            return str(value)[:CLIENT_ID_CHARACTERS] if name == "client_id" else str(value)
    return ""


def is_unicode(text: str) -> bool:
    """No lone surrogates, which no encoder takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# ---------------------------------------------------------------- lines


def read_lines(path) -> Iterator[str]:
    """The lines of a text file, without their ends. Bytes that are not UTF-8 come as surrogates, as in file names.

    Raises UserError when the file is missing or cannot be opened.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(4)
        is_16_bit = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        encoding, errors = ("utf-16", "replace") if is_16_bit else ("utf-8-sig", "surrogateescape")
        with open(path, encoding=encoding, errors=errors, newline="\n") as file:
            for line in file:
                yield line.removesuffix("\n").removesuffix("\r")
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist.") from error
    except (OSError, UnicodeError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}).") from error


def json_line(row: dict) -> str:
    r"""A row as one line of JSON, "\n" at its end, that any reader takes for one line: what other programs take for the
    end of a line is written as \u2028."""
    text = json.dumps(row, ensure_ascii=False)
    return re.sub("[\x7f-\x9f\u2028\u2029\ud800-\udfff]", lambda one: f"\\u{ord(one[0]):04x}", text) + "\n"


def read_json_lines(path, remarks: Remarks) -> Iterator[dict]:
    """The objects of a file of JSON lines; others, such as a line that a kill cut short, are passed over."""
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                yield row
            else:
                remarks.pass_over("a line that is no JSON object", f"{path}, line {number}")


# ---------------------------------------------------------------- JSON and delimited tables


def _json_rows(path: Path, names: dict, remarks: Remarks) -> Iterator[tuple[str, dict]]:
    """-> (place, row); fills `names` with the columns, as _delimited_rows() does."""
    first = next((line for line in read_lines(path) if line.strip()), "").lstrip()
    if first.startswith("["):
        try:
            rows = json.loads("\n".join(read_lines(path)))
        except (ValueError, RecursionError) as error:
            raise TableError(f"{path} is no valid JSON list ({reason_of(error)}); write one object a line.") from error
    else:
        rows = read_json_lines(path, remarks)
    for number, row in enumerate(rows, 1):
        if isinstance(row, dict):
            if names.keys() != row.keys():
                names.update(dict.fromkeys(row))
            yield f"row {number}", row
        else:
            remarks.pass_over("a row that is no JSON object", f"{path}, row {number}")


class _Dialect:
    """How the fields of a line are told apart, by the header and the suffix of the file."""

    def __init__(self, header: str, suffix: str):
        preferred = "\t" if suffix == ".tsv" else ","
        self.delimiter = min(
            DELIMITERS,
            key=lambda one: (not _columns(tuple(_split(header, one) or []))[0], one != preferred, -header.count(one)),
        )
        # Common Voice's tables, and most others between tabs or bars, hold quotes as they are.
        self.quoting = self.delimiter in ",;" or header.startswith('"')
        self.columns = [name.strip() for name in self.split(header) or header.split(self.delimiter)]
        file_columns, _, texts, _ = _columns(tuple(self.columns))
        self.path_at = self.columns.index(file_columns[0]) if file_columns else 0
        self.text_is_last = self.columns[-1] in texts

    def split(self, record: str) -> list[str] | None:
        """-> its fields; None when a quote in it is not closed."""
        return _split(record, self.delimiter) if self.quoting else record.split(self.delimiter)

    def is_row(self, line: str, like: str) -> bool:
        """Is `line` a row of its own, whose file has the suffix of that in `like`?"""
        fields, others = line.split(self.delimiter), like.split(self.delimiter)
        return (
            len(fields) >= len(self.columns)
            and len(others) > self.path_at
            and Path(fields[self.path_at].strip('"')).suffix == Path(others[self.path_at].strip('"')).suffix
        )

    def fitted(self, fields: list[str]) -> list[str] | None:
        """As many fields as columns: delimiters in an unquoted text belong to it. None: too many."""
        n = len(self.columns)
        if len(fields) > n and self.text_is_last:
            return [*fields[: n - 1], self.delimiter.join(fields[n - 1 :])]
        return None if any(fields[n:]) else fields[:n] + [""] * (n - len(fields))


def _split(record: str, delimiter: str) -> list[str] | None:
    if '"' not in record:
        return record.split(delimiter)
    try:
        return next(csv.reader([record], delimiter=delimiter, strict=True), [])
    except csv.Error:
        return None


class _Lines:
    """Numbered lines that can be given back."""

    def __init__(self, lines: Iterable[str]):
        self.lines, self.returned = enumerate(lines, 1), deque()

    def next(self) -> tuple[int, str] | None:
        return self.returned.popleft() if self.returned else next(self.lines, None)

    def give_back(self, lines: list[tuple[int, str]]) -> None:
        self.returned.extendleft(reversed(lines))


def _delimited_rows(path: Path, names: dict, remarks: Remarks) -> Iterator[tuple[str, dict]]:
    lines = _Lines(read_lines(path))
    header = next((line for _, line in iter(lines.next, None) if line.strip()), None)
    if header is None:
        raise TableError(f"{path} is empty.")
    dialect = _Dialect(header, path.suffix.lower())
    names.update(dict.fromkeys(dialect.columns))
    any_open = False
    for number, line in iter(lines.next, None):
        if not line.strip():
            continue
        fields = dialect.split(line)
        if fields is None:
            fields = _quoted_record(dialect, line, lines)
        if fields is None:
            fields = line.split(dialect.delimiter)
            if not any_open:
                remarks.note(
                    f"{path}: a quote is opened and not closed (first in line {number}); such lines are read as "
                    "they stand"
                )
            any_open = True
        fields = dialect.fitted(fields)
        if fields is None:
            reason = f"a row with more fields than the {len(dialect.columns)} columns"
            remarks.pass_over(reason, f"{path}, line {number}")
        else:
            yield f"line {number}", dict(zip(dialect.columns, fields))


def _quoted_record(dialect: _Dialect, line: str, lines: _Lines) -> list[str] | None:
    """The fields of a record that begins with `line` and goes on, in quotes, in the next ones. None, and no line taken,
    where the next one is a row by itself: then the quote was never meant to be closed."""
    held, fields = [], None
    while fields is None and len(held) < MAX_QUOTED_LINES and (following := lines.next()):
        held.append(following)
        if dialect.is_row(following[1], like=line):
            break
        fields = dialect.split("\n".join([line, *(text for _, text in held)]))
    if fields is None:
        lines.give_back(held)
    return fields
