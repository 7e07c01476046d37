"""knn_graph against adjacency matrices; knn_values on what a search found."""

from __future__ import annotations

import pytest
import torch

from modalign.ops import knn, knn_graph, knn_values
from modalign.ops.knn import METRICS
from modalign.ops.knn_graph import reference_knn_graph
from modalign.testing import Maker
from test_knn import whole_numbers


def matrix(graph):
    """[N, N] of values, NaN where there is no edge."""
    N = len(graph.row_pointers) - 1
    dense = torch.full((N, N), torch.nan, dtype=graph.values.dtype)
    dense[graph.edge_index[0], graph.edge_index[1]] = graph.values
    return dense


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("include_self", [False, True])
def test_graphs_are_those_of_the_matrix(metric, include_self):
    points = whole_numbers(90, 4, 3).float()  # ties
    found = knn(points, k=7, metric=metric, exclude_self=not include_self)
    directed = torch.full((90, 90), torch.nan).scatter(1, found.indices, found.values)
    there = ~directed.isnan()
    for symmetrize, wanted in (("none", there), ("union", there | there.T), ("mutual", there & there.T)):
        graph = knn_graph(points, 7, metric=metric, symmetrize=symmetrize, include_self=include_self)
        dense = matrix(graph)
        assert torch.equal(~dense.isnan(), wanted)
        assert graph.row_pointers.tolist() == [0, *wanted.sum(1).cumsum(0).tolist()]
        assert all((row.diff() > 0).all() for row in graph.columns.split(graph.row_pointers.diff().tolist()))
        if symmetrize == "none":
            assert torch.equal(dense[there], directed[there])
        else:
            assert torch.equal(dense.nan_to_num(-99), dense.T.nan_to_num(-99))
            upper = torch.where(there, directed, directed.T).triu()
            assert torch.equal(dense.triu()[wanted.triu()], upper[wanted.triu()])
        same = reference_knn_graph(points, 7, metric=metric, symmetrize=symmetrize, include_self=include_self)
        if metric != "cosine":
            assert torch.equal(same.columns, graph.columns)


def test_items_and_what_is_left_out():
    points = Maker(torch.float32, seed=4).randn(30, 5)
    graph = knn_graph(points, 6, lengths=torch.tensor([4, 0, 1, 25]), symmetrize="union")
    item = torch.tensor([0] * 4 + [2] + [3] * 25)
    assert torch.equal(item[graph.edge_index[0]], item[graph.edge_index[1]])
    assert graph.row_pointers.diff()[:5].tolist() == [3, 3, 3, 3, 0] and (graph.row_pointers.diff()[5:] >= 6).all()
    assert torch.equal(graph.to("cpu").columns, graph.columns)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (dict(symmetrize="both"), ValueError, "knn_graph: symmetrize must be one of none, union, mutual, got str 'both'"),
        (dict(include_self=1), TypeError, "knn_graph: include_self must be True or False"),
        (dict(k=9), ValueError, "knn: k must be from 1 to M - 1 = 8"),
        (dict(points=torch.ones(2, 9, 3)), ValueError, r"knn_graph: points must have 2 dimensions \[N, D\]"),
        (dict(bias=torch.ones(9)), TypeError, "knn_graph: options must be those of a search of points among themselves in one process, got bias"),
    ],
)
def test_refused(change, kind, message):
    given = dict(points=torch.ones(9, 3), k=2) | change
    with pytest.raises(kind, match=message):
        knn_graph(given.pop("points"), given.pop("k"), **given)


@pytest.mark.parametrize("metric", METRICS)
def test_values_of_a_search_again(metric):
    make = Maker(torch.float64, seed=5)
    queries, points = make.randn(40, 12), make.randn(90, 12)
    found = knn(queries, points, 8, metric=metric)
    torch.testing.assert_close(knn_values(queries, points, found.indices, metric=metric), found.values)
    labels = torch.zeros(40, dtype=torch.int64), torch.zeros(90, dtype=torch.int64)
    none = knn(queries, points, 8, metric=metric, exclude_labels=labels)
    leaf = queries.clone().requires_grad_()
    values = knn_values(leaf, points, none.indices, metric=metric)
    assert torch.equal(values, none.values)
    values.masked_fill(none.indices < 0, 0).sum().backward()
    assert (leaf.grad == 0).all()


def test_the_gradient_has_one_order_of_sums():
    """Thousands of edges into few points, for any number of threads."""
    make = Maker(torch.float32, seed=6)
    queries, points = make.randn(3000, 40).requires_grad_(), make.randn(5, 40).requires_grad_()
    indices, before, found = torch.arange(3000 * 9).view(3000, 9) % 5, torch.get_num_threads(), []
    for metric in METRICS:
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(torch.autograd.grad(knn_values(queries, points, indices, metric=metric).square().sum(), [queries, points]))
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(a, b) for other in found[-2:] for a, b in zip(found[-3], other, strict=True))


def test_a_distance_far_from_the_origin():
    """Neither the value nor the gradient is a difference of large products."""
    make = Maker(torch.float64, seed=7)
    near = make.randn(20, 6), make.randn(30, 6)
    far = [(each + 1000).float().requires_grad_() for each in near]
    near = [(each.detach().double() - 1000).requires_grad_() for each in far]
    indices = torch.arange(60).view(20, 3) % 30
    values = [knn_values(*pair, indices, metric="euclidean") for pair in (far, near)]
    torch.testing.assert_close(values[0].double(), values[1], rtol=1e-5, atol=0)
    gradients = [torch.autograd.grad(value.sum(), pair) for value, pair in zip(values, (far, near), strict=True)]
    for ours, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)
