"""SweetHome3D furniture: a rendered icon, a name in some twenty languages, and a mesh, from which points are sampled."""

from __future__ import annotations

import functools
import re
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..points import PointCloud, read_obj, sample_surface, unit_ball
from ._items import (
    DebianPackage,
    Item,
    Modality,
    Reading,
    Source,
    item_text,
    open_picture,
    picture_modalities,
    require_file,
    text_modalities,
)

__all__ = ["SOURCE"]

FOLDER = "usr/share/sweethome3d/furniture"
PACKAGE = "sweethome3d-furniture"
POINTS = 1024
COLLECTION_TAG = "Blend Swap"  # on every item of two libraries, so it says nothing
LICENCES = {"BlendSwap-CC-0": "CC0-1.0"}  # all others are CC-BY-3.0
NEEDED = ("name", "icon", "model", "width", "depth", "height")


def read_member(library: Path, member: str) -> bytes:
    """A file inside a library, which is a ZIP archive."""
    try:
        with zipfile.ZipFile(library) as archive:
            return archive.read(member)
    except KeyError as error:
        raise ValueError(f"{library}: expected a member '{member}', got none of that name") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError) as error:
        raise ValueError(f"{library}: expected a ZIP archive with '{member}', got one that does not read ({error})") from error


def read_properties(library: Path, member: str) -> dict[int, dict[str, str]]:
    """Entries of a furniture catalogue by number: lines `key#number=value`, latin-1 with \\uXXXX escapes, as Java writes such files."""
    text = read_member(library, member)
    try:
        decoded = text.decode("unicode_escape")
    except UnicodeDecodeError as error:
        raise ValueError(f"{library}: expected latin-1 text with \\uXXXX escapes in '{member}', got a broken escape ({error})") from error
    entries: dict[int, dict[str, str]] = {}
    for key, number, value in re.findall(r"^(\w+)#(\d+)\s*=(.*)$", decoded, flags=re.MULTILINE):
        entries.setdefault(int(number), {})[key] = value.strip()
    return entries


def members(library: Path) -> list[str]:
    try:
        with zipfile.ZipFile(library) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{library}: expected a ZIP archive, got one that does not open ({error})") from error


def icon(library: Path, member: str) -> Any:
    return open_picture(f"{library}, {member}", read_member(library, member))


def point_cloud(library: Path, member: str, size: Sequence[float], seed: int) -> PointCloud:
    label = f"{library}, {member}"
    try:
        vertices, triangles = read_obj(read_member(library, member).decode("latin-1"))
        if len(triangles) == 0 or triangles.min() < 0 or triangles.max() >= len(vertices):
            raise ValueError(f"expected faces of its {len(vertices)} vertices, got {len(triangles)} triangles, some of other vertices or none")
        points = unit_ball(sample_surface(vertices, triangles, POINTS, seed=seed))
    except (ValueError, IndexError) as error:
        reason = str(error).removeprefix(f"{library}: ")
        raise ValueError(f"{label}: expected a mesh in OBJ format, got one that does not read ({reason})") from error
    if not np.isfinite(points).all():
        raise ValueError(f"{label}: expected finite vertices, got NaN or Inf")
    return PointCloud(points, np.array(size))


def read_library(library: Path, languages: Sequence[str], left_out: dict[str, list[str]]) -> list[Item]:
    properties = [member for member in members(library) if member.endswith(".properties") and "/" not in member]
    catalogues = [member for member in properties if "_" not in member]
    if len(catalogues) != 1:
        raise ValueError(f"{library}: expected one catalogue without '_' in its name, got {catalogues or 'none'}")
    stem = catalogues[0].removesuffix(".properties")
    files = {language: f"{stem}_{language}.properties" for language in languages}
    translated = {language: read_properties(library, file) for language, file in files.items() if file in properties}
    items = []
    for seed, (number, entry) in enumerate(sorted(read_properties(library, catalogues[0]).items())):
        label = f"{library.stem} {number}"
        lacking = [key for key in NEEDED if not entry.get(key)]
        if lacking:
            left_out.setdefault(f"no {', '.join(lacking)} in the catalogue", []).append(entry.get("name", label))
            continue
        try:
            size = [float(entry[side]) for side in ("width", "depth", "height")]
        except ValueError as error:
            raise ValueError(f"{library}: expected numbers for width, depth and height of entry {number}, got {error}") from error
        if not all(0 < side < float("inf") for side in size):
            raise ValueError(f"{library}: expected positive width, depth and height of entry {number}, got {size}")
        name, model = entry["name"], entry["model"].lstrip("/")
        words = [tag for tag in (part.strip() for part in entry.get("tags", "").split(",")) if tag and tag != COLLECTION_TAG]
        inputs: dict[str, Any] = {
            "picture": functools.partial(icon, library, entry["icon"].lstrip("/")),
            "text": functools.partial(item_text, name, words),
            "points": functools.partial(point_cloud, library, model, size, seed),
        }
        names = {}
        for language, entries in translated.items():
            if their_name := entries.get(number, {}).get("name"):
                names[language] = their_name
                inputs[f"text_{language}"] = functools.partial(item_text, their_name, [])
        about = {
            "library": library.stem,
            "number": number,
            "category": entry.get("category", ""),
            "licence": LICENCES.get(library.stem, "CC-BY-3.0"),
            "author": entry.get("creator", ""),
        }
        items.append(Item(name, words, inputs, names, about=about))
    return items


def read(root: Path, languages: Sequence[str] = ()) -> Reading:
    folder = require_file(root, FOLDER, PACKAGE)
    left_out: dict[str, list[str]] = {}
    libraries = sorted(folder.glob("*.sh3f"))
    items = [item for library in libraries for item in read_library(library, languages, left_out)]
    unknown = [language for language in languages if not any(language in item.names for item in items)]
    if items and unknown:
        raise ValueError(f"furniture: languages must be among those of the libraries in {folder}, got {unknown}")
    return Reading(items, left_out)


def modalities(languages: Sequence[str]) -> dict[str, Modality]:
    points = {"points": Modality("point descriptor", "points", tokens="point descriptor")}
    return picture_modalities() | text_modalities(languages) | points


SOURCE = Source(
    name="furniture",
    packages=(DebianPackage(PACKAGE, (FOLDER,), (120, 127)),),
    licence="CC-BY-3.0 AND CC0-1.0",
    test_size=200,
    validation_size=100,
    default=("picture", "text", "points"),
    required=("picture", "text", "points"),
    languages=("de", "es", "fr", "it", "ru"),
    modalities=modalities,
    read=read,
)
