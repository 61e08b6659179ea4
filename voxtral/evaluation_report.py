"""What evaluate.py and evaluate_clones.py write: Markdown tables, a CSV of clips, plots, audio."""

import csv
import io
import math
from pathlib import Path

import soundfile
from matplotlib.figure import Figure
from torch import Tensor

from voxtral.audio import SAMPLE_RATE
from voxtral.checkpoint import write_text
from voxtral.evaluation import METRICS, Sample, VoiceStatistics
from voxtral.plots import save_figure, spectrogram_figure
from voxtral.score_table import Metric

# ---------------------------------------------------------------- text


def number(value) -> str:
    """Four significant digits; empty for None and NaN."""
    if value is None or isinstance(value, float) and math.isnan(value):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def cell(summary: dict | None, scale: float = 1.0) -> str:
    """ "value [low, high]" of {"value", "interval"}, times `scale`."""
    if summary is None or math.isnan(summary["value"]):
        return ""
    value = number(scale * summary["value"])
    if not summary["interval"]:
        return value
    low, high = (number(scale * end) for end in summary["interval"])
    return f"{value} [{low}, {high}]"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def arrow(name: str, metrics: dict[str, Metric] = METRICS) -> str:
    """Which way is better."""
    metric = metrics.get(name)
    return "" if metric is None or metric.higher_is_better is None else " ↑" if metric.higher_is_better else " ↓"


def bullets(title: str, lines: list[str]) -> list[str]:
    """A section with these lines; none without any."""
    return [f"## {title}\n\n" + "".join(f"- {line}\n" for line in lines)] if lines else []


def definitions(report: dict) -> list[str]:
    """The sections on what was not measured, and on what the names mean."""
    not_measured, defined = (
        [f"{name}: {text}" for name, text in report[key].items()] for key in ("not_measured", "definitions")
    )
    return bullets("Not measured", not_measured) + bullets("Definitions", defined)


def table(report: dict) -> str:
    """The content of metrics.json as Markdown."""
    systems, gaps, order = report["systems"], report.get("gap_closed"), report.get("order")
    parts = [f"Clips: {report['clips']}. Speakers: {report['speakers']}. Minutes: {report['seconds'] / 60:.1f}.\n"]
    names = list(dict.fromkeys(name for system in systems.values() for name in system["metrics"]))
    header = ["", *systems, *(["gap closed, %"] if gaps else []), *(["order"] if order else [])]
    rows = []
    for name in names:
        row = [name + arrow(name), *(cell(system["metrics"].get(name)) for system in systems.values())]
        if gaps:
            row.append(cell(gaps[name], 100))
        if order:
            row.append(", ".join(f"{chain}: {verdict}" for chain, verdict in order[name].items()))
        rows.append(row)
    parts.append(markdown(header, rows))
    for key, title in (("codes", "Codes of all clips together"), ("voices", "Voice embeddings, without END_AUDIO")):
        columns = {name: system[key] for name, system in systems.items() if key in system}
        if columns:
            if key == "voices":
                columns["presets"] = report["presets"]
            rows = [
                [name, *(number(values[name]) for values in columns.values())]
                for name, value in next(iter(columns.values())).items()
                if not isinstance(value, list)
            ]
            header = ["", *columns]
            if gaps and key == "codes":
                header.append("gap closed, %")
                rows = [[*row, cell(gaps.get(row[0]), 100)] for row in rows]
            parts.append(f"## {title}\n\n" + markdown(header, rows))
    if report["speakers"] > 1:
        parts.append(
            "In brackets: 95 % intervals, bootstrapped over speakers; there is none for codes in use, whose "
            "number falls when speakers are drawn with repeats.\n"
        )
    left_out = [line for key in ("absent_sources", "bad_clips", "bad_codes") for line in report.get(key, [])]
    parts += [*definitions(report), *bullets("Left out", left_out)]
    return "\n".join(parts)


def write_clips(path, samples: list[Sample], rows: dict[str, list[dict]]) -> None:
    """CSV, one line per clip and system; `rows`: system -> what was measured of each sample."""
    write_rows(
        path,
        [
            {
                "path": sample.clip.path,
                "speaker_name": sample.clip.speaker,
                "seconds": round(len(sample.waveform) / SAMPLE_RATE, 3),
                "native_rate": sample.native_rate,
                "system": system,
            }
            | row
            for system, clips in rows.items()
            for sample, row in zip(samples, clips, strict=True)
        ],
    )


def write_rows(path, rows: list[dict]) -> None:
    """CSV, one line per row; empty where a row has no value or NaN."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {name: "" if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}
        )
    write_text(path, text.getvalue())


# ---------------------------------------------------------------- figures and audio


def scores_figure(systems: dict[str, dict]) -> Figure:
    """One panel per metric, a bar with its interval per system. systems: name -> metric -> {"value", "interval"}."""
    names = list(dict.fromkeys(name for metrics in systems.values() for name in metrics))
    columns = min(4, len(names))
    n_rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.4 * columns, 0.9 + n_rows * (1.0 + 0.24 * len(systems))), layout="constrained")
    axes = figure.subplots(n_rows, columns, squeeze=False).ravel()
    for axis, name in zip(axes, names):
        shown = [(system, metrics[name]) for system, metrics in systems.items() if name in metrics]
        axis.barh([system for system, _ in shown], [summary["value"] for _, summary in shown], color="tab:blue")
        for place, (_, summary) in enumerate(shown):
            if summary["interval"]:
                axis.plot(summary["interval"], [place, place], color="black", linewidth=1.5)
        axis.set_title(name + arrow(name), fontsize=9)
        axis.invert_yaxis()
        axis.grid(alpha=0.3, axis="x")
        axis.tick_params(labelsize=7)
    for axis in axes[len(names) :]:
        axis.axis("off")
    return figure


def clones_figure(systems: dict[str, dict]) -> Figure:
    """How like its own reference and like the others' a clone is, and its word errors. systems: of summarize()."""
    likeness = {"own": ("own reference", "tab:blue"), "others": ("other voices", "tab:gray")}
    panels = [("cosine of speaker embeddings", likeness, 1)]
    if "wer" in next(iter(systems.values())):
        panels.append(("word errors, %", {"wer": ("", "tab:red")}, 100))
    figure = Figure(figsize=(4.5 * len(panels), 1.4 + 0.4 * len(systems)), layout="constrained")
    for axis, (title, shown, scale) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for metric, (label, color) in shown.items():
            for place, metrics in enumerate(systems.values()):
                interval = metrics[metric]["interval"]
                if interval:
                    axis.plot([scale * end for end in interval], [place, place], color=color, linewidth=2, alpha=0.6)
                axis.plot(scale * metrics[metric]["value"], place, "o", color=color, label=None if place else label)
        axis.set_yticks(range(len(systems)), list(systems))
        axis.set_ylim(len(systems) - 0.5, -0.5)
        axis.set_xlim(left=0)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        if len(shown) > 1:
            axis.legend(fontsize=8)
    return figure


def gap_figure(gaps: dict[str, dict]) -> Figure:
    """Share of the gap between the untrained and the reference encoder that is closed, with intervals."""
    shown = {name: gap for name, gap in gaps.items() if not math.isnan(gap["value"])}
    figure = Figure(figsize=(7, 0.9 + 0.26 * len(shown)), layout="constrained")
    axis = figure.subplots()
    for place, gap in enumerate(shown.values()):
        if gap["interval"]:
            axis.plot([100 * end for end in gap["interval"]], [place, place], color="tab:blue", linewidth=2)
        axis.plot(100 * gap["value"], place, "o", color="tab:blue", markersize=5)
    axis.set_yticks(range(len(shown)), list(shown), fontsize=8)
    axis.invert_yaxis()
    for value in (0, 100):  # untrained, reference
        axis.axvline(value, color="black", linewidth=0.8)
    low, high = axis.get_xlim()
    axis.set_xlim(max(low, -100), min(high, 200))  # a gap near zero has no share worth a plot
    axis.set_xlabel("share of the gap closed, % (0: untrained, 100: reference)")
    axis.grid(alpha=0.3)
    return figure


def voices_figure(voices: dict[str, VoiceStatistics], presets: VoiceStatistics) -> Figure:
    """Mean and deviation of every dimension of the voice embeddings against the presets'."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    for axis, title, values in zip(
        figure.subplots(1, 2), ("mean", "deviation"), (lambda v: v.mean, lambda v: v.variance.clamp(min=0).sqrt())
    ):
        x = values(presets).numpy()
        for name, each in voices.items():
            axis.plot(x, values(each).numpy(), ".", markersize=3, alpha=0.5, label=name)
        ends = [x.min(), x.max()]
        axis.plot(ends, ends, color="black", linewidth=0.8)
        axis.set_title(f"{title} of each dimension")
        axis.set_xlabel("presets")
        axis.set_ylabel("clips")
        axis.grid(alpha=0.3)
    axis.legend()
    return figure


def write_listening(folder, samples: list[Sample], audio: dict[str, list[Tensor]]) -> None:
    """wavs and spectrograms of the first clips; audio: system -> what it makes of them, [T] each."""
    for i in range(len(next(iter(audio.values())))):
        versions = {"source": samples[i].waveform} | {name: clips[i] for name, clips in audio.items()}
        for name, waveform in versions.items():
            soundfile.write(Path(folder) / f"clip_{i}_{name}.wav", waveform.clamp(-1, 1).numpy(), SAMPLE_RATE)
        save_figure(spectrogram_figure(versions, SAMPLE_RATE), Path(folder) / f"clip_{i}.png")
