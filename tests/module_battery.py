"""What every attention module is held to, whatever it computes; and the dense attention that their formulas are written with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import _pytree as pytree

F64 = torch.float64


@dataclass
class Case:
    """make() -> module; inputs(B) -> (arguments, keyword arguments) in float64. Closed gates are opened, unless `opened` is False."""

    name: str
    make: Callable[[], torch.nn.Module]
    inputs: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]
    gates: tuple[str, ...] = ()  # parameters that are 0 at first
    identity: bool = False  # while they are


def opened(case: Case, seed: int = 0) -> torch.nn.Module:
    """The module in float64 with weights that are all of a size to matter."""
    torch.manual_seed(seed)
    module = case.make().double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5) + (parameter.dim() == 1))
    return module


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def cast(tree: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map(lambda leaf: leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf, tree)


def call(module: torch.nn.Module, inputs: Any) -> list[torch.Tensor]:
    return tensors(module(*inputs[0], **inputs[1]))


def gradients(module: torch.nn.Module, inputs: Any) -> list[torch.Tensor]:
    """Outputs, and the gradients of a weighted sum of them to all parameters and inputs."""
    inputs = pytree.tree_map(lambda leaf: leaf.detach().clone().requires_grad_() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf, inputs)
    out = call(module, inputs)
    total = sum((each * torch.linspace(-1, 1, each.numel(), dtype=each.dtype).sin().view_as(each)).sum() for each in out)
    leaves = [parameter for parameter in module.parameters() if parameter.requires_grad] + tensors(inputs)
    return [each.detach() for each in out] + list(torch.autograd.grad(total, leaves))


def battery(cases: list[Case]) -> type:
    """The tests over `cases`, as a class for pytest to find."""
    every = pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])

    class Battery:
        @every
        def test_gradients_are_those_of_differences(self, case):
            module, inputs = opened(case), case.inputs(2)
            own, given = list(module.parameters()), tensors(inputs)
            leaves = [leaf.detach().requires_grad_() for leaf in (*own, *given)]
            names = [name for name, _ in module.named_parameters()]
            _, spec = pytree.tree_flatten(inputs)

            def function(*values):
                of_inputs = iter(values[len(own) :])
                leaves = [next(of_inputs) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf for leaf in pytree.tree_leaves(inputs)]
                args, kwargs = pytree.tree_unflatten(leaves, spec)
                return tuple(tensors(torch.func.functional_call(module, dict(zip(names, values, strict=False)), args, kwargs)))

            torch.autograd.gradcheck(function, leaves, fast_mode=True, atol=1e-6)

        @every
        def test_every_gradient_is_there_and_finite(self, case):
            for module in (case.make().double(), opened(case)):
                assert all(each.isfinite().all() for each in gradients(module, case.inputs(2)))

        @every
        def test_same_bits_every_time(self, case):
            first, second = (gradients(opened(case), case.inputs(2)) for _ in range(2))
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

        @every
        def test_weights_go_to_a_file_and_back(self, case, tmp_path):
            module, other, inputs = opened(case), opened(case, seed=1), case.inputs(2)
            assert not all(torch.equal(a, b) for a, b in zip(call(module, inputs), call(other, inputs), strict=True))
            torch.save(module.state_dict(), tmp_path / "weights.pt")
            assert other.load_state_dict(torch.load(tmp_path / "weights.pt")).missing_keys == []
            assert all(torch.equal(a, b) for a, b in zip(call(module, inputs), call(other, inputs), strict=True))

        @every
        @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 8e-3), (torch.bfloat16, 0.06)])
        def test_in_other_dtypes(self, case, dtype, tolerance):
            module, inputs = opened(case), case.inputs(2)
            module, inputs = copy.deepcopy(module).to(dtype), cast(inputs, dtype)
            for ours, want in zip(call(module, inputs), call(module.double(), cast(inputs, F64)), strict=True):
                assert ours.dtype is dtype
                assert (ours.double() - want).norm() <= tolerance * want.norm()

        @every
        def test_under_autocast(self, case):
            module, inputs = opened(case).float(), cast(case.inputs(2), torch.float32)
            with torch.autocast("cpu", torch.bfloat16):
                found = call(module, inputs)
            for ours, want in zip(found, call(module, inputs), strict=True):
                assert (ours.float() - want).norm() <= 0.06 * want.norm()

        @every
        def test_moves_between_devices_whole(self, case):
            """Everything it holds is a parameter or a buffer of its state: made on no device and filled from a file, it is what it was."""
            module, inputs = opened(case), case.inputs(2)
            want, weights = call(module, inputs), copy.deepcopy(module.state_dict())
            module.to("meta")
            held = [value for part in module.modules() for value in vars(part).values() if isinstance(value, torch.Tensor)]
            assert not held and all(each.is_meta for each in (*module.parameters(), *module.buffers()))
            module.to_empty(device="cpu").load_state_dict(weights)
            assert all(torch.equal(a, b) for a, b in zip(call(module, inputs), want, strict=True))

        @every
        def test_compiles_into_one_graph(self, case):
            module, counter = opened(case), CompileCounterWithBackend("aot_eager")
            compiled = torch.compile(module, backend=counter, fullgraph=True)
            for B in (2, 3, 4):  # one graph for the first size, one for all others
                inputs = case.inputs(B)
                for ours, want in zip(call(compiled, inputs), call(module, inputs), strict=True):
                    torch.testing.assert_close(ours, want, rtol=1e-12, atol=1e-12)
            assert counter.frame_count <= 2

        @every
        def test_batches_are_independent(self, case):
            module, inputs = opened(case), case.inputs(3)
            one = pytree.tree_map(lambda leaf: leaf[:1] if isinstance(leaf, torch.Tensor) and leaf.dtype in (F64, torch.bool) else leaf, inputs)
            for whole, part in zip(call(module, inputs), call(module, one), strict=True):
                torch.testing.assert_close(whole[:1], part, rtol=1e-12, atol=1e-12)

        @every
        def test_empty_batch(self, case):
            assert all(each.shape[0] == 0 for each in call(opened(case), case.inputs(0)))

    gated = [case for case in cases if case.gates]
    if gated:

        @pytest.mark.parametrize("case", gated, ids=[case.name for case in gated])
        def test_closed_gates(self, case):
            """Closed at first: what goes in comes out where the block has a residual, nothing learns behind the gates, and the gates do."""
            torch.manual_seed(0)
            module, inputs = case.make().double(), case.inputs(2)
            if case.identity:
                given = tensors(inputs)
                assert all(torch.equal(out, given[n]) for n, out in enumerate(call(module, inputs)))
            names, found = [name for name, _ in module.named_parameters()], gradients(module, inputs)[len(call(module, inputs)) :]
            found = dict(zip(names, found, strict=False))
            assert all(module.get_parameter(name).abs().max() == 0 and found[name].abs().max() > 0 for name in case.gates)
            if case.identity:
                assert all(grad.abs().max() == 0 for name, grad in found.items() if name not in case.gates)

        Battery.test_closed_gates = test_closed_gates
    return Battery


def dense_attention(q, k, v, keep=None):
    """[B, H, N, D] with all logits; heads of keys and values are repeated; a query that keeps nothing gives 0."""
    k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], 1) for each in (k, v))
    z = q @ k.mT / q.shape[-1] ** 0.5
    if keep is not None:
        z = z.masked_fill(~keep, -torch.inf)
    p = z.softmax(-1).nan_to_num(0)  # a row of -inf alone
    return p @ v


def dense_rotation(x, positions, base=10000.0):
    """With complex numbers: entries f and f + D / 2 are the real and the imaginary part."""
    half = x.shape[-1] // 2
    angle = positions.to(F64)[..., None] * base ** (-2 * torch.arange(half, dtype=F64) / (2 * half))
    while angle.dim() < x.dim():
        angle = angle.unsqueeze(-3)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], -1)


def split(x, heads):
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def dense_layer(weights, x, keep, heads, key_heads, positions=None):
    """A decoder layer by its formula, of its state_dict."""
    positions = torch.arange(x.shape[1]) if positions is None else positions

    def norm(y, name):
        return y / (y.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weights[f"{name}.weight"]

    h = norm(x, "input_layernorm")
    q, k, v = (split(h @ weights[f"self_attn.{name}_proj.weight"].T, n) for name, n in (("q", heads), ("k", key_heads), ("v", key_heads)))
    attended = dense_attention(dense_rotation(q, positions), dense_rotation(k, positions), v, keep)
    x = x + attended.transpose(1, 2).flatten(2) @ weights["self_attn.o_proj.weight"].T
    return x + dense_feed_forward(weights, norm(x, "post_attention_layernorm"))


def dense_feed_forward(weights, h, units=None):
    gate, up, down = (weights[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    gate, up, down = gate[:units], up[:units], down[:, :units]
    a = h @ gate.T
    return (a / (1 + (-a).exp()) * (h @ up.T)) @ down.T
