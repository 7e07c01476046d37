"""How far a result may be off, in one table keyed by dtype."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Tolerance:
    """value: the share of the output's RMS by which the maximum error may exceed that of the plain-torch formula in the same dtype.
    The rest bounds gradients, see `compare_gradients`; all of it is relative to the RMS or the norm of the expected gradient."""

    value: float
    element: float
    relative_l2: float
    cosine: float
    bias: float
    outliers: float = 0.0

    def times(self, factor: float) -> Tolerance:
        """All bounds but the outlier budget, loosened by `factor`."""
        return replace(
            self,
            value=factor * self.value,
            element=factor * self.element,
            relative_l2=factor * self.relative_l2,
            cosine=factor**2 * self.cosine,
            bias=factor * self.bias,
        )


TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(value=1e-12, element=1e-10, relative_l2=1e-11, cosine=1e-13, bias=1e-11),
    torch.float32: Tolerance(value=1e-5, element=1e-4, relative_l2=1e-5, cosine=1e-9, bias=5e-6),
    # Gradients come back rounded to the input dtype: half a unit in the last place is 5e-4 (float16) and 4e-3 (bfloat16) of an element.
    torch.float16: Tolerance(value=1e-3, element=1e-2, relative_l2=1e-3, cosine=2e-6, bias=3e-4),
    torch.bfloat16: Tolerance(value=1e-2, element=8e-2, relative_l2=8e-3, cosine=1e-4, bias=2e-3),
}


def tolerance_of(dtype: torch.dtype, overrides: dict[torch.dtype, Tolerance] | None = None) -> Tolerance:
    return {**TOLERANCES, **(overrides or {})}[dtype]
