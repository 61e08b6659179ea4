"""Statistics of known codes and the loss on them."""

import numpy as np
import pytest
import torch

from voxtral.codec import CodecOutput, VoxtralCodec
from voxtral.known_codes import COVARIANCE_WEIGHT, DECAY, CodeMatching, known_codes, mean_and_covariance, pair_sums
from voxtral.params import parse_params
from voxtral.sources import DataError
from voxtral.standin import small_params

PARAMS = parse_params(small_params()).codec


@pytest.fixture
def codec():
    torch.manual_seed(0)
    return VoxtralCodec(PARAMS)


def random_codes(*shape, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(21, shape, generator=generator)
    codes[..., 0, :] = torch.randint(PARAMS.semantic_codebook_size, codes[..., 0, :].shape, generator=generator)
    return codes


def output_of(codec, codes) -> CodecOutput:
    """Latents that lie on their codes, as leaves."""
    seen = codec.quantizer.decode(codes)
    semantic = PARAMS.semantic_dim
    latent = torch.cat([seen[:, :semantic], (0.999 * seen[:, semantic:]).atanh()], dim=1).requires_grad_()
    return CodecOutput(torch.empty(0), latent, codes, seen[:, :semantic])


def folder_of(path, clips):
    (path / "voice").mkdir()
    for i, codes in enumerate(clips):
        np.save(path / "voice" / f"{i}.npy", np.asarray(codes, dtype=np.int16))
    return str(path)


def test_statistics_are_those_of_adjacent_valid_frames():
    frames, lengths = torch.randn(3, 2, 9), [9, 4, 1]
    valid = torch.arange(9) < torch.tensor(lengths)[:, None]
    mean, covariance = mean_and_covariance(*pair_sums(frames, valid))
    pairs = np.array(
        [np.concatenate([frames[b, :, t], frames[b, :, t + 1]]) for b, n in enumerate(lengths) for t in range(n - 1)]
    )
    assert len(pairs) == 11
    np.testing.assert_allclose(mean, pairs.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(covariance, np.cov(pairs.T, bias=True), atol=1e-5)


def test_codes_that_are_distributed_alike_cost_nothing(codec):
    codes = [random_codes(37, 40, seed=i) for i in range(6)]
    matching = CodeMatching(codes, codec, "cpu")
    same = matching(output_of(codec, torch.stack(codes)), torch.full((6,), 40))
    assert same.item() < 1e-6
    other = CodeMatching(codes, codec, "cpu")(
        output_of(codec, random_codes(6, 37, 40, seed=9) // 2), torch.full((6,), 40)
    )
    assert other.item() > 0.1


def test_padding_does_not_count(codec):
    codes, n_frames = random_codes(2, 37, 12), torch.tensor([12, 7])
    padded = codes.clone()
    padded[1, :, 7:] = 0
    losses = [
        CodeMatching([random_codes(37, 50, seed=3)], codec, "cpu")(output_of(codec, one), n_frames).item()
        for one in (codes, padded)
    ]
    assert losses[0] == losses[1]


def test_the_value_is_what_is_said(codec):
    known = random_codes(37, 30)
    matching = CodeMatching([known], codec, "cpu")
    seen = codec.quantizer.decode(known[None])[0].double().numpy()
    unit = (seen - seen.mean(1, keepdims=True)) / seen.std(1, ddof=1, keepdims=True)
    heard = random_codes(2, 37, 11, seed=5)
    both = (codec.quantizer.decode(heard).double().numpy() - seen.mean(1)[:, None]) / seen.std(1, ddof=1)[:, None]

    def statistics(clips):
        pairs = np.concatenate([np.concatenate([clip[:, :-1], clip[:, 1:]]) for clip in clips], axis=1)
        return pairs.mean(1), np.cov(pairs, bias=True)

    (mean, covariance), (wanted_mean, wanted_covariance) = statistics(both), statistics([unit])
    expected = (
        np.square(mean - wanted_mean).mean() + COVARIANCE_WEIGHT * np.square(covariance - wanted_covariance).mean()
    )
    assert matching(output_of(codec, heard), torch.full((2,), 11)).item() == pytest.approx(expected, rel=1e-4)


def test_the_gradient_leads_to_the_known_statistics(codec):
    """Down the gradient, levels that lie too high come down; it is as large after many steps as at the first one."""
    low, high = random_codes(37, 60) // 3, random_codes(4, 37, 20, seed=2)
    high[:, 1:] = high[:, 1:] // 3 + 12
    matching = CodeMatching([low], codec, "cpu")
    norms = []
    for _ in range(30):
        output = output_of(codec, high)
        matching(output, torch.full((4,), 20)).backward()
        norms.append(output.latent.grad.norm().item())
    acoustic = output.latent.grad[:, PARAMS.semantic_dim :]
    assert acoustic.mean() > 0 and (acoustic > 0).float().mean() > 0.7
    assert norms[-1] == pytest.approx(norms[0], rel=0.02)


def test_the_average_runs_and_is_resumed(codec):
    codes = [random_codes(37, 30)]
    one, other = CodeMatching(codes, codec, "cpu"), CodeMatching(codes, codec, "cpu")
    batches = [output_of(codec, random_codes(2, 37, 10, seed=i)) for i in range(30)]
    n_frames = torch.full((2,), 10)
    for batch in batches[:20]:
        one(batch, n_frames)
    assert one.running[0].requires_grad is False
    before = one.running[0].clone()
    other.load_state_dict(one.state_dict())
    assert [one(batch, n_frames).item() for batch in batches[20:]] == [
        other(batch, n_frames).item() for batch in batches[20:]
    ]
    assert not torch.equal(one.running[0], before)


def test_the_average_is_a_plain_one_at_first_and_then_forgets(codec):
    matching, n_frames, means = CodeMatching([random_codes(37, 30)], codec, "cpu"), torch.full((2,), 10), []
    for i in range(25):
        output = output_of(codec, random_codes(2, 37, 10, seed=i))
        matching(output, n_frames)
        seen = (codec.quantizer.decode(output.codes) - matching.mean) / matching.deviation
        means.append(mean_and_covariance(*pair_sums(seen, torch.ones(2, 10, dtype=torch.bool)))[0])
        if i == 4:
            torch.testing.assert_close(matching.running[0], torch.stack(means).mean(0), atol=1e-5, rtol=1e-4)
        if i == 22:
            before = matching.running[0].clone()
    expected = DECAY * (DECAY * before + (1 - DECAY) * means[23]) + (1 - DECAY) * means[24]
    torch.testing.assert_close(matching.running[0], expected, atol=1e-5, rtol=1e-4)


def test_known_codes_skips_and_lists_what_it_cannot_use(tmp_path):
    good, short = random_codes(37, 5), random_codes(37, 1)
    folder = folder_of(tmp_path, [good, short, good[:5], good + 5000, good - 1000])
    (tmp_path / "voice" / "3.npy").write_bytes(b"no numbers")
    codes, bad = known_codes(folder, PARAMS)
    assert len(codes) == 1 and torch.equal(codes[0], good)
    assert [path.rpartition("/")[2] for path, _ in bad] == ["2.npy", "3.npy", "4.npy"]
    assert "shape [5, 5]" in bad[0][1] and "unreadable" in bad[1][1] and "outside the codebooks" in bad[2][1]


@pytest.mark.parametrize(
    "clips, words", [([random_codes(37, 1)], "all are shorter"), ([random_codes(4, 9)], r"shape \[4, 9\]")]
)
def test_a_folder_without_codes_is_an_error(tmp_path, clips, words):
    with pytest.raises(DataError, match=f"match.codes.*{words}"):
        known_codes(folder_of(tmp_path, clips), PARAMS)


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(DataError, match="match.codes: .*holds no codes .*generate_clips.py"):
        known_codes(str(tmp_path / "none"), PARAMS)
