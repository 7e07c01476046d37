"""`modalign encode`: a feature folder of your own pictures and captions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from ..data.encode import encode_folder
from .prepare import COLUMNS, tell_foreign, tell_interrupted
from .threads import use_threads

__all__ = ["encode"]


def encode(
    images: Annotated[Path, typer.Argument(metavar="IMAGES_DIR", help="folder of pictures")],
    captions: Annotated[Path, typer.Option(help="CSV file with the columns file, caption and perhaps group, caption_fr, caption_de, ...")],
    out: Annotated[Path, typer.Option(help="feature folder to write")],
    encoder: Annotated[str, typer.Option(help="of pictures: a name of the guide's table, or module:Class of your own")] = "EfficientNet-Lite0",
    text_encoder: Annotated[str, typer.Option(help="of captions, likewise")] = "all-MiniLM-L6-v2",
    tokens: Annotated[bool, typer.Option("--tokens/--no-tokens", help="keep tokens beside pooled features")] = False,
    force: Annotated[bool, typer.Option("--force", help="encode anew, though pictures, captions and settings are unchanged")] = False,
    threads: Annotated[int, typer.Option(min=1, help="of torch")] = 1,
) -> None:
    """Encode your own pictures and captions. The folder that comes out is a data set for `modalign align` and for modalign.data.load.

    An interrupted run is taken up by the same command.
    """
    console = Console()
    use_threads(threads)
    try:
        with Progress(*COLUMNS, console=console) as bar:
            task = bar.add_task("reading", total=None)
            result = encode_folder(
                images,
                captions,
                out,
                encoder=encoder,
                text_encoder=text_encoder,
                tokens=tokens,
                force=force,
                progress=lambda done, total: bar.update(task, description="encoding", completed=done, total=total),
            )
    except KeyboardInterrupt:
        tell_interrupted("encode:", force)
        raise typer.Exit(130) from None
    if result.without_text:
        console.print(f"{result.without_text} of {result.items} items have an empty caption: their text is marked as missing", highlight=False)
    if result.items < 12:
        console.print(f"only {result.items} items: `modalign align` needs at least 12", style="yellow", highlight=False)
    tell_foreign(console, result.foreign)
    found = f"wrote {result.folder}: {result.items} items" if result.new else f"already encoded with these settings in {result.folder}"
    console.print(found, markup=False, highlight=False, soft_wrap=True)
