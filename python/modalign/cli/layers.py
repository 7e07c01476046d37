"""`modalign layers`: which layers of two encoders are most alike."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Table

from .._files import demand_writable, write_json
from ..data import load
from ..metrics import LayerSelection, select_layers
from ..metrics.alignment_score import ALIGNMENT_SCORES
from .threads import use_threads

__all__ = ["layers"]


def layers(
    data: Annotated[str, typer.Argument(metavar="DATA", help="a prepared set, or a folder of feature files, with layers of two modalities")],
    modalities: Annotated[str, typer.Option(help="which two, separated by a comma; default: the first two that have layers")] = "",
    metric: Annotated[str, typer.Option(help=f"one of {', '.join(ALIGNMENT_SCORES)}")] = "mutual_knn",
    k: Annotated[str, typer.Option(help="neighbours: a number, rice, sqrt or sturges")] = "rice",
    samples: Annotated[int, typer.Option(min=2, help="so many training items at most")] = 5000,
    seed: Annotated[int, typer.Option(min=0, help="of the split, whose training items alone are looked at, and of the sample")] = 0,
    permutations: Annotated[int, typer.Option(min=0, help="random orders to calibrate the best score against; published: 200")] = 0,
    out: Annotated[Path | None, typer.Option(help="heat map to write, .svg")] = None,
    json: Annotated[Path | None, typer.Option(help="results to write, .json")] = None,
    data_root: Annotated[Path | None, typer.Option(help="where `modalign prepare` left its sets; default $MODALIGN_DATA_ROOT")] = None,
    threads: Annotated[int, typer.Option(min=1, help="of torch")] = 1,
) -> None:
    """Show how alike every pair of layers of two encoders is, and pick the most similar one.

    Items that both modalities have, of the training part alone.
    """
    console = Console()
    demand_writable(out, "--out", ".svg")
    demand_writable(json, "--json", ".json")
    use_threads(threads)
    dataset = load(data, data_root)
    folder = dataset.folder.folder if dataset.folder is not None else None
    held = [name for name in dataset.modalities if folder is not None and (folder / f"{name}.layers.safetensors").is_file()]
    chosen = [name.strip() for name in modalities.split(",") if name.strip()] or held[:2]
    if len(chosen) != 2 or chosen[0] == chosen[1]:
        raise ValueError(f"modalities must be two different ones with layers, got {', '.join(chosen) or 'none'}; {data} has layers of {', '.join(held) or 'none'}")
    for name in chosen:
        if name not in held:
            raise ValueError(f"modalities must be among those with layers, got '{name}'; {data} has layers of {', '.join(held) or 'none'}")
    train = dataset.splits(seed).train
    both = torch.stack([dataset.present.get(name, torch.ones(len(dataset), dtype=torch.bool))[train] for name in chosen]).all(0)
    items = train[both]
    source, aligned = (dataset.layers(name)[items].float() for name in chosen)
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        found = select_layers(
            source,
            aligned,
            metric=metric,
            k=int(k) if k.isdigit() else k,
            samples=samples,
            seed=seed,
            permutations=permutations,
            progress=lambda what: bar.update(task, description=what),
        )
    neighbours = f", k = {found.k}" if found.k is not None else ""
    console.print(f"[bold]{escape(dataset.name)}[/bold]: {found.samples} of {len(train)} training items, {metric}{neighbours}", highlight=False)
    console.print(_table(found, *chosen))
    layer, other = found.pair
    console.print(f"most alike: layer {layer + 1} of {len(found.scores)} of {chosen[0]} and layer {other + 1} of {found.scores.shape[1]} of {chosen[1]}", highlight=False)
    if found.calibration is not None:
        calibration = found.calibration
        console.print(
            f"against {permutations} random orders: {calibration.score:.4f} where chance stays below {calibration.threshold:.4f}, p = {calibration.p_value:.4f}, "
            f"calibrated {calibration.calibrated:.4f}",
            highlight=False,
            soft_wrap=True,
        )
    if out is not None:
        found.plot(out, f"layer of {chosen[0]}", f"layer of {chosen[1]}")
        console.print(f"wrote {out}", markup=False, highlight=False, soft_wrap=True)
    if json is not None:
        write_json(
            json,
            {
                "dataset": dataset.name,
                "modalities": chosen,
                "metric": metric,
                "k": found.k,
                "samples": found.samples,
                "seed": seed,
                "pair": list(found.pair),
                "scores": found.scores.tolist(),
                "calibration": None if found.calibration is None else found.calibration._asdict(),
            },
        )
        console.print(f"wrote {json}", markup=False, highlight=False, soft_wrap=True)


def _table(found: LayerSelection, source: str, aligned: str) -> Table:
    """Layers of the source downwards, counted from 1; the pair that was picked stands out."""
    table = Table(title=f"{source} (down) and {aligned}", title_justify="left")
    table.add_column("layer", justify="right")
    for column in range(found.scores.shape[1]):
        table.add_column(str(column + 1), justify="right")
    for row, scores in enumerate(found.scores.tolist()):
        table.add_row(str(row + 1), *(f"[bold reverse]{score:.3f}[/]" if (row, column) == found.pair else f"{score:.3f}" for column, score in enumerate(scores)))
    return table
