"""Open Clip Art: drawings in the public domain with titles and keywords written by their authors."""

from __future__ import annotations

import functools
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ._items import DebianPackage, Item, Modality, Reading, Source, item_text, picture_modalities, render_svg, require_file, text_modalities

__all__ = ["SOURCE"]

FOLDER = "usr/share/openclipart/svg"
# Shapes without a meaning, drawings that are mostly writing, and marks.
DROPPED = ("shapes/stars", "shapes/jigsaw", "special", "logos", "buttons")
COLLECTIONS = re.compile(
    r"gramastar|\bcollection\b|\btheme\b|\bclipart by\b|\biconset\b|\bopen clip ?art\b|^(untitled|unknown|title|image|drawing)\W*\d*$",
    re.IGNORECASE,
)
COMMON = 8  # a title of more files than this names a collection, too
KEYWORDS = 6
DC = "{http://purl.org/dc/elements/1.1/}"
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"


def read_metadata(path: Path) -> dict[str, Any]:
    """Title, keywords, author and licence from the RDF inside the drawing."""
    try:
        document = ElementTree.parse(path)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise ValueError(f"{path}: expected an SVG drawing, got one that is no XML ({error})") from error
    work = next((element for element in document.iter() if element.tag.endswith("}Work")), None)
    if work is None:
        return {"title": "", "keywords": [], "author": "", "licence": ""}

    def text(tag: str) -> str:
        element = work.find(DC + tag)
        return " ".join("".join(element.itertext()).split()) if element is not None else ""

    words = [" ".join((entry.text or "").split()) for entry in work.iter(f"{RDF}li")]
    licences = [element.get(f"{RDF}resource", "") for element in work if element.tag.endswith("}license")]
    return {"title": text("title"), "keywords": [word for word in words if word], "author": text("creator"), "licence": " ".join(licences)}


def head(title: str, stem: str, author: str) -> str:
    """What a drawing shows: its title, or, where that only names a collection or nothing, the file name less the author's name and numbers."""
    title = re.sub(r"\s+", " ", title.replace("_", " ")).strip(" .")
    if title and not COLLECTIONS.search(title) and re.search(r"[^\W\d]{2}", title):
        return title
    names = {token for token in re.split(r"\W+", author.lower()) if len(token) > 1}
    tokens = [token.rstrip("0123456789") for token in re.split(r"[_\W]+", stem.lower())]
    return " ".join([token for token in tokens if token and token not in names] or [stem])


def read(root: Path, languages: Sequence[str] = ()) -> Reading:
    if languages:
        raise ValueError(f"clipart: languages must be none, since all captions are English, got {list(languages)}")
    folder = require_file(root, FOLDER, "openclipart-svg")
    left_out: dict[str, list[str]] = {}
    drawings: list[tuple[Path, dict[str, Any]]] = []
    for path in sorted(folder.rglob("*.svg")):
        label = path.relative_to(folder).as_posix()
        reason = None
        if path.is_symlink():
            reason = "a link to another file"
        elif any(label.startswith(f"{place}/") for place in DROPPED):
            reason = f"in one of {', '.join(DROPPED)}"
        else:
            try:
                metadata = read_metadata(path)
            except ValueError:
                reason = "no XML"
            else:
                reason = "licensed under the GPL" if "gpl" in metadata["licence"].lower() else None
        if reason:
            left_out.setdefault(reason, []).append(label)
        else:
            drawings.append((path, metadata))
    titles = Counter(metadata["title"] for _, metadata in drawings)
    items = []
    for path, metadata in drawings:
        title, licence = metadata["title"], metadata["licence"]
        name = head(title if titles[title] <= COMMON else "", path.stem, metadata["author"])
        words = list(dict.fromkeys(word for word in metadata["keywords"] if word.lower() != name.lower()))[:KEYWORDS]
        marked = "public domain" if "publicdomain" in licence.lower() else licence or "public domain (not marked in the file)"
        about = {"file": path.relative_to(folder).as_posix(), "author": metadata["author"], "licence": marked}
        inputs = {"picture": functools.partial(render_svg, path), "text": functools.partial(item_text, name, words)}
        items.append(Item(name, words, inputs, about=about))
    return Reading(items, left_out)


def modalities(languages: Sequence[str]) -> dict[str, Modality]:
    return picture_modalities() | text_modalities(languages)


SOURCE = Source(
    name="clipart",
    packages=(DebianPackage("openclipart-svg", (FOLDER,), (24.9, 173)),),
    licence="public domain",
    test_size=500,
    validation_size=250,
    default=("picture", "text"),
    required=("picture", "text"),
    languages=(),
    modalities=modalities,
    read=read,
)
