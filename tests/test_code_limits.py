"""research/code_limits.py on the embedded stand-in: descent, supervised and trained encoders."""

import pytest
import torch
from conftest import ROOT, command_line, read_report

from voxtral.checkpoint import SafetensorsFile, save_tensors
from voxtral.codec import VoxtralCodec
from voxtral.config import StandinConfig, load_config
from voxtral.data import SpeechDataset, make_loader, validation_batches
from voxtral.evaluation import fresh_encoder
from voxtral.sources import find_clips, split_validation

OVERRIDES = [
    "data.sources=[{kind: manifest, path: talk.csv}]",  # not what a demo may have generated here
    f"data.data_root={ROOT / 'assets/speech'}",
    "data.max_sec=0.8",
    "data.batch_size=3",
    "data.num_workers=0",
]
STANDIN, TRUE = ROOT / "assets/standin", ROOT / "assets/standin_withheld_encoder.safetensors"
COMMAND = command_line(standin=STANDIN, withheld=TRUE, data=ROOT / "configs/demo.yaml") + OVERRIDES


@pytest.fixture(scope="module")
def code_limits(import_script):
    return import_script("code_limits")


def limits_of(code_limits, n_clips, *overrides):
    """The held-out clips of two lengths and their true latents."""
    config = load_config(StandinConfig, ROOT / "configs/demo.yaml", [*OVERRIDES, *overrides])
    clips = split_validation(find_clips(config.data)[0], config.data.validation)[1][:n_clips]
    batches = validation_batches(clips, config.data)
    batches[0].lengths[1] = 9000
    codec = VoxtralCodec.from_checkpoint(STANDIN)
    codec.load_encoder(SafetensorsFile(TRUE).read())
    return code_limits.Limits(codec.requires_grad_(False), batches, config)


@pytest.fixture(scope="module")
def limits(code_limits):
    return limits_of(code_limits, 3)


@pytest.fixture(scope="module")
def more(code_limits):
    """So many frames that they have a variance in every direction."""
    return limits_of(code_limits, 8, "data.max_sec=1.92", "data.batch_size=8")


@pytest.fixture(scope="module")
def spoken(limits):
    """Speech to train on."""
    return split_validation(find_clips(limits.config.data)[0], limits.config.data.validation)[0][0]


def test_a_descent_lowers_the_loss_and_starts_at_the_true_codes(limits):
    rows = limits.descent(steps=6, learning_rate=0.02)
    assert rows[0]["levels_equal"] == 1 and rows[-1]["levels_equal"] < 0.9
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_a_descent_is_adam_on_the_latents(limits, monkeypatch):
    seen = []
    monkeypatch.setattr(
        limits,
        "measure",
        lambda latents: (
            seen.append(latents[0].clone())
            or {"mel": 0.0, "semantic_equal": 0.0, "levels_equal": 0.0, "levels_within_1": 0.0}
        ),
    )
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


def test_padding_decides_nothing(limits):
    def with_tail(value):
        return [latent.masked_fill(~limits.valid(i)[:, None], value) for i, latent in enumerate(limits.true)]

    one, other = limits.measure(with_tail(0.0)), limits.measure(with_tail(2.0))
    assert one == pytest.approx(other, rel=1e-5)
    assert one["levels_equal"] == 1


# ---------------------------------------------------------------- an encoder that is given the true latents


def disturbed(encoder, share):
    """Tensors of an encoder near this one."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: tensor + share * tensor.std() * torch.randn(tensor.shape, generator=generator)
        if tensor.ndim > 1
        else tensor
        for name, tensor in encoder.items()
    }


def test_a_supervised_encoder_comes_closer_to_the_true_latents(code_limits, limits, spoken, monkeypatch):
    before, errors = {name: tensor.clone() for name, tensor in limits.codec.state_dict().items()}, []
    near = disturbed(limits.codec.encoder_tensors(), 0.3)  # from a fresh one it takes longer than a test may
    monkeypatch.setattr(code_limits, "fresh_encoder", lambda *_: near)
    monkeypatch.setattr(limits.config.optimizer, "learning_rate", 5e-4)
    true = limits.together(limits.true)
    monkeypatch.setattr(
        limits,
        "measure",
        lambda latents: errors.append(((limits.together(latents) - true) / limits.deviation).abs().mean()) or {},
    )
    rows = [limits.supervised(spoken, steps) for steps in (1, 20)]
    assert [(row["measurement"], row["at"]) for row in rows] == [("supervised", 1), ("supervised", 20)]
    assert errors[1] < 0.9 * errors[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in limits.codec.state_dict().items())
    assert not any(parameter.requires_grad for parameter in limits.codec.parameters())


def test_what_supervision_lowers_is_the_distance_of_frames_that_are_no_padding(limits, spoken, monkeypatch):
    config, errors = limits.config, []
    monkeypatch.setattr(config.data, "max_sec", 3.6)
    batch = next(iter(make_loader(SpeechDataset(spoken, 3.6, config.seed), config.data, config.seed)))
    assert len(batch.lengths.unique()) > 1
    fresh = VoxtralCodec.from_checkpoint(STANDIN)
    fresh.load_encoder(fresh_encoder(fresh, config.seed))
    with torch.no_grad():
        for i, length in enumerate(batch.lengths.tolist()):
            ours, true = (
                codec.quantizer.squash(codec.encode_latent(batch.waveform[i : i + 1, :, :length]))[0]
                for codec in (fresh, limits.codec)
            )
            errors.append((ours - true).abs() / limits.deviation)
    assert limits.supervised(spoken, 1)["loss"] == pytest.approx(torch.cat(errors, dim=1).mean().item(), rel=1e-4)


# ---------------------------------------------------------------- errors of trained encoders


def test_errors_of_encoders_against_the_true_one(more, tmp_path):
    files = [tmp_path / name / "encoder.safetensors" for name in ("true", "near", "fresh")]
    true = more.codec.encoder_tensors()
    for file, tensors in zip(files, (true, disturbed(true, 0.05), fresh_encoder(more.codec, 1))):
        save_tensors(file, tensors)
    true, near, fresh = more.encoders(files)
    assert near["measurement"] == f"encoder {tmp_path.name}/near"
    assert true["levels_equal"] == 1 and max(true["error_by_direction"]) < 1e-6
    assert 0.1 < near["levels_equal"] < 0.95 and sum(near["error_by_direction"]) < sum(fresh["error_by_direction"])


def test_an_encoder_that_says_the_mean_misses_the_variance(more, tmp_path, monkeypatch):
    """Of every direction. Errors along one of them are told from the others'."""
    (true,), valid, semantic = more.true, more.valid(0), more.codec.params.semantic_dim
    seen = more.together(more.true)
    mean = seen.mean(dim=1, keepdim=True).expand_as(more.codec.quantizer.squash(true)[0])[None].expand_as(true).clone()
    _, directions = torch.linalg.eigh((seen / more.deviation)[semantic:].cov())
    widest = more.codec.quantizer.squash(true)
    widest[:, semantic:] += 0.01 * more.deviation[semantic:] * directions[:, -1:]
    said = iter(torch.cat([x[:, :semantic], x[:, semantic:].clamp(-0.9999, 0.9999).atanh()], 1) for x in (mean, widest))
    save_tensors(tmp_path / "encoder.safetensors", more.codec.encoder_tensors())
    monkeypatch.setattr(VoxtralCodec, "encode_latent", lambda *_: next(said))
    always, wide = more.encoders([tmp_path / "encoder.safetensors"] * 2)
    n_frames = int(valid.sum())
    expected = [(n_frames - 1) / n_frames] * (true.shape[1] - semantic)
    assert always["error_by_direction"] == pytest.approx(expected, rel=1e-2)
    assert wide["error_by_direction"][0] > 100 * max(wide["error_by_direction"][1:])


# ---------------------------------------------------------------- command line


def test_command(code_limits, limits, tmp_path, capsys, monkeypatch):
    trained_on, supervised = [], code_limits.Limits.supervised
    monkeypatch.setattr(
        code_limits.Limits,
        "supervised",
        lambda self, clips, steps: trained_on.extend(clips) or supervised(self, clips, steps),
    )
    encoder = tmp_path / "run" / "encoder.safetensors"
    save_tensors(encoder, fresh_encoder(limits.codec, 0))
    code_limits.main(COMMAND + command_line(output=tmp_path, clips=4, steps=6, supervised="2,0,1", encoder=encoder))
    report = read_report(tmp_path / "results.json")
    names = [
        *["descent"] * 7,
        "supervised",
        "supervised",
        f"encoder {encoder.parent.parent.name}/{encoder.parent.name}",
    ]
    assert [row["measurement"] for row in report["rows"]] == names and report["clips"] == 4
    assert [row["at"] for row in report["rows"] if row["measurement"] == "supervised"] == [2, 1]
    assert len(trained_on) == 2 * 215 and not {clip.speaker for clip in trained_on} & {
        "w_m390",
        "w_f391",
        "w_m400",
        "w_f401",
    }
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out and table.count("\n") == 2 + len(report["rows"])


@pytest.mark.parametrize(
    "change, words",
    [
        (["--steps", "0"], "--steps is 0"),
        (["--clips", "0"], "--clips is 0"),
        (["--supervised", "500,x"], "--supervised is 500,x"),
        (["--encoder", "none.safetensors"], "none.safetensors is missing"),
        (["loss.l1=0", "loss.mel=0"], "needs loss.l1, loss.stft or loss.mel"),
    ],
)
def test_mistakes_are_one_sentence(code_limits, tmp_path, refused, change, words):
    assert words in refused(code_limits.main, [*COMMAND, "--output", str(tmp_path / "out"), *change])
    assert not (tmp_path / "out").exists()
