"""Alignment models and the closed-form baseline they are measured against."""

from .cca import CanonicalCorrelation, CanonicalCorrelationConfig
from .gram_aligner import AlignerOutput, GramAligner, GramAlignerConfig
from .linear_alignment import LinearAlignment, LinearAlignmentConfig
from .reduction import PrincipalComponents
from .training import Checkpoint, TrainingConfig, TrainingHistory, fit_aligner, select_correlation, validation_score

__all__ = [
    "AlignerOutput",
    "CanonicalCorrelation",
    "CanonicalCorrelationConfig",
    "Checkpoint",
    "GramAligner",
    "GramAlignerConfig",
    "LinearAlignment",
    "LinearAlignmentConfig",
    "PrincipalComponents",
    "TrainingConfig",
    "TrainingHistory",
    "fit_aligner",
    "select_correlation",
    "validation_score",
]
