"""The codec against the serving engine's numbers, and what follows from causality, masking and its cost."""

import json
import re
import shutil
import subprocess
import sys
from copy import deepcopy
from math import prod
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, relative_error
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from voxtral import layers
from voxtral.checkpoint import (
    CODEC_PREFIX,
    EMBEDDING_NAME,
    ENCODER_PREFIXES,
    Checkpoint,
    SafetensorsFile,
    StoredTensor,
    write_stored,
)
from voxtral.codec import VoxtralCodec, ceil_div
from voxtral.layers import Transformer, WindowAttention, conv1d_product, conv_transpose1d_product
from voxtral.layout import released_layout, withheld_layout
from voxtral.params import CheckpointError, CodecParams
from voxtral.standin import small_params

DATA = Path(__file__).parent / "data"
ASSETS = ROOT / "assets"
GOLDEN = load_file(DATA / "codec_small.safetensors")
LAYOUT = json.loads((DATA / "checkpoint_layout.json").read_text())
CASES = range(5)


def golden_params_json():
    """params.json of the reference numbers: their sizes, the rest as in a stand-in."""
    with safe_open(DATA / "codec_small.safetensors", framework="pt") as file:
        metadata = file.metadata()
    raw = small_params(backbone={"dim": int(metadata["dim"])})
    raw["multimodal"] |= {
        key.removeprefix("multimodal."): json.loads(value)
        for key, value in metadata.items()
        if key.startswith("multimodal.")
    }
    return raw


def write_folder(folder, tensors, raw):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "consolidated.safetensors")
    (folder / "params.json").write_text(json.dumps(raw))
    return folder


@pytest.fixture(scope="module")
def golden_folder(tmp_path_factory):
    weights = {name: t for name, t in GOLDEN.items() if not name.startswith("io.")}
    return write_folder(tmp_path_factory.mktemp("golden"), weights, golden_params_json())


@pytest.fixture(scope="module")
def codec(golden_folder):
    return VoxtralCodec.from_checkpoint(golden_folder).requires_grad_(False)


def noise(*shape, seed=0):
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def first_difference(a, b, tolerance=1e-5):
    """The first position of the last axis at which a and b [..., T] differ; T if they are equal."""
    unequal = ((a - b).abs() > tolerance * b.abs().max()).flatten(0, -2).any(dim=0)
    return int(unequal.float().argmax()) if unequal.any() else unequal.numel()


# ---------------------------------------------------------------- reference numbers


@pytest.mark.parametrize("case", CASES)
def test_equals_the_serving_engine(codec, case):
    io = {name.removeprefix(f"io.{case}."): t for name, t in GOLDEN.items() if name.startswith(f"io.{case}.")}
    assert codec.has_encoder
    assert relative_error(codec.encode_latent(io["waveform"]), io["latent"]) < 1e-5
    codes = codec.quantizer.encode(codec.encode_latent(io["waveform"]))
    assert torch.equal(codes, io["codes"].long())
    assert relative_error(codec.decode(codes), io["reconstruction"]) < 1e-5
    rows = codec.voice_rows(codes)
    assert relative_error(rows[0], io["voice_embedding"]) < 1e-5


# ---------------------------------------------------------------- batches and padding


def test_items_of_a_batch_are_independent(codec):
    batch = noise(3, 1, 9000)
    latent, audio = codec.encode_latent(batch), codec.decode(codec.encode(batch))
    for i in range(3):
        assert relative_error(latent[i : i + 1], codec.encode_latent(batch[i : i + 1])) < 1e-5
        assert relative_error(audio[i : i + 1], codec.decode(codec.encode(batch[i : i + 1]))) < 1e-5
    changed = batch.clone()
    changed[1] = noise(1, 9000, seed=9)
    assert torch.equal(codec.encode_latent(changed)[[0, 2]], latent[[0, 2]])


def test_with_lengths_each_clip_is_encoded_as_if_alone(codec):
    lengths = torch.tensor([1, 100, 239, 240, 241, 480, 961, 1500, 1919, 1920, 1921, 3000, 3841, 5760, 9111, 9600])
    batch = noise(len(lengths), 1, 9600)  # what lies beyond each length is noise too
    latent, codes = codec.encode_latent(batch, lengths), codec.encode(batch, lengths)
    assert latent.shape[-1] == 5
    for i, n in enumerate(lengths.tolist()):
        alone, frames = codec.encode_latent(batch[i : i + 1, :, :n]), ceil_div(n, 1920)
        assert alone.shape[-1] == frames
        assert relative_error(latent[i : i + 1, :, :frames], alone) < 1e-5, n
        assert torch.equal(codes[i : i + 1, :, :frames], codec.encode(batch[i : i + 1, :, :n])), n


# ---------------------------------------------------------------- causality

LONG = 5 * 1920 + 777
CUTS = [7 * 240, 1920, 2000, 2160, 2400, 2640, 3360, 3840, 4000, 5759, 5760, 5761, 7000, 7680, 9600, 10000]


@pytest.mark.parametrize("cut", CUTS)
def test_encoder_is_causal_but_for_the_last_partial_window(codec, cut):
    """Cutting the signal leaves every latent frame whose 1920 samples are all there as it was.

    The reflecting input convolution looks at patches 1 to 6, so nothing is claimed of a shorter beginning. The one
    frame whose window is not full is padded on the right, and that one does change.
    """
    waveform = noise(1, 1, LONG)
    whole, part = codec.encode_latent(waveform), codec.encode_latent(waveform[..., :cut])
    complete = cut // 1920
    assert relative_error(part[..., :complete], whole[..., :complete]) < 1e-5 or complete == 0
    assert part.shape[-1] == ceil_div(cut, 1920)
    if cut % 1920:
        assert first_difference(part, whole[..., : part.shape[-1]]) == complete


@pytest.mark.parametrize("patch", range(8))
def test_first_patches_look_ahead_by_the_reflection_only(codec, patch):
    """Patch t of the input convolution sees t - 6 to t, of which -1 to -6 are patches 1 to 6 mirrored."""
    patches = noise(1, 240, 12)
    sensitive = []
    for changed in range(12):
        other = patches.clone()
        other[..., changed] += 1
        if not torch.equal(codec.input_proj(other)[..., patch], codec.input_proj(patches)[..., patch]):
            sensitive.append(changed)
    assert sensitive == sorted({abs(i) for i in range(patch - 6, patch + 1)})


def test_reflection_reaches_the_first_frame_of_a_short_clip(codec):
    """Six patches are what a clip needs for its first patch to be final; with fewer, zeros are reflected."""
    patches = noise(1, 240, 12)
    whole = codec.input_proj(patches)
    for n in range(1, 12):
        difference = first_difference(codec.input_proj(patches[..., :n]), whole[..., :n])
        assert difference == (n if n >= 7 else 0), n


@pytest.mark.parametrize("n_frames", range(1, 9))
def test_decoder_is_causal_by_truncation(codec, n_frames):
    """Frames decode to the same samples whatever follows. Only the reflecting output convolution looks ahead: its
    patches 0 to 5 mirror patches 1 to 6, all of them inside the first frame's eight."""
    latent = codec.quantizer.decode(codec.encode(noise(1, 1, 9 * 1920)))
    whole, part = codec.decode_latent(latent), codec.decode_latent(latent[..., :n_frames])
    assert part.shape[-1] == n_frames * 1920
    assert relative_error(part, whole[..., : n_frames * 1920]) < 1e-5
    changed = latent.clone()
    changed[..., n_frames:] += 1
    assert first_difference(codec.decode_latent(changed), whole) // 1920 == n_frames


# ---------------------------------------------------------------- attention


def dense_attention(module, x):
    """Every score of [T, T], masked: what the windows must equal."""
    time, heads = x.shape[1], module.n_heads
    query, key, value = module.q_norm(module.wq(x)), module.k_norm(module.wk(x)), module.wv(x)
    query, key, value = (t.unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for t in (query, key, value))
    key, value = (t[:, [h * module.n_kv_heads // heads for h in range(heads)]] for t in (key, value))
    i, j = torch.arange(time)[:, None], torch.arange(time)[None]
    scores = query @ key.transpose(-1, -2) / module.head_dim**0.5 + SLOPES[heads][:, None, None] * (j - i)
    scores = scores.masked_fill((j > i) | (j < i - module.window), -torch.inf)
    return module.wo((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))


SLOPES = {
    1: torch.tensor([1.0]),
    2: torch.tensor([1, 2**-4]),
    4: torch.tensor([1, 2**-2, 2**-4, 2**-6]),
    6: torch.tensor([1, 2**-2, 2**-4, 2**-6, 1, 2**-2]),
    8: torch.tensor([2.0**-h for h in range(8)]),
}


@pytest.mark.parametrize("n_heads, n_kv_heads", [(4, 4), (4, 2), (6, 6), (6, 2), (8, 1)])
@pytest.mark.parametrize("window", [2, 4, 8, 16, 20])
def test_window_attention_equals_a_dense_reference(n_heads, n_kv_heads, window):
    torch.manual_seed(0)
    module = WindowAttention(CodecParams(dim=12, head_dim=6, n_heads=n_heads, n_kv_heads=n_kv_heads), window)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.5)
        for time in (1, window, window + 1, 16, 17, 61):
            x = noise(2, time, 12, seed=time)
            assert relative_error(module(x), dense_attention(module, x)) < 1e-5


@pytest.mark.parametrize("piece", [1, 7, 16, 40])
def test_pieces_of_a_long_clip_give_what_the_whole_gives(codec, monkeypatch, piece):
    codec = deepcopy(codec).requires_grad_(True)  # with gradients, everything goes through at once
    waveform = noise(2, 1, 11 * 1920 + 5)
    whole = codec.encode_latent(waveform)
    audio = codec.decode_latent(whole.detach())
    monkeypatch.setattr(Transformer, "PIECE", piece)
    with torch.no_grad():
        assert relative_error(codec.encode_latent(waveform), whole) < 1e-5
        assert relative_error(codec.decode_latent(whole), audio) < 1e-5


LONG_CLIP = """
import resource, sys, torch
from voxtral.codec import VoxtralCodec
from voxtral.params import CodecParams
torch.manual_seed(0)
codec = VoxtralCodec(CodecParams(dim=256, hidden_dim=1024, head_dim=32, n_heads=8, n_kv_heads=8)).eval()
with torch.inference_mode():
    codes = codec.encode(torch.rand(1, 1, 600 * 24000) - 0.5)
print(codes.shape[-1], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts KiB on Linux only")
def test_ten_minutes_encode_within_4_gb():
    """At a quarter of the full width, whose peak is 3.3 GB (1.1 here). One [T, T] tensor of scores would take 115 GB,
    the hidden states of the whole clip in one piece 0.7 more."""
    result = subprocess.run([sys.executable, "-c", LONG_CLIP], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    n_frames, peak_bytes = map(int, result.stdout.split())
    assert n_frames == 7500 and peak_bytes < 1.4e9


# ---------------------------------------------------------------- the full size


def test_full_size_has_the_tensors_of_the_checkpoint():
    with torch.device("meta"):
        codec = VoxtralCodec(CodecParams())
    shapes = {CODEC_PREFIX + name: list(t.shape) for name, t in codec.state_dict().items()}
    encoder = {name: shape for name, shape in shapes.items() if name.startswith(ENCODER_PREFIXES)}
    rest = {name: shape for name, shape in shapes.items() if name not in encoder}
    assert encoder == LAYOUT["withheld_encoder"] and len(encoder) == 114
    assert rest == {name: shape for name, shape in LAYOUT["released"].items() if name.startswith(CODEC_PREFIX)}
    assert sum(prod(shape) for shape in encoder.values()) == 149_471_524
    assert sum(p.numel() for p in codec.encoder_parameters()) == 149_471_524
    assert set(codec.encoder_tensors()) == set(encoder)


# ---------------------------------------------------------------- checkpoint folders


def test_without_encoder_tensors_the_encoder_is_fresh(released):
    codec = VoxtralCodec.from_checkpoint(released)
    assert not codec.has_encoder
    scales = [t for name, t in codec.encoder_tensors().items() if name.endswith(("attention_scale", "ffn_scale"))]
    assert len(scales) == 16 and all((t == 0.01).all() for t in scales)
    norms = [t for name, t in codec.encoder_tensors().items() if name.endswith("norm.weight")]
    assert len(norms) == 32 and all((t == 1).all() for t in norms)
    stored = Checkpoint(released).read([CODEC_PREFIX + "output_proj.conv.parametrizations.weight.original1"])
    assert torch.equal(codec.output_proj.conv.parametrizations.weight.original1, *(t.float() for t in stored.values()))
    assert codec.encode(noise(1, 1, 4000)).shape == (1, 37, 3)


@pytest.mark.parametrize("kernel, stride", [(4, 2), (3, 1), (7, 1), (3, 2), (2, 2), (7, 3)])
def test_matrix_products_are_the_convolutions(kernel, stride):
    x, down, up = torch.randn(2, 8, 11), torch.randn(6, 8, kernel), torch.randn(8, 6, kernel)
    torch.testing.assert_close(conv1d_product(x, down, stride), F.conv1d(x, down, stride=stride))
    expected = F.conv_transpose1d(x, up, stride=stride)[..., : 11 * stride]
    torch.testing.assert_close(conv_transpose1d_product(x, up, stride), expected)


def test_training_by_matrix_products_equals_serving(codec, monkeypatch):
    """As on a GPU, in all ten convolutions."""
    waveform, heard, asked = torch.randn(2, 1, 9 * 1920 + 700), [], []
    for on_gpu in (False, True):
        monkeypatch.setattr(layers, "trains_on_gpu", lambda x: asked.append(on_gpu) or on_gpu)
        latent = codec.encode_latent(waveform)
        heard.append((latent, codec.decode_latent(latent)))
    assert asked == 10 * [False] + 10 * [True]
    for a, b in zip(*heard, strict=True):
        assert (a - b).norm() < 1e-5 * a.norm()


def test_encoder_tensors_go_in_and_out_under_their_full_names(golden_folder, released):
    stored = {name: t for name, t in GOLDEN.items() if name.startswith(ENCODER_PREFIXES)}
    without = VoxtralCodec.from_checkpoint(golden_folder)
    for parameter in without.encoder_parameters():
        torch.nn.init.zeros_(parameter)
    without.load_encoder(stored)
    assert without.encoder_tensors().keys() == stored.keys()
    assert all(torch.equal(t, stored[name]) for name, t in without.encoder_tensors().items())
    with pytest.raises(CheckpointError, match="here.safetensors lacks the tensor audio_tokenizer.input_proj"):
        without.load_encoder({}, where="here.safetensors")
    other = VoxtralCodec.from_checkpoint(released)
    with pytest.raises(CheckpointError, match=r"has shape \[32"):
        other.load_encoder(stored)


def shard(folder, target, n_shards):
    """A copy of a checkpoint folder in shards, tensors dealt out in turn."""
    target.mkdir()
    (target / "params.json").write_bytes((folder / "params.json").read_bytes())
    names = list(SafetensorsFile(folder / "consolidated.safetensors").entries)
    tensors = load_file(folder / "consolidated.safetensors")
    for i in range(n_shards):
        mine = {name: tensors[name] for name in names[i::n_shards]}
        save_file(mine, target / f"consolidated-{i + 1:05d}-of-{n_shards:05d}.safetensors")
    return target


def test_a_file_is_read_whole_or_by_name(golden_folder):
    file = SafetensorsFile(golden_folder / "consolidated.safetensors")
    some = list(file.entries)[:2]
    assert list(file.read()) == list(file.entries) and list(file.read(some)) == some and file.read([]) == {}


def test_sharded_folder_gives_the_same_codec(golden_folder, codec, tmp_path):
    sharded = VoxtralCodec.from_checkpoint(shard(golden_folder, tmp_path / "sharded", 3))
    assert sharded.has_encoder and torch.equal(sharded.audio_embedding, codec.audio_embedding)
    assert all(torch.equal(t, sharded.state_dict()[name]) for name, t in codec.state_dict().items())


def test_only_the_codec_and_the_embedding_table_are_read(released, monkeypatch):
    read = []
    original = SafetensorsFile.read
    monkeypatch.setattr(
        SafetensorsFile, "read", lambda self, names: original(self, read.append(list(names)) or read[-1])
    )
    VoxtralCodec.from_checkpoint(released)
    assert {name for names in read for name in names} == {
        name for name in Checkpoint(released).shapes if name.startswith(CODEC_PREFIX) or name == EMBEDDING_NAME
    }


def remove_tensor(folder, name, replacement=None):
    tensors = load_file(folder / "consolidated.safetensors")
    del tensors[name]
    save_file(tensors | ({} if replacement is None else {name: replacement}), folder / "consolidated.safetensors")


OUTPUT = CODEC_PREFIX + "output_proj.conv.parametrizations.weight.original0"
ENCODER = CODEC_PREFIX + "encoder_blocks.3.conv.parametrizations.weight.original1"


def truncate(path, n_bytes):
    path.write_bytes(path.read_bytes()[:n_bytes])


def add_tensor(folder, name):
    path = folder / "consolidated.safetensors"
    save_file(load_file(path) | {name: torch.ones(1)}, path)


PARAMS, WEIGHTS = "params.json", "consolidated.safetensors"
DAMAGES = {
    "no folder": (lambda f: [p.unlink() for p in f.iterdir()] and f.rmdir(), "does not exist"),
    "no params.json": (lambda f: (f / PARAMS).unlink(), "params.json is missing"),
    "params.json is cut": (lambda f: truncate(f / PARAMS, 100), "params.json is not valid JSON"),
    "params.json is binary": (lambda f: (f / PARAMS).write_bytes(b"\xff\xfe\x00"), "params.json is not valid JSON"),
    "params.json of another model": (lambda f: (f / PARAMS).write_text('{"dim": 3}'), "has no key 'multimodal'"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "has no consolidated.safetensors"),
    "weights cut in the data": (lambda f: truncate(f / WEIGHTS, 100_000), f"{WEIGHTS} is truncated"),
    "weights cut in the header": (lambda f: truncate(f / WEIGHTS, 500), f"{WEIGHTS} is truncated"),
    "weights are empty": (lambda f: truncate(f / WEIGHTS, 0), f"{WEIGHTS} is empty"),
    "weights are text": (lambda f: (f / WEIGHTS).write_text("version https://git-lfs"), f"{WEIGHTS} is truncated"),
    "codec tensor missing": (lambda f: remove_tensor(f, OUTPUT), f"lacks the tensor {OUTPUT}"),
    "embedding table missing": (lambda f: remove_tensor(f, EMBEDDING_NAME), f"lacks the tensor {EMBEDDING_NAME}"),
    "encoder not whole": (lambda f: remove_tensor(f, ENCODER), f"lacks the tensor {ENCODER}"),
    "encoder misshapen": (
        lambda f: remove_tensor(f, ENCODER, torch.zeros(3)),
        f"{ENCODER} has shape [3], but params.json implies [32",
    ),
    "table misshapen": (lambda f: remove_tensor(f, EMBEDDING_NAME, torch.zeros(5, 32)), "has shape [5, 32]"),
    "a tensor too many": (
        lambda f: add_tensor(f, CODEC_PREFIX + "decoder_blocks.9.x"),
        f"unexpected tensor {CODEC_PREFIX}decoder_blocks.9.x",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_are_refused_in_one_sentence(golden_folder, tmp_path, damage):
    folder = shutil.copytree(golden_folder, tmp_path / "copy")
    apply, message = DAMAGES[damage]
    apply(folder)
    with pytest.raises(CheckpointError, match=re.escape(message)) as error:
        VoxtralCodec.from_checkpoint(folder)
    assert "\n" not in str(error.value)


def test_missing_shard_is_named(golden_folder, tmp_path):
    folder = shard(golden_folder, tmp_path / "sharded", 3)
    (folder / "consolidated-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="shard .*consolidated-00002-of-00003.safetensors is missing"):
        VoxtralCodec.from_checkpoint(folder)


def test_an_architecture_that_the_code_does_not_know_is_refused():
    with pytest.raises(CheckpointError, match="audio_tokenizer_args.use_biases is True"):
        CodecParams(use_biases=True)


def test_small_layouts_are_what_the_codec_reads(released):
    """The stand-in's layout, without and with an encoder, loads."""
    params = Checkpoint(released).params
    names = {name for name in released_layout(params) if name.startswith(CODEC_PREFIX)}
    codec = VoxtralCodec(params.codec)
    assert {CODEC_PREFIX + name for name in codec.state_dict()} == names | set(withheld_layout(params))


# ---------------------------------------------------------------- writing


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(3)}, path)
    before = path.read_bytes()

    def fail():
        raise KeyboardInterrupt

    items = {"x": StoredTensor("F32", [3], lambda: torch.zeros(3)), "y": StoredTensor("F32", [2], fail)}
    with pytest.raises(KeyboardInterrupt):
        write_stored(path, items)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------- what vLLM-Omni 0.30.0 made of three clips, in bf16


@pytest.fixture(scope="module")
def standin():
    """The embedded stand-in with its encoder, and what the engine recorded of it (serving/cpu_worker.py)."""
    codec = VoxtralCodec.from_checkpoint(ASSETS / "standin")
    codec.load_encoder(load_file(ASSETS / "standin_withheld_encoder.safetensors"))
    return codec, load_file(DATA / "served_standin.safetensors")


@pytest.mark.parametrize("clip", range(3))
def test_the_quantizer_gives_the_codes_that_serving_gave(standin, clip):
    codec, served = standin
    latent, codes = served[f"{clip}.latent"], served[f"{clip}.codes"].long()
    with torch.autocast("cpu", torch.bfloat16):  # which would make the distances fp32
        assert torch.equal(codec.quantizer.encode(latent), codes)
    in_fp32 = codec.quantizer.encode(latent.float())
    assert (in_fp32 != codes)[:, 1:].float().mean() > 0.02  # so this is what the dtype decides


def test_codes_and_rows_of_a_waveform_are_what_serving_makes_of_it(standin):
    """Attention kernels round differently, so not every code is equal; fp32 is five times as far away."""
    codec, served = standin
    waveform, theirs = served["1.waveform"].float(), served["1.codes"].long()
    ours, exact = codec.encode(waveform), codec.quantizer.encode(codec.encode_latent(waveform))
    assert (ours - theirs)[:, 1:].abs().max() <= 1
    assert (ours != theirs)[:, 1:].float().mean() < 0.012 and (exact != theirs)[:, 1:].float().mean() > 0.04
    assert (ours != theirs)[:, 0].float().mean() < 0.03 and (exact != theirs)[:, 0].float().mean() > 0.05
    rows = codec.voice_rows(theirs)[0]
    assert torch.equal(rows.bfloat16(), served["1.rows"])
    assert torch.equal(codec.voice_embedding(waveform)[-1].bfloat16(), served["1.rows"][-1])  # END_AUDIO
