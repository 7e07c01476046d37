"""The CUDA kernels of segment_max_similarity, run by the emulator with the launch plans of the device.

Most problems hold small whole numbers: products and gradients are then exact in every dtype whatever the order of sums, so results are compared bit
by bit with the definition in numpy, and there are many ties. Every launch also passes the emulator's checks: races between blocks and threads,
bounds, alignment, uninitialised words, barriers and lanes.
"""

import functools
import itertools

import numpy as np
import pytest

from modalign import _host
from mutations import SCHEDULES, check_mutations
from test_kernels_host import DTYPES, FORWARD, RAGGED_DEPTH, decode, deviation, encode, rounded

OWN = sorted(key for key, kernel in _host.kernels().items() if kernel["family"] == "segment_max_similarity")
TILE = {"f32": 128, "f64": 64, "f16": 128, "bf16": 128}


class Segments:
    """One random problem. `lengths` of the segments; what is left of the R rows is cut at random, S - len(lengths) times, some pieces empty."""

    def __init__(self, dtype, R, S, A, D=8, lengths=(), seed=0, whole=True):
        rng = np.random.default_rng([seed, R, S, A, D])
        self.dtype, self.R, self.S, self.A, self.D = dtype, R, S, A, D
        used = sum(lengths)
        cuts = np.sort(rng.integers(used, R + 1, max(S - len(lengths) - 1, 0)))
        self.offsets = np.concatenate([[0], np.cumsum(lengths, dtype=int), cuts, [R]])[: S + 1].astype(np.int64)
        self.offsets[-1] = R if S else 0

        def draw(*shape):
            return rng.integers(-2, 3, shape).astype(float) if whole else rounded(dtype, rng.standard_normal(shape) / np.sqrt(D))

        self.x, self.y, self.upstream = draw(R, D), draw(A, D), draw(S, A)

    def arguments(self):
        sizes = dict(R=self.R, S=self.S, A=self.A, D=self.D, offsets=self.offsets)
        return dict(sizes, x=encode(self.dtype, self.x), y=encode(self.dtype, self.y))

    def backward_arguments(self, indices=None, need_x=True, need_y=True):
        indices = self.want[1] if indices is None else indices
        return dict(self.arguments(), grad=encode(self.dtype, self.upstream), indices=indices, need_x=need_x, need_y=need_y)

    def forward(self, key=None, arguments=None, **options):
        return _host.run(key or f"segment_max_similarity.forward.{self.dtype}", arguments or self.arguments(), **options)

    def backward(self, key=None, arguments=None, **options):
        return _host.run(key or f"segment_max_similarity.gather_x.{self.dtype}", arguments or self.backward_arguments(), **options)

    @functools.cached_property
    def want(self):
        """Values and indices, [S, A]."""
        with np.errstate(invalid="ignore"):
            products = self.x @ self.y.T
        values, indices = np.full((self.S, self.A), -np.inf), np.full((self.S, self.A), -1)
        for s, (begin, end) in enumerate(itertools.pairwise(self.offsets)):
            if begin < end:
                indices[s] = begin + np.argmax(products[begin:end], 0)  # the first of the largest, or of the NaN
                values[s] = products[indices[s], np.arange(self.A)]
        return values, indices

    @functools.cached_property
    def want_gradients(self):
        x, y = np.zeros_like(self.x), np.zeros_like(self.y)
        for s, a in np.argwhere(self.want[1] >= 0):
            r = self.want[1][s, a]
            x[r] += self.upstream[s, a] * self.y[a]
            y[a] += self.upstream[s, a] * self.x[r]
        return x, y

    def is_right(self, outputs):
        """Bit by bit: what forward or backward returned of a problem of whole numbers."""
        if "values" in outputs:
            return bool((outputs["values"] == encode(self.dtype, self.want[0])).all() and (outputs["indices"] == self.want[1]).all())
        pairs = zip(("grad_x", "grad_y"), self.want_gradients, strict=True)
        return all((decode(self.dtype, outputs[name]) == rounded(self.dtype, want)).all() for name, want in pairs)


SHAPES = {
    "one tile": dict(R=9, S=3, A=7),
    "3x2 tiles": dict(R=300, S=5, A=140, D=16, lengths=(3, 290)),
    "ragged": dict(R=411, S=90, A=203, D=45, lengths=(1, 1, 130)),
}


@functools.cache
def solved(dtype, shape):
    """Runs forward and backward, and returns the keys that were launched."""
    problem = Segments(dtype, **SHAPES[shape])
    forward, backward = problem.forward(), problem.backward()
    assert problem.is_right(forward.outputs) and problem.is_right(backward.outputs)
    return {launch["key"] for launch in [*forward.launches, *backward.launches] if all(launch["grid"])}


# -------------------------------------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_match_the_definition(dtype, shape):
    assert len(solved(dtype, shape)) == (4 if shape == "one tile" else 5)  # segments over several walks alone are merged


def test_every_instance_has_run():
    """A key of the compiled table that no case above launches fails here."""
    assert set(OWN) == set().union(*(solved(dtype, shape) for dtype in DTYPES for shape in SHAPES))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_schedules_strides_and_misalignment(dtype, schedule):
    problem = Segments(dtype, R=150, S=9, A=131, D=21, lengths=(2, 140))
    spread = dict(x_row_stride=29, y_row_stride=23, offsets_element_stride=2)
    offsets = np.full((problem.S + 1, 2), 7, np.int64)
    offsets[:, 0] = problem.offsets

    def padded(rows, pitch):
        wide = np.full((rows.shape[0], pitch), np.nan)
        wide[:, : rows.shape[1]] = rows
        return encode(dtype, wide)

    arguments = problem.arguments() | spread | dict(offsets=offsets, x=padded(problem.x, 29), y=padded(problem.y, 23))
    moved = dict(SCHEDULES[schedule], offsets=dict(x=1, y=3, values=1, grad=1, grad_x=1, grad_y=1))
    assert problem.is_right(problem.forward(arguments=arguments, **moved).outputs)
    arguments |= dict(indices=problem.want[1], need_x=True, need_y=True)
    arguments |= dict(grad=encode(dtype, problem.upstream.T), grad_row_stride=1, grad_element_stride=problem.S)
    assert problem.is_right(problem.backward(arguments=arguments, **moved).outputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_numbers(dtype):
    problem = Segments(dtype, R=200, S=12, A=50, D=37, whole=False)
    outputs = problem.forward().outputs
    values, indices = problem.want
    filled = indices >= 0
    assert deviation(decode(dtype, outputs["values"])[filled], values[filled]) <= FORWARD[dtype]
    chosen = np.where(filled, np.einsum("sad,ad->sa", problem.x[outputs["indices"]], problem.y), -np.inf)
    np.testing.assert_allclose(chosen, values, rtol=0, atol=1e-6)  # another row only where two are level
    backward = problem.backward().outputs
    for name, want in zip(("grad_x", "grad_y"), problem.want_gradients, strict=True):
        assert deviation(decode(dtype, backward[name]), want) <= FORWARD[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_upstream_of_strides_zero_and_one_gradient_alone(dtype):
    problem = Segments(dtype, R=40, S=5, A=9, D=12)
    problem.upstream[:] = 2
    arguments = problem.backward_arguments() | dict(grad=encode(dtype, [2.0]), grad_row_stride=0, grad_element_stride=0)
    both = problem.backward(arguments=arguments).outputs
    assert problem.is_right(both)
    for name, key in (("x", "gather_x"), ("y", "gather_y")):
        alone = problem.backward(
            key=f"segment_max_similarity.{key}.{dtype}", arguments=arguments | {"need_x": name == "x", "need_y": name == "y"}
        ).outputs
        assert list(alone) == [f"grad_{name}"] and alone[f"grad_{name}"].tobytes() == both[f"grad_{name}"].tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_several_pieces(dtype):
    """A warp sums 256 elements of a row at a time."""
    problem = Segments(dtype, R=7, S=2, A=3, D=530)
    problem.x[:, 40:], problem.y[:, 40:] = np.sign(problem.x[:, 40:]), 0
    assert problem.is_right(problem.forward().outputs) and problem.is_right(problem.backward().outputs)


# --------------------------------------------------------------------------------------------------------------------------------------------- walks


@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16"])
def test_walks_of_several_tiles(dtype):
    """More row tiles than slots: the segment in progress is kept from tile to tile, and segments over several walks still meet."""
    tile = TILE[dtype]
    R = 65 * tile + 5
    problem = Segments(dtype, R=R, S=9, A=3, D=4, lengths=(tile + 3, 1, 7 * tile, 2 * tile, 10 * tile + 1))
    result = problem.forward()
    assert problem.is_right(result.outputs)
    assert {launch["grid"][0] for launch in result.launches if ".forward." in launch["key"]} == {33}
    with pytest.raises(_host.KernelReport, match="race_shared"):
        problem.forward(mutation="tile: drop the barrier after the epilogue")


@pytest.mark.parametrize("begin", [0, 1, 127, 128, 129])
def test_a_segment_over_many_walks(begin):
    """Its best row may lie in any of them, and ties across walks go to the lowest."""
    for best in ((begin,), (300,), (255, 256), (640,), (200, 300, 640)):
        problem = Segments("f32", R=660, S=3, A=2, D=4, lengths=(begin, 641 - begin))
        problem.x[:] = 0
        problem.x[list(best)] = 1
        problem.y[:] = 1
        outputs = problem.forward().outputs
        assert problem.is_right(outputs) and (outputs["indices"][1] == max(min(best), begin)).all()


# --------------------------------------------------------------------------------------------------------------------------------------------- edges


@pytest.mark.parametrize("sizes", [dict(R=0), dict(S=0, R=0), dict(A=0), dict(D=0), dict(S=1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty(dtype, sizes):
    problem = Segments(dtype, **dict(dict(R=6, S=2, A=3, D=5), **sizes))
    assert problem.is_right(problem.forward().outputs) and problem.is_right(problem.backward().outputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_a_number_and_infinity(dtype):
    problem = Segments(dtype, R=300, S=6, A=5, D=6, lengths=(10, 0, 250))
    problem.x[:, 0], problem.y[:, 0] = 1, 1
    problem.x[[150, 152, 200], 3] = np.nan
    problem.x[:10, 0] = -np.inf
    problem.x[290, 0] = np.inf
    outputs = problem.forward().outputs
    values = decode(dtype, outputs["values"])
    assert (outputs["indices"] == problem.want[1]).all()
    assert np.array_equal(values, problem.want[0], equal_nan=True) and np.isnan(values[2]).all() and (values[0] == -np.inf).all()
    assert (outputs["indices"][2] == 150).all() and (outputs["indices"][0] == 0).all() and (outputs["indices"][1] == -1).all()
    problem.y[4, 1] = np.nan
    del problem.want
    assert np.array_equal(decode(dtype, problem.forward().outputs["values"]), problem.want[0], equal_nan=True)


WRONG_OFFSETS = {
    "ends early": [0, 4, 90],
    "ends late": [0, 4, 1 << 40],
    "begins late": [30, 60, 120],
    "begins below": [-5, 60, 120],
    "falls": [0, 100, 40, 120],
    "never meets a row": [500, 600, 900],
}


@pytest.mark.parametrize("name", WRONG_OFFSETS)
def test_wrong_offsets_and_indices_stay_in_bounds(name):
    """On a device their values are not looked at."""
    problem = Segments("f32", R=120, S=len(WRONG_OFFSETS[name]) - 1, A=6)
    problem.offsets = np.array(WRONG_OFFSETS[name], np.int64)
    indices = problem.forward().outputs["indices"]
    assert (indices >= -1).all() and (indices < 120).all()
    wild = np.where(indices % 2 == 0, indices, 1 << 45)
    for array in problem.backward(arguments=problem.backward_arguments(indices=wild)).outputs.values():
        assert np.isfinite(array).all()


# ------------------------------------------------------------------------------------------------------------------------------------------ mutations

# Reached by walks of several tiles alone: test_walks_of_several_tiles.
HARMLESS = {("forward", "tile: drop the barrier after the epilogue")}


@functools.cache
def broken_case(dtype):
    """A case that passes every marked place of a kernel."""
    problem = Segments(dtype, R=411, S=20, A=135, D=RAGGED_DEPTH[dtype], lengths=(1, 5, 380))
    problem.x[-1] = problem.y[0] * 2  # the last row is chosen
    return problem


def breakable(key):
    problem = broken_case(key.rsplit(".", 1)[1])
    return functools.partial(problem.backward if ".gather_" in key else problem.forward, key=key), problem


@pytest.mark.parametrize("key", OWN)
def test_seeded_mutations_are_caught(key):
    run, problem = breakable(key)
    check_mutations(key, run, problem.is_right, [place for part, place in HARMLESS if part == key.split(".")[1]])
