"""Losses of phase 1 (paper section 2.1). Waveforms are [B, 1, T]; `lengths` [B] counts valid samples.

Padding never counts: every loss is averaged over a clip's valid samples or frames first, then over the clips, so two
processes with half of a batch each average to the same value as one process with all of it.
"""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor, nn

from voxtral.codec import mask_samples
from voxtral.quantizer import Quantizer


@dataclass
class LossWeights:
    """The map of weights. A loss of weight 0 that needs something of its own (feature, asr, match) is not built."""

    l1: float = 1.0  # L1 between waveforms, decaying with gamma^t
    stft: float = 1.0  # L1 between STFT magnitudes, decaying with gamma^t
    mel: float = 1.0  # multi-scale mel distance (not in the paper)
    feature: float = 0.0  # feature matching through the discriminators (alpha)
    asr: float = 0.0  # Whisper distillation (beta)
    commit: float = 0.1  # commitment of the semantic latent (delta)
    match: float = 0.3  # statistics of the codes against those of known ones (not in the paper)
    codes: float = 0.0  # clips whose codes are known must give them (not in the paper)


DECAYING = ("l1", "stft")  # multiplied by gamma^t
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
    """What the latent [B, D, L] lacks to the known codes [B, 1 + acoustic_dim, L], -1 where they are not known: L1 of
    the levels in units of [-1, 1], and the cross-entropy of the codebook's entries by their squared distance in units
    of `scale` (codebook_scale). Mean over the known frames of a clip, then over all clips: one without any counts as
    0."""
    known, squashed, semantic = codes[:, 0] >= 0, quantizer.squash(latent), quantizer.semantic_dim
    wanted = quantizer.decode(codes.clamp(min=0))[:, semantic:]
    distance = codebook_distance(squashed[:, :semantic], quantizer.semantic_codebook.embedding).view(*known.shape, -1)
    entropy = F.cross_entropy((-distance / scale).transpose(1, 2), codes[:, 0].clamp(min=0), reduction="none")
    per_frame = (squashed[:, semantic:] - wanted).abs().mean(dim=1) + SEMANTIC_SHARE * entropy
    return ((per_frame * known).sum(dim=1) / known.sum(dim=1).clamp(min=1)).mean()


def codebook_scale(codebook: Tensor) -> Tensor:
    """Median squared distance of a codebook's entries [K, D] to their nearest neighbour: the natural unit of
    distances."""
    distance = torch.cdist(codebook[None], codebook[None])[0].square()
    return distance.fill_diagonal_(torch.inf).amin(dim=1).median()


def codebook_distance(semantic: Tensor, codebook: Tensor) -> Tensor:
    """Squared distances of the semantic latent [B, D, L] to the entries of the codebook [K, D]: [B * L, K]"""
    x = semantic.transpose(1, 2)
    return torch.cdist(x.reshape(1, -1, x.shape[-1]), codebook[None])[0].square()


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
    """mean(relu(1 - D(real))) + mean(relu(1 + D(fake))) over valid frames, mean over discriminators. Logits [B, 1,
    frames, bins]."""
    losses = []
    for a, b in zip(real, fake, strict=True):
        valid = (valid_share * a.shape[2]).ceil().long()
        hinge = F.relu(1 - a.float()) + F.relu(1 + b.float())
        losses.append(clip_mean(hinge.transpose(2, 3), valid))
    return torch.stack(losses).mean()
