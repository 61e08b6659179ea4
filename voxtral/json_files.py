"""JSON files: read, written, or one value changed and every other byte kept: what a folder goes back to must be what it
was.

json.dumps of what json.loads has read is no way there: none of 16 settings of it (indent, escapes, separators) gives
the bytes of Mistral's own tekken_240718.json (mistral-common) again; and as voices come and go in any order, a copy of
the file kept aside is none either.
"""

import json
import math
from pathlib import Path

from voxtral.checkpoint import write_text
from voxtral.params import CheckpointError


def read_json(path) -> tuple[str, dict]:
    """-> (the text as it stands in the file, its content). Raises CheckpointError when missing or no JSON object."""
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8")
        content = json.loads(text)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: download it again, or name another folder.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is no JSON object: download it again.")
    return text, content


def read_record(path) -> dict:
    """The content of a file that these scripts have written, or {} where there is none."""
    return read_json(path)[1] if Path(path).is_file() else {}


def finite(value):
    """The value without NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path, content: dict) -> None:
    """Atomic; NaN becomes null."""
    write_text(path, json.dumps(finite(content), indent=2) + "\n")


def set_json(text: str, path: list[str], value) -> str:
    """A valid JSON text with the value at `path` replaced, or appended to its object as the members before are written.

    Raises KeyError when an object on the way is missing. remove_json takes an appended member out again, exactly.
    """
    start, members = _members(text, path[:-1])
    written, name = json.dumps(value), json.dumps(path[-1])
    if path[-1] in members:
        _, _, begin, end = members[path[-1]]
        return text[:begin] + written + text[end:]
    if not members:
        return text[: start + 1] + f"{name}: {written}" + text[start + 1 :]
    spans = list(members.values())
    key, key_end, begin, end = spans[-1]
    colon = text[key_end:begin]
    before = text[start + 1 : key] if len(spans) == 1 else text[spans[-2][3] : key].partition(",")[2]
    if len(spans) == 1 and not before and colon.endswith(" "):
        before = " "  # {"a": 1} is usually followed by {"a": 1, "b": 2}
    return text[:end] + "," + before + name + colon + written + text[end:]


def remove_json(text: str, path: list[str]) -> str:
    """A valid JSON text without the member at `path`. Raises KeyError when it is not there."""
    start, members = _members(text, path[:-1])
    first, _, _, end = members[path[-1]]
    others = [span for name, span in members.items() if name != path[-1]]
    before = [span for span in others if span[0] < first]
    if before:
        return text[: before[-1][3]] + text[end:]
    if others:
        return text[:first] + text[others[0][0] :]
    return text[: start + 1] + text[text.index("}", end) :]


def _members(text: str, path: list[str]) -> tuple[int, dict[str, tuple[int, int, int, int]]]:
    """The object at `path` -> (position of its brace, name -> (start, end of the name, start, end of the value))."""
    start = _skip_space(text, 0)
    members = _scan_object(text, start)
    for name in path:
        start = members[name][2]
        if text[start] != "{":
            raise KeyError(name)
        members = _scan_object(text, start)
    return start, members


def _scan_object(text: str, start: int) -> dict[str, tuple[int, int, int, int]]:
    members, decoder = {}, json.JSONDecoder()
    position = _skip_space(text, start + 1)
    while text[position] != "}":
        name, name_end = decoder.raw_decode(text, position)
        begin = _skip_space(text, text.index(":", name_end) + 1)
        end = decoder.raw_decode(text, begin)[1]
        members[name] = (position, name_end, begin, end)
        position = _skip_space(text, end)
        if text[position] == ",":
            position = _skip_space(text, position + 1)
    return members


def _skip_space(text: str, position: int) -> int:
    while text[position] in " \t\r\n":
        position += 1
    return position
