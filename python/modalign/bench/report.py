"""One self-contained HTML page about one or more results files: no script, and nothing that is fetched."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from . import kernel, machine, sweep, tables
from .plots import axes_of, colours, embedded, plain

Row = Mapping[str, Any]
MARKERS = {"fwd": "o", "bwd": "s", "fwd+bwd": "^"}

STYLE = """
:root { color-scheme: light dark;
  --text: #1c2024; --quiet: #60666c; --line: #d8dcdf; --page: #fff; --stripe: #f4f6f7; --bad: #b3261e; --good: #1a7f37; --odd: #9a6700 }
@media (prefers-color-scheme: dark) { :root {
  --text: #e4e7ea; --quiet: #a0a7ad; --line: #3a4046; --page: #16191c; --stripe: #1f2327; --bad: #ff8a80; --good: #6fd08c; --odd: #e3b341 } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: var(--text); background: var(--page) }
h1 { font-size: 1.6rem }
h2 { font-size: 1.25rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line) }
h3 { font-size: 1.05rem; margin-top: 1.6rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; margin: .6rem 0 }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
th { font-weight: 600 }
.left { text-align: left }
tbody tr:nth-child(even) { background: var(--stripe) }
tr.group td { border-top: 2px solid var(--line) }
tr.ours { font-weight: 600 }
tr.floor, .quiet { color: var(--quiet) }
.bad, tr.bad td { color: var(--bad) }
.good { color: var(--good) }
.odd { color: var(--odd) }
img { max-width: 100%; background: #fff; border: 1px solid var(--line) }
dt { float: left; clear: left; width: 11rem; color: var(--quiet) }
dd { margin-left: 11rem }
"""


def _text(value: Any) -> str:
    return html.escape(str(value))


def _table(headings: Sequence[str], lines: Sequence[Sequence[str]], left: Sequence[str] = (), classes: Sequence[str] = ()) -> str:
    sides = ['class="left"' if heading in left else "" for heading in headings]
    head = "".join(f"<th {side}>{_text(heading)}</th>" for side, heading in zip(sides, headings, strict=True))
    body = ""
    for index, line in enumerate(lines):
        cells = "".join(f"<td {side}>{_text(cell)}</td>" for side, cell in zip(sides, line, strict=True))
        body += f'<tr class="{classes[index] if classes else ""}">{cells}</tr>\n'
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


def _list(items: Sequence[str], kind: str = "") -> str:
    return "<ul>" + "".join(f'<li class="{kind}">{_text(item)}</li>' for item in items) + "</ul>"


def _environment(results: Mapping[str, Any], source: str) -> str:
    facts = results["environment"]
    processor = facts["cpu"]
    kernels, products = processor["instruction_set"], processor.get("torch_uses", "?")
    lines = {
        "file": source,
        "command": results["command"],
        "measured": results["created"],
        "processor": f"{processor['model']}, {processor['cores']} cores, kernels on {kernels}, torch on {products}",
        "GPU": facts["gpu"]["model"] if facts["gpu"] else "none",
        "torch": f"{facts['torch']}, {facts['blas']}",
        "modalign": facts.get("modalign", {}).get("version", "?"),
        "Python": facts.get("python", "?"),
        "system": facts.get("system", "?"),
        "seed": results["seed"],
        **({"note": results["note"]} if results["note"] else {}),
    }
    return "<dl>" + "".join(f"<dt>{_text(key)}</dt><dd>{_text(value)}</dd>" for key, value in lines.items()) + "</dl>"


def verdicts(rows: Sequence[Row]) -> str:
    """What a reader asks first: targets, mismatches, who is missing, whether the machine was quiet."""
    parts = []
    targets = [row for row in rows if row.get("target")]
    met = [row for row in targets if row["target"]["met"]]
    if targets:
        parts.append(f"<p>Targets: {len(met)} of {len(targets)} met.</p>")
        for kind, word, chosen in (("good", "met", met), ("bad", "missed", [row for row in targets if row not in met])):
            parts.append(
                _list(
                    [
                        f"{word}: {row['provider']} at most {row['target']['ratio']:g} of the floor's time, took "
                        f"{tables.beside(row['ratio_to_floor']['median'], row['target']['ratio'])} ({tables.label(row)})"
                        for row in chosen
                    ],
                    kind,
                )
            )
    for kind, status, title in (
        ("bad", "mismatch", "Wrong results, so without a speed"),
        ("bad", "failed", "Failed"),
        ("odd", "no kernel", "No kernel of ours ran, so without a speed"),
        ("odd", "not installed", "Not installed"),
        ("odd", "unavailable", "Cannot run here"),
        ("odd", "out of memory", "Out of memory"),
        ("odd", "too slow", "Too slow for the limit"),
    ):
        found = list(dict.fromkeys(f"{row['case']}: {row['provider']}: {status}: {row['reason']}" for row in rows if row["status"] == status))
        if found:
            parts.append(f"<p>{title}:</p>{_list(found, kind)}")
    noisy: dict[str, list[str]] = {}
    for row in rows:
        if row.get("noisy"):
            noisy.setdefault(tables.label(row), []).append(row["provider"])
    if noisy:
        parts.append(f'<p class="odd">{tables.NOISY}:</p>')
        parts.append(_list([f"{group}: {', '.join(providers)}" for group, providers in noisy.items()], "odd"))
    elif rows:
        parts.append("<p>No row is noisy.</p>")
    return "\n".join(parts)


def roofline(results: Mapping[str, Any], dtype: str, threads: int) -> Any | None:
    """Rate against arithmetic intensity (FLOP per byte that the problem has to move), under the roof of this machine where the file holds it."""
    rows = [
        row
        for row in results["rows"]
        if (row["dtype"], row["threads"]) == (dtype, threads)
        and row["kind"] != "floor"
        and all(row.get(key) for key in ("flop_per_second", "flops", "bytes"))
    ]
    if not rows:
        return None
    figure, axes = axes_of("FLOP per byte", "FLOP per second", width=8.5, height=5)
    colour = colours(results["rows"])
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        points.setdefault((row["provider"], row["pass"]), []).append((row["flops"] / row["bytes"], row["flop_per_second"]))
    for (provider, pass_), places in points.items():
        axes.plot(
            *zip(*places, strict=True),
            MARKERS[pass_],
            color=colour[provider],
            markersize=6,
            alpha=0.8,
            linestyle="",
            label=plain(f"{provider}, {pass_}"),
        )
    if found := machine.peaks(results.get("machine"), dtype, threads):
        rate, bandwidth = (one["median"] for one in found)
        intensities = [row["flops"] / row["bytes"] for row in rows] + [rate / bandwidth]
        low, high = min(intensities) / 3, max(intensities) * 3
        corner = rate / bandwidth
        axes.plot([low, corner, high], [low * bandwidth, rate, rate], color="#444", linewidth=1.5)
        axes.text(high, rate, f"matrix product, {rate / 1e9:.3g} GFLOP/s", ha="right", va="bottom", fontsize=8)
        axes.text(low, low * bandwidth, f"  copy, {bandwidth / 1e9:.3g} GB/s", ha="left", va="top", fontsize=8)
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _rooflines(results: Mapping[str, Any]) -> str:
    parts = []
    for dtype, threads in dict.fromkeys((row["dtype"], row["threads"]) for row in results["rows"]):
        if (figure := roofline(results, dtype, threads)) is not None:
            parts.append(f'<h3>Roofline: {_text(dtype)}, {threads} threads</h3><img alt="roofline" src="{embedded(figure)}">')
    if parts and not results.get("machine"):
        parts.append('<p class="odd">This file holds no figures of the machine, so there is no roof (modalign.bench/1).</p>')
    elif parts:
        parts.append(
            '<p class="quiet">The roof is what torch.mm and a copy reached on this machine in the same run. A point can lie above it: a problem '
            "whose data stay in the cache, or a kernel that multiplies faster than torch.mm.</p>"
        )
    return "\n".join(parts)


def _rows(rows: Sequence[Row]) -> str:
    columns = tables.screen_columns(rows)
    lines, classes, previous = [], [], None
    for row in rows:
        kind = "bad" if row["status"] in ("mismatch", "failed") else row["kind"]
        classes.append(kind + (" group" if previous not in (None, tables.group_of(row)) else ""))
        previous = tables.group_of(row)
        lines.append(tables.line(row, columns))
    return _table([tables.heading(column) for column in columns], lines, [tables.heading(column) for column in tables.LEFT], classes)


def _section(results: Mapping[str, Any], source: str) -> str:
    parts = [f"<h2>{_text(source)}</h2>", _environment(results, source)]
    rows = results["rows"]
    if rows:
        parts += ["<h3>In short</h3>", verdicts(rows)]
    if "sweep" in results:
        along = ", ".join(results["sweep"]["parameters"])
        parts.append(f"<h3>{_text(results['sweep']['case'])} over {_text(along)}</h3>")
        for one in results["sweep"]["crossovers"]:
            where = f"{one['pass']}, {one['dtype']}, {one['threads']} threads"
            parts.append(
                f"<p>{_text(one['faster_above'])} is faster than {_text(one['faster_below'])} from {along} = {one['size']:.3g} ({where}).</p>"
            )
        for title, figure in sweep.figures(dict(results)).items():
            parts.append(f'<h3>{_text(title)}</h3><img alt="{_text(title)}" src="{embedded(figure)}">')
    parts.append(_rooflines(results))
    for case, of_case in tables.by_case(dict(results)).items():
        parts += [f"<h3>{_text(case)}</h3>", _rows(of_case)]
        if reasons := tables.reasons(of_case):
            parts.append(_list(reasons))
    if "kernels" in results:
        parts += ["<h3>Kernels without torch around them, one thread</h3>"]
        parts.append(_table(kernel.COLUMNS, [kernel.cells(entry) for entry in results["kernels"]], ("kernel", "beside")))
        parts.append(_list([f"{entry['kernel']}: {entry['reason']}" for entry in results["kernels"] if entry["reason"]]))
    if results.get("machine"):
        parts += ["<h3>The machine</h3>", _table(("what", "threads", "figure"), tables.machine_rows(results["machine"]), ("what",))]
    return "\n".join(parts)


def html_report(files: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """The page about results, each with the name of its file."""
    cases = list(dict.fromkeys(row["case"] for _, results in files for row in results["rows"]))
    title = "modalign bench: " + ", ".join(cases or [source for source, _ in files])
    sections = "\n".join(_section(results, source) for source, results in files)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{_text(title)}</title><style>{STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body><h1>{_text(title)}</h1>\n{sections}\n</body></html>\n'
