"""What the attention ops ask of their arguments, before anything is computed."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from . import _arguments as arguments
from ._registration import accumulation_dtype, autocast_is_on

RELATION, DENSE = 0, 3  # kinds of steps, csrc/ops/attention_mask.h; the last of those that are terms
CAUSAL = (False, "bottom_right", "top_left")  # in the order of csrc/ops/masked_attention.h; True is "bottom_right"


class MaskProgram(Protocol):
    """What is asked of a mask; `modalign.masks.Mask` is one."""

    queries: int
    keys: int
    tensors: tuple[Tensor, ...]
    steps: tuple[int, ...]

    def dense(self) -> Tensor: ...


def check_operands(op: str, query: Any, key: Any, value: Any, dimensions: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = "[B, H, N, D]" if dimensions == 4 else "[T, H, D]"
    query, key, value = (arguments.check_vectors(op, name, each, shape) for name, each in (("query", query), ("key", key), ("value", value)))
    if autocast_is_on(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (each.to(dtype) if each.dtype is not torch.float64 else each for each in (query, key, value))
    for name, each in (("query", query), ("key", key), ("value", value)):
        if each.dim() != dimensions:
            raise ValueError(f"{op}: {name} must have {dimensions} dimensions {shape}, got {arguments.describe(each)}")
        if each.device != query.device:
            raise ValueError(f"{op}: {name} must be on query's device {query.device}, got {each.device}")
        if each.dtype != query.dtype:
            raise TypeError(f"{op}: {name} must have query's dtype {query.dtype}, got {each.dtype}")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"{op}: key must have query's width D = {query.shape[-1]}, got {arguments.describe(key)}")
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(f"{op}: value must have key's shape but for its width, {list(key.shape[:-1])}, got {arguments.describe(value)}")
    if dimensions == 4 and key.shape[0] != query.shape[0]:
        raise ValueError(f"{op}: key must have query's batch B = {query.shape[0]}, got {arguments.describe(key)}")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(f"{op}: key must have heads that divide the query's {query.shape[1]}, got {key.shape[1]}")
    return query, key, value


def check_pairs(op: str, name: str, tensor: Tensor, query: Tensor, sizes: tuple[int, int, int, int], key_heads: int) -> Tensor:
    """A mask or bias with four dimensions, each 1 or the whole (or the key heads)."""
    if tensor.device != query.device:
        raise ValueError(f"{op}: {name} must be on query's device {query.device}, got {tensor.device}")
    four = tensor[(None,) * (4 - tensor.dim())] if tensor.dim() < 4 else tensor
    fits = four.dim() == 4 and all(  # `size in (1, whole)` would fix the size in a compiled graph
        size == 1 or size == whole or (d == 1 and size == key_heads) for d, (size, whole) in enumerate(zip(four.shape, sizes, strict=True))
    )
    if not fits:
        raise ValueError(f"{op}: {name} must broadcast to [B, H, Nq, Nk] = {list(sizes)}, got {arguments.describe(tensor)}")
    return four


def check_mask(op: str, mask: Any, query: Tensor, sizes: tuple[int, int, int, int], key_heads: int) -> tuple[list[Tensor], list[int]]:
    """A mask as a program, csrc/ops/attention_mask.h: its tensors, and four numbers a step."""
    if mask is None:
        return [], []
    if not isinstance(mask, Tensor) and hasattr(mask, "steps"):
        B, H, Nq, Nk = sizes
        if (mask.queries, mask.keys) != (Nq, Nk):
            raise ValueError(f"{op}: mask must be of {Nq} queries and {Nk} keys, got one of {mask.queries} and {mask.keys}")
        for kind, first in zip(mask.steps[::4], mask.steps[1::4], strict=True):
            shapes = [each.shape for each in mask.tensors[first : first + 4]]
            if kind <= DENSE:
                batches, heads = ([shapes[0][0], shapes[1][0]], shapes[2][0]) if kind == RELATION else ([shapes[0][0]], shapes[0][1])
                if any(batch not in (1, B) for batch in batches) or heads == 0 or H % heads:
                    raise ValueError(f"{op}: mask must be of 1 or {B} items and of heads that divide {H}, got {batches[-1]} and {heads}")
        if any(each.device != query.device for each in mask.tensors):
            raise ValueError(f"{op}: mask must be on query's device {query.device}, got {mask.tensors[0].device}")
        return list(mask.tensors), list(mask.steps)
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
        raise TypeError(f"{op}: mask must be a bool tensor, True where a pair is kept, or of modalign.masks, got {arguments.describe(mask)}")
    return [check_pairs(op, "mask", mask, query, sizes, key_heads)], [DENSE, 0, 0, 0]


def check_bias(op: str, bias: object, query: Tensor, sizes: tuple[int, int, int, int], key_heads: int) -> Tensor | None:
    if bias is None:
        return None
    allowed = (query.dtype, accumulation_dtype(query.dtype))
    if not isinstance(bias, Tensor) or bias.dtype not in allowed:
        raise TypeError(f"{op}: bias must be a tensor of {' or '.join(sorted({str(each) for each in allowed}))}, got {arguments.describe(bias)}")
    return check_pairs(op, "bias", bias, query, sizes, key_heads)


def check_numbers(op: str, query: Tensor, causal: object, scale: object, softcap: object, deterministic: object, return_lse: object) -> tuple[int, float, float]:
    if causal not in (*CAUSAL, True) or (isinstance(causal, int) and not isinstance(causal, bool)):
        raise ValueError(f'{op}: causal must be False, True, "bottom_right" or "top_left", got {arguments.describe(causal)}')
    for name, number in (("scale", 1.0 if scale is None else scale), ("softcap", softcap)):
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(f"{op}: {name} must be a number, got {arguments.describe(number)}")
        if not -math.inf < number < math.inf or (name == "softcap" and number < 0):  # math.isfinite does not trace
            raise ValueError(f"{op}: {name} must be finite{' and 0 or more' if name == 'softcap' else ''}, got {number!r}")
    arguments.check_flag(op, "deterministic", deterministic)
    arguments.check_flag(op, "return_lse", return_lse)
    return CAUSAL.index("bottom_right" if causal is True else causal), float(query.shape[-1] ** -0.5 if scale is None else scale), float(softcap)  # type: ignore[arg-type]
