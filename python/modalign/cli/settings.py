"""What an alignment run is asked to do: one dataclass, filled from a TOML file, from flags, or in Python."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ..models.gram_aligner import HEADS, LOSSES

__all__ = ["ALL", "AlignSettings", "read_settings"]

ALL = "all"
# What a run is asked for beside its settings, and of what type it is.
BESIDE = {"data": (str,), "data_root": (str, Path), "out": (str, Path), "threads": (int,), "nproc": (int,)}


@dataclass(frozen=True)
class AlignSettings:
    """Settings of `modalign align`; every field is a flag and a key of the configuration file.

    modalities : which of the data set's, the first is the anchor; none: the data set's default
    pairs : numbers of training items, or "all"; the model kept is that of the last
    loss, heads : see GramAlignerConfig;  hidden : width of the branch of "mlp", rank of that of "lowrank", 0 for the usual (256; a quarter of width)
    structure : weight of the STRUCTURE regularizer; other than 0 there are two rows more, trained with it, and the model kept is of these
    width : of the shared space, 0 for 256 or the narrowest modality;  reduce : features wider than this are first reduced to so many principal components
    """

    modalities: tuple[str, ...] = ()
    pairs: tuple[int | str, ...] = (ALL,)
    loss: str = "gram"
    heads: str = "mlp"
    seeds: int = 3
    first_seed: int = 0
    steps: int = 120
    batch: int = 256
    patience: int = 0
    width: int = 0
    hidden: int = 0
    reduce: int = 256
    temperature: float = 0.07
    pairwise_weight: float = 1 / 3
    learn_temperature: bool = False
    structure: float = 0.0
    structure_temperature: float = 0.05
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("modalities", "pairs"):
            if not isinstance(getattr(self, name), (list, tuple)):
                raise ValueError(f"align: {name} must be a list, got {getattr(self, name)!r}")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not all(isinstance(name, str) for name in self.modalities):
            raise ValueError(f"align: modalities must be names, got {list(self.modalities)}")
        for item in fields(self):
            value, kind = getattr(self, item.name), type(item.default)
            if kind is float and type(value) is int:
                object.__setattr__(self, item.name, float(value))
            elif type(value) is not kind:
                raise ValueError(f"align: {item.name} must be {kind.__name__}, got {value!r}")
        for name, least in (("seeds", 1), ("first_seed", 0), ("steps", 1), ("batch", 2), ("patience", 0), ("hidden", 0), ("reduce", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"align: {name} must be at least {least}, got {getattr(self, name)}")
        if self.width < 0 or self.width == 1:
            raise ValueError(f"align: width must be at least 2, or 0 for the usual, got {self.width}")
        for item in fields(self):
            if isinstance(value := getattr(self, item.name), float) and not math.isfinite(value):
                raise ValueError(f"align: {item.name} must be finite, got {value}")
        if not self.temperature > 0 or self.pairwise_weight < 0:
            raise ValueError(
                f"align: temperature must be positive and pairwise_weight not negative, got {self.temperature} and {self.pairwise_weight}"
            )
        if self.structure < 0 or not self.structure_temperature > 0:
            raise ValueError(f"align: structure must not be negative and structure_temperature positive, got {self.structure} and {self.structure_temperature}")
        if not self.structure and self.structure_temperature != type(self).structure_temperature:
            raise ValueError(f"align: structure_temperature must be left alone without structure, which alone uses it, got {self.structure_temperature}")
        if self.first_seed >= 2**31:
            raise ValueError(f"align: first_seed must be below 2**31, got {self.first_seed}")
        for name, known in (("loss", LOSSES), ("heads", HEADS)):
            if getattr(self, name) not in known:
                raise ValueError(f"align: {name} must be one of {', '.join(known)}, got '{getattr(self, name)}'")
        # A setting that the rest of the settings makes void is a mistake, not something to pass over.
        if self.heads == "linear" and self.hidden:
            raise ValueError(f"align: hidden must be 0 for linear heads, which have no branch, got {self.hidden}")
        usual = {item.name: item.default for item in fields(self)}
        with_temperature = ("gram", "volume", "clip")
        for name, losses in (("temperature", with_temperature), ("learn_temperature", with_temperature), ("pairwise_weight", ("gram",))):
            if self.loss not in losses and getattr(self, name) != usual[name]:
                raise ValueError(f"align: {name} must be left alone with loss {self.loss}, which does not use it, got {getattr(self, name)}")
        if not self.pairs or len(set(self.pairs)) != len(self.pairs) or any(type(p) is not int and p != ALL for p in self.pairs):
            raise ValueError(f"align: pairs must be different numbers or '{ALL}', got {list(self.pairs)}")
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise ValueError(f"align: device must be cpu or cuda, got '{self.device}'") from error
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"align: device must be cpu or cuda, got '{self.device}'")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"align: device must be one that torch sees, got '{self.device}' and no GPU (torch {torch.__version__})")

    def as_dict(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def as_toml(self) -> str:
        """The configuration file of this run: scalars and lists are written alike in TOML and JSON."""
        return "".join(f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in self.as_dict().items())


def read_settings(path: str | os.PathLike[str] | None, flags: Mapping[str, Any]) -> tuple[dict[str, Any], AlignSettings]:
    """(what is asked for beside the settings, settings) of a TOML file, overruled by flags."""
    content: dict[str, Any] = {}
    if path is not None:
        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib
        try:
            content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: expected TOML, got a file that does not parse ({error})") from error
        except OSError as error:
            raise ValueError(f"{path}: expected a TOML file, got one that does not open ({error.strerror})") from error
        known = {item.name for item in fields(AlignSettings)} | set(BESIDE)
        unknown = sorted(set(content) - known)
        if unknown:
            raise ValueError(f"{path}: expected keys among {sorted(known)}, got unknown {unknown}")
    merged = content | dict(flags)
    beside = {name: merged.pop(name) for name in BESIDE if name in merged}
    for name, kinds in BESIDE.items():
        if name in beside and (type(beside[name]) is bool or not isinstance(beside[name], kinds) or (kinds == (int,) and beside[name] < 1)):
            raise ValueError(f"align: {name} must be {'a path' if Path in kinds else 'text' if str in kinds else 'a positive number'}, got {beside[name]!r}")
    return beside, AlignSettings(**merged)
