"""Loads `_C.so`, the compiled ops, and answers what it is."""

from __future__ import annotations

import contextlib
import ctypes
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

PACKAGE = Path(__file__).parent
LIBRARY = PACKAGE / "_C.so"


def built_for() -> dict:
    """What the binary beside this file was built for; empty where it was not built."""
    path = PACKAGE / "_build.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()))


@cache
def load_library() -> ctypes.CDLL:
    """Registers `torch.ops.modalign.*` and returns the library for its plain C entry points.

    Raises ImportError naming the torch found, the torch built for and the remedy.
    """
    facts = built_for()
    minimum = facts.get("torch_minimum", "2.11")
    found = f"torch {torch.__version__}"
    if _release(torch.__version__) < _release(minimum):
        raise ImportError(f"modalign: torch must be at least {minimum}, got {torch.__version__}. Remedy: pip install 'torch>={minimum}'.")
    if not LIBRARY.exists():
        raise ImportError(f"modalign: {LIBRARY} is missing, so the ops were never compiled here ({found}). Remedy: pip install . (or, in a checkout, pip install -e . --no-build-isolation).")
    try:
        torch.ops.load_library(str(LIBRARY))
        return ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        raise ImportError(
            f"modalign: the compiled ops cannot be loaded.\n  found:     {found}\n  built for: torch >= {minimum} (compiled against {facts.get('torch_built', 'unknown')}, "
            f"{facts.get('compiler', 'unknown compiler')})\n  loader:    {error}\nRemedy: install a torch of at least {minimum}, or rebuild with pip install --force-reinstall --no-deps ."
        ) from error


def _text(function: str) -> str:
    entry = getattr(load_library(), function)
    entry.restype = ctypes.c_char_p
    return entry().decode()


def build_info() -> dict:
    """Facts compiled into the library itself."""
    return json.loads(_text("modalign_build_info"))


def compiled_instruction_sets() -> list[str]:
    return _text("modalign_compiled_instruction_sets").split()


def instruction_set() -> str:
    """The instruction set that CPU kernels run on: portable, avx2 or avx512."""
    return _text("modalign_instruction_set")


def kernel_catalogue() -> list[str]:
    """Keys of the compiled CUDA kernels; empty in a CPU-only build."""
    return _text("modalign_kernel_catalogue").split()


@contextlib.contextmanager
def use_instruction_set(name: str) -> Iterator[None]:
    """CPU kernels run on this instruction set inside the block. ValueError where it is not compiled or this machine lacks it.

    >>> with use_instruction_set("portable"):
    ...     instruction_set()
    'portable'
    """
    entry = load_library().modalign_use_instruction_set
    entry.restype, entry.argtypes = ctypes.c_bool, [ctypes.c_char_p]
    before = instruction_set()
    if not entry(name.encode()):
        raise ValueError(f"use_instruction_set: name must be one that this machine can run out of {compiled_instruction_sets()}, got {name!r}")
    try:
        yield
    finally:
        entry(before.encode())
