"""Figures and the self-contained HTML report of an alignment run."""

from __future__ import annotations

import base64
import html
import io
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from .experiment import Experiment

__all__ = ["contact_sheet", "curves_figure", "html_report", "markdown_table", "png", "retrieved_figure"]

COLOURS = {"trained": "#1b6ca8", "trained_random": "#c8553d"}
LABELS = {
    "chance": "chance",
    "untrained": "untrained",
    "cca": "CCA",
    "start": "start",
    "trained": "trained",
    "trained_random": "trained, random start",
}
HIT, MISS = "#2a9d4a", "#bbbbbb"
SHOWN_QUERIES, SHOWN_RESULTS = 8, 6


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def curves_figure(experiment: Experiment) -> Figure:
    """Training loss and validation score against steps; a dot marks where each seed's run was stopped."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    loss_axes, score_axes = figure.subplots(1, 2)
    for row, colour in COLOURS.items():
        for number, result in enumerate(experiment.seeds):
            history = result.histories[row]
            label = LABELS[row] if number == 0 else None
            loss_axes.plot(range(1, len(history.loss) + 1), history.loss, color=colour, alpha=0.7, linewidth=1, label=label)
            steps, scores = zip(*sorted(history.evaluated.items()), strict=True)
            score_axes.plot(steps, scores, color=colour, alpha=0.7, linewidth=1, label=label)
            score_axes.plot(history.best_step, history.evaluated[history.best_step], "o", color=colour, markersize=5)
    loss_axes.set(xlabel="step", ylabel="training loss")
    score_axes.set(xlabel="step", ylabel="validation R@10 + R@1 / 10")
    for axes in (loss_axes, score_axes):
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _tile(axes: Any, picture: Any, title: str, colour: str) -> None:
    axes.imshow(picture, interpolation="lanczos")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=2)
    axes.set_title(_short(title, 20), fontsize=7, pad=2)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def retrieved_figure(experiment: Experiment, test: Tensor) -> Figure:
    """What the trained model of the first seed finds among the test items: text → picture. The queries are spread evenly over the test part, not
    picked.
    """
    data, model = experiment.dataset, experiment.model
    query_name, picture_name = next((name for name in data.modalities if name != "picture"), ""), "picture"
    if "text" in data.modalities:
        query_name = "text"
    with torch.no_grad():
        embedded = model.embed({name: data.modalities[name][test] for name in (query_name, picture_name)})
    chosen = torch.linspace(0, len(test) - 1, min(SHOWN_QUERIES, len(test))).round().long()
    order = (embedded[query_name][chosen] @ embedded[picture_name].T).argsort(dim=1, descending=True, stable=True)[:, :SHOWN_RESULTS]
    figure = Figure(figsize=(1.25 * (SHOWN_RESULTS + 2), 1.35 * len(chosen)), layout="constrained")
    grid = figure.subplots(len(chosen), SHOWN_RESULTS + 2, squeeze=False, width_ratios=[1.6] + [1] * (SHOWN_RESULTS + 1))
    for line, position in enumerate(chosen.tolist()):
        item = int(test[position])
        words = grid[line][0]
        words.axis("off")
        words.text(1, 0.5, _wrapped(data.names[item]), ha="right", va="center", fontsize=9, transform=words.transAxes)
        _tile(grid[line][1], data.picture(item), "wanted", "black")
        for axes, place in zip(grid[line][2:], order[line].tolist(), strict=False):
            found = int(test[place])
            _tile(axes, data.picture(found), data.names[found], HIT if data.groups[found] == data.groups[item] else MISS)
        for axes in grid[line][2 + order.shape[1] :]:
            axes.axis("off")
    return figure


def _wrapped(text: str) -> str:
    import textwrap

    return textwrap.fill(_short(text, 60), 18)


def contact_sheet(data: Any, items: list[int], scores: list[float], title: str) -> Figure:
    """Pictures of items with names and scores, six to a row."""
    columns = min(6, len(items))
    rows = -(-len(items) // columns)
    figure = Figure(figsize=(1.5 * columns, 1.75 * rows + 0.4), layout="constrained")
    figure.suptitle(_short(title, 80), fontsize=11)
    grid = figure.subplots(rows, columns, squeeze=False)
    for place, axes in enumerate(grid.flat):
        if place < len(items):
            _tile(axes, data.picture(items[place]), data.names[items[place]], MISS)
            axes.set_xlabel(f"{scores[place]:.2f}", fontsize=7)
        else:
            axes.axis("off")
    return figure


def markdown_table(results: dict[str, Any]) -> str:
    """The table as documentation quotes it: `python -m modalign.cli.report results.json`."""
    from .align import cells, direction_pairs

    blocks = []
    for pair in direction_pairs(results):
        lines = ["| row | " + " | ".join(f"{direction} {heading}" for direction in pair for heading in ("R@1", "R@5", "R@10", "median")) + " |"]
        lines.append("|---|" + "---:|" * (4 * len(pair)))
        for row, figures in results["rows"].items():
            lines.append(f"| {LABELS[row]} | " + " | ".join(cell for direction in pair for cell in cells(figures["directions"][direction])) + " |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}tr.best{font-weight:600}img{max-width:100%}
code{background:#f4f4f4;padding:.1rem .3rem}.note{color:#666}"""


def html_report(results: dict[str, Any], figures: dict[str, bytes]) -> str:
    """One page with everything inside: no script, no link to another file."""
    from .align import cells, direction_pairs

    data, escape = results["dataset"], html.escape
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<title>{escape(data['name'])}: alignment</title><style>{STYLE}</style>",
        f"<h1>{escape(data['name'])}: how well do the modalities match?</h1>",
        f"<p>{data['items']} items; {data['train']} to train on, of which {data['validation']} for validation; {data['test']} to test. "
        f"Made by <code>{escape(results['command'])}</code>.</p>",
    ]
    for pair in direction_pairs(results):
        heads = "".join(f"<th colspan=4>{escape(direction)}</th>" for direction in pair)
        parts.append(f"<table><tr><th></th>{heads}</tr><tr><th>row</th>{'<th>R@1<th>R@5<th>R@10<th>median' * len(pair)}</tr>")
        for row, figures_of_row in results["rows"].items():
            content = "".join(f"<td>{cell}</td>" for direction in pair for cell in cells(figures_of_row["directions"][direction]))
            parts.append(
                f"<tr{' class=best' if row == 'trained' else ''}><td title='{escape(figures_of_row['what'])}'>{LABELS[row]}</td>{content}</tr>"
            )
        parts.append("</table>")
    parts.append("<p class=note>" + "; ".join(f"<b>{LABELS[row]}</b>: {escape(entry['what'])}" for row, entry in results["rows"].items()) + ".</p>")
    parts.append(
        "<p class=note>Recall in percent and median rank (1 is best) on the test part, mean ± standard deviation over seeds. "
        "A hit is any candidate of the same caption. "
        "Steps, ridge and power were chosen on validation items; the test part was read once.</p>"
    )
    if any(seed["transductive"] for seed in results["seeds"]):
        parts.append(
            "<p class=note>Seeds other than 0 are transductive: "
            "the stored features were reduced with a basis fitted on the training items of seed 0, "
            "among which are some of their test items (without pairing).</p>"
        )
    captions = {"curves.png": "Training", "retrieved.png": "What is retrieved"}
    for name, content in figures.items():
        parts.append(f"<h2>{captions.get(name, name)}</h2><img alt='{name}' src='data:image/png;base64,{base64.b64encode(content).decode()}'>")
    parts.append(
        "<h2>Seeds</h2><table><tr><th>seed<th>CCA<th>steps<th>steps, random start<th>mean R@10, CCA<th>trained<th>trained, random start</tr>"
    )
    for number, seed in enumerate(results["seeds"]):
        chosen = seed["chosen"]
        scores = "".join(f"<td>{100 * results['rows'][row]['mean_r10_by_seed'][number]:.1f}</td>" for row in ("cca", "trained", "trained_random"))
        closed = f"ridge {chosen['cca']['ridge']}, power {chosen['cca']['power']}"
        parts.append(f"<tr><td>{seed['seed']}<td>{closed}<td>{chosen['trained']['steps']}<td>{chosen['trained_random']['steps']}{scores}</tr>")
    facts = results["environment"]
    environment = f"modalign {facts['modalign']['version']}, torch {facts['torch']}, python {facts['python']}, {facts['cpu']['model']}, {facts['threads']} threads"
    parts.append(f"</table><p class=note>{escape(environment)}. Data: {escape(data['licence'])}.</p></html>")
    return "\n".join(parts)


if __name__ == "__main__":
    import json
    import sys
    from pathlib import Path

    print(markdown_table(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
