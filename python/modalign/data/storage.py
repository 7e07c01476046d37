"""Files on disk: atomic writes, eight-bit matrices, checksums."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path`; it takes the place of `path` when the block ends well and vanishes when it does not (Ctrl-C included).

    A reader therefore sees the old file or the new one, never half of one. The suffix is kept, since writers of pictures choose their format by it.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=target.suffix, dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes private files; the result should be as readable as any other
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: str | os.PathLike[str], content: Any, *, indent: int | None = 1) -> None:
    """Write JSON that any reader accepts: a NaN or an infinity raises."""
    write_bytes(path, (json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False) + "\n").encode())


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file. Its bytes depend on the content alone."""
    from safetensors.torch import save

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    write_bytes(path, save(contiguous, dict(metadata) if metadata else None))


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a safetensors file; a file that is not one is named in the error."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file, got one that does not parse ({error})") from error


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


def atomic_save(path: str | os.PathLike[str], save: Callable[[Path], Any]) -> None:
    """Run a writer that takes a path (a figure's `savefig`, a picture's `save`) so that its file appears whole or not at all."""
    with atomic_path(path) as temporary:
        save(temporary)
