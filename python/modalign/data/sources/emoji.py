"""Emoji: pictures drawn with Noto Color Emoji, names and keywords from the Unicode CLDR in some ninety languages."""

from __future__ import annotations

import functools
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._items import DebianPackage, Item, Modality, Reading, Source, item_text, picture_modalities, read_text, require_file, text_modalities

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["SOURCE"]

FONT = "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
LABELS = "usr/share/unicode/cldr/common/properties/labels.txt"
ANNOTATIONS = ("usr/share/unicode/cldr/common/annotations", "usr/share/unicode/cldr/common/annotationsDerived")
FONT_SIZE = 109  # the only size at which the bitmap font opens
GLYPH = (136, 128)
MAX_ADVANCE = 140  # a wider string is a sequence that the font does not have and would draw as several glyphs
SKIN_TONES = {chr(code) for code in range(0x1F3FB, 0x1F400)}


VARIATION = "\ufe0f"  # asks for a picture; CLDR leaves it out, and so do items, which are joined by their characters
Named = dict[str, tuple[str, list[str]]]  # name and keywords by character sequence


def read_annotations(root: Path, language: str) -> Named:
    """Short names, and the keywords beside them."""
    names: dict[str, str] = {}
    keywords: dict[str, list[str]] = {}
    folder = require_file(root, ANNOTATIONS[0], "unicode-cldr-core")
    if not (folder / f"{language}.xml").is_file():
        there = ", ".join(sorted(path.stem for path in folder.glob("*.xml")))
        raise ValueError(f"emoji: languages must be among those of {folder}, got '{language}'; there are {there}")
    for place in ANNOTATIONS:
        path = require_file(root, f"{place}/{language}.xml", "unicode-cldr-core")
        try:
            document = ElementTree.parse(path)
        except ElementTree.ParseError as error:
            raise ValueError(f"{path}: expected an XML file, got one that does not parse ({error})") from error
        for entry in document.iter("annotation"):
            sequence, text = entry.get("cp"), entry.text or ""
            if sequence is None:
                raise ValueError(f"{path}: expected an attribute 'cp' in every annotation, got none beside {text.strip()!r}")
            if entry.get("type") == "tts":
                names[sequence] = text.strip()
            else:
                keywords[sequence] = [word.strip() for word in text.split("|")]
    return {sequence: (name, words_beside(name, keywords.get(sequence, []))) for sequence, name in names.items()}


def read_categories(root: Path) -> dict[str, str]:
    """What the Unicode CLDR files a character under: "Food & Drink" and seven others. Characters that are newer than its list have none."""
    path = require_file(root, LABELS, "unicode-cldr-core")
    categories: dict[str, str] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        found = re.match(r"\[(.*)\]\s*;([^;]+)", line)  # a set of characters, ranges and {sequences}; a label; a finer label
        if found is None:
            raise ValueError(f"{path}: expected '[characters] ; label' in line {number}, got {line.strip()!r}")
        for sequence, first, last in re.findall(r"\{(.+?)\}|\\?(\S)(?:-\\?(\S))?", found[1]):
            members = [sequence.replace(VARIATION, "")] if sequence else [chr(code) for code in range(ord(first), ord(last or first) + 1)]
            categories |= {member: found[2].strip() for member in members if member not in categories}
    return categories


def open_font(root: Path) -> Any:
    from PIL import ImageFont, features

    if not features.check("raqm"):
        raise ValueError("emoji: Pillow must have raqm, got one without (the wheels on PyPI have it); flags and joined sequences would fall apart")
    path = require_file(root, FONT, "fonts-noto-color-emoji")
    try:
        return ImageFont.truetype(str(path), FONT_SIZE, layout_engine=ImageFont.Layout.RAQM)
    except OSError as error:
        raise ValueError(f"{path}: expected a font with glyphs of size {FONT_SIZE}, got one that does not open ({error})") from error


def draw(font: Any, sequence: str) -> Image:
    from PIL import Image, ImageDraw

    glyph = Image.new("RGBA", GLYPH, (0, 0, 0, 0))
    ImageDraw.Draw(glyph).text((0, 0), sequence, font=font, embedded_color=True)
    return glyph


def words_beside(name: str, keywords: Sequence[str]) -> list[str]:
    """The keyword list often repeats the name; a repeated phrase would only weigh the text towards it."""
    return [word for word in keywords if word.lower() != name.lower()]


def read_characters(
    english: Named, others: Mapping[str, Named], drawing: Callable[[str], Callable[[], Image] | str], categories: Mapping[str, str] | None = None
) -> Reading:
    """Items of the characters that have a name, less skin-tone variants. `drawing` gives what draws a character, or the reason why nothing does."""
    items: list[Item] = []
    left_out: dict[str, list[str]] = {}
    for sequence, (name, words) in english.items():
        variant = len(sequence) > 1 and any(character in SKIN_TONES for character in sequence)
        found = "no English name" if not name else "a skin-tone variant" if variant else drawing(sequence)
        if isinstance(found, str):
            left_out.setdefault(found, []).append(name or sequence)
            continue
        inputs: dict[str, Any] = {"picture": found, "text": functools.partial(item_text, name, words)}
        translated = {}
        for language, names in others.items():
            their_name, their_words = names.get(sequence, ("", []))
            if their_name:
                translated[language] = their_name
                inputs[f"text_{language}"] = functools.partial(item_text, their_name, their_words)
        character = sequence.replace(VARIATION, "")
        about = {"character": character} | ({} if categories is None else {"category": categories.get(character, "")})
        items.append(Item(name, words, inputs, translated, about=about))
    return Reading(items, left_out)


def read(root: Path, languages: Sequence[str] = ()) -> Reading:
    """Sequences that the font draws as one glyph, less skin-tone variants and glyphs that are pixel for pixel the same."""
    font = open_font(root)
    drawn: set[bytes] = set()

    def drawing(sequence: str) -> Callable[[], Image] | str:
        if sequence.isascii() or font.getlength(sequence) > MAX_ADVANCE:
            return "no single glyph in the font"
        glyph = draw(font, sequence)
        pixels = glyph.tobytes()
        if glyph.getchannel("A").getextrema()[1] == 0:
            return "no single glyph in the font"
        if pixels in drawn:
            return "the same picture as an earlier item"
        drawn.add(pixels)
        return functools.partial(draw, font, sequence)

    others = {language: read_annotations(root, language) for language in languages}
    return read_characters(read_annotations(root, "en"), others, drawing, read_categories(root))


def modalities(languages: Sequence[str]) -> dict[str, Modality]:
    return picture_modalities() | text_modalities(languages)


SOURCE = Source(
    name="emoji",
    packages=(
        DebianPackage("fonts-noto-color-emoji", (FONT,), (9.9, 11)),
        DebianPackage("unicode-cldr-core", (*ANNOTATIONS, LABELS), (16.9, 230)),
    ),
    licence="Apache-2.0 AND Unicode-DFS-2016",
    test_size=500,
    validation_size=250,
    default=("picture", "text"),
    required=("picture", "text"),
    languages=("de", "es", "fr", "ja", "ru"),
    modalities=modalities,
    read=read,
)
