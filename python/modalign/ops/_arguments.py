"""Checks of argument metadata that the ops share: rank, size, dtype, device, Python numbers. Values are never looked at, so nothing here
synchronises a device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def describe(value: object) -> str:
    """`value` in the few words an error message needs."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}" if isinstance(value, (bool, int, float, str)) else type(value).__name__


def check_vectors(op: str, name: str, value: object, shape: str) -> Tensor:
    """`value` is a dense floating-point tensor with at least as many dimensions as `shape`, written like "[..., B, D]", names, and D is not 0."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor {shape}, got {describe(value)}")
    if value.dtype not in FLOATING_DTYPES:
        raise TypeError(f"{op}: {name} must be float16, bfloat16, float32 or float64, got {describe(value)}")
    if value.layout is not torch.strided:
        raise TypeError(f"{op}: {name} must be a dense (strided) tensor, got layout {value.layout}")
    least = shape.count(",")
    if value.dim() < least:
        raise ValueError(f"{op}: {name} must have {least} or more dimensions {shape}, got {describe(value)}")
    if value.shape[-1] == 0:
        raise ValueError(f"{op}: {name} must have a last dimension D of 1 or more, got {describe(value)}")
    return value


def check_sequence(op: str, name: str, value: object, item: str, shape: str) -> list[Tensor]:
    """`value` is a non-empty list or tuple of such tensors."""
    if isinstance(value, Tensor) or not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise TypeError(f"{op}: {name} must be a sequence of tensors {shape}, got {describe(value)}")
    if len(value) == 0:
        raise ValueError(f"{op}: {name} must hold at least one tensor, got an empty sequence")
    return [check_vectors(op, item.format(index), entry, shape) for index, entry in enumerate(value)]


def check_alike(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """`tensor` has the device, dtype and width D of `like`."""
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like_name}'s device {like.device}, got {tensor.device}")
    if tensor.dtype != like.dtype:
        raise TypeError(f"{op}: {name} must have {like_name}'s dtype {like.dtype}, got {tensor.dtype}")
    if tensor.shape[-1] != like.shape[-1]:
        raise ValueError(f"{op}: {name} must have {like_name}'s width D = {like.shape[-1]}, got {describe(tensor)}")


def check_presence(op: str, value: object, like_name: str, like: Tensor, shape: str, sizes: tuple[int, ...]) -> Tensor | None:
    """`value` is None or a bool tensor on `like`'s device whose trailing dimensions are `sizes`."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: present must be None or a bool tensor {shape}, got {describe(value)}")
    if value.dtype is not torch.bool:
        raise TypeError(f"{op}: present must be a bool tensor {shape}, True where the vector is there, got {describe(value)}")
    if value.device != like.device:
        raise ValueError(f"{op}: present must be on {like_name}'s device {like.device}, got {value.device}")
    if value.dim() < len(sizes) or tuple(value.shape[value.dim() - len(sizes) :]) != sizes:
        wanted = ", ".join(str(size) for size in sizes)
        raise ValueError(f"{op}: present must have shape {shape} = [..., {wanted}], got {describe(value)}")
    return value


def check_flag(op: str, name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False, got {describe(value)}")
    return value


def check_normalize(op: str, normalize: object, squared: bool) -> bool | str:
    """False, True or "root"; "root" is the root of the volume, not of its square."""
    if not isinstance(normalize, bool) and normalize != "root":
        raise ValueError(f'{op}: normalize must be False, True or "root", got {describe(normalize)}')
    if normalize == "root" and squared:
        raise ValueError(f'{op}: normalize must not be "root" together with squared=True (the root is taken of the volume), got both')
    return normalize  # type: ignore[return-value]


def check_eps(op: str, eps: object, dtype: torch.dtype) -> float:
    """The default is 1e-12 (float64: 1e-24), relative to the squared length of the vector the residual belongs to."""
    if eps is None:
        return 1e-24 if dtype is torch.float64 else 1e-12
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"{op}: eps must be None or a number, got {describe(eps)}")
    if not (eps >= 0 and math.isfinite(eps)):
        raise ValueError(f"{op}: eps must be finite and 0 or more, got {eps!r}")
    return float(eps)


RESULT_BYTES = 1 << 33


def check_result_size(op: str, max_bytes: object, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """All-pairs results grow with rows x columns: one above `max_bytes` (default 8 GiB) has to be asked for."""
    if max_bytes is not None and (isinstance(max_bytes, bool) or not isinstance(max_bytes, int)):
        raise TypeError(f"{op}: max_bytes must be None or a whole number, got {describe(max_bytes)}")
    limit = RESULT_BYTES if max_bytes is None else max_bytes
    size = math.prod(shape) * dtype.itemsize
    if size > limit:
        raise ValueError(
            f"{op}: max_bytes must be at least {size} for a result of shape {list(shape)}, got {limit} (a loss over all pairs needs no such matrix)"
        )


def leading_shape(op: str, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The leading batch dimensions of all arguments, broadcast against each other."""
    try:
        return tuple(torch.broadcast_shapes(*shapes.values()))
    except RuntimeError:
        listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise ValueError(f"{op}: leading dimensions must broadcast against each other, got {listed}") from None


def fold_leading(tensor: Tensor, leading: tuple[int, ...], kept: int) -> Tensor:
    """`tensor` [..., kept dimensions] as [N, kept dimensions]. A view unless two or more leading dimensions with strides that do not collapse are
    folded into one."""
    sizes = tuple(tensor.shape[tensor.dim() - kept :])
    return tensor.expand(leading + sizes).reshape((math.prod(leading),) + sizes)
