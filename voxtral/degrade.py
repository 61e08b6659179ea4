"""Known degradations of speech: rows that tell whether scores order what ears order."""

import io
from collections.abc import Callable
from functools import partial

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor

from voxtral.audio import SAMPLE_RATE

BAND_LIMIT_RATE = 16000  # Hz: nothing above 8 kHz is left
OPUS_KBPS = (24, 12, 6)
NOISE_DB = (30, 20, 10)  # speech over noise


def band_limit(waveform: Tensor) -> Tensor:
    """[T] -> [T], resampled to 16 kHz and back."""
    low = soxr.resample(waveform.numpy(), SAMPLE_RATE, BAND_LIMIT_RATE, quality="HQ")
    return fit(soxr.resample(low, BAND_LIMIT_RATE, SAMPLE_RATE, quality="HQ"), len(waveform))


def opus(waveform: Tensor, kbps: float) -> Tensor:
    """[T] -> [T] through Opus at a nominal rate of 6 to 256 kbit/s.

    libsndfile has no bit rate for Opus (and refuses bitrate_mode), but maps compression_level 1 ... 0 to these rates,
    linearly; measured files are 2 kbit/s larger, from the container.
    """
    data = io.BytesIO()
    soundfile.write(
        data, waveform.numpy(), SAMPLE_RATE, format="OGG", subtype="OPUS", compression_level=1 - (kbps - 6) / 250
    )
    data.seek(0)
    return fit(soundfile.read(data, dtype="float32")[0], len(waveform))


def white_noise(waveform: Tensor, ratio_db: float) -> Tensor:
    """[T] -> [T] plus white noise, `ratio_db` below the clip's power; the same noise in each call."""
    noise = torch.randn(len(waveform), generator=torch.Generator().manual_seed(0))
    return waveform + noise * waveform.square().mean().sqrt() * 10 ** (-ratio_db / 20)


def fit(audio: np.ndarray, length: int) -> Tensor:
    """[n] -> float32 [length], cut or padded with zeros."""
    audio = torch.from_numpy(np.ascontiguousarray(audio, dtype=np.float32))[:length]
    return torch.nn.functional.pad(audio, (0, length - len(audio)))


DEGRADATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": torch.clone,
    "band_limit_16k": band_limit,
    **{f"opus_{kbps}k": partial(opus, kbps=kbps) for kbps in OPUS_KBPS},
    **{f"noise_{ratio}db": partial(white_noise, ratio_db=ratio) for ratio in NOISE_DB},
}
# From better to worse: what a score must not turn round.
CHAINS = {
    "band": ["identity", "band_limit_16k"],
    "opus": ["identity", *(f"opus_{kbps}k" for kbps in OPUS_KBPS)],
    "noise": ["identity", *(f"noise_{ratio}db" for ratio in NOISE_DB)],
}


def order(values: dict[str, float], higher_is_better: bool) -> dict[str, str]:
    """Averages of a score by degradation -> for each chain "right" (every step is for the worse), "tie" (a step makes
    no difference, none is for the better) or "wrong"."""
    sign = 1 if higher_is_better else -1
    verdicts = {}
    for name, chain in CHAINS.items():
        steps = [sign * (values[a] - values[b]) for a, b in zip(chain, chain[1:])]
        verdicts[name] = "right" if min(steps) > 0 else "tie" if min(steps) == 0 else "wrong"
    return verdicts
