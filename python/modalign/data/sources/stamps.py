"""Tux Paint stamps: pictures with captions in some sixty languages, captions spoken by volunteers in several, and sound effects."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..encoders.speech import read_recording
from ._items import (
    DebianPackage,
    Item,
    Modality,
    Reading,
    Source,
    open_picture,
    picture_modalities,
    read_text,
    render_svg,
    require_file,
    text_modalities,
)

__all__ = ["SOURCE"]

FOLDER = "usr/share/tuxpaint/stamps"
SPEECH = "Google speech embedding"


def read_captions(path: Path) -> tuple[str, dict[str, str]]:
    """The English caption in line 1, then lines `LANG.utf8=caption`."""
    lines = read_text(path).splitlines()
    if not lines or not lines[0].strip() or ".utf8=" in lines[0]:
        raise ValueError(f"{path}: expected an English caption in line 1, got {lines[0] if lines else 'an empty file'!r}")
    captions = {}
    for number, line in enumerate(lines[1:], 2):
        language, separator, caption = line.partition(".utf8=")
        if separator and caption.strip():
            captions[language.strip()] = caption.strip()
        elif line.strip() and not separator:
            raise ValueError(f"{path}: expected LANG.utf8=caption, got {line!r} in line {number}")
    return lines[0].strip(), captions


def read(root: Path, languages: Sequence[str] = ()) -> Reading:
    folder = require_file(root, FOLDER, "tuxpaint-stamps-default")
    items: list[Item] = []
    left_out: dict[str, list[str]] = {}
    spoken: set[str] = set()
    for path in sorted(folder.rglob("*.txt")):
        base = path.with_suffix("")
        label = base.relative_to(folder).as_posix()
        beside = {suffix: path.with_name(f"{path.stem}{suffix}") for suffix in (".png", ".svg", ".ogg", ".wav", "_desc.ogg")}
        there = {suffix: file for suffix, file in beside.items() if file.is_file()}
        try:
            name, captions = read_captions(path)
        except ValueError as error:
            left_out.setdefault(str(error).partition(": ")[2], []).append(label)
            continue
        inputs: dict[str, Any] = {"text": lambda name=name: name}
        if ".png" in there:
            inputs["picture"] = functools.partial(open_picture, there[".png"])
        elif ".svg" in there:
            inputs["picture"] = functools.partial(render_svg, there[".svg"])
        else:
            left_out.setdefault("no picture", []).append(label)
            continue
        if "_desc.ogg" in there:
            inputs["speech"] = functools.partial(read_recording, there["_desc.ogg"])
        for sound in (".ogg", ".wav"):
            if sound in there:
                inputs.setdefault("sound", functools.partial(read_recording, there[sound]))
        for language in languages:
            if language in captions:
                inputs[f"text_{language}"] = functools.partial(captions.get, language)
            recording = path.with_name(f"{path.stem}_desc_{language}.ogg")
            if recording.is_file():
                inputs[f"speech_{language}"] = functools.partial(read_recording, recording)
                spoken.add(language)
        translated = {language: captions[language] for language in languages if language in captions}
        items.append(Item(name, [], inputs, translated, about={"file": label, "topic": label.partition("/")[0], "licence": "GPL-2.0-only"}))
    unknown = [language for language in languages if not any(language in item.names for item in items) and language not in spoken]
    if items and unknown:
        raise ValueError(f"stamps: languages must be among those of {folder}, got {unknown} without a caption or recording")
    return Reading(items, left_out)


def modalities(languages: Sequence[str]) -> dict[str, Modality]:
    speech = {f"speech_{code.lower()}": Modality(SPEECH, f"speech_{code}", tokens=SPEECH, language=code) for code in languages}
    return (
        picture_modalities()
        | text_modalities(languages)
        | {"speech": Modality(SPEECH, "speech", tokens=SPEECH, language="en")}
        | speech
        | {"sound": Modality(SPEECH, "sound", tokens=SPEECH)}
    )


SOURCE = Source(
    name="stamps",
    packages=(DebianPackage("tuxpaint-stamps-default", (FOLDER,), (161, 230)),),
    licence="GPL-2.0-only",
    test_size=250,
    validation_size=120,
    default=("picture", "text", "speech_fr"),
    required=("picture", "text"),
    languages=("be", "bg", "ca", "es", "fr", "ro", "ru"),  # those that are spoken, besides written
    modalities=modalities,
    read=read,
)
