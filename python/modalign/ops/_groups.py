"""Rows in groups: sums, means and maxima of them, and the way back. What merging, recycling and codebook updates move rows with.

`members` int32 [R] lists rows group by group, `offsets` int32 [M + 1] where groups begin; every row is in one group. `reduce` and `spread` in sum and mean are each other's gradient, so that
derivatives of any order are these two ops again. Weights are data, without a gradient. csrc/ops/reduce_groups.h has the formulas.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._registration import accumulation_dtype, call, register_op

MODES = ("sum", "mean", "max")  # in the order of csrc/ops/reduce_groups.h


class Groups(NamedTuple):
    """Rows in groups, every row in one."""

    members: Tensor
    offsets: Tensor


def groups_of(group: Tensor, count: int) -> Groups:
    """From the group of every row, int64 [R], of `count` groups; the rows of a group in rising order."""
    order = group.argsort(stable=True)
    ends = torch.searchsorted(group[order], torch.arange(count, device=group.device), right=True)
    return Groups(order.int(), torch.cat([ends.new_zeros(1), ends]).int())


def reduce_groups(x: Tensor, groups: Groups, weight: Tensor | None = None, mode: str = "sum") -> tuple[Tensor, Tensor]:
    """[R, C] -> [M, C] and the weights of every group [M], in the accumulation dtype."""
    return call("reduce_groups", x, *groups, _weight(x, weight), MODES.index(mode))


def spread_groups(y: Tensor, groups: Groups, weight: Tensor | None = None, mode: str = "sum") -> Tensor:
    """[M, C] -> [R, C]: the transpose of `reduce_groups`."""
    return call("spread_groups", y, *groups, _weight(y, weight), MODES.index(mode))


def _weight(x: Tensor, weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.detach().to(accumulation_dtype(x.dtype)).contiguous()


# ------------------------------------------------------------------------------------------------------------------------- what torch needs to know


def _fake_reduce(x: Tensor, members: Tensor, offsets: Tensor, weight: Tensor | None, mode: int) -> tuple[Tensor, Tensor]:
    M = offsets.shape[0] - 1
    return x.new_empty((M, x.shape[1])), x.new_empty(M, dtype=accumulation_dtype(x.dtype))


def _fake_spread(y: Tensor, members: Tensor, offsets: Tensor, weight: Tensor | None, mode: int) -> Tensor:
    return y.new_empty((members.shape[0], y.shape[1]))


def _reduce_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, members, offsets, weight, mode = inputs
    ctx.mode = mode
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(members, offsets, weight, *((x, output[0]) if MODES[mode] == "max" else ()))


def _reduce_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    members, offsets, weight, *values = ctx.saved_tensors
    groups = Groups(members, offsets)
    if not values:
        return call("spread_groups", grad, *groups, weight, ctx.mode), None, None, None, None
    x, largest = values
    attained = (x == spread_groups(largest, groups)).to(x.dtype)  # shared equally where several do, as torch's amax does it
    ties = reduce_groups(attained, groups)[0].clamp(min=1)
    return attained * spread_groups(grad / ties, groups), None, None, None, None


def _spread_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, members, offsets, weight, mode = inputs
    ctx.mode = mode
    ctx.save_for_backward(members, offsets, weight)


def _spread_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return call("reduce_groups", grad, *ctx.saved_tensors, ctx.mode)[0], None, None, None, None


register_op("reduce_groups", fake=_fake_reduce, setup_context=_reduce_context, backward=_reduce_backward, contiguous=(1, 2, 3), vmap="loop", autocast=False)
register_op("spread_groups", fake=_fake_spread, setup_context=_spread_context, backward=_spread_backward, contiguous=(1, 2, 3), vmap="loop", autocast=False)
