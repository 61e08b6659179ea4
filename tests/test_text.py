"""Cutting long texts, and the sentences that come with the project."""

from collections import Counter

import pytest

from generate_clips import SENTENCES
from voxtral.errors import UserError
from voxtral.text import read_sentences, read_text, split_text


def test_whole_sentences_stay_together():
    text = 'One is short. Two is a little longer! Is three a question? "Four," he said.'
    assert split_text(text, 40) == ["One is short. Two is a little longer!", 'Is three a question? "Four," he said.']
    assert split_text(text, 25) == [
        "One is short.",
        "Two is a little longer!",
        "Is three a question?",
        '"Four," he said.',
    ]
    assert split_text(text) == [text]


def test_a_long_sentence_is_cut_at_commas_then_words_then_anywhere():
    assert split_text("first the one half, then the other half of it", 30) == [
        "first the one half,",
        "then the other half of it",
    ]
    assert split_text("one two three four five", 9) == ["one two", "three", "four five"]
    assert split_text("abcdefghij klm", 4) == ["abcd", "efgh", "ij", "klm"]


@pytest.mark.parametrize(
    "text, max_chars, pieces",
    [
        ("هل هذا سؤال؟ نعم يا صديقي.", 16, ["هل هذا سؤال؟", "نعم يا صديقي."]),
        ("यह एक वाक्य है। और दूसरा।", 19, ["यह एक वाक्य है।", "और दूसरा।"]),
        ("3.5 litres at 12.30 a.m", 16, ["3.5 litres at", "12.30 a.m"]),
        ("a heading\nof its text", 16, ["a heading", "of its text"]),
        (" \n ", 16, []),
    ],
)
def test_sentences_end_in_every_script(text, max_chars, pieces):
    assert split_text(text, max_chars) == pieces


def test_nothing_is_lost():
    text = " ".join(text for _, text in read_sentences(SENTENCES))
    for size in (300, 50, 7):
        pieces = split_text(text, size)
        assert max(map(len, pieces)) <= size and "".join("".join(pieces).split()) == "".join(text.split())


def test_the_list_has_nine_languages_of_varied_sentences():
    sentences = read_sentences(SENTENCES)
    counts = Counter(language for language, _ in sentences)
    assert set(counts) == {"en", "fr", "es", "de", "it", "pt", "nl", "ar", "hi"} and min(counts.values()) >= 25
    assert len(sentences) == len(SENTENCES.read_text(encoding="utf-8").splitlines()) >= 300  # no text twice
    for language in counts:
        texts = [text for other, text in sentences if other == language]
        assert min(map(len, texts)) < 20 and max(map(len, texts)) > 60
        assert sum("?" in text or "؟" in text for text in texts) >= 4


def test_lists_with_and_without_languages(tmp_path):
    path = tmp_path / "texts.tsv"
    path.write_text("\ufeffde\tGuten Tag.\n\nJust this.\nen\tJust this.\n", encoding="utf-8")
    assert read_sentences(path) == [("de", "Guten Tag."), ("", "Just this.")]
    for content, match in ((b"\n\n", "holds no text"), (b"\xff\xfe\xff", "not in UTF-8")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=match):
            read_sentences(path)
    with pytest.raises(UserError, match="does not exist"):
        read_text(tmp_path / "none.txt")
