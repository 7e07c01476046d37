"""GramAligner: light heads over frozen features, brought together by Gramian volume and pairwise contrast."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import combinations
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .._files import write_bytes, write_json
from .cca import CanonicalCorrelation
from .data_parallel import counts_of_ranks, rank_of
from .reduction import PrincipalComponents

__all__ = ["HEADS", "LOSSES", "AlignerOutput", "AlignmentHead", "GramAligner", "GramAlignerConfig", "items_with"]

FORMAT_VERSION = 1
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


LOSSES = ("gram", "volume", "clip", "siglip")
HEADS = ("linear", "lowrank", "mlp")
SIGLIP_SCALE, SIGLIP_BIAS = 10.0, -10.0  # the published initial values


@dataclass(frozen=True)
class GramAlignerConfig:
    """What a GramAligner is made of.

    modalities : feature width of each modality, in order; the first is the anchor unless `anchor` names another
    components : number of principal components that a modality's features are reduced to inside its head, where they are
    width : of the shared space
    heads : "linear" (affine maps), "mlp" (an affine map plus a branch of width `hidden`, 0 for none), "lowrank" (orthogonal maps without bias plus a
        gated branch of rank `hidden`, 0 for max(8, width / 4); `gate` is the gate's initial value, and 0, as published, keeps it shut for ever)
    loss : "gram" (volume + pairwise_weight x pairwise), "volume", "clip" (pairwise alone), "siglip" (pairwise, sigmoid, learnable scale and bias)
    temperature : divides volumes and cosines, not those of "siglip"; with `learn_temperature` where a learnable one starts
    pairwise_weight : of the pairwise term beside the volume term of "gram"
    """

    modalities: dict[str, int]
    components: dict[str, int] = field(default_factory=dict)
    anchor: str = ""
    width: int = 256
    heads: str = "mlp"
    hidden: int = 256
    gate: float = 0.05
    dropout: float = 0.3
    loss: str = "gram"
    temperature: float = 0.07
    label_smoothing: float = 0.1
    pairwise_weight: float = 1 / 3
    learn_temperature: bool = False

    def __post_init__(self) -> None:
        if len(self.modalities) < 2:
            raise ValueError(f"GramAlignerConfig: modalities must name at least 2, got {list(self.modalities)}")
        if not self.anchor:
            object.__setattr__(self, "anchor", next(iter(self.modalities)))
        if self.anchor not in self.modalities:
            raise ValueError(f"GramAlignerConfig: anchor must be one of {list(self.modalities)}, got '{self.anchor}'")
        for name in self.modalities:
            if "." in name or hasattr(nn.ModuleDict, name):
                raise ValueError(f"GramAlignerConfig: modalities must not have a '.' in their names or one that torch keeps for itself, got '{name}'")
        for name, count in self.components.items():
            if not 1 <= count <= self.modalities.get(name, 0):
                raise ValueError(f"GramAlignerConfig: components['{name}'] must be in 1..{self.modalities.get(name, 0)}, got {count}")
        for name, known in (("heads", HEADS), ("loss", LOSSES)):
            if getattr(self, name) not in known:
                raise ValueError(f"GramAlignerConfig: {name} must be one of {', '.join(known)}, got '{getattr(self, name)}'")
        if self.width < len(self.modalities):
            raise ValueError(f"GramAlignerConfig: width must be at least the number of modalities, got {self.width}")
        if self.hidden < 0:
            raise ValueError(f"GramAlignerConfig: hidden must not be negative, got {self.hidden}")
        if not self.temperature > 0:
            raise ValueError(f"GramAlignerConfig: temperature must be positive, got {self.temperature}")
        for name in ("gate", "dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"GramAlignerConfig: {name} must be in [0, 1), got {getattr(self, name)}")
        if self.pairwise_weight < 0:
            raise ValueError(f"GramAlignerConfig: pairwise_weight must not be negative, got {self.pairwise_weight}")
        if self.learn_temperature and self.loss == "siglip":
            raise ValueError("GramAlignerConfig: learn_temperature must be False with loss siglip, which learns a scale of its own, got True")
        if self.heads == "lowrank" and self.gate == 0:
            warnings.warn("GramAlignerConfig: gate = 0 shuts the low-rank branch for ever: no gradient reaches it", stacklevel=3)

    @property
    def branch(self) -> int:
        """Width of the non-linear branch of a head, 0 for none."""
        if self.heads == "lowrank":
            return self.hidden or max(8, self.width // 4)
        return self.hidden if self.heads == "mlp" else 0


@dataclass
class AlignerOutput:
    """`loss` is None for a single item or when it was not asked for; `embeddings` are unit vectors, one [B, width] per modality."""

    embeddings: dict[str, Tensor]
    loss: Tensor | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)


class AlignmentHead(nn.Module):
    """Features [B, D] to unit vectors [B, width]: an affine map plus, where the configuration asks for one, a non-linear branch that starts at zero.

    Mean, principal components and scale of the training features are kept as buffers, so that a saved head takes raw features.
    """

    mean: Tensor
    scale: Tensor
    projection: Tensor | None

    def __init__(self, name: str, config: GramAlignerConfig, generator: torch.Generator) -> None:
        super().__init__()
        raw = config.modalities[name]
        features, lowrank = config.components.get(name, raw), config.heads == "lowrank"
        self.register_buffer("mean", torch.zeros(raw))
        self.register_buffer("projection", torch.zeros(features, raw) if name in config.components else None)
        self.register_buffer("scale", torch.ones(()))
        self.dropout = config.dropout
        branch = config.branch
        # Layers are filled below from the given generator; the default filling would use up the caller's random numbers.
        self.linear = nn.utils.skip_init(nn.Linear, features, config.width, bias=not lowrank)
        self.branch_in = nn.utils.skip_init(nn.Linear, features, branch, bias=not lowrank) if branch else None
        self.branch_out = nn.utils.skip_init(nn.Linear, branch, config.width, bias=not lowrank) if branch else None
        # The gate is learnt as a logit; 0 is -inf there.
        self.gate = nn.Parameter(torch.tensor(config.gate, dtype=torch.float64).logit().float()) if lowrank else None
        with torch.no_grad():
            for layer in (self.linear, self.branch_in):
                if layer is not None:
                    if lowrank:
                        layer.weight.copy_(_orthogonal(*layer.weight.shape, generator))
                    else:
                        layer.weight.normal_(0, features**-0.5, generator=generator)
                        layer.bias.zero_()
            if self.branch_out is not None:
                for value in self.branch_out.parameters():
                    value.zero_()

    def forward(self, x: Tensor, first: int = 0, rows: int | None = None) -> Tensor:
        """`first` and `rows`: where x begins in the batch of all ranks and how large that is."""
        x = x - self.mean
        if self.projection is not None:
            x = x @ self.projection.T
        x = self._drop(x / self.scale, first, rows)
        y = self.linear(x)
        if self.branch_in is not None and self.branch_out is not None:
            branch = self.branch_out(self._drop(F.gelu(self.branch_in(x)), first, rows))
            y = y + (branch if self.gate is None else self.gate.sigmoid() * branch)
        return F.normalize(y, dim=-1)

    def _drop(self, x: Tensor, first: int, rows: int | None) -> Tensor:
        """Dropout whose noise is drawn for the whole batch: that of an item is the same whichever rank has it, and ranks draw equally much."""
        if not (self.training and self.dropout):
            return x
        noise = F.dropout(x.new_ones(len(x) if rows is None else rows, x.shape[1]), self.dropout)
        return x * noise[first : first + len(x)]


def _orthogonal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A matrix with orthonormal rows or columns, whichever are fewer."""
    q, r = torch.linalg.qr(torch.randn(max(rows, columns), min(rows, columns), generator=generator))
    q = q * r.diagonal().sign()
    return q if rows >= columns else q.T


class GramAligner(nn.Module):
    r"""Aligns k >= 2 modalities whose features are frozen. [GRAM, ICLR 2025]

    loss = CE(-V / t) + pairwise_weight * mean over pairs of CE(cos / t)

    V[i, j] is the Gramian volume of the anchor's item i with the other modalities' item j, CE the mean of cross-entropy over rows and columns with the
    diagonal as target; no matrix of volumes or cosines is stored (`ops.gram_contrastive_loss`, `ops.clip_loss`). The volume alone is blind to sign:
    antiparallel vectors have volume 0 too, and cosine retrieval suffers; the pairwise term settles it. `config.loss` chooses other combinations.

    Items may lack modalities: a pair counts the items that have both, the volume is that of the vectors an item has, among the items that have the anchor
    and another, and what is absent reaches neither the loss nor a gradient.

    >>> import torch
    >>> model = GramAligner(GramAlignerConfig({"picture": 6, "text": 5}, width=4, hidden=0), seed=0)
    >>> out = model({"picture": torch.randn(8, 6), "text": torch.randn(8, 5)})
    >>> out.embeddings["text"].shape, out.loss.shape
    (torch.Size([8, 4]), torch.Size([]))
    """

    def __init__(self, config: GramAlignerConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(seed)
        self.heads = nn.ModuleDict({name: AlignmentHead(name, config, generator) for name in config.modalities})
        if config.learn_temperature:
            self.log_temperature = nn.Parameter(torch.tensor(math.log(config.temperature)))
        if config.loss == "siglip":
            self.logit_scale = nn.Parameter(torch.tensor(math.log(SIGLIP_SCALE)))
            self.logit_bias = nn.Parameter(torch.tensor(SIGLIP_BIAS))

    def set_statistics(self, mean: Mapping[str, Tensor], scale: Mapping[str, float]) -> None:
        """Take over mean [D] and scale of the training features of every modality."""
        for name, head in self.heads.items():
            head.mean.copy_(mean[name])
            head.scale.fill_(scale[name])

    @torch.no_grad()
    def start_from(self, solution: CanonicalCorrelation) -> None:
        """Set the affine maps to a closed-form solution; the non-linear branches stay as they are (zero in a new model).

        Maps without a bias ("lowrank") lose the solution's, which is 0 where both were fitted on the same items.
        """
        for name, head in self.heads.items():
            weight, bias = solution.weight[name], solution.bias[name]
            if weight.shape != head.linear.weight.shape:
                expected = list(head.linear.weight.shape)
                raise ValueError(f"GramAligner.start_from: solution for '{name}' must be {expected}, got {list(weight.shape)}")
            head.linear.weight.copy_(weight * head.scale)
            if head.linear.bias is not None:
                head.linear.bias.copy_(bias + weight @ head.mean)

    @torch.no_grad()
    def on_raw_features(self, reductions: Mapping[str, PrincipalComponents]) -> GramAligner:
        """The same model with the reductions that its features went through built into its heads, for saving: it takes raw features."""
        raw = {name: reductions[name].components.shape[1] if name in reductions else size for name, size in self.config.modalities.items()}
        components = {name: self.config.modalities[name] for name in reductions}
        made = GramAligner(replace(self.config, modalities=raw, components=components))
        state = self.state_dict()
        for name, reduction in reductions.items():
            state[f"heads.{name}.projection"] = reduction.components
            # P (x - m) - m' = P (x - (m + P^T m')), the rows of P being orthonormal
            state[f"heads.{name}.mean"] = reduction.mean + state[f"heads.{name}.mean"] @ reduction.components
        made.load_state_dict(state)
        return made.train(self.training)

    @property
    def temperature(self) -> float | Tensor:
        """What volumes and cosines are divided by; a tensor where it is learnt."""
        return self.log_temperature.exp() if self.config.learn_temperature else self.config.temperature

    def embed(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Unit vectors [B, width] for any of the modalities."""
        self._check(features)
        return {name: self.heads[name](x) for name, x in features.items()}

    def _check(self, features: Mapping[str, Tensor]) -> None:
        for name, x in features.items():
            if name not in self.heads:
                raise ValueError(f"GramAligner.embed: features must be of {list(self.heads)}, got '{name}'")
            if x.dim() != 2 or x.shape[1] != self.config.modalities[name]:
                raise ValueError(f"GramAligner.embed: features of '{name}' must be [B, {self.config.modalities[name]}], got {list(x.shape)}")

    def forward(
        self, features: Mapping[str, Tensor], *, present: Mapping[str, Tensor] | None = None, process_group: dist.ProcessGroup | None = None
    ) -> AlignerOutput:
        """Embeddings and loss of a batch [B, D_name] of every modality. Every item is a negative of every other, so one caption should be there once.

        present : bool [B] for the modalities that some items lack
        process_group : the items of all ranks form one batch; a rank may have any number of them. The loss is this rank's part of the global one times the
            number of ranks: averaged gradients are those of one process with the whole batch. So is dropout, if the ranks' random states are equal.
        """
        missing = [name for name in self.config.modalities if name not in features]
        if missing:
            raise ValueError(f"GramAligner.forward: features must hold every modality, got none for {missing}")
        features = {name: features[name] for name in self.config.modalities}
        self._check(features)
        anchor, others = self.config.anchor, [name for name in features if name != self.config.anchor]
        size = len(features[anchor])
        for name, mask in (present or {}).items():
            if name not in features or mask.dtype is not torch.bool or mask.shape != (size,):
                raise ValueError(f"GramAligner.forward: present must map modalities to bool [{size}], got {mask.dtype} {list(mask.shape)} for '{name}'")
        terms: list[tuple[str, list[str], Tensor | None]] = []  # kind, modalities, the items that it is about
        if self.config.loss in ("gram", "volume"):
            terms.append(("volume", [anchor, *others], items_with(present, [anchor], size, any_of=others)))
        if self.config.loss != "volume":
            terms += [("pairwise", [a, b], items_with(present, [a, b], size)) for a, b in combinations(features, 2)]
        counts = counts_of_ranks([size, *(size if items is None else len(items) for *_, items in terms)], features[anchor].device, process_group)
        first, (rows, *about) = sum(count[0] for count in counts[: rank_of(process_group)]), map(sum, zip(*counts, strict=True))
        embeddings = {name: self.heads[name](x, first, rows) for name, x in features.items()}
        losses: dict[str, list[Tensor]] = {}
        for (kind, names, items), count in zip(terms, about, strict=True):
            if count > 1:  # of all ranks, so that they agree; one item has no other to be told from
                vectors, mask = [_rows(embeddings[name], items) for name in names], _presence(present, others, items) if kind == "volume" else None
                losses.setdefault(kind, []).append(self._loss(kind, vectors, mask, process_group))
        parts = {kind: torch.stack(found).mean() for kind, found in losses.items()}
        weights = {"volume": 1.0, "pairwise": self.config.pairwise_weight if self.config.loss == "gram" else 1.0}
        terms_of_loss = [weights[kind] * part for kind, part in parts.items()]
        return AlignerOutput(embeddings, torch.stack(terms_of_loss).sum() if parts else None, parts)

    def _loss(self, kind: str, vectors: list[Tensor], present: Tensor | None, process_group: dist.ProcessGroup | None) -> Tensor:
        smoothing = self.config.label_smoothing
        if kind == "volume":
            return ops.gram_contrastive_loss(
                vectors[0], vectors[1:], temperature=self.temperature, label_smoothing=smoothing, present=present, process_group=process_group
            )
        if self.config.loss == "siglip":
            return ops.siglip_loss(*vectors, logit_scale=self.logit_scale.exp(), logit_bias=self.logit_bias, process_group=process_group)
        return ops.clip_loss(*vectors, logit_scale=1 / self.temperature, label_smoothing=smoothing, process_group=process_group)

    def save_pretrained(self, folder: str | os.PathLike[str], *, extra: Mapping[str, object] | None = None) -> None:
        """Write model.safetensors and config.json, each whole or not at all. `extra` goes into the configuration file under "extra"."""
        from safetensors.torch import save

        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        weights = save({name: tensor.detach().cpu().contiguous() for name, tensor in sorted(self.state_dict().items())})
        # The checksum ties the two files together: an interruption between them leaves a pair that is refused, not one that is wrong.
        about = {
            "format": FORMAT_VERSION,
            "model": "GramAligner",
            "config": asdict(self.config),
            "weights_sha256": hashlib.sha256(weights).hexdigest(),
        }
        write_bytes(target / WEIGHTS_FILE, weights)
        write_json(target / CONFIG_FILE, about | {"extra": dict(extra or {})})

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> GramAligner:
        """Read what `save_pretrained` wrote. An unknown key, a newer format or a weight file of another save raises by name."""
        from safetensors.torch import load

        path = Path(folder)
        about = read_config(path)
        known = {f.name for f in fields(GramAlignerConfig)}
        unknown = sorted(set(about["config"]) - known)
        if unknown:
            raise ValueError(f"{path / CONFIG_FILE}: expected keys among {sorted(known)}, got unknown {unknown}")
        if not (path / WEIGHTS_FILE).is_file():
            raise ValueError(f"{path / WEIGHTS_FILE}: expected the model's weights, got no such file")
        weights = (path / WEIGHTS_FILE).read_bytes()
        found = hashlib.sha256(weights).hexdigest()
        if found != about["weights_sha256"]:
            raise ValueError(f"{path / WEIGHTS_FILE}: expected SHA-256 {about['weights_sha256']} as in {CONFIG_FILE}, got {found}")
        model = cls(GramAlignerConfig(**about["config"]))
        model.load_state_dict(load(weights))
        return model.eval()


def items_with(present: Mapping[str, Tensor] | None, all_of: Sequence[str], size: int, any_of: Sequence[str] = ()) -> Tensor | None:
    """Indices of the items that have every modality of `all_of` and at least one of `any_of`; None where that is all items without a mask to look at."""
    relevant = [name for name in [*all_of, *any_of] if name in (present or {})]
    if present is None or not relevant:
        return None
    mask = torch.ones(size, dtype=torch.bool, device=present[relevant[0]].device)
    for name in all_of:
        mask = mask & present.get(name, mask)
    if any_of and all(name in present for name in any_of):
        mask = mask & torch.stack([present[name] for name in any_of]).any(0)
    return mask.nonzero()[:, 0]


def _rows(values: Tensor, items: Tensor | None) -> Tensor:
    return values if items is None else values[items]


def _presence(present: Mapping[str, Tensor] | None, names: Sequence[str], items: Tensor | None) -> Tensor | None:
    """Which of the modalities the chosen items have: bool [C, m], None where all have all."""
    masks = {name: _rows(present[name], items) for name in names if name in (present or {})}
    if not masks:
        return None
    full = torch.ones_like(next(iter(masks.values())))
    return torch.stack([masks.get(name, full) for name in names], dim=1)


def read_config(folder: str | os.PathLike[str]) -> dict:
    """The configuration file of a saved model, checked for kind and format."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{path}: expected a saved model's configuration, got no such file")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected JSON, got a file that does not parse ({error})") from error
    if not isinstance(about, dict) or about.get("model") != "GramAligner":
        raise ValueError(f"{path}: expected the configuration of a GramAligner, got something else")
    if about.get("format") != FORMAT_VERSION:
        raise ValueError(f"{path}: expected format {FORMAT_VERSION}, got {about.get('format')}; a newer modalign may have written it")
    return about
