"""Words held to look at the part of the picture that they speak of. [CosmicMan, CVPR 2024]"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops import _arguments as arguments
from ...ops import _attention_arguments as attention
from ...ops._registration import accumulation_dtype, refuse_forward_mode
from ...ops.attention_segment_mass import mass
from . import _features as inputs

__all__ = ["attention_refocusing_loss"]


def attention_refocusing_loss(
    query: Tensor,
    key: Tensor,
    samples: Tensor,
    spans: Tensor,
    masks: Tensor,
    size: tuple[int, int],
    *,
    mask: Tensor | attention.MaskProgram | None = None,
    scale: float | None = None,
) -> Tensor:
    r"""The cross-attention maps of the words of a phrase, and their mean, shall be the mask of the part that the phrase names.

    ::

        A_ij = softmax_j(scale q_i . k_j)        maps of a group: A_.j for the j of its span, and their mean over the span
        loss = mean over samples with groups of the mean over heads, pixels and maps of (map - mask of the group, resized)^2

    >>> import torch
    >>> query, key = torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 2, 2)                            # 2 x 2 pixels and two words: every map is 1/2
    >>> left = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    >>> attention_refocusing_loss(query, key, torch.tensor([0]), torch.tensor([[0, 1]]), left, (2, 2))
    tensor(0.2500)

    Parameters
    ----------
    query : Tensor [B, H, h w, D]
        Of the pixels, row after row.
    key : Tensor [B, Hkv, L, D]
        Of the tokens of the text.
    samples : int64 tensor [G]
        The sample of each group.
    spans : int64 tensor [G, 2]
        The tokens of each group, from the first to before the second.
    masks : Tensor [G, height, width], bool or floating point
        Where the part is that the group names, resized bilinearly.
    size : tuple (h, w)
    mask, scale
        As in `modalign.ops.masked_attention`.

    Returns
    -------
    Tensor, float32 (float64 for float64)

    Gradient
    --------
    In query and key, through the softmax over all tokens. Double backward and forward mode raise.

    Edges
    -----
    No groups: 0 with a gradient of 0. A sample without groups does not count. A is a softmax over tokens and a mask is 0 or 1, so 0 is reached only where one token
    takes everything: expect a floor.

    Raises
    ------
    TypeError, ValueError
        ``attention_refocusing_loss: <argument> must ..., got ...``, also for spans that are empty or leave the text. Waits for the device to look at them.

    Complexity
    ----------
    Only the maps are made, at most M of a sample: B H h w M numbers, by `masked_attention` with Dv = M.

    Paper: Li et al., "CosmicMan: a text-to-image foundation model for humans", CVPR 2024, section 4.2.
    """
    op = "attention_refocusing_loss"
    _, problem = attention.check_problem(op, query, key, attention.NO_VALUE, mask, None, False, None, scale, 0)
    (B, _, Nq, _), L, G = problem.query.shape, problem.key.shape[2], samples.shape[0] if isinstance(samples, Tensor) and samples.dim() == 1 else 0
    samples = inputs.check_whole(op, "samples", samples, torch.int64, "[G]", (G,), problem.query)
    spans = inputs.check_whole(op, "spans", spans, torch.int64, "[G, 2]", (G, 2), problem.query)
    if not isinstance(masks, Tensor) or not (masks.dtype is torch.bool or masks.is_floating_point()):
        raise TypeError(f"{op}: masks must be a bool or floating-point tensor [G, height, width], got {arguments.describe(masks)}")
    if masks.dim() != 3 or len(masks) != G or masks.device != problem.query.device:
        raise ValueError(f"{op}: masks must have shape [{G}, height, width] on {problem.query.device}, got {arguments.describe(masks)}")
    if not (isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(n, int) and n >= 1 for n in size) and size[0] * size[1] == Nq):
        raise ValueError(f"{op}: size must be (h, w) with h w = {Nq} pixels, got {size!r}")
    refuse_forward_mode("masked_attention", problem.differentiable())
    if G == 0:
        return (problem.query[:0].sum() + problem.key[:0].sum()).to(accumulation_dtype(problem.query.dtype))
    if bool(((samples < 0) | (samples >= B)).any()):
        raise ValueError(f"{op}: samples must be from 0 to {B - 1}, got {samples.tolist()}")
    start, stop = spans.unbind(1)
    if bool(((start < 0) | (start >= stop) | (stop > L)).any()):
        raise ValueError(f"{op}: spans must hold a token or more of {L}, from the first to before the second, got {spans.tolist()}")

    # A map is attention whose value is 1 at its token, or 1 / length at all those of a span.
    device, real, tokens = samples.device, accumulation_dtype(problem.query.dtype), torch.arange(L, device=samples.device)
    count = stop - start + 1
    group = torch.arange(G, device=device).repeat_interleave(count)
    within = torch.arange(len(group), device=device) - (count.cumsum(0) - count)[group]
    inside = (tokens >= start[group, None]) & (tokens < stop[group, None])
    token = tokens == (start[group] + within)[:, None]
    values = torch.where((within == (count - 1)[group])[:, None], inside / (count - 1)[group, None].to(real), token.to(real))  # [maps, L]
    sample = samples[group]
    place = ((sample[:, None] == torch.arange(B, device=device)).cumsum(0) - 1).gather(1, sample[:, None])[:, 0]  # among the maps of its sample
    maps = torch.bincount(sample, minlength=B)
    value, target, weight = (torch.zeros(B, int(maps.max()), *width, dtype=real, device=device) for width in ((L,), (Nq,), ()))
    value[sample, place], weight[sample, place] = values, 1 / maps[sample].to(real)
    target[sample, place] = F.interpolate(masks.to(real)[:, None], size=tuple(size), mode="bilinear", align_corners=False).flatten(1)[group]
    error = (mass(problem, value.mT) - target.mT[:, None]).square().mean((1, 2))  # [B, maps]
    return (error * weight).sum() / (maps > 0).sum()
