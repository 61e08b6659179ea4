"""VOICE_CLONE.md, which inject() writes beside the release's own README.md: what was added, and what it learnt from."""

import hashlib
import json
import math
from pathlib import Path

import yaml

from voxtral.checkpoint import SafetensorsFile
from voxtral.errors import reason_of

CARD = "VOICE_CLONE.md"

TEMPLATE = """# What was added to this checkpoint

Voxtral-4B-TTS-2603 was released without its codec's encoder, so it cannot make codes of a recording. This is the
release with one, trained by Voxtral Voice Clone (`inject_encoder.py`): `ref_audio` works. What the table names has
changed, and a key of params.json. README.md is the release's own.

| what | file | its SHA-256 |
| --- | --- | --- |
{parts}

## What it was trained on

{trainings}

## Licence

Mistral's licence of the release applies to what is derived from its weights, and so to this folder. The speech of the
training has licences of its own.

## Taking it out again

{removal}
"""
IN_PLACE = (
    "`python inject_encoder.py --checkpoint THIS_FOLDER --eject`: weights and params.json are then what they were."
)
NEW_FOLDER = "Delete this folder: the checkpoint that it was made from is as it was."


def model_card(encoder, lora=None, weights=None, in_place: bool = False) -> str:
    """Markdown about the files that inject() takes; `in_place`: they go into the checkpoint itself.

    What they were trained on is in the config.yaml of the run folder that they lie in.
    """
    tensors = SafetensorsFile(encoder).entries.values()
    n_parameters = sum(math.prod(entry["shape"]) for entry in tensors)
    parts = {f"the encoder: {len(tensors)} tensors, {n_parameters / 1e6:.1f} M parameters, bf16": Path(encoder)}
    if lora is not None:
        parts[f"LoRA, merged into the attention: {_lora_words(Path(lora))}"] = Path(lora) / "adapter_model.safetensors"
    if weights is not None:
        names = ", ".join(f"`{name}`" for name in SafetensorsFile(weights).entries)
        parts[f"in the place of the release's: {names}"] = Path(weights)
    trainings = [_training(path, run) for path in parts.values() if (run := _run_of(path))]
    return TEMPLATE.format(
        parts="\n".join(f"| {what} | `{path.name}` | `{_sha256(path)}` |" for what, path in parts.items()),
        trainings="\n\n".join(trainings) or "Not known: there was no config.yaml of a run beside the files.",
        removal=IN_PLACE if in_place else NEW_FOLDER,
    )


def _sha256(path: Path) -> str:
    """Of the whole file, as sha256sum says it."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            found.update(block)
    return found.hexdigest()


def _lora_words(folder: Path) -> str:
    config = json.loads((folder / "adapter_config.json").read_text())
    modules = config["target_modules"]
    names = modules if isinstance(modules, str) else ", ".join(sorted(modules))
    return f"rank {config['r']}, alpha {config['lora_alpha']}, of {names}"


def _run_of(path: Path) -> Path | None:
    """The run folder that a file of best/ or of a checkpoint lies in, if its config.yaml is there."""
    for folder in path.absolute().parents:
        if folder.name in ("best", "checkpoints") and (folder.parent / "config.yaml").is_file():
            return folder.parent
    return None


def _training(path: Path, run: Path) -> str:
    """The configuration of a file's run in a list: data, length, losses."""
    try:
        return _list(path, run, yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")))
    except (yaml.YAMLError, OSError, LookupError, TypeError, ValueError) as error:
        return f"`{path.name}`, run `{run.name}`: not known, since its files cannot be read ({reason_of(error)})."


def _list(path: Path, run: Path, config: dict) -> str:
    data, train = config["data"], config["train"]
    sources = ", ".join(source["name"] or f"{source['kind']} {Path(source['path']).name}" for source in data["sources"])
    losses = ", ".join(f"{name} {weight:g}" for name, weight in config["loss"].items() if weight)
    length = f"{train['max_steps']} steps" if train["max_steps"] else f"{train['epochs']} epochs"
    best = run / "best"
    chosen = json.loads((best / "metrics.json").read_text()) if best in path.absolute().parents else {}
    lines = [
        f"`{path.name}`, run `{run.name}`, by its config.yaml:",
        "",
        f"- trained: {', '.join(train['trainable'])}",
        f"- speech, as configured: {sources}",
        f"- length: {length}, a step of {data['batch_size']} clips of at most {data['max_sec']:g} s in each process, "
        f"learning rate {config['optimizer']['learning_rate']:g}, seed {config['seed']}",
        f"- losses and their weights: {losses}",
    ]
    if chosen:
        lines.append(f"- the best of its validations: {', '.join(f'{key} {value:g}' for key, value in chosen.items())}")
    return "\n".join(lines)
