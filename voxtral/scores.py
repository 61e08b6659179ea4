"""Scores of decoded speech against its source, clip by clip: what evaluate.py reports of reconstruction.

PESQ, ESTOI, both speaker similarities and DNSMOS need packages that requirements.txt leaves out. A score that is asked
for and cannot be had is an error, never a gap in a table.
"""

import importlib.util
import math
import warnings
from dataclasses import dataclass
from functools import cache

import numpy as np
import soxr
import torch
import torchaudio
import whisper
from torch import Tensor
from whisper.normalizers import BasicTextNormalizer, EnglishTextNormalizer

from voxtral.asr import load_whisper
from voxtral.errors import UserError, one_line
from voxtral.losses import MelDistance, stft_distance
from voxtral.score_table import ECAPA_MODEL, MAX_SISDR_DB, SCORES
from voxtral.speaker import SpeakerEncoder

SCORE_RATE = 16000  # Hz, of PESQ, Whisper, ECAPA and DNSMOS
UNSPACED = ("zh", "ja", "yue", "th", "lo", "my")  # written without spaces: characters count as words, as for Whisper


@dataclass
class Source:
    """A source clip and what is computed of it once. waveform [T] float32 on the CPU."""

    waveform: Tensor
    text: str = ""
    language: str = ""
    speaker: Tensor | None = None  # [256]
    ecapa: Tensor | None = None  # [1, 192]
    dnsmos: float = math.nan


class Scorer:
    """Scores `names` (keys of SCORES) of clips at `sampling_rate` Hz.

    Raises UserError for an unknown name, and where a package or weights are missing, saying what to install.
    """

    def __init__(
        self,
        names: list[str],
        sampling_rate: int,
        device,
        whisper_model: str = "base",
        speaker_model: str = "resemblyzer",
        ecapa_model: str = ECAPA_MODEL,
    ):
        check_scores(names, speaker_model)
        self.names, self.rate, self.device = names, sampling_rate, torch.device(device)
        self.mel = MelDistance(sampling_rate)
        self.whisper = _named("--whisper", load_whisper, whisper_model, device) if "wer" in names else None
        self.speaker = None
        if "speaker" in names:
            self.speaker = _named("--speaker-model", SpeakerEncoder, speaker_model, device)
        self.ecapa = load_ecapa(ecapa_model, device) if "ecapa" in names else None

    @torch.no_grad()
    def listen(self, waveform: Tensor) -> Source:
        """[T] at `sampling_rate` -> the source that reconstructions are then scored against."""
        source = Source(waveform)
        if self.whisper:
            source.text, source.language = transcribe(self.whisper, self._at_16k(waveform), None)
        if self.speaker:
            source.speaker = self.speaker.embed(waveform)
        if self.ecapa:
            source.ecapa = self._embed_ecapa(waveform)
        if "dnsmos" in self.names:
            source.dnsmos = self._dnsmos(waveform)
        return source

    @torch.no_grad()
    def score(self, source: Source, decoded: Tensor) -> dict[str, float | str]:
        """decoded [T], as long as the source -> the scores by name; with wer also words (of the source) and text.

        NaN: a score that this clip does not have, such as PESQ where no utterance is found.
        """
        a, b, length = decoded[None, None], source.waveform[None, None], torch.tensor([len(decoded)])
        functions = {
            "mel": lambda: self.mel(a, b, length).item(),
            "stft": lambda: stft_distance(a, b, length).item(),
            "sisdr": lambda: si_sdr(decoded, source.waveform),
            "pesq": lambda: pesq_wb(self._at_16k(source.waveform), self._at_16k(decoded)),
            "estoi": lambda: estoi(source.waveform.numpy(), decoded.numpy(), self.rate),
            "speaker": lambda: torch.cosine_similarity(self.speaker.embed(decoded), source.speaker, dim=0).item(),
            "ecapa": lambda: torch.cosine_similarity(self._embed_ecapa(decoded), source.ecapa).item(),
            "dnsmos": lambda: self._dnsmos(decoded),
        }
        row = {name: functions[name]() for name in self.names if name in functions}
        if self.whisper:
            text, _ = transcribe(self.whisper, self._at_16k(decoded), source.language)
            row["wer"], row["words"] = word_error_rate(source.text, text, source.language)
            row["text"] = text
        return {name: row[name] for name in [*self.names, "words", "text"] if name in row}

    def _at_16k(self, waveform: Tensor) -> np.ndarray:
        audio = soxr.resample(waveform.numpy(), self.rate, SCORE_RATE, quality="HQ")
        return audio / max(1.0, np.abs(audio).max())  # a decoder may overshoot

    def _embed_ecapa(self, waveform: Tensor) -> Tensor:
        return self.ecapa.encode_batch(torch.from_numpy(self._at_16k(waveform))[None])[:, 0].cpu()

    def _dnsmos(self, waveform: Tensor) -> float:
        from speechmos import dnsmos

        return float(dnsmos.run(self._at_16k(waveform), SCORE_RATE)["ovrl_mos"])


def check_scores(names: list[str], speaker_model: str = "resemblyzer") -> None:
    """Raises UserError for a name that SCORES does not have, and for one whose packages are not installed."""
    for name in names:
        if name not in SCORES:
            raise UserError(f"--metrics: there is no '{name}', only {', '.join(SCORES)}.")
        if name == "speaker" and speaker_model != "resemblyzer":
            continue  # a file of weights, which needs no package
        missing = [package for package in SCORES[name].packages if importlib.util.find_spec(package) is None]
        if missing:
            raise UserError(f"--metrics {name} needs {', '.join(missing)}, not installed here: {SCORES[name].install}.")


def not_measured(names: list[str]) -> dict[str, str]:
    """The scores that were not asked for -> what to do to have them."""
    return {
        name: "; ".join(filter(None, (f"add {name} to --metrics", metric.install)))
        for name, metric in SCORES.items()
        if name not in names
    }


def load_ecapa(model: str, device):
    """SpeechBrain's EncoderClassifier by name (downloaded once) or from a folder. Raises UserError with what to do."""
    try:
        from speechbrain.inference.speaker import EncoderClassifier

        # A copied folder's hyperparams.yaml still names the hub as the place of its weights.
        return EncoderClassifier.from_hparams(
            source=model,
            overrides={"pretrained_path": model},
            overrides_must_match=False,
            run_opts={"device": str(device)},
        )
    except Exception as error:  # SpeechBrain and the hub's client raise many types; all mean the same to the user
        raise UserError(
            f"--ecapa-model: '{model}' cannot be had ({one_line(error)}); give a folder with "
            f"the files of {ECAPA_MODEL}, or leave ecapa out of --metrics."
        ) from error


def si_sdr(decoded: Tensor, source: Tensor) -> float:
    """Scale-invariant signal-to-distortion ratio of waveforms [T], dB (Le Roux et al. 2019); NaN: silent source."""
    decoded, source = (x.double() - x.double().mean() for x in (decoded, source))
    energy = source.square().sum()
    if energy == 0:
        return math.nan
    target = (decoded @ source) / energy * source
    signal, noise = target.square().sum(), (decoded - target).square().sum()
    if signal + noise == 0:
        return -MAX_SISDR_DB  # silence
    ratio = 10 * torch.log10(signal.clamp(min=1e-300) / noise.clamp(min=1e-300))
    return ratio.clamp(-MAX_SISDR_DB, MAX_SISDR_DB).item()


def pesq_wb(source: np.ndarray, decoded: np.ndarray) -> float:
    """Wide-band PESQ of waveforms [T] at 16 kHz; NaN where none is defined: below 0.25 s, or without an utterance."""
    import pesq

    try:
        return float(pesq.pesq(SCORE_RATE, source, decoded, "wb"))
    except (pesq.BufferTooShortError, pesq.NoUtterancesError):
        return math.nan


def estoi(source: np.ndarray, decoded: np.ndarray, sampling_rate: int) -> float:
    """Extended STOI of waveforms [T]; NaN where less than 0.4 s of the source is speech."""
    from pystoi import stoi

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Not enough STFT frames", category=RuntimeWarning)
        try:
            return float(stoi(source, decoded, sampling_rate, extended=True))
        except RuntimeWarning:
            return math.nan


def transcribe(model: whisper.Whisper, audio: np.ndarray, language: str | None) -> tuple[str, str]:
    """[T] at SCORE_RATE -> what Whisper writes down, greedily, and the language (None: it is detected)."""
    greedy = {"temperature": 0.0, "condition_on_previous_text": False, "verbose": None}
    result = model.transcribe(audio, language=language, fp16=model.device.type == "cuda", **greedy)
    return result["text"].strip(), result["language"]


def word_error_rate(source: str, decoded: str, language: str) -> tuple[float, int]:
    """Two transcripts -> (edits per word of the source, words of the source); NaN for a source without words."""
    normalise = normaliser(language)
    # What is left of "..." is no word.
    expected, found = (
        [word for word in normalise(text).split() if any(map(str.isalnum, word))] for text in (source, decoded)
    )
    if not expected:
        return math.nan, 0
    return torchaudio.functional.edit_distance(expected, found) / len(expected), len(expected)


@cache
def normaliser(language: str):
    """Whisper's own text normaliser for a language code."""
    return EnglishTextNormalizer() if language == "en" else BasicTextNormalizer(split_letters=language in UNSPACED)


def _named(option: str, function, *arguments):
    """function(*arguments); an error of the user's speaks of `option`."""
    try:
        return function(*arguments)
    except UserError as error:
        raise UserError(f"{option}: {error}") from error
