"""The folder of a run: its configurations, checkpoints that survive anything, and how it goes on from them."""

import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from voxtral.checkpoint import SafetensorsFile, atomic_path, flush, save_tensors, write_text
from voxtral.config import KEPT_ON_RESUMING, SWITCHES, ConfigError, dump_config, load_config
from voxtral.errors import UserError, one_line, reason_of
from voxtral.history import History, metric_rows
from voxtral.json_files import write_json
from voxtral.params import CheckpointError
from voxtral.processes import Process
from voxtral.tracking import dotted

STATE = "run_state.pt"  # in the folder of a checkpoint; without it, there are only weights to look at later
CONFIG = "config.yaml"
SAVED_SHARE = 100  # seconds between checkpoints, for each that the last one took
NO_SETTINGS = ("resume", "output_dir")  # keys that say how a script is started
DAMAGE = (LookupError, ValueError, RuntimeError, EOFError, UnpicklingError, CheckpointError, OSError)


class Tensors:
    """Tensors that are a part of the run state: they keep their place in memory, what they hold is saved and
    restored."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors

    def state_dict(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.tensors.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if {name: t.shape for name, t in state.items()} != {name: t.shape for name, t in self.tensors.items()}:
            raise ValueError("other tensors")
        for name, tensor in self.tensors.items():
            tensor.copy_(state[name])


class RunFolder:
    """output_dir: config.yaml, former_configs/, environment.json, metrics.jsonl, checkpoints/step_XXXXXXXX/, best/,
    samples/, plots/, tensorboard/. The first process alone reads and writes it, so that several machines need not share
    it."""

    def __init__(self, config, process: Process):
        """Raises ConfigError when the folder holds another run (resume=false), or when one key of its configuration
        cannot be another one (resume=true). `changes`: what is different from the run's last configuration, a line
        each."""
        self.path, self.config, self.process, self.changes = Path(config.output_dir), config, process, []
        self.saved_at, self.save_sec = time.monotonic(), 0.0
        self.best: tuple[dict, dict] | None = None  # weights and record of best/ that save_step() is to write
        if process.is_main:
            if self.latest() and not config.resume:
                raise ConfigError(
                    f"{self.path} already holds a run: continue it with resume=true, or choose another output_dir."
                )
            if self.latest():
                former = load_config(type(config), self.path / CONFIG, [])
                self.changes = changes_on_resuming(former, config, self.path)
            self._prepare()
        process.wait()

    def _prepare(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        for former in (*self.path.glob(".*.former"), *self.checkpoints.glob(".*.former")):
            final = former.with_name(former.name.removeprefix(".").removesuffix(".former"))
            if final.exists():
                shutil.rmtree(former)
            else:
                os.replace(former, final)
        write_json(self.path / "environment.json", environment(self.process))
        if self.changes:
            kept = self.path / "former_configs"
            kept.mkdir(exist_ok=True)
            name = f"{len(list(kept.iterdir())):03d}_until_step_{last_step(self.path):08d}.yaml"
            os.replace(self.path / CONFIG, kept / name)
        dump_config(self.config, self.path / CONFIG)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def latest(self) -> Path | None:
        """The newest whole checkpoint; half-written ones have other names."""
        folders = step_folders(self.path)
        return folders[-1] if folders else None

    # ---------------------------------------------------------------- saving

    def is_due(self, step: int) -> bool:
        """Whether it is time for a checkpoint, by train.save_every_steps or by the first process's clock: then saving
        takes a hundredth of the time at most, however slow the disk."""
        every, minutes = self.config.train.save_every_steps, self.config.train.save_every_minutes
        waited = time.monotonic() - self.saved_at
        by_clock = self.process.is_main and minutes and waited > max(60 * minutes, SAVED_SHARE * self.save_sec)
        return bool(every and step % every == 0 or by_clock)

    def save_step(self, step: int, write: Callable[[Path], None], parts: dict, max_steps: int, **record: Any) -> Path:
        """checkpoints/step_XXXXXXXX/: the weights, by `write(folder)`, and run_state.pt with the state of every part
        and a record. Of older checkpoints than the last train.keep_last, the first in each of train.milestones equal
        parts of the run keeps its weights, but for that in the first part; the others go. What keep_best() was given is
        saved before."""
        if self.best:
            files, best_record = self.best
            self.save_best(partial(write_files, files=files), **best_record)
            self.best = None
        final, began = self.checkpoints / f"step_{step:08d}", time.monotonic()

        def write_all(folder: Path) -> None:
            write(folder)
            states = {name: part.state_dict() for name, part in parts.items()}
            torch.save({"step": step, **record, **states}, folder / STATE)

        self._write_folder(final, write_all)
        self.saved_at = time.monotonic()
        self.save_sec = self.saved_at - began
        old = step_folders(self.path)[: -self.config.train.keep_last]
        parts = set()
        for folder in step_folders(self.path, with_state=False):
            part = step_of(folder) * self.config.train.milestones // max_steps
            if folder in old and part in parts | {0}:
                shutil.rmtree(folder)
            elif folder in old:
                (folder / STATE).unlink()
            parts.add(part)
        return final

    def keep_best(self, files: dict[str, Tensors], **record: float) -> None:
        """Copies weights that are the best so far, for best/. They are written with the next checkpoint, as validations
        come more often."""
        copies = {
            name: Tensors({key: tensor.cpu().clone() for key, tensor in part.state_dict().items()})
            for name, part in files.items()
        }
        self.best = copies, record

    def save_best(self, write: Callable[[Path], None], **record: float) -> None:
        """best/, filled by `write(folder)`, with `record` as its metrics.json, in place of the one before."""

        def write_all(folder: Path) -> None:
            write(folder)
            write_text(folder / "metrics.json", json.dumps(record) + "\n")

        self._write_folder(self.path / "best", write_all)

    def _write_folder(self, final: Path, write: Callable[[Path], None]) -> None:
        """It appears only when whole. One of that name stands aside until then; _prepare puts it back after a kill.
        Raises UserError when it cannot be written."""
        temporary, former = (final.with_name(f".{final.name}.{suffix}") for suffix in ("tmp", "former"))
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            write(temporary)
            for path in (*temporary.rglob("*"), temporary):
                flush(path)
            if final.exists():
                os.replace(final, former)
            os.replace(temporary, final)
            flush(final.parent)
        except (OSError, RuntimeError) as error:  # of a full disk, torch makes the latter
            free_gb, reason = shutil.disk_usage(self.path).free / 1e9, reason_of(error)
            raise UserError(
                f"{final} could not be written ({reason}; {free_gb:.1f} GB are free there): what was saved before is "
                f"whole, the newest checkpoint is {self.latest() or 'none yet'}; make room, and go on with "
                "resume=true."
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)

    # ---------------------------------------------------------------- going on

    def restore(self, parts: dict, weights: dict[str, Tensors], facts: dict[str, Any]) -> dict:
        """Gives every part its state of the newest checkpoint, and `weights` what is in the safetensors files of these
        names; returns its step and record, or {} without a checkpoint. Raises ConfigError when it is damaged, when a
        part does not fit, or when one of the record's `facts` (keys that it is about -> value) is not what it was."""
        state = self._read_newest(weights) if self.process.is_main else None
        record = self.process.of_main(
            state and {name: state[name] for name in state if name not in parts and name not in weights}
        )
        if not record:
            return {}
        for key, value in facts.items():
            if record.get("facts", {}).get(key) != value:
                raise ConfigError(
                    f"{key}: the run in {self.path} has {record.get('facts', {}).get(key)}, and its state means "
                    f"nothing with {value}: go back to that, or choose another output_dir for another run."
                )
        for name, part in {**parts, **weights}.items():
            found = self.process.of_main(state and state.get(name))
            try:
                part.load_state_dict(found)
            except (LookupError, ValueError, RuntimeError, TypeError, AttributeError) as error:
                raise ConfigError(
                    f"{self.path}: the run state does not fit ({name}: {reason_of(error)}): it was written by another "
                    "version of these scripts, or with other sizes; choose another output_dir."
                ) from error
        return record

    def _read_newest(self, weights: dict[str, Tensors]) -> dict:
        folders = step_folders(self.path)
        if not folders:
            return {}
        try:
            return read_checkpoint(folders[-1], weights)
        except DAMAGE as error:
            damage = f"{folders[-1]} is damaged ({one_line(error)})"
            whole = next((folder for folder in reversed(folders[:-1]) if _is_whole(folder, weights)), None)
            if whole:
                raise ConfigError(f"{damage}: delete it, and resume=true goes on from {whole}.") from error
            raise ConfigError(
                f"{damage}, and there is no older checkpoint: choose another output_dir and start anew."
            ) from error

    def truncate_metrics(self, step: int) -> History:
        """Drops the lines of metrics.jsonl after `step`, which the run will write again; returns what is left."""
        path, history = self.path / "metrics.jsonl", History()
        if path.is_file():
            with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
                for row in metric_rows(path):
                    if row["step"] <= step:
                        file.write(json.dumps(row) + "\n")
                        history.add(row)
        return history


def read_checkpoint(folder: Path, names) -> dict:
    """run_state.pt and the safetensors files `names` of a checkpoint, on the CPU, as one dictionary."""
    try:
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except DAMAGE as error:
        raise CheckpointError(f"{STATE}: {reason_of(error)}") from error
    return state | {name: SafetensorsFile(folder / name).read() for name in names}


def _is_whole(folder: Path, names) -> bool:
    try:
        read_checkpoint(folder, names)
    except DAMAGE:
        return False
    return True


def write_files(folder: Path, files: dict[str, Tensors]) -> None:
    """Tensors of each safetensors file, by its name."""
    for name, tensors in files.items():
        save_tensors(folder / name, tensors.state_dict())


def step_folders(output_dir, with_state: bool = True) -> list[Path]:
    """A run's whole checkpoints, oldest first; without state, also those of which the weights alone are left."""
    folders = sorted((Path(output_dir) / "checkpoints").glob("step_" + "[0-9]" * 8))
    return [folder for folder in folders if not with_state or (folder / STATE).exists()]


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def last_step(output_dir) -> int:
    """The step of a run's newest whole checkpoint; 0: it has none."""
    folders = step_folders(output_dir)
    return step_of(folders[-1]) if folders else 0


# ---------------------------------------------------------------- configurations


def load_run_config(schema: type, path, overrides: list[str], name: str = CONFIG):
    """The configuration of a run: the YAML at `path`, merged into the dataclass `schema`, and overrides. With
    resume=true, what the run has in its own folder, and the overrides; where the YAML says something else, that is
    printed."""
    config = load_config(schema, path, overrides)
    own = Path(config.output_dir) / name
    if not config.resume or not own.is_file() or not step_folders(config.output_dir):
        return config
    from_yaml = config
    config = load_config(schema, own, [*overrides, f"output_dir={from_yaml.output_dir}", "resume=true"])
    for key, before, now in differences(from_yaml, config):
        print(f"{key} is {now}, as the run had it ({path}: {before}; override it to change it)", flush=True)
    return config


def differences(first, second) -> list[tuple[str, Any, Any]]:
    """(key, value in the first, value in the second) of all keys that two configurations of a run set differently."""
    one, other = dotted(asdict(first)), dotted(asdict(second))
    return [
        (key, one.get(key), other.get(key))
        for key in dict.fromkeys([*one, *other])
        if key not in NO_SETTINGS and one.get(key) != other.get(key)
    ]


def changes_on_resuming(former, config, path) -> list[str]:
    """What is different, a line each. Raises ConfigError for a key that the run's state hangs on."""
    lines = []
    for key, before, now in differences(former, config):
        if key in KEPT_ON_RESUMING or key in SWITCHES and bool(before) != bool(now):
            raise ConfigError(
                f"{key}: the run in {path} has {before}, and its state means nothing with {now}: leave it, or choose "
                "another output_dir for another run."
            )
        lines.append(f"{key}: {before} → {now}")
    return lines


def environment(process: Process) -> dict:
    """What a reader needs to repeat a run."""
    device = platform.processor() or platform.machine()
    if process.device.type == "cuda":
        device = torch.cuda.get_device_name(process.device)
    return {
        "command": " ".join(sys.argv),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device,
        "threads": torch.get_num_threads(),
        "processes": process.world_size,
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
