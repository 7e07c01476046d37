"""Same input, same bits: over runs and over thread counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def _bits(result: Any) -> list[bytes]:
    return [
        leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for leaf in pytree.tree_leaves(result)
        if isinstance(leaf, Tensor)
    ]


def assert_bitwise_deterministic(function: Callable[[], Any], *, runs: int = 2, threads: Sequence[int] = (1, 2, 3)) -> None:
    """`function()` returns tensors; it is run `runs` times under every thread count and must give the same bits each time."""
    before = torch.get_num_threads()
    expected: list[bytes] | None = None
    try:
        for count in threads:
            torch.set_num_threads(count)
            for run in range(runs):
                bits = _bits(function())
                if expected is None:
                    expected = bits
                differing = [index for index, (ours, theirs) in enumerate(zip(bits, expected, strict=False)) if ours != theirs]
                if len(bits) != len(expected) or differing:
                    raise AssertionError(f"results {differing} differ in run {run + 1} with {count} threads from the first run with {threads[0]}")
    finally:
        torch.set_num_threads(before)
