"""research/loss_curves.py and withheld_lengths.py: tables and plots of several runs."""

import json

import pytest


@pytest.fixture(scope="module")
def scripts(import_script):
    return import_script("loss_curves"), import_script("withheld_lengths")


def cells(text):
    return [[word.strip() for word in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


# ---------------------------------------------------------------- loss_curves.py


def test_means_of_quarters(scripts, tmp_path, capsys):
    for name, scale in (("fast", 1), ("slow", 10)):
        rows = [{"step": step, "loss/l1": scale * step, "time/step_ms": 1.0} for step in range(1, 9)]
        rows.append({"step": 8, "validation/mel_distance": 2.0})
        rows[5]["loss/asr"] = 0.5
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot = tmp_path / "plots" / "curves.png"
    scripts[0].main([str(tmp_path / "fast"), str(tmp_path / "slow"), "--output", str(plot)])
    lines = cells(capsys.readouterr().out)
    assert lines[2:] == [
        ["l1", "fast", "1.5000", "3.5000", "5.5000", "7.5000"],
        ["l1", "slow", "15.0000", "35.0000", "55.0000", "75.0000"],
        ["asr", "fast", "nan", "nan", "0.5000", "nan"],
        ["asr", "slow", "nan", "nan", "0.5000", "nan"],
    ]
    assert plot.stat().st_size > 5000


def test_a_folder_without_rows_is_named(scripts, tmp_path, refused):
    assert str(tmp_path) in refused(scripts[0].main, [str(tmp_path)])
    (tmp_path / "metrics.jsonl").write_text("")
    assert "no metrics.jsonl with rows" in refused(scripts[0].main, [str(tmp_path)])


# ---------------------------------------------------------------- withheld_lengths.py

NAMES = ("mel", "semantic_equal", "levels_equal", "levels_within_1", "embedding_cosine")


def write_results(folder, steps, rows, true=1.0):
    """Rows: name -> value of every column."""

    def summary(value):
        return {"mean": value, "deviation": None}

    folder.mkdir()
    (folder / "results.json").write_text(
        json.dumps(
            {
                "steps": steps,
                "audio_hours": steps / 100,
                "true": dict.fromkeys(NAMES, true),
                "untrained": dict.fromkeys(NAMES, 0.1),
                "rows": {
                    name: {
                        "seeds": {"0": {}} if value else {},
                        "gap_closed": {"mel": summary(0.5)} if value else {},
                        "values": {column: summary(value) for column in (*NAMES, "ms per step")} if value else {},
                    }
                    for name, value in rows.items()
                },
            }
        )
    )


def test_rows_over_lengths(scripts, tmp_path, capsys):
    write_results(tmp_path / "long", 400, {"cheap": 0.75})
    write_results(tmp_path / "short", 100, {"d": 0.25, "cheap": 0.5, "t": None})  # t was not trained to its end
    plot = tmp_path / "lengths.png"
    scripts[1].main([str(tmp_path / "long"), str(tmp_path / "short"), "--output", str(plot)])
    lines = cells(capsys.readouterr().out)
    assert [line[:5] for line in lines[2:]] == [
        ["d", "100", "1.00", "1", "0.25 (50 %)"],
        ["cheap", "100", "1.00", "1", "0.5 (50 %)"],
        ["cheap", "400", "4.00", "1", "0.75 (50 %)"],
    ]
    assert plot.stat().st_size > 5000


def test_what_cannot_be_compared_is_refused(scripts, tmp_path, refused):
    assert "results.json is missing" in refused(scripts[1].main, [str(tmp_path)])
    write_results(tmp_path / "a", 100, {"d": 0.25})
    write_results(tmp_path / "b", 200, {"d": 0.5}, true=2.0)
    assert "different stand-ins" in refused(scripts[1].main, [str(tmp_path / "a"), str(tmp_path / "b")])
    write_results(tmp_path / "c", 200, {"d": 0.5}, true=1.001)
    assert "different stand-ins" in refused(scripts[1].main, [str(tmp_path / "a"), str(tmp_path / "c")])


def test_the_last_digit_of_a_true_encoder_may_differ(scripts, tmp_path):
    for name, true in (("a", 1.0), ("b", 1.0 + 1e-12)):  # measured twice on a GPU
        write_results(tmp_path / name, 100, {"d": 0.25}, true=true)
        report = json.loads((tmp_path / name / "results.json").read_text())
        report["true"]["estoi"] = report["untrained"]["estoi"] = None  # not measured
        (tmp_path / name / "results.json").write_text(json.dumps(report))
    reports = [json.loads((tmp_path / name / "results.json").read_text()) for name in "ab"]
    assert reports[0]["true"] != reports[1]["true"] and scripts[1].alike(reports[0]["true"], reports[1]["true"])
    reports[1]["true"]["estoi"] = 0.5
    assert not scripts[1].alike(reports[0]["true"], reports[1]["true"]) and not scripts[1].alike(
        reports[1]["true"], reports[0]["true"]
    )
    del reports[1]["true"]["estoi"]
    assert not scripts[1].alike(reports[0]["true"], reports[1]["true"])
