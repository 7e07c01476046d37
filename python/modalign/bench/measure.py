"""Correctness first, then time: fresh-seed errors against float64, and interleaved rounds over rotated inputs."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..testing.cases import Maker
from ..testing.tolerances import tolerance_of
from .environment import last_cache_bytes
from .registry import HALF, Case, Parameters, Provider, one_line
from .sizes import listed

MAXIMUM_RELATIVE_ERROR = 0.05  # of the result's RMS: what misses this is no result, however wrong the formula itself is
PEER_FACTOR = 16.0  # compiled code may sum long rows one by one, which costs a digit: its error is shown beside its time
MINIMUM_SAMPLE_SECONDS = 0.02  # shorter calls are timed many at a time
ZERO = 1e-14  # what float64 leaves of numbers that cancel
SLOW = 20.0  # a provider this many times slower than the fastest takes part in SLOW_ROUNDS of the rounds only
SLOW_ROUNDS = 3


def is_out_of_memory(failure: BaseException) -> bool:
    known = ("can't allocate memory", "bad_alloc", "out of memory", "Cannot allocate memory")
    return isinstance(failure, MemoryError) or any(words in str(failure) for words in (*known, "MemoryError"))


@contextlib.contextmanager
def _mistakes_of(case: Case, parameters: Parameters, must: str) -> Iterator[None]:
    """What a case's own functions raise as one line; that there is not enough memory is for the caller."""
    try:
        yield
    except Exception as failure:
        if is_out_of_memory(failure):
            raise
        raise ValueError(f"bench: case {case.name} must {must} at {listed(parameters)}, got {one_line(failure)}") from failure


def _tensors(inputs: tuple[Any, ...]) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]


class InputSets:
    """Copies of the inputs, together larger than twice the last cache, so that no call finds its own in there. `count` overrides how many."""

    def __init__(self, case: Case, parameters: Parameters, dtype: torch.dtype, device: torch.device, seed: int, count: int | None = None) -> None:
        self.case, self.dtype, self.device = case, dtype, device
        first = self._make(parameters, seed)
        size = max(1, sum(tensor.numel() * tensor.element_size() for tensor in _tensors(first)))
        self.count = count or max(2, min(64, math.ceil(2 * last_cache_bytes(device) / size)))
        # one draw, many copies: the numbers do not matter to the time, the addresses do
        self.plain = [first, *(pytree.tree_map_only(Tensor, torch.clone, first) for _ in range(self.count - 1))]
        self.tracked = [
            pytree.tree_map_only(Tensor, lambda t: t.detach().requires_grad_() if t.is_floating_point() else t, inputs) for inputs in self.plain
        ]
        self.leaves = [[tensor for tensor in _tensors(inputs) if tensor.requires_grad] for inputs in self.tracked]

    def _make(self, parameters: Parameters, seed: int) -> tuple[Any, ...]:
        with _mistakes_of(self.case, parameters, "give inputs"):
            made: Any = self.case.make(Maker(self.dtype, self.device, seed), **parameters)
        if not isinstance(made, tuple):
            raise ValueError(f"bench: case {self.case.name} must give its inputs as a tuple, got {type(made).__name__}")
        for index, tensor in enumerate(_tensors(made)):
            if tensor.numel() == 0:
                raise ValueError(f"bench: case {self.case.name} must give inputs with numbers, got input {index} empty at {listed(parameters)}")
        return made


class Subject:
    """A provider tied to its inputs, as calls that can be timed: forward(i) without a graph, both(i) with the time in between taken by `clock`."""

    def __init__(self, provider: Provider, inputs: InputSets, parameters: Parameters, upstream: bool = True) -> None:
        self.provider, self.inputs = provider, inputs
        self.floor = provider.prepare(inputs.count, parameters, inputs.dtype, inputs.device) if provider.prepare else None
        self.gradient: Tensor | None = None
        if upstream and not self.floor:
            with torch.no_grad(), provider.context():
                shape = provider.function(*inputs.plain[0])  # type: ignore[misc]
            self.gradient = torch.randn(shape.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32).to(shape.device, shape.dtype)

    def forward(self, index: int) -> Any:
        if self.floor:
            return self.floor["fwd"](index)
        with torch.no_grad():
            return self.provider.function(*self.inputs.plain[index])  # type: ignore[misc]

    def both(self, index: int, between: Callable[[], None] = lambda: None) -> Any:
        if self.floor:
            self.floor["fwd"](index)
            between()
            return self.floor["bwd"](index)
        result = self.provider.function(*self.inputs.tracked[index])  # type: ignore[misc]
        between()
        return result.detach(), torch.autograd.grad(result, self.inputs.leaves[index], self.gradient, allow_unused=True)


# -------------------------------------------------------------------------------------------------------------------------------------------- errors


@dataclass(frozen=True)
class Error:
    """Largest absolute error, and the same over the RMS of what is expected, itself where that is zero but for rounding (of gradients: the worst input)."""

    maximum: float
    relative: float


def _error(actual: Tensor, expected: Tensor) -> Error:
    difference = (actual.detach().double().cpu() - expected).abs()
    maximum = difference.max().item() if not difference.isnan().any() else math.inf
    rms = expected.square().mean().sqrt().item()
    return Error(maximum, maximum / (rms if rms > ZERO else 1.0))


class Mismatch(Exception):
    """A result that is wrong in another way than by its numbers."""


class _OpsSeen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(function.name().partition(".")[0])
        return function(*args, **(kwargs or {}))


class Check:
    """Errors of providers on one set of inputs that is never timed, against the case's reference in float64."""

    def __init__(self, case: Case, parameters: Parameters, dtype: torch.dtype, device: torch.device, seed: int, backward: bool = True) -> None:
        self.dtype, self.backward = dtype, backward
        self.inputs = InputSets(case, parameters, dtype, device, seed, count=1)
        exact = pytree.tree_map_only(
            Tensor, lambda t: t.detach().cpu().double().requires_grad_() if t.is_floating_point() else t.cpu(), self.inputs.plain[0]
        )
        with _mistakes_of(case, parameters, "have a reference"):
            expected: Any = case.reference(*exact)
        if not isinstance(expected, Tensor) or not expected.is_floating_point() or expected.numel() == 0:
            got = f"{list(expected.shape)} of {expected.dtype}" if isinstance(expected, Tensor) else type(expected).__name__
            raise ValueError(f"bench: reference of case {case.name} must give floating numbers, got {got} at {listed(parameters)}")
        if backward and not expected.requires_grad:
            raise ValueError(f"bench: reference of case {case.name} must be differentiable, or passes be ['fwd'], got a result without gradient")
        self.upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
        self.expected = expected.detach()
        self.gradients = self._gradients(expected, _tensors(exact), self.upstream.double()) if backward else ()

    @staticmethod
    def _gradients(result: Tensor, inputs: Sequence[Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
        leaves = [tensor for tensor in inputs if tensor.requires_grad]
        return torch.autograd.grad(result, leaves, upstream, allow_unused=True, materialize_grads=True)

    def errors(self, provider: Provider) -> tuple[Error, Error | None]:
        """Of the result and the worst gradient. Mismatch where the result is of another kind or shape, or the inputs are no longer what they were."""
        plain = pytree.tree_map_only(Tensor, torch.clone, self.inputs.plain[0])  # so that nobody spoils them for the next
        given = pytree.tree_map_only(Tensor, lambda t: t.detach().requires_grad_(self.backward and t.is_floating_point()), plain)
        backward = None
        with provider.context(), torch.set_grad_enabled(self.backward):
            result = self._checked(provider.function(*given))  # type: ignore[misc]
            if self.backward:
                if not result.requires_grad:
                    raise RuntimeError("the result must have a gradient, got one without")
                gradients = self._gradients(result, _tensors(given), self.upstream.to(result.device, result.dtype))
                worst = [_error(gradient, expected) for gradient, expected in zip(gradients, self.gradients, strict=True)]
                backward = Error(max(error.maximum for error in worst), max(error.relative for error in worst))
        for index, (now, before) in enumerate(zip(_tensors(plain), _tensors(self.inputs.plain[0]), strict=True)):
            if not ((now == before) | ((now != now) & (before != before))).all():
                raise Mismatch(f"it must leave its inputs as they are, got input {index} changed in place")
        return _error(result, self.expected), backward

    def _checked(self, result: Any) -> Tensor:
        """Half types may give their result in float32, as losses do."""
        if not isinstance(result, Tensor) or result.shape != self.expected.shape:
            got = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise Mismatch(f"the result must be a tensor of shape {list(self.expected.shape)}, got {got}")
        allowed = [self.dtype, *([torch.float32] if self.dtype in HALF else [])]
        if result.dtype not in allowed:
            raise Mismatch(f"the result must be {' or '.join(map(str, allowed))}, got {result.dtype}".replace("torch.", ""))
        return result

    def runs(self, provider: Provider) -> bool:
        """Whether the op that must take part in the forward does."""
        with provider.context(), torch.no_grad(), _OpsSeen() as seen:
            provider.function(*self.inputs.plain[0])  # type: ignore[misc]
        return provider.runs in seen.names

    def verdict(self, provider: Provider, errors: tuple[Error, Error | None], formula: tuple[Error, Error | None] | None) -> str:
        """Empty where the result matches: for ours, an error of at most that of the plain formula in this dtype plus what rounding explains. Other
        people's forms may lose as many digits as the formula, give or take a factor: that is their rounding, not a wrong result."""
        bounds, factor = tolerance_of(self.dtype), 1 if provider.kind == "ours" else PEER_FACTOR
        for what, index, share in (("forward", 0, bounds.value), ("backward", 1, bounds.element)):
            error, yardstick = errors[index], formula[index] if formula else None
            if error is None:
                continue
            allowed = min(MAXIMUM_RELATIVE_ERROR, share + (factor * yardstick.relative if yardstick and math.isfinite(yardstick.relative) else 0.0))
            if not error.relative <= allowed:
                return f"{what} error {error.relative:.3g} of the RMS, allowed {allowed:.3g}"
        return ""


# ---------------------------------------------------------------------------------------------------------------------------------------------- time


class Clock:
    """Marks in time; seconds() gives the intervals between them. On CUDA the marks are events of the current stream."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        if self.cuda:
            torch.cuda.synchronize()
            gaps = [first.elapsed_time(second) / 1e3 for first, second in zip(self.marks, self.marks[1:], strict=False)]
        else:
            gaps = [second - first for first, second in zip(self.marks, self.marks[1:], strict=False)]
        self.marks = []
        return gaps


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median and the quantiles between which 60 % of the values lie."""
    if len(values) == 1:
        return {"median": values[0], "q20": values[0], "q80": values[0]}
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return {"median": statistics.median(values), "q20": fifths[0], "q80": fifths[3]}


@dataclass
class Timing:
    """samples[pass] = {round: seconds of one call}; calls[pass]: how many were timed together in a round."""

    samples: dict[str, dict[int, float]]
    calls: dict[str, int]

    def quantiles(self, pass_: str) -> dict[str, float]:
        return quantiles(list(self.samples[pass_].values()))

    def ratio_to(self, floor: Timing, pass_: str) -> dict[str, float] | None:
        """Quantiles of the ratios within a round: slow drifts of the machine hit both and cancel."""
        ours, theirs = self.samples[pass_], floor.samples[pass_]
        shared = [ours[index] / theirs[index] for index in ours if index in theirs]
        return quantiles(shared) if shared else None


class Failure(Exception):
    """A provider raised while it was timed; the cause says what."""

    def __init__(self, provider: str) -> None:
        super().__init__(provider)
        self.provider = provider


@contextlib.contextmanager
def _running(subject: Subject) -> Iterator[None]:
    try:
        with subject.provider.context():
            yield
    except Exception as failure:
        raise Failure(subject.provider.name) from failure


def time_interleaved(
    subjects: dict[str, Subject], passes: Sequence[str], device: torch.device, rounds: int, progress: Callable[[], None] = lambda: None
) -> dict[str, Timing]:
    """All subjects take turns in every round, the order shifted by one each round; every call gets the next of the rotated inputs. Failure where one
    raises."""
    both = "bwd" in passes or "fwd+bwd" in passes
    clock = Clock(device)
    turn = 0

    def forward(subject: Subject, calls: int) -> float:
        nonlocal turn
        with _running(subject):
            clock.mark()
            for _ in range(calls):
                turn += 1
                subject.forward(turn % subject.inputs.count)
            clock.mark()
            return clock.seconds()[0] / calls

    def forward_and_backward(subject: Subject, calls: int) -> tuple[float, float]:
        nonlocal turn
        with _running(subject):
            for _ in range(calls):
                turn += 1
                clock.mark()
                result = subject.both(turn % subject.inputs.count, clock.mark)
                clock.mark()
                del result
            gaps = clock.seconds()
        return sum(gaps[0::3]) / calls, sum(gaps[1::3]) / calls  # every third gap lies between two calls

    estimates: dict[str, float] = {}
    timings: dict[str, Timing] = {}
    for name, subject in subjects.items():
        forward(subject, 1)  # warm up: code, pages, thread pool
        estimates[name] = forward(subject, 1)
        if both:
            forward_and_backward(subject, 1)
        together = max(1, min(1000, math.ceil(MINIMUM_SAMPLE_SECONDS / max(estimates[name], 1e-7))))
        calls = {pass_: together if pass_ == "fwd" else max(1, together // 3) for pass_ in passes}
        timings[name] = Timing({pass_: {} for pass_ in passes}, calls)
    fastest = min(estimates.values())
    names = list(subjects)
    for index in range(rounds):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            slow = estimates[name] > SLOW * fastest and estimates[name] > MINIMUM_SAMPLE_SECONDS
            if (
                slow
                and rounds > SLOW_ROUNDS
                and index % (rounds // SLOW_ROUNDS) != 0
                or len(timings[name].samples[passes[0]]) >= (SLOW_ROUNDS if slow else rounds)
            ):
                continue
            samples, calls = timings[name].samples, timings[name].calls
            if "fwd" in passes:
                samples["fwd"][index] = forward(subjects[name], calls["fwd"])
            if both:
                ahead, back = forward_and_backward(subjects[name], calls["bwd" if "bwd" in passes else "fwd+bwd"])
                if "bwd" in passes:
                    samples["bwd"][index] = back
                if "fwd+bwd" in passes:
                    samples["fwd+bwd"][index] = ahead + back
        progress()
    return timings


def cuda_kernels(subject: Subject) -> str:
    """Names of the kernels that a forward launches, longest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace, subject.provider.context():
        subject.forward(0)
        torch.cuda.synchronize()
    events = sorted((event for event in trace.key_averages() if event.device_time_total > 0), key=lambda event: -event.device_time_total)
    return "; ".join(event.key for event in events[:3])
