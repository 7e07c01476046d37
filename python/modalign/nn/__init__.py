"""Modules over the ops: losses and heads that have parameters or state. `nn.functional` has the losses that have none."""

from . import functional
from .alignment_heads import LinearHead, LowRankResidualHead, MLPHead
from .contrastive_losses import ClipLoss, CosineSumContrastiveLoss, GramContrastiveLoss, SigLipLoss, TriangleContrastiveLoss
from .dual_semantic_mapping import DualSemanticMapping
from .feature_queue import FeatureQueue
from .gram_matching import GramMatching
from .identity_classifier import IdentityClassifier
from .late_fusion_gate import LateFusionGate
from .lexical_head import LexicalHead
from .masked_cross_modal_reasoner import MaskedCrossModalReasoner
from .prototype_alignment import PrototypeAlignment
from .structure_regularizer import StructureRegularizer
from .triple_contrast import TripleContrast
from .uncertainty_weighting import UncertaintyWeighting
from .universal_projection import UniversalProjection
from .view_embedding import ViewEmbedding

__all__ = [
    "ClipLoss",
    "CosineSumContrastiveLoss",
    "DualSemanticMapping",
    "FeatureQueue",
    "GramContrastiveLoss",
    "GramMatching",
    "IdentityClassifier",
    "LateFusionGate",
    "LexicalHead",
    "LinearHead",
    "LowRankResidualHead",
    "MLPHead",
    "MaskedCrossModalReasoner",
    "PrototypeAlignment",
    "SigLipLoss",
    "StructureRegularizer",
    "TriangleContrastiveLoss",
    "TripleContrast",
    "UncertaintyWeighting",
    "UniversalProjection",
    "ViewEmbedding",
    "functional",
]
