"""Data-anchor matching: a head that tells true tuples from hard false ones, mined by volume, and that ranks the best of a search again. [GRAM]"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..ops import HardNegatives, gram_hard_negatives

__all__ = ["GramMatching", "MatchingOutput"]

Fuse = Callable[[Any, Any], Tensor]


class MatchingOutput(NamedTuple):
    """loss : scalar; logits : [3 B, 2]; labels : int64 [3 B], -1 for a pair that is left out; negatives : HardNegatives"""

    loss: Tensor
    logits: Tensor
    labels: Tensor
    negatives: HardNegatives


class GramMatching(nn.Module):
    """A two-way head on a fusion encoder, trained on 3 B pairs: (anchor_i, data_i) matches, (anchor_i, data_n) and (anchor_n, data_i) do not, with n drawn
    by `ops.gram_hard_negatives`, the likelier the smaller the volume.

    >>> import torch
    >>> matching = GramMatching(8)
    >>> text, video, audio = (torch.randn(4, 8) for _ in range(3))
    >>> out = matching(lambda words, clips: words * clips, text, [video, audio], anchor_inputs=text, data_inputs=video)
    >>> out.labels
    tensor([1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0])

    The head is Linear, GELU, LayerNorm, Linear to 2. The published total adds 0.1 of this loss to the contrastive one; that factor is the caller's.

    Paper: Cicchetti et al., "Gramian Multimodal Representation Learning and Alignment", ICLR 2025, section 3.3; the scheme is that of ALBEF (NeurIPS 2021).

    Parameters
    ----------
    width : int
        Of what the fusion encoder gives, such as its [CLS] vector.
    temperature, floor
        Of the draw; see `ops.gram_hard_negatives`.
    normalize : bool
        Unit vectors for the draw.
    """

    def __init__(self, width: int, *, temperature: float = 0.07, floor: float = 1e-4, normalize: bool = True) -> None:
        super().__init__()
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise ValueError(f"GramMatching: width must be a whole number of at least 1, got {width!r}")
        self.width, self.temperature, self.floor, self.normalize = width, temperature, floor, normalize
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, 2))

    def forward(
        self,
        fuse: Fuse,
        anchor: Tensor,
        others: Sequence[Tensor],
        *,
        anchor_inputs: Any,
        data_inputs: Any,
        present: Tensor | None = None,
        negatives: HardNegatives | None = None,
        chunk: int | None = None,
        generator: torch.Generator | None = None,
    ) -> MatchingOutput:
        """Mean two-way cross entropy over the 3 B pairs.

        fuse : (anchor inputs of n rows, data inputs of n rows) -> [n, width]
        anchor, others : [B, D] and m tensors [B, D], the embeddings that negatives are mined with; no gradient flows to them from here
        anchor_inputs, data_inputs : what `fuse` takes, pytrees of tensors [B, ...] (token ids, masks, condition features); gradient flows to them
        present : bool [B, m], as in `ops.gram_hard_negatives`; a sample without any modality takes no part, and neither does a draw where none is left
        negatives : drawn elsewhere, such as by `ops.clip_hard_negatives`; default: by volume
        chunk : pairs that are fused at once; default all 3 B
        """
        rows = _rows("anchor_inputs", anchor_inputs)
        if rows != anchor.shape[0] or rows != _rows("data_inputs", data_inputs):
            found = f"{rows}, {_rows('data_inputs', data_inputs)} and {anchor.shape[0]}"
            raise ValueError(f"GramMatching: anchor_inputs, data_inputs and anchor must have as many rows, got {found}")
        if negatives is None:
            negatives = gram_hard_negatives(
                anchor, others, temperature=self.temperature, present=present, normalize=self.normalize, floor=self.floor, generator=generator
            )
        elif any(drawn.shape != (rows,) for drawn in negatives):
            raise ValueError(f"GramMatching: negatives must be two int64 tensors [{rows}], got {[list(drawn.shape) for drawn in negatives]}")
        own = torch.arange(rows, device=anchor.device)
        here = torch.ones_like(own, dtype=torch.bool) if present is None else present.any(1)
        pairs = (own, own, here, 1), (own, negatives.candidates, here & (negatives.candidates >= 0), 0), (negatives.anchors, own, here & (negatives.anchors >= 0), 0)
        labels = torch.cat([torch.where(valid, label, -1) for _, _, valid, label in pairs])
        anchors, data = (torch.cat([part[side] for part in pairs]).clamp(min=0) for side in (0, 1))
        logits = self._logits(fuse, anchor_inputs, data_inputs, anchors, data, chunk)
        loss = nn.functional.cross_entropy(logits.float(), labels, ignore_index=-1, reduction="sum") / (labels >= 0).sum().clamp(min=1)
        return MatchingOutput(loss, logits, labels, negatives)

    def reranker(self, fuse: Fuse, anchor_inputs: Any, data_inputs: Any, *, chunk: int = 1024) -> Callable[[Tensor, Tensor], Tensor]:
        """For `metrics.joint_retrieval(rerank=...)`: (anchors [b, n], tuples [b, n]) -> probability that they match [b, n], without gradient."""

        @torch.no_grad()
        def rerank(anchors: Tensor, tuples: Tensor) -> Tensor:
            training, _ = self.training, self.eval()
            try:
                logits = self._logits(fuse, anchor_inputs, data_inputs, anchors.flatten(), tuples.flatten(), chunk)
            finally:
                self.train(training)
            return logits.float().softmax(1)[:, 1].reshape(anchors.shape)

        return rerank

    def _logits(self, fuse: Fuse, anchor_inputs: Any, data_inputs: Any, anchors: Tensor, data: Tensor, chunk: int | None) -> Tensor:
        if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
            raise ValueError(f"GramMatching: chunk must be None or a whole number of at least 1, got {chunk!r}")
        found = []
        for start in range(0, anchors.shape[0], chunk or max(anchors.shape[0], 1)):
            piece = slice(start, None if chunk is None else start + chunk)
            fused = fuse(_pick(anchor_inputs, anchors[piece]), _pick(data_inputs, data[piece]))
            if not isinstance(fused, Tensor) or fused.shape != (len(anchors[piece]), self.width):
                got = list(fused.shape) if isinstance(fused, Tensor) else type(fused).__name__
                raise ValueError(f"GramMatching: fuse must give a tensor [{len(anchors[piece])}, {self.width}], got {got}")
            found.append(self.head(fused))
        return torch.cat(found) if found else self.head[-1].weight.new_zeros(0, 2)


def _rows(name: str, inputs: Any) -> int:
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    sizes = {tensor.shape[0] if tensor.dim() else 0 for tensor in tensors}
    if len(sizes) != 1:
        raise ValueError(f"GramMatching: {name} must hold tensors with the batch first, of one size, got sizes {sorted(sizes)}")
    return sizes.pop()


def _pick(inputs: Any, rows: Tensor) -> Any:
    return pytree.tree_map(lambda leaf: leaf.index_select(0, rows) if isinstance(leaf, Tensor) else leaf, inputs)
