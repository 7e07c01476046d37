"""Regions of pictures and attributes of their texts: the best region of a picture answers for it. [ViLLA, ICCV 2023]"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops import _arguments as arguments
from ...ops import _contrastive as contrastive
from ...ops import segment_max_similarity
from ...ops._gram_schmidt import unit
from . import _features as inputs
from ._regions import check_regions

__all__ = ["villa_mapping_loss"]


def villa_mapping_loss(
    regions: Tensor,
    offsets: Tensor,
    attributes: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    released: bool = False,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    r"""Contrast of each picture that has an attribute with all pictures that lack it, by the region of each that looks most like the attribute.

    ::

        z_ia    = max over regions r of picture i of regions_r . attributes_a / temperature
        loss_ia = -log(exp(z_ia) / (exp(z_ia) + sum over pictures j without a of exp(z_ja)))          for every i that has a; their mean

    >>> import torch
    >>> regions, offsets = torch.eye(3), torch.tensor([0, 2, 3])                              # two pictures: regions 0 and 1, region 2
    >>> villa_mapping_loss(regions, offsets, torch.eye(3)[:2], torch.tensor([[True, True], [False, False]]), temperature=1.0)
    tensor(0.3133)

    Parameters
    ----------
    regions : Tensor [R, D], or [A, R, D] where every attribute has a head of its own
        Features of the regions of all pictures behind the trained head, one picture behind the other.
    offsets : Tensor int64 [S + 1]
        Picture i has the regions ``offsets[i]`` to ``offsets[i + 1] - 1``, at least one; rising from 0 to R.
    attributes : Tensor [A, D]
        Text features, frozen in the published model.
    labels : Tensor bool [S, A]
        Which picture has which attribute. An attribute that no picture has adds nothing.
    temperature : float or Tensor of one element
        Positive; a tensor gets a gradient.
    released : bool
        True: the denominator of the released code, in which every picture that has the attribute adds exp(0) = 1.
    normalize : bool
        Scale all vectors to unit length first.
    reduction : str
        "mean" over the pairs with a label, "sum", or "none": [S, A], 0 for the others.

    Returns
    -------
    Tensor, float32 (float64 for float64)

    Gradient
    --------
    In regions, attributes and temperature. A picture's gradient goes to its best region alone, of equal ones to the first. Double backward and forward mode
    raise.

    Edges
    -----
    An attribute that every picture has: 0. No label: 0. A NaN makes the loss NaN.

    Raises
    ------
    TypeError, ValueError
        ``villa_mapping_loss: <argument> must ..., got ...``; for a picture without regions on the CPU only, elsewhere its z is -inf.

    Complexity
    ----------
    2 R A D FLOP; products of regions and attributes are not stored, memory is linear in R and S A. With a head for each attribute one pass per attribute.

    Paper: Varma et al., "ViLLA: fine-grained vision-language representation learning from real-world data", ICCV 2023, section 4.1.
    """
    op = "villa_mapping_loss"
    regions, offsets, attributes, labels = check_regions(op, regions, offsets, attributes, labels)
    temperature = inputs.check_scale(op, "temperature", temperature, regions)
    released, normalize = arguments.check_flag(op, "released", released), arguments.check_flag(op, "normalize", normalize)
    reduction = contrastive.check_reduction(op, reduction)
    with torch.autocast(regions.device.type, enabled=False):
        if normalize:
            regions, attributes = unit(regions), unit(attributes)
        if regions.dim() == 2:
            best = segment_max_similarity(regions, offsets, attributes).values
        else:
            best = torch.cat([segment_max_similarity(head, offsets, attribute[None]).values for head, attribute in zip(regions, attributes, strict=True)], 1)
        logits = best / temperature
        some = torch.full_like(labels[0], True) if released else ~labels.all(0)  # attributes with something in the sum: over nothing its gradient is NaN
        others = torch.where(some, logits.masked_fill(labels, 0 if released else -torch.inf), 0).logsumexp(0)
        loss = torch.where(labels, -F.logsigmoid(logits - torch.where(some, others, -torch.inf)), 0)
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.sum() / labels.sum().clamp(min=1)
