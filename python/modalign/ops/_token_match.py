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

    In a batch, items [B, N] become [B, M]. Packed items lie one behind the other, T tokens become M, and `cu_seqlens` says where items begin before and after.

    group : Tensor int32 [B, N] or [T]
        The row of the whole output (all items, one behind the other) that a token is in.
    members, offsets : Tensor int32
        The tokens of every row, and where a row's begin.
    score : Tensor [B, N] or [T]
        The similarity of a token to its best partner, -inf for tokens that look for none.
    cu_before, cu_seqlens : Tensor int32 [B + 1], optional
        Where packed items begin, before and after.
    """

    group: Tensor
    members: Tensor
    offsets: Tensor
    score: Tensor
    cu_before: Tensor | None = None
    cu_seqlens: Tensor | None = None

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the output's tokens: (B, M), packed (M,)."""
        M = self.offsets.shape[0] - 1
        return (M,) if self.packed else (self.group.shape[0], M // max(self.group.shape[0], 1))

    def merge(self, x: Tensor, size: Tensor | None = None, mode: str = "mean") -> Tensor:
        """Tokens [B, N, ...] (packed [T, ...]) to [B, M, ...]. With `size` [B, N] or [B, N, 1] the mean is weighted by how many tokens each stands for; "sum" and "amax" take none.

        Differentiable in x, to any order for "mean" and "sum"; of several that attain "amax" each gets an equal share. A token alone passes bit for bit.
        """
        op = "TokenMatch.merge"
        if mode not in MERGE_MODES:
            raise ValueError(f'{op}: mode must be "mean", "sum" or "amax", got {arguments.describe(mode)}')
        if size is not None and mode != "mean":
            raise ValueError(f'{op}: size must be None unless mode is "mean", got mode {mode!r}')
        weight = None if size is None else self._sizes(op, size)
        rows = self._rows(op, "x", x, self.group)
        merged, _ = reduce_groups(rows, Groups(self.members, self.offsets), weight, {"amax": "max"}.get(mode, mode))
        return merged.reshape(*self.shape, *x.shape[self.group.dim() :])

    def merge_size(self, size: Tensor | None = None) -> Tensor:
        """How many tokens each merged one stands for, float32 [B, M] (packed [M]); `size`: as many as each token stood for before, without it 1."""
        weight = self._sizes("TokenMatch.merge_size", size) if size is not None else torch.ones_like(self.members, dtype=torch.float32)
        return reduce_groups(weight[:, None], Groups(self.members, self.offsets))[0].reshape(self.shape)

    def unmerge(self, y: Tensor) -> Tensor:
        """Tokens [B, M, ...] back to [B, N, ...]: each gets what its group became. Differentiable to any order."""
        op = "TokenMatch.unmerge"
        rows = self._rows(op, "y", y, torch.empty(self.shape, device="meta"))
        return spread_groups(rows, Groups(self.members, self.offsets)).reshape(*self.group.shape, *y.shape[self.group.dim() :])

    def source(self, before: Tensor | None = None) -> Tensor:
        """int64 [B, N] (packed [T]): the place of every token among the merged ones of its item. `before` [B, N0]: where the tokens of this match came from, to follow them over several merges."""
        place = self.group.long()
        if self.cu_seqlens is None:
            place = place - torch.arange(self.shape[0], device=place.device)[:, None] * self.shape[1]
        else:
            place = place - self.cu_seqlens.long()[self._item()]
        if before is None:
            return place
        if not isinstance(before, Tensor) or before.dtype is not torch.int64 or before.dim() != place.dim() or self.packed:
            raise TypeError(f"TokenMatch.source: before must be an int64 tensor [B, N0] of a batch that is not packed, got {arguments.describe(before)}")
        return place.gather(1, before)

    def source_matrix(self, before: Tensor | None = None) -> Tensor:
        """The same as bool [B, M, N], M N numbers an item: for pictures and for code that expects it."""
        place = self.source(before)
        return place[..., None, :] == torch.arange(self.shape[-1], device=place.device)[:, None]

    def to(self, device: torch.device | str) -> TokenMatch:
        names = ("group", "members", "offsets", "score", "cu_before", "cu_seqlens")
        return replace(self, **{name: value.to(device) for name in names if (value := getattr(self, name)) is not None})

    def _item(self) -> Tensor:
        """The item of every packed token."""
        assert self.cu_before is not None
        return torch.searchsorted(self.cu_before[1:].contiguous(), torch.arange(len(self.group), dtype=torch.int32, device=self.group.device), right=True)

    def _rows(self, op: str, name: str, value: Any, like: Tensor) -> Tensor:
        wanted = "[" + ", ".join(str(n) for n in like.shape) + ", ...]"
        if not isinstance(value, Tensor) or value.dtype not in arguments.FLOATING_DTYPES:
            raise TypeError(f"{op}: {name} must be a float16, bfloat16, float32 or float64 tensor {wanted}, got {arguments.describe(value)}")
        if value.dim() < like.dim() or value.shape[: like.dim()] != like.shape:
            raise ValueError(f"{op}: {name} must have shape {wanted}, got {arguments.describe(value)}")
        if value.device != self.members.device:
            raise ValueError(f"{op}: {name} must be on the match's device {self.members.device}, got {value.device}")
        refuse_forward_mode(op, (value,))
        return value.reshape(like.numel(), value.shape[like.dim() :].numel())

    def _sizes(self, op: str, size: Any) -> Tensor:
        shape = self.group.shape
        if not isinstance(size, Tensor) or not size.is_floating_point():
            raise TypeError(f"{op}: size must be a floating-point tensor {list(shape)}, got {arguments.describe(size)}")
        if size.shape not in (shape, (*shape, 1)) or size.device != self.members.device:
            raise ValueError(f"{op}: size must have shape {list(shape)} or {[*shape, 1]} on {self.members.device}, got {arguments.describe(size)}")
        return size.detach().float().reshape(-1)


def match_of_groups(place: Tensor, count: int) -> TokenMatch:
    """From the place of every token among `count` merged ones of its item, int64 [B, N]."""
    group = place + torch.arange(len(place), device=place.device)[:, None] * count
    return TokenMatch(group.int(), *groups_of(group.flatten(), len(place) * count), torch.full_like(place, -torch.inf, dtype=torch.float32))


register_tree(TokenMatch, ("group", "members", "offsets", "score", "cu_before", "cu_seqlens"))
