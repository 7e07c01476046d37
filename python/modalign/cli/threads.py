"""How many threads a command may use."""

from __future__ import annotations

import torch

from ..bench.environment import all_threads

__all__ = ["use_threads"]


def use_threads(count: int) -> None:
    """Have torch use so many threads: more than cores only take time from each other, and a typing mistake would ask the system for thousands."""
    if not 1 <= count <= all_threads():
        raise ValueError(f"threads must be from 1 to the {all_threads()} cores that this process may use, got {count}")
    torch.set_num_threads(count)
