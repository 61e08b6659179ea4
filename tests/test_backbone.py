"""The backbone against numbers that the serving engine's own modules produced, and with a LoRA adapter."""

from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from conftest import relative_error, write_golden
from packaging.requirements import Requirement
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from voxtral import backbone
from voxtral.backbone import Backbone, halves_to_native, native_to_halves, to_native_name, to_transformers_name
from voxtral.checkpoint import TEXT_EMBEDDING_NAME
from voxtral.params import CheckpointError
from voxtral.standin import small_params, write_random_checkpoint

GOLDEN = Path(__file__).parent / "data" / "backbone_small.safetensors"


def sizes(metadata):
    return small_params(backbone=metadata)


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)


@pytest.fixture(name="backbone")
def golden_backbone(tmp_path):
    return Backbone.from_checkpoint(write_golden(tmp_path / "golden", GOLDEN, sizes), dtype=torch.float32)


@torch.no_grad()
def test_every_layer_equals_serving(backbone, golden):
    states = backbone.hidden_states(golden["io.input_embeds"])
    assert len(states) == 3
    for i in range(2):
        assert relative_error(states[i], golden[f"io.layer_output.{i}"]) < 1e-5
    assert relative_error(backbone.model.norm(states[-1]), golden["io.final"]) < 1e-5  # so states[-1] is not normed
    assert relative_error(backbone(golden["io.input_embeds"]), golden["io.final"]) < 1e-5


@torch.no_grad()
def test_hidden_states_leave_no_hook_behind(backbone, golden):
    states = backbone.hidden_states(golden["io.input_embeds"])
    backbone(golden["io.input_embeds"])
    assert len(states) == 3 and not any(layer._forward_hooks for layer in backbone.model.layers)


@torch.no_grad()
def test_padding_on_either_side_changes_nothing(backbone, golden):
    x = golden["io.input_embeds"]
    junk = torch.full((2, 5, x.shape[-1]), 3.0)
    real, none = torch.ones(2, x.shape[1], dtype=torch.long), torch.zeros(2, 5, dtype=torch.long)
    left = backbone(torch.cat([junk, x], dim=1), torch.cat([none, real], dim=1))[:, 5:]
    right = backbone(torch.cat([x, junk], dim=1), torch.cat([real, none], dim=1))[:, :-5]
    assert relative_error(left, golden["io.final"]) < 1e-5 and relative_error(right, golden["io.final"]) < 1e-5


def test_text_embedding_is_a_look_up(backbone, golden):
    ids = torch.tensor([[0, 7, 127]])
    assert torch.equal(backbone.embed_text(ids), golden[TEXT_EMBEDDING_NAME][ids])


def test_permutations_invert_each_other():
    weight = torch.arange(4 * 6 * 5.0).view(24, 5)  # 4 heads of 6 rows
    assert native_to_halves(weight[:, 0], 4, 6)[:6].tolist() == [0, 10, 20, 5, 15, 25]  # even rows, then odd rows
    assert torch.equal(halves_to_native(native_to_halves(weight, 4, 6), 4, 6), weight)
    assert torch.equal(native_to_halves(halves_to_native(weight, 4, 6), 4, 6), weight)


def test_names_map_both_ways(golden):
    assert to_transformers_name("layers.11.attention.wo") == "layers.11.self_attn.o_proj"
    assert to_native_name("layers.2.mlp.down_proj.weight") == "layers.2.feed_forward.w2.weight"
    names = [name for name in golden if not name.startswith("io.")]
    assert len({to_transformers_name(name) for name in names}) == len(names) == 29
    assert [to_native_name(to_transformers_name(name)) for name in names] == names
    for name in ("lm_head.weight", "layers.0.norm", "attention.wq", "acoustic_transformer.layers.0.attention.wq"):
        with pytest.raises(ValueError, match=name):
            to_transformers_name(name)


def test_lora_changes_outputs_and_can_be_written_back_natively(backbone, golden, tmp_path):
    x = golden["io.input_embeds"]
    adapted = get_peft_model(
        backbone.model,
        LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
    )
    states = backbone.hidden_states(x)
    assert relative_error(states[0].detach(), golden["io.layer_output.0"]) > 1e-3
    sum(state.square().mean() for state in states).backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert len(trained) == 3 * 4 * 2 and all("lora_" in name for name in trained)

    def merge(tensors):
        for name, module in adapted.base_model.model.named_modules():
            if hasattr(module, "lora_A"):
                a, b = module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach()
                heads = {"q_proj": 4, "k_proj": 2}.get(name.rpartition(".")[2])
                b = halves_to_native(b, heads, 16) if heads else b
                tensors[to_native_name(name) + ".weight"] += module.scaling["default"] * b @ a

    merged = Backbone.from_checkpoint(write_golden(tmp_path / "merged", GOLDEN, sizes, merge), dtype=torch.float32)
    assert relative_error(merged(x), backbone(x).detach()) < 1e-5


def test_loads_a_whole_checkpoint_in_bf16(tmp_path):
    write_random_checkpoint(tmp_path, small_params(), {"alpha": 3})
    backbone = Backbone.from_checkpoint(tmp_path)
    assert {(p.dtype, p.requires_grad) for p in backbone.parameters()} == {(torch.bfloat16, False)}
    assert backbone.model.rotary_emb.inv_freq.dtype == torch.float32
    assert backbone(backbone.embed_text(torch.arange(20)[None])).isfinite().all()


def test_a_missing_or_misshapen_tensor_is_named(tmp_path):
    name = "layers.1.attention.wq.weight"
    missing = write_golden(tmp_path / "missing", GOLDEN, sizes, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=name):
        Backbone.from_checkpoint(missing)
    misshapen = write_golden(
        tmp_path / "misshapen", GOLDEN, sizes, lambda tensors: tensors.update({"norm.weight": torch.ones(31)})
    )
    with pytest.raises(CheckpointError, match=r"norm.weight has shape \[31\]"):
        Backbone.from_checkpoint(misshapen)


# ---------------------------------------------------------------- versions


def test_a_transformers_that_ignores_theta_is_found_at_load(tmp_path, monkeypatch):
    """As 4.56 did: it does not know rope_parameters, and took 10,000."""

    class Old(backbone.MistralRotaryEmbedding):
        def __init__(self, config):
            config.rope_parameters = {**config.rope_parameters, "rope_theta": 10_000.0}
            super().__init__(config)

    monkeypatch.setattr(backbone, "MistralRotaryEmbedding", Old)
    with pytest.raises(CheckpointError, match="rope_theta 1e[+]06 of params.json: pip install -r requirements.txt"):
        Backbone.from_checkpoint(write_golden(tmp_path / "golden", GOLDEN, sizes))


def test_versions_have_the_lower_bounds_that_were_tried():
    text = (Path(__file__).parents[1] / "requirements.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    bounds = {(one := Requirement(line)).name: one.specifier for line in lines}
    assert not bounds["transformers"].contains("4.57.6") and not bounds["mistral-common"].contains("1.9.1")
    for name, specifier in bounds.items():
        assert specifier.contains(version(name)), name
