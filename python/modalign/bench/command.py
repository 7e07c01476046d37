"""`modalign bench`: list, machine, run, sweep, kernel, compare, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from rich.table import Table

from .._files import demand_writable, write_bytes
from . import arguments, comparison, environment, files, kernel, machine, registry, results, sizes, sweep, tables
from .run import Options, new_results, run_cases

app = typer.Typer(
    help="Measure ops, kernels and this machine; compare and report.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

CasesOption = Annotated[list[Path], typer.Option("--cases", help="a file of cases of your own, or a folder of such files; repeatable")]
ThreadsOption = Annotated[str, typer.Option(help="CPU thread counts, such as 1,all")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="such as float32,bfloat16; default: those of the case")]
DeviceOption = Annotated[str, typer.Option(help="cpu or cuda")]
ProvidersOption = Annotated[str, typer.Option(help="names out of `list`; default: all; the floor always runs")]
ProviderOption = Annotated[
    list[str], typer.Option("--provider", help="module:function of yours that takes the case's inputs; checked, then timed; repeatable")
]
SetOption = Annotated[list[str], typer.Option("--set", help="change sizes: N=20000,D=384; 4k is 4096")]
SeedOption = Annotated[int, typer.Option(min=0, max=2**62)]
QuickOption = Annotated[bool, typer.Option("--quick", help="small sizes, to see that everything works; no figures to quote")]
NoteOption = Annotated[str, typer.Option(help="kept in the JSON and shown under tables")]
OutOption = Annotated[Path | None, typer.Option(help="where the JSON goes")]


def _written(out: Path | None, gathered: dict[str, Any]) -> None:
    if out:
        results.write_results(out, gathered)
        arguments.console().print(f"written to {out}", highlight=False, markup=False)


def _with_own_providers(names: list[str], more: list[Path], providers: list[str], chosen: str) -> tuple[list[registry.Case], tuple[str, ...]]:
    """The cases, the user's functions added to them, and which providers are to run: those named, and the user's always."""
    cases = files.cases_of(names, more)
    for provider in dict.fromkeys(providers):
        registry.load_provider(provider, *cases)
    return cases, (*arguments.words(chosen, "--providers"), *providers) if chosen else ()


def _judge(rows: list[dict[str, Any]], providers: list[str]) -> None:
    """Exit code 1 where ours or a user's function is wrong or fails, or nothing was timed."""
    if any(row["status"] in ("mismatch", "failed") and (row["kind"] == "ours" or row["provider"] in providers) for row in rows):
        raise typer.Exit(1)
    if not any(row["status"] == "ok" and row["kind"] != "floor" for row in rows):
        raise ValueError("bench: at least one provider must run here, got none")


@app.command("list")
@arguments.plainly
def list_(
    cases: CasesOption = [],  # noqa: B006
    kernels: Annotated[bool, typer.Option("--kernels", help="the keys of all CUDA kernels too")] = False,
) -> None:
    """Cases with their sizes, passes and providers, and the kernels that `kernel` can run alone."""
    out = arguments.console()
    for declared in files.load_all(cases).values():
        out.print(f"[bold]{escape(declared.name)}[/bold]", highlight=False)
        points = "; ".join(" ".join(f"{key}={value}" for key, value in point.items()) for point in declared.grid)
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in declared.dtypes)
        out.print(f"  sizes   {points}\n  passes  {', '.join(declared.passes)}\n  dtypes  {dtypes}", highlight=False, markup=False)
        for one in registry.providers_of(declared).values():
            status, reason = one.standing()
            out.print(f"  {one.name}  ({one.kind})" + (f"  {status}: {reason}" if reason else ""), highlight=False, markup=False)
    known = kernel.names()
    cuda = [name for name, where in known.items() if where == "CUDA"]
    here = "" if torch.cuda.is_available() else "; they need a GPU, and torch sees none"
    out.print("[bold]kernels[/bold]\n  CPU   " + ", ".join(name for name, where in known.items() if where == "CPU"), highlight=False)
    out.print(f"  CUDA  {len(cuda)} compiled in{here}", highlight=False)
    if kernels:
        out.print("\n".join(f"        {name}" for name in cuda), highlight=False, markup=False)


@app.command("machine")
@arguments.plainly
def machine_(
    dtype: Annotated[str, typer.Option("--dtype")] = "float32,float64,bfloat16,float16",
    threads: ThreadsOption = "1,all",
    device: DeviceOption = "cpu",
    quick: QuickOption = False,
    out: OutOption = None,
) -> None:
    """Rates of matrix products per dtype and thread count, bandwidth of a copy, cost of a call: what every floor is made of."""
    options = Options(threads=arguments.threads(threads), device=arguments.device(device), quick=quick)
    demand_writable(out, "--out", ".json")
    with arguments.progress() as listen:
        figures = machine.measure_machine(arguments.dtypes(dtype), options.threads, options.device, quick=quick, listen=listen)
    gathered = new_results(options, environment.command_of_this_process(), figures, [])
    table = Table(title=environment.cpu_model() if options.device.type == "cpu" else torch.cuda.get_device_name(options.device), title_justify="left")
    for heading, justify in (("what", "left"), ("threads", "right"), ("median (20 % … 80 %)", "right")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for line in tables.machine_rows(figures):
        table.add_row(*line)
    arguments.console().print(table)
    _written(out, gathered)


@app.command(no_args_is_help=True)
@arguments.plainly
def run(
    case: Annotated[list[str], typer.Argument(help="cases out of `list`, or paths to files of cases")],
    set_: SetOption = [],  # noqa: B006
    dtype: DtypeOption = "",
    threads: ThreadsOption = "1,all",
    pass_: Annotated[str, typer.Option("--pass", help="out of fwd,bwd,fwd+bwd; default: those of the case")] = "",
    device: DeviceOption = "cpu",
    providers: ProvidersOption = "",
    provider: ProviderOption = [],  # noqa: B006
    where: Annotated[list[str], typer.Option(help="keep the case's sizes with these values: k=3")] = [],  # noqa: B006
    rounds: Annotated[int, typer.Option(min=1, help="interleaved rounds")] = 7,
    seed: SeedOption = 0,
    quick: QuickOption = False,
    memory: Annotated[bool | None, typer.Option(help="measure peak memory, each provider in a process of its own; default: unless --quick")] = None,
    profile: Annotated[Path | None, typer.Option(help="folder for one trace of every provider, for chrome://tracing or ui.perfetto.dev")] = None,
    machine_file: Annotated[Path | None, typer.Option("--machine", help="what `machine --out` wrote here, in place of measuring it again")] = None,
    cases: CasesOption = [],  # noqa: B006
    note: NoteOption = "",
    out: OutOption = None,
) -> None:
    """Measure every provider of every case, correctness first."""
    chosen, names = _with_own_providers(case, cases, provider, providers)
    options = Options(
        threads=arguments.threads(threads),
        passes=arguments.words(pass_, "--pass") if pass_ else (),
        dtypes=arguments.dtypes(dtype) if dtype else (),
        device=arguments.device(device),
        providers=names,
        where=sizes.assignments(where, "--where"),
        set=sizes.settings(chosen, set_),
        rounds=rounds,
        seed=seed,
        quick=quick,
        memory=not quick if memory is None else memory,
        note=note,
        profile=profile,
        machine=machine_file,
    )
    demand_writable(out, "--out", ".json")
    demand_writable(profile, "--profile")
    with arguments.progress() as listen:
        gathered = run_cases(chosen, options, environment.command_of_this_process(), listen)
    arguments.console().print(tables.screen(gathered))
    _written(out, gathered)
    _judge(gathered["rows"], provider)


@app.command("sweep", no_args_is_help=True)
@arguments.plainly
def sweep_(
    case: Annotated[str, typer.Argument(help="a case out of `list`")],
    sizes_: Annotated[str, typer.Argument(metavar="N=1k:64k", help="what grows; B,C=1k:64k lets both grow together")],
    points: Annotated[int, typer.Option(help="how many sizes, at equal ratios, both ends among them")] = sweep.DEFAULT_POINTS,
    set_: SetOption = [],  # noqa: B006
    dtype: DtypeOption = "",
    threads: ThreadsOption = "all",
    pass_: Annotated[str, typer.Option("--pass", help="out of fwd,bwd,fwd+bwd")] = "fwd",
    device: DeviceOption = "cpu",
    providers: ProvidersOption = "",
    provider: ProviderOption = [],  # noqa: B006
    limit: Annotated[float, typer.Option(min=0.001, help="seconds that one call may take")] = 30.0,
    rounds: Annotated[int, typer.Option(min=1, help="interleaved rounds")] = 5,
    seed: SeedOption = 0,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the sweep that --out holds")] = False,
    quick: QuickOption = False,
    cases: CasesOption = [],  # noqa: B006
    note: NoteOption = "",
    out: Annotated[Path | None, typer.Option(help="JSON; plots go beside it as .png and .html; default: sweep_CASE.json")] = None,
) -> None:
    """Time and memory of every provider against size: who takes over where, and how memory grows."""
    chosen, names = _with_own_providers([case], cases, provider, providers)
    if len(chosen) != 1:
        raise ValueError(f"bench sweep: CASE must be one case, got {[one.name for one in chosen]}")
    growing, smallest, largest = sizes.sweep_range(sizes_)
    options = Options(
        threads=arguments.threads(threads),
        passes=arguments.words(pass_, "--pass") if pass_ else (),
        dtypes=arguments.dtypes(dtype) if dtype else (),
        device=arguments.device(device),
        providers=names,
        set=sizes.settings(chosen, set_),
        rounds=rounds,
        seed=seed,
        quick=quick,
        note=note,
    )
    out = out or Path(f"sweep_{chosen[0].name}.json")
    demand_writable(out, "--out", ".json")
    with arguments.progress() as listen:
        gathered = sweep.sweep(
            chosen[0],
            growing,
            sizes.geometric(smallest, largest, points),
            options,
            environment.command_of_this_process(),
            out,
            limit=limit,
            resume=resume,
            listen=listen,
        )
    from . import plots, report

    write_bytes(out.with_suffix(".png"), plots.stacked(sweep.figures(gathered)))
    write_bytes(out.with_suffix(".html"), report.html_report([(out.name, gathered)]).encode())
    shown = arguments.console()
    shown.print(tables.screen(gathered))
    for one in gathered["sweep"]["crossovers"]:
        along, place = ",".join(growing), f"{one['pass']}, {one['dtype']}, {one['threads']} threads"
        shown.print(
            f"{one['faster_above']} is faster than {one['faster_below']} from {along} = {one['size']:.3g} ({place})", highlight=False, markup=False
        )
    for one in gathered["sweep"]["memory_exponents"]:
        shown.print(f"memory of {one['provider']}, {one['pass']}, {one['dtype']}: ∝ size^{one['exponent']:.2f}", highlight=False, markup=False)
    shown.print(f"written to {out}, {out.with_suffix('.png').name}, {out.with_suffix('.html').name}", highlight=False, markup=False)
    _judge(gathered["rows"], provider)


@app.command("kernel", no_args_is_help=True)
@arguments.plainly
def kernel_(
    name: Annotated[list[str], typer.Argument(help="kernels out of `list`")],
    at: Annotated[str, typer.Option("--sizes", help="rows and candidates")] = ",".join(map(str, kernel.SIZES)),
    width: Annotated[str, typer.Option(help="numbers in a row")] = "64",
    dtype: Annotated[str, typer.Option("--dtype", help="such as float32,bfloat16")] = "float32",
    rounds: Annotated[int, typer.Option(min=1)] = kernel.ROUNDS,
    seed: SeedOption = 0,
    out: OutOption = None,
) -> None:
    """One compiled kernel without torch around it beside the public op, on one thread: the difference is the overhead."""
    demand_writable(out, "--out", ".json")
    entries: list[dict[str, Any]] = []
    with arguments.progress() as listen:
        for one in dict.fromkeys(name):
            entries += kernel.measure_kernel(
                one,
                sizes=[sizes.size(text) for text in arguments.words(at, "--sizes")],
                width=sizes.size(width),
                dtypes=arguments.dtypes(dtype),
                rounds=rounds,
                seed=seed,
                listen=listen,
            )
    arguments.console().print(kernel.screen(entries))
    gathered = new_results(Options(seed=seed), environment.command_of_this_process(), None, [])
    _written(out, {**gathered, "kernels": entries})
    if any(entry["status"] == "mismatch" for entry in entries):
        raise typer.Exit(1)


@app.command("compare", no_args_is_help=True)
@arguments.plainly
def compare_(
    first: Annotated[Path, typer.Argument(help="results before")],
    second: Annotated[Path, typer.Argument(help="results after")],
    fail_above: Annotated[str, typer.Option(help="a row that is slower by more than this fails, unless it is undecided")] = "5%",
) -> None:
    """Which rows became slower. Exit code 1 where a decided one did by more than --fail-above, where one that had a time is wrong or fails now, and
    where there is nothing to compare."""
    threshold = comparison.percent(fail_above)
    compared = comparison.compare(results.read_results(first), results.read_results(second), threshold)
    arguments.console().print(comparison.screen(compared))
    if compared.slower or compared.broken:
        raise typer.Exit(1)
    if not compared.differences:
        raise ValueError(f"bench compare: the files must have a row with a time in common, got {first} and {second}: no row is in both")


@app.command("report", no_args_is_help=True)
@arguments.plainly
def report_(
    source: Annotated[list[Path], typer.Argument(metavar="RESULTS.json", help="what run, sweep, kernel or machine wrote")],
    out: Annotated[Path, typer.Option(help="the page")] = Path("report.html"),
) -> None:
    """One HTML page with everything inside: environment, targets, tables, roofline, who is missing and what was noisy."""
    from . import report

    demand_writable(out, "--out", ".html")
    pages = [(environment.public_path(path), results.read_results(path)) for path in dict.fromkeys(source)]
    write_bytes(out, report.html_report(pages).encode())
    arguments.console().print(f"written to {out}", highlight=False, markup=False)
