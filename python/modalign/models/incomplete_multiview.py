"""Clusters of two views of which some pairs are known, some rows lost their partner and some have none. [CAPIMAC, IJCAI 2025]"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._assignment import assignment
from ..nn.functional import noise_robust_pair_loss
from ..ops._arguments import describe
from ._kmeans import kmeans
from .self_repellent_anchors import self_repellent_anchors

__all__ = ["IncompleteMultiview", "IncompleteMultiviewConfig", "pad_view"]


@dataclass(frozen=True)
class IncompleteMultiviewConfig:
    """width, hidden: of the autoencoders; epochs, batch, learning_rate of Adam over them, published 200, 1024, 1e-4 (the default rate is for hundreds of rows); negatives: pairs drawn for
    each known pair.  anchors: of each view, default twice the classes; variant: "srrw" as the paper says, or "released", which has other walks and other similarities to anchors; alpha: of the walks.  distance: of the pair loss.  matching: "hungarian" as the paper says, or "greedy" as
    the released code does."""

    width: int = 64
    hidden: int = 256
    epochs: int = 200
    batch: int = 1024
    learning_rate: float = 1e-3
    negatives: int = 30
    anchors: int | None = None
    variant: str = "srrw"
    alpha: float = 0.5
    distance: str = "euclidean"
    matching: str = "hungarian"

    def __post_init__(self) -> None:
        for name in ("width", "hidden", "epochs", "batch", "negatives", "anchors"):
            value = getattr(self, name)
            if name == "anchors" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"IncompleteMultiviewConfig: {name} must be a whole number of 1 or more, got {value!r}")
        for name, holds in (("learning_rate", lambda value: 0 < value < math.inf), ("alpha", lambda value: 0 <= value < math.inf)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not holds(value):
                raise ValueError(f"IncompleteMultiviewConfig: {name} must be a number, {'positive' if name == 'learning_rate' else '0 or more'}, got {value!r}")
        for name, choices in (("variant", ("srrw", "released")), ("distance", ("cosine", "euclidean")), ("matching", ("hungarian", "greedy"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"IncompleteMultiviewConfig: {name} must be one of {', '.join(choices)}, got {describe(getattr(self, name))}")


@dataclass(frozen=True)
class IncompleteMultiview:
    """What `fit` found.

    Attributes
    ----------
    clusters : int64 Tensor [N]
        Of every row of the longer view.
    match : int64 Tensor [N]
        Its row of the other view; -1 where that is made up.
    features : Tensor [N, 2 m]
        Similarities to m anchors in both views, what was clustered.
    anchors : int64 Tensor [m]
        Known pairs that are anchors.
    longer : int
        Which view the rows are those of.
    """

    clusters: Tensor
    match: Tensor
    features: Tensor
    anchors: Tensor
    longer: int

    @classmethod
    def fit(
        cls, views: Sequence[Tensor], paired: Tensor, classes: int, config: IncompleteMultiviewConfig = IncompleteMultiviewConfig(), *, seed: int = 0
    ) -> IncompleteMultiview:
        """Cluster.

        1. An autoencoder for each view; known pairs are drawn together and others apart by `noise_robust_pair_loss` on the codes.
        2. Anchors: among the known pairs, by self-repellent walks in each view; the union. Every row becomes its cosines to them, and so the views are comparable.
        3. The unknown rest: the shorter view is padded and matched to the longer.
        4. k-means on both views' similarities, side by side.

        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> kinds = torch.eye(3).repeat_interleave(30, 0)
        >>> views = [kinds @ torch.randn(3, 10) + 0.1 * torch.randn(90, 10), kinds[:80] @ torch.randn(3, 8) + 0.1 * torch.randn(80, 8)]
        >>> found = IncompleteMultiview.fit(views, torch.arange(40)[:, None].repeat(1, 2), 3)
        >>> found.clusters.shape, found.longer, int((found.match < 0).sum())
        (torch.Size([90]), 0, 10)

        Parameters
        ----------
        views : two Tensors [N_v, D_v]
        paired : int64 Tensor [P, 2]
            Rows of the first and of the second view that are known to belong together, each at most once.
        classes : int
            How many clusters.
        """
        op = "IncompleteMultiview.fit"
        views = _check(op, views, paired, classes)
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            coders = [_Autoencoder(view.shape[1], config) for view in views]
        codes = _train(views, paired, coders, config, generator)
        wanted = min(config.anchors or 2 * classes, len(paired))
        walked = [self_repellent_anchors(code[paired[:, v]], wanted, variant=config.variant, alpha=config.alpha, seed=seed) for v, code in enumerate(codes)]
        anchors = torch.cat(walked).unique()
        similar = [_similarities(code, code[paired[anchors, v]], config.variant) for v, code in enumerate(codes)]
        longer = 0 if len(views[0]) >= len(views[1]) else 1
        match, partner = _match_rest(similar, paired, longer, config.matching)
        features = torch.cat([similar[longer], partner], 1)
        return cls(kmeans(features, classes, seed=seed), match, features, anchors, longer)


def pad_view(shorter: Tensor, longer: Tensor, matching: str = "hungarian") -> tuple[Tensor, Tensor]:
    """Rows made up for the shorter view until it is as long as the longer, and the partner of every row of the longer.

    The rows of the shorter are matched to different rows of the longer and put in the order of their distances; where the distance jumps most, a row is put in between: the mean of all
    rows with weights exp(-(t - i)^2 / 2) for place t, halfway between two whole places i (evenly between them, where one jump gets several). Then all are matched anew.

    >>> import torch
    >>> padded, match = pad_view(torch.tensor([[0.0], [1.0], [4.0]]), torch.tensor([[0.0], [1.1], [2.0], [4.5]]))
    >>> padded.flatten().tolist(), match.tolist()
    ([0.0, 1.0, 4.0, 2.1...], [0, 1, 3, 2])

    Returns (padded [N_longer, m], match int64 [N_longer]: rows of `padded`, of which those from len(shorter) on are made up). Raises ValueError: ``pad_view: <argument> must ..., got ...``.
    """
    op = "pad_view"
    for name, each in (("shorter", shorter), ("longer", longer)):
        if not isinstance(each, Tensor) or each.dtype not in (torch.float32, torch.float64) or each.dtype != longer.dtype or not bool(each.isfinite().all()):
            raise ValueError(f"{op}: {name} must be a finite tensor, float32 or float64 like the other, got {describe(each)}")
    if shorter.dim() != 2 or longer.dim() != 2 or shorter.shape[1] != longer.shape[1] or not 1 <= len(shorter) <= len(longer):
        raise ValueError(f"{op}: shorter must have 1 to {len(longer)} rows of as many columns as longer, got {list(shorter.shape)} and {list(longer.shape)}")
    missing = len(longer) - len(shorter)
    if missing == 0:
        return shorter, _partners(op, longer, shorter, matching)
    partner = _partners(op, shorter, longer, matching)
    distance, order = (shorter - longer[partner]).square().sum(1).sqrt().sort(stable=True)
    rows, gaps = shorter[order], max(1, len(shorter) - 1)
    jumps = distance.diff() if len(shorter) > 1 else distance.new_zeros(1)
    number = torch.full((gaps,), missing // gaps, dtype=torch.int64, device=shorter.device)
    number[jumps.sort(descending=True, stable=True).indices[: missing % gaps]] += 1
    places = torch.cat([gap + torch.arange(1, n + 1, device=shorter.device) / (n + 1) for gap, n in enumerate(number.tolist())]).to(shorter)
    weight = (-(places[:, None] - torch.arange(len(shorter)).to(shorter)).square() / 2).softmax(1)
    padded = torch.cat([shorter, weight @ rows])
    return padded, _partners(op, longer, padded, matching)


def _partners(op: str, x: Tensor, y: Tensor, matching: str) -> Tensor:
    """A row of y for each row of x, no row twice; y has as many or more."""
    if matching == "hungarian":
        return assignment(op, torch.cdist(x, y))[1]
    if matching != "greedy":
        raise ValueError(f'{op}: matching must be "hungarian" or "greedy", got {describe(matching)}')
    distance, found = torch.cdist(x, y), []
    for row in range(len(x)):
        found.append(distance[row].argmin())
        distance[:, found[-1]] = torch.inf
    return torch.stack(found)


def _similarities(x: Tensor, anchors: Tensor, variant: str) -> Tensor:
    """Cosines, as the paper says; the released code takes 1 less the cosine scaled by the extremes of its anchor, and 0 for the nearest nineteenth of the anchors."""
    cosine = F.normalize(x, dim=1) @ F.normalize(anchors, dim=1).T
    if variant == "srrw":
        return cosine
    low, high = cosine.amin(0), cosine.amax(0)
    scaled = (cosine - low) / (high - low).clamp(min=1e-12)
    nearest = scaled.sort(dim=1, descending=True, stable=True).indices[:, : -(-cosine.shape[1] // 19)]
    return (1 - scaled).scatter(1, nearest, 0)


def _match_rest(similar: list[Tensor], paired: Tensor, longer: int, matching: str) -> tuple[Tensor, Tensor]:
    """For every row of the longer view its row of the other, -1 where made up, and that row's similarities."""
    here, there = similar[longer], similar[1 - longer]
    match, partner = torch.full((len(here),), -1, dtype=torch.int64, device=here.device), torch.empty_like(here)
    match[paired[:, longer]], partner[paired[:, longer]] = paired[:, 1 - longer], there[paired[:, 1 - longer]]
    rest, others = (_rest(len(one), paired[:, v]) for one, v in ((here, longer), (there, 1 - longer)))
    if len(rest) == 0:
        return match, partner
    source = there[others] if len(others) else there  # nothing is left of it: made of all
    padded, found = pad_view(source, here[rest], matching) if len(source) <= len(rest) else (source, _partners("IncompleteMultiview.fit", here[rest], source, matching))
    partner[rest] = padded[found]
    if len(others):
        match[rest] = torch.where(found < len(others), others[found.clamp(max=len(others) - 1)], -1)
    return match, partner


def _rest(size: int, known: Tensor) -> Tensor:
    free = torch.ones(size, dtype=torch.bool, device=known.device)
    free[known] = False
    return free.nonzero()[:, 0]


class _Autoencoder(nn.Module):
    def __init__(self, features: int, config: IncompleteMultiviewConfig) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(features, config.hidden), nn.ReLU(), nn.Linear(config.hidden, config.width))
        self.decode = nn.Sequential(nn.Linear(config.width, config.hidden), nn.ReLU(), nn.Linear(config.hidden, features))


def _train(views: list[Tensor], paired: Tensor, coders: list[_Autoencoder], config: IncompleteMultiviewConfig, generator: torch.Generator) -> list[Tensor]:
    scaled = [(view - view.mean(0)) / (view - view.mean(0)).square().mean().sqrt().clamp(min=1e-12) for view in views]
    for coder, view in zip(coders, scaled, strict=True):
        coder.to(view)
    optimizer = torch.optim.Adam([parameter for coder in coders for parameter in coder.parameters()], lr=config.learning_rate)

    def draw(size: int, limit: int) -> Tensor:
        return torch.randint(limit, (size,), generator=generator).to(paired.device)

    for _ in range(config.epochs):
        for rows in torch.randperm(max(map(len, scaled)), generator=generator).to(paired.device).split(config.batch):
            loss = sum((F.mse_loss(coder.decode(coder.encode(view[here])), view[here]) for coder, view in zip(coders, scaled, strict=True) if len(here := rows[rows < len(view)])), torch.zeros(()))
            known = paired[draw(min(len(paired), max(1, len(rows) // (1 + config.negatives))), len(paired))]
            other = torch.stack([known[:, 0].repeat_interleave(config.negatives), draw(len(known) * config.negatives, len(scaled[1]))], 1)
            pairs = torch.cat([known, other])
            sides = [coder.encode(view[pairs[:, v]]) for v, (coder, view) in enumerate(zip(coders, scaled, strict=True))]
            loss = loss + noise_robust_pair_loss(*sides, torch.arange(len(pairs), device=paired.device) < len(known), distance=config.distance)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return [coder.encode(view) for coder, view in zip(coders, scaled, strict=True)]


def _check(op: str, views: object, paired: object, classes: object) -> list[Tensor]:
    if not isinstance(views, (list, tuple)) or len(views) != 2:
        raise ValueError(f"{op}: views must be two matrices, got {describe(views)}")
    for v, view in enumerate(views):
        if not isinstance(view, Tensor) or view.dim() != 2 or view.dtype not in (torch.float32, torch.float64) or view.device != views[0].device or view.dtype != views[0].dtype:
            raise ValueError(f"{op}: views[{v}] must be a float32 or float64 matrix, on the device and of the dtype of the other, got {describe(view)}")
        if not bool(view.isfinite().all()):
            raise ValueError(f"{op}: views[{v}] must be finite, got NaN or infinity")
    if not isinstance(paired, Tensor) or paired.dtype is not torch.int64 or paired.dim() != 2 or paired.shape[1] != 2 or len(paired) < 2:
        raise ValueError(f"{op}: paired must be an int64 tensor [P, 2], P 2 or more, got {describe(paired)}")
    for v, view in enumerate(views):
        rows = paired[:, v]
        if int(rows.min()) < 0 or int(rows.max()) >= len(view) or len(rows.unique()) < len(rows):
            raise ValueError(f"{op}: paired must hold rows of views[{v}], 0 to {len(view) - 1}, each at most once, got others")
    if isinstance(classes, bool) or not isinstance(classes, int) or not 1 <= classes <= max(map(len, views)):
        raise ValueError(f"{op}: classes must be from 1 to the rows of the longer view, {max(map(len, views))}, got {classes!r}")
    return list(views)
