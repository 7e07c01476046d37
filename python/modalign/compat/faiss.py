"""The exact indices of faiss with their names and call order, on `modalign.ops.knn`.

>>> import numpy as np
>>> from modalign.compat import faiss
>>> index = faiss.IndexFlatL2(1)
>>> index.add(np.array([[0.0], [1.0], [3.0]], dtype=np.float32))
>>> distances, labels = index.search(np.array([[0.9]], dtype=np.float32), 2)
>>> labels.tolist()
[[1, 0]]

Distances of L2 are squared, as there. Where it says nothing, this does: equal distances come in the order of the labels. Where there are fewer than k
vectors, labels are -1 and distances the largest float32 (for inner products the smallest). Arrays in give arrays, tensors give tensors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..ops import knn as search

__all__ = ["METRIC_INNER_PRODUCT", "METRIC_L2", "IndexFlat", "IndexFlatIP", "IndexFlatL2", "knn"]

METRIC_INNER_PRODUCT, METRIC_L2 = 0, 1
LARGEST = torch.finfo(torch.float32).max

Vectors = Tensor | NDArray[Any]


def _tensor(name: str, x: Vectors) -> Tensor:
    if not isinstance(x, (Tensor, np.ndarray)):
        raise TypeError(f"faiss: {name} must be an array or tensor [n, d], got {type(x).__name__}")
    return x if isinstance(x, Tensor) else torch.from_numpy(np.asarray(x, dtype=np.float32))


def knn(xq: Vectors, xb: Vectors, k: int, metric: int = METRIC_L2) -> tuple[Any, Any]:
    """(distances [nq, k], labels int64 [nq, k]) of the vectors of `xb` nearest to those of `xq`."""
    if metric not in (METRIC_INNER_PRODUCT, METRIC_L2):
        raise ValueError(f"faiss.knn: metric must be METRIC_INNER_PRODUCT or METRIC_L2, got {metric!r}")
    queries, points = _tensor("xq", xq), _tensor("xb", xb)
    none = LARGEST if metric == METRIC_L2 else -LARGEST
    distances, labels = queries.new_full((len(queries), k), none, dtype=torch.float32), queries.new_full((len(queries), k), -1, dtype=torch.int64)
    if len(points):
        found = search(queries, points, min(k, len(points)), metric="sqeuclidean" if metric == METRIC_L2 else "dot")
        distances[:, : len(points)] = torch.where(found.indices >= 0, found.values, none)
        labels[:, : len(points)] = found.indices
    return (distances, labels) if isinstance(xq, Tensor) else (distances.numpy(), labels.numpy())


class IndexFlat:
    """Vectors as they are; `add`, `search`, `reset`, `reconstruct`, `ntotal`."""

    def __init__(self, d: int, metric: int = METRIC_L2) -> None:
        self.d, self.metric_type, self.is_trained = d, metric, True
        self._parts: list[Tensor] = []

    @property
    def ntotal(self) -> int:
        return sum(map(len, self._parts))

    def add(self, x: Vectors) -> None:
        vectors = _tensor("x", x)
        if vectors.dim() != 2 or vectors.shape[1] != self.d:
            raise ValueError(f"IndexFlat.add: x must have shape [n, {self.d}], got {list(vectors.shape)}")
        self._parts.append(vectors.clone())

    def _vectors(self) -> Tensor:
        self._parts = [torch.cat(self._parts) if self._parts else torch.empty(0, self.d)]
        return self._parts[0]

    def search(self, x: Vectors, k: int) -> tuple[Any, Any]:
        return knn(x, self._vectors(), k, self.metric_type)

    def reconstruct(self, key: int) -> NDArray[Any]:
        return self._vectors()[key].numpy()

    def reset(self) -> None:
        self._parts = []


class IndexFlatL2(IndexFlat):
    def __init__(self, d: int) -> None:
        super().__init__(d, METRIC_L2)


class IndexFlatIP(IndexFlat):
    def __init__(self, d: int) -> None:
        super().__init__(d, METRIC_INNER_PRODUCT)
