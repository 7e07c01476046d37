"""The attention of chosen queries to all keys. [FastV, ECCV 2024]"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _arguments as arguments
from . import _attention_arguments as check
from . import _dense_attention as dense
from ._registration import accumulation_dtype

__all__ = ["attention_rows", "reference_attention_rows"]


def attention_rows(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    mask: Tensor | check.MaskProgram | None = None,
    *,
    bias: Tensor | None = None,
    causal: bool | str = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0,  # an int: torch.compile(dynamic=True) would trace a float default twice
) -> Tensor:
    r"""Chosen rows of the matrix of attention probabilities: what [CLS], or the last token, looks at.

    ::

        result_rj = p_ij, i = rows_r        p: that of `masked_attention`

    >>> import torch
    >>> q, k = torch.ones(1, 1, 2, 1), torch.tensor([0.0, 3.0]).log1p().view(1, 1, 2, 1)
    >>> attention_rows(q, k, torch.tensor([1, 0]), causal=True)
    tensor([[[[0.2000, 0.8000],
              [1.0000, 0.0000]]]])

    Parameters
    ----------
    query : Tensor [B, H, Nq, D]
    key : Tensor [B, Hkv, Nk, D]
    rows : int64 tensor [R]
        Queries, from 0 to Nq - 1.
    mask, bias, causal, key_lengths, scale, softcap
        As in `masked_attention`: of all queries, of which the rows are taken.

    Returns
    -------
    Tensor [B, H, R, Nk] in the accumulation dtype (float32; float64 for float64).

    Gradient
    --------
    To query, key and bias, any derivative, by autograd.

    Edges
    -----
    A query that keeps nothing: zeros. R = 0: empty. NaN as in `masked_attention`, and infinity as NaN.

    Raises
    ------
    TypeError, ValueError
        ``attention_rows: <argument> must ..., got ...``; what `rows` holds is looked at on the CPU only, and not in compiled graphs.

    Complexity
    ----------
    Plain torch in float64: 4 D FLOP for each pair of these rows, kept or not; some copies of the result and of the keys.

    Paper: the last token's row ranks visual tokens, Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", ECCV 2024.
    """
    op = "attention_rows"
    _, problem = check.check_problem(op, query, key, check.NO_VALUE, mask, bias, causal, key_lengths, scale, softcap)
    rows = check.check_indices(op, "rows", rows, "[R]", 0, problem.query.shape[2], problem.query)
    if rows.dim() != 1:
        raise ValueError(f"{op}: rows must have one dimension [R], got {arguments.describe(rows)}")
    # float64, which autocast leaves alone, also where the backward runs under it
    p, _ = dense.probabilities(problem.query, problem.key, rows, mask, problem.bias, causal, problem.key_lengths, scale, softcap, torch.float64)
    return p.to(accumulation_dtype(problem.query.dtype))


def reference_attention_rows(query: Tensor, key: Tensor, rows: Tensor, mask: Tensor | check.MaskProgram | None = None, **options: object) -> Tensor:
    """`attention_rows` as rows of the whole matrix."""
    given = {"bias": None, "causal": False, "key_lengths": None, "scale": None, "softcap": 0.0, **options}
    return dense.probabilities(query, key, None, mask, *given.values())[0][:, :, rows]  # type: ignore[arg-type]
