"""The testing tools themselves: what they must catch, they catch."""

import pytest
import torch

from modalign.testing import (
    BadInput,
    Maker,
    OpCase,
    Sample,
    assert_bitwise_deterministic,
    battery,
    compare_gradients,
    compare_values,
    degenerate_zoo,
    gradient_report,
    peak_memory,
    run_battery,
    tolerance_of,
)

EXPECTED = torch.randn(10_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def noise(scale):
    return scale * torch.randn(10_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------------------------ gradient comparison


def test_rounding_passes():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        compare_gradients(EXPECTED.to(dtype), EXPECTED)


@pytest.mark.parametrize(
    "wrong, complaint",
    [
        (EXPECTED * 1.01, "signed bias"),  # 1 % too large everywhere: each element is well within bfloat16's tolerance
        (EXPECTED + noise(0.05), "relative L2"),
        (torch.where(torch.arange(10_000) == 17, EXPECTED + 1, EXPECTED), r"0.01% of the elements are off"),
        (-EXPECTED, "cosine"),
        (torch.zeros_like(EXPECTED), "cosine 1"),
        (torch.where(torch.arange(10_000) == 17, torch.nan, EXPECTED), "relative L2 error nan"),
    ],
    ids=["one percent", "noise", "outlier", "sign", "zero", "nan"],
)
def test_wrong_gradients_are_named(wrong, complaint):
    with pytest.raises(AssertionError, match=complaint):
        compare_gradients(wrong, EXPECTED, dtype=torch.bfloat16)


def test_one_percent_is_invisible_to_an_element_bound():
    report = gradient_report(EXPECTED * 1.01, EXPECTED, tolerance_of(torch.bfloat16).element)
    assert report.outliers == 0 and report.bias == pytest.approx(0.01)


def test_zero_gradients_must_be_exact():
    compare_gradients(torch.zeros(5), torch.zeros(5, dtype=torch.float64))
    with pytest.raises(AssertionError):
        compare_gradients(torch.tensor([0.0, 1e-30]), torch.zeros(2, dtype=torch.float64))
    with pytest.raises(AssertionError, match="there is none"):
        compare_gradients(None, torch.zeros(5))
    with pytest.raises(AssertionError, match="shape"):
        compare_gradients(torch.zeros(4), torch.zeros(5))


def test_outlier_budget():
    bounds = tolerance_of(torch.float32)
    wrong = torch.where(torch.arange(10_000) == 17, EXPECTED + 2e-4, EXPECTED)
    with pytest.raises(AssertionError, match="elements are off"):
        compare_gradients(wrong, EXPECTED, tolerance=bounds)
    compare_gradients(wrong, EXPECTED, tolerance=type(bounds)(**{**vars(bounds), "outliers": 2e-4}))


def test_values_are_measured_against_the_formula():
    expected = torch.ones(4, dtype=torch.float64)
    with pytest.raises(AssertionError, match="maximum error 0.001"):
        compare_values(expected.float() + 1e-3, expected)
    compare_values(expected.float() + 1e-3, expected, yardstick=expected.float() - 1e-3)
    with pytest.raises(AssertionError):  # a formula that fails altogether allows nothing
        compare_values(expected.float() + 1e-3, expected, yardstick=torch.full((4,), torch.nan))
    with pytest.raises(AssertionError, match="maximum error inf"):
        compare_values(torch.full((4,), torch.nan), expected)
    compare_values(torch.tensor([torch.nan, torch.inf]), torch.tensor([torch.nan, torch.inf], dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------------------------------------------------- zoo


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_zoo_is_what_it_says(dtype):
    zoo = degenerate_zoo(Maker(dtype), count=4, rows=5, width=16)
    assert all(len(vectors) == 4 and all(v.shape == (5, 16) and v.dtype is dtype for v in vectors) for vectors in zoo.values())
    assert all(torch.equal(v, zoo["identical"][0]) for v in zoo["identical"])
    assert torch.equal(zoo["antiparallel"][-1], -zoo["antiparallel"][0])
    assert not zoo["zero"][-1].any() and zoo["nan"][-1].isnan().sum() == 1 and zoo["inf"][-1].isinf().sum() == 1
    assert not zoo["strided"][0].is_contiguous() and zoo["expanded"][0].stride(0) == 0
    collinear = torch.stack(zoo["nearly_collinear"]).double()
    assert 0 < (collinear[0] - collinear[1]).norm(dim=-1).max() < 0.3


# -------------------------------------------------------------------------------------------------------------------------------------- determinism


def test_determinism_check_sees_one_bit():
    assert_bitwise_deterministic(lambda: torch.arange(5.0))
    assert_bitwise_deterministic(lambda: torch.tensor([torch.nan]))
    counter = iter(range(100))
    with pytest.raises(AssertionError, match=r"results \[0\] differ in run 2 with 1 threads"):
        assert_bitwise_deterministic(lambda: torch.tensor([1.0 if next(counter) == 0 else 1.0 + 2**-23]))
    with pytest.raises(AssertionError, match="with 3 threads"):
        assert_bitwise_deterministic(lambda: torch.tensor([torch.get_num_threads() == 3]))
    before = torch.get_num_threads()
    with pytest.raises(AssertionError, match="differ"):
        assert_bitwise_deterministic(lambda: torch.tensor([0.0, -0.0][torch.get_num_threads() == 2]))  # equal as numbers, not as bits
    assert torch.get_num_threads() == before


# ------------------------------------------------------------------------------------------------------------------------------------------- memory


def allocate(megabytes, temporary):
    def call():
        scratch = torch.ones(temporary << 18)
        kept = torch.ones(megabytes << 18)
        del scratch
        return kept

    return call, None


def native_workspace(megabytes):
    """Memory that no torch hook sees."""

    def call():
        import ctypes

        library = ctypes.CDLL(None)
        library.malloc.restype, library.malloc.argtypes, library.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
        block = library.malloc(megabytes << 20)
        ctypes.memset(block, 1, megabytes << 20)
        library.free(block)
        return torch.zeros(1)

    return call, None


def test_memory_probe_counts_what_is_kept_and_what_is_not():
    measured = peak_memory("test_testing:allocate", megabytes=32, temporary=48)
    assert measured.kept == pytest.approx(32 << 20, abs=4 << 20)
    assert measured.peak == pytest.approx(80 << 20, abs=4 << 20)
    assert measured.workspace == measured.peak - measured.kept


def test_memory_probe_sees_native_workspace():
    assert peak_memory("test_testing:native_workspace", megabytes=64).peak == pytest.approx(64 << 20, abs=4 << 20)


def test_memory_probe_reports_failures():
    with pytest.raises(RuntimeError, match="unexpected keyword argument"):
        peak_memory("test_testing:allocate", wrong=1)


# ------------------------------------------------------------------------------------------------------------------------------------------ battery


def product(x, y):
    """A toy op in plain torch, so everything torch can do works."""
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(f"product: y must have x's width {x.shape[-1]}, got {y.shape[-1]}")
    return x @ y.mT


def sized(make, n):
    return Sample(f"n={n}", (make.randn(n, n + 1), make.randn(n + 2, n + 1)))


def toy(**changes):
    described = dict(
        name="product",
        call=product,
        reference=product,
        samples=lambda make: [sized(make, 5)],
        tiny=lambda make: [sized(make, 2)],
        sized=sized,
        empty=lambda make: [(Sample("no rows", (make.randn(0, 4), make.randn(3, 4))), (0, 3))],
        bad_inputs=lambda make: [
            BadInput(Sample("width", (make.randn(2, 3), make.randn(2, 4))), ValueError, "^product: y must have x's width 3, got 4$")
        ],
        dtypes=(torch.float32, torch.float64),
        double_backward=True,
        func_grad=True,
        vmap=True,
        jvp=True,
        autocast=torch.bfloat16,
        deterministic=False,
    )
    return OpCase(**{**described, **changes})


def failures(case):
    try:
        run_battery(case, on=["cpu"])
    except AssertionError as error:
        return {line.split(":")[0].removesuffix("-cpu").removeprefix("product-") for line in str(error).splitlines() if line.startswith("product-")}
    return set()


def test_true_declarations_pass():
    # A matrix product promises no bits across thread counts, yet torch does not refuse it under use_deterministic_algorithms: neither declaration
    # would be true.
    checks = dict(battery([toy()], on=["cpu"]))
    del checks["product-determinism-cpu"]
    assert len(checks) == 2 * 3 + 15
    for check in checks.values():
        check()


def test_every_false_declaration_fails():
    """Each yes turned into a no, and each broken behaviour, is caught by the check that is about it and named in the report."""
    assert "double_backward" in failures(toy(double_backward=False))
    assert {"func_grad", "vmap", "forward_mode", "one_graph", "export", "checkpoint", "strided"} <= failures(
        toy(func_grad=False, vmap=False, jvp=False, compile=False, export=False, checkpoint=False, strided=False)
    )


class Lying(torch.autograd.Function):
    """Right values, a gradient 1 % too large for x, none for y, nothing beyond."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x @ y.mT

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        return 1.01 * grad @ y, torch.zeros_like(y)


def test_a_wrong_gradient_is_caught():
    found = failures(toy(call=Lying.apply, empty=None, bad_inputs=None))
    assert {"gradients-float32", "gradients-float64", "finite_differences", "func_grad", "forward_mode"} <= found
    assert not {"values-float32", "partial_gradients"} & found


def test_wrong_values_and_unchecked_inputs_are_caught():
    found = failures(toy(call=lambda x, y: (x @ y.mT) * (1 + 1e-4), empty=None))
    assert {"values-float32", "values-float64", "bad_inputs"} <= found
    assert "strided" in failures(toy(call=lambda x, y: x @ y.mT * (1 if x.is_contiguous() else 1.001)))
    assert "strided" in failures(toy(call=lambda x, y: product(x.detach().add_(0.5).sub(0.5) + 0 * x, y)))  # changes its input


def test_many_graphs_are_caught():
    def specialises(x, y):
        return product(x, y) * (1 if int(x.shape[0]) in (7, 13) else 1)

    assert "one_graph" in failures(toy(call=specialises))
