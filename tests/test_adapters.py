"""What phase 2 trains goes into a checkpoint with its own encoder only; validation hears an adapter as it will be."""

import json

import pytest
import torch
from conftest import command_line, write_encoder
from safetensors.torch import load_file
from test_full_pipeline import clips_root, command, encoder, folder, make_model, shake_lora  # noqa: F401, fixtures
from test_inject import write_adapter

import inject_encoder
import train_full_pipeline
from voxtral.adapters import encoder_digest
from voxtral.checkpoint import EMBEDDING_NAME, Checkpoint, SafetensorsFile
from voxtral.codec import VoxtralCodec
from voxtral.distillation import compare
from voxtral.inject import inject


def test_validation_hears_the_adapter_without_dropout(make_model):
    model, _, batch = make_model("lora.dropout=0.5")
    shake_lora(model)
    first, again = (compare(model.eval(), [batch], "cpu") for _ in range(2))
    plain, _, _ = make_model()
    plain.load_state_dict(model.state_dict())
    assert first == again == compare(plain.eval(), [batch], "cpu")
    torch.manual_seed(0)
    assert compare(model.train(), [batch], "cpu") != first  # what the test would not notice otherwise


@pytest.fixture(scope="module")
def adapter(command, tmp_path_factory):
    """Of a run of one step, with its run folder's own record."""
    run = tmp_path_factory.mktemp("adapted") / "run"
    train_full_pipeline.main(command(run, "train.max_steps=1"))
    return run / "best" / "adapter"


def test_an_adapter_goes_with_its_encoder_only(adapter, folder, encoder, tmp_path, refused):
    record = json.loads((adapter / "encoder.json").read_text())
    assert record == {"encoder": str(encoder), "sha256": encoder_digest(load_file(encoder))}
    injected = inject(folder, encoder, adapter, tmp_path / "out")
    assert encoder_digest(VoxtralCodec.from_checkpoint(injected).encoder_tensors()) == record["sha256"]  # bf16 by now
    other = write_encoder(tmp_path / "other.safetensors", folder, seed=7)
    options = command_line(checkpoint=folder, encoder=other, lora=adapter, output=tmp_path / "wrong")
    said = refused(inject_encoder.main, options)
    assert str(encoder) in said and str(other) in said and not (tmp_path / "wrong").exists()
    options = command_line(checkpoint=folder, encoder=encoder, lora=tmp_path / "none", output=tmp_path / "wrong")
    assert refused(inject_encoder.main, options).startswith(f"error: {tmp_path}/none/adapter_config.json is missing")


def test_an_adapter_trained_beside_its_encoder_goes_with_that_one(command, folder, encoder, tmp_path):
    train_full_pipeline.main(command(tmp_path / "run", "train.max_steps=1", "train.trainable=[lora,encoder]"))
    best = tmp_path / "run" / "best"
    inject(folder, best / "encoder.safetensors", best / "adapter", tmp_path / "out")
    with pytest.raises(ValueError, match="another encoder"):
        inject(folder, encoder, best / "adapter", tmp_path / "wrong")


def test_an_adapter_from_elsewhere_is_injected_and_said_so(folder, encoder, tmp_path, capsys):
    write_adapter(tmp_path / "adapter", folder)
    inject_encoder.main(
        command_line(checkpoint=folder, encoder=encoder, lora=tmp_path / "adapter", output=tmp_path / "out")
    )
    assert "does not say which encoder" in capsys.readouterr().err


def test_a_trained_embedding_goes_into_the_checkpoint(command, folder, encoder, tmp_path, refused):
    train_full_pipeline.main(command(tmp_path / "run", "train.max_steps=1", "train.trainable=[embedding]"))
    weights = tmp_path / "run" / "best" / "weights.safetensors"
    common = {"checkpoint": folder, "encoder": encoder, "weights": weights}
    inject_encoder.main(command_line(**common, output=tmp_path / "out"))
    found, before = (Checkpoint(path).read([EMBEDDING_NAME])[EMBEDDING_NAME] for path in (tmp_path / "out", folder))
    trained = SafetensorsFile(weights).read()[EMBEDDING_NAME]
    assert torch.equal(found, trained.to(found.dtype)) and not torch.equal(found, before)
    for changes, said in (
        ({"in_place": True}, "use --output"),
        ({"checkpoint": tmp_path / "out", "weights": None, "output": tmp_path / "x"}, "weights.safetensors in it"),
        ({"weights": encoder, "output": tmp_path / "x"}, "no tensor that the checkpoint has"),
    ):
        assert said in refused(inject_encoder.main, command_line(**common | changes))
