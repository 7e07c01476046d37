"""Make the `furniture_mini` data folder: `python -m modalign.data.prepare_furniture_mini --data-root DIR --out DIR`.

`--data-root` is where the Debian package sweethome3d-furniture was unpacked (`apt-get download sweethome3d-furniture && dpkg -x
sweethome3d-furniture_*.deb DIR`).
Only the library that is CC0 as a whole is used: BlendSwap-CC-0. Three modalities: the rendered icon, the name with its tags, 1,024 points on the
surface.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from .encoders import EfficientNetLiteImageEncoder, EncoderUnavailable, MiniLMTextEncoder
from .points import describe_points
from .sources._items import item_text
from .sources.furniture import SOURCE
from .writing import RawItems, write_data_folder

LIBRARY = "BlendSwap-CC-0"

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


def read_items(root: Path) -> RawItems:
    """Everything but the features of pictures and texts."""
    items = RawItems([], [], [], {}, {}, [])
    descriptors = []
    for number, item in enumerate(item for item in SOURCE.read(root, ()).items if item.about["library"] == LIBRARY):
        cloud = item.inputs["points"]()
        descriptors.append(describe_points(cloud.points, cloud.size, seed=number))
        items.names.append(item.name)
        items.keywords.append(item.keywords)
        items.pictures.append(item.inputs["picture"]())
        items.extra.append({"creator": item.about["author"]})
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
    except (OSError, ValueError, EncoderUnavailable) as error:
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
