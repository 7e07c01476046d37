"""Whether a key is kept for a query, told by their tokens. Every rule is here by name; csrc/ops/attention_mask.h says what it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["COUNTS", "NAMES", "Rule", "band", "causal_window", "checked_rule", "grid_clip", "grid_shift", "time_stride", "whole_number"]


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


def whole_number(rule: str, name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{rule}: {name} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{rule}: {name} must be {least} or more, got {value}")
    return value


def causal_window(width: int) -> Rule:
    """0 <= q.index - k.index < width"""
    return Rule("causal_window", (whole_number("causal_window", "width", width, 1),))


def band(left: int, right: int) -> Rule:
    """-left <= k.index - q.index <= right"""
    return Rule("band", (whole_number("band", "left", left, 0), whole_number("band", "right", right, 0)))


def grid_clip(t: int, y: int, x: int) -> Rule:
    """The same segment, and at most t, y and x apart on its grid: a window that ends at the border."""
    return Rule("grid_clip", tuple(whole_number("grid_clip", name, value, 0) for name, value in zip("tyx", (t, y, x), strict=True)))


def time_stride(stride: int) -> Rule:
    """The same segment, and t equal modulo the stride."""
    return Rule("time_stride", (whole_number("time_stride", "stride", stride, 1),))


def grid_shift(size: Sequence[int], kernel: Sequence[int] | int, *, dilation: Sequence[int] | int = 1, stride: Sequence[int] | int = 1, is_causal: Sequence[bool] | bool = False) -> Rule:
    """Neighbourhood attention on a grid of one to three dimensions (the last ones of t, y, x): windows are shifted at the border, so that every query keeps as many keys."""
    if not isinstance(size, Sequence) or not 1 <= len(size) <= 3:
        raise ValueError(f"grid_shift: size must have one to three dimensions, got {size!r}")
    rank = len(size)
    wide = [list(each) if isinstance(each, Sequence) else [each] * rank for each in (kernel, dilation, stride, is_causal)]
    if any(len(each) != rank for each in wide):
        raise ValueError(f"grid_shift: kernel, dilation, stride and is_causal must be for one to three dimensions as size is, one number or {rank}, got {wide}")
    numbers = [1, 1, 1, 1, 0] * (3 - rank)
    for n, k, d, s, c in zip(size, *wide, strict=True):
        for name, value in (("size", n), ("kernel", k), ("dilation", d), ("stride", s)):
            whole_number("grid_shift", name, value, 1)
        if not isinstance(c, bool):
            raise TypeError(f"grid_shift: is_causal must be True or False, got {c!r}")
        if k * d > n or s > k:
            raise ValueError(f"grid_shift: kernel * dilation must be at most size and stride at most kernel, got size {n}, kernel {k}, dilation {d}, stride {s}")
        numbers += [n, k, d, s, int(c)]
    return Rule("grid_shift", tuple(numbers))


def checked_rule(given: object) -> Rule:
    rule = Rule(given) if isinstance(given, str) else given
    if not isinstance(rule, Rule) or rule.name not in NAMES or len(rule.numbers) != COUNTS.get(rule.name, 0):
        raise ValueError(f"relation: table must hold names of rules ({', '.join(NAMES)}) or what causal_window, band, grid_clip, time_stride and grid_shift return, got {given!r}")
    return rule
