"""What a test battery has to know about an op: sample inputs, references, and a declared yes or no for everything torch can do with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .tolerances import Tolerance


@dataclass(frozen=True)
class Sample:
    """One call: arguments as they are passed, with a name for messages. `slack` multiplies the tolerances for it; a comment beside it says why."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    slack: float = 1.0

    def call(self, function: Callable[..., Any]) -> Any:
        return function(*self.args, **self.kwargs)

    def leaves(self) -> list[Any]:
        return pytree.tree_leaves((self.args, self.kwargs))

    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves() if isinstance(leaf, Tensor)]

    def differentiable(self) -> list[Tensor]:
        return [leaf for leaf in self.tensors() if leaf.is_floating_point()]

    def map(self, function: Callable[[Tensor], Tensor]) -> Sample:
        """The same call with `function` applied to every tensor."""
        args, kwargs = pytree.tree_map_only(Tensor, function, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)

    def map_floating(self, function: Callable[[Tensor], Tensor]) -> Sample:
        return self.map(lambda tensor: function(tensor) if tensor.is_floating_point() else tensor)

    def to(self, dtype: torch.dtype) -> Sample:
        return self.map_floating(lambda tensor: tensor.to(dtype))

    def requiring_grad(self, *positions: int) -> Sample:
        """Fresh leaves that require grad: all floating tensors, or those at `positions` among them."""
        counter = iter(range(len(self.differentiable())))

        def fresh(tensor: Tensor) -> Tensor:
            index = next(counter)
            return tensor.detach().requires_grad_(not positions or index in positions)

        return self.map_floating(fresh)

    def with_tensors(self, tensors: Sequence[Tensor]) -> Sample:
        """The same call on other tensors, given in the order of `tensors()`."""
        remaining = iter(tensors)
        return self.map(lambda _: next(remaining))


class Maker:
    """Draws sample tensors: always the same numbers for a seed, drawn in float64 on the CPU and then rounded, so that dtypes and devices see the
    same problem."""

    def __init__(self, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", seed: int = 0) -> None:
        self.dtype, self.device = dtype, torch.device(device)
        self._generator = torch.Generator().manual_seed(seed)

    def place(self, tensor: Tensor) -> Tensor:
        return tensor.to(device=self.device, dtype=self.dtype if tensor.is_floating_point() else tensor.dtype)

    def randn(self, *shape: int) -> Tensor:
        return self.place(torch.randn(*shape, generator=self._generator, dtype=torch.float64))

    def unit(self, *shape: int) -> Tensor:
        """Gaussian rows of unit length."""
        rows = torch.randn(*shape, generator=self._generator, dtype=torch.float64)
        return self.place(rows / rows.square().sum(-1, keepdim=True).sqrt())

    def mask(self, *shape: int, probability: float = 0.7) -> Tensor:
        return self.place(torch.rand(*shape, generator=self._generator, dtype=torch.float64) < probability)

    def nearly_collinear(self, count: int, rows: int, width: int, delta: float) -> list[Tensor]:
        """`count` matrices [rows, width] of unit rows: a direction common to each row index, plus or minus `delta` times a random one."""
        common = torch.randn(rows, width, generator=self._generator, dtype=torch.float64)
        common = common / common.square().sum(-1, keepdim=True).sqrt()
        vectors = []
        for _ in range(count):
            noise = torch.randn(rows, width, generator=self._generator, dtype=torch.float64) / width**0.5
            vector = common + delta * noise
            vectors.append(self.place(vector / vector.square().sum(-1, keepdim=True).sqrt()))
        return vectors


@dataclass(frozen=True)
class BadInput:
    """A call that must be refused, with the exception type and a regular expression for the whole message."""

    sample: Sample
    error: type[Exception]
    message: str


@dataclass(frozen=True)
class OpCase:
    """One op and everything that is promised about it. The battery tests the yes and the no of every declaration.

    call        the public function
    reference   the same signature in plain differentiable torch, trusted in float64
    formula     the plain-torch formula people use, run in the tested dtype: its error is added to what is allowed. Options that it does not take
                are compared without it; None: never
    samples     representative calls: ragged sizes, options, masks
    tiny        calls small enough for finite differences in float64
    sized       a call whose sizes grow with n (also odd n), for one-graph, determinism, vmap, export and checkpoint
    degenerate  calls where formulas divide by zero: outputs and gradients must be finite
    empty       calls with an empty result: the shape must come out and so must a grad_fn
    raw         (op overload, arguments) pairs for torch.library.opcheck
    """

    name: str  # as in the op's messages
    call: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    samples: Callable[[Maker], Sequence[Sample]]
    tiny: Callable[[Maker], Sequence[Sample]]
    sized: Callable[[Maker, int], Sample]
    formula: Callable[..., Tensor] | None = None
    degenerate: Callable[[Maker], Sequence[Sample]] | None = None
    empty: Callable[[Maker], Sequence[tuple[Sample, tuple[int, ...]]]] | None = None
    raw: Callable[[Maker], Sequence[tuple[Any, tuple[Any, ...]]]] | None = None
    bad_inputs: Callable[[Maker], Sequence[BadInput]] | None = None
    label: str = ""  # what tests are called; the name unless several cases describe one op
    refusal: str = ""  # whom messages about refused derivatives name; the name unless another op does the work
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    tolerances: dict[torch.dtype, Tolerance] = field(default_factory=dict)  # in place of the table's; a comment beside an entry says why

    accumulates: bool = False  # the result has the accumulation dtype, float32 for half inputs: losses and statistics

    # declared, each tested either way
    double_backward: bool = False
    func_grad: bool = True
    vmap: bool = True
    jvp: bool = False
    autocast: torch.dtype | None = torch.float32  # the result's dtype under autocast; None: autocast leaves the op alone
    autocast_inputs: torch.dtype | None = None  # what inputs are cast to under autocast, where that is another dtype
    compile: bool = True
    export: bool = True
    checkpoint: bool = True
    strided: bool = True
    deterministic: bool = True
