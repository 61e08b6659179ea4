"""Measures an encoder on clips: sound, codes, voice embeddings, and how near it is to a reference encoder.

Every clip passes through the codec alone, in fp32. With --reference-encoder (the true encoder of a stand-in checkpoint)
it also tells which share of the gap between an untrained and the true encoder is closed. Clips of generate_clips.py
come with the codes that they were decoded from: how many of these the encoder finds is the one truth that there is
about the real checkpoint. With --degrade it scores known degradations of the clips instead, which shows what each score
is worth.

OUTPUT gets metrics.json, table.md, clips.csv, plots (png), and the first clips as wavs and spectrograms.
"""

import math
from pathlib import Path

from voxtral.command_line import SHARED, add_shared, check_options, script_parser, settings
from voxtral.score_table import DEFAULT_SCORES, ECAPA_MODEL, SCORES

NEEDS = "\n".join(f"  {name:<8} {metric.install}" for name, metric in SCORES.items() if metric.install)
EXAMPLES = f"""scores that need more than requirements.txt:
{NEEDS}

examples:
  # an injected checkpoint on a folder of recordings
  python evaluate.py --checkpoint Voxtral-clone --data my_speech --output runs/evaluation

  # how many of the true codes of generated clips it finds
  python evaluate.py --checkpoint Voxtral-clone --data data/generated --output runs/evaluation

  # a trained encoder against the withheld one, on the validation clips of a config
  python evaluate.py --checkpoint assets/standin --encoder runs/demo/best/encoder.safetensors \\
      --reference-encoder assets/standin_withheld_encoder.safetensors --data configs/demo.yaml --output runs/evaluation

  # what the scores are worth: the same clips through noise, Opus and a band limit
  python evaluate.py --degrade --data configs/demo.yaml --metrics mel,stft,sisdr,pesq,estoi --output runs/calibration
"""

COMMAND_LINE = script_parser(__doc__, EXAMPLES, checkpoint=True)
option = COMMAND_LINE.add_argument
option("--encoder", metavar="FILE", help="encoder .safetensors (default: the checkpoint's own)")
option("--reference-encoder", metavar="FILE", help="the true encoder, to compare with")
option("--degrade", action="store_true", help="score known degradations; no checkpoint is read")
option(
    "--data",
    metavar="CONFIG|FOLDER|MANIFEST",
    required=True,
    help="recordings in a folder per speaker, a CSV, TSV or JSONL with path and speaker, or a YAML with data:",
)
option("--all", action="store_true", help="all clips of a config, not its held-out ones alone")
option("--output", metavar="DIR", type=Path, required=True, help="folder for the results")
option(
    "--metrics",
    metavar="NAME,...",
    default=",".join(DEFAULT_SCORES),
    help=f"scores, of {','.join(SCORES)} (default: %(default)s)",
)
add_shared(COMMAND_LINE, "--whisper", default="base", help=SHARED["--whisper"]["help"] + " (default: base)")
add_shared(COMMAND_LINE, "--speaker-model")
option(
    "--ecapa-model", metavar="MODEL", default=ECAPA_MODEL, help="a name or a folder, for ecapa (default: %(default)s)"
)
option("--max-sec", type=float, default=20.0, help="longer clips are cut (default: %(default)g)")
option("--samples", metavar="N", type=int, default=4, help="clips to write as audio (default: 4)")
option("--seed", type=int, default=0, help="of the untrained encoder and the bootstrap (default: 0)")
add_shared(COMMAND_LINE, "--device")
option("overrides", nargs="*", metavar="data.key=value", help="changes to the config of --data")

if __name__ == "__main__":
    COMMAND_LINE.parse_intermixed_args()  # --help and mistyped options: before imports that take seconds

from tqdm import tqdm

from voxtral.audio import SAMPLE_RATE
from voxtral.checkpoint import SafetensorsFile, write_text
from voxtral.clip_list import Clip
from voxtral.codec import VoxtralCodec
from voxtral.data import read_config
from voxtral.degrade import DEGRADATIONS, order
from voxtral.errors import UserError, one_sentence
from voxtral.evaluation import (
    METRICS,
    Agreement,
    Averages,
    EncodedClip,
    Sample,
    all_codes,
    compare_voices,
    fresh_encoder,
    gap_closed,
    load_samples,
    measure_clips,
    read_true_codes,
    voice_statistics,
)
from voxtral.evaluation_report import gap_figure, scores_figure, table, voices_figure, write_clips, write_listening
from voxtral.json_files import write_json
from voxtral.plots import levels_figure, save_figure
from voxtral.processes import start_process
from voxtral.scores import Scorer, check_scores, not_measured
from voxtral.sources import DataConfig, SourceConfig, final_clips, find_clips, split_validation
from voxtral.voices import preset_embeddings

MANIFESTS = (".csv", ".tsv", ".jsonl")

# ---------------------------------------------------------------- what is measured


def choose_clips(data: str, overrides: list[str], everything: bool) -> tuple[list[Clip], list[str]]:
    """-> clips of a folder or manifest (all) or a config (its test clips, without these its validation clips, or all),
    absent sources. A folder that generate_clips.py wrote comes with its codes. Raises DataError."""
    path = Path(data)
    if path.is_dir() or path.suffix.lower() in MANIFESTS and path.is_file():
        if overrides:
            raise UserError(f"'{overrides[0]}': --data is no config, only a config has keys to set.")
        kind = "generated" if (path / "manifest.jsonl").is_file() else "folder" if path.is_dir() else "manifest"
        sources, absent = find_clips(DataConfig(data_root="", sources=[SourceConfig(kind=kind, path=data)]))
        everything = True
    else:
        config = read_config(data, overrides)
        sources, absent = find_clips(config)
    if not everything:
        return final_clips(sources, config.validation) or split_validation(sources, config.validation)[1], absent
    return list({clip.path: clip for source in sources for clip in source}.values()), absent


def read_encoders(codec: VoxtralCodec, options) -> dict[str, dict]:
    """System -> encoder tensors: reference and untrained (both with --reference-encoder), encoder."""
    encoders = {}
    for name, path in (("reference", options.reference_encoder), ("encoder", options.encoder)):
        if path:
            encoders[name] = SafetensorsFile(path).read()
    if "encoder" not in encoders:
        if not codec.has_encoder:
            raise UserError(f"{options.checkpoint} has no encoder: pass --encoder, or put one in (inject_encoder.py).")
        encoders["encoder"] = {name: tensor.clone() for name, tensor in codec.encoder_tensors().items()}
    if "reference" in encoders:
        encoders["untrained"] = fresh_encoder(codec, options.seed)
    return encoders


# ---------------------------------------------------------------- the two ways to measure


def evaluate(options, samples: list[Sample], scorer: Scorer, averages: Averages, device) -> tuple[dict, dict, dict]:
    """-> report, rows of clips by system, audio of the first clips by system. Writes levels.png and voices.png."""
    # ---- 1. the codec and its encoders ----
    codec = VoxtralCodec.from_checkpoint(options.checkpoint)
    encoders = read_encoders(codec, options)
    codec.to(device)
    presets = [rows.float() for rows in preset_embeddings(options.checkpoint).values()]
    bad_codes = read_true_codes(samples, codec.params)

    # ---- 2. every clip through every encoder ----
    agreement = Agreement(codec) if "reference" in encoders else None
    sources = [scorer.listen(sample.waveform) for sample in progress(samples, "sources", len(samples))]
    files = {"reference": options.reference_encoder, "encoder": options.encoder or options.checkpoint}
    rows, audio, encoded = {}, {}, {}
    for system, tensors in encoders.items():
        codec.load_encoder(tensors, files.get(system, "a fresh encoder"))
        rows[system], audio[system], encoded[system] = [], [], []
        expected = encoded["reference"] if agreement and system != "reference" else None
        measured = measure_clips(codec, samples, sources, scorer, agreement, expected)
        for i, (row, clip, decoded) in enumerate(progress(measured, system, len(samples))):
            rows[system].append(row)
            encoded[system].append(clip)
            if i < options.samples:
                audio[system].append(decoded)
    systems, means = summaries(rows, averages)

    # ---- 3. codes and voice embeddings of all clips together ----
    for system in encoders:
        systems[system]["codes"] = all_codes(codec, encoded[system])
    save_figure(
        levels_figure({name: systems[name]["codes"]["level_histogram"] for name in encoders}),
        options.output / "levels.png",
    )
    report = {"systems": systems, "bad_codes": bad_codes}
    if presets:
        report["presets"] = measure_voices(options, codec, encoded, systems, presets, [s.speaker for s in samples])

    # ---- 4. share of the gap closed ----
    if "reference" in encoders:
        three = ("untrained", "encoder", "reference")
        gaps = {
            name: averages.summary(gap_closed(*(means[system][name] for system in three))) for name in means["encoder"]
        }
        for name in ("semantic_used", "semantic_perplexity", "semantic_dead_share"):
            # No interval: the number of codes in use falls when speakers are drawn with repeats.
            share = gap_closed(*(systems[system]["codes"][name] for system in three))
            gaps[name] = {"value": float(share), "interval": None}
        report["gap_closed"] = gaps
        save_figure(gap_figure(gaps), options.output / "gap.png")

    # ---- 5. what is said of the sources themselves ----
    keys = [key for key, name in (("dnsmos", "dnsmos"), ("text", "wer")) if name in scorer.names]
    if keys:
        rows["source"] = [{key: getattr(source, key) for key in keys} for source in sources]
    if "dnsmos" in scorer.names:
        systems["source"] = summaries({"source": rows["source"]}, averages)[0]["source"]
    return report, rows, audio


def measure_voices(
    options, codec: VoxtralCodec, encoded: dict[str, list[EncodedClip]], systems: dict, presets: list, speakers: list
) -> dict:
    """Adds `voices` to every system, plots them, and returns the same numbers of the presets."""
    rms = math.sqrt(sum(p.square().sum().item() for p in presets) / sum(p.numel() for p in presets))
    own = voice_statistics(presets, list(range(len(presets))), rms)
    voices = {}
    for system, clips in encoded.items():
        rows = (codec.embed_codes(clip.codes[None].to(codec.audio_embedding.device))[0] for clip in clips)
        voices[system] = voice_statistics(rows, speakers, rms)
        systems[system]["voices"] = compare_voices(voices[system], own)
    save_figure(voices_figure(voices, own), options.output / "voices.png")
    return compare_voices(own, own)


def calibrate(options, samples: list[Sample], scorer: Scorer, averages: Averages) -> tuple[dict, dict, dict]:
    """As evaluate(), of degradations in place of encoders."""
    rows, audio = {name: [] for name in DEGRADATIONS}, {name: [] for name in DEGRADATIONS}
    for i, sample in enumerate(progress(samples, "degradations", len(samples))):
        source = scorer.listen(sample.waveform)
        for name, degrade in DEGRADATIONS.items():
            decoded = degrade(sample.waveform)
            rows[name].append(scorer.score(source, decoded))
            if i < options.samples:
                audio[name].append(decoded)
    systems, _ = summaries(rows, averages)
    values = {name: {system: systems[system]["metrics"][name]["value"] for system in systems} for name in scorer.names}
    orders = {name: order(values[name], SCORES[name].higher_is_better) for name in scorer.names}
    return {"systems": systems, "order": orders}, rows, audio


def summaries(rows: dict[str, list[dict]], averages: Averages) -> tuple[dict, dict]:
    """-> system -> {"metrics": name -> {value, interval, clips}}, system -> name -> resampled means."""
    systems, means = {}, {}
    for system, clips in rows.items():
        means[system] = {name: averages.means(clips, name) for name in METRICS if name in clips[0]}
        systems[system] = {
            "metrics": {
                name: averages.summary(values) | {"clips": sum(not math.isnan(row[name]) for row in clips)}
                for name, values in means[system].items()
            }
        }
    return systems, means


def progress(items, what: str, total: int):
    """A bar on a terminal, nothing elsewhere."""
    return tqdm(items, desc=what, total=total, unit="clip", disable=None)


def main(arguments=None) -> None:
    options = COMMAND_LINE.parse_intermixed_args(arguments)

    with one_sentence():
        names = list(dict.fromkeys(name.strip() for name in options.metrics.split(",")))
        check_scores(names, options.speaker_model)
        if options.degrade and (options.encoder or options.reference_encoder):
            raise UserError("--degrade uses no encoder: leave out --encoder and --reference-encoder.")
        check_options(options, not options.degrade, samples=0, seed=0, max_sec=0.1)
        clips, absent = choose_clips(options.data, options.overrides, options.all)
        samples, bad = load_samples(clips, options.max_sec)
        device = start_process(options.device).device
        averages = Averages([sample.speaker for sample in samples], options.seed)
        scorer = Scorer(names, SAMPLE_RATE, device, options.whisper, options.speaker_model, options.ecapa_model)
        options.output.mkdir(parents=True, exist_ok=True)
        if options.degrade:
            report, rows, audio = calibrate(options, samples, scorer, averages)
        else:
            report, rows, audio = evaluate(options, samples, scorer, averages, device)

        report = {
            "clips": len(samples),
            "speakers": averages.n_speakers,
            "seconds": sum(len(sample.waveform) for sample in samples) / SAMPLE_RATE,
            "settings": settings(options),
            "not_measured": not_measured(names),
            "absent_sources": absent,
            "bad_clips": bad,
            "definitions": {
                name: METRICS[name].definition
                for name in METRICS
                if any(name in system["metrics"] for system in report["systems"].values())
            },
        } | report
        if not (options.degrade or "presets" in report):
            report["not_measured"]["voices"] = f"{options.checkpoint} has no presets to compare voice embeddings with"
        if not (options.degrade or options.reference_encoder):
            report["not_measured"]["agreement and gap closed"] = "give --reference-encoder"
        text = table(report)
        write_json(options.output / "metrics.json", report)
        write_text(options.output / "table.md", text)
        write_clips(options.output / "clips.csv", samples, rows)
        save_figure(
            scores_figure({name: system["metrics"] for name, system in report["systems"].items()}),
            options.output / "scores.png",
        )
        if options.samples:
            write_listening(options.output, samples, audio)
        print(f"{text}\nwritten to {options.output}/")


if __name__ == "__main__":
    main()
