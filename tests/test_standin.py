"""Stand-in checkpoints against the released layout, the codec that loads them, and mistral_common."""

import json
from importlib.resources import files
from math import prod
from pathlib import Path

import pytest
import torch
from conftest import PRESETS
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from voxtral.checkpoint import EMBEDDING_NAME, Checkpoint, SafetensorsFile
from voxtral.codec import VoxtralCodec
from voxtral.errors import UserError
from voxtral.layout import released_layout, withheld_layout
from voxtral.params import load_params, parse_params
from voxtral.standin import full_params, random_tensor, small_params, write_tekken

LAYOUT = json.loads((Path(__file__).parent / "data" / "checkpoint_layout.json").read_text())


def listed(layout):
    return [(name, tuple(shape)) for name, shape in layout.items()]


def test_layout_equals_the_release_in_names_shapes_and_order():
    params = parse_params(full_params())
    layout, withheld = released_layout(params), withheld_layout(params)
    assert len(layout) == 386 and listed(layout) == listed(LAYOUT["released"])
    assert len(withheld) == 114 and listed(withheld) == listed(LAYOUT["withheld_encoder"])
    assert sum(prod(shape) for shape in withheld.values()) == 149_471_524


def test_small_sizes_reach_every_place_that_states_them():
    raw = small_params(backbone={"dim": 32}, codec={"semantic_codebook_size": 40}, acoustic={"n_layers": 1})
    audio = raw["multimodal"]["audio_model_args"]
    assert audio["semantic_codebook_size"] == 40 and audio["acoustic_transformer_args"]["dim"] == 32
    layout = released_layout(parse_params(raw))
    assert layout["acoustic_transformer.llm_projection.weight"] == (32, 32)
    assert "acoustic_transformer.layers.1.ffn_norm.weight" not in layout


def test_file_is_laid_out_as_the_release(released):
    file = SafetensorsFile(released / "consolidated.safetensors")
    layout = released_layout(load_params(released))
    assert [(name, tuple(entry["shape"])) for name, entry in file.entries.items()] == listed(layout)
    assert {entry["dtype"] for entry in file.entries.values()} == {"BF16"} and file.metadata == {"format": "pt"}


def test_codec_loads_and_decodes_audio_of_sensible_level(released):
    codec = VoxtralCodec.from_checkpoint(released)
    assert not codec.has_encoder
    generator = torch.Generator().manual_seed(0)
    codes = torch.cat(
        [torch.randint(64, (2, 1, 20), generator=generator), torch.randint(21, (2, 36, 20), generator=generator)], dim=1
    )
    with torch.no_grad():
        audio = codec.decode(codes)
    assert audio.shape == (2, 1, 20 * 1920)
    assert 0.02 < audio.std().item() < 0.3 and audio.abs().max() < 2


def test_weights_depend_on_seed_and_name_only(released):
    name = "layers.1.attention.wq.weight"
    stored = Checkpoint(released).read([name])[name]
    assert torch.equal(stored, random_tensor(name, stored.shape))
    assert not torch.equal(stored, random_tensor(name, stored.shape, seed=1))
    assert not torch.equal(stored, random_tensor("layers.0.attention.wq.weight", stored.shape))
    assert stored.float().std().item() == pytest.approx(64**-0.5, rel=0.05)


def test_voices_agree_in_all_three_places(released):
    assert load_params(released).codec.voice == {"alpha": 0, "beta": 1}
    assert json.loads((released / "tekken.json").read_text())["audio"]["voice_num_audio_tokens"] == PRESETS
    table = Checkpoint(released).read([EMBEDDING_NAME])[EMBEDDING_NAME].float()
    starts = [66 + 23 * k for k in range(36)]  # 64 entries and 2 special ids, then 21 levels and 2 special ids each
    end = table[1] + table[starts].sum(dim=0)  # semantic END_AUDIO, acoustic ids 0
    for name, n_rows in PRESETS.items():
        voice = torch.load(released / "voice_embedding" / f"{name}.pt")
        assert voice.shape == (n_rows, 64) and voice.dtype == torch.bfloat16
        assert torch.allclose(voice[-1].float(), end, atol=2e-3)
        assert not torch.allclose(voice[-2].float(), end, atol=2e-2)


def test_text_ids_equal_those_of_the_whole_vocabulary(tmp_path):
    write_tekken(tmp_path / "tekken.json", 3000, PRESETS)
    small = Tekkenizer.from_file(tmp_path / "tekken.json")
    shipped = Tekkenizer.from_file(str(files("mistral_common") / "data" / "tekken_240911.json"))
    text = "this is the first of the two"
    ids = small.encode(text, bos=False, eos=False)
    assert ids == shipped.encode(text, bos=False, eos=False)
    assert min(ids) >= 1000 and len(ids) < len(text) / 2 and small.n_words == 4000


@pytest.mark.parametrize("size", [255, 130_073])
def test_a_vocabulary_that_cannot_be_is_refused(tmp_path, size):
    with pytest.raises(UserError, match="n_text_tokens"):
        write_tekken(tmp_path / "tekken.json", size, PRESETS)
    assert not list(tmp_path.iterdir())
