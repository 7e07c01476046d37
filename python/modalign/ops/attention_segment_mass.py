"""How much of every query's attention falls on each segment of the keys, with no matrix of scores. [MIA-DPO, ICLR 2025]"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _arguments as arguments
from . import _attention_arguments as check
from . import _dense_attention as dense
from ._registration import refuse_forward_mode
from .masked_attention import attend

__all__ = ["attention_segment_mass", "reference_attention_segment_mass"]


def attention_segment_mass(
    query: Tensor,
    key: Tensor,
    segments: Tensor,
    num_segments: int,
    mask: Tensor | check.MaskProgram | None = None,
    *,
    bias: Tensor | None = None,
    causal: bool | str = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0,  # an int: torch.compile(dynamic=True) would trace a float default twice
) -> Tensor:
    r"""The attention that every query pays to each segment of keys: a picture, a span of text, a cell.

    ::

        m_is = sum over the j of segment s of p_ij        p: that of `masked_attention`

    >>> import torch
    >>> q, k = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 4, 1)
    >>> attention_segment_mass(q, k, torch.tensor([0, 1, 1, -1]), 2)
    tensor([[[[0.2500, 0.5000]]]])

    Parameters
    ----------
    query : Tensor [B, H, Nq, D]
    key : Tensor [B, Hkv, Nk, D]
    segments : int64 tensor [Nk] or [B, Nk]
        From 0 to num_segments - 1; -1: in none.
    num_segments : int
        S, 1 or more.
    mask, bias, causal, key_lengths, scale, softcap
        As in `masked_attention`.

    Returns
    -------
    Tensor [B, H, Nq, S] in the accumulation dtype (float32; float64 for float64).

    Gradient
    --------
    To query, key and bias. Double backward and forward mode raise.

    Edges
    -----
    A query that keeps nothing, and a segment without keys: 0. NaN as in `masked_attention`.

    Raises
    ------
    TypeError, ValueError
        ``attention_segment_mass: <argument> must ..., got ...``; what `segments` holds is looked at on the CPU only, and not in compiled graphs.

    Complexity
    ----------
    That of `masked_attention` whose values are ones and zeros, Dv = S, which is what it is.

    Paper: the pictures that an answer looked at, Liu et al., "MIA-DPO", ICLR 2025.
    """
    op = "attention_segment_mass"
    _, problem = check.check_problem(op, query, key, check.NO_VALUE, mask, bias, causal, key_lengths, scale, softcap)
    if isinstance(num_segments, bool) or not isinstance(num_segments, int):
        raise TypeError(f"{op}: num_segments must be a whole number, got {arguments.describe(num_segments)}")
    if num_segments < 1:
        raise ValueError(f"{op}: num_segments must be 1 or more, got {num_segments}")
    segments = check.check_indices(op, "segments", segments, "[Nk] or [B, Nk]", -1, num_segments, problem.query)
    (B, _, Nk, _) = problem.key.shape
    if segments.shape not in ((Nk,), (B, Nk)):
        raise ValueError(f"{op}: segments must have shape [{Nk}] or [{B}, {Nk}], got {arguments.describe(segments)}")
    refuse_forward_mode("masked_attention", problem.differentiable())
    return mass(problem, segments[..., None] == torch.arange(num_segments, device=segments.device))


def mass(problem: check.AttentionProblem, members: Tensor) -> Tensor:
    """p times `members` [Nk, S] or [B, Nk, S], which are attention's values for all heads: [B, H, Nq, S] in the accumulation dtype."""
    wide = problem.widened()
    members = members.to(wide.query.dtype)
    return attend(wide, (members if members.dim() == 2 else members[:, None]).expand(*wide.key.shape[:3], members.shape[-1]))[0]


def reference_attention_segment_mass(
    query: Tensor,
    key: Tensor,
    segments: Tensor,
    num_segments: int,
    mask: Tensor | check.MaskProgram | None = None,
    *,
    bias: Tensor | None = None,
    causal: bool | str = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """`attention_segment_mass` in plain torch: all probabilities at once."""
    p, _ = dense.probabilities(query, key, None, mask, bias, causal, key_lengths, scale, softcap)
    return torch.stack([torch.where((segments == s)[..., None, :] if segments.dim() == 1 else (segments == s)[:, None, None], p, 0).sum(-1) for s in range(num_segments)], -1)
