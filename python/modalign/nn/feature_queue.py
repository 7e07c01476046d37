"""The features of the last batches, as negatives. [MoCo, CVPR 2020]"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import _arguments as arguments
from ..ops._gram_schmidt import unit

__all__ = ["FeatureQueue"]


class FeatureQueue(nn.Module):
    """A ring of the last `size` features, in the buffers `features` [size, width] and `position`, which a state_dict holds.

    >>> import torch
    >>> queue = FeatureQueue(size=3, width=2)
    >>> queue.push(torch.arange(8.0).reshape(4, 2))                  # more than there is room for: the last three stay
    >>> queue.features
    tensor([[6., 7.],
            [2., 3.],
            [4., 5.]])

    It starts with random unit rows, as published. `push` takes [B, width] of any B, wraps around, stores without a graph in the buffer's dtype, and does not
    wait for a GPU. Raises TypeError and ValueError, ``FeatureQueue: <argument> must ..., got ...``."""

    features: Tensor
    position: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        if size < 1 or width < 1:
            raise ValueError(f"FeatureQueue: size and width must be at least 1, got {size} and {width}")
        self.register_buffer("features", unit(torch.randn(size, width)))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, rows: Tensor) -> None:
        """Put rows in place of the oldest."""
        size, width = self.features.shape
        arguments.check_vectors("FeatureQueue", "rows", rows, "[B, width]")
        if rows.dim() != 2 or rows.shape[1] != width:
            raise ValueError(f"FeatureQueue: rows must be [B, width] with width = {width}, got {arguments.describe(rows)}")
        last = torch.arange(max(0, len(rows) - size), len(rows), device=self.features.device)
        self.features[(self.position + last) % size] = rows[-size:].to(self.features.dtype)
        self.position.add_(len(rows)).remainder_(size)

    def extra_repr(self) -> str:
        size, width = self.features.shape
        return f"size={size}, width={width}"
