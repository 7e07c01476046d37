"""One light projection for all modalities, to which they are added one after the other. [OneEncoder, 2024]"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..ops._arguments import describe
from ..ops._gram_schmidt import unit
from .functional._features import masked_mean

__all__ = ["UniversalProjection"]

FUSIONS = ("addition", "multiplication")


class UniversalProjection(nn.Module):
    r"""Tokens of any frozen encoder to one unit vector: a head and a token of the modality, then a transformer that all modalities share. [OneEncoder, 2024]

    ::

        h = head(tokens),  t = MLP(modality token)         fused = h + t, or h * t
        out = unit(mean over tokens of (transformer(LayerNorm(fused)) + fused))
        head: p = Linear(x), LayerNorm(p + dropout(Linear(GELU(p))))          MLP: 3 -> 64 -> 128 -> width, LayerNorm

    The modalities of the first step, picture and text as published, train everything. `add_modality` then freezes all there is and adds a head and a token
    for a new modality, to be trained against one that is aligned already; so pairs of one old modality are enough to place it among all.

    >>> import torch
    >>> model = UniversalProjection({"image": 32, "text": 24}, width=16)
    >>> image, text = model("image", torch.randn(2, 9, 32)), model("text", torch.randn(2, 5, 24))
    >>> model.add_modality("audio", 12)
    >>> model("audio", torch.randn(2, 7, 12)).shape, model("text", torch.randn(2, 5, 24)).requires_grad
    (torch.Size([2, 16]), False)

    Parameters: modalities, a mapping of name to width of the encoder's tokens; width of the shared space; heads and layers of the transformer, whose
    feed-forward width is 4 width; dropout; fusion, "addition" or "multiplication".

    The call takes the name of a modality, its tokens [B, N, D_m] with N of 1 or more, and mask bool [B, N], False for padding, which is never read; it gives
    [B, width] in the dtype of the tokens. A sample without tokens is the zero vector.

    `logit_scale` is that of `ops.clip_loss` in the released code: it clamps a detached exponent to [2.5, 3], which leaves it at e^2.5 for good.

    Raises ValueError for a modality that is unknown, or known when it is added, and for shapes and options."""

    logit_scale = math.exp(2.5)

    def __init__(
        self, modalities: dict[str, int], width: int = 256, *, heads: int = 4, layers: int = 1, dropout: float = 0.1, fusion: str = "addition"
    ) -> None:
        super().__init__()
        if not modalities:
            raise ValueError("UniversalProjection: modalities must name at least one, got none")
        if width < 1 or heads < 1 or layers < 1 or width % heads:
            raise ValueError(f"UniversalProjection: width must be a multiple of heads and these and layers at least 1, got {width}, {heads} and {layers}")
        if fusion not in FUSIONS:
            raise ValueError(f'UniversalProjection: fusion must be "addition" or "multiplication", got {fusion!r}')
        self.width, self.dropout, self.fusion = width, dropout, fusion
        self.heads, self.tokens = nn.ModuleDict(), nn.ModuleDict()
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(width, heads, 4 * width, dropout, batch_first=True) for _ in range(layers))
        for name, features in modalities.items():
            self._add(name, features)

    def _add(self, name: str, features: int) -> None:
        if name in self.heads:
            raise ValueError(f"UniversalProjection: name must be that of a new modality, got '{name}' again")
        if "." in name or hasattr(nn.ModuleDict, name):
            raise ValueError(f"UniversalProjection: name must not have a '.' in it or be one that torch keeps for itself, got '{name}'")
        if features < 1:
            raise ValueError(f"UniversalProjection: the width of '{name}' must be at least 1, got {features}")
        self.heads[name] = _Head(features, self.width, self.dropout)
        self.tokens[name] = _ModalityToken(self.width)

    def add_modality(self, name: str, features: int) -> None:
        """Freeze everything there is and add a modality whose tokens have the width `features`: only its head and its token are trained."""
        self._add(name, features)
        for parameter in self.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        for parameter in (*self.heads[name].parameters(), *self.tokens[name].parameters()):
            parameter.requires_grad_(True)
        like = self.norm.weight
        self.heads[name].to(like.device, like.dtype)
        self.tokens[name].to(like.device, like.dtype)

    def forward(self, name: str, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        if name not in self.heads:
            raise ValueError(f"UniversalProjection: name must be one of {list(self.heads)}, got {name!r}")
        features = self.heads[name].first.in_features
        if tokens.dim() != 3 or tokens.shape[1] == 0 or tokens.shape[2] != features:
            raise ValueError(f"UniversalProjection: tokens of '{name}' must be [B, N, {features}] with N of 1 or more, got {describe(tokens)}")
        if mask is None:
            mask = tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
        elif mask.dtype is not torch.bool or mask.shape != tokens.shape[:2]:
            raise ValueError(f"UniversalProjection: mask must be bool [B, N] = {list(tokens.shape[:2])}, got {describe(mask)}")
        h, token = self.heads[name](torch.where(mask[..., None], tokens, 0)), self.tokens[name]()
        fused = h + token if self.fusion == "addition" else h * token
        # A sample without tokens attends to its zeros: what attention over nothing gives depends on the kernel that torch takes.
        z, hidden = self.norm(fused), ~(mask | ~mask.any(1, keepdim=True))
        for layer in self.layers:
            z = layer(z, src_key_padding_mask=hidden)
        return unit(masked_mean(z + fused, mask))


class _Head(nn.Module):
    def __init__(self, features: int, width: int, dropout: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(features, width), nn.Linear(width, width)
        self.dropout, self.norm = nn.Dropout(dropout), nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        first = self.first(tokens)
        return self.norm(first + self.dropout(self.second(nn.functional.gelu(first))))


class _ModalityToken(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(3))
        self.map = nn.Sequential(nn.Linear(3, 64), nn.GELU(), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, width), nn.LayerNorm(width))

    def forward(self) -> Tensor:
        return self.map(self.token)
