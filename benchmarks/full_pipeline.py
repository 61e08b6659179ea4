"""What phase 2 does to a model: the seed's recipe and its alternatives, on the same clips, for several seeds.

    python generate_clips.py --checkpoint assets/standin --output data/generated --per-voice 60
    python train_encoder.py --config configs/demo.yaml output_dir=runs/imperfect train.max_steps=150
    python benchmarks/full_pipeline.py --seeds 0,1 --steps 150 checkpoint=assets/standin \\
        encoder=runs/imperfect/best/encoder.safetensors 'data.validation.speakers=[casual_male,fr_female]'

Writes OUTPUT/results.json and OUTPUT/table.md: held-out voices and texts, before and after. `ours`: the prompt holds
our encoder's codes of the reference; `preset`: the true ones. A run that is finished is not repeated.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_full_pipeline  # noqa: E402
from voxtral.checkpoint import write_text  # noqa: E402
from voxtral.errors import UserError, one_sentence  # noqa: E402
from voxtral.evaluation_report import markdown  # noqa: E402

ANCHORS = ["loss.semantic_kl=1", "loss.preset_kl=3", "loss.preset_hidden=3"]
ROWS = {  # name -> what it changes of configs/full_pipeline.yaml
    "LoRA rank 8, learning rate 2e-5 (the seed's)": ["optimizer.learning_rate=2e-5"],
    "LoRA rank 2": ["lora.rank=2"],
    "LoRA rank 8": ["lora.rank=8"],
    "LoRA rank 32": ["lora.rank=32"],
    "LoRA rank 8, layers normalized": ["lora.rank=8", "train.normalize_layers=true"],
    "LoRA rank 8, semantic_kl 1, preset_kl 3, preset_hidden 3": ["lora.rank=8", *ANCHORS],
    "audio_codebook_embeddings alone": ["train.trainable=[embedding]"],
    "encoder alone": ["train.trainable=[encoder]", "optimizer.learning_rate=5e-4"],
    "encoder and LoRA rank 8, with the same three": [
        "train.trainable=[lora,encoder]",
        "optimizer.learning_rate=5e-4",
        *ANCHORS,
    ],
    "encoder and LoRA rank 8, semantic_kl 1, preset_kl 200, preset_hidden 200": [
        "train.trainable=[lora,encoder]",
        "optimizer.learning_rate=4e-4",
        "loss.semantic_kl=1",
        "loss.preset_kl=200",
        "loss.preset_hidden=200",
    ],
}
COLUMNS = {
    "ours_mse_audio": ("hidden MSE, audio", "{:.3f}"),
    "ours_cosine_audio": ("cosine", "{:.3f}"),
    "ours_top1": ("ours top-1", "{:.1%}"),
    "ours_kl": ("ours KL", "{:.3f}"),
    "preset_top1": ("preset top-1", "{:.1%}"),
    "preset_kl": ("preset KL", "{:.3f}"),
    "semantic_equal": ("semantic =", "{:.1%}"),
    "levels_equal": ("levels =", "{:.1%}"),
}


def run(name: str, seed: int, options) -> dict:
    """The report of one run: {"before": …, "after": …}, both as voxtral.distillation.compare gives them."""
    folder = options.output / f"{list(ROWS).index(name)}_seed_{seed}"
    if not (folder / "report.json").is_file():
        train_full_pipeline.main(
            [
                "--config",
                options.config,
                "optimizer.learning_rate=1e-3",
                "optimizer.warmup_steps=20",
                "train.precision=fp32",
                "train.gradient_checkpointing=false",
                f"train.max_steps={options.steps}",
                f"train.validate_every_steps={options.steps}",
                f"train.save_every_steps={options.steps}",
                "train.keep_last=1",
                f"seed={seed}",
                f"output_dir={folder}",
                "resume=true",
                *options.overrides,
                *ROWS[name],
            ]
        )
    return json.loads((folder / "report.json").read_text())


def table(results: dict[str, list[dict]]) -> str:
    """Markdown: mean over the seeds, and their standard deviation where there are several."""
    lines = []
    first = next(iter(results.values()))
    for name, rows in {
        "no phase 2": [report["before"] for report in first[:1]],
        **{name: [report["after"] for report in reports] for name, reports in results.items()},
    }.items():
        cells = []
        for key, (_, form) in COLUMNS.items():
            values = [row[key] for row in rows]
            spread = f" ± {form.format(statistics.stdev(values))}" if len(values) > 1 else ""
            cells.append(form.format(statistics.mean(values)) + spread)
        lines.append([name, *cells])
    return markdown(["", *(title for title, _ in COLUMNS.values())], lines)


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", default="configs/full_pipeline.yaml", help="YAML that the rows change (default: %(default)s)"
    )
    parser.add_argument(
        "--seeds", default="0", help="order of the data and start of the adapter, comma-separated (default: 0)"
    )
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of every run (default: 300)")
    parser.add_argument("--rows", help="their numbers, comma-separated, from 0 (default: all)")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/full_pipeline_benchmark"), help="folder (default: %(default)s)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of all runs")
    options = parser.parse_intermixed_args(arguments)
    with one_sentence():
        try:
            seeds = [int(seed) for seed in options.seeds.split(",")]
            names = [list(ROWS)[int(row)] for row in options.rows.split(",")] if options.rows else list(ROWS)
        except (ValueError, IndexError) as error:
            raise UserError(f"--seeds and --rows take whole numbers, rows up to {len(ROWS) - 1}: {error}.") from error
        results = {}
        for seed in seeds:
            for name in names:
                print(f"\n# {name}, seed {seed}")
                results.setdefault(name, []).append(run(name, seed, options))
                write_text(options.output / "results.json", json.dumps(results, indent=1) + "\n")
                write_text(options.output / "table.md", table(results))
        print("\n" + table(results))


if __name__ == "__main__":
    main()
