"""Make a data set from its packages: read, draw, encode with the frozen encoders, write a feature folder below the data root."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .encoders import make
from .shards import Encoding, Progress, file_identity, prepared
from .sources import SOURCES, DebianPackage, Modality, Source

__all__ = ["Prepared", "fetch", "missing_packages", "prepare"]


@dataclass(frozen=True)
class Prepared:
    """What came of it."""

    folder: Path
    candidates: int  # items read
    left_out: dict[str, int]  # while reading: reason and number
    unreadable: dict[str, list[str]]  # while drawing and decoding: input, and files with their reasons
    new: bool  # False: the folder had been there, made by the same settings
    foreign: tuple[str, ...] = ()  # files in the folder that are not ours, and were left alone


def source_of(name: str) -> Source:
    source = SOURCES.get(name)
    if source is None:
        raise ValueError(f"prepare: NAME must be one of {', '.join(SOURCES)}, got '{name}'")
    return source


def missing_packages(source: Source, root: Path) -> list[str]:
    """The commands that get what is missing."""
    return [package.command(root) for package in source.packages if not package.present(root)]


def fetch(source: Source, root: Path) -> None:
    """Download and unpack missing Debian packages; no root rights are needed and nothing is installed."""
    for package in source.packages:
        if not isinstance(package, DebianPackage) or package.present(root):
            continue
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=root) as folder:
            for command in (["apt-get", "download", package.name], ["dpkg", "-x", "ARCHIVE", str(root.resolve())]):
                archive = next((str(path) for path in Path(folder).glob("*.deb")), "")
                try:
                    done = subprocess.run([archive if word == "ARCHIVE" else word for word in command], cwd=folder, capture_output=True, text=True)
                except FileNotFoundError as error:
                    raise ValueError(f"prepare: --fetch needs the command '{command[0]}', got none; it comes with Debian and Ubuntu") from error
                if done.returncode:
                    raise ValueError(f"prepare: '{' '.join(command[:3])}' must succeed, got exit code {done.returncode}: {done.stderr.strip()}")


def chosen_modalities(source: Source, languages: Sequence[str], tokens: bool) -> dict[str, Modality]:
    modalities = source.modalities(languages)
    return modalities if tokens else {name: dataclasses.replace(modality, tokens=None, layers=False) for name, modality in modalities.items()}


def demand_nothing_lost(folder: Path, items: int, modalities: dict[str, Modality], languages: Sequence[str], tokens: bool, limit: int | None) -> None:
    """The finished set in the folder must not lose by the options of a run. What its packages no longer hold is another matter."""
    about = json.loads((folder / "items.json").read_text(encoding="utf-8"))
    count, described = len(about["items"]), about["modalities"]
    kinds = (("tokens", "tokens_encoder"), ("layers", "layers"))
    beside = [f"{kind} of {name}" for name, entry in described.items() for kind, key in kinds if key in entry and name in modalities]
    lost = {
        f"--limit {limit}": [f"{count - items} of {count} items"] if limit is not None and items < count else [],
        f"--languages {shlex.quote(','.join(languages))}": [key for key, entry in described.items() if "language" in entry and key not in modalities],
        "--no-tokens": [] if tokens else beside,
    }
    if what := ", ".join(one for found in lost.values() for one in found):
        options = " ".join(option for option, found in lost.items() if found)
        raise ValueError(f"prepare: options must not take {what} away from the set in {folder}, got {options}; --force replaces it")


def prepare(
    name: str,
    root: Path,
    *,
    languages: Sequence[str] | None = None,
    tokens: bool = True,
    limit: int | None = None,
    force: bool = False,
    progress: Progress = lambda done, total: None,
) -> Prepared:
    """Prepare a data set in `root / name`, taking up an interrupted run where it stopped (`force`: anew, though a finished set may lose by it)."""
    source = source_of(name)
    missing = missing_packages(source, root)
    if missing:
        raise ValueError(f"prepare: packages of '{name}' are missing below {root}. Get them with:\n  " + "\n  ".join(missing))
    languages = source.languages if languages is None else tuple(languages)
    if odd := [code for code in languages if not re.fullmatch(r"[A-Za-z]{2,3}([_-][A-Za-z0-9]{2,8})*", code)]:
        raise ValueError(f"prepare: languages must be codes such as fr or zh_Hant, got {odd}")
    reading = source.read(root, languages)
    items = reading.items[:limit]
    if not items:
        raise ValueError(f"prepare: '{name}' must have items below {root}, got none; left out: {dict(Counter(reading.left_out)) or 'none'}")
    modalities = chosen_modalities(source, languages, tokens)
    there = {key: modality for key, modality in modalities.items() if any(modality.input in item.inputs for item in items)}
    # The encoders' own order of names, so that the same set always has the same fingerprint.
    names = dict.fromkeys(encoder for modality in there.values() for encoder in (modality.encoder, modality.tokens) if encoder is not None)
    files = [root / file for package in source.packages if isinstance(package, DebianPackage) for file in package.files]
    left_out = {reason: len(labels) for reason, labels in reading.left_out.items()}
    encoding = Encoding(
        folder=root / name,
        items=items,
        modalities=there,
        encoders={encoder: make(encoder) for encoder in names},
        required=source.required,
        about={
            "name": name,
            "licence": source.licence,
            "source": source.origin(root),
            "test_size": min(source.test_size, len(items) // 2),  # a trial with --limit can be split as well
            "validation_size": min(source.validation_size, len(items) // 6),
            "default": list(source.default),
            "left_out": left_out,
        },
        settings={"files": file_identity(root, files)},
    )
    if not force and encoding.finished():
        return Prepared(encoding.folder, len(items), left_out, {}, new=False)
    if not force and not encoding.cache.exists() and prepared(encoding.folder):
        demand_nothing_lost(encoding.folder, len(items), modalities, languages, tokens, limit)
    unreadable = encoding.run(progress, anew=force)
    return Prepared(encoding.folder, len(items), left_out, unreadable, True, tuple(encoding.foreign))
