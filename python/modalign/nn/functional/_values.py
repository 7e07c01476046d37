"""Checks of the values of tensors. They are looked at on the CPU only: on a GPU that would wait for it."""

from __future__ import annotations

import torch
from torch import Tensor


def looked_at(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_not_negative(op: str, name: str, tensor: Tensor) -> Tensor:
    if looked_at(tensor) and bool((tensor < 0).any()):
        raise ValueError(f"{op}: {name} must not hold negative values, got {tensor[tensor < 0].min().item()}")
    return tensor
