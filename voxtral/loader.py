"""Batches made by other processes: a DataLoader that a run can be left alone with."""

import dataclasses
import math
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from voxtral.errors import DataError
from voxtral.sources import DataConfig

PREFETCHED, BATCHES_IN_USE = 4, 2  # batches of each loader process on their way; those that the trainer holds
LOST_AFTER_SEC = 600  # a batch that has not come by then will not come
SHARED_MEMORY = Path("/dev/shm")
STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}


class TensorBatch:
    """A dataclass whose tensors (and those of others in it) move together; what else it holds stays as it is."""

    def _map(self, function) -> "TensorBatch":
        moved = {
            field.name: function(value)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), (Tensor, TensorBatch))
        }
        return dataclasses.replace(self, **moved)

    def pin_memory(self) -> "TensorBatch":
        """Called by the DataLoader."""
        return self._map(lambda one: one.pin_memory())

    def to(self, device, non_blocking: bool = False) -> "TensorBatch":
        """The same batch with its tensors on `device`."""
        return self._map(lambda one: one.to(device, non_blocking=non_blocking))


class Loader(DataLoader):
    """A DataLoader with data.num_workers loader processes that leave stopping to the trainer: they outlive the signals
    which reach a whole group of processes, so that the step under way gets its batch.

    Raises DataError, before the first batch, when shared memory cannot hold the batches on their way. What happens to
    them later is the DataLoader's RuntimeError, which training_process() turns into a sentence.
    """

    def __init__(self, dataset: Dataset, config: DataConfig, **options):
        # Each worker runs on one thread (the DataLoader's own rule), so num_workers is the number of cores taken.
        # Forked, whatever started this process: a worker that imports everything anew needs many seconds.
        workers = {}
        if config.num_workers:
            workers = {"prefetch_factor": PREFETCHED, "timeout": LOST_AFTER_SEC}
            workers |= {"multiprocessing_context": "fork", "worker_init_fn": _end_with_trainer}
        super().__init__(
            dataset, num_workers=config.num_workers, pin_memory=torch.cuda.is_available(), **workers, **options
        )

    def __iter__(self) -> Iterator:
        if self.num_workers:
            self._check_shared_memory()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # workers are born with them blocked
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _check_shared_memory(self) -> None:
        """Batches come from the workers in /dev/shm; one that does not fit there is lost without an error."""
        if not SHARED_MEMORY.is_dir():
            return
        n_bytes = batch_bytes(self.collate_fn([self.dataset[item] for item in next(iter(self.batch_sampler))]))
        n_local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's: trainers on this machine
        needed = n_local * (self.num_workers * PREFETCHED + BATCHES_IN_USE) * n_bytes
        free = shutil.disk_usage(SHARED_MEMORY).free
        if free < needed:
            fits = max(0, int(free / max(1, n_local * n_bytes) - BATCHES_IN_USE) // PREFETCHED)
            raise DataError(
                f"{SHARED_MEMORY} has {free / 1e6:,.0f} MB free, but data.num_workers={self.num_workers} needs "
                f"{needed / 1e6:,.0f} MB for batches of {n_bytes / 1e6:,.1f} MB: start the container with "
                f"--shm-size={math.ceil(needed / 1e9)}g, or set data.num_workers={fits}."
            )


def _end_with_trainer(_worker: int) -> None:
    """In a loader process, which has the stop signals blocked: the trainer's own SIGTERM still ends it."""

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def batch_bytes(value: Any) -> int:
    """Of all tensors in a batch."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, (list, tuple)):
        return sum(map(batch_bytes, value))
    return batch_bytes(list(vars(value).values())) if isinstance(value, TensorBatch) else 0
