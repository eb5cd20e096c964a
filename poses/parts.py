"""The parts of a body: where they lie in a frame, and how each got there from another pose.

`posecrafter.edit_latents` moves latents with them, `beyond.pseudo.pseudo_video` images. A part is a soft region of
their pixels and an affine map from there to where the same spot of the part is in the other pose. Poses are the
same person's; points are (K, 2) in pixels, whose centres are the integers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from poses.pose import Pose, is_seen

# ---- Geometry -----------------------------------------------------------------------------------


def latent_points(part: np.ndarray, height: int, width: int) -> np.ndarray:
    """Keypoints (K, 3), canvas-normalised -> (K, 2) in pixels, whose centres are the integers."""
    return part[:, :2].astype(np.float64) * (width, height) - 0.5


def point_pairs(
    part: np.ndarray, other: np.ndarray, height: int, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same keypoints (K, 3) of two poses in pixels, each (K, 2), and which are seen in both: booleans (K,)."""
    here, there = (latent_points(points, height, width) for points in (part, other))
    return here, there, is_seen(part) & is_seen(other)


def fit_affine(source: np.ndarray, target: np.ndarray) -> np.ndarray | None:
    """The least-squares affine map A (2, 3) with target ~ A[:, :2] @ source + A[:, 2]; points are (K, 2).

    None for a map that no moving part makes: fewer than 3 points, points (nearly) on a line, mirrored,
    or an area that changes by more than a factor of 4.
    """
    if len(source) < 3:
        return None
    spreads = np.linalg.svd(source - source.mean(0), compute_uv=False)
    if spreads[1] < 0.05 * spreads[0] or spreads[0] == 0:
        return None
    ones = np.ones((len(source), 1))
    solution, *_ = np.linalg.lstsq(np.hstack([source, ones]), target, rcond=None)
    area = np.linalg.det(solution[:2])
    return solution.T if 1 / 4 <= area <= 4 else None


def near_hull(points: np.ndarray, reach: float, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The pixels (N, 2) within `reach` of the convex hull of `points` (K, 2), and how far they are (N,).

    Pixels are (x, y) of a latent of height x width; inside the hull the distance is 0.
    """
    low = np.ceil(points.min(axis=0) - reach).clip(0).astype(int)
    high = np.floor(points.max(axis=0) + reach).clip(-1, (width - 1, height - 1)).astype(int)
    x, y = (np.arange(a, b + 1) for a, b in zip(low, high))
    corners = convex_hull(points)
    inside = np.full((len(y), len(x)), len(corners) > 2)  # one point or a line has no inside
    square = np.full(inside.shape, np.inf)  # of the distance to the nearest edge
    for (start_x, start_y), (edge_x, edge_y) in zip(corners, np.roll(corners, -1, 0) - corners):
        from_x, from_y = x - start_x, (y - start_y)[:, None]
        inside &= edge_x * from_y - edge_y * from_x >= 0
        along = (edge_x * from_x + edge_y * from_y) / max(edge_x**2 + edge_y**2, 1e-12)
        along = along.clip(0, 1)
        beside = (from_x - along * edge_x) ** 2 + (from_y - along * edge_y) ** 2
        np.minimum(square, beside, out=square)
    distance = np.where(inside, 0, np.sqrt(square))
    near = distance <= reach
    return np.argwhere(near)[:, ::-1] + low, distance[near]


def convex_hull(points: np.ndarray) -> np.ndarray:
    """The corners of the convex hull of (K, 2) points in order around it (Andrew's monotone chain)."""

    def chain(ordered: np.ndarray) -> list[np.ndarray]:
        corners = []
        for point in ordered:
            while len(corners) > 1:
                (ax, ay), (bx, by) = corners[-1] - corners[-2], point - corners[-1]
                if ax * by - ay * bx > 0:
                    break
                corners.pop()
            corners.append(point)
        return corners

    ordered = np.array(sorted(set(map(tuple, points))))  # np.unique is slow for so few
    if len(ordered) < 3:
        return ordered
    return np.array(chain(ordered)[:-1] + chain(ordered[::-1])[:-1])


# ---- Parts --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A part of a body in one pose, and the way from there to another pose.

    Its pixels are computed when they are first used: in large images this takes long, and often only the name or
    the map of a part is needed.
    """

    name: str
    to_other: np.ndarray  # (2, 3): its point (x, y) is at A[:, :2] @ (x, y) + A[:, 2] there
    outline: np.ndarray  # (K, 2): it covers the convex hull of these points
    reach: float  # how many pixels it reaches beyond the hull
    soft: bool  # whether it fades out over the last of these pixels
    size: tuple[int, int]  # height and width of the latent or the image

    @cached_property
    def region(self) -> tuple[np.ndarray, np.ndarray]:
        """The pixels (N, 2) that it covers, (x, y), and how much of each belongs to it, from 0 to 1: (N,)."""
        pixels, distance = near_hull(self.outline, self.reach, *self.size)
        return pixels, (self.reach - distance).clip(0, 1) if self.soft else np.ones(len(pixels))

    @property
    def pixels(self) -> np.ndarray:
        return self.region[0]

    @property
    def weight(self) -> np.ndarray:
        return self.region[1]


def face_and_hands(pose: Pose, other: Pose, height: int, width: int) -> Iterator[Part]:
    """The parts that PoseCrafter moves: the landmarks' convex hulls, grown by one latent pixel.

    A part that is not seen in both poses, or whose map is degenerate (see `fit_affine`), is left out.
    """
    for name in ("face", "left_hand", "right_hand"):
        here, there, both = point_pairs(getattr(pose, name), getattr(other, name), height, width)
        to_other = fit_affine(here[both], there[both])
        if to_other is not None:
            yield Part(name, to_other, here[both], reach=1.0, soft=False, size=(height, width))
