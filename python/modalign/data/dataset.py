"""Data sets of paired items: one feature matrix per modality, names, pictures, and splits that keep equal captions together."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .basis import FeatureBasis
from .storage import read_tensors, verify_checksums

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["PairedDataset", "Split", "FeatureStatistics", "load", "available", "from_features"]

FORMAT_VERSION = 1
ROOT = Path(__file__).parent


@dataclass(frozen=True)
class Split:
    """Item indices of one seed. `train` and `test` share no group; `fit` and `validation` divide `train`, again by group.

    Choices (steps, weights, strengths) are made by fitting on `fit` and looking at `validation`; `test` is read once, at the end.
    `transductive` is True where the stored features were reduced with a basis that saw some of these test items (without their pairing).
    """

    seed: int
    train: Tensor
    fit: Tensor
    validation: Tensor
    test: Tensor
    transductive: bool = False


@dataclass(frozen=True)
class FeatureStatistics:
    """Per modality: the mean [D], and one scale that brings the centred features to a root mean square of 1."""

    mean: dict[str, Tensor]
    scale: dict[str, float]


def _ordered(groups: Sequence[int], labels: Mapping[int, str], salt: str) -> list[int]:
    """Groups in a pseudo-random order that depends on their names and the salt only, whatever the library versions."""
    return sorted(set(groups), key=lambda g: hashlib.sha256(f"{salt}/{labels[g]}".encode()).digest())


def _take(order: Sequence[int], members: Mapping[int, list[int]], size: int) -> list[int]:
    """Items of the first groups that together hold exactly `size` items (a group that would overshoot is passed over)."""
    taken: list[int] = []
    for group in order:
        if len(taken) + len(members[group]) <= size:
            taken += members[group]
    return sorted(taken)


@dataclass(frozen=True)
class PairedDataset:
    """Items known by several modalities at once.

    Attributes
    ----------
    name, licence, source : str
    modalities : dict of str to float32 Tensor [N, D_name], in a fixed order; row i of all of them is item i
    names : list of N strings; `keywords` a list of N lists of strings
    groups : int64 Tensor [N]; items of one group have the same caption (lower-cased) and count as hits for each other
    bases : dict of str to FeatureBasis, for the modalities whose new items can be encoded
    encoders : dict of str to the name of the frozen encoder
    """

    name: str
    modalities: dict[str, Tensor]
    names: list[str]
    groups: Tensor
    test_size: int
    validation_size: int
    keywords: list[list[str]] = field(default_factory=list)
    bases: dict[str, FeatureBasis] = field(default_factory=dict)
    encoders: dict[str, str] = field(default_factory=dict)
    licence: str = ""
    source: str = ""
    basis_seed: int | None = None
    sheet: Path | None = None
    sheet_side: int = 0
    sheet_columns: int = 0

    def __len__(self) -> int:
        return len(self.names)

    def splits(self, seed: int = 0) -> Split:
        """Split by caption group, the same on every machine: test, and a training part that is divided into fit and validation."""
        groups = self.groups.tolist()
        labels = {g: self.names[i].lower() for i, g in reversed(list(enumerate(groups)))}
        members: dict[int, list[int]] = {}
        for item, group in enumerate(groups):
            members.setdefault(group, []).append(item)
        test = _take(_ordered(groups, labels, f"{self.name}/test/{seed}"), members, self.test_size)
        held = set(test)
        rest = [g for g in members if members[g][0] not in held]
        validation = _take(_ordered(rest, labels, f"{self.name}/validation/{seed}"), members, self.validation_size)
        train = [i for i in range(len(self)) if i not in held]
        seen = set(validation)
        fit = [i for i in train if i not in seen]
        transductive = self.basis_seed is not None and seed != self.basis_seed
        return Split(seed, *(torch.tensor(part) for part in (train, fit, validation, test)), transductive)

    def statistics(self, indices: Tensor) -> FeatureStatistics:
        """Mean and scale over the given (training) items only."""
        mean = {name: features[indices].mean(0) for name, features in self.modalities.items()}
        scale = {name: float((features[indices] - mean[name]).square().mean().sqrt()) for name, features in self.modalities.items()}
        return FeatureStatistics(mean, scale)

    def features(self, indices: Tensor | None = None) -> dict[str, Tensor]:
        """The feature matrices, of the given items."""
        return {name: features if indices is None else features[indices] for name, features in self.modalities.items()}

    @functools.cached_property
    def _pictures(self) -> Image:
        if self.sheet is None:
            raise ValueError(f"PairedDataset.picture: data set '{self.name}' has no pictures")
        from PIL import Image as images

        return images.open(self.sheet).convert("RGB")

    def picture(self, item: int) -> Image:
        """The small picture of an item, RGB on white, `sheet_side` pixels square."""
        if not 0 <= item < len(self):
            raise IndexError(f"PairedDataset.picture: item must be in 0..{len(self) - 1}, got {item}")
        row, column = divmod(item, self.sheet_columns)
        side = self.sheet_side
        return self._pictures.crop((column * side, row * side, (column + 1) * side, (row + 1) * side))


def caption_groups(names: Sequence[str]) -> Tensor:
    """Number captions by first appearance, ignoring case: [N] int64."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(name.lower(), len(numbers)) for name in names])


def from_features(
    modalities: Mapping[str, Tensor],
    *,
    names: Sequence[str] | None = None,
    name: str = "features",
    test_size: int | None = None,
    validation_size: int | None = None,
) -> PairedDataset:
    """Make a data set of your own feature matrices: a mapping of modality names to float matrices [N, D], row i of all of them being item i.

    Items with equal `names` form a group. By default a quarter of the items is the test part and a sixth of the rest validation.

    >>> import torch
    >>> data = from_features({"sound": torch.randn(40, 8), "text": torch.randn(40, 5)})
    >>> len(data), len(data.splits(0).test)
    (40, 10)
    """
    if len(modalities) < 2:
        raise ValueError(f"from_features: modalities must hold at least 2 matrices, got {len(modalities)}")
    matrices: dict[str, Tensor] = {}
    for key, matrix in modalities.items():
        if not isinstance(matrix, Tensor) or matrix.dim() != 2 or not matrix.is_floating_point():
            found = f"{matrix.dtype} {list(matrix.shape)}" if isinstance(matrix, Tensor) else type(matrix).__name__
            raise ValueError(f"from_features: modality '{key}' must be a floating-point tensor [N, D], got {found}")
        bad = int((~torch.isfinite(matrix)).any(1).sum())
        if bad:
            raise ValueError(f"from_features: modality '{key}' must be finite, got {bad} rows with NaN or Inf")
        matrices[key] = matrix.detach().float().contiguous()
    rows = {key: matrix.shape[0] for key, matrix in matrices.items()}
    if len(set(rows.values())) != 1:
        raise ValueError(f"from_features: modalities must have equally many rows, got {rows}")
    size = next(iter(rows.values()))
    if size < 12:
        raise ValueError(f"from_features: modalities must have at least 12 rows to be split, got {size}")
    labels = [f"item {i}" for i in range(size)] if names is None else list(names)
    if len(labels) != size:
        raise ValueError(f"from_features: names must have {size} entries, got {len(labels)}")
    test = size // 4 if test_size is None else test_size
    validation = (size - test) // 6 if validation_size is None else validation_size
    if test < 1 or validation < 1 or size - test - validation < 2:
        raise ValueError(
            f"from_features: test_size and validation_size must be positive and leave items to train on, got {test} and {validation} of {size}"
        )
    return PairedDataset(name, matrices, labels, caption_groups(labels), test, validation)


def available(root: Path = ROOT) -> list[str]:
    """Names of the data sets that come with the package, or lie below another root."""
    return sorted(path.parent.name for path in Path(root).glob("*/items.json"))


def load(name: str, root: Path = ROOT) -> PairedDataset:
    """Load a data set that comes with the package, or a folder of the same make below `root`; "emoji-mini" and "emoji_mini" are the same.

    The folder's checksums are verified first, so a damaged installation is reported and never trained on.

    >>> data = load("emoji_mini")
    >>> len(data), list(data.modalities), data.names[0]
    (1849, ['picture', 'text'], 'light skin tone')
    """
    key = name.replace("-", "_")
    folder = Path(root) / key
    known = available(root)
    if key not in known:
        raise ValueError(f"load: name must be one of {', '.join(known) or f'the data folders below {root} (there are none)'}, got '{name}'")
    verify_checksums(folder)
    about = json.loads((folder / "items.json").read_text(encoding="utf-8"))
    if about["format"] != FORMAT_VERSION:
        raise ValueError(f"{folder / 'items.json'}: expected format {FORMAT_VERSION}, got {about['format']}")
    tensors = read_tensors(folder / "features.safetensors")
    bases = {modality: FeatureBasis.from_tensors(tensors, modality) for modality in about["modalities"]}
    names = [item["name"] for item in about["items"]]
    return PairedDataset(
        name=key,
        modalities={modality: bases[modality].decode(tensors[modality]) for modality in about["modalities"]},
        names=names,
        groups=caption_groups(names),
        test_size=about["test_size"],
        validation_size=about["validation_size"],
        keywords=[item["keywords"] for item in about["items"]],
        bases=bases,
        encoders={modality: entry["encoder"] for modality, entry in about["modalities"].items()},
        licence=about["licence"],
        source=about["source"],
        basis_seed=about["basis_seed"],
        sheet=folder / about["pictures"]["file"],
        sheet_side=about["pictures"]["side"],
        sheet_columns=about["pictures"]["columns"],
    )
