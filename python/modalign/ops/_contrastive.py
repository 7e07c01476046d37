"""What the contrastive losses share: the raw ops `<loss>` and `<loss>_bwd`, their autograd, and the way from a loss per row to the result."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import _arguments as arguments
from ._registration import accumulation_dtype, call, register_pair, tie_to

IGNORED = -100
REDUCTIONS = ("mean", "sum", "none")
DIRECTIONS = ("both", "rows", "columns")


# ----------------------------------------------------------------------------------------------------------------------------------------- arguments


def check_scalar(op: str, name: str, value: object, like: Tensor, *, positive: bool) -> Tensor:
    """A float or a floating-point tensor with one element as a 0-dim tensor in the accumulation dtype, so that a new value compiles nothing anew."""
    real = accumulation_dtype(like.dtype)
    if isinstance(value, Tensor):
        if not value.is_floating_point() or value.numel() != 1:
            raise TypeError(f"{op}: {name} must be a number or a floating-point tensor of one element, got {arguments.describe(value)}")
        if value.device != like.device and value.device.type != "cpu":
            raise ValueError(f"{op}: {name} must be on the device of the other arguments, {like.device}, got {value.device}")
        return value.reshape(()).to(device=like.device, dtype=real)
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat)):
        raise TypeError(f"{op}: {name} must be a number or a floating-point tensor of one element, got {arguments.describe(value)}")
    if not (-math.inf < value < math.inf and (value > 0 or not positive)):  # comparisons, which torch.compile can guard a symbolic number with
        raise ValueError(f"{op}: {name} must be {'positive and ' if positive else ''}finite, got {value!r}")
    return torch.full((), value, dtype=real, device=like.device)


def check_target(op: str, target: object, rows: int, columns: int, like: Tensor) -> Tensor | None:
    if target is None:
        if rows != columns:
            raise ValueError(f"{op}: target must be given where there are not as many candidates as rows, got {rows} rows and {columns} candidates")
        return None
    if not isinstance(target, Tensor) or target.dtype is not torch.int64:
        raise TypeError(f"{op}: target must be None or an int64 tensor [B], got {arguments.describe(target)}")
    if target.device != like.device:
        raise ValueError(f"{op}: target must be on the device of the other arguments, {like.device}, got {target.device}")
    if tuple(target.shape) != (rows,):
        raise ValueError(f"{op}: target must have shape [B] = [{rows}], got {arguments.describe(target)}")
    return target


def check_label_smoothing(op: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: label_smoothing must be a number, got {arguments.describe(value)}")
    if not 0 <= value < 1:
        raise ValueError(f"{op}: label_smoothing must be at least 0 and below 1, got {value!r}")
    return float(value)


def check_reduction(op: str, value: object) -> str:
    if value not in REDUCTIONS:
        raise ValueError(f'{op}: reduction must be "mean", "sum" or "none", got {arguments.describe(value)}')
    return value  # type: ignore[return-value]


def parts_of(direction: str) -> tuple[float, float]:
    """The shares of rows and columns. Literals: torch.compile(dynamic=True) would take floats of a table for inputs."""
    if direction == "both":
        return 0.5, 0.5
    return (1.0, 0.0) if direction == "rows" else (0.0, 1.0)


def check_direction(op: str, value: object) -> str:
    if value not in DIRECTIONS:
        raise ValueError(f'{op}: direction must be "both", "rows" or "columns", got {arguments.describe(value)}')
    return value  # type: ignore[return-value]


IMPLEMENTATIONS = ("auto", "streaming", "dense")
KEEP_ALL = 1 << 62


def check_workspace(op: str, implementation: object, workspace_bytes: object, process_group: object) -> int:
    """Bytes that the forward may leave for the backward: "streaming" none, "dense" as many as there are, "auto" the given number or 64 MiB."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f'{op}: implementation must be "auto", "streaming" or "dense", got {arguments.describe(implementation)}')
    if workspace_bytes is not None and (isinstance(workspace_bytes, bool) or not isinstance(workspace_bytes, int)):
        raise TypeError(f"{op}: workspace_bytes must be None or a whole number, got {arguments.describe(workspace_bytes)}")
    if workspace_bytes is not None and (workspace_bytes < 0 or implementation != "auto"):
        raise ValueError(f'{op}: workspace_bytes must be at least 0 and go with implementation="auto", got {workspace_bytes} and {implementation!r}')
    if process_group is not None and (implementation == "dense" or workspace_bytes):
        raise ValueError(f'{op}: implementation must not be "dense", nor workspace_bytes given, together with process_group: nothing is kept there')
    if implementation == "auto":
        return 64 << 20 if workspace_bytes is None else workspace_bytes
    return KEEP_ALL if implementation == "dense" else 0


def check_group(op: str, group: object, gather_grad: object, exchange: object) -> None:
    if exchange not in ("gather", "ring"):
        raise ValueError(f'{op}: exchange must be "gather" or "ring", got {arguments.describe(exchange)}')
    if gather_grad not in ("full", "local"):
        raise ValueError(f'{op}: gather_grad must be "full" or "local", got {arguments.describe(gather_grad)}')
    if group is None:
        if gather_grad != "full" or exchange != "gather":
            raise ValueError(f"{op}: process_group must be given together with gather_grad or exchange, got None with {gather_grad!r} and {exchange!r}")
        return
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise ValueError(f"{op}: process_group must be None where torch.distributed is not initialised, got {arguments.describe(group)}")
    if not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(f"{op}: process_group must be None or a torch.distributed process group such as dist.group.WORLD, got {arguments.describe(group)}")


def check_matrix(op: str, name: str, value: object, shape: str) -> Tensor:
    tensor = arguments.check_vectors(op, name, value, shape)
    if tensor.dim() != 2:
        raise ValueError(f"{op}: {name} must have 2 dimensions {shape}, got {arguments.describe(tensor)}")
    return tensor


# ---------------------------------------------------------------------------------------------------------------------------------------- evaluation


def total(values: Tensor) -> Tensor:
    """The sum of a vector, one by one and in double: torch splits long sums among its threads, and the bits would depend on their number."""
    return torch.nn.functional.pad(values, (1, 0)).cumsum(0, dtype=torch.float64)[-1].to(values.dtype)


def reduce(loss: Tensor, count: Tensor, reduction: str) -> Tensor:
    """`loss` per row to the result; the mean over none is 0."""
    return loss if reduction == "none" else total(loss) if reduction == "sum" else total(loss) / count.clamp(min=1)


def evaluate(
    name: str,
    anchor: Tensor,
    others: list[Tensor],
    scale: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    present: Tensor | None,
    label_smoothing: float,
    direction: str,
    eps: float,
    reduction: str,
    return_accuracy: bool,
    workspace_bytes: int,
    process_group: Any = None,
    gather_grad: str = "full",
    exchange: str = "gather",
) -> Any:
    if process_group is not None:
        from . import _distributed

        return _distributed.evaluate(
            name, anchor, others, scale, bias, target, present, label_smoothing, direction, eps, reduction, return_accuracy, process_group, gather_grad, exchange
        )
    if workspace_bytes == KEEP_ALL and anchor.device.type == "cuda":
        raise ValueError(f'{name}: implementation must not be "dense" on a GPU, where nothing is kept for the backward')
    loss, _, _, _, _, _, row_best, column_best, classes, *_ = call(
        name, anchor, others, scale, bias, target, present, label_smoothing, *parts_of(direction), eps, workspace_bytes, None
    )
    result = reduce(loss, classes[1] if name == "siglip_loss" else classes[2], reduction)
    return (result, accuracy(row_best, column_best, target)) if return_accuracy else result


def accuracy(row_best: Tensor, column_best: Tensor, target: Tensor | None) -> Tensor:
    """Share of the labelled rows whose best candidate is their own, and of the labelled candidates whose best row is one of theirs: float32 [2]."""
    rows = torch.arange(row_best.shape[0], device=row_best.device) if target is None else target
    right_row = row_best == rows
    there = (column_best >= 0) & (column_best < row_best.shape[0])
    own = rows[torch.where(there, column_best, 0)] if row_best.shape[0] else column_best
    right_column = there & (own == torch.arange(column_best.shape[0], device=row_best.device))
    labelled = [(row_best >= 0).sum(), (column_best >= 0).sum()]
    return torch.stack([(right & (best >= 0)).sum() / count.clamp(min=1) for right, best, count in zip((right_row, right_column), (row_best, column_best), labelled, strict=True)])


def without_ignored(rows: Tensor, target: Tensor | None) -> Tensor:
    """Zeros in place of ignored rows: a NaN there would come back through the gradient of a division."""
    return rows if target is None else torch.where((target != IGNORED)[:, None], rows, 0)


def column_weights(row_weight: Tensor, target: Tensor | None, columns: int) -> Tensor:
    """h_j: the weights of the rows whose target is j, added in the order of the rows on every device."""
    if target is None:
        return row_weight
    if columns == 0:
        return row_weight.new_zeros(0)
    there = (target >= 0) & (target < columns)
    weight, at = torch.where(there, row_weight, 0), torch.where(there, target, 0)
    if row_weight.device.type == "cpu":
        return row_weight.new_zeros(columns).index_add(0, at, weight)
    order = torch.argsort(at, stable=True)  # index_add on a GPU adds in any order
    return torch.segment_reduce(weight[order], "sum", lengths=torch.bincount(at, minlength=columns), initial=0)


# ------------------------------------------------------------------------------------------------------------------------- what torch needs to know


def _fake(anchor: Tensor, others: list[Tensor], scale: Tensor, bias: Tensor | None, target: Tensor | None, present: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    given = [*others, scale, *(tensor for tensor in (bias, target, present) if tensor is not None)]
    torch._check(all(tensor.device == anchor.device for tensor in given), lambda: "contrastive loss: tensors must be on one device")
    (B, D), C, m, real = anchor.shape, others[0].shape[0], len(others), accumulation_dtype(anchor.dtype)

    def new(*size: Any, dtype: torch.dtype = real) -> Tensor:
        return anchor.new_empty(size, dtype=dtype)

    best = new(B, dtype=torch.int64), new(C, dtype=torch.int64)
    lanes = 64 // real.itemsize
    size = B * ((-(-C // lanes) + 7) // 8 * 8) * m * lanes  # products_size in csrc/ops/contrastive_loss.h
    keep = size if anchor.device.type != "cuda" and size * real.itemsize <= rest[4] else 0
    double = torch.float64
    return new(B), new(B, dtype=double), new(C, dtype=double), new(B), new(C), new(B), *best, new(4), new(C, m, D), new(C, m * m), new(keep)


def _fake_triangle(anchor: Tensor, others: list[Tensor], *rest: Any) -> tuple[Tensor, ...]:
    *statistics, _, products = _fake(anchor, others, *rest)
    return *statistics, anchor.new_empty((others[0].shape[0], 3), dtype=accumulation_dtype(anchor.dtype)), products


def _fake_product(anchor: Tensor, others: list[Tensor], *rest: Any) -> tuple[Tensor, ...]:
    *statistics, _, _, products = _fake(anchor, others, *rest)
    return *statistics, *(anchor.new_empty(size, dtype=accumulation_dtype(anchor.dtype)) for size in ((0, 1, anchor.shape[1]), (0, 1))), products


def _fake_backward(
    row_weight: Tensor,
    column_weight: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    classes: Tensor,
    basis: Tensor,
    factor: Tensor,
    products: Tensor,
    anchor: Tensor,
    others: list[Tensor],
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    need_anchor, need_others = rest[-2:]
    shape = (others[0].shape[0], len(others), anchor.shape[1])
    return anchor.new_empty(anchor.shape if need_anchor else (0,)), anchor.new_empty(shape if need_others else (0,)), row_weight.new_empty((2,))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    anchor, others, scale, bias, target, present, *ctx.options, _, _ = inputs
    _, row_lse, column_lse, _, _, _, row_best, _, classes, basis, factor, products = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.m, ctx.has = len(others), tuple(tensor is not None for tensor in (bias, target, present))
    optional = [tensor for tensor in (bias, target, present) if tensor is not None]
    ctx.save_for_backward(row_lse, column_lse, row_best, classes, basis, factor, products, anchor, scale, *others, *optional)


def _backward_of(name: str) -> Any:
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        options = [None] * (len(ctx.needs_input_grad) - 4)  # the dispatcher leaves out a seed of None
        if grad is None:
            return None, [None] * ctx.m, None, None, *options
        row_lse, column_lse, row_best, classes, basis, factor, products, anchor, scale, *rest = ctx.saved_tensors
        others, optional = rest[: ctx.m], iter(rest[ctx.m :])
        bias, target, present = (next(optional) if has else None for has in ctx.has)
        need_anchor, need_each, need_scale, need_bias = *ctx.needs_input_grad[:3], ctx.needs_input_grad[3]
        row_weight = grad.contiguous() if name == "siglip_loss" else torch.where(row_best >= 0, grad, 0)
        saved = row_lse, column_lse, classes, basis, factor, products
        if torch.is_grad_enabled():
            anchor = tie_to(anchor, [*others, scale.reshape(1), *([] if bias is None else [bias.reshape(1)])])
        column_weight = column_weights(row_weight, target, others[0].shape[0])
        grad_anchor, grad_others, grad_scale = call(
            name + "_bwd", row_weight, column_weight, *saved, anchor, others, scale, bias, target, present, *ctx.options, need_anchor, any(need_each)
        )
        return (
            grad_anchor if need_anchor else None,
            [grad_others[:, p] if need else None for p, need in enumerate(need_each)],
            grad_scale[0] if need_scale else None,
            grad_scale[1] if need_bias else None,
            *options,
        )

    return backward


for _name, _fake_of in (
    ("gram_contrastive_loss", _fake),
    ("triangle_contrastive_loss", _fake_triangle),
    ("clip_loss", _fake_product),
    ("siglip_loss", _fake_product),
):
    register_pair(
        _name,
        op=_name,
        fake=_fake_of,
        fake_backward=_fake_backward,
        setup_context=_setup_context,
        backward=_backward_of(_name),
        vmap="loop",
    )


# ---------------------------------------------------------------------------------------------------------------------------------- plain-torch formulas


def loss_of_logits(
    logits: Tensor, target: Tensor | None, *, rows: Tensor | None = None, columns: Tensor | None = None, label_smoothing: float = 0.0, direction: str = "both", sigmoid: bool = False
) -> tuple[Tensor, Tensor]:
    """The loss per row and the number that the mean divides by, of a matrix of logits. rows, columns: bool, which take part."""
    B, C = logits.shape
    at = torch.arange(B, device=logits.device) if target is None else target
    rows = at != IGNORED if rows is None else rows & (at != IGNORED)
    columns = torch.ones(C, dtype=torch.bool, device=logits.device) if columns is None else columns
    labelled = rows & (at >= 0) & (at < C)
    labelled = labelled & columns[torch.where(labelled, at, 0)] if C else labelled & False
    row, column = rows.nonzero().squeeze(1), columns.nonzero().squeeze(1)
    inside = logits[row][:, column]
    where_row, where_column = rows.cumsum(0) - 1, columns.cumsum(0) - 1
    pairs = labelled.nonzero().squeeze(1)
    i, j = where_row[pairs], where_column[at[pairs]]
    label = inside[i, j]
    loss = logits.new_zeros(B)
    if sigmoid:
        loss = loss.index_put((row,), torch.nn.functional.softplus(inside).sum(1))
        return loss.index_put((pairs,), loss[pairs] - label), rows.sum()
    label = (1 - label_smoothing) * label
    row_loss = inside.logsumexp(1)[i] - label - label_smoothing * inside.mean(1)[i]
    column_loss = inside.logsumexp(0)[j] - label - label_smoothing * inside.mean(0)[j]
    row_part, column_part = parts_of(direction)
    return loss.index_put((pairs,), row_part * row_loss + column_part * column_loss), labelled.sum()


def two_entropies(logits: Tensor, label_smoothing: float) -> Tensor:
    """Cross entropy of the rows and of the columns of a square matrix of logits, halved."""
    at, entropy = torch.arange(logits.shape[0], device=logits.device), torch.nn.functional.cross_entropy
    return (entropy(logits, at, label_smoothing=label_smoothing) + entropy(logits.T, at, label_smoothing=label_smoothing)) / 2
