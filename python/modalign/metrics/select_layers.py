"""Which layers of two encoders to align: the most similar pair. [STRUCTURE, NeurIPS 2025, section 3]"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ops._arguments import describe
from ._neighbors import in_common, neighbor_count, neighbor_lists
from .alignment_score import ALIGNMENT_SCORES, NEIGHBORHOOD_SCORES, alignment_score
from .null_calibration import NullCalibration, calibrated, check_calibration, permuted

__all__ = ["LayerSelection", "select_layers"]

Layers = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class LayerSelection:
    """The scores of all pairs of layers and the pair chosen.

    pair: (source layer, aligned layer), from 0. scores: Tensor [L1, L2]. metric, k (None where the metric has no neighbours) and samples: how they were found.
    calibration: of the largest score (or the mean), if permutations were asked for. considered: bool [L1, L2], False for layers left out.
    """

    pair: tuple[int, int]
    scores: Tensor
    metric: str
    k: int | None
    samples: int
    considered: Tensor = field(repr=False)
    calibration: NullCalibration | None = None

    def quantile_pairs(self, bins: int = 5, seed: int = 0) -> dict[str, tuple[int, int]]:
        """Pairs for an ablation: one drawn out of each of `bins` equal parts of the scores in order, and the best, the worst and the last."""
        if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
            raise ValueError(f"quantile_pairs: bins must be a whole number of 1 or more, got {describe(bins)}")
        pairs = self.considered.nonzero().tolist()
        pairs.sort(key=lambda pair: float(self.scores[pair[0], pair[1]]))
        if bins > len(pairs):
            raise ValueError(f"quantile_pairs: bins must be at most the number of pairs, {len(pairs)}, got {bins}")
        generator, found = torch.Generator().manual_seed(seed), {}
        for part in range(bins):
            first, last = part * len(pairs) // bins, (part + 1) * len(pairs) // bins
            found[f"bin {part + 1}"] = tuple(pairs[first + int(torch.randint(last - first, (), generator=generator))])
        return {**found, "best": self.pair, "worst": tuple(pairs[0]), "last": (len(self.scores) - 1, self.scores.shape[1] - 1)}

    def plot(self, path: str | Path, source_name: str = "source layer", aligned_name: str = "aligned layer") -> None:
        """A heat map of the scores with the chosen pair framed; the format is that of the file's name."""
        try:
            from matplotlib.figure import Figure
            from matplotlib.patches import Rectangle
        except ImportError:
            raise ImportError("LayerSelection.plot needs matplotlib: pip install matplotlib") from None
        figure = Figure(figsize=(1.6 + 0.3 * self.scores.shape[1], 1.2 + 0.3 * len(self.scores)), layout="constrained")
        panel = figure.subplots()
        image = panel.imshow(self.scores.cpu().numpy(), origin="lower", aspect="auto", cmap="viridis")
        panel.add_patch(Rectangle((self.pair[1] - 0.5, self.pair[0] - 0.5), 1, 1, fill=False, edgecolor="white", linewidth=2))
        panel.set(xlabel=aligned_name, ylabel=source_name, title=f"{self.metric}: {self.pair[0]}, {self.pair[1]}")
        figure.colorbar(image)
        figure.savefig(path)


def select_layers(
    source_layers: Layers,
    aligned_layers: Layers,
    *,
    metric: str = "mutual_knn",
    k: int | str = "rice",
    samples: int | None = 5000,
    seed: int = 0,
    exclude: Sequence[tuple[int | None, int | None]] = (),
    permutations: int = 0,
    alpha: float = 0.05,
    aggregate: str = "max",
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> LayerSelection:
    """The similarity of every pair of layers of two encoders, and the pair with the largest; of equal ones the deepest.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> shared = torch.randn(60, 8)
    >>> source = [torch.randn(60, 8), shared, torch.randn(60, 8)]
    >>> select_layers(source, [torch.randn(60, 5), shared @ torch.randn(8, 12)], k=5).pair
    (1, 1)

    Parameters
    ----------
    source_layers, aligned_layers : Tensor [n, L, D], or sequence of L tensors [n, D]
        Features of the same n items; widths may differ from layer to layer.
    metric : str
        A name of `alignment_score`.
    k : int or rule
        Neighbours, for the metrics that have them; published "rice".
    samples : int, optional
        So many items drawn by `seed`, if there are more; None: all.
    exclude : sequence of (source layer or None, aligned layer or None)
        Pairs that may not be chosen; None stands for every layer, so (0, None) leaves out the first source layer. They are scored all the same.
    permutations, alpha, aggregate : int, float, "max" or "mean"
        With permutations the same random orders of the aligned items are scored for all pairs, the largest (mean) of each order taken, and that of the true
        order calibrated against them (`null_calibration`).
    progress : function of str, optional
        Told what is done.
    options
        Of the metric.

    Returns
    -------
    LayerSelection(pair, scores, ...), with ``plot`` and ``quantile_pairs``.

    For mutual_knn neighbours are searched once for each layer, L1 + L2 searches, and pairs only compare lists; published code searches anew for every pair.
    Raises ValueError and TypeError: ``select_layers: <argument> must ..., got ...``.
    """
    op = "select_layers"
    if metric not in ALIGNMENT_SCORES:
        raise ValueError(f"{op}: metric must be one of {', '.join(ALIGNMENT_SCORES)}, got {metric!r}")
    if aggregate not in ("max", "mean"):
        raise ValueError(f'{op}: aggregate must be "max" or "mean", got {aggregate!r}')
    if permutations:
        check_calibration(op, permutations, alpha)
    sides = [_layers(op, name, given) for name, given in (("source_layers", source_layers), ("aligned_layers", aligned_layers))]
    n = len(sides[0][0])
    if any(len(layer) != n for side in sides for layer in side):
        raise ValueError(f"{op}: layers must all have the same n items, got {sorted({len(layer) for side in sides for layer in side})}")
    if samples is not None and (isinstance(samples, bool) or not isinstance(samples, int) or samples < 2):
        raise ValueError(f"{op}: samples must be None or a whole number of 2 or more, got {describe(samples)}")
    generator = torch.Generator().manual_seed(seed)
    if samples is not None and samples < n:
        chosen = torch.randperm(n, generator=generator)[:samples].sort().values
        sides, n = [[layer[chosen.to(layer.device)] for layer in side] for side in sides], samples
    count = neighbor_count(op, k, n) if metric in NEIGHBORHOOD_SCORES else None
    considered = torch.ones(len(sides[0]), len(sides[1]), dtype=torch.bool)
    for entry in exclude:
        considered[_excluded(op, entry, considered.shape)] = False
    if not bool(considered.any()):
        raise ValueError(f"{op}: exclude must leave a pair, got none left of {considered.numel()}")
    tell = progress or (lambda message: None)
    evaluate = _cached(sides, count, tell, options) if metric == "mutual_knn" and set(options) <= {"normalize"} else _anew(metric, sides, count, options)
    scores = evaluate(None, tell)
    best = scores.masked_fill(~considered, -torch.inf)
    if bool(best[considered].isnan().any()):
        raise ValueError(f"{op}: scores must be numbers, got NaN for {int(best[considered].isnan().sum())} pairs")
    place = len(best.flatten()) - 1 - int(best.flatten().flip(0).argmax())
    calibration = None
    if permutations:
        take = (lambda each: each[considered].max()) if aggregate == "max" else (lambda each: each[considered].mean())
        null = []
        for number in range(permutations):
            tell(f"permutation {number + 1} of {permutations}")
            null.append(take(evaluate(torch.randperm(n, generator=generator), lambda message: None)))
        calibration = calibrated(float(take(scores)), torch.stack(null), alpha, float(count or 1) if metric == "lcs_knn" else 1.0)
    return LayerSelection((place // best.shape[1], place % best.shape[1]), scores, metric, count, n, considered, calibration)


def _layers(op: str, name: str, given: Any) -> list[Tensor]:
    if isinstance(given, Tensor):
        if given.dim() != 3:
            raise ValueError(f"{op}: {name} must be a tensor [n, L, D] or a sequence of tensors [n, D], got {describe(given)}")
        given = list(given.unbind(1))
    if not isinstance(given, Sequence) or isinstance(given, str) or not given or not all(isinstance(layer, Tensor) and layer.dim() == 2 for layer in given):
        raise ValueError(f"{op}: {name} must be a tensor [n, L, D] or a sequence of tensors [n, D], one or more, got {describe(given)}")
    return list(given)


def _excluded(op: str, entry: Any, shape: torch.Size) -> tuple[Any, ...]:
    if not isinstance(entry, (tuple, list)) or len(entry) != 2 or not all(each is None or isinstance(each, int) for each in entry):
        raise ValueError(f"{op}: exclude must hold pairs of a layer or None, got {entry!r}")
    if not all(each is None or -size <= each < size for each, size in zip(entry, shape, strict=True)):
        raise ValueError(f"{op}: exclude must name layers below {list(shape)}, got {entry!r}")
    return tuple(slice(None) if each is None else each for each in entry)


def _cached(sides: list[list[Tensor]], k: int | None, tell: Callable[[str], None], options: dict[str, Any]) -> Callable[[Tensor | None, Callable[[str], None]], Tensor]:
    lists: list[list[Tensor]] = []
    for name, side in zip(("source", "aligned"), sides, strict=True):
        lists.append([])
        for number, layer in enumerate(side):
            tell(f"neighbours of {name} layer {number + 1} of {len(side)}")
            lists[-1].append(neighbor_lists(layer, k or 1, **options).cpu())
    in_order = [[each.sort(1).values for each in side] for side in lists]

    def evaluate(order: Tensor | None, tell: Callable[[str], None]) -> Tensor:
        aligned = in_order[1] if order is None else [permuted(each, order).sort(1).values for each in lists[1]]
        return torch.stack([torch.stack([in_common(a, b).sum().double() / a.numel() for b in aligned]) for a in in_order[0]])

    return evaluate


def _anew(metric: str, sides: list[list[Tensor]], k: int | None, options: dict[str, Any]) -> Callable[[Tensor | None, Callable[[str], None]], Tensor]:
    def evaluate(order: Tensor | None, tell: Callable[[str], None]) -> Tensor:
        rows = []
        for number, a in enumerate(sides[0]):
            tell(f"{metric} of source layer {number + 1} of {len(sides[0])}")
            rows.append(torch.stack([alignment_score(metric, a, b if order is None else b[order.to(b.device)], k, **options).detach().double().cpu() for b in sides[1]]))
        return torch.stack(rows)

    return evaluate
