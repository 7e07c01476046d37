"""Sizes as they are written on a command line: 4096, 4k, 1k:64k, B=512,D=64."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .registry import Case

SUFFIXES = {"": 1, "k": 2**10, "M": 2**20, "G": 2**30}


def size(text: str) -> int:
    """A whole number; k, M and G are powers of 1024, since sizes of tensors usually are multiples of powers of two.

    >>> size("64k"), size("20000")
    (65536, 20000)
    >>> size("64K")
    Traceback (most recent call last):
    ValueError: bench: a size must be a whole number, or one with k, M or G (powers of 1024), got '64K'
    """
    found = re.fullmatch(r"(\d+)([kMG]?)", text)
    if not found:
        raise ValueError(f"bench: a size must be a whole number, or one with k, M or G (powers of 1024), got {text!r}")
    return int(found.group(1)) * SUFFIXES[found.group(2)]


def shown(count: int) -> str:
    """
    >>> shown(65536), shown(20000), shown(384)
    ('64k', '20000', '384')
    """
    for suffix in ("G", "M", "k"):
        if count and count % SUFFIXES[suffix] == 0:
            return f"{count // SUFFIXES[suffix]}{suffix}"
    return str(count)


def listed(parameters: Mapping[str, Any]) -> str:
    """
    >>> listed({"N": 64, "D": 8})
    'N=64 D=8'
    """
    return " ".join(f"{key}={value}" for key, value in parameters.items())


def value(text: str) -> Any:
    """A parameter of a case that is not known: a size, a number, or a word.

    >>> value("4k"), value("0.5"), value("js")
    (4096, 0.5, 'js')
    """
    for reading in (size, float):
        try:
            return reading(text)
        except ValueError:
            pass
    return text


def assignments(items: Iterable[str], flag: str, reading: Callable[[str], Any] = value) -> dict[str, Any]:
    """
    >>> assignments(["k=3", "N=4k,D=8"], "--set")
    {'k': 3, 'N': 4096, 'D': 8}
    """
    found: dict[str, Any] = {}
    for item in ",".join(items).split(","):
        if not item:
            continue
        key, equals, text = item.partition("=")
        if not equals or not key or not text:
            raise ValueError(f"bench: {flag} must be written as name=value, got {item!r}")
        found[key] = reading(text)
    return found


def sweep_range(text: str) -> tuple[list[str], int, int]:
    """The parameters that grow together, and from where to where.

    >>> sweep_range("B,C=1k:64k")
    (['B', 'C'], 1024, 65536)
    """
    names, equals, ends = text.partition("=")
    first, colon, last = ends.partition(":")
    if not (equals and colon and all(names.split(","))):
        raise ValueError(f"bench: a sweep must be written as N=1k:64k or B,C=1k:64k, got {text!r}")
    smallest, largest = size(first), size(last)
    if not 0 < smallest < largest:
        raise ValueError(f"bench: a sweep must go from a size above 0 to a larger one, got {text!r}")
    return names.split(","), smallest, largest


def geometric(smallest: int, largest: int, points: int) -> list[int]:
    """Sizes at equal ratios, both ends among them.

    >>> geometric(1024, 65536, 7)
    [1024, 2048, 4096, 8192, 16384, 32768, 65536]
    """
    if points < 2:
        raise ValueError(f"bench: --points must be at least 2, got {points}")
    return sorted({round(smallest * (largest / smallest) ** (index / (points - 1))) for index in range(points)})


def settings(cases: Iterable[Case], items: Iterable[str]) -> dict[str, Any]:
    """What --set says, each value of the kind that the cases have there: a whole number, a number, true or false, or a word."""
    found: dict[str, Any] = {}
    for name, text in assignments(items, "--set", str).items():
        for case in cases:
            check_parameters(case, [name], "--set")
            found[name] = _like([point[name] for point in case.grid if name in point], text, name)
    return found


def _like(examples: Sequence[Any], text: str, name: str) -> Any:
    kinds = {type(example) for example in examples}
    if not kinds <= {bool, int, float}:
        return text
    if kinds == {bool}:
        reading, what = {"true": True, "false": False}.__getitem__, "true or false"
    elif kinds == {int}:
        reading, what = size, "a whole number such as 4096 or 4k"
    else:
        reading, what = float, "a number"
    try:
        found = reading(text)
    except (ValueError, KeyError):
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"bench: --set {name} must be {what}, got {text!r}")
    return found


def check_parameters(case: Case, names: Sequence[str] | Mapping[str, Any], flag: str) -> None:
    for name in names:
        if name not in case.parameters:
            raise ValueError(f"bench: {flag} must be out of {case.parameters} for the case {case.name}, got {name!r}")
