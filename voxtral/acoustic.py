"""The flow-matching head of Voxtral TTS: hidden state of the backbone -> the 37 ids of a frame (spec section 6).

`AcousticTransformer.state_dict()` keys are the checkpoint's tensor names without `acoustic_transformer.`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from voxtral.checkpoint import Checkpoint
from voxtral.layers import FeedForward
from voxtral.params import END_AUDIO, N_SPECIAL_IDS, ModelParams, TransformerParams

PREFIX = "acoustic_transformer."
CFG_ALPHA = 1.2  # weight of the conditional velocity (serving's default)


class Attention(nn.Module):
    """[B, S, dim] -> [B, S, dim]; every token sees every other, without positions. Grouped key and value heads."""

    def __init__(self, sizes: TransformerParams):
        super().__init__()
        self.head_dim = sizes.head_dim
        width, kv_width = sizes.n_heads * sizes.head_dim, sizes.n_kv_heads * sizes.head_dim
        self.wq = nn.Linear(sizes.dim, width, bias=False)
        self.wk = nn.Linear(sizes.dim, kv_width, bias=False)
        self.wv = nn.Linear(sizes.dim, kv_width, bias=False)
        self.wo = nn.Linear(width, sizes.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        return self.wo(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Pre-norm layer: [B, S, dim] -> [B, S, dim]"""

    def __init__(self, sizes: TransformerParams):
        super().__init__()
        self.attention_norm = nn.RMSNorm(sizes.dim, eps=sizes.norm_eps)
        self.attention = Attention(sizes)
        self.ffn_norm = nn.RMSNorm(sizes.dim, eps=sizes.norm_eps)
        self.feed_forward = FeedForward(sizes.dim, sizes.hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class AcousticTransformer(nn.Module):
    """Hidden state [B, dim] -> ids [B, 1 + acoustic_dim]: the semantic one by argmax, the acoustic ones by
    n_decoding_steps Euler steps from noise. Its weights are frozen."""

    def __init__(self, params: ModelParams):
        super().__init__()
        sizes = params.acoustic
        self.params = params
        self.input_projection = nn.Linear(params.codec.acoustic_dim, sizes.dim, bias=False)
        self.time_projection = nn.Linear(sizes.dim, sizes.dim, bias=False)
        self.llm_projection = nn.Linear(params.dim, sizes.dim, bias=False)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.n_layers))
        self.norm = nn.RMSNorm(sizes.dim, eps=sizes.norm_eps)
        self.semantic_codebook_output = nn.Linear(sizes.dim, params.semantic_output_size, bias=False)
        self.acoustic_codebook_output = nn.Linear(sizes.dim, params.codec.acoustic_dim, bias=False)
        self.requires_grad_(False)

    @classmethod
    def from_checkpoint(cls, folder, device="cpu", dtype: torch.dtype = torch.bfloat16) -> "AcousticTransformer":
        """Reads the acoustic transformer, and no other tensor; never holds a second copy of it.

        Raises CheckpointError for a file or tensor that is missing, damaged or of a wrong shape.
        """
        checkpoint = Checkpoint(folder)
        with torch.device("meta"):
            model = cls(checkpoint.params)
        expected = {PREFIX + name: tuple(t.shape) for name, t in model.state_dict().items()}
        checkpoint.check(expected, PREFIX)
        weights = {name.removeprefix(PREFIX): checkpoint.read([name])[name].to(device, dtype) for name in expected}
        model.load_state_dict(weights, assign=True)
        return model.eval()

    @property
    def dtype(self) -> torch.dtype:
        return self.input_projection.weight.dtype

    def velocity(self, x_t: Tensor, t: Tensor, hidden: Tensor) -> Tensor:
        """Noisy acoustic values x_t [B, acoustic_dim], times t [B] or [B, 1] in [0, 1), hidden states [B, dim]
        -> velocity [B, acoustic_dim] float32. hidden = 0 gives the unconditional one."""
        return self._velocity(x_t, self._time_tokens(t.reshape(-1)), self.llm_projection(hidden.to(self.dtype)))

    def frame(self, hidden: Tensor, x_0: Tensor, cfg_alpha: float | Tensor = CFG_ALPHA) -> Tensor:
        """Hidden states [B, dim] -> ids [B, 1 + acoustic_dim] int64 of one frame, semantic first (code + 2).

        x_0 [B, acoustic_dim]: the noise to start from. cfg_alpha: one weight, or [B, 1]. A frame whose semantic id is
        END_AUDIO ends the clip and is no audio; its acoustic ids are then N_SPECIAL_IDS, as in serving.
        Nothing here waits for the device or depends on values, so a CUDA graph can hold it. The Euler state stays
        float32, whatever the weights are.
        """
        semantic, x = self.semantic_ids(hidden), x_0.float()
        n_steps = self.params.acoustic.n_decoding_steps
        times = self._time_tokens(torch.arange(n_steps, device=hidden.device) / n_steps)
        conditional = self.llm_projection(hidden.to(self.dtype))
        conditions = torch.cat([conditional, torch.zeros_like(conditional)])  # the projection of h = 0 is 0: no bias
        for step in range(n_steps):
            with_text, without = self._velocity(x.repeat(2, 1), times[step], conditions).chunk(2)
            x = x + (cfg_alpha * with_text + (1 - cfg_alpha) * without) / n_steps
        levels = self.params.codec.acoustic_codebook_size - 1
        acoustic = ((x.clamp(-1, 1) + 1) / 2 * levels).round().long() + N_SPECIAL_IDS
        acoustic = acoustic.masked_fill((semantic == END_AUDIO)[:, None], N_SPECIAL_IDS)
        return torch.cat([semantic[:, None], acoustic], dim=1)

    def semantic_ids(self, hidden: Tensor) -> Tensor:
        """[B, dim] -> [B] int64: the likeliest id, END_AUDIO among them; EMPTY_AUDIO and the padding rows are not."""
        logits = self.semantic_codebook_output(hidden.to(self.dtype))
        end = self.params.codec.semantic_codebook_size + N_SPECIAL_IDS
        return logits[:, END_AUDIO:end].float().argmax(dim=-1) + END_AUDIO

    def _time_tokens(self, t: Tensor) -> Tensor:
        """Times [N] -> tokens [N, dim]: projected cosines and sines of t * 10000**(-i / (dim / 2))."""
        half = self.params.acoustic.dim // 2
        angles = t.float()[:, None] * 10000 ** (-torch.arange(half, device=t.device) / half)
        return self.time_projection(torch.cat([angles.cos(), angles.sin()], dim=1).to(self.dtype))

    def _velocity(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """x [B, acoustic_dim], tokens time [B, dim] or [dim], condition [B, dim] -> [B, acoustic_dim] float32"""
        h = torch.stack([self.input_projection(x.to(self.dtype)), time.expand_as(condition), condition], dim=1)
        h = h.to(self.dtype)  # under autocast fp32 weights train on an fp32 residual stream
        for layer in self.layers:
            h = layer(h)
        return self.acoustic_codebook_output(self.norm(h[:, 0])).float()
