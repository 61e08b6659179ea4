"""The whole project on a laptop: finds an encoder for the embedded stand-in, and lets it speak in new voices.

The stand-in (assets/standin) has the released checkpoint's layout at small widths and says sentences of about 90 words.
Its true encoder was withheld from training. So what this prints is what nobody can say of the real model: how much of a
voice that it never heard comes through the true encoder, through ours, and through an untrained one.
"""

import json
import shutil
import time
from dataclasses import replace
from html import escape
from pathlib import Path

from voxtral.command_line import add_shared, script_parser

CONFIG = "configs/demo.yaml"

COMMAND_LINE = script_parser(__doc__)
add_shared(COMMAND_LINE, "--whisper", "--speaker-model")
COMMAND_LINE.add_argument(
    "overrides", nargs="*", metavar="key=value", help=f"settings that override {CONFIG}, such as train.max_steps=100"
)
if __name__ == "__main__":
    COMMAND_LINE.parse_intermixed_args()  # --help and mistyped options: before imports that take seconds

import generate_clips
import train_encoder
import train_full_pipeline
from voxtral.clones import Item, Judge, items_of_clips, read_system, speak_and_score, summarize
from voxtral.codec import VoxtralCodec
from voxtral.config import EncoderConfig, load_config
from voxtral.data import validation_batches
from voxtral.errors import one_sentence
from voxtral.inject import inject
from voxtral.json_files import write_json
from voxtral.listening import clone_sections, write_page
from voxtral.plots import levels_figure, save_figure
from voxtral.sources import find_clips, split_validation
from voxtral.tts import TTS
from voxtral.validation import evaluate_codec

FULL_CONFIG = "configs/demo_full_pipeline.yaml"
SENTENCES = "assets/sentences_talk.tsv"
WITHHELD = "assets/standin_withheld_encoder.safetensors"
CLIPS_PER_VOICE = 24  # that the stand-in's presets say: known codes for phase 1, pairs for phase 2
SENTENCES_PER_VOICE = 2  # that every unheard voice says
LONGEST_SEC = 8.0  # of a clone
WHOLE_CLIP_SEC = 7.0  # no clip of assets/speech/talk is longer
LONGEST_REFINED_SEC = 60.0  # of each of them; it takes a few seconds
N_LISTEN = 4  # clones of each encoder on the page: two voices, two sentences each
HEADERS = [
    "reference through",
    "sound: mel distance ↓",
    "voice: like its speaker ↑",
    "like other speakers",
    "voice kept ↑",
    "words wrong ↓",
]
LABELS = {
    "true": "the true encoder",
    "trained": "ours, after phase 1",
    "refined": "the same, codes refined",
    "adapted": "ours, after phase 2",
    "untrained": "an untrained encoder",
}


def sound(config: EncoderConfig, systems: list) -> dict[str, dict]:
    """Name -> sound and codes of the clips of unheard speakers through each encoder; the first one is the true one."""
    _, clips = split_validation(find_clips(config.data)[0], config.data.validation)
    batches = validation_batches(clips, replace(config.data, max_sec=WHOLE_CLIP_SEC))
    codec, rows, encoded = VoxtralCodec.from_checkpoint(config.checkpoint), {}, None
    for system in systems:
        codec.load_encoder(system.encoder, system.name)
        rows[system.name], found = evaluate_codec(codec, batches, encoded)
        encoded = encoded or found
    return rows


def new_sentences(config: EncoderConfig) -> list[Item]:
    """What is said: sentences of other unheard speakers, in the voices of the unheard speakers."""
    _, clips = split_validation(find_clips(config.data)[0], config.data.validation)
    order = config.data.validation.speakers.index
    clips = sorted(clips, key=lambda clip: (order(clip.speaker), clip.path))
    return items_of_clips(clips, per_voice=SENTENCES_PER_VOICE)[0]


def table_rows(rows: dict[str, dict], clones: dict) -> list[list[str]]:
    """Cells of HEADERS, one row per encoder; `clones` is what summarize() gives."""
    lines = []
    for name, metrics in clones["systems"].items():
        kept = clones["margin_kept"].get(name, {"value": 1.0})["value"]
        words = f"{metrics['wer']['value']:.0%}" if "wer" in metrics else "–"
        distance = f"{rows[name]['mel_distance']:.2f}" if name in rows else "–"
        own, others = f"{metrics['own']['value']:.2f}", f"{metrics['others']['value']:.2f}"
        lines.append([LABELS[name], distance, own, others, f"{kept:.0%}", words])
    return lines


def plain(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def write_report(
    folder: Path, report: dict, rows: dict, items: list[Item], spoken: list[dict], audio: dict, intro: str
) -> None:
    """metrics.json, levels.png, and index.html with its wavs and spectrograms."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "metrics.json", report)
    histograms = {name: metrics["level_histogram"] for name, metrics in rows.items()}
    save_figure(levels_figure(histograms), folder / "levels.png")
    write_page(
        folder / "index.html",
        "A voice that says something new",
        f"<p>{escape(intro)}</p>",
        HEADERS,
        table_rows(rows, report["clones"]),
        clone_sections(folder, items, spoken, audio),
    )


def main(arguments=None) -> None:
    options = COMMAND_LINE.parse_intermixed_args(arguments)
    with one_sentence():
        run, started = Path(load_config(EncoderConfig, CONFIG, options.overrides).output_dir), time.monotonic()
        generated = (run / "generated").resolve()
        overrides = [f"match.codes={generated}", *options.overrides, f"data.sources.1.path={generated}"]
        config = load_config(EncoderConfig, CONFIG, overrides)
        judge = Judge(options.speaker_model, options.whisper)  # what is missing is said before any work
        if (run / "config.yaml").is_file():
            shutil.rmtree(run)  # of an earlier demo

        # ---- 1. the checkpoint's presets speak: clips whose codes are known ----
        generate_clips.main(
            [f"--checkpoint={config.checkpoint}", f"--output={generated}", "--device=cpu"]
            + [f"--per-voice={CLIPS_PER_VOICE}", f"--max-sec={LONGEST_SEC}", f"--texts={SENTENCES}"]
        )
        # ---- 2. phase 1, and the encoder into the checkpoint ----
        began = time.monotonic()
        train_encoder.main(["--config", CONFIG, *overrides])
        trained_sec = time.monotonic() - began
        injected = inject(config.checkpoint, run / "best" / "encoder.safetensors", output=run / "checkpoint")
        # ---- 3. phase 2 ----
        train_full_pipeline.main(
            ["--config", FULL_CONFIG, f"checkpoint={injected}", f"output_dir={run / 'full'}", f"data.data_root={run}"]
        )
        full = json.loads((run / "full" / "report.json").read_text())
        adapted = run / "full" / "best" / "encoder.safetensors"
        # ---- 4. new sentences in voices that nothing here has heard ----
        tts = TTS.from_checkpoint(injected)
        systems = [
            read_system(system, tts, config.seed)
            for system in (f"true={WITHHELD}", "trained=own", f"adapted={adapted}", "untrained=untrained")
        ]
        # As patch_tokenizer.py --refine registers a voice: the codes of our encoder, fitted to the recording.
        systems.insert(2, replace(systems[1], name="refined", refine_sec=LONGEST_REFINED_SEC))
        items = new_sentences(config)
        spoken, audio = speak_and_score(tts, systems, items, judge, LONGEST_SEC, config.seed, N_LISTEN)
        # ---- 5. report ----
        rows = sound(config, [system for system in systems if not system.refine_sec])
        mel = {name: metrics["mel_distance"] for name, metrics in rows.items()}
        closed = (mel["untrained"] - mel["trained"]) / (mel["untrained"] - mel["true"])
        clones = summarize(spoken, config.seed)
        report = {"rows": rows, "mel_gap_closed": closed, "clones": clones, "full_pipeline": full}
        report["trained_sec"] = trained_sec
        intro = (
            f"{len(config.data.validation.speakers)} voices that neither the stand-in nor our encoder has heard say "
            f"{len(items)} sentences that were in no training. The language model hears the voice in the codes of "
            "one recording: through the true encoder, which was withheld, through ours, and through an untrained "
            "one. Voice kept: of what makes the true encoder's clones more like their own speaker than like the "
            "others."
        )
        write_report(run / "report", report, rows, items, spoken, audio, intro)
        print(
            f"\n{intro}\n\n{plain([HEADERS, *table_rows(rows, clones)])}\n\n"
            f"Phase 1 took {trained_sec / 60:.1f} min and "
            f"closed {closed:.1%} of the gap in sound; all of it {(time.monotonic() - started) / 60:.1f} min.\n"
            f"{injected} is the checkpoint with our encoder.\n"
            f"Listen: {run}/report/index.html (a plain file for any browser)"
        )


if __name__ == "__main__":
    main()
