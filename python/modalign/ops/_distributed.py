"""Contrastive losses over several processes: every rank holds some rows and some candidates of one large batch.

The rows stay where they are. "gather": all candidates come to every rank, which meets them with its own rows; column statistics are combined over ranks
(C numbers), and in the backward each rank's share of the candidates' gradients goes back to their owner. "ring": the candidates' blocks travel from rank
to rank instead, with their column statistics and gradients, so that no rank ever holds more than two blocks.

Convention: each rank returns its part of the global loss times the number of ranks. Averaging the ranks' gradients, as data parallel training does, then
gives exactly the gradient of the global loss, also where batches differ in size; for equal ones a rank returns the mean over its own rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import _contrastive as contrastive

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
    group: Any,
    gather_grad: str,
) -> Any:
    options = (label_smoothing, *contrastive.DIRECTIONS[direction], eps)
    loss, weight, right = _Gathered.apply(name, group, gather_grad, options, target, present, scale, bias, anchor, *others)
    result = loss if reduction == "none" else loss.sum() if reduction == "sum" else (loss * weight).sum()
    return (result, right) if return_accuracy else result


def gather_sizes(size: int, like: Tensor, group: Any) -> list[int]:
    """The number of candidates of every rank."""
    mine = torch.tensor([size], device=like.device)
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, mine, group=group)
    return [int(each) for each in found]


def all_gather(tensor: Tensor, sizes: list[int], group: Any) -> Tensor:
    """The rows of all ranks below each other; `sizes` says how many each has. Shorter parts travel padded."""
    most = max(sizes)
    padded = tensor.new_zeros(most, *tensor.shape[1:])
    padded[: tensor.shape[0]] = tensor
    found = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(found, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(found, sizes, strict=True)])


def reduce_scatter(tensor: Tensor, sizes: list[int], group: Any) -> Tensor:
    """This rank's rows of the sum over ranks, added in the order of the ranks."""
    rank, most = dist.get_rank(group), max(sizes)
    parts = torch.split(tensor, sizes)
    outgoing = [torch.cat([part, part.new_zeros(most - part.shape[0], *part.shape[1:])]) for part in parts]
    incoming = [torch.empty_like(part) for part in outgoing]
    if dist.get_backend(group) == "gloo":  # has no all_to_all of lists
        requests = []
        for other in range(len(sizes)):
            if other == rank:
                incoming[rank] = outgoing[rank]
                continue
            requests.append(dist.isend(outgoing[other].contiguous(), group=group, group_dst=other))
            requests.append(dist.irecv(incoming[other], group=group, group_src=other))
        for request in requests:
            request.wait()
    else:
        dist.all_to_all(incoming, [part.contiguous() for part in outgoing], group=group)
    total = incoming[0]
    for part in incoming[1:]:
        total = total + part
    return total[: sizes[rank]]


def log_sum_exp(partial: Tensor, group: Any) -> Tensor:
    """log of the sum over ranks of exp(partial); -inf where every rank has it."""
    top = partial.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    offset = torch.where(top == -torch.inf, 0, top)
    total = (partial - offset).exp().double()
    dist.all_reduce(total, group=group)
    return (offset + total.log()).to(partial.dtype)


class _Gathered(torch.autograd.Function):
    """-> (loss per local row, weight of each row in the mean, accuracy)."""

    @staticmethod
    def forward(
        ctx: Any,
        name: str,
        group: Any,
        gather_grad: str,
        options: tuple[float, ...],
        target: Tensor | None,
        present: Tensor | None,
        scale: Tensor,
        bias: Tensor | None,
        anchor: Tensor,
        *others: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        world, rank = dist.get_world_size(group), dist.get_rank(group)
        sizes = gather_sizes(others[0].shape[0], anchor, group)
        everyone = [all_gather(other, sizes, group) for other in others]
        everyones_present = None if present is None else all_gather(present.to(torch.uint8), sizes, group).bool()
        if target is None:
            target = torch.arange(anchor.shape[0], device=anchor.device) + sum(sizes[:rank])
        loss, row_lse, column_lse, row_sum, column_sum, label, row_best, column_best, classes, basis, factor = getattr(torch.ops.modalign, name)(
            anchor, everyone, scale, bias, target, everyones_present, *options
        )
        counts = classes[1:].clone()
        dist.all_reduce(counts, group=group)
        classes = torch.cat([classes[:1], counts])
        labelled = row_best >= 0
        if name == "siglip_loss":
            column_lse_everywhere = column_lse
            weight = world / counts[0].clamp(min=1)
        else:
            column_lse_everywhere = log_sum_exp(column_lse, group)
            dist.all_reduce(column_sum, group=group)
            smoothing, row_part, column_part, _ = options
            at = torch.where(labelled, target, 0)
            kept = (1 - smoothing) * label
            row_loss = row_lse - kept - (smoothing * row_sum / classes[0] if smoothing else 0)
            column_loss = column_lse_everywhere[at] - kept - (smoothing * column_sum[at] / counts[0] if smoothing else 0) if len(column_lse) else row_loss
            loss = torch.where(labelled, row_part * row_loss + column_part * column_loss, 0)
            weight = world / counts[1].clamp(min=1)
        ctx.name, ctx.group, ctx.gather_grad, ctx.options, ctx.sizes, ctx.m = name, group, gather_grad, options, sizes, len(others)
        ctx.has_bias, ctx.has_present = bias is not None, present is not None
        optional = [tensor for tensor in (bias, everyones_present) if tensor is not None]
        ctx.save_for_backward(row_lse, column_lse_everywhere, classes, basis, factor, labelled, target, scale, anchor, *everyone, *optional)
        right = _accuracy(row_best, column_best, column_lse, target, group)
        ctx.mark_non_differentiable(weight, right)
        return loss, weight, right

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        row_lse, column_lse, classes, basis, factor, labelled, target, scale, anchor, *rest = ctx.saved_tensors
        everyone, optional = rest[: ctx.m], iter(rest[ctx.m :])
        bias = next(optional) if ctx.has_bias else None
        present = next(optional) if ctx.has_present else None
        row_weight = grad.contiguous() if ctx.name == "siglip_loss" else torch.where(labelled, grad, 0)
        column_weight = contrastive.column_weights(row_weight, target, everyone[0].shape[0])
        dist.all_reduce(column_weight, group=ctx.group)
        need_scale, need_bias, need_anchor, *need_others = ctx.needs_input_grad[6:]

        def run(row_part: float, column_part: float, anchors: bool, candidates: bool) -> tuple[Tensor, Tensor, Tensor]:
            smoothing, _, _, eps = ctx.options
            return getattr(torch.ops.modalign, ctx.name + "_bwd")(
                row_weight, column_weight, row_lse, column_lse, classes, basis, factor, anchor, everyone, scale, bias, target, present,
                smoothing, row_part, column_part, eps, anchors, candidates,
            )  # fmt: skip

        _, row_part, column_part, _ = ctx.options
        if ctx.gather_grad == "full" or ctx.name == "siglip_loss":
            grad_anchor, grad_others, grad_scale = run(row_part, column_part, need_anchor, any(need_others))
            if any(need_others):
                grad_others = reduce_scatter(grad_others, ctx.sizes, ctx.group)
        else:  # each direction sends gradient to the side that was not gathered alone
            grad_anchor, _, from_rows = run(row_part, 0.0, need_anchor, False)
            _, grad_others, from_columns = run(0.0, column_part, False, any(need_others))
            grad_scale = from_rows + from_columns
            if any(need_others):
                grad_others = reduce_scatter(grad_others, ctx.sizes, ctx.group)
        return (
            *[None] * 6,
            grad_scale[0] if need_scale else None,
            grad_scale[1] if need_bias else None,
            grad_anchor if need_anchor else None,
            *(grad_others[:, p] if need else None for p, need in enumerate(need_others)),
        )


def _accuracy(row_best: Tensor, column_best: Tensor, column_lse: Tensor, target: Tensor, group: Any) -> Tensor:
    """Of the rows: all ranks together. Of the candidates: not known without the best logits of the other ranks, so NaN."""
    labelled = row_best >= 0
    counts = torch.stack([(labelled & (row_best == target)).sum(), labelled.sum()]).double()
    dist.all_reduce(counts, group=group)
    return torch.stack([counts[0] / counts[1].clamp(min=1), counts.new_full((), torch.nan)]).float()
