"""Files of a data folder: eight-bit matrices and checksums."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from .._files import write_bytes

__all__ = ["dequantize", "quantize", "read_checksums", "sha256", "verify_checksums", "write_checksums"]

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
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_checksums(folder: Path) -> None:
    """List every file of a data folder with its SHA-256, in the format of `sha256sum -c`."""
    files = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name != CHECKSUMS and not p.name.startswith("."))
    write_bytes(folder / CHECKSUMS, "".join(f"{sha256(folder / name)}  {name}\n" for name in files).encode())


def read_checksums(folder: Path) -> dict[str, str]:
    """The list of a data folder: file name to SHA-256."""
    listed = {}
    for number, line in enumerate((folder / CHECKSUMS).read_text(encoding="utf-8").splitlines(), 1):
        digest, gap, name = line.partition("  ")
        if not gap or len(digest) != 64:
            raise ValueError(f"{folder / CHECKSUMS}: expected lines 'SHA-256  name', got {line!r} in line {number}")
        listed[name] = digest
    return listed


def verify_checksums(folder: Path, names: Iterable[str] | None = None) -> list[str]:
    """Compare a data folder (or some of its files) with its list; raises ValueError naming the first file that is missing or differs.

    Returns the names checked.
    """
    listed = read_checksums(folder)
    chosen = list(listed) if names is None else list(names)
    for name in chosen:
        if name not in listed:
            raise ValueError(f"{folder / CHECKSUMS}: expected a line for {name}, got none; append what sha256sum says of a file of yours, or remove the list")
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: expected a file listed in {CHECKSUMS}, got none")
        found = sha256(folder / name)
        if found != listed[name]:
            raise ValueError(f"{folder / name}: expected SHA-256 {listed[name]}, got {found}")
    return chosen
