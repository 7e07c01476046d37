"""Neighbour lists as sequences: how much of their order two spaces share. [Platonic Representation Hypothesis, ICML 2024]"""

from __future__ import annotations

import torch
from torch import Tensor

from ._neighbors import check_paired, neighbor_count, neighbor_lists

__all__ = ["edit_distance_knn", "lcs_knn"]


def lcs_knn(X: Tensor, Y: Tensor, k: int | str = 10, *, normalize: bool = True) -> Tensor:
    """The mean length of the longest common subsequence of the two lists of each item, nearest first: 0 to k, as published, not divided by k. float32 scalar.

    >>> import torch
    >>> x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    >>> lcs_knn(x, x, 3)
    tensor(3.)

    Arguments and errors as for `mutual_knn`. k steps over arrays [n, k].
    """
    x, y = check_paired("lcs_knn", X, Y)
    a, b = (neighbor_lists(each, neighbor_count("lcs_knn", k, len(x)), normalize) for each in (x, y))
    best = torch.zeros(len(a), a.shape[1] + 1, dtype=torch.int64, device=a.device)  # of the first elements of a with each beginning of b
    for column in a.unbind(1):
        # A row of the table rises to the right, so the left neighbour's part of the recursion is a running maximum.
        with_match = torch.where((column[:, None] == b) & (b >= 0), best[:, :-1] + 1, best[:, 1:])
        best = torch.nn.functional.pad(with_match.cummax(1).values, (1, 0))
    return best[:, -1].double().mean().float()


def edit_distance_knn(X: Tensor, Y: Tensor, k: int | str = 10, *, normalize: bool = True) -> Tensor:
    """1 less the mean Levenshtein distance of the two lists of each item, divided by k: 1 for equal lists. float32 scalar.

    >>> import torch
    >>> x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    >>> edit_distance_knn(x, x, 3)
    tensor(1.)

    Arguments and errors as for `mutual_knn`. k steps over arrays [n, k].
    """
    x, y = check_paired("edit_distance_knn", X, Y)
    a, b = (neighbor_lists(each, neighbor_count("edit_distance_knn", k, len(x)), normalize) for each in (x, y))
    place = torch.arange(a.shape[1] + 1, device=a.device)
    distance = place.expand(len(a), -1)
    for step, column in enumerate(a.unbind(1), 1):
        change = torch.minimum(distance[:, 1:] + 1, distance[:, :-1] + (column[:, None] != b))
        # An insertion adds 1 for each step to the right: a running minimum of what is left when these are taken off.
        distance = torch.cat([torch.full_like(distance[:, :1], step), change], 1)
        distance = (distance - place).cummin(1).values + place
    return (1 - distance[:, -1].double().mean() / a.shape[1]).float()
