"""notebooks/first_clone.ipynb: its cells run in order, and it is in git without outputs."""

import json
import sys
from pathlib import Path
from types import ModuleType

import matplotlib.pyplot as plt
import numpy as np
import pytest
import soundfile

from voxtral.model_card import CARD

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "first_clone.ipynb"


@pytest.fixture(scope="module")
def cells():
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_no_outputs_are_in_git(cells):
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


def test_the_cells_make_a_clone(cells, tmp_path, monkeypatch):
    for path in ROOT.iterdir():  # a checkout whose runs/ is its own
        if path.name != "runs":
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    plt.switch_backend("agg")
    players = []
    ipython, ipython.display = ModuleType("IPython"), ModuleType("IPython.display")  # it comes with Jupyter only
    ipython.version_info = (9, 0)  # matplotlib asks
    ipython.display.Audio = lambda samples, rate: (samples, rate)
    ipython.display.display = players.append
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", ipython.display)
    variables = {}
    for cell in cells:
        exec("".join(cell["source"]), variables)
    samples, rate = soundfile.read(tmp_path / "runs" / "first_clone" / "hello.wav")
    assert rate == 24000 and 1 < len(samples) / rate < 10 and np.abs(samples).max() > 0.05
    assert [player[1] for player in players] == [24000, 24000] and np.array_equal(players[1][0], samples)
    assert [len(axis.images) for axis in variables["axes"]] == [1, 1]
    assert (tmp_path / "runs" / "first_clone" / "checkpoint" / CARD).is_file()
