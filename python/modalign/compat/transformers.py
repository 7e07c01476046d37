"""Attention and masks inside the models of Hugging Face transformers.

::

    register()                                                                                      # once
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="modalign")              # or model.set_attn_implementation("modalign")
    with use_mask(model, masks.modality_mutual(tokens)):                                            # a mask of ours, in place of the causal one
        model(input_ids, labels=labels).loss.backward()

What the host would hand to its layers as a matrix of all pairs is here, for each key, the run of queries that keep it: memory linear in queries and keys. `transformers` 5 is needed, and asked
for when `register` or `use_mask` is called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ..masks import Mask, from_dense
from ..masks.mask import BOTH, INTERVAL, RELATION, STEP
from ..ops import masked_attention

__all__ = ["DENSE_PAIRS", "register", "use_mask"]

DENSE_PAIRS = 1 << 28  # the largest matrix [B, Nq, Nk], a byte for each pair, that is made for a rule of which nothing is known

AROUND_THE_KEY = (  # rules of the host that keep a key for one run of queries around the key's own place, or say nothing of queries
    "causal_mask_function",
    "bidirectional_mask_function",
    "sliding_window_overlay",
    "sliding_window_bidirectional_overlay",
    "chunked_overlay",
    "padding_mask_function",
)
CHANGES_THE_RESULT = ("s_aux", "sinks", "cache", "indices", "block_indices")  # what hosts hand to attention and this one has nothing for


def _masking_utils() -> Any:
    try:
        from transformers import masking_utils
    except ImportError as error:
        raise ImportError("modalign.compat.transformers: transformers must be installed, in version 5 or later: pip install 'transformers>=5'") from error
    return masking_utils


def register(name: str = "modalign") -> None:
    """Makes `attn_implementation=name` known to transformers: attention on `masked_attention`, and masks in linear memory.

    Equal to the host's "eager" for every query that keeps something; a query that keeps nothing, as padding does on the left, gets 0.

    Raises
    ------
    ImportError where transformers is missing. Within a model: ValueError for dropout of probabilities in training, for `output_attentions`, and for what would change the result and is not
    there: attention sinks, paged caches, indices of kept keys. ValueError above DENSE_PAIRS pairs for a rule that a model or a caller adds to the host's own (`or_mask_function`,
    `and_mask_function`), and for one that keeps a key for several runs of queries, as these are asked pair by pair.
    """
    host = _masking_utils()
    from transformers import AttentionInterface, AttentionMaskInterface, __version__

    if "q_offset" not in signature(host.sdpa_mask).parameters:
        raise ImportError(f"modalign.compat.transformers: transformers must tell masks of q_length and q_offset, as 5.23 does, got version {__version__}")
    AttentionInterface.register(name, _attention)
    AttentionMaskInterface.register(name, _mask)


# ----------------------------------------------------------------------------------------------------------------------------------------------- attention


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The host's call: [B, H, N, D] in, [B, N, H, D] out. Key heads are not repeated. `sliding_window` and the like among `others` are in the mask already."""
    op = "modalign attention"
    if dropout:
        raise ValueError(f"{op}: dropout must be 0 (set attention_dropout to 0 in the config; drop behind the output projection instead), got {dropout}")
    if others.get("output_attentions"):
        raise ValueError(f'{op}: output_attentions must be False, there are no probabilities in memory; use attn_implementation="eager"')
    for name in CHANGES_THE_RESULT:
        if others.get(name) is not None:
            raise ValueError(f"{op}: {name} must be None, it is not supported, got {type(others[name]).__name__}")
    mask, bias, causal = attention_mask, position_bias, False
    if isinstance(mask, Tensor) and _given_for(getattr(module, "config", None)) is not None:
        raise ValueError("use_mask: attention_mask must be of two dimensions and past_key_values a DynamicCache, got a mask that is made already, of four")
    if attention_mask is None:
        wanted = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = "top_left" if wanted and query.shape[2] > 1 else False  # as the host's own calls of torch's attention
    elif isinstance(attention_mask, Tensor) and attention_mask.dtype is torch.int32:
        mask = _as_mask(attention_mask, query.shape[2])
    elif isinstance(attention_mask, Tensor) and attention_mask.is_floating_point():
        mask, bias = None, attention_mask if bias is None else attention_mask + bias
    out = masked_attention(query, key, value, mask, bias=bias, causal=causal, scale=scaling, softcap=softcap or 0)
    return out.transpose(1, 2).contiguous(), None


def _as_mask(runs: Tensor, queries: int) -> Mask:
    return Mask(queries, runs.shape[2], (runs,), (INTERVAL, 0, 0, 0))  # `masks.intervals` would look at the values, which breaks a compiled graph


# --------------------------------------------------------------------------------------------------------------------------------------------------- masks


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: Any = "cpu",
    config: Any = None,
    **others: Any,
) -> Any:
    """What the host hands to its layers: int32 [B, 1, Nk, 2], the first query that keeps a key and the one behind the last; bool [B, 1, Nq, Nk] for one query or an unknown rule; a `Mask`
    within `use_mask`."""
    host = _masking_utils()
    mask_function = mask_function or host.causal_mask_function
    given, keep, breaks = _given_for(config), None, None
    if q_length != 1:
        breaks = _breaks(mask_function) if not torch.compiler.is_compiling() else None if use_vmap else []  # a compiled graph cannot look into functions
    if breaks is not None:
        valid = None if attention_mask is None else host.prepare_padding_mask(attention_mask, kv_length, kv_offset)[:, kv_offset : kv_offset + kv_length]
        keep = _runs(mask_function, breaks, valid, batch_size, q_length, kv_length, q_offset, kv_offset, device, ahead=given is not None)
    if keep is None:
        if batch_size * q_length * kv_length > DENSE_PAIRS:
            pairs = f"{batch_size} x {q_length} x {kv_length}"
            told = "mask_function must be of transformers.masking_utils and keep a key for one run of queries"
            raise ValueError(f"modalign mask: {told} for more than DENSE_PAIRS = {DENSE_PAIRS} pairs, got another for {pairs}")
        keep = host.sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, allow_is_causal_skip=False, use_vmap=use_vmap, device=device)
    if given is None:
        return keep
    if isinstance(q_offset, Tensor) or kv_offset + kv_length > q_offset + q_length:
        raise ValueError("use_mask: past_key_values must be a DynamicCache, got a cache with room for tokens to come")
    of_host = _as_mask(keep, q_length) if keep.dtype is torch.int32 else from_dense(keep, q_length, kv_length)
    return given.part(batch_size, q_offset, q_length, kv_offset, kv_length) & of_host


def _breaks(function: Callable[..., Tensor]) -> list[Tensor] | None:
    """Where a rule of the host may change besides around the key's own place: bool [B, N - 1] each, True where query n + 1 is of another block or packed sequence than query n. Between these
    it keeps more toward the key, if anything changes. None for a rule of which that is not known. Functions hold those that they join, and the ids, in their closures."""
    name, cells = _name(function), [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    if name in AROUND_THE_KEY:
        return []
    if name in ("blockwise_overlay", "packed_sequence_mask_function"):
        return [cells[0].diff(dim=1) != 0]
    if name not in ("and_masks", "or_masks"):
        return None
    parts = cells[0]
    if name == "and_masks" and [_name(part) for part in parts] == ["packed_sequence_mask_function", "remap_positions_for_packed_sequence"]:
        (sequence,), (inner, position) = ([cell.cell_contents for cell in part.__closure__] for part in parts)
        new = sequence.diff(dim=1)
        if _breaks(inner) != [] or bool((new < 0).any()) or bool(((position.diff(dim=1) != 1) & (new == 0)).any()):  # places within a sequence must count on
            return None
        return [new != 0]
    below = [_breaks(part) for part in parts]
    return None if None in below else [each for part in below for each in part]


def _name(function: Callable[..., Tensor]) -> str | None:
    """Of the host's function that made a rule, or that is one."""
    return function.__qualname__.split(".")[0] if getattr(function, "__module__", None) == _masking_utils().__name__ else None


def _runs(
    function: Callable[..., Tensor], breaks: list[Tensor], valid: Tensor | None, batch: int, queries: int, keys: int, q_offset: Any, kv_offset: int, device: Any, *, ahead: bool
) -> Tensor | None:
    """int32 [B, 1, Nk, 2] of a rule of the host. Causality, windows, chunks, packed sequences, blocks and what joins them keep a key for one run of queries around the key's own place, so
    its ends are found by a search in sixteenths. Between two breaks a rule changes once at most, toward the key: the run is exact where rule and run agree on both sides of every break, at
    the ends and at the key's own place. None where they do not, as for a block in several pieces. `ahead`: a run that begins at the key's own place begins with the first query, for what a
    mask of ours may look ahead to."""
    item, head = torch.arange(batch, device=device)[:, None], torch.zeros((), dtype=torch.int64, device=device)
    place = torch.arange(keys, device=device)[None] + kv_offset
    near = place.expand(2, batch, keys)  # kept
    far = torch.stack([place.clamp(max=q_offset) - 1, place.clamp(min=q_offset + queries - 1) + 1]).expand(2, batch, keys)  # not kept, or beyond the queries
    sixteenths = torch.arange(1, 16, device=device)[:, None, None, None]
    for _ in range(8):  # 16^8 places: as many steps for all sizes, so that one graph serves them, and few of them, as each is traced
        apart = far - near
        kept = function(item, head, near + _toward_zero(apart * sixteenths), place).sum(0)
        near, far = near + _toward_zero(apart * kept), near + _toward_zero(apart * (kept + 1))
    first, last = near
    if not torch.compiler.is_compiling():
        ends = torch.tensor([0, queries - 1], device=device).expand(batch, 2) + q_offset
        asked = torch.cat([ends, *(side for each in breaks for side in _sides(each))], 1).clamp(q_offset, q_offset + queries - 1)  # [B, S], of each item its own
        own = place.clamp(q_offset, q_offset + queries - 1)
        for query in (own[None], *asked.T[:, :, None].split(64)):
            wrong = function(item, head, query, place) != ((first <= query) & (query <= last))
            if bool((wrong if valid is None else wrong & valid).any()):
                return None
    if ahead:
        first = torch.where(first == place, q_offset, first)
    runs = (torch.stack([first, last + 1], -1) - q_offset).clamp(0, queries)
    return (runs if valid is None else runs * valid[..., None]).to(torch.int32)[:, None]


def _sides(breaks: Tensor) -> tuple[Tensor, Tensor]:
    """The queries before and behind every break, int64 [B, S] each with S the most of an item; items with fewer repeat others."""
    before = breaks.int().argsort(dim=1, descending=True, stable=True)[:, : int(breaks.sum(1).max())]
    return before, before + 1


def _toward_zero(sixteenths: Tensor) -> Tensor:
    return torch.div(sixteenths, 16, rounding_mode="trunc")


# ------------------------------------------------------------------------------------------------------------------------------------------------ use_mask


@dataclass(eq=False)
class _Given:
    models: tuple[nn.Module, ...]  # the model and the models in it
    configs: tuple[Any, ...]
    tensors: tuple[Tensor, ...]
    steps: tuple[int, ...]
    sizes: Tensor  # [N, N, 0]: numbers would be fixed in a compiled graph, sizes of tensors are not
    running: int = 0  # calls of the models that have not returned: others may have the same config
    used: bool = False

    def part(self, batch: int, start: int, queries: int, first: int, keys: int) -> Mask:
        """Of `queries` queries from `start` on and `keys` keys from `first` on."""
        self.used = True
        mask = Mask(self.sizes.shape[0], self.sizes.shape[1], self.tensors, self.steps)
        if start + queries > mask.queries or first + keys > mask.keys:
            wanted = f"{start + queries} queries and {first + keys} keys (of prompt and new tokens together)"
            raise ValueError(f"use_mask: mask must be of at least {wanted}, got one of {mask.queries} and {mask.keys}")
        rows = mask.rows(start, start + queries)
        if first + keys < mask.keys:
            _check_nothing_ahead(rows.columns(first + keys, mask.keys), batch, start, first + keys)
        return rows.columns(first, first + keys)


def _check_nothing_ahead(ahead: Mask, batch: int, start: int, seen: int) -> None:
    """Attention of width 1 tells in linear memory whether a query keeps anything: the logarithm of its sum is -inf where it does not."""
    terms = zip(ahead.steps[::STEP], ahead.steps[1::STEP], strict=True)
    heads = math.lcm(*(ahead.tensors[first + 2].shape[0] if kind == RELATION else ahead.tensors[first].shape[1] for kind, first in terms if kind < BOTH))
    query, key = (torch.zeros(batch, heads, n, 1, device=ahead.tensors[0].device) for n in (ahead.queries, ahead.keys))
    kept = masked_attention(query, key, key, ahead, return_lse=True)[1] > -math.inf
    told = "use_mask: mask must keep no key that is not there yet, give the prompt whole (without prefill_chunk_size) and the mask no more"
    if torch.compiler.is_compiling():
        torch._assert_async(~kept.any(), told)  # a compiled graph cannot raise by values
    elif bool(kept.any()):
        raise ValueError(f"{told}, got query {start + int(kept.nonzero()[0, 2])} that keeps one from {seen} on")


_given: ContextVar[tuple[_Given, ...]] = ContextVar("modalign_use_mask", default=())  # of each thread and task its own


def _given_for(config: Any) -> _Given | None:
    return next((each for each in reversed(_given.get()) if each.running and any(config is known for known in each.configs)), None)


def _enter(module: nn.Module, arguments: Any) -> None:
    for each in _given.get():
        each.running += any(module is model for model in each.models)


def _leave(module: nn.Module, arguments: Any, out: Any) -> None:
    for each in _given.get():
        each.running -= any(module is model for model in each.models)


@contextmanager
def use_mask(model: Any, mask: Mask) -> Iterator[None]:
    """Within it, the attention of a model keeps what a mask of `modalign.masks` says, in all layers, forward and in `generate`.

    ::

        tokens = masks.layout([("prefix", 4), ("visual", (16, 16)), ("question", 12), ("answer", 20)])       # the answer with room for what is to be written
        with use_mask(model, masks.composite(tokens)):
            model.generate(input_ids, max_new_tokens=20)

    The mask takes the place of causality: it says which later keys a query sees. The host's padding and its windows, chunks and packed sequences looking back remain, so a layer with a sliding
    window keeps what the mask and the window keep. Layers get the mask by value: the backward pass, checkpointing of layers included, may be outside.

    It holds for calls of this model and of the models in it, in this thread (and asynchronous task): not for another model of the same config object. The model keeps two forward hooks that
    do nothing outside.

    Parameters
    ----------
    model : PreTrainedModel
        With `attn_implementation="modalign"`. Of a vision-language model its decoder is meant; give another part (`model.vision_tower`) to mean that.
    mask : modalign.masks.Mask of N queries and N keys
        N may be more than the tokens that are there, as generation needs it: token i is row and column i. Of one item, or of as many as the batch.

    Raises
    ------
    TypeError, ValueError
        ``use_mask: <argument> must ..., got ...``; also for tokens behind the mask, for a query that keeps a key which is not there yet (a prompt in chunks under a mask that looks ahead, room
        that the prompt looks at), for an `attention_mask` of four dimensions and for a static cache. RuntimeError at the end where the model asked for no mask at all, and in a compiled graph
        for keys that are not there yet.
    """
    _masking_utils()
    from transformers import AttentionMaskInterface, PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"use_mask: model must be a PreTrainedModel of transformers, got {type(model).__name__}")
    if not isinstance(mask, Mask):
        raise TypeError(f"use_mask: mask must be of modalign.masks, got {type(mask).__name__}")
    configs = (model.get_decoder().config, model.config.get_text_config())
    if model.config.is_encoder_decoder or any(getattr(config, "add_cross_attention", False) for config in configs):
        raise ValueError("use_mask: model must be an encoder or a decoder alone, got both in one")
    for config in configs:
        if AttentionMaskInterface().get(config._attn_implementation) is not _mask:
            raise ValueError(f'use_mask: model must have attn_implementation="modalign", got "{config._attn_implementation}"')
    models = tuple(part for part in model.modules() if isinstance(part, PreTrainedModel))
    for part in models:
        if _enter not in part._forward_pre_hooks.values():  # they stay, and do nothing outside: a compiled graph would see others as another model
            part.register_forward_pre_hook(_enter)
            part.register_forward_hook(_leave, always_call=True)
    given = _Given(models, configs, mask.tensors, mask.steps, torch.empty(mask.queries, mask.keys, 0))
    before = _given.set((*_given.get(), given))
    try:
        yield
    finally:
        _given.reset(before)
    if not given.used:
        raise RuntimeError("use_mask: the model must ask transformers for its mask, got no call; its attention takes none, or it was not run")
