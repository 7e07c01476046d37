"""Similarities of representations against dense float64 formulas with masks and kernels n x n, their invariants, hand cases, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from modalign import metrics
from modalign.metrics.alignment_score import ALIGNMENT_SCORES, NEIGHBORHOOD_SCORES
from modalign.metrics.null_calibration import calibrated
from modalign.testing import Maker

F64 = torch.float64


def pair(n=60, D=9, E=7, seed=1, dtype=F64):
    """Two spaces that share some directions."""
    make = Maker(dtype, seed=seed)
    x = make.randn(n, D)
    return x, x @ make.randn(D, E) + 2 * make.randn(n, E)


def lists(x, k, normalize=True, own=False):
    """By a stable sort of all similarities."""
    x = x.double() / x.double().norm(dim=1, keepdim=True) if normalize else x.double()
    score = x @ x.T
    return (score if own else score.fill_diagonal_(-torch.inf)).sort(dim=1, descending=True, stable=True).indices[:, :k]


def mask(chosen, n):
    return torch.zeros(n, n, dtype=F64).scatter(1, chosen, 1.0)


# --------------------------------------------------------------------------------------------------------------------------------- neighbourhoods


@pytest.mark.parametrize("k", [1, 10, 59, "rice", "sqrt", "sturges"])
@pytest.mark.parametrize("normalize", [True, False])
def test_mutual_knn_is_an_intersection_of_masks(k, normalize):
    x, y = pair()
    count = {"rice": 8, "sqrt": 8, "sturges": 7}.get(k, k)
    shared = mask(lists(x, count, normalize), 60) * mask(lists(y, count, normalize), 60)
    found = metrics.mutual_knn(x, y, k, normalize=normalize)
    torch.testing.assert_close(found, shared.sum() / (60 * count))
    assert metrics.mutual_knn(x.float(), y.bfloat16(), 5).dtype is torch.float32


def test_mutual_knn_by_hand_and_its_invariants():
    x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    y = x[[0, 2, 1, 3]]
    assert metrics.mutual_knn(x, y, 1) == 0 and metrics.mutual_knn(x, x, 1) == 1 and metrics.mutual_knn(x, y, 3) == 1
    a, b = pair(seed=2)
    turn = torch.linalg.qr(Maker(F64, seed=3).randn(9, 9)).Q
    assert metrics.mutual_knn(a, 3 * a @ turn, 10) == 1
    assert metrics.mutual_knn(a, b, 10) == metrics.mutual_knn(b, a, 10)
    make = Maker(torch.float32, seed=4)
    assert abs(float(metrics.mutual_knn(make.randn(500, 30), make.randn(500, 30), 10)) - 10 / 499) < 0.004
    assert metrics.mutual_knn(torch.ones(9, 3), torch.ones(9, 2), 4) == 1  # all equal: the lowest indices on both sides
    assert [metrics._neighbors.neighbor_count("m", rule, 5000) for rule in ("rice", "sqrt", "sturges")] == [35, 71, 14]


@pytest.mark.parametrize("exact", [False, True])
def test_outliers_are_clamped(exact):
    x, y = pair(seed=5)
    x[3, 2] = 1000
    limit = torch.quantile(x.abs(), 0.95) if exact else torch.quantile(x.abs(), 0.95, dim=1).mean()
    other = torch.quantile(y.abs(), 0.95) if exact else torch.quantile(y.abs(), 0.95, dim=1).mean()
    expected = metrics.mutual_knn(x.clamp(-limit, limit), y.clamp(-other, other), 6)
    assert metrics.mutual_knn(x, y, 6, clamp_quantile=0.95, exact_quantile=exact) == expected


def test_overlap_of_lists():
    a, b = torch.tensor([[1, 2, -1], [0, 2, 3]]), torch.tensor([[-1, 2, 5], [3, 0, 1]])
    assert float(metrics.knn_overlap(a, b)) == 3 / 6
    with pytest.raises(ValueError, match="knn_overlap: b must have the shape of a"):
        metrics.knn_overlap(a, b[:, :2])
    with pytest.raises(ValueError, match=r"knn_overlap: a must be an int64 tensor \[n, k\]"):
        metrics.knn_overlap(a.float(), b)


def subsequence(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def levenshtein(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


@pytest.mark.parametrize("k", [1, 4, 25])
def test_cycles_and_orders_against_loops(k):
    x, y = pair(n=40, seed=6)
    a, b = lists(x, k), lists(y, k)
    back = [any(i in a[j] for j in b[i]) for i in range(40)]
    assert float(metrics.cycle_knn(x, y, k)) == pytest.approx(sum(back) / 40)
    both = list(zip(a.tolist(), b.tolist(), strict=True))
    assert float(metrics.lcs_knn(x, y, k)) == pytest.approx(sum(subsequence(*each) for each in both) / 40)
    assert float(metrics.edit_distance_knn(x, y, k)) == pytest.approx(1 - sum(levenshtein(*each) for each in both) / 40 / k)


# ---------------------------------------------------------------------------------------------------------------------------------------- kernels


def hsic(K, L, unbiased):
    n = len(K)
    if not unbiased:
        H = torch.eye(n, dtype=F64) - 1 / n
        return (K @ H @ L @ H).trace()
    K, L = K.clone().fill_diagonal_(0), L.clone().fill_diagonal_(0)
    return ((K * L.T).sum() + K.sum() * L.sum() / (n - 1) / (n - 2) - 2 * (K @ L).sum() / (n - 2)) / n / (n - 3)


def aligned(K, L, unbiased):
    return hsic(K, L, unbiased) / ((hsic(K, K, unbiased) * hsic(L, L, unbiased)).sqrt() + 1e-6)


def gaussian(x, sigma):
    square = torch.cdist(x, x).square()
    return torch.exp(-square / 2 / (square.median() if sigma == "median" else sigma**2))


@pytest.mark.parametrize("offset", [0, 1000])
def test_cka_is_that_of_kernels(offset):
    x, y = pair(seed=7)
    K, L = x @ x.T, y @ y.T
    x, y = x + offset, y - offset
    torch.testing.assert_close(metrics.cka(x, y), aligned(K, L, False), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(metrics.unbiased_cka(x, y), aligned(K, L, True), rtol=1e-6, atol=1e-9)
    if offset == 0:
        torch.testing.assert_close(metrics.cka(x.float(), y.float()).double(), aligned(K, L, False), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sigma", [1.0, 3, "median"])
@pytest.mark.parametrize("unbiased", [False, True])
def test_cka_rbf_is_that_of_kernels(sigma, unbiased, monkeypatch):
    monkeypatch.setattr(__import__("sys").modules["modalign.metrics.cka"], "PANEL_ROWS", 25)
    x, y = pair(seed=8)
    expected = aligned(gaussian(x, sigma), gaussian(y, sigma), unbiased)
    torch.testing.assert_close(metrics.cka_rbf(x, y, sigma, unbiased=unbiased), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("k", [2, 10, 59])
def test_cknna_is_that_of_masked_kernels(unbiased, normalize, k):
    x, y = pair(seed=9)
    u, v = (z / z.norm(dim=1, keepdim=True) if normalize else z for z in (x, y))
    K, L, own = u @ u.T, v @ v.T, not unbiased
    A, B = mask(lists(x, k, normalize, own), 60), mask(lists(y, k, normalize, own), 60)
    cross = hsic(A * B * K, A * B * L, unbiased)
    expected = cross / ((hsic(A * K, A * K, unbiased) * hsic(B * L, B * L, unbiased)).clamp(min=0).sqrt() + 1e-6)
    torch.testing.assert_close(metrics.cknna(x, y, k, unbiased=unbiased, normalize=normalize), expected, rtol=1e-8, atol=1e-9)
    agnostic = metrics.cknna(x, y, k, unbiased=unbiased, normalize=normalize, distance_agnostic=True)
    torch.testing.assert_close(agnostic, (A * B).sum() / (60 * k))


def test_invariants_of_kernel_scores():
    x, _ = pair(seed=10)
    turn = torch.linalg.qr(Maker(F64, seed=11).randn(9, 9)).Q
    for score in (metrics.cka, metrics.unbiased_cka, metrics.procrustes):
        turned = x @ turn if score is metrics.procrustes else 5 * x @ turn + 3
        torch.testing.assert_close(score(x, turned), torch.ones((), dtype=F64), atol=1e-6, rtol=0)
    make = Maker(torch.float32, seed=12)
    wide = make.randn(60, 2000), make.randn(60, 2000)
    assert metrics.cka(*wide) > 0.9 and metrics.unbiased_cka(*wide).abs() < 0.05


# -------------------------------------------------------------------------------------------------------------------------------------- other scores


def test_svcca_procrustes_rsa_against_their_formulas():
    x, y = pair(n=50, seed=13)
    U, V = (torch.linalg.svd((z - z.mean(0)) / z.std(0), full_matrices=False).U[:, :4] for z in (x, y))
    torch.testing.assert_close(metrics.svcca(x, y, 4), torch.linalg.svdvals(U.T @ V).mean())
    wide = Maker(F64, seed=14).randn(20, 90)
    U, V = (torch.linalg.svd((z - z.mean(0)) / z.std(0), full_matrices=False).U[:, :4] for z in (wide, y[:20]))
    torch.testing.assert_close(metrics.svcca(wide, y[:20], 4), torch.linalg.svdvals(U.T @ V).mean())
    torch.testing.assert_close(metrics.pwcca(x, x @ Maker(F64, seed=15).randn(9, 9), ridge=0), torch.ones((), dtype=F64))
    a, b = x - x.mean(0), y - y.mean(0)
    P, _, Qt = torch.linalg.svd(a.T @ torch.nn.functional.pad(b, (0, 2)))
    torch.testing.assert_close(metrics.procrustes(x, y), 1 - (a @ P @ Qt - torch.nn.functional.pad(b, (0, 2))).norm() / b.norm())
    free = torch.linalg.svdvals(a.T @ b).sum() / a.norm() / b.norm()
    torch.testing.assert_close(metrics.procrustes(x, y, scale_free=True), free)
    i, j = torch.triu_indices(50, 50, 1)
    distances = [torch.cdist(z, z)[i, j] for z in (x, y)]
    ranks = [(d[:, None] > d).sum(1) + ((d[:, None] == d).sum(1) - 1) / 2 for d in distances]
    torch.testing.assert_close(metrics.rsa(x, y, pairs=None), torch.corrcoef(torch.stack(ranks).double())[0, 1])


def test_rsa_draws_pairs_and_shares_ranks():
    line = torch.arange(300.0, dtype=F64)[:, None]  # many equal distances
    assert float(metrics.rsa(line, line * 2 + 1, pairs=None)) == pytest.approx(1)
    x, y = pair(n=300, seed=16)
    whole, part = metrics.rsa(x, y, pairs=None), metrics.rsa(x, y)
    assert abs(whole - part) < 0.03 and whole != part and part == metrics.rsa(x, y)
    assert metrics.rsa(x, y, generator=torch.Generator().manual_seed(5)) != part
    with pytest.raises(ValueError, match="rsa: X and Y must have distances that differ"):
        metrics.rsa(torch.ones(5, 2), x[:5])


def test_hcs_and_hops():
    x, y = pair(seed=17)
    unit = [z / z.norm(dim=1, keepdim=True) for z in (x, y)]
    for centering in ("mean", "released", "none"):
        sides = [u - (0 if centering == "none" else u.mean(0) if centering == "mean" else z.mean(0)) for u, z in zip(unit, (x, y), strict=True)]
        P, Q = ((z @ z.T / 0.3).softmax(1) for z in sides)
        for reduction in ("sum", "mean"):
            total = 0
            for level in (1, 2, 3):
                p, q = torch.linalg.matrix_power(P, level), torch.linalg.matrix_power(Q, level)
                rows = (p * (2 * p / (p + q)).log() + q * (2 * q / (p + q)).log()).sum(1) / 2
                total += (rows.sum() if reduction == "sum" else rows.mean()) / level
            found = metrics.hcs(x, y, temperature=0.3, reduction=reduction, centering=centering)
            torch.testing.assert_close(found, torch.exp(-total / 3))
    K, L = x @ x.T, y @ y.T
    expected = sum(aligned(torch.linalg.matrix_power(K, n), torch.linalg.matrix_power(L, n), False) for n in (1, 2, 3)) / 3
    torch.testing.assert_close(metrics.l_hop_cka(x, y), expected, rtol=1e-6, atol=1e-9)


def preserved(X, Z, k):
    """By the definition, with loops."""
    n, total = len(X), 0
    by_x, by_z = (torch.cdist(a, a).fill_diagonal_(-1).sort(dim=1, stable=True).indices[:, 1:].tolist() for a in (X, Z))
    for i in range(n):
        total += sum(by_x[i].index(j) + 1 - k for j in by_z[i][:k] if j not in by_x[i][:k])
    return 1 - 2 / (n * k * (2 * n - 3 * k - 1)) * total


@pytest.mark.parametrize("k", [1, 5, 39])
def test_trustworthiness_and_continuity(k, monkeypatch):
    monkeypatch.setattr(__import__("sys").modules["modalign.metrics.trustworthiness"], "ROWS", 7)
    x, y = pair(seed=18)
    assert float(metrics.trustworthiness(x, y, k)) == pytest.approx(preserved(x, y, k), abs=1e-12)
    assert float(metrics.continuity(x, y, k)) == pytest.approx(preserved(y, x, k), abs=1e-12)
    assert metrics.trustworthiness(x, x * 2, k) == 1
    twice = torch.cat([x[:30], x[:30]])
    assert metrics.trustworthiness(twice, twice, k) == 1  # a twin is a neighbour, and oneself is not


@pytest.mark.parametrize("reduction", ["global", "pairwise", "max", "min", "mean", "median", "max_mean", "diag_mean", "diag_median", "diag_max"])
def test_implicit_alignment(reduction):
    make = Maker(F64, seed=19)
    u, v = make.randn(5, 6, 8), make.randn(5, 4, 8)
    here, there = make.mask(5, 6), make.mask(5, 4)
    here[:, 0] = there[:, 0] = True
    unit = torch.nn.functional.normalize
    cosines = [unit(a[h], dim=1) @ unit(b[t], dim=1).T for a, b, h, t in zip(u, v, here, there, strict=True)]
    means = [torch.stack([z[m].mean(0) for z, m in zip(side, kept, strict=True)]) for side, kept in ((u, here), (v, there))]
    expected = {
        "global": lambda: torch.cosine_similarity(means[0].mean(0), means[1].mean(0), dim=0),
        "pairwise": lambda: torch.cosine_similarity(*means).mean(),
        "max_mean": lambda: sum(c.amax(1).mean() for c in cosines) / 5,
        "diag_mean": lambda: sum(c.diagonal().mean() for c in cosines) / 5,
        "diag_median": lambda: sum(c.diagonal().median() for c in cosines) / 5,
        "diag_max": lambda: sum(c.diagonal().max() for c in cosines) / 5,
    }.get(reduction, lambda: sum(getattr(c, reduction)() for c in cosines) / 5)()
    torch.testing.assert_close(metrics.implicit_alignment(u, v, reduction, perceptual_mask=here, textual_mask=there), expected)
    torch.testing.assert_close(metrics.implicit_alignment(u, 3 * u[:, :1].expand_as(u), "max"), torch.ones((), dtype=F64))


# -------------------------------------------------------------------------------------------------------------------------------------- calibration


def test_calibration_by_hand():
    null = torch.arange(1, 20, dtype=F64) / 100  # 0.01 ... 0.19
    found = calibrated(0.5, null, 0.05, 1.0)
    assert found == pytest.approx((0.5, 0.19, (0.5 - 0.19) / 0.81, 1 / 20))
    assert calibrated(0.1, null, 0.05, 1.0).calibrated == 0 and calibrated(0.1, null, 0.05, 1.0).p_value == 11 / 20


def test_short_cuts_of_permutations_are_what_evaluation_gives():
    x, y = pair(seed=20)
    for name, score in (("mutual_knn", lambda a, b: metrics.mutual_knn(a, b, 6)), ("cka", metrics.cka)):
        short, long = metrics.null_calibration(name, x, y, permutations=30, topk=6), metrics.null_calibration(score, x, y, permutations=30)
        assert short == pytest.approx(long)
    unrelated = metrics.null_calibration("mutual_knn", *(Maker(F64, seed=s).randn(60, 5) for s in (21, 22)), topk=5)
    assert unrelated.calibrated < 0.05 and metrics.null_calibration("mutual_knn", x, x, topk=5).p_value == 1 / 201


# ---------------------------------------------------------------------------------------------------------------------------- gradients, names, input


@pytest.mark.parametrize("name", ["cka", "unbiased_cka", "cka_rbf", "cknna", "svcca", "procrustes", "hcs", "l_hop_cka"])
def test_gradients(name):
    x, y = pair(n=8, D=3, E=3, seed=23)
    options = {"cknna": {"k": 3}, "svcca": {"q": 2}, "hcs": {"temperature": 0.5}}.get(name, {})
    score = getattr(metrics, name)
    assert gradcheck(lambda a, b: score(a, b, **options), (x.requires_grad_(), y.requires_grad_()), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ALIGNMENT_SCORES)
def test_names_and_bad_input(name):
    x, y = pair(n=30, seed=24)
    expected = getattr(metrics, name)(x, y, **({"k": 4} if name in NEIGHBORHOOD_SCORES else {"q": 4} if name == "svcca" else {}))
    options = {"q": 4} if name == "svcca" else {}
    assert metrics.alignment_score(name, x, y, topk=4, **options) == expected
    single = metrics.alignment_score(name, x.float(), y.float(), topk=4, **options)
    assert single.dim() == 0 and single.dtype is torch.float32 and math.isfinite(single)
    with pytest.raises(ValueError, match=f"{name}: Y must have as many rows as X"):
        metrics.alignment_score(name, x, y[:9], topk=4)
    with pytest.raises(ValueError, match=rf"{name}: X must have 2 dimensions \[n, D\]|{name}: X must have"):
        metrics.alignment_score(name, x[0], y, topk=4)
    with pytest.raises(TypeError, match=f"{name}: Y must be float16, bfloat16, float32 or float64"):
        metrics.alignment_score(name, x, y.long(), topk=4)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda x: metrics.mutual_knn(x, x, 30), ValueError, "mutual_knn: k must be from 1 to n - 1 = 29, got 30"),
        (lambda x: metrics.mutual_knn(x, x, "half"), ValueError, "mutual_knn: k must be a whole number or one of rice, sqrt, sturges, got 'half'"),
        (lambda x: metrics.cycle_knn(x, x, 2.0), TypeError, "cycle_knn: k must be a whole number or one of rice"),
        (lambda x: metrics.mutual_knn(x, x, clamp_quantile=0), ValueError, "mutual_knn: clamp_quantile must be above 0 and at most 1, got 0"),
        (lambda x: metrics.unbiased_cka(x[:3], x[:3]), ValueError, "unbiased_cka: X must have 4 rows or more, got 3"),
        (lambda x: metrics.cka(x * 0 + 1, x), ValueError, "cka: X and Y must vary over their rows, got constant ones"),
        (lambda x: metrics.cka_rbf(x, x, 0), ValueError, 'cka_rbf: sigma must be a positive number or "median", got int 0'),
        (lambda x: metrics.svcca(x, x, 10), ValueError, "svcca: q must be at most the rank of X, 9, got 10"),
        (lambda x: metrics.svcca(x, x, 0), ValueError, "svcca: q must be a whole number of 1 or more, got int 0"),
        (lambda x: metrics.pwcca(x, x, -1), ValueError, "pwcca: ridge must be a number of 0 or more"),
        (lambda x: metrics.rsa(x, x, pairs=1), ValueError, "rsa: pairs must be None or a whole number of 2 or more"),
        (lambda x: metrics.hcs(x, x, 0), ValueError, "hcs: levels must be a whole number of 1 or more, got int 0"),
        (lambda x: metrics.hcs(x, x, temperature=0), ValueError, "hcs: temperature must be a positive number"),
        (lambda x: metrics.hcs(x, x, reduction="max"), ValueError, "hcs: reduction must be one of sum, mean, got 'max'"),
        (lambda x: metrics.trustworthiness(x, x, 20), ValueError, r"trustworthiness: k must be 1 or more and less than \(2n - 1\) / 3 = 19.67, got 20"),
        (lambda x: metrics.continuity(x, x, "ten"), TypeError, "continuity: k must be a whole number"),
        (lambda x: metrics.alignment_score("cosine", x, x), ValueError, "alignment_score: name must be one of mutual_knn"),
        (lambda x: metrics.alignment_score("cknna", x, x, None), ValueError, "alignment_score: topk must be given for cknna"),
        (lambda x: metrics.null_calibration("cka", x, x, permutations=0), ValueError, "null_calibration: permutations must be a whole number of 1 or more"),
        (lambda x: metrics.null_calibration("cka", x, x, alpha=1), ValueError, "null_calibration: alpha must be between 0 and 1"),
        (lambda x: metrics.null_calibration("l2", x, x), ValueError, "null_calibration: score must be one of"),
        (lambda x: metrics.null_calibration(3, x, x), TypeError, "null_calibration: score must be a name or a function"),
        (lambda x: metrics.implicit_alignment(x[None], x[None], "sum"), ValueError, "implicit_alignment: reduction must be one of global"),
        (lambda x: metrics.implicit_alignment(x, x), ValueError, r"implicit_alignment: perceptual must have|perceptual must have shape \[B, T, D\]"),
        (
            lambda x: metrics.implicit_alignment(x[None], x[None], textual_mask=torch.zeros(1, 30, dtype=torch.bool)),
            ValueError,
            "implicit_alignment: textual_mask must leave every example a token, got 1 without",
        ),
    ],
)
def test_refused(call, kind, message):
    with pytest.raises(kind, match=message):
        call(pair(n=30)[0])
