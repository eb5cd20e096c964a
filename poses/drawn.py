"""Poses from drawn skeletons: videos that show OpenPose's or DWPose's drawing and nothing else."""

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from poses.pose import HAND_EDGES, LIMBS, Pose, is_seen

INFERRED = 0.5  # score of keypoints whose own mark is covered, where the marks around tell where
NECK, EARS = 1, (16, 17)
LEFT_KNEE = 12  # its disc is as blue as the joints of hands


# ---- Colours ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ink:
    """What is drawn on one frame: its pixels that are not black, and maps of what they may be.

    The maps are (H, W), padded by `margin` pixels on each side so that neighbours can be looked up.
    """

    joint: np.ndarray  # 0 to 17: as bright as the disc of that body keypoint, or -1
    limb: np.ndarray  # 0 to 16: as dark as that limb, or -1
    bone: np.ndarray  # 0 to 19: as bright as that bone of a hand, or -1
    white: np.ndarray  # bool
    black: np.ndarray  # bool


def read_ink(frame: np.ndarray, margin: int) -> Ink:
    """Sorts the pixels of a frame, uint8 (H, W, 3), by their colours."""
    padded = np.pad(frame, ((margin, margin), (margin, margin), (0, 0)))
    y, x = np.nonzero((padded > 48).any(axis=2))
    rgb = padded[y, x].astype(np.float32)
    high, low = rgb.max(axis=1), rgb.min(axis=1)
    chroma = (high - low).clip(1)
    red, green, blue = rgb.T
    hue = np.select(
        [high == red, high == green],
        [(green - blue) / chroma % 6, (blue - red) / chroma + 2],
        (red - green) / chroma + 4,
    )  # 0 to 6
    coloured = chroma > 0.5 * high
    bright = high > 0.75 * 255

    def as_map(values: np.ndarray, where: np.ndarray) -> np.ndarray:
        result = np.full(padded.shape[:2], -1, np.int8)
        result[y[where], x[where]] = values[where]
        return result

    body_hue, bone_hue = np.rint(hue * 3).astype(int) % 18, np.rint(hue / 0.3).astype(int) % 20
    return Ink(
        joint=as_map(body_hue, coloured & bright),
        limb=as_map(body_hue, coloured & ~bright & (body_hue < 17)),
        bone=as_map(bone_hue, coloured & bright),
        white=as_map(np.zeros(len(y)), (low > 130) & ~coloured) == 0,
        black=as_map(np.zeros(len(y)), high > 0) < 0,
    )


def label_components(classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Connected pixels (8 neighbours) of the same class, -1 being no class.

    Takes a map (H, W) whose border is -1; returns the pixels (N, 2) as (x, y) and their labels
    (N,), from 0 on.
    """
    y, x = np.nonzero(classes >= 0)
    number = np.full(classes.shape, -1)
    number[y, x] = np.arange(len(y))
    pairs = []
    for dy, dx in ((0, 1), (1, -1), (1, 0), (1, 1)):
        other = number[y + dy, x + dx]
        joined = np.flatnonzero((other >= 0) & (classes[y, x] == classes[y + dy, x + dx]))
        pairs.append(np.stack([joined, other[joined]]))
    first, second = np.concatenate(pairs, axis=1)
    label = np.arange(len(y))
    while (label[first] != label[second]).any():
        lower = np.minimum(label[first], label[second])
        np.minimum.at(label, label[first], lower)
        np.minimum.at(label, label[second], lower)
        label = label[label]
    return np.stack([x, y], axis=1), np.unique(label, return_inverse=True)[1]


# ---- Joints -------------------------------------------------------------------------------------


def disc_offsets(radius: float) -> np.ndarray:
    """The pixels (K, 2) of a disc around 0, as (x, y)."""
    reach = np.arange(-int(radius), int(radius) + 1)
    offsets = np.stack(np.meshgrid(reach, reach), axis=-1).reshape(-1, 2)
    return offsets[np.hypot(*offsets.T) <= radius]


def find_discs(ink: Ink, radius: float, least: float) -> list[np.ndarray]:
    """Discs by class, of 0 to 17: rows (x, y, share of the disc that is seen), the fullest first.

    A disc is a place around which at least the share `least` of a disc's pixels have its class.
    """
    classes = ink.joint
    y, x = np.nonzero(classes >= 0)
    own = classes[y, x]
    offsets = disc_offsets(radius)
    share = np.zeros(len(y), np.float32)
    for dx, dy in offsets:
        share += classes[y + dy, x + dx] == own
    share /= len(offsets)

    found = []
    for index in range(18):
        mine = (own == index) & (share >= (0.4 if index in EARS else least))
        points = np.stack([x, y], axis=1)[mine].astype(np.float64)
        shares = share[mine]
        everywhere = np.stack([x, y], axis=1)[own == index]
        discs = []
        while len(points):
            best = shares.argmax()
            near = np.linalg.norm(everywhere - points[best], axis=1) <= radius + 0.5
            centre = everywhere[near].mean(axis=0)
            if shares[best] < 0.9:
                centre = uncover_disc(ink, index, centre, radius)
            discs.append((*centre, shares[best]))
            away = np.linalg.norm(points - centre, axis=1) > 1.5 * radius
            away[best] = False
            points, shares = points[away], shares[away]
        found.append(np.array(discs).reshape(-1, 3))
    return found


def uncover_disc(ink: Ink, index: int, near: np.ndarray, radius: float) -> np.ndarray:
    """The centre of a partly covered disc: it reaches over its own pixels, and not over black or
    limbs, which can cover nothing."""
    offsets = disc_offsets(radius)
    centres = np.rint(near).astype(int) + offsets
    x, y = np.moveaxis(centres[:, None] + offsets, -1, 0)
    below = ink.black[y, x] | (ink.limb[y, x] >= 0)
    values = ((ink.joint[y, x] == index) * 1 - below).sum(axis=1)
    return centres[values >= values.max() - 0.5].mean(axis=0)


# ---- Limbs --------------------------------------------------------------------------------------


@dataclass
class Limb:
    """The visible part of one limb; `start` and `end` are its extremes in either order."""

    index: int
    pixels: np.ndarray  # (N, 2)
    start: np.ndarray
    end: np.ndarray

    @property
    def length(self) -> float:
        return float(np.linalg.norm(self.end - self.start))


def make_limb(index: int, pixels: np.ndarray) -> Limb:
    centre = pixels.mean(axis=0)
    offsets = pixels - centre
    axis = np.linalg.eigh(offsets.T @ offsets)[1][:, 1]
    along = offsets @ axis
    return Limb(index, pixels, centre + along.min() * axis, centre + along.max() * axis)


def distance_to_line(points: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    along = (end - start) / max(np.linalg.norm(end - start), 1e-6)
    return np.abs((points - start) @ (-along[1], along[0]))


def is_covered(ink: Ink, start: np.ndarray, end: np.ndarray) -> bool:
    """Whether something is drawn (nearly) all the way between two points."""
    steps = int(np.ceil(np.linalg.norm(end - start))) + 1
    x, y = np.rint(np.linspace(start, end, steps)).astype(int).T
    return ink.black[y, x].mean() <= 0.15


def find_limbs(ink: Ink, radius: float) -> list[Limb]:
    """Limbs, the longest first; pieces on either side of what lies over them are put together."""
    pixels, labels = label_components(ink.limb)
    if not len(pixels):
        return []
    order = np.argsort(labels, kind="stable")
    pieces = np.split(pixels[order], np.flatnonzero(np.diff(labels[order])) + 1)
    limbs: list[Limb] = []
    for piece in sorted(pieces, key=len, reverse=True):
        if len(piece) < max(4, 0.5 * radius**2):
            break
        limb = make_limb(ink.limb[piece[0, 1], piece[0, 0]], piece)
        for known in limbs:
            if known.index != limb.index:
                continue
            aside = distance_to_line(piece, known.start, known.end)
            gap = min(
                ([a, b] for a in (known.start, known.end) for b in (limb.start, limb.end)),
                key=lambda gap: np.linalg.norm(gap[1] - gap[0]),
            )
            if aside.max() < 1.5 * radius + 1 and is_covered(ink, *gap):
                merged = make_limb(limb.index, np.concatenate([known.pixels, piece]))
                known.pixels, known.start, known.end = merged.pixels, merged.start, merged.end
                break
        else:
            limbs.append(limb)
    return sorted(limbs, key=lambda limb: limb.length, reverse=True)


def extend_limb(ink: Ink, limb: Limb, fixed: np.ndarray, seen: np.ndarray, radius: float):
    """Where a limb ends whose one end is `fixed` and whose other, `seen` as far as it is, is covered.

    Limbs are ellipses whose width is known: of those that reach on, the one that covers most of
    the limb's pixels and fewest black ones.
    """
    along = seen - fixed
    length = max(np.linalg.norm(along), 1.0)
    along = along / length
    reach = np.arange(-0.5 * radius, 3 * radius, 0.5)
    low = np.floor(np.minimum(fixed, seen) - 4 * radius).astype(int).clip(0)
    high = np.ceil(np.maximum(fixed, seen) + 4 * radius).astype(int) + 1
    y, x = np.mgrid[low[1] : high[1], low[0] : high[0]]
    y, x = y.clip(0, ink.black.shape[0] - 1).ravel(), x.clip(0, ink.black.shape[1] - 1).ravel()
    worth = (ink.limb[y, x] == limb.index) - 1.0 * ink.black[y, x]
    offsets = np.stack([x, y], axis=1) - fixed
    t, aside = offsets @ along, offsets @ (-along[1], along[0])
    near = (worth != 0) & (np.abs(aside) <= radius + 1) & (t >= 0)
    worth, t, aside = worth[near], t[near], aside[near]
    half = (length + reach)[:, None] / 2
    found = []
    for wider in (-0.5, -0.25, 0, 0.25, 0.5, 0.75):
        inside = ((t - half) / half.clip(0.5)) ** 2 + (aside / (radius + wider)) ** 2 < 1
        values = inside @ worth
        found.append((values.max(), reach[values >= values.max() - 0.5].mean()))
    return fixed + along * (length + max(found)[1])


# ---- People -------------------------------------------------------------------------------------


class Joints:
    """Places of body keypoints on one frame: discs, and ends of limbs where discs are covered."""

    def __init__(self, discs: list[np.ndarray]):
        self.places = [list(disc[:, :2]) for disc in discs]
        self.scores = [[1.0] * len(disc) for disc in discs]
        self.shares = [disc[:, 2] for disc in discs]
        self.discs = [len(disc) for disc in discs]

    def add(self, joint: int, place: np.ndarray) -> int:
        self.places[joint].append(place)
        self.scores[joint].append(INFERRED)
        return len(self.places[joint]) - 1

    def nearest(self, ink: Ink, joint: int, end: np.ndarray, start: np.ndarray, radius: float):
        """The joint that a limb from `start` towards `end` leads to, and its distance; or None."""
        if not self.places[joint]:
            return None, 3 * radius
        places = np.array(self.places[joint])
        along = (end - start) / max(np.linalg.norm(end - start), 1e-6)
        ahead, aside = (places - end) @ along, (places - end) @ (-along[1], along[0])
        distance = np.hypot(ahead, aside)
        slack = 0.7 * radius + 1 + 0.1 * ahead.clip(0)
        fits = (ahead > -1.5 * radius - 1) & (np.abs(aside) < slack)
        fits |= (np.array(self.scores[joint]) < 1) & (distance < 3 * radius)
        for index in np.argsort(distance):
            if fits[index] and is_covered(ink, end, places[index]):
                return int(index), float(distance[index])
        return None, 3 * radius


def join(ink: Ink, limbs: list[Limb], joints: Joints, radius: float) -> list[tuple]:
    """Which joints each limb joins: (limb, place of its first joint, place of its second)."""
    links = []
    for limb in limbs:
        ways = []
        for start, end in ((limb.start, limb.end), (limb.end, limb.start)):
            first, second = LIMBS[limb.index]
            a, cost_a = joints.nearest(ink, first, start, end, radius)
            b, cost_b = joints.nearest(ink, second, end, start, radius)
            ways.append((cost_a + cost_b, a, b, start, end))
        _, a, b, start, end = min(ways, key=lambda way: way[0])
        if a is None and b is None and limb.length < 3 * radius:
            continue
        if a is None:
            fixed = end if b is None else joints.places[second][b]
            a = joints.add(first, extend_limb(ink, limb, fixed, start, radius))
        if b is None:
            b = joints.add(second, extend_limb(ink, limb, joints.places[first][a], end, radius))
        links.append((limb, a, b))
    return links


def assemble(ink: Ink, links: list[tuple], joints: Joints, radius: float) -> list[np.ndarray]:
    """People, as bodies (18, 3) in pixels, the one with the most joints first.

    Joints that limbs join belong together. So do pieces that lack each other's joints, if what may
    join them is hidden: a limb between two joints is always drawn.
    """
    groups: list[set] = []
    for limb, a, b in links:
        first, second = LIMBS[limb.index].tolist()
        group = {(first, a), (second, b)}
        apart = [other for other in groups if not other & group]
        groups = [*apart, group.union(*(other for other in groups if other & group))]
    linked = set().union(*groups)
    for joint in set(range(18)) - {LEFT_KNEE}:
        least = 0.4 if joint in EARS else 0.75  # ears lie under the dots of the jaw
        alone = [(joint, i) for i in range(joints.discs[joint]) if (joint, i) not in linked]
        groups += [{(joint, i)} for joint, i in alone if joints.shares[joint][i] > least]

    bodies: list[np.ndarray] = []
    for group in sorted(groups, key=len, reverse=True):
        piece = np.zeros((18, 3))
        for joint, index in group:
            if joints.scores[joint][index] > piece[joint, 2]:
                piece[joint] = *joints.places[joint][index], joints.scores[joint][index]
        for body in bodies:
            if belongs(ink, piece, body, radius):
                body += piece
                break
        else:
            bodies.append(piece)
    return bodies


def belongs(ink: Ink, piece: np.ndarray, body: np.ndarray, radius: float) -> bool:
    """Whether a piece of a skeleton completes a body: both (18, 3) in pixels."""
    if (is_seen(piece) & is_seen(body)).any():
        return False
    if not (piece[:, 2] == 1).any():  # ends of some stripe that happens to have a limb's colour
        return False
    places, own = piece[is_seen(piece), :2], body[is_seen(body), :2]
    distance = np.linalg.norm(places[:, None] - own, axis=2).min()
    if distance > 0.5 * np.ptp(own, axis=0).max() + 2 * radius:
        return False
    for first, second in LIMBS:
        for a, b in ((piece[first], body[second]), (piece[second], body[first])):
            if a[2] and b[2] and not is_covered(ink, a[:2], b[:2]):
                return False
    return True


def choose_person(people: list[list[np.ndarray]]) -> list[np.ndarray | None]:
    """One body per frame: the sequence that is large throughout and leaps least (Viterbi's way)."""
    sizes = [[np.ptp(body[is_seen(body), :2], axis=0).max() for body in bodies] for bodies in people]
    largest = max((size for frame in sizes for size in frame), default=1.0)
    value: list[float] = []
    bodies: list[np.ndarray] = []
    chosen, back = [], []
    for frame, new in enumerate(people):
        if not new:
            back.append(None)
            continue
        steps = np.zeros((len(new), max(len(bodies), 1)))
        for i, body in enumerate(new):
            for j, old in enumerate(bodies):
                both = is_seen(body) & is_seen(old)
                leap = np.linalg.norm((body - old)[both, :2], axis=1).mean() if both.any() else largest
                steps[i, j] = value[j] - min(2 * leap / largest, 1.0)
        back.append(steps.argmax(axis=1))
        value = [size / largest + steps[i].max() for i, size in enumerate(sizes[frame])]
        bodies = new
    best = int(np.argmax(value)) if value else 0
    for frame in reversed(range(len(people))):
        chosen.append(people[frame][best] if people[frame] else None)
        if people[frame]:
            best = int(back[frame][best])
    return chosen[::-1]


# ---- Faces --------------------------------------------------------------------------------------

# A face from the front and an open hand, y down, in the orders of `Pose`.
# fmt: off
_HALF_JAW = [(48, -24), (47, -10), (46, 4), (43, 18), (38, 30), (31, 41), (22, 50), (11, 57)]
_BROW = [(43, -32), (37, -37), (29, -40), (20, -40), (11, -38)]
FACE = np.array([
    *[(-x, y) for x, y in _HALF_JAW], (0, 60), *_HALF_JAW[::-1], *[(-x, y) for x, y in _BROW], *_BROW[::-1],
    (0, -25), (0, -16), (0, -8), (0, 0), (-9, 7), (-5, 9), (0, 10), (5, 9), (9, 7),
    (-32, -20), (-27, -23), (-19, -23), (-13, -19), (-19, -17), (-26, -17),
    (13, -19), (19, -23), (27, -23), (32, -20), (26, -17), (19, -17),
    (-18, 27), (-11, 21), (-5, 18), (0, 19), (5, 18), (11, 21), (18, 27), (11, 34), (5, 37),
    (0, 38), (-5, 37), (-11, 34),
    (-15, 27), (-5, 24), (0, 24), (5, 24), (15, 27), (5, 30), (0, 31), (-5, 30), (-22, -20), (22, -20),
], np.float64)
HAND = np.array([
    (0, 0), (20, -15), (36, -30), (46, -44), (54, -57), (20, -50), (24, -70), (26, -82), (28, -93),
    (5, -52), (6, -75), (6, -88), (7, -100), (-9, -49), (-11, -70), (-12, -82), (-13, -93),
    (-21, -44), (-26, -60), (-29, -70), (-31, -79),
], np.float64)
# fmt: on


def springs_between_neighbours(template: np.ndarray, count: int = 5) -> np.ndarray:
    """Pairs (S, 2) of every point of a template with the `count` points nearest to it."""
    distance = np.linalg.norm(template[:, None] - template, axis=2)
    near = distance.argsort(axis=1)[:, 1 : count + 1]
    return np.stack([np.repeat(np.arange(len(template)), count), near.ravel()], axis=1)


FACE_SPRINGS = springs_between_neighbours(FACE)


@dataclass(frozen=True)
class Dots:
    """Discs of one colour, which may lie over each other."""

    centres: np.ndarray  # (N, 2), as far as they can be told apart
    alone: np.ndarray  # (N,): touches no other
    whole: np.ndarray  # (M, 2): all pixels around which a whole disc fits
    radius: float

    def room(self, count: int) -> np.ndarray:
        """How many of `count` points each dot stands for: the more, the more lie in one blot."""
        in_blots = (count - self.alone.sum()) / max((~self.alone).sum(), 1)
        return np.where(self.alone, 1.0, max(in_blots, 1.0))


def find_dots(mask: np.ndarray, radius: float) -> Dots:
    """The discs of a mask (H, W)."""
    y, x = np.nonzero(mask)
    pixels = np.stack([x, y], axis=1).astype(np.float64)
    offsets = disc_offsets(0.9 * radius)  # what is left of discs whose edges are soft
    share = np.zeros(len(y))
    for dx, dy in offsets:
        share += mask[y + dy, x + dx]
    share /= len(offsets)
    whole = pixels[share >= 0.85]
    dots, left = [], whole[np.argsort(-share[share >= 0.85], kind="stable")]
    while len(left):
        near = np.linalg.norm(left - left[0], axis=1) <= max(0.5 * radius, 1.5)
        dots.append(left[near].mean(axis=0))
        left = left[np.linalg.norm(left - dots[-1], axis=1) > max(1.4 * radius, 1.5)]
    centres = np.array(dots).reshape(-1, 2)
    around = np.linalg.norm(centres[:, None] - pixels, axis=2) < 2 * radius + 1
    return Dots(centres, around.sum(axis=1) < 1.5 * len(offsets), whole, radius)


def affine(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Source (K, 2) after the affine map that brings it nearest to target (K, 2): (K, 2).

    Turns, sizes and views from the side of a flat template are affine maps, so what remains between
    the result and the target is how the template bent.
    """
    ones = np.hstack([source, np.ones((len(source), 1))])
    return ones @ np.linalg.lstsq(ones, target, rcond=None)[0]


def match(distance: np.ndarray, room: np.ndarray, temperature: float, far: float) -> np.ndarray:
    """How much each of K points goes with each of N dots, (K, N), from their distances (K, N).

    Soft, but in the end nearly one to one: every point has one dot, dots have as many points as they
    have `room` (N,) for, and what is farther than `far` from everything rather goes with nothing
    (softassign, Gold et al., "New algorithms for 2D and 3D point matching", 1998).
    """
    share = np.exp(-((distance / temperature) ** 2) / 2)
    nothing = np.exp(-((far / temperature) ** 2) / 2)
    for _ in range(8):
        share = share * (room / (share.sum(axis=0) + nothing))
        share = share / (share.sum(axis=1, keepdims=True) + nothing)
    return share


def register(
    template: np.ndarray, springs: np.ndarray, start: np.ndarray, dots: Dots
) -> tuple[np.ndarray, float]:
    """Moves points from `start` (K, 2) onto dots: a springy template that softens step by step.

    Each step pulls points to the dots that they go with, and neighbours, which `springs` (S, 2)
    pair, to where an affine image of the template (K, 2) has them (as in Chui and Rangarajan, "A new
    point matching algorithm for non-rigid registration", 2003): stiff while it is open which dot is
    whose, soft at the end, as faces differ. Returns the points (K, 2) and their misfit.
    """
    points, count, radius = start, len(start), dots.radius
    first, second = springs.T
    reach = 0.08 * np.ptp(start, axis=0).max()
    room = dots.room(count)
    for step in np.linspace(0, 1, 25):
        temperature = max(reach, 1.0) ** (1 - step) * max(0.7 * radius, 0.7) ** step
        stiff = 30.0 ** (1 - step) * 0.3**step
        distance = np.linalg.norm(points[:, None] - dots.centres, axis=2)
        share = match(distance, room, temperature, 4 * temperature)
        matrix, right = np.diag(share.sum(axis=1)), share @ dots.centres
        image = affine(template, points)
        rest = image[second] - image[first]
        for i, j, sign in ((first, second, -1), (second, first, 1)):
            np.add.at(matrix, (i, i), stiff)
            np.add.at(matrix, (i, j), -stiff)
            np.add.at(right, i, stiff * sign * rest)
        points = np.linalg.solve(matrix + 1e-6 * np.eye(count), right + 1e-6 * points)
    distance = np.linalg.norm(points[:, None] - dots.centres, axis=2)
    misfit = distance.min(axis=0).mean() + distance.min(axis=1).mean()
    bent = np.linalg.norm(points - affine(template, points), axis=1).mean()
    return points, misfit + 0.3 * bent


def settle(points: np.ndarray, dots: Dots) -> np.ndarray:
    """Registered points (K, 2) with scores (K, 3): on their dot 1, on a blot of dots `INFERRED`.

    All zeros if the points explain too few of the dots, or the dots too few of the points.
    """
    part = np.zeros((len(points), 3))
    distance = np.linalg.norm(points[:, None] - dots.centres, axis=2)
    nearest = distance.argmin(axis=1)
    mutual = distance.argmin(axis=0)[nearest] == np.arange(len(points))
    exact = mutual & (distance.min(axis=1) < 1.2 * dots.radius)
    part[exact, :2], part[exact, 2] = dots.centres[nearest[exact]], 1
    away = np.linalg.norm(points[:, None] - dots.whole, axis=2).min(axis=1)
    blot = (away < 0.75 * dots.radius + 0.5) & ~exact
    part[blot, :2], part[blot, 2] = points[blot], INFERRED
    explained = (distance.min(axis=0) < 1.5 * dots.radius).mean()
    return part if explained > 0.8 and is_seen(part).mean() > 0.6 else np.zeros_like(part)


def read_face(ink: Ink, body: np.ndarray, radius: float) -> np.ndarray:
    """The face (70, 3) in pixels, or zeros where there is none, or none that looks like one."""
    dots = find_dots(ink.white, 0.75 * radius)  # 3 pixels where discs of joints have 4
    if len(dots.centres) < 20:
        return np.zeros((70, 3))
    low, high = dots.centres.min(axis=0), dots.centres.max(axis=0)
    upright = np.arctan2(*(((low + high) / 2 - body[NECK, :2]) * (1, -1))) if body[NECK, 2] else 0.0
    fits = []
    for tilt in upright + np.radians([-20, 0, 20]):
        turn = np.array([[np.cos(tilt), np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]])
        straight = dots.centres @ turn.T  # as if the head were upright
        low, high = straight.min(axis=0), straight.max(axis=0)
        placed = (FACE - FACE.min(axis=0)) / np.ptp(FACE, axis=0) * (high - low) + low
        fits.append(register(FACE, FACE_SPRINGS, placed @ turn, dots))
    points, _ = min(fits, key=lambda fit: fit[1])
    return settle(points, dots)


def complete_head(body: np.ndarray, face: np.ndarray) -> np.ndarray:
    """The body with nose and eyes, which lie under the dots of the face, inferred from it."""
    body = body.copy()
    for joint, landmarks in ((0, [30]), (14, range(36, 42)), (15, range(42, 48))):
        seen = face[landmarks][is_seen(face[landmarks])]
        if body[joint, 2] < 1 and len(seen) > len(landmarks) / 2:
            body[joint] = *seen[:, :2].mean(axis=0), INFERRED
    return body


# ---- Hands --------------------------------------------------------------------------------------

# Bone k of the 20 runs from joint FROM[k] to joint TO[k] and has its own hue. The bones of the palm
# (0, 4, 8, 12, 16) are long enough to show between the discs of nearly every hand, so they tell the
# fingers apart; beyond them mostly a blue blot of discs is left. So a hand is fitted as a whole: of
# the shapes that hands have, the one whose discs make this blot and whose bones have these colours.
FROM, TO = np.array(HAND_EDGES).T


@lru_cache
def hand_prior() -> np.ndarray:
    """How hands look: the precision matrix (21, 21) of a Gaussian over one coordinate of all joints.

    From random bends and spreads of `HAND` in three dimensions, seen from anywhere, in units of its
    length: x and y are two projections of the same, so one matrix serves for both, for left and right
    and for any direction. Places are free: only differences of joints count.
    """
    rng = np.random.default_rng(0)
    count = 4000
    bones = (HAND[TO] - HAND[FROM]).reshape(5, 4, 2) / 100
    length, angle = np.linalg.norm(bones, axis=2), np.arctan2(bones[..., 0], -bones[..., 1])
    fist = rng.uniform(-0.1, 1, (count, 1)).clip(0)
    curl = (fist + rng.normal(0, 0.2, (count, 5))).clip(-0.1, 1.1)[..., None]  # of each finger
    fan = rng.normal(0, 0.08, (count, 1, 1)) * (np.arange(5)[:, None] - 2.5)
    spread = angle + (fan + rng.normal(0, 0.1, (count, 5, 1))) * (0, 1, 1, 1)
    flexed = curl * (0, 1.3, 1.6, 0.9) * rng.uniform(0.5, 1, (count, 5, 4))
    flexed[..., 0] += rng.normal(0, 0.1, (count, 5))
    thumb_aside = rng.normal(0, 0.25, (count, 1)) - 0.3 * curl[:, 0] * (0, 1, 1, 1)
    spread[:, 0] += thumb_aside
    flexed[:, 0] = curl[:, 0] * (0, 0.4, 0.5, 0.7)
    flexed[:, 0, 0] = rng.uniform(0, 0.9, count)
    flexed = flexed.cumsum(axis=2)
    along = [np.sin(spread) * np.cos(flexed), -np.cos(spread) * np.cos(flexed), np.sin(flexed)]
    steps = np.stack(along) * length * rng.normal(1, 0.1, (count, 5, 1))
    joints = steps.cumsum(axis=3).reshape(3 * count, 20)
    covariance = joints.T @ joints / len(joints) + 0.02**2 * np.eye(20)  # detectors are not exact
    from_wrist = np.hstack([-np.ones((20, 1)), np.eye(20)])
    return from_wrist.T @ np.linalg.inv(covariance) @ from_wrist


@dataclass(frozen=True)
class HandInk:
    """What is drawn of one hand, in pixels of the padded frame."""

    blue: np.ndarray  # (N, 2): pixels of discs
    whole: np.ndarray  # (M, 2): those around which a whole disc fits, where joints may be
    bones: np.ndarray  # (P, 2): pixels of bones
    labels: np.ndarray  # (P,): which of the 20 bones each shows
    root: np.ndarray  # (2,): of `whole`, the nearest to the body's wrist


def find_hand(ink: Ink, body: np.ndarray, own: int, opposite: int, radius: float) -> HandInk | None:
    """What hangs together around a body's `own` wrist and is not nearer to the `opposite` one."""
    if not body[own, 2]:
        return None
    wrist = body[own, :2]
    other = body[opposite, :2] if body[opposite, 2] else np.full(2, np.inf)
    reach = 0.35 * np.ptp(body[is_seen(body), :2], axis=0).max()
    low = np.maximum(np.floor(wrist - reach), 0).astype(int)
    high = np.ceil(wrist + reach).astype(int) + 1

    def near(mask: np.ndarray, body_discs: np.ndarray) -> np.ndarray:
        """Pixels (N, 2) of a mask, without discs of the body, which have the same colours."""
        y, x = np.nonzero(mask[low[1] : high[1], low[0] : high[0]])
        points = np.stack([x, y], axis=1) + low
        distance = np.linalg.norm(points - wrist, axis=1)
        mine = (distance < reach) & (distance < np.linalg.norm(points - other, axis=1))
        from_discs = np.linalg.norm(points[:, None] - body_discs, axis=2)
        return points[mine & (from_discs > 1.3 * radius).all(axis=1)]

    seen, is_blue = is_seen(body), ink.joint == LEFT_KNEE
    blue = near(is_blue, body[seen & (np.arange(18) != own), :2])
    bones = near((ink.bone >= 0) & ~is_blue, body[seen, :2])
    mask = np.zeros_like(ink.black)
    mask[blue[:, 1], blue[:, 0]] = True
    x, y = np.moveaxis(blue[:, None] + disc_offsets(0.9 * radius), -1, 0)
    whole = blue[mask[y, x].mean(axis=1) >= 0.85]  # video softens the edges
    if not len(whole):
        return None

    # What hangs together, in cells as large as the gaps that white dots and limbs may leave.
    pixels = np.concatenate([whole, blue, bones])
    x, y = (pixels // (1.5 * radius)).astype(int).T + 1
    cells = np.full((y.max() + 2, x.max() + 2), -1)
    cells[y, x] = 0
    places, labels = label_components(cells)
    cells[places[:, 1], places[:, 0]] = labels
    nearest = np.linalg.norm(whole - wrist, axis=1).argmin()
    together = cells[y, x] == cells[y[nearest], x[nearest]]
    in_whole, in_blue, in_bones = np.split(together, np.cumsum([len(whole), len(blue)]))
    bones = bones[in_bones]
    labels = ink.bone[bones[:, 1], bones[:, 0]].astype(int)
    return HandInk(blue[in_blue], whole[in_whole], bones, labels, whole[nearest].astype(float))


def start_hand(hand: HandInk, root: np.ndarray, size: float, stretch: float, radius: float):
    """A first guess (21, 2): the palm's bones reach as far as they are seen, fingers as they do on
    average, but longer by the factor `stretch`."""
    matrix, right = hand_prior() / size**2, np.zeros((21, 2))
    matrix[0, 0] += 1
    right[0] = root
    for base in range(0, 20, 4):
        pixels = hand.bones[hand.labels == base]
        if len(pixels) >= 3:
            distance = np.linalg.norm(pixels - root, axis=1)
            far = pixels[distance >= np.quantile(distance, 0.8)].mean(axis=0)
            along = (far - root) / max(np.linalg.norm(far - root), 1.0)
            matrix[TO[base], TO[base]] += 0.1
            right[TO[base]] = 0.1 * (far + radius * along)
    points = np.linalg.solve(matrix, right)
    fingers = points[1:].reshape(5, 4, 2)
    fingers[:, 1:] = fingers[:, :1] + stretch * (fingers[:, 1:] - fingers[:, :1])
    return points


def project_on_bones(points: np.ndarray, hand: HandInk) -> tuple[np.ndarray, np.ndarray]:
    """For each pixel of a bone (P,): how far along that bone of `points` (21, 2) it lies, from 0 to 1,
    and how far from it in pixels."""
    start, along = points[FROM[hand.labels]], (points[TO] - points[FROM])[hand.labels]
    way = ((hand.bones - start) * along).sum(axis=1) / (along**2).sum(axis=1).clip(1)
    way = way.clip(0, 1)
    return way, np.linalg.norm(start + way[:, None] * along - hand.bones, axis=1)


def fit_hand(points: np.ndarray, hand: HandInk, root: np.ndarray, size: float, radius: float):
    """Moves the joints `points` (21, 2) to where they explain what is drawn.

    Least squares, again and again: `hand_prior` holds the shape, pixels of bones pull their bone,
    blue pixels that no disc covers pull the nearest one over them, and discs that are not in the blue
    are pulled there. What is far away pulls less; step by step near things count more and the shape
    less (as in robust point matching, Chui and Rangarajan, 2003).
    """
    a, b, each = FROM[hand.labels], TO[hand.labels], np.arange(21)
    blue = hand.blue[:: max(1, len(hand.blue) // 200)]
    whole = hand.whole[:: max(1, len(hand.whole) // 200)]
    for step in np.linspace(0, 1, 24):
        far = max(0.25 * size, 3.0) ** (1 - step)  # in pixels
        matrix, right = hand_prior() / size**2 * 4 ** (1 - step), np.zeros((21, 2))
        matrix[0, 0] += 0.05
        right[0] += 0.05 * root

        way, away = project_on_bones(points, hand)
        weight = 0.3 / (1 + (away / (2 * far + 2)) ** 2) ** 2
        for i, share in ((a, 1 - way), (b, way)):
            np.add.at(right, i, (weight * share)[:, None] * hand.bones)
            for j, other_share in ((a, 1 - way), (b, way)):
                np.add.at(matrix, (i, j), weight * share * other_share)

        offsets = points[:, None] - blue
        distance = np.linalg.norm(offsets, axis=2)
        nearest, distance = distance.argmin(axis=0), distance.min(axis=0)
        bare = np.flatnonzero(distance > radius)
        nearest, distance = nearest[bare], distance[bare]
        weight = 0.1 / (1 + (distance / (4 * far + 3 * radius)) ** 2)
        target = blue[bare] + radius * offsets[nearest, bare] / distance[:, None]
        np.add.at(matrix, (nearest, nearest), weight)
        np.add.at(right, nearest, weight[:, None] * target)

        distance = np.linalg.norm(points[:, None] - whole, axis=2)
        nearest, distance = distance.argmin(axis=1), distance.min(axis=1)
        weight = 0.5 / (1 + (distance / (3 * far + radius)) ** 2) * (distance > 0.5)
        matrix[each, each] += weight
        right += weight[:, None] * whole[nearest]
        points = np.linalg.solve(matrix, right)
    return points


def judge_hand(
    points: np.ndarray, hand: HandInk, black: np.ndarray, size: float, radius: float
) -> tuple[float, np.ndarray]:
    """The misfit of a hand (21, 2), 0 being best, and which joints are confirmed (21,).

    The misfit sums the shares of what is not explained: blue that no disc covers, pixels beside their
    bone, joints outside the blue, bones over black; and how unlike a hand it is. A finger is confirmed
    if pixels of its bones are seen, most of them where it is, and its joints and bones are on ink:
    a joint taken for another finger's does more harm than a missing one.
    """
    bare = np.linalg.norm(points[:, None] - hand.blue, axis=2).min(axis=0) > radius + 0.7
    beside = project_on_bones(points, hand)[1] > 2 + 0.25 * radius
    outside = np.linalg.norm(points[:, None] - hand.whole, axis=2).min(axis=1) > 1 + 0.25 * radius
    x, y = np.rint(np.linspace(points[FROM], points[TO], 9)).astype(int).T
    empty = black[y.clip(0, black.shape[0] - 1), x.clip(0, black.shape[1] - 1)].mean(axis=1)  # (20,)
    unlike = np.einsum("id,ij,jd->", points, hand_prior(), points) / (40 * size**2)
    misfit = bare.mean() + beside.mean() + outside.mean() + empty.mean() + 0.02 * unlike

    shown = np.bincount(hand.labels // 4, minlength=5)
    hit = np.bincount(hand.labels // 4, weights=~beside, minlength=5)
    finger = (shown >= 3) & (hit >= 0.8 * shown) & (empty.reshape(5, 4).mean(axis=1) < 0.15)
    return misfit, np.append(finger.any(), np.repeat(finger, 4)) & ~outside


def read_hand(ink: Ink, body: np.ndarray, own: int, opposite: int, radius: float) -> np.ndarray:
    """The hand (21, 3) in pixels at a body's `own` wrist, or zeros.

    Joints have the score 1 where the whole hand explains what is drawn, else `INFERRED`.
    """
    hand = find_hand(ink, body, own, opposite, radius)
    shown = np.bincount(hand.labels, minlength=20)[::4] >= 3 if hand else np.zeros(5, bool)
    if shown.sum() < 2 or len(hand.blue) < 2 * radius**2:
        return np.zeros((21, 3))
    # The wrist is where the bones of the palm meet, if it is not the disc nearest to the body's.
    across, right = 1e-3 * np.eye(2), 1e-3 * hand.root
    for base in np.flatnonzero(shown):
        pixels = hand.bones[hand.labels == 4 * base]
        centre = np.median(pixels, axis=0)
        normal = np.linalg.eigh((pixels - centre).T @ (pixels - centre))[1][:, 0]
        across += len(pixels) * np.outer(normal, normal)
        right += len(pixels) * normal * (normal @ centre)
    across, right = (
        across + 0.02 * np.trace(across) * np.eye(2),
        right + 0.02 * np.trace(across) * hand.root,
    )
    meeting = np.linalg.solve(across, right)
    meeting = hand.whole[np.linalg.norm(hand.whole - meeting, axis=1).argmin()].astype(float)
    roots = [hand.root, meeting][: 2 if np.linalg.norm(meeting - hand.root) > 0.5 * radius else 1]

    best, misfit, confirmed = np.zeros((21, 2)), np.inf, np.zeros(21, bool)
    for root, stretch in itertools.product(roots, (1.0, 0.7, 1.3)):
        if misfit < 0.1:
            break
        distance = np.linalg.norm(np.concatenate([hand.blue, hand.bones]) - root, axis=1)
        size = max(np.quantile(distance, 0.98), 1.0)
        points = start_hand(hand, root, size, stretch, radius)
        points = fit_hand(points, hand, root, size, radius)
        judged = judge_hand(points, hand, ink.black, size, radius)
        if judged[0] < misfit:
            best, (misfit, confirmed) = points, judged
    score = 1.0 if misfit < 0.1 else INFERRED if misfit < 0.15 else 0.0  # beyond: wrong fingers
    part = np.hstack([best, np.full((21, 1), score)])
    return part * (confirmed & (score > 0))[:, None]


# ---- Clips --------------------------------------------------------------------------------------


def drawing_radii(height: int, width: int) -> list[float]:
    """What the radius of joints' discs, and half the width of limbs, may be.

    `poses.pose.draw_pose` scales it on large canvases, the public annotators do not.
    """
    scaled = 4 * min(max(1.0, min(height, width) / 512), max(height, width) / 512)
    return [scaled, 4.0] if scaled > 4 else [scaled]


def some(frames: np.ndarray) -> np.ndarray:
    """Up to 8 of the frames, evenly spaced."""
    return frames[np.linspace(0, len(frames) - 1, min(len(frames), 8)).astype(int)]


def margin_for(radius: float) -> int:
    return int(5 * radius) + 2


def read_bodies(ink: Ink, radius: float) -> list[np.ndarray]:
    """The people of one frame, as bodies (18, 3) in pixels of the padded frame."""
    joints = Joints(find_discs(ink, radius, 0.6))
    links = join(ink, find_limbs(ink, radius), joints, radius)
    bodies = assemble(ink, links, joints, radius)
    return [body for body in bodies if is_seen(body).sum() >= 3]


def is_drawn(frames: np.ndarray) -> bool:
    """Whether a clip, uint8 RGB (F, H, W, 3), shows drawn skeletons on black and nothing else.

    True when black covers most of the frames, the rest is in the drawing's few colours and
    brightnesses, and skeletons can be made out in it. A clip without a drawn person is not drawn.
    """
    radii = drawing_radii(*frames.shape[1:3])
    drawn = inked = 0
    for frame in some(frames):
        bright = frame.max(axis=2) > 48
        if not bright.any():
            continue
        inked += 1
        if bright.mean() > 0.35:
            continue
        ink = read_ink(frame, margin_for(max(radii)))
        in_colour = (ink.joint >= 0) | (ink.limb >= 0) | ink.white
        if in_colour.sum() < 0.75 * bright.sum() or (ink.limb >= 0).sum() < 0.2 * bright.sum():
            continue
        bodies = (body for radius in radii for body in read_bodies(ink, radius))
        drawn += any((body[:, 2] == 1).sum() >= 4 for body in bodies)
    return drawn > 0.5 * inked


def read_drawn(frames: np.ndarray) -> list[Pose]:
    """The pose of the main person in every frame of a drawn clip, uint8 RGB (F, H, W, 3).

    Of several people the one who is large throughout the clip is followed. Keypoints whose mark is
    seen have the score 1, those that only what is around them tells have `INFERRED`; what cannot be
    told is missing. A frame without at least three body keypoints gives an empty Pose.
    """

    def keypoints(radius: float) -> int:
        poses = read_with(some(frames), radius)
        return sum(is_seen(part).sum() for pose in poses for part in vars(pose).values())

    radii = drawing_radii(*frames.shape[1:3])
    return read_with(frames, max(radii, key=keypoints) if len(radii) > 1 else radii[0])


def read_with(frames: np.ndarray, radius: float) -> list[Pose]:
    """`read_drawn` where the radius is known."""
    height, width = frames.shape[1:3]
    margin = margin_for(radius)
    people = [read_bodies(read_ink(frame, margin), radius) for frame in frames]
    poses = []
    for frame, body in zip(frames, choose_person(people)):
        if body is None:
            poses.append(Pose())
            continue
        ink = read_ink(frame, margin)
        face = read_face(ink, body, radius)
        body = complete_head(body, face)
        hands = [read_hand(ink, body, *wrists, radius) for wrists in ((7, 4), (4, 7))]
        parts = []
        for part in (body, face, *hands):
            # a pixel's centre is half a pixel from its corner
            placed = (part + (0.5 - margin, 0.5 - margin, 0)) / (width, height, 1)
            parts.append(np.where(is_seen(part)[:, None], placed, 0).astype(np.float32))
        poses.append(Pose(*parts))
    return poses
