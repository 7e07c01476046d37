"""`modalign search`: words, a picture or both in, pictures out."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from .. import ops
from .._files import demand_writable, write_bytes
from ..data import PairedDataset, load
from ..data.dataset import locate
from ..data.encoders import open_picture
from ..models import GramAligner
from ..models.gram_aligner import CONFIG_FILE, read_config
from .align import MODEL_FOLDER

__all__ = ["find", "search"]


def search(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="what `modalign align` wrote: its output folder, or the model folder in it")],
    words: Annotated[list[str] | None, typer.Argument(metavar="WORDS", help="anything: the words need not occur in a name")] = None,
    picture: Annotated[Path | None, typer.Option(help="a picture to search by, alone or together with words")] = None,
    target: Annotated[str, typer.Option(help="modality to search among; default: pictures, or what the query is not")] = "",
    top: Annotated[int, typer.Option(min=1, help="how many items")] = 12,
    out: Annotated[Path | None, typer.Option(help="contact sheet to write; default MODEL/search.png")] = None,
    data: Annotated[str | None, typer.Option(help="data set to search in, of the same modalities; default: the one the model was trained on")] = None,
    data_root: Annotated[Path | None, typer.Option(help="where `modalign prepare` left its sets; default: where the model found them")] = None,
) -> None:
    """Embed words, a picture or both with the frozen encoders and show the nearest items of the data set.

    One query is ranked by cosine; two at once by the volume that they span with an item, small means near.
    """
    console = Console()

    def warn(message: object) -> None:
        console.print(str(message), style="yellow", markup=False, highlight=False, soft_wrap=True)

    folder = model / MODEL_FOLDER if (model / MODEL_FOLDER / CONFIG_FILE).is_file() else model
    extra = read_config(folder)["extra"]
    source = data or extra.get("source", extra.get("dataset"))
    if source is None:
        raise ValueError(f"MODEL must have been trained on a named data set, got none in {folder / CONFIG_FILE}; name one with --data")
    sheet = out or model / "search.png"
    demand_writable(out, "--out", ".png")
    query = " ".join(words or []).strip()
    if not query and picture is None:
        raise ValueError("WORDS or --picture must be given, got neither")
    kept = extra.get("data_root", "")
    root = data_root or (kept if os.path.isdir(kept) else None)
    if not data:
        try:
            locate(source, root)
        except ValueError as error:
            below = f" below {root or kept}" if root or kept else ""
            raise ValueError(f"the data of MODEL must be where they were, got no '{source}'{below}; say where they are now with --data") from error
    aligner, dataset = GramAligner.from_pretrained(folder), load(source, root)
    if dataset.pictures is not None:
        demand_writable(sheet, "--out", ".png")
    changed = _changed(dataset, aligner.config.modalities, extra, "--data" if data else "the data of MODEL")
    if changed and not data:
        warn(f"the data of {dataset.name} are not those that the model was trained on: they have changed")
    for name, code in extra.get("encoder_code", {}).items():
        if dataset.encoder_code.get(name, code) != code:
            warn(f"the {name} features of {dataset.name} were made by other code of encoder '{dataset.encoders[name]}' than those that the model was trained on")
    inputs: dict[str, Any] = {_modality_of("text", aligner): query} if query else {}
    if picture is not None:
        inputs[_modality_of("picture", aligner)] = open_picture(picture)
    shown = " and ".join([f'"{query}"'] * bool(query) + [str(picture)] * (picture is not None))
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *rest: warn(message)
        features = {modality: dataset.encode(modality, [value]) for modality, value in inputs.items()}
    items, scores = find(aligner, dataset, features, top, target)
    kind = "cosine" if len(features) == 1 else "volume"

    console.print(f"{shown} among {len(dataset)} items of {dataset.name}", markup=False, highlight=False)
    table = Table()
    for heading, side in (("", "right"), ("name", "left"), (kind, "right")):
        table.add_column(heading, justify=side)
    for place, (item, score) in enumerate(zip(items, scores, strict=True), 1):
        table.add_row(str(place), escape(dataset.names[item]), f"{score:.3f}")
    console.print(table)
    if dataset.pictures is None:
        console.print(f"{dataset.name} has no pictures to show, so no contact sheet was written", markup=False, highlight=False)
        return
    from .report import contact_sheet, png

    write_bytes(sheet, png(contact_sheet(dataset, items, scores, f"{shown} ({kind})")))
    console.print(f"wrote {sheet}", markup=False, highlight=False, soft_wrap=True)


def _changed(dataset: PairedDataset, widths: Mapping[str, int], trained_on: Mapping[str, Any], whose: str) -> bool:
    """Whether the data differ from those that a model was trained on, as far as it knows them. Features of another encoder or width raise."""
    for name, width in widths.items():
        if name in dataset.modalities and (found := dataset.modalities[name].shape[1]) != width:
            raise ValueError(f"{whose} must have {name} features of {width} columns, as MODEL was trained on, got {found} columns in {dataset.name}")
    for name, encoder in trained_on.get("encoders", {}).items():
        if (found := dataset.encoders.get(name, encoder)) != encoder:
            wanted = f"{name} features of encoder '{encoder}', as MODEL was trained on"
            raise ValueError(f"{whose} must have {wanted}, got those of '{found}' in {dataset.name}")
    known = [name for name in widths if name in dataset.modalities]
    return "sha256" in trained_on and (known != list(widths) or dataset.select(known).digest() != trained_on["sha256"])


def _modality_of(kind: str, model: GramAligner) -> str:
    """The modality of a model that words or a picture belong to: "text" itself or one of its languages, "picture" itself or another encoder's."""
    fitting = [name for name in model.config.modalities if name == kind or name.startswith(f"{kind}_")]
    if not fitting:
        raise ValueError(f"MODEL must align a modality '{kind}' to be searched by one, got {list(model.config.modalities)}")
    return kind if kind in fitting else fitting[0]


@torch.no_grad()
def find(model: GramAligner, dataset: PairedDataset, query: Mapping[str, Tensor], top: int, target: str = "") -> tuple[list[int], list[float]]:
    """The `top` items nearest to a query: (items, scores).

    query : features [1, D] by modality. Of one modality, items are ranked by the cosine with their `target` vector, scores falling; of several, by the
        volume that the query's vectors span with it, scores rising.
    target : modality of the items; default "picture" or another encoder's, unless the query is that picture alone: then the first other one
    """
    names = list(model.config.modalities)
    if not target:
        pictures = [name for name in names if name == "picture" or name.startswith("picture_")]
        shown = "picture" if "picture" in pictures else next(iter(pictures), "")
        others = [name for name in names if name not in query]
        target = shown if shown and list(query) != [shown] else next(iter(others), "")
        if not target:
            raise ValueError(f"find: target must be given where the query has all modalities, got a query of {list(query)}")
    unknown = [name for name in (target, *query) if name not in names or name not in dataset.modalities]
    if unknown or not query:
        raise ValueError(f"find: query and target must be modalities of model and data set out of {names}, got {unknown or 'no query'}")
    candidates = dataset.available(target, torch.arange(len(dataset)))
    embedded = {name: model.embed({name: features})[name] for name, features in query.items()}
    items = model.embed({target: dataset.modalities[target][candidates]})[target]
    if len(query) == 1:
        scores = items @ next(iter(embedded.values()))[0]
    else:
        scores = ops.gram_volume(items, list(embedded.values()))[:, 0]
    order = scores.argsort(descending=len(query) == 1, stable=True)[: min(top, len(candidates))]
    return candidates[order].tolist(), scores[order].tolist()
