"""The STRUCTURE regularizer: hand cases, invariants, levels, lists of neighbours, memory; the same bits for threads and for products kept or not."""

from __future__ import annotations

import math

import pytest
import torch

from modalign import _load, info
from modalign.ops import knn, structure_loss
from modalign.ops.structure_loss import reference_structure_loss
from modalign.testing import Maker, peak_memory

F64 = torch.float64


def matrices(source, aligned, temperature, centering="mean", first=False, rbf=None):
    """P and Q from the formula, in float64."""
    found = []
    for z in (source.double(), aligned.double()):
        steps = {"centre": lambda z: z - z.mean(0) if centering != "none" else z, "unit": lambda z: z / z.norm(dim=1, keepdim=True)}
        for step in ("centre", "unit") if first else ("unit", "centre"):
            z = steps[step](z)
        if centering == "standard":
            z = z / z.std(0, correction=0)
        found.append((torch.exp(-rbf * torch.cdist(z, z).square()) if rbf else z @ z.T / temperature).softmax(1))
    return found


def divergence(P, Q, kind):
    M = (P + Q) / 2
    if kind == "js":
        return ((P * (P / M).log() + Q * (Q / M).log()) / 2).nan_to_num(0).sum(1).mean()
    e = 1e-12
    return ((M + e) * ((M + e).log() - (Q + e).log() / 2 - (P + e).log() / 2)).sum(1).mean()


@pytest.mark.parametrize("kind", ["js", "released"])
@pytest.mark.parametrize("B", [2, 95, 96, 97, 200, 385])
@pytest.mark.parametrize("temperature", [0.2, 0.05])
def test_value_and_gradient_are_those_of_the_formula(temperature, B, kind):
    """1e-6 and 1e-5 in float32, to both sides; B around whole blocks. At the published 0.05 rows lie in groups, or none sees another."""
    make = Maker(torch.float32, seed=B)
    leaves = [make.randn(B, 40), make.randn(B, 24)]
    if temperature < 0.1:
        leaves = [each[torch.arange(B) % 12 % B] + 0.3 * make.randn(*each.shape) for each in leaves]
    leaves = [each.requires_grad_() for each in leaves]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    loss = structure_loss(*leaves, temperature=temperature, divergence=kind)
    expected = divergence(*matrices(*exact, temperature), kind)
    assert abs(float(loss.detach()) - float(expected.detach())) <= 1e-6 * float(expected.detach()) + 1e-8
    for ours, theirs in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, exact), strict=True):
        assert (ours.double() - theirs).norm() <= 1e-5 * theirs.norm() + 1e-12


@pytest.mark.parametrize("kind", ["js", "released"])
@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("weighting", ["inverse", "none"])
def test_levels(kind, levels, weighting):
    make = Maker(F64, seed=2)
    source, aligned = make.randn(60, 9), make.randn(60, 5)
    P, Q = matrices(source, aligned, 0.3)
    expected = sum(
        divergence(torch.linalg.matrix_power(P, n), torch.linalg.matrix_power(Q, n), kind) / (n if weighting == "inverse" else 1) for n in range(1, levels + 1)
    )
    found = structure_loss(source, aligned, temperature=0.3, levels=levels, divergence=kind, weighting=weighting)
    torch.testing.assert_close(found, expected / levels)


def test_centring_distances_and_margin():
    make = Maker(F64, seed=3)
    source, aligned = make.randn(50, 8) + 1, make.randn(50, 6) - 1
    for options in ({"centering": "none"}, {"centering": "standard"}, {"centering": "mean", "first": True}):
        found = structure_loss(source, aligned, temperature=0.4, centering=options["centering"], centering_first=options.get("first", False))
        torch.testing.assert_close(found, divergence(*matrices(source, aligned, 0.4, **options), "js"))
    torch.testing.assert_close(structure_loss(source, aligned, distance="rbf", gamma=2.0), divergence(*matrices(source, aligned, None, rbf=2.0), "js"))
    ranks = [each.argsort(1).argsort(1).double() for each in (source, aligned)]
    leaf = aligned.clone().requires_grad_()
    found = structure_loss(source, leaf, distance="spearman")
    torch.testing.assert_close(found, structure_loss(*ranks))
    assert not found.requires_grad
    plain = structure_loss(source, aligned, temperature=0.4)
    torch.testing.assert_close(structure_loss(source, aligned, temperature=0.4, margin=0.01), plain - 0.01)
    assert structure_loss(source, aligned, temperature=0.4, margin=1) == 0


def test_by_hand():
    """Two rows on opposite sides give P = [[3/4, 1/4], [1/4, 3/4]]; two equal ones give Q uniform."""
    temperature = 2 / math.log(3)
    source, aligned = torch.tensor([[1.0], [-1.0]], dtype=F64), torch.tensor([[1.0, 2.0], [2.0, 4.0]], dtype=F64)
    for kind, value in (("js", 0.0338221), ("released", 0.0348412)):
        found = structure_loss(source, aligned, temperature=temperature, divergence=kind, centering="none")
        assert abs(float(found) - value) < 1e-7


@pytest.mark.parametrize("kind", ["js", "released"])
def test_invariants(kind):
    make = Maker(F64, seed=4)
    source, aligned, options = make.randn(80, 10), make.randn(80, 10), dict(temperature=0.2, divergence=kind)
    turn, lengths = torch.linalg.qr(make.randn(10, 10)).Q, make.randn(80, 1).exp()
    assert abs(structure_loss(source, 3 * source @ turn * lengths, **options)) < 1e-13
    loss = structure_loss(source, aligned, **options)
    torch.testing.assert_close(structure_loss(aligned, source, **options), loss)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(structure_loss(source[order], aligned[order], **options), loss)
    assert loss > 0 and (kind == "released" or loss < math.log(2))
    assert structure_loss(source[:1], aligned[:1], **options) == 0
    moved = structure_loss(source + 5, aligned - 2, centering_first=True, **options)
    torch.testing.assert_close(moved, structure_loss(source, aligned, centering_first=True, **options))
    leaf = aligned.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(structure_loss(source, leaf, **options), leaf)
    torch.testing.assert_close((gradient * leaf).sum(1), torch.zeros(80, dtype=F64), atol=1e-15, rtol=0)


@pytest.mark.parametrize("kind", ["js", "released"])
def test_huge_and_tiny_rows(kind):
    """A row's length does not matter, from 1e-11 to 1e30; below 1e-12 it is a zero vector."""
    make = Maker(torch.float32, seed=5)
    source, aligned = make.unit(12, 6), make.unit(12, 4)
    scale = torch.tensor([1e30, 1e-11, 1.0] * 4)[:, None]
    leaf, scaled = aligned.clone().requires_grad_(), (aligned * scale).requires_grad_()
    plain, found = (structure_loss(source, each, temperature=0.3, divergence=kind) for each in (leaf, scaled))
    torch.testing.assert_close(found, plain)
    expected = torch.autograd.grad(plain, leaf)[0]
    torch.testing.assert_close(torch.autograd.grad(found, scaled)[0] * scale, expected, rtol=1e-3, atol=1e-6)
    zero = aligned.clone()
    zero[3] = 0
    zero[4] *= 1e-14
    zero.requires_grad_()
    (gradient,) = torch.autograd.grad(structure_loss(source, zero, divergence=kind), zero)
    assert gradient.isfinite().all() and (gradient[3:5] == 0).all()


def test_nearly_equal_neighbourhoods_keep_their_digits():
    """The divergence of P and P + small is small squared."""
    make = Maker(F64, seed=6)
    source = make.randn(64, 8)
    aligned = source + 1e-3 * make.randn(64, 8)
    exact = structure_loss(source, aligned, temperature=1.0)
    found = structure_loss(source.float(), aligned.float(), temperature=1.0)
    assert 0 < exact < 1e-6 and abs(float(found) - float(exact)) < 2e-3 * float(exact)


def test_the_diagonal_shows_when_there_is_no_signal():
    """Almost orthogonal vectors at the published temperature: each row sees itself alone."""
    make = Maker(torch.float32, seed=7)
    source, aligned = make.randn(1024, 384), make.randn(1024, 384)
    loss, mass = structure_loss(source, aligned, return_diagonal_mass=True)
    assert (mass > 0.9999).all() and loss < 1e-5
    clusters = make.randn(16, 384).repeat_interleave(64, 0)
    loss, mass = structure_loss(clusters + 0.7 * source, clusters + 0.7 * aligned, return_diagonal_mass=True)
    P, Q = matrices(clusters + 0.7 * source, clusters + 0.7 * aligned, 0.05)
    torch.testing.assert_close(mass.double(), torch.stack([P.diagonal().mean(), Q.diagonal().mean()]), rtol=1e-4, atol=0)
    assert (mass < 0.95).all() and loss > 1e-3
    for options in ({"levels": 2}, {"neighbors": 300}, {"neighbors": 1024}):
        torch.testing.assert_close(structure_loss(clusters + 0.7 * source, clusters + 0.7 * aligned, return_diagonal_mass=True, **options)[1], mass, rtol=1e-4, atol=0)


# ------------------------------------------------------------------------------------------------------------------------------------ neighbours


def merged(P, Q, lists):
    """Probabilities of listed pairs and, as one bucket, of the others."""
    kept = torch.zeros_like(P, dtype=torch.bool).scatter(1, lists, True)
    return [torch.cat([X.masked_fill(~kept, 0), X.masked_fill(kept, 0).sum(1, keepdim=True)], 1) for X in (P, Q)]


@pytest.mark.parametrize("kind", ["js", "released"])
def test_neighbours_with_the_rest_as_one_bucket(kind):
    make = Maker(F64, seed=8)
    source, aligned = make.randn(90, 12), make.randn(90, 7).requires_grad_()
    P, Q = matrices(source, aligned, 0.3)
    x = source / source.norm(dim=1, keepdim=True)
    before = 0.0
    for k in (1, 2, 10, 89, 90):
        lists = knn(x - x.mean(0), k=k, metric="dot").indices
        expected = divergence(*merged(P, Q, lists), kind) if k < 90 else divergence(P, Q, kind)
        for neighbors in (k, lists):
            found = structure_loss(source, aligned, temperature=0.3, divergence=kind, neighbors=neighbors)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-10)
            ours, theirs = (torch.autograd.grad(each, aligned, retain_graph=True)[0] for each in (found, expected))
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-9)
        if kind == "js":
            assert before <= float(found.detach()) + 1e-12
            before = float(found.detach())


@pytest.mark.parametrize("kind", ["js", "released"])
def test_neighbours_alone(kind):
    make = Maker(F64, seed=9)
    source, aligned = make.randn(90, 12), make.randn(90, 7).requires_grad_()
    lists = knn(source, k=8).indices
    lists[3, 5:] = -1
    P, Q = matrices(source, aligned, 0.3)
    kept = torch.zeros(90, 91).scatter(1, lists.where(lists >= 0, 90), 1.0)[:, :90].bool()
    P, Q = (X.masked_fill(~kept, 0) / X.masked_fill(~kept, 0).sum(1, keepdim=True) for X in (P, Q))
    found = structure_loss(source, aligned, temperature=0.3, divergence=kind, neighbors=lists, tail=False)
    p, q = P[kept], Q[kept]
    m = (p + q) / 2
    expected = (p * (p / m).log() + q * (q / m).log()).sum() / 180 if kind == "js" else divergence(P, Q, kind)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-10)
    ours, theirs = (torch.autograd.grad(each, aligned)[0] for each in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-9)


# ------------------------------------------------------------------------------------------------------------------------------- bits and memory


@pytest.mark.parametrize("instructions", info.collect()["instruction_sets"]["ran_here"])
@pytest.mark.parametrize("kind", ["js", "released"])
def test_same_bits_for_threads_and_implementations(instructions, kind):
    make = Maker(torch.float32, seed=10)
    source, aligned = make.randn(500, 33), make.randn(500, 20)
    results, before = [], torch.get_num_threads()
    with _load.use_instruction_set(instructions):
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                for implementation in ("streaming", "dense", "auto"):
                    leaves = [source.clone().requires_grad_(), aligned.clone().requires_grad_()]
                    loss = structure_loss(*leaves, temperature=0.1, divergence=kind, implementation=implementation)
                    results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))
    exact = reference_structure_loss(source.double(), aligned.double(), temperature=0.1, divergence=kind)
    torch.testing.assert_close(results[0][0].double(), exact, rtol=2e-6, atol=0)


def probe(B, **options):
    make = Maker(torch.float32, seed=0)
    source, aligned = make.randn(B, 32), make.randn(B, 16).requires_grad_()
    return lambda: structure_loss(source, aligned, **options).backward(), lambda: structure_loss(source[:64], aligned[:64], **options).backward()


def test_memory_is_linear():
    """Training with nothing kept; one matrix of 16384 rows would take 1 GiB."""
    small, large = (peak_memory("test_structure_loss:probe", B=B, workspace_bytes=0).peak for B in (4096, 16384))
    assert large < 5 * small and large < 100 << 20


def test_the_forward_keeps_what_the_workspace_holds():
    x = Maker(torch.float32, seed=12).randn(100, 8)
    size = 2 * 192 * 192 * 4
    assert [torch.ops.modalign.structure_loss(x, x, False, bytes_)[2].numel() for bytes_ in (size - 1, size)] == [0, size // 4]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("options", [{}, {"distance": "spearman"}, {"distance": "rbf"}, {"levels": 2}, {"neighbors": 4}, {"neighbors": 4, "tail": False}], ids=str)
@pytest.mark.parametrize("centering", ["none", "mean", "standard"])
def test_what_is_no_number_is_no_finite_loss(options, centering, bad):
    """A head that diverged must be seen. (Ranks of infinity are ranks.)"""
    make = Maker(F64, seed=4)
    for first in (False, True):
        for side in (0, 1):
            sides = [make.randn(30, 6), make.randn(30, 5)]
            sides[side][7, 2] = bad
            if options.get("distance") == "spearman" and bad != bad or "distance" not in options or options["distance"] == "rbf":
                assert structure_loss(*sides, centering=centering, centering_first=first, **options).isnan()


def test_lists_that_hold_nobody_and_matrices_that_are_too_large():
    make = Maker(F64, seed=5)
    x, y = make.randn(12, 4), make.randn(12, 3)
    lists = knn(x, k=3).indices
    empty = lists.clone()
    empty[5] = -1
    whole, less = (structure_loss(x, y, neighbors=each, tail=False) for each in (lists, empty))
    assert 0 < less < whole and structure_loss(x, y, neighbors=torch.full_like(lists, -1), tail=False) == 0
    compiled = torch.compile(lambda a, b, listed: structure_loss(a, b, neighbors=listed, tail=False), fullgraph=True)
    torch.testing.assert_close(compiled(x, y, empty), less)
    for wrong, found in ((12, "-1 to 12"), (-2, "-2 to 11")):
        lists[0, 0] = wrong
        with pytest.raises(ValueError, match="structure_loss: neighbors must hold rows from 0 to B - 1 = 11, or -1, got"):
            structure_loss(x, y, neighbors=lists)
    with pytest.raises(ValueError, match='structure_loss: implementation must be "dense" for matrices 20000 x 20000'):
        structure_loss(torch.ones(20000, 2), torch.ones(20000, 2), levels=2)
