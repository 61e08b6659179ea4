"""Names, shapes and order of the tensors in a checkpoint, as params.json implies them (spec sections 1, 3, 6)."""

import torch

from voxtral.checkpoint import CODEC_PREFIX, EMBEDDING_NAME, ENCODER_PREFIXES, TEXT_EMBEDDING_NAME
from voxtral.codec import VoxtralCodec
from voxtral.params import ModelParams, TransformerParams

# Order of the tensors in the released file (torch lists a module's own parameters before those of its children).
LAYER_TENSORS = """
    attention.wq.weight attention.wk.weight attention.wv.weight attention.wo.weight
    feed_forward.w1.weight feed_forward.w2.weight feed_forward.w3.weight attention_norm.weight ffn_norm.weight
    attention.q_norm.weight attention.k_norm.weight attention_scale ffn_scale
""".split()
CODEC_PARTS = ["input_proj", "encoder_blocks", "decoder_blocks", "output_proj", "quantizer"]


def released_layout(params: ModelParams) -> dict[str, tuple]:
    """Tensor name -> shape of consolidated.safetensors, in file order (386 tensors at full size)."""
    dim, acoustic_dim = params.acoustic.dim, params.codec.acoustic_dim
    return {
        TEXT_EMBEDDING_NAME: (params.vocab_size, params.dim),
        EMBEDDING_NAME: (params.audio_embedding_size, params.dim),
        **transformer_layout("", params.backbone),
        "norm.weight": (params.dim,),
        **transformer_layout("acoustic_transformer.", params.acoustic),
        "acoustic_transformer.input_projection.weight": (dim, acoustic_dim),
        "acoustic_transformer.llm_projection.weight": (dim, params.dim),
        "acoustic_transformer.time_projection.weight": (dim, dim),
        "acoustic_transformer.norm.weight": (dim,),
        "acoustic_transformer.semantic_codebook_output.weight": (params.semantic_output_size, dim),
        "acoustic_transformer.acoustic_codebook_output.weight": (acoustic_dim, dim),
        **{name: shape for name, shape in codec_layout(params).items() if not name.startswith(ENCODER_PREFIXES)},
    }


def withheld_layout(params: ModelParams) -> dict[str, tuple]:
    """Tensor name -> shape of the encoder, which the release leaves out (114 tensors at full size)."""
    return {name: shape for name, shape in codec_layout(params).items() if name.startswith(ENCODER_PREFIXES)}


def transformer_layout(prefix: str, sizes: TransformerParams) -> dict[str, tuple]:
    """The layers of the backbone (prefix "") or of the acoustic transformer; no q/k norms and no layer scales there."""
    width, kv_width = sizes.n_heads * sizes.head_dim, sizes.n_kv_heads * sizes.head_dim
    attention = [(width, sizes.dim), (kv_width, sizes.dim), (kv_width, sizes.dim), (sizes.dim, width)]
    feed_forward = [(sizes.hidden_dim, sizes.dim), (sizes.dim, sizes.hidden_dim), (sizes.hidden_dim, sizes.dim)]
    shapes = [*attention, *feed_forward, (sizes.dim,), (sizes.dim,)]
    return {
        f"{prefix}layers.{i}.{name}": shape for i in range(sizes.n_layers) for name, shape in zip(LAYER_TENSORS, shapes)
    }


def codec_layout(params: ModelParams) -> dict[str, tuple]:
    """All of the codec, encoder included, in file order."""
    shapes = {name: tuple(tensor.shape) for name, tensor in meta_codec(params).tensors().items()}
    return {name: shapes[name] for name in sorted(shapes, key=codec_file_order)}


def meta_codec(params: ModelParams) -> VoxtralCodec:
    """A codec without storage."""
    with torch.device("meta"):
        return VoxtralCodec(params.codec)


def codec_file_order(name: str) -> tuple:
    """Sort key: within a stack the first block, then all transformers, then the other convolutions."""
    part, *rest = name.removeprefix(CODEC_PREFIX).split(".")
    block = int(rest[0]) if part.endswith("_blocks") else 0
    if "layers" in rest:  # BLOCK.layers.LAYER.TENSOR
        return CODEC_PARTS.index(part), min(block, 1), block, int(rest[2]), LAYER_TENSORS.index(".".join(rest[3:]))
    return CODEC_PARTS.index(part), 2 * min(block, 1), block
