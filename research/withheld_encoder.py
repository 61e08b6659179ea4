"""The withheld-encoder benchmark: which part of the recipe brings an encoder closer to the true one, and at what cost?

A stand-in checkpoint (make_standin.py) has a true encoder that we know and withhold. Every row of the ablation trains
an encoder against that stand-in, from the same random start, on the same crops in the same order, once per seed, by
train_encoder.py's own loop. Then it is measured as evaluate.py measures, on speakers that neither it nor the stand-in
has heard. What counts is how many codes equal the true encoder's: codes are what the language model sees.

Each run is a process of its own, one on each GPU at a time. It survives a kill: --resume goes on with it, and skips
what is finished. OUTPUT gets results.json, table.md, rows.png and curves.png, new after every run, and a folder per run
with its encoder, log and metrics.
"""

import json
import math
import shutil
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path

import torch

sys.path[:0] = [str(folder) for folder in list(Path(__file__).parents)[:2]]
from withheld_report import COLUMNS, SOUND, Judge, change_of, curves_figure, numbers_of, results_of, rows_figure, table
from withheld_runs import KNOWN_CODES, ROWS, TRUE_CHECKPOINT, Run, changes_of, check_continues, make_run, train_until

from evaluate import choose_clips
from voxtral.checkpoint import SafetensorsFile, write_text
from voxtral.clips import resynthesize
from voxtral.codec import VoxtralCodec
from voxtral.command_line import script_parser
from voxtral.config import StandinConfig, load_config
from voxtral.errors import UserError, one_sentence
from voxtral.evaluation import METRICS, load_samples
from voxtral.inject import inject
from voxtral.json_files import finite
from voxtral.plots import save_figure
from voxtral.processes import StopSignal, start_process
from voxtral.run import duration
from voxtral.run_folder import environment
from voxtral.scores import check_scores, not_measured
from voxtral.sources import Clip, DataConfig, SourceConfig, find_clips, split_validation

PROBE_STEPS = 30
N_NAMED = 8  # speakers in a message, at most


def training_clips(data: DataConfig) -> list[Clip]:
    """All that is trained on."""
    return [clip for source in split_validation(find_clips(data)[0], data.validation)[0] for clip in source]


def write_known_codes(options, data: DataConfig, device) -> None:
    """What the true encoder makes of the training speech of the preset voices (of all voices, if the config names no
    presets), written once: codes as a language model of this codec would speak them."""
    folder = options.output / KNOWN_CODES
    if not (folder / "manifest.jsonl").is_file():
        presets = load_config(StandinConfig, options.data, options.overrides).standin.voices.values()
        clips = training_clips(data)
        codec = VoxtralCodec.from_checkpoint(options.standin)
        codec.load_encoder(SafetensorsFile(options.withheld).read(), options.withheld)
        resynthesize(
            codec.to(device),
            [clip for clip in clips if not presets or clip.speaker in presets],
            folder,
            options.max_sec,
        )


def unseen_clips(options, data: DataConfig) -> list[Clip]:
    """The clips to measure on, of as many speakers as possible. Raises UserError where training hears a speaker."""
    sources = find_clips(data)[0]
    if not options.eval:
        clips = [clip for source in sources for clip in source if clip.speaker in data.validation.speakers]
    elif Path(options.eval).suffix in (".csv", ".tsv", ".jsonl"):
        manifest = Path(options.eval)
        source = SourceConfig(kind="manifest", path=manifest.name)
        clips = find_clips(DataConfig(data_root=str(manifest.parent), sources=[source]))[0][0]
    else:
        clips = choose_clips(options.eval, [], everything=True)[0]
    trained = {clip.speaker for source in split_validation(sources, data.validation)[0] for clip in source}
    heard = sorted({clip.speaker for clip in clips} & trained)
    if heard:
        raise UserError(
            f"--eval {options.eval}: the encoders are trained on {', '.join(heard[:N_NAMED])}; measure on "
            "speakers that they never hear."
        )
    by_speaker = defaultdict(list)
    for clip in clips:
        by_speaker[clip.source, clip.speaker].append(clip)
    turns = zip_longest(*by_speaker.values())  # the first clip of every speaker, then the second, ...
    return [clip for turn in turns for clip in turn if clip][: options.clips]


# ---------------------------------------------------------------- the benchmark


def benchmark(options) -> None:
    started = time.monotonic()
    deadline = started + 60 * options.minutes

    # ---- 1. the runs: every row with the first seed, then with the second, ... ----
    if not options.resume and list(options.output.glob("*_seed*")):
        raise UserError(f"{options.output} already holds a benchmark: go on with --resume, or choose another --output.")
    runs = [
        make_run(options, row, seed, options.steps, options.output / f"{row}_seed{seed}")
        for seed in options.seeds
        for row in options.rows
    ]
    for run in runs:
        check_continues(run)
    native = make_run(options, "reconstruction", options.seeds[0], options.steps, options.output).config
    samples, bad = load_samples(unseen_clips(options, native.data), options.max_sec)

    # ---- 2. the true and the untrained encoder ----
    options.output.mkdir(parents=True, exist_ok=True)
    true_checkpoint = options.output / TRUE_CHECKPOINT
    if not true_checkpoint.is_dir() and any(run.config.checkpoint == str(true_checkpoint) for run in runs):
        inject(options.standin, options.withheld, output=true_checkpoint)
    process = start_process(native.device)
    if any(run.config.loss.match for run in runs):
        write_known_codes(options, native.data, process.device)
    judge = Judge(options, samples, native, process.device)
    audio_sec = options.steps * native.data.batch_size * native.train.accumulation * native.data.max_sec
    about = environment(process) | {
        "steps": options.steps,
        "audio_hours": audio_sec / 3600,
        "clips": len(samples),
        "speakers": judge.averages.n_speakers,
        "bad_clips": bad,
        "options": {name: str(value) for name, value in vars(options).items()},
    }

    # ---- 3. the plan ----
    stop, failed = StopSignal(), {}
    n_gpus = torch.cuda.device_count() if process.device.type == "cuda" else 1
    at_once = options.at_once or n_gpus
    waiting = [run for run in runs if not run.encoder.exists()]
    print(
        f"{len(options.rows)} rows × {len(options.seeds)} seeds: {len(runs)} runs of {options.steps} steps, "
        f"{audio_sec / 3600:.2f} h of audio each; {len(runs) - len(waiting)} are finished"
    )
    for name in options.rows:
        print(f"  {name:<16}{ROWS[name].what}: {f'{ROWS[name].of} {ROWS[name].changes}'.strip()}")
    print(f"measured on {len(samples)} clips of {judge.averages.n_speakers} speakers, {judge.seconds:.1f} s an encoder")
    run_sec = probe(options, waiting, deadline, stop) if waiting and time.monotonic() < deadline else 0.0
    if run_sec:
        limit = f" of {duration(60 * options.minutes)}" if options.minutes < math.inf else ""
        print(
            f"estimate: {duration(len(waiting) * (run_sec + judge.seconds) / at_once)} for {len(waiting)} runs, "
            f"{at_once} at a time, if all were as slow as this row; "
            f"{duration(time.monotonic() - started)}{limit} are gone",
            flush=True,
        )

    # ---- 4. train and measure ----
    took, measuring, left = {}, threading.Lock(), iter(waiting)

    def work(worker: int) -> None:
        for run in left:  # whoever is free takes the next one
            expected_sec = took.get(run.row, run_sec) + judge.seconds
            if stop.received or time.monotonic() + expected_sec > deadline:
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

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(work, range(at_once)))

    # ---- 5. the table ----
    text = write_results(options, runs, judge, failed, about)
    n_left = sum(not run.encoder.exists() for run in runs)
    hint = f"; {n_left} of {len(runs)} runs are not finished: --resume goes on with them" if n_left else ""
    print(f"\n{text}\nwritten to {options.output}/ after {duration(time.monotonic() - started)}{hint}")


def probe(options, waiting: list[Run], deadline: float, stop: StopSignal) -> float:
    """Seconds that the run with most losses will take, from a short one; 0 if there was no time. Raises UserError if it
    fails."""
    slowest = max(waiting, key=lambda run: sum(map(bool, vars(run.config.loss).values())))
    folder = options.output / "probe"
    shutil.rmtree(folder, ignore_errors=True)
    run = make_run(options, slowest.row, slowest.seed, PROBE_STEPS, folder)
    began = time.monotonic()
    train_until(run, deadline, stop, gpu=0)
    seconds = time.monotonic() - began
    if stop.received or time.monotonic() > deadline:
        return 0.0
    if not run.encoder.exists():
        raise UserError(f"row {run.row} cannot be trained: {run.last_words()} ({folder}/log.txt)")
    step_ms = run.step_ms()
    beside = max(0.0, seconds - step_ms * PROBE_STEPS / 1000)
    print(f"probe of row {run.row}: {step_ms:.0f} ms a step, {beside:.0f} s to start, validate and save")
    return beside + step_ms * options.steps / 1000


def write_results(options, runs: list[Run], judge: Judge, failed: dict[str, str], about: dict) -> str:
    """Writes results.json, table.md, rows.png and curves.png; -> the table."""
    rows = results_of(sorted(runs, key=lambda run: list(ROWS).index(run.row)), judge)
    for name, row in rows.items():
        row |= {
            "what": ROWS[name].what,
            "of": ROWS[name].of,
            "settings": changes_of(name),
            "change": change_of(row, rows[ROWS[name].of]) if ROWS[name].of in rows else {},
        }
    waiting = {run.name: "not trained to its end yet" for run in runs if not run.encoder.exists()}
    definitions = {name: METRICS[name].definition for name in judge.true["metrics"]}
    definitions["semantic_used"] = "distinct semantic codes of all clips together"
    report = about | {
        "true": numbers_of(judge.true),
        "untrained": numbers_of(judge.untrained),
        "rows": rows,
        "not_finished": waiting | failed,
        "not_measured": not_measured(options.metrics),
        "definitions": definitions,
    }
    text = table(report)
    write_text(options.output / "results.json", json.dumps(finite(report), indent=2) + "\n")
    write_text(options.output / "table.md", text)
    save_figure(curves_figure(rows, judge.goal), options.output / "curves.png")
    save_figure(rows_figure(report), options.output / "rows.png")
    return text


# ---------------------------------------------------------------- command line

LISTING = "\n".join(f"  {name:<16}{row.what}" + (f", against {row.of}" if row.of else "") for name, row in ROWS.items())
EXAMPLES = f"""rows:
{LISTING}

They decide about losses and the start; warm-ups and the average's length are shares of --steps. All
else is the config's: batch, crops, learning rate, discriminators. asr.model=FILE is the Whisper of the ASR loss,
--whisper the one that words are counted by, which is what takes long to measure: leave wer out of --metrics in a hurry.

examples:
  # two CPU cores, the embedded stand-in, discriminators cut down: does it run?
  python research/withheld_encoder.py --standin assets/standin --data configs/demo.yaml \\
      --withheld assets/standin_withheld_encoder.safetensors --rows reconstruction,discriminators --seeds 0 \\
      --steps 50 --metrics mel,stft discriminator.channels=4 discriminator.crop_sec=0.25

  # a GPU: a mid-size stand-in, then what ten minutes give, measured on recordings of people
  python make_standin.py --config configs/standin_mid.yaml data.data_root=/my/speech
  python research/withheld_encoder.py --standin runs/standin_mid/released --data configs/standin_mid.yaml \\
      --withheld runs/standin_mid/withheld_encoder.safetensors --eval /my/speech/eval.csv --steps 1000 --minutes 10 \\
      data.data_root=/my/speech
  #    ... what was left out or killed: the same command with --resume
"""


def main(arguments=None) -> None:
    parser = script_parser(__doc__, EXAMPLES)
    parser.add_argument("--standin", metavar="DIR", required=True, help="checkpoint without encoder (make_standin.py)")
    parser.add_argument("--withheld", metavar="FILE", required=True, help="its true encoder")
    parser.add_argument(
        "--data",
        metavar="CONFIG",
        required=True,
        help="YAML of train_encoder.py or make_standin.py: speech, held-out speakers, batch, ...",
    )
    parser.add_argument(
        "--eval",
        metavar="WHAT",
        help="speech to measure on: a folder, a manifest (csv, tsv, jsonl) "
        "or a config (default: the held-out speakers of --data)",
    )
    parser.add_argument("--steps", metavar="N", type=int, required=True, help="of every run")
    parser.add_argument("--seeds", metavar="N,...", default="0,1,2", help="for a run of each row (default: 0,1,2)")
    parser.add_argument("--rows", metavar="NAME,...", default=",".join(ROWS), help="(default: %(default)s)")
    parser.add_argument(
        "--output", metavar="DIR", type=Path, default=Path("runs/withheld_encoder"), help="(default: %(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="go on in OUTPUT; finished runs are skipped")
    parser.add_argument(
        "--minutes",
        metavar="M",
        type=float,
        default=math.inf,
        help="stop then: a run that would not be ready is not begun, one that is not ready is saved",
    )
    parser.add_argument(
        "--at-once",
        metavar="N",
        type=int,
        help="runs at a time, each on its GPU (default: one a GPU; "
        "ms per step is that of a run that shares the machine)",
    )
    parser.add_argument(
        "--metrics",
        metavar="NAME,...",
        default=",".join(SOUND),
        help="scores of evaluate.py (default: %(default)s); codes are compared always",
    )
    parser.add_argument(
        "--whisper",
        metavar="MODEL",
        default="base",
        help="for wer: openai-whisper's name of a model, or a local .pt (default: %(default)s)",
    )
    parser.add_argument(
        "--clips",
        metavar="N",
        type=int,
        default=84,
        help="to measure on, spread over the speakers (default: %(default)s)",
    )
    parser.add_argument("--max-sec", type=float, default=20.0, help="longer clips are cut (default: %(default)g)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config of --data")
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
        for name, value, least in (
            ("--steps", options.steps, 1),
            ("--clips", options.clips, 1),
            ("--at-once", options.at_once or 1, 1),
            ("--minutes", options.minutes, 0),
            ("--max-sec", options.max_sec, 0.1),
        ):
            if not value >= least:
                raise UserError(f"{name} is {value}; it must be {least} or more.")
        check_scores(options.metrics)
        benchmark(options)


if __name__ == "__main__":
    main()
