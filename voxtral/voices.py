"""Named voices of a checkpoint. Serving finds a voice when three places agree (spec section 7): its index in
params.json, its rows in voice_embedding/NAME.pt, and their number in tekken.json.

They are written in the order file, tekken.json, params.json, each by renaming, and a voice removed in the reverse one:
after a kill list_voices() shows what is missing, and the same command again completes it.
"""

import io
import math
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from voxtral.audio import AUDIO_SUFFIXES, CONVERT, OTHER_MEDIA
from voxtral.checkpoint import EMBEDDING_NAME, Checkpoint, SafetensorsFile, atomic_path, write_text
from voxtral.codec import VoxtralCodec
from voxtral.errors import UserError, reason_of
from voxtral.json_files import read_json, read_record, remove_json, set_json, write_json
from voxtral.layout import meta_codec
from voxtral.params import CheckpointError, ModelParams
from voxtral.paths import find_files, is_inside, no_file
from voxtral.reference import MAX_SEC, MIN_SPEECH_SEC, Reference, prepare_reference
from voxtral.refinement import reference_codes
from voxtral.remarks import Remarks

PARAMS = "params.json", ["multimodal", "audio_tokenizer_args", "voice"]  # name -> index
TEKKEN = "tekken.json", ["audio", "voice_num_audio_tokens"]  # name -> rows
RECORD = "registered_voices.json"  # name -> file it was made from, of the voices that are no presets
EMBEDDING_SUFFIXES = {".pt", ".safetensors"}
MAX_END_ERROR = 0.05  # relative; bf16 sums differ by less than 0.02, other frames by about 1


class VoiceError(UserError):
    """A voice cannot be registered or removed; the message says what to do."""


# ---------------------------------------------------------------- the three places


@dataclass
class Voice:
    """What each place says of a voice; None: nothing."""

    name: str
    index: int | None  # params.json
    n_tokens: int | None  # tekken.json
    n_rows: int | None  # voice_embedding/NAME.pt
    is_preset: bool

    @property
    def problem(self) -> str:
        """What keeps serving from using it; empty: nothing."""
        places = {
            "params.json": self.index,
            "tekken.json": self.n_tokens,
            "a readable voice_embedding file": self.n_rows,
        }
        missing = [place for place, value in places.items() if value is None]
        if missing:
            return f"not in {', nor in '.join(missing)}"
        if self.n_rows != self.n_tokens:
            return f"tekken.json says {self.n_tokens} rows, the file has {self.n_rows}"
        return ""


def embedding_file(folder, name: str) -> Path:
    return Path(folder) / "voice_embedding" / f"{name}.pt"


def list_voices(folder) -> list[Voice]:
    """Every voice that any of the three places knows, by index. Raises CheckpointError when one cannot be read."""
    folder = Path(folder)
    (_, indices), (_, tokens) = _read_map(folder, PARAMS), _read_map(folder, TEKKEN)
    registered = read_record(folder / RECORD)
    files = {path.stem: path for path in (folder / "voice_embedding").glob("*.pt") if not path.name.startswith(".")}
    voices = []
    for name in {**indices, **tokens, **files}:
        n_rows = None
        if name in files:
            with suppress(VoiceError):  # `problem` tells
                n_rows = len(load_pt(files[name]))
        voices.append(Voice(name, indices.get(name), tokens.get(name), n_rows, name not in registered))
    return sorted(voices, key=lambda voice: (math.inf if voice.index is None else voice.index, voice.name))


def preset_embeddings(folder) -> dict[str, Tensor]:
    """Name -> rows [L, dim], END_AUDIO's left out, of every preset that serving can use."""
    names = [voice.name for voice in list_voices(folder) if voice.is_preset and not voice.problem]
    return {name: load_pt(embedding_file(folder, name))[:-1] for name in names}


def register(folder, name: str, embedding: Tensor, source: str, force: bool = False) -> bool:
    """Makes `embedding` [N, dim] (from load_embedding or encode_reference) the voice `name`, in all three places.

    source: what the record calls its origin. Returns False when everything was so already. Raises VoiceError for a name
    that is not valid, or is a preset's and `force` is not given.
    """
    folder = Path(folder)
    check_name(folder, name, force)
    (params_text, indices), (tekken_text, tokens) = _read_map(folder, PARAMS), _read_map(folder, TEKKEN)
    registered = read_record(folder / RECORD)
    path = embedding_file(folder, name)
    data = io.BytesIO()
    torch.save(embedding.detach().to("cpu", torch.bfloat16).contiguous(), data)
    index = indices.get(name, max(indices.values(), default=-1) + 1)
    same_file = path.is_file() and path.read_bytes() == data.getvalue()
    done = [same_file, tokens.get(name) == len(embedding), name in indices]
    if registered.get(name) != source:
        # First of all, so that after a kill the voice is not taken for a preset.
        write_json(folder / RECORD, {**registered, name: source})
    if not done[0]:
        with atomic_path(path) as temporary:
            temporary.write_bytes(data.getvalue())
    if not done[1]:
        write_text(folder / "tekken.json", set_json(tekken_text, [*TEKKEN[1], name], len(embedding)))
    if not done[2]:
        write_text(folder / "params.json", set_json(params_text, [*PARAMS[1], name], index))
    return not all(done)


def remove(folder, name: str, force: bool = False) -> None:
    """Takes a voice out of all three places. Raises VoiceError when none knows it, or for a preset without `force`."""
    folder = Path(folder)
    (params_text, indices), (tekken_text, tokens) = _read_map(folder, PARAMS), _read_map(folder, TEKKEN)
    registered = read_record(folder / RECORD)
    path = embedding_file(folder, name)
    if not is_inside(f"{name}.pt") or "/" in name:
        raise VoiceError(f"'{name}' is no voice name: it would lead out of {path.parent}.")
    if name not in registered and name not in indices and name not in tokens and not path.is_file():
        raise VoiceError(f"{folder} has no voice {name}: its voices are {', '.join(indices)}.")
    if name not in registered and not force:
        raise VoiceError(f"{name} is a preset of the checkpoint: removing it needs --force.")
    if name in indices:
        write_text(folder / "params.json", remove_json(params_text, [*PARAMS[1], name]))
    if name in tokens:
        write_text(folder / "tekken.json", remove_json(tekken_text, [*TEKKEN[1], name]))
    path.unlink(missing_ok=True)
    registered.pop(name, None)
    if registered:
        write_json(folder / RECORD, registered)
    else:
        (folder / RECORD).unlink(missing_ok=True)


def check_name(folder, name: str, force: bool = False) -> None:
    """Raises VoiceError unless serving can find a voice of this name, and it is free or was registered here."""
    if not re.fullmatch(r"[a-z0-9_-]+", name):
        raise VoiceError(
            f"'{name}' is no voice name: use only a-z, 0-9, _ and - (requests are lower-cased before the look-up)."
        )
    known = {**_read_map(folder, PARAMS)[1], **_read_map(folder, TEKKEN)[1]}
    if name in known and name not in read_record(Path(folder) / RECORD) and not force:
        raise VoiceError(f"{name} is a preset of the checkpoint: choose another name, or replace it with --force.")


def _read_map(folder, place: tuple[str, list[str]]) -> tuple[str, dict[str, int]]:
    """-> the file's text, the object in it."""
    path, keys = Path(folder) / place[0], place[1]
    text, value = read_json(path)
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, dict) or not all(type(number) is int for number in value.values()):
        raise CheckpointError(f"{path} has no {'.'.join(keys)} of whole numbers: is it of a Voxtral TTS checkpoint?")
    return text, value


# ---------------------------------------------------------------- embeddings


def load_pt(path) -> Tensor:
    """The tensor in a torch.save'd file. Raises VoiceError for anything else; code in the pickle is never run."""
    if problem := no_file(path):
        raise VoiceError(f"{path} {problem}.")
    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise VoiceError(f"{path} is refused: it is no plain tensor, loading it could run code.") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise VoiceError(f"{path} cannot be read ({reason_of(error)}): it is no voice, or damaged.") from error
    if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise VoiceError(f"{path} holds a {type(tensor).__name__}: a voice is one plain tensor [N, dim].")
    return tensor


def load_embedding(path, params: ModelParams, end_row: Tensor) -> tuple[Tensor, list[str]]:
    """A .pt or .safetensors file -> (embedding [N, dim] bf16 that ends on the END_AUDIO row, notes).

    Raises VoiceError for another shape, values that are not finite, or a length that is no 1 to 25 s.
    """
    path = Path(path)
    if problem := no_file(path):
        raise VoiceError(f"voice file {path} {problem}.")
    if path.suffix.lower() == ".safetensors":
        file = SafetensorsFile(path)
        if len(file.entries) != 1:
            raise VoiceError(f"{path} holds {len(file.entries)} tensors: a voice is one tensor [N, dim].")
        (embedding,) = file.read().values()
    else:
        embedding = load_pt(path)
    if embedding.dim() != 2 or embedding.shape[1] != params.dim or not embedding.is_floating_point():
        raise VoiceError(
            f"{path} holds {list(embedding.shape)} {embedding.dtype}: this checkpoint's voices are "
            f"[N, {params.dim}] floats."
        )
    ends = len(embedding) and (embedding[-1].float() - end_row).norm() <= MAX_END_ERROR * end_row.norm()
    least, most = (math.ceil(seconds * params.codec.frame_rate_hz) + 1 for seconds in (MIN_SPEECH_SEC, MAX_SEC))
    n_rows = len(embedding) + (not ends and len(embedding) <= most)  # a missing END_AUDIO row is appended
    if not least <= n_rows <= most:  # before anything of its size is made
        raise VoiceError(
            f"{path} has {n_rows} rows: {MIN_SPEECH_SEC:.0f} to {MAX_SEC:.0f} s of reference are {least} to {most}."
        )
    if not embedding.bfloat16().isfinite().all():
        raise VoiceError(f"{path} holds values that are no finite numbers.")
    notes = []
    if not ends:
        embedding = torch.cat([embedding.float(), end_row[None]])
        notes.append("the END_AUDIO row was missing and has been appended")
    return embedding.bfloat16(), notes


def end_audio_row(folder) -> Tensor:
    """[dim] float32: what a voice embedding ends on (spec section 4)."""
    checkpoint = Checkpoint(folder)
    codec = meta_codec(checkpoint.params)
    codec.audio_embedding = checkpoint.read([EMBEDDING_NAME])[EMBEDDING_NAME].float()
    nothing = torch.zeros(1, checkpoint.params.codec.n_codebooks, 1, dtype=torch.long)
    return codec.voice_rows(nothing, n_frames=torch.tensor([0]))[0, 0]


@torch.no_grad()
def encode_reference(codec: VoxtralCodec, path, refine_sec: float = 0.0) -> tuple[Tensor, Reference]:
    """An audio file -> (embedding [N, dim], the prepared reference). refine_sec: for refined_codes(), 0: not refined.
    Raises VoiceError for a codec without encoder."""
    if not codec.has_encoder:
        raise VoiceError("the checkpoint has no encoder to make a voice of audio: put one in with inject_encoder.py.")
    reference = prepare_reference(path)
    codes, notes = reference_codes(codec, reference.waveform.to(codec.audio_embedding.device), refine_sec)
    reference.notes += notes
    return codec.voice_rows(codes)[0], reference


def voice_files(folder, remarks: Remarks) -> dict[str, Path]:
    """Voice name -> file, of a folder of embeddings and audio; what else is there is passed over, and named. Raises
    VoiceError when it holds none or a name twice."""
    folder = Path(folder)
    if not folder.is_dir():
        raise VoiceError(f"voice folder {folder} does not exist: set --voice-dir (or VOXTRAL_VOICE_DIR).")
    files = {}
    for path in map(folder.joinpath, sorted(find_files(folder, "*", remarks))):
        suffix = path.suffix.lower()
        if suffix not in AUDIO_SUFFIXES | EMBEDDING_SUFFIXES:
            reason = f"{suffix}: {CONVERT}" if suffix in OTHER_MEDIA else "no recording and no embedding"
            remarks.pass_over(reason, path.name)
        elif path.stem in files:
            raise VoiceError(f"{path} and {files[path.stem].name} would be the same voice: keep one of them.")
        else:
            files[path.stem] = path
    if not files:
        raise VoiceError("; ".join([f"{folder} holds no .pt, .safetensors or audio file", *remarks.lines()]) + ".")
    return files
