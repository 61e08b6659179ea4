"""Building blocks of the codec: causal convolutions and transformers with a sliding window.

Attribute names give the checkpoint's tensor names. All of it follows serving (spec section 3).
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from voxtral.params import CodecParams

# Said once by every process that runs fp32 weights under bf16 autocast; the norms are a small part of the time.
warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")


class CausalConv1d(nn.Module):
    """[B, C_in, T] -> [B, C_out, ceil(T / stride)]; no output depends on samples right of its window.

    The last, partial window is completed on the right with the same pad mode. With `reflect`, the first kernel - 1
    outputs mirror inputs 1 ... kernel - 1: they do depend on that much of the future.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, pad_mode: str = "replicate"
    ):
        super().__init__()
        self.conv = weight_norm(nn.Conv1d(in_channels, out_channels, kernel_size, stride=stride, bias=False))
        self.kernel_size, self.stride, self.pad_mode = kernel_size, stride, pad_mode

    def forward(self, x: Tensor) -> Tensor:
        left = self.kernel_size - self.stride
        right = -x.shape[-1] % self.stride
        # A reflection needs more samples than it mirrors: zeros make room, and are cut off again.
        room = max(0, max(left, right) + 1 - x.shape[-1]) if self.pad_mode == "reflect" else 0
        x = F.pad(F.pad(x, (0, room)), (left, right), mode=self.pad_mode)
        x = x[..., : x.shape[-1] - room]
        return conv1d_product(x, self.conv.weight, self.stride) if trains_on_gpu(x) else self.conv(x)


class CausalConvTranspose1d(nn.Module):
    """[B, C, T] -> [B, C_out, T * stride]; the kernel - stride surplus samples are trimmed on the right."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int):
        super().__init__()
        self.conv = weight_norm(nn.ConvTranspose1d(in_channels, out_channels, kernel_size, stride=stride, bias=False))
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = conv_transpose1d_product(x, self.conv.weight, self.stride) if trains_on_gpu(x) else self.conv(x)
        return y[..., : x.shape[-1] * self.stride]


def trains_on_gpu(x: Tensor) -> bool:
    """Whether convolutions are matrix products: between transformers, in whose memory channels come last, cuDNN's turn
    the layout round twice. They need more memory, so long clips are left to PyTorch, as serving leaves all."""
    return x.is_cuda and torch.is_grad_enabled()


def conv1d_product(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """F.conv1d of [B, C_in, T] by [C_out, C_in, kernel], over windows side by side."""
    x, kernel = x.transpose(1, 2), weight.shape[2]
    reach = x.shape[1] - kernel + 1  # of the windows' first samples
    windows = torch.cat([x[:, i : i + reach : stride] for i in range(kernel)], dim=-1)
    return F.linear(windows, weight.transpose(1, 2).flatten(1)).transpose(1, 2)


def conv_transpose1d_product(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """F.conv_transpose1d of [B, C, T] by [C, C_out, kernel], the first T * stride samples: `stride` of them from each
    position and those before it that reach there."""
    batch, _, time = x.shape
    n_positions = -(-weight.shape[2] // stride)
    x = F.pad(x.transpose(1, 2), (0, 0, n_positions - 1, 0))
    windows = torch.cat([x[:, i : i + time] for i in reversed(range(n_positions))], dim=-1)
    weight = F.pad(weight, (0, -weight.shape[2] % stride)).unflatten(2, (n_positions, stride))
    weight = weight.permute(3, 1, 2, 0).flatten(2).flatten(0, 1)  # [stride * C_out, n_positions * C]
    return F.linear(windows, weight).view(batch, time * stride, -1).transpose(1, 2)


def alibi_slopes(n_heads: int) -> Tensor:
    """[n_heads] slopes 2**(-8 h / n_heads), h = 0, 1, ...; the first is 1.

    For a head count that is no power of two: the slopes of the largest power of two below it, then every second slope
    of twice as many heads.
    """
    power = 1 << (n_heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * h / power) for h in range(power)]
    slopes += [2.0 ** (-8 * h / (2 * power)) for h in range(0, 2 * power, 2)][: n_heads - power]
    return torch.tensor(slopes)


class WindowAttention(nn.Module):
    """Causal attention over the last `window` positions and the position itself, biased by distance (ALiBi).

    [B, T, dim] -> [B, T, dim]. Queries are cut into blocks that each see their own block and the `window` keys before
    it, so time and memory grow with T * window. `q_norm`/`k_norm` span all heads together.
    """

    def __init__(self, params: CodecParams, window: int):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = params.n_heads, params.n_kv_heads, params.head_dim
        self.window, self.block = window, max(window, 16)
        width, kv_width = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        self.wq = nn.Linear(params.dim, width, bias=False)
        self.wk = nn.Linear(params.dim, kv_width, bias=False)
        self.wv = nn.Linear(params.dim, kv_width, bias=False)
        self.wo = nn.Linear(width, params.dim, bias=False)
        self.q_norm = nn.RMSNorm(width, eps=params.qk_norm_eps)
        self.k_norm = nn.RMSNorm(kv_width, eps=params.qk_norm_eps)
        self.register_buffer("slopes", alibi_slopes(self.n_heads), persistent=False)

    def bias(self, n_blocks: int, device) -> Tensor:
        """[n_blocks, n_heads, block, window + block] added to the scores: slope * (j - i), -inf outside the window."""
        query = torch.arange(self.block, device=device)[:, None]
        key = torch.arange(-self.window, self.block, device=device)[None, :]
        distance = (key - query).float()  # j - i <= 0
        bias = self.slopes.float()[:, None, None] * distance
        bias = bias.masked_fill((distance > 0) | (distance < -self.window), -torch.inf)
        bias = bias.expand(n_blocks, -1, -1, -1)
        before_start = (torch.arange(n_blocks, device=device)[:, None] == 0) & (key < 0)  # [n_blocks, window + block]
        return bias.masked_fill(before_start[:, None, None, :], -torch.inf)

    def blocks(self, x: Tensor, n_heads: int) -> Tensor:
        """[B, n_blocks * block, n_heads * head_dim] -> [B, n_blocks, n_heads, block, head_dim]"""
        return x.view(x.shape[0], -1, self.block, n_heads, self.head_dim).transpose(2, 3)

    def with_past(self, x: Tensor) -> Tensor:
        """[B, n_blocks, heads, block, head_dim] -> the same with the `window` positions before each block in front."""
        past = F.pad(x[:, :-1, :, self.block - self.window :], (0, 0, 0, 0, 0, 0, 1, 0))
        return torch.cat([past, x], dim=3).repeat_interleave(self.n_heads // self.n_kv_heads, dim=2)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        x = F.pad(x, (0, 0, 0, -time % self.block))
        query = self.blocks(self.q_norm(self.wq(x)), self.n_heads)
        key = self.with_past(self.blocks(self.k_norm(self.wk(x)), self.n_kv_heads))
        value = self.with_past(self.blocks(self.wv(x), self.n_kv_heads))
        scores = (query * self.head_dim**-0.5) @ key.transpose(-1, -2)  # [B, n_blocks, heads, block, window + block]
        weights = (scores.float() + self.bias(query.shape[1], x.device)).softmax(dim=-1).to(value.dtype)
        mixed = (weights @ value).transpose(2, 3).reshape(batch, -1, self.n_heads * self.head_dim)
        return self.wo(mixed[:, :time])


class FeedForward(nn.Module):
    """SwiGLU: [..., dim] -> [..., dim]."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerLayer(nn.Module):
    """Pre-norm layer whose two branches are scaled per channel (LayerScale). [B, T, dim] -> [B, T, dim]."""

    def __init__(self, params: CodecParams, window: int):
        super().__init__()
        self.attention_norm = nn.RMSNorm(params.dim, eps=params.norm_eps)
        self.attention = WindowAttention(params, window)
        self.attention_scale = nn.Parameter(torch.full((params.dim,), params.layer_scale_init))
        self.ffn_norm = nn.RMSNorm(params.dim, eps=params.norm_eps)
        self.feed_forward = FeedForward(params.dim, params.hidden_dim)
        self.ffn_scale = nn.Parameter(torch.full((params.dim,), params.layer_scale_init))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention_scale * self.attention(self.attention_norm(x))
        return x + self.ffn_scale * self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """[B, dim, T] -> [B, dim, T]: layers that all see the same window.

    Without gradients, a long clip is worked on piece by piece, each behind as much of its past as the layers see:
    the same result, and the memory for hidden states does not grow with T.
    """

    PIECE = 4096  # positions

    def __init__(self, params: CodecParams, n_layers: int, window: int):
        super().__init__()
        self.layers = nn.ModuleList(TransformerLayer(params, window) for _ in range(n_layers))
        self.past = n_layers * window

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        if torch.is_grad_enabled() or x.shape[1] <= self.PIECE:
            return self.run(x).transpose(1, 2)
        pieces = []
        for start in range(0, x.shape[1], self.PIECE):
            first = max(0, start - self.past)
            pieces.append(self.run(x[:, first : start + self.PIECE])[:, start - first :])
        return torch.cat(pieces, dim=1).transpose(1, 2)

    def run(self, x: Tensor) -> Tensor:
        """[B, T, dim] -> [B, T, dim]"""
        for layer in self.layers:
            x = layer(x)
        return x
