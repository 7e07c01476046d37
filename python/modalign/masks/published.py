"""The masks of published models by name, each with its table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .mask import Mask, relation
from .rules import grid_clip, time_stride, whole_number
from .tokens import FIELDS, TYPE_NAMES, TYPES, Tokens

__all__ = [
    "cell_window",
    "composite",
    "dual_cross",
    "image_prefix",
    "media",
    "modality_mutual",
    "neighbor_window",
    "no_visual_attention",
    "temporal_hierarchy",
    "text_guided",
    "tile_layout",
    "tile_tags",
]

TEXT = ("prefix", "question", "answer")


def _visual_rows(**rules: Any) -> dict[tuple[Any, Any], Any]:
    """Causal rows of text; visual rows keep what `rules` says of keys "text" and "visual"."""
    table: dict[tuple[Any, Any], Any] = {(q, k): "causal" for q in TEXT for k in TYPE_NAMES}
    table |= {("visual", k): rules["text"] for k in TEXT}
    table["visual", "visual"] = rules["visual"]
    return table


def _with_visual_rows(tokens: Tokens, **rules: Any) -> Mask:
    return relation(_visual_rows(**rules), tokens)


def image_prefix(tokens: Tokens) -> Mask:
    """Causal, and every image sees itself both ways.

    ======  ======  ======================
    query   text    visual
    ======  ======  ======================
    text    causal  causal
    visual  causal  causal_or_same_segment
    ======  ======  ======================
    """
    return _with_visual_rows(tokens, text="causal", visual="causal_or_same_segment")


def composite(tokens: Tokens, *, visual_update: str = "self") -> Mask:
    """Composite attention: visual tokens are seen and do not look. [EE-MLLM, 2024]

    ======  ======  ===================================================
    query   text    visual
    ======  ======  ===================================================
    text    causal  causal
    visual  never   self (visual_update="self") or never ("ffn")
    ======  ======  ===================================================
    """
    if visual_update not in ("self", "ffn"):
        raise ValueError(f'composite: visual_update must be "self" or "ffn", got {visual_update!r}')
    return _with_visual_rows(tokens, text="never", visual="self" if visual_update == "self" else "never")


def no_visual_attention(tokens: Tokens, *, visual_to_text: str = "never") -> Mask:
    """NAAViT and NAEViT: no attention among, or none from, visual tokens. [SAISA, 2025]

    ======  ==============  ======
    query   text            visual
    ======  ==============  ======
    text    causal          causal
    visual  visual_to_text  never
    ======  ==============  ======

    visual_to_text: "never" (released) or "causal" (the pilot study: visual to visual alone is taken away).
    """
    if visual_to_text not in ("never", "causal"):
        raise ValueError(f'no_visual_attention: visual_to_text must be "never" or "causal", got {visual_to_text!r}')
    return _with_visual_rows(tokens, text=visual_to_text, visual="never")


def modality_mutual(tokens: Tokens, turn: Tensor | None = None) -> Mask:
    """Modality-mutual attention: images also see the question that follows them, never the answer. [AKI, 2025]

    ========  ======  ======  ========  ======
    query     prefix  visual  question  answer
    ========  ======  ======  ========  ======
    visual    causal  causal  always    never
    others    causal  causal  causal    causal
    ========  ======  ======  ========  ======

    turn: int [N] or [B, N], for conversations: an image sees the questions of its own turn alone.
    """
    table: dict[tuple[Any, Any], Any] = {(q, k): "causal" for q in TYPE_NAMES for k in TYPE_NAMES}
    table["visual", "answer"] = "never"
    if turn is None:
        return relation(table | {("visual", "question"): "always"}, tokens)
    turns = torch.as_tensor(turn)
    if turns.is_floating_point() or turns.shape[-1:] != (len(tokens),):
        raise ValueError(f"modality_mutual: turn must be whole numbers for {len(tokens)} tokens, got {turns.dtype} of shape {list(turns.shape)}")
    table["visual", "question"] = "never"
    return relation(table, tokens) | relation({("visual", "question"): "same_segment"}, tokens.replace(segment=turn))


def neighbor_window(tokens: Tokens, window: int = 3, *, active_heads: Sequence[bool] | None = None) -> Mask:
    """Neighbour-aware visual attention: a visual token sees a window x window square of its image, both ways, clipped at the border. [Treat Visual Tokens as Text?, 2024]

    ======  ======  ==========================================
    query   text    visual
    ======  ======  ==========================================
    text    causal  causal
    visual  causal  grid_clip(0, (window - 1) / 2, the same)
    ======  ======  ==========================================

    active_heads: a bool for each head; one that is False keeps no pair with a visual query or key.
    """
    if whole_number("neighbor_window", "window", window, 1) % 2 == 0:
        raise ValueError(f"neighbor_window: window must be odd, got {window}")
    table = _visual_rows(text="causal", visual=grid_clip(0, window // 2, window // 2))
    if active_heads is None:
        return relation(table, tokens)
    blind = {pair: rule for pair, rule in table.items() if "visual" not in pair}
    if not isinstance(active_heads, Sequence) or not all(isinstance(active, bool) for active in active_heads):
        raise TypeError(f"neighbor_window: active_heads must be None or True or False for each head, got {active_heads!r}")
    return relation([table if active else blind for active in active_heads], tokens)


# ------------------------------------------------------------------------------------------------------------------------ queries that look at other tokens


def media(queries: Tokens, keys: Tokens, *, immediate: bool = True) -> Mask:
    """Gated cross-attention: text sees the latest medium that began before it, or all of these. [Flamingo, NeurIPS 2022]

    =====  ==================================================================
    query  medium
    =====  ==================================================================
    text   last_segment (immediate=True) or up_to_last_segment (False)
    =====  ==================================================================

    queries: `last` is the medium of a token, -1 before the first: such a token keeps nothing. keys: `segment` is the medium.
    """
    rule = "last_segment" if immediate else "up_to_last_segment"
    return relation(_whatever_type(rule), queries, keys)


def dual_cross(queries: Tokens, keys: Tokens, *, same_frame: bool = False, causal_media: bool = False) -> Mask:
    """Dual cross-attention: pooled visual tokens and text look at all tokens of a video, in one call. [CrossLMM, 2025]

    ======  =======================================================
    query   visual
    ======  =======================================================
    visual  always, or same_time (same_frame=True)
    text    always, or up_to_last_segment (causal_media=True)
    ======  =======================================================
    """
    text = "up_to_last_segment" if causal_media else "always"
    table: dict[tuple[Any, Any], Any] = {(kind, "visual"): text for kind in TEXT}
    return relation(table | {("visual", "visual"): "same_time" if same_frame else "always"}, queries, keys)


def tile_tags(queries: Tokens, keys: Tokens) -> Mask:
    """Cross-attention to the tiles of pictures: the tag of a tile sees that tile, other text all tiles of the pictures before it. [NVLM, 2024]

    =====  ==================
    query  visual
    =====  ==================
    tag    same_segment
    text   up_to_last_segment
    =====  ==================

    queries: types "text" and "tag"; `segment` of a tag is its tile, `last` of text the highest tile of the last picture before it. keys: `segment` is the tile.
    """
    return relation({("text", "visual"): "up_to_last_segment", ("tag", "visual"): "same_segment"}, queries, keys)


def tile_layout(*sequences: Iterable[tuple[str, int]], tile_tokens: int, thumbnail: bool = False) -> tuple[Tokens, Tokens]:
    """(queries, keys) for `tile_tags`, of sequences that are lists of spans ("text", tokens) and ("picture", tiles); shorter sequences are padded. [NVLM, 2024]

    A picture of k tiles stands in the text as k + 1 tags, one of each tile and one of the thumbnail; keys are tile_tokens of each of them. thumbnail=True (the hybrid): the tokens of
    the thumbnail follow its tag in the text, as "visual", and are no keys.

    >>> queries, keys = tile_layout([("text", 1), ("picture", 2), ("text", 1)], tile_tokens=1)
    >>> tile_tags(queries, keys).dense()[0, 0].int().tolist()
    [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]]
    """
    whole_number("tile_layout", "tile_tokens", tile_tokens, 1)
    rows = []
    for spans in sequences:
        types, segments, last, tiles = [], [], [], 0
        for name, size in spans:
            if name not in ("text", "picture"):
                raise ValueError(f'tile_layout: spans must be "text" or "picture", got {name!r}')
            whole_number("tile_layout", f"a span of {name}", size, int(name == "picture"))
            if name == "text":
                added = [0] * size, [-1] * size
            else:
                numbers = list(range(tiles, tiles + size))
                added = [1] * (size + 1), [*numbers, -1 if thumbnail else tiles + size]
                if thumbnail:
                    added = added[0] + [2] * tile_tokens, added[1] + [-1] * tile_tokens
            types, segments, last = types + added[0], segments + added[1], last + [tiles - 1] * len(added[0])
            tiles += 0 if name == "text" else size + (not thumbnail)
        rows.append((types, segments, last, [tile for tile in range(tiles) for _ in range(tile_tokens)]))
    queries = _padded([dict(type=types, segment=segments, last=last) for types, segments, last, _ in rows])
    return queries, _padded([dict(type=[2] * len(tiles), segment=tiles, last=[-1] * len(tiles)) for *_, tiles in rows])


def _padded(rows: list[dict[str, list[int]]]) -> Tokens:
    N = max((len(row["type"]) for row in rows), default=0)
    fields = torch.zeros(len(rows), len(FIELDS), N, dtype=torch.int32)
    fields[:, FIELDS.index("index")] = torch.arange(N, dtype=torch.int32)
    for b, row in enumerate(rows):
        for name, values in (row | {"valid": [1] * len(row["type"])}).items():
            fields[b, FIELDS.index(name), : len(values)] = torch.tensor(values, dtype=torch.int32)
    return Tokens(fields, ("text", "tag", "visual"))


def cell_window(queries: Tokens, keys: Tokens) -> Mask:
    """Windowed latent cross-attention: a latent query sees the tokens of its own cell, which is the `segment` of both. [FUSION, 2025]

    ==========  ============
    query       any key
    ==========  ============
    any query   same_segment
    ==========  ============
    """
    return relation(_whatever_type("same_segment"), queries, keys)


# -------------------------------------------------------------------------------------------------------------------------------------------- encoders


def text_guided(tokens: Tokens, *, late: bool = False) -> Mask:
    """A vision encoder that reads its instruction: early layers hide the text from the picture, late ones hide nothing. [FUSION, 2025; as stated, the released code differs]

    ======  ======  =====================
    query   visual  text
    ======  ======  =====================
    visual  always  never (always if late)
    text    always  always
    ======  ======  =====================
    """
    table: dict[tuple[Any, Any], Any] = {(q, k): "always" for q in TYPE_NAMES for k in TYPE_NAMES}
    return relation({pair: rule for pair, rule in table.items() if late or not (pair[0] == "visual" and pair[1] in TEXT)}, tokens)


def temporal_hierarchy(tokens: Tokens, levels: int, *, stride: int = 2) -> Mask:
    """Multi-scale temporal tokens of a video. [VidLA, 2024; reconstructed]

    ==========  =====================  ===============  ======
    query       patch                  level v          cls
    ==========  =====================  ===============  ======
    patch       same_time              always           always
    level u     time_stride(stride^u)  always if v <= u  always
    cls         always                 always           always
    ==========  =====================  ===============  ======

    Types "patch", "cls", "level 1", ..., with the video as the `segment` of all. The other pass, of a patch with its own site at all times, is the rule "same_site".
    """
    whole_number("temporal_hierarchy", "levels", levels, 0), whole_number("temporal_hierarchy", "stride", stride, 1)
    names = [f"level {u}" for u in range(1, levels + 1)]
    table: dict[tuple[Any, Any], Any] = {("patch", "patch"): "same_time"}
    table |= {("cls", key): "always" for key in ("patch", "cls", *names)} | {(query, "cls"): "always" for query in ("patch", *names)}
    table |= {("patch", name): "always" for name in names}
    table |= {(name, "patch"): time_stride(stride**u) for u, name in enumerate(names, 1)}
    table |= {(names[u], names[v]): "always" for u in range(levels) for v in range(u + 1)}
    return relation(table, tokens)


def _whatever_type(rule: str) -> dict[tuple[Any, Any], Any]:
    return {(q, k): rule for q in range(TYPES) for k in range(TYPES)}
