"""Attention with its probabilities in memory, in plain torch: of some queries, or for the references of the attention ops."""

from __future__ import annotations

import torch
from torch import Tensor

from ._attention_arguments import MaskProgram
from ._registration import accumulation_dtype


def kept(query: Tensor, key: Tensor, mask: Tensor | MaskProgram | None, bias: Tensor | None, causal: bool | str, key_lengths: Tensor | None) -> Tensor:
    """Bool [B, H, Nq, Nk], also where a probability underflows: those of equal logits do not."""
    dropped = None if bias is None else torch.where(bias == -torch.inf, bias, 0)
    return probabilities(torch.zeros_like(query), torch.zeros_like(key), None, mask, dropped, causal, key_lengths, None, 0.0)[0] != 0


def probabilities(
    query: Tensor,
    key: Tensor,
    rows: Tensor | None,
    mask: Tensor | MaskProgram | None,
    bias: Tensor | None,
    causal: bool | str,
    key_lengths: Tensor | None,
    scale: float | None,
    softcap: float,
    real: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """p [B, H, R, Nk] and lse [B, H, R] of the queries `rows`, or of all of them, in `real`, by default the accumulation dtype; the gradient comes from autograd."""
    (_, H, Nq, D), (Hkv, Nk) = query.shape, key.shape[1:3]
    group, real = H // Hkv, real or accumulation_dtype(query.dtype)
    if rows is None:
        rows = torch.arange(Nq, device=query.device)

    def of_rows(pairs: Tensor) -> Tensor:
        """[B, H or 1, R or 1, Nk or 1]"""
        pairs = pairs[(None,) * (4 - pairs.dim())]
        pairs = pairs if pairs.shape[2] == 1 else pairs[:, :, rows]
        return pairs if pairs.shape[1] in (1, H) else pairs.repeat_interleave(H // pairs.shape[1], 1)

    columns = torch.arange(Nk, device=query.device)
    keep = torch.ones_like(columns, dtype=torch.bool)[None, None, None]
    if isinstance(mask, Tensor):
        keep = keep & of_rows(mask)
    elif mask is not None:
        kept = mask.dense(rows)
        keep = keep & kept.repeat_interleave(H // kept.shape[1], 1)
    if causal:
        keep = keep & (columns <= rows[:, None] + (0 if causal == "top_left" else Nk - Nq))
    if key_lengths is not None:
        keep = keep & (columns < key_lengths[:, None, None, None])

    # What is not finite must not leak through pairs that are not kept, not even into a gradient: zeros stand for it, and its pairs are NaN by themselves.
    q, k = query[:, :, rows].to(real).unflatten(1, (Hkv, group)).flatten(2, 3), key.to(real)
    finite = [each.isfinite().all(-1, keepdim=True) for each in (q, k)]
    q, k = (torch.where(each, x, 0) for each, x in zip(finite, (q, k), strict=True))
    z = torch.where(finite[0] & finite[1].mT, q @ k.mT * (D**-0.5 if scale is None else scale), torch.nan)
    z = z.unflatten(2, (group, -1)).flatten(1, 2)
    if softcap:
        z = softcap * (z / softcap).tanh()
    if bias is not None:
        b = of_rows(bias).to(real)
        keep = keep & (b != -torch.inf)
        z = z + torch.where(b == -torch.inf, 0, b)
    z = torch.where(keep, z, -torch.inf)
    top = z.detach().amax(-1, keepdim=True) if Nk else z.new_full((*z.shape[:3], 1), -torch.inf)
    top = torch.where(top == -torch.inf, 0, top)
    weight = torch.where(z == -torch.inf, 0, (torch.where(z == -torch.inf, 0, z) - top).exp())
    total = weight.sum(-1, keepdim=True)
    empty = total == 0
    total = torch.where(empty, 1, total)
    return weight / total, torch.where(empty, -torch.inf, top + total.log())[..., 0]
