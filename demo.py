"""Both phases on a laptop: trains an encoder for the embedded stand-in checkpoint, adapts the language model, measures.

The stand-in (assets/standin) has the released checkpoint's layout at small widths, and its true encoder was withheld
from training. So the table this prints says what nobody can say of the real model: how close the trained encoder comes
to the true one, in sound and in codes, for speakers that it never heard.
"""
import argparse
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import soundfile
import torch

import generate_clips
import train_encoder
import train_full_pipeline
from voxtral.checkpoint import SafetensorsFile, write_text
from voxtral.codec import VoxtralCodec
from voxtral.config import EncoderConfig, FullPipelineConfig, load_config
from voxtral.data import SAMPLE_RATE, validation_batches
from voxtral.errors import one_sentence
from voxtral.inject import inject
from voxtral.plots import levels_figure, save_figure, spectrogram_figure
from voxtral.sources import find_clips, split_validation
from voxtral.validation import evaluate_codec

CONFIG = "configs/demo.yaml"
FULL_CONFIG = "configs/demo_full_pipeline.yaml"
CLIPS_PER_VOICE = 24  # that the stand-in's own language model speaks for phase 2
WITHHELD = Path("assets/standin_withheld_encoder.safetensors")
WHOLE_CLIP_SEC = 5.0  # the demo's clips last 3 to 4 s
N_LISTEN = 4          # held-out clips written as wav and spectrogram
COLUMNS = {"mel_distance": "mel", "stft_distance": "STFT", "semantic_equal": "semantic =", "levels_equal": "levels =",
           "levels_within_1": "levels ±1", "semantic_used": "codes used", "extremes_share": "extremes",
           "embedding_norm": "row norm"}
FULL_COLUMNS = {"ours_mse_audio": "hidden MSE", "ours_top1": "ours top-1", "ours_kl": "ours KL",
                "preset_top1": "preset top-1", "preset_kl": "preset KL"}


def adapt(config: EncoderConfig, injected: Path) -> tuple[Path, dict]:
    """Phase 2 on clips that the stand-in speaks -> checkpoint with what came of it, {"before": ..., "after": ...}."""
    run = Path(config.output_dir)
    generate_clips.main(["--checkpoint", config.checkpoint, "--output", str(run / "generated"), "--device", "cpu",
                         "--per-voice", str(CLIPS_PER_VOICE), "--max-sec", "5"])
    train_full_pipeline.main(["--config", FULL_CONFIG, f"checkpoint={injected}", f"output_dir={run / 'full'}",
                              f"data.data_root={run}"])
    best = run / "full" / "best"
    adapted = inject(config.checkpoint, best / "encoder.safetensors", best / "adapter", output=run / "checkpoint_adapted")
    return adapted, json.loads((run / "full" / "report.json").read_text())


def evaluate_all(config: EncoderConfig, injected: dict[str, Path]) -> tuple[dict, dict]:
    """-> metrics and encoded clips of the true, the untrained and the `injected` encoders, on the held-out speakers."""
    _, clips = split_validation(find_clips(config.data)[0], config.data.validation)
    batches = validation_batches(clips, replace(config.data, max_sec=WHOLE_CLIP_SEC))
    torch.manual_seed(config.seed)
    folders = {"true_encoder": config.checkpoint, **injected, "untrained": config.checkpoint}
    codecs = {name: VoxtralCodec.from_checkpoint(folder) for name, folder in folders.items()}
    codecs["true_encoder"].load_encoder(SafetensorsFile(WITHHELD).read(), WITHHELD)
    rows, encoded = {}, {}
    for name, codec in codecs.items():
        rows[name], encoded[name] = evaluate_codec(codec, batches, encoded.get("true_encoder"))
    rows["true_encoder"] |= {key: 1.0 for key in ("semantic_equal", "levels_equal", "levels_within_1")}
    return rows, encoded


def write_listening(encoded: dict, folder: Path) -> None:
    """wavs and spectrograms of the first held-out clips: the source and what each encoder makes of it."""
    first = {name: batches[0] for name, batches in encoded.items()}
    source = next(iter(first.values()))
    for i, length in enumerate(source.lengths.tolist()[:N_LISTEN]):
        audio = {"source": source.waveform[i, 0, :length]}
        audio |= {name: batch.reconstruction[i, 0, :length] for name, batch in first.items()}
        for name, samples in audio.items():
            soundfile.write(folder / f"clip_{i}_{name}.wav", samples.numpy(), SAMPLE_RATE)
        save_figure(spectrogram_figure(audio, SAMPLE_RATE), folder / f"clip_{i}.png")


def table(rows: dict, columns: dict[str, str]) -> str:
    """Plain text, one row per encoder."""
    lines = [f"{'':<14}" + "".join(f"{title:>14}" for title in columns.values())]
    for name, metrics in rows.items():
        cells = (f"{metrics[key]:.1%}" if any(part in key for part in ("equal", "within", "share", "top1"))
                 else f"{metrics[key]:.0f}" if key == "semantic_used" else f"{metrics[key]:.3f}" for key in columns)
        lines.append(f"{name:<14}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value",
                        help=f"settings that override {CONFIG}, such as train.max_steps=100")
    options = parser.parse_args(arguments)
    with one_sentence():
        config = load_config(EncoderConfig, CONFIG, options.overrides)
        run = Path(config.output_dir)
        if (run / "config.yaml").is_file():
            shutil.rmtree(run)  # of an earlier demo
        started = time.monotonic()
        train_encoder.main(["--config", CONFIG, *options.overrides])
        trained_sec = time.monotonic() - started

        injected = inject(config.checkpoint, run / "best" / "encoder.safetensors", output=run / "checkpoint")
        adapted, full = adapt(config, injected)
        rows, encoded = evaluate_all(config, {"trained": injected, "adapted": adapted})
        mel = {name: metrics["mel_distance"] for name, metrics in rows.items()}
        closed = (mel["untrained"] - mel["trained"]) / (mel["untrained"] - mel["true_encoder"])
        report = run / "report"
        report.mkdir(parents=True, exist_ok=True)
        write_text(report / "metrics.json", json.dumps({"rows": rows, "mel_gap_closed": closed, "full_pipeline": full,
                                                        "trained_sec": trained_sec}, indent=2) + "\n")
        write_listening(encoded, report)
        save_figure(levels_figure({name: metrics["level_histogram"] for name, metrics in rows.items()}),
                    report / "levels.png")
        voices = load_config(FullPipelineConfig, FULL_CONFIG, []).data.validation.speakers
        print(f"\nPhase 1. Held-out speakers {', '.join(config.data.validation.speakers)}, "
              f"{sum(len(batch.lengths) for batch in encoded['trained'])} clips; `trained` is read back from {injected}, "
              f"`adapted` from {adapted}\n\n{table(rows, COLUMNS)}\n\n"
              f"trained in {trained_sec / 60:.1f} min, {closed:.1%} of the mel gap between untrained and true is closed\n\n"
              f"Phase 2. Held-out voices {', '.join(voices)} and sentences; `ours`: prompts with this encoder's codes, "
              f"`preset`: with true ones\n\n{table({name: full[name] for name in ('before', 'after')}, FULL_COLUMNS)}\n\n"
              f"listen and look: {report}/ (clip_0_source.wav, clip_0_trained.wav, clip_0.png, levels.png), "
              f"{run}/full/plots/layers.png")


if __name__ == "__main__":
    main()
