"""Point clouds from meshes, and a classical descriptor of them (no learned weights)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["DESCRIPTOR_WIDTH", "PointCloud", "PointDescriptor", "describe_points", "read_obj", "sample_surface", "unit_ball"]

Array = NDArray[np.float64]

DISTANCE_BINS = 48
GRID = 8
HEIGHT_BINS = 24
DESCRIPTOR_WIDTH = DISTANCE_BINS + GRID**3 + HEIGHT_BINS + 6
DISTANCE_PAIRS = 20_000


def read_obj(text: str) -> tuple[Array, NDArray[np.int64]]:
    """Vertices [V, 3] and triangles [F, 3] of a Wavefront OBJ. Polygons are fanned into triangles; negative indices count from the end, as the
    format allows.
    """
    vertices: list[tuple[float, ...]] = []
    triangles: list[tuple[int, int, int]] = []
    for line in text.splitlines():
        if line.startswith("v "):
            vertices.append(tuple(float(part) for part in line.split()[1:4]))
        elif line.startswith("f "):
            corners = [int(part.split("/")[0]) for part in line.split()[1:]]
            corners = [c - 1 if c > 0 else len(vertices) + c for c in corners]
            triangles += [(corners[0], corners[i], corners[i + 1]) for i in range(1, len(corners) - 1)]
    return np.array(vertices, dtype=np.float64).reshape(-1, 3), np.array(triangles, dtype=np.int64).reshape(-1, 3)


def sample_surface(vertices: Array, triangles: NDArray[np.int64], count: int, seed: int) -> Array:
    """`count` points spread over the surface in proportion to area: [count, 3]."""
    a, b, c = (vertices[triangles[:, i]] for i in range(3))
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    if not area.sum() > 0:
        raise ValueError(f"sample_surface: triangles must have area, got {len(triangles)} triangles with total area {area.sum() / 2}")
    random = np.random.default_rng(seed)
    face = random.choice(len(area), size=count, p=area / area.sum())
    # The square root makes the density even inside a triangle.
    along, across = np.sqrt(random.random((count, 1))), random.random((count, 1))
    return (1 - along) * a[face] + along * (1 - across) * b[face] + along * across * c[face]


def unit_ball(points: Array) -> Array:
    """Move the centroid to the origin and scale the farthest point to distance 1."""
    centred = points - points.mean(0)
    return centred / np.linalg.norm(centred, axis=1).max()


def describe_points(points: Array, size: Array, seed: int = 0) -> NDArray[np.float32]:
    """Describe a cloud in the unit ball, y up: [DESCRIPTOR_WIDTH].

    Distances between random pairs (D2 histogram), occupancy of an 8 x 8 x 8 grid, height histogram (all three as square roots of shares, so that
    Euclidean
    distance is the Hellinger distance), extents in the ball, and the logarithm of the true `size` (width, depth, height in cm).
    """
    random = np.random.default_rng(seed)
    first, second = random.integers(len(points), size=(2, DISTANCE_PAIRS))
    distance = np.linalg.norm(points[first] - points[second], axis=1)
    distances = np.histogram(distance, DISTANCE_BINS, (0, 2))[0]
    occupancy = np.histogramdd(points, [GRID] * 3, [(-1, 1)] * 3)[0].ravel()
    heights = np.histogram(points[:, 1], HEIGHT_BINS, (-1, 1))[0]
    shares = [np.sqrt(histogram / histogram.sum()) for histogram in (distances, occupancy, heights)]
    extents = points.max(0) - points.min(0)
    return np.concatenate([*shares, extents, np.log(size)]).astype(np.float32)


@dataclass(frozen=True)
class PointCloud:
    """Points [P, 3] in the unit ball, y up, and the true width, depth and height in cm."""

    points: Array
    size: Array


class PointDescriptor:
    """`describe_points` as an encoder. Tokens are the points themselves."""

    width = DESCRIPTOR_WIDTH
    name = "point descriptor"
    packages = ()

    def __call__(self, clouds: Sequence[PointCloud]) -> Tensor:
        """Describe clouds: [len(clouds), 590] float32."""
        return torch.from_numpy(np.array([describe_points(cloud.points, cloud.size) for cloud in clouds], dtype=np.float32).reshape(-1, self.width))

    def tokens(self, clouds: Sequence[PointCloud]) -> list[Tensor]:
        return [torch.from_numpy(cloud.points).float() for cloud in clouds]
