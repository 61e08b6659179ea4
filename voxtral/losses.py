"""Losses of phase 1 (paper section 2.1) and the balancer. Waveforms are [B, 1, T]; `lengths` [B] counts valid samples.

Padding never counts: every loss is averaged over a clip's valid samples or frames first, then over the clips, so two
processes with half of a batch each average to the same value as one process with all of it.
"""

import math
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
import torch.nn.functional as F
import torchaudio
from torch import Tensor, nn

from voxtral.codec import mask_samples, valid_mask
from voxtral.quantizer import Quantizer


@dataclass
class LossWeights:
    """The map of weights. A loss of weight 0 that needs something of its own (feature, asr, speaker, match) is not built."""

    l1: float = 1.0  # L1 between waveforms, decaying with gamma^t
    stft: float = 1.0  # L1 between STFT magnitudes, decaying with gamma^t
    mel: float = 1.0  # multi-scale mel distance (not in the paper)
    feature: float = 0.0  # feature matching through the discriminators (alpha)
    asr: float = 0.0  # Whisper distillation (beta)
    commit: float = 0.1  # commitment of the semantic latent (delta)
    diversity: float = 0.0  # entropy of the soft codebook assignment (not in the paper)
    speaker: float = 0.0  # cosine distance of a frozen speaker encoder (not in the paper)
    match: float = 0.3  # statistics of the codes against those of known ones (not in the paper)
    codes: float = 0.0  # clips whose codes are known must give them (not in the paper)


DECAYING = ("l1", "stft")  # multiplied by gamma^t
ON_WAVEFORM = ("l1", "stft", "mel", "feature", "speaker")  # depend on the reconstruction: what a balancer may balance
LOSS_NAMES = tuple(f.name for f in fields(LossWeights))


# ---------------------------------------------------------------- reconstruction


def clip_mean(values: Tensor, valid: Tensor) -> Tensor:
    """Mean over positions t < valid[i] of every clip, then over the clips. values [B, ..., T], valid [B]."""
    mask = torch.arange(values.shape[-1], device=values.device) < valid.view(-1, *[1] * (values.dim() - 1))
    per_position = values[0].numel() // values.shape[-1]
    sums = torch.where(mask, values, 0.0).flatten(1).sum(1)
    return (sums / (valid * per_position)).mean()


def l1_loss(prediction: Tensor, target: Tensor, lengths: Tensor) -> Tensor:
    """L1 between waveforms: scalar."""
    return clip_mean((prediction - target).abs(), lengths)


def stft_magnitude(waveform: Tensor, fft_size: int, normalized: bool) -> Tensor:
    """[B, 1, T] -> [B, fft_size // 2 + 1, 1 + T // hop] in float32; Hann window, hop fft_size / 4, centred frames.

    `normalized` divides by sqrt(fft_size), so that sizes weigh alike.
    """
    window = torch.hann_window(fft_size, device=waveform.device)
    spectrum = torch.stft(
        waveform[:, 0].float(), fft_size, fft_size // 4, window=window, normalized=normalized, return_complex=True
    )
    # A magnitude has no gradient at 0 (digital silence): the floor keeps it finite.
    return (spectrum.real.square() + spectrum.imag.square()).clamp(min=1e-12).sqrt()


def n_valid_frames(lengths: Tensor, hop: int) -> Tensor:
    """Centred STFT frames whose centre lies inside the clip."""
    return (lengths - 1) // hop + 1


def stft_loss(prediction: Tensor, target: Tensor, lengths: Tensor, fft_sizes: list[int]) -> Tensor:
    """L1 between STFT magnitudes, mean over bins, frames and the FFT sizes. The paper names no sizes."""
    prediction, target = mask_samples(prediction, lengths), mask_samples(target, lengths)
    losses = [
        clip_mean(
            (stft_magnitude(prediction, n, True) - stft_magnitude(target, n, True)).abs(),
            n_valid_frames(lengths, n // 4),
        )
        for n in fft_sizes
    ]
    return torch.stack(losses).mean()


class MelDistance(nn.Module):
    """Mel distance as audiotools defines it: for each window (2048: 150 mels, 512: 80; hop window / 4), L1 of
    log10(clamp(m, 1e-5)^2) plus L1 of m, summed over the windows. m: Slaney mel bands of STFT magnitudes.

    Used as validation metric, and as a loss where `loss.mel` > 0.
    """

    def __init__(self, sampling_rate: int, windows=((2048, 150), (512, 80))):
        super().__init__()
        self.windows = [window for window, _ in windows]
        for window, n_mels in windows:
            bands = torchaudio.functional.melscale_fbanks(
                window // 2 + 1, 0.0, sampling_rate / 2, n_mels, sampling_rate, norm="slaney", mel_scale="slaney"
            )
            self.register_buffer(f"bands_{window}", bands.T.contiguous(), persistent=False)

    def forward(self, prediction: Tensor, target: Tensor, lengths: Tensor) -> Tensor:
        prediction, target = mask_samples(prediction, lengths), mask_samples(target, lengths)
        total = 0.0
        for window in self.windows:
            bands = getattr(self, f"bands_{window}")
            with torch.autocast(prediction.device.type, enabled=False):
                a, b = (bands @ stft_magnitude(x, window, False) for x in (prediction, target))
            log_difference = (a.clamp(min=1e-5).square().log10() - b.clamp(min=1e-5).square().log10()).abs()
            total = total + clip_mean(log_difference + (a - b).abs(), n_valid_frames(lengths, window // 4))
        return total


def stft_distance(prediction: Tensor, target: Tensor, lengths: Tensor) -> Tensor:
    """STFT distance as audiotools defines it: the mel distance's formula on magnitudes of windows 2048 and 512."""
    prediction, target = mask_samples(prediction, lengths), mask_samples(target, lengths)
    total = 0.0
    for window in (2048, 512):
        a, b = stft_magnitude(prediction, window, False), stft_magnitude(target, window, False)
        log_difference = (a.clamp(min=1e-5).square().log10() - b.clamp(min=1e-5).square().log10()).abs()
        total = total + clip_mean(log_difference + (a - b).abs(), n_valid_frames(lengths, window // 4))
    return total


# ---------------------------------------------------------------- codes


def commitment_loss(semantic: Tensor, quantized: Tensor, n_frames: Tensor) -> Tensor:
    """Mean squared distance of the semantic latent [B, D, L] to its codebook entry, no gradient to the entry.

    The mean (over channels) is ours: the paper writes a norm and leaves its scale open.
    """
    return clip_mean((semantic - quantized.detach()).square(), n_frames)


SEMANTIC_SHARE = 0.25  # of the semantic codes in codes_loss, against the levels


def codes_loss(latent: Tensor, codes: Tensor, quantizer: Quantizer, scale: Tensor) -> Tensor:
    """What the latent [B, D, L] lacks to the known codes [B, 1 + acoustic_dim, L], -1 where they are not known: L1 of the
    levels in units of [-1, 1], and the cross-entropy of the codebook's entries by their squared distance in units of
    `scale` (codebook_scale). Mean over the known frames of a clip, then over all clips: one without any counts as 0."""
    known, squashed, semantic = codes[:, 0] >= 0, quantizer.squash(latent), quantizer.semantic_dim
    wanted = quantizer.decode(codes.clamp(min=0))[:, semantic:]
    distance = codebook_distance(squashed[:, :semantic], quantizer.semantic_codebook.embedding).view(*known.shape, -1)
    entropy = F.cross_entropy((-distance / scale).transpose(1, 2), codes[:, 0].clamp(min=0), reduction="none")
    per_frame = (squashed[:, semantic:] - wanted).abs().mean(dim=1) + SEMANTIC_SHARE * entropy
    return ((per_frame * known).sum(dim=1) / known.sum(dim=1).clamp(min=1)).mean()


def codebook_scale(codebook: Tensor) -> Tensor:
    """Median squared distance of a codebook's entries [K, D] to their nearest neighbour: the natural unit of distances."""
    distance = torch.cdist(codebook[None], codebook[None])[0].square()
    return distance.fill_diagonal_(torch.inf).amin(dim=1).median()


def codebook_distance(semantic: Tensor, codebook: Tensor) -> Tensor:
    """Squared distances of the semantic latent [B, D, L] to the entries of the codebook [K, D]: [B * L, K]"""
    x = semantic.transpose(1, 2)
    return torch.cdist(x.reshape(1, -1, x.shape[-1]), codebook[None])[0].square()


def diversity_loss(semantic: Tensor, codebook: Tensor, scale: Tensor, n_frames: Tensor) -> Tensor:
    """1 - normalised entropy of the mean soft assignment of the semantic latent [B, D, L] to the codebook [K, D].

    0 when all entries are used alike, 1 when a single one is. `scale` (codebook_scale) is the temperature. The mean
    assignment is taken over all processes.
    """
    weight = (valid_mask(n_frames, semantic.shape[-1]).float() / n_frames[:, None] / len(semantic)).reshape(-1, 1)
    mean = ((-codebook_distance(semantic, codebook) / scale).softmax(dim=1) * weight).sum(dim=0)
    if dist.is_initialized():
        mean = dist_nn.all_reduce(mean) / dist.get_world_size()
    entropy = -(mean * mean.clamp(min=1e-12).log()).sum()
    return 1 - entropy / math.log(len(codebook))


# ---------------------------------------------------------------- discriminators


def feature_matching_loss(real: list[list[Tensor]], fake: list[list[Tensor]], valid_share: Tensor) -> Tensor:
    """L1 between features of real and decoded audio, mean over layers and discriminators (paper: in place of an
    adversarial loss). Features [B, C, frames, bins] of masked waveforms; `valid_share` [B]: valid part of a clip.
    """
    losses = []
    for real_maps, fake_maps in zip(real, fake, strict=True):
        for a, b in zip(real_maps, fake_maps, strict=True):
            # Beyond a clip's end both inputs are silent and the difference is 0: dividing by the share excludes it.
            losses.append(((b - a.detach()).abs().mean(dim=(1, 2, 3), dtype=torch.float32) / valid_share).mean())
    return torch.stack(losses).mean()


def discriminator_hinge_loss(real: list[Tensor], fake: list[Tensor], valid_share: Tensor) -> Tensor:
    """mean(relu(1 - D(real))) + mean(relu(1 + D(fake))) over valid frames, mean over discriminators. Logits [B, 1, frames, bins]."""
    losses = []
    for a, b in zip(real, fake, strict=True):
        valid = (valid_share * a.shape[2]).ceil().long()
        hinge = F.relu(1 - a.float()) + F.relu(1 + b.float())
        losses.append(clip_mean(hinge.transpose(2, 3), valid))
    return torch.stack(losses).mean()


# ---------------------------------------------------------------- balancer


class Balancer:
    """EnCodec's loss balancer (Defossez et al. 2022, section 3.4): gradients w.r.t. one tensor, scaled to fixed shares.

    The combined gradient is sum_i w_i / sum(w) * g_i / avg|g_i|, with an exponential average of the gradient norms.
    Every balanced loss must depend on that tensor: one that does not is an error, never dropped.
    """

    def __init__(self, decay: float = 0.999):
        self.decay = decay
        self.norms: dict[str, Tensor] = {}  # decayed sums of gradient norms
        self.counts: dict[str, float] = {}  # decayed numbers of steps: their ratio is a bias-free average

    def gradient(self, losses: dict[str, Tensor], weights: dict[str, float], tensor: Tensor) -> Tensor:
        """Balanced d(losses)/d(tensor); the batch is the first axis of `tensor`."""
        gradients = {}
        for name, loss in losses.items():
            try:
                gradients[name] = torch.autograd.grad(loss, tensor, retain_graph=True)[0]
            except RuntimeError as error:
                raise ValueError(
                    f"loss.{name} does not depend on the balanced tensor: balancing would drop it."
                ) from error
        norms = torch.stack([g.float().flatten(1).norm(dim=1).mean() for g in gradients.values()])
        if dist.is_initialized():
            dist.all_reduce(norms)
            norms /= dist.get_world_size()
        combined, share = torch.zeros_like(tensor), sum(weights[name] for name in losses)
        for (name, gradient), norm in zip(gradients.items(), norms):
            self.norms[name] = self.decay * self.norms.get(name, 0.0) + norm
            self.counts[name] = self.decay * self.counts.get(name, 0.0) + 1
            average = (self.norms[name] / self.counts[name]).clamp(min=1e-12)
            combined += weights[name] / share * gradient / average
        return combined

    def state_dict(self) -> dict:
        return {"norms": self.norms, "counts": self.counts}

    def load_state_dict(self, state: dict) -> None:
        self.norms, self.counts = state["norms"], state["counts"]
