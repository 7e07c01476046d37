"""A folder of feature files is a data set: one `.npy` or `.safetensors` file per modality, never a pickled one.

    picture.npy                  floating [N, D]; row i of every file is item i
    sound.safetensors            tensor "features" [N, D], and optionally "present", bool [N]: False where the item lacks this modality
    picture.present.npy          the same mask beside a .npy file
    text.tokens.safetensors      "tokens" [T, D] and "offsets" int64 [N + 1]: item i has tokens[offsets[i] : offsets[i + 1]]
    text.layers.safetensors      "layers" [N, L, D]: pooled output of every layer of the encoder
    pictures.safetensors         "pictures" uint8 [N, side, side, 3], to look at
    names.txt                    one caption per line, or:
    items.json                   captions, groups, licences, encoders, sizes of the parts
    SHA256SUMS                   checked where it is there

Only the modality files are needed. Rows of absent items may hold anything and are read as zeros.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import read_tensors
from .pictures import PictureArray
from .storage import CHECKSUMS, verify_checksums

__all__ = ["FORMAT_VERSION", "FeatureFolder", "is_feature_folder"]

FORMAT_VERSION = 2
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
UNFINISHED = ".cache/own.json"  # there while new files take the places of old ones
PICTURES = "pictures.safetensors"
KINDS = ("tokens", "layers")
UNREADABLE = {".pt": "pickled", ".pth": "pickled", ".pkl": "pickled", ".pickle": "pickled", ".npz": "a zip of arrays", ".bin": "of unknown content"}
REMEDY = "save one matrix per modality with numpy.save or safetensors"


def is_feature_folder(folder: Path) -> bool:
    """Whether there is at least one file in it that could be a modality, or will be once an interrupted run has written it."""
    return folder.is_dir() and (bool(_modality_files(folder)) or (folder / UNFINISHED).is_file())


def _modality_files(folder: Path) -> dict[str, list[Path]]:
    """Files by modality name: those whose name has one suffix, .npy or .safetensors."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith(".") and path.suffix in (".npy", ".safetensors") and path.name != PICTURES:
            stem = path.name.removesuffix(path.suffix)
            if "." not in stem:
                found.setdefault(stem, []).append(path)
    return found


class FeatureFolder:
    """Reads a feature folder, complaining with file, expected and found. Matrices are read at once, tokens, layers and pictures when asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise ValueError(f"{folder}: expected a folder of feature files, got {'a file' if folder.exists() else 'nothing of that name'}")
        if (folder / UNFINISHED).is_file():
            raise ValueError(f"{folder}: expected a finished folder, got one whose writing was interrupted; run the same command again")
        self.checked = (folder / CHECKSUMS).is_file()
        files = _modality_files(folder)
        self._refuse_unread(set(files))
        if len(files) < 2:
            raise ValueError(f"{folder}: expected at least 2 files NAME.npy or NAME.safetensors, got {sorted(files) or 'none'}; {REMEDY}")
        self.modalities: dict[str, Tensor] = {}
        self.present: dict[str, Tensor] = {}
        for name, paths in files.items():
            if not NAME.fullmatch(name):
                raise ValueError(f"{paths[0]}: expected a file name of letters, digits, _ and - that starts with a letter, got '{name}'")
            if len(paths) > 1:
                raise ValueError(f"{folder}: expected one file for modality '{name}', got {' and '.join(path.name for path in paths)}")
            self._read(name, paths[0])
        first = next(iter(self.modalities))
        self.size = len(self.modalities[first])
        for name, matrix in self.modalities.items():
            if len(matrix) != self.size:
                expected = f"{self.size} rows as in {files[first][0].name}"
                raise ValueError(f"{files[name][0]}: expected {expected}, got {len(matrix)}")
        self.about, self.items = self._read_items()

    def _refuse_unread(self, names: set[str]) -> None:
        """A file that holds data and would not be read is a mistake of whoever put it there, and a mask that is not read would train absent rows."""
        for path in sorted(self.folder.iterdir()):
            suffix = path.suffix.lower()
            if path.name.startswith(".") or not path.is_file() or path.name == PICTURES:
                continue
            if suffix in UNREADABLE:
                raise ValueError(f"{path}: expected .npy or .safetensors files alone, got one that is {UNREADABLE[suffix]}; {REMEDY}")
            if suffix in (".npy", ".safetensors"):
                stem, *kind = path.name[: -len(suffix)].split(".")
                known = not kind or (suffix == ".safetensors" and kind in ([k] for k in KINDS)) or (suffix == ".npy" and kind == ["present"])
                if not known or path.suffix != suffix or (kind and stem not in names):
                    wanted = "NAME.npy, NAME.safetensors, or NAME.present.npy, NAME.tokens.safetensors, NAME.layers.safetensors of a modality NAME"
                    raise ValueError(f"{path}: expected {wanted}, got a name that is none of these")

    def _verify(self, name: str) -> None:
        if self.checked:
            verify_checksums(self.folder, [name])

    def _read(self, name: str, path: Path) -> None:
        self._verify(path.name)
        mask_path = self.folder / f"{name}.present.npy"
        if path.suffix == ".npy":
            if mask_path.is_file():
                self._verify(mask_path.name)
            matrix, present = _read_npy(path), _read_npy(mask_path) if mask_path.is_file() else None
        else:
            tensors = read_tensors(path)
            unknown = sorted(set(tensors) - {"features", "present"})
            if "features" not in tensors or unknown:
                raise ValueError(f"{path}: expected a tensor 'features' and perhaps 'present', got {sorted(tensors)}")
            matrix, present = tensors["features"], tensors.get("present")
            if mask_path.is_file():
                raise ValueError(f"{mask_path}: expected a mask inside {path.name} (tensor 'present'), got one in a file of its own")
        if matrix.dim() != 2 or not matrix.is_floating_point() or 0 in matrix.shape:
            raise ValueError(f"{path}: expected a floating-point matrix [N, D], got {_dtype(matrix)} {list(matrix.shape)}")
        if present is not None:
            if present.dtype is not torch.bool or present.shape != matrix.shape[:1]:
                where = mask_path if path.suffix == ".npy" else f"{path}, tensor 'present'"
                raise ValueError(f"{where}: expected bool [{len(matrix)}], got {_dtype(present)} {list(present.shape)}")
            matrix = torch.where(present[:, None], matrix, 0)
        matrix = matrix.float().contiguous()
        bad = (~torch.isfinite(matrix)).any(1).nonzero()[:, 0]
        if len(bad):
            raise ValueError(f"{path}: expected finite float32 numbers, got NaN or Inf in {len(bad)} of {len(matrix)} rows, first in row {int(bad[0])}")
        self.modalities[name] = matrix
        if present is not None and not bool(present.all()):
            if not bool(present.any()):
                raise ValueError(f"{path}: expected at least one item that has this modality, got none")
            self.present[name] = present

    def _read_items(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        path, names = self.folder / "items.json", self.folder / "names.txt"
        if path.is_file():
            self._verify(path.name)
            try:
                about = json.loads(path.read_text(encoding="utf-8"))
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{path}: expected JSON, got a file that does not parse ({error})") from error
            if not isinstance(about, dict) or about.get("format") != FORMAT_VERSION:
                found = about.get("format") if isinstance(about, dict) else type(about).__name__
                raise ValueError(f"{path}: expected format {FORMAT_VERSION}, got {found}; a newer modalign may have written it")
            items = about.get("items")
            if not isinstance(items, list) or not all(isinstance(item, dict) and isinstance(item.get("name"), str) for item in items):
                raise ValueError(f"{path}: expected 'items', a list of objects with a 'name', got {type(items).__name__}")
            self._check_about(path, about, items)
            unknown = sorted(set(about.get("default", [])) - set(self.modalities))
            if unknown:
                raise ValueError(f"{path}: expected 'default' to name files of this folder {sorted(self.modalities)}, got {unknown}")
        elif names.is_file():
            self._verify(names.name)
            try:
                lines = names.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")  # splitlines would split at rarer characters too
            except UnicodeDecodeError as error:
                raise ValueError(f"{names}: expected UTF-8 text, got a file that does not decode ({error})") from error
            items = [{"name": line.strip()} for line in lines]
            empty = [number for number, item in enumerate(items, 1) if not item["name"]]
            if empty:
                raise ValueError(f"{names}: expected a caption in every line, got none in {len(empty)} lines, first in line {empty[0]}")
            about, path = {}, names
        else:
            return {}, [{"name": f"item {i}"} for i in range(self.size)]
        if len(items) != self.size:
            raise ValueError(f"{path}: expected {self.size} items as there are rows, got {len(items)}")
        return about, items

    def _check_about(self, path: Path, about: dict[str, Any], items: list[dict[str, Any]]) -> None:
        def demand(what: str, right: bool, expected: str, found: Any) -> None:
            if not right:
                raise ValueError(f"{path}: expected {what} to be {expected}, got {found!r}")

        def texts(value: Any) -> bool:
            return isinstance(value, list) and all(isinstance(one, str) for one in value)

        for name in ("test_size", "validation_size"):
            demand(f"'{name}'", about.get(name) is None or type(about[name]) is int, "a whole number", about.get(name))
        for name in ("name", "licence", "source"):
            demand(f"'{name}'", isinstance(about.get(name, ""), str), "text", about.get(name))
        demand("'default'", texts(about.get("default", [])), "a list of modality names", about.get("default"))
        described = about.get("modalities", {})
        demand("'modalities'", isinstance(described, dict) and all(isinstance(e, dict) for e in described.values()), "an object of objects", described)
        for name, entry in described.items():
            for key in ("encoder", "encoder_code"):
                demand(f"'{key}' of '{name}'", isinstance(entry.get(key, ""), str), "text", entry.get(key))
            if name in self.modalities and "width" in entry:
                demand(f"'width' of '{name}'", entry["width"] == self.modalities[name].shape[1], f"{self.modalities[name].shape[1]} as in its file", entry["width"])
        for number, item in enumerate(items):
            demand(f"'group' of item {number}", isinstance(item.get("group") or "", str), "text", item.get("group"))
            demand(f"'keywords' of item {number}", texts(item.get("keywords", [])), "a list of texts", item.get("keywords"))

    def pictures(self) -> PictureArray | None:
        path = self.folder / PICTURES
        if not path.is_file():
            return None
        shape, dtype = _shape(path, "pictures")
        if dtype != "U8" or len(shape) != 4 or shape[0] != self.size or shape[1] != shape[2] or shape[3] != 3:
            raise ValueError(f"{path}: expected 'pictures' uint8 [{self.size}, side, side, 3], got {dtype} {shape}")
        return PictureArray(path, shape[1], functools.partial(self._verify, path.name))

    def tokens(self, name: str) -> tuple[Tensor, Tensor]:
        """Tokens of a modality: ([T, D], offsets [N + 1])."""
        path = self._extra(name, "tokens")
        tensors = read_tensors(path)
        if set(tensors) != {"tokens", "offsets"}:
            raise ValueError(f"{path}: expected tensors 'tokens' and 'offsets', got {sorted(tensors)}")
        tokens, offsets = tensors["tokens"], tensors["offsets"]
        if tokens.dim() != 2 or not tokens.is_floating_point():
            raise ValueError(f"{path}: expected floating-point 'tokens' [T, D], got {_dtype(tokens)} {list(tokens.shape)}")
        wanted = f"int64 'offsets' [{self.size + 1}] rising from 0 to {len(tokens)}"
        if offsets.dtype is not torch.int64 or offsets.shape != (self.size + 1,):
            raise ValueError(f"{path}: expected {wanted}, got {_dtype(offsets)} {list(offsets.shape)}")
        if int(offsets[0]) != 0 or int(offsets[-1]) != len(tokens) or bool((offsets.diff() < 0).any()):
            raise ValueError(f"{path}: expected {wanted}, got others, ending with {int(offsets[-1])}")
        _demand_finite(path, tokens)
        return tokens, offsets

    def layers(self, name: str) -> Tensor:
        """Pooled outputs of every layer of a modality's encoder: [N, L, D]."""
        path = self._extra(name, "layers")
        tensors = read_tensors(path)
        layers = tensors.get("layers")
        if layers is None or layers.dim() != 3 or len(layers) != self.size or not layers.is_floating_point():
            found = "none" if layers is None else f"{_dtype(layers)} {list(layers.shape)}"
            raise ValueError(f"{path}: expected floating-point 'layers' [{self.size}, L, D], got {found}")
        _demand_finite(path, layers)
        return layers

    def _extra(self, name: str, kind: str) -> Path:
        path = self.folder / f"{name}.{kind}.safetensors"
        if not path.is_file():
            there = sorted(p.name.split(".")[0] for p in self.folder.glob(f"*.{kind}.safetensors"))
            raise ValueError(f"{path}: expected the {kind} of modality '{name}', got no such file; there are {kind} for {there or 'none'}")
        self._verify(path.name)
        return path


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _demand_finite(path: Path, values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{path}: expected finite numbers, got {int((~torch.isfinite(values)).sum())} that are NaN or Inf")


def _read_npy(path: Path) -> Tensor:
    """An array of a .npy file; one that would have to be unpickled is refused, and so is one of strings."""
    import numpy as np

    try:
        array = np.load(path, allow_pickle=False)
    except Exception as error:  # numpy's reader raises what its parser and its allocator raise
        raise ValueError(f"{path}: expected a .npy file of numbers, got one that does not read ({' '.join(str(error).split())})") from error
    if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
        raise ValueError(f"{path}: expected a .npy file of numbers, got {array.dtype}")
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))


def _shape(path: Path, name: str) -> tuple[list[int], str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            found = file.get_slice(name)
            return found.get_shape(), found.get_dtype()
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file with a tensor '{name}', got one without ({error})") from error
