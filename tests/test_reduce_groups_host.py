"""The CUDA kernels of reduce_groups and spread_groups, run by the emulator, bit by bit against the definition in numpy.

Elements and weights are small whole numbers, so sums are exact in every dtype; shares and means are taken in the type that the kernels calculate in.
Every launch also passes the emulator's checks: races, bounds, alignment, uninitialised words.
"""

import functools

import numpy as np
import pytest

from modalign import _host
from mutations import SCHEDULES, check_mutations
from test_kernels_host import DTYPES, decode, encode

OWN = sorted(key for key, kernel in _host.kernels().items() if kernel["family"] == "reduce_groups")
SUM, MEAN, MAX = range(3)
PIECE = {"f32": 128, "f64": 64, "f16": 256, "bf16": 256}  # elements of a row that a warp has
REAL = {"f32": np.float32, "f64": np.float64, "f16": np.float32, "bf16": np.float32}


class Groups:
    def __init__(self, dtype, sizes, C, mode, weights=True, seed=0):
        rng = np.random.default_rng([seed, C, *sizes])
        self.dtype, self.real, self.sizes, self.C, self.mode = dtype, REAL[dtype], sizes, C, mode
        self.R, self.M = sum(sizes), len(sizes)
        order = rng.permutation(self.R)
        self.offsets = np.concatenate([[0], np.cumsum(sizes, dtype=int)]).astype(np.int32)
        self.members = order.astype(np.int32)
        for begin, end in zip(self.offsets[:-1], self.offsets[1:], strict=True):
            self.members[begin:end].sort()
        self.weight = rng.integers(1, 5, self.R).astype(self.real) if weights else None
        self.x, self.y = rng.integers(-8, 9, (self.R, C)).astype(float), rng.integers(-8, 9, (self.M, C)).astype(float)

    def arguments(self, op):
        source = self.x if op == "reduce" else self.y
        arrays = dict(members=self.members, offsets=self.offsets, weight=self.weight)
        return {"R": self.R, "M": self.M, "C": self.C, "mode": self.mode, "from": encode(self.dtype, source), **arrays}

    def run(self, op, arguments=None, **options):
        return _host.run(f"{op}_groups.{self.dtype}", arguments or self.arguments(op), **options)

    def pieces(self):
        w = np.ones(self.R, self.real) if self.weight is None else self.weight
        for g, (begin, end) in enumerate(zip(self.offsets[:-1], self.offsets[1:], strict=True)):
            rows = self.members[begin:end]
            yield g, rows, w[rows], w[rows].sum(dtype=self.real)

    def want_reduced(self):
        y, total = np.zeros((self.M, self.C), self.real), np.zeros(self.M, self.real)
        for g, rows, w, sum_of_weights in self.pieces():
            x = self.x[rows].astype(self.real)
            total[g] = sum_of_weights
            if self.mode == MAX:
                y[g] = x.max(0, initial=-np.inf)
            elif self.mode == MEAN and len(rows) == 1:
                y[g] = x[0]
            elif self.mode == SUM or sum_of_weights != 0:
                y[g] = (w[:, None] * x).sum(0, dtype=self.real)
                if self.mode == MEAN and len(rows):
                    y[g] /= sum_of_weights
        return dict(to=decode(self.dtype, encode(self.dtype, y)), total=total)

    def want_spread(self):
        x = np.zeros((self.R, self.C), self.real)
        for g, rows, w, sum_of_weights in self.pieces():
            if self.mode == MEAN:
                w = np.ones_like(w) if len(rows) == 1 else w / sum_of_weights if sum_of_weights != 0 else w * 0
            x[rows] = np.where(w[:, None] == 0, 0, w[:, None] * self.y[g].astype(self.real))
        return dict(to=decode(self.dtype, encode(self.dtype, x)))

    def is_right(self, op, outputs):
        want = self.want_reduced() if op == "reduce" else self.want_spread()
        got = {name: decode(self.dtype, array) if name == "to" else array for name, array in outputs.items()}
        return all(np.array_equal(got[name], want[name], equal_nan=True) for name in want)


def ops(mode):
    return ["reduce"] if mode == MAX else ["reduce", "spread"]


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("mode", [SUM, MEAN, MAX])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_match_the_definition(dtype, mode, weights):
    for C in (1, 16, 37, PIECE[dtype], PIECE[dtype] + 8, 2 * PIECE[dtype] + 3):
        problem = Groups(dtype, [1, 3, 0, 1, 2, 9, 0], C, mode, weights)
        for op in ops(mode):
            assert problem.is_right(op, problem.run(op).outputs), (op, C)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_schedules_strides_and_misalignment(dtype, schedule):
    problem = Groups(dtype, [2, 1, 4, 1], 48, MEAN)
    for op in ("reduce", "spread"):
        source = problem.x if op == "reduce" else problem.y
        wide = np.full((len(source), 3 * 51), np.nan)
        wide[:, : 3 * 48 : 3] = source
        strided = problem.arguments(op) | {"from": encode(dtype, wide), "from_row_stride": 153, "from_element_stride": 3}
        assert problem.is_right(op, problem.run(op, arguments=strided, **SCHEDULES[schedule]).outputs)
        for moved in ({"from": 1}, dict(to=1), dict(members=1, offsets=1, weight=1)):
            assert problem.is_right(op, problem.run(op, offsets=moved, **SCHEDULES[schedule]).outputs), moved


@pytest.mark.parametrize("dtype", DTYPES)
def test_aligned_rows_that_lie_apart(dtype):
    problem = Groups(dtype, [2, 1, 4, 1], 48, SUM)
    wide = np.full((problem.R, 64), np.nan)
    wide[:, :48] = problem.x
    arguments = problem.arguments("reduce") | {"from": encode(dtype, wide), "from_row_stride": 64}
    assert problem.is_right("reduce", problem.run("reduce", arguments=arguments).outputs)


@pytest.mark.parametrize("mode", [SUM, MEAN, MAX])
@pytest.mark.parametrize(("sizes", "C"), [([], 8), ([0, 0], 8), ([2, 1], 0), ([1], 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty(dtype, sizes, C, mode):
    problem = Groups(dtype, sizes, C, mode)
    for op in ops(mode):
        assert problem.is_right(op, problem.run(op).outputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_totals_of_zero_and_rows_alone(dtype):
    problem = Groups(dtype, [2, 1, 3, 1], 24, MEAN)
    problem.weight[problem.members] = np.array([1, -1, 0, 0, 0, 0, 0.3], problem.real)
    problem.y[0, 3], problem.x[problem.members[0], 4], problem.x[problem.members[2], 5] = np.nan, np.inf, np.nan
    reduced, spread = problem.run("reduce").outputs, problem.run("spread").outputs
    assert problem.is_right("reduce", reduced) and problem.is_right("spread", spread)
    to = decode(dtype, reduced["to"])
    assert (to[[0, 2]] == 0).all() and np.array_equal(to[[1, 3]], problem.x[problem.members[[2, 6]]], equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_maximum_of_not_a_number_and_infinity(dtype):
    problem = Groups(dtype, [3, 2, 2], 10, MAX)
    problem.x[problem.members[1], 2] = np.nan
    problem.x[problem.members[[3, 4]], 5] = -np.inf
    problem.x[problem.members[5], 5] = np.inf
    assert problem.is_right("reduce", problem.run("reduce").outputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_of_two_equal_rows_is_that_row(dtype):
    problem = Groups(dtype, [2, 1, 2], 40, MEAN, weights=False)
    for begin, end in zip(problem.offsets[:-1], problem.offsets[1:], strict=True):
        problem.x[problem.members[begin:end]] = np.random.default_rng(begin).standard_normal(40)
    x = encode(dtype, problem.x)
    got = problem.run("reduce").outputs["to"]
    assert (got == x[problem.members[problem.offsets[:-1]]]).all()


@pytest.mark.parametrize("name", ["offsets", "members"])
def test_wrong_groups_stay_in_bounds(name):
    """On a device their values are not looked at."""
    problem = Groups("f32", [2, 1, 4], 16, MEAN)
    wrong = dict(offsets=np.array([-3, 500, 4, 1 << 30], np.int32), members=np.array([-1, 7, 1 << 30, 3, -(1 << 31), 2, 6], np.int32))
    outputs = problem.run("reduce", arguments=problem.arguments("reduce") | {name: wrong[name]}).outputs
    assert np.isfinite(outputs["to"]).all()


# ------------------------------------------------------------------------------------------------------------------------------------------ mutations


class Several:
    """Cases that between them pass every marked place of a kernel, run one after the other."""

    def __init__(self, op, dtype):
        self.op, self.cases = op, [Groups(dtype, [1, 3, 2, 1], 37, MEAN), Groups(dtype, [2, 1, 4], 16, SUM)]
        balanced = self.cases[0]
        balanced.weight[balanced.members[[0, 4, 5]]] = [0, 2, -2]
        if op == "reduce":
            self.cases.append(Groups(dtype, [3, 1], 16, MAX))
            self.cases[-1].x[self.cases[-1].members[1], 2] = np.nan

    def run(self, **options):
        results = [case.run(self.op, **options) for case in self.cases]
        reached = any(result.mutation_reached for result in results)
        return type("Results", (), dict(outputs=[result.outputs for result in results], mutation_reached=reached))

    def is_right(self, outputs):
        return all(case.is_right(self.op, got) for case, got in zip(self.cases, outputs, strict=True))


@pytest.mark.parametrize("key", OWN)
def test_seeded_mutations_are_caught(key):
    op, dtype = key.replace("_groups", "").split(".")
    cases = Several(op, dtype)
    with np.errstate(all="ignore"):
        check_mutations(key, functools.partial(cases.run), cases.is_right)


def test_every_instance_is_tried():
    assert {f"{op}_groups.{dtype}" for op in ("reduce", "spread") for dtype in DTYPES} == set(OWN)
