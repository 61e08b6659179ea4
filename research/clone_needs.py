"""What does cloning need? Clones through the true encoder, through others, and through known errors of the true codes,
beside what can be said of the codes: with the true encoder's at hand, and without.

    python research/clone_needs.py --checkpoint assets/standin --true assets/standin_withheld_encoder.safetensors \\
        --data speech/talk.csv --speakers w_m390,w_f391,w_m392 --encoder run=runs/demo --errors --output runs/needs

An --encoder is a file, `untrained`, or a run folder of train_encoder.py, whose checkpoints are taken one by one.
OUTPUT gets table.md, rows.json and clone_needs.png: the share of the voice that is kept against each measure of codes.
"""

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from voxtral.checkpoint import write_text
from voxtral.clones import Judge, System, items_of_manifest, read_system, speak_and_score, summarize
from voxtral.code_metrics import code_agreement
from voxtral.codec import VoxtralCodec
from voxtral.command_line import add_shared, check_options, script_parser
from voxtral.errors import one_sentence
from voxtral.evaluation import AGREEMENT, Averages
from voxtral.evaluation_report import cell, markdown, number
from voxtral.json_files import write_json
from voxtral.losses import MelDistance
from voxtral.params import CodecParams
from voxtral.plots import save_figure
from voxtral.processes import start_process
from voxtral.reference import prepare_reference
from voxtral.sources import CODEC_FRAME_SEC
from voxtral.tts import TTS

MEASURES = {
    "levels_within_1": "levels within one of the true ones",
    "levels_correlation": "levels: correlation with the true ones",
    "clip_correlation": "means of a clip's levels: correlation",
    "semantic_equal": "semantic codes equal",
    "mel_distance": "mel distance of the reference",
}


# ---------------------------------------------------------------- known errors of true codes


def errors_of_codes(params: CodecParams, seed: int) -> dict:
    """Name -> function of codes [1, 37, L] that puts an error into them; the same in every call with equal codes."""
    top = params.acoustic_codebook_size - 1

    def drawn(function):
        return lambda codes: function(codes.clone(), torch.Generator(device=codes.device).manual_seed(seed))

    def integers(size: int, shape: tuple, generator) -> Tensor:
        return torch.randint(size, shape, generator=generator, device=generator.device)

    def semantic_random(codes: Tensor, generator) -> Tensor:
        codes[:, 0] = integers(params.semantic_codebook_size, codes[:, 0].shape, generator)
        return codes

    def off_by(steps: int, always: bool = False):
        """At random; always: the same error in every frame of every clip, another one for each channel."""

        def off(codes: Tensor, generator) -> Tensor:
            shape = (1, codes.shape[1] - 1, 1) if always else codes[:, 1:].shape
            codes[:, 1:] = (codes[:, 1:] + steps * (2 * integers(2, shape, generator) - 1)).clamp(0, top)
            return codes

        return drawn(off)

    def all_random(codes: Tensor, generator) -> Tensor:
        codes = semantic_random(codes, generator)
        codes[:, 1:] = integers(top + 1, codes[:, 1:].shape, generator)
        return codes

    return {
        "semantic codes random": drawn(semantic_random),
        "levels off by one, at random": off_by(1),
        "off by two": off_by(2),
        "off by four": off_by(4),
        "each channel off by one, always the same way": off_by(1, always=True),
        "off by two, so": off_by(2, always=True),
        "all codes random": drawn(all_random),
    }


# ---------------------------------------------------------------- systems and what is said of their codes


def systems_of(description: str, tts: TTS) -> list[System]:
    """NAME=FILE, NAME=untrained or NAME=RUN_FOLDER -> systems; of a run, NAME STEP for each of its checkpoints."""
    name, _, path = description.partition("=")
    found = sorted(Path(path).glob("checkpoints/step_*/encoder.safetensors")) if Path(path).is_dir() else []
    if not found:
        return [read_system(description, tts)]
    return [read_system(f"{name}_{int(file.parent.name[5:])}={file}", tts) for file in found]


@torch.no_grad()
def measure(
    codec: VoxtralCodec, system: System, waveforms: list[Tensor], true: list[Tensor] | None, averages: Averages
) -> tuple[dict, list[Tensor]]:
    """-> MEASURES and "intervals" of the shares of equal codes of the references [1, 1, T] through a system, its codes
    [1, 37, L]; true: the true encoder's. averages: over the references' speakers."""
    codec.load_encoder(system.encoder, system.name)
    codes = [codec.encode(waveform) for waveform in waveforms]
    codes = [system.change(one) for one in codes] if system.change else codes
    mel = MelDistance(codec.params.sampling_rate).to(codes[0].device)
    distances = [
        mel(codec.decode(one)[..., : w.shape[-1]].float(), w, torch.tensor([w.shape[-1]], device=w.device)).item()
        for one, w in zip(codes, waveforms)
    ]
    ours, theirs = torch.cat(codes, dim=2), torch.cat(true or codes, dim=2)
    means, true_means = (
        torch.stack([one[0, 1:].float().mean(dim=1) for one in each], dim=1) for each in (codes, true or codes)
    )
    agreement = [
        {name: value.item() for name, value in code_agreement(one, other, one.new_tensor([one.shape[2]])).items()}
        | {"frames": one.shape[2]}
        for one, other in zip(codes, true or codes)
    ]
    shares = {name: averages.summary(averages.means(agreement, name)) for name in agreement[0] if name != "frames"}
    return {
        **{name: share["value"] for name, share in shares.items()},
        "intervals": {name: share["interval"] for name, share in shares.items()},
        "mel_distance": sum(distances) / len(distances),
        "levels_correlation": correlation(ours[0, 1:].float(), theirs[0, 1:].float()),
        "clip_correlation": correlation(means, true_means),
    }, codes


def correlation(a: Tensor, b: Tensor) -> float:
    """[channels, N] each -> Pearson's, mean over channels; one that does not vary counts as 0."""
    a, b = a - a.mean(dim=1, keepdim=True), b - b.mean(dim=1, keepdim=True)
    norm = a.norm(dim=1) * b.norm(dim=1)
    return torch.where(norm > 0, (a * b).sum(dim=1) / norm.clamp(min=1e-9), 0).mean().item()


# ---------------------------------------------------------------- report


def share_cell(row: dict, name: str) -> str:
    return cell({"value": row[name], "interval": row["intervals"][name]}, 100) + " %"


def table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        clones = row["clones"]
        cells = {
            "reference through": row["system"],
            "levels equal": share_cell(row, "levels_equal"),
            "within one": share_cell(row, "levels_within_1"),
            "levels' correlation": number(row["levels_correlation"]),
            "clip means' correlation": number(row["clip_correlation"]),
            "semantic equal": share_cell(row, "semantic_equal"),
            "mel distance": number(row["mel_distance"]),
            "like its reference": number(clones["own"]["value"]),
            "like other voices": number(clones["others"]["value"]),
            "margin": cell(clones["margin"]),
            "margin kept": cell(row["kept"], 100) + " %",
        }
        if "wer" in clones:
            cells["word errors"] = cell(clones["wer"], 100) + " %"
        lines.append(cells)
    return markdown(list(lines[0]), [list(cells.values()) for cells in lines])


def figure(rows: list[dict]) -> Figure:
    """The share of the margin kept against each measure; a dot a system."""
    drawn = Figure(figsize=(3.4 * len(MEASURES), 3.4), layout="constrained")
    for axis, (name, title) in zip(drawn.subplots(1, len(MEASURES), sharey=True), MEASURES.items()):
        for row in rows:
            marker, color = ("o", "tab:blue") if row["is_encoder"] else ("x", "tab:orange")
            axis.plot(row[name], 100 * row["kept"]["value"], marker, markersize=5, color=color)
        axis.axhline(100, color="black", linewidth=0.6)
        axis.set_xlabel(title, fontsize=8)
        axis.grid(alpha=0.3)
    drawn.axes[0].set_ylabel("voice kept, % of the true encoder's margin")
    drawn.suptitle("blue: encoders; orange: known errors of the true codes", fontsize=9)
    return drawn


def run(options) -> None:
    device = start_process(options.device).device
    judge = Judge(options.speaker_model, options.whisper, device)
    tts = TTS.from_checkpoint(options.checkpoint, device)
    true = read_system(f"true={options.true}", tts)
    systems = [true, *(system for description in options.encoder for system in systems_of(description, tts))]
    if options.errors:
        errors = errors_of_codes(tts.codec.params, 0)
        systems += [System(name, true.encoder, change=change) for name, change in errors.items()]
    items, _ = items_of_manifest(options.data, speakers=options.speakers.split(","), per_voice=options.per_voice)
    spoken, _ = speak_and_score(tts, systems, items, judge, options.max_sec)
    summary, codes, rows = summarize(spoken), None, []
    references = {item.reference: item.speaker for item in items}
    waveforms = [prepare_reference(path).waveform.to(device) for path in references]
    averages = Averages(list(references.values()), 0, AGREEMENT)
    for system in systems:
        measured, found = measure(tts.codec, system, waveforms, codes, averages)
        codes = codes or found
        kept = summary["margin_kept"].get(system.name, {"value": 1.0, "interval": None})
        rows.append(
            {
                "system": system.name,
                "is_encoder": system.change is None,
                **measured,
                "kept": kept,
                "clones": summary["systems"][system.name],
            }
        )
    options.output.mkdir(parents=True, exist_ok=True)
    text = f"{len(items)} clones of {len({item.speaker for item in items})} unheard voices.\n\n" + table(rows)
    write_text(options.output / "table.md", text)
    write_json(options.output / "rows.json", rows)
    save_figure(figure(rows), options.output / "clone_needs.png")
    print(f"{text}\nwritten to {options.output}/")


def main(arguments=None) -> None:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", metavar="DIR", required=True, help="a stand-in that talks")
    add("--true", metavar="FILE", required=True, help="its true encoder")
    add("--encoder", metavar="NAME=PATH", action="append", default=[], help="what is compared; repeatable")
    add("--errors", action="store_true", help="known errors of the true codes, too")
    add("--data", metavar="MANIFEST", required=True, help="with path, speaker and text")
    add("--speakers", metavar="NAME,...", required=True, help="that nothing has heard")
    add("--per-voice", metavar="K", type=int, default=2, help="sentences of each (default: 2)")
    add_shared(parser, "--whisper", "--speaker-model", "--device")
    add("--max-sec", type=float, default=8.0, help="longest clone (default: 8)")
    add("--output", metavar="DIR", type=Path, required=True, help="folder for the results")
    options = parser.parse_args(arguments)
    with one_sentence():
        check_options(options, False, per_voice=1, max_sec=CODEC_FRAME_SEC)
        run(options)


if __name__ == "__main__":
    main()
