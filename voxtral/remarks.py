"""What was passed over on the way: how much of it, why, and the first of it. Nothing that is left out goes unsaid."""
from voxtral.errors import shown


class Remarks:
    """`passed_over`: reason -> (how many files or rows, the first of them); `notes`: sentences on what was done."""

    def __init__(self):
        self.passed_over: dict[str, tuple[int, str]] = {}
        self.notes: list[str] = []

    def __len__(self) -> int:
        """How many files and rows were passed over."""
        return sum(count for count, _ in self.passed_over.values())

    def pass_over(self, reason: str, what: str) -> None:
        count, first = self.passed_over.get(reason, (0, what))
        self.passed_over[reason] = count + 1, first

    def note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)

    def lines(self) -> list[str]:
        """One printable line for each reason and note."""
        return [f"{count} passed over: {shown(reason)} (first: {shown(first)})"
                for reason, (count, first) in self.passed_over.items()] + [shown(note) for note in self.notes]
