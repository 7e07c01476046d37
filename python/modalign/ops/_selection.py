"""Selecting with a promised order: by value, then by index."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["best_of", "merged", "smallest"]


def smallest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values, indices) of the k smallest of each row in order, equal ones by index, NaN last; all, if there are fewer.

    torch.topk finds the right values but any of the indices that share the last one.
    """
    width = x.shape[1]
    k = min(k, width)
    values, indices = x.topk(k, largest=False)
    last = values[:, -1:]
    tied = (x == last) | (x.isnan() & last.isnan())
    lowest = torch.where(tied, torch.arange(width, dtype=torch.int32, device=x.device), width).topk(k, largest=False).values
    before = (values < last) | (last.isnan() & ~values.isnan())
    place = torch.arange(k, device=x.device) - before.sum(1, keepdim=True)
    indices = torch.where(before, indices, lowest.gather(1, place.clamp(min=0))).sort(1).values
    values, order = x.gather(1, indices).sort(dim=1, stable=True)
    return values, indices.gather(1, order)


def merged(best: tuple[Tensor, Tensor] | None, found: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The k smallest of both lists. `best` holds the lower indices and goes first, so a stable sort settles ties."""
    if best is None:
        return found
    values, order = torch.cat([best[0], found[0]], 1).sort(dim=1, stable=True)
    return values[:, :k], torch.cat([best[1], found[1]], 1).gather(1, order[:, :k])


def best_of(score: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest scores of lists beside each other, whatever their order, equal ones by index."""
    indices, order = indices.sort(dim=1)
    score, best = score.gather(1, order).sort(dim=1, descending=True, stable=True)
    return score[:, :k], indices.gather(1, best[:, :k])
