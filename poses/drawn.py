"""Poses from drawn skeletons: videos that show OpenPose's or DWPose's drawing and nothing else.

Colours say which joint a disc is and which limb an ellipse; bodies are put together from those. A face is 70 white
dots, a hand 21 blue ones and bones in 20 colours: a springy template is moved onto them.
"""

from contextlib import suppress
from pathlib import Path

import numpy as np

from poses.ink import BLACK, Ink, label_components, read_ink
from poses.people import extent
from poses.pose import HAND_EDGES, LIMBS, Pose, is_seen, place_pose

INFERRED = 0.5  # score of keypoints whose own mark is covered, where the marks around tell where
NECK, EARS = 1, (16, 17)
LEFT_KNEE = 12  # its disc is as blue as the joints of hands

# Pictures that are no drawings could keep the search busy for ever. Twenty people have less of everything.
MOST_COVERED = 0.5  # of the frame, by something else than black
MOST_LOOKUPS = 100_000_000  # of pixels around those of one colour, which are seconds
MOST_MARKS, MOST_GROUPS, MOST_PEOPLE = 1000, 200, 50


class Crowded(ValueError):
    """More marks than a drawing has."""

    def __init__(self, what: str):
        super().__init__(f"{what} in one frame, more than drawn skeletons have")


# ---- Discs and limbs ----------------------------------------------------------------------------


def disc_shares(classes: np.ndarray, pixels: np.ndarray, radius: float) -> np.ndarray:
    """Which share of the disc around each of the pixels (N, 2) has the pixel's class: (N,)."""
    reach = np.arange(-int(radius), int(radius) + 1)
    offsets = reach[np.argwhere(np.hypot(reach, reach[:, None]) <= radius)]
    flat, width = classes.ravel(), classes.shape[1]
    if len(pixels) * len(offsets) > MOST_LOOKUPS:
        raise Crowded(f"{len(pixels)} pixels of one colour")
    at = pixels @ (1, width)
    own = flat[at]
    return sum(flat[at + dy * width + dx] == own for dy, dx in offsets) / len(offsets)


def pick_spots(pixels: np.ndarray, shares: np.ndarray, least: float, near: float, gap: float) -> np.ndarray:
    """Rows (x, y, share): centres of the pixels (N, 2) near those of the highest shares, which lie apart."""
    candidates, shares = pixels[shares >= least], shares[shares >= least]
    spots = []

    def around(points: np.ndarray, centre: np.ndarray, reach: float) -> tuple[slice, np.ndarray]:
        """Which points lie around a centre: a range of rows, as they come row by row, and distances in there."""
        rows = slice(*np.searchsorted(points[:, 1], (centre[1] - reach - 1, centre[1] + reach + 1)))
        return rows, np.linalg.norm(points[rows] - centre, axis=1)

    while len(candidates) and shares[best := shares.argmax()] >= 0:
        if len(spots) == MOST_MARKS:
            raise Crowded(f"over {MOST_MARKS} discs of one colour")
        rows, distance = around(pixels, candidates[best], near)
        centre = pixels[rows][distance <= near].mean(axis=0)
        spots.append((*centre, shares[best]))
        rows, distance = around(candidates, centre, gap)
        shares[rows][distance <= gap] = -1
        shares[best] = -1
    return np.array(spots).reshape(-1, 3)


def find_discs(ink: Ink) -> list[np.ndarray]:
    """Discs by class, of 0 to 17: rows (x, y, share of the disc that is seen)."""
    found = []
    for index in range(18):
        pixels, least = np.argwhere(ink.joint == index)[:, ::-1], 0.4 if index in EARS else 0.6
        shares = disc_shares(
            ink.joint, pixels, ink.radius
        )  # low for ears, which lie under the dots of the jaw
        found.append(pick_spots(pixels, shares, least, ink.radius + 0.5, 1.5 * ink.radius))
    return found


def find_limbs(ink: Ink) -> list[tuple[int, np.ndarray]]:
    """What is seen of limbs, the longest first: which limb, and its ends (2, 2), in either order."""
    pixels, labels = label_components(ink.limb)
    order, counts = np.argsort(labels, kind="stable"), np.bincount(labels)
    pieces = np.flatnonzero(counts >= max(4, 0.5 * ink.radius**2))
    if len(pieces) > MOST_MARKS:
        raise Crowded(f"{len(pieces)} pieces of limbs")
    limbs = []
    for end in counts.cumsum()[pieces]:
        label = labels[order[end - 1]]
        piece = pixels[order[end - counts[label] : end]]
        centre = piece.mean(axis=0)
        axis = np.linalg.eigh((piece - centre).T @ (piece - centre))[1][:, 1]
        along = (piece - centre) @ axis
        ends = centre + np.outer([along.min(), along.max()], axis)
        limbs.append((ink.limb[piece[0, 1], piece[0, 0]], ends))
    return sorted(limbs, key=lambda limb: -np.linalg.norm(np.diff(limb[1], axis=0)))


def in_direction(points: np.ndarray, start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far points (N, 2) lie from `start` towards `end`, and how far beside that line."""
    x, y = (end - start) / max(np.linalg.norm(end - start), 1e-6)
    return (points - start) @ (x, y), (points - start) @ (-y, x)


def is_covered(ink: Ink, start: np.ndarray, end: np.ndarray) -> bool:
    """Whether something is drawn (nearly) all the way between two points."""
    steps = int(np.ceil(np.linalg.norm(end - start))) + 1
    x, y = np.rint(np.linspace(start, end, steps)).astype(int).T
    return ink.black[y, x].mean() <= 0.15


def extend_limb(ink: Ink, index: int, fixed: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Where a limb ends whose one end is `fixed` and whose other is covered, and `seen` as far as it is.

    Of ellipses of its width that reach on, the one that covers most of the limb's pixels and fewest black ones.
    """
    length = max(np.linalg.norm(seen - fixed), 1.0)
    low = np.floor(np.minimum(fixed, seen) - 4 * ink.radius).astype(int).clip(0)
    high = np.ceil(np.maximum(fixed, seen) + 4 * ink.radius).astype(int) + 1
    box = slice(low[1], high[1]), slice(low[0], high[0])
    worth = (ink.limb[box] == index) - 1.0 * ink.black[box]
    y, x = np.nonzero(worth)
    along, aside = in_direction(np.stack([x, y], axis=1) + low, fixed, seen)
    worth, reach = worth[y, x] * (along >= 0), np.arange(-0.5, 3, 0.125) * ink.radius
    half = (length + reach)[:, None] / 2
    values = (((along - half) / half.clip(0.5)) ** 2 + (aside / ink.radius) ** 2 < 1) @ worth
    reach = reach[values >= values.max() - 0.5].mean()
    return fixed + (seen - fixed) * (1 + reach / length)


# ---- People -------------------------------------------------------------------------------------


def nearest(ink: Ink, places: list[np.ndarray], start: np.ndarray, end: np.ndarray) -> tuple:
    """Which of the places (x, y, score) a limb from `start` towards `end` leads to, and its distance; or None."""
    points, radius = np.reshape(places, (-1, 3))[:, :2], ink.radius
    ahead, aside = in_direction(points, start, end)
    ahead -= np.linalg.norm(end - start)
    distance = np.hypot(ahead, aside)
    fits = (ahead > -1.5 * radius - 1) & (np.abs(aside) < 0.7 * radius + 1 + 0.1 * ahead.clip(0))
    leads = (i for i in np.argsort(distance) if fits[i] and is_covered(ink, end, points[i]))
    return next(((int(i), distance[i]) for i in leads), (None, 3 * radius))


def join(ink: Ink, joints: list[list[np.ndarray]]) -> list[tuple]:
    """Which joints (x, y, score) each limb joins: pairs of (keypoint, which of its joints).

    Where a limb leads to none because its end is covered, a joint is inferred and added.
    """
    links = []
    for limb, ends in find_limbs(ink):
        pair, ways = LIMBS[limb].tolist(), []
        for start, end in (ends, ends[::-1]):
            a, cost_a = nearest(ink, joints[pair[0]], end, start)
            b, cost_b = nearest(ink, joints[pair[1]], start, end)
            ways.append((cost_a + cost_b, [a, b], [start, end]))
        _, at, ends = min(ways, key=lambda way: way[0])
        if at == [None, None] and np.linalg.norm(ends[1] - ends[0]) < 3 * ink.radius:
            continue
        for this, other in ((0, 1), (1, 0)):
            if at[this] is None:
                fixed = ends[other] if at[other] is None else joints[pair[other]][at[other]][:2]
                at[this] = len(joints[pair[this]])
                joints[pair[this]].append(np.append(extend_limb(ink, limb, fixed, ends[this]), INFERRED))
        links.append(tuple(zip(pair, at)))
    return links


def read_bodies(ink: Ink) -> list[np.ndarray]:
    """The people of one frame: bodies (18, 3) in pixels of the padded frame, the one with the most joints first.

    Joints that limbs join belong together; so do pieces that may be joined where something is drawn over it.
    """
    discs = find_discs(ink)
    joints = [[np.array([x, y, 1.0]) for x, y, _ in of_class] for of_class in discs]
    groups: list[set] = []
    for link in join(ink, joints):
        touched = [group for group in groups if group & set(link)]
        groups = [group for group in groups if group not in touched] + [set(link).union(*touched)]
    linked = set().union(*groups)
    for joint in set(range(18)) - {LEFT_KNEE}:
        clear = np.flatnonzero(discs[joint][:, 2] > (0.4 if joint in EARS else 0.75))
        groups += [{(joint, i)} for i in clear.tolist() if (joint, i) not in linked]

    if len(groups) > MOST_GROUPS:
        raise Crowded(f"{len(groups)} parts of skeletons that do not touch")

    bodies: list[np.ndarray] = []
    for group in sorted(groups, key=len, reverse=True):
        piece = np.zeros((18, 3))
        for joint, index in group:
            if joints[joint][index][2] > piece[joint, 2]:
                piece[joint] = joints[joint][index]
        for body in bodies:
            if belongs(ink, piece, body):
                body += piece
                break
        else:
            bodies.append(piece)
    bodies = [body for body in bodies if is_seen(body).sum() >= 3]
    if len(bodies) > MOST_PEOPLE:
        raise Crowded(f"{len(bodies)} people")
    return bodies


def belongs(ink: Ink, piece: np.ndarray, body: np.ndarray) -> bool:
    """Whether a piece of a skeleton completes a body: both (18, 3) in pixels."""
    # Without a disc, the piece may be the ends of some stripe that happens to have a limb's colour.
    if (is_seen(piece) & is_seen(body)).any() or not (piece[:, 2] == 1).any():
        return False
    distance = np.linalg.norm(piece[is_seen(piece), None, :2] - body[is_seen(body), :2], axis=2).min()
    if distance > 0.5 * extent(body) + 2 * ink.radius:
        return False
    joined = [(piece[a], body[b]) for a, b in (*LIMBS, *LIMBS[:, ::-1]) if piece[a, 2] and body[b, 2]]
    return all(is_covered(ink, a[:2], b[:2]) for a, b in joined)


def choose_person(people: list[list[np.ndarray]]) -> list[np.ndarray]:
    """One body (18, 3) per frame, zeros for nobody: the sequence that is large and leaps least (Viterbi's way)."""
    largest = max((extent(body) for bodies in people for body in bodies), default=1.0)

    def worth(body: np.ndarray, path: list) -> float:
        old = next((old for old in reversed(path) if old.any()), body)
        both = is_seen(body) & is_seen(old)
        leap = np.linalg.norm((body - old)[both, :2], axis=1).mean() if both.any() else largest
        return extent(body) / largest - min(2 * leap / largest, 1.0)

    paths: list[tuple] = [(0.0, [])]  # the best sequence that ends in each of the last frame's bodies
    for bodies in people:
        ways = [[(value + worth(body, path), path) for value, path in paths] for body in bodies]
        best = [max(way, key=lambda path: path[0]) for way in ways]
        best = [(value, [*path, body]) for (value, path), body in zip(best, bodies)]
        paths = best or [(value, [*path, np.zeros((18, 3))]) for value, path in paths]
    return max(paths, key=lambda path: path[0])[1]


# ---- Faces and hands ----------------------------------------------------------------------------

# A face from the front and an open hand, y down, in the orders of `Pose`.
# fmt: off
_JAW = [(48, -24), (47, -10), (46, 4), (43, 18), (38, 30), (31, 41), (22, 50), (11, 57)]
_BROW = [(43, -32), (37, -37), (29, -40), (20, -40), (11, -38)]
FACE = np.array([
    *[(-x, y) for x, y in _JAW], (0, 60), *_JAW[::-1], *[(-x, y) for x, y in _BROW], *_BROW[::-1],
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
FROM, TO = np.array(HAND_EDGES).T  # bone k of the 20 joins FROM[k] and TO[k] and has its own hue


def stiffness(template: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The matrix (K, K) of springs that pair points of a template (K, 2): points x cost x.T @ matrix @ x.

    Affine images of the template, as turns, sizes and views from the side are, cost nothing; bending it does.
    """
    flat = np.hstack([template, np.ones((len(template), 1))])
    bend = np.eye(len(template)) - flat @ np.linalg.pinv(flat)
    stretch = bend[second] - bend[first]
    return stretch.T @ stretch


_NEAREST = np.linalg.norm(FACE[:, None] - FACE, axis=2).argsort(axis=1)[:, 1:6]
FACE_SPRINGS = stiffness(FACE, np.arange(70).repeat(5), _NEAREST.ravel())
HAND_SPRINGS = stiffness(HAND, FROM, TO)


def find_dots(mask: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """The centres (N, 2) of a mask's discs, which may overlap, and all pixels (M, 2) around which a disc fits."""
    pixels = np.argwhere(mask)[:, ::-1]
    shares = disc_shares(mask, pixels, 0.9 * radius)  # what is left of discs whose edges are soft
    spots = pick_spots(pixels, shares, 0.85, max(0.5 * radius, 1.5), max(1.4 * radius, 1.5))
    return spots[:, :2], pixels[shares >= 0.85]


def on_bones(points: np.ndarray, pixels: np.ndarray, bones: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where pixels (P, 2) lie on their bones (P,): weights (P, 21) of `points` (21, 2), and how far beside."""
    start, end, each = points[FROM[bones]], points[TO[bones]], np.arange(len(bones))
    way = ((pixels - start) * (end - start)).sum(axis=1) / ((end - start) ** 2).sum(axis=1).clip(1)
    weights = np.zeros((len(bones), 21))
    weights[each, FROM[bones]], weights[each, TO[bones]] = 1 - way.clip(0, 1), way.clip(0, 1)
    return weights, np.linalg.norm(weights @ points - pixels, axis=1)


def register(
    springs: np.ndarray, start: np.ndarray, dots: np.ndarray, radius: float, bones: tuple = ()
) -> np.ndarray:
    """Moves points from `start` (K, 2) onto dots (N, 2), and `bones` over their pixels (P, 2) with labels (P,).

    The `springs` (K, K) between the points are stiff while it is open which dot is whose, and soft at the end
    (Chui and Rangarajan, "A new point matching algorithm for non-rigid registration", 2003).
    """
    points, identity = start, 1e-6 * np.eye(len(start))
    reach = max(0.08 * np.ptp(start, axis=0).max(), 1.0)
    for step in np.linspace(0, 1, 25):
        near = reach ** (1 - step) * max(0.7 * radius, 0.7) ** step  # in pixels
        distance = np.linalg.norm(points[:, None] - dots, axis=2)
        share = np.exp(-((distance / near) ** 2) / 2)  # (K, N): how much each point goes with each dot
        for _ in range(3):  # nearly one to one; what is far from everything rather goes with nothing
            share = share / (share.sum(axis=0) + np.exp(-8))
            share = share / (share.sum(axis=1, keepdims=True) + np.exp(-8))
        matrix = np.diag(share.sum(axis=1)) + 7.5 ** (1 - step) * 0.075**step * springs + identity
        right = share @ dots + identity @ points
        if bones:
            weights, away = on_bones(points, *bones)
            pull = 0.3 / (1 + (away / (2 * near + 2)) ** 2)[:, None] ** 2
            matrix += weights.T @ (pull * weights)
            right += weights.T @ (pull * bones[0])
        points = np.linalg.solve(matrix, right)
    return points


def settle(points: np.ndarray, dots: np.ndarray, whole: np.ndarray, radius: float) -> np.ndarray:
    """Registered points (K, 2) with scores (K, 3): on their dot 1, on a blot of dots `INFERRED`.

    All zeros if the points explain too few of the dots, or the dots too few of the points.
    """
    distance = np.linalg.norm(points[:, None] - dots, axis=2)
    nearest = distance.argmin(axis=1)
    mutual = distance.argmin(axis=0)[nearest] == np.arange(len(points))
    exact = (mutual & (distance.min(axis=1) < 1.2 * radius))[:, None]
    blot = np.linalg.norm(points[:, None] - whole, axis=2).min(axis=1, keepdims=True) < 0.75 * radius + 0.5
    part = np.where(
        exact,
        np.pad(dots[nearest], ((0, 0), (0, 1)), constant_values=1),
        blot * np.pad(points, ((0, 0), (0, 1)), constant_values=INFERRED),
    )
    explained = (distance.min(axis=0) < 1.5 * radius).mean()
    return part if explained > 0.8 and is_seen(part).mean() > 0.6 else np.zeros_like(part)


def read_face(ink: Ink, body: np.ndarray) -> np.ndarray:
    """The face (70, 3) in pixels, or zeros where there is none, or none that looks like one."""
    radius = 0.75 * ink.radius  # 3 pixels where discs of joints have 4
    dots, whole = find_dots(ink.white, radius)
    if len(dots) < 20:
        return np.zeros((70, 3))
    tilt = np.arctan2(*((dots.mean(axis=0) - body[NECK, :2]) * (1, -1))) if body[NECK, 2] else 0.0
    turn = np.array([[np.cos(tilt), np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]])
    straight = dots @ turn.T  # as if the head were upright
    low, high = straight.min(axis=0), straight.max(axis=0)
    placed = (FACE - FACE.min(axis=0)) / np.ptp(FACE, axis=0) * (high - low) + low
    return settle(register(FACE_SPRINGS, placed @ turn, dots, radius), dots, whole, radius)


def complete_head(body: np.ndarray, face: np.ndarray) -> np.ndarray:
    """The body with nose and eyes, which lie under the dots of the face, inferred from it."""
    body = body.copy()
    for joint, landmarks in ((0, [30]), (14, range(36, 42)), (15, range(42, 48))):
        seen = face[landmarks][is_seen(face[landmarks])]
        if body[joint, 2] < 1 and len(seen) > len(landmarks) / 2:
            body[joint] = *seen[:, :2].mean(axis=0), INFERRED
    return body


def read_hand(ink: Ink, body: np.ndarray, own: int, opposite: int) -> np.ndarray:
    """The hand (21, 3) in pixels at a body's `own` wrist, or zeros where its bones cannot be told apart.

    A finger counts if pixels of its bones are seen, and most of them where it is.
    """
    places = np.where(is_seen(body)[:, None], body[:, :2], np.inf)
    wrist, other = places[[own, opposite]]

    def near(mask: np.ndarray, discs: np.ndarray) -> np.ndarray:
        """Pixels (N, 2) of a mask that are the hand's, without discs of the body, which have the same colours."""
        points = np.argwhere(mask)[:, ::-1]
        distance, elsewhere = (np.linalg.norm(points - place, axis=1) for place in (wrist, other))
        points = points[(distance < 0.35 * extent(body)) & (distance < elsewhere)]
        return points[(np.linalg.norm(points[:, None] - discs, axis=2) > 1.3 * ink.radius).all(axis=1)]

    is_blue, mask = ink.joint == LEFT_KNEE, np.zeros_like(ink.black)
    x, y = near(is_blue, np.delete(places, own, axis=0)).T
    mask[y, x] = True
    dots, whole = find_dots(mask, ink.radius)
    pixels = near((ink.bone >= 0) & ~is_blue, places)
    labels = ink.bone[pixels[:, 1], pixels[:, 0]]
    shown = np.bincount(labels, minlength=20)
    if (shown[::4] >= 3).sum() < 2 or len(dots) < 3:
        return np.zeros((21, 3))
    # To begin with, the middle of what is seen of each bone is the middle of that bone.
    middles = [np.median(pixels[labels == bone], axis=0) for bone in np.flatnonzero(shown >= 3)]
    root = whole[np.linalg.norm(whole - wrist, axis=1).argmin()]
    weights = np.vstack([(np.eye(21)[FROM] + np.eye(21)[TO])[shown >= 3] / 2, np.eye(21)[:1]])
    matrix = weights.T @ weights + 10 * HAND_SPRINGS + 1e-6 * np.eye(21)
    start = np.linalg.solve(matrix, weights.T @ [*middles, root] + 1e-6 * root)
    points = register(HAND_SPRINGS, start, dots, ink.radius, (pixels, labels))

    beside = on_bones(points, pixels, labels)[1] > 2 + 0.25 * ink.radius
    shown, hit = np.bincount(labels // 4, minlength=5), np.bincount(labels[~beside] // 4, minlength=5)
    finger = (shown >= 3) & (hit >= 0.8 * shown)
    part = settle(points, dots, whole, ink.radius)
    return part * np.append(finger.any(), np.repeat(finger, 4))[:, None]


# ---- Clips --------------------------------------------------------------------------------------


def drawing_radii(height: int, width: int) -> list[float]:
    """What the radius of discs may be: `draw_pose` scales it on large canvases, the public annotators do not."""
    scaled = 4 * min(max(1.0, min(height, width) / 512), max(height, width) / 512)
    return [scaled, 4.0] if scaled > 4 else [scaled]


def is_drawn(frames: np.ndarray) -> bool:
    """Whether a clip, uint8 RGB (F, H, W, 3), shows drawn skeletons on black and nothing else.

    Black has to cover most of a frame, the rest to have the drawing's few colours, and a body to be made out.
    """
    drawn = inked = 0
    for frame in frames[:: max(1, len(frames) // 8)]:
        bright = (frame.max(axis=2) > BLACK).sum()
        inked += bright > 0
        if 0 < bright <= 0.35 * frame[..., 0].size:
            inks = [read_ink(frame, radius) for radius in drawing_radii(*frame.shape[:2])]
            limbs = inks[0].limb >= 0
            in_colour = (inks[0].joint >= 0) | limbs | inks[0].white
            if in_colour.sum() >= 0.75 * bright and limbs.sum() >= 0.2 * bright:
                with suppress(Crowded):
                    drawn += any((body[:, 2] == 1).sum() >= 4 for ink in inks for body in read_bodies(ink))
    return drawn > 0.5 * inked


def read_drawn(frames: np.ndarray) -> list[Pose]:
    """The pose of the main person in every frame of a drawn clip, uint8 RGB (F, H, W, 3).

    Of several people the one who is large throughout is followed. Keypoints whose mark is seen have the score 1,
    those that only what is around them tells `INFERRED`. Fewer than three keypoints of a body are an empty Pose.
    Raises ValueError for what is no drawing on black.
    """
    for index, frame in enumerate(frames):
        covered = (frame.max(axis=2) > BLACK).mean()
        if covered > MOST_COVERED:
            what = f"{covered:.0%} of frame {index} are not black, and drawn skeletons lie on black"
            raise ValueError(f"{what}; make the background black, or give --poses-are video for footage")

    def follow(frames: np.ndarray, radius: float) -> list[np.ndarray]:
        return choose_person([read_bodies(read_ink(frame, radius)) for frame in frames])

    def keypoints(radius: float) -> int:
        try:
            return sum(is_seen(body).sum() for body in follow(frames[:: max(1, len(frames) // 8)], radius))
        except Crowded:  # by parts of larger marks; if by anything else, it is so with the other radius
            return -1

    radii = drawing_radii(*frames.shape[1:3])
    radius = max(radii, key=keypoints) if len(radii) > 1 else radii[0]
    try:
        bodies = follow(frames, radius)
        return [read_pose(frame, body, radius) for frame, body in zip(frames, bodies)]
    except Crowded as error:
        raise ValueError(f"{error}; give --poses-are video for footage") from None


def read_drawn_clip(path: Path, frames: np.ndarray) -> list[Pose]:
    """`read_drawn`. Errors name the clip's `path`."""
    try:
        return read_drawn(frames)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_pose(frame: np.ndarray, body: np.ndarray, radius: float) -> Pose:
    """The pose of a body (18, 3), in pixels of the padded frame, with its face and hands."""
    if not body.any():
        return Pose()
    ink, (height, width, _) = read_ink(frame, radius), frame.shape
    face = read_face(ink, body)
    hands = [read_hand(ink, body, *wrists) for wrists in ((7, 4), (4, 7))]
    x, y = (0.5 - ink.margin) / np.array(
        [width, height]
    )  # a pixel's centre is half a pixel from its corner
    return place_pose(Pose(complete_head(body, face), face, *hands), 1 / width, 1 / height, x, y)
