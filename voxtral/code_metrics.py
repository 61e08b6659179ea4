"""Measures of codes: what validation, logging and evaluation report."""

import torch
from torch import Tensor

from voxtral.codec import valid_mask


def code_statistics(codes: Tensor, n_frames: Tensor, semantic_size: int, n_levels: int) -> dict[str, Tensor]:
    """Statistics of codes [B, 1 + acoustic_dim, L] over frames l < n_frames[i]; tensors on the device of `codes`.

    semantic_used: distinct semantic codes; semantic_perplexity: exp of their entropy (of a collapsed codebook both
    are 1); level_histogram [n_levels]: shares of the acoustic levels; extremes_share: share of levels 0 and
    n_levels - 1 (of saturated levels it is 1).
    """
    valid = valid_mask(n_frames, codes.shape[-1])
    ones = valid.float()
    semantic = torch.zeros(semantic_size, device=codes.device).index_add_(0, codes[:, 0].flatten(), ones.flatten())
    share = semantic / semantic.sum()
    perplexity = (-(share * share.clamp(min=1e-12).log()).sum()).exp()
    weight = ones[:, None].expand_as(codes[:, 1:])
    levels = torch.zeros(n_levels, device=codes.device).index_add_(0, codes[:, 1:].flatten(), weight.flatten())
    levels = levels / levels.sum()
    return {
        "semantic_used": (semantic > 0).sum().float(),
        "semantic_perplexity": perplexity,
        "extremes_share": levels[0] + levels[-1],
        "level_histogram": levels,
    }


def code_agreement(codes: Tensor, reference: Tensor, n_frames: Tensor) -> dict[str, Tensor]:
    """Shares of codes [B, 1 + acoustic_dim, L] that equal the reference's, over frames l < n_frames[i].

    semantic_equal; levels_equal (exactly); levels_within_1 (off by at most one level).
    """
    valid = valid_mask(n_frames, codes.shape[-1])
    difference = (codes - reference).abs()
    semantic, levels = difference[:, 0][valid], difference[:, 1:].transpose(1, 2)[valid]
    return {
        "semantic_equal": (semantic == 0).float().mean(),
        "levels_equal": (levels == 0).float().mean(),
        "levels_within_1": (levels <= 1).float().mean(),
    }
