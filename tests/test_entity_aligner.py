"""Entities of two graphs: the loss against its formula, pseudo-labels, and what is done where a modality is missing."""

from __future__ import annotations

import sys

import pytest
import torch

from modalign.models import EntityAligner, EntityAlignerConfig, EntityGraph, PseudoLabels
from modalign.nn import UncertaintyWeighting
from modalign.nn.functional import entity_alignment_loss
from modalign.ops import mutual_nearest
from modalign.testing import Maker

F64 = torch.float64


def one_way(x, y, temperature):
    logits = torch.cat([x @ y.T, (x @ x.T).fill_diagonal_(-torch.inf)], 1) / temperature
    return -logits.log_softmax(1).diagonal()


@pytest.mark.parametrize("N", [1, 2, 13, 70])
def test_the_loss_is_its_formula(N, monkeypatch):
    monkeypatch.setattr(sys.modules["modalign.nn.functional.entity_alignment_loss"], "PANEL_ROWS", 16)
    make = Maker(F64, seed=N)
    left, right = make.randn(N, 5).requires_grad_(), make.randn(N, 5).requires_grad_()
    x, y = (torch.nn.functional.normalize(each, dim=1) for each in (left, right))
    each = (one_way(x, y, 0.1) + one_way(y, x, 0.1)) / 2
    found = entity_alignment_loss(left, right)
    torch.testing.assert_close(found, each.mean(), rtol=1e-12, atol=1e-14)
    for got, want in zip(torch.autograd.grad(found, (left, right)), torch.autograd.grad(each.mean(), (left, right)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        sure, doubt = (make.randn(N).sigmoid() for _ in range(2))
        x, y = left, right
        weighted = ((one_way(x, y, 2.0) + one_way(y, x, 2.0)) / 2 * torch.minimum(sure, doubt)).mean()
        torch.testing.assert_close(entity_alignment_loss(left, right, temperature=2.0, confidence=(sure, doubt), normalize=False), weighted, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(entity_alignment_loss(left, right), entity_alignment_loss(right, left))


def test_bad_arguments_of_the_loss():
    x = torch.ones(3, 2)
    for call, message in (
        (lambda: entity_alignment_loss(x, x[:2]), "right must be"),
        (lambda: entity_alignment_loss(x, x, temperature=0), "temperature must be"),
        (lambda: entity_alignment_loss(x, x, confidence=(torch.ones(3), torch.ones(2))), "confidence of the right side"),
    ):
        with pytest.raises(ValueError, match="entity_alignment_loss: .*" + message):
            call()


def test_uncertainty_weighting_settles_at_the_inverse():
    weighting = UncertaintyWeighting(2).double()
    losses = [torch.tensor(0.5, dtype=F64), torch.tensor(4.0, dtype=F64)]
    assert weighting(losses) == 4.5
    optimizer = torch.optim.LBFGS(weighting.parameters(), max_iter=50)

    def closure():
        optimizer.zero_grad()
        loss = weighting(losses)
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(weighting.log_variance.exp().detach(), torch.tensor([0.5, 4.0], dtype=F64), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="losses must be 2 scalars, got 1"):
        weighting(losses[:1])
    with pytest.raises(ValueError, match="count must be a whole number"):
        UncertaintyWeighting(0)


# --------------------------------------------------------------------------------------------------------------------------------- pseudo-labels


def test_pseudo_labels_replace_intersect_and_promote():
    """Against sets of pairs, through two rounds of two blocks of three checks."""
    make = Maker(F64, seed=1)
    labels = PseudoLabels(torch.arange(5, 40), torch.arange(0, 30), block=3, blocks=2)
    left, right = set(range(5, 40)), set(range(30))
    candidates, promoted = set(), []
    for check in range(12):
        x, y = make.randn(40, 4), make.randn(30, 4)
        x[5:25] = y[:20] + (0.05 if check % 2 else 0.6) * make.randn(20, 4)  # some keep their partner, more or less
        pairs = {tuple(pair) for pair in mutual_nearest(x[sorted(left)], y[sorted(right)]).tolist()}
        pairs = {(sorted(left)[a], sorted(right)[b]) for a, b in pairs}
        candidates = pairs if check % 3 == 0 else candidates & pairs
        before = len(labels.candidates)
        links = labels.update(x, y)
        if check % 3:
            assert len(labels.candidates) <= before or check % 6 == 5
        if check % 6 == 5:
            assert {tuple(pair) for pair in links.tolist()} == candidates and candidates
            promoted += sorted(candidates)
            left, right = left - {a for a, _ in candidates}, right - {b for _, b in candidates}
            candidates = set()
        else:
            assert links.shape == (0, 2)
        assert {tuple(pair) for pair in labels.candidates.tolist()} == candidates
        assert set(labels.left.tolist()) == left and set(labels.right.tolist()) == right
    assert len({a for a, _ in promoted}) == len(promoted) == len({b for _, b in promoted})


def test_empty_pools_and_bad_ones():
    empty = PseudoLabels(torch.arange(0), torch.arange(3), block=1, blocks=1)
    assert empty.update(torch.ones(4, 2), torch.ones(3, 2)).shape == (0, 2) and len(empty.right) == 3
    for call, message in (
        (lambda: PseudoLabels(torch.zeros(2, dtype=torch.int64), torch.arange(2)), "left must be an int64 tensor"),
        (lambda: PseudoLabels(torch.arange(2), torch.arange(2), block=0), "block must be a whole number"),
        (lambda: PseudoLabels(torch.arange(5), torch.arange(2)).update(torch.ones(4, 2), torch.ones(2, 2)), "left must have a row for each entity of its pool, 5 or more, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# ----------------------------------------------------------------------------------------------------------------------------------- the aligner


def graphs(missing=0.5, N=120, seed=0):
    """Names that say a part of what an entity is, pictures that say the rest, and neighbours."""
    make = Maker(torch.float32, seed=seed)
    about = make.randn(N, 8)
    edges = torch.stack([torch.arange(N), (torch.arange(N) + 1) % N])
    sides = []
    for _ in range(2):
        name = about[:, :4] @ make.randn(4, 12) + 1.0 * make.randn(N, 12)
        picture = about @ make.randn(8, 16) + 0.5 * make.randn(N, 16)
        there = torch.rand(N, generator=torch.Generator().manual_seed(len(sides))) >= missing
        sides.append(EntityGraph({"name": name, "picture": torch.where(there[:, None], picture, torch.nan)}, edges, {"picture": there}))
    return sides


def links(first, last):
    return torch.arange(first, last)[:, None].repeat(1, 2)


@pytest.mark.parametrize("missing", ["imagine", "leave_out", "noise"])
def test_missing_pictures(missing):
    """What an entity lacks never reaches a result; entities are found far above chance, 1 of 60."""
    left, right = graphs()
    config = EntityAlignerConfig(width=32, hidden=32, epochs=(60, 20, 20), missing=missing)
    model = EntityAligner(left, right, config).fit(links(0, 60))
    found = model.ranks(links(60, 120))
    assert found.hits1 > 0.2 and found.hits10 > 0.5 and found.reciprocal_rank > 0.3
    for embeddings, graph in zip(model.embed(), (left, right), strict=True):
        assert all(x.isfinite().all() for x in embeddings.values())
        rows = embeddings["picture"][~graph.present["picture"]]
        assert (rows == 0).all() if missing == "leave_out" else (rows.norm(dim=1) - 1).abs().max() < 1e-5
        torch.testing.assert_close(embeddings["joint"].norm(dim=1), torch.ones(120))
    again = EntityAligner(left, right, config).fit(links(0, 60))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_imagination_leaves_the_maps_alone_and_learns():
    left, right = graphs()
    config = EntityAlignerConfig(width=32, hidden=32, epochs=(30, 0, 0))
    model = EntityAligner(left, right, config).fit(links(0, 60))
    before, first = {name: value.clone() for name, value in model.state_dict().items()}, float(model._imagination_loss().detach())
    model.config = EntityAlignerConfig(width=32, hidden=32, epochs=(0, 40, 0))
    model.fit(links(0, 60))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (".imagination." not in name), name
    assert float(model._imagination_loss().detach()) < 0.8 * first


def test_pseudo_labels_join_the_links():
    left, right = graphs(missing=0.0)
    found = [EntityAligner(left, right, EntityAlignerConfig(width=32, epochs=(100, 0, 0), check_every=every)).fit(links(0, 30)) for every in (0, 5)]
    assert len(found[0].added) == 0 and len(found[1].added) > 10
    right_ones = (found[1].added[:, 0] == found[1].added[:, 1]).double().mean()
    assert right_ones > 0.7 and int(found[1].added.min()) >= 30
    assert len(found[1].added[:, 0].unique()) == len(found[1].added)


def test_a_saved_model_is_the_same_model():
    left, right = graphs()
    named = [EntityGraph({"a.b": graph.features["name"], "type": graph.features["picture"]}, graph.edges, {"type": graph.present["picture"]}) for graph in (left, right)]
    config = EntityAlignerConfig(width=16, hidden=16, epochs=(10, 5, 5))
    model = EntityAligner(*named, config).fit(links(0, 60))
    again = EntityAligner(*named, config, seed=5)
    again.load_state_dict(model.state_dict())
    for one, other in zip(model.embed(), again.embed(), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert model.double().ranks(links(60, 120)).hits10 > 0.3


def test_no_pictures_at_all_and_bad_graphs():
    left, right = graphs(missing=1.1)
    model = EntityAligner(left, right, EntityAlignerConfig(width=16, hidden=16, epochs=(5, 3, 3))).fit(links(0, 60))
    assert all(x.isfinite().all() for side in model.embed() for x in side.values())
    plain = EntityGraph({"name": left.features["name"]}, left.edges[:, :0])
    EntityAligner(plain, plain, EntityAlignerConfig(width=16, epochs=(2, 2, 2))).fit(links(0, 5))
    for call, message in (
        (lambda: EntityAligner(left, plain), "right must have the modalities of left"),
        (lambda: EntityAligner(EntityGraph({}, left.edges), left), "left must be an EntityGraph with one modality or more"),
        (lambda: EntityAligner(left, EntityGraph(right.features, right.edges + 1, right.present)), "right must have edges int64"),
        (lambda: EntityAligner(left, EntityGraph(right.features, right.edges, {"picture": torch.ones(120)})), "right must have bool masks"),
        (lambda: EntityAligner(left, EntityGraph(right.features, right.edges, {"sound": right.present["picture"]})), "right must have finite features where they are present"),
        (lambda: EntityAligner(plain, EntityGraph(plain.features, plain.edges, {"sound": right.present["picture"]})), "right must have masks of its modalities"),
        (lambda: EntityAligner(plain, EntityGraph({"name": plain.features["name"].half()}, plain.edges)), "all float32 or all float64"),
        (lambda: EntityAligner(plain, EntityGraph({"name": plain.features["name"].double()}, plain.edges)), "right must be torch.float32 on cpu as left is"),
        (lambda: EntityAligner(plain, EntityGraph({"name": plain.features["name"][:0]}, plain.edges)), "N 1 or more"),
        (lambda: EntityAlignerConfig(epochs=5), "epochs must be three whole numbers"),
        (lambda: EntityAligner(left, EntityGraph({"name": torch.ones(4, 2), "picture": torch.ones(5, 2)}, right.edges[:, :0])), "of as many entities each"),
        (lambda: model.fit(links(0, 121)), "links must hold rows of the left graph, 0 to 119"),
        (lambda: model.ranks(torch.zeros(2, 2, dtype=torch.int64)), "each at most once"),
        (lambda: EntityAlignerConfig(missing="mean"), "missing must be imagine, leave_out or noise"),
        (lambda: EntityAlignerConfig(epochs=(1, 2)), "epochs must be three whole numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
