"""The training runs of withheld_encoder.py: each in a process of its own, stopped cleanly, resumed after a kill."""

import json
import os
import shutil
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen

import soundfile
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from withheld_losses import KNOWN  # noqa: E402

import train_encoder  # noqa: E402
from voxtral.audio import SAMPLE_RATE, BadClip, load_segment, read_header  # noqa: E402
from voxtral.checkpoint import atomic_path, write_text  # noqa: E402
from voxtral.config import EncoderConfig, dump_config, load_config  # noqa: E402
from voxtral.degrade import band_limit  # noqa: E402
from voxtral.errors import UserError, one_sentence  # noqa: E402
from voxtral.history import read_metrics  # noqa: E402
from voxtral.processes import StopSignal, training_process  # noqa: E402
from voxtral.quantizer import QuantizationDraws  # noqa: E402
from voxtral.run_folder import differences  # noqa: E402
from voxtral.sources import Clip, DataConfig, SourceConfig, find_clips  # noqa: E402

# What may differ between a run and its continuation.
PLACES = ("output_dir", "resume", "device", "data.data_root", "data.num_workers", "data.sources")
ENCODER = "encoder.safetensors"
N_NAMED = 8  # changed settings in a message, at most


@dataclass
class Run:
    """One row of the ablation with one seed; `quantization`, `known`: see withheld_rows.Row."""

    row: str
    seed: int
    config: EncoderConfig
    quantization: str
    known: str

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

    def metrics(self) -> list[dict]:
        """Rows of its metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        return read_metrics(path) if path.is_file() else []

    def step_ms(self) -> float:
        """Median over the second half, in which all losses are at work."""
        times = [row["time/step_ms"] for row in self.metrics() if "time/step_ms" in row]
        return statistics.median(times[len(times) // 2 :])

    def curve(self) -> list[list[float]]:
        """[step, mel distance of the validation clips] of every validation."""
        name = "validation/mel_distance"
        return [[row["step"], row[name]] for row in self.metrics() if name in row]

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


# ---------------------------------------------------------------- the process of a run


def main() -> None:
    """CONFIG QUANTIZATION KNOWN: trains to the end or to a SIGTERM, from where the run was.

    Of a finished run the last average of the weights is kept: `best` is chosen by the mel distance, and may have heard
    less audio than the encoders that it is compared with.
    """
    config_path, quantization, known = sys.argv[1:]
    threading.Thread(target=stop_with_parent, daemon=True).start()
    train_encoder.plot_run = lambda *_: None  # seconds at every validation; metrics.jsonl has all that they show
    if quantization == "always":
        QuantizationDraws.sample = staticmethod(always_quantized)
    train_encoder.CodeMatching = KNOWN[known]
    with one_sentence():
        config = load_config(EncoderConfig, config_path, [])
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


def always_quantized(seed: int, batch_size: int, acoustic_dim: int, n_frames: int, device, *_) -> QuantizationDraws:
    """In the place of QuantizationDraws.sample: 0 is on the quantized side of every choice."""
    return QuantizationDraws(
        torch.zeros(batch_size, device=device),
        torch.zeros(batch_size, device=device),
        torch.zeros(batch_size, acoustic_dim, n_frames, device=device),
    )


def train_until(run: Run, deadline: float, stop: StopSignal, gpu: int) -> int:
    """Trains `run` on the GPU of this number in a process that sees no other, and is told to save and stop at
    `deadline` or with `stop`; -> its exit code."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = {"CUDA_VISIBLE_DEVICES": visible.split(",")[gpu] if visible else str(gpu)}
    run.folder.mkdir(parents=True, exist_ok=True)
    dump_config(run.config, run.folder / "run.yaml")
    with (run.folder / "log.txt").open("ab") as log:
        child = Popen(
            [sys.executable, __file__, str(run.folder / "run.yaml"), run.quantization, run.known],
            env=os.environ | seen,
            stdin=PIPE,
            stdout=log,
            stderr=STDOUT,
        )
    told = False
    while child.poll() is None:
        time.sleep(0.2)
        if not told and (stop.received or time.monotonic() > deadline):
            told = True
            child.terminate()
    return child.returncode


# ---------------------------------------------------------------- other speech, other encoders


def band_limited(data: DataConfig, folder: Path) -> DataConfig:
    """`data` with all that is trained on cut at 8 kHz: copies in `folder`, written once. Held-out clips stay as they
    are. The copies have 24 kHz, so that every crop is the one that the other rows train on.
    """

    def copied(clips: list[Clip], name: str) -> list[Clip]:
        paths = [Path(clip.path) for clip in clips]
        copies = {
            i: folder / name / f"{i:06d}_{path.stem}.flac"
            for i, path in enumerate(paths)
            if clips[i].speaker not in data.validation.speakers and can_be_read(str(path))
        }
        with ThreadPool(os.cpu_count()) as pool:
            pool.starmap(copy_band_limited, [(paths[i], copy) for i, copy in copies.items() if not copy.exists()])
        return [replace(clip, path=str(copies.get(i, clip.path))) for i, clip in enumerate(clips)]

    return rewritten(data, folder, copied)


def can_be_read(path: str) -> bool:
    try:
        return bool(read_header(path))
    except BadClip:
        return False


def thinned(data: DataConfig, folder: Path, keep_every: int) -> DataConfig:
    """`data` with so few of the clips that are trained on, spread over all speakers; held-out ones stay."""

    def fewer(clips: list[Clip], _: str) -> list[Clip]:
        trained = [clip for clip in clips if clip.speaker not in data.validation.speakers]
        kept = set(sorted(trained, key=lambda clip: clip.speaker)[::keep_every])
        return [clip for clip in clips if clip in kept or clip.speaker in data.validation.speakers]

    return rewritten(data, folder, fewer)


def rewritten(data: DataConfig, folder: Path, change: Callable[[list[Clip], str], list[Clip]]) -> DataConfig:
    """`data` with `change(clips of a source, its name)` in the place of every source, as manifests in `folder`."""
    sources = []
    for clips in find_clips(data)[0]:
        name = f"source_{clips[0].source}"
        rows = [
            {"path": str(Path(clip.path).absolute()), "speaker": clip.speaker, "text": clip.text}
            for clip in change(clips, name)
        ]
        manifest = (folder / f"{name}.jsonl").absolute()
        write_text(manifest, "".join(json.dumps(row) + "\n" for row in rows))
        weight = data.sources[clips[0].source].weight
        sources.append(SourceConfig(kind="manifest", path=str(manifest), weight=weight))
    return replace(data, sources=sources)


def with_layers(checkpoint: str, layers: str, output: Path) -> str:
    """A checkpoint folder in OUTPUT of other layers in the encoder's stages: links, and its own params.json."""
    folder = output / f"layers_{layers.replace(',', '_')}"
    params = json.loads((Path(checkpoint) / "params.json").read_text())
    params["multimodal"]["audio_tokenizer_args"]["encoder_transformer_lengths_str"] = layers
    write_text(folder / "params.json", json.dumps(params, indent=2))
    for path in Path(checkpoint).absolute().iterdir():
        if path.name != "params.json":
            (folder / path.name).unlink(missing_ok=True)
            (folder / path.name).symlink_to(path)
    return str(folder)


def copy_band_limited(source: Path, target: Path) -> None:
    """The whole clip through 16 kHz, as FLAC of 24 kHz and 24 bits."""
    seconds = read_header(str(source)).seconds
    limited = band_limit(torch.from_numpy(load_segment(str(source), 0.0, seconds)[0]))
    with atomic_path(target) as temporary:
        soundfile.write(
            temporary,
            (limited / limited.abs().max().clamp(min=1)).numpy(),
            SAMPLE_RATE,
            format="FLAC",
            subtype="PCM_24",
        )


if __name__ == "__main__":
    main()
