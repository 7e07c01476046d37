"""Two results files side by side: what became slower, what cannot be decided, what is wrong now, what is on one side only."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from . import environment, machine
from .sizes import listed
from .tables import duration, label

Row = Mapping[str, Any]
FEWEST_ROUNDS = 3  # below this the quantiles say nothing about the spread
UNITS = {"seconds": duration, "ratio_to_floor": "{:.3g} × floor".format}


@dataclass(frozen=True)
class Difference:
    """One row of both files. measure: "seconds" or "ratio_to_floor". change: how much longer B takes, 0.1 = 10 %; low and high the same from the
    quantiles nearest to and farthest from each other. verdict: "same" (within the threshold), "slower", "faster" or "undecided"."""

    row: Row
    measure: str
    before: float
    after: float
    change: float
    low: float
    high: float
    verdict: str = "undecided"
    why: str = ""


@dataclass(frozen=True)
class Comparison:
    """unlike: what of the environments differs. broken: rows that had a time and are wrong or fail now. kernels: whether a file holds results of
    kernels, which are not compared."""

    threshold: float
    unlike: dict[str, tuple[Any, Any]]
    kernels: bool
    differences: list[Difference] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    only_first: list[str] = field(default_factory=list)
    only_second: list[str] = field(default_factory=list)

    @property
    def slower(self) -> list[Difference]:
        return [difference for difference in self.differences if difference.verdict == "slower"]


def _key(row: Row) -> str:
    return json.dumps([row[name] for name in ("case", "parameters", "dtype", "pass", "threads", "provider")], sort_keys=True)


def compare(first: Mapping[str, Any], second: Mapping[str, Any], threshold: float = 0.05) -> Comparison:
    """Rows of two results that agree in case, parameters, dtype, pass, threads and provider.

    On the same machine with the same torch their times are compared where their floor did not change by more than `threshold`; otherwise, and across
    machines, their ratios to the floor. A change beyond `threshold` counts where neither row is noisy, both have at least three rounds, no 20 % to
    80 % interval is wider than `threshold` and the two do not overlap; otherwise it is undecided. Floors are the yardstick and are not compared.
    ValueError where `threshold` is negative.
    """
    if threshold < 0:
        raise ValueError(f"compare: threshold must be at least 0, got {threshold}")
    unlike = environment.differences(first["environment"], second["environment"])
    result = Comparison(threshold, unlike, "kernels" in first or "kernels" in second)
    rows = [{_key(row): row for row in results["rows"] if row["kind"] != "floor"} for results in (first, second)]
    for key in {**rows[0], **rows[1]}:
        before, after = (side.get(key) for side in rows)
        timed = [row is not None and row["status"] == "ok" for row in (before, after)]
        if before and after and all(timed):
            moved = None if unlike else _moved(before, after, first.get("machine"), second.get("machine"))
            result.differences.append(_difference(before, after, moved, threshold, across=bool(unlike)))
        elif any(timed):
            row, other = (before, after) if timed[0] else (after, before)
            there = f" (there: {other['status']}, {other['reason']})" if other else ""
            if timed[0] and other and other["status"] in ("mismatch", "failed"):
                result.broken.append(f"{label(row)}: {row['provider']}: {other['status']}: {other['reason']}")
            else:
                (result.only_first if timed[0] else result.only_second).append(f"{label(row)}: {row['provider']}{there}")
    return result


def _floor(row: Row) -> tuple[str, float] | None:
    """(source, seconds). Files of modalign.bench/1 hold the ratio alone."""
    if row.get("floor"):
        return row["floor"]["source"], row["floor"]["seconds"]
    if row.get("ratio_to_floor"):
        return "declared", row["seconds"]["median"] / row["ratio_to_floor"]["median"]
    return None


def _moved(before: Row, after: Row, *figures: dict[str, Any] | None) -> float | None:
    """How much longer the floor takes in the second, or, of a row without one, how much slower the machine became; None where nothing says."""
    floors = _floor(before), _floor(after)
    if floors[0] and floors[1]:
        return floors[1][1] / floors[0][1] - 1 if floors[0][0] == floors[1][0] else None
    rates = [machine.peaks(of, row["dtype"], row["threads"]) for of, row in zip(figures, (before, after), strict=True)]
    if not rates[0] or not rates[1]:
        return None
    return max((old["median"] / new["median"] - 1 for old, new in zip(*rates, strict=True)), key=abs)


def _difference(before: Row, after: Row, moved: float | None, threshold: float, *, across: bool) -> Difference:
    """across: the two come from machines that differ, so that `moved` is unknown and times say nothing."""
    floors = _floor(before), _floor(after)
    ratios = all(row.get("ratio_to_floor") for row in (before, after)) and floors[0] and floors[1] and floors[0][0] == floors[1][0]
    steady = moved is not None and abs(moved) <= threshold
    measure = "ratio_to_floor" if ratios and not steady else "seconds"
    old, new = before[measure], after[measure]
    change, low, high = new["median"] / old["median"] - 1, new["q20"] / old["q80"] - 1, new["q80"] / old["q20"] - 1
    found = Difference(after, measure, old["median"], new["median"], change, low, high)
    note = "" if steady or moved is None else f"the {'floor' if ratios else 'machine'} itself changed by {moved:+.1%}"

    def because(why: str) -> Difference:
        return replace(found, why="; ".join(filter(None, (why, note))))

    if measure == "seconds" and not steady:
        return because("no floor to compare by" if across or note else "nothing says whether the machine was as fast as before")
    if noisy := _sides(before, after, lambda row: row.get("noisy") or machine.is_noisy(row["seconds"])):
        return because(f"noisy: {noisy}")
    if min(before["rounds"], after["rounds"]) < FEWEST_ROUNDS:
        return because(f"fewer than {FEWEST_ROUNDS} rounds")
    if wide := _sides(before, after, lambda row: row[measure]["q80"] - row[measure]["q20"] > threshold * row[measure]["median"]):
        return because(f"a 20 % to 80 % interval wider than the threshold: {wide}")
    if abs(change) <= threshold:
        return replace(because(""), verdict="same")
    if low <= 0 <= high:
        return because("the 20 % to 80 % intervals overlap")
    return replace(because(""), verdict="slower" if change > 0 else "faster")


def _sides(before: Row, after: Row, which: Callable[[Row], bool]) -> str:
    return ", ".join(name for name, row in (("first", before), ("second", after)) if which(row))


def percent(text: str) -> float:
    """
    >>> percent("5%"), percent("0.05")
    (0.05, 0.05)
    >>> percent("5")
    Traceback (most recent call last):
    ValueError: bench: --fail-above must be a share such as 5% or 0.05, got '5'
    """
    number, sign, rest = text.strip().partition("%")
    try:
        value = float(number) / (100 if sign else 1)
    except ValueError:
        value = -1.0
    if rest or not 0 <= value < (float("inf") if sign else 1):
        raise ValueError(f"bench: --fail-above must be a share such as 5% or 0.05, got {text!r}")
    return value


def screen(comparison: Comparison) -> Any:
    """As rich text and a table."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    parts: list[Any] = []
    for name, (one, other) in comparison.unlike.items():
        parts.append(Text(f"{name} differs: {_fact(one)} and {_fact(other)}", style="yellow"))
    if comparison.unlike:
        parts.append(Text("so ratios to the floor are compared, not times", style="yellow"))
    table = Table(header_style="bold")
    for name in ("case", "sizes", "dtype", "pass", "threads", "provider", "first", "second", "change (20 % … 80 %)", "verdict"):
        table.add_column(name, justify="right" if name in ("first", "second", "threads") or name.startswith("change") else "left")
    for one in comparison.differences:
        row = one.row
        table.add_row(
            row["case"],
            listed(row["parameters"]),
            row["dtype"],
            row["pass"],
            str(row["threads"]),
            escape(row["provider"]),
            UNITS[one.measure](one.before),
            UNITS[one.measure](one.after),
            f"{one.change:+.1%} ({one.low:+.1%} … {one.high:+.1%})",
            one.verdict + (f": {one.why}" if one.why else ""),
            style={"slower": "red", "faster": "green", "undecided": "yellow"}.get(one.verdict, ""),
        )
    parts.append(table)
    parts += [Text(f"no longer right: {row}", style="red") for row in comparison.broken]
    for side, rows in (("first", comparison.only_first), ("second", comparison.only_second)):
        parts += [Text(f"only in the {side}: {row}") for row in rows]
    if comparison.kernels:
        parts.append(Text("kernels are not compared: they have no floor that would say whether the machine changed", style="yellow"))
    counts = {verdict: sum(one.verdict == verdict for one in comparison.differences) for verdict in ("slower", "faster", "same", "undecided")}
    parts.append(Text(f"{', '.join(f'{count} {verdict}' for verdict, count in counts.items())}, threshold {comparison.threshold:.3g}"))
    return Group(*parts)


def _fact(fact: Any) -> str:
    return ", ".join(f"{key} {value}" for key, value in fact.items()) if isinstance(fact, dict) else str(fact)
