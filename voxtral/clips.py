"""Clips that the model itself speaks, as training data: which ones, which are fit, and a folder that survives a kill.
`python -m voxtral.clips` makes such a folder of recordings.

A clip is FOLDER/VOICE/00012.flac with its codes in 00012.npy (int16 [37, L]). It counts once its line stands in
records-RANK.jsonl, which comes last. manifest.jsonl lists the clips that were kept.
"""

import os
import random
import zlib
from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from multiprocessing.pool import ThreadPool
from pathlib import Path

from voxtral.command_line import script_parser

COMMAND_LINE = script_parser(__doc__, module="voxtral.clips")
option = COMMAND_LINE.add_argument
option("--checkpoint", required=True, metavar="DIR", help="folder of a checkpoint with its encoder")
option("--data", required=True, metavar="CONFIG.yaml", help="its data: block is read")
option("--output", required=True, metavar="DIR", help="folder of clips and manifest.jsonl")
option("--max-sec", type=float, default=10.0, help="longer recordings are cut (default: 10)")
option("overrides", nargs="*", metavar="data.key=value", help="changes to the config")

if __name__ == "__main__":
    COMMAND_LINE.parse_intermixed_args()  # --help and mistyped options: before imports that take seconds

import numpy as np
import soundfile
import torch
from filelock import FileLock
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from voxtral.audio import BadClip, load_segment
from voxtral.checkpoint import atomic_path, write_text
from voxtral.clip_list import Clip
from voxtral.codec import VoxtralCodec, ceil_div
from voxtral.data import read_config
from voxtral.errors import UserError, one_sentence, shown
from voxtral.known_codes import write_codes
from voxtral.paths import file_name, is_inside
from voxtral.remarks import Remarks
from voxtral.sources import find_clips
from voxtral.tables import json_line, read_json_lines
from voxtral.tts import Take

MIN_SEC = 0.4  # less is no sentence
SILENT_DBFS = -50.0  # level of the whole clip; speech is around -25
RECORDED = {"name", "voice", "language", "text", "seed", "seconds", "dropped"}
MAX_SAME_FRAMES = 25  # 2 s of one semantic code: the model is stuck; pauses between words are shorter


@dataclass(frozen=True)
class PlannedClip:
    """`name`: VOICE/NUMBER, a path without suffix in the folder that file_name() makes of the voice; `seed`: what the
    noise hangs on."""

    name: str
    voice: str
    language: str
    text: str
    seed: tuple[int, ...]


def plan(voices: list[str], sentences: list[tuple[str, str]], per_voice: int, seed: int) -> list[PlannedClip]:
    """per_voice clips of every voice. More voices or more clips extend a plan, and change nothing that was in it.

    Voices named like de_female speak the sentences of their language, all others English, besides those without a
    language; where there are none of these, a voice speaks all. After the last sentence the first one comes again,
    with other noise.
    """
    languages = {language for language, _ in sentences}
    clips = []
    for voice in voices:
        prefix = voice.partition("_")[0]
        spoken = {"", prefix if prefix in languages else "en"}
        texts = [sentence for sentence in sentences if sentence[0] in spoken] or sentences
        key = zlib.crc32(voice.encode())
        for number in range(per_voice):
            turn, place = divmod(number, len(texts))
            order = random.Random(f"{seed}/{voice}/{turn}").sample(range(len(texts)), len(texts))
            language, text = texts[order[place]]
            clips.append(PlannedClip(f"{file_name(voice)}/{number:05d}", voice, language, text, (seed, key, number)))
    return clips


def defect(take: Take, samples: Tensor, sample_rate_hz: int) -> str:
    """What makes a clip unfit for training; empty: nothing. samples: [L * 1920] of the take's codes [37, L]."""
    if not take.ended:
        return "no END_AUDIO"
    if len(samples) < MIN_SEC * sample_rate_hz:
        return "too short"
    if longest_run(take.codes[0]) > MAX_SAME_FRAMES:
        return "repeated frames"
    if not samples.square().mean().sqrt().item() > 10 ** (SILENT_DBFS / 20):  # nor NaN
        return "silence"
    return ""


def longest_run(values: Tensor) -> int:
    """[L] -> length of the longest stretch of equal values."""
    return max((len(list(run)) for _, run in groupby(values.tolist())), default=0)


class ClipFolder:
    """The output folder, for one of several processes. `records`: name -> what became of a clip, of all processes that
    ever wrote here."""

    def __init__(self, path, rank: int = 0):
        self.path, self.own = Path(path), Path(path) / f"records-{rank}.jsonl"
        self.path.mkdir(parents=True, exist_ok=True)
        if self.own.is_file():  # a kill may have left half a line at the end
            written = self.own.read_bytes()
            os.truncate(self.own, written.rfind(b"\n") + 1)
        self.records = self._read()

    def _read(self) -> dict[str, dict]:
        """Lines that are no record, such as one that a kill cut short, do not count: those clips are made again."""
        rows = (row for path in sorted(self.path.glob("records-*.jsonl")) for row in read_json_lines(path, Remarks()))
        return {row["name"]: row for row in rows if RECORDED <= row.keys() and is_inside(row["name"])}

    def missing(self, clips: list[PlannedClip]) -> list[PlannedClip]:
        """Those without a record. Raises UserError when the folder was begun with other sentences or another seed."""
        for clip in clips:
            record = self.records.get(clip.name)
            if record and (record["text"], record["seed"]) != (clip.text, list(clip.seed)):
                raise UserError(
                    f"{self.path} was begun with other sentences or another seed ({clip.name} differs): go "
                    "on with the same ones, or choose another --output."
                )
        return [clip for clip in clips if clip.name not in self.records]

    def save_audio(self, clip: PlannedClip, codes: Tensor, samples: Tensor, sample_rate_hz: int) -> None:
        """Codes [37, L] and samples [L * 1920], each file atomically."""
        with atomic_path(self.path / f"{clip.name}.flac") as temporary:
            soundfile.write(temporary, samples.clamp(-1, 1).numpy(), sample_rate_hz, format="FLAC", subtype="PCM_16")
        write_codes(self.path / f"{clip.name}.npy", codes)

    def record(self, clips: list[PlannedClip], defects: list[str], seconds: list[float]) -> None:
        """Once their files are whole. A clip with a defect is recorded too, and not made again."""
        rows = [
            {**vars(clip), "seed": list(clip.seed), "seconds": round(length, 2), "dropped": reason}
            for clip, reason, length in zip(clips, defects, seconds)
        ]
        with self.own.open("a", encoding="utf-8") as file:
            file.write("".join(map(json_line, rows)))
            file.flush()
            os.fsync(file.fileno())
        self.records.update((row["name"], row) for row in rows)

    def write_manifest(self) -> Counter:
        """manifest.jsonl of all kept clips so far, of all processes; returns how many were dropped, by reason."""
        with FileLock(self.path / ".lock"):  # who comes last has seen every record
            self.records = self._read()
            kept = [row for _, row in sorted(self.records.items()) if not row["dropped"]]
            manifest = (
                {"path": f"{row['name']}.flac", "codes": f"{row['name']}.npy"}
                | {key: row[key] for key in ("voice", "language", "text", "seconds")}
                for row in kept
            )
            write_text(self.path / "manifest.jsonl", "".join(map(json_line, manifest)))
        return Counter(row["dropped"] for row in self.records.values() if row["dropped"])


# ---------------------------------------------------------------- without a model that speaks


@torch.no_grad()
def resynthesize(codec: VoxtralCodec, clips: list[Clip], path, max_sec: float) -> None:
    """Recordings -> a folder as generate_clips.py writes it: the codes that the codec's own encoder gives, and what its
    decoder makes of them. For checkpoints whose true encoder is known, but whose language model cannot speak."""
    folder, rows = ClipFolder(path), []
    for number, clip in enumerate(clips):
        try:
            waveform, _ = load_segment(clip.path, 0.0, max_sec)
        except BadClip as error:
            print(shown(f"left out: {error}"))
            continue
        codes = codec.encode(torch.from_numpy(waveform)[None, None].to(codec.audio_embedding.device))
        planned = PlannedClip(f"{file_name(clip.speaker)}/{number:05d}", clip.speaker, "", clip.text, (0,))
        folder.save_audio(planned, codes[0].cpu(), codec.decode(codes)[0, 0].cpu(), codec.params.sampling_rate)
        rows.append((planned, codes.shape[-1] / codec.params.frame_rate_hz))
    folder.record([clip for clip, _ in rows], [""] * len(rows), [seconds for _, seconds in rows])
    folder.write_manifest()


@torch.no_grad()
def encode_speech(
    codec: VoxtralCodec,
    clips: list[Clip],
    held_out: set[str],
    path,
    max_sec: float,
    speeds: list[float],
    offsets_ms: list[float],
) -> None:
    """Recordings -> FOLDER/SPEAKER/NUMBER_SPEED_OFFSET.npy, the codes that the codec's own encoder gives, and
    manifest.jsonl, once all are there. For training a language model.

    Each clip is played at every speed, each a speaker of its own, and begun at every offset, which moves it against the
    frame grid; clips whose path is in `held_out` as they are only. The codes stand beside no audio.
    """
    folder, rate = Path(path), codec.params.sampling_rate

    def read(clip: Clip) -> list[tuple[float, float, np.ndarray]] | BadClip:
        try:
            if clip.path in held_out:
                return [(1.0, 0.0, load_segment(clip.path, 0.0, max_sec)[0])]
            return [
                (speed, offset, waveform[round(offset * rate / 1000) :])
                for speed in speeds
                for waveform in [load_segment(clip.path, 0.0, max_sec, speed)[0]]
                for offset in offsets_ms
            ]
        except BadClip as error:
            return error

    rows, device = [], codec.audio_embedding.device
    with ThreadPool(os.cpu_count()) as pool:
        all_played = tqdm(pool.imap(read, clips), "encoding", len(clips), disable=None)
        for number, (clip, played) in enumerate(zip(clips, all_played)):
            if isinstance(played, BadClip):
                print(shown(f"left out: {played}"))
                continue
            lengths = torch.tensor([len(waveform) for *_, waveform in played], device=device)
            waveforms = pad_sequence([torch.from_numpy(waveform) for *_, waveform in played], batch_first=True)
            codes = codec.encode(waveforms[:, None].to(device), lengths).to("cpu", torch.int16).numpy()
            speaker = file_name(clip.speaker)
            (folder / speaker).mkdir(parents=True, exist_ok=True)
            n_frames = ceil_div(lengths, codec.params.frame_size).tolist()
            for (speed, offset, _), one, length in zip(played, codes, n_frames):
                name = f"{speaker}/{number:05d}_{speed:g}_{offset:g}.npy"
                np.save(folder / name, one[:, :length])
                voice = clip.speaker if speed == 1 else f"{clip.speaker}@{speed:g}"
                rows.append({"path": str(Path(clip.path).absolute()), "codes": name, "text": clip.text, "voice": voice})
    write_text(folder / "manifest.jsonl", "".join(map(json_line, rows)))


def main(arguments=None) -> None:
    options = COMMAND_LINE.parse_intermixed_args(arguments)
    with one_sentence():
        codec = VoxtralCodec.from_checkpoint(options.checkpoint)
        if not codec.has_encoder:
            raise UserError(f"{options.checkpoint} has no encoder: put one in with inject_encoder.py.")
        sources, left_out = find_clips(read_config(options.data, options.overrides))
        print("".join(f"{line}\n" for line in left_out), end="")
        resynthesize(codec, [clip for source in sources for clip in source], options.output, options.max_sec)


if __name__ == "__main__":
    main()
