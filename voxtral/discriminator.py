"""Multi-scale STFT discriminators: EnCodec's architecture, FFT sizes of Stable Codec, which the Voxtral paper cites."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from voxtral.losses import discriminator_hinge_loss, feature_matching_loss, stft


@dataclass
class DiscriminatorConfig:
    fft_sizes: list[int] = field(default_factory=lambda: [78, 126, 206, 334, 542, 876, 1418, 2296])
    channels: int = 32  # the paper states none; EnCodec, DAC and Mimi use 32
    crop_sec: float = 0.5  # they hear a random part of each clip, so long; at least data.max_sec: the whole clip
    warmup_steps: int = 2000  # they learn alone for so long before feature matching begins
    learning_rate: float = 3e-4


class TensorCoreConv2d(nn.Conv2d):
    """A convolution as nn.Conv2d computes it, padded to "same", in the shape that tensor cores like.
    [B, C, frames, bins] in channels_last memory.

    `fold` neighbouring outputs along the bins become channels (and so do the inputs between their starts), which in
    channels_last costs no copy: 8 times 2 -> 32 channels with a kernel of 9 bins are 16 -> 256 with one of 3. Frames
    that lie `dilation` apart are brought together as clips of their own, on which the convolution is not dilated.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, int],
        stride: int = 1,
        dilation: int = 1,
        fold: int = 1,
    ):
        padding = (dilation * (kernel[0] - 1) // 2, (kernel[1] - 1) // 2)
        super().__init__(in_channels, out_channels, kernel, (1, stride), padding, (dilation, 1))
        # Output r of a group reads tap k at bin r * stride + k - padding, from the start of its own `width` bins.
        self.fold, self.width = fold, fold * stride
        bins = torch.arange(fold)[:, None] * stride + torch.arange(kernel[1]) - padding[1]
        self.reach = -(-padding[1] // self.width)  # neighbouring groups that it reads on either side
        taps = F.one_hot(bins + self.reach * self.width, (2 * self.reach + 1) * self.width)
        self.register_buffer("taps", taps.view(fold, kernel[1], -1, self.width).float(), persistent=False)

    def folded_weight(self) -> Tensor:
        """[fold * out_channels, width * in_channels, kernel of frames, groups]"""
        weight = torch.einsum("rkgw,oihk->rowihg", self.taps, self.weight)
        return weight.reshape(self.fold * self.out_channels, self.width * self.in_channels, self.kernel_size[0], -1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, frames, bins = x.shape
        dilation, out_bins = self.dilation[0], (bins - 1) // self.stride[1] + 1
        x = F.pad(x, (0, -bins % self.width, 0, -frames % dilation)).permute(0, 2, 3, 1)  # [B, frames, bins, C]
        x = x.reshape(batch, -1, dilation, x.shape[2] * channels).transpose(1, 2)
        x = x.reshape(batch * dilation, x.shape[2], -1, self.width * channels).permute(0, 3, 1, 2)
        y = F.conv2d(
            x, self.folded_weight(), self.bias.repeat(self.fold), padding=(self.kernel_size[0] // 2, self.reach)
        )
        y = y.permute(0, 2, 3, 1)
        y = y.reshape(batch, dilation, y.shape[1], -1).transpose(1, 2)
        y = y.reshape(batch, y.shape[1] * dilation, -1, self.out_channels)
        return y[:, :frames, :out_bins].permute(0, 3, 1, 2)


class StftDiscriminator(nn.Module):
    """Convolutions over one complex spectrogram: [B, 2, frames, bins] -> list of feature maps, logits last.

    Time is never strided, so a feature map's frames are the spectrogram's.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.ModuleList(
            map(
                weight_norm,
                [
                    TensorCoreConv2d(2, channels, (3, 9), fold=8),
                    *(
                        TensorCoreConv2d(channels, channels, (3, 9), stride=2, dilation=dilation, fold=2)
                        for dilation in (1, 2, 4)
                    ),
                    TensorCoreConv2d(channels, channels, (3, 3)),
                ],
            )
        )
        self.logits = weight_norm(TensorCoreConv2d(channels, 1, (3, 3)))

    def forward(self, spectrum: Tensor) -> list[Tensor]:
        x, features = spectrum.contiguous(memory_format=torch.channels_last), []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
            features.append(x)
        return features + [self.logits(x)]


class Discriminators(nn.Module):
    """One StftDiscriminator per FFT size, of the complex STFT in fp32 over sqrt(size), hop a quarter of the size.
    [B, 1, T] -> a list of feature maps for each of them, logits last."""

    def __init__(self, config: DiscriminatorConfig):
        super().__init__()
        self.fft_sizes = list(config.fft_sizes)
        self.discriminators = nn.ModuleList(StftDiscriminator(config.channels) for _ in self.fft_sizes)

    def forward(self, waveform: Tensor) -> list[list[Tensor]]:
        spectra = [stft(waveform, n).permute(0, 3, 1, 2) / n**0.5 for n in self.fft_sizes]  # [B, 2, frames, bins]
        return [discriminator(spectrum) for discriminator, spectrum in zip(self.discriminators, spectra)]


class AdversarialLosses(nn.Module):
    """Target and reconstruction [B, 1, T], valid share of each [B] -> the hinge loss, which moves the discriminators
    alone, and the feature matching loss, which moves the reconstruction alone.

    Compiled, the reconstruction goes through the discriminators once: its two passes are the same operations.
    """

    def __init__(self, discriminators: Discriminators):
        super().__init__()
        self.discriminators = discriminators

    def forward(self, target: Tensor, reconstruction: Tensor, valid_share: Tensor) -> tuple[Tensor, Tensor]:
        real, fake = self.discriminators(target), self.discriminators(reconstruction.detach())
        hinge = discriminator_hinge_loss([maps[-1] for maps in real], [maps[-1] for maps in fake], valid_share)
        frozen = {name: parameter.detach() for name, parameter in self.discriminators.named_parameters()}
        moving = torch.func.functional_call(self.discriminators, frozen, (reconstruction,))
        features = ([maps[:-1] for maps in all_maps] for all_maps in (real, moving))
        return hinge, feature_matching_loss(*features, valid_share)


def random_crops(
    lengths: Tensor, n_samples: int, seed: int, rank: int = 0, world_size: int = 1
) -> tuple[Tensor, Tensor]:
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
