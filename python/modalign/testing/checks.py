"""The generic battery: every promise an `OpCase` makes, tested. A check is a function `check(case, device)`, for some also of a dtype."""

# ruff: noqa: B023  (the functions made inside loops are called before the loop goes on)
from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..ops._registration import accumulation_dtype
from .cases import Maker, OpCase, Sample
from .comparison import compare_gradients, compare_values
from .determinism import assert_bitwise_deterministic
from .tolerances import tolerance_of

THREE_SIZES = (7, 10, 13)


# ------------------------------------------------------------------------------------------------------------------------------------------ helpers


def _gradients(function: Callable[..., Tensor], sample: Sample, weight: Tensor | None = None) -> tuple[Tensor, list[Tensor | None]]:
    """The result and the gradients of sum(result * weight) for every floating tensor; the weight is drawn when it is not given."""
    fresh = sample.requiring_grad()
    result = fresh.call(function)
    if weight is None:
        weight = upstream(result)
    leaves = fresh.differentiable()
    return result, list(torch.autograd.grad(result, leaves, weight.to(result), allow_unused=True))


def _pairs(actual: Sequence[Tensor | None], expected: Sequence[Tensor | None], what: str) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(index, actual, expected) of the gradients there are. One that the reference has and the op has not is an error; the other way
    round, it has to be zero."""
    for index, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        if ours is not None:
            yield index, ours, torch.zeros_like(ours) if theirs is None else theirs
        elif theirs is not None:
            raise AssertionError(f"{what}: floating tensor {index} has no gradient")


def upstream(result: Tensor, seed: int = 1) -> Tensor:
    """A fixed upstream gradient: Gaussian plus a constant, so that a wrong sign or a lost mean shows."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(result.shape, generator=generator, dtype=torch.float64) + 0.5).to(result)


def _raises(function: Callable[[], Any], error: type[BaseException] | tuple[type[BaseException], ...], message: str, what: str) -> None:
    try:
        result = function()
    except error as caught:
        if not re.search(message, str(caught)):
            raise AssertionError(f"{what}: the message must match {message!r}, got {str(caught)!r}") from caught
        return
    raise AssertionError(f"{what}: must raise, returned {type(result).__name__}")


def _refuses(function: Callable[[], Any], what: str) -> None:
    """`function` raises something. AssertionErrors of ours would be swallowed here, so `function` must not assert."""
    try:
        function()
    except Exception:
        return
    raise AssertionError(f"{what} is declared unsupported, yet it went through without an error")


def _same(actual: Sequence[Any], expected: Sequence[Any], what: str, dtype: torch.dtype) -> None:
    """Equal up to rounding noise of `dtype`: the same computation by another route."""
    for index, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        if theirs is None or ours is None:
            if ours is not theirs:
                raise AssertionError(f"{what}: gradient {index} exists only on one side")
            continue
        if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
            raise AssertionError(f"{what}: {index} is {ours.dtype} {tuple(ours.shape)}, expected {theirs.dtype} {tuple(theirs.shape)}")
        compare_values(ours, theirs, dtype=dtype, what=f"{what} [{index}]")


# ------------------------------------------------------------------------------------------------------------------------------------------- checks


def check_values(case: OpCase, device: str, dtype: torch.dtype) -> None:
    """Against the float64 reference on the same rounded inputs: error of the plain-torch formula in the same dtype + the table's share of the RMS."""
    for sample in case.samples(Maker(dtype, device)):
        result = sample.call(case.call)
        wanted = accumulation_dtype(dtype) if case.accumulates else dtype
        if result.dtype != wanted:
            raise AssertionError(f"{case.name}/{sample.name}: result is {result.dtype}, expected {wanted} for {dtype}")
        expected = sample.to(torch.float64).call(case.reference)
        formula = None if case.formula is None else _optional(sample, case.formula)
        compare_values(
            result, expected, formula, tolerance=tolerance_of(dtype, case.tolerances).times(sample.slack), what=f"{case.name}/{sample.name}"
        )


def _optional(sample: Sample, formula: Callable[..., Tensor]) -> Tensor | None:
    """The formula's result, or None where it does not take the sample's options."""
    try:
        inspect.signature(formula).bind(*sample.args, **sample.kwargs)
    except TypeError:
        return None
    return sample.call(formula)


def check_gradients(case: OpCase, device: str, dtype: torch.dtype) -> None:
    for sample in case.samples(Maker(dtype, device)):
        result, actual = _gradients(case.call, sample)
        # The reference gets the upstream gradient as the op got it, rounded to the result's dtype.
        _, expected = _gradients(case.reference, sample.to(torch.float64), upstream(result).double())
        bounds = tolerance_of(dtype, case.tolerances).times(sample.slack)
        for index, ours, theirs in _pairs(actual, expected, f"{case.name}/{sample.name}"):
            compare_gradients(ours, theirs, tolerance=bounds, what=f"{case.name}/{sample.name}, gradient of floating tensor {index}")
            if ours.dtype != dtype:
                raise AssertionError(f"{case.name}/{sample.name}: gradient {index} is {ours.dtype}, its input {dtype}")


def check_finite_differences(case: OpCase, device: str) -> None:
    for sample in case.tiny(Maker(torch.float64, device)):
        fresh = sample.requiring_grad()
        tensors = fresh.tensors()
        torch.autograd.gradcheck(lambda *given: fresh.with_tensors(given).call(case.call), tensors)


def check_partial_gradients(case: OpCase, device: str) -> None:
    """Whatever subset of the inputs requires grad, each gets the gradient it gets when all do."""
    for sample in case.samples(Maker(torch.float32, device)):
        result, everything = _gradients(case.call, sample)
        for position in range(len(everything)):
            alone = sample.requiring_grad(position)
            leaf = alone.differentiable()[position]
            (gradient,) = torch.autograd.grad(alone.call(case.call), leaf, upstream(result))
            _same([gradient], [everything[position]], f"{case.name}/{sample.name}, only floating tensor {position} requires grad", torch.float32)


def check_degenerate(case: OpCase, device: str, dtype: torch.dtype) -> None:
    for sample in case.degenerate(Maker(dtype, device)) if case.degenerate else ():
        result, gradients = _gradients(case.call, sample)
        if not torch.isfinite(result).all():
            raise AssertionError(f"{case.name}/{sample.name}: {(~torch.isfinite(result)).sum()} values are not finite")
        for index, gradient in enumerate(gradients):
            if gradient is None or not torch.isfinite(gradient).all():
                raise AssertionError(f"{case.name}/{sample.name}: gradient of floating tensor {index} is missing or not finite")


def check_opcheck(case: OpCase, device: str) -> None:
    for op, arguments in case.raw(Maker(torch.float32, device)) if case.raw else ():
        torch.library.opcheck(op, arguments)


def check_strided(case: OpCase, device: str) -> None:
    """Steps, transposed layouts and offsets give what contiguous copies give, and inputs are left alone."""
    layouts: dict[str, Callable[[Tensor], Tensor]] = {
        "every second element": lambda t: torch.stack([t, t + 1], -1).flatten(-2)[..., ::2] if t.dim() else t,
        "transposed storage": lambda t: t.mT.contiguous().mT if t.dim() >= 2 else t,
        "an offset": lambda t: torch.cat([t, t])[t.shape[0] :] if t.dim() else t,
    }
    for sample in case.samples(Maker(torch.float32, device)):
        expected, expected_gradients = _gradients(case.call, sample)
        for name, layout in layouts.items():
            strided = sample.map_floating(layout)
            what = f"{case.name}/{sample.name} with {name}"
            if not case.strided:
                _refuses(lambda: strided.call(case.call), what)
                continue
            before = [tensor.clone() for tensor in strided.tensors()]
            # requiring_grad() detaches, which keeps strides
            result, gradients = _gradients(case.call, strided, upstream(expected))
            _same([result, *gradients], [expected, *expected_gradients], what, torch.float32)
            for old, new in zip(before, strided.tensors(), strict=True):
                if not torch.equal(old, new):
                    raise AssertionError(f"{what}: an input was changed")


def check_expanded(case: OpCase, device: str) -> None:
    """Rows with stride 0, and an upstream gradient with strides 0, as `sum()` sends it."""
    for sample in case.samples(Maker(torch.float32, device)):
        repeated = sample.map_floating(lambda t: t[..., :1, :].expand(t.shape) if t.dim() >= 2 else t)
        copied = repeated.map_floating(lambda t: t.contiguous())
        fresh, plain = repeated.requiring_grad(), copied.requiring_grad()
        result, expected = fresh.call(case.call), plain.call(case.call)
        what = f"{case.name}/{sample.name} with repeated rows"
        _same([result], [expected], what, torch.float32)
        ours = torch.autograd.grad(result.sum(), fresh.differentiable(), allow_unused=True)
        theirs = torch.autograd.grad(expected, plain.differentiable(), torch.ones_like(expected), allow_unused=True)
        _same(ours, theirs, what, torch.float32)


def check_empty(case: OpCase, device: str) -> None:
    for sample, shape in case.empty(Maker(torch.float32, device)) if case.empty else ():
        fresh = sample.requiring_grad()
        result = fresh.call(case.call)
        what = f"{case.name}/{sample.name}"
        if tuple(result.shape) != shape:
            raise AssertionError(f"{what}: result has shape {tuple(result.shape)}, expected {shape}")
        if result.grad_fn is None:
            raise AssertionError(f"{what}: result has no grad_fn")
        for leaf, gradient in zip(fresh.differentiable(), torch.autograd.grad(result.sum(), fresh.differentiable(), allow_unused=True), strict=True):
            if gradient is None or gradient.shape != leaf.shape or gradient.count_nonzero():
                raise AssertionError(f"{what}: the gradient of an empty result must be zeros of the input's shape")


def check_bad_inputs(case: OpCase, device: str) -> None:
    for bad in case.bad_inputs(Maker(torch.float32, device)) if case.bad_inputs else ():
        _raises(lambda: bad.sample.call(case.call), bad.error, bad.message, f"{case.name}/{bad.sample.name}")


def check_determinism(case: OpCase, device: str) -> None:
    sample = case.sized(Maker(torch.float32, device), 150)
    weight = upstream(sample.call(case.call))

    def run() -> list[Tensor | None]:
        result, gradients = _gradients(case.call, sample, weight)
        return [result, *gradients]

    if case.deterministic:
        assert_bitwise_deterministic(run)
        return
    torch.use_deterministic_algorithms(True)
    try:
        _refuses(run, f"{case.name}: a nondeterministic op under torch.use_deterministic_algorithms")
    finally:
        torch.use_deterministic_algorithms(False)


def check_autocast(case: OpCase, device: str) -> None:
    """bfloat16 and float32 inputs, also mixed, inside an autocast region; gradients come back in each input's own dtype."""
    sample = case.sized(Maker(torch.bfloat16, device), 9)
    tensors = sample.tensors()
    mixed = sample.with_tensors([t.float() if t.is_floating_point() and index % 2 else t for index, t in enumerate(tensors)])
    for name, given in (("bfloat16", sample), ("mixed", mixed)):
        what = f"{case.name} under autocast, {name} inputs"
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            if case.autocast is None and name == "mixed":
                _refuses(lambda: given.call(case.call), what)
                continue
            result, gradients = _gradients(case.call, given)
        wanted = torch.bfloat16 if case.autocast is None else case.autocast
        if result.dtype != wanted:
            raise AssertionError(f"{what}: result is {result.dtype}, declared {wanted}")
        plain, expected = _gradients(case.call, given.to(wanted))
        _same([result], [plain], what, wanted)
        for index, ours, theirs in _pairs(gradients, expected, what):
            leaf = given.differentiable()[index]
            if ours.dtype != leaf.dtype:
                raise AssertionError(f"{what}: gradient {index} is {ours.dtype}, its input {leaf.dtype}")
            compare_gradients(ours, theirs, dtype=min(leaf.dtype, wanted, case.autocast_inputs or wanted, key=lambda dtype: dtype.itemsize), what=f"{what}, gradient {index}")


def check_vmap(case: OpCase, device: str) -> None:
    """Over all tensors, over the first alone, and (where func.grad is promised) of per-sample gradients."""
    samples = [case.sized(Maker(torch.float32, device, seed), 6) for seed in range(3)]
    template = samples[0]

    def function(*tensors: Tensor) -> Tensor:
        return template.with_tensors(tensors).call(case.call)

    groups = list(zip(*(sample.tensors() for sample in samples), strict=True))
    dims = tuple(min(1, group[0].dim()) for group in groups)  # a batch dimension that is not the first, where there is another
    stacked = [torch.stack(group, dim) for group, dim in zip(groups, dims, strict=True)]
    if not case.vmap:
        _refuses(lambda: torch.vmap(function, in_dims=dims)(*stacked), f"{case.name}: vmap")
        return
    expected = torch.stack([sample.call(case.call) for sample in samples])
    _same([torch.vmap(function, in_dims=dims)(*stacked)], [expected], f"{case.name}: vmap over all tensors", torch.float32)
    shared = template.tensors()[1:]
    expected = torch.stack([function(sample.tensors()[0], *shared) for sample in samples])
    one = torch.vmap(lambda first: function(first, *shared))(stacked[0].movedim(1, 0))
    _same([one], [expected], f"{case.name}: vmap over the first tensor", torch.float32)
    if case.func_grad:
        positions = tuple(index for index, tensor in enumerate(template.tensors()) if tensor.is_floating_point())
        weight = upstream(template.call(case.call))
        per_sample = torch.vmap(torch.func.grad(lambda *tensors: (function(*tensors) * weight).sum(), argnums=positions), in_dims=dims)(*stacked)
        expected_gradients = [torch.stack(group) for group in zip(*(_gradients(case.call, sample, weight)[1] for sample in samples), strict=True)]
        _same(per_sample, expected_gradients, f"{case.name}: per-sample gradients by vmap(grad)", torch.float32)


def check_func_grad(case: OpCase, device: str) -> None:
    sample = case.sized(Maker(torch.float32, device), 6)
    tensors = sample.tensors()
    positions = tuple(index for index, tensor in enumerate(tensors) if tensor.is_floating_point())
    weight = upstream(sample.call(case.call))

    def loss(*given: Tensor) -> Tensor:
        return (sample.with_tensors(given).call(case.call) * weight).sum()

    if not case.func_grad:
        _refuses(lambda: torch.func.grad(loss, argnums=positions)(*tensors), f"{case.name}: torch.func.grad")
        return
    _same(
        torch.func.grad(loss, argnums=positions)(*tensors), _gradients(case.call, sample, weight)[1], f"{case.name}: torch.func.grad", torch.float32
    )
    if case.vmap:  # a whole Jacobian: the upstream gradient has a batch dimension and what was saved has none
        jacobians = torch.func.jacrev(lambda *given: sample.with_tensors(given).call(case.call), argnums=positions)(*tensors)
        contracted = [torch.tensordot(weight, jacobian, weight.dim()) for jacobian in jacobians]
        _same(contracted, _gradients(case.call, sample, weight)[1], f"{case.name}: torch.func.jacrev", torch.float32)
    if not case.double_backward:
        for position in positions:
            twice = torch.func.grad(lambda *given: torch.func.grad(loss, argnums=position)(*given).sum(), argnums=position)
            _raises(
                lambda: twice(*tensors),
                RuntimeError,
                f"{case.refusal or case.name}: double backward is not supported",
                f"{case.name}: func.grad of func.grad of tensor {position}",
            )


def check_forward_mode(case: OpCase, device: str) -> None:
    """A dual number in any floating input: either a right tangent, or an error. Never a lost one."""
    sample = case.tiny(Maker(torch.float64, device))[0]
    tensors = sample.tensors()
    if case.jvp:
        torch.autograd.gradcheck(
            lambda *given: sample.with_tensors(given).call(case.call),
            sample.requiring_grad().tensors(),
            check_forward_ad=True,
            check_backward_ad=False,
        )
        return
    for position, tensor in enumerate(tensors):
        if not tensor.is_floating_point():
            continue

        def with_dual() -> Tensor:
            with forward_ad.dual_level():
                given = list(tensors)
                given[position] = forward_ad.make_dual(tensor, torch.ones_like(tensor))
                return sample.with_tensors(given).call(case.call)

        def compiled() -> Tensor:
            torch._dynamo.reset()
            with forward_ad.dual_level():
                given = list(tensors)
                given[position] = forward_ad.make_dual(tensor, torch.ones_like(tensor))
                template = sample.with_tensors(given)
                return template.call(torch.compile(case.call, backend="aot_eager"))

        def by_jvp() -> Any:
            return torch.func.jvp(
                lambda moved: sample.with_tensors([*tensors[:position], moved, *tensors[position + 1 :]]).call(case.call),
                (tensor,),
                (torch.ones_like(tensor),),
            )

        _raises(with_dual, RuntimeError, f"{case.refusal or case.name}: forward-mode differentiation is not supported", f"{case.name}: dual tensor {position}")
        _raises(by_jvp, RuntimeError, f"{case.refusal or case.name}: forward-mode differentiation is not supported", f"{case.name}: func.jvp of tensor {position}")
        if case.compile and position == 0:
            _raises(compiled, RuntimeError, "forward-mode differentiation is not supported", f"{case.name}: compiled, dual tensor {position}")


def check_double_backward(case: OpCase, device: str) -> None:
    """Declared: right by finite differences. Not declared: refused by name, whichever input requires grad and however the first gradient is used."""
    for sample in case.tiny(Maker(torch.float64, device)):
        if case.double_backward:
            fresh = sample.requiring_grad()
            torch.autograd.gradgradcheck(lambda *given: fresh.with_tensors(given).call(case.call), fresh.tensors())
            continue
        for position in range(len(sample.differentiable())):
            fresh = sample.requiring_grad(position)
            leaf = fresh.differentiable()[position]
            (first,) = torch.autograd.grad(fresh.call(case.call).sum(), leaf, create_graph=True)
            _raises(
                lambda: torch.autograd.grad(first.sum(), leaf, allow_unused=True),
                RuntimeError,
                f"{case.refusal or case.name}: double backward is not supported",
                f"{case.name}/{sample.name}: second derivative by floating tensor {position}",
            )
        fresh = sample.requiring_grad()
        leaves = fresh.differentiable()
        for first in torch.autograd.grad(fresh.call(case.call).sum(), leaves, create_graph=True):
            for position, leaf in enumerate(leaves):  # a mixed second derivative must not be 0 without a word either
                _raises(
                    lambda first=first, leaf=leaf: torch.autograd.grad(first.sum() + (leaf * leaf).sum(), leaf, retain_graph=True),
                    RuntimeError,
                    f"{case.refusal or case.name}: double backward is not supported",
                    f"{case.name}/{sample.name}: mixed second derivative by floating tensor {position}",
                )
        result = fresh.call(case.call)
        weight = torch.ones_like(result, requires_grad=True)
        first_gradients = torch.autograd.grad(result, fresh.differentiable(), weight, create_graph=True)
        for first in first_gradients:
            _raises(
                lambda: torch.autograd.grad(first.sum(), weight, retain_graph=True),
                RuntimeError,
                f"{case.refusal or case.name}: double backward is not supported",
                f"{case.name}/{sample.name}: derivative by the upstream gradient",
            )


def check_one_graph(case: OpCase, device: str) -> None:
    """torch.compile(fullgraph=True, dynamic=True): three sizes, forward and backward, one graph, the eager results."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(case.call, backend=counter, fullgraph=True, dynamic=True)

    def run(sample: Sample) -> tuple[Tensor, list[Tensor | None]]:
        fresh = sample.requiring_grad()
        result = fresh.call(compiled)
        return result, list(torch.autograd.grad(result, fresh.differentiable(), upstream(result)))

    if not case.compile:
        _refuses(lambda: run(case.sized(Maker(torch.float32, device), THREE_SIZES[0])), f"{case.name}: torch.compile(fullgraph=True)")
        return
    for size in THREE_SIZES:
        sample = case.sized(Maker(torch.float32, device, size), size)
        result, gradients = run(sample)
        expected, expected_gradients = _gradients(case.call, sample)
        _same([result, *gradients], [expected, *expected_gradients], f"{case.name}: compiled, size {size}", torch.float32)
    if counter.frame_count != 1:
        raise AssertionError(f"{case.name}: three sizes gave {counter.frame_count} graphs, expected 1")


class _Module(torch.nn.Module):
    def __init__(self, template: Sample, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self._template, self._function = template, function

    def forward(self, *tensors: Tensor) -> Tensor:
        return self._template.with_tensors(tensors).call(self._function)


def check_export(case: OpCase, device: str) -> None:
    sample = case.sized(Maker(torch.float32, device), 7)
    module = _Module(sample, case.call)
    if not case.export:
        _refuses(lambda: torch.export.export(module, tuple(sample.tensors())), f"{case.name}: torch.export")
        return
    program = torch.export.export(module, tuple(sample.tensors()))
    other = case.sized(Maker(torch.float32, device, 5), 7)
    _same([program.module()(*other.tensors())], [other.call(case.call)], f"{case.name}: exported program", torch.float32)


def check_checkpoint(case: OpCase, device: str) -> None:
    from torch.utils.checkpoint import checkpoint

    sample = case.sized(Maker(torch.float32, device), 9)
    expected, expected_gradients = _gradients(case.call, sample)

    def run() -> list[Any]:
        fresh = sample.requiring_grad()
        result = checkpoint(lambda *given: fresh.with_tensors(given).call(case.call), *fresh.tensors(), use_reentrant=False)
        return [result, *torch.autograd.grad(result, fresh.differentiable(), upstream(result))]

    if not case.checkpoint:
        _refuses(run, f"{case.name}: torch.utils.checkpoint")
        return
    for index, ours, theirs in _pairs(run(), [expected, *expected_gradients], f"{case.name}: checkpointed"):
        if case.deterministic and not torch.equal(ours, theirs):
            raise AssertionError(f"{case.name}: checkpointed result {index} differs in its bits from the plain one")
        compare_values(ours, theirs, dtype=torch.float32, what=f"{case.name}: checkpointed result {index}")


PER_DTYPE: dict[str, Callable[[OpCase, str, torch.dtype], None]] = {
    "values": check_values,
    "gradients": check_gradients,
    "degenerate": check_degenerate,
}
CHECKS: dict[str, Callable[[OpCase, str], None]] = {
    "finite_differences": check_finite_differences,
    "partial_gradients": check_partial_gradients,
    "opcheck": check_opcheck,
    "strided": check_strided,
    "expanded": check_expanded,
    "empty": check_empty,
    "bad_inputs": check_bad_inputs,
    "determinism": check_determinism,
    "autocast": check_autocast,
    "vmap": check_vmap,
    "func_grad": check_func_grad,
    "forward_mode": check_forward_mode,
    "double_backward": check_double_backward,
    "one_graph": check_one_graph,
    "export": check_export,
    "checkpoint": check_checkpoint,
}


# ------------------------------------------------------------------------------------------------------------------------------------------ running


def devices() -> tuple[str, ...]:
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def battery(cases: Iterable[OpCase], on: Sequence[str] | None = None) -> list[tuple[str, Callable[[], None]]]:
    """(name, check) of everything there is to check about `cases`; each check takes nothing and raises AssertionError (or what the op itself
    raises)."""
    listed: list[tuple[str, Callable[[], None]]] = []
    for case in cases:
        label = case.label or case.name
        for device in on or devices():
            for name, check in PER_DTYPE.items():
                listed += [
                    (f"{label}-{name}-{str(dtype).removeprefix('torch.')}-{device}", partial(check, case, device, dtype)) for dtype in case.dtypes
                ]
            listed += [(f"{label}-{name}-{device}", partial(check, case, device)) for name, check in CHECKS.items()]
    return listed


def run_battery(*cases: OpCase, on: Sequence[str] | None = None) -> list[str]:
    """Run everything, then raise one AssertionError that lists all failures. Returns the names of the checks."""
    names, failures = [], []
    for name, check in battery(cases, on):
        names.append(name)
        try:
            check()
        except Exception as error:
            failures.append(f"{name}: {type(error).__name__}: {error}")
    if failures:
        raise AssertionError(f"{len(failures)} of {len(names)} checks failed:\n" + "\n".join(failures))
    return names


def parametrize(cases: Iterable[OpCase]) -> Any:
    """A pytest decorator: `@parametrize(CASES)` above `def test_battery(check): check()`."""
    import pytest

    return pytest.mark.parametrize("check", [pytest.param(check, id=name) for name, check in battery(cases)])
