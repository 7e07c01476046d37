"""One case over growing sizes: who is faster from where on, and how memory grows. Results are written after every size, and a sweep that was ended
goes on from there."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import environment, measure, memory
from .registry import Case, providers_of
from .results import read_results, write_results
from .run import Listen, Options, Point, check, measure_machine, new_results
from .sizes import check_parameters, listed, shown

DEFAULT_POINTS = 7
CHECK_SHARE = 0.25  # a check that took this share of the limit is not made at the next size, where it would take several times as long
SMALLEST_PEAK = 1 << 20  # below it memory is the pages of the process, not what the call needs


def sweep(
    case: Case,
    parameters: Sequence[str],
    sizes: Sequence[int],
    options: Options,
    command: str,
    out: Path,
    *,
    limit: float = 30.0,
    resume: bool = False,
    listen: Listen = lambda text: None,
) -> dict[str, Any]:
    """Measure `case` at every size of `parameters`, which grow together, and write `out` after each.

    Everything else comes from the first size of the case and from options.set. A provider that needs more than `limit` seconds for a call, or more
    memory than there is, is reported at that size and not tried at larger ones. Results are checked against the reference as long as that takes a
    quarter of `limit` at most; rows beyond name the size of the last check. `resume` continues what `out` holds.
    """
    check_parameters(case, parameters, "a sweep")
    if taken := set(parameters) & set(options.set):
        raise ValueError(f"bench sweep: --set must leave alone what the sweep changes, got {sorted(taken)}")
    options = Options(**{**vars(options), "memory": True, "limit": limit})
    check([case], options)
    wanted = {"case": case.name, "parameters": list(parameters), "sizes": list(sizes), "limit_seconds": limit, "options": _experiment(case, options)}
    results = _begun(out, wanted, environment.describe(options.device, options.seed)) if resume and out.exists() else None
    if results is None:
        if out.exists():
            raise FileExistsError(f"bench sweep: --out must be a new file, or one to continue with --resume, got {out}")
        figures = measure_machine(options.dtypes or case.dtypes, options, listen)
        results = new_results(options, command, figures, [])
        results["sweep"] = {**wanted, "done": [], "crossovers": [], "memory_exponents": [], "checks_ended": False}
        write_results(out, results)
    threads_before = torch.get_num_threads()
    try:
        with memory.limited(options.device):
            for size in sizes:
                if size in results["sweep"]["done"]:
                    continue
                for dtype in options.dtypes or case.dtypes:
                    point = {**case.points(options.quick)[0], **options.set, **{name: size for name in parameters}}
                    results["rows"] += _measure(case, point, dtype, options, results, listen)
                results["sweep"]["done"].append(size)
                results["sweep"].update(crossovers=crossovers(results), memory_exponents=memory_exponents(results))
                write_results(out, results)
    finally:
        torch.set_num_threads(threads_before)
    return results


def _experiment(case: Case, options: Options) -> dict[str, Any]:
    """What of the options decides about the rows, as JSON holds it."""
    return {
        "set": dict(options.set),
        "dtypes": [str(dtype).removeprefix("torch.") for dtype in options.dtypes or case.dtypes],
        "passes": list(options.passes or case.passes),
        "threads": list(options.threads),
        "providers": list(options.providers or providers_of(case)),
        "seed": options.seed,
        "rounds": options.rounds,
        "quick": options.quick,
    }


def _begun(out: Path, wanted: dict[str, Any], here: dict[str, Any]) -> dict[str, Any]:
    """What `out` holds. ValueError where it is of another experiment, machine or build."""
    results = read_results(out)
    found = results.get("sweep", {})
    unlike = environment.differences(found, wanted, list(wanted))
    unlike.update(environment.differences(results["environment"], here, (*environment.COMPARABLE, "modalign")))
    for name, (there, now) in unlike.items():
        raise ValueError(f"bench sweep: --resume must continue the same sweep, got {name} {there} in {out} and {now} now")
    return results


def size_of(row: dict[str, Any], results: dict[str, Any]) -> int:
    return row["parameters"][results["sweep"]["parameters"][0]]


def _measure(
    case: Case, parameters: dict[str, Any], dtype: torch.dtype, options: Options, results: dict[str, Any], listen: Listen
) -> list[dict[str, Any]]:
    point = Point(case, parameters, dtype, options, results["machine"], listen)
    earlier = [row for row in results["rows"] if row["dtype"] == str(dtype).removeprefix("torch.")]
    ended: dict[str, tuple[str, str]] = {}
    for row in earlier:
        if row["status"] in ("too slow", "out of memory", "mismatch", "failed"):
            ended.setdefault(row["provider"], (row["status"], f"{row['reason']}, at {shown(size_of(row, results))}"))
    point.standing.update(ended)
    point.probe()
    checks = [row for row in earlier if "error" in row and "checked" not in row]
    last = checks[-1] if checks else None
    if last is None or not results["sweep"]["checks_ended"]:
        begin = time.perf_counter()
        try:
            point.check()
        except (RuntimeError, MemoryError) as failure:
            if not measure.is_out_of_memory(failure):
                raise
            if last is None:
                raise ValueError(f"bench sweep: the first size must leave room for a reference in float64, got {listed(parameters)}") from failure
            results["sweep"]["checks_ended"] = True
        if time.perf_counter() - begin > CHECK_SHARE * (options.limit or math.inf):
            results["sweep"]["checks_ended"] = True
    if not point.errors and last is not None:
        point.checked = last["parameters"]
    return list(point.rows())


# ----------------------------------------------------------------------------------------------------------------------- what the sizes say together


def _curves(results: dict[str, Any], *, floor: bool) -> dict[tuple[str, str, int], dict[str, dict[int, dict[str, Any]]]]:
    """{(pass, dtype, threads): {provider: {size: row}}} of the rows that have a time."""
    curves: dict[tuple[str, str, int], dict[str, dict[int, dict[str, Any]]]] = {}
    for row in results["rows"]:
        if row["status"] == "ok" and (floor or row["kind"] != "floor"):
            curves.setdefault((row["pass"], row["dtype"], row["threads"]), {}).setdefault(row["provider"], {})[size_of(row, results)] = row
    return curves


def crossing(sizes: Sequence[int], first: Sequence[float], second: Sequence[float]) -> list[tuple[float, bool]]:
    """(size, whether the first is the faster one above it) wherever two times cross, on straight lines between logarithms.

    >>> [(round(size), above) for size, above in crossing([1, 100], [1.0, 10.0], [0.1, 100.0])]
    [(10, True)]
    """
    found = []
    gaps = [math.log(one / other) for one, other in zip(first, second, strict=True)]
    for (low, before), (high, after) in itertools.pairwise(zip(sizes, gaps, strict=True)):
        if before * after < 0:
            share = before / (before - after)
            found.append((math.exp(math.log(low) + share * (math.log(high) - math.log(low))), after < 0))
    return found


def crossovers(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Where one provider takes over from another, of every pair."""
    found = []
    for (pass_, dtype, threads), providers in _curves(results, floor=False).items():
        for one, other in itertools.combinations(providers, 2):
            sizes = sorted(set(providers[one]) & set(providers[other]))
            times = [[providers[name][size]["seconds"]["median"] for size in sizes] for name in (one, other)]
            for size, first_above in crossing(sizes, *times):
                below, above = (other, one) if first_above else (one, other)
                place = {"pass": pass_, "dtype": dtype, "threads": threads}
                found.append({**place, "faster_below": below, "faster_above": above, "size": size})
    return found


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """p of the least-squares line values ~ sizes^p through the logarithms.

    >>> round(exponent([1, 2, 4], [3.0, 12.0, 48.0]), 6)
    2.0
    """
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True)) / sum((a - middle_x) ** 2 for a in x)


def _peaks(results: dict[str, Any]) -> dict[tuple[str, str, str], dict[int, int]]:
    """{(provider, pass, dtype): {size: bytes}}"""
    peaks: dict[tuple[str, str, str], dict[int, int]] = {}
    for row in results["rows"]:
        if (row.get("peak_memory_bytes") or 0) >= SMALLEST_PEAK:
            peaks.setdefault((row["provider"], row["pass"], row["dtype"]), {})[size_of(row, results)] = row["peak_memory_bytes"]
    return peaks


def memory_exponents(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"provider": provider, "pass": pass_, "dtype": dtype, "exponent": exponent(list(found), list(found.values()))}
        for (provider, pass_, dtype), found in _peaks(results).items()
        if len(found) >= 2
    ]


# --------------------------------------------------------------------------------------------------------------------------------------------- plots


def figures(results: dict[str, Any]) -> dict[str, Any]:
    """Matplotlib figures by title: time against size for every pass, dtype and thread count, memory against size for every pass and dtype."""
    from matplotlib.figure import Figure

    from .plots import axes_of, colours, plain

    along = ", ".join(results["sweep"]["parameters"])
    colour = colours(results["rows"])
    drawn: dict[str, Figure] = {}
    for (pass_, dtype, threads), providers in _curves(results, floor=True).items():
        figure, axes = axes_of(along, "seconds per call")
        for name, rows in providers.items():
            found = sorted(rows.items())
            is_floor = found[0][1]["kind"] == "floor"
            axes.plot(
                [size for size, _ in found],
                [row["seconds"]["median"] for _, row in found],
                "--" if is_floor else "-o",
                color=colour[name],
                markersize=4,
                label=plain(name),
            )
            axes.fill_between(
                [size for size, _ in found], *([row["seconds"][end] for _, row in found] for end in ("q20", "q80")), color=colour[name], alpha=0.15
            )
        for one in results["sweep"]["crossovers"]:
            if (one["pass"], one["dtype"], one["threads"]) == (pass_, dtype, threads):
                axes.axvline(one["size"], color=colour[one["faster_above"]], linewidth=0.8, linestyle=":")
                axes.text(
                    one["size"],
                    1.0,
                    plain(f" {one['faster_above']} from {one['size']:.3g}"),
                    transform=axes.get_xaxis_transform(),
                    fontsize=7,
                    rotation=90,
                    va="top",
                )
        _mark_sizes(axes, results)
        _mark_missing(axes, results, pass_, dtype, threads)
        axes.legend(frameon=False, fontsize=8)
        drawn[f"time, {pass_}, {dtype}, {threads} threads"] = figure
    exponents = {(one["provider"], one["pass"], one["dtype"]): one["exponent"] for one in results["sweep"]["memory_exponents"]}
    peaks = _peaks(results)
    for pass_, dtype in dict.fromkeys((pass_, dtype) for _, pass_, dtype in peaks):
        figure, axes = axes_of(along, "peak memory beyond the inputs, bytes")
        for (name, *where), found in peaks.items():
            if where == [pass_, dtype]:
                power = exponents.get((name, pass_, dtype))
                label = name if power is None else f"{name}: ∝ size^{power:.2f}"
                axes.plot(list(found), list(found.values()), "-o", color=colour[name], markersize=4, label=plain(label))
        _mark_sizes(axes, results)
        axes.legend(frameon=False, fontsize=8)
        drawn[f"memory, {pass_}, {dtype}"] = figure
    return drawn


def _mark_sizes(axes: Any, results: dict[str, Any]) -> None:
    axes.minorticks_off()
    axes.set_xticks(results["sweep"]["sizes"], labels=[shown(size) for size in results["sweep"]["sizes"]])


def _mark_missing(axes: Any, results: dict[str, Any], pass_: str, dtype: str, threads: int) -> None:
    """A line under the plot for what ended early."""
    ended: dict[str, str] = {}
    for row in results["rows"]:
        if row["status"] != "ok" and (row["pass"], row["dtype"], row["threads"]) == (pass_, dtype, threads):
            ended.setdefault(row["provider"], f"{row['provider']}: {row['status']} from {shown(size_of(row, results))}")
    if ended:
        from .plots import plain

        axes.set_title(plain("\n".join(ended.values())), fontsize=7, loc="left", color="#a33")
