"""Entities of two graphs that mean the same, from names, pictures, links, and although pictures are missing. [UMAEA, ISWC 2023; MEAformer, ACM MM 2023]"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.functional import entity_alignment_loss
from ..nn.uncertainty_weighting import UncertaintyWeighting
from ..ops import target_rank
from ..ops._arguments import describe
from .pseudo_labels import PseudoLabels

__all__ = ["EntityAligner", "EntityAlignerConfig", "EntityGraph", "EntityRanks"]


@dataclass(frozen=True)
class EntityGraph:
    """Entities of one graph.

    features : dict of name to Tensor [N, D_name], in the same order of names on both sides; the widths may differ
    present : dict of name to bool Tensor [N], for what some entities lack
    edges : Tensor int64 [2, E]; taken both ways
    """

    features: Mapping[str, Tensor]
    edges: Tensor
    present: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.features.values())))


@dataclass(frozen=True)
class EntityAlignerConfig:
    """width of every embedding, published 300; epochs of three stages: on what is there, the imagination of what is missing, both (published 250, 50, 100, with a learning rate of 4e-3 and
    3500 links a batch; here all links are one batch).

    missing: what stands for a modality that an entity lacks. "imagine": what the others say of it, as `imagination` learned on entities that have it; "leave_out": nothing, the weights of the others
    rise; "noise": a draw with the mean and deviation of those there are, as earlier systems do.
    check_every: epochs between checks of pseudo-labels, published 5; 0: none. csls_neighbors: of the checks and of `ranks`, published 3.
    """

    width: int = 128
    hidden: int = 128
    epochs: tuple[int, int, int] = (100, 30, 50)
    learning_rate: float = 4e-3
    temperature: float = 0.1
    missing: str = "imagine"
    check_every: int = 0
    csls_neighbors: int = 3

    def __post_init__(self) -> None:
        for name in ("width", "hidden", "csls_neighbors"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"EntityAlignerConfig: {name} must be a whole number of 1 or more, got {value!r}")
        numbers = [*self.epochs, self.check_every] if isinstance(self.epochs, tuple) and len(self.epochs) == 3 else [None]
        if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers):
            raise ValueError(f"EntityAlignerConfig: epochs must be three whole numbers and check_every one, 0 or more, got {self.epochs!r} and {self.check_every!r}")
        if not all(isinstance(number, (int, float)) and 0 < number < math.inf for number in (self.learning_rate, self.temperature)):
            raise ValueError(f"EntityAlignerConfig: learning_rate and temperature must be positive, got {self.learning_rate!r} and {self.temperature!r}")
        if self.missing not in ("imagine", "leave_out", "noise"):
            raise ValueError(f"EntityAlignerConfig: missing must be imagine, leave_out or noise, got {describe(self.missing)}")


@dataclass(frozen=True)
class EntityRanks:
    """Hits@1, Hits@10 and mean reciprocal rank, means of both directions."""

    hits1: float
    hits10: float
    reciprocal_rank: float


class _Side(nn.Module):
    """One graph: a linear map for each modality, an embedding of each entity that goes twice along the edges, and what the others say of a modality."""

    def __init__(self, graph: EntityGraph, config: EntityAlignerConfig) -> None:
        super().__init__()
        self.names, self.partial = list(graph.features), list(graph.present)  # lists of modules: a modality may be called anything
        self.project = nn.ModuleList([nn.Linear(x.shape[1], config.width) for x in graph.features.values()])
        self.entity = nn.Parameter(torch.randn(len(graph), config.width) / config.width**0.5)
        self.along = nn.ModuleList([nn.Linear(config.width, config.width) for _ in range(2)])
        others = len(graph.features) * config.width
        self.imagination = nn.ModuleList([nn.Sequential(nn.Linear(others, config.hidden), nn.ReLU(), nn.Linear(config.hidden, config.width)) for _ in graph.present])

    def forward(self, features: Mapping[str, Tensor], adjacency: Tensor) -> dict[str, Tensor]:
        structure = self.entity
        for n, layer in enumerate(self.along):
            structure = layer(torch.sparse.mm(adjacency, structure))
            structure = F.relu(structure) if n == 0 else structure
        found = {name: F.normalize(layer(features[name]), dim=1) for name, layer in zip(self.names, self.project, strict=True)}
        return found | {"structure": F.normalize(structure, dim=1)}

    def imagine(self, embeddings: Mapping[str, Tensor], name: str) -> Tensor:
        return F.normalize(self.imagination[self.partial.index(name)](torch.cat([x for other, x in embeddings.items() if other != name], 1)), dim=1)


class EntityAligner(nn.Module):
    r"""Embeddings of the entities of two graphs in one space.

    Every modality of a graph has a linear map; a graph's structure is an embedding of each entity that goes twice along the edges. The joint embedding is the modalities' side by side, each times
    the root of its weight, a softmax over those that the entity has. `fit` trains all of them and the joint one by `nn.functional.entity_alignment_loss` on the links, weighted by `nn.UncertaintyWeighting`.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> name, edges = torch.randn(30, 8), torch.tensor([[0, 1], [1, 2]])
    >>> left, right = EntityGraph({"name": name}, edges), EntityGraph({"name": name @ torch.randn(8, 6)}, edges)
    >>> links = torch.arange(20)[:, None].repeat(1, 2)
    >>> model = EntityAligner(left, right, EntityAlignerConfig(width=16, epochs=(40, 0, 0))).fit(links)
    >>> model.ranks(torch.arange(20, 30)[:, None].repeat(1, 2)).hits10 > 0.5
    True

    Parameters
    ----------
    left, right : EntityGraph
        With the same names of modalities.
    """

    def __init__(self, left: EntityGraph, right: EntityGraph, config: EntityAlignerConfig = EntityAlignerConfig(), *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        for name, graph in (("left", left), ("right", right)):
            _check_graph(name, graph)
        if list(left.features) != list(right.features):
            raise ValueError(f"EntityAligner: right must have the modalities of left, {list(left.features)}, got {list(right.features)}")
        one, other = (next(iter(graph.features.values())) for graph in (left, right))
        if one.dtype != other.dtype or one.device != other.device:
            raise ValueError(f"EntityAligner: right must be {one.dtype} on {one.device} as left is, got {other.dtype} on {other.device}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.sides = nn.ModuleList([_Side(graph, config) for graph in (left, right)])
        names = [*left.features, "structure"]
        self.score = nn.Parameter(torch.zeros(len(names)))
        self.weighting = UncertaintyWeighting(len(names) + 1)
        generator = torch.Generator().manual_seed(seed)
        self.data = nn.ModuleList([_Data(graph, generator if config.missing == "noise" else None) for graph in (left, right)])
        self.register_buffer("imagines", torch.tensor(False))  # before the second stage nothing is imagined
        self.to(one)

    def embed(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Every modality and "joint", of all entities of both graphs; unit rows (zeros where a modality is missing and left out)."""
        found = []
        for side, data in zip(self.sides, self.data, strict=True):
            embeddings, present = side(data.features(side.names), data.adjacency), data.present(side.partial)
            counted: dict[str, Tensor | None] = {name: None for name in embeddings}  # who has a modality, where that matters
            for name, there in present.items():
                if self.config.missing == "noise":
                    continue
                imagined = bool(self.imagines) and bool(there.any())  # where nobody has it, nothing could be learned
                stand_in = side.imagine(_without(embeddings, present, name), name) if imagined else torch.zeros_like(embeddings[name])
                embeddings = embeddings | {name: torch.where(there[:, None], embeddings[name], stand_in)}
                counted[name] = None if imagined else there
            score = torch.stack([s.expand(len(data)) if there is None else s.masked_fill(~there, -torch.inf) for s, there in zip(self.score, counted.values(), strict=True)], 1)
            weight = torch.exp(score.log_softmax(1) / 2)  # the root of a softmax; that of 0 would have no slope
            joint = torch.cat([weight[:, n : n + 1] * x for n, x in enumerate(embeddings.values())], 1)
            found.append(embeddings | {"joint": F.normalize(joint, dim=1)})
        return found[0], found[1]

    def fit(self, links: Tensor, *, progress: Callable[[int, float], None] | None = None) -> EntityAligner:
        """Train on links int64 [L, 2], rows of the left and of the right graph. With `check_every`, entities without a link are pools of pseudo-labels; what was added is `self.added`."""
        links = self._check_links("links", links)
        left, right = (torch.arange(len(data), device=links.device) for data in self.data)
        labels = PseudoLabels(left[~torch.isin(left, links[:, 0])], right[~torch.isin(right, links[:, 1])])
        self.added, epoch = links[:0], 0
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.config.learning_rate)
        for stage, epochs in enumerate(self.config.epochs):
            learns_to_imagine = self.config.missing == "imagine" and any(bool(there.any()) for data in self.data for there in data.masks())
            if stage > 0 and not learns_to_imagine:
                continue
            self.imagines.fill_(stage > 0 and learns_to_imagine)
            for _ in range(epochs):
                loss = self._imagination_loss() if stage == 1 else self._alignment_loss(torch.cat([links, self.added]))
                loss = loss + self._imagination_loss() if stage == 2 else loss
                optimizer.zero_grad()
                loss.backward()
                if stage == 1:  # what the links taught stays as it is
                    for name, parameter in self.named_parameters():
                        if ".imagination." not in name:
                            parameter.grad = None
                optimizer.step()
                epoch += 1
                if progress is not None:
                    progress(epoch, float(loss.detach()))
                if self.config.check_every and stage != 1 and epoch % self.config.check_every == 0:
                    with torch.no_grad():
                        one, other = self.embed()
                    new = labels.update(one["joint"], other["joint"], metric="csls", csls_neighbors=self.config.csls_neighbors)
                    self.added = torch.cat([self.added, new])
        return self

    def _alignment_loss(self, links: Tensor) -> Tensor:
        one, other = self.embed()
        losses = []
        for name in one:
            rows = links
            for column, (side, data) in enumerate(zip(self.sides, self.data, strict=True)):
                if name in side.partial and self.config.missing != "noise":
                    rows = rows[data.present(side.partial)[name][rows[:, column]]]
            if len(rows) == 0:
                losses.append(one[name].sum() * 0)
            else:
                losses.append(entity_alignment_loss(one[name][rows[:, 0]], other[name][rows[:, 1]], temperature=self.config.temperature))
        return self.weighting(losses)

    def _imagination_loss(self) -> Tensor:
        """1 - cosine of what is imagined and what is there, over the entities that have it."""
        total = self.score.new_zeros(())
        for side, data in zip(self.sides, self.data, strict=True):
            embeddings, present = side(data.features(side.names), data.adjacency), data.present(side.partial)
            for name, there in present.items():
                if bool(there.any()):
                    imagined = side.imagine({other: x.detach() for other, x in _without(embeddings, present, name).items()}, name)
                    total = total + (1 - (imagined[there] * embeddings[name][there].detach()).sum(1)).mean()
        return total

    @torch.no_grad()
    def ranks(self, links: Tensor, *, metric: str = "csls") -> EntityRanks:
        """How the right entities of links, the left ones, rank among all that the links name on the other side. metric: of `ops.target_rank`, "csls" or "cosine"."""
        links = self._check_links("links", links)
        one, other = (embeddings["joint"][links[:, side]] for side, embeddings in enumerate(self.embed()))
        options = {"csls_neighbors": min(self.config.csls_neighbors, len(links))} if metric == "csls" else {}
        place = torch.arange(len(links), device=links.device)
        rank = torch.cat([target_rank(a, b, place, metric=metric, **options) for a, b in ((one, other), (other, one))]).double()
        rank = torch.where(rank < 0, torch.inf, rank)  # NaN is nobody's neighbour
        return EntityRanks(float((rank < 1).double().mean()), float((rank < 10).double().mean()), float((1 / (1 + rank)).mean()))

    def _check_links(self, name: str, links: object) -> Tensor:
        if not isinstance(links, Tensor) or links.dtype is not torch.int64 or links.dim() != 2 or links.shape[1] != 2 or len(links) == 0:
            raise ValueError(f"EntityAligner: {name} must be an int64 tensor [L, 2], L 1 or more, got {describe(links)}")
        for side, data in enumerate(self.data):
            rows = links[:, side]
            if int(rows.min()) < 0 or int(rows.max()) >= len(data) or len(rows.unique()) != len(rows):
                raise ValueError(f"EntityAligner: {name} must hold rows of the {('left', 'right')[side]} graph, 0 to {len(data) - 1}, each at most once, got others")
        return links


class _Data(nn.Module):
    """What a graph holds, as buffers that move with the model but are not saved with it. `noise`: draws in place of what is missing."""

    def __init__(self, graph: EntityGraph, noise: torch.Generator | None) -> None:
        super().__init__()
        self.size = len(graph)
        for n, (name, x) in enumerate(graph.features.items()):
            there, rows = graph.present.get(name), _standardised(x, graph.present.get(name))
            if noise is not None and there is not None:
                rows = torch.where(there[:, None], rows, torch.randn(x.shape, generator=noise).to(x))
            self.register_buffer(f"features_{n}", rows, persistent=False)
        for n, there in enumerate(graph.present.values()):
            self.register_buffer(f"present_{n}", there.clone(), persistent=False)
        self.register_buffer("adjacency", _adjacency(graph), persistent=False)

    def __len__(self) -> int:
        return self.size

    def features(self, names: list[str]) -> dict[str, Tensor]:
        return {name: getattr(self, f"features_{n}") for n, name in enumerate(names)}

    def present(self, names: list[str]) -> dict[str, Tensor]:
        return {name: getattr(self, f"present_{n}") for n, name in enumerate(names)}

    def masks(self) -> list[Tensor]:
        return [buffer for name, buffer in self.named_buffers() if name.startswith("present_")]


def _without(embeddings: Mapping[str, Tensor], present: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """What imagination sees: the other modalities, zeros where they are missing too."""
    return {other: x if (there := present.get(other)) is None or other == name else torch.where(there[:, None], x, 0) for other, x in embeddings.items()}


def _check_graph(name: str, graph: object) -> None:
    op = "EntityAligner"
    if not isinstance(graph, EntityGraph) or not graph.features:
        raise ValueError(f"{op}: {name} must be an EntityGraph with one modality or more, got {describe(graph)}")
    first = next(iter(graph.features.values()))
    for key, x in graph.features.items():
        if key in ("structure", "joint"):
            raise ValueError(f'{op}: {name} must have modalities of other names than "structure" and "joint", got {list(graph.features)}')
        if not isinstance(x, Tensor) or x.dim() != 2 or x.dtype not in (torch.float32, torch.float64) or x.dtype != first.dtype or x.device != first.device or len(x) == 0:
            raise ValueError(f"{op}: {name} must have features [N, D], N 1 or more, all float32 or all float64 on one device, got {describe(x)} as {key!r}")
        there = graph.present.get(key)
        if len(x) != len(first):
            raise ValueError(f"{op}: {name} must have features of as many entities each, got {len(x)} and {len(first)}")
        if there is not None and (not isinstance(there, Tensor) or there.dtype is not torch.bool or there.shape != (len(first),) or there.device != first.device):
            raise ValueError(f"{op}: {name} must have bool masks [{len(first)}] as present, got {describe(there)} for {key!r}")
        if not bool((x if there is None else x[there]).isfinite().all()):
            raise ValueError(f"{op}: {name} must have finite features where they are present, got NaN or infinity in {key!r}")
    unknown = [key for key in graph.present if key not in graph.features]
    if unknown:
        raise ValueError(f"{op}: {name} must have masks of its modalities, got some of {unknown}")
    edges = graph.edges
    if not isinstance(edges, Tensor) or edges.dtype is not torch.int64 or edges.dim() != 2 or len(edges) != 2 or (edges.numel() and not 0 <= int(edges.min()) <= int(edges.max()) < len(first)):
        raise ValueError(f"{op}: {name} must have edges int64 [2, E] of rows from 0 to {len(first) - 1}, got {describe(edges)}")


def _standardised(x: Tensor, there: Tensor | None) -> Tensor:
    """Mean 0 and deviation 1 over those that have it, all columns by one scale; zeros for the others."""
    rows = x if there is None else x[there]
    if len(rows) == 0:
        return torch.zeros_like(x)
    centred = x - rows.mean(0)
    scaled = centred / (rows - rows.mean(0)).square().mean().sqrt().clamp(min=1e-12)
    return scaled if there is None else torch.where(there[:, None], scaled, 0)


def _adjacency(graph: EntityGraph) -> Tensor:
    """The edges both ways and a loop at each entity, each weighted by the inverse root of both degrees: a sparse matrix [N, N]."""
    N, x = len(graph), next(iter(graph.features.values()))
    loops = torch.arange(N, device=graph.edges.device).expand(2, N)
    pairs = torch.cat([graph.edges, graph.edges.flip(0), loops], 1).unique(dim=1)
    degree = pairs[0].bincount(minlength=N).to(x.dtype)
    return torch.sparse_coo_tensor(pairs, (degree[pairs[0]] * degree[pairs[1]]).rsqrt(), (N, N), check_invariants=False).coalesce()
