"""Which regions show which attribute, after training with `villa_mapping_loss`. [ViLLA, ICCV 2023]"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...ops import _arguments as arguments
from ...ops._gram_schmidt import unit
from ._regions import check_regions

__all__ = ["RegionAttributes", "villa_regions"]

PANEL = 1 << 22  # numbers of the vectors that are compared at a time


class RegionAttributes(NamedTuple):
    """regions, attributes : Tensor int64 [P], pairs of a row of the regions and a row of the attributes"""

    regions: Tensor
    attributes: Tensor

    def to(self, device: torch.device | str) -> RegionAttributes:
        return RegionAttributes(*(tensor.to(device) for tensor in self))


@torch.no_grad()
def villa_regions(regions: Tensor, offsets: Tensor, attributes: Tensor, labels: Tensor, *, margin: float = 0.2, normalize: bool = True) -> RegionAttributes:
    """For every picture and attribute that `labels` pairs, the regions of the picture whose product with the attribute exceeds the largest one less `margin`.

    >>> import torch
    >>> villa_regions(torch.eye(3), torch.tensor([0, 2, 3]), torch.eye(3)[:1], torch.tensor([[True], [False]]))
    RegionAttributes(regions=tensor([0]), attributes=tensor([0]))

    Parameters: regions, offsets, attributes, labels, normalize as in `villa_mapping_loss`; margin above 0, of cosines, not divided by a temperature.

    Returns RegionAttributes(regions, attributes), int64 [P] each, without gradient: by picture, then attribute, then region. At least one region for every
    label, unless a product is NaN: then none. Only regions and attributes of one picture are compared, in panels, so memory is linear in the number of such
    pairs.

    Raises TypeError and ValueError, ``villa_regions: <argument> must ..., got ...``.

    Paper: Varma et al., ViLLA, ICCV 2023, section 4.1: the pairs that the second stage contrasts."""
    op = "villa_regions"
    regions, offsets, attributes, labels = check_regions(op, regions, offsets, attributes, labels)
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not margin > 0:
        raise ValueError(f"{op}: margin must be a positive number, got {arguments.describe(margin)}")
    if arguments.check_flag(op, "normalize", normalize):
        regions, attributes = unit(regions), unit(attributes)
    picture, attribute = labels.nonzero(as_tuple=True)
    count = offsets.diff()[picture]
    label = torch.arange(len(count), device=count.device).repeat_interleave(count)  # which label a pair of region and attribute comes from
    region = torch.arange(len(label), device=count.device) - (count.cumsum(0) - count - offsets[picture])[label]
    step = max(1, PANEL // regions.shape[-1])
    scores = [regions.new_empty(0)]
    for r, a in zip(region.split(step), attribute[label].split(step), strict=True):
        scores.append(torch.linalg.vecdot(regions[r] if regions.dim() == 2 else regions[a, r], attributes[a]))
    score = torch.cat(scores)
    largest = score.new_full((len(count),), -torch.inf).scatter_reduce(0, label, score, "amax")
    chosen = score > largest[label] - margin
    return RegionAttributes(region[chosen], attribute[label][chosen])
