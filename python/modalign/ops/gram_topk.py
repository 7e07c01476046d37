"""The k candidates of smallest Gramian volume of every anchor, without the matrix of volumes. [GRAM, ICLR 2025]"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _arguments as arguments
from . import _volume_panels as volume_panels
from ._registration import accumulation_dtype, refuse_forward_mode
from ._results import Neighbors
from ._selection import merged, smallest
from .gram_volume import reference_gram_volume

__all__ = ["gram_topk", "reference_gram_topk"]


def gram_topk(
    anchor: Tensor,
    others: Sequence[Tensor],
    k: int,
    *,
    present: Tensor | None = None,
    normalize: bool | str = False,
    workspace_bytes: int | None = None,
) -> Neighbors:
    r"""The k candidate tuples j of smallest ``V[i, j]`` for every anchor i, V as in `gram_volume`; smallest first, equal volumes by index.

    A panel of volumes is made, its k smallest join those of the panels before it, and it is forgotten.

    >>> import torch
    >>> gram_topk(torch.eye(4)[:2], [torch.eye(4), torch.eye(4).roll(2, 0)], 3)
    Neighbors(values=tensor([[0., 0., 1.],
            [0., 0., 1.]]), indices=tensor([[0, 2, 1],
            [1, 3, 0]]))

    Parameters
    ----------
    anchor : Tensor [B, D]
    others : sequence of m >= 1 Tensor [C, D]
        Row j of all of them belongs to candidate j.
    k : int
        0 to C.
    present : Tensor bool [C, m], optional
        Which modalities a candidate has. What an absent one holds does not matter; a candidate without any has the volume ``|a_i|``.
    normalize : False, True or "root"
        As in `gram_volume`: True scales all vectors to unit length first; "root" takes ``V ** (1 / n_j)``, which lets candidates with different numbers
        of vectors be compared.
    workspace_bytes : int, optional
        What a panel may take; default 64 MiB. 0 gives the smallest panels, 64 rows by max(64, k) candidates. The result has the same bits.

    Returns
    -------
    Neighbors(values, indices)
        values [B, k] in the accumulation dtype, float32 (float64 for float64): half types are widened first, so that no two volumes become equal by
        rounding. indices int64 [B, k]. A named tuple with ``.to(device)``.

    Gradient
    --------
    None: the result does not require grad. ``paired_gram_volume([anchor[:, None], *(other[indices] for other in others)])`` is the values again,
    differentiable. Forward mode raises.

    Edges
    -----
    Equal volumes come in the order of their indices, also where k cuts through them. NaN comes last. k > C raises; k = 0, B = 0: empty. From 8 others
    on volumes come from plain torch, whose last bits may depend on the panel: then only the order of near ties.

    Raises
    ------
    TypeError, ValueError
        ``gram_topk: <argument> must ..., got ...``.

    Complexity
    ----------
    2 B C m D FLOP and a selection. Memory beyond the result: the workspace, and for its panel the operands, about 4 (rows + m candidates) D. The selecting
    epilogue that `knn` will bring replaces the panel.

    Paper: Cicchetti et al., "Gramian Multimodal Representation Learning and Alignment", ICLR 2025, section 4: retrieval by volume.
    """
    op = "gram_topk"
    anchor, vectors, present = volume_panels.check_tuples(op, anchor, others, present)
    B, C = anchor.shape[0], vectors[0].shape[0]
    k = _check_k(op, k, C)
    normalize = arguments.check_normalize(op, normalize, squared=False)
    workspace = volume_panels.check_workspace(op, workspace_bytes)
    refuse_forward_mode(op, (anchor, *vectors))
    real = accumulation_dtype(anchor.dtype)
    if k == 0:
        return Neighbors(anchor.new_empty((B, 0), dtype=real), anchor.new_empty((B, 0), dtype=torch.int64))
    rows, columns = volume_panels.panel_sizes(B, C, k, real, workspace)
    found = []
    with torch.no_grad(), torch.autocast(anchor.device.type, enabled=False):
        for panel in volume_panels.panels(B, rows):
            best: tuple[Tensor, Tensor] | None = None
            for candidates in volume_panels.panels(C, columns):
                values, indices = smallest(volume_panels.volumes(anchor, vectors, present, normalize, panel, candidates), k)
                best = merged(best, (values, indices + candidates.start), k)
            found.append(best)
        return Neighbors(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _check_k(op: str, k: object, C: int) -> int:
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"{op}: k must be a whole number, got {arguments.describe(k)}")
    if not 0 <= k <= C:
        raise ValueError(f"{op}: k must be from 0 to the number of candidates C = {C}, got {k}")
    return k


# ---------------------------------------------------------------------------------------------------------------------------------- plain-torch formulas


def reference_gram_topk(
    anchor: Tensor, others: Sequence[Tensor], k: int, *, present: Tensor | None = None, normalize: bool | str = False
) -> Neighbors:
    """`gram_topk` in plain torch: all volumes and a stable sort; [B, C, D] of memory."""
    real = accumulation_dtype(anchor.dtype)
    with torch.no_grad():
        volume = reference_gram_volume(anchor.to(real), [other.to(real) for other in others], present=present, normalize=normalize)
        values, indices = volume.sort(dim=1, stable=True)
    return Neighbors(values[:, :k], indices[:, :k])
