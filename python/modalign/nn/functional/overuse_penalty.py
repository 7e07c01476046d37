"""Penalty for words that are active in many samples, whatever their size. [LexVLA, NeurIPS 2024]"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _features as inputs
from ._values import check_not_negative

__all__ = ["overuse_penalty"]


def overuse_penalty(lexical: Tensor) -> Tensor:
    r"""How unevenly a batch uses the vocabulary.

    ::

        p_bv = s_bv / sum_v s_bv        loss = V sum_v (mean_b p_bv)^2

    1 where all words are used alike, V where every sample has the same one word. The size of a sample's activations does not matter, so nothing is gained
    by shrinking them, as it is with `flops_penalty`.

    >>> import torch
    >>> overuse_penalty(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 5.0, 0.0, 0.0]]))          # one word each, of four: V / B
    tensor(2.)

    Parameters: lexical float [B, V], an activation of at least 0 for each of V words, as `nn.LexicalHead` gives it.

    Returns float32 (float64 for float64). A sample without an active word is left out: one whose activations sum to at most 1e-19 (float64 1e-154); 0 where
    there is no other. Differentiable, also twice; a sample that is left out has gradient 0. A NaN makes it NaN. Beyond the input it takes V + B numbers.

    Raises TypeError and ValueError, ``overuse_penalty: <argument> must ..., got ...``; for negative activations on the CPU only.

    Paper: Li et al., "Unified lexical representation for interpretable visual-language alignment" (LexVLA), NeurIPS 2024. The paper names the penalty; this
    formula is ours, as no code was released."""
    op = "overuse_penalty"
    (lexical,) = inputs.check_features(op, lexical=(lexical, "[B, V]"))
    check_not_negative(op, "lexical", lexical)
    with torch.autocast(lexical.device.type, enabled=False):
        total = lexical.sum(1)
        used = ~(total <= torch.finfo(total.dtype).tiny ** 0.5)
        share = torch.where(used, 1 / torch.where(used, total, 1), 0) / used.sum().clamp(min=1)
        return lexical.shape[1] * (share @ lexical).square().sum()
