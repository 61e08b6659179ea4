"""Configuration: the shipped files, overrides, and what is said about mistakes."""

from dataclasses import asdict, fields, is_dataclass
from pathlib import Path

import pytest
import yaml

from voxtral.config import (
    ConfigError,
    EncoderConfig,
    FullPipelineConfig,
    StandinConfig,
    check_encoder_config,
    check_full_pipeline_config,
    checkpoint_folder,
    dump_config,
    load_config,
)
from voxtral.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs"
SHIPPED = sorted(path.name for path in CONFIGS.glob("*.yaml"))


def schema_of(name):
    if name.endswith("full_pipeline.yaml"):
        return FullPipelineConfig
    return StandinConfig if name.startswith("standin") else EncoderConfig


@pytest.fixture
def load(tmp_path):
    """load(yaml text, overrides...) -> EncoderConfig"""

    def load(text, *overrides):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return load_config(EncoderConfig, path, list(overrides))

    return load


# ---------------------------------------------------------------- the shipped files


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_config_loads_and_makes_sense(name):
    config = load_config(schema_of(name), CONFIGS / name, [])
    (check_full_pipeline_config if isinstance(config, FullPipelineConfig) else check_encoder_config)(config)
    assert config.data.sources


def leaves(config, prefix=""):
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, value


def written(content, prefix=""):
    """Full keys of a YAML mapping."""
    for key, value in content.items():
        yield from written(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]


def test_encoder_yaml_names_every_key_and_states_the_defaults():
    """Only where the data lies, how it is read, that a real run has clips for its end, and how long it is, is not a
    default of the dataclasses."""
    content = yaml.safe_load((CONFIGS / "encoder.yaml").read_text())
    defaults = dict(leaves(EncoderConfig()))
    shipped = dict(leaves(load_config(EncoderConfig, CONFIGS / "encoder.yaml", [])))
    assert set(written(content)) == set(defaults)
    different = {key for key, value in shipped.items() if value != defaults[key]}
    assert different == {"data.sources", "data.num_workers", "data.validation.test_clips", "train.max_steps"}


def test_full_pipeline_yaml_is_plain_distillation_and_states_the_defaults():
    config = load_config(FullPipelineConfig, CONFIGS / "full_pipeline.yaml", [])
    assert (config.lora.rank, config.optimizer.learning_rate, config.train.trainable) == (8, 2e-5, ["lora"])
    assert config.lora.target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert {name: weight for name, weight in vars(config.loss).items() if weight} == {"hidden": 1.0}
    content = yaml.safe_load((CONFIGS / "full_pipeline.yaml").read_text())
    defaults, shipped = dict(leaves(FullPipelineConfig())), dict(leaves(config))
    assert set(written(content)) == set(defaults)
    different = {key.removeprefix("data.") for key, value in shipped.items() if value != defaults[key]}
    assert different == {"sources", "num_workers", "batch_size", "max_sec", "validation.clips"}


def test_encoder_paper_yaml_is_the_papers_recipe():
    config = load_config(EncoderConfig, CONFIGS / "encoder_paper.yaml", [])
    assert (config.data.batch_size, config.data.max_sec) == (4, 4.0)
    assert (config.optimizer.learning_rate, config.optimizer.betas) == (3e-4, [0.8, 0.99])
    assert config.discriminator.warmup_steps == 2000 and 10 <= config.train.epochs <= 20
    weights = {name: weight for name, weight in vars(config.loss).items() if weight}
    assert weights == {"l1": 1, "stft": 1, "feature": 1, "asr": 1, "commit": 0.1}
    assert config.train.reconstruction_decay == 0.9999
    assert config.discriminator.fft_sizes == [78, 126, 206, 334, 542, 876, 1418, 2296]
    assert [(s.kind, s.subsets, s.language) for s in config.data.sources] == [
        ("librispeech", ["train-clean-360", "train-other-500"], ""),
        ("common_voice", [], "en"),
        ("common_voice", [], "ar"),
        ("generated", [], ""),
    ]


# ---------------------------------------------------------------- merging


def test_overrides_win_over_the_file_and_the_last_one_wins(load):
    config = load("train: {max_steps: 5, epochs: 3}\n", "train.max_steps=7", "train.max_steps=9", "loss={mel: 2}")
    assert (config.train.max_steps, config.train.epochs, config.loss.mel, config.loss.l1) == (9, 3, 2.0, 1.0)


def test_overrides_reach_into_lists_and_replace_them(load):
    text = "data: {sources: [{kind: folder, path: a}, {kind: folder, path: b}]}\n"
    assert [s.path for s in load(text, "data.sources.1.path=/x").data.sources] == ["a", "/x"]
    assert [s.path for s in load(text, "data.sources=[{kind: folder, path: c}]").data.sources] == ["c"]
    assert load(text, "data.sources=[]").data.sources == []
    assert load("train: {stft_fft_sizes: [64]}\n").train.stft_fft_sizes == [64]


@pytest.mark.parametrize(
    "text, key, value",
    [
        ("null", "max_steps", None),
        ("12", "max_steps", 12),
        ("1e-3", "gradient_clip", 1e-3),
        ("[encoder,decoder]", "trainable", ["encoder", "decoder"]),
    ],
)
def test_values_are_read_as_yaml(load, text, key, value):
    assert getattr(load("", f"train.{key}={text}").train, key) == value


def test_an_empty_file_is_the_defaults(load):
    assert load("") == EncoderConfig()


@pytest.mark.parametrize("name", SHIPPED)
def test_a_dumped_config_loads_as_the_same(name, tmp_path):
    config = load_config(schema_of(name), CONFIGS / name, ["train.max_steps=3", "data.max_sec=2", "checkpoint=/x"])
    dump_config(config, tmp_path / "config.yaml")
    again = load_config(schema_of(name), tmp_path / "config.yaml", [])
    assert asdict(again) == asdict(config) and again.train.max_steps == 3


def test_checkpoint_falls_back_on_the_environment(monkeypatch):
    monkeypatch.setenv("VOXTRAL_CKPT", "/from/environment")
    assert checkpoint_folder(EncoderConfig()) == "/from/environment"
    assert checkpoint_folder(EncoderConfig(checkpoint="/from/config")) == "/from/config"
    monkeypatch.delenv("VOXTRAL_CKPT")
    with pytest.raises(ConfigError, match="VOXTRAL_CKPT"):
        checkpoint_folder(EncoderConfig())


# ---------------------------------------------------------------- mistakes


def message_of(action):
    with pytest.raises(UserError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


UNKNOWN = [
    ("chekpoint", "checkpoint"),
    ("train.max_stps", "train.max_steps"),
    ("max_steps", "train.max_steps"),
    ("data.validation.clps", "data.validation.clips"),
    ("loss.stfd", "loss.stft"),
]


@pytest.mark.parametrize("key, nearest", UNKNOWN)
def test_unknown_key_names_itself_and_the_nearest(load, key, nearest):
    said = f"unknown key '{key}'; the nearest valid key is '{nearest}'."
    assert message_of(lambda: load("", f"{key}=1")) == f"the override {key}=1: {said}"
    text = "1"
    for part in reversed(key.split(".")):
        text = f"{{{part}: {text}}}"
    assert message_of(lambda: load(text)).endswith(f"config.yaml: {said}")


def test_unknown_key_in_a_list(load):
    text = "data: {sources: [{kind: folder, path: a}]}\n"
    nearest = "the nearest valid key is 'data.sources[].path'"
    assert f"'data.sources[].pth'; {nearest}" in message_of(lambda: load(text.replace("path", "pth")))
    assert f"'data.sources[0].pth'; {nearest}" in message_of(lambda: load(text, "data.sources.0.pth=1"))
    assert "data.sources[4]" in message_of(lambda: load(text, "data.sources.4.path=1"))


WRONG = """
    train.max_steps=many train.max_steps=1.5 train.max_steps=true resume=perhaps loss.l1=heavy loss.l1=null
    optimizer.betas=0.8 optimizer.betas=[0.8,x] train=3 train=null data.sources=folder data.sources=[a]
""".split()


@pytest.mark.parametrize("override", WRONG)
def test_wrong_type_names_the_key(load, override):
    key, value = override.split("=")
    assert key in message_of(lambda: load("", override)).removeprefix(f"the override {override}")
    text = f"{{{key.replace('.', ': {')}: {value}{'}' * key.count('.')}}}"
    assert key in message_of(lambda: load(text))


def test_wrong_type_in_a_list_names_the_key(load):
    assert "data.sources[].weight" in message_of(lambda: load("data: {sources: [{kind: folder, weight: x}]}"))
    assert "data.sources[0].kind" in message_of(lambda: load("data: {sources: [{path: x}]}"))


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [\n", "5\n", "a: b: c\n", "data: {sources: {kind: folder}}\n"])
def test_a_file_of_another_form_is_refused(load, text):
    assert "config.yaml" in message_of(lambda: load(text))


def test_a_missing_file_is_named(tmp_path):
    assert str(tmp_path / "none.yaml") in message_of(lambda: load_config(EncoderConfig, tmp_path / "none.yaml", []))


@pytest.mark.parametrize("override", ["max_steps", "train.max_steps=[", "data.sources.x.path=1", "=3"])
def test_a_broken_override_is_named(load, override):
    assert override in message_of(lambda: load("data: {sources: [{kind: folder}]}", override))


NONSENSE = """
    train.trainable=[] train.trainable=[encoder,wheels] train.precision=fp8 train.epochs=0 train.max_steps=0
    train.accumulation=-1 train.log_every_steps=0 train.validate_every_steps=0 train.save_every_steps=0
    train.keep_last=0 train.ema_decay=1 train.ema_decay=-0.1 train.gradient_clip=0 train.n_samples=-1
    train.max_total_loss=0 train.reconstruction_decay=1.1 train.reconstruction_decay=0 train.stft_fft_sizes=[]
    train.stft_fft_sizes=[2] train.stft_fft_sizes=[1000000] optimizer.learning_rate=0
    optimizer.learning_rate=.nan optimizer.learning_rate=.inf optimizer.betas=[0.8] optimizer.betas=[0.8,1]
    optimizer.betas=[] optimizer.weight_decay=-1 optimizer.warmup_steps=-1 loss.l1=-1 loss.asr=.inf
    loss.mel=.nan discriminator.channels=0 discriminator.crop_sec=0 discriminator.warmup_steps=-1
    discriminator.fft_sizes=[] discriminator.learning_rate=0 seed=-1 data.max_sec=0.05 data.max_sec=.nan
    data.batch_size=0 data.num_workers=-1 data.validation.clips=0
""".split()


@pytest.mark.parametrize("override", NONSENSE)
def test_values_that_make_no_sense_are_named(load, override):
    config = load("data: {sources: [{kind: folder, path: a}]}", override)
    assert override.split("=")[0] in message_of(lambda: check_encoder_config(config))


def test_nothing_to_learn_is_an_error(load):
    zeros = [f"loss.{f.name}=0" for f in fields(EncoderConfig().loss)]
    assert "all weights are 0" in message_of(lambda: check_encoder_config(load("", *zeros)))
    only_feature = load("", *zeros, "loss.feature=1")
    assert "only feature has a weight" in message_of(lambda: check_encoder_config(only_feature))
    only_feature.discriminator.warmup_steps = 0
    check_encoder_config(only_feature)
