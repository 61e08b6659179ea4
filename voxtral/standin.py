"""Stand-in checkpoints: random weights in exactly the layout of the released folder, at full or at reduced size.

For tests and dry runs without the 8 GB download.
"""

import json
import zlib
from copy import deepcopy
from dataclasses import asdict
from importlib.resources import files
from math import prod
from pathlib import Path

import torch
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from torch import Tensor

from voxtral.checkpoint import EMBEDDING_NAME, StoredTensor, atomic_path, write_stored, write_text
from voxtral.errors import UserError
from voxtral.layout import meta_codec, released_layout
from voxtral.params import CodecParams, ModelParams, parse_params

N_SPECIAL_TOKENS = 1000  # ids below belong to special tokens; a text token's id is its rank + 1000
SPEECH_TOKENS = {
    24: "[AUDIO]",
    25: "[BEGIN_AUDIO]",
    34: "[TRANSCRIBE]",
    35: "[REPEAT_AUDIO_TEXT]",
    36: "[NEXT_AUDIO_TEXT]",
}


# ---------------------------------------------------------------- params.json


def full_params() -> dict:
    """params.json of Voxtral-4B-TTS-2603 (spec section 2), with no voices yet."""
    return {
        "dim": 3072,
        "n_layers": 26,
        "head_dim": 128,
        "hidden_dim": 9216,
        "n_heads": 32,
        "n_kv_heads": 8,
        "rope_theta": 1e6,
        "norm_eps": 1e-5,
        "vocab_size": 131072,
        "tied_embeddings": True,
        "use_biases": False,
        "causal": True,
        "max_seq_len": 65536,
        "model_type": "voxtral_tts",
        "multimodal": {
            "bos_token_id": 1,
            "audio_model_args": {
                "semantic_codebook_size": 8192,
                "acoustic_codebook_size": 21,
                "n_acoustic_codebook": 36,
                "audio_token_id": 24,
                "begin_audio_token_id": 25,
                "input_embedding_concat_type": "sum",
                "p_uncond": 0.0,
                "condition_dropped_token_id": 42,
                "audio_encoding_args": {
                    "codebook_pattern": "parallel",
                    "num_codebooks": 37,
                    "sampling_rate": 24000,
                    "frame_rate": 12.5,
                },
                "acoustic_transformer_args": {
                    "input_dim": 3072,
                    "dim": 3072,
                    "n_layers": 3,
                    "head_dim": 128,
                    "hidden_dim": 9216,
                    "n_heads": 32,
                    "n_kv_heads": 8,
                    "use_biases": False,
                    "rope_theta": 1e4,
                    "sigma": 1e-5,
                    "sigma_max": 1.0,
                },
            },
            "audio_tokenizer_args": {
                name: value for name, value in asdict(CodecParams()).items() if not name.startswith("encoder_")
            },
        },
    }


SMALL_BACKBONE = dict(dim=64, n_layers=2, head_dim=16, hidden_dim=128, n_heads=8, n_kv_heads=2, vocab_size=2048)
SMALL_ACOUSTIC = dict(n_layers=3, head_dim=16, hidden_dim=128, n_heads=8, n_kv_heads=2)
SMALL_CODEC = dict(
    dim=64, hidden_dim=128, head_dim=16, n_heads=4, n_kv_heads=4, semantic_codebook_size=64, semantic_dim=16
)


def small_params(backbone: dict | None = None, acoustic: dict | None = None, codec: dict | None = None) -> dict:
    """full_params() at the SMALL_* sizes, updated with the keys given for the top level, `acoustic_transformer_args`
    and `audio_tokenizer_args`; sizes that params.json states twice are kept equal. About 0.9 M parameters."""
    raw = full_params()
    audio, tokenizer = raw["multimodal"]["audio_model_args"], raw["multimodal"]["audio_tokenizer_args"]
    raw.update(SMALL_BACKBONE | (backbone or {}))
    tokenizer.update(SMALL_CODEC | (codec or {}))
    width = {"input_dim": raw["dim"], "dim": raw["dim"]}  # its tokens are hidden states of the backbone
    audio["acoustic_transformer_args"].update(SMALL_ACOUSTIC | width | (acoustic or {}))
    audio["semantic_codebook_size"] = tokenizer["semantic_codebook_size"]
    audio["acoustic_codebook_size"] = tokenizer["acoustic_codebook_size"]
    audio["n_acoustic_codebook"] = tokenizer["acoustic_dim"]
    audio["audio_encoding_args"]["num_codebooks"] = 1 + tokenizer["acoustic_dim"]
    return raw


# ---------------------------------------------------------------- weights


def random_tensor(name: str, shape: tuple, seed: int = 0) -> Tensor:
    """bf16 values at scales that keep activations finite through all layers, and decoded audio at about -20 dBFS.

    Depends on (seed, name, shape) alone, not on what was drawn before.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    if name.endswith("cluster_usage"):
        return (1 + 99 * torch.rand(shape, generator=generator)).bfloat16()
    if name.endswith("embedding_sum"):
        usage = random_tensor(name.replace("embedding_sum", "cluster_usage"), shape[:1], seed)
        return (usage.float()[:, None] * torch.randn(shape, generator=generator)).bfloat16()
    if name.endswith(("attention_scale", "ffn_scale")):  # from layer_scale_init on
        return torch.empty(shape).uniform_(0.01, 0.1, generator=generator).bfloat16()
    if name.endswith("norm.weight"):
        return (1 + 0.1 * torch.randn(shape, generator=generator)).bfloat16()
    if name.endswith("original0"):  # gain of a weight-normalised convolution
        gain = 0.3 if "output_proj" in name else 1.0
        return (gain * (1 + 0.1 * torch.randn(shape, generator=generator))).bfloat16()
    std = 0.02 if "embeddings" in name else prod(shape[1:]) ** -0.5
    tensor = torch.empty(shape, dtype=torch.bfloat16)
    for rows in tensor.split(max(1, 2**24 // prod(shape[1:]))):  # fp32 draws are fast; one chunk of them is small
        rows.copy_(torch.randn(rows.shape, generator=generator).mul_(std))
    return tensor


def random_voice(params: ModelParams, n_rows: int, table: Tensor, seed: int = 0) -> Tensor:
    """[n_rows, dim] bf16: n_rows - 1 frames of random codes, then the END_AUDIO frame (spec section 4)."""
    sizes = params.codec
    generator = torch.Generator().manual_seed(seed)
    codes = [
        torch.randint(size, (1, n_codebooks, n_rows), generator=generator)
        for size, n_codebooks in ((sizes.semantic_codebook_size, 1), (sizes.acoustic_codebook_size, sizes.acoustic_dim))
    ]
    codec = meta_codec(params)
    codec.audio_embedding = table
    return codec.voice_rows(torch.cat(codes, dim=1)[..., :-1])[0].contiguous()


# ---------------------------------------------------------------- files


def write_tekken(path, n_text_tokens: int | None, voices: dict[str, int]) -> None:
    """tekken.json (spec section 5) from the vocabulary that mistral_common ships.

    n_text_tokens: how many of its first entries, at least 256 (the single bytes); None: all that its default size uses.
    voices: name -> rows of the voice embedding. Raises UserError for a size that the vocabulary cannot give.
    """
    source = json.loads((files("mistral_common") / "data" / "tekken_240911.json").read_text(encoding="utf-8"))
    largest = source["config"]["default_vocab_size"] - N_SPECIAL_TOKENS
    n_text_tokens = largest if n_text_tokens is None else n_text_tokens
    if not 256 <= n_text_tokens <= largest:
        raise UserError(f"n_text_tokens is {n_text_tokens}, but the vocabulary gives 256 to {largest}.")
    names = {token["rank"]: token["token_str"] for token in Tekkenizer.DEPRECATED_SPECIAL_TOKENS} | SPEECH_TOKENS
    write_text(
        path,
        json.dumps(
            {
                "config": {
                    "pattern": source["config"]["pattern"],
                    "num_vocab_tokens": n_text_tokens,
                    "default_vocab_size": N_SPECIAL_TOKENS + n_text_tokens,
                    "default_num_special_tokens": N_SPECIAL_TOKENS,
                    "version": "v7",
                },
                "vocab": source["vocab"][:n_text_tokens],
                "special_tokens": [
                    {"rank": rank, "token_str": names.get(rank, f"<SPECIAL_{rank}>"), "is_control": True}
                    for rank in range(N_SPECIAL_TOKENS)
                ],
                "audio": {
                    "sampling_rate": 24000,
                    "frame_rate": 12.5,
                    "audio_encoding_config": {"num_mel_bins": 128, "hop_length": 160, "window_size": 400},
                    "chunk_length_s": None,
                    "voice_num_audio_tokens": voices,
                },
            },
            ensure_ascii=False,
        ),
    )


def write_random_checkpoint(
    folder,
    raw_params: dict,
    voices: dict[str, int | Tensor],
    seed: int = 0,
    n_text_tokens: int | None = None,
    trained: dict[str, Tensor] | None = None,
) -> None:
    """A whole checkpoint folder with random weights; one tensor is in memory at a time.

    raw_params: full_params() or small_params(); voices: name -> rows of a random one (>= 2, the last one END_AUDIO), or
    its embedding [N, dim], indices are given in that order; n_text_tokens: entries of tekken.json, None: as many as
    vocab_size has room for; trained: tensors, by name, that take the place of random ones; an encoder is there only if
    it is among them.
    """
    folder, trained = Path(folder), trained or {}
    raw = deepcopy(raw_params)
    raw["multimodal"]["audio_tokenizer_args"]["voice"] = {name: index for index, name in enumerate(voices)}
    params = parse_params(raw)
    layout = released_layout(params)
    layout |= {name: tuple(tensor.shape) for name, tensor in trained.items() if name not in layout}

    def tensor(name: str) -> Tensor:
        return trained[name] if name in trained else random_tensor(name, layout[name], seed)

    items = {
        name: StoredTensor("BF16", list(layout[name]), lambda name=name: tensor(name).bfloat16()) for name in layout
    }
    write_stored(folder / "consolidated.safetensors", items, metadata={"format": "pt"})
    write_text(folder / "params.json", json.dumps(raw, indent=2))
    table = tensor(EMBEDDING_NAME)
    embeddings = {
        name: random_voice(params, voice, table, seed + index) if isinstance(voice, int) else voice
        for index, (name, voice) in enumerate(voices.items())
    }
    n_text_tokens = params.vocab_size - N_SPECIAL_TOKENS if n_text_tokens is None else n_text_tokens
    write_tekken(folder / "tekken.json", n_text_tokens, {name: len(voice) for name, voice in embeddings.items()})
    for name, voice in embeddings.items():
        with atomic_path(folder / "voice_embedding" / f"{name}.pt") as temporary:
            torch.save(voice.to(torch.bfloat16).contiguous(), temporary)
