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

from ..data import EncoderUnavailable
from . import environment, machine, measure, registry

P = ParamSpec("P")
R = TypeVar("R")


def plainly(command: Callable[P, R], program: str = "modalign bench") -> Callable[P, R]:
    """Errors that a user can act on become one line and exit code 1, Ctrl-C exit code 130; everything else keeps its traceback."""
    name = f"{program} {command.__name__.strip('_')}"
    told = f"{name.removeprefix('modalign ')}: "  # what errors begin with

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except ModuleNotFoundError as error:
            _say(f"{name}: {error}. If it belongs to the commands: pip install 'modalign[cli]'", "bold red")
            raise typer.Exit(1) from error
        except (ValueError, OSError, EncoderUnavailable) as error:
            _say(f"{name}: {str(error).removeprefix(told).removeprefix('bench: ')}", "bold red")
            raise typer.Exit(1) from error
        except (RuntimeError, MemoryError) as error:
            if not measure.is_out_of_memory(error):
                raise
            _say(f"{name}: the sizes must fit into memory, got {registry.one_line(error)}", "bold red")
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            _say(f"{name}: interrupted, no file is half-written", "yellow")
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


def words(text: str, flag: str) -> tuple[str, ...]:
    """
    >>> words("fwd,bwd,fwd", "--pass")
    ('fwd', 'bwd')
    >>> words(",", "--pass")
    Traceback (most recent call last):
    ValueError: bench: --pass must name at least one, got ','
    """
    found = tuple(dict.fromkeys(word for word in text.split(",") if word))
    if not found:
        raise ValueError(f"bench: {flag} must name at least one, got {text!r}")
    return found


def threads(text: str) -> tuple[int, ...]:
    most = environment.all_threads()
    counts = []
    for word in words(text, "--threads"):
        if word != "all" and not (word.isascii() and word.isdigit() and 0 < int(word) <= most):
            raise ValueError(f"bench: --threads must be 'all' or numbers up to the {most} cores that this process may use, got {word!r}")
        counts.append(most if word == "all" else int(word))
    return tuple(dict.fromkeys(counts))


def dtypes(text: str) -> tuple[torch.dtype, ...]:
    """
    >>> dtypes("float32,bfloat16")
    (torch.float32, torch.bfloat16)
    """
    known = {str(dtype).removeprefix("torch."): dtype for dtype in machine.DTYPES}
    found = []
    for word in words(text, "--dtype"):
        if word not in known:
            raise ValueError(f"bench: --dtype must be out of {sorted(known)}, got {word!r}")
        found.append(known[word])
    return tuple(found)


def device(text: str) -> torch.device:
    try:
        chosen = torch.device(text)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda") or (chosen.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"bench: --device must be cpu, or cuda where torch sees a GPU, got {text!r} with torch {torch.__version__}")
    return chosen
