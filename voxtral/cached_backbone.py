"""The backbone one token at a time: a static key/value cache, and layers of as few kernels as plain PyTorch allows.

transformers' own step launches many more, and its caches and masks change from release to release. The weights are
those of a `Backbone`, whose forward pass is the reference that this one is tested against.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from voxtral.backbone import Backbone
from voxtral.params import round_up

CACHE_MULTIPLE = 64  # slots; attention kernels want aligned masks


@dataclass
class Cache:
    """Keys and values [n_layers, B, n_kv_heads, slots, head_dim] of everything decoded so far."""

    keys: Tensor
    values: Tensor

    @property
    def n_slots(self) -> int:
        return self.keys.shape[3]


class CachedBackbone:
    """Decodes batches step by step. Prompts of different lengths are padded on the left, so that all items are at the
    same slot; an item's position counts from its first slot that is not padding.

    The weights of q, k, v and of gate, up are joined into one matrix each; the modules of `backbone` become views of
    them, so it stays usable and nothing is stored twice.
    """

    def __init__(self, backbone: Backbone):
        self.sizes, self.model = backbone.params.backbone, backbone.model
        self.qkv = [
            join([layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj])
            for layer in self.model.layers
        ]
        self.gate_up = [join([layer.mlp.gate_proj, layer.mlp.up_proj]) for layer in self.model.layers]

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.norm.weight.dtype

    def new_cache(self, batch_size: int, n_slots: int) -> Cache:
        """Room for at least n_slots tokens of every item, prompt and padding included."""
        sizes = self.sizes
        n_slots = round_up(n_slots, CACHE_MULTIPLE)
        shape = (sizes.n_layers, batch_size, sizes.n_kv_heads, n_slots, sizes.head_dim)
        # Zeros, not empty: a masked slot still enters the weighted sum, with weight 0.
        return Cache(*(torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2)))

    def __call__(self, x: Tensor, cache: Cache, slots: Tensor, n_padding: Tensor, n_keys: int) -> Tensor:
        """Embeddings [B, S, dim] -> hidden states [B, S, dim] after the final norm.

        slots: [S] int64, where the tokens go in the cache; n_padding: [B] int64, slots of padding on the left;
        n_keys: how many slots of the cache are looked at (those after a token's own are masked). Nothing depends on
        values but the values, so one CUDA graph serves every slot.
        """
        sizes, half = self.sizes, self.sizes.head_dim // 2
        n_rotated = sizes.n_heads + sizes.n_kv_heads
        group = sizes.n_heads // sizes.n_kv_heads
        mask = self.mask(slots, n_padding, n_keys, x.dtype).repeat(1, 1, group, 1)  # [B, 1, group * S, n_keys]
        positions = (slots - n_padding[:, None]).clamp(min=0)
        cos, sin = (part[:, :, None] for part in self.model.rotary_emb(x, positions))  # [B, S, 1, head_dim]
        sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)  # rotate_half's sign
        for i, layer in enumerate(self.model.layers):
            normed = self.norm(x, layer.input_layernorm)
            qkv = F.linear(normed, self.qkv[i]).unflatten(-1, (-1, sizes.head_dim))  # [B, S, heads, head_dim]
            turned = qkv[:, :, :n_rotated]
            turned = torch.addcmul(turned * cos, turned.roll(half, dims=-1), sin)
            cache.keys[i].index_copy_(2, slots, turned[:, :, sizes.n_heads :].transpose(1, 2))
            cache.values[i].index_copy_(2, slots, qkv[:, :, n_rotated:].transpose(1, 2))
            # Query heads that share a key head stand in line as further queries: keys are not repeated in memory.
            query = turned[:, :, : sizes.n_heads].unflatten(2, (sizes.n_kv_heads, group)).permute(0, 2, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(
                query.flatten(2, 3), cache.keys[i, :, :, :n_keys], cache.values[i, :, :, :n_keys], attn_mask=mask
            )
            mixed = mixed.unflatten(2, (group, -1)).permute(0, 3, 1, 2, 4).flatten(2)
            x = x + layer.self_attn.o_proj(mixed)
            gate, up = F.linear(self.norm(x, layer.post_attention_layernorm), self.gate_up[i]).chunk(2, dim=-1)
            x = x + layer.mlp.down_proj(F.silu(gate) * up)
        return self.norm(x, self.model.norm)

    def mask(self, slots: Tensor, n_padding: Tensor, n_keys: int, dtype: torch.dtype) -> Tensor:
        """[B, 1, S, n_keys] added to the scores: 0 where slot i sees slot j, else -inf. Padding sees itself alone: a
        row of nothing but -inf would be NaN."""
        key, slot = torch.arange(n_keys, device=slots.device), slots[:, None]
        seen = (key <= slot) & (key >= n_padding[:, None, None]) | (key == slot)
        return torch.zeros(seen.shape, dtype=dtype, device=slots.device).masked_fill(~seen, -torch.inf)[:, None]

    def norm(self, x: Tensor, module: nn.Module) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), module.weight, self.sizes.norm_eps)


def join(modules: list[nn.Linear]) -> Tensor:
    """One weight of all of them, stacked; the modules become views of it."""
    whole = torch.cat([module.weight for module in modules])
    for module, part in zip(modules, whole.split([len(module.weight) for module in modules])):
        module.weight = nn.Parameter(part, requires_grad=False)
    return whole
