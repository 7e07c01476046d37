"""Where a walk along attention ends up, with no matrix of scores. [AIM, ICCV 2025]"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _arguments as arguments
from . import _attention_arguments as check
from . import _dense_attention as dense
from ._registration import accumulation_dtype, refuse_forward_mode
from .attention_column_sum import column_sum, log_sum_exp

__all__ = ["attention_power_iteration", "reference_attention_power_iteration"]


def attention_power_iteration(
    query: Tensor,
    key: Tensor,
    mask: Tensor | check.MaskProgram | None = None,
    *,
    iterations: int = 5,
    damping: float = 0,  # ints: torch.compile(dynamic=True) would trace a float default twice
    start: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool | str = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0,
) -> Tensor:
    r"""Page rank of tokens on the graph of self-attention: tokens are important that important tokens look at.

    ::

        x_0 = start, or 1 / N        x_t+1 = (1 - damping) x_t P + damping x_0        P: the probabilities of `masked_attention`

    >>> import torch
    >>> q, k = torch.ones(1, 1, 2, 1), torch.tensor([0.0, 3.0]).log1p().view(1, 1, 2, 1)
    >>> attention_power_iteration(q, k), attention_power_iteration(q, k, causal=True, iterations=1)       # rows (.2, .8); (1, 0), (.2, .8)
    (tensor([[[0.2000, 0.8000]]]), tensor([[[0.6000, 0.4000]]]))

    Parameters
    ----------
    query : Tensor [B, H, N, D]
    key : Tensor [B, Hkv, N, D]
    iterations : int
        0 or more.
    damping : float
        From 0 to 1: the share that starts anew.
    start : Tensor [B, N] or [B, H, N], optional
        Where the walk begins, in the query's or the accumulation dtype: 0 for padding, the rest with the sum 1.
    mask, bias, causal, key_lengths, scale, softcap
        As in `masked_attention`; published: causal, scale 1 / (0.1 sqrt D).

    Returns
    -------
    Tensor [B, H, N] in the accumulation dtype (float32; float64 for float64). Published importance: ``x.square().mean(1).sqrt()``.

    Gradient
    --------
    To query, key, bias and start. Double backward and forward mode raise.

    Edges
    -----
    The sum stays what it is at the start, but that what stands on a token that keeps nothing is lost. N or B = 0: empty.

    Raises
    ------
    TypeError, ValueError
        ``attention_power_iteration: <argument> must ..., got ...``

    Complexity
    ----------
    2 D (iterations + 1) FLOP for each pair of the tiles that are computed. Memory linear in N.

    Paper: Zhong et al., "AIM: adaptive inference of multi-modal LLMs via token merging and pruning", ICCV 2025.
    """
    op = "attention_power_iteration"
    _, problem = check.check_problem(op, query, key, check.NO_VALUE, mask, bias, causal, key_lengths, scale, softcap)
    B, _, N, _ = problem.query.shape
    if problem.key.shape[2] != N:
        raise ValueError(f"{op}: key must have as many tokens as query, {N}, got {problem.key.shape[2]}")
    if isinstance(iterations, bool) or not isinstance(iterations, int):
        raise TypeError(f"{op}: iterations must be a whole number, got {arguments.describe(iterations)}")
    if iterations < 0:
        raise ValueError(f"{op}: iterations must be 0 or more, got {iterations}")
    if isinstance(damping, bool) or not isinstance(damping, (int, float)):
        raise TypeError(f"{op}: damping must be a number, got {arguments.describe(damping)}")
    if not 0 <= damping <= 1:
        raise ValueError(f"{op}: damping must be from 0 to 1, got {damping!r}")
    if start is None:
        start = problem.query.new_full((B, 1, N), 1 / max(1, N), dtype=accumulation_dtype(problem.query.dtype))
    else:
        start = check.check_weights(op, "start", start, problem.query)
    refuse_forward_mode("attention_column_sum", [*problem.differentiable(), start])
    found, lse = start.expand(problem.query.shape[:3]), log_sum_exp(problem)
    for _ in range(iterations):
        found = (1 - damping) * column_sum(problem, found, lse) + damping * start
    return found


def reference_attention_power_iteration(
    query: Tensor,
    key: Tensor,
    mask: Tensor | check.MaskProgram | None = None,
    *,
    iterations: int = 5,
    damping: float = 0.0,
    start: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool | str = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """`attention_power_iteration` in plain torch, with the matrix."""
    p, _ = dense.probabilities(query, key, None, mask, bias, causal, key_lengths, scale, softcap)
    N = p.shape[-1]
    start = p.new_full((1, 1, N), 1 / max(1, N)) if start is None else (start[:, None] if start.dim() == 2 else start).to(p.dtype)
    found = start = start.expand(p.shape[:3])
    for _ in range(iterations):
        found = (1 - damping) * (found[:, :, None] @ p)[:, :, 0] + damping * start
    return found
