"""One person's motion in another one's proportions: `retarget(driver, subject, aspect)`.

In others the subject's face and figure would give way (the paper's supplement, Fig. 3c). So bones keep the
driver's directions and take the subject's lengths; face and hands keep their shapes and take the subject's size;
feet stand where the subject's stand. Inside, points are (x, y) in canvas heights, and missing ones are nan.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from poses.pose import Pose, has_person, is_seen

# Keypoints of the body, and two joints of our own: the head's centre and the middle of the hips.
NOSE, NECK, EYES, EARS = 0, 1, [14, 15], [16, 17]
SHOULDERS, HIPS, ANKLES, WRISTS = [2, 5], [8, 11], [10, 13], {"left_hand": 7, "right_hand": 4}
HEAD, PELVIS, JOINTS = 18, 19, 20

# Each joint's parent and the bone between them, parents first. Left and right share a bone, and the head is one
# piece. Torso and hips have ratios of their own: somebody with narrow hips need not have a short back.
TREE: dict[int, tuple[int, str]] = {
    HEAD: (NECK, "neck"),
    **{joint: (HEAD, "head") for joint in (NOSE, *EYES, *EARS)},
    **{joint: (NECK, "shoulder") for joint in SHOULDERS},
    **{joint: (joint - 1, "upper arm") for joint in (3, 6)},
    **{joint: (joint - 1, "forearm") for joint in WRISTS.values()},
    PELVIS: (NECK, "torso"),
    **{joint: (PELVIS, "hip") for joint in HIPS},
    **{joint: (joint - 1, "thigh") for joint in (9, 12)},
    **{joint: (joint - 1, "shin") for joint in ANKLES},
}

JAW = slice(0, 17)  # the head's outline: nodding and turning move it less than the features
PALM = [0, 1, 2, 5, 9, 13, 17]  # the same in a fist and in an open hand
# The quantile of lengths that counts: bones that point at the camera look short, and few mistakes look longer.
LENGTH = 0.9
SHORTEST = 1e-3  # what is shorter, half a pixel of 512, cannot be measured
# How long an average person's bones are, neck to hip being 1: limbs by Drillis and Contini (1966), as in Winter's
# "Biomechanics and Motor Control of Human Movement"; neck, shoulders and hips as detectors mark them.
AVERAGE = {"neck": 0.33, "shoulder": 0.42, "upper arm": 0.65, "forearm": 0.51, "torso": 1, "hip": 0.2}
AVERAGE |= {"thigh": 0.85, "shin": 0.85}
# How many times longer or shorter than average a bone may be, and a ratio than the overall scale. A toddler's legs
# are 1.5 times shorter beside its torso than an adult's; the rest is for drawn people, whose heads differ most.
# Hands and necks go with the body or the head: half of a neck, as measured, is head, and bent heads hide it.
MOST, MOST_OF_HEADS, MOST_BEYOND_BOTH = 1.75, 2.5, 1.1
ALIKE = 1.1  # left and right: if they are further apart, one of them is short for the camera or wrong
# A bone seen in FEW frames or less takes the overall scale, and one seen in ENOUGH has a ratio of its own. A
# driver's frames follow each other and may show one posture, so they must also span so many.
FEW, ENOUGH, ENOUGH_OF_DRIVER = 3, 8, 16
REACH = 6  # frames to each side within which the camera hardly comes nearer
# The quantile of the lower foot's heights (y points down) that is the ground's: feet are on it for most of a clip.
GROUND = 0.75


def retarget(driver: Sequence[Pose], subject: Sequence[Pose], aspect: float) -> list[Pose]:
    """The driver's poses as the subject would take them, all on a canvas of width / height = `aspect`.

    What the driver misses stays missing. Raises ValueError if either has nobody in it, or the two share no bone.
    """
    ratios = proportions(driver, subject, aspect)
    source, target = _read(driver, aspect), _read(subject, aspect)
    joints = np.stack([_carry(frame, ratios) for frame in source["body"]])
    joints += _placement(source["body"], joints, target["body"], ratios["scale"])[:, None]
    moved = {"body": joints[:, :HEAD]}
    for part, joint in {"face": HEAD, **WRISTS}.items():
        offsets = source[part] - source["body"][:, joint, None]
        moved[part] = joints[:, joint, None] + ratios["head" if part == "face" else "hand"] * offsets

    def put(points: np.ndarray, part: np.ndarray) -> np.ndarray:
        """Points (K, 2) in place of those of a pose's part (K, 3), where that part has seen them."""
        placed = np.concatenate([points / (aspect, 1), part[:, 2:]], axis=1)
        return np.where(is_seen(part)[:, None], placed, 0).astype(np.float32)

    return [
        Pose(**{name: put(moved[name][frame], part) for name, part in vars(pose).items()})
        for frame, pose in enumerate(driver)
    ]


def _read(poses: Sequence[Pose], aspect: float) -> dict[str, np.ndarray]:
    """Points (F, K, 2) by part. The body has JOINTS, and those that others can stand in for are filled in."""
    points = {}
    for name in vars(Pose()):
        part = np.stack([getattr(pose, name) for pose in poses]).astype(np.float64)
        points[name] = np.where(part[..., 2:] > 0, part[..., :2] * (aspect, 1), np.nan)
    body, face = points["body"], points["face"]
    features = np.concatenate([body[:, EYES + EARS], face], axis=1)
    stand_ins = [
        (NECK, body[:, SHOULDERS].mean(axis=1)),  # which is where COCO's necks come from
        (PELVIS, body[:, HIPS].mean(axis=1)),
        *((HEAD, head) for head in (face[:, JAW].mean(axis=1), body[:, NOSE], _centre(features))),
        *((wrist, points[hand][:, 0]) for hand, wrist in WRISTS.items()),
        *((wrist, _centre(points[hand])) for hand, wrist in WRISTS.items()),
    ]
    joints = np.pad(body, ((0, 0), (0, JOINTS - HEAD), (0, 0)), constant_values=np.nan)
    for joint, other in stand_ins:
        joints[:, joint] = np.where(np.isnan(joints[:, joint]), other, joints[:, joint])
    return points | {"body": joints}


def _centre(points: np.ndarray) -> np.ndarray:
    """The mean (F, 2) of the points (F, K, 2) that are seen; nan where none is."""
    with np.errstate(invalid="ignore"):
        return np.nansum(points, axis=1) / (~np.isnan(points)).sum(axis=1)


# ---- Proportions --------------------------------------------------------------------------------


def proportions(driver: Sequence[Pose], subject: Sequence[Pose], aspect: float) -> dict[str, float]:
    """How many times longer the subject's bones are: by bone, with "head", "hand" and "scale".

    "scale", the median over the bones, also stands for those that either clip shows in few frames, not at all, or
    too short or too long to be true. No ratio is further from it than builds differ. Raises as `retarget`.
    """
    for whose, poses in {"driver": driver, "subject": subject}.items():
        if not any(map(has_person, poses)):
            raise ValueError(f"retargeting: nobody is seen in the {whose}'s poses")
    ours = _measure(_read(subject, aspect), ENOUGH)
    theirs = _measure(_read(driver, aspect), ENOUGH_OF_DRIVER)
    measured = {
        name: Measure(a.length / b.length, a.likely and b.likely, min(a.trust, b.trust))
        for name, a in ours.items()
        if (b := theirs.get(name))
    }
    for name, instead in {"neck": "neck to nose", "head": "between eyes"}.items():
        if instead in measured:
            measured.setdefault(name, measured[instead])
    bones = [*dict.fromkeys(bone for _, bone in TREE.values())]
    seen = [measured[bone] for bone in bones if bone in measured]
    if not seen:
        raise ValueError("retargeting: the poses of driver and subject share no bone")
    scale = float(np.median([m.length for m in seen if m.likely] or [m.length for m in seen]))

    def bounded(name: str, low: float, high: float) -> float:
        """A bone's ratio, from `low` to `high`: the less it can be trusted, the nearer to the scale."""
        ratio, likely, trust = measured.get(name, (scale, True, 0))
        return float(np.clip(scale * (ratio / scale) ** (likely * trust), low, high))

    ratios = {bone: bounded(bone, scale / MOST, scale * MOST) for bone in bones}
    ratios["head"] = bounded("head", scale / MOST_OF_HEADS, scale * MOST_OF_HEADS)
    beyond = min(scale, ratios["head"]) / MOST_BEYOND_BOTH, max(scale, ratios["head"]) * MOST_BEYOND_BOTH
    ratios["neck"] = bounded("neck", *beyond)
    hand = bounded("hand", *beyond) if "hand" in measured else ratios["forearm"]
    return ratios | {"hand": hand, "scale": scale}


class Measure(NamedTuple):
    length: float  # or the ratio of two lengths
    likely: bool  # whether it can be true beside the other bones
    trust: float  # from 0, for what few frames show, to 1


def _measure(points: dict[str, np.ndarray], enough: int) -> dict[str, Measure]:
    """How long each bone is, and what else can be measured; without what is never seen."""
    size = _size(lengths := _lengths(points))
    sides = {}  # the lengths of left and right when the person has the clip's usual size
    for name, both in lengths.items():
        usual = np.median(size) * np.array([_usual_length(side / size) for side in both])
        if (usual > SHORTEST).any():
            sides[name] = usual[usual > SHORTEST]
    # The body's size, as the length of a torso: what most bones say, or more, as they look short but hardly long.
    torsos = [sides[bone].max() / share for bone, share in AVERAGE.items() if bone in sides]
    torso = np.quantile(torsos, 0.6, method="higher") if torsos else np.nan
    measures = {}
    for name, each in sides.items():
        length, average = each.mean(), AVERAGE.get(name, np.inf) * torso
        if name == "hand":
            # the median, as small hands are found too large as easily as too small: 9 % off, not 13 %
            length = max(np.nanmedian(lengths[name] / size) * np.median(size), SHORTEST)
        elif each.max() > ALIKE * each.min():
            # The longer one is right if the other is short for the camera, but not if it is longer than average.
            length = np.median([*each, average])
        likely = name not in AVERAGE or average / MOST <= length <= average * MOST
        frames = np.flatnonzero(~np.isnan(lengths[name]).all(axis=0))
        trust = min((len(frames) - FEW) / (ENOUGH - FEW), (np.ptp(frames) + 1 - FEW) / (enough - FEW))
        measures[name] = Measure(float(length), bool(likely), float(np.clip(trust, 0, 1)))
    return measures


def _lengths(points: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """How long each bone is, and what else can be measured: (sides, F), nan where it is not seen."""
    joints, jaw = points["body"], points["face"][:, JAW]

    def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.linalg.norm(a - b, axis=-1)

    def spread(part: np.ndarray) -> np.ndarray:
        """The distance of a part's points (F, K, 2) from their mean: (F,)."""
        return np.sqrt((distance(part, part.mean(axis=1, keepdims=True)) ** 2).mean(axis=1))

    lengths: dict[str, list[np.ndarray]] = {}
    for joint, (parent, bone) in TREE.items():
        lengths.setdefault(bone, []).append(distance(joints[:, joint], joints[:, parent]))
    # The head's place and size like for like: never a jaw's in one clip and a nose's in the other.
    lengths |= {
        "neck": [distance(jaw.mean(axis=1), joints[:, NECK])],
        "neck to nose": [distance(joints[:, NOSE], joints[:, NECK])],
        "head": [spread(jaw)],
        "between eyes": [distance(*joints[:, EYES].swapaxes(0, 1))],
        "hand": [spread(points[hand][:, PALM]) for hand in WRISTS],
    }
    return {name: np.stack(sides) for name, sides in lengths.items()}


def _size(lengths: dict[str, np.ndarray]) -> np.ndarray:
    """How large the person is in each frame (F,), 1 being nearly the largest: people come nearer to the camera.

    A torso looks short in a bow and shoulders in profile, but not both at once, so the larger of them tells.
    """
    sizes = np.full((2, lengths["torso"].shape[1]), np.nan)
    if np.isnan(lengths["torso"]).mean() > 0.5:
        return np.ones(sizes.shape[1])  # shoulders alone would take a turn for a walk away
    for size, bone in zip(sizes, ("torso", "shoulder")):
        length = np.fmax.reduce(lengths[bone])
        length = np.pad(length / max(_usual_length(length), SHORTEST), REACH, constant_values=np.nan)
        near = np.lib.stride_tricks.sliding_window_view(length, 2 * REACH + 1)  # (F, 2 REACH + 1)
        seen = ~np.isnan(near).all(axis=1)
        size[seen] = np.nanmedian(near[seen], axis=1)
    size = np.fmax(*sizes).clip(0.1)  # what seems farther away is measured wrongly
    known = np.flatnonzero(~np.isnan(size))
    return np.interp(np.arange(len(size)), known, size[known])


def _usual_length(lengths: np.ndarray) -> float:
    return float(np.nanquantile(lengths, LENGTH)) if not np.isnan(lengths).all() else np.nan


# ---- Motion -------------------------------------------------------------------------------------


def _carry(joints: np.ndarray, ratios: dict[str, float]) -> np.ndarray:
    """One frame's joints (JOINTS, 2), each at its bone's new length from its parent.

    The nearest ancestor that is seen stands in for a missing parent, with the mean ratio of the bones between;
    where none is seen, the joint is a root, scaled about the origin.
    """
    moved = ratios["scale"] * joints
    for joint, (parent, bone) in TREE.items():
        passed = [ratios[bone]]
        while np.isnan(joints[parent, 0]) and parent in TREE:
            parent, bone = TREE[parent]
            passed.append(ratios[bone])
        if not np.isnan(joints[parent, 0]):
            moved[joint] = moved[parent] + np.mean(passed) * (joints[joint] - joints[parent])
    return moved


def _placement(driver: np.ndarray, moved: np.ndarray, subject: np.ndarray, scale: float) -> np.ndarray:
    """Where on the canvas: the shift (F, 2) of `moved`, the driver's joints after `_carry`.

    Across, the pelvis takes the driver's path times `scale`, about its median, at most a shoulders' width from
    where the training frames show the subject. Upright, the lower foot is as high above the subject's ground as
    above the driver's, times `scale`; without feet, the neck comes as high as in the training frames.
    """
    shoulders = np.linalg.norm(np.subtract(*subject[:, SHOULDERS].swapaxes(0, 1)), axis=1)
    width = np.nan_to_num(_usual_length(shoulders))
    shift = np.empty((len(driver), 2))
    for axis, slack in enumerate((width, 0)):
        before, after, goal = (_courses(joints, axis) for joints in (driver, moved, subject))
        anchor = next(name for name in goal if name in before)
        if anchor == "lower foot":
            start, end = (np.nanquantile(course[anchor], GROUND) for course in (before, goal))
        else:
            start, there = np.nanmedian(before[anchor]), goal[anchor]
            end = np.clip(start, np.nanmin(there) - slack, np.nanmax(there) + slack)
        path = scale * (before[anchor] - start) + end - after[anchor]
        seen = ~np.isnan(path)
        shift[:, axis] = np.interp(np.arange(len(path)), np.flatnonzero(seen), path[seen])
    return shift


def _courses(joints: np.ndarray, axis: int) -> dict[str, np.ndarray]:
    """What tells a body's place in most frames that show any of it, best first: one coordinate's course (F,)."""
    foot = np.fmax(*(joints[:, ankle] for ankle in ANKLES))
    places = {"lower foot": foot} if axis == 1 else {"pelvis": joints[:, PELVIS]}
    places |= {"neck": joints[:, NECK], "head": joints[:, HEAD], "centre": _centre(joints)}
    seen = {name: np.count_nonzero(~np.isnan(place[:, axis])) for name, place in places.items()}
    return {name: place[:, axis] for name, place in places.items() if 2 * seen[name] >= seen["centre"]}
