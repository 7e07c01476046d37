"""Do two spaces order their distances alike? [representational similarity analysis; Kriegeskorte et al. 2008]"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import knn_values
from ..ops._arguments import describe
from ._neighbors import check_paired

__all__ = ["rsa"]


def mean_ranks(x: Tensor) -> Tensor:
    """Ranks from 0; equal values share the mean of theirs."""
    _, inverse, counts = x.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    return (last - (counts + 1) / 2)[inverse]


def rsa(X: Tensor, Y: Tensor, *, pairs: int | None = 8192, generator: torch.Generator | None = None) -> Tensor:
    """Spearman's correlation of the Euclidean distances between rows in X and in Y, equal ones with their mean rank. From -1 to 1; not differentiable.

    >>> import torch
    >>> x = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    >>> rsa(x, 2 * x + 1)
    tensor(1.)

    pairs: where there are at least twice as many pairs of rows, so many are drawn, without replacement, by `generator` (default: one seeded with 0), as published;
    None: all n (n - 1) / 2. X [n, D], Y [n, E], n of 3 or more. Raises ValueError and TypeError, also where all distances are equal.
    """
    x, y = check_paired("rsa", X, Y, fewest=3)
    if pairs is not None and (isinstance(pairs, bool) or not isinstance(pairs, int) or pairs < 2):
        raise ValueError(f"rsa: pairs must be None or a whole number of 2 or more, got {describe(pairs)}")
    n = len(x)
    total = n * (n - 1) // 2
    if pairs is not None and total >= 2 * pairs:
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        chosen = torch.empty(0, dtype=torch.int64)
        while len(chosen) < pairs:  # few are drawn twice
            chosen = torch.cat([chosen, torch.randint(total, (pairs,), generator=generator, device=generator.device).cpu()]).unique()
        chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(int(chosen.sum()) % 2**31))[:pairs]].to(x.device)
        # Pair number p = j (j - 1) / 2 + i with i < j.
        j = ((1 + (1 + 8 * chosen.double()).sqrt()) / 2).long()
        j = torch.where(j * (j - 1) // 2 > chosen, j - 1, torch.where((j + 1) * j // 2 <= chosen, j + 1, j))
        i = chosen - j * (j - 1) // 2
    else:
        i, j = torch.triu_indices(n, n, 1, device=x.device)
    ranks = []
    for z in (x, y):
        distance = torch.cat([knn_values(z.detach()[a], z.detach(), b[:, None], metric="euclidean")[:, 0] for a, b in zip(i.split(1 << 16), j.split(1 << 16), strict=True)])
        rank = mean_ranks(distance).double()
        ranks.append(rank - rank.mean())
    length = ranks[0].norm() * ranks[1].norm()
    if length == 0:
        raise ValueError("rsa: X and Y must have distances that differ, got equal ones")
    return (ranks[0] @ ranks[1] / length).to(torch.promote_types(torch.float32, torch.promote_types(X.dtype, Y.dtype)))
