"""The data sets that `modalign prepare` knows, one module each: reading and drawing, no encoder."""

from . import clipart, emoji, footprints, furniture, openmoji, stamps
from ._items import DebianPackage, Item, Modality, PythonPackage, Reading, Source

__all__ = ["SOURCES", "DebianPackage", "Item", "Modality", "PythonPackage", "Reading", "Source"]

SOURCES: dict[str, Source] = {module.SOURCE.name: module.SOURCE for module in (emoji, openmoji, clipart, furniture, stamps, footprints)}
