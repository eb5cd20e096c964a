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


def fit_rotation(source: np.ndarray, target: np.ndarray, scale: float) -> np.ndarray | None:
    """The rotation and shift, with this scale, that takes `source` (K, 2) nearest to `target`: A (2, 3).

    None for points that no rotation takes there, such as the mirrored ones of somebody seen from behind: where
    the two, both about their means, correlate by less than 0.7. Or for an area that changes by more than a factor
    of 4.
    """
    middles = source.mean(axis=0), target.mean(axis=0)
    a, b = source - middles[0], target - middles[1]
    cosine, sine = (a * b).sum(), (a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]).sum()
    length = np.hypot(cosine, sine)
    if length <= 0.7 * np.sqrt((a**2).sum() * (b**2).sum()) or not 1 / 2 <= scale <= 2:
        return None
    linear = np.array([[cosine, -sine], [sine, cosine]]) * scale / length
    return np.column_stack([linear, middles[1] - linear @ middles[0]])


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
        here, there = getattr(pose, name), getattr(other, name)
        both = is_seen(here) & is_seen(there)
        here, there = (latent_points(part[both], height, width) for part in (here, there))
        to_other = fit_affine(here, there)
        if to_other is not None:
            yield Part(name, to_other, here, reach=1.0, soft=False, size=(height, width))


# COCO-18. Bones from joint to joint, half their width in body units, and how far the part goes on past its
# end, as a share of the bone: shins have feet, which COCO-18 does not.
THIGHS = (("right_thigh", 8, 9, 0.26, 0.0), ("left_thigh", 11, 12, 0.26, 0.0))
SHINS = (("right_shin", 9, 10, 0.20, 0.25), ("left_shin", 12, 13, 0.20, 0.25))
ARMS = {
    "right": (("right_upper_arm", 2, 3, 0.20, 0.0), ("right_forearm", 3, 4, 0.16, 0.0)),
    "left": (("left_upper_arm", 5, 6, 0.20, 0.0), ("left_forearm", 6, 7, 0.16, 0.0)),
}
UNSEEN_HAND = 0.6  # of a forearm: how far it goes on as a hand of which no keypoint is seen
SHOULDERS, HIPS, KNEES = [2, 5], [8, 11], [9, 12]
LEGS = [8, 9, 10], [11, 12, 13]  # from hip to ankle
EYES, EARS, NECK = [14, 15], [16, 17], 1
HEAD = [0, *EYES, *EARS]  # with the nose
JAW, ENDS = slice(0, 17), [0, 16]  # of the face, from ear to ear
# Of a hand: where its fingers begin, with the wrist; their bones; and half a finger's width as a share of the
# distance from the wrist to the middle finger.
PALM = [0, 1, 5, 9, 13, 17]
FINGER_BONES = [(first + i, first + i + 1) for first in (1, 5, 9, 13, 17) for i in range(3)]
FINGER = 0.15
RIM = 0.5  # pixels around a part that its edge reaches into


def shoulders_and_torso(points: np.ndarray, seen: np.ndarray) -> tuple[float, float]:
    """How far apart the shoulders are, and the torso's length, 0 without hips; joints (18, 2), booleans (18,)."""
    torso = np.linalg.norm(points[SHOULDERS].mean(0) - points[HIPS].mean(0))
    return np.linalg.norm(np.subtract(*points[SHOULDERS])), torso if seen[HIPS].all() else 0.0


def body_unit(shoulders: float, torso: float) -> float:
    """What sizes of parts are measured in: the distance between the shoulders, or three quarters of the torso's
    length where a turned body has less.
    """
    return max(shoulders, 0.75 * torso)


def body_parts(pose: Pose, other: Pose, height: int, width: int) -> Iterator[Part]:
    """All parts of a body, from far to near: a nearer one covers those before it.

    Along a bone, also a finger's, the map follows its length, across it keeps the width. The face moves with its
    landmarks. Hair does not: a head that turns or nods keeps its outline, so it goes where the jaw goes, turned as
    the jaw is and scaled as the body is. Parts that either pose lacks, and those foreshortened or stretched beyond
    a factor of 4, are left out. Without shoulders there is no size to go by, and only `face_and_hands` are moved.
    """
    here, there = (latent_points(p.body, height, width) for p in (pose, other))
    seen = is_seen(pose.body) & is_seen(other.body)
    shoulders, torso = shoulders_and_torso(here, seen)
    unit, unit_there = body_unit(shoulders, torso), body_unit(*shoulders_and_torso(there, seen))
    if not seen[SHOULDERS].all() or unit == 0:
        yield from face_and_hands(pose, other, height, width)
        return

    def part(name: str, outline, reach: float, to_other: np.ndarray | None) -> Iterator[Part]:
        if to_other is not None:
            outline, reach, size = np.asarray(outline), reach + RIM + 0.5, (height, width)
            yield Part(name, to_other, outline, reach, soft=True, size=size)

    def bone(name: str, ends, ends_there, half_width: float, beyond: float = 0.0) -> Iterator[Part]:
        (start, end), (start_there, end_there) = ends, ends_there
        along, along_there = end - start, end_there - start_there
        length, length_there = np.linalg.norm(along), np.linalg.norm(along_there)
        if min(length, length_there) < 1e-6:
            return
        # A point beside the joint, equally far in both poses, keeps the width.
        across = np.array([-along[1], along[0]])
        across_there = np.array([-along_there[1], along_there[0]]) * length / length_there
        to_other = fit_affine(
            np.stack([start, end, start + across]),
            np.stack([start_there, end_there, start_there + across_there]),
        )
        yield from part(name, [start, end + beyond * along], half_width, to_other)

    def limb(name: str, start: int, end: int, half_width: float, beyond: float) -> Iterator[Part]:
        joints = [start, end]
        if seen[joints].all():
            yield from bone(name, here[joints], there[joints], half_width * unit, beyond)

    def arm(side: str) -> Iterator[Part]:
        hands = [getattr(p, f"{side}_hand") for p in (pose, other)]
        both = is_seen(hands[0]) & is_seen(hands[1])
        upper, (*forearm, _) = ARMS[side]
        yield from limb(*upper)
        yield from limb(*forearm, 0.0 if both.any() else UNSEEN_HAND)
        hand, hand_there = (latent_points(h, height, width) for h in hands)
        finger = FINGER * np.linalg.norm(hand[9] - hand[0]) if both[[0, 9]].all() else 0.0
        for joints in map(list, FINGER_BONES):
            if both[joints].all():
                yield from bone(f"{side}_fingers", hand[joints], hand_there[joints], finger)
        palm = [joint for joint in PALM if both[joint]]
        if palm:
            to_other = fit_affine(hand[palm], hand_there[palm])
            yield from part(f"{side}_hand", hand[palm], finger, to_other)

    faces = is_seen(pose.face) & is_seen(other.face)
    face, face_there = (latent_points(p.face, height, width) for p in (pose, other))

    # How the head turned in the picture's plane, and so where points of the other pose's head are here.
    jaw, named = faces.copy(), [joint for joint in (NECK, *HEAD) if seen[joint]]
    jaw[JAW.stop :] = False
    turned = (face[jaw], face_there[jaw]) if jaw.sum() > 2 else (here[named], there[named])
    head_to_other = fit_rotation(*turned, unit_there / unit) if len(named) > 1 else None

    def here_too(outline, outline_there) -> np.ndarray:
        back = np.linalg.inv(head_to_other[:, :2])
        return np.concatenate([outline, (outline_there - head_to_other[:, 2]) @ back.T])

    def skull(face: np.ndarray, body: np.ndarray) -> np.ndarray:
        """Jaw, nose, eyes and ears, and opposite them the crown: mirrored at the middle of the ears."""
        points = np.concatenate([face[jaw], body[HEAD][seen[HEAD]]])
        pairs = (face[ENDS], faces[ENDS]), (body[EARS], seen[EARS]), (body[EYES], seen[EYES])
        middle = next((pair for pair, known in pairs if known.all()), None)
        return points if middle is None else np.concatenate([points, middle.sum(axis=0) - points])

    def head(name: str, margin: float) -> Iterator[Part]:
        if head_to_other is not None:
            outline = here_too(skull(face, here), skull(face_there, there))
            yield from part(name, outline, margin * unit, head_to_other)

    # Once wide and behind everything, for the hair; at the end once close and before the torso, with the face.
    yield from head("hair", 0.45)
    far = far_arm(pose, shoulders / max(torso, 1e-6))  # never, where no hips are seen
    if far:
        yield from arm(far)
    if seen[HIPS + KNEES].all():
        source, target = (np.concatenate([p[HIPS], 0.4 * p[HIPS] + 0.6 * p[KNEES]]) for p in (here, there))
        yield from part("hips", source, 0.15 * unit, fit_affine(source, target))
    for one in (*THIGHS, *SHINS):
        yield from limb(*one)
    corners = SHOULDERS + HIPS
    if seen[corners].all():
        to_other = fit_affine(here[corners], there[corners])
        yield from part("torso", here[corners], 0.15 * unit, to_other)
    yield from head("head", 0.2)
    if faces.any():
        outline = face[faces]
        if head_to_other is not None:
            outline = here_too(outline, face_there[faces])
        yield from part("face", outline, 0.0, fit_affine(face[faces], face_there[faces]))
    for side in ARMS:
        if side != far:
            yield from arm(side)


def covered(pose: Pose, height: int, width: int) -> np.ndarray:
    """How much of each latent pixel the parts of a body cover, from 0 to 1: (height, width)."""
    cover = np.zeros((height, width))
    for part in body_parts(pose, pose, height, width):
        x, y = part.pixels.T
        cover[y, x] = np.maximum(cover[y, x], part.weight)
    return cover


def may_cover(pose: Pose, height: int, width: int) -> np.ndarray:
    """Where a body may be, booleans (height, width): its parts, and what its keypoints do not tell.

    Anywhere, if one shoulder is not seen; and where a leg is not seen down to its ankle, anywhere below its last
    joint that is, or below the shoulders.
    """
    seen = is_seen(pose.body)
    if not seen.any():
        return np.zeros((height, width), bool)
    if not seen[SHOULDERS].all():
        return np.ones((height, width), bool)
    body = covered(pose, height, width) > 0
    y = latent_points(pose.body, height, width)[:, 1]
    for leg in LEGS:
        joints = [joint for joint in leg if seen[leg[0] : joint + 1].all()]
        if len(joints) < len(leg):
            above = joints[-1:] or SHOULDERS
            body[max(0, int(y[above].max())) :] = True
    return body


def far_arm(pose: Pose, slimness: float) -> str | None:
    """The arm that a turned body hides, "right" or "left": that on the side the nose points to.

    slimness: the distance between the shoulders over the torso's length, 0.75 for a body that faces us. None
    for one that is turned by less than about 45 degrees, or shows no face.
    """
    if slimness > 0.52 or not is_seen(pose.body[[0, 1]]).all():
        return None
    return "left" if pose.body[0, 0] > pose.body[1, 0] else "right"


PARTS = {"face,hands": face_and_hands, "body": body_parts}
