"""Attention in which every query keeps the keys with the best scores. [Dynamic Mask Attention, 2025]"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..masks.mask import DENSE, INTERVAL
from . import _arguments as arguments
from . import _attention_arguments as check
from ._registration import accumulation_dtype, call, refuse_forward_mode, register_op
from .masked_attention import attend, reference_masked_attention

__all__ = ["dynamic_mask_attention", "reference_dynamic_mask_attention"]

SCOPES = ("causal", "global")
TILE = 128  # of queries and keys, of the CUDA kernels


def dynamic_mask_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    keep: int,
    *,
    causal: bool = True,
    scope: str = "causal",
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    r"""Attention over the `keep` keys with the largest bias among those that a query sees; the bias is added to the logits of those.

    ::

        K_i = the keep keys j <= i + Nk - Nq with the largest b_j (b_ij), of equal ones the most recent
        z_ij = scale q_i . k_j + b_j        p_ij = exp z_ij / sum over K_i        out_i = sum over K_i of p_ij v_j

    Scores b_j that do not depend on the query need no matrix: the rank of a key among those before a query only falls, so it is kept for one run of queries, and these runs are the mask.

    >>> import torch
    >>> x, v = torch.zeros(1, 1, 4, 1), torch.tensor([1.0, 2.0, 4.0, 8.0]).view(1, 1, 4, 1)
    >>> dynamic_mask_attention(x, x, v, torch.zeros(1, 1, 1, 4), 2).flatten()                              # equal scores: a window of the last two
    tensor([1.0000, 1.5000, 3.0000, 6.0000])

    Parameters
    ----------
    query : Tensor [B, H, Nq, D]
    key : Tensor [B, Hkv, Nk, D]
        Hkv divides H: query head h meets key head h // (H // Hkv).
    value : Tensor [B, Hkv, Nk, Dv]
    bias : Tensor [1 or B, 1 or Hkv or H, 1 or Nq, Nk]
        In the query's or the accumulation dtype. -inf: padding, which is never kept.
    keep : int
        Keys of a query, 1 or more.
    causal : bool
        Query i sees the keys up to i + Nk - Nq. False: all.
    scope : "causal" or "global"
        Of which keys the best are chosen: of those that the query sees, as the paper has it, or of all (as released kernels do; early queries then keep fewer).
    scale : float, optional
        Default 1 / sqrt(D).
    return_lse : bool
        Also lse, as in `masked_attention`.

    Returns
    -------
    Tensor [B, H, Nq, Dv] in the query's dtype; with `return_lse` also lse [B, H, Nq] in the accumulation dtype.

    Gradient
    --------
    To query, key, value and, through the pairs that are kept, bias. The choice has none. Double backward and forward mode raise.

    Edges
    -----
    A query that sees nothing (Nq > Nk), or padding alone: output 0, lse -inf, no gradient. keep >= Nk: nothing is dropped.

    Raises
    ------
    TypeError, ValueError
        ``dynamic_mask_attention: <argument> must ..., got ...``; on the CPU RuntimeError for NaN in the bias (on CUDA it ranks last).

    Complexity
    ----------
    2 (D + Dv) FLOP for about Nq (keep + 96) pairs: keys that lie scattered are gathered for every 96 queries. The choice takes O(Nk log keep). On CUDA keys and values are copied in an order
    in which those that the same queries keep are neighbours, and tiles hold 1.2 to 3 times the kept pairs (keep of 512 or more). Memory linear in queries and keys; a bias of its own for every query is a matrix,
    and so is its mask.

    Paper: Shi et al., "Trainable Dynamic Mask Sparse Attention", 2025.
    """
    op = "dynamic_mask_attention"
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
        raise ValueError(f"{op}: keep must be a whole number of 1 or more, got {arguments.describe(keep)}")
    arguments.check_flag(op, "causal", causal)
    if scope not in SCOPES:
        raise ValueError(f'{op}: scope must be "causal" or "global", got {arguments.describe(scope)}')
    if not isinstance(bias, Tensor) or not bias.is_floating_point():
        raise TypeError(f"{op}: bias must be a floating-point tensor [B, H, 1 or Nq, Nk], got {arguments.describe(bias)}")
    value, problem = check.check_problem(op, query, key, value, None, bias, causal, None, scale, 0)
    with_lse = arguments.check_flag(op, "return_lse", return_lse)
    refuse_forward_mode("masked_attention", [*problem.differentiable(), value])  # which refuses a double backward too
    key, bias, (Nq, Nk) = problem.key, problem.bias, (problem.query.shape[2], problem.key.shape[2])
    if bias.shape[3] != Nk:
        raise ValueError(f"{op}: bias must have as many columns as there are keys, {Nk}, got {arguments.describe(bias)}")
    keep = min(keep, max(Nk, 1))
    scores = bias.detach().to(accumulation_dtype(bias.dtype)).contiguous()
    if bias.shape[2] == 1:
        kept, kind = _intervals(scores[:, :, 0], Nq, keep, causal, scope), INTERVAL
        if key.is_cuda and Nq > TILE and keep < Nk:  # the CPU gathers keys
            key, value, bias, kept = _by_end(key, value, bias, kept, keep)
            problem = problem._replace(key=key, bias=bias, numbers=check.check_numbers(op, query, False, scale, 0))  # the runs say what is causal
    else:
        best = causal and scope == "causal"
        kept, kind = _best(scores, Nq, keep, best) if scores.is_cuda else call("dynamic_mask_kept", scores, keep, best), DENSE
    out, lse = attend(problem._replace(mask_tensors=[kept], mask_steps=[kind, 0, 0, 0]), value)
    return (out, lse) if with_lse else out


def _intervals(scores: Tensor, Nq: int, keep: int, causal: bool, scope: str) -> Tensor:
    """For which queries each key is kept, int32 [B, H, Nk, 2]. Query i is there when key i + Nk - Nq has arrived."""
    Nk = scores.shape[2]
    ends = call("dynamic_mask_ends", scores, keep)
    arrival = torch.arange(Nk, dtype=torch.int32, device=scores.device)
    if not causal or scope == "global":  # those that nobody has beaten at the end
        ends = torch.where(ends == Nk, ends, arrival)
    last = (ends + (Nq - Nk)).clamp(0, Nq)
    first = (arrival + (Nq - Nk)).clamp(0, Nq).expand_as(last) if causal else torch.where(ends == arrival, last, 0)
    return torch.stack([first.minimum(last), last], -1)


def _by_end(key: Tensor, value: Tensor, bias: Tensor, runs: Tensor, keep: int) -> tuple[Tensor, ...]:
    """The same keys, so that those of a tile are kept by the same queries: by the last query that keeps them, to `keep` queries, and of those in the order they came in. As they came, nearly
    every tile has a key that stayed: of random scores, 32,768 keys and 1,024 kept, tiles hold 16 times the kept pairs, and 1.7 times in this order. Keys that nobody keeps are last."""
    Nk = runs.shape[2]
    last = torch.where(runs[..., 0] < runs[..., 1], runs[..., 1] // keep, torch.iinfo(runs.dtype).max)
    order = last.argsort(dim=2, stable=True)

    def put(x: Tensor) -> Tensor:
        """x [B, heads, Nk, numbers]; heads that share an order have it in turn, and so have those that share x."""
        B, heads = max(x.shape[0], order.shape[0]), max(x.shape[1], order.shape[1])
        at = order.repeat_interleave(heads // order.shape[1], 1) + Nk * torch.arange(heads, device=x.device)[:, None]
        at = at + heads * Nk * torch.arange(B, device=x.device)[:, None, None]
        rows = x.repeat_interleave(heads // x.shape[1], 1).expand(B, -1, -1, -1).flatten(0, 2)
        return rows.index_select(0, at.flatten()).view(B, heads, Nk, x.shape[3])

    return put(key), put(value), put(bias.mT).mT, put(runs)


def _best(scores: Tensor, Nq: int, keep: int, causal: bool) -> Tensor:
    """Bool [B, H, Nq, Nk]: every query sorts its keys."""
    Nk = scores.shape[3]
    scores = torch.where(scores.isnan(), -torch.inf, scores).expand(*scores.shape[:2], Nq, Nk)
    seen = torch.ones(Nq, Nk, dtype=torch.bool, device=scores.device).tril(Nk - Nq if causal else Nk)
    best = Nk - 1 - scores.masked_fill(~seen, -torch.inf).flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., :keep]  # of equal ones the last
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True) & seen  # what is not seen ties with padding, which is not kept either


# ------------------------------------------------------------------------------------------------------------------------- what torch needs to know


def _fake_ends(scores: Tensor, keep: int) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.int32)


def _fake_kept(scores: Tensor, keep: int, causal: bool) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.bool)


def _no_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    return None


register_op("dynamic_mask_ends", fake=_fake_ends, setup_context=_no_context, backward=lambda ctx, grad: (None, None), contiguous=(0,), autocast=False)
register_op("dynamic_mask_kept", fake=_fake_kept, setup_context=_no_context, backward=lambda ctx, grad: (None, None, None), contiguous=(0,), autocast=False)


# ------------------------------------------------------------------------------------------------------------------------------------- the reference


def reference_dynamic_mask_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, keep: int, *, causal: bool = True, scope: str = "causal", scale: float | None = None, return_lse: bool = False
) -> Any:
    """`dynamic_mask_attention` in plain torch: every query sorts its keys."""
    mask = _best(bias.detach(), query.shape[2], keep, causal and scope == "causal")
    return reference_masked_attention(query, key, value, mask, bias=bias, causal=causal, scale=scale, return_lse=return_lse)
