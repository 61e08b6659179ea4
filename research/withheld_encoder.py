"""The withheld-encoder benchmark: which part of the recipe brings an encoder closer to the true one, and at what cost?

A stand-in checkpoint (make_standin.py) has a true encoder that we know and withhold. Every row of the ablation trains
an encoder against that stand-in, from the same random start, on the same crops in the same order, once per seed, by
train_encoder.py's own loop. Then it is measured as evaluate.py measures, on speakers that neither it nor the stand-in
has heard. What counts is how many codes equal the true encoder's: codes are what the language model sees.

Each run is a process of its own, one on each GPU at a time. It survives a kill: --resume goes on with it, and skips
what is finished. OUTPUT gets results.json and table.md, new after every run, and a folder per run with its encoder, log
and metrics.
"""

import json
import math
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(folder) for folder in list(Path(__file__).parents)[:2]]
from withheld_data import training_clips, unseen_clips, withheld_parser
from withheld_runs import KNOWN_CODES, PAPER, ROWS, TRUE_CHECKPOINT, Run, make_run, train_until

from evaluate import summaries
from voxtral.checkpoint import SafetensorsFile, write_text
from voxtral.clips import resynthesize
from voxtral.codec import VoxtralCodec
from voxtral.command_line import check_options
from voxtral.config import StandinConfig, load_config
from voxtral.data import SAMPLE_RATE
from voxtral.errors import UserError, one_sentence
from voxtral.evaluation import (
    METRICS,
    Agreement,
    Averages,
    all_codes,
    fresh_encoder,
    gap_closed,
    load_samples,
    measure_clips,
)
from voxtral.evaluation_report import arrow, markdown, number
from voxtral.inject import inject
from voxtral.json_files import finite, write_json
from voxtral.processes import StopSignal, start_process
from voxtral.run import duration
from voxtral.run_folder import environment
from voxtral.scores import Scorer, check_scores, not_measured
from voxtral.sources import DataConfig

COLUMNS = {
    "mel": "mel",
    "stft": "STFT",
    "estoi": "ESTOI",
    "wer": "WER",
    "semantic_equal": "semantic equal",
    "levels_equal": "levels equal",
    "levels_within_1": "levels within one",
    "semantic_used": "codes used",
    "extremes_share": "extremes",
    "embedding_cosine": "voice cosine",
}
STEP_MS = "ms per step"
SOUND = ("mel", "stft", "estoi", "wer")


def write_known_codes(options, data: DataConfig, device) -> None:
    """What the true encoder makes of the training speech of the preset voices (of all voices, if the config names no
    presets), written once: codes as a language model of this codec would speak them."""
    folder = options.output / KNOWN_CODES
    if not (folder / "manifest.jsonl").is_file():
        presets = load_config(StandinConfig, options.data, options.overrides).standin.voices.values()
        clips = [clip for clip in training_clips(data) if not presets or clip.speaker in presets]
        codec = VoxtralCodec.from_checkpoint(options.standin)
        codec.load_encoder(SafetensorsFile(options.withheld).read(), options.withheld)
        resynthesize(codec.to(device), clips, folder, options.max_sec)


# ---------------------------------------------------------------- measuring


class Judge:
    """Measures encoders of one stand-in on the same clips, against its true one."""

    def __init__(self, options, data: DataConfig, device):
        self.samples, self.bad = load_samples(unseen_clips(options, data), options.max_sec)
        self.settings = {name: str(getattr(options, name)) for name in ("withheld", "metrics", "whisper", "max_sec")}
        self.settings["clips"] = [sample.clip.path for sample in self.samples]
        self.codec = VoxtralCodec.from_checkpoint(options.standin)
        fresh = fresh_encoder(self.codec, options.seeds[0])
        self.codec.to(device).requires_grad_(False)
        self.scorer = Scorer(options.metrics, SAMPLE_RATE, device, options.whisper)
        self.sources = [self.scorer.listen(sample.waveform) for sample in self.samples]
        self.agreement, self.expected = Agreement(self.codec), None
        self.averages = Averages([sample.speaker for sample in self.samples], seed=0)
        began = time.monotonic()
        self.true = self.measure(SafetensorsFile(options.withheld).read(), options.withheld)
        self.seconds = time.monotonic() - began  # an encoder
        self.untrained = self.measure(fresh, "a fresh encoder")

    def measure(self, tensors: dict[str, torch.Tensor], where) -> dict:
        """An encoder -> {"metrics": name -> {value, interval, clips}, "codes": of all clips together}"""
        self.codec.load_encoder(tensors, where)
        measured = measure_clips(self.codec, self.samples, self.sources, self.scorer, self.agreement, self.expected)
        rows, clips = zip(*((row, clip) for row, clip, _ in measured))
        self.expected = self.expected or clips  # the true encoder comes first
        metrics = summaries({"": rows}, self.averages)[0][""]["metrics"]
        return {"metrics": metrics, "codes": all_codes(self.codec, clips)}

    def of_run(self, run: Run) -> dict:
        """As `measure`; kept beside the encoder, and measured anew only with other clips or metrics."""
        path = run.folder / "measured.json"
        kept = json.loads(path.read_text()) if path.is_file() else {"settings": None}
        if kept.pop("settings") == self.settings:
            return kept
        measured = self.measure(SafetensorsFile(run.encoder).read(), run.encoder)
        write_text(path, json.dumps(finite({"settings": self.settings} | measured)) + "\n")
        return measured


def numbers_of(measured: dict) -> dict[str, float]:
    """COLUMNS of what Judge.measure gave."""
    values = {name: summary["value"] for name, summary in measured["metrics"].items()} | measured["codes"]
    return {name: math.nan if values[name] is None else values[name] for name in COLUMNS if name in values}


# ---------------------------------------------------------------- from runs to a table


def results_of(runs: list[Run], judge: Judge) -> dict[str, dict]:
    """Row -> {"seeds": finished runs by seed, "values" and "gap_closed": mean and deviation over them by column}."""
    true, untrained = numbers_of(judge.true), numbers_of(judge.untrained)
    rows = {row: {"changes": ROWS[row], "seeds": {}} for row in ROWS if any(run.row == row for run in runs)}
    for run in runs:
        if run.encoder.exists():
            measured = judge.of_run(run)
            values = numbers_of(measured)
            gaps = {name: float(gap_closed(untrained[name], value, true[name])) for name, value in values.items()}
            values[STEP_MS] = run.step_ms()
            rows[run.row]["seeds"][run.seed] = measured | {"values": values, "gap_closed": gaps}
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


def cell(summary: dict, gap: dict | None = None) -> str:
    """mean ± deviation (share of the gap closed)"""
    if math.isnan(summary["mean"]):
        return ""
    text = f"{summary['mean']:.4g}"
    if summary["deviation"] is not None:
        text += f" ± {summary['deviation']:.2g}"
    return text + (f" ({round(100 * gap['mean'])} %)" if gap and not math.isnan(gap["mean"]) else "")


def table(report: dict) -> str:
    """The content of results.json as Markdown."""
    columns = list(report["true"])
    header = ["encoder", "seeds", *(COLUMNS[name] + arrow(name) for name in columns), STEP_MS + " ↓"]
    lines = [
        [name, "", *(number(float(report[name][column])) for column in columns), ""] for name in ("untrained", "true")
    ]
    for name, row in report["rows"].items():
        if row["seeds"]:
            cells = [cell(row["values"][column], row["gap_closed"].get(column)) for column in [*columns, STEP_MS]]
            lines.append([name, str(len(row["seeds"])), *cells])
    parts = [
        f"{report['steps']} steps, {report['audio_hours']:.2f} h of audio in each run. Measured on "
        f"{report['clips']} clips of {report['speakers']} speakers never heard. {report['device']}.\n",
        markdown(header, lines),
        "Mean ± deviation over the seeds; in brackets the share of the gap between the untrained and the true "
        "encoder that is closed.\n",
    ]
    for key in ("not_finished", "not_measured", "definitions"):
        if report[key]:
            title = key.replace("_", " ").capitalize()
            parts.append(f"## {title}\n\n" + "".join(f"- {name}: {text}\n" for name, text in report[key].items()))
    return "\n".join(parts)


def write_results(options, runs: list[Run], judge: Judge, failed: dict[str, str], about: dict) -> str:
    """Writes results.json and table.md; -> the table."""
    waiting = {run.name: "not trained to its end yet" for run in runs if not run.encoder.exists()}
    definitions = {name: METRICS[name].definition for name in judge.true["metrics"]}
    definitions["semantic_used"] = "distinct semantic codes of all clips together"
    report = about | {
        "true": numbers_of(judge.true),
        "untrained": numbers_of(judge.untrained),
        "rows": results_of(runs, judge),
        "not_finished": waiting | failed,
        "not_measured": not_measured(options.metrics),
        "definitions": definitions,
    }
    text = table(report)
    write_json(options.output / "results.json", report)
    write_text(options.output / "table.md", text)
    return text


# ---------------------------------------------------------------- the benchmark


def benchmark(options) -> None:
    started = time.monotonic()
    deadline = math.inf if options.minutes is None else started + 60 * options.minutes

    # ---- 1. the runs: every row with the first seed, then with the second, ... ----
    if not options.resume and list(options.output.glob("*_seed*")):
        raise UserError(f"{options.output} already holds a benchmark: go on with --resume, or choose another --output.")
    runs = [make_run(options, row, seed) for seed in options.seeds for row in options.rows]
    config = runs[0].config  # all have the same speech and batches
    waiting = [run for run in runs if not run.encoder.exists()]

    # ---- 2. the true and the untrained encoder ----
    process = start_process(config.device)
    judge = Judge(options, config.data, process.device)
    options.output.mkdir(parents=True, exist_ok=True)
    true_checkpoint = options.output / TRUE_CHECKPOINT
    if not true_checkpoint.is_dir() and any(run.config.checkpoint == str(true_checkpoint) for run in runs):
        inject(options.standin, options.withheld, output=true_checkpoint)
    if any(run.config.loss.match for run in runs):
        write_known_codes(options, config.data, process.device)
    about = environment(process) | {
        "steps": options.steps,
        "audio_hours": options.steps * config.data.batch_size * config.train.accumulation * config.data.max_sec / 3600,
        "clips": len(judge.samples),
        "speakers": judge.averages.n_speakers,
        "bad_clips": judge.bad,
        "options": {name: str(value) for name, value in vars(options).items()},
    }
    print(
        f"{len(options.rows)} rows × {len(options.seeds)} seeds: {len(runs)} runs of {options.steps} steps, "
        f"{about['audio_hours']:.2f} h of audio each; {len(runs) - len(waiting)} are finished\n"
        f"measured on {about['clips']} clips of {about['speakers']} speakers, {judge.seconds:.1f} s an encoder",
        flush=True,
    )

    # ---- 3. train and measure ----
    stop, failed, took, measuring, left = StopSignal(), {}, {}, threading.Lock(), iter(waiting)
    n_gpus = torch.cuda.device_count() if process.device.type == "cuda" else 1
    at_once = options.at_once or n_gpus

    def work(worker: int) -> None:
        for run in left:  # whoever is free takes the next one
            if stop.received or time.monotonic() + took.get(run.row, 0) + judge.seconds > deadline:
                continue  # a quicker one may still fit
            began = time.monotonic()
            code = train_until(run, deadline, stop, worker % n_gpus)
            ran_sec = time.monotonic() - began
            with measuring:
                if run.encoder.exists():
                    took[run.row] = ran_sec
                    values = numbers_of(judge.of_run(run))
                    shown = "  ".join(f"{COLUMNS[name]} {value:.4g}" for name, value in values.items())
                    print(f"{run.name}: {ran_sec:.0f} s, {run.step_ms():.0f} ms a step  {shown}", flush=True)
                elif code:
                    failed[run.name] = (
                        f"killed by signal {-code}; --resume goes on with it"
                        if code < 0
                        else f"{run.last_words()} ({run.folder}/log.txt)"
                    )
                    print(f"{run.name}: {failed[run.name]}", flush=True)
                write_results(options, runs, judge, failed, about)

    with closing(stop), ThreadPoolExecutor(at_once) as pool:
        list(pool.map(work, range(at_once)))

    # ---- 4. the table ----
    text = write_results(options, runs, judge, failed, about)
    n_left = sum(not run.encoder.exists() for run in runs)
    hint = f"; {n_left} of {len(runs)} runs are not finished: --resume goes on with them" if n_left else ""
    print(f"\n{text}\nwritten to {options.output}/ after {duration(time.monotonic() - started)}{hint}")


# ---------------------------------------------------------------- command line

LISTING = "\n".join(f"  {name:<22}{changes}" for name, changes in ROWS.items())
EXAMPLES = f"""rows, and what they change of the paper's losses ({PAPER}):
{LISTING}

paper_from_true starts at the withheld encoder. Warm-ups and the average's length are shares of --steps; all else is
the config's: batch, crops, learning rate, discriminators. asr.model=FILE is the Whisper of the ASR loss, --whisper the
one that words are counted by, which is what takes long to measure: leave wer out of --metrics in a hurry.

examples:
  # two CPU cores, the embedded stand-in, discriminators cut down: does it run?
  python research/withheld_encoder.py --standin assets/standin --data configs/demo.yaml \\
      --withheld assets/standin_withheld_encoder.safetensors --rows paper_without_whisper,mel+match --seeds 0 \\
      --steps 50 --metrics mel,stft discriminator.channels=4 discriminator.crop_sec=0.25

  # a GPU: a mid-size stand-in, then what ten minutes give, measured on recordings of people
  python make_standin.py --config configs/standin_mid.yaml data.data_root=/my/speech
  python research/withheld_encoder.py --standin runs/standin_mid/released --data configs/standin_mid.yaml \\
      --withheld runs/standin_mid/withheld_encoder.safetensors --eval /my/speech/eval.csv --steps 1000 --minutes 10 \\
      data.data_root=/my/speech
  #    ... what was left out or killed: the same command with --resume
"""


def main(arguments=None) -> None:
    parser = withheld_parser(__doc__, EXAMPLES, n_clips=84, output="runs/withheld_encoder")
    add = parser.add_argument
    add("--steps", metavar="N", type=int, required=True, help="of every run")
    add("--seeds", metavar="N,...", default="0,1,2", help="for a run of each row (default: %(default)s)")
    add("--rows", metavar="NAME,...", default=",".join(ROWS), help="(default: all)")
    add("--resume", action="store_true", help="go on in OUTPUT; finished runs are skipped")
    add("--minutes", metavar="M", type=float, help="stop then; a run that is not ready is saved")
    add("--at-once", metavar="N", type=int, help="runs at a time, each on its GPU (default: one a GPU)")
    add("--metrics", metavar="NAME,...", default=",".join(SOUND), help="scores of evaluate.py (default: %(default)s)")
    add(
        "--whisper", metavar="MODEL", default="base", help="for wer: a name of openai-whisper, or a .pt (default: base)"
    )
    add("--max-sec", type=float, default=20.0, help="longer clips are cut (default: %(default)g)")
    options = parser.parse_intermixed_args(arguments)
    with one_sentence():
        for name in ("rows", "seeds", "metrics"):
            setattr(options, name, list(dict.fromkeys(getattr(options, name).split(","))))
        for name in options.rows:
            if name not in ROWS:
                raise UserError(f"--rows: there is no '{name}', only {', '.join(ROWS)}.")
        for seed in options.seeds:
            if not seed.isdecimal():
                raise UserError(f"--seeds: '{seed}' is no number; write them as 0,1,2.")
        options.seeds = list(map(int, options.seeds))
        check_options(options, False, steps=1, clips=1, at_once=1, minutes=0, max_sec=0.1)
        check_scores(options.metrics)
        benchmark(options)


if __name__ == "__main__":
    main()
