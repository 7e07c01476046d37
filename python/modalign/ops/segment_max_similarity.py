"""Largest product of every segment of rows with every candidate, without the matrix of products. [ViLLA, ICCV 2023; FILIP, ICLR 2022]

Regions of an image with attributes, tokens of a text with patches or with a codebook: many rows belong to one item, and the best speaks for it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import _arguments as arguments
from ._contrastive import check_matrix
from ._registration import autocast_is_on, call, refuse_forward_mode, register_pair, to_autocast
from ._results import SegmentMax

__all__ = ["formula_segment_max_similarity", "reference_segment_max_similarity", "segment_max_similarity"]

MAX_ROWS = 2**31 - 1  # kernels count rows and segments in 32 bits


def segment_max_similarity(x: Tensor, offsets: Tensor, y: Tensor) -> SegmentMax:
    r"""The best row of each segment of x for each row of y, and its product.

    Segment s has the rows ``offsets[s]`` to ``offsets[s + 1] - 1`` of x::

        values[s, a] = max over r in segment s of x_r . y_a        indices[s, a] = the first r that attains it

    A tile of products is made, folded into the best of the segments in progress, and forgotten: nothing of R x A is stored.

    >>> import torch
    >>> segment_max_similarity(torch.tensor([[1.0, 0.0], [3.0, 1.0], [0.0, 2.0]]), torch.tensor([0, 2, 3]), torch.eye(2))
    SegmentMax(values=tensor([[3., 1.],
            [0., 2.]]), indices=tensor([[1, 1],
            [2, 2]]))

    Parameters
    ----------
    x : Tensor [R, D]
        Regions or tokens of all items, one item behind the other; R < 2^31.
    offsets : Tensor int64 [S + 1]
        Where the segments begin, rising from 0 to R; two equal ones make an empty segment.
    y : Tensor [A, D]
        Candidates: attributes, tokens, codes. For cosines give rows of unit length.

    Returns
    -------
    SegmentMax(values, indices), both [S, A]: values in the input dtype, indices int64 rows of x. Half types accumulate in float32, and the row is
    chosen before the value is rounded; under autocast inputs are cast to float32 and so are the values.

    Gradient
    --------
    In x and y, through the chosen rows alone: ``dx_r = sum of g[s, a] y_a`` over the candidates that chose r, ``dy_a = sum over s of g[s, a] x_r``
    with ``r = indices[s, a]``. Rows that tie share nothing. Double backward and forward mode raise; offsets have no gradient.

    Edges
    -----
    An empty segment: value -inf, index -1, no gradient. Ties go to the lowest row. A NaN counts as the largest: it makes the values of its segment
    (in y: of its column) NaN, with the index of the first NaN. Empty R, S or A: results and gradients of that shape.

    Raises
    ------
    TypeError, ValueError
        ``segment_max_similarity: <argument> must ..., got ...``; RuntimeError for offsets that do not rise from 0 to R, whose values are looked at on
        the CPU only (on CUDA such offsets give unspecified rows, or -1).

    Complexity
    ----------
    2 R A D FLOP, the backward 4 S A D; memory beyond inputs, results and gradients (R + A) D numbers, for half types in the backward twice that.

    Paper: Varma et al., "ViLLA: fine-grained vision-language representation learning from real-world data", ICCV 2023 (regions and attributes);
    Yao et al., "FILIP: fine-grained interactive language-image pre-training", ICLR 2022 (the maximum over tokens).
    """
    op = "segment_max_similarity"
    x, offsets, y = _checked(op, x, offsets, y)
    refuse_forward_mode(op, (x, y))
    if autocast_is_on(x.device.type):
        x, y = to_autocast(x), to_autocast(y)
    return SegmentMax(*call(op, x, offsets, y))


def _checked(op: str, x: object, offsets: object, y: object) -> tuple[Tensor, Tensor, Tensor]:
    x, y = check_matrix(op, "x", x, "[R, D]"), check_matrix(op, "y", y, "[A, D]")
    mixed = autocast_is_on(x.device.type)
    arguments.check_alike(op, "y", to_autocast(y) if mixed else y, "x", to_autocast(x) if mixed else x)
    if x.shape[0] > MAX_ROWS:
        raise ValueError(f"{op}: x must have fewer than 2^31 rows, got {arguments.describe(x)}")
    if not isinstance(offsets, Tensor) or offsets.dtype is not torch.int64:
        raise TypeError(f"{op}: offsets must be an int64 tensor [S + 1], got {arguments.describe(offsets)}")
    if offsets.dim() != 1 or not 1 <= offsets.shape[0] <= MAX_ROWS:
        raise ValueError(f"{op}: offsets must have one dimension of 1 to 2^31 - 1 entries, got {arguments.describe(offsets)}")
    if offsets.device != x.device:
        raise ValueError(f"{op}: offsets must be on x's device {x.device}, got {offsets.device}")
    return x, offsets, y


# ------------------------------------------------------------------------------------------------------------------------- what torch needs to know


def _fake(x: Tensor, offsets: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    shape = (offsets.shape[0] - 1, y.shape[0])
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)


def _fake_backward(grad: Tensor, indices: Tensor, x: Tensor, offsets: Tensor, y: Tensor, need_x: bool, need_y: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if need_x else (0,)), x.new_empty(y.shape if need_y else (0,))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, indices = output
    ctx.mark_non_differentiable(indices)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(indices, *inputs)


def _backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    if grad is None:
        return None, None, None
    need_x, _, need_y = ctx.needs_input_grad
    grad_x, grad_y = call("segment_max_similarity_bwd", grad, *ctx.saved_tensors, need_x, need_y)
    return grad_x if need_x else None, None, grad_y if need_y else None


register_pair(
    "segment_max_similarity",
    op="segment_max_similarity",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    backward=_backward,
    vmap="loop",
)


# ----------------------------------------------------------------------------------------------------------------------------- plain-torch formulas


def reference_segment_max_similarity(x: Tensor, offsets: Tensor, y: Tensor) -> SegmentMax:
    """`segment_max_similarity` from the matrix of products, a segment at a time; its gradient comes from autograd."""
    x, offsets, y = _checked("reference_segment_max_similarity", x, offsets, y)
    products = x @ y.mT
    values, indices = [products[:0]], [offsets.new_empty((0, y.shape[0]))]
    for begin, end in pairwise(offsets.tolist()):
        empty = products.new_full((1, y.shape[0]), -torch.inf), offsets.new_full((1, y.shape[0]), -1)
        value, index = products[begin:end].max(0, keepdim=True) if begin < end else empty
        values.append(value)
        indices.append(index + begin if begin < end else index)
    return SegmentMax(torch.cat(values), torch.cat(indices))


def formula_segment_max_similarity(x: Tensor, offsets: Tensor, y: Tensor) -> SegmentMax:
    """The usual code: the matrix of products in the input dtype and a scatter of its maxima. For comparisons; the gradient is shared among ties, and
    there are no indices (-1)."""
    products = x @ y.mT
    shape = (offsets.shape[0] - 1, y.shape[0])
    segments = torch.repeat_interleave(torch.arange(shape[0], device=x.device), offsets.diff())
    values = products.new_full(shape, -torch.inf).scatter_reduce(0, segments[:, None].expand_as(products), products, "amax")
    return SegmentMax(values, offsets.new_full(shape, -1))
