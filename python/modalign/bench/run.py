"""Runs cases x providers and gathers one row per (case, parameters, dtype, threads, pass, provider)."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import _load
from . import environment, measure, memory
from .registry import Case, Parameters, Provider, load_cases, providers_of
from .results import SCHEMA


@dataclass(frozen=True)
class Options:
    """threads: CPU threads of each run. dtypes: in place of the case's. where: keep grid points that agree with it. set: override sizes. quick: the
    case's small grid."""

    threads: tuple[int, ...] = (1,)
    passes: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    device: torch.device = torch.device("cpu")
    providers: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()
    where: Parameters = field(default_factory=dict)
    set: Parameters = field(default_factory=dict)
    rounds: int = 7
    seed: int = 0
    quick: bool = False
    memory: bool = True
    note: str = ""


def run_file(path: str | Path, options: Options, command: str, listen: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Results of all cases of a file, ready for write_results."""
    return run_cases(load_cases(path), options, command, listen)


def run_cases(cases: Sequence[Case], options: Options, command: str, listen: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    known = {case.name for case in cases}
    unknown = set(options.cases) - known
    if unknown:
        raise ValueError(f"bench: case must be one of {sorted(known)}, got {sorted(unknown)}")
    before = torch.get_num_threads()
    rows: list[dict[str, Any]] = []
    try:
        for case in cases:
            if options.cases and case.name not in options.cases:
                continue
            for parameters in _grid(case, options):
                for dtype in options.dtypes or case.dtypes:
                    rows.extend(_run_point(case, parameters, dtype, options, listen))
    finally:
        torch.set_num_threads(before)
    return {
        "schema": SCHEMA,
        "created": datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0).isoformat(),
        "command": command,
        "seed": options.seed,
        "note": options.note,
        "environment": environment.describe(options.device, options.seed),
        "rows": rows,
    }


def _grid(case: Case, options: Options) -> Iterator[dict[str, Any]]:
    seen = []
    for point in case.quick if options.quick and case.quick else case.grid:
        if any(point.get(key) != value for key, value in options.where.items()):
            continue
        changed = {**point, **{key: value for key, value in options.set.items() if key in point}}
        if changed not in seen:
            seen.append(changed)
            yield changed


def _run_point(
    case: Case, parameters: dict[str, Any], dtype: torch.dtype, options: Options, listen: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    shown = " ".join(f"{key}={value}" for key, value in parameters.items())
    passes = [pass_ for pass_ in case.passes if not options.passes or pass_ in options.passes]
    device = options.device
    chosen = {name: one for name, one in providers_of(case).items() if not options.providers or name in options.providers or one.kind == "floor"}
    reasons = {name: one.unavailable() or "" for name, one in chosen.items()}
    status = {name: "unavailable" if reasons[name] else "ok" for name in chosen}

    # Compiled code of earlier points would count against torch's recompile limit, past which it silently runs the eager form.
    torch.compiler.reset()
    listen(f"{case.name} {shown}: checking")
    torch.set_num_threads(max(options.threads))
    check = measure.Check(case, parameters, dtype, device, options.seed + 1)
    formula_errors = None
    errors: dict[str, tuple[measure.Error, measure.Error | None]] = {}
    for name, one in {**{name: one for name, one in providers_of(case).items() if one.kind == "formula"}, **chosen}.items():
        if one.kind == "floor" or status.get(name) == "unavailable":
            continue
        try:
            errors[name] = check.errors(one)
        except Exception as failure:  # a provider that cannot run is reported as such; only ours must always run
            if one.kind == "ours":
                raise
            status[name], reasons[name] = (
                "unavailable",
                f"{type(failure).__name__}: {str(failure).strip().splitlines()[0] if str(failure).strip() else 'no message'}",
            )
            continue
        if one.kind == "formula":
            formula_errors = errors[name]
    for name in chosen:
        if name in errors and (problem := check.verdict(chosen[name], errors[name], formula_errors)):
            status[name], reasons[name] = "mismatch", problem
    del check

    listen(f"{case.name} {shown}: memory")
    peaks: dict[tuple[str, str], int] = {}
    if options.memory:
        for (name, one), pass_ in itertools.product(chosen.items(), [pass_ for pass_ in passes if pass_ != "bwd"]):
            if status[name] == "ok" and one.kind != "floor":
                peaks[name, pass_] = memory.peak_bytes(case, one, parameters, dtype, device, pass_, options.seed, max(options.threads))

    for threads in options.threads:
        torch.set_num_threads(threads)
        inputs = measure.InputSets(case, parameters, dtype, device, options.seed)
        needs_gradient = any(pass_ != "fwd" for pass_ in passes)
        subjects = {name: measure.Subject(one, inputs, parameters, needs_gradient) for name, one in chosen.items() if status[name] == "ok"}
        done = 0

        def progress() -> None:
            nonlocal done
            done += 1
            listen(f"{case.name} {shown}, {threads} threads: round {done} of {options.rounds}")  # noqa: B023

        listen(f"{case.name} {shown}, {threads} threads: warming up")
        timings = measure.time_interleaved(subjects, passes, device, options.rounds, progress) if subjects else {}
        floor = next((name for name in subjects if chosen[name].kind == "floor"), None)
        for pass_, (name, one) in itertools.product(passes, chosen.items()):
            row: dict[str, Any] = {
                "case": case.name,
                "parameters": parameters,
                "dtype": str(dtype).removeprefix("torch."),
                "pass": pass_,
                "threads": threads,
                "provider": name,
                "kind": one.kind,
                "status": status[name],
                "reason": reasons[name],
            }
            if name in errors:
                forward, backward = errors[name]
                row["error"] = {"seed": options.seed + 1, "forward": vars(forward), "backward": vars(backward) if backward else None}
            if status[name] == "ok":
                row.update(_speed(case, parameters, dtype, pass_, timings[name], timings[floor] if floor else None))
                row["plan"] = _plan(one, subjects[name])
                row["peak_memory_bytes"] = peaks.get((name, pass_))
                row["target"] = next(
                    (
                        {"ratio": target.ratio, "met": row["ratio_to_floor"]["median"] <= target.ratio}
                        for target in case.targets
                        if floor and target.applies(name, pass_, parameters)
                    ),
                    None,
                )
            yield row


def _speed(
    case: Case, parameters: dict[str, Any], dtype: torch.dtype, pass_: str, timing: measure.Timing, floor: measure.Timing | None
) -> dict[str, Any]:
    seconds = timing.quantiles(pass_)
    flops, moved = (case.cost(kind, parameters, pass_, dtype.itemsize) for kind in ("flops", "bytes"))
    ratio = timing.ratio_to(floor, pass_) if floor else None
    return {
        "seconds": seconds,
        "rounds": len(timing.samples[pass_]),
        "calls_per_round": timing.calls if pass_ == "fwd" else max(1, timing.calls // 3),
        "flops": flops,
        "bytes": moved,
        "flop_per_second": flops / seconds["median"] if flops is not None else None,
        "byte_per_second": moved / seconds["median"] if moved is not None else None,
        "ratio_to_floor": ratio,
        "percent_of_floor": 100 / ratio["median"] if ratio else None,
        # a floor that spreads this much says that something else was running
        "noisy": floor is not None and (spread := floor.quantiles(pass_))["q80"] - spread["q20"] > 0.1 * spread["median"],
    }


def _plan(provider: Provider, subject: measure.Subject) -> str:
    if subject.inputs.device.type == "cuda":
        return measure.cuda_kernels(subject)
    with provider.context():
        if provider.plan:
            return provider.plan()
        return _load.instruction_set() if provider.kind == "ours" else f"torch {torch.backends.cpu.get_cpu_capability()}"
