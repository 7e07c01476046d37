"""Contrastive loss on triangle areas, both directions, without the matrix of areas. [TRIANGLE, NeurIPS 2025]"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _arguments as arguments
from . import _contrastive as contrastive
from ._gram_schmidt import unit
from ._registration import autocast_is_on, refuse_forward_mode, to_autocast
from .triangle_area import formula_triangle_area, reference_triangle_area

__all__ = ["triangle_contrastive_loss", "reference_triangle_contrastive_loss", "formula_triangle_contrastive_loss"]


def triangle_contrastive_loss(
    anchor: Tensor,
    u: Tensor,
    v: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    target: Tensor | None = None,
    label_smoothing: float = 0,  # an int: torch.compile(dynamic=True) would trace a float default twice
    direction: str = "both",
    normalize: bool = False,
    reduction: str = "mean",
    return_accuracy: bool = False,
    process_group: Any = None,
    gather_grad: str = "full",
    exchange: str = "gather",
    implementation: str = "auto",
    workspace_bytes: int | None = None,
    eps: float | None = None,
) -> Any:
    r"""InfoNCE over all pairs with logits ``-Area(a_i, u_j, v_j) / temperature`` (`triangle_area`); rows and columns at once.

    Everything else is as in `gram_contrastive_loss`: labels, smoothing, memory, edges, errors.

    >>> import torch
    >>> triangle_contrastive_loss(torch.eye(4), torch.eye(4), torch.eye(4).roll(2, 0), temperature=0.5)
    tensor(0.8560)

    Parameters
    ----------
    anchor : Tensor [B, D]
    u, v : Tensor [C, D]
    temperature, target, label_smoothing, direction, normalize, reduction, return_accuracy
        See `gram_contrastive_loss`.
    eps : float, optional
        See `triangle_area`.
    process_group, gather_grad, exchange, implementation, workspace_bytes
        See `gram_contrastive_loss`.

    Returns
    -------
    Tensor, float32 (float64 for float64), or (Tensor, Tensor [2])

    Gradient
    --------
    Closed form in anchor, u, v and temperature; 0 where the area is 0. Double backward and forward mode raise.

    Edges
    -----
    As in `gram_contrastive_loss`.

    Raises
    ------
    TypeError, ValueError
        ``triangle_contrastive_loss: <argument> must ..., got ...``; RuntimeError for values of tensors, which are looked at on the CPU only.

    Complexity
    ----------
    4 B C D FLOP, the backward 12 B C D; no B x C anywhere.

    Paper: TRIANGLE, "Modalities alignment beyond pairs: triangle area similarity", NeurIPS 2025, section 3.
    """
    op = "triangle_contrastive_loss"
    anchor, u, v = _checked(op, anchor, u, v)
    target = contrastive.check_target(op, target, anchor.shape[0], u.shape[0], anchor)
    smoothing = contrastive.check_label_smoothing(op, label_smoothing)
    normalize = arguments.check_flag(op, "normalize", normalize)
    direction = contrastive.check_direction(op, direction)
    reduction = contrastive.check_reduction(op, reduction)
    return_accuracy = arguments.check_flag(op, "return_accuracy", return_accuracy)
    workspace = contrastive.check_workspace(op, implementation, workspace_bytes, process_group)
    contrastive.check_group(op, process_group, gather_grad, exchange)
    refuse_forward_mode(op, [anchor, u, v] + [value for value in (temperature,) if isinstance(value, Tensor)])
    if autocast_is_on(anchor.device.type):
        anchor, u, v = to_autocast(anchor), to_autocast(u), to_autocast(v)
    scale = -1 / contrastive.check_scalar(op, "temperature", temperature, anchor, positive=True)
    eps = arguments.check_eps(op, eps, anchor.dtype)
    with torch.autocast(anchor.device.type, enabled=False):
        if normalize:
            anchor, u, v = unit(contrastive.without_ignored(anchor, target)), unit(u), unit(v)
        return contrastive.evaluate(op, anchor, [u, v], scale, None, target, None, smoothing, direction, eps, reduction, return_accuracy, workspace, process_group, gather_grad, exchange)


def _checked(op: str, anchor: object, u: object, v: object) -> tuple[Tensor, Tensor, Tensor]:
    anchor = contrastive.check_matrix(op, "anchor", anchor, "[B, D]")
    mixed = autocast_is_on(anchor.device.type)
    points = []
    for name, value in (("u", u), ("v", v)):
        value = contrastive.check_matrix(op, name, value, "[C, D]")
        arguments.check_alike(op, name, to_autocast(value) if mixed else value, "anchor", to_autocast(anchor) if mixed else anchor)
        points.append(value)
    if points[0].shape[0] != points[1].shape[0]:
        raise ValueError(f"{op}: v must have as many candidates C as u = {points[0].shape[0]}, got {arguments.describe(points[1])}")
    return anchor, points[0], points[1]


# ---------------------------------------------------------------------------------------------------------------------------------- plain-torch formulas


def reference_triangle_contrastive_loss(
    anchor: Tensor,
    u: Tensor,
    v: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    target: Tensor | None = None,
    label_smoothing: float = 0.0,
    direction: str = "both",
    normalize: bool = False,
    reduction: str = "mean",
    eps: float | None = None,
) -> Tensor:
    """`triangle_contrastive_loss` in a few lines of differentiable torch; stores B x C x D numbers."""
    anchor, u, v = _checked("reference_triangle_contrastive_loss", anchor, u, v)
    real = torch.float64 if anchor.dtype is torch.float64 else torch.float32
    points = [vector.to(real) for vector in (anchor, u, v)]
    if target is not None:
        points[0] = torch.where((target != contrastive.IGNORED)[:, None], points[0], 0)
    area = reference_triangle_area(*(map(unit, points) if normalize else points), eps=eps)
    loss, count = contrastive.loss_of_logits(-area / temperature, target, label_smoothing=label_smoothing, direction=direction)
    return contrastive.reduce(loss, count, reduction)


def formula_triangle_contrastive_loss(
    anchor: Tensor, u: Tensor, v: Tensor, *, temperature: float | Tensor = 0.07, label_smoothing: float = 0.0
) -> Tensor:
    """The usual code: two B x C x D tensors and two cross entropies. For comparisons; B = C."""
    return contrastive.two_entropies(-formula_triangle_area(anchor, u, v) / temperature, label_smoothing)
