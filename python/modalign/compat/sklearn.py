"""scikit-learn's nearest neighbours with its argument names, on `modalign.ops.knn`.

>>> import numpy as np
>>> from modalign.compat.sklearn import NearestNeighbors
>>> NearestNeighbors(n_neighbors=1).fit(np.array([[0.0], [1.0], [3.0]])).kneighbors()[1].tolist()
[[1], [0], [1]]

Without `X`, `kneighbors` leaves each point itself out by its index; a duplicate of it is a neighbour. The cosine distance is 1 less the cosine.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..ops import knn

__all__ = ["NearestNeighbors"]

METRICS = {"euclidean": "euclidean", "l2": "euclidean", "minkowski": "euclidean", "sqeuclidean": "sqeuclidean", "cosine": "cosine"}


def _tensor(X: ArrayLike) -> Tensor:
    array = np.asarray(X)
    return torch.from_numpy(np.array(array if array.dtype == np.float32 else array.astype(np.float64)))


class NearestNeighbors:
    """`fit(X)`, `kneighbors(X, n_neighbors, return_distance)`, `kneighbors_graph(X, n_neighbors, mode)`."""

    def __init__(self, *, n_neighbors: int = 5, algorithm: str = "brute", metric: str = "minkowski", p: float = 2, n_jobs: int | None = None) -> None:
        if metric not in METRICS:
            raise ValueError(f"NearestNeighbors: metric must be one of {', '.join(METRICS)}, got {metric!r}")
        if p != 2:
            raise ValueError(f"NearestNeighbors: p must be 2, got {p!r}")
        if algorithm not in ("brute", "auto"):
            raise ValueError(f'NearestNeighbors: algorithm must be "brute" or "auto" (the search is exact, without a tree), got {algorithm!r}')
        self.n_neighbors, self.metric, self.n_jobs = n_neighbors, metric, n_jobs

    def fit(self, X: ArrayLike, y: object = None) -> NearestNeighbors:
        self._points = _tensor(X)
        self.n_samples_fit_, self.n_features_in_ = self._points.shape
        return self

    def kneighbors(self, X: ArrayLike | None = None, n_neighbors: int | None = None, return_distance: bool = True) -> Any:
        if not hasattr(self, "_points"):
            raise RuntimeError("NearestNeighbors: fit must be called before kneighbors")
        k, metric = self.n_neighbors if n_neighbors is None else n_neighbors, METRICS[self.metric]
        if X is None:
            found = knn(self._points, k=k, metric=metric, exclude_self=True)
        else:
            found = knn(_tensor(X).to(self._points.dtype), self._points, k, metric=metric)
        distances = 1 - found.values if metric == "cosine" else found.values
        return (distances.numpy(), found.indices.numpy()) if return_distance else found.indices.numpy()

    def kneighbors_graph(self, X: ArrayLike | None = None, n_neighbors: int | None = None, mode: str = "connectivity") -> Any:
        """A scipy.sparse.csr_matrix [queries, points]: ones, or distances."""
        from scipy.sparse import csr_matrix

        if mode not in ("connectivity", "distance"):
            raise ValueError(f'NearestNeighbors: mode must be "connectivity" or "distance", got {mode!r}')
        distances, indices = self.kneighbors(X, n_neighbors)
        data: NDArray[Any] = np.ones(indices.size) if mode == "connectivity" else distances.ravel()
        pointers = np.arange(0, indices.size + 1, indices.shape[1])
        return csr_matrix((data, indices.ravel(), pointers), shape=(len(indices), self.n_samples_fit_))
