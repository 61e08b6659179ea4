"""What Whisper said, kept on disk: the same targets, at fixed places, and no Whisper from the second epoch on."""

import numpy as np
import pytest
import soundfile
import torch

from voxtral.asr import AsrConfig, AsrTargets, WhisperTeacher
from voxtral.asr_cache import AsrCache, SegmentDataset
from voxtral.data import load_segment
from voxtral.errors import UserError
from voxtral.sources import Clip

CONFIG = {"language": "en", "context_sec": 1.26}


@pytest.fixture(scope="module")
def teacher(whisper_checkpoint):
    return WhisperTeacher(AsrConfig(model=whisper_checkpoint, **CONFIG), 0.5, "cpu")


@pytest.fixture
def cache(teacher, tmp_path):
    return AsrCache(tmp_path / "kept", teacher, AsrConfig(**CONFIG), 0.5)


def clip(folder, seconds, rate=16000, name="a.wav"):
    path = folder / name
    soundfile.write(path, np.linspace(-0.4, 0.4, round(seconds * rate)), rate, "FLOAT")
    return str(path)


@pytest.mark.parametrize("seconds, starts", [(1.25, [0, 0.5, 0.75]), (1.0, [0, 0.5]), (0.3, [0]), (0.5, [0])])
def test_segments_cover_a_clip(cache, tmp_path, seconds, starts):
    """The samples rise from -0.4 to 0.4, so their values tell where a segment begins."""
    path = clip(tmp_path, seconds)
    segments = [cache.segment(path, draw) for draw in np.linspace(0, 0.999, 40)]
    assert len(set(segments)) == len(starts)
    begins = [
        (load_segment(path, position, 0.5)[0][3000] + 0.4) / 0.8 * seconds - 3000 / 24000
        for position, _ in dict.fromkeys(segments)
    ]
    assert begins == pytest.approx(starts, abs=2e-3)


def test_what_is_written_is_read_and_damaged_files_are_not(cache, tmp_path):
    random = torch.Generator().manual_seed(0)
    n_text = torch.tensor([2, 0, 4])
    mask = torch.arange(cache.max_tokens) < n_text[:, None]
    targets = AsrTargets(
        torch.randn(3, cache.max_tokens, cache.width, generator=random) * mask[..., None],
        torch.rand(3, cache.max_tokens, 7, generator=random) * mask[..., None],
        mask,
    )
    files = [cache.segment(clip(tmp_path, 0.5, name=f"{i}.wav"), 0)[1] for i in range(3)]
    assert cache.targets([cache.read(file) for file in files]) is None
    cache.write(files, targets)
    kept = cache.targets([cache.read(file) for file in files])
    assert all(torch.equal(a, b) for a, b in zip(vars(kept).values(), vars(targets).values(), strict=True))
    files[1].write_bytes(files[1].read_bytes()[:100])
    assert cache.targets([cache.read(file) for file in files]) is None


def test_a_file_that_changed_has_another_place(cache, tmp_path):
    files = {cache.segment(clip(tmp_path, seconds), 0)[1] for seconds in (0.5, 0.6)}
    assert len(files) == 2


def test_a_cache_of_other_settings_is_refused(cache, teacher):
    AsrCache(cache.folder, teacher, AsrConfig(**CONFIG), 0.5)
    with pytest.raises(UserError, match="max_sec 0.5 against 0.4"):
        AsrCache(cache.folder, teacher, AsrConfig(**CONFIG), 0.4)


def test_batches_hold_targets_when_all_are_known(cache, tmp_path, teacher):
    clips = [Clip(clip(tmp_path, 0.5, name=f"{i}.wav"), "anna", 0) for i in range(2)]
    dataset = SegmentDataset(clips, 0, cache)
    batch = cache.collate([dataset[0, 0], dataset[1, 1]])
    assert batch.targets is None and batch.waveform.shape == (2, 1, 12000)
    fresh = teacher(batch.waveform, batch.lengths, 7)
    cache.write(batch.files, fresh)
    again = cache.collate([dataset[5, 0], dataset[9, 1]]).to("cpu", non_blocking=True)
    assert again.to("meta").targets.hidden.is_meta
    n = fresh.mask.sum(1).max()
    assert torch.equal(again.targets.mask[:, :n], fresh.mask[:, :n]) and not again.targets.mask[:, n:].any()
    for name in ("hidden", "alignment"):
        wanted = getattr(fresh, name)[:, :n] * fresh.mask[:, :n, None]
        assert torch.equal(getattr(again.targets, name)[:, :n], wanted)


def test_a_folder_that_is_not_audio_is_a_bad_clip(cache, tmp_path):
    (tmp_path / "b.wav").write_bytes(b"no audio")
    clips = [Clip(str(tmp_path / "b.wav"), "anna", 0), Clip(clip(tmp_path, 0.5), "anna", 0)]
    item = SegmentDataset(clips, 0, cache)[0, 0]
    assert item["bad"][0][0].endswith("b.wav") and item["length"] == 12000
