"""What tells the views of an object apart. [JM3D, ACM MM 2023]"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops._arguments import describe

__all__ = ["ViewEmbedding"]


class ViewEmbedding(nn.Module):
    """Adds to the feature of a view what is learnt for its angle and for its kind, then a LayerNorm. [JM3D, ACM MM 2023, section 3.2]

    >>> import torch
    >>> embed = ViewEmbedding(16)
    >>> embed(torch.randn(2, 4, 16), degree=torch.tensor([0, 1, 29, 1]), kind=torch.tensor([0, 0, 0, 1])).shape
    torch.Size([2, 4, 16])

    Parameters: width D; degrees, how many bins the circle has, 30 of 12 degrees as published; kinds, two as published: 0 for RGB, 1 for depth.

    The call takes views [B, V, D] and int64 degree, kind [B, V], or [V] where all objects are seen alike, and gives [B, V, D] for
    `nn.functional.jma_loss(enhanced=...)`. Embeddings start at a normal distribution of standard deviation 0.02, which is small beside a unit vector's
    entries. Raises TypeError and ValueError for shapes and dtypes, IndexError for a bin that is not there."""

    def __init__(self, width: int = 512, *, degrees: int = 30, kinds: int = 2) -> None:
        super().__init__()
        self.degree, self.kind, self.norm = nn.Embedding(degrees, width), nn.Embedding(kinds, width), nn.LayerNorm(width)
        for table in (self.degree, self.kind):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, views: Tensor, degree: Tensor, kind: Tensor) -> Tensor:
        width = self.norm.normalized_shape[0]
        if views.dim() != 3 or views.shape[2] != width:
            raise ValueError(f"ViewEmbedding: views must be [B, V, D] with D = {width}, got {describe(views)}")
        for name, index in (("degree", degree), ("kind", kind)):
            if not isinstance(index, Tensor) or index.dtype is not torch.int64:
                raise TypeError(f"ViewEmbedding: {name} must be an int64 tensor [B, V] or [V], got {describe(index)}")
            if tuple(index.shape) not in (tuple(views.shape[:2]), tuple(views.shape[1:2])):
                raise ValueError(f"ViewEmbedding: {name} must be [B, V] = {list(views.shape[:2])} or [V], got {describe(index)}")
        return self.norm(views + self.degree(degree) + self.kind(kind))
