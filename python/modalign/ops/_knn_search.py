"""How a search is laid out: points at once, in chunks that come one after the other, or in shards that several processes hold.

Every layout asks the raw op for the best of a part and merges lists by (score, index). The order is total and a pair's score has one order of sums, so the
layout never shows in the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from . import _arguments as arguments
from ._distributed import Block, all_gather, gather_sizes, send_to_owners
from ._knn_certified import certified, error_bound
from ._registration import accumulation_dtype, autocast_is_on, to_autocast
from ._selection import best_of

__all__ = ["CHUNK_BYTES", "MAX_POINTS", "METRICS", "Chunks", "Query", "agree", "chunk_rows", "finished", "gather_sizes", "in_chunks", "in_shards", "mean_of", "mean_of_shards", "squares_of", "whole"]

METRICS = ("dot", "cosine", "sqeuclidean", "euclidean")  # in the order of csrc/ops/knn.h
MAX_POINTS = 2**31 - 1  # kernels count points in 32 bits
CENTER_BLOCK = 4096  # rows whose sum is one term of the mean
CHUNK_BYTES = 64 << 20
LEAST_ROWS = 512  # of a chunk, whatever the workspace


class Query(NamedTuple):
    """What is asked for, besides the points."""

    queries: Tensor
    k: int
    metric: str
    skip: Tensor | None  # [N] the point left out, by its index
    labels: Tensor | None  # [N]
    precision: str = "highest"


def finished(query: Query, score: Tensor, indices: Tensor, squares: Tensor) -> Tensor:
    """Scores as values: csrc/ops/knn.h has the table."""
    if query.metric == "dot":
        return score
    squares = squares[:, None]
    if query.metric == "cosine":
        return torch.where((squares != 0) | (indices < 0), score / squares.sqrt(), 0).where(indices >= 0, -torch.inf)
    square = (squares - 2 * score).clamp(min=0).nan_to_num(nan=torch.inf, posinf=torch.inf)  # of infinite vectors
    return (square.sqrt() if query.metric == "euclidean" else square).where(indices >= 0, torch.inf)


def whole(query: Query, points: Tensor, bias: Tensor | None, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(scores, indices, squared lengths of the queries) of points that are all at hand."""
    x, metric = query.queries, METRICS.index(query.metric)

    def raw(query: Query, high: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.modalign.knn(query.queries, points, query.k, metric, bias, query.skip, query.labels, labels, int(high))  # Precision of csrc/ops/knn.h

    if query.precision != "certified" or x.dtype is not torch.float32 or not x.is_cuda:  # elsewhere there is one precision
        return raw(query, query.precision == "high")

    def redo(rows: Tensor) -> tuple[Tensor, Tensor]:
        return raw(query._replace(queries=x[rows], skip=None if query.skip is None else query.skip[rows], labels=None if query.labels is None else query.labels[rows]))[:2]

    return certified(
        query.k,
        len(points),
        lambda k: raw(query._replace(k=k), True)[:2],
        lambda indices: torch.ops.modalign.knn_scores(x, points, indices, metric, bias),
        redo,
        error_bound(x, points, query.metric, bias),
    )


def squares_of(query: Query) -> Tensor:
    """The squared lengths alone, as sums in the order of the products."""
    return whole(query._replace(k=1, skip=None, labels=None), query.queries.new_zeros(1, query.queries.shape[1]), None, None)[2]


# ---------------------------------------------------------------------------------------------------------------------------------------- chunks


def chunk_rows(workspace: int, like: Tensor) -> int:
    """Of queries and of points in one call, whose copies are what it needs."""
    return max(LEAST_ROWS, workspace // (2 * accumulation_dtype(like.dtype).itemsize * like.shape[1]))


class Chunks:
    """Points as (first index, rows) of chunks in rising order: those of a tensor, of an array (also a memory-mapped one) or of an iterable of either.

    `beside`: what holds one entry for each point, by the name of the argument.
    """

    def __init__(self, op: str, points: object, like: Tensor, workspace: int, beside: dict[str, Tensor | None]) -> None:
        self.op, self.points, self.like, self.autocast = op, points, like, autocast_is_on(like.device.type)
        self.beside = {name: len(value) for name, value in beside.items() if value is not None}
        self.rows = chunk_rows(workspace, like)
        self.once = isinstance(points, Iterator)
        if not isinstance(points, (Tensor, np.ndarray, Iterable)) or isinstance(points, (str, bytes, dict)):
            raise TypeError(f"{op}: points must be a tensor, an array or an iterable of chunks [rows, D], got {arguments.describe(points)}")

    def known(self) -> int | None:
        """How many points there are, where that is known without a walk."""
        return len(self.points) if isinstance(self.points, (Tensor, np.ndarray)) else None

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        first = 0
        for given in [self.points] if isinstance(self.points, (Tensor, np.ndarray)) else self.points:  # type: ignore[attr-defined]
            if not isinstance(given, (Tensor, np.ndarray)):
                raise TypeError(f"{self.op}: points must be an iterable of tensors or arrays [rows, D], got one that holds {arguments.describe(given)}")
            if given.ndim != 2 or given.shape[1] != self.like.shape[1]:
                raise ValueError(f"{self.op}: points must be chunks [rows, D] with D = {self.like.shape[1]}, got {list(given.shape)}")
            for at in range(0, len(given), self.rows):
                piece = self._rows(given[at : at + self.rows])
                first, here = first + len(piece), first
                self._check_size(first, lambda size: first <= size)
                yield here, piece
        self._check_size(first, lambda size: first == size)

    def _rows(self, given: Tensor | np.ndarray) -> Tensor:
        piece = given if isinstance(given, Tensor) else torch.from_numpy(np.array(given)).to(self.like.device)
        piece = to_autocast(piece) if self.autocast else piece
        if piece.dtype != self.like.dtype or piece.device != self.like.device:
            raise TypeError(f"{self.op}: points must have queries's dtype {self.like.dtype} and device {self.like.device}, got {arguments.describe(piece)}")
        return piece

    def _check_size(self, count: int, right: Callable[[int], bool]) -> None:
        if count > MAX_POINTS:
            raise ValueError(f"{self.op}: points must be fewer than 2^31, got more")
        for name, size in self.beside.items():
            if not right(size):
                raise ValueError(f"{self.op}: {name} must have one entry for each point, got {size} for {count} points or more")


def in_chunks(query: Query, chunks: Iterable[tuple[int, Tensor]], rows: int, bias: Tensor | None, labels: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """(scores, indices, number of points): `rows` queries at a time meet one chunk after the other. Lists are as long as there are points, at most k."""
    real, count = accumulation_dtype(query.queries.dtype), 0
    none = query.queries.new_empty(1, 0, dtype=real), query.queries.new_empty(1, 0, dtype=torch.int64)
    blocks = query.queries.split(rows)  # one, if there are no queries
    best = [tuple(each.expand(len(block), 0) for each in none) for block in blocks]
    for first, chunk in chunks:
        count, there = first + len(chunk), slice(first, first + len(chunk))
        for n, block in enumerate(blocks):
            here = slice(n * rows, (n + 1) * rows)
            some = Query(
                block,
                min(query.k, len(chunk)),
                query.metric,
                None if query.skip is None else query.skip[here] - first,
                None if query.labels is None else query.labels[here],
                query.precision,
            )
            score, indices, _ = whole(some, chunk, None if bias is None else bias[there], None if labels is None else labels[there])
            best[n] = best_of(torch.cat([best[n][0], score], 1), torch.cat([best[n][1], moved(indices, first)], 1), query.k)
    score, indices = (torch.cat(parts) for parts in zip(*best, strict=True))
    return score, indices, count


def moved(indices: Tensor, by: int) -> Tensor:
    return torch.where(indices < 0, -1, indices + by)


def mean_of(rows: Iterable[Tensor], like: Tensor, always: bool, gather: Callable[[Tensor], Tensor] = lambda each: each) -> Tensor:
    """The mean of points that come in order, or 0 where it is not far from them in their own measure; 0 without points. Points with NaN or infinity do not count.

    Blocks of rows are summed in double and then one after the other, so chunks, shards and threads do not show in it.
    """
    sums, squares, count, held = [], [], 0, []

    def close() -> None:
        block = torch.cat(held).double()
        finite = block.isfinite().all(1, keepdim=True)
        block = torch.where(finite, block, 0)
        sums.append(block.sum(0))
        squares.append(torch.stack([block.square().sum(0).sum(), finite.sum().double()]))  # not one long sum, which threads would split
        held.clear()

    for piece in rows:
        while len(piece):
            room = CENTER_BLOCK - count % CENTER_BLOCK
            held.append(piece[:room])
            count, piece = count + len(held[-1]), piece[room:]
            if count % CENTER_BLOCK == 0:
                close()
    if held:
        close()
    all_sums = gather(torch.stack(sums) if sums else like.new_empty(0, like.shape[1], dtype=torch.float64))
    all_squares = gather(torch.stack(squares) if squares else like.new_empty(0, 2, dtype=torch.float64))
    square, total = torch.nn.functional.pad(all_squares, (0, 0, 1, 0)).cumsum(0)[-1]
    mean = torch.nn.functional.pad(all_sums, (0, 0, 1, 0)).cumsum(0)[-1] / total.clamp(min=1)
    spread = square / total.clamp(min=1) - mean.square().sum()
    return torch.where((mean.square().sum() > 4 * spread) | always, mean, 0).to(accumulation_dtype(like.dtype))


# ---------------------------------------------------------------------------------------------------------------------------------------- shards


def in_shards(query: Query, points: Tensor, bias: Tensor | None, labels: Tensor | None, sizes: list[int], group: Any, exchange: str, rows: int) -> tuple[Tensor, Tensor]:
    """(scores, indices) of this rank's queries among the points of all ranks, of which rank r has sizes[r] and whose indices count through the ranks.

    "gather": the queries of all ranks meet every rank's points, and the lists go back to the ranks that asked. "ring": the points travel.
    """
    rank, starts = dist.get_rank(group), [sum(sizes[:rank]) for rank in range(len(sizes))]

    def lists(asked: Query, owner: int, points: Tensor, bias: Tensor | None, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        local = asked._replace(skip=None if asked.skip is None else asked.skip - starts[owner])
        score, indices, _ = in_chunks(local, zip(range(0, len(points), rows), points.split(rows), strict=True) if len(points) else [], rows, bias, labels)
        missing = query.k - score.shape[1]
        pad = torch.nn.functional.pad
        return pad(score, (0, missing), value=-torch.inf), pad(moved(indices, starts[owner]), (0, missing), value=-1)

    found = []
    if exchange == "gather":
        asked = gather_sizes(len(query.queries), points, group)
        every = Query(*(all_gather(each, asked, group) if isinstance(each, Tensor) else each for each in query))
        for each in lists(every, rank, points, bias, labels):
            found.append(torch.cat(send_to_owners(list(each.split(asked)), len(query.queries), group), 1))
        return best_of(found[0], found[1], query.k)
    block = Block([points, *(each for each in (bias, labels) if each is not None)], sizes, group)
    best: tuple[Tensor, Tensor] | None = None
    for hop in range(len(sizes)):
        if hop + 1 < len(sizes):
            block.begin_step()
        here, *rest = block.tensors
        part = lists(query, block.owner, here, None if bias is None else rest[0], None if labels is None else rest[-1])
        best = part if best is None else best_of(torch.cat([best[0], part[0]], 1), torch.cat([best[1], part[1]], 1), query.k)
        if hop + 1 < len(sizes):
            block.end_step()
    assert best is not None
    return best


def mean_of_shards(points: Tensor, sizes: list[int], always: bool, group: Any) -> Tensor:
    """`mean_of` the points of all ranks. A block that begins on one rank and ends on others is summed by the first, which gets their first rows."""
    rank, starts = dist.get_rank(group), [sum(sizes[:rank]) for rank in range(len(sizes))]
    heads = [min(size, -start % CENTER_BLOCK) for size, start in zip(sizes, starts, strict=True)]
    first_rows = all_gather(points[: heads[rank]], heads, group).split(heads)
    rows = [points[heads[rank] :]]
    missing = -(starts[rank] + sizes[rank]) % CENTER_BLOCK if len(rows[0]) else 0
    for others in first_rows[rank + 1 :]:
        rows.append(others[:missing])
        missing -= len(rows[-1])
    blocks = gather_sizes(-(-sum(map(len, rows)) // CENTER_BLOCK), points, group)
    return mean_of(rows, points, always, lambda each: all_gather(each, blocks, group))


SAME = ("D", "dtype", "k", "metric", "exclude_self", "query_ids", "exclude_labels", "bias", "center", "csls_neighbors", "exchange", "precision")


def agree(op: str, check: Callable[[], tuple[Any, list[int]]], device: torch.device, group: Any) -> Any:
    """What `check` makes of this rank's arguments. It also says `SAME`; an error on one rank is one on every rank, so that nobody waits for ever."""
    made, error = None, None
    try:
        made, mine = check()
    except (TypeError, ValueError) as refused:
        mine, error = [0] * len(SAME), refused
    said = torch.tensor([int(error is not None), *mine], device=device)
    everyone = [torch.empty_like(said) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, said, group=group)
    if error is not None:
        raise error
    for rank, (refused, *theirs) in enumerate(each.tolist() for each in everyone):
        if refused:
            raise ValueError(f"{op}: arguments must be valid on every rank, got a refusal on rank {rank}")
        for name, first, here in zip(SAME, everyone[0][1:].tolist(), theirs, strict=True):
            if first != here:
                raise ValueError(f"{op}: {name} must be the same on every rank, got another on rank {rank} than on rank 0")
    return made
