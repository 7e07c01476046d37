"""How sharp the attention of every query is, with no matrix of scores. [VFlowOpt, ICCV 2025]"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _attention_arguments as check
from . import _dense_attention as dense
from ._registration import accumulation_dtype, call, refuse_forward_mode, register_op, without_autocast
from ._results import AttentionRowStatistics
from .attention_column_sum import log_sum_exp

__all__ = ["attention_row_statistics", "reference_attention_row_statistics"]


def attention_row_statistics(
    query: Tensor,
    key: Tensor,
    mask: Tensor | check.MaskProgram | None = None,
    *,
    lse: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool | str = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0,  # an int: torch.compile(dynamic=True) would trace a float default twice
) -> AttentionRowStatistics:
    r"""Entropy and largest probability of the attention of every query.

    ::

        entropy_i = -sum_j p_ij ln p_ij        maximum_i = max_j p_ij        p: that of `masked_attention`

    >>> import torch
    >>> q, k = torch.ones(1, 1, 1, 1), torch.tensor([0.0, 3.0]).log1p().view(1, 1, 2, 1)                # probabilities .2 and .8
    >>> attention_row_statistics(q, k)
    AttentionRowStatistics(entropy=tensor([[[0.5004]]]), maximum=tensor([[[0.8000]]]))

    Parameters
    ----------
    query : Tensor [B, H, Nq, D]
    key : Tensor [B, Hkv, Nk, D]
    lse : Tensor [B, H, Nq], optional
        As in `attention_column_sum`.
    mask, bias, causal, key_lengths, scale, softcap
        As in `masked_attention`.

    Returns
    -------
    AttentionRowStatistics: entropy and maximum, [B, H, Nq] each, in the accumulation dtype (float32; float64 for float64).

    Gradient
    --------
    None: the backward raises, so call it under ``torch.no_grad()``. Forward mode raises.

    Edges
    -----
    A query that keeps nothing: 0 and 0; one key: 0 and 1. Pairs that are not kept do not reach a result; a NaN that is kept makes both NaN for its query alone.

    Raises
    ------
    TypeError, ValueError
        ``attention_row_statistics: <argument> must ..., got ...``

    Complexity
    ----------
    2 D FLOP for each pair of the tiles that are computed, 4 D where lse has to be made. Memory beyond the result: linear in queries and keys.

    Paper: the weights of pruning by attention, VFlowOpt, ICCV 2025.
    """
    op = "attention_row_statistics"
    _, problem = check.check_problem(op, query, key, check.NO_VALUE, mask, bias, causal, key_lengths, scale, softcap)
    lse = check.check_lse(op, lse, problem.query)
    refuse_forward_mode(op, problem.differentiable())
    query, key, bias, key_lengths, numbers, tensors, steps = problem
    lse = log_sum_exp(problem) if lse is None else lse
    with without_autocast(query.device.type):
        return AttentionRowStatistics(*call(op, query, key, lse, bias, key_lengths, *numbers, tensors, steps))


def _fake(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    real = accumulation_dtype(query.dtype)
    return query.new_empty(query.shape[:3], dtype=real), query.new_empty(query.shape[:3], dtype=real)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    return None


def _backward(ctx: Any, *grads: Tensor) -> Any:
    raise RuntimeError("attention_row_statistics: there is no gradient, call it under torch.no_grad()")


register_op("attention_row_statistics", fake=_fake, setup_context=_setup_context, backward=_backward, contiguous=(2,), vmap="loop", autocast=False)


def reference_attention_row_statistics(
    query: Tensor,
    key: Tensor,
    mask: Tensor | check.MaskProgram | None = None,
    *,
    bias: Tensor | None = None,
    causal: bool | str = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
) -> AttentionRowStatistics:
    """`attention_row_statistics` in plain torch: all probabilities at once."""
    p, _ = dense.probabilities(query, key, None, mask, bias, causal, key_lengths, scale, softcap)
    return AttentionRowStatistics(-torch.xlogy(p, p).sum(-1), p.amax(-1) if p.shape[-1] else p.new_zeros(p.shape[:3]))
