"""All-pairs Gramian volume: how far the vectors of a tuple are from lying in one direction. [GRAM, ICLR 2025, section 3]

The file holds the public function, what torch needs to know about the raw ops (fake, autograd, vmap, autocast), the path for more than 8
modalities, and two plain-torch formulas: `reference_gram_volume` (accurate; the oracle of the tests) and `formula_gram_volume` (the determinant, as
in most people's code).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _arguments as arguments
from ._gram_schmidt import NOISE, negligible, orthonormalize, root_of_volume, safe_sqrt, solve_transposed, squared_length, unit
from ._registration import accumulation_dtype, autocast_is_on, call, refuse_forward_mode, register_pair, tie_to, to_autocast

__all__ = ["gram_volume", "reference_gram_volume", "formula_gram_volume"]

MAX_KERNEL_MODALITIES = 8
WIDE_BLOCK_BYTES = 64 << 20

_warned_too_many_vectors = False


def gram_volume(
    anchor: Tensor,
    others: Sequence[Tensor],
    *,
    present: Tensor | None = None,
    squared: bool = False,
    normalize: bool | str = False,
    eps: float | None = None,
    max_bytes: int | None = None,
) -> Tensor:
    r"""Volume of the parallelotope spanned by anchor i and the m other vectors of candidate j, for all pairs (i, j). Small means similar.

    With ``G_ij`` the k x k Gram matrix (k = m + 1) of ``(a_i, r1_j, ..., rm_j)``::

        V[i, j] = sqrt(det G_ij) = d_j * |a_i - Q_j^T Q_j a_i|        R_j = L_j Q_j,  d_j = prod_p L_j[p, p]

    The second form is what is computed: candidates are factored once (Gram-Schmidt run twice), a tile of products ``a_i . Q_jp`` is squared and
    summed, and pairs that lose digits that way (residual at most 1 % of ``|a|^2``; 2 % for half types on CUDA) are recomputed from the vectors inside their tile,
    forward and backward.

    >>> import torch
    >>> gram_volume(torch.eye(3)[:2], [torch.eye(3)[1:]])
    tensor([[1., 1.],
            [0., 1.]])

    Parameters
    ----------
    anchor : Tensor [..., B, D]
    others : sequence of m >= 1 tensors [..., C, D]
        Row j of all of them belongs to candidate j. Leading dimensions broadcast against each other (a single broadcast one is not copied).
    present : bool Tensor [..., C, m], optional
        True where candidate j has modality p. An absent vector is left out of the determinant; its content, even NaN, never matters and it gets
        gradient 0. No modality present gives ``|a_i|``. Volumes over different numbers of vectors are not comparable as they are, see
        ``normalize``.
    squared : bool
        ``det G`` in place of its root: smooth everywhere.
    normalize : False, True or "root"
        True: all vectors are made unit length first (a zero vector stays zero with zero gradient). "root": ``V ** (1 / n_j)``, n_j the number of
        vectors present in the tuple with the anchor; vectors are taken as they are, and it cannot be combined with ``squared``.
    eps : float, optional
        The gradient divides by ``max(sqrt(r), sqrt(eps) |a_i|)``, r the squared residual. Default 1e-12, for float64 1e-24.
    max_bytes : int, optional
        The result holds B x C numbers. One larger than this is refused; default 8 GiB.

    Returns
    -------
    Tensor [..., B, C] in the input dtype. float16 and bfloat16 accumulate in float32; under autocast inputs are cast to float32 and so is the result.

    Gradient
    --------
    Closed form, in ``anchor`` and ``others``; bounded by the product of the other lengths. Where V is 0 (identical, antiparallel, duplicated or
    zero vectors, more vectors than dimensions) the gradient is 0 and neighbours are untouched. Nearly collinear tuples keep their digits. Double
    backward, forward mode and gradients of ``present`` are not supported; the first two raise.

    Edges
    -----
    k > D: 0 everywhere (warns once). Empty N, B or C: an empty result with a ``grad_fn``. A NaN or Inf in row i or in candidate j stays in that row
    or column. More than 8 vectors: same results and contracts from a path in plain torch, on every device, slower (O(B C m D), row blocks of 64
    MiB).

    Raises
    ------
    TypeError, ValueError
        for a wrong type, dtype, device or shape: ``gram_volume: <argument> must ..., got ...``. Complex and integer tensors are refused.

    Complexity
    ----------
    2 B C m D FLOP and O(C m^2 D) for the factors; the backward takes 6 B C m D. Beyond inputs and the B x C result: the factors, C m D + C m^2
    numbers.

    Paper: Cicchetti et al., "Gramian Multimodal Representation Learning and Alignment", ICLR 2025, section 3. The released code takes
    ``sqrt(abs(det))`` in float32, which turns rounding into volume and has NaN gradients at 0; ``modalign.compat.gram`` has its call signatures.
    """
    op = "gram_volume"
    anchor, others, present, leading = _checked(op, anchor, others, present)
    squared = arguments.check_flag(op, "squared", squared)
    normalize = arguments.check_normalize(op, normalize, squared)
    refuse_forward_mode(op, (anchor, *others))
    if autocast_is_on(anchor.device.type):
        with torch.autocast(anchor.device.type, enabled=False):
            return _volume(to_autocast(anchor), [to_autocast(other) for other in others], present, leading, squared, normalize, eps, max_bytes)
    return _volume(anchor, others, present, leading, squared, normalize, eps, max_bytes)


def _checked(op: str, anchor: object, others: object, present: object) -> tuple[Tensor, list[Tensor], Tensor | None, tuple[int, ...]]:
    anchor = arguments.check_vectors(op, "anchor", anchor, "[..., B, D]")
    vectors = arguments.check_sequence(op, "others", others, "others[{}]", "[..., C, D]")
    mixed = autocast_is_on(anchor.device.type)
    for index, other in enumerate(vectors):
        # Under autocast everything but float64 becomes float32, so dtypes may differ there as they do after autocast's own linear layers.
        arguments.check_alike(op, f"others[{index}]", to_autocast(other) if mixed else other, "anchor", to_autocast(anchor) if mixed else anchor)
        if other.shape[-2] != vectors[0].shape[-2]:
            raise ValueError(
                f"{op}: others[{index}] must have as many candidates C as others[0] = {vectors[0].shape[-2]}, got {arguments.describe(other)}"
            )
    sizes = (vectors[0].shape[-2], len(vectors))
    mask = arguments.check_presence(op, present, "anchor", anchor, "[..., C, m]", sizes)
    shapes = {"anchor": tuple(anchor.shape[:-2]), **{f"others[{index}]": tuple(other.shape[:-2]) for index, other in enumerate(vectors)}}
    if mask is not None:
        shapes["present"] = tuple(mask.shape[:-2])
    return anchor, vectors, mask, arguments.leading_shape(op, shapes)


def warn_more_vectors_than_dimensions(op: str, k: int, D: int) -> None:
    global _warned_too_many_vectors
    if k > D and not _warned_too_many_vectors and not torch.compiler.is_compiling():
        _warned_too_many_vectors = True
        warnings.warn(f"{op}: {k} vectors of {D} dimensions are always dependent, the volume and its gradient are 0 (said once)", stacklevel=4)


def _volume(
    anchor: Tensor,
    others: list[Tensor],
    present: Tensor | None,
    leading: tuple[int, ...],
    squared: bool,
    normalize: bool | str,
    eps: float | None,
    max_bytes: int | None,
) -> Tensor:
    eps = arguments.check_eps("gram_volume", eps, anchor.dtype)
    B, C, D, m = anchor.shape[-2], others[0].shape[-2], anchor.shape[-1], len(others)
    arguments.check_result_size("gram_volume", max_bytes, (*leading, B, C), anchor.dtype)
    warn_more_vectors_than_dimensions("gram_volume", m + 1, D)
    if normalize is True:
        if present is not None:  # an absent NaN would come back through the gradient of the division
            others = [torch.where(present[..., p, None], other, 0) for p, other in enumerate(others)]
        anchor, others = unit(anchor), [unit(other) for other in others]
    folded = arguments.fold_leading(anchor, leading, 2), [arguments.fold_leading(other, leading, 2) for other in others]
    mask = None if present is None else arguments.fold_leading(present, leading, 2)
    name = "gram_volume" if m < MAX_KERNEL_MODALITIES else "gram_volume_wide"
    volume = call(name, *folded, mask, squared, eps)[0].reshape(leading + (B, C))
    if normalize == "root":
        count = m + 1 if present is None else present.sum(-1).unsqueeze(-2) + 1
        volume = root_of_volume(volume, count)
    return volume


# ------------------------------------------------------------------------------------------------------------------------- what torch needs to know


def _fake(anchor: Tensor, others: list[Tensor], present: Tensor | None, squared: bool, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(all(t.device == anchor.device for t in [*others, *([] if present is None else [present])]), lambda: "gram_volume: tensors must be on one device")
    N, B, D = anchor.shape
    C, m, real = others[0].shape[1], len(others), accumulation_dtype(anchor.dtype)
    return anchor.new_empty((N, B, C)), anchor.new_empty((N, C, m, D), dtype=real), anchor.new_empty((N, C, m, m), dtype=real)


def _fake_backward(
    grad: Tensor, anchor: Tensor, basis: Tensor, factor: Tensor, squared: bool, eps: float, need_anchor: bool, need_others: bool
) -> tuple[Tensor, Tensor]:
    return anchor.new_empty(anchor.shape if need_anchor else (0,)), anchor.new_empty(basis.shape if need_others else (0,))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    anchor, others, _, squared, eps = inputs
    _, basis, factor = output
    ctx.mark_non_differentiable(basis, factor)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(anchor, basis, factor, *others)  # `others` for tie_to alone
    ctx.squared, ctx.eps, ctx.m = squared, eps, len(others)


def _backward_with(name: str) -> Any:
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad is None:
            return None, [None] * ctx.m, None, None, None
        anchor, basis, factor, *others = ctx.saved_tensors
        need_anchor, need_each = ctx.needs_input_grad[0], list(ctx.needs_input_grad[1])
        if torch.is_grad_enabled():
            anchor = tie_to(anchor, others)
        grad_anchor, grad_others = call(name, grad, anchor, basis, factor, ctx.squared, ctx.eps, need_anchor, any(need_each))
        return (
            grad_anchor if need_anchor else None,
            [grad_others[:, :, p] if need else None for p, need in enumerate(need_each)],
            None,
            None,
            None,
        )

    return backward


register_pair(
    "gram_volume",
    op="gram_volume",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    backward=_backward_with("gram_volume_bwd"),
    saved=(2, 3),
)


# --------------------------------------------------------------------------------------------------------------------------- more than 8 modalities
# The same pair of ops in plain torch: the residual is formed for every pair, a block of anchors at a time, so no cancellation has to be looked for.

_library = torch.library.Library("modalign", "FRAGMENT")
_library.define("gram_volume_wide(Tensor anchor, Tensor[] others, Tensor? present, bool squared, float eps) -> (Tensor, Tensor, Tensor)")
_library.define(
    "gram_volume_wide_bwd(Tensor grad, Tensor anchor, Tensor basis, Tensor factor, bool squared, float eps, bool need_anchor, bool need_others)"
    " -> (Tensor, Tensor)"
)


def _row_blocks(B: int, C: int, D: int, N: int, element_size: int) -> Iterator[slice]:
    step = max(1, WIDE_BLOCK_BYTES // max(1, 3 * N * C * D * element_size))  # about three [N, rows, C, D] tensors live at a time
    for start in range(0, B, step):
        yield slice(start, min(start + step, B))


def _residuals(anchor: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """e [N, b, C, D] = a - Q^T kappa, kappa [N, b, C, m], and |e|^2 with rounding noise set to 0, for anchor rows [N, b, D]."""
    kappa = torch.einsum("nbd,ncmd->nbcm", anchor, basis)
    residual = anchor.unsqueeze(2) - torch.einsum("nbcm,ncmd->nbcd", kappa, basis)
    again = torch.einsum("nbcd,ncmd->nbcm", residual, basis)
    residual = residual - torch.einsum("nbcm,ncmd->nbcd", again, basis)
    square = squared_length(residual)
    noise = (NOISE * torch.finfo(anchor.dtype).eps) ** 2 * squared_length(anchor).unsqueeze(-1)
    return residual, kappa + again, torch.where(negligible(square, noise), 0, square)


def wide_forward(anchor: Tensor, others: list[Tensor], present: Tensor | None, squared: bool, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    real = accumulation_dtype(anchor.dtype)
    N, B, D = anchor.shape
    basis, factor = orthonormalize(torch.stack([other.to(real) for other in others], 2), present)
    scale = factor.diagonal(dim1=-2, dim2=-1).prod(-1)
    count = len(others) if present is None else present.sum(-1)
    scale = scale * torch.as_tensor(count, device=anchor.device).lt(D).to(real)  # with the anchor more vectors than dimensions: 0, not rounding noise
    volume = anchor.new_empty((N, B, others[0].shape[1]))
    for rows in _row_blocks(B, others[0].shape[1], D, N, real.itemsize):
        _, _, square = _residuals(anchor[:, rows].to(real), basis)
        volume[:, rows] = (scale.unsqueeze(1) ** 2 * square if squared else scale.unsqueeze(1) * square.sqrt()).to(volume.dtype)
    return volume, basis.contiguous(), factor.contiguous()


def wide_backward(
    grad: Tensor, anchor: Tensor, basis: Tensor, factor: Tensor, squared: bool, eps: float, need_anchor: bool, need_others: bool
) -> tuple[Tensor, Tensor]:
    real = basis.dtype
    N, B, D = anchor.shape
    C, m = basis.shape[1:3]
    count = (basis != 0).any(-1).sum(-1)
    scale = factor.diagonal(dim1=-2, dim2=-1).prod(-1) * count.lt(D).to(real)
    grad_anchor = anchor.new_empty(anchor.shape if need_anchor else (0,))
    towards, alpha = basis.new_zeros(basis.shape), basis.new_zeros((N, C))
    for rows in _row_blocks(B, C, D, N, real.itemsize):
        block, upstream = anchor[:, rows].to(real), grad[:, rows].to(real)
        residual, kappa, square = _residuals(block, basis)
        d = scale.unsqueeze(1)
        alive = (square != 0) & (d != 0)
        if squared:
            weight, value = 2 * upstream * d * d, 2 * d * d * square
        else:
            root = square.sqrt()
            weight, value = upstream * d / torch.maximum(root, eps**0.5 * squared_length(block).sqrt().unsqueeze(-1)), d * root
        weight = torch.where(alive, weight, 0)
        if need_anchor:
            grad_anchor[:, rows] = torch.einsum("nbc,nbcd->nbd", weight, residual).to(grad_anchor.dtype)
        if need_others:
            towards += torch.einsum("nbc,nbcm,nbcd->ncmd", weight, kappa, residual)
            alpha += torch.where(alive, upstream * value, 0).sum(1)
    if not need_others:
        return grad_anchor, anchor.new_empty((0,))
    gradient = solve_transposed(factor, alpha[..., None, None] * basis - towards)
    return grad_anchor, torch.where((scale != 0)[..., None, None], gradient, 0).to(anchor.dtype)


_library.impl("gram_volume_wide", wide_forward, "CompositeExplicitAutograd")
_library.impl("gram_volume_wide_bwd", wide_backward, "CompositeExplicitAutograd")
register_pair(
    "gram_volume_wide",
    op="gram_volume",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    backward=_backward_with("gram_volume_wide_bwd"),
    saved=(2, 3),
)


# ----------------------------------------------------------------------------------------------------------------------------- plain-torch formulas


def reference_gram_volume(
    anchor: Tensor,
    others: Sequence[Tensor],
    *,
    present: Tensor | None = None,
    squared: bool = False,
    normalize: bool | str = False,
    eps: float | None = None,
) -> Tensor:
    """`gram_volume` in a few lines of differentiable torch, as accurate as the dtype allows, [..., B, C, D] of memory. Its gradient comes from
    autograd, not from our closed form; at zero volume it is 0 by the same rules. One derivative only where the `eps` floor acts."""
    op = "reference_gram_volume"
    anchor, others, present, leading = _checked(op, anchor, others, present)
    eps = arguments.check_eps(op, eps, anchor.dtype)
    eps_m = torch.finfo(anchor.dtype).eps
    stacked = torch.stack([other.expand(leading + other.shape[-2:]) for other in others], -2)
    if present is not None:
        present = present.expand(leading + present.shape[-2:])
        stacked = torch.where(present.unsqueeze(-1), stacked, 0)
    if normalize is True:
        anchor, stacked = unit(anchor), unit(stacked)
    basis, factor = orthonormalize(stacked, present)
    scale = factor.diagonal(dim1=-2, dim2=-1).prod(-1).unsqueeze(-2)
    count = torch.full((), len(others)) if present is None else present.sum(-1).unsqueeze(-2)
    residual = anchor.unsqueeze(-2)
    for _ in range(2):
        along = torch.einsum("...bcd,...cmd->...bcm", residual.expand(residual.shape[:-2] + basis.shape[-3:-2] + residual.shape[-1:]), basis)
        residual = residual - torch.einsum("...bcm,...cmd->...bcd", along, basis)
    square, length_squared = squared_length(residual), squared_length(anchor).unsqueeze(-1)
    alive = ~negligible(square, (NOISE * eps_m) ** 2 * length_squared) & (scale != 0) & (count.to(anchor.device) < anchor.shape[-1])
    if squared:
        return torch.where(alive, scale**2 * square, 0)
    floor_squared = (eps * length_squared).detach()
    below = alive & (square < floor_squared)
    root = safe_sqrt(square, alive)
    floored = root.detach() + (square - square.detach()) / (2 * torch.where(below, floor_squared, 1).sqrt())
    volume = torch.where(alive, scale * torch.where(below, floored, root), 0)
    return root_of_volume(volume, count + 1) if normalize == "root" else volume


def formula_gram_volume(
    anchor: Tensor,
    others: Sequence[Tensor],
    *,
    present: Tensor | None = None,
    squared: bool = False,
) -> Tensor:
    """The determinant formula of most people's code, k x k per pair: build every Gram matrix, take det, abs, sqrt. For comparisons; loses its
    digits for nearly collinear vectors and has NaN gradients at 0. half types are raised to float32 for the determinant, as torch has no other."""
    vectors = [anchor, *others]
    k, m = len(vectors), len(others)
    one = torch.ones((), dtype=torch.bool, device=anchor.device)
    there = [one] + [one if present is None else present[..., p] for p in range(m)]
    shape = torch.broadcast_shapes(*((anchor[..., :1] @ other[..., :1].mT).shape for other in others))
    rows = []
    for p in range(k):
        row = []
        for q in range(k):
            if p == 0 or q == 0:
                column = vectors[max(p, q)]
                entry = (anchor * anchor).sum(-1, keepdim=True) if p == q else anchor @ column.mT
            else:
                entry = (vectors[p] * vectors[q]).sum(-1).unsqueeze(-2)
            both = there[p] & there[q]
            row.append(torch.where(both if both.dim() == 0 else both.unsqueeze(-2), entry, float(p == q)).expand(shape))
        rows.append(torch.stack(row, -1))
    gram = torch.stack(rows, -2)
    determinant = torch.linalg.det(gram if gram.dtype in (torch.float32, torch.float64) else gram.float()).to(anchor.dtype)
    return determinant if squared else determinant.abs().sqrt()
