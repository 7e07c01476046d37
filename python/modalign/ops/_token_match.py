"""Which tokens become one, and what is done with them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..masks._trees import register_tree
from . import _arguments as arguments
from ._groups import Groups, groups_of, reduce_groups, spread_groups
from ._registration import refuse_forward_mode

MERGE_MODES = ("mean", "sum", "amax")


@dataclass(frozen=True, eq=False)
class TokenMatch:
    """Tokens in groups, each of which becomes one: what `match_tokens` finds. A pytree.

    In a batch, items [B, N] become [B, M]. Where items differ in length they lie one behind the other (packed): tokens [T], or [B, N] under a threshold, become [M], and `cu_seqlens` says
    where items begin.

    group : Tensor int32 [B, N] or [T]
        The row of the whole output (all items, one behind the other) that a token is in.
    members, offsets : Tensor int32
        The tokens of every row, and where a row's begin.
    count : Tensor int32 [B, M] or [M]
        How many tokens a row has.
    score : Tensor [B, N] or [T]
        The similarity of a token to its best partner, -inf for tokens that look for none.
    cu_before, cu_seqlens : Tensor int32 [B + 1], optional
        Where packed items begin, before and after.
    """

    group: Tensor
    members: Tensor
    offsets: Tensor
    count: Tensor
    score: Tensor
    cu_before: Tensor | None = None
    cu_seqlens: Tensor | None = None

    @property
    def packed(self) -> bool:
        """Whether the merged items lie one behind the other."""
        return self.cu_seqlens is not None

    def merge(self, x: Tensor, size: Tensor | None = None, mode: str = "mean") -> Tensor:
        """Tokens [B, N, ...] (packed [T, ...]) to [B, M, ...]. With `size` [B, N] or [B, N, 1] the mean is weighted by how many tokens each stands for; "sum" and "amax" take none.

        Differentiable in x, to any order for "mean" and "sum"; of several that attain "amax" each gets an equal share. A token alone passes bit for bit.
        """
        return self.merge_with_size(x, size, mode)[0]

    def merge_with_size(self, x: Tensor, size: Tensor | None = None, mode: str = "mean") -> tuple[Tensor, Tensor]:
        """`merge` and `merge_size` in one."""
        op = "TokenMatch.merge"
        if mode not in MERGE_MODES:
            raise ValueError(f'{op}: mode must be "mean", "sum" or "amax", got {arguments.describe(mode)}')
        if size is not None and mode != "mean":
            raise ValueError(f'{op}: size must be None unless mode is "mean", got mode {mode!r}')
        rows, weight = self._rows(op, "x", x, self.group), None if size is None else self._sizes(op, size)
        merged, total = reduce_groups(rows, Groups(self.members, self.offsets), weight, {"amax": "max"}.get(mode, mode))
        shape = self.count.shape
        return merged.reshape(*shape, *x.shape[self.group.dim() :]), total.float().view(shape)

    def merge_size(self, size: Tensor | None = None) -> Tensor:
        """How many tokens each merged one stands for, float32 [B, M] (packed [M]); `size`: as many as each token stood for before, without it 1."""
        if size is None:
            return self.count.float()
        weight = self._sizes("TokenMatch.merge_size", size)
        return reduce_groups(weight[:, None], Groups(self.members, self.offsets))[0].reshape(self.count.shape)

    def unmerge(self, y: Tensor) -> Tensor:
        """Tokens [B, M, ...] back to [B, N, ...]: each gets what its group became. Differentiable to any order."""
        op = "TokenMatch.unmerge"
        rows = self._rows(op, "y", y, self.count)
        return spread_groups(rows, Groups(self.members, self.offsets)).reshape(*self.group.shape, *y.shape[self.group.dim() :])

    def source(self, before: Tensor | None = None) -> Tensor:
        """int64 [B, N] (packed [T]): the place of every token among the merged ones of its item. `before` [B, N0]: where the tokens of this match came from, to follow them over several merges."""
        place = self.group.long()
        if self.cu_seqlens is None:
            place = place - torch.arange(len(place), device=place.device)[:, None] * self.count.shape[1]
        elif self.cu_before is None:
            place = place - self.cu_seqlens[:-1, None]
        else:
            row = torch.arange(len(place), dtype=torch.int32, device=place.device)
            place = place - self.cu_seqlens[torch.searchsorted(self.cu_before[1:].contiguous(), row, right=True)]
        if before is None:
            return place
        if not isinstance(before, Tensor) or before.dtype is not torch.int64 or before.dim() != 2 or self.packed:
            raise TypeError(f"TokenMatch.source: before must be an int64 tensor [B, N0] of a batch that is not packed, got {arguments.describe(before)}")
        return place.gather(1, before)

    def source_matrix(self, before: Tensor | None = None) -> Tensor:
        """The same as bool [B, M, N], M N numbers an item: for pictures and for code that expects it."""
        if self.packed:
            raise ValueError("TokenMatch.source_matrix: the match must be of a batch in which items are equally long, got packed items")
        place = self.source(before)
        return place[:, None, :] == torch.arange(self.count.shape[1], device=place.device)[:, None]

    def of_permuted(self, order: Tensor) -> TokenMatch:
        """The same groups for tokens of which this match has seen order[b, 0], order[b, 1], ... as the first, second, ... of item b. int64 [B, N]."""
        B, N = order.shape
        rows = (order + torch.arange(B, device=order.device)[:, None] * N).flatten()
        back = {name: torch.empty_like(value).scatter_(1, order, value) for name, value in (("group", self.group), ("score", self.score))}
        return replace(self, members=rows[self.members].int(), **back)

    def to(self, device: torch.device | str) -> TokenMatch:
        names = ("group", "members", "offsets", "count", "score", "cu_before", "cu_seqlens")
        return replace(self, **{name: value.to(device) for name in names if (value := getattr(self, name)) is not None})

    def _rows(self, op: str, name: str, value: Any, like: Tensor) -> Tensor:
        if not isinstance(value, Tensor) or value.dtype not in arguments.FLOATING_DTYPES:
            raise TypeError(f"{op}: {name} must be a float16, bfloat16, float32 or float64 tensor, got {arguments.describe(value)}")
        if value.dim() < like.dim() or value.shape[: like.dim()] != like.shape:
            raise ValueError(f"{op}: {name} must have shape [{', '.join(str(n) for n in like.shape)}, ...], got {arguments.describe(value)}")
        if value.device != self.members.device:
            raise ValueError(f"{op}: {name} must be on the match's device {self.members.device}, got {value.device}")
        refuse_forward_mode(op, (value,))
        return value.reshape(like.numel(), value.shape[like.dim() :].numel())

    def _sizes(self, op: str, size: Any) -> Tensor:
        shape = self.group.shape
        if not isinstance(size, Tensor) or size.is_complex() or size.dtype is torch.bool:
            raise TypeError(f"{op}: size must be a tensor of numbers {list(shape)}, got {arguments.describe(size)}")
        if size.shape not in (shape, (*shape, 1)) or size.device != self.members.device:
            raise ValueError(f"{op}: size must have shape {list(shape)} or {[*shape, 1]} on {self.members.device}, got {arguments.describe(size)}")
        return size.detach().float().reshape(-1)


def match_of_groups(place: Tensor, count: int) -> TokenMatch:
    """From the place of every token among `count` merged ones of its item, int64 [B, N]."""
    group = place + torch.arange(len(place), device=place.device)[:, None] * count
    groups = groups_of(group.flatten(), len(place) * count)
    return TokenMatch(group.int(), *groups, groups.offsets.diff().view(len(place), count), torch.full_like(place, -torch.inf, dtype=torch.float32))


register_tree(TokenMatch, ("group", "members", "offsets", "count", "score", "cu_before", "cu_seqlens"))
