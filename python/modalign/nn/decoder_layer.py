"""A layer of a language model, in which masks take effect. [Llama, 2023]"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ._tokens import check_number, check_sizes
from .masked_attention import KeyValues, MaskedAttention

__all__ = ["DecoderLayer", "GatedFeedForward"]


class GatedFeedForward(nn.Module):
    """``W_down (silu(W_gate x) * W_up x)``. [GLU variants, 2020]

    >>> import torch
    >>> GatedFeedForward(8, 20)(torch.randn(2, 3, 8)).shape
    torch.Size([2, 3, 8])

    Parameters: width D; hidden units. `units` of the call: the first so many of the hidden units take part, and no others are computed."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        check_sizes("GatedFeedForward", width=width, hidden=hidden)
        self.gate_proj, self.up_proj = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, units: int | None = None) -> Tensor:
        hidden = self.down_proj.in_features
        if units is not None and (isinstance(units, bool) or not isinstance(units, int) or not 1 <= units <= hidden):
            raise ValueError(f"GatedFeedForward: units must be None or a whole number from 1 to {hidden}, got {units!r}")
        gate, up, down = self.gate_proj.weight[:units], self.up_proj.weight[:units], self.down_proj.weight[:, :units]
        return nn.functional.linear(nn.functional.silu(nn.functional.linear(x, gate)) * nn.functional.linear(x, up), down)


class DecoderLayer(nn.Module):
    """Attention and a gated feed-forward, each behind an RMSNorm and with a residual; the layer that the layers of papers here are variants of.

    ::

        h = x + self_attn(input_layernorm(x), mask)
        out = h + mlp(post_attention_layernorm(h))

    >>> import torch
    >>> from modalign import masks
    >>> layer = DecoderLayer(16, heads=4)
    >>> tokens = masks.layout([("prefix", 1), ("visual", (2, 2)), ("question", 2), ("answer", 2)])
    >>> layer(torch.randn(1, 9, 16), masks.modality_mutual(tokens)).shape
    torch.Size([1, 9, 16])

    The call takes x [B, N, width], mask (causal without one), and positions, past and return_keys of `MaskedAttention`. The names of weights are those of Llama layers.

    Parameters: width, heads, key_heads, head_width and rotary of `MaskedAttention`; hidden units of the feed-forward, default 4 width; eps of the norms.
    Raises as `MaskedAttention` does."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        key_heads: int | None = None,
        head_width: int | None = None,
        hidden: int | None = None,
        rotary: float | None = 10000.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        check_sizes("DecoderLayer", width=width, heads=heads)
        check_number("DecoderLayer", "eps", eps)
        self.input_layernorm = nn.RMSNorm(width, eps=eps)
        self.self_attn = MaskedAttention(width, heads, key_heads=key_heads, head_width=head_width, rotary=rotary)
        self.post_attention_layernorm = nn.RMSNorm(width, eps=eps)
        self.mlp = GatedFeedForward(width, 4 * width if hidden is None else hidden)

    def forward(self, x: Tensor, mask: Any = None, *, positions: Tensor | None = None, past: KeyValues | None = None, return_keys: bool = False) -> Any:
        attended, keys = self.self_attn(self.input_layernorm(x), mask=mask, causal=mask is None, positions=positions, past=past, return_keys=True)
        out = self.feed_forward(x + attended)
        return (out, keys) if return_keys else out

    def feed_forward(self, x: Tensor) -> Tensor:
        """x with the second residual."""
        return x + self.mlp(self.post_attention_layernorm(x))
