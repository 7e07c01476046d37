"""k-means: careful seeding (Arthur and Vassilvitskii, 2007) and Lloyd's steps, the best of several starts."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["kmeans"]


def kmeans(x: Tensor, count: int, *, starts: int = 10, steps: int = 100, seed: int = 0) -> Tensor:
    """The cluster of each row, int64 [N]; ties to the lowest. A cluster that loses all its rows takes the row that is farthest from its own centre among those that are not alone."""
    rows, generator = x.double(), torch.Generator().manual_seed(seed)
    best, clusters = float("inf"), torch.zeros(len(x), dtype=torch.int64, device=x.device)
    for _ in range(starts):
        centres = _seeds(rows, count, generator)
        before = None
        for _ in range(steps):
            distance, found = torch.cdist(rows, centres).square().min(1)
            sizes = found.bincount(minlength=count)
            for empty in (sizes == 0).nonzero()[:, 0].tolist():
                shared = found.bincount(minlength=count)[found] > 1   # the only row of a cluster stays
                found[torch.where(shared, distance, -1).argmax()] = empty
            sizes = found.bincount(minlength=count).clamp(min=1)
            centres = torch.zeros_like(centres).index_add(0, found, rows) / sizes[:, None]
            if before is not None and torch.equal(found, before):
                break
            before = found
        spread = float((rows - centres[found]).square().sum())
        if spread < best:
            best, clusters = spread, found
    return clusters


def _seeds(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    chosen = [int(torch.randint(len(x), (1,), generator=generator))]
    nearest = (x - x[chosen[0]]).square().sum(1)
    while len(chosen) < count:
        total = nearest.cumsum(0)
        draw = torch.rand((), generator=generator, dtype=torch.float64).to(x.device) * total[-1]
        chosen.append(int(torch.searchsorted(total, draw, right=True).clamp(max=len(x) - 1)))
        nearest = torch.minimum(nearest, (x - x[chosen[-1]]).square().sum(1))
    return x[chosen]
