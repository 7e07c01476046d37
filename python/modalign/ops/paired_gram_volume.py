"""Gramian volume of given tuples, one per sample. [GRAM, ICLR 2025, section 3]"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _arguments as arguments
from ._gram_schmidt import orthonormalize, root_of_volume, solve_transposed, unit
from ._registration import accumulation_dtype, autocast_is_on, call, refuse_forward_mode, register_pair, to_autocast
from .gram_volume import MAX_KERNEL_MODALITIES, warn_more_vectors_than_dimensions

__all__ = ["paired_gram_volume", "reference_paired_gram_volume", "formula_paired_gram_volume"]


def paired_gram_volume(
    vectors: Sequence[Tensor] | Tensor,
    *,
    present: Tensor | None = None,
    squared: bool = False,
    normalize: bool | str = False,
    eps: float | None = None,
) -> Tensor:
    r"""Volume of the parallelotope spanned by the k vectors of each sample. Small means similar.

    Gram-Schmidt, run twice over the vectors in order, gives ``X = L Q`` and::

        V = sqrt(det(X X^T)) = prod_p L[p, p]

    k = 1 is the length, k = 2 is ``|a| |b| sin``.

    >>> import torch
    >>> paired_gram_volume([torch.tensor([[3.0, 0.0, 0.0]]), torch.tensor([[1.0, 2.0, 0.0]])])
    tensor([6.])

    Parameters
    ----------
    vectors : sequence of k >= 1 tensors [..., D], or one tensor [..., k, D]
        Leading dimensions broadcast against each other.
    present : bool Tensor [..., k], optional
        True where the sample has the vector. Absent vectors are left out of the determinant; their content, even NaN, never matters and they get
        gradient 0. A sample with none has volume 1, the empty determinant.
    squared : bool
        ``det G`` in place of its root.
    normalize : False, True or "root"
        True: unit vectors first (zero stays zero, zero gradient). "root": ``V ** (1 / number present)``; not together with ``squared``.
    eps : float, optional
        Taken so that calls look like `gram_volume`; it changes nothing, ``V L^-T Q`` is bounded without.

    Returns
    -------
    Tensor [...] in the input dtype; float32 under autocast.

    Gradient
    --------
    Closed form ``V L^-T Q``, 0 where V is 0. A vector whose residual is at most 16 eps_m of its length is dependent: V = 0. Double backward and
    forward mode raise.

    Edges
    -----
    k > D: 0 (warns once). No samples: an empty result with a ``grad_fn``. NaN and Inf stay in their sample. k > 8: plain torch, same results.

    Raises
    ------
    TypeError, ValueError
        ``paired_gram_volume: <argument> must ..., got ...``.

    Complexity
    ----------
    O(N k^2 D), nothing saved for backward but the inputs.

    Paper: Cicchetti et al., "Gramian Multimodal Representation Learning and Alignment", ICLR 2025, section 3.
    """
    op = "paired_gram_volume"
    entries, present, leading = _checked(op, vectors, present)
    squared = arguments.check_flag(op, "squared", squared)
    normalize = arguments.check_normalize(op, normalize, squared)
    refuse_forward_mode(op, entries)
    device = entries[0].device.type
    if autocast_is_on(device):
        with torch.autocast(device, enabled=False):
            return _volume([to_autocast(entry) for entry in entries], present, leading, squared, normalize, eps)
    return _volume(entries, present, leading, squared, normalize, eps)


def _checked(op: str, vectors: object, present: object) -> tuple[list[Tensor], Tensor | None, tuple[int, ...]]:
    if isinstance(vectors, Tensor):
        arguments.check_vectors(op, "vectors", vectors, "[..., k, D]")
        if vectors.shape[-2] == 0:
            raise ValueError(f"{op}: vectors must hold at least one vector per sample, got {arguments.describe(vectors)}")
        entries = list(vectors.unbind(-2))
    else:
        entries = arguments.check_sequence(op, "vectors", vectors, "vectors[{}]", "[..., D]")
    first = entries[0]
    mixed = autocast_is_on(first.device.type)
    for index, entry in enumerate(entries[1:], 1):
        arguments.check_alike(op, f"vectors[{index}]", to_autocast(entry) if mixed else entry, "vectors[0]", to_autocast(first) if mixed else first)
    mask = arguments.check_presence(op, present, "vectors[0]", first, "[..., k]", (len(entries),))
    shapes = {f"vectors[{index}]": tuple(entry.shape[:-1]) for index, entry in enumerate(entries)}
    if mask is not None:
        shapes["present"] = tuple(mask.shape[:-1])
    return entries, mask, arguments.leading_shape(op, shapes)


def _volume(
    entries: list[Tensor], present: Tensor | None, leading: tuple[int, ...], squared: bool, normalize: bool | str, eps: float | None
) -> Tensor:
    eps = arguments.check_eps("paired_gram_volume", eps, entries[0].dtype)
    k, D = len(entries), entries[0].shape[-1]
    warn_more_vectors_than_dimensions("paired_gram_volume", k, D)
    if normalize is True:
        if present is not None:  # an absent NaN would come back through the gradient of the division
            entries = [torch.where(present[..., p, None], entry, 0) for p, entry in enumerate(entries)]
        entries = [unit(entry) for entry in entries]
    folded = [arguments.fold_leading(entry, leading, 1) for entry in entries]
    mask = None if present is None else arguments.fold_leading(present, leading, 1)
    name = "paired_gram_volume" if k <= MAX_KERNEL_MODALITIES else "paired_gram_volume_wide"
    volume = call(name, folded, mask, squared, eps).reshape(leading)
    return root_of_volume(volume, k if present is None else present.sum(-1)) if normalize == "root" else volume


# ------------------------------------------------------------------------------------------------------------------------- what torch needs to know


def _fake(vectors: list[Tensor], present: Tensor | None, squared: bool, eps: float) -> Tensor:
    return vectors[0].new_empty((vectors[0].shape[0],))


def _fake_backward(grad: Tensor, vectors: list[Tensor], present: Tensor | None, squared: bool, eps: float) -> Tensor:
    return vectors[0].new_empty((vectors[0].shape[0], len(vectors), vectors[0].shape[1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    vectors, present, squared, eps = inputs
    ctx.save_for_backward(*vectors, *([] if present is None else [present]))
    ctx.k, ctx.squared, ctx.eps = len(vectors), squared, eps


def _backward_with(name: str) -> Any:
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        present = saved[ctx.k] if len(saved) > ctx.k else None
        gradient = call(name, grad, list(saved[: ctx.k]), present, ctx.squared, ctx.eps)
        return [gradient[:, p] if need else None for p, need in enumerate(ctx.needs_input_grad[0])], None, None, None

    return backward


register_pair(
    "paired_gram_volume",
    op="paired_gram_volume",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    backward=_backward_with("paired_gram_volume_bwd"),
)


# --------------------------------------------------------------------------------------------------------------------------- more than 8 modalities

_library = torch.library.Library("modalign", "FRAGMENT")
_library.define("paired_gram_volume_wide(Tensor[] vectors, Tensor? present, bool squared, float eps) -> Tensor")
_library.define("paired_gram_volume_wide_bwd(Tensor grad, Tensor[] vectors, Tensor? present, bool squared, float eps) -> Tensor")


def _factors(vectors: list[Tensor], present: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Q [N, k, D], L [N, k, k] and the volume [N]: 0 for more vectors than dimensions, not rounding noise."""
    real = accumulation_dtype(vectors[0].dtype)
    basis, factor = orthonormalize(torch.stack([vector.to(real) for vector in vectors], 1), present)
    count = torch.full((), len(vectors)) if present is None else present.sum(-1)
    fits = (count <= vectors[0].shape[1]).to(device=basis.device, dtype=real)
    return basis, factor, factor.diagonal(dim1=-2, dim2=-1).prod(-1) * fits


def wide_forward(vectors: list[Tensor], present: Tensor | None, squared: bool, eps: float) -> Tensor:
    volume = _factors(vectors, present)[2]
    return (volume * volume if squared else volume).to(vectors[0].dtype)


def wide_backward(grad: Tensor, vectors: list[Tensor], present: Tensor | None, squared: bool, eps: float) -> Tensor:
    basis, factor, volume = _factors(vectors, present)
    weight = grad.to(volume.dtype) * (2 * volume * volume if squared else volume)
    gradient = solve_transposed(factor, weight[:, None, None] * basis)
    return torch.where((volume != 0)[:, None, None], gradient, 0).to(vectors[0].dtype)


_library.impl("paired_gram_volume_wide", wide_forward, "CompositeExplicitAutograd")
_library.impl("paired_gram_volume_wide_bwd", wide_backward, "CompositeExplicitAutograd")
register_pair(
    "paired_gram_volume_wide",
    op="paired_gram_volume",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    backward=_backward_with("paired_gram_volume_wide_bwd"),
)


# ----------------------------------------------------------------------------------------------------------------------------- plain-torch formulas


def reference_paired_gram_volume(
    vectors: Sequence[Tensor] | Tensor,
    *,
    present: Tensor | None = None,
    squared: bool = False,
    normalize: bool | str = False,
    eps: float | None = None,
) -> Tensor:
    """`paired_gram_volume` in a few lines of differentiable torch; its gradient comes from autograd through Gram-Schmidt. `eps` is taken and not
    needed."""
    op = "reference_paired_gram_volume"
    entries, present, leading = _checked(op, vectors, present)
    stacked = torch.stack([entry.expand(leading + entry.shape[-1:]) for entry in entries], -2)
    k, D = stacked.shape[-2:]
    if present is not None:
        present = present.expand(leading + (k,))
        stacked = torch.where(present.unsqueeze(-1), stacked, 0)
    if normalize is True:
        stacked = unit(stacked)
    diagonal = orthonormalize(stacked, present)[1].diagonal(dim1=-2, dim2=-1)
    count = torch.full((), k, device=stacked.device) if present is None else present.sum(-1)
    alive = (diagonal != 0).all(-1) & (count <= D)
    # Dead samples multiply ones: a product with one zero still has a gradient towards that zero.
    volume = torch.where(alive, torch.where(alive.unsqueeze(-1), diagonal, 1).prod(-1), 0)
    if squared:
        return volume * volume
    return root_of_volume(volume, count) if normalize == "root" else volume


def formula_paired_gram_volume(vectors: Sequence[Tensor] | Tensor, *, present: Tensor | None = None, squared: bool = False) -> Tensor:
    """The determinant formula per sample: Gram matrix, det, abs, sqrt. Loses its digits for nearly collinear vectors, NaN gradients at 0."""
    stacked = vectors if isinstance(vectors, Tensor) else torch.stack(torch.broadcast_tensors(*vectors), -2)
    gram = stacked @ stacked.mT
    if present is not None:
        both = present.unsqueeze(-1) & present.unsqueeze(-2)
        gram = torch.where(both, gram, torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device))
    determinant = torch.linalg.det(gram if gram.dtype in (torch.float32, torch.float64) else gram.float()).to(stacked.dtype)
    return determinant if squared else determinant.abs().sqrt()
