"""Known codes of clips that the model has spoken: files of generate_clips.py and python -m voxtral.clips."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from voxtral.audio import BadClip, load_segment
from voxtral.errors import reason_of
from voxtral.params import CodecParams
from voxtral.sources import Clip, DataError

MAX_CLIPS = 2000  # spread over a folder; more do not change the statistics


def read_codes(path: str, params: CodecParams) -> Tensor:
    """-> codes [1 + acoustic_dim, L] int64 of a generated clip. Raises BadClip."""
    try:
        codes = torch.from_numpy(np.load(path, allow_pickle=False).astype(np.int64))
    except Exception as error:  # numpy reads the header as Python, and can raise what Python can
        raise BadClip(path, f"unreadable codes ({reason_of(error)})") from error
    if codes.ndim != 2 or len(codes) != params.n_codebooks or not codes.shape[1]:
        raise BadClip(path, f"codes of shape {list(codes.shape)}, not [{params.n_codebooks}, frames]")
    largest = codes[0].max() < params.semantic_codebook_size and codes[1:].max() < params.acoustic_codebook_size
    if codes.min() < 0 or not largest:
        raise BadClip(path, "codes outside the codebooks of this checkpoint")
    return codes


def codes_of_clips(clips: list[Clip], batches: list, params: CodecParams) -> tuple[list[Tensor | None], list]:
    """Of validation_batches(): the codes that each clip was decoded from, or None; (path, reason) of the bad ones."""
    found, bad = [], []
    for batch in batches:
        for index, length in zip(batch.indices, batch.lengths.tolist()):
            codes = None
            if clips[index].codes:
                try:
                    codes = read_codes(clips[index].codes, params)
                    if length not in (codes.shape[1] * params.frame_size, batch.waveform.shape[-1]):
                        raise BadClip(clips[index].codes, f"{codes.shape[1]} frames are not the length of its clip")
                except BadClip as error:
                    codes = bad.append((clips[index].codes, error.reason))
            found.append(codes)
    return found, bad


def read_coded(clip: Clip, params: CodecParams, max_frames: int | None = None) -> tuple[Tensor, np.ndarray]:
    """-> codes [1 + acoustic_dim, L] int64 of a generated clip, and its audio [L * frame_size] float32; of a long one
    the first max_frames. Raises BadClip, also when they do not belong together."""
    codes = read_codes(clip.codes, params)
    n_frames = min(codes.shape[1], max_frames or codes.shape[1])
    n_samples, is_cut = n_frames * params.frame_size, n_frames < codes.shape[1]
    waveform, _ = load_segment(clip.path, 0.0, (n_samples + params.frame_size) / params.sampling_rate)
    if len(waveform) != n_samples + is_cut * params.frame_size:
        raise BadClip(clip.path, f"its codes do not belong to it: {codes.shape[1]} frames are not its length")
    return codes[:, :n_frames], waveform[:n_samples]


def known_codes(folder: str, params: CodecParams) -> tuple[list[Tensor], list[tuple[str, str]]]:
    """Codes [1 + acoustic_dim, L >= 2] from the .npy files below a folder; (path, reason) of those that cannot be used.
    Raises DataError when none can."""
    paths = sorted(Path(folder).rglob("*.npy"))
    if not paths:
        raise DataError(
            f"match.codes: {folder} holds no codes (.npy); let the model make some: python "
            f"generate_clips.py --output {folder} --per-voice 100 (a few minutes for 20 voices on a GPU), or "
            "set match.codes=presets."
        )
    codes, bad = [], []
    for path in paths[:: -(-len(paths) // MAX_CLIPS)]:
        try:
            found = read_codes(str(path), params)
        except BadClip as error:
            bad.append((str(path), error.reason))
        else:
            codes += [found] if found.shape[1] > 1 else []
    if not codes:
        reason = ": ".join(bad[0]) if bad else "all are shorter"
        raise DataError(f"match.codes: {folder} has no codes of two frames or more ({reason}).")
    return codes, bad
