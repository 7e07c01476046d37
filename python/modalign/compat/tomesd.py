"""The matching of Token Merging for Stable Diffusion, under its released name, on `modalign.ops.match_tokens`.

>>> import torch
>>> from modalign.compat.tomesd import bipartite_soft_matching_random2d
>>> x = torch.randn(2, 64, 8)                                       # 8 x 8 places
>>> merge, unmerge = bipartite_soft_matching_random2d(x, 8, 8, 2, 2, 30)
>>> merge(x).shape, unmerge(merge(x)).shape
(torch.Size([2, 34, 8]), torch.Size([2, 64, 8]))
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..ops import match_tokens
from .tome import do_nothing

__all__ = ["bipartite_soft_matching_random2d"]


def bipartite_soft_matching_random2d(
    metric: Tensor, w: int, h: int, sx: int, sy: int, r: int, no_rand: bool = False, generator: torch.Generator | None = None
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """(merge, unmerge): one token of every cell of sy x sx places, drawn for all items alike (`no_rand`: the first), stays; of all others r join the most similar of these.

    Output: tokens that stay, by falling similarity, then those of the cells. Places beyond the last whole cell are sources.
    """
    if r <= 0:
        return do_nothing, do_nothing
    B, N, _ = metric.shape
    if N != h * w or min(sx, sy) < 1:
        raise ValueError(f"bipartite_soft_matching_random2d: metric must have h w = {h * w} tokens and cells of 1 x 1 or more, got {N} tokens, cells of {sy} x {sx}")
    rows, columns = h // sy, w // sx
    device = metric.device
    drawn = torch.zeros(rows, columns, dtype=torch.int64) if no_rand else torch.randint(sy * sx, (rows, columns), generator=generator)
    y = torch.arange(rows)[:, None] * sy + drawn // sx
    x = torch.arange(columns) * sx + drawn % sx
    stays = torch.zeros(N, dtype=torch.bool).index_fill(0, (y * w + x).flatten(), True)
    place = torch.arange(N)
    order = torch.cat([place[~stays], place[stays]]).to(device).expand(B, -1)
    match = match_tokens(metric, r, sources=N - rows * columns, order=order)
    return match.merge, match.unmerge
