"""Whole bodies, beyond the paper, which moves face and hands: their parts, and what they cover.

`body_parts` can stand where `poses.parts.face_and_hands` does; points and maps are as there.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from poses.parts import Part, face_and_hands, fit_affine, latent_points
from poses.pose import Pose, is_seen

# Landmarks are numbered through a pose's body (COCO-18), face, left and right hand. Our own come after them.
NECK, SHOULDERS, HIPS, KNEES, EYES, EARS = 1, [2, 5], [8, 11], [9, 12], [14, 15], [16, 17]
LEGS = [8, 9, 10], [11, 12, 13]  # from hip to ankle
HEAD = [0, *EYES, *EARS]  # with the nose
FACE = range(18, 88)
JAW, JAW_ENDS = FACE[:17], [FACE[0], FACE[16]]  # from ear to ear
WRISTS = {"left": 88, "right": 109}  # where the landmarks of hands begin
THIGHS = [130, 131]  # 60 % of the way from the hips to the knees
SKULL = [*JAW, *HEAD]
CROWN = range(132, 154)  # opposite SKULL, mirrored at the middle of the ears
RIM = 0.5  # pixels around a part that its edge reaches into


class Row(NamedTuple):
    """A part in the table of parts."""

    name: str
    kind: str  # see `shape`
    joints: Sequence[int]
    needed: int  # how many of the joints have to be seen in both poses
    half_width: float
    unit: str = "body"  # of the half width: a key of `body_parts`' units
    beyond: float = 0.0  # how far a bone goes on past its end, as a share of its length,
    unless: Sequence[int] = ()  # unless one of these landmarks is seen


def arm(side: str, shoulder: int, wrist: int) -> list[Row]:
    fingers = [(wrist + first + i, wrist + first + i + 1) for first in (1, 5, 9, 13, 17) for i in range(3)]
    palm, hand = [wrist + joint for joint in (0, 1, 5, 9, 13, 17)], range(wrist, wrist + 21)
    return [
        Row(f"{side}_upper_arm", "bone", (shoulder, shoulder + 1), 2, 0.20),
        Row(f"{side}_forearm", "bone", (shoulder + 1, shoulder + 2), 2, 0.16, beyond=0.6, unless=hand),
        *(Row(f"{side}_fingers", "bone", joints, 2, 0.15, side) for joints in fingers),
        Row(f"{side}_hand", "patch", palm, 3, 0.15, side),
    ]


# From far to near, unless an arm is far.
HAIR = Row("hair", "head", [*SKULL, *CROWN], 0, 0.45)  # the head once more: wide, and behind everything
TRUNK = [
    Row("hips", "patch", [*HIPS, *THIGHS], 4, 0.15),
    Row("right_thigh", "bone", (8, 9), 2, 0.26),
    Row("left_thigh", "bone", (11, 12), 2, 0.26),
    Row("right_shin", "bone", (9, 10), 2, 0.20, beyond=0.25),  # with the foot, which COCO-18 does not have
    Row("left_shin", "bone", (12, 13), 2, 0.20, beyond=0.25),
    Row("torso", "patch", [*SHOULDERS, *HIPS], 4, 0.15),
    Row("head", "head", [*SKULL, *CROWN], 0, 0.2),
    Row("face", "face", FACE, 3, 0.0),
]
ARMS = {"right": arm("right", 2, WRISTS["right"]), "left": arm("left", 5, WRISTS["left"])}
NAMES = {row.name for row in (HAIR, *TRUNK, *ARMS["right"], *ARMS["left"])}


def body_parts(pose: Pose, other: Pose, height: int, width: int) -> Iterator[Part]:
    """All parts of a body, from far to near, but for those that a pose lacks or whose map is degenerate.

    Without shoulders there is no size to go by, and only `face_and_hands` are moved.
    """
    seen, seen_there = (is_seen(np.concatenate([*vars(p).values()])) for p in (pose, other))
    seen &= seen_there
    ears = next((pair for pair in (JAW_ENDS, EARS, EYES) if seen[pair].all()), None)
    here, there = (landmarks(p, ears or EYES, height, width) for p in (pose, other))
    (unit, slimness), (unit_there, _) = body_unit(here, seen), body_unit(there, seen)
    if not seen[SHOULDERS].all() or unit == 0:
        yield from face_and_hands(pose, other, height, width)
        return
    seen = np.concatenate([seen, seen[HIPS] & seen[KNEES], seen[SKULL] & (ears is not None)])
    turn = head_turn(here, there, seen, unit_there / unit)
    units = {"body": unit}
    for side, wrist in WRISTS.items():  # a hand's unit: from the wrist to where the middle finger begins
        palm = np.linalg.norm(here[wrist + 9] - here[wrist])
        units[side] = palm if seen[[wrist, wrist + 9]].all() else 0.0

    far = far_arm(pose, slimness)
    near = [row for side, rows in ARMS.items() if side != far for row in rows]
    for row in (HAIR, *ARMS.get(far, ()), *TRUNK, *near):
        joints = [joint for joint in row.joints if seen[joint]]
        if len(joints) < row.needed:
            continue
        beyond = 0.0 if seen[list(row.unless)].any() else row.beyond
        outline, to_other = shape(row.kind, here[joints], there[joints], beyond, turn)
        if to_other is not None:
            reach = row.half_width * units[row.unit] + RIM + 0.5
            yield Part(row.name, to_other, outline, reach, soft=True, size=(height, width))


def landmarks(pose: Pose, ears: Sequence[int], height: int, width: int) -> np.ndarray:
    """All landmarks (154, 2) of a pose, with our own; ears: the two whose middle is the head's."""
    points = np.concatenate([latent_points(part, height, width) for part in vars(pose).values()])
    own = 0.4 * points[HIPS] + 0.6 * points[KNEES], points[ears].sum(axis=0) - points[SKULL]
    return np.concatenate([points, *own])


def shape(
    kind: str, here: np.ndarray, there: np.ndarray, beyond: float, turn: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """A part's outline (K, 2) and the map to the other pose, None where there is none, from its joints in both.

    A "bone" keeps its width, but not its length; a "patch" is what lies between joints. The "face" moves with its
    landmarks, the "head" by `turn`; both have room for what they are in either pose.
    """
    if kind == "bone":
        along, along_there = here[1] - here[0], there[1] - there[0]
        length, length_there = np.linalg.norm(along), np.linalg.norm(along_there)
        if min(length, length_there) < 1e-6:
            return here, None
        # A point beside the joint, equally far in both poses, keeps the width.
        across, across_there = (np.array([-y, x]) for x, y in (along, along_there))
        beside = here[0] + across, there[0] + across_there * length / length_there
        to_other = fit_affine(*(np.vstack(points) for points in zip((here, there), beside)))
        return np.stack([here[0], here[1] + beyond * along]), to_other
    outline, to_other = here, turn if kind == "head" else fit_affine(here, there)
    if kind in ("head", "face") and turn is not None:
        outline = np.concatenate([here, (there - turn[:, 2]) @ np.linalg.inv(turn[:, :2]).T])
    return outline, to_other


def head_turn(here: np.ndarray, there: np.ndarray, seen: np.ndarray, scale: float) -> np.ndarray | None:
    """How the head turns in the picture's plane, A (2, 3): as the jaw does, or else the neck and its joints."""
    jaw, joints = ([joint for joint in group if seen[joint]] for group in (JAW, (NECK, *HEAD)))
    points = jaw if len(jaw) > 2 else joints
    return fit_rotation(here[points], there[points], scale) if len(joints) > 1 else None


def fit_rotation(source: np.ndarray, target: np.ndarray, scale: float) -> np.ndarray | None:
    """The rotation and shift, with this scale, that takes `source` (K, 2) nearest to `target`: A (2, 3).

    None if they correlate by less than 0.7, as for somebody seen from behind, or the area changes by more than 4.
    """
    middles = source.mean(axis=0), target.mean(axis=0)
    a, b = source - middles[0], target - middles[1]
    cosine, sine = (a * b).sum(), (a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]).sum()
    length = np.hypot(cosine, sine)
    if length <= 0.7 * np.sqrt((a**2).sum() * (b**2).sum()) or not 1 / 2 <= scale <= 2:
        return None
    linear = np.array([[cosine, -sine], [sine, cosine]]) * scale / length
    return np.column_stack([linear, middles[1] - linear @ middles[0]])


def body_unit(points: np.ndarray, seen: np.ndarray) -> tuple[float, float]:
    """What widths are measured in, in pixels, and the distance between the shoulders over the torso's length.

    The unit is that distance, or three quarters of the torso's length where a turned body has less.
    """
    shoulders = np.linalg.norm(np.subtract(*points[SHOULDERS]))
    torso = np.linalg.norm(points[SHOULDERS].mean(0) - points[HIPS].mean(0)) if seen[HIPS].all() else 0.0
    return max(shoulders, 0.75 * torso), shoulders / max(torso, 1e-6)


def far_arm(pose: Pose, slimness: float) -> str | None:
    """The arm, "right" or "left", that a body hides which is turned by 45 degrees or more: where the nose points.

    slimness: the distance between the shoulders over the torso's length, 0.75 for a body that faces us.
    """
    if slimness > 0.52 or not is_seen(pose.body[[0, 1]]).all():
        return None
    return "left" if pose.body[0, 0] > pose.body[1, 0] else "right"


def covered(pose: Pose, height: int, width: int) -> np.ndarray:
    """How much of each latent pixel the parts of a body cover, from 0 to 1: (height, width)."""
    cover = np.zeros((height, width))
    for part in body_parts(pose, pose, height, width):
        x, y = part.pixels.T
        cover[y, x] = np.maximum(cover[y, x], part.weight)
    return cover


def may_cover(pose: Pose, height: int, width: int) -> np.ndarray:
    """Where a body may be, booleans (height, width): its parts, and what its keypoints do not tell.

    Anywhere, if a shoulder is not seen; if an ankle is not, anywhere below the leg's last joint or the shoulders.
    """
    seen = is_seen(pose.body)
    if not seen.any():
        return np.zeros((height, width), bool)
    if not seen[SHOULDERS].all():
        return np.ones((height, width), bool)
    body = covered(pose, height, width) > 0
    y = latent_points(pose.body, height, width)[:, 1]
    for leg in LEGS:
        known = leg[: int(np.cumprod(seen[leg]).sum())]
        if known != leg:
            body[max(0, int(y[known[-1:] or SHOULDERS].max())) :] = True
    return body
