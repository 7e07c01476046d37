"""Make the `furniture_mini` data folder: `python -m modalign.data.prepare_furniture_mini --data-root DIR --out DIR`.

`--data-root` is where the Debian package sweethome3d-furniture was unpacked (`apt-get download sweethome3d-furniture && dpkg -x
sweethome3d-furniture_*.deb DIR`).
Only the library that is CC0 as a whole is used: BlendSwap-CC-0. Three modalities: the rendered icon, the name with its tags, 1,024 points on the
surface.
"""

from __future__ import annotations

import argparse
import re
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from .encoders import EfficientNetLiteImageEncoder, EncoderUnavailable, MiniLMTextEncoder
from .points import describe_points, read_obj, sample_surface, unit_ball
from .prepare_emoji_mini import item_text
from .writing import RawItems, require_file, write_data_folder

LIBRARY = "usr/share/sweethome3d/furniture/BlendSwap-CC-0.sh3f"
CATALOGUE = "PluginFurnitureCatalog.properties"
POINTS = 1024
COLLECTION_TAG = "Blend Swap"  # on every item, so it says nothing

NOTICE = """furniture_mini: picture, text and point features of furniture.

Made from the library "Blend Swap CC-0" of SweetHome3D (Debian package sweethome3d-furniture 1.8): 3-D models by various authors, published on Blend
Swap, collected and
converted by Emmanuel Puybaret / eTeks. The library is dedicated to the public domain under CC0 1.0 (LICENSE-CC0-1.0.txt). Authors are named per item
in items.json;
CC0 asks for no attribution.

Features were computed with EfficientNet-Lite0 (Apache License 2.0) and all-MiniLM-L6-v2 (Apache License 2.0), whose weights are not part of this
folder, and with a
descriptor of our own for points.
"""


def read_catalogue(text: str) -> list[dict[str, str]]:
    """Items of a furniture catalogue: lines `key#number=value`."""
    items: dict[int, dict[str, str]] = {}
    for key, number, value in re.findall(r"^(\w+)#(\d+)=(.*)$", text, flags=re.MULTILINE):
        items.setdefault(int(number), {})[key] = value.strip()
    return [items[number] for number in sorted(items)]


def read_items(root: Path) -> RawItems:
    from PIL import Image

    items = RawItems([], [], [], {}, {}, [])
    descriptors = []
    with zipfile.ZipFile(require_file(root, LIBRARY, "sweethome3d-furniture")) as library:
        # latin-1 with \\uXXXX escapes, as Java writes such files
        catalogue = library.read(CATALOGUE).decode("latin-1").encode("latin-1").decode("unicode_escape")
        for number, entry in enumerate(read_catalogue(catalogue)):
            mesh = read_obj(library.read(entry["model"].lstrip("/")).decode("latin-1"))
            points = unit_ball(sample_surface(*mesh, POINTS, seed=number))
            size = np.array([float(entry[side]) for side in ("width", "depth", "height")])
            descriptors.append(describe_points(points, size, seed=number))
            items.names.append(entry["name"])
            tags = [tag.strip() for tag in entry.get("tags", "").split(",")]
            items.keywords.append([tag for tag in tags if tag and tag != COLLECTION_TAG])
            items.pictures.append(Image.open(BytesIO(library.read(entry["icon"].lstrip("/")))).convert("RGBA"))
            items.extra.append({"creator": entry.get("creator", "")})
    items.features["points"] = torch.from_numpy(np.stack(descriptors))
    return items


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m modalign.data.prepare_furniture_mini", description="Make the furniture_mini data folder.")
    parser.add_argument("--data-root", type=Path, required=True, help="folder in which the Debian package was unpacked")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    options = parser.parse_args(arguments)
    try:
        items = read_items(options.data_root)
        print(f"{len(items.names)} items", flush=True)
        pictures = EfficientNetLiteImageEncoder()(items.pictures)
        texts = MiniLMTextEncoder()([item_text(*pair) for pair in zip(items.names, items.keywords, strict=True)])
    except (FileNotFoundError, EncoderUnavailable) as error:
        print(f"prepare_furniture_mini: {error}", file=sys.stderr)
        return 1
    items.features = {"picture": pictures, "text": texts, "points": items.features["points"]}
    items.encoders = {"picture": EfficientNetLiteImageEncoder.name, "text": MiniLMTextEncoder.name, "points": "modalign.data.points.describe_points"}
    sizes = write_data_folder(
        options.out,
        items,
        name="furniture_mini",
        licence="CC0-1.0",
        source="sweethome3d-furniture 1.8, BlendSwap-CC-0.sh3f",
        test_size=50,
        validation_size=30,
        width=256,
        picture_side=48,
        picture_quality=70,
        notices={"NOTICE.txt": NOTICE, "LICENSE-CC0-1.0.txt": (Path(__file__).parent / "licences" / "CC0-1.0.txt").read_text(encoding="utf-8")},
    )
    for file, size in sizes.items():
        print(f"{size:>10,}  {file}")
    print(f"{sum(sizes.values()):>10,}  in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
