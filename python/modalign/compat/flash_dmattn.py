"""The mask-and-bias call of flash-dmattn (later flash-sparse-attn 1.x) with its argument names and layout, on `modalign.ops.masked_attention`.

>>> import torch
>>> from modalign.compat.flash_dmattn import flash_dmattn_func
>>> x = torch.ones(1, 4, 2, 8)  # [B, N, H, D]
>>> flash_dmattn_func(x, x, x, attn_mask=torch.ones(1, 1, 1, 4, dtype=torch.bool), attn_bias=torch.zeros(1, 2, 1, 4), is_causal=True).shape
torch.Size([1, 4, 2, 8])

On the CPU, for any head dimension and any number of keys, in float32 and float64 too. A mask that says which keys have the largest bias is not needed: `modalign.ops.dynamic_mask_attention` chooses
and attends with no matrix. Versions of the package that have no mask and no bias (softmax thresholds, gates) are other functions under the same name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import masked_attention
from ..ops._arguments import check_vectors, describe

__all__ = ["flash_dmattn_func", "flash_sparse_attn_func"]


def flash_dmattn_func(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    softmax_scale: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    deterministic: bool | None = None,
    return_attn_probs: bool | None = None,
) -> Any:
    """query [B, Nq, H, D], key and value [B, Nk, Hkv, D]; attn_mask bool, True where a pair is kept, and attn_bias, each [B or 1, H or Hkv or 1, Nq or 1, Nk or 1]. The result is [B, Nq, H, D].

    Causal is bottom-right: the last query sees the last key. A query that keeps nothing gives 0. Gradients go to query, key, value and attn_bias.

    return_attn_probs: (out, lse [B, H, Nq], None). The third, a matrix which the package fills for its own tests, is not made; `modalign.ops.attention_rows` has probabilities. lse of a query that
    keeps nothing is -inf. deterministic: results are the same every time whatever it says.

    softcap beside attn_bias raises ValueError: the released kernel caps the sum of both, and here the product of query and key alone is capped."""
    for name, each in (("query", query), ("key", key), ("value", value)):
        if check_vectors("flash_dmattn_func", name, each, "[B, N, H, D]").dim() != 4:
            raise ValueError(f"flash_dmattn_func: {name} must have 4 dimensions [B, N, H, D], got {describe(each)}")
    if attn_mask is not None and (not isinstance(attn_mask, Tensor) or attn_mask.dtype is not torch.bool):
        raise TypeError(f"flash_dmattn_func: attn_mask must be a bool tensor, True where a pair is kept, got {describe(attn_mask)}")
    if attn_bias is not None and not isinstance(attn_bias, Tensor):
        raise TypeError(f"flash_dmattn_func: attn_bias must be a tensor, got {describe(attn_bias)}")
    if is_causal not in (None, True, False):
        raise TypeError(f"flash_dmattn_func: is_causal must be True, False or None, got {describe(is_causal)}")
    if softmax_scale is not None and (isinstance(softmax_scale, bool) or not isinstance(softmax_scale, (int, float))):
        raise TypeError(f"flash_dmattn_func: softmax_scale must be a number or None, got {describe(softmax_scale)}")
    if softcap and attn_bias is not None:
        raise ValueError(f"flash_dmattn_func: softcap must be 0 where attn_bias is given, got {softcap!r}: the released kernel caps their sum, which is not supported")
    out, lse = masked_attention(
        *(each.transpose(1, 2) for each in (query, key, value)),
        attn_mask,
        bias=attn_bias,
        causal=bool(is_causal),
        scale=softmax_scale,
        softcap=softcap or 0,
        return_lse=True,
    )
    out = out.transpose(1, 2)
    return (out, lse, None) if return_attn_probs else out


flash_sparse_attn_func = flash_dmattn_func
