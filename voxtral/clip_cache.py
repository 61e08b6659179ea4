"""What was found of a source, kept from start to start: a million names take half a minute to find, no time to map.

It holds as long as the folders and tables that were looked at have the times they had then (Remarks.looked_at).
"""

import hashlib
import json
import shutil
import time
import uuid
from pathlib import Path

from voxtral.checkpoint import write_text
from voxtral.clip_list import Columns
from voxtral.remarks import Remarks, stamp

MIN_CLIPS = 20_000  # fewer are found as fast
SETTLED_SEC = 2  # a folder that changed so lately may change again without another time
FINDERS = ("sources.py", "paths.py", "tables.py", "huggingface.py", "audio.py", "clip_list.py", "clip_cache.py")


class ClipCache:
    """One source's place in a folder of such places: NAME.json, and NAME-*/ with the columns that it names."""

    def __init__(self, folder: str, description: dict):
        """description: all that what is found hangs on, besides the files."""
        code = b"".join((Path(__file__).parent / name).read_bytes() for name in FINDERS)
        text = json.dumps(description, sort_keys=True).encode()
        self.folder = Path(folder).expanduser()
        self.name = hashlib.sha256(text + code).hexdigest()[:24]
        self.record = self.folder / f"{self.name}.json"

    def read(self) -> tuple[Columns, list[str], Remarks] | None:
        """What write() was given; None when there is nothing, or something has changed since."""
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
            if any(stamp(path) != found for path, found in record["looked_at"].items()):
                return None
            remarks = Remarks.of(record)
            return Columns.read(self.folder / record["columns"]), record["absent"], remarks
        except (OSError, ValueError, LookupError):  # none, or one that another process is just removing
            return None

    def write(self, columns: Columns, absent: list[str], remarks: Remarks) -> None:
        """Atomic: the record comes last. Nothing is kept of what is still changing; a note says when nothing can be."""
        newest = max((found[0] for found in remarks.looked_at.values() if found), default=0)
        if newest > time.time_ns() - SETTLED_SEC * 10**9:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            name = f"{self.name}-{uuid.uuid4().hex[:8]}"
            columns.write(self.folder / name)
            record = {"columns": name, "absent": absent, **vars(remarks)}
            write_text(self.record, json.dumps(record))
            for former in self.folder.glob(f"{self.name}-*"):
                if former.name != name:
                    shutil.rmtree(former, ignore_errors=True)
        except OSError as error:
            remarks.note(
                f"data.cache: nothing can be kept in {self.folder} ({error.strerror}), so every start looks for "
                "all clips again: name another folder, or null"
            )
