"""Do the CUDA graphs of train_encoder.py disturb each other when they run at once?

Two graphs that were captured on one stream may share cuBLAS's workspace (pytorch issue 193402), and Whisper's is
replayed beside the codec's. Here both are recorded as train_encoder.py does it, and replayed on the same inputs first
one after the other, then at once, as often as asked; every output and every gradient is compared bit for bit. The same
comparison of one after the other with itself says which tensors differ by chance alone (sums whose order the GPU
chooses). Exit code 1: some differ at once that never do one after the other.
"""

import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from make_standin import make_random
from voxtral.asr import WhisperTeacher
from voxtral.codec import VoxtralCodec, ceil_div
from voxtral.command_line import script_parser
from voxtral.config import EncoderConfig, check_encoder_config, load_config
from voxtral.data import SAMPLE_RATE
from voxtral.encoder_training import TrainingModel
from voxtral.errors import UserError, one_sentence
from voxtral.processes import start_process
from voxtral.quantizer import QuantizationDraws
from voxtral.run import SideStream

EXAMPLES = """examples:
  # the codec at full width with random weights beside Whisper base, 300 times, some minutes on one GPU
  python benchmarks/concurrent_graphs.py --replays 300 asr.model=base.pt data.batch_size=32
"""


class Graphs:
    """Codec (forward and backward) and Whisper, recorded as in a training, on inputs that stay the same."""

    def __init__(self, config: EncoderConfig, checkpoint: str, device: torch.device):
        torch.manual_seed(config.seed)
        codec = VoxtralCodec.from_checkpoint(checkpoint)
        codec.requires_grad_(False)
        for parameter in codec.encoder_parameters():
            parameter.requires_grad_(True)
        self.device, self.side = device, SideStream(device)
        self.teacher = WhisperTeacher(config.asr, config.data.max_sec, device)
        self.model = TrainingModel(codec, self.teacher.width).to(device).train()
        n_samples = round(config.data.max_sec * SAMPLE_RATE)
        self.n_frames = ceil_div(n_samples, codec.params.frame_size)
        self.audio = 0.1 * torch.randn(config.data.batch_size, 1, n_samples, device=device)
        self.lengths = torch.full((len(self.audio),), n_samples, device=device)
        draws = QuantizationDraws.sample(0, len(self.audio), codec.params.acoustic_dim, self.n_frames, device)
        self.inputs = (self.audio, self.lengths, *vars(draws).values())
        self.autocast = torch.autocast(
            device.type, torch.bfloat16, enabled=config.train.precision == "bf16", cache_enabled=False
        )
        if device.type == "cuda":
            self.teacher.record(len(self.audio))
            with self.autocast:
                self.model = torch.cuda.make_graphed_callables(self.model, self.inputs)

    def replay(self, at_once: bool) -> dict[str, torch.Tensor]:
        """Name -> copy of every output and gradient."""
        self.model.zero_grad()
        if at_once:
            with self.side:
                targets = self.teacher(self.audio, self.lengths, self.n_frames)
        else:
            targets = self.teacher(self.audio, self.lengths, self.n_frames)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        with self.autocast:
            outputs = self.model(*self.inputs)
        (
            outputs[0].square().mean() + outputs[1].float().square().mean() + outputs[4].float().square().mean()
        ).backward()
        self.side.wait()
        found = {f"whisper.{name}": tensor for name, tensor in vars(targets).items()}
        found |= {f"codec.output.{i}": tensor for i, tensor in enumerate(outputs)}
        found |= {f"codec.gradient.{name}": p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        return {name: tensor.detach().clone() for name, tensor in found.items()}


def differing(graphs: Graphs, expected: dict[str, torch.Tensor], n_replays: int, at_once: bool) -> dict[str, int]:
    """Name of a tensor -> in how many replays it differed from what is expected."""
    counts = dict.fromkeys(expected, 0)
    for _ in range(n_replays):
        for name, tensor in graphs.replay(at_once).items():
            counts[name] += not torch.equal(tensor, expected[name])
    return {name: count for name, count in counts.items() if count}


def main(arguments=None) -> None:
    parser = script_parser(__doc__, EXAMPLES)
    parser.add_argument(
        "--config", metavar="YAML", default="configs/encoder.yaml", help="as of train_encoder.py (default: %(default)s)"
    )
    parser.add_argument("--replays", metavar="N", type=int, default=300, help="of each kind (default: 300)")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings that override the YAML; checkpoint=DIR, in the place of random weights at full width",
    )
    options = parser.parse_intermixed_args(arguments)
    with one_sentence(), tempfile.TemporaryDirectory() as folder:
        if options.replays < 1:
            raise UserError(f"--replays is {options.replays}; it must be 1 or more.")
        config = load_config(EncoderConfig, options.config, options.overrides)
        check_encoder_config(config)
        if not config.checkpoint:
            make_random("codec", folder)
        device = start_process(config.device).device
        graphs = Graphs(config, config.checkpoint or folder, device)
        expected = graphs.replay(at_once=False)
        alone = differing(graphs, expected, options.replays, at_once=False)
        together = differing(graphs, expected, options.replays, at_once=True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU, where nothing runs at once"
    suspicious = {key: count for key, count in together.items() if key not in alone}
    print(f"{len(expected)} tensors, {options.replays} replays each on {name}, PyTorch {torch.__version__}")
    print(f"one after the other: {len(alone)} tensors differ from the first replay {alone or ''}")
    print(
        f"at once: {len(together)} tensors differ from it, "
        f"{len(suspicious)} of them never one after the other {suspicious or ''}"
    )
    sys.exit(1 if suspicious else 0)


if __name__ == "__main__":
    main()
