"""KiCad footprints: the pads of electronic parts with a description. Descriptions come in templated families, so splits keep families together."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..pads import draw_footprint, read_footprint
from ._items import DebianPackage, Item, Modality, Reading, Source, picture_modalities, read_text, require_file, text_modalities

__all__ = ["SOURCE"]

FOLDER = "usr/share/kicad/footprints"
QUOTED = r'"((?:\\.|[^"\\])*)"'
TEXTS = {key: re.compile(rf"\({key}\s+(?:{QUOTED}|([^\s()]+))\s*\)") for key in ("descr", "tags")}


def read_texts(path: Path) -> dict[str, str]:
    """Description and tags. Only these are looked for here: parsing all pads comes when they are encoded."""
    text = read_text(path)
    if not re.match(r"\s*\((footprint|module)\s", text):
        raise ValueError(f"{path}: expected a KiCad footprint, got a file that begins with {text[:20]!r}")
    found = {}
    for key, pattern in TEXTS.items():
        match = pattern.search(text)
        found[key] = re.sub(r"\\(.)", r"\1", match[1] if match[1] is not None else match[2]).strip() if match else ""
    return found


def stem(description: str, library: str) -> str:
    """What the descriptions of a family share: the library and the words, less links, numbers and everything with a digit in it."""
    text = re.sub(r"https?://\S+", " ", description.lower())
    return f"{library}: " + " ".join(re.findall(r"(?<![\w.])[a-z]{2,}(?![\w.])", text)[:8])


def text_of(description: str, tags: str) -> str:
    words = re.sub(r"\s+", " ", re.sub(r"\(?https?://\S+", " ", description)).strip(" ,;")
    return f"{words}: {tags}" if tags else words or description


def read(root: Path, languages: Sequence[str] = ()) -> Reading:
    if languages:
        raise ValueError(f"footprints: languages must be none, since all descriptions are English, got {list(languages)}")
    folder = require_file(root, FOLDER, "kicad-footprints")
    items: list[Item] = []
    left_out: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*.pretty/*.kicad_mod")):
        library = path.parent.name.removesuffix(".pretty")
        label = f"{library}/{path.stem}"
        try:
            texts = read_texts(path)
        except ValueError as error:
            left_out.setdefault(str(error).partition(": ")[2], []).append(label)
            continue
        if not texts["descr"]:
            left_out.setdefault("no description", []).append(label)
            continue
        parsed = functools.cache(functools.partial(read_footprint, path))
        inputs: dict[str, Any] = {
            "picture": lambda parsed=parsed: draw_footprint(parsed()),
            "text": functools.partial(text_of, texts["descr"], texts["tags"]),
            "geometry": parsed,
        }
        about = {"library": library, "file": path.stem, "licence": "CC-BY-SA-4.0 with the KiCad exception"}
        items.append(Item(texts["descr"], texts["tags"].split(), inputs, group=stem(texts["descr"], library), about=about))
    return Reading(items, left_out)


def modalities(languages: Sequence[str]) -> dict[str, Modality]:
    geometry = {"geometry": Modality("pad descriptor", "geometry", tokens="pad descriptor")}
    return geometry | picture_modalities() | text_modalities(languages)


SOURCE = Source(
    name="footprints",
    packages=(DebianPackage("kicad-footprints", (FOLDER,), (23.2, 142)),),
    licence="CC-BY-SA-4.0 with an exception for designs",
    test_size=500,
    validation_size=500,
    default=("geometry", "text"),
    required=("geometry", "text"),
    languages=(),
    modalities=modalities,
    read=read,
)
