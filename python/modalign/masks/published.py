"""The masks of published models by name, each with its table."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .mask import Mask, relation
from .rules import grid_clip, time_stride, whole_number
from .tokens import TYPE_NAMES, Tokens

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
    "tile_tags",
]

TEXT = ("prefix", "question", "answer")


def _with_visual_rows(tokens: Tokens, **rules: Any) -> Mask:
    """Causal rows of text; visual rows keep what `rules` says of keys "text" and "visual"."""
    table: dict[tuple[Any, Any], Any] = {(q, k): "causal" for q in TEXT for k in TYPE_NAMES}
    table |= {("visual", k): rules["text"] for k in TEXT}
    table["visual", "visual"] = rules["visual"]
    return relation(table, tokens)


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
    table["visual", "question"] = "never"
    return relation(table, tokens) | relation({("visual", "question"): "same_segment"}, tokens.replace(segment=turn))


def neighbor_window(tokens: Tokens, window: int = 3) -> Mask:
    """Neighbour-aware visual attention: a visual token sees a window x window square of its image, both ways, clipped at the border. [Treat Visual Tokens as Text?, 2024]

    ======  ======  ==========================================
    query   text    visual
    ======  ======  ==========================================
    text    causal  causal
    visual  causal  grid_clip(0, (window - 1) / 2, the same)
    ======  ======  ==========================================
    """
    if whole_number("neighbor_window", "window", window, 1) % 2 == 0:
        raise ValueError(f"neighbor_window: window must be odd, got {window}")
    return _with_visual_rows(tokens, text="causal", visual=grid_clip(0, window // 2, window // 2))


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
    return relation(_every_type(rule), queries, keys)


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


def cell_window(queries: Tokens, keys: Tokens) -> Mask:
    """Windowed latent cross-attention: a latent query sees the tokens of its own cell, which is the `segment` of both. [FUSION, 2025]"""
    return relation(_every_type("same_segment"), queries, keys)


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
    table = _every_type("always")
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


def _every_type(rule: str) -> dict[tuple[Any, Any], Any]:
    return {(q, k): rule for q in TYPE_NAMES for k in TYPE_NAMES}
