"""Phase 1: trains the codec encoder that Voxtral-4B-TTS-2603 was released without.

The decoder and the codebooks of the checkpoint stay frozen; the encoder learns to produce codes from which that
decoder rebuilds the speech, by the recipe of the Voxtral TTS paper (section 2.1).

    export VOXTRAL_CKPT=/path/to/Voxtral-4B-TTS-2603
    python train_encoder.py                                          # configs/encoder.yaml
    python train_encoder.py --config configs/custom.yaml data.sources.0.path=/my/speech
    python train_encoder.py --config configs/encoder.yaml resume=true   # go on after a kill
    torchrun --nproc-per-node 4 train_encoder.py --config configs/encoder.yaml

Any key of the YAML can be overridden as key=value. The run folder (output_dir) holds checkpoints/, best/,
metrics.jsonl, plots/, samples/, tensorboard/, and at the end test.json.
"""

import math
import time
from collections.abc import Iterator
from functools import partial

from voxtral.command_line import training_command_line

COMMAND_LINE = training_command_line(__doc__, "configs/encoder.yaml", "train.max_steps=1000")
if __name__ == "__main__":
    COMMAND_LINE.parse_args()  # --help and mistyped options: before imports that take seconds

import torch
from torch import nn

from voxtral.asr import WhisperTeacher
from voxtral.asr_cache import AsrCache, SegmentDataset
from voxtral.checkpoint import CODEC_PREFIX, fingerprint
from voxtral.clip_list import Clips
from voxtral.code_metrics import code_statistics
from voxtral.codec import VoxtralCodec
from voxtral.config import EncoderConfig, check_encoder_config, checkpoint_folder
from voxtral.data import SpeechDataset, collate, make_loader, steps_per_epoch, validation_batches
from voxtral.discriminator import Discriminators
from voxtral.encoder_training import (
    MicroStep,
    TrainingModel,
    WeightAverage,
    choose_trainable,
    start_codebook,
    update_codebook,
)
from voxtral.json_files import write_json
from voxtral.known_codes import CodeMatching, codes_of_clips
from voxtral.plots import plot_run
from voxtral.presets import codes_to_match
from voxtral.processes import Process
from voxtral.run import Logger, adamw, cosine_with_warmup, due_after, is_logged, set_learning_rate, training_main
from voxtral.run_folder import RunFolder, Tensors, write_files
from voxtral.sources import DataError, final_clips, find_clips, split_validation
from voxtral.validation import embedding_norm, evaluate_codec, in_words, test_weights, write_samples


def train(config: EncoderConfig, process: Process) -> None:
    """The whole training; what it writes is in the run folder."""
    for _ in training_steps(config, process):
        pass


def training_steps(config: EncoderConfig, process: Process) -> Iterator[float]:
    """The training, in pieces that benchmarks/train_step.py can time: yields the seconds that it has waited for data so
    far, first when all is set up and no data has been read, then after each step."""
    # ---- 1. config -------------------------------------------------------------------------------------------------
    check_encoder_config(config)
    settings, device = config.train, process.device
    # No cache of cast weights: a CUDA graph would keep the ones it was captured with.
    use_bf16 = settings.precision == "bf16"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=use_bf16, cache_enabled=False)
    torch.manual_seed(config.seed)

    # ---- 2. checkpoint ---------------------------------------------------------------------------------------------
    codec, origin = VoxtralCodec.start(checkpoint_folder(config), config.encoder)
    params = codec.params
    choose_trainable(codec, settings.trainable)
    known, bad_known = None, []
    if config.loss.match:
        known, bad_known = codes_to_match(config.match.codes, codec, checkpoint_folder(config), device)

    # ---- 3. data ---------------------------------------------------------------------------------------------------
    sources, left_out = find_clips(config.data)
    train_clips, validation_clips = split_validation(sources, config.data.validation)
    test_clips = final_clips(sources, config.data.validation)
    train_clips = Clips.join(train_clips)
    if config.loss.codes and not train_clips.any_codes:
        raise DataError(
            "loss.codes needs clips whose codes are known, but no source has any: add one of kind generated "
            "(generate_clips.py makes it), or set loss.codes=0."
        )
    process.check_same("the training clips (data.sources)", train_clips.keys().tobytes())
    fixed = validation_batches(validation_clips, config.data)
    true_codes, bad_codes = codes_of_clips(validation_clips, fixed, params)  # of generated clips among them
    if "codebook" in settings.trainable and not codec.has_encoder:
        start_codebook(codec, fixed, config.seed)
    per_epoch = steps_per_epoch(train_clips, config.data, process.world_size, settings.accumulation)
    max_steps = settings.max_steps or max(1, round(settings.epochs * per_epoch))
    clips_per_step = config.data.batch_size * process.world_size * settings.accumulation

    # ---- 4. models -------------------------------------------------------------------------------------------------
    teacher = WhisperTeacher(config.asr, config.data.max_sec, device) if config.loss.asr else None
    asr_cache = None
    if teacher and config.asr.teacher_cache:
        asr_cache = AsrCache(config.asr.teacher_cache, teacher, config.asr, config.data.max_sec)
    discriminators = Discriminators(config.discriminator).to(device) if config.loss.feature else None
    matching = CodeMatching(known, codec, device) if known else None
    model = TrainingModel(codec, teacher.width if teacher else None).to(device).train()
    average = WeightAverage(codec, settings.ema_decay)
    micro_step = MicroStep(config, process, autocast, model, discriminators, teacher, asr_cache, matching)

    # ---- 5. optimizers ---------------------------------------------------------------------------------------------
    learners = {"encoder": (model, adamw(model.parameters(), config.optimizer.learning_rate, config.optimizer))}
    if discriminators:
        optimizer = adamw(discriminators.parameters(), config.discriminator.learning_rate, config.optimizer)
        learners["discriminator"] = discriminators, optimizer
    # Of several micro-batches gradients need memory of their own: a graph lends what it writes anew next time.
    lends_gradients = settings.accumulation == 1
    for parameter in (p for learner, _ in learners.values() for p in learner.parameters() if p.requires_grad):
        parameter.grad = None if lends_gradients else torch.zeros_like(parameter)

    # ---- 6. run folder, resuming -----------------------------------------------------------------------------------
    run = RunFolder(config, process)
    files = {"encoder.safetensors": Tensors(average.codec.encoder_tensors())}
    others, frozen = average.codec.decoder_tensors(), []
    if settings.trainable == ["encoder"]:
        frozen = [name.removeprefix(CODEC_PREFIX) for name in others]  # to be read from the checkpoint folder again
    else:
        files["decoder.safetensors"] = Tensors(others)
    trained = {name: t for name, t in model.state_dict().items() if name.removeprefix("codec.") not in frozen}
    stateful = {
        "model": Tensors(trained),
        "discriminators": discriminators,
        "optimizer": learners["encoder"][1],
        "discriminator_optimizer": discriminators and learners["discriminator"][1],
        "matching": matching,
    }
    stateful = {name: part for name, part in stateful.items() if part is not None}
    facts = {
        "checkpoint": fingerprint(codec.state_dict()[name] for name in frozen),
        "data.batch_size × train.accumulation × processes": clips_per_step,
    }
    before = run.restore(stateful, files, facts)
    start_step, best = before.get("step", 0), before.get("best", math.inf)
    log = Logger(run, max_steps, start_step)
    log.say(f"encoder: {origin}" + (f", then what step {start_step} of this run had" if start_step else ""))
    for line in [*left_out, *run.changes]:
        log.say(line)
    if before.get("clips", len(train_clips)) != len(train_clips):
        log.say(f"there were {before['clips']} training clips before: from here on they come in another order")
    log.say(
        f"{len(train_clips)} training clips, {len(validation_clips)} validation clips, {per_epoch:.1f} steps per "
        f"epoch; {sum(p.numel() for p in model.parameters() if p.requires_grad):,} trainable parameters on {device}; "
        f"steps {start_step} to {max_steps} in {run.path}"
    )
    if known:
        n_known = sum(codes.shape[1] for codes in known)
        log.say(f"loss.match holds codes to the statistics of {n_known:,} frames ({config.match.codes})")
    log.bad_clips.add([*fixed[0].bad, *bad_codes, *bad_known])

    # ---- 7. the loop: step, log, validate, save --------------------------------------------------------------------
    waited_sec = 0.0
    yield waited_sec
    if asr_cache:
        dataset, collate_items = SegmentDataset(train_clips, config.seed, asr_cache), asr_cache.collate
    else:
        codes_of = params if config.loss.codes else None
        dataset = SpeechDataset(train_clips, config.data.max_sec, config.seed, speed=config.data.speed, params=codes_of)
        collate_items = collate
    place = start_step, process.rank, process.world_size, settings.accumulation
    batches = iter(make_loader(dataset, config.data, config.seed, *place, collate_items))
    for step in range(start_step, max_steps):
        factor = cosine_with_warmup(step, config.optimizer.warmup_steps, max_steps)
        scalars = {}
        for micro in range(settings.accumulation):
            began = time.perf_counter()
            batch = next(batches)
            waited_sec += time.perf_counter() - began
            batch = batch.to(device, non_blocking=True)
            log.bad += batch.bad
            losses, output, n_frames = micro_step(step, micro, batch, is_logged(step + 1, max_steps, run))
            scalars = {name: scalars.get(name, 0.0) + loss / settings.accumulation for name, loss in losses.items()}
        if "codebook" in settings.trainable:
            update_codebook(codec, output, n_frames, step)
        for name, (learner, optimizer) in learners.items():
            gradients = [p for p in learner.parameters() if p.requires_grad]
            scalars[f"grad/{name}"] = nn.utils.clip_grad_norm_(gradients, settings.gradient_clip)
            set_learning_rate(optimizer, optimizer.defaults["lr"] * factor)
            optimizer.step()
            optimizer.zero_grad(set_to_none=lends_gradients)
        average.update(step)
        log.add(step + 1, scalars)

        due = due_after(step + 1, max_steps, run)
        if due.log:
            sizes = params.semantic_codebook_size, params.acoustic_codebook_size
            codes = code_statistics(output.codes, n_frames, *sizes)
            codes["embedding_norm"] = embedding_norm(codec, output.codes, n_frames)
            extra = {"optimizer/learning_rate": config.optimizer.learning_rate * factor}
            extra |= {f"code/{name}": value for name, value in codes.items()}
            log.flush(extra, work=clips_per_step * config.data.max_sec)
        if due.validate and process.is_main:  # fixed clips through the averaged encoder
            with log.timed("validate", step + 1):
                with autocast:
                    metrics, encoded = evaluate_codec(average.codec.eval(), fixed, true_codes=true_codes)
                log.write(step + 1, {f"validation/{name}": value for name, value in metrics.items()})
                shown = encoded, settings.n_samples, params.sampling_rate
                write_samples(run.path / "samples", *shown, log.board, step + 1)
                log.say(f"validation at step {step + 1}: {in_words(metrics)}")
            with log.timed("plot", step + 1):
                plot_run(log.history.rows, run.path / "plots")
            if metrics["mel_distance"] < best:
                best = metrics["mel_distance"]
                run.keep_best(files, step=step + 1, mel_distance=best)
        if due.save and process.is_main:
            record = {"best": best, "facts": facts, "clips": len(train_clips)}
            with log.timed("save", step + 1):
                run.save_step(step + 1, partial(write_files, files=files), stateful, max_steps, **record)
        if due.validate or due.save:
            log.restart_clock()
        if due.stop:
            log.say(f"stopped after step {step + 1}; go on with resume=true")
            break
        yield waited_sec
    else:
        if test_clips and process.is_main:
            with log.timed("test", max_steps), autocast:
                tested, bad = test_weights(average.codec.eval(), run.path / "best", test_clips, config.data)
            log.bad_clips.add(bad)
            write_json(run.path / "test.json", tested)
            log.say(f"best weights on {len(test_clips)} test clips: {in_words(tested['all'])}")
        process.wait()
    log.close()


def main(arguments=None) -> None:
    training_main(train, EncoderConfig, COMMAND_LINE.parse_args(arguments))


if __name__ == "__main__":
    main()
