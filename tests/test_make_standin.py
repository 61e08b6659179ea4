"""make_standin.py: a whole codec and a language model are trained, cut in two, and the halves fit together."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, stopped
from safetensors.torch import load_file

import make_standin
from voxtral.checkpoint import ENCODER_PREFIXES, Checkpoint
from voxtral.codec import VoxtralCodec
from voxtral.data import load_segment
from voxtral.inject import inject
from voxtral.layout import released_layout, withheld_layout
from voxtral.params import load_params
from voxtral.reference import prepare_reference
from voxtral.tts import load_tokenizer, prompt_tokens

CLIPS = ["k_af_heart_0.opus", "k_am_adam_0.opus", "m_f12_0.opus"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Three clips of three speakers, one held out; two steps at the smallest sizes."""
    folder = tmp_path_factory.mktemp("standin")
    for name in CLIPS:
        shutil.copy(ROOT / "assets" / "speech" / name, folder)
    rows = "".join(f"{name},{name[:-7]}\n" for name in CLIPS)
    (folder / "train.csv").write_text("path,speaker\n" + rows)
    content = yaml.safe_load((ROOT / "configs" / "standin_small.yaml").read_text())
    del content["language_model"]
    content |= {
        "output_dir": str(folder / "run"),
        "device": "cpu",
        "standin": {
            "codec": {"dim": 32, "hidden_dim": 48, "head_dim": 8, "semantic_codebook_size": 40},
            "n_text_tokens": 300,
            "voices": {"low": "k_am_adam", "high": "k_af_heart"},
        },
        "optimizer": {"warmup_steps": 1},
        "loss": {"mel": 1.0, "feature": 0.0, "asr": 0.0},
    }
    content["data"] |= {"data_root": str(folder), "sources": [{"kind": "manifest", "path": "train.csv"}]}
    content["data"] |= {"batch_size": 2, "num_workers": 0, "max_sec": 0.48}
    content["data"]["validation"] = {"clips": 1, "speakers": ["m_f12"]}
    content["train"] |= {"max_steps": 2, "precision": "fp32", "validate_every_steps": 2, "save_every_steps": 2}
    path = folder / "standin.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def made(config):
    make_standin.main(["--config", str(config)])
    return config.parent / "run"


def test_released_folder_lacks_exactly_the_encoder(made):
    params = load_params(made / "released")
    assert Checkpoint(made / "released").shapes == released_layout(params)
    withheld = load_file(made / "withheld_encoder.safetensors")
    assert {name: tuple(t.shape) for name, t in withheld.items()} == withheld_layout(params)
    assert all(name.startswith(ENCODER_PREFIXES) and t.dtype == torch.bfloat16 for name, t in withheld.items())


def test_every_part_of_the_codec_was_trained(made):
    before, after = (VoxtralCodec.from_checkpoint(made / name) for name in ("initial", "released"))
    for name in (
        "decoder_blocks.0.conv.parametrizations.weight.original1",
        "output_proj.conv.parametrizations.weight.original1",
        "quantizer.semantic_codebook.embedding_sum",
    ):
        assert not torch.equal(before.state_dict()[name], after.state_dict()[name])
    best = load_file(made / "best" / "encoder.safetensors")
    assert all(
        torch.equal(t, best[name].bfloat16()) for name, t in load_file(made / "withheld_encoder.safetensors").items()
    )


def test_presets_are_embeddings_of_training_speakers_by_the_true_encoder(made):
    codec = VoxtralCodec.from_checkpoint(made / "released")
    codec.load_encoder(load_file(made / "withheld_encoder.safetensors"))
    waveform = prepare_reference(ROOT / "assets" / "speech" / "k_am_adam_0.opus").waveform
    voice = torch.load(made / "released" / "voice_embedding" / "low.pt", weights_only=True)
    with torch.no_grad():
        assert torch.equal(voice, codec.voice_embedding(waveform).bfloat16())
    assert load_params(made / "released").codec.voice == {"low": 0, "high": 1}
    rows = json.loads((made / "released" / "tekken.json").read_text())["audio"]["voice_num_audio_tokens"]
    assert rows["low"] == len(voice)


def test_a_codebook_to_be_trained_starts_among_the_latents(made):
    """Entries far from every latent would all be dead but one."""
    usage = VoxtralCodec.from_checkpoint(made / "released").quantizer.semantic_codebook.cluster_usage
    assert (usage > 0.5 * usage.median()).float().mean() > 0.5


@pytest.mark.slow
def test_an_encoder_anew_and_a_decoder_alone_follow_where_they_are_given_steps(config, made, tmp_path):
    """The withheld encoder is the second one; the decoder has moved from the first run's; the codebook has not."""
    run = tmp_path / "run"
    make_standin.main(
        ["--config", str(config), f"output_dir={run}", "standin.encoder_steps=2", "standin.decoder_steps=2"]
    )
    first, second = load_file(run / "best" / "encoder.safetensors"), load_file(run / "withheld_encoder.safetensors")
    assert not any(
        torch.equal(second[name], tensor.bfloat16()) for name, tensor in first.items() if "original1" in name
    )
    started = [VoxtralCodec.from_checkpoint(run / stage / "initial").has_encoder for stage in ("encoder", "decoder")]
    assert started == [False, True]  # the one is fresh, the other learns from it
    before, after = (
        VoxtralCodec.from_checkpoint(folder).state_dict() for folder in (made / "released", run / "released")
    )
    moved = {
        name
        for name in before
        if name.startswith(("decoder_blocks", "output_proj")) and not torch.equal(before[name], after[name])
    }
    assert any("original1" in name for name in moved)
    assert torch.equal(
        before["quantizer.semantic_codebook.embedding_sum"], after["quantizer.semantic_codebook.embedding_sum"]
    )


def test_training_goes_on_from_a_stand_in_with_its_encoder(config, made, tmp_path):
    """At a learning rate that moves nothing, the halves stay what they were."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    inject(made / "released", made / "withheld_encoder.safetensors", output=whole)
    still = [f"checkpoint={whole}", "encoder=checkpoint", f"output_dir={run}", "optimizer.learning_rate=1e-12"]
    make_standin.main(["--config", str(config), *still])
    before, after = (load_file(folder / "withheld_encoder.safetensors") for folder in (made, run))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not (run / "initial").exists()


def test_a_start_of_other_sizes_is_refused(config, made, tmp_path, refused):
    other = [f"checkpoint={made / 'released'}", "standin.codec.hidden_dim=64", f"output_dir={tmp_path / 'run'}"]
    assert "other sizes" in refused(make_standin.main, ["--config", str(config), *other])


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["standin.codec.dims=3"], "standin.codec.dims"),
        (["standin.voices.low=nobody"], "standin.voices.low"),
        (["standin.voices.low=m_f12"], "no training clip is of the speaker m_f12"),
        (["data.data_root=nowhere"], "nowhere/train.csv"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(config, tmp_path, refused, overrides, message):
    arguments = ["--config", str(config), f"output_dir={tmp_path / 'run'}", *overrides]
    assert message in refused(make_standin.main, arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--random",
        "--random --config x.yaml",
        "--config configs/standin_small.yaml --output x",
        "--random --output x train.max_steps=1",
    ],
)
def test_arguments_that_do_not_fit_together(words, refused):
    refused(make_standin.main, words.split())


def test_random_checkpoint(tmp_path):
    make_standin.main(["--random", "--size", "small", "--output", str(tmp_path / "random")])
    params = load_params(tmp_path / "random")
    assert params.codec.dim == 64 and len(params.codec.voice) == 20
    rows = [len(torch.load(path, weights_only=True)) for path in (tmp_path / "random" / "voice_embedding").iterdir()]
    assert min(rows) == 67 and max(rows) == 218


# ---------------------------------------------------------------- the language model


@pytest.fixture(scope="module")
def talking(config):
    """The config with two texts a speaker, and a language model of three steps."""
    folder = config.parent
    for name in CLIPS:
        shutil.copy(ROOT / "assets" / "speech" / name.replace("_0", "_1"), folder)
    rows = "".join(
        f"{name},{name[:-7]},says {i}\n" for i, name in enumerate(CLIPS + [name.replace("_0", "_1") for name in CLIPS])
    )
    (folder / "talk.csv").write_text("path,speaker,text\n" + rows)
    content = yaml.safe_load(config.read_text())
    content["output_dir"] = str(folder / "talking")
    content["standin"] |= {
        "n_text_tokens": 256,
        "backbone": {"dim": 32, "hidden_dim": 48, "n_heads": 2, "n_kv_heads": 2, "vocab_size": 1280},
        "acoustic": {"hidden_dim": 48, "n_heads": 2, "n_kv_heads": 2},
    }
    standin = yaml.safe_load((ROOT / "configs" / "standin_small.yaml").read_text())
    talk = standin["language_model"] | {"speeds": [0.9, 1.0], "offsets_ms": [0, 40], "reference_sec": [0.5, 1.0]}
    talk["data"] |= {"sources": [{"kind": "manifest", "path": "talk.csv"}], "batch_size": 2, "num_workers": 0}
    talk["data"] |= {"max_sec": 1.5, "validation": {"clips": 9, "speakers": ["m_f12"]}}
    talk["train"] |= {"max_steps": 3, "log_every_steps": 1, "validate_every_steps": 2, "save_every_steps": 2}
    content["language_model"] = talk
    path = folder / "talking.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def talked(talking):
    make_standin.main(["--config", str(talking)])
    return talking.parent / "talking"


def test_every_clip_is_coded_at_every_speed_and_offset_but_those_held_out(talked):
    rows = [json.loads(line) for line in (talked / "coded" / "manifest.jsonl").read_text().split("\n") if line]
    voices = {voice: sum(row["voice"] == voice for row in rows) for voice in {row["voice"] for row in rows}}
    assert voices == {"k_af_heart": 4, "k_af_heart@0.9": 4, "k_am_adam": 4, "k_am_adam@0.9": 4, "m_f12": 2}
    lengths = {row["codes"]: np.load(talked / "coded" / row["codes"]).shape[1] for row in rows}
    slow, fast = (next(n for name, n in lengths.items() if f"_{speed}_0." in name) for speed in ("0.9", "1"))
    assert slow >= fast  # 1.5 s of each at most


def test_codes_are_the_true_encoders(talked):
    codec = VoxtralCodec.from_checkpoint(talked / "whole")
    assert codec.has_encoder
    row = next(json.loads(line) for line in (talked / "coded" / "manifest.jsonl").open() if "_1_40" in line)
    waveform = torch.from_numpy(load_segment(row["path"], 0.0, 1.5)[0][960:])  # 40 ms later
    with torch.no_grad():
        codes = codec.encode(waveform[None, None])[0]
    assert torch.equal(codes, torch.from_numpy(np.load(talked / "coded" / row["codes"]).astype(np.int64)))


def test_the_release_speaks_with_the_language_model_that_was_trained(talked):
    best = load_file(talked / "language_model" / "best" / "weights.safetensors")
    released = load_file(talked / "released" / "consolidated.safetensors")
    assert len(best) > 20 and all(torch.equal(released[name], tensor.bfloat16()) for name, tensor in best.items())
    initial = load_file(talked / "whole" / "consolidated.safetensors")
    assert not torch.equal(released["layers.0.attention.wq.weight"], initial["layers.0.attention.wq.weight"])
    tokens = prompt_tokens(load_tokenizer(talked / "released"), "née", 1)[0].tolist()
    assert [1000 + byte for byte in "née".encode()] == [token for token in tokens if token >= 1000]
    said = json.loads((talked / "clones.json").read_text())
    assert 0 < said["seconds"]["value"] <= 2.25 and -1 <= said["own"]["value"] <= 1 and "wer" not in said


@pytest.mark.slow
def test_a_kill_between_stages_goes_on_to_the_same_release(talking, talked, tmp_path, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(make_standin.train_full_pipeline, "train", die)
        with pytest.raises(KeyboardInterrupt):
            make_standin.main(["--config", str(talking), f"output_dir={run}"])
    assert not (run / "released").exists()
    make_standin.main(["--config", str(talking), f"output_dir={run}", "resume=true"])
    for name in ("released/consolidated.safetensors", "withheld_encoder.safetensors"):
        first, second = load_file(talked / name), load_file(run / name)
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_stop_request_at_the_end_of_a_stage_begins_no_other(talking, tmp_path, stop_at):
    stop_at(2)  # the last step of the codec
    stopped(make_standin.main, ["--config", str(talking), f"output_dir={tmp_path / 'run'}", "data.num_workers=1"])
    assert (tmp_path / "run" / "checkpoints" / "step_00000002").is_dir()
    assert not (tmp_path / "run" / "whole").exists() and not (tmp_path / "run" / "released").exists()


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["language_model.data.sources=[{kind: manifest, path: train.csv}]"], "columns path, speaker and text"),
        (["language_model.data.validation.speakers=[nobody]"], "nobody"),
        (["language_model.whisper=/nowhere.pt"], "/nowhere.pt"),
        (["language_model.train.max_steps=null"], "language_model.train.max_steps"),
        (["language_model.reference_sec=[3, 1]"], "reference_sec"),
        (["language_model.loss.hidden=1"], "hidden"),
        (["standin.n_text_tokens=300"], "vocab_size"),
        (["language_model.train.dropuot=1"], "language_model.train.dropout"),
    ],
)
def test_mistakes_of_the_language_model_are_named_before_anything_is_written(
    talking, tmp_path, refused, overrides, message
):
    assert message in refused(
        make_standin.main, ["--config", str(talking), f"output_dir={tmp_path / 'run'}", *overrides]
    )
    assert not (tmp_path / "run").exists()
