"""Puts a trained encoder, and a LoRA adapter if there is one, into a Voxtral checkpoint, so that serving clones voices.

The checkpoint is copied tensor by tensor (a few hundred MB of memory) and appears under its name when it is whole:
interrupted at any moment, you have either the old one or the new one. params.json gains the key that serving's request
gate looks for. VOICE_CLONE.md, beside the release's own README.md, says what was injected, its SHA-256, and what it was
trained on; --eject removes it.
"""

import sys
from pathlib import Path

from voxtral.command_line import check_options, script_parser

EXAMPLES = """examples:
  # a new folder beside the checkpoint; what does not change is hard-linked
  python inject_encoder.py --checkpoint Voxtral-4B-TTS-2603 --encoder runs/encoder/best/encoder.safetensors \\
      --output Voxtral-4B-TTS-2603-clone

  # the newest best encoder under runs/, merged with the adapter of phase 2, and checked on a clip
  python inject_encoder.py --lora runs/full/best/adapter --output Voxtral-clone --verify assets/speech/k_af_heart_0.opus

  # in the folder itself, and back again, byte for byte
  python inject_encoder.py --in-place
  python inject_encoder.py --eject
"""

COMMAND_LINE = script_parser(__doc__, EXAMPLES, checkpoint=True)
option = COMMAND_LINE.add_argument
option("--encoder", metavar="FILE", type=Path, help="of a run (default: the newest runs/*/best/encoder.safetensors)")
option("--lora", metavar="DIR", type=Path, help="peft adapter folder to merge into the attention weights")
option("--weights", metavar="FILE", type=Path, help="weights.safetensors of phase 2, in the place of the checkpoint's")
option("--verify", metavar="CLIP", help="read the result back, compare the codes of this audio file")
where = COMMAND_LINE.add_mutually_exclusive_group(required=True)
where.add_argument("--output", metavar="DIR", type=Path, help="folder to write; one of an earlier run is replaced")
where.add_argument("--in-place", action="store_true", help="change the checkpoint itself; --eject undoes it")
where.add_argument("--eject", action="store_true", help="undo an earlier --in-place")

if __name__ == "__main__":
    COMMAND_LINE.parse_args()  # --help and mistyped options: before imports that take seconds

import torch

from voxtral.adapters import adapter_record
from voxtral.checkpoint import SafetensorsFile
from voxtral.codec import VoxtralCodec
from voxtral.errors import UserError, one_sentence
from voxtral.inject import eject, inject
from voxtral.params import load_params
from voxtral.reference import prepare_reference


def newest_encoder(runs: Path) -> Path:
    """The encoder.safetensors written last among runs/*/best. Raises UserError when there is none."""
    found = sorted(runs.glob("*/best/encoder.safetensors"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"no {runs}/*/best/encoder.safetensors: train one with train_encoder.py, or pass --encoder.")
    return found[-1]


def changed_shares(codes: torch.Tensor, reference: torch.Tensor) -> str:
    """Codes [1, 1 + acoustic_dim, L] -> how many differ, in words."""
    differs = (codes != reference).float()
    return f"{differs[:, 0].mean():.2%} of the semantic codes, {differs[:, 1:].mean():.2%} of the acoustic levels"


@torch.no_grad()
def verify(folder: Path, encoder: Path, clip: str) -> None:
    """Reads the injected encoder back and compares it, and the codes of a clip, with the encoder file in fp32.

    Raises UserError when what the folder holds is not the rounded encoder.
    """
    waveform = prepare_reference(clip).waveform
    codec = VoxtralCodec.from_checkpoint(folder)
    file = SafetensorsFile(encoder)
    for name, tensor in codec.encoder_tensors().items():
        if not torch.equal(tensor, file.tensor(name).bfloat16().float()):
            raise UserError(f"{folder}: {name} is not the tensor of {encoder}: inject it again.")
    rounded, served = codec.quantizer.encode(codec.encode_latent(waveform)), codec.encode(waveform)
    codec.load_encoder(file.read(), encoder)
    exact = codec.quantizer.encode(codec.encode_latent(waveform))
    n_frames = exact.shape[-1]
    print(
        f"verified: all {len(file.entries)} encoder tensors are those of {encoder}, rounded to bf16; of {clip} "
        f"({n_frames} frames), against fp32,"
    )
    print(f"  bf16 weights change {changed_shares(rounded, exact)}")
    print(f"  serving, which computes in bf16 from the waveform to the levels, changes {changed_shares(served, exact)}")


def lost_voices(checkpoint: str, output: Path) -> list[str]:
    """Voices of an earlier --output that the checkpoint does not have, and that a new one therefore lacks."""
    if not (output / "params.json").is_file():
        return []
    return sorted(set(load_params(output).codec.voice) - set(load_params(checkpoint).codec.voice))


def main(arguments=None) -> None:
    options = COMMAND_LINE.parse_args(arguments)

    with one_sentence():
        check_options(options)
        if options.eject:
            print(f"{eject(options.checkpoint)} is again what it was before the injection")
            return
        encoder = options.encoder or newest_encoder(Path("runs"))
        if options.encoder is None:
            print(f"encoder: {encoder}")
        lost = lost_voices(options.checkpoint, options.output) if options.output else []
        folder = inject(options.checkpoint, encoder, options.lora, options.output, options.weights)
        if options.lora and not adapter_record(options.lora):
            print(f"{options.lora} does not say which encoder it was trained with", file=sys.stderr)
        parts = "the encoder" + (" and the merged LoRA" if options.lora else "")
        parts += " and the other weights of phase 2" if options.weights else ""
        print(f"{folder} now holds {parts}{'; --eject takes it out again' if options.in_place else ''}")
        if lost:
            print(
                f"voices of the earlier {folder} to be registered again (patch_tokenizer.py): {', '.join(lost)}",
                file=sys.stderr,
            )
        if options.verify:
            verify(folder, encoder, options.verify)


if __name__ == "__main__":
    main()
