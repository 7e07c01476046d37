"""Nearest neighbours and ranks: the order is that of a stable sort of all scores, to the last tie, for any k, threads and instruction set; and no matrix is stored."""

from __future__ import annotations

import pytest
import selection_checks
import torch

from modalign import _load, info
from modalign.ops import Neighbors, knn, target_rank
from modalign.ops.knn import METRICS, reference_knn
from modalign.ops.target_rank import reference_target_rank
from modalign.testing import Maker, peak_memory

F64 = torch.float64
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
DISTANCES = ("sqeuclidean", "euclidean")


def whole_numbers(rows, D, seed, spread=3):
    """Small whole numbers: products and squares are exact in every dtype, and thousands of scores are equal."""
    return torch.randint(-spread, spread + 1, (rows, D), generator=torch.Generator().manual_seed(seed))


def exact(queries, points, k, metric, skip=None, labels=None, bias=None):
    """Indices by float64 and a stable sort."""
    x, y = queries.to(F64), points.to(F64)
    score = x @ y.T
    if metric in DISTANCES:
        score = score - y.square().sum(1) / 2
    if metric == "cosine":
        score = score / y.norm(dim=1).clamp(min=1e-300)
    if bias is not None:
        score = score + bias
    if skip is not None:
        score[skip[:, None] == torch.arange(len(y))] = -torch.inf
    if labels is not None:
        score[labels[0][:, None] == labels[1]] = -torch.inf
    values, indices = score.sort(dim=1, descending=True, stable=True)
    return torch.where(values == -torch.inf, -1, indices)[:, :k]


# ------------------------------------------------------------------------------------------------------------------------------- the order


@pytest.mark.parametrize("metric", ["dot", "sqeuclidean", "euclidean"])
@pytest.mark.parametrize("D", [1, 3, 16, 33, 128, 1025])
def test_ties_to_the_last_one(D, metric):
    for N, M in ((1, 1), (5, 31), (97, 127), (96, 128), (13, 129), (40, 700)):
        queries, points = whole_numbers(N, D, 1).float(), whole_numbers(M, D, 2).float()
        for k in {min(k, M) for k in (1, 2, 31, 33, 128, M)}:
            found = knn(queries, points, k, metric=metric)
            assert torch.equal(found.indices, exact(queries, points, k, metric)), (N, M, k)
            assert found.values.shape == (N, k) and found.indices.dtype is torch.int64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
def test_values_and_indices_of_random_vectors(metric, dtype):
    """Where scores are far enough apart for rounding not to matter, the indices are those of float64."""
    make = Maker(dtype, seed=3)
    queries, points = make.randn(70, 24), make.randn(300, 24)
    found, expected = knn(queries, points, 12, metric=metric), reference_knn(queries.double(), points.double(), 300, metric=metric)
    values = expected.values[:, :12]
    torch.testing.assert_close(found.values.double(), values, rtol=2e-5, atol=2e-5)
    gap = (expected.values.diff(dim=1).abs() < 1e-4)[:, :12]
    sure = ~(gap | torch.cat([gap.new_zeros(70, 1), gap[:, :-1]], 1))
    assert sure.float().mean() > 0.9 and torch.equal(found.indices[sure], expected.indices[:, :12][sure])
    assert found.values.dtype is (F64 if dtype is F64 else torch.float32) and not found.values.requires_grad


@pytest.mark.parametrize("instructions", info.collect()["instruction_sets"]["ran_here"])
@pytest.mark.parametrize("metric", METRICS)
def test_every_instruction_set_and_number_of_threads(metric, instructions):
    queries, points = whole_numbers(130, 40, 4).float(), whole_numbers(400, 40, 5).float()
    expected = exact(queries, points, 20, metric)
    with _load.use_instruction_set(instructions):
        before = torch.get_num_threads()
        try:
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(knn(queries, points, 20, metric=metric))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(a, b) for found in results[1:] for a, b in zip(found, results[0], strict=True))
    if metric != "cosine":  # whose norms are not exact
        assert torch.equal(results[0].indices, expected)
    assert (results[0].indices >= 0).all() and (results[0].values.diff(dim=1) * (1 if metric in DISTANCES else -1) >= 0).all()


@pytest.mark.parametrize("metric", METRICS)
def test_a_smaller_k_is_the_beginning_of_a_larger_one(metric):
    points = Maker(torch.float32, seed=6).randn(900, 8)
    whole = knn(points, k=899, metric=metric, exclude_self=True)
    for k in (1, 5, 31, 32, 33, 64, 100, 128, 200, 500):
        found = knn(points, k=k, metric=metric, exclude_self=True)
        assert torch.equal(found.indices, whole.indices[:, :k]) and torch.equal(found.values, whole.values[:, :k])
    assert torch.equal(whole.indices.sort(1).values, torch.stack([torch.cat([torch.arange(i), torch.arange(i + 1, 900)]) for i in range(900)]))


def test_columns_sorted_worst_first_and_best_first():
    """Every point is better than all before it."""
    queries = torch.ones(3, 1)
    rising = torch.arange(5000.0)[:, None]
    assert knn(queries, rising, 7, metric="dot").indices.tolist() == [list(range(4999, 4992, -1))] * 3
    assert knn(queries, rising.flip(0), 7, metric="dot").indices.tolist() == [list(range(7))] * 3
    assert knn(queries, torch.zeros(5000, 1), 7, metric="dot").indices.tolist() == [list(range(7))] * 3


def test_few_queries_split_the_points_and_many_do_not():
    """The same neighbours for a query alone and among two thousand."""
    points = Maker(torch.float32, seed=8).randn(6000, 16)
    queries = Maker(torch.float32, seed=9).randn(2000, 16)
    many = knn(queries, points, 15, metric="euclidean")
    for i in (0, 777, 1999):
        alone = knn(queries[i : i + 1], points, 15, metric="euclidean")
        assert torch.equal(alone.indices[0], many.indices[i]) and torch.equal(alone.values[0], many.values[i])


# ------------------------------------------------------------------------------------------------------------------------------- who is left out


@pytest.mark.parametrize("metric", METRICS[1:])
def test_self_by_index_and_never_by_position(metric):
    points = torch.cat([Maker(torch.float32, seed=7).randn(40, 6)] * 3)  # everything three times
    found = knn(points, k=2, metric=metric, exclude_self=True)
    twins = torch.stack([torch.arange(120) % 40 + 40 * n for n in range(3)], 1)
    expected = torch.stack([row[row != i] for i, row in enumerate(twins)])
    assert torch.equal(found.indices, expected)
    if metric in DISTANCES:
        assert (found.values == 0).all()  # exactly: norms and products are the same sums


@pytest.mark.parametrize("metric", ["dot", "sqeuclidean"])
def test_ids_labels_and_bias(metric):
    queries, points = whole_numbers(50, 12, 10).float(), whole_numbers(300, 12, 11).float()
    skip = torch.randint(-1, 300, (50,), generator=torch.Generator().manual_seed(1))
    labels = torch.arange(50) % 7, torch.arange(300) % 7
    for k in (1, 20, 250):
        assert torch.equal(knn(queries, points, k, metric=metric, query_ids=skip).indices, exact(queries, points, k, metric, skip=skip))
        assert torch.equal(knn(queries, points, k, metric=metric, exclude_labels=labels).indices, exact(queries, points, k, metric, labels=labels))
    if metric == "dot":
        bias = torch.randint(-5, 6, (300,), generator=torch.Generator().manual_seed(2)).float()
        assert torch.equal(knn(queries, points, 40, metric=metric, bias=bias).indices, exact(queries, points, 40, metric, bias=bias.double()))


def test_bias_beside_cosines():
    """CSLS: the mean similarity of a point to its neighbours is taken off; a row's own length must not weigh it."""
    make = Maker(F64, seed=12)
    queries, points, bias = make.randn(20, 8) * 5, make.randn(90, 8), make.randn(90)
    found = knn(queries, points, 9, bias=bias)
    score = torch.nn.functional.normalize(queries, dim=1) @ torch.nn.functional.normalize(points, dim=1).T + bias
    values, indices = score.sort(1, descending=True)
    assert torch.equal(found.indices, indices[:, :9])
    torch.testing.assert_close(found.values, values[:, :9])


def test_fewer_points_than_k_are_left():
    points = torch.arange(6.0)[:, None]
    labels = torch.tensor([0, 0, 0, 0, 1, 1])
    found = knn(points, k=3, metric="euclidean", exclude_labels=(labels, labels))
    assert found.indices[0].tolist() == [4, 5, -1] and found.values[0].tolist() == [4, 5, torch.inf]
    assert knn(points, k=3, metric="dot", exclude_labels=(labels * 0, labels * 0)).values.eq(-torch.inf).all()


# ------------------------------------------------------------------------------------------------------------------------------- ranks


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
def test_the_rank_of_the_jth_neighbour_is_j(metric, dtype):
    """To the last tie, for all points of a list of all."""
    queries, points = whole_numbers(30, 10, 15).to(dtype), whole_numbers(200, 10, 16).to(dtype)
    order = knn(queries, points, 200, metric=metric).indices
    for place in (0, 1, 7, 100, 199):
        assert (target_rank(queries, points, order[:, place], metric=metric) == place).all()


@pytest.mark.parametrize("metric", ["dot", "sqeuclidean"])
def test_ranks_with_points_left_out(metric):
    queries, points = whole_numbers(300, 6, 17).float(), whole_numbers(700, 6, 18).float()
    generator = torch.Generator().manual_seed(4)
    target, skip = (torch.randint(-1, 700, (300,), generator=generator) for _ in range(2))
    labels = torch.arange(300) % 5, torch.arange(700) % 5
    target[3], skip[4] = -100, target[4]
    for options in ({}, {"query_ids": skip}, {"exclude_labels": labels}):
        found = target_rank(queries, points, target, metric=metric, **options)
        assert torch.equal(found, reference_target_rank(queries.double(), points.double(), target, metric=metric, **options))
        assert (found[target < 0] == -1).all()
    among = target_rank(points, None, (torch.arange(700) + 1) % 700, metric=metric, exclude_self=True)
    assert torch.equal(among, reference_target_rank(points.double(), None, (torch.arange(700) + 1) % 700, metric=metric, exclude_self=True))


def test_ranks_of_few_queries_and_of_what_has_none():
    points = Maker(torch.float32, seed=8).randn(6000, 16)
    target = torch.tensor([5999, 17, 17])
    queries = points[torch.tensor([17, 3, 17])]
    many = target_rank(queries, points, target)
    assert many[2] == 0 and many[0] > 0
    assert all(torch.equal(target_rank(queries[i : i + 1], points, target[i : i + 1])[0], many[i]) for i in range(3))
    broken = points.clone()
    broken[17] = torch.nan
    assert target_rank(queries[1:2], broken, target[1:2]).tolist() == [-1]
    assert target_rank(points[:0], points, target[:0]).shape == (0,)
    assert target_rank(torch.ones(2, 1), torch.ones(50, 1), torch.tensor([0, 49])).tolist() == [0, 49]


def test_ranks_refuse():
    points = torch.ones(9, 3)
    with pytest.raises(TypeError, match=r"target_rank: target must be an int64 tensor \[2\]"):
        target_rank(points[:2], points, torch.zeros(2))
    with pytest.raises(ValueError, match=r"target_rank: target must have shape \[2\]"):
        target_rank(points[:2], points, torch.zeros(3, dtype=torch.int64))
    for wrong in (9, -2):
        with pytest.raises(RuntimeError, match=f"target_rank: target must hold indices from 0 to M - 1 = 8, -1 or -100, got {wrong} at row 1"):
            target_rank(points[:2], points, torch.tensor([0, wrong]))


def test_ranks_compiled_and_mapped():
    points = Maker(torch.float32, seed=19).randn(40, 5)
    target = torch.arange(40).flip(0)
    expected = target_rank(points, None, target, metric="euclidean")
    assert torch.equal(torch.compile(lambda x, t: target_rank(x, None, t, metric="euclidean"), fullgraph=True)(points, target), expected)
    both = torch.vmap(lambda x: target_rank(x, None, target))(torch.stack([points, points + 1]))
    assert torch.equal(both[0], target_rank(points, None, target)) and torch.equal(both[1], target_rank(points + 1, None, target))


# ------------------------------------------------------------------------------------------------------------------------------- edges


def test_nan_infinity_and_zero_vectors():
    points = torch.tensor([[1.0, 0.0], [torch.nan, 0.0], [0.0, 0.0], [-1.0, 0.0], [torch.inf, 1.0]])
    assert knn(points[:1], points[:4], 4, metric="cosine").indices.tolist() == [[0, 2, 3, -1]]
    assert knn(points[:1], points[:4], 4, metric="cosine").values.tolist() == [[1, 0, -1, -torch.inf]]
    assert knn(points[1:2], points, 2, metric="dot").indices.tolist() == [[-1, -1]]
    assert knn(points[2:3], points[:4], 3, metric="cosine").values.tolist() == [[0, 0, 0]]
    assert knn(points[:1], points, 1, metric="dot").indices.tolist() == [[4]]
    minus = torch.tensor([[-0.0], [0.0], [-0.0]])
    assert knn(torch.ones(1, 1), minus, 3, metric="dot").indices.tolist() == [[0, 1, 2]]


def test_points_far_from_the_origin():
    """A product loses there what the difference of the vectors has: the mean is taken off first. Whole numbers near the origin stay as they are."""
    points = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0)) + 1000
    truth = knn(points.double() - 1000, k=11, metric="euclidean").indices
    found = knn(points, k=11, metric="euclidean")
    recall = (found.indices[:, :, None] == truth[:, None]).any(2).float().mean()
    naive = knn(points, k=11, metric="euclidean", center=False)
    assert recall >= 0.999 and (naive.indices[:, :, None] == truth[:, None]).any(2).float().mean() < 0.9
    near = whole_numbers(300, 9, 14).half() + 2
    assert torch.equal(knn(near, k=20, metric="sqeuclidean").indices, exact(near, near, 20, "sqeuclidean"))


def test_empty_and_strided():
    points = Maker(torch.float32, seed=13).randn(50, 12)
    assert [list(part.shape) for part in knn(points[:0], points, 3)] == [[0, 3], [0, 3]]
    expected = knn(points[::2, :6], points[1::2, :6].contiguous(), 4)
    assert torch.equal(knn(points[::2, :6], points[1::2, :6], 4).indices, expected.indices)
    assert torch.equal(knn(points.T.contiguous().T[:5], points, 4).indices, knn(points[:5], points, 4).indices)
    assert isinstance(expected, Neighbors)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (dict(k=0), ValueError, "knn: k must be from 1 to M = 9, the number of points, got 0"),
        (dict(k=10), ValueError, "knn: k must be from 1 to M = 9, the number of points, got 10"),
        (dict(k=9, points=None, exclude_self=True), ValueError, "knn: k must be from 1 to M - 1 = 3, the other points, got 9"),
        (dict(k=2.0), TypeError, "knn: k must be a whole number, got float 2.0"),
        (dict(metric="l2"), ValueError, "knn: metric must be one of dot, cosine, sqeuclidean, euclidean, csls, got str 'l2'"),
        (dict(exclude_self=True), ValueError, "knn: exclude_self must go without points, got both"),
        (dict(precision="ieee"), ValueError, "knn: precision must be one of highest, certified, high, got 'ieee'"),
        (dict(precision=["high"]), ValueError, r"knn: precision must be one of highest, certified, high, got \['high'\]"),
        (dict(refine=1), TypeError, "knn: refine must be"),
        (dict(refine=True), ValueError, "knn: refine must go with a distance and points in one tensor that is taken at once, got metric cosine"),
        (dict(refine=True, metric="euclidean", workspace_bytes=0), ValueError, "knn: refine must go with a distance and points in one tensor that is taken at once, got points in chunks, or workspace_bytes"),
        (dict(queries=torch.ones(4, 3, dtype=torch.int64)), TypeError, "knn: queries must be float16"),
        (dict(queries=torch.ones(4)), ValueError, r"knn: queries must have 2 or more dimensions \[N, D\]|knn: queries must have"),
        (dict(points=torch.ones(9, 4)), ValueError, "knn: points must have queries's width D = 3"),
        (dict(points=torch.ones(9, 3, dtype=F64)), TypeError, "knn: points must have queries's dtype torch.float32"),
        (dict(query_ids=torch.zeros(4)), TypeError, r"knn: query_ids must be an int64 tensor \[4\]"),
        (dict(query_ids=torch.zeros(5, dtype=torch.int64)), ValueError, r"knn: query_ids must have shape \[4\]"),
        (dict(exclude_labels=torch.zeros(4)), TypeError, "knn: exclude_labels must be a pair of int64 tensors"),
        (dict(bias=torch.zeros(9), metric="euclidean"), ValueError, "knn: bias must go with a similarity, got a distance"),
        (dict(bias=torch.zeros(8)), ValueError, r"knn: bias must have shape \[9\]"),
        (dict(center="yes"), ValueError, 'knn: center must be "auto", True or False'),
        (dict(center=True, metric="dot"), ValueError, 'knn: center must be "auto" or False with metric "dot"'),
    ],
)
def test_bad_input(change, kind, message):
    given = dict(queries=torch.ones(4, 3), points=torch.ones(9, 3), k=2) | change
    with pytest.raises(kind, match=message):
        knn(given.pop("queries"), given.pop("points"), given.pop("k"), **given)


def probe(N, M):
    make = Maker(torch.float32, seed=0)
    queries, points = make.randn(N, 32), make.randn(M, 32)
    return lambda: knn(queries, points, 10), lambda: knn(queries[:64], points[:64], 10)


def test_memory_is_linear():
    small, large = (peak_memory("test_knn:probe", N=n, M=n).peak for n in (10_000, 40_000))
    assert large < 6 * small and large < 40_000 * 500


def test_compiled_in_one_graph():
    compiled = torch.compile(lambda x, y: knn(x, y, 3, metric="euclidean"), fullgraph=True, dynamic=True)
    for N in (5, 9, 17):
        make = Maker(torch.float32, seed=N)
        x, y = make.randn(N, 4), make.randn(N + 3, 4)
        assert torch.equal(compiled(x, y).indices, knn(x, y, 3, metric="euclidean").indices)


@pytest.mark.parametrize(("name", "check"), list(selection_checks.checks("cpu")), ids=lambda value: value if isinstance(value, str) else "")
def test_selections_on_this_device(name, check):
    check()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("center", ["auto", True])
def test_a_broken_point_leaves_the_others_alone(bad, center):
    """The mean that is taken off is that of the finite points."""
    points = Maker(torch.float32, seed=3).randn(400, 16) + 1000
    clean = knn(points, k=5, metric="euclidean", exclude_self=True, center=center)
    broken = torch.cat([points, torch.full((1, 16), bad)])
    for options in ({}, {"workspace_bytes": 0}):
        found = knn(broken, k=5, metric="euclidean", exclude_self=True, center=center, **options)
        assert torch.equal(found.indices[:400], clean.indices) and not found.values.isnan().any()
    target = clean.indices[:, 2]
    ranks = target_rank(broken, None, torch.cat([target, target[:1]]), metric="euclidean", exclude_self=True, center=center)
    assert (ranks[:400] == 2).all()


@pytest.mark.parametrize("metric", (*METRICS, "csls"))
def test_there_is_one_precision_on_the_cpu(metric):
    points = torch.randn(60, 9)
    highest = knn(points, k=5, metric=metric)
    for precision in ("certified", "high"):
        assert torch.equal(knn(points, k=5, metric=metric, precision=precision).values, highest.values)


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean"])
def test_refined_distances_have_the_digits_of_differences(metric):
    """Queries beside points whose lengths are a thousand times the distance. Every query has its six points, which the search finds, with too few digits to sort them."""
    directions = torch.nn.functional.normalize(torch.randn(20, 16), dim=1) * 100
    points = directions.repeat_interleave(6, 0) + 0.02 * torch.randn(120, 16)
    plain, refined = (knn(directions, points, 6, metric=metric, refine=refine) for refine in (False, True))
    exact = reference_knn(directions.double(), points.double(), 6, metric=metric)
    assert torch.equal(plain.indices.sort(1).values, exact.indices.sort(1).values) and torch.equal(refined.indices, exact.indices)
    assert not torch.equal(plain.indices, exact.indices) and ((plain.values - exact.values) / exact.values).abs().max() > 1e-3
    torch.testing.assert_close(refined.values.double(), exact.values, rtol=3e-6, atol=0)
    both = knn(directions[None], points[None], 6, metric=metric, refine=True)
    assert torch.equal(both.indices[0], refined.indices) and torch.equal(both.values[0], refined.values)


def test_what_is_refined_and_infinitely_far_still_comes_before_nothing():
    points, labels = torch.tensor([[1.5e19], [-1.5e19], [0.0]]), torch.tensor([0, 1, 0])
    found = knn(points, k=2, metric="sqeuclidean", exclude_labels=(labels, labels), center=False, refine=True)
    assert found.indices[0].tolist() == [1, -1] and (found.values[0] == torch.inf).all()


def test_refined_lists_may_be_short():
    points = torch.tensor([[0.0], [1.0], [3.0]])
    labels = torch.tensor([0, 0, 1])
    found = knn(points, k=2, metric="euclidean", exclude_labels=(labels, labels), refine=True)
    assert found.indices.tolist() == [[2, -1], [2, -1], [1, 0]] and found.values.tolist() == [[3, torch.inf], [2, torch.inf], [2, 3]]
