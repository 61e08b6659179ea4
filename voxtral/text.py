"""Texts to speak: long ones cut at sentences, and lists of sentences by language."""

import re
import unicodedata
from itertools import chain
from pathlib import Path

from voxtral.errors import UserError

LANGUAGE = re.compile(r"([a-z]{2,3}([-_][A-Za-z]{2,4})?)?")  # en, pt-BR, or nothing
MAX_CHARS = 300  # of a piece: about 20 s of speech
# Where a long text may be cut, best first: after a sentence, after a clause, between words, anywhere.
CUTS = [
    re.compile(r"(?<=[.!?…।؟])[\"'”’»)\]]*\s+|\n+"),
    re.compile(r"(?<=[,;:،؛–—])\s+"),
    re.compile(r"\s+"),
    re.compile(r"(?<=.)(?=.)"),
]


def split_text(text: str, max_chars: int = MAX_CHARS) -> list[str]:
    """A text -> pieces of at most max_chars, each of as many whole sentences as fit; [] for an empty text.

    Only a sentence that is longer by itself is cut at a comma, or else between words.
    """
    return _split(text.strip(), max_chars, 0) if says_something(text) else []


def _split(text: str, max_chars: int, level: int) -> list[str]:
    ends = [match.end() for match in CUTS[level].finditer(text)]
    parts = [text[start:end].strip() for start, end in zip([0, *ends], [*ends, len(text)])]
    parts = chain.from_iterable(
        [part] if len(part) <= max_chars else _split(part, max_chars, level + 1) for part in parts if part
    )
    joint, pieces = "" if level == len(CUTS) - 1 else " ", []
    for part in parts:
        if pieces and len(pieces[-1]) + len(joint) + len(part) <= max_chars:
            pieces[-1] += joint + part
        else:
            pieces.append(part)
    return pieces


def says_something(text: str) -> bool:
    """Is anything in it but spaces, control and invisible characters?"""
    return any(unicodedata.category(one)[0] not in "ZC" for one in text)


def read_text(path) -> str:
    """Raises UserError when the file is missing or no UTF-8 text."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"text file {path} does not exist.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"text file {path} is not in UTF-8: convert it.") from error


def read_sentences(path) -> list[tuple[str, str]]:
    """Lines LANGUAGE<TAB>TEXT, or TEXT alone -> (language or "", text), in the order of the file, each text once and as
    it is written, whatever characters are in it.

    Raises UserError when the file is missing, no UTF-8 text, or holds no text.
    """
    sentences = {}
    for line in read_text(path).split("\n"):
        language, tab, text = line.partition("\t")
        if not (tab and LANGUAGE.fullmatch(language.strip())):
            language, text = "", line
        if says_something(text):
            sentences.setdefault(text.strip(), language.strip())
    if not sentences:
        raise UserError(f"{path} holds no text: write one sentence a line, with its language and a tab in front.")
    return [(language, text) for text, language in sentences.items()]
