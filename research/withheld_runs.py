"""The rows of withheld_encoder.py, and their training runs: each in a process of its own, resumed after a kill."""

import os
import shutil
import signal
import statistics
import sys
import threading
import time
from dataclasses import dataclass, fields
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen

sys.path.insert(0, str(Path(__file__).parents[1]))
import train_encoder
from voxtral.config import EncoderConfig, StandinConfig, check_encoder_config, dump_config, load_config
from voxtral.errors import UserError, one_sentence
from voxtral.history import metric_rows
from voxtral.processes import StopSignal, training_process
from voxtral.run_folder import differences

# What may differ between a run and its continuation.
PLACES = ("output_dir", "resume", "device", "data.data_root", "data.num_workers", "data.sources")
ENCODER = "encoder.safetensors"
N_NAMED = 8  # changed settings in a message, at most
TRUE_CHECKPOINT = "true_checkpoint"  # in OUTPUT: the stand-in with its true encoder, from which rows may start
KNOWN_CODES = "known_codes"  # in OUTPUT: codes of the preset voices, for loss.match


@dataclass
class Run:
    """One row of the ablation with one seed."""

    row: str
    seed: int
    config: EncoderConfig

    @property
    def name(self) -> str:
        return f"{self.row}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def encoder(self) -> Path:
        """There when the run is finished, and only then."""
        return self.folder / ENCODER

    def step_ms(self) -> float:
        """Median over the second half, in which all losses are at work."""
        rows = list(metric_rows(self.folder / "metrics.jsonl"))
        times = [row["time/step_ms"] for row in rows if "time/step_ms" in row]
        return statistics.median(times[len(times) // 2 :])

    def last_words(self) -> str:
        """The end of its log: why it ended."""
        log = self.folder / "log.txt"
        lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


def check_continues(run: Run) -> None:
    """Raises UserError if the run's folder holds one with other settings."""
    path = run.folder / "config.yaml"
    if path.is_file():
        changed = [
            f"{key} {before} against {now}"
            for key, before, now in differences(load_config(EncoderConfig, path, []), run.config)
            if key not in PLACES
        ]
        if changed:
            raise UserError(
                f"{run.folder} was trained with other settings ({'; '.join(changed[:N_NAMED])}): choose "
                "another --output, or delete that folder."
            )


# ---------------------------------------------------------------- rows


PAPER = "loss.l1=1 loss.stft=1 loss.mel=0 loss.feature=1 loss.asr=1 loss.match=0 loss.commit=0.1"
# Name -> its changes to the paper's losses.
ROWS = {
    "paper": "",
    "paper_without_whisper": "loss.asr=0",
    "paper+mel": "loss.mel=1",
    "paper+commit": "loss.commit=1",
    "paper_from_true": "",  # starts at the withheld encoder: does training keep it?
    "paper+mel+match": "loss.mel=1 loss.match=0.3 loss.commit=1",
    "mel+match": "loss.mel=1 loss.match=0.3 loss.commit=1 loss.feature=0 loss.asr=0",
}
FROM_TRUE = "paper_from_true"


def schedule(steps: int) -> list[str]:
    """What configs state in steps, as shares of a run, so that rows compare at any length: five validations, two saves,
    an average of the weights that reaches back over a tenth of the run."""

    def share(parts: int) -> int:
        return -(-steps // parts)

    return [
        "train.trainable=[encoder]",
        f"train.ema_decay={max(0.0, 1 - 10 / steps)}",
        "train.n_samples=0",
        f"train.log_every_steps={min(10, share(5))}",
        f"train.validate_every_steps={share(5)}",
        f"train.save_every_steps={share(2)}",
        "train.keep_last=1",
        f"optimizer.warmup_steps={steps // 20}",
        f"discriminator.warmup_steps={steps // 8}",
    ]


def make_run(options, row: str, seed: int) -> Run:
    """The run and its config. Raises UserError, also where its folder holds a run with other settings."""
    # A stand-in's config will do: it names the speakers that the stand-in has not heard.
    changes = [*schedule(options.steps), *options.overrides, *PAPER.split(), *ROWS[row].split()]
    loaded = load_config(StandinConfig, options.data, changes)
    config = EncoderConfig(**{field.name: getattr(loaded, field.name) for field in fields(EncoderConfig)})
    config.checkpoint = str(options.output / TRUE_CHECKPOINT) if row == FROM_TRUE else options.standin
    config.encoder = "checkpoint" if row == FROM_TRUE else None
    config.output_dir, config.resume = str(options.output / f"{row}_seed{seed}"), True
    config.seed, config.train.max_steps = seed, options.steps
    config.match.codes = str(options.output / KNOWN_CODES)
    check_encoder_config(config)
    if not config.data.validation.speakers:
        raise UserError(
            f"{options.data}: data.validation.speakers is empty; name the speakers that neither the "
            "stand-in nor the encoders are trained on."
        )
    run = Run(row, seed, config)
    check_continues(run)
    return run


# ---------------------------------------------------------------- the process of a run


def main() -> None:
    """CONFIG: trains to the end or to a SIGTERM, from where the run was.

    Of a finished run the last average of the weights is kept: `best` is chosen by the mel distance, and may have heard
    less audio than the encoders that it is compared with.
    """
    threading.Thread(target=stop_with_parent, daemon=True).start()
    with one_sentence():
        config = load_config(EncoderConfig, sys.argv[1], [])
        with training_process(config.device) as process:
            train_encoder.train(config, process)
    folder = Path(config.output_dir)
    last = folder / "checkpoints" / f"step_{config.train.max_steps:08d}"
    if last.is_dir():
        os.replace(last / "encoder.safetensors", folder / ENCODER)
        for name in ("checkpoints", "best"):
            shutil.rmtree(folder / name)


def stop_with_parent() -> None:
    """A benchmark that is killed leaves no training behind: its end of this pipe closes. Not sys.stdin.read(): that
    holds a lock, for which a loader process would wait for ever, since it closes sys.stdin when it is forked."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def train_until(run: Run, deadline: float, stop: StopSignal, gpu: int) -> int:
    """Trains `run` on the GPU of this number in a process that sees no other, and is told to save and stop at
    `deadline` or with `stop`; -> its exit code."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = {"CUDA_VISIBLE_DEVICES": visible.split(",")[gpu] if visible else str(gpu)}
    run.folder.mkdir(parents=True, exist_ok=True)
    dump_config(run.config, run.folder / "run.yaml")
    with (run.folder / "log.txt").open("ab") as log:
        child = Popen(
            [sys.executable, __file__, str(run.folder / "run.yaml")],
            env=os.environ | seen,
            stdin=PIPE,
            stdout=log,
            stderr=STDOUT,
        )
    terminated = False
    while child.poll() is None:
        time.sleep(0.2)
        if not terminated and (stop.received or time.monotonic() > deadline):
            terminated = True
            child.terminate()
    return child.returncode


if __name__ == "__main__":
    main()
