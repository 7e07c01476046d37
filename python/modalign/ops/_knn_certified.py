"""The neighbours of the highest precision, found in a lower one: more candidates than asked for, their exact scores, and a bound of what all others can have."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._selection import best_of

__all__ = ["SPARE", "certified", "error_bound"]

SPARE = 32  # candidates beyond k
SHORT = 1e-15  # the square of an element below this loses digits in float32


def error_bound(queries: Tensor, points: Tensor, metric: str, bias: Tensor | None) -> Tensor:
    """[N] how far a score in precision "high" and the one in "highest" lie apart at most, csrc/ops/knn.h; inf where that is not known.

    A product in three bfloat16 parts is off by 2^-15 |q| |x| (the product of the low parts is left out, and these are rounded), and D sums in float32 are on
    either side. Lengths are such products themselves.
    """
    relative = 2.0**-15 + queries.shape[1] * 2.0**-21
    known = [(size == 0) | (size > SHORT) | size.isnan() for size in (_largest_element(queries), _largest_element(points))]  # NaN is no neighbour in either
    longest = points.norm(dim=1).nan_to_num(nan=0.0, posinf=torch.inf).amax()
    length = queries.norm(dim=1)
    bound = relative * length * (1 if metric == "cosine" else longest)
    if metric in ("sqeuclidean", "euclidean"):
        bound = bound + relative * longest.square()
    if bias is not None:
        bound = bound + 2.0**-22 * bias.abs().nan_to_num(nan=0.0, posinf=0.0).amax()
    return torch.where(known[0] & known[1].all() & longest.isfinite() & length.isfinite(), bound, torch.inf)


def _largest_element(rows: Tensor) -> Tensor:
    """Of every row, in magnitude, without a copy of them."""
    if rows.shape[1] == 0:
        return rows.new_zeros(len(rows))
    return torch.linalg.vector_norm(rows, torch.inf, dim=1)


def certified(
    k: int, points: int, rough: Callable[[int], tuple[Tensor, Tensor]], exact: Callable[[Tensor], tuple[Tensor, Tensor]], redo: Callable[[Tensor], tuple[Tensor, Tensor]], bound: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(scores, indices, squares) with the bits of the highest precision.

    `rough(k)`: scores and indices of a lower one; `exact(indices)`: scores of these in the highest and squares; `redo(rows)`: scores and indices of some rows
    in the highest. `bound` [N] is that of both.
    """
    wide = min(k + SPARE, points)
    found, indices = rough(wide)
    score, squares = exact(indices)
    score = torch.where(score > -torch.inf, score, -torch.inf)  # NaN is no neighbour
    score, indices = best_of(score, torch.where(score > -torch.inf, indices, -1), k)
    everyone = found[:, -1] == -torch.inf if wide < points else torch.ones_like(bound, dtype=torch.bool)
    rows = (~(bound.isfinite() & (everyone | (score[:, -1] > found[:, -1] + bound)))).nonzero()[:, 0]
    if len(rows):
        again = redo(rows)
        score[rows], indices[rows] = again[0], again[1]
    return score, indices, squares
