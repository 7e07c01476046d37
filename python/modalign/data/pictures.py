"""The small pictures of a data set's items: one sheet, or one array."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["PictureArray", "PictureSheet"]


@dataclass(frozen=True)
class PictureSheet:
    """All pictures on one file, row by row, `side` pixels square each, `columns` to a row."""

    path: Path
    side: int
    columns: int

    @functools.cached_property
    def _sheet(self) -> Image:
        from PIL import Image as images

        return images.open(self.path).convert("RGB")

    def __call__(self, item: int) -> Image:
        row, column = divmod(item, self.columns)
        side = self.side
        return self._sheet.crop((column * side, row * side, (column + 1) * side, (row + 1) * side))


@dataclass(frozen=True)
class PictureArray:
    """uint8 [N, side, side, 3] in a safetensors file, read one picture at a time."""

    path: Path
    side: int
    before_reading: Callable[[], Any]  # compares the file with its checksum

    @functools.cached_property
    def _pictures(self) -> Any:
        from safetensors import safe_open

        self.before_reading()
        return safe_open(self.path, "pt").get_slice("pictures")

    def __call__(self, item: int) -> Image:
        from PIL import Image as images

        return images.fromarray(self._pictures[item : item + 1][0].numpy())
