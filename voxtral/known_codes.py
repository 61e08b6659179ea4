"""Known codes, of clips that the model has spoken (generate_clips.py, python -m voxtral.clips): read from the files
beside them, and the loss that holds what an encoder makes of speech to their statistics (not in the paper).

Many latents make the frozen decoder say the same; sound alone does not tell which of them the true encoder would have
chosen. But the checkpoint's presets can be turned back into its codes (presets.py), and clips that the model has spoken
come with theirs (generate_clips.py). Those show how the true encoder's codes are distributed: level by level, with each
other, and from frame to frame. No clip is compared with its own codes, so the encoder cannot learn to read traces of
the decoder in place of speech.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
from torch import Tensor

from voxtral.audio import BadClip, load_segment
from voxtral.checkpoint import atomic_path
from voxtral.clip_list import Clip
from voxtral.codec import CodecOutput, VoxtralCodec, valid_mask
from voxtral.errors import DataError, reason_of
from voxtral.params import CodecParams

MAX_CLIPS = 2000  # spread over a folder; more do not change the statistics
DECAY = 0.9  # of the running statistics, per micro-batch
COVARIANCE_WEIGHT = 3.0  # against the means
PRESETS = "presets"  # as match.codes: those of the checkpoint's presets


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


def write_codes(path, codes: Tensor) -> None:
    """[1 + acoustic_dim, L], for read_codes(); atomic."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, codes.numpy().astype(np.int16))


def codes_of_clips(clips: list[Clip], batches: list, params: CodecParams) -> tuple[list[Tensor | None], list]:
    """Of validation_batches(): the codes that each clip was decoded from, or None; (path, reason) of the bad ones."""
    found, bad = [], []
    for batch in batches:
        for index, length in zip(batch.indices, batch.lengths.tolist()):
            path, codes = clips[index].codes, None
            try:
                codes = read_codes(path, params) if path else None
                if path and length not in (codes.shape[1] * params.frame_size, batch.waveform.shape[-1]):
                    raise BadClip(path, f"{codes.shape[1]} frames are not the length of its clip")
            except BadClip as error:
                codes = None
                bad.append((path, error.reason))
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


# ---------------------------------------------------------------- their statistics


@dataclass
class MatchConfig:
    codes: str = PRESETS  # or a folder of codes (.npy), as generate_clips.py and python -m voxtral.clips write them


def pair_sums(frames: Tensor, valid: Tensor) -> list[Tensor]:
    """Frames [B, D, L], which of them count [B, L] -> of two frames that follow each other: number of such pairs, their
    sum [2 D], the sum of their outer products [2 D, 2 D]."""
    pairs = torch.cat([frames[..., :-1], frames[..., 1:]], dim=1).transpose(1, 2)  # [B, L - 1, 2 D]
    weight = (valid[:, :-1] & valid[:, 1:]).to(frames.dtype)[..., None]
    return [weight.sum(), (weight * pairs).sum(dim=(0, 1)), torch.einsum("blc,bld->cd", weight * pairs, pairs)]


def mean_and_covariance(count: Tensor, total: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """Of what pair_sums() gives; zeros without a pair."""
    mean = total / count.clamp(min=1)
    return mean, square / count.clamp(min=1) - mean[:, None] * mean


class CodeMatching:
    """The loss; a part of the run state: it keeps running statistics, since a batch alone is too few frames."""

    def __init__(self, codes: list[Tensor], codec: VoxtralCodec, device):
        """codes: of known clips, [1 + acoustic_dim, L] each."""
        self.quantizer = codec.quantizer
        seen = [self.quantizer.decode(one[None]).double() for one in codes]  # [1, D, L]
        together = torch.cat([one[0] for one in seen], dim=1)
        mean = together.mean(dim=1)[:, None]
        self.mean = mean.float().to(device)  # [D, 1]
        self.deviation = together.std(dim=1).clamp(min=1e-4)[:, None].float().to(device)  # [D, 1]
        every = torch.ones(1, max(one.shape[-1] for one in seen), dtype=torch.bool)
        sums = [pair_sums((one - mean) / self.deviation.cpu(), every[:, : one.shape[-1]]) for one in seen]
        self.target = tuple(part.float().to(device) for part in mean_and_covariance(*map(sum, zip(*sums))))
        self.running = tuple(map(torch.zeros_like, self.target))
        self.steps = 0

    def __call__(self, output: CodecOutput, n_frames: Tensor) -> Tensor:
        """Squared distance of the statistics of what the decoder would see, quantized with straight-through gradient,
        in units of the known codes' deviation: mean over channels, and over pairs of channels times
        COVARIANCE_WEIGHT."""
        quantized = self.quantizer.straight_through(self.quantizer.squash(output.latent), output.codes)  # [B, D, L]
        normalized = (quantized - self.mean) / self.deviation
        sums = pair_sums(normalized, valid_mask(n_frames, output.codes.shape[-1]))
        if dist.is_initialized():
            sums = [dist_nn.all_reduce(part) for part in sums]
        keep = min(DECAY, 1 - 1 / (self.steps + 1))  # a plain average at first
        averaged = [keep * before + (1 - keep) * new for before, new in zip(self.running, mean_and_covariance(*sums))]
        self.running, self.steps = tuple(part.detach() for part in averaged), self.steps + 1
        mean, covariance = ((part - wanted).square().mean() for part, wanted in zip(averaged, self.target))
        loss = mean + COVARIANCE_WEIGHT * covariance
        # The gradient reaches this batch's share of the average only: as large as if all of it were this batch.
        return loss.detach() + (loss - loss.detach()) / (1 - keep)

    def state_dict(self) -> dict:
        return {"running": self.running, "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        self.running = tuple(part.to(self.mean.device) for part in state["running"])
        self.steps = state["steps"]
