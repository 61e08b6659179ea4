"""The generating half on a small random checkpoint: cached steps, batches, stopping, prompts, chunked decoding."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import relative_error
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from voxtral import generation
from voxtral.acoustic import AcousticTransformer
from voxtral.backbone import Backbone
from voxtral.cached_backbone import CachedBackbone
from voxtral.codec import VoxtralCodec
from voxtral.generation import FrameLoop, Models
from voxtral.params import CheckpointError, parse_params
from voxtral.standin import small_params
from voxtral.streaming import StreamingDecoder, decode_batch, left_context
from voxtral.tts import TTS, Request, TTSError, named_voice, noise

TEXTS = ["hello there", "this is a rather longer text, isn't it?", "hi", "hi"]


@pytest.fixture(scope="module")
def tts(released):
    return TTS.from_checkpoint(released)


@pytest.fixture(scope="module")
def requests(released):
    """Of prompts of different lengths; the second and the last end by themselves within 20 frames."""
    voices = [named_voice(released, name) for name in ("alpha", "beta", "alpha", "alpha")]
    return [Request(text, voice, (0, i)) for i, (text, voice) in enumerate(zip(TEXTS, voices))]


@torch.no_grad()
def spoken_without_cache(tts, request, max_frames):
    """-> codes [37, L], ended: the whole sequence through transformers' MistralModel again for every frame."""
    x, codes = tts.prompt(request.text, request.voice)[None], []
    for x_0 in noise(request.seed, max_frames, 36):
        ids = tts.models.acoustic.frame(tts.models.backbone(x)[:, -1], x_0[None])
        if ids[0, 0] == 1:
            return torch.stack(codes, dim=1), True
        codes.append(ids[0] - 2)
        x = torch.cat([x, tts.codec.embed_codes(ids[:, :, None] - 2)], dim=1)
    return torch.stack(codes, dim=1), False


# ---------------------------------------------------------------- one token at a time


@torch.no_grad()
def test_cached_steps_equal_one_full_pass(released):
    backbone = Backbone.from_checkpoint(released, dtype=torch.float32)
    x = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(0))
    expected = backbone(x)
    cached = CachedBackbone(backbone)
    cache = cached.new_cache(2, 40)
    no_padding = torch.zeros(2, dtype=torch.long)
    outputs = [cached(x[:, :25], cache, torch.arange(25), no_padding, 25)]
    outputs += [cached(x[:, i : i + 1], cache, torch.tensor([i]), no_padding, cache.n_slots) for i in range(25, 40)]
    assert relative_error(torch.cat(outputs, dim=1), expected) < 1e-5
    assert relative_error(backbone(x), expected) < 1e-6  # its modules are views of the joined weights


@torch.no_grad()
def test_left_padding_changes_nothing(released):
    backbone = Backbone.from_checkpoint(released, dtype=torch.float32)
    x = torch.randn(1, 30, 64, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([torch.full((1, 7, 64), 3.0), x], dim=1)
    cached, n_padding = CachedBackbone(backbone), torch.tensor([7])
    cache = cached.new_cache(1, 64)
    cache.keys.fill_(5), cache.values.fill_(5)  # of an earlier batch
    outputs = [cached(padded[:, :27], cache, torch.arange(27), n_padding, 27)]
    outputs += [cached(padded[:, i : i + 1], cache, torch.tensor([i]), n_padding, cache.n_slots) for i in range(27, 37)]
    assert relative_error(torch.cat(outputs, dim=1)[:, 7:], backbone(x)) < 1e-5


def test_mask_hides_padding_and_the_future_and_leaves_no_row_empty(released):
    cached = CachedBackbone(Backbone.from_checkpoint(released))
    mask = cached.mask(torch.arange(1, 4), torch.tensor([0, 2]), 5, torch.float32)
    assert mask.shape == (2, 1, 3, 5) and set(mask.unique().tolist()) == {0.0, -torch.inf}
    assert (mask[0, 0] == 0).int().tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
    assert (mask[1, 0] == 0).int().tolist() == [[0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0]]


def test_joined_weights_are_stored_once(released):
    backbone = Backbone.from_checkpoint(released)
    cached = CachedBackbone(backbone)
    for layer, qkv, gate_up in zip(backbone.model.layers, cached.qkv, cached.gate_up):
        for module, whole in ((layer.self_attn.v_proj, qkv), (layer.mlp.up_proj, gate_up)):
            assert module.weight.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


# ---------------------------------------------------------------- batches


def test_a_batch_gives_each_request_what_a_loop_without_cache_gives(tts, requests):
    takes = tts.generate(requests, 30)
    assert len({tts.prompt(r.text, r.voice).shape for r in requests}) == 3
    assert [take.ended for take in takes] == [False, True, False, True]
    for request, take in zip(requests, takes):
        codes, ended = spoken_without_cache(tts, request, 30)
        assert torch.equal(take.codes, codes) and take.ended == ended


def test_the_seed_decides_alone(tts, requests):
    first, other = tts.generate([requests[0], Request(TEXTS[0], requests[0].voice, (1, 0))], 12)
    assert not torch.equal(first.codes[:, :1], other.codes[:, :1])
    longer = tts.generate([requests[3], requests[0]], 20)[1]  # another place in the batch, another limit
    assert torch.equal(longer.codes[:, :12], first.codes)
    assert torch.equal(noise((0, 3), 50, 36)[:7], noise((0, 3), 7, 36))
    assert len({noise(seed, 7, 36).sum().item() for seed in ((0, 3), (3, 0), (0, 4), (1, 3))}) == 4


def test_cfg_alpha_is_each_requests_own(tts, requests):
    strong = replace(requests[0], cfg_alpha=2.0)
    together = tts.generate([strong, requests[0]], 12)
    alone = [tts.generate([request], 12)[0] for request in (strong, requests[0])]
    assert all(torch.equal(one.codes, other.codes) for one, other in zip(together, alone))
    assert not torch.equal(*(take.codes for take in alone))


def test_stops_at_the_limit_and_says_so(tts, requests):
    growing = [takes[0].codes.shape[1] for takes in tts.takes(requests[:1], 21)]
    assert growing == [4, 12, 20, 21]
    (take,) = tts.generate(requests[:1], 21)
    assert not take.ended and take.codes.shape == (37, 21)
    assert take.codes.min() >= 0 and take.codes[0].max() < 64 and take.codes[1:].max() <= 20


def test_stops_once_all_have_ended(tts, requests):
    ending = [requests[1], requests[3]]
    blocks = [[take.ended for take in takes] for takes in tts.takes(ending, 500)]
    assert blocks[-1] == [True, True] and not all(blocks[-2]) and len(blocks) < 6
    assert [take.codes.shape[1] for take in tts.generate(ending, 500)] == [
        spoken_without_cache(tts, request, 500)[0].shape[1] for request in ending
    ]


def test_one_loop_serves_batches_that_fit_it(tts, requests):
    expected = tts.generate(requests[:2], 25)
    loop = tts._loop
    tts.generate(requests[2:], 20)
    again = tts.generate(requests[:2], 25)
    assert tts._loop is loop and all(torch.equal(a.codes, b.codes) for a, b in zip(expected, again))
    tts.generate(requests, 25)
    assert tts._loop is not loop
    loop = tts._loop
    tts.generate(requests, 60)  # room in the cache, but not for the ids
    assert tts._loop is not loop and tts._loop.cache.n_slots == loop.cache.n_slots


def test_bf16_runs(released, requests):
    (take,) = TTS.from_checkpoint(released, dtype=torch.bfloat16).generate(requests[:1], 6)
    assert 1 <= take.codes.shape[1] <= 6


# ---------------------------------------------------------------- prompts and voices


def test_voice_rows_stand_in_the_place_of_audio_tokens(tts):
    voice = torch.randn(9, 64)  # a length that no voice of tekken.json has
    prompt = tts.prompt("the cat", voice)
    text = tts.tokenizer.instruct_tokenizer.tokenizer.encode("the cat", bos=False, eos=False)
    around = tts.models.backbone.embed_text(torch.tensor([1, 25, 36, *text, 35, 25]))
    assert torch.equal(prompt[2:11], voice)
    assert torch.equal(torch.cat([prompt[:2], prompt[11:]]), around)


def test_named_voices(released, tmp_path):
    assert named_voice(released, "Alpha").shape == (13, 64)
    with pytest.raises(TTSError, match="no voice gamma: its voices are alpha, beta"):
        named_voice(released, "gamma")
    copy = shutil.copytree(released, tmp_path / "copy")
    torch.save(torch.zeros(5, 64), copy / "voice_embedding" / "beta.pt")
    with pytest.raises(TTSError, match="beta .*31 rows, the file has 5"):
        named_voice(copy, "beta")


def test_what_cannot_be_spoken_is_refused(tts, requests):
    with pytest.raises(TTSError, match="no text"):
        tts.generate([Request("  \n", requests[0].voice)], 5)
    with pytest.raises(TTSError, match="context has 65536"):
        tts.generate(requests[:1], 10**12)


def test_a_broken_tokenizer_file_is_named(released, tmp_path):
    copy = shutil.copytree(released, tmp_path / "copy")
    tekken = json.loads((copy / "tekken.json").read_text())
    del tekken["audio"]
    for text, match in (
        (json.dumps(tekken), "knows no voices"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        (json.dumps({**tekken, "vocab": [[]]}), "cannot be read"),
    ):
        (copy / "tekken.json").write_text(text)
        with pytest.raises(CheckpointError, match=f"tekken.json {match}"):
            TTS.from_checkpoint(copy)
    (copy / "tekken.json").unlink()
    with pytest.raises(CheckpointError, match="tekken.json is missing"):
        TTS.from_checkpoint(copy)


# ---------------------------------------------------------------- chunked decoding


def random_codes(n_frames, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.cat(
        [torch.randint(64, (1, n_frames), generator=generator), torch.randint(21, (36, n_frames), generator=generator)]
    )


@pytest.mark.parametrize("chunk_frames", [1, 7, 50])
@torch.no_grad()
def test_chunked_equals_whole(tts, chunk_frames):
    codes = random_codes(64)[None]
    whole = tts.codec.decode(codes)[:, 0]
    chunks = list(StreamingDecoder(tts.codec, chunk_frames).extend(codes))
    assert [c.shape[1] for c in chunks[:-1]] == [chunk_frames * 1920] * (len(chunks) - 1)
    assert (torch.cat(chunks, dim=1) - whole).abs().max() < 1e-5 * whole.abs().max()


def test_the_decoder_never_sees_more_than_a_chunk_and_its_context(tts, monkeypatch):
    seen, decode = [], tts.codec.decode
    monkeypatch.setattr(tts.codec, "decode", lambda codes: seen.append(codes.shape[-1]) or decode(codes))
    for _ in StreamingDecoder(tts.codec, 10).extend(random_codes(75)[None]):
        pass
    assert seen == [10, 20, 30, 31, 31, 31, 31, 26]


@torch.no_grad()
def test_growing_codes_give_only_what_is_new(tts):
    codes, decoder = random_codes(40)[None], StreamingDecoder(tts.codec)
    parts = [torch.cat(list(decoder.extend(codes[..., :end])), dim=1) for end in (4, 12, 20, 40)]
    assert [part.shape[1] // 1920 for part in parts] == [4, 8, 8, 20] and list(decoder.extend(codes)) == []
    whole = tts.codec.decode(codes)[:, 0]
    assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-5 * whole.abs().max()


@torch.no_grad()
def test_left_context_is_all_that_a_frame_depends_on_and_no_more(released):
    codec = VoxtralCodec.from_checkpoint(released, dtype=torch.float64)
    context = left_context(codec)
    assert context == 21
    codes = random_codes(40)[None]
    samples = codec.decode(codes)[0, 0]

    def changed(frame):
        """Whether the samples from frame 30 on hang on `frame`."""
        other = codes.clone()
        other[0, :, frame] = random_codes(1, seed=1)[:, 0]
        return (codec.decode(other)[0, 0, 30 * 1920 :] - samples[30 * 1920 :]).abs().max() > 0

    assert changed(30 - context) and not changed(30 - context - 1)


@torch.no_grad()
def test_a_batch_is_decoded_as_if_each_were_alone(tts):
    codes = [random_codes(60), random_codes(0), random_codes(3, seed=1)]
    audio = decode_batch(tts.codec, codes)
    assert [len(samples) for samples in audio] == [60 * 1920, 0, 3 * 1920]
    alone = tts.codec.decode(codes[2][None])[0, 0]
    assert (audio[2] - alone).abs().max() < 1e-5 * alone.abs().max()
    assert [len(samples) for samples in decode_batch(tts.codec, [random_codes(0)])] == [0]


# ---------------------------------------------------------------- CUDA graphs


class OnOneDevice(TorchDispatchMode):
    """Collects every operation that touches a tensor elsewhere than on the GPU."""

    def __init__(self):
        super().__init__()
        self.n_ops, self.elsewhere = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        self.n_ops += 1
        tensors = [leaf for leaf in tree_leaves((args, kwargs, output)) if isinstance(leaf, torch.Tensor)]
        self.elsewhere += [function for tensor in tensors if tensor.device.type != "cuda"]
        return output


def test_a_step_can_be_captured_as_a_cuda_graph(monkeypatch):
    """Fake tensors have shapes and devices but no values: reading a value, as .item() and nonzero do, raises."""
    monkeypatch.setattr(generation, "graphed", lambda step, rewind: step)
    params = parse_params(small_params())
    with FakeTensorMode(), torch.no_grad():
        with torch.device("cuda"):
            backbone, acoustic, codec = Backbone(params), AcousticTransformer(params), VoxtralCodec(params.codec)
            codec.audio_embedding = torch.zeros(params.audio_embedding_size, params.dim)
        loop = FrameLoop(CachedBackbone(backbone), acoustic, codec, batch_size=2, n_slots=64, max_frames=10)
        addresses = [id(tensor) for tensor in (loop.hidden, loop.ids, loop.frame, loop.slot, loop.cache.keys)]
        with OnOneDevice() as watch:
            loop.step()
    assert watch.n_ops > 100 and watch.elsewhere == []
    assert addresses == [id(tensor) for tensor in (loop.hidden, loop.ids, loop.frame, loop.slot, loop.cache.keys)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_the_graph_equals_eager_steps(released, requests, monkeypatch):
    graphed = TTS(released, Models.from_checkpoint(released, "cuda", torch.float32)).generate(requests, 30)
    monkeypatch.setattr(generation, "graphed", lambda step, rewind: step)
    eager = TTS(released, Models.from_checkpoint(released, "cuda", torch.float32)).generate(requests, 30)
    for one, other in zip(graphed, eager):
        assert torch.equal(one.codes, other.codes) and one.ended == other.ended


# ---------------------------------------------------------------- the benchmark


def test_benchmark_reports_a_row_per_batch_size(import_script, released, capsys, monkeypatch, refused):
    generation = import_script("generation")
    few = ["--batch-sizes", "1", "2", "--frames", "5", "--prompt", "12", "--device", "cpu"]
    generation.main(["--checkpoint", str(released), *few])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 4 and {len(line.split("|")) for line in table} == {14}
    assert [line.split("|")[1].strip() for line in table[2:]] == ["1", "2"]
    monkeypatch.delenv("VOXTRAL_CKPT", raising=False)
    assert "nothing to measure" in refused(generation.main, ["--device", "cpu"])


def test_random_models_are_filled_to_the_last_buffer(import_script, monkeypatch):
    generation = import_script("generation")
    monkeypatch.setattr(generation, "full_params", small_params)
    torch.use_deterministic_algorithms(True)  # memory that nothing was written to is NaN
    try:
        models = generation.random_models(torch.device("cpu"))
        assert models.codec.decode(torch.zeros(1, 37, 2, dtype=torch.long)).isfinite().all()
        assert models.backbone(torch.randn(1, 9, 64).bfloat16()).std() > 0.1
    finally:
        torch.use_deterministic_algorithms(False)
