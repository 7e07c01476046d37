"""GramAligner: light heads over frozen features, brought together by Gramian volume and pairwise contrast."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import combinations
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .cca import CanonicalCorrelation

__all__ = ["AlignerOutput", "AlignmentHead", "GramAligner", "GramAlignerConfig"]

FORMAT_VERSION = 1
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class GramAlignerConfig:
    """What a GramAligner is made of.

    modalities : feature width of each modality, in order; the first is the anchor unless `anchor` names another
    width : of the shared space;  hidden : of the non-linear branch of a head, 0 for none
    temperature : divides volumes and cosines;  pairwise_weight : of the pairwise term beside the volume term
    """

    modalities: dict[str, int]
    anchor: str = ""
    width: int = 256
    hidden: int = 256
    dropout: float = 0.3
    temperature: float = 0.07
    label_smoothing: float = 0.1
    pairwise_weight: float = 1 / 3

    def __post_init__(self) -> None:
        if len(self.modalities) < 2:
            raise ValueError(f"GramAlignerConfig: modalities must name at least 2, got {list(self.modalities)}")
        if not self.anchor:
            object.__setattr__(self, "anchor", next(iter(self.modalities)))
        if self.anchor not in self.modalities:
            raise ValueError(f"GramAlignerConfig: anchor must be one of {list(self.modalities)}, got '{self.anchor}'")
        if self.width < len(self.modalities):
            raise ValueError(f"GramAlignerConfig: width must be at least the number of modalities, got {self.width}")
        if self.hidden < 0:
            raise ValueError(f"GramAlignerConfig: hidden must not be negative, got {self.hidden}")
        if not self.temperature > 0:
            raise ValueError(f"GramAlignerConfig: temperature must be positive, got {self.temperature}")
        for name in ("dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"GramAlignerConfig: {name} must be in [0, 1), got {getattr(self, name)}")
        if self.pairwise_weight < 0:
            raise ValueError(f"GramAlignerConfig: pairwise_weight must not be negative, got {self.pairwise_weight}")


@dataclass
class AlignerOutput:
    """`loss` is None for a single item or when it was not asked for; `embeddings` are unit vectors, one [B, width] per modality."""

    embeddings: dict[str, Tensor]
    loss: Tensor | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)


class AlignmentHead(nn.Module):
    """Features [B, D] to unit vectors [B, width]: an affine map plus a small non-linear branch that starts at zero.

    Mean and scale of the training features are kept as buffers, so that a saved head takes raw features.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, features: int, width: int, hidden: int, dropout: float, generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(()))
        self.dropout = dropout
        # Layers are filled below from the given generator; the default filling would use up the caller's random numbers.
        self.linear = nn.utils.skip_init(nn.Linear, features, width)
        self.branch_in = nn.utils.skip_init(nn.Linear, features, hidden) if hidden else None
        self.branch_out = nn.utils.skip_init(nn.Linear, hidden, width) if hidden else None
        with torch.no_grad():
            for layer in (self.linear, self.branch_in):
                if layer is not None:
                    layer.weight.normal_(0, features**-0.5, generator=generator)
                    layer.bias.zero_()
            if self.branch_out is not None:
                self.branch_out.weight.zero_()
                self.branch_out.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / self.scale
        x = F.dropout(x, self.dropout, self.training)
        y = self.linear(x)
        if self.branch_in is not None and self.branch_out is not None:
            hidden = F.gelu(self.branch_in(x))
            y = y + self.branch_out(F.dropout(hidden, self.dropout, self.training))
        return F.normalize(y, dim=-1)


class GramAligner(nn.Module):
    r"""Aligns k >= 2 modalities whose features are frozen. [GRAM, ICLR 2025]

    loss = CE(-V / t) + pairwise_weight * mean over pairs of CE(cos / t)

    V[i, j] is the Gramian volume of the anchor's item i with the other modalities' item j (`ops.gram_volume`), CE the mean of cross-entropy over
    rows and
    columns with the diagonal as target. The volume alone is blind to sign: antiparallel vectors have volume 0 too, and cosine retrieval suffers;
    the pairwise term settles it.

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
        self.heads = nn.ModuleDict(
            {name: AlignmentHead(features, config.width, config.hidden, config.dropout, generator) for name, features in config.modalities.items()}
        )

    def set_statistics(self, mean: Mapping[str, Tensor], scale: Mapping[str, float]) -> None:
        """Take over mean [D] and scale of the training features of every modality."""
        for name, head in self.heads.items():
            head.mean.copy_(mean[name])
            head.scale.fill_(scale[name])

    @torch.no_grad()
    def start_from(self, solution: CanonicalCorrelation) -> None:
        """Set the affine maps to a closed-form solution; the non-linear branches stay as they are (zero in a new model)."""
        for name, head in self.heads.items():
            weight, bias = solution.weight[name], solution.bias[name]
            if weight.shape != head.linear.weight.shape:
                expected = list(head.linear.weight.shape)
                raise ValueError(f"GramAligner.start_from: solution for '{name}' must be {expected}, got {list(weight.shape)}")
            head.linear.weight.copy_(weight * head.scale)
            head.linear.bias.copy_(bias + weight @ head.mean)

    def embed(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Unit vectors [B, width] for any of the modalities."""
        for name, x in features.items():
            if name not in self.heads:
                raise ValueError(f"GramAligner.embed: features must be of {list(self.heads)}, got '{name}'")
            if x.dim() != 2 or x.shape[1] != self.config.modalities[name]:
                raise ValueError(f"GramAligner.embed: features of '{name}' must be [B, {self.config.modalities[name]}], got {list(x.shape)}")
        return {name: self.heads[name](x) for name, x in features.items()}

    def forward(self, features: Mapping[str, Tensor], *, groups: Tensor | None = None) -> AlignerOutput:
        """Embeddings and loss of a batch [B, D_name] of every modality. Items of one group [B] are not used as each other's negatives."""
        missing = [name for name in self.config.modalities if name not in features]
        if missing:
            raise ValueError(f"GramAligner.forward: features must hold every modality, got none for {missing}")
        embeddings = self.embed({name: features[name] for name in self.config.modalities})
        if len(next(iter(embeddings.values()))) < 2:
            return AlignerOutput(embeddings)
        parts = {"volume": self._contrast(-self.volume(embeddings), groups)}
        pairs = [self._contrast(embeddings[a] @ embeddings[b].T, groups) for a, b in combinations(embeddings, 2)]
        parts["pairwise"] = torch.stack(pairs).mean()
        return AlignerOutput(embeddings, parts["volume"] + self.config.pairwise_weight * parts["pairwise"], parts)

    def volume(self, embeddings: Mapping[str, Tensor]) -> Tensor:
        """Gramian volume [B, C] of the anchor's B items with the C items of the others. Small means similar."""
        anchor = self.config.anchor
        return ops.gram_volume(embeddings[anchor], [embeddings[name] for name in self.config.modalities if name != anchor])

    def _contrast(self, similarity: Tensor, groups: Tensor | None) -> Tensor:
        logits = similarity / self.config.temperature
        target = torch.arange(len(logits), device=logits.device)
        smoothing = self.config.label_smoothing
        if groups is not None:
            # Items of equal caption are true matches: as negatives they would push apart what belongs together.
            same = (groups[:, None] == groups[None, :]).fill_diagonal_(False)
            if bool(same.any()):
                logits = logits.masked_fill(same, float("-inf"))
                return (_smoothed(logits, target, smoothing) + _smoothed(logits.T, target, smoothing)) / 2
        return (F.cross_entropy(logits, target, label_smoothing=smoothing) + F.cross_entropy(logits.T, target, label_smoothing=smoothing)) / 2

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
        for name, content in (
            (WEIGHTS_FILE, weights),
            (CONFIG_FILE, (json.dumps(about | {"extra": dict(extra or {})}, indent=1, allow_nan=False) + "\n").encode()),
        ):
            temporary = target / f".{name}.{os.getpid()}.partial"
            try:
                temporary.write_bytes(content)
                os.replace(temporary, target / name)
            finally:
                temporary.unlink(missing_ok=True)

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


def _smoothed(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy whose smoothing is spread over the candidates that are not masked out (F.cross_entropy would make it infinite)."""
    log_probability = logits.log_softmax(-1)
    kept = ~torch.isinf(logits)
    uniform = log_probability.masked_fill(~kept, 0).sum(-1) / kept.sum(-1)
    labelled = log_probability.gather(1, target[:, None])[:, 0]
    return -((1 - smoothing) * labelled + smoothing * uniform).mean()


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
