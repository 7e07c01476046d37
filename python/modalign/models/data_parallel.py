"""What the ranks of a process group tell each other while they train one model on one batch. Without a group (None) a process is alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["average_over_ranks", "counts_of_ranks", "made_once", "rank_of", "ranks_of", "share_of_rank", "take_from_first_rank", "true_anywhere"]

T = TypeVar("T")


def rank_of(group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group)


def ranks_of(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def made_once(make: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """What `make` gives on rank 0, on every rank. It travels pickled; tensors should be on the CPU."""
    if group is None:
        return make()
    found = [make() if rank_of(group) == 0 else None]
    dist.broadcast_object_list(found, group=group, group_src=0)
    return found[0]  # type: ignore[return-value]


def take_from_first_rank(tensors: Iterable[Tensor], group: dist.ProcessGroup | None) -> None:
    """Fill tensors with those of rank 0."""
    if group is not None:
        for tensor in tensors:
            dist.broadcast(tensor, group=group, group_src=0)


def share_of_rank(items: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """This rank's part of items that all ranks hold; the first parts have one more where they cannot be equal."""
    return items.tensor_split(ranks_of(group))[rank_of(group)]


def counts_of_ranks(counts: Sequence[int], device: torch.device, group: dist.ProcessGroup | None) -> list[list[int]]:
    """Every rank's counts, equally many on each, by rank."""
    if group is None:
        return [list(counts)]
    mine = torch.tensor(counts, device=device)
    found = [torch.empty_like(mine) for _ in range(ranks_of(group))]
    dist.all_gather(found, mine, group=group)
    return torch.stack(found).tolist()


def average_over_ranks(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
    """Replace tensors by their means over ranks, in one message; the bits are the same on every rank."""
    if group is None:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=group)
    flat /= ranks_of(group)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def true_anywhere(value: bool, device: torch.device, group: dist.ProcessGroup | None) -> bool:
    """Whether it is true on some rank."""
    return any(count for (count,) in counts_of_ranks([int(value)], device, group))
