"""Make a feature folder of people's own pictures and captions."""

from __future__ import annotations

import csv
import functools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .encoders import ENCODERS, demand_whole_numbers, make, open_picture
from .shards import Encoding, Progress, file_identity
from .sources import Item, Modality
from .sources._items import item_text

__all__ = ["EncodedFolder", "encode_folder", "read_captions"]

REQUIRED_COLUMNS = ("file", "caption")
LANGUAGE_COLUMN = re.compile(r"caption_([a-z][a-z0-9_]*)", re.IGNORECASE | re.ASCII)
KINDS = {"picture": ("EfficientNet-Lite0", "ViT-S/14"), "text": ("all-MiniLM-L6-v2",)}


@dataclass(frozen=True)
class EncodedFolder:
    folder: Path
    items: int
    without_text: int
    new: bool  # False: the folder had been there, made by the same settings
    foreign: tuple[str, ...] = ()  # files in the folder that are not ours, and were left alone


def read_captions(path: Path, images: Path) -> tuple[list[Item], list[str]]:
    """Items of a CSV file with the columns file, caption, perhaps group and caption_LANG; and the languages."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: expected a CSV file in UTF-8, got one that does not read ({error})") from error
    except OSError as error:
        raise ValueError(f"{path}: expected a CSV file, got one that does not open ({error.strerror})") from error
    columns = [column.strip() for column in rows[0]] if rows else []
    languages = {column: match[1] for column in columns if (match := LANGUAGE_COLUMN.fullmatch(column))}
    unknown = [column for column in columns if column not in (*REQUIRED_COLUMNS, "group", *languages)]
    if not set(REQUIRED_COLUMNS) <= set(columns) or unknown or len(set(columns)) < len(columns):
        found = ",".join(columns) or "none"
        rule = "file, caption and perhaps group, caption_LANG (LANG: a letter, then letters a to z, digits and _)"
        raise ValueError(f"{path}: expected a first line with the columns {rule}, each once, got {found}")
    for name, count in Counter(code.lower() for code in languages.values()).items():
        if count > 1:
            raise ValueError(f"{path}: expected one column for each language, got {count} that make text_{name}")
    items: list[Item] = []
    lines: dict[Path, int] = {}
    for number, row in enumerate(rows[1:], 2):
        if not row:
            continue
        if len(row) != len(columns):
            raise ValueError(f"{path}, row {number}: expected {len(columns)} fields, got {len(row)}")
        fields = dict(zip(columns, (field.strip() for field in row), strict=True))
        name = fields["file"]
        picture = (images / name).resolve()
        outside = Path(name).is_absolute() or ".." in Path(name).parts
        if outside or not picture.is_relative_to(images.resolve()):
            found = "an absolute path or one with '..'" if outside else "a link out of it"
            raise ValueError(f"{path}, row {number}: expected a path below the folder of pictures {images}, got '{name}', {found}")
        if not name or not picture.is_file():
            raise ValueError(f"{path}, row {number}: expected a file in {images}, got '{name}', which is not there")
        if picture in lines:
            raise ValueError(f"{path}, row {number}: expected each file once, got '{name}', which is in row {lines[picture]} as well")
        lines[picture] = number
        captions = {code: fields[column] for column, code in languages.items() if fields[column]}
        inputs: dict[str, Any] = {"picture": functools.partial(open_picture, picture)}
        if fields["caption"]:
            inputs["text"] = functools.partial(item_text, fields["caption"], [])
        for code, caption in captions.items():
            inputs[f"text_{code}"] = functools.partial(item_text, caption, [])
        items.append(Item(fields["caption"] or name, [], inputs, captions, fields.get("group") or None, {"file": name}))
    if not items:
        raise ValueError(f"{path}: expected at least one row below the first line, got none")
    if not any("text" in item.inputs for item in items):
        raise ValueError(f"{path}: expected at least one caption, got {len(items)} empty ones")
    return items, [code for code in languages.values() if any(code in item.names for item in items)]


def check_pictures(items: Sequence[Item], images: Path) -> None:
    """Report a broken picture before the work begins, and not hours later. This reads no pixels; what only those show comes up during the work."""
    from PIL import Image

    for item in items:
        path = images / item.about["file"]
        try:
            with Image.open(path) as picture:
                picture.verify()
        except Exception as error:  # Pillow's readers raise OSError, SyntaxError, ValueError, struct.error and others
            raise ValueError(f"{path}: expected a picture, got one that does not read ({error})") from error
        demand_whole_numbers(path, picture.mode)


def encode_folder(
    images: Path,
    captions: Path,
    out: Path,
    *,
    encoder: str = "EfficientNet-Lite0",
    text_encoder: str = "all-MiniLM-L6-v2",
    tokens: bool = False,
    force: bool = False,
    progress: Progress = lambda done, total: None,
) -> EncodedFolder:
    """Encode the pictures and captions of a CSV file into the folder `out`, taking up an interrupted run where it stopped (`force`: anew)."""
    for option, name, kind in (("--encoder", encoder, "picture"), ("--text-encoder", text_encoder, "text")):
        place = ENCODERS.get(name, name)
        if place in ENCODERS.values() and place not in [ENCODERS[own] for own in KINDS[kind]]:
            fitting = ", ".join(KINDS[kind])
            raise ValueError(f"encode: {option} must be {fitting} or module:Class of your own, got '{name}', which is not for {kind}s")
    if not images.is_dir():
        raise ValueError(f"{images}: expected a folder of pictures, got {'a file' if images.exists() else 'nothing of that name'}")
    items, languages = read_captions(captions, images)
    check_pictures(items, images)
    made = {name: make(name) for name in dict.fromkeys([encoder, text_encoder])}
    for name in made if tokens else ():
        if not hasattr(made[name], "tokens"):
            raise ValueError(f"encode: an encoder must have a method tokens(inputs) for --tokens, got '{name}' without one")
    kept = {name: name if tokens else None for name in made}
    modalities = {"picture": Modality(encoder, "picture", tokens=kept[encoder]), "text": Modality(text_encoder, "text", tokens=kept[text_encoder])}
    modalities |= {f"text_{code.lower()}": Modality(text_encoder, f"text_{code}", language=code) for code in languages}
    encoding = Encoding(
        folder=out,
        items=items,
        modalities=modalities,
        encoders=made,
        required=("picture",),
        about={"name": out.resolve().name, "licence": "", "source": f"{images.resolve().name}, {captions.name}", "default": ["picture", "text"]},
        settings={"files": file_identity(images.resolve(), [(images / item.about["file"]).resolve() for item in items])},
        strict=True,
    )
    without = Counter("text" in item.inputs for item in items)[False]
    if not force and encoding.finished():
        return EncodedFolder(out, len(items), without, new=False)
    encoding.run(progress, anew=force)
    return EncodedFolder(out, len(items), without, True, tuple(encoding.foreign))
