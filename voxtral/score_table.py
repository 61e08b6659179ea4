"""What evaluate.py can score, by name: definitions, and what each needs. Without the packages that measure it, so that
--help can list them at once."""

from dataclasses import dataclass

ECAPA_MODEL = "speechbrain/spkrec-ecapa-voxceleb"
MAX_SISDR_DB = 100.0  # of a perfect reconstruction, so that averages stay finite


@dataclass(frozen=True)
class Metric:
    """What a number is. `weight`: the column by which clips are averaged; empty: all clips alike."""

    definition: str
    higher_is_better: bool | None = None  # None: neither is
    packages: tuple[str, ...] = ()  # modules that it imports
    install: str = ""  # how to get what it needs
    weight: str = ""


SCORES = {
    "mel": Metric(
        "mel distance as audiotools: windows 2048 and 512, 150 and 80 Slaney mels, hop a quarter; L1 of "
        "log10(clamp(m, 1e-5)^2) + L1 of m, summed",
        False,
    ),
    "stft": Metric("STFT distance as audiotools: the same of magnitudes, windows 2048 and 512", False),
    "sisdr": Metric(f"scale-invariant SDR of waveforms without their means, dB, at most {MAX_SISDR_DB:g}", True),
    "pesq": Metric("PESQ, wide band, at 16 kHz (ITU-T P.862.2)", True, ("pesq",), "pip install pesq"),
    "estoi": Metric("extended STOI (Jensen and Taal 2016)", True, ("pystoi",), "pip install pystoi"),
    "wer": Metric(
        "word error rate of Whisper's transcript of the reconstruction against that of the source, greedy, "
        "in the language detected in the source, normalised as Whisper does; of all words together",
        False,
        install="--whisper names a model, which is downloaded once, or a local .pt",
        weight="words",
    ),
    "speaker": Metric(
        "cosine of Resemblyzer embeddings of source and reconstruction",
        True,
        ("resemblyzer",),
        "pip install --no-deps resemblyzer",
    ),
    "ecapa": Metric(
        "cosine of ECAPA-TDNN embeddings (Desplanques et al. 2020; SpeechBrain's, trained on VoxCeleb) of "
        "source and reconstruction, at 16 kHz",
        True,
        ("speechbrain",),
        "pip install speechbrain; --ecapa-model names a model, which is downloaded once, or its folder",
    ),
    "dnsmos": Metric(
        "DNSMOS P.835, overall, at 16 kHz (Reddy et al. 2022); needs no source",
        True,
        ("speechmos", "librosa", "onnxruntime"),
        "pip install speechmos librosa onnxruntime",
    ),
}
DEFAULT_SCORES = ("mel", "stft", "sisdr")  # neither optional packages nor weights to download
