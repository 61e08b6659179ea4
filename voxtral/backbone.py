"""The language model of Voxtral TTS: transformers' MistralModel, loaded from the native checkpoint (spec section 6).

Two conventions differ: module names, and RoPE. The checkpoint rotates adjacent pairs of a head's rows, transformers
rotates its two halves, so the rows of wq and wk are reordered once at load, and back before anything is written.
"""

import re
from collections.abc import Callable

import torch
import transformers
from torch import Tensor, nn
from transformers import MistralConfig, MistralModel
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding

from voxtral.checkpoint import TEXT_EMBEDDING_NAME, Checkpoint
from voxtral.params import CheckpointError, ModelParams, TransformerParams

# Native module name -> transformers' name; inside a layer, both follow `layers.N.`.
MODULE_NAMES = {TEXT_EMBEDDING_NAME.removesuffix(".weight"): "embed_tokens", "norm": "norm"}
LAYER_MODULE_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def to_transformers_name(name: str) -> str:
    """ "layers.3.attention.wq[.weight]" -> "layers.3.self_attn.q_proj[.weight]". ValueError for any other module."""
    return _rename(name, MODULE_NAMES, LAYER_MODULE_NAMES)


def to_native_name(name: str) -> str:
    """ "layers.3.self_attn.q_proj[.weight]" -> "layers.3.attention.wq[.weight]". ValueError for any other module."""
    outside, inside = ({new: old for old, new in names.items()} for names in (MODULE_NAMES, LAYER_MODULE_NAMES))
    return _rename(name, outside, inside)


def _rename(name: str, outside: dict[str, str], inside: dict[str, str]) -> str:
    layer, module, suffix = re.fullmatch(r"(layers\.\d+\.)?(.*?)(\.weight)?", name).groups(default="")
    names = inside if layer else outside
    if module not in names:
        raise ValueError(f"{name} is no module of the backbone.")
    return layer + names[module] + suffix


def native_to_halves(weight: Tensor, n_heads: int, head_dim: int) -> Tensor:
    """[n_heads * head_dim, ...] with RoPE on adjacent rows -> RoPE on the halves of each head. For wq, wk and the B
    matrices [out, r] of their LoRA adapters."""
    return weight.reshape(n_heads, head_dim // 2, 2, -1).transpose(1, 2).reshape(weight.shape)


def halves_to_native(weight: Tensor, n_heads: int, head_dim: int) -> Tensor:
    """The exact inverse of native_to_halves."""
    return weight.reshape(n_heads, 2, head_dim // 2, -1).transpose(1, 2).reshape(weight.shape)


def rotated_heads(sizes: TransformerParams) -> dict[str, int]:
    """Native name of a projection whose rows RoPE rotates -> its number of heads."""
    return {"wq": sizes.n_heads, "wk": sizes.n_kv_heads}


def _reordered(name: str, weight: Tensor, sizes: TransformerParams, reorder: Callable) -> Tensor:
    """A tensor by its native name; with its rows in another order where RoPE rotates them."""
    n_heads = rotated_heads(sizes).get(name.removesuffix(".weight").rpartition(".")[2])
    return reorder(weight, n_heads, sizes.head_dim) if n_heads else weight


def check_rope(rotary: nn.Module, sizes: TransformerParams) -> None:
    """Raises CheckpointError unless RoPE turns by the theta of params.json: a transformers that does not know the key
    rope_parameters would take 10,000 without a word."""
    frequencies = sizes.rope_theta ** -(torch.arange(0, sizes.head_dim, 2, dtype=torch.float64) / sizes.head_dim)
    found = rotary.inv_freq.double().cpu()
    if found.shape != frequencies.shape or not torch.allclose(found, frequencies, rtol=1e-4, atol=0):
        raise CheckpointError(
            f"transformers {transformers.__version__} does not turn RoPE by rope_theta "
            f"{sizes.rope_theta:g} of params.json: pip install -r requirements.txt."
        )


class Backbone(nn.Module):
    """Embeddings [B, S, dim] -> hidden states [B, S, dim]. `model` is the MistralModel, in which peft finds the usual
    q_proj, k_proj, v_proj and o_proj; its weights are frozen."""

    def __init__(self, params: ModelParams):
        super().__init__()
        self.params = params
        sizes = params.backbone
        self.model = MistralModel(
            MistralConfig(
                vocab_size=params.vocab_size,
                hidden_size=sizes.dim,
                intermediate_size=sizes.hidden_dim,
                num_hidden_layers=sizes.n_layers,
                num_attention_heads=sizes.n_heads,
                num_key_value_heads=sizes.n_kv_heads,
                head_dim=sizes.head_dim,
                rms_norm_eps=sizes.norm_eps,
                sliding_window=None,
                use_cache=False,
                rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_theta},
                attn_implementation="sdpa",
            )
        )
        for layer in self.model.layers:  # PyTorch's norm is one launch, transformers' own is six
            layer.input_layernorm = nn.RMSNorm(sizes.dim, sizes.norm_eps)
            layer.post_attention_layernorm = nn.RMSNorm(sizes.dim, sizes.norm_eps)
        self.model.norm = nn.RMSNorm(sizes.dim, sizes.norm_eps)
        self.requires_grad_(False)

    @classmethod
    def from_checkpoint(cls, folder, device="cpu", dtype: torch.dtype = torch.bfloat16) -> "Backbone":
        """Reads the backbone and the text embedding table, and no other tensor; never holds a second copy of them.

        Raises CheckpointError for a file or tensor that is missing, damaged or of a wrong shape.
        """
        checkpoint = Checkpoint(folder)
        with torch.device("meta"):
            backbone = cls(checkpoint.params)
        expected = {to_native_name(name): tuple(t.shape) for name, t in backbone.model.state_dict().items()}
        checkpoint.check(expected, "layers.", "norm.", TEXT_EMBEDDING_NAME)
        weights = {}
        for name in expected:
            weight = checkpoint.read([name])[name].to(device, dtype)
            weights[to_transformers_name(name)] = _reordered(name, weight, checkpoint.params.backbone, native_to_halves)
        backbone.model.load_state_dict(weights, assign=True)  # the modules take these very tensors
        # Computed at construction, not stored: on the meta device it has no values yet. It stays float32.
        backbone.model.rotary_emb = MistralRotaryEmbedding(backbone.model.config).to(device)
        check_rope(backbone.model.rotary_emb, checkpoint.params.backbone)
        return backbone.eval()

    def native_state_dict(self) -> dict[str, Tensor]:
        """The weights as the checkpoint has them: its names, RoPE on adjacent rows."""
        weights = {to_native_name(name): weight for name, weight in self.model.state_dict().items()}
        sizes = self.params.backbone
        return {name: _reordered(name, weight, sizes, halves_to_native) for name, weight in weights.items()}

    def embed_text(self, ids: Tensor) -> Tensor:
        """Token ids [...] -> [..., dim]"""
        return self.model.embed_tokens(ids)

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[B, S, dim] -> [B, S, dim] after the final norm: what the acoustic transformer conditions on.

        attention_mask [B, S]: 1 for positions to attend to, 0 for padding, on either side.
        """
        return self.model(inputs_embeds=inputs_embeds, attention_mask=attention_mask).last_hidden_state

    def hidden_states(self, inputs_embeds: Tensor) -> list[Tensor]:
        """The output of every layer, n_layers tensors [B, S, dim]; the last one too is taken before the final norm
        (transformers' own `output_hidden_states` would return it normed)."""
        outputs = []
        hooks = [
            layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
            for layer in self.model.layers
        ]
        try:
            self(inputs_embeds)
        finally:
            for hook in hooks:
                hook.remove()
        return outputs
