"""Masks from and to what other libraries call a mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._values import are_there
from .mask import Mask, blocks, causal, from_dense, intervals

__all__ = ["from_block_mask", "from_bsr", "from_flashmask", "to_block_mask", "to_bsr", "to_flashmask"]


# ------------------------------------------------------------------------------------------------------------------------------------------------ tiles


def _tiles(mask: Mask, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """bool [B, H, rows, columns]: tiles of which something is kept, and those that are kept whole (what lies beyond the edge counts as kept)."""
    rows, columns = -(-mask.queries // size[0]), -(-mask.keys // size[1])
    beside = columns * size[1] - mask.keys
    some, whole = [], []
    for row in range(rows):  # a row of tiles at a time, so that no matrix of all pairs is made
        keep = mask.rows(row * size[0], min((row + 1) * size[0], mask.queries)).dense()
        there = torch.nn.functional.pad(keep, (0, beside)).unflatten(3, (columns, size[1]))
        full = torch.nn.functional.pad(keep, (0, beside), value=True).unflatten(3, (columns, size[1]))
        some.append(there.any(4).any(2))
        whole.append(full.all(4).all(2))
    return torch.stack(some, 2), torch.stack(whole, 2)


def from_block_mask(block_mask: Any) -> Mask:
    """A FlexAttention BlockMask. Tiles that it keeps in part are asked pair by pair: of its `mask_mod` a matrix of all pairs is made, unless there are none."""
    from torch.nn.attention.flex_attention import create_mask

    queries, keys = block_mask.seq_lengths
    size = block_mask.BLOCK_SIZE
    if block_mask.full_kv_num_blocks is not None:
        whole = _from_lists(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, size, queries, keys)
        if not bool(block_mask.kv_num_blocks.any()):
            return blocks(whole, size, queries, keys)
    else:
        whole = None
    part = _from_lists(block_mask.kv_num_blocks, block_mask.kv_indices, size, queries, keys)
    B, H = part.shape[:2]
    pairs = from_dense(create_mask(block_mask.mask_mod, B, H, queries, keys, device=part.device)) & blocks(part, size, queries, keys)
    return pairs if whole is None else pairs | blocks(whole, size, queries, keys)


def _from_lists(counts: Tensor, indices: Tensor, size: tuple[int, int], queries: int, keys: int) -> Tensor:
    rows, columns = -(-queries // size[0]), -(-keys // size[1])
    listed = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    keep = torch.zeros(*indices.shape[:-1], columns + 1, dtype=torch.bool, device=indices.device)
    keep.scatter_(-1, torch.where(listed, indices, columns).long(), True)
    return keep[..., :rows, :columns]


def to_block_mask(mask: Mask, size: int | tuple[int, int] = 128) -> Any:
    """A FlexAttention BlockMask of the same pairs. Its `mask_mod` reads the matrix of all pairs."""
    from torch.nn.attention.flex_attention import BlockMask

    size = (size, size) if isinstance(size, int) else size
    some, whole = _tiles(mask, size)
    dense = mask.dense()
    part = some & ~whole

    def lists(tiles: Tensor) -> tuple[Tensor, Tensor]:
        return tiles.sum(-1, dtype=torch.int32), tiles.int().argsort(dim=-1, descending=True, stable=True).to(torch.int32)

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return dense[b if dense.shape[0] > 1 else 0, h if dense.shape[1] > 1 else 0, i, j]

    return BlockMask.from_kv_blocks(*lists(part), *lists(whole), BLOCK_SIZE=size, mask_mod=mask_mod, seq_lengths=(mask.queries, mask.keys))


def from_bsr(indptr: Tensor, indices: Tensor, size: tuple[int, int], queries: int, keys: int) -> Mask:
    """Block-sparse rows: row r of tiles keeps the columns indices[indptr[r]] to indices[indptr[r + 1] - 1]."""
    rows, columns = -(-queries // size[0]), -(-keys // size[1])
    if indptr.shape != (rows + 1,) or int(indptr[0]) != 0 or int(indptr[-1]) != len(indices) or bool((indptr.diff() < 0).any()):
        raise ValueError(f"from_bsr: indptr must rise from 0 to {len(indices)} in {rows + 1} entries, got {list(indptr.shape)}")
    if indptr.is_floating_point() or indices.is_floating_point():
        raise TypeError(f"from_bsr: indptr and indices must be whole numbers, got {indptr.dtype} and {indices.dtype}")
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < columns:
        raise ValueError(f"from_bsr: indices must be from 0 to {columns - 1}, got {int(indices.min())} to {int(indices.max())}")
    keep = torch.zeros(rows, columns, dtype=torch.bool, device=indices.device)
    keep[torch.repeat_interleave(torch.arange(rows, device=indices.device), indptr.diff().long()), indices.long()] = True
    if int(keep.sum()) != len(indices):
        raise ValueError(f"from_bsr: indices must be different in every row, got {len(indices) - int(keep.sum())} again")
    return blocks(keep, size, queries, keys)


def to_bsr(mask: Mask, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(indptr, indices) int32 of a mask of one item and head whose tiles are kept whole or not at all."""
    some, whole = _tiles(mask, size)
    if some.shape[:2] != (1, 1) or not torch.equal(some, whole):
        raise ValueError(f"to_bsr: mask must be of one item and head and keep tiles of {size} whole or not at all, got another")
    keep = some[0, 0]
    return torch.nn.functional.pad(keep.sum(1).cumsum(0), (1, 0)).to(torch.int32), keep.nonzero()[:, 1].to(torch.int32)


# --------------------------------------------------------------------------------------------------------------------------------------------- FlashMask


def from_flashmask(startend_row_indices: Tensor, queries: int, *, is_causal: bool) -> Mask:
    """FlashMask's column intervals [B, H, Nk, 1, 2 or 4]: rows that are *not* kept in a column.

    causal: [start) to the end, or [start, end), below the diagonal. Both ways: [start) to the end and up to [end), or [start, end) below and [start, end) above.
    """
    given = startend_row_indices
    if not isinstance(given, Tensor) or given.dim() != 4 or given.shape[3] not in ((1, 2) if is_causal else (2, 4)):
        wanted = "1 or 2" if is_causal else "2 or 4"
        raise ValueError(f"from_flashmask: startend_row_indices must have shape [B, H, Nk, {wanted}] for is_causal={is_causal}, got {list(getattr(given, 'shape', []))}")
    if given.is_floating_point() or (are_there(given) and given.numel() and not 0 <= int(given.min()) <= int(given.max()) <= queries):
        raise ValueError(f"from_flashmask: startend_row_indices must be whole numbers from 0 to queries = {queries}, got {given.dtype} from {given.min()} to {given.max()}")
    bounds = given.to(torch.int32).clamp(0, queries)
    zero, end = torch.zeros_like(bounds[..., 0]), torch.full_like(bounds[..., 0], queries)

    def rows(low: Tensor, high: Tensor) -> Mask:
        return intervals(torch.stack([torch.minimum(low, high), high], -1), queries)

    if is_causal:
        below = causal(queries, given.shape[2], align="top_left", device=given.device)
        return below & ~rows(bounds[..., 0], end if given.shape[3] == 1 else bounds[..., 1])
    if given.shape[3] == 2:
        return ~rows(bounds[..., 0], end) & ~rows(zero, bounds[..., 1])
    return ~rows(bounds[..., 0], bounds[..., 1]) & ~rows(bounds[..., 2], bounds[..., 3])


def to_flashmask(mask: Mask) -> Tensor:
    """[B, H, Nk, 2] int32, for both ways, of a mask in which every key is kept for one range of queries: rows from the first entry on and those before the second are not kept."""
    keep = mask.dense()
    count = keep.sum(2)
    first = keep.int().argmax(2)
    last = keep.shape[2] - keep.flip(2).int().argmax(2)
    if bool(((last - first != count) & (count > 0)).any()):
        raise ValueError("to_flashmask: mask must keep every key for one range of queries, got another")
    empty = count == 0
    return torch.stack([torch.where(empty, 0, last), torch.where(empty, keep.shape[2], first)], -1).to(torch.int32)
