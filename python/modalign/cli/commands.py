"""Commands and what they have in common: plain messages for expected errors, exit codes, Ctrl-C."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, ParamSpec, TypeVar

import typer
from rich.console import Console

from ..bench.command import app as bench
from ..data import EncoderUnavailable
from .align import align
from .encode import encode
from .prepare import prepare
from .search import search

P = ParamSpec("P")
R = TypeVar("R")

app = typer.Typer(
    help="Align modalities, search across them, inspect the installation.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)


def _plainly(command: Callable[P, R]) -> Callable[P, R]:
    """Errors that a user can act on become one message and exit code 1; everything else keeps its traceback."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (ValueError, OSError, EncoderUnavailable) as error:
            Console(stderr=True).print(f"modalign {command.__name__}: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(1) from error
        except ModuleNotFoundError as error:
            remedy = "Install the commands' packages with: pip install 'modalign[cli]'"
            message = f"modalign {command.__name__}: the package '{error.name}' is not installed. {remedy}"
            Console(stderr=True).print(message, style="bold red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            Console(stderr=True).print(f"modalign {command.__name__}: interrupted, no file is half-written", style="yellow")
            raise typer.Exit(130) from None

    return run


app.command(no_args_is_help=True)(_plainly(align))
app.command(no_args_is_help=True)(_plainly(search))
app.command(no_args_is_help=True)(_plainly(prepare))
app.command(no_args_is_help=True)(_plainly(encode))
app.add_typer(bench, name="bench")


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False) -> None:
    """Versions built for and found, CUDA targets, instruction sets, ops and their devices."""
    from modalign import info as installation

    installation.main(as_json)
