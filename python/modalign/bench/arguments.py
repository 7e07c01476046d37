"""What the commands have in common: reading their options, showing progress, ending plainly."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch
import typer
from rich.console import Console

from . import environment

P = ParamSpec("P")
R = TypeVar("R")


def plainly(command: Callable[P, R]) -> Callable[P, R]:
    """Errors that a user can act on become one line and exit code 1, Ctrl-C exit code 130; everything else keeps its traceback."""
    name = command.__name__.strip("_")

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except ModuleNotFoundError as error:
            _say(f"modalign bench {name}: {error}. If it belongs to the commands: pip install 'modalign[cli]'", "bold red")
            raise typer.Exit(1) from error
        except (ValueError, OSError) as error:
            _say(f"modalign bench {name}: {str(error).removeprefix(f'bench {name}: ').removeprefix('bench: ')}", "bold red")
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            _say(f"modalign bench {name}: interrupted, no file is half-written", "yellow")
            raise typer.Exit(130) from None

    return run


def _say(text: str, style: str) -> None:
    Console(stderr=True).print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def console() -> Console:
    """Wide where nobody watches, so that tables in a file are not folded."""
    return Console(width=None if Console().is_terminal else 250)


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A function that shows what is being done now: on a terminal in one line, otherwise line by line on stderr."""
    shown = Console(stderr=True)
    if shown.is_terminal:
        with shown.status("starting") as status:
            yield lambda text: status.update(text.replace("[", r"\["))
    else:
        yield lambda text: print(text, file=sys.stderr, flush=True)


def words(text: str) -> tuple[str, ...]:
    """
    >>> words("fwd,bwd")
    ('fwd', 'bwd')
    """
    return tuple(word for word in text.split(",") if word)


def threads(text: str) -> tuple[int, ...]:
    counts = []
    for word in words(text):
        if word != "all" and not (word.isdigit() and int(word) > 0):
            raise ValueError(f"bench: --threads must be numbers or 'all', got {word!r}")
        counts.append(environment.all_threads() if word == "all" else int(word))
    if not counts:
        raise ValueError("bench: --threads must name at least one count, got none")
    return tuple(dict.fromkeys(counts))


def dtypes(text: str) -> tuple[torch.dtype, ...]:
    """
    >>> dtypes("float32,bfloat16")
    (torch.float32, torch.bfloat16)
    """
    found = []
    for word in words(text):
        dtype = getattr(torch, word, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"bench: --dtype must be names of floating torch dtypes, got {word!r}")
        found.append(dtype)
    return tuple(found)


def device(text: str) -> torch.device:
    try:
        chosen = torch.device(text)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda") or (chosen.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"bench: --device must be cpu, or cuda where torch sees a GPU, got {text!r} with torch {torch.__version__}")
    return chosen
