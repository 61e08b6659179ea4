"""A reference's codes, refined on the recording, on a small random codec."""

import pytest
import torch
from conftest import SPEECH, command_line, write_injected

import clone_voice
import patch_tokenizer
from voxtral import refinement
from voxtral.clones import System, _voice
from voxtral.codec import VoxtralCodec
from voxtral.losses import MelDistance
from voxtral.reference import prepare_reference
from voxtral.refinement import refined_codes
from voxtral.voices import encode_reference, load_pt

CLIP = SPEECH / "k_af_heart_0.opus"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_injected(tmp_path_factory.mktemp("refinement"), {"alpha": 3})


@pytest.fixture(scope="module")
def codec(checkpoint):
    return VoxtralCodec.from_checkpoint(checkpoint)


@pytest.fixture(scope="module")
def waveform():
    return prepare_reference(CLIP).waveform[..., :30000]  # ends within a frame


@torch.no_grad()
def distance(codec, codes, waveform):
    decoded = codec.decode(codes)[..., : waveform.shape[-1]]
    return MelDistance(24000)(decoded, waveform, torch.tensor([waveform.shape[-1]])).item()


def test_codes_come_nearer_to_the_recording(codec, waveform):
    with torch.no_grad():
        before = codec.quantizer.encode(codec.encode_latent(waveform))
    after, note = refined_codes(codec, waveform, seconds=600)
    assert after.shape == before.shape and torch.equal(after[:, 0], before[:, 0])
    assert (after[:, 1:] - before[:, 1:]).abs().float().mean() > 0.2
    there, here = distance(codec, before, waveform), distance(codec, after, waveform)
    assert here < 0.97 * there
    assert note == f"refined in 40 steps: mel distance to the recording {there:.2f}, now {here:.2f}"
    assert all(parameter.grad is None for parameter in codec.parameters())


def test_it_ends_when_the_time_is_over(codec, waveform, monkeypatch):
    clock = iter([0.0, 1.0, 2.0, 2.9, 3.1])
    monkeypatch.setattr(refinement.time, "monotonic", lambda: next(clock))
    assert refined_codes(codec, waveform, seconds=3)[1].startswith("refined in 3 steps")


def test_a_registered_voice_is_refined_when_asked(checkpoint, codec, monkeypatch, capsys):
    monkeypatch.setattr(refinement, "MAX_STEPS", 2)
    patch_tokenizer.main(["--checkpoint", str(checkpoint), "--voice", f"plain={CLIP}"])
    assert "refined" not in capsys.readouterr().out
    patch_tokenizer.main(["--checkpoint", str(checkpoint), "--voice", f"refined={CLIP}", "--refine", "600"])
    assert "refined in 2 steps: mel distance to the recording" in capsys.readouterr().out
    plain, refined = (load_pt(checkpoint / "voice_embedding" / f"{name}.pt") for name in ("plain", "refined"))
    assert plain.shape == refined.shape and torch.equal(plain[-1], refined[-1]) and not torch.equal(plain, refined)
    assert torch.equal(refined, encode_reference(codec, CLIP, 600)[0].bfloat16())
    assert torch.equal(plain, encode_reference(codec, CLIP)[0].bfloat16())


def test_clone_voice_refines_when_asked(checkpoint, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(refinement, "MAX_STEPS", 1)
    said = {"text": "Yes.", "max_sec": 0.2, "output": tmp_path / "out.wav", "device": "cpu"}
    clone_voice.main(command_line(checkpoint=checkpoint, reference=CLIP, refine=600, **said))
    assert "refined in 1 steps" in capsys.readouterr().out


def test_mistakes(checkpoint, refused):
    common = {"checkpoint": checkpoint, "text": "Yes.", "output": "a.wav"}
    assert "--refine needs --ref" in refused(clone_voice.main, command_line(**common, voice="alpha", refine=5))
    assert "--refine is -1" in refused(clone_voice.main, command_line(**common, reference="a.wav", refine=-1))
    voice = command_line(checkpoint=checkpoint, voice="a=a.wav", refine="inf")
    assert "--refine is inf" in refused(patch_tokenizer.main, voice)


def test_clones_are_measured_with_refined_codes(codec, monkeypatch):
    class Deaf:
        def embed(self, waveform):
            return torch.zeros(1)

    monkeypatch.setattr(refinement, "MAX_STEPS", 2)
    encoder = codec.encoder_tensors()
    for system in (System("plain", encoder), System("refined", encoder, refine_sec=600.0)):
        expected = encode_reference(codec, CLIP, system.refine_sec)[0].bfloat16()
        assert torch.equal(_voice(codec, CLIP, Deaf(), system)[0], expected)
