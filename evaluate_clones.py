"""Measures whether a checkpoint clones: new sentences in the voices of reference recordings, scored by words and voice.

Every sentence is spoken by the language model as clone_voice.py does it: reference, encoder, codes, frames, decoder.
Several systems, which are encoders with or without a LoRA adapter, say the same with the same noise and are compared
with the first one, pair by pair.

OUTPUT gets index.html to listen to, metrics.json, table.md, clips.csv, clones.png and the first clones as wavs.
"""

from dataclasses import replace
from pathlib import Path

from voxtral.command_line import add_shared, check_options, script_parser, settings

EXAMPLES = """examples:
  # the voices of a manifest say sentences of each other
  python evaluate_clones.py --checkpoint Voxtral-clone --data speech.csv --whisper base --output runs/clones

  # the true encoder of the stand-in, and what phases 1 and 2 made in its place
  python evaluate_clones.py --checkpoint assets/standin --data speech.csv --output runs/clones --whisper base \\
      --system true=assets/standin_withheld_encoder.safetensors --system phase1=runs/demo/best/encoder.safetensors \\
      --system phase2=runs/demo/full/best/encoder.safetensors,runs/demo/full/best/adapter

  # the field's benchmarks: Seed-TTS-eval, and LibriSpeech-PC as F5-TTS cuts it
  python evaluate_clones.py --checkpoint Voxtral-clone --list seedtts_testset/en/meta.lst --whisper large-v3 --output A
  python evaluate_clones.py --checkpoint Voxtral-clone --list librispeech_pc_test_clean_cross_sentence.lst \\
      --root LibriSpeech/test-clean --whisper large-v3 --output B
"""

COMMAND_LINE = script_parser(__doc__, EXAMPLES, checkpoint=True)
option = COMMAND_LINE.add_argument
option("--output", metavar="DIR", type=Path, required=True, help="folder for the results")
option(
    "--system",
    metavar="NAME=ENCODER[,ADAPTER]",
    action="append",
    default=[],
    help="an encoder .safetensors, `own` (the checkpoint's) or `untrained`, and a LoRA adapter's "
    "folder; repeatable, the others are compared with the first (default: own=own)",
)
what = COMMAND_LINE.add_mutually_exclusive_group(required=True)
what.add_argument("--list", metavar="FILE", help="Seed-TTS-eval's meta.lst or F5-TTS's LibriSpeech-PC list")
what.add_argument("--data", metavar="MANIFEST", help="CSV, TSV or JSON lines with path, speaker and text")
option("--root", metavar="DIR", help="of the paths in --list (default: the folder of the list)")
option("--speakers", metavar="NAME,...", help="of --data (default: all)")
option("--prompts", metavar="N", type=int, help="references of each speaker (default: 1)")
option("--sentences", metavar="FILE", help="to be said, one a line (default: texts of other speakers)")
option("--per-voice", metavar="K", type=int, help="sentences that each reference says (default: 2)")
add_shared(COMMAND_LINE, "--whisper", "--speaker-model")
option("--language", metavar="CODE", default="en", help="that is spoken (default: %(default)s)")
option("--max-sec", type=float, default=20.0, help="longest clone (default: %(default)g)")
option("--samples", metavar="N", type=int, default=6, help="items to write as audio (default: 6)")
option("--seed", type=int, default=0, help="of noise, sentences, untrained encoder and bootstrap (default: 0)")
again = "every system once more, as NAME_refined, with codes as clone_voice.py --refine makes them (default: 0, no)"
add_shared(COMMAND_LINE, "--refine", help=again)
add_shared(COMMAND_LINE, "--cfg-alpha", "--device")

if __name__ == "__main__":
    COMMAND_LINE.parse_args()  # --help and mistyped options: before imports that take seconds

from voxtral.checkpoint import write_text
from voxtral.clones import METRICS, Item, Judge, items_of_manifest, read_list, read_system, speak_and_score, summarize
from voxtral.errors import UserError, one_sentence
from voxtral.evaluation_report import arrow, bullets, cell, clones_figure, definitions, markdown, write_rows
from voxtral.json_files import write_json
from voxtral.listening import clone_sections, write_page
from voxtral.plots import save_figure
from voxtral.processes import start_process
from voxtral.sources import CODEC_FRAME_SEC
from voxtral.text import read_sentences
from voxtral.tts import TTS

COLUMNS = {
    "wer": ("word errors, %", 100),
    "own": ("like its reference", 1),
    "own_codec": ("like it through the codec", 1),
    "others": ("like other voices", 1),
    "margin": ("margin", 1),
    "nearest": ("own voice nearest, %", 100),
    "ended": ("ended by itself, %", 100),
    "seconds": ("seconds", 1),
}
OF_MANIFEST = {"speakers": None, "prompts": 1, "sentences": None, "per_voice": 2}  # options of --data, their defaults


# ---------------------------------------------------------------- what is said


def choose_items(options) -> tuple[list[Item], list[str]]:
    """-> items, why clips were passed over. Raises UserError, also for an option that goes with the other of --list and
    --data."""
    given = {name: getattr(options, name) for name in OF_MANIFEST if getattr(options, name) is not None}
    if options.list:
        if given:
            raise UserError(f"--{next(iter(given)).replace('_', '-')} goes with --data: a list says who says what.")
        return read_list(options.list, options.root), []
    if options.root:
        raise UserError("--root goes with --list: the paths of a manifest are relative to its folder.")
    chosen = OF_MANIFEST | given | {"seed": options.seed}
    if chosen["speakers"]:
        chosen["speakers"] = [name.strip() for name in chosen["speakers"].split(",")]
    if chosen["sentences"]:
        chosen["sentences"] = [text for _, text in read_sentences(chosen["sentences"])]
    return items_of_manifest(options.data, **chosen)


# ---------------------------------------------------------------- the report


def summary_rows(systems: dict[str, dict]) -> tuple[list[str], list[list[str]]]:
    """-> header, one row per system."""
    names = list(next(iter(systems.values())))
    header = ["", *(COLUMNS[name][0] + arrow(name, METRICS) for name in names)]
    return header, [
        [system, *(cell(metrics[name], COLUMNS[name][1]) for name in names)] for system, metrics in systems.items()
    ]


def table(report: dict) -> str:
    """The content of metrics.json as Markdown."""
    parts = [
        f"Clones: {report['items']}. References: {report['references']}. Speakers: {report['speakers']}.\n",
        markdown(*summary_rows(report["systems"])),
    ]
    if report["differences"]:
        header, rows = summary_rows(report["differences"])
        rows = [[*row, cell(report["margin_kept"][row[0]], 100)] for row in rows]
        parts.append(
            f"## Differences to {next(iter(report['systems']))}, clip by clip\n\n"
            + markdown([*header, "share of its margin kept, %"], rows)
        )
    if report["speakers"] > 1:
        parts.append("In brackets: 95 % intervals, bootstrapped over speakers.\n")
    parts += [*definitions(report), *bullets(f"Left out: {len(report['left_out'])} clips", report["left_out"])]
    return "\n".join(parts)


def main(arguments=None) -> None:
    options = COMMAND_LINE.parse_args(arguments)

    with one_sentence():
        # ---- 1. what is asked for ----
        least = {"prompts": 1, "per_voice": 1, "samples": 0, "seed": 0, "cfg_alpha": 0, "refine": 0}
        check_options(options, max_sec=CODEC_FRAME_SEC, **least)
        items, left_out = choose_items(options)

        # ---- 2. models ----
        device = start_process(options.device).device
        judge = Judge(options.speaker_model, options.whisper, device, options.language)
        tts = TTS.from_checkpoint(options.checkpoint, device)
        systems = [read_system(system, tts, options.seed) for system in options.system or ["own=own"]]
        if options.refine:
            systems += [replace(system, name=f"{system.name}_refined", refine_sec=options.refine) for system in systems]
        if len({system.name for system in systems}) < len(systems):
            raise UserError("two of --system have the same name.")

        # ---- 3. speak and score ----
        options.output.mkdir(parents=True, exist_ok=True)
        rows, audio = speak_and_score(
            tts, systems, items, judge, options.max_sec, options.seed, options.samples, options.cfg_alpha
        )

        # ---- 4. report ----
        speakers = {item.speaker for item in items}
        report = {
            "items": len(items),
            "references": len({item.reference for item in items}),
            "speakers": len(speakers),
            "settings": settings(options),
            "left_out": left_out,
            "not_measured": {},
            "definitions": {name: metric.definition for name, metric in METRICS.items() if name in rows[0]},
            **summarize(rows, options.seed),
        }
        if not options.whisper:
            report["not_measured"]["word errors"] = (
                "--whisper names one of openai-whisper's models, which is downloaded once, or a local .pt"
            )
        if len(speakers) == 1:
            report["not_measured"]["likeness with other voices"] = "needs references of two speakers or more"
        text = table(report)
        write_json(options.output / "metrics.json", report)
        write_text(options.output / "table.md", text)
        write_rows(options.output / "clips.csv", rows)
        save_figure(clones_figure(report["systems"]), options.output / "clones.png")
        intro = (
            "<p>New sentences in the voices of recordings. In brackets: 95 % intervals over speakers. "
            '<a href="table.md">The whole table</a>, <a href="clones.png">a picture of it</a>, '
            '<a href="clips.csv">all clips</a>.</p>'
        )
        header, lines = summary_rows(report["systems"])
        write_page(
            options.output / "index.html",
            f"Clones by {Path(options.checkpoint).resolve().name}",
            intro,
            header,
            [[value.replace(" [", "\n[") for value in line] for line in lines],
            clone_sections(options.output, items, rows, audio),
        )
        print(f"{text}\nwritten to {options.output}/, to be heard in {options.output}/index.html")


if __name__ == "__main__":
    main()
