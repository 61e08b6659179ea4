"""The whole of phase 1 on a laptop: trains an encoder for the embedded stand-in checkpoint, puts it in, measures it.

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

import train_encoder
from voxtral.checkpoint import SafetensorsFile, write_text
from voxtral.codec import VoxtralCodec
from voxtral.config import EncoderConfig, load_config
from voxtral.data import SAMPLE_RATE, validation_batches
from voxtral.errors import one_sentence
from voxtral.inject import inject
from voxtral.plots import levels_figure, save_figure, spectrogram_figure
from voxtral.sources import find_clips, split_validation
from voxtral.validation import evaluate_codec

CONFIG = "configs/demo.yaml"
WITHHELD = Path("assets/standin_withheld_encoder.safetensors")
WHOLE_CLIP_SEC = 5.0  # the demo's clips last 3 to 4 s
N_LISTEN = 4          # held-out clips written as wav and spectrogram
COLUMNS = {"mel_distance": "mel", "stft_distance": "STFT", "semantic_equal": "semantic =", "levels_equal": "levels =",
           "levels_within_1": "levels ±1", "semantic_used": "codes used", "extremes_share": "extremes",
           "embedding_norm": "row norm"}


def evaluate_all(config: EncoderConfig, injected: Path) -> tuple[dict, dict]:
    """-> metrics and encoded clips of the true, the trained and the untrained encoder, on the held-out speakers."""
    _, clips = split_validation(find_clips(config.data)[0], config.data.validation)
    batches = validation_batches(clips, replace(config.data, max_sec=WHOLE_CLIP_SEC))
    torch.manual_seed(config.seed)
    codecs = {"true_encoder": VoxtralCodec.from_checkpoint(config.checkpoint),
              "trained": VoxtralCodec.from_checkpoint(injected),
              "untrained": VoxtralCodec.from_checkpoint(config.checkpoint)}
    file = SafetensorsFile(WITHHELD)
    codecs["true_encoder"].load_encoder(file.read(file.entries), WITHHELD)
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


def table(rows: dict) -> str:
    """Plain text, one row per encoder."""
    lines = [f"{'':<14}" + "".join(f"{title:>12}" for title in COLUMNS.values())]
    for name, metrics in rows.items():
        cells = (f"{metrics[key]:.1%}" if "equal" in key or "within" in key or "share" in key
                 else f"{metrics[key]:.0f}" if key == "semantic_used" else f"{metrics[key]:.3f}" for key in COLUMNS)
        lines.append(f"{name:<14}" + "".join(f"{cell:>12}" for cell in cells))
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
        rows, encoded = evaluate_all(config, injected)
        mel = {name: metrics["mel_distance"] for name, metrics in rows.items()}
        closed = (mel["untrained"] - mel["trained"]) / (mel["untrained"] - mel["true_encoder"])
        report = run / "report"
        report.mkdir(parents=True, exist_ok=True)
        write_text(report / "metrics.json", json.dumps({"rows": rows, "mel_gap_closed": closed,
                                                        "trained_sec": trained_sec}, indent=2) + "\n")
        write_listening(encoded, report)
        save_figure(levels_figure({name: metrics["level_histogram"] for name, metrics in rows.items()}),
                    report / "levels.png")
        print(f"\nheld-out speakers {', '.join(config.data.validation.speakers)}, "
              f"{sum(len(batch.lengths) for batch in encoded['trained'])} clips; the trained encoder is read back from "
              f"{injected}\n\n{table(rows)}\n\n"
              f"trained in {trained_sec / 60:.1f} min, {closed:.1%} of the mel gap between untrained and true is closed\n"
              f"listen and look: {report}/ (clip_0_source.wav, clip_0_trained.wav, clip_0.png, levels.png)")


if __name__ == "__main__":
    main()
