"""Softmax attention under a mask, with no matrix of scores. [FlashAttention, NeurIPS 2022]"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _arguments as arguments
from . import _attention_arguments as check
from . import _dense_attention as dense
from ._registration import accumulation_dtype, call, refuse_forward_mode, register_pair, without_autocast

__all__ = ["masked_attention", "reference_masked_attention"]


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | check.MaskProgram | None = None,
    *,
    bias: Tensor | None = None,
    causal: bool | str = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0,  # an int: torch.compile(dynamic=True) would trace a float default twice
    return_lse: bool = False,
    deterministic: bool = True,
) -> Any:
    r"""Attention over the keys that a mask keeps.

    ::

        z_ij = c(scale q_i . k_j) + b_ij        c(x) = softcap tanh(x / softcap), or x for softcap 0
        p_ij = exp(z_ij - lse_i)                lse_i = log sum_j exp z_ij        over the j that are kept
        out_i = sum_j p_ij v_j

    Tiles of which nothing is kept are not computed, and nothing of N x N is stored.

    >>> import torch
    >>> q, k, v = torch.ones(1, 1, 1, 1), torch.tensor([0.0, 3.0]).log1p().view(1, 1, 2, 1), torch.tensor([4.0, 8.0]).view(1, 1, 2, 1)
    >>> masked_attention(q, k, v), masked_attention(q, k, v, torch.tensor([True, False]))
    (tensor([[[[7.2000]]]]), tensor([[[[4.]]]]))

    Parameters
    ----------
    query : Tensor [B, H, Nq, D]
    key : Tensor [B, Hkv, Nk, D]
        Hkv divides H: query head h meets key head h // (H // Hkv).
    value : Tensor [B, Hkv, Nk, Dv]
    mask : bool tensor that broadcasts to [B, H, Nq, Nk], or a mask of `modalign.masks`, optional
        True: keep. It may have Hkv heads, which the heads of a group share. Masks of `modalign.masks` need memory that is linear in queries and keys.
    bias : Tensor that broadcasts to [B, H, Nq, Nk], optional
        Added to the logits, after the soft-cap; -inf is not kept. It may have Hkv heads. In the query's or the accumulation dtype.
    causal : False, True, "bottom_right" or "top_left"
        Query i keeps the keys up to i + Nk - Nq ("bottom_right", True: the last query sees all, as in decoding), or up to i ("top_left", as torch does it).
    key_lengths : int64 tensor [B], optional
        Keys behind an item's length are not kept. Alignment of `causal` counts all Nk.
    scale : float, optional
        Default 1 / sqrt(D).
    softcap : float
        0: none.
    return_lse : bool
        Also the logarithm of the sum of exponentials, by which parts of an attention are merged.
    deterministic : bool
        True: equal bits every time. On the CPU it is always so.

    Returns
    -------
    Tensor [B, H, Nq, Dv] in the query's dtype; with `return_lse` also lse [B, H, Nq] in the accumulation dtype (float32; float64 for float64).

    Gradient
    --------
    To query, key, value and bias, also through lse. A bias that is broadcast gets the sum. Double backward and forward mode raise.

    Edges
    -----
    A query that keeps nothing: output 0, lse -inf, no gradient. Pairs that are not kept do not reach a result, not even with NaN in them. A NaN in a kept
    key or value reaches the queries that keep it, no others. Nq or B = 0: empty; Nk = 0: every query keeps nothing.

    Under autocast query, key and value are cast to its dtype, as torch's attention does.

    Raises
    ------
    TypeError, ValueError
        ``masked_attention: <argument> must ..., got ...``.

    Complexity
    ----------
    2 (D + Dv) FLOP for each pair of the tiles that are computed, backward 2 (3 D + 2 Dv). Memory beyond the result: operands that do not lie
    contiguously in the accumulation dtype, or whose D is no multiple of 32, once more; in the backward up to eight times the gradient of the queries.

    Papers: Dao et al., "FlashAttention", NeurIPS 2022 (the running softmax); soft-cap: Gemma 2, 2024.
    """
    op = "masked_attention"
    value, problem = check.check_problem(op, query, key, value, mask, bias, causal, key_lengths, scale, softcap)
    arguments.check_flag(op, "deterministic", deterministic)
    with_lse = arguments.check_flag(op, "return_lse", return_lse)
    refuse_forward_mode(op, [*problem.differentiable(), value])
    out, lse = attend(problem, value)
    return (out, lse) if with_lse else out


def attend(problem: check.AttentionProblem, value: Tensor) -> tuple[Tensor, Tensor]:
    """The output and lse of what has been checked."""
    query, key, bias, key_lengths, numbers, tensors, steps = problem
    with without_autocast(query.device.type):
        return call("masked_attention", query, key, value, bias, key_lengths, None, None, 0, 0, *numbers, tensors, steps)  # sizes as numbers would be fixed in a compiled graph


# ------------------------------------------------------------------------------------------------------------------------- what torch needs to know


def _fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    rows = query.shape[:3]
    return query.new_empty((*rows, value.shape[3])), query.new_empty(rows, dtype=accumulation_dtype(query.dtype))


def _fake_backward(grad_out: Tensor, grad_lse: Any, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Any, *rest: Any) -> tuple[Tensor, ...]:
    shape = (*bias.shape[:3], key.shape[2]) if rest[-1] else (0,)
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape), query.new_empty(shape, dtype=accumulation_dtype(query.dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *_, mask_tensors, ctx.steps = inputs
    ctx.numbers = inputs[7:12]
    ctx.save_for_backward(*output, *inputs[:7], *mask_tensors)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    out, lse, *tensors = ctx.saved_tensors
    tensors, mask_tensors = tensors[:7], tensors[7:]
    gradients = gradients_of(ctx.needs_input_grad[:4], grad_out, grad_lse, out, lse, tensors, ctx.numbers, mask_tensors, ctx.steps)
    return (*gradients, *(None,) * 8, [None] * len(mask_tensors), None if ctx.steps else [])  # torch takes an empty list for one of tensors


def gradients_of(need: Any, grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, tensors: Any, numbers: Any, mask_tensors: Any, steps: Any) -> list[Tensor | None]:
    """Of query, key, value and bias, the first four of `tensors`, where they are needed."""
    bias = tensors[3]
    per_query = bias is not None and bias.shape[3] == 1  # such a bias moves lse by itself and nothing else
    by_kernel = bool(need[3]) and not per_query
    grad_query, grad_key, grad_value, grad_bias = call("masked_attention_bwd", grad_out, grad_lse.contiguous(), out, lse, *tensors, *numbers, mask_tensors, steps, by_kernel)
    if need[3]:
        if per_query:
            grad_bias = torch.where(lse == -torch.inf, 0, grad_lse)[..., None]
            if bias.shape[1] not in (1, grad_bias.shape[1]):
                grad_bias = grad_bias.unflatten(1, (bias.shape[1], -1)).sum(2)
            grad_bias = grad_bias.sum_to_size(bias.shape) + grad_query[:0].sum()  # so that a second derivative is refused
        grad_bias = grad_bias.to(bias.dtype)
    return [each if wanted else None for each, wanted in zip((grad_query, grad_key, grad_value, grad_bias), need, strict=True)]


register_pair(
    "masked_attention",
    op="masked_attention",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    backward=_backward,
    saved=(1, 3),
    vmap="loop",
    autocast=False,
)


# ----------------------------------------------------------------------------------------------------------------------------- plain-torch formulas


def reference_masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | check.MaskProgram | None = None,
    *,
    bias: Tensor | None = None,
    causal: bool | str = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
    deterministic: bool = True,
) -> Any:
    """`masked_attention` in plain torch: all logits at once, [B, H, Nq, Nk] of memory; the gradient comes from autograd."""
    p, lse = dense.probabilities(query, key, None, mask, bias, causal, key_lengths, scale, softcap)
    group = query.shape[1] // key.shape[1]
    unseen = ~dense.kept(query, key, mask, bias, causal, key_lengths).any(2).unflatten(1, (key.shape[1], group)).any(2)[..., None]  # what no query keeps may hold anything
    out = (p @ value.to(p.dtype).masked_fill(unseen, 0).repeat_interleave(group, 1)).to(query.dtype)
    return (out, lse) if return_lse else out
