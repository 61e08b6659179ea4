"""Speaker embeddings of random weights in the format of Resemblyzer's pretrained.pt."""

import pytest
import torch

from voxtral.speaker import SpeakerEncoder


@pytest.fixture(scope="module")
def encoder(speaker_checkpoint):
    return SpeakerEncoder(speaker_checkpoint)


def noise(seconds, seed=0):
    return torch.randn(1, 1, round(seconds * 24_000), generator=torch.Generator().manual_seed(seed)) * 0.3


def lengths(*seconds):
    return torch.tensor([round(s * 24_000) for s in seconds])


def test_identical_clips_are_alike(encoder):
    embedding = encoder(noise(2.0), lengths(2.0))
    assert embedding.shape == (1, 256) and embedding.norm().item() == pytest.approx(1, abs=1e-5)
    assert (embedding @ encoder(noise(2.0), lengths(2.0)).T).item() == pytest.approx(1, abs=1e-6)
    tone = torch.sin(torch.arange(48_000) * 0.05)[None, None]
    assert (embedding @ encoder(tone, lengths(2.0)).T).item() < 1 - 1e-3


@pytest.mark.parametrize("seconds", [0.3, 1.6, 2.5])
def test_padding_and_the_rest_of_the_batch_change_nothing(encoder, seconds):
    alone = encoder(noise(seconds), lengths(seconds))
    assert alone.norm().item() == pytest.approx(1, abs=1e-5)
    together = torch.cat([noise(4.0, seed=1), noise(4.0, seed=2)])
    together[0, :, : round(seconds * 24_000)] = noise(seconds)
    assert torch.allclose(alone, encoder(together, lengths(seconds, 4.0))[:1], atol=1e-5)


def test_windows_are_averaged(encoder):
    """3.2 s hold windows at 0, 0.77 and 1.54 s; of a fourth too little would be inside."""
    clip = noise(3.2)
    embedding = encoder(clip, lengths(3.2))
    changed = clip.clone()
    changed[..., round(3.15 * 24_000) :] = 0  # beyond the third window
    assert torch.allclose(embedding, encoder(changed, lengths(3.2)), atol=1e-6)
    changed[..., round(2.5 * 24_000) :] = 0
    assert not torch.allclose(embedding, encoder(changed, lengths(3.2)), atol=1e-4)


def test_quiet_clips_are_raised(encoder):
    clip = noise(1.6) / 30
    assert torch.allclose(encoder(clip, lengths(1.6)), encoder(clip / 10, lengths(1.6)), atol=1e-5)


def test_missing_weights(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"nowhere\.pt is neither"):
        SpeakerEncoder("nowhere.pt")
    torch.save({"other": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt is not Resemblyzer's"):
        SpeakerEncoder(str(tmp_path / "other.pt"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps resemblyzer"):
        SpeakerEncoder()
