"""Alignment models and the closed-form baseline they are measured against."""

from .canonical_similarity import CanonicalSimilarity, CanonicalSimilarityConfig
from .cca import CanonicalCorrelation, CanonicalCorrelationConfig
from .entity_aligner import EntityAligner, EntityAlignerConfig, EntityGraph, EntityRanks
from .gram_aligner import AlignerOutput, GramAligner, GramAlignerConfig
from .incomplete_multiview import IncompleteMultiview, IncompleteMultiviewConfig, pad_view
from .linear_alignment import LinearAlignment, LinearAlignmentConfig
from .pseudo_labels import PseudoLabels
from .reduction import PrincipalComponents
from .relative_representation import RelativeRepresentation, relative_representation
from .self_repellent_anchors import random_walk_visits, self_repellent_anchors
from .training import Checkpoint, TrainingConfig, TrainingHistory, fit_aligner, select_correlation, validation_score

__all__ = [
    "AlignerOutput",
    "CanonicalCorrelation",
    "CanonicalCorrelationConfig",
    "CanonicalSimilarity",
    "CanonicalSimilarityConfig",
    "Checkpoint",
    "EntityAligner",
    "EntityAlignerConfig",
    "EntityGraph",
    "EntityRanks",
    "GramAligner",
    "GramAlignerConfig",
    "IncompleteMultiview",
    "IncompleteMultiviewConfig",
    "LinearAlignment",
    "LinearAlignmentConfig",
    "PrincipalComponents",
    "PseudoLabels",
    "RelativeRepresentation",
    "TrainingConfig",
    "TrainingHistory",
    "fit_aligner",
    "pad_view",
    "random_walk_visits",
    "relative_representation",
    "select_correlation",
    "self_repellent_anchors",
    "validation_score",
]
