"""Sequences that lie one behind the other."""

from __future__ import annotations

import torch
from torch import Tensor

from ._values import are_there
from .mask import Mask, relation
from .rules import whole_number
from .tokens import FIELDS, Tokens

__all__ = ["packed"]


def packed(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, queries: int, keys: int, *, causal: bool | str = False) -> Mask:
    """Keeps pairs of the same sequence: sequence s has the queries and keys from entry s to entry s + 1, less one. `causal`: False, "bottom_right" (True) or "top_left", in every sequence.

    >>> import torch
    >>> ends = torch.tensor([0, 1, 3], dtype=torch.int32)
    >>> packed(ends, ends, 3, 3, causal=True).dense()[0, 0].int().tolist()
    [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    """
    if causal not in (False, True, "bottom_right", "top_left") or (isinstance(causal, int) and not isinstance(causal, bool)):
        raise ValueError(f'packed: causal must be False, True, "bottom_right" or "top_left", got {causal!r}')
    for name, rows in (("queries", queries), ("keys", keys)):
        whole_number("packed", name, rows, 0)
    for name, cu, rows in (("cu_seqlens_q", cu_seqlens_q, queries), ("cu_seqlens_k", cu_seqlens_k, keys)):
        if not isinstance(cu, Tensor) or cu.is_floating_point() or cu.dim() != 1 or cu.shape != cu_seqlens_k.shape or len(cu) < 1:
            raise ValueError(f"packed: {name} must be whole numbers [sequences + 1], equally many for queries and keys, got {getattr(cu, 'shape', cu)}")
        if are_there(cu) and (int(cu[0]) != 0 or int(cu[-1]) != rows or bool((cu.diff() < 0).any())):
            raise ValueError(f"packed: {name} must rise from 0 to the number of rows {rows}, got {cu.tolist()}")
    late = cu_seqlens_k.diff() - cu_seqlens_q.diff() if causal in (True, "bottom_right") else torch.zeros_like(cu_seqlens_q[1:])
    of_queries, of_keys = _tokens(cu_seqlens_q, queries, late), _tokens(cu_seqlens_k, keys, torch.zeros_like(late))
    return relation({(0, 0): "causal" if causal else "always"}, of_queries, of_keys)


def _tokens(cu: Tensor, rows: int, late: Tensor) -> Tokens:
    """The sequence of every row, and its place there, `late` later."""
    row = torch.arange(rows, device=cu.device)
    sequence = torch.searchsorted(cu[1:].contiguous(), row.to(cu.dtype), right=True)
    begin = torch.cat([cu[:-1] - late, cu.new_zeros(1)])
    none, zero = (torch.full_like(row, number) for number in (-1, 0))
    fields = {"index": row - begin[sequence], "segment": none, "last": none, "document": sequence, "valid": (row < cu[-1]).long()}  # a row behind the last sequence is in none
    return Tokens(torch.stack([fields.get(name, zero) for name in FIELDS]).to(torch.int32)[None])
