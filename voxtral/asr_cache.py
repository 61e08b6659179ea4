"""What Whisper said of each segment, kept on disk: from the second epoch on the ASR distillation costs nothing.

Clips are then cut at fixed places instead of random ones: segment k of a clip begins at k * max_sec, the last one ends
with the clip. One small file a segment; with Whisper base and 4 s about 18 KB, so 16 GB per 1,000 h.
"""

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from voxtral.asr import AsrConfig, AsrTargets, WhisperTeacher
from voxtral.audio import load_segment, read_header
from voxtral.checkpoint import digest
from voxtral.clip_list import Clip
from voxtral.codec import valid_mask
from voxtral.data import Batch, SpeechDataset, collate
from voxtral.errors import UserError
from voxtral.json_files import write_json


@dataclass
class SegmentBatch(Batch):
    """B segments, and what Whisper said of them, if that is known of all."""

    targets: AsrTargets | None
    files: list[Path]  # where the targets are kept


class AsrCache:
    """A folder of targets, all of one Whisper and one length of segments. Several processes may share it.

    Raises UserError if the folder holds those of other settings.
    """

    def __init__(self, folder: str, teacher: WhisperTeacher, config: AsrConfig, max_sec: float):
        self.folder, self.max_sec = Path(folder), max_sec
        self.max_tokens, self.width, self.dtype = teacher.max_tokens, teacher.width, teacher.dtype
        weights = teacher.model.decoder.ln.weight, teacher.model.encoder.conv1.weight
        made_with = {
            "whisper": digest(("", weight.float()) for weight in weights),
            "language": config.language,
            "context_sec": config.context_sec,
            "tokens_per_sec": config.tokens_per_sec,
            "max_sec": max_sec,
            "precision": str(self.dtype),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "made_with.json"
        with FileLock(self.folder / ".lock"):
            if not path.exists():
                write_json(path, made_with)
        before = json.loads(path.read_text())
        changed = [
            f"{key} {before.get(key)} against {value}" for key, value in made_with.items() if before.get(key) != value
        ]
        if changed:
            raise UserError(
                f"asr.teacher_cache: {folder} was made with other settings ({'; '.join(changed)}); "
                "choose another folder."
            )

    def segment(self, path: str, draw: float) -> tuple[float, Path]:
        """The segment of a clip that `draw` in [0, 1) falls on: its position for load_segment(), the file of its
        targets. Raises BadClip."""
        frames, rate, _ = read_header(path)
        wanted = math.ceil(self.max_sec * rate)
        number = int(draw * max(1, math.ceil(frames / wanted)))
        n_places = max(frames - wanted + 1, 1)  # as load_segment() counts them
        first = min(number * wanted, n_places - 1)
        key = hashlib.sha256(os.fsencode(f"{Path(path).absolute()}\n{os.stat(path).st_size}\n{number}")).hexdigest()
        return (first + 0.5) / n_places, self.folder / key[:2] / f"{key[2:34]}.npz"

    @staticmethod
    def read(file: Path) -> tuple[Tensor, Tensor] | None:
        """Hidden states [n_text, W] and alignment [n_text, n_frames], float32; None if absent or damaged."""
        try:
            with np.load(file) as arrays:
                return torch.from_numpy(arrays["hidden"]).float(), torch.from_numpy(arrays["alignment"])
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):  # any of these for a file that was cut short
            return None

    def write(self, files: list[Path], targets: AsrTargets) -> None:
        """Keeps the targets [B, ...] of segments. Waits for the device."""
        hidden, alignment = targets.hidden.to(self.dtype).cpu().numpy(), targets.alignment.cpu().numpy()
        for i, (file, n_text) in enumerate(zip(files, targets.mask.sum(dim=1).tolist(), strict=True)):
            file.parent.mkdir(exist_ok=True)
            temporary = file.with_name(f"{file.name}.{os.getpid()}.part")
            with temporary.open("wb") as opened:  # not flushed to the disk: a damaged one is made anew
                np.savez(opened, hidden=hidden[i, :n_text], alignment=alignment[i, :n_text])
            os.replace(temporary, file)

    def collate(self, items: list[dict]) -> SegmentBatch:
        """Items of SegmentDataset -> SegmentBatch."""
        return SegmentBatch(
            **vars(collate(items)),
            targets=self.targets([item["kept"] for item in items]),
            files=[item["file"] for item in items],
        )

    def targets(self, kept: list[tuple[Tensor, Tensor] | None]) -> AsrTargets | None:
        """What read() gave for a batch -> its targets, if all are there."""
        if any(one is None for one in kept):
            return None
        n_frames = kept[0][1].shape[1]
        hidden = torch.zeros(len(kept), self.max_tokens, self.width)
        alignment = torch.zeros(len(kept), self.max_tokens, n_frames)
        for i, (states, weights) in enumerate(kept):
            hidden[i, : len(states)], alignment[i, : len(weights)] = states, weights
        n_text = torch.tensor([len(states) for states, _ in kept])
        return AsrTargets(hidden, alignment, valid_mask(n_text, self.max_tokens))


class SegmentDataset(SpeechDataset):
    """Segments of clips, each with what is kept of it."""

    def __init__(self, clips: list[Clip], seed: int, cache: AsrCache):
        self.cache = cache
        super().__init__(clips, cache.max_sec, seed)

    def load(self, index: int, random: np.random.Generator) -> dict:
        """-> as SpeechDataset.load(), and file, kept."""
        path = self.clips[index].path
        position, file = self.cache.segment(path, random.random())
        return {**self.padded(*load_segment(path, position, self.max_sec)), "file": file, "kept": self.cache.read(file)}
