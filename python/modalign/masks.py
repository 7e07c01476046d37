"""Which keys a query keeps, described in memory that is linear in queries and keys: masks for `modalign.ops.masked_attention`.

A mask is an expression: relations between tokens, intervals, tiles and matrices, joined by ``&``, ``|`` and ``~``. It is exact, whatever is computed tile by tile; tiles of which it keeps
nothing are skipped.

>>> import torch
>>> tokens = layout([("prefix", 2), ("visual", (2, 2)), ("question", 2)])
>>> image_prefix(tokens).dense()[0, 0].int()
tensor([[1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 1, 1, 1]], dtype=torch.int32)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = [
    "Mask",
    "Rule",
    "Tokens",
    "band",
    "blocks",
    "causal",
    "causal_window",
    "composite",
    "from_dense",
    "full",
    "grid_clip",
    "grid_shift",
    "image_prefix",
    "intervals",
    "key_dropout",
    "layout",
    "modality_mutual",
    "neighbor_window",
    "no_visual_attention",
    "relation",
    "time_stride",
    "tokens",
]

FIELDS = ("index", "type", "segment", "last", "document", "t", "y", "x", "valid")  # in the order of csrc/ops/attention_mask.h
RELATION, INTERVAL, TILES, DENSE, BOTH, EITHER, INVERSE = range(7)
TYPES, RULE_NUMBERS, STEP = 16, 16, 4
TYPE_NAMES = ("prefix", "visual", "question", "answer")  # of `layout`


# ------------------------------------------------------------------------------------------------------------------------------------------------ rules


class Rule(NamedTuple):
    """Whether a key k is kept for a query q, told by their tokens; NAMES lists them. Rules with numbers have functions of their own."""

    name: str
    numbers: tuple[int, ...] = ()


NAMES = (  # in the order of csrc/ops/attention_mask.h
    "never",
    "always",
    "causal",
    "self",
    "same_segment",
    "causal_or_same_segment",
    "causal_window",
    "band",
    "grid_clip",
    "grid_shift",
    "last_segment",
    "up_to_last_segment",
    "same_time",
    "time_stride",
    "same_site",
    "causal_not_same_segment",
)
COUNTS = {"causal_window": 1, "band": 2, "grid_clip": 3, "grid_shift": 15, "time_stride": 1}  # of numbers


def _number(rule: str, name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{rule}: {name} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{rule}: {name} must be {least} or more, got {value}")
    return value


def causal_window(width: int) -> Rule:
    """0 <= q.index - k.index < width"""
    return Rule("causal_window", (_number("causal_window", "width", width, 1),))


def band(left: int, right: int) -> Rule:
    """-left <= k.index - q.index <= right"""
    return Rule("band", (_number("band", "left", left, 0), _number("band", "right", right, 0)))


def grid_clip(t: int, y: int, x: int) -> Rule:
    """The same segment, and at most t, y and x apart on its grid: a window that ends at the border."""
    return Rule("grid_clip", tuple(_number("grid_clip", name, value, 0) for name, value in zip("tyx", (t, y, x), strict=True)))


def time_stride(stride: int) -> Rule:
    """The same segment, and t equal modulo the stride."""
    return Rule("time_stride", (_number("time_stride", "stride", stride, 1),))


def grid_shift(size: Sequence[int], kernel: Sequence[int], *, dilation: Sequence[int] | int = 1, stride: Sequence[int] | int = 1, is_causal: Sequence[bool] | bool = False) -> Rule:
    """Neighbourhood attention on a grid of one to three dimensions (the last ones of t, y, x): windows are shifted at the border, so that every query keeps as many keys."""
    rank = len(size)
    if not 1 <= rank <= 3 or len(kernel) != rank:
        raise ValueError(f"grid_shift: size and kernel must have one to three dimensions, as many each, got {list(size)} and {list(kernel)}")
    wide = [list(each) if isinstance(each, Sequence) else [each] * rank for each in (dilation, stride, is_causal)]
    if any(len(each) != rank for each in wide):
        raise ValueError(f"grid_shift: dilation, stride and is_causal must be one number or {rank}, got {wide}")
    numbers = [1, 1, 1, 1, 0] * (3 - rank)
    for n, k, d, s, c in zip(size, kernel, *wide, strict=True):
        for name, value in (("size", n), ("kernel", k), ("dilation", d), ("stride", s)):
            _number("grid_shift", name, value, 1)
        if k * d > n or s > k:
            raise ValueError(f"grid_shift: kernel * dilation must be at most size and stride at most kernel, got size {n}, kernel {k}, dilation {d}, stride {s}")
        numbers += [n, k, d, s, int(c)]
    return Rule("grid_shift", tuple(numbers))


def _rule(given: object) -> Rule:
    rule = Rule(given) if isinstance(given, str) else given
    if not isinstance(rule, Rule) or rule.name not in NAMES or len(rule.numbers) != COUNTS.get(rule.name, 0):
        raise ValueError(f"relation: table must hold names of rules ({', '.join(NAMES)}) or what causal_window, band, grid_clip, time_stride and grid_shift return, got {given!r}")
    return rule


# ----------------------------------------------------------------------------------------------------------------------------------------------- tokens


@dataclass(frozen=True, eq=False)
class Tokens:
    """What rules ask of the tokens of a batch, as int32 [B or 1, 9, N]; the fields are FIELDS.

    index: position; type: 0 to 15; segment: span such as an image, -1 for none; last: the latest visual span that began at or before the token, -1 for none; document: of a packed
    sequence; t, y, x: place on the grid of the segment; valid: 0 for padding.
    """

    fields: Tensor
    names: tuple[str, ...] = ()  # of the types

    def __getattr__(self, name: str) -> Tensor:
        if name in FIELDS:
            return self.fields[:, FIELDS.index(name)]
        raise AttributeError(name)

    def __len__(self) -> int:
        return self.fields.shape[2]

    def replace(self, **fields: Tensor | int) -> Tokens:
        """The same tokens with other values in some fields."""
        changed = self.fields.clone()
        for name, value in fields.items():
            if name not in FIELDS:
                raise ValueError(f"Tokens.replace: fields must be of {', '.join(FIELDS)}, got {name}")
            changed[:, FIELDS.index(name)] = torch.as_tensor(value, dtype=torch.int32, device=changed.device)
        return replace(self, fields=changed)

    def select(self, start: int, stop: int) -> Tokens:
        return replace(self, fields=self.fields[:, :, start:stop].contiguous())

    def to(self, device: Any) -> Tokens:
        return replace(self, fields=self.fields.to(device))


def tokens(
    type: Tensor | Sequence[int],  # noqa: A002 the field's name
    *,
    index: Any = None,
    segment: Any = -1,
    last: Any = -1,
    document: Any = 0,
    t: Any = 0,
    y: Any = 0,
    x: Any = 0,
    valid: Any = 1,
    names: Sequence[str] = (),
) -> Tokens:
    """Tokens from arrays [N] or [B, N]; numbers stand for all tokens. `index` counts from 0 unless given."""
    types = torch.as_tensor(type)
    if types.is_floating_point() or types.dim() not in (1, 2):
        raise ValueError(f"tokens: type must be whole numbers [N] or [B, N], got {types.dtype} of shape {list(types.shape)}")
    N = types.shape[-1]
    given = dict(index=torch.arange(N) if index is None else index, type=types, segment=segment, last=last, document=document, t=t, y=y, x=x, valid=valid)
    arrays = {}
    for name, value in given.items():
        array = torch.as_tensor(value)
        if array.is_floating_point() or (array.dim() and array.shape[-1] != N):
            raise ValueError(f"tokens: {name} must be whole numbers for {N} tokens, got {array.dtype} of shape {list(array.shape)}")
        arrays[name] = array.to(torch.int32).to(types.device)
    shape = torch.broadcast_shapes((1, N), *(array.shape for array in arrays.values()))
    fields = torch.stack([arrays[name].expand(shape) for name in FIELDS], 1).contiguous()
    low, high = int(types.min()) if types.numel() else 0, int(types.max()) if types.numel() else 0
    if low < 0 or high >= TYPES:
        raise ValueError(f"tokens: type must be from 0 to {TYPES - 1}, got {low if low < 0 else high}")
    return Tokens(fields, tuple(names))


def layout(*sequences: Iterable[tuple[str, Any]], names: Sequence[str] = TYPE_NAMES) -> Tokens:
    """Tokens of sequences that are lists of spans (name of a type, number of tokens or grid); shorter sequences are padded.

    A grid (y, x) or (t, y, x) is a visual span: a segment of its own, with coordinates, and the `last` of what follows.
    """
    rows = []
    for spans in sequences:
        columns: dict[str, list[int]] = {name: [] for name in FIELDS}
        last = -1
        for name, size in spans:
            if name not in names:
                raise ValueError(f"layout: spans must be of {', '.join(names)}, got {name!r}")
            grid = isinstance(size, (tuple, list))
            t, y, x = (1,) * (3 - len(size)) + tuple(size) if grid else (1, 1, _number("layout", "a span", size, 0))
            last += int(grid)
            for n in range(t * y * x):
                place = (n // (y * x), n // x % y, n % x) if grid else (0, 0, 0)
                for field, value in zip(FIELDS, (len(columns["index"]), names.index(name), last if grid else -1, last, 0, *place, 1), strict=True):
                    columns[field].append(value)
        rows.append(columns)
    N = max((len(columns["index"]) for columns in rows), default=0)
    padded = [[columns[name] + ([-1] if name in ("segment", "last") else [0]) * (N - len(columns[name])) for name in FIELDS] for columns in rows]
    return Tokens(torch.tensor(padded, dtype=torch.int32).view(len(rows), len(FIELDS), N), tuple(names))


# ------------------------------------------------------------------------------------------------------------------------------------------------ masks


@dataclass(frozen=True, eq=False)
class Mask:
    """Which of `keys` keys each of `queries` queries keeps. A pytree; tensors are its leaves."""

    queries: int
    keys: int
    tensors: tuple[Tensor, ...]
    steps: tuple[int, ...]  # four numbers each: kind, first tensor, rows and columns of tiles

    def __and__(self, other: Mask) -> Mask:
        return self._with(other, BOTH, "&")

    def __or__(self, other: Mask) -> Mask:
        return self._with(other, EITHER, "|")

    def __invert__(self) -> Mask:
        return replace(self, steps=(*self.steps, INVERSE, 0, 0, 0))

    def _with(self, other: object, kind: int, sign: str) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        if (self.queries, self.keys) != (other.queries, other.keys):
            raise ValueError(f"{sign}: masks must have the same queries and keys, got {self.queries} x {self.keys} and {other.queries} x {other.keys}")
        steps = list(other.steps)
        steps[1::STEP] = [at + len(self.tensors) for at in steps[1::STEP]]
        return replace(self, tensors=(*self.tensors, *other.tensors), steps=(*self.steps, *steps, kind, 0, 0, 0))

    def to(self, device: Any) -> Mask:
        return replace(self, tensors=tuple(each.to(device) for each in self.tensors))

    def dense(self) -> Tensor:
        """bool [B or 1, H or 1, queries, keys]: as much memory as it says."""
        stack: list[Tensor] = []
        for kind, first, rows, columns in zip(*(self.steps[n::STEP] for n in range(STEP)), strict=True):
            if kind == BOTH:
                stack[-2:] = [stack[-2] & stack[-1]]
            elif kind == EITHER:
                stack[-2:] = [stack[-2] | stack[-1]]
            elif kind == INVERSE:
                stack[-1] = ~stack[-1]
            elif kind == RELATION:
                stack.append(_dense_relation(*self.tensors[first : first + 4]))
            elif kind == INTERVAL:
                low, high = self.tensors[first].unbind(-1)
                row = torch.arange(self.queries, device=low.device)[:, None]
                stack.append((low[:, :, None] <= row) & (row < high[:, :, None]))
            else:
                pairs = self.tensors[first]
                if kind == TILES:
                    pairs = pairs.repeat_interleave(rows, 2)[:, :, : self.queries].repeat_interleave(columns, 3)[..., : self.keys]
                stack.append(pairs.expand(*pairs.shape[:2], self.queries, self.keys))
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

    def kept(self) -> float:
        """The share of pairs that is kept, over items and heads; rows are looked at in blocks."""
        if self.queries * self.keys == 0:
            return 0.0
        step = max(1, (1 << 24) // self.keys)
        parts = [self.rows(start, min(start + step, self.queries)).dense() for start in range(0, self.queries, step)]
        return float(sum(part.double().mean((0, 1)).sum() for part in parts)) / (self.queries * self.keys)

    def sparsity(self) -> float:
        """The share of pairs that is not kept."""
        return 1 - self.kept()

    def flops(self, heads: int, D: int, Dv: int | None = None, *, batch: int = 1) -> float:
        """Of the forward products with the kept pairs, 2 (D + Dv) each."""
        return 2 * (D + (D if Dv is None else Dv)) * self.kept() * self.queries * self.keys * heads * batch


pytree.register_pytree_node(
    Mask,
    lambda mask: (list(mask.tensors), (mask.queries, mask.keys, mask.steps)),
    lambda leaves, context: Mask(context[0], context[1], tuple(leaves), context[2]),
    serialized_type_name="modalign.masks.Mask",
)
pytree.register_pytree_node(
    Tokens, lambda given: ([given.fields], given.names), lambda leaves, names: Tokens(*leaves, names), serialized_type_name="modalign.masks.Tokens"
)


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

    >>> tokens = layout([("visual", (1, 3)), ("question", 2)])
    >>> relation({("question", "visual"): "always", ("question", "question"): "causal"}, tokens).dense()[0, 0].int().tolist()
    [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    """
    keys = queries if keys is None else keys
    for name, value in (("queries", queries), ("keys", keys)):
        if not isinstance(value, Tokens):
            raise TypeError(f"relation: {name} must be Tokens, got {type(value).__name__}")
    tables = [table] if isinstance(table, Mapping) else list(table)
    rules: list[Rule] = [Rule("never")]
    numbers = torch.zeros(len(tables), TYPES, TYPES, dtype=torch.int32)
    for head, each in enumerate(tables):
        for (of_query, of_key), given in each.items():
            rule = _rule(given)
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
    end = torch.full_like(first, queries) if window is None else (first + _number("causal", "window", window, 1)).clamp(0, queries)
    return intervals(torch.stack([first.clamp(0, queries).minimum(end), end], -1), queries)


def intervals(keep: Tensor, queries: int) -> Mask:
    """Key j is kept for the queries from keep[..., j, 0] to keep[..., j, 1] - 1. int32 [Nk, 2], [H, Nk, 2] or [B, H, Nk, 2]."""
    if not isinstance(keep, Tensor) or keep.is_floating_point() or keep.dim() not in (2, 3, 4) or keep.shape[-1] != 2:
        raise ValueError(f"intervals: keep must be whole numbers [Nk, 2], [H, Nk, 2] or [B, H, Nk, 2], got {getattr(keep, 'shape', keep)}")
    if keep.device.type == "cpu" and bool(((keep[..., 0] > keep[..., 1]) | (keep < 0).any(-1) | (keep > queries).any(-1)).any()):
        raise ValueError(f"intervals: keep must hold 0 <= first <= end <= queries = {queries}, got another")
    four = keep[(None,) * (4 - keep.dim())].to(torch.int32).contiguous()
    return Mask(queries, keep.shape[-2], (four,), (INTERVAL, 0, 0, 0))


def blocks(keep: Tensor, size: int | tuple[int, int], queries: int, keys: int | None = None) -> Mask:
    """Tiles of `size` (rows, columns) pairs, kept or not. bool [rows, columns], [H, ...] or [B, H, ...] of tiles."""
    keys = queries if keys is None else keys
    rows, columns = (size, size) if isinstance(size, int) else size
    _number("blocks", "size", rows, 1), _number("blocks", "size", columns, 1)
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


# -------------------------------------------------------------------------------------------------------------------------------------- published rules

TEXT = ("prefix", "question", "answer")


def _with_visual_rows(tokens: Tokens, **rules: Any) -> Mask:
    """Causal rows of text; visual rows keep what `rules` says of keys "text" and "visual"."""
    table: dict[tuple[Any, Any], Any] = {(q, k): "causal" for q in TEXT for k in TYPE_NAMES}
    table |= {("visual", k): rules["text"] for k in TEXT}
    table["visual", "visual"] = rules["visual"]
    return relation(table, tokens)


def image_prefix(tokens: Tokens) -> Mask:
    """Causal, and every image sees itself both ways.

    ======  ======  ======================
    query   text    visual
    ======  ======  ======================
    text    causal  causal
    visual  causal  causal_or_same_segment
    ======  ======  ======================
    """
    return _with_visual_rows(tokens, text="causal", visual="causal_or_same_segment")


def composite(tokens: Tokens, *, visual_update: str = "self") -> Mask:
    """Composite attention: visual tokens are seen and do not look. [EE-MLLM, 2024]

    ======  ======  ===================================================
    query   text    visual
    ======  ======  ===================================================
    text    causal  causal
    visual  never   self (visual_update="self") or never ("ffn")
    ======  ======  ===================================================
    """
    if visual_update not in ("self", "ffn"):
        raise ValueError(f'composite: visual_update must be "self" or "ffn", got {visual_update!r}')
    return _with_visual_rows(tokens, text="never", visual="self" if visual_update == "self" else "never")


def no_visual_attention(tokens: Tokens, *, visual_to_text: str = "never") -> Mask:
    """NAAViT and NAEViT: no attention among, or none from, visual tokens. [SAISA, 2025]

    ======  ==============  ======
    query   text            visual
    ======  ==============  ======
    text    causal          causal
    visual  visual_to_text  never
    ======  ==============  ======

    visual_to_text: "never" (released) or "causal" (the pilot study: visual to visual alone is taken away).
    """
    if visual_to_text not in ("never", "causal"):
        raise ValueError(f'no_visual_attention: visual_to_text must be "never" or "causal", got {visual_to_text!r}')
    return _with_visual_rows(tokens, text=visual_to_text, visual="never")


def modality_mutual(tokens: Tokens, turn: Tensor | None = None) -> Mask:
    """Modality-mutual attention: images also see the question that follows them, never the answer. [AKI, 2025]

    ========  ======  ======  ========  ======
    query     prefix  visual  question  answer
    ========  ======  ======  ========  ======
    visual    causal  causal  always    never
    others    causal  causal  causal    causal
    ========  ======  ======  ========  ======

    turn: int [N] or [B, N], for conversations: an image sees the questions of its own turn alone.
    """
    table: dict[tuple[Any, Any], Any] = {(q, k): "causal" for q in TYPE_NAMES for k in TYPE_NAMES}
    table["visual", "answer"] = "never"
    if turn is None:
        return relation(table | {("visual", "question"): "always"}, tokens)
    table["visual", "question"] = "never"
    return relation(table, tokens) | relation({("visual", "question"): "same_segment"}, tokens.replace(segment=turn))


def neighbor_window(tokens: Tokens, window: int = 3) -> Mask:
    """Neighbour-aware visual attention: a visual token sees a window x window square of its image, both ways, clipped at the border. [Treat Visual Tokens as Text?, 2024]

    ======  ======  ==========================================
    query   text    visual
    ======  ======  ==========================================
    text    causal  causal
    visual  causal  grid_clip(0, (window - 1) / 2, the same)
    ======  ======  ==========================================
    """
    if _number("neighbor_window", "window", window, 1) % 2 == 0:
        raise ValueError(f"neighbor_window: window must be odd, got {window}")
    return _with_visual_rows(tokens, text="causal", visual=grid_clip(0, window // 2, window // 2))
