"""Result tuples of ops. Named tuples are pytrees, so torch.compile, vmap and tree_map see through them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Neighbors(NamedTuple):
    """The best candidates of every row, best first.

    values : Tensor [B, k]
    indices : Tensor int64 [B, k]
    """

    values: Tensor
    indices: Tensor

    def to(self, device: torch.device | str) -> Neighbors:
        return Neighbors(self.values.to(device), self.indices.to(device))


class HardNegatives(NamedTuple):
    """One negative for each anchor and for each candidate; -1 where there is none.

    candidates : Tensor int64 [B]
    anchors : Tensor int64 [C]
    """

    candidates: Tensor
    anchors: Tensor

    def to(self, device: torch.device | str) -> HardNegatives:
        return HardNegatives(self.candidates.to(device), self.anchors.to(device))


class Matches(NamedTuple):
    """Pairs of rows and how sure they are.

    pairs : Tensor int64 [P, 2]
    confidence : Tensor [P]
    """

    pairs: Tensor
    confidence: Tensor

    def to(self, device: torch.device | str) -> Matches:
        return Matches(self.pairs.to(device), self.confidence.to(device))


class SegmentMax(NamedTuple):
    """The best row of every segment for every candidate; -1 where a segment is empty.

    values : Tensor [S, A]
    indices : Tensor int64 [S, A]
    """

    values: Tensor
    indices: Tensor

    def to(self, device: torch.device | str) -> SegmentMax:
        return SegmentMax(self.values.to(device), self.indices.to(device))


class AttentionRowStatistics(NamedTuple):
    """How sharp every query's attention is.

    entropy : Tensor [B, H, Nq]
        In nats.
    maximum : Tensor [B, H, Nq]
        The largest probability.
    """

    entropy: Tensor
    maximum: Tensor

    def to(self, device: torch.device | str) -> AttentionRowStatistics:
        return AttentionRowStatistics(self.entropy.to(device), self.maximum.to(device))


class Selection(NamedTuple):
    """Tokens in the order in which they were taken.

    indices : Tensor int64 [B, n]
    radii : Tensor [B, n]
        How far each was from those before it.
    """

    indices: Tensor
    radii: Tensor

    def to(self, device: torch.device | str) -> Selection:
        return Selection(self.indices.to(device), self.radii.to(device))


class NeighborGraph(NamedTuple):
    """The edges from points to their neighbours in compressed rows, the columns of a row in rising order.

    row_pointers : Tensor int64 [N + 1]
        The edges of point i are those from row_pointers[i] to row_pointers[i + 1].
    columns : Tensor int64 [E]
    values : Tensor [E]
    """

    row_pointers: Tensor
    columns: Tensor
    values: Tensor

    @property
    def edge_index(self) -> Tensor:
        """[2, E]: the point, and below it its neighbour."""
        rows = torch.arange(len(self.row_pointers) - 1, device=self.columns.device).repeat_interleave(self.row_pointers.diff())
        return torch.stack([rows, self.columns])

    def to(self, device: torch.device | str) -> NeighborGraph:
        return NeighborGraph(*(each.to(device) for each in self))
