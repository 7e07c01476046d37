"""How well modalities match: retrieval between two modalities and with tuples of several, zero-shot classification."""

from .joint_retrieval import JointRetrieval, joint_retrieval
from .retrieval import Retrieval, chance_retrieval, hit_ranks, median_rank, recall_at_k, retrieval
from .zero_shot import ZeroShot, zero_shot

__all__ = [
    "JointRetrieval",
    "Retrieval",
    "ZeroShot",
    "chance_retrieval",
    "hit_ranks",
    "joint_retrieval",
    "median_rank",
    "recall_at_k",
    "retrieval",
    "zero_shot",
]
