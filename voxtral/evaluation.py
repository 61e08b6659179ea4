"""Evaluation of an encoder on whole clips: codes, agreement with a reference encoder, voice embeddings, gap closed.

Scores of the decoded audio are in `voxtral.scores`. Every clip passes through the codec alone.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from voxtral.audio import BadClip, is_silent, load_segment
from voxtral.clip_list import Clip
from voxtral.code_metrics import code_agreement, code_statistics
from voxtral.codec import VoxtralCodec, ceil_div
from voxtral.errors import DataError, shown
from voxtral.known_codes import read_codes
from voxtral.losses import codebook_scale
from voxtral.params import CodecParams
from voxtral.score_table import SCORES, Metric
from voxtral.scores import Scorer, Source
from voxtral.validation import known_agreement

N_RESAMPLES = 2000
INTERVAL = (2.5, 97.5)  # percentiles
NEAR_ZERO = 0.1  # of the presets' root mean square

CODES = {
    "semantic_per_clip": Metric("distinct semantic codes of a clip"),
    "extremes_share": Metric("share of the acoustic levels at either end of the scale", weight="frames"),
    "embedding_norm": Metric("norm of a row of the voice embedding", weight="frames"),
}
AGREEMENT = {
    "semantic_equal": Metric("share of semantic codes equal to the reference's", True, weight="frames"),
    "semantic_rank": Metric(
        "rank of the reference's semantic code among all by distance (1: nearest), median over a clip's frames",
        False,
        weight="frames",
    ),
    "levels_equal": Metric("share of acoustic levels equal to the reference's", True, weight="frames"),
    "levels_within_1": Metric("share of acoustic levels at most one off", True, weight="frames"),
    "semantic_distance": Metric(
        "squared distance of semantic latents before quantization, over the median squared "
        "nearest-neighbour distance of the codebook",
        False,
        weight="frames",
    ),
    "acoustic_distance": Metric(
        "distance of acoustic latents after tanh, before rounding, in levels", False, weight="frames"
    ),
    "embedding_cosine": Metric("cosine of the voice embeddings' rows, frame by frame", True, weight="frames"),
}
KNOWN = {  # of clips that come with the codes that they were decoded from (generate_clips.py)
    "known_semantic_equal": Metric(
        "share of semantic codes equal to those that the clip was decoded from", True, weight="frames"
    ),
    "known_levels_equal": Metric(
        "share of acoustic levels equal to those that the clip was decoded from", True, weight="frames"
    ),
    "known_levels_within_1": Metric("share of acoustic levels at most one off those", True, weight="frames"),
}
METRICS = SCORES | CODES | KNOWN | AGREEMENT


# ---------------------------------------------------------------- clips


@dataclass
class Sample:
    """A clip that could be read. waveform [T] float32 at 24 kHz."""

    clip: Clip
    waveform: Tensor
    native_rate: int
    true_codes: Tensor | None = None  # [1 + acoustic_dim, L] int64, see read_true_codes()

    @property
    def speaker(self) -> tuple[int, str]:
        """Sources may use the same names."""
        return self.clip.source, self.clip.speaker


@dataclass
class EncodedClip:
    """One clip through the encoder, on the CPU (L frames)."""

    latent: Tensor  # [latent_dim, L] before quantization
    codes: Tensor  # [1 + acoustic_dim, L]


def load_samples(clips: list[Clip], max_sec: float) -> tuple[list[Sample], list[str]]:
    """The first `max_sec` of every clip -> samples, "path: reason" of those that cannot be used: a silent one would
    spoil averages. Raises DataError when none is left."""
    samples, bad = [], []
    for clip in clips:
        try:
            audio, rate = load_segment(clip.path, 0.0, max_sec)
            if is_silent(audio):
                raise BadClip(clip.path, "is silent")
            samples.append(Sample(clip, torch.from_numpy(audio), rate))
        except BadClip as error:
            bad.append(shown(error))
    if not samples:
        raise DataError(f"None of the {len(clips)} clips can be read; look at --data ({'; '.join(bad[:3])}).")
    return samples, bad


def read_true_codes(samples: list[Sample], params: CodecParams) -> list[str]:
    """Of generated clips; returns "path: reason" of those that cannot be used."""
    bad = []
    for sample in samples:
        if sample.clip.codes:
            try:
                sample.true_codes = read_codes(sample.clip.codes, params)
            except BadClip as error:
                bad.append(str(error))
    return bad


@torch.no_grad()
def encode_all(codec: VoxtralCodec, samples: list[Sample]) -> Iterator[tuple[EncodedClip, Tensor]]:
    """Each clip encoded alone as serving does, and decoded in the codec's dtype without TF32; decoded [T] is cut to the
    source.

    Clips are padded to whole seconds, which changes nothing that counts: a GPU plans its convolutions anew for every
    length that it meets.
    """
    device = next(codec.parameters()).device
    for sample in samples:
        length = torch.tensor([len(sample.waveform)], device=device)
        padding = -len(sample.waveform) % codec.params.sampling_rate
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            latent = codec.served_latent(F.pad(sample.waveform, (0, padding))[None, None].to(device), length)
            codes = codec.quantizer.encode(latent)
            decoded = codec.decode(codes)[0, 0, : len(sample.waveform)].float()
        n_frames = ceil_div(len(sample.waveform), codec.params.frame_size)
        yield EncodedClip(latent[0, :, :n_frames].float().cpu(), codes[0, :, :n_frames].cpu()), decoded.cpu()


def fresh_encoder(codec: VoxtralCodec, seed: int) -> dict[str, Tensor]:
    """Encoder tensors of `codec`'s sizes as train_encoder.py starts from them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VoxtralCodec(codec.params).encoder_tensors()


# ---------------------------------------------------------------- codes


@torch.no_grad()
def clip_codes(codec: VoxtralCodec, encoded: EncodedClip) -> dict[str, float]:
    """CODES of one clip, and its number of frames."""
    levels = encoded.codes[1:]
    norm = codec.embed_codes(encoded.codes[None].to(codec.audio_embedding.device)).float().norm(dim=-1).mean()
    extreme = (levels == 0) | (levels == codec.params.acoustic_codebook_size - 1)
    return {
        "frames": encoded.codes.shape[1],
        "semantic_per_clip": float(encoded.codes[0].unique().numel()),
        "extremes_share": extreme.float().mean().item(),
        "embedding_norm": norm.item(),
    }


def all_codes(codec: VoxtralCodec, encoded: list[EncodedClip]) -> dict:
    """Over all clips together: frames, semantic_used, semantic_perplexity, level_histogram (voxtral.code_metrics), and
    semantic_dead_share, the part of the codebook that no frame used (fewer frames than codes cannot use them all)."""
    codes = torch.cat([clip.codes for clip in encoded], dim=1)[None]
    size = codec.params.semantic_codebook_size
    statistics = code_statistics(codes, torch.tensor([codes.shape[-1]]), size, codec.params.acoustic_codebook_size)
    result = {name: value.tolist() for name, value in statistics.items()}
    del result["extremes_share"]  # among the averages over clips, with its interval
    return {"frames": codes.shape[-1], "semantic_dead_share": 1 - result["semantic_used"] / size} | result


class Agreement:
    """Compares clips with what a reference encoder makes of them: AGREEMENT, by name."""

    def __init__(self, codec: VoxtralCodec):
        self.codec = codec
        self.codebook = codec.quantizer.semantic_codebook.embedding
        self.scale = codebook_scale(self.codebook).item()

    @torch.no_grad()
    def __call__(self, own: EncodedClip, reference: EncodedClip) -> dict[str, float]:
        params, device = self.codec.params, self.codebook.device
        codes, expected = own.codes[None].to(device), reference.codes[None].to(device)
        equal = code_agreement(codes, expected, torch.tensor([codes.shape[-1]], device=device))
        semantic, acoustic = own.latent.to(device).split([params.semantic_dim, params.acoustic_dim])
        true_semantic, true_acoustic = reference.latent.to(device).split([params.semantic_dim, params.acoustic_dim])
        distances = torch.cdist(semantic.T[None], self.codebook[None])[0]  # [L, K], as the quantizer computes them
        rank = 1 + (distances < distances.gather(1, expected[0, 0, :, None])).sum(dim=1)
        half_range = (params.acoustic_codebook_size - 1) / 2
        rows, true_rows = self.codec.embed_codes(codes)[0].float(), self.codec.embed_codes(expected)[0].float()
        found = {
            **{name: share.item() for name, share in equal.items()},
            "semantic_rank": rank.float().quantile(0.5).item(),
            "semantic_distance": (semantic - true_semantic).square().sum(dim=0).mean().item() / self.scale,
            "acoustic_distance": half_range * (acoustic.tanh() - true_acoustic.tanh()).abs().mean().item(),
            "embedding_cosine": F.cosine_similarity(rows, true_rows, dim=-1).mean().item(),
        }
        return {name: found[name] for name in AGREEMENT}


def measure_clips(
    codec: VoxtralCodec,
    samples: list[Sample],
    sources: list[Source],
    scorer: Scorer,
    agreement: Agreement | None = None,
    expected: list[EncodedClip] | None = None,
) -> Iterator[tuple[dict, EncodedClip, Tensor]]:
    """Each clip through `codec` as it is: what is measured of it (METRICS by name), its codes, its audio [T].

    sources: the samples as `scorer` heard them; with `agreement`, the codes are compared with those of the reference
    encoder, `expected`, or with themselves where there are none yet.
    """
    any_known = any(sample.true_codes is not None for sample in samples)
    for i, (clip, decoded) in enumerate(encode_all(codec, samples)):
        row = clip_codes(codec, clip) | scorer.score(sources[i], decoded)
        if samples[i].true_codes is not None:
            n_whole = torch.tensor([len(samples[i].waveform) // codec.params.frame_size])
            row |= known_agreement(clip.codes[None], n_whole, [samples[i].true_codes])
        elif any_known:
            row |= dict.fromkeys(KNOWN, math.nan)
        if agreement:
            row |= agreement(clip, expected[i] if expected else clip)
        yield row, clip, decoded


# ---------------------------------------------------------------- voice embeddings


@dataclass
class VoiceStatistics:
    """Statistics of voice embeddings [L, dim] without their END_AUDIO rows."""

    rows: int
    norm: float  # mean over rows
    mean: Tensor  # [dim] over all rows
    variance: Tensor  # [dim]
    near_zero_share: float  # values below NEAR_ZERO times the presets' root mean square
    cosine_within_voice: float  # first half of a clip against its second, of their mean rows
    cosine_within_speaker: float  # different clips of a speaker; NaN where all have one
    cosine_between_speakers: float


def voice_statistics(embeddings: Iterable[Tensor], speakers: list, rms: float) -> VoiceStatistics:
    """Embeddings [L, dim] (one at a time in memory), their speakers, the presets' root mean square."""
    total = square = norm = 0.0
    n_rows = small = 0
    means, within_voice = [], []
    for rows in embeddings:
        rows = rows.double().cpu()
        n_rows += len(rows)
        total, square, norm = total + rows.sum(0), square + rows.square().sum(0), norm + rows.norm(dim=1).sum().item()
        small += (rows.abs() < NEAR_ZERO * rms).sum().item()
        means.append(rows.mean(0))
        if len(rows) > 1:
            first, second = rows.tensor_split(2)
            within_voice.append(torch.cosine_similarity(first.mean(0), second.mean(0), dim=0).item())
    unit = F.normalize(torch.stack(means), dim=1)
    cosine = (unit @ unit.T).numpy()
    pairs = {True: [], False: []}
    for i, j in combinations(range(len(speakers)), 2):
        pairs[speakers[i] == speakers[j]].append(cosine[i, j])
    mean = total / n_rows
    averages = {same: float(np.mean(values)) if values else math.nan for same, values in pairs.items()}
    return VoiceStatistics(
        rows=n_rows,
        norm=norm / n_rows,
        mean=mean,
        variance=square / n_rows - mean.square(),
        near_zero_share=small / (n_rows * len(mean)),
        cosine_within_voice=float(np.mean(within_voice)) if within_voice else math.nan,
        cosine_within_speaker=averages[True],
        cosine_between_speakers=averages[False],
    )


def compare_voices(voices: VoiceStatistics, presets: VoiceStatistics) -> dict[str, float]:
    """Numbers for the report; with `presets` itself every comparison is perfect (1, and 0 for the distance)."""
    log_variances = np.log(np.maximum(np.stack([voices.variance.numpy(), presets.variance.numpy()]), 1e-12))
    with np.errstate(invalid="ignore", divide="ignore"):  # NaN where all codes are the same
        correlation = float(np.corrcoef(log_variances)[0, 1])
    return {
        **{name: value for name, value in vars(voices).items() if not isinstance(value, Tensor)},
        "mean_cosine_to_presets": torch.cosine_similarity(voices.mean, presets.mean, dim=0).item(),
        "mean_distance_to_presets": ((voices.mean - presets.mean).norm() / presets.mean.norm()).item(),
        "variance_over_presets": (voices.variance.sum() / presets.variance.sum()).item(),
        "log_variance_correlation": correlation,
    }


# ---------------------------------------------------------------- averages, intervals, gap closed


class Averages:
    """Weighted means over clips, with percentile-bootstrap intervals over speakers: whole speakers are drawn with
    repeats, the same draws for every metric and system. With one speaker there are no intervals. metrics: what is
    averaged, by name."""

    def __init__(self, speakers: list, seed: int, metrics: dict[str, Metric] = METRICS):
        self.metrics = metrics
        names = sorted(set(speakers))
        self.owner = np.array([names.index(speaker) for speaker in speakers])
        self.n_speakers = len(names)
        random = np.random.default_rng(seed)
        # Row 0 is the data itself.
        draws = random.multinomial(self.n_speakers, np.full(self.n_speakers, 1 / self.n_speakers), size=N_RESAMPLES)
        self.counts = np.concatenate([np.ones((1, self.n_speakers)), draws])  # [1 + N_RESAMPLES, speakers]

    def means(self, rows: list[dict], name: str) -> np.ndarray:
        """Rows of clips (in the order of `speakers`) -> [1 + N_RESAMPLES] means of a metric, the true one first; clips
        whose value is NaN do not count."""
        values = np.array([row[name] for row in rows], dtype=float)
        weight = self.metrics[name].weight
        weights = np.array([row[weight] if weight else 1.0 for row in rows], dtype=float) * np.isfinite(values)
        sums = np.bincount(self.owner, np.nan_to_num(values) * weights, self.n_speakers)
        norms = np.bincount(self.owner, weights, self.n_speakers)
        with np.errstate(invalid="ignore", divide="ignore"):
            return (self.counts @ sums) / (self.counts @ norms)

    def summary(self, means: np.ndarray) -> dict:
        """{"value", "interval": [low, high] or None} of what `means` gave, or of a function of such arrays."""
        drawn = means[1:][np.isfinite(means[1:])]
        interval = np.percentile(drawn, INTERVAL).tolist() if self.n_speakers > 1 and len(drawn) else None
        return {"value": float(means[0]), "interval": interval}


def gap_closed(untrained, trained, reference):
    """(untrained - trained) / (untrained - reference), of floats or arrays: 1 as good as the reference; NaN where
    untrained and reference do not differ."""
    gap = np.asarray(untrained, dtype=float) - reference
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(np.abs(gap) > 1e-12, (untrained - np.asarray(trained, dtype=float)) / gap, np.nan)
