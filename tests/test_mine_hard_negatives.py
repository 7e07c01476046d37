"""Hard negatives against a loop over sorted scores."""

from __future__ import annotations

import sys

import pytest
import torch

from modalign.ops import mine_hard_negatives
from test_knn import whole_numbers


def looped(queries, points, positives, k, skip_top, max_similarity):
    """One query after the other, by a stable sort."""
    found = []
    for score, right in zip(queries @ points.T, positives, strict=True):
        order = score.sort(descending=True, stable=True).indices.tolist()
        negatives = [j for j in order if j not in right][skip_top:]
        kept = [j for j in negatives if max_similarity is None or score[j] <= max_similarity][:k]
        found.append(kept + [-1] * (k - len(kept)))
    return torch.tensor(found)


@pytest.mark.parametrize("skip_top", [0, 3, 190])
@pytest.mark.parametrize("max_similarity", [None, 20, 2, -30, -1000])
def test_mined_are_those_of_a_loop(skip_top, max_similarity):
    queries, points = whole_numbers(40, 6, 1).float(), whole_numbers(200, 6, 2).float()
    generator = torch.Generator().manual_seed(3)
    own = torch.randint(-1, 200, (40, 4), generator=generator)
    labels = torch.arange(40) % 9, torch.arange(200) % 9
    for k in (1, 5, 60):
        options = dict(skip_top=skip_top, max_similarity=max_similarity, metric="dot")
        for positives, sets in (
            (own[:, 0], [{int(each)} for each in own[:, 0]]),
            (own, [set(row.tolist()) for row in own]),
            (labels, [set((labels[1] == label).nonzero().flatten().tolist()) for label in labels[0]]),
        ):
            found = mine_hard_negatives(queries, points, positives, k, **options)
            expected = looped(queries, points, sets, k, skip_top, max_similarity)
            assert torch.equal(found.indices, expected)
            values = (queries @ points.T).gather(1, expected.clamp(min=0)).masked_fill(expected < 0, -torch.inf)
            assert torch.equal(found.values, values)
            assert torch.equal(mine_hard_negatives(queries, points, positives, k, workspace_bytes=0, **options).indices, expected)


def test_queries_in_panels(monkeypatch):
    """Where limits make lists as long as all points, panels of queries bound the memory and do not show."""
    points = whole_numbers(500, 6, 5).float()
    whole = mine_hard_negatives(points, points, torch.arange(500), 4, max_similarity=-30, metric="dot")
    monkeypatch.setattr(sys.modules["modalign.ops.mine_hard_negatives"], "LIST_BYTES", 1 << 16)
    panels = mine_hard_negatives(points, points, torch.arange(500), 4, max_similarity=-30, metric="dot")
    assert torch.equal(whole.indices, panels.indices) and torch.equal(whole.values, panels.values)


def test_few_points_and_none():
    points = torch.eye(3)
    assert mine_hard_negatives(points, points, torch.arange(3), 5).indices.tolist() == [[1, 2, -1, -1, -1], [0, 2, -1, -1, -1], [0, 1, -1, -1, -1]]
    assert mine_hard_negatives(points[:0], points, torch.arange(0), 5).indices.shape == (0, 5)
    assert mine_hard_negatives(points, points[:0], torch.full((3,), -1), 2).indices.tolist() == [[-1, -1]] * 3


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (dict(k=0), ValueError, "mine_hard_negatives: k must be 1 or more, got 0"),
        (dict(k=1.0), TypeError, "mine_hard_negatives: k must be a whole number"),
        (dict(skip_top=-1), ValueError, "mine_hard_negatives: skip_top must be 0 or more, got -1"),
        (dict(max_similarity="high"), TypeError, "mine_hard_negatives: max_similarity must be None or a number"),
        (dict(positives=torch.zeros(4)), TypeError, r"mine_hard_negatives: positives must be an int64 tensor \[N\], \[N, P\], or a pair"),
        (dict(positives=torch.zeros(3, dtype=torch.int64)), ValueError, r"mine_hard_negatives: positives must have shape \[4\] or \[4, P\]"),
        (dict(positives=torch.full((4,), 9)), ValueError, "mine_hard_negatives: positives must be from 0 to M - 1 = 8, or -1, got 9 to 9"),
        (dict(metric="euclidean"), ValueError, "mine_hard_negatives: metric must be one of cosine, dot, got str 'euclidean'"),
        (dict(points=None), TypeError, r"mine_hard_negatives: points must be a tensor \[M, D\]"),
    ],
)
def test_refused(change, kind, message):
    given = dict(queries=torch.ones(4, 3), points=torch.ones(9, 3), positives=torch.arange(4), k=2) | change
    with pytest.raises(kind, match=message):
        mine_hard_negatives(**given)
