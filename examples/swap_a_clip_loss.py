"""Swap the loss of a CLIP training loop: one line changes, the losses stay the same, the memory becomes linear in the batch.

    python examples/swap_a_clip_loss.py
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from modalign.ops import clip_loss
from modalign.testing import peak_memory

BATCH, WIDTH, STEPS = 5000, 128, 5


def usual(image, text, scale):
    logits = scale * image @ text.T
    at = torch.arange(len(logits))
    return (F.cross_entropy(logits, at) + F.cross_entropy(logits.T, at)) / 2


def ours(image, text, scale):
    return clip_loss(image, text, logit_scale=scale)  # the one line


def train(loss_function, batch, steps):
    """A training loop as many have it; two linear heads on made-up features that share 16 hidden numbers."""
    torch.manual_seed(0)
    image_head, text_head = torch.nn.Linear(48, WIDTH), torch.nn.Linear(32, WIDTH)
    log_scale = torch.nn.Parameter(torch.tensor(1 / 0.07).log())
    optimizer = torch.optim.AdamW([*image_head.parameters(), *text_head.parameters(), log_scale], lr=1e-3)
    mix_image, mix_text, losses = torch.randn(16, 48), torch.randn(16, 32), []
    for _ in range(steps):
        hidden = torch.randn(batch, 16)
        image = F.normalize(image_head(hidden @ mix_image + torch.randn(batch, 48)), dim=1)
        text = F.normalize(text_head(hidden @ mix_text + torch.randn(batch, 32)), dim=1)
        loss = loss_function(image, text, log_scale.exp().clamp(max=100))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def memory(name):
    """What `peak_memory` measures, in a process of its own."""
    return lambda: train(globals()[name], BATCH, 1), lambda: train(globals()[name], 32, 1)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    before, after = train(usual, BATCH, STEPS), train(ours, BATCH, STEPS)
    for step, (one, other) in enumerate(zip(before, after, strict=True)):
        print(f"step {step}   two cross entropies {one:.6f}   clip_loss {other:.6f}")
        assert abs(one - other) < 1e-5 * one
    peaks = {name: peak_memory("swap_a_clip_loss:memory", name=name).peak / 1e6 for name in ("usual", "ours")}
    print(f"peak memory of a step at batch {BATCH}: {peaks['usual']:.0f} MB before, {peaks['ours']:.0f} MB after")
    assert peaks["ours"] < peaks["usual"] / 2
