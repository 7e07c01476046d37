"""All-pairs triangle area over three modalities. [TRIANGLE, NeurIPS 2025]"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _arguments as arguments
from ._gram_schmidt import NOISE, negligible, safe_sqrt, squared_length
from ._registration import accumulation_dtype, autocast_is_on, call, refuse_forward_mode, register_pair, tie_to, to_autocast

__all__ = ["triangle_area", "reference_triangle_area", "formula_triangle_area"]


def triangle_area(anchor: Tensor, u: Tensor, v: Tensor, *, squared: bool = False, eps: float | None = None, max_bytes: int | None = None) -> Tensor:
    r"""Area of the triangle with vertices ``a_i``, ``u_j``, ``v_j``, for all pairs (i, j). Small means similar.

    Base times height: with ``g_j = |u_j - v_j|`` and ``n_j = (u_j - v_j) / g_j``::

        Area[i, j] = g_j / 2 * |(a_i - u_j) - ((a_i - u_j) . n_j) n_j|

    so two matrix products replace the two B x C x D tensors of the usual code.

    >>> import torch
    >>> triangle_area(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0], [1.0, 1.0]]), torch.tensor([[2.0, 3.0], [2.0, 2.0]]))
    tensor([[3., 0.]])

    Parameters
    ----------
    anchor : Tensor [..., B, D]
    u, v : Tensor [..., C, D]
        Leading dimensions broadcast against each other (a single broadcast one is not copied).
    squared : bool
        ``Area ** 2``, smooth everywhere. (The released training code uses ``2 * Area ** 2``: see ``modalign.compat.gram.area_computation``.)
    eps : float, optional
        The gradient divides by ``max(height, sqrt(eps (|a_i|^2 + |u_j|^2)))``. Default 1e-12, for float64 1e-24.
    max_bytes : int, optional
        The result holds B x C numbers. One larger than this is refused; default 8 GiB.

    Returns
    -------
    Tensor [..., B, C] in the input dtype; float16 and bfloat16 accumulate in float32; float32 under autocast.

    Gradient
    --------
    Closed form in all three; 0 where the area is 0 (collinear points, ``u_j = v_j``). Pairs that lose digits to cancellation (height^2 below 1 % of
    ``|a|^2 + |u|^2``; 2 % for half types on CUDA) are recomputed from the vectors inside their tile. Double backward and forward mode raise.

    Edges
    -----
    Empty N, B or C: an empty result with a ``grad_fn``. A NaN or Inf in row i or column j stays there.

    Raises
    ------
    TypeError, ValueError
        ``triangle_area: <argument> must ..., got ...``.

    Complexity
    ----------
    4 B C D FLOP, the backward 12 B C D; beyond inputs and the B x C result 2 C D + 3 C numbers.

    Paper: TRIANGLE, "Modalities alignment beyond pairs: triangle area similarity", NeurIPS 2025, section 3.
    """
    op = "triangle_area"
    anchor, u, v, leading = _checked(op, anchor, u, v)
    squared = arguments.check_flag(op, "squared", squared)
    refuse_forward_mode(op, (anchor, u, v))
    if autocast_is_on(anchor.device.type):
        anchor, u, v = to_autocast(anchor), to_autocast(u), to_autocast(v)
    eps = arguments.check_eps(op, eps, anchor.dtype)
    arguments.check_result_size(op, max_bytes, (*leading, anchor.shape[-2], u.shape[-2]), anchor.dtype)
    folded = [arguments.fold_leading(points, leading, 2) for points in (anchor, u, v)]
    area = call("triangle_area", *folded, squared, eps)[0]
    return area.reshape(leading + (anchor.shape[-2], u.shape[-2]))


def _checked(op: str, anchor: object, u: object, v: object) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    anchor = arguments.check_vectors(op, "anchor", anchor, "[..., B, D]")
    mixed = autocast_is_on(anchor.device.type)
    shapes = {"anchor": tuple(anchor.shape[:-2])}
    points = []
    for name, value in (("u", u), ("v", v)):
        value = arguments.check_vectors(op, name, value, "[..., C, D]")
        arguments.check_alike(op, name, to_autocast(value) if mixed else value, "anchor", to_autocast(anchor) if mixed else anchor)
        shapes[name] = tuple(value.shape[:-2])
        points.append(value)
    if points[0].shape[-2] != points[1].shape[-2]:
        raise ValueError(f"{op}: v must have as many candidates C as u = {points[0].shape[-2]}, got {arguments.describe(points[1])}")
    return anchor, points[0], points[1], arguments.leading_shape(op, shapes)


# ------------------------------------------------------------------------------------------------------------------------- what torch needs to know


def _fake(anchor: Tensor, u: Tensor, v: Tensor, squared: bool, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    N, B, D = anchor.shape
    C, real = u.shape[1], accumulation_dtype(anchor.dtype)
    return anchor.new_empty((N, B, C)), anchor.new_empty((N, C, 2, D), dtype=real), anchor.new_empty((N, C, 3), dtype=real)


def _fake_backward(
    grad: Tensor, anchor: Tensor, basis: Tensor, factor: Tensor, squared: bool, eps: float, need_anchor: bool, need_others: bool
) -> tuple[Tensor, Tensor]:
    return anchor.new_empty(anchor.shape if need_anchor else (0,)), anchor.new_empty(basis.shape if need_others else (0,))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    anchor, u, v, squared, eps = inputs
    _, basis, factor = output
    ctx.mark_non_differentiable(basis, factor)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(anchor, basis, factor, u, v)  # u and v for tie_to alone
    ctx.squared, ctx.eps = squared, eps


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return None, None, None, None, None
    anchor, basis, factor, *points = ctx.saved_tensors
    need_anchor, need_u, need_v = ctx.needs_input_grad[:3]
    if torch.is_grad_enabled():
        anchor = tie_to(anchor, points)
    grad_anchor, grad_points = call("triangle_area_bwd", grad, anchor, basis, factor, ctx.squared, ctx.eps, need_anchor, need_u or need_v)
    return (
        grad_anchor if need_anchor else None,
        grad_points[:, :, 0] if need_u else None,
        grad_points[:, :, 1] if need_v else None,
        None,
        None,
    )


register_pair(
    "triangle_area", op="triangle_area", fake=_fake, fake_backward=_fake_backward, setup_context=_setup_context, backward=_backward, saved=(2, 3)
)


# ----------------------------------------------------------------------------------------------------------------------------- plain-torch formulas


def reference_triangle_area(anchor: Tensor, u: Tensor, v: Tensor, *, squared: bool = False, eps: float | None = None) -> Tensor:
    """`triangle_area` in a few lines of differentiable torch, as accurate as the dtype allows, [..., B, C, D] of memory; its gradient comes from
    autograd."""
    op = "reference_triangle_area"
    anchor, u, v, _ = _checked(op, anchor, u, v)
    eps = arguments.check_eps(op, eps, anchor.dtype)
    base = u - v
    base_squared = squared_length(base)
    apart = ~(base_squared == 0)
    length = safe_sqrt(base_squared, apart).unsqueeze(-2)
    direction = torch.where(apart.unsqueeze(-1), base / torch.where(apart.unsqueeze(-2), length, 1).mT, 0).unsqueeze(-3)
    height = anchor.unsqueeze(-2) - u.unsqueeze(-3)
    for _ in range(2):
        height = height - (height * direction).sum(-1, keepdim=True) * direction
    square, scale = squared_length(height), squared_length(anchor).unsqueeze(-1) + squared_length(u).unsqueeze(-2)
    alive = ~negligible(square, (NOISE * torch.finfo(anchor.dtype).eps) ** 2 * scale) & apart.unsqueeze(-2)
    if squared:
        return torch.where(alive, length**2 * square / 4, 0)
    floor_squared = (eps * scale).detach()
    below = alive & (square < floor_squared)
    root = safe_sqrt(square, alive)
    floored = root.detach() + (square - square.detach()) / (2 * torch.where(below, floor_squared, 1).sqrt())
    return torch.where(alive, length / 2 * torch.where(below, floored, root), 0)


def formula_triangle_area(anchor: Tensor, u: Tensor, v: Tensor, *, squared: bool = False) -> Tensor:
    """The usual formula over two [..., B, C, D] tensors: sqrt(|p|^2 |q|^2 - (p . q)^2) / 2 with p = a - v, q = a - u, clamped at 0. For
    comparisons."""
    p, q = anchor.unsqueeze(-2) - v.unsqueeze(-3), anchor.unsqueeze(-2) - u.unsqueeze(-3)
    doubled_squared = (squared_length(p) * squared_length(q) - (p * q).sum(-1) ** 2).clamp(min=0)
    return doubled_squared / 4 if squared else doubled_squared.sqrt() / 2
