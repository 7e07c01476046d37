"""Attention of the tokens of a grid to windows around them. [Neighborhood Attention, CVPR 2023; Generalized Neighborhood Attention, 2025]"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..masks.neighborhood import Window, checked_windows, neighborhood_of
from . import _arguments as arguments
from . import _attention_arguments as check
from .masked_attention import masked_attention, reference_masked_attention

__all__ = ["neighborhood_attention", "reference_neighborhood_attention"]


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: Sequence[int],
    kernel_size: Sequence[int] | int,
    dilation: Sequence[int] | int = 1,
    stride: Sequence[int] | int = 1,
    is_causal: Sequence[bool] | bool = False,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    r"""`masked_attention` of the tokens of a grid, each with the window of tokens around it.

    ::

        along one dimension of L tokens, kernel k, stride s:    c = min(i // s * s + s // 2, L - 1)        first = clamp(c - k // 2, 0, L - k)        keys first to first + k - 1
        causal:                                                 c = min(i // s * s + s - 1, L - 1)         keys max(c - k + 1, 0) to i

    Windows are shifted at the border: every query has as many keys. An even k has one more on the left. With dilation d this holds among the tokens of the same residue modulo d. In two and
    three dimensions a key is kept if it is along each. Tokens are put into an order in which a tile of the kernel is a box of the grid, or close to it, so that windows meet few tiles.

    >>> import torch
    >>> zeros, v = torch.zeros(1, 1, 4, 8), torch.tensor([1.0, 2.0, 3.0, 8.0]).view(1, 1, 4, 1)
    >>> neighborhood_attention(zeros, zeros, v, grid=(4,), kernel_size=2).flatten()
    tensor([1.5000, 1.5000, 2.5000, 5.5000])

    Parameters
    ----------
    query : Tensor [B, H, N, D]
    key : Tensor [B, Hkv, N, D]
        Hkv divides H, as in `masked_attention`.
    value : Tensor [B, Hkv, N, Dv]
    grid : one to three ints
        Sizes; their product is N, and tokens run along the last dimension first.
    kernel_size, dilation, stride : int, or one for each dimension
        1 <= stride <= kernel_size, kernel_size * dilation <= size.
    is_causal : bool, or one for each dimension
    scale : float, optional
        Default 1 / sqrt(D).
    return_lse : bool
        Also the logarithm of the sum of exponentials, by which attention to other tokens is merged in.

    Returns
    -------
    Tensor [B, H, N, Dv] in the query's dtype; with `return_lse` also lse [B, H, N] in the accumulation dtype.

    Gradient
    --------
    As in `masked_attention`: to query, key and value, also through lse; double backward and forward mode raise.

    Edges
    -----
    Every query keeps itself. B = 0: empty. Pairs outside windows do not reach a result, not even with NaN in them.

    Raises
    ------
    TypeError, ValueError
        ``neighborhood_attention: <argument> must ..., got ...``.

    Complexity
    ----------
    2 (D + Dv) FLOP for each pair of the tiles of 96 x 96 that windows meet. Memory beyond that of `masked_attention`: query, key, value and result once more, for their order; the mask and the order,
    some 30 numbers a token, are made anew by every call. `modalign.masks.neighborhood` makes them once.

    Papers: Hassani et al., "Neighborhood Attention Transformer", CVPR 2023; Hassani and Shi, "Dilated Neighborhood Attention Transformer", 2022; Hassani et al., "Faster Neighborhood Attention",
    NeurIPS 2024 (causal); "Generalized Neighborhood Attention", 2025 (stride).
    """
    op = "neighborhood_attention"
    query, key, value = check.check_operands(op, *(check.in_autocast_dtype(each) for each in (query, key, value)), 4)
    check.check_numbers(op, query, False, scale, 0)
    arguments.check_flag(op, "return_lse", return_lse)
    windows = checked_windows(op, grid, kernel_size, dilation, stride, is_causal)
    for name, tokens in (("query", query.shape[2]), ("key", key.shape[2])):
        if tokens != math.prod(grid):
            raise ValueError(f"{op}: {name} must have the N = {math.prod(grid)} tokens of the grid {list(grid)}, got {tokens}")
    hood = neighborhood_of(windows, query.device)
    out, lse = masked_attention(hood.arrange(query), hood.arrange(key), hood.arrange(value), hood.mask, scale=scale, return_lse=True)
    return (hood.restore(out), hood.restore(lse, -1)) if return_lse else hood.restore(out)


# ----------------------------------------------------------------------------------------------------------------------------- plain-torch formulas


def _kept_along(window: Window, device: torch.device) -> Tensor:
    """bool [L, L] of one dimension, from the definition."""
    size, kernel, dilation, stride, causal = window
    token = torch.arange(size, device=device)
    i, residue, j = token // dilation, token % dilation, (token // dilation)[None]
    L = -((residue - size) // dilation)
    if causal:
        c = torch.minimum(i // stride * stride + stride - 1, L - 1)
        start, end = (c - kernel + 1).clamp(min=0), i + 1
    else:
        left, right = kernel // 2, kernel - kernel // 2 - 1
        c = torch.minimum(i // stride * stride + stride // 2, L - 1)
        start = (c - left).clamp(min=0) + torch.where(c + right >= L, L - right - c - 1, 0)
        end = start + kernel
    return (residue[:, None] == residue) & (start[:, None] <= j) & (j < end[:, None])


def reference_neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: Sequence[int],
    kernel_size: Sequence[int] | int,
    dilation: Sequence[int] | int = 1,
    stride: Sequence[int] | int = 1,
    is_causal: Sequence[bool] | bool = False,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """`neighborhood_attention` in plain torch: the matrix of pairs, and all logits at once."""
    keep = torch.ones(1, 1, dtype=torch.bool, device=query.device)
    for window in checked_windows("reference_neighborhood_attention", grid, kernel_size, dilation, stride, is_causal):
        along = _kept_along(window, query.device)
        keep = (keep[:, None, :, None] & along[None, :, None, :]).reshape(len(keep) * len(along), -1)
    return reference_masked_attention(query, key, value, keep, scale=scale, return_lse=return_lse)
