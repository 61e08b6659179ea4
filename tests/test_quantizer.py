"""Quantization by values worked out by hand, and the random choices of training."""

import math

import pytest
import torch

from voxtral.params import CodecParams
from voxtral.quantizer import QuantizationDraws, Quantizer, SemanticCodebook


def codebook(entries, usage=None):
    """A SemanticCodebook with these entries [K, D]; usage [K] scales how they are stored."""
    entries = torch.tensor(entries, dtype=torch.float32)
    book = SemanticCodebook(*entries.shape)
    book.cluster_usage.copy_(torch.ones(len(entries)) if usage is None else torch.tensor(usage))
    book.embedding_sum.copy_(entries * book.cluster_usage[:, None])
    return book


@pytest.fixture
def quantizer():
    """Two semantic channels with entries (0, 0), (10, 0), (0, 10); three acoustic channels of 21 levels."""
    quantizer = Quantizer(CodecParams(semantic_codebook_size=3, semantic_dim=2, acoustic_dim=3))
    quantizer.semantic_codebook = codebook([[0, 0], [10, 0], [0, 10]])
    return quantizer


def latents(n_clips, n_frames=4, seed=0):
    latent = torch.randn(n_clips, 5, n_frames, generator=torch.Generator().manual_seed(seed))
    latent[:, :2] = 20 * latent[:, :2].sigmoid()
    return latent


# ---------------------------------------------------------------- semantic


def test_nearest_entry_by_euclidean_distance():
    book = codebook([[1, 0], [0, 1], [100, 0]])
    x = torch.tensor([[0.9, 0.2], [0.2, 0.9], [40, 0], [60, 0]])  # by inner product all four would be the last entry
    assert book.encode(x).tolist() == [0, 1, 0, 2]
    assert book.encode(x.view(2, 2, 2)).tolist() == [[0, 1], [0, 2]]


def test_entry_is_the_sum_over_its_usage():
    book = codebook([[2, 4], [6, 8]], usage=[2.0, 4.0])
    assert book.embedding_sum.tolist() == [[4, 8], [24, 32]]
    assert book.decode(torch.tensor([1, 0])).tolist() == [[6, 8], [2, 4]]


def test_entry_without_usage_is_divided_by_the_floor():
    book = codebook([[0, 0], [1, 1]])
    book.cluster_usage[0] = 0
    book.embedding_sum[0] = torch.tensor([3e-5, 2e-5])
    assert book.embedding[0].tolist() == pytest.approx([3, 2])
    assert book.encode(torch.tensor([[3.0, 2.0], [1.0, 1.1]])).tolist() == [0, 1]


# ---------------------------------------------------------------- acoustic


@pytest.mark.parametrize("level", range(21))
def test_levels_are_evenly_spaced_and_survive_the_way_back(quantizer, level):
    value = level / 10 - 1
    latent = torch.zeros(1, 5, 1)
    latent[0, 2] = math.atanh(max(-0.99999, min(0.99999, value)))
    codes = quantizer.encode(latent)
    assert codes[0, 1:].flatten().tolist() == [level, 10, 10]
    assert quantizer.decode(codes)[0, 2, 0].item() == pytest.approx(value, abs=1e-6)


def test_rounding_is_to_the_nearest_level(quantizer):
    squashed = torch.tensor([-1, -0.951, -0.949, 0, 0.049, 0.051, 0.949, 0.951, 1])
    assert quantizer.levels(squashed).tolist() == [0, 0, 1, 10, 10, 11, 19, 20, 20]


def test_one_tanh_only(quantizer):
    """tanh(0.5) = 0.46 is level 15; a second tanh would make it 0.43, level 14."""
    latent = torch.full((1, 5, 1), 0.5)
    assert quantizer.encode(latent)[0, 1:].flatten().tolist() == [15, 15, 15]
    draws = QuantizationDraws(torch.tensor([0.9]), torch.tensor([0.9]), torch.zeros(1, 3, 1))
    mixed, codes, _ = quantizer(latent, draws)
    assert codes[0, 1:].flatten().tolist() == [15, 15, 15]
    assert mixed[0, 2:].flatten().tolist() == pytest.approx([math.tanh(0.5)] * 3)


def test_codes_are_semantic_first(quantizer):
    latent = torch.tensor([[9.0, 1, 30, -30, 0], [1, 9, -30, 30, 0]]).view(2, 5, 1)
    codes = quantizer.encode(latent)
    assert codes.dtype == torch.int64 and codes[..., 0].tolist() == [[1, 20, 0, 10], [2, 0, 20, 10]]
    assert quantizer.decode(codes)[..., 0].tolist() == [[10, 0, 1, -1, 0], [0, 10, -1, 1, 0]]


def test_codes_of_nan_stay_in_range_and_what_is_trained_on_stays_nan(quantizer):
    """An index out of range would crash a GPU process before the guard against divergence sees the losses."""
    latent = torch.full((2, 5, 3), math.nan)
    mixed, codes, semantic_ste = quantizer(latent, QuantizationDraws.sample(0, 2, 3, 3, "cpu"))
    assert codes.min() >= 0 and codes[:, 0].max() < 3 and codes[:, 1:].max() <= 20
    assert mixed.isnan().all() and semantic_ste.isnan().all()


# ---------------------------------------------------------------- training

QUANTIZED, NOISY, PASSED = 0.2, 0.6, 0.9


def run(quantizer, latent, semantic, acoustic, noise=0.5):
    noise = torch.full((1, 3, latent.shape[-1]), noise)
    return quantizer(latent, QuantizationDraws(torch.tensor([semantic]), torch.tensor([acoustic]), noise))


@pytest.mark.parametrize("semantic, acoustic", [(s, a) for s in (0.4, 0.6) for a in (QUANTIZED, NOISY, PASSED)])
def test_what_the_decoder_is_given(quantizer, semantic, acoustic):
    latent = latents(1)
    mixed, codes, semantic_ste = run(quantizer, latent, semantic, acoustic)
    hard, squashed = quantizer.decode(quantizer.encode(latent)), latent[:, 2:].tanh()
    assert torch.equal(codes, quantizer.encode(latent))
    assert torch.allclose(semantic_ste, hard[:, :2])  # what the losses on semantic codes see is always quantized
    assert torch.allclose(mixed[:, :2], hard[:, :2] if semantic < 0.5 else latent[:, :2])
    expected = {QUANTIZED: hard[:, 2:], NOISY: squashed + 0.5 / 21, PASSED: squashed}[acoustic]
    assert torch.allclose(mixed[:, 2:], expected, atol=1e-6)


@pytest.mark.parametrize("semantic, acoustic", [(s, a) for s in (0.4, 0.6) for a in (QUANTIZED, NOISY, PASSED)])
def test_gradient_passes_straight_through(quantizer, semantic, acoustic):
    """In all branches the semantic part has gradient 1, and the acoustic part that of one tanh."""
    latent = latents(1).requires_grad_()
    mixed, _, semantic_ste = run(quantizer, latent, semantic, acoustic)
    upstream = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((mixed * upstream).sum(), latent, retain_graph=True)
    assert torch.allclose(gradient[:, :2], upstream[:, :2])
    assert torch.allclose(gradient[:, 2:], upstream[:, 2:] * (1 - latent[:, 2:].tanh() ** 2), atol=1e-6)
    (gradient,) = torch.autograd.grad((semantic_ste * upstream[:, :2]).sum(), latent)
    assert torch.allclose(gradient[:, :2], upstream[:, :2]) and gradient[:, 2:].abs().sum() == 0


def test_shares_over_many_clips(quantizer):
    """50 / 50 of the clips' semantic parts, 50 / 25 / 25 of their acoustic parts, drawn independently of each other."""
    n = 40_000
    latent = latents(n, n_frames=1)
    mixed, codes, _ = quantizer(latent, QuantizationDraws.sample(0, n, 3, 1, "cpu"))
    hard, squashed = quantizer.decode(codes), latent[:, 2:].tanh()

    def equal(a, b):
        return ((a - b).abs() < 1e-5).flatten(1).all(dim=1)

    semantic = equal(mixed[:, :2], hard[:, :2])
    rounded, passed = equal(mixed[:, 2:], hard[:, 2:]), equal(mixed[:, 2:], squashed)
    for share, expected in [
        (semantic, 0.5),
        (equal(mixed[:, :2], latent[:, :2]), 0.5),
        (rounded, 0.5),
        (passed, 0.25),
        (~rounded & ~passed, 0.25),
        (semantic & rounded, 0.25),
        (semantic & passed, 0.125),
    ]:
        assert share.float().mean().item() == pytest.approx(expected, abs=0.01)


def test_noise_is_uniform_with_magnitude_one_over_the_levels(quantizer):
    latent = latents(2000)
    draws = QuantizationDraws.sample(3, 2000, 3, 4, "cpu")
    draws.acoustic.fill_(NOISY)
    noise = (quantizer(latent, draws)[0][:, 2:] - latent[:, 2:].tanh()) * 21
    assert noise.abs().max().item() == pytest.approx(1, abs=1e-3)
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(1 / math.sqrt(3), abs=0.01)
    assert noise[0].unique().numel() == 12  # each value has its own


def test_draws_repeat_by_seed():
    first, again, other = (QuantizationDraws.sample(seed, 6, 3, 5, "cpu") for seed in (7, 7, 8))
    for name in ("semantic", "acoustic", "noise"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))
    assert first.semantic.shape == first.acoustic.shape == (6,) and first.noise.shape == (6, 3, 5)
    assert first.noise.min() < -0.5


def test_processes_together_draw_what_one_draws():
    whole = QuantizationDraws.sample(7, 6, 3, 5, "cpu")
    parts = [QuantizationDraws.sample(7, 2, 3, 5, "cpu", rank, 3) for rank in range(3)]
    for name in ("semantic", "acoustic", "noise"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))


# ---------------------------------------------------------------- the codebook that follows an average


def update(book, x, valid=None, **settings):
    valid = torch.ones(len(x), dtype=torch.bool) if valid is None else torch.tensor(valid)
    book.update(torch.tensor(x, dtype=torch.float32), valid, torch.Generator().manual_seed(0), **settings)


def test_codebook_update_by_hand():
    book = codebook([[0, 0], [10, 0]], usage=[4.0, 2.0])
    update(book, [[1, 1], [3, 1], [8, 2]], decay=0.75, dead_share=0)
    assert book.cluster_usage.tolist() == [0.75 * 4 + 0.25 * 2, 0.75 * 2 + 0.25 * 1]
    assert book.embedding_sum.tolist() == [[0.25 * 4, 0.25 * 2], [0.75 * 20 + 0.25 * 8, 0.25 * 2]]
    assert book.embedding[1].tolist() == pytest.approx([17 / 1.75, 0.5 / 1.75])


def test_codebook_converges_to_the_mean_of_its_vectors():
    book = codebook([[0, 0], [10, 0]])
    for _ in range(400):
        update(book, [[1, 1], [3, 1], [8, 2]], decay=0.95)
    assert book.embedding.flatten().tolist() == pytest.approx([2, 1, 8, 2], abs=1e-4)
    assert book.cluster_usage.tolist() == pytest.approx([2, 1], abs=1e-4)


def test_dead_entries_restart_at_vectors_of_the_batch():
    """Nobody is near entries 1 and 2: one decays to 0.36 and lives on, the other falls to 0.01, below the bound."""
    book = codebook([[0, 0], [50, 50], [90, 90]], usage=[1.0, 0.72, 0.02])
    x = [[1, 1], [2, 2], [3, 3]] * 2
    update(book, x, decay=0.5, dead_share=0.1)  # on average two vectors an entry: dead below 0.2
    assert book.cluster_usage.tolist() == pytest.approx([3.5, 0.36, 2])
    assert book.embedding[0].tolist() == pytest.approx([6 / 3.5, 6 / 3.5])
    assert book.embedding[1].tolist() == pytest.approx([50, 50])
    assert book.embedding[2].tolist() in x


def test_vectors_of_padding_change_nothing():
    books = [
        codebook([[0, 0], [10, 0]] + [[1000.0, i] for i in range(30)], usage=[1.0] * 2 + [1e-3] * 30) for _ in range(2)
    ]
    update(books[0], [[1, 1], [3, 1], [8, 2]])
    update(books[1], [[77, 7], [1, 1], [3, 1], [88, 8], [8, 2], [99, 9]], [False, True, True, False, True, False])
    assert torch.equal(books[0].embedding_sum, books[1].embedding_sum) and torch.equal(
        books[0].cluster_usage, books[1].cluster_usage
    )
    assert {tuple(entry) for entry in books[1].embedding[2:].tolist()} == {(1, 1), (3, 1), (8, 2)}


def test_restarts_repeat_by_generator_and_differ_from_each_other():
    x = [[float(i), 0.0] for i in range(100)]
    books = [codebook([[1000.0, i] for i in range(20)], usage=[1e-3] * 20) for _ in range(2)]
    for book in books:
        update(book, x)
    assert torch.equal(books[0].embedding, books[1].embedding)
    assert len({tuple(entry) for entry in books[0].embedding.tolist()}) > 10


def test_a_codebook_to_be_trained_starts_near_the_vectors():
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 5.0, 0.2]) + 7
    book = codebook([[0.0, 0, 0]] * 40)
    book.start_from(x, torch.Generator().manual_seed(0))
    nearest = torch.cdist(book.embedding, x).amin(dim=1)
    assert nearest.max() < 3 and (book.cluster_usage == 1).all()
    assert len(book.encode(x).unique()) > 15 and len(book.embedding.unique(dim=0)) == 40
