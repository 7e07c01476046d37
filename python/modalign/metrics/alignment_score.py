"""Every similarity of representations by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .cka import cka, cka_rbf, unbiased_cka
from .cknna import cknna
from .cycle_knn import cycle_knn
from .hcs import hcs, l_hop_cka
from .mutual_knn import mutual_knn
from .ordered_knn import edit_distance_knn, lcs_knn
from .procrustes import procrustes
from .rsa import rsa
from .svcca import pwcca, svcca

__all__ = ["ALIGNMENT_SCORES", "NEIGHBORHOOD_SCORES", "alignment_score"]

NEIGHBORHOOD_SCORES: dict[str, Callable[..., Tensor]] = {
    "mutual_knn": mutual_knn,
    "cycle_knn": cycle_knn,
    "lcs_knn": lcs_knn,
    "edit_distance_knn": edit_distance_knn,
    "cknna": cknna,
}
ALIGNMENT_SCORES: dict[str, Callable[..., Tensor]] = {
    **NEIGHBORHOOD_SCORES,
    "cka": cka,
    "unbiased_cka": unbiased_cka,
    "cka_rbf": cka_rbf,
    "svcca": svcca,
    "pwcca": pwcca,
    "procrustes": procrustes,
    "rsa": rsa,
    "hcs": hcs,
    "l_hop_cka": l_hop_cka,
}


def alignment_score(name: str, X: Tensor, Y: Tensor, topk: int | str | None = 10, **options: Any) -> Tensor:
    """The similarity `name` of two spaces whose rows are the same items; `topk` is the k of the neighbourhood metrics, the others do not look at it.

    >>> import torch
    >>> alignment_score("mutual_knn", torch.eye(4), torch.eye(4), topk=2)
    tensor(1.)

    name: one of mutual_knn, cycle_knn, lcs_knn, edit_distance_knn, cknna, cka, unbiased_cka, cka_rbf, svcca, pwcca, procrustes, rsa, hcs, l_hop_cka; options are those of the function
    of this name. X [n, D], Y [n, E]. Returns a scalar. Raises ValueError for another name, and what the function raises.
    """
    if name not in ALIGNMENT_SCORES:
        raise ValueError(f"alignment_score: name must be one of {', '.join(ALIGNMENT_SCORES)}, got {name!r}")
    if name in NEIGHBORHOOD_SCORES:
        if topk is None:
            raise ValueError(f"alignment_score: topk must be given for {name}, got None")
        options = {"k": topk, **options}
    return ALIGNMENT_SCORES[name](X, Y, **options)
