"""The benchmarks as modules, and tiny random models of other people's formats, for tests that need one end to end."""
import base64
import gzip
import importlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import whisper
from torch import nn

LAST_LAYER_FIRST_HEAD = np.array([[False, False], [True, False]])


@pytest.fixture(scope="session")
def import_benchmark():
    """import_benchmark(name) -> module of benchmarks/, whose scripts find each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
        yield importlib.import_module


@pytest.fixture(scope="session")
def whisper_checkpoint(tmp_path_factory):
    """Path of an openai-whisper checkpoint of 2 + 2 layers, width 16, multilingual vocabulary."""
    dims = whisper.ModelDimensions(
        n_mels=80, n_audio_ctx=1500, n_audio_state=16, n_audio_head=2, n_audio_layer=2,
        n_vocab=51865, n_text_ctx=64, n_text_state=16, n_text_head=2, n_text_layer=2)
    generator = torch.Generator().manual_seed(0)
    model = whisper.model.Whisper(dims)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5, generator=generator)
    path = tmp_path_factory.mktemp("whisper") / "random.pt"
    torch.save({"dims": asdict(dims), "model_state_dict": model.state_dict(),
                "alignment_heads_dump": base64.b85encode(gzip.compress(LAST_LAYER_FIRST_HEAD.tobytes()))}, path)
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
