"""What a checkpoint of phase 1 at full width takes: GB, and seconds to write it in a folder of yours.

Tensors of the real sizes are written by the run folder's own functions (2.4 GB of memory and of disk); what they hold
does not matter. `before`: what was saved until checkpoints left out what the model's own checkpoint has (computed, not
written).
"""

import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from voxtral.checkpoint import CODEC_PREFIX, ENCODER_PREFIXES
from voxtral.codec import VoxtralCodec
from voxtral.command_line import script_parser
from voxtral.config import EncoderConfig
from voxtral.discriminator import Discriminators
from voxtral.evaluation_report import markdown
from voxtral.params import parse_params
from voxtral.processes import Process
from voxtral.run_folder import RunFolder, Tensors, write_files
from voxtral.standin import full_params


def gigabytes(*groups: dict[str, torch.Tensor]) -> float:
    return sum(tensor.nbytes for group in groups for tensor in group.values()) / 1e9


def main(arguments=None) -> None:
    parser = script_parser(__doc__)
    parser.add_argument("folder", type=Path, help="where a checkpoint is written, and deleted again")
    options = parser.parse_args(arguments)
    config = EncoderConfig()
    with torch.device("meta"):
        codec = VoxtralCodec(parse_params(full_params()).codec).state_dict()
        judges = {f"judge.{name}": tensor for name, tensor in Discriminators(config.discriminator).state_dict().items()}
    encoder = {name: tensor for name, tensor in codec.items() if (CODEC_PREFIX + name).startswith(ENCODER_PREFIXES)}
    moments = [encoder, encoder, judges, judges]
    before = gigabytes(codec, codec, encoder, judges, *moments)
    after = gigabytes(encoder, encoder, judges, *moments)
    weights = gigabytes(encoder)

    def filled(tensors: dict) -> Tensors:
        return Tensors({name: torch.rand(tensor.shape) for name, tensor in tensors.items()})

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        run = RunFolder(folder, config, Process(0, 1, torch.device("cpu")), resume=False)
        parts = {
            "model": filled(encoder),
            "judges": filled(judges),
            **{f"moments_{i}": filled(part) for i, part in enumerate(moments)},
        }
        averages = filled(encoder)
        began = time.monotonic()
        run.save_best(partial(write_files, files={"encoder.safetensors": averages}))
        run.save_step(1, partial(write_files, files={"encoder.safetensors": averages}), parts, max_steps=1)
        seconds = time.monotonic() - began
        written = sum(path.stat().st_size for path in run.latest().iterdir()) / 1e9
    train = config.train
    print(
        markdown(
            ["full width, fp32", "before", "now"],
            [
                ["GB of a checkpoint", f"{before:.2f}", f"{after:.2f} (written: {written:.2f})"],
                [
                    "GB of a run",
                    f"{train.keep_last * before + weights:.1f}",
                    f"{train.keep_last * after + weights:.1f}, "
                    f"and {train.milestones} milestones {train.milestones * weights:.1f}",
                ],
                [
                    "a checkpoint every",
                    "1,000 steps; best/ at any of them",
                    f"{train.save_every_minutes:g} minutes, best/ with it",
                ],
                [
                    "seconds to write it and best/ here",
                    "",
                    f"{seconds:.1f}: {seconds / 60 / train.save_every_minutes:.2%} of the time",
                ],
            ],
        )
    )


if __name__ == "__main__":
    main()
