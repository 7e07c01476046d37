"""The pairwise and multi-way losses of the papers: against float64 formulas that store everything, and the oracles of each."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from modalign import nn, ops
from modalign.nn import functional as L
from modalign.nn.functional import _features
from modalign.nn.functional.pmrl_loss import singular_directions
from ranks import run_ranks


def unit(*shape, dtype=torch.float64):
    return F.normalize(torch.randn(*shape, dtype=dtype), dim=-1)


def gradients(function, leaves):
    fresh = [leaf.clone().requires_grad_() for leaf in leaves]
    result = function(*fresh)
    return [result.detach(), *torch.autograd.grad(result, fresh)]


def normalized(*tensors):
    return [F.normalize(tensor, dim=-1) for tensor in tensors]


def entropy(logits):
    return F.cross_entropy(logits, torch.arange(len(logits)))


def two_entropies(x, y, scale):
    x, y = normalized(x, y)
    return (entropy(scale * x @ y.T) + entropy(scale * y @ x.T)) / 2


# ------------------------------------------------------------------------------------------------------------- every loss against its formula


IDS, PICTURES = torch.tensor([4, 4, 1, 7, 4]), torch.tensor([0, 0, 1, 2, 3])
WORDS = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 1, 1], [1, 1, 1]]).bool()


def dense_sdm(x, y, tau, images):
    x, y = normalized(x, y)
    same = (IDS[:, None] == IDS).to(x)
    label = same if images is None else 0.3 * same + 0.7 * (images[:, None] == images).to(x)
    q = label / label.sum(1, keepdim=True)
    p = [(z / tau).softmax(1) for z in (x @ y.T, y @ x.T)]
    return sum((one * (one.log() - (q + 1e-8).log())).sum(1).mean() for one in p)


def dense_id(x, y, weight, bias):
    return (F.cross_entropy(x @ weight.T + bias, IDS) + F.cross_entropy(y @ weight.T + bias, IDS)) / 2


def dense_cma(x, x_keys, y_keys, tau, alpha, queue):
    x, x_keys, y_keys = normalized(x, x_keys, y_keys)
    keys = torch.cat([y_keys, queue]).detach()
    target = alpha * (x_keys.detach() @ keys.T / tau.detach()).softmax(1) + (1 - alpha) * torch.eye(len(x), len(keys), dtype=x.dtype)
    return -(target * (x @ keys.T / tau).log_softmax(1)).sum(1).mean()


def dense_lmi(x, parts, tau, mask):
    """Each part of each sample with the list of its negatives, one by one."""
    x, parts = normalized(x, parts.detach())
    per_sample = []
    for i in range(len(x)):
        if not mask[i].any():
            continue
        others = [parts[j, n] @ x[i] / tau for j in range(len(x)) if j != i for n in range(mask.shape[1]) if mask[j, n]]
        terms = []
        for n in range(mask.shape[1]):
            if mask[i, n]:
                own = parts[i, n] @ x[i] / tau
                terms.append(torch.stack([own, *others]).logsumexp(0) - own)
        per_sample.append(torch.stack(terms).mean())
    return torch.stack(per_sample).mean()


def dense_tcl(image, text, tau, image_keys, text_keys, image_parts, text_parts, image_queue, text_queue):
    everything = torch.ones(image_parts.shape[:2], dtype=torch.bool)
    return (
        dense_cma(image, image_keys, text_keys, tau, 0.4, text_queue)
        + dense_cma(text, text_keys, image_keys, tau, 0.4, image_queue)
        + dense_cma(image, image_keys, image_keys, tau, 0.0, image_queue)
        + dense_cma(text, text_keys, text_keys, tau, 0.0, text_queue)
        + dense_lmi(image, image_parts, tau, everything)
        + dense_lmi(text, text_parts, tau, WORDS)
    ) / 6


def dense_hard(queries, targets, negatives, tau):
    queries, targets, negatives = normalized(queries, targets, negatives)
    own = torch.where(WORDS, torch.einsum("bd,bhd->bh", queries, negatives) / tau, -torch.inf)
    return entropy(torch.cat([queries @ targets.T / tau, own], 1))


def dense_symile(vectors, scale, orders=None):
    """orders: the shuffle of each other modality for each anchor; None: all tuples."""
    vectors, B, losses = normalized(*vectors), len(vectors[0]), []
    for p, x in enumerate(vectors):
        others = vectors[:p] + vectors[p + 1 :]
        true = math.prod(others)
        if orders is None:
            tuples = list(itertools.product(range(B), repeat=len(others)))
            logits = torch.stack([scale * x @ math.prod(other[j] for other, j in zip(others, index, strict=True)) for index in tuples], 1)
            losses.append(F.cross_entropy(logits, torch.tensor([tuples.index((i,) * len(others)) for i in range(B)])))
        else:
            shuffled = math.prod(other[order] for other, order in zip(others, orders[p], strict=True))
            eye = torch.eye(B, dtype=torch.bool)
            losses.append(entropy(torch.where(eye, (scale * x * true).sum(1, keepdim=True), scale * x @ shuffled.T)))
    return sum(losses) / len(losses)


def shuffles(k, B, seed):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randperm(B, generator=generator) for _ in range(k - 1)] for _ in range(k)]


def dense_pmrl(vectors, intra, inter):
    z = torch.stack(normalized(*vectors), 2)  # [B, D, k]
    u, sigma, v = torch.linalg.svd(z, full_matrices=False)
    lead = u[:, :, 0] * v[:, 0].sum(1, keepdim=True).sign()
    return F.cross_entropy(sigma / intra, torch.zeros(len(z), dtype=torch.int64)) + entropy(lead @ lead.T / inter)


def dense_cgvlm(patches, tokens, scale):
    kept = WORDS.any(1)
    v, e = normalized(patches.mean(1), tokens)
    s = torch.stack([torch.stack([(v[i] @ e[j, WORDS[j]].T).mean() for j in range(len(v)) if kept[j]]) for i in range(len(v)) if kept[i]])
    return (entropy(scale * s) + entropy(scale * s.T)) / 2


def dense_superaligned(x, y, weight, scale):
    x, y = normalized(x, y)
    kept = weight > 0
    z = scale * (x @ y.T)[kept][:, kept]
    each = (z.logsumexp(1) + z.logsumexp(0)) / 2 - z.diagonal()
    return (weight[kept] * each).sum() / weight.sum()


def dense_binding(anchor, a, b, scale, present):
    return sum(two_entropies(anchor[present[:, p]], other[present[:, p]], s) for p, (other, s) in enumerate(((a, scale), (b, 5.0))))


PRESENT = torch.tensor([[1, 1], [0, 1], [1, 0], [1, 1], [1, 0]]).bool()
B, D, N, K = 5, 6, 3, 4
WEIGHT = torch.tensor([1.0, 0.5, 0.0, 2.0, 0.3], dtype=torch.float64)
ALL = torch.ones(B, 1, dtype=torch.bool)

# name: (sizes of the leaves; a number is a scalar), the loss, the formula
CASES = {
    "sdm_loss": (
        [(B, D), (B, D), 0.3],
        lambda x, y, tau, **more: L.sdm_loss(x, y, IDS, temperature=tau, **more),
        lambda x, y, tau: dense_sdm(x, y, tau, None),
    ),
    "sdm_loss with pictures": (
        [(B, D), (B, D), 0.3],
        lambda x, y, tau: L.sdm_loss(x, y, IDS, image_ids=PICTURES, temperature=tau),
        lambda x, y, tau: dense_sdm(x, y, tau, PICTURES),
    ),
    "id_loss": ([(B, D), (B, D), (9, D), (9,)], lambda x, y, weight, bias: L.id_loss(x, y, IDS, weight, bias), dense_id),
    "cross_modal_alignment": (
        [(B, D), (B, D), (B, D), 0.3, (K, D)],
        lambda x, xk, yk, tau, queue: L.cross_modal_alignment(x, xk, yk, temperature=tau, alpha=0.7, queue=queue.detach()) + 0 * queue.sum() + 0 * xk.sum() + 0 * yk.sum(),
        lambda x, xk, yk, tau, queue: dense_cma(x, xk, yk, tau, 0.7, queue.detach()) + 0 * queue.sum() + 0 * xk.sum() + 0 * yk.sum(),
    ),
    "local_mutual_information": (
        [(B, D), (B, N, D), 0.3],
        lambda x, parts, tau: L.local_mutual_information(x, parts, temperature=tau, mask=WORDS) + 0 * parts.sum(),
        lambda x, parts, tau: dense_lmi(x, parts, tau, WORDS) + 0 * parts.sum(),
    ),
    "hard_negative_infonce": (
        [(B, D), (B, D), (B, N, D), 0.3],
        lambda q, t, n, tau: L.hard_negative_infonce(q, t, n, temperature=tau, present=WORDS),
        dense_hard,
    ),
    "symile_loss, n": (
        [(B, D), (B, D), (B, D), 4.0],
        lambda x, y, z, scale: L.symile_loss([x, y, z], logit_scale=scale, generator=torch.Generator().manual_seed(3)),
        lambda x, y, z, scale: dense_symile([x, y, z], scale, shuffles(3, len(x), 3)),
    ),
    "symile_loss, n_squared": (
        [(B, D), (B, D), (B, D), (B, D), 4.0],
        lambda *given: L.symile_loss(given[:-1], logit_scale=given[-1], negative_sampling="n_squared"),
        lambda *given: dense_symile(list(given[:-1]), given[-1]),
    ),
    "binding_loss": (
        [(B, D), (B, D), (B, D), 4.0],
        lambda x, y, z, scale: L.binding_loss(x, [y, z], logit_scale=[scale, 5.0], present=PRESENT),
        lambda x, y, z, scale: dense_binding(x, y, z, scale, PRESENT),
    ),
    "vidla_contrastive": (
        [(B, D), (B, D), (B, D), 4.0],
        lambda x, y, z, scale: L.vidla_contrastive(x, [y, z], logit_scale=scale),
        lambda x, y, z, scale: (two_entropies(x, y, scale) + two_entropies(x, z, scale)) / 2,
    ),
    "pmrl_loss": (
        [(B, D), (B, D), (B, D), 0.4, 0.5],
        lambda *given: L.pmrl_loss(given[:3], intra_temperature=given[3], inter_temperature=given[4]),
        lambda *given: dense_pmrl(given[:3], given[3], given[4]),
    ),
    "superaligned_loss": (
        [(B, D), (B, D), 4.0],
        lambda x, y, scale: L.superaligned_loss(x, y, WEIGHT, logit_scale=scale),
        lambda x, y, scale: dense_superaligned(x, y, WEIGHT, scale),
    ),
    "cgvlm_loss": ([(B, 2, D), (B, N, D), 4.0], lambda v, t, scale: L.cgvlm_loss(v, t, logit_scale=scale, token_mask=WORDS), dense_cgvlm),
    "notellm2_objective": (
        [(B, D), (B, D), (B, D), (B, D), 4.0],
        lambda a, b, c, d, scale: L.notellm2_objective((a, b), (c, d), logit_scale=scale, alpha=0.5),
        lambda a, b, c, d, scale: (two_entropies(a, b, scale) + 0.5 * two_entropies(c, d, scale)) / 1.5,
    ),
    "tcl_loss": (
        [(B, D), (B, D), 0.3],
        lambda x, y, tau: L.tcl_loss(x, y, *momentum(x.dtype), temperature=tau, text_mask=WORDS, **queues(x.dtype)).total,
        lambda x, y, tau: dense_tcl(x, y, tau, *momentum(x.dtype), *queues(x.dtype).values()),
    ),
}


MOMENTUM = [torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed, size in enumerate(((B, D), (B, D), (B, 2, D), (B, N, D)))]
QUEUES = F.normalize(torch.randn(2, K, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64), dim=2)


def momentum(dtype):
    return [tensor.to(dtype) for tensor in MOMENTUM]


def queues(dtype):
    return {"image_queue": QUEUES[0].to(dtype), "text_queue": QUEUES[1].to(dtype)}


def leaves_of(name, dtype=torch.float64):
    return [torch.tensor(size, dtype=torch.float64) if isinstance(size, float) else torch.randn(size, dtype=torch.float64).to(dtype) for size in CASES[name][0]]


def in_dtype(leaves, dtype):
    return [leaf.to(dtype) if leaf.dim() else leaf.to(torch.float64 if dtype is torch.float64 else torch.float32) for leaf in leaves]


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients_are_those_of_the_formula(name):
    leaves, (_, loss, formula) = leaves_of(name), CASES[name]
    for ours, theirs in zip(gradients(loss, leaves), gradients(formula, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name):
    """Against differences of the loss itself. Targets that are constants for autograd are constants here as well: their leaves stay out."""
    leaves, loss = leaves_of(name), CASES[name][1]
    constant = {"cross_modal_alignment": (1, 2, 3, 4), "local_mutual_information": (1,), "tcl_loss": (2,)}.get(name, ())
    assert torch.autograd.gradcheck(loss, [leaf.requires_grad_(position not in constant) for position, leaf in enumerate(leaves)])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_smaller_dtypes_lose_only_what_their_inputs_lost(name, dtype):
    leaves, (_, loss, formula) = leaves_of(name, dtype), CASES[name]
    given = in_dtype(leaves, dtype)
    actual = gradients(loss, given)
    expected = gradients(formula, [leaf.double() for leaf in leaves])
    assert actual[0].dtype is torch.float32 and [a.dtype for a in actual[1:]] == [leaf.dtype for leaf in given]
    own = dtype if name not in ("tcl_loss", "superaligned_loss") else torch.bfloat16  # what the case itself rounds: its keys, a float64 weight
    assert abs(actual[0].item() - expected[0].item()) < (1e-5 if own is torch.float32 or dtype is torch.float32 else 2e-2)
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 2e-2}[dtype]
    for ours, theirs in zip(actual[1:], expected[1:], strict=True):
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm() + 1e-6


@pytest.mark.parametrize("name", CASES)
def test_autocast_computes_in_float32(name):
    leaves, loss = in_dtype(leaves_of(name, torch.float32), torch.float32), CASES[name][1]
    expected = gradients(loss, leaves)
    fresh = [leaf.clone().requires_grad_() for leaf in leaves]
    with torch.autocast("cpu", torch.bfloat16):
        actual = loss(*fresh)
        mixed = loss(*(leaf.bfloat16() if position == 0 else leaf for position, leaf in enumerate(leaves)))
    for ours, theirs in zip([actual, *torch.autograd.grad(actual, fresh)], expected, strict=True):
        assert torch.equal(ours, theirs)
    assert abs(mixed - expected[0]) < 0.1


@pytest.mark.parametrize("name", CASES)
def test_strided_views_and_two_runs_give_the_same_bits(name):
    leaves, loss = leaves_of(name), CASES[name][1]

    def strided(leaf):
        wide = leaf.new_full((*leaf.shape[:-1], 2 * leaf.shape[-1]), float("nan")) if leaf.dim() else leaf
        if leaf.dim():
            wide[..., ::2] = leaf
        return wide[..., ::2] if leaf.dim() else wide

    expected = gradients(loss, leaves)
    for again in (gradients(loss, leaves), gradients(loss, [strided(leaf) for leaf in leaves])):
        for ours, theirs in zip(again, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    for ours, theirs in zip(gradients(loss, leaves), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_overflow_stay_visible(name, bad):
    for position, size in enumerate(CASES[name][0]):
        if isinstance(size, float) or len(size) == 1:
            continue
        leaves = leaves_of(name)
        leaves[position][0, ..., 0] = bad
        assert not torch.isfinite(CASES[name][1](*leaves)), (name, position)


@pytest.mark.parametrize("name", CASES)
def test_zero_rows_have_finite_gradients(name):
    for position, size in enumerate(CASES[name][0]):
        if isinstance(size, float):
            continue
        leaves = leaves_of(name)
        leaves[position][0] = 0
        assert all(torch.isfinite(value).all() for value in gradients(CASES[name][1], leaves)), (name, position)


@pytest.mark.parametrize("name", ["sdm_loss", "sdm_loss with pictures", "local_mutual_information", "symile_loss, n", "symile_loss, n_squared", "tcl_loss"])
def test_panels_do_not_change_the_loss(name, monkeypatch):
    leaves, loss = leaves_of(name), CASES[name][1]
    whole = gradients(loss, leaves)
    monkeypatch.setattr(_features, "PANEL", 11)
    for ours, theirs in zip(gradients(loss, leaves), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


LARGE = {
    "sdm_loss": lambda x, y: L.sdm_loss(x, y, torch.arange(len(x)) // 2),
    "local_mutual_information": lambda x, y: L.local_mutual_information(x, y[:, None].expand(-1, 2, -1)),
    "symile_loss, n": lambda x, y: L.symile_loss([x, y, x + y], logit_scale=5.0),
    "symile_loss, n_squared": lambda x, y: L.symile_loss([x[:40], y[:40], x[40:80]], logit_scale=5.0, negative_sampling="n_squared"),
}


@pytest.mark.parametrize("name", LARGE)
def test_no_matrix_of_logits_is_kept(name, monkeypatch):
    monkeypatch.setattr(_features, "PANEL", 2048)
    x, y, kept = unit(300, 4).requires_grad_(), unit(300, 4), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        LARGE[name](x, y)
    assert max(kept) >= 300 and sum(kept) < 36_000  # the matrix has 64 000 numbers or more


WITHOUT_PICKED_ROWS = [name for name in CASES if name not in ("binding_loss", "superaligned_loss", "cgvlm_loss")]


@pytest.mark.parametrize("name", [name for name in WITHOUT_PICKED_ROWS if not name.startswith("symile")])
def test_one_graph(name):
    leaves, loss = leaves_of(name), CASES[name][1]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(gradients(compiled, leaves), gradients(loss, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", [name for name in CASES if name.partition(",")[0] in ("pmrl_loss", "hard_negative_infonce", "id_loss", "binding_loss")])
def test_second_derivatives_are_refused(name):
    leaves = [leaf.requires_grad_() for leaf in leaves_of(name)]
    first = torch.autograd.grad(CASES[name][1](*leaves), leaves[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.grad(first.square().sum(), leaves[0])


@pytest.mark.parametrize("name", ["sdm_loss", "sdm_loss with pictures", "local_mutual_information", "symile_loss, n", "symile_loss, n_squared"])
def test_second_derivatives_are_right_where_no_op_is_inside(name, monkeypatch):
    constant = {"local_mutual_information": (1,)}.get(name, ())
    leaves = [leaf.requires_grad_(position not in constant) for position, leaf in enumerate(leaves_of(name))]
    for panel in (_features.PANEL, 60):
        monkeypatch.setattr(_features, "PANEL", panel)
        assert torch.autograd.gradgradcheck(CASES[name][1], leaves, fast_mode=True)


REDUCED = {
    "sdm_loss": lambda x, y, **more: L.sdm_loss(x, y, torch.arange(len(x)) // 2, **more),
    "hard_negative_infonce": lambda x, y, **more: L.hard_negative_infonce(x, y, x[:, None].roll(1, 0), **more),
    "symile_loss": lambda x, y, **more: L.symile_loss([x, y, x + y], logit_scale=5.0, generator=torch.Generator().manual_seed(0), **more),
    "pmrl_loss": lambda x, y, **more: L.pmrl_loss([x, y], **more),
}


@pytest.mark.parametrize("name", REDUCED)
def test_reductions(name):
    x, y = unit(6, 8), unit(6, 8)
    each = REDUCED[name](x, y, reduction="none")
    assert each.shape == (6,) and each.std() > 0
    assert torch.allclose(REDUCED[name](x, y), each.mean()) and torch.allclose(REDUCED[name](x, y, reduction="sum"), each.sum())
    with pytest.raises(ValueError, match=f'{name}: reduction must be "mean", "sum" or "none", got str'):
        REDUCED[name](x, y, reduction="max")


def one_sample(B):
    x = unit(B, 6)
    parts = unit(B, 3, 6)
    return {
        "sdm_loss": lambda: L.sdm_loss(x, x, torch.arange(B)),
        "hard_negative_infonce": lambda: L.hard_negative_infonce(x, x, parts[:, :0]),
        "symile_loss, n": lambda: L.symile_loss([x, x, x], logit_scale=3.0),
        "symile_loss, n_squared": lambda: L.symile_loss([x, x, x], logit_scale=3.0, negative_sampling="n_squared"),
        "binding_loss": lambda: L.binding_loss(x, [x, x], logit_scale=3.0),
        "vidla_contrastive": lambda: L.vidla_contrastive(x, [x, x]),
        "superaligned_loss": lambda: L.superaligned_loss(x, x, torch.ones(B), logit_scale=3.0),
        "cgvlm_loss": lambda: L.cgvlm_loss(parts, parts, logit_scale=3.0),
        "notellm2_objective": lambda: L.notellm2_objective((x, x), (x, x), logit_scale=3.0, alpha=1.0),
        "tcl_loss": lambda: L.tcl_loss(x, x, x, x, parts, parts).total,
        "local_mutual_information": lambda: L.local_mutual_information(x, parts),
        "pmrl_loss": lambda: L.pmrl_loss([x], intra_temperature=1.0),
    }


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("name", one_sample(1))
def test_no_sample_or_one(name, size):
    assert one_sample(size)[name]().item() == pytest.approx(0, abs=1e-7)


# ------------------------------------------------------------------------------------------------------------------------------------------- IRRA


def test_sdm_perfect_alignment():
    eye = torch.eye(7)
    assert L.sdm_loss(eye, eye, torch.arange(7)).item() == pytest.approx(0, abs=1e-6)
    assert L.sdm_loss(eye, eye, torch.arange(7), temperature=1e-4).item() == pytest.approx(0, abs=1e-6)


def test_sdm_of_one_identity_is_the_distance_to_uniform():
    x, y = unit(6, 8), unit(6, 8)
    p, q = ((z / 0.1).softmax(1) for z in (x @ y.T, y @ x.T))
    expected = sum((math.log(6) + (one * one.log()).sum(1)).mean() for one in (p, q))
    assert L.sdm_loss(x, y, torch.zeros(6, dtype=torch.int64), temperature=0.1).item() == pytest.approx(expected.item(), rel=1e-6)


def test_sdm_does_not_see_the_order_of_the_samples():
    x, y, order = unit(9, 8), unit(9, 8), torch.randperm(9)
    ids, pictures = torch.randint(3, (9,)), torch.randint(5, (9,))
    whole = L.sdm_loss(x, y, ids, image_ids=pictures)
    assert torch.allclose(whole, L.sdm_loss(x[order], y[order], ids[order], image_ids=pictures[order]), rtol=1e-12)
    assert torch.allclose(whole, L.sdm_loss(y, x, ids, image_ids=pictures), rtol=1e-12)


def test_sdm_rows_and_columns_of_labels_agree_without_pictures():
    """The released code divides by the sums of the columns. Same for hard labels; with pictures it is another loss."""
    ids, pictures = torch.tensor([3, 3, 3, 5, 5]), torch.tensor([0, 0, 1, 2, 3])
    x, y = unit(5, 8), unit(5, 8)

    def released(label):
        q = label / label.sum(1)
        return sum((p * (p.log() - (q + 1e-8).log())).sum(1).mean() for p in ((x @ y.T / 0.02).softmax(1), (y @ x.T / 0.02).softmax(1)))

    hard = (ids[:, None] == ids).double()
    assert torch.allclose(L.sdm_loss(x, y, ids), released(hard), rtol=1e-9)
    soft = hard * 0.3 + 0.7 * (pictures[:, None] == pictures)
    assert not torch.allclose(L.sdm_loss(x, y, ids, image_ids=pictures), released(soft), rtol=1e-3)


def test_sdm_off_label_pairs_see_epsilon():
    """d loss / d z_ij = p_ij (k_ij - sum p k) / B with k = log p - log(q + epsilon), in closed form."""
    x, y, ids = unit(4, 6), unit(4, 6), torch.tensor([0, 0, 1, 2])
    p, q = (x @ y.T / 0.5).softmax(1), (ids[:, None] == ids).double()
    k = p.log() - (q / q.sum(1, keepdim=True) + 1e-8).log()
    forward = (p * (k - (p * k).sum(1, keepdim=True)) / 4 / 0.5) @ y
    both = x.clone().requires_grad_()
    other = (y @ both.T / 0.5).log_softmax(1)
    (other.exp() * (other - (q / q.sum(1, keepdim=True) + 1e-8).log())).sum(1).mean().backward()
    expected = forward + both.grad
    tangent = expected - (expected * x).sum(1, keepdim=True) * x
    assert torch.allclose(gradients(lambda a: L.sdm_loss(a, y, ids, temperature=0.5), [x])[1], tangent, rtol=1e-9)
    assert -math.log(1e-8) == pytest.approx(18.4, abs=0.03)


def test_identity_classifier():
    classifier = nn.IdentityClassifier(16, 1000)
    assert classifier.weight.std().item() == pytest.approx(0.001, rel=0.05) and (classifier.bias == 0).all()
    x, y, ids = torch.randn(6, 16), torch.randn(6, 16), torch.tensor([0, 999, 5, -100, 5, 7])
    loss = classifier(x, y, ids)
    loss.backward()
    plain = copy.deepcopy(classifier)
    plain.zero_grad()
    expected = (F.cross_entropy(F.linear(x, plain.weight, plain.bias), ids) + F.cross_entropy(F.linear(y, plain.weight, plain.bias), ids)) / 2
    expected.backward()
    assert torch.allclose(loss, expected)
    assert torch.allclose(classifier.weight.grad, plain.weight.grad, atol=1e-6) and torch.allclose(classifier.bias.grad, plain.bias.grad, atol=1e-6)
    assert classifier(x, y, torch.full((6,), -100)).item() == 0
    assert torch.allclose(L.id_loss(x, y, ids, plain.weight), classifier(x, y, ids))  # a bias of 0 is no bias


def test_masking_hides_words_only_and_in_the_published_shares():
    tokens = torch.randint(1, 49405, (400, 60))
    tokens[:, 0], tokens[:, 50], tokens[:, 51:] = 49406, 49407, 0
    masked, labels = L.mask_tokens(tokens, generator=torch.Generator().manual_seed(0))
    hidden = labels != -100
    words = (tokens > 0) & (tokens < 49405)
    assert (hidden & ~words).sum() == 0 and torch.equal(labels[hidden], tokens[hidden]) and torch.equal(masked[~hidden], tokens[~hidden])
    n = hidden.sum().item()
    assert abs(n / words.sum().item() - 0.15) < 4 * math.sqrt(0.15 * 0.85 / words.sum().item())
    kept, shown = (masked == tokens)[hidden].sum().item(), (masked == 49405)[hidden].sum().item()
    for share, count in ((0.8, shown), (0.1, kept), (0.1, n - kept - shown)):
        assert abs(count / n - share) < 4 * math.sqrt(share * (1 - share) / n)
    drawn = masked[hidden & (masked != 49405) & (masked != tokens)]
    assert drawn.min() >= 1 and drawn.max() < 49405 and drawn.unique().numel() > 0.9 * drawn.numel()
    again = L.mask_tokens(tokens, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.tokens, masked) and torch.equal(again.labels, labels)
    assert not torch.equal(L.mask_tokens(tokens, generator=torch.Generator().manual_seed(1)).labels, labels)


def test_masking_hides_one_word_at_least():
    tokens = torch.tensor([[49406, 9, 8, 7, 49407, 0], [49406, 49407, 0, 0, 0, 0]])
    seen = set()
    for seed in range(60):
        labels = L.mask_tokens(tokens, rate=0.0, generator=torch.Generator().manual_seed(seed)).labels
        assert (labels != -100).sum(1).tolist() == [1, 0]  # a text without words has none
        seen.add(labels[0].max().item())
    assert seen == {7, 8, 9}
    some = torch.zeros(2, 6, dtype=torch.bool)
    some[1, 0] = True
    assert (L.mask_tokens(tokens, rate=1.0, maskable=some).labels != -100).nonzero().tolist() == [[1, 0]]


def reasoner():
    torch.manual_seed(1)
    return nn.MaskedCrossModalReasoner(width=64, vocabulary=50, layers=2), torch.randn(3, 5, 64), torch.randn(3, 7, 64)


def test_reasoner_is_the_cross_entropy_of_its_logits():
    model, text, image = reasoner()
    labels = torch.tensor([[3, -100, 49, -100, -100], [-100] * 5, [0, -100, -100, -100, 7]])
    logits = model.words(model.norm(nn.masked_cross_modal_reasoner._quick_gelu(model.dense(model.hidden(text, image)))))
    assert torch.allclose(model(text, image, labels), F.cross_entropy(logits.flatten(0, 1), labels.flatten()), rtol=1e-5)
    assert torch.allclose(model(text, image[:, torch.randperm(7)], labels), model(text, image, labels), rtol=1e-4)  # patches are a set
    assert model(text, image, torch.full((3, 5), -100)).item() == 0
    with torch.autocast("cpu", torch.bfloat16):
        low = model(text, image, labels)
    assert low.dtype is torch.float32 and torch.allclose(low, model(text, image, labels), rtol=2e-2)
    model(text, image, labels).backward()
    assert all(parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_reasoner_as_published():
    """Written out: cross-attention without a way around it, blocks of norm, attention, norm, MLP, and a norm."""
    model, text, image = reasoner()
    model.double()
    text, image = text.double(), image.double()

    def attend(layer, q, k):
        d = q.shape[-1]
        wq, wk, wv = layer.in_proj_weight.chunk(3)
        bq, bk, bv = layer.in_proj_bias.chunk(3)
        heads = [(q @ wq.T + bq), (k @ wk.T + bk), (k @ wv.T + bv)]
        h = d // 64
        q_, k_, v_ = (t.unflatten(-1, (h, 64)).transpose(1, 2) for t in heads)
        return ((q_ @ k_.mT / 8).softmax(-1) @ v_).transpose(1, 2).flatten(2) @ layer.out_proj.weight.T + layer.out_proj.bias

    x = attend(model.cross_attention, model.norm_text(text), model.norm_image(image))
    for block in model.transformer.layers:
        y = block.norm1(x)
        x = x + attend(block.self_attn, y, y)
        y = block.linear1(block.norm2(x))
        x = x + block.linear2(y * torch.sigmoid(1.702 * y))
    assert torch.allclose(model.hidden(text, image), model.transformer.norm(x), rtol=1e-9)
    wide = nn.MaskedCrossModalReasoner(128, 2000, layers=3)
    for weight, std in (
        (wide.cross_attention.in_proj_weight, 128**-0.5),
        (wide.cross_attention.out_proj.weight, 128**-0.5 * 6**-0.5),
        (wide.transformer.layers[2].self_attn.in_proj_weight, 128**-0.5),
        (wide.transformer.layers[2].linear1.weight, 256**-0.5),
        (wide.transformer.layers[0].linear2.weight, 128**-0.5 * 6**-0.5),
        (wide.dense.weight, 256**-0.5),
        (wide.words.weight, 128**-0.5 * 6**-0.5),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.03)


def test_reasoner_never_reads_padding():
    model, text, image = reasoner()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    labels = torch.tensor([[3, -100, 4, -100, -100], [-100, 8, -100, 9, -100], [-100] * 5])

    def run(text):
        model.zero_grad()
        loss = model(text.requires_grad_(), image, labels, mask)
        loss.backward()
        return [loss.detach(), text.grad, *(parameter.grad.clone() for parameter in model.parameters())]

    expected = run(text.clone())
    dirty = text.clone()
    dirty[~mask] = float("nan")
    for ours, theirs in zip(run(dirty), expected, strict=True):
        assert torch.isfinite(ours).all() and torch.equal(ours, theirs)
    assert (expected[1][~mask] == 0).all()
    zeros = model.hidden(torch.zeros(1, 5, 64), image[2:])  # what a text without words attends to, whatever softmaxes over nothing give
    assert torch.allclose(model.hidden(dirty, image, mask)[2:], zeros, atol=1e-5)
    alone = model(text[:1, :3], image[:1], labels[:1, :3])
    assert torch.allclose(model(text[:1], image[:1], labels[:1], mask[:1]), alone, rtol=1e-5)


# -------------------------------------------------------------------------------------------------------------------------------------------- TCL


def test_cma_without_soft_targets_and_queue_is_clip():
    x, y, tau = unit(6, 8), unit(6, 8), 0.2
    both = L.cross_modal_alignment(x, x, y, alpha=0.0, temperature=tau) + L.cross_modal_alignment(y, y, x, alpha=0.0, temperature=tau)
    assert torch.allclose(both, 2 * ops.clip_loss(x, y, logit_scale=1 / tau), rtol=1e-12)


def test_soft_targets_alone_are_a_distillation():
    """alpha = 1 with the keys themselves as queries: the cross entropy is the entropy of the momentum encoder's softmax, its least value."""
    x, y = unit(6, 8), unit(6, 8)
    p = (x @ y.T / 0.3).softmax(1)
    least = -(p * p.log()).sum(1).mean()
    assert torch.allclose(L.cross_modal_alignment(x, x, y, alpha=1.0, temperature=0.3), least, rtol=1e-12)
    gradient = gradients(lambda a: L.cross_modal_alignment(a, x, y, alpha=1.0, temperature=0.3), [x])[1]
    assert gradient.abs().max() < 1e-12
    assert L.cross_modal_alignment(unit(6, 8), x, y, alpha=1.0, temperature=0.3) > least


def test_tcl_terms_and_where_gradients_go():
    image, text = unit(B, D), unit(B, D)
    given = [image, text, *momentum(torch.float64)]
    extra = queues(torch.float64)
    leaves = [tensor.clone().requires_grad_() for tensor in (*given, *extra.values())]
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    found = L.tcl_loss(*leaves[:6], temperature=tau, text_mask=WORDS, image_queue=leaves[6], text_queue=leaves[7])
    assert torch.allclose(found.total, (found.cross_modal + found.intra_modal + found.local) / 6)
    found.total.backward()
    assert all(leaf.grad is not None and leaf.grad.abs().sum() > 0 for leaf in (*leaves[:2], tau))
    assert all(leaf.grad is None for leaf in leaves[2:])
    every = torch.ones(B, 2, dtype=torch.bool)
    assert torch.allclose(found.local, dense_lmi(image, given[4], tau, every) + dense_lmi(text, given[5], tau, WORDS), rtol=1e-9)
    intra = dense_cma(image, given[2], given[2], tau, 0.0, extra["image_queue"]) + dense_cma(text, given[3], given[3], tau, 0.0, extra["text_queue"])
    assert torch.allclose(found.intra_modal, intra, rtol=1e-9)


def test_lmi_never_reads_padding():
    x, parts = unit(4, 6), unit(4, 3, 6)
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 0], [1, 1, 1]]).bool()
    run = lambda parts: gradients(lambda a: L.local_mutual_information(a, parts, mask=mask, temperature=0.3), [x])  # noqa: E731
    expected = run(parts)
    for bad in (float("nan"), float("inf"), 1e30):
        dirty = parts.clone()
        dirty[~mask] = bad
        for ours, theirs in zip(run(dirty), expected, strict=True):
            assert torch.equal(ours, theirs)
    assert (expected[1][1] == 0).all()  # no part of its own
    assert torch.allclose(expected[0], dense_lmi(x, parts, 0.3, mask), rtol=1e-9)
    nothing = gradients(lambda a: L.local_mutual_information(a, parts, mask=mask & False), [x])
    assert (nothing[0] == 0) and (nothing[1] == 0).all()
    alone = gradients(lambda a: L.local_mutual_information(a, parts[3:]), [x[3:]])  # no negatives
    assert (alone[0] == 0) and (alone[1] == 0).all()


def test_local_loss_keeps_its_range_far_out():
    x = torch.eye(3)
    for tau in (0.001, 0.01):
        near, far = L.local_mutual_information(x, x[:, None], temperature=tau), L.local_mutual_information(x, x[:, None].roll(1, 0), temperature=tau)
        assert near.item() < 1e-30 and far.item() == pytest.approx(1 / tau, rel=1e-3)


def test_patches_are_pooled_on_their_grid():
    patches = torch.randn(2, 256, 5)
    expected = F.avg_pool2d(patches.mT.unflatten(2, (16, 16)), 4).flatten(2).mT
    assert torch.allclose(L.pool_patches(patches), expected, atol=1e-6) and L.pool_patches(patches).shape == (2, 16, 5)
    assert L.pool_patches(torch.randn(1, 576, 5)).shape == (1, 36, 5)  # 24 x 24, windows of 4
    assert torch.equal(L.pool_patches(patches, 1), patches)
    for bad, message in (
        (lambda: L.pool_patches(torch.randn(1, 50, 5)), "pool_patches: patches must form a square grid, got N = 50"),
        (lambda: L.pool_patches(patches, 3), "pool_patches: window must be a whole number that divides the side 16 of the grid, got 3"),
        (lambda: L.pool_patches(patches[0]), r"pool_patches: patches must have 3 dimensions \[B, N, D\]"),
        (lambda: L.pool_patches(torch.randn(1, 25, 5)), "divides the side 5 of the grid, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()


@pytest.mark.parametrize("batches", [[3, 3, 3], [5, 1, 7, 2], [7, 20, 4], [1] * 9, [0, 4, 0]])
def test_queue_holds_the_last_rows_in_a_ring(batches):
    queue, sent = nn.FeatureQueue(7, 2), []
    sent.extend(queue.features.clone())  # as if the start had been sent at places 0 ... 6
    for size in batches:
        rows = torch.randn(size, 2)
        queue.push(rows)
        sent.extend(rows)
    last = {(position - 7) % 7: row for position, row in enumerate(sent)}  # later ones replace earlier ones
    assert torch.equal(queue.features, torch.stack([last[place] for place in range(7)]))
    assert queue.position.item() == sum(batches) % 7


def test_queue_starts_as_unit_rows_and_travels_with_the_model():
    queue = nn.FeatureQueue(6, 4)
    assert torch.allclose(queue.features.norm(dim=1), torch.ones(6))
    queue.push(torch.randn(4, 4, requires_grad=True))
    assert not queue.features.requires_grad and list(queue.parameters()) == []
    other = nn.FeatureQueue(6, 4)
    other.load_state_dict(queue.state_dict())
    rows = torch.randn(5, 4)
    queue.push(rows), other.push(rows)
    assert torch.equal(queue.features, other.features) and torch.equal(queue.position, other.position)
    queue.half().push(rows)
    assert queue.features.dtype is torch.float16
    for bad, message in (
        (lambda: nn.FeatureQueue(0, 4), "FeatureQueue: size and width must be at least 1, got 0 and 4"),
        (lambda: queue.push(torch.randn(3, 5)), r"FeatureQueue: rows must be \[B, width\] with width = 4, got a float32 tensor of shape \(3, 5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()


def test_triple_contrast_keeps_queues_and_temperature():
    loss = nn.TripleContrast(width=D, queue_size=7, limits=(0.05, 0.5))
    assert nn.TripleContrast(8, 4).temperature.item() == pytest.approx(0.07)
    image, text = unit(B, D, dtype=torch.float32), unit(B, D, dtype=torch.float32)
    keys = [tensor.clone() for tensor in momentum(torch.float32)]
    before = {"image_queue": loss.image_queue.features.clone(), "text_queue": loss.text_queue.features.clone()}
    with torch.no_grad():
        loss.temperature.fill_(-1.0)
    found = loss(image.requires_grad_(), text, *keys, alpha=0.2, text_mask=WORDS)
    assert loss.temperature.item() == pytest.approx(0.05)
    assert torch.equal(found.total, L.tcl_loss(image, text, *keys, temperature=loss.temperature, alpha=0.2, text_mask=WORDS, **before).total)
    assert torch.allclose(loss.image_queue.features[:B], F.normalize(keys[0], dim=1)) and torch.allclose(loss.text_queue.features[:B], F.normalize(keys[1], dim=1))
    found.total.backward()  # the queues were written to in the meantime
    assert torch.isfinite(image.grad).all() and loss.temperature.grad != 0
    queue = loss.image_queue.features.clone()
    loss.eval()(image, text, *keys, text_mask=WORDS)
    assert torch.equal(loss.image_queue.features, queue)
    restored = nn.TripleContrast(width=D, queue_size=7, limits=(0.05, 0.5))
    restored.load_state_dict(loss.state_dict())
    assert torch.equal(restored.eval()(image, text, *keys).total, loss(image, text, *keys).total)
    with pytest.raises(ValueError, match=r"TripleContrast: temperature must be positive and within limits \(0.001, 0.5\), got 0.9"):
        nn.TripleContrast(8, 4, temperature=0.9)


# ------------------------------------------------------------------------------------------------------------------------------- hard negatives


def test_no_hard_negative_is_infonce_in_one_direction():
    q, t = unit(6, 8), unit(6, 8)
    expected = entropy(q @ t.T / 0.02)
    assert torch.allclose(L.hard_negative_infonce(q, t, unit(6, 0, 8)), expected, rtol=1e-12)
    nobody = torch.zeros(6, 3, dtype=torch.bool)
    nan = torch.full((6, 3, 8), float("nan"), dtype=torch.float64)
    found = gradients(lambda *given: L.hard_negative_infonce(*given, present=nobody), [q, t, nan])
    assert torch.allclose(found[0], expected, rtol=1e-12) and (found[3] == 0).all() and torch.isfinite(found[1]).all()


def test_a_hard_negative_is_seen_by_its_query_alone():
    q, t, n = unit(4, 8), unit(4, 8), unit(4, 2, 8)
    each = L.hard_negative_infonce(q, t, n, reduction="none", temperature=0.3)
    changed = n.clone()
    changed[1] = unit(2, 8)
    moved = L.hard_negative_infonce(q, t, changed, reduction="none", temperature=0.3) != each
    assert moved.tolist() == [False, True, False, False]


def test_repeated_negatives_count_twice():
    """Published code pads a short list with its last entry; that is another loss than leaving the place empty."""
    q, t, n = unit(4, 8), unit(4, 8), unit(4, 1, 8)
    short = L.hard_negative_infonce(q, t, torch.cat([n, n], 1), present=torch.tensor([[True, False]] * 4), temperature=0.3)
    assert torch.allclose(short, L.hard_negative_infonce(q, t, n, temperature=0.3)) and short < L.hard_negative_infonce(q, t, torch.cat([n, n], 1), temperature=0.3)


def test_nearly_solved_queries_keep_their_digits():
    q = torch.eye(16)
    n = torch.eye(16).roll(1, 0)[:, None]
    actual, exact = (gradients(lambda a, n=n: L.hard_negative_infonce(a, q.to(a), n.to(a), temperature=0.05), [x])[:2] for x in (q + 0.01, (q + 0.01).double()))
    assert 1e-9 < exact[0] < 1e-6
    assert (actual[0] - exact[0]).abs() < 1e-4 * exact[0] and (actual[1] - exact[1]).norm() < 1e-4 * exact[1].norm()


def worker(rank, world):
    import torch.distributed as dist

    torch.manual_seed(0)
    whole = [unit(4 * world, 8), unit(4 * world, 8), unit(4 * world, 3, 8)]
    mine = [tensor[4 * rank : 4 * rank + 4].clone() for tensor in whole]
    found = {
        way: gradients(lambda *given, way=way: L.hard_negative_infonce(*given, temperature=0.1, process_group=dist.group.WORLD, gather_grad=way), mine)
        for way in ("full", "local")
    }
    single = gradients(lambda *given: L.hard_negative_infonce(*given, temperature=0.1), whole)
    loss = nn.TripleContrast(width=8, queue_size=20, process_group=dist.group.WORLD)
    uneven = unit(3 + rank, 8, dtype=torch.float32)
    loss(uneven, uneven, uneven, uneven, uneven[:, None], uneven[:, None])
    return found, single, loss.image_queue.features, uneven


def test_over_two_processes(tmp_path):
    ranks = run_ranks(2, "test_paper_losses_1:worker", str(tmp_path))
    values = [found["full"][0] for found, *_ in ranks]
    assert torch.allclose(torch.stack(values).mean(), ranks[0][1][0])
    for position in (1, 2, 3):
        gathered = torch.cat([found["full"][position] for found, *_ in ranks]) / 2  # data-parallel training averages
        assert torch.allclose(gathered, ranks[0][1][position], rtol=1e-9, atol=1e-12)
    for found, *_ in ranks:
        assert torch.equal(found["local"][0], found["full"][0]) and not torch.allclose(found["local"][2], found["full"][2])
    everyone = torch.cat([uneven for *_, uneven in ranks])
    for *_, queue, _ in ranks:
        assert torch.allclose(queue[:7], everyone, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------------------------- Symile


@pytest.mark.parametrize("sampling", ["n", "n_squared"])
def test_two_modalities_are_infonce_averaged_over_both_anchors(sampling):
    x, y = unit(6, 8), unit(6, 8)
    expected = (entropy(5 * x @ y.T) + entropy(5 * y @ x.T)) / 2
    assert torch.allclose(L.symile_loss([x, y], logit_scale=5.0, negative_sampling=sampling), expected, rtol=1e-12)


def test_the_true_tuple_has_its_multilinear_product():
    vectors = [unit(5, 8) for _ in range(4)]
    product = math.prod(vectors).sum(1)
    for p in range(4):
        found = L.symile_similarity(vectors[p], vectors[:p] + vectors[p + 1 :])
        assert torch.allclose(found.diagonal(), product, rtol=1e-12)
        assert torch.allclose(found[1, 3], sum(vectors[p][3, d] * math.prod(v[1, d] for q, v in enumerate(vectors) if q != p) for d in range(8)), rtol=1e-12)


def test_similarity_leaves_its_inputs_alone():
    candidates, queries = unit(7, 8), [unit(3, 8), unit(3, 8)]
    copies = [tensor.clone() for tensor in (candidates, *queries)]
    assert L.symile_similarity(candidates, queries).shape == (3, 7)
    assert all(torch.equal(now, before) for now, before in zip((candidates, *queries), copies, strict=True))


def test_shuffles_come_from_the_generator():
    vectors = [unit(8, 6) for _ in range(3)]
    run = lambda seed: L.symile_loss(vectors, logit_scale=9.0, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))
    assert len({L.symile_loss(vectors, logit_scale=9.0, negative_sampling="n_squared").item() for _ in range(3)}) == 1


def test_symile_of_one_hot_modalities():
    """The true tuple has the logit s, every other one 0, whatever the shuffle; only a chance false negative would differ."""
    eye, s = torch.eye(5, dtype=torch.float64), 2.0
    assert L.symile_loss([eye] * 3, logit_scale=s, negative_sampling="n_squared").item() == pytest.approx(math.log(1 + 24 * math.exp(-s)), rel=1e-12)
    assert L.symile_loss([eye] * 4, logit_scale=s, negative_sampling="n_squared").item() == pytest.approx(math.log(1 + 124 * math.exp(-s)), rel=1e-12)


# ------------------------------------------------------------------------------------------------------------------------------------------- PMRL


def test_singular_values():
    x = unit(4, 6)
    sigma, lead = singular_directions(torch.stack([x, x, x], 1), 1e-3)
    assert torch.allclose(sigma, torch.tensor([math.sqrt(3), 0, 0], dtype=torch.float64).expand(4, 3), atol=1e-7) and torch.allclose(lead, x, atol=1e-7)
    sigma, _ = singular_directions(torch.eye(3, 6, dtype=torch.float64)[None], 1e-3)
    assert torch.allclose(sigma, torch.ones(1, 3, dtype=torch.float64))
    vectors = [unit(50, 6) for _ in range(4)]
    sigma, lead = singular_directions(torch.stack(vectors, 1), 1e-3)
    assert (sigma.diff(dim=1) <= 0).all() and torch.allclose(sigma.square().sum(1), torch.full((50,), 4.0, dtype=torch.float64))
    assert torch.allclose(sigma.prod(1), ops.paired_gram_volume(vectors), rtol=1e-9)
    u, expected, _ = torch.linalg.svd(torch.stack(vectors, 2), full_matrices=False)
    assert torch.allclose(sigma, expected, rtol=1e-9) and torch.allclose((lead * u[:, :, 0]).sum(1).abs(), torch.ones(50, dtype=torch.float64))
    assert (torch.stack([(lead * vector).sum(1) for vector in vectors]).sum(0) > 0).all()  # the sign is fixed


def test_aligned_and_orthogonal_samples():
    eye = torch.eye(4, 12)
    aligned = L.pmrl_loss([eye, eye, eye], intra_temperature=0.5, inter_temperature=0.5).item()
    assert aligned == pytest.approx(math.log(1 + 2 * math.exp(-math.sqrt(3) / 0.5)) + math.log(1 + 3 * math.exp(-2)), rel=1e-5)
    apart = L.pmrl_loss([torch.eye(1, 12), torch.eye(1, 12).roll(1, 1), torch.eye(1, 12).roll(2, 1)]).item()
    assert apart == pytest.approx(math.log(3), rel=1e-5)  # all singular values are 1


@pytest.mark.parametrize("how", ["aligned", "orthogonal", "two agree", "zeros", "more modalities than dimensions"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_vectors_that_do_not_exist_have_finite_gradients(how, dtype):
    x = unit(5, 6, dtype=dtype)
    eye = torch.eye(6, dtype=dtype)
    vectors = {
        "aligned": [x, x, x],
        "orthogonal": [eye[[0, 0, 3, 3, 1]], eye[[1, 1, 4, 4, 2]], eye[[2, 2, 5, 5, 0]]],
        "two agree": [x, x, unit(5, 6, dtype=dtype)],
        "zeros": [x * 0, x * 0, x * 0],
        "more modalities than dimensions": [unit(5, 2, dtype=dtype) for _ in range(5)],
    }[how]
    for value in gradients(lambda *given: L.pmrl_loss(given), vectors):
        assert torch.isfinite(value).all() and value.abs().max() < 1e5


def test_a_small_step_down_the_gradient_helps():
    vectors = [unit(8, 6) for _ in range(3)]
    value, *slopes = gradients(lambda *given: L.pmrl_loss(given), vectors)
    stepped = L.pmrl_loss([vector - 1e-4 * slope for vector, slope in zip(vectors, slopes, strict=True)])
    assert (value - stepped).item() == pytest.approx(1e-4 * sum(slope.square().sum() for slope in slopes).item(), rel=0.05)


# --------------------------------------------------------------------------------------------------------------- one anchor, weights, patches, items


def test_one_modality_bound_is_clip():
    x, y = unit(6, 8), unit(6, 8)
    assert torch.equal(L.binding_loss(x, [y], logit_scale=7.0, normalize=False), ops.clip_loss(x, y, logit_scale=7.0))


def test_a_missing_modality_is_neither_row_nor_candidate():
    x, y, z = unit(B, D), unit(B, D), unit(B, D)

    def run(y, z):
        return gradients(lambda *given: L.binding_loss(given[0], given[1:], logit_scale=7.0, present=PRESENT), [x, y, z])

    expected = run(y, z)
    y, z = y.clone(), z.clone()
    y[~PRESENT[:, 0]] = z[~PRESENT[:, 1]] = float("nan")
    for ours, theirs in zip(run(y, z), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert (expected[2][1] == 0).all() and (expected[3][[2, 4]] == 0).all()
    nobody = PRESENT.clone()
    nobody[:, 1] = False
    assert torch.equal(L.binding_loss(x, [y, z], logit_scale=7.0, present=nobody), L.binding_loss(x, [y], logit_scale=7.0, present=PRESENT[:, :1]))


def test_weights_of_pairs():
    x, y, s = unit(6, 8), unit(6, 8), 4.0
    assert torch.allclose(L.superaligned_loss(x, y, torch.full((6,), 0.3), logit_scale=s), ops.clip_loss(x, y, logit_scale=s))
    score = torch.rand(6)
    kept = score >= score.median()
    dirty = x.clone()
    dirty[~kept] = float("nan")
    found = gradients(lambda a: L.superaligned_loss(a, y, kept.float(), logit_scale=s), [dirty])
    assert torch.allclose(found[0], ops.clip_loss(x[kept], y[kept], logit_scale=s)) and (found[1][~kept] == 0).all() and torch.isfinite(found[1]).all()
    assert L.superaligned_loss(x, y, torch.zeros(6), logit_scale=s).item() == 0
    assert torch.isnan(L.superaligned_loss(x, y, torch.tensor([1, float("nan"), 1, 1, 1, 1]), logit_scale=s))
    weight = torch.rand(6, dtype=torch.float64) + 0.1
    assert torch.autograd.gradcheck(lambda w: L.superaligned_loss(x, y, w, logit_scale=s), [weight.requires_grad_()])


def test_words_of_a_caption_one_by_one():
    patches, tokens = torch.randn(4, 3, 8, dtype=torch.float64), torch.randn(4, 5, 8, dtype=torch.float64)
    v, e = normalized(patches.mean(1), tokens)
    s = torch.stack([sum(v @ e[j, t] for t in range(5)) / 5 for j in range(4)], 1)
    assert torch.allclose(L.cgvlm_loss(patches, tokens, logit_scale=6.0), (entropy(6 * s) + entropy(6 * s.T)) / 2, rtol=1e-12)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 0, 1, 0, 0]]).bool()
    dirty = tokens.clone()
    dirty[~mask] = float("nan")
    clean, found = (gradients(lambda *given: L.cgvlm_loss(*given, logit_scale=6.0, token_mask=mask), [patches, each]) for each in (tokens, dirty))
    for ours, theirs in zip(found, clean, strict=True):
        assert torch.equal(ours, theirs)
    assert (found[1][2] == 0).all() and (found[2][~mask] == 0).all()  # without words: neither row nor candidate
    rest = [0, 1, 3]
    assert torch.allclose(found[0], L.cgvlm_loss(patches[rest], tokens[rest], logit_scale=6.0, token_mask=mask[rest]))


def test_items_with_two_embeddings():
    a, b, c, d = (unit(6, 8) for _ in range(4))
    assert torch.equal(L.notellm2_objective((a, b), (c, d), logit_scale=5.0, alpha=0.0), ops.clip_loss(a, b, logit_scale=5.0, normalize=True))
    rows = L.notellm2_objective((a, b), (c, d), logit_scale=5.0, alpha=1.0, direction="rows")
    assert torch.allclose(rows, (entropy(5 * a @ b.T) + entropy(5 * c @ d.T)) / 2, rtol=1e-12)
    gate = nn.LateFusionGate(8).double()
    z = torch.sigmoid(torch.cat([a, b], 1) @ gate.gate.weight.T + gate.gate.bias)
    assert torch.allclose(gate(a, b), z * b + (1 - z) * a, rtol=1e-12)
    with torch.no_grad():
        gate.gate.bias.fill_(100.0)
    assert torch.allclose(gate(a, b), b)


def test_gradients_through_cached_embeddings():
    """Embeddings of a big batch without a graph, one backward of the loss to them, then the encoder chunk by chunk."""
    encoder, given = torch.nn.Linear(12, 8), [torch.randn(20, 12) for _ in range(3)]
    losses = {
        "hard": lambda q, t, n: L.hard_negative_infonce(q, t, n[:, None]),
        "symile": lambda *three: L.symile_loss(three, logit_scale=20.0, generator=torch.Generator().manual_seed(0)),
        "sdm": lambda x, y, _: L.sdm_loss(x, y, torch.arange(20) // 2, temperature=0.1),
    }
    for name, loss in losses.items():
        encoder.zero_grad()
        loss(*map(encoder, given)).backward()
        expected = encoder.weight.grad.clone()
        encoder.zero_grad()
        with torch.no_grad():
            cached = [encoder(batch) for batch in given]
        leaves = [embedding.requires_grad_() for embedding in cached]
        loss(*leaves).backward()
        for batch, leaf in zip(given, leaves, strict=True):
            for rows in torch.arange(20).split(6):
                if leaf.grad is not None:
                    encoder(batch[rows]).backward(leaf.grad[rows])
        assert torch.allclose(encoder.weight.grad, expected, rtol=1e-5, atol=1e-6), name


# -------------------------------------------------------------------------------------------------------------------------------------- bad input


X, IDS5 = torch.randn(5, 6), torch.arange(5)
PARTS = torch.randn(5, 3, 6)
BAD = [
    (lambda: L.sdm_loss(X[0], X, IDS5), r"sdm_loss: x must have 2 dimensions \[B, D\], got a float32 tensor of shape \(6,\)"),
    (lambda: L.sdm_loss(X, X[:4], IDS5), r"sdm_loss: y must be \[B, D\] with B = 5 as x has it, got a float32 tensor of shape \(4, 6\)"),
    (lambda: L.sdm_loss(X, X[:, :4], IDS5), r"sdm_loss: y must be \[B, D\] with D = 6 as x has it"),
    (lambda: L.sdm_loss(X, X.double(), IDS5), "sdm_loss: y must have the dtype of the other arguments, torch.float32, got torch.float64"),
    (lambda: L.sdm_loss(X, X.half(), IDS5), "sdm_loss: y must have the dtype of the other arguments, torch.float32, got torch.float16"),
    (lambda: L.sdm_loss(X.long(), X, IDS5), "sdm_loss: x must be float16, bfloat16, float32 or float64, got a int64 tensor"),
    (lambda: L.sdm_loss(X, X.to("meta"), IDS5), "sdm_loss: y must be on the device of the other arguments, cpu, got meta"),
    (lambda: L.sdm_loss(X, X, IDS5[:4]), r"sdm_loss: ids must be \[B\] = \[5\], got a int64 tensor of shape \(4,\)"),
    (lambda: L.sdm_loss(X, X, IDS5.float()), r"sdm_loss: ids must be an int64 tensor \[B\], got a float32 tensor"),
    (lambda: L.sdm_loss(X, X, IDS5, image_ids=[1, 2]), r"sdm_loss: image_ids must be an int64 tensor \[B\], got list"),
    (lambda: L.sdm_loss(X, X, IDS5, temperature=0.0), "sdm_loss: temperature must be positive and finite, got 0.0"),
    (lambda: L.sdm_loss(X, X, IDS5, temperature=torch.tensor(-1.0)), "sdm_loss: temperature must be positive, got -1.0"),
    (lambda: L.sdm_loss(X, X, IDS5, factor=1.5), "sdm_loss: factor must be between 0 and 1, got 1.5"),
    (lambda: L.sdm_loss(X, X, IDS5, epsilon=0), "sdm_loss: epsilon must be positive, got 0"),
    (lambda: L.id_loss(X, X, IDS5, torch.randn(9, 5)), r"id_loss: weight must be \[K, D\] with D = 6 as x has it"),
    (lambda: L.id_loss(X, X, IDS5, torch.randn(9, 6), torch.randn(8)), r"id_loss: bias must be \[K\] with K = 9 as weight has it"),
    (lambda: L.id_loss(X, X, IDS5 + 6, torch.randn(9, 6)), "target"),
    (lambda: L.mask_tokens(X), r"mask_tokens: tokens must be an int64 tensor \[B, L\]"),
    (lambda: L.mask_tokens(IDS5[None], rate=15), "mask_tokens: rate must be between 0 and 1, got 15"),
    (lambda: L.mask_tokens(IDS5[None], mask_id=1), "mask_tokens: mask_id must be a whole number of at least 2, got int 1"),
    (lambda: L.mask_tokens(IDS5[None], maskable=IDS5 > 2), r"mask_tokens: maskable must be \[B, L\] = \[1, 5\]"),
    (lambda: nn.MaskedCrossModalReasoner(100), "MaskedCrossModalReasoner: width must be a multiple of 64, got 100"),
    (lambda: L.tcl_loss(X, X, X, X, PARTS, PARTS, alpha=2.0), "tcl_loss: alpha must be between 0 and 1, got 2.0"),
    (lambda: L.tcl_loss(X, X, X, X, PARTS, PARTS[:, 0]), r"tcl_loss: text_locals must have 3 dimensions \[B, L, D\]"),
    (lambda: L.tcl_loss(X, X, X, X, PARTS, PARTS, text_mask=WORDS.long()), r"tcl_loss: text_mask must be a bool tensor \[B, L\]"),
    (lambda: L.tcl_loss(X, X, X, X, PARTS, PARTS, image_queue=torch.randn(4, 5)), r"tcl_loss: image_queue must be \[K, D\] with D = 6 as image has it"),
    (lambda: L.hard_negative_infonce(X, X, X), r"hard_negative_infonce: negatives must have 3 dimensions \[B, H, D\]"),
    (lambda: L.hard_negative_infonce(X, X, PARTS, normalize=1), "hard_negative_infonce: normalize must be True or False, got int 1"),
    (lambda: L.hard_negative_infonce(X, X, PARTS, process_group="all"), "hard_negative_infonce: process_group must be None where torch.distributed is not initialised"),
    (lambda: L.symile_loss([X, X[:4]], logit_scale=1.0), r"symile_loss: modalities\[1\] must be \[B, D\] with B = 5 as modalities\[0\] has it"),
    (lambda: L.symile_loss([X], logit_scale=1.0), "symile_loss: modalities must be two or more, got 1"),
    (lambda: L.symile_loss(X, logit_scale=1.0), r"symile_loss: modalities must be a sequence of tensors \[B, D\], got a float32 tensor"),
    (lambda: L.symile_loss([X, X], logit_scale=1.0, negative_sampling="all"), 'symile_loss: negative_sampling must be "n" or "n_squared", got str \'all\''),
    (
        lambda: L.symile_loss([torch.zeros(2000, 1)] * 4, logit_scale=1.0, negative_sampling="n_squared"),
        r'symile_loss: negative_sampling must be "n" for more than 2147483648 combinations, got 2000\^3 = 8000000000',
    ),
    (lambda: L.symile_similarity(X, [X, X[:2]]), r"symile_similarity: queries\[1\] must be \[B, D\] with B = 5 as queries\[0\] has it"),
    (lambda: L.binding_loss(X, [X, X], logit_scale=[1.0]), "binding_loss: logit_scale must be one number or 2, one for each modality, got 1"),
    (lambda: L.binding_loss(X, [X, X[:3]], logit_scale=1.0), r"binding_loss: others\[1\] must be \[B, D\] with B = 5 as anchor has it"),
    (lambda: L.binding_loss(X, [X], logit_scale=1.0, present=WORDS), r"binding_loss: present must be \[B, m\] = \[5, 1\]"),
    (lambda: L.pmrl_loss([X, X], min_gap=0.0), "pmrl_loss: min_gap must be positive, got 0.0"),
    (lambda: L.pmrl_loss([]), "pmrl_loss: modalities must hold at least one tensor, got an empty sequence"),
    (lambda: L.superaligned_loss(X, X, torch.ones(4), logit_scale=1.0), r"superaligned_loss: weight must be \[B\] = \[5\] on x's device cpu, got a float32 tensor of shape \(4,\)"),
    (lambda: L.superaligned_loss(X, X, -torch.ones(5), logit_scale=1.0), "superaligned_loss: weight must not hold negative values, got -1.0"),
    (lambda: L.superaligned_loss(X, X, IDS5, logit_scale=1.0), r"superaligned_loss: weight must be a floating-point tensor \[B\], got a int64 tensor"),
    (lambda: L.cgvlm_loss(PARTS[:, :0], PARTS, logit_scale=1.0), "cgvlm_loss: patches and tokens must have N and L of 1 or more, got 0 and 3"),
    (lambda: L.cgvlm_loss(PARTS, PARTS, logit_scale=1.0, token_mask=WORDS[:4]), r"cgvlm_loss: token_mask must be \[B, L\] = \[5, 3\]"),
    (lambda: L.notellm2_objective((X, X), (X, X), logit_scale=1.0, alpha=-1), "notellm2_objective: alpha must be a finite number of 0 or more, got int -1"),
    (lambda: L.notellm2_objective((X, X, X), (X, X), logit_scale=1.0, alpha=1), r"notellm2_objective: multimodal must be two tensors \[B, D\], got 3"),
]


@pytest.mark.parametrize("position", range(len(BAD)))
def test_bad_input_is_named(position):
    call, message = BAD[position]
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        call()
