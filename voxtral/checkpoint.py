"""Checkpoint folders read and written: consolidated.safetensors (single or sharded), files that survive a kill.

A tensor is read only when asked for, and a file is written tensor by tensor, so an 8 GB checkpoint never sits in
memory.
"""

import errno
import fcntl
import hashlib
import io
import json
import mmap
import os
import struct
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from voxtral.errors import reason_of
from voxtral.params import CheckpointError, load_params
from voxtral.paths import no_file

CODEC_PREFIX = "audio_tokenizer."
ENCODER_PREFIXES = (CODEC_PREFIX + "input_proj.", CODEC_PREFIX + "encoder_blocks.")
EMBEDDING_NAME = "mm_audio_embeddings.audio_codebook_embeddings.embeddings.weight"
TEXT_EMBEDDING_NAME = "mm_audio_embeddings.tok_embeddings.weight"
DTYPE_NAMES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
BLOCK_BYTES, N_WRITERS = 2**23, 4


class SafetensorsFile:
    """One .safetensors file: its header, in the order of the data, and tensors on demand.

    Raises CheckpointError when the file is missing, truncated or no safetensors file.
    """

    def __init__(self, path):
        self.path = Path(path)
        if problem := no_file(path):
            raise CheckpointError(f"{path} {'is missing' if problem == 'does not exist' else problem}.")
        try:
            with self.path.open("rb") as file:
                (header_size,) = struct.unpack("<Q", file.read(8))
                self.data_start = 8 + header_size
                if self.data_start > self.path.stat().st_size:
                    raise CheckpointError(f"{self.path} is truncated: download or copy it again.")
                self.metadata, self.entries = parse_header(file.read(header_size))
        except (struct.error, ValueError, OSError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{self.path} is no readable safetensors file ({reason_of(error)}): download or copy it again."
            ) from error
        end = max((entry["data_offsets"][1] for entry in self.entries.values()), default=0)
        if self.data_start + end != self.path.stat().st_size:
            raise CheckpointError(
                f"{self.path} is truncated or damaged: its header asks for {self.data_start + end:,} bytes, "
                f"the file has {self.path.stat().st_size:,}; download or copy it again."
            )

    def read(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """name -> CPU tensor in the stored dtype; all of them, unless `names` are given."""
        try:
            with safe_open(str(self.path), framework="pt") as file:
                return {name: file.get_tensor(name) for name in (self.entries if names is None else names)}
        except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:  # an unknown dtype, for one
            raise CheckpointError(
                f"{self.path} cannot be read ({reason_of(error)}): download or copy it again."
            ) from error

    def tensor(self, name: str) -> Tensor:
        """A single one, likewise."""
        return self.read([name])[name]


def parse_header(text: bytes) -> tuple[dict | None, dict[str, dict]]:
    """The JSON of a safetensors file -> its metadata, and name -> dtype, shape, data_offsets in the order of the data.

    Raises ValueError for anything else, which the format's own reader then need not meet.
    """
    header = json.loads(text)
    metadata = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if not isinstance(header, dict) or not isinstance(metadata, (dict, type(None))):
        raise ValueError("its header is no JSON object of tensors")
    for name, entry in header.items():
        values = [entry.get(key) for key in ("shape", "data_offsets")] if isinstance(entry, dict) else [None, None]
        whole = [isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value) for value in values]
        if not (
            all(whole) and len(values[1]) == 2 and values[1][0] <= values[1][1] and isinstance(entry.get("dtype"), str)
        ):
            raise ValueError(f"its header says no dtype, shape and data_offsets of {name}")
    return metadata, dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]))


class Checkpoint:
    """A checkpoint folder. `shapes`: tensor name -> shape, over all shards."""

    def __init__(self, folder):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(
                f"checkpoint folder {self.folder} does not exist: set `checkpoint` (or VOXTRAL_CKPT)."
            )
        self.params = load_params(self.folder)
        self.files = [SafetensorsFile(path) for path in weight_files(self.folder)]
        self.file_of = {name: file for file in self.files for name in file.entries}
        self.shapes = {name: tuple(file.entries[name]["shape"]) for name, file in self.file_of.items()}

    @property
    def encoder_names(self) -> list[str]:
        """Names of the encoder's tensors that the folder holds (none in the release)."""
        return [name for name in self.shapes if name.startswith(ENCODER_PREFIXES)]

    def check(self, expected: dict[str, tuple], *prefixes: str) -> None:
        """Raises CheckpointError unless the tensors whose names begin so are those expected (name -> shape)."""
        found = {name: shape for name, shape in self.shapes.items() if name.startswith(prefixes)}
        check_shapes(found, expected, self.folder)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """name -> CPU tensor in the stored dtype. Raises CheckpointError naming the first tensor that is missing."""
        names = list(names)
        for name in names:
            if name not in self.file_of:
                raise CheckpointError(f"{self.folder} has no tensor {name}: is the checkpoint complete?")
        tensors = {}
        for file in self.files:
            tensors.update(file.read(name for name in names if self.file_of[name] is file))
        return tensors


def weight_files(folder) -> list[Path]:
    """consolidated.safetensors, or all of its shards. Raises CheckpointError when one is missing."""
    folder = Path(folder)
    single = folder / "consolidated.safetensors"
    if single.is_file():
        return [single]
    shards = sorted(folder.glob("consolidated-*-of-*.safetensors"))
    if not shards:
        raise CheckpointError(
            f"{folder} has no consolidated.safetensors (nor consolidated-0000X-of-0000Y.safetensors): "
            "point `checkpoint` (or VOXTRAL_CKPT) at the folder of a Voxtral TTS checkpoint."
        )
    total = int(shards[0].stem.rsplit("-of-", 1)[1])
    expected = [folder / f"consolidated-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
    for path in expected:
        if not path.is_file():
            raise CheckpointError(f"shard {path} is missing: download it again.")
    return expected


def check_shapes(found: dict[str, tuple], expected: dict[str, tuple], where) -> None:
    """Raises CheckpointError naming the first tensor that is missing, too many, or of another shape."""
    for name, shape in expected.items():
        if name not in found:
            raise CheckpointError(f"{where} lacks the tensor {name}.")
        if tuple(found[name]) != tuple(shape):
            raise CheckpointError(
                f"{where}: {name} has shape {list(found[name])}, but params.json implies {list(shape)}."
            )
    extra = sorted(set(found) - set(expected))
    if extra:
        raise CheckpointError(f"{where} has an unexpected tensor {extra[0]} ({len(extra)} in all).")


# ---------------------------------------------------------------- writing


@contextmanager
def atomic_path(path):
    """Yields a temporary path in the same folder; on success it is flushed to disk and renamed to `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def flush(path) -> None:
    """fsync of a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # names of files may be no UTF-8


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw little-endian bytes of a contiguous CPU tensor, without a copy."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


class Span(NamedTuple):
    """Bytes of a file."""

    path: Path
    start: int
    size: int


@dataclass
class StoredTensor:
    """A tensor to be written: dtype (as in a safetensors header), shape, and where its bytes lie or what makes it."""

    dtype: str
    shape: list[int]
    data: Span | Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Bytes."""
        if isinstance(self.data, Span):
            return self.data.size
        return TORCH_DTYPES[self.dtype].itemsize * int(torch.Size(self.shape).numel())

    def read(self) -> Tensor:
        """The tensor, wherever it comes from."""
        if not isinstance(self.data, Span):
            return self.data()
        with self.data.path.open("rb") as file:
            file.seek(self.data.start)
            data = bytearray(file.read(self.data.size))
        return torch.frombuffer(data, dtype=TORCH_DTYPES[self.dtype]).view(self.shape)


def write_stored(
    path, items: dict[str, StoredTensor], metadata: dict | None = None, header: bytes | None = None
) -> None:
    """Writes tensors in the order of `items`, those in files byte for byte; a few blocks and one tensor are in memory.

    Atomic. header: the first bytes of the file, when they are to be just these. Raises CheckpointError for a file that
    is cut, and for a tensor that is not what its item says.
    """
    entries, offset = {} if metadata is None else {"__metadata__": metadata}, 0
    for name, item in items.items():
        entries[name] = {"dtype": item.dtype, "shape": item.shape, "data_offsets": [offset, offset + item.size]}
        offset += item.size
    if header is None:
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensor data starts at a multiple of 8
        header = struct.pack("<Q", len(text)) + text
    with atomic_path(path) as temporary, BlockWriter(temporary) as file:
        file.append(io.BytesIO(header), len(header))
        for name, item in items.items():
            if isinstance(item.data, Span):
                with item.data.path.open("rb", buffering=0) as source:
                    source.seek(item.data.start)
                    if file.append(source, item.size) < item.size:
                        raise CheckpointError(f"{item.data.path} ends too early: download or copy it again.")
            else:
                tensor = item.data()
                if tensor.dtype != TORCH_DTYPES[item.dtype] or tensor.shape != torch.Size(item.shape):
                    raise CheckpointError(f"{name}: {tensor.dtype} {list(tensor.shape)} is not what its item says.")
                file.append(io.BytesIO(tensor_bytes(tensor.contiguous())), item.size)


class BlockWriter:
    """A new file, written from front to back in large blocks by a few threads, past the page cache where that can be.

    Through the cache, 8 GB are throttled by the kernel half-way and have still to be flushed at the end: 2 GB took 4
    and 6 s so, and 28 and 40 s by plain writes and fsync, in turns on the disk of a busy two-core virtual machine."""

    def __init__(self, path):
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        with suppress(OSError, AttributeError):  # a file system, or a system, without it
            fcntl.fcntl(self._file, fcntl.F_SETFL, os.O_DIRECT)
        self._threads = ThreadPoolExecutor(N_WRITERS)
        self._free = deque(mmap.mmap(-1, BLOCK_BYTES) for _ in range(N_WRITERS + 1))  # aligned, as O_DIRECT asks
        self._writes = deque()  # (block, future), the oldest first
        self._start = self._filled = 0  # where the first of the free blocks begins, and how much of it is filled

    def append(self, source, size: int) -> int:
        """The next `size` bytes of a binary stream; returns how many there were."""
        left = size
        while left:
            count = source.readinto(memoryview(self._free[0])[self._filled : self._filled + left])
            if not count:
                break
            left, self._filled = left - count, self._filled + count
            if self._filled == BLOCK_BYTES:
                self._submit_block()
        return size - left

    def _submit_block(self) -> None:
        block = self._free.popleft()
        self._writes.append((block, self._threads.submit(self._write, memoryview(block)[: self._filled], self._start)))
        self._start, self._filled = self._start + self._filled, 0
        if not self._free:
            block, write = self._writes.popleft()
            write.result()
            self._free.append(block)

    def _write(self, data: memoryview, position: int) -> None:
        while len(data):
            try:
                count = os.pwrite(self._file, data, position)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                fcntl.fcntl(self._file, fcntl.F_SETFL, 0)  # not a whole number of disk blocks: the end, or a full disk
                count = os.pwrite(self._file, data, position)
            data, position = data[count:], position + count

    def __enter__(self) -> "BlockWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self._submit_block()
                for _, write in self._writes:
                    write.result()
        finally:
            self._threads.shutdown()
            os.close(self._file)


def save_tensors(path, tensors: dict[str, Tensor]) -> None:
    """name -> tensor, on any device, as one .safetensors file, atomically."""
    write_stored(
        path,
        {
            name: StoredTensor(DTYPE_NAMES[t.dtype], list(t.shape), lambda t=t: t.detach().cpu())
            for name, t in tensors.items()
        },
    )


def digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of tensors and their names, in this order."""
    found = hashlib.sha256()
    for name, tensor in named:
        found.update(name.encode())
        found.update(tensor_bytes(tensor.detach().cpu().contiguous()))
    return found.hexdigest()


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Tells tensors from others: 16 digits."""
    return digest(("", tensor) for tensor in tensors)[:16]
