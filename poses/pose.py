"""The pose of one person in one frame: read from files, written, drawn, compared."""

import colorsys
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from safe.files import replacing


@dataclass(frozen=True)
class Pose:
    """The keypoints of one person in one frame, in canvas-normalised coordinates.

    Each part is float32 (K, 3): x from 0 (left edge of the canvas) to 1, y from 0 (top) to 1, and the score from 0
    (missing) to 1. Points may lie outside the canvas. The orders are OpenPose's, for `body` COCO-18's.
    """

    body: np.ndarray = field(default_factory=lambda: np.zeros((18, 3), np.float32))
    face: np.ndarray = field(default_factory=lambda: np.zeros((70, 3), np.float32))
    left_hand: np.ndarray = field(default_factory=lambda: np.zeros((21, 3), np.float32))
    right_hand: np.ndarray = field(default_factory=lambda: np.zeros((21, 3), np.float32))


def is_seen(part: np.ndarray) -> np.ndarray:
    """Which keypoints of a part (K, 3) were found: booleans (K,)."""
    return part[:, 2] > 0


def has_person(pose: Pose) -> bool:
    """Whether there is anybody to draw: three body keypoints or more, not all at one place, and one on the canvas.

    False detections are mostly single keypoints or pairs.
    """
    points = pose.body[is_seen(pose.body), :2]
    on_canvas = ((points >= 0) & (points <= 1)).all(axis=1)
    return len(points) >= 3 and bool(on_canvas.any()) and np.ptp(points, axis=0).max() > 1e-3


def absences(poses: Sequence[Pose], first: int = 0) -> str:
    """The frames without a person, counted from `first`, such as "0-3, 112-140"; "" for none."""
    return name_frames([frame for frame, pose in enumerate(poses, first) if not has_person(pose)])


def name_frames(frames: Sequence[int]) -> str:
    """Numbers in rising order, such as "0-3, 112-140"."""
    there = set(frames)
    starts = [frame for frame in frames if frame - 1 not in there]
    ends = [frame for frame in frames if frame + 1 not in there]
    return ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in zip(starts, ends))


def place_pose(pose: Pose, scale_x: float, scale_y: float, left: float, top: float) -> Pose:
    """The pose after x' = scale_x * x + left and y' = scale_y * y + top; missing keypoints stay zero.

    With `video.Fit.placement` the pose follows its frame onto the canvas.
    """
    parts = [(part, part * (scale_x, scale_y, 1) + (left, top, 0)) for part in vars(pose).values()]
    return Pose(*(np.where(is_seen(part)[:, None], placed, 0).astype(np.float32) for part, placed in parts))


def pose_distance(a: Pose, b: Pose) -> float:
    """Mean squared distance of the body keypoints seen in both, in canvas-normalised units; infinite if none is.

    The ||p_l - p_i||^2 of the paper's reference selection, averaged so that poses with gaps can be ranked too.
    """
    both = is_seen(a.body) & is_seen(b.body)
    if not both.any():
        return math.inf
    difference = a.body[both, :2].astype(np.float64) - b.body[both, :2]
    return float((difference**2).sum(axis=1).mean())


# ---- Files --------------------------------------------------------------------------------------

KEYS = {  # Pose's fields as OpenPose's JSON calls them, and how many keypoints they may have there
    "body": ("pose_keypoints_2d", (18, 25)),
    "face": ("face_keypoints_2d", (70, 68)),  # 68: without the pupils
    "left_hand": ("hand_left_keypoints_2d", (21,)),
    "right_hand": ("hand_right_keypoints_2d", (21,)),
}


def load_poses(path: str | Path) -> list[Pose]:
    """Reads what `save_poses` wrote as it is: one pose per frame, in canvas-normalised coordinates.

    Files of other programs, with several people and frames without anybody, are for `source.read_driver`.
    Raises FileNotFoundError, and ValueError naming the file and the frame that is malformed.
    """
    from poses.openpose_json import read_people  # which needs this module, and reads far more than this

    return [in_frame[0] if in_frame else Pose() for in_frame in read_people(path)[0]]


def save_poses(path: str | Path, poses: Sequence[Pose], width: int, height: int, **said: str) -> None:
    """Writes `poses_text` whole or not at all."""
    with replacing(Path(path)) as unfinished:
        unfinished.write_text(poses_text(poses, width, height, **said))


def poses_text(poses: Sequence[Pose], width: int, height: int, **said: str) -> str:
    """Poses as a JSON list of OpenPose frames, each with `said`, in pixels of a `width` x `height` canvas."""

    def people(pose: Pose) -> list[dict[str, list[float]]]:
        pixels = {KEYS[name][0]: part * (width, height, 1) for name, part in vars(pose).items()}
        person = {key: part.round(3).ravel().tolist() for key, part in pixels.items()}
        return [person] if any(is_seen(part).any() for part in vars(pose).values()) else []

    size = {"canvas_width": width, "canvas_height": height} | said
    return json.dumps([{"people": people(pose), **size} for pose in poses], separators=(",", ":"))


# ---- Drawing ------------------------------------------------------------------------------------

LIMBS = np.array(
    [  # from and to which keypoints of COCO-18, in the order in which OpenPose paints them
        [1, 1, 2, 3, 5, 6, 1, 8, 9, 1, 11, 12, 1, 0, 14, 0, 15],
        [2, 5, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 0, 14, 16, 15, 17],
    ]
).T
# Each finger is four joints, starting from the wrist.
HAND_EDGES = np.array([(0 if joint % 4 == 1 else joint - 1, joint) for joint in range(1, 21)])


def _rainbow(count: int) -> list[tuple[int, ...]]:
    hues = (colorsys.hsv_to_rgb(index / count, 1, 1) for index in range(count))
    return [tuple(round(255 * value) for value in colour) for colour in hues]


_BODY_COLOURS, _HAND_COLOURS = _rainbow(18), _rainbow(20)
_LIMB_COLOURS = [tuple(int(0.6 * value) for value in colour) for colour in _BODY_COLOURS]


def draw_pose(pose: Pose, height: int, width: int, hands: bool = True, face: bool = True) -> np.ndarray:
    """The control image, uint8 RGB (height, width, 3): what the pose ControlNet was trained on.

    As ControlNet 1.1's OpenPose annotator draws it: limbs are ellipses 8 pixels wide at 60 % brightness, joints of
    body and hands discs of radius 4, points of the face of radius 3. These widths hold for canvases with 512
    between their short and long side; others get them in proportion, so that they show the same picture.
    """
    # Small canvases are drawn at a multiple and averaged down: lines of 1 or 2 pixels would jitter.
    multiple = math.ceil(512 / max(height, width))
    scale = multiple * min(max(1.0, min(height, width) / 512), max(height, width) / 512)
    image = Image.new("RGB", (width * multiple, height * multiple))
    draw = ImageDraw.Draw(image)

    def pixels(part: np.ndarray) -> np.ndarray:
        # PIL's integers would overflow far outside the canvas, where nothing is drawn anyway.
        return part[:, :2].clip(-9, 9) * image.size

    def discs(part: np.ndarray, radius: float, colours: Sequence[tuple[int, ...]]) -> None:
        stamp = _disc(radius * scale)
        corners = (pixels(part).astype(int) - stamp.width // 2).tolist()
        for index in np.flatnonzero(is_seen(part)):
            draw.bitmap(tuple(corners[index]), stamp, fill=colours[index])

    starts, ends = (pixels(pose.body)[joints] for joints in LIMBS.T)
    ellipses = _ellipses(starts, ends, 4 * scale).reshape(-1, 64).tolist()
    for limb in np.flatnonzero(is_seen(pose.body)[LIMBS].all(axis=1)):
        draw.polygon(ellipses[limb], fill=_LIMB_COLOURS[limb])
    discs(pose.body, 4, _BODY_COLOURS)

    for hand in (pose.left_hand, pose.right_hand) if hands else ():
        lines = pixels(hand).astype(int)[HAND_EDGES].reshape(-1, 4).tolist()
        for bone in np.flatnonzero(is_seen(hand)[HAND_EDGES].all(axis=1)):
            # 3: OpenCV, which the annotator draws with, makes lines of thickness 2 that wide
            draw.line(lines[bone], fill=_HAND_COLOURS[bone], width=round(3 * scale))
        discs(hand, 4, [(0, 0, 255)] * 21)
    if face:
        discs(pose.face, 3, [(255, 255, 255)] * 70)
    return np.asarray(image.reduce(multiple) if multiple > 1 else image)


def _ellipses(starts: np.ndarray, ends: np.ndarray, half_width: float) -> np.ndarray:
    """Polygons (K, 32, 2) of the ellipses whose long axes run from starts (K, 2) to ends (K, 2)."""
    centre, along = (starts + ends) / 2, (ends - starts) / 2
    length = np.linalg.norm(along, axis=1, keepdims=True).clip(1e-6)
    across = half_width * along[:, ::-1] * (-1, 1) / length
    turn = np.linspace(0, 2 * np.pi, 32, endpoint=False)[None, :, None]
    return centre[:, None] + np.cos(turn) * along[:, None] + np.sin(turn) * across[:, None]


@lru_cache
def _disc(radius: float) -> Image.Image:
    """A stamp of a filled circle. PIL's own small circles have corners where OpenCV's have none."""
    offsets = np.arange(-int(radius), int(radius) + 1)
    return Image.fromarray(np.uint8(255) * (np.hypot(offsets, offsets[:, None]) <= radius))
