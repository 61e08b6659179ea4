"""Decoding codes chunk by chunk, so that the first audio comes early and long audio needs constant memory.

The decoder is causal over frames: what a chunk needs of the past is a fixed number of frames, and with them in front
its samples equal those of decoding everything at once. Only the very first samples look ahead, as the last convolution
mirrors the first patches to the left, and those lie within the first frame.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from voxtral.codec import VoxtralCodec
from voxtral.layers import CausalConvTranspose1d, Transformer

CHUNK_FRAMES = 50  # 4 s: the context in front costs less than half as much again


def left_context(codec: VoxtralCodec) -> int:
    """Frames before a frame that its samples depend on: 21 in the released codec.

    Counted from the output back, in positions of each stage, which all begin where the frame does: every attention
    layer looks its window back, a convolution kernel - 1, a transposed one divides that by its stride.
    """
    context = codec.params.patch_proj_kernel_size - 1
    for block in reversed(codec.decoder_blocks):
        if isinstance(block, Transformer):
            context += sum(layer.attention.window for layer in block.layers)
        else:
            stride = block.conv.stride[0] if isinstance(block, CausalConvTranspose1d) else 1
            context = (context + block.conv.kernel_size[0] - 1) // stride
    return context


class StreamingDecoder:
    """Turns a growing sequence of codes into the samples that are new."""

    def __init__(self, codec: VoxtralCodec, chunk_frames: int = CHUNK_FRAMES):
        self.codec, self.chunk_frames = codec, chunk_frames
        self.context = left_context(codec)
        self.n_frames = 0  # decoded so far

    @torch.no_grad()
    def extend(self, codes: Tensor) -> Iterator[Tensor]:
        """All codes so far [B, 1 + acoustic_dim, L] -> samples [B, n * 1920] float32, on the CPU, of the frames not
        decoded yet, at most chunk_frames at a time."""
        frame_size = self.codec.params.frame_size
        while self.n_frames < codes.shape[-1]:
            start, end = self.n_frames, min(self.n_frames + self.chunk_frames, codes.shape[-1])
            first = max(0, start - self.context)
            samples = self.codec.decode(codes[..., first:end].to(self.codec.audio_embedding.device))[:, 0]
            self.n_frames = end
            yield samples[:, (start - first) * frame_size :].float().cpu()


def decode_batch(codec: VoxtralCodec, codes: list[Tensor]) -> list[Tensor]:
    """Codes [1 + acoustic_dim, L_i] -> samples [L_i * 1920] float32 on the CPU; L_i may be 0. Decoded side by side."""
    longest = max(c.shape[-1] for c in codes)
    if not longest:
        return [torch.zeros(0) for _ in codes]
    padded = torch.stack([F.pad(c, (0, longest - c.shape[-1])) for c in codes])
    samples = torch.cat(list(StreamingDecoder(codec).extend(padded)), dim=1)
    return [s[: c.shape[-1] * codec.params.frame_size].clone() for s, c in zip(samples, codes)]
