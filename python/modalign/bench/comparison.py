"""Two results files side by side: what became slower, what cannot be decided, what is on one side only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .tables import duration

Row = Mapping[str, Any]
FEWEST_ROUNDS = 3  # below this the quantiles say nothing about the spread

SAME_MACHINE = ("device", "cpu", "gpu", "torch", "blas")


@dataclass(frozen=True)
class Difference:
    """One row of both files. change: how much longer B takes, 0.1 = 10 %; low and high the same from the quantiles nearest to and farthest from each
    other. verdict: "same" (within the threshold), "slower", "faster" or "undecided"."""

    row: Row
    before: float
    after: float
    change: float
    low: float
    high: float
    verdict: str
    why: str = ""


@dataclass(frozen=True)
class Comparison:
    """measure: "seconds" on one machine and one torch, otherwise "ratio_to_floor". unlike: what of the environments differs."""

    measure: str
    threshold: float
    unlike: dict[str, tuple[Any, Any]]
    differences: list[Difference] = field(default_factory=list)
    only_first: list[str] = field(default_factory=list)
    only_second: list[str] = field(default_factory=list)

    @property
    def slower(self) -> list[Difference]:
        return [difference for difference in self.differences if difference.verdict == "slower"]


def label(row: Row) -> str:
    sizes = " ".join(f"{key}={value}" for key, value in row["parameters"].items())
    return f"{row['case']} {sizes} {row['dtype']} {row['pass']} {row['threads']} threads: {row['provider']}"


def _key(row: Row) -> str:
    return json.dumps([row[name] for name in ("case", "parameters", "dtype", "pass", "threads", "provider")], sort_keys=True)


def compare(first: Mapping[str, Any], second: Mapping[str, Any], threshold: float = 0.05) -> Comparison:
    """Rows of two results that agree in case, parameters, dtype, pass, threads and provider.

    On the same machine with the same torch their times are compared, otherwise their ratios to the floor. A change beyond `threshold` counts where
    neither row is noisy, both have at least three rounds and their 20 % to 80 % intervals do not overlap; otherwise it is undecided. Floors are the
    yardstick and are not compared. ValueError where `threshold` is negative.
    """
    if threshold < 0:
        raise ValueError(f"compare: threshold must be at least 0, got {threshold}")
    facts = first["environment"], second["environment"]
    unlike = {name: (facts[0].get(name), facts[1].get(name)) for name in SAME_MACHINE if facts[0].get(name) != facts[1].get(name)}
    measure = "ratio_to_floor" if unlike else "seconds"
    rows = [{_key(row): row for row in results["rows"] if row["kind"] != "floor"} for results in (first, second)]
    result = Comparison(measure, threshold, unlike)
    for key, before in rows[0].items():
        after = rows[1].get(key)
        if after is None or after["status"] != "ok" or before["status"] != "ok":
            continue
        if before.get(measure) and after.get(measure):
            result.differences.append(_difference(before, after, measure, threshold))
    compared = {_key(difference.row) for difference in result.differences}
    for these, others, side in ((rows[0], rows[1], result.only_first), (rows[1], rows[0], result.only_second)):
        for key, row in these.items():
            if key in compared or row["status"] != "ok":
                continue
            other = others.get(key)
            if other is None:
                side.append(label(row))
            elif other["status"] != "ok":
                side.append(f"{label(row)} (there: {other['status']}, {other['reason']})")
            else:
                side.append(f"{label(row)} (no floor to compare by)")
    return result


def _difference(before: Row, after: Row, measure: str, threshold: float) -> Difference:
    old, new = before[measure], after[measure]
    change = new["median"] / old["median"] - 1
    low, high = new["q20"] / old["q80"] - 1, new["q80"] / old["q20"] - 1
    noisy = [name for name, row in (("the first", before), ("the second", after)) if row.get("noisy")]
    verdict, why = "same", ""
    if noisy:
        verdict, why = "undecided", f"{' and '.join(noisy)} is noisy" if len(noisy) == 1 else "both are noisy"
    elif abs(change) > threshold:
        if min(before["rounds"], after["rounds"]) < FEWEST_ROUNDS:
            verdict, why = "undecided", f"fewer than {FEWEST_ROUNDS} rounds"
        elif low <= 0 <= high:
            verdict, why = "undecided", "the 20 % to 80 % intervals overlap"
        else:
            verdict = "slower" if change > 0 else "faster"
    return Difference(after, old["median"], new["median"], change, low, high, verdict, why)


def percent(text: str) -> float:
    """
    >>> percent("5%"), percent("0.05")
    (0.05, 0.05)
    """
    number, sign, rest = text.strip().partition("%")
    try:
        value = float(number) / (100 if sign else 1)
    except ValueError:
        value = -1.0
    if rest or not 0 <= value < float("inf"):
        raise ValueError(f"bench: --fail-above must be a share such as 5% or 0.05, got {text!r}")
    return value


def screen(comparison: Comparison) -> Any:
    """As rich text and a table."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[Any] = []
    if comparison.unlike:
        for name, (one, other) in comparison.unlike.items():
            parts.append(Text(f"{name} differs: {_short(one, other)} and {_short(other, one)}", style="yellow"))
        parts.append(Text("so ratios to the floor are compared, not times", style="yellow"))
    table = Table(header_style="bold")
    for name in ("case", "sizes", "dtype", "pass", "threads", "provider", "first", "second", "change (20 % … 80 %)", "verdict"):
        table.add_column(name, justify="right" if name in ("first", "second", "threads") or name.startswith("change") else "left")
    shown = duration if comparison.measure == "seconds" else "{:.3g} × floor".format
    for one in comparison.differences:
        row = one.row
        table.add_row(
            row["case"],
            " ".join(f"{key}={value}" for key, value in row["parameters"].items()),
            row["dtype"],
            row["pass"],
            str(row["threads"]),
            row["provider"],
            shown(one.before),
            shown(one.after),
            f"{one.change:+.1%} ({one.low:+.1%} … {one.high:+.1%})",
            one.verdict + (f": {one.why}" if one.why else ""),
            style={"slower": "red", "faster": "green", "undecided": "yellow"}.get(one.verdict, ""),
        )
    parts.append(table)
    for side, rows in (("first", comparison.only_first), ("second", comparison.only_second)):
        parts += [Text(f"only in the {side}: {row}") for row in rows]
    counts = {verdict: sum(one.verdict == verdict for one in comparison.differences) for verdict in ("slower", "faster", "same", "undecided")}
    parts.append(Text(f"{', '.join(f'{count} {verdict}' for verdict, count in counts.items())}, threshold {comparison.threshold:.3g}"))
    return Group(*parts)


def _short(one: Any, other: Any) -> str:
    """What of a nested fact is not as in the other."""
    if isinstance(one, dict) and isinstance(other, dict):
        return ", ".join(f"{key} {value}" for key, value in one.items() if other.get(key) != value)
    return str(one)
