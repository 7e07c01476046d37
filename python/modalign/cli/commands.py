"""The commands, each ending plainly: one line for expected errors, exit codes, Ctrl-C."""

from __future__ import annotations

from typing import Annotated

import typer

from ..bench.arguments import plainly
from ..bench.command import app as bench
from .align import align
from .encode import encode
from .layers import layers
from .mask import app as mask
from .prepare import prepare
from .search import search

app = typer.Typer(
    help="Align modalities, search across them, inspect the installation.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)

for command in (align, search, prepare, encode, layers):
    app.command(no_args_is_help=True)(plainly(command, "modalign"))
app.add_typer(bench, name="bench")
app.add_typer(mask, name="mask")


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False) -> None:
    """Versions built for and found, CUDA targets, instruction sets, ops and their devices."""
    from modalign import info as installation

    installation.main(as_json)
