"""What training scripts share: schedules, the run folder, the log with its guard against divergence."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ALONE
from torch import nn

from voxtral.codec import VoxtralCodec
from voxtral.config import ConfigError, EncoderConfig, FullPipelineConfig, OptimizerConfig, load_config
from voxtral.discriminator import DiscriminatorConfig, Discriminators
from voxtral.errors import UserError
from voxtral.history import metric_rows
from voxtral.params import parse_params
from voxtral.processes import Process, TrainingDiverged, start_process, training_process
from voxtral.run import Logger, adamw, cosine_with_warmup, duration, set_learning_rate
from voxtral.run_folder import RunFolder
from voxtral.standin import small_params


@pytest.fixture
def run(tmp_path):
    return RunFolder(EncoderConfig(output_dir=str(tmp_path / "run")), ALONE)


def save(run, step, write, keep_last):
    run.config.train.keep_last, run.config.train.milestones = keep_last, 0
    return run.save_step(step, write, {}, max_steps=1)


def step_names(run):
    return sorted(path.name for path in run.checkpoints.iterdir())


# ---------------------------------------------------------------- schedules


def test_cosine_with_warmup():
    factors = {0: 0.25, 1: 0.5, 3: 1, 4: 1, 9: 0.5, 13: 0.5 * (1 + math.cos(math.pi * 0.9)), 14: 0, 100: 0}
    found = [cosine_with_warmup(step, 4, 14) for step in factors]  # four steps of warm-up, ten of cosine
    assert found == pytest.approx(list(factors.values()), abs=1e-12)
    assert [cosine_with_warmup(step, 0, 2) for step in range(3)] == pytest.approx([1, 0.5, 0])
    assert cosine_with_warmup(5, 5, 5) == 1  # nothing but warm-up


def test_learning_rate_is_set_in_all_groups():
    optimizer = torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.ones(1))]} for _ in range(2)])
    set_learning_rate(optimizer, 0.3)
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.3]


def test_matrices_alone_decay():
    """A step without gradient changes what decays: no LayerScale, norm, bias, gain or direction of a convolution."""
    codec = VoxtralCodec(parse_params(small_params()).codec)
    layers = nn.ModuleList([codec, Discriminators(DiscriminatorConfig(fft_sizes=[78], channels=2)), nn.Linear(3, 2)])
    before = {name: parameter.detach().clone() for name, parameter in layers.named_parameters()}
    optimizer = adamw(layers.parameters(), 0.1, OptimizerConfig(weight_decay=0.5))
    for parameter in layers.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in layers.named_parameters():
        assert torch.equal(parameter, before[name] * (0.95 if parameter.ndim == 2 else 1)), name
    decayed = {name.rpartition(".")[0].rpartition(".")[2] for name, p in before.items() if p.ndim == 2}
    assert {"wq", "wo", "w1", "w2"} <= decayed and not {"attention_norm", "conv"} & decayed


def test_duration():
    assert [duration(s) for s in (0, 61, 3723.9)] == ["0:00:00", "0:01:01", "1:02:03"]


# ---------------------------------------------------------------- processes


def test_device_must_be_known():
    with pytest.raises(ConfigError, match="device is tpu: it must be auto, cpu or cuda"):
        start_process("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_cuda_without_a_gpu_is_an_error():
    with pytest.raises(ConfigError, match="device is cuda, but PyTorch sees no GPU"):
        start_process("cuda")
    assert start_process("auto").device.type == "cpu"


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
WORKER_KILLED = RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed.")


@pytest.mark.parametrize(
    "error, said",
    [
        (OUT_OF_MEMORY, "data.batch_size .train.accumulation .* data.max_sec"),
        (WORKER_KILLED, "a batch was lost .* resume=true"),
    ],
)
def test_what_can_end_a_training_is_one_sentence(error, said):
    with pytest.raises(SystemExit, match=f"^training stopped: .*{said}") as stop, training_process("cpu"):
        try:
            raise error
        finally:
            if isinstance(error, torch.OutOfMemoryError):
                raise RuntimeError("CUDA error: operation not permitted when stream is capturing")  # hides it
    assert "\n" not in stop.value.code


def test_machines_with_other_clips_are_refused(monkeypatch):
    """Two of a machine each: the other one has found another file."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    process, others = Process(0, 2, torch.device("cpu")), Process(1, 2, torch.device("cpu"))
    told = []
    monkeypatch.setattr(Process, "gather", lambda self, values: told.extend(values) or told)
    process.check_same("the clips", b"a, b")
    others.check_same("the clips", b"a, b")
    with pytest.raises(ConfigError, match="the clips are not the same on all machines"):
        others.check_same("the clips", b"a, b, c")


# ---------------------------------------------------------------- the run folder


def test_run_folder_keeps_the_configuration_and_the_environment(run):
    assert load_config(EncoderConfig, run.path / "config.yaml", []) == run.config
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["torch"] == torch.__version__ and environment["processes"] == 1


def test_a_folder_that_holds_a_run_is_refused_unless_resumed(run):
    save(run, 5, lambda folder: (folder / "a").write_text("x"), keep_last=1)
    before = (run.path / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match="already holds a run: continue it with resume=true"):
        RunFolder(EncoderConfig(output_dir=str(run.path), seed=7), ALONE)
    assert (run.path / "config.yaml").read_bytes() == before
    assert RunFolder(EncoderConfig(output_dir=str(run.path), resume=True), ALONE).latest().name == "step_00000005"


def test_a_folder_without_checkpoints_may_be_used_again(run):
    assert RunFolder(EncoderConfig(output_dir=str(run.path)), ALONE).latest() is None


def test_rotation_drops_the_oldest(run):
    for step in (900, 1000, 99_999, 100_000):
        save(run, step, lambda folder: (folder / "a").write_text(folder.name), keep_last=2)
    assert step_names(run) == ["step_00099999", "step_00100000"]
    assert run.latest().name == "step_00100000"


def test_the_best_is_replaced_whole_or_not_at_all(run):
    def write(folder):
        (folder / "adapter").mkdir()
        (folder / "adapter" / "a").write_text("whole")

    def fail(folder):
        write(folder)
        raise OSError("disk full")

    run.save_best(write, step=3, loss=0.5)
    with pytest.raises(UserError, match="disk full"):
        run.save_best(fail, step=4, loss=0.4)
    best = run.path / "best"
    assert sorted(os.listdir(best)) == ["adapter", "metrics.json"] and (best / "adapter" / "a").read_text() == "whole"
    assert json.loads((best / "metrics.json").read_text()) == {"step": 3, "loss": 0.5}
    run.save_best(lambda folder: (folder / "b").write_text("other"), step=4, loss=0.4)
    assert sorted(os.listdir(best)) == ["b", "metrics.json"]


@pytest.mark.parametrize("killed_before", [1, 2])
def test_a_kill_while_the_best_is_replaced_loses_nothing(run, monkeypatch, killed_before):
    """The old folder is renamed, then the new one: whichever rename is the last, the next run finds one of the two."""
    run.save_best(lambda folder: (folder / "a").write_text("old"), step=1, loss=2.0)
    renamed, replace = [], os.replace

    def kill(source, target):
        if Path(source).name in ("best", ".best.tmp"):
            renamed.append(source)
            if len(renamed) == killed_before:
                raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", kill)
    monkeypatch.setattr(shutil, "rmtree", lambda *arguments, **options: None)  # a killed process cleans nothing
    with pytest.raises(KeyboardInterrupt):
        run.save_best(lambda folder: (folder / "a").write_text("new"), step=2, loss=1.0)
    monkeypatch.undo()
    RunFolder(EncoderConfig(output_dir=str(run.path), resume=True), run.process)
    assert (run.path / "best" / "a").read_text() == "old"
    run.save_best(lambda folder: (folder / "a").write_text("new"), step=2, loss=1.0)
    assert (run.path / "best" / "a").read_text() == "new" and not list(run.path.glob(".best.former"))


KILLED_SAVE = """
import os, signal, sys, torch
from voxtral.config import EncoderConfig
from voxtral.processes import Process
from voxtral.run_folder import RunFolder
run = RunFolder(EncoderConfig(output_dir=sys.argv[1], resume=True), Process(0, 1, torch.device("cpu")))
def write(folder):
    (folder / "a").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
run.save_step(2, write, {}, 2)
"""


def test_a_save_that_is_killed_is_not_seen_and_is_cleared_by_the_next(run):
    save(run, 1, lambda folder: (folder / "a").write_text("whole"), keep_last=1)
    killed = subprocess.run([sys.executable, "-c", KILLED_SAVE, str(run.path)], cwd=Path(__file__).parents[1])
    assert killed.returncode == -9
    assert len(step_names(run)) == 2 and run.latest().name == "step_00000001"
    save(run, 2, lambda folder: (folder / "b").write_text("whole"), keep_last=1)
    assert step_names(run) == ["step_00000002"] and sorted(os.listdir(run.latest())) == ["b", "run_state.pt"]


# ---------------------------------------------------------------- metrics


def test_metric_rows_leave_out_a_line_cut_by_a_kill(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": [1, 2]}\n{"step": 2, "a": [3, 4')
    assert list(metric_rows(path)) == [{"step": 1, "a": [1, 2]}]


def test_truncate_metrics_drops_what_a_resumed_run_writes_again(run):
    run.truncate_metrics(3)  # no file yet
    path = run.path / "metrics.jsonl"
    kept = '{"step": 1}\n{"step": 3, "kind": "training"}\n{"step": 3, "kind": "validation"}\n'
    path.write_text(kept + '{"step": 4}\n{"st')
    run.truncate_metrics(3)
    assert path.read_text() == kept


# ---------------------------------------------------------------- the log


def scalars(**losses):
    return {f"loss/{name}": torch.tensor(float(value)) for name, value in losses.items()}


@pytest.fixture
def log(run):
    run.config.train.max_total_loss = 100.0
    log = Logger(run, max_steps=10, start_step=0)
    yield log
    log.close()


def test_a_flush_writes_the_last_step_with_its_extras(log, run, capsys):
    log.add(1, scalars(total=3, l1=1))
    log.add(2, scalars(total=2, l1=0.5))
    log.flush({"code/levels": torch.tensor([0.25, 0.75]), "optimizer/learning_rate": 0.1}, work=4.0)
    (row,) = list(metric_rows(run.path / "metrics.jsonl"))
    assert (row["step"], row["loss/total"], row["loss/l1"]) == (2, 2, 0.5)
    assert (row["code/levels"], row["optimizer/learning_rate"]) == ([0.25, 0.75], 0.1)
    assert row["time/audio_sec_per_sec"] == pytest.approx(4000 / row["time/step_ms"])
    assert "step 2/10" in capsys.readouterr().out
    log.flush({}, work=4.0)
    assert len(list(metric_rows(run.path / "metrics.jsonl"))) == 1  # nothing new to say


@pytest.mark.parametrize(
    "losses, what",
    [
        ({"total": 5, "asr": math.nan}, "loss/asr not finite"),
        ({"total": math.inf, "asr": 1}, "loss/total not finite"),
        ({"total": 101, "asr": 1}, "loss/total above train.max_total_loss (100)"),
    ],
)
def test_divergence_stops_with_the_step_and_its_losses(log, run, losses, what):
    save(run, 1, lambda folder: (folder / "a").write_text("x"), keep_last=1)
    log.add(1, scalars(total=1, asr=1))
    log.add(2, scalars(**losses))
    log.add(3, scalars(total=math.nan, asr=math.nan))
    with pytest.raises(TrainingDiverged) as error:
        log.flush({}, work=4.0)
    message = str(error.value)
    assert message.startswith("step 2: ") and what in message and "\n" not in message
    for name, value in losses.items():
        assert f"loss/{name} {value:.4g}" in message
    assert "step_00000001" in message
    assert list(metric_rows(run.path / "metrics.jsonl")) == []


def test_a_loss_that_runs_have_come_back_from_ends_none(run):
    """A commitment of 2,393 did (RESULTS.md); an explosion passes any number. One value for both phases."""
    assert run.config.train.max_total_loss == FullPipelineConfig().train.max_total_loss
    log = Logger(run, max_steps=10, start_step=0)
    log.add(1, scalars(total=2393))
    log.flush({}, work=4.0)
    log.add(2, scalars(total=2e6))
    with pytest.raises(TrainingDiverged, match="above train.max_total_loss"):
        log.flush({}, work=4.0)
    log.close()


def test_a_gradient_that_is_not_finite_counts_as_divergence(log):
    log.add(1, {**scalars(total=1), "grad/encoder": torch.tensor(math.nan)})
    with pytest.raises(TrainingDiverged, match="grad/encoder not finite.*none yet"):
        log.flush({}, work=4.0)
