"""Items as their similarities to anchors that two spaces share: zero-shot alignment without training. [Moschella et al., ICLR 2023; ASIF, NeurIPS 2023]"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import knn

__all__ = ["RelativeRepresentation", "relative_representation"]

PANEL_ROWS = 256


@dataclass(frozen=True)
class RelativeRepresentation:
    """The `top` largest similarities of each row to m anchors, raised to a power and brought to length 1.

    values [N, top], indices int64 [N, top] (-1: none), anchors m. ``similarity`` compares with those of another space over the same m anchors.
    """

    values: Tensor
    indices: Tensor
    anchors: int

    def dense(self) -> Tensor:
        """[N, m]"""
        rows = self.values.new_zeros(len(self.values), self.anchors + 1)
        return rows.scatter(1, self.indices.where(self.indices >= 0, self.anchors), self.values)[:, : self.anchors]

    def similarity(self, other: RelativeRepresentation) -> Tensor:
        """[N, M]: cosines of the two sparse vectors, a panel of rows at a time; nothing of N x m or M x m is stored."""
        if self.anchors != other.anchors:
            raise ValueError(f"RelativeRepresentation.similarity: other must have as many anchors, {self.anchors}, got {other.anchors}")
        weights = other.values.where(other.indices >= 0, 0)
        found = []
        for start in range(0, len(self.values), PANEL_ROWS):
            here = slice(start, start + PANEL_ROWS)
            panel = RelativeRepresentation(self.values[here], self.indices[here], self.anchors).dense()
            bags = torch.nn.functional.embedding_bag(other.indices.clamp(min=0), panel.T.contiguous(), mode="sum", per_sample_weights=weights)
            found.append(bags.T)
        return torch.cat(found) if found else self.values.new_empty(0, len(other.values))


def relative_representation(x: Tensor, anchors: Tensor, top: int | None = None, power: float = 1.0) -> RelativeRepresentation:
    """Cosines to anchors, the `top` largest of each row to the power `power`, negative ones 0, unit length.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> pictures, texts = torch.randn(40, 16), torch.randn(40, 16)                      # 40 pairs: the anchors of both spaces
    >>> x, y = relative_representation(pictures[:3], pictures, 5, 8), relative_representation(texts, texts, 5, 8)
    >>> x.similarity(y).argmax(1)
    tensor([0, 1, 2])

    x [N, D], anchors [m, D], both of one space; the other space's representation is over the anchors that are paired with these, row by row. top: 1 to m, default m (Moschella et
    al.); ASIF has 800 of 1.6 million and power 8 (recalled from the paper, not checked against its code). Found by `ops.knn`: no matrix N x m. Does not change when a space is turned or
    scaled. Raises ValueError and TypeError: ``relative_representation: <argument> must ..., got ...``.
    """
    op = "relative_representation"
    for name, each in (("x", x), ("anchors", anchors)):
        if not isinstance(each, Tensor) or each.dim() != 2 or not each.is_floating_point():
            raise ValueError(f"{op}: {name} must be a floating-point matrix, got {list(each.shape) if isinstance(each, Tensor) else type(each).__name__}")
    m = len(anchors)
    top = m if top is None else top
    if isinstance(top, bool) or not isinstance(top, int) or not 1 <= top <= m:
        raise ValueError(f"{op}: top must be from 1 to the number of anchors, {m}, got {top!r}")
    if isinstance(power, bool) or not isinstance(power, (int, float)) or not power > 0:
        raise ValueError(f"{op}: power must be positive, got {power!r}")
    found = knn(x, anchors, top)
    values = found.values.clamp(min=0) ** power
    length = values.norm(dim=1, keepdim=True)
    return RelativeRepresentation(torch.where(length > 0, values / torch.where(length > 0, length, 1), 0), found.indices, m)
