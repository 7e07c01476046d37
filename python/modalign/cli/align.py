"""`modalign align`: learn heads on a data set and tell how well its modalities match."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from .. import __version__
from .._files import demand_writable, write_bytes, write_json
from ..data import load
from ..data.dataset import ROOT, locate
from ..models.data_parallel import rank_of, ranks_of
from .experiment import Experiment, RunStore, check_parts, run_experiment
from .prepare import COLUMNS
from .processes import launch, under_torchrun
from .settings import AlignSettings, read_settings
from .summary import summary
from .threads import use_threads

__all__ = ["MODEL_FOLDER", "PROGRESS_FOLDER", "align"]

MODEL_FOLDER = "model"
PROGRESS_FOLDER = "progress"
USUAL = AlignSettings()
FEW = 20  # validation items, below which a choice made on them is said to be coarse


def _words(name: str, text: str) -> tuple[int | str, ...]:
    """"100,200,all" as (100, 200, "all")."""
    if not text.strip(" ,"):
        raise ValueError(f"{name} must name at least one, got {text!r}")
    return tuple(int(word) if re.fullmatch(r"-?\d+", word) else word for word in (part.strip() for part in text.split(",")) if word)


def align(
    context: typer.Context,
    data: Annotated[str | None, typer.Argument(metavar="DATA", help="emoji-mini, furniture-mini, a prepared set, or a folder of feature files")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with any of the settings below; flags overrule it")] = None,
    out: Annotated[Path | None, typer.Option(help="folder for the model, the figures and the report; default runs/DATA")] = None,
    modalities: Annotated[str, typer.Option(help="which, separated by commas, the first is the anchor; default: the data set's")] = "",
    pairs: Annotated[str, typer.Option(help="numbers of training pairs, such as 100,200,all; the model is that of the last")] = "all",
    loss: Annotated[str, typer.Option(help="gram (volume and pairs), volume, clip or siglip (pairs alone)")] = USUAL.loss,
    heads: Annotated[str, typer.Option(help="linear, lowrank or mlp")] = USUAL.heads,
    seeds: Annotated[int, typer.Option(min=1, help="splits and initialisations; the saved model is the first one's")] = USUAL.seeds,
    first_seed: Annotated[int, typer.Option(min=0, help="first of the seeds; stored features may have been reduced on the training items of seed 0")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="length of the training schedule; where to stop in it is chosen on validation items")] = USUAL.steps,
    batch: Annotated[int, typer.Option(min=2, help="items per step")] = USUAL.batch,
    patience: Annotated[int, typer.Option(min=0, help="stop when so many evaluations in a row (one each 10 steps) bring nothing better; 0 never")] = 0,
    width: Annotated[int, typer.Option(min=0, help="of the shared space; 0: 256, or the narrowest modality")] = 0,
    hidden: Annotated[int, typer.Option(min=0, help="width of the branch of an mlp head, rank of a lowrank one; 0: the usual")] = USUAL.hidden,
    reduce: Annotated[int, typer.Option(min=2, help="features wider than this are reduced to so many principal components of the training items")] = 256,
    temperature: Annotated[float, typer.Option(help="divides volumes and cosines")] = USUAL.temperature,
    pairwise_weight: Annotated[float, typer.Option(help="of the pairwise term beside the volume term of gram")] = USUAL.pairwise_weight,
    learn_temperature: Annotated[bool, typer.Option("--learn-temperature", help="learn the temperature too, from there")] = USUAL.learn_temperature,
    structure: Annotated[
        float, typer.Option(help="weight of the STRUCTURE regularizer (published: 10): trains with and without it; the saved model is one with it")
    ] = USUAL.structure,
    structure_temperature: Annotated[float, typer.Option(help="of its neighbourhoods; higher where the features are nearly orthogonal")] = USUAL.structure_temperature,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = USUAL.device,
    threads: Annotated[int, typer.Option(min=1, help="of torch; a training step on small data gains nothing from more than one")] = 1,
    nproc: Annotated[int, typer.Option(min=1, help="processes that share every batch, on the GPUs in order with --device cuda; not under torchrun")] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="go on with a run that was interrupted or killed; the result is the same bit for bit")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="throw away an unfinished run that is in the output folder")] = False,
    data_root: Annotated[Path | None, typer.Option(help="where `modalign prepare` left its sets; default $MODALIGN_DATA_ROOT")] = None,
) -> None:
    """Learn light heads on frozen features of paired modalities and tell how well they match.

    Leaves model/ (safetensors and JSON), config.toml, results.json, figures and report.html in the output folder.
    """
    given = {
        name: value
        for name, value in context.params.items()
        if name not in ("config", "resume", "restart") and value is not None and context.get_parameter_source(name).name != "DEFAULT"
    }
    given |= {name: _words(name, given[name]) for name in ("modalities", "pairs") if name in given}
    beside, settings = read_settings(config, given)
    if "data" not in beside:
        raise ValueError("DATA must be given, as an argument or in the configuration file, got none")
    if resume and restart:
        raise ValueError("resume and restart must not be given together: one goes on with an unfinished run, the other throws it away")
    asked = (beside | {"threads": beside.get("threads", threads)}, settings, config, resume, restart)
    if dist.is_torchelastic_launched():
        if "nproc" in beside:
            raise ValueError(f"nproc must be left out under torchrun, which says how many processes there are, got {beside['nproc']}")
        under_torchrun(settings.device, run, *asked)
    elif beside.get("nproc", 1) > 1:
        launch(beside["nproc"], settings.device, run, *asked)
    else:
        run(*asked)


def run(
    beside: dict[str, Any], settings: AlignSettings, config: Path | None, resume: bool, restart: bool, *, process_group: dist.ProcessGroup | None = None
) -> None:
    """The command with its arguments read. Of several processes the first speaks and writes."""
    first = rank_of(process_group) == 0
    console = Console(quiet=not first)
    source = str(beside["data"])
    folder = Path(beside.get("out") or Path("runs") / Path(source).name.replace("_", "-"))
    if first:
        demand_writable(folder, "--out")
    use_threads(beside["threads"])
    dataset = load(source, beside.get("data_root"))
    chosen = check_parts(dataset, settings)
    held_out = min(len(chosen.splits(settings.first_seed, None if p == "all" else int(p)).validation) for p in settings.pairs)
    lacking = "".join(f"; {name} of {int(mask.sum())}" for name, mask in chosen.present.items())
    licence = escape(dataset.licence or "not stated")
    console.print(f"[bold]{escape(dataset.name)}[/bold]: {len(dataset)} items, {', '.join(chosen.modalities)}{lacking}; licence {licence}")

    versions = {"modalign": __version__, "torch": torch.__version__}
    machine = {"threads": torch.get_num_threads(), "nproc": ranks_of(process_group)}  # either changes the order of sums, and so the last bits
    identity = {"settings": settings.as_dict(), "data": chosen.digest(), **machine, **versions}
    if held_out < FEW:
        console.print(f"only {held_out} validation items, so what is chosen on them (steps, ridge, power) is chosen by little", style="yellow")
    store = RunStore(folder / PROGRESS_FOLDER, identity, resume=resume, restart=restart) if first else None
    if store and resume and not store.resumed:
        console.print(f"no unfinished run in {store.folder}: starting", markup=False, highlight=False, soft_wrap=True)
    with Progress(*COLUMNS, console=console) as bar:
        task = bar.add_task("preparing", total=None)

        def advance(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        try:
            experiment = run_experiment(dataset, settings, progress=advance, store=store, process_group=process_group)
        except KeyboardInterrupt:
            kept = folder / PROGRESS_FOLDER
            console.print(f"kept what is done in {kept}; the same command with --resume goes on", markup=False, highlight=False, soft_wrap=True)
            raise
    if store is None:
        return

    results = summary(experiment, _command(source, settings, experiment.processes))
    for table in tables(results):
        console.print(table)
    spread = "mean ± standard deviation over seeds; ΔR@10: difference to CCA within a seed" if settings.seeds > 1 else "one seed, so no spread is known"
    console.print(f"Figures of the test part, {spread}. Steps, ridge and power were chosen on validation items; the test part was read once.")
    if any(result.transductive for result in experiment.seeds):
        console.print("Seeds other than 0 are transductive: the stored features were reduced with a basis fitted on the training items of seed 0.")
    if "basis" in results["dataset"]:
        console.print(f"Fewer pairs: {results['dataset']['basis']}.")
    for path in write_run(folder, experiment, results, beside, config):
        console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
    store.remove()


def _command(source: str, settings: AlignSettings, processes: int) -> str:
    """The command that repeats a run: data by name, and whatever differs from the usual."""
    changed = []
    for name, value in settings.as_dict().items():
        if value != USUAL.as_dict()[name] or name in ("seeds", "steps", "batch"):
            shown = "" if value is True else " " + (",".join(map(str, value)) if isinstance(value, list) else str(value))
            changed.append(f"--{name.replace('_', '-')}{shown}")
    if processes > 1:
        changed.append(f"--nproc {processes}")
    return " ".join(["modalign align", Path(source).name, *changed])


def _found_again(source: str, data_root: str | Path | None) -> dict[str, str]:
    """What `search` opens the data set by, from whatever directory: its name, with the root where that is not the package; or its whole path."""
    folder, root = locate(source, data_root)
    if root is None:
        return {"source": str(folder.resolve())}
    return {"source": source} | ({} if root == ROOT else {"data_root": str(root.resolve())})


def write_run(folder: Path, experiment: Experiment, results: dict[str, Any], beside: dict[str, Any], config: Path | None) -> list[Path]:
    """Write everything that a run leaves, each file whole or not at all. A configuration file that was given is never written over."""
    from .report import Retrieved, confusion_figure, curve_figure, curves_figure, html_report, png, retrieved_figure

    data = experiment.dataset
    extra = {
        "dataset": data.name,
        **_found_again(str(beside["data"]), beside.get("data_root")),
        "sha256": results["dataset"]["sha256"],
        "encoders": {name: encoder for name, encoder in data.encoders.items() if name in data.modalities},
        "encoder_code": {name: code for name, code in data.encoder_code.items() if name in data.modalities},
        "split_seed": experiment.settings.first_seed,
        "mean_r10": results["rows"]["trained"]["mean_r10_by_seed"][0],
    }
    retrieved = Retrieved(experiment)
    confusions = retrieved.confusions()
    figures = {"curves.png": png(curves_figure(experiment))}
    if len(results["curve"]) > 1:
        figures["pairs.png"] = png(curve_figure(results))
    if data.pictures is not None and len(retrieved.items):
        figures["retrieved.png"] = png(retrieved_figure(retrieved))
        if confusions:
            figures["confusions.png"] = png(confusion_figure(retrieved, confusions))
    page = html_report(results, figures, confusions, data.names).encode()  # everything is made before anything is written
    for stale in set(CAPTIONED) - set(figures):
        (folder / stale).unlink(missing_ok=True)
    experiment.model.save_pretrained(folder / MODEL_FOLDER, extra=extra)
    named = "".join(f"{name} = {json.dumps(str(beside[name]))}\n" for name in ("data", "data_root") if name in beside)
    if config is None or config.resolve() != (folder / "config.toml").resolve():
        write_bytes(folder / "config.toml", (named + experiment.settings.as_toml()).encode())
    write_json(folder / "results.json", results)
    for name, content in figures.items():
        write_bytes(folder / name, content)
    write_bytes(folder / "report.html", page)
    return [folder / name for name in (MODEL_FOLDER, "config.toml", "results.json", *figures, "report.html")]


JOINT_COLUMNS = 4  # side by side in 80 columns
CAPTIONED = ("curves.png", "pairs.png", "retrieved.png", "confusions.png")


def tables(results: dict[str, Any]) -> list[Table]:
    """One table per direction, narrow enough for 80 columns; joint scores side by side; the curve over numbers of pairs."""
    from .report import HEADINGS, LABELS, cells, curve_cells, direction_pairs, joint_table, titled

    def made(title: str, headings: list[str], lines: list[list[str]], bold: str = "") -> Table:
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        lines = [[cell.replace(" ± ", "±") for cell in line] for line in lines]
        for number, heading in enumerate(headings):
            # headings may be broken at their spaces, figures never
            table.add_column(heading, justify="right" if number else "left", min_width=max(len(line[number]) for line in lines))
        for line in lines:
            table.add_row(*line, style="bold" if line[0] == bold else None)
        return table

    found = []
    for direction in (direction for pair in direction_pairs(results) for direction in pair):
        lines = [[LABELS[row], *cells(figures["directions"][direction], row)] for row, figures in results["rows"].items()]
        found.append(made(titled(results, direction), ["row", *HEADINGS], lines, LABELS["trained"]))
    headings, lines = joint_table(results)
    for route in dict.fromkeys(line[1] for line in lines):
        for first in range(2, len(headings), JOINT_COLUMNS):
            here = slice(first, first + JOINT_COLUMNS)
            chosen = [[line[0], *line[here]] for line in lines if line[1] == route]
            found.append(made(f"{route}: joint scores beside single pairs, R@10", [headings[0], *headings[here]], chosen, LABELS["trained"]))
    if len(results["curve"]) > 1:
        rows = [LABELS[row] for row in results["rows"]]
        headings, lines = ["pairs", *rows, "trained − CCA"], curve_cells(results)
        for first in range(1, len(headings), JOINT_COLUMNS):
            here = slice(first, first + JOINT_COLUMNS)
            chosen = [[line[0], *line[here]] for line in lines]
            found.append(made("mean R@10 by number of training pairs", [headings[0], *headings[here]], chosen))
    return found
