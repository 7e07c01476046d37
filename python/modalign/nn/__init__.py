"""Modules over the ops: losses, heads and attention layers, which have parameters or state. `nn.functional` has the losses that have none."""

from . import functional
from .alignment_heads import LinearHead, LowRankResidualHead, MLPHead
from .composite_decoder_layer import CompositeDecoderLayer
from .contrastive_losses import ClipLoss, CosineSumContrastiveLoss, GramContrastiveLoss, SigLipLoss, TriangleContrastiveLoss
from .decoder_layer import DecoderLayer, GatedFeedForward
from .dual_cross_attention import DualCrossAttention, pool_frames
from .dual_enhancement import DualEnhancement, dual_perspective_crops
from .dual_semantic_mapping import DualSemanticMapping
from .dynamic_mask_attention import DynamicMaskAttention, ScoredKeys
from .encoder_layer import EncoderLayer
from .feature_queue import FeatureQueue
from .gated_cross_attention import GatedCrossAttention, HybridDecoderLayer
from .gram_matching import GramMatching
from .hierarchical_temporal_encoder import HierarchicalTemporalEncoder, HierarchicalTemporalFeatures, HierarchicalTemporalLayer
from .identity_classifier import IdentityClassifier
from .late_fusion_gate import LateFusionGate
from .lexical_head import LexicalHead
from .local_window_refine import LocalWindowRefine
from .masked_attention import KeyValues, MaskedAttention, rotate
from .masked_cross_modal_reasoner import MaskedCrossModalReasoner
from .neighbor_aware_layer import NeighborAwareLayer
from .no_visual_attention_layer import NoVisualAttentionLayer
from .point_to_region_packer import PointToRegionPacker, SlowFastPacker
from .prototype_alignment import PrototypeAlignment
from .structure_regularizer import StructureRegularizer
from .text_guided_encoder import TextGuidedEncoder, TextGuidedFeatures
from .text_to_vision_additive import TextToVisionAdditive, VisionAdditiveAttention
from .threshold_merger import ThresholdMerger, merge_budget, pad_packed
from .token_merging import MergedPass, TokenMerger, TokenMerging, merge_schedule, patch
from .token_streams import TokenStreams, token_streams
from .triple_contrast import TripleContrast
from .uncertainty_weighting import UncertaintyWeighting
from .universal_projection import UniversalProjection
from .view_embedding import ViewEmbedding

__all__ = [
    "ClipLoss",
    "CompositeDecoderLayer",
    "CosineSumContrastiveLoss",
    "DecoderLayer",
    "DualCrossAttention",
    "DualEnhancement",
    "DualSemanticMapping",
    "DynamicMaskAttention",
    "EncoderLayer",
    "FeatureQueue",
    "GatedCrossAttention",
    "GatedFeedForward",
    "GramContrastiveLoss",
    "GramMatching",
    "HierarchicalTemporalEncoder",
    "HierarchicalTemporalFeatures",
    "HierarchicalTemporalLayer",
    "HybridDecoderLayer",
    "IdentityClassifier",
    "KeyValues",
    "LateFusionGate",
    "LexicalHead",
    "LinearHead",
    "LocalWindowRefine",
    "LowRankResidualHead",
    "MLPHead",
    "MaskedAttention",
    "MaskedCrossModalReasoner",
    "MergedPass",
    "NeighborAwareLayer",
    "NoVisualAttentionLayer",
    "PointToRegionPacker",
    "PrototypeAlignment",
    "ScoredKeys",
    "SigLipLoss",
    "SlowFastPacker",
    "StructureRegularizer",
    "TextGuidedEncoder",
    "TextGuidedFeatures",
    "TextToVisionAdditive",
    "ThresholdMerger",
    "TokenMerger",
    "TokenMerging",
    "TokenStreams",
    "TriangleContrastiveLoss",
    "TripleContrast",
    "UncertaintyWeighting",
    "UniversalProjection",
    "ViewEmbedding",
    "VisionAdditiveAttention",
    "dual_perspective_crops",
    "functional",
    "merge_budget",
    "merge_schedule",
    "pad_packed",
    "patch",
    "pool_frames",
    "rotate",
    "token_streams",
]
