"""The presets back to codes: those of the embedded stand-in, and made-up ones whose codes are known."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from voxtral import presets
from voxtral.checkpoint import EMBEDDING_NAME, Checkpoint
from voxtral.codec import VoxtralCodec
from voxtral.known_codes import MatchConfig
from voxtral.presets import codes_to_match, preset_codes, recover
from voxtral.sources import DataError
from voxtral.standin import small_params, write_random_checkpoint
from voxtral.voices import load_pt, register

STANDIN = Path(__file__).parents[1] / "assets" / "standin"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Two presets of random codes; the table's rows have room, and are no more than 320 numbers all the same."""
    folder = tmp_path_factory.mktemp("presets")
    write_random_checkpoint(folder, small_params(backbone={"dim": 320}), {"alpha": 9, "beta": 2})
    return folder


@pytest.fixture(scope="module")
def codec(checkpoint):
    return VoxtralCodec.from_checkpoint(checkpoint)


def random_codes(codec, n_frames, seed=0):
    generator = torch.Generator().manual_seed(seed)
    semantic = torch.randint(codec.params.semantic_codebook_size, (1, n_frames), generator=generator)
    shape = (codec.params.acoustic_dim, n_frames)
    return torch.cat([semantic, torch.randint(codec.params.acoustic_codebook_size, shape, generator=generator)])


def test_every_frame_of_the_standins_presets_comes_back():
    found = preset_codes(VoxtralCodec.from_checkpoint(STANDIN), STANDIN)
    assert [(name, preset.codes.shape[1]) for name, preset in found.items()] == [
        ("casual_female", 45),
        ("casual_male", 42),
        ("cheerful_female", 43),
        ("neutral_male", 45),
        ("neutral_female", 37),
        ("deep_male", 41),
    ]
    table = Checkpoint(STANDIN).read([EMBEDDING_NAME])[EMBEDDING_NAME].double()
    for name, preset in found.items():
        assert preset.exact.all() and preset.errors.max() < 0.0025 and not preset.problem
        starts = torch.tensor([2] + [1026 + 23 * k + 2 for k in range(36)])  # spec section 4, counted here once more
        rows = table[preset.codes + starts[:, None]].sum(dim=0).bfloat16()
        assert torch.equal(rows, load_pt(STANDIN / "voice_embedding" / f"{name}.pt")[:-1])


def test_the_codes_are_those_that_made_the_rows(codec):
    codes = random_codes(codec, 12)
    found = recover(codec, codec.embed_codes(codes[None])[0].bfloat16())
    assert found.exact.all() and torch.equal(found.codes, codes)


def test_what_a_narrow_search_does_not_find_a_wide_one_does(codec, monkeypatch):
    rows = codec.embed_codes(random_codes(codec, 40, seed=1)[None])[0].bfloat16()
    monkeypatch.setattr(presets, "WIDTHS", (1,))
    narrow = recover(codec, rows).exact.sum()
    monkeypatch.setattr(presets, "WIDTHS", (1, 16))
    assert narrow < recover(codec, rows).exact.sum() == 40


def test_a_sum_that_was_rounded_more_often_still_comes_back(codec):
    codes = random_codes(codec, 8, seed=2)
    rows = codec.embed_codes(codes[None])[0]
    rough = rows * (1 + 0.003 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)))
    found = recover(codec, rough.bfloat16())
    assert not found.exact.any() and not found.problem and torch.equal(found.codes, codes)


def test_rows_that_are_no_sums_are_told(codec):
    rows = codec.embed_codes(random_codes(codec, 5)[None])[0]
    direction = torch.randn(320, generator=torch.Generator().manual_seed(0))
    rows[2] += 0.05 * rows[2].norm() * direction / direction.norm()
    found = recover(codec, rows.bfloat16())
    assert found.exact.tolist() == [True, True, False, True, True]
    assert found.problem == "1 of its 5 frames are no sum of table rows"


def test_match_takes_the_presets_by_default(checkpoint, codec):
    codes, bad = codes_to_match(MatchConfig().codes, codec, checkpoint)
    assert [tuple(each.shape) for each in codes] == [(37, 8)] and not bad  # beta's one frame has none that follows it


def test_registered_and_broken_voices_are_no_presets(checkpoint, codec, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    voice = load_pt(folder / "voice_embedding" / "alpha.pt")
    register(folder, "anna", voice, "anna.wav")
    (folder / "voice_embedding" / "beta.pt").unlink()
    assert list(preset_codes(codec, folder)) == ["alpha"]
    torch.save(torch.randn(voice.shape).bfloat16(), folder / "voice_embedding" / "alpha.pt")
    said = r"match\.codes: no preset of .*preset alpha: 8 of its 8 frames.*generate_clips\.py"
    with pytest.raises(DataError, match=said):
        codes_to_match("presets", codec, folder)
    for name in ("alpha", "anna"):
        (folder / "voice_embedding" / f"{name}.pt").unlink()
    with pytest.raises(DataError, match="it has none of two frames or more"):
        codes_to_match("presets", codec, folder)


def test_a_broken_preset_is_listed_beside_good_ones(checkpoint, codec, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    torch.save(torch.randn(2, 320).bfloat16(), folder / "voice_embedding" / "beta.pt")
    codes, bad = codes_to_match("presets", codec, folder)
    assert len(codes) == 1 and bad == [("preset beta", "1 of its 1 frames are no sum of table rows")]


def test_command_writes_codes_that_match_reads(checkpoint, codec, tmp_path, capsys):
    presets.main(["--checkpoint", str(checkpoint), "--output", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "alpha" in shown and "beta" in shown and "ok" in shown
    (codes,), _ = codes_to_match(str(tmp_path), codec, checkpoint)
    assert torch.equal(codes, preset_codes(codec, checkpoint)["alpha"].codes)
    assert np.load(tmp_path / "beta.npy").shape == (37, 1)
