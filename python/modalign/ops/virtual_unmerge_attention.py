"""Attention of merged tokens as if the tokens that they stand for were there, each at its own rotary angle. [DyMU, NeurIPS 2025]"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import masks
from . import _arguments as arguments
from . import _attention_arguments as check
from ._registration import accumulation_dtype, call, refuse_forward_mode, register_looping_vmap, register_pair, without_autocast
from ._rotary import rotary_tables, turned
from .masked_attention import masked_attention, reference_masked_attention

__all__ = ["VirtualUnmergeCache", "reference_virtual_unmerge_attention", "virtual_unmerge_attention"]

THETA = 10000  # the usual base of rotary angles


def virtual_unmerge_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index_map: Tensor,
    *,
    positions: Tensor | None = None,
    theta: float | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    causal: bool = True,
    mask: Tensor | check.MaskProgram | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    r"""Attention among N virtual tokens, of which token i has the query, key and value of the merged token g(i) and angles of its own; a merged token gets the mean of what its virtual tokens get.

    ::

        z_ij = scale (R_i q_g(i)) . (R_j k_g(j))        f_i = sum_j softmax_j(z_ij) v_g(j)        out_u = mean of f_i over the i with g(i) = u
        R_i turns the halves of a vector: (x1 cos - x2 sin, x2 cos + x1 sin), at the angles positions_i theta^(-2 f / D), f = 0 ... D / 2 - 1

    >>> import torch
    >>> q, v = torch.zeros(1, 1, 2, 4), torch.tensor([1.0, 4.0]).view(1, 1, 2, 1)
    >>> virtual_unmerge_attention(q, q, v, torch.tensor([0, 0, 1])).flatten()  # the mean of 1 and 1; (1 + 1 + 4) / 3
    tensor([1., 2.])

    Parameters
    ----------
    query : Tensor [B, H, Nu, D]
        Of the merged tokens, before any rotation. D is even.
    key : Tensor [B, Hkv, Nu, D]
        Hkv divides H, as in `masked_attention`.
    value : Tensor [B, Hkv, Nu, Dv]
    index_map : int64 tensor [N] or [B, N]
        g: the merged token of every virtual token, 0 to Nu - 1, in any order. [N] is that of all items, and names every merged token. In [B, N], -1 is padding: no token, takes no part.
    positions : whole or floating tensor [N] or [B, N], optional
        Of virtual tokens. Default 0 to N - 1, padding counted; only differences within a sequence matter.
    theta : float, optional
        Default 10000.
    rotary : (cos, sin), tensors [N, D / 2] or [B, N, D / 2], optional
        In place of `positions` and `theta`. (Tables of width D, as transformers has them, hold each angle twice: take ``[..., : D // 2]``.)
    causal : bool
        A virtual token keeps those up to itself.
    mask : bool tensor that broadcasts to [B, H, N, N], or a mask of `modalign.masks`, optional
        Of virtual tokens; what `causal` and it both keep is kept.
    cu_seqlens : int32 tensor [sequences + 1], optional
        Rising from 0 to N: sequences of virtual tokens one behind the other, in every item the same, that do not see each other.
    scale : float, optional
        Default 1 / sqrt(D).

    Returns
    -------
    Tensor [B, H, Nu, Dv] in the query's dtype

    Gradient
    --------
    To query, key and value, and to the tables of `rotary`; double backward and forward mode raise. Sums over the virtual tokens of a merged one go in their order: the same bits every time, for any
    number of threads.

    Edges
    -----
    A virtual token that keeps nothing adds 0 to its mean. A merged token that no entry of a map [B, N] names: output 0, no gradient. Nu = N = 0: empty.

    Under autocast query, key and value are cast to its dtype; tables are in the accumulation dtype (float32; float64 for float64), angles, means and sums over groups in float64 before.

    Raises
    ------
    TypeError, ValueError
        ``virtual_unmerge_attention: <argument> must ..., got ...``; RuntimeError for indices out of range, merged tokens that nothing names and cu_seqlens that do not rise.

    Complexity
    ----------
    That of `masked_attention` with N queries and keys: 2 (D + Dv) FLOP for each pair of virtual tokens that is kept. What Nu < N saves is outside: projections, feed-forward, the cache. Memory beyond the
    result: query, key, value and f of N tokens in the accumulation dtype, never N x N.

    Paper: Wang et al., "DyMU: Dynamic Merging and Virtual Unmerging for Efficient VLMs", NeurIPS 2025: virtual token unmerging.
    """
    op = "virtual_unmerge_attention"
    query, key, value = _check_operands(op, query, key, value)
    (B, H, Nu, _), N = query.shape, _check_map(op, index_map, query)
    if key.shape[2] != Nu:
        raise ValueError(f"{op}: key must have query's Nu = {Nu} tokens, got {arguments.describe(key)}")
    arguments.check_flag(op, "causal", causal)
    check.check_numbers(op, query, False, scale, 0)
    if cu_seqlens is not None:
        if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype is not torch.int32:
            raise TypeError(f"{op}: cu_seqlens must be an int32 tensor [sequences + 1], got {arguments.describe(cu_seqlens)}")
        if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1 or cu_seqlens.device != query.device:
            raise ValueError(f"{op}: cu_seqlens must have shape [sequences + 1] on {query.device}, got {arguments.describe(cu_seqlens)}")
    if mask is not None:
        check.check_mask(op, mask, query, (B, H, N, N), key.shape[1])
    _check_angles(op, query, N, positions, theta, rotary)
    refuse_forward_mode(op, (query, key, value, *(rotary or ())))
    with without_autocast(query.device.type):
        g = index_map if index_map.dim() == 2 else index_map[None]
        tokens = masks.Tokens(torch.ops.modalign.virtual_tokens(g, cu_seqlens, Nu, index_map.dim() == 1))
        keep = masks.relation({(0, 0): "always"}, tokens)  # of the same sequence, and no padding
        if mask is not None:
            keep = keep & (masks.from_dense(mask, N, N) if isinstance(mask, Tensor) else mask)
        angles = _tables(query, tokens.index if positions is None else positions, theta, rotary)
        q, k, v = (call("virtual_unmerge", each.to(accumulation_dtype(each.dtype)), g) for each in (query, key, value))
        f = masked_attention(turned(q, *angles), turned(k, *angles), v, keep, causal=causal, scale=scale)
        return call("virtual_merge", f, g, Nu).to(query.dtype)


class VirtualUnmergeCache:
    """Keys and values of merged tokens, for decoding: tokens that come later are groups of their own.

    It is made from what the prefill got, and holds Nu keys and values, not N: every step repeats and turns them anew, in the memory of N keys and values.

    >>> import torch
    >>> q, v = torch.zeros(1, 1, 2, 4), torch.tensor([1.0, 4.0]).view(1, 1, 2, 1)
    >>> cache = VirtualUnmergeCache(q, v, torch.tensor([0, 0, 1]))
    >>> cache.attend(q[:, :, :1], q[:, :, :1], torch.full((1, 1, 1, 1), 10.0)).item()  # (1 + 1 + 4 + 10) / 4
    4.0
    """

    def __init__(
        self,
        key: Tensor,
        value: Tensor,
        index_map: Tensor,
        *,
        positions: Tensor | None = None,
        theta: float | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        op = "VirtualUnmergeCache"
        _, self.key, self.value = _check_operands(op, key, key, value)
        _check_angles(op, key, _check_map(op, index_map, key), positions, theta, rotary)
        self.index_map = index_map if index_map.dim() == 2 else index_map[None]
        tokens = masks.Tokens(torch.ops.modalign.virtual_tokens(self.index_map, None, key.shape[2], index_map.dim() == 1))
        positions = tokens.index if positions is None else positions
        self.theta, self.angles = theta, _tables(key, positions, theta, rotary)
        self.next = None if rotary is not None else torch.zeros(1, 1, dtype=torch.int64, device=key.device)  # [1 or B, 1]
        if self.next is not None and self.index_map.numel():
            lowest = -torch.inf if positions.is_floating_point() else torch.iinfo(torch.int64).min
            places = positions if positions.is_floating_point() else positions.long()
            highest = places.masked_fill(self.index_map < 0, lowest).amax(1, keepdim=True)
            self.next = torch.where(self._any(), highest + 1, 0)

    def _any(self) -> Tensor:
        """bool [1 or B, 1], whether an item has tokens."""
        return (self.index_map >= 0).any(1, keepdim=True)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, positions: Tensor | None = None, rotary: tuple[Tensor, Tensor] | None = None, scale: float | None = None
    ) -> Tensor:
        """[B, H, n, Dv]: what n new tokens get of all before them and of those up to themselves; they stay in the cache.

        `positions` of the new tokens: [n] or [B, n], by default those after the highest so far; `rotary` in their place, for a cache that was made with it.
        """
        op = "VirtualUnmergeCache.attend"
        query, key, value = _check_operands(op, query, key, value)
        for name, new, old in (("key", key, self.key), ("value", value, self.value)):
            if new.dtype != old.dtype or new.shape[:2] != old.shape[:2] or new.shape[3] != old.shape[3] or new.device != old.device:
                raise ValueError(f"{op}: {name} must be like the cache's but for its tokens, {arguments.describe(old)}, got {arguments.describe(new)}")
        n = key.shape[2]
        if query.shape[2] != n:
            raise ValueError(f"{op}: query must have key's {n} tokens, got {arguments.describe(query)}")
        if (self.next is None) != (rotary is not None):
            raise ValueError(f"{op}: rotary must be given if the cache was made with it, and only then, got {arguments.describe(rotary)}")
        _check_angles(op, query, n, positions, None, rotary)
        check.check_numbers(op, query, False, scale, 0)
        if rotary is None and positions is None:
            positions = self.next + torch.arange(n, device=key.device)
        angles, Nu = _tables(query, positions, self.theta, rotary), self.key.shape[2]
        refuse_forward_mode(op, (query, key, value, self.key, self.value, *angles, *self.angles))
        if positions is not None and n:
            behind = positions.reshape(-1, n).amax(1, keepdim=True) + 1
            self.next = torch.where(self._any(), torch.maximum(self.next, behind), behind)
        own = torch.arange(Nu, Nu + n, device=key.device).expand(len(self.index_map), n)
        self.key, self.value, self.index_map = torch.cat([self.key, key], 2), torch.cat([self.value, value], 2), torch.cat([self.index_map, own], 1)
        self.angles = tuple(torch.cat([each.expand(max(len(old), len(new)), -1, -1, -1) for each in (old, new)], 2) for old, new in zip(self.angles, angles, strict=True))
        with without_autocast(query.device.type):
            real = accumulation_dtype(query.dtype)
            k, v = (call("virtual_unmerge", each.to(real), self.index_map) for each in (self.key, self.value))
            there = (self.index_map >= 0)[:, None, None]
            return masked_attention(turned(query.to(real), *angles), turned(k, *self.angles), v, there, causal=True, scale=scale).to(query.dtype)


# --------------------------------------------------------------------------------------------------------------------------------------- arguments


def _check_operands(op: str, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = check.check_operands(op, *(check.in_autocast_dtype(each) for each in (query, key, value)), 4)
    if query.shape[3] % 2:
        raise ValueError(f"{op}: query must have an even width D, of halves that are turned against each other, got {arguments.describe(query)}")
    return query, key, value


def _check_map(op: str, index_map: object, like: Tensor) -> int:
    B = len(like)
    if not isinstance(index_map, Tensor) or index_map.dtype is not torch.int64:
        raise TypeError(f"{op}: index_map must be an int64 tensor [N] or [{B}, N], got {arguments.describe(index_map)}")
    if index_map.dim() not in (1, 2) or (index_map.dim() == 2 and len(index_map) != B) or index_map.device != like.device:
        raise ValueError(f"{op}: index_map must have shape [N] or [{B}, N] on {like.device}, got {arguments.describe(index_map)}")
    return index_map.shape[-1]


def _check_angles(op: str, like: Tensor, N: int, positions: object, theta: object, rotary: object) -> None:
    (B, _, _, D), shapes = like.shape, "[N] or [B, N]"
    if rotary is not None and (positions is not None or theta is not None):
        raise ValueError(f"{op}: rotary must not be given together with positions or theta, got both")
    if rotary is not None and (not isinstance(rotary, tuple) or len(rotary) != 2):
        raise TypeError(f"{op}: rotary must be two tensors (cos, sin), got {arguments.describe(rotary)}")
    if theta is not None and (isinstance(theta, bool) or not isinstance(theta, (int, float))):
        raise TypeError(f"{op}: theta must be a number, got {arguments.describe(theta)}")
    if theta is not None and not 0 < theta < torch.inf:
        raise ValueError(f"{op}: theta must be finite and above 0, got {theta!r}")
    given = [("positions", positions, (N,))] if positions is not None else [("rotary", each, (N, D // 2)) for each in rotary or ()]  # type: ignore[attr-defined]
    for name, each, shape in given:
        if not isinstance(each, Tensor) or each.dtype is torch.bool or each.is_complex() or (name == "rotary" and not each.is_floating_point()):
            raise TypeError(f"{op}: {name} must be {'two floating-point tensors' if name == 'rotary' else 'a tensor of numbers'}, got {arguments.describe(each)}")
        if each.dim() not in (len(shape), len(shape) + 1) or each.shape[-len(shape) :] != shape or (each.dim() > len(shape) and len(each) != B) or each.device != like.device:
            raise ValueError(f"{op}: {name} must have shape {list(shape)} or {[B, *shape]} on {like.device}, got {arguments.describe(each)}")


# ---------------------------------------------------------------------------------------------------------------------------------------- rotation


def _tables(like: Tensor, positions: Tensor, theta: float | None, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """cos and sin, [1 or B, 1, N, D / 2] in the accumulation dtype."""
    if rotary is None:
        rotary = rotary_tables(positions, like.shape[3], THETA if theta is None else theta, accumulation_dtype(like.dtype))
    cos, sin = (each.to(accumulation_dtype(like.dtype))[:, None] if each.dim() == 3 else each.to(accumulation_dtype(like.dtype))[None, None] for each in rotary)
    return cos, sin


# ------------------------------------------------------------------------------------------------------------------- to virtual tokens and back


def _virtual_tokens(index_map: Tensor, cu_seqlens: Tensor | None, groups: int, covering: bool) -> Tensor:
    """What masks ask of virtual tokens: their sequence, and whether they are there. Values are looked at here."""
    op, N = "virtual_unmerge_attention", index_map.shape[1]
    wrong = (index_map < (0 if covering else -1)) | (index_map >= groups)
    if bool(wrong.any()):
        raise RuntimeError(f"{op}: index_map must be from 0 to Nu - 1 = {groups - 1}, or -1 for padding in a map [B, N], got {int(index_map[wrong][0])}")
    unnamed = index_map.flatten().bincount(minlength=groups) == 0 if covering else index_map.new_zeros(1, dtype=torch.bool)
    if bool(unnamed.any()):
        raise RuntimeError(f"{op}: index_map must name every merged token, got none for {int(unnamed.nonzero()[0])}")
    document = torch.zeros(N, dtype=torch.int64, device=index_map.device)
    if cu_seqlens is not None:
        if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != N or bool((cu_seqlens.diff() < 0).any()):
            raise RuntimeError(f"{op}: cu_seqlens must rise from 0 to N = {N}, got {cu_seqlens.tolist()}")
        document = torch.searchsorted(cu_seqlens[1:].contiguous(), torch.arange(N, device=index_map.device), right=True)
    return masks.tokens(torch.zeros_like(index_map), document=document, valid=index_map >= 0).fields


def _unmerge(x: Tensor, index_map: Tensor) -> Tensor:
    """[B, H, Nu, D] to [B, H, N, D]: x_g(i) at i, 0 for padding."""
    B, H, Nu, D = x.shape
    N = index_map.shape[1]
    if Nu == 0:
        return x.new_zeros(B, H, N, D)
    if len(index_map) == 1:
        out = x.index_select(2, index_map[0].clamp(min=0))
    else:
        out = x.gather(2, index_map.clamp(min=0)[:, None, :, None].expand(B, H, N, D))
    return out.masked_fill_((index_map < 0)[:, None, :, None], 0)


def _group_sums(x: Tensor, index_map: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """[B, H, N, D] to [B, H, Nu, D], sums over the i with g(i) = u in their order, and how many these are [1 or B, 1, Nu, 1]. One thread adds a group, so no number of threads changes a bit.

    Sums are float64: those of a group of thousands, one term after the other, would lose digits of float32."""
    B, H, N, D = x.shape
    items, bags = torch.arange(B, device=x.device)[:, None], groups + 1  # bag 0 of an item is its padding
    bag = (items * bags + index_map + 1).flatten()
    order = bag.argsort(stable=True)
    starts = torch.searchsorted(bag[order], torch.arange(B * bags, device=x.device))
    counts = starts.diff(append=starts.new_tensor([B * N])).view(B, 1, bags, 1)[:, :, 1:]
    if x.numel() == 0:
        return x.new_zeros(B, H, groups, D, dtype=torch.float64), counts
    sums = torch.nn.functional.embedding_bag(order, x.transpose(1, 2).reshape(B * N, H * D).double(), starts, mode="sum")
    return sums.view(B, bags, H, D)[:, 1:].transpose(1, 2).contiguous(), counts


def _unmerge_backward(grad: Tensor, index_map: Tensor, groups: int) -> Tensor:
    return _group_sums(grad, index_map, groups)[0].to(grad.dtype)


def _merge(x: Tensor, index_map: Tensor, groups: int) -> Tensor:
    sums, counts = _group_sums(x, index_map, groups)
    return (sums / counts.clamp(min=1)).to(x.dtype)


def _merge_backward(grad: Tensor, index_map: Tensor) -> Tensor:
    counts = _group_sums(grad.new_empty(len(index_map), 0, index_map.shape[1], 0), index_map, grad.shape[2])[1]
    return _unmerge(grad / counts.clamp(min=1), index_map)


# ------------------------------------------------------------------------------------------------------------------------- what torch needs to know


def _fake_tokens(index_map: Tensor, cu_seqlens: Tensor | None, groups: int, covering: bool) -> Tensor:
    return index_map.new_empty(len(index_map), len(masks.FIELDS), index_map.shape[1], dtype=torch.int32)


def _fake_unmerge(x: Tensor, index_map: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], index_map.shape[1], x.shape[3])


def _fake_merge(x: Tensor, index_map: Tensor, groups: int) -> Tensor:
    return x.new_empty(*x.shape[:2], groups, x.shape[3])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.groups = inputs[0].shape[2]  # of a merge: virtual tokens, not needed
    ctx.save_for_backward(inputs[1])


def _backward_of_unmerge(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return call("virtual_unmerge_bwd", grad, *ctx.saved_tensors, ctx.groups), None


def _backward_of_merge(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return call("virtual_merge_bwd", grad, *ctx.saved_tensors), None, None


_library = torch.library.Library("modalign", "FRAGMENT")
_library.define("virtual_tokens(Tensor index_map, Tensor? cu_seqlens, SymInt groups, bool covering) -> Tensor")
_library.define("virtual_unmerge(Tensor x, Tensor index_map) -> Tensor")
_library.define("virtual_unmerge_bwd(Tensor grad, Tensor index_map, SymInt groups) -> Tensor")
_library.define("virtual_merge(Tensor x, Tensor index_map, SymInt groups) -> Tensor")
_library.define("virtual_merge_bwd(Tensor grad, Tensor index_map) -> Tensor")
for _name, _function in {
    "virtual_tokens": _virtual_tokens,
    "virtual_unmerge": _unmerge,
    "virtual_unmerge_bwd": _unmerge_backward,
    "virtual_merge": _merge,
    "virtual_merge_bwd": _merge_backward,
}.items():
    _library.impl(_name, _function, "CPU")
torch.library.register_fake("modalign::virtual_tokens", _fake_tokens)
register_looping_vmap("modalign::virtual_tokens")
for _name, _fakes, _backward in (("virtual_unmerge", (_fake_unmerge, _fake_merge), _backward_of_unmerge), ("virtual_merge", (_fake_merge, _fake_unmerge), _backward_of_merge)):
    register_pair(
        _name, op="virtual_unmerge_attention", fake=_fakes[0], fake_backward=_fakes[1], setup_context=_setup_context, backward=_backward, vmap="loop", autocast=False
    )


# ----------------------------------------------------------------------------------------------------------------------------- plain-torch formulas


def reference_virtual_unmerge_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index_map: Tensor,
    *,
    positions: Tensor | None = None,
    theta: float | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    causal: bool = True,
    mask: Tensor | check.MaskProgram | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`virtual_unmerge_attention` in plain torch: products with the matrix [N, Nu] of who stands for whom, and all N x N logits at once."""
    real, N, device = accumulation_dtype(query.dtype), index_map.shape[-1], query.device
    g = index_map.view(-1, N)
    member = (g[:, :, None] == torch.arange(query.shape[2], device=device)).to(real)[:, None]  # [1 or B, 1, N, Nu]
    sequence = torch.zeros(N, dtype=torch.int64, device=device)
    for n, first in enumerate([] if cu_seqlens is None else cu_seqlens[:-1].tolist()):
        sequence[first:] = n
    token = torch.arange(N, device=device)
    keep = ((g >= 0)[:, None, None, :] & (g >= 0)[:, None, :, None]) & (sequence[:, None] == sequence)
    keep = keep & (token <= token[:, None]) if causal else keep
    if mask is not None:
        dense = mask if isinstance(mask, Tensor) else mask.dense()
        if dense.dim() == 4 and dense.shape[1] not in (1, query.shape[1]):
            dense = dense.repeat_interleave(query.shape[1] // dense.shape[1], 1)
        keep = keep & dense
    if rotary is None:
        angle = (token if positions is None else positions).double()[..., None] * (THETA if theta is None else theta) ** (
            -torch.arange(0, query.shape[3], 2, dtype=torch.float64, device=device) / query.shape[3]
        )
        rotary = angle.cos(), angle.sin()
    cos, sin = (each.to(real).view(-1, 1, N, query.shape[3] // 2) for each in rotary)
    q, k, v = (member @ each.to(real) for each in (query, key, value))
    f = reference_masked_attention(turned(q, cos, sin), turned(k, cos, sin), v, keep, scale=scale)
    return (member.mT @ f / member.sum(2).clamp(min=1)[..., None]).to(query.dtype)
