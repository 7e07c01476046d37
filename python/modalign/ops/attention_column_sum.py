"""How much attention every key gets, with no matrix of scores. [LOOK-M, EMNLP Findings 2024]"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _arguments as arguments
from . import _attention_arguments as check
from . import _dense_attention as dense
from ._registration import accumulation_dtype, call, refuse_forward_mode, register_op, without_autocast
from .masked_attention import attend, gradients_of

__all__ = ["attention_column_sum", "reference_attention_column_sum"]

KERNELS = ("sum", "square", "max", "kept")  # in the order of csrc/ops/attention_scores.h
REDUCTIONS, HEADS = ("sum", "mean", "visible_mean", "square", "max"), ("none", "sum", "mean", "max")


def attention_column_sum(
    query: Tensor,
    key: Tensor,
    mask: Tensor | check.MaskProgram | None = None,
    *,
    weights: Tensor | None = None,
    reduction: str = "sum",
    heads: str = "none",
    lse: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool | str = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0,  # an int: torch.compile(dynamic=True) would trace a float default twice
) -> Tensor:
    r"""What the columns of the matrix of attention probabilities add up to: the importance of every key.

    ::

        sum            c_j = sum_i w_i p_ij        p: that of `masked_attention`, 0 where a pair is not kept
        mean           sum_i w_i p_ij / sum_i w_i
        visible_mean   the same over the queries i that keep key j
        square, max    sum_i w_i p_ij^2, max(0, max_i w_i p_ij)

    >>> import torch
    >>> q, k = torch.ones(1, 1, 2, 1), torch.tensor([0.0, 3.0]).log1p().view(1, 1, 2, 1)                # logits 0 and log 4
    >>> attention_column_sum(q, k), attention_column_sum(q, k, causal=True)                             # rows (.2, .8), (.2, .8); (1, 0), (.2, .8)
    (tensor([[[0.4000, 1.6000]]]), tensor([[[1.2000, 0.8000]]]))

    Parameters
    ----------
    query : Tensor [B, H, Nq, D]
    key : Tensor [B, Hkv, Nk, D]
    weights : Tensor [B, Nq] or [B, H, Nq], optional
        How much each query counts, in the query's or the accumulation dtype; default 1. Queries of weight 0 are left out: tiles of theirs are not computed.
    reduction : "sum", "mean", "visible_mean", "square" or "max"
    heads : "none", "sum", "mean" or "max"
        What the heads are joined by.
    lse : Tensor [B, H, Nq], optional
        The log-sum-exps that `masked_attention` gave for the same logits and mask, which is not checked; saves half of the work. In the accumulation dtype.
    mask, bias, causal, key_lengths, scale, softcap
        As in `masked_attention`.

    Returns
    -------
    Tensor [B, H, Nk], or [B, Nk] with the heads joined, in the accumulation dtype (float32; float64 for float64).

    Gradient
    --------
    Of "sum" and "mean" to query, key, bias and weights, through the softmax whole, whether `lse` was given or not; of "visible_mean" to all but the weights. "square" and
    "max" have none: their backward raises, so call them under ``torch.no_grad()``. Double backward and forward mode raise.

    Edges
    -----
    A query that keeps nothing adds nothing, but its weight counts in "mean". Weights that sum to 0, and keys that no query keeps: mean 0. Pairs that are not kept, and
    queries of weight 0, do not reach a result, not even with NaN in them; any other NaN reaches the keys that its query keeps. Nq = 0: 0; Nk or B = 0: empty.

    Raises
    ------
    TypeError, ValueError
        ``attention_column_sum: <argument> must ..., got ...``

    Complexity
    ----------
    2 D FLOP for each pair of the tiles that are computed, 4 D where lse has to be made; as much again for "visible_mean". Backward: that of `masked_attention` forward and
    backward with Dv = H / Hkv. Memory beyond the result: linear in queries and keys.

    Papers: key-value caches, Wan et al., "LOOK-M", EMNLP Findings 2024 (sums); visual tokens, VFlowOpt, ICCV 2025 (means over heads and queries).
    """
    op = "attention_column_sum"
    _, problem = check.check_problem(op, query, key, check.NO_VALUE, mask, bias, causal, key_lengths, scale, softcap)
    for name, given, known in (("reduction", reduction, REDUCTIONS), ("heads", heads, HEADS)):
        if given not in known:
            raise ValueError(f"{op}: {name} must be one of {', '.join(known)}, got {arguments.describe(given)}")
    lse = check.check_lse(op, lse, problem.query)
    counted = problem
    if weights is None:
        weights = problem.query.new_ones((), dtype=accumulation_dtype(problem.query.dtype)).expand(problem.query.shape[0], 1, problem.query.shape[2])
    else:
        weights = check.check_weights(op, "weights", weights, problem.query)
        counted = problem.of_rows(weights != 0)
    if reduction == "visible_mean" and weights.requires_grad and torch.is_grad_enabled():
        raise ValueError(f'{op}: weights must not require a gradient with reduction "visible_mean", got some that do')
    refuse_forward_mode(op, [*problem.differentiable(), weights])
    lse = log_sum_exp(counted) if lse is None else lse
    columns = column_sum(problem, weights, lse, "sum" if "mean" in reduction else reduction)
    if "mean" in reduction:
        total = weights.sum(2, keepdim=True) if reduction == "mean" else column_sum(problem.detached(), weights.detach(), lse, "kept")
        columns = torch.where(total == 0, 0, columns / torch.where(total == 0, 1, total))
    return columns if heads == "none" else columns.amax(1) if heads == "max" else columns.sum(1) if heads == "sum" else columns.mean(1)


def log_sum_exp(problem: check.AttentionProblem) -> Tensor:
    """Without a gradient: what is made with it has one that knows."""
    nothing = problem.key.new_zeros(()).expand(*problem.key.shape[:3], 1)
    with torch.no_grad():
        return attend(problem, nothing)[1]


def column_sum(problem: check.AttentionProblem, weights: Tensor, lse: Tensor, kernel: str = "sum") -> Tensor:
    query, key, bias, key_lengths, numbers, tensors, steps = problem
    with without_autocast(query.device.type):
        return call("attention_column_sum", query, key, lse, weights.expand(query.shape[:3]), bias, key_lengths, *numbers, tensors, steps, KERNELS.index(kernel))


# ------------------------------------------------------------------------------------------------------------------------- what torch needs to know


def _fake(query: Tensor, key: Tensor, *rest: Any) -> Tensor:
    return query.new_empty((*query.shape[:2], key.shape[2]), dtype=accumulation_dtype(query.dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, _, weights, bias, key_lengths, *numbers, mask_tensors, ctx.steps, ctx.kernel = inputs
    ctx.numbers = (0, 0, *numbers)
    ctx.save_for_backward(query, key, weights, bias, key_lengths, *mask_tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """dw_i = sum_j p_ij dc_j =: o_i, the output of an attention whose values are dc, and ds_ij = w_i p_ij (dc_j - o_i), its backward for the upstream gradient w. Heads of a
    group share their values: each has a channel of its own."""
    if ctx.kernel:
        raise RuntimeError(f'attention_column_sum: reduction must be "sum" or "mean" for this gradient, got {KERNELS[ctx.kernel]!r}')
    query, key, weights, bias, key_lengths, *tensors = ctx.saved_tensors
    need, Hkv, group, real = ctx.needs_input_grad, key.shape[1], query.shape[1] // key.shape[1], grad.dtype
    own = torch.eye(group, dtype=real, device=grad.device).repeat(Hkv, 1)[:, None]  # [H, 1, group]
    operands = (query.to(real), key.to(real), grad.unflatten(1, (Hkv, group)).mT, bias, key_lengths, None, None)
    counted = check.mask_of_rows(tensors, ctx.steps, weights != 0)
    out, lse = call("masked_attention", *operands, *ctx.numbers, *((tensors, ctx.steps) if need[3] else counted))
    needed = (True, need[1], False, need[4])  # the first in any case: through it a second derivative is refused
    grad_query, grad_key, _, grad_bias = gradients_of(needed, weights[..., None] * own, torch.zeros_like(lse), out, lse, operands, ctx.numbers, *counted)
    grad_weights = (out * own).sum(-1) + grad_query[:0].sum() if need[3] else None
    grad_query, grad_key = grad_query.to(query.dtype) if need[0] else None, grad_key.to(key.dtype) if need[1] else None
    return grad_query, grad_key, None, grad_weights, grad_bias, None, None, None, None, [None] * len(tensors), None if ctx.steps else [], None


register_op("attention_column_sum", fake=_fake, setup_context=_setup_context, backward=_backward, contiguous=(2,), vmap="loop", autocast=False)


# ----------------------------------------------------------------------------------------------------------------------------- plain-torch formulas


def reference_attention_column_sum(
    query: Tensor,
    key: Tensor,
    mask: Tensor | check.MaskProgram | None = None,
    *,
    weights: Tensor | None = None,
    reduction: str = "sum",
    heads: str = "none",
    bias: Tensor | None = None,
    causal: bool | str = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """`attention_column_sum` in plain torch: all probabilities at once, [B, H, Nq, Nk] of memory; the gradient comes from autograd."""
    p, _ = dense.probabilities(query, key, None, mask, bias, causal, key_lengths, scale, softcap)
    w = p.new_ones(p.shape[:3]) if weights is None else (weights[:, None] if weights.dim() == 2 else weights).to(p.dtype).expand(p.shape[:3])
    if reduction == "square":
        columns = (w[..., None] * p.square()).sum(2)
    elif reduction == "max":
        columns = (w[..., None] * p).amax(2).clamp(min=0)
    else:
        columns = (w[..., None] * p).sum(2)
        if reduction != "sum":
            total = w.sum(2, keepdim=True) if reduction == "mean" else (w[..., None] * dense.kept(query, key, mask, bias, causal, key_lengths)).sum(2)
            columns = torch.where(total == 0, 0, columns / torch.where(total == 0, 1, total))
    return columns if heads == "none" else columns.amax(1) if heads == "max" else columns.sum(1) if heads == "sum" else columns.mean(1)
