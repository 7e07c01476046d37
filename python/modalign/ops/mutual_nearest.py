"""Pairs that are each other's nearest. [MUSE, ICLR 2018]"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _knn_arguments as check
from .knn import knn

__all__ = ["mutual_nearest"]


def mutual_nearest(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    r"""The pairs (i, j) of which j is nearest to i among all of y and i nearest to j among all of x: pseudo-labels that hold both ways.

    >>> import torch
    >>> mutual_nearest(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), torch.tensor([[0.1, 1.0], [1.0, 0.2]]))
    tensor([[1, 1],
            [2, 0]])

    Parameters
    ----------
    x : Tensor [N, D]
    y : Tensor [M, D]
    options
        Of `knn`: `metric` ("csls" with `csls_neighbors` takes off what is near to everything), `center`, `workspace_bytes`.

    Returns
    -------
    Tensor int64 [P, 2]: rows of x, rising, and of y. Each index at most once.

    Gradient
    --------
    None.

    Edges
    -----
    Equally near ones count by the lowest index. N = 0 or M = 0: no pairs.

    Raises
    ------
    TypeError, ValueError
        ``mutual_nearest: <argument> must ..., got ...``, and what `knn` refuses.

    Complexity
    ----------
    Two searches for one neighbour, 4 N M D FLOP; no matrix N x M.

    Paper: Conneau et al., "Word Translation Without Parallel Data", ICLR 2018, section 2.2; for entities UMAEA, ISWC 2023.
    """
    op = "mutual_nearest"
    for name in ("bias", "query_ids", "exclude_self", "exclude_labels", "lengths", "process_group", "exchange"):
        if name in options:
            raise TypeError(f"{op}: options must be metric, center, csls_neighbors or workspace_bytes, got {name}")
    x = check.check_queries(op, x, options.get("metric", "cosine"), False, None, None, (*check.METRICS, "csls"), name="x")
    y = check.check_points(op, check.check_matrix(op, "y", y, "[M, D]"), x, "y", "x")
    if len(x) == 0 or len(y) == 0:
        return torch.empty(0, 2, dtype=torch.int64, device=x.device)
    forth, back = (knn(a, b, 1, **options).indices[:, 0] for a, b in ((x, y), (y, x)))
    return both_ways(forth, back)


def both_ways(forth: Tensor, back: Tensor) -> Tensor:
    rows = torch.arange(len(forth), device=forth.device)
    return torch.stack([rows, forth], 1)[(forth >= 0) & (back[forth.clamp(min=0)] == rows)]
