"""The command behind benchmarks/run.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from . import environment, results, tables
from .registry import load_cases, providers_of
from .run import Options, run_file


def _pairs(items: list[str], flag: str) -> dict[str, Any]:
    """["k=3", "N=4,D=8"] as numbers where they are numbers."""
    pairs: dict[str, Any] = {}
    for item in ",".join(items).split(",") if items else []:
        key, equals, value = item.partition("=")
        if not equals:
            raise typer.BadParameter(f"{flag} must be written as name=value, got {item!r}")
        try:
            pairs[key] = int(value)
        except ValueError:
            try:
                pairs[key] = float(value)
            except ValueError:
                pairs[key] = value
    return pairs


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(",") if word)


def _threads(text: str) -> tuple[int, ...]:
    counts = []
    for word in _words(text):
        if word != "all" and not (word.isdigit() and int(word) > 0):
            raise typer.BadParameter(f"--threads must be numbers or 'all', got {word!r}")
        counts.append(environment.all_threads() if word == "all" else int(word))
    return tuple(dict.fromkeys(counts))


def _dtypes(text: str) -> tuple[torch.dtype, ...]:
    found = []
    for word in _words(text):
        dtype = getattr(torch, word, None)
        if not isinstance(dtype, torch.dtype):
            raise typer.BadParameter(f"--dtypes must be names of torch dtypes, got {word!r}")
        found.append(dtype)
    return tuple(found)


def make_app(folder: Path) -> typer.Typer:
    """`run NAME`, NAME being <folder>/cases/NAME.py, <folder>/NAME/cases.py or a path to a file of cases."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

    def file_of(name: str) -> Path:
        for path in (folder / "cases" / f"{name}.py", folder / name / "cases.py", Path(name)):
            if path.is_file():
                return path
        known = sorted([path.stem for path in folder.glob("cases/*.py")] + [path.parent.name for path in folder.glob("*/cases.py")])
        raise typer.BadParameter(f"name must be one of {known} or a file, got {name!r}")

    @app.command()
    def run(
        name: Annotated[str, typer.Argument(help="file of cases, without .py")],
        threads: Annotated[str, typer.Option(help="CPU thread counts, such as 1,all")] = "1,all",
        passes: Annotated[str, typer.Option(help="out of fwd,bwd,fwd+bwd")] = "",
        dtypes: Annotated[str, typer.Option(help="such as float32,bfloat16; default: those of the case")] = "",
        device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
        providers: Annotated[str, typer.Option(help="default: all; the floor always runs")] = "",
        case: Annotated[str, typer.Option(help="names of cases in the file; default: all")] = "",
        where: Annotated[list[str], typer.Option(help="keep grid points with these values: k=3")] = [],  # noqa: B006
        set: Annotated[list[str], typer.Option(help="change sizes: B=512,D=64")] = [],  # noqa: B006
        rounds: Annotated[int, typer.Option(min=1, help="interleaved rounds")] = 7,
        seed: Annotated[int, typer.Option()] = 0,
        quick: Annotated[bool, typer.Option("--quick", help="small sizes, to see that everything works; no figures to quote")] = False,
        memory: Annotated[
            bool | None, typer.Option(help="measure peak memory, each provider in a process of its own; default: unless --quick")
        ] = None,
        note: Annotated[str, typer.Option(help="kept in the JSON and shown under tables")] = "",
        out: Annotated[Path | None, typer.Option(help="where the JSON goes")] = None,
        list_: Annotated[bool, typer.Option("--list", help="show cases and providers, run nothing")] = False,
    ) -> None:
        """Measure every provider of every case, correctness first."""
        console = Console(width=None if Console().is_terminal else 220)
        path = file_of(name)
        if list_:
            for declared in load_cases(path):
                console.print(f"[bold]{declared.name}[/bold]  {len(declared.grid)} sizes; passes {', '.join(declared.passes)}")
                for one in providers_of(declared).values():
                    console.print(f"  {one.name}  ({one.kind}){'  unavailable: ' + reason if (reason := one.unavailable()) else ''}", highlight=False)
            return
        options = Options(
            threads=_threads(threads),
            passes=_words(passes),
            dtypes=_dtypes(dtypes),
            device=torch.device(device),
            providers=_words(providers),
            cases=_words(case),
            where=_pairs(where, "--where"),
            set=_pairs(set, "--set"),
            rounds=rounds,
            seed=seed,
            quick=quick,
            memory=not quick if memory is None else memory,
            note=note,
        )
        command_line = environment.public_command(environment.arguments_of_this_process())
        if console.is_terminal:
            with console.status("starting") as status:
                gathered = run_file(path, options, command_line, status.update)
        else:
            gathered = run_file(path, options, command_line, lambda text: print(text, file=sys.stderr, flush=True))
        console.print(tables.screen(gathered))
        if out:
            results.write_results(out, gathered)
            console.print(f"written to {out}", highlight=False)
        if any(row["status"] == "mismatch" and row["kind"] == "ours" for row in gathered["rows"]):
            raise typer.Exit(1)

    return app
