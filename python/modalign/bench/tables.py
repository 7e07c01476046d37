"""Tables from the JSON, for the screen and for Markdown. Figures in README and docs are never typed:

    <!-- bench benchmarks/results/gram_volume.json rows="case=gram_volume pass=fwd threads=1" columns="k provider time rate floor error" -->
    (whatever is here is replaced)
    <!-- /bench -->

`python -m modalign.bench.tables README.md docs/*.md` fills every such block; with --check it changes nothing and fails where a block is stale.
Paths are relative to the working directory. `rows` keeps rows whose fields (case, pass, dtype, threads, provider, status or a parameter) have one
of the values given, as in provider=ours,formula. `columns` are parameters or names from COLUMNS.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .machine import is_noisy
from .results import read_results
from .sizes import listed

Row = dict[str, Any]
DASH = "–"
MARK = " (noisy)"
NOISY = "(noisy): the times of the row or of its floor spread by more than 10 %, something else was running"
SMALLEST_PEAK = 1e6
LEFT = ("case", "pass", "provider", "plan", "floor_source", "reason")


def duration(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def byte_count(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def peak(count: float) -> str:
    """Memory of a process is counted in pages and by what its allocators took in one piece: below this the figure is theirs."""
    return f"< {byte_count(SMALLEST_PEAK)}" if count < SMALLEST_PEAK else byte_count(count)


def _time(row: Row) -> str:
    if row["status"] != "ok":
        return row["status"]
    times = row["seconds"]
    return f"{duration(times['median'])} ({duration(times['q20'])} … {duration(times['q80'])})"


def _rate(field: str, unit: str) -> Callable[[Row], str]:
    return lambda row: f"{row[field] / 1e9:.3g} {unit}" if row.get(field) else DASH


def beside(figure: float, bound: float) -> str:
    """As many digits as tell the two apart, two at least.

    >>> beside(0.9512, 0.95), beside(0.914, 0.95)
    ('0.951', '0.91')
    """
    digits = next((digits for digits in range(2, 9) if (round(figure, digits) > bound) == (figure > bound)), 9)
    return f"{figure:.{digits}f}"


def _ratio(row: Row) -> str:
    ratio = row.get("ratio_to_floor")
    if not ratio:
        return DASH
    target = row.get("target")
    median = beside(ratio["median"], target["ratio"]) if target else f"{ratio['median']:.2f}"
    return f"{median} ({ratio['q20']:.2f} … {ratio['q80']:.2f})" if row["kind"] != "floor" else "1"


def _floor_source(row: Row) -> str:
    """Files of modalign.bench/1 know declared floors only."""
    if not row.get("ratio_to_floor"):
        return DASH
    return (row.get("floor") or {"source": "declared"})["source"]


def _error(which: str) -> Callable[[Row], str]:
    def shown(row: Row) -> str:
        if checked := row.get("checked"):
            return "checked at " + listed({key: value for key, value in checked.items() if row["parameters"].get(key) != value})
        error = (row.get("error") or {}).get(which)
        if not error:
            return DASH
        return "not finite" if error["relative"] is None else f"{error['relative']:.1e}"

    return shown


def _of_machine(row: Row) -> str:
    """Where the floor is the machine's own, percent_of_floor says it."""
    percent = row.get("percent_of_machine")
    return f"{percent:.0f} %" if percent and _floor_source(row) == "declared" else DASH


def _target(row: Row) -> str:
    target = row.get("target")
    return f"≤ {target['ratio']:g}: {'met' if target['met'] else 'missed'}" if target else DASH


COLUMNS: dict[str, tuple[str, Callable[[Row], str]]] = {
    "case": ("case", lambda row: row["case"]),
    "dtype": ("dtype", lambda row: row["dtype"]),
    "pass": ("pass", lambda row: row["pass"]),
    "threads": ("threads", lambda row: str(row["threads"])),
    "provider": ("provider", lambda row: row["provider"]),
    "time": ("median (q20 … q80)", _time),
    "rate": ("rate", _rate("flop_per_second", "GFLOP/s")),
    "dense": ("dense-equivalent rate", _rate("dense_flop_per_second", "GFLOP/s")),
    "bandwidth": ("bandwidth", _rate("byte_per_second", "GB/s")),
    "floor": ("time / floor", _ratio),
    "floor_source": ("which floor", _floor_source),
    "percent": ("% of floor", lambda row: f"{row['percent_of_floor']:.0f} %" if row.get("percent_of_floor") else DASH),
    "machine": ("% of machine", _of_machine),
    "memory": ("peak memory", lambda row: peak(row["peak_memory_bytes"]) if row.get("peak_memory_bytes") is not None else DASH),
    "error": ("error / RMS", _error("forward")),
    "gradient": ("gradient error / RMS", _error("backward")),
    "target": ("target", _target),
    "plan": ("runs on", lambda row: row.get("plan") or DASH),
    "reason": ("reason", lambda row: row["reason"] or DASH),
    "rounds": ("rounds", lambda row: str(row.get("rounds", DASH))),
}


def cell(row: Row, column: str) -> str:
    if column in COLUMNS:
        return COLUMNS[column][1](row)
    if column in row["parameters"]:
        return str(row["parameters"][column])
    return DASH


def line(row: Row, columns: Sequence[str]) -> list[str]:
    """The cells of a row, a noisy one marked at its time, or at the end where that is not shown."""
    cells = [cell(row, column) for column in columns]
    if row.get("noisy"):
        cells[columns.index("time") if "time" in columns else -1] += MARK
    return cells


def label(row: Row) -> str:
    return f"{row['case']}, {listed(row['parameters'])}, {row['dtype']}, {row['pass']}, {row['threads']} threads"


def matches(row: Row, wanted: dict[str, tuple[str, ...]]) -> bool:
    return all(str(row[key] if key in row else row["parameters"].get(key)) in values for key, values in wanted.items())


def parse_filter(text: str) -> dict[str, tuple[str, ...]]:
    wanted = {}
    for item in text.split():
        key, equals, values = item.partition("=")
        if not equals:
            raise ValueError(f"bench tables: rows must be written as field=value, got {item!r}")
        wanted[key] = tuple(values.split(","))
    return wanted


def caption(results: dict[str, Any], source: str) -> str:
    facts = results["environment"]
    where = facts["gpu"]["model"] if facts["gpu"] else f"{facts['cpu']['model']}, {facts['cpu']['cores']} cores, {facts['cpu']['instruction_set']}"
    note = f" {results['note'].rstrip('.')}." if results["note"] else ""
    versions = f"torch {facts['torch']}, {facts['blas']}; {results['created'][:10]}; seed {results['seed']}"
    return f"*{where}; {versions}; `{results['command']}` → `{source}`.{note}*"


def markdown(source: str, rows: str, columns: str) -> str:
    results = read_results(source)
    wanted, names = parse_filter(rows), columns.split()
    kept = [row for row in results["rows"] if matches(row, wanted)]
    if not kept:
        raise ValueError(f"bench tables: rows must keep at least one row of {source}, got {rows!r}")
    for name in names:
        if name not in COLUMNS and not any(name in row["parameters"] for row in kept):
            raise ValueError(f"bench tables: columns must be out of {sorted(COLUMNS)} or a parameter, got {name!r}")
    heads = [COLUMNS[name][0] if name in COLUMNS else name for name in names]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join(shown.replace("|", "\\|") for shown in line(row, names)) + " |" for row in kept]
    if any(row.get("noisy") for row in kept):
        lines += ["", NOISY + "."]
    return "\n".join([*lines, "", caption(results, source)])


_BLOCK = re.compile(r"(?P<open><!-- bench (?P<arguments>[^\n]*?) -->\n)(?P<body>.*?)(?P<close><!-- /bench -->)", re.DOTALL)


def render(text: str) -> str:
    """`text` with every block filled from its JSON."""

    def fill(block: re.Match[str]) -> str:
        source, *options = shlex.split(block["arguments"])
        given = dict(option.partition("=")[::2] for option in options)
        unknown = set(given) - {"rows", "columns"}
        if unknown:
            raise ValueError(f"bench tables: a block takes rows and columns, got {sorted(unknown)}")
        return (
            block["open"]
            + markdown(source, given.get("rows", ""), given.get("columns", "case provider pass threads time floor"))
            + "\n"
            + block["close"]
        )

    opened, closed = text.count("<!-- bench "), text.count("<!-- /bench -->")
    if opened != closed or opened != len(_BLOCK.findall(text)):
        raise ValueError(f"bench tables: every <!-- bench ... --> must be closed by <!-- /bench -->, got {opened} and {closed}")
    return _BLOCK.sub(fill, text)


def screen_columns(rows: Sequence[Row]) -> list[str]:
    """What to show of the rows of one case: nothing that is empty in all of them."""
    shown = ["threads", "dtype", "pass", "provider", "time", "rate", "dense", "bandwidth", "floor", "floor_source", "percent", "machine"]
    kept = [name for name in [*shown, "memory", "error", "gradient", "target", "plan"] if any(cell(row, name) != DASH for row in rows)]
    if "rate" in kept and "bandwidth" in kept and "dense" not in kept:
        kept.remove("bandwidth")
    if len({row["dtype"] for row in rows}) == 1:
        kept.remove("dtype")
    return [*rows[0]["parameters"], *kept]


def heading(column: str) -> str:
    return COLUMNS[column][0] if column in COLUMNS else column


def group_of(row: Row) -> tuple[Any, ...]:
    """Rows that belong together: one size, dtype, thread count and pass."""
    return (tuple(row["parameters"].items()), row["dtype"], row["threads"], row["pass"])


def by_case(results: dict[str, Any]) -> dict[str, list[Row]]:
    return {case: [row for row in results["rows"] if row["case"] == case] for case in dict.fromkeys(row["case"] for row in results["rows"])}


def reasons(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(f"{row['provider']}: {row['status']}: {row['reason']}" for row in rows if row["reason"]))


def screen(results: dict[str, Any]) -> Any:
    """The results as rich tables, one per case."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    parts: list[Any] = []
    for case, rows in by_case(results).items():
        columns = screen_columns(rows)
        table = Table(title=case, title_justify="left", header_style="bold")
        for name in columns:
            table.add_column(heading(name), justify="left" if name in LEFT else "right", no_wrap=name != "plan")
        previous = None
        for row in rows:
            if previous not in (None, group_of(row)):
                table.add_section()
            previous = group_of(row)
            style = {"ours": "bold green", "floor": "dim"}.get(row["kind"], "")
            table.add_row(*map(escape, line(row, columns)), style="red" if row["status"] in ("mismatch", "failed") else style)
        parts += [table, *(Text(f"  {reason}") for reason in reasons(rows))]
    if any(row.get("noisy") for row in results["rows"]):
        parts.append(Text(NOISY, style="yellow"))
    return Group(*parts)


def machine_rows(machine: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(what, threads, figure) of the machine's own figures."""

    def spread(figure: dict[str, float], unit: str) -> str:
        return f"{figure['median'] / 1e9:.3g} {unit} ({figure['q20'] / 1e9:.3g} … {figure['q80'] / 1e9:.3g})" + MARK * is_noisy(figure)

    lines = [
        (f"matrix product, {entry['dtype']}, {entry['size']}³", str(entry["threads"]), spread(entry["flop_per_second"], "GFLOP/s"))
        for entry in machine["matmul"]
    ]
    lines += [
        (f"copy of {byte_count(entry['bytes'] / 2)}, read and written", str(entry["threads"]), spread(entry["byte_per_second"], "GB/s"))
        for entry in machine["copy"]
    ]
    names = {
        "torch_op": "a call of an op of torch's own",
        "registered_op": "a call of {op} as registered",
        "public_function": "a call of the public {op}",
        "public_function_with_graph": "the same with autograd's graph",
    }
    for name, seconds in machine["dispatch"]["seconds"].items():
        lines.append((names.get(name, name).format(op=machine["dispatch"]["op"]), "1", duration(seconds["median"]) + MARK * is_noisy(seconds)))
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m modalign.bench.tables", description="Fill the benchmark tables of Markdown files from their JSON."
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--check", action="store_true", help="change nothing, fail where a table is not what its JSON says")
    options = parser.parse_args(arguments)
    stale = []
    for file in options.files:
        text = file.read_text()
        filled = render(text)
        if filled != text:
            stale.append(str(file))
            if not options.check:
                file.write_text(filled)
    if stale:
        print(("stale: " if options.check else "filled: ") + ", ".join(stale))
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
