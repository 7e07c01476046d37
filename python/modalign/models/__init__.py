"""Alignment models and the closed-form baseline they are measured against."""

from .cca import CanonicalCorrelation, CanonicalCorrelationConfig
from .gram_aligner import AlignerOutput, GramAligner, GramAlignerConfig
from .training import TrainingConfig, TrainingHistory, fit_aligner, select_correlation, validation_score

__all__ = [
    "AlignerOutput",
    "CanonicalCorrelation",
    "CanonicalCorrelationConfig",
    "GramAligner",
    "GramAlignerConfig",
    "TrainingConfig",
    "TrainingHistory",
    "fit_aligner",
    "select_correlation",
    "validation_score",
]
