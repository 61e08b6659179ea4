"""Puts a trained encoder (and a LoRA) into a checkpoint folder, and takes it out again.

The 8 GB are never rewritten in place and never in memory: a file is written anew beside the old one, the bytes of
untouched tensors copied as they are, and renamed when it is whole. The encoder goes to the end of the last weight file.
"""

import ctypes
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from voxtral.adapters import check_adapter, merged_weights
from voxtral.checkpoint import (
    ENCODER_PREFIXES,
    TORCH_DTYPES,
    Checkpoint,
    SafetensorsFile,
    Span,
    StoredTensor,
    atomic_path,
    check_shapes,
    flush,
    parse_header,
    weight_files,
    write_stored,
    write_text,
)
from voxtral.json_files import read_json, read_record, remove_json, set_json, write_json
from voxtral.layout import released_layout, withheld_layout
from voxtral.model_card import CARD, model_card
from voxtral.params import CheckpointError, ModelParams

MARKER = "encoder_blocks.injected"  # serving's request gate wants a top-level key of this prefix (spec section 7)
INDEX = "consolidated.safetensors.index.json"
RECORD = "injection.json"  # what was injected; marks a folder as written by this module
BACKUP = ".voxtral_original"  # what an in-place injection cannot find again in the new file
SAVED_TENSORS = "attention.safetensors"  # in BACKUP: the weights that a LoRA was merged into


# ---------------------------------------------------------------- injecting


def inject(checkpoint, encoder, lora=None, output=None, weights=None) -> Path:
    """Writes `checkpoint` with the encoder (fp32 .safetensors, full tensor names), the peft adapter folder `lora`
    merged into the attention, and the tensors of the file `weights` (checkpoint names) in the place of its own, to the
    folder `output`; None: in place, from where eject() restores it.

    An earlier injection is replaced, not added to; CARD, a Markdown file, says what was injected. Returns the folder
    written. Raises CheckpointError, before anything is written, when something does not fit. A kill at any moment
    leaves the old checkpoint or the new one.
    """
    source = Checkpoint(checkpoint)
    folder = source.folder
    layout = released_layout(source.params)
    check_shapes({name: shape for name, shape in source.shapes.items() if name in layout}, layout, folder)
    originals = original_files(folder)
    record = read_record(folder / RECORD)
    merged = record.get("lora") or record.get("weights")
    if merged and source.encoder_names and not (folder / BACKUP).is_dir():
        raise CheckpointError(f"{folder} already has {merged} in it: inject into the checkpoint that it was made from.")
    changes = encoder_changes(encoder, source.params)
    if lora is not None:
        check_adapter(lora, encoder)
        changes |= merged_weights(lora, stored_tensors(originals), source.params)
    if weights is not None:
        if output is None:
            raise CheckpointError(f"{weights} replaces more than an injection in place can undo: use --output.")
        changes |= weight_changes(weights, stored_tensors(originals))
    targets = [changed(original, changes, last=original is originals[-1]) for original in originals]
    files = {"encoder": encoder, "lora": lora, "weights": weights}
    record = json.dumps({what: path and str(path) for what, path in files.items()}, indent=2) + "\n"
    notes = {RECORD: record, CARD: model_card(encoder, lora, weights, in_place=output is None)}
    if output is None:
        _inject_in_place(source, originals, targets, notes)
        return folder
    _inject_to(Path(output), source, targets, notes)
    return Path(output)


def _inject_to(output: Path, source: Checkpoint, targets: list["Weights"], notes: dict[str, str]) -> None:
    """Fills a sibling of `output`, which takes its name when it is whole."""
    folder = source.folder
    check_replaceable(output, folder)
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    untouched = [target.path for target in targets if target.is_untouched]
    written = {INDEX, BACKUP, "params.json", *notes, *(target.path.name for target in targets)}
    others = [path for path in folder.iterdir() if path.name not in written and not path.name.endswith(".tmp")]
    linkable = os.stat(folder).st_dev == os.stat(output.parent).st_dev
    size = sum(target.size for target in targets if not (linkable and target.is_untouched))
    check_space(output.parent, size + (0 if linkable else sum(map(tree_size, others))))

    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    temporary.mkdir()
    try:
        for path in [*others, *untouched]:
            link_or_copy(path, temporary / path.name)
        for target in targets:
            if not target.is_untouched:
                target.write(temporary / target.path.name)
        write_index(folder, temporary, targets)
        for name, text in notes.items():
            write_text(temporary / name, text)
        write_text(temporary / "params.json", set_json(read_json(folder / "params.json")[0], [MARKER], True))
        flush(temporary)
        if output.is_dir() and any(output.iterdir()):
            exchange(output, temporary)
        else:
            os.replace(temporary, output)
        flush(output.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _inject_in_place(
    source: Checkpoint, originals: list["Weights"], targets: list["Weights"], notes: dict[str, str]
) -> None:
    """The rename of the one weight file that changes is the moment of the change. Before it the backup is whole; if the
    process ends after it but before the marker is written, the next run writes the marker."""
    folder = source.folder
    pairs = [(old, new) for old, new in zip(originals, targets) if not new.is_untouched]
    if len(pairs) > 1:
        raise CheckpointError(
            f"{folder} has several shards that would change, which in place cannot happen in one moment: use --output."
        )
    ((original, target),) = pairs
    have_backup = bool(source.encoder_names)
    if have_backup and original.is_untouched:
        raise CheckpointError(f"{folder} holds an encoder, but not the original it was put into: use --output.")
    remove_leftovers(folder, target.path.name)
    merging = any(target.items[name] is not item for name, item in original.items.items() if name in target.items)
    to_save = {}
    if merging and not (have_backup and (folder / BACKUP / SAVED_TENSORS).is_file()):
        # All of the attention, so that a later LoRA of other projections finds it complete.
        attention = re.compile(r"layers\.\d+\.attention\.w.\.weight")
        to_save = {name: item for name, item in original.items.items() if attention.fullmatch(name)}
    check_space(folder, target.size + sum(item.size for item in to_save.values()))
    if not have_backup:
        temporary = folder / f"{BACKUP}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        with atomic_path(temporary / f"{target.path.name}.header") as path:
            path.write_bytes(original.header)
        if (folder / INDEX).is_file():
            shutil.copy(folder / INDEX, temporary / INDEX)
            flush(temporary / INDEX)
        shutil.rmtree(folder / BACKUP, ignore_errors=True)  # without an encoder in the weights it is out of date
        os.replace(temporary, folder / BACKUP)
        flush(folder)
    if to_save:
        write_stored(folder / BACKUP / SAVED_TENSORS, to_save)
    for name, text in notes.items():
        write_text(folder / name, text)
    target.write(target.path)
    write_index(folder, folder, targets)
    write_text(folder / "params.json", set_json(read_json(folder / "params.json")[0], [MARKER], True))


def eject(checkpoint) -> Path:
    """Undoes an in-place injection: weights and params.json are again what they were, byte for byte (voices that were
    registered since stay). Returns the folder. Raises CheckpointError when there is no original to go back to."""
    folder = Checkpoint(checkpoint).folder
    backup = folder / BACKUP
    if not backup.is_dir():
        raise CheckpointError(
            f"{folder} holds no original ({BACKUP}) to go back to: only an injection --in-place can be ejected."
        )
    originals = [original for original in original_files(folder) if not original.is_untouched]
    check_space(folder, sum(original.size for original in originals))
    text, params = read_json(folder / "params.json")
    if MARKER in params:  # first: weights with an encoder but no marker are a sound checkpoint, the reverse is not
        write_text(folder / "params.json", remove_json(text, [MARKER]))
    for original in originals:
        remove_leftovers(folder, original.path.name)
        original.write(original.path)
    if (backup / INDEX).is_file():
        with atomic_path(folder / INDEX) as temporary:
            shutil.copy(backup / INDEX, temporary)
    for name in (RECORD, CARD):
        (folder / name).unlink(missing_ok=True)
    os.replace(backup, folder / f"{BACKUP}.tmp")
    shutil.rmtree(folder / f"{BACKUP}.tmp")
    return folder


# ---------------------------------------------------------------- weight files as lists of tensors


@dataclass
class Weights:
    """A .safetensors file as it should be. `header`: its first bytes, when they are to be these and no others."""

    path: Path  # where it lies in the source folder
    items: dict[str, StoredTensor]  # in the order of the data
    metadata: dict | None
    header: bytes | None
    is_untouched: bool  # the file at `path` is it already

    @property
    def size(self) -> int:
        return sum(item.size for item in self.items.values())

    def write(self, path) -> None:
        """Streams the file to `path`, atomically."""
        write_stored(path, self.items, self.metadata, self.header)


def original_files(folder) -> list[Weights]:
    """The weight files of a checkpoint as they were before an in-place injection, if there was one.

    A file without encoder tensors is an original. Raises CheckpointError for a backup that does not belong to its file.
    """
    originals = []
    for path in weight_files(folder):
        current = SafetensorsFile(path)
        kept = Path(folder) / BACKUP / f"{path.name}.header"
        holders, entries, metadata = [current], current.entries, current.metadata
        with path.open("rb") as file:
            header = file.read(current.data_start)
        restoring = kept.is_file() and any(name.startswith(ENCODER_PREFIXES) for name in entries)
        if restoring:
            header = kept.read_bytes()
            metadata, entries = parse_header(header[8:])
            saved = kept.parent / SAVED_TENSORS
            holders = ([SafetensorsFile(saved)] if saved.is_file() else []) + holders
        items = {}
        for name, entry in entries.items():
            holder = next((holder for holder in holders if name in holder.entries), None)
            if holder is None or any(holder.entries[name][key] != entry[key] for key in ("dtype", "shape")):
                raise CheckpointError(
                    f"{path} is not the file that {kept.parent} was kept for ({name}): "
                    f"delete {kept.parent} and download the checkpoint again."
                )
            begin, end = holder.entries[name]["data_offsets"]
            items[name] = StoredTensor(
                entry["dtype"], entry["shape"], Span(holder.path, holder.data_start + begin, end - begin)
            )
        originals.append(Weights(path, items, metadata, header, is_untouched=not restoring))
    return originals


def stored_tensors(files: list[Weights]) -> dict[str, StoredTensor]:
    return {name: item for file in files for name, item in file.items.items()}


def changed(original: Weights, changes: dict[str, StoredTensor], last: bool) -> Weights:
    """`original` with the items of `changes` of the same name; an encoder goes to the end of the last file."""
    items = {
        name: changes.get(name, item) for name, item in original.items.items() if not name.startswith(ENCODER_PREFIXES)
    }
    if last:
        items |= {name: item for name, item in changes.items() if name.startswith(ENCODER_PREFIXES)}
    if items == original.items:
        return original
    return Weights(original.path, items, original.metadata, header=None, is_untouched=False)


# ---------------------------------------------------------------- what changes


def encoder_changes(path, params: ModelParams) -> dict[str, StoredTensor]:
    """The encoder's tensors, bf16. Raises CheckpointError unless all are there, fit, are finite and not all zero."""
    file = SafetensorsFile(path)
    layout = withheld_layout(params)
    check_shapes({name: tuple(entry["shape"]) for name, entry in file.entries.items()}, layout, path)
    for name in layout:
        tensor = file.tensor(name)
        extremes = torch.stack(tensor.aminmax()).bfloat16()
        if not tensor.is_floating_point() or not extremes.isfinite().all():  # NaN is an extreme, too
            raise CheckpointError(
                f"{path}: {name} holds values that are no finite numbers: use an earlier encoder of the run."
            )
        if not extremes.any():
            raise CheckpointError(f"{path}: {name} is all zero: this is no trained encoder.")
    return {
        name: StoredTensor("BF16", list(shape), lambda name=name: file.tensor(name).bfloat16())
        for name, shape in layout.items()
    }


def weight_changes(path, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Tensors of phase 2 besides LoRA and encoder, in their stored dtypes. Raises CheckpointError for one that the
    checkpoint does not have or that holds no finite numbers."""
    file, changes = SafetensorsFile(path), {}
    for name, entry in file.entries.items():
        if name not in stored or list(stored[name].shape) != entry["shape"] or name.startswith(ENCODER_PREFIXES):
            raise CheckpointError(
                f"{path}: {name} {entry['shape']} is no tensor that the checkpoint has: pass the "
                "weights.safetensors of its phase 2."
            )
        if not file.tensor(name).isfinite().all():
            raise CheckpointError(f"{path}: {name} holds values that are no finite numbers.")
        dtype = stored[name].dtype
        changes[name] = StoredTensor(
            dtype, entry["shape"], lambda name=name, dtype=dtype: file.tensor(name).to(TORCH_DTYPES[dtype])
        )
    return changes


# ---------------------------------------------------------------- files and folders


def write_index(source: Path, folder: Path, weights: list[Weights]) -> None:
    """The index of sharded weights, where the source has one."""
    if not (source / INDEX).is_file():
        return
    index = read_json(source / INDEX)[1]
    index["weight_map"] = {name: part.path.name for part in weights for name in part.items}
    if "total_size" in index.get("metadata", {}):
        index["metadata"]["total_size"] = sum(part.size for part in weights)
    write_json(folder / INDEX, index)


def check_replaceable(output: Path, source: Path) -> None:
    """Raises CheckpointError unless `output` is new, empty, or was written by inject()."""
    if output.resolve().is_relative_to(source.resolve()) or source.resolve().is_relative_to(output.resolve()):
        raise CheckpointError(
            f"--output {output} and the checkpoint {source} lie in each other: choose another "
            "folder, or use --in-place."
        )
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"--output {output} is a file: name a folder.")
    if output.is_dir() and any(output.iterdir()) and (not (output / RECORD).is_file() or (output / BACKUP).exists()):
        raise CheckpointError(
            f"--output {output} holds files that are not of an earlier --output: choose another folder."
        )


def check_space(folder: Path, n_bytes: int) -> None:
    """Raises CheckpointError unless the disk of `folder` has room for this much, and a little more."""
    free, needed = shutil.disk_usage(folder).free, n_bytes + 2**26
    if free < needed:
        raise CheckpointError(
            f"{folder} needs {needed / 1e9:.1f} GB of disk for a second copy, but {free / 1e9:.1f} "
            "GB are free: make room, or write to another disk with --output."
        )


def tree_size(path: Path) -> int:
    return sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())


def link_or_copy(source, destination) -> None:
    """A file, or a folder of files, without a second copy of the bytes where the file system allows it."""
    source = Path(source).resolve()  # not the links that a download cache consists of
    if source.is_dir():
        shutil.copytree(source, destination, copy_function=link_or_copy)
        return
    try:
        os.link(source, destination)
    except OSError:  # another disk, or a file system without hard links
        shutil.copy2(source, destination)
        flush(destination)


def remove_leftovers(folder: Path, name: str) -> None:
    """Temporary copies of `name` that a killed run left."""
    for path in folder.glob(f".{name}.*.tmp"):
        path.unlink()


def exchange(first: Path, second: Path) -> None:
    """Swaps the names of two folders in one moment (Linux, renameat2). With two renames in its place a program that
    read the folder meanwhile found none in 17,983 of 68,054 reads, with this in none of 54,313."""
    here, rename_exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    library = ctypes.CDLL(None, use_errno=True)
    names = here, os.fsencode(first), here, os.fsencode(second)
    if not hasattr(library, "renameat2") or library.renameat2(*names, rename_exchange):
        raise CheckpointError(
            f"this system cannot replace the folder {first} in one moment "
            f"({os.strerror(ctypes.get_errno())}): remove it first."
        )
