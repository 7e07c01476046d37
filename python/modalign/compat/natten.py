"""NATTEN's fused calls with their argument names and layout, on `modalign.ops.neighborhood_attention`.

>>> import torch
>>> from modalign.compat.natten import na2d
>>> x = torch.ones(1, 4, 5, 2, 8)  # [B, height, width, H, D]
>>> na2d(x, x, x, kernel_size=(3, 5)).shape
torch.Size([1, 4, 5, 2, 8])

On the CPU, for any head dimension, with a gradient. Their options that choose a backend or its tiles have nothing to choose here; `additional_keys` are attended to by `masked_attention` and merged
by `return_lse`, as docs/ops/neighborhood_attention.md shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..ops import _arguments as arguments
from ..ops import neighborhood_attention

__all__ = ["na1d", "na2d", "na3d"]


def _heads_last(name: str, rank: int, query: Tensor, key: Tensor, value: Tensor, return_lse: bool, **options: Any) -> Any:
    arguments.check_flag(f"natten.{name}", "return_lse", return_lse)
    for argument, x in (("query", query), ("key", key), ("value", value)):
        arguments.check_vectors(f"natten.{name}", argument, x, "[B, grid, H, D]")
        if x.dim() != rank + 3 or x.shape[1 : rank + 1] != query.shape[1 : rank + 1]:
            raise ValueError(f"natten.{name}: {argument} must have {rank + 3} dimensions [B, grid, H, D], one grid for all, got {list(x.shape)}")
    flat = (x.flatten(1, rank).transpose(1, 2) for x in (query, key, value))
    found = neighborhood_attention(*flat, grid=tuple(query.shape[1 : rank + 1]), return_lse=True, **options)
    out, lse = (x.transpose(1, 2).unflatten(1, query.shape[1 : rank + 1]) for x in found)
    return (out, lse) if return_lse else out


def na1d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Sequence[int] | int,
    stride: Sequence[int] | int = 1,
    dilation: Sequence[int] | int = 1,
    is_causal: Sequence[bool] | bool = False,
    scale: float | None = None,
    *,
    return_lse: bool = False,
) -> Any:
    """[B, L, H, D] each; the result likewise, with `return_lse` also lse [B, L, H]."""
    return _heads_last("na1d", 1, query, key, value, return_lse, kernel_size=kernel_size, stride=stride, dilation=dilation, is_causal=is_causal, scale=scale)


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Sequence[int] | int,
    stride: Sequence[int] | int = 1,
    dilation: Sequence[int] | int = 1,
    is_causal: Sequence[bool] | bool = False,
    scale: float | None = None,
    *,
    return_lse: bool = False,
) -> Any:
    """[B, height, width, H, D] each."""
    return _heads_last("na2d", 2, query, key, value, return_lse, kernel_size=kernel_size, stride=stride, dilation=dilation, is_causal=is_causal, scale=scale)


def na3d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Sequence[int] | int,
    stride: Sequence[int] | int = 1,
    dilation: Sequence[int] | int = 1,
    is_causal: Sequence[bool] | bool = False,
    scale: float | None = None,
    *,
    return_lse: bool = False,
) -> Any:
    """[B, time, height, width, H, D] each."""
    return _heads_last("na3d", 3, query, key, value, return_lse, kernel_size=kernel_size, stride=stride, dilation=dilation, is_causal=is_causal, scale=scale)
