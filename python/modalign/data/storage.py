"""Files of a data folder: eight-bit matrices and checksums, beside the atomic writes that everything uses."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor

from .._files import atomic_path, read_tensors, write_bytes, write_json, write_tensors

__all__ = [
    "atomic_path",
    "write_bytes",
    "write_json",
    "write_tensors",
    "read_tensors",
    "quantize",
    "dequantize",
    "sha256",
    "write_checksums",
    "verify_checksums",
]

CHECKSUMS = "SHA256SUMS"


def quantize(matrix: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Round a float matrix to int8 with one scale along `dim`: (values int8, scales float32), matrix ~ values * scales."""
    other = 1 - dim
    scale = (matrix.abs().amax(other) / 127).clamp_min(torch.finfo(torch.float32).tiny).float()
    values = (matrix / scale.unsqueeze(other)).round().clamp(-127, 127).to(torch.int8)
    return values, scale


def dequantize(values: Tensor, scale: Tensor, dim: int) -> Tensor:
    return values.float() * scale.unsqueeze(1 - dim)


def sha256(path: str | os.PathLike[str]) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def write_checksums(folder: Path) -> None:
    """List every file of a data folder with its SHA-256, in the format of `sha256sum -c`."""
    files = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name != CHECKSUMS and not p.name.startswith("."))
    write_bytes(folder / CHECKSUMS, "".join(f"{sha256(folder / name)}  {name}\n" for name in files).encode())


def verify_checksums(folder: Path) -> list[str]:
    """Compare a data folder with its list; raises ValueError naming the first file that is missing or differs. Returns the names checked."""
    names = []
    for line in (folder / CHECKSUMS).read_text().splitlines():
        expected, name = line.split("  ", 1)
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: expected a file listed in {CHECKSUMS}, got none")
        found = sha256(folder / name)
        if found != expected:
            raise ValueError(f"{folder / name}: expected SHA-256 {expected}, got {found}")
        names.append(name)
    return names
