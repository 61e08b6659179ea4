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

import json
import math
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial

from voxtral.command_line import training_command_line

COMMAND_LINE = training_command_line(__doc__, "configs/encoder.yaml", "train.max_steps=1000")
if __name__ == "__main__":
    COMMAND_LINE.parse_args()  # --help and mistyped options: before imports that take seconds

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from voxtral.asr import WhisperTeacher, asr_distillation_loss
from voxtral.asr_cache import AsrCache, SegmentDataset
from voxtral.checkpoint import CODEC_PREFIX, ENCODER_PREFIXES, fingerprint, write_text
from voxtral.clip_list import Clips
from voxtral.codec import CodecOutput, VoxtralCodec, ceil_div, mask_samples, valid_mask
from voxtral.codes import codes_of_clips
from voxtral.config import EncoderConfig, check_encoder_config, checkpoint_folder
from voxtral.data import (
    SAMPLE_RATE,
    BadClipLog,
    Batch,
    SpeechDataset,
    collate,
    make_loader,
    steps_per_epoch,
    validation_batches,
)
from voxtral.discriminator import DiscriminatorLoss, Discriminators, crop, feature_loss, random_crops
from voxtral.losses import DECAYING, MelDistance, codebook_scale, codes_loss, commitment_loss, l1_loss, stft_loss
from voxtral.matching import CodeMatching
from voxtral.metrics import code_statistics
from voxtral.plots import plot_run
from voxtral.presets import codes_to_match
from voxtral.processes import Process
from voxtral.quantizer import QuantizationDraws
from voxtral.run import Logger, SideStream, adamw, cosine_with_warmup, set_learning_rate, training_main
from voxtral.run_folder import RunFolder, Tensors, write_files
from voxtral.sources import DataError, final_clips, find_clips, split_validation
from voxtral.validation import embedding_norm, evaluate_codec, in_words, test_weights, write_samples


class TrainingModel(nn.Module):
    """The codec, and the projection of its semantic part to Whisper's width that is trained along with it."""

    def __init__(self, codec: VoxtralCodec, whisper_width: int | None):
        super().__init__()
        self.codec = codec
        self.asr_projection = nn.Linear(codec.params.semantic_dim, whisper_width) if whisper_width else nn.Identity()

    def forward(self, waveform, lengths, semantic_draws, acoustic_draws, noise) -> tuple[torch.Tensor, ...]:
        """-> fields of CodecOutput, projected semantic embeddings [B, whisper_width, L]. Tensors only: it may be a graph."""
        output = self.codec(waveform, lengths, QuantizationDraws(semantic_draws, acoustic_draws, noise))
        projected = self.asr_projection(output.semantic_quantized.transpose(1, 2)).transpose(1, 2)
        return output.reconstruction, output.latent, output.codes, output.semantic_quantized, projected


def train(config: EncoderConfig, process: Process) -> None:
    """The whole training; what it writes is in the run folder."""
    for _ in training_steps(config, process):
        pass


def training_steps(config: EncoderConfig, process: Process) -> Iterator[int]:
    """The training, in pieces that benchmarks/train_step.py can time: yields the number of steps done, first when all is
    set up and no data has been read, then after each step."""
    # ---- 1. config -------------------------------------------------------------------------------------------------
    check_encoder_config(config)
    settings, weights = config.train, vars(config.loss)
    on_cuda = process.device.type == "cuda"
    # No cache of cast weights: a CUDA graph would keep the ones it was captured with.
    autocast = torch.autocast(
        process.device.type, torch.bfloat16, enabled=settings.precision == "bf16", cache_enabled=False
    )
    torch.manual_seed(config.seed)

    # ---- 2. checkpoint ---------------------------------------------------------------------------------------------
    codec, origin = VoxtralCodec.start(checkpoint_folder(config), config.encoder)
    params = codec.params
    parts = {
        "encoder": codec.encoder_parameters(),
        "codebook": [],  # the codebook follows an average, no gradient
        "decoder": [*codec.decoder_blocks.parameters(), *codec.output_proj.parameters()],
    }
    codec.requires_grad_(False)
    for part in settings.trainable:
        for parameter in parts[part]:
            parameter.requires_grad_(True)
    own_names = [name for name in codec.state_dict() if (CODEC_PREFIX + name).startswith(ENCODER_PREFIXES)]
    other_names = [name for name in codec.state_dict() if name not in own_names]

    known, bad_known = None, []
    if weights["match"]:
        known, bad_known = codes_to_match(config.match.codes, codec, checkpoint_folder(config), process.device)

    # ---- 3. data ---------------------------------------------------------------------------------------------------
    sources, left_out = find_clips(config.data)
    train_clips, validation_clips = split_validation(sources, config.data.validation)
    final = final_clips(sources, config.data.validation)
    train_clips = Clips.join(train_clips)
    if weights["codes"] and not train_clips.any_codes:
        raise DataError(
            "loss.codes needs clips whose codes are known, but no source has any: add one of kind generated "
            "(generate_clips.py makes it), or set loss.codes=0."
        )
    process.check_same("the training clips (data.sources)", train_clips.keys().tobytes())
    fixed = validation_batches(validation_clips, config.data)
    true_codes, bad_codes = codes_of_clips(validation_clips, fixed, params)  # of generated clips among them
    if "codebook" in settings.trainable and not codec.has_encoder:
        # All validation clips, so that the start does not hang on the batch size.
        heard, heard_lengths = torch.cat([b.waveform for b in fixed]), torch.cat([b.lengths for b in fixed])
        with torch.no_grad():
            latent = codec.encode_latent(heard, heard_lengths)[:, : params.semantic_dim]
        codec.quantizer.semantic_codebook.start_from(
            latent.transpose(1, 2).flatten(0, 1), torch.Generator().manual_seed(config.seed)
        )
    per_epoch = steps_per_epoch(train_clips, config.data, process.world_size, settings.accumulation)
    max_steps = settings.max_steps or max(1, round(settings.epochs * per_epoch))
    global_batch = config.data.batch_size * process.world_size
    n_frames = ceil_div(round(config.data.max_sec * SAMPLE_RATE), params.frame_size)

    # ---- 4. models -------------------------------------------------------------------------------------------------
    teacher = WhisperTeacher(config.asr, config.data.max_sec, process.device) if weights["asr"] else None
    said_before = (
        AsrCache(config.asr.teacher_cache, teacher, config.asr, config.data.max_sec)
        if teacher and config.asr.teacher_cache
        else None
    )
    discriminators = Discriminators(config.discriminator).to(process.device) if weights["feature"] else None
    mel_distance = MelDistance(params.sampling_rate).to(process.device)
    matching = CodeMatching(known, codec, process.device) if known else None
    model = TrainingModel(codec, teacher.width if teacher else None).to(process.device).train()
    averaged = AveragedModel(codec, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay))
    beside = SideStream(process.device)
    scale = codebook_scale(codec.quantizer.semantic_codebook.embedding)
    if settings.compile and on_cuda:
        model.forward = torch.compile(model.forward, dynamic=False)
    # Thousands of small launches a step become one each. Recorded here, before the loader's threads use the GPU too.
    recording = settings.cuda_graphs and on_cuda
    graphed = torch.cuda.make_graphed_callables if recording else lambda function, samples: function
    if teacher and recording:
        teacher.record(config.data.batch_size)
    wrap = (
        partial(DistributedDataParallel, broadcast_buffers=False) if process.world_size > 1 else lambda module: module
    )
    n_samples, crop_samples = (
        round(min(sec, config.data.max_sec) * SAMPLE_RATE)
        for sec in (config.data.max_sec, config.discriminator.crop_sec)
    )
    audio = torch.zeros(config.data.batch_size, 1, n_samples, device=process.device)
    audio_crop, lengths = audio[..., :crop_samples].clone(), torch.full((len(audio),), n_samples, device=process.device)
    draws = QuantizationDraws.sample(0, len(audio), params.acoustic_dim, n_frames, process.device)
    with autocast:
        parallel_model = wrap(graphed(model, (audio, lengths, *vars(draws).values())))
        if discriminators:
            hinge_loss = graphed(
                DiscriminatorLoss(discriminators), (audio_crop, audio_crop.clone(), lengths / n_samples)
            )
            real = [m.detach().clone() for m in hinge_loss(audio_crop, audio_crop, lengths / n_samples)[1:]]
            matching_loss = graphed(
                partial(feature_loss, discriminators), (audio_crop.clone().requires_grad_(), lengths / n_samples, *real)
            )
            hinge_loss = wrap(hinge_loss)

    # ---- 5. optimizers ---------------------------------------------------------------------------------------------
    optimizer = adamw(model.parameters(), config.optimizer.learning_rate, config.optimizer)
    discriminator_optimizer = (
        adamw(discriminators.parameters(), config.discriminator.learning_rate, config.optimizer)
        if discriminators
        else None
    )
    optimizers = [o for o in (optimizer, discriminator_optimizer) if o]
    for parameter in (p for o in optimizers for group in o.param_groups for p in group["params"]):
        parameter.grad = torch.zeros_like(
            parameter
        )  # of its own: a graph would lend the memory that it writes next time

    # ---- 6. run folder, resuming -----------------------------------------------------------------------------------
    run = RunFolder(config.output_dir, config, process, config.resume)
    frozen = other_names if settings.trainable == ["encoder"] else []  # to be read from the checkpoint folder again
    stateful = {
        "model": Tensors(
            {name: tensor for name, tensor in model.state_dict().items() if name.removeprefix("codec.") not in frozen}
        ),
        "averaged": Tensors({"n_averaged": averaged.n_averaged}),
        "discriminators": discriminators,
        "optimizer": optimizer,
        "discriminator_optimizer": discriminator_optimizer,
        "matching": matching,
    }
    stateful = {name: part for name, part in stateful.items() if part is not None}
    averages = averaged.module.state_dict()
    files = {"encoder.safetensors": Tensors({CODEC_PREFIX + name: averages[name] for name in own_names})}
    if not frozen:
        files["decoder.safetensors"] = Tensors({CODEC_PREFIX + name: averages[name] for name in other_names})
    facts = {
        "checkpoint": fingerprint(codec.state_dict()[name] for name in frozen),
        "data.batch_size × train.accumulation × processes": global_batch * settings.accumulation,
    }
    before = run.restore(stateful, files, facts) if config.resume else {}
    start_step, best = before.get("step", 0), before.get("best", math.inf)
    better, better_record = {}, {}  # weights since the last checkpoint that are the best so far
    log = Logger(run, max_steps, start_step, settings.max_total_loss)
    bad_clips = BadClipLog(run.path if process.is_main else None)
    log.say(f"encoder: {origin}" + (f", then what step {start_step} of this run had" if start_step else ""))
    for line in [*left_out, *run.changes]:
        log.say(line)
    if before.get("clips", len(train_clips)) != len(train_clips):
        log.say(f"there were {before['clips']} training clips before: from here on they come in another order")
    log.say(
        f"{len(train_clips)} training clips, {len(validation_clips)} validation clips, {per_epoch:.1f} steps per epoch; "
        f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} trainable parameters on {process.device}; "
        f"steps {start_step} to {max_steps} in {run.path}"
    )
    if known:
        log.say(
            f"loss.match holds codes to the statistics of {sum(codes.shape[1] for codes in known):,} frames "
            f"({config.match.codes})"
        )
    bad_clips.add([*fixed[0].bad, *bad_codes, *bad_known])

    # ---- 7. the pieces of a step -----------------------------------------------------------------------------------
    def waveform_losses(names, reconstruction, target, lengths):
        functions = {
            "l1": lambda: l1_loss(reconstruction, target, lengths),
            "stft": lambda: stft_loss(reconstruction, target, lengths, settings.stft_fft_sizes),
            "mel": lambda: mel_distance(reconstruction, target, lengths),
        }
        return {name: functions[name]() for name in names if name in functions}

    def latent_losses(names, output, batch, frames):
        semantic = output.latent[:, : params.semantic_dim]
        functions = {"commit": lambda: commitment_loss(semantic, output.semantic_quantized, frames)}
        if matching:
            functions["match"] = lambda: matching(output, frames)
        if batch.codes is not None:
            functions["codes"] = lambda: codes_loss(output.latent, batch.codes, codec.quantizer, scale)
        return {name: functions[name]() for name in names if name in functions}

    def micro_step(
        step: int, micro: int, batch: Batch, log_zero_weights: bool
    ) -> tuple[dict, CodecOutput, torch.Tensor]:
        """Forward and backward of one micro-batch: (scalars, codec output, frames per clip)."""
        seed = hash((config.seed, step, micro)) & 0x7FFFFFFF
        draws = QuantizationDraws.sample(
            seed,
            config.data.batch_size,
            params.acoustic_dim,
            n_frames,
            process.device,
            process.rank,
            process.world_size,
        )
        lengths, frames = batch.lengths, ceil_div(batch.lengths, params.frame_size)
        targets = said_before and batch.targets
        asked = teacher and not targets
        if asked:  # hears the batch beside all else, on a stream of its own
            with beside:
                targets = teacher(batch.waveform, lengths, n_frames)
        with autocast:
            *fields, projected = parallel_model(batch.waveform, lengths, *vars(draws).values())
        output = CodecOutput(*fields)
        reconstruction = mask_samples(output.reconstruction, lengths)
        active = {
            name: w * (settings.reconstruction_decay**step if name in DECAYING else 1.0)
            for name, w in weights.items()
            if w
        }

        losses, scalars = {}, {}
        if discriminators:
            starts, share = random_crops(lengths, crop_samples, seed + 1, process.rank, process.world_size)
            fake_crop = crop(reconstruction, starts, crop_samples)
            with autocast:
                hinge, *maps = hinge_loss(crop(batch.waveform, starts, crop_samples), fake_crop.detach(), share)
            (hinge / settings.accumulation).backward()
            scalars["loss/discriminator"] = hinge.detach().clone()
            if step < config.discriminator.warmup_steps:
                active.pop("feature")
            else:
                with autocast:
                    losses["feature"] = matching_loss(fake_crop, share, *(m.detach() for m in maps))
        losses |= waveform_losses(active, reconstruction, batch.waveform, lengths) | latent_losses(
            active, output, batch, frames
        )
        if "asr" in active:
            beside.wait()
            losses["asr"] = asr_distillation_loss(projected.float(), targets)

        total = sum(active[name] * loss for name, loss in losses.items())
        (total / settings.accumulation).backward()
        if said_before and asked:
            said_before.write(batch.files, targets)

        if log_zero_weights:  # cheap losses of weight 0 are shown all the same
            idle = [name for name, w in weights.items() if not w]
            with torch.no_grad():
                losses |= waveform_losses(idle, reconstruction, batch.waveform, lengths) | latent_losses(
                    idle, output, batch, frames
                )
        scalars |= {f"loss/{name}": loss.detach().clone() for name, loss in losses.items()}  # a graph reuses its memory
        return {"loss/total": total.detach(), **scalars}, output, frames

    def validate(step: int) -> float:
        """Fixed clips through the averaged encoder; writes samples; returns the mel distance that decides `best`."""
        codec_to_check = averaged.module.eval()
        with autocast:
            metrics, encoded = evaluate_codec(codec_to_check, fixed, true_codes=true_codes)
        log.write(step, {f"validation/{name}": value for name, value in metrics.items()})
        write_samples(run.path / "samples", encoded, settings.n_samples, params.sampling_rate, log.board, step)
        log.say(f"validation at step {step}: {in_words(metrics)}")
        return metrics["mel_distance"]

    def save(step: int) -> None:
        """A checkpoint, and the best weights if they are newer than the last one: not at every validation, which comes often."""
        if better:
            run.save_best(partial(write_files, files=better), **better_record)
        run.save_step(
            step,
            partial(write_files, files={name: part.state_dict() for name, part in files.items()}),
            stateful,
            max_steps,
            best=best,
            facts=facts,
            clips=len(train_clips),
        )

    # ---- 8. the loop: step, log, validate, save --------------------------------------------------------------------
    yield start_step
    dataset = (
        SegmentDataset(train_clips, config.seed, said_before)
        if said_before
        else SpeechDataset(
            train_clips,
            config.data.max_sec,
            config.seed,
            speed=config.data.speed,
            params=params if weights["codes"] else None,
        )
    )
    batches = iter(
        make_loader(
            dataset,
            config.data,
            config.seed,
            start_step,
            process.rank,
            process.world_size,
            settings.accumulation,
            said_before.collate if said_before else collate,
        )
    )
    audio_sec_per_step = global_batch * settings.accumulation * config.data.max_sec
    codebook_generator = torch.Generator(device=process.device)
    bad = []
    for step in range(start_step, max_steps):
        factor = cosine_with_warmup(step, config.optimizer.warmup_steps, max_steps)
        set_learning_rate(optimizer, config.optimizer.learning_rate * factor)
        if discriminator_optimizer:
            set_learning_rate(discriminator_optimizer, config.discriminator.learning_rate * factor)
        logging = (step + 1) % settings.log_every_steps == 0 or step + 1 == max_steps
        scalars = {}
        for micro in range(settings.accumulation):
            batch = next(batches).to(process.device, non_blocking=True)
            bad += batch.bad
            last = micro == settings.accumulation - 1
            with nullcontext() if last or process.world_size == 1 else parallel_model.no_sync():
                losses, output, frames = micro_step(step, micro, batch, logging)
            scalars = {name: scalars.get(name, 0.0) + loss / settings.accumulation for name, loss in losses.items()}
        if "codebook" in settings.trainable:
            valid = valid_mask(frames, n_frames)
            semantic = output.latent[:, : params.semantic_dim].transpose(1, 2)
            codec.quantizer.semantic_codebook.update(
                semantic.flatten(0, 1), valid.flatten(), codebook_generator.manual_seed(step)
            )
        scalars["grad/encoder"] = nn.utils.clip_grad_norm_(
            [p for p in model.parameters() if p.requires_grad], settings.gradient_clip
        )
        if discriminators:
            scalars["grad/discriminator"] = nn.utils.clip_grad_norm_(
                discriminators.parameters(), settings.gradient_clip
            )
        for each in optimizers:
            each.step()
            each.zero_grad(set_to_none=False)
        averaged.update_parameters(codec)
        log.add(step + 1, scalars)

        stopping, is_due = process.any(process.stopping(), run.is_due(step + 1))
        ending = stopping or step + 1 == max_steps
        validating = (step + 1) % settings.validate_every_steps == 0 or step + 1 == max_steps
        saving = is_due or ending
        if logging or validating or saving:  # a loss that is not finite is found before anything is kept
            bad_clips.add(process.gather(bad))
            bad = []
            statistics = code_statistics(
                output.codes, frames, params.semantic_codebook_size, params.acoustic_codebook_size
            )
            log.flush(
                {
                    "optimizer/learning_rate": config.optimizer.learning_rate * factor,
                    "data/bad_clips": float(bad_clips.count),
                    "code/embedding_norm": embedding_norm(codec, output.codes, frames),
                    **{f"code/{name}": value for name, value in statistics.items()},
                },
                work=audio_sec_per_step,
            )
        if validating:
            if process.is_main:
                with log.timed("validate", step + 1):
                    distance = validate(step + 1)
                with log.timed("plot", step + 1):
                    plot_run(log.history.rows, run.path / "plots")
                if distance < best:
                    best, better_record = distance, {"step": step + 1, "mel_distance": distance}
                    better = {
                        name: {key: tensor.cpu().clone() for key, tensor in part.state_dict().items()}
                        for name, part in files.items()
                    }
            process.wait()
            log.restart_clock()
        if saving:
            if process.is_main:
                with log.timed("save", step + 1):
                    save(step + 1)
                better = {}
            process.wait()
            log.restart_clock()
        if stopping and step + 1 < max_steps:
            log.say(f"stopped after step {step + 1}; go on with resume=true")
            break
        yield step + 1
    else:
        if final and process.is_main:
            with log.timed("test", max_steps), autocast:
                tested, bad = test_weights(averaged.module.eval(), run.path / "best", final, config.data)
            bad_clips.add(bad)
            write_text(run.path / "test.json", json.dumps(tested, indent=2) + "\n")
            log.say(f"best weights on {len(final)} test clips: {in_words(tested['all'])}")
        process.wait()
    if bad_clips.count:
        log.say(f"{bad_clips.count} bad files were replaced, listed in {bad_clips.path}")
    log.close()


def main(arguments=None) -> None:
    training_main(train, EncoderConfig, COMMAND_LINE.parse_args(arguments))


if __name__ == "__main__":
    main()
