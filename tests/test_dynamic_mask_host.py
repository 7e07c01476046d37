"""The choice of dynamic masks on CUDA, run by the emulator, against the heap of the CPU and the definition."""

import functools

import numpy as np
import pytest

from modalign import _host
from mutations import SCHEDULES, check_mutations

REAL = {"f32": np.float32, "f64": np.float64}


def scores(dtype, lines, N, kind="any", seed=0):
    x = np.random.default_rng([seed, lines, N]).standard_normal((lines, N))
    if kind == "ties":
        x = np.round(x)
    if kind == "equal":
        x = x * 0
    if kind == "rising":
        x = np.sort(x, -1)
    if kind == "padded":
        x[x < 0] = -np.inf
    return x.astype(REAL[dtype])


def by_hand(line, keep):
    """The first t >= j such that `keep` of the keys 0 ... t are better, or as good and later."""
    ends = []
    for j, own in enumerate(line):
        better = np.cumsum([other > own or (other == own and s > j) for s, other in enumerate(line)])
        beaten = np.flatnonzero(better >= keep)
        ends.append(max(j, beaten[0]) if len(beaten) else len(line))
    return np.array(ends, np.int32)


def run(x, keep, **options):
    dtype = "f64" if x.dtype == np.float64 else "f32"
    return _host.run(f"dynamic_mask.ends.{dtype}", dict(scores=x, keep=keep), **options)


@pytest.mark.parametrize("kind", ["any", "ties", "equal", "rising", "padded"])
@pytest.mark.parametrize(("lines", "N", "keep"), [(1, 1, 1), (2, 31, 1), (3, 33, 5), (1, 100, 100), (2, 130, 40), (1, 130, 500)])
@pytest.mark.parametrize("dtype", REAL)
def test_ends_are_those_of_the_definition(dtype, lines, N, keep, kind):
    x = scores(dtype, lines, N, kind)
    np.testing.assert_array_equal(run(x, keep).outputs["ends"], [by_hand(line, keep) for line in x])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_and_misalignment(schedule):
    x = scores("f32", 2, 70, "ties")
    np.testing.assert_array_equal(run(x, 7, offsets=dict(scores=1, ends=1), **SCHEDULES[schedule]).outputs["ends"], [by_hand(line, 7) for line in x])


def test_not_a_number_is_the_least():
    x = scores("f32", 1, 40)
    y = x.copy()
    x[0, 5], y[0, 5] = np.nan, -np.inf
    np.testing.assert_array_equal(run(x, 4).outputs["ends"], run(y, 4).outputs["ends"])


@pytest.mark.parametrize("dtype", REAL)
def test_seeded_mutations_are_caught(dtype):
    x = scores(dtype, 2, 131, "ties")
    want = np.array([by_hand(line, 9) for line in x])
    check_mutations(f"dynamic_mask.ends.{dtype}", functools.partial(run, x, 9), lambda outputs: np.array_equal(outputs["ends"], want))
