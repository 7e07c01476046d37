"""What the neighbourhood metrics share: how many neighbours, whose, and how many of them two lists have in common."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops import knn
from ..ops._arguments import check_vectors, describe

RULES = {
    "rice": lambda n: math.ceil(round(2 * n ** (1 / 3), 9)),
    "sqrt": lambda n: math.isqrt(n - 1) + 1,
    "sturges": lambda n: math.ceil(round(math.log2(n) + 1, 9)),
}


def check_paired(metric: str, X: object, Y: object, fewest: int = 2) -> tuple[Tensor, Tensor]:
    """Two matrices whose rows belong together."""
    x, y = check_vectors(metric, "X", X, "[n, D]"), check_vectors(metric, "Y", Y, "[n, D]")
    for name, each in (("X", x), ("Y", y)):
        if each.dim() != 2:
            raise ValueError(f"{metric}: {name} must have 2 dimensions [n, D], got {describe(each)}")
    if len(x) != len(y) or x.device != y.device:
        raise ValueError(f"{metric}: Y must have as many rows as X and its device, got {describe(y)} beside {describe(x)}")
    if len(x) < fewest:
        raise ValueError(f"{metric}: X must have {fewest} rows or more, got {len(x)}")
    return x, y


def neighbor_count(metric: str, k: object, n: int) -> int:
    """k itself, or what a rule of thumb says for n points."""
    if isinstance(k, str):
        if k not in RULES:
            raise ValueError(f"{metric}: k must be a whole number or one of {', '.join(RULES)}, got {k!r}")
        return min(RULES[k](n), n - 1)
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"{metric}: k must be a whole number or one of {', '.join(RULES)}, got {describe(k)}")
    if not 1 <= k < n:
        raise ValueError(f"{metric}: k must be from 1 to n - 1 = {n - 1}, got {k}")
    return k


def neighbor_lists(x: Tensor, k: int, normalize: bool = True, exclude_self: bool = True) -> Tensor:
    """[n, k], nearest first; the point itself left out by its index."""
    return knn(x.detach(), k=k, metric="cosine" if normalize else "dot", exclude_self=exclude_self).indices


def in_common(a: Tensor, b: Tensor) -> Tensor:
    """[n]: how many entries of row i of `a` are in row i of `b`; `b` sorted. -1 is no entry."""
    place = torch.searchsorted(b, a).clamp(max=b.shape[1] - 1)
    return ((b.gather(1, place) == a) & (a >= 0)).sum(1)
