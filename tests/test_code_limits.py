"""research/code_limits.py on the embedded stand-in: noise, descent, echo, told and trained encoders."""

import json
from pathlib import Path

import pytest
import torch

from voxtral.checkpoint import SafetensorsFile, save_tensors
from voxtral.codec import VoxtralCodec
from voxtral.config import StandinConfig, load_config
from voxtral.data import SpeechDataset, make_loader, validation_batches
from voxtral.evaluation import fresh_encoder
from voxtral.sources import find_clips, split_validation

ROOT = Path(__file__).parents[1]
OVERRIDES = [
    "data.sources=[{kind: manifest, path: talk.csv}]",  # not what a demo may have generated here
    f"data.data_root={ROOT / 'assets/speech'}",
    "data.max_sec=0.8",
    "data.batch_size=3",
    "data.num_workers=0",
]
COMMAND = [
    "--standin",
    str(ROOT / "assets/standin"),
    "--withheld",
    str(ROOT / "assets/standin_withheld_encoder.safetensors"),
    "--data",
    str(ROOT / "configs/demo.yaml"),
    *OVERRIDES,
]


@pytest.fixture(scope="module")
def code_limits(import_script):
    return import_script("code_limits")


def limits_of(code_limits, n_clips, *overrides):
    """The held-out clips of two lengths and their true latents."""
    config = load_config(StandinConfig, ROOT / "configs/demo.yaml", [*OVERRIDES, *overrides])
    clips = split_validation(find_clips(config.data)[0], config.data.validation)[1][:n_clips]
    batches = validation_batches(clips, config.data)
    batches[0].lengths[1] = 9000
    codec = VoxtralCodec.from_checkpoint(ROOT / "assets/standin")
    codec.load_encoder(SafetensorsFile(ROOT / "assets/standin_withheld_encoder.safetensors").read())
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
        codes = codec.quantizer.encode(codec.encode_latent(batch.waveform[i : i + 1, :, :length]))
        again = codec.quantizer.encode(codec.encode_latent(codec.decode(codes)[..., :length]))
        equal.append((again[:, 1:] == codes[:, 1:]).float().mean(1)[0])
    assert row["levels_equal"] == pytest.approx(torch.cat(equal).mean().item(), abs=1e-3)
    assert row["levels_equal"] < 0.9


# ---------------------------------------------------------------- an encoder that is told the true latents


def disturbed(encoder, share):
    """Tensors of an encoder near this one."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: tensor + share * tensor.std() * torch.randn(tensor.shape, generator=generator)
        if tensor.ndim > 1
        else tensor
        for name, tensor in encoder.items()
    }


def test_told_comes_closer_to_the_true_latents(code_limits, limits, spoken, monkeypatch):
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
    rows = [limits.told(spoken, steps) for steps in (1, 20)]
    assert [(row["measurement"], row["at"]) for row in rows] == [("told", 1), ("told", 20)]
    assert errors[1] < 0.9 * errors[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in limits.codec.state_dict().items())
    assert not any(parameter.requires_grad for parameter in limits.codec.parameters())


def test_what_told_lowers_is_the_distance_of_frames_that_are_no_padding(limits, spoken, monkeypatch):
    config, errors = limits.config, []
    monkeypatch.setattr(config.data, "max_sec", 3.6)
    batch = next(iter(make_loader(SpeechDataset(spoken, 3.6, config.seed), config.data, config.seed)))
    assert len(batch.lengths.unique()) > 1
    fresh = VoxtralCodec.from_checkpoint(ROOT / "assets/standin")
    fresh.load_encoder(fresh_encoder(fresh, config.seed))
    with torch.no_grad():
        for i, length in enumerate(batch.lengths.tolist()):
            ours, true = (
                codec.quantizer.squash(codec.encode_latent(batch.waveform[i : i + 1, :, :length]))[0]
                for codec in (fresh, limits.codec)
            )
            errors.append((ours - true).abs() / limits.deviation)
    assert limits.told(spoken, 1)["loss"] == pytest.approx(torch.cat(errors, dim=1).mean().item(), rel=1e-4)


# ---------------------------------------------------------------- errors of trained encoders


def test_errors_of_encoders_against_the_true_one(more, tmp_path):
    files = [tmp_path / name / "encoder.safetensors" for name in ("near", "true", "near_again", "fresh")]
    true = more.codec.encoder_tensors()
    near = disturbed(true, 0.05)
    for file, tensors in zip(files, (near, true, near, fresh_encoder(more.codec, 1))):
        save_tensors(file, tensors)
    near, true, again, fresh = more.encoders(files)
    assert near["measurement"] == f"encoder {tmp_path.name}/near" and [row["at"] for row in (near, fresh)] == [0, 3]
    assert near["error_correlation"] == pytest.approx(1, abs=1e-4) and near["levels_as_first"] == 1
    assert again | {"measurement": near["measurement"], "at": 0} == near
    assert true["error"] < 1e-5 and true["levels_equal"] == 1 and max(true["error_by_direction"]) < 1e-6
    assert (
        true["levels_as_first"] == pytest.approx(near["levels_equal"], abs=1e-6) and 0.1 < near["levels_equal"] < 0.95
    )
    assert fresh["error"] > near["error"] > 0 and abs(fresh["error_correlation"]) < 0.9
    seen = (more.together(more.true) / more.deviation)[more.codec.params.semantic_dim :]
    variances = torch.linalg.eigvalsh(seen.cov()).flip(0)
    for row in (near, fresh):
        assert (variances * torch.tensor(row["error_by_direction"])).mean().sqrt().item() == pytest.approx(
            row["error"], rel=1e-3
        )
    assert more.encoders(files[1:2])[0]["levels_as_first"] == 1


def test_opposite_errors_and_the_mean(more, tmp_path, monkeypatch):
    """Three encoders: with some noise, with the opposite one, and one that always says the mean."""
    (true,), valid, semantic = more.true, more.valid(0), more.codec.params.semantic_dim
    seen, noise = more.codec.quantizer.squash(true), torch.randn(true.shape, generator=torch.Generator().manual_seed(0))
    mean = more.together(more.true).mean(dim=1, keepdim=True).expand_as(seen)
    said = iter(
        [more.unsquash(x) for x in (seen + 0.01 * more.deviation * noise, seen - 0.01 * more.deviation * noise, mean)]
    )
    save_tensors(tmp_path / "encoder.safetensors", more.codec.encoder_tensors())
    monkeypatch.setattr(VoxtralCodec, "encode_latent", lambda *_: next(said))
    one, other, always = more.encoders([tmp_path / "encoder.safetensors"] * 3)
    size = 0.01 * noise[:, semantic:].transpose(1, 2)[valid].square().mean().sqrt().item()
    assert one["error"] == pytest.approx(size, rel=0.01) and other["error"] == pytest.approx(size, rel=0.01)
    assert one["error_correlation"] == pytest.approx(1, abs=1e-3) and other["error_correlation"] == pytest.approx(
        -1, abs=1e-3
    )
    n_frames = int(valid.sum())
    assert always["error_by_direction"] == pytest.approx(
        [(n_frames - 1) / n_frames] * (true.shape[1] - semantic), rel=1e-2
    )


# ---------------------------------------------------------------- command line


def test_command(code_limits, limits, tmp_path, capsys, monkeypatch):
    heard, told = [], code_limits.Limits.told
    monkeypatch.setattr(
        code_limits.Limits, "told", lambda self, clips, steps: heard.extend(clips) or told(self, clips, steps)
    )
    encoder = tmp_path / "run" / "encoder.safetensors"
    save_tensors(encoder, fresh_encoder(limits.codec, 0))
    code_limits.main(
        [
            *COMMAND,
            "--output",
            str(tmp_path),
            "--clips",
            "4",
            "--steps",
            "6",
            "--told",
            "2,0,1",
            "--encoder",
            str(encoder),
            "--encoder",
            str(encoder),
        ]
    )
    report = json.loads(
        (tmp_path / "results.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON")
    )
    assert [row["measurement"] for row in report["rows"]] == [
        "semantic codes shuffled",
        "acoustic codes shuffled",
        *["noise"] * 6,
        *["descent"] * 7,
        "echo",
        "told",
        "told",
        *[f"encoder {encoder.parent.parent.name}/{encoder.parent.name}"] * 2,
    ]
    assert [row["at"] for row in report["rows"] if row["measurement"] == "told"] == [2, 1]
    assert len(heard) == 2 * 215 and not {clip.speaker for clip in heard} & {"w_m390", "w_f391", "w_m400", "w_f401"}
    assert report["clips"] == 4 and all(
        (tmp_path / name).stat().st_size > 5000 for name in ("limits.png", "errors.png")
    )
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out and table.count("\n") == 2 + len(report["rows"]) + 1 + 2 + 2


@pytest.mark.parametrize(
    "change, words",
    [
        (["--steps", "0"], "--steps is 0"),
        (["--clips", "0"], "--clips is 0"),
        (["--told", "500,x"], "--told is 500,x"),
        (["--encoder", "none.safetensors"], "none.safetensors is missing"),
        (["loss.l1=0", "loss.mel=0"], "needs loss.l1, loss.stft or loss.mel"),
    ],
)
def test_mistakes_are_one_sentence(code_limits, tmp_path, capsys, change, words):
    with pytest.raises(SystemExit) as stop:
        code_limits.main([*COMMAND, "--output", str(tmp_path / "out"), *change])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and words in said and "Traceback" not in said and not (tmp_path / "out").exists()
