"""Injecting an encoder and a LoRA: what comes out, what stays, what is refused, what a kill or a full disk leaves."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SPEECH, command_line, relative_error, write_encoder
from peft import LoraConfig, get_peft_model

import inject_encoder
from inject_encoder import changed_shares
from voxtral.backbone import Backbone
from voxtral.checkpoint import Checkpoint, SafetensorsFile, save_tensors
from voxtral.codec import VoxtralCodec
from voxtral.config import EncoderConfig, dump_config
from voxtral.inject import BACKUP, INDEX, MARKER, RECORD, eject, inject
from voxtral.json_files import remove_json, set_json
from voxtral.layout import released_layout, withheld_layout
from voxtral.model_card import CARD
from voxtral.params import CheckpointError, load_params
from voxtral.reference import prepare_reference
from voxtral.sources import DataConfig, SourceConfig
from voxtral.standin import small_params, write_random_checkpoint

CLIP = str(SPEECH / "k_af_heart_0.opus")
WEIGHTS = "consolidated.safetensors"


def digest(path):
    return sha256(Path(path).read_bytes()).hexdigest()


def snapshot(folder):
    """Every file below `folder`, hidden ones too -> its hash."""
    return {str(path.relative_to(folder)): digest(path) for path in Path(folder).rglob("*") if path.is_file()}


def write_adapter(path, folder, seed=0, **options):
    """A peft adapter as phase 2 saves it, all of it random. Returns the adapted backbone, fp32."""
    torch.manual_seed(seed)
    backbone = Backbone.from_checkpoint(folder, dtype=torch.float32)
    options = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], **options}
    adapted = get_peft_model(backbone.model, LoraConfig(r=4, lora_alpha=12, init_lora_weights=False, **options))
    adapted.save_pretrained(path)
    return backbone


def shard(folder, n_shards=3):
    """Splits consolidated.safetensors into shards with an index."""
    checkpoint = Checkpoint(folder)
    names = list(checkpoint.shapes)
    size = -(-len(names) // n_shards)
    weight_map = {}
    for i in range(n_shards):
        part = names[i * size : (i + 1) * size]
        file = f"consolidated-{i + 1:05d}-of-{n_shards:05d}.safetensors"
        save_tensors(folder / file, checkpoint.read(part))
        weight_map |= {name: file for name in part}
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine") / "checkpoint"
    write_random_checkpoint(folder, small_params(), {"alpha": 20, "beta": 30})
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "checkpoint")


@pytest.fixture
def encoder(pristine, tmp_path):
    return write_encoder(tmp_path / "encoder.safetensors", pristine, seed=1)


# ---------------------------------------------------------------- what comes out


def test_every_other_byte_order_and_metadata_stay(folder, encoder, tmp_path):
    before = snapshot(folder)
    output = inject(folder, encoder, output=tmp_path / "out")
    assert snapshot(folder) == before
    old, new = SafetensorsFile(folder / WEIGHTS), SafetensorsFile(output / WEIGHTS)
    assert list(new.entries) == [*old.entries, *withheld_layout(load_params(folder))]
    assert new.metadata == {"format": "pt"}
    data = old.path.read_bytes()[old.data_start :]
    assert new.path.read_bytes()[new.data_start :].startswith(data)
    for name, entry in new.entries.items():
        if name in old.entries:
            assert entry == old.entries[name]
        else:
            wanted = SafetensorsFile(encoder).read([name])[name].bfloat16()
            assert entry["dtype"] == "BF16" and torch.equal(new.read([name])[name], wanted)
    unchanged = {name: value for name, value in before.items() if name not in (WEIGHTS, "params.json")}
    assert unchanged.items() <= snapshot(output).items()
    assert os.stat(output / "tekken.json").st_ino == os.stat(folder / "tekken.json").st_ino  # linked, not copied


def test_the_marker_is_the_only_change_to_params_json(folder, encoder, tmp_path):
    output = inject(folder, encoder, output=tmp_path / "out")
    old, new = (folder / "params.json").read_text(), (output / "params.json").read_text()
    assert json.loads(new)[MARKER] is True and MARKER.startswith("encoder_blocks.")
    assert list(json.loads(new))[:-1] == list(json.loads(old))
    added = [line for line in new.splitlines() if line not in old.splitlines()]
    assert added == [f'  "{MARKER}": true'] or added == ["  },", f'  "{MARKER}": true']


def test_the_codec_loads_and_encodes_with_it(folder, encoder, tmp_path):
    codec = VoxtralCodec.from_checkpoint(inject(folder, encoder, output=tmp_path / "out"))
    assert codec.has_encoder
    source = VoxtralCodec.from_checkpoint(folder)
    tensors = SafetensorsFile(encoder).read(codec.encoder_tensors())
    source.load_encoder({name: tensor.bfloat16().float() for name, tensor in tensors.items()})
    waveform = torch.randn(1, 1, 9000, generator=torch.Generator().manual_seed(0)) * 0.1
    with torch.no_grad():
        assert torch.equal(codec.encode(waveform), source.encode(waveform))


def test_twice_replaces(folder, encoder, tmp_path):
    second = write_encoder(tmp_path / "second.safetensors", folder, seed=2)
    once = snapshot(inject(folder, second, output=tmp_path / "once"))
    inject(folder, encoder, output=tmp_path / "twice")
    assert snapshot(inject(folder, second, output=tmp_path / "twice")) == once
    assert snapshot(inject(tmp_path / "twice", second, output=tmp_path / "thrice")) == once  # from an injected one
    inject(folder, encoder)
    inject(folder, second)
    assert digest(folder / WEIGHTS) == once[WEIGHTS] and (folder / "params.json").read_text().count(MARKER) == 1
    assert not list(tmp_path.glob(".*")) and not list(folder.glob(".*.tmp"))


def test_eject_gives_back_the_original_bytes(folder, encoder, pristine):
    inject(folder, encoder)
    assert digest(folder / WEIGHTS) != digest(pristine / WEIGHTS) and VoxtralCodec.from_checkpoint(folder).has_encoder
    eject(folder)
    assert snapshot(folder) == snapshot(pristine)


def test_eject_restores_an_odd_header_and_an_odd_params_json(folder, encoder):
    """Files that no json.dumps would write so: the header's keys out of order and padded, params.json by hand."""
    data = (folder / WEIGHTS).read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:size])
    text = json.dumps(dict(reversed(header.items())), indent=1).encode()
    text += b" " * (64 - len(text) % 8)
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[size:])
    params = (folder / "params.json").read_text().replace("1e-05", "1.0E-5").replace("\n", "\r\n") + " \n\n"
    (folder / "params.json").write_bytes(params.encode())
    before = snapshot(folder)
    inject(folder, encoder)
    assert b'\r\n  "encoder_blocks.injected": true' in (folder / "params.json").read_bytes()
    assert b"1.0E-5" in (folder / "params.json").read_bytes()
    eject(folder)
    assert snapshot(folder) == before


def test_voices_registered_after_injecting_survive_eject(folder, encoder):
    inject(folder, encoder)
    path = folder / "params.json"
    path.write_text(set_json(path.read_text(), ["multimodal", "audio_tokenizer_args", "voice", "anna"], 2))
    eject(folder)
    assert load_params(folder).codec.voice == {"alpha": 0, "beta": 1, "anna": 2} and MARKER not in path.read_text()


def test_shards_with_an_index(folder, encoder, tmp_path):
    shard(folder)
    before = snapshot(folder)
    output = inject(folder, encoder, output=tmp_path / "out")
    first, last = "consolidated-00001-of-00003.safetensors", "consolidated-00003-of-00003.safetensors"
    assert os.stat(output / first).st_ino == os.stat(folder / first).st_ino
    index = json.loads((output / INDEX).read_text())
    checkpoint = Checkpoint(output)
    assert index["weight_map"] == {name: file.path.name for name, file in checkpoint.file_of.items()}
    assert {index["weight_map"][name] for name in checkpoint.encoder_names} == {last}
    assert index["metadata"]["total_size"] == sum(f.path.stat().st_size - f.data_start for f in checkpoint.files)
    assert VoxtralCodec.from_checkpoint(output).has_encoder and snapshot(folder) == before
    inject(folder, encoder)
    assert digest(folder / last) == digest(output / last) and digest(folder / INDEX) == digest(output / INDEX)
    eject(folder)
    assert snapshot(folder) == before


def test_files_of_a_download_cache_are_links(folder, encoder, tmp_path):
    (tmp_path / "blobs").mkdir()
    for name in (WEIGHTS, "params.json", "tekken.json"):
        os.replace(folder / name, tmp_path / "blobs" / name)
        (folder / name).symlink_to(tmp_path / "blobs" / name)
    blobs = snapshot(tmp_path / "blobs")
    output = inject(folder, encoder, output=tmp_path / "out")
    assert not (output / "tekken.json").is_symlink() and VoxtralCodec.from_checkpoint(output).has_encoder
    inject(folder, encoder)
    assert snapshot(tmp_path / "blobs") == blobs


# ---------------------------------------------------------------- LoRA


def attention_names(folder):
    layout = released_layout(load_params(folder))
    return [name for name in layout if name.startswith("layers.") and ".attention.w" in name]


@torch.no_grad()
def test_backbone_after_injection_is_backbone_with_adapter(pristine, tmp_path):
    """In an fp32 checkpoint, so that nothing hides behind rounding."""
    folder = tmp_path / "fp32"
    shutil.copytree(pristine, folder)
    checkpoint = Checkpoint(folder)
    save_tensors(folder / WEIGHTS, {name: t.float() for name, t in checkpoint.read(checkpoint.shapes).items()})
    adapted = write_adapter(tmp_path / "adapter", folder)
    encoder = write_encoder(tmp_path / "encoder.safetensors", folder)
    output = inject(folder, encoder, tmp_path / "adapter", tmp_path / "out")
    x = torch.randn(2, 17, 64, generator=torch.Generator().manual_seed(0)) * 0.1
    plain, merged = (Backbone.from_checkpoint(path, dtype=torch.float32) for path in (folder, output))
    assert relative_error(merged(x), adapted(x)) < 1e-5
    assert relative_error(plain(x), adapted(x)) > 1e-2


def test_lora_is_summed_in_fp32_rounded_once_and_changes_nothing_else(folder, encoder, tmp_path):
    adapted = write_adapter(tmp_path / "adapter", folder)
    output = inject(folder, encoder, tmp_path / "adapter", tmp_path / "out")
    old, new = Checkpoint(folder), Checkpoint(output)
    for name in old.shapes:
        same = torch.equal(old.read([name])[name], new.read([name])[name])
        assert same == (name not in attention_names(folder)), name
    layer = adapted.model.layers[1].self_attn.v_proj  # no rows to reorder
    delta = 3 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    name = "layers.1.attention.wv.weight"
    assert torch.equal(new.read([name])[name], (old.read([name])[name].float() + delta.detach()).bfloat16())
    assert list(new.files[0].entries)[: len(old.shapes)] == list(old.shapes)


def test_lora_in_place_is_never_merged_twice_and_comes_out_again(folder, encoder, pristine, tmp_path):
    write_adapter(tmp_path / "all", folder)
    write_adapter(tmp_path / "some", folder, seed=1, target_modules=["q_proj", "o_proj"])
    wanted = {
        name: digest(inject(pristine, encoder, tmp_path / name, tmp_path / "out") / WEIGHTS) for name in ("all", "some")
    }
    wanted[None] = digest(inject(pristine, encoder, None, tmp_path / "out") / WEIGHTS)
    for name in (None, "some", "all", "all", None, "some"):
        inject(folder, encoder, tmp_path / name if name else None)
        assert digest(folder / WEIGHTS) == wanted[name], name
    assert digest(inject(folder, encoder, tmp_path / "all", tmp_path / "from") / WEIGHTS) == wanted["all"]
    eject(folder)
    assert snapshot(folder) == snapshot(pristine)


NO_PLAIN_LORA = {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 2}}
NO_PLAIN_LORA |= {"bias": "all", "modules_to_save": ["norm"], "init_lora_weights": "pissa", "peft_type": "IA3", "r": 5}


@pytest.mark.parametrize("key, value", [*NO_PLAIN_LORA.items(), ("new_idea", True)])
def test_adapters_that_are_no_plain_lora_are_refused(folder, encoder, tmp_path, key, value):
    write_adapter(tmp_path / "adapter", folder)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(CheckpointError, match=key if key not in ("r", "peft_type", "init_lora_weights") else "adapter"):
        inject(folder, encoder, tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def change_adapter(change):
    def apply(path):
        file = SafetensorsFile(path / "adapter_model.safetensors")
        tensors = file.read()
        change(tensors)
        save_tensors(file.path, tensors)

    return apply


A = "base_model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "change,message",
    [
        (change_adapter(lambda tensors: tensors.pop(A)), f"lacks the tensor {A}"),
        (change_adapter(lambda tensors: tensors.update({A: torch.ones(4, 65)})), "shape"),
        (change_adapter(lambda tensors: tensors.update({A: tensors[A] * float("nan")})), "finite"),
        (
            change_adapter(lambda tensors: tensors.update({A.replace("q_proj", "up_proj"): torch.ones(4, 64)})),
            "unexpected",
        ),
        (change_adapter(lambda tensors: tensors.clear()), "holds no LoRA"),
        (lambda path: (path / "adapter_model.safetensors").unlink(), "missing"),
        (lambda path: (path / "adapter_config.json").unlink(), "missing"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(folder, encoder, tmp_path, change, message):
    write_adapter(tmp_path / "adapter", folder)
    change(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=message):
        inject(folder, encoder, tmp_path / "adapter", tmp_path / "out")


def test_a_merged_lora_without_its_original_is_not_built_upon(folder, encoder, tmp_path):
    write_adapter(tmp_path / "adapter", folder)
    output = inject(folder, encoder, tmp_path / "adapter", tmp_path / "out")
    for lora in (tmp_path / "adapter", None):
        with pytest.raises(CheckpointError, match="already has .*adapter in it"):
            inject(output, encoder, lora, tmp_path / "again")


# ---------------------------------------------------------------- refusals

NAME = "audio_tokenizer.encoder_blocks.1.conv.parametrizations.weight.original1"


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda tensors: tensors.pop(NAME), f"lacks the tensor {NAME}"),
        (lambda tensors: tensors.update({"audio_tokenizer.output_proj.x": torch.ones(1)}), "unexpected tensor"),
        (lambda tensors: tensors.update({NAME: tensors[NAME][:, :, :3]}), "has shape"),
        (lambda tensors: tensors[NAME].view(-1)[7].fill_(float("nan")), f"{NAME} holds values that are no finite"),
        (lambda tensors: tensors[NAME].view(-1)[7].fill_(float("inf")), f"{NAME} holds values that are no finite"),
        (lambda tensors: tensors.update({NAME: tensors[NAME].long()}), f"{NAME} holds values that are no finite"),
        (lambda tensors: tensors[NAME].zero_(), f"{NAME} is all zero"),
    ],
)
def test_encoders_that_do_not_fit_are_refused(folder, tmp_path, change, message):
    encoder = write_encoder(tmp_path / "encoder.safetensors", folder, change=change)
    before = snapshot(folder)
    for output in (tmp_path / "out", None):
        with pytest.raises(CheckpointError, match=message):
            inject(folder, encoder, output=output)
    assert snapshot(folder) == before and not (tmp_path / "out").exists()


def test_damaged_sources_are_refused(folder, encoder, tmp_path):
    with pytest.raises(CheckpointError, match="none.safetensors is missing"):
        inject(folder, tmp_path / "none.safetensors", output=tmp_path / "out")
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-10])
    with pytest.raises(CheckpointError, match="truncated"):
        inject(folder, encoder, output=tmp_path / "out")
    (folder / WEIGHTS).write_bytes(data)
    checkpoint = Checkpoint(folder)
    tensors = checkpoint.read(checkpoint.shapes)
    del tensors["norm.weight"]
    save_tensors(folder / WEIGHTS, tensors)
    with pytest.raises(CheckpointError, match="lacks the tensor norm.weight"):
        inject(folder, encoder, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_outputs_that_hold_something_else_are_refused(folder, encoder, tmp_path):
    before = snapshot(folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    for output in (tmp_path / "full", tmp_path / "full" / "thesis.tex", folder, folder / "inside", tmp_path):
        with pytest.raises(CheckpointError, match="--output"):
            inject(folder, encoder, output=output)
    assert snapshot(folder) == before and (tmp_path / "full" / "thesis.tex").is_file()
    (tmp_path / "empty").mkdir()
    assert VoxtralCodec.from_checkpoint(inject(folder, encoder, output=tmp_path / "empty")).has_encoder
    other = shutil.copytree(folder, tmp_path / "other")
    inject(other, encoder)
    with pytest.raises(CheckpointError, match="--output"):  # injected in place: somebody's checkpoint
        inject(folder, encoder, output=other)


def test_in_place_needs_an_original_to_go_back_to(folder, encoder, tmp_path):
    output = inject(folder, encoder, output=tmp_path / "out")
    with pytest.raises(CheckpointError, match="not the original"):
        inject(output, encoder)
    for path in (folder, output):
        with pytest.raises(CheckpointError, match="no original"):
            eject(path)
    shard(folder)
    write_adapter(tmp_path / "adapter", folder)
    before = snapshot(folder)
    with pytest.raises(CheckpointError, match="several shards"):
        inject(folder, encoder, tmp_path / "adapter")
    assert snapshot(folder) == before


def test_too_little_disk_is_refused_before_writing(folder, encoder, tmp_path, monkeypatch):
    before, usage = snapshot(folder), shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    for output in (tmp_path / "out", None):
        with pytest.raises(CheckpointError, match="GB of disk"):
            inject(folder, encoder, output=output)
    assert snapshot(folder) == before and not (tmp_path / "out").exists()


def test_a_backup_of_another_checkpoint_is_refused(folder, encoder):
    inject(folder, encoder)
    kept = folder / BACKUP / f"{WEIGHTS}.header"
    text = kept.read_bytes()[8:].replace(b"norm.weight", b"gone.weight", 1)
    kept.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(CheckpointError, match="not the file that"):
        eject(folder)


# ---------------------------------------------------------------- kills and full disks


@pytest.fixture(scope="module")
def mid_size(tmp_path_factory):
    """A checkpoint of about 50 MB, two encoders and an adapter."""
    base = tmp_path_factory.mktemp("mid")
    raw = small_params(
        backbone={"dim": 256, "vocab_size": 40_000, "hidden_dim": 1024}, codec={"dim": 256, "hidden_dim": 512}
    )
    write_random_checkpoint(base / "checkpoint", raw, {"alpha": 20}, n_text_tokens=500)
    for seed in (1, 2):
        write_encoder(base / f"encoder_{seed}.safetensors", base / "checkpoint", seed)
    write_adapter(base / "adapter", base / "checkpoint")
    return base


def run_and_kill(work, delay_sec):
    """`work` in a forked process that gets SIGKILL after this long -> whether it had ended by then, how long it ran."""
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    start = time.monotonic()
    while time.monotonic() - start < delay_sec:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return True, time.monotonic() - start
        time.sleep(0.0005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False, time.monotonic() - start


def state_of(folder):
    return digest(folder / WEIGHTS), MARKER in (folder / "params.json").read_text()


def kill_at_random_moments(attempt, inspect, n=30):
    """Calls inspect() after each of n kills at random moments of attempt(). Returns how often each state was found."""
    ended, seconds = run_and_kill(attempt, 60)
    assert ended
    inspect()
    generator, states = random.Random(0), Counter()
    for _ in range(3 * n):
        ended, took = run_and_kill(attempt, generator.uniform(0, 1.05 * seconds))
        state = inspect()
        if ended:  # too late for a kill: another try, and the first attempt may have been a slow one
            seconds = min(seconds, took)
        else:
            states[state] += 1
        if states.total() == n:
            return states
    raise AssertionError(f"only {states.total()} of {3 * n} kills came in time")


@pytest.mark.slow
def test_kills_while_writing_a_folder_leave_none_the_old_or_the_new(mid_size, tmp_path):
    source, output = mid_size / "checkpoint", tmp_path / "out"
    before = snapshot(source)
    one, two = mid_size / "encoder_1.safetensors", mid_size / "encoder_2.safetensors"
    new = snapshot(inject(source, one, mid_size / "adapter", tmp_path / "reference"))
    replaced = snapshot(inject(source, two, None, tmp_path / "reference"))

    def fresh():
        found = None if not output.exists() else snapshot(output)
        assert found in (None, new)
        shutil.rmtree(output, ignore_errors=True)
        return found is not None

    states = kill_at_random_moments(lambda: inject(source, one, mid_size / "adapter", output), fresh)
    assert states[False] >= 10  # else no kill came in time

    inject(source, one, mid_size / "adapter", output)

    def replacing():
        found = snapshot(output)
        assert found in (new, replaced)
        if found == replaced:
            inject(source, one, mid_size / "adapter", output)
        return found == replaced

    states = kill_at_random_moments(lambda: inject(source, two, None, output), replacing)
    assert states[False] >= 10 and snapshot(source) == before
    inject(source, two, None, output)
    assert snapshot(output) == replaced and not list(tmp_path.glob(".*"))  # what the kills left is gone


@pytest.mark.slow
def test_kills_in_place_leave_the_old_or_the_new_and_eject_undoes_them(mid_size, tmp_path):
    folder = shutil.copytree(mid_size / "checkpoint", tmp_path / "checkpoint")
    encoder = mid_size / "encoder_1.safetensors"
    original = snapshot(folder)
    old = state_of(folder)
    new = state_of(inject(folder, encoder, mid_size / "adapter", tmp_path / "reference"))
    whole = {old, new, (new[0], False)}  # the last one: served as before the request gate existed

    def undo():
        """Puts the original back with eject where there is something to eject; the bytes must be the original's."""
        if (folder / BACKUP).exists():
            eject(folder)
        shutil.rmtree(folder / f"{BACKUP}.tmp", ignore_errors=True)
        for leftover in [*folder.glob(".*.tmp"), *folder.glob(RECORD), *folder.glob(CARD)]:
            leftover.unlink()
        assert snapshot(folder) == original

    def inspect():
        state = state_of(folder)
        assert state in whole and set(Checkpoint(folder).shapes) >= set(released_layout(load_params(folder)))
        undo()
        return state

    states = kill_at_random_moments(lambda: inject(folder, encoder, mid_size / "adapter"), inspect)
    assert states[old] >= 10

    inject(folder, encoder, mid_size / "adapter")

    def after_eject_kill():
        state = state_of(folder)
        assert state in whole
        inject(folder, encoder, mid_size / "adapter")
        assert state_of(folder) == new
        return state

    states = kill_at_random_moments(lambda: eject(folder), after_eject_kill, n=15)
    assert states[(new[0], False)] >= 5


def test_a_run_after_a_kill_between_weights_and_marker_completes_it(folder, encoder):
    inject(folder, encoder)
    wanted = snapshot(folder)
    path = folder / "params.json"
    path.write_text(remove_json(path.read_text(), [MARKER]))
    inject(folder, encoder)
    assert snapshot(folder) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.05, 0.5, 0.98])
def test_a_full_disk_leaves_everything_as_it_was(mid_size, tmp_path, share):
    folder = shutil.copytree(mid_size / "checkpoint", tmp_path / "checkpoint")
    before = snapshot(folder)
    limit = int(share * (folder / WEIGHTS).stat().st_size)
    common = command_line(checkpoint=folder, encoder=mid_size / "encoder_1.safetensors")
    for arguments in (["--in-place"], ["--output", str(tmp_path / "out")]):
        process = subprocess.run(
            [sys.executable, "inject_encoder.py", *common, *arguments],
            capture_output=True,
            text=True,
            cwd=ROOT,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )
        assert process.returncode == 2 and process.stderr.count("\n") == 1, process.stderr
        assert "File too large" in process.stderr and "Traceback" not in process.stderr
        ours = (BACKUP, RECORD, CARD)
        after = {name: value for name, value in snapshot(folder).items() if not name.startswith(ours)}
        assert after == before and not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


# ---------------------------------------------------------------- the model card


def test_the_card_says_what_was_injected_and_trained_on(folder, tmp_path):
    run = tmp_path / "home" / "runs" / "voices"
    (run / "best").mkdir(parents=True)
    encoder = write_encoder(run / "best" / "encoder.safetensors", folder)
    source = {"kind": "folder", "path": "/home/me/my_speech"}
    config = EncoderConfig(data=DataConfig(sources=[SourceConfig(**source), SourceConfig("manifest", name="talk")]))
    config.loss.stft, config.train.max_steps = 0.0, 700
    dump_config(config, run / "config.yaml")
    (run / "best" / "metrics.json").write_text('{"step": 650, "mel_distance": 1.25}')
    write_adapter(tmp_path / "adapter", folder)
    (folder / "README.md").write_text("The release's own.")
    output = inject(folder, encoder, tmp_path / "adapter", tmp_path / "out")
    card = (output / CARD).read_text()
    assert (output / "README.md").read_text() == "The release's own." and not (folder / CARD).exists()
    assert f"| the encoder: 114 tensors, {n_millions(encoder)} M parameters, bf16 | `encoder.safetensors` |" in card
    adapter = tmp_path / "adapter" / "adapter_model.safetensors"
    assert all(f"`{path.name}` | `{digest(path)}` |" in card for path in (encoder, adapter))
    assert "rank 4, alpha 12, of k_proj, o_proj, q_proj, v_proj" in card
    assert (
        "run `voices`" in card and "- speech, as configured: folder my_speech, talk\n" in card and "700 steps" in card
    )
    assert f"l1 {config.loss.l1:g}, " in card and "stft" not in card and "step 650, mel_distance 1.25" in card
    assert str(tmp_path) not in card and "/home" not in card  # whoever publishes it publishes no paths
    assert "Delete this folder" in card and "--eject" not in card


def n_millions(path):
    return f"{sum(tensor.numel() for tensor in SafetensorsFile(path).read().values()) / 1e6:.1f}"


def test_the_card_of_an_injection_in_place_comes_and_goes_with_it(folder, encoder, pristine):
    inject(folder, encoder)
    card = (folder / CARD).read_text()
    assert "--eject" in card and "Not known" in card and digest(encoder) in card
    eject(folder)
    assert snapshot(folder) == snapshot(pristine) and not (folder / CARD).exists()
    assert CARD in inject_encoder.COMMAND_LINE.format_help()


@pytest.mark.parametrize("text", ["data: [", "data: {}", "", "loss: 3"])
def test_a_damaged_config_of_the_run_is_said_in_the_card(folder, tmp_path, text):
    run = tmp_path / "run"
    (run / "best").mkdir(parents=True)
    (run / "config.yaml").write_text(text)
    encoder = write_encoder(run / "best" / "encoder.safetensors", folder)
    inject(folder, encoder)
    assert "run `run`: not known, since its files cannot be read (" in (folder / CARD).read_text()


# ---------------------------------------------------------------- the script


def test_script_takes_the_newest_best_encoder_and_verifies(folder, tmp_path, monkeypatch, run_script):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VOXTRAL_CKPT", str(folder))
    code, _, error = run_script(inject_encoder.main, "--in-place")
    assert code == 2 and "runs/*/best/encoder.safetensors" in error
    for i, name in enumerate(("old", "new", "older")):
        path = write_encoder(tmp_path / "runs" / name / "best" / "encoder.safetensors", folder, seed=i)
        os.utime(path, (0, {"old": 20, "new": 30, "older": 10}[name]))
    code, out, _ = run_script(inject_encoder.main, "--in-place", "--verify", CLIP)
    assert code == 0 and "encoder: runs/new/best/encoder.safetensors" in out
    assert "114 encoder tensors" in out and out.count("of the acoustic levels") == 2
    codec, waveform = VoxtralCodec.from_checkpoint(folder), prepare_reference(CLIP).waveform
    served = codec.encode(waveform)
    codec.load_encoder(SafetensorsFile(tmp_path / "runs/new/best/encoder.safetensors").read())
    with torch.no_grad():
        exact = codec.quantizer.encode(codec.encode_latent(waveform))
    assert f"in bf16 from the waveform to the levels, changes {changed_shares(served, exact)}" in out
    name = next(iter(withheld_layout(load_params(folder))))
    wanted = SafetensorsFile(tmp_path / "runs/new/best/encoder.safetensors").read([name])[name].bfloat16()
    assert torch.equal(Checkpoint(folder).read([name])[name], wanted)
    code, out, _ = run_script(inject_encoder.main, "--eject")
    assert code == 0 and not Checkpoint(folder).encoder_names


def test_verify_notices_another_encoder_and_counts_changes(folder, encoder, tmp_path):
    output = inject(folder, encoder, output=tmp_path / "out")
    other = write_encoder(tmp_path / "other.safetensors", folder, seed=5)
    with pytest.raises(ValueError, match="is not the tensor of"):
        inject_encoder.verify(output, other, CLIP)
    codes = torch.zeros(1, 37, 4)
    changed = codes.clone()
    changed[0, 0, 0] = changed[0, 5, :3] = 1
    assert changed_shares(changed, codes) == ("25.00% of the semantic codes, 2.08% of the acoustic levels")  # 3 of 144


def test_script_says_errors_in_one_sentence_and_warns_of_lost_voices(
    folder, encoder, tmp_path, monkeypatch, run_script
):
    monkeypatch.delenv("VOXTRAL_CKPT", raising=False)
    code, _, error = run_script(inject_encoder.main, "--encoder", encoder, "--in-place")
    assert code == 2 and error == "error: no checkpoint: pass --checkpoint, or set VOXTRAL_CKPT.\n"
    code, _, error = run_script(
        inject_encoder.main, "--checkpoint", folder, "--encoder", tmp_path / "none", "--in-place"
    )
    assert code == 2 and error.count("\n") == 1 and "none is missing" in error
    assert run_script(inject_encoder.main, "--checkpoint", folder)[0] == 2  # neither --output nor --in-place
    run = ("--checkpoint", folder, "--encoder", encoder, "--output", tmp_path / "out")
    assert run_script(inject_encoder.main, *run)[0] == 0
    path = tmp_path / "out" / "params.json"
    path.write_text(set_json(path.read_text(), ["multimodal", "audio_tokenizer_args", "voice", "anna"], 2))
    code, _, error = run_script(inject_encoder.main, *run)
    assert code == 0 and "anna" in error


# ---------------------------------------------------------------- JSON, one member at a time


@pytest.mark.parametrize(
    "text",
    [
        '{"a": {"b": 1}}',
        '{"a":{"b":1}}',
        '{"a": {}}',
        '{\n    "x": "}\\"{",\n    "a": {\n        "b": 1e5,\n        "c": [{}]\n    }\n}\n',
        '{\r\n\t"a" : {\r\n\t\t"b" : 1\r\n\t}\r\n}',
        '{"é": "\\u00e9", "a": {"b": null, "é": 2}} \n',
    ],
)
def test_members_are_added_as_the_others_are_written_and_taken_out_again(text):
    added = set_json(text, ["a", "new"], 7)
    wanted = json.loads(text)
    wanted["a"]["new"] = 7
    assert json.loads(added) == wanted and list(json.loads(added)) == list(json.loads(text))
    assert remove_json(added, ["a", "new"]) == text
    assert set_json(added, ["a", "new"], 7) == added
    replaced = set_json(added, ["a", "new"], 12)
    assert replaced == added.replace("7", "12")
    for name in wanted["a"]:
        left = json.loads(remove_json(added, ["a", name]))
        assert left["a"] == {key: value for key, value in wanted["a"].items() if key != name}


def test_added_members_follow_the_style():
    assert set_json('{"a": 1}', ["b"], 2) == '{"a": 1, "b": 2}' and set_json('{"a":1}', ["b"], 2) == '{"a":1,"b":2}'
    assert set_json('{\n  "a": 1\n}', ["b"], 2) == '{\n  "a": 1,\n  "b": 2\n}'
    for path in (["x", "y"], ["a", "y"]):
        with pytest.raises(KeyError):
            set_json('{"a": 1}', path, 2)
    with pytest.raises(KeyError):
        remove_json('{"a": 1}', ["b"])
