"""From pictures and captions to a data set, with an encoder of your own.

    python examples/encode_your_pictures.py

Draws a few pictures, writes their captions into a CSV file, encodes both into a feature folder and loads it. `modalign encode` does the same from the
command line:

    modalign encode my_pictures --captions my_pictures/captions.csv --encoder encode_your_pictures:ColourEncoder --out my_pictures/features
"""

import csv
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from modalign.data import load
from modalign.data.encode import encode_folder

COLOURS = ("red", "green", "blue", "orange", "purple", "teal", "brown", "black")
SHAPES = ("disc", "square", "bar")


class ColourEncoder:
    """An encoder is called with a list of pictures (Pillow's RGBA) and gives a float tensor [B, D]. Here: mean colours of the four quarters."""

    def __call__(self, pictures):
        small = [np.asarray(picture.convert("RGB").resize((2, 2), Image.Resampling.BOX)) for picture in pictures]
        return torch.from_numpy(np.stack(small)).flatten(1).float() / 255


class LetterEncoder:
    """The same for captions: a list of strings in, a tensor [B, D] out. Here: how often each letter occurs."""

    def __call__(self, texts):
        return torch.tensor([[text.count(chr(97 + letter)) / len(text) for letter in range(26)] for text in texts])


def draw_pictures(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    with open(folder / "captions.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file", "caption"])
        for colour in COLOURS:
            for shape in SHAPES:
                picture = Image.new("RGB", (96, 64), "white")
                pen = ImageDraw.Draw(picture)
                if shape == "disc":
                    pen.ellipse((20, 4, 76, 60), fill=colour)
                else:
                    pen.rectangle((20, 4, 76, 60) if shape == "square" else (4, 24, 92, 40), fill=colour)
                picture.save(folder / f"{colour}_{shape}.png")
                table.writerow([f"{colour}_{shape}.png", f"a {colour} {shape}"])


if __name__ == "__main__":
    images = Path("my_pictures")
    draw_pictures(images)
    # In your own work: encoder="EfficientNet-Lite0" and text_encoder="all-MiniLM-L6-v2", or leave both out.
    encode_folder(images, images / "captions.csv", images / "features", encoder="__main__:ColourEncoder", text_encoder="__main__:LetterEncoder")
    dataset = load(images / "features")
    widths = ", ".join(f"{name} {list(matrix.shape)}" for name, matrix in dataset.modalities.items())
    print(f"{len(dataset)} items: {widths}")
    split = dataset.splits(seed=0)
    print(f"{len(split.train)} to train on, {len(split.test)} to test; the first item is '{dataset.names[0]}'")
    print(f"now: modalign align {images / 'features'}")
