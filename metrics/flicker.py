"""How much a clip flickers: beside the true frames, or along the motion that its poses have."""

from collections.abc import Sequence

import numpy as np
import torch
from tqdm import trange

from beyond.body import body_parts
from metrics.figures import pairs
from posecrafter import sample_bilinear
from poses.parts import Part, near_hull
from poses.pose import Pose

INNER = 0.5  # of a part's reach beyond its bones and landmarks: closer to these, it is surely the person


def frame_flicker(result: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Mean absolute error of the change from frame to frame, from 0 to 1: (F - 1,).

    |(x[t+1] - x[t]) - (y[t+1] - y[t])| of result x and truth y, frames uint8 (F, H, W, 3). An error that stays the
    same in all frames costs nothing. Raises ValueError for frames of different shapes.
    """
    errors = (a - b for a, b in pairs(result, truth))
    before = next(errors)
    values = []
    for error in errors:
        values.append(np.abs(error - before).mean() / 255)
        before = error
    return np.array(values)


def frame_warp_error(frames: np.ndarray, poses: Sequence[Pose]) -> np.ndarray:
    """How much the person changes from frame to frame beyond what the poses move, from 0 to 1: (F - 1,).

    The mean absolute difference of frame t + 1 and frame t warped to it, of frames uint8 (F, H, W, 3) whose poses
    are given. It is the warping error of Lai et al., 2018 ("Learning Blind Video Temporal Consistency"), with the
    motion of the poses' parts in place of optical flow. Each part of `beyond.body.body_parts` has one affine map:
    a bone's follows its two joints, and the head's and the torso's follow their landmarks. Frame t is read through
    it, between pixel centres. Only pixels in the inner half of a part count, where the same part is seen in both
    frames. The background does not count, and turns out of the picture's plane are taken for changes. Not a number
    where no pixel counts.
    """
    height, width = frames.shape[1:3]
    values = []
    for t in trange(len(frames) - 1, desc="warp error", leave=False):
        parts, parts_there = (list(body_parts(*poses[t : t + 2][::way], height, width)) for way in (-1, 1))
        here, inner = visible(parts, height, width)
        there, inner_there = visible(parts_there, height, width)
        names_there = np.array([part.name for part in parts_there] + [""])
        before, after = (torch.tensor(frame).permute(2, 0, 1).float() for frame in frames[t : t + 2])
        differences = [torch.empty(0)]
        for number, part in enumerate(parts):
            y, x = np.nonzero((here == number) & inner)
            source = np.stack([x, y], axis=1) @ part.to_other[:, :2].T + part.to_other[:, 2]
            column, row = source.round().astype(int).clip(0, (width - 1, height - 1)).T
            same = (names_there[there[row, column]] == part.name) & inner_there[row, column]
            read = sample_bilinear(before, source[same])
            differences.append((read - after[:, y[same], x[same]]).abs().flatten())
        every = torch.cat(differences)
        values.append(every.mean().item() / 255 if len(every) else np.nan)
    return np.array(values)


def visible(parts: Sequence[Part], height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of the parts, from far to near, each pixel shows, -1 for none: (height, width); and whether it is in
    that part's inner half: booleans (height, width)."""
    shown, inner = np.full((height, width), -1), np.zeros((height, width), bool)
    for number, part in enumerate(parts):
        x, y = part.pixels.T
        shown[y, x], inner[y, x] = number, False
        x, y = near_hull(part.outline, INNER * part.reach, height, width)[0].T
        inner[y, x] = True
    return shown, inner
