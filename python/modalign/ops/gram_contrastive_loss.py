"""Contrastive loss on Gramian volumes, both directions, without the matrix of volumes. [GRAM, ICLR 2025]"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _arguments as arguments
from . import _contrastive as contrastive
from ._gram_schmidt import unit
from ._registration import autocast_is_on, refuse_forward_mode, to_autocast
from .gram_volume import MAX_KERNEL_MODALITIES, formula_gram_volume, gram_volume, reference_gram_volume, warn_more_vectors_than_dimensions

__all__ = ["gram_contrastive_loss", "reference_gram_contrastive_loss", "formula_gram_contrastive_loss"]


def gram_contrastive_loss(
    anchor: Tensor,
    others: Sequence[Tensor],
    *,
    temperature: float | Tensor = 0.07,
    target: Tensor | None = None,
    label_smoothing: float = 0,  # an int: torch.compile(dynamic=True) would trace a float default twice
    direction: str = "both",
    present: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    return_accuracy: bool = False,
    process_group: Any = None,
    gather_grad: str = "full",
    exchange: str = "gather",
    eps: float | None = None,
    implementation: str = "auto",
    workspace_bytes: int | None = None,
) -> Any:
    r"""InfoNCE over all pairs of anchors and candidate tuples with logits ``-V[i, j] / temperature``, V the Gramian volume; rows and columns at once.

    With ``t_i`` the candidate of row i, ``CE`` the cross entropy with smoothing::

        loss_i = 1/2 CE(z[i, :], t_i) + 1/2 CE(z[:, t_i], i)        z = -V / temperature

    and the mean of that over the labelled rows: the usual two directions where target is a permutation. A tile of volumes is made, folded into
    log-sum-exps of its rows and columns, and forgotten; the backward makes it again. Training memory is linear in B and C.

    >>> import torch
    >>> anchor, video, audio = torch.eye(4), torch.eye(4), torch.eye(4).roll(2, 0)
    >>> gram_contrastive_loss(anchor, [video, audio], temperature=0.5)
    tensor(0.8201)

    Parameters
    ----------
    anchor : Tensor [B, D]
    others : sequence of Tensor [C, D]
        Row j of all of them belongs to candidate j. 1 to 7 of them on every device; from 8 on in plain torch, with B x C volumes stored.
    temperature : float or Tensor of one element
        Positive; a tensor gets a gradient.
    target : Tensor int64 [B], optional
        The candidate of each row; -1 for a row without one, which stays among the rows that columns are compared with; -100 for a row that takes no
        part at all. Default: row i belongs to candidate i, and B must equal C. Several rows may share a candidate: each labelled pair counts once in
        either direction.
    label_smoothing : float
        In [0, 1): that share of the target is spread over all classes, the target included (as in torch).
    direction : "both", "rows" or "columns"
        "rows": each anchor among all candidates alone, ``CE(z[i, :], t_i)``; "columns": each labelled candidate among all anchors alone.
    present : Tensor bool [C, m], optional
        Which modalities a candidate has. The volume is that of the present vectors; what an absent one holds does not matter. A candidate without
        any is left out, and rows that point to it have no label (they stay among the rows that columns are compared with).
    normalize : bool
        Scale all vectors to unit length first, as the published model does.
    reduction : "mean", "sum" or "none"
        "none": float32 [B], 0 for rows without a label.
    return_accuracy : bool
        Also return the in-batch accuracy, float32 [2]: the share of labelled rows whose best candidate is their own, and of labelled candidates whose
        best row is one of theirs. Ties go to the lowest index, so that a collapsed batch does not look perfect.
    eps : float, optional
        See `gram_volume`.
    implementation : "auto", "streaming" or "dense"
        On the CPU the forward can leave the B x m C products for the backward, which then need not make them again: "dense" always does, "streaming"
        never, "auto" where they fit into ``workspace_bytes``. The result has the same bits.
    workspace_bytes : int, optional
        Default 64 MiB: 2896 rows and candidates of k = 3 in float32.
    process_group : torch.distributed.ProcessGroup, optional
        Rows and candidates of all ranks form one batch (pass ``dist.group.WORLD``); ``target`` then counts candidates over all ranks, by default from
        this rank's first one. Ranks may differ in size. Each returns its part of the global mean or sum times the number of ranks, so that averaging
        the ranks' gradients gives exactly the gradient of the global loss. The accuracy of columns is NaN here, round a ring that of rows too. Not for
        torch.compile.
    gather_grad : "full" or "local"
        "local": all candidates count as constants for the rows, and all rows for the candidates, a rank's own included, as the released code has it.
    exchange : "gather" or "ring"
        How ranks meet: all candidates on every rank, or the block of one rank at a time.

    Returns
    -------
    Tensor, float32 (float64 for float64), or (Tensor, Tensor [2])

    Gradient
    --------
    Closed form in anchor, others and temperature; finite also where everything is aligned: a volume of 0 has gradient 0. The labelled pair is always
    computed from its vectors, as are pairs whose volume would lose its digits (see `gram_volume`). Double backward and forward mode raise.

    Edges
    -----
    B = C = 1: 0. No labelled row: 0 with gradient 0. A NaN that takes part makes the loss NaN.

    Raises
    ------
    TypeError, ValueError
        ``gram_contrastive_loss: <argument> must ..., got ...``; RuntimeError for values of tensors (a temperature that is not positive, a target out
        of range), which are looked at on the CPU only.

    Complexity
    ----------
    2 B C m D FLOP, the backward 6 B C m D. Memory beyond inputs and gradients: about 4 (B + m C) D, and the workspace.

    Paper: Cicchetti et al., "Gramian Multimodal Representation Learning and Alignment", ICLR 2025, section 3.3; the released code smooths labels by 0.1,
    which the paper leaves out.
    """
    op = "gram_contrastive_loss"
    anchor, vectors, present = _checked(op, anchor, others, present)
    target = contrastive.check_target(op, target, anchor.shape[0], vectors[0].shape[0], anchor)
    smoothing = contrastive.check_label_smoothing(op, label_smoothing)
    normalize = arguments.check_flag(op, "normalize", normalize)
    direction = contrastive.check_direction(op, direction)
    reduction = contrastive.check_reduction(op, reduction)
    return_accuracy = arguments.check_flag(op, "return_accuracy", return_accuracy)
    contrastive.check_group(op, process_group, gather_grad, exchange)
    workspace = contrastive.check_workspace(op, implementation, workspace_bytes, process_group)
    wide = len(vectors) >= MAX_KERNEL_MODALITIES
    if wide and (implementation == "streaming" or return_accuracy or process_group is not None):
        what = "return_accuracy must be False" if return_accuracy else "process_group must be None" if process_group is not None else None
        raise ValueError(f"{op}: {what or 'implementation must not be ' + repr(implementation)} for more than 7 others, got {len(vectors)}")
    given = [anchor, *vectors] + [value for value in (temperature,) if isinstance(value, Tensor)]
    refuse_forward_mode(op, given)
    if autocast_is_on(anchor.device.type):
        anchor, vectors = to_autocast(anchor), [to_autocast(vector) for vector in vectors]
    scale = -1 / contrastive.check_scalar(op, "temperature", temperature, anchor, positive=True)
    eps = arguments.check_eps(op, eps, anchor.dtype)
    warn_more_vectors_than_dimensions(op, len(vectors) + 1, anchor.shape[1])
    with torch.autocast(anchor.device.type, enabled=False):
        if normalize:
            if present is not None:  # an absent NaN would come back through the gradient of the division
                vectors = [torch.where(present[:, p, None], vector, 0) for p, vector in enumerate(vectors)]
            anchor, vectors = unit(contrastive.without_ignored(anchor, target)), [unit(vector) for vector in vectors]
        if wide:
            rows = None if target is None else target != contrastive.IGNORED
            here = anchor if rows is None else torch.where(rows[:, None], anchor, 0)
            logits = gram_volume(here, vectors, present=present, eps=eps) * scale
            loss, count = contrastive.loss_of_logits(
                logits.to(scale.dtype), target, columns=None if present is None else present.any(1), label_smoothing=smoothing, direction=direction
            )
            return contrastive.reduce(loss, count, reduction)
        return contrastive.evaluate(op, anchor, vectors, scale, None, target, present, smoothing, direction, eps, reduction, return_accuracy, workspace, process_group, gather_grad, exchange)


def _checked(op: str, anchor: object, others: object, present: object) -> tuple[Tensor, list[Tensor], Tensor | None]:
    anchor = contrastive.check_matrix(op, "anchor", anchor, "[B, D]")
    vectors = arguments.check_sequence(op, "others", others, "others[{}]", "[C, D]")
    mixed = autocast_is_on(anchor.device.type)
    for index, other in enumerate(vectors):
        contrastive.check_matrix(op, f"others[{index}]", other, "[C, D]")
        arguments.check_alike(op, f"others[{index}]", to_autocast(other) if mixed else other, "anchor", to_autocast(anchor) if mixed else anchor)
        if other.shape[0] != vectors[0].shape[0]:
            raise ValueError(f"{op}: others[{index}] must have as many candidates C as others[0] = {vectors[0].shape[0]}, got {arguments.describe(other)}")
    sizes = (vectors[0].shape[0], len(vectors))
    mask = arguments.check_presence(op, present, "anchor", anchor, "[C, m]", sizes)
    if mask is not None and mask.dim() != 2:
        raise ValueError(f"{op}: present must have shape [C, m] = {list(sizes)}, got {arguments.describe(mask)}")
    return anchor, vectors, mask


# ---------------------------------------------------------------------------------------------------------------------------------- plain-torch formulas


def reference_gram_contrastive_loss(
    anchor: Tensor,
    others: Sequence[Tensor],
    *,
    temperature: float | Tensor = 0.07,
    target: Tensor | None = None,
    label_smoothing: float = 0.0,
    direction: str = "both",
    present: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    eps: float | None = None,
) -> Tensor:
    """`gram_contrastive_loss` in a few lines of differentiable torch, as accurate as the dtype allows; stores B x C x D numbers."""
    anchor, vectors, present = _checked("reference_gram_contrastive_loss", anchor, others, present)
    real = torch.float64 if anchor.dtype is torch.float64 else torch.float32
    if target is not None:
        anchor = torch.where((target != contrastive.IGNORED)[:, None], anchor, 0)
    volume = reference_gram_volume(anchor.to(real), [vector.to(real) for vector in vectors], present=present, normalize=normalize, eps=eps)
    columns = None if present is None else present.any(1)
    loss, count = contrastive.loss_of_logits(-volume / temperature, target, columns=columns, label_smoothing=label_smoothing, direction=direction)
    return contrastive.reduce(loss, count, reduction)


def formula_gram_contrastive_loss(
    anchor: Tensor, others: Sequence[Tensor], *, temperature: float | Tensor = 0.07, label_smoothing: float = 0.0
) -> Tensor:
    """The usual code: all B x C Gram matrices, their determinants, two cross entropies. For comparisons; B = C."""
    return contrastive.two_entropies(-formula_gram_volume(anchor, others) / temperature, label_smoothing)
