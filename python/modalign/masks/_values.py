"""Looking at the values of tensors, where that costs no waiting and is possible."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["are_there"]


def are_there(*tensors: Tensor) -> bool:
    """Whether values can be looked at: on the CPU, outside graphs, fake tensors and transforms."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return all(each.device.type == "cpu" and type(each) in (Tensor, torch.nn.Parameter) for each in tensors)
