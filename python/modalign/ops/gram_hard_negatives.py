"""Hard negatives by Gramian volume: one draw per anchor and per candidate, without the matrix of volumes. [GRAM, ICLR 2025]"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _arguments as arguments
from . import _contrastive as contrastive
from ._gram_schmidt import unit
from ._hard_negatives import check_floor, check_generator, check_sizes, draw
from ._registration import autocast_is_on, to_autocast
from ._results import HardNegatives
from .gram_contrastive_loss import _checked
from .gram_volume import MAX_KERNEL_MODALITIES

__all__ = ["gram_hard_negatives", "reference_gram_hard_negatives"]


def gram_hard_negatives(
    anchor: Tensor,
    others: Sequence[Tensor],
    *,
    temperature: float | Tensor = 0.07,
    target: Tensor | None = None,
    present: Tensor | None = None,
    normalize: bool = False,
    floor: float = 1e-4,
    eps: float | None = None,
    generator: torch.Generator | None = None,
) -> HardNegatives:
    r"""For each anchor another candidate whose volume with it is small, for each candidate another such anchor: the negatives of a matching head.

    ::

        P(candidate j | row i)  ~  softmax(z[i, :])[j] + floor      j != t_i         z = -V / temperature
        P(row i | candidate j)  ~  softmax(z[:, j])[i] + floor      t_i != j

    Exact categorical draws in one walk over tiles of volumes: the largest of z + Gumbel noise, the noise a function of (seed, i, j). Nothing B x C is
    stored, and the draws depend on the generator's state alone.

    >>> import torch
    >>> anchor = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), dim=1)
    >>> gram_hard_negatives(anchor, [anchor.clone()], temperature=0.01, floor=0.0).candidates[:2]
    tensor([1, 0])

    Parameters
    ----------
    anchor : Tensor [B, D]
    others : sequence of 1 to 7 Tensors [C, D]
    temperature : float or Tensor of one element
    target : Tensor int64 [B], optional
        The own candidate of each row, never drawn; -1 for a row that has none; -100 for a row that takes no part. Default: row i has candidate i.
    present : Tensor bool [C, m], optional
        Candidates without any modality are never drawn.
    normalize : bool
        Scale all vectors to unit length first.
    floor : float
        Added to every probability but the own one, so that no negative is impossible: 1e-4 in GRAM, 0 in ALBEF and TCL.
    eps : float, optional
        See `gram_volume`.
    generator : torch.Generator, optional
        On the device of the arguments. Default: torch's own.

    Returns
    -------
    HardNegatives(candidates int64 [B], anchors int64 [C])
        -1 where a row or candidate takes no part or has nothing to draw from.

    Gradient
    --------
    None: the inputs are taken detached. What is drawn gets its gradient where it is picked.

    Edges
    -----
    Several rows of one candidate: none of them is drawn for it. B = 0: empty. A row of NaN: a uniform draw.

    Raises
    ------
    TypeError, ValueError
        ``gram_hard_negatives: <argument> must ..., got ...``, also for a batch of one, which has no negative.

    Complexity
    ----------
    2 B C m D FLOP; memory as the forward of `gram_contrastive_loss`, linear in B and C.

    Paper: Cicchetti et al., ICLR 2025, section 3.3 (data-anchor matching); the 1e-4 is in the released code. Gumbel-max: Gumbel 1954.
    """
    op = "gram_hard_negatives"
    anchor, vectors, present = _checked(op, anchor, others, present)
    target = contrastive.check_target(op, target, anchor.shape[0], vectors[0].shape[0], anchor)
    normalize = arguments.check_flag(op, "normalize", normalize)
    floor = check_floor(op, floor)
    generator = check_generator(op, generator, anchor)
    if len(vectors) >= MAX_KERNEL_MODALITIES:
        raise ValueError(f"{op}: others must hold 1 to {MAX_KERNEL_MODALITIES - 1} tensors, got {len(vectors)}")
    check_sizes(op, target, anchor.shape[0], vectors[0].shape[0])
    anchor, vectors = anchor.detach(), [vector.detach() for vector in vectors]
    if autocast_is_on(anchor.device.type):
        anchor, vectors = to_autocast(anchor), [to_autocast(vector) for vector in vectors]
    scale = -1 / contrastive.check_scalar(op, "temperature", temperature, anchor, positive=True).detach()
    eps = arguments.check_eps(op, eps, anchor.dtype)
    with torch.autocast(anchor.device.type, enabled=False):
        if normalize:
            anchor, vectors = unit(anchor), [unit(vector) for vector in vectors]
        return draw("gram_contrastive_loss", anchor, vectors, scale, None, target, present, eps, floor, generator)


def reference_gram_hard_negatives(logits: Tensor, target: Tensor | None = None, floor: float = 1e-4) -> tuple[Tensor, Tensor]:
    """The weights that the draws follow, from the matrix of logits: (of candidates [B, C], rows adding up to 1; of anchors [B, C], columns adding up
    to 1)."""
    own = torch.zeros_like(logits, dtype=torch.bool)
    at = torch.arange(logits.shape[0]) if target is None else target
    own[torch.arange(len(at))[at >= 0], at[at >= 0]] = True
    rows, columns = ((logits.softmax(dim) + floor).masked_fill(own, 0) for dim in (1, 0))
    return rows / rows.sum(1, keepdim=True), columns / columns.sum(0, keepdim=True)
