"""Validation on fixed clips, quantized as serving quantizes, by metrics that no switch redefines."""

from dataclasses import dataclass
from pathlib import Path

import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.tensorboard import SummaryWriter

from voxtral.checkpoint import SafetensorsFile
from voxtral.clip_list import Clip
from voxtral.code_metrics import code_agreement, code_statistics
from voxtral.codec import VoxtralCodec, ceil_div, valid_mask
from voxtral.data import Batch, validation_batches
from voxtral.known_codes import codes_of_clips
from voxtral.losses import MelDistance, stft_distance
from voxtral.plots import save_figure, spectrogram_figure
from voxtral.sources import DataConfig, source_name


@dataclass
class DecodedBatch:
    """One batch of clips through a codec, on the CPU."""

    waveform: Tensor  # [B, 1, T] source
    reconstruction: Tensor  # [B, 1, T] decoded from the codes
    codes: Tensor  # [B, 1 + acoustic_dim, L]
    lengths: Tensor  # [B] samples


@torch.no_grad()
def evaluate_codec(
    codec: VoxtralCodec,
    batches: list[Batch],
    reference: list[DecodedBatch] | None = None,
    true_codes: list[Tensor | None] | None = None,
) -> tuple[dict, list[DecodedBatch]]:
    """Encodes every clip as if it were alone, decodes its codes, and measures.

    Returns (metrics: mel_distance, stft_distance (audiotools' definitions), semantic_used, semantic_perplexity,
    extremes_share, embedding_norm, level_histogram; with `reference` (another encoder's result on the same batches)
    also semantic_equal, levels_equal, levels_within_1; with `true_codes`, of each clip [1 + acoustic_dim, L] or None,
    the same three as known_semantic_equal, ...), all averaged over clips, and the encoded batches.
    """
    device = next(codec.parameters()).device
    mel_distance = MelDistance(codec.params.sampling_rate).to(device)
    encoded, sums, n_clips = [], {}, 0
    for batch in batches:
        batch = batch.to(device)
        codes = codec.encode(batch.waveform, batch.lengths)
        reconstruction = codec.decode(codes)[..., : batch.waveform.shape[-1]].float()
        distances = {
            "mel_distance": mel_distance(reconstruction, batch.waveform, batch.lengths),
            "stft_distance": stft_distance(reconstruction, batch.waveform, batch.lengths),
        }
        for name, value in distances.items():
            sums[name] = sums.get(name, 0.0) + value.item() * len(batch.lengths)
        n_clips += len(batch.lengths)
        encoded.append(DecodedBatch(batch.waveform.cpu(), reconstruction.cpu(), codes.cpu(), batch.lengths.cpu()))
    metrics = {name: value / n_clips for name, value in sums.items()}
    codes, n_frames = stacked(encoded, codec.params.frame_size)
    statistics = code_statistics(
        codes, n_frames, codec.params.semantic_codebook_size, codec.params.acoustic_codebook_size
    )
    metrics.update({name: value.tolist() for name, value in statistics.items()})
    metrics["embedding_norm"] = embedding_norm(codec, codes.to(device), n_frames.to(device)).item()
    if reference is not None:
        expected, _ = stacked(reference, codec.params.frame_size)
        metrics.update({name: value.item() for name, value in code_agreement(codes, expected, n_frames).items()})
    if any(one is not None for one in true_codes or []):
        n_whole = torch.cat([e.lengths for e in encoded]) // codec.params.frame_size
        metrics.update(known_agreement(codes, n_whole, true_codes))
    return metrics, encoded


def test_weights(codec: VoxtralCodec, folder: Path, clips: list[Clip], config: DataConfig) -> tuple[dict, list]:
    """The weights in `folder`, put into `codec`, on clips that nothing was chosen by -> name of a source, or "all" ->
    what evaluate_codec() measures, and "clips"; (path, reason) of those that cannot be used."""
    codec.load_encoder(SafetensorsFile(folder / "encoder.safetensors").read())
    if (folder / "decoder.safetensors").is_file():
        codec.load_decoder(SafetensorsFile(folder / "decoder.safetensors").read())
    groups, all_bad = {"all": clips}, []
    numbers = sorted({clip.source for clip in clips})
    if len(numbers) > 1:
        for number in numbers:
            groups[source_name(config.sources[number])] = [clip for clip in clips if clip.source == number]
    metrics = {}
    for name, group in groups.items():
        batches = validation_batches(group, config)
        true_codes, bad = codes_of_clips(group, batches, codec.params)
        metrics[name] = {"clips": len(true_codes)} | evaluate_codec(codec, batches, true_codes=true_codes)[0]
        all_bad += [*batches[0].bad, *bad] if name == "all" else []
    return metrics, all_bad


def write_samples(
    folder: Path, encoded: list[DecodedBatch], n_clips: int, sampling_rate: int, board: SummaryWriter, step: int
) -> None:
    """The first clips as audio and spectrogram, in folder/step_XXXXXXXX and on the board; their sources once."""
    place = folder / f"step_{step:08d}"
    place.mkdir(parents=True, exist_ok=True)
    clips = [
        (e.waveform[i, 0, :n], e.reconstruction[i, 0, :n]) for e in encoded for i, n in enumerate(e.lengths.tolist())
    ]
    for i, (source, reconstruction) in enumerate(clips[:n_clips]):
        paths = {place / f"clip_{i}_reconstruction.wav": reconstruction}
        if not (once := folder / f"clip_{i}_source.wav").exists():
            paths[once] = source
        for path, audio in paths.items():
            soundfile.write(path, audio.numpy(), sampling_rate)
            board.add_audio(path.stem, audio.clamp(-1, 1)[None], step, sampling_rate)
        figure = spectrogram_figure({"source": source, "reconstruction": reconstruction}, sampling_rate)
        save_figure(figure, place / f"clip_{i}.png")
        board.add_figure(f"clip_{i}/spectrogram", figure, step)


def in_words(metrics: dict) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float))


def known_agreement(codes: Tensor, n_whole: Tensor, true_codes: list[Tensor | None]) -> dict[str, float]:
    """Codes [N, 1 + acoustic_dim, L] of N clips, of which n_whole [N] frames are whole (a cut may leave a part of one)
    -> shares that equal those that the clips were decoded from, where these are known."""
    known = [i for i, one in enumerate(true_codes) if one is not None]
    wanted = pad_sequence([true_codes[i].T for i in known], batch_first=True).transpose(1, 2)
    wanted = F.pad(wanted, (0, codes.shape[-1] - wanted.shape[-1]))  # or cut
    n_frames = torch.tensor([min(int(n_whole[i]), true_codes[i].shape[1]) for i in known])
    return {f"known_{name}": value.item() for name, value in code_agreement(codes[known], wanted, n_frames).items()}


def stacked(encoded: list[DecodedBatch], frame_size: int) -> tuple[Tensor, Tensor]:
    """All codes [N, 1 + acoustic_dim, L] and frame counts [N] of several batches."""
    return torch.cat([e.codes for e in encoded]), ceil_div(torch.cat([e.lengths for e in encoded]), frame_size)


def embedding_norm(codec: VoxtralCodec, codes: Tensor, n_frames: Tensor) -> Tensor:
    """Mean Euclidean norm of the LLM's input rows for these codes (the real model's presets have about 3.7)."""
    return codec.embed_codes(codes).float().norm(dim=-1)[valid_mask(n_frames, codes.shape[-1])].mean()
