"""Experiment tracking beside TensorBoard, by what researchers use: wandb, mlflow or trackio, each an optional package.

Where they write and whether they are online is theirs to be told, by their own variables (WANDB_MODE=offline,
MLFLOW_TRACKING_URI, ...). tracker.json in the run folder holds the name of the run there, so that a resumed run goes on
in it.
"""

import json
import uuid
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from voxtral.checkpoint import write_text
from voxtral.errors import UserError, one_line

PROJECT = "voxtral-voice-clone"
TRACKERS = ("wandb", "mlflow", "trackio")  # names of packages


def open_tracker(config, folder: Path):
    """What config.tracker names -> an object with log(metrics, step) and close(); None for none. Raises UserError."""
    if config.tracker == "none":
        return None
    record = folder / "tracker.json"
    known = json.loads(record.read_text()) if record.is_file() else {}
    known = known if known.get("tracker") == config.tracker else {}
    kind = Mlflow if config.tracker == "mlflow" else WandbLike
    try:
        tracker = kind(config.tracker, folder, asdict(config), known.get("id"))
    except Exception as error:  # each package has its own
        raise UserError(
            f"tracker {config.tracker} cannot start ({one_line(error)}): set it up, or set tracker=none."
        ) from error
    write_text(record, json.dumps({"tracker": config.tracker, "id": tracker.id}) + "\n")
    return tracker


class WandbLike:
    """wandb, and trackio, which has its functions."""

    def __init__(self, tracker: str, folder: Path, config: dict, run_id: str | None):
        self.module, self.id = import_module(tracker), run_id or f"{folder.name}-{uuid.uuid4().hex[:8]}"
        own = {"id": self.id, "dir": str(folder)} if tracker == "wandb" else {}
        self.module.init(project=PROJECT, name=self.id, config=config, resume="allow", **own)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.module.log(metrics, step=step)

    def close(self) -> None:
        self.module.finish()


class Mlflow:
    def __init__(self, tracker: str, folder: Path, config: dict, run_id: str | None):
        self.module = import_module(tracker)
        self.module.set_experiment(PROJECT)
        self.id = self.module.start_run(run_id=run_id, run_name=folder.name).info.run_id
        if run_id is None:  # parameters of a run cannot be changed
            self.module.log_params({name: str(value)[:500] for name, value in dotted(config).items()})

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.module.log_metrics(metrics, step=step)

    def close(self) -> None:
        self.module.end_run()


def dotted(values: dict, prefix: str = "") -> dict:
    """{"train": {"epochs": 3}} -> {"train.epochs": 3}"""
    result = {}
    for key, value in values.items():
        result |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result
