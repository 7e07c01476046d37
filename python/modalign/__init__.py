"""Kernels, differentiable ops and models for aligning modalities.

>>> import torch, modalign
>>> text, video, audio = (torch.nn.functional.normalize(torch.randn(4, 16), dim=-1) for _ in range(3))
>>> modalign.ops.gram_volume(text, [video, audio]).shape
torch.Size([4, 4])
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    __version__ = version("modalign")
except PackageNotFoundError:   # a source tree that was never installed
    __version__ = "0+unknown"

from ._load import load_library

load_library()

from . import ops  # noqa: E402


def include_dir() -> str:
    """The folder of the installed engine headers, for building your own epilogues: `#include "cpu/tile.h"`, `#include "cuda/tile.cuh"`."""
    return str(Path(__file__).parent / "include")


__all__ = ["__version__", "include_dir", "ops"]
