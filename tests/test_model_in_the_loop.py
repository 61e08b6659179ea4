"""research/model_in_the_loop.py: without pairs it is train_encoder.py; with them each term reaches the encoder."""

import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT, command_line

import train_encoder
from voxtral.checkpoint import SafetensorsFile, fingerprint
from voxtral.clips import resynthesize
from voxtral.codec import VoxtralCodec
from voxtral.generation import Models
from voxtral.sources import Clip, DataConfig, SourceConfig, find_clips
from voxtral.tts import load_tokenizer

STANDIN, TRUE = str(ROOT / "assets/standin"), str(ROOT / "assets/standin_withheld_encoder.safetensors")
FEW = [
    "device=cpu",
    f"data.data_root={ROOT / 'assets/speech'}",
    "data.sources=[{kind: manifest, path: talk.csv}]",
    "data.validation.clips=6",
    "data.batch_size=2",
    "data.max_sec=0.48",
    "data.num_workers=0",
    "train.max_steps=3",
    "loss.codes=0",
    "match.codes=presets",
]


@pytest.fixture(scope="module")
def benchmark(import_script):
    return import_script("model_in_the_loop")


@pytest.fixture(scope="module")
def models():
    models = Models.from_checkpoint(STANDIN, dtype=torch.float32)
    models.codec.load_encoder(SafetensorsFile(TRUE).read())
    return models


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return list(find_clips(DataConfig(str(ROOT / "assets/speech"), [SourceConfig("manifest", "talk.csv")]))[0][0])


@pytest.fixture(scope="module")
def model(benchmark, models):
    return benchmark.FrozenModel(models, temperature=0.1)


@pytest.fixture(scope="module")
def pairs(benchmark, models, clips):
    return benchmark.TextedPairs(clips[:8], load_tokenizer(Path(STANDIN)), models.codec.params, 3.2, seed=0)


def run(benchmark, output, *options) -> list[dict]:
    fixed = {"checkpoint": STANDIN, "config": ROOT / "configs/demo.yaml", "max_sec": 1.6, "after": 0, "log_every": 1}
    return benchmark.main([*command_line(**fixed, output=output), *options, *FEW])


def test_without_pairs_it_is_train_encoder(benchmark, tmp_path):
    run(benchmark, tmp_path / "ours")
    train_encoder.main(["--config", str(ROOT / "configs/demo.yaml"), f"output_dir={tmp_path / 'theirs'}", *FEW])
    ours, theirs = (
        SafetensorsFile(tmp_path / name / "checkpoints/step_00000003/encoder.safetensors").read()
        for name in ("ours", "theirs")
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_every_term_reaches_the_encoder_and_nothing_else_changes(benchmark, models, clips, tmp_path, monkeypatch):
    resynthesize(
        models.codec, [clip for clip in clips if clip.speaker == clips[0].speaker], tmp_path / "generated", 1.6
    )
    frozen = []

    def from_checkpoint(*arguments):
        loaded = Models(*vars(models).values())
        frozen.extend([*loaded.backbone.state_dict().values(), *loaded.acoustic.state_dict().values()])
        return loaded

    monkeypatch.setattr(benchmark.Models, "from_checkpoint", from_checkpoint)
    before = fingerprint([*models.backbone.state_dict().values(), *models.acoustic.state_dict().values()])
    options = ["--pairs", "2", "--anchors", "2", "--generated", str(tmp_path / "generated"), "--start", TRUE]
    rows = run(benchmark, tmp_path / "run", *options, "--true", TRUE)
    assert fingerprint(frozen) == before
    terms = {"l1", "mel", "commit", "match", "semantic", "flow", "anchor_semantic", "anchor_flow"}
    assert {name for name in terms if rows[0][f"gradient_{name}"] > 1e-4} == terms
    assert rows[0]["held_out_levels_within_1"] > 0.98 and rows[0]["held_out_nll"] == pytest.approx(
        rows[0]["true_nll"], rel=0.1
    )
    assert rows[0]["true_nll"] < 5  # of ln 1024 = 6.9 nats
    assert [json.loads(line)["step"] for line in (tmp_path / "run/loop.jsonl").read_text().splitlines()] == [1, 2, 3]
    written = SafetensorsFile(tmp_path / "run/checkpoints/step_00000003/encoder.safetensors").read()
    start = SafetensorsFile(TRUE).read()
    assert written.keys() == start.keys() and any(not torch.equal(written[name], start[name].float()) for name in start)
    VoxtralCodec.from_checkpoint(STANDIN).load_encoder(written)


def test_a_clip_that_cannot_be_read_is_left_out_and_named(benchmark, models, clips, tmp_path, capsys):
    gone = Clip(str(tmp_path / "gone.wav"), clips[0].speaker, 0, "It is gone.")
    found = benchmark.TextedPairs([gone, *clips[:8]], load_tokenizer(Path(STANDIN)), models.codec.params, 3.2, seed=0)
    assert gone not in found.clips and len(found) == 8
    assert capsys.readouterr().out.startswith(f"left out: {gone.path}")


def test_a_padded_pair_is_what_it_is_alone(benchmark, models, model, pairs):
    items = [pairs[0, 0], pairs[1, 5]]
    with torch.no_grad():
        together, _ = model.hear(models.codec, benchmark.collate_texted(items), "both")
        for number, item in enumerate(items):
            alone, spoken = model.hear(models.codec, benchmark.collate_texted([item]), "both")
            n = item["n_speech"]
            torch.testing.assert_close(together[number, :n], alone[0, :n], rtol=1e-3, atol=1e-3)
    assert len({item["n_speech"] for item in items}) == 2


def test_the_model_sees_the_codes_and_the_gradient_goes_where_it_may(benchmark, models, model, pairs):
    batch = benchmark.collate_texted([pairs[0, 0], pairs[1, 5]])
    latent = models.codec.encode_latent(batch.waveform, batch.lengths).detach().requires_grad_()
    frames = model.of_latent(models.codec, latent[:2])
    exact = model.of_codes(models.codec, frames.codes)
    rows = model.prompt_rows(models.codec, frames, batch.n_reference)
    torch.testing.assert_close(rows, models.codec.voice_rows(frames.codes, batch.n_reference), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(frames.levels, exact.levels, rtol=1e-5, atol=1e-5)
    assert torch.equal(frames.assignment.argmax(dim=-1), frames.codes[:, 0])
    for through, expected in (("both", True), ("target", False)):
        models.codec.encoder_blocks.requires_grad_(True)
        hidden, spoken = model.hear(models.codec, batch, through)
        models.codec.encoder_blocks.requires_grad_(False)
        assert hidden.requires_grad == expected and spoken.levels.requires_grad and spoken.assignment.requires_grad


def test_a_contrast_is_nothing_until_its_copy_has_learnt(benchmark, models, model, pairs):
    batch = benchmark.collate_texted([pairs[0, 0], pairs[1, 5]])
    with torch.no_grad():
        latent = models.codec.encode_latent(batch.waveform, batch.lengths) + 0.3  # other codes than the model knows
        spoken = model.of_latent(models.codec, latent[2:])
        reference = model.prompt_rows(models.codec, model.of_latent(models.codec, latent[:2]), batch.n_reference)
        hidden = model.hidden(batch, reference, spoken)
    valid = benchmark.valid_mask(batch.n_speech, hidden.shape[1])
    contrast = benchmark.Contrast(model)

    def losses_and_gradient():
        spoken.levels.requires_grad_(True).grad = None
        losses = contrast(hidden, spoken, valid, seed=3)
        losses["flow"].backward()
        return [loss.item() for loss in losses.values()], spoken.levels.grad

    losses, gradient = losses_and_gradient()
    assert losses == [0, 0] and (gradient == 0).all()
    for step in range(30):
        contrast.learn(models.codec, hidden, spoken, valid, seed=step)
    losses, gradient = losses_and_gradient()
    assert losses[0] > 0.1 and losses[1] > 0.001
    with torch.no_grad():
        before = model.surprise(hidden, spoken, valid, 3)["flow"]
        moved = benchmark.dataclasses.replace(spoken, levels=spoken.levels - 0.05 * gradient.sign())
        assert model.surprise(hidden, moved, valid, 3)["flow"] < before  # towards what the frozen model expects
