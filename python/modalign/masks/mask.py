"""Masks as expressions, and what they are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ._trees import register_tree
from ._values import are_there
from .rules import NAMES, Rule, checked_rule, whole_number
from .tokens import FIELDS, TYPES, Tokens

__all__ = ["Mask", "blocks", "causal", "from_dense", "full", "intervals", "key_dropout", "relation"]

RELATION, INTERVAL, TILES, DENSE, BOTH, EITHER, INVERSE = range(7)  # kinds of steps, csrc/ops/attention_mask.h
RULE_NUMBERS, STEP = 16, 4  # numbers of a coded rule, of a step
MOST_STEPS = 16  # csrc/ops/attention_mask.h


@dataclass(frozen=True, eq=False)
class Mask:
    """Which of `keys` keys each of `queries` queries keeps: at most 16 terms and signs. A pytree; tensors are its leaves."""

    queries: int
    keys: int
    tensors: tuple[Tensor, ...]
    steps: tuple[int, ...]  # four numbers each: kind, first tensor, rows and columns of tiles

    def __and__(self, other: Mask) -> Mask:
        return self._with(other, BOTH, "&")

    def __or__(self, other: Mask) -> Mask:
        return self._with(other, EITHER, "|")

    def __invert__(self) -> Mask:
        return self._counted("~", replace(self, steps=(*self.steps, INVERSE, 0, 0, 0)))

    def _with(self, other: object, kind: int, sign: str) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        if (self.queries, self.keys) != (other.queries, other.keys):
            raise ValueError(f"{sign}: masks must have the same queries and keys, got {self.queries} x {self.keys} and {other.queries} x {other.keys}")
        steps = list(other.steps)
        steps[1::STEP] = [at + len(self.tensors) for at in steps[1::STEP]]
        return self._counted(sign, replace(self, tensors=(*self.tensors, *other.tensors), steps=(*self.steps, *steps, kind, 0, 0, 0)))

    @staticmethod
    def _counted(sign: str, mask: Mask) -> Mask:
        if len(mask.steps) > MOST_STEPS * STEP:
            raise ValueError(f"{sign}: masks must have at most {MOST_STEPS} steps, terms and signs, got {len(mask.steps) // STEP}")
        return mask

    def to(self, device: Any) -> Mask:
        return replace(self, tensors=tuple(each.to(device) for each in self.tensors))

    def dense(self, rows: Tensor | None = None) -> Tensor:
        """bool [B or 1, H or 1, queries, keys]: as much memory as it says. `rows` int64 [R]: of these queries alone, [B or 1, H or 1, R, keys]."""
        stack: list[Tensor] = []
        for kind, first, height, width in zip(*(self.steps[n::STEP] for n in range(STEP)), strict=True):
            if kind in (BOTH, EITHER):
                one, other = _of_equal_heads(*stack[-2:])
                stack[-2:] = [one & other if kind == BOTH else one | other]
            elif kind == INVERSE:
                stack[-1] = ~stack[-1]
            else:
                pairs = self.tensors[first]
                row = torch.arange(self.queries, device=pairs.device) if rows is None else rows
                if kind == RELATION:
                    stack.append(_dense_relation(pairs[:, :, row], *self.tensors[first + 1 : first + 4]))
                elif kind == INTERVAL:
                    low, high = pairs.unbind(-1)
                    stack.append((low[:, :, None] <= row[:, None]) & (row[:, None] < high[:, :, None]))
                elif kind == TILES:
                    stack.append(pairs[:, :, row // height].repeat_interleave(width, 3)[..., : self.keys])
                else:
                    pairs = pairs.expand(*pairs.shape[:2], self.queries, self.keys)
                    stack.append(pairs if rows is None else pairs[:, :, rows])
        return stack[0]

    def rows(self, start: int, stop: int) -> Mask:
        """The mask of the queries from `start` to `stop` - 1 alone, as decoding and chunks need it."""
        if not 0 <= start <= stop <= self.queries:
            raise ValueError(f"rows: start and stop must rise from 0 to {self.queries}, got {start} and {stop}")
        made = list(self.tensors)
        steps = list(self.steps)
        for at in range(0, len(steps), STEP):
            kind, first = steps[at : at + 2]
            if kind == RELATION:
                made[first] = made[first][:, :, start:stop].contiguous()
            elif kind == INTERVAL:
                made[first] = (made[first] - start).clamp(0, stop - start)
            elif kind == DENSE and made[first].shape[2] != 1:
                made[first] = made[first][:, :, start:stop]
            elif kind == TILES:
                chosen = torch.arange(start, stop, device=made[first].device) // steps[at + 2]
                made[first], steps[at + 2] = made[first][:, :, chosen], 1
        return replace(self, queries=stop - start, tensors=tuple(made), steps=tuple(steps))

    def columns(self, start: int, stop: int) -> Mask:
        """The mask of the keys from `start` to `stop` - 1 alone, as a cache that is still growing needs it."""
        if not 0 <= start <= stop <= self.keys:
            raise ValueError(f"columns: start and stop must rise from 0 to {self.keys}, got {start} and {stop}")
        made = list(self.tensors)
        steps = list(self.steps)
        for at in range(0, len(steps), STEP):
            kind, first = steps[at : at + 2]
            if kind == RELATION:
                made[first + 1] = made[first + 1][:, :, start:stop].contiguous()
            elif kind == INTERVAL:
                made[first] = made[first][:, :, start:stop].contiguous()
            elif kind == DENSE and made[first].shape[3] != 1:
                made[first] = made[first][..., start:stop]
            elif kind == TILES:
                chosen = torch.arange(start, stop, device=made[first].device) // steps[at + 3]
                made[first], steps[at + 3] = made[first][..., chosen], 1
        return replace(self, keys=stop - start, tensors=tuple(made), steps=tuple(steps))

    def kept(self) -> float:
        """The share of pairs that is kept, over items and heads; rows are looked at in blocks."""
        if self.queries * self.keys == 0:
            return 0.0
        step = max(1, (1 << 24) // self.keys)
        parts = [self.rows(start, min(start + step, self.queries)).dense() for start in range(0, self.queries, step)]
        return float(sum(part.double().mean((0, 1)).sum() for part in parts)) / (self.queries * self.keys)

    def plot(self, axes: Any = None, *, item: int = 0, head: int = 0) -> Any:
        """Draws the pairs of one item and head with matplotlib, queries from top to bottom; returns the axes. (`modalign mask show RULE` draws in the terminal.)"""
        from matplotlib import pyplot

        if axes is None:
            _, axes = pyplot.subplots()
        kept = self.dense()
        axes.imshow(kept[item if kept.shape[0] > 1 else 0, head if kept.shape[1] > 1 else 0].cpu(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axes.set(xlabel="key", ylabel="query")
        return axes

    def sparsity(self) -> float:
        """The share of pairs that is not kept."""
        return 1 - self.kept()

    def flops(self, heads: int, D: int, Dv: int | None = None, *, batch: int = 1) -> float:
        """Of the forward products with the kept pairs, 2 (D + Dv) each."""
        return 2 * (D + (D if Dv is None else Dv)) * self.kept() * self.queries * self.keys * heads * batch


register_tree(Mask, ("tensors",), ("queries", "keys", "steps"))


def _of_equal_heads(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Heads in turn share a mask that has fewer."""
    heads = math.lcm(one.shape[1], other.shape[1])
    return tuple(each if each.shape[1] in (1, heads) else each.repeat_interleave(heads // each.shape[1], 1) for each in (one, other))  # type: ignore[return-value]


def _dense_relation(query: Tensor, key: Tensor, table: Tensor, rules: Tensor) -> Tensor:
    """Every rule on every pair, and the table says which one counts."""
    q = {name: query[:, None, n, :, None] for n, name in enumerate(FIELDS)}
    k = {name: key[:, None, n, None, :] for n, name in enumerate(FIELDS)}
    number = table[:, q["type"].long(), k["type"].long()][:, :, 0].movedim(0, 1)  # [B, H, Nq, Nk]
    keep = torch.zeros_like(number, dtype=torch.bool)
    for n, (rule, *p) in enumerate(rules.tolist()):
        keep = keep | ((number == n) & _holds(NAMES[rule], p, q, k))
    return keep & (q["valid"] == 1) & (k["valid"] == 1) & (q["document"] == k["document"])


def _holds(name: str, p: list[int], q: dict[str, Tensor], k: dict[str, Tensor]) -> Tensor:
    causal, apart = k["index"] <= q["index"], {field: (k[field] - q[field]).abs() for field in "tyx"}
    same = (k["segment"] == q["segment"]) & (q["segment"] >= 0)
    if name in ("never", "always"):
        return torch.full_like(causal, name == "always")
    if name == "grid_shift":
        return same & _in_neighborhood(q["t"], k["t"], p) & _in_neighborhood(q["y"], k["y"], p[5:]) & _in_neighborhood(q["x"], k["x"], p[10:])
    return {
        "causal": causal,
        "self": k["index"] == q["index"],
        "same_segment": same,
        "causal_or_same_segment": causal | same,
        "causal_window": causal & (q["index"] - k["index"] < p[0]),
        "band": (k["index"] - q["index"] >= -p[0]) & (k["index"] - q["index"] <= p[1]),
        "grid_clip": same & (apart["t"] <= p[0]) & (apart["y"] <= p[1]) & (apart["x"] <= p[2]),
        "last_segment": (k["segment"] == q["last"]) & (q["last"] >= 0),
        "up_to_last_segment": (k["segment"] >= 0) & (k["segment"] <= q["last"]),
        "same_time": same & (apart["t"] == 0),
        "time_stride": same & (k["t"] % max(1, p[0]) == q["t"] % max(1, p[0])),
        "same_site": same & (apart["y"] == 0) & (apart["x"] == 0),
        "causal_not_same_segment": causal & ~same,
    }[name]


def _in_neighborhood(q: Tensor, k: Tensor, p: list[int]) -> Tensor:
    size, kernel, dilation, stride, is_causal = p[:5]
    residue = q % dilation
    last = (size - residue + dilation - 1) // dilation - 1  # of the tokens with the query's residue
    i, j = q // dilation, k // dilation
    if is_causal:
        center = torch.minimum(i // stride * stride + stride - 1, last)
        return (k % dilation == residue) & (j <= i) & (j > center - kernel)
    left = kernel // 2
    center = torch.minimum(i // stride * stride + stride // 2, last)
    first = (center - left).clamp(min=0)
    over = (center + kernel - left - 1 - last).clamp(min=0)
    return (k % dilation == residue) & (j >= first - over) & (j < first - over + kernel)


# ---------------------------------------------------------------------------------------------------------------------------------------- constructors


def relation(table: Mapping[tuple[Any, Any], Any] | Sequence[Mapping[tuple[Any, Any], Any]], queries: Tokens, keys: Tokens | None = None) -> Mask:
    """Keeps what a table says about the types of query and key, between tokens of the same document that are not padding.

    `table`: (type of the query, type of the key) -> rule; a pair of types that is not there keeps nothing. Types are numbers or names of the tokens' types, rules names or `Rule`. A
    sequence of tables: one for each head, or for each group of neighbouring heads. `keys`: where they are other tokens than the queries.

    >>> from modalign.masks import layout
    >>> tokens = layout([("visual", (1, 3)), ("question", 2)])
    >>> relation({("question", "visual"): "always", ("question", "question"): "causal"}, tokens).dense()[0, 0].int().tolist()
    [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    """
    keys = queries if keys is None else keys
    for name, value in (("queries", queries), ("keys", keys)):
        if not isinstance(value, Tokens):
            raise TypeError(f"relation: {name} must be Tokens, got {type(value).__name__}")
    if queries.fields.shape[0] != keys.fields.shape[0] and 1 not in (queries.fields.shape[0], keys.fields.shape[0]):
        raise ValueError(f"relation: queries and keys must be of as many items, or of one, got {queries.fields.shape[0]} and {keys.fields.shape[0]}")
    tables = [table] if isinstance(table, Mapping) else list(table)
    rules: list[Rule] = [Rule("never")]
    numbers = torch.zeros(len(tables), TYPES, TYPES, dtype=torch.int32)
    for head, each in enumerate(tables):
        for (of_query, of_key), given in each.items():
            rule = checked_rule(given)
            if rule not in rules:
                rules.append(rule)
            numbers[head, _type(of_query, queries), _type(of_key, keys)] = rules.index(rule)
    coded = torch.zeros(len(rules), RULE_NUMBERS, dtype=torch.int32)
    for n, rule in enumerate(rules):
        coded[n, 0] = NAMES.index(rule.name)
        coded[n, 1 : 1 + len(rule.numbers)] = torch.tensor(rule.numbers, dtype=torch.int32)
    device = queries.fields.device
    return Mask(len(queries), len(keys), (queries.fields, keys.fields, numbers.to(device), coded.to(device)), (RELATION, 0, 0, 0))


def _type(given: object, of: Tokens) -> int:
    number = of.names.index(given) if given in of.names else given
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < TYPES:
        raise ValueError(f"relation: table must have types from 0 to {TYPES - 1} or of {', '.join(of.names) or 'none'}, got {given!r}")
    return number


def full(queries: int, keys: int | None = None, *, device: Any = None) -> Mask:
    """Keeps everything."""
    return from_dense(torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device), queries, queries if keys is None else keys)


def causal(queries: int, keys: int | None = None, *, align: str = "bottom_right", window: int | None = None, device: Any = None) -> Mask:
    """Keys up to the query ("top_left"), or up to query + keys - queries ("bottom_right"); of these the last `window`."""
    keys = queries if keys is None else keys
    if align not in ("bottom_right", "top_left"):
        raise ValueError(f'causal: align must be "bottom_right" or "top_left", got {align!r}')
    first = torch.arange(keys, dtype=torch.int32, device=device) - (keys - queries if align == "bottom_right" else 0)
    end = torch.full_like(first, queries) if window is None else (first + whole_number("causal", "window", window, 1)).clamp(0, queries)
    return intervals(torch.stack([first.clamp(0, queries).minimum(end), end], -1), queries)


def intervals(keep: Tensor, queries: int) -> Mask:
    """Key j is kept for the queries from keep[..., j, 0] to keep[..., j, 1] - 1. int32 [Nk, 2], [H, Nk, 2] or [B, H, Nk, 2]."""
    if not isinstance(keep, Tensor) or keep.is_floating_point() or keep.dim() not in (2, 3, 4) or keep.shape[-1] != 2:
        raise ValueError(f"intervals: keep must be whole numbers [Nk, 2], [H, Nk, 2] or [B, H, Nk, 2], got {getattr(keep, 'shape', keep)}")
    if are_there(keep) and bool(((keep[..., 0] > keep[..., 1]) | (keep < 0).any(-1) | (keep > queries).any(-1)).any()):
        raise ValueError(f"intervals: keep must hold 0 <= first <= end <= queries = {queries}, got another")
    four = keep[(None,) * (4 - keep.dim())].to(torch.int32).contiguous()
    return Mask(queries, keep.shape[-2], (four,), (INTERVAL, 0, 0, 0))


def blocks(keep: Tensor, size: int | tuple[int, int], queries: int, keys: int | None = None) -> Mask:
    """Tiles of `size` (rows, columns) pairs, kept or not. bool [rows, columns], [H, ...] or [B, H, ...] of tiles."""
    keys = queries if keys is None else keys
    rows, columns = (size, size) if isinstance(size, int) else size
    whole_number("blocks", "size", rows, 1), whole_number("blocks", "size", columns, 1)
    if not isinstance(keep, Tensor) or keep.dtype is not torch.bool or keep.dim() not in (2, 3, 4) or keep.shape[-2:] != (-(-queries // rows), -(-keys // columns)):
        raise ValueError(f"blocks: keep must be a bool tensor [..., {-(-queries // rows)}, {-(-keys // columns)}], got {getattr(keep, 'shape', keep)}")
    return Mask(queries, keys, (keep[(None,) * (4 - keep.dim())],), (TILES, 0, rows, columns))


def from_dense(keep: Tensor, queries: int | None = None, keys: int | None = None) -> Mask:
    """A bool tensor that broadcasts to [B, H, queries, keys], True where a pair is kept."""
    if not isinstance(keep, Tensor) or keep.dtype is not torch.bool or keep.dim() > 4:
        raise TypeError(f"from_dense: keep must be a bool tensor of at most 4 dimensions, got {getattr(keep, 'dtype', type(keep).__name__)}")
    four = keep[(None,) * (4 - keep.dim())]
    queries, keys = (four.shape[2] if queries is None else queries), (four.shape[3] if keys is None else keys)
    if four.shape[2] not in (1, queries) or four.shape[3] not in (1, keys):
        raise ValueError(f"from_dense: keep must broadcast to [..., {queries}, {keys}], got {list(keep.shape)}")
    return Mask(queries, keys, (four,), (DENSE, 0, 0, 0))


def key_dropout(queries: int, keys: int, p: float, *, batch: int = 1, heads: int = 1, generator: torch.Generator | None = None, device: Any = None) -> Mask:
    """Every key is left out with probability `p`, for all queries. Drawn once: pass the mask to every layer."""
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p <= 1:
        raise ValueError(f"key_dropout: p must be from 0 to 1, got {p!r}")
    return from_dense(torch.rand(batch, heads, 1, keys, generator=generator, device=device) >= p, queries, keys)
