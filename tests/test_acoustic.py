"""The acoustic transformer against numbers that the serving engine's own module produced."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import relative_error, write_golden
from safetensors.torch import load_file

from voxtral.acoustic import AcousticTransformer
from voxtral.layout import released_layout
from voxtral.params import CheckpointError, parse_params
from voxtral.standin import full_params, small_params

GOLDEN = Path(__file__).parent / "data" / "acoustic_small.safetensors"


def sizes(metadata):
    args = metadata["multimodal.audio_model_args"]
    acoustic, codec = args["acoustic_transformer_args"], {"semantic_codebook_size": args["semantic_codebook_size"]}
    return small_params({"dim": acoustic["dim"]}, acoustic, codec)


@pytest.fixture(scope="module")
def golden():
    return {name.removeprefix("io."): tensor for name, tensor in load_file(GOLDEN).items() if name.startswith("io.")}


@pytest.fixture
def acoustic(tmp_path):
    return AcousticTransformer.from_checkpoint(write_golden(tmp_path / "golden", GOLDEN, sizes), dtype=torch.float32)


def test_velocity_equals_serving(acoustic, golden):
    velocity = acoustic.velocity(golden["x_t"], golden["t"], golden["hidden"])
    assert relative_error(velocity, golden["velocity"]) < 1e-5
    flat = acoustic.velocity(golden["x_t"], golden["t"][:, 0], golden["hidden"])
    assert torch.equal(flat, velocity)


def test_frame_equals_serving(acoustic, golden):
    assert relative_error(acoustic.semantic_codebook_output(golden["hidden"]), golden["semantic_logits"]) < 1e-5
    ids = acoustic.frame(golden["hidden"], golden["x_0"])
    assert ids.dtype == torch.int64 and torch.equal(ids, golden["codes"].long())


@pytest.mark.parametrize("n_steps", [1, 4])
def test_steps_are_guided_euler_steps_as_many_as_params_say(acoustic, golden, n_steps):
    acoustic.params = replace(acoustic.params, acoustic=replace(acoustic.params.acoustic, n_decoding_steps=n_steps))
    x, hidden = golden["x_0"], golden["hidden"]
    for step in range(n_steps):
        t = torch.full((len(x),), step / n_steps)
        x = x + (2 * acoustic.velocity(x, t, hidden) - acoustic.velocity(x, t, torch.zeros_like(hidden))) / n_steps
    ids = acoustic.frame(hidden, golden["x_0"], cfg_alpha=2.0)
    assert torch.equal(ids[:, 1:], ((x.clamp(-1, 1) + 1) * 10).round().long() + 2)
    assert not torch.equal(ids, acoustic.frame(hidden, golden["x_0"]))


def test_seven_steps_where_params_are_silent():
    raw = full_params()
    assert "n_decoding_steps" not in raw["multimodal"]["audio_model_args"]["acoustic_transformer_args"]
    assert parse_params(raw).acoustic.n_decoding_steps == 7


def test_end_audio_is_allowed_but_neither_empty_audio_nor_padding(acoustic, golden):
    hidden = golden["hidden"]
    head = acoustic.semantic_codebook_output.weight
    head[1] = hidden[2] / hidden[2].norm() * 100
    ids = acoustic.frame(hidden, golden["x_0"])
    assert ids[2].tolist() == [1] + [2] * 36
    head[0], head[42:] = head[1] * 2, head[1] * 3
    assert torch.equal(acoustic.frame(hidden, golden["x_0"]), ids)
    assert (ids[:, 0] != 1).any() and (ids[ids[:, 0] != 1, 1:] != 2).any()


def test_items_of_a_batch_do_not_see_each_other(acoustic, golden):
    together = acoustic.frame(golden["hidden"], golden["x_0"])
    alone = [acoustic.frame(golden["hidden"][i : i + 1], golden["x_0"][i : i + 1]) for i in range(5)]
    assert torch.equal(torch.cat(alone), together)


def test_names_are_the_checkpoints():
    params = parse_params(full_params())
    with torch.device("meta"):
        model = AcousticTransformer(params)
    prefix = "acoustic_transformer."
    assert {prefix + name: tuple(t.shape) for name, t in model.state_dict().items()} == {
        name: shape for name, shape in released_layout(params).items() if name.startswith(prefix)
    }


def test_a_missing_or_misshapen_tensor_is_named(tmp_path):
    name = "acoustic_transformer.layers.1.attention.wk.weight"
    missing = write_golden(tmp_path / "missing", GOLDEN, sizes, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=name):
        AcousticTransformer.from_checkpoint(missing)
    wrong = write_golden(
        tmp_path / "wrong", GOLDEN, sizes, lambda t: t.update({"acoustic_transformer.norm.weight": torch.ones(31)})
    )
    with pytest.raises(CheckpointError, match=r"norm.weight has shape \[31\]"):
        AcousticTransformer.from_checkpoint(wrong)


def test_loads_in_the_dtype_asked_for_and_frozen(tmp_path, golden):
    acoustic = AcousticTransformer.from_checkpoint(write_golden(tmp_path / "golden", GOLDEN, sizes))
    assert {(p.dtype, p.requires_grad) for p in acoustic.parameters()} == {(torch.bfloat16, False)}
    ids = acoustic.frame(golden["hidden"].bfloat16(), golden["x_0"])
    assert (ids == golden["codes"]).float().mean() > 0.8  # rounding moves some levels by one
