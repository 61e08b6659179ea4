"""benchmarks/code_limits.py on the embedded stand-in: noise, descent, echo."""
import json
from pathlib import Path

import pytest
import torch

from voxtral.codec import VoxtralCodec
from voxtral.config import StandinConfig, load_config
from voxtral.data import validation_batches
from voxtral.sources import find_clips, split_validation

ROOT = Path(__file__).parents[1]
OVERRIDES = [f"data.data_root={ROOT / 'assets/speech'}", "data.max_sec=0.8", "data.batch_size=3"]
COMMAND = ["--standin", str(ROOT / "assets/standin"), "--withheld", str(ROOT / "assets/standin_withheld_encoder.safetensors"),
           "--data", str(ROOT / "configs/demo.yaml"), *OVERRIDES]


@pytest.fixture(scope="module")
def code_limits():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        import code_limits
        yield code_limits


@pytest.fixture(scope="module")
def limits(code_limits):
    """Three clips of two lengths and their true latents."""
    from voxtral.checkpoint import SafetensorsFile
    config = load_config(StandinConfig, ROOT / "configs/demo.yaml", OVERRIDES)
    clips = split_validation(find_clips(config.data)[0], config.data.validation)[1][:3]
    batches = validation_batches(clips, config.data)
    batches[0].lengths[1] = 9000
    codec = VoxtralCodec.from_checkpoint(ROOT / "assets/standin")
    file = SafetensorsFile(ROOT / "assets/standin_withheld_encoder.safetensors")
    codec.load_encoder(file.read(file.entries))
    return code_limits.Limits(codec.requires_grad_(False), batches, config)


def test_agreement_and_sound_fall_with_noise(limits):
    rows = limits.noise()
    assert [row["at"] for row in rows] == [0, 0.05, 0.1, 0.2, 0.3, 0.5]
    assert rows[0]["semantic_equal"] == rows[0]["levels_equal"] == 1
    levels, sound = [row["levels_equal"] for row in rows], [row["mel"] for row in rows]
    assert levels == sorted(levels, reverse=True) and levels[-1] < 0.3
    assert sound[-1] > sound[0]


def test_noise_has_the_deviation_that_is_said(limits, monkeypatch):
    seen = []
    monkeypatch.setattr(limits, "measure", lambda latents: seen.append(latents) or {})
    limits.noise()
    disturbed = limits.codec.quantizer.squash(seen[2][0]) - limits.codec.quantizer.squash(limits.true[0])
    assert torch.allclose((disturbed / limits.deviation).std(), torch.tensor(0.1), rtol=0.05)


def test_a_descent_lowers_the_loss_and_starts_at_the_true_codes(limits):
    rows = limits.descent(steps=6, learning_rate=0.02)
    assert rows[0]["levels_equal"] == 1 and rows[-1]["levels_equal"] < 0.9
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert limits.noise()[0]["levels_equal"] == 1  # the true latents are where they were


def test_a_descent_is_adam_on_the_latents(limits, monkeypatch):
    seen = []
    monkeypatch.setattr(limits, "measure", lambda latents: seen.append(latents[0].clone()) or {"mel": 0.0, "semantic_equal": 0.0,
                                                                                          "levels_equal": 0.0, "levels_within_1": 0.0})
    monkeypatch.setattr(limits, "loss", lambda i, latent: (latent - 0.1).square().sum() / len(latent))
    limits.descent(steps=6, learning_rate=0.02)
    latent = limits.true[0].clone().requires_grad_()
    optimizer = torch.optim.Adam([latent], lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    for expected in seen:
        torch.testing.assert_close(expected, latent.detach())
        optimizer.zero_grad()
        (latent - 0.1).square().sum().backward()
        optimizer.step()
        schedule.step()


def test_shuffling_moves_one_kind_of_codes_and_keeps_all_of_them(limits, monkeypatch):
    semantic, acoustic = limits.shuffle()
    assert semantic["levels_equal"] == 1 > semantic["semantic_equal"]
    assert acoustic["semantic_equal"] == 1 > acoustic["levels_equal"]
    assert acoustic["mel"] > semantic["mel"]  # of this stand-in: nothing but sound has taught it what codes mean
    seen = []
    monkeypatch.setattr(limits, "measure", lambda latents: seen.append(latents) or {})
    limits.shuffle()
    valid = limits.valid(0)
    before, after = (latents[0].transpose(1, 2)[valid][:, 0].sort().values for latents in (limits.true, seen[0]))
    assert torch.equal(before, after)


def test_padding_decides_nothing(limits):
    def with_tail(value):
        return [latent.masked_fill(~limits.valid(i)[:, None], value) for i, latent in enumerate(limits.true)]
    one, other = limits.measure(with_tail(0.0)), limits.measure(with_tail(2.0))
    assert one == pytest.approx(other, rel=1e-5)
    assert one["levels_equal"] == 1


def test_echo_is_what_encoding_the_decoded_clip_says(limits):
    codec, batch = limits.codec, limits.batches[0]
    row, equal = limits.echo()[0], []
    for i, length in enumerate(batch.lengths.tolist()):
        codes = codec.encode(batch.waveform[i:i + 1, :, :length])
        again = codec.encode(codec.decode(codes)[..., :length])
        equal.append((again[:, 1:] == codes[:, 1:]).float().mean(1)[0])
    assert row["levels_equal"] == pytest.approx(torch.cat(equal).mean().item(), abs=1e-3)
    assert row["levels_equal"] < 0.9


def test_command(code_limits, tmp_path, capsys):
    code_limits.main([*COMMAND, "--output", str(tmp_path), "--clips", "2", "--steps", "6"])
    report = json.loads((tmp_path / "results.json").read_text())
    assert [row["measurement"] for row in report["rows"]] == ["semantic codes shuffled", "acoustic codes shuffled", *["noise"] * 6,
                                                                     *["descent"] * 7, "echo"]
    assert report["clips"] == 2 and (tmp_path / "limits.png").stat().st_size > 5000
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out and table.count("\n") == 2 + len(report["rows"])


@pytest.mark.parametrize("change, words", [
    (["--steps", "0"], "--steps is 0"), (["--clips", "0"], "--clips is 0"),
    (["loss.l1=0", "loss.mel=0"], "needs loss.l1, loss.stft or loss.mel")])
def test_mistakes_are_one_sentence(code_limits, tmp_path, capsys, change, words):
    with pytest.raises(SystemExit) as stop:
        code_limits.main([*COMMAND, "--output", str(tmp_path / "out"), *change])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and words in said and "Traceback" not in said and not (tmp_path / "out").exists()
