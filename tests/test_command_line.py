"""--help of every script: there at once, since nothing is imported that takes seconds."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = [[path.name] for path in sorted(ROOT.glob("*.py"))]
MODULES = [
    ["-m", f"voxtral.{path.stem}"] for path in sorted(ROOT.glob("voxtral/*.py")) if "__main__" in path.read_text()
]


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("script", SCRIPTS + MODULES, ids=" ".join)
def test_help_imports_nothing_slow(script):
    shown = run("-X", "importtime", *script, "--help")
    assert shown.returncode == 0 and shown.stdout.startswith("usage: "), shown.stderr[-500:]
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in shown.stderr.splitlines()}
    assert not imported & {"torch", "transformers", "whisper", "peft", "matplotlib", "numpy"}
    seconds = []
    for _ in range(3):  # the least of three: others may be at work on the machine
        began = time.monotonic()
        run(*script, "--help")
        seconds.append(time.monotonic() - began)
        if seconds[-1] < 2:
            break
    assert min(seconds) < 2


@pytest.mark.parametrize("script", ["train_encoder.py", "evaluate.py"])
def test_mistyped_option_is_refused_before_the_imports(script):
    refused = run("-X", "importtime", script, "--confg", "x.yaml")
    assert refused.returncode == 2 and "error: " in refused.stderr
    assert not re.search(r"\|\s+torch$", refused.stderr, re.M)
