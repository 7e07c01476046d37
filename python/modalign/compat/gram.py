"""The functions of the released GRAM and TRIANGLE training code. Replace their import by this one; nothing else changes.

>>> import torch
>>> from modalign.compat.gram import volume_computation
>>> volume_computation(torch.eye(3)[:1], torch.eye(3)[1:2], torch.eye(3)[2:])
tensor([[1.]])

What differs from the released code, all of it on purpose: nearly collinear vectors keep their digits (a determinant in float32 loses them all), a
zero volume is 0 and not the root of a rounding error, its gradient is 0 and not NaN, there are no B x B x k x k and B x B x D intermediates, and
half-precision inputs give the result in their own dtype after accumulating in float32. Rows are the first argument, columns the others: [B1, B2].
Small means similar.
"""

from __future__ import annotations

from torch import Tensor

from ..ops import gram_volume, triangle_area

__all__ = ["volume_computation", "volume_computation3", "volume_computation4", "volume_computation5", "area_computation"]


def volume_computation(anchor: Tensor, *inputs: Tensor) -> Tensor:
    """sqrt(det G) of anchor i [B1, D] with candidate j of every input [B2, D]: [B1, B2]."""
    return gram_volume(anchor, inputs)


def volume_computation3(language: Tensor, video: Tensor, audio: Tensor) -> Tensor:
    """Volume of (language i, video j, audio j): [B1, B2]."""
    return gram_volume(language, (video, audio))


def volume_computation4(language: Tensor, video: Tensor, audio: Tensor, subtitles: Tensor) -> Tensor:
    """Volume of (language i, video j, audio j, subtitles j): [B1, B2]."""
    return gram_volume(language, (video, audio, subtitles))


def volume_computation5(language: Tensor, video: Tensor, audio: Tensor, subtitles: Tensor, depth: Tensor) -> Tensor:
    """Volume of (language i, video j, audio j, subtitles j, depth j): [B1, B2]."""
    return gram_volume(language, (video, audio, subtitles, depth))


def area_computation(language: Tensor, video: Tensor, audio: Tensor) -> Tensor:
    """(|p|^2 |q|^2 - (p . q)^2) / 2 with p = language i - video j and q = language i - audio j: [B1, B2].

    That is 2 Area^2: the released training code leaves out the square root that the paper has. For the paper's area use
    `modalign.ops.triangle_area`."""
    return 2 * triangle_area(language, video, audio, squared=True)
