"""`modalign mask show`: draws which pairs a published rule keeps."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from .. import masks
from ..bench.arguments import plainly

__all__ = ["app"]

app = typer.Typer(help="Masks of attention.", no_args_is_help=True)
RULES = {
    "causal": lambda tokens: masks.causal(len(tokens)),
    "composite": masks.composite,
    "image_prefix": masks.image_prefix,
    "modality_mutual": masks.modality_mutual,
    "neighbor_window": masks.neighbor_window,
    "no_visual_attention": masks.no_visual_attention,
    "text_guided": masks.text_guided,
}
LARGEST = 96  # tokens that a terminal shows
LETTERS = {"prefix": "P", "visual": "V", "question": "Q", "answer": "A"}


@app.callback()
def group() -> None:
    """Masks of attention."""


def show(
    rule: Annotated[str, typer.Argument(metavar="RULE", help=f"one of {', '.join(RULES)}")],
    spans: Annotated[str, typer.Option(help="spans of a sequence: types with numbers of tokens, or grids of pictures and videos")] = "prefix 2, visual 3x3, question 3, answer 2",
) -> None:
    """Draw which pairs a rule keeps: a line for each query, a column for each key. P prefix, V visual, Q question, A answer."""
    if rule not in RULES:
        raise ValueError(f"mask show: RULE must be one of {', '.join(RULES)}, got {rule}")
    tokens = masks.layout([_span(text) for text in spans.split(",") if text.strip()])
    if not 0 < len(tokens) <= LARGEST:
        raise ValueError(f"mask show: spans must have 1 to {LARGEST} tokens, got {len(tokens)}")
    mask = RULES[rule](tokens)
    heading = "".join(LETTERS[masks.TYPE_NAMES[kind]] for kind in tokens.type[0].tolist())
    typer.echo("  " + heading)
    for letter, row in zip(heading, mask.dense()[0, 0].tolist(), strict=True):
        typer.echo(f"{letter} " + "".join("█" if kept else "·" for kept in row))
    typer.echo(f"{mask.kept():.0%} of the pairs are kept, {mask.kept() / masks.causal(len(tokens)).kept():.0%} of what causal attention keeps")


def _span(text: str) -> tuple[str, int | tuple[int, ...]]:
    found = re.fullmatch(r"(\w+) (\d+(?:x\d+){0,2})", text.strip())
    if not found:
        raise ValueError(f'mask show: spans must look like "prefix 2, visual 3x3", got {text.strip()!r}')
    sizes = tuple(int(number) for number in found[2].split("x"))
    return found[1], sizes if len(sizes) > 1 else sizes[0]


app.command(no_args_is_help=True)(plainly(show, "modalign mask"))
