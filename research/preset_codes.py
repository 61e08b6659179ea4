"""Presets back to codes at the real sizes, on made-up tables: how many frames come back, and how long it takes.

    python research/preset_codes.py                          # 2,900 frames, as many as the release's 20 presets have
    python research/preset_codes.py --frames 500 --device cpu --structure smooth=0.02

Rows are scaled so that a preset's rows have the norm of the release's (4.4), and their mean that of its voices' (3.8).
`independent`: every row of the table is drawn alone. `smooth=X`: the rows of an acoustic codebook lie on a parabola,
and a share X of their deviation is their own, so that neighbouring levels are hard to tell apart.
"""

import sys
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from voxtral.codec import codebook_offsets
from voxtral.command_line import add_shared, script_parser
from voxtral.errors import UserError, one_sentence
from voxtral.layout import meta_codec
from voxtral.params import N_SPECIAL_IDS, ModelParams, parse_params
from voxtral.presets import recover
from voxtral.processes import start_process
from voxtral.standin import full_params

ROW_NORM, MEAN_NORM = 4.4, 3.8  # of a frame, and of a voice's mean frame, in the release's presets
SEMANTIC_SHARE = 0.1  # of the variance of a frame
STRUCTURES = ["independent", "smooth=0.3", "smooth=0.1", "smooth=0.03", "smooth=0.01"]


def made_up_codes(params: ModelParams, n_frames: int, generator) -> Tensor:
    """[1 + acoustic_dim, n_frames]: some semantic codes far more often than others, levels around the middle."""
    sizes = params.codec
    often = 1 / torch.arange(1.0, sizes.semantic_codebook_size + 1)
    semantic = torch.multinomial(often, n_frames, replacement=True, generator=generator)
    latent = 0.5 * torch.randn(sizes.acoustic_dim, n_frames, generator=generator)
    latent += 0.3 * torch.randn(sizes.acoustic_dim, 1, generator=generator)
    levels = ((latent.tanh() + 1) / 2 * (sizes.acoustic_codebook_size - 1)).round().long()
    return torch.cat([semantic[None], levels])


def made_up_table(params: ModelParams, structure: str, codes: Tensor, generator) -> Tensor:
    """[rows, dim] bfloat16, scaled to the release's norms on these codes."""
    sizes, dim = params.codec, params.dim
    n_levels, own = sizes.acoustic_codebook_size, float(structure.partition("=")[2] or 1)

    def draw(*shape):
        return torch.randn(*shape, dim, generator=generator)

    position = torch.linspace(-1, 1, n_levels)
    curve = torch.stack([position, position.square()], dim=1)
    curve = (curve - curve.mean(dim=0)) / curve.std(dim=0) / 2**0.5  # [levels, 2]
    levels = torch.einsum("ld,kdn->kln", curve, draw(sizes.acoustic_dim, 2)) * (1 - own**2) ** 0.5
    levels += own * draw(sizes.acoustic_dim, n_levels)
    semantic = draw(sizes.semantic_codebook_size) * (SEMANTIC_SHARE / (1 - SEMANTIC_SHARE) * sizes.acoustic_dim) ** 0.5
    table = torch.zeros(params.audio_embedding_size, dim)
    semantic_start, *starts = (codebook_offsets(sizes) + N_SPECIAL_IDS).tolist()
    table[semantic_start : semantic_start + len(semantic)] = semantic
    for start, rows in zip(starts, levels):
        table[start : start + n_levels] = rows
    frames = summed(params, codes, table)
    table *= (ROW_NORM**2 - MEAN_NORM**2) ** 0.5 / (frames - frames.mean(dim=0)).square().sum(dim=1).mean().sqrt()
    mean = summed(params, codes, table).mean(dim=0)
    wanted = draw() * MEAN_NORM / dim**0.5
    for start in starts:  # every row has a part that all of its codebook share
        table[start : start + n_levels] += (wanted - mean) / len(starts)
    return table.bfloat16()


def summed(params: ModelParams, codes: Tensor, table: Tensor) -> Tensor:
    return meta_codec(params).embed_codes(codes[None], table)[0]


def main(arguments=None) -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--frames", type=int, default=2900, help="(default: 2900)")
    parser.add_argument(
        "--structure", action="append", default=[], help=f"repeatable (default: {', '.join(STRUCTURES)})"
    )
    add_shared(parser, "--device")
    options = parser.parse_args(arguments)
    with one_sentence():
        for structure in options.structure:
            if structure.partition("=")[0] not in ("independent", "smooth"):
                raise UserError(f"--structure is {structure}; it must be independent or smooth=SHARE.")
        device = start_process(options.device).device
        params, generator = parse_params(full_params()), torch.Generator().manual_seed(0)
        codes = made_up_codes(params, options.frames, generator)
        codec = meta_codec(params)
        row = "{:<14} {:>12} {:>16} {:>14} {:>14} {:>8}".format
        print(row("structure", "row norm", "nearest level", "exact to a bit", "codes right", "seconds"))
        for structure in options.structure or STRUCTURES:
            codec.audio_embedding = made_up_table(params, structure, codes, generator).float().to(device)
            frames = summed(params, codes, codec.audio_embedding.cpu()).bfloat16()
            first = codebook_offsets(params.codec)[1] + N_SPECIAL_IDS
            level = codec.audio_embedding[first : first + params.codec.acoustic_codebook_size]
            started = time.perf_counter()
            found = recover(codec, frames)
            seconds = time.perf_counter() - started
            norm = frames.float().norm(dim=1).mean()
            near = torch.pdist(level).min() / norm
            print(
                row(
                    structure,
                    f"{norm:.2f}",
                    f"{near:.4f}",
                    f"{found.exact.float().mean():.2%}",
                    f"{(found.codes == codes).all(dim=0).float().mean():.2%}",
                    f"{seconds:.1f}",
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
