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
from .registry import PASSES, Case, Parameters, Provider, load_cases, providers_of
from .results import SCHEMA
from .sizes import check_parameters

Listen = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """threads: CPU threads of each run. dtypes: in place of the case's. where: keep grid points that agree with it. set: override sizes. quick: the
    case's small grid. profile: folder for a trace of every provider. limit: seconds that one call of a provider may take; one that takes longer, or
    more memory than there is, is then reported and not timed."""

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
    profile: Path | None = None
    limit: float | None = None


def run_file(path: str | Path, options: Options, command: str, listen: Listen = lambda text: None) -> dict[str, Any]:
    """Results of all cases of a file, ready for write_results."""
    return run_cases(load_cases(path), options, command, listen)


def run_cases(cases: Sequence[Case], options: Options, command: str, listen: Listen = lambda text: None) -> dict[str, Any]:
    """Results of these cases, ready for write_results. ValueError where an option names what no case has."""
    chosen = choose(cases, options)
    dtypes = tuple(dict.fromkeys(dtype for case in chosen for dtype in options.dtypes or case.dtypes))
    figures = measure_machine(dtypes, options, listen)
    before = torch.get_num_threads()
    rows: list[dict[str, Any]] = []
    try:
        for case in chosen:
            for parameters in _grid(case, options):
                for dtype in options.dtypes or case.dtypes:
                    point = Point(case, parameters, dtype, options, figures, listen)
                    point.check()
                    point.probe()
                    rows.extend(point.rows())
    finally:
        torch.set_num_threads(before)
    return new_results(options, command, figures, rows)


def choose(cases: Sequence[Case], options: Options) -> list[Case]:
    """The cases that the options ask for, after a look at everything else that the options name."""
    known = {case.name for case in cases}
    if unknown := set(options.cases) - known:
        raise ValueError(f"bench: case must be one of {sorted(known)}, got {sorted(unknown)}")
    chosen = [case for case in cases if not options.cases or case.name in options.cases]
    for case in chosen:
        check_parameters(case, options.set, "--set")
    parameters = {name for case in chosen for name in case.parameters}
    if unknown := set(options.where) - parameters:
        raise ValueError(f"bench: --where must be out of {sorted(parameters)}, got {sorted(unknown)}")
    if unknown := set(options.passes) - set(PASSES):
        raise ValueError(f"bench: --pass must be out of {PASSES}, got {sorted(unknown)}")
    providers = {name for case in chosen for name in providers_of(case)}
    if unknown := set(options.providers) - providers:
        raise ValueError(f"bench: --providers must be out of {sorted(providers)}, got {sorted(unknown)}")
    if not any(_passes(case, options) and list(_grid(case, options)) for case in chosen):
        raise ValueError("bench: the options must leave something to run, got no size or no pass that they agree with")
    return chosen


def measure_machine(dtypes: Sequence[torch.dtype], options: Options, listen: Listen) -> dict[str, Any]:
    """The machine's figures for what is about to run; half types on the CPU are held against float32 too."""
    also = [torch.float32] if any(dtype in (torch.float16, torch.bfloat16) for dtype in dtypes) else []
    return machine.measure_machine(tuple(dict.fromkeys([*dtypes, *also])), options.threads, options.device, quick=options.quick, listen=listen)


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


def _one_line(failure: BaseException) -> str:
    text = str(failure).strip()
    return f"{type(failure).__name__}: {text.splitlines()[0] if text else 'no message'}"


class Point:
    """Everything about one case at one size in one dtype. check, probe and rows in this order; where a provider may be too large for the machine
    (options.limit) probe first, since it alone runs providers in a process of their own."""

    def __init__(
        self, case: Case, parameters: dict[str, Any], dtype: torch.dtype, options: Options, figures: dict[str, Any] | None, listen: Listen
    ) -> None:
        self.case, self.parameters, self.dtype, self.options, self.figures = case, parameters, dtype, options, figures
        self.shown = " ".join(f"{key}={value}" for key, value in parameters.items())
        self.listen: Listen = lambda text: listen(f"{case.name} {self.shown}{text}")
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
        check = measure.Check(self.case, self.parameters, self.dtype, self.options.device, self.options.seed + 1)
        formula_errors = None
        for name, one in {**self.formulas, **self.runs(floor=False)}.items():
            if self.standing.get(name, ("ok",))[0] != "ok":
                continue
            try:
                self.errors[name] = check.errors(one)
            except Exception as failure:  # a provider that cannot run is reported as such; only ours must always run
                if self.options.limit is not None and memory.is_out_of_memory(_one_line(failure)):
                    self.standing[name] = "out of memory", _one_line(failure)
                elif one.kind == "ours":
                    raise
                else:
                    self.standing[name] = "unavailable", _one_line(failure)
                continue
            if one.kind == "formula":
                formula_errors = self.errors[name]
        for name, one in self.runs(floor=False).items():
            if problem := check.verdict(one, self.errors[name], formula_errors):
                self.standing[name] = "mismatch", problem

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
                except RuntimeError as error:  # without a limit the check has already said so
                    if one.kind == "ours" or self.options.limit is None:
                        raise
                    self.standing[name] = "unavailable", str(error).strip().splitlines()[-1]

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
            timings = measure.time_interleaved(subjects, self.passes, self.options.device, self.options.rounds, progress) if subjects else {}
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
            if self.options.limit is None or not memory.is_out_of_memory(_one_line(failure)):
                raise
            self.standing.update({name: ("out of memory", f"the inputs: {_one_line(failure)}") for name in self.runs()})
            return {}
        made = {name: self._subject(name, one, inputs) for name, one in self.runs().items()}
        return {name: subject for name, subject in made.items() if subject is not None}

    def _subject(self, name: str, one: Provider, inputs: measure.InputSets) -> measure.Subject | None:
        backward = any(pass_ != "fwd" for pass_ in self.passes)
        if self.options.limit is None:
            return measure.Subject(one, inputs, self.parameters, backward)
        try:
            subject = measure.Subject(one, inputs, self.parameters, backward)
            with one.context():
                if one.compiled:
                    subject.both(0) if backward else subject.forward(0)
                begin = time.perf_counter()
                subject.both(0) if backward else subject.forward(0)
                took = time.perf_counter() - begin
        except (RuntimeError, MemoryError) as failure:
            if not memory.is_out_of_memory(_one_line(failure)):
                raise
            self.standing[name] = "out of memory", _one_line(failure)
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
        flops, moved, dense = (self.case.cost(kind, self.parameters, pass_, self.dtype.itemsize) for kind in ("flops", "bytes", "dense_flops"))
        if floor:
            beside = floor.quantiles(pass_)
            used, ratio, noisy = {"source": "declared", "seconds": beside["median"]}, timing.ratio_to(floor, pass_), machine.is_noisy(beside)
        elif found := machine.floor_seconds(self.figures, str(self.dtype).removeprefix("torch."), threads, flops, moved):
            least, noisy = found
            used, ratio = {"source": "machine", "seconds": least}, {key: value / least for key, value in seconds.items()}
        else:
            used, ratio, noisy = None, None, machine.is_noisy(seconds)
        return {
            "seconds": seconds,
            "rounds": len(timing.samples[pass_]),
            "calls_per_round": timing.calls if pass_ == "fwd" else max(1, timing.calls // 3),
            "flops": flops,
            "bytes": moved,
            "dense_flops": dense,
            "flop_per_second": flops / seconds["median"] if flops is not None else None,
            "byte_per_second": moved / seconds["median"] if moved is not None else None,
            "dense_flop_per_second": dense / seconds["median"] if dense is not None else None,
            "floor": used,
            "ratio_to_floor": ratio,
            "percent_of_floor": 100 / ratio["median"] if ratio else None,
            "noisy": noisy,  # a floor that spreads says that something else was running
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
    with provider.context():
        if provider.plan:
            return provider.plan()
        return _load.instruction_set() if provider.kind == "ours" else f"torch {torch.backends.cpu.get_cpu_capability()}"
