"""Runs of train_encoder.py beside each other: curves of every loss in one plot, the means of each quarter in a table.

To see whether a change that should only make training faster also changes what is learnt: the same seed with and
without it, and another seed, which shows how much is chance.
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from voxtral.command_line import script_parser
from voxtral.errors import UserError, one_sentence
from voxtral.evaluation_report import markdown
from voxtral.history import metric_rows
from voxtral.plots import curves_figure, save_figure

N_PARTS = 4  # of a run, each with a mean of its own


def means(rows: list[dict], name: str) -> list[float]:
    """Of a metric in each quarter of the steps; NaN where it was not logged."""
    last = max(row["step"] for row in rows)
    parts = [[] for _ in range(N_PARTS)]
    for row in rows:
        if name in row:
            parts[(row["step"] - 1) * N_PARTS // last].append(row[name])
    return [statistics.mean(part) if part else float("nan") for part in parts]


def table(runs: dict[str, list[dict]], names: list[str]) -> str:
    lines = [
        [name.removeprefix("loss/"), run, *(f"{value:.4f}" for value in means(rows, name))]
        for name in names
        for run, rows in runs.items()
    ]
    return markdown(["loss", "run", *(f"quarter {i + 1}" for i in range(N_PARTS))], lines)


def main(arguments=None) -> None:
    parser = script_parser(__doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="output_dir of a run")
    parser.add_argument(
        "--output", metavar="PNG", default="runs/loss_curves.png", help="the plot (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    with one_sentence():
        runs = {}
        for folder in options.runs:
            path = folder / "metrics.jsonl"
            runs[folder.name] = list(metric_rows(path)) if path.is_file() else []
            if not runs[folder.name]:
                raise UserError(f"{folder} holds no metrics.jsonl with rows: give the output_dir of a run.")
        names = list(
            dict.fromkeys(name for rows in runs.values() for row in rows for name in row if name.startswith("loss/"))
        )
        save_figure(curves_figure(runs, names, ""), options.output)
        print(f"{table(runs, names)}\n{options.output}")


if __name__ == "__main__":
    main()
