"""The withheld-encoder benchmark on a tiny random stand-in: rows, equal audio, kills, time limits, the table."""

import json
import math
import shutil
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, command_line, read_report, write_encoder
from safetensors.torch import load_file

import evaluate
from voxtral.checkpoint import save_tensors
from voxtral.codec import VoxtralCodec
from voxtral.config import EncoderConfig, StandinConfig, load_config
from voxtral.data import load_segment
from voxtral.history import metric_rows
from voxtral.standin import small_params, write_random_checkpoint

pytestmark = pytest.mark.slow  # nearly each of them trains

SPEAKERS = ["k_af_heart", "k_am_adam", "m_f12"]
STEPS = 6
QUICK = "paper_without_whisper"
ROW_NAMES = f"paper,{QUICK}"


@pytest.fixture(scope="module")
def benchmark(import_script):
    return import_script("withheld_encoder")


@pytest.fixture(scope="module")
def runs(import_script):
    return import_script("withheld_runs")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """released/, withheld.safetensors, speech/SPEAKER/*.opus, config.yaml, which holds out m_f12."""
    base = tmp_path_factory.mktemp("standin")
    write_random_checkpoint(base / "released", small_params(), {"alpha": 5})
    weights = base / "released" / "consolidated.safetensors"
    tensors = load_file(weights)
    # Near a fresh encoder's latents, and a high rate below: a few steps must change codes.
    tensors["audio_tokenizer.quantizer.semantic_codebook.embedding_sum"] *= 0.01
    save_tensors(weights, tensors)
    write_encoder(base / "withheld.safetensors", base / "released", seed=1)
    for speaker in SPEAKERS:
        (base / "speech" / speaker).mkdir(parents=True)
        for i in range(2):
            shutil.copy(ROOT / "assets" / "speech" / f"{speaker}_{i}.opus", base / "speech" / speaker)
    data = {"data_root": str(base), "sources": [{"kind": "folder", "path": "speech", "weight": 2.0}]}
    data |= {"validation": {"clips": 2, "speakers": ["m_f12"]}, "batch_size": 2, "max_sec": 0.5, "num_workers": 0}
    config = {
        "device": "cpu",
        "data": data,
        "train": {"precision": "fp32", "stft_fft_sizes": [256]},
        "optimizer": {"learning_rate": 0.02},
        "discriminator": {"fft_sizes": [78], "channels": 2, "crop_sec": 0.3},
        "asr": {"context_sec": 1.26, "language": "en"},
        "standin": {"n_text_tokens": 300},
    }  # a stand-in's config will do
    (base / "config.yaml").write_text(yaml.safe_dump(config))
    return base


@pytest.fixture(scope="module")
def command(base, whisper_checkpoint):
    """command(output, options...) -> arguments"""
    files = {"standin": base / "released", "withheld": base / "withheld.safetensors", "data": base / "config.yaml"}
    fixed = command_line(**files, steps=STEPS, seeds=0, metrics="mel,stft", max_sec=0.5)
    overrides = ["train.log_every_steps=1", f"asr.model={whisper_checkpoint}"]
    return lambda output, *options: ["--output", str(output), *fixed, *overrides, *options]


@pytest.fixture(scope="module")
def whole(benchmark, command, tmp_path_factory):
    """A finished benchmark of two rows: its folder, and what it printed."""
    output, printed = tmp_path_factory.mktemp("whole") / "out", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        benchmark.main(command(output, "--rows", ROW_NAMES))
    return output, "\n".join(printed)


def report_of(output):
    return read_report(output / "results.json")


# ---------------------------------------------------------------- rows


def test_rows_change_the_papers_losses(runs):
    def losses(row):
        changes = dict(change.split("=") for change in [*runs.PAPER.split(), *runs.ROWS[row].split()])
        return {name.removeprefix("loss."): float(weight) for name, weight in changes.items() if float(weight)}

    paper = {"l1": 1, "stft": 1, "feature": 1, "asr": 1, "commit": 0.1}
    assert losses("paper") == losses("paper_from_true") == paper
    assert losses("paper_without_whisper") == {name: paper[name] for name in ("l1", "stft", "feature", "commit")}
    assert losses("paper+mel+match") == paper | {"mel": 1, "match": 0.3, "commit": 1}
    assert losses("mel+match") == {"l1": 1, "stft": 1, "commit": 1, "mel": 1, "match": 0.3}


def test_schedule_is_a_share_of_the_run(runs, base):
    def settings(steps):
        return load_config(StandinConfig, base / "config.yaml", runs.schedule(steps))

    long, short = settings(4000), settings(4)
    assert (long.discriminator.warmup_steps, long.optimizer.warmup_steps, long.train.log_every_steps) == (500, 200, 10)
    assert long.train.ema_decay == pytest.approx(0.9975) and short.train.ema_decay == 0
    assert (short.train.validate_every_steps, short.train.save_every_steps) == (1, 2)


# ---------------------------------------------------------------- a whole benchmark


def test_every_run_is_trained_and_measured(whole, base):
    output, printed = whole
    report = report_of(output)
    assert list(report["rows"]) == ROW_NAMES.split(",") and not report["not_finished"]
    assert report["audio_hours"] == pytest.approx(STEPS * 2 * 0.5 / 3600)
    assert (report["clips"], report["speakers"]) == (2, 1)
    columns = [
        "mel",
        "stft",
        "semantic_equal",
        "levels_equal",
        "levels_within_1",
        "semantic_used",
        "extremes_share",
        "embedding_cosine",
    ]
    assert list(report["true"]) == columns and report["true"]["levels_equal"] == 1
    for name, row in report["rows"].items():
        assert list(row["seeds"]) == ["0"] and list(row["values"]) == [*columns, "ms per step"]
        run, folder = row["seeds"]["0"], output / f"{name}_seed0"
        assert set(load_file(folder / "encoder.safetensors")) == set(load_file(base / "withheld.safetensors"))
        assert not (folder / "checkpoints").exists() and not (folder / "best").exists()
        assert "4 training clips" in (folder / "log.txt").read_text()
        mel = run["metrics"]["mel"]["value"]
        assert row["values"]["mel"] == {"mean": mel, "deviation": None}
        gap = (report["untrained"]["mel"] - mel) / (report["untrained"]["mel"] - report["true"]["mel"])
        assert row["gap_closed"]["mel"]["mean"] == pytest.approx(gap)
    assert "2 rows × 1 seeds: 2 runs of 6 steps" in printed
    assert (output / "table.md").read_text() in printed


def test_numbers_are_what_evaluate_says_of_each_encoder(whole, base, tmp_path):
    report = report_of(whole[0])
    for name in ROW_NAMES.split(","):
        row = report["rows"][name]
        files = {"checkpoint": base / "released", "reference_encoder": base / "withheld.safetensors"}
        files |= {"encoder": whole[0] / f"{name}_seed0" / "encoder.safetensors", "data": base / "config.yaml"}
        settings = {"output": tmp_path / name, "metrics": "mel,stft", "max_sec": 0.5, "samples": 0, "device": "cpu"}
        evaluate.main(command_line(**files, **settings))
        expected = json.loads((tmp_path / name / "metrics.json").read_text())
        for key, summary in row["seeds"]["0"]["metrics"].items():
            assert summary["value"] == pytest.approx(expected["systems"]["encoder"]["metrics"][key]["value"]), key
            if key in row["gap_closed"]:
                assert row["gap_closed"][key]["mean"] == pytest.approx(expected["gap_closed"][key]["value"]), key
    one, other = (row["seeds"]["0"]["metrics"] for row in report["rows"].values())
    assert all(one[key]["value"] != other[key]["value"] for key in ("mel", "levels_equal", "acoustic_distance"))


def test_rows_hear_the_same_and_differ_in_what_they_say(whole):
    output, _ = whole
    one, other = (
        [row for row in metric_rows(output / f"{name}_seed0" / "metrics.jsonl") if "loss/l1" in row]
        for name in ROW_NAMES.split(",")
    )
    assert "loss/asr" in one[0] and "loss/asr" not in other[0]
    assert [rows[0]["step"] for rows in (one, other)] == [1, 1]  # the same codes of the same clips
    assert one[0]["code/level_histogram"] == other[0]["code/level_histogram"]
    assert one[0]["loss/l1"] == other[0]["loss/l1"] and one[-1]["loss/l1"] != other[-1]["loss/l1"]


def test_the_table_has_a_line_per_row(whole):
    lines = (whole[0] / "table.md").read_text().splitlines()
    names = [line.split("|")[1].strip() for line in lines if line.startswith("|")]
    assert names == ["encoder", "---", "untrained", "true", *ROW_NAMES.split(",")]
    row = next(line for line in lines if line.startswith(f"| {QUICK} |")).split("|")
    mel, gap = (report_of(whole[0])["rows"][QUICK][key]["mel"]["mean"] for key in ("values", "gap_closed"))
    assert row[3].strip() == f"{mel:.4g} ({round(100 * gap)} %)"
    text = "\n".join(lines)
    assert "- wer: add wer to --metrics" in text and "- ecapa: " in text and "- semantic_equal: share of" in text


def test_several_seeds_have_a_mean_and_a_deviation(benchmark):
    assert benchmark.spread([]) == {} and benchmark.spread([{"mel": 1.0}])["mel"]["deviation"] is None
    mel = benchmark.spread([{"mel": 0.5}, {"mel": 1.0}])["mel"]
    assert mel == {"mean": 0.75, "deviation": pytest.approx(0.25 * math.sqrt(2))}
    assert benchmark.cell(mel, {"mean": 0.5}) == "0.75 ± 0.35 (50 %)"


def test_known_codes_are_written_on_the_device_of_the_run(benchmark, base, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        benchmark, "resynthesize", lambda codec, clips, *_: asked.append(codec.audio_embedding.device.type)
    )
    options = SimpleNamespace(output=tmp_path, data=base / "config.yaml", overrides=[], max_sec=0.5)
    options.standin, options.withheld = base / "released", base / "withheld.safetensors"
    data = load_config(StandinConfig, base / "config.yaml", []).data
    benchmark.write_known_codes(options, data, torch.device("meta"))
    assert asked == ["meta"]


# ---------------------------------------------------------------- kills and limits


class StopAt:
    """A StopSignal that comes when a file has its first line: the training then listens to signals."""

    def __init__(self, path):
        self.path = path

    @property
    def received(self):
        return self.path.exists() and self.path.stat().st_size > 0


def kill_at(path, children):
    """Kills the last of the child processes when `path` appears."""

    def wait_and_kill():
        while not path.exists():
            time.sleep(0.01)
        children[-1].kill()

    threading.Thread(target=wait_and_kill, daemon=True).start()


@pytest.fixture
def children(runs, monkeypatch):
    """The processes that are started, each with its environment as `environment`."""
    started = []

    class Recorded(subprocess.Popen):
        def __init__(self, command, env, **settings):
            super().__init__(command, env=env, **settings)
            self.environment = env
            started.append(self)

    monkeypatch.setattr(runs, "Popen", Recorded)
    return started


def test_a_stopped_and_killed_run_goes_on_to_the_same_encoder(
    benchmark, runs, command, whole, children, tmp_path, monkeypatch, capsys
):
    output, train_until = tmp_path / "out", runs.train_until
    checkpoints = output / f"{QUICK}_seed0" / "checkpoints"

    def stopped(run, deadline, stop, gpu):
        return train_until(run, deadline, StopAt(run.folder / "metrics.jsonl"), gpu)

    def killed(run, deadline, stop, gpu):
        kill_at(run.folder / "samples" / "step_00000006", children)
        return train_until(run, deadline, stop, gpu)

    monkeypatch.setattr(benchmark, "train_until", stopped)
    benchmark.main(command(output, "--rows", QUICK))
    (saved,) = [path.name for path in checkpoints.iterdir()]
    assert "step_00000001" <= saved < "step_00000006"
    assert report_of(output)["not_finished"] == {f"{QUICK}, seed 0": "not trained to its end yet"}
    assert "1 of 1 runs are not finished: --resume goes on" in capsys.readouterr().out

    monkeypatch.setattr(benchmark, "train_until", killed)
    benchmark.main(command(output, "--rows", QUICK, "--resume"))
    assert "step_00000006" not in [path.name for path in checkpoints.iterdir()]
    assert report_of(output)["not_finished"] == {f"{QUICK}, seed 0": "killed by signal 9; --resume goes on with it"}

    monkeypatch.setattr(benchmark, "train_until", train_until)
    benchmark.main(command(output, "--rows", QUICK, "--resume"))
    files = [folder / f"{QUICK}_seed0" / "encoder.safetensors" for folder in (output, whole[0])]
    assert files[0].read_bytes() == files[1].read_bytes()
    resumed, at_once = (report_of(folder)["rows"][QUICK]["seeds"]["0"] for folder in (output, whole[0]))
    assert resumed["codes"] == at_once["codes"]


def test_resuming_skips_what_is_finished_and_measures_only_what_is_new(benchmark, command, whole, capsys, monkeypatch):
    measured, measure = [], benchmark.Judge.measure
    monkeypatch.setattr(benchmark, "train_until", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(
        benchmark.Judge,
        "measure",
        lambda self, tensors, where: measured.append(str(where)) or measure(self, tensors, where),
    )
    benchmark.main(command(whole[0], "--rows", ROW_NAMES, "--resume"))
    assert len(measured) == 2 and "2 are finished" in capsys.readouterr().out
    benchmark.main(command(whole[0], "--rows", QUICK, "--resume", "--metrics", "mel,stft,sisdr"))
    assert len(measured) == 5 and measured[-1].endswith(f"{QUICK}_seed0/encoder.safetensors")


def test_time_that_is_up_leaves_a_table(benchmark, command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "train_until", lambda *_: pytest.fail("trained"))
    benchmark.main(command(tmp_path, "--rows", f"{QUICK},paper+mel+match", "--minutes", "0", "asr.model=x"))
    assert "2 of 2 runs are not finished" in capsys.readouterr().out
    assert list(report_of(tmp_path)["not_finished"]) == [f"{QUICK}, seed 0", "paper+mel+match, seed 0"]
    assert "\n| true |" in (tmp_path / "table.md").read_text()


def test_two_runs_at_once_train_the_same_encoders(benchmark, runs, command, whole, tmp_path, monkeypatch):
    train_until, asked, both = runs.train_until, [], threading.Barrier(2, timeout=60)

    def together(run, deadline, stop, gpu):
        asked.append((run.row, gpu))
        both.wait()  # the second run begins before the first one ends
        return train_until(run, deadline, stop, gpu)

    monkeypatch.setattr(benchmark, "train_until", together)
    benchmark.main(command(tmp_path, "--rows", ROW_NAMES, "--at-once", "2", "data.num_workers=1"))
    assert sorted(asked) == [("paper", 0), (QUICK, 0)]  # there is one device
    assert (tmp_path / f"{QUICK}_seed0" / "encoder.safetensors").read_bytes() == (
        whole[0] / f"{QUICK}_seed0" / "encoder.safetensors"
    ).read_bytes()
    one, other = (report_of(folder)["rows"] for folder in (whole[0], tmp_path))
    for row in one:
        assert one[row]["values"]["mel"] == other[row]["values"]["mel"]


def test_each_run_sees_its_gpu_only(runs, children, monkeypatch, tmp_path):
    monkeypatch.setattr(runs.sys, "executable", "true")  # the command; only what it is given matters here
    run = runs.Run("paper", 0, EncoderConfig(output_dir=str(tmp_path)))
    for visible, gpu, expected in ((None, 1, "1"), ("", 0, "0"), ("4,7", 1, "7"), ("4,7", 0, "4")):
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert runs.train_until(run, math.inf, StopAt(tmp_path / "never"), gpu) == 0
        assert children[-1].environment["CUDA_VISIBLE_DEVICES"] == expected


def test_a_run_whose_benchmark_is_gone_saves_and_stops(benchmark, command, children, tmp_path):
    """What a killed benchmark leaves is a pipe that is closed."""

    def abandon():
        while not StopAt(tmp_path / f"{QUICK}_seed0" / "metrics.jsonl").received:
            time.sleep(0.01)
        children[-1].stdin.close()

    threading.Thread(target=abandon, daemon=True).start()
    benchmark.main(command(tmp_path, "--rows", QUICK, "--steps", "500", "train.log_every_steps=1"))
    assert children[-1].returncode == 0 and not (tmp_path / f"{QUICK}_seed0" / "encoder.safetensors").exists()
    assert "go on with resume=true" in (tmp_path / f"{QUICK}_seed0" / "log.txt").read_text()


def test_a_run_can_start_at_the_true_encoder(benchmark, command, tmp_path):
    benchmark.main(command(tmp_path, "--rows", "paper_from_true", "--metrics", "mel", "optimizer.learning_rate=1e-9"))
    values = report_of(tmp_path)["rows"]["paper_from_true"]["values"]
    assert values["levels_equal"]["mean"] > 0.97 and values["semantic_equal"]["mean"] > 0.9  # the checkpoint holds bf16


def test_known_codes_are_the_true_ones_of_the_preset_voices(benchmark, command, base, tmp_path):
    presets = "standin.voices={one: k_am_adam}"
    benchmark.main(command(tmp_path, "--rows", "mel+match", "--metrics", "mel", presets))
    row = json.loads((tmp_path / "known_codes" / "manifest.jsonl").read_text().splitlines()[0])
    assert row["voice"] == "k_am_adam" and {
        path.name for path in (tmp_path / "known_codes").iterdir() if path.is_dir()
    } == {"k_am_adam"}
    codec = VoxtralCodec.from_checkpoint(base / "released")
    codec.load_encoder(load_file(base / "withheld.safetensors"))
    clip = base / "speech" / "k_am_adam" / "k_am_adam_0.opus"
    codes = codec.encode(torch.from_numpy(load_segment(str(clip), 0.0, 0.5)[0])[None, None])[0]
    assert np.array_equal(np.load(tmp_path / "known_codes" / row["codes"]), codes)
    assert any("loss/match" in line for line in metric_rows(tmp_path / "mel+match_seed0" / "metrics.jsonl"))


def test_a_row_that_cannot_be_trained_says_why(benchmark, command, tmp_path):
    benchmark.main(command(tmp_path, "--rows", "paper", "asr.model=none.pt"))
    assert "asr.model is 'none.pt'" in report_of(tmp_path)["not_finished"]["paper, seed 0"]


def test_mistakes_are_one_sentence(benchmark, command, base, whole, tmp_path, refused):
    main, new = benchmark.main, tmp_path / "out"
    assert "already holds a benchmark" in refused(main, command(whole[0], "--rows", QUICK))
    other = refused(main, command(whole[0], "--rows", QUICK, "--resume", "optimizer.learning_rate=1"))
    assert "trained with other settings (optimizer.learning_rate 0.02 against 1.0)" in other
    assert "there is no 'z'" in refused(main, command(new, "--rows", "paper,z"))
    assert "'x' is no number" in refused(main, command(new, "--seeds", "0,x"))
    assert "--steps is 0" in refused(main, command(new, "--steps", "0"))
    assert "there is no 'pesk'" in refused(main, command(new, "--metrics", "pesk"))
    assert "unknown key 'loss.melt'" in refused(main, command(new, "loss.melt=1"))
    assert "validation.speakers is empty" in refused(main, command(new, "data.validation.speakers=[]"))
    heard = refused(main, command(new, "--rows", QUICK, "--eval", str(base / "speech")))
    assert "trained on k_af_heart, k_am_adam" in heard
    assert not new.exists()


def test_clips_are_spread_over_speakers(benchmark, base, tmp_path):
    names = ["x1", "x2", "x3", "y1"]
    (tmp_path / "eval.csv").write_text("path,speaker\n" + "".join(f"{name}.wav,{name[0]}\n" for name in names))
    data = load_config(StandinConfig, base / "config.yaml", []).data

    options = SimpleNamespace(eval=str(tmp_path / "eval.csv"), clips=3)
    assert [Path(clip.path).stem for clip in benchmark.unseen_clips(options, data)] == ["x1", "y1", "x2"]
    options = SimpleNamespace(eval=None, clips=9)
    assert {clip.speaker for clip in benchmark.unseen_clips(options, data)} == {"m_f12"}
