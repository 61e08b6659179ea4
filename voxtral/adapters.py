"""LoRA adapters: which encoder they were trained with (with another one they do harm), and what they make of the
attention's weights."""

from pathlib import Path

from torch import Tensor

from voxtral.checkpoint import TORCH_DTYPES, SafetensorsFile, StoredTensor, check_shapes, digest
from voxtral.json_files import read_json, read_record, write_json
from voxtral.params import LORA_MODULES, CheckpointError, ModelParams

RECORD = "encoder.json"  # in the adapter's folder
# Keys of adapter_config.json that are read, checked, or do not change what is merged.
LORA_KEYS = set(
    """
    peft_type r lora_alpha target_modules init_lora_weights lora_dropout inference_mode task_type auto_mapping
    peft_version base_model_name_or_path revision
    """.split()
)


# ---------------------------------------------------------------- the encoder that an adapter belongs to


def encoder_digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of encoder tensors in bf16, as a checkpoint holds them: the same for a run's fp32 file."""
    return digest((name, tensors[name].detach().bfloat16()) for name in sorted(tensors))


def write_adapter_record(folder, encoder: str, tensors: dict[str, Tensor]) -> None:
    """encoder: where it can be found, in words; tensors: the encoder's."""
    write_json(Path(folder) / RECORD, {"encoder": encoder, "sha256": encoder_digest(tensors)})


def adapter_record(folder) -> dict:
    """What write_adapter_record() noted; empty for an adapter from elsewhere."""
    return read_record(Path(folder) / RECORD)


def check_adapter(folder, encoder) -> None:
    """Raises CheckpointError for an adapter that was trained with another encoder than that of the file `encoder`."""
    record = adapter_record(folder)
    if record and record.get("sha256") != encoder_digest(SafetensorsFile(encoder).read()):
        raise CheckpointError(
            f"{folder} was trained with another encoder than {encoder}: pass that one "
            f"({record.get('encoder')}), or train an adapter with this one."
        )


# ---------------------------------------------------------------- merging


def merged_weights(folder, stored: dict[str, StoredTensor], params: ModelParams) -> dict[str, StoredTensor]:
    """W + alpha / r * B A, summed in fp32 and rounded to the stored dtype, for every projection that a peft adapter of
    transformers' MistralModel holds. stored: the checkpoint's tensors. Raises CheckpointError for an adapter that does
    not fit or asks for more.
    """
    # transformers and peft take seconds to import, and most injections come without an adapter.
    from peft import LoraConfig

    from voxtral.backbone import halves_to_native, rotated_heads, to_native_name

    config_file, defaults = Path(folder) / "adapter_config.json", LoraConfig().to_dict()
    config = read_json(config_file)[1]
    for key, value in config.items():
        if key not in LORA_KEYS and value != defaults.get(key) and not (key not in defaults and not value):
            raise CheckpointError(
                f"{config_file}: {key} is {value}, which cannot be merged: "
                "train a plain LoRA of q_proj, k_proj, v_proj and o_proj."
            )
    if config.get("peft_type") != "LORA" or config.get("init_lora_weights", True) not in (True, False, "gaussian"):
        raise CheckpointError(
            f"{config_file} is not of a plain LoRA that starts from unchanged weights: train it with peft's LoraConfig "
            "and its default init_lora_weights."
        )

    file = SafetensorsFile(Path(folder) / "adapter_model.safetensors")
    shapes = {name: tuple(entry["shape"]) for name, entry in file.entries.items()}
    rank, sizes = config["r"], params.backbone
    modules = [module for module in LORA_MODULES if any(f".{module}." in name for name in shapes)]
    if not modules:
        raise CheckpointError(f"{file.path} holds no LoRA of {', '.join(LORA_MODULES)}.")
    names, expected = {}, {}  # names: native weight -> what its adapter's two tensors have in common
    for layer in range(sizes.n_layers):
        for module in modules:
            name = f"layers.{layer}.self_attn.{module}"
            native = to_native_name(name + ".weight")
            n_out, n_in = stored[native].shape
            names[native] = f"base_model.model.{name}.lora_"
            expected |= {names[native] + "A.weight": (rank, n_in), names[native] + "B.weight": (n_out, rank)}
    check_shapes(shapes, expected, file.path)
    for name in expected:
        if not file.tensor(name).isfinite().all():
            raise CheckpointError(f"{file.path}: {name} holds values that are no finite numbers.")

    n_heads = rotated_heads(sizes)

    def merged(native: str) -> Tensor:
        a, b = (file.tensor(names[native] + end).float() for end in ("A.weight", "B.weight"))
        projection = native.split(".")[-2]
        if projection in n_heads:  # the adapter saw rows in transformers' order
            b = halves_to_native(b, n_heads[projection], sizes.head_dim)
        weight = stored[native].read().float()
        return weight.addmm_(b, a, alpha=config["lora_alpha"] / rank).to(TORCH_DTYPES[stored[native].dtype])

    return {
        native: StoredTensor(stored[native].dtype, stored[native].shape, lambda native=native: merged(native))
        for native in names
    }
