"""Finding the packages that hold the weights, and what an encoder gives back."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from torch import Tensor

__all__ = ["Encoded", "EncoderUnavailable", "import_package", "package_folder"]


class EncoderUnavailable(RuntimeError):
    """A frozen encoder's package is not installed. The message says which one and how to install it."""


@dataclass(frozen=True)
class Encoded:
    """What an encoder makes of B inputs. Tokens may differ in number from input to input."""

    pooled: Tensor  # [B, D]
    tokens: list[Tensor] | None = None  # B tensors [T, width of a token]
    layers: Tensor | None = None  # [B, L, D]: pooled output of each layer


def package_folder(package: str, purpose: str, remedy: str) -> Path:
    """Folder of an installed package, found without importing it (some wheels would import dependencies that are not needed)."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise EncoderUnavailable(f"{purpose} needs the package '{package}', which is not installed. Install it with: {remedy}")
    return Path(next(iter(spec.submodule_search_locations)))


def import_package(package: str, purpose: str, remedy: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        missing = error.name or package
        raise EncoderUnavailable(f"{purpose} needs the package '{missing}', which is not installed. Install it with: {remedy}") from error
