"""Pairs that are each other's nearest again and again become training pairs. [UMAEA, ISWC 2023]"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import mutual_nearest
from ..ops._arguments import describe

__all__ = ["PseudoLabels"]


class PseudoLabels:
    """The unlinked entities of two sides, and the pairs among them that keep being mutual neighbours.

    Each `update` finds the pairs that are nearest to each other among what is left. The first of a block of checks makes them the candidates, every further one keeps the candidates that
    are among them still; when `blocks` blocks are full the candidates are links, and leave the pools. Published: 5 checks a block, promotion at every tenth, a check every five epochs.

    >>> import torch
    >>> labels = PseudoLabels(torch.arange(3), torch.arange(3), block=1, blocks=1)
    >>> labels.update(torch.eye(3), torch.eye(3)[[2, 0, 1]])                               # links: rows of both sides
    tensor([[0, 1],
            [1, 2],
            [2, 0]])
    >>> len(labels.left), len(labels.right)
    (0, 0)

    Parameters
    ----------
    left, right : Tensor int64 [P], [Q]
        Entities without a link, by their rows, each once.
    block, blocks : int
    """

    def __init__(self, left: Tensor, right: Tensor, block: int = 5, blocks: int = 2) -> None:
        for name, pool in (("left", left), ("right", right)):
            if not isinstance(pool, Tensor) or pool.dtype is not torch.int64 or pool.dim() != 1 or len(pool.unique()) != len(pool) or (len(pool) and int(pool.min()) < 0):
                raise ValueError(f"PseudoLabels: {name} must be an int64 tensor [P] of different rows, got {describe(pool)}")
        for name, number in (("block", block), ("blocks", blocks)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"PseudoLabels: {name} must be a whole number of 1 or more, got {number!r}")
        self.left, self.right, self.block, self.blocks, self.checks = left, right, block, blocks, 0
        self.candidates = left.new_empty(0, 2)

    @torch.no_grad()
    def update(self, left: Tensor, right: Tensor, **options: Any) -> Tensor:
        """One check by the present embeddings of all entities, [N, D] and [M, D]: the new links int64 [L, 2], none but at the end of the blocks. options: of `ops.mutual_nearest`; fewer
        `csls_neighbors` where a pool has fewer entities."""
        for name, rows, pool in (("left", left, self.left), ("right", right, self.right)):
            if len(pool) and int(pool.max()) >= len(rows):
                raise ValueError(f"PseudoLabels.update: {name} must have a row for each entity of its pool, {int(pool.max()) + 1} or more, got {len(rows)}")
        if options.get("metric") == "csls":  # the pools shrink
            options["csls_neighbors"] = max(1, min(options.get("csls_neighbors", 10), len(self.left), len(self.right)))
        found = mutual_nearest(left[self.left], right[self.right], **options) if len(self.left) and len(self.right) else self.candidates[:0]
        pairs = torch.stack([self.left[found[:, 0]], self.right[found[:, 1]]], 1)
        if self.checks % self.block == 0:
            self.candidates = pairs
        else:
            size = max([len(right), *(self.candidates[:, 1] + 1).tolist()])
            self.candidates = self.candidates[torch.isin(self.candidates[:, 0] * size + self.candidates[:, 1], pairs[:, 0] * size + pairs[:, 1])]
        self.checks += 1
        if self.checks % (self.block * self.blocks):
            return pairs[:0]
        links, self.candidates = self.candidates, self.candidates[:0]
        self.left, self.right = (pool[~torch.isin(pool, links[:, side])] for side, pool in enumerate((self.left, self.right)))
        return links
