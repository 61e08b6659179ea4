"""Which encoder a LoRA adapter was trained with: noted beside it, since with another one it does harm."""

import json
from pathlib import Path

from torch import Tensor

from voxtral.checkpoint import SafetensorsFile, digest, write_text
from voxtral.json_edit import read_json
from voxtral.params import CheckpointError

RECORD = "encoder.json"  # in the adapter's folder


def encoder_digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of encoder tensors in bf16, as a checkpoint holds them: the same for a run's fp32 file."""
    return digest((name, tensors[name].detach().bfloat16()) for name in sorted(tensors))


def write_adapter_record(folder, encoder: str, tensors: dict[str, Tensor]) -> None:
    """encoder: where it can be found, in words; tensors: the encoder's."""
    text = json.dumps({"encoder": encoder, "sha256": encoder_digest(tensors)}, indent=2) + "\n"
    write_text(Path(folder) / RECORD, text)


def adapter_record(folder) -> dict:
    """What write_adapter_record() noted; empty for an adapter from elsewhere."""
    path = Path(folder) / RECORD
    return read_json(path)[1] if path.is_file() else {}


def check_adapter(folder, encoder) -> None:
    """Raises CheckpointError for an adapter that was trained with another encoder than that of the file `encoder`."""
    record = adapter_record(folder)
    if record and record.get("sha256") != encoder_digest(SafetensorsFile(encoder).read()):
        raise CheckpointError(
            f"{folder} was trained with another encoder than {encoder}: pass that one "
            f"({record.get('encoder')}), or train an adapter with this one."
        )
