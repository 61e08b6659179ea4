"""The processes that train together: who they are, what they tell each other, how all of them stop."""

import os
import signal
import sys
import time
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from voxtral.config import ConfigError
from voxtral.errors import reason_of

AGAIN_SEC = 1.0  # a second Ctrl-C that comes later than this is one that a person has pressed again


class TrainingDiverged(RuntimeError):
    """A loss became NaN, infinite or too large; the last good checkpoint is kept."""


class StopSignal:
    """Set by SIGTERM or Ctrl-C: the loop ends after the current step, with a checkpoint.

    More of them change nothing, since schedulers and torchrun both send theirs; only a second Ctrl-C ends at once.
    """

    def __init__(self):
        self.received = False
        self._first = 0.0
        self._former = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}

    def _receive(self, number, frame) -> None:
        if not self.received:
            self.received, self._first = True, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._first > AGAIN_SEC:
            signal.default_int_handler(number, frame)

    def close(self) -> None:
        """Signals mean again what they meant before."""
        for number, handler in self._former.items():
            signal.signal(number, handler)


@dataclass
class Process:
    """This process among those that train together (`torchrun` starts several, plain `python` one).

    What they tell each other goes through the CPU, so that nobody waits for a GPU. All must ask at the same step.
    """

    rank: int
    world_size: int
    device: torch.device
    stop: StopSignal | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def n_local(self) -> int:
        """How many of them are on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))

    def any(self, *flags: bool) -> list[bool]:
        """Of each flag, whether any process sets it."""
        if self.world_size == 1:
            return list(flags)
        found = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.bool().tolist()

    def gather(self, values: list) -> list:
        """What all processes have, one after the other."""
        found = [values] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(found, values)
        return [value for one in found for value in one]

    def check_same(self, what: str, data: bytes) -> None:
        """Where several machines train together: raises ConfigError unless all have the same."""
        if self.n_local < self.world_size:
            found = self.gather([f"{zlib.crc32(data):08x}"])
            if len(set(found)) > 1:
                raise ConfigError(
                    f"{what} are not the same on all machines (checksums {', '.join(found)}); all must read "
                    "the same files under the same paths."
                )

    def of_main(self, value: Any) -> Any:
        """What the first process has."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def wait(self) -> None:
        """Until all processes are here."""
        self.any(False)

    def stopping(self) -> bool:
        """Whether this process was told to stop."""
        return self.stop is not None and self.stop.received

    def close(self) -> None:
        if self.stop:
            self.stop.close()
        if self.world_size > 1:
            dist.destroy_process_group()


def start_process(device: str) -> Process:
    """Reads torchrun's variables, picks the device (auto, cpu, cuda), opens the process group if there are several."""
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device is {device}: it must be auto, cpu or cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but PyTorch sees no GPU: use device=cpu or device=auto.")
    use_cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(chosen)
    if world_size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if use_cuda else "gloo")
    return Process(rank, world_size, chosen)


@contextmanager
def stoppable_process(device: str):
    """Around work that ends early, but whole, when it is told to: yields the Process, whose `stop` listens; closes it.
    A program that was told to stop ends here, with exit code 0: nothing that would come next is begun."""
    process = start_process(device)
    process.stop = StopSignal()
    try:
        yield process
    finally:
        process.close()
    if process.stopping():
        sys.exit(0)


@contextmanager
def training_process(device: str):
    """Around a training: stoppable_process(), and what can end a training is one line and exit code 1."""
    with stoppable_process(device) as process:
        try:
            yield process
        except TrainingDiverged as error:
            sys.exit(f"training stopped: {error}")
        except RuntimeError as error:
            reason = reason_of(error)
            if _is_out_of_memory(error):
                sys.exit(
                    "training stopped: the GPU has too little memory; lower data.batch_size (train.accumulation "
                    f"makes up for it) or data.max_sec ({reason})."
                )
            if not reason.startswith("DataLoader "):
                raise
            sys.exit(
                f"training stopped: a batch was lost ({reason}); a loader process was killed, memory or /dev/shm is "
                "full, or a disk does not answer: mend that, or lower data.num_workers, and go on with resume=true."
            )


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Or of another error that it has led to, such as that of a CUDA graph which could not be recorded."""
    return error is not None and (isinstance(error, torch.OutOfMemoryError) or _is_out_of_memory(error.__context__))
