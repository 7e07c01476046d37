"""A picture of high resolution in crops and in coarse copies, which enhance each other. [INF-LLaVA, 2024]"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import masked_attention
from ._tokens import check_sizes, check_tokens
from .masked_attention import MaskedAttention

__all__ = ["DualEnhancement", "dual_perspective_crops"]


def dual_perspective_crops(pictures: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Pictures [B, C, n P, n P] as local crops, n x n neighbouring parts, and as global ones, every n-th pixel from n x n places on: [B, n^2, C, P, P] each.

    >>> import torch
    >>> local, whole = dual_perspective_crops(torch.arange(16.0).view(1, 1, 4, 4), 2)
    >>> local[0, 1, 0].tolist(), whole[0, 1, 0].tolist()
    ([[2.0, 3.0], [6.0, 7.0]], [[1.0, 3.0], [9.0, 11.0]])
    """
    check_sizes("dual_perspective_crops", n=n)
    check_tokens("dual_perspective_crops", "pictures", pictures, ("B", "C", "Y", "X"))
    if pictures.shape[2] % n or pictures.shape[3] % n:
        raise ValueError(f"dual_perspective_crops: pictures must have sides that n = {n} divides, got {list(pictures.shape[2:])}")
    maps = pictures.movedim(1, 3)
    return tuple(parts.movedim(4, 2) for parts in (_blocks(maps, n), _strides(maps, n)))  # type: ignore[return-value]


class DualEnhancement(nn.Module):
    """Features of local and of global crops are put together to two maps of the picture; each is enhanced by the other in windows, and both become one. [INF-LLaVA, 2024]

    ::

        L = the local crops side by side,  G = the global crops interleaved                                        [B, n g, n g, width]
        G' = enhanced(G, L) in blocks of g x g,  L' = enhanced(L, G) among every n-th place                        enhanced(x, y) = LN(W_o attention(x, y) + W_q x)
        fused = LN([MLP_local(L'); MLP_global(G')] + L' + G')                                                      MLP: width -> width / 16 -> width / 2
        out = fused, resized to g x g; the mean with `base`, the features of the picture as a whole

    >>> import torch
    >>> enhance = DualEnhancement(32, heads=4)
    >>> enhance(torch.randn(2, 9, 6, 6, 32), torch.randn(2, 9, 6, 6, 32), torch.randn(2, 6, 6, 32)).shape
    torch.Size([2, 6, 6, 32])

    The call takes local and whole [B, n^2, g, g, width], features of the crops of `dual_perspective_crops`, and base [B, g, g, width]. A window has g^2 queries and keys, so the work
    is 1 / n^2 of attention between whole maps.

    Parameters: width, even; heads, 8 published, of one attention for both directions. n = 3 and g = 24 published. Raises ValueError for shapes."""

    def __init__(self, width: int, *, heads: int = 8) -> None:
        super().__init__()
        check_sizes("DualEnhancement", width=width)
        if width % 2:
            raise ValueError(f"DualEnhancement: width must be even, got {width}")
        self.attention, self.norm = MaskedAttention(width, heads, bias=True), nn.LayerNorm(width)
        narrow = max(1, width // 16)
        self.local_mlp, self.whole_mlp = (nn.Sequential(nn.Linear(width, narrow), nn.GELU(), nn.Linear(narrow, width // 2)) for _ in range(2))
        self.fused_norm = nn.LayerNorm(width)

    def forward(self, local: Tensor, whole: Tensor, base: Tensor | None = None) -> Tensor:
        op, width = "DualEnhancement", self.attention.width
        check_tokens(op, "local", local, ("B", "n^2", "g", "g", width))
        n, g = round(local.shape[1] ** 0.5), local.shape[2]
        if n * n != local.shape[1] or local.shape[3] != g or n * g == 0:
            raise ValueError(f"{op}: local must be [B, n^2, g, g, {width}], got {list(local.shape)}")
        check_tokens(op, "whole", whole, ("B", n * n, g, g, width), local)
        if base is not None:
            check_tokens(op, "base", base, ("B", g, g, width), local)
        L, G = _from_blocks(local, n), _from_strides(whole, n)
        G, L = (
            _from_blocks(self._enhanced(_blocks(G, n), _blocks(L, n)), n),
            _from_strides(self._enhanced(_strides(L, n), _strides(G, n)), n),
        )
        fused = self.fused_norm(torch.cat([self.local_mlp(L), self.whole_mlp(G)], -1) + G + L)
        out = nn.functional.interpolate(fused.movedim(3, 1), size=(g, g), mode="bilinear").movedim(1, 3)
        return out if base is None else (out + base) / 2

    def _enhanced(self, x: Tensor, y: Tensor) -> Tensor:
        """[B, n^2, g, g, width], a window each."""
        attention, sizes = self.attention, x.shape
        x, y = x.flatten(2, 3).flatten(0, 1), y.flatten(2, 3).flatten(0, 1)
        query = attention.queries(x)
        out = attention.join(masked_attention(query, *attention.keys(y))) + query.transpose(1, 2).flatten(2)
        return self.norm(out).view(sizes)


def _blocks(maps: Tensor, n: int) -> Tensor:
    """[B, n Y, n X, D] to n x n neighbouring parts [B, n^2, Y, X, D]."""
    return maps.unflatten(2, (n, -1)).unflatten(1, (n, -1)).transpose(2, 3).flatten(1, 2)


def _from_blocks(parts: Tensor, n: int) -> Tensor:
    return parts.unflatten(1, (n, n)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _strides(maps: Tensor, n: int) -> Tensor:
    """[B, n Y, n X, D] to every n-th place, from n x n places on: [B, n^2, Y, X, D]."""
    return maps.unflatten(2, (-1, n)).unflatten(1, (-1, n)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def _from_strides(parts: Tensor, n: int) -> Tensor:
    return parts.unflatten(1, (n, n)).permute(0, 3, 1, 4, 2, 5).flatten(3, 4).flatten(1, 2)
