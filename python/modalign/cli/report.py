"""Figures and the self-contained HTML report of an alignment run."""

from __future__ import annotations

import base64
import html
import io
import statistics
from typing import Any

import torch
from matplotlib.figure import Figure

from ..data import PairedDataset
from ..models.gram_aligner import items_with
from .experiment import Experiment
from .summary import BASELINE

__all__ = [
    "Retrieved",
    "confusion_figure",
    "contact_sheet",
    "curve_figure",
    "curves_figure",
    "html_report",
    "joint_table",
    "markdown_table",
    "png",
    "retrieved_figure",
]

DASH = "–"

COLOURS = {"trained": "#1b6ca8", "trained_random": "#c8553d", "structure": "#3d8f6b", "structure_random": "#b58a1b"}
LABELS = {
    "chance": "chance",
    "untrained": "untrained",
    "cca": "CCA",
    "start": "start",
    "trained": "trained",
    "trained_random": "trained, random start",
    "structure": "with STRUCTURE",
    "structure_random": "with STRUCTURE, random start",
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
    for row, colour in ((row, COLOURS[row]) for row in experiment.training):
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


def curve_figure(results: dict[str, Any]) -> Figure:
    """Mean R@10 against the number of training pairs, with the standard deviation over seeds."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    counts = [point["train"] for point in results["curve"]]
    for row, colour in {"cca": "#666666", **COLOURS, "chance": "#bbbbbb"}.items():
        if row not in results["rows"]:
            continue
        scores = [100 * point["rows"][row]["mean_r10"] for point in results["curve"]]
        spread = [100 * _deviation(point["rows"][row]["mean_r10_by_seed"]) for point in results["curve"]]
        axes.errorbar(counts, scores, spread, color=colour, marker="o", markersize=4, capsize=3, linewidth=1, label=LABELS[row])
    axes.set(xscale="log", xlabel="training pairs", ylabel="mean R@10, test part")
    axes.set_xticks(counts, [str(count) for count in counts], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


class Retrieved:
    """What the trained model finds among the test items, from one modality (text where there is one) to another (pictures where there are any)."""

    def __init__(self, experiment: Experiment) -> None:
        data = self.data = experiment.dataset
        names = list(data.modalities)
        self.query = "text" if "text" in names else next(name for name in names if name != "picture")
        self.target = "picture" if "picture" in names else next(name for name in names if name != self.query)
        test = experiment.split().test
        both = items_with(data.masks(test), [self.query, self.target], len(test))
        self.items = test if both is None else test[both]
        with torch.no_grad():
            embedded = experiment.model.embed({name: data.modalities[name][self.items] for name in (self.query, self.target)})
        self.scores = embedded[self.query] @ embedded[self.target].T
        self.order = self.scores.argsort(dim=1, descending=True, stable=True)
        self.groups = data.groups[self.items]

    def evenly(self) -> list[int]:
        """Queries spread evenly over the test part, not picked."""
        return torch.linspace(0, len(self.items) - 1, min(SHOWN_QUERIES, len(self.items))).round().long().tolist()

    def confusions(self) -> list[dict[str, Any]]:
        """The queries whose best wrong item lies farthest above the right one."""
        if not len(self.items):
            return []
        right = self.scores.masked_fill(self.groups[:, None] != self.groups, -2).amax(1)
        wrong, place = self.scores.masked_fill(self.groups[:, None] == self.groups, -2).max(1)
        margin = wrong - right
        worst = margin.argsort(descending=True, stable=True)[:SHOWN_QUERIES].tolist()
        return [
            {
                "query": int(self.items[i]),
                "found": int(self.items[place[i]]),
                "cosine": float(wrong[i]),
                "wanted": float(right[i]),
                "rank": int((self.scores[i] > right[i]).sum()) + 1,
            }
            for i in worst
            if margin[i] > 0
        ]


def retrieved_figure(retrieved: Retrieved) -> Figure:
    """Queries, the item wanted, and the first items found, framed by whether they are of the query's caption."""
    data, chosen = retrieved.data, retrieved.evenly()
    figure = Figure(figsize=(1.25 * (SHOWN_RESULTS + 2), 1.35 * len(chosen)), layout="constrained")
    grid = figure.subplots(len(chosen), SHOWN_RESULTS + 2, squeeze=False, width_ratios=[1.6] + [1] * (SHOWN_RESULTS + 1))
    for line, position in enumerate(chosen):
        item = int(retrieved.items[position])
        words = grid[line][0]
        words.axis("off")
        words.text(1, 0.5, _wrapped(data.names[item]), ha="right", va="center", fontsize=9, transform=words.transAxes)
        _tile(grid[line][1], data.picture(item), "wanted", "black")
        places = retrieved.order[position, :SHOWN_RESULTS].tolist()
        for axes, place in zip(grid[line][2:], places, strict=False):
            found = int(retrieved.items[place])
            _tile(axes, data.picture(found), data.names[found], HIT if data.groups[found] == data.groups[item] else MISS)
        for axes in grid[line][2 + len(places) :]:
            axes.axis("off")
    return figure


def confusion_figure(retrieved: Retrieved, confusions: list[dict[str, Any]]) -> Figure:
    """Pairs of pictures: the one wanted and the wrong one that the model put first."""
    data, columns = retrieved.data, 4
    rows = -(-len(confusions) // columns)
    figure = Figure(figsize=(2.6 * columns, 1.7 * rows), layout="constrained")
    grid = figure.subplots(rows, 2 * columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for place, entry in enumerate(confusions):
        row, column = divmod(place, columns)
        for offset, item, score, colour in ((0, entry["query"], entry["wanted"], "black"), (1, entry["found"], entry["cosine"], "#c8553d")):
            axes = grid[row][2 * column + offset]
            axes.axis("on")
            _tile(axes, data.picture(item), data.names[item], colour)
            axes.set_xlabel(f"{'wanted' if offset == 0 else 'found'} {score:.2f}", fontsize=7)
    return figure


def _wrapped(text: str) -> str:
    import textwrap

    return textwrap.fill(_short(text, 60), 18)


def contact_sheet(data: PairedDataset, items: list[int], scores: list[float], title: str) -> Figure:
    """Pictures of items with names and scores, six to a row."""
    columns = max(1, min(6, len(items)))
    rows = -(-len(items) // columns)
    figure = Figure(figsize=(1.5 * max(columns, 3), 1.75 * rows + 0.4), layout="constrained")
    figure.suptitle(_short(title, 80), fontsize=11)
    grid = figure.subplots(rows, columns, squeeze=False)
    for place, axes in enumerate(grid.flat):
        if place < len(items):
            _tile(axes, data.picture(items[place]), data.names[items[place]], MISS)
            axes.set_xlabel(f"{scores[place]:.2f}", fontsize=7)
        else:
            axes.axis("off")
    return figure


# ---------------------------------------------------------------------------------------------------------------------------------------------- tables


def direction_pairs(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Directions two by two, each with its reverse."""
    pairs: dict[tuple[str, ...], list[str]] = {}
    for direction in results["rows"]["trained"]["directions"]:
        route, _, kind = direction.partition(", ")
        pairs.setdefault((kind, *sorted(route.split(" → "))), []).append(direction)
    return [tuple(pair) for pair in pairs.values()]


def titled(results: dict[str, Any], direction: str) -> str:
    """A direction with the number of test items behind its figures: a few of them say little."""
    items = results["rows"]["cca"]["directions"][direction].get("items", [])
    return direction + (f" ({min(items)}{'' if min(items) == max(items) else f' to {max(items)}'} test items)" if items else "")


HEADINGS = ("R@1", "R@5", "R@10", "median", "ΔR@10")


def _with_spread(figure: dict[str, float], factor: float, seeds: int, sign: str = "") -> str:
    """Mean ± standard deviation; one seed has none."""
    return f"{factor * figure['mean']:{sign}.1f}" + (f" ± {factor * figure['std']:.1f}" if seeds > 1 else "")


def cells(figures: dict[str, Any], row: str) -> list[str]:
    """R@1, R@5, R@10 in percent, median rank, and the paired difference of R@10 to CCA, with their spread over seeds."""
    seeds = figures["r10_difference"]["seeds"]
    return [*(_with_spread(figures[k], 100, seeds) for k in ("r1", "r5", "r10")), _with_spread(figures["median"], 1, seeds), _difference(figures, row)]


def _difference(figures: dict[str, Any], row: str) -> str:
    """Of R@10 to CCA within a seed, which has none to itself."""
    difference = figures["r10_difference"]
    return DASH if row in (BASELINE, "chance") else _with_spread(difference, 100, difference["seeds"], "+")


def joint_table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """R@10 of the joint scores, with their differences to CCA, beside that of every single pair, per row: (headings, lines). Empty for two modalities."""
    directions = list(results["rows"]["trained"]["directions"])
    joint = [way for way in directions if ", joint" in way]
    if not joint:
        return [], []
    anchor = joint[0].split(" → ")[0]
    headings, lines = ["row", "query"], []
    forward = [way for way in directions if ", joint" not in way and way.startswith(f"{anchor} → ")]
    headings += ["volume", HEADINGS[-1], "sum of cosines", HEADINGS[-1], *(f"{way.split(' → ')[1]} alone" for way in forward)]
    for row, entry in results["rows"].items():
        ways = entry["directions"]
        for back in (False, True):
            route = f"others → {anchor}" if back else f"{anchor} → others"
            scores = [ways[f"{route}, joint (volume)"], ways[f"{route}, joint (sum of cosines)"]]
            alone = [ways[" → ".join(reversed(way.split(" → "))) if back else way] for way in forward]
            seeds = scores[0]["r10_difference"]["seeds"]
            with_differences = [cell for figures in scores for cell in (_with_spread(figures["r10"], 100, seeds), _difference(figures, row))]
            lines.append([LABELS[row], route, *with_differences, *(_with_spread(figures["r10"], 100, seeds) for figures in alone)])
    return headings, lines


def markdown_table(results: dict[str, Any]) -> str:
    """The table as documentation quotes it: `python -m modalign.cli.report results.json`."""
    blocks = []
    for direction in (direction for pair in direction_pairs(results) for direction in pair):
        lines = [f"| {direction} | " + " | ".join(HEADINGS) + " |", "|---|" + "---:|" * len(HEADINGS)]
        for row, figures in results["rows"].items():
            lines.append(f"| {LABELS[row]} | " + " | ".join(cells(figures["directions"][direction], row)) + " |")
        blocks.append("\n".join(lines))
    headings, lines = joint_table(results)
    if lines:
        table = ["| " + " | ".join(headings) + " |", "|---|---|" + "---:|" * (len(headings) - 2), *("| " + " | ".join(line) + " |" for line in lines)]
        blocks.append("\n".join(table))
    if len(results["curve"]) > 1:
        blocks.append("\n".join(_curve_lines(results)))
    return "\n\n".join(blocks)


def curve_cells(results: dict[str, Any]) -> list[list[str]]:
    """Mean R@10 by number of training pairs: one line per number, rows as columns, the paired difference to CCA behind."""
    lines = []
    for point in results["curve"]:
        seeds = len(point["rows"]["cca"]["mean_r10_by_seed"])
        scores = [_with_spread({"mean": entry["mean_r10"], "std": _deviation(entry["mean_r10_by_seed"])}, 100, seeds) for entry in point["rows"].values()]
        lines.append([str(point["train"]), *scores, _with_spread(point["rows"]["trained"]["difference"], 100, seeds, "+")])
    return lines


def _curve_lines(results: dict[str, Any]) -> list[str]:
    headings = ["training pairs", *(LABELS[row] for row in results["rows"]), "trained − CCA"]
    return ["| " + " | ".join(headings) + " |", "|" + "---:|" * len(headings), *("| " + " | ".join(line) + " |" for line in curve_cells(results))]


STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}tr.best{font-weight:600}img{max-width:100%}
code{background:#f4f4f4;padding:.1rem .3rem}.note{color:#666}"""


def _html_table(headings: list[str], lines: list[list[str]], best: int | None = None) -> str:
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    body = "".join(
        f"<tr{' class=best' if number == best else ''}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>"
        for number, line in enumerate(lines)
    )
    return f"<table><tr>{head}</tr>{body}</table>"


CAPTIONS = {
    "curves.png": "Training",
    "pairs.png": "With fewer pairs",
    "retrieved.png": "What is retrieved",
    "confusions.png": "What is confused: the item wanted, and the wrong one put first",
}


def html_report(results: dict[str, Any], figures: dict[str, bytes], confusions: list[dict[str, Any]], names: list[str]) -> str:
    """One page with everything inside: no script, no link to another file."""
    data, escape = results["dataset"], html.escape
    held = ", ".join(f"{name} {count}" for name, count in data["modalities"].items())
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<title>{escape(data['name'])}: alignment</title><style>{STYLE}</style>",
        f"<h1>{escape(data['name'])}: how well do the modalities match?</h1>",
        f"<p>{data['items']} items ({escape(held)}); {data['train']} to train on, of which {data['validation']} for validation; {data['test']} to test. "
        f"Made by <code>{escape(results['command'])}</code>.</p>",
    ]
    order = list(results["rows"])
    for direction in (direction for pair in direction_pairs(results) for direction in pair):
        lines = [[LABELS[row], *cells(results["rows"][row]["directions"][direction], row)] for row in order]
        parts.append(_html_table([titled(results, direction), *HEADINGS], lines, order.index("trained")))
    headings, lines = joint_table(results)
    if lines:
        parts += ["<h2>Joint scores beside single pairs, R@10</h2>", _html_table(headings, lines)]
    parts.append("<p class=note>" + "; ".join(f"<b>{LABELS[row]}</b>: {escape(entry['what'])}" for row, entry in results["rows"].items()) + ".</p>")
    seeds = len(results["rows"]["cca"]["mean_r10_by_seed"])
    parts.append(
        f"<p class=note>Recall in percent and median rank (1 is best) on the test part, {'mean ± standard deviation over' if seeds > 1 else 'one of'} "
        f"{seeds} seed{'s' if seeds > 1 else ': no spread is known'}; ΔR@10 is the difference to CCA within a seed. A hit is any candidate of the same "
        "group. Steps, ridge and power were chosen on validation items; the test part was read once.</p>"
    )
    if any(seed["transductive"] for seed in results["seeds"]):
        parts.append(
            "<p class=note>Seeds other than 0 are transductive: the stored features were reduced with a basis fitted on the training items of seed 0, "
            "among which are some of their test items (without pairing).</p>"
        )
    if "basis" in data:
        parts.append(f"<p class=note>Fewer pairs: {escape(data['basis'])}.</p>")
    if len(results["curve"]) > 1:
        parts += ["<h2>Mean R@10 by number of training pairs</h2>"]
        parts.append(_html_table(["training pairs", *(LABELS[row] for row in order), "trained − CCA"], curve_cells(results)))
    for name, content in figures.items():
        parts.append(f"<h2>{CAPTIONS[name]}</h2><img alt='{name}' src='data:image/png;base64,{base64.b64encode(content).decode()}'>")
    if confusions:
        lines = [[names[e["query"]], names[e["found"]], f"{e['cosine']:.2f}", f"{e['wanted']:.2f}", str(e["rank"])] for e in confusions]
        parts.append(_html_table(["query", "found instead", "its cosine", "cosine of the right one", "rank of the right one"], lines))
    lines = []
    for seed in results["seeds"]:
        trained = [row for row in COLOURS if row in seed["chosen"]]
        chosen, scores = seed["chosen"], [_mean_r10(seed["table"][row]) for row in ("cca", *trained)]
        closed = f"ridge {chosen['cca']['ridge']}, power {chosen['cca']['power']}"
        steps = [str(chosen[row]["steps"]) for row in trained]
        lines.append([str(seed["seed"]), str(seed["train"]), closed, *steps, *(f"{100 * score:.1f}" for score in scores)])
    names_of = [LABELS[row] for row in COLOURS if row in results["rows"]]
    heads = ["seed", "pairs", "CCA", *(f"steps, {name}" for name in names_of), "mean R@10, CCA", *names_of]
    parts += ["<h2>Seeds</h2>", _html_table(heads, lines)]
    facts = results["environment"]
    environment = f"modalign {facts['modalign']['version']}, torch {facts['torch']}, python {facts['python']}, {facts['cpu']['model']}, {facts['threads']} threads"
    parts.append(f"<p class=note>{escape(environment)}. Data: {escape(data['licence'] or 'licence not stated')}.</p></html>")
    return "\n".join(parts)


def _mean_r10(table: dict[str, dict[str, float]]) -> float:
    return statistics.fmean(figures["r10"] for direction, figures in table.items() if ", joint" not in direction)


if __name__ == "__main__":
    import json
    import sys
    from pathlib import Path

    print(markdown_table(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
