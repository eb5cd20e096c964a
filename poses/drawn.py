"""Poses from drawn skeletons: videos that show OpenPose's or DWPose's drawing and nothing else.

Colours say which joint a disc is and which limb an ellipse; bodies are put together from those. A face is 70 white
dots, a hand 21 blue ones and bones in 20 colours: a springy template is moved onto them.
"""

from pathlib import Path

import numpy as np

from poses.ink import BLACK, Ink, components, find_ground, has_colours, put_on_black, read_ink, sampled
from poses.people import extent
from poses.pose import HAND_EDGES, LIMBS, Pose, is_seen, place_pose

FACE_DOT = 0.75  # the radius of a face's dots in radii of the discs of joints
INFERRED = 0.5  # score of keypoints whose own mark is covered, where the marks around tell where
NECK, EARS = 1, (16, 17)
IS_HEAD = np.isin(np.arange(18), (0, 14, 15, 16, 17))
LEFT_KNEE = 12  # its disc is as blue as the joints of hands

# Pictures that are no drawings could keep the search busy for ever. Twenty people have less of everything.
MOST_COVERED = 0.5  # of the frame, by something else than its ground
MOST_MARKS, MOST_GROUPS, MOST_PEOPLE = 1000, 200, 50


class Crowded(ValueError):
    """More marks than a drawing has."""

    def __init__(self, what: str):
        super().__init__(f"{what} in one frame, more than drawn skeletons have")


# ---- Discs and limbs ----------------------------------------------------------------------------


def around(mask: np.ndarray, centre: np.ndarray, reach: float) -> np.ndarray:
    """Pixels (N, 2), as (x, y), of a mask (H, W) that lie within `reach` of a centre."""
    left, top = np.floor(centre - reach).astype(int).clip(0)
    right, bottom = np.ceil(centre + reach).astype(int).clip(0) + 1
    y, x = np.nonzero(mask[top:bottom, left:right])
    points = np.stack([x + left, y + top], axis=1)
    return points[np.linalg.norm(points - centre, axis=1) <= reach]


def disc_shares(mask: np.ndarray, pixels: np.ndarray, radius: float) -> np.ndarray:
    """Which share of the disc around each of the pixels (N, 2) lies in a mask (H, W): (N,)."""
    counts, width = mask.ravel().cumsum(dtype=np.int32), mask.shape[1]
    rows = np.arange(-int(radius), int(radius) + 1)
    halves = np.sqrt(radius**2 - rows**2).astype(int)  # each row of the disc is a difference of two counts
    at = pixels @ (1, width) + (rows * width)[:, None]
    inside = counts[at + halves[:, None]] - counts[at - halves[:, None] - 1]
    return inside.sum(axis=0) / (2 * halves + 1).sum()


def pick_spots(mask: np.ndarray, shares: np.ndarray, least: float, near: float, gap: float) -> np.ndarray:
    """Rows (x, y, share): centres of a mask's pixels near those of the highest shares, which lie apart.

    shares: (N,) of the mask's pixels, row by row
    """
    pixels, free = np.argwhere(mask)[:, ::-1], np.zeros_like(mask)
    order = np.argsort(-shares, kind="stable")[: (shares >= least).sum()]
    free[tuple(pixels[order].T[::-1])] = True
    spots = []
    for index in order:
        x, y = pixels[index]
        if free[y, x]:
            if len(spots) == MOST_MARKS:
                raise Crowded(f"over {MOST_MARKS} discs of one colour")
            centre = around(mask, pixels[index], near).mean(axis=0)
            spots.append((*centre, shares[index]))
            free[tuple(around(free, centre, gap).T[::-1])] = free[y, x] = False
    return np.array(spots).reshape(-1, 3)


def find_discs(ink: Ink) -> list[np.ndarray]:
    """Discs by class, of 0 to 17: rows (x, y, share of the disc that is seen)."""
    found = []
    for index in range(18):
        # low for ears, which lie under the dots of the jaw
        mask, least = ink.joint == index, 0.4 if index in EARS else 0.6
        shares = disc_shares(mask, np.argwhere(mask)[:, ::-1], ink.radius)
        found.append(pick_spots(mask, shares, least, ink.radius + 0.5, 1.5 * ink.radius))
    return found


def find_limbs(ink: Ink) -> list[tuple[int, np.ndarray, int]]:
    """What is seen of limbs, the longest first: which limb, its ends (2, 2), in either order, and its pixels."""
    pixels, labels = components(ink.limb)
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
        limbs.append((ink.limb[piece[0, 1], piece[0, 0]], ends, len(piece)))
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
    length, radius = max(np.linalg.norm(seen - fixed), 1.0), ink.radius
    # A strip along the limb, in steps of half a pixel.
    along, aside = np.arange(0, length + 3 * radius, 0.5)[:, None], np.arange(-radius, radius + 0.5, 0.5)
    ahead = (seen - fixed) / length
    x = np.rint(fixed[0] + along * ahead[0] - aside * ahead[1]).astype(int).clip(0, ink.limb.shape[1] - 1)
    y = np.rint(fixed[1] + along * ahead[1] + aside * ahead[0]).astype(int).clip(0, ink.limb.shape[0] - 1)
    worth = ((ink.limb[y, x] == index) - 1.0 * ink.black[y, x]).ravel() / 4
    reach = np.arange(-0.5, 3, 0.125) * radius
    half = (length + reach)[:, None, None] / 2
    inside = ((along - half) / half.clip(0.5)) ** 2 + (aside / radius) ** 2 < 1
    values = inside.reshape(len(reach), -1) @ worth
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
    order = np.argsort(distance)
    leads = (i for i in order[fits[order]][:8] if is_covered(ink, end, points[i]))
    return next(((int(i), distance[i]) for i in leads), (None, 3 * radius))


def join(ink: Ink, joints: list[list[np.ndarray]]) -> list[tuple]:
    """Which joints (x, y, score) each limb joins: pairs of (keypoint, which of its joints).

    Where a limb leads to none because its end is covered, a joint is inferred and added.
    """
    links, taken = [], set()
    for limb, ends, _ in find_limbs(ink):
        pair, ways = LIMBS[limb].tolist(), []
        for start, end in (ends, ends[::-1]):
            a, cost_a = nearest(ink, joints[pair[0]], end, start)
            b, cost_b = nearest(ink, joints[pair[1]], start, end)
            ways.append((cost_a + cost_b, [a, b], [start, end]))
        _, at, ends = min(ways, key=lambda way: way[0])
        if at == [None, None] and np.linalg.norm(ends[1] - ends[0]) < 3 * ink.radius:
            continue
        if None in at and not taken.isdisjoint((limb, *end) for end in enumerate(at)):
            continue  # a scrap beside the whole limb, which came before
        for this, other in ((0, 1), (1, 0)):
            if at[this] is None:
                fixed = ends[other] if at[other] is None else joints[pair[other]][at[other]][:2]
                place, known = extend_limb(ink, limb, fixed, ends[this]), joints[pair[this]]
                away = (np.hypot(*(joint[:2] - place)) for joint in known)
                close = (i for i, distance in enumerate(away) if distance < 2.5 * ink.radius)
                at[this] = next(close, len(known))  # two limbs infer the same joint
                known += [np.append(place, INFERRED)] * (at[this] == len(known))
        links.append(tuple(zip(pair, at)))
        taken |= {(limb, *end) for end in enumerate(at)}
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
    bodies = [body for body in bodies if is_seen(body).sum() >= 3 and has_disc(body)]
    bodies = [body for body in bodies if not is_scrap(body, bodies)]
    if len(bodies) > MOST_PEOPLE:
        raise Crowded(f"{len(bodies)} people")
    return bodies


def has_disc(piece: np.ndarray) -> bool:
    """Whether a disc shows that this is neither a hand nor a stripe that happens to have a limb's colour."""
    return bool((np.delete(piece[:, 2], LEFT_KNEE) == 1).any())


def is_scrap(piece: np.ndarray, bodies: list[np.ndarray]) -> bool:
    """Whether a piece lies within a body that has over twice as many keypoints: a limb that was read twice."""
    points = piece[is_seen(piece), :2]
    larger = [body[is_seen(body), :2] for body in bodies if is_seen(body).sum() > 2 * len(points)]
    return any(((points > b.min(axis=0)) & (points < b.max(axis=0))).all() for b in larger)


def belongs(ink: Ink, piece: np.ndarray, body: np.ndarray) -> bool:
    """Whether a piece of a skeleton completes a body: both (18, 3) in pixels."""
    if (is_seen(piece) & is_seen(body)).any() or not has_disc(piece):
        return False
    distance = np.linalg.norm(piece[is_seen(piece), None, :2] - body[is_seen(body), :2], axis=2).min()
    if distance > 0.5 * extent(body) + 2 * ink.radius:
        return False
    joined = [(piece[a], body[b]) for a, b in (*LIMBS, *LIMBS[:, ::-1]) if piece[a, 2] and body[b, 2]]
    return all(is_covered(ink, a[:2], b[:2]) for a, b in joined)


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
    """The centres (N, 2) of a mask's discs, which may overlap, and the pixels around which a disc fits."""
    pixels, whole = np.argwhere(mask)[:, ::-1], np.zeros_like(mask)
    shares = disc_shares(mask, pixels, 0.9 * radius)  # what is left of discs whose edges are soft
    spots = pick_spots(mask, shares, 0.85, max(0.5 * radius, 1.5), max(1.4 * radius, 1.5))
    whole[tuple(pixels[shares >= 0.85].T[::-1])] = True
    return spots[:, :2], whole


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
    blot = np.array([[len(around(whole, point, 0.75 * radius + 0.5)) > 0] for point in points])
    sure, guessed = np.insert(dots[nearest], 2, 1, axis=1), np.insert(points, 2, INFERRED, axis=1)
    part = np.where(exact, sure, blot * guessed)
    explained = (distance.min(axis=0) < 1.5 * radius).mean()
    return part if explained > 0.8 and is_seen(part).mean() > 0.6 else np.zeros_like(part)


def read_face(ink: Ink, body: np.ndarray, dots: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """The face (70, 3) in pixels, or zeros where there is none, or none that looks like one.

    dots, whole: those of this face, as `find_dots` gives them
    """
    radius = FACE_DOT * ink.radius
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


def read_hand(ink: Ink, body: np.ndarray, own: int, wrists: np.ndarray) -> np.ndarray:
    """The hand (21, 3) in pixels at a body's `own` wrist, or zeros where its bones cannot be told apart.

    wrists: (N, 2), everybody's. A finger counts if pixels of its bones are seen, and most of them where it is.
    """
    places = np.where(is_seen(body)[:, None], body[:, :2], np.inf)
    wrist = places[own]
    if not is_seen(body)[own]:
        return np.zeros((21, 3))

    def near(mask: np.ndarray, discs: np.ndarray) -> np.ndarray:
        """Pixels (N, 2) of a mask that are the hand's, without discs of the body, which have the same colours."""
        points = around(mask, wrist, min(0.35 * extent(body), 64 * ink.radius))
        distance = np.linalg.norm(points - wrist, axis=1)
        for other in wrists:
            closer = distance <= np.linalg.norm(points - other, axis=1)
            points, distance = points[closer], distance[closer]
        return points[(np.linalg.norm(points[:, None] - discs, axis=2) > 1.3 * ink.radius).all(axis=1)]

    is_blue, mask = ink.joint == LEFT_KNEE, np.zeros_like(ink.black)
    x, y = near(is_blue, np.delete(places, own, axis=0)).T
    mask[y, x] = True
    dots, whole = find_dots(mask, ink.radius)
    if len(dots) < 3:
        return np.zeros((21, 3))
    pixels = near((ink.bone >= 0) & ~is_blue, places)
    pixels = pixels[:: 1 + len(pixels) // 4000]
    # A face beside the hand has its colours too, but no dots.
    pixels = pixels[np.linalg.norm(pixels[:, None] - dots, axis=2).min(axis=1) < 6 * ink.radius]
    labels = ink.bone[pixels[:, 1], pixels[:, 0]]
    shown = np.bincount(labels, minlength=20)
    if (shown[::4] >= 3).sum() < 2:
        return np.zeros((21, 3))
    # To begin with, the middle of what is seen of each bone is the middle of that bone.
    middles = [np.median(pixels[labels == bone], axis=0) for bone in np.flatnonzero(shown >= 3)]
    blue = np.argwhere(whole)[:, ::-1]
    root = blue[np.linalg.norm(blue - wrist, axis=1).argmin()]
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


def place_head(body: np.ndarray) -> np.ndarray:
    """About where the head of a body (18, 3) is: (x, y)."""
    seen = body[is_seen(body) & IS_HEAD]
    return (seen if len(seen) else body[is_seen(body)])[:, :2].mean(axis=0)


def read_people(ink: Ink) -> list[tuple[np.ndarray, ...]]:
    """Everybody's body (18, 3), face (70, 3) and hands (21, 3), in pixels of the padded frame."""
    bodies = read_bodies(ink)
    dots, whole = find_dots(ink.white, FACE_DOT * ink.radius) if bodies else (np.zeros((0, 2)), ink.white)
    heads = [place_head(body) for body in bodies]
    whose = [np.argmin([np.hypot(*(dot - head)) for head in heads]) for dot in dots]
    wrists = np.array([body[wrist, :2] for body in bodies for wrist in (4, 7) if body[wrist, 2]])
    people = []
    for index, body in enumerate(bodies):
        face = read_face(ink, body, dots[np.equal(whose, index)], whole)
        hands = [read_hand(ink, body, wrist, wrists) for wrist in (7, 4)]
        people.append((complete_head(body, face), face, *hands))
    return people


def line_radius(frames: list[np.ndarray]) -> float:
    """The radius in pixels of the discs of joints, which is half the width of limbs, in frames (H, W, 3) on black.

    `draw_pose` scales it on large canvases, the public annotators do not, and a video may have been scaled since.
    """
    height, width, _ = frames[0].shape
    usual = 4 * min(max(1.0, min(height, width) / 512), max(height, width) / 512)
    limbs = [limb for frame in frames for limb in find_limbs(read_ink(frame, usual))]
    if not limbs:
        return usual
    lengths = np.array([np.linalg.norm(np.subtract(*ends)) + 1 for _, ends, _ in limbs])
    areas = np.array([pixels for _, _, pixels in limbs])
    # An ellipse's area is pi / 4 times its two axes; a drawn one is half a pixel wider.
    measured = np.median((2 / np.pi * areas / lengths)[lengths >= np.quantile(lengths, 0.67)]) - 0.5
    measured = float(measured.clip(0.25 * usual, 2 * usual))
    likely = min((usual, usual / 2, 4.0), key=lambda radius: abs(np.log(radius / measured)))
    return likely if abs(measured / likely - 1) < 0.12 else measured


def is_drawn(frames: np.ndarray) -> bool:
    """Whether a clip, uint8 RGB (F, H, W, 3), shows drawn skeletons on a plain ground and nothing else.

    The ground has to cover most of a frame, the rest to have the drawing's few colours, and a body to be made out.
    """
    paper = find_ground(sampled(frames))
    frames = [put_on_black(frame, *paper) for frame in sampled(frames)]
    frames = [frame for frame in frames if (frame > BLACK).any()]  # others show nobody
    fitting = [frame for frame in frames if has_colours(frame)]
    if len(fitting) <= 0.5 * len(frames):
        return False
    try:
        radius = line_radius(fitting)
        bodies = [read_bodies(read_ink(frame, radius)) for frame in fitting]
    except Crowded:
        return False
    return sum(any((body[:, 2] == 1).sum() >= 4 for body in each) for each in bodies) > 0.5 * len(frames)


def read_drawn_people(path: Path, frames: np.ndarray) -> list[list[Pose]]:
    """The people in every frame of a drawn clip, uint8 RGB (F, H, W, 3), those with the most joints first.

    Keypoints whose mark is seen have the score 1, those that only what is around them tells `INFERRED`.
    Raises ValueError, naming the clip's `path`, for what is no drawing on a plain ground, or of nobody.
    """
    try:
        paper = find_ground(sampled(frames))
        for index, frame in enumerate(frames):
            if (covered := (put_on_black(frame, *paper).max(axis=2) > BLACK).mean()) > MOST_COVERED:
                raise ValueError(f"{covered:.0%} of frame {index} are not its plain ground")
        radius = line_radius([put_on_black(frame, *paper) for frame in sampled(frames)])
        inks = (read_ink(put_on_black(frame, *paper), radius) for frame in frames)
        people = [[as_pose(person, ink) for person in read_people(ink)] for ink in inks]
    except ValueError as error:
        raise ValueError(f"{path}: {error}; give --poses-are video for footage") from None
    if not any(map(len, people)):
        raise ValueError(f"{path}: no drawn skeleton in any of the {len(frames)} frames")
    return people


def as_pose(person: tuple[np.ndarray, ...], ink: Ink) -> Pose:
    """Parts in pixels of the padded frame as a pose on the canvas."""
    height, width = np.subtract(ink.black.shape, 2 * ink.margin)
    x, y = (0.5 - ink.margin) / width, (0.5 - ink.margin) / height  # 0.5: a pixel's centre from its corner
    return place_pose(Pose(*person), 1 / width, 1 / height, x, y)
