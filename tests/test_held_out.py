"""Where an encoder starts, and what it is measured by: held-out clips of every source, true codes of generated ones,
clips that decide nothing."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from conftest import command_line
from safetensors.torch import load_file
from test_train_encoder import SPEECH

import evaluate
import train_encoder
from voxtral.audio import load_segment
from voxtral.checkpoint import save_tensors
from voxtral.clips import resynthesize
from voxtral.codec import VoxtralCodec
from voxtral.history import metric_rows
from voxtral.inject import inject
from voxtral.sources import (
    Clip,
    DataConfig,
    DataError,
    SourceConfig,
    ValidationConfig,
    final_clips,
    find_clips,
    split_validation,
)
from voxtral.standin import small_params, write_random_checkpoint
from voxtral.validation import known_agreement

CHEAP = {"l1": 1.0, "stft": 0, "mel": 0, "feature": 0, "asr": 0, "commit": 0, "match": 0}


# ---------------------------------------------------------------- which clips


def source(number, count):
    return [Clip(f"/data/{number}/speaker{i % 3}/{i}.wav", f"speaker{i % 3}", number) for i in range(count)]


def test_validation_and_test_clips_come_from_every_source_alike():
    sources, validation = [source(0, 1000), source(1, 40), source(2, 3)], ValidationConfig(clips=9, test_clips=6)
    train, chosen = split_validation(sources, validation)
    final = final_clips(sources, validation)
    counts = [[clip.source for clip in part].count(number) for part in (chosen, final) for number in range(3)]
    assert counts == [3, 3, 3, 3, 3, 0]
    held_out = {clip.path for clip in chosen + final}
    assert len(held_out) == 15 and [len(clips) for clips in train] == [994, 34, 0]
    assert not held_out & {clip.path for clips in train for clip in clips}
    assert final_clips(sources, ValidationConfig(clips=9)) == []


def test_test_clips_of_held_out_speakers_are_theirs():
    validation = ValidationConfig(clips=2, test_clips=4, speakers=["speaker1"])
    train, chosen = split_validation([source(0, 30)], validation)
    final = final_clips([source(0, 30)], validation)
    assert {clip.speaker for clip in chosen + final} == {"speaker1"}
    assert (len(chosen), len(final), len(train[0])) == (2, 4, 20)
    with pytest.raises(DataError, match="test_clips"):
        split_validation([source(0, 4)], ValidationConfig(clips=2, test_clips=2))


# ---------------------------------------------------------------- true codes


def test_known_agreement_counts_whole_frames_of_known_clips():
    codes = torch.zeros(3, 3, 4, dtype=torch.long)
    first = torch.tensor([[0, 1, 0, 9], [0, 1, 2, 9], [0, 0, 3, 9]])  # frame 3 is not whole
    longer = torch.zeros(3, 6, dtype=torch.long)
    found = known_agreement(codes, torch.tensor([3, 4, 4]), [first, None, longer])
    assert found == pytest.approx(
        {"known_semantic_equal": 6 / 7, "known_levels_equal": 11 / 14, "known_levels_within_1": 12 / 14}
    )


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint, the same with an encoder, six recordings, and six clips that the second made of them."""
    root = tmp_path_factory.mktemp("held_out")
    write_random_checkpoint(root / "checkpoint", small_params(), {"alpha": 5})
    torch.manual_seed(5)
    codec = VoxtralCodec.from_checkpoint(root / "checkpoint")
    save_tensors(root / "encoder.safetensors", codec.encoder_tensors())
    inject(root / "checkpoint", root / "encoder.safetensors", output=root / "injected")
    (root / "speech").mkdir()
    for path in SPEECH[:6]:
        shutil.copy(path, root / "speech")
    resynthesize(codec, [Clip(str(path), "anna", 0) for path in SPEECH[:6]], root / "generated", 0.6)
    sources = [{"kind": "folder", "path": "speech"}, {"kind": "generated", "path": "generated"}]
    data = {"data_root": str(root), "batch_size": 2, "max_sec": 0.5, "num_workers": 0, "sources": sources}
    config = {
        "checkpoint": str(root / "checkpoint"),
        "device": "cpu",
        "loss": CHEAP,
        "optimizer": {"warmup_steps": 1},
        "data": data | {"validation": {"clips": 4, "test_clips": 2}},
        "train": {"max_steps": 1, "precision": "fp32", "log_every_steps": 1, "n_samples": 1},
    }
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    return root


def train(root, output, *overrides):
    train_encoder.main(["--config", str(root / "config.yaml"), f"output_dir={output}", *overrides])


def true_agreement(root, encoder, clips, max_sec):
    """By hand: share of the true semantic codes among those that the encoder finds in whole frames."""
    codec, equal, total = VoxtralCodec.from_checkpoint(root / "checkpoint"), 0, 0
    codec.load_encoder(load_file(encoder))
    for clip in clips:
        audio, _ = load_segment(clip.path, 0.0, max_sec)
        wanted, whole = np.load(clip.codes), len(audio) // 1920
        with torch.no_grad():
            found = codec.encode(torch.from_numpy(audio)[None, None])[0]
        equal, total = equal + (found[0, :whole].numpy() == wanted[0, :whole]).sum(), total + whole
    return equal / total


def test_phase_1_says_how_many_true_codes_its_encoder_finds(made, tmp_path, capsys):
    train(made, tmp_path / "run", "encoder=" + str(made / "encoder.safetensors"), "optimizer.learning_rate=1e-9")
    assert f"encoder: {made}/encoder.safetensors" in capsys.readouterr().out
    row = next(row for row in metric_rows(tmp_path / "run" / "metrics.jsonl") if "validation/mel_distance" in row)
    data = train_encoder.EncoderConfig().data
    data.data_root, data.sources = str(made), evaluate.read_config(str(made / "config.yaml"), []).sources
    validation = ValidationConfig(clips=4, test_clips=2)
    sources = find_clips(data)[0]
    chosen, final = split_validation(sources, validation)[1], final_clips(sources, validation)
    best = tmp_path / "run" / "best" / "encoder.safetensors"
    by_hand = true_agreement(made, best, [clip for clip in chosen if clip.codes], 0.5)
    assert by_hand > 0 and row["validation/known_semantic_equal"] == pytest.approx(by_hand)
    tested = json.loads((tmp_path / "run" / "test.json").read_text())
    assert list(tested) == ["all", "folder speech", "generated"] and tested["all"]["clips"] == 2
    assert tested["all"]["known_semantic_equal"] == pytest.approx(
        true_agreement(made, best, [clip for clip in final if clip.codes], 0.5)
    )
    assert "known_semantic_equal" not in tested["folder speech"]


@pytest.mark.slow
def test_a_run_starts_fresh_unless_it_is_told_otherwise(made, tmp_path, capsys):
    fresh, injected = tmp_path / "fresh", tmp_path / "injected"
    train(made, fresh, "optimizer.learning_rate=1e-9")
    train(made, injected, f"checkpoint={made / 'injected'}", "optimizer.learning_rate=1e-9")
    assert capsys.readouterr().out.count("encoder: fresh weights") == 2
    encoders = [load_file(run / "best" / "encoder.safetensors") for run in (fresh, injected)]
    assert all(torch.equal(encoders[0][name], encoders[1][name]) for name in encoders[0])
    train(
        made, tmp_path / "on", f"checkpoint={made / 'injected'}", "encoder=checkpoint", "optimizer.learning_rate=1e-9"
    )
    assert f"encoder: the one in {made / 'injected'}" in capsys.readouterr().out
    wanted = load_file(made / "encoder.safetensors")
    started = load_file(tmp_path / "on" / "best" / "encoder.safetensors")
    assert all(torch.allclose(started[name], wanted[name].bfloat16().float(), atol=1e-6) for name in wanted)


def test_a_start_that_is_not_there_is_refused(made, tmp_path, refused):
    arguments = ["--config", str(made / "config.yaml"), f"output_dir={tmp_path / 'run'}"]
    assert "holds none" in refused(train_encoder.main, [*arguments, "encoder=checkpoint"])
    assert "nowhere.safetensors is missing" in refused(train_encoder.main, [*arguments, "encoder=nowhere.safetensors"])
    assert "set encoder to" in refused(train_encoder.main, [*arguments, "train.trainable=[decoder]"])


def test_without_known_codes_the_command_that_makes_them_is_named(made, tmp_path, refused, monkeypatch):
    """Before the data is looked for."""
    monkeypatch.setattr(train_encoder, "find_clips", None)
    few = [f"output_dir={tmp_path / 'run'}", "loss.match=0.3", f"match.codes={tmp_path / 'generated'}"]
    said = refused(train_encoder.main, ["--config", str(made / "config.yaml"), *few])
    assert f"python generate_clips.py --output {tmp_path / 'generated'} --per-voice 100" in said and "minutes" in said


def measured(made, data, output):
    files = {"checkpoint": made / "injected", "data": made / data, "output": output}
    evaluate.main(command_line(**files, metrics="mel", device="cpu", samples=0))
    return json.loads((output / "metrics.json").read_text())


def test_evaluate_compares_with_the_true_codes(made, tmp_path):
    report = measured(made, "generated", tmp_path)
    metrics = report["systems"]["encoder"]["metrics"]
    assert report["clips"] == 6 and metrics["known_semantic_equal"]["clips"] == 6
    sources = [SourceConfig(kind="generated")]
    clips = find_clips(DataConfig(data_root=str(made / "generated"), sources=sources))[0][0]
    codec = VoxtralCodec.from_checkpoint(made / "injected")
    save_tensors(tmp_path / "own.safetensors", codec.encoder_tensors())
    by_hand = true_agreement(made, tmp_path / "own.safetensors", clips, 20.0)
    assert by_hand > 0 and metrics["known_semantic_equal"]["value"] == pytest.approx(by_hand)
    assert "known_semantic_equal" in (tmp_path / "table.md").read_text()


def test_evaluate_without_true_codes_says_nothing_of_them(made, tmp_path):
    assert "known_" not in json.dumps(measured(made, "speech", tmp_path))
