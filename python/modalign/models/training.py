"""The training loop of light heads, on tensors alone: where data come from and where results go is not its business."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations

import torch
from torch import Tensor

from ..metrics import retrieval
from .cca import CanonicalCorrelation, CanonicalCorrelationConfig
from .gram_aligner import GramAligner

__all__ = ["TrainingConfig", "TrainingHistory", "fit_aligner", "select_correlation", "validation_score"]


@dataclass(frozen=True)
class TrainingConfig:
    """Steps of AdamW over mini-batches; linear warm-up over the first tenth, then a cosine to zero.

    learning_rate is that of the non-linear branches; the affine maps take `affine_rate` times it (small where they start from a solution).
    """

    steps: int = 120
    batch: int = 256
    learning_rate: float = 1e-3
    affine_rate: float = 0.1
    weight_decay: float = 0.01
    evaluate_every: int = 10
    clip_norm: float = 2.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"TrainingConfig: {name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"TrainingConfig: learning_rate must be positive, got {self.learning_rate}")


@dataclass
class TrainingHistory:
    """`loss` per step; `evaluated` maps a step (0 = before the first) to the validation score; `best_step` has the highest, the earliest on a tie."""

    loss: list[float] = field(default_factory=list)
    evaluated: dict[int, float] = field(default_factory=dict)
    best_step: int = 0


def validation_score(embeddings: Mapping[str, Tensor], groups: Tensor, volume: Tensor | None = None) -> float:
    """What choices are made by: mean R@10 over all ordered pairs of modalities, with mean R@1 to settle near ties (weight 1/10).

    Given the volume matrix [B, B] of three or more modalities, both its directions count like a pair's: a model is meant to be good at the joint
    score too.
    """
    found = [retrieval(embeddings[a] @ embeddings[b].T, query_groups=groups) for a, b in permutations(embeddings, 2)]
    if volume is not None:
        found += [retrieval(v, query_groups=groups, larger_is_better=False) for v in (volume, volume.T)]
    return math.fsum(f.r10 + 0.1 * f.r1 for f in found) / len(found)


def select_correlation(
    fit: Mapping[str, Tensor],
    validation: Mapping[str, Tensor],
    validation_groups: Tensor,
    width: int,
    ridges: Sequence[float] = (0.1, 0.3, 1.0, 3.0),
    powers: Sequence[float] = (0.5, 1.0),
) -> CanonicalCorrelationConfig:
    """Choose ridge and power of the closed-form baseline on validation items, so that the learned model is measured against its best form."""
    best, chosen = -1.0, None
    for ridge in ridges:
        for power in powers:
            config = CanonicalCorrelationConfig(width, ridge, power)
            score = validation_score(CanonicalCorrelation.fit(fit, config).embed(validation), validation_groups)
            if score > best:
                best, chosen = score, config
    if chosen is None:
        raise ValueError("select_correlation: ridges and powers must not be empty, got nothing to choose from")
    return chosen


def fit_aligner(
    model: GramAligner,
    features: Mapping[str, Tensor],
    groups: Tensor,
    config: TrainingConfig,
    *,
    seed: int,
    stop_after: int | None = None,
    validation: tuple[Mapping[str, Tensor], Tensor] | None = None,
    progress: Callable[[int], None] | None = None,
) -> TrainingHistory:
    """Train in place. The result depends on the arguments and the seed alone (and the machine's arithmetic), not on the caller's random state.

    stop_after : leave the loop after that many steps of the schedule (a number chosen on validation items before)
    validation : (features, groups) looked at every `evaluate_every` steps and at step 0. The model keeps its last weights; the best step is in the
    history.
    """
    history = TrainingHistory()
    total = config.steps if stop_after is None else stop_after
    if not 0 <= total <= config.steps:
        raise ValueError(f"fit_aligner: stop_after must be in 0..{config.steps}, got {stop_after}")
    affine = [p for name, p in model.named_parameters() if ".linear." in name]
    branch = [p for name, p in model.named_parameters() if ".linear." not in name]
    rate = config.learning_rate
    parameters = [{"params": affine, "lr": rate * config.affine_rate}] + ([{"params": branch, "lr": rate}] if branch else [])
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=config.weight_decay)
    warm_up = max(1, config.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / config.steps))
    )
    count = len(groups)
    batch = min(config.batch, count)

    def evaluate(step: int) -> None:
        if validation is not None:
            model.eval()
            with torch.no_grad():
                embeddings = model.embed(validation[0])
                volume = model.volume(embeddings) if len(embeddings) > 2 else None  # of two, the volume is the cosine over again
                history.evaluated[step] = validation_score(embeddings, validation[1], volume)
            if history.evaluated[step] > history.evaluated.get(history.best_step, -1.0):
                history.best_step = step

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        evaluate(0)
        queue = torch.empty(0, dtype=torch.int64)
        for step in range(1, total + 1):
            if len(queue) < batch:
                queue = torch.randperm(count)
            chosen, queue = queue[:batch], queue[batch:]
            model.train()
            output = model({name: x[chosen] for name, x in features.items()}, groups=groups[chosen])
            if output.loss is None:
                raise ValueError(f"fit_aligner: features must have at least 2 items, got {count}")
            optimizer.zero_grad(set_to_none=True)
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            optimizer.step()
            schedule.step()
            history.loss.append(float(output.loss.detach()))
            if not math.isfinite(history.loss[-1]):
                raise ValueError(f"fit_aligner: the loss must stay finite, got {history.loss[-1]} at step {step}; features may hold NaN or Inf")
            if step % config.evaluate_every == 0 or step == total:
                evaluate(step)
            if progress is not None:
                progress(step)
    model.eval()
    return history
