"""The architecture, as params.json describes it. Every size in this project comes from here."""

import json
import re
from dataclasses import dataclass, field, fields
from pathlib import Path

from voxtral.errors import UserError


class CheckpointError(UserError):
    """A checkpoint folder, or a file in it, is missing, damaged or does not fit; the message says what to do."""


@dataclass(frozen=True)
class CodecParams:
    """`multimodal.audio_tokenizer_args`. The release lacks the `encoder_*` keys; serving then assumes these."""

    channels: int = 1
    sampling_rate: int = 24000
    pretransform_patch_size: int = 240
    patch_proj_kernel_size: int = 7
    semantic_codebook_size: int = 8192
    semantic_dim: int = 256
    acoustic_codebook_size: int = 21
    acoustic_dim: int = 36
    conv_weight_norm: bool = True
    causal: bool = True
    attn_sliding_window_size: int = 16
    half_attn_window_upon_downsampling: bool = True
    dim: int = 1024
    hidden_dim: int = 4096
    head_dim: int = 128
    n_heads: int = 8
    n_kv_heads: int = 8
    qk_norm: bool = True
    qk_norm_eps: float = 1e-6
    use_biases: bool = False
    norm_eps: float = 1e-2
    layer_scale: bool = True
    layer_scale_init: float = 0.01
    encoder_transformer_lengths_str: str = "2,2,2,2"
    encoder_convs_kernels_str: str = "4,4,4,3"
    encoder_convs_strides_str: str = "2,2,2,1"
    decoder_transformer_lengths_str: str = "2,2,2,2"
    decoder_convs_kernels_str: str = "3,4,4,4"
    decoder_convs_strides_str: str = "1,2,2,2"
    voice: dict = field(default_factory=dict)

    def __post_init__(self):
        for key in fields(self):
            value = getattr(self, key.name)
            if (key.type is bool or key.name == "channels") and value != key.default:
                raise CheckpointError(
                    f"params.json: audio_tokenizer_args.{key.name} is {value}, but the Voxtral codec that this code "
                    f"knows has {key.default}."
                )

    @property
    def latent_dim(self) -> int:
        """Channels of the encoder's output: semantic, then acoustic."""
        return self.semantic_dim + self.acoustic_dim

    @property
    def n_codebooks(self) -> int:
        return 1 + self.acoustic_dim

    @property
    def frame_size(self) -> int:
        """Samples per code frame (1920: 12.5 frames a second)."""
        size = self.pretransform_patch_size
        for stride in integers(self.encoder_convs_strides_str):
            size *= stride
        return size

    @property
    def frame_rate_hz(self) -> float:
        return self.sampling_rate / self.frame_size


@dataclass(frozen=True)
class TransformerParams:
    """The backbone (top level of params.json) or `acoustic_transformer_args`."""

    dim: int
    n_layers: int
    head_dim: int
    hidden_dim: int
    n_heads: int
    n_kv_heads: int
    norm_eps: float = 1e-5
    rope_theta: float = 1e6
    n_decoding_steps: int = 7


@dataclass(frozen=True)
class ModelParams:
    """All of params.json that this project reads. `raw` is the parsed file, for code that writes it back."""

    backbone: TransformerParams
    acoustic: TransformerParams
    codec: CodecParams
    vocab_size: int
    raw: dict = field(repr=False)

    @property
    def dim(self) -> int:
        return self.backbone.dim

    @property
    def semantic_output_size(self) -> int:
        """Rows of the semantic head: the codebook and its two special ids, padded to a multiple of 128."""
        return round_up(self.codec.semantic_codebook_size + N_SPECIAL_IDS)

    @property
    def audio_embedding_size(self) -> int:
        """Rows of the audio embedding table: every codebook with its two special ids, padded to a multiple of 128."""
        levels = self.codec.acoustic_codebook_size + N_SPECIAL_IDS
        return round_up(self.codec.semantic_codebook_size + N_SPECIAL_IDS + self.codec.acoustic_dim * levels)


# What a LoRA may change: wq, wk, wv and wo under transformers' names.
LORA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")

# Ids in front of every codebook: a quantizer code c is stored as id c + 2 (serving behaviour, spec section 4).
EMPTY_AUDIO, END_AUDIO, N_SPECIAL_IDS = 0, 1, 2


def round_up(size: int, multiple: int = 128) -> int:
    return -(-size // multiple) * multiple


def integers(text: str) -> list[int]:
    """ "2,2,2,1" -> [2, 2, 2, 1]"""
    return [int(part) for part in text.split(",")]


def _known(cls, values: dict):
    """The fields of `cls` that are there. Raises CheckpointError for a value of another type, and for sizes below 1."""
    known = {}
    for key in fields(cls):
        if key.name in values:
            value = known[key.name] = values[key.name]
            right = type(value) in ((int, float) if key.type is float else (key.type,))
            if not right or key.type is int and value < 1:
                kind = key.type.__name__ + (" above 0" if key.type is int else "")
                raise CheckpointError(f"params.json: {key.name} is {value!r}: it must be a {kind}.")
            if key.name.endswith("_str") and not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", value):
                raise CheckpointError(
                    f"params.json: {key.name} is {value!r}: it must be numbers above 0 between commas."
                )
    return cls(**known)


def parse_params(raw: dict) -> ModelParams:
    """params.json's content -> ModelParams. Raises CheckpointError naming the key that is missing."""
    try:
        audio = raw["multimodal"]["audio_model_args"]
        params = ModelParams(
            backbone=_known(TransformerParams, raw),
            acoustic=_known(TransformerParams, audio["acoustic_transformer_args"]),
            codec=_known(CodecParams, raw["multimodal"]["audio_tokenizer_args"]),
            vocab_size=int(raw["vocab_size"]),
            raw=raw,
        )
    except KeyError as error:
        raise CheckpointError(
            f"params.json has no key {error}: is this the folder of a Voxtral TTS checkpoint?"
        ) from error
    except (TypeError, AttributeError) as error:
        raise CheckpointError(f"params.json is incomplete: {error}") from error
    return params


def load_params(folder) -> ModelParams:
    """Reads `folder`/params.json. Raises CheckpointError when it is missing or no JSON."""
    path = Path(folder) / "params.json"
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing: point `checkpoint` (or VOXTRAL_CKPT) at the folder of a Voxtral TTS checkpoint."
        )
    try:
        return parse_params(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): download it again.") from error
