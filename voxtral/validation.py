"""Validation on fixed clips, quantized as serving quantizes, by metrics that no switch redefines."""
from dataclasses import dataclass

import torch
from torch import Tensor

from voxtral.codec import VoxtralCodec, ceil_div, valid_mask
from voxtral.data import Batch
from voxtral.losses import MelDistance, stft_distance
from voxtral.metrics import code_agreement, code_statistics


@dataclass
class Encoded:
    """One batch of clips through a codec, on the CPU."""
    waveform: Tensor        # [B, 1, T] source
    reconstruction: Tensor  # [B, 1, T] decoded from the codes
    codes: Tensor           # [B, 1 + acoustic_dim, L]
    lengths: Tensor         # [B] samples


@torch.no_grad()
def evaluate_codec(codec: VoxtralCodec, batches: list[Batch],
                   reference: list[Encoded] | None = None) -> tuple[dict, list[Encoded]]:
    """Encodes every clip as if it were alone, decodes its codes, and measures.

    Returns (metrics: mel_distance, stft_distance (audiotools' definitions), semantic_used, semantic_perplexity,
    extremes_share, embedding_norm, level_histogram; with `reference` (another encoder's result on the same batches)
    also semantic_equal, levels_equal, levels_within_1), all averaged over clips, and the encoded batches.
    """
    device = next(codec.parameters()).device
    mel_distance = MelDistance(codec.params.sampling_rate).to(device)
    encoded, sums, n_clips = [], {}, 0
    for batch in batches:
        batch = batch.to(device)
        codes = codec.encode(batch.waveform, batch.lengths)
        reconstruction = codec.decode(codes)[..., :batch.waveform.shape[-1]].float()
        distances = {"mel_distance": mel_distance(reconstruction, batch.waveform, batch.lengths),
                     "stft_distance": stft_distance(reconstruction, batch.waveform, batch.lengths)}
        for name, value in distances.items():
            sums[name] = sums.get(name, 0.0) + value.item() * len(batch.lengths)
        n_clips += len(batch.lengths)
        encoded.append(Encoded(batch.waveform.cpu(), reconstruction.cpu(), codes.cpu(), batch.lengths.cpu()))
    metrics = {name: value / n_clips for name, value in sums.items()}
    codes, n_frames = stacked(encoded, codec.params.frame_size)
    statistics = code_statistics(codes, n_frames, codec.params.semantic_codebook_size, codec.params.acoustic_codebook_size)
    metrics.update({name: value.tolist() for name, value in statistics.items()})
    metrics["embedding_norm"] = embedding_norm(codec, codes.to(device), n_frames.to(device)).item()
    if reference is not None:
        expected, _ = stacked(reference, codec.params.frame_size)
        metrics.update({name: value.item() for name, value in code_agreement(codes, expected, n_frames).items()})
    return metrics, encoded


def stacked(encoded: list[Encoded], frame_size: int) -> tuple[Tensor, Tensor]:
    """All codes [N, 1 + acoustic_dim, L] and frame counts [N] of several batches."""
    return torch.cat([e.codes for e in encoded]), ceil_div(torch.cat([e.lengths for e in encoded]), frame_size)


def embedding_norm(codec: VoxtralCodec, codes: Tensor, n_frames: Tensor) -> Tensor:
    """Mean Euclidean norm of the LLM's input rows for these codes (the real model's presets have about 3.7)."""
    return codec.embed_codes(codes).float().norm(dim=-1)[valid_mask(n_frames, codes.shape[-1])].mean()
