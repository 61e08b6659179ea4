"""The configuration of a training run: one YAML, merged into these dataclasses, then `key=value` overrides.

An unknown key at any depth, or a value of a wrong type, is an error that names the key and the nearest valid one.
"""

import difflib
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from voxtral.asr import AsrConfig
from voxtral.audio import SAMPLE_RATE
from voxtral.discriminator import DiscriminatorConfig
from voxtral.errors import UserError, one_line, reason_of
from voxtral.known_codes import MatchConfig
from voxtral.losses import LossWeights
from voxtral.params import LORA_MODULES
from voxtral.sources import CODEC_FRAME_SEC, DataConfig, check_config
from voxtral.tracking import TRACKERS, dotted

PARTS = ("encoder", "codebook", "decoder")
PRESET = ("preset_hidden", "preset_kl")  # losses of the adapted model under true references
DISTILLATION = ("hidden", "semantic_kl", *PRESET)  # losses that compare with the teacher
FULL_PIPELINE_PARTS = ("lora", "encoder", "embedding", "backbone", "acoustic")
# What the state of a run hangs on: a run goes on with the same values of these,
KEPT_ON_RESUMING = set(
    """
    seed reference_sec data.sources data.validation.clips data.validation.speakers train.trainable optimizer.betas
    discriminator.fft_sizes discriminator.channels asr.model lora.rank lora.alpha lora.target_modules
    """.split()
)
SWITCHES = ("loss.feature", "loss.asr", "loss.match")  # and with these neither switched on nor off.
# Numbers that are not 0, and those that are below 1.
POSITIVE = set(
    """
    train.epochs train.max_steps train.accumulation train.gradient_clip train.max_total_loss train.log_every_steps
    train.validate_every_steps train.save_every_steps train.save_every_minutes train.keep_last
    train.reconstruction_decay optimizer.learning_rate discriminator.channels discriminator.crop_sec
    discriminator.learning_rate lora.rank lora.alpha
    """.split()
)
SHARES = {"train.ema_decay", "train.dropout", "lora.dropout", "optimizer.betas"}


class ConfigError(UserError):
    """A key or value of the configuration is not valid; the message names it."""


@dataclass
class LoopConfig:
    """What the training loops of both phases can be told."""

    trainable: list[str] = MISSING
    epochs: int = 1  # passes over the data, unless max_steps says otherwise
    max_steps: int | None = None  # optimizer steps; null: from epochs
    accumulation: int = 1  # micro-batches per optimizer step
    precision: str = "bf16"  # bf16 or fp32; spectral losses and LoRA weights are always fp32
    gradient_clip: float = 1.0  # norm of the gradient, encoder and discriminators each
    max_total_loss: float = 1e6  # above it the run stops as exploded; runs came back from thousands (RESULTS.md)
    log_every_steps: int = 10
    validate_every_steps: int = 500
    save_every_minutes: float | None = 30  # minutes between checkpoints
    save_every_steps: int | None = None  # optimizer steps between them, as well
    keep_last: int = 3  # checkpoints kept besides best/
    milestones: int = 20  # so many weights, spread over the run, are kept beside those: the best is known later


@dataclass
class TrainConfig(LoopConfig):
    trainable: list[str] = field(default_factory=lambda: ["encoder"])  # of PARTS; all: a whole codec
    epochs: int = 15
    validate_every_steps: int = 1000
    cuda_graphs: bool = True  # replay recorded launches on a GPU; false: launch kernel by kernel
    compile: bool = True  # torch.compile on a GPU: a minute or two at the start, faster steps after it
    reconstruction_decay: float = 0.9999  # gamma: l1 and stft weigh gamma^step
    stft_fft_sizes: list[int] = field(default_factory=lambda: [2048, 1024, 512, 256, 128])
    ema_decay: float = 0.999  # of the weights that are validated and saved; 0 turns averaging off
    n_samples: int = 4  # validation clips written as audio and spectrogram


@dataclass
class OptimizerConfig:
    learning_rate: float = 5e-4
    betas: list[float] = field(default_factory=lambda: [0.8, 0.99])
    weight_decay: float = 0.01
    warmup_steps: int = 500  # linear, then cosine to zero at max_steps


@dataclass
class RunConfig:
    """What the runs of both phases can be told."""

    checkpoint: str | None = None  # folder; null: $VOXTRAL_CKPT
    encoder: str | None = None
    output_dir: str = MISSING
    resume: bool = False  # continue from the newest checkpoint in output_dir
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda
    tracker: str = "none"  # beside TensorBoard: none, wandb, mlflow, trackio
    data: DataConfig = field(default_factory=DataConfig)


@dataclass
class EncoderConfig(RunConfig):
    """Everything train_encoder.py can be told. `encoder`, from which it starts: null: fresh; an encoder.safetensors;
    checkpoint: the checkpoint's own."""

    output_dir: str = "runs/encoder"
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: LossWeights = field(default_factory=LossWeights)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    asr: AsrConfig = field(default_factory=AsrConfig)
    match: MatchConfig = field(default_factory=MatchConfig)


@dataclass
class AdapterConfig:
    """peft's LoRA of the backbone."""

    rank: int = 8
    alpha: float = 16.0  # the update is alpha / rank * B A
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: list(LORA_MODULES))  # wq, wk, wv, wo


@dataclass
class FullPipelineLosses:
    """The map of weights of phase 2. The default is `hidden` alone: plain distillation."""

    hidden: float = 1.0  # squared error of the hidden states at the reference's positions, mean over layers
    semantic_kl: float = 0.0  # KL of the semantic ids' distribution where frames are predicted
    preset_hidden: float = 0.0  # under true references, squared error of the hidden states at all positions
    preset_kl: float = 0.0  # under true references, KL of the semantic ids' distribution, likewise
    cross_entropy: float = 0.0  # of the semantic ids that were spoken: the paper's own objective, without a teacher
    flow: float = 0.0  # flow matching of the acoustic levels that were spoken, likewise
    mel: float = 0.0  # mel distance of what the decoder makes of the encoder's codes: a trained encoder keeps its sound


@dataclass
class FullPipelineTrainConfig(LoopConfig):
    trainable: list[str] = field(default_factory=lambda: ["lora"])  # of FULL_PIPELINE_PARTS
    gradient_checkpointing: bool = False  # compute layers twice, keep only their inputs
    compile: bool = False  # with reference_sec: torch.compile of the layers on a GPU, half a minute at the start
    dropout: float = 0.0  # with reference_sec: of what layers add


@dataclass
class FullPipelineConfig(RunConfig):
    """Everything train_full_pipeline.py can be told. `encoder`: encoder.safetensors of phase 1; null: the one in the
    checkpoint."""

    output_dir: str = "runs/full"
    reference_sec: list[float] | None = None  # [shortest, longest]: references are random crops of their own true codes
    train: FullPipelineTrainConfig = field(default_factory=FullPipelineTrainConfig)
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=2e-5, betas=[0.9, 0.999], weight_decay=0.0, warmup_steps=50
        )
    )
    lora: AdapterConfig = field(default_factory=AdapterConfig)
    loss: FullPipelineLosses = field(default_factory=FullPipelineLosses)


@dataclass
class StandinSizes:
    """What a stand-in checkpoint has in place of the release's sizes; see voxtral.standin.small_params for the rest."""

    codec: dict[str, Any] = field(default_factory=dict)  # keys of params.json, multimodal.audio_tokenizer_args
    backbone: dict[str, Any] = field(default_factory=dict)  # keys of its top level
    acoustic: dict[str, Any] = field(default_factory=dict)  # keys of its acoustic_transformer_args
    n_text_tokens: int = 1048  # text tokens of tekken.json; 256: single bytes
    voices: dict[str, str] = field(default_factory=dict)  # preset name -> training speaker
    encoder_steps: int = 0  # after the codec, a fresh encoder learns against its decoder
    decoder_steps: int = 0  # and then the decoder alone from the encoder as it is


@dataclass
class LanguageModelConfig(FullPipelineConfig):
    """The language model of a stand-in: a run of train_full_pipeline.py's loop on the true encoder's codes of the
    speech that has a text. data.sources are recordings below the data_root of the codec's; make_standin.py puts their
    codes in their place, and sets checkpoint, output_dir, resume, seed and device."""

    speeds: list[float] = field(default_factory=lambda: [1.0])  # each clip is played at; each a speaker of its own
    offsets_ms: list[float] = field(default_factory=lambda: [0.0])  # and begun so much later against the frame grid
    whisper: str | None = None  # counts wrong words of what it says at the end: a model's name, or a .pt


@dataclass
class StandinConfig(EncoderConfig):
    """Everything make_standin.py can be told: a training run of the whole codec, the sizes, and a run of the language
    model; without that one, backbone and acoustic transformer stay random."""

    loss: LossWeights = field(default_factory=lambda: LossWeights(match=0.0))  # nobody has spoken its codes yet
    standin: StandinSizes = field(default_factory=StandinSizes)
    language_model: LanguageModelConfig | None = None


def load_config(schema: type, path, overrides: list[str]):
    """YAML at `path` merged into the dataclass `schema`, then `a.b=value` overrides. Returns an instance of
    `schema`."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config {path} does not exist: pass --config with one of configs/*.yaml.")
    merged = OmegaConf.structured(schema)
    try:
        layer = OmegaConf.load(path)
    except Exception as error:  # PyYAML's and OmegaConf's parsers raise many types; all mean the same to the user
        raise ConfigError(f"{path} is no valid YAML: {one_line(error)}") from error
    if not isinstance(layer, DictConfig):
        raise ConfigError(f"{path} is a list: a config is a mapping of keys such as data: and train:.")
    changes = [
        (str(path), partial(OmegaConf.update, merged, str(key), value))
        for key, value in OmegaConf.to_container(layer).items()
    ]
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"'{override}' is no override: write key=value, for example train.max_steps=1000.")
        changes.append((f"the override {override}", partial(merged.merge_with_dotlist, [override])))
    for where, change in changes:
        try:
            change()
        except (ConfigKeyError, ConfigAttributeError) as error:
            key, known = _key_of(schema, error), [name for name, _ in _all_keys(schema)]
            nearest = difflib.get_close_matches(re.sub(r"\[\d+\]", "[]", key), known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{where}: unknown key '{key}'; the nearest valid key is '{nearest}'.") from error
        except OmegaConfBaseException as error:
            raise ConfigError(f"{where}: {_key_of(schema, error)}: {reason_of(error)}") from error
        except Exception as error:  # see above
            raise ConfigError(f"{where}: cannot be read as a value: {one_line(error)}") from error
    try:
        OmegaConf.resolve(merged)
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error.full_key}: {reason_of(error)}") from error


def _key_of(schema: type, error: OmegaConfBaseException) -> str:
    """The full key that an error is about; for a key in a list, OmegaConf knows only its last part."""
    key = str(error.full_key)
    if "." in key or error.object_type in (schema, list):
        return key
    owners = (name for name, owner in _all_keys(schema) if owner is error.object_type)
    return next(owners, key).rpartition(".")[0] + "." + key


def _all_keys(schema: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """(full key, dataclass that owns it); elements of lists as `data.sources[].kind`."""
    for name, kind in get_type_hints(schema).items():
        yield prefix + name, schema
        inner = next(iter(get_args(kind)), kind)
        if is_dataclass(inner):
            yield from _all_keys(inner, f"{prefix}{name}{'[]' if get_origin(kind) is list else ''}.")


def dump_config(config, path) -> None:
    """The resolved configuration as YAML."""
    OmegaConf.save(OmegaConf.structured(config), path)


def checkpoint_folder(config) -> str:
    """`checkpoint`, or $VOXTRAL_CKPT. Raises ConfigError when neither is set."""
    folder = config.checkpoint or os.environ.get("VOXTRAL_CKPT")
    if not folder:
        raise ConfigError(
            "no checkpoint: set `checkpoint` in the config, or VOXTRAL_CKPT, to the folder of Voxtral-4B-TTS-2603."
        )
    return folder


def _check_run(config: RunConfig, parts: tuple[str, ...]) -> None:
    """What the configurations of both phases have in common. No number in them may be negative."""
    check_config(config.data)
    train = config.train
    unknown = [part for part in train.trainable if part not in parts]
    if unknown or not train.trainable:
        raise ConfigError(f"train.trainable: {unknown or 'nothing'} is not one of {', '.join(parts)}.")
    if config.tracker not in ("none", *TRACKERS):
        raise ConfigError(f"tracker is {config.tracker}: it must be none or one of {', '.join(TRACKERS)}.")
    if config.tracker != "none" and not importlib.util.find_spec(config.tracker):
        raise ConfigError(
            f"tracker is {config.tracker}, which is not installed: pip install {config.tracker}, or set tracker=none."
        )
    if train.precision not in ("bf16", "fp32"):
        raise ConfigError(f"train.precision is {train.precision}: it must be bf16 or fp32.")
    numbers = [(key, value) for key, value in dotted(asdict(config)).items() if isinstance(value, (int, float))]
    for key, value in [*numbers, *(("optimizer.betas", beta) for beta in config.optimizer.betas)]:
        if not 0 <= value < math.inf or value == 0 and key in POSITIVE:
            raise ConfigError(f"{key} is {value}: it must be {'above 0' if key in POSITIVE else '0 or more'}.")
        if key in SHARES and not value < 1:
            raise ConfigError(f"{key} is {value}: it must be at least 0 and below 1.")
    if len(config.optimizer.betas) != 2:
        raise ConfigError(f"optimizer.betas is {config.optimizer.betas}: it must be two numbers.")
    if not any(vars(config.loss).values()):
        raise ConfigError("loss: all weights are 0, nothing would be learnt.")


def check_full_pipeline_config(config: FullPipelineConfig) -> None:
    """Raises ConfigError (for the data block DataError) for values that parse but make no sense, naming the key."""
    _check_run(config, FULL_PIPELINE_PARTS)
    unknown = sorted(set(config.lora.target_modules) - set(LORA_MODULES))
    if unknown or not config.lora.target_modules:
        raise ConfigError(f"lora.target_modules: {unknown or 'nothing'} is not one of {', '.join(LORA_MODULES)}.")
    if list(config.data.speed) != [1, 1]:
        raise ConfigError("data.speed: the codes of a clip hold for its own speed only; leave it at [1, 1] here.")
    if {"lora", "backbone"} <= set(config.train.trainable):
        raise ConfigError("train.trainable: lora leaves the backbone's own weights as they are; choose one of the two.")
    if config.loss.mel and "encoder" not in config.train.trainable:
        raise ConfigError("loss.mel is the encoder's: it needs train.trainable=[encoder], or [lora,encoder].")
    if "acoustic" in config.train.trainable and not (config.loss.cross_entropy or config.loss.flow):
        raise ConfigError(
            "train.trainable: acoustic learns from loss.cross_entropy and loss.flow only; give them a weight."
        )
    if (config.train.compile or config.train.dropout) and config.reference_sec is None:
        raise ConfigError(
            "train.compile and train.dropout are for a language model from nothing (reference_sec): set them to "
            "false and 0."
        )
    if config.reference_sec is not None:
        shortest, longest = config.reference_sec if len(config.reference_sec) == 2 else (0, 0)
        if not CODEC_FRAME_SEC <= shortest <= longest:
            raise ConfigError(
                f"reference_sec is {config.reference_sec}: it must be two lengths in seconds, the shorter first."
            )
        encoder_losses = [name for name in (*DISTILLATION, "mel") if getattr(config.loss, name)]
        if encoder_losses or {"lora", "encoder"} & set(config.train.trainable):
            raise ConfigError(
                "reference_sec is for a language model from nothing: "
                f"{', '.join(encoder_losses) or 'lora and encoder'} needs the encoder's own references, so leave "
                "reference_sec at null."
            )


def check_encoder_config(config: EncoderConfig) -> None:
    """Raises ConfigError (for the data block DataError) for values that parse but make no sense, naming the key."""
    train = config.train
    _check_run(config, PARTS)
    if "encoder" not in train.trainable and not config.encoder:
        raise ConfigError(
            "train.trainable leaves the encoder as it is, which is a fresh one: set encoder to a file, "
            "or to checkpoint."
        )
    if train.reconstruction_decay > 1:
        raise ConfigError(f"train.reconstruction_decay is {train.reconstruction_decay}: it must be at most 1.")
    if config.asr.teacher_cache and list(config.data.speed) != [1, 1]:
        raise ConfigError(
            "asr.teacher_cache: what Whisper said holds for a clip's own speed; set data.speed to [1, 1]."
        )
    if config.loss.codes and config.asr.teacher_cache:
        raise ConfigError("loss.codes does not go with asr.teacher_cache: its segments begin between code frames.")
    max_sec, discriminator = config.data.max_sec, config.discriminator
    for key, sizes, sec in (
        ("train.stft_fft_sizes", train.stft_fft_sizes, max_sec),
        ("discriminator.fft_sizes", discriminator.fft_sizes, min(discriminator.crop_sec, max_sec)),
    ):
        largest = 2 * round(sec * SAMPLE_RATE) - 1  # an STFT mirrors half a window at the ends
        if not sizes or not 4 <= min(sizes) <= max(sizes) <= largest:
            raise ConfigError(f"{key} is {sizes}: of {sec:g} s it must be FFT sizes from 4 to {largest} samples.")
    if config.discriminator.warmup_steps and not any(w for name, w in vars(config.loss).items() if name != "feature"):
        raise ConfigError(
            "loss: only feature has a weight, and nothing would be learnt for discriminator.warmup_steps."
        )
