"""What plots show of a long run: bounded, spread evenly, the same after a resume."""

import json

import pytest
from conftest import ALONE

from voxtral import history as history_module
from voxtral.config import EncoderConfig
from voxtral.history import History, metric_rows
from voxtral.run import Logger, RunFolder


def training(step):
    return {"step": step, "loss/total": 1 / step, "time/step_ms": 1.0}


def validation(step):
    return {"step": step, "validation/mel_distance": 1 / step}


@pytest.mark.parametrize("count", [1, 7, 8, 9, 10_000])
def test_history_is_bounded_even_and_has_both_ends(count, monkeypatch):
    monkeypatch.setattr("voxtral.history.MAX_ROWS", 8)
    history = History()
    for step in range(1, count + 1):
        history.add(training(step))
    steps = [row["step"] for row in history.rows]
    assert steps[0] == 1 and steps[-1] == count and len(steps) <= min(count, 9)
    assert count > 8 or steps == list(range(1, count + 1))
    gaps = {b - a for a, b in zip(steps, steps[1:-1])}
    assert len(gaps) <= 1 and len(steps) >= min(count, 4)


def test_rare_rows_are_thinned_by_themselves(monkeypatch):
    monkeypatch.setattr("voxtral.history.MAX_ROWS", 8)
    history = History()
    for step in range(1, 1001):
        history.add(training(step))
        if step % 250 == 0:
            history.add(validation(step))
    rows = history.rows
    assert [row["step"] for row in rows if "validation/mel_distance" in row] == [250, 500, 750, 1000]
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)


def test_logger_keeps_a_history_that_a_resumed_one_has_again(tmp_path, monkeypatch):
    monkeypatch.setattr(history_module, "MAX_ROWS", 16)
    run = RunFolder(EncoderConfig(output_dir=str(tmp_path / "run")), ALONE)
    log = Logger(run, max_steps=500, start_step=0)
    for step in range(1, 401):
        log.write(step, training(step))
    with log.timed("validate", 400):
        pass
    log.close()
    assert len(log.history.rows) <= 18 and len(list(metric_rows(run.path / "metrics.jsonl"))) == 401
    again = Logger(run, max_steps=500, start_step=400)
    again.close()
    assert again.history.rows == log.history.rows
    assert again.history.rows[-1]["time/validate_sec"] >= 0
    shorter = Logger(run, max_steps=500, start_step=200)
    shorter.close()
    assert shorter.history.rows[-1] == training(200)
    assert json.loads((run.path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 200
