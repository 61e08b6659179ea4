"""research/loss_curves.py: table and plot of several runs."""

import json

import pytest


@pytest.fixture(scope="module")
def loss_curves(import_script):
    return import_script("loss_curves")


def cells(text):
    return [[word.strip() for word in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def test_means_of_quarters(loss_curves, tmp_path, capsys):
    for name, scale in (("fast", 1), ("slow", 10)):
        rows = [{"step": step, "loss/l1": scale * step, "time/step_ms": 1.0} for step in range(1, 9)]
        rows.append({"step": 8, "validation/mel_distance": 2.0})
        rows[5]["loss/asr"] = 0.5
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot = tmp_path / "plots" / "curves.png"
    loss_curves.main([str(tmp_path / "fast"), str(tmp_path / "slow"), "--output", str(plot)])
    lines = cells(capsys.readouterr().out)
    assert lines[2:] == [
        ["l1", "fast", "1.5000", "3.5000", "5.5000", "7.5000"],
        ["l1", "slow", "15.0000", "35.0000", "55.0000", "75.0000"],
        ["asr", "fast", "nan", "nan", "0.5000", "nan"],
        ["asr", "slow", "nan", "nan", "0.5000", "nan"],
    ]
    assert plot.stat().st_size > 5000


def test_a_folder_without_rows_is_named(loss_curves, tmp_path, refused):
    assert str(tmp_path) in refused(loss_curves.main, [str(tmp_path)])
    (tmp_path / "metrics.jsonl").write_text("")
    assert "no metrics.jsonl with rows" in refused(loss_curves.main, [str(tmp_path)])
