"""Pictures as another sensor or hand might have seen them, pixel for pixel in place. [after MINIMA, CVPR 2025]"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops._arguments import describe

__all__ = ["MODALITY_TRANSFORMS", "modality_transform"]


def modality_transform(pictures: Tensor, kind: str) -> Tensor:
    """Pictures that show the same in another way, so that what lies where is known.

    ::

        edge       length of the slope of the brightness, black on white
        sketch     brightness over a blurred copy of itself (a pencil stroke where it falls)
        infrared   brightness of the red side, inverted and blurred
        depth      a smooth relief: brightness blurred three times, wider each time
        normal     the directions of that relief's slope, as colours
        paint      few colours, in patches: medians of 5 x 5, six levels

    The published data come from generative models; these are filters, which need none and look plainer.

    >>> import torch
    >>> picture = torch.zeros(1, 3, 8, 8)
    >>> picture[..., 4:] = 1
    >>> modality_transform(picture, "edge")[0, 0, 4].tolist()                                # black where the brightness changes
    [1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0]

    pictures: floating-point Tensor [B, 3, H, W] from 0 to 1 (looked at on the CPU only). Returns the same shape and dtype, 0 to 1. Differentiable but for "paint". Raises ValueError: ``modality_transform: <argument> must ..., got ...``.
    """
    if not isinstance(kind, str) or kind not in MODALITY_TRANSFORMS:
        raise ValueError(f"modality_transform: kind must be one of {', '.join(MODALITY_TRANSFORMS)}, got {describe(kind)}")
    if not isinstance(pictures, Tensor) or not pictures.is_floating_point() or pictures.dim() != 4 or pictures.shape[1] != 3 or min(pictures.shape[2:]) < 4:
        raise ValueError(f"modality_transform: pictures must be a floating-point tensor [B, 3, H, W] of 4 x 4 pixels or more, got {describe(pictures)}")
    if pictures.numel() and pictures.device.type == "cpu" and not (float(pictures.detach().amin()) >= 0 and float(pictures.detach().amax()) <= 1):
        raise ValueError(f"modality_transform: pictures must be from 0 to 1, got {float(pictures.detach().amin()):g} to {float(pictures.detach().amax()):g}")
    found = MODALITY_TRANSFORMS[kind](pictures).clamp(0, 1)
    return found.expand_as(pictures).contiguous() if found.shape[1] == 1 else found


def _brightness(x: Tensor) -> Tensor:
    return (x * x.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)


def _blurred(x: Tensor, deviation: float) -> Tensor:
    """By a Gaussian; the edge is continued."""
    reach = min(int(3 * deviation + 0.5), *(size - 1 for size in x.shape[2:]))
    place = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device)
    weight = torch.exp(-(place**2) / (2 * deviation**2))
    weight = (weight / weight.sum()).expand(x.shape[1], 1, -1)
    padded = F.pad(x, (reach, reach, reach, reach), mode="replicate")
    return F.conv2d(F.conv2d(padded, weight[:, :, None], groups=x.shape[1]), weight[..., None], groups=x.shape[1])


def _slope(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sobel's differences across and down, 1 for a step of 1."""
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    kernel = x.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])[None, None] / 4
    return F.conv2d(padded, kernel), F.conv2d(padded, kernel.mT)


def _edge(x: Tensor) -> Tensor:
    across, down = _slope(_brightness(x))
    square = across**2 + down**2
    return 1 - torch.where(square > 0, square.where(square > 0, 1).sqrt(), 0)


def _sketch(x: Tensor) -> Tensor:
    grey = _brightness(x)
    return grey / _blurred(grey, 3.0).clamp(min=1e-3)


def _infrared(x: Tensor) -> Tensor:
    return _blurred(1 - (0.7 * x[:, :1] + 0.3 * x[:, 1:2]), 1.0)


def _relief(x: Tensor) -> Tensor:
    grey = _brightness(x)
    return (_blurred(grey, 1.0) + _blurred(grey, 3.0) + _blurred(grey, 6.0)) / 3


def _normal(x: Tensor) -> Tensor:
    across, down = _slope(_relief(x))
    direction = torch.cat([-4 * across, -4 * down, torch.ones_like(across)], 1)
    return F.normalize(direction, dim=1) / 2 + 0.5


def _paint(x: Tensor) -> Tensor:
    patches = F.pad(x, (2, 2, 2, 2), mode="replicate").unfold(2, 5, 1).unfold(3, 5, 1)
    return (patches.flatten(4).median(-1).values * 5).round() / 5


MODALITY_TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "edge": _edge,
    "sketch": _sketch,
    "infrared": _infrared,
    "depth": _relief,
    "normal": _normal,
    "paint": _paint,
}
