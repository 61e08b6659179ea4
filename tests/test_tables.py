"""The doors that texts and names come in by: tables of many writers, JSON lines, sentences; links and pipes."""

import csv
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from voxtral.checkpoint import write_text
from voxtral.errors import UserError, shown
from voxtral.paths import MAX_NAME_BYTES, file_name, find_files, is_inside
from voxtral.remarks import Remarks
from voxtral.run import BadClipLog
from voxtral.sources import DataConfig, SourceConfig, find_clips, split_validation
from voxtral.tables import Row, TableError, json_line, read_json_lines, read_table
from voxtral.text import read_sentences, says_something

fast = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# What breaks lines or fields for somebody, and any other text.
odd = st.text(
    st.sampled_from("aé中\u2028\u2029\x85\f\v\x1c\x1e\u200b\u200f\ufeff\t|;,\"' \x00\x07\x1b\\/.😀"), max_size=12
)
texts = odd | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
names = st.from_regex(r"[a-z]{1,6}\.wav", fullmatch=True)


def rows_of(path):
    remarks = Remarks()
    return list(read_table(path, remarks)), remarks


# ---------------------------------------------------------------- tables


@fast
@given(st.lists(st.tuples(names, texts, texts), min_size=1, max_size=6))
def test_any_text_survives_json_lines(tmp_path, rows):
    path = tmp_path / "a.jsonl"
    lines = [json_line({"path": name, "speaker": speaker, "text": text}) for name, speaker, text in rows]
    assert all(len(line.splitlines()) == 1 for line in lines)  # whatever another reader takes for a line's end
    path.write_text("".join(lines), encoding="utf-8", newline="")
    assert rows_of(path)[0] == [Row(*row) for row in rows]
    lines = [json.dumps({"path": name, "text": text}, ensure_ascii=False) + "\n" for name, _, text in rows]
    path.write_text("".join(lines), encoding="utf-8", newline="")
    assert [(row.path, row.text) for row in rows_of(path)[0]] == [(row[0], row[2]) for row in rows]


one_line = texts.filter(lambda text: not set("\r\n\0") & set(text))


@fast
@given(
    st.lists(st.tuples(names, one_line), min_size=1, max_size=6),
    st.sampled_from([",", ";"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_any_text_survives_csv(tmp_path, rows, delimiter, quoting):
    table = io.StringIO(newline="")
    csv.writer(table, delimiter=delimiter, quoting=quoting, lineterminator="\n").writerows([("path", "text"), *rows])
    (tmp_path / "a.csv").write_text(table.getvalue(), encoding="utf-8", newline="")
    found, remarks = rows_of(tmp_path / "a.csv")
    assert [(row.path, row.text) for row in found] == rows and not remarks.lines()


@fast
@given(st.lists(st.tuples(names, odd.filter(lambda text: "\t" not in text)), min_size=1, max_size=6))
def test_any_text_survives_tsv(tmp_path, rows):
    (tmp_path / "a.tsv").write_text(
        "path\tsentence\n" + "".join(f"{name}\t{text}\n" for name, text in rows), encoding="utf-8", newline=""
    )
    assert [(row.path, row.text) for row in rows_of(tmp_path / "a.tsv")[0]] == rows


@pytest.mark.parametrize(
    "name, content, wanted",
    [
        ("f5.csv", "audio_file|text\na.wav|Hello there, my friend.\n", [("a.wav", "Hello there, my friend.")]),
        ("hf.csv", "file_name,transcription\na.wav,Hi\n", [("a.wav", "Hi")]),
        ("semicolon.csv", "path;text\na.wav;Hi, you\n", [("a.wav", "Hi, you")]),
        ("quoted.tsv", '"path"\t"text"\n"a.wav"\t"b"\n', [("a.wav", "b")]),
        ("nemo.jsonl", '{"audio_filepath": "a.wav", "duration": 3.8, "text": "a"}\n', [("a.wav", "a")]),
        ("datasets.jsonl", '{"audio": {"bytes": null, "path": "a.wav"}, "text": "a"}\n', [("a.wav", "a")]),
        ("list.json", '[{"path": "a.wav"},\n {"path": "b.wav", "text": "b"}]', [("a.wav", ""), ("b.wav", "b")]),
        ("excel.csv", "\ufeffPath , Text\r\na.wav,Hi\r\n", [("a.wav", "Hi")]),
        ("comma.csv", "path,text\na.wav,Well, no, never\n", [("a.wav", "Well, no, never")]),
        ("speech.txt", "path\ttext\na.wav\tHi\n", [("a.wav", "Hi")]),
        (
            "open.csv",
            'path,text\na.wav,"No\nb.wav,Yes\nc.wav,"two\nlines, all right"\nd.wav,"say ""x"""\n',
            [("a.wav", '"No'), ("b.wav", "Yes"), ("c.wav", "two\nlines, all right"), ("d.wav", 'say "x"')],
        ),
        ("open_at_the_end.csv", 'text,path\n"No,a.wav\n"Yes,b.wav\n', [("a.wav", '"No'), ("b.wav", '"Yes')]),
    ],
)
def test_tables_as_people_write_them(tmp_path, name, content, wanted):
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert [(row.path, row.text) for row in rows_of(tmp_path / name)[0]] == wanted


def test_a_table_in_utf16_is_read(tmp_path):
    (tmp_path / "a.csv").write_bytes("path\ttext\r\na.wav\tHé\r\n".encode("utf-16"))
    assert rows_of(tmp_path / "a.csv")[0] == [Row("a.wav", text="Hé")]


def test_a_million_open_quotes_take_no_time_and_lose_no_row(tmp_path):
    (tmp_path / "a.csv").write_text("path,text\n" + "".join(f'{i}.wav,"open {i}\n' for i in range(20_000)))
    rows, remarks = rows_of(tmp_path / "a.csv")
    assert (
        len(rows) == 20_000 and rows[-1] == Row("19999.wav", text='"open 19999') and "not closed" in remarks.lines()[0]
    )


def test_rows_that_cannot_be_used_are_counted_and_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b'{"path": "a.wav"}\n{"path": \n[1]\n{"path": null}\n{"path": "b.wav", "text": "\xff"}\n'
        b'{"path": "c.wav", "text": "\\ud800"}\n{"path": "\\ud800.wav"}\n{"path": "\\udce9.wav"}\n'
        + b"[" * 100_000
        + b'\n{"path": "d.wav"}\n'
    )
    rows, remarks = rows_of(tmp_path / "a.jsonl")
    assert [row.path for row in rows] == ["a.wav", "\udce9.wav", "d.wav"] and len(remarks) == 7
    assert {reason: count for reason, (count, _) in remarks.passed_over.items()} == {
        "a line that is no JSON object": 3,
        "a row that names no file": 1,
        "a row that is not UTF-8": 3,
    }
    (tmp_path / "a.csv").write_text("path,text,speaker\na.wav,Hi, you,anna\nb.wav,No,ben\n")
    rows, remarks = rows_of(tmp_path / "a.csv")
    assert [row.path for row in rows] == ["b.wav"] and "a.csv, line 2" in remarks.lines()[0]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", "datei,text\na.wav,Hi\n", "it has 'datei', 'text', and understood are path: path, audio,"),
        ("a.jsonl", '{"datei": "a.wav"}\n', "it has 'datei'"),
        ("a.csv", "", "is empty"),
        ("a.jsonl", "", "no row"),
        ("a.jsonl", "no JSON\n", "no row"),
        ("a.json", "[1, ", "no valid JSON list"),
    ],
)
def test_what_is_no_table_says_what_was_seen(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(TableError, match=message):
        rows_of(tmp_path / name)
    with pytest.raises(UserError, match="does not exist"):
        rows_of(tmp_path / "none.csv")


def test_a_file_of_json_lines_that_was_torn_goes_on(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"a": "one\u2028two"}\n{"a": "to{"a": 3}\n{"a": 4}\n{"a"', encoding="utf-8")
    assert [row["a"] for row in read_json_lines(path, Remarks())] == ["one\u2028two", 4]


def test_sentences_are_read_as_they_are_written(tmp_path):
    path = tmp_path / "s.tsv"
    path.write_text(
        "en\tHello one\u2028still one.\r\nen\tA\tB tab.\nNo language,\ttab\n"
        "pt-BR\tOi\f!\n\u2028 \n\u200b\u200d\n\tbare\n\0\n",
        encoding="utf-8",
        newline="",
    )
    assert read_sentences(path) == [
        ("en", "Hello one\u2028still one."),
        ("en", "A\tB tab."),
        ("", "No language,\ttab"),
        ("pt-BR", "Oi\f!"),
        ("", "bare"),
    ]
    assert says_something("?") and not says_something("\u200b\x00 \u2028\t")


# ---------------------------------------------------------------- names


evil = st.sampled_from(["../../x", "..", ".", "", "/etc", "a/b", "a_b", "N/A", ".hidden", "x\0y", "a."])


@fast
@given(st.lists(st.text(max_size=300) | odd | evil, min_size=1, max_size=8, unique=True))
def test_any_name_is_one_component_and_no_two_share_it(tmp_path, speakers):
    made = [file_name(speaker) for speaker in speakers]
    assert len(set(made)) == len(speakers)
    for name in made:
        assert is_inside(name) and 0 < len(name.encode()) <= MAX_NAME_BYTES and not name.startswith(".")
        path = tmp_path / name
        assert path.resolve().parent == tmp_path.resolve()
        path.mkdir(exist_ok=True)


@pytest.mark.parametrize("name", ["anna", "w_m390@1.1", "84", "Ünal 中", "x.y", "casual_female"])
def test_ordinary_names_stay(name):
    assert file_name(name) == name


@fast
@given(st.text(max_size=30))
def test_what_is_shown_is_one_printable_line_and_can_be_written(text):
    line = shown(text)
    assert line.isprintable() or not line
    assert len(line.splitlines()) <= 1 and line.encode().decode() == line


def test_bad_files_are_listed_once_whatever_their_names_hold(tmp_path):
    for _ in range(2):
        log = BadClipLog(tmp_path)
        log.add([("a\tb\n\u2028.wav", "is\nbad"), (os.fsdecode(b"caf\xe9.wav"), "is empty")])
    assert (tmp_path / "bad_files.txt").read_text().split("\n") == [
        "a\\tb\\n\\u2028.wav\tis\\nbad",
        "caf\\xe9.wav\tis empty",
        "",
    ]


# ---------------------------------------------------------------- folders


def found(folder, pattern="**/*"):
    remarks = Remarks()
    return sorted(find_files(Path(folder), pattern, remarks)), remarks


def test_every_real_file_comes_once(tmp_path):
    folder = tmp_path / "d"
    for name in ("a/1.wav", "a/b/2.wav", ".git/3.wav", "a/._1.wav"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "abc").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "5.wav").write_text("x")
    links = {"a/up": "..", "a/b/root": "../..", "a/out": "../..", "loop": "loop", "c": "a", "a/1b.wav": "1.wav"}
    links |= {"gone.wav": "nowhere", "4.wav": "../blobs/abc", "4b.wav": "../blobs/abc"}
    links |= {"o1": "../other", "o2": "../other", "o5.wav": "../other/5.wav"}
    for link, target in links.items():
        (folder / link).symlink_to(target)
    os.mkfifo(folder / "pipe.wav")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(folder / "socket.wav"))
    names, remarks = found(folder)
    assert names == ["4.wav", "a/1.wav", "a/b/2.wav", "o1/5.wav"]
    counts = {reason.split(" (")[0].split(",")[0]: count for reason, (count, _) in remarks.passed_over.items()}
    assert counts == {
        "hidden": 2,
        "no regular file": 2,
        "a link to nothing": 2,
        "a link to a folder that is read anyway": 4,
        "a link to a folder that this one lies in": 1,
        "a link to a file that is read anyway": 3,
    }


@pytest.mark.parametrize(
    "pattern, wanted",
    [
        ("**/*", ["1.wav", "a/2.wav", "a/b/3.flac"]),
        ("a/*", ["a/2.wav"]),
        ("*/*", ["a/2.wav"]),
        ("**/*.flac", ["a/b/3.flac"]),
        ("a/**", ["a/2.wav", "a/b/3.flac"]),
        ("**/b/*", ["a/b/3.flac"]),
        ("[1-9].wav", ["1.wav"]),
        ("../d/?.wav", ["../d/1.wav"]),
    ],
)
def test_patterns(tmp_path, pattern, wanted):
    for name in ("d/1.wav", "d/a/2.wav", "d/a/b/3.flac"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert found(tmp_path / "d", pattern)[0] == wanted


def test_names_that_are_no_utf8_are_found_split_and_listed(tmp_path):
    """In a process of its own, with another locale."""
    folder = os.fsencode(tmp_path) + b"/sp\xe9/"
    os.makedirs(folder)
    for i in range(3):
        Path(os.fsdecode(folder + b"caf\xe9\n\x1b[31m%d.wav" % i)).write_text("no audio")
    (tmp_path / "c.yaml").write_text(f"data:\n  data_root: {tmp_path}\n  sources: [{{kind: folder}}]\n")
    done = subprocess.run(
        [sys.executable, "-m", "voxtral.data", "--check", tmp_path / "c.yaml"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "LANG": "C", "LC_ALL": "C"},
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "caf\\xe9\\n\\x1b[31m0.wav: is text, not audio" in done.stdout and "Nothing here can be used" in done.stdout


def test_clips_with_odd_names_can_be_held_out_and_written(tmp_path):
    folder = os.fsencode(tmp_path) + b"/sp\xe9/"
    os.mkdir(folder)
    for i in range(3):
        Path(os.fsdecode(folder + b"caf\xe9%d.wav" % i)).write_text("x")
    sources, _ = find_clips(DataConfig(data_root=str(tmp_path), sources=[SourceConfig(kind="folder")]))
    config = DataConfig()
    config.validation.clips = 1
    train, held_out = split_validation(sources, config.validation)
    assert len(train[0]) == 2 and len(held_out) == 1 and held_out[0].speaker == "sp\\xe9"
    write_text(tmp_path / "list.txt", held_out[0].path)
