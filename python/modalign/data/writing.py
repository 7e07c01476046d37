"""Write the data folders that come with the package: features.safetensors, items.json, pictures.webp, notices, SHA256SUMS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .._files import atomic_path, write_bytes, write_json, write_tensors
from .basis import FeatureBasis
from .dataset import PairedDataset, caption_groups
from .encoders import on_white_square
from .storage import write_checksums

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["RawItems", "write_data_folder"]

FORMAT_VERSION = 1  # reduced features in one file; what `modalign prepare` writes is format 2
BASIS_SEED = 0


@dataclass
class RawItems:
    """What a script has read: one entry per item in every list, and the raw encoder features of each modality."""

    names: list[str]
    keywords: list[list[str]]
    pictures: list[Image]
    features: dict[str, Tensor]  # modality -> [N, W]
    encoders: dict[str, str]
    extra: list[dict[str, Any]]  # further fields of each item in items.json


def write_data_folder(
    folder: Path,
    items: RawItems,
    *,
    name: str,
    licence: str,
    source: str,
    test_size: int,
    validation_size: int,
    width: int,
    picture_side: int,
    picture_quality: int,
    notices: Mapping[str, str],
) -> dict[str, int]:
    """Reduce the features with bases fitted on the training items of split seed 0 and write the folder. Returns the size of each file."""
    folder.mkdir(parents=True, exist_ok=True)
    shell = PairedDataset(name, dict(items.features), items.names, caption_groups(items.names), test_size, validation_size)
    train = shell.splits(BASIS_SEED).train
    tensors: dict[str, Tensor] = {}
    for modality, raw in items.features.items():
        basis = FeatureBasis.fit(raw[train], min(width, len(train) - 1, raw.shape[1]))
        tensors[modality] = basis.encode(raw)
        tensors |= basis.tensors(modality)
    write_tensors(folder / "features.safetensors", tensors)

    columns = max(1, round(len(items.names) ** 0.5))
    write_sheet(folder / "pictures.webp", items.pictures, picture_side, columns, picture_quality)
    for file, text in notices.items():
        write_bytes(folder / file, text.encode())
    about = {
        "format": FORMAT_VERSION,
        "name": name,
        "licence": licence,
        "source": source,
        "test_size": test_size,
        "validation_size": validation_size,
        "basis_seed": BASIS_SEED,
        "modalities": {
            m: {"encoder": items.encoders[m], "width": int(tensors[m].shape[1]), "raw_width": int(raw.shape[1])} for m, raw in items.features.items()
        },
        "pictures": {"file": "pictures.webp", "side": picture_side, "columns": columns},
        "items": [
            {"name": item_name, "keywords": keywords} | extra
            for item_name, keywords, extra in zip(items.names, items.keywords, items.extra, strict=True)
        ],
    }
    write_json(folder / "items.json", about, indent=None)
    write_checksums(folder)
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}


def write_sheet(path: Path, pictures: Sequence[Image], side: int, columns: int, quality: int) -> None:
    """All pictures on one sheet, row by row, each on a white square."""
    from PIL import Image as images

    sheet = images.new("RGB", (columns * side, -(-len(pictures) // columns) * side), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(on_white_square(picture, side), (i % columns * side, i // columns * side))
    with atomic_path(path) as temporary:
        sheet.save(temporary, "WEBP", quality=quality, method=6)
