"""Heads and closed forms of alignment: the dead gate, CSA against its formulas, its refinement, relative representations."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch

from modalign import nn
from modalign.models import CanonicalSimilarity, CanonicalSimilarityConfig, RelativeRepresentation, relative_representation
from modalign.ops import knn, structure_loss
from modalign.testing import Maker

F64 = torch.float64

# ---------------------------------------------------------------------------------------------------------------------------------------- heads


def test_the_published_gate_never_opens():
    with pytest.warns(UserWarning, match="LowRankResidualHead: gate_init=0.0 closes the gate for ever"):
        dead = nn.LowRankResidualHead(12, 8, gate_init=0.0, dropout=0.0)
    torch.nn.init.normal_(dead.up.weight)
    x = torch.randn(5, 12)
    dead(x).square().sum().backward()
    for parameter in (dead.gate, dead.up.weight, dead.down.weight):
        assert (parameter.grad == 0).all()
    assert torch.equal(dead(x), dead.projection(x)) and (dead.projection.weight.grad != 0).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        live = nn.LowRankResidualHead(12, 8, dropout=0.0)
    torch.testing.assert_close(live.gate.sigmoid(), torch.tensor(0.05))
    assert torch.equal(live(x), live.projection(x))  # W2 is 0 at first
    live(x).square().sum().backward()
    assert (live.up.weight.grad != 0).any()


def test_heads_begin_as_published():
    head = nn.LowRankResidualHead(12, 8, rank=4)
    for weight, size in ((head.projection.weight, 8), (head.down.weight, 4)):
        torch.testing.assert_close(weight @ weight.T, torch.eye(size), atol=1e-5, rtol=0)
    assert nn.LowRankResidualHead(64, 256).down.out_features == 64 and nn.LowRankResidualHead(64, 16).down.out_features == 8
    assert [type(part).__name__ for part in nn.MLPHead(6, 4).layers] == ["Linear", "ReLU", "Dropout", "Linear"]
    assert nn.LinearHead(6).out_features == 512 and nn.LinearHead(6, 4, bias=False).bias is None


@pytest.mark.parametrize("make", [nn.LinearHead, nn.LowRankResidualHead, nn.MLPHead])
def test_heads_onto_the_sphere(make):
    head = make(6, 4, normalize_to_hypersphere=True)
    x = torch.randn(3, 2, 6, requires_grad=True)
    found = head(x)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(3, 2))
    found.sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    for wrong in (dict(in_features=0), dict(out_features=2.5)):
        with pytest.raises(ValueError, match=f"{make.__name__}: {next(iter(wrong))} must be a whole number of 1 or more"):
            make(**{"in_features": 6, "out_features": 4, **wrong})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nn.LowRankResidualHead(6, 4, gate_init=1), "gate_init must be at least 0 and less than 1, got 1"),
        (lambda: nn.LowRankResidualHead(6, 4, dropout=1), "dropout must be at least 0 and less than 1"),
        (lambda: nn.LowRankResidualHead(6, 4, rank=0), "rank must be a whole number of 1 or more, got 0"),
        (lambda: nn.MLPHead(6, 4, layers=0), "layers must be a whole number of 1 or more, got 0"),
    ],
)
def test_heads_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------------------------------------------------------------- canonical similarity analysis


def pairs(n=200, seed=1):
    make = Maker(F64, seed=seed)
    shared = make.randn(n, 4) * torch.tensor([3.0, 2.0, 1.0, 0.5], dtype=F64)
    return shared @ make.randn(4, 10) + make.randn(n, 10) + 5, shared @ make.randn(4, 7) + make.randn(n, 7) - 2


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_csa_is_its_formula(ridge):
    x, y = pairs()
    model = CanonicalSimilarity.fit(x, y, CanonicalSimilarityConfig(dims=5, ridge=ridge))
    a, b = x - x.mean(0), y - y.mean(0)

    def root(z):
        covariance = z.T @ z / len(z)
        values, vectors = torch.linalg.eigh(covariance + ridge * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=F64))
        return vectors / values.sqrt() @ vectors.T

    U, D, Vt = torch.linalg.svd(root(a) @ (a.T @ b / len(a)) @ root(b))
    torch.testing.assert_close(model.correlations, D[:5])
    u, v = a @ root(a) @ U[:, :5], b @ root(b) @ Vt.T[:, :5]
    expected = (u / u.norm(dim=1, keepdim=True) * D[:5]) @ (v / v.norm(dim=1, keepdim=True)).T
    torch.testing.assert_close(model.similarity(x, y), expected)
    torch.testing.assert_close(model.similarity(x, y, weighted=False), (u / u.norm(dim=1, keepdim=True)) @ (v / v.norm(dim=1, keepdim=True)).T)
    best = knn(model.embed_x(x), model.embed_y(y), 1, metric="dot").indices[:, 0]
    assert torch.equal(best, expected.argmax(1))
    if ridge == 0:
        for mapped in (model.transform_x(x), model.transform_y(y)):
            torch.testing.assert_close(mapped.T @ mapped / len(x), torch.eye(5, dtype=F64), atol=1e-9, rtol=0)


def test_csa_of_a_linear_map_and_of_what_has_no_rank():
    x, _ = pairs()
    model = CanonicalSimilarity.fit(x, x @ Maker(F64, seed=2).randn(10, 10), CanonicalSimilarityConfig(dims=10))
    torch.testing.assert_close(model.correlations, torch.ones(10, dtype=F64))
    flat = torch.cat([x[:, :3], x[:, :3] * 2], 1)
    assert CanonicalSimilarity.fit(flat, x, CanonicalSimilarityConfig(dims=3)).similarity(flat, x).isfinite().all()
    for call, message in (
        (lambda: CanonicalSimilarity.fit(flat, x, CanonicalSimilarityConfig(dims=4)), "dims must be at most the ranks of x and y, 3 and 10, got 4"),
        (lambda: CanonicalSimilarity.fit(x, x[:9], CanonicalSimilarityConfig(dims=2)), "x and y must have equally many rows, 2 or more, got 200 and 9"),
        (lambda: CanonicalSimilarity.fit(x * torch.nan, x), "x must be finite"),
        (lambda: CanonicalSimilarity.fit(x[0], x), "x must be a floating-point matrix"),
        (lambda: CanonicalSimilarityConfig(dims=0), "dims must be a whole number of 1 or more, got 0"),
        (lambda: CanonicalSimilarityConfig(explained=2), "explained above 0 and at most 1"),
        (lambda: model.transform_x(x[:, :4]), r"x must be \[N, 10\], got \[200, 4\]"),
        (lambda: model.refined(x, x, epochs=0), "epochs must be a whole number of 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_csa_keeps_the_directions_that_hold_the_variance():
    make = Maker(F64, seed=3)
    x = make.randn(300, 6) * torch.tensor([10.0, 5.0, 2.0, 0.01, 0.01, 0.01], dtype=F64)
    assert CanonicalSimilarity.fit(x, x, CanonicalSimilarityConfig(dims=3, explained=0.999)).correlations.shape == (3,)
    with pytest.raises(ValueError, match="dims must be at most the ranks of x and y, 3 and 3, got 4"):
        CanonicalSimilarity.fit(x, x, CanonicalSimilarityConfig(dims=4, explained=0.999))


def test_refinement_keeps_neighbourhoods_and_whitens_again():
    x, y = (side.float() for side in pairs(n=256))
    model = CanonicalSimilarity.fit(x, y, CanonicalSimilarityConfig(dims=4))
    seen = []

    def recorded(source, aligned):
        loss = structure_loss(source, aligned, temperature=0.2)
        seen.append(float(loss.detach()))
        return loss

    refined = model.refined(x, y, structure=recorded, epochs=30, batch_size=128, learning_rate=1e-2)
    assert sum(seen[-4:]) < 0.9 * sum(seen[:4])  # both sides of both batches
    for mapped in (refined.transform_x(x), refined.transform_y(y)):
        torch.testing.assert_close(mapped.T @ mapped / len(x), torch.eye(4), atol=1e-4, rtol=0)

    again = model.refined(x, y, epochs=30, batch_size=128, learning_rate=1e-2)
    assert torch.equal(again.weight[0], refined.weight[0])
    calls = []
    model.refined(x, y, epochs=1, batch_size=100, structure=lambda source, aligned: calls.append(source.shape) or aligned.sum() * 0)
    assert len(calls) == 6 and calls[0] == (100, 10)


# ------------------------------------------------------------------------------------------------------------------------- relative representations


@pytest.mark.parametrize(("top", "power"), [(None, 1.0), (7, 8), (1, 2.0)])
def test_relative_representations_are_those_of_the_matrix(top, power, monkeypatch):
    monkeypatch.setattr(sys.modules["modalign.models.relative_representation"], "PANEL_ROWS", 16)
    make = Maker(F64, seed=4)
    anchors, others = make.randn(30, 9), make.randn(30, 6)
    x, y = make.randn(50, 9), make.randn(40, 6)
    dense = []
    for rows, base in ((x, anchors), (y, others)):
        cosine = torch.nn.functional.normalize(rows, dim=1) @ torch.nn.functional.normalize(base, dim=1).T
        kept = cosine.clamp(min=0) * torch.zeros_like(cosine).scatter(1, cosine.topk(top or 30).indices, 1.0)
        dense.append(torch.nn.functional.normalize(kept**power, dim=1))
    a, b = relative_representation(x, anchors, top, power), relative_representation(y, others, top, power)
    torch.testing.assert_close(a.dense(), dense[0])
    torch.testing.assert_close(a.similarity(b), dense[0] @ dense[1].T)
    turn = torch.linalg.qr(make.randn(9, 9)).Q
    torch.testing.assert_close(relative_representation(3 * x @ turn, anchors @ turn, top, power).dense(), a.dense())
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(relative_representation(x, anchors[order], top, power).dense(), a.dense()[:, order])
    assert relative_representation(x[:0], anchors, top, power).similarity(b).shape == (0, 40)


def test_relative_representations_refuse():
    x = torch.randn(5, 3)
    zero = relative_representation(torch.zeros(2, 3), x, 2)
    assert (zero.values == 0).all() and (zero.similarity(relative_representation(x, x, 2)) == 0).all()
    for call, message in (
        (lambda: relative_representation(x, x, 6), "top must be from 1 to the number of anchors, 5, got 6"),
        (lambda: relative_representation(x, x, 2, 0), "power must be positive, got 0"),
        (lambda: relative_representation(x[0], x), "x must be a floating-point matrix"),
        (lambda: relative_representation(x, x).similarity(relative_representation(x, x[:4])), "other must have as many anchors, 5, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert isinstance(zero, RelativeRepresentation)
