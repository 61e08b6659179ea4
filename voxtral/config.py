"""The configuration of a training run: one YAML, merged into these dataclasses, then `key=value` overrides.

An unknown key at any depth, or a value of a wrong type, is an error that names the key and the nearest valid one.
"""
import difflib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import List, Optional

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from voxtral.asr import AsrConfig
from voxtral.data import DataConfig
from voxtral.discriminator import DiscriminatorConfig
from voxtral.errors import UserError
from voxtral.losses import LossWeights
from voxtral.speaker import SpeakerConfig

PARTS = ("encoder", "codebook", "decoder")


class ConfigError(UserError):
    """A key or value of the configuration is not valid; the message names it."""


@dataclass
class TrainConfig:
    trainable: List[str] = field(default_factory=lambda: ["encoder"])  # of encoder, codebook, decoder; all: a whole codec
    epochs: int = 15                      # passes over the data, unless max_steps says otherwise
    max_steps: Optional[int] = None       # optimizer steps; null: from epochs
    accumulation: int = 1                 # micro-batches per optimizer step
    precision: str = "bf16"               # bf16 (autocast) or fp32; spectral losses are always fp32
    compile: bool = True                  # torch.compile of the codec and the discriminators
    reconstruction_decay: float = 0.9999  # gamma: l1 and stft weigh gamma^step
    stft_fft_sizes: List[int] = field(default_factory=lambda: [2048, 1024, 512, 256, 128])
    ema_decay: float = 0.999              # of the weights that are validated and saved; 0 turns averaging off
    gradient_clip: float = 1.0            # norm of the gradient, encoder and discriminators each
    max_total_loss: float = 1000.0        # above it the run stops as exploded
    log_every_steps: int = 10
    validate_every_steps: int = 1000
    save_every_steps: int = 1000
    keep_last: int = 3                    # checkpoints kept besides best/
    n_samples: int = 4                    # validation clips written as audio and spectrogram


@dataclass
class OptimizerConfig:
    learning_rate: float = 3e-4
    betas: List[float] = field(default_factory=lambda: [0.8, 0.99])
    weight_decay: float = 0.01
    warmup_steps: int = 500               # linear, then cosine to zero at max_steps


@dataclass
class BalancerConfig:
    enabled: bool = False                 # EnCodec's gradient balancer over the losses on the waveform
    decay: float = 0.999


@dataclass
class EncoderConfig:
    """Everything train_encoder.py can be told."""
    checkpoint: Optional[str] = None      # folder; null: $VOXTRAL_CKPT
    output_dir: str = "runs/encoder"
    resume: bool = False                  # continue from the newest checkpoint in output_dir
    seed: int = 0
    device: str = "auto"                  # auto, cpu, cuda
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: LossWeights = field(default_factory=LossWeights)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    asr: AsrConfig = field(default_factory=AsrConfig)
    speaker: SpeakerConfig = field(default_factory=SpeakerConfig)
    balancer: BalancerConfig = field(default_factory=BalancerConfig)


def load_config(schema: type, path, overrides: list[str]):
    """YAML at `path` merged into the dataclass `schema`, then `a.b=value` overrides. Returns an instance of `schema`."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config {path} does not exist: pass --config with one of configs/*.yaml.")
    merged = OmegaConf.structured(schema)
    try:
        layers = [(OmegaConf.load(path), str(path))]
    except Exception as error:  # PyYAML's and OmegaConf's parsers raise many types; all mean the same to the user
        raise ConfigError(f"{path} is no valid YAML: {error}") from error
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"'{override}' is no override: write key=value, for example train.max_steps=1000.")
        try:
            layers.append((OmegaConf.from_dotlist([override]), f"the override {override}"))
        except Exception as error:
            raise ConfigError(f"'{override}' cannot be read as key=value: {error}") from error
    for layer, where in layers:
        try:
            merged = OmegaConf.merge(merged, layer)
        except ConfigKeyError as error:
            raise ConfigError(_unknown_key(schema, str(error.full_key), where)) from error
        except OmegaConfBaseException as error:
            raise ConfigError(f"{where}: {error.full_key}: {str(error.msg or error).splitlines()[0]}") from error
    try:
        OmegaConf.resolve(merged)
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error.full_key}: {str(error.msg or error).splitlines()[0]}") from error


def _unknown_key(schema: type, full_key: str, where: str) -> str:
    known = sorted(_all_keys(OmegaConf.structured(schema)))
    nearest = difflib.get_close_matches(full_key, known, n=1, cutoff=0.0)
    return f"{where}: unknown key '{full_key}'; the nearest valid key is '{nearest[0]}'."


def _all_keys(config: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for key in config:
        keys.append(prefix + key)
        if not OmegaConf.is_missing(config, key) and isinstance(config[key], DictConfig):
            keys += _all_keys(config[key], f"{prefix}{key}.")
    return keys


def dump_config(config, path) -> None:
    """The resolved configuration as YAML."""
    OmegaConf.save(OmegaConf.structured(config), path)


def checkpoint_folder(config) -> str:
    """`checkpoint`, or $VOXTRAL_CKPT. Raises ConfigError when neither is set."""
    folder = config.checkpoint or os.environ.get("VOXTRAL_CKPT")
    if not folder:
        raise ConfigError("no checkpoint: set `checkpoint` in the config, or VOXTRAL_CKPT, to the folder of Voxtral-4B-TTS-2603.")
    return folder


def check_encoder_config(config: EncoderConfig) -> None:
    """Raises ConfigError for values that parse but make no sense, naming the key."""
    train = config.train
    unknown = [part for part in train.trainable if part not in PARTS]
    if unknown or not train.trainable:
        raise ConfigError(f"train.trainable: {unknown or 'nothing'} is not one of {', '.join(PARTS)}.")
    if train.precision not in ("bf16", "fp32"):
        raise ConfigError(f"train.precision is {train.precision}: it must be bf16 or fp32.")
    positive = {"train.epochs": train.epochs, "train.accumulation": train.accumulation, "train.log_every_steps": train.log_every_steps,
                "train.validate_every_steps": train.validate_every_steps, "train.save_every_steps": train.save_every_steps,
                "train.keep_last": train.keep_last, "optimizer.learning_rate": config.optimizer.learning_rate,
                "discriminator.channels": config.discriminator.channels}
    if train.max_steps is not None:
        positive["train.max_steps"] = train.max_steps
    for key, value in positive.items():
        if value <= 0:
            raise ConfigError(f"{key} is {value}: it must be above 0.")
    if not 0 <= train.ema_decay < 1:
        raise ConfigError(f"train.ema_decay is {train.ema_decay}: it must be at least 0 and below 1.")
    if len(config.optimizer.betas) != 2:
        raise ConfigError(f"optimizer.betas is {config.optimizer.betas}: it must be two numbers.")
    for name, weight in vars(config.loss).items():
        if not 0 <= weight < float("inf"):
            raise ConfigError(f"loss.{name} is {weight}: a weight is 0 or more.")
    if not any(vars(config.loss).values()):
        raise ConfigError("loss: all weights are 0, nothing would be learnt.")
