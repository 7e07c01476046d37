"""Attention within sequences that lie one behind the other. [FlashAttention-2, ICLR 2024]"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..masks._values import are_there
from ..masks.mask import MOST_STEPS
from ..masks.packed import packed
from . import _arguments as arguments
from . import _attention_arguments as check
from ._registration import call, refuse_forward_mode, without_autocast

__all__ = ["masked_attention_varlen"]


def masked_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    mask: check.MaskProgram | None = None,
    *,
    causal: bool | str = False,
    scale: float | None = None,
    softcap: float = 0,
    return_lse: bool = False,
    deterministic: bool = True,
) -> Any:
    r"""`masked_attention` of sequences that lie one behind the other: sequence s has the rows cu_seqlens[s] to cu_seqlens[s + 1] - 1.

    >>> import torch
    >>> v, cu = torch.tensor([1.0, 2.0, 6.0]).view(3, 1, 1), torch.tensor([0, 1, 3], dtype=torch.int32)
    >>> masked_attention_varlen(torch.zeros(3, 1, 1), torch.zeros(3, 1, 1), v, cu, cu, 2, 2).flatten()
    tensor([1., 4., 4.])

    Parameters
    ----------
    query : Tensor [T, H, D]
    key : Tensor [Tk, Hkv, D]
    value : Tensor [Tk, Hkv, Dv]
    cu_seqlens_q, cu_seqlens_k : int32 tensors [sequences + 1]
        Rising from 0 to T and Tk.
    max_q, max_k : int
        The longest sequences, or more.
    mask : modalign.masks, optional
        Which pairs of a sequence are kept, of all T queries and Tk keys; at most 14 terms and signs. In a compiled graph the values of cu_seqlens are not looked at then: rows behind the last
        sequence keep nothing.
    causal, scale, softcap, return_lse, deterministic
        As in `masked_attention`; `causal` is aligned in every sequence.

    Returns
    -------
    Tensor [T, H, Dv]; with `return_lse` also lse [H, T].

    Gradient
    --------
    As in `masked_attention`.

    Edges
    -----
    As in `masked_attention`. A sequence may have no queries or no keys.

    Raises
    ------
    TypeError, ValueError
        ``masked_attention_varlen: <argument> must ..., got ...``; RuntimeError for cu_seqlens that do not rise or do not fit, whose values are looked at on
        the CPU only.

    Complexity
    ----------
    As `masked_attention` of each sequence alone; with a mask, as `masked_attention` under that mask and `modalign.masks.packed`.

    Paper: Dao, "FlashAttention-2", ICLR 2024, whose argument names these are.
    """
    op = "masked_attention_varlen"
    query, key, value = check.check_operands(op, *(check.in_autocast_dtype(each) for each in (query, key, value)), 3)
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not isinstance(cu, Tensor) or cu.dtype is not torch.int32:
            raise TypeError(f"{op}: {name} must be an int32 tensor [sequences + 1], got {arguments.describe(cu)}")
        if cu.dim() != 1 or len(cu) < 1 or cu.shape != cu_seqlens_k.shape or cu.device != query.device:
            raise ValueError(f"{op}: {name} must have shape [sequences + 1] on {query.device}, equal for queries and keys, got {arguments.describe(cu)}")
    for name, longest in (("max_q", max_q), ("max_k", max_k)):
        if isinstance(longest, bool) or not isinstance(longest, int):
            raise TypeError(f"{op}: {name} must be a whole number, got {arguments.describe(longest)}")
        if longest < 0:
            raise ValueError(f"{op}: {name} must be 0 or more, got {longest}")
    numbers = check.check_numbers(op, query, causal, scale, softcap)
    arguments.check_flag(op, "deterministic", deterministic)
    arguments.check_flag(op, "return_lse", return_lse)
    refuse_forward_mode("masked_attention", (query, key, value))
    q, k, v = (each.transpose(0, 1)[None] for each in (query, key, value))
    sequences = (cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), max_q, max_k)
    tensors: list[Tensor] = []
    steps: list[int] = []
    if mask is not None:  # then the sequences are a term of it
        if isinstance(mask, Tensor) or not hasattr(mask, "steps"):
            raise TypeError(f"{op}: mask must be of modalign.masks, got {arguments.describe(mask)}")
        sizes = (1, q.shape[1], q.shape[2], k.shape[2])
        check.check_mask(op, mask, q, sizes, k.shape[1])
        if len(mask.steps) > 4 * (MOST_STEPS - 2):
            raise ValueError(f"{op}: mask must have at most {MOST_STEPS - 2} terms and signs, as the sequences are one more of each, got {len(mask.steps) // 4}")
        for name, cu, rows, longest in (("cu_seqlens_q", cu_seqlens_q, sizes[2], max_q), ("cu_seqlens_k", cu_seqlens_k, sizes[3], max_k)):
            if are_there(cu) and (int(cu[0]) != 0 or int(cu[-1]) != rows or bool(((cu.diff() < 0) | (cu.diff() > longest)).any())):
                raise RuntimeError(f"{op}: {name} must rise from 0 to the number of rows {rows}, by at most {longest}, got {cu.tolist()}")
        both = mask & packed(cu_seqlens_q, cu_seqlens_k, *sizes[2:], causal=check.CAUSAL[numbers[0]])  # type: ignore[operator]
        tensors, steps = list(both.tensors), list(both.steps)
        sequences, numbers = (None, None, 0, 0), (0, *numbers[1:])
    with without_autocast(query.device.type):
        out, lse = call("masked_attention", q, k, v, None, None, *sequences, *numbers, tensors, steps)
    out = out[0].transpose(0, 1)
    return (out, lse[0]) if return_lse else out
