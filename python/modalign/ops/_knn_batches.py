"""Searches in many small sets: items of a batch, padded to one length or packed one behind the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _arguments as arguments
from ._knn_search import moved
from ._registration import accumulation_dtype
from ._results import Neighbors


def item_by_item(
    op: str, search: Callable[..., Neighbors], queries: Any, points: Any, k: int, lengths: Any, beside: dict[str, Any], exclude_self: bool, worst: float
) -> Neighbors:
    """`search` in one item after the other. `beside` has the tensors that go with the rows of the queries ("query_ids", "exclude_labels[0]") or points."""
    both = {"queries": queries, "points": queries if points is None else points}
    for name, value in both.items():
        arguments.check_vectors(op, name, value, "[N, D]")
        if value.dim() != queries.dim() or value.dim() > 3:
            raise ValueError(f"{op}: {name} must be [B, N, D], or [N, D] with lengths, like the queries, got {arguments.describe(value)}")
    pair = lengths if isinstance(lengths, (tuple, list)) else (lengths, lengths if points is None else None)
    if len(pair) != 2 or (queries.dim() == 2 and (pair[0] is None or pair[1] is None)):
        raise TypeError(f"{op}: lengths must be an int64 tensor [B] without points, and a pair of them with points, got {arguments.describe(lengths)}")
    mine, theirs = (_rows_of_items(op, name, value, each) for (name, value), each in zip(both.items(), pair, strict=True))
    if len(mine) != len(theirs):
        raise ValueError(f"{op}: queries and points must have as many items, got {len(mine)} and {len(theirs)}")
    rows = {}
    for name, value in beside.items():
        shape = (both["queries"] if name in ("query_ids", "exclude_labels[0]") else both["points"]).shape[:-1]
        if value is not None and (not isinstance(value, Tensor) or value.shape != shape):
            raise ValueError(f"{op}: {name} must have shape {list(shape)}, got {arguments.describe(value)}")
        rows[name] = None if value is None else value.flatten()
    x, y = (value.flatten(0, -2) for value in both.values())
    values = x.new_full((len(x), k), worst, dtype=accumulation_dtype(x.dtype))
    indices = x.new_full((len(x), k), -1, dtype=torch.int64)
    for here, there in zip(mine, theirs, strict=True):
        most = min(k, there.stop - there.start - exclude_self)
        if here.start == here.stop or most < 1:
            continue
        first = there.start if queries.dim() == 2 else 0
        own = {name: None if value is None else value[here if name in ("query_ids", "exclude_labels[0]") else there] for name, value in rows.items()}
        own["query_ids"] = None if own["query_ids"] is None else moved(own["query_ids"], -first)
        found = search(x[here], None if points is None else y[there], most, own)
        values[here, :most], indices[here, :most] = found.values, moved(found.indices, first)
    shape = (*queries.shape[:-1], k)
    return Neighbors(values.view(shape), indices.view(shape))


def _rows_of_items(op: str, name: str, tensor: Tensor, lengths: Any) -> list[slice]:
    """The rows of each item where all rows lie below each other."""
    if lengths is None:
        sizes = [tensor.shape[1]] * len(tensor)
    elif not isinstance(lengths, Tensor) or lengths.dtype is not torch.int64:
        raise TypeError(f"{op}: lengths must be an int64 tensor [B], got {arguments.describe(lengths)} for the {name}")
    else:
        sizes = lengths.tolist() if lengths.dim() == 1 else []
    if tensor.dim() == 3:
        if len(sizes) != len(tensor) or any(not 0 <= size <= tensor.shape[1] for size in sizes):
            raise ValueError(f"{op}: lengths must be {len(tensor)} numbers from 0 to {tensor.shape[1]}, got {sizes} for the {name}")
        return [slice(b * tensor.shape[1], b * tensor.shape[1] + size) for b, size in enumerate(sizes)]
    if any(size < 0 for size in sizes) or sum(sizes) != len(tensor):
        raise ValueError(f"{op}: lengths must be 0 or more and add up to {len(tensor)}, got {sizes} for the {name}")
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
    return [slice(start, end) for start, end in zip(ends, ends[1:], strict=False)]
