"""Where a patch of a picture lies in another modality of it: matching learned on generated modalities. [MINIMA, CVPR 2025; LoFTR, CVPR 2021]

    python examples/matching_modalities.py                                                    # made-up pictures and patches, seconds
    python examples/matching_modalities.py --data-root DIR --seeds 5 --out matching.json      # `modalign prepare emoji`, some minutes

The other view of a picture is an edge map, a sketch, ... and turned by quarters and flipped at random, so that places are known and do not give themselves away. Patches are ViT-S/14 tokens
(frozen), a linear map of them is learned with a contrastive loss on pairs of patches of training pictures, and matched by `dual_softmax_matching`. Beside it: the tokens as they are.

Metric, named before any run: `match_auc` up to 28 pixels, two patches, over the patches that hold something, unmatched ones as infinitely far; the share of matches in place (precision) beside it.
"""

import argparse
import os
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F

from modalign.bench import environment
from modalign.data import MODALITY_TRANSFORMS, load, modality_transform
from modalign.metrics import match_auc
from modalign.ops import clip_loss, dual_softmax_matching

SIDE, GRID, THRESHOLD = 112, 8, 28.0
TRAIN, TEST, STEPS, WIDTH = 200, 80, 300, 128
T_95 = {2: 12.706, 3: 4.303, 5: 2.776}  # of a t distribution, by the number of seeds


def made_up(count):
    generator = torch.Generator().manual_seed(0)
    return F.interpolate(torch.rand(count, 3, 9, 9, generator=generator), SIDE, mode="bicubic").clamp(0, 1)


def patches_as_they_are(pictures):
    """Colours of every patch in rising order, so that turning it changes nothing."""
    tiles = F.avg_pool2d(pictures, 2).unfold(2, SIDE // GRID // 2, SIDE // GRID // 2).unfold(3, SIDE // GRID // 2, SIDE // GRID // 2)
    return tiles.permute(0, 2, 3, 1, 4, 5).flatten(4).sort(4).values.reshape(len(pictures), GRID * GRID, -1)


def emoji(root, count):
    import numpy as np

    data = load("emoji", root)
    step = len(data) // count
    return torch.stack([torch.from_numpy(np.array(data.picture(i * step).convert("RGB").resize((SIDE, SIDE)))) for i in range(count)]).permute(0, 3, 1, 2).float() / 255


def vit_tokens():
    from PIL import Image

    from modalign.data import encoders

    vit = encoders.make("ViT-S/14")

    def tokens(pictures):
        images = [Image.fromarray((picture.permute(1, 2, 0) * 255).round().byte().numpy()) for picture in pictures]
        return torch.cat([torch.stack(vit.tokens(images[start : start + 32])).float() for start in range(0, len(images), 32)])

    return tokens


def turned(pictures, generator):
    """Another view, and where each patch of it lay."""
    quarters, flip = torch.randint(1, 4, (len(pictures),), generator=generator), torch.rand(len(pictures), generator=generator) < 0.5
    places = torch.arange(GRID * GRID).view(1, GRID, GRID)

    def move(x, n):
        x = torch.rot90(x, int(quarters[n]), (-2, -1))
        return x.flip(-1) if flip[n] else x

    return torch.stack([move(picture, n) for n, picture in enumerate(pictures)]), torch.stack([move(places, n).flatten() for n in range(len(pictures))])


def rate(views, head):
    """(AUC, precision) over all test pictures of one modality."""
    errors, right, found = [], 0, 0
    for ours, theirs, place, full in zip(*views, strict=True):
        x, y = (F.normalize(head(tokens), dim=1) for tokens in (ours[full], theirs))
        pairs = dual_softmax_matching(x, y, temperature=0.05, threshold=0.05).pairs
        rows = full.nonzero()[:, 0][pairs[:, 0]]
        where = place[pairs[:, 1]]  # of the matched patch in the first view
        apart = torch.stack([rows // GRID - where // GRID, rows % GRID - where % GRID], 1).double().norm(dim=1) * (SIDE / GRID)
        errors.append(torch.cat([apart, torch.full((int(full.sum()) - len(apart),), torch.inf, dtype=torch.float64)]))
        right, found = right + int((apart == 0).sum()), found + len(apart)
    return 100 * match_auc(torch.cat(errors), [THRESHOLD])[0], 100 * right / max(found, 1)


def learn(views, width, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = torch.nn.Linear(width, WIDTH, bias=False)
        torch.nn.init.orthogonal_(head.weight)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = (torch.cat([view[side] for view in views]) for side in (0, 1))
    place, full = (torch.cat([view[side] for view in views]) for side in (2, 3))
    back = place.argsort(1)  # where in the other view a patch of ours lies
    at = full.nonzero()
    x, y = ours[at[:, 0], at[:, 1]], theirs[at[:, 0], back[at[:, 0], at[:, 1]]]
    for _ in range(STEPS):
        here = torch.randint(len(x), (512,), generator=generator)
        loss = clip_loss(head(x[here]), head(y[here]), logit_scale=20.0, normalize=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-root", default=os.environ.get("MODALIGN_DATA_ROOT"), help="where `modalign prepare emoji` left its set; without it pictures are made up")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="results as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    real = bool(arguments.data_root)
    pictures, tokens = (emoji(arguments.data_root, TRAIN + TEST), vit_tokens()) if real else (made_up(60), patches_as_they_are)
    test = TEST if real else 20
    generator = torch.Generator().manual_seed(0)
    ours, full = tokens(pictures), patches_as_they_are(pictures).std(2) > 0.02
    ours, views = F.normalize(ours - ours.mean((0, 1)), dim=2), {}
    for kind in MODALITY_TRANSFORMS:
        moved, place = turned(modality_transform(pictures, kind), generator)
        theirs = tokens(moved)
        views[kind] = ours, F.normalize(theirs - theirs.mean((0, 1)), dim=2), place, full
    kept = {kind: [part[:-test] for part in view] for kind, view in views.items()}
    held = {kind: [part[-test:] for part in view] for kind, view in views.items()}
    as_they_are = {kind: rate(held[kind], torch.nn.Identity()) for kind in views}
    learned = []
    with torch.no_grad():
        for seed in range(arguments.seeds):
            with torch.enable_grad():
                head = learn(list(kept.values()), ours.shape[2], seed)
            learned.append({kind: rate(held[kind], head) for kind in views})
    print("| modality | tokens as they are: AUC (precision) | learned: AUC (precision) | gain |")
    print("|---|---:|---:|---:|")
    for kind in views:
        gain = [one[kind][0] - as_they_are[kind][0] for one in learned]
        half = T_95.get(len(gain), float("nan")) * (stdev(gain) / len(gain) ** 0.5 if len(gain) > 1 else float("nan"))
        shown = tuple(mean(one[kind][column] for one in learned) for column in (0, 1))
        print(f"| {kind} | {as_they_are[kind][0]:.1f} ({as_they_are[kind][1]:.1f}) | {shown[0]:.1f} ({shown[1]:.1f}) | {mean(gain):+.1f} [{mean(gain) - half:+.1f} … {mean(gain) + half:+.1f}] |")
    print(f"{len(pictures) - test} training and {test} test pictures, {arguments.seeds} seeds of the map; 95 % interval over them")
    if arguments.out:
        from modalign._files import write_json

        content = {"metric": f"match_auc up to {THRESHOLD:g} pixels and precision, in percent", "seeds": arguments.seeds, "as_they_are": as_they_are, "learned": learned}
        write_json(arguments.out, content | {"environment": environment.describe(torch.device("cpu"), 0)})


if __name__ == "__main__":
    main()
