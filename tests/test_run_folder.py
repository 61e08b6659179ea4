"""The run folder: what is kept of a run, damaged and full disks, and with which configuration it goes on."""

import resource
import shutil
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ALONE
from omegaconf import OmegaConf

from voxtral.config import ConfigError, EncoderConfig, FullPipelineConfig, load_config
from voxtral.errors import UserError
from voxtral.processes import Process
from voxtral.run_folder import RunFolder, Tensors, load_run_config, write_files

FILE = "encoder.safetensors"


def begin(path, **changes):
    changed = OmegaConf.from_dotlist([f"{key.replace('__', '.')}={value}" for key, value in changes.items()])
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(EncoderConfig), changed))
    config.output_dir, config.resume = str(path), (Path(path) / "checkpoints").is_dir()
    return RunFolder(config, ALONE)


@pytest.fixture
def run(tmp_path):
    return begin(tmp_path / "run", train__keep_last=2, train__milestones=0)


def save(run, step, max_steps=100):
    """A checkpoint whose tensors hold its step."""
    value = {"a": torch.full((1000,), float(step))}
    write = partial(write_files, files={FILE: Tensors(value)})
    return run.save_step(step, write, {"part": Tensors(value)}, max_steps, best=0.5, facts={"data.batch_size": 8})


def restore(run, batch=8):
    """-> step, what the part and the weights hold"""
    part, weights = Tensors({"a": torch.zeros(1000)}), Tensors({"a": torch.zeros(1000)})
    record = run.restore({"part": part}, {FILE: weights}, {"data.batch_size": batch})
    return record.get("step"), part.tensors["a"][0].item(), weights.tensors["a"][0].item()


# ---------------------------------------------------------------- what is kept


def test_weights_of_milestones_outlive_their_state(tmp_path):
    run = begin(tmp_path / "run", train__keep_last=1, train__milestones=4)
    for step in range(10, 101, 10):
        save(run, step)
    kept = {folder.name: {path.name for path in folder.iterdir()} for folder in run.checkpoints.iterdir()}
    assert kept == {**{f"step_{step:08d}": {FILE} for step in (30, 50, 80)}, "step_00000100": {FILE, "run_state.pt"}}
    assert run.latest().name == "step_00000100" and restore(run) == (100, 100, 100)
    shutil.rmtree(run.latest())
    assert run.latest() is None and restore(run)[0] is None


def test_checkpoints_come_by_steps_and_by_minutes(run):
    train = run.config.train
    assert not run.is_due(1000)
    train.save_every_steps = 500
    assert run.is_due(1000) and not run.is_due(1001)
    run.saved_at -= 60 * train.save_every_minutes + 1
    assert run.is_due(1001)
    run.process = Process(rank=1, world_size=2, device=ALONE.device)  # which never saves
    assert not run.is_due(1001)
    run.process = ALONE
    save(run, 1001)
    assert not run.is_due(1002)
    run.saved_at -= 60 * train.save_every_minutes + 1
    assert run.is_due(1002)
    run.save_sec = 60.0  # on a slow disk: once in 100 minutes
    assert not run.is_due(1002)
    run.saved_at -= 70 * 60
    assert run.is_due(1002)
    train.save_every_minutes, run.saved_at = None, 0
    assert not run.is_due(1002)


def test_tensors_keep_their_place_and_take_their_like_only():
    tensor = torch.zeros(3)
    part = Tensors({"a": tensor})
    part.load_state_dict({"a": torch.ones(3)})
    assert tensor.tolist() == [1, 1, 1]
    for other in ({"a": torch.ones(4)}, {"b": torch.ones(3)}, {"a": torch.ones(3), "b": torch.ones(3)}):
        with pytest.raises(ValueError):
            part.load_state_dict(other)


# ---------------------------------------------------------------- damaged and full disks


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("name", ["run_state.pt", FILE])
@pytest.mark.parametrize(
    "damage", [lambda path: path.write_bytes(b""), cut, lambda path: path.write_bytes(b"no state")]
)
def test_a_damaged_checkpoint_is_named_and_the_older_one_that_can_be_used(run, name, damage):
    for step in (10, 20):
        save(run, step)
    damage(run.checkpoints / "step_00000020" / name)
    said = r"step_00000020 is damaged .*: delete it, and resume=true goes on from .*step_00000010\.$"
    with pytest.raises(ConfigError, match=said) as error:
        restore(run)
    assert name in str(error.value) and "\n" not in str(error.value)
    damage(run.checkpoints / "step_00000010" / name)
    with pytest.raises(ConfigError, match="step_00000020 is damaged .*no older checkpoint"):
        restore(run)
    save(run, 30)
    assert restore(run) == (30, 30, 30)


@contextmanager
def full_disk(n_bytes):
    """No file can be larger: writing fails as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("step", [20, 30])  # which is there already, or not
@pytest.mark.parametrize("n_bytes", [4300, 2000])  # the state alone does not fit, the weights neither
def test_a_full_disk_is_a_sentence_and_loses_nothing(run, n_bytes, step):
    for earlier in (10, 20):
        save(run, earlier)
    said = f"step_000000{step} could not be written .*newest checkpoint is .*step_00000020"
    with full_disk(n_bytes), pytest.raises(UserError, match=said) as error:
        save(run, step)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step_00000010", "step_00000020"]
    assert restore(run) == (20, 20, 20)


# ---------------------------------------------------------------- with which configuration


@pytest.fixture
def told(tmp_path):
    """A YAML, and a run of it that has a checkpoint."""
    path, output = tmp_path / "told.yaml", tmp_path / "run"
    path.write_text(f"output_dir: {output}\nseed: 1\noptimizer: {{warmup_steps: 5}}\ntrain: {{max_steps: 7}}\n")
    run = RunFolder(load_config(EncoderConfig, path, ["loss.mel=2"]), ALONE)
    save(run, 3)
    return path


def test_resuming_goes_on_with_the_runs_own_configuration(told, capsys):
    told.write_text(told.read_text().replace("warmup_steps: 5", "warmup_steps: 9"))
    config = load_run_config(EncoderConfig, told, ["resume=true", "train.max_steps=8"])
    assert (config.optimizer.warmup_steps, config.loss.mel, config.train.max_steps, config.resume) == (5, 2, 8, True)
    said = capsys.readouterr().out.splitlines()
    assert (
        len(said) == 2
        and said[0].startswith("optimizer.warmup_steps is 5, as the run had it")
        and said[1].startswith("loss.mel is 2.0")
    )
    assert load_run_config(EncoderConfig, told, []).optimizer.warmup_steps == 9  # another run


def test_changes_are_listed_and_every_configuration_is_kept(told, tmp_path):
    path = tmp_path / "run"
    for step, override in ((4, "train.max_steps=8"), (5, "loss.mel=3"), (6, "loss.mel=3")):
        run = RunFolder(load_run_config(EncoderConfig, told, ["resume=true", override]), ALONE)
        assert run.changes == {4: ["train.max_steps: 7 → 8"], 5: ["loss.mel: 2.0 → 3.0"], 6: []}[step]
        save(run, step)
    kept = {file.name: load_config(EncoderConfig, file, []) for file in (path / "former_configs").iterdir()}
    assert {name: (config.train.max_steps, config.loss.mel) for name, config in kept.items()} == {
        "000_until_step_00000003.yaml": (7, 2),
        "001_until_step_00000004.yaml": (8, 2),
    }
    own = load_config(EncoderConfig, path / "config.yaml", [])
    assert (own.train.max_steps, own.loss.mel) == (8, 3)


@pytest.mark.parametrize(
    "override",
    [
        "seed=2",
        "data.sources=[{kind: folder}]",
        "data.validation.clips=3",
        "optimizer.betas=[0.9,0.9]",
        "train.trainable=[encoder,decoder]",
        "discriminator.channels=3",
        "loss.feature=1",
    ],
)
def test_what_the_state_hangs_on_cannot_change(told, tmp_path, override):
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    config = load_run_config(EncoderConfig, told, ["resume=true", override])
    with pytest.raises(ConfigError, match=f"^{override.split('=')[0]}: the run in .* its state means nothing with"):
        RunFolder(config, ALONE)
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before
    assert not (tmp_path / "run" / "former_configs").exists()


def test_the_adapters_sizes_cannot_change(tmp_path):
    run = RunFolder(FullPipelineConfig(output_dir=str(tmp_path)), ALONE)
    save(run, 1)
    config = FullPipelineConfig(output_dir=str(tmp_path), resume=True)
    config.lora.rank = 9
    with pytest.raises(ConfigError, match="^lora.rank: "):
        RunFolder(config, ALONE)


def test_facts_of_a_run_cannot_change(run):
    save(run, 10)
    with pytest.raises(ConfigError, match="^data.batch_size: the run in .* has 8, and its state means nothing with 16"):
        restore(run, batch=16)
