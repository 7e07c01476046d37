"""A video encoder with temporal tokens of several scales. [VidLA, 2024]"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import masks
from ._tokens import check_sizes, check_tokens
from .encoder_layer import EncoderLayer
from .masked_attention import MaskedAttention

__all__ = ["HierarchicalTemporalEncoder", "HierarchicalTemporalFeatures", "HierarchicalTemporalLayer"]


class HierarchicalTemporalFeatures(NamedTuple):
    """video : [B, width], the [CLS] token; temporal : [B, levels, per_level, width]; patches : [B, T, S, width]"""

    video: Tensor
    temporal: Tensor
    patches: Tensor

    def to(self, device: Any) -> HierarchicalTemporalFeatures:
        return HierarchicalTemporalFeatures(*(each.to(device) for each in self))


class HierarchicalTemporalLayer(EncoderLayer):
    """Patches first see their own site at all times, then all tokens see each other under `masks.temporal_hierarchy`; then the feed-forward. [VidLA, 2024; reconstructed]

    ::

        patches += temporal_attention(LN(patches)) along time;          x += attention(LN(x), mask);          x += feed_forward(LN(x))

    >>> import torch
    >>> layer = HierarchicalTemporalLayer(16, heads=4)
    >>> layer(torch.randn(2, 1 + 3 * 4, 16), None, frames=3).shape
    torch.Size([2, 13, 16])

    The call takes x [B, others + T S, width], the patches behind the other tokens (1 unless told otherwise) and frame by frame; a mask; and T as frames. The output projection along time
    is 0 at first: on one frame this is `EncoderLayer`, with its weights. Parameters: those of `EncoderLayer`. Raises ValueError where frames do not divide the patches."""

    def __init__(self, width: int, heads: int, *, hidden: int | None = None) -> None:
        super().__init__(width, heads, hidden=hidden)
        self.temporal_norm, self.temporal_attention = nn.LayerNorm(width), MaskedAttention(width, heads, bias=True)
        nn.init.zeros_(self.temporal_attention.o_proj.weight)
        nn.init.zeros_(self.temporal_attention.o_proj.bias)

    def forward(self, x: Tensor, mask: Any = None, *, frames: int, others: int = 1) -> Tensor:
        if frames < 1 or x.shape[1] < others or (x.shape[1] - others) % frames:
            raise ValueError(f"HierarchicalTemporalLayer: x must be [B, {others} + {frames} S, width], got {list(x.shape)}")
        B, sites = x.shape[0], (x.shape[1] - others) // frames
        patches = x[:, others:].unflatten(1, (frames, sites)).transpose(1, 2).flatten(0, 1)  # [B S, T, width]
        patches = patches + self.temporal_attention(self.temporal_norm(patches))
        x = torch.cat([x[:, :others], patches.unflatten(0, (B, sites)).transpose(1, 2).flatten(1, 2)], 1)
        return super().forward(x, mask)


class HierarchicalTemporalEncoder(nn.Module):
    """`HierarchicalTemporalLayer` over a [CLS] token, temporal tokens of several levels, and the patches of a video. [VidLA, 2024; reconstructed]

    A temporal token of level u = 1, 2, ... sees every stride^u-th frame: token v of the level those with t = v modulo stride^u. It also sees the temporal tokens of its own and of lower
    levels.

    >>> import torch
    >>> encoder = HierarchicalTemporalEncoder(16, heads=4, layers=2)
    >>> features = encoder(torch.randn(2, 8, 9, 16))
    >>> features.video.shape, features.temporal.shape, features.patches.shape
    (torch.Size([2, 16]), torch.Size([2, 3, 4, 16]), torch.Size([2, 8, 9, 16]))

    The call takes patches [B, T, S, width], with their positions, and a mask that `mask(T, S)` made, such as when the call is compiled.

    Parameters: width, heads, layers; levels, per_level and stride, 3, 4 and 2 as remembered of the paper; hidden units. With levels=0 and one frame it is an image encoder.
    Raises ValueError for sizes and shapes."""

    def __init__(self, width: int, *, heads: int, layers: int, levels: int = 3, per_level: int = 4, stride: int = 2, hidden: int | None = None) -> None:
        super().__init__()
        check_sizes("HierarchicalTemporalEncoder", width=width, layers=layers, per_level=per_level, stride=stride)
        if isinstance(levels, bool) or not isinstance(levels, int) or not 0 <= levels <= 14:
            raise ValueError(f"HierarchicalTemporalEncoder: levels must be a whole number from 0 to 14, got {levels!r}")
        if stride**levels >= 2**31:
            raise ValueError(f"HierarchicalTemporalEncoder: stride ** levels must be below 2 ** 31, got {stride} ** {levels}")
        self.width, self.levels, self.per_level, self.stride = width, levels, per_level, stride
        self.cls, self.mst = nn.Parameter(0.02 * torch.randn(width)), nn.Parameter(0.02 * torch.randn(levels * per_level, width))
        self.layers = nn.ModuleList(HierarchicalTemporalLayer(width, heads, hidden=hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def tokens(self, frames: int, sites: int) -> masks.Tokens:
        """[CLS], temporal tokens level by level, patches frame by frame."""
        phase = [v % self.stride**u for u in range(1, self.levels + 1) for v in range(self.per_level)]
        types = [1] + [1 + u for u in range(1, self.levels + 1) for _ in range(self.per_level)] + [0] * (frames * sites)
        t = [0, *phase, *(t for t in range(frames) for _ in range(sites))]
        return masks.tokens(types, segment=0, t=torch.tensor(t), names=("patch", "cls", *(f"level {u}" for u in range(1, self.levels + 1))))

    def mask(self, frames: int, sites: int) -> masks.Mask:
        return masks.temporal_hierarchy(self.tokens(frames, sites), self.levels, stride=self.stride).to(self.cls.device)

    def forward(self, patches: Tensor, mask: masks.Mask | None = None) -> HierarchicalTemporalFeatures:
        check_tokens("HierarchicalTemporalEncoder", "patches", patches, ("B", "T", "S", self.width))
        B, T, S, _ = patches.shape
        if T == 0 or S == 0:
            raise ValueError(f"HierarchicalTemporalEncoder: patches must have frames and sites, got {T} and {S}")
        mask = self.mask(T, S) if mask is None else mask
        others = torch.cat([self.cls[None], self.mst]).expand(B, -1, -1)
        x = torch.cat([others, patches.flatten(1, 2)], 1)
        for layer in self.layers:
            x = layer(x, mask, frames=T, others=1 + self.levels * self.per_level)
        video, temporal, patches = self.norm(x).split([1, self.levels * self.per_level, T * S], 1)
        return HierarchicalTemporalFeatures(video[:, 0], temporal.unflatten(1, (self.levels, self.per_level)), patches.unflatten(1, (T, S)))
