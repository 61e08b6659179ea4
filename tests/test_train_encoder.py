"""train_encoder.py end to end on a tiny random checkpoint and real speech: what is saved, resuming, mistakes."""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from conftest import ROOT, stopped, stopped_by_torchrun, torchrun
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_leaves

import train_encoder
from voxtral import encoder_training, history
from voxtral.codec import CodecOutput, VoxtralCodec
from voxtral.config import EncoderConfig, load_config
from voxtral.data import validation_batches
from voxtral.discriminator import AdversarialLosses, DiscriminatorConfig, Discriminators
from voxtral.encoder_training import WeightAverage, choose_trainable
from voxtral.history import metric_rows
from voxtral.known_codes import CodeMatching, known_codes
from voxtral.layout import withheld_layout
from voxtral.losses import LossWeights, SoundLosses
from voxtral.params import load_params
from voxtral.quantizer import QuantizationDraws
from voxtral.run import Logger
from voxtral.sources import find_clips, split_validation
from voxtral.standin import small_params, write_random_checkpoint
from voxtral.validation import evaluate_codec

SPEECH = sorted((ROOT / "assets" / "speech").glob("*.opus"))[:7]


def tampered(folder, target, change):
    """A copy of a checkpoint folder with `change` applied to its tensors."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "consolidated.safetensors")
    change(tensors)
    save_file(tensors, target / "consolidated.safetensors")
    return target


def shrink_codebook(tensors):
    """To the size of a fresh encoder's latents, which otherwise all have the same code."""
    tensors["audio_tokenizer.quantizer.semantic_codebook.embedding_sum"] *= 0.01


@pytest.fixture(scope="module")
def settings(tmp_path_factory, whisper_checkpoint):
    """The whole set of losses on two clips of half a second a step; six steps, a checkpoint after three."""
    folder = tmp_path_factory.mktemp("training")
    write_random_checkpoint(folder / "random", small_params(), {"alpha": 5})
    tampered(folder / "random", folder / "checkpoint", shrink_codebook)
    (folder / "speech").mkdir()
    for path in SPEECH:
        shutil.copy(path, folder / "speech")
    audio, rate = soundfile.read(SPEECH[0])
    soundfile.write(folder / "speech" / "short.wav", audio[rate // 2 : rate * 4 // 5], rate)  # 0.3 s: padded, masked
    (folder / "coded").mkdir()
    codes = np.random.default_rng(0).integers(8, 13, (37, 40))
    np.save(folder / "coded" / "0.npy", codes.astype(np.int16))
    data = {"data_root": str(folder), "sources": [{"kind": "folder", "path": "speech"}], "validation": {"clips": 2}}
    train = {"max_steps": 6, "precision": "fp32", "stft_fft_sizes": [256, 64], "ema_decay": 0.5, "n_samples": 1}
    train |= {"log_every_steps": 1, "validate_every_steps": 3, "save_every_steps": 3, "keep_last": 1, "milestones": 0}
    return {
        "checkpoint": str(folder / "checkpoint"),
        "device": "cpu",
        "seed": 3,
        "data": data | {"batch_size": 2, "max_sec": 0.5, "num_workers": 0},
        "train": train,
        "optimizer": {"warmup_steps": 2, "learning_rate": 4e-3},
        "loss": {"l1": 1.0, "stft": 1.0, "mel": 1.0, "feature": 1.0, "asr": 1.0, "commit": 0.1, "match": 1e-3},
        "discriminator": {"fft_sizes": [78, 334], "channels": 2, "crop_sec": 0.3, "warmup_steps": 2},
        "asr": {"model": whisper_checkpoint, "language": "en", "context_sec": 1.26},
        "match": {"codes": str(folder / "coded")},
    }


ONLY_CHEAP = ["loss.feature=0", "loss.asr=0", "loss.mel=0", "loss.match=0"]


def rarely(steps):
    """A run as long as this, which validates and saves at its end."""
    return [f"train.{name}={steps}" for name in ("max_steps", "validate_every_steps", "save_every_steps")]


@pytest.fixture(scope="module")
def command(settings, tmp_path_factory):
    """command(output folder, overrides...) -> arguments of train_encoder.py"""
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return lambda output, *overrides: ["--config", str(path), f"output_dir={output}", *overrides]


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train_encoder.main(command(folder))
    return folder


def encoder_of(folder):
    return load_file(folder / "encoder.safetensors")


def metrics(folder, prefixes=("loss/", "grad/", "code/", "optimizer/", "validation/", "data/")):
    """(step, name -> value) of every row, without times."""
    rows = [
        (row["step"], {name: value for name, value in row.items() if name.startswith(prefixes)})
        for row in metric_rows(folder / "metrics.jsonl")
    ]
    return [(step, values) for step, values in rows if values]


def losses(folder):
    return {step: row for step, row in metrics(folder, ("loss/", "grad/")) if row}


def subprocess_environment():
    """As many threads as here: sums depend on it in their last bit."""
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}


# ---------------------------------------------------------------- an uninterrupted run


def test_saved_tensors_have_exactly_the_withheld_names(whole, settings):
    layout = withheld_layout(load_params(settings["checkpoint"]))
    for folder in (whole / "checkpoints" / "step_00000006", whole / "best"):
        tensors = encoder_of(folder)
        assert {name: tuple(t.shape) for name, t in tensors.items()} == layout
        assert all(t.isfinite().all() and t.dtype == torch.float32 for t in tensors.values())
        assert not (folder / "decoder.safetensors").exists()


def test_run_folder_holds_all_that_a_run_leaves(whole):
    def names(folder):
        return {path.name for path in (whole / folder).iterdir()}

    files = {"config.yaml", "environment.json", "metrics.jsonl"}
    assert names(".") == files | {"best", "checkpoints", "plots", "samples", "tensorboard"}
    assert names("checkpoints") == {"step_00000006"}  # keep_last is 1
    assert names("checkpoints/step_00000006") == {"encoder.safetensors", "run_state.pt"}
    assert names("samples") == {"step_00000003", "step_00000006", "clip_0_source.wav"}
    assert names("samples/step_00000003") == {"clip_0.png", "clip_0_reconstruction.wav"}
    assert {"losses.png", "codes.png", "validation.png", "levels.png"} <= names("plots")
    assert not list(whole.rglob("*.tmp"))


def test_every_loss_is_logged_at_every_step(whole):
    rows = [(step, row) for step, row in metrics(whole) if "loss/total" in row]
    assert [step for step, _ in rows] == [1, 2, 3, 4, 5, 6]
    for step, row in rows:
        names = {*vars(LossWeights()), "total", "discriminator"} - {"codes"}  # of which none are known
        names -= {"feature"} if step <= 2 else set()  # the discriminators' warm-up
        assert {name.removeprefix("loss/") for name in row if name.startswith("loss/")} == names
        codes = ("semantic_used", "semantic_perplexity", "extremes_share", "level_histogram", "embedding_norm")
        assert {"optimizer/learning_rate", *(f"code/{name}" for name in codes)} <= set(row)
        assert all(math.isfinite(value) for name, value in row.items() if isinstance(value, float))
        assert row["grad/encoder"] > 0 and row["grad/discriminator"] > 0
    assert [row["optimizer/learning_rate"] for _, row in rows] == pytest.approx(
        [4e-3 * f for f in (0.5, 1, 1, *(0.5 * (1 + math.cos(math.pi * k / 4)) for k in (1, 2, 3)))]
    )


def test_total_is_the_weighted_sum_with_decay(whole):
    for step, row in losses(whole).items():
        decay = 0.9999 ** (step - 1)
        weight = {"commit": 0.1, "match": 1e-3, "l1": decay, "stft": decay}
        total = sum(weight.get(name, 1.0) * row.get(f"loss/{name}", 0.0) for name in vars(LossWeights()))
        assert row["loss/total"] == pytest.approx(total, rel=1e-5)


def test_validation_is_the_averaged_encoder_with_hard_codes_on_fixed_clips(whole, settings, command):
    """What was saved last gives the last row of validation; the raw weights, which are trained on, do not."""
    config = load_config(EncoderConfig, *((arguments := command(whole))[1], arguments[2:]))
    codec = VoxtralCodec.from_checkpoint(settings["checkpoint"])
    clips = split_validation(find_clips(config.data)[0], config.data.validation)[1]
    batches = validation_batches(clips, config.data)
    row = [row for _, row in metrics(whole) if "validation/mel_distance" in row][-1]
    codec.load_encoder(encoder_of(whole / "checkpoints" / "step_00000006"))
    again = evaluate_codec(codec, batches)[0]
    assert {name: row[f"validation/{name}"] for name in again} == again
    state = torch.load(whole / "checkpoints" / "step_00000006" / "run_state.pt", weights_only=True)
    raw = {f"audio_tokenizer.{name.removeprefix('codec.')}": t for name, t in state["model"].items()}
    codec.load_encoder({name: raw[name] for name in codec.encoder_tensors()})
    assert evaluate_codec(codec, batches)[0]["mel_distance"] != again["mel_distance"]


def test_average_is_of_what_learns_over_a_tenth_of_the_steps_so_far(settings):
    codec = VoxtralCodec.from_checkpoint(settings["checkpoint"])
    choose_trainable(codec, ["encoder"])
    average, learned = WeightAverage(codec, decay=0.9), next(iter(codec.encoder_parameters()))
    frozen = codec.output_proj.conv.parametrizations.weight.original1
    expected, kept = None, frozen.clone()
    for n in range(120):
        with torch.no_grad():
            learned += torch.randn_like(learned)
            codec.quantizer.semantic_codebook.embedding_sum += 1
        decay = min(0.9, n / (n + 10))  # 0.9 from step 90 on
        expected = learned.clone() if expected is None else decay * expected + (1 - decay) * learned
        average.update(n)
        if n == 0:
            frozen.data += 1  # by nobody, in training: it is not looked at
    torch.testing.assert_close(next(iter(average.codec.encoder_parameters())), expected)
    assert torch.equal(average.codec.output_proj.conv.parametrizations.weight.original1, kept)
    assert torch.equal(average.codec.quantizer.semantic_codebook.embedding, codec.quantizer.semantic_codebook.embedding)


def test_best_is_the_lowest_mel_distance(whole):
    name = "validation/mel_distance"
    distances = {step: row[name] for step, row in metrics(whole) if name in row}
    assert sorted(distances) == [3, 6]
    best = json.loads((whole / "best" / "metrics.json").read_text())
    assert best["mel_distance"] == min(distances.values()) == distances[best["step"]]
    if best["step"] == 6:
        assert (whole / "best" / "encoder.safetensors").read_bytes() == (
            whole / "checkpoints" / "step_00000006" / "encoder.safetensors"
        ).read_bytes()


def test_training_changes_the_encoder_and_nothing_else(whole, settings):
    state = torch.load(whole / "checkpoints" / "step_00000006" / "run_state.pt", weights_only=True)
    torch.manual_seed(settings["seed"])
    start = VoxtralCodec.from_checkpoint(settings["checkpoint"]).state_dict()
    own = {f"codec.{name}" for name in start if name.startswith(("input_proj.", "encoder_blocks."))}
    projection = {"asr_projection.weight", "asr_projection.bias"}
    assert state["model"].keys() == own | projection  # the rest is in the checkpoint's folder
    assert not any(torch.equal(state["model"][name], start[name.removeprefix("codec.")]) for name in own)
    assert "averaged" not in state  # the averages are in encoder.safetensors


def test_time_between_the_steps_is_logged(whole):
    rows = list(metric_rows(whole / "metrics.jsonl"))
    for name in ("validate", "plot", "save"):
        assert {row["step"] for row in rows if row.get(f"time/{name}_sec", 0) > 0} == {3, 6}


def test_plots_of_a_long_run_cost_what_those_of_a_short_one_cost(command, tmp_path, monkeypatch):
    """Of ten times as many rows, the plots are given as many, and metrics.jsonl is not read again."""
    shown = []
    monkeypatch.setattr(history, "MAX_ROWS", 4)
    monkeypatch.setattr(history, "metric_rows", None)
    monkeypatch.setattr(
        train_encoder,
        "plot_run",
        lambda rows, folder: shown.append([row["step"] for row in rows if "loss/total" in row]),
    )
    train_encoder.main(command(tmp_path / "run", *ONLY_CHEAP, "train.max_steps=40", "train.validate_every_steps=20"))
    assert [len(steps) for steps in shown] == [4, 4] and shown[-1][0] == 1 and shown[-1][-1] == 40


# ---------------------------------------------------------------- interrupted runs

KILLED = """
import os, signal, sys
import train_encoder
from voxtral.run import Logger
add = Logger.add
def add_or_die(self, step, scalars):
    add(self, step, scalars)
    if step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
Logger.add = add_or_die
train_encoder.main(sys.argv[1:])
"""


def assert_same_run(folder, whole):
    assert metrics(folder) == metrics(whole)
    for name in ("checkpoints/step_00000006", "best"):
        file = Path(name) / "encoder.safetensors"
        assert (folder / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights_bit_for_bit(whole, command, tmp_path):
    """Killed with data workers at step 5, of which the metrics hold 4; goes on from the checkpoint after step 3."""
    folder = tmp_path / "run"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *command(folder, "data.num_workers=2")],
        cwd=ROOT,
        env=subprocess_environment(),
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_00000003"]
    assert [step for step, _ in metrics(folder)] == [1, 2, 3, 3, 4]
    train_encoder.main(command(folder, "resume=true", "data.num_workers=1"))
    assert_same_run(folder, whole)


def test_a_run_killed_before_its_first_checkpoint_starts_over(command, tmp_path, monkeypatch):
    folder, add = tmp_path / "run", Logger.add

    def add_or_fail(self, step, scalars):
        if step == 3:
            raise KeyboardInterrupt
        add(self, step, scalars)

    monkeypatch.setattr(Logger, "add", add_or_fail)
    with pytest.raises(KeyboardInterrupt):
        train_encoder.main(command(folder))
    monkeypatch.undo()
    assert [step for step, _ in metrics(folder)] == [1, 2]
    train_encoder.main(command(folder, "train.max_steps=1", "resume=true", *ONLY_CHEAP))
    assert [step for step, row in metrics(folder)] == [1, 1]


@pytest.mark.slow
def test_ctrl_c_saves_and_resuming_loses_nothing(whole, command, tmp_path, monkeypatch, capsys, stop_at):
    """Which a terminal sends to the loader processes, too."""
    folder = tmp_path / "run"
    stop_at(4, signal.SIGINT)
    stopped(train_encoder.main, command(folder, "data.num_workers=2"))
    monkeypatch.undo()
    assert "stopped after step 4; go on with resume=true" in capsys.readouterr().out
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_00000004"]
    train_encoder.main(command(folder, "resume=true"))
    assert_same_run(folder, whole)


@pytest.mark.slow
def test_a_stop_request_to_torchrun_saves(command, tmp_path):
    folder, few = tmp_path / "run", ["data.num_workers=1", "data.batch_size=1", "train.accumulation=2"]
    out = stopped_by_torchrun(
        tmp_path,
        "train_encoder.py",
        "SIGTERM",
        command(folder, *ONLY_CHEAP, *few, *rarely(100_000), "train.log_every_steps=100000"),
    )
    step = int(re.search(r"stopped after step (\d+)", out)[1])
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step_{step:08d}"]


# ---------------------------------------------------------------- processes


@pytest.mark.slow
def test_two_processes_give_the_loss_curve_of_one_with_twice_the_batch(command, settings, tmp_path):
    """The whole set of losses, two micro-batches a step: sums over processes differ by rounding only. So do the
    bad files, which either of them meets."""
    shutil.copytree(Path(settings["data"]["data_root"]) / "speech", tmp_path / "speech")
    for i in range(6):
        (tmp_path / "speech" / f"broken_{i}.wav").write_bytes(b"RIFF but no sound")
    few = ["train.max_steps=3", "train.validate_every_steps=9", "train.accumulation=2", f"data.data_root={tmp_path}"]
    few += ["discriminator.warmup_steps=1", "discriminator.learning_rate=5e-3"]
    arguments = command(tmp_path / "two", *few, "data.batch_size=1")
    two = torchrun("train_encoder.py", *arguments, options=["--standalone", "--nproc-per-node=2"])
    assert two.returncode == 0, two.stderr
    train_encoder.main(command(tmp_path / "one", *few))
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert sorted(one) == sorted(two) == [1, 2, 3]
    for step in one:
        assert one[step].keys() == two[step].keys()
        for name, value in one[step].items():
            tolerance = 2e-2 if name == "grad/discriminator" else 1e-4  # it is a small difference of large numbers
            assert two[step][name] == pytest.approx(value, rel=tolerance, abs=1e-6), (step, name)
    bad = [
        [row["data/bad_clips"] for _, row in metrics(tmp_path / name) if "data/bad_clips" in row]
        for name in ("one", "two")
    ]
    assert bad[0] == bad[1] and bad[0][-1] > 3
    listed = [sorted((tmp_path / name / "bad_files.txt").read_text().splitlines()) for name in ("one", "two")]
    assert listed[0] == listed[1] and len(listed[0]) > 1
    a, b = (encoder_of(tmp_path / name / "checkpoints" / "step_00000003") for name in ("one", "two"))
    assert all((a[name] - b[name]).norm() <= 1e-4 * a[name].norm() for name in a)


@pytest.mark.slow
def test_two_machines_need_not_share_the_run_folder(command, tmp_path):
    """One torchrun on each, started in a folder of its own: the first keeps the run, and tells the other where to go
    on."""
    few = [*ONLY_CHEAP, "data.batch_size=1", "train.n_samples=0", *rarely(9)]

    def start(port, *overrides):
        """Both machines -> what each of them printed to stderr, and its exit code."""
        nodes = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}"]
        arguments = [str(ROOT / "train_encoder.py"), *command("run", *few, *overrides)]
        with ThreadPoolExecutor(2) as pool:
            machines = [
                pool.submit(
                    torchrun,
                    *arguments,
                    options=[*nodes, f"--node-rank={rank}"],
                    cwd=folder,
                    env=subprocess_environment(),
                    timeout=300,
                )
                for rank, folder in enumerate(folders)
            ]
        return [(machine.result().stderr, machine.result().returncode) for machine in machines]

    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for overrides in (("train.max_steps=1",), ("train.max_steps=2", "resume=true")):
        for err, code in start(port, *overrides):
            assert code == 0, err
    assert not list(folders[1].iterdir())
    assert sorted(losses(folders[0] / "run")) == [1, 2]
    train_encoder.main(command(tmp_path / "alone", *few, "data.batch_size=2", "train.max_steps=1"))
    train_encoder.main(command(tmp_path / "alone", "train.max_steps=2", "resume=true"))
    for step in (1, 2):
        assert losses(folders[0] / "run")[step] == pytest.approx(losses(tmp_path / "alone")[step], rel=1e-4)


def test_accumulated_micro_batches_give_the_gradient_of_their_union(command, tmp_path, monkeypatch):
    """Without the random choices, which each micro-batch has of its own."""

    def pass_through(seed, batch_size, acoustic_dim, n_frames, *others):
        never = torch.full((batch_size,), 0.9)
        return QuantizationDraws(never, never, torch.zeros(batch_size, acoustic_dim, n_frames))

    monkeypatch.setattr(QuantizationDraws, "sample", pass_through)
    rows = []
    for batch_size, accumulation in ((4, 1), (2, 2)):
        folder = tmp_path / f"{accumulation}"
        batches = [f"train.accumulation={accumulation}", f"data.batch_size={batch_size}"]
        train_encoder.main(command(folder, *ONLY_CHEAP, *batches, "train.max_steps=1", "train.n_samples=0"))
        rows.append({name: losses(folder)[1][name] for name in ("grad/encoder", "loss/total", "loss/l1", "loss/stft")})
    assert rows[1] == pytest.approx(rows[0], rel=1e-4)


# ---------------------------------------------------------------- other ways to train


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_a_whole_codec_trains_by_the_same_script(command, settings, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(Path(settings["data"]["data_root"]) / "speech", tmp_path / "speech")
    for i in range(3):
        (tmp_path / "speech" / f"broken_{i}.wav").write_bytes(b"RIFF but no sound")
    few = ["train.max_steps=3", "train.ema_decay=0", "train.n_samples=0", "data.batch_size=6", "train.precision=bf16"]
    few += ["train.trainable=[encoder,codebook,decoder]", "loss.mel=1", "loss.stft=0", f"data.data_root={tmp_path}"]
    train_encoder.main(command(folder, *ONLY_CHEAP, *few))
    saved = folder / "checkpoints" / "step_00000003"
    state = torch.load(saved / "run_state.pt", weights_only=True)["model"]
    tensors = encoder_of(saved) | load_file(saved / "decoder.safetensors")
    assert tensors.keys() == {f"audio_tokenizer.{name.removeprefix('codec.')}" for name in state}
    for name, tensor in tensors.items():  # without averaging, what is saved is what is trained
        assert torch.equal(tensor, state[f"codec.{name.removeprefix('audio_tokenizer.')}"]), name
    start = VoxtralCodec.from_checkpoint(settings["checkpoint"]).state_dict()
    assert not any(torch.equal(t, state[f"codec.{name}"]) for name, t in start.items())
    listed = (folder / "bad_files.txt").read_text()
    assert "broken_" in listed and "is text, not audio" in listed
    assert "loss/stft" in losses(folder)[1]  # cheap losses of weight 0 are shown all the same


# ---------------------------------------------------------------- divergence, and other runs that go on


@pytest.fixture(scope="module")
def halfway_original(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("halfway") / "run"
    train_encoder.main(command(folder, *ONLY_CHEAP, "train.max_steps=2", "train.n_samples=0"))
    return folder


@pytest.fixture
def halfway(halfway_original, tmp_path):
    """A cheap run that has two steps and a checkpoint behind it."""
    return shutil.copytree(halfway_original, tmp_path / "run")


def test_a_worse_validation_leaves_best_alone(halfway, command):
    state_file = halfway / "checkpoints" / "step_00000002" / "run_state.pt"
    torch.save(torch.load(state_file, weights_only=True) | {"best": 0.5}, state_file)
    before = {path.name: path.read_bytes() for path in (halfway / "best").iterdir()}
    train_encoder.main(command(halfway, *ONLY_CHEAP, "resume=true", "train.max_steps=3", "train.n_samples=0"))
    assert {path.name: path.read_bytes() for path in (halfway / "best").iterdir()} == before
    state = torch.load(halfway / "checkpoints" / "step_00000003" / "run_state.pt", weights_only=True)
    assert (state["step"], state["best"]) == (3, 0.5)


def ended(arguments):
    """The sentence that Python prints when train_encoder.py ends with it, and with exit code 1."""
    with pytest.raises(SystemExit) as stop:
        train_encoder.main(arguments)
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    return stop.value.code


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(halfway, command, monkeypatch, broken):
    saved = halfway / "checkpoints" / "step_00000002"
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    monkeypatch.setattr(
        encoder_training, "commitment_loss", lambda semantic, *others: semantic.square().mean() * broken
    )
    message = ended(command(halfway, *ONLY_CHEAP, "resume=true", "train.max_steps=4"))
    assert message.startswith("training stopped: step 3: ") and str(saved) in message
    assert f"loss/commit {broken}" in message and "loss/l1 0." in message
    assert [path.name for path in (halfway / "checkpoints").iterdir()] == ["step_00000002"]
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert "NaN" not in (halfway / "metrics.jsonl").read_text()


def test_an_absurd_learning_rate_stops_the_run(halfway, command):
    message = ended(command(halfway, *ONLY_CHEAP, "resume=true", *rarely(100), "optimizer.learning_rate=1e6"))
    assert re.match(r"training stopped: step \d+: .*losses: loss/total", message)
    assert [path.name for path in (halfway / "checkpoints").iterdir()] == ["step_00000002"]


# ---------------------------------------------------------------- mistakes

DECODER = "audio_tokenizer.decoder_blocks.0.conv.parametrizations.weight.original1"


def test_mistakes_end_in_one_sentence_and_leave_nothing(command, settings, tmp_path, refused, monkeypatch):
    monkeypatch.delenv("VOXTRAL_CKPT", raising=False)
    checkpoint = Path(settings["checkpoint"])
    cut = shutil.copytree(checkpoint, tmp_path / "cut")
    (cut / "consolidated.safetensors").write_bytes((checkpoint / "consolidated.safetensors").read_bytes()[:-1000])
    misshapen = tampered(checkpoint, tmp_path / "misshapen", lambda tensors: tensors.update({DECODER: torch.zeros(2)}))
    incomplete = tampered(checkpoint, tmp_path / "incomplete", lambda tensors: tensors.pop(DECODER))
    (tmp_path / "empty").mkdir()
    mistakes = {
        "checkpoint=/nowhere": "/nowhere does not exist",
        "checkpoint=null": "VOXTRAL_CKPT",
        f"checkpoint={tmp_path / 'empty'}": "params.json is missing",
        f"checkpoint={cut}": "consolidated.safetensors is truncated",
        f"checkpoint={misshapen}": f"{DECODER} has shape [2]",
        f"checkpoint={incomplete}": f"lacks the tensor {DECODER}",
        "train.max_stps=3": "unknown key 'train.max_stps'; the nearest valid key is 'train.max_steps'",
        "data.sources.0.pth=x": "unknown key 'data.sources[0].pth'",
        "train.max_steps=soon": "train.max_steps",
        "data.max_sec=0.07": "data.max_sec is 0.07; a codec frame is 0.08 s",
        "data.sources=[]": "data.sources is empty",
        "data.sources.0.path=nothing": "no clip",
        "data.validation.clips=100": "data.validation holds out all 8 clips",
        "device=abacus": "device is abacus",
        "asr.model=/nowhere.pt": "asr.model is '/nowhere.pt'",
        "asr.context_sec=1.0": "asr.context_sec is 1.0",
        "match.codes=presets": "match.codes: no preset of",  # of 64 numbers a row: too few to tell 37 codes from
        "match.codes=/nowhere": "match.codes: /nowhere holds no codes",
    }
    for override, expected in mistakes.items():
        message = refused(train_encoder.main, command(tmp_path / "run", override))
        assert expected.lower() in message.lower(), message
        assert not (tmp_path / "run").exists()


def test_match_needs_nothing_but_the_release(command, tmp_path, capsys):
    write_random_checkpoint(tmp_path / "bare", small_params(backbone={"dim": 320}), {"alpha": 9})
    matching = [f"checkpoint={tmp_path / 'bare'}", "match.codes=presets", "loss.match=1e-3"]
    train_encoder.main(command(tmp_path / "run", *ONLY_CHEAP, *matching, "train.max_steps=1"))
    assert "loss.match holds codes to the statistics of 8 frames (presets)" in capsys.readouterr().out
    assert list(metric_rows(tmp_path / "run" / "metrics.jsonl"))[0]["loss/match"] > 0


def test_codes_are_learnt_from_clips_that_have_them(command, tmp_path, refused):
    arguments = command(tmp_path / "run", *ONLY_CHEAP, "loss.codes=1", "train.max_steps=1")
    assert "loss.codes needs clips whose codes are known" in refused(train_encoder.main, arguments)
    folder = tmp_path / "generated" / "alpha"
    folder.mkdir(parents=True)
    soundfile.write(folder / "0.flac", 0.1 * np.random.default_rng(0).standard_normal(10 * 1920), 24000)
    np.save(folder / "0.npy", np.full((37, 10), 3, np.int16))
    (tmp_path / "generated" / "manifest.jsonl").write_text(
        '{"path": "alpha/0.flac", "codes": "alpha/0.npy", "voice": "alpha", "text": "one", "seconds": 0.8}\n'
    )
    generated = f"{{kind: generated, path: {tmp_path / 'generated'}, weight: 50}}"
    sources = f"data.sources=[{generated}, {{kind: folder, path: speech}}]"
    train_encoder.main([*arguments, "data.validation.speakers=[speech]", sources])
    assert list(metric_rows(tmp_path / "run" / "metrics.jsonl"))[0]["loss/codes"] > 0.1


def test_damaged_codes_are_skipped_and_listed(command, settings, tmp_path):
    coded = shutil.copytree(settings["match"]["codes"], tmp_path / "coded")
    (coded / "1.npy").write_bytes(b"no codes")
    train_encoder.main(
        command(tmp_path / "run", *ONLY_CHEAP, "loss.match=1e-3", f"match.codes={coded}", "train.max_steps=1")
    )
    assert "1.npy\tunreadable codes" in (tmp_path / "run" / "bad_files.txt").read_text()


def test_an_output_folder_that_cannot_be_one(command, tmp_path, refused):
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        assert str(tmp_path / "file") in refused(train_encoder.main, command(output, *ONLY_CHEAP))
    assert (tmp_path / "file").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_holds_a_run_is_left_alone(halfway, command, settings, refused, tmp_path):
    def said(*overrides):
        return refused(train_encoder.main, command(halfway, *overrides))

    before = {path: path.read_bytes() for path in halfway.rglob("*") if path.is_file()}
    assert "already holds a run" in said(*ONLY_CHEAP)
    assert said("resume=true", "loss.feature=1").startswith("error: loss.feature: the run in")
    assert "processes: the run in" in said("resume=true", "data.batch_size=3")
    other = tampered(settings["checkpoint"], tmp_path / "other", lambda tensors: tensors[DECODER].add_(1))
    assert said("resume=true", f"checkpoint={other}").startswith("error: checkpoint: the run in")
    (halfway / "checkpoints" / "step_00000002" / "run_state.pt").write_bytes(b"cut")
    message = said("resume=true")
    assert "step_00000002 is damaged (run_state.pt" in message and "no older checkpoint" in message
    untouched = {path for path in before if path.name not in ("config.yaml", "environment.json", "run_state.pt")}
    assert all(path.read_bytes() == before[path] for path in untouched)


@pytest.mark.slow
def test_with_a_teacher_cache_whisper_is_asked_once(command, tmp_path, monkeypatch, refused):
    """The first run fills the cache; the second one, which never asks, has the same losses."""

    def losses(name):
        train_encoder.main(command(tmp_path / name, cached, "data.batch_size=8"))
        return [values for _, values in metrics(tmp_path / name, ("loss/",))]

    cached = f"asr.teacher_cache={tmp_path}/kept"
    first = losses("first")
    forward, asked = train_encoder.WhisperTeacher.forward, []
    monkeypatch.setattr(train_encoder.WhisperTeacher, "forward", lambda *args: asked.append(1) or forward(*args))
    for a, b in zip(first, losses("second"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert not asked and any(row.get("loss/asr", 0) > 0 for row in first)
    arguments = command(tmp_path / "third", cached, "data.speed=[0.9,1.1]")
    assert "asr.teacher_cache: what" in refused(train_encoder.main, arguments)


def test_a_mistake_in_a_real_process_has_no_traceback(command, tmp_path):
    arguments = command(tmp_path / "run", "checkpoint=/nowhere")
    result = subprocess.run([sys.executable, "train_encoder.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == "error: checkpoint folder /nowhere does not exist: set `checkpoint` (or VOXTRAL_CKPT).\n"


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs and compiled kernels need a GPU")


@pytest.mark.slow
@pytest.mark.parametrize(
    "device, accumulation, recorded, compiled",
    [
        ("cpu", 2, True, True),  # nothing is, there
        pytest.param("cuda", 2, True, False, marks=needs_gpu),
        pytest.param("cuda", 2, False, True, marks=needs_gpu),
        pytest.param("cuda", 2, True, True, marks=needs_gpu),
        pytest.param("cuda", 1, True, True, marks=needs_gpu),  # graphs lend their gradients
    ],
)
def test_recorded_and_compiled_kernels_give_the_same_losses(
    command, settings, tmp_path, monkeypatch, device, accumulation, recorded, compiled
):
    """Everything but the kernels and their launch is equal: data, draws, weights. One of these fourteen frames whose
    semantic code rounds the other way moves `match` by 5 to 15 %, so that is held to what the run's own codes make it
    on the CPU."""

    class Listening(CodeMatching):
        def __call__(self, output, n_frames):
            heard.append((output.codes.cpu(), n_frames.cpu()))
            return super().__call__(output, n_frames)

    monkeypatch.setattr(train_encoder, "CodeMatching", Listening)
    codec = VoxtralCodec.from_checkpoint(settings["checkpoint"])
    known = known_codes(settings["match"]["codes"], codec.params)[0]
    rows, codes = [], []
    for name, graphs, compiles in (("plain", False, False), ("changed", recorded, compiled)):
        heard = []
        path = tmp_path / name
        changes = [f"train.cuda_graphs={graphs}", f"train.compile={compiles}", f"train.accumulation={accumulation}"]
        train_encoder.main(command(path, f"device={device}", *changes))
        rows.append([row for row in metric_rows(path / "metrics.jsonl") if "loss/total" in row])
        codes.append(torch.stack([seen for seen, _ in heard]))
        matching = CodeMatching(known, codec, "cpu")
        nothing = torch.zeros(2, codec.params.latent_dim, codes[-1].shape[-1])
        expected = [matching(CodecOutput(None, nothing, seen, None), n_frames).item() for seen, n_frames in heard]
        assert [row["loss/match"] for row in rows[-1]] == pytest.approx(
            [sum(step) / accumulation for step in zip(*[iter(expected)] * accumulation)], rel=1e-2
        )
    assert (codes[0] == codes[1]).float().mean() > 0.99
    for a, b in zip(*rows, strict=True):
        names = [name for name in a if name.startswith("loss/") and name != "loss/match"]
        assert {name: a[name] for name in names} == pytest.approx(
            {name: b[name] for name in names}, rel=1e-2, abs=1e-4
        )  # commit is so small
        assert a["grad/encoder"] == pytest.approx(b["grad/encoder"], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_recorded_and_compiled_losses_have_the_same_gradients(device, monkeypatch):
    """Three batches. On the CPU what torch.compile makes of them runs operator by operator, and nothing is recorded."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    lengths = torch.tensor([9600, 5000], device=device)
    discriminators = Discriminators(DiscriminatorConfig(fft_sizes=[78, 333], channels=8))
    sound = SoundLosses(LossWeights(l1=1.0, stft=1.0, mel=0.0), [512, 64], 24_000)
    cases = [
        (sound, lambda decoded, target: (decoded, target, lengths)),
        (AdversarialLosses(discriminators), lambda decoded, target: (target, decoded, lengths / 9600)),
    ]
    for module, arguments in cases:
        plain, changed = module.to(device), deepcopy(module).to(device)
        backend = "inductor" if device == "cuda" else "aot_eager"
        changed.forward = torch.compile(changed.forward, dynamic=False, fullgraph=True, backend=backend)
        if device == "cuda":
            example = torch.zeros(2, 1, 9600, device=device)
            changed = torch.cuda.make_graphed_callables(changed, arguments(example.clone().requires_grad_(), example))
        for _ in range(3):
            decoded, target = (scale * torch.randn(2, 1, 9600, device=device) for scale in (0.1, 0.3))
            results = []
            for one in (plain, changed):
                leaf = decoded.clone().requires_grad_()
                outputs = tree_leaves(one(*arguments(leaf, target)))
                total = sum(output for output in outputs if output.requires_grad)
                results.append([*outputs, *torch.autograd.grad(total, [leaf, *one.parameters()])])
            for a, b in zip(*results, strict=True):
                assert (a - b).norm() <= 1e-2 * a.norm() + 1e-5
            assert all(gradients.norm() > 0 for gradients in results[1][len(outputs) : len(outputs) + 2])
