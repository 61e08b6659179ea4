"""Losses of phase 1 (paper section 2.1). Waveforms are [B, 1, T]; `lengths` [B] counts valid samples.

Padding never counts: every loss is averaged over a clip's valid samples or frames first, then over the clips, so two
processes with half of a batch each average to the same value as one process with all of it.
"""

from dataclasses import dataclass

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


# ---------------------------------------------------------------- reconstruction


def clip_mean(values: Tensor, valid: Tensor) -> Tensor:
    """Mean over positions t < valid[i] of every clip, then over the clips. values [B, ..., T], valid [B]."""
    mask = torch.arange(values.shape[-1], device=values.device) < valid.view(-1, *[1] * (values.dim() - 1))
    per_position = values[0].numel() // values.shape[-1]
    sums = torch.where(mask, values, 0.0).sum(dim=tuple(range(1, values.dim())))
    return (sums / (valid * per_position)).mean()


def l1_loss(prediction: Tensor, target: Tensor, lengths: Tensor) -> Tensor:
    """L1 between waveforms: scalar."""
    return clip_mean((prediction - target).abs(), lengths)


class SoundLosses(nn.Module):
    """l1, stft and mel of LossWeights together: magnitudes that stft and mel both want are computed once.

    (prediction, target, lengths) -> {name: scalar}; gradients flow from those of weight, and the others are there to be
    logged, or not computed at all (`weightless` False).
    """

    def __init__(self, weights: LossWeights, fft_sizes: list[int], sampling_rate: int):
        super().__init__()
        self.learned = {name for name, weight in vars(weights).items() if weight}
        self.fft_sizes, self.mel_distance = list(fft_sizes), MelDistance(sampling_rate)

    def forward(
        self, prediction: Tensor, target: Tensor, lengths: Tensor, weightless: bool = True
    ) -> dict[str, Tensor]:
        sizes = {"l1": (), "stft": self.fft_sizes, "mel": self.mel_distance.windows}
        names = [name for name in sizes if weightless or name in self.learned]
        pairs = magnitude_pairs(prediction, target, lengths, {n for name in names for n in sizes[name]})
        functions = {
            "l1": lambda: l1_loss(prediction, target, lengths),
            "stft": lambda: stft_loss(pairs, lengths, self.fft_sizes),
            "mel": lambda: self.mel_distance.of(pairs, lengths),
        }
        losses = {name: functions[name]() for name in names}
        return {name: loss if name in self.learned else loss.detach() for name, loss in losses.items()}


# ---------------------------------------------------------------- spectra


class SplitRFFT(torch.autograd.Function):
    """[..., n] -> torch.fft.rfft of it, real and imaginary parts apart: [..., n // 2 + 1, 2].

    Its gradient is one FFT with real output; that of torch.fft.rfft takes a complex one of all n bins.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.n = x.shape[-1]
        return torch.view_as_real(torch.fft.rfft(x))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        # irfft counts every bin twice but the first and, of an even n, the last.
        bin = torch.arange(gradient.shape[-2], device=gradient.device)[:, None]
        gradient = gradient * torch.where((bin > 0) & (2 * bin < ctx.n), 0.5, 1.0)
        return torch.fft.irfft(torch.view_as_complex(gradient), ctx.n, norm="forward")


def stft(waveform: Tensor, fft_size: int) -> Tensor:
    """[B, 1, T] -> [B, frames, fft_size // 2 + 1, 2] in float32: torch.stft with a Hann window, hop fft_size // 4 and
    centred frames, frames = 1 + T // hop.

    Frames are cut as hops side by side: the gradient of slices is a sum, that of torch.stft's overlapping view an
    index_add with an index of 8 bytes an element.
    """
    hop, reach = fft_size // 4, fft_size // 2
    padded = F.pad(waveform.float(), (reach, reach), mode="reflect")[:, 0]
    n_frames, n_hops = 1 + (padded.shape[-1] - fft_size) // hop, -(-fft_size // hop)
    hops = F.pad(padded, (0, (n_frames + n_hops - 1) * hop - padded.shape[-1])).view(len(padded), -1, hop)
    frames = torch.cat([hops[:, i : i + n_frames] for i in range(n_hops)], dim=-1)[..., :fft_size]
    return SplitRFFT.apply(frames * torch.hann_window(fft_size, device=waveform.device))


def magnitude(waveform: Tensor, fft_size: int) -> Tensor:
    """[B, 1, T] -> |stft|, [B, frames, bins]"""
    # A magnitude has no gradient at 0 (digital silence): the floor keeps it finite.
    return stft(waveform, fft_size).square().sum(dim=-1).clamp(min=1e-12).sqrt()


def magnitude_pairs(prediction: Tensor, target: Tensor, lengths: Tensor, fft_sizes) -> dict[int, tuple[Tensor, Tensor]]:
    """FFT size -> magnitudes of both waveforms, silent beyond their lengths."""
    prediction, target = mask_samples(prediction, lengths), mask_samples(target, lengths)
    return {n: (magnitude(prediction, n), magnitude(target, n)) for n in fft_sizes}


def frame_mean(values: Tensor, lengths: Tensor, fft_size: int) -> Tensor:
    """clip_mean() of [B, frames, bins] over the frames whose centre lies inside the clip."""
    return clip_mean(values.transpose(1, 2), (lengths - 1) // (fft_size // 4) + 1)


def stft_loss(pairs: dict, lengths: Tensor, fft_sizes: list[int]) -> Tensor:
    """L1 between magnitude_pairs() over sqrt(fft_size), so that sizes weigh alike; mean over bins, frames and sizes.
    The paper names no sizes."""
    losses = [frame_mean((pairs[n][0] - pairs[n][1]).abs(), lengths, n) / n**0.5 for n in fft_sizes]
    return torch.stack(losses).mean()


def log_distance(a: Tensor, b: Tensor) -> Tensor:
    """Of magnitudes, element by element: L1 of log10(clamp(m, 1e-5)^2) plus L1 of m."""
    return (a.clamp(min=1e-5).square().log10() - b.clamp(min=1e-5).square().log10()).abs() + (a - b).abs()


class MelDistance(nn.Module):
    """Mel distance as audiotools defines it: for each of `windows` (hop: a quarter) log_distance() between
    Slaney mel bands of STFT magnitudes, summed over the windows.

    Used as validation metric, and as a loss where `loss.mel` > 0.
    """

    windows = {2048: 150, 512: 80}  # samples: mel bands

    def __init__(self, sampling_rate: int):
        super().__init__()
        for window, n_mels in self.windows.items():
            bands = torchaudio.functional.melscale_fbanks(
                window // 2 + 1, 0.0, sampling_rate / 2, n_mels, sampling_rate, norm="slaney", mel_scale="slaney"
            )
            self.register_buffer(f"bands_{window}", bands.T.contiguous(), persistent=False)

    def forward(self, prediction: Tensor, target: Tensor, lengths: Tensor) -> Tensor:
        return self.of(magnitude_pairs(prediction, target, lengths, self.windows), lengths)

    def of(self, pairs: dict, lengths: Tensor) -> Tensor:
        """The distance of magnitude_pairs()."""
        total = 0.0
        for window in self.windows:
            bands = getattr(self, f"bands_{window}")
            with torch.autocast(bands.device.type, enabled=False):
                a, b = (one @ bands.T for one in pairs[window])
            total = total + frame_mean(log_distance(a, b), lengths, window)
        return total


def stft_distance(prediction: Tensor, target: Tensor, lengths: Tensor) -> Tensor:
    """STFT distance as audiotools defines it: the mel distance's formula on magnitudes of windows 2048 and 512."""
    pairs = magnitude_pairs(prediction, target, lengths, (2048, 512))
    return sum(frame_mean(log_distance(*pair), lengths, n) for n, pair in pairs.items())


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
