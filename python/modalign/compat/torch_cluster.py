"""torch_cluster's neighbour searches with their argument names and results, on `modalign.ops.knn`.

>>> import torch
>>> from modalign.compat.torch_cluster import knn, knn_graph
>>> x = torch.tensor([[0.0], [1.0], [3.0]])
>>> knn_graph(x, 1)
tensor([[1, 0, 1],
        [0, 1, 2]])

Any k, any distance, equal ones by index. There k is at most 100, squared distances beyond 1e10 are lost, and the self loop is removed by asking for one
more, which may be a duplicate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops

__all__ = ["knn", "knn_graph"]


def _lengths(name: str, batch: Tensor | None, x: Tensor, items: int) -> Tensor:
    if batch is None:
        return torch.tensor([len(x)] + [0] * (items - 1))
    if batch.shape != (len(x),) or batch.dtype is not torch.int64 or bool((batch.diff() < 0).any()):
        raise ValueError(f"torch_cluster: {name} must be rising int64 numbers [{len(x)}], got {batch.dtype} {list(batch.shape)}")
    return batch.bincount(minlength=items).cpu()


def knn(
    x: Tensor,
    y: Tensor,
    k: int,
    batch_x: Tensor | None = None,
    batch_y: Tensor | None = None,
    cosine: bool = False,
    num_workers: int = 1,
    batch_size: int | None = None,
) -> Tensor:
    """[2, E]: for each row of `y` its k nearest of `x` in the same item of the batch; the row of y above, that of x below."""
    items = batch_size or 1 + max(int(batch.max()) if batch is not None and len(batch) else 0 for batch in (batch_x, batch_y))
    lengths = _lengths("batch_y", batch_y, y, items), _lengths("batch_x", batch_x, x, items)
    found = ops.knn(y, x, k, metric="cosine" if cosine else "euclidean", lengths=lengths).indices
    row, place = (found >= 0).nonzero(as_tuple=True)
    return torch.stack([row, found[row, place]])


def knn_graph(
    x: Tensor,
    k: int,
    batch: Tensor | None = None,
    loop: bool = False,
    flow: str = "source_to_target",
    cosine: bool = False,
    num_workers: int = 1,
    batch_size: int | None = None,
) -> Tensor:
    """[2, E]: the neighbour above and the point below; with `flow="target_to_source"` the other way round."""
    if flow not in ("source_to_target", "target_to_source"):
        raise ValueError(f'torch_cluster.knn_graph: flow must be "source_to_target" or "target_to_source", got {flow!r}')
    items = batch_size or (1 + int(batch.max()) if batch is not None and len(batch) else 1)
    lengths = _lengths("batch", batch, x, items)
    found = ops.knn(x, k=k, metric="cosine" if cosine else "euclidean", exclude_self=not loop, lengths=lengths).indices
    row, place = (found >= 0).nonzero(as_tuple=True)
    edges = [found[row, place], row]
    return torch.stack(edges if flow == "source_to_target" else edges[::-1])
