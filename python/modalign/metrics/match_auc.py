"""Area under the curve of errors below a threshold: how matches, or the poses made of them, are rated. [SuperGlue, CVPR 2020]"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops._arguments import describe

__all__ = ["match_auc"]


def match_auc(errors: Tensor, thresholds: Sequence[float] = (5.0, 10.0, 20.0)) -> list[float]:
    """The share of errors below t, averaged over t from 0 to each threshold, in one piece from point to point.

    >>> import torch
    >>> match_auc(torch.tensor([0.0, 5.0, torch.inf, torch.inf]), [10.0])
    [0.4375]

    errors: floating-point Tensor [N] of 0 or more, in pixels or degrees; inf for what was not found. thresholds: positive. Returns one number from 0 to 1 for each; 1 where all errors are 0. The curve
    goes straight from (0, 0) through (error, share of errors up to it) in rising order, and is level behind the last error below the threshold, as in the published evaluation. Raises ValueError:
    ``match_auc: <argument> must ..., got ...``.
    """
    if not isinstance(thresholds, (list, tuple)):
        raise ValueError(f"match_auc: thresholds must be a sequence of numbers, got {describe(thresholds)}")
    errors = errors.detach() if isinstance(errors, Tensor) else errors
    if not isinstance(errors, Tensor) or errors.dim() != 1 or not errors.is_floating_point() or len(errors) == 0:
        raise ValueError(f"match_auc: errors must be a floating-point tensor [N], N 1 or more, got {describe(errors)}")
    if not bool((errors >= 0).all()):
        raise ValueError(f"match_auc: errors must be 0 or more, got {float(errors.min()):g}")
    if not all(isinstance(t, (int, float)) and 0 < t < float("inf") for t in thresholds):
        raise ValueError(f"match_auc: thresholds must be positive, got {list(thresholds)}")
    place = torch.cat([errors.new_zeros(1, dtype=torch.float64), errors.double().cpu().sort().values])
    share = torch.arange(len(place), dtype=torch.float64) / len(errors)
    found = []
    for threshold in thresholds:
        inside = int(torch.searchsorted(place, torch.tensor(threshold, dtype=torch.float64)))
        x = torch.cat([place[:inside], place.new_tensor([threshold])])
        y = torch.cat([share[:inside], share[inside - 1 : inside]])
        found.append(float(torch.trapezoid(y, x)) / threshold)
    return found
