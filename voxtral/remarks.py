"""What was passed over on the way: how much of it, why, and the first of it. Nothing that is left out goes unsaid."""

import os
from stat import S_ISDIR

from voxtral.errors import shown

MAX_NAMED = 5  # of each reason


def stamp(path) -> list[int] | None:
    """[time of the last change in ns, size] of a file, [time, 0] of a folder: its entries; None: it is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return [status.st_mtime_ns, 0 if S_ISDIR(status.st_mode) else status.st_size]


class Remarks:
    """`passed_over`: reason -> (how many files or rows, the first of them); `notes`: sentences on what was done;
    `looked_at`: folder or table -> its stamp() before it was read."""

    def __init__(self):
        self.looked_at: dict[str, list[int] | None] = {}
        self.passed_over: dict[str, tuple[int, list[str]]] = {}
        self.notes: list[str] = []

    @classmethod
    def of(cls, record: dict) -> "Remarks":
        """What vars() of one were, back from JSON."""
        remarks = cls()
        remarks.looked_at, remarks.notes = record["looked_at"], record["notes"]
        remarks.passed_over = {reason: tuple(what) for reason, what in record["passed_over"].items()}
        return remarks

    def __len__(self) -> int:
        """How many files and rows were passed over."""
        return sum(count for count, _ in self.passed_over.values())

    def pass_over(self, reason: str, what: str) -> None:
        count, named = self.passed_over.get(reason, (0, []))
        self.passed_over[reason] = count + 1, named + [what] if count < MAX_NAMED else named

    def look_at(self, path) -> None:
        """Of every folder and table whose change would change what is found, also of one that is not there."""
        self.looked_at[os.path.abspath(path)] = stamp(path)

    def note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)

    def lines(self, what: str = "passed over") -> list[str]:
        """One printable line for each reason and note."""
        return [
            f"{count} {what}: {shown(reason)} ({shown(', '.join(named))}{', …' if count > len(named) else ''})"
            for reason, (count, named) in self.passed_over.items()
        ] + [shown(note) for note in self.notes]
