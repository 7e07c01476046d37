"""PiToMe's matching under the names of its released code, on `modalign.ops.match_tokens`: tokens that have many like them merge, the others are protected.

>>> import torch
>>> from modalign.compat.pitome import pitome_vision
>>> x = torch.randn(2, 17, 8)
>>> merge, _ = pitome_vision(x, ratio=0.75, margin=0.5, class_token=True)
>>> merge(x).shape
torch.Size([2, 13, 8])
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..nn.functional import energy_order, token_energy
from ..ops import match_tokens
from .tome import do_nothing

__all__ = ["pitome_text", "pitome_vision"]

Pair = tuple[Callable[..., Tensor], Callable[..., Tensor]]


def _joining(N: int, ratio: float) -> int:
    if not 0 < ratio <= 1:
        raise ValueError(f"pitome: ratio must be above 0 and at most 1, got {ratio!r}")
    return min(int(N - N * ratio), N // 2)


def pitome_vision(metric: Tensor, ratio: float = 1.0, margin: float = 0.5, class_token: bool = False, alpha: float = 1.0) -> Pair:
    """(merge, unmerge): floor(N - N ratio) of the tokens with the most energy join the most similar of as many others. Output: class token, protected by falling energy, destinations."""
    first, N = int(class_token), metric.shape[1]
    r = _joining(N - first, ratio)
    if r <= 0:
        return do_nothing, do_nothing
    order = energy_order(token_energy(metric[:, first:], margin, alpha=alpha), r, protected=first)
    match = match_tokens(metric, r, order=order, protected=N - 2 * r)
    return match.merge, match.unmerge


def pitome_text(metric: Tensor, ratio: float = 1.0, margin: float = 0.5, class_token: bool = False) -> Pair:
    """The form for texts: energies by a Gaussian, and of the 2 r tokens the more redundant half joins the other."""
    first, N = int(class_token), metric.shape[1]
    r = _joining(N - first, ratio)
    if r <= 0:
        return do_nothing, do_nothing
    ranked = token_energy(metric[:, first:], margin, kernel="gaussian").argsort(dim=1, descending=True, stable=True) + first
    halves = torch.stack([ranked[:, :r], ranked[:, r : 2 * r]], 2)
    if N % 2:  # sources stand at even places
        halves = halves.flip(2)
    order = torch.cat([torch.arange(first, device=metric.device).expand(len(metric), -1), ranked[:, 2 * r :], halves.flatten(1)], 1)
    match = match_tokens(metric, r, order=order, protected=N - 2 * r)
    return match.merge, match.unmerge
