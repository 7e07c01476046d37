"""Contrastive losses over several processes: every rank holds some rows and some candidates of one large batch.

The rows stay where they are. "gather": all candidates come to every rank, which meets them with its own rows; column statistics are combined over ranks
(C numbers), and in the backward each rank's share of the candidates' gradients goes back to their owner. "ring": the candidates' blocks travel from rank
to rank instead, with their column statistics and gradients, so that no rank ever holds more than two blocks.

Convention: each rank returns its part of the global loss (mean or sum) times the number of ranks. Averaging the ranks' gradients, as data parallel training does, then
gives exactly the gradient of the global loss, also where batches differ in size; for equal ones a rank returns the mean over its own rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import _contrastive as contrastive
from ._registration import tie_to


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
    exchange: str,
) -> Any:
    options = (label_smoothing, *contrastive.parts_of(direction), eps)
    function = _Gathered if exchange == "gather" else _Ring
    loss, weight, right = function.apply(name, group, gather_grad, options, target, present, scale, bias, anchor, *others)
    result = loss if reduction == "none" else dist.get_world_size(group) * contrastive.total(loss) if reduction == "sum" else contrastive.total(loss * weight)
    return (result, right) if return_accuracy else result


def tied(anchor: Tensor, sources: list[Tensor]) -> Tensor:
    """Where a second derivative may be asked for: the raw backward refuses it by name, for which its arguments must be known to depend on all inputs."""
    return tie_to(anchor, sources) if torch.is_grad_enabled() else anchor


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


def send_to_owners(parts: list[Tensor], rows: int, group: Any) -> list[Tensor]:
    """parts[r] goes to rank r; what comes back is the part of `rows` rows that every rank had for this one."""
    rank = dist.get_rank(group)
    outgoing = [part.contiguous() for part in parts]
    incoming = [part.new_empty(rows, *part.shape[1:]) for part in parts]
    if dist.get_backend(group) == "gloo":  # has no all_to_all of lists
        requests = []
        for other in range(len(parts)):
            if other == rank:
                incoming[rank] = outgoing[rank]
                continue
            requests.append(dist.isend(outgoing[other], group=group, group_dst=other))
            requests.append(dist.irecv(incoming[other], group=group, group_src=other))
        for request in requests:
            request.wait()
    else:
        dist.all_to_all(incoming, outgoing, group=group)
    return incoming


def reduce_scatter(tensor: Tensor, sizes: list[int], group: Any) -> Tensor:
    """This rank's rows of the sum over ranks, added in the order of the ranks."""
    total, *parts = send_to_owners(list(torch.split(tensor, sizes)), sizes[dist.get_rank(group)], group)
    for part in parts:
        total = total + part
    return total


def log_sum_exp(partial: Tensor, group: Any) -> Tensor:
    """log of the sum over ranks of exp(partial); -inf where every rank has it."""
    top = partial.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    offset = torch.where(top == -torch.inf, 0, top)
    total = (partial - offset).exp()
    dist.all_reduce(total, group=group)
    return offset + total.log()


def whole_classes(classes: Tensor, counts: Tensor, column_lse: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The classes of the whole problem; the center as csrc/ops/contrastive_loss.h has it, the same on every rank."""
    shift = counts[0].log() if bias is None else counts[0].log() + bias
    there = column_lse != -torch.inf
    center = contrastive.total(torch.where(there, (column_lse - shift) / scale, 0)) / classes[0]
    return torch.cat([classes[:1], counts, torch.where(center.isfinite(), center, 0).to(classes.dtype)[None]])


def loss_of_statistics(
    options: tuple[float, ...], target: Tensor, labelled: Tensor, label: Tensor, row_lse: Tensor, row_sum: Tensor, column_lse: Tensor, column_sum: Tensor, classes: Tensor
) -> Tensor:
    """The softmax loss of each row from the statistics of the whole problem, as csrc/ops/contrastive_loss.h has it; 0 without a label."""
    smoothing, row_part, column_part, _ = options
    if not len(column_lse):
        return torch.zeros_like(label)
    at, kept = torch.where(labelled, target, 0), (1 - smoothing) * label
    row_loss, column_loss = row_lse - kept, column_lse[at] - kept
    if smoothing:
        row_loss, column_loss = row_loss - smoothing * row_sum / classes[0], column_loss - smoothing * column_sum[at] / classes[1]
    return torch.where(labelled, row_part * row_loss + column_part * column_loss, 0).to(label.dtype)


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
            anchor, everyone, scale, bias, target, everyones_present, *options, 0
        )[:11]
        counts = classes[1:3].clone()
        dist.all_reduce(counts, group=group)
        labelled = row_best >= 0
        if name == "siglip_loss":
            column_lse_everywhere, classes = column_lse, torch.cat([classes[:1], counts, classes[3:]])
            weight = world / counts[0].clamp(min=1)
        else:
            column_lse_everywhere = log_sum_exp(column_lse, group)
            classes = whole_classes(classes, counts, column_lse_everywhere, scale, bias)
            dist.all_reduce(column_sum, group=group)
            loss = loss_of_statistics(options, target, labelled, label, row_lse, row_sum, column_lse_everywhere, column_sum, classes)
            weight = world / counts[1].clamp(min=1)
        ctx.name, ctx.group, ctx.gather_grad, ctx.options, ctx.sizes, ctx.m = name, group, gather_grad, options, sizes, len(others)
        ctx.has_bias, ctx.has_present = bias is not None, present is not None
        optional = [tensor for tensor in (bias, everyones_present) if tensor is not None]
        ctx.save_for_backward(row_lse, column_lse_everywhere, classes, basis, factor, labelled, target, scale, anchor, *everyone, *optional, *others)
        right = _accuracy(row_best, column_best, column_lse, target, group)
        ctx.mark_non_differentiable(weight, right)
        return loss, weight, right

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        row_lse, column_lse, classes, basis, factor, labelled, target, scale, anchor, *rest = ctx.saved_tensors
        everyone, optional = rest[: ctx.m], iter(rest[ctx.m :])
        anchor = tied(anchor, [*rest[-ctx.m :], scale.reshape(1)])
        bias = next(optional) if ctx.has_bias else None
        present = next(optional) if ctx.has_present else None
        row_weight = grad.contiguous() if ctx.name == "siglip_loss" else torch.where(labelled, grad, 0)
        column_weight = contrastive.column_weights(row_weight, target, everyone[0].shape[0])
        dist.all_reduce(column_weight.detach(), group=ctx.group)
        need_scale, need_bias, need_anchor, *need_others = ctx.needs_input_grad[6:]

        def run(row_part: float, column_part: float, anchors: bool, candidates: bool) -> tuple[Tensor, Tensor, Tensor]:
            smoothing, _, _, eps = ctx.options
            return getattr(torch.ops.modalign, ctx.name + "_bwd")(
                row_weight, column_weight, row_lse, column_lse, classes, basis, factor, scale.new_empty(0), anchor, everyone, scale, bias, target, present,
                smoothing, row_part, column_part, eps, anchors, candidates,
            )  # fmt: skip

        _, row_part, column_part, _ = ctx.options
        if ctx.gather_grad == "full":
            grad_anchor, grad_others, grad_scale = run(row_part, column_part, need_anchor, any(need_others))
            if any(need_others):
                grad_others = tie_to(reduce_scatter(grad_others.detach(), ctx.sizes, ctx.group), [grad_others.flatten()])
        else:  # each direction sends gradient to the side that was not gathered alone
            grad_anchor, _, from_rows = run(row_part, 0.0, need_anchor, False)
            _, grad_others, from_columns = run(0.0, column_part, False, any(need_others))
            grad_scale = from_rows + from_columns
            if any(need_others):
                grad_others = tie_to(reduce_scatter(grad_others.detach(), ctx.sizes, ctx.group), [grad_others.flatten()])
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


# --------------------------------------------------------------------------------------------------------------------------------------------- ring


class Block:
    """What belongs to the candidates of one rank, on its way round the ring: tensors that travel together."""

    def __init__(self, tensors: list[Tensor], sizes: list[int], group: Any, tag: int = 0) -> None:
        self.tensors, self.sizes, self.group, self.tag = [tensor.contiguous() for tensor in tensors], sizes, group, tag
        self.rank, self.world = dist.get_rank(group), len(sizes)
        self.owner = self.rank

    def begin_step(self) -> None:
        """Begin to send this block to the next rank and to receive the one before. The tensors may be read until the step ends."""
        size = self.sizes[(self.owner - 1) % self.world]
        self.incoming = [tensor.new_empty(size, *tensor.shape[1:]) for tensor in self.tensors]
        if self.world == 1:
            self.incoming, self.requests = self.tensors, []
            return
        before, after = (self.rank - 1) % self.world, (self.rank + 1) % self.world
        sent = [dist.P2POp(dist.isend, tensor, group=self.group, group_peer=after, tag=self.tag + n) for n, tensor in enumerate(self.tensors)]
        received = [dist.P2POp(dist.irecv, tensor, group=self.group, group_peer=before, tag=self.tag + n) for n, tensor in enumerate(self.incoming)]
        self.requests = dist.batch_isend_irecv(sent + received)

    def end_step(self) -> None:
        for request in self.requests:
            request.wait()
        self.tensors, self.owner = self.incoming, (self.owner - 1) % self.world


def _candidates(others: Sequence[Tensor], present: Tensor | None, sizes: list[int], group: Any) -> Block:
    return Block([*others] + ([] if present is None else [present.to(torch.uint8)]), sizes, group)


def checked_target(name: str, target: Tensor, total: int) -> Tensor:
    """As the raw op checks it for a single process: values on the CPU alone."""
    wrong = (target >= total) | ((target < -1) & (target != contrastive.IGNORED))
    if target.device.type == "cpu" and wrong.any():
        row = int(wrong.nonzero()[0, 0])
        raise RuntimeError(f"{name}: target must hold indices from 0 to C - 1 = {total - 1}, -1 or -100, got {int(target[row])} at row {row}")
    return target


def _within(target: Tensor, start: int, size: int) -> Tensor:
    """Global targets as targets of a block: -1 where they lie in another."""
    inside = (target >= start) & (target < start + size)
    return torch.where(inside, target - start, torch.where(target == contrastive.IGNORED, target, -1))


def _basis(name: str, anchor: Tensor, others: list[Tensor], present: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The factors of a block of candidates: those of the pair op on no rows."""
    none = anchor[None, :0]
    if name == "gram_contrastive_loss":
        _, basis, factor = torch.ops.modalign.gram_volume(none, [other[None] for other in others], None if present is None else present[None], False, eps)
    elif name == "triangle_contrastive_loss":
        _, basis, factor = torch.ops.modalign.triangle_area(none, *(other[None] for other in others), False, eps)
    else:
        real = contrastive.accumulation_dtype(anchor.dtype)
        return anchor.new_empty((0, 1, anchor.shape[1]), dtype=real), anchor.new_empty((0, 1), dtype=real)
    return basis[0], factor[0].flatten(1)


class _Ring(torch.autograd.Function):
    """As `_Gathered`, one block of candidates at a time; what every rank holds of all candidates is C numbers."""

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
        world, rank, m = dist.get_world_size(group), dist.get_rank(group), len(others)
        sizes = gather_sizes(others[0].shape[0], anchor, group)
        starts = [sum(sizes[:owner]) for owner in range(world)]
        if target is None:
            target = torch.arange(anchor.shape[0], device=anchor.device) + starts[rank]
        target = checked_target(name, target, sum(sizes))
        sigmoid = name == "siglip_loss"
        statistics = scale.new_zeros(sizes[rank], 2, dtype=torch.float64)  # of the block's columns: log-sum-exp, sum
        statistics[:, 0] = -torch.inf
        block, carried = _candidates(others, present, sizes, group), Block([statistics], sizes, group, tag=m + 1)
        for hop in range(world):
            candidates, mask = block.tensors[:m], block.tensors[m].bool() if present is not None else None
            local = _within(target, starts[block.owner], sizes[block.owner])
            if hop + 1 < world:  # the next block arrives while this one is worked on
                block.begin_step()
            found = getattr(torch.ops.modalign, name)(anchor, candidates, scale, bias, local, mask, *options, 0)
            block_loss, block_row_lse, block_column_lse, block_row_sum, block_column_sum, block_label, block_best, _, block_classes, *_ = found
            here = block_best >= 0
            if hop == 0:
                loss, row_lse, row_sum, label, labelled, classes = block_loss, block_row_lse, block_row_sum, block_label, here, block_classes
            else:
                loss, row_lse, row_sum = loss + block_loss, torch.logaddexp(row_lse, block_row_lse), row_sum + block_row_sum
                label, labelled = torch.where(here, block_label, label), labelled | here
                classes = torch.stack([classes[0] + block_classes[0], classes[1], classes[2] + block_classes[2], classes[3]])
            (statistics,) = carried.tensors
            carried.tensors = [torch.stack([torch.logaddexp(statistics[:, 0], block_column_lse), statistics[:, 1] + block_column_sum], 1)]
            carried.begin_step()
            carried.end_step()
            if hop + 1 < world:
                block.end_step()
        column_lse, column_sum = all_gather(carried.tensors[0], sizes, group).unbind(1)
        if sigmoid:  # participation is all that a column's log-sum-exp says
            column_lse = torch.where(column_lse == -torch.inf, column_lse, 0)
            row_lse = torch.where(row_lse == -torch.inf, row_lse, 0)
        counts = classes[1:3].clone()
        dist.all_reduce(counts, group=group)
        classes = torch.cat([classes[:1], counts, classes[3:]]) if sigmoid else whole_classes(classes, counts, column_lse, scale, bias)
        if not sigmoid:
            loss = loss_of_statistics(options, target, labelled, label, row_lse, row_sum, column_lse, column_sum, classes)
        weight = world / counts[0 if sigmoid else 1].clamp(min=1)
        right = counts.new_full((2,), torch.nan, dtype=torch.float32)
        ctx.name, ctx.group, ctx.gather_grad, ctx.options, ctx.sizes, ctx.starts, ctx.m = name, group, gather_grad, options, sizes, starts, m
        ctx.has_bias, ctx.has_present = bias is not None, present is not None
        optional = [tensor for tensor in (bias, present) if tensor is not None]
        ctx.save_for_backward(row_lse, column_lse, classes, labelled, target, scale, anchor, *others, *optional)
        ctx.mark_non_differentiable(weight, right)
        return loss, weight, right

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        row_lse, column_lse, classes, labelled, target, scale, anchor, *rest = ctx.saved_tensors
        others, optional = rest[: ctx.m], iter(rest[ctx.m :])
        anchor = tied(anchor, [*others, scale.reshape(1)])
        bias = next(optional) if ctx.has_bias else None
        present = next(optional) if ctx.has_present else None
        row_weight = grad.contiguous() if ctx.name == "siglip_loss" else torch.where(labelled, grad, 0)
        column_weight = contrastive.column_weights(row_weight, target, column_lse.shape[0])
        dist.all_reduce(column_weight.detach(), group=ctx.group)
        need_scale, need_bias, need_anchor, *need_others = ctx.needs_input_grad[6:]
        smoothing, row_part, column_part, eps = ctx.options
        local = ctx.gather_grad == "local"
        passes = [(row_part, 0.0, need_anchor, False), (0.0, column_part, False, any(need_others))] if local else [(row_part, column_part, need_anchor, any(need_others))]
        real = contrastive.accumulation_dtype(anchor.dtype)
        grad_anchor = anchor.new_zeros(anchor.shape, dtype=real)
        grad_scale = scale.new_zeros(2)
        gathered = anchor.new_zeros((others[0].shape[0], ctx.m, anchor.shape[1]), dtype=real)
        block, carried = _candidates(others, present, ctx.sizes, ctx.group), Block([gathered], ctx.sizes, ctx.group, tag=ctx.m + 1)
        for hop in range(len(ctx.sizes)):
            candidates, mask = block.tensors[: ctx.m], block.tensors[ctx.m].bool() if present is not None else None
            start, size = ctx.starts[block.owner], ctx.sizes[block.owner]
            if hop + 1 < len(ctx.sizes):
                block.begin_step()
            columns = slice(start, start + size)
            basis, factor = _basis(ctx.name, anchor, candidates, mask, eps)
            for row_share, column_share, anchors, others_too in passes:
                from_anchor, from_others, from_scale = getattr(torch.ops.modalign, ctx.name + "_bwd")(
                    row_weight, column_weight[columns].contiguous(), row_lse, column_lse[columns].contiguous(), classes, basis, factor, scale.new_empty(0), anchor, candidates,
                    scale, bias, _within(target, start, size), mask, smoothing, row_share, column_share, eps, anchors, others_too,
                )  # fmt: skip
                grad_scale = grad_scale + from_scale
                if anchors:
                    grad_anchor = grad_anchor + from_anchor
                if others_too:
                    carried.tensors = [carried.tensors[0] + from_others.detach()]
            if any(need_others):
                carried.begin_step()
                carried.end_step()
            if hop + 1 < len(ctx.sizes):
                block.end_step()
        grad_others = tie_to(carried.tensors[0].to(anchor.dtype), [grad_scale])  # home again
        return (
            *[None] * 6,
            grad_scale[0] if need_scale else None,
            grad_scale[1] if need_bias else None,
            grad_anchor.to(anchor.dtype) if need_anchor else None,
            *(grad_others[:, p] if need else None for p, need in enumerate(need_others)),
        )
