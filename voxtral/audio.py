"""Audio files, opened here and nowhere else: what can be read, crops of it, one channel, a level within ±1.

Headers are not believed: what counts is what can be decoded, for training and for references alike.
"""

import io
import math
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import soundfile
import soxr

from voxtral.errors import reason_of
from voxtral.paths import no_file

SAMPLE_RATE = 24000
MIN_SEC = 0.1
EDGE_SEC = 0.03  # this far from the ends of its input, soxr HQ no longer notices them (< 1e-6)
MIN_RATE, MAX_RATE = 4000, 768_000  # Hz; others are damage, not speech
MAX_CHANNELS = 64
DECODER_LINE = re.compile(rb"\[src/libmpg123/|Note: |Warning: |.*libmpg123")
BLOCK_FRAMES = 4096
MAX_VALUES = 2**27  # decoded at once, of a file whose length is not known beforehand
SPEECH_HZ, BLOCK, MAX_BLOCKS = (100, 4000), 1024, 1000  # where a channel is weighed, in so many blocks of frames
# Suffixes of libsndfile's formats, but for those without a header; and of what it does not read.
AUDIO_SUFFIXES = set(
    """
    .wav .wave .bwf .rf64 .w64 .flac .mp3 .mp2 .mpga .ogg .oga .opus .aif .aiff .aifc .au .snd .caf .sph .nist .voc
    .ircam .sf .avr .paf .pvf .iff .8svx .svx .sds .xi
    """.split()
)
OTHER_MEDIA = set(
    """
    .m4a .m4b .m4r .mp4 .m4v .mov .3gp .3ga .aac .ac3 .eac3 .dts .wma .wmv .asf .amr .awb .webm .weba .mkv .mka .avi
    .flv .f4a .ts .mpg .mpeg .ape .wv .tta .mpc .tak .dsf .dff .ra .rm .spx .ogv .ogx .qcp .alac
    """.split()
)
CONVERT = "libsndfile does not read it; convert it: ffmpeg -i IN -ac 1 OUT.flac"
# First bytes -> what files are that are named as audio.
SIGNATURES = {
    (b"version https://git-lfs",): "is a pointer of Git LFS, not the file itself: git lfs pull",
    (b"\0\5\x16\7",): "is a ._ file of macOS, not audio",
    (b"\x1aE\xdf\xa3",): f"is WebM or Matroska; {CONVERT}",
    (b"0&\xb2u\x8ef\xcf\x11",): f"is Windows Media; {CONVERT}",
    (b"#!AMR",): f"is AMR; {CONVERT}",
    (b"wvpk",): f"is WavPack; {CONVERT}",
    (b"MAC ",): f"is Monkey's Audio; {CONVERT}",
    (b"FLV",): f"is Flash video; {CONVERT}",
    (b"PK\3\4", b"\x1f\x8b", b"Rar!", b"7z\xbc\xaf", b"BZh", b"\xfd7zXZ"): "is an archive: unpack it",
    (b"%PDF",): "is PDF, not audio",
    (b"\x89PNG", b"\xff\xd8\xff", b"GIF8"): "is a picture, not audio",
}


class BadClip(ValueError):
    """A file that cannot be used: missing, no audio, empty, not finite or shorter than MIN_SEC; `reason` goes after its
    name."""

    def __init__(self, path: str, reason: str):
        super().__init__(f"{path}: {reason}")
        self.reason = reason


class Header(NamedTuple):
    """Of an audio file; `frames` are those that can be decoded."""

    frames: int
    rate: int  # Hz
    channels: int

    @property
    def seconds(self) -> float:
        return self.frames / self.rate


# ---------------------------------------------------------------- files


class _SoundFile(soundfile.SoundFile):
    """soundfile seeks after each read of what it calls seekable. MP3 decoders do so inexactly, and FLAC of unknown
    length not at all; seek() works as before."""

    def seekable(self) -> bool:
        return False


@contextmanager
def open_audio(path) -> Iterator[_SoundFile]:
    """Around all that is done with an audio file. Raises BadClip, also for what goes wrong inside."""
    problem = no_file(path)
    if problem:
        raise BadClip(path, problem)
    try:
        with quiet_decoders(), _opened(path) as file:
            if not MIN_RATE <= file.samplerate <= MAX_RATE:
                raise BadClip(path, f"has a rate of {file.samplerate} Hz: speech has {MIN_RATE} to {MAX_RATE}")
            if file.channels > MAX_CHANNELS:
                raise BadClip(path, f"has {file.channels} channels: at most {MAX_CHANNELS} are read")
            yield file
    except (soundfile.SoundFileError, OSError, TypeError, MemoryError) as error:
        detail = reason_of(getattr(error, "error_string", None) and ValueError(error.error_string) or error)
        if "possibly a pipe" in detail:  # what libsndfile says of a damaged MP3, which is a file all the same
            detail = "format not recognised"
        raise BadClip(path, what_it_is(path) or f"cannot be read as audio ({detail.rstrip('.')})") from error


def _opened(path) -> _SoundFile:
    file = _SoundFile(os.fsencode(path))  # as bytes: soundfile would encode the name strictly
    if not file.frames and file.format in ("WAV", "WAVEX") and os.path.getsize(path) < MAX_VALUES:
        # Who was stopped while writing left a length of 0: all that follows is sound.
        with open(path, "rb") as whole:
            content = whole.read()
        size_at = content.find(b"data\0\0\0\0") + 4
        if 4 <= size_at < len(content) - 4:
            file.close()
            rest = len(content) - size_at - 4
            file = _SoundFile(io.BytesIO(content[:size_at] + rest.to_bytes(4, "little") + content[size_at + 4 :]))
    return file


def read_header(path) -> Header:
    """Length as it can be decoded, rate and channels. Only a file whose header does not tell its length is decoded for
    it. Raises BadClip, also for less than MIN_SEC."""
    with open_audio(path) as file:
        n_frames = file.frames if len(_read_at(file, file.frames - 1, file.frames)) else 0
        header = Header(n_frames, file.samplerate, file.channels)
    if not header.frames:
        header = header._replace(frames=sum(map(len, _blocks(path))))
    if header.seconds < MIN_SEC:
        raise BadClip(path, _too_short(path, header.frames))
    return header


def read_audio(path, max_sec: float) -> tuple[np.ndarray, int, list[str]]:
    """The beginning of a file -> one channel [n] as it stands there (float32 or float64), its rate in Hz, notes on what
    was chosen. Raises BadClip."""
    crop = _read_crop(path, 0.0, max_sec, 1.0)
    audio, channel = loudest_channel(crop.audio, crop.rate)
    n_channels = crop.audio.shape[1]
    notes = []
    if n_channels > 1:
        notes.append(f"{n_channels} channels: number {channel + 1} is taken, the one with most speech")
    return audio[: math.ceil(max_sec * crop.rate)], crop.rate, notes


def load_segment(path: str, position: float, max_sec: float, speed: float = 1.0) -> tuple[np.ndarray, int]:
    """-> float32 [n] mono at 24 kHz with n <= max_sec * 24000 and peaks of at most 1, native rate in Hz.

    `position` in [0, 1) places the crop among all that fit. No more of a long file is decoded than needed.
    The crop is what cutting the resampled file would give, within 1e-6. Of several channels the one with most speech in
    the crop counts. `speed`: the tape runs so many times as fast, pitch and formants too (to within 50 Hz of the rate).
    Raises BadClip.
    """
    crop = _read_crop(path, position, max_sec, speed)
    peak = _peak_of_floats(path, *crop.floats) if crop.floats else 0.0
    audio = limited(loudest_channel(crop.audio, crop.rate)[0], peak)
    audio = soxr.resample(audio, crop.played_rate, SAMPLE_RATE, quality="HQ")
    audio = audio[crop.skip : crop.skip + round(max_sec * SAMPLE_RATE)]
    if len(audio) < round(min(MIN_SEC, max_sec) * SAMPLE_RATE):
        raise BadClip(path, _too_short(path, len(audio)))
    return limited(audio), crop.rate


def limited(audio: np.ndarray, peak: float = 0.0) -> np.ndarray:
    """The same as float32, divided by its peak, or a higher `peak` of its file, where that is above 1: not clipped."""
    peak = max(peak, float(np.abs(audio).max(initial=0.0)))
    return (audio / peak if peak > 1 else audio).astype(np.float32)


def loudest_channel(audio: np.ndarray, rate: int) -> tuple[np.ndarray, int]:
    """[n, channels] -> [n], the channel with most speech, and its index.

    A mean would cancel what is in opposite phase, and bury a voice that one channel of six holds.
    """
    if audio.shape[1] == 1 or not len(audio):
        return audio[:, 0], 0
    scaled = audio / max(np.abs(audio).max(), np.finfo(audio.dtype).tiny)  # huge values have no squares
    if len(scaled) < BLOCK:
        scaled = np.pad(scaled, ((0, BLOCK - len(scaled)), (0, 0)))
    blocks = scaled[: len(scaled) // BLOCK * BLOCK].reshape(-1, BLOCK, audio.shape[1])
    low, high = (round(hz * BLOCK / rate) for hz in SPEECH_HZ)
    blocks = blocks[:: -(-len(blocks) // MAX_BLOCKS)] * np.hanning(BLOCK)[:, None]  # or rumble leaks into the speech
    spectra = np.fft.rfft(blocks, axis=1)[:, max(low, 1) : high + 1]
    channel = int((np.abs(spectra) ** 2).sum(axis=(0, 1)).argmax())
    return audio[:, channel], channel


def is_silent(audio: np.ndarray) -> bool:
    """[n] at most ±1: is nothing in it louder than -60 dBFS?"""
    return not np.abs(audio).max(initial=0.0) > 1e-3


def _too_short(path, n_samples: int) -> str:
    return f"is shorter than {MIN_SEC} s" if n_samples else what_it_is(path) or "is empty: there are no samples in it"


def what_it_is(path) -> str:
    """What a file is that libsndfile does not know, by its first bytes; empty: nobody knows."""
    try:
        with open(path, "rb") as file:
            start = file.read(1024)
    except OSError:
        return ""
    for signatures, name in SIGNATURES.items():
        if start.startswith(signatures):
            return name
    if start[4:8] == b"ftyp":
        return f"is MP4 (m4a, mp4, mov); {CONVERT}"
    if len(start) > 1 and start[0] == 0xFF and start[1] & 0xF6 == 0xF0:
        return f"is AAC; {CONVERT}"
    if not start.strip(b"\0"):
        return "holds zeros only: copy or download it again"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")) or b"<html" in text and text.startswith(b"<"):
        return "is HTML, not audio: download it again"
    if all(byte >= 32 or byte in b"\t\n\r" for byte in start):
        return "is text, not audio"
    return ""


# ---------------------------------------------------------------- frames


class _Crop(NamedTuple):
    audio: np.ndarray  # native frames [n, channels], finite, with margins for the resampler
    rate: int  # Hz
    played_rate: int  # at which to play them
    skip: int  # 24 kHz samples before the crop
    floats: tuple  # size and time of a file of floats, which alone holds much more than 1; empty for others


def _read_crop(path: str, position: float, max_sec: float, speed: float) -> _Crop:
    with open_audio(path) as file:
        rate = file.samplerate
        played = rate if speed == 1 else round(rate * speed / 100) * 100  # has a large common divisor with 24 kHz
        status = os.stat(path)
        floats = (status.st_size, status.st_mtime_ns) if file.subtype in ("FLOAT", "DOUBLE") else ()
        # Truncated files, streams and some MP3 report frames that are not there: then what can be decoded is the file.
        start, stop, skip = _window(file.frames, played, position, max_sec)
        audio = _read_at(file, start, stop)
    if not len(audio) == stop - start > 0:
        audio = np.concatenate(list(_blocks(path)) or [np.zeros((0, 1), np.float32)])
        start, stop, skip = _window(len(audio), played, position, max_sec)
        audio = audio[start:stop]
    if not np.isfinite(audio).all():
        raise BadClip(path, "holds values that are not finite")
    return _Crop(audio, rate, played, skip, floats)


def _read_at(file: soundfile.SoundFile, start: int, stop: int) -> np.ndarray:
    """[n, channels], nothing where the decoder fails or the header counts backwards."""
    with suppress(soundfile.SoundFileError):
        if 0 <= start < stop:
            file.seek(start)
            return file.read(stop - start, dtype=_dtype(file), always_2d=True)
    return np.zeros((0, file.channels), np.float32)


def _blocks(path) -> Iterator[np.ndarray]:
    """A file from its start to where it breaks off, or to MAX_VALUES: [n, channels] each. A read that fails gives
    nothing at all, so they are small."""
    with open_audio(path) as file, suppress(soundfile.SoundFileError):
        left = MAX_VALUES // file.channels
        while left > 0 and len(block := file.read(BLOCK_FRAMES, dtype=_dtype(file), always_2d=True)):
            left -= len(block)
            yield block


def _dtype(file: soundfile.SoundFile) -> str:
    return "float64" if file.subtype == "DOUBLE" else "float32"  # whose values may lie outside float32's


def _window(frames: int, rate: int, position: float, max_sec: float) -> tuple[int, int, int]:
    """-> first and last (exclusive) native frame to read, 24 kHz samples of them before the crop."""
    grid = rate // math.gcd(rate, SAMPLE_RATE)  # every so many frames, one coincides with a 24 kHz sample
    margin = math.ceil(EDGE_SEC * rate / grid) * grid
    wanted = math.ceil(max_sec * rate)
    first = int(position * max(frames - wanted + 1, 1)) // grid * grid
    start = max(first - margin, 0)
    return start, min(first + wanted + margin, frames), (first - start) * SAMPLE_RATE // rate


@lru_cache(maxsize=2**14)
def _peak_of_floats(path: str, *_) -> float:
    """Of the whole file, so that all of its crops have one level."""
    return float(max((np.abs(block[np.isfinite(block)]).max(initial=0.0) for block in _blocks(path)), default=0.0))


# ---------------------------------------------------------------- what decoders print


class _Chatter:
    """libmpg123 prints what it dislikes to file descriptor 2, whatever it is told. Inside quiet_decoders() that is a
    temporary file; at the end of the outermost one, what others have written there meanwhile is passed on."""

    def __init__(self):
        self.lock, self.depth, self.lines = threading.Lock(), 0, 0
        self.file = self.terminal = None

    def enter(self) -> None:
        with self.lock:
            self.depth += 1
            if self.depth == 1:
                with suppress(OSError):  # there may be no descriptor 2
                    self.file = self.file or tempfile.TemporaryFile(buffering=0)
                    self.terminal = os.dup(2)
                    os.dup2(self.file.fileno(), 2)

    def leave(self) -> None:
        with self.lock:
            self.depth -= 1
            if self.depth == 0 and self.terminal is not None:
                os.dup2(self.terminal, 2)
                os.close(self.terminal)
                self.terminal = None
                self._pass_on()

    def _pass_on(self) -> None:
        size = self.file.seek(0, os.SEEK_CUR)
        if not size:
            return
        self.file.seek(0)
        written = self.file.read(size).splitlines(keepends=True)
        self.file.seek(0)
        self.file.truncate()
        others = [line for line in written if not DECODER_LINE.match(line)]
        if len(others) < len(written):
            self.lines += len(written) - len(others)
            others = [line for line in others if line.strip()]  # it puts empty ones between
        os.write(2, b"".join(others))

    def forked(self) -> None:
        """In a child process: as if nothing had been entered."""
        if self.terminal is not None:
            os.dup2(self.terminal, 2)
        self.__init__()


_chatter = _Chatter()
os.register_at_fork(after_in_child=_chatter.forked)


@contextmanager
def quiet_decoders() -> Iterator[None]:
    """Keeps what decoders print off the terminal; complaints() counts it."""
    _chatter.enter()
    try:
        yield
    finally:
        _chatter.leave()


def complaints() -> int:
    """Lines that decoders have printed in this process."""
    return _chatter.lines
