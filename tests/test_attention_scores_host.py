"""The CUDA kernels of attention_column_sum and attention_row_statistics, run by the emulator with the launch plans of the device.

References are float64 numpy from the definitions in csrc/ops/attention_scores.h, probabilities as in test_masked_attention_host.py. Every launch also passes the emulator's checks: races
between blocks and threads, bounds, alignment, uninitialised words, barriers and lanes.
"""

import functools

import numpy as np
import pytest
import torch

from modalign import _host, masks
from mutations import SCHEDULES, check_mutations
from test_kernels_host import DTYPES, deviation, encode
from test_masked_attention_host import BLOCK, REAL, Attention, any_intervals, cases, pairs, tokens_mask

OWN = sorted(key for key, kernel in _host.kernels().items() if kernel["family"] == "attention_scores")
REDUCTIONS = ("sum", "square", "max", "kept")  # in the order of csrc/ops/attention_scores.h
ALLOWED = {"f32": 5e-5, "f64": 1e-13, "f16": 5e-5, "bf16": 5e-5}  # of the root mean square; products of half types are exact in float32
NAMES = ("query", "key")


class Scores(Attention):
    """weights: [1 or B, 1 or H, 1 or Nq, 1], or drawn, a third of them 0."""

    def __init__(self, dtype, weights=None, **options):
        super().__init__(dtype, **{"Dv": 1, **options})
        rng = np.random.default_rng([7, *self.given["query"].shape])
        drawn = rng.standard_normal((*self.given["query"].shape[:3], 1)) * (rng.random((*self.given["query"].shape[:3], 1)) < 2 / 3)
        self.weights = (drawn if weights is None else np.asarray(weights)).astype(REAL[dtype])

    @functools.cached_property
    def solution(self):
        """kept [B, H, Nq, Nk], p, lse; rounded as the forward would hand lse on."""
        query, key = (self.given[name] for name in NAMES)
        (B, H, Nq, _), (_, Hkv, Nk, _) = query.shape, key.shape
        kept, p, lse = np.zeros((B, H, Nq, Nk), bool), np.zeros((B, H, Nq, Nk)), np.zeros((B, H, Nq))
        for b in range(B):
            for h in range(H):
                kept[b, h], p[b, h], lse[b, h], _ = self.softmax(b, h, query[b, h], key[b, h * Hkv // H])
        return kept, p, lse.astype(REAL[self.dtype])

    def columns(self, reduction="sum", more=None, key=None, **options):
        arguments = self.arguments(NAMES, lse=self.solution[2], weights=self.weights, reduction=REDUCTIONS.index(reduction), **(more or {}))
        return _host.run(key or f"attention_scores.columns.{self.dtype}", arguments, **options)

    def rows(self, more=None, key=None, **options):
        return _host.run(key or f"attention_scores.rows.{self.dtype}", self.arguments(NAMES, lse=self.solution[2], **(more or {})), **options)

    @functools.cached_property
    def want(self):
        kept, p, _ = self.solution
        weights = np.broadcast_to(self.weights.astype(float), (*p.shape[:3], 1))
        counted = kept & (weights != 0)
        with np.errstate(invalid="ignore"):
            each = {"sum": weights * p, "square": weights * p**2, "max": weights * p, "kept": np.broadcast_to(weights, p.shape)}
            each = {name: np.where(counted, values, 0) for name, values in each.items()}
            found = {name: np.maximum(values.max(2, initial=0), 0) if name == "max" else values.sum(2) for name, values in each.items()}
            entropy = -np.where(p == 0, 0, p * np.log(np.where(p == 0, 1, p))).sum(3)
        return found | {"entropy": entropy, "maximum": p.max(3, initial=0)}

    def is_right(self, outputs, reduction="sum"):
        return all(deviation(found.astype(float), self.want[reduction if name == "out" else name]) <= ALLOWED[self.dtype] for name, found in outputs.items())


CASES = sorted(set(cases("f32")) - {"packed"})  # the ops have no packed sequences


def options_of(dtype, case):
    return {name: value for name, value in cases(dtype)[case].items() if name not in ("Dv", "lse")}


@functools.cache
def solved(dtype, case):
    problem = Scores(dtype, **options_of(dtype, case))
    runs = {reduction: problem.columns(reduction) for reduction in REDUCTIONS} | {"rows": problem.rows()}
    for reduction, run in runs.items():
        assert problem.is_right(run.outputs, reduction), (case, reduction)
    return {launch["key"] for run in runs.values() for launch in run.launches}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_match_the_definition(dtype, case):
    solved(dtype, case)


def test_every_instance_has_run():
    launched = set().union(*(solved(dtype, case) for dtype in DTYPES for case in CASES))
    assert set(OWN) <= launched


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_by_hand(dtype):
    """Logits 0 and log 4: p = .2, .8 in each row; causal: 1, 0 in the first."""
    problem = Scores(dtype, Nq=2, Nk=2, D=1, bias=(1, 1, 1, 2), weights=np.array([[[[1.0], [3.0]]]]))
    problem.given["query"][:], problem.bias[:] = 0, np.log([1, 4])
    tolerance = ALLOWED[dtype]
    for causal, expected in (
        (0, {"sum": (0.8, 3.2), "square": (0.16, 2.56), "max": (0.6, 2.4), "kept": (4, 4)}),
        (1, {"sum": (1.6, 2.4), "square": (1.12, 1.92), "max": (1, 2.4), "kept": (4, 3)}),
    ):
        problem.causal = causal
        vars(problem).pop("solution", None)
        for reduction, numbers in expected.items():
            np.testing.assert_allclose(problem.columns(reduction).outputs["out"].ravel(), numbers, rtol=tolerance)
        rows = problem.rows().outputs
        entropy, most = -0.2 * np.log(0.2) - 0.8 * np.log(0.8), 0.8
        np.testing.assert_allclose(rows["entropy"].ravel(), (0 if causal else entropy, entropy), rtol=tolerance, atol=1e-7)
        np.testing.assert_allclose(rows["maximum"].ravel(), (1 if causal else most, most), rtol=tolerance)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 1, 1), (1, 3, 1, 1), (1, 1, 20, 1), (2, 1, 20, 1)])
def test_weights_may_be_shared(shape):
    problem = Scores("f32", B=2, H=3, Nq=20, Nk=30, weights=np.random.default_rng(0).random(shape) + 1)
    for reduction in REDUCTIONS:
        assert problem.is_right(problem.columns(reduction).outputs, reduction)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_a_bias_may_be_of_a_half_type(dtype):
    problem = Scores(dtype, Nq=20, Nk=30)
    problem.bias = np.linspace(-2, 2, 600).reshape(1, 1, 20, 30)
    problem.bias[..., ::7] = -np.inf
    given = encode(dtype, problem.bias)
    problem.bias = (given.astype(np.uint32) << 16).view(np.float32) if dtype == "bf16" else given.astype(np.float32)
    more = dict(bias=given, bias_dtype=dtype)
    assert all(problem.is_right(problem.columns(reduction, more).outputs, reduction) for reduction in REDUCTIONS) and problem.is_right(problem.rows(more).outputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("Nq, Nk", [(0, 5), (5, 0)])
def test_sides_may_be_empty(dtype, Nq, Nk):
    """One launch of no block; or sums over nothing."""
    problem = Scores(dtype, H=2, Nq=Nq, Nk=Nk)
    runs = ({reduction: problem.columns(reduction) for reduction in REDUCTIONS} if Nk else {}) | ({"rows": problem.rows()} if Nq else {})
    assert all(not array.any() for run in runs.values() for array in run.outputs.values())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_schedules_strides_and_misalignment(dtype, schedule):
    T = BLOCK[dtype]
    problem = Scores(dtype, B=2, H=2, Hkv=1, Nq=T + 3, Nk=T + 20, D=9, mask=any_intervals(2, T + 3, T + 20, 4), bias=(2, 1, 1, T + 20), causal=1)

    def spread(name):
        """Each number twice and three more at the end of a row, NaN between."""
        x = problem.given[name]
        wide = np.full((*x.shape[:3], 2 * x.shape[3] + 3), np.nan)
        wide[..., : 2 * x.shape[3] : 2] = x
        return encode(dtype, wide)

    more = {name: spread(name) for name in NAMES} | {f"{name}_row_stride": 2 * 9 + 3 for name in NAMES} | {f"{name}_element_stride": 2 for name in NAMES}
    moved = dict(SCHEDULES[schedule], offsets=dict.fromkeys((*NAMES, "lse", "weights", "bias", "out", "entropy", "maximum"), 1))
    for run in (*(functools.partial(problem.columns, reduction) for reduction in REDUCTIONS), problem.rows):
        reduction = run.args[0] if isinstance(run, functools.partial) else ""
        assert problem.is_right(run(**moved).outputs, reduction)
        assert problem.is_right(run(more=more, **SCHEDULES[schedule]).outputs, reduction)


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_schedule(dtype):
    T = BLOCK[dtype]
    problem = Scores(dtype, H=2, Nq=2 * T + 9, Nk=T + 20, D=20, causal=1)
    for run in (problem.columns, problem.rows):
        first, *others = (run(**options).outputs for options in SCHEDULES.values())
        assert all(np.array_equal(first[name], other[name]) for other in others for name in first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_does_not_count_may_be_anything(dtype):
    """Keys that no query keeps, queries that keep nothing and queries of weight 0 hold NaN and infinity: nothing of them comes out."""
    T = BLOCK[dtype]
    N = T + 40
    keep = pairs(1, 1, N, N, share=0.3)
    keep[..., 5], keep[..., T + 7], keep[..., 3, :] = False, False, False
    problem = Scores(dtype, H=2, Hkv=1, Nq=N, Nk=N, D=16, mask=masks.from_dense(keep))
    problem.given["key"][:, :, 5], problem.given["key"][:, :, T + 7], problem.given["query"][:, :, 3] = np.nan, np.inf, np.nan
    assert all(np.isfinite(one).all() for one in problem.want.values())
    assert problem.is_right(problem.rows().outputs)
    problem = Scores(dtype, H=2, Hkv=1, Nq=N, Nk=N, D=16, mask=masks.from_dense(keep))
    problem.given["query"][:, :, 9], problem.weights[:, :, 9], problem.weights[:, :, 3] = np.nan, 0, 1
    for reduction in REDUCTIONS:
        assert np.isfinite(problem.want[reduction]).all() and problem.is_right(problem.columns(reduction).outputs, reduction)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ["query", "key", "lse", "weights"])
def test_what_is_not_a_number_reaches_what_keeps_it(dtype, where):
    T = BLOCK[dtype]
    N = T + 40
    keep = pairs(1, 1, N, N, share=0.02)
    keep[..., [6, T + 3], 6] = True
    problem = Scores(dtype, H=2, Hkv=1, Nq=N, Nk=N, D=16, mask=masks.from_dense(keep))
    problem.weights[:, :, [6, T + 3]] = 1
    if where == "weights":
        problem.weights[:, :, T + 3] = np.nan
    elif where == "lse":
        problem.solution[2][:, :, T + 3], problem.solution[1][:, :, T + 3] = np.nan, np.where(problem.solution[0][:, :, T + 3], np.nan, 0)
    else:
        problem.given[where][:, :, 6] = np.nan
    for reduction in REDUCTIONS:
        reached = np.isnan(problem.want[reduction]).any()
        assert reached == (reduction != "kept" or where == "weights") and not np.isnan(problem.want[reduction]).all()
        assert problem.is_right(problem.columns(reduction).outputs, reduction)
    assert where == "weights" or np.isnan(problem.want["entropy"]).any()
    assert problem.is_right(problem.rows().outputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_whose_log_sum_exp_says_so_adds_nothing(dtype):
    problem = Scores(dtype, H=2, Nq=20, Nk=30)
    kept, p, lse = problem.solution
    lse[:, :, 7], p[:, :, 7] = -np.inf, 0
    assert all(problem.is_right(problem.columns(reduction).outputs, reduction) for reduction in REDUCTIONS[:3]) and problem.is_right(problem.rows().outputs)


def read(run):
    return sum(launch["global_bytes_read"] for launch in run.launches)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_of_weight_0_are_passed_over(dtype):
    T = BLOCK[dtype]
    whole = Scores(dtype, Nq=4 * T, Nk=T, D=64, weights=np.ones((1, 1, 4 * T, 1)))
    last = Scores(dtype, Nq=4 * T, Nk=T, D=64, weights=np.arange(4 * T).reshape(1, 1, -1, 1) == 4 * T - 1)
    runs = whole.columns(), last.columns()
    assert whole.is_right(runs[0].outputs) and last.is_right(runs[1].outputs)
    assert read(runs[1]) < 0.3 * read(runs[0])
    if dtype in ("f16", "bf16"):
        assert 4 * sum(launch["matrix_products"] for launch in runs[1].launches) == sum(launch["matrix_products"] for launch in runs[0].launches) > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_counting_makes_no_products(dtype):
    problem = Scores(dtype, H=2, Nq=40, Nk=50, causal=1, bias=(1, 2, 1, 50))
    problem.given["query"][:], problem.given["key"][:] = np.nan, np.nan
    run = problem.columns("kept")
    assert np.isfinite(problem.want["kept"]).all() and problem.is_right(run.outputs, "kept")
    assert sum(launch["matrix_products"] for launch in run.launches) == 0


# ------------------------------------------------------------------------------------------------------------------------------------------ mutations


@functools.cache
def broken_case(dtype):
    """Several tiles on either side, all kinds of masks, a bias that heads share, no weights in front, a query of weight 0 that nobody may use. The depth fills no slab."""
    T = BLOCK[dtype]
    Nq, Nk = 2 * T + 37, 2 * T + 21
    mask = (tokens_mask(Nq, Nk, 3) | any_intervals(1, Nq, Nk, 2)) & ~masks.from_dense(pairs(1, 1, Nq, Nk, share=0.2))
    problem = Scores(dtype, H=2, Hkv=1, Nq=Nq, Nk=Nk, D=40 if dtype in ("f16", "bf16") else 36, mask=mask, bias=(1, 1, 1, Nk), causal=1)
    problem.weights[:, :, :32], problem.given["query"][:, :, 40], problem.weights[:, :, 40] = 0, np.nan, 0
    return problem


HARMLESS = ("list: drop the barrier before it",)  # a list of at most 256 tiles is written once (and see below)


@pytest.mark.parametrize("key", OWN)
def test_seeded_mutations_are_caught(key):
    problem = broken_case(key.rsplit(".", 1)[1])
    run = problem.columns if ".columns." in key else problem.rows
    check_mutations(key, functools.partial(run, key=key), problem.is_right, harmless=HARMLESS)


def test_a_list_is_not_overwritten_while_it_is_read():
    """More than 256 tiles of the other side."""
    keep = np.zeros((2, 257 * 64), bool)
    keep[..., 200 * 64], keep[..., -1] = True, True
    for name, many in (("rows", keep), ("columns", keep.T)):
        Nq, Nk = many.shape
        problem = Scores("f64", Nq=Nq, Nk=Nk, D=1, mask=masks.from_dense(torch.from_numpy(many.copy())), weights=np.ones((1, 1, 1, 1)))
        run = getattr(problem, name)
        assert problem.is_right(run().outputs)
        with pytest.raises(_host.KernelReport, match="race_shared"):
            run(mutation="list: drop the barrier before it", **SCHEDULES["random"])
