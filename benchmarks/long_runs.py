"""What a long run costs beside its steps: plots after many rows of metrics (`plots`), finding a million clips (`start`).

    python benchmarks/long_runs.py plots --rows 10000 520000
    python benchmarks/long_runs.py start --clips 1000000

Everything is made up in a temporary folder and removed: rows of metrics, or a folder of empty files, which nothing opens.
"""
import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def rows(count: int):
    """`count` rows as train_encoder.py logs them every ten steps, with a validation every hundred of them."""
    losses = ["total", "l1", "stft", "mel", "feature", "asr", "commit", "diversity", "match", "discriminator"]
    for number in range(1, count + 1):
        value = 1 / math.sqrt(number)
        row = {"step": 10 * number, **{f"loss/{name}": value for name in losses}, "grad/encoder": value,
               "grad/discriminator": value, "optimizer/learning_rate": value, "data/bad_clips": 0.0,
               "code/embedding_norm": value, "code/semantic_used": value, "code/semantic_perplexity": value,
               "code/extremes_share": value, "code/level_histogram": [value] * 21, "time/step_ms": value,
               "time/audio_sec_per_sec": value}
        yield row
        if number % 100 == 0:
            measures = ["mel_distance", "stft_distance", "semantic_used", "semantic_perplexity", "extremes_share",
                        "embedding_norm"]
            yield {"step": 10 * number, **{f"validation/{name}": value for name in measures},
                   "validation/level_histogram": [value] * 21}


def time_plots(folder: Path, counts: list[int]) -> None:
    """Seconds of a validation's plots, from all rows of metrics.jsonl (as before) and from the logger's history."""
    from voxtral.history import History, read_metrics
    from voxtral.plots import plot_run
    print(f"{'rows':>8}  {'all rows read and drawn':>24}  {'history drawn':>14}  {'history read at a resume':>25}")
    for count in counts:
        path, history = folder / "metrics.jsonl", History()
        with path.open("w") as file:
            for row in rows(count):
                file.write(json.dumps(row) + "\n")
        took = [timed(lambda: plot_run(read_metrics(path), folder / "plots")),
                timed(lambda: [history.add(row) for row in read_metrics(path)])]
        took.insert(1, min(timed(lambda: plot_run(history.rows, folder / "plots")) for _ in range(2)))
        print(f"{count:>8}  {took[0]:>22.1f} s  {took[1]:>12.1f} s  {took[2]:>23.1f} s", flush=True)


def timed(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("plots",))
    parser.add_argument("--rows", metavar="N", type=int, nargs="+", default=[10_000, 520_000], help="of metrics.jsonl")
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="long_runs_"))
    try:
        time_plots(folder, options.rows)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
