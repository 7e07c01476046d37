"""How well clusters match classes: accuracy under the best naming, mutual information, and the adjusted Rand index."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._assignment import assignment
from ..ops._arguments import describe

__all__ = ["Clustering", "clustering"]

TABLE = 100_000_000  # cells of clusters times classes, 800 MB


@dataclass(frozen=True)
class Clustering:
    """accuracy: share of items whose cluster is named after their class, the naming (one cluster a class) being the best there is; nmi: mutual information over the mean of the two
    entropies; ari: pairs of items on which both agree, less what chance gives, 0 for chance and 1 for the same partition."""

    accuracy: float
    nmi: float
    ari: float


def clustering(clusters: Tensor, labels: Tensor) -> Clustering:
    """Compare a partition with classes. The names of clusters do not matter.

    >>> import torch
    >>> clustering(torch.tensor([0, 0, 1, 1, 2]), torch.tensor([5, 5, 3, 3, 3]))
    Clustering(accuracy=0.8, nmi=0.778..., ari=0.545...)

    clusters, labels: int64 [N], N 1 or more, values of any kind. Where both partitions are a single class all three are 1; where one of them is and the other is not, nmi and ari are 0. The best naming
    is an assignment problem over the table of clusters and classes, at most 10^8 cells, and needs SciPy. Raises ValueError and TypeError: ``clustering: <argument> must ..., got ...``.
    """
    for name, each in (("clusters", clusters), ("labels", labels)):
        if not isinstance(each, Tensor) or each.dtype is not torch.int64 or each.dim() != 1 or len(each) == 0 or each.shape != clusters.shape:
            raise ValueError(f"clustering: {name} must be an int64 tensor [N] like the other, N 1 or more, got {describe(each)}")
    rows, columns = (each.cpu().unique(return_inverse=True)[1] for each in (clusters, labels))
    N, K, L = len(rows), int(rows.max()) + 1, int(columns.max()) + 1
    if K * L > TABLE:
        raise ValueError(f"clustering: clusters must make a table of at most {TABLE} cells with the classes, got {K} x {L}")
    table = (rows * L + columns).bincount(minlength=K * L).view(K, L).double()
    matched = assignment("clustering", -table)
    accuracy = float(table[matched].sum()) / N

    def entropy(counts: Tensor) -> Tensor:
        share = counts[counts > 0] / N
        return -(share * share.log()).sum()

    def pairs(counts: Tensor) -> float:
        return float((counts * (counts - 1)).sum()) / 2

    by_row, by_column = table.sum(1), table.sum(0)
    each, other = entropy(by_row), entropy(by_column)
    shared = each + other - entropy(table.flatten())
    nmi = 1.0 if K == L == 1 else float(shared / ((each + other) / 2))
    together, expected = (pairs(by_row) + pairs(by_column)) / 2, pairs(by_row) * pairs(by_column) / max(1, N * (N - 1) / 2)
    ari = 1.0 if together == expected else (pairs(table) - expected) / (together - expected)
    return Clustering(accuracy, max(0.0, nmi), ari)
