"""Phase 2 on a small random checkpoint: pairs, teacher and student, gradients, runs that survive, and bad input."""

import json
import math
import re
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, stopped, stopped_by_torchrun, torchrun
from safetensors.torch import load_file

import train_full_pipeline
from voxtral import distillation
from voxtral.backbone import Backbone
from voxtral.checkpoint import Checkpoint, save_tensors
from voxtral.clips import encode_speech, resynthesize
from voxtral.codec import VoxtralCodec
from voxtral.config import FullPipelineConfig, load_config
from voxtral.data import SAMPLE_RATE
from voxtral.distillation import FullPipeline, compare, native_tensors, soft_rows
from voxtral.history import metric_rows
from voxtral.inject import inject
from voxtral.losses import MelDistance
from voxtral.pairs import AUDIO, GENERATION, PADDING, PairDataset, collate_pairs, hold_out_texts
from voxtral.params import load_params
from voxtral.sources import Clip, DataConfig, DataError, SourceConfig, find_clips
from voxtral.standin import small_params, write_random_checkpoint
from voxtral.tts import TTS, load_tokenizer

VOICES, CLIPS_PER_VOICE = ("anna", "ben", "carl"), 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("standin")
    write_random_checkpoint(folder, small_params(), {"alpha": 5})
    return folder


@pytest.fixture(scope="module")
def encoder(folder, tmp_path_factory):
    """An encoder.safetensors that is not the one behind the clips."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    save_tensors(path, VoxtralCodec.from_checkpoint(folder).encoder_tensors())
    return path


@pytest.fixture(scope="module")
def clips_root(folder, tmp_path_factory):
    """A folder with `generated`: clips of 3 voices with random codes, as generate_clips.py writes them."""
    root = tmp_path_factory.mktemp("clips")
    codec, generator = VoxtralCodec.from_checkpoint(folder), torch.Generator().manual_seed(0)
    rows = []
    for voice, number in product(VOICES, range(CLIPS_PER_VOICE)):
        n_frames = int(torch.randint(5, 12, (), generator=generator))
        levels = [torch.randint(size, (n, n_frames), generator=generator) for size, n in ((64, 1), (21, 36))]
        codes, path = torch.cat(levels), root / "generated" / voice / f"{number:05d}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, codes.numpy().astype(np.int16))
        with torch.no_grad():
            audio = codec.decode(codes[None])[0, 0].clamp(-1, 1)
        soundfile.write(path.with_suffix(".flac"), audio.numpy(), SAMPLE_RATE)
        row = {"path": f"{voice}/{number:05d}.flac", "codes": f"{voice}/{number:05d}.npy", "voice": voice}
        rows.append(row | {"text": f"sentence {number} of {voice}"})
    (root / "generated" / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def command(folder, encoder, clips_root):
    """command(output_dir, "key=value", ...) -> arguments of train_full_pipeline.py"""

    fixed = """
        data.validation.clips=2 data.validation.speakers=[carl] data.batch_size=2 data.num_workers=0 device=cpu
        train.precision=fp32 optimizer.learning_rate=5e-3 optimizer.warmup_steps=1 train.log_every_steps=1
        train.max_steps=4
    """.split()
    start = ["--config", "configs/full_pipeline.yaml", f"checkpoint={folder}", f"encoder={encoder}", *fixed]
    return lambda output, *overrides: [*start, f"data.data_root={clips_root}", f"output_dir={output}", *overrides]


@pytest.fixture(scope="module")
def make_model(command, tmp_path_factory):
    """make_model("key=value", ...) -> (model, data set, batch of its first three clips)"""

    def make(*overrides):
        arguments = command(tmp_path_factory.mktemp("unused"), *overrides)
        config = load_config(FullPipelineConfig, ROOT / arguments[1], arguments[2:])
        models = train_full_pipeline.load_models(config, torch.device("cpu"))
        clips = [clip for source in find_clips(config.data)[0] for clip in source]
        dataset = PairDataset(
            clips, load_tokenizer(Path(config.checkpoint)), models.codec.params, config.data.max_sec, 0
        )
        torch.manual_seed(0)
        model = FullPipeline(models, config).train()
        return model, dataset, collate_pairs([dataset[0, index] for index in (0, 4, 8)])

    return make


def shake_lora(model):
    """LoRA starts at zero, where half of its gradients vanish."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)


# ---------------------------------------------------------------- pairs


def test_a_prompt_with_true_codes_is_what_serving_builds(make_model, folder):
    model, dataset, batch = make_model()
    tts = TTS.from_checkpoint(folder)
    rows, _ = model.references(batch, of_encoder=False, table=model.table)
    x = model.embed(batch, rows, model.table)
    for i in range(3):
        n, begins, text = batch.n_reference[i], batch.begins[i], None
        for clip in dataset.clips:  # which clip is spoken shows in its codes
            codes = torch.from_numpy(np.load(clip.codes).astype(np.int64))
            if codes.shape == batch.speech[i, :, : batch.n_speech[i]].shape and torch.equal(
                codes, batch.speech[i, :, : batch.n_speech[i]]
            ):
                text = clip.text
        prompt = tts.prompt(text, rows[i, : n + 1])
        assert len(prompt) == begins + 1 and torch.equal(x[i, : begins + 1], prompt)
        end = begins + 1 + batch.n_speech[i]
        assert torch.equal(
            x[i, begins + 1 : end], model.codec.embed_codes(batch.speech[i : i + 1, :, : batch.n_speech[i]])[0]
        )
        assert (batch.kind[i, :end] != PADDING).all() and (batch.kind[i, end:] == PADDING).all()
        assert (batch.kind[i] == AUDIO).sum() == n + 1 and (batch.kind[i] == GENERATION).sum() == batch.n_speech[i] + 1
    assert batch.n_tokens == (batch.kind != PADDING).sum() < batch.kind.numel()


def test_pairs_are_of_one_voice_and_of_two_clips(make_model):
    _, dataset, _ = make_model()
    for number in range(30):
        index = number % len(dataset)
        partner = dataset._partner(index, np.random.default_rng(number))
        assert partner.speaker == dataset.clips[index].speaker and partner != dataset.clips[index]
    alone = replace(dataset.clips[0], speaker="nobody else")
    dataset.clips = [alone, *dataset.clips[1:]]
    dataset._find_voices()
    assert dataset._partner(0, np.random.default_rng(0)) == alone


def test_items_depend_on_seed_number_and_index_alone(make_model):
    _, one, _ = make_model()
    _, two, _ = make_model()
    for item in ((0, 3), (7, 3), (8, 3)):
        assert all(
            torch.equal(torch.as_tensor(a), torch.as_tensor(b))
            for (ka, a), (kb, b) in zip(one[item].items(), two[item].items())
            if ka != "bad"
        )
    speeches = {one[number, 3]["speech"].numpy().tobytes() for number in range(20)}
    assert len(speeches) == CLIPS_PER_VOICE - 1


def test_long_clips_are_cut_at_a_frame_and_do_not_end(make_model):
    _, _, batch = make_model("data.max_sec=0.4")  # 5 frames
    assert (batch.n_reference <= 5).all() and batch.reference.shape[-1] == 5 and batch.waveform.shape[-1] == 5 * 1920
    assert not batch.is_whole.all()


def test_held_out_texts_leave_the_training_clips():
    clips = [Clip(f"{i}.flac", "a", 0, text, "c") for i, text in enumerate(("one", "two", "one"))]
    held_out = [Clip("v.flac", "b", 0, "one", "c")]
    assert hold_out_texts(clips, held_out) == [clips[1]]
    with pytest.raises(DataError, match="every training clip"):
        hold_out_texts(clips[::2], held_out)


def test_encoding_once_gives_the_codes_that_the_step_would_compute(make_model):
    model, dataset, batch = make_model()
    in_step, _ = model.references(batch, of_encoder=True, table=model.table)
    dataset.encode(model.codec, "cpu", model.config.data)
    cached = collate_pairs([dataset[0, index] for index in (0, 4, 8)])
    assert cached.waveform is None
    rows, _ = model.references(cached, of_encoder=True, table=model.table)
    assert all(torch.equal(rows[i, : n + 1], in_step[i, : n + 1]) for i, n in enumerate(batch.n_reference.tolist()))
    alone = model.codec.encode(dataset.read(4)[1][None, None])[0]
    assert torch.equal(dataset.encoded[4].long(), alone)


# ---------------------------------------------------------------- teacher and student


@torch.no_grad()
def test_the_loss_is_zero_only_when_the_encoder_finds_the_true_codes(make_model):
    model, _, batch = make_model("loss.semantic_kl=1")
    losses = model(batch, seed=3)
    assert all(loss > 1e-4 for loss in losses.values())
    found = model(replace(batch, waveform=None, encoded=batch.reference), seed=3)
    assert all(loss < 1e-9 for loss in found.values())


@torch.no_grad()
def test_the_teacher_is_the_base_model_whatever_the_adapter_holds(make_model, folder):
    model, _, batch = make_model()
    x = model.embed(batch, model.references(batch, False, model.table)[0], model.table)
    base = Backbone.from_checkpoint(folder, dtype=torch.float32)
    expected = base.hidden_states(x)
    shake_lora(model)
    teacher, student = (model.run(batch, of_encoder=False, adapted=adapted) for adapted in (False, True))
    valid = batch.kind != PADDING
    assert all(torch.allclose(t[valid], e[valid], atol=1e-5) for t, e in zip(teacher.layers, expected))
    assert not any(torch.allclose(s[valid], e[valid], atol=1e-3) for s, e in zip(student.layers, expected))
    assert torch.allclose(teacher.hidden[1, :3], base(x)[1, batch.begins[1] : batch.begins[1] + 3], atol=1e-5)
    pairs = zip(model.base.model.layers, model.backbone.model.layers)  # one set of weights in memory
    assert all(
        b.self_attn.q_proj.weight is a.self_attn.q_proj.base_layer.weight
        and b.mlp.up_proj.weight is a.mlp.up_proj.weight
        for b, a in pairs
    )


@torch.no_grad()
def test_a_batch_is_its_clips_alone(make_model):
    every = "loss.semantic_kl=1", "loss.cross_entropy=1"  # the noise of flow is drawn per batch
    model, dataset, batch = make_model(*every)
    shake_lora(model)
    together = model(batch, seed=0)
    alone = [model(collate_pairs([dataset[0, index]]), seed=0) for index in (0, 4, 8)]
    for name, loss in together.items():
        assert loss.item() == pytest.approx(sum(losses[name].item() for losses in alone) / 3, rel=1e-4)


@torch.no_grad()
def test_losses_by_hand(make_model):
    model, _, batch = make_model("loss.cross_entropy=1", "loss.semantic_kl=1")
    shake_lora(model)
    teacher, student = model.run(batch, False, False), model.run(batch, True, True)
    losses = model.losses(batch, student, None, teacher, seed=0)
    expected = {name: 0.0 for name in losses}
    for i in range(3):
        audio = batch.kind[i] == AUDIO
        expected["hidden"] += (
            sum((s[i, audio] - t[i, audio]).square().mean() for s, t in zip(student.layers, teacher.layers)) / 2 / 3
        )
        n = batch.n_speech[i]
        final = model.backbone.model.norm(student.layers[-1])[i, batch.begins[i] : batch.begins[i] + n + 1]
        logits = (final @ model.acoustic.semantic_codebook_output.weight.T)[:, 1:66]
        labels = torch.cat([batch.speech[i, 0, :n] + 1, torch.tensor([0])])  # of END_AUDIO and the codes
        expected["cross_entropy"] += torch.nn.functional.cross_entropy(logits, labels) / 3
        p = teacher.logits[i, : n + 1].softmax(-1)
        expected["semantic_kl"] += (p * (p.log() - logits.softmax(-1).log())).sum(-1).mean() / 3
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-4)


@torch.no_grad()
def test_preset_losses_are_of_the_adapted_model_under_true_references(make_model):
    """An adapter that changes nothing changes no preset, however wrong the encoder; any other one does."""
    model, _, batch = make_model("loss.preset_hidden=1", "loss.preset_kl=1")
    losses = model(batch, seed=0)
    assert losses["hidden"] > 1e-3 and losses["preset_hidden"] < 1e-9 and losses["preset_kl"].abs() < 1e-6
    shake_lora(model)
    losses = model(batch, seed=0)
    assert losses["preset_hidden"] > 1e-4 and losses["preset_kl"] > 1e-6


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_lora_matrix_and_nothing_else(make_model, checkpointing):
    model, _, batch = make_model(
        f"train.gradient_checkpointing={checkpointing}", "loss.semantic_kl=1", "loss.flow=1", "loss.cross_entropy=1"
    )
    shake_lora(model)
    sum(model(batch, seed=0).values()).backward()
    found = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    lora = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert found == lora == set(model.trained()) and len(lora) == 2 * 4 * 2  # layers, projections, A and B


def test_checkpointing_changes_no_gradient(make_model):
    gradients = []
    for checkpointing in (False, True):
        model, _, batch = make_model(f"train.gradient_checkpointing={checkpointing}")
        shake_lora(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.01)
        model(batch, seed=0)["hidden"].backward()
        gradients.append({name: p.grad for name, p in model.trained().items()})
    assert all(torch.allclose(gradients[0][name], gradients[1][name], rtol=1e-4, atol=1e-7) for name in gradients[0])


def test_soft_rows_are_the_hard_ones_on_the_grid_and_have_the_right_gradient(make_model):
    model, _, _ = make_model()
    codec = model.codec.double()
    codes = torch.cat([torch.randint(64, (1, 1, 4)), torch.randint(1, 20, (1, 36, 4))], dim=1)
    quantized = codec.quantizer.decode(codes).double()
    latent = torch.cat([quantized[:, :16], quantized[:, 16:].atanh()], dim=1)
    table = model.table.double()
    hard = codec.embed_codes(codes, table)
    assert torch.allclose(soft_rows(codec, latent, torch.tensor(1e-3), table), hard, atol=1e-6)
    inside = (latent + 0.01).requires_grad_()  # not on a level, where the slope changes
    assert torch.autograd.gradcheck(lambda x: soft_rows(codec, x, model.scale.double(), table), (inside,), atol=1e-6)


def test_joint_training_sees_the_codes_and_moves_the_encoder(make_model):
    joint, _, batch = make_model("train.trainable=[lora,encoder]")
    frozen, _, _ = make_model()
    rows = joint.references(batch, True, joint.table)[0]
    assert torch.allclose(rows, frozen.references(batch, True, frozen.table)[0], atol=1e-6)  # the value is the codes'
    joint(batch, seed=0)["hidden"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in joint.codec.encoder_parameters())
    assert all(p.grad is None for p in joint.codec.decoder_blocks.parameters())


def test_the_mel_loss_is_of_what_the_codes_sound_like(make_model):
    """The validation metric of phase 1, and its gradient reaches the whole encoder and nothing else."""
    model, _, batch = make_model("train.trainable=[encoder]", "loss.hidden=0", "loss.mel=1")
    loss = model(batch, seed=0)["mel"]
    lengths = batch.n_reference * 1920
    decoded = model.codec.decode(model.codec.encode(batch.waveform, lengths))
    assert loss.item() == pytest.approx(MelDistance(SAMPLE_RATE)(decoded, batch.waveform, lengths).item(), rel=1e-5)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.codec.encoder_parameters())
    assert all(p.grad is None for p in model.codec.decoder_blocks.parameters())


# ---------------------------------------------------------------- what is reported


def test_compare_before_training_leaves_the_preset_alone(make_model):
    model, _, batch = make_model()
    before = compare(model, [batch, batch], "cpu")
    assert before["preset_top1"] == 1 and before["preset_kl"] == pytest.approx(0, abs=1e-6)
    assert before["preset_mse_audio"] == pytest.approx(0, abs=1e-9) and before["preset_cosine_text"] == pytest.approx(1)
    assert before["ours_mse_audio"] == pytest.approx(before["loss/hidden"]) == pytest.approx(before["loss/total"])
    assert len(before["ours_cosine_generation_by_layer"]) == 2 and before["ours_cosine_audio"] < 1
    shake_lora(model)
    after = compare(model, [batch], "cpu")
    assert after["preset_top1"] < 1 and after["preset_kl"] > 0 and after["preset_mse_text"] > 0


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def whole_run(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    train_full_pipeline.main(command(folder, "train.validate_every_steps=2", "train.save_every_steps=2"))
    return folder


def rows_of(folder):
    return list(metric_rows(folder / "metrics.jsonl"))


def test_a_training_that_does_not_help_says_so(tmp_path):
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "metrics.json").write_text('{"step": 2}')
    for after, said in ((1.5, True), (0.5, False)):
        rows = [{"step": 0, "validation/loss/total": 1.0}, {"step": 2, "validation/loss/total": after}]
        (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        report = train_full_pipeline.write_report(SimpleNamespace(path=tmp_path))
        assert ("No step was better than none" in report) == said


def test_a_run_lowers_the_loss_and_leaves_what_it_says(whole_run):
    report = json.loads((whole_run / "report.json").read_text())
    assert report["after"]["loss/hidden"] < report["before"]["loss/hidden"]
    assert report["before"]["preset_top1"] == 1
    assert {
        "best/adapter/adapter_model.safetensors",
        "plots/layers.png",
        "plots/losses.png",
        "config.yaml",
        "checkpoints/step_00000004/run_state.pt",
        "best/metrics.json",
    } <= {str(path.relative_to(whole_run)) for path in whole_run.rglob("*")}
    assert [row["step"] for row in rows_of(whole_run) if "validation/loss/total" in row] == [0, 2, 4]
    trained = [row for row in rows_of(whole_run) if "time/tokens_per_sec" in row]
    assert len(trained) == 4 and all(row["time/tokens_per_sec"] > 0 for row in trained)


def test_the_adapter_goes_into_the_checkpoint(whole_run, make_model, folder, encoder, tmp_path):
    adapter = whole_run / "checkpoints" / "step_00000004" / "adapter"
    output = inject(folder, encoder, adapter, tmp_path / "out")
    model, _, batch = make_model()
    weights = load_file(adapter / "adapter_model.safetensors")
    with torch.no_grad():
        for name, parameter in model.adapter.named_parameters():
            if "lora_" in name:
                parameter.copy_(weights[name.replace(".default", "")])
    merged = Backbone.from_checkpoint(output, dtype=torch.float32)
    with torch.no_grad():
        x = model.embed(batch, model.references(batch, True, model.table)[0], model.table)
        expected = model.run(batch, of_encoder=True, adapted=True)
        found, base = merged.hidden_states(x)[-1], model.run(batch, of_encoder=True, adapted=False).layers[-1]
    valid = batch.kind != PADDING
    error, change = (found - expected.layers[-1])[valid].norm(), (base - expected.layers[-1])[valid].norm()
    assert error < 0.1 * change  # what is left is bf16


def test_a_resumed_run_is_the_uninterrupted_one(whole_run, command, tmp_path):
    folder = shutil.copytree(whole_run, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "step_00000004")
    train_full_pipeline.main(command(folder, "train.validate_every_steps=2", "train.save_every_steps=2", "resume=true"))
    one, two = (
        torch.load(f / "checkpoints" / "step_00000004" / "run_state.pt", weights_only=True) for f in (whole_run, folder)
    )
    assert one["best"] == two["best"] and one["trained"].keys() == two["trained"].keys()
    assert all(torch.equal(one["trained"][name], two["trained"][name]) for name in one["trained"])
    losses = [[row["loss/total"] for row in rows_of(f) if "loss/total" in row] for f in (whole_run, folder)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_a_stop_request_to_all_processes_saves(command, tmp_path, stop_at, capsys):
    stop_at(2)
    stopped(train_full_pipeline.main, command(tmp_path / "run", "data.num_workers=2", "train.accumulation=2"))
    assert "stopped after step 2; go on with resume=true" in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoints" / "step_00000002").is_dir()


@pytest.mark.slow
def test_a_stop_request_to_torchrun_saves(command, tmp_path):
    out = stopped_by_torchrun(
        tmp_path,
        "train_full_pipeline.py",
        "SIGINT",
        command(tmp_path / "run", "data.num_workers=1", "train.max_steps=100000", "train.log_every_steps=100000"),
    )
    step = int(re.search(r"stopped after step (\d+)", out)[1])
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step_{step:08d}"]


@pytest.mark.slow
def test_accumulation_is_a_larger_batch(command, tmp_path):
    weights = []
    for batch_size, accumulation in ((4, 1), (2, 2)):
        folder = tmp_path / str(accumulation)
        train_full_pipeline.main(
            command(folder, f"train.accumulation={accumulation}", f"data.batch_size={batch_size}", "train.max_steps=1")
        )
        row = [row for row in rows_of(folder) if "grad/norm" in row][0]
        weights.append((row["grad/norm"], row["loss/total"], row["loss/hidden"]))
    assert weights[1] == pytest.approx(weights[0], rel=1e-3)


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one_with_twice_the_batch(command, tmp_path):
    train_full_pipeline.main(command(tmp_path / "one", "data.batch_size=4", "train.max_steps=3"))
    arguments = command(tmp_path / "two", "data.batch_size=2", "train.max_steps=3")
    torchrun("train_full_pipeline.py", *arguments, options=["--standalone", "--nproc-per-node=2"], check=True)
    one, two = (
        [row["loss/total"] for row in rows_of(tmp_path / name) if "grad/norm" in row] for name in ("one", "two")
    )
    assert two == pytest.approx(one, rel=1e-3) and len(one) == 3


@pytest.mark.parametrize(
    "parts, files",
    [
        ("[embedding]", {"weights.safetensors"}),
        ("[lora,encoder]", {"adapter", "encoder.safetensors"}),
        ("[backbone,acoustic,embedding]", {"weights.safetensors"}),
    ],
)
def test_other_parts_can_be_trained(command, folder, tmp_path, parts, files):
    run = tmp_path / "run"
    train_full_pipeline.main(
        command(run, f"train.trainable={parts}", "train.max_steps=1", "loss.cross_entropy=1", "loss.flow=1")
    )
    saved = run / "checkpoints" / "step_00000001"
    assert {path.name for path in saved.iterdir()} == files | {"run_state.pt"}
    if "weights.safetensors" in files:
        tensors, checkpoint = load_file(saved / "weights.safetensors"), Checkpoint(folder)
        assert all(tensor.shape == checkpoint.shapes[name] for name, tensor in tensors.items())
        moved = [name for name, old in checkpoint.read(tensors).items() if not torch.equal(tensors[name], old.float())]
        assert set(moved) == set(tensors)
    else:
        assert load_file(saved / "encoder.safetensors").keys() == set(
            Checkpoint(folder).params and VoxtralCodec.from_checkpoint(folder).encoder_tensors()
        )


def test_native_tensors_are_the_checkpoints_own(make_model, folder):
    model, _, _ = make_model("train.trainable=[backbone,acoustic,embedding]", "loss.flow=1")
    tensors, checkpoint = native_tensors(model), Checkpoint(folder)
    assert all(torch.equal(tensors[name], stored.float()) for name, stored in checkpoint.read(tensors).items())
    assert all(name in tensors for name in checkpoint.shapes if not name.startswith("audio_tokenizer."))


@pytest.mark.parametrize("speaker", ["../../escaped", "N/A", "/etc", "a\u2028b", "x" * 300])
def test_no_speaker_leads_out_of_the_folder(folder, tmp_path, speaker):
    codec, inside = VoxtralCodec.from_checkpoint(folder), tmp_path / "in" / "made"
    soundfile.write(tmp_path / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(6000), SAMPLE_RATE)
    clip = Clip(str(tmp_path / "a.wav"), speaker, 0, "one\u2028two")
    resynthesize(codec, [clip], inside, 1.0)
    (found,), _ = find_clips(DataConfig(data_root=str(inside), sources=[SourceConfig(kind="generated")]))
    encode_speech(codec, [clip], set(), inside / "coded", 1.0, [1.0], [0.0])
    assert len(found) == 1 and found[0].text == clip.text and Path(found[0].codes).is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"a.wav", "in"} and [
        path.name for path in (tmp_path / "in").iterdir()
    ] == ["made"]
    assert len(list((inside / "coded").glob("*/*.npy"))) == 1


def test_resynthesized_clips_carry_the_codes_that_made_them(folder, tmp_path):
    codec = VoxtralCodec.from_checkpoint(folder)
    noise = 0.1 * np.random.default_rng(0).standard_normal(30000).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", noise, SAMPLE_RATE)
    resynthesize(codec, [Clip(str(tmp_path / "a.wav"), "anna", 0, "some noise")], tmp_path / "made", 1.0)
    (row,) = [json.loads(line) for line in (tmp_path / "made" / "manifest.jsonl").read_text().splitlines()]
    codes = torch.from_numpy(np.load(tmp_path / "made" / row["codes"]).astype(np.int64))
    audio, rate = soundfile.read(tmp_path / "made" / row["path"], dtype="float32")
    assert codes.shape == (37, 13) and rate == SAMPLE_RATE and row["voice"] == "anna" and row["text"] == "some noise"
    with torch.no_grad():
        assert torch.equal(codes, codec.encode(torch.from_numpy(noise[:24000])[None, None])[0])
        assert np.abs(audio - codec.decode(codes[None])[0, 0].clamp(-1, 1).numpy()).max() < 1e-4


# ---------------------------------------------------------------- bad input


def test_bad_clips_are_left_out_and_listed(command, clips_root, tmp_path):
    root = shutil.copytree(clips_root, tmp_path / "clips") / "generated"
    (root / "anna" / "00000.flac").write_bytes(b"no sound")
    np.save(root / "anna" / "00001.npy", np.zeros((37, 3), np.int16))  # fewer frames than the sound
    np.save(root / "ben" / "00000.npy", np.full((37, 6), 99, np.int16))  # no such level
    (root / "ben" / "00001.npy").write_bytes(b"\x80 no array")
    run = tmp_path / "run"
    train_full_pipeline.main(command(run, f"data.data_root={tmp_path / 'clips'}", "train.max_steps=1"))
    listed = (run / "bad_files.txt").read_text()
    assert listed.count("\n") == 4 and "unreadable" in listed and "outside the codebooks" in listed
    assert "do not belong" in listed


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["encoder=null"], "has no encoder"),
        (["encoder=/nowhere/encoder.safetensors"], "is missing"),
        (["lora.rankk=3"], "unknown key 'lora.rankk'"),
        (["lora.rank=0"], "lora.rank is 0"),
        (["lora.target_modules=[gate_proj]"], "lora.target_modules"),
        (["train.trainable=[lora,backbone]"], "choose one of the two"),
        (["train.trainable=[acoustic]"], "acoustic learns from"),
        (["data.speed=[0.9,1.1]"], "data.speed: the codes"),
        (["loss.mel=1"], "loss.mel is the encoder's"),
        (["train.compile=true"], "for a language model from nothing"),
        (["train.dropout=0.1"], "for a language model from nothing"),
        (["reference_sec=[3,1]"], "reference_sec is [3.0, 1.0]"),
        (["reference_sec=[1,3]"], "hidden needs the encoder's own references"),
        (["train.trainable=[codebook]"], "train.trainable"),
        (["loss.hidden=0"], "all weights are 0"),
        (["data.validation.speakers=[zoe]"], "nobody is called zoe"),
        (["data.sources=[{kind: folder, path: generated}]"], "comes without codes"),
    ],
)
def test_bad_input_is_one_sentence(command, refused, tmp_path, overrides, message):
    assert message in refused(train_full_pipeline.main, command(tmp_path / "run", *overrides))
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run(command, tmp_path, monkeypatch, whole_run):
    folder = shutil.copytree(whole_run, tmp_path / "run")
    monkeypatch.setattr(distillation, "layer_errors", lambda student, *others: student[0].sum() * math.nan)
    with pytest.raises(SystemExit) as stop:
        train_full_pipeline.main(command(folder, "resume=true", "train.max_steps=6"))
    assert str(stop.value.code).startswith("training stopped: step 5: ") and "step_00000004" in stop.value.code


# ---------------------------------------------------------------- a language model from nothing

FROM_NOTHING = (
    "train.trainable=[backbone,acoustic,embedding]",
    "reference_sec=[0.16,0.4]",
    "loss.hidden=0",
    "loss.cross_entropy=1",
    "loss.flow=2",
)


@pytest.fixture
def clips(clips_root):
    sources = [SourceConfig(kind="generated", path="generated")]
    return list(find_clips(DataConfig(data_root=str(clips_root), sources=sources))[0][0])


def test_references_are_random_crops_of_their_own_true_codes(folder, clips):
    params = load_params(folder).codec
    dataset = PairDataset(clips, load_tokenizer(folder), params, 10.0, 0, False, (0.16, 0.4))
    lengths, starts = set(), set()
    for number in range(40):
        item = dataset[number, 0]
        whole = torch.from_numpy(np.load(dataset.clips[0].codes).astype(np.int64))
        n = item["reference"].shape[1]
        places = [i for i in range(whole.shape[1] - n + 1) if torch.equal(whole[:, i : i + n], item["reference"])]
        assert len(places) == 1 and torch.equal(item["encoded"], item["reference"]) and "waveform" not in item
        lengths.add(n)
        starts.add(places[0])
    assert lengths == {2, 3, 4, 5} and len(starts) > 2
    fixed = PairDataset(clips, load_tokenizer(folder), params, 10.0, 0, True, (0.16, 0.4))
    assert torch.equal(
        fixed[0, 0]["reference"], torch.from_numpy(np.load(fixed.clips[0].codes)[:, :5].astype(np.int64))
    )


def test_what_is_said_has_another_text_than_the_reference(folder, clips):
    anna = [clip for clip in clips if clip.speaker == "anna"]
    twice = [anna[0], replace(anna[1], text=anna[0].text), anna[2]]  # the same sentence at another speed, say
    dataset = PairDataset(twice, load_tokenizer(folder), load_params(folder).codec, 10.0, 0)
    said = {dataset._partner(0, np.random.default_rng(i)).text for i in range(20)}
    assert said == {anna[2].text}
    with pytest.raises(DataError, match="1 speakers have one sentence only"):
        PairDataset(twice[:2], load_tokenizer(folder), load_params(folder).codec, 10.0, 0, False, (0.16, 0.4))


def test_dropout_acts_in_training_only_and_on_every_layer(make_model):
    model, _, batch = make_model(*FROM_NOTHING, "train.dropout=0.5")
    plain, _, _ = make_model(*FROM_NOTHING)
    with torch.no_grad():
        dropped, again, exact = model(batch, 0)["flow"], model(batch, 0)["flow"], plain(batch, 0)["flow"]
        assert dropped != again and dropped != exact
        assert model.eval()(batch, 0)["flow"] == exact
    hooked = [m for m in model.modules() if m._forward_hooks]
    assert len(hooked) == 2 * (len(model.backbone.model.layers) + len(model.acoustic.layers))
    model.train()
    layers = [layer.feed_forward for layer in model.acoustic.layers] + [
        layer.mlp for layer in model.backbone.model.layers
    ]
    for layer in layers:
        x = torch.randn(2, 3, 64)
        assert torch.equal(layer(x), layer(x)) is False


def test_a_run_from_nothing_needs_no_encoder_and_keeps_what_speaks_best(command, tmp_path):
    run = tmp_path / "run"
    arguments = command(run, "data.validation.clips=9", "train.validate_every_steps=2", "train.precision=bf16")
    without = [word for word in arguments if not word.startswith("encoder=")]
    train_full_pipeline.main([*without, *FROM_NOTHING])
    validated = [row for row in rows_of(run) if "validation/loss/flow" in row]
    assert [row["step"] for row in validated] == [0, 2, 4] and "validation/top1" in validated[0]
    best = json.loads((run / "best" / "metrics.json").read_text())
    assert best["loss"] == min(row["validation/loss/flow"] for row in validated[1:])
    weights = load_file(run / "best" / "weights.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())  # they learnt in fp32, under bf16 autocast
