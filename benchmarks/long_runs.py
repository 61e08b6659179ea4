"""What a long run costs beside its steps: plots after many rows of metrics, and finding a million clips.

    python benchmarks/long_runs.py plots --rows 10000 100000 520000
    python benchmarks/long_runs.py start --clips 1000000

Everything is made up in a temporary folder and removed: rows of metrics, or a folder of empty files that
nothing opens (a million of them need a million inodes and 100 MB).
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def rows(count: int):
    """`count` rows as train_encoder.py logs them every ten steps, with a validation every hundred of them."""
    losses = ["total", "l1", "stft", "mel", "feature", "asr", "commit", "match", "discriminator"]
    for number in range(1, count + 1):
        value = 1 / math.sqrt(number)
        row = {
            "step": 10 * number,
            **{f"loss/{name}": value for name in losses},
            "grad/encoder": value,
            "grad/discriminator": value,
            "optimizer/learning_rate": value,
            "data/bad_clips": 0.0,
            "code/embedding_norm": value,
            "code/semantic_used": value,
            "code/semantic_perplexity": value,
            "code/extremes_share": value,
            "code/level_histogram": [value] * 21,
            "time/step_ms": value,
            "time/audio_sec_per_sec": value,
        }
        yield row
        if number % 100 == 0:
            measures = [
                "mel_distance",
                "stft_distance",
                "semantic_used",
                "semantic_perplexity",
                "extremes_share",
                "embedding_norm",
            ]
            yield {
                "step": 10 * number,
                **{f"validation/{name}": value for name in measures},
                "validation/level_histogram": [value] * 21,
            }


def time_plots(folder: Path, counts: list[int]) -> None:
    """Seconds of a core for a validation's plots, of all rows of metrics.jsonl (as before) and of the history."""
    from voxtral.history import History, read_metrics
    from voxtral.plots import plot_run

    print(f"{'rows':>8}  {'all rows read and drawn':>24}  {'history drawn':>14}  {'history read at a resume':>25}")
    for count in counts:
        path, history = folder / "metrics.jsonl", History()
        with path.open("w") as file:
            for row in rows(count):
                file.write(json.dumps(row) + "\n")
        took = [
            timed(lambda: plot_run(read_metrics(path), folder / "plots")),
            timed(lambda: [history.add(row) for row in read_metrics(path)]),
        ]
        took.insert(1, min(timed(lambda: plot_run(history.rows, folder / "plots")) for _ in range(2)))
        print(f"{count:>8}  {took[0]:>22.1f} s  {took[1]:>12.1f} s  {took[2]:>23.1f} s", flush=True)


def timed(work) -> float:
    """Seconds of a core: others may be at work on the machine."""
    began = time.process_time()
    work()
    return time.process_time() - began


# ---------------------------------------------------------------- finding clips

N_SPEAKERS = 1000
START = """
import resource, sys, time
sys.path.insert(0, sys.argv[1])
from voxtral.data import SampleStream
from voxtral.sources import DataConfig, SourceConfig, find_clips, split_validation
try:
    from voxtral.clip_list import Clips
    join, options = Clips.join, {"cache": sys.argv[3]}
except ImportError:  # of a checkout before them
    join, options = lambda lists: [clip for one in lists for clip in one], {}

def megabytes():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1000

config = DataConfig(data_root=sys.argv[2], **options, sources=[
    SourceConfig(kind="folder", path="speech"), SourceConfig(kind="common_voice", path="cv", language="en")])
before, began = megabytes(), time.process_time()
sources, _ = find_clips(config)
found = time.process_time()
train, validation = split_validation(sources, config.validation)
clips = join(train)
SampleStream(clips, config, seed=0)[0]
ended = time.process_time()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
print(f"{len(clips):>10,}  {found - began:>8.1f} s  {ended - found:>8.1f} s  {megabytes() - before:>8.0f} MB  "
      f"{peak - before:>8.0f} MB", flush=True)
"""


def make_up_clips(folder: Path, n_clips: int) -> None:
    """Three quarters of them empty files of a thousand speakers, the others rows of a Common Voice table. They get
    times of an hour ago: what changes while it is looked at is not kept."""
    (folder / "cv" / "en").mkdir(parents=True)
    with (folder / "cv" / "en" / "train.tsv").open("w") as table:
        table.write("client_id\tpath\tsentence\n")
        for number in range(n_clips // 4):
            table.write(f"{number % 5000:0128x}\tcommon_voice_en_{number:08d}.mp3\tThis is sentence {number}.\n")
    for speaker in range(N_SPEAKERS):
        place = folder / "speech" / f"speaker_{speaker:04d}"
        place.mkdir(parents=True)
        for number in range(n_clips * 3 // 4 // N_SPEAKERS):
            (place / f"utterance_{speaker:04d}_{number:06d}.flac").touch()
        os.utime(place, (time.time() - 3600,) * 2)
    for path in (folder / "speech", folder / "cv", folder / "cv" / "en" / "train.tsv"):
        os.utime(path, (time.time() - 3600,) * 2)


def time_start(folder: Path, n_clips: int, checkouts: list[str]) -> None:
    """Seconds of a core and memory of a process that finds, splits and orders the clips, imports apart."""
    free = os.statvfs(folder)
    if free.f_favail < 1.2 * n_clips or free.f_bavail * free.f_frsize < 1000 * n_clips:
        sys.exit(f"{folder} has no room for {n_clips:,} files: set TMPDIR to another disk.")
    make_up_clips(folder, n_clips)
    print(f"{'start':<28}{'clips':>10}  {'found in':>10}  {'split in':>10}  {'memory':>11}  {'at most':>11}")
    for checkout in checkouts:
        for number in (1, 2):
            print(f"{f'{Path(checkout).resolve().name}, start {number}':<28}", end="", flush=True)
            subprocess.run([sys.executable, "-c", START, checkout, str(folder), str(folder / "cache")], check=True)


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("plots", "start"))
    parser.add_argument("--rows", metavar="N", type=int, nargs="+", default=[10_000, 520_000], help="of metrics.jsonl")
    parser.add_argument(
        "--clips", metavar="N", type=int, default=1_000_000, help="files and rows to find (default: a million)"
    )
    parser.add_argument(
        "--code",
        metavar="DIR",
        nargs="+",
        default=[str(Path(__file__).resolve().parents[1])],
        help="checkouts of this project whose search is timed (default: this one)",
    )
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="long_runs_"))
    try:
        if options.what == "plots":
            time_plots(folder, options.rows)
        else:
            time_start(folder, options.clips, options.code)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
