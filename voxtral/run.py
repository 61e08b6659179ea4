"""What every training script shares: command line, schedule, optimizer, what comes after a step, logging."""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from voxtral.config import OptimizerConfig, load_config
from voxtral.errors import one_line, one_sentence, shown
from voxtral.processes import TrainingDiverged, training_process
from voxtral.run_folder import RunFolder, load_run_config
from voxtral.tables import read_lines
from voxtral.tracking import open_tracker


def training_main(train: Callable, schema: type, options: argparse.Namespace) -> None:
    """train(config, process), with the configuration (a dataclass `schema`) that training_command_line() was given."""
    with one_sentence():
        config = load_config(schema, options.config, options.overrides)
        with training_process(config.device) as process:
            if process.is_main:
                config = load_run_config(schema, options.config, options.overrides)
            train(process.of_main(config), process)


class SideStream:
    """`with side:` launches work that runs beside what follows, until wait(). On the CPU, things run in their order."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __enter__(self) -> None:
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream())
            self.context = torch.cuda.stream(self.stream)
            self.context.__enter__()

    def __exit__(self, *error) -> None:
        if self.stream:
            self.context.__exit__(*error)

    def wait(self) -> None:
        """What is launched from now on comes after the work beside."""
        if self.stream:
            torch.cuda.current_stream().wait_stream(self.stream)


# ---------------------------------------------------------------- learning rate

# A function of the step alone: nothing is saved, and a resumed run may have another train.max_steps or learning rate.
# torch's LinearLR and CosineAnnealingLR in sequence give the same to 4e-15 (20,000 steps, 500 of warm-up), but carry on
# the old settings: after step 10,000 of 20,000 at 5e-4, resumed to 40,000 at 2e-4, SequentialLR gives 2.6e-4 and
# LambdaLR 4.3e-4, where 1.7e-4 is meant.


def cosine_with_warmup(step: int, warmup_steps: int, max_steps: int) -> float:
    """Factor of the learning rate at `step`: linear to 1 over warmup_steps, then cosine to 0 at max_steps."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def adamw(parameters: Iterable[nn.Parameter], learning_rate: float, config: OptimizerConfig) -> torch.optim.AdamW:
    """With weight decay on matrices only: norms, gains, biases and LayerScale have a size that means something, and the
    convolutions' directions (weight norm) have none."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    matrices, others = (
        [parameter for parameter in trained if (parameter.ndim == 2) == is_matrix] for is_matrix in (True, False)
    )
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=learning_rate,
        betas=tuple(config.betas),
        fused=trained[0].is_cuda,
    )


# ---------------------------------------------------------------- after a step


@dataclass
class Due:
    """What comes after a step; the same in all processes."""

    log: bool  # also before a validation and a checkpoint: a loss that is not finite is found before anything is kept
    validate: bool
    save: bool
    stop: bool  # before the last step, with a checkpoint


def is_logged(step: int, max_steps: int, run: RunFolder) -> bool:
    """Whether train.log_every_steps asks for the scalars of this step; they count from 1."""
    return step % run.config.train.log_every_steps == 0 or step == max_steps


def due_after(step: int, max_steps: int, run: RunFolder) -> Due:
    """What the configuration asks for after this step, and what a signal does that any process got."""
    last = step == max_steps
    stopping, save = run.process.any(run.process.stopping(), run.is_due(step))
    validate = last or step % run.config.train.validate_every_steps == 0
    save = save or stopping or last
    return Due(is_logged(step, max_steps, run) or validate or save, validate, save, stopping and not last)


# ---------------------------------------------------------------- logging


class BadClipLog:
    """Lists each bad clip once in RUN_FOLDER/bad_files.txt, over resumed runs too; without a folder, counts only.

    `count`: replacements in this run; `seen`: the lines so far, of a path and the reason, as shown() gives them.
    """

    def __init__(self, run_folder: str | Path | None):
        self.path = run_folder and Path(run_folder) / "bad_files.txt"
        self.count = 0
        self.seen = set(read_lines(self.path)) if self.path and self.path.exists() else set()

    def add(self, bad: list[tuple[str, str]]) -> None:
        """Takes Batch.bad."""
        self.count += len(bad)
        for path, reason in bad:
            line = f"{shown(path)}\t{shown(reason)}"
            if self.path and line not in self.seen:
                self.seen.add(line)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")


class Logger:
    """Collects scalars on the device and writes them every few steps: one log line, metrics.jsonl, TensorBoard.

    Reading a device scalar waits for the device, so it happens once per `log_every_steps` for all of them. Then they
    are averaged over the processes and every step's losses are checked: a NaN, or a total above train.max_total_loss,
    raises TrainingDiverged with its step. Steps count from 1, so a checkpoint's rows end at its own number.
    `bad`: clips that had to be replaced since then, (path, reason); bad_files.txt lists those of all processes.
    """

    def __init__(self, run: RunFolder, max_steps: int, start_step: int):
        self.run, self.max_total, self.is_main = run, run.config.train.max_total_loss, run.process.is_main
        self.pending: list[tuple[int, dict[str, Tensor]]] = []
        self.started, self.start_step, self.last_flush = time.monotonic(), start_step, time.monotonic()
        self.step_times: list[float] = []
        self.bad_clips, self.bad = BadClipLog(run.path if self.is_main else None), []
        interactive = self.is_main and sys.stderr.isatty()
        self.bar = tqdm(total=max_steps, initial=start_step, unit="step", disable=not interactive, dynamic_ncols=True)
        if self.is_main:
            self.history = run.truncate_metrics(start_step)
            self.file = (run.path / "metrics.jsonl").open("a", encoding="utf-8")
            self.board = SummaryWriter(run.path / "tensorboard", purge_step=start_step + 1)
            self.tracker = open_tracker(run.config, run.path)
        self.max_steps = max_steps

    def add(self, step: int, scalars: dict[str, Tensor]) -> None:
        """Scalars of one step (0-dimensional device tensors), detached by the caller."""
        self.pending.append((step, scalars))
        self.bar.update(1)

    def flush(self, extra: dict, work: float, unit: str = "audio_sec") -> None:
        """Reads and checks what was added; logs the last step with `extra` (tensors or numbers) and the speed: `work`
        of that unit a step."""
        if not self.pending:
            return
        self.bad_clips.add(self.run.process.gather(self.bad))
        self.bad = []
        flat = torch.stack(
            [value.detach().float().reshape(()) for _, scalars in self.pending for value in scalars.values()]
        )
        if self.run.process.world_size > 1:
            dist.all_reduce(flat)
            flat /= self.run.process.world_size
        values = iter(flat.tolist())
        rows = [(step, {name: next(values) for name in scalars}) for step, scalars in self.pending]
        for step, row in rows:
            broken = [name for name, value in row.items() if not math.isfinite(value)]
            if broken or row["loss/total"] > self.max_total:
                losses = ", ".join(f"{name} {value:.4g}" for name, value in row.items())
                what = f"loss/total above train.max_total_loss ({self.max_total:g})"
                what = f"{', '.join(broken)} not finite" if broken else what
                kept = self.run.latest()
                raise TrainingDiverged(
                    f"step {step}: {what}; losses: {losses}. "
                    f"The last good checkpoint is {kept or 'none yet'}; "
                    "lower optimizer.learning_rate and resume."
                )
        now = time.monotonic()
        step_sec = (now - self.last_flush) / len(self.pending)
        self.last_flush, self.pending = now, []
        self.step_times.append(step_sec)
        row = {
            **rows[-1][1],
            **{name: value.tolist() if isinstance(value, Tensor) else value for name, value in extra.items()},
            "data/bad_clips": float(self.bad_clips.count),
            "time/step_ms": 1000 * step_sec,
            f"time/{unit}_per_sec": work / step_sec,
        }
        if self.run.process.device.type == "cuda":
            row["time/peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.write(rows[-1][0], row)
        shown = " ".join(f"{name.removeprefix('loss/')} {row[name]:.4f}" for name in row if name.startswith("loss/"))
        memory = f"  {row['time/peak_memory_gib']:.1f} GiB" if "time/peak_memory_gib" in row else ""
        eta = statistics.median(self.step_times[-20:]) * (self.max_steps - rows[-1][0])
        self.say(
            f"step {rows[-1][0]}/{self.max_steps}  {shown}  lr {row.get('optimizer/learning_rate', 0):.2e}  "
            f"{row['time/step_ms']:.0f} ms/step  {work / step_sec:.0f} {unit.replace('_sec', ' s')}/s{memory}  "
            f"eta {duration(eta)}"
        )

    def write(self, step: int, row: dict) -> None:
        """One row of metrics.jsonl, its scalars in TensorBoard."""
        if self.is_main:
            self.file.write(json.dumps({"step": step, **row}) + "\n")
            self.file.flush()
            self.history.add({"step": step, **row})
            scalars = {name: value for name, value in row.items() if isinstance(value, float)}
            for name, value in scalars.items():
                self.board.add_scalar(name, value, step)
            if self.tracker:
                self.track(scalars, step)

    def track(self, scalars: dict[str, float], step: int) -> None:
        """A tracker that fails, as its server may, ends no run."""
        try:
            self.tracker.log(scalars, step)
        except Exception as error:
            self.say(f"tracker {self.run.config.tracker} failed and gets no more of this run: {one_line(error)}")
            self.tracker = None

    def say(self, line: str) -> None:
        if self.is_main:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    @contextmanager
    def timed(self, name: str, step: int):
        """Around work between two steps: its seconds become time/NAME_sec."""
        began = time.monotonic()
        yield
        self.write(step, {f"time/{name}_sec": time.monotonic() - began})

    def restart_clock(self) -> None:
        """Waits for all processes, and leaves what they waited for out of the step times."""
        self.run.process.wait()
        self.last_flush = time.monotonic()

    def close(self) -> None:
        if self.bad_clips.count:
            self.say(f"{self.bad_clips.count} bad files were replaced, listed in {self.bad_clips.path}")
        self.bar.close()
        if self.is_main:
            self.file.close()
            self.board.close()
            if self.tracker:
                self.tracker.close()


def duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
