"""The frame loop of Voxtral TTS (spec section 6): acoustic transformer, audio embedding, backbone, and around again.

On a GPU one frame is one CUDA graph: it is hundreds of kernels of a few microseconds each, and launching them one by
one would take longer than running them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from voxtral.acoustic import CFG_ALPHA, AcousticTransformer
from voxtral.backbone import Backbone
from voxtral.cached_backbone import CachedBackbone
from voxtral.codec import VoxtralCodec, codebook_offsets
from voxtral.params import round_up

PROMPT_MULTIPLE = 8  # slots; attention kernels want aligned masks
WARM_UP_STEPS = 3  # before a capture: libraries allocate their workspaces in the first ones


@dataclass
class Models:
    """Everything between a prompt and a waveform, on one device."""

    backbone: Backbone
    acoustic: AcousticTransformer
    codec: VoxtralCodec

    @classmethod
    def from_checkpoint(cls, folder, device="cpu", dtype: torch.dtype = torch.bfloat16) -> "Models":
        """dtype: of backbone and acoustic transformer; the codec is small and stays float32. Raises CheckpointError."""
        return cls(
            Backbone.from_checkpoint(folder, device, dtype),
            AcousticTransformer.from_checkpoint(folder, device, dtype),
            VoxtralCodec.from_checkpoint(folder, device),
        )


class FrameLoop:
    """Generates frames for `batch_size` prompts at once, at most `max_frames` each, in at most `n_slots` of cache.

    All state lies in tensors of fixed size: `ids` [B, max_frames, 37] int64 fills up from the left, one `step` a frame.
    Nothing here looks for END_AUDIO: that would wait for the device.
    """

    def __init__(
        self,
        backbone: CachedBackbone,
        acoustic: AcousticTransformer,
        codec: VoxtralCodec,
        batch_size: int,
        n_slots: int,
        max_frames: int,
    ):
        device, dtype = backbone.device, backbone.dtype
        self.backbone, self.acoustic, self.table = backbone, acoustic, codec.audio_embedding
        self.offsets = codebook_offsets(codec.params).to(device)
        self.cache = backbone.new_cache(batch_size, n_slots)
        self.max_frames = max_frames
        self.noise = torch.zeros(batch_size, max_frames, codec.params.acoustic_dim, device=device)
        self.cfg_alpha = torch.zeros(batch_size, 1, device=device)
        self.ids = torch.zeros(batch_size, max_frames, codec.params.n_codebooks, dtype=torch.long, device=device)
        self.hidden = torch.zeros(batch_size, backbone.sizes.dim, dtype=dtype, device=device)
        self.n_padding = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.frame = torch.zeros(1, dtype=torch.long, device=device)  # the next one
        self.slot = torch.zeros(1, dtype=torch.long, device=device)  # of the cache, for the next frame's embedding
        self.step: Callable[[], None] = graphed(self._step, self._rewind) if device.type == "cuda" else self._step

    def start(self, prompts: list[Tensor], noise: Tensor, cfg_alpha: float | Tensor = CFG_ALPHA) -> None:
        """Runs the prompts [S_i, dim], padded on the left to one length. noise [B, n, acoustic_dim] float32: of frames
        0 ... n - 1, n <= max_frames; cfg_alpha: one, or [B, 1]."""
        length = prompt_slots(prompts)
        padded = torch.stack([F.pad(prompt, (0, 0, length - len(prompt), 0)) for prompt in prompts])
        self.n_padding.copy_(torch.tensor([length - len(prompt) for prompt in prompts]))
        self.noise[:, : noise.shape[1]].copy_(noise)
        self.cfg_alpha.copy_(torch.as_tensor(cfg_alpha))
        slots = torch.arange(length, device=padded.device)
        hidden = self.backbone(padded.to(self.hidden.dtype), self.cache, slots, self.n_padding, length)
        self.hidden.copy_(hidden[:, -1])
        self.frame.fill_(0)
        self.slot.fill_(length)

    def _step(self) -> None:
        ids = self.acoustic.frame(self.hidden, self.noise.index_select(1, self.frame)[:, 0], self.cfg_alpha)
        self.ids.index_copy_(1, self.frame, ids[:, None])
        x = F.embedding(ids + self.offsets, self.table).sum(dim=1, keepdim=True).to(self.hidden.dtype)  # [B, 1, dim]
        self.hidden.copy_(self.backbone(x, self.cache, self.slot, self.n_padding, self.cache.n_slots)[:, 0])
        self.frame.add_(1)
        self.slot.add_(1)

    def _rewind(self) -> None:
        self.frame.fill_(0)
        self.slot.fill_(0)


def prompt_slots(prompts: list[Tensor]) -> int:
    """Slots that these prompts [S_i, dim] take, padding included."""
    return round_up(max(len(prompt) for prompt in prompts), PROMPT_MULTIPLE)


def graphed(step: Callable[[], None], rewind: Callable[[], None] = lambda: None) -> Callable[[], None]:
    """Captures `step`, which reads and writes tensors that stay where they are, as a CUDA graph; returns its replay.

    `rewind` puts back the state that the warm-up steps have moved on.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(WARM_UP_STEPS):
            step()
            rewind()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        step()
    return graph.replay
