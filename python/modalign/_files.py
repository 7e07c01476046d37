"""Files that appear whole or not at all, and safetensors files, the only format that numbers are kept in."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["atomic_path", "demand_writable", "read_tensors", "write_bytes", "write_json", "write_tensors"]


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


def demand_writable(path: Path | None, flag: str, suffix: str = "") -> None:
    """ValueError, before any work is done, where a file of this suffix, or without one a folder, cannot come into being there."""
    if path is None:
        return
    if suffix and path.suffix.lower() != suffix:
        raise ValueError(f"{flag} must end in {suffix}, got {path}")
    if path.exists() and path.is_dir() == bool(suffix):
        raise ValueError(f"{flag} must be a {'file' if suffix else 'folder'}, got {path}")
    whole = path.absolute()
    there = next(parent for parent in (whole.parents if suffix else (whole, *whole.parents)) if parent.exists())
    try:
        with tempfile.TemporaryDirectory(dir=there) as room:
            (Path(room) / path.name).touch()
    except OSError as error:
        raise ValueError(f"{flag} must be a place to write to, got {path}: {error.strerror} ({there.name or there})") from error


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
