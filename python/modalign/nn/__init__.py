"""Modules over the ops: losses and heads that have parameters or state. `nn.functional` has the losses that have none."""

from . import functional
from .contrastive_losses import ClipLoss, GramContrastiveLoss, SigLipLoss, TriangleContrastiveLoss
from .feature_queue import FeatureQueue
from .identity_classifier import IdentityClassifier
from .late_fusion_gate import LateFusionGate
from .masked_cross_modal_reasoner import MaskedCrossModalReasoner
from .triple_contrast import TripleContrast

__all__ = [
    "ClipLoss",
    "FeatureQueue",
    "GramContrastiveLoss",
    "IdentityClassifier",
    "LateFusionGate",
    "MaskedCrossModalReasoner",
    "SigLipLoss",
    "TriangleContrastiveLoss",
    "TripleContrast",
    "functional",
]
