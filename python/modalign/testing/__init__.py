"""Testing differentiable ops, ours or your own: describe an op once as an `OpCase`, and the battery checks values, gradients, edges and everything
torch does with ops.

    CASES = [OpCase(name="my_op", call=my_op, reference=plain_my_op, samples=..., tiny=..., sized=...)]

    @parametrize(CASES)
    def test_battery(check):
        check()

pytest is only needed for `parametrize`; `run_battery(*CASES)` works without.
"""

from .cases import BadInput, Maker, OpCase, Sample
from .checks import CHECKS, PER_DTYPE, battery, devices, parametrize, run_battery, upstream
from .comparison import GradientReport, compare_gradients, compare_values, gradient_report, maximum_error
from .determinism import assert_bitwise_deterministic
from .memory import PeakMemory, peak_memory
from .tolerances import TOLERANCES, Tolerance, tolerance_of
from .zoo import NOT_FINITE, ZERO_VOLUME, degenerate_zoo

__all__ = [
    "BadInput",
    "CHECKS",
    "GradientReport",
    "Maker",
    "NOT_FINITE",
    "OpCase",
    "PER_DTYPE",
    "PeakMemory",
    "Sample",
    "TOLERANCES",
    "Tolerance",
    "ZERO_VOLUME",
    "assert_bitwise_deterministic",
    "battery",
    "compare_gradients",
    "compare_values",
    "degenerate_zoo",
    "devices",
    "gradient_report",
    "maximum_error",
    "parametrize",
    "peak_memory",
    "run_battery",
    "tolerance_of",
    "upstream",
]
