"""Multi-scale STFT discriminators (EnCodec's architecture; FFT sizes of Stable Codec, as the Voxtral paper cites it)."""
from dataclasses import dataclass, field
from typing import List

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from voxtral.losses import discriminator_hinge_loss, feature_matching_loss


@dataclass
class DiscriminatorConfig:
    fft_sizes: List[int] = field(default_factory=lambda: [78, 126, 206, 334, 542, 876, 1418, 2296])
    channels: int = 32           # the paper states none; EnCodec, DAC and Mimi use 32
    crop_sec: float = 1.0        # they hear a random part of each clip, so long; at least data.max_sec: the whole clip
    warmup_steps: int = 2000     # they learn alone for so long before feature matching begins
    learning_rate: float = 3e-4


class StftDiscriminator(nn.Module):
    """Convolutions over one complex spectrogram: [B, 2, frames, bins] -> list of feature maps; the last one is the logits.

    Time is never strided, so a feature map's frames are the spectrogram's.
    """

    def __init__(self, channels: int):
        super().__init__()
        def conv(in_channels, out_channels, kernel, stride=(1, 1), dilation=(1, 1)):
            padding = [d * (k - 1) // 2 for k, d in zip(kernel, dilation)]
            return weight_norm(nn.Conv2d(in_channels, out_channels, kernel, stride, padding, dilation))
        self.layers = nn.ModuleList([
            conv(2, channels, (3, 9)),
            *(conv(channels, channels, (3, 9), (1, 2), (dilation, 1)) for dilation in (1, 2, 4)),
            conv(channels, channels, (3, 3)),
        ])
        self.logits = conv(channels, 1, (3, 3))

    def forward(self, spectrum: Tensor) -> list[Tensor]:
        x, features = spectrum.contiguous(memory_format=torch.channels_last), []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
            features.append(x)
        return features + [self.logits(x)]


class Discriminators(nn.Module):
    """One StftDiscriminator per FFT size. [B, 1, T] -> list (per discriminator) of lists of feature maps, logits last."""

    def __init__(self, config: DiscriminatorConfig):
        super().__init__()
        self.fft_sizes = list(config.fft_sizes)
        self.discriminators = nn.ModuleList(StftDiscriminator(config.channels) for _ in self.fft_sizes)

    def spectra(self, waveform: Tensor) -> list[Tensor]:
        """Per FFT size the normalised complex STFT in fp32, [B, 2, frames, bins]; hop is a quarter of the size."""
        spectra = []
        for n in self.fft_sizes:
            window = torch.hann_window(n, device=waveform.device)
            spectrum = torch.stft(waveform[:, 0].float(), n, n // 4, window=window, normalized=True, return_complex=True)
            spectra.append(torch.view_as_real(spectrum).permute(0, 3, 2, 1))
        return spectra

    def forward(self, waveform: Tensor) -> list[list[Tensor]]:
        return [discriminator(spectrum) for discriminator, spectrum in zip(self.discriminators, self.spectra(waveform))]


class DiscriminatorLoss(nn.Module):
    """What the discriminators learn from. Target and reconstruction [B, 1, T], valid share of each [B] ->
    (hinge loss, then the feature maps of the target, which feature_loss() wants). The reconstruction gets no gradient."""

    def __init__(self, discriminators: Discriminators):
        super().__init__()
        self.discriminators = discriminators

    def forward(self, target: Tensor, reconstruction: Tensor, valid_share: Tensor) -> tuple[Tensor, ...]:
        n = len(target)
        maps = self.discriminators(torch.cat([target, reconstruction.detach()]))
        loss = discriminator_hinge_loss([one[-1][:n] for one in maps], [one[-1][n:] for one in maps], valid_share)
        return loss, *(layer[:n].detach() for one in maps for layer in one[:-1])


def feature_loss(discriminators: Discriminators, reconstruction: Tensor, valid_share: Tensor, *real: Tensor) -> Tensor:
    """What the generator learns from them; `real`: what DiscriminatorLoss gave for the same weights. The discriminators
    get no gradient."""
    discriminators.requires_grad_(False)
    fake = [layer for one in discriminators(reconstruction) for layer in one[:-1]]
    discriminators.requires_grad_(True)
    return feature_matching_loss([real], [fake], valid_share)


def random_crops(lengths: Tensor, n_samples: int, seed: int, rank: int = 0,
                 world_size: int = 1) -> tuple[Tensor, Tensor]:
    """First samples [B] of crops that lie inside the clips where these are long enough, and the valid share [B] of each
    crop. Processes together draw what one with all clips would."""
    generator = torch.Generator(lengths.device).manual_seed(seed)
    draws = torch.rand(world_size, len(lengths), generator=generator, device=lengths.device)[rank]
    starts = (draws * (lengths - n_samples + 1).clamp(min=1)).long()
    return starts, (lengths - starts).clamp(max=n_samples) / n_samples


def crop(waveform: Tensor, starts: Tensor, n_samples: int) -> Tensor:
    """[B, 1, T] -> [B, 1, n_samples], clip i from sample starts[i] on."""
    index = starts[:, None] + torch.arange(n_samples, device=waveform.device)
    return waveform.gather(2, index[:, None])
