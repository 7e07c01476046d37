"""How well modalities match: retrieval between two modalities and with tuples of several, zero-shot classification, similarity of representations."""

from .alignment_score import alignment_score
from .cka import cka, cka_rbf, unbiased_cka
from .cknna import cknna
from .clustering import Clustering, clustering
from .cycle_knn import cycle_knn
from .dense_misalignment import CaptionWords, caption_words, clip4dm_attribution, clip_score, f_clipscore, misaligned_words, word_attribution
from .hcs import hcs, l_hop_cka
from .implicit_alignment import implicit_alignment
from .joint_retrieval import JointRetrieval, joint_retrieval
from .match_auc import match_auc
from .mutual_knn import knn_overlap, mutual_knn
from .null_calibration import NullCalibration, null_calibration
from .ordered_knn import edit_distance_knn, lcs_knn
from .procrustes import procrustes
from .retrieval import (
    Retrieval,
    chance_retrieval,
    hit_ranks,
    mean_reciprocal_rank,
    median_rank,
    recall_at_k,
    retrieval,
    search_ranks,
    search_retrieval,
)
from .rsa import rsa
from .select_layers import LayerSelection, select_layers
from .svcca import pwcca, svcca
from .trustworthiness import continuity, trustworthiness
from .zero_shot import ZeroShot, zero_shot

__all__ = [
    "CaptionWords",
    "Clustering",
    "JointRetrieval",
    "LayerSelection",
    "NullCalibration",
    "Retrieval",
    "ZeroShot",
    "alignment_score",
    "caption_words",
    "chance_retrieval",
    "cka",
    "cka_rbf",
    "cknna",
    "clip4dm_attribution",
    "clip_score",
    "clustering",
    "continuity",
    "cycle_knn",
    "edit_distance_knn",
    "f_clipscore",
    "hcs",
    "hit_ranks",
    "implicit_alignment",
    "joint_retrieval",
    "knn_overlap",
    "l_hop_cka",
    "lcs_knn",
    "match_auc",
    "mean_reciprocal_rank",
    "median_rank",
    "misaligned_words",
    "mutual_knn",
    "null_calibration",
    "procrustes",
    "pwcca",
    "recall_at_k",
    "retrieval",
    "rsa",
    "search_ranks",
    "search_retrieval",
    "select_layers",
    "svcca",
    "trustworthiness",
    "unbiased_cka",
    "word_attribution",
    "zero_shot",
]
