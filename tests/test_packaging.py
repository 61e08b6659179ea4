"""pyproject.toml: its extras are what the code asks for."""

from pathlib import Path

import pytest

from voxtral.score_table import SCORES
from voxtral.tracking import TRACKERS

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")


def test_extras_are_the_optional_packages():
    extras = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    needed = {package for score in SCORES.values() for package in score.packages}
    assert set(extras["eval"]) == needed - {"resemblyzer"}  # make setup installs its weights alone
    assert set(extras["track"]) == set(TRACKERS)
