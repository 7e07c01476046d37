"""The call of torch's attention, answered by ours. [Attention Is All You Need, NeurIPS 2017]"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _arguments as arguments
from .masked_attention import masked_attention

__all__ = ["scaled_dot_product_attention"]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0,  # an int: torch.compile(dynamic=True) would trace a float default twice
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    r"""`masked_attention` with the arguments of ``torch.nn.functional.scaled_dot_product_attention``.

    >>> import torch
    >>> x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    >>> bool(torch.allclose(scaled_dot_product_attention(x, x, x, is_causal=True), torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True), atol=1e-6))
    True

    Parameters
    ----------
    query : Tensor [..., H, Nq, D]
    key : Tensor [..., Hkv, Nk, D]
    value : Tensor [..., Hkv, Nk, Dv]
        Three dimensions are [B, N, D], one head each.
    attn_mask : bool tensor (True: keep) or a bias, broadcasting to [..., H, Nq, Nk], optional
    dropout_p : float
        Must be 0: attention without probabilities in memory has nothing to drop. Put dropout behind the output projection.
    is_causal : bool
        As torch: query i keeps keys up to i, from the top left.
    scale : float, optional
    enable_gqa : bool
        Must be True where Hkv is not H, as in torch.

    Returns
    -------
    Tensor [..., H, Nq, Dv]

    Gradient
    --------
    As in `masked_attention`, also to a bias.

    Edges
    -----
    Queries that keep nothing give 0, where torch gives NaN or 0 by the path it takes.

    Raises
    ------
    TypeError, ValueError
        ``scaled_dot_product_attention: <argument> must ..., got ...``

    Complexity
    ----------
    That of `masked_attention`.

    Paper: Vaswani et al., "Attention Is All You Need", NeurIPS 2017.
    """
    op = "scaled_dot_product_attention"
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)) or dropout_p != 0:
        raise ValueError(f"{op}: dropout_p must be 0 (drop behind the output projection instead), got {arguments.describe(dropout_p)}")
    causal, grouped = arguments.check_flag(op, "is_causal", is_causal), arguments.check_flag(op, "enable_gqa", enable_gqa)
    tensors = [arguments.check_vectors(op, name, each, "[..., N, D]") for name, each in (("query", query), ("key", key), ("value", value))]
    if any(each.dim() < 2 or each.dim() != tensors[0].dim() for each in tensors):
        raise ValueError(f"{op}: query, key and value must have as many dimensions, 2 or more, got {', '.join(str(each.dim()) for each in tensors)}")
    if attn_mask is not None and causal:
        raise ValueError(f"{op}: attn_mask must not be given together with is_causal, got both")
    if not grouped and tensors[0].dim() > 3 and tensors[0].shape[-3] != tensors[1].shape[-3]:
        raise ValueError(f"{op}: enable_gqa must be True for {tensors[0].shape[-3]} query heads on {tensors[1].shape[-3]} key heads, got False")
    leading = tensors[0].shape[:-3] if tensors[0].dim() > 3 else tensors[0].shape[:-2]
    heads = (lambda each: (each.shape[-3],)) if tensors[0].dim() > 3 else (lambda each: (1,))
    if any(each.shape[: len(leading)] != leading for each in tensors):
        raise ValueError(f"{op}: query, key and value must have equal leading dimensions, got {', '.join(str(list(each.shape)) for each in tensors)}")
    q, k, v = (each.reshape(math.prod(leading), *heads(each), *each.shape[-2:]) for each in tensors)
    if attn_mask is not None:
        if not isinstance(attn_mask, Tensor) or (attn_mask.dtype is not torch.bool and not attn_mask.is_floating_point()):
            raise TypeError(f"{op}: attn_mask must be a bool or floating-point tensor, got {arguments.describe(attn_mask)}")
        attn_mask = _with_leading(op, attn_mask, leading, tensors[0].dim() > 3)
    is_mask = attn_mask is not None and attn_mask.dtype is torch.bool
    out = masked_attention(
        q, k, v, attn_mask if is_mask else None, bias=None if is_mask else attn_mask, causal="top_left" if causal else False, scale=scale
    )
    return out.reshape(*leading, *((out.shape[1],) if tensors[0].dim() > 3 else ()), *out.shape[2:])


def _with_leading(op: str, pairs: Tensor, leading: torch.Size, with_heads: bool) -> Tensor:
    """[..., H, Nq, Nk] as [B, H, Nq, Nk], a view where the leading dimensions are all there or all broadcast."""
    missing = len(leading) + with_heads + 2 - pairs.dim()
    if missing < 0:
        raise ValueError(f"{op}: attn_mask must have at most {len(leading) + with_heads + 2} dimensions, got {arguments.describe(pairs)}")
    pairs = pairs[(None,) * missing]
    inner = pairs.shape[len(leading) :] if with_heads else (1, *pairs.shape[len(leading) :])
    if all(size == 1 for size in pairs.shape[: len(leading)]):
        return pairs.reshape(1, *inner)
    try:
        return pairs.expand(*leading, *pairs.shape[len(leading) :]).reshape(math.prod(leading), *inner)
    except RuntimeError:
        raise ValueError(f"{op}: attn_mask must broadcast to leading dimensions {list(leading)}, got {arguments.describe(pairs)}") from None
