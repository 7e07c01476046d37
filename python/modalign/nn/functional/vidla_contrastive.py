"""A video with several texts. [VidLA, CVPR 2024]"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .binding_loss import binding_loss

__all__ = ["vidla_contrastive"]


def vidla_contrastive(
    video: Tensor, texts: Sequence[Tensor], *, logit_scale: float | Tensor = 1 / 0.07, present: Tensor | None = None, normalize: bool = True
) -> Tensor:
    """Mean of `ops.clip_loss` of the video with each kind of text, such as caption and summary of the subtitles.

    >>> import torch
    >>> vidla_contrastive(torch.eye(3), [torch.eye(3), torch.eye(3)], logit_scale=1.0)
    tensor(0.5514)

    Parameters: video [B, D]; texts, a sequence of [B, D]; the rest, gradient and errors as in `binding_loss`, of which this is the mean over the texts.

    Paper: Rizve et al., "VidLA: video-language alignment at scale", CVPR 2024. Put together from its abstract."""
    return binding_loss(video, texts, logit_scale=logit_scale, present=present, normalize=normalize) / len(texts)
