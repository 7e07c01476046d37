"""Train on three modalities although some items lack one: `present` says which are there, and what stands in the gaps never matters.

    python examples/one_modality_missing.py
"""

import torch
import torch.nn.functional as F

from modalign.ops import gram_contrastive_loss, gram_volume

ITEMS, HIDDEN, WIDTH, STEPS = 256, 8, 16, 100


def made_up(seed):
    """Three views of the same hidden numbers, each mixed in its own way with noise."""
    random, mixing = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(0)
    hidden = torch.randn(ITEMS, HIDDEN, generator=random)
    views = []
    for width in (24, 32, 40):
        noisy = torch.cat([hidden, torch.randn(ITEMS, width - HIDDEN, generator=random)], 1)
        views.append(noisy @ torch.randn(width, width, generator=mixing) / width**0.5)
    return views


def train(text, video, audio, has_audio, in_the_gaps, masked=True):
    """One linear map per modality. Only audio that is there is encoded; the other rows are filled up, so that row i is always item i."""
    torch.manual_seed(0)
    maps = torch.nn.ModuleList(torch.nn.Linear(view.shape[1], WIDTH) for view in (text, video, audio))
    optimizer = torch.optim.AdamW(maps.parameters(), lr=1e-2)
    present = torch.stack([torch.ones_like(has_audio), has_audio], 1) if masked else None  # [candidates, modalities beside the anchor]
    for _ in range(STEPS):
        sound = torch.full((len(audio), WIDTH), in_the_gaps).index_put((has_audio,), maps[2](audio[has_audio]))
        loss = gram_contrastive_loss(maps[0](text), [maps[1](video), sound], present=present, temperature=0.1, normalize=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return maps, loss.item()


def found(maps, views):
    """How often the tuple with the smallest volume is the text's own."""
    with torch.no_grad():
        text, video, audio = (F.normalize(encode(view), dim=1) for encode, view in zip(maps, views, strict=True))
        return (gram_volume(text, [video, audio]).argmin(1) == torch.arange(ITEMS)).double().mean().item()


views, new_items = made_up(seed=1), made_up(seed=3)
has_audio = torch.rand(ITEMS, generator=torch.Generator().manual_seed(2)) > 0.3
maps, loss = train(*views, has_audio, in_the_gaps=0.0)
print(f"{ITEMS} items, {(~has_audio).sum()} without audio: loss {loss:.4f}, finds {found(maps, new_items):.0%} of new items, by chance {1 / ITEMS:.1%}")
assert found(maps, new_items) > 0.9

again, same_loss = train(*views, has_audio, in_the_gaps=float("nan"))
assert same_loss == loss and all(torch.equal(one, other) for one, other in zip(maps.parameters(), again.parameters(), strict=True))
print("with NaN in the gaps: the same loss and the same weights, bit for bit")

unmasked, loss = train(*views, has_audio, in_the_gaps=0.0, masked=False)
print(f"zeros without a mask: loss {loss:.4f}, finds {found(unmasked, new_items):.0%}: a tuple with a zero vector has volume 0, so it fits every text best")
assert found(unmasked, new_items) < found(maps, new_items) / 2
