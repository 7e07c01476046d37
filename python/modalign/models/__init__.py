"""Alignment models and the closed-form baseline they are measured against."""

from .cca import CanonicalCorrelation, CanonicalCorrelationConfig
from .gram_aligner import AlignerOutput, GramAligner, GramAlignerConfig
from .reduction import PrincipalComponents
from .training import Checkpoint, TrainingConfig, TrainingHistory, fit_aligner, select_correlation, validation_score

__all__ = [
    "AlignerOutput",
    "CanonicalCorrelation",
    "CanonicalCorrelationConfig",
    "Checkpoint",
    "GramAligner",
    "GramAlignerConfig",
    "PrincipalComponents",
    "TrainingConfig",
    "TrainingHistory",
    "fit_aligner",
    "select_correlation",
    "validation_score",
]
