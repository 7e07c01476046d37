"""The CUDA kernels of knn and target_rank, run by the emulator with the launch plans of the device.

Problems hold small whole numbers: products are then exact in every dtype, so neighbours and ranks are compared bit by bit with a stable sort of float64 scores, and there are many ties.
Every launch also passes the emulator's checks: races between blocks and threads, bounds, alignment, uninitialised words, barriers and lanes.
"""

import functools

import numpy as np
import pytest
import torch

from modalign import _host
from modalign.ops._knn_certified import certified, error_bound
from mutations import SCHEDULES, check_mutations
import test_kernels_host
from test_kernels_host import DTYPES, RAGGED_DEPTH, rounded

OWN = sorted(key for key, kernel in _host.kernels().items() if kernel["family"] == "knn")
METRICS = ("dot", "cosine", "sqeuclidean", "euclidean")  # in the order of csrc/ops/knn.h
KINDS = [*DTYPES, "split"]  # split: float32 in precision "high"
REAL = {"f32": np.float32, "f64": np.float64, "f16": np.float32, "bf16": np.float32, "split": np.float32}
TILE = {"f32": 128, "f64": 64, "f16": 128, "bf16": 128, "split": 128}


def encode(kind, x):
    return test_kernels_host.encode("f32" if kind == "split" else kind, x)


class Search:
    """One problem. `numbers`: how large the whole numbers are, at most; 1 gives thousands of ties. Points may be sorted by their score, worst first."""

    def __init__(self, dtype, N, M, D=8, k=3, metric="sqeuclidean", options=(), numbers=2, worst_first=False, seed=0):
        rng = np.random.default_rng([seed, N, M, D])
        self.dtype, self.N, self.M, self.D, self.k, self.metric = dtype, N, M, D, k, metric
        self.queries, self.points = (rng.integers(-numbers, numbers + 1, (rows, D)).astype(float) for rows in (N, M))
        if metric == "cosine":  # signs, and some rows of zeros: the lengths of the others are equal, so that ties stay ties
            self.queries, self.points = np.sign(self.queries + 0.5), np.sign(self.points + 0.5)
            self.points[::7] = 0
        if worst_first:
            self.points = self.points[np.argsort(self.queries[0] @ self.points.T, kind="stable")]
        self.bias = rng.integers(-3, 4, M).astype(float) if "bias" in options else None
        self.skip = np.where(rng.random(N) < 0.8, rng.integers(0, M, N), -1) if "skip" in options else None
        self.labels = (rng.integers(0, 3, N), rng.integers(0, 3, M)) if "labels" in options else None
        self.target = rng.integers(-1, M, N)

    @functools.cached_property
    def score(self):
        """[N, M], -inf for what is no neighbour."""
        with np.errstate(invalid="ignore"):
            score = self.queries @ self.points.T
        square = (self.points**2).sum(1)
        if self.metric == "cosine":  # in the kernel's precision: products of whole numbers are exact, the scale is one number for all points but zeros
            scale = np.where(square == 0, 0, 1 / np.sqrt(np.where(square == 0, 1, square).astype(REAL[self.dtype])))
            score = (score.astype(REAL[self.dtype]) * scale.astype(REAL[self.dtype])).astype(float)
        elif self.metric != "dot":
            score = score - square / 2
        if self.bias is not None:
            score = score + self.bias
        if self.skip is not None:
            rows = np.flatnonzero(self.skip >= 0)
            score[rows, self.skip[rows]] = -np.inf
        if self.labels is not None:
            score[self.labels[0][:, None] == self.labels[1]] = -np.inf
        return np.where(np.isnan(score), -np.inf, score)

    @functools.cached_property
    def order(self):
        return np.argsort(-self.score, axis=1, kind="stable")

    def arguments(self, **more):
        given = dict(N=self.N, M=self.M, D=self.D, metric=METRICS.index(self.metric), queries=encode(self.dtype, self.queries), points=encode(self.dtype, self.points))
        if self.bias is not None:
            given["bias"] = self.bias.astype(REAL[self.dtype])
        if self.skip is not None:
            given["skip"] = self.skip.astype(np.int64)
        if self.labels is not None:
            given["query_labels"], given["point_labels"] = (one.astype(np.int64) for one in self.labels)
        return given | more

    def search(self, key=None, **options):
        return _host.run(key or f"knn.select.{self.dtype}", self.arguments(k=self.k, **options.pop("more", {})), **options)

    def rank(self, key=None, **options):
        return _host.run(key or f"target_rank.count.{'f32' if self.dtype == 'split' else self.dtype}", self.arguments(target=self.target.astype(np.int64), **options.pop("more", {})), **options)

    def is_right(self, outputs):
        """Bit by bit (the scale of cosine apart, which is rounded twice here and once there)."""
        if "rank" in outputs:
            place = np.argsort(self.order, axis=1)
            own = np.take_along_axis(self.score, np.maximum(self.target, 0)[:, None], 1)[:, 0]
            want = np.where((self.target >= 0) & (own > -np.inf), np.take_along_axis(place, np.maximum(self.target, 0)[:, None], 1)[:, 0], -1)
            return bool((outputs["rank"] == want).all())
        best = self.order[:, : self.k]
        score = np.take_along_axis(self.score, best, 1)
        right = (outputs["indices"] == np.where(score > -np.inf, best, -1)).all()
        close = np.isclose(outputs["scores"], score, rtol=0 if self.metric != "cosine" else 2e-7, atol=0)
        squares = self.metric == "dot" or (outputs["squares"] == (self.queries**2).sum(1)).all()
        return bool(right and close.all() and squares)


SHAPES = {
    "one tile": dict(N=9, M=21, k=4),
    "every point": dict(N=5, M=40, k=40, options=("skip",)),
    "3x2 tiles": dict(N=140, M=300, D=16, k=10, numbers=1, options=("skip", "labels")),
    "worst first": dict(N=3, M=400, D=16, k=20, worst_first=True, numbers=9),
    "long lists": dict(N=2, M=500, D=5, k=150, metric="dot", options=("bias",)),
    "signs": dict(N=20, M=150, D=37, k=7, metric="cosine", options=("skip",)),
}


@functools.cache
def solved(dtype, shape):
    problem = Search(dtype, **SHAPES[shape])
    search, rank = problem.search(), problem.rank()
    assert problem.is_right(search.outputs) and problem.is_right(rank.outputs)
    return {launch["key"] for launch in [*search.launches, *rank.launches] if all(launch["grid"])}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", KINDS)
def test_neighbours_and_ranks_are_those_of_a_stable_sort(dtype, shape):
    assert len(solved(dtype, shape)) == (6 if dtype != "split" else 7 if SHAPES[shape].get("metric") == "dot" else 8)


def test_every_instance_has_run():
    assert {key for key in OWN if not key.startswith("knn_scores")} == set().union(*(solved(dtype, shape) for dtype in KINDS for shape in SHAPES))


@pytest.mark.parametrize("dtype", KINDS)
def test_over_tile_edges(dtype):
    tile = TILE[dtype]
    for N, M, k in ((tile - 1, tile, 1), (tile, tile + 1, 2), (tile + 1, tile - 1, 33), (1, 2 * tile + 1, 32), (2, 3, 3)):
        problem = Search(dtype, N, M, D=3, k=k, numbers=1)
        assert problem.is_right(problem.search().outputs) and problem.is_right(problem.rank().outputs), (N, M, k)


@pytest.mark.parametrize("D", [0, 1, 7, 8, 9, 31, 33, 65])
@pytest.mark.parametrize("dtype", KINDS)
def test_any_dimension(dtype, D):
    problem = Search(dtype, 4, 30, D=D, k=5, options=("labels",))
    assert problem.is_right(problem.search().outputs) and problem.is_right(problem.rank().outputs)


@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16", "split"])
def test_walks_and_panels_do_not_show(dtype):
    """Several walks along the points, whose lists are merged, and several panels of queries; nothing of it in the result."""
    tile = TILE[dtype]
    problem = Search(dtype, tile + 3, 9 * tile + 5, D=4, k=6, numbers=1, options=("skip", "labels"))
    whole = problem.search()
    assert problem.is_right(whole.outputs)
    assert {launch["grid"][0] for launch in whole.launches if ".select." in launch["key"]} == {4}  # two tiles of queries, two walks
    panels = problem.search(more=dict(budget=1))
    assert problem.is_right(panels.outputs) and len([1 for launch in panels.launches if ".select." in launch["key"]]) == 2
    assert {launch["grid"][0] for launch in panels.launches if ".select." in launch["key"]} == {1}
    ranks, in_panels = problem.rank(), problem.rank(more=dict(budget=1))
    assert problem.is_right(ranks.outputs) and problem.is_right(in_panels.outputs)
    assert len([1 for launch in in_panels.launches if ".count." in launch["key"]]) == 2
    with pytest.raises(_host.KernelReport, match="race"):
        problem.search(mutation="tile: drop the barrier after the epilogue")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", KINDS)
def test_schedules_strides_and_misalignment(dtype, schedule):
    problem = Search(dtype, 30, 140, D=21, k=9, metric="dot", options=("bias", "skip", "labels"))

    def padded(rows, pitch):
        wide = np.full((rows.shape[0], pitch), np.nan)
        wide[:, : rows.shape[1]] = rows
        return encode(dtype, wide)

    def spread(vector, step, like):
        wide = np.full((len(vector), step), 7, like)
        wide[:, 0] = vector
        return wide

    more = dict(queries=padded(problem.queries, 29), queries_row_stride=29, points=padded(problem.points, 23), points_row_stride=23)
    more |= dict(bias=spread(problem.bias, 2, REAL[dtype]), bias_element_stride=2, skip=spread(problem.skip, 3, np.int64), skip_element_stride=3)
    more |= dict(query_labels=spread(problem.labels[0], 2, np.int64), query_labels_element_stride=2)
    moved = dict(SCHEDULES[schedule], offsets=dict(queries=1, points=3, scores=1, indices=1, rank=1))
    assert problem.is_right(problem.search(more=more, **moved).outputs) and problem.is_right(problem.rank(more=more, **moved).outputs)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", KINDS)
def test_a_duplicate_is_at_distance_zero_and_duplicates_come_by_index(dtype, metric):
    """Squared lengths have the bits of products, so |q|^2 - 2 z is 0; rows that are equal tie wherever their tiles lie."""
    rng = np.random.default_rng(3)
    row = rounded("f32" if dtype == "split" else dtype, rng.standard_normal((1, 45)) * 100)
    problem = Search(dtype, 3, 150, D=45, k=150, metric=metric)
    problem.queries, problem.points = np.repeat(row, 3, 0), np.repeat(row, 150, 0)
    outputs = problem.search().outputs
    assert (outputs["indices"] == np.arange(150)).all() and (outputs["scores"] == outputs["scores"][0, 0]).all()
    if "euclidean" in metric:
        assert (outputs["squares"][:, None] - 2 * outputs["scores"] == 0).all()
    problem.target = np.array([0, 77, 149])
    assert (problem.rank().outputs["rank"] == problem.target).all()


@pytest.mark.parametrize("dtype", KINDS)
def test_what_is_no_number_is_no_neighbour(dtype):
    problem = Search(dtype, 6, 60, D=5, k=60, metric="dot", options=("bias",))
    problem.points[4, 1] = problem.points[30] = np.nan
    problem.queries[2, 0] = np.nan
    problem.bias[7] = -np.inf
    problem.bias[9] = np.inf
    problem.target[:] = [4, 9, 1, 7, 30, 5]
    outputs = problem.search().outputs
    assert problem.is_right(outputs) and problem.is_right(problem.rank().outputs)
    assert (outputs["indices"][2] == -1).all() and (outputs["indices"][0, -3:] == -1).all() and outputs["indices"][0, 0] == 9


def test_targets_beyond_the_points_are_none():
    """On a device their values are not looked at."""
    problem = Search("f32", 6, 20)
    problem.target = np.array([-100, 20, 1 << 45, -(1 << 40), -1, 3])
    ranks = problem.rank().outputs["rank"]
    assert (ranks[:5] == -1).all() and ranks[5] == np.argsort(problem.order[5])[3]


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_queries(dtype):
    problem = Search(dtype, 0, 5)
    assert problem.search().outputs["indices"].shape == (0, 3) and problem.rank().outputs["rank"].shape == (0,)


# ----------------------------------------------------------------------------------------------------------------------------------- lower precision


def floats(metric, N=9, M=140, D=50, k=140, seed=0, spread=1.0, clustered=False):
    """A problem of any numbers; `clustered`: points in pairs that differ in the last bits."""
    problem = Search("f32", N, M, D, k, metric)
    rng = np.random.default_rng(seed)
    problem.queries, problem.points = ((spread * rng.standard_normal((rows, D))).astype(np.float32).astype(float) for rows in (N, M))
    if clustered:
        near = problem.points[::2] * (1 + 3e-7 * rng.standard_normal(problem.points[::2].shape))
        problem.points[1::2] = near[: M // 2].astype(np.float32)
    return problem


def by_point(outputs, M):
    """[N, M] scores at the place of their point."""
    scores = np.full((len(outputs["scores"]), M), -np.inf, outputs["scores"].dtype)
    rows, places = np.nonzero(outputs["indices"] >= 0)
    scores[rows, outputs["indices"][rows, places]] = outputs["scores"][rows, places]
    return scores


def rescored(problem, indices, dtype="f32", **options):
    more = dict(k=indices.shape[1], indices=np.ascontiguousarray(indices, np.int64))
    return _host.run(f"knn_scores.rescore.{dtype}", problem.arguments(**more), **options)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_chosen_points_get_the_scores_of_the_search(dtype, metric, schedule):
    problem = floats(metric)
    problem.dtype = dtype
    search = problem.search().outputs
    chosen = np.random.default_rng(1).integers(-1, problem.M, (problem.N, 45))
    chosen[0, :3] = [problem.M, 1 << 40, -7]  # on a device values are not looked at: no points
    outputs = rescored(problem, chosen, dtype, **SCHEDULES[schedule]).outputs
    there = (chosen >= 0) & (chosen < problem.M)
    want = np.take_along_axis(by_point(search, problem.M), np.where(there, chosen, 0), 1)
    assert (outputs["scores"] == np.where(there, want, -np.inf)).all()
    assert metric == "dot" or (outputs["squares"] == search["squares"]).all()


@pytest.mark.parametrize("D", [1, 50, 300])
@pytest.mark.parametrize("metric", METRICS)
def test_the_error_of_the_lower_precision_has_a_bound(metric, D):
    """2^-15 |q| |x| and rounding; the bound by which `certified` decides holds and is not twenty times too large where sums are short."""
    for spread in (1.0, 1e-6, 1e6):
        problem = floats(metric, D=D, spread=spread)
        high, highest = problem.search(f"knn.select.split").outputs, problem.search().outputs
        off = np.abs(by_point(high, problem.M).astype(float) - by_point(highest, problem.M)).max(1)
        queries, points = (torch.from_numpy(each).float() for each in (problem.queries, problem.points))
        bound = error_bound(queries, points, metric, None).numpy()
        assert (off <= bound).all() and (D != 1 or off.max() > bound.max() / 20)


def certified_by_emulator(problem):
    """`knn(precision="certified")` with its three searches run by the emulator, and the rows that were searched again."""
    again = []

    def search(key, rows=slice(None), k=problem.k):
        some = floats(problem.metric)
        some.__dict__.update(problem.__dict__, queries=problem.queries[rows], N=len(problem.queries[rows]), k=k)
        outputs = some.search(key).outputs
        return torch.from_numpy(outputs["scores"]), torch.from_numpy(outputs["indices"])

    def exact(indices):
        outputs = rescored(problem, indices.numpy()).outputs
        return torch.from_numpy(outputs["scores"]), torch.from_numpy(outputs["squares"]) if "squares" in outputs else None

    def redo(rows):
        again.extend(rows.tolist())
        return search("knn.select.f32", rows.numpy())

    queries, points = (torch.from_numpy(each).float() for each in (problem.queries, problem.points))
    bound = error_bound(queries, points, problem.metric, None)
    scores, indices, _ = certified(problem.k, problem.M, lambda k: search("knn.select.split", k=k), exact, redo, bound)
    return scores.numpy(), indices.numpy(), again


@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize("metric", METRICS)
def test_certified_has_the_bits_of_the_highest_precision(metric, clustered):
    problem = floats(metric, M=300, k=7, seed=4, clustered=clustered)
    want = problem.search().outputs
    scores, indices, again = certified_by_emulator(problem)
    assert (scores == want["scores"]).all() and (indices == want["indices"]).all() and not again
    high = problem.search("knn.select.split").outputs
    assert not clustered or (high["indices"] != want["indices"]).any()  # it had something to mend


def test_what_cannot_be_certified_is_searched_again():
    """Forty copies that differ in the last bits: more than there are candidates, so none of the first k is sure. Infinite and tiny vectors have no bound; NaN has."""
    problem = floats("sqeuclidean", M=200, k=5, seed=5)
    problem.points[50:130] = (problem.queries[0] + 1e-3 * np.random.default_rng(2).standard_normal((80, 50))).astype(np.float32)
    scores, indices, again = certified_by_emulator(problem)
    want = problem.search().outputs
    assert again == [0] and (scores == want["scores"]).all() and (indices == want["indices"]).all()
    problem.points[3, 2] = np.nan
    assert certified_by_emulator(problem)[2] == [0]
    for wrong in (np.inf, 3e38):
        problem.points[4] = wrong
        scores, indices, again = certified_by_emulator(problem)
        want = problem.search().outputs
        assert len(again) == problem.N and (scores == want["scores"]).all() and (indices == want["indices"]).all()
    problem.points[4] = 1e-22
    assert len(certified_by_emulator(problem)[2]) == problem.N


@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_short_queries_are_certified_too(metric):
    """The square of their length is no number of float32."""
    rng = np.random.default_rng(7)
    problem = floats(metric, M=120, D=20, k=5)
    problem.points = (rng.standard_normal((1, 20)) * (1 + 1e-6 * rng.standard_normal((120, 20)))).astype(np.float32).astype(float)
    problem.queries = (1e-24 * rng.standard_normal((9, 20))).astype(np.float32).astype(float)
    problem.queries[0], problem.queries[1] = 0, np.float32(1e-12) * rng.standard_normal(20).astype(np.float32)
    scores, indices, again = certified_by_emulator(problem)
    want = problem.search().outputs
    assert (scores == want["scores"]).all() and (indices == want["indices"]).all() and set(range(2, 9)) <= set(again)


# ------------------------------------------------------------------------------------------------------------------------------------------ mutations


@functools.cache
def broken_case(dtype, metric="sqeuclidean"):
    """A case that passes every marked place: two tiles of queries, more than one of points in each of two walks, lists that fill up."""
    tile = TILE[dtype]
    problem = Search(dtype, tile + 1, 9 * tile + 5, D=RAGGED_DEPTH.get(dtype, 40), k=3, metric=metric, numbers=1, worst_first=True, options=("skip", "labels"))
    problem.queries[1:, 3:-1] = problem.points[:, 3:-1] = 0  # few scores, so many ties at the k-th place
    if dtype == "split" and metric == "dot":
        problem.queries[:, 0] = 257 * problem.queries[:, 0]  # 9 bits: one plane holds 8
    problem.target[:2] = [problem.order[0, 5], problem.order[1, -1]]
    return problem


def breakable(key):
    """Keys of float kernels that all dtypes share end in f32 as well."""
    dtype = key.rsplit(".", 1)[1]
    if key.startswith("knn_scores"):
        problem = floats("dot", N=5)
        problem.dtype = dtype
        chosen = np.arange(5 * 40).reshape(5, 40) % problem.M
        want = np.take_along_axis(by_point(problem.search().outputs, problem.M), chosen, 1)
        return functools.partial(rescored, problem, chosen, dtype), lambda outputs: bool((outputs["scores"] == want).all())
    problem = broken_case(dtype, "dot" if dtype == "split" and "products" not in key else "sqeuclidean")
    return functools.partial(problem.rank if key.startswith("target_rank") else problem.search, key=key), problem.is_right


HARMLESS = ("tile: drop the barrier before the epilogue",)  # these epilogues begin with a barrier of their own


@pytest.mark.parametrize("key", OWN)
def test_seeded_mutations_are_caught(key):
    run, is_right = breakable(key)
    check_mutations(key, run, is_right, HARMLESS)
