"""The rows of a run's metrics.jsonl: all of them, one at a time, or as many as its plots can show."""

import json
from collections.abc import Iterator
from pathlib import Path

MAX_ROWS = 1000  # of a kind; a curve of a small panel has no more points to show


def metric_rows(path) -> Iterator[dict]:
    """The rows of a metrics.jsonl, one in memory at a time; a line cut short by a kill is left out."""
    with Path(path).open(encoding="utf-8") as file:
        for line in map(str.strip, file):
            if line.startswith("{") and line.endswith("}"):
                yield json.loads(line)


class History:
    """What plots show of a run, at a cost that does not grow with it: of each kind of row (training, validation, ...)
    at most MAX_ROWS + 1, spread evenly over the run, the first and the newest among them."""

    def __init__(self):
        self.kinds: dict[str, Thinned] = {}

    def add(self, row: dict) -> None:
        """Rows of a kind have the same first metric."""
        kind = next((name for name in row if name != "step"), "")
        self.kinds.setdefault(kind, Thinned(MAX_ROWS)).add(row)

    @property
    def rows(self) -> list[dict]:
        """In the order of their steps."""
        return sorted((row for kind in self.kinds.values() for row in kind.rows), key=lambda row: row["step"])


class Thinned:
    """Every n-th of the rows that were added; n doubles whenever there are more than `limit`."""

    def __init__(self, limit: int):
        self.limit, self.kept, self.every, self.count, self.newest = limit, [], 1, 0, None

    def add(self, row: dict) -> None:
        if self.count % self.every == 0:
            self.kept.append(row)
            if len(self.kept) > self.limit:
                self.kept, self.every = self.kept[::2], 2 * self.every
        self.count, self.newest = self.count + 1, row

    @property
    def rows(self) -> list[dict]:
        return self.kept if self.kept[-1] is self.newest else [*self.kept, self.newest]
