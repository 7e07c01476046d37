"""Contrastive loss on sums of cosines, the baseline of volumes, without the matrix of similarities. [GRAM, ICLR 2025]"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _arguments as arguments
from . import _contrastive as contrastive
from ._gram_schmidt import unit
from ._registration import accumulation_dtype, autocast_is_on, refuse_forward_mode, register_pair, to_autocast
from .gram_contrastive_loss import _checked
from .pairwise_logsumexp import contrastive_devices

__all__ = ["cosine_sum_contrastive_loss", "reference_cosine_sum_contrastive_loss", "formula_cosine_sum_contrastive_loss"]


def cosine_sum_contrastive_loss(
    anchor: Tensor,
    others: Sequence[Tensor],
    *,
    temperature: float | Tensor = 0.07,
    target: Tensor | None = None,
    label_smoothing: float = 0,  # an int: torch.compile(dynamic=True) would trace a float default twice
    direction: str = "both",
    present: Tensor | None = None,
    mean: bool = False,
    normalize: bool = True,
    reduction: str = "mean",
    return_accuracy: bool = False,
    process_group: Any = None,
    gather_grad: str = "full",
    exchange: str = "gather",
    implementation: str = "auto",
    workspace_bytes: int | None = None,
) -> Any:
    r"""InfoNCE over all pairs of anchors and candidate tuples with logits ``S[i, j] / temperature``, S the sum of the anchor's cosines with the candidate's
    vectors; rows and columns at once.

    ::

        S[i, j] = sum_p cos(anchor_i, others[p]_j)      loss_i = 1/2 CE(z[i, :], t_i) + 1/2 CE(z[:, t_i], i)      z = S / temperature

    The call of `gram_contrastive_loss` with another score, to compare the two. A sum of products with one vector is the product with the sum, so this is
    `clip_loss` on the sums of the unit vectors: one product per pair for any number of modalities.

    >>> import torch
    >>> anchor, video, audio = torch.eye(4), torch.eye(4), torch.eye(4).roll(2, 0)
    >>> cosine_sum_contrastive_loss(anchor, [video, audio], temperature=0.5)
    tensor(0.8201)

    Parameters
    ----------
    anchor : Tensor [B, D]
    others : sequence of Tensor [C, D]
        Row j of all of them belongs to candidate j; 1 or more.
    temperature : float or Tensor of one element
        Positive; a tensor gets a gradient.
    target, label_smoothing, direction, reduction, return_accuracy
        See `gram_contrastive_loss`.
    present : Tensor bool [C, m], optional
        Which modalities a candidate has; the sum is over these, and what an absent one holds does not matter. A candidate without any is left out, and rows
        that point to it have no label.
    mean : bool
        Divide the sum by the number of modalities that the candidate has, so that one with gaps does not look further away.
    normalize : bool
        Scale all vectors to unit length first. False: sums of inner products as they are.
    process_group, gather_grad, exchange, implementation, workspace_bytes
        See `gram_contrastive_loss`.

    Returns
    -------
    Tensor, float32 (float64 for float64), or (Tensor, Tensor [2])

    Gradient
    --------
    Closed form in anchor, others and temperature. Double backward and forward mode raise.

    Edges
    -----
    B = C = 1: 0. No labelled row: 0 with gradient 0. A NaN that takes part makes the loss NaN. Half types: the sums are rounded to them once.

    Raises
    ------
    TypeError, ValueError
        ``cosine_sum_contrastive_loss: <argument> must ..., got ...``; RuntimeError for values of tensors, which are looked at on the CPU only (that of a
        target comes in the name of `clip_loss`).

    Complexity
    ----------
    2 B C D + O(m C D) FLOP, the backward 6 B C D; memory beyond inputs and gradients about 4 (B + C) D + 2 m C D, and the workspace.

    Paper: Cicchetti et al., "Gramian Multimodal Representation Learning and Alignment", ICLR 2025, section 3: what volumes take the place of.
    """
    op = "cosine_sum_contrastive_loss"
    anchor, vectors, present = _checked(op, anchor, others, present)
    target = contrastive.check_target(op, target, anchor.shape[0], vectors[0].shape[0], anchor)
    smoothing = contrastive.check_label_smoothing(op, label_smoothing)
    direction = contrastive.check_direction(op, direction)
    mean = arguments.check_flag(op, "mean", mean)
    normalize = arguments.check_flag(op, "normalize", normalize)
    reduction = contrastive.check_reduction(op, reduction)
    return_accuracy = arguments.check_flag(op, "return_accuracy", return_accuracy)
    contrastive.check_group(op, process_group, gather_grad, exchange)
    workspace = contrastive.check_workspace(op, implementation, workspace_bytes, process_group)
    refuse_forward_mode(op, [anchor, *vectors] + [value for value in (temperature,) if isinstance(value, Tensor)])
    if autocast_is_on(anchor.device.type):
        anchor, vectors = to_autocast(anchor), [to_autocast(vector) for vector in vectors]
    scale = 1 / contrastive.check_scalar(op, "temperature", temperature, anchor, positive=True)
    with torch.autocast(anchor.device.type, enabled=False):
        if normalize:
            anchor = unit(contrastive.without_ignored(anchor, target))
        candidates = sum_of_vectors(vectors, present, mean, normalize).to(anchor.dtype)
        here = None if present is None else present.any(1, keepdim=True)
        return contrastive.evaluate(
            op, anchor, [candidates], scale, None, target, here, smoothing, direction, 0.0, reduction, return_accuracy, workspace, process_group, gather_grad, exchange
        )


def sum_of_vectors(vectors: list[Tensor], present: Tensor | None, mean: bool, normalize: bool) -> Tensor:
    """Of every candidate the sum, or the mean, of the unit vectors that it has, in the accumulation dtype."""
    vectors = [vector.to(accumulation_dtype(vector.dtype)) for vector in vectors]
    if present is not None:
        vectors = [torch.where(present[:, p, None], vector, 0) for p, vector in enumerate(vectors)]
    if normalize:
        vectors = [unit(vector) for vector in vectors]
    total = sum(vectors[1:], vectors[0])
    if not mean:
        return total
    return total / (len(vectors) if present is None else present.sum(1, keepdim=True).clamp(min=1))


# ------------------------------------------------------------------------------------------------------------------------- what torch needs to know
# The ops of clip_loss under this name, so that errors name the op that was called.


def _forward(anchor: Tensor, others: list[Tensor], scale: Tensor, *rest: Any) -> Any:
    if scale.device.type == "cpu" and not (scale > 0 and math.isfinite(scale)):
        raise RuntimeError(f"cosine_sum_contrastive_loss: temperature must be positive and finite, got {1 / scale.item() if scale else math.inf}")
    return torch.ops.modalign.clip_loss(anchor, others, scale, *rest)


_library = torch.library.Library("modalign", "FRAGMENT")
for _suffix, _kernel in (("", _forward), ("_bwd", torch.ops.modalign.clip_loss_bwd)):
    _schema = getattr(torch.ops.modalign, f"clip_loss{_suffix}").default._schema
    _library.define(str(_schema).replace("modalign::clip_loss", "cosine_sum_contrastive_loss"))
    for _device in contrastive_devices:
        _library.impl(f"cosine_sum_contrastive_loss{_suffix}", _kernel, _device)
register_pair(
    "cosine_sum_contrastive_loss",
    op="cosine_sum_contrastive_loss",
    fake=contrastive._fake_product,
    fake_backward=contrastive._fake_backward,
    setup_context=contrastive._setup_context,
    backward=contrastive._backward_of("cosine_sum_contrastive_loss"),
    vmap="loop",
)


# ---------------------------------------------------------------------------------------------------------------------------------- plain-torch formulas


def reference_cosine_sum_contrastive_loss(
    anchor: Tensor,
    others: Sequence[Tensor],
    *,
    temperature: float | Tensor = 0.07,
    target: Tensor | None = None,
    label_smoothing: float = 0.0,
    direction: str = "both",
    present: Tensor | None = None,
    mean: bool = False,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """`cosine_sum_contrastive_loss` in a few lines of differentiable torch, one matrix per modality; stores m B x C numbers."""
    anchor, vectors, present = _checked("reference_cosine_sum_contrastive_loss", anchor, others, present)
    real = accumulation_dtype(anchor.dtype)
    present = torch.ones(vectors[0].shape[0], len(vectors), dtype=torch.bool, device=anchor.device) if present is None else present
    anchor = contrastive.without_ignored(anchor, target).to(real)
    vectors = [torch.where(present[:, p, None], vector, 0).to(real) for p, vector in enumerate(vectors)]
    if normalize:
        anchor, vectors = unit(anchor), [unit(vector) for vector in vectors]
    score = torch.stack([anchor @ vector.mT for vector in vectors]).sum(0)
    if mean:
        score = score / present.sum(1).clamp(min=1)
    loss, count = contrastive.loss_of_logits(score / temperature, target, columns=present.any(1), label_smoothing=label_smoothing, direction=direction)
    return contrastive.reduce(loss, count, reduction)


def formula_cosine_sum_contrastive_loss(anchor: Tensor, others: Sequence[Tensor], *, temperature: float | Tensor = 0.07, label_smoothing: float = 0.0) -> Tensor:
    """The usual code: a matrix of cosines per modality, their sum, two cross entropies. For comparisons; B = C, unit vectors."""
    return contrastive.two_entropies(sum(anchor @ other.mT for other in others) / temperature, label_smoothing)
