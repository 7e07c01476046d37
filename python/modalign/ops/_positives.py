"""Several positives for clip_loss and siglip_loss: a row and a candidate of equal id belong together. No list of pairs and no B x C mask is needed, as the logits are
linear in y: their sum over the positives of a row is that row times the sum of these candidates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _arguments as arguments
from . import _contrastive as contrastive
from ._registration import call, register_pair
from .pairwise_logsumexp import contrastive_devices, log_sum_exps

NOBODY = -1  # an id that is equal to no other

Ids = tuple[Tensor, Tensor]  # of rows and of candidates


def check_positive_ids(op: str, ids: object, target: object, x: Tensor, y: Tensor) -> Ids | None:
    if ids is None:
        return None
    if target is not None:
        raise ValueError(f"{op}: positive_ids must be None together with target, got {arguments.describe(ids)}")
    both = (ids, ids) if isinstance(ids, Tensor) else ids
    if not (isinstance(both, (tuple, list)) and len(both) == 2 and all(isinstance(each, Tensor) and each.dtype is torch.int64 for each in both)):
        raise TypeError(f"{op}: positive_ids must be None, an int64 tensor [B], or two of them, [B] and [C], got {arguments.describe(ids)}")
    for each, letter, side in zip(both, "BC", (x, y), strict=True):
        if each.device != x.device:
            raise ValueError(f"{op}: positive_ids must be on the device of the other arguments, {x.device}, got {each.device}")
        if tuple(each.shape) != side.shape[:1]:
            raise ValueError(f"{op}: positive_ids must have shape [{letter}] = [{side.shape[0]}] for {'x' if side is x else 'y'}, got {arguments.describe(each)}")
    return both[0], both[1]


def check_without(op: str, **others: object) -> None:
    """Options that cannot go with positive_ids: None, False or "auto" is as good as not given."""
    for name, value in others.items():
        if value not in (None, False, "auto"):
            raise ValueError(f"{op}: {name} must be left out together with positive_ids, got {arguments.describe(value)}")


def take_part(ids: Tensor) -> Tensor:
    return ids != contrastive.IGNORED


def mean_positive(x: Tensor, y: Tensor, ids: Ids, scale: Tensor, bias: Tensor | None, label_smoothing: float = 0) -> tuple[Tensor, Tensor]:
    """For every row of x the mean logit of its positives in float64, a share of it spread over all candidates, and how many positives there are."""
    sums, count = call("sum_of_equal_ids", y, ids[1], ids[0])
    wanted = sums / count.clamp(min=1)[:, None]
    if label_smoothing:
        everyone, number = call("sum_of_equal_ids", y, torch.where(take_part(ids[1]), 0, NOBODY), ids[1].new_zeros(1))
        wanted = (1 - label_smoothing) * wanted + label_smoothing * everyone / number.clamp(min=1)
    logit = scale * (x * wanted).sum(1, dtype=torch.float64)
    return logit if bias is None else logit + bias, count


def softmax_loss(x: Tensor, y: Tensor, ids: Ids, scale: Tensor, bias: Tensor | None, label_smoothing: float, direction: str, reduction: str) -> Tensor:
    """Cross entropies of rows and columns with the positives as equal shares of the label, each side reduced over those that have any."""
    log_sums = log_sum_exps(x, y, scale, bias, take_part(ids[0]), take_part(ids[1]))
    x, y = x.to(scale.dtype), y.to(scale.dtype)
    sides = (log_sums[0], x, y, ids), (log_sums[1], y, x, ids[::-1])
    found = []
    for part, (log_sum, ours, theirs, both) in zip(contrastive.parts_of(direction), sides, strict=True):
        if part:
            logit, count = mean_positive(ours, theirs, both, scale, bias, label_smoothing)
            loss = torch.where(count > 0, log_sum - logit, 0).to(scale.dtype)
            found.append(part * contrastive.reduce(loss, (count > 0).sum(), reduction))
    return sum(found[1:], found[0])


# ------------------------------------------------------------------------------------------------------------------------------ sums over equal ids


def _sums(values: Tensor, value_ids: Tensor, query_ids: Tensor) -> tuple[Tensor, Tensor]:
    """For every query the sum of the values [V, D] with its id, and their number. Added in the order of the values on every device."""
    V = values.shape[0]
    if V == 0:
        return values.new_zeros(query_ids.shape[0], values.shape[1]), values.new_zeros(query_ids.shape[0])
    ids, order = value_ids.sort(stable=True)
    group = torch.cat([ids.new_zeros(1), (ids[1:] != ids[:-1]).long()]).cumsum(0)
    sizes = ids.new_zeros(V).index_add(0, group, torch.ones_like(group))
    sums = torch.segment_reduce(values[order], "sum", lengths=sizes, initial=0, unsafe=True)  # index_add on a GPU adds in any order
    first = torch.searchsorted(ids, query_ids.contiguous()).clamp(max=V - 1)
    there = (ids[first] == query_ids) & (query_ids != NOBODY) & take_part(query_ids)
    mine = group[first]
    return torch.where(there[:, None], sums[mine], 0), torch.where(there, sizes[mine], 0).to(values.dtype)


def _fake(values: Tensor, value_ids: Tensor, query_ids: Tensor) -> tuple[Tensor, Tensor]:
    return values.new_empty(query_ids.shape[0], values.shape[1]), values.new_empty(query_ids.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[1:])


def _backward_of(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    value_ids, query_ids = ctx.saved_tensors
    return call("sum_of_equal_ids_bwd", grad, query_ids, value_ids)[0], None, None  # equality is symmetric: queries and values change places


_library = torch.library.Library("modalign", "FRAGMENT")
for _name in ("sum_of_equal_ids", "sum_of_equal_ids_bwd"):
    _library.define(_name + "(Tensor values, Tensor value_ids, Tensor query_ids) -> (Tensor, Tensor)")
    for _device in contrastive_devices:
        _library.impl(_name, _sums, _device)
register_pair(
    "sum_of_equal_ids",
    op="positive_ids",
    fake=_fake,
    fake_backward=_fake,
    setup_context=_setup_context,
    backward=_backward_of,
    vmap="loop",
)


# ---------------------------------------------------------------------------------------------------------------------------------- plain-torch formulas


def positives_of_logits(logits: Tensor, ids: Ids, *, label_smoothing: float = 0.0, direction: str = "both", reduction: str = "mean") -> Tensor:
    """`softmax_loss` of a matrix of logits."""
    here, inside, equal = _inside(logits, ids)
    found = []
    for part, z, right, rows in zip(contrastive.parts_of(direction), (inside, inside.mT), (equal, equal.mT), here, strict=True):
        count = right.sum(1)
        label = (1 - label_smoothing) * right.to(z) / count.clamp(min=1)[:, None] + label_smoothing / max(z.shape[1], 1)
        loss = torch.where(count > 0, z.logsumexp(1) - (label * z).sum(1), 0)
        if part:
            found.append(part * contrastive.reduce(logits.new_zeros(rows.shape[0]).index_put((rows.nonzero()[:, 0],), loss), (count > 0).sum(), reduction))
    return sum(found[1:], found[0])


def sigmoid_loss_of_logits(logits: Tensor, ids: Ids) -> tuple[Tensor, Tensor]:
    """The loss per row and the number that the mean divides by, as `loss_of_logits` has them for a target."""
    here, inside, equal = _inside(logits, ids)
    loss = (torch.nn.functional.softplus(inside) - torch.where(equal, inside, 0)).sum(1)
    return logits.new_zeros(logits.shape[0]).index_put((here[0].nonzero()[:, 0],), loss), here[0].sum()


def _inside(logits: Tensor, ids: Ids) -> tuple[list[Tensor], Tensor, Tensor]:
    """Which rows and candidates take part, the logits of these, and which of them are positives."""
    here = [take_part(each) for each in ids]
    equal = (ids[0][:, None] == ids[1]) & (ids[0] != NOBODY)[:, None]
    return here, logits[here[0]][:, here[1]], equal[here[0]][:, here[1]]
