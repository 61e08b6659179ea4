"""Where names become paths, and folders become files: a name from outside is one component of a path and never leaves
its folder; of a folder every real file comes once, whatever links, devices and hidden files are in it."""

import fnmatch
import hashlib
import os
import re
import stat
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from voxtral.remarks import Remarks

NOT_REGULAR = "no regular file (a pipe, a socket or a device)"
MAX_NAME_BYTES = 100  # file systems take 255; room for numbers and suffixes
UNSAFE = re.compile(r"[^\w.@+=,~ -]")  # a letter of any language is safe


def file_name(name: str) -> str:
    """Any text -> one component of a path. An ordinary name stays as it is; of another one what can stay, and a hash,
    so that two names never share a folder."""
    safe = UNSAFE.sub("_", name).strip(" .")
    if safe == name and 0 < len(safe.encode()) <= MAX_NAME_BYTES:
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:10]
    return f"{safe.encode()[: MAX_NAME_BYTES - 11].decode(errors='ignore')}-{digest}".lstrip("-")


def no_file(path) -> str:
    """Why a path is no file that can be read; empty: it is one."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last: a zero byte in the name
        return "does not exist"
    except OSError as error:
        return f"cannot be opened ({error.strerror})"
    if stat.S_ISDIR(status.st_mode):
        return "is a folder"
    if not stat.S_ISREG(status.st_mode):
        return f"is {NOT_REGULAR}"
    if not status.st_size:
        return "is empty"
    return "" if os.access(path, os.R_OK) else "cannot be opened (no permission)"


def is_inside(name) -> bool:
    """Is this the path, relative to a folder, of something in it?"""
    return isinstance(name, str) and not name.startswith("/") and ".." not in name.split("/") and "\0" not in name


def find_files(folder: Path, pattern: str, remarks: Remarks) -> Iterator[str]:
    """Regular files below `folder` whose path, relative to it, has the glob `pattern` (** : any folders): those paths,
    in no order. Hidden files, what is no regular file, what the pattern leaves out and links to what is read anyway are
    passed over, and counted.
    """
    parts = pattern.split("/")
    n_fixed = next((i for i, part in enumerate(parts[:-1]) if re.search(r"[*?[]", part)), len(parts) - 1)
    start, match = "/".join(parts[:n_fixed]), _matcher(parts[n_fixed:])
    for name in _walk(folder / start, remarks):
        if match(name):
            yield f"{start}/{name}" if start else name
        else:
            remarks.pass_over(f"not where {pattern} looks", name)


def _matcher(parts: list[str]):
    """Glob components -> does a path have them? ** stands for any number of folders, or at the end for anything."""
    regex = ""
    for number, part in enumerate(parts, 1):
        last = number == len(parts)
        if part == "**":
            regex += r"[\s\S]*" if last else r"(?:[^/]*/)*"
        else:
            inside = fnmatch.translate(part).removesuffix(r"\Z").removesuffix(r"\z")
            inside = inside.replace(".*", "[^/]*").replace("(?s:", "(?:")
            regex += inside + ("" if last else "/")
    compiled = re.compile(regex)
    return lambda name: compiled.fullmatch(name) is not None


def _walk(root: Path, remarks: Remarks) -> Iterator[str]:
    """Paths relative to `root` of all regular files; what links lead to comes last, and once."""
    real_root = os.path.realpath(root)
    folders, links = deque([("", real_root)]), deque()  # (relative path, real path)
    entered, linked = {real_root}, set()
    while folders or links:
        if not folders:
            relative, real = links.popleft()
            if reason := _not_followed(relative, real, real_root, entered, linked):
                remarks.pass_over(reason, relative)
                if not os.path.exists(real):
                    remarks.look_at(real)
            elif os.path.isdir(real):
                entered.add(real)
                folders.append((relative, real))
            else:
                linked.add(real)
                yield relative
            continue
        relative, real = folders.popleft()
        remarks.look_at(real)
        try:
            entries = sorted(os.scandir(real), key=lambda entry: entry.name)
        except OSError as error:
            remarks.pass_over(f"a folder that cannot be opened ({error.strerror})", relative or str(root))
            continue
        for entry in entries:
            name = f"{relative}/{entry.name}" if relative else entry.name
            if entry.name.startswith("."):
                remarks.pass_over("hidden, such as the ._ files of macOS", name)
            elif entry.is_symlink():
                links.append((name, os.path.realpath(entry.path)))
            elif entry.is_dir():
                if entry.path not in entered:
                    entered.add(entry.path)
                    folders.append((name, entry.path))
            elif not entry.is_file():
                remarks.pass_over(NOT_REGULAR, name)
            elif entry.path not in linked:
                yield name


def _not_followed(link: str, real: str, real_root: str, entered: set[str], linked: set[str]) -> str:
    """Why a link is passed over; empty: it is followed."""
    if os.path.isdir(real):
        if real_root.startswith(real.rstrip("/") + "/"):
            return "a link to a folder that this one lies in"
        return "a link to a folder that is read anyway" if real in entered else ""
    if not os.path.isfile(real):
        return NOT_REGULAR if os.path.exists(real) else "a link to nothing"
    # A cache of downloads has its files without suffix, and links with it: those are the names that count.
    same_kind = os.path.splitext(link)[1].lower() == os.path.splitext(real)[1].lower()
    is_read = os.path.dirname(real) in entered and not os.path.basename(real).startswith(".") and same_kind
    return "a link to a file that is read anyway" if is_read or real in linked else ""
