"""research/clone_needs.py: known errors of codes are what their names say, and a tiny run measures them."""

import json
import shutil

import pytest
import torch
from conftest import SPEECH, command_line

from voxtral.checkpoint import save_tensors
from voxtral.codec import VoxtralCodec
from voxtral.params import CodecParams
from voxtral.standin import small_params, write_random_checkpoint

PARAMS = CodecParams(semantic_codebook_size=64)


@pytest.fixture(scope="module")
def benchmark(import_script):
    return import_script("clone_needs")


@pytest.fixture
def codes():
    generator = torch.Generator().manual_seed(1)  # not the seed of the errors
    return torch.cat(
        [torch.randint(64, (1, 1, 400), generator=generator), torch.randint(5, 16, (1, 36, 400), generator=generator)],
        dim=1,
    )


@pytest.mark.parametrize("name, off", [("levels off by one, at random", 1), ("off by two", 2), ("off by four", 4)])
def test_random_errors_are_as_large_as_they_say_and_have_no_direction(benchmark, codes, name, off):
    before = codes.clone()
    error = benchmark.errors_of_codes(PARAMS, 0)[name](codes)[:, 1:] - codes[:, 1:]
    assert torch.equal(codes, before) and (error.abs() == off).all()
    assert error.float().mean(dim=2).abs().max() < 0.3 * off


@pytest.mark.parametrize("name, off", [("each channel off by one, always the same way", 1), ("off by two, so", 2)])
def test_a_bias_is_the_same_in_every_frame_and_clip(benchmark, codes, name, off):
    change = benchmark.errors_of_codes(PARAMS, 0)[name]
    error = change(codes)[:, 1:] - codes[:, 1:]
    assert (error == error[..., :1]).all() and (error.abs() == off).all() and 0 < (error > 0).float().mean() < 1
    assert torch.equal(change(codes[..., :7])[:, 1:] - codes[:, 1:, :7], error[..., :7])


def test_random_semantic_codes_leave_the_levels_and_random_codes_leave_nothing(benchmark, codes):
    errors = benchmark.errors_of_codes(PARAMS, 0)
    semantic, everything = errors["semantic codes random"](codes), errors["all codes random"](codes)
    assert torch.equal(semantic[:, 1:], codes[:, 1:]) and (semantic[:, 0] == codes[:, 0]).float().mean() < 0.1
    assert (everything[:, 1:] == codes[:, 1:]).float().mean() < 0.1 and everything[:, 1:].max() == 20


def test_correlation_is_pearsons_by_channel(benchmark):
    a = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [5.0, 5.0, 5.0], [1.0, -1.0, 0.0]])
    b = torch.tensor([[2.0, 4.0, 6.0], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [1.0, 1.0, -2.0]])
    assert benchmark.correlation(a, b) == pytest.approx((1 - 1 + 0 + 0) / 4, abs=1e-6)


def test_encoders_of_a_run_and_errors_are_measured(benchmark, tmp_path, speaker_checkpoint):
    folder = tmp_path / "checkpoint"
    write_random_checkpoint(folder, small_params(), {"alpha": 5})
    torch.manual_seed(0)
    true, other = tmp_path / "true.safetensors", tmp_path / "run/checkpoints/step_00000100/encoder.safetensors"
    for path in (true, other):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(path, VoxtralCodec.from_checkpoint(folder).encoder_tensors())
    for name in ("k_af_heart_0", "k_am_adam_0"):
        shutil.copy(SPEECH / f"{name}.opus", tmp_path)
    (tmp_path / "speech.csv").write_text("path,speaker,text\nk_af_heart_0.opus,anna,one\nk_am_adam_0.opus,ben,two\n")
    measured = {"encoder": [f"run={tmp_path / 'run'}", "none=untrained"], "errors": True}
    heard = {"data": tmp_path / "speech.csv", "speakers": "anna,ben", "per_voice": 1, "max_sec": 0.4}
    places = {"speaker_model": speaker_checkpoint, "device": "cpu", "output": tmp_path / "out"}
    benchmark.main(command_line(checkpoint=folder, true=true, **measured, **heard, **places))
    rows = {row["system"]: row for row in json.loads((tmp_path / "out" / "rows.json").read_text())}
    assert list(rows)[:3] == ["true", "run_100", "none"] and len(rows) == 10
    assert rows["true"]["levels_within_1"] == rows["true"]["semantic_equal"] == 1 and rows["true"]["kept"]["value"] == 1
    assert rows["semantic codes random"]["levels_within_1"] == 1 > rows["semantic codes random"]["semantic_equal"] + 0.5
    assert rows["off by four"]["levels_within_1"] < 0.1 < rows["levels off by one, at random"]["levels_within_1"] == 1
    low, high = rows["none"]["intervals"]["levels_equal"]
    assert low <= rows["none"]["levels_equal"] <= high and rows["true"]["intervals"]["levels_equal"] == [1, 1]
    assert rows["off by four"]["mel_distance"] != rows["true"]["mel_distance"]
    assert (tmp_path / "out" / "clone_needs.png").stat().st_size > 1000
    assert "| run_100 |" in (tmp_path / "out" / "table.md").read_text()
