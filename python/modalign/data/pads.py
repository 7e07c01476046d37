"""Land patterns of electronic parts: reading KiCad footprints, drawing them, and a classical descriptor of their pads (no learned weights)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["DESCRIPTOR_WIDTH", "Footprint", "Pad", "PadDescriptor", "describe_pads", "draw_footprint", "parse_expression", "read_footprint"]

TOKEN = re.compile(r'\(|\)|"(?:\\.|[^"\\])*"|[^\s()"]+')
TYPES = ("smd", "thru_hole", "np_thru_hole", "connect")
SHAPES = ("rect", "roundrect", "circle", "oval", "trapezoid", "custom")
GRID = 16
LENGTH_BINS = 24
LENGTH_RANGE = (math.log(0.1), math.log(100.0))  # mm
DESCRIPTOR_WIDTH = 1 + len(TYPES) + len(SHAPES) + 2 + 2 + 8 + 2 + GRID**2 + 2 * LENGTH_BINS


@dataclass(frozen=True)
class Pad:
    kind: str
    shape: str
    x: float
    y: float
    angle: float  # degrees, counter-clockwise on the screen, where y points down
    width: float
    height: float
    drill: float

    def corners(self) -> NDArray[np.float64]:
        """The rectangle around the pad, turned: [4, 2]."""
        turn = math.radians(self.angle)
        rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
        box = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [self.width / 2, self.height / 2]
        return box @ rotation.T + [self.x, self.y]


@dataclass(frozen=True)
class Footprint:
    name: str
    pads: list[Pad]
    lines: dict[str, list[tuple[float, float, float, float]]] = field(default_factory=dict)  # by layer, in mm


def parse_expression(text: str) -> list[Any]:
    """One S-expression as nested lists of strings; ValueError where brackets do not match or something follows."""
    stack: list[list[Any]] = [[]]
    covered = 0
    for match in TOKEN.finditer(text):
        if text[covered : match.start()].strip():
            raise ValueError(f"a quote that is not closed near character {covered}")
        covered = match.end()
        token = match[0]
        if token == "(":
            stack.append([])
        elif token == ")":
            if len(stack) == 1:
                raise ValueError(f"a closing bracket too many at character {match.start()}")
            closed = stack.pop()
            stack[-1].append(closed)
        else:
            stack[-1].append(re.sub(r"\\(.)", r"\1", token[1:-1]) if token[0] == '"' else token)
    if text[covered:].strip():
        raise ValueError(f"a quote that is not closed near character {covered}")
    if len(stack) > 1:
        raise ValueError(f"{len(stack) - 1} brackets that are not closed at its end")
    if len(stack[0]) != 1 or not isinstance(stack[0][0], list):
        raise ValueError(f"{len(stack[0])} expressions")
    return stack[0][0]


def children(expression: list[Any], name: str) -> list[list[Any]]:
    return [child for child in expression if isinstance(child, list) and child and child[0] == name]


def numbers(expression: list[Any], name: str) -> list[float]:
    """The numbers that follow a child's name; words among them (such as "oval" in a drill) are passed over."""
    found = children(expression, name)
    values = [float(word) for word in found[0][1:] if isinstance(word, str) and re.fullmatch(r"[-+]?\d*\.?\d+(e[-+]?\d+)?", word)] if found else []
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"a {name} that is not finite")
    return values


def read_pad(expression: list[Any]) -> Pad:
    at, size, drill = numbers(expression, "at"), numbers(expression, "size"), numbers(expression, "drill")
    if len(expression) < 4 or len(at) < 2 or len(size) != 2:
        raise ValueError(f"pad {expression[1] if len(expression) > 1 else ''} without type, shape, place or size")
    return Pad(expression[2], expression[3], at[0], at[1], at[2] if len(at) > 2 else 0.0, size[0], size[1], drill[0] if drill else 0.0)


def read_footprint(path: Path) -> Footprint:
    try:
        expression = parse_expression(path.read_text(encoding="utf-8"))
        if expression[0] not in ("footprint", "module") or len(expression) < 2:
            raise ValueError(f"an expression that begins with {expression[0]!r}")
        pads = [read_pad(child) for child in children(expression, "pad")]
        lines: dict[str, list[tuple[float, float, float, float]]] = {}
        for line in children(expression, "fp_line"):
            start, end, layer = numbers(line, "start"), numbers(line, "end"), children(line, "layer")
            if len(start) != 2 or len(end) != 2 or not layer or len(layer[0]) < 2:
                raise ValueError("a line without start, end or layer")
            lines.setdefault(layer[0][1], []).append((start[0], start[1], end[0], end[1]))
    except (ValueError, IndexError, OSError) as error:
        raise ValueError(f"{path}: expected a KiCad footprint, got one that does not parse ({error})") from error
    return Footprint(str(expression[1]), pads, lines)


def draw_footprint(footprint: Footprint, side: int = 256) -> Image:
    """Pads and silk screen, as large as the picture allows: surface pads red, plated holes gold, holes white, lines grey."""
    from PIL import Image, ImageDraw

    silk = footprint.lines.get("F.SilkS", [])
    points = [pad.corners() for pad in footprint.pads] + [np.array(silk).reshape(-1, 2)]
    every = np.concatenate(points)
    if not len(every):
        raise ValueError(f"footprint {footprint.name}: expected pads or lines to draw, got none")
    low, high = every.min(0), every.max(0)
    scale = 0.92 * side / max(float((high - low).max()), 1e-3)
    middle = (low + high) / 2

    def place(xy: NDArray[np.float64]) -> list[tuple[float, float]]:
        return [tuple(point) for point in (xy - middle) * scale + side / 2]

    picture = Image.new("RGBA", (side, side), "white")
    pen = ImageDraw.Draw(picture)
    for x0, y0, x1, y1 in silk:
        pen.line(place(np.array([[x0, y0], [x1, y1]])), fill=(110, 110, 110), width=2)
    colours = {"smd": (190, 40, 40), "connect": (190, 40, 40), "thru_hole": (200, 150, 30), "np_thru_hole": (60, 60, 60)}
    for pad in footprint.pads:
        colour = colours.get(pad.kind, (190, 40, 40))
        if pad.shape == "circle" or (pad.shape == "oval" and pad.width == pad.height):
            (x, y), radius = place(np.array([[pad.x, pad.y]]))[0], pad.width / 2 * scale
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        else:
            pen.polygon(place(pad.corners()), fill=colour)
    for pad in footprint.pads:
        if pad.drill:
            (x, y), radius = place(np.array([[pad.x, pad.y]]))[0], pad.drill / 2 * scale
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill="white")
    return picture


def describe_pads(footprint: Footprint) -> NDArray[np.float32]:
    """Describe the pads of a footprint: [DESCRIPTOR_WIDTH]. A footprint without pads has zeros but for its courtyard.

    In order: log of 1 + number of pads; shares of pad types and of pad shapes; log extents of all pads and of the courtyard in mm; mean, deviation,
    least and largest log of pad length and breadth (the longer side first); share of drilled pads and mean log drill; copper on a 16 x 16 grid over
    the pads' square; histograms of log distance to the nearest pad and between all pads. Histograms and grid are square roots of shares.
    """
    pads = footprint.pads
    courtyard = np.array(footprint.lines.get("F.CrtYd", [])).reshape(-1, 2)
    court = np.log(np.maximum(np.ptp(courtyard, axis=0), 1e-2)) if len(courtyard) else np.zeros(2)
    if not pads:
        described = np.zeros(DESCRIPTOR_WIDTH, dtype=np.float32)
        described[1 + len(TYPES) + len(SHAPES) + 2 :][:2] = court
        return described
    kinds = [sum(pad.kind == kind for pad in pads) / len(pads) for kind in TYPES]
    shapes = [sum(pad.shape == shape for pad in pads) / len(pads) for shape in SHAPES]
    corners = np.stack([pad.corners() for pad in pads])
    low, high = corners.min((0, 1)), corners.max((0, 1))
    extents = np.log(np.maximum(high - low, 1e-2))
    sizes = np.log(np.maximum(np.sort([[pad.height, pad.width] for pad in pads], axis=1)[:, ::-1], 1e-2))
    drills = [pad.drill for pad in pads if pad.drill > 0]
    drilled = [len(drills) / len(pads), float(np.mean(np.log(drills))) if drills else 0.0]
    centres = np.array([[pad.x, pad.y] for pad in pads])
    if len(pads) > 1:
        distance = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
        between = distance[np.triu_indices(len(pads), 1)]
        np.fill_diagonal(distance, np.inf)
        histograms = [length_histogram(distance.min(1)), length_histogram(between)]
    else:
        histograms = [np.zeros(LENGTH_BINS)] * 2
    statistics = [sizes.mean(0), sizes.std(0), sizes.min(0), sizes.max(0)]
    parts = [[math.log1p(len(pads))], kinds, shapes, extents, court, *statistics, drilled, occupancy(corners, low, high), *histograms]
    return np.concatenate(parts).astype(np.float32)


def length_histogram(lengths: NDArray[np.float64]) -> NDArray[np.float64]:
    clipped = np.clip(np.log(np.maximum(lengths, 1e-6)), *LENGTH_RANGE)
    counts = np.histogram(clipped, LENGTH_BINS, LENGTH_RANGE)[0]
    return np.sqrt(counts / counts.sum())


def occupancy(corners: NDArray[np.float64], low: NDArray[np.float64], high: NDArray[np.float64]) -> NDArray[np.float64]:
    """Square root of the share of copper in each cell of a square around the pads, from the boxes of the pads: [GRID * GRID]."""
    side = max(float((high - low).max()), 1e-2)
    origin = (low + high) / 2 - side / 2
    edges = np.arange(GRID + 1)
    starts, ends = ((corners.min(1) - origin) / side * GRID), ((corners.max(1) - origin) / side * GRID)
    covered = [np.clip(np.minimum(ends[:, None, axis], edges[1:]) - np.maximum(starts[:, None, axis], edges[:-1]), 0, None) for axis in (0, 1)]
    cells = np.einsum("px,py->yx", *covered)
    return np.sqrt(cells / max(cells.sum(), 1e-12)).ravel()


class PadDescriptor:
    """`describe_pads` as an encoder. Tokens are the pads: place and size in mm, angle as sine and cosine, drill."""

    width = DESCRIPTOR_WIDTH
    name = "pad descriptor"
    packages = ()

    def __call__(self, footprints: Sequence[Footprint]) -> Tensor:
        """Describe footprints: [len(footprints), 329] float32."""
        return torch.from_numpy(np.array([describe_pads(footprint) for footprint in footprints], dtype=np.float32).reshape(-1, self.width))

    def tokens(self, footprints: Sequence[Footprint]) -> list[Tensor]:
        rows = (
            [
                [pad.x, pad.y, pad.width, pad.height, math.sin(math.radians(pad.angle)), math.cos(math.radians(pad.angle)), pad.drill]
                for pad in footprint.pads
            ]
            for footprint in footprints
        )
        return [torch.tensor(pads, dtype=torch.float32).reshape(-1, 7) for pads in rows]
