"""The arguments of the functions about regions and attributes."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _features as inputs
from ._values import looked_at


def check_regions(op: str, regions: object, offsets: object, attributes: object, labels: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = "[A, R, D]" if isinstance(regions, Tensor) and regions.dim() == 3 else "[R, D]"
    regions, attributes = inputs.check_features(op, regions=(regions, shape), attributes=(attributes, "[A, D]"))
    pictures = labels.shape[0] if isinstance(labels, Tensor) and labels.dim() == 2 else 0
    labels = inputs.check_whole(op, "labels", labels, torch.bool, "[S, A]", (pictures, len(attributes)), regions)
    offsets = inputs.check_whole(op, "offsets", offsets, torch.int64, "[S + 1]", (pictures + 1,), regions)
    R = regions.shape[-2]
    if looked_at(offsets) and not (offsets[0] == 0 and offsets[-1] == R and bool((offsets.diff() > 0).all())):
        raise ValueError(f"{op}: offsets must rise from 0 to R = {R} with a region or more for every picture, got {offsets.tolist()}")
    return regions, offsets, attributes, labels
