"""What rules ask of the tokens of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ._trees import register_tree
from ._values import are_there
from .rules import whole_number

__all__ = ["FIELDS", "TYPES", "TYPE_NAMES", "Tokens", "layout", "tokens"]

FIELDS = ("index", "type", "segment", "last", "document", "t", "y", "x", "valid")  # in the order of csrc/ops/attention_mask.h
TYPES = 16
LARGEST = (1 << 30) - 1  # of any field: differences fit in int32
TYPE_NAMES = ("prefix", "visual", "question", "answer")  # of `layout`


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
    """Tokens from arrays [N] or [B, N]; numbers stand for all tokens. `index` counts from 0 unless given. Values below 2^30 in size: numbers such as hashes of documents are to be counted first."""
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
        if array.numel() and are_there(array):
            lowest, highest = int(array.min()), int(array.max())
            if lowest < -LARGEST or highest > LARGEST or (name == "valid" and not 0 <= lowest <= highest <= 1):
                allowed = "0 or 1" if name == "valid" else f"from -{LARGEST} to {LARGEST}"
                raise ValueError(f"tokens: {name} must be {allowed}, got {lowest if lowest < -LARGEST or (name == 'valid' and lowest < 0) else highest}")
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
            if grid and not 1 <= len(size) <= 3:
                raise ValueError(f"layout: a grid must have one to three dimensions, got {size!r}")
            sizes = [whole_number("layout", "a span", each, 0) for each in (size if grid else [size])]
            t, y, x = (1,) * (3 - len(sizes)) + tuple(sizes)
            last += int(grid)
            for n in range(t * y * x):
                place = (n // (y * x), n // x % y, n % x) if grid else (0, 0, 0)
                for field, value in zip(FIELDS, (len(columns["index"]), names.index(name), last if grid else -1, last, 0, *place, 1), strict=True):
                    columns[field].append(value)
        rows.append(columns)
    N = max((len(columns["index"]) for columns in rows), default=0)
    padded = [[columns[name] + ([-1] if name in ("segment", "last") else [0]) * (N - len(columns[name])) for name in FIELDS] for columns in rows]
    return Tokens(torch.tensor(padded, dtype=torch.int32).view(len(rows), len(FIELDS), N), tuple(names))


register_tree(Tokens, ("fields",), ("names",))
