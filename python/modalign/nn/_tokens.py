"""What the attention modules ask of their sizes and of sequences of tokens."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ..ops import _arguments as arguments


def check_sizes(op: str, **sizes: object) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{op}: {name} must be a whole number of at least 1, got {size!r}")


def check_number(op: str, name: str, value: object, *, above: bool = False) -> None:
    """A finite number of 0 or more, or above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, got {value!r}")
    if not (0 < value if above else 0 <= value) or value == math.inf:
        raise ValueError(f"{op}: {name} must be finite and {'positive' if above else '0 or more'}, got {value}")


def check_tokens(op: str, name: str, value: Any, shape: tuple[int | str, ...], like: Tensor | None = None) -> Tensor:
    """A floating-point tensor of this shape, in which letters stand for any size; the batch and the device are those of `like`."""
    written = f"[{', '.join(map(str, shape))}]"  # sizes of a batch would not trace
    tensor = arguments.check_vectors(op, name, value, written)
    if tensor.dim() != len(shape) or any(size != wanted for size, wanted in zip(tensor.shape, shape, strict=True) if not isinstance(wanted, str)):
        raise ValueError(f"{op}: {name} must be {written}, got {arguments.describe(tensor)}")
    if like is not None and (tensor.shape[0] != like.shape[0] or tensor.device != like.device):
        raise ValueError(f"{op}: {name} must be {written} with B = {like.shape[0]} on {like.device}, as the other tokens, got {arguments.describe(tensor)}")
    return tensor
