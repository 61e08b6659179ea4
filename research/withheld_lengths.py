"""What longer training brings: withheld_encoder.py's results for different --steps, in one table and one plot.

    python research/withheld_lengths.py runs/withheld runs/withheld_4 runs/withheld_16 --output lengths.png

The benchmarks must be of one stand-in and measured on the same clips. Rows that only one of them has are points.
"""

import json
import math
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path[:0] = [str(folder) for folder in list(Path(__file__).parents)[:2]]
from withheld_report import COLUMNS, STEP_MS, cell

from voxtral.command_line import script_parser
from voxtral.errors import UserError, one_sentence
from voxtral.evaluation_report import arrow, markdown
from voxtral.plots import save_figure

CODES = ("semantic_equal", "levels_equal", "levels_within_1", "embedding_cosine")


def alike(one: dict[str, float | None], other: dict[str, float | None]) -> bool:
    """The same figures, but for what a GPU's order of additions changes."""
    pairs = [(value, other.get(name)) for name, value in one.items()]
    return one.keys() == other.keys() and all(
        a == b or None not in (a, b) and math.isclose(a, b, rel_tol=1e-6) for a, b in pairs
    )


def table(reports: list[dict]) -> str:
    columns = list(reports[0]["true"])
    lines = [
        [
            name,
            str(report["steps"]),
            f"{report['audio_hours']:.2f}",
            str(len(row["seeds"])),
            *(cell(row["values"][column], row["gap_closed"].get(column)) for column in [*columns, STEP_MS]),
        ]
        for name in reports[0]["names"]
        for report in reports
        if name in report["rows"]
        for row in [report["rows"][name]]
    ]
    return markdown(
        ["row", "steps", "hours heard", "seeds", *(COLUMNS[name] + arrow(name) for name in columns), STEP_MS + " ↓"],
        lines,
    )


def lengths_figure(reports: list[dict]) -> Figure:
    """Agreement of codes, and the mel distance with that of the true encoder, against the audio heard."""
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    axes = figure.subplots(1, len(CODES) + 1)
    for axis, column in zip(axes, (*CODES, "mel")):
        for name in reports[0]["names"]:
            points = [
                (report["audio_hours"], report["rows"][name]["values"][column]["mean"])
                for report in reports
                if name in report["rows"]
            ]
            axis.plot(*zip(*points), marker="o", markersize=4, label=name)
        for system, style in (("untrained", ":"), ("true", "--")):
            if column != "mel" or system == "true":
                axis.axhline(
                    reports[0][system][column], color="black", linewidth=0.8, linestyle=style, label=f"{system} encoder"
                )
        axis.set_xscale("log")
        axis.set_xlabel("hours of audio heard")
        axis.set_title(COLUMNS[column], fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    return figure


def main(arguments=None) -> None:
    parser = script_parser(__doc__)
    parser.add_argument("outputs", metavar="OUTPUT", nargs="+", type=Path, help="--output of a withheld_encoder.py")
    parser.add_argument(
        "--output", metavar="PNG", default="runs/withheld_lengths.png", help="the plot (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    with one_sentence():
        missing = [folder for folder in options.outputs if not (folder / "results.json").is_file()]
        if missing:
            raise UserError(f"{missing[0]}/results.json is missing: give the --output of a withheld_encoder.py.")
        reports = sorted(
            (json.loads((folder / "results.json").read_text()) for folder in options.outputs),
            key=lambda report: report["steps"],
        )
        for report in reports:
            if not alike(report["true"], reports[0]["true"]):
                raise UserError(
                    "The true encoders' figures differ: these are of different stand-ins, or measured on other clips."
                )
            report["rows"] = {name: row for name, row in report["rows"].items() if row["seeds"]}
        reports[0]["names"] = list(dict.fromkeys(name for report in reports for name in report["rows"]))
        save_figure(lengths_figure(reports), options.output)
        print(f"{table(reports)}\n{options.output}")


if __name__ == "__main__":
    main()
