"""Comparing values and gradients with a float64 reference, so that both a wild element and a small systematic error are seen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .tolerances import Tolerance, tolerance_of


@dataclass(frozen=True)
class GradientReport:
    """element: largest error over the RMS of the expected gradient; outliers: share of elements whose error exceeds the element bound; relative_l2:
    |error| / |expected|; cosine: 1 - cos(actual, expected); bias: |sum error * sign(expected)| / sum |expected|, the part of the error that has the
    gradient's own sign."""

    element: float
    outliers: float
    relative_l2: float
    cosine: float
    bias: float
    count: int

    def problems(self, bounds: Tolerance) -> list[str]:
        # Independent roundings average out: with n elements they leave about relative_l2 / sqrt(n) of bias, which is no sign of anything systematic.
        bias_bound = bounds.bias + 4 * bounds.relative_l2 / self.count**0.5
        found = []
        if self.outliers > bounds.outliers:
            found.append(
                f"{self.outliers:.2%} of the elements are off by more than {bounds.element:g} RMS (largest {self.element:.3g}), "
                f"allowed {bounds.outliers:.2%}"
            )
        if not self.relative_l2 <= bounds.relative_l2:
            found.append(f"relative L2 error {self.relative_l2:.3g} > {bounds.relative_l2:g}")
        if not self.cosine <= bounds.cosine:
            found.append(f"1 - cosine {self.cosine:.3g} > {bounds.cosine:g}")
        if not self.bias <= bias_bound:
            found.append(f"signed bias {self.bias:.3g} > {bias_bound:.3g}")
        return found


def gradient_report(actual: Tensor, expected: Tensor, element_bound: float) -> GradientReport:
    if actual.shape != expected.shape:
        raise AssertionError(f"gradient has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    a, e = actual.detach().double().cpu().flatten(), expected.detach().double().cpu().flatten()
    if e.numel() == 0:
        return GradientReport(0.0, 0.0, 0.0, 0.0, 0.0, 1)
    error, norm = a - e, e.norm().item()
    if norm == 0 or not torch.isfinite(e).all():
        same = torch.equal(a.isnan(), e.isnan()) and torch.equal(a.nan_to_num(nan=0.0), e.nan_to_num(nan=0.0))
        bad = 0.0 if same else float("inf")
        return GradientReport(bad, 0.0 if same else 1.0, bad, bad, bad, e.numel())
    largest = error.abs() / (norm / e.numel() ** 0.5)
    actual_norm = a.norm().item()
    cosine = 1 - (a @ e).item() / (actual_norm * norm) if actual_norm > 0 else 1.0
    return GradientReport(
        element=largest.max().item(),
        outliers=(~(largest <= element_bound)).double().mean().item(),
        relative_l2=error.norm().item() / norm,
        cosine=max(cosine, 0.0) if cosine == cosine else cosine,
        bias=abs((error * e.sign()).sum().item()) / e.abs().sum().item(),
        count=e.numel(),
    )


def compare_gradients(
    actual: Tensor | None, expected: Tensor, *, dtype: torch.dtype | None = None, tolerance: Tolerance | None = None, what: str = "gradient"
) -> GradientReport:
    """Raise AssertionError unless `actual` agrees with `expected` (float64) in every element (up to an outlier budget), in norm, in direction and
    in bias. An expected gradient that is all zero must come out exactly zero."""
    if actual is None:
        raise AssertionError(f"{what}: there is none")
    bounds = tolerance or tolerance_of(dtype or actual.dtype)
    report = gradient_report(actual, expected, bounds.element)
    problems = report.problems(bounds)
    if problems:
        raise AssertionError(f"{what}: " + "; ".join(problems))
    return report


def maximum_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; NaN in both places counts as equal, in one as infinite."""
    a, e = actual.detach().double().cpu(), expected.detach().double().cpu()
    if a.shape != e.shape:
        raise AssertionError(f"result has shape {tuple(a.shape)}, expected {tuple(e.shape)}")
    if a.numel() == 0:
        return 0.0
    difference = torch.where(a == e, 0, (a - e).abs())  # equal infinities
    difference = torch.where(a.isnan() & e.isnan(), 0, difference)
    return torch.where(difference.isnan(), torch.inf, difference).max().item()


def compare_values(
    actual: Tensor,
    expected: Tensor,
    yardstick: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    tolerance: Tolerance | None = None,
    what: str = "value",
) -> float:
    """Raise unless max |actual - expected| <= max |yardstick - expected| + tolerance x RMS(expected). `expected` is the float64 reference on the
    same (rounded) inputs, `yardstick` the plain-torch formula in the tested dtype; one that fails altogether (NaN, Inf) allows nothing."""
    bounds = tolerance or tolerance_of(dtype or actual.dtype)
    finite = expected[torch.isfinite(expected)].double()
    rms = finite.square().mean().sqrt().item() if finite.numel() else 0.0
    allowed = bounds.value * rms
    if yardstick is not None:
        error_of_formula = maximum_error(yardstick, expected)
        allowed += error_of_formula if error_of_formula < float("inf") else 0.0
    error = maximum_error(actual, expected)
    if not error <= allowed:
        raise AssertionError(f"{what}: maximum error {error:.3g}, allowed {allowed:.3g} (RMS of the result {rms:.3g})")
    return error
