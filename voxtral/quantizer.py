"""Semantic vector quantization and acoustic finite scalar quantization (spec section 3, paper section 2.1)."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from voxtral.params import CodecParams


class SemanticCodebook(nn.Module):
    """EMA codebook, stored as the checkpoint stores it: entry k is embedding_sum[k] / max(cluster_usage[k], 1e-5)."""

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.register_buffer("cluster_usage", torch.ones(size))
        self.register_buffer("embedding_sum", torch.randn(size, dim))

    @property
    def embedding(self) -> Tensor:
        """[size, dim] float32"""
        return self.embedding_sum.float() / self.cluster_usage.float().clamp(min=1e-5)[:, None]

    def encode(self, x: Tensor) -> Tensor:
        """[..., dim] -> nearest entry by Euclidean distance [...] int64, table and distances in x's dtype"""
        entries = self.embedding_sum.to(x.dtype) / self.cluster_usage.to(x.dtype).clamp(min=1e-5)[:, None]
        return torch.cdist(x.reshape(1, -1, x.shape[-1]), entries[None])[0].argmin(-1).view(x.shape[:-1])

    def decode(self, codes: Tensor) -> Tensor:
        """[...] -> [..., dim] float32"""
        return nn.functional.embedding(codes, self.embedding)

    @torch.no_grad()
    def start_from(self, x: Tensor, generator: torch.Generator) -> None:
        """Places every entry near one of the vectors [N, dim], before a whole codec is trained: entries that lie
        nowhere near the encoder's latents would all be dead but one."""
        chosen = x.float()[torch.randint(len(x), (len(self.cluster_usage),), generator=generator, device=x.device)]
        noise = torch.randn(chosen.shape, generator=generator, device=x.device)
        self.cluster_usage.fill_(1.0)
        self.embedding_sum.copy_(chosen + 0.1 * x.float().std(dim=0) * noise)

    @torch.no_grad()
    def update(
        self, x: Tensor, valid: Tensor, generator: torch.Generator, decay: float = 0.99, dead_share: float = 0.1
    ):
        """EMA step towards those of the vectors [N, dim] that are `valid` [N] (only when a whole codec is trained).

        Entries used less than `dead_share` of the average restart at vectors of this batch. Processes share their
        statistics and the vectors of rank 0. The device is not waited for.
        """
        x, weight = x.float(), valid.float()
        codes = self.encode(x)
        usage = torch.zeros_like(self.cluster_usage).index_add_(0, codes, weight)
        total = torch.zeros_like(self.embedding_sum).index_add_(0, codes, x * weight[:, None])
        draws = torch.rand(len(usage), generator=generator, device=x.device)
        count = valid.cumsum(0)  # the n-th valid vector is the first at which this is n
        restart = x[torch.searchsorted(count, (draws * count[-1]).long() + 1)]
        if dist.is_initialized():
            dist.all_reduce(usage)
            dist.all_reduce(total)
            dist.broadcast(restart, src=0)
        average = usage.mean()
        self.cluster_usage.lerp_(usage, 1 - decay)
        self.embedding_sum.lerp_(total, 1 - decay)
        dead = self.cluster_usage < dead_share * average
        self.embedding_sum.copy_(torch.where(dead[:, None], restart * average, self.embedding_sum))
        self.cluster_usage.copy_(torch.where(dead, average, self.cluster_usage))


@dataclass
class QuantizationDraws:
    """The random choices of a batch: `semantic`, `acoustic` [B] in [0, 1); `noise` [B, acoustic_dim, L] in [-1, 1)."""

    semantic: Tensor
    acoustic: Tensor
    noise: Tensor

    @staticmethod
    def sample(
        seed: int, batch_size: int, acoustic_dim: int, n_frames: int, device, rank: int = 0, world_size: int = 1
    ) -> "QuantizationDraws":
        """Draws for `batch_size` clips of this process; together the processes draw what one with all clips would."""
        generator = torch.Generator(device=device).manual_seed(seed)
        mine = slice(rank * batch_size, (rank + 1) * batch_size)
        shape = (world_size * batch_size, 2 + acoustic_dim * n_frames)
        draws = torch.rand(shape, generator=generator, device=device)[mine]
        noise = 2 * draws[:, 2:].view(batch_size, acoustic_dim, n_frames) - 1
        return QuantizationDraws(draws[:, 0], draws[:, 1], noise)


class Quantizer(nn.Module):
    """Latent [B, semantic_dim + acoustic_dim, L] <-> codes [B, 1 + acoustic_dim, L] (semantic first)."""

    def __init__(self, params: CodecParams):
        super().__init__()
        self.semantic_codebook = SemanticCodebook(params.semantic_codebook_size, params.semantic_dim)
        self.semantic_dim, self.acoustic_dim = params.semantic_dim, params.acoustic_dim
        self.n_levels = params.acoustic_codebook_size

    def levels(self, squashed: Tensor) -> Tensor:
        """tanh'd values in [-1, 1] -> levels 0 ... n_levels - 1, as float (round half to even, as torch does)"""
        return ((squashed + 1) / 2 * (self.n_levels - 1)).round()

    def encode(self, latent: Tensor) -> Tensor:
        """[B, semantic_dim + acoustic_dim, L] -> codes [B, 1 + acoustic_dim, L] int64. The only tanh is here.

        Computed in the latent's dtype, also under autocast: of serving's bf16 latent these are serving's codes.
        """
        with torch.autocast(latent.device.type, enabled=False):
            semantic = self.semantic_codebook.encode(latent[:, : self.semantic_dim].transpose(1, 2))
        # A diverged encoder's NaN has no level: as an index it would end the process before the loss guard speaks.
        acoustic = self.levels(latent[:, self.semantic_dim :].tanh()).nan_to_num().long()
        return torch.cat([semantic[:, None], acoustic], dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """codes [B, 1 + acoustic_dim, L] -> quantized latent [B, semantic_dim + acoustic_dim, L] float32"""
        semantic = self.semantic_codebook.decode(codes[:, 0]).transpose(1, 2)
        acoustic = codes[:, 1:].float() * 2 / (self.n_levels - 1) - 1
        return torch.cat([semantic, acoustic], dim=1)

    def squash(self, latent: Tensor) -> Tensor:
        """[B, semantic_dim + acoustic_dim, L] -> what the decoder sees of it where nothing is quantized."""
        return torch.cat([latent[:, : self.semantic_dim], latent[:, self.semantic_dim :].tanh()], dim=1)

    def straight_through(self, squashed: Tensor, codes: Tensor) -> Tensor:
        """The quantized latent of `codes`, with the gradient of `squashed` [B, semantic_dim + acoustic_dim, L]"""
        return squashed + (self.decode(codes) - squashed).detach()

    def forward(self, latent: Tensor, draws: QuantizationDraws) -> tuple[Tensor, Tensor, Tensor]:
        """Stochastic quantization of training (paper section 2.1), chosen clip by clip.

        Semantic: quantized with straight-through gradient for half of the clips, passed through for the rest.
        Acoustic, after tanh: 50 % rounded with straight-through gradient, 25 % given uniform noise of magnitude
        1 / n_levels, 25 % passed through.
        Returns (mixed [B, semantic_dim + acoustic_dim, L] for the decoder, codes [B, 1 + acoustic_dim, L],
        quantized semantic with straight-through gradient [B, semantic_dim, L]).
        """
        latent = latent.float()
        codes = self.encode(latent.detach())
        squashed = self.squash(latent)
        quantized = self.straight_through(squashed, codes)
        sizes = [self.semantic_dim, self.acoustic_dim]
        (semantic, passed), (semantic_ste, acoustic_ste) = squashed.split(sizes, dim=1), quantized.split(sizes, dim=1)

        quantize_semantic = (draws.semantic < 0.5)[:, None, None]
        choice = draws.acoustic[:, None, None]
        acoustic = torch.where(
            choice < 0.5, acoustic_ste, torch.where(choice < 0.75, passed + draws.noise / self.n_levels, passed)
        )
        mixed = torch.cat([torch.where(quantize_semantic, semantic_ste, semantic), acoustic], dim=1)
        return mixed, codes, semantic_ste
