"""Log-sum-exps of the rows and columns of scaled inner products, without their matrix. [CPC, 2018]"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _arguments as arguments
from . import _contrastive as contrastive
from ._registration import accumulation_dtype, autocast_is_on, call, refuse_forward_mode, register_pair, to_autocast

__all__ = ["PairwiseLogSumExp", "pairwise_logsumexp", "reference_pairwise_logsumexp", "formula_pairwise_logsumexp"]


class PairwiseLogSumExp(NamedTuple):
    """Log-sum-exps over all candidates of every row, and over all rows of every candidate.

    rows : Tensor [B]
    columns : Tensor [C]
    """

    rows: Tensor
    columns: Tensor

    def to(self, device: torch.device | str) -> PairwiseLogSumExp:
        return PairwiseLogSumExp(self.rows.to(device), self.columns.to(device))


def pairwise_logsumexp(x: Tensor, y: Tensor, *, logit_scale: float | Tensor, logit_bias: float | Tensor | None = None) -> PairwiseLogSumExp:
    r"""Log-sum-exps of all pairs of rows of x and y, both ways at once: what is left to do of a contrastive loss of your own are terms per row.

    ::

        rows_i = log sum_j exp(z[i, j])     columns_j = log sum_i exp(z[i, j])      z = logit_scale x_i . y_j + logit_bias

    A tile of logits is made, folded into both sums, and forgotten; the backward makes it again. Memory is linear in B and C, in training too.

    >>> import torch
    >>> pairwise_logsumexp(torch.eye(3), torch.eye(3)[:2], logit_scale=1.0)
    PairwiseLogSumExp(rows=tensor([1.3133, 1.3133, 0.6931]), columns=tensor([1.5514, 1.5514]))

    Parameters
    ----------
    x : Tensor [B, D]
    y : Tensor [C, D]
    logit_scale : float or Tensor of one element
        Multiplies, already exponentiated; positive. A tensor gets a gradient.
    logit_bias : float or Tensor of one element, optional
        Added to all logits. A tensor gets a gradient.

    Returns
    -------
    PairwiseLogSumExp(rows, columns)
        [B] and [C], float32 (float64 for float64). A named tuple with ``.to(device)``.

    Gradient
    --------
    Closed form in x, y, logit_scale and logit_bias, for any upstream gradients of rows and columns. Double backward and forward mode raise.

    Edges
    -----
    C = 0: rows are -inf, with gradient 0; B = 0: columns likewise. Logits of any size that are numbers do not overflow. A NaN makes its row or column and
    all of the other side NaN.

    Raises
    ------
    TypeError, ValueError
        ``pairwise_logsumexp: <argument> must ..., got ...``; RuntimeError for values of tensors, in the name of `clip_loss`, whose kernel this is; they are
        looked at on the CPU only.

    Complexity
    ----------
    2 B C D FLOP, the backward 6 B C D; memory beyond inputs and gradients about 4 (B + C) D.

    Paper: van den Oord et al., "Representation learning with contrastive predictive coding", 2018: InfoNCE is made of these sums, as are its many variants.
    """
    op = "pairwise_logsumexp"
    x, y = check_pair(op, x, y)
    refuse_forward_mode(op, [value for value in (x, y, logit_scale, logit_bias) if isinstance(value, Tensor)])
    if autocast_is_on(x.device.type):
        x, y = to_autocast(x), to_autocast(y)
    scale = contrastive.check_scalar(op, "logit_scale", logit_scale, x, positive=True)
    bias = None if logit_bias is None else contrastive.check_scalar(op, "logit_bias", logit_bias, x, positive=False)
    with torch.autocast(x.device.type, enabled=False):
        rows, columns = log_sum_exps(x, y, scale, bias)
        return PairwiseLogSumExp(rows.to(scale.dtype), columns.to(scale.dtype))


def check_pair(op: str, x: object, y: object) -> tuple[Tensor, Tensor]:
    x = contrastive.check_matrix(op, "x", x, "[B, D]")
    return x, check_like(op, "y", y, "[C, D]", x)


def check_like(op: str, name: str, value: object, shape: str, x: Tensor) -> Tensor:
    value = contrastive.check_matrix(op, name, value, shape)
    mixed = autocast_is_on(x.device.type)
    arguments.check_alike(op, name, to_autocast(value) if mixed else value, "x", to_autocast(x) if mixed else x)
    return value


def log_sum_exps(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, rows: Tensor | None = None, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """In float64, so that little is lost where a loss subtracts a logit. rows, columns: bool, which take part; the others get -inf, and must hold zeros."""
    return call("pairwise_logsumexp", x, y, scale, bias, rows, columns)


# ------------------------------------------------------------------------------------------------------------------------- what torch needs to know
# The kernel is that of `clip_loss`: rows without a label leave log-sum-exps alone of its forward, and of its backward their gradient with any weights.

_NO_LABEL = (0.0, 0.5, 0.5, 0.0)  # label_smoothing, row_part, column_part, eps


def _forward(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, rows: Tensor | None, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    target = _no_target(x) if rows is None else torch.where(rows, -1, contrastive.IGNORED)
    present = None if columns is None else columns[:, None]
    _, row_lse, column_lse, *_ = torch.ops.modalign.clip_loss(x, [y], scale, bias, target, present, *_NO_LABEL, 0)
    return row_lse, column_lse


def _backward(
    grad_rows: Tensor,
    grad_columns: Tensor,
    rows: Tensor,
    columns: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    weights = [(2 * grad).to(scale.dtype) for grad in (grad_rows, grad_columns)]  # the kernel takes a half of either direction
    classes = torch.cat([scale.new_ones(3), scale.new_zeros(1)])  # the center is 0: the gradients of logits do not add up to 0 here
    empty = scale.new_empty((0, 1, x.shape[1])), scale.new_empty((0, 1)), scale.new_empty(0)  # basis, factor, products
    grad_x, grad_y, grad_scale = torch.ops.modalign.clip_loss_bwd(
        *weights, rows, columns, classes, *empty, x, [y], scale, bias, _no_target(x), None, *_NO_LABEL, need_x, need_y
    )
    return grad_x, grad_y[:, 0] if need_y else grad_y, grad_scale


def _no_target(x: Tensor) -> Tensor:
    return x.new_full((x.shape[0],), -1, dtype=torch.int64)


def _fake(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, rows: Tensor | None, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], dtype=torch.float64), x.new_empty(y.shape[0], dtype=torch.float64)


def _fake_backward(
    grad_rows: Tensor,
    grad_columns: Tensor,
    rows: Tensor,
    columns: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape if need_x else (0,)), y.new_empty(y.shape if need_y else (0,)), scale.new_empty(2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, y, scale, bias, _, _ = inputs
    ctx.save_for_backward(*output, x, y, scale, *([] if bias is None else [bias]))


def _backward_of(ctx: Any, grad_rows: Tensor, grad_columns: Tensor) -> tuple[Any, ...]:
    rows, columns, x, y, scale, *optional = ctx.saved_tensors
    need_x, need_y, need_scale, need_bias = ctx.needs_input_grad[:4]
    grad_x, grad_y, grad_scale = call(
        "pairwise_logsumexp_bwd", grad_rows, grad_columns, rows, columns, x, y, scale, optional[0] if optional else None, need_x, need_y
    )
    return (
        grad_x if need_x else None,
        grad_y if need_y else None,
        grad_scale[0] if need_scale else None,
        grad_scale[1] if need_bias else None,
        None,
        None,
    )


_library = torch.library.Library("modalign", "FRAGMENT")
_library.define("pairwise_logsumexp(Tensor x, Tensor y, Tensor scale, Tensor? bias, Tensor? rows, Tensor? columns) -> (Tensor, Tensor)")
_library.define(
    "pairwise_logsumexp_bwd(Tensor grad_rows, Tensor grad_columns, Tensor rows, Tensor columns, Tensor x, Tensor y, Tensor scale, Tensor? bias, bool need_x, bool need_y)"
    " -> (Tensor, Tensor, Tensor)"
)
contrastive_devices = [key for key in ("CPU", "CUDA") if torch._C._dispatch_has_kernel_for_dispatch_key("modalign::clip_loss", key)]
for _device in contrastive_devices:
    _library.impl("pairwise_logsumexp", _forward, _device)
    _library.impl("pairwise_logsumexp_bwd", _backward, _device)
register_pair(
    "pairwise_logsumexp",
    op="pairwise_logsumexp",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    backward=_backward_of,
    vmap="loop",
)


# ---------------------------------------------------------------------------------------------------------------------------------- plain-torch formulas


def reference_pairwise_logsumexp(x: Tensor, y: Tensor, *, logit_scale: float | Tensor, logit_bias: float | Tensor | None = None) -> PairwiseLogSumExp:
    """`pairwise_logsumexp` in two lines of differentiable torch; stores B x C numbers."""
    x, y = check_pair("reference_pairwise_logsumexp", x, y)
    real = accumulation_dtype(x.dtype)
    return formula_pairwise_logsumexp(x.to(real), y.to(real), logit_scale=logit_scale, logit_bias=logit_bias)


def formula_pairwise_logsumexp(x: Tensor, y: Tensor, *, logit_scale: float | Tensor, logit_bias: float | Tensor | None = None) -> PairwiseLogSumExp:
    """The usual code: the matrix of logits, in the dtype of the inputs, and two log-sum-exps. For comparisons."""
    logits = logit_scale * (x @ y.mT) + (0 if logit_bias is None else logit_bias)
    return PairwiseLogSumExp(logits.logsumexp(1), logits.logsumexp(0))
