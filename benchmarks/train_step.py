"""How fast train_encoder.py trains, and where the time of a step goes.

The step that is timed is train_encoder.py's own: its loop is taken step by step (train_encoder.training_steps),
with the files, loader, losses and optimizers of the config, in a temporary run folder. Config and key=value overrides
are those of train_encoder.py. What differs from a training is what would disturb the clock or hide work: no validation
and no saving, discriminator.warmup_steps=0 (feature matching from the first step) and train.max_total_loss=1e9, both of
which an override can change.

What is printed
  ms/step     from the end of one step on the device to the end of the next: median, 10th and 90th percentile; every
              log_every_steps, a step also reads and writes the scalars, as in a training
  audio s/s   seconds of audio of a step (clips x data.max_sec, padding counted, all processes) per second: at the
              median step, and over all of them
  peak GiB    GPU: what PyTorch took from the card (with CUDA graphs, that is what counts) and what tensors held of it;
              CPU: resident size of this process so far, without loader processes; not of two that are compared
  FLOP/s      of matrix products, convolutions and attention, forward and backward, counted on one step; neither FFTs
              nor pointwise work
  the tables  time of every part's own work, forward and, for what autograd does because of that part, backward; and of
              single kernels and their kinds. GPU: sum of the kernels, but Whisper's from the first to the last on the
              stream of its own, so parts may add up to more than a step. CPU: time on the main thread, operators in
              place of kernels.

Everything is also in OUTPUT/train_step.json; what train_encoder.py says meanwhile is in OUTPUT/train_step.log.
"""

import functools
import os
import sys
import tempfile
import time
from contextlib import redirect_stdout
from copy import deepcopy
from pathlib import Path
from statistics import median

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from train_step_report import GROWTH_AXES, HEAD, flops_report, growth_figure, kernels_report, parts_report, row
from train_step_timing import N_PROFILED, count_flop, measure

from make_standin import make_random
from voxtral.command_line import script_parser
from voxtral.config import EncoderConfig, check_encoder_config, load_config
from voxtral.data import SAMPLE_RATE, SpeechDataset, make_loader
from voxtral.errors import UserError, one_sentence
from voxtral.evaluation_report import markdown
from voxtral.json_files import write_json
from voxtral.plots import save_figure
from voxtral.processes import Process, training_process
from voxtral.run_folder import environment
from voxtral.sources import find_clips, split_validation

EXAMPLES = """examples:
  # a batch of 16 x 4 s with all losses of the paper, full widths with random weights, on the demo's speech
  python benchmarks/train_step.py --random-full data.data_root=assets/speech \\
      'data.sources=[{kind: manifest, path: demo.csv}]' data.batch_size=16 asr.model=/path/to/base.pt

  # your checkpoint ($VOXTRAL_CKPT), your data, without ASR
  python benchmarks/train_step.py --config configs/libritts_r.yaml data.data_root=/speech loss.asr=0

  # two configurations in turns, so that a clock that drifts does so for both: the second one changes what is named
  python benchmarks/train_step.py --random-full data.data_root=/speech --compare train.cuda_graphs=false

  # speed and memory against the batch or the clips' length, with a plot; the loader alone
  python benchmarks/train_step.py --random-full data.data_root=/speech --growth batch=4,8,16,32,64,128
  python benchmarks/train_step.py --random-full data.data_root=/speech --growth seconds=1,2,4,8,16,30
  python benchmarks/train_step.py data.data_root=/speech data.batch_size=16 --loader-only --workers 1,2,4,8,16

  # two GPUs
  torchrun --nproc-per-node 2 benchmarks/train_step.py --random-full data.data_root=/speech
"""
OWN_DEFAULTS = ["discriminator.warmup_steps=0", "train.max_total_loss=1e9"]
H100_TFLOPS = 790.0  # bf16, stated, not measured here
WHISPER_SEC = 30.0  # asr.context_sec cannot be more

# ---------------------------------------------------------------- the loader alone


def measure_loader(config: EncoderConfig, workers: list[int], n_batches: int) -> list[dict]:
    """Speed of the data path by number of loader processes, and what the files are."""
    sources, _ = split_validation(find_clips(config.data)[0], config.data.validation)
    clips = [clip for source in sources for clip in source]
    results = []
    for n_workers in workers:
        data = deepcopy(config.data)
        data.num_workers = n_workers
        batches = iter(
            make_loader(SpeechDataset(clips, data.max_sec, config.seed, speed=data.speed), data, config.seed)
        )
        for _ in range(1 + 2 * n_workers):
            next(batches)
        # Workers finish together: whole rounds of them, and many.
        n = max(n_batches, 10 * n_workers)
        n += -n % max(1, n_workers)
        started = time.perf_counter()
        seen = [next(batches) for _ in range(n)]
        seconds = time.perf_counter() - started
        del batches
        crops_sec = n * data.batch_size * data.max_sec
        rates, counts = np.unique(np.concatenate([batch.native_rates for batch in seen]), return_counts=True)
        results.append(
            {
                "num_workers": n_workers,
                "audio_sec_per_sec": crops_sec / seconds,
                "batch_ms": 1000 * seconds / n,
                "batches": n,
                "sound_share": sum(batch.lengths.sum().item() for batch in seen) / SAMPLE_RATE / crops_sec,
                "native_rates_hz": {int(rate): int(count) for rate, count in zip(rates, counts)},
            }
        )
    return results


# ---------------------------------------------------------------- what is asked for


def load(options, yaml: str, overrides: list[str], random_checkpoint: str | None) -> EncoderConfig:
    """The configuration to be timed, in which a training never ends, validates or saves."""
    config = load_config(EncoderConfig, yaml, [*OWN_DEFAULTS, *overrides])
    config.checkpoint = random_checkpoint or config.checkpoint
    config.resume, config.train.max_steps = False, options.warm_up + options.steps + N_PROFILED + 1
    config.train.validate_every_steps = 10**9
    config.train.save_every_minutes = config.train.save_every_steps = None
    check_encoder_config(config)
    return config


def grown(text: str, config: EncoderConfig) -> tuple[str, dict[float, EncoderConfig]]:
    """--growth -> its axis, value -> configuration."""
    axis, _, values = text.partition("=")
    try:
        values = sorted(GROWTH_AXES[axis][0](value) for value in values.split(","))
    except (KeyError, ValueError):
        raise UserError(f"--growth {text}: write batch=4,8,16 or seconds=1,2,4.") from None
    configs = {value: deepcopy(config) for value in values}
    for value, one in configs.items():
        if axis == "batch":
            one.data.batch_size = value
        else:
            one.data.max_sec = value
            one.asr.context_sec = max(config.asr.context_sec, min(2.5 * value, WHISPER_SEC))
        check_encoder_config(one)
    return axis, configs


def usual_workers(config: EncoderConfig) -> list[int]:
    """1, 2, 4, ... up to the cores this process may use, and the config's number."""
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return sorted({2**i for i in range(n_cores.bit_length())} | {config.data.num_workers})


def describe(config: EncoderConfig, process: Process) -> str:
    """One line: what runs where."""
    weights = ", ".join(f"{name} {weight:g}" for name, weight in vars(config.loss).items() if weight)
    return (
        f"batch {config.data.batch_size} x {config.data.max_sec:g} s"
        f"{f' x {config.train.accumulation}' if config.train.accumulation > 1 else ''}, {config.train.precision}, "
        f"{'compiled, ' if config.train.compile and process.device.type == 'cuda' else ''}"
        f"CUDA graphs {'on' if config.train.cuda_graphs and process.device.type == 'cuda' else 'off'}, "
        f"{config.data.num_workers} loader processes; losses {weights}"
    )


def speed(options, process: Process, config: EncoderConfig, random_checkpoint: str | None, log, say) -> dict:
    """One configuration or two in turns: speed, memory, FLOP, parts."""
    configs = {"as configured": config}
    if options.compare is not None:
        first, *others = options.compare
        yaml, changes = (options.config, options.compare) if "=" in first else (first, others)
        configs[" ".join(options.compare)] = load(options, yaml, [*options.overrides, *changes], random_checkpoint)
    for name, one in configs.items():
        say(f"{name}: {describe(one, process)}")
    measured = dict(zip(configs, measure(list(configs.values()), process, log, options.warm_up, options.steps)))
    if process.is_main:
        said = Path(log.name).read_text(encoding="utf-8").splitlines()
        say("\n" + "\n".join(f"train_encoder.py: {line}" for line in said if "absent" in line or "clips," in line))
    say("\n" + markdown(HEAD, [row(name, result) for name, result in measured.items()]))
    results = {"configurations": measured}
    if len(measured) > 1:
        a, b = (result["block_audio_sec_per_sec"] for result in measured.values())
        ratios = results["speed_ratios"] = [two / one for one, two in zip(a, b)]
        say(
            f"\nthe second one has {median(ratios):.3f} times the speed of the first one ({min(ratios):.3f} to "
            f"{max(ratios):.3f} in {len(ratios)} turns)"
        )
    for name, result in measured.items():
        result["flop_per_step"] = count_flop(configs[name], process, log)
        result["flop_per_audio_sec"] = result["flop_per_step"] * process.world_size / result["audio_sec_per_step"]
        result["tflop_per_sec"] = result["flop_per_step"] / result["step_ms"]["median"] / 1e9
        if options.ceiling_tflops:
            result["ceiling_share"] = result["tflop_per_sec"] / options.ceiling_tflops
        say(
            f"\n{name}: {flops_report(result, options.ceiling_tflops)}\n\nmean of {N_PROFILED} steps; without the "
            f"profiler a step takes {result['step_ms']['median']:.1f} ms\n\n{parts_report(result)}\n\n"
            f"{kernels_report(result, process.device.type == 'cuda')}"
        )
    return results


def growth(options, process: Process, config: EncoderConfig, log, say) -> dict:
    """Speed and memory along an axis."""
    axis, configs = grown(options.growth, config)
    say(f"{describe(config, process)}\n\n{markdown([axis, *HEAD[1:]], []).rstrip()}")
    results = []
    for value, one in configs.items():
        try:
            result = measure([one], process, log, options.warm_up, options.steps, profiles=False)[0]
        except torch.cuda.OutOfMemoryError:
            result = {"error": "out of memory"}
        say("| " + " | ".join(row(f"{value:g}", result)) + " |")
        results.append({axis: value, **result})
    if process.is_main:
        plot = Path(options.output) / f"growth_{axis}.png"
        save_figure(growth_figure(axis, results), plot)
        say(f"\n{plot}")
    return {"growth": results}


def loader_alone(options, config: EncoderConfig) -> dict:
    """Audio seconds per second by number of loader processes."""
    workers = options.workers or usual_workers(config)
    print(
        f"the loader alone, batch {config.data.batch_size} x {config.data.max_sec:g} s, files read before may come "
        "from the page cache\n"
    )
    results = measure_loader(config, workers, options.steps)
    rows = [
        [
            str(r["num_workers"]),
            f"{r['audio_sec_per_sec']:.4g}",
            f"{r['batch_ms']:.2f}",
            f"{r['sound_share']:.1%}",
            ", ".join(f"{rate / 1000:g}: {count}" for rate, count in r["native_rates_hz"].items()),
        ]
        for r in results
    ]
    print(markdown(["loader processes", "audio s/s, padding counted", "ms/batch", "of it sound", "clips by kHz"], rows))
    return {"loader": results}


def main(arguments=None) -> None:
    parser = script_parser(__doc__, EXAMPLES)
    parser.add_argument(
        "--config", default="configs/encoder.yaml", help="YAML of train_encoder.py (default: %(default)s)"
    )
    parser.add_argument(
        "--random-full",
        action="store_true",
        help="a checkpoint made for this run: random weights, the released codec's sizes",
    )
    parser.add_argument("--steps", metavar="N", type=int, default=100, help="that count (default: %(default)s)")
    parser.add_argument("--warm-up", metavar="N", type=int, default=10, help="steps before them (default: %(default)s)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--compare",
        metavar="key=value",
        nargs="+",
        help="time a second configuration in turns with the first: all that follows is what it changes; "
        "another YAML may come first, to which the overrides before --compare apply too. A loader "
        "fills up during the other's turn: compare data waits in runs of their own",
    )
    what.add_argument(
        "--growth",
        metavar="AXIS=VALUES",
        help="batch=4,8,16 or seconds=1,2,4: speed and memory of each, and OUTPUT/growth_AXIS.png; "
        "asr.context_sec grows with the seconds where it must",
    )
    what.add_argument(
        "--loader-only",
        action="store_true",
        help="the config's files through the data loader, by number of loader processes; no model",
    )
    parser.add_argument(
        "--workers",
        metavar="N,N",
        type=lambda text: [int(n) for n in text.split(",")],
        help="numbers of loader processes of --loader-only (default: 1,2,4,... cores and the config's)",
    )
    parser.add_argument(
        "--ceiling-tflops",
        metavar="T",
        type=float,
        help=f"of which the share is printed (default: {H100_TFLOPS:g} on a GPU, for bf16 on an H200 or H100)",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        default="runs/benchmark",
        help="for train_step.json, train_step.log and plots (default: %(default)s)",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that override the YAML, such as data.batch_size=16"
    )
    options = parser.parse_intermixed_args(arguments)

    with one_sentence(), tempfile.TemporaryDirectory() as temporary:
        for name in ("steps", "warm_up"):
            if getattr(options, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1.")
        random_checkpoint = str(Path(temporary) / "random") if options.random_full else None
        config = load(options, options.config, options.overrides, random_checkpoint)
        output = Path(options.output)
        output.mkdir(parents=True, exist_ok=True)
        with training_process(config.device) as process:
            say = functools.partial(print, flush=True) if process.is_main else lambda *words: None
            results = {"config": options.config, "overrides": options.overrides, "environment": environment(process)}
            say(
                f"{results['environment']['device']}, torch {torch.__version__}, {process.world_size} process(es), "
                f"{options.steps} steps after {options.warm_up}"
            )
            if options.ceiling_tflops is None and process.device.type == "cuda":
                options.ceiling_tflops = H100_TFLOPS
            if random_checkpoint and not options.loader_only:
                with redirect_stdout(None):
                    make_random("codec", random_checkpoint)
            with open(output / "train_step.log" if process.is_main else os.devnull, "w", encoding="utf-8") as log:
                results |= (
                    loader_alone(options, config)
                    if options.loader_only
                    else growth(options, process, config, log, say)
                    if options.growth
                    else speed(options, process, config, random_checkpoint, log, say)
                )
            if process.is_main:
                write_json(output / "train_step.json", results)
            say(f"\n{output}/train_step.json")


if __name__ == "__main__":
    main()
