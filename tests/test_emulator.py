"""The emulator's own tests: every kind of bug is planted and reported, every correct kernel passes in any order, and numbers are the device's.

The kernels are those of csrc/host/selftest.cpp, each correct as it stands and with named places where it can be broken.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from modalign import _host

ORDERS = ("forward", "reverse", "random")
SCHEDULES = [{"seed": seed, "thread_order": threads, "block_order": blocks, "yield_probability": probability}
             for seed, (threads, blocks, probability) in enumerate(itertools.product(ORDERS, ORDERS, (0.0, 0.2)))]


def draw(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def to_bf16(x):
    """Bits of the nearest bfloat16, ties to even (finite x)."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


# ---------------------------------------------------------------------------------------------------------------- the kernels
def rotate():
    x = draw(3, 64)
    return {"x": x, "rounds": 5}, {"y": np.roll(x, -5, axis=1)}


def warp(dtype):
    x = np.random.default_rng(1).integers(-50, 50, 64).astype(dtype)   # whole numbers: sums are exact in any order
    warps = x.reshape(2, 32)
    votes = np.array([sum(1 << i for i in range(32) if warp[i] > 0) for warp in warps], np.uint32)
    return {"x": x}, {"sum": warps.sum(1), "neighbour": np.roll(warps, -1, axis=1).ravel(), "positive": x > 0, "votes": votes}


def total():
    x = np.random.default_rng(2).integers(-50, 50, (37, 32)).astype(np.float32)
    return {"x": x}, {"total": x.sum(keepdims=True).ravel()}


def pipeline(n=460):
    x = draw(n)
    return {"x": x}, {"y": np.concatenate([x[i:i + 128][::-1] for i in range(0, n, 128)] or [x])}


def wide():
    x = draw(128)
    return {"x": x}, {"y": x}


def load_matrix(transposed):
    x = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)   # bit patterns, so that nothing but the place matters
    seen = x.transpose(0, 2, 1) if transposed else x
    lanes = np.arange(32)
    low, high = (seen[:, lanes // 4, lanes % 4 * 2 + i].T.astype(np.uint32) for i in (0, 1))
    return {"x": x.view(np.float16)}, {"registers": low | high << 16}


def matmul(dtype, transposed):
    M, N, K = 32, 48, 80
    a, b = draw(M, K, seed=3), draw(N, K, seed=4)
    if dtype == "bf16":
        narrow, wide_again = to_bf16, from_bf16
    else:
        narrow, wide_again = (lambda x: x.astype(np.float16)), (lambda x: x.astype(np.float32))
    exact = wide_again(narrow(a)).astype(np.float64) @ wide_again(narrow(b)).astype(np.float64).T
    return {"a": narrow(a), "b": np.ascontiguousarray(narrow(b).T) if transposed else narrow(b)}, {"d": exact.astype(np.float32)}


KERNELS = {
    "selftest_rotate": rotate,
    "selftest_warp_f32": lambda: warp(np.float32),
    "selftest_warp_f64": lambda: warp(np.float64),
    "selftest_partial_sum": total,
    "selftest_total_sum": total,
    "selftest_pipeline": pipeline,
    "selftest_wide": wide,
    "selftest_load_matrix": lambda: load_matrix(False),
    "selftest_load_matrix_transposed": lambda: load_matrix(True),
    "selftest_matmul_bf16": lambda: matmul("bf16", False),
    "selftest_matmul_f16": lambda: matmul("f16", False),
    "selftest_matmul_transposed_bf16": lambda: matmul("bf16", True),
    "selftest_matmul_transposed_f16": lambda: matmul("f16", True),
}


def agree(outputs, expected):
    """Exact, but for fp32 sums of products against float64: 80 roundings of terms of size one."""
    tolerance = 2e-5 if "d" in expected else 0.0
    return outputs.keys() == expected.keys() and all(
        (outputs[name].shape, outputs[name].dtype) == (value.shape, value.dtype) and np.allclose(outputs[name], value, rtol=0, atol=tolerance)
        for name, value in expected.items())


@pytest.mark.parametrize("key", KERNELS)
def test_correct_kernels_pass_in_every_order(key):
    arguments, expected = KERNELS[key]()
    for schedule in SCHEDULES:
        result = _host.run(key, arguments, **schedule)
        assert agree(result.outputs, expected), schedule
        assert not result.mutation_reached


@pytest.fixture
def portable_switch():
    before = _host.use_context_switch("ucontext")
    yield
    _host.use_context_switch(before)


@pytest.mark.parametrize("key", KERNELS)
def test_the_portable_context_switch_changes_nothing(key, portable_switch):
    arguments, expected = KERNELS[key]()
    assert agree(_host.run(key, arguments, thread_order="random", yield_probability=0.1).outputs, expected)
    for mutation, kinds in MUTATIONS.get(key, {}).items():
        assert outcome(key, arguments, expected, mutation=mutation, seed=1) in kinds.split(" | "), mutation


@pytest.mark.parametrize("n", [4, 124, 128, 132, 256, 388])
def test_pipeline_lengths(n):
    arguments, expected = pipeline(n)
    assert agree(_host.run("selftest_pipeline", arguments, thread_order="random", yield_probability=0.1).outputs, expected)


# ---------------------------------------------------------------------------------------------------------------- the mutations
MATMUL = {
    "matrices of a in the wrong order": "wrong result",
    "wrong register of b": "wrong result",
    "rows of the result exchanged": "wrong result",
    "one lane skips the product": "divergent_barrier",
    "drop the barrier before the next tile": "race_shared",
}
MATMUL_TRANSPOSED = MATMUL | {"drop the transposition": "wrong result"}
WARP = {
    "drop the warp barrier": "race_shared | uninitialised_shared",   # whether the neighbour's word is old or missing depends on who comes first
    "read another warp's word": "race_shared | uninitialised_shared",
    "drop the warp barrier before reuse": "race_shared",
    "one lane skips the warp barrier": "divergent_barrier",
    "one lane leaves before the shuffle": "shuffle_mask",
    "one lane skips a shuffle": "shuffle_mask | wrong result",   # it takes part in the next round's instead, and is missing at the end
    "half the lanes shuffle elsewhere": "shuffle_mask",
    "half a warp votes": "shuffle_mask",
    "wrong lane in the shuffle": "wrong result",
    "every lane stores the sum": "race_global",
}
LOAD_MATRIX = {"drop the warp barrier": "race_shared", "row at an odd element": "misaligned"}
MUTATIONS = {
    "selftest_rotate": {
        "drop the barrier before the write": "race_shared",
        "drop the barrier after the write": "race_shared",
        "read past the array": "out_of_bounds_shared",
        "write past the array": "out_of_bounds_shared",
        "leave one word unwritten": "uninitialised_shared",
        "one thread leaves early": "divergent_barrier",
        "one warp takes another barrier": "divergent_barrier",
        "leave one output unwritten": "unwritten_output",
        "store past the end": "out_of_bounds_global",
        "load before the start": "out_of_bounds_global | wrong result",
    },
    "selftest_warp_f32": WARP,
    "selftest_warp_f64": WARP,
    "selftest_partial_sum": {
        "two threads write one element": "race_global",
        "drop the barrier between global accesses": "race_global | uninitialised_global",
        "read another block's element": "race_global | uninitialised_global",
        "two blocks write one element": "race_global",
    },
    "selftest_pipeline": {
        "drop the wait": "copy_not_waited",
        "wait for one group too few": "copy_not_waited",
        "drop the commit": "copy_not_waited",
        "drop the barrier after the wait": "race_shared | uninitialised_shared",
        "drop the barrier before the next copy": "race_shared",
        "copy past the end": "out_of_bounds_global",
        "copy from an odd address": "misaligned",
    },
    "selftest_wide": {
        "wide load from an odd element": "misaligned",
        "wide store to an odd element": "misaligned",
        "wide load past the array": "out_of_bounds_shared",
    },
    "selftest_load_matrix": LOAD_MATRIX,
    "selftest_load_matrix_transposed": LOAD_MATRIX,
    "selftest_matmul_bf16": MATMUL,
    "selftest_matmul_f16": MATMUL,
    "selftest_matmul_transposed_bf16": MATMUL_TRANSPOSED,
    "selftest_matmul_transposed_f16": MATMUL_TRANSPOSED,
}


def outcome(key, arguments, expected, **options):
    """The kind of the report, "wrong result", or None for a run that went as it should."""
    try:
        outputs = _host.run(key, arguments, **options).outputs
    except _host.KernelReport as report:
        assert report.kernel == key and report.kind in str(report)
        return report.kind
    return None if agree(outputs, expected) else "wrong result"


@pytest.mark.parametrize("key, mutation", [(key, mutation) for key, mutations in MUTATIONS.items() for mutation in mutations])
def test_planted_bugs_are_reported_in_every_order(key, mutation):
    arguments, expected = KERNELS[key]()
    outcomes = {outcome(key, arguments, expected, mutation=mutation, **schedule) for schedule in SCHEDULES}
    assert outcomes <= set(MUTATIONS[key][mutation].split(" | ")), outcomes


def test_every_planted_place_is_listed():
    for key, kernel in KERNELS.items():
        _host.run(key, kernel()[0])
        assert set(MUTATIONS.get(key, {})) == set(_host.mutations(key)), key


def test_mutations_belong_to_the_kernel_that_is_run():
    arguments, expected = total()   # launches the partial sums too, but breaks only the kernel that was asked for
    result = _host.run("selftest_total_sum", arguments, mutation="two blocks write one element")
    assert not result.mutation_reached and agree(result.outputs, expected)
    with pytest.raises(ValueError, match="mutation must be a place of some kernel, got 'no such place'"):
        _host.run("selftest_total_sum", arguments, mutation="no such place")


# ------------------------------------------------------------------------------------------------------------------ the reports
def test_a_report_says_where():
    arguments, _ = rotate()
    with pytest.raises(_host.KernelReport) as caught:
        _host.run("selftest_rotate", arguments, mutation="store past the end")
    report = caught.value
    assert isinstance(report, RuntimeError)
    assert (report.kind, report.kernel, report.block) == ("out_of_bounds_global", "selftest_rotate", (2, 0, 0))
    assert (report.thread, report.address) == (63, "y element 192")
    assert str(report) == "out_of_bounds_global in selftest_rotate, block (2, 0, 0), thread 63: y element 192 of 192"
    with pytest.raises(_host.KernelReport, match=r"divergent_barrier .* waits in barrier at selftest.cpp:\d+ while thread 37 has left the kernel"):
        _host.run("selftest_rotate", arguments, mutation="one thread leaves early")
    with pytest.raises(_host.KernelReport, match=r"thread 7: writes scratch element 6, which thread 6 wrote with no barrier between"):
        _host.run("selftest_partial_sum", total()[0], mutation="two threads write one element")


def test_memory_between_launches():
    """What one launch wrote the next may read; what no launch wrote is not there."""
    arguments, _ = total()
    with pytest.raises(_host.KernelReport) as caught:
        _host.run("selftest_total_sum", arguments | {"skip_first": True})
    assert (caught.value.kind, caught.value.address) == ("uninitialised_global", "partial element 0")


def test_too_little_shared_memory():
    arguments, _ = rotate()
    with pytest.raises(_host.KernelReport, match="an array from shared byte 0 to 256, but the launch gives 252 bytes") as caught:
        _host.run("selftest_rotate", arguments | {"shared_bytes": 252})
    assert caught.value.kind == "out_of_bounds_shared"
    with pytest.raises(ValueError, match="shared memory of a block must be at most 227 KiB"):
        _host.run("selftest_rotate", arguments | {"shared_bytes": 240_000})


def test_arrays_off_their_alignment():
    arguments, expected = wide()
    assert agree(_host.run("selftest_wide", arguments, offsets={"x": 4, "y": 8}).outputs, expected)
    for name in "xy":
        with pytest.raises(_host.KernelReport) as caught:
            _host.run("selftest_wide", arguments, offsets={name: 1})
        assert (caught.value.kind, caught.value.address) == ("misaligned", f"{name} element 0")


def test_a_failed_run_leaves_nothing_behind():
    arguments, expected = KERNELS["selftest_warp_f32"]()
    for mutation in WARP:
        outcome("selftest_warp_f32", arguments, expected, mutation=mutation)
        assert outcome("selftest_warp_f32", arguments, expected) is None


# ------------------------------------------------------------------------------------- races: all of them, and nothing but them
NOTHING, READ_SHARED, WRITE_SHARED, READ_GLOBAL, WRITE_GLOBAL, COPY_TO_SHARED, WAIT_FOR_WARP, WAIT_FOR_BLOCK = range(8)
SPACES = (("race_shared", (READ_SHARED,), (WRITE_SHARED, COPY_TO_SHARED)), ("race_global", (READ_GLOBAL, COPY_TO_SHARED), (WRITE_GLOBAL,)))


def random_program(rng, blocks=2, threads=64, word_count=48):
    """Sparse accesses, now and then a barrier of all blocks' threads or of some warps."""
    steps = int(rng.integers(4, 12))
    density = rng.choice([0.01, 0.05, 0.2])
    allowed = rng.choice([READ_SHARED, WRITE_SHARED, READ_GLOBAL, WRITE_GLOBAL, COPY_TO_SHARED], size=int(rng.integers(1, 4)), replace=False)
    commands = np.where(rng.random((steps, blocks, threads)) < density, rng.choice(allowed, size=(steps, blocks, threads)), NOTHING)
    for step in range(steps):
        if rng.random() < 0.3:
            commands[step] = WAIT_FOR_BLOCK
        elif rng.random() < 0.5:
            waiting = np.repeat(rng.random((blocks, threads // 32)) < 0.7, 32, axis=1)
            commands[step][waiting] = WAIT_FOR_WARP
    return {"commands": commands.astype(np.int32), "words": rng.integers(0, word_count, commands.shape).astype(np.int32), "word_count": word_count}


def races(program):
    """Brute force over all pairs of accesses: the memory spaces in which two of them conflict and no barrier orders them."""
    seen, found = {}, set()
    steps, blocks, threads = program["commands"].shape
    for block, thread in itertools.product(range(blocks), range(threads)):
        epochs = (0, 0)
        for command, word in zip(program["commands"][:, block, thread], program["words"][:, block, thread], strict=True):
            if command == WAIT_FOR_BLOCK:
                epochs = (epochs[0] + 1, epochs[1])
            elif command == WAIT_FOR_WARP:
                epochs = (epochs[0], epochs[1] + 1)
            for space, reads, writes in SPACES:
                if command in reads or command in writes:
                    place = (space, word) if space == "race_global" else (space, block, word)
                    seen.setdefault(place, []).append((block, thread, *epochs, command in writes))
    for place, accesses in seen.items():
        for (block, thread, epoch, warp_epoch, writes), other in itertools.combinations(accesses, 2):
            same_thread = (block, thread) == other[:2]
            ordered = block == other[0] and (epoch != other[2] or (thread // 32 == other[1] // 32 and warp_epoch != other[3]))
            if (writes or other[4]) and not same_thread and not ordered:
                found.add(place[0])
    return found


def test_reported_races_are_exactly_the_unordered_conflicts():
    rng = np.random.default_rng(6)
    racy = clean = 0
    for trial in range(150):
        program = random_program(rng)
        expected = races(program)
        racy, clean = racy + bool(expected), clean + (not expected)
        for schedule in rng.choice(SCHEDULES, size=4, replace=False):
            try:
                _host.run("selftest_program", program, **schedule)
                reported = None
            except _host.KernelReport as report:
                reported = report.kind
            assert reported in expected if expected else reported is None, (trial, schedule, reported, expected)
    assert racy > 30 and clean > 30   # the draw must try both


# -------------------------------------------------------------------------------------------------------------- seeds and orders
def report_text(**options):
    schedule = {"thread_order": "random", "block_order": "random", "yield_probability": 0.3} | options
    with pytest.raises(_host.KernelReport) as caught:
        _host.run("selftest_rotate", rotate()[0], mutation="drop the barrier before the write", **schedule)
    return str(caught.value)


def test_runs_repeat_by_seed():
    texts = {seed: report_text(seed=seed) for seed in range(12)}
    assert texts == {seed: report_text(seed=seed) for seed in range(12)}
    assert len(set(texts.values())) > 6   # and seeds do differ


def test_orders_are_what_they_say():
    first = {}
    for order in ("forward", "reverse"):
        with pytest.raises(_host.KernelReport) as caught:
            _host.run("selftest_wide", wide()[0], offsets={"x": 1}, thread_order=order)
        first[order] = caught.value.thread
    assert first == {"forward": 0, "reverse": 31}
    with pytest.raises(_host.KernelReport) as caught:
        _host.run("selftest_rotate", rotate()[0], offsets={}, mutation="one thread leaves early", block_order="reverse")
    assert caught.value.block == (2, 0, 0)


def test_counts_do_not_depend_on_the_schedule():
    arguments, _ = matmul("bf16", False)
    launches = [_host.run("selftest_matmul_bf16", arguments, **schedule).launches for schedule in SCHEDULES]
    assert all(other == launches[0] for other in launches)
    M, N, K = 32, 48, 80
    blocks, steps = M * N // 256, K // 16
    (launch,) = launches[0]
    assert (launch["key"], launch["grid"], launch["threads"], launch["shared_bytes"]) == ("selftest_matmul_bf16", (3, 2, 1), 32, 1024)
    assert launch["matrix_products"] == 2 * blocks * steps and launch["warp_barriers"] == 2 * blocks * steps
    assert launch["global_bytes_read"] == blocks * steps * 2 * 512 and launch["global_bytes_written"] == 4 * M * N


def test_an_empty_grid_launches_nothing():
    before = _host.launch_counts().get("selftest_rotate", 0)
    result = _host.run("selftest_rotate", {"x": np.empty((0, 64), np.float32), "rounds": 1})
    assert result.outputs["y"].shape == (0, 64) and result.launches[0]["grid"] == (0, 1, 1)
    assert _host.launch_counts().get("selftest_rotate", 0) == before


# -------------------------------------------------------------------------------------------------------------------- the numbers
def test_half_conversions():
    bits = np.arange(65536, dtype=np.uint16)
    rng = np.random.default_rng(5)
    x = np.concatenate([
        rng.standard_normal(20000).astype(np.float32), (rng.standard_normal(20000) * 2.0 ** rng.integers(-30, 18, 20000)).astype(np.float32),
        bits[:0x7C00].view(np.float16).astype(np.float32)[::2] * np.float32(1 + 2.0**-11),   # ties of normal numbers, and near-ties
        np.array([0, -0.0, np.inf, -np.inf, 65504, 65519.996, 65520, -65520, 1e-30, 1e38], np.float32),
        np.array([1, 0.5, 0.50005, 1.5, 1.49995, 1023.5, 1024.5], np.float32) * np.float32(2.0**-24)])   # subnormal steps and their ties
    x = np.concatenate([x, np.zeros(65536 - x.size, np.float32)])
    with np.errstate(over="ignore"):
        result = _host.run("selftest_convert_f16", {"x": x, "bits": bits.view(np.float16)}, seed=1).outputs
        np.testing.assert_array_equal(result["narrow"].view(np.uint16), x.astype(np.float16).view(np.uint16))
    np.testing.assert_array_equal(result["wide"], bits.view(np.float16).astype(np.float32))
    result = _host.run("selftest_convert_bf16", {"x": x, "bits": bits}).outputs
    np.testing.assert_array_equal(result["narrow"], to_bf16(x))
    np.testing.assert_array_equal(result["wide"], from_bf16(bits))
    nan = np.array([np.nan, -np.nan], np.float32)
    for key, zeros in (("selftest_convert_f16", np.zeros(2, np.float16)), ("selftest_convert_bf16", np.zeros(2, np.uint16))):
        assert (_host.run(key, {"x": nan, "bits": zeros}).outputs["narrow"].view(np.uint16) == 0x7FFF).all()


@pytest.mark.parametrize("key, dtype", [("selftest_math_f32", np.float32), ("selftest_math_f64", np.float64)])
def test_mathematics(key, dtype):
    x = draw(200, 3, dtype=dtype)
    x[:, 2] = np.abs(x[:, 2])
    nan = np.array([[np.nan, 1, 4], [1, np.nan, 4]], dtype)
    results = _host.run(key, {"x": np.concatenate([x, nan])}).outputs["results"]
    assert np.isnan(results[200:, :2]).all()
    low, high, root, inverse_root, power, fused, magnitude, log, log_1p, power_minus_1 = results[:200].T
    np.testing.assert_array_equal(low, np.minimum(x[:, 0], x[:, 1]))
    np.testing.assert_array_equal(high, np.maximum(x[:, 0], x[:, 1]))
    np.testing.assert_array_equal(root, np.sqrt(x[:, 2]))
    np.testing.assert_array_equal(magnitude, np.abs(x[:, 0]))
    epsilon = np.finfo(dtype).eps
    np.testing.assert_allclose(inverse_root, x[:, 2].astype(np.longdouble) ** -0.5, rtol=epsilon)
    np.testing.assert_allclose(power, np.exp(x[:, 0].astype(np.longdouble)), rtol=epsilon)
    np.testing.assert_allclose(log, np.log(x[:, 2].astype(np.longdouble)), rtol=epsilon)
    np.testing.assert_allclose(log_1p, np.log1p(x[:, 2].astype(np.longdouble)), rtol=epsilon)
    np.testing.assert_allclose(power_minus_1, np.expm1(x[:, 0].astype(np.longdouble)), rtol=2 * epsilon)
    exact = x[:, 0].astype(np.longdouble) * x[:, 1] + x[:, 2]
    np.testing.assert_allclose(fused, exact.astype(dtype), rtol=epsilon)


# --------------------------------------------------------------------------------------------------------------------- the module
def test_the_catalogue_and_the_build_facts():
    kernels = _host.kernels()
    assert set(KERNELS) <= set(kernels)
    assert kernels["selftest_rotate"] == {"family": "selftest", "threads": 64, "tags": {}}
    info = _host.build_info()
    assert info["context_switch"] in ("x86-64", "ucontext") and isinstance(info["address_sanitizer"], bool) and info["cplusplus"] >= 202002


@pytest.mark.parametrize("arguments, options, error, message", [
    ({"x": np.zeros((1, 64))}, {}, TypeError, "selftest_rotate: x must be float32, got float64"),
    ({}, {"thread_order": "sideways"}, ValueError, "run: thread_order must be 'forward', 'reverse' or 'random', got 'sideways'"),
    ({"x": np.zeros((64, 2), np.float32).T}, {}, TypeError, "selftest_rotate: x must be C-contiguous"),
    ({}, {}, KeyError, "selftest_rotate: argument x is missing"),
    ({"x": np.zeros((1, 64), np.float32)}, {"yield_probability": 1.5}, ValueError, "run: yield_probability must be between 0 and 1, got 1.5"),
])
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error) as caught:
        _host.run("selftest_rotate", {"rounds": 1} | arguments, **options)
    assert message in str(caught.value)


def test_unknown_names():
    with pytest.raises(KeyError, match="no kernel is called 'absent'"):
        _host.run("absent", {})
    with pytest.raises(KeyError, match="no kernel is called 'absent'"):
        _host.mutations("absent")
    with pytest.raises(ValueError, match="use_context_switch: name must be 'ucontext' or, on such a machine, 'x86-64', got 'longjmp'"):
        _host.use_context_switch("longjmp")
