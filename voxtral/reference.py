"""Prepares a recording as a voice reference, for cloning and for registering a voice.

Serving takes any mono clip as it is; it wants 3 to 25 s of one clean speaker that end on a pause (spec section 7).
"""

import math
from dataclasses import dataclass, field

import numpy as np
import soxr
import torch
import torchaudio.functional as AF
from torch import Tensor

from voxtral.audio import SAMPLE_RATE, BadClip, read_audio
from voxtral.errors import UserError

MIN_SPEECH_SEC = 1.0  # less is refused
SHORT_SEC, MAX_SEC = 3.0, 25.0  # a shorter clip draws a warning, a longer one is cut
MAX_READ_SEC = 300.0  # of a long recording, the beginning is enough
HIGH_PASS_HZ = 70.0  # below any voice: DC, hum, handling noise
LOUDNESS_LUFS = -23.0  # EBU R 128
MAX_PEAK = 0.95  # full scale is 1; a louder gain would clip
FRAME, HOP = 480, 240  # samples: levels of 20 ms, every 10 ms
QUIET_BELOW_PEAK_DB = 40.0  # frames so far below the loudest are silence
SILENT_DB = -60.0  # dBFS; a recording without any louder frame may hold no speech
STANDS_OUT_DB = 20.0  # its loudest frame above its quiet ones: then it does
HEADROOM_BITS = 1  # filters see the recording with a peak of 0.25 to 0.5
LEAD_SEC, PAUSE_SEC = 0.1, 0.3  # silence kept before and after the speech
CUT_PAUSE_SEC = 0.25  # shortest gap between words that a long recording is cut in
MAX_CLIPPED_SHARE = 1e-4
MIN_SNR_DB = 20.0
FRAME_SAMPLES = 1920  # of a codec frame


class BadReference(UserError):
    """A recording that cannot be a reference; the message says why."""


@dataclass
class Reference:
    """`waveform` [1, 1, T] float32 at 24 kHz; `notes`: what was done to it; `warnings`: what may spoil the voice."""

    waveform: Tensor
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return self.waveform.shape[-1] / SAMPLE_RATE


def prepare_reference(path) -> Reference:
    """Any audio file that libsndfile reads -> one channel, 24 kHz, high-passed, trimmed to at most 25 s that end on a
    pause, -23 LUFS: the same at any gain of the recording.

    Raises BadReference for a file that is missing, unreadable or silent, or holds less than 1 s of speech.
    """
    try:
        native, rate, notes = read_audio(path, MAX_READ_SEC)
    except BadClip as error:
        raise BadReference(f"reference {path} {error.reason}.") from error
    result = Reference(torch.zeros(1, 1, 0), notes)
    peak = np.abs(native).max(initial=0.0)
    if peak == 0 and len(native):
        raise BadReference(f"reference {path} is silent.")
    clipped = np.mean(np.abs(native) >= 0.999 * max(1.0, peak)) if len(native) else 0.0
    if clipped > MAX_CLIPPED_SHARE:
        result.warnings.append(f"{clipped:.2%} of the samples are clipped: record at a lower level")
    # By a power of two, which rounds nothing, to a level at which no filter clips: torchaudio's cut at 1.
    exponent = int(np.frexp(peak)[1]) + HEADROOM_BITS
    mono = torch.from_numpy(np.ldexp(native, -exponent).astype(np.float32))
    if rate != SAMPLE_RATE:
        mono = torch.from_numpy(soxr.resample(mono.numpy(), rate, SAMPLE_RATE, quality="HQ"))
        result.notes.append(f"resampled from {rate} to {SAMPLE_RATE} Hz")
    if len(mono) < MIN_SPEECH_SEC * SAMPLE_RATE:
        raise BadReference(f"reference {path} lasts {len(mono) / SAMPLE_RATE:.1f} s: give 3 to 25 s of speech.")
    mono = AF.highpass_biquad(mono - mono.mean(), SAMPLE_RATE, HIGH_PASS_HZ)
    result.notes.append(f"offset removed, high-pass at {HIGH_PASS_HZ:.0f} Hz")

    level = levels(mono)
    if is_silence(level, 20 * math.log10(2) * exponent):
        raise BadReference(f"reference {path} is silent.")
    active = speech_frames(level)
    check_noise(level, active, result)
    mono = trim(cut_long(mono, active, result), result)
    speech_sec = speech_frames(levels(mono)).sum().item() * HOP / SAMPLE_RATE
    if speech_sec < MIN_SPEECH_SEC:
        raise BadReference(f"reference {path} holds {speech_sec:.1f} s of speech: give 3 to 25 s.")
    if len(mono) < SHORT_SEC * SAMPLE_RATE:
        result.warnings.append(f"{len(mono) / SAMPLE_RATE:.2f} s are little: 3 to 25 s make a better voice")
    if len(mono) % FRAME_SAMPLES == 0:
        # For some whole numbers of frames mistral-common's ceil(seconds * 12.5) comes out one too high, as a float:
        # the prompt would then have a position more than the voice embedding has rows.
        mono = mono[:-1]
    result.waveform = normalize(mono, exponent, result)[None, None].contiguous()
    return result


def is_silence(level: Tensor, offset_db: float) -> bool:
    """Levels of frames, and what to add to them for dBFS as recorded: is none of them loud, nor one that stands out?
    Faint speech does, faint noise does not."""
    loudest = level.max().item()
    return loudest + offset_db < SILENT_DB and loudest < level.quantile(0.1).item() + STANDS_OUT_DB


def levels(mono: Tensor) -> Tensor:
    """[T] -> level of every frame, dBFS, at least -120"""
    return 10 * mono.unfold(0, FRAME, HOP).square().mean(dim=1).clamp(min=1e-12).log10()


def speech_frames(level: Tensor) -> Tensor:
    """Levels -> bool: well above the quiet of this recording, or within 20 dB of its loudest frame."""
    peak, floor = level.max().item(), level.quantile(0.1).item()
    return level > min(max(peak - QUIET_BELOW_PEAK_DB, floor + 6), peak - 20)


def check_noise(level: Tensor, active: Tensor, result: Reference) -> None:
    """Warns of noise, estimated from the quietest 2 % of the frames: even fast speech pauses that often."""
    speech = 10 * (10 ** (level[active] / 10)).mean().log10().item()
    snr = speech - level.quantile(0.02).item()
    if snr < MIN_SNR_DB:
        result.warnings.append(f"speech is only {snr:.0f} dB above the quietest parts: noise, music or no pauses")


def runs(mask: Tensor) -> list[tuple[int, int]]:
    """Start and end (exclusive) of every run of True."""
    edges = torch.diff(torch.cat([torch.zeros(1), mask.float(), torch.zeros(1)]))
    return list(zip((edges > 0).nonzero().flatten().tolist(), (edges < 0).nonzero().flatten().tolist()))


def cut_long(mono: Tensor, active: Tensor, result: Reference) -> Tensor:
    """From the first speech on, at most MAX_SEC: up to the last pause that leaves 3 s or more, or else cut hard."""
    first = max(0, int(active.nonzero()[0]) * HOP - round(LEAD_SEC * SAMPLE_RATE))
    longest = round(MAX_SEC * SAMPLE_RATE)
    if int(active.nonzero()[-1]) * HOP + FRAME - first + round(PAUSE_SEC * SAMPLE_RATE) <= longest:
        return mono
    pauses = [(start * HOP + FRAME - HOP, end * HOP) for start, end in runs(~active)]
    pauses = [
        (start, end)
        for start, end in pauses
        if end - start >= CUT_PAUSE_SEC * SAMPLE_RATE
        and SHORT_SEC * SAMPLE_RATE <= start - first <= longest - PAUSE_SEC * SAMPLE_RATE
    ]
    if pauses:
        end = min(pauses[-1][1], first + longest)
        result.notes.append(f"cut at a pause after {(pauses[-1][0] - first) / SAMPLE_RATE:.1f} s")
    else:
        end = first + longest - round(PAUSE_SEC * SAMPLE_RATE)
        result.warnings.append(f"no pause to cut at: cut after {(end - first) / SAMPLE_RATE:.1f} s, perhaps in a word")
    return mono[first:end]


def trim(mono: Tensor, result: Reference) -> Tensor:
    """Silence before and after the speech down to LEAD_SEC and PAUSE_SEC; a shorter end is filled up with silence."""
    active = speech_frames(levels(mono)).nonzero().flatten()
    start = max(0, int(active[0]) * HOP - round(LEAD_SEC * SAMPLE_RATE))
    pause = round(PAUSE_SEC * SAMPLE_RATE)
    end = int(active[-1]) * HOP + FRAME + pause
    if start or end < len(mono):
        removed = (start + max(0, len(mono) - end)) / SAMPLE_RATE
        result.notes.append(f"{removed:.2f} s of silence trimmed")
    missing = end - len(mono)
    mono = mono[start:end].clone()
    if missing > 0:
        fade = min(HOP, len(mono))
        mono[-fade:] *= torch.linspace(1, 0, fade)  # the recording stops abruptly: no click
        mono = torch.cat([mono, torch.zeros(missing)])
        result.notes.append(f"{missing / SAMPLE_RATE:.2f} s of silence added, so that it ends on a pause")
    return mono


def normalize(mono: Tensor, exponent: int, result: Reference) -> Tensor:
    """One gain for the whole clip: to LOUDNESS_LUFS, or less where the peak would pass MAX_PEAK. `exponent`: `mono` is
    so many powers of two below the recording."""
    loudness = AF.loudness(mono[None], SAMPLE_RATE).item()
    gain = min(10 ** ((LOUDNESS_LUFS - loudness) / 20), MAX_PEAK / mono.abs().max().item())
    offset_db = 20 * math.log10(2) * exponent
    result.notes.append(
        f"level {loudness + offset_db:.1f} LUFS, changed by {20 * math.log10(gain) - offset_db:+.1f} dB"
    )
    return mono * gain
