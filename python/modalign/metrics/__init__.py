"""How well modalities match: retrieval."""

from .retrieval import Retrieval, chance_retrieval, hit_ranks, median_rank, recall_at_k, retrieval

__all__ = ["Retrieval", "chance_retrieval", "hit_ranks", "median_rank", "recall_at_k", "retrieval"]
