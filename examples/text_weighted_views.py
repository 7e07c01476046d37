"""A point encoder learns from texts and rendered views, the views weighted by the text. [JM3D, ACM MM 2023]

    python examples/text_weighted_views.py                                       # made-up tables, half a minute
    python examples/text_weighted_views.py --data-root DIR --seeds 5 --out views.json   # the meshes of `modalign prepare furniture`, three minutes

Views are drawn at four angles, 36 degrees apart, as shaded pictures and as depth. Text and view encoders are frozen and so is their common space, which
canonical correlation finds on training items; the head of the point encoder and the view embedding learn. Three ways to make one picture of the views:
the first view alone, their plain mean, and the mean weighted by the text.

Metric, named before any run: text -> points, R@10 on test items whose captions nobody trained on.
"""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from modalign.bench import environment
from modalign.data import load
from modalign.data.points import describe_points, read_obj, sample_surface, unit_ball
from modalign.metrics import retrieval
from modalign.models import CanonicalCorrelation, CanonicalCorrelationConfig, PrincipalComponents
from modalign.nn import ViewEmbedding
from modalign.nn.functional import jma_loss
from modalign.ops import clip_loss

ANGLES = (0, 36, 72, 108)  # degrees
KINDS = ("shaded", "depth")
WAYS = {"one view": "the first shaded view alone", "mean": "the plain mean of all views", "text-weighted": "the mean weighted by the text"}
SIDE, DOTS, TILT = 112, 20_000, 20
STEPS, BATCH, REDUCED = 300, 128, 256
T_95 = {2: 12.706, 3: 4.303, 5: 2.776}  # of a t distribution, by the number of seeds


@dataclass
class Objects:
    """text [N, Dt], views [N, V, Dv] (V: kinds by angles), points [N, Dp]; groups: objects of one caption; split(seed) -> (train, test)."""

    text: torch.Tensor
    views: torch.Tensor
    points: torch.Tensor
    groups: torch.Tensor
    split: object


# --------------------------------------------------------------------------------------------------------------------------------------------- views


def views_of(vertices, triangles, seed=0, side=SIDE):
    """A mesh as dots, seen from the side without perspective: [V, side, side] in 0..1, white where nothing is."""
    random = np.random.default_rng(seed)
    corners = vertices[triangles]
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    area = np.linalg.norm(normal, axis=1)
    face = random.choice(len(area), size=DOTS, p=area / area.sum())
    along, across = np.sqrt(random.random((DOTS, 1))), random.random((DOTS, 1))
    a, b, c = (corners[face, i] for i in range(3))
    dots = unit_ball((1 - along) * a + along * (1 - across) * b + along * across * c)
    normal = normal[face] / area[face, None]
    seen = []
    for angle in np.radians(ANGLES):
        tilt = np.radians(TILT)
        turn = np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])
        nod = np.array([[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]])
        x, y, depth = (dots @ (nod @ turn).T).T
        order = np.argsort(depth, kind="stable")  # the nearest dot of a pixel is written last
        row, column = (np.clip(((1 - v) / 2 * side).astype(int), 0, side - 1)[order] for v in (y, -x))
        light = 0.25 + 0.6 * np.abs(normal @ (nod @ turn).T @ [0.4, 0.5, 0.77])
        for value in (light, 0.15 + 0.35 * (1 - depth)):
            picture = np.ones((side, side))
            picture[row, column] = np.clip(value, 0, 0.9)[order]
            seen.append(picture)
    return np.stack(seen[0::2] + seen[1::2]).astype(np.float32)


def kept(path, make):
    """The array that `make` gives, kept in a file that is there whole or not at all."""
    if path is not None and path.is_file():
        return np.load(path, allow_pickle=False)
    made = make()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".part"), "wb") as file:
            np.save(file, made)
        os.replace(path.with_suffix(".part"), path)
    return made


# ------------------------------------------------------------------------------------------------------------------------------------------- objects


def furniture(root, cache):
    """The set as `modalign prepare furniture` left it, and views of its meshes in the features of its own picture encoder."""
    from PIL import Image

    from modalign.data.encoders import make
    from modalign.data.sources import SOURCES
    from modalign.data.sources.furniture import read_member

    dataset = load("furniture", root)
    meshes = {(item.about["library"], item.about["number"]): item.inputs["points"].args[:2] for item in SOURCES["furniture"].read(root).items}

    def encoded():
        encoder, found = make(dataset.encoders["picture"]), []
        for done, item in enumerate(dataset.items):
            library, model = meshes[item["library"], item["number"]]
            views = views_of(*read_obj(read_member(library, model).decode("latin-1")), seed=done)
            found.append(encoder([Image.fromarray((255 * view).astype(np.uint8)).convert("RGBA") for view in views]).numpy())
            print(f"\rviews of {done + 1} of {len(dataset)} objects", end="", flush=True)
        print()
        return np.stack(found)

    views = torch.from_numpy(kept(cache and cache / f"views_{dataset.digest()[:16]}.npy", encoded))

    def split(seed):
        parts = dataset.splits(seed)
        return parts.train, parts.test

    return Objects(dataset.modalities["text"], views, dataset.modalities["points"], dataset.groups, split)


def box(low, high):
    """Vertices and triangles of a box."""
    corners = np.array([[x, y, z] for x in (low[0], high[0]) for y in (low[1], high[1]) for z in (low[2], high[2])], dtype=float)
    faces = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
    return corners, np.array([[f[0], f[i], f[i + 1]] for f in faces for i in (1, 2)])


def made_up(items=240, side=16):
    """Tables with and without a board at the back and a shelf. A text tells of both, and roughly of the sizes."""
    random = np.random.default_rng(0)
    mixing = random.standard_normal((5, 32))
    texts, views, points = [], [], []
    for number in range(items):
        board, shelf = random.integers(2, size=2)
        w, h, d = random.uniform((0.6, 0.5, 0.5), (1.8, 1.4, 1.2))
        parts = [((0, h, 0), (w, h + 0.08, d)), *(((x, 0, z), (x + 0.07, h, z + 0.07)) for x in (0, w - 0.07) for z in (0, d - 0.07))]
        parts += [((0, h, 0), (w, h + 0.5, 0.06))] * board + [((0, h / 3, 0), (w, h / 3 + 0.06, d))] * shelf
        boxes = [box(*part) for part in parts]
        starts = np.cumsum([0, *(len(corners) for corners, _ in boxes)])
        vertices = np.concatenate([corners for corners, _ in boxes])
        triangles = np.concatenate([faces + start for (_, faces), start in zip(boxes, starts, strict=False)])
        seen = views_of(vertices, triangles, seed=number, side=side)
        texts.append(np.tanh((np.array([w, h, d, board, shelf]) + 0.1 * random.standard_normal(5)) @ mixing))
        views.append(seen.reshape(len(seen), -1))
        points.append(describe_points(unit_ball(sample_surface(vertices, triangles, 1024, number)), np.array([w, h, d])))

    def split(seed):
        order = torch.randperm(items, generator=torch.Generator().manual_seed(seed))
        return order[80:], order[:80]

    features = (torch.from_numpy(np.array(x, dtype=np.float32)) for x in (texts, views, points))
    return Objects(*features, torch.arange(items), split)


# ---------------------------------------------------------------------------------------------------------------------------------------------- runs


def common_space(objects, train):
    """Text and views as unit vectors of one space, by what training items have in common: [N, D], [N, V, D]. From here on it is frozen."""
    count, many = objects.views.shape[:2]
    components = PrincipalComponents.fit(objects.views[train].flatten(0, 1), min(REDUCED, objects.views.shape[2], many * len(train) - 1))
    views = components(objects.views.flatten(0, 1)).unflatten(0, (count, many))
    width = min(objects.text.shape[1], views.shape[2], REDUCED)
    space = CanonicalCorrelation.fit({"text": objects.text[train], "views": views[train].mean(1)}, CanonicalCorrelationConfig(width))
    return space.embed({"text": objects.text})["text"], space.embed({"views": views.flatten(0, 1)})["views"].unflatten(0, (count, many))


def trained(objects, train, test, way, seed):
    """R@10 from text to points on test items."""
    torch.manual_seed(seed)
    text, views = common_space(objects, train)
    points = (objects.points - objects.points[train].mean(0)) / objects.points[train].std(0).clamp(min=1e-3)
    width = text.shape[1]
    head = nn.Sequential(nn.Linear(points.shape[1], 256), nn.GELU(), nn.Dropout(0.2), nn.Linear(256, width))
    embed = ViewEmbedding(width)
    log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
    optimizer = torch.optim.AdamW([*head.parameters(), *embed.parameters(), log_scale], lr=1e-3, weight_decay=1e-2)
    degree = torch.tensor([angle // 12 for angle in ANGLES] * len(KINDS))
    kind = torch.arange(len(KINDS)).repeat_interleave(len(ANGLES))
    if way == "one view":
        views, degree, kind = views[:, :1], degree[:1], kind[:1]
    for _ in range(STEPS):
        drawn = train[torch.randperm(len(train))]
        items = torch.stack([drawn[objects.groups[drawn] == group][0] for group in objects.groups[drawn].unique()])[:BATCH]
        items = items[torch.randperm(len(items))]
        enhanced, scale = embed(views[items], degree, kind), log_scale.exp().clamp(max=100)
        encoded = F.normalize(head(points[items]), dim=1)
        if way == "mean":
            picture = F.normalize(enhanced, dim=2).mean(1)
            loss = sum(clip_loss(x, y, logit_scale=scale) for x, y in ((encoded, text[items]), (encoded, picture), (text[items], picture)))
        else:
            loss = jma_loss(encoded, text[items], views[items], enhanced=enhanced, logit_scale=scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    head.eval()
    with torch.no_grad():
        return retrieval(text[test] @ F.normalize(head(points[test]), dim=1).T, query_groups=objects.groups[test]).r10


def table(results):
    """As documentation quotes it."""
    count = len(results["seeds"])
    lines = ["| picture | R@10, mean ± standard deviation | by seed | difference to the mean, 95 % interval |", "|---|---|---|---|"]
    for way, found in results["r10"].items():
        scores, apart = [100 * value for value in found], "–"
        if way != "mean":
            differences = [100 * (a - b) for a, b in zip(found, results["r10"]["mean"], strict=True)]
            half = T_95[count] * stdev(differences) / count**0.5
            apart = f"{mean(differences):+.1f} ({mean(differences) - half:+.1f} … {mean(differences) + half:+.1f})"
        lines.append(f"| {WAYS[way]} | {mean(scores):.1f} ± {stdev(scores):.1f} | {', '.join(f'{value:.1f}' for value in scores)} | {apart} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path, help="where `modalign prepare furniture` left the set and its package; default: made-up objects")
    parser.add_argument("--seeds", type=int, choices=sorted(T_95), default=2)
    parser.add_argument("--cache", type=Path, help="folder that keeps the features of the views")
    parser.add_argument("--out", type=Path, help="JSON with every figure")
    options = parser.parse_args()
    objects = furniture(options.data_root, options.cache) if options.data_root else made_up()
    found = {way: [] for way in WAYS}
    for seed in range(options.seeds):
        train, test = objects.split(seed)
        for way in WAYS:
            found[way].append(trained(objects, train, test, way, seed))
            print(f"seed {seed}, {way}: text -> points R@10 {found[way][-1]:.1%} of {len(test)}")
    results = {
        "command": "python examples/text_weighted_views.py" + (" --data-root DIR" if options.data_root else "") + f" --seeds {options.seeds}",
        "metric": "text -> points, R@10 on test items",
        "data": "furniture" if options.data_root else "made up",
        "items": {"all": len(objects.text), "train": len(train), "test": len(test)},
        "views": {"angles": ANGLES, "kinds": KINDS, "side": SIDE},
        "training": {"steps": STEPS, "batch": BATCH},
        "seeds": list(range(options.seeds)),
        "r10": found,
        "environment": environment.describe(torch.device("cpu"), 0),
    }
    print(table(results), end="")
    if options.out:
        from modalign._files import write_json

        write_json(options.out, results)
    if not options.data_root:
        assert min(map(min, found.values())) > 2 * 10 / len(test), "every way must beat chance twice over"


if __name__ == "__main__":
    main()
