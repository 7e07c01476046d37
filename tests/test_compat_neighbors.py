"""Calls of faiss, scikit-learn and torch_cluster: argument names, shapes, what is returned; against all distances in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from modalign.compat import faiss, sklearn, torch_cluster


def points(n, d, seed):
    return np.random.default_rng(seed).integers(-4, 5, (n, d)).astype(np.float32)


def distances(x, y):
    return ((x[:, None].astype(np.float64) - y) ** 2).sum(-1)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_faiss(kind):
    x, y = points(20, 5, 1), points(70, 5, 2)
    index = faiss.IndexFlatL2(5)
    index.add(kind(y[:30]))
    index.add(kind(y[30:]))
    found, labels = index.search(kind(x), 9)
    order = np.argsort(distances(x, y), 1, kind="stable")[:, :9]
    assert isinstance(found, type(kind(x))) and (np.asarray(labels) == order).all()
    assert (np.asarray(found) == np.take_along_axis(distances(x, y), order, 1)).all()
    assert index.ntotal == 70 and (index.reconstruct(33) == y[33]).all()
    products = faiss.IndexFlatIP(5)
    products.add(kind(y))
    order = np.argsort(-(x.astype(np.float64) @ y.T), 1, kind="stable")[:, :9]
    assert (np.asarray(products.search(kind(x), 9)[1]) == order).all()
    assert (np.asarray(faiss.knn(kind(x), kind(y), 9, faiss.METRIC_INNER_PRODUCT)[1]) == order).all()
    few, none = faiss.knn(kind(x), kind(y[:2]), 4)
    assert (np.asarray(none)[:, 2:] == -1).all() and (np.asarray(few)[:, 2:] > 3e38).all()
    index.reset()
    assert index.ntotal == 0 and (np.asarray(index.search(kind(x), 1)[1]) == -1).all()
    with pytest.raises(ValueError, match=r"IndexFlat.add: x must have shape \[n, 5\], got \[70, 4\]"):
        index.add(kind(y[:, :4]))


@pytest.mark.parametrize("metric", ["minkowski", "l2", "sqeuclidean", "cosine"])
def test_sklearn(metric):
    x, y = points(20, 5, 3) + np.float32(0.5), points(70, 5, 4) + np.float32(0.5)
    unit = [each.astype(np.float64) / np.linalg.norm(each, axis=1, keepdims=True) for each in (x, y)]
    exact = 1 - unit[0] @ unit[1].T if metric == "cosine" else distances(x, y) if metric == "sqeuclidean" else distances(x, y) ** 0.5
    model = sklearn.NearestNeighbors(n_neighbors=6, metric=metric).fit(y)
    found, indices = model.kneighbors(x)
    np.testing.assert_allclose(found, np.sort(exact, 1)[:, :6], atol=1e-5)
    np.testing.assert_allclose(found, np.take_along_axis(exact, indices, 1), atol=1e-5)
    assert (model.kneighbors(x, return_distance=False) == indices).all() and model.kneighbors(x, 3)[0].shape == (20, 3)
    among = model.kneighbors()[1]
    assert among.shape == (70, 6) and not (among == np.arange(70)[:, None]).any()
    graph = model.kneighbors_graph(x, mode="distance")
    assert graph.shape == (20, 70) and np.allclose(np.sort(graph.toarray())[:, -6:], np.sort(found), atol=1e-6)
    assert (model.kneighbors_graph().sum(1) == 6).all()
    for wrong, message in ((dict(metric="manhattan"), "metric must be one of"), (dict(p=1), "p must be 2"), (dict(algorithm="ball_tree"), "algorithm must be")):
        with pytest.raises(ValueError, match=message):
            sklearn.NearestNeighbors(**wrong)


@pytest.mark.parametrize("cosine", [False, True])
def test_torch_cluster(cosine):
    x, y = torch.from_numpy(points(30, 4, 5)), torch.from_numpy(points(12, 4, 6))
    batch_x, batch_y = torch.arange(30) // 13, torch.arange(12) // 5
    found = torch_cluster.knn(x, y, 3, batch_x, batch_y, cosine=cosine)
    assert found.shape == (2, 36) and torch.equal(batch_y[found[0]], batch_x[found[1]])
    for i in range(12):
        own = (batch_x == batch_y[i]).nonzero().flatten()
        score = torch.nn.functional.cosine_similarity(y[i : i + 1].double(), x.double()) if cosine else -(y[i] - x).square().sum(1)
        torch.testing.assert_close(score[found[1, found[0] == i]], score[own].sort(descending=True).values[:3], atol=1e-6, rtol=0)
    graph = torch_cluster.knn_graph(x, 4, batch_x, cosine=cosine)
    assert graph[1].bincount().tolist() == [4] * 26 + [3] * 4  # the last item has four points
    assert (graph[0] != graph[1]).all() and torch.equal(batch_x[graph[0]], batch_x[graph[1]])
    turned = torch_cluster.knn_graph(x, 4, batch_x, cosine=cosine, flow="target_to_source")
    assert torch.equal(turned, graph.flip(0))
    assert (torch_cluster.knn_graph(x[:3] + 1, 1, loop=True)[:, :1] == 0).all()
    assert torch.equal(torch_cluster.knn(x, y, 3), torch_cluster.knn(x, y, 3, torch.zeros(30, dtype=torch.int64), torch.zeros(12, dtype=torch.int64)))
    with pytest.raises(ValueError, match=r"torch_cluster: batch must be rising int64 numbers \[30\]"):
        torch_cluster.knn_graph(x, 4, batch_x.flip(0))
