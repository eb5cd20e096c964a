"""The pose of one person in one frame: reading it from files, writing it, drawing it, comparing it."""
from dataclasses import dataclass, field

import numpy as np


def _missing(count: int):
    return field(default_factory=lambda: np.zeros((count, 3), np.float32))


@dataclass(frozen=True)
class Pose:
    """The keypoints of one person in one frame, in canvas-normalised coordinates.

    Each part is a float32 array of (x, y, score) rows: x runs from 0 (left edge of the canvas) to
    1 (right edge), y from 0 (top) to 1 (bottom), score from 0 (missing) to 1. Points may lie outside
    the canvas. The orders are OpenPose's.
    """

    body: np.ndarray = _missing(18)  # (18, 3), COCO-18: nose, neck, right shoulder, ...
    face: np.ndarray = _missing(70)  # (70, 3)
    left_hand: np.ndarray = _missing(21)  # (21, 3)
    right_hand: np.ndarray = _missing(21)  # (21, 3)
