"""Mutual nearest pairs and dual-softmax matches against their matrices."""

from __future__ import annotations

import pytest
import torch

from modalign.ops import dual_softmax_matching, knn, mutual_nearest
from modalign.testing import Maker


def by_matrix(score):
    rows = torch.arange(len(score))
    forth, back = score.argmax(1), score.argmax(0)
    return torch.stack([rows, forth], 1)[back[forth] == rows]


@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean", "csls"])
def test_mutual_pairs_are_those_of_the_matrix(metric):
    make = Maker(torch.float64, seed=1)
    x, y = make.randn(70, 9), make.randn(50, 9)
    y[:30] = x[20:50] + 0.3 * make.randn(30, 9)
    unit = torch.nn.functional.normalize
    cosine = unit(x, dim=1) @ unit(y, dim=1).T
    csls = 2 * cosine - cosine.topk(10, 1).values.mean(1)[:, None] - cosine.topk(10, 0).values.mean(0)
    score = {"cosine": cosine, "dot": x @ y.T, "euclidean": -torch.cdist(x, y), "csls": csls}[metric]
    pairs = mutual_nearest(x, y, metric=metric)
    assert torch.equal(pairs, by_matrix(score)) and all(len(side.unique()) == len(side) for side in pairs.T)
    assert torch.equal(mutual_nearest(y, x, metric=metric).flip(1).sort(0).values[:, 0], pairs[:, 0])


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.9])
def test_dual_softmax_is_that_of_the_matrix(threshold):
    make = Maker(torch.float64, seed=2)
    x, y = make.unit(60, 12), make.unit(45, 12)
    y[:25] = torch.nn.functional.normalize(x[10:35] + 0.2 * make.unit(25, 12), dim=1)
    S = x @ y.T / 0.1
    C = S.softmax(1) * S.softmax(0)
    expected = by_matrix(C)
    expected = expected[C[expected[:, 0], expected[:, 1]] > threshold]
    found = dual_softmax_matching(x, y, threshold=threshold)
    assert torch.equal(found.pairs, expected)
    torch.testing.assert_close(found.confidence, C[expected[:, 0], expected[:, 1]])
    half = dual_softmax_matching(x.bfloat16(), y.bfloat16(), threshold=threshold)
    assert half.confidence.dtype is torch.float32 and half.to("cpu").pairs.shape[1] == 2


def test_identity_as_the_temperature_falls():
    x = Maker(torch.float32, seed=3).unit(40, 16)
    found = dual_softmax_matching(x, x, temperature=0.005)
    assert torch.equal(found.pairs, torch.arange(40)[:, None].expand(40, 2)) and (found.confidence > 0.99).all()


def test_ties_empty_sides_and_bad_input():
    same = torch.ones(4, 3)
    assert mutual_nearest(same, same).tolist() == [[0, 0]]
    assert dual_softmax_matching(same, same, threshold=0).pairs.tolist() == [[0, 0]]
    for one, other in ((same[:0], same), (same, same[:0])):
        assert mutual_nearest(one, other).shape == (0, 2) and dual_softmax_matching(one, other).pairs.shape == (0, 2)
    assert mutual_nearest(torch.full((2, 3), torch.nan), same).shape == (0, 2)
    for call, kind, message in (
        (lambda: mutual_nearest(same, same, metric="l2"), ValueError, "mutual_nearest: metric must be one of"),
        (lambda: mutual_nearest(same, same, bias=torch.ones(4)), TypeError, "mutual_nearest: options must be metric, center, csls_neighbors or workspace_bytes, got bias"),
        (lambda: mutual_nearest(same, same[:, :2]), ValueError, "mutual_nearest: points must have queries's width D = 3"),
        (lambda: dual_softmax_matching(same, None), TypeError, r"dual_softmax_matching: y must be a tensor \[M, D\]"),
        (lambda: dual_softmax_matching(same, same, temperature=0), ValueError, "dual_softmax_matching: temperature must be positive and finite, got 0"),
        (lambda: dual_softmax_matching(same, same, threshold=1), ValueError, "dual_softmax_matching: threshold must be at least 0 and less than 1"),
    ):
        with pytest.raises(kind, match=message):
            call()
    assert knn(same, same, 1).indices.flatten().tolist() == [0] * 4
