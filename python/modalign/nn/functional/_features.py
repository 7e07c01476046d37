"""What the losses share: their inputs, checked and widened, and a walk over panels of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...ops import _arguments as arguments
from ...ops import _contrastive as contrastive
from ...ops._registration import autocast_is_on, to_autocast
from ._values import looked_at


def check_features(op: str, **named: tuple[object, str]) -> list[Any]:
    """Tensors as float32 (float64 stays), given with their shapes such as ``x=(x, "[B, D]")``: one dtype, one device, a letter has one size. None stays None.

    Under autocast half types mix with float32, as they do in torch's own losses."""
    sizes: dict[str, tuple[int, str]] = {}
    found: list[Tensor] = []
    for name, (value, shape) in named.items():
        if value is None:
            continue
        tensor = arguments.check_vectors(op, name, value, shape)
        letters = shape.strip("[]").split(", ")
        if tensor.dim() != len(letters):
            raise ValueError(f"{op}: {name} must have {len(letters)} dimensions {shape}, got {arguments.describe(tensor)}")
        for letter, size in zip(letters, tensor.shape, strict=True):
            first, owner = sizes.setdefault(letter, (size, name))
            if size != first:
                raise ValueError(f"{op}: {name} must be {shape} with {letter} = {first} as {owner} has it, got {arguments.describe(tensor)}")
        if found and tensor.device != found[0].device:
            raise ValueError(f"{op}: {name} must be on the device of the other arguments, {found[0].device}, got {tensor.device}")
        if found and tensor.dtype != found[0].dtype and not (autocast_is_on(tensor.device.type) and to_autocast(tensor).dtype == to_autocast(found[0]).dtype):
            raise TypeError(f"{op}: {name} must have the dtype of the other arguments, {found[0].dtype}, got {tensor.dtype}")
        found.append(tensor)
    return [to_autocast(value) if isinstance(value, Tensor) else None for value, _ in named.values()]


def check_list(op: str, name: str, value: object) -> list[Tensor]:
    """Modalities [B, D] in a list, one dtype and device, as float32 (float64)."""
    given = arguments.check_sequence(op, name, value, name + "[{}]", "[B, D]")
    return check_features(op, **{f"{name}[{index}]": (tensor, "[B, D]") for index, tensor in enumerate(given)})


def check_whole(op: str, name: str, value: object, dtype: torch.dtype, shape: str, sizes: tuple[int, ...], like: Tensor) -> Tensor:
    """A mask or a list of numbers: a tensor of this dtype and size on `like`'s device."""
    if not isinstance(value, Tensor) or value.dtype is not dtype:
        raise TypeError(f"{op}: {name} must be a{'n int64' if dtype is torch.int64 else ' bool'} tensor {shape}, got {arguments.describe(value)}")
    if value.device != like.device:
        raise ValueError(f"{op}: {name} must be on the device of the other arguments, {like.device}, got {value.device}")
    if tuple(value.shape) != sizes:
        raise ValueError(f"{op}: {name} must be {shape} = {list(sizes)}, got {arguments.describe(value)}")
    return value


def check_scale(op: str, name: str, value: object, like: Tensor) -> Tensor:
    """A positive number or tensor of one element as a 0-dim tensor. A tensor's value is looked at on the CPU only: on a GPU that would wait for it."""
    scale = contrastive.check_scalar(op, name, value, like, positive=True)
    if isinstance(value, Tensor) and looked_at(value) and not value > 0:
        raise ValueError(f"{op}: {name} must be positive, got {value.item()}")
    return scale


def check_share(op: str, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, got {arguments.describe(value)}")
    if not 0 <= value <= 1:
        raise ValueError(f"{op}: {name} must be between 0 and 1, got {value!r}")
    return float(value)


PANEL = 1 << 22  # numbers of a matrix of logits that are there at a time: 16 MiB in float32, a few times that with what autograd keeps


def by_panels(loss_of_rows: Callable[..., Tensor], columns: int, *rows: Tensor) -> Tensor:
    """``loss_of_rows(*rows)``, a number per row, in panels of rows with at most `PANEL` logits. More than one panel: the backward makes each again, so that
    memory is linear in the rows."""
    size = max(1, PANEL // max(1, columns))
    if rows[0].shape[0] <= size:
        return loss_of_rows(*rows)
    panels = zip(*(tensor.split(size) for tensor in rows), strict=True)
    return torch.cat([checkpoint(loss_of_rows, *panel, use_reentrant=False, preserve_rng_state=False) for panel in panels])


def mean_of(loss: Tensor, reduction: str) -> Tensor:
    """A loss per row to the result; the mean over no row is 0."""
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.sum() / max(1, loss.shape[0])


def masked_mean(vectors: Tensor, mask: Tensor) -> Tensor:
    """[B, N, D] over the N where `mask` [B, N] says so; 0 over none. What is masked is never read."""
    return torch.where(mask[..., None], vectors, 0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
