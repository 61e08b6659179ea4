"""Scripts and their command lines, tiny random models, ours and other people's, runs that are stopped."""

import base64
import gzip
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import whisper
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from voxtral.checkpoint import save_tensors
from voxtral.inject import inject
from voxtral.layout import withheld_layout
from voxtral.params import load_params
from voxtral.processes import Process
from voxtral.run import Logger
from voxtral.standin import random_tensor, small_params, write_random_checkpoint

ROOT = Path(__file__).parents[1]
SPEECH = ROOT / "assets" / "speech"
PRESETS = {"alpha": 13, "beta": 31}  # rows
ALONE = Process(rank=0, world_size=1, device=torch.device("cpu"))
LAST_LAYER_FIRST_HEAD = np.array([[False, False], [True, False]])


@pytest.fixture(scope="session")
def import_script():
    """import_script(name) -> module of benchmarks/ or research/, whose scripts find each other."""
    with pytest.MonkeyPatch.context() as patch:
        for folder in ("benchmarks", "research"):
            patch.syspath_prepend(ROOT / folder)
        yield importlib.import_module


def command_line(**options) -> list[str]:
    """command_line(per_voice=2, errors=True, encoder=["a", "b"]) -> --per-voice=2 --errors --encoder=a --encoder=b;
    what is None is left out."""
    words = []
    for name, value in options.items():
        option = "--" + name.replace("_", "-")
        values = [] if value is None else value if isinstance(value, list) else [value]
        words += [option if one is True else f"{option}={one}" for one in values]
    return words


def read_report(path):
    """A JSON file, in which there must be no NaN."""
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in {path}"))


def relative_error(ours, theirs) -> float:
    assert ours.shape == theirs.shape
    return ((ours - theirs).norm() / theirs.norm()).item()


# ---------------------------------------------------------------- tiny models


def write_encoder(path, folder, seed=0, change=lambda tensors: None):
    """A random encoder for the checkpoint in `folder`, of fp32 values that bf16 cannot hold -> path."""
    layout = withheld_layout(load_params(folder))
    tensors = {name: random_tensor(name, shape, seed).float() * 1.001 for name, shape in layout.items()}
    change(tensors)
    save_tensors(path, tensors)
    return path


@pytest.fixture(scope="session")
def released(tmp_path_factory):
    """A checkpoint without encoder, with PRESETS. To read only."""
    folder = tmp_path_factory.mktemp("released")
    write_random_checkpoint(folder, small_params(), PRESETS)
    return folder


def write_injected(base, voices):
    """base/released, base/encoder.safetensors, and the two put together -> base/checkpoint."""
    write_random_checkpoint(base / "released", small_params(), voices)
    encoder = write_encoder(base / "encoder.safetensors", base / "released")
    return inject(base / "released", encoder, output=base / "checkpoint")


def write_golden(folder, file, sizes, change=lambda tensors: None):
    """A checkpoint folder with the weights of a file of reference numbers, and nothing else; sizes: its metadata -> the
    content of params.json; change: of the tensors."""
    with safe_open(file, framework="pt") as opened:
        raw = sizes({key: json.loads(value) for key, value in opened.metadata().items()})
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(raw))
    tensors = {name: tensor for name, tensor in load_file(file).items() if not name.startswith("io.")}
    change(tensors)
    save_tensors(folder / "consolidated.safetensors", tensors)
    return folder


@pytest.fixture(scope="session")
def whisper_checkpoint(tmp_path_factory):
    """Path of an openai-whisper checkpoint of 2 + 2 layers, width 16, multilingual vocabulary."""
    dims = {"n_mels": 80, "n_audio_ctx": 1500, "n_vocab": 51865, "n_text_ctx": 64}
    sizes = {"state": 16, "head": 2, "layer": 2}
    dims |= {f"n_{part}_{name}": size for part in ("audio", "text") for name, size in sizes.items()}
    generator = torch.Generator().manual_seed(0)
    model = whisper.model.Whisper(whisper.ModelDimensions(**dims))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5, generator=generator)
    path = tmp_path_factory.mktemp("whisper") / "random.pt"
    heads = base64.b85encode(gzip.compress(LAST_LAYER_FIRST_HEAD.tobytes()))
    torch.save({"dims": dims, "model_state_dict": model.state_dict(), "alignment_heads_dump": heads}, path)
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


# ---------------------------------------------------------------- scripts that end


@pytest.fixture
def run_script(capsys):
    """run_script(main, *arguments) -> exit code, stdout, stderr of a script in this process."""

    def run_script(main, *arguments):
        capsys.readouterr()
        code = 0
        try:
            main(list(map(str, arguments)))
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run_script


@pytest.fixture
def refused(run_script):
    """refused(main, arguments) -> the one line with which `main` ends."""

    def refused(main, arguments):
        code, _, message = run_script(main, *arguments)
        assert code == 2 and message.startswith("error: ") and message.count("\n") == 1, message
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


def torchrun(*words, options, **settings) -> subprocess.CompletedProcess:
    """A script with its arguments under torchrun with these options of its own; settings: of subprocess.run."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", *options, *map(str, words)]
    return subprocess.run(command, **{"cwd": ROOT, "capture_output": True, "text": True, "env": environment} | settings)


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
    program = tmp_path / "program.py"
    program.write_text(STOPPED_BY_TORCHRUN)
    ran = torchrun(program, number, script, *arguments, options=["--standalone", "--nproc-per-node=2"])
    assert "SignalException" in ran.stderr, ran.stderr  # torchrun's own
    assert "DataLoader" not in ran.stderr, ran.stderr
    return ran.stdout
