"""Data sets of paired items: one feature matrix per modality, masks for what is missing, names, pictures, and splits that keep equal captions together."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._files import read_tensors
from .basis import FeatureBasis
from .folder import UNFINISHED, FeatureFolder, is_feature_folder
from .pictures import PictureArray, PictureSheet
from .storage import verify_checksums

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["PairedDataset", "Split", "FeatureStatistics", "load", "available", "from_features", "from_folder"]

FORMAT_VERSION = 1
ROOT = Path(__file__).parent
ROOT_VARIABLE = "MODALIGN_DATA_ROOT"


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
    """Per modality, over the items that have it: the mean [D], and one scale that brings the centred features to a root mean square of 1."""

    mean: dict[str, Tensor]
    scale: dict[str, float]


def _ordered(groups: Sequence[int], labels: Mapping[int, str], salt: str) -> list[int]:
    """Groups in a pseudo-random order that depends on their names and the salt only, whatever the library versions."""
    return sorted(set(groups), key=lambda g: hashlib.sha256(f"{salt}/{labels[g]}".encode()).digest())


def _small_first(order: Sequence[int], members: Mapping[int, list[int]], size: int) -> list[int]:
    """The same order, but groups of more than 10 items and a fiftieth of `size` last: every candidate of a query's group is a hit, so that in a part
    of a few large groups chance alone finds much."""
    return sorted(order, key=lambda group: len(members[group]) > max(10, size // 50))


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
    present : dict of str to bool Tensor [N], for the modalities that some items lack; their rows there are zeros
    names : list of N strings; `keywords` a list of N lists of strings
    groups : int64 Tensor [N]; items of one group have the same caption (lower-cased) and count as hits for each other
    default : the modalities that `modalign align` takes unless told otherwise; all of them where empty
    bases : dict of str to FeatureBasis, for the modalities whose stored features were reduced
    encoders : dict of str to the name of the frozen encoder
    encoder_code : dict of str to the SHA-256 of its file, for encoders of one's own
    salt : what splits depend on beside captions and seed; the name where empty
    items : what is known of each item beyond its name: captions in other languages, author, licence
    """

    name: str
    modalities: dict[str, Tensor]
    names: list[str]
    groups: Tensor
    test_size: int
    validation_size: int
    present: dict[str, Tensor] = field(default_factory=dict)
    keywords: list[list[str]] = field(default_factory=list)
    default: tuple[str, ...] = ()
    bases: dict[str, FeatureBasis] = field(default_factory=dict)
    encoders: dict[str, str] = field(default_factory=dict)
    encoder_code: dict[str, str] = field(default_factory=dict)
    items: list[dict[str, Any]] = field(default_factory=list)
    licence: str = ""
    source: str = ""
    basis_seed: int | None = None
    salt: str = ""
    pictures: PictureSheet | PictureArray | None = None
    folder: FeatureFolder | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        """One line: a data set holds thousands of captions and vectors."""

        def of(name: str, rows: Tensor) -> str:
            here = self.present.get(name)
            return f"{name} {rows.shape[1]}" + ("" if here is None else f" (of {int(here.sum())})")

        return f"PairedDataset({self.name}: {len(self)} items; {', '.join(of(name, rows) for name, rows in self.modalities.items())})"

    def select(self, names: Sequence[str]) -> PairedDataset:
        """The same items with these modalities only, in this order."""
        unknown = [name for name in names if name not in self.modalities]
        if unknown or len(set(names)) != len(names) or not names:
            raise ValueError(f"PairedDataset.select: names must be different ones out of {list(self.modalities)}, got {list(names)}")
        kept = {name: mask for name, mask in self.present.items() if name in names}
        return replace(self, modalities={name: self.modalities[name] for name in names}, present=kept, default=())

    def splits(self, seed: int = 0, pairs: int | None = None) -> Split:
        """Split by caption group, the same on every machine: test, and a training part that is divided into fit and validation. A group of more than
        10 items and a fiftieth of the test (or validation) part comes into it only where smaller ones do not fill it.

        `pairs` keeps only so many training items that have two modalities or more (the first of an order that depends on the seed, so that the 100 of
        one call lie among the 200 of another but for groups that do not fit in); the validation part then is a quarter of them, at most the usual size.
        The test part stays.
        """
        groups, salt = self.groups.tolist(), self.salt or self.name
        labels = {g: self._label(i) for i, g in reversed(list(enumerate(groups)))}
        members: dict[int, list[int]] = {}
        for item, group in enumerate(groups):
            members.setdefault(group, []).append(item)
        test = _take(_small_first(_ordered(groups, labels, f"{salt}/test/{seed}"), members, self.test_size), members, self.test_size)
        held = set(test)
        train = [i for i in range(len(self)) if i not in held]
        validation_size = self.validation_size
        if pairs is not None:
            paired = set(self.paired(torch.tensor(train)).tolist())
            if not 8 <= pairs <= len(paired):
                which = f"the training items of '{self.name}'" + (" with two modalities or more" if self.present else "")
                raise ValueError(f"PairedDataset.splits: pairs must be in 8..{len(paired)}, {which}, got {pairs}")
            members = {group: [i for i in items if i in paired] for group, items in members.items()}
            train = _take(_ordered([groups[i] for i in paired], labels, f"{salt}/pairs/{seed}"), members, pairs)
            validation_size = min(validation_size, pairs // 4)
        rest = sorted({groups[i] for i in train})
        order = _small_first(_ordered(rest, labels, f"{salt}/validation/{seed}"), members, validation_size)
        validation = _take(order, members, validation_size)
        seen = set(validation)
        fit = [i for i in train if i not in seen]
        for name, part, least in (("test", test, 1), ("validation", validation, 1), ("fit", fit, 2)):
            if len(part) < least:
                largest = max(map(len, members.values()))
                raise ValueError(
                    f"PairedDataset.splits: items must make a {name} part of whole groups, got {len(part)} for it from {len(self)} items in "
                    f"{len(members)} groups, the largest of {largest}; a group is never divided"
                )
        transductive = self.basis_seed is not None and seed != self.basis_seed
        parts = (torch.tensor(part, dtype=torch.int64) for part in (train, fit, validation, test))
        return Split(seed, *parts, transductive)

    def _label(self, item: int) -> str:
        """What a group is ordered by: its key where one was given, else the caption."""
        given = self.items[item].get("group") if self.items else None
        return (given or self.names[item]).lower()

    def statistics(self, indices: Tensor) -> FeatureStatistics:
        """Mean and scale over the given (training) items only, of those that have the modality."""
        mean, scale = {}, {}
        for name, features in self.modalities.items():
            chosen = features[self.available(name, indices)]
            mean[name] = chosen.mean(0)
            scale[name] = float((chosen - mean[name]).square().mean().sqrt())
            if not 0 < scale[name] < float("inf"):
                raise ValueError(
                    f"PairedDataset.statistics: modality '{name}' must vary, and in a range whose squares float32 holds, got {len(chosen)} items "
                    f"with a deviation of {scale[name]:g} and a largest number of {float(chosen.abs().max()):g}"
                )
        return FeatureStatistics(mean, scale)

    def available(self, name: str, indices: Tensor) -> Tensor:
        """Those of the given items that have a modality."""
        return indices[self.present[name][indices]] if name in self.present else indices

    def paired(self, indices: Tensor) -> Tensor:
        """Those of the given items that have two modalities or more: the others say nothing about what belongs together."""
        everything = torch.ones(len(indices), dtype=torch.bool)
        held = [self.present[name][indices] if name in self.present else everything for name in self.modalities]
        return indices[torch.stack(held).sum(0) > 1]

    def features(self, indices: Tensor | None = None) -> dict[str, Tensor]:
        """The feature matrices, of the given items."""
        return {name: features if indices is None else features[indices] for name, features in self.modalities.items()}

    def masks(self, indices: Tensor | None = None) -> dict[str, Tensor]:
        """The masks of the modalities that some items lack, of the given items: True where an item has it."""
        return {name: mask if indices is None else mask[indices] for name, mask in self.present.items()}

    def digest(self) -> str:
        """SHA-256 over captions, groups, features, masks and what splits depend on: two data sets with the same train alike."""
        labels = [self._label(i) for i in range(len(self))]
        parts = [self.salt or self.name, self.names, labels, self.groups.tolist(), self.test_size, self.validation_size, self.basis_seed]
        digest = hashlib.sha256(json.dumps(parts).encode())
        for name, tensor in [*self.modalities.items(), *self.present.items()]:
            digest.update(f"{name} {list(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy())
        return digest.hexdigest()

    def tokens(self, name: str) -> tuple[Tensor, Tensor]:
        """Token features of a modality: ([T, D], int64 offsets [N + 1]); item i has the rows offsets[i] to offsets[i + 1]."""
        return self._folder("tokens").tokens(name)

    def layers(self, name: str) -> Tensor:
        """Pooled output of every layer of a modality's encoder: [N, L, D]."""
        return self._folder("layers").layers(name)

    def _folder(self, what: str) -> FeatureFolder:
        if self.folder is None:
            raise ValueError(f"PairedDataset.{what}: data set '{self.name}' keeps pooled features only; `modalign prepare` makes sets with {what}")
        return self.folder

    def encode(self, name: str, inputs: Sequence[Any]) -> Tensor:
        """New texts, pictures or recordings in the space of a modality's stored features, by its frozen encoder: [len(inputs), D_name].

        Warns where the encoder is one of your own and the file it is in differs from the one that made the stored features.
        """
        from . import encoders, shards

        if name not in self.encoders:
            raise ValueError(f"PairedDataset.encode: name must be a modality with a known encoder out of {sorted(self.encoders)}, got '{name}'")
        encoder = self.encoders[name]
        made = encoders.make(encoder)
        if (kept := self.encoder_code.get(name)) is not None and kept != shards.encoder_code(made):
            told = f"encoder '{encoder}' is in a file that differs from the one that made the features of '{name}'"
            warnings.warn(f"PairedDataset.encode: {told}; encode them anew unless it computes the same", stacklevel=2)
        features = shards.run_encoder(encoder, made, inputs, tokens=False, layers=False).pooled
        features = self.bases[name].project(features) if name in self.bases else features
        if features.shape[1] != self.modalities[name].shape[1]:
            raise ValueError(f"{encoder}: expected width {self.modalities[name].shape[1]} as '{name}' has, got {features.shape[1]}")
        return features

    def picture(self, item: int) -> Image:
        """The small picture of an item, RGB on white."""
        if self.pictures is None:
            raise ValueError(f"PairedDataset.picture: data set '{self.name}' has no pictures")
        if not 0 <= item < len(self):
            raise IndexError(f"PairedDataset.picture: item must be in 0..{len(self) - 1}, got {item}")
        return self.pictures(item)


def caption_groups(names: Sequence[str]) -> Tensor:
    """Number captions by first appearance, ignoring case: [N] int64."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(name.lower(), len(numbers)) for name in names])


def _parts(place: str, size: int, test_size: int | None, validation_size: int | None) -> tuple[int, int]:
    """Sizes of test and validation part: a quarter of the items, and a sixth of the rest, unless given."""
    if size < 12:
        raise ValueError(f"{place}: expected at least 12 items to be split, got {size}")
    test = size // 4 if test_size is None else test_size
    validation = (size - test) // 6 if validation_size is None else validation_size
    if test < 1 or validation < 1 or size - test - validation < 2:
        raise ValueError(f"{place}: test_size and validation_size must be positive and leave items to train on, got {test} and {validation} of {size}")
    return test, validation


def from_features(
    modalities: Mapping[str, Tensor],
    *,
    present: Mapping[str, Tensor] | None = None,
    names: Sequence[str] | None = None,
    name: str = "features",
    test_size: int | None = None,
    validation_size: int | None = None,
) -> PairedDataset:
    """Make a data set of your own feature matrices: a mapping of modality names to float matrices [N, D], row i of all of them being item i.

    Items with equal `names` form a group. `present` maps the modalities that some items lack to bool [N]; rows of absent items may hold anything.
    By default a quarter of the items is the test part and a sixth of the rest validation.

    >>> import torch
    >>> data = from_features({"sound": torch.randn(40, 8), "text": torch.randn(40, 5)})
    >>> len(data), len(data.splits(0).test)
    (40, 10)
    """
    if len(modalities) < 2:
        raise ValueError(f"from_features: modalities must hold at least 2 matrices, got {len(modalities)}")
    masks = {key: mask.detach().cpu() for key, mask in (present or {}).items()}
    unknown = sorted(set(masks) - set(modalities))
    if unknown:
        raise ValueError(f"from_features: present must name modalities out of {list(modalities)}, got {unknown}")
    matrices: dict[str, Tensor] = {}
    for key, matrix in modalities.items():
        if not isinstance(matrix, Tensor) or matrix.dim() != 2 or not matrix.is_floating_point():
            found = f"{matrix.dtype} {list(matrix.shape)}" if isinstance(matrix, Tensor) else type(matrix).__name__
            raise ValueError(f"from_features: modality '{key}' must be a floating-point tensor [N, D], got {found}")
        values = matrix.detach().cpu().float().contiguous()
        if (mask := masks.get(key)) is not None:
            if mask.dtype is not torch.bool or mask.shape != values.shape[:1]:
                raise ValueError(f"from_features: present['{key}'] must be bool [{len(values)}], got {mask.dtype} {list(mask.shape)}")
            if not bool(mask.any()):
                raise ValueError(f"from_features: present['{key}'] must hold at least one item, got none")
            values = torch.where(mask[:, None], values, 0)
        bad = int((~torch.isfinite(values)).any(1).sum())
        if bad:
            raise ValueError(f"from_features: modality '{key}' must be finite, got {bad} rows with NaN or Inf")
        matrices[key] = values
    rows = {key: matrix.shape[0] for key, matrix in matrices.items()}
    if len(set(rows.values())) != 1:
        raise ValueError(f"from_features: modalities must have equally many rows, got {rows}")
    size = next(iter(rows.values()))
    test, validation = _parts("from_features", size, test_size, validation_size)
    labels = [f"item {i}" for i in range(size)] if names is None else list(names)
    if len(labels) != size:
        raise ValueError(f"from_features: names must have {size} entries, got {len(labels)}")
    lacking = {key: mask for key, mask in masks.items() if not bool(mask.all())}
    return PairedDataset(name, matrices, labels, caption_groups(labels), test, validation, present=lacking)


def from_folder(folder: str | os.PathLike[str]) -> PairedDataset:
    """Read a folder with one `.npy` or `.safetensors` file per modality (see `modalign.data.folder`); every complaint names file, expected, found.

    >>> import numpy, tempfile
    >>> folder = tempfile.mkdtemp()
    >>> for name, width in (("sound", 8), ("text", 5)):
    ...     numpy.save(f"{folder}/{name}.npy", numpy.random.randn(40, width))
    >>> data = from_folder(folder)
    >>> len(data), {name: list(features.shape) for name, features in data.modalities.items()}
    (40, {'sound': [40, 8], 'text': [40, 5]})
    """
    read = FeatureFolder(Path(folder))
    about, items = read.about, read.items
    place = str(read.folder)
    test, validation = _parts(place, read.size, about.get("test_size"), about.get("validation_size"))
    described = about.get("modalities", {})
    order = [name for name in described if name in read.modalities] + [name for name in read.modalities if name not in described]
    return PairedDataset(
        name=about.get("name", read.folder.resolve().name),
        modalities={name: read.modalities[name] for name in order},
        names=[item["name"] for item in items],
        groups=caption_groups([item.get("group") or item["name"] for item in items]),
        test_size=test,
        validation_size=validation,
        present=read.present,
        keywords=[item.get("keywords", []) for item in items],
        default=tuple(about.get("default", ())),
        encoders={name: entry["encoder"] for name, entry in described.items() if "encoder" in entry},
        encoder_code={name: entry["encoder_code"] for name, entry in described.items() if "encoder_code" in entry},
        items=items,
        licence=about.get("licence", ""),
        source=about.get("source", ""),
        salt=about.get("name", "features"),  # a plain folder may be renamed without changing its splits
        pictures=read.pictures(),
        folder=read,
    )


def _roots(root: str | os.PathLike[str] | None) -> list[Path]:
    """Where data sets are looked for: the given root, else that of the environment, and always the package itself."""
    named = root if root is not None else os.environ.get(ROOT_VARIABLE)
    return [ROOT] if named is None else [Path(named), ROOT]


def available(root: str | os.PathLike[str] | None = None) -> list[str]:
    """Names of the data sets below `root` (or $MODALIGN_DATA_ROOT), and of those that come with the package."""
    return sorted({path.parent.name for folder in _roots(root) for path in folder.glob("*/items.json")})


def load(name: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> PairedDataset:
    """Load a data set by name, or a feature folder by path.

    Names are those of the data that come with the package and of what `modalign prepare` left below `root` (or below $MODALIGN_DATA_ROOT); "emoji-mini"
    and "emoji_mini" are the same. Checksums are verified, so a damaged file is reported and never trained on.

    >>> data = load("emoji_mini")
    >>> len(data), list(data.modalities), data.names[0]
    (1849, ['picture', 'text'], 'light skin tone')
    """
    folder, place = locate(name, root)
    return _load_reduced(folder) if place is not None and (folder / "features.safetensors").is_file() else from_folder(folder)


def locate(name: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> tuple[Path, Path | None]:
    """The folder that `load` reads, and the root below which it was found by name (None: `name` is a path)."""
    bare = os.fspath(name)
    keys = [] if os.sep in bare or bare in ("", ".", "..") else list(dict.fromkeys([bare, bare.replace("-", "_")]))
    for place, key in ((place, key) for place in _roots(root) for key in keys):
        if (place / key / "items.json").is_file() or (place / key / UNFINISHED).is_file():
            return place / key, place
    if is_feature_folder(Path(name)):
        return Path(name), None
    from .sources import SOURCES

    known = available(root)
    remedy = f"; `modalign prepare {bare} --data-root DIR` makes it, --data-root DIR or ${ROOT_VARIABLE} finds it" if bare in SOURCES else ""
    raise ValueError(f"load: name must be one of {', '.join(known)} or a folder of .npy or .safetensors files, got '{bare}'{remedy}")


def _load_reduced(folder: Path) -> PairedDataset:
    """The format of the committed data: all modalities in one file, reduced and rounded to eight bits, pictures on one sheet."""
    verify_checksums(folder)
    about = json.loads((folder / "items.json").read_text(encoding="utf-8"))
    if about["format"] != FORMAT_VERSION:
        raise ValueError(f"{folder / 'items.json'}: expected format {FORMAT_VERSION}, got {about['format']}")
    tensors = read_tensors(folder / "features.safetensors")
    bases = {modality: FeatureBasis.from_tensors(tensors, modality) for modality in about["modalities"]}
    names = [item["name"] for item in about["items"]]
    sheet = about["pictures"]
    return PairedDataset(
        name=folder.name,
        modalities={modality: bases[modality].decode(tensors[modality]) for modality in about["modalities"]},
        names=names,
        groups=caption_groups(names),
        test_size=about["test_size"],
        validation_size=about["validation_size"],
        keywords=[item["keywords"] for item in about["items"]],
        bases=bases,
        encoders={modality: entry["encoder"] for modality, entry in about["modalities"].items()},
        items=about["items"],
        licence=about["licence"],
        source=about["source"],
        basis_seed=about["basis_seed"],
        pictures=PictureSheet(folder / sheet["file"], sheet["side"], sheet["columns"]),
    )
