"""Hard negatives by cosine: one draw per row of either side, without the matrix of similarities. [ALBEF, NeurIPS 2021]"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _arguments as arguments
from . import _contrastive as contrastive
from ._gram_schmidt import unit
from ._hard_negatives import check_floor, check_generator, check_sizes, draw
from ._registration import autocast_is_on, to_autocast
from ._results import HardNegatives

__all__ = ["clip_hard_negatives"]


def clip_hard_negatives(
    x: Tensor,
    y: Tensor,
    *,
    logit_scale: float | Tensor,
    target: Tensor | None = None,
    normalize: bool = False,
    floor: float = 0.0,
    generator: torch.Generator | None = None,
) -> HardNegatives:
    """As `gram_hard_negatives` with logits ``logit_scale x_i . y_j``: the in-batch negatives of image-text matching.

    >>> import torch
    >>> x = torch.eye(3)
    >>> drawn = clip_hard_negatives(x, x, logit_scale=10.0)
    >>> bool((drawn.candidates != torch.arange(3)).all())
    True

    Parameters
    ----------
    x : Tensor [B, D]
    y : Tensor [C, D]
    logit_scale : float or Tensor of one element
    target, normalize, floor, generator
        See `gram_hard_negatives`; y are the candidates, x the anchors.

    Returns
    -------
    HardNegatives(candidates int64 [B], anchors int64 [C])

    Gradient
    --------
    None, as `gram_hard_negatives`.

    Edges
    -----
    As `gram_hard_negatives`.

    Raises
    ------
    TypeError, ValueError
        ``clip_hard_negatives: <argument> must ..., got ...``

    Complexity
    ----------
    2 B C D FLOP; memory linear in B and C.

    Paper: Li et al., "Align before Fuse", NeurIPS 2021, section 3.2.
    """
    op = "clip_hard_negatives"
    x, y = contrastive.check_matrix(op, "x", x, "[B, D]").detach(), contrastive.check_matrix(op, "y", y, "[C, D]").detach()
    if autocast_is_on(x.device.type):
        x, y = to_autocast(x), to_autocast(y)
    arguments.check_alike(op, "y", y, "x", x)
    target = contrastive.check_target(op, target, x.shape[0], y.shape[0], x)
    normalize = arguments.check_flag(op, "normalize", normalize)
    floor = check_floor(op, floor)
    generator = check_generator(op, generator, x)
    check_sizes(op, target, x.shape[0], y.shape[0])
    scale = contrastive.check_scalar(op, "logit_scale", logit_scale, x, positive=True).detach()
    with torch.autocast(x.device.type, enabled=False):
        if normalize:
            x, y = unit(x), unit(y)
        return draw("clip_loss", x, [y], scale, None, target, None, 0.0, floor, generator)
