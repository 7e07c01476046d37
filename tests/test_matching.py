"""Mutual nearest pairs and dual-softmax matches against their matrices."""

from __future__ import annotations

import pytest
import torch

from modalign.data import MODALITY_TRANSFORMS, modality_transform
from modalign.metrics import match_auc
from modalign.ops import dual_softmax_matching, knn, mutual_nearest
from modalign.testing import Maker

F64 = torch.float64


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
        (lambda: mutual_nearest(same, same[:, :2]), ValueError, "mutual_nearest: y must have x's width D = 3"),
        (lambda: dual_softmax_matching(same, None), TypeError, r"dual_softmax_matching: y must be a tensor \[M, D\]"),
        (lambda: dual_softmax_matching(same, same, temperature=0), ValueError, "dual_softmax_matching: temperature must be positive and finite, got 0"),
        (lambda: dual_softmax_matching(same, same, threshold=1), ValueError, "dual_softmax_matching: threshold must be at least 0 and less than 1"),
    ):
        with pytest.raises(kind, match=message):
            call()
    assert knn(same, same, 1).indices.flatten().tolist() == [0] * 4


# ------------------------------------------------------------------------------------------------------------------------- modalities of a picture


@pytest.mark.parametrize("kind", MODALITY_TRANSFORMS)
def test_modalities_stay_in_place(kind):
    """A picture that is moved gives the moved modality; a flat one has nothing to show; values stay from 0 to 1."""
    make = Maker(F64, seed=1)
    picture = make.randn(2, 3, 40, 33).sigmoid()
    found = modality_transform(picture, kind)
    assert found.shape == picture.shape and found.dtype is F64 and found.min() >= 0 and found.max() <= 1
    wide = torch.nn.functional.pad(picture, (24, 24, 24, 24), mode="replicate")
    moved = modality_transform(wide.roll((3, -2), (2, 3)), kind), modality_transform(wide, kind).roll((3, -2), (2, 3))
    torch.testing.assert_close(*(each[..., 30:-30, 30:-30] for each in moved))  # as far as no filter sees the seam
    flat = modality_transform(torch.full((1, 3, 20, 20), 0.4), kind)
    torch.testing.assert_close(flat, flat[..., :1, :1].expand_as(flat), rtol=0, atol=1e-6)
    if kind not in ("normal",):  # directions turn with the picture, everything else goes along
        torch.testing.assert_close(modality_transform(picture.flip(-1), kind), found.flip(-1), rtol=1e-9, atol=1e-12)
    if kind != "paint":
        moved = picture.clone().requires_grad_()
        modality_transform(moved, kind).sum().backward()
        assert moved.grad.isfinite().all()


def test_what_modalities_show():
    step = torch.zeros(1, 3, 16, 16)
    step[..., 8:] = 0.5
    edge = modality_transform(step, "edge")
    assert (edge[..., 7:9] == 0.5).all() and (edge[..., :7] == 1).all() and (edge[..., 9:] == 1).all()
    assert len(modality_transform(torch.rand(1, 3, 30, 30), "paint").unique()) <= 6
    infrared = modality_transform(step, "infrared")
    assert infrared[0, 0, 8, 0] > infrared[0, 0, 8, 15]
    normal = modality_transform(step, "normal")
    assert normal[0, 0, 8, 7] < 0.5 and abs(float(normal[0, 1, 8, 7]) - 0.5) < 1e-6  # it falls to the left, and not down
    for wrong, message in (
        ((step, "event"), "kind must be one of edge, sketch"),
        ((step[:, :1], "edge"), "pictures must be a floating-point tensor"),
        ((2 * step + 1, "edge"), "pictures must be from 0 to 1, got 1 to 2"),
    ):
        with pytest.raises(ValueError, match="modality_transform: " + message):
            modality_transform(*wrong)


def test_match_auc_is_the_area():
    """Against a sum over many thresholds."""
    errors = torch.cat([Maker(F64, seed=2).randn(50).abs() * 10, torch.tensor([0.0, 0.0, torch.inf, torch.inf], dtype=F64)])
    place, share = torch.cat([torch.zeros(1, dtype=F64), errors.sort().values]), torch.arange(55, dtype=F64) / 54
    for threshold, found in zip((3.0, 10.0, 40.0), match_auc(errors, (3.0, 10.0, 40.0)), strict=True):
        inside = place < threshold
        x, y = place[inside], share[inside]
        grid = torch.linspace(0, threshold, 200_001, dtype=F64)
        right = torch.searchsorted(x, grid, right=True).clamp(max=len(x))
        left = right - 1
        behind = right == len(x)
        after = right.clamp(max=len(x) - 1)
        slope = torch.where(behind, 0, (y[after] - y[left]) / (x[after] - x[left]).clamp(min=1e-300))
        assert found == pytest.approx(float((y[left] + slope * (grid - x[left])).mean()), abs=1e-4)
    assert match_auc(torch.zeros(4), [1.0]) == [pytest.approx(1.0)] and match_auc(torch.full((3,), torch.inf), [5.0]) == [0.0]
    for wrong, message in (((torch.tensor([-1.0]),), "errors must be 0 or more"), ((torch.ones(0),), "N 1 or more"), ((torch.ones(2), [0.0]), "thresholds must be positive")):
        with pytest.raises(ValueError, match="match_auc: .*" + message):
            match_auc(*wrong)


@pytest.mark.parametrize("op", [mutual_nearest, dual_softmax_matching])
def test_arguments_are_called_by_their_names(op):
    x = torch.ones(3, 2)
    for wrong, message in (((x[0], x), "x must"), ((x, x[0]), "y must"), ((x, torch.ones(3, 4)), "y must"), ((x, x.double()), "y must have x's dtype")):
        with pytest.raises((TypeError, ValueError), match=f"{op.__name__}: {message}"):
            op(*wrong)
