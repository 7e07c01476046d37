"""The CUDA kernels of match_tokens, run by the emulator with the launch plans of the device, against the definition in numpy.

Most features are signs: all lengths are then equal and all products whole numbers, so cosines that are equal in float64 are equal in every dtype, and
there are many of them. Every launch also passes the emulator's checks: races between blocks and threads, bounds, alignment, uninitialised words,
barriers and lanes.
"""

import functools

import numpy as np
import pytest

from modalign import _host
from mutations import SCHEDULES, check_mutations
from test_kernels_host import DTYPES, RAGGED_DEPTH, encode, rounded

OWN = sorted(key for key, kernel in _host.kernels().items() if kernel["family"] == "match_tokens")
LINES = {"f32": 128, "f64": 64, "f16": 128, "bf16": 128}  # of a tile
SCORE = {"f32": 2e-6, "f64": 1e-14, "f16": 2e-6, "bf16": 2e-6}  # largest deviation of a cosine


def best_targets(x, sources, targets):
    """Cosine and destination of every source."""
    with np.errstate(invalid="ignore", divide="ignore"):
        lengths = np.sqrt((x * x).sum(1, keepdims=True))
        unit = np.where(lengths == 0, 0, x / lengths)
        cosines = unit[sources] @ unit[targets].T
    cosines[np.isnan(cosines)] = -np.inf
    if not len(targets):
        return np.full(len(sources), -np.inf), np.zeros(len(sources), int)
    chosen = (cosines >= cosines.max(1, keepdims=True) - 1e-12).argmax(1)
    return cosines[np.arange(len(sources)), chosen], targets[chosen]


def match_item(x, first, split, r, threshold, keep_order):
    """Of one item: scores, and its groups, lists of tokens, in the order of the rows of the output."""
    n = len(x)
    tokens = np.arange(n)
    if split >= 0:
        sources, targets, apart = tokens[:split], tokens[split:], tokens[:0]
        most = min(r, len(sources)) if len(targets) else 0
    else:
        apart, rest = tokens[:first], tokens[first:]
        sources, targets = rest[rest % 2 == 0], rest[rest % 2 == 1]
        most = min(r, (n - len(apart)) // 2)
    values, partners = best_targets(x, sources, targets)
    scores = np.full(n, -np.inf)
    scores[sources] = values
    falling = np.array(sorted(range(len(sources)), key=lambda a: (-round(values[a], 9), a)), int)
    joining = [a for a in falling[:most] if threshold is None or values[a] > threshold]
    staying = [a for a in falling if a not in joining]
    groups = {t: [t] for t in tokens if t not in sources[joining]}
    for a in joining:
        groups[partners[a]].append(sources[a])
    groups = {home: sorted(members) for home, members in groups.items()}
    if keep_order or not joining:
        return scores, sorted(groups.values())
    order = list(sources[staying]) + list(targets) if first == 0 else [*apart, *sorted(sources[staying]), *targets]
    return scores, [groups[home] for home in order]


class Tokens:
    """One problem: items of these lengths, packed or, where all are equal, a batch."""

    def __init__(
        self, dtype, lengths, D=16, first=0, split=-1, r=1 << 40, threshold=None, keep_order=False, packed=True, signs=True, blocks=None, seed=0
    ):
        rng = np.random.default_rng([seed, D, *lengths])
        self.dtype, self.lengths, self.D, self.packed, self.blocks = dtype, list(lengths), D, packed, blocks
        self.choice = dict(first=first, split=split, r=r, keep_order=keep_order, threshold=threshold)
        shape = (sum(lengths), D)
        self.x = rng.choice([-1.0, 1.0], shape) if signs else rounded(dtype, rng.standard_normal(shape))
        self.cu = np.concatenate([[0], np.cumsum(lengths, dtype=int)]).astype(np.int32)

    def arguments(self):
        sizes = dict(B=len(self.lengths), T=len(self.x), D=self.D, blocks=self.blocks)
        packed = dict(cu=self.cu, longest=max(self.lengths, default=0)) if self.packed else {}
        return {**sizes, **packed, **self.choice, "features": encode(self.dtype, self.x)}

    def run(self, key=None, arguments=None, **options):
        return _host.run(key or f"match_tokens.scores.{self.dtype}", arguments or self.arguments(), **options)

    @functools.cached_property
    def want(self):
        scores, groups, rows = [np.empty(0)], [], [0]
        for begin, end in zip(self.cu[:-1], self.cu[1:], strict=True):
            values, members = match_item(self.x[begin:end], **self.choice)
            scores.append(values)
            groups += [[begin + m for m in group] for group in members]
            rows.append(len(groups))
        T = len(self.x)
        group = np.zeros(T, int)
        for g, members in enumerate(groups):
            group[members] = g
        ends = np.cumsum([len(members) for members in groups], dtype=int)
        offsets = np.concatenate([[0], ends, np.full(T, T)])[: T + 1]
        return dict(score=np.concatenate(scores), group=group, members=np.array(sum(groups, []), int), offsets=offsets, rows=rows)

    def is_right(self, outputs):
        want = self.want
        near = np.isclose(outputs["score"], want["score"], rtol=0, atol=SCORE[self.dtype])
        return bool(near.all()) and all(np.array_equal(outputs[name], want[name]) for name in ("group", "members", "offsets", "rows"))


SHAPES = {
    "one tile": dict(lengths=[9, 9], packed=False, r=2),
    "3x2 tiles": dict(lengths=[440], split=140, r=60, packed=False),
    "ragged": dict(lengths=[0, 1, 2, 3, 301, 70, 0, 131], first=1, r=40, threshold=0.31),
}


@functools.cache
def solved(dtype, shape):
    """Runs a problem, and returns the keys that were launched."""
    problem = Tokens(dtype, D=RAGGED_DEPTH[dtype] if shape == "ragged" else 16, **SHAPES[shape])
    result = problem.run()
    assert problem.is_right(result.outputs)
    return {launch["key"] for launch in result.launches if all(launch["grid"])}


# -------------------------------------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_match_the_definition(dtype, shape):
    assert len(solved(dtype, shape)) == 6


def test_every_instance_has_run():
    """A key of the compiled table that no case above launches fails here."""
    assert set(OWN) == set().union(*(solved(dtype, shape) for dtype in DTYPES for shape in SHAPES))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_schedules_strides_and_misalignment(dtype, schedule):
    problem = Tokens(dtype, [150, 0, 83], D=21, first=2, r=30)
    wide = np.full((len(problem.x), 29 * 2), np.nan)
    wide[:, : 2 * problem.D : 2] = problem.x
    arguments = problem.arguments() | dict(features=encode(dtype, wide), features_row_stride=58, features_element_stride=2)
    moved = dict(features=1, cu=1, score=1, group=1, members=3, offsets=1, rows=1)
    assert problem.is_right(problem.run(arguments=arguments, offsets=moved, **SCHEDULES[schedule]).outputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_items_of_a_batch_may_lie_apart(dtype):
    problem = Tokens(dtype, [21, 21, 21], D=16, r=5, packed=False)
    wide = np.full((3, 25, 24), np.nan)
    wide[:, :21, :16] = problem.x.reshape(3, 21, 16)
    arguments = problem.arguments() | dict(features=encode(dtype, wide), features_batch_stride=25 * 24, features_row_stride=24)
    assert problem.is_right(problem.run(arguments=arguments).outputs)


@pytest.mark.parametrize("split", [-1, 90])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_numbers(dtype, split):
    problem = Tokens(dtype, [170, 60, 131], D=37, split=split, r=50, signs=False)
    assert problem.is_right(problem.run().outputs)


@pytest.mark.parametrize("keep_order", [False, True])
@pytest.mark.parametrize("threshold", [None, -2.0, 0.0, 0.25, 2.0])
@pytest.mark.parametrize("first", [0, 1, 2, 3, 4, 5])
def test_choices(first, threshold, keep_order):
    for r in (0, 1, 6, 1000):
        problem = Tokens("f32", [0, 1, 2, 3, 4, 5, 6, 7, 20, 0, 33], first=first, r=r, threshold=threshold, keep_order=keep_order)
        assert problem.is_right(problem.run().outputs), r


@pytest.mark.parametrize("keep_order", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.25])
@pytest.mark.parametrize("split", [0, 1, 3, 16, 33, 50])
def test_two_sets(split, threshold, keep_order):
    for r in (0, 1, 9, 1000):
        problem = Tokens("f32", [0, 1, 2, 4, 20, 0, 33], split=split, r=r, threshold=threshold, keep_order=keep_order)
        assert problem.is_right(problem.run().outputs), r


@pytest.mark.parametrize("dtype", DTYPES)
def test_walks_of_any_length(dtype):
    """The same bits from one walk along all destinations as from one for each tile."""
    lines = LINES[dtype]
    one = Tokens(dtype, [5 * lines + 3, lines], D=4, r=lines, blocks=1)
    several = [Tokens(dtype, one.lengths, D=4, r=lines, blocks=blocks) for blocks in (8, 512)]
    outputs = one.run().outputs
    assert one.is_right(outputs)
    for other in several:
        got = other.run().outputs
        assert all(got[name].tobytes() == outputs[name].tobytes() for name in outputs)


# --------------------------------------------------------------------------------------------------------------------------------------------- edges


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [1], [1, 1], [2], [3], [0, 2, 0]], ids=str)
def test_small_and_empty(dtype, lengths):
    problem = Tokens(dtype, lengths)
    assert problem.is_right(problem.run().outputs)
    if len(set(lengths)) <= 1:
        batch = Tokens(dtype, lengths, packed=False)
        assert batch.is_right(batch.run().outputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_elements(dtype):
    problem = Tokens(dtype, [7, 4], D=0, r=2)
    assert problem.is_right(problem.run().outputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_tokens(dtype):
    """All cosines are 1: the first sources join the first destination."""
    problem = Tokens(dtype, [300], r=70)
    problem.x[:] = 1
    outputs = problem.run().outputs
    assert problem.is_right(outputs)
    assert set(outputs["group"][0:140:2]) == {outputs["group"][1]}


@pytest.mark.parametrize("keep_order", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_vectors_not_a_number_and_infinity(dtype, keep_order):
    problem = Tokens(dtype, [40, 8, 6, 6], r=100, keep_order=keep_order)
    x = problem.x
    x[[0, 1, 6, 13, 22]] = 0
    x[[2, 3, 18, 31], 5] = np.nan
    x[[4, 9], 7] = np.inf
    x[24] = -np.inf
    x[41:48:2, 0] = np.nan  # an item whose destinations are all NaN
    x[48:54:2, 1] = np.nan  # sources
    x[54:60] = 0
    outputs = problem.run().outputs
    assert problem.is_right(outputs)
    assert (outputs["score"][40:54:2] == -np.inf).all() and (outputs["score"][54:60:2] == 0).all()
    assert (outputs["group"][40:48:2] == outputs["group"][41]).all()


@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16"])
def test_lengths_of_many_magnitudes(dtype):
    problem = Tokens(dtype, [64], r=20, D=12, signs=False)
    problem.x *= 2.0 ** np.random.default_rng(1).integers(-40, 40, (64, 1))
    assert problem.is_right(problem.run().outputs)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_lengths_whose_squares_are_no_floats(dtype):
    """Too short: all cosines are 0. Too long: that, or none."""
    problem = Tokens(dtype, [24, 30], r=100)
    problem.x[[0, 4, 7]] *= 2.0**-70
    arguments = problem.arguments()
    problem.x[[0, 4, 7]] = 0
    np.testing.assert_allclose(problem.run(arguments=arguments).outputs["score"][::2], problem.want["score"][::2], rtol=0, atol=SCORE[dtype])
    problem.x[[0, 4, 7]] = 2.0**90
    score = problem.run().outputs["score"]
    assert np.isin(score[[0, 4]], [0, -np.inf]).all() and (score[24:54:2] > 0).all() and not (score > 1.0001).any()


WRONG_LENGTHS = {
    "ends early": [0, 4, 40],
    "ends late": [0, 20, 2_000_000_000],
    "begins late": [30, 40, 60],
    "begins below": [-5, 20, 60],
    "is longer than longest": [0, 2, 60],
    "never meets a token": [500, 600, 900],
}


@pytest.mark.parametrize("name", WRONG_LENGTHS)
def test_wrong_lengths_stay_in_bounds(name):
    """On a device their values are not looked at."""
    problem = Tokens("f32", [30, 30], r=8)
    outputs = problem.run(arguments=problem.arguments() | dict(cu=np.array(WRONG_LENGTHS[name], np.int32))).outputs
    for name, most in dict(group=59, members=59, offsets=60, rows=60).items():
        assert (outputs[name] >= 0).all() and (outputs[name] <= most).all(), name


# ------------------------------------------------------------------------------------------------------------------------------------------ mutations


class Several:
    """Cases that between them pass every marked place of a kernel, run one after the other."""

    def __init__(self, dtype):
        lines = LINES[dtype]
        long = Tokens(dtype, [2 * lines + 6, 40], D=RAGGED_DEPTH[dtype], r=30, blocks=1)
        choosy = Tokens(dtype, [30, 9, 2, 12], first=1, r=6, threshold=0.25)
        long.x[6] = 0
        long.x[8, 3] = np.inf
        walks = Tokens(dtype, [4 * lines], D=20, r=30)
        self.cases = [long, walks, choosy, Tokens(dtype, [50, 8], r=14, keep_order=True), Tokens(dtype, [30, 11], r=0)]

    def run(self, key, **options):
        results = []
        for case in self.cases:
            results.append(case.run(key=key, **options))
        reached = any(result.mutation_reached for result in results)
        return type("Results", (), dict(outputs=[result.outputs for result in results], mutation_reached=reached))

    def is_right(self, outputs):
        return all(case.is_right(got) for case, got in zip(self.cases, outputs, strict=True))


@pytest.mark.parametrize("key", OWN)
def test_seeded_mutations_are_caught(key):
    suffix = key.rsplit(".", 1)[1]
    cases = Several(suffix if suffix in DTYPES else "f32")
    check_mutations(key, functools.partial(cases.run, key), cases.is_right)
