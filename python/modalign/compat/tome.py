"""The functions of ToMe's released code, with its names, on `modalign.ops.match_tokens`.

>>> import torch
>>> from modalign.compat.tome import bipartite_soft_matching, merge_wavg
>>> x = torch.randn(2, 9, 4)
>>> merge, unmerge = bipartite_soft_matching(x, 3, class_token=True)
>>> x, size = merge_wavg(merge, x)
>>> x.shape, size.sum(1).flatten().tolist(), unmerge(x).shape
(torch.Size([2, 6, 4]), [9.0, 9.0], torch.Size([2, 9, 4]))

A metric that is zero has similarity 0 with everything; the released code divides by its length, and such tokens are merged first. Equal similarities: the earlier token wins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..nn import merge_schedule, patch
from ..ops import TokenMatch, match_tokens

__all__ = ["bipartite_soft_matching", "do_nothing", "kth_bipartite_soft_matching", "merge_source", "merge_wavg", "parse_r", "patch", "random_bipartite_soft_matching"]


def do_nothing(x: Tensor, mode: str | None = None) -> Tensor:
    return x


class Merge:
    """merge(x, mode="mean"): [B, N, C] to [B, M, C]. `tokens`: the first so many are looked at, the others dropped."""

    def __init__(self, match: TokenMatch, tokens: int) -> None:
        self.match, self.tokens = match, tokens

    def __call__(self, x: Tensor, mode: str = "mean") -> Tensor:
        return self.match.merge(x[:, : self.tokens], mode=mode)


Pair = tuple[Callable[..., Tensor], Callable[..., Tensor]]


def _pair(match: TokenMatch) -> Pair:
    return Merge(match, match.group.shape[1]), match.unmerge


def bipartite_soft_matching(metric: Tensor, r: int, class_token: bool = False, distill_token: bool = False) -> Pair:
    """(merge, unmerge) for r tokens of [B, N, C], at most half of those that are not protected."""
    if distill_token and not class_token:
        raise ValueError("bipartite_soft_matching: class_token must be True with distill_token, got False")
    protected = class_token + distill_token
    if min(r, (metric.shape[1] - protected) // 2) <= 0:
        return do_nothing, do_nothing
    return _pair(match_tokens(metric, r, protected=protected))


def kth_bipartite_soft_matching(metric: Tensor, k: int) -> Pair:
    """Every k-th token stays, all between join the most similar of these; tokens behind the last multiple of k are dropped."""
    if k <= 1:
        return do_nothing, do_nothing
    tokens = metric.shape[1] // k * k
    place = torch.arange(tokens, device=metric.device)
    stays = place % k == k - 1
    order = torch.cat([place[~stays], place[stays]]).expand(metric.shape[0], -1)
    joins = tokens - tokens // k
    return _pair(match_tokens(metric[:, :tokens], joins, sources=joins, order=order))


def random_bipartite_soft_matching(metric: Tensor, r: int) -> Pair:
    """r random tokens join the most similar of the others."""
    if r <= 0:
        return do_nothing, do_nothing
    B, N, _ = metric.shape
    if r >= N:
        raise ValueError(f"random_bipartite_soft_matching: r must be less than the number of tokens {N}, got {r}")
    return _pair(match_tokens(metric, r, sources=r, order=torch.rand(B, N, device=metric.device).argsort(1)))


def merge_wavg(merge: Callable[..., Tensor], x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Means weighted by `size` [B, N, 1], and the new sizes."""
    if isinstance(merge, Merge):
        tokens, total = merge.match.merge_with_size(x[:, : merge.tokens], None if size is None else size[:, : merge.tokens])
        return tokens, total[..., None]
    size = torch.ones_like(x[..., :1]) if size is None else size
    total = merge(size, mode="sum")
    return merge(x * size, mode="sum") / total, total


def merge_source(merge: Callable[..., Tensor], x: Tensor, source: Tensor | None = None) -> Tensor:
    """Which of the first layer's tokens are in which of now, 0 or 1, [B, M, N0]: M N0 numbers an item (`TokenMatch.source` has N0)."""
    if source is None:
        source = torch.eye(x.shape[1], device=x.device).expand(x.shape[0], -1, -1)
    return merge(source, mode="amax")


def parse_r(num_layers: int, r: Any) -> list[int]:
    """`modalign.nn.merge_schedule`.

    >>> parse_r(4, 8), parse_r(4, (8, -1.0)), parse_r(4, [5, 3])
    ([8, 8, 8, 8], [16, 10, 5, 0], [5, 3, 0, 0])
    """
    return merge_schedule(num_layers, r)
