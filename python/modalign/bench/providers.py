"""Providers that many cases have: torch.compile on a formula, and an op of ours on the widest and on the commonest instruction set."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import _load
from .registry import Case, provider

__all__ = ["compiled", "ours"]


@functools.cache
def no_inductor() -> str | None:
    """None, or why torch.compile has nothing to generate code with."""
    if torch.cuda.is_available() or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"):
        return None
    return "torch.compile needs a C++ compiler on PATH"


def compiled(*of: Case | str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """The decorated function under torch.compile, as provider "torch.compile". One whole graph, since past its recompile limit torch would otherwise
    run the eager form without a word."""

    def declare(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        provider(*of, name="torch.compile", unavailable=no_inductor, compiled=True)(torch.compile(function, dynamic=False, fullgraph=True))
        return function

    return declare


def not_wider() -> str | None:
    return None if _load.instruction_set() == "avx512" else "the machine's own choice is not wider than avx2"


@contextlib.contextmanager
def avx2() -> Iterator[None]:
    with _load.use_instruction_set("avx2"):
        yield


def ours(*of: Case | str, runs: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """The decorated function as provider "ours", and again on AVX2, which most machines have, where this one runs something wider. runs: the op whose
    kernels it is timed for."""

    def declare(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        provider(*of, name="ours", kind="ours", runs=runs)(function)
        provider(*of, name="ours (avx2)", kind="ours", runs=runs, unavailable=not_wider, context=avx2)(function)
        return function

    return declare
