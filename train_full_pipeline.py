"""Phase 2: adapts the language model to the encoder of phase 1 (LoRA), so that it hears a cloned voice as it would hear
the true one.

The model was trained on its true encoder's codes, and ours differ a little. On clips that the model itself has spoken,
whose true codes are known, the hidden states under our encoder's reference are pulled to those under the true one.

    python generate_clips.py --checkpoint Voxtral-4B-TTS-2603 --output data/generated --per-voice 500
    python train_full_pipeline.py encoder=runs/encoder/best/encoder.safetensors
    python train_full_pipeline.py resume=true encoder=runs/encoder/best/encoder.safetensors   # go on after a kill
    python inject_encoder.py --encoder runs/encoder/best/encoder.safetensors --lora runs/full/best/adapter --output OUT

Any key of the YAML can be overridden as key=value. The run folder (output_dir) holds best/adapter (peft's format),
checkpoints/, metrics.jsonl, report.json, plots/ and tensorboard/. Validation row 0 is the model before training: `ours`
is to get closer to the base model under true references, and `preset` is to stay what it was.
"""

import json
import math
from contextlib import nullcontext
from pathlib import Path

from voxtral.command_line import training_command_line

COMMAND_LINE = training_command_line(__doc__, "configs/full_pipeline.yaml", "lora.rank=4")
if __name__ == "__main__":
    COMMAND_LINE.parse_args()  # --help and mistyped options: before imports that take seconds

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from voxtral.adapters import write_adapter_record
from voxtral.checkpoint import SafetensorsFile, fingerprint, save_tensors
from voxtral.config import FullPipelineConfig, check_full_pipeline_config, checkpoint_folder
from voxtral.data import make_loader, steps_per_epoch
from voxtral.distillation import FullPipeline, compare, held_out_losses, native_tensors
from voxtral.errors import UserError
from voxtral.generation import Models
from voxtral.history import metric_rows
from voxtral.json_files import write_json
from voxtral.pairs import PairDataset, collate_pairs, fixed_batches, hold_out_texts
from voxtral.plots import layers_figure, plot_run, save_figure
from voxtral.processes import Process
from voxtral.run import Logger, adamw, cosine_with_warmup, due_after, set_learning_rate, training_main
from voxtral.run_folder import RunFolder, Tensors
from voxtral.sources import find_clips, split_validation
from voxtral.tts import load_tokenizer

# Of a validation, on the terminal:
SHOWN = ("ours_mse_audio", "ours_top1", "preset_top1", "semantic_equal", "levels_equal")


def load_models(config: FullPipelineConfig, device: torch.device) -> Models:
    """The checkpoint with the encoder of phase 1 in it. Raises UserError when there is no encoder."""
    learns = {"backbone", "acoustic"} & set(config.train.trainable)  # what learns stays fp32 under autocast
    dtype = torch.bfloat16 if config.train.precision == "bf16" and not learns else torch.float32
    models = Models.from_checkpoint(checkpoint_folder(config), device, dtype)
    if config.encoder:
        models.codec.load_encoder(SafetensorsFile(config.encoder).read(), config.encoder)
    if not (models.codec.has_encoder or config.reference_sec):
        raise UserError(
            f"{checkpoint_folder(config)} has no encoder: pass encoder=runs/encoder/best/encoder.safetensors "
            "(train_encoder.py makes it)."
        )
    return models


def train(config: FullPipelineConfig, process: Process) -> None:
    """The whole training; what it writes is in the run folder."""
    # ---- 1. config, checkpoint -------------------------------------------------------------------------------------
    check_full_pipeline_config(config)
    settings = config.train
    torch.manual_seed(config.seed)
    models = load_models(config, process.device)
    params = models.codec.params

    # ---- 2. data ---------------------------------------------------------------------------------------------------
    sources, left_out = find_clips(config.data)
    train_clips, validation_clips = split_validation(sources, config.data.validation)
    tokenizer = load_tokenizer(Path(checkpoint_folder(config)))
    held_out = PairDataset(validation_clips, tokenizer, params, config.data.max_sec, 0, True, config.reference_sec)
    train_clips = hold_out_texts([clip for source in train_clips for clip in source], validation_clips)
    process.check_same("the training clips (data.sources)", repr([clip.path for clip in train_clips]).encode())
    dataset = PairDataset(train_clips, tokenizer, params, config.data.max_sec, config.seed, False, config.reference_sec)
    if "encoder" not in settings.trainable and not config.reference_sec:
        for pairs in (dataset, held_out):
            pairs.encode(models.codec, process.device, config.data)
    fixed = fixed_batches(held_out, config.data.batch_size)
    per_epoch = steps_per_epoch(dataset.clips, config.data, process.world_size, settings.accumulation)
    max_steps = settings.max_steps or max(1, round(settings.epochs * per_epoch))

    # ---- 3. model, optimizer ---------------------------------------------------------------------------------------
    model = FullPipeline(models, config).to(process.device).train()
    trained = model.trained()
    autocast = torch.autocast(process.device.type, torch.bfloat16, enabled=settings.precision == "bf16")
    parallel_model = DistributedDataParallel(model, broadcast_buffers=False) if process.world_size > 1 else model
    optimizer = adamw(trained.values(), config.optimizer.learning_rate, config.optimizer)

    # ---- 4. run folder, resuming -----------------------------------------------------------------------------------
    run = RunFolder(config, process)
    stateful = {"trained": Tensors(trained), "optimizer": optimizer}
    frozen = {} if "encoder" in settings.trainable or config.reference_sec else models.codec.encoder_tensors()
    pairs_per_step = config.data.batch_size * settings.accumulation * process.world_size
    facts = {
        "encoder": fingerprint(frozen.values()),
        "data.batch_size × train.accumulation × processes": pairs_per_step,
    }
    before = run.restore(stateful, {}, facts)
    start_step, best = before.get("step", 0), before.get("best", math.inf)
    log = Logger(run, max_steps, start_step)
    for line in [*left_out, *run.changes]:
        log.say(line)
    log.say(
        f"{len(dataset)} training clips, {len(held_out)} validation clips of other voices and texts, "
        f"{per_epoch:.1f} steps per epoch; {sum(p.numel() for p in trained.values()):,} trainable parameters "
        f"({', '.join(settings.trainable)}) on {process.device}; steps {start_step} to {max_steps} in {run.path}"
    )
    log.bad_clips.add(dataset.bad + held_out.bad)

    # ---- 5. validating, saving -------------------------------------------------------------------------------------
    from_nothing = bool(config.reference_sec)

    def write_weights(folder: Path) -> None:
        if model.adapter:
            encoder = config.encoder or checkpoint_folder(config)
            encoder = "encoder.safetensors beside it" if "encoder" in settings.trainable else encoder
            model.adapter.save_pretrained(folder / "adapter")
            write_adapter_record(folder / "adapter", encoder, model.codec.encoder_tensors())
        if "encoder" in settings.trainable:
            save_tensors(folder / "encoder.safetensors", model.codec.encoder_tensors())
        if tensors := native_tensors(model):
            save_tensors(folder / "weights.safetensors", tensors)

    def keep_if_best(step: int) -> float:
        """Validates on the held-out pairs, plots, writes best/; returns the lowest loss so far. Of a language model
        from nothing it is that of the levels: semantic codes get harder to guess while its speech gets better."""
        with log.timed("validate", step):
            with autocast:
                metrics = (held_out_losses if from_nothing else compare)(model.eval(), fixed, process.device)
            model.train()
            log.write(step, {f"validation/{name}": value for name, value in metrics.items()})
            shown = {name: metrics[name] for name in (metrics if from_nothing else SHOWN) if name != "loss/total"}
            values = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
            log.say(f"validation at step {step}: total {metrics['loss/total']:.4g}  {values}")
        with log.timed("plot", step):
            rows = log.history.rows
            plot_run(rows, run.path / "plots")
            if not from_nothing:
                figure = layers_figure([row for row in rows if "validation/loss/total" in row])
                save_figure(figure, run.path / "plots" / "layers.png")
        loss = metrics["loss/flow" if from_nothing and config.loss.flow else "loss/total"]
        if step and loss < best:
            with log.timed("save", step):
                run.save_best(write_weights, step=step, loss=loss)
        return min(best, loss) if step else best

    # ---- 6. the loop: step, log, validate, save --------------------------------------------------------------------
    if start_step == 0 and process.is_main:
        keep_if_best(0)
    place = start_step, process.rank, process.world_size, settings.accumulation
    batches = iter(make_loader(dataset, config.data, config.seed, *place, collate_pairs))
    log.restart_clock()
    n_tokens = 0
    for step in range(start_step, max_steps):
        factor = cosine_with_warmup(step, config.optimizer.warmup_steps, max_steps)
        set_learning_rate(optimizer, config.optimizer.learning_rate * factor)
        scalars = {}
        for micro in range(settings.accumulation):
            batch = next(batches)
            log.bad += batch.bad
            n_tokens += batch.n_tokens * process.world_size
            seed = hash((config.seed, step, micro, process.rank)) & 0x7FFFFFFF
            synchronizes = process.world_size == 1 or micro == settings.accumulation - 1
            with nullcontext() if synchronizes else parallel_model.no_sync():
                with autocast:
                    losses = parallel_model(batch.to(process.device, non_blocking=True), seed)
                total = sum(model.weights[name] * loss for name, loss in losses.items())
                (total / settings.accumulation).backward()
            for name, loss in {"total": total, **losses}.items():
                scalars[f"loss/{name}"] = scalars.get(f"loss/{name}", 0.0) + loss.detach() / settings.accumulation
        scalars["grad/norm"] = nn.utils.clip_grad_norm_(trained.values(), settings.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        log.add(step + 1, scalars)

        due = due_after(step + 1, max_steps, run)
        if due.log:
            extra = {"optimizer/learning_rate": config.optimizer.learning_rate * factor}
            log.flush(extra, n_tokens / len(log.pending), "tokens")
            n_tokens = 0
        if due.validate and process.is_main:
            best = keep_if_best(step + 1)
        if due.save and process.is_main:
            with log.timed("save", step + 1):
                run.save_step(step + 1, write_weights, stateful, max_steps, best=best, facts=facts)
        if due.validate or due.save:
            log.restart_clock()
        if due.stop:
            log.say(f"stopped after step {step + 1}; go on with resume=true")
            break
    else:
        if process.is_main:
            log.say(write_report(run))
    log.close()


def write_report(run: RunFolder) -> str:
    """report.json with the validation before training and at the best step; returns a table of them."""
    rows = [row for row in metric_rows(run.path / "metrics.jsonl") if "validation/loss/total" in row]
    step = json.loads((run.path / "best" / "metrics.json").read_text())["step"]
    found = {
        name: {key.removeprefix("validation/"): value for key, value in row.items() if key.startswith("validation/")}
        for name, row in (("before", rows[0]), ("after", next(row for row in rows if row["step"] == step)))
    }
    write_json(run.path / "report.json", {"best_step": step, **found})
    shown = [name for name, value in found["before"].items() if isinstance(value, float)]
    lines = [f"{'held-out pairs':<28}{'before':>12}{f'step {step}':>14}"]
    lines += [f"{name:<28}{found['before'][name]:>12.4g}{found['after'][name]:>14.4g}" for name in shown]
    if found["after"]["loss/total"] > found["before"]["loss/total"]:
        lines.append("No step was better than none: on held-out pairs the loss is lowest without this training.")
    return "\n".join(lines)


def main(arguments=None) -> None:
    training_main(train, FullPipelineConfig, COMMAND_LINE.parse_args(arguments))


if __name__ == "__main__":
    main()
