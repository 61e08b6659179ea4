"""wandb, mlflow, trackio: what each is told, that a resumed run goes on in its own, that none can end a run."""

import importlib.util
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import ALONE

from voxtral import tracking
from voxtral.config import (
    ConfigError,
    EncoderConfig,
    FullPipelineConfig,
    check_encoder_config,
    check_full_pipeline_config,
)
from voxtral.errors import UserError
from voxtral.run import Logger, RunFolder


@pytest.fixture
def logger(tmp_path):
    """logger(tracker) -> the log of a run that is tracked by it."""

    def make(tracker, start_step=0):
        config = EncoderConfig(output_dir=str(tmp_path / "run"), tracker=tracker, resume=True)
        run = RunFolder(config, ALONE)
        return Logger(run, max_steps=10, start_step=start_step)

    return make


def two_rows(log, first):
    log.write(first, {"loss/total": 3.0, "code/level_histogram": [0.5, 0.5]})
    log.write(first + 1, {"validation/mel_distance": 2.0})
    log.close()


@pytest.mark.parametrize(
    "schema, check", [(EncoderConfig, check_encoder_config), (FullPipelineConfig, check_full_pipeline_config)]
)
def test_a_tracker_that_is_unknown_or_not_installed_is_refused_before_anything(schema, check, monkeypatch):
    with pytest.raises(ConfigError, match="none or one of wandb, mlflow, trackio"):
        check(replace(schema(), tracker="comet"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install mlflow"):
        check(replace(schema(), tracker="mlflow"))


@pytest.fixture
def calls(monkeypatch):
    """What a module in the place of wandb and trackio is told."""
    calls = []
    module = SimpleNamespace(
        init=lambda **given: calls.append(("init", given)),
        finish=lambda: calls.append(("finish",)),
        log=lambda metrics, step: calls.append(("log", step, metrics)),
    )
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, module)
    return calls


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_numbers_go_to_the_tracker_and_a_resumed_run_goes_on_in_its_own(tracker, calls, logger, tmp_path):
    two_rows(logger(tracker), 1)
    (_, given), *told = calls
    assert told == [("log", 1, {"loss/total": 3.0}), ("log", 2, {"validation/mel_distance": 2.0}), ("finish",)]
    assert given["config"]["optimizer"]["learning_rate"] == 5e-4 and given["resume"] == "allow"
    logger(tracker, start_step=2).close()
    again = calls[4][1]
    assert again["name"] == given["name"] and given["name"].startswith("run-")
    assert json.loads((tmp_path / "run" / "tracker.json").read_text()) == {"tracker": tracker, "id": given["name"]}


def test_a_tracker_that_fails_ends_no_run(calls, logger, monkeypatch, capsys):
    log = logger("wandb")
    monkeypatch.setattr(sys.modules["wandb"], "log", lambda *_, **__: 1 / 0)
    two_rows(log, 1)
    assert capsys.readouterr().out.count("tracker wandb failed") == 1


def test_a_tracker_that_cannot_start_is_an_error_before_the_first_step(calls, logger, monkeypatch):
    monkeypatch.setattr(sys.modules["wandb"], "init", lambda **_: 1 / 0)
    with pytest.raises(UserError, match="tracker wandb cannot start .division by zero."):
        logger("wandb")


def test_no_tracker_is_the_default(logger, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "import_module", None)
    two_rows(logger("none"), 1)
    assert not (tmp_path / "run" / "tracker.json").exists()


# ---------------------------------------------------------------- the packages themselves, offline


def test_wandb_offline(logger, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is optional: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    two_rows(logger("wandb"), 1)
    (run,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert run.stat().st_size > 0


def test_mlflow_in_a_local_file(logger, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is optional: pip install mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database needs more than mlflow-skinny
    mlflow.set_tracking_uri((tmp_path / "mlflow").as_uri())
    two_rows(logger("mlflow"), 1)
    two_rows(logger("mlflow", start_step=2), 3)
    run_id = json.loads((tmp_path / "run" / "tracker.json").read_text())["id"]
    steps = [(metric.step, metric.value) for metric in mlflow.MlflowClient().get_metric_history(run_id, "loss/total")]
    assert steps == [(1, 3.0), (3, 3.0)]
    run = mlflow.get_run(run_id)
    assert run.data.params["optimizer.learning_rate"] == "0.0005" and run.data.metrics["validation/mel_distance"] == 2.0


def test_trackio_in_a_local_folder(tmp_path):
    """In a process of its own: trackio reads where to write when it is imported."""
    pytest.importorskip("trackio", reason="trackio is optional: pip install trackio")
    import os
    import subprocess

    script = (
        "import sys; sys.path.insert(0, 'tests'); import test_tracking as t\n"
        "config = t.EncoderConfig(output_dir=sys.argv[1], tracker='trackio', resume=True)\n"
        "run = t.RunFolder(config, t.ALONE)\n"
        "t.two_rows(t.Logger(run, 10, 0), 1)\n"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run")],
        check=True,
        timeout=120,
        env={**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": "."},
    )
    (database,) = (tmp_path / "trackio").rglob(f"{tracking.PROJECT}*.db")
    assert b"mel_distance" in database.read_bytes()
