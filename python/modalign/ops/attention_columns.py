"""The attention that chosen keys get from every query, with no matrix of scores. [CosmicMan, CVPR 2024]"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _arguments as arguments
from . import _attention_arguments as check
from . import _dense_attention as dense
from ._registration import refuse_forward_mode
from .attention_segment_mass import mass

__all__ = ["attention_columns", "reference_attention_columns"]


def attention_columns(
    query: Tensor,
    key: Tensor,
    columns: Tensor,
    mask: Tensor | check.MaskProgram | None = None,
    *,
    bias: Tensor | None = None,
    causal: bool | str = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0,  # an int: torch.compile(dynamic=True) would trace a float default twice
) -> Tensor:
    r"""Chosen columns of the matrix of attention probabilities, to train with: attention maps of a few words.

    ::

        result_ic = p_ij, j = columns_c        p: that of `masked_attention`

    >>> import torch
    >>> q, k = torch.ones(1, 1, 2, 1), torch.tensor([0.0, 3.0]).log1p().view(1, 1, 2, 1)
    >>> attention_columns(q, k, torch.tensor([1]), causal=True)
    tensor([[[[0.0000],
              [0.8000]]]])

    Parameters
    ----------
    query : Tensor [B, H, Nq, D]
    key : Tensor [B, Hkv, Nk, D]
    columns : int64 tensor [C] or [B, C]
        Keys, from 0 to Nk - 1, C of 1 or more; one may come twice.
    mask, bias, causal, key_lengths, scale, softcap
        As in `masked_attention`.

    Returns
    -------
    Tensor [B, H, Nq, C] in the accumulation dtype (float32; float64 for float64).

    Gradient
    --------
    To query, key and bias, through the softmax whole: dz_ij = p_ij (dp_ij - sum_j' p_ij' dp_ij'), dp being 0 for the other keys. Double backward and forward mode raise.

    Edges
    -----
    A query that keeps nothing, and a key that a query does not keep: 0. NaN as in `masked_attention`.

    Raises
    ------
    TypeError, ValueError
        ``attention_columns: <argument> must ..., got ...``; what `columns` holds is looked at on the CPU only, and not in compiled graphs.

    Complexity
    ----------
    That of `masked_attention` whose values are ones and zeros, Dv = C, which is what it is: meant for some hundred columns.

    Paper: maps of words held to masks, Li et al., "CosmicMan", CVPR 2024.
    """
    op = "attention_columns"
    _, problem = check.check_problem(op, query, key, check.NO_VALUE, mask, bias, causal, key_lengths, scale, softcap)
    (B, _, Nk, _) = problem.key.shape
    columns = check.check_indices(op, "columns", columns, "[C] or [B, C]", 0, Nk, problem.query)
    if columns.dim() not in (1, 2) or columns.shape[-1] == 0 or (columns.dim() == 2 and len(columns) != B):
        raise ValueError(f"{op}: columns must have shape [C] or [{B}, C], C of 1 or more, got {arguments.describe(columns)}")
    refuse_forward_mode("masked_attention", problem.differentiable())
    return mass(problem, columns[..., None, :] == torch.arange(Nk, device=columns.device)[:, None])


def reference_attention_columns(
    query: Tensor,
    key: Tensor,
    columns: Tensor,
    mask: Tensor | check.MaskProgram | None = None,
    *,
    bias: Tensor | None = None,
    causal: bool | str = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """`attention_columns` in plain torch: all probabilities at once."""
    p, _ = dense.probabilities(query, key, None, mask, bias, causal, key_lengths, scale, softcap)
    return p.gather(3, columns.expand(p.shape[0], columns.shape[-1])[:, None, None].expand(*p.shape[:3], columns.shape[-1]))
