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

from video import by_number, replacing


@dataclass(frozen=True)
class Pose:
    """The keypoints of one person in one frame, in canvas-normalised coordinates.

    Each part is a float32 array of (x, y, score) rows: x runs from 0 (left edge of the canvas) to
    1 (right edge), y from 0 (top) to 1 (bottom), score from 0 (missing) to 1. Points may lie
    outside the canvas. The orders are OpenPose's, for `body` COCO-18: nose, neck, right shoulder,
    right elbow, right wrist, left shoulder, ...
    """

    body: np.ndarray = field(default_factory=lambda: np.zeros((18, 3), np.float32))
    face: np.ndarray = field(default_factory=lambda: np.zeros((70, 3), np.float32))
    left_hand: np.ndarray = field(default_factory=lambda: np.zeros((21, 3), np.float32))
    right_hand: np.ndarray = field(default_factory=lambda: np.zeros((21, 3), np.float32))


def is_seen(part: np.ndarray) -> np.ndarray:
    """Which keypoints of a part (K, 3) were found: booleans (K,)."""
    return part[:, 2] > 0


def has_person(pose: Pose) -> bool:
    """Whether there is anybody to draw.

    Three body keypoints are the fewest that fix a place, a size and a direction; false detections
    are mostly single points or pairs.
    """
    return int(is_seen(pose.body).sum()) >= 3


def absences(poses: Sequence[Pose], first: int = 0) -> str:
    """The frames without a person, counted from `first`, such as "0-3, 112-140"; "" for none."""
    missing = [frame for frame, pose in enumerate(poses, first) if not has_person(pose)]
    starts = [frame for frame in missing if frame - 1 not in missing]
    ends = [frame for frame in missing if frame + 1 not in missing]
    return ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in zip(starts, ends))


def place_pose(pose: Pose, scale_x: float, scale_y: float, left: float, top: float) -> Pose:
    """The pose after x' = scale_x * x + left and y' = scale_y * y + top, in normalised coordinates.

    With `video.Fit.placement` the pose follows its frame onto the canvas. Missing keypoints stay
    zero.
    """

    def place(part: np.ndarray) -> np.ndarray:
        placed = part * (scale_x, scale_y, 1) + (left, top, 0)
        return np.where(is_seen(part)[:, None], placed, 0).astype(np.float32)

    return Pose(place(pose.body), place(pose.face), place(pose.left_hand), place(pose.right_hand))


# ------------------------------------------------------------------------------------------ files

_KEYS = {  # Pose's fields as OpenPose's JSON calls them, and how many keypoints they may have there
    "body": ("pose_keypoints_2d", (18, 25)),
    "face": ("face_keypoints_2d", (70, 68)),  # 68: without the pupils
    "left_hand": ("hand_left_keypoints_2d", (21,)),
    "right_hand": ("hand_right_keypoints_2d", (21,)),
}
_BODY_25_TO_COCO_18 = [*range(8), *range(9, 19)]  # BODY_25 has a mid hip at 8 and feet from 19 on


def load_poses(path: str | Path, width: int | None = None, height: int | None = None) -> list[Pose]:
    """Reads one pose per frame, in canvas-normalised coordinates.

    `path` is a JSON file, a list of OpenPose frames (or one such frame) as the ComfyUI and web UI
    editors write it, or a folder of OpenPose's own files, one per frame, in the order of the
    numbers in their names. Coordinates may be normalised already, else they are pixels of the
    frame's `canvas_width` and `canvas_height`, or of `width` and `height` where the file names no
    canvas. A frame without people gives an empty Pose; of several people the largest is taken.

    Raises FileNotFoundError, and ValueError naming the file and the frame that is malformed.
    """
    frames = _read_frames(Path(path))
    people = [_largest_person(frame, where) for where, frame in frames]
    # No keypoint of a pixel pose stays within 2 pixels of the corner in every frame, and no
    # normalised one strays two canvases away.
    if all(np.abs(part[:, :2]).max() <= 2 for pose in people for part in vars(pose).values()):
        return people

    poses = []
    for (where, frame), pose in zip(frames, people):
        canvas = frame.get("canvas_width") or width, frame.get("canvas_height") or height
        if _is_empty(pose):
            poses.append(pose)
            continue
        if None in canvas:
            raise ValueError(
                f"{where}: pixel coordinates, but no canvas_width and canvas_height: "
                "give the size of the video they were found in, such as --canvas 1920x1080"
            )
        if not all(isinstance(side, (int, float)) and side > 0 for side in canvas):
            raise ValueError(f"{where}: canvas_width and canvas_height are {canvas}, not pixels")
        poses.append(place_pose(pose, 1 / canvas[0], 1 / canvas[1], 0, 0))
    return poses


def read_canvas(path: str | Path) -> tuple[int, int] | None:
    """The (height, width) of the canvas that a pose file's first frame names, if it names one.

    Raises what `load_poses` raises.
    """
    _, frame = _read_frames(Path(path))[0]
    size = frame.get("canvas_height"), frame.get("canvas_width")
    return size if all(isinstance(side, (int, float)) and side > 0 for side in size) else None


def save_poses(path: str | Path, poses: Sequence[Pose], width: int, height: int) -> None:
    """Writes poses as a JSON list of OpenPose frames in pixels of a `width` x `height` canvas."""
    path = Path(path)
    frames = []
    for pose in poses:
        parts = {name: part * (width, height, 1) for name, part in vars(pose).items()}
        person = {_KEYS[name][0]: part.round(3).ravel().tolist() for name, part in parts.items()}
        people = [] if _is_empty(pose) else [person]
        frames.append({"people": people, "canvas_width": width, "canvas_height": height})
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(frames, separators=(",", ":")))


def _is_empty(pose: Pose) -> bool:
    return not any(is_seen(part).any() for part in vars(pose).values())


def _read_frames(path: Path) -> list[tuple[str, dict]]:
    """The frames of a file or folder, each with the name that errors give it."""
    if path.is_dir():
        files = sorted(path.glob("*.json"), key=by_number)
        if not files:
            raise FileNotFoundError(f"{path}: no .json files of poses in this folder")
        return [frame for file in files for frame in _read_frames(file)]
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder of poses")
    try:
        frames = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file of poses ({error})") from None
    frames = frames if isinstance(frames, list) else [frames]
    if not frames:
        raise ValueError(f"{path}: holds no frames")
    for index, frame in enumerate(frames):
        if not isinstance(frame, dict) or "people" not in frame:
            raise ValueError(f'{path}: frame {index}: not an OpenPose frame, which has "people"')
    return [(f"{path}: frame {index}", frame) for index, frame in enumerate(frames)]


def _largest_person(frame: dict, where: str) -> Pose:
    """The person with the largest box of body keypoints times mean score, in the file's units."""
    people = frame["people"] or []
    if not isinstance(people, list) or not all(isinstance(person, dict) for person in people):
        raise ValueError(f'{where}: "people" is not a list of objects with keypoints')
    poses = [Pose(**{name: _read_part(person, name, where) for name in _KEYS}) for person in people]

    def size(pose: Pose) -> float:
        body = pose.body[is_seen(pose.body)]
        return np.ptp(body[:, :2], axis=0).prod() * body[:, 2].mean() if len(body) else 0.0

    return max(poses, key=size, default=Pose())


def _read_part(person: dict, name: str, where: str) -> np.ndarray:
    """One part as float32 (K, 3) in the file's units, zeros where it is null, absent or empty."""
    key, counts = _KEYS[name]
    try:
        flat = np.array(person.get(key) or [], np.float32)  # null among the numbers becomes nan
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{where}: {key} is not a list of numbers") from None
    if flat.size not in (0, *(3 * count for count in counts)):
        allowed = " or ".join(str(3 * count) for count in counts)
        raise ValueError(
            f"{where}: {key} has {flat.size} numbers instead of {allowed} (x, y and score of each keypoint)"
        )
    points = flat.reshape(-1, 3)
    if name == "body" and len(points) == 25:
        points = points[_BODY_25_TO_COCO_18]
    part = np.zeros((counts[0], 3), np.float32)
    part[: len(points)] = points
    part[:, 2] = part[:, 2].clip(0, 1)  # some detectors score beyond 1
    part[~(np.isfinite(part).all(axis=1) & is_seen(part))] = 0
    return part


# -------------------------------------------------------------------------------------- distances


def pose_distance(a: Pose, b: Pose) -> float:
    """Mean squared distance of the body keypoints seen in both, in canvas-normalised units.

    The ||p_l - p_i||^2 of the paper's reference selection, averaged over the keypoints compared so
    that poses with gaps can be ranked beside whole ones. Infinite if none is seen in both.
    """
    both = is_seen(a.body) & is_seen(b.body)
    if not both.any():
        return math.inf
    difference = a.body[both, :2].astype(np.float64) - b.body[both, :2]
    return float((difference**2).sum(axis=1).mean())


def video_sim(targets: Sequence[Pose], training: Sequence[Pose]) -> float:
    """The paper's Video-SIM (supplement, Eq. 2): how far target poses lie from training poses.

    The sum over target frames of `pose_distance` to the nearest training frame: lower is closer.
    Infinite when a target frame shares no keypoint with any training frame.
    """
    return sum(min(pose_distance(target, pose) for pose in training) for target in targets)


# ---------------------------------------------------------------------------------------- drawing

LIMBS = np.array(
    [  # pairs of COCO-18 keypoints, in the order in which OpenPose paints them
        (1, 2),
        (1, 5),
        (2, 3),
        (3, 4),
        (5, 6),
        (6, 7),
        (1, 8),
        (8, 9),
        (9, 10),
        (1, 11),
        (11, 12),
        (12, 13),
        (1, 0),
        (0, 14),
        (14, 16),
        (0, 15),
        (15, 17),
    ]
)
# Each finger is four joints, starting from the wrist.
HAND_EDGES = [(0 if joint % 4 == 1 else joint - 1, joint) for joint in range(1, 21)]


def _rainbow(count: int) -> list[tuple[int, ...]]:
    return [
        tuple(round(255 * value) for value in colorsys.hsv_to_rgb(index / count, 1, 1))
        for index in range(count)
    ]


_BODY_COLOURS = _rainbow(18)
_LIMB_COLOURS = [tuple(int(0.6 * value) for value in colour) for colour in _BODY_COLOURS]
_HAND_COLOURS = _rainbow(20)
_BLUE, _WHITE = (0, 0, 255), (255, 255, 255)
_TURN = np.linspace(0, 2 * np.pi, 32, endpoint=False)


def draw_pose(pose: Pose, height: int, width: int, hands: bool = True, face: bool = True) -> np.ndarray:
    """The control image, uint8 RGB (height, width, 3): what the pose ControlNet was trained on.

    Drawn as ControlNet 1.1's OpenPose annotator draws it, every keypoint with a score above 0:
    limbs as ellipses 8 pixels wide at 60 % brightness, body and hand joints as discs of radius 4,
    face points of radius 3. The annotator uses these widths for any canvas. So do we while 512 lies
    between its short and long side; smaller and larger canvases get widths in proportion, so that
    they show the same picture.
    """
    scale = min(max(1.0, min(height, width) / 512), max(height, width) / 512)
    # Small canvases are drawn at a multiple and averaged down: lines of 1 or 2 pixels would jitter.
    multiple = math.ceil(512 / max(height, width))
    image = Image.new("RGB", (width * multiple, height * multiple))
    draw = ImageDraw.Draw(image)
    scale *= multiple

    def pixels(part: np.ndarray) -> np.ndarray:
        # PIL's integers would overflow far outside the canvas, where nothing is drawn anyway.
        return part[:, :2].clip(-9, 9) * image.size

    def discs(points: np.ndarray, seen: np.ndarray, radius: float, colours: list) -> None:
        stamp = _disc(radius * scale)
        corners = points.astype(int) - stamp.width // 2
        for index in np.flatnonzero(seen):
            draw.bitmap(tuple(corners[index].tolist()), stamp, fill=colours[index])

    points, seen = pixels(pose.body), is_seen(pose.body)
    ellipses = _ellipses(points[LIMBS[:, 0]], points[LIMBS[:, 1]], 4 * scale).tolist()
    for limb in np.flatnonzero(seen[LIMBS].all(axis=1)):
        draw.polygon([tuple(corner) for corner in ellipses[limb]], fill=_LIMB_COLOURS[limb])
    discs(points, seen, 4, _BODY_COLOURS)

    for hand in (pose.left_hand, pose.right_hand) if hands else ():
        points, seen = pixels(hand), is_seen(hand)
        ends = points.astype(int).tolist()
        for (start, end), colour in zip(HAND_EDGES, _HAND_COLOURS):
            if seen[start] and seen[end]:
                # 3: OpenCV, which the annotator draws with, makes lines of thickness 2 that wide
                draw.line([*ends[start], *ends[end]], fill=colour, width=round(3 * scale))
        discs(points, seen, 4, [_BLUE] * 21)

    if face:
        discs(pixels(pose.face), is_seen(pose.face), 3, [_WHITE] * 70)
    return np.asarray(image.reduce(multiple) if multiple > 1 else image)


def _ellipses(starts: np.ndarray, ends: np.ndarray, half_width: float) -> np.ndarray:
    """Polygons (K, 32, 2) of the ellipses whose long axes run from starts (K, 2) to ends (K, 2)."""
    centre, along = (starts + ends) / 2, (ends - starts) / 2
    length = np.linalg.norm(along, axis=1, keepdims=True).clip(1e-6)
    across = half_width * along[:, ::-1] * (-1, 1) / length
    turn = _TURN[None, :, None]
    return centre[:, None] + np.cos(turn) * along[:, None] + np.sin(turn) * across[:, None]


@lru_cache
def _disc(radius: float) -> Image.Image:
    """A stamp of a filled circle. PIL's own small circles have corners where OpenCV's have none."""
    offsets = np.arange(-int(radius), int(radius) + 1)
    return Image.fromarray(np.uint8(255) * (np.hypot(offsets, offsets[:, None]) <= radius))
