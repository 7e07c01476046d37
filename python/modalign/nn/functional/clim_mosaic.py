"""Mosaics of pictures, whose cells are regions with a known text. [CLIM, AAAI 2024]"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops import _arguments as arguments
from ...ops._registration import accumulation_dtype
from . import _features as inputs

__all__ = ["Mosaics", "clim_mosaic"]


class Mosaics(NamedTuple):
    """mosaics : Tensor [M, C, H, W]
    boxes : Tensor float32 [P, 5], one for each cell: the mosaic, then x0, y0, x1, y1 as shares of its width and height
    order : Tensor int64 [B], the picture in each box, then the pictures that stay single
    """

    mosaics: Tensor
    boxes: Tensor
    order: Tensor

    def to(self, device: torch.device | str) -> Mosaics:
        return Mosaics(*(tensor.to(device) for tensor in self))


def clim_mosaic(images: Tensor, grids: Sequence[int] = (2, 3, 4), *, generator: torch.Generator | None = None) -> Mosaics:
    """Put pictures of a batch together into mosaics of s x s cells, as many of each s as the batch fills, and resize them to the size of one picture.

    The published grids take 29 pictures for one mosaic of each; what a batch has beyond a multiple of 29 stays single. A group of s^2 pictures fills its
    mosaic row by row.

    >>> import torch
    >>> mosaics, boxes, order = clim_mosaic(torch.rand(6, 3, 32, 32), grids=[2])
    >>> mosaics.shape, boxes[1], order[len(boxes):]                               # cell 1 is the upper right one; pictures 4 and 5 stay single
    (torch.Size([1, 3, 32, 32]), tensor([0.0000, 0.5000, 0.0000, 1.0000, 0.5000]), tensor([4, 5]))

    Parameters: images float [B, C, H, W]; grids, cells along a side, each 1 or more; generator, to draw the order of the pictures on its own device; without
    one they are taken in the order of the batch.

    Returns Mosaics(mosaics, boxes, order) in the dtype of the images, mosaics of the first grid first. Bicubic with antialiasing, in float32 for half types:
    a few pixels at the edges of cells mix with their neighbours. Differentiable in images.

    Raises TypeError and ValueError, ``clim_mosaic: <argument> must ..., got ...``; a batch that does not fill each grid once is an error.

    Paper: Wu et al., "CLIM: contrastive language-image mosaic for region representation", AAAI 2024, section 3.2."""
    op = "clim_mosaic"
    dtype = images.dtype if isinstance(images, Tensor) else None
    (images,) = inputs.check_features(op, images=(images, "[B, C, H, W]"))
    if not isinstance(grids, Sequence) or not grids or not all(isinstance(s, int) and not isinstance(s, bool) and s >= 1 for s in grids):
        raise ValueError(f"{op}: grids must be whole numbers of at least 1, got {grids!r}")
    B, C, H, W = images.shape
    needed = sum(s * s for s in grids)
    if B < needed:
        raise ValueError(f"{op}: images must be a batch of at least {needed}, one picture for each cell of grids {tuple(grids)}, got {B}")
    rounds, device = B // needed, images.device
    order = torch.arange(B) if generator is None else torch.randperm(B, generator=generator, device=generator.device)
    order = order.to(device)
    mosaics, boxes, groups = [], [], order.split([*(rounds * s * s for s in grids), B - rounds * needed])
    for number, (s, group) in enumerate(zip(grids, groups, strict=False)):
        cells = images[group].reshape(rounds, s, s, C, H, W).permute(0, 3, 1, 4, 2, 5).reshape(rounds, C, s * H, s * W)
        mosaics.append(F.interpolate(cells, size=(H, W), mode="bicubic", antialias=True))
        mosaic, row, column = (at.flatten() for at in torch.meshgrid(*(torch.arange(n, device=device) for n in (rounds, s, s)), indexing="ij"))
        boxes.append(torch.stack([mosaic + rounds * number, column / s, row / s, (column + 1) / s, (row + 1) / s], 1))
    return Mosaics(torch.cat(mosaics).to(dtype), torch.cat(boxes), order)
