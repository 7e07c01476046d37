"""How well modalities match: retrieval between two modalities and with tuples of several, zero-shot classification."""

from .dense_misalignment import CaptionWords, caption_words, clip4dm_attribution, clip_score, f_clipscore, misaligned_words, word_attribution
from .joint_retrieval import JointRetrieval, joint_retrieval
from .retrieval import Retrieval, chance_retrieval, hit_ranks, median_rank, recall_at_k, retrieval
from .zero_shot import ZeroShot, zero_shot

__all__ = [
    "CaptionWords",
    "JointRetrieval",
    "Retrieval",
    "ZeroShot",
    "caption_words",
    "chance_retrieval",
    "clip4dm_attribution",
    "clip_score",
    "f_clipscore",
    "hit_ranks",
    "joint_retrieval",
    "median_rank",
    "misaligned_words",
    "recall_at_k",
    "retrieval",
    "word_attribution",
    "zero_shot",
]
