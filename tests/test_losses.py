"""Every loss against values worked out by hand; padding never counts."""

import math
from functools import partial

import pytest
import torch
from torch._inductor.compile_fx import compile_fx

from voxtral.codec import mask_samples
from voxtral.discriminator import AdversarialLosses, DiscriminatorConfig, Discriminators, TensorCoreConv2d
from voxtral.losses import (
    LossWeights,
    MelDistance,
    SoundLosses,
    SplitRFFT,
    clip_mean,
    codebook_scale,
    codes_loss,
    commitment_loss,
    discriminator_hinge_loss,
    feature_matching_loss,
    l1_loss,
    magnitude,
    magnitude_pairs,
    stft,
    stft_distance,
    stft_loss,
)
from voxtral.params import CodecParams
from voxtral.quantizer import Quantizer

FULL = torch.tensor([4800, 4800])


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def test_l1_is_the_mean_over_valid_samples_then_clips():
    prediction, target = torch.zeros(2, 1, 4), torch.tensor([[[1.0, 1, 1, 1]], [[4.0, 2, 9, 9]]])
    assert l1_loss(prediction, target, torch.tensor([4, 2])).item() == pytest.approx((1 + 3) / 2)


def stft_loss_between(x, y, lengths, fft_sizes):
    return stft_loss(magnitude_pairs(x, y, lengths, fft_sizes), lengths, fft_sizes)


def test_magnitude_of_a_sine_at_a_bin():
    n, k = 64, 8
    x = torch.cos(2 * math.pi * k / n * torch.arange(640.0))[None, None]
    # The Hann window sums to n / 2, a cosine has half of it per side.
    assert magnitude(x, n)[0, 20, k].item() == pytest.approx(n / 4, rel=1e-4)


@pytest.mark.parametrize("fft_size", [512, 78, 333])
def test_stft_is_that_of_torch_and_so_is_its_gradient(fft_size):
    x = noise(2, 1, 4800).requires_grad_()
    window = torch.hann_window(fft_size)
    theirs = torch.stft(x[:, 0], fft_size, fft_size // 4, window=window, return_complex=True).transpose(1, 2)
    spectra = [stft(x, fft_size), torch.view_as_real(theirs)]
    torch.testing.assert_close(*spectra, rtol=1e-5, atol=1e-5)
    towards = torch.randn(spectra[0].shape, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((spectrum * towards).sum(), x)[0] for spectrum in spectra]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", [8, 9])
def test_gradient_of_an_fft_against_differences(n):
    x = torch.randn(3, n, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(SplitRFFT.apply, x)


def test_losses_of_the_sound_are_the_single_ones():
    """Those without weight are told and move nothing."""
    x, y, lengths = noise(2, 1, 9600).requires_grad_(), noise(2, 1, 9600, seed=1), torch.tensor([9600, 5000])
    sound = SoundLosses(LossWeights(l1=0.5, stft=0.0, mel=2.0), [512, 256], 24000)
    losses = sound(x, y, lengths)
    expected = {
        "l1": l1_loss(mask_samples(x, lengths), y, lengths).item(),
        "stft": stft_loss_between(x, y, lengths, [512, 256]).item(),
        "mel": MelDistance(24000)(x, y, lengths).item(),
    }
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected)
    assert {name for name, loss in losses.items() if loss.requires_grad} == {"l1", "mel"}
    weighted = sound(x, y, lengths, weightless=False)
    assert weighted == {name: losses[name] for name in ("l1", "mel")}


def test_stft_loss_of_a_scaled_signal():
    x = noise(2, 1, 4800)
    expected = sum(0.5 * (magnitude(x, n)[:, :-1] / n**0.5).mean() for n in (512, 64)) / 2
    loss = stft_loss_between(0.5 * x, x, torch.tensor([4799, 4799]), [512, 64])
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)


def test_mel_and_stft_distance_of_a_scaled_signal():
    """Halving the amplitude moves log10(m^2) by log10(4) everywhere; the linear part adds half of the mean
    magnitude."""
    x = noise(1, 1, 48000)
    lengths = torch.tensor([48000])
    mel = MelDistance(24000)
    linear = sum(0.5 * (magnitude(x, w) @ getattr(mel, f"bands_{w}").T).mean().item() for w in (2048, 512))
    assert mel(0.5 * x, x, lengths).item() == pytest.approx(2 * math.log10(4) + linear, rel=0.01)
    linear = sum(0.5 * magnitude(x, w).mean().item() for w in (2048, 512))
    assert stft_distance(0.5 * x, x, lengths).item() == pytest.approx(2 * math.log10(4) + linear, rel=0.01)


@pytest.mark.parametrize(
    "distance", [l1_loss, lambda a, b, n: stft_loss_between(a, b, n, [256]), MelDistance(24000), stft_distance]
)
def test_identical_is_zero_and_padding_does_not_count(distance):
    x, y = noise(2, 1, 4800), noise(2, 1, 4800, seed=1)
    assert distance(x, x, FULL).item() == 0
    lengths = torch.tensor([4800, 2000])
    garbage = x.clone()
    garbage[1, :, 2000:] = 7.0
    assert distance(garbage, y, lengths).item() == pytest.approx(distance(x, y, lengths).item(), rel=1e-6)
    assert distance(x[:1], y[:1], lengths[:1]).item() != pytest.approx(distance(x, y, lengths).item(), rel=1e-6)


def test_two_halves_of_a_batch_average_to_the_whole():
    x, y, lengths = noise(4, 1, 4800), noise(4, 1, 4800, seed=1), torch.tensor([4800, 3000, 2000, 4800])
    whole = stft_loss_between(x, y, lengths, [256])
    halves = [stft_loss_between(x[i : i + 2], y[i : i + 2], lengths[i : i + 2], [256]) for i in (0, 2)]
    assert whole.item() == pytest.approx(sum(h.item() for h in halves) / 2, rel=1e-6)


def test_gradient_is_finite_in_silence():
    x = torch.zeros(1, 1, 4800, requires_grad=True)
    (
        stft_loss_between(x, torch.zeros(1, 1, 4800), FULL[:1], [256])
        + MelDistance(24000)(x, noise(1, 1, 4800), FULL[:1])
    ).backward()
    assert x.grad.isfinite().all()


def test_commitment_value_and_gradient():
    latent = torch.tensor([[[1.0, 5.0], [2.0, 5.0]]], requires_grad=True)  # [1, 2, 2]; the second frame is padding
    entry = torch.zeros(1, 2, 2, requires_grad=True)
    loss = commitment_loss(latent, entry, torch.tensor([1]))
    loss.backward()
    assert loss.item() == pytest.approx((1 + 4) / 2)
    assert entry.grad is None
    assert torch.equal(latent.grad, torch.tensor([[[1.0, 0.0], [2.0, 0.0]]]))


def test_codebook_scale_is_the_median_nearest_neighbour():
    assert codebook_scale(torch.tensor([[0.0], [1.0], [10.0], [13.0], [20.0]])).item() == pytest.approx(9)


def test_hinge_values():
    real, fake = torch.full((1, 1, 2, 3), 0.5), torch.full((1, 1, 2, 3), -2.0)
    assert discriminator_hinge_loss([real], [fake], torch.ones(1)).item() == pytest.approx(0.5 + 0)
    assert discriminator_hinge_loss([fake], [real], torch.ones(1)).item() == pytest.approx(3 + 1.5)
    fake[:, :, 1] = 100.0  # the second frame is padding
    assert discriminator_hinge_loss([real], [fake], torch.tensor([0.5])).item() == pytest.approx(0.5)


def test_feature_matching_values():
    real, fake = (
        [[torch.zeros(1, 2, 4, 3), torch.zeros(1, 1, 4, 3)]],
        [[torch.full((1, 2, 4, 3), 2.0), torch.full((1, 1, 4, 3), 4.0)]],
    )
    assert feature_matching_loss(real, fake, torch.ones(1)).item() == pytest.approx(3)
    for maps in fake[0]:
        maps[:, :, 2:] = 0  # silent padding is equal on both sides
    assert feature_matching_loss(real, fake, torch.tensor([0.5])).item() == pytest.approx(3)
    assert feature_matching_loss(real, real, torch.ones(1)).item() == 0


@pytest.mark.parametrize("frames, bins", [(30, 40), (13, 35), (3, 9), (1, 20)])
@pytest.mark.parametrize(
    "channels, kernel, stride, dilation, fold",
    [
        ((2, 6), (3, 9), 1, 1, 8),
        ((6, 6), (3, 9), 2, 1, 2),
        ((6, 6), (3, 9), 2, 4, 2),
        ((6, 1), (3, 3), 1, 1, 1),
        ((6, 1), (3, 3), 1, 2, 8),
    ],
)
def test_a_folded_convolution_is_the_plain_one(channels, kernel, stride, dilation, fold, frames, bins):
    conv = TensorCoreConv2d(*channels, kernel, stride, dilation, fold).double()
    x = torch.randn(2, channels[0], frames, bins, dtype=torch.double, requires_grad=True)
    outputs = [function(x) for function in (conv, partial(torch.nn.Conv2d.forward, conv))]
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    towards = torch.randn_like(outputs[0])
    gradients = [torch.autograd.grad((y * towards).sum(), [x, conv.weight, conv.bias]) for y in outputs]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-11)


def test_hinge_loss_moves_the_discriminators_and_feature_matching_the_reconstruction():
    discriminators = Discriminators(DiscriminatorConfig(fft_sizes=[78], channels=4))
    real, fake, share = noise(2, 1, 4800), noise(2, 1, 4800, seed=1).requires_grad_(), torch.ones(2)
    hinge, feature = AdversarialLosses(discriminators)(real, fake, share)
    (real_maps,), (fake_maps,) = discriminators(real), discriminators(fake)
    expected = feature_matching_loss([real_maps[:-1]], [fake_maps[:-1]], share)
    assert feature.item() == pytest.approx(expected.item())
    assert hinge.item() == pytest.approx(discriminator_hinge_loss([real_maps[-1]], [fake_maps[-1]], share).item())
    feature.backward(retain_graph=True)
    torch.testing.assert_close(fake.grad, torch.autograd.grad(expected, fake)[0])
    assert fake.grad.abs().sum() > 0 and all(parameter.grad is None for parameter in discriminators.parameters())
    fake.grad = None
    hinge.backward()
    assert fake.grad is None
    assert all(p.grad.abs().sum() > 0 for name, p in discriminators.named_parameters() if not name.endswith("bias"))


def test_compiled_the_reconstruction_goes_through_the_discriminators_once():
    n_convolutions = []

    def count(module, inputs):
        n_convolutions.append(sum(node.target == torch.ops.aten.convolution.default for node in module.graph.nodes))
        return module

    def backend(module, inputs):
        return compile_fx(module, inputs, inner_compile=lambda module, inputs, **more: count(module, inputs))

    discriminators = Discriminators(DiscriminatorConfig(fft_sizes=[78], channels=4))
    losses = torch.compile(AdversarialLosses(discriminators).forward, backend=backend, fullgraph=True, dynamic=False)
    losses(noise(2, 1, 4800), noise(2, 1, 4800, seed=1).requires_grad_(), torch.ones(2))
    assert n_convolutions[0] == 2 * 6


def test_discriminators_shapes_and_gradients():
    config = DiscriminatorConfig(fft_sizes=[78, 542], channels=4)
    discriminators = Discriminators(config)
    x = noise(2, 1, 9600).requires_grad_()
    outputs = discriminators(x)
    assert [len(maps) for maps in outputs] == [6, 6]
    assert outputs[1][-1].shape == (2, 1, 1 + 9600 // 135, 34)
    sum(maps[-1].mean() for maps in outputs).backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is not None for p in discriminators.parameters())


def test_clip_mean_broadcasts_over_middle_axes():
    values = torch.arange(12.0).view(1, 3, 4)
    assert clip_mean(values, torch.tensor([2])).item() == pytest.approx((0 + 1 + 4 + 5 + 8 + 9) / 6)


def test_codes_loss_is_of_known_frames_only():
    quantizer = Quantizer(CodecParams(semantic_codebook_size=8, semantic_dim=4))
    codes = torch.randint(1, 8, (2, 37, 3), generator=torch.Generator().manual_seed(0))
    codes[1] = -1  # nothing is known of this clip
    codes[0, :, 2] = -1
    latent = quantizer.decode(codes.clamp(min=0))
    latent[:, 4:] = latent[:, 4:].atanh()
    scale = torch.tensor(1e-3)  # so fine that the entry itself has all of the probability
    assert codes_loss(latent, codes, quantizer, scale).item() == pytest.approx(0, abs=1e-5)
    latent[:, 4:, 2] = 9.0
    latent[1] = 9.0
    assert codes_loss(latent, codes, quantizer, scale).item() == pytest.approx(0, abs=1e-5)
    latent[0, 4:, 0] = (latent[0, 4:, 0].tanh() + 0.1).atanh()  # a level off in one of two frames, of one of two clips
    assert codes_loss(latent, codes, quantizer, scale).item() == pytest.approx(0.1 / 2 / 2, rel=1e-3)
    far = quantizer.decode(codes.clamp(min=0)[:, :, :1] * 0)[:, :4]  # entry 0 where another was spoken
    latent[0, :4, 1:2] = far[0]
    assert codes_loss(latent, codes, quantizer, scale).item() > 1
