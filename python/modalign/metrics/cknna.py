"""Kernel alignment on the edges that both neighbour graphs have. [Platonic Representation Hypothesis, ICML 2024]"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import knn_values
from ..ops._arguments import check_flag
from ._neighbors import check_paired, neighbor_count, neighbor_lists
from .cka import hsic_unbiased_of_sums, ratio

__all__ = ["cknna"]


def cknna(X: Tensor, Y: Tensor, k: int | str = 10, *, unbiased: bool = True, distance_agnostic: bool = False, normalize: bool = True) -> Tensor:
    """``s(K, L) / (sqrt(s(K, K) s(L, L)) + 1e-6)``, s the HSIC of kernels that keep the entries (i, j) with j among the k nearest of i in both spaces.

    >>> import torch
    >>> x = torch.tensor([[1.0, 0.0], [0.9, 0.2], [0.0, 1.0], [0.2, 0.9], [1.0, 1.0]])
    >>> cknna(x, x.flip(1), 2)
    tensor(1.0000)

    X [n, D], Y [n, E], n of 4 or more (2 for the biased form); k from 1 to n - 1 or a rule (`mutual_knn`). unbiased: HSIC's unbiased estimate, a point not its own neighbour;
    False: the biased one, itself included. As published the estimate pairs K_ij with L_ji, so that an edge counts where both spaces have it both ways.
    distance_agnostic: the share of common edges instead, which is `mutual_knn`. Differentiable at fixed neighbours (else not). From the lists alone: memory n k, no
    matrix n x n. Raises as `mutual_knn`.
    """
    x, y = check_paired("cknna", X, Y, fewest=4 if unbiased else 2)
    check_flag("cknna", "unbiased", unbiased)
    n, count = len(x), neighbor_count("cknna", k, len(x))
    if normalize:
        x, y = (torch.nn.functional.normalize(each.double(), dim=1) for each in (x, y))
    else:
        x, y = x.double(), y.double()
    lists = [neighbor_lists(each, count, False, exclude_self=unbiased) for each in (x, y)]
    own = torch.arange(n, device=x.device)[:, None]
    codes = [((own * n + each)[each >= 0]).sort().values for each in lists]
    common = codes[0][torch.isin(codes[0], codes[1], assume_unique=True)]
    if distance_agnostic:
        return (len(common) / torch.tensor(float(n * count), dtype=torch.float64, device=x.device)).to(torch.promote_types(X.dtype, torch.float32))

    def similarity(a: Tensor, b: Tensor, code: Tensor) -> Tensor:
        row, column = code // n, code % n
        weights = [knn_values(z[row], z, column[:, None], metric="dot")[:, 0] for z in (a, b)]
        turned = column * n + row
        place = torch.searchsorted(code, turned).clamp(max=max(0, len(code) - 1))
        both = code[place] == turned if len(code) else turned.bool()
        product = (weights[0][both] * weights[1][place[both]]).sum()
        zero = a.new_zeros(n)
        rows, columns = ([zero.index_add(0, ends, w) for w in weights] for ends in (row, column))
        sums = [w.sum() for w in weights]
        if unbiased:
            return hsic_unbiased_of_sums(product, sums[0], sums[1], columns[0] @ rows[1], n)
        return product - (columns[0] @ rows[1] + columns[1] @ rows[0]) / n + sums[0] * sums[1] / n**2

    cross, own_x, own_y = similarity(x, y, common), similarity(x, x, codes[0]), similarity(y, y, codes[1])
    return ratio("cknna", cross, own_x, own_y, X, Y)
