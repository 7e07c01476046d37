"""Leading singular values of a sample's modalities. [PMRL, 2025]"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...ops import _contrastive as contrastive
from ...ops import clip_loss
from ...ops._gram_schmidt import unit
from . import _features as inputs

__all__ = ["pmrl_loss"]


def pmrl_loss(
    modalities: Sequence[Tensor],
    *,
    intra_temperature: float | Tensor = 0.05,
    inter_temperature: float | Tensor = 0.1,
    min_gap: float = 1e-3,
    reduction: str = "mean",
) -> Tensor:
    r"""The unit vectors of a sample shall have one large singular value, and its singular vector shall tell the sample from others.

    ::

        Z_b [D, k] with unit columns, sigma_1 >= ... >= sigma_k its singular values, u_b the left singular vector of sigma_1
        loss_b = CE(sigma / intra_temperature, class 1) + CE(u_b . u_c / inter_temperature over c, class b)

    >>> import torch
    >>> pmrl_loss([torch.eye(2), torch.eye(2), torch.eye(2)], intra_temperature=1.0, inter_temperature=1.0)
    tensor(0.6162)

    Parameters
    ----------
    modalities : sequence of k Tensors [B, D]
        Made unit length here.
    intra_temperature, inter_temperature : float or Tensor of one element
        Positive; a tensor gets a gradient.
    min_gap : float
        Positive. The gradient of u divides by the differences of squared singular values, which lie between 0 and k; they count as at least this.
    reduction : str
        "mean", "sum" or "none": [B].

    Returns
    -------
    Tensor, float32 (float64 for float64)

    Gradient
    --------
    In modalities and temperatures, once: d sigma_p = u_p . dZ q_p, exact; of u exact where the gaps exceed min_gap. A singular value of 0 has gradient 0.

    Edges
    -----
    k = 1: InfoNCE of the vectors with themselves. B = 1: the first term alone. All vectors of a sample 0: u = 0. Signs: the coordinates of u in
    the sample's vectors sum to 0 or more. A NaN makes the loss NaN.

    Raises
    ------
    TypeError, ValueError
        ``pmrl_loss: <argument> must ..., got ...``

    Complexity
    ----------
    Eigenvectors of B matrices k x k; the similarities of the u are not stored.

    Paper: Liu et al., "Principled multimodal representation learning", 2025.
    """
    op = "pmrl_loss"
    vectors = torch.stack(inputs.check_list(op, "modalities", modalities), 1)
    intra_temperature = inputs.check_scale(op, "intra_temperature", intra_temperature, vectors)
    inter_temperature = inputs.check_scale(op, "inter_temperature", inter_temperature, vectors)
    min_gap, reduction = inputs.check_share(op, "min_gap", min_gap), contrastive.check_reduction(op, reduction)
    if min_gap == 0:
        raise ValueError(f"{op}: min_gap must be positive, got {min_gap}")
    with torch.autocast(vectors.device.type, enabled=False):
        sigma, leading = singular_directions(unit(vectors), min_gap)
        intra = -(sigma / intra_temperature).log_softmax(1)[:, 0]
        inter = clip_loss(leading, leading, logit_scale=1 / inter_temperature, direction="rows", reduction="none")
        return inputs.mean_of(intra + inter, reduction)


def singular_directions(vectors: Tensor, min_gap: float) -> tuple[Tensor, Tensor]:
    """Singular values [B, k], largest first, and the leading left singular vector [B, D] of vectors [B, k, D]. First derivatives only.

    With q the eigenvectors of the small Gram matrix as constants, sigma_p = |q_p Z| already has the right gradient (q_p is a stationary point), and so has u
    once q_1 turns towards the other q_p as first-order perturbation says. torch's own gradient of eigenvectors is NaN wherever two other eigenvalues agree."""
    gram = (vectors @ vectors.mT).detach()
    _, q = torch.linalg.eigh(torch.where(gram.isfinite(), gram, 0))  # it raises for a NaN; the NaN comes back with the vectors
    q = q.flip(-1).mT
    q = torch.where(q.sum(-1, keepdim=True) < 0, -q, q)
    directions = q @ vectors  # sigma_p u_p
    square = directions.detach().square().sum(-1)
    sigma = (unit(directions.detach()) * directions).sum(-1)
    gaps = (square[:, :1] - square[:, 1:]).clamp(min=min_gap)
    turn = (directions[:, 1:] * directions[:, :1]).sum(-1) / gaps
    turned = directions[:, 0] + ((turn - turn.detach())[..., None] * directions[:, 1:]).sum(1)
    return sigma, unit(turned)
