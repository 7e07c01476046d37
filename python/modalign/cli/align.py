"""`modalign align`: learn heads on a data set and tell how well its modalities match."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ..data import load
from ..data.dataset import ROOT
from ..data.storage import write_bytes, write_json
from .experiment import Experiment, run_experiment, summary

__all__ = ["align"]

# Rows whose progress is counted: each trains once to choose the number of steps and once more with it.
TRAINED_ROWS = ("trained", "trained_random")
MODEL_FOLDER = "model"


def align(
    data: Annotated[str, typer.Argument(metavar="DATA", help="emoji-mini (picture, text) or furniture-mini (picture, text, points)")],
    out: Annotated[Path | None, typer.Option(help="folder for the model, the figures and the report; default runs/DATA")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="splits and initialisations; the saved model is the first one's")] = 3,
    first_seed: Annotated[int, typer.Option(min=0, help="first of the seeds; the stored features were reduced on the training items of seed 0")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="length of the training schedule; where to stop in it is chosen on validation items")] = 120,
    batch: Annotated[int, typer.Option(min=2, help="items per step")] = 256,
    width: Annotated[int | None, typer.Option(min=2, help="of the shared space; default 256, or the narrowest modality")] = None,
    hidden: Annotated[int, typer.Option(min=0, help="width of the non-linear branch of a head, 0 for purely affine heads")] = 256,
    temperature: Annotated[float, typer.Option(help="divides volumes and cosines")] = 0.07,
    pairwise_weight: Annotated[float, typer.Option(help="of the pairwise term beside the volume term")] = 1 / 3,
    threads: Annotated[int, typer.Option(min=1, help="of torch; a training step on these data is too small to gain from more than one")] = 1,
    data_root: Annotated[Path | None, typer.Option(help="folder that holds the data folder; default: the package's own")] = None,
) -> None:
    """Learn light heads on frozen features of paired modalities and tell how well they match.

    Leaves model/ (safetensors and JSON), results.json, curves.png, retrieved.png and report.html in the output folder.
    """
    console = Console()
    torch.set_num_threads(threads)
    folder = out or Path("runs") / data.replace("_", "-")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out must be a folder, got the file {folder}")
    dataset = load(data, data_root or ROOT)
    console.print(f"[bold]{dataset.name}[/bold]: {len(dataset)} items, {', '.join(dataset.modalities)}; licence {dataset.licence}")
    overrides = {"hidden": hidden, "temperature": temperature, "pairwise_weight": pairwise_weight} | ({"width": width} if width else {})

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    per_row = 2 * steps
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("preparing", total=seeds * len(TRAINED_ROWS) * per_row)

        def advance(seed: int, row: str, step: int) -> None:
            done = ((seed - first_seed) * len(TRAINED_ROWS) + TRAINED_ROWS.index(row) + 1) * per_row
            if step == 0:
                bar.update(task, completed=done)
            else:
                bar.update(task, description=f"seed {seed}: {'from CCA' if row == 'trained' else 'from random'}", advance=1)

        experiment = run_experiment(dataset, seeds=seeds, first_seed=first_seed, steps=steps, batch=batch, overrides=overrides, progress=advance)

    first = f" --first-seed {first_seed}" if first_seed else ""
    command = f"modalign align {data} --seeds {seeds}{first} --steps {steps} --batch {batch}"
    results = summary(experiment, command)
    for table in tables(results):
        console.print(table)
    console.print(
        "Figures of the test part, mean ± standard deviation over seeds. "
        "Steps, ridge and power were chosen on validation items of the training part; "
        "the test part was read once."
    )
    if any(result.transductive for result in experiment.seeds):
        console.print("Seeds other than 0 are transductive: the stored features were reduced with a basis fitted on the training items of seed 0.")
    for path in write_run(folder, experiment, results):
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)


def write_run(folder: Path, experiment: Experiment, results: dict) -> list[Path]:
    """Write everything that a run leaves, each file whole or not at all."""
    from .report import curves_figure, html_report, png, retrieved_figure

    seed = experiment.seeds[0].seed
    split = experiment.dataset.splits(seed)
    extra = {"dataset": experiment.dataset.name, "split_seed": seed, "mean_r10": results["rows"]["trained"]["mean_r10_by_seed"][0]}
    figures = {"curves.png": png(curves_figure(experiment))}
    if experiment.dataset.pictures is not None:
        figures["retrieved.png"] = png(retrieved_figure(experiment, split.test))
    page = html_report(results, figures).encode()  # everything is made before anything is written
    experiment.model.save_pretrained(folder / MODEL_FOLDER, extra=extra)
    write_json(folder / "results.json", results)
    for name, content in figures.items():
        write_bytes(folder / name, content)
    write_bytes(folder / "report.html", page)
    return [folder / name for name in (MODEL_FOLDER, "results.json", *figures, "report.html")]


def direction_pairs(results: dict) -> list[tuple[str, ...]]:
    """Directions two by two, each with its reverse."""
    pairs: dict[tuple[str, ...], list[str]] = {}
    for direction in results["rows"]["trained"]["directions"]:
        route, _, kind = direction.partition(", ")
        pairs.setdefault((kind, *sorted(route.split(" → "))), []).append(direction)
    return [tuple(pair) for pair in pairs.values()]


def cells(figures: dict) -> list[str]:
    """R@1, R@5, R@10 in percent and the median rank, with their spread."""
    recalls = [f"{100 * figures[k]['mean']:.1f} ± {100 * figures[k]['std']:.1f}" for k in ("r1", "r5", "r10")]
    return [*recalls, f"{figures['median']['mean']:.1f} ± {figures['median']['std']:.1f}"]


def tables(results: dict) -> list[Table]:
    """One table per direction, narrow enough for 80 columns."""
    made = []
    for direction in results["rows"]["trained"]["directions"]:
        table = Table(title=direction, title_justify="left")
        table.add_column("row", no_wrap=True)
        for heading in ("R@1", "R@5", "R@10", "median"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row, figures in results["rows"].items():
            label = {"cca": "CCA", "trained_random": "trained, random start"}.get(row, row)
            table.add_row(label, *cells(figures["directions"][direction]), style="bold" if row == "trained" else None)
        made.append(table)
    return made
