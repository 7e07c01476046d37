"""What the figures of sweeps and reports have in common. No pyplot: figures are objects and nothing depends on a display."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import imread, imsave

FIXED = {"ours": "#1b6ca8", "floor": "#888888", "formula": "#c8553d"}  # by kind
OTHERS = ("#2a9d4a", "#8e5ea2", "#d4a017", "#17a2a2", "#a0522d", "#e377c2", "#556b2f", "#4b0082")


def colours(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """One colour per provider: ours, the floor and the formula always the same."""
    chosen: dict[str, str] = {}
    free = iter(OTHERS * (1 + len(rows)))
    for row in rows:
        name, fixed = row["provider"], FIXED.get(row["kind"], "")
        if name not in chosen:
            chosen[name] = fixed if fixed and fixed not in chosen.values() else next(free)
    return chosen


def plain(name: str) -> str:
    """Names as they are: a dollar is no formula, and a label that begins with an underscore is no secret.

    >>> plain("$x_1$"), plain("_mine")
    ('\\\\$x_1\\\\$', ' _mine')
    """
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def axes_of(x: str, y: str, *, width: float = 7.5, height: float = 4.6) -> tuple[Figure, Any]:
    """A figure with one pair of logarithmic axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    axes.grid(alpha=0.25, which="both", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def embedded(figure: Figure) -> str:
    """As the source of an HTML picture."""
    return "data:image/png;base64," + base64.b64encode(png(figure)).decode()


def stacked(figures: Mapping[str, Figure]) -> bytes:
    """All figures under each other in one PNG, each under its title."""
    pictures = []
    for title, figure in figures.items():
        figure.suptitle(title, fontsize=10, x=0.02, ha="left")
        pictures.append(imread(io.BytesIO(png(figure))))
    width = max(picture.shape[1] for picture in pictures)
    padded = [np.pad(picture, ((0, 0), (0, width - picture.shape[1]), (0, 0)), constant_values=1.0) for picture in pictures]
    buffer = io.BytesIO()
    imsave(buffer, np.concatenate(padded), format="png")
    return buffer.getvalue()
