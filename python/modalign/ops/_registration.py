"""The glue that every op's Python half shares: what autograd, autocast, vmap and forward mode see of a pair of raw ops `<op>` and `<op>_bwd`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

DEVICES_WITH_AUTOCAST = ("cpu", "cuda")

_autograd_of: dict[str, tuple[Callable[..., None], Callable[..., Any]]] = {}  # raw op -> its setup_context and backward


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What kernels accumulate in and save for backward: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def refuse_double_backward(qualified_name: str, op: str) -> None:
    """Give the op `qualified_name` (a backward) an autograd formula that raises. Without one its result would count as a constant and second
    derivatives would come out as None or zero without a word."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{op}: double backward is not supported")

    torch.library.register_autograd(qualified_name, backward)
    _autograd_of[qualified_name.partition("::")[2]] = (_no_context, backward)


def tie_to(tensor: Tensor, sources: Iterable[Tensor]) -> Tensor:
    """`tensor`, equal in value, but requiring grad if one of `sources` does: empty slices of them are summed and the exact 0 is added.

    A backward op only gets the upstream gradient, the anchor and saved statistics. If neither of the first two requires grad while a source of the
    statistics does, its result would not require grad, and a second derivative would be refused by nobody."""
    for source in sources:
        tensor = tensor + source[:0].sum()
    return tensor


def register_float32_autocast(qualified_name: str) -> None:
    """Under autocast the op computes in float32 (float64 stays) whatever it is given: the determinant-like results need the digits."""
    for device in DEVICES_WITH_AUTOCAST:
        torch.library.register_autocast(qualified_name, device, torch.float32)


def autocast_is_on(device_type: str) -> bool:
    return device_type in DEVICES_WITH_AUTOCAST and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> Any:
    """Of the devices that have it; torch.autocast refuses others, meta among them."""
    return torch.autocast(device_type, enabled=False) if device_type in DEVICES_WITH_AUTOCAST else contextlib.nullcontext()


def to_autocast(tensor: Tensor) -> Tensor:
    """float32 in place of the half types; integers stay, so that the checks still see and refuse them."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def refuse_forward_mode(op: str, tensors: Iterable[Tensor]) -> None:
    """The dispatcher runs an op without a forward-mode formula on dual tensors as if they were constants; this raises instead of losing the
    tangent."""
    if forward_ad._current_level < 0:
        return
    # While torch.compile traces, tangents cannot be looked at; raising sends it back to eager mode, where they can.
    if torch.compiler.is_compiling() or any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError(f"{op}: forward-mode differentiation is not supported")


def functorch_is_active() -> bool:
    """Inside torch.func.grad, vmap, jacrev, ... in eager mode."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


class _Transformable(torch.autograd.Function):
    """An op pair as torch.func wants it. What torch.library.register_autograd builds has no separate setup_context, and torch.func.grad refuses
    it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op: Any, setup_context: Any, backward: Any, spec: Any, *flat: Any) -> Any:
        return op(*pytree.tree_unflatten(flat, spec))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, setup_context, ctx.backward_of_op, ctx.spec, *flat = inputs
        setup_context(ctx, pytree.tree_unflatten(flat, ctx.spec), output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        structured = _Context(ctx)
        gradients = ctx.backward_of_op(structured, *grads)
        flat = pytree.tree_leaves(gradients, is_leaf=lambda value: value is None)
        return (None, None, None, None, *flat)


class _Context:
    """A ctx whose needs_input_grad has the shape of the op's arguments."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx
        self.needs_input_grad = pytree.tree_unflatten(list(ctx.needs_input_grad[4:]), ctx.spec)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def _no_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    return None


def call(name: str, *values: Any) -> Any:
    """Call the raw op `modalign::<name>` in eager mode, under torch.compile, and under torch.func transforms alike."""
    op = getattr(torch.ops.modalign, name)
    if not functorch_is_active():
        return op(*values)
    flat, spec = pytree.tree_flatten(list(values), is_leaf=lambda value: value is None or (isinstance(value, list) and bool(value) and isinstance(value[0], int)))
    return _Transformable.apply(op, *_autograd_of[name], spec, *flat)


def fold_batch(tensor: Tensor, dimension: int | None, batch_size: int) -> Tensor:
    """[N, ...] with a vmapped dimension somewhere, or without one, as [batch_size * N, ...]. Without one, and with N = 1, this is a view with
    stride 0."""
    tensor = tensor.unsqueeze(0).expand(batch_size, *tensor.shape) if dimension is None else tensor.movedim(dimension, 0)
    return tensor.reshape(tensor.shape[0] * tensor.shape[1], *tensor.shape[2:])


def unfold_batch(tensor: Tensor, batch_size: int) -> Tensor:
    return tensor.reshape(batch_size, tensor.shape[0] // max(batch_size, 1), *tensor.shape[1:])


def register_folding_vmap(qualified_name: str, contiguous: tuple[int, ...] = ()) -> None:
    """vmap for an op whose tensors all carry an independent problem index N in front: the vmapped dimension joins N, one launch serves all.
    `contiguous`: positions of arguments that the op only takes contiguous (what its forward saved)."""
    op = getattr(torch.ops.modalign, qualified_name.partition("::")[2])

    def fold(value: Any, dimension: Any, batch_size: int) -> Any:
        if isinstance(value, Tensor):
            return fold_batch(value, dimension, batch_size)
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
            dimensions = dimension if isinstance(dimension, (list, tuple)) else [None] * len(value)
            return [fold_batch(entry, where, batch_size) for entry, where in zip(value, dimensions, strict=True)]
        return value

    def batched(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        size = info.batch_size
        folded = [fold(value, dimension, size) for value, dimension in zip(arguments, in_dims, strict=True)]
        for position in contiguous:
            folded[position] = folded[position].contiguous()
        result = op(*folded)
        if isinstance(result, Tensor):
            return unfold_batch(result, size), 0
        return tuple(unfold_batch(entry, size) for entry in result), (0,) * len(result)

    torch.library.register_vmap(qualified_name, batched)


def register_looping_vmap(qualified_name: str, contiguous: tuple[int, ...] = ()) -> None:
    """vmap for an op without a problem index: one call per entry of the vmapped dimension. `contiguous`: as in `register_folding_vmap`."""
    op = getattr(torch.ops.modalign, qualified_name.partition("::")[2])

    def entry(value: Any, dimension: Any, index: int) -> Any:
        if isinstance(value, (list, tuple)):
            dimensions = dimension if isinstance(dimension, (list, tuple)) else [None] * len(value)
            return [entry(one, where, index) for one, where in zip(value, dimensions, strict=True)]
        return value if dimension is None else value.select(dimension, index)

    def looped(info: Any, in_dims: tuple[Any, ...], *given: Any) -> tuple[Any, Any]:
        results = []
        for index in range(info.batch_size):
            one = [entry(value, dimension, index) for value, dimension in zip(given, in_dims, strict=True)]
            for position in contiguous:
                one[position] = one[position] if one[position] is None else one[position].contiguous()
            results.append(op(*one))
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(group) for group in zip(*results, strict=True)), (0,) * len(results[0])

    torch.library.register_vmap(qualified_name, looped)


def register_pair(
    name: str,
    *,
    op: str,
    fake: Callable[..., Any],
    fake_backward: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    saved: tuple[int, ...] = (),
    vmap: str = "fold",
    autocast: bool = True,
) -> None:
    """Everything Python adds to the raw ops `modalign::<name>` and `modalign::<name>_bwd`; `op` is the public name that messages use, `saved` the
    positions of the
    arguments of `<name>_bwd` that come from the forward and are taken contiguous only; vmap: "fold" where all tensors carry a problem index, else "loop";
    autocast: under it the ops compute in float32, else the public function has seen to the dtypes.

    One thing torch leaves no place for: raw ops drop forward-mode tangents without a word, so public functions call `refuse_forward_mode` first."""
    backward_name = f"modalign::{name}_bwd"
    register_op(name, fake=fake, setup_context=setup_context, backward=backward, vmap=vmap, autocast=autocast)
    torch.library.register_fake(backward_name, fake_backward)
    refuse_double_backward(backward_name, op)
    if autocast:
        register_float32_autocast(backward_name)  # backward() may be called inside the region, too
    if vmap == "loop":
        register_looping_vmap(backward_name, saved)
    else:
        register_folding_vmap(backward_name, saved)


def register_op(
    name: str,
    *,
    fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    contiguous: tuple[int, ...] = (),
    vmap: str = "fold",
    autocast: bool = True,
) -> None:
    """The same for a raw op `modalign::<name>` alone, whose gradient is made of other ops; `contiguous`: positions of arguments that it takes contiguous only."""
    qualified_name = f"modalign::{name}"
    torch.library.register_fake(qualified_name, fake)
    torch.library.register_autograd(qualified_name, backward, setup_context=setup_context)
    _autograd_of[name] = (setup_context, backward)
    if autocast:
        register_float32_autocast(qualified_name)
    if vmap == "loop":
        register_looping_vmap(qualified_name, contiguous)
    else:
        register_folding_vmap(qualified_name, contiguous)
