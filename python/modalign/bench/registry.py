"""What is measured: cases (a problem with sizes, formulas and a float64 reference) and providers (one way to solve it)."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import numbers
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._load import PACKAGE

PASSES = ("fwd", "bwd", "fwd+bwd")
HALF = (torch.float16, torch.bfloat16)
KINDS = ("ours", "peer", "formula", "floor")

Parameters = Mapping[str, Any]
Cost = Callable[[Parameters, str, int], float]  # (parameters, pass, bytes of an element) -> FLOP or bytes


@dataclass(frozen=True)
class Target:
    """A speed to reach: `provider` takes at most `ratio` of the floor's time in this pass at the sizes of the case's grid that agree with `where`."""

    ratio: float
    provider: str = "ours"
    pass_: str = "fwd"
    where: Parameters = field(default_factory=dict)

    def applies(self, provider: str, pass_: str, parameters: Parameters) -> bool:
        return provider == self.provider and pass_ == self.pass_ and all(parameters.get(key) == value for key, value in self.where.items())


@dataclass(frozen=True)
class Case:
    """make(maker, **parameters) gives the inputs, a tuple of tensors or lists of tensors; every floating one is differentiated. reference takes
    them in float64 and is differentiable. flops and bytes count what the problem needs, not what a provider does. Where sparsity makes the problem
    smaller, dense_flops counts what it would need without: rows then hold the useful rate (flops) and the dense-equivalent one (dense_flops). rules are
    what its parameters must have beyond what make says: {"k at least 2": lambda p: p["k"] >= 2}."""

    name: str
    make: Callable[..., tuple[Any, ...]]
    grid: tuple[Parameters, ...]
    reference: Callable[..., Tensor]
    quick: tuple[Parameters, ...] = ()
    flops: Cost | None = None
    bytes: Cost | None = None
    dense_flops: Cost | None = None
    passes: tuple[str, ...] = PASSES
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    targets: tuple[Target, ...] = ()
    rules: Mapping[str, Callable[[Parameters], bool]] = field(default_factory=dict)
    file: str = ""

    @property
    def parameters(self) -> list[str]:
        """Names of what a size consists of."""
        return list(dict.fromkeys(key for point in self.grid for key in point))

    def points(self, quick: bool = False) -> tuple[Parameters, ...]:
        return self.quick if quick and self.quick else self.grid

    def cost(self, kind: str, parameters: Parameters, pass_: str, size: int) -> float | None:
        """kind: "flops", "bytes" or "dense_flops"."""
        formula: Cost | None = getattr(self, kind)
        if formula is None:
            return None
        if pass_ == "fwd+bwd":
            return sum(self.cost(kind, parameters, part, size) or 0 for part in ("fwd", "bwd"))
        try:
            found: Any = formula(parameters, pass_, size)
        except Exception as failure:
            found = one_line(failure)
        if not isinstance(found, numbers.Real) or not 0 <= found < math.inf:
            raise ValueError(f"case {self.name}: {kind} must be a function of (parameters, pass, bytes of a number) that gives a number, got {found}")
        return found if isinstance(found, int) else float(found)


@dataclass(frozen=True)
class Provider:
    """function(*inputs) gives the result, and its backward is autograd's. A floor instead has prepare(sets, parameters, dtype, device), which gives
    {"fwd": f, "bwd": f}: functions of the number of the input set; under "plan" it may say what they run. requires is the module that it imports,
    and install what to install for it where the package has another name; without the module its rows say "not installed". unavailable() is None or
    another reason why it cannot run here; plan() says what runs, read inside `context`. runs is an op that must take part, as
    "modalign::clip_loss": where it does not, the provider fell back and gets no speed."""

    name: str
    function: Callable[..., Tensor] | None = None
    prepare: Callable[..., dict[str, Any]] | None = None
    kind: str = "peer"
    requires: str = ""
    install: str = ""
    unavailable: Callable[[], str | None] = lambda: None
    plan: Callable[[], str] | None = None
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    runs: str = ""
    compiled: bool = False  # the first call of a shape is expensive and does not count, in memory either

    def standing(self) -> tuple[str, str]:
        """(status, reason): ("ok", ""), ("not installed", what to do) or ("unavailable", why)."""
        if self.requires and not _found(self.requires):
            return "not installed", f"pip install {self.install or self.requires.partition('.')[0]}"
        reason = self.unavailable()
        return ("unavailable", reason) if reason else ("ok", "")


def one_line(failure: BaseException) -> str:
    """
    >>> one_line(RuntimeError("no kernel\\nlong trace"))
    'RuntimeError: no kernel'
    """
    text = str(failure).strip()
    return f"{type(failure).__name__}: {text.splitlines()[0] if text else 'no message'}"


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it is missing
        return False


_cases: dict[str, Case] = {}
_providers: dict[str, dict[str, Provider]] = {}
_loading: list[str] = []
_sources: list[str] = []  # files of cases and "module:function" providers in the order in which they were loaded


def case(
    *, grid: Sequence[Parameters], reference: Callable[..., Tensor], name: str | None = None, **options: Any
) -> Callable[[Callable[..., tuple[Any, ...]]], Case]:
    """Declare a case; the decorated function makes its inputs."""

    _check_keywords("case", options, Case, {"make", "file"})
    if not grid:
        raise ValueError("case: grid must hold at least one size, got none")

    def declare(make: Callable[..., tuple[Any, ...]]) -> Case:
        settings = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
        unknown = set(settings.get("passes", ())) - set(PASSES)
        if unknown:
            raise ValueError(f"case: passes must be out of {PASSES}, got {sorted(unknown)}")
        made = Case(name=name or make.__name__, make=make, grid=tuple(grid), reference=reference, file=_loading[-1] if _loading else "", **settings)
        before = _cases.get(made.name)
        if before is not None and before.file != made.file:
            raise ValueError(f"case: name must be new, got {made.name!r}, which {before.file or 'this process'} declares")
        _cases[made.name] = made
        _providers.setdefault(made.name, {})
        return made

    return declare


def _check_keywords(function: str, options: Mapping[str, Any], made: type, own: set[str]) -> None:
    known = {one.name for one in fields(made)} - own
    if unknown := set(options) - known:
        raise ValueError(f"{function}: keywords must be out of {sorted(known)}, got {sorted(unknown)}")


def provider(
    *of: Case | str, name: str | None = None, kind: str = "peer", **options: Any
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Declare a way to solve one or more cases."""
    if kind not in KINDS:
        raise ValueError(f"provider: kind must be one of {KINDS}, got {kind!r}")
    _check_keywords("provider", options, Provider, {"function", "prepare"})

    def declare(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        _add(Provider(name=name or function.__name__, function=function, kind=kind, **options), of)
        return function

    return declare


def _add(made: Provider, of: Sequence[Case | str]) -> None:
    for one in of:
        key = one.name if isinstance(one, Case) else one
        if key not in _cases:
            raise ValueError(f"provider: case must be one of {sorted(_cases)}, got {key!r}")
        floors = {one.name for one in _providers[key].values() if one.kind == "floor"} | ({made.name} if made.kind == "floor" else set())
        if len(floors) > 1:
            raise ValueError(f"provider: case {key} must have one floor, got {sorted(floors)}")
        _providers[key][made.name] = made


def matmul_floor(*of: Case, name: str = "floor") -> Callable[[Callable[..., list[tuple[int, int, int]]]], Any]:
    """Declare the floor of compute-bound cases: products of the same FLOPs by torch.mm into preallocated outputs. The decorated function gives, for
    (parameters, pass), the sizes (rows, depth, columns) of the products; their number and shapes are those of the algorithm. In the dtype of the
    inputs; of half types on the CPU in that or in float32, whichever takes less time here."""

    def declare(shapes: Callable[..., list[tuple[int, int, int]]]) -> Any:
        def prepare(sets: int, parameters: Parameters, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
            generator = torch.Generator().manual_seed(0)

            def products(pass_: str, real: torch.dtype) -> Callable[[int], Any]:
                operands = []
                for rows, depth, columns in shapes(parameters, pass_):
                    left = [torch.randn(rows, depth, generator=generator).to(device, real) for _ in range(sets)]
                    right = [torch.randn(columns, depth, generator=generator).to(device, real).mT for _ in range(sets)]  # as in a linear layer
                    operands.append((left, right, torch.empty(rows, columns, dtype=real, device=device)))

                def call(index: int) -> None:
                    for left, right, out in operands:
                        torch.mm(left[index], right[index], out=out)

                return call

            if device.type != "cpu" or dtype not in HALF:
                return {"fwd": products("fwd", dtype), "bwd": products("bwd", dtype)}
            chosen = {pass_: _faster({real: products(pass_, real) for real in (torch.float32, dtype)}) for pass_ in ("fwd", "bwd")}
            plan = ", ".join(f"{pass_} in {str(real).removeprefix('torch.')}" for pass_, (real, _) in chosen.items())
            return {**{pass_: call for pass_, (_, call) in chosen.items()}, "plan": f"torch.mm: {plan}"}

        _add(Provider(name=name, prepare=prepare, kind="floor"), of)
        return shapes

    return declare


def _faster(calls: Mapping[torch.dtype, Callable[[int], Any]]) -> tuple[torch.dtype, Callable[[int], Any]]:
    """The call that takes the least time, with its dtype. One that is hopeless, such as half types without instructions for them, is called twice."""
    best: dict[torch.dtype, float] = {}
    for dtype, call in calls.items():
        call(0)  # warm up
        begin, count = time.perf_counter(), 0
        while count < 3 or (count < 100 and time.perf_counter() - begin < 0.02):
            before = time.perf_counter()
            call(0)
            count += 1
            best[dtype] = min(best.get(dtype, math.inf), time.perf_counter() - before)
            if best[dtype] > 3 * min(best.values()):
                break
    dtype = min(best, key=best.__getitem__)
    return dtype, calls[dtype]


def copy_floor(*of: Case, name: str = "floor") -> Callable[[Cost], Cost]:
    """Declare the floor of memory-bound cases: one copy that moves as many bytes (reads and writes together) as the decorated function counts."""

    def declare(moved: Cost) -> Cost:
        def prepare(sets: int, parameters: Parameters, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[int], Any]]:
            def copies(pass_: str) -> Callable[[int], Any]:
                count = max(1, round(moved(parameters, pass_, dtype.itemsize) / 8))  # float32, read once and written once
                source = [torch.ones(count, device=device) for _ in range(sets)]
                target = torch.empty(count, device=device)
                return lambda index: target.copy_(source[index])

            return {"fwd": copies("fwd"), "bwd": copies("bwd")}

        _add(Provider(name=name, prepare=prepare, kind="floor"), of)
        return moved

    return declare


def cases() -> dict[str, Case]:
    return dict(_cases)


def providers_of(of: Case | str) -> dict[str, Provider]:
    return dict(_providers[of.name if isinstance(of, Case) else of])


def load_cases(path: str | Path) -> list[Case]:
    """The cases that a file declares. Loading it again replaces them."""
    path = Path(path).resolve()
    specification = importlib.util.spec_from_file_location(f"modalign_bench_cases_{path.stem}", path)
    if not path.is_file() or specification is None or specification.loader is None:
        raise FileNotFoundError(f"load_cases: path must be a Python file, got {path}")
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    _loading.append(str(path))
    try:
        with _plain(f"load_cases: {path.name}"):
            specification.loader.exec_module(module)
    finally:
        _loading.pop()
    _remember(str(path))
    return [declared for declared in _cases.values() if declared.file == str(path)]


@contextlib.contextmanager
def _plain(what: str) -> Iterator[None]:
    """Mistakes in people's own files as one line that says where. A module that is missing is said as it is."""
    try:
        yield
    except ModuleNotFoundError:
        raise
    except Exception as failure:
        theirs = [frame for frame in traceback.extract_tb(failure.__traceback__) if PACKAGE not in Path(frame.filename).parents]
        theirs = [frame for frame in theirs if not frame.filename.startswith("<") and Path(frame.filename).parent.name != "importlib"]
        where = f" ({Path(theirs[-1].filename).name}, line {theirs[-1].lineno})" if theirs else ""
        raise ValueError(f"{what} must load, got {one_line(failure)}{where}") from failure


def load_provider(function: str, *of: Case | str) -> Provider:
    """Make "module:function" a provider of these cases, with that name. It takes the inputs that the case makes and gives the result.

    >>> import modalign.bench as bench
    >>> bench.load_provider("torch.nowhere:relu")
    Traceback (most recent call last):
    ModuleNotFoundError: No module named 'torch.nowhere'
    """
    module, colon, name = function.partition(":")
    if not (module and colon and name):
        raise ValueError(f"load_provider: function must be written as module:function, got {function!r}")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # a command's own path holds the script's folder, not the user's
    with _plain(f"load_provider: {module}"):
        found = getattr(importlib.import_module(module), name, None)
    if not callable(found):
        raise ValueError(f"load_provider: function must be one of {module}, got {name!r}")
    made = Provider(name=function, function=found)
    _add(made, of)
    for one in of:
        _remember(f"{function}@{one.name if isinstance(one, Case) else one}")
    return made


def _remember(source: str) -> None:
    if source not in _sources:
        _sources.append(source)


def sources() -> list[str]:
    """What a new process has to `load` to know the same cases and providers."""
    return list(_sources)


def load(source: str) -> None:
    function, at, of = source.rpartition("@")
    if at and ":" in function:
        load_provider(function, of)
    else:
        load_cases(source)
