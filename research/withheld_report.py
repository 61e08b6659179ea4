"""What withheld_encoder.py measures of its runs, and how it shows it."""

import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
from withheld_runs import Run

from evaluate import summaries
from voxtral.checkpoint import SafetensorsFile, write_text
from voxtral.codec import VoxtralCodec
from voxtral.config import EncoderConfig
from voxtral.data import SAMPLE_RATE, validation_batches
from voxtral.evaluation import Agreement, Averages, Sample, all_codes, fresh_encoder, gap_closed, measure_clips
from voxtral.evaluation_report import arrow, markdown, number
from voxtral.json_files import finite
from voxtral.scores import Scorer
from voxtral.sources import find_clips, split_validation
from voxtral.validation import evaluate_codec

COLUMNS = {
    "mel": "mel",
    "stft": "STFT",
    "estoi": "ESTOI",
    "wer": "WER",
    "semantic_equal": "semantic top-1",
    "levels_equal": "acoustic exact",
    "levels_within_1": "acoustic ±1",
    "semantic_used": "codes used",
    "extremes_share": "extremes",
    "embedding_cosine": "voice cosine",
}
STEP_MS = "ms per step"
SOUND = ("mel", "stft", "estoi", "wer")
SHOWN = ("mel", "estoi", "semantic_equal", "levels_equal", "levels_within_1", "embedding_cosine")  # in rows.png


# ---------------------------------------------------------------- measuring


class Judge:
    """Measures encoders of one stand-in on the same clips, against its true one."""

    def __init__(self, options, samples: list[Sample], config: EncoderConfig, device):
        self.samples = samples
        self.settings = {
            "withheld": options.withheld,
            "metrics": options.metrics,
            "whisper": options.whisper,
            "max_sec": options.max_sec,
            "clips": [sample.clip.path for sample in samples],
        }
        self.codec = VoxtralCodec.from_checkpoint(options.standin)
        fresh = fresh_encoder(self.codec, config.seed)
        self.codec.to(device).requires_grad_(False)
        self.scorer = Scorer(options.metrics, SAMPLE_RATE, device, options.whisper)
        self.sources = [self.scorer.listen(sample.waveform) for sample in samples]
        self.agreement, self.expected = Agreement(self.codec), None
        self.averages = Averages([sample.speaker for sample in samples], seed=0)
        true, started = SafetensorsFile(options.withheld).read(), time.monotonic()
        self.true = self.measure(true, options.withheld)
        self.seconds = time.monotonic() - started  # an encoder
        held_out = split_validation(find_clips(config.data)[0], config.data.validation)[1]
        self.goal = evaluate_codec(self.codec, validation_batches(held_out, config.data))[0]["mel_distance"]
        self.untrained = self.measure(fresh, "a fresh encoder")

    def measure(self, tensors: dict[str, torch.Tensor], where) -> dict:
        """An encoder -> {"metrics": name -> {value, interval, clips}, "codes": of all clips together}"""
        self.codec.load_encoder(tensors, where)
        rows, clips = [], []
        for row, clip, _ in measure_clips(
            self.codec, self.samples, self.sources, self.scorer, self.agreement, self.expected
        ):
            rows.append(row)
            clips.append(clip)
        self.expected = self.expected or clips  # the true encoder comes first
        metrics = summaries({"": rows}, self.averages)[0][""]["metrics"]
        return {"metrics": metrics, "codes": all_codes(self.codec, clips)}

    def of_run(self, run: Run) -> dict:
        """As `measure`; kept beside the encoder, and measured anew only with other clips or metrics."""
        path = run.folder / "measured.json"
        if path.is_file():
            kept = json.loads(path.read_text())
            if kept.pop("settings") == self.settings:
                return kept
        measured = self.measure(SafetensorsFile(run.encoder).read(), run.encoder)
        write_text(path, json.dumps(finite({"settings": self.settings} | measured)) + "\n")
        return measured


def numbers_of(measured: dict) -> dict[str, float]:
    """COLUMNS of what Judge.measure gave."""
    values = {name: summary["value"] for name, summary in measured["metrics"].items()} | measured["codes"]
    return {name: math.nan if values[name] is None else values[name] for name in COLUMNS if name in values}


# ---------------------------------------------------------------- from runs to rows


def results_of(runs: list[Run], judge: Judge) -> dict[str, dict]:
    """Row -> {"seeds": finished runs by seed, "values" and "gap_closed": mean and deviation over them by column}."""
    true, untrained = numbers_of(judge.true), numbers_of(judge.untrained)
    rows = {name: {"seeds": {}} for name in dict.fromkeys(run.row for run in runs)}
    for run in runs:
        if run.encoder.exists():
            measured = judge.of_run(run)
            values = numbers_of(measured)
            gaps = {name: float(gap_closed(untrained[name], value, true[name])) for name, value in values.items()}
            rows[run.row]["seeds"][run.seed] = measured | {
                "values": values | {STEP_MS: run.step_ms()},
                "gap_closed": gaps,
                "curve": run.curve(),
            }
    for row in rows.values():
        for key in ("values", "gap_closed"):
            row[key] = spread([seed[key] for seed in row["seeds"].values()])
    return rows


def spread(seeds: list[dict[str, float]]) -> dict[str, dict]:
    """Numbers by column of several seeds -> column -> mean, and sample deviation where there are several."""
    columns = {name: [seed[name] for seed in seeds] for name in (seeds[0] if seeds else {})}
    return {
        name: {"mean": float(np.mean(values)), "deviation": float(np.std(values, ddof=1)) if len(values) > 1 else None}
        for name, values in columns.items()
    }


def change_of(row: dict, before: dict) -> dict[str, dict]:
    """What a row's change does by column: its difference to the row that it changes, over the seeds that both have."""
    pairs = [
        (seed["values"], before["seeds"][number]["values"])
        for number, seed in row["seeds"].items()
        if number in before["seeds"]
    ]
    return spread([{name: after[name] - earlier[name] for name in after} for after, earlier in pairs])


# ---------------------------------------------------------------- showing


def cell(summary: dict, gap: dict | None = None, sign: str = "") -> str:
    """mean ± deviation (share of the gap closed)"""
    if math.isnan(summary["mean"]):
        return ""
    text = f"{summary['mean']:{sign}.4g}"
    if summary["deviation"] is not None:
        text += f" ± {summary['deviation']:.2g}"
    return text + (f" ({round(100 * gap['mean'])} %)" if gap and not math.isnan(gap["mean"]) else "")


def table(report: dict) -> str:
    """The content of results.json as Markdown."""
    rows = {name: row for name, row in report["rows"].items() if row["seeds"]}
    columns = list(report["true"])
    titles = [*(COLUMNS[name] + arrow(name) for name in columns), STEP_MS + " ↓"]
    lines = [
        ["", f"{name} encoder", "", *(number(float(report[name][column])) for column in columns), ""]
        for name in ("untrained", "true")
    ]
    for name, row in rows.items():
        cells = [cell(row["values"][column], row["gap_closed"].get(column)) for column in [*columns, STEP_MS]]
        lines.append([name, row["what"], str(len(row["seeds"])), *cells])
    parts = [
        f"{report['steps']} steps, {report['audio_hours']:.2f} h of audio in each run. Measured on "
        f"{report['clips']} clips of {report['speakers']} speakers never heard. {report['device']}.\n",
        markdown(["row", "", "seeds", *titles], lines),
        "Mean ± deviation over the seeds; in brackets the share of the gap between the untrained and the true "
        "encoder that is closed.\n",
    ]
    changes = {f"{row['of']} → {name}": row for name, row in rows.items() if row["change"]}
    if changes:
        lines = [
            [name, row["what"], *(cell(row["change"][column], sign="+") for column in [*columns, STEP_MS])]
            for name, row in changes.items()
        ]
        parts.append(
            "## What each change does\n\nThe difference of two rows, seed by seed.\n\n"
            + markdown(["rows", "", *titles], lines)
        )
    for key, title in (
        ("not_finished", "Not finished"),
        ("not_measured", "Not measured"),
        ("definitions", "Definitions"),
    ):
        if report[key]:
            parts.append(f"## {title}\n\n" + "".join(f"- {name}: {text}\n" for name, text in report[key].items()))
    return "\n".join(parts)


def curves_figure(rows: dict[str, dict], goal: float) -> Figure:
    """Mel distance of the validation clips against the step: a line per row, the range of its seeds shaded."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    axis = figure.subplots()
    axis.set_prop_cycle(color=colormaps["tab20"].colors)
    for name, row in rows.items():
        curves = [seed["curve"] for seed in row["seeds"].values()]
        if curves:
            steps = [step for step, _ in curves[0]]
            values = np.array([[value for _, value in curve] for curve in curves])  # [seeds, validations]
            (line,) = axis.plot(steps, values.mean(0), marker="o", markersize=3, label=f"{name}: {row['what']}")
            axis.fill_between(steps, values.min(0), values.max(0), alpha=0.15, color=line.get_color())
    axis.axhline(goal, color="black", linewidth=0.8, linestyle="--", label="true encoder")
    axis.set_xlabel("step")
    axis.set_ylabel("mel distance of validation clips")
    axis.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper")
    return figure


def rows_figure(report: dict) -> Figure:
    """A panel per measurement of interest, a line per row, a dot per seed; beside them the untrained encoder's value,
    or, of what measures sound, the true one's."""
    rows = {name: row for name, row in report["rows"].items() if row["seeds"]}
    shown = [name for name in SHOWN if name in report["true"]]
    figure = Figure(figsize=(2.6 * len(shown) + 2.4, 1.2 + 0.26 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for panel, column in zip(panels, shown):
        for i, row in enumerate(rows.values()):
            values = [numbers_of(seed)[column] for seed in row["seeds"].values()]
            panel.plot(values, [i] * len(values), "o", markersize=5, alpha=0.7, color="tab:blue")
        system = "true" if column in SOUND else "untrained"
        panel.axvline(report[system][column], color="black", linewidth=0.8, linestyle="--" if system == "true" else ":")
        panel.set_title(
            f"{COLUMNS[column]}{arrow(column)}\n({system} encoder: {number(float(report[system][column]))})", fontsize=9
        )
        panel.grid(alpha=0.3)
    panels[0].set_yticks(range(len(rows)), [f"{name}: {row['what']}" for name, row in rows.items()], fontsize=8)
    panels[0].invert_yaxis()
    return figure
