"""benchmarks/train_step.py on a tiny random checkpoint: it times train_encoder.py's own step, and every part of it."""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import yaml
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import train_step
import train_step_report
import train_step_timing as timing

import train_encoder
from voxtral.config import EncoderConfig, load_config
from voxtral.history import metric_rows
from voxtral.processes import Process
from voxtral.standin import small_params, write_random_checkpoint

CPU = Process(0, 1, torch.device("cpu"))
CHEAP = ["loss.feature=0", "loss.asr=0", "loss.mel=0"]
SMALL_CODEC = dict(dim=32, hidden_dim=48, head_dim=8, semantic_codebook_size=40)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory, whisper_checkpoint):
    """All losses, two clips of half a second a step."""
    folder = tmp_path_factory.mktemp("benchmark")
    write_random_checkpoint(folder / "checkpoint", small_params(codec=SMALL_CODEC), {}, n_text_tokens=300)
    (folder / "speech").mkdir()
    for path in sorted((ROOT / "assets" / "speech").glob("*.opus"))[:5]:
        shutil.copy(path, folder / "speech")
    np.save(folder / "known.npy", np.random.default_rng(0).integers(8, 13, (37, 40)).astype(np.int16))
    soundfile.write(folder / "known.flac", 0.1 * np.random.default_rng(0).standard_normal(40 * 1920), 24000)
    (folder / "manifest.jsonl").write_text(
        '{"path": "known.flac", "codes": "known.npy", "voice": "a", "text": "one", "seconds": 3.2}\n'
    )
    path = folder / "config.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "checkpoint": str(folder / "checkpoint"),
                "device": "cpu",
                "data": {
                    "data_root": str(folder),
                    "sources": [{"kind": "folder", "path": "speech"}, {"kind": "generated", "path": "."}],
                    "batch_size": 2,
                    "max_sec": 0.5,
                    "num_workers": 0,
                    "validation": {"clips": 1},
                },
                "train": {"precision": "fp32", "stft_fft_sizes": [256, 64], "log_every_steps": 1},
                "loss": {"mel": 1.0, "feature": 1.0, "asr": 1.0, "match": 0.1, "codes": 1.0},
                "match": {"codes": str(folder)},
                "discriminator": {"fft_sizes": [78, 334], "channels": 2, "crop_sec": 0.3},
                "asr": {"model": whisper_checkpoint, "language": "en", "context_sec": 1.26},
            }
        )
    )
    return path


@pytest.fixture
def benchmark(config_file, tmp_path, monkeypatch):
    """benchmark(arguments...) -> train_step.json. Nothing may stay behind: files, processes, signal handlers."""

    def run(*arguments):
        (tmp_path / "temporary").mkdir()
        monkeypatch.setattr(timing, "N_PROFILED", 1)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        train_step.main(["--config", str(config_file), "--warm-up", "1", "--output", str(tmp_path / "out"), *arguments])
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
        assert not multiprocessing.active_children() and not os.listdir(tmp_path / "temporary")
        return json.loads((tmp_path / "out" / "train_step.json").read_text())

    return run


# ---------------------------------------------------------------- it is the training's own step


def losses(folder):
    return [
        {name: value for name, value in row.items() if name.startswith(("loss/", "grad/"))}
        for row in metric_rows(folder / "metrics.jsonl")
        if "loss/total" in row
    ]


def test_the_steps_are_those_of_train_encoder(config_file, tmp_path, monkeypatch):
    """Bit for bit the losses and gradients of the same training by train_encoder.py."""
    monkeypatch.setattr(train_encoder, "plot_run", lambda *arguments: None)
    overrides = [*train_step.OWN_DEFAULTS, "train.max_steps=3", "train.n_samples=0"]
    whole = tmp_path / "whole"
    train_encoder.main(["--config", str(config_file), *overrides, f"output_dir={whole}"])
    expected = losses(whole)
    assert len(expected) == 3 and "loss/feature" in expected[0]

    config = load_config(EncoderConfig, config_file, overrides)
    with (tmp_path / "log").open("w") as log:
        training = timing.Training(config, CPU, log)
        training.start(1)
        seconds = training.advance(1)
        assert losses(Path(training.folder.name)) == expected[:2]
        training.close()
    assert len(seconds) == 1 and 0 < training.waited_sec - training.waited_before < seconds[0]


def test_every_part_of_a_step_is_found(config_file, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "N_PROFILED", 1)
    config = load_config(EncoderConfig, config_file, train_step.OWN_DEFAULTS)
    with (tmp_path / "log").open("w") as log:
        (result,) = timing.measure([config], CPU, log, warm_up=1, n_steps=1)
        assert timing.count_flop(config, CPU, log) > 0
    parts = result["parts_ms"]
    assert list(parts) == [*timing.PARTS, timing.OPTIMIZERS, timing.REST]
    assert all(both["forward"] > 0 for both in parts.values())
    learning = {"codec", "discriminators", "losses of the sound", "losses of the codes", timing.REST}
    assert {part for part, both in parts.items() if both["backward"]} == learning
    operators = [ms for _, ms, _ in result["kernels"]]
    assert operators == sorted(operators, reverse=True)
    assert {"aten::mm", "aten::_fft_r2c"} <= {name for name, _, _ in result["kernels"]}


def test_kinds_of_kernels():
    kinds = {
        "triton_poi_fused_conv_3": "fused (torch.compile)",
        "nvjet_hsh_128x256": "matrix products",
        "void vector_fft<2048>": "FFT",
        "sm90_xmma_fprop_implicit_gemm": "convolutions",
        "Memcpy DtoD": "copies",
        "something": "others",
    }
    assert {name: train_step_report.kind_of(name) for name in kinds} == kinds


# ---------------------------------------------------------------- attribution and counting


@pytest.fixture
def one_thread():
    """Threads that wait for each other on a busy machine take longer than what they compute."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def test_backward_belongs_to_the_part_that_made_the_graph(one_thread):
    x, few, many = torch.randn(300, 300), *(torch.randn(300, n, requires_grad=True) for n in (8, 3000))

    def product(part, weight):
        with record_function(part):
            return (x @ weight).sum()

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        with record_function(timing.REST):
            with torch.no_grad():
                product("Whisper", many)
            (product("codec", few) + product("discriminators", many)).backward()
    times = timing.time_of_parts(profiler.events(), on_gpu=False)
    assert list(times) == ["Whisper", "codec", "discriminators", timing.REST]
    assert times["discriminators"]["backward"] > 2 * times["codec"]["backward"] > 0
    assert times["Whisper"]["forward"] > 0 and times["Whisper"]["backward"] == 0
    root = next(event for event in profiler.events() if event.name == timing.REST)
    assert sum(sum(both.values()) for both in times.values()) == pytest.approx(root.cpu_time_total, rel=1e-3)


def test_kernels_belong_to_the_part_that_launched_them_on_any_thread():
    """The events of a GPU, made up: autograd has a thread of its own, and a range has a double among the kernels."""

    def event(name, parent=None, kernels=(), thread=1, number=-1, start=0):
        return SimpleNamespace(
            name=name,
            cpu_parent=parent,
            thread=thread,
            sequence_nr=number,
            is_async=False,
            device_type=torch.autograd.DeviceType.CPU,
            time_range=SimpleNamespace(start=start),
            kernels=[SimpleNamespace(name=kernel, duration=us) for kernel, us in kernels],
        )

    step = event("the rest", kernels=[("the rest", 1000)])
    decoder = event("discriminators", step, [("discriminators", 500)], start=1)
    events = [
        step,
        decoder,
        event("aten::mm", decoder, [("gemm", 30), ("split", 4)], number=7, start=2),
        event("aten::add", step, [("add", 2)], number=8, start=3),
        event("Optimizer.step#AdamW.step", step, [("adam", 5)], start=9),
    ]
    # Whisper's graph has kernels that belong to no operator: the range's double counts, and nothing in it.
    whisper = event("Whisper", step, [("Whisper", 90)], start=10)
    events += [whisper, event("aten::copy_", whisper, [("copy", 1)], start=11)]
    for number, us in ((8, 3), (7, 60)):
        node = event("autograd::engine::evaluate_function: X", thread=2, number=number, start=4)
        events += [node, event("aten::mm", node, [("gemm", us)], thread=2, start=5)]
    assert timing.time_of_parts(events, on_gpu=True) == {
        "Whisper": {"forward": 90, "backward": 0},
        "discriminators": {"forward": 34, "backward": 60},
        "optimizers": {"forward": 5, "backward": 0},
        "the rest": {"forward": 2, "backward": 3},
    }


def test_distances_and_attention_are_counted():
    with FlopCounterMode(display=False, custom_mapping=timing.MORE_FLOPS) as counter:
        torch.cdist(torch.randn(1, 50, 7), torch.randn(1, 30, 7))
        assert counter.get_total_flops() == 2 * 50 * 30 * 7
        q, k, v = torch.randn(3, 2, 5, 16), torch.randn(3, 2, 11, 16), torch.randn(3, 2, 11, 16)
        torch.nn.functional.scaled_dot_product_attention(q, k, v)
        assert counter.get_total_flops() == 2 * 50 * 30 * 7 + 2 * (2 * 3 * 2 * 5 * 11 * 16)


# ---------------------------------------------------------------- the command


def test_one_configuration(benchmark, capsys):
    results = benchmark("--steps", "3", "--ceiling-tflops", "2", *CHEAP, "train.log_every_steps=2")
    (result,) = results["configurations"].values()
    seconds = [ms / 1000 for ms in result["steps_ms"]]
    assert len(seconds) == 3 and result["audio_sec_per_step"] == 1.0
    assert result["step_ms"]["p10"] <= result["step_ms"]["median"] <= result["step_ms"]["p90"]
    assert result["audio_sec_per_sec"] == pytest.approx(1000 / result["step_ms"]["median"])
    assert result["audio_sec_per_sec_overall"] == pytest.approx(3 / sum(seconds), rel=1e-2)
    assert 0 < result["data_wait_ms"] < 1000 * sum(seconds) / 3 and result["memory_gib"]["resident"] > 0
    assert result["tflop_per_sec"] == pytest.approx(result["flop_per_step"] / 1e9 / result["step_ms"]["median"])
    assert result["ceiling_share"] == pytest.approx(result["tflop_per_sec"] / 2)
    printed = capsys.readouterr().out
    assert "| codec | " in printed and "| discriminators" not in printed and "| aten::" in printed
    assert "train_encoder.py: 5 training clips, 1 validation clips" in printed


def test_two_configurations_take_turns(benchmark, monkeypatch):
    turns, advance = [], timing.Training.advance

    def watched(self, n_steps):
        turns.append((self.audio_sec, n_steps))
        return advance(self, n_steps)

    monkeypatch.setattr(timing.Training, "advance", watched)
    monkeypatch.setattr(timing, "profiled", lambda training: {"parts_ms": {}, "kernels": []})
    monkeypatch.setattr(train_step, "count_flop", lambda config, *others: 10**6 if config.loss.stft else 10**5)
    results = benchmark("--steps", "7", *CHEAP, "--compare", "data.batch_size=1", "loss.stft=0")
    warm_up, measured = turns[:4], turns[4:]
    assert warm_up == [(1.0, 1), (1.0, 0), (0.5, 1), (0.5, 0)]
    assert [audio for audio, _ in measured] == [1.0, 0.5] * 5
    assert [sum(n for audio, n in measured if audio == which) for which in (1.0, 0.5)] == [7, 7]
    assert len(results["speed_ratios"]) == 5
    one, two = results["configurations"].values()
    assert len(one["steps_ms"]) == len(two["steps_ms"]) == 7 and "memory_gib" not in one
    assert (one["flop_per_step"], two["flop_per_step"]) == (10**6, 10**5)


def test_growth_has_a_row_and_a_point_for_each_value(benchmark, tmp_path):
    results = benchmark("--steps", "1", *CHEAP, "--growth", "batch=2,1")
    assert [result["batch"] for result in results["growth"]] == [1, 2]
    assert [result["audio_sec_per_step"] for result in results["growth"]] == [0.5, 1.0]
    assert (tmp_path / "out" / "growth_batch.png").stat().st_size > 5000


def test_longer_clips_get_the_context_that_whisper_needs(config_file):
    axis, configs = train_step.grown("seconds=16,0.5,1", load_config(EncoderConfig, config_file, []))
    assert axis == "seconds"
    assert {value: (one.data.max_sec, one.asr.context_sec) for value, one in configs.items()} == {
        0.5: (0.5, 1.26),
        1.0: (1.0, 2.5),
        16.0: (16.0, 30.0),
    }


def test_the_loader_alone(benchmark, capsys):
    rows = benchmark("--steps", "3", "--loader-only", "--workers", "0,1", "checkpoint=null")["loader"]
    assert [(row["num_workers"], row["batches"]) for row in rows] == [(0, 3), (1, 10)]
    for row in rows:
        assert row["audio_sec_per_sec"] == pytest.approx(1000 * 2 * 0.5 / row["batch_ms"])
        assert row["sound_share"] == 1.0 and sum(row["native_rates_hz"].values()) == 2 * row["batches"]
    assert "audio s/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--growth", "batch=many"], "--growth batch=many"),
        (["--growth", "width=3"], "--growth width=3"),
        (["data.batchsize=3"], "nearest valid key is 'data.batch_size'"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--compare", "nowhere.yaml"], "config nowhere.yaml does not exist"),
    ],
)
def test_mistakes_end_in_one_sentence(config_file, tmp_path, capsys, arguments, expected):
    with pytest.raises(SystemExit) as stop:
        train_step.main(["--config", str(config_file), "--output", str(tmp_path), *arguments])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and expected in message and message.count("\n") == 1
