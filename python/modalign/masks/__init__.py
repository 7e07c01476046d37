"""Which keys a query keeps, described in memory that is linear in queries and keys: masks for `modalign.ops.masked_attention`.

A mask is an expression: relations between tokens, intervals, tiles and matrices, joined by ``&``, ``|`` and ``~``. It is exact, whatever is computed tile by tile; tiles of which it keeps
nothing are skipped.

>>> import torch
>>> tokens = layout([("prefix", 2), ("visual", (2, 2)), ("question", 2)])
>>> image_prefix(tokens).dense()[0, 0].int()
tensor([[1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 1, 1, 1]], dtype=torch.int32)
"""

from __future__ import annotations

from .formats import from_block_mask, from_bsr, from_flashmask, to_block_mask, to_bsr, to_flashmask
from .mask import Mask, blocks, causal, from_dense, full, intervals, key_dropout, relation
from .neighborhood import Neighborhood, neighborhood
from .packed import packed
from .published import (
    cell_window,
    composite,
    dual_cross,
    image_prefix,
    media,
    modality_mutual,
    neighbor_window,
    no_visual_attention,
    temporal_hierarchy,
    text_guided,
    tile_layout,
    tile_tags,
)
from .rules import COUNTS, NAMES, Rule, band, causal_window, grid_clip, grid_shift, time_stride
from .tokens import FIELDS, TYPE_NAMES, Tokens, layout, tokens

__all__ = [
    "COUNTS",
    "FIELDS",
    "Mask",
    "NAMES",
    "Neighborhood",
    "Rule",
    "TYPE_NAMES",
    "Tokens",
    "band",
    "blocks",
    "causal",
    "causal_window",
    "cell_window",
    "composite",
    "dual_cross",
    "from_block_mask",
    "from_bsr",
    "from_dense",
    "from_flashmask",
    "full",
    "grid_clip",
    "grid_shift",
    "image_prefix",
    "intervals",
    "key_dropout",
    "layout",
    "media",
    "modality_mutual",
    "neighbor_window",
    "neighborhood",
    "no_visual_attention",
    "packed",
    "relation",
    "temporal_hierarchy",
    "text_guided",
    "tile_layout",
    "tile_tags",
    "time_stride",
    "to_block_mask",
    "to_bsr",
    "to_flashmask",
    "tokens",
]
