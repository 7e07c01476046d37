"""Videos in fewer tokens: each of them looks at its own region. [LLaVA-ST, CVPR 2025]"""

from __future__ import annotations

from torch import Tensor, nn

from ..ops import masked_attention
from ._tokens import check_sizes, check_tokens

__all__ = ["PointToRegionPacker", "SlowFastPacker"]


class PointToRegionPacker(nn.Module):
    """One token for each region of t x y x x: the interpolated features of its middle ask all features of the region. [LLaVA-ST, CVPR 2025]

    ::

        p = features, resized linearly to a region each
        out = p + W_out attention(LN(MLP_q(p)), LN(MLP_k(region)), LN(MLP_v(region)))          MLP: Linear, GELU, Linear

    >>> import torch
    >>> packer = PointToRegionPacker(32, region=(1, 3, 3), heads=4, inner=16)
    >>> packer(torch.randn(2, 5, 9, 9, 32)).shape
    torch.Size([2, 5, 3, 3, 32])

    The call takes features [B, T, Y, X, width]; region divides T, Y and X. Regions are a batch of the attention, so t y x keys a token are computed, and no others. With a region of
    one it is a transform of each token. The released module has torch's MultiheadAttention, with projections of its own, behind the norms.

    Parameters: width; region (t, y, x); heads, 8 published; inner width, 1024 published. Raises ValueError for sizes and shapes."""

    def __init__(self, width: int, region: tuple[int, int, int], *, heads: int = 8, inner: int = 1024) -> None:
        super().__init__()
        if not isinstance(region, (tuple, list)) or len(region) != 3:
            raise ValueError(f"PointToRegionPacker: region must be (t, y, x), got {region!r}")
        t, y, x = region
        check_sizes("PointToRegionPacker", width=width, heads=heads, inner=inner, t=t, y=y, x=x)
        if inner % heads:
            raise ValueError(f"PointToRegionPacker: heads must divide inner = {inner}, got {heads}")
        self.width, self.region, self.heads = width, (t, y, x), heads
        self.to_q, self.to_k, self.to_v = (
            nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, inner), nn.LayerNorm(inner)) for _ in range(3)
        )
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        check_tokens("PointToRegionPacker", "features", features, ("B", "T", "Y", "X", self.width))
        B, *sizes = features.shape[:-1]
        if any(size == 0 or size % step for size, step in zip(sizes, self.region, strict=True)):
            raise ValueError(f"PointToRegionPacker: features must have T, Y, X that region {self.region} divides, got {sizes}")
        (t, y, x), packed = self.region, [size // step for size, step in zip(sizes, self.region, strict=True)]
        points = nn.functional.interpolate(features.movedim(4, 1), size=packed, mode="trilinear").movedim(1, 4)
        regions = features.reshape(B, packed[0], t, packed[1], y, packed[2], x, self.width).permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, t * y * x, self.width)
        asked, key, value = (
            each.unflatten(2, (self.heads, -1)).transpose(1, 2) for each in (self.to_q(points).reshape(-1, 1, self.to_out.in_features), self.to_k(regions), self.to_v(regions))
        )
        return points + self.to_out(masked_attention(asked, key, value).flatten(1)).view(points.shape)


class SlowFastPacker(nn.Module):
    """Two streams of one video: slow, with few times and all places, and fast, with all times and few places. [LLaVA-ST, CVPR 2025]

    >>> import torch
    >>> slow, fast = SlowFastPacker(32, heads=4, inner=16)(torch.randn(2, 10, 9, 9, 32))
    >>> slow.shape, fast.shape
    (torch.Size([2, 2, 9, 9, 32]), torch.Size([2, 10, 3, 3, 32]))

    Parameters: width; times and side of the regions, 5 and 3 published; options of `PointToRegionPacker`. The call takes features [B, T, Y, X, width]."""

    def __init__(self, width: int, *, times: int = 5, side: int = 3, heads: int = 8, inner: int = 1024) -> None:
        super().__init__()
        self.slow = PointToRegionPacker(width, (times, 1, 1), heads=heads, inner=inner)
        self.fast = PointToRegionPacker(width, (1, side, side), heads=heads, inner=inner)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.slow(features), self.fast(features)
