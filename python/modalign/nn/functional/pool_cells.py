"""Means of feature maps over boxes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops import _arguments as arguments
from . import _features as inputs
from ._values import looked_at

__all__ = ["pool_cells"]


def pool_cells(features: Tensor, boxes: Tensor) -> Tensor:
    """The mean of a feature map over each box, pixels cut by an edge counting by the part inside.

    Where edges of boxes are edges of pixels this is average pooling, and what RoIAlign gives.

    >>> import torch
    >>> pool_cells(torch.arange(4.0).reshape(1, 1, 2, 2), torch.tensor([[0, 0, 0, 0.75, 1.0]]))[0]          # column 0 and half of column 1
    tensor([1.3333])

    Parameters: features float [M, D, H, W]; boxes float [P, 5]: the map, then x0, y0, x1, y1 as shares of its width and height, as `clim_mosaic` gives them;
    what lies outside [0, 1] is cut off.

    Returns [P, D] in the dtype of the features; 0 for a box without area. Differentiable in features. A NaN reaches boxes of its map.

    Sums over rectangles from a table of sums, in float32 (float64): memory M H W D + 16 P D.

    Raises TypeError and ValueError, ``pool_cells: <argument> must ..., got ...``; for a map that is not there on the CPU only, elsewhere the nearest counts.

    Paper: Wu et al., "CLIM", AAAI 2024, section 3.2 (RoIAlign: He et al., ICCV 2017)."""
    op = "pool_cells"
    dtype = features.dtype if isinstance(features, Tensor) else None
    (features,) = inputs.check_features(op, features=(features, "[M, D, H, W]"))
    (boxes,) = inputs.check_features(op, boxes=(boxes, "[P, 5]"))
    M, _, H, W = features.shape
    if boxes.shape[1] != 5 or boxes.device != features.device:
        raise ValueError(f"{op}: boxes must be [P, 5] on {features.device}, got {arguments.describe(boxes)}")
    if H == 0 or (M == 0 and len(boxes)):
        raise ValueError(f"{op}: features must hold a map of at least one pixel, got {arguments.describe(features)}")
    image = boxes[:, 0].long()
    if looked_at(boxes) and bool(((image < 0) | (image >= M)).any()):
        raise ValueError(f"{op}: boxes must name maps from 0 to M - 1 = {M - 1}, got {image.min().item()} to {image.max().item()}")
    with torch.autocast(features.device.type, enabled=False):
        sums = F.pad(features.cumsum(2).cumsum(3), (1, 0, 1, 0)).permute(0, 2, 3, 1)  # of all pixels above and to the left of a corner
        x0, y0, x1, y1 = boxes[:, 1:].detach().to(sums.dtype).clamp(0, 1).unbind(1)
        rows, down = _edges(y0, y1, H)
        columns, across = _edges(x0, x1, W)
        corners = sums[image.clamp(0, max(0, M - 1))[:, None, None], rows[:, :, None], columns[:, None, :]]  # [P, 4, 4, D]
        return torch.einsum("pr,pc,prcd->pd", down, across, corners).to(dtype)


def _edges(low: Tensor, high: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Four places [P, 4] in a row of running sums, and the factors that make of them the mean between the shares `low` and `high` of that row."""
    edges = torch.stack([low, high], 1) * size
    before = edges.floor().clamp(max=size - 1)
    inside = edges - before
    length = edges[:, 1] - edges[:, 0]
    share = torch.where(length > 0, 1 / torch.where(length > 0, length, 1), 0)
    factors = torch.stack([1 - inside, inside], 2) * torch.stack([-share, share], 1)[..., None]
    return torch.stack([before, before + 1], 2).flatten(1).long(), factors.flatten(1)
