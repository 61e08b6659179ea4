"""What the benchmark's rows j and n add to the statistics of known codes."""

from copy import deepcopy

import pytest
import torch
from test_matching import PARAMS, output_of, random_codes

from voxtral.codec import CodecOutput, VoxtralCodec
from voxtral.matching import CodeMatching

N_FRAMES = torch.tensor([12, 7])


@pytest.fixture(scope="module")
def losses(import_benchmark):
    return import_benchmark("withheld_losses")


@pytest.fixture
def codec():
    torch.manual_seed(0)
    codec = VoxtralCodec(PARAMS)
    codec.quantizer.semantic_codebook.embedding_sum.normal_()
    return codec.requires_grad_(False)


def test_windows_are_stretches_of_the_known_codes_and_hang_on_the_step(losses, codec):
    known = [random_codes(37, 9), random_codes(37, 14, seed=1)]
    one, other = losses.KnownClips(known, codec, "cpu"), losses.KnownClips(known, codec, "cpu")
    drawn = one.windows(50, 8)
    endless = torch.cat([*known, *known], dim=1).unfold(1, 8, 1).transpose(0, 1)
    starts = [next(i for i, stretch in enumerate(endless) if torch.equal(window, stretch)) for window in drawn]
    assert drawn.shape == (50, 37, 8) and len(set(starts)) > 15
    one(output_of(codec, random_codes(2, 37, 12)), N_FRAMES)
    assert not torch.equal(one.windows(50, 8), drawn) and torch.equal(other.windows(50, 8), drawn)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.windows(50, 8), other.windows(50, 8))


def test_known_clips_cost_what_is_said(losses, codec, monkeypatch):
    known, output = [random_codes(37, 40)], output_of(codec, random_codes(2, 37, 12, seed=2))
    taught, statistics = (
        losses.KnownClips(known, codec, "cpu"),
        CodeMatching(known, codec, "cpu")(output, N_FRAMES).item(),
    )
    wanted = taught.windows(2, 12)
    latent = torch.randn(2, PARAMS.latent_dim, 12)
    heard = []
    monkeypatch.setattr(codec, "encode_latent", lambda waveform: heard.append(waveform) or latent)
    loss = taught(output, N_FRAMES).item()
    assert torch.equal(heard[0], codec.decode(wanted))
    book = codec.quantizer.semantic_codebook.embedding.double()
    nearest = (
        torch.stack([(book - entry).square().sum(1).topk(2, largest=False).values[1] for entry in book]).sort().values
    )
    scale = nearest[(len(nearest) - 1) // 2]
    semantic = latent[:, : PARAMS.semantic_dim].transpose(1, 2).reshape(-1, 1, PARAMS.semantic_dim).double()
    chance = (-(semantic - book).square().sum(2) / scale).log_softmax(1)
    entropy = -chance[torch.arange(24), wanted[:, 0].flatten()].mean()
    levels = (latent[:, PARAMS.semantic_dim :].tanh() - (wanted[:, 1:] / 10 - 1)).abs().mean()
    expected = losses.SEMANTIC_WEIGHT * entropy + losses.LEVELS_WEIGHT * levels
    assert loss - statistics == pytest.approx(expected.item(), rel=1e-3)


def test_known_clips_teach_the_encoder_their_codes(losses, codec):
    known, nothing = [random_codes(37, 12)], output_of(codec, random_codes(2, 37, 12, seed=2))
    for parameter in codec.encoder_parameters():
        parameter.requires_grad_(True)
    taught, optimizer, values = (
        losses.KnownClips(known, codec, "cpu"),
        torch.optim.Adam(codec.encoder_parameters(), 3e-3),
        [],
    )
    for _ in range(60):
        optimizer.zero_grad()
        values.append(taught(nothing, N_FRAMES))
        values[-1].backward()
        optimizer.step()
    assert values[-1] < 0.8 * values[0]
    assert all(parameter.grad is None for parameter in codec.decoder_blocks.parameters())


def seen_by(adversary, codec, codes):
    return adversary.network((codec.quantizer.decode(codes) - adversary.mean) / adversary.deviation).mean().item()


def test_the_adversary_learns_to_tell_and_the_gradient_to_deceive(losses, codec):
    known, ours = [random_codes(37, 60) // 3], random_codes(2, 37, 12, seed=2)
    adversary = losses.Adversary(known, codec, "cpu")
    for _ in range(30):
        output = output_of(codec, ours)
        loss = adversary(output, torch.tensor([12, 12]))
    assert seen_by(adversary, codec, known[0][None]) > 0.5 and seen_by(adversary, codec, ours) < -0.5
    alone = CodeMatching(known, codec, "cpu")(output, torch.tensor([12, 12]))  # loss.match of a first step
    (statistics,) = torch.autograd.grad(alone, output.latent)
    loss.backward()
    gradient = output.latent.grad - statistics
    better = CodecOutput(None, (output.latent - 0.3 * gradient / gradient.abs().max()).detach(), ours, None)
    better.codes = codec.quantizer.encode(better.latent)
    assert seen_by(adversary, codec, better.codes) > seen_by(adversary, codec, ours)
    assert all(parameter.requires_grad for parameter in adversary.network.parameters())


def test_the_adversary_does_not_see_padding_and_is_resumed(losses, codec):
    def adversary():
        torch.manual_seed(0)
        return losses.Adversary([random_codes(37, 50, seed=3)], codec, "cpu")

    one, other = adversary(), adversary()
    padded = random_codes(2, 37, 12)
    padded[1, :, 7:] = 0
    for codes in (random_codes(2, 37, 12), padded):
        outputs = [
            each(output_of(codec, codes), N_FRAMES).item() for each in (one, adversary())
        ]  # the second is not at its first step
    fresh = [adversary()(output_of(codec, codes), N_FRAMES).item() for codes in (random_codes(2, 37, 12), padded)]
    assert fresh[0] == fresh[1] and outputs[0] != outputs[1]
    other.load_state_dict(deepcopy(one.state_dict()))
    losses_after = [
        [each(output_of(codec, random_codes(2, 37, 12, seed=i)), N_FRAMES).item() for i in range(3)]
        for each in (one, other)
    ]
    assert losses_after[0] == losses_after[1]


def test_a_penalty_keeps_the_adversary_flat_at_the_known_codes(losses, codec, monkeypatch):
    known, ours, slopes = [random_codes(37, 60) // 3], random_codes(2, 37, 12, seed=2), []
    for penalty in (0.0, 10.0):
        monkeypatch.setattr(losses, "GRADIENT_PENALTY", penalty)
        torch.manual_seed(0)
        adversary = losses.Adversary(known, codec, "cpu")
        for _ in range(20):
            adversary(output_of(codec, ours), torch.tensor([12, 12]))
        seen = ((codec.quantizer.decode(known[0][None]) - adversary.mean) / adversary.deviation).requires_grad_()
        (slope,) = torch.autograd.grad(adversary.network(seen).sum(), seen)
        slopes.append(slope.square().sum(dim=1).mean().item())
    assert slopes[1] < 0.5 * slopes[0]
