"""Self-repellent anchors, padding, the pair loss and clusters of incomplete views, each against its definition."""

from __future__ import annotations

import itertools

import pytest
import torch

from modalign.metrics import clustering
from modalign.models import IncompleteMultiview, IncompleteMultiviewConfig, pad_view, random_walk_visits, self_repellent_anchors
from modalign.models._kmeans import kmeans
from modalign.nn.functional import noise_robust_pair_loss
from modalign.testing import Maker

F64 = torch.float64


def rows(N, D=6, seed=0):
    return Maker(F64, seed=seed).randn(N, D)


# ------------------------------------------------------------------------------------------------------------------------------------- anchors


@pytest.mark.parametrize("variant", ["srrw", "released"])
@pytest.mark.parametrize("N", [1, 2, 5, 150])
def test_anchors_are_different_and_the_same_for_a_seed(N, variant):
    x = rows(N)
    for count in sorted({1, (N + 1) // 2, N}):
        found = self_repellent_anchors(x, count, variant=variant)
        assert len(found) == count == len(found.unique()) and torch.equal(found, self_repellent_anchors(x, count, variant=variant))
    if N == 150:
        assert not torch.equal(self_repellent_anchors(x, 20, variant=variant), self_repellent_anchors(x, 20, variant=variant, seed=1))


@pytest.mark.parametrize("variant", ["srrw", "released"])
def test_every_step_is_counted_and_the_rest_follows_from_importance(variant):
    x = rows(120)
    visits = random_walk_visits(x, variant=variant)
    assert int(visits.sum()) == 120 * 10 * 5
    best = visits.sort(descending=True, stable=True).indices
    assert torch.equal(self_repellent_anchors(x, 30, variant=variant, radius=0), best[:30])  # radius 0: the most important
    radius = 1.0
    chosen = self_repellent_anchors(x, 4, variant=variant, radius=radius)
    apart = torch.cdist(x[chosen], x[chosen]) + 10 * torch.eye(4)
    assert chosen[0] == best[0] and (apart > radius).all()
    # where all are covered before the last, coverage begins anew: still all different, and everything lies within reach
    many = self_repellent_anchors(x, 100, variant=variant, radius=3.0)
    assert len(many.unique()) == 100 and (torch.cdist(x, x[many]).amin(1) <= 3.0).all()


def transitions(alpha, variant, steps=3):
    """Visits of many walks of a graph of four rows, and what the formula says of the first step from everywhere."""
    x = torch.tensor([[1.0, 0.0], [0.9, 0.5], [0.2, 1.0], [-0.7, 0.7]], dtype=F64)
    return x, random_walk_visits(x, variant=variant, alpha=alpha, neighbors=3, walks=20_000, length=steps)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("variant", ["srrw", "released"])
def test_walks_follow_their_formula(alpha, variant):
    """Expected visits by going through all walks of three steps."""
    x, visits = transitions(alpha, variant)
    unit = torch.nn.functional.normalize(x, dim=1)
    cosine = unit @ unit.T
    if variant == "srrw":
        P = ((1 + cosine) / 2).fill_diagonal_(0)
        degree = P.sum(0) + P.sum(1)
        mu = degree / degree.sum()
    else:
        P = ((cosine - cosine.amin(0)) / (cosine.amax(0) - cosine.amin(0))).fill_diagonal_(0)
        P = P / P.sum(1, keepdim=True)
        mu = torch.ones(4, dtype=F64)
        P = P.clamp(min=1e-4) ** -alpha if alpha else P
    repel = alpha if variant == "srrw" else 0.0
    want = torch.zeros(4, dtype=F64)
    for walk in itertools.product(range(4), repeat=4):
        chance = 1.0
        for step in range(3):
            times = torch.tensor([walk[: step + 1].count(j) for j in range(4)], dtype=F64)
            weight = P[walk[step]] * ((1 + times) / mu) ** -repel
            chance *= float(weight[walk[step + 1]] / weight.sum())
        for j in walk[1:]:
            want[j] += chance
    got = visits.double() / 20_000
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)  # 80 000 walks: a deviation of 0.004


def test_a_walk_repels_itself():
    """Fewer returns than the plain walk; the released kernel goes to what is least similar, and stays where it is."""
    x = torch.cat([torch.eye(3, dtype=F64).repeat_interleave(20, 0) + 0.05 * rows(60, 3), torch.tensor([[-3.0, -3.0, -3.0]], dtype=F64)])
    plain, released = (random_walk_visits(x, variant=variant, alpha=alpha) for variant, alpha in (("srrw", 0.0), ("released", 0.5)))
    assert plain[-1] < plain[:-1].double().mean() < released[-1]


def test_bad_anchors():
    x = rows(10)
    for call, message in (
        (lambda: self_repellent_anchors(x, 11), "self_repellent_anchors: count must be from 1 to the number of rows, 10, got 11"),
        (lambda: self_repellent_anchors(x, 0), "count must be from 1"),
        (lambda: self_repellent_anchors(x, 2, radius=-1), "radius must be 0 or more"),
        (lambda: self_repellent_anchors(x, 2, variant="walk"), "variant must be"),
        (lambda: self_repellent_anchors(x, 2, alpha=-1), "alpha must be 0 or more"),
        (lambda: self_repellent_anchors(x * float("nan"), 2), "x must be finite"),
        (lambda: self_repellent_anchors(x[:0], 1), "with one row or more"),
        (lambda: random_walk_visits(x, walks=2.5), "walks must be a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    alone = torch.zeros(5, 3, dtype=F64)  # rows like no other
    assert len(self_repellent_anchors(alone, 5).unique()) == 5


# --------------------------------------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_the_pair_loss_is_its_formula(distance):
    make = Maker(F64, seed=3)
    x, y, positive = make.randn(40, 5).requires_grad_(), (0.5 * make.randn(40, 5)).requires_grad_(), make.mask(40)
    D = 1 - torch.nn.functional.cosine_similarity(x, y) if distance == "cosine" else (x - y).norm(dim=1)
    want = torch.where(positive, D**2, torch.clamp(D.sqrt() * (0.6 * 4 - D), min=0) ** 2 / 4).mean() / 2
    found = noise_robust_pair_loss(x, y, positive, margin=4, share=0.6, distance=distance)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(lambda a, b: noise_robust_pair_loss(a, b, positive, distance=distance), (x, y))


def test_far_negatives_and_equal_pairs_are_left_alone():
    x = torch.zeros(3, 2, requires_grad=True)
    y = torch.tensor([[2.5, 0.0], [9.0, 0.0], [0.0, 0.0]])
    loss = noise_robust_pair_loss(x, y, torch.zeros(3, dtype=torch.bool), distance="euclidean")
    loss.backward()
    assert loss == 0 and (x.grad == 0).all()
    assert noise_robust_pair_loss(x, torch.full((3, 2), torch.nan), torch.zeros(3, dtype=torch.bool), distance="euclidean").isnan()
    equal = noise_robust_pair_loss(x, torch.zeros(3, 2), torch.ones(3, dtype=torch.bool), distance="cosine")
    assert equal.isfinite() and torch.autograd.grad(equal, x)[0].isfinite().all()
    for wrong, message in ((dict(margin=0), "margin and share must be positive"), (dict(distance="dot"), "distance must be")):
        with pytest.raises(ValueError, match=message):
            noise_robust_pair_loss(x, y, torch.ones(3, dtype=torch.bool), **wrong)
    with pytest.raises(ValueError, match="positive must be a bool tensor"):
        noise_robust_pair_loss(x, y, torch.ones(3))


# ------------------------------------------------------------------------------------------------------------------------------------ clusters


def test_clustering_scores():
    """By going through all namings and all pairs of items."""
    generator = torch.Generator().manual_seed(0)
    for K, L, N in ((3, 3, 30), (2, 4, 25), (5, 2, 40), (1, 3, 9), (4, 4, 4)):
        a, b = torch.randint(K, (N,), generator=generator), torch.randint(L, (N,), generator=generator)
        found = clustering(10 * a - 3, b)
        namings = itertools.permutations(range(max(K, L)), K)
        accuracy = max(float((torch.tensor(naming)[a] == b).double().mean()) for naming in namings)
        upper = torch.ones(N, N).triu(1).bool()
        same_a, same_b = ((each[:, None] == each)[upper] for each in (a, b))
        both, one, other, total = int((same_a & same_b).sum()), int(same_a.sum()), int(same_b.sum()), len(same_a)
        expected = one * other / total
        ari = 1.0 if (one + other) / 2 == expected else (both - expected) / ((one + other) / 2 - expected)
        assert found.accuracy == pytest.approx(accuracy) and found.ari == pytest.approx(ari)
        assert 0 <= found.nmi <= 1
    labels = torch.arange(20) % 4
    same = clustering((labels * 7 + 5) % 29, labels)
    assert (same.accuracy, same.nmi, same.ari) == (1.0, pytest.approx(1.0), 1.0)
    alone = clustering(torch.zeros(5, dtype=torch.int64), torch.ones(5, dtype=torch.int64))
    assert (alone.accuracy, alone.nmi, alone.ari) == (1.0, 1.0, 1.0)
    assert clustering(torch.arange(6), torch.zeros(6, dtype=torch.int64)).nmi == 0
    with pytest.raises(ValueError, match="labels must be an int64 tensor"):
        clustering(torch.arange(3), torch.arange(4))


def test_kmeans_finds_what_is_apart_and_fills_empty_clusters():
    centres = 10 * torch.eye(4, dtype=F64)
    x, labels = centres.repeat(25, 1) + 0.3 * rows(100, 4), torch.arange(4).repeat(25)
    assert clustering(kmeans(x, 4), labels).accuracy == 1
    for few, count in ((torch.ones(6, 2), 3), (torch.tensor([[0.0], [0.0], [5.0], [5.0]]), 4)):
        assert len(kmeans(few, count).unique()) == count  # every cluster has a row
    assert len(kmeans(x[:5], 5).unique()) == 5


@pytest.mark.parametrize("matching", ["hungarian", "greedy"])
def test_padding(matching):
    """Every row of the longer view has a partner of its own; made-up rows lie between the rows on whose sides the distance jumps."""
    longer = rows(23, 3, seed=1)
    for size in (23, 22, 12, 3, 1):
        shorter = longer[torch.randperm(23, generator=torch.Generator().manual_seed(size))[:size]] + 0.01 * rows(size, 3, seed=size)
        padded, match = pad_view(shorter, longer, matching)
        assert padded.shape == (23, 3) and torch.equal(padded[:size], shorter) and sorted(match.tolist()) == list(range(23))
        low, high = shorter.amin(0), shorter.amax(0)
        assert ((padded >= low - 1e-9) & (padded <= high + 1e-9)).all()  # weighted means of what there is
    if matching == "hungarian":
        identity = pad_view(longer[torch.arange(23).flip(0)], longer)[1]
        assert torch.equal(identity, torch.arange(23).flip(0))
    with pytest.raises(ValueError, match="pad_view: shorter must have 1 to 23 rows"):
        pad_view(rows(24, 3), longer)
    with pytest.raises(ValueError, match='matching must be "hungarian" or "greedy"'):
        pad_view(longer, longer, "any")


@pytest.mark.parametrize("variant", ["srrw", "released"])
@pytest.mark.parametrize("matching", ["hungarian", "greedy"])
def test_incomplete_and_shuffled_views(variant, matching):
    """Half the pairs are known, a third of the second view is missing, the rest is shuffled: still clusters, far above chance and above what either view alone could be matched to."""
    make = Maker(torch.float32, seed=5)
    labels = torch.arange(150) % 5
    kinds = 2 * make.randn(5, 6)
    views = [(kinds[labels] + 0.7 * make.randn(150, 6)) @ make.randn(6, width) for width in (20, 16)]
    kept = torch.cat([torch.arange(75), 75 + torch.randperm(75, generator=torch.Generator().manual_seed(1))[:25]])
    second = views[1][kept]
    config = IncompleteMultiviewConfig(epochs=60, variant=variant, matching=matching)
    found = IncompleteMultiview.fit([views[0], second], torch.arange(75)[:, None].repeat(1, 2), 5, config)
    assert found.longer == 0 and len(found.clusters) == 150 and torch.equal(found.match[:75], torch.arange(75))
    rest = found.match[75:]
    assert int((rest < 0).sum()) == 50 and sorted(rest[rest >= 0].tolist()) == list(range(75, 100))
    assert found.features.shape == (150, 2 * len(found.anchors)) and len(found.anchors) <= 20
    score = clustering(found.clusters, labels)
    assert score.accuracy > 0.7 and score.nmi > 0.5
    again = IncompleteMultiview.fit([views[0], second], torch.arange(75)[:, None].repeat(1, 2), 5, config)
    assert torch.equal(found.clusters, again.clusters)
    turned = IncompleteMultiview.fit([second, views[0]], torch.arange(75)[:, None].repeat(1, 2), 5, config)
    assert turned.longer == 1 and len(turned.clusters) == 150


def test_nothing_left_and_bad_views():
    x, y = rows(20, 4), rows(12, 3)
    paired = torch.arange(12)[:, None].repeat(1, 2)
    config = IncompleteMultiviewConfig(epochs=2)
    found = IncompleteMultiview.fit([x, y], paired, 3, config)  # every row of the shorter view is taken
    assert (found.match[12:] == -1).all()
    whole = IncompleteMultiview.fit([x[:12], y], paired, 3, config)
    assert torch.equal(whole.match, torch.arange(12))
    for wrong, message in (
        (([x], paired, 3), "views must be two matrices"),
        (([x, y.float()], paired, 3), r"views\[1\] must be"),
        (([x, y], paired.float(), 3), "paired must be an int64 tensor"),
        (([x, y], paired + 1, 3), r"paired must hold rows of views\[1\], 0 to 11"),
        (([x, y], torch.zeros(2, 2, dtype=torch.int64), 3), "each at most once"),
        (([x, y], paired, 0), "classes must be from 1"),
    ):
        with pytest.raises(ValueError, match="IncompleteMultiview.fit: .*" + message):
            IncompleteMultiview.fit(*wrong)
    with pytest.raises(ValueError, match="IncompleteMultiviewConfig: variant must be one of"):
        IncompleteMultiviewConfig(variant="walk")
