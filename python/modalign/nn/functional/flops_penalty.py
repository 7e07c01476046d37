"""Penalty for words that are active in many samples, by their mean activation. [FLOPs regularizer, ICLR 2020]"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _features as inputs

__all__ = ["flops_penalty"]


def flops_penalty(lexical: Tensor) -> Tensor:
    """``sum_v (mean_b s_bv)^2``: about the products that two samples cost each other in an inverted index.

    >>> import torch
    >>> flops_penalty(torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
    tensor(2.)

    Parameters: lexical float [B, V], an activation for each of V words, not negative in the published model.

    Returns float32 (float64 for float64); 0 for B = 0. Differentiable, also twice. A NaN makes it NaN. It also shrinks activations, which
    `overuse_penalty` does not.

    Raises TypeError and ValueError, ``flops_penalty: <argument> must ..., got ...``.

    Paper: Paria et al., "Minimizing FLOPs to learn efficient sparse representations", ICLR 2020, section 3."""
    (lexical,) = inputs.check_features("flops_penalty", lexical=(lexical, "[B, V]"))
    with torch.autocast(lexical.device.type, enabled=False):
        return (lexical.sum(0) / max(1, len(lexical))).square().sum()
