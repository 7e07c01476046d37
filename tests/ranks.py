"""Several gloo processes on this machine, for tests: each runs one function and what it returns comes back."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from typing import Any

import torch


def run_ranks(world: int, target: str, folder: str) -> list[Any]:
    """`target` is "module:function"; the function takes (rank, world) and returns something that torch.save takes."""
    code = f"import sys; sys.path[:0] = {sys.path!r}; import ranks; ranks.one_rank({target!r}, {folder!r})"
    started = [
        subprocess.Popen([sys.executable, "-c", code], env=dict(os.environ, RANK=str(rank), WORLD_SIZE=str(world), OMP_NUM_THREADS="1"), stderr=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    try:
        for process in started:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors
    finally:
        for process in started:
            process.kill()
    return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world)]


def one_rank(target: str, folder: str) -> None:
    import torch.distributed as dist

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    module, _, function = target.partition(":")
    torch.save(getattr(importlib.import_module(module), function)(rank, world), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
