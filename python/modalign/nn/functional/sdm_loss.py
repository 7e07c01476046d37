"""Similarity distribution matching of IRRA. [CVPR 2023]"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops import _contrastive as contrastive
from ...ops._gram_schmidt import unit
from . import _features as inputs

__all__ = ["sdm_loss"]


def sdm_loss(
    x: Tensor,
    y: Tensor,
    ids: Tensor,
    *,
    image_ids: Tensor | None = None,
    temperature: float | Tensor = 0.02,
    factor: float = 0.3,
    epsilon: float = 1e-8,
    reduction: str = "mean",
) -> Tensor:
    r"""KL divergence of the softmax of all cosines from the distribution that is uniform over the pairs of one identity; both directions, summed.

    ::

        p[i, :] = softmax_j(cos(x_i, y_j) / temperature)      q[i, :] = label[i, :] / sum_j label[i, j]      label[i, j] = 1 where ids agree, else 0
        loss_i  = sum_j p[i, j] (log p[i, j] - log(q[i, j] + epsilon))   + the same with x and y changed over

    With `image_ids`, captions of the same picture have label 1 and other pictures of the same identity have label `factor`.

    >>> import torch
    >>> sdm_loss(torch.eye(3), torch.eye(3), torch.tensor([7, 7, 9]))
    tensor(0.9242)

    Parameters
    ----------
    x, y : Tensor [B, D]
        Row i of both shows the identity ``ids[i]``. Made unit length here; a zero row has cosine 0 with everything.
    ids : Tensor int64 [B]
    image_ids : Tensor int64 [B], optional
        The picture that row i of x is and that row i of y describes.
    temperature : float or Tensor of one element
        Positive; a tensor gets a gradient.
    factor : float
        Between 0 and 1; without `image_ids` it does nothing.
    epsilon : float
        Positive. A pair of two identities costs up to -log(epsilon), 18.4.
    reduction : str
        "mean", "sum" or "none": [B], the two directions of sample i added.

    Returns
    -------
    Tensor, float32 (float64 for float64)

    Gradient
    --------
    In x, y and temperature, by autograd; it can be differentiated again.

    Edges
    -----
    B = 1: 0 but for epsilon. B = 0: 0. A NaN makes the loss NaN.

    Raises
    ------
    TypeError, ValueError
        ``sdm_loss: <argument> must ..., got ...``

    Complexity
    ----------
    Two matrices of cosines in plain torch, for the published batches of 64 to 128. Above 4 million cosines they are made in panels of rows, and again in the
    backward, so that memory stays linear in B.

    Paper: Jiang and Ye, "Cross-modal implicit relation reasoning and aligning for text-to-image person retrieval", CVPR 2023, section 3.3.
    """
    op = "sdm_loss"
    x, y = inputs.check_features(op, x=(x, "[B, D]"), y=(y, "[B, D]"))
    ids = inputs.check_whole(op, "ids", ids, torch.int64, "[B]", (x.shape[0],), x)
    if image_ids is not None:
        image_ids = inputs.check_whole(op, "image_ids", image_ids, torch.int64, "[B]", (x.shape[0],), x)
    temperature = inputs.check_scale(op, "temperature", temperature, x)
    factor, epsilon = inputs.check_share(op, "factor", factor), inputs.check_share(op, "epsilon", epsilon)
    if epsilon == 0:
        raise ValueError(f"{op}: epsilon must be positive, got {epsilon}")
    reduction = contrastive.check_reduction(op, reduction)
    pictures = ids if image_ids is None else image_ids

    def one_way(x: Tensor, y: Tensor) -> Tensor:
        def divergence(rows: Tensor, ids_of_rows: Tensor, pictures_of_rows: Tensor) -> Tensor:
            log_p = (rows @ y.mT / temperature).log_softmax(1)
            label = factor * (ids_of_rows[:, None] == ids).to(rows.dtype)
            label = torch.where(pictures_of_rows[:, None] == pictures, 1, label)
            return (log_p.exp() * (log_p - (label / label.sum(1, keepdim=True) + epsilon).log())).sum(1)

        return inputs.by_panels(divergence, len(y), x, ids, pictures)

    with torch.autocast(x.device.type, enabled=False):
        x, y = unit(x), unit(y)
        return inputs.mean_of(one_way(x, y) + one_way(y, x), reduction)
