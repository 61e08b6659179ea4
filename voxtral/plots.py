"""Figures: spectrograms of source and reconstruction, curves of a run, histograms of acoustic levels."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from voxtral.losses import magnitude

matplotlib.use("Agg")


def spectrogram_figure(rows: dict[str, Tensor], sampling_rate: int) -> Figure:
    """Log-magnitude spectrograms [T] below each other on one scale; keys are the titles."""
    figure = Figure(figsize=(9, 2.3 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
    images = [
        20 * magnitude(waveform[None, None], 1024)[0].T.clamp(min=1e-4).log10().numpy() for waveform in rows.values()
    ]
    top = max(image.max() for image in images)
    for axis, title, waveform, image in zip(axes, rows, rows.values(), images):
        extent = (0, len(waveform) / sampling_rate, 0, sampling_rate / 2000)
        scale = {"cmap": "magma", "vmin": top - 80, "vmax": top}
        shown = axis.imshow(image, origin="lower", aspect="auto", extent=extent, **scale)
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_ylabel("kHz")
    axes[-1].set_xlabel("seconds")
    figure.colorbar(shown, ax=list(axes), label="dB", shrink=0.8)
    return figure


def curves_figure(runs: dict[str, list[dict]], names: list[str], title: str) -> Figure:
    """One small panel per metric over steps, with a line for every run; names that no row has are left out."""
    names = [name for name in names if any(name in row for rows in runs.values() for row in rows)]
    columns = min(4, len(names))
    figure = Figure(figsize=(3.2 * columns, 2.4 * -(-len(names) // columns)), layout="constrained")
    axes = figure.subplots(-(-len(names) // columns), columns, squeeze=False).ravel()
    for axis, name in zip(axes, names):
        for label, rows in runs.items():
            points = [(row["step"], row[name]) for row in rows if name in row]
            axis.plot(*zip(*points), linewidth=1.2, label=label)
        axis.set_title(name, fontsize=9)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=7)
        axis.locator_params(nbins=4)  # most of the time of a figure goes into its ticks
    for axis in axes[len(names) :]:
        axis.axis("off")
    if len(runs) > 1:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(runs), fontsize=8)
    figure.suptitle(title)
    return figure


def levels_figure(histograms: dict[str, list[float]]) -> Figure:
    """Shares of the acoustic levels 0 ... 20, one line per key: saturation shows as two spikes at the ends."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axis = figure.subplots()
    for name, shares in histograms.items():
        axis.plot(np.arange(len(shares)), shares, marker="o", markersize=3, label=name)
    axis.set_xlabel("acoustic level")
    axis.set_ylabel("share of codes")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def save_figure(figure: Figure, path) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def plot_run(rows: list[dict], folder) -> None:
    """Draws losses.png, codes.png, validation.png and levels.png from the rows of a run's metrics.jsonl."""
    if not rows:
        return
    names = list(dict.fromkeys(name for row in rows for name, value in row.items() if isinstance(value, float)))
    groups = {
        "losses": ("loss/", "grad/"),
        "codes": ("code/",),
        "validation": ("validation/",),
        "speed": ("time/", "optimizer/"),
    }
    for title, prefixes in groups.items():
        chosen = [name for name in names if name.startswith(prefixes)]
        if chosen:
            save_figure(curves_figure({"": rows}, chosen, title), Path(folder) / f"{title}.png")
    histograms = [row for row in rows if "validation/level_histogram" in row]
    if histograms:
        chosen = {f"step {row['step']}": row["validation/level_histogram"] for row in (histograms[0], histograms[-1])}
        save_figure(levels_figure(chosen), Path(folder) / "levels.png")


def layers_figure(rows: list[dict]) -> Figure:
    """Phase 2's validation rows, first and last: distance to the teacher by layer, at each kind of position; solid
    under the encoder's references, dashed under true ones."""
    kinds = ("audio", "text", "generation")
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(2, len(kinds), sharex=True)
    for column, kind in enumerate(kinds):
        for axis, measure, title in (
            (axes[0, column], "normalized", "squared error / variance"),
            (axes[1, column], "cosine", "cosine"),
        ):
            for row, color in ((rows[0], "tab:gray"), (rows[-1], "tab:blue")):
                for prompt, style in (("ours", "-"), ("preset", "--")):
                    values = row[f"validation/{prompt}_{measure}_{kind}_by_layer"]
                    x, label = np.arange(1, len(values) + 1), f"{prompt}, step {row['step']}"
                    axis.plot(x, values, style, color=color, marker=".", label=label)
            axis.set_title(f"{kind}: {title}", fontsize=9)
            axis.grid(alpha=0.3)
        axes[1, column].set_xlabel("layer")
    axes[0, 0].legend(fontsize=7)
    return figure
