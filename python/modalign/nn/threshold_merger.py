"""Token merging by how similar tokens are, so that simple pictures keep fewer: thresholds found on data. [DyMU, 2025]"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..ops import MergedTokens, TokenMatch, match_tokens

__all__ = ["ThresholdMerger", "merge_budget", "pad_packed"]


def merge_budget(layers: int, total: int, kind: str = "constant") -> list[int]:
    """How many tokens of a picture to merge in every layer, on the mean over pictures, `total` in all.

    "constant": the same in every layer, what is left over in the first ones. "linear": 2 total / layers in the first layer, falling to 0, whole numbers, the last of them takes what is left.
    "reverse_linear": the same from the last layer.

    >>> merge_budget(4, 10), merge_budget(4, 10, "linear"), merge_budget(4, 10, "reverse_linear")
    ([3, 3, 2, 2], [5, 3, 2, 0], [0, 2, 3, 5])
    """
    for name, value in (("layers", layers), ("total", total)):
        if isinstance(value, bool) or not isinstance(value, int) or value < (name == "layers"):
            raise ValueError(f"merge_budget: {name} must be a whole number of {int(name == 'layers')} or more, got {value!r}")
    if kind == "constant":
        return [total // layers + (layer < total % layers) for layer in range(layers)]
    if kind not in ("linear", "reverse_linear"):
        raise ValueError(f'merge_budget: kind must be "constant", "linear" or "reverse_linear", got {kind!r}')
    first, budget, left = 2 * total // layers, [], total
    for layer in range(layers):
        r = min(left, int(first - first * layer / layers)) if layer + 1 < layers else left
        budget.append(r)
        left -= r
    return budget if kind == "linear" else budget[::-1]


def pad_packed(x: Tensor, cu_seqlens: Tensor, longest: int | None = None) -> tuple[Tensor, Tensor]:
    """Packed tokens [T, ...] as [B, longest, ...] with zeros behind every item, and which are there, bool [B, longest]. Without `longest` a GPU is waited for.

    >>> import torch
    >>> pad_packed(torch.arange(1.0, 4.0), torch.tensor([0, 1, 3]))
    (tensor([[1., 0.],
            [2., 3.]]), tensor([[ True, False],
            [ True,  True]]))
    """
    lengths = cu_seqlens.diff()
    most = int(lengths.max()) if longest is None and len(lengths) else longest or 0
    there = torch.arange(most, device=x.device) < lengths[:, None]
    row = (cu_seqlens[:-1, None] + torch.arange(most, device=x.device)).clamp(max=max(0, len(x) - 1)).long()
    padded = x[row] if len(x) else x.new_zeros(*row.shape, *x.shape[1:])
    return padded.masked_fill(~there.view(*there.shape, *[1] * (x.dim() - 1)), 0), there


class ThresholdMerger(nn.Module):
    """Merges what is more similar than a threshold that is found on data: r tokens of a picture on the mean, more of a simple one, fewer of a busy one.

    ::

        merger.calibrating = True                     # batches of pictures: the r B best pairs of a batch merge, pictures compete
        merger.calibrating = False                    # then by the mean of the batches' thresholds

    Every batch's threshold is the best similarity that did not merge, no less than 0; the running mean is a buffer, with the number of batches, in the state dict. Before any calibration it is 1:
    nothing merges.

    >>> import torch
    >>> merger = ThresholdMerger(r=6)
    >>> merger.calibrating = True
    >>> x = torch.randn(4, 32, 8)
    >>> tokens, size, match = merger(x, x)
    >>> len(tokens), match.cu_seqlens.shape, merger.threshold < 1
    (104, torch.Size([5]), tensor(True))

    Parameters
    ----------
    r : int
        Tokens to merge, on the mean over pictures, `merge_budget` for several layers.
    protected : int
        As in `match_tokens`.
    keep_order : bool
        As in `match_tokens`; True as in the paper, whose tokens stand in their order.
    process_group
        Whose thresholds are averaged in every batch; None: this process alone.

    Forward
    -------
    x [B, N, ...] and features [B, N, D], or packed [T, ...] with `cu_seqlens` int32 [B + 1] and `longest`; `size` as in `merge_tokens`. Returns MergedTokens, packed: `match.cu_seqlens` for the next
    layer. One pass over items packed, padded or alone gives the same bits.

    Paper: Wang et al., "DyMU: Dynamic Merging and Virtual Unmerging for Efficient VLMs", 2025, section 3.1.
    """

    threshold: Tensor
    batches: Tensor

    def __init__(self, r: int, *, protected: int = 0, keep_order: bool = True, process_group: Any = None) -> None:
        super().__init__()
        if isinstance(r, bool) or not isinstance(r, int) or r < 0:
            raise ValueError(f"ThresholdMerger: r must be a whole number of 0 or more, got {r!r}")
        self.r, self.protected, self.keep_order, self.process_group = r, protected, keep_order, process_group
        self.calibrating = False
        self.register_buffer("threshold", torch.ones((), dtype=torch.float64))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, features: Tensor, size: Tensor | None = None, **packed: Any) -> MergedTokens:
        match = self.match(features, **packed)
        return MergedTokens(*match.merge_with_size(x, size), match)

    def match(self, features: Tensor, **packed: Any) -> TokenMatch:
        options = {"protected": self.protected, "keep_order": self.keep_order, **packed}
        if not self.calibrating:
            return match_tokens(features, threshold=float(self.threshold), **options)
        items = len(features) if packed.get("cu_seqlens") is None else len(packed["cu_seqlens"]) - 1
        scores = match_tokens(features, threshold=torch.inf, **options).score.flatten()
        ranked = scores[scores > -torch.inf].sort(descending=True)[0]
        if not len(ranked):  # nothing to learn from
            return match_tokens(features, threshold=torch.inf, **options)
        reached = ranked[min(self.r * items, len(ranked) - 1)].double().clamp(min=0)
        match = match_tokens(features, threshold=float(reached), **options)
        if self.process_group is not None:
            reached = reached.clone()
            dist.all_reduce(reached, group=self.process_group)
            reached /= dist.get_world_size(self.process_group)
        self.threshold.copy_((self.threshold * self.batches + reached) / (self.batches + 1))
        self.batches += 1
        return match

    def extra_repr(self) -> str:
        return f"r={self.r}, protected={self.protected}, threshold={float(self.threshold):.4f}, batches={int(self.batches)}"
