"""How fast a checkpoint speaks: frames per second, real-time factor, time to first audio, memory, and where time goes.

END_AUDIO is overlooked, so every run makes the same number of frames. Prompts are random embeddings: tokenizing, which
takes less than a millisecond, is left out. 12.5 frames are one second of audio.
"""

import gc
import sys
import time
from collections.abc import Callable
from math import prod
from pathlib import Path
from statistics import median

import torch
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding

sys.path.insert(0, str(Path(__file__).parents[1]))
from voxtral.acoustic import AcousticTransformer
from voxtral.backbone import Backbone
from voxtral.cached_backbone import CachedBackbone
from voxtral.codec import VoxtralCodec
from voxtral.command_line import add_shared, script_parser
from voxtral.errors import UserError, one_sentence
from voxtral.generation import FrameLoop, Models, graphed
from voxtral.params import N_SPECIAL_IDS, parse_params
from voxtral.processes import start_process
from voxtral.standin import full_params
from voxtral.streaming import CHUNK_FRAMES, StreamingDecoder, left_context
from voxtral.tts import BLOCK, FIRST_BLOCK

EXAMPLES = """examples:
  python benchmarks/generation.py --random-full
  python benchmarks/generation.py --checkpoint Voxtral-4B-TTS-2603 --batch-sizes 1 64 --frames 500
"""
REPEATS = 3


def random_models(device: torch.device) -> Models:
    """The released sizes with random weights, made on the device: bf16, the codec float32."""
    params = parse_params(full_params())
    torch.manual_seed(0)
    with torch.device("meta"):
        backbone, acoustic = Backbone(params), AcousticTransformer(params)
    for module in (backbone, acoustic):
        fill(module.to(torch.bfloat16).to_empty(device=device))
    backbone.model.rotary_emb = MistralRotaryEmbedding(backbone.model.config).to(device)  # computed, not a weight
    with device:  # small, so not by way of meta: its attention has buffers that are computed, no weights
        codec = VoxtralCodec(params.codec)
    fill(codec)
    codec.audio_embedding = 0.02 * torch.randn(params.audio_embedding_size, params.dim, device=device)
    return Models(backbone.eval(), acoustic.eval(), codec.eval())


@torch.no_grad()
def fill(module: torch.nn.Module) -> None:
    """Random weights at scales that keep activations finite, like voxtral.standin.random_tensor."""
    for name, tensor in module.state_dict().items():
        if name.endswith(("norm.weight", "layernorm.weight", "original0", "cluster_usage")):
            tensor.fill_(1)
        elif name.endswith(("attention_scale", "ffn_scale")):
            tensor.fill_(0.05)
        else:
            tensor.normal_(std=0.02 if "embed_tokens" in name else prod(tensor.shape[1:]) ** -0.5)


def measured(run: Callable[[], None], device: torch.device, repeats: int = REPEATS, calls: int = 1) -> float:
    """Median seconds of a call of `run`, after one that does not count."""

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()

    run()
    seconds = []
    for _ in range(repeats):
        wait()
        started = time.perf_counter()
        for _ in range(calls):
            run()
        wait()
        seconds.append((time.perf_counter() - started) / calls)
    return median(seconds)


@torch.no_grad()
def measure(
    models: Models, backbone: CachedBackbone, batch_size: int, n_prompt: int, n_frames: int
) -> dict[str, float]:
    """Seconds by name, for one batch size; `memory`: GiB of weights, cache and activations at the peak."""
    device, codec = backbone.device, models.codec
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    loop = FrameLoop(backbone, models.acoustic, codec, batch_size, n_prompt + n_frames, n_frames)
    prompts = list(0.02 * torch.randn(batch_size, n_prompt, backbone.sizes.dim, device=device))
    noise = torch.randn(batch_size, n_frames, codec.params.acoustic_dim)

    def codes(end: int) -> torch.Tensor:
        return (loop.ids[:, :end].cpu().transpose(1, 2) - N_SPECIAL_IDS).clamp(min=0)  # END_AUDIO is no code

    def speak(total: int, block: int) -> None:
        """What TTS.takes and StreamingDecoder do, without looking for the end."""
        loop.start(prompts, noise)
        decoder = StreamingDecoder(codec)
        for done in range(0, total, block):
            end = min(done + block, total)
            for _ in range(end - done):
                loop.step()
            for _ in decoder.extend(codes(end)):
                pass

    def loop_alone() -> None:
        loop.start(prompts, noise)
        for _ in range(n_frames):
            loop.step()

    result = {
        "first audio": measured(lambda: speak(FIRST_BLOCK, FIRST_BLOCK), device, 2 * REPEATS + 1),
        "prompt": measured(lambda: loop.start(prompts, noise), device),
        "all": measured(lambda: speak(n_frames, BLOCK), device) / n_frames,
        "loop": measured(loop_alone, device) / n_frames,
    }
    if on_gpu:
        result["memory"] = torch.cuda.max_memory_allocated() / 2**30

    x, slot = loop.hidden[:, None].clone(), torch.full((1,), n_prompt, device=device)
    steps = {
        "backbone": lambda: backbone(x, loop.cache, slot, loop.n_padding, loop.cache.n_slots),
        "acoustic": lambda: models.acoustic.frame(loop.hidden, loop.noise[:, 0]),
    }
    for name, step in steps.items():
        result[name] = measured(graphed(step) if on_gpu else step, device, calls=20)
    context = left_context(codec)
    for name, n_new in (("codec, streamed", BLOCK), ("codec, in chunks", CHUNK_FRAMES)):
        whole = torch.zeros(batch_size, codec.params.n_codebooks, context + n_new, dtype=torch.long, device=device)
        result[name] = measured(lambda: codec.decode(whole), device) / n_new
    return result


def row(result: dict[str, float], batch_size: int, frame_rate_hz: float) -> dict[str, str]:
    """Column -> cell."""
    real_time = frame_rate_hz * result["all"]
    per_frame = ("loop", "backbone", "acoustic", "codec, streamed", "codec, in chunks")
    return {
        "batch": str(batch_size),
        "frames/s": f"{batch_size / result['all']:.0f}",
        "RTF of an item": f"{real_time:.3f}",
        "x real time": f"{batch_size / real_time:.1f}",
        "first audio ms": f"{1000 * result['first audio']:.0f}",
        "peak GiB": f"{result['memory']:.1f}" if "memory" in result else "-",
        "prompt ms": f"{1000 * result['prompt']:.2f}",
        **{f"{name} ms/frame": f"{1000 * result[name]:.2f}" for name in per_frame},
    }


def main(arguments=None) -> None:
    parser = script_parser(__doc__, EXAMPLES, checkpoint=True)
    add = parser.add_argument
    add("--random-full", action="store_true", help="random weights of the released sizes, no checkpoint")
    add("--batch-sizes", metavar="B", type=int, nargs="+", default=[1, 8, 32])
    add("--frames", metavar="N", type=int, default=250, help="of every run (default: 250, 20 s)")
    add("--prompt", metavar="N", type=int, default=200, help="positions (default: 200, a voice of 12 s and a sentence)")
    add_shared(parser, "--device")
    options = parser.parse_args(arguments)

    with one_sentence():
        if not (options.checkpoint or options.random_full):
            raise UserError("nothing to measure: pass --checkpoint or --random-full, or set VOXTRAL_CKPT.")
        device, started = start_process(options.device).device, time.perf_counter()
        if options.random_full:
            models = random_models(device)
        else:
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            models = Models.from_checkpoint(options.checkpoint, device, dtype)
        backbone = CachedBackbone(models.backbone)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        print(
            f"{name}, torch {torch.__version__}, {backbone.dtype}, prompt of {options.prompt} positions, "
            f"{options.frames} frames, weights there after {time.perf_counter() - started:.0f} s\n"
        )
        for batch_size in options.batch_sizes:
            result = measure(models, backbone, batch_size, options.prompt, options.frames)
            cells = row(result, batch_size, models.codec.params.frame_rate_hz)
            if batch_size == options.batch_sizes[0]:
                print(f"| {' | '.join(cells)} |\n|{' --- |' * len(cells)}")
            print(f"| {' | '.join(cells.values())} |", flush=True)
            gc.collect()  # the graphs of this batch size, and their memory


if __name__ == "__main__":
    main()
