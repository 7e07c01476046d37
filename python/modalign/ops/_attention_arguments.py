"""What the attention ops ask of their arguments, before anything is computed."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import _arguments as arguments
from ._registration import accumulation_dtype, autocast_is_on, functorch_is_active, to_autocast

RELATION, DENSE, BOTH = 0, 3, 4  # kinds of steps, csrc/ops/attention_mask.h; DENSE is the last of those that are terms
NO_VALUE = object()
CAUSAL = (False, "bottom_right", "top_left")  # in the order of csrc/ops/masked_attention.h; True is "bottom_right"


class MaskProgram(Protocol):
    """What is asked of a mask; `modalign.masks.Mask` is one."""

    queries: int
    keys: int
    tensors: tuple[Tensor, ...]
    steps: tuple[int, ...]

    def dense(self, rows: Tensor | None = None) -> Tensor: ...


class AttentionProblem(NamedTuple):
    """An attention but for its values, checked: what the raw ops are given."""

    query: Tensor
    key: Tensor
    bias: Tensor | None  # four dimensions
    key_lengths: Tensor | None
    numbers: tuple[int, float, float]  # causal, scale, softcap
    mask_tensors: list[Tensor]
    mask_steps: list[int]

    def differentiable(self) -> list[Tensor]:
        return [each for each in (self.query, self.key, self.bias) if each is not None]

    def detached(self) -> AttentionProblem:
        return self._replace(query=self.query.detach(), key=self.key.detach(), bias=None if self.bias is None else self.bias.detach())

    def widened(self) -> AttentionProblem:
        """With operands in the accumulation dtype, for results in it."""
        real = accumulation_dtype(self.query.dtype)
        return self._replace(query=self.query.to(real), key=self.key.to(real))

    def of_rows(self, kept: Tensor) -> AttentionProblem:
        """Queries that `kept` [B, 1 or H, Nq] leaves out keep nothing."""
        tensors, steps = mask_of_rows(self.mask_tensors, self.mask_steps, kept)
        return self._replace(mask_tensors=tensors, mask_steps=steps)


def mask_of_rows(tensors: list[Tensor], steps: list[int], kept: Tensor) -> tuple[list[Tensor], list[int]]:
    return [*tensors, kept[..., None]], [*steps, DENSE, len(tensors), 0, 0, *([BOTH, 0, 0, 0] if steps else [])]


def check_problem(
    op: str, query: Any, key: Any, value: Any, mask: Any, bias: object, causal: object, key_lengths: object, scale: object, softcap: object
) -> tuple[Tensor, AttentionProblem]:
    """The value, and all the rest. With NO_VALUE it is about probabilities: those of `masked_attention`, so that its lse goes with them, under autocast too."""
    query, key, value = (in_autocast_dtype(each) for each in (query, key, key if value is NO_VALUE else value))
    query, key, value = check_operands(op, query, key, value, 4)
    (B, H, Nq, _), (Hkv, Nk) = query.shape, key.shape[1:3]
    tensors, steps = check_mask(op, mask, query, (B, H, Nq, Nk), Hkv)
    bias = check_bias(op, bias, query, (B, H, Nq, Nk), Hkv)
    if key_lengths is not None:
        if not isinstance(key_lengths, Tensor) or key_lengths.dtype is not torch.int64:
            raise TypeError(f"{op}: key_lengths must be an int64 tensor [{B}], got {arguments.describe(key_lengths)}")
        if key_lengths.shape != (B,) or key_lengths.device != query.device:
            raise ValueError(f"{op}: key_lengths must have shape [{B}] on {query.device}, got {arguments.describe(key_lengths)}")
        key_lengths = key_lengths.contiguous()
    return value, AttentionProblem(query, key, bias, key_lengths, check_numbers(op, query, causal, scale, softcap), tensors, steps)


def in_autocast_dtype(value: Any) -> Any:
    cast = isinstance(value, Tensor) and autocast_is_on(value.device.type) and value.dtype in arguments.FLOATING_DTYPES and value.dtype is not torch.float64
    return value.to(torch.get_autocast_dtype(value.device.type)) if cast else value


def in_float32(value: Any) -> Any:
    return to_autocast(value) if isinstance(value, Tensor) and autocast_is_on(value.device.type) else value


def check_operands(op: str, query: Any, key: Any, value: Any, dimensions: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = "[B, H, N, D]" if dimensions == 4 else "[T, H, D]"
    query, key, value = (arguments.check_vectors(op, name, each, shape) for name, each in (("query", query), ("key", key), ("value", value)))
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


def check_numbers(op: str, query: Tensor, causal: object, scale: object, softcap: object) -> tuple[int, float, float]:
    if causal not in (*CAUSAL, True) or (isinstance(causal, int) and not isinstance(causal, bool)):
        raise ValueError(f'{op}: causal must be False, True, "bottom_right" or "top_left", got {arguments.describe(causal)}')
    for name, number in (("scale", 1.0 if scale is None else scale), ("softcap", softcap)):
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(f"{op}: {name} must be a number, got {arguments.describe(number)}")
        if not -math.inf < number < math.inf or (name == "softcap" and number < 0):  # math.isfinite does not trace
            raise ValueError(f"{op}: {name} must be finite{' and 0 or more' if name == 'softcap' else ''}, got {number!r}")
    return CAUSAL.index("bottom_right" if causal is True else causal), float(query.shape[-1] ** -0.5 if scale is None else scale), float(softcap)  # type: ignore[arg-type]


def check_lse(op: str, lse: object, query: Tensor) -> Tensor | None:
    """A constant: gradients of what is made with it go to query and key, also through it."""
    if lse is None:
        return None
    shape, real = list(query.shape[:3]), accumulation_dtype(query.dtype)
    if not isinstance(lse, Tensor) or lse.dtype is not real:
        raise TypeError(f"{op}: lse must be a {real} tensor {shape}, got {arguments.describe(lse)}")
    if lse.shape != query.shape[:3] or lse.device != query.device:
        raise ValueError(f"{op}: lse must have shape {shape} on {query.device}, got {arguments.describe(lse)}")
    return lse.detach().contiguous()


def check_weights(op: str, name: str, weights: object, query: Tensor) -> Tensor:
    """[B, Nq] or [B, H, Nq] of the query's or the accumulation dtype as [B, 1 or H, Nq] of the latter."""
    B, H, Nq, _ = query.shape
    weights, real = in_float32(weights), accumulation_dtype(query.dtype)
    if not isinstance(weights, Tensor) or weights.dtype not in (query.dtype, real):
        raise TypeError(f"{op}: {name} must be a tensor of {' or '.join(sorted({str(query.dtype), str(real)}))}, got {arguments.describe(weights)}")
    if weights.shape not in ((B, Nq), (B, H, Nq)) or weights.device != query.device:
        raise ValueError(f"{op}: {name} must have shape [{B}, {Nq}] or [{B}, {H}, {Nq}] on {query.device}, got {arguments.describe(weights)}")
    return (weights[:, None] if weights.dim() == 2 else weights).to(real)


def check_indices(op: str, name: str, indices: object, shapes: str, low: int, end: int, like: Tensor) -> Tensor:
    """int64 from `low` to `end` - 1. Values are looked at on the CPU, not while torch.compile or torch.func traces."""
    if not isinstance(indices, Tensor) or indices.dtype is not torch.int64:
        raise TypeError(f"{op}: {name} must be an int64 tensor {shapes}, got {arguments.describe(indices)}")
    if indices.device != like.device:
        raise ValueError(f"{op}: {name} must be on query's device {like.device}, got {indices.device}")
    looked_at = indices.device.type == "cpu" and indices.numel() > 0 and not torch.compiler.is_compiling() and not functorch_is_active()
    if looked_at and not (low <= int(indices.min()) and int(indices.max()) < end):
        raise ValueError(f"{op}: {name} must be from {low} to {end - 1}, got {int(indices.min())} to {int(indices.max())}")
    return indices
