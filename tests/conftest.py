"""Scripts of benchmarks/ and research/, tiny random models of other people's formats, runs that are stopped."""

import base64
import gzip
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import whisper
from torch import nn

from voxtral.run import Logger

LAST_LAYER_FIRST_HEAD = np.array([[False, False], [True, False]])


@pytest.fixture(scope="session")
def import_script():
    """import_script(name) -> module of benchmarks/ or research/, whose scripts find each other."""
    with pytest.MonkeyPatch.context() as patch:
        for folder in ("benchmarks", "research"):
            patch.syspath_prepend(Path(__file__).parents[1] / folder)
        yield importlib.import_module


@pytest.fixture(scope="session")
def whisper_checkpoint(tmp_path_factory):
    """Path of an openai-whisper checkpoint of 2 + 2 layers, width 16, multilingual vocabulary."""
    dims = whisper.ModelDimensions(
        n_mels=80,
        n_audio_ctx=1500,
        n_audio_state=16,
        n_audio_head=2,
        n_audio_layer=2,
        n_vocab=51865,
        n_text_ctx=64,
        n_text_state=16,
        n_text_head=2,
        n_text_layer=2,
    )
    generator = torch.Generator().manual_seed(0)
    model = whisper.model.Whisper(dims)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5, generator=generator)
    path = tmp_path_factory.mktemp("whisper") / "random.pt"
    torch.save(
        {
            "dims": asdict(dims),
            "model_state_dict": model.state_dict(),
            "alignment_heads_dump": base64.b85encode(gzip.compress(LAST_LAYER_FIRST_HEAD.tobytes())),
        },
        path,
    )
    return str(path)


@pytest.fixture(scope="session")
def speaker_checkpoint(tmp_path_factory):
    """Path of a pretrained.pt as Resemblyzer's, with random weights."""
    torch.manual_seed(0)
    parts = nn.ModuleDict({"lstm": nn.LSTM(40, 256, num_layers=3), "linear": nn.Linear(256, 256)})
    parts.requires_grad_(False)
    for parameter in parts["lstm"].parameters():
        parameter.mul_(4)  # so that embeddings differ
    parts["linear"].weight.mul_(20)
    path = tmp_path_factory.mktemp("resemblyzer") / "pretrained.pt"
    state = parts.state_dict() | {"similarity_weight": torch.ones(1)}
    torch.save({"step": 1, "model_state": state, "optimizer_state": {}}, path)
    return str(path)


@pytest.fixture
def refused(capsys):
    """refused(main, arguments) -> the one line with which `main` ends."""

    def refused(main, arguments):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        message = capsys.readouterr().err
        assert stop.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1
        return message

    return refused


def signal_group(number):
    """Sends this process and its loader processes a signal, from elsewhere, as a terminal and a scheduler do."""
    group = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    subprocess.run(["kill", f"-{int(number)}", *map(str, group)])  # some may be gone


@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(step, signal number): when that step is logged, this process and its loader processes get the signal."""

    def stop_at(at, number=signal.SIGTERM):
        add = Logger.add

        def add_and_ask_to_stop(self, step, scalars):
            add(self, step, scalars)
            if step == at:
                signal_group(number)

        monkeypatch.setattr(Logger, "add", add_and_ask_to_stop)

    return stop_at


def stopped(main, arguments):
    """Runs a script that is told to stop: it ends as a whole, with exit code 0."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0


# Tells torchrun, which tells all, to stop after a step.
STOPPED_BY_TORCHRUN = """
import os, runpy, signal, sys
from voxtral.run import Logger
add, number = Logger.add, signal.Signals[sys.argv.pop(1)]
def add_and_ask_to_stop(self, step, scalars):
    add(self, step, scalars)
    if step == 2 and self.is_main:
        os.kill(os.getppid(), number)
Logger.add = add_and_ask_to_stop
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def stopped_by_torchrun(tmp_path, script, number, arguments):
    """Runs a training script in two processes, and sends torchrun a signal after two steps; returns what it printed."""
    root = Path(__file__).parents[1]
    (tmp_path / "program.py").write_text(STOPPED_BY_TORCHRUN)
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            str(tmp_path / "program.py"),
            number,
            script,
            *arguments,
        ],
        cwd=root,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )
    assert "SignalException" in ran.stderr, ran.stderr  # torchrun's own
    assert "DataLoader" not in ran.stderr, ran.stderr
    return ran.stdout
