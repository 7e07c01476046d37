"""The three contrastive terms of TCL: across modalities, within a modality, and of a whole with the parts of others. [CVPR 2022]"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops import _arguments as arguments
from ...ops import clip_loss
from ...ops._gram_schmidt import unit
from . import _features as inputs

__all__ = ["TclLoss", "cross_modal_alignment", "local_mutual_information", "pool_patches", "tcl_loss"]


class TclLoss(NamedTuple):
    """total = (cross_modal + intra_modal + local) / 6, each of the three the sum over its two directions or modalities."""

    total: Tensor
    cross_modal: Tensor
    intra_modal: Tensor
    local: Tensor


def tcl_loss(
    image: Tensor,
    text: Tensor,
    image_keys: Tensor,
    text_keys: Tensor,
    image_locals: Tensor,
    text_locals: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    alpha: float = 0.4,
    text_mask: Tensor | None = None,
    image_queue: Tensor | None = None,
    text_queue: Tensor | None = None,
    normalize: bool = True,
) -> TclLoss:
    r"""TCL's sum of six terms. Keys and local vectors come from momentum encoders; queues hold keys of earlier batches.

    ::

        cross_modal = CMA(image; text_keys, text_queue) + CMA(text; image_keys, image_queue)          soft targets: `cross_modal_alignment`
        intra_modal = CE(image; image_keys, image_queue) + CE(text; text_keys, text_queue)            row i belongs to key i
        local       = LMI(image; image_locals) + LMI(text; text_locals)                               `local_mutual_information`

    >>> import torch
    >>> eye = torch.eye(3)
    >>> tcl_loss(eye, eye, eye, eye, eye[:, None], eye[:, None], temperature=0.5, alpha=0.0).total
    tensor(0.2395)

    Parameters
    ----------
    image, text : Tensor [B, D]
        Of the encoders that are trained.
    image_keys, text_keys : Tensor [B, D]
        Of the momentum encoders, the picture augmented anew.
    image_locals : Tensor [B, N, D]
        Patches, see `pool_patches`.
    text_locals : Tensor [B, L, D]
        Words.
    temperature : float or Tensor of one element
        Positive; a tensor gets a gradient.
    alpha : float
        Between 0 and 1: the share of the momentum encoders' opinion in the targets. Published: from 0 to 0.4 over the first epoch.
    text_mask : Tensor bool [B, L], optional
        True for words. What stands elsewhere is never read.
    image_queue, text_queue : Tensor [K, D], optional
        Unit rows, taken as they are; see `nn.FeatureQueue`.
    normalize : bool
        Make everything but the queues unit length.

    Returns
    -------
    TclLoss of float32 (float64 for float64) scalars

    Gradient
    --------
    In image, text and temperature, once. None into keys, local vectors, queues and soft targets.

    Edges
    -----
    B = 1 without a queue: 0. A text without words takes no part in the local term. A NaN that takes part makes the loss NaN.

    Raises
    ------
    TypeError, ValueError
        ``tcl_loss: <argument> must ..., got ...``

    Paper: Yang et al., "Vision-language pre-training with triple contrastive learning", CVPR 2022, section 3.
    """
    op = "tcl_loss"
    image, text, image_keys, text_keys, image_locals, text_locals, image_queue, text_queue = inputs.check_features(
        op,
        image=(image, "[B, D]"),
        text=(text, "[B, D]"),
        image_keys=(image_keys, "[B, D]"),
        text_keys=(text_keys, "[B, D]"),
        image_locals=(image_locals, "[B, N, D]"),
        text_locals=(text_locals, "[B, L, D]"),
        image_queue=(image_queue, "[K, D]"),
        text_queue=(text_queue, "[K, D]"),
    )
    options = {"temperature": inputs.check_scale(op, "temperature", temperature, image), "normalize": arguments.check_flag(op, "normalize", normalize)}
    alpha = inputs.check_share(op, "alpha", alpha)
    if text_mask is not None:
        text_mask = inputs.check_whole(op, "text_mask", text_mask, torch.bool, "[B, L]", tuple(text_locals.shape[:2]), text)
    cross = cross_modal_alignment(image, image_keys, text_keys, alpha=alpha, queue=text_queue, **options)
    cross = cross + cross_modal_alignment(text, text_keys, image_keys, alpha=alpha, queue=image_queue, **options)
    intra = _infonce(image, image_keys, image_queue, **options) + _infonce(text, text_keys, text_queue, **options)
    local = local_mutual_information(image, image_locals, **options) + local_mutual_information(text, text_locals, mask=text_mask, **options)
    return TclLoss((cross + intra + local) / 6, cross, intra, local)


def cross_modal_alignment(
    x: Tensor, x_keys: Tensor, y_keys: Tensor, *, temperature: float | Tensor = 0.07, alpha: float = 0.4, queue: Tensor | None = None, normalize: bool = True
) -> Tensor:
    """Cross entropy of x against the keys of the other modality with soft targets, in one direction (TCL's and ALBEF's CMA).

    ::

        target[i, :] = alpha softmax_j(x_keys_i . k_j / temperature) + (1 - alpha) onehot(i),      k = y_keys and the queue behind them
        loss = -mean_i sum_j target[i, j] log softmax_j(x_i . k_j / temperature)

    A cross entropy is linear in its targets: the soft share of row i sees the attention of x_keys_i over the keys and no matrix of targets is stored.

    >>> import torch
    >>> cross_modal_alignment(torch.eye(3), torch.eye(3), torch.eye(3), temperature=0.5, alpha=0.0)
    tensor(0.2395)

    Parameters: x, x_keys, y_keys [B, D]; queue [K, D], unit rows of y's modality; temperature, alpha, normalize as in `tcl_loss`. Gradient in x and
    temperature, once. Returns a scalar, float32 (float64). Raises TypeError and ValueError, ``cross_modal_alignment: <argument> must ..., got ...``."""
    op = "cross_modal_alignment"
    x, x_keys, y_keys, queue = inputs.check_features(op, x=(x, "[B, D]"), x_keys=(x_keys, "[B, D]"), y_keys=(y_keys, "[B, D]"), queue=(queue, "[K, D]"))
    temperature, alpha = inputs.check_scale(op, "temperature", temperature, x), inputs.check_share(op, "alpha", alpha)
    with torch.autocast(x.device.type, enabled=False):
        if arguments.check_flag(op, "normalize", normalize):
            x, x_keys, y_keys = unit(x), unit(x_keys), unit(y_keys)
        keys = (y_keys if queue is None else torch.cat([y_keys, queue])).detach()
        opinion = F.scaled_dot_product_attention((x_keys / temperature).detach()[None, None], keys[None, None], keys[None, None], scale=1.0)[0, 0]
        moved = (x * (y_keys.detach() - opinion)).sum(1) / temperature  # what a target costs more that moves from key i to the opinion's mean of keys
        return _infonce(x, y_keys, queue, temperature, False) + alpha * inputs.mean_of(moved, "mean")


def local_mutual_information(x: Tensor, parts: Tensor, *, temperature: float | Tensor = 0.07, mask: Tensor | None = None, normalize: bool = True) -> Tensor:
    """InfoNCE of a whole with its parts against the parts of the other samples (TCL's LMI).

    ::

        loss = mean_i mean_n -log(e_in / (e_in + sum over j != i and n' of exp(x_i . p_jn' / temperature))),      e_in = exp(x_i . p_in / temperature)

    The sum over the others is the same for all n: one log-sum-exp per sample serves them.

    >>> import torch
    >>> local_mutual_information(torch.eye(3), torch.eye(3)[:, None], temperature=0.5)
    tensor(0.2395)

    Parameters: x [B, D]; parts [B, N, D]; mask bool [B, N], True for what is there; temperature, normalize as in `tcl_loss`. Gradient in x and temperature.
    Returns a scalar, float32 (float64), the mean over the samples with parts; 0 for B = 1.
    Raises TypeError and ValueError, ``local_mutual_information: <argument> must ..., got ...``."""
    op = "local_mutual_information"
    x, parts = inputs.check_features(op, x=(x, "[B, D]"), parts=(parts, "[B, N, D]"))
    temperature, normalize = inputs.check_scale(op, "temperature", temperature, x), arguments.check_flag(op, "normalize", normalize)
    B, N, _ = parts.shape
    mask = torch.ones(B, N, dtype=torch.bool, device=x.device) if mask is None else inputs.check_whole(op, "mask", mask, torch.bool, "[B, N]", (B, N), x)
    with torch.autocast(x.device.type, enabled=False):
        parts = torch.where(mask[..., None], parts.detach(), 0)
        if normalize:
            x, parts = unit(x), unit(parts)
        index = torch.arange(B, device=x.device)
        flat, there, owner = parts.flatten(0, 1), mask.flatten(), index.repeat_interleave(N, output_size=B * N)

        def of_others(rows: Tensor, index_of_rows: Tensor) -> Tensor:
            return torch.where(there & (index_of_rows[:, None] != owner), rows @ flat.mT / temperature, -torch.inf).logsumexp(1)

        others = inputs.by_panels(of_others, B * N, x, index)
        loss = torch.where(mask, F.softplus(others[:, None] - (parts @ x[..., None]).squeeze(-1) / temperature), 0)
        count = mask.sum(1)
        return (loss.sum(1) / count.clamp(min=1)).sum() / (count > 0).sum().clamp(min=1)


def pool_patches(patches: Tensor, window: int | None = None) -> Tensor:
    """Means over windows of a square grid of patches: [B, N, D] to [B, N / window^2, D]. Default window: the root of the grid's side, rounded down, so that 256
    patches become 16.

    >>> import torch
    >>> pool_patches(torch.arange(16.0).reshape(1, 16, 1))[0, :, 0]
    tensor([ 2.5000,  4.5000, 10.5000, 12.5000])

    Raises TypeError and ValueError, ``pool_patches: <argument> must ..., got ...``; also for a window that does not divide the side."""
    op = "pool_patches"
    arguments.check_vectors(op, "patches", patches, "[B, N, D]")
    if patches.dim() != 3:
        raise ValueError(f"{op}: patches must have 3 dimensions [B, N, D], got {arguments.describe(patches)}")
    B, N, D = patches.shape
    side = math.isqrt(N)
    if side * side != N or N == 0:
        raise ValueError(f"{op}: patches must form a square grid, got N = {N}")
    window = math.isqrt(side) if window is None else window
    if isinstance(window, bool) or not isinstance(window, int) or window < 1 or side % window:
        raise ValueError(f"{op}: window must be a whole number that divides the side {side} of the grid, got {window!r}")
    return patches.reshape(B, side // window, window, side // window, window, D).mean((2, 4)).flatten(1, 2)


def _infonce(x: Tensor, keys: Tensor, queue: Tensor | None, temperature: Tensor, normalize: bool) -> Tensor:
    negatives = None if queue is None else queue.detach()
    return clip_loss(x, keys.detach(), logit_scale=1 / temperature, negatives=negatives, direction="rows", normalize=normalize)
