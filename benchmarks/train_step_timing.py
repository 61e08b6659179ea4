"""The clock of train_step.py: a training taken step by step, its speed and memory, and where the time goes."""

import gc
import resource
import signal
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import replace
from statistics import median

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import train_encoder
from voxtral.config import EncoderConfig
from voxtral.processes import Process

N_BLOCKS = 5  # in which --compare takes turns
N_PROFILED = 3  # steps of the tables

# Ranges that the product names (record_function); backward follows from them.
WHISPER = "Whisper"
PARTS = (WHISPER, "codec", "discriminators", "losses of the sound", "losses of the codes", "weight averaging")
OPTIMIZERS, REST, DATA = "optimizers", "the rest", "data"
BACKWARD = "autograd::engine::evaluate_function: "  # of one node of the graph


# ---------------------------------------------------------------- a training, step by step


class Training:
    """A run of train_encoder.py that stops after each step; everything it prints goes to the file `log`."""

    def __init__(self, config: EncoderConfig, process: Process, log):
        """Sets the training up in a folder of its own, CUDA graphs included; no data is read yet."""
        self.folder = tempfile.TemporaryDirectory()
        config = replace(config, output_dir=self.folder.name)
        self.log, self.on_gpu = log, process.device.type == "cuda"
        self.audio_sec = config.data.batch_size * config.data.max_sec * config.train.accumulation * process.world_size
        self.steps = train_encoder.training_steps(config, process)
        with self.said_to_log():
            self.waited_sec = self.waited_before = next(self.steps)

    @contextmanager
    def said_to_log(self):
        with redirect_stdout(self.log), redirect_stderr(self.log):
            yield
        self.log.flush()

    def start(self, n_steps: int) -> None:
        """The first steps, with which the loader starts too; they do not count."""
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        self.advance(1)
        for number, handler in handlers.items():  # Ctrl-C shall end the benchmark, not save a checkpoint
            signal.signal(number, handler)
        self.advance(n_steps - 1)
        self.waited_before = self.waited_sec

    def advance(self, n_steps: int) -> list[float]:
        """Seconds of each of the next steps. Nothing waits for the device before they have all been launched."""
        with self.said_to_log():
            marks = [self.mark()]
            for _ in range(n_steps):
                self.waited_sec = next(self.steps)
                marks.append(self.mark())
            if self.on_gpu:
                torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1000 if self.on_gpu else b - a for a, b in zip(marks, marks[1:])]

    def mark(self):
        """A moment: on the GPU the one at which all work launched so far is done."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def close(self) -> None:
        """Ends its loader processes, frees its memory and CUDA graphs, removes its folder."""
        self.steps.close()
        gc.collect()
        self.folder.cleanup()
        if self.on_gpu:
            torch.cuda.empty_cache()


def measure(
    configs: list[EncoderConfig], process: Process, log, warm_up: int, n_steps: int, profiles: bool = True
) -> list[dict]:
    """Speed of each configuration; several take turns, block by block. Memory of a single one. `profiles`: then where
    the time of N_PROFILED more steps goes."""
    if process.device.type == "cuda":
        torch.cuda.empty_cache()  # a training that did not fit may have left something
        torch.cuda.reset_peak_memory_stats()
    with ExitStack() as closing:
        trainings = []
        for config in configs:  # all CUDA graphs are recorded before a loader's threads use the GPU
            trainings.append(Training(config, process, log))
            closing.callback(trainings[-1].close)
        for training in trainings:
            training.start(warm_up)
        n_blocks = min(N_BLOCKS, n_steps) if len(trainings) > 1 else 1
        blocks = [[] for _ in trainings]
        for i in range(n_blocks):
            for training, mine in zip(trainings, blocks):
                mine.append(training.advance((i + 1) * n_steps // n_blocks - i * n_steps // n_blocks))
        memory = {"memory_gib": peak_memory_gib(process.device)} if len(trainings) == 1 else {}
        results = [summary(training, mine) | memory for training, mine in zip(trainings, blocks)]
        for training, result in zip(trainings, results) if profiles else ():
            result |= profiled(training)
        return results


def peak_memory_gib(device: torch.device) -> dict[str, float]:
    """GPU: since measure() began; CPU: since this process began."""
    if device.type == "cuda":
        return {
            "reserved": torch.cuda.max_memory_reserved() / 2**30,
            "allocated": torch.cuda.max_memory_allocated() / 2**30,
        }
    unit = 1 if sys.platform == "darwin" else 2**10  # of ru_maxrss
    return {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}


def summary(training: Training, blocks: list[list[float]]) -> dict:
    """What training.advance() returned, in numbers for people."""
    seconds = [second for block in blocks for second in block]
    p10, p50, p90 = (1000 * np.percentile(seconds, [10, 50, 90])).tolist()
    return {
        "audio_sec_per_sec": 1000 * training.audio_sec / p50,
        "audio_sec_per_sec_overall": training.audio_sec * len(seconds) / sum(seconds),
        "step_ms": {"median": p50, "p10": p10, "p90": p90},
        "audio_sec_per_step": training.audio_sec,
        "data_wait_ms": 1000 * (training.waited_sec - training.waited_before) / len(seconds),
        "block_audio_sec_per_sec": [training.audio_sec / median(block) for block in blocks],
        "steps_ms": [round(1000 * second, 3) for second in seconds],
    }


# ---------------------------------------------------------------- where the time goes


def cdist_flop(a: tuple, b: tuple, *others, out_shape=None, **more) -> int:
    """[..., P, D], [..., R, D]: distances of many vectors are a matrix product."""
    return 2 * int(np.prod(a)) * b[-2]


def attention_flop(query: tuple, key: tuple, value: tuple, *others, out_shape=None, **more) -> int:
    return sdpa_flop_count(query, key, value)


# What torch.utils.flop_counter does not know.
MORE_FLOPS = {
    torch.ops.aten._cdist_forward: cdist_flop,
    torch.ops.aten._euclidean_dist: cdist_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flop,
}


def count_flop(config: EncoderConfig, process: Process, log) -> int:
    """FLOP of a step of this process; what a CUDA graph or a compiled function does could not be counted."""
    config = deepcopy(config)
    config.train.cuda_graphs = config.train.compile = False
    training = Training(config, process, log)
    try:
        training.start(1)
        with FlopCounterMode(display=False, custom_mapping=MORE_FLOPS) as counter:
            training.advance(1)
        return counter.get_total_flops()
    finally:
        training.close()


def profiled(training: Training) -> dict:
    """ms a step of its parts, and of the kernels (CPU: operators) that take most: [name, ms, calls]."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * training.on_gpu
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(N_PROFILED):
            with record_function(REST):
                training.advance(1)
    times = time_of_parts(profiler.events(), training.on_gpu)
    return {
        "parts_ms": {part: {way: us / 1000 / N_PROFILED for way, us in both.items()} for part, both in times.items()},
        "kernels": time_of_kernels(profiler.key_averages(), training.on_gpu),
    }


def time_of_kernels(events: list, on_gpu: bool) -> list[list]:
    """Averages of a profiler -> [name, ms a step, calls a step], the longest first."""
    device = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    rows = []
    for event in events:
        if event.device_type == device and event.key not in (*PARTS, REST) and not event.is_user_annotation:
            us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            rows.append([event.key, us / 1000 / N_PROFILED, event.count / N_PROFILED])
    return sorted(rows, key=lambda row: -row[1])


def part_of(name: str) -> str | None:
    """The part of which the profiler's event of that name is the range, if it is one."""
    if name in (*PARTS, REST):
        return name
    return OPTIMIZERS if name.startswith("Optimizer.") else DATA if name.startswith("enumerate(DataLoader)") else None


def time_of_parts(events: list, on_gpu: bool) -> dict[str, dict[str, float]]:
    """Events of a profiler -> part -> microseconds, forward and backward.

    An autograd node has the number of the operator that made it, so its backward is added to that operator's part. On a
    GPU a range has a double of its name, from its first kernel to its last. That is no kernel, but Whisper's time: the
    kernels of its graph, which autograd does not replay, belong to no operator.
    """
    main_thread = next(event.thread for event in events if event.name == REST)
    makers: dict[int, str] = {}  # number of an autograd node -> part; the last operator of that number made it
    times: dict[str, dict[str, float]] = {}

    def place(event) -> tuple[str, str]:
        while event is not None:
            if event.name.startswith(BACKWARD):
                return makers.get(event.sequence_nr, REST), "backward"
            if part := part_of(event.name):
                return part, "forward"
            event = event.cpu_parent
        return REST, "forward"

    host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU and not event.is_async]
    for event in sorted(host, key=lambda event: event.time_range.start):
        if event.thread == main_thread and event.sequence_nr >= 0:
            part, way = place(event)
            if way == "forward":
                makers[event.sequence_nr] = part
    for event in host:
        part, way = place(event)
        if on_gpu:
            own = (k.duration for k in event.kernels if (k.name == event.name) == (part == WHISPER))
            spent = sum(own)
        else:
            spent = event.self_cpu_time_total if event.thread == main_thread else 0
        if spent:
            times.setdefault(part, {"forward": 0.0, "backward": 0.0})[way] += spent
    times.pop(DATA, None)  # the profiler slows the step down, and the loader has time to spare
    return {part: times[part] for part in [*PARTS, OPTIMIZERS, REST] if part in times}
