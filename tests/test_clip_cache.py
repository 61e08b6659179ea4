"""Finding clips: lists as columns, kept from start to start, found anew when a folder or a table has changed."""

import os
import shutil
import time

import numpy as np
import pytest

from voxtral import clip_cache, sources
from voxtral.clip_list import Clip, Clips, path_key
from voxtral.data import SampleStream
from voxtral.sources import DataConfig, SourceConfig, ValidationConfig, find_clips, find_sources, split_validation

CLIPS = [
    Clip("a/b/1.wav", "anna", 0, "Grüße, \n und so"),
    Clip("a/b/2.wav", "ben", 0, "", "a/b/2.npy"),
    Clip(os.fsdecode(b"a/b/\xff.wav"), "anna", 3),
    Clip("a/b/4.wav", "", 1),
]


def test_a_list_of_columns_is_the_list():
    clips = Clips.of_list(CLIPS)
    assert clips == CLIPS and list(clips) == CLIPS and clips[-1] == CLIPS[-1] and clips[1:3] == CLIPS[1:3]
    assert clips.index(CLIPS[2]) == 2 and clips.source.tolist() == [0, 0, 3, 1]
    assert clips.speakers() == {"anna", "ben", ""}
    assert clips.where(np.array([True, False, False, True])) == [CLIPS[0], CLIPS[3]]
    assert Clips.join([clips.where(np.array([3])), clips]) == [CLIPS[3], *CLIPS]
    assert clips.is_by({"anna"}).tolist() == [True, False, True, False]
    assert not Clips.of_list([]) and Clips.join([Clips.of_list([]), clips]) == CLIPS


def test_the_key_of_a_clip_hangs_on_its_last_two_names():
    assert path_key("/data/x/anna/1.wav") == path_key("anna/1.wav") == path_key("./y/anna/./1.wav")
    assert path_key("anna/1.wav") != path_key("ben/1.wav")
    assert 0 <= path_key("1.wav") < 2**63


# ---------------------------------------------------------------- kept and found again


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder, a LibriSpeech and a Common Voice, all an hour old; a cache that keeps three clips and more."""
    monkeypatch.setattr(clip_cache, "MIN_CLIPS", 3)
    for name in (
        [f"speech/{speaker}/{i}.flac" for speaker in "ab" for i in range(3)]
        + ["speech/a/notes.txt"]
        + [f"LibriSpeech/train/{speaker}/7/{i}.flac" for speaker in (1, 2) for i in range(3)]
    ):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).touch()
    (tmp_path / "data" / "cv" / "en").mkdir(parents=True)
    (tmp_path / "data" / "cv" / "en" / "train.tsv").write_text(
        "client_id\tpath\tsentence\n" + "".join(f"{i}\t{i}.mp3\tHello {i}\n" for i in range(4))
    )
    age(tmp_path)
    return tmp_path / "data"


def age(folder, seconds=3600):
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (time.time() - seconds,) * 2)


@pytest.fixture
def find(data, tmp_path, monkeypatch):
    """find() -> clips of all three sources, and whether they were looked for (or all kept)."""
    config = DataConfig(
        data_root=str(data),
        cache=str(tmp_path / "cache"),
        sources=[
            SourceConfig(kind="folder", path="speech"),
            SourceConfig(kind="librispeech", path=".", subsets=["train", "gone"]),
            SourceConfig(kind="common_voice", path="cv", language="en"),
        ],
    )
    looked = []
    original = sources.look_for_source
    monkeypatch.setattr(
        sources, "look_for_source", lambda source, *rest: looked.append(source.kind) or original(source, *rest)
    )

    def find():
        looked.clear()
        found = find_sources(config)
        return [list(one.clips) for one in found], [line for one in found for line in one.lines()], list(looked)

    return find


def test_the_second_start_looks_for_nothing_and_finds_the_same(find):
    first, said, looked = find()
    assert looked == ["folder", "librispeech", "common_voice"] and [len(clips) for clips in first] == [6, 6, 4]
    again, said_again, looked = find()
    assert looked == [] and again == first and said_again == said
    assert any("notes.txt" in line for line in said) and any("gone" in line for line in said)
    assert first[2][1].text == "Hello 1" and {clip.source for clip in first[1]} == {1}


def longer(table):
    table.write_text(table.read_text() + "9\t9.mp3\tbye\n")


CHANGES = {
    "a file is added": ("folder", lambda data: (data / "speech" / "a" / "9.flac").touch()),
    "a file is removed": ("folder", lambda data: (data / "speech" / "b" / "1.flac").unlink()),
    "a folder is added": ("folder", lambda data: (data / "speech" / "c" / "d").mkdir(parents=True)),
    "a file deep down": ("librispeech", lambda data: (data / "LibriSpeech" / "train" / "2" / "7" / "9.flac").touch()),
    "what was absent": ("librispeech", lambda data: (data / "LibriSpeech" / "gone" / "5" / "6").mkdir(parents=True)),
    "a better place": ("librispeech", lambda data: (data / "train" / "5" / "6").mkdir(parents=True)),
    "a table changes": ("common_voice", lambda data: longer(data / "cv" / "en" / "train.tsv")),
    "a newer release": ("common_voice", lambda data: (data / "cv" / "cv-corpus-9.0" / "en").mkdir(parents=True)),
    "all is gone": ("folder", lambda data: shutil.rmtree(data / "speech")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_looked_for_again_and_nothing_else(change, find, data):
    before = find()[0]
    kind, make = CHANGES[change]
    make(data)
    found, _, looked = find()
    assert looked == [kind]
    if change in ("a file is added", "a file is removed", "a file deep down", "a table changes", "all is gone"):
        assert found != before


def test_a_folder_that_has_just_changed_is_not_kept(find, data):
    """It may change again within one tick of the clock, and look the same."""
    os.utime(data / "speech" / "a")
    find()
    assert find()[2] == ["folder"]
    age(data)
    find()
    assert find()[2] == []


def test_few_clips_are_not_kept(find, monkeypatch, tmp_path):
    monkeypatch.setattr(clip_cache, "MIN_CLIPS", 7)
    find()
    assert len(find()[2]) == 3 and not (tmp_path / "cache").exists()


def test_other_code_finds_anew(find, monkeypatch):
    find()
    monkeypatch.setattr(clip_cache, "FINDERS", ("sources.py",))
    assert len(find()[2]) == 3


def test_a_damaged_cache_is_made_again_and_former_columns_are_removed(find, tmp_path):
    find()
    for path in (tmp_path / "cache").glob("*/path_data.npy"):
        path.unlink()
    first = find()
    assert len(first[2]) == 3 and find()[2] == []
    assert len(list((tmp_path / "cache").glob("*/"))) == 3


def test_a_folder_that_keeps_nothing_is_said_and_ends_no_start(data):
    config = DataConfig(data_root=str(data), cache="/proc/none", sources=[SourceConfig(kind="folder", path="speech")])
    clips, said = find_clips(config)
    assert len(clips[0]) == 6 and any("data.cache" in line for line in said)


# ---------------------------------------------------------------- as few bytes as that


def test_a_kept_million_takes_no_objects(tmp_path, monkeypatch):
    """From the cache on, no step makes a Clip but those that are asked for."""
    many = [Clip(f"/data/{i % 100}/{i}.flac", f"speaker {i % 100}", 0, "some text") for i in range(5000)]
    clips = Clips.of_list(many)
    clips.parts[0].write(tmp_path / "columns")
    kept = Clips.of(type(clips.parts[0]).read(tmp_path / "columns"), 2)
    made = []
    original = Clips.__getitem__
    monkeypatch.setattr(Clips, "__getitem__", lambda self, index: made.append(index) or original(self, index))
    (train,), chosen = split_validation([kept], ValidationConfig(clips=8))
    config = DataConfig(sources=[SourceConfig(kind="folder")] * 3)
    stream = SampleStream(Clips.join([train]), config, seed=0)
    assert stream.epoch_size == 4992 and len(made) < 50 and train[stream[0]].source == 2
    assert train.parts[0].strings["path"].data.base is not None  # mapped
    expected = split_validation([many], ValidationConfig(clips=8))
    assert [clip.path for clip in chosen] == [clip.path for clip in expected[1]]
    assert [clip.path for clip in train] == [clip.path for clip in expected[0][0]]
