"""The presets back to codes: the only outputs of the true encoder that the release holds.

A row of a preset is the sum of one table row per codebook, rounded to bfloat16 once (spec section 4), and the table is
in the checkpoint. `python -m voxtral.presets` shows which frames come back, and writes their codes.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from voxtral.command_line import check_options, script_parser

COMMAND_LINE = script_parser(__doc__, checkpoint=True, module="voxtral.presets")
COMMAND_LINE.add_argument(
    "--output", metavar="DIR", type=Path, help="gets NAME.npy, int16 [37, L], of those that come back"
)
if __name__ == "__main__":
    COMMAND_LINE.parse_args()  # --help and mistyped options: before imports that take seconds

import torch
from torch import Tensor

from voxtral.codec import VoxtralCodec, codebook_offsets
from voxtral.errors import DataError, one_sentence
from voxtral.known_codes import PRESETS, known_codes, write_codes
from voxtral.params import N_SPECIAL_IDS, CodecParams
from voxtral.voices import preset_embeddings

NOISE = 0.005  # of the root mean square of a row: a little above what bfloat16 leaves (0.0017)
WIDTHS = (16, 256)  # paths kept; a wider search for those frames only that the one before did not find
PATHS_AT_ONCE = 4096  # frames times paths in memory
MAX_ERROR = 0.01  # relative, of a frame that is found: two levels are 0.014 apart and more (research/preset_codes.py)


@dataclass
class Preset:
    """`codes` [1 + acoustic_dim, L] int64; `exact` [L] bool: their rows sum up to the preset's to the last bit;
    `errors` [L] float32: distance of the sum from the preset's row, relative."""

    codes: Tensor
    exact: Tensor
    errors: Tensor

    @property
    def problem(self) -> str:
        """What keeps it from being used as known codes; empty: nothing."""
        lost = int((self.errors > MAX_ERROR).sum())
        return f"{lost} of its {len(self.errors)} frames are no sum of table rows" if lost else ""


class CodeSearch:
    """Finds the codes of rows: semantic codes by what no choice of levels can explain, then the levels of one codebook
    after the other, `width` paths at a time. What is undecided counts as Gaussian, with the spread of its table rows.

    The levels are a least-squares problem whose unknowns are one 1 per codebook. With the Cholesky factor of its normal
    equations, ridge included, a path's cost grows by one block of a triangle for each codebook, and at the end is the
    squared error but for a constant.
    """

    def __init__(self, table: Tensor, params: CodecParams):
        """table: the checkpoint's audio embedding [rows, dim]."""
        semantic_start, *starts = (codebook_offsets(params) + N_SPECIAL_IDS).tolist()
        self.n_levels = params.acoustic_codebook_size
        self.semantic = table[semantic_start : semantic_start + params.semantic_codebook_size].double()
        levels = torch.stack([table[start : start + self.n_levels] for start in starts]).double()  # [K, n_levels, dim]
        self.mean = levels.mean(dim=1).sum(dim=0)
        self.deviations = (levels - levels.mean(dim=1, keepdim=True)).flatten(0, 1)
        power = self.deviations.square().mean() * len(starts) + self.semantic.square().mean()
        ridge = NOISE**2 * power * self.n_levels * torch.eye(len(self.deviations), device=table.device)
        self.factor = torch.linalg.cholesky(self.deviations @ self.deviations.T + ridge)  # [K * n_levels] * 2, lower
        self.explained = self.explain(self.semantic)
        self.unexplained = self.semantic.square().sum(dim=1) - self.explained.square().sum(dim=1)

    def explain(self, rows: Tensor) -> Tensor:
        """[F, dim] -> [F, K * n_levels]: what levels can explain of the rows, with the same inner products."""
        return torch.linalg.solve_triangular(self.factor, self.deviations @ rows.T, upper=False).T

    def __call__(self, rows: Tensor, width: int) -> Tensor:
        """[F, dim] -> codes [F, 1 + acoustic_dim] int64"""
        rows = rows.double() - self.mean
        left = self.explain(rows)
        cost = self.unexplained - 2 * (rows @ self.semantic.T - left @ self.explained.T)
        cost, semantic = cost.topk(min(width, cost.shape[1]), largest=False)  # [F, paths]
        left = left[:, None] - self.explained[semantic]  # [F, paths, K * n_levels]
        codes = semantic[..., None]
        for start in reversed(range(0, len(self.factor), self.n_levels)):
            block = self.factor[start : start + self.n_levels]
            added = torch.cdist(left[..., start:], block[:, start : start + self.n_levels]).square()
            cost, chosen = (cost[..., None] + added).flatten(1).topk(min(width, added[0].numel()), largest=False)
            path, level = (chosen // self.n_levels)[..., None], chosen % self.n_levels
            left = left.take_along_dim(path, dim=1)[..., :start] - block[level, :start]
            codes = torch.cat([codes.take_along_dim(path, dim=1), level[..., None]], dim=2)
        return codes[:, 0].flip(1).roll(1, dims=1)


@torch.no_grad()
def recover(codec: VoxtralCodec, rows: Tensor, device="cpu") -> Preset:
    """Rows [L, dim] bfloat16, END_AUDIO left out -> their codes; those that no search finds come as near as it gets."""
    table, rows = codec.audio_embedding.to(device), rows.to(device)
    search = CodeSearch(table, codec.params)
    codes = rows.new_zeros(len(rows), codec.params.n_codebooks, dtype=torch.long)
    errors = rows.new_full((len(rows),), torch.inf, dtype=torch.float32)
    exact = torch.zeros_like(errors, dtype=torch.bool)
    for width in WIDTHS:
        missing = (errors > MAX_ERROR).nonzero().flatten()
        for some in missing.split(PATHS_AT_ONCE // width) if len(missing) else ():
            found = search(rows[some], width)
            sums = codec.embed_codes(found.T[None], table)[0].float()
            codes[some], exact[some] = found, (sums.bfloat16() == rows[some]).all(dim=1)
            errors[some] = (sums - rows[some]).norm(dim=1) / rows[some].float().norm(dim=1)
    return Preset(codes.T.cpu(), exact.cpu(), errors.cpu())


def preset_codes(codec: VoxtralCodec, folder, device="cpu") -> dict[str, Preset]:
    """Name -> codes of each preset of the checkpoint `folder`, whose codec this is. Voices that were registered later
    are left out: they are no outputs of the true encoder. Raises CheckpointError when the voices cannot be read."""
    rows = preset_embeddings(folder)
    if not rows:
        return {}
    parts = vars(recover(codec, torch.cat([*rows.values()]), device)).values()
    lengths = [len(each) for each in rows.values()]
    return {name: Preset(*part) for name, *part in zip(rows, *(tensor.split(lengths, dim=-1) for tensor in parts))}


def codes_to_match(where: str, codec: VoxtralCodec, folder, device="cpu") -> tuple[list[Tensor], list[tuple[str, str]]]:
    """match.codes -> codes [1 + acoustic_dim, L >= 2] of the presets of the checkpoint `folder`, or of clips; (name,
    reason) of those that cannot be used. Raises DataError when none can."""
    if where != PRESETS:
        return known_codes(where, codec.params)
    found = preset_codes(codec, folder, device)
    bad = [(f"preset {name}", preset.problem) for name, preset in found.items() if preset.problem]
    codes = [preset.codes for preset in found.values() if not preset.problem and preset.codes.shape[1] > 1]
    if not codes:
        reason = ": ".join(bad[0]) if bad else "it has none of two frames or more"
        raise DataError(
            f"match.codes: no preset of {folder} comes back to codes ({reason}); make clips with codes by "
            "generate_clips.py, and name their folder."
        )
    return codes, bad


def main(arguments=None) -> None:
    options = COMMAND_LINE.parse_args(arguments)
    with one_sentence():
        check_options(options)
        started = time.perf_counter()
        found = preset_codes(VoxtralCodec.from_checkpoint(options.checkpoint), options.checkpoint)
        row = "{:<24} {:>6} {:>14} {:>14}  {}".format
        print(row("preset", "frames", "exact to a bit", "largest error", "state"))
        for name, preset in found.items():
            exact, largest = int(preset.exact.sum()), f"{preset.errors.max():.4f}"
            print(row(name, len(preset.errors), exact, largest, preset.problem or "ok"))
            if options.output and not preset.problem:
                write_codes(options.output / f"{name}.npy", preset.codes)
        print(f"{time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
