"""The token-wise, prototype, region and linear losses and mappings of the papers: against float64 formulas written out, and the oracles of each."""

from __future__ import annotations

import math
import sys

import pytest
import torch
import torch.nn.functional as F

from modalign import metrics, nn, ops
from modalign.models import LinearAlignment, LinearAlignmentConfig
from modalign.nn import functional as L
from modalign.testing import peak_memory
from ranks import run_ranks

DOUBLE = torch.float64


def unit(*shape, dtype=DOUBLE):
    return F.normalize(torch.randn(*shape, dtype=dtype), dim=-1)


def gradients(function, leaves):
    fresh = [leaf.clone().requires_grad_() for leaf in leaves]
    result = function(*fresh)
    return [result.detach(), *torch.autograd.grad(result, fresh)]


def two_entropies(x, y, scale):
    logits, at = scale * F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T, torch.arange(len(x))
    return (F.cross_entropy(logits, at) + F.cross_entropy(logits.T, at)) / 2


# ------------------------------------------------------------------------------------------------------------------------------ every loss at once

WORD_MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 0, 1, 1]]).bool()
PATCH_MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 0, 0]]).bool()
WORD_WEIGHTS = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)) * WORD_MASK
PATCH_WEIGHTS = torch.rand(4, 4, generator=torch.Generator().manual_seed(1))
ORDER = torch.tensor([3, 0, 4, 1, 2])


def mgca_by_hand(words, patches, tau=0.1, weighted=True):
    """A sample and a token at a time."""
    losses = []
    for b in range(len(words)):
        sides = []
        for tokens, mask, weights in ((words, WORD_MASK, WORD_WEIGHTS), (patches, PATCH_MASK, PATCH_WEIGHTS)):
            some = mask[b]
            weight = weights[b][some].to(tokens) if weighted else torch.ones(int(some.sum()), dtype=tokens.dtype)
            weight = weight.clamp(weight.quantile(0.1), weight.quantile(0.9))
            sides.append((F.normalize(tokens[b][some], dim=-1), weight / weight.sum()))
        total = 0
        for (queries, weight), (keys, _) in (sides, sides[::-1]):
            attended = F.normalize((queries @ keys.T / tau).softmax(1) @ keys, dim=-1)
            scores = queries @ attended.T / tau
            at = torch.arange(len(queries))
            total = total + (weight * (F.cross_entropy(scores, at, reduction="none") + F.cross_entropy(scores.T, at, reduction="none"))).sum() / 2
        losses.append(total)
    return sum(losses) / len(losses)


def sinkhorn_by_hand(scores, epsilon, iterations=3):
    q = (scores.detach() / epsilon).exp().T
    K, B = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / K
        q = q / q.sum(0, keepdim=True) / B
    return (q * B).T


def prototypes_by_hand(x, y, prototypes, tau=0.2, epsilon=0.05):
    x, y, prototypes = (F.normalize(t, dim=-1) for t in (x, y, prototypes))
    z_x, z_y = x @ prototypes.T, y @ prototypes.T
    q_x, q_y = sinkhorn_by_hand(z_x, epsilon), sinkhorn_by_hand(z_y, epsilon)
    return -((q_x * (z_y / tau).log_softmax(1) + q_y * (z_x / tau).log_softmax(1)).sum(1) / 2).mean()


def jma_by_hand(points, text, views, enhanced, scale):
    points, text, views, enhanced = (F.normalize(t, dim=-1) for t in (points, text, views, enhanced))
    pictures = []
    for b in range(len(text)):
        alpha = torch.stack([view @ text[b] for view in views[b]]).softmax(0)
        pictures.append(sum(a * view for a, view in zip(alpha, enhanced[b], strict=True)))
    picture, at = torch.stack(pictures), torch.arange(len(text))

    def both(a, b):
        return (F.cross_entropy(scale * a @ b.T, at) + F.cross_entropy(scale * b @ a.T, at)) / 2

    return both(points, text) + both(points, picture) + both(text, picture)


OFFSETS = torch.tensor([0, 2, 3, 7, 9])
LABELS = torch.tensor([[1, 0, 0, 1, 0], [1, 1, 0, 0, 0], [0, 1, 0, 1, 0], [0, 0, 1, 1, 0]]).bool()  # 4 pictures, 5 attributes, nobody has the last


def villa_by_hand(regions, attributes, tau, released=False):
    """regions [R, D], or [A, R, D] with a head for each attribute."""
    attributes, regions = F.normalize(attributes, dim=-1), F.normalize(regions, dim=-1)
    terms = []
    for a in range(5):
        head = regions if regions.dim() == 2 else regions[a]
        z = torch.stack([(head[OFFSETS[i] : OFFSETS[i + 1]] @ attributes[a]).max() for i in range(4)]) / tau
        for i in range(4):
            if LABELS[i, a]:
                others = sum(z[j].exp() for j in range(4) if not LABELS[j, a]) + (LABELS[:, a].sum() if released else 0)
                terms.append(-(z[i].exp() / (z[i].exp() + others)).log())
    return sum(terms) / len(terms)


def penalties_by_hand(scores):
    shares = [row / row.sum() for row in scores]
    return scores.shape[1] * sum((sum(share[v] for share in shares) / len(shares)) ** 2 for v in range(scores.shape[1]))


def mgca(words, patches, tau):
    weights = {"word_weights": WORD_WEIGHTS.to(words.dtype), "patch_weights": PATCH_WEIGHTS.to(words.dtype)}
    return L.mgca_token_loss(words, patches, temperature=tau, word_mask=WORD_MASK, patch_mask=PATCH_MASK, **weights)


def number(value):
    return torch.tensor(value, dtype=DOUBLE)


def leaves_of(name):
    torch.manual_seed(0)

    def r(*shape):
        return torch.randn(*shape, dtype=DOUBLE)

    return {
        "mgca": [r(4, 5, 6), r(4, 4, 6), number(0.3)],
        "mgca without weights": [r(4, 5, 6), r(4, 4, 6)],
        "prototypes": [r(5, 4), r(5, 4), r(3, 4), number(0.2)],
        "jma": [r(3, 4), r(3, 4), r(3, 2, 4), r(3, 2, 4), number(3.0)],
        "clim": [r(5, 4), number(3.0)],
        "villa": [r(9, 4), r(5, 4), number(0.5)],
        "villa as released": [r(9, 4), r(5, 4), number(0.5)],
        "villa with a head per attribute": [r(5, 9, 4), r(5, 4), number(0.5)],
        "overuse": [r(4, 5).abs() + 0.1],
        "flops": [r(4, 5).abs()],
    }[name]


TEXT = torch.randn(5, 4, dtype=DOUBLE, generator=torch.Generator().manual_seed(7))
LOSSES = {
    "mgca": (mgca, mgca_by_hand),
    "mgca without weights": (
        lambda w, p: L.mgca_token_loss(w, p, word_mask=WORD_MASK, patch_mask=PATCH_MASK),
        lambda w, p: mgca_by_hand(w, p, weighted=False),
    ),
    "prototypes": (lambda x, y, c, tau: L.prototype_alignment_loss(x, y, c, temperature=tau), prototypes_by_hand),
    "jma": (lambda p, t, v, e, scale: L.jma_loss(p, t, v, enhanced=e, logit_scale=scale), jma_by_hand),
    "clim": (
        lambda cells, scale: L.clim_loss(cells, TEXT.to(cells.dtype), ORDER, logit_scale=scale),
        lambda cells, scale: two_entropies(cells, TEXT[ORDER].to(cells), scale),
    ),
    "villa": (lambda r, a, tau: L.villa_mapping_loss(r, OFFSETS, a, LABELS, temperature=tau), villa_by_hand),
    "villa as released": (
        lambda r, a, tau: L.villa_mapping_loss(r, OFFSETS, a, LABELS, temperature=tau, released=True),
        lambda r, a, tau: villa_by_hand(r, a, tau, released=True),
    ),
    "villa with a head per attribute": (lambda r, a, tau: L.villa_mapping_loss(r, OFFSETS, a, LABELS, temperature=tau), villa_by_hand),
    "overuse": (L.overuse_penalty, penalties_by_hand),
    "flops": (L.flops_penalty, lambda s: s.mean(0).square().sum()),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_is_its_formula(name):
    ours, by_hand = LOSSES[name]
    for found, wanted in zip(gradients(ours, leaves_of(name)), gradients(by_hand, leaves_of(name)), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_of_loss(name):
    ours, _ = LOSSES[name]
    if name == "prototypes":  # codes are constants: numerical differences would move them
        codes = [L.log_sinkhorn(F.normalize(t, dim=1) @ F.normalize(leaves_of(name)[2], dim=1).T).exp() for t in leaves_of(name)[:2]]

        def ours(x, y, c, tau):
            z = [F.normalize(t, dim=1) @ F.normalize(c, dim=1).T / tau for t in (x, y)]
            return -(codes[0] * z[1].log_softmax(1) + codes[1] * z[0].log_softmax(1)).sum(1).mean() / 2

        wanted = gradients(ours, leaves_of(name))
        for found, right in zip(gradients(LOSSES[name][0], leaves_of(name)), wanted, strict=True):
            assert torch.allclose(found, right, rtol=1e-9, atol=1e-12)
    assert torch.autograd.gradcheck(ours, [leaf.requires_grad_() for leaf in leaves_of(name)])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_loss_in_other_dtypes(name, dtype):
    """The loss is float32; it is that of the rounded inputs, which float32 computes to 1e-5."""
    rounded = [leaf.to(dtype) if leaf.dim() else leaf.float() for leaf in leaves_of(name)]
    ours, by_hand = LOSSES[name]
    if name.startswith("mgca") or name == "clim":  # constants of the loss are rounded as well
        by_hand = lambda *given: ours(*given)  # noqa: E731
    found, wanted = gradients(ours, rounded), gradients(by_hand, [leaf.double() for leaf in rounded])
    assert found[0].dtype is torch.float32
    least = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert abs(found[0] - wanted[0]) <= max(1e-5, least / 4) * max(1, abs(wanted[0]))
    for leaf, mine, right in zip(rounded, found[1:], wanted[1:], strict=True):
        assert mine.dtype is leaf.dtype and (mine.double() - right).norm() <= least * right.norm() + 1e-7


@pytest.mark.parametrize("name", ["mgca", "mgca without weights", "prototypes", "jma", "clim", "villa"])
def test_loss_of_one_sample_is_finite(name):
    torch.manual_seed(1)
    one = {
        "mgca": lambda: L.mgca_token_loss(torch.randn(1, 3, 4), torch.randn(1, 2, 4)),
        "mgca without weights": lambda: L.mgca_token_loss(torch.randn(1, 1, 4), torch.randn(1, 1, 4)),
        "prototypes": lambda: L.prototype_alignment_loss(torch.randn(1, 4), torch.randn(1, 4), torch.randn(3, 4)),
        "jma": lambda: L.jma_loss(torch.randn(1, 4), torch.randn(1, 4), torch.randn(1, 2, 4)),
        "clim": lambda: L.clim_loss(torch.randn(1, 4), torch.randn(1, 4), torch.tensor([0]), logit_scale=14.3),
        "villa": lambda: L.villa_mapping_loss(torch.randn(3, 4), torch.tensor([0, 3]), torch.randn(2, 4), torch.tensor([[True, False]])),
    }[name]()
    assert one.isfinite() and (one == 0) == (name not in ("mgca", "prototypes"))


def test_reductions():
    torch.manual_seed(2)
    words, patches = torch.randn(3, 4, 5), torch.randn(3, 2, 5)
    x, y, c = torch.randn(3, 5), torch.randn(3, 5), torch.randn(4, 5)
    for loss in (
        lambda how: L.mgca_token_loss(words, patches, reduction=how),
        lambda how: L.prototype_alignment_loss(x, y, c, reduction=how),
        lambda how: L.jma_loss(x, y, patches, reduction=how),
        lambda how: L.clim_loss(x, y, torch.tensor([2, 0, 1]), logit_scale=2.0, reduction=how),
    ):
        each = loss("none")
        assert each.shape == (3,)
        assert torch.allclose(loss("sum"), each.sum()) and torch.allclose(loss("mean"), each.mean())
    each = L.clim_loss(x, y, torch.tensor([2, 0, 1]), logit_scale=2.0, reduction="none")  # in the order of the pictures
    assert torch.allclose(each, ops.clip_loss(x[[1, 2, 0]], y, logit_scale=2.0, normalize=True, reduction="none"))


def test_empty_batch():
    assert L.mgca_token_loss(torch.zeros(0, 2, 3), torch.zeros(0, 2, 3)) == 0
    assert L.prototype_alignment_loss(torch.zeros(0, 3), torch.zeros(0, 3), torch.ones(2, 3)) == 0
    assert L.overuse_penalty(torch.zeros(0, 3)) == 0 and L.flops_penalty(torch.zeros(0, 3)) == 0
    assert L.pool_cells(torch.zeros(1, 3, 2, 2), torch.zeros(0, 5)).shape == (0, 3)


def test_losses_under_autocast():
    x = [torch.randn(4, 3, 8) for _ in range(2)]
    flat = [t[:, 0] for t in x]
    for loss in (
        lambda: L.mgca_token_loss(*x),
        lambda: L.prototype_alignment_loss(*flat, torch.eye(8)),
        lambda: L.jma_loss(*flat, x[1]),
        lambda: L.overuse_penalty(flat[0].abs()),
    ):
        outside = loss()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(loss(), outside)


# ------------------------------------------------------------------------------------------------------------------------------------------- MGCA


def test_mgca_one_token_has_nothing_to_be_told_apart_from():
    words, patches = unit(3, 1, 6), unit(3, 4, 6)
    assert L.mgca_token_loss(words, unit(3, 1, 6)) == 0
    # every patch attends to the one word, so S[n, n'] is p_n . w / tau for all n': the rows cost log N, the columns what p_n . w spreads
    z = (patches * words).sum(-1) / 0.1
    wanted = (math.log(4) + (z.logsumexp(1, keepdim=True) - z).mean(1)) / 2
    assert torch.allclose(L.mgca_token_loss(words, patches, reduction="none"), wanted, rtol=1e-12)
    assert torch.allclose(L.mgca_token_loss(patches, words, reduction="none"), wanted, rtol=1e-12)


def test_mgca_orthogonal_words_aligned_with_patches_cost_nothing_at_a_small_temperature():
    eye = torch.eye(5, dtype=DOUBLE)[None]
    assert L.mgca_token_loss(eye, eye[:, torch.randperm(5)], temperature=0.01) < 1e-12
    assert L.mgca_token_loss(eye, eye, temperature=1.0) > 1


def test_mgca_does_not_depend_on_the_order_of_patches_or_words():
    words, patches, order, other = unit(2, 4, 6), unit(2, 5, 6), torch.randperm(5), torch.randperm(4)
    weights = torch.rand(2, 5, dtype=DOUBLE)
    loss = L.mgca_token_loss(words, patches, patch_weights=weights)
    assert torch.allclose(L.mgca_token_loss(words[:, other], patches[:, order], patch_weights=weights[:, order]), loss, rtol=1e-12)


def test_mgca_padding_is_never_read():
    words, patches, tau = leaves_of("mgca")
    wanted = gradients(mgca, (words, patches, tau))
    for junk in (torch.nan, torch.inf, 1e30):
        dirty = words.masked_fill(~WORD_MASK[..., None], junk), patches.masked_fill(~PATCH_MASK[..., None], junk)
        for found, right in zip(gradients(mgca, (*dirty, tau)), wanted, strict=True):
            assert torch.equal(found, right)
    weights = WORD_WEIGHTS.masked_fill(~WORD_MASK, torch.nan)
    clean, dirty = (L.mgca_token_loss(words, patches, word_mask=WORD_MASK, word_weights=given) for given in (WORD_WEIGHTS, weights))
    assert torch.equal(clean, dirty)


def test_mgca_padding_does_not_drown_patches_that_look_away():
    """Cosine -1 at temperature 0.005: beside a padding of score 0 nothing would be left of the patches in float32."""
    eye = torch.eye(4)[None]
    padded, mask = torch.cat([-eye, torch.zeros(1, 2, 4)], 1), torch.tensor([[True] * 4 + [False] * 2])
    far = -eye.sum(1, keepdim=True).expand(1, 4, 4)
    for patches in (padded, torch.cat([far, torch.zeros(1, 2, 4)], 1)):
        alone = L.mgca_token_loss(eye.sum(1, keepdim=True) + 0.1 * eye, patches[:, :4], temperature=0.005)
        assert torch.allclose(L.mgca_token_loss(eye.sum(1, keepdim=True) + 0.1 * eye, patches, temperature=0.005, patch_mask=mask), alone, rtol=1e-5)


@pytest.mark.parametrize("side", ["words", "patches"])
def test_mgca_a_sample_of_padding_adds_nothing(side):
    words, patches, _ = leaves_of("mgca")
    mask = (WORD_MASK if side == "words" else PATCH_MASK).clone()
    mask[1] = False
    given = {"word_mask": mask} if side == "words" else {"patch_mask": mask}
    loss, *grads = gradients(lambda w, p: L.mgca_token_loss(w, p, reduction="none", **given).sum(), (words, patches))
    each = L.mgca_token_loss(words, patches, reduction="none", **given)
    assert each[1] == 0 and (each[[0, 2, 3]] > 0).all()
    for grad in grads:
        assert grad.isfinite().all() and (grad[1] == 0).all()


def test_mgca_weights_are_drawn_into_their_quantiles():
    words, patches = unit(1, 11, 6), unit(1, 3, 6)
    weights = torch.linspace(1, 2, 11, dtype=DOUBLE)[None]
    wild = weights.clone()
    wild[0, -1], wild[0, 0] = 1e6, 1e-6
    assert torch.allclose(L.mgca_token_loss(words, patches, word_weights=wild), L.mgca_token_loss(words, patches, word_weights=weights), rtol=1e-12)
    assert not torch.allclose(L.mgca_token_loss(words, patches, word_weights=weights), L.mgca_token_loss(words, patches))
    single = torch.zeros(1, 11, dtype=DOUBLE)  # a quantile of one token
    single[0, 3] = 0.5
    assert L.mgca_token_loss(words, patches, word_weights=single).isfinite()
    given = weights.clone().requires_grad_()
    assert not L.mgca_token_loss(words, patches, word_weights=given).requires_grad  # constants
    nothing = L.mgca_token_loss(words, patches, word_weights=torch.zeros(1, 11, dtype=DOUBLE), patch_weights=torch.zeros(1, 3, dtype=DOUBLE))
    assert nothing == 0


def test_mgca_nan_stays_in_its_sample():
    words, patches = torch.randn(3, 4, 5), torch.randn(3, 2, 5)
    words[1, 2, 0] = torch.nan
    each = L.mgca_token_loss(words, patches, reduction="none")
    assert each.isnan().tolist() == [False, True, False]


# ------------------------------------------------------------------------------------------------------------------------------------- prototypes


def test_codes_are_shares_and_prototypes_fill_alike():
    scores = unit(64, 16) @ unit(5, 16).T
    masses = []
    for iterations in (1, 3, 100):
        codes = L.log_sinkhorn(scores, iterations=iterations).exp()
        assert torch.allclose(codes.sum(1), torch.ones(64, dtype=DOUBLE), rtol=1e-12)
        masses.append((codes.sum(0) / 64 - 1 / 5).abs().max())
    assert masses[0] > masses[1] > masses[2] and masses[2] < 1e-6


def test_sinkhorn_on_logarithms_is_the_plain_one_and_does_not_overflow():
    scores = unit(20, 8) @ unit(6, 8).T
    assert torch.allclose(L.log_sinkhorn(scores).exp(), sinkhorn_by_hand(scores, 0.05), rtol=1e-10)
    assert torch.allclose(L.log_sinkhorn(scores.float()).exp(), sinkhorn_by_hand(scores, 0.05).float(), atol=1e-5)
    for epsilon in (1e-3, 1e-8, 1e-30):
        assert not sinkhorn_by_hand(scores.float(), epsilon).isfinite().all()
        codes = L.log_sinkhorn(scores.float(), epsilon=epsilon).exp()
        assert codes.isfinite().all() and torch.allclose(codes.sum(1), torch.ones(20), atol=1e-3)
    assert torch.allclose(L.log_sinkhorn(torch.full((7, 4), 0.3)).exp(), torch.full((7, 4), 0.25))


def test_one_prototype_costs_nothing_and_codes_have_no_gradient():
    x, y = unit(6, 4), unit(6, 4)
    assert L.prototype_alignment_loss(x, y, unit(1, 4)) == 0
    assert not L.log_sinkhorn(x.requires_grad_()).requires_grad


def test_prototypes_of_a_module():
    torch.manual_seed(0)
    loss, x, y = nn.PrototypeAlignment(8, count=5), torch.randn(6, 8), torch.randn(6, 8)
    assert torch.allclose(loss.prototypes.norm(dim=1), torch.ones(5))
    before = loss(x, y)
    with torch.no_grad():
        loss.prototypes *= torch.rand(5, 1) * 9 + 0.5  # renormalised before use
    assert torch.allclose(loss(x, y), before, rtol=1e-5)
    assert torch.equal(loss(x, y, temperature=0.3), L.prototype_alignment_loss(x, y, loss.prototypes, temperature=0.3))
    loss.frozen = True
    loss(x.requires_grad_(), y).backward()
    assert loss.prototypes.grad is None and x.grad.abs().sum() > 0
    loss.frozen = False
    loss(x, y).backward()
    assert loss.prototypes.grad.abs().sum() > 0
    nn.PrototypeAlignment(8, count=5).load_state_dict(loss.state_dict())
    assert nn.PrototypeAlignment(128).prototypes.shape == (500, 128)


def worker(rank, world):
    import torch.distributed as dist

    torch.manual_seed(0)
    x, y, prototypes = unit(12, 6), unit(12, 6), unit(4, 6)
    rows = slice(0, 5) if rank == 0 else slice(5, 12)
    group = dist.group.WORLD
    eight = [unit(8, 6) for _ in range(2)], unit(8, 3, 6)
    mine = slice(4 * rank, 4 * rank + 4)
    return (
        L.log_sinkhorn(x[rows] @ prototypes.T, process_group=group),
        L.log_sinkhorn(x @ prototypes.T)[rows],
        L.prototype_alignment_loss(x[rows], y[rows], prototypes, reduction="none", process_group=group),
        L.prototype_alignment_loss(x, y, prototypes, reduction="none")[rows],
        L.jma_loss(*(t[mine] for t in eight[0]), eight[1][mine], process_group=group),
        L.jma_loss(*eight[0], eight[1]),
    )


def test_over_two_processes(tmp_path):
    found = run_ranks(2, "test_paper_losses_2:worker", str(tmp_path))
    for codes, alone, loss, loss_alone, _, _ in found:
        assert torch.allclose(codes, alone, rtol=1e-12) and torch.allclose(loss, loss_alone, rtol=1e-12)
    assert torch.allclose((found[0][4] + found[1][4]) / 2, found[0][5], rtol=1e-10)


# -------------------------------------------------------------------------------------------------------------------------------------------- JM3D


def test_jma_of_one_view_is_three_plain_losses():
    points, text, view = unit(5, 8), unit(5, 8), unit(5, 8)
    wanted = sum(two_entropies(a, b, 1 / 0.07) for a, b in ((points, text), (points, view), (text, view)))
    assert torch.allclose(L.jma_loss(points, text, view[:, None]), wanted, rtol=1e-10)


def test_jma_equal_views_are_their_mean_and_the_text_chooses_among_others():
    points, text, view = unit(5, 8), unit(5, 8), unit(5, 8)
    assert torch.allclose(L.jma_loss(points, text, view[:, None].expand(5, 4, 8)), L.jma_loss(points, text, view[:, None]), rtol=1e-10)
    # views that fit the text count more: the joint picture leans to them
    eye = torch.eye(4, dtype=DOUBLE)
    views = torch.stack([eye, eye.roll(1, 0)], 1)
    alpha = torch.tensor([1.0, 0.0], dtype=DOUBLE).softmax(0)
    picture = alpha[0] * eye + alpha[1] * eye.roll(1, 0)
    wanted = sum(ops.clip_loss(a, b, logit_scale=2.0) for a, b in ((eye, eye), (eye, picture), (eye, picture)))
    assert torch.allclose(L.jma_loss(eye, eye, views, logit_scale=2.0), wanted, rtol=1e-12)


def test_view_embedding():
    torch.manual_seed(0)
    embed = nn.ViewEmbedding(6)
    views, degree, kind = torch.randn(2, 3, 6), torch.tensor([[0, 7, 29], [1, 1, 1]]), torch.tensor([0, 1, 1])
    wanted = F.layer_norm(views + embed.degree.weight[degree] + embed.kind.weight[kind][None], (6,))
    assert torch.allclose(embed(views, degree, kind), wanted)
    with pytest.raises(ValueError, match=r"ViewEmbedding: kind must be \[B, V\] = \[2, 3\] or \[V\], got a int64 tensor of shape \(2,\)"):
        embed(views, degree, kind[:2])
    with pytest.raises(TypeError, match="degree must be an int64 tensor"):
        embed(views, degree.float(), kind)
    with pytest.raises(ValueError, match=r"views must be \[B, V, D\] with D = 6"):
        embed(views[..., :5], degree, kind)


# -------------------------------------------------------------------------------------------------------------------------------------------- CLIM


@pytest.mark.parametrize("B", [29, 64])
@pytest.mark.parametrize("drawn", [False, True])
def test_clim_cell_shows_the_picture_at_its_place(B, drawn):
    """One colour channel for each picture: the mean of a cell is the one-hot colour of its picture, but for the pixels at its edge."""
    images = torch.eye(B)[:, :, None, None].expand(B, B, 48, 48)
    generator = torch.Generator().manual_seed(3) if drawn else None
    mosaics, boxes, order = L.clim_mosaic(images, generator=generator)
    rounds = B // 29
    assert mosaics.shape == (3 * rounds, B, 48, 48) and boxes.shape == (29 * rounds, 5)
    assert sorted(order.tolist()) == list(range(B)) and (order.tolist() != list(range(B))) == drawn
    cells = L.pool_cells(mosaics, boxes)
    assert (cells.argmax(1) == order[: len(boxes)]).all() and (cells.max(1).values > 0.85).all()
    at = 0
    for mosaic in range(len(mosaics)):  # row by row: cell (r, c) is picture r s + c of its group
        s = (2, 3, 4)[mosaic // rounds]
        for r in range(s):
            for c in range(s):
                centre = mosaics[mosaic, :, int((r + 0.5) * 48 / s), int((c + 0.5) * 48 / s)]
                assert centre.argmax() == order[at + r * s + c] and abs(centre.max() - 1) < 1e-5
        at += s * s
    together = torch.cat([cells, torch.eye(B)[order[len(boxes) :]]])  # features of cells and of single pictures
    assert L.clim_loss(together, torch.eye(B), order, logit_scale=50.0) < 1e-3


def test_clim_boxes_partition_the_square():
    _, boxes, _ = L.clim_mosaic(torch.zeros(58, 1, 8, 8))
    for mosaic in range(6):
        own = boxes[boxes[:, 0] == mosaic, 1:].double()
        assert len(own) == (4, 9, 16)[mosaic // 2]
        assert ((own[:, 2] - own[:, 0]) * (own[:, 3] - own[:, 1])).sum() == pytest.approx(1, abs=1e-6)
        points = torch.rand(50, 2, dtype=DOUBLE)
        inside = ((points[:, None] > own[:, :2]) & (points[:, None] < own[:, 2:])).all(2)
        assert (inside.sum(1) == 1).all()


def test_clim_without_mosaics_is_the_plain_loss():
    x, y = unit(9, 6), unit(9, 6)
    assert torch.equal(L.clim_loss(x, y, torch.arange(9), logit_scale=7.0), ops.clip_loss(x, y, logit_scale=7.0, normalize=True))
    leaves = x.clone().requires_grad_(), y.clone().requires_grad_()
    L.clim_loss(*leaves, torch.arange(9), logit_scale=7.0).backward()
    assert leaves[0].grad.abs().sum() > 0 and leaves[1].grad is None  # the text is frozen


def test_clim_needs_pictures_for_every_cell():
    with pytest.raises(ValueError, match=r"clim_mosaic: images must be a batch of at least 29, one picture for each cell of grids \(2, 3, 4\), got 28"):
        L.clim_mosaic(torch.zeros(28, 3, 8, 8))
    for dtype in (torch.float16, torch.bfloat16, DOUBLE):
        assert L.clim_mosaic(torch.rand(4, 3, 8, 8).to(dtype), grids=(2,)).mosaics.dtype is dtype


def pool_by_hand(features, box):
    """Every pixel with the part of it that the box covers."""
    m, (x0, y0, x1, y1) = int(box[0]), box[1:].double().clamp(0, 1).tolist()
    H, W = features.shape[2:]
    total, area = torch.zeros(features.shape[1], dtype=DOUBLE), 0.0
    for i in range(H):
        for j in range(W):
            part = max(0, min(y1 * H, i + 1) - max(y0 * H, i)) * max(0, min(x1 * W, j + 1) - max(x0 * W, j))
            total, area = total + part * features[m, :, i, j], area + part
    return total / area


def test_pool_cells_is_the_mean_over_the_box():
    torch.manual_seed(0)
    features, boxes = torch.randn(3, 4, 7, 5, dtype=DOUBLE), torch.rand(20, 5, dtype=DOUBLE)
    boxes = torch.cat([torch.randint(0, 3, (20, 1)).double(), boxes[:, :2] * 0.6, boxes[:, :2] * 0.6 + 0.05 + 0.3 * boxes[:, 2:4]], 1)
    boxes[0, 1:], boxes[1, 1:] = torch.tensor([0, 0, 1, 1]), torch.tensor([-0.5, -1, 2, 0.3])  # the whole map; what is outside is cut off
    found = L.pool_cells(features, boxes)
    assert torch.allclose(found, torch.stack([pool_by_hand(features, box) for box in boxes]), rtol=1e-10)
    assert torch.autograd.gradcheck(lambda f: L.pool_cells(f, boxes), [features[:, :1].clone().requires_grad_()])


def test_pool_cells_of_a_grid_that_divides_the_map_is_average_pooling():
    _, boxes, _ = L.clim_mosaic(torch.zeros(20, 1, 4, 4), grids=(2, 4))
    features = torch.randn(2, 5, 8, 8)
    wanted = [F.avg_pool2d(features[m : m + 1], 8 // s).flatten(2)[0].T for m, s in ((0, 2), (1, 4))]
    assert torch.allclose(L.pool_cells(features, boxes), torch.cat(wanted), atol=1e-6)


def test_pool_cells_at_its_edges():
    features = torch.randn(2, 3, 4, 4)
    flat = torch.tensor([[1, 0.5, 0, 0.5, 1.0], [0, 1.5, 0, 2.0, 1.0], [0, 0.7, 0, 0.2, 1.0]])  # no width, outside, turned round
    found = L.pool_cells(features.requires_grad_(), flat)
    assert (found == 0).all()
    found.sum().backward()
    assert (features.grad == 0).all()
    assert L.pool_cells(features.half(), flat).dtype is torch.float16
    with pytest.raises(ValueError, match="boxes must name maps from 0 to M - 1 = 1, got 2 to 2"):
        L.pool_cells(features, torch.tensor([[2.0, 0, 0, 1, 1]]))
    with pytest.raises(ValueError, match=r"boxes must be \[P, 5\]"):
        L.pool_cells(features, torch.zeros(2, 4))


# ------------------------------------------------------------------------------------------------------------------------------------------- ViLLA


def test_villa_attributes_of_every_picture_or_of_none_cost_nothing():
    regions, attributes = torch.randn(9, 6), torch.randn(2, 6)
    labels = torch.tensor([[True, False]]).expand(4, 2)  # all have the first, so it has no negatives; nobody has the second
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either
        loss, *grads = gradients(lambda r, a: L.villa_mapping_loss(r, OFFSETS, a, labels), [regions, attributes])
    assert loss == 0 and all((grad == 0).all() for grad in grads)
    assert L.villa_mapping_loss(regions, OFFSETS, attributes, torch.zeros(4, 2).bool()) == 0
    each = L.villa_mapping_loss(regions, OFFSETS, torch.randn(5, 6), LABELS, reduction="none")
    assert ((each > 0) == LABELS).all() and each.shape == (4, 5)


def test_villa_order_of_regions_does_not_matter_and_ties_share_nothing():
    regions, attributes = unit(9, 6), unit(5, 6)
    loss = L.villa_mapping_loss(regions, OFFSETS, attributes, LABELS)
    order = torch.cat([OFFSETS[i] + torch.randperm(int(n)) for i, n in enumerate(OFFSETS.diff())])
    assert torch.allclose(L.villa_mapping_loss(regions[order], OFFSETS, attributes, LABELS), loss, rtol=1e-12)
    regions[4] = regions[3]  # two equal regions of picture 2
    _, grad = gradients(lambda r: L.villa_mapping_loss(r, OFFSETS, regions[3:4], LABELS[:, 1:2]), [regions])
    assert grad[4].abs().max() == 0
    _, grad = gradients(lambda r: L.villa_mapping_loss(r, OFFSETS, attributes, LABELS), [regions])
    assert grad[4].abs().max() == 0 and grad.isfinite().all()


def test_villa_does_not_overflow():
    regions, attributes = torch.randn(9, 6), torch.randn(5, 6)
    for released in (False, True):
        options = {"temperature": 1e-3, "released": released}
        for value in gradients(lambda r, a, options=options: L.villa_mapping_loss(r, OFFSETS, a, LABELS, **options), [regions, attributes]):
            assert value.isfinite().all()
    regions[4, 0] = torch.nan
    assert L.villa_mapping_loss(regions, OFFSETS, attributes, LABELS).isnan()


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("margin", [0.2, 0.7, 2.5])
def test_villa_regions(heads, margin, monkeypatch):
    torch.manual_seed(0)
    regions, attributes = unit(5, 9, 4) if heads else unit(9, 4), unit(5, 4)
    wanted = []
    for i in range(4):
        for a in range(5):
            own = range(OFFSETS[i], OFFSETS[i + 1])
            score = {r: ((regions[a, r] if heads else regions[r]) @ attributes[a]).item() for r in own}
            wanted += [(r, a) for r in own if LABELS[i, a] and score[r] > max(score.values()) - margin]
    for panel in (1, 24, 1 << 22):
        monkeypatch.setattr(sys.modules["modalign.nn.functional.villa_regions"], "PANEL", panel)
        found = L.villa_regions(regions, OFFSETS, attributes, LABELS, margin=margin)
        assert list(zip(found.regions.tolist(), found.attributes.tolist(), strict=True)) == wanted
    assert {(r, a) for r, a in wanted}.issuperset({(OFFSETS[1].item(), 0), (OFFSETS[1].item(), 1)})  # the only region of picture 1
    none = L.villa_regions(regions, OFFSETS, attributes, torch.zeros_like(LABELS))
    assert none.regions.shape == none.attributes.shape == (0,)


# ------------------------------------------------------------------------------------------------------------------------------------------ LexVLA


@pytest.mark.parametrize("padded", [False, True])
def test_lexical_head_is_the_largest_activation_of_the_tokens(padded):
    torch.manual_seed(0)
    head, x = nn.LexicalHead(torch.randn(11, 6, dtype=DOUBLE)), torch.randn(4, 5, 6, dtype=DOUBLE)
    mask = WORD_MASK if padded else torch.ones(4, 5).bool()
    products = (x @ head.codebook.mT).masked_fill(~mask[..., None], -torch.inf)
    wanted = products.amax(1).relu()
    dirty = x.masked_fill(~mask[..., None], torch.nan).requires_grad_()
    found = head(dirty, mask if padded else None)
    assert torch.allclose(found, wanted, rtol=1e-12) and (found >= 0).all()
    upstream = torch.randn(4, 11, dtype=DOUBLE)
    mine, plain = x.clone().requires_grad_(), torch.autograd.grad(wanted, head.codebook, upstream)[0]
    found.backward(upstream)
    assert torch.allclose(head.codebook.grad, plain, rtol=1e-10) and (dirty.grad[~mask] == 0).all()
    ((mine @ head.codebook.detach().mT).masked_fill(~mask[..., None], -torch.inf).amax(1).relu() * upstream).sum().backward()
    assert torch.allclose(dirty.grad[mask], mine.grad[mask], rtol=1e-10)


def test_lexical_head_sparsifies_outside_training():
    torch.manual_seed(0)
    head, x = nn.LexicalHead(torch.randn(30, 6), top_k=4), torch.randn(3, 5, 6)
    assert ((head(x) > 0).sum(1) > 4).all()
    kept = head.eval()(x)
    assert ((kept > 0).sum(1) == 4).all() and torch.equal(kept, L.keep_largest(head.train()(x), 4))
    assert torch.allclose(head(x[:, 0]), (x[:, 0] @ head.codebook.T).relu(), atol=1e-6)
    nobody = torch.zeros(3, 5).bool()
    assert (head(x, nobody) == 0).all()
    assert not nn.LexicalHead(torch.eye(3), learnable=False)(torch.eye(3)).requires_grad  # the text's codebook is frozen
    codebook = torch.eye(3)
    assert nn.LexicalHead(codebook).codebook.data_ptr() != codebook.data_ptr()


def test_overuse_of_words():
    eye = torch.eye(8, dtype=DOUBLE)
    for B in (1, 3, 8):
        assert L.overuse_penalty(eye[:B]) == pytest.approx(8 / B)  # a word of its own for each
        assert L.overuse_penalty(eye[:1].expand(B, 8)) == pytest.approx(8)  # the same word for all
    assert L.overuse_penalty(torch.ones(4, 8)) == pytest.approx(1)  # all words alike
    lexical, sizes = torch.rand(5, 8, dtype=DOUBLE), torch.tensor([1e-3, 1.0, 7.0, 1e5, 0.2], dtype=DOUBLE)[:, None]
    assert torch.allclose(L.overuse_penalty(sizes * lexical), L.overuse_penalty(lexical), rtol=1e-12)
    with_nothing = torch.cat([lexical, torch.zeros(2, 8, dtype=DOUBLE)])
    loss, grad = gradients(L.overuse_penalty, [with_nothing])
    assert torch.allclose(loss, L.overuse_penalty(lexical), rtol=1e-12) and (grad[5:] == 0).all()
    for tiny in (0.0, 1e-40, 1e-30, 1e-25, 1e-19, 1e-18):
        for value in gradients(L.overuse_penalty, [torch.full((2, 3), tiny)]):
            assert value.isfinite().all()
    assert L.overuse_penalty(torch.tensor([[torch.nan, 1.0]])).isnan()
    assert L.flops_penalty(2 * lexical) == pytest.approx(4 * L.flops_penalty(lexical).item())  # which the FLOPs penalty would gain from


def test_keep_largest():
    x = torch.tensor([[1.0, 3.0, 3.0, 3.0, -1.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert L.keep_largest(x, 2).tolist() == [[0, 3, 3, 0, 0], [0, 0, 0, 0, 0]]
    assert torch.equal(L.keep_largest(x, 5), x)
    _, grad = gradients(lambda t: L.keep_largest(t, 2).sum(), [x])
    assert grad.tolist() == [[0, 1, 1, 0, 0], [1, 1, 0, 0, 0]]  # of equal ones the first


# ----------------------------------------------------------------------------------------------------------------------------------------- CLIP4DM


def text_encoder(layers, x, weights, end, heads, perturb=None):
    """A small causal transformer without anything but attention, which keeps its attention, values and outputs by head. perturb: a factor for the end row
    of every attention."""
    kept = []
    B, T, D = x.shape
    hidden = torch.ones(T, T).triu(1).bool()
    rows = torch.arange(B)
    for q, k, v, o in weights[:layers]:
        split = [(x @ w).unflatten(-1, (heads, -1)).transpose(1, 2) for w in (q, k, v)]
        attention = (split[0] @ split[1].mT).masked_fill(hidden, -torch.inf).softmax(-1)
        if perturb is not None:
            factor = torch.ones(B, 1, T, 1, dtype=x.dtype).index_put((rows, torch.zeros_like(rows), end, torch.zeros_like(rows)), perturb)
            attention = attention * factor
        attention.retain_grad() if attention.requires_grad else None
        out = attention @ split[2]
        out.retain_grad() if out.requires_grad else None
        kept.append((attention, split[2], out))
        x = x + out.transpose(1, 2).flatten(2) @ o
    return x[rows, end], kept


def clip4dm_setting(layers=3, B=2, T=7, D=12, heads=3):
    torch.manual_seed(0)
    weights = [[0.4 * torch.randn(D, D, dtype=DOUBLE, requires_grad=True) for _ in range(4)] for _ in range(layers)]
    return torch.randn(B, T, D, dtype=DOUBLE), weights, torch.tensor([6, 4]), heads, unit(B, D)


def attribution(kept, end):
    rows = torch.arange(len(end))
    return metrics.clip4dm_attribution(
        torch.stack([a[rows, :, end] for a, _, _ in kept]), torch.stack([v for _, v, _ in kept]), torch.stack([o.grad[rows, :, end] for _, _, o in kept]), end
    )


def test_attribution_is_attention_times_its_gradient():
    x, weights, end, heads, picture = clip4dm_setting()
    text, kept = text_encoder(3, x, weights, end, heads)
    F.cosine_similarity(text, picture).sum().backward()
    found = attribution(kept, end)
    for b in range(2):
        relevance = torch.stack([(a.grad[b] * a[b]).mean(0) for a, _, _ in kept]).mean(0).detach()  # no ReLU
        wanted = torch.zeros(7, dtype=DOUBLE)
        wanted[1 : end[b]] = relevance[end[b], 1 : end[b]]
        assert torch.allclose(found[b], wanted, rtol=1e-10, atol=1e-14)
    assert (found < 0).any() and (found > 0).any() and (found[1, 4:] == 0).all() and (found[:, 0] == 0).all()


def test_attribution_adds_up_to_a_directional_derivative():
    """Scaling the end token's row of attention in all layers changes y by the sum over t of all layers' scores."""
    x, weights, end, heads, picture = clip4dm_setting()
    one = torch.ones(2, dtype=DOUBLE, requires_grad=True)
    text, kept = text_encoder(3, x, weights, end, heads, perturb=one)
    F.cosine_similarity(text, picture).sum().backward()
    for layer in range(3):
        kept[layer][0].detach_()
    rows = torch.arange(2)
    terms = [metrics.clip4dm_attribution(a[rows, :, end][None], v[None], o.grad[rows, :, end][None], end) for a, v, o in kept]
    # with tokens 0 and e, which are no words
    ends = [(a[rows, :, end] * (v @ o.grad[rows, :, end][..., None]).squeeze(-1)).mean(1).detach() for a, v, o in kept]
    for term, whole in zip(terms, ends, strict=True):
        for b in range(2):
            assert torch.allclose(term[b, 1 : end[b]], whole[b, 1 : end[b]], rtol=1e-12)
    assert torch.allclose(heads * sum(whole.sum(1) for whole in ends), one.grad, rtol=1e-9)


def test_attribution_of_one_linear_layer_in_closed_form():
    attention, value, end = torch.rand(1, 1, 1, 5, dtype=DOUBLE), torch.randn(1, 1, 1, 5, 3, dtype=DOUBLE), torch.tensor([4])
    direction = torch.randn(3, dtype=DOUBLE)  # y = direction . O[e], so token t adds A[e, t] direction . v_t
    found = metrics.clip4dm_attribution(attention, value, direction[None, None, None], end)[0]
    wanted = attention[0, 0, 0] * (value[0, 0, 0] @ direction)
    assert torch.allclose(found[1:4], wanted[1:4]) and found[0] == 0 and found[4] == 0
    rounded = metrics.clip4dm_attribution(attention.half(), value.half(), (1e-6 * direction)[None, None, None].half(), end)
    assert rounded.dtype is torch.float32


def test_words_of_pieces_reassemble():
    pieces = ["<|startoftext|>", "A</w>", "photo</w>", "depicts</w>", "a</w>", "ca", "pyb", "ara</w>", "'s</w>", ",</w>", "hat</w>", "...</w>", "<|endoftext|>"]
    words, index = metrics.caption_words(pieces)
    assert words == ["a", "capybara", "'s", "hat"]
    assert index == [-1, -1, -1, -1, 0, 1, 1, 1, 2, -1, 3, -1, -1]
    for number, word in enumerate(words):
        assert "".join(piece for piece, at in zip(pieces, index, strict=True) if at == number).replace("</w>", "") == word
    assert metrics.caption_words(["red</w>", "-</w>"], prefix="") == (["red"], [0, -1])
    assert metrics.caption_words([], prefix="") == ([], [])
    with pytest.raises(ValueError, match="pieces must begin with the prefix 'A photo depicts', got 'a dog'"):
        metrics.caption_words(["a</w>", "dog</w>"])


def test_misaligned_words_and_f_clipscore():
    """The published example: "a cup of coke" on a picture of coffee."""
    scores = torch.tensor([[0.0, 2.1e-4, -3e-5, -4.44e-4], [1.4e-4, 1e-5, torch.nan, torch.nan]])
    assert metrics.misaligned_words(scores).tolist() == [[False, False, False, True], [False] * 4]
    assert metrics.misaligned_words(scores, mode="most_negative").tolist() == [[False, False, False, True], [False, True, False, False]]
    assert metrics.misaligned_words(torch.full((1, 3), torch.nan), mode="most_negative").tolist() == [[False] * 3]
    assert metrics.misaligned_words(torch.tensor([[-1.0, -1.0]]), mode="most_negative").tolist() == [[True, False]]
    cosine = torch.tensor([0.5246, 0.6885]) / 2.5
    assert torch.allclose(metrics.clip_score(cosine), torch.tensor([0.5246, 0.6885]))
    found = metrics.f_clipscore(cosine, scores)
    assert found[0] == pytest.approx(-4.44e-4 * (1 - 0.5246 / 2.5)) and found[1] == 0
    assert metrics.f_clipscore(torch.tensor([-0.5]), scores[:1])[0] == pytest.approx(-4.44e-4)  # a negative cosine counts as 0
    means = metrics.word_attribution(torch.tensor([[5.0, 1.0, 3.0, -2.0], [5.0, -4.0, 5.0, 5.0]]), torch.tensor([[-1, 0, 0, 1], [-1, 0, -1, -1]]))
    assert means[0].tolist() == [2, -2] and means[1, 0] == -4 and means[1, 1].isnan()
    assert metrics.word_attribution(torch.ones(2, 3), torch.full((2, 3), -1)).shape == (2, 0)


# --------------------------------------------------------------------------------------------------------------------------------- linear alignment


def fit(x, y, method, standardize=False, **options):
    given = {key: options.pop(key) for key in ("ridge", "rounds", "epsilon") if key in options}
    return LinearAlignment.fit(x, y, LinearAlignmentConfig(method=method, standardize=standardize, **given), **options)


def test_least_squares_recovers_a_linear_map():
    torch.manual_seed(0)
    x, w = torch.randn(60, 7, dtype=DOUBLE) * torch.linspace(0.1, 9, 7) + 3, torch.randn(7, 4, dtype=DOUBLE)
    assert torch.allclose(fit(x, x @ w, "ols").weight, w.float(), atol=1e-5)
    model = fit(x, x @ w - 5, "ols", standardize=True)  # standardised, so an offset does not matter
    assert torch.allclose(model(x), (x @ w - 5).float(), atol=1e-4)
    y = torch.randn(60, 4, dtype=DOUBLE)
    model = fit(x, y, "ols")
    assert torch.allclose(model.weight, torch.linalg.lstsq(x, y).solution.float(), atol=1e-5)
    assert (x.T @ (y - x @ model.weight.double())).abs().max() < 1e-3  # the residual is orthogonal to the source; weights are float32


def test_ridge_shrinks_and_ends_in_least_squares():
    torch.manual_seed(0)
    x, y = torch.randn(40, 6, dtype=DOUBLE), torch.randn(40, 3, dtype=DOUBLE)
    ols = fit(x, y, "ols").weight
    assert torch.allclose(fit(x, y, "ridge", ridge=1e-9).weight, ols, atol=1e-6)
    wanted = torch.linalg.solve(x.T @ x + torch.eye(6, dtype=DOUBLE), x.T @ y)
    assert torch.allclose(fit(x, y, "ridge").weight, wanted.float(), atol=1e-6)  # 1 as published
    assert fit(x, y, "ridge", ridge=100.0).weight.norm() < wanted.norm() < ols.norm()


@pytest.mark.parametrize("method", ["procrustes", "robust_procrustes"])
def test_procrustes_recovers_a_rotation_and_is_semi_orthogonal(method):
    torch.manual_seed(0)
    x, q = torch.randn(50, 6, dtype=DOUBLE), torch.linalg.qr(torch.randn(6, 6, dtype=DOUBLE)).Q
    assert torch.allclose(fit(x, 3 * x @ q, method).weight, q.float(), atol=1e-6)
    wide, narrow = fit(torch.randn(50, 6), torch.randn(50, 4), method).weight, fit(torch.randn(50, 4), torch.randn(50, 6), method).weight
    assert torch.allclose(wide.T @ wide, torch.eye(4), atol=1e-5)
    assert torch.allclose(narrow @ narrow.T, torch.eye(4), atol=1e-5)


def test_robust_procrustes_leaves_outliers_behind():
    torch.manual_seed(0)
    x, q = torch.randn(80, 5, dtype=DOUBLE), torch.linalg.qr(torch.randn(5, 5, dtype=DOUBLE)).Q
    y = x @ q
    y[:12] = 6 * torch.randn(12, 5, dtype=DOUBLE)
    plain, robust = ((fit(x, y, method).weight - q).norm() for method in ("procrustes", "robust_procrustes"))
    assert robust < plain / 10

    def by_hand(w):
        weight = 1 / ((y - x @ w).norm(dim=1) + 1e-3)
        root = (weight / weight.max()).sqrt()[:, None]
        u, _, vh = torch.linalg.svd((root * x).T @ (root * y))
        return u @ vh

    w = fit(x, y, "procrustes").weight.double()
    for _ in range(5):
        w = by_hand(w)
    assert torch.allclose(fit(x, y, "robust_procrustes").weight, w.float(), atol=1e-5)
    # equal residuals: nothing to weigh
    axes = torch.eye(4, dtype=DOUBLE).roll(1, 0)
    assert torch.allclose(fit(torch.eye(4, dtype=DOUBLE), 2 * axes, "robust_procrustes").weight, fit(torch.eye(4, dtype=DOUBLE), 2 * axes, "procrustes").weight)


@pytest.mark.parametrize("method", ["ols", "ridge", "procrustes", "robust_procrustes"])
def test_pairs_are_repeated_rows_and_chunks_do_not_matter(method):
    torch.manual_seed(0)
    source, target = torch.randn(9, 4), torch.randn(30, 3)
    pairs = torch.stack([torch.randint(0, 9, (70,)), torch.randint(0, 30, (70,))], 1)
    written_out = fit(source[pairs[:, 0]], target[pairs[:, 1]], method, standardize=True)
    for chunk in (1, 7, 1000):
        found = fit(source, target, method, standardize=True, pairs=pairs, chunk=chunk)
        assert torch.allclose(found.weight, written_out.weight, atol=1e-6)
        assert torch.allclose(found(source), written_out(source), atol=1e-5)


def test_standardised_columns():
    torch.manual_seed(0)
    x, y = torch.randn(37, 4, dtype=DOUBLE) * 5 + 100, torch.randn(37, 3, dtype=DOUBLE)
    x[:, 2], y[:, 1] = 0.1, 0.7  # constant: standard deviation 0, though their means are rounded
    assert x.sum(0)[2] / 37 != x[0, 2]
    for method in ("ols", "ridge", "procrustes", "robust_procrustes"):
        model = fit(x, y, method, standardize=True)
        assert model.weight.isfinite().all() and (model.std[0] == 0).tolist() == [False, False, True, False]
        assert torch.allclose(model.std[0][0], x[:, 0].std(correction=0).float(), rtol=1e-4)  # of the population
        mapped = model(x)
        assert mapped.isfinite().all() and torch.allclose(mapped[:, 1], torch.full((37,), 0.7))
        other = x.clone()
        other[:, 2] = 55.0
        assert torch.equal(model(other), mapped)  # a column that told nothing tells nothing


def test_fewer_pairs_than_columns_have_the_smallest_map():
    torch.manual_seed(0)
    x, y = torch.randn(4, 9, dtype=DOUBLE), torch.randn(4, 3, dtype=DOUBLE)
    model = fit(x, y, "ols")
    assert torch.allclose(model.weight, (torch.linalg.pinv(x) @ y).float(), atol=1e-5)
    assert torch.allclose(model(x), y.float(), atol=1e-4)


def test_nearest_tokens():
    torch.manual_seed(0)
    x, table = torch.randn(40, 6), torch.randn(500, 6)
    model = fit(x, x.roll(1, 1), "procrustes")
    found = model.nearest_tokens(x, table)
    cosines = F.normalize(model(x), dim=1) @ F.normalize(table, dim=1).T
    assert torch.equal(found.indices, cosines.topk(8, dim=1).indices) and torch.allclose(found.values, cosines.topk(8, dim=1).values, atol=1e-6)
    same = model.nearest_tokens(x[:2], table[:1].expand(20, 6), 3)
    assert same.indices.tolist() == [[0, 1, 2]] * 2  # equal ones by index


# ------------------------------------------------------------------------------------------------------------------------------------ OneEncoder, FUSION


def test_universal_projection_grows_without_moving():
    torch.manual_seed(0)
    model = nn.UniversalProjection({"image": 10, "text": 6}, width=16)
    image, text, sound = torch.randn(3, 5, 10), torch.randn(3, 4, 6), torch.randn(3, 7, 8)
    model("image", image).square().sum().backward()
    model.add_modality("audio", 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.eval()
    old = model("image", image), model("text", text)
    model.train()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(name.startswith(("heads.audio.", "tokens.audio.")) for name in trained)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        ops.clip_loss(model("audio", sound), model("text", text), logit_scale=model.logit_scale).backward()
        assert all((parameter.grad is not None) == (name in trained) for name, parameter in model.named_parameters())
        optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in trained), name
    model.eval()
    assert torch.equal(model("image", image), old[0]) and torch.equal(model("text", text), old[1])
    assert torch.equal(model("audio", sound), model("audio", sound))
    assert model.logit_scale == pytest.approx(12.18, abs=0.01)


@pytest.mark.parametrize("fusion", ["addition", "multiplication"])
def test_universal_projection_is_its_formula(fusion):
    torch.manual_seed(0)
    model = nn.UniversalProjection({"image": 6}, width=8, heads=2, fusion=fusion).double().eval()
    x = torch.randn(2, 5, 6, dtype=DOUBLE)
    head, token = model.heads["image"], model.tokens["image"]
    first = head.first(x)
    h, t = head.norm(first + head.second(F.gelu(first))), token.map(token.token)
    fused = h + t if fusion == "addition" else h * t
    wanted = F.normalize((model.layers[0](model.norm(fused)) + fused).mean(1), dim=-1)
    assert torch.allclose(model("image", x), wanted, rtol=1e-10)


@pytest.mark.parametrize("training", [False, True])
def test_universal_projection_padding_is_never_read(training):
    torch.manual_seed(0)
    model = nn.UniversalProjection({"text": 6}, width=8, heads=2, dropout=0.0).train(training)
    x, mask = torch.randn(3, 4, 6), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    dirty = x.masked_fill(~mask[..., None], torch.nan).requires_grad_()
    found = model("text", dirty, mask)
    assert torch.allclose(found[1], model("text", x[1:2, :2])[0], atol=1e-6) and torch.allclose(found[0], model("text", x[:1])[0], atol=1e-6)
    assert (found[2] == 0).all()
    found.square().sum().backward()
    assert dirty.grad.isfinite().all() and (dirty.grad[~mask] == 0).all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_dual_semantic_mapping():
    torch.manual_seed(0)
    projector, back = torch.nn.Linear(5, 6).double(), torch.nn.Linear(6, 4).double()
    loss = nn.DualSemanticMapping(projector, back)
    e_v, f_v, e_q, f_q = (torch.randn(2, n, d, dtype=DOUBLE) for n, d in ((3, 4), (3, 5), (4, 6), (4, 5)))
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    far = [1 - F.cosine_similarity(a, b, dim=0) for a, b in zip(e_q[mask], projector(f_q[mask]), strict=True)]
    wanted = 0.1 * ((1 - F.cosine_similarity(e_v, back(projector(f_v)), dim=-1)).mean() + sum(far) / 5)
    assert torch.allclose(loss(e_v, f_v, e_q, f_q, mask), wanted, rtol=1e-12)
    dirty = [t.masked_fill(~mask[..., None], torch.nan) for t in (e_q, f_q)]
    value, *grads = gradients(lambda a, b: loss(e_v, f_v, a, b, mask), dirty)
    assert torch.allclose(value, wanted, rtol=1e-12) and all(grad.isfinite().all() for grad in grads)
    nothing, *grads = gradients(lambda a, b: loss(e_v, f_v, a, b, torch.zeros_like(mask)), dirty)
    assert nothing.isfinite() and all((grad == 0).all() for grad in grads)
    zero = gradients(lambda a: loss(a, f_v, e_q, f_q), [torch.zeros_like(e_v)])
    assert zero[1].abs().max() == 0  # a zero vector has cosine 0 and no gradient
    # nothing is lost where each side is already the other's image
    perfect = nn.DualSemanticMapping(torch.nn.Identity(), torch.nn.Identity(), weight=1.0)
    assert perfect(e_v, 2 * e_v, e_q, 5 * e_q).abs() < 1e-12
    with pytest.raises(ValueError, match=r"question_mask must be bool \[B, L\] = \[2, 4\]"):
        loss(e_v, f_v, e_q, f_q, mask.float())
    with pytest.raises(ValueError, match="patch_features must be"):
        loss(e_v, f_v[:, :2], e_q, f_q)
    with pytest.raises(ValueError, match="question_features must be"):
        loss(e_v, f_v, e_q, f_q[:, :2])


# ------------------------------------------------------------------------------------------------------------------------------------------- memory


def memory_problem(name, size):
    """What a plain formula would store: products of all tokens with all words, or of all regions with all attributes."""
    if name == "lexical head":
        head = nn.LexicalHead(torch.randn(size, 32))
        small, x = torch.randn(1, 3, 32), torch.randn(8, 128, 32)
        return (lambda: head(x).sum().backward()), (lambda: head(small).sum().backward())
    labels, offsets = torch.rand(16, size) < 0.05, torch.arange(17) * 128
    attributes, regions = torch.randn(size, 32), torch.randn(2048, 32, requires_grad=True)

    def step(count):
        L.villa_mapping_loss(regions[: 128 * count], offsets[: count + 1], attributes, labels[:count]).backward()

    return (lambda: step(16)), (lambda: step(1))


@pytest.mark.parametrize("name, products", [("lexical head", 8 * 128 * 4), ("villa", 2048 * 4)])
def test_products_are_not_stored(name, products):
    size = 16384
    assert 3 * peak_memory("test_paper_losses_2:memory_problem", name=name, size=size, threads=1).peak < products * size


# ---------------------------------------------------------------------------------------------------------------------------------------- bad input

X, T = torch.randn(4, 3), torch.randn(4, 2, 3)


def attribute(value=(1, 2, 3, 4, 6), gradient=(1, 2, 3, 6), end=(1, 1)):
    return metrics.clip4dm_attribution(torch.rand(1, 2, 3, 4), torch.rand(value), torch.rand(gradient), torch.tensor(end))


ONE = torch.ones(1, 4).bool()
BAD = [
    (lambda: L.mgca_token_loss(X, T), ValueError, r"mgca_token_loss: words must have 3 dimensions \[B, L, D\], got"),
    (lambda: L.mgca_token_loss(T, T[..., :2]), ValueError, r"mgca_token_loss: patches must be \[B, N, D\] with D = 3 as words has it, got"),
    (lambda: L.mgca_token_loss(T[:, :0], T), ValueError, "mgca_token_loss: words must hold at least one token"),
    (lambda: L.mgca_token_loss(T, T, word_mask=torch.ones(4, 3).bool()), ValueError, r"mgca_token_loss: word_mask must be \[B, L\] = \[4, 2\]"),
    (lambda: L.mgca_token_loss(T, T, patch_weights=-torch.ones(4, 2)), ValueError, "mgca_token_loss: patch_weights must not hold negative values, got -1.0"),
    (lambda: L.mgca_token_loss(T, T, patch_weights=torch.ones(4, 3)), ValueError, r"mgca_token_loss: patch_weights must be \[B, N\] = \[4, 2\]"),
    (lambda: L.mgca_token_loss(T, T, temperature=0.0), ValueError, "mgca_token_loss: temperature must be positive and finite, got 0.0"),
    (lambda: L.log_sinkhorn(X, epsilon=0.0), ValueError, "log_sinkhorn: epsilon must be a positive number, got float 0.0"),
    (lambda: L.log_sinkhorn(X, iterations=0), ValueError, "log_sinkhorn: iterations must be a whole number of at least 1, got int 0"),
    (lambda: L.prototype_alignment_loss(X, X, X[:, :2]), ValueError, r"prototype_alignment_loss: prototypes must be \[K, D\] with D = 3"),
    (lambda: L.prototype_alignment_loss(X, X, X, process_group=3), ValueError, "prototype_alignment_loss|log_sinkhorn: process_group must be None"),
    (lambda: nn.PrototypeAlignment(0), ValueError, "PrototypeAlignment: width must be a whole number of at least 1, got 0"),
    (lambda: L.jma_loss(X, X, T[:, :0]), ValueError, "jma_loss: views must hold at least one view of each object, got"),
    (lambda: L.jma_loss(X, X, T, enhanced=T[:, :1]), ValueError, r"jma_loss: enhanced must be \[B, V, D\] with V = 2 as views has it"),
    (lambda: L.jma_loss(X, X, T, reduction="median"), ValueError, "jma_loss: reduction must be"),
    (lambda: L.clim_mosaic(torch.zeros(4, 3, 8)), ValueError, "clim_mosaic: images must have"),
    (lambda: L.clim_mosaic(torch.zeros(4, 3, 8, 8), grids=(0,)), ValueError, r"clim_mosaic: grids must be whole numbers of at least 1, got \(0,\)"),
    (lambda: L.clim_loss(X, X, torch.tensor([0, 1, 2, 2]), logit_scale=1.0), ValueError, r"clim_loss: order must hold each of 0 to B - 1 = 3 once, got \[0,"),
    (lambda: L.clim_loss(X, X, torch.arange(4).int(), logit_scale=1.0), TypeError, "clim_loss: order must be an int64 tensor"),
    (lambda: L.villa_mapping_loss(X, torch.tensor([0, 4, 4]), X, torch.ones(2, 4).bool()), ValueError, "offsets must rise from 0 to R = 4 with"),
    (lambda: L.villa_mapping_loss(X, torch.tensor([0, 2]), X, torch.ones(2, 4).bool()), ValueError, r"villa_mapping_loss: offsets must be \[S \+ 1\] = \[3\]"),
    (lambda: L.villa_mapping_loss(X, torch.tensor([0, 4]), X, torch.ones(1, 4)), TypeError, "villa_mapping_loss: labels must be a bool tensor"),
    (lambda: L.villa_mapping_loss(T, torch.tensor([0, 2]), X[:3], torch.ones(1, 3).bool()), ValueError, r"attributes must be \[A, D\] with A = 4"),
    (lambda: L.villa_regions(X, torch.tensor([0, 3]), X, ONE), ValueError, r"villa_regions: offsets must rise from 0 to R = 4 .*, got \[0, 3\]"),
    (lambda: L.villa_regions(X, torch.tensor([0, 4]), X, ONE, margin=0.0), ValueError, "villa_regions: margin must be a positive number"),
    (lambda: nn.LexicalHead(X, top_k=5), ValueError, "LexicalHead: top_k must be None or from 1 to V = 4, got 5"),
    (lambda: nn.LexicalHead(X)(T[..., :2]), ValueError, r"LexicalHead: features must be \[B, D\] or \[B, N, D\] with D = 3"),
    (lambda: nn.LexicalHead(X)(T, torch.ones(4, 3).bool()), ValueError, r"LexicalHead: mask must be bool \[B, N\]"),
    (lambda: L.overuse_penalty(X - 9), ValueError, "overuse_penalty: lexical must not hold negative values, got"),
    (lambda: L.flops_penalty(X.long()), TypeError, "flops_penalty: lexical must be float16"),
    (lambda: L.keep_largest(X, 0), ValueError, "keep_largest: k must be a whole number from 1 to V = 3, got int 0"),
    (lambda: attribute(value=(1, 2, 3, 5, 6)), ValueError, r"clip4dm_attribution: value must be \[S, B, H, L, E\] with \[S, B, H, L\] = \[1, 2, 3, 4\]"),
    (lambda: attribute(gradient=(1, 2, 2, 6)), ValueError, r"clip4dm_attribution: output_gradient must be \[S, B, H, E\] with \[S, B, H\] = \[1, 2, 3\]"),
    (lambda: attribute(end=(4, 1)), ValueError, r"clip4dm_attribution: end must hold positions from 0 to L - 1 = 3, got \[4, 1\]"),
    (lambda: metrics.word_attribution(X, torch.zeros(4, 3)), TypeError, "word_attribution: words must be an int64 tensor"),
    (lambda: metrics.misaligned_words(X, mode="all"), ValueError, "misaligned_words: mode must be"),
    (lambda: metrics.f_clipscore(X[:3, 0], X), ValueError, r"f_clipscore: cosine must be a floating-point tensor \[B\] = \[4\]"),
    (lambda: metrics.f_clipscore(X[:, 0], X, threshold=0.1), ValueError, "f_clipscore: threshold must be at most 0, got 0.1"),
    (lambda: LinearAlignmentConfig(method="lasso"), ValueError, "method must be one of ols, ridge, procrustes, robust_procrustes, got 'lasso'"),
    (lambda: LinearAlignment.fit(X, X[:3]), ValueError, "source and target must have equally many rows where pairs is not given, got 4 and 3"),
    (lambda: LinearAlignment.fit(X * torch.nan, X), ValueError, "source must be finite, got a NaN or an Inf"),
    (lambda: LinearAlignment.fit(X, X, pairs=torch.tensor([[0, 4]])), ValueError, "pairs must name rows of source, 0 to 3, and of target, 0 to 3"),
    (lambda: LinearAlignment.fit(X, X).nearest_tokens(X, X, 5), ValueError, "k must be from 1 to V = 4, got 5"),
    (lambda: nn.UniversalProjection({"a": 3}, width=8)("b", T), ValueError, r"UniversalProjection: name must be one of \['a'\], got 'b'"),
    (lambda: nn.UniversalProjection({"a": 3}, width=8).add_modality("a", 3), ValueError, "name must be that of a new modality, got 'a' again"),
    (lambda: nn.UniversalProjection({"a": 3}, width=6), ValueError, "width must be a multiple of heads"),
    (lambda: nn.UniversalProjection({"a": 3}, fusion="luong"), ValueError, 'fusion must be "addition" or "multiplication"'),
    (lambda: nn.UniversalProjection({"keys": 3}), ValueError, "name must not have a '.' in it or be one that torch keeps for itself"),
    (lambda: nn.UniversalProjection({"a": 4}, width=8)("a", T), ValueError, r"tokens of 'a' must be \[B, N, 4\]"),
    (lambda: nn.UniversalProjection({"a": 3}, width=8)("a", T, torch.ones(4, 2)), ValueError, r"mask must be bool \[B, N\] = \[4, 2\]"),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=[message[:60] for _, _, message in BAD])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
