"""research/on_gpus.sh: which commands it runs where, and that their settings are ones that exist."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from voxtral.config import EncoderConfig, StandinConfig, check_encoder_config, load_config

ROOT = Path(__file__).parents[1]
OWN = ("STAGES", "MID_STEPS", "ROW_STEPS", "SEEDS", "MINUTES")
CLEAN = {name: value for name, value in os.environ.items() if name not in OWN}
STUB = """#!{python}
import json, os, sys, time
if sys.argv[1] == "-c":
    print({gpus})
else:
    time.sleep(0.5 * ("make_standin.py" in sys.argv))
    with open("{calls}", "a") as file:
        file.write(json.dumps([os.environ["CUDA_VISIBLE_DEVICES"], *sys.argv[1:]]) + "\\n")
    sys.exit("test" in sys.argv[1])
"""


def calls_of(tmp_path, gpus, **environment) -> list[list[str]]:
    """[GPUs, arguments...] of every command, and parts.txt checked against their number."""
    (tmp_path / "speech").mkdir()
    for name in ("train.csv", "talk.csv", "eval.csv"):
        (tmp_path / "speech" / name).write_text("path,speaker\n")
    for name in ("python", "torchrun"):
        (tmp_path / name).write_text(STUB.format(python=sys.executable, gpus=gpus, calls=tmp_path / "calls"))
        (tmp_path / name).chmod(0o755)
    subprocess.run(
        [ROOT / "research/on_gpus.sh", "speech", "base", "out"],
        cwd=tmp_path,
        check=True,
        timeout=60,
        env=CLEAN | environment | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
    )
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    parts = (tmp_path / "out" / "parts.txt").read_text().splitlines()
    assert len(parts) == len(calls) and len({part.split(":")[0] for part in parts}) == len(parts)
    return calls


def test_settings_exist_and_both_gpus_are_used(tmp_path):
    calls = calls_of(tmp_path, 2)
    assert {call[0] for call in calls} == {"0", "1", "0,1"}
    scripts = [next(word for word in call[1:] if word.endswith(".py") or word == "pytest") for call in calls]
    ours = "make_standin train_encoder train_step withheld_encoder code_limits evaluate pytest loss_curves"
    assert {Path(script).stem for script in scripts} == set(ours.split())
    for call, script in zip(calls, scripts):
        overrides = [word for word in call if "=" in word and word.split("=")[0] not in ("batch", "seconds")]
        if script in ("train_encoder.py", "benchmarks/train_step.py"):
            check_encoder_config(load_config(EncoderConfig, ROOT / "configs/encoder.yaml", overrides))
        elif overrides:
            check_encoder_config(load_config(StandinConfig, ROOT / "configs/standin_mid.yaml", overrides))
            assert f"data.data_root={tmp_path / 'speech'}" in overrides  # wherever the script was called from


def test_one_gpu_does_all_but_two_processes(tmp_path):
    calls = calls_of(tmp_path, 1)
    assert {call[0] for call in calls} == {"0"} and not any("--nproc-per-node" in call for call in calls)


def test_some_stages_alone(tmp_path):
    calls = calls_of(tmp_path, 2, STAGES="processes curves+standin", MINUTES="1")
    scripts = [next(word for word in call[1:] if word.endswith(".py")) for call in calls]
    assert scripts[0] == "benchmarks/train_step.py" and calls[0][0] == "0,1"  # one stage after the other
    assert scripts.count("make_standin.py") == 2 and scripts.count("train_encoder.py") == 3 and len(scripts) == 7


def test_encoders_are_trained_when_the_standin_is_there_and_as_long_as_the_minutes_last(tmp_path):
    standin, *others = calls_of(tmp_path, 2, STAGES="standin,rows+longer", MINUTES="7")
    assert standin[:2] == ["0", "make_standin.py"]
    beside = {(gpu, "research/withheld_encoder.py") for gpu in "01"}  # each other
    assert {(call[0], call[1]) for call in others} == beside
    assert all(call[call.index("--minutes") + 1] == "7" for call in others)
    (rows,) = [call for call in others if "--at-once" in call]
    assert rows[rows.index("--at-once") + 1] == "2"  # on each GPU


def test_rows_alone_take_both_gpus(tmp_path):
    (call,) = calls_of(tmp_path, 2, STAGES="rows")
    assert call[0] == "0,1" and call[call.index("--at-once") + 1] == "4"


@pytest.mark.parametrize("arguments, words", [([], "usage"), (["x", "base", "out"], "x: there must be train.csv")])
def test_mistakes(tmp_path, arguments, words):
    done = subprocess.run([ROOT / "research/on_gpus.sh", *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and words in done.stderr and not (tmp_path / "out").exists()
