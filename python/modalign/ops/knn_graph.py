"""The graph of nearest neighbours, as it is or made symmetric."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _arguments as arguments
from ._results import NeighborGraph
from .knn import knn, reference_knn

__all__ = ["knn_graph", "reference_knn_graph"]

SYMMETRIZE = ("none", "union", "mutual")


def knn_graph(points: Tensor, k: int = 10, *, symmetrize: str = "none", include_self: bool = False, **options: Any) -> NeighborGraph:
    r"""Every point and its k nearest others as a sparse graph.

    ::

        none     i -> j      where j is among the k nearest of i
        union    i <-> j     where i -> j or j -> i
        mutual   i <-> j     where i -> j and j -> i

    >>> import torch
    >>> graph = knn_graph(torch.tensor([[0.0], [1.0], [3.0]]), 1, metric="euclidean", symmetrize="union")
    >>> graph.edge_index.tolist(), graph.values.tolist()
    ([[0, 1, 1, 2], [1, 0, 2, 1]], [1.0, 1.0, 2.0, 2.0])

    Parameters
    ----------
    points : Tensor [N, D]
    k : int
        1 to N - 1; with `include_self` to N.
    symmetrize : "none", "union" or "mutual"
    include_self : bool
        A point is a candidate like all others, found first where none is equal to it: its edges may hold a loop.
    options
        Of `knn`: `metric`, `exclude_labels`, `lengths` (packed items: no edge leaves an item), `center`, `csls_neighbors`, `workspace_bytes`.

    Returns
    -------
    NeighborGraph(row_pointers, columns, values)
        int64 [N + 1], int64 [E], and similarities or distances [E]; columns rise within a row. ``.edge_index`` is the same graph as int64 [2, E]:
        the point, and below it its neighbour. A symmetric graph has one value for both directions, found from the lower index where both lists have it.

    Gradient
    --------
    None. `knn_values` has the values of given edges with one.

    Edges
    -----
    Where `knn` fills a list with -1 there is no edge. N = 0 is an error, as k > N is; with `lengths` items may be smaller than k.

    Raises
    ------
    TypeError, ValueError
        ``knn_graph: <argument> must ..., got ...``, and what `knn` refuses.

    Complexity
    ----------
    That of `knn`; the edges are sorted once by the code i N + j.

    Paper: Dong, Moses, Li, "Efficient k-nearest neighbor graph construction for generic similarity measures", WWW 2011, for the graph; here it is exact.
    """
    return _graph("knn_graph", knn, points, k, symmetrize, include_self, options)


def _graph(op: str, search: Any, points: Tensor, k: int, symmetrize: str, include_self: bool, options: dict[str, Any]) -> NeighborGraph:
    if symmetrize not in SYMMETRIZE:
        raise ValueError(f"{op}: symmetrize must be one of {', '.join(SYMMETRIZE)}, got {arguments.describe(symmetrize)}")
    arguments.check_flag(op, "include_self", include_self)
    arguments.check_vectors(op, "points", points, "[N, D]")
    if points.dim() != 2:
        raise ValueError(f"{op}: points must have 2 dimensions [N, D] (items of a batch go one behind the other, with lengths), got {arguments.describe(points)}")
    for name in ("points", "bias", "query_ids", "process_group", "exclude_self", "exchange"):
        if name in options:
            raise TypeError(f"{op}: options must be those of a search of points among themselves in one process, got {name}")
    values, indices = search(points, None, k, exclude_self=not include_self, **options)
    N, there = len(points), indices >= 0
    code = (torch.arange(N, device=indices.device)[:, None] * N + indices)[there]
    code, order = code.sort()
    values = values[there][order]
    if symmetrize != "none":
        # Both directions, those of the lists first: a stable sort leaves the value of the list itself first among equal codes, then the one turned round.
        turned = code % N * N + code // N
        if symmetrize == "mutual":
            both = torch.isin(code, turned)
            code, values, turned = code[both], values[both], turned[both]
        code, order = torch.cat([code, turned]).sort(stable=True)
        values = torch.cat([values, values])[order]
        first = torch.ones_like(code, dtype=torch.bool)
        first[1:] = code[1:] != code[:-1]
        code, values = code[first], values[first]
        # One value for both directions: that of the lower index's.
        lower = torch.minimum(code // N, code % N) * N + torch.maximum(code // N, code % N)
        values = values[torch.searchsorted(code, lower)]
    pointers = torch.searchsorted(code, torch.arange(N + 1, device=code.device) * N)
    return NeighborGraph(pointers, code % N, values)


# ----------------------------------------------------------------------------------------------------------------------------- plain-torch formulas


def reference_knn_graph(points: Tensor, k: int = 10, *, symmetrize: str = "none", include_self: bool = False, **options: Any) -> NeighborGraph:
    """`knn_graph` on `reference_knn`: a matrix of scores."""
    return _graph("reference_knn_graph", reference_knn, points, k, symmetrize, include_self, options)
