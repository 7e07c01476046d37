"""Paired data: what comes with the package, your own feature matrices, splits by caption, and the frozen encoders behind the features."""

from .basis import FeatureBasis
from .dataset import FeatureStatistics, PairedDataset, Split, available, from_features, from_folder, load
from .encoders import EfficientNetLiteImageEncoder, EncoderUnavailable, MiniLMTextEncoder
from .modality_transforms import MODALITY_TRANSFORMS, modality_transform

__all__ = [
    "EfficientNetLiteImageEncoder",
    "EncoderUnavailable",
    "FeatureBasis",
    "MODALITY_TRANSFORMS",
    "FeatureStatistics",
    "MiniLMTextEncoder",
    "PairedDataset",
    "Split",
    "available",
    "from_features",
    "from_folder",
    "load",
    "modality_transform",
]
