"""Differentiable ops: one file per op, its raw kernels in `_C.so`. Public names are re-exported here, one line per op."""

from .._load import load_library

load_library()  # the files below tell torch about the raw ops, so these have to be there first

from ._results import AttentionRowStatistics, HardNegatives, Matches, NeighborGraph, Neighbors, SegmentMax, Selection  # noqa: E402, F401
from ._token_match import TokenMatch  # noqa: E402, F401
from .attention_column_sum import attention_column_sum  # noqa: E402
from .attention_columns import attention_columns  # noqa: E402
from .attention_power_iteration import attention_power_iteration  # noqa: E402
from .attention_row_statistics import attention_row_statistics  # noqa: E402
from .attention_rows import attention_rows  # noqa: E402
from .attention_segment_mass import attention_segment_mass  # noqa: E402
from .clip_hard_negatives import clip_hard_negatives  # noqa: E402
from .clip_loss import clip_loss  # noqa: E402
from .cosine_sum_contrastive_loss import cosine_sum_contrastive_loss  # noqa: E402
from .dynamic_mask_attention import dynamic_mask_attention  # noqa: E402
from .dual_softmax_matching import dual_softmax_matching  # noqa: E402
from .gram_contrastive_loss import gram_contrastive_loss  # noqa: E402
from .gram_hard_negatives import gram_hard_negatives  # noqa: E402
from .gram_target_rank import gram_target_rank  # noqa: E402
from .gram_topk import gram_topk  # noqa: E402
from .gram_volume import gram_volume  # noqa: E402
from .knn import knn  # noqa: E402
from .knn_graph import knn_graph  # noqa: E402
from .knn_values import knn_values  # noqa: E402
from .masked_attention import masked_attention  # noqa: E402
from .masked_attention_varlen import masked_attention_varlen  # noqa: E402
from .match_tokens import match_tokens  # noqa: E402
from .merge_tokens import MergedTokens, merge_tokens  # noqa: E402, F401
from .mine_hard_negatives import mine_hard_negatives  # noqa: E402
from .mutual_nearest import mutual_nearest  # noqa: E402
from .neighborhood_attention import neighborhood_attention  # noqa: E402
from .paired_gram_volume import paired_gram_volume  # noqa: E402
from .pairwise_logsumexp import pairwise_logsumexp  # noqa: E402
from .segment_max_similarity import segment_max_similarity  # noqa: E402
from .scaled_dot_product_attention import scaled_dot_product_attention  # noqa: E402
from .select_diverse import select_diverse  # noqa: E402
from .siglip_loss import siglip_loss  # noqa: E402
from .structure_loss import structure_loss  # noqa: E402
from .target_rank import target_rank  # noqa: E402
from .triangle_area import triangle_area  # noqa: E402
from .triangle_contrastive_loss import triangle_contrastive_loss  # noqa: E402
from .virtual_unmerge_attention import VirtualUnmergeCache, virtual_unmerge_attention  # noqa: E402, F401

__all__ = [
    "attention_column_sum",
    "attention_columns",
    "attention_power_iteration",
    "attention_row_statistics",
    "attention_rows",
    "attention_segment_mass",
    "clip_hard_negatives",
    "clip_loss",
    "cosine_sum_contrastive_loss",
    "dual_softmax_matching",
    "dynamic_mask_attention",
    "gram_contrastive_loss",
    "gram_hard_negatives",
    "gram_target_rank",
    "gram_topk",
    "gram_volume",
    "knn",
    "knn_graph",
    "knn_values",
    "masked_attention",
    "masked_attention_varlen",
    "match_tokens",
    "merge_tokens",
    "mine_hard_negatives",
    "mutual_nearest",
    "neighborhood_attention",
    "paired_gram_volume",
    "pairwise_logsumexp",
    "scaled_dot_product_attention",
    "segment_max_similarity",
    "select_diverse",
    "siglip_loss",
    "structure_loss",
    "target_rank",
    "triangle_area",
    "triangle_contrastive_loss",
    "virtual_unmerge_attention",
]
