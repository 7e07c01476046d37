"""Runs cases x providers and gathers one row per (case, parameters, dtype, threads, pass, provider)."""

from __future__ import annotations

import datetime
import itertools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import _load
from .._files import atomic_path
from . import environment, machine, measure, memory
from .registry import HALF, PASSES, Case, Parameters, Provider, one_line, providers_of
from .results import SCHEMA
from .sizes import check_parameters, listed

Listen = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """threads: CPU threads of each run. dtypes: in place of the case's. where: keep grid points that agree with it. set: override sizes. quick: the
    case's small grid. profile: folder for a trace of every provider. machine: a file with this machine's figures, in place of measuring them. limit:
    seconds that one call of a provider may take; one that takes longer is then reported and not timed."""

    threads: tuple[int, ...] = (1,)
    passes: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    device: torch.device = torch.device("cpu")
    providers: tuple[str, ...] = ()
    where: Parameters = field(default_factory=dict)
    set: Parameters = field(default_factory=dict)
    rounds: int = 7
    seed: int = 0
    quick: bool = False
    memory: bool = True
    note: str = ""
    profile: Path | None = None
    machine: Path | None = None
    limit: float | None = None


def run_cases(cases: Sequence[Case], options: Options, command: str, listen: Listen = lambda text: None) -> dict[str, Any]:
    """Results of these cases, ready for write_results. ValueError where an option names what no case has."""
    check_options(cases, options)
    dtypes = tuple(dict.fromkeys(dtype for case in cases for dtype in options.dtypes or case.dtypes))
    figures = measure_machine(dtypes, options, listen)
    before = torch.get_num_threads()
    rows: list[dict[str, Any]] = []
    try:
        with memory.limited(options.device):
            for case in cases:
                for parameters, dtype in itertools.product(_grid(case, options), options.dtypes or case.dtypes):
                    point = Point(case, parameters, dtype, options, figures, listen)
                    try:
                        point.check()
                    except (RuntimeError, MemoryError) as failure:
                        if not measure.is_out_of_memory(failure):
                            raise
                        raise ValueError(f"bench: the sizes must leave room for a reference in float64, got {listed(parameters)}") from failure
                    point.probe()
                    rows.extend(point.rows())
    finally:
        torch.set_num_threads(before)
    return new_results(options, command, figures, rows)


def check_options(cases: Sequence[Case], options: Options) -> None:
    """ValueError where an option names what no case has, or a formula of a case is not one: before anything is measured."""
    for case in cases:
        check_parameters(case, options.set, "--set")
    parameters = {name for case in cases for name in case.parameters}
    if unknown := set(options.where) - parameters:
        raise ValueError(f"bench: --where must be out of {sorted(parameters)}, got {sorted(unknown)}")
    if unknown := set(options.passes) - set(PASSES):
        raise ValueError(f"bench: --pass must be out of {PASSES}, got {sorted(unknown)}")
    providers = {name for case in cases for name in providers_of(case)}
    if unknown := set(options.providers) - providers:
        raise ValueError(f"bench: --providers must be out of {sorted(providers)}, got {sorted(unknown)}")
    if empty := [case.name for case in cases if not (_passes(case, options) and list(_grid(case, options)))]:
        raise ValueError(f"bench: the options must leave something to run of every case, got no size or no pass that they agree with of {', '.join(empty)}")
    for case in cases:
        for point, pass_ in itertools.product(_grid(case, options), _passes(case, options)):
            if broken := [rule for rule, holds in case.rules.items() if not holds(point)]:
                raise ValueError(f"bench: sizes of the case {case.name} must have {' and '.join(broken)}, got {listed(point)}")
            costs_of(case, point, pass_, torch.float32)


def costs_of(case: Case, parameters: Parameters, pass_: str, dtype: torch.dtype) -> dict[str, float | None]:
    return {kind: case.cost(kind, parameters, pass_, dtype.itemsize) for kind in ("flops", "bytes", "dense_flops")}


def measure_machine(dtypes: Sequence[torch.dtype], options: Options, listen: Listen) -> dict[str, Any]:
    """The machine's figures for what is about to run; half types on the CPU are held against float32 too."""
    wanted = tuple(dict.fromkeys([*dtypes, *([torch.float32] if any(dtype in HALF for dtype in dtypes) else [])]))
    if options.machine:
        return machine.saved(options.machine, wanted, options.threads, options.device)
    return machine.measure_machine(wanted, options.threads, options.device, quick=options.quick, listen=listen)


def new_results(options: Options, command: str, figures: dict[str, Any] | None, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "created": datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0).isoformat(),
        "command": command,
        "seed": options.seed,
        "note": options.note,
        "environment": environment.describe(options.device, options.seed),
        "machine": figures,
        "rows": rows,
    }


def _grid(case: Case, options: Options) -> Iterator[dict[str, Any]]:
    seen = []
    for point in case.points(options.quick):
        if any(point.get(key) != value for key, value in options.where.items()):
            continue
        changed = {**point, **options.set}
        if changed not in seen:
            seen.append(changed)
            yield changed


def _passes(case: Case, options: Options) -> list[str]:
    return [pass_ for pass_ in case.passes if not options.passes or pass_ in options.passes]


def _fault(failure: BaseException) -> tuple[str, str]:
    """Standing of a provider that raised this."""
    return "out of memory" if measure.is_out_of_memory(failure) else "failed", one_line(failure)


class Point:
    """Everything about one case at one size in one dtype. check, probe and rows in this order; where a provider may be too large for the machine
    (options.limit) probe first, since it alone runs providers in a process of their own."""

    def __init__(
        self, case: Case, parameters: dict[str, Any], dtype: torch.dtype, options: Options, figures: dict[str, Any] | None, listen: Listen
    ) -> None:
        self.case, self.parameters, self.dtype, self.options, self.figures = case, parameters, dtype, options, figures
        self.listen: Listen = lambda text: listen(f"{case.name} {listed(parameters)}{text}")
        self.passes = _passes(case, options)
        every = providers_of(case)
        self.formulas = {name: one for name, one in every.items() if one.kind == "formula"}
        self.chosen = {name: one for name, one in every.items() if not options.providers or name in options.providers or one.kind == "floor"}
        self.standing = {name: one.standing() for name, one in self.chosen.items()}
        self.errors: dict[str, tuple[measure.Error, measure.Error | None]] = {}
        self.peaks: dict[tuple[str, str], int] = {}
        self.checked: dict[str, Any] | None = None  # another size at which the results were checked
        # Compiled code of earlier points would count against torch's recompile limit, past which it silently runs the eager form.
        torch.compiler.reset()

    def runs(self, *, floor: bool = True) -> dict[str, Provider]:
        """The providers with nothing against them so far."""
        return {name: one for name, one in self.chosen.items() if self.standing[name][0] == "ok" and (floor or one.kind != "floor")}

    def check(self) -> None:
        """Errors of every provider against the reference in float64; a wrong one is not timed."""
        self.listen(": checking")
        torch.set_num_threads(max(self.options.threads))
        check = measure.Check(self.case, self.parameters, self.dtype, self.options.device, self.options.seed + 1, self.passes != ["fwd"])
        formula_errors = None
        for name, one in {**self.formulas, **self.runs(floor=False)}.items():
            if self.standing.get(name, ("ok",))[0] != "ok":
                continue
            try:
                self.errors[name] = check.errors(one)
            except measure.Mismatch as mismatch:
                self.standing[name] = "mismatch", str(mismatch)
                continue
            except (Exception, SystemExit) as failure:
                self.standing[name] = _fault(failure)
                continue
            if one.kind == "formula":
                formula_errors = self.errors[name]
        for name, one in self.runs(floor=False).items():
            if problem := check.verdict(one, self.errors[name], formula_errors):
                self.standing[name] = "mismatch", problem
            elif one.runs and not check.runs(one):
                self.standing[name] = "no kernel", f"{one.runs} takes no part at these sizes; plain torch does the work"

    def probe(self) -> None:
        """Peak memory of every provider and pass."""
        if not self.options.memory:
            return
        for name, one in self.runs(floor=False).items():
            for pass_ in self.passes:
                if pass_ == "bwd" or self.standing[name][0] != "ok":
                    continue
                self.listen(f": memory of {name}")
                try:
                    self.peaks[name, pass_] = memory.peak_bytes(
                        self.case,
                        one,
                        self.parameters,
                        self.dtype,
                        self.options.device,
                        pass_,
                        self.options.seed,
                        max(self.options.threads),
                        self.options.limit,
                    )
                except TimeoutError as error:
                    self.standing[name] = "too slow", str(error)
                except MemoryError as error:
                    self.standing[name] = "out of memory", str(error)
                except RuntimeError as error:
                    self.standing[name] = "failed", str(error).strip().splitlines()[-1]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Times of every provider that is still there, and a row for every other one."""
        for threads in self.options.threads:
            torch.set_num_threads(threads)
            subjects = self._subjects()
            done = 0

            def progress() -> None:
                nonlocal done
                done += 1
                self.listen(f", {threads} threads: round {done} of {self.options.rounds}")  # noqa: B023

            self.listen(f", {threads} threads: warming up")
            timings: dict[str, measure.Timing] = {}
            while subjects and not timings:
                try:
                    timings = measure.time_interleaved(subjects, self.passes, self.options.device, self.options.rounds, progress)
                except measure.Failure as failure:
                    del subjects[failure.provider]
                    self.standing[failure.provider] = _fault(failure.__cause__ or failure)
            traces = {name: self._trace(threads, name, one) for name, one in subjects.items() if self.options.profile and not one.floor}
            for pass_, name in itertools.product(self.passes, self.chosen):
                row = self._row(threads, pass_, name, timings, subjects.get(name))
                if name in traces:
                    row["trace"] = traces[name]
                yield row

    def _subjects(self) -> dict[str, measure.Subject]:
        """What is to be timed, each tied to the same inputs."""
        try:
            inputs = measure.InputSets(self.case, self.parameters, self.dtype, self.options.device, self.options.seed)
        except (RuntimeError, MemoryError) as failure:
            if not measure.is_out_of_memory(failure):
                raise
            self.standing.update({name: ("out of memory", f"the inputs: {one_line(failure)}") for name in self.runs()})
            return {}
        made = {name: self._subject(name, one, inputs) for name, one in self.runs().items()}
        return {name: subject for name, subject in made.items() if subject is not None}

    def _subject(self, name: str, one: Provider, inputs: measure.InputSets) -> measure.Subject | None:
        backward = self.passes != ["fwd"]
        try:
            subject = measure.Subject(one, inputs, self.parameters, backward)
            if self.options.limit is None:
                return subject
            with one.context():
                if one.compiled:
                    subject.both(0) if backward else subject.forward(0)
                begin = time.perf_counter()
                subject.both(0) if backward else subject.forward(0)
                took = time.perf_counter() - begin
        except Exception as failure:
            self.standing[name] = _fault(failure)
            return None
        if took > self.options.limit:
            self.standing[name] = "too slow", f"one call took {took:.3g} s"
            return None
        return subject

    def _row(self, threads: int, pass_: str, name: str, timings: dict[str, measure.Timing], subject: measure.Subject | None) -> dict[str, Any]:
        one, (status, reason) = self.chosen[name], self.standing[name]
        row: dict[str, Any] = {
            "case": self.case.name,
            "parameters": self.parameters,
            "dtype": str(self.dtype).removeprefix("torch."),
            "pass": pass_,
            "threads": threads,
            "provider": name,
            "kind": one.kind,
            "status": status,
            "reason": reason,
        }
        if name in self.errors:
            forward, backward = self.errors[name]
            row["error"] = {"seed": self.options.seed + 1, "forward": vars(forward), "backward": vars(backward) if backward else None}
        if subject is not None:
            if self.checked is not None:
                row["checked"] = self.checked
            floor = next((timing for other, timing in timings.items() if self.chosen[other].kind == "floor"), None)
            row.update(self._speed(threads, pass_, timings[name], floor))
            row["plan"] = _plan(one, subject)
            row["peak_memory_bytes"] = self.peaks.get((name, pass_))
            ratio = row["ratio_to_floor"]
            row["target"] = next(
                (
                    {"ratio": target.ratio, "met": ratio["median"] <= target.ratio}
                    for target in self.case.targets
                    if ratio and self.parameters in self.case.grid and target.applies(name, pass_, self.parameters)
                ),
                None,
            )
        return row

    def _speed(self, threads: int, pass_: str, timing: measure.Timing, floor: measure.Timing | None) -> dict[str, Any]:
        seconds = timing.quantiles(pass_)
        costs = costs_of(self.case, self.parameters, pass_, self.dtype)
        least, noisy_machine = machine.floor_seconds(
            self.figures, str(self.dtype).removeprefix("torch."), threads, costs["flops"], costs["bytes"]
        ) or (None, False)
        used, ratio, noisy_floor = None, None, False
        if floor:
            beside = floor.quantiles(pass_)
            used, ratio, noisy_floor = {"source": "declared", "seconds": beside["median"]}, timing.ratio_to(floor, pass_), machine.is_noisy(beside)
        elif least:
            used, ratio, noisy_floor = {"source": "machine", "seconds": least}, {key: one / least for key, one in seconds.items()}, noisy_machine
        rates = {"flops": "flop_per_second", "bytes": "byte_per_second", "dense_flops": "dense_flop_per_second"}
        return {
            "seconds": seconds,
            "rounds": len(timing.samples[pass_]),
            "calls_per_round": timing.calls[pass_],
            **costs,
            **{rates[kind]: None if work is None else work / seconds["median"] for kind, work in costs.items()},
            "floor": used,
            "ratio_to_floor": ratio,
            "percent_of_floor": 100 / ratio["median"] if ratio else None,
            "percent_of_machine": 100 * least / seconds["median"] if least else None,
            "noisy": noisy_floor or machine.is_noisy(seconds),
        }

    def _trace(self, threads: int, name: str, subject: measure.Subject) -> str:
        """One call as the profiler sees it, with its backward where that is measured; the name of the file."""
        from torch.profiler import profile

        words = [self.case.name, *(f"{key}{value}" for key, value in self.parameters.items()), str(self.dtype).removeprefix("torch.")]
        file = "-".join([*words, f"{threads}threads", name])
        file = re.sub(r"[^\w.+-]+", "_", file) + ".json"
        assert self.options.profile is not None
        with subject.provider.context(), profile(record_shapes=True) as trace:
            subject.forward(0) if self.passes == ["fwd"] else subject.both(0)
        with atomic_path(self.options.profile / file) as temporary:
            trace.export_chrome_trace(str(temporary))
        return file


def _plan(provider: Provider, subject: measure.Subject) -> str:
    if subject.inputs.device.type == "cuda":
        return measure.cuda_kernels(subject)
    if subject.floor and "plan" in subject.floor:
        return subject.floor["plan"]
    with provider.context():
        if provider.plan:
            return provider.plan()
        return _load.instruction_set() if provider.kind == "ours" else f"torch {torch.backends.cpu.get_cpu_capability()}"
