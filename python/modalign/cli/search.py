"""`modalign search`: words in, pictures out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from ..data import MiniLMTextEncoder, PairedDataset, load
from ..data.dataset import ROOT
from ..data.storage import write_bytes
from ..models import GramAligner
from ..models.gram_aligner import CONFIG_FILE, read_config
from .align import MODEL_FOLDER

__all__ = ["find", "search"]


def search(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="what `modalign align` wrote: its output folder, or the model folder in it")],
    words: Annotated[list[str], typer.Argument(metavar="WORDS", help="anything: the words need not occur in a name")],
    top: Annotated[int, typer.Option(min=1, help="how many pictures")] = 12,
    out: Annotated[Path | None, typer.Option(help="contact sheet to write; default MODEL/search.png")] = None,
    data_root: Annotated[Path | None, typer.Option(help="folder that holds the data folder; default: the package's own")] = None,
) -> None:
    """Embed words with the frozen text encoder and show the nearest pictures of the data set that the model was trained on."""
    console = Console()
    folder = model / MODEL_FOLDER if (model / MODEL_FOLDER / CONFIG_FILE).is_file() else model
    name = read_config(folder)["extra"].get("dataset")
    if name is None:
        raise ValueError(f"MODEL must have been trained on a data set with pictures, got none named in {folder / CONFIG_FILE}")
    sheet = out or model / "search.png"
    if sheet.suffix.lower() != ".png":
        raise ValueError(f"--out must end in .png, got {sheet}")
    dataset = load(name, data_root or ROOT)
    query = " ".join(words).strip()
    items, scores = find(GramAligner.from_pretrained(folder), dataset, query, top)
    from .report import contact_sheet, png

    console.print(f'"{query}" among {len(dataset)} pictures of {dataset.name}', markup=False, highlight=False)
    table = Table()
    for heading, side in (("", "right"), ("name", "left"), ("cosine", "right")):
        table.add_column(heading, justify=side)
    for place, (item, score) in enumerate(zip(items, scores, strict=True), 1):
        table.add_row(str(place), dataset.names[item], f"{score:.3f}")
    console.print(table)
    write_bytes(sheet, png(contact_sheet(dataset, items, scores, query)))
    console.print(f"wrote {sheet}", highlight=False, soft_wrap=True)


@torch.no_grad()
def find(model: GramAligner, dataset: PairedDataset, query: str, top: int) -> tuple[list[int], list[float]]:
    """The `top` items whose pictures lie nearest to the query's text: (items, cosines)."""
    if not query:
        raise ValueError("WORDS must not be empty, got ''")
    if dataset.encoders.get("text") != MiniLMTextEncoder.name or "picture" not in model.config.modalities or "text" not in model.config.modalities:
        raise ValueError(
            f"MODEL must align pictures with texts of {MiniLMTextEncoder.name}, got {list(model.config.modalities)} with {dataset.encoders}"
        )
    features = dataset.bases["text"].project(MiniLMTextEncoder()([query]))
    embedded = model.embed({"text": features, "picture": dataset.modalities["picture"]})
    similarity = (embedded["text"] @ embedded["picture"].T)[0]
    order = similarity.argsort(descending=True, stable=True)[: min(top, len(dataset))]
    return order.tolist(), similarity[order].tolist()
