"""Paper puppets: 2-D people whose every pose has an exact true frame and exact keypoints.

A `Puppet` says who it is (seeded by `random_puppet`), a `State` says how it stands (a moment of
`motion`), and `render` draws the one in the other. The two are independent: any puppet can take any
state, so for every edited pose there is a true frame to compare with.

Lengths are in canvas units: 1 is the side of the square canvas, x runs right and y runs down.
Angles are in radians. 'Right' is the puppet's own right, which is the left of the picture, and
pairs are always (right, left). Puppets face the camera and show it their palms.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from poses.pose import Pose

RGB = tuple[int, int, int]
Pair = tuple[float, float]  # (right, left)

SUPERSAMPLE = 4  # frames are drawn this many times larger, then reduced, for smooth edges
FLOOR = 0.955  # where the soles stand, in canvas units from the top
SIDES = (-1, 1)  # the direction of the picture in which the right and the left side lie

CLOTH_COLOURS: dict[str, RGB] = {
    "red": (205, 45, 48),
    "orange": (240, 135, 40),
    "yellow": (245, 212, 70),
    "green": (62, 155, 78),
    "teal": (45, 165, 170),
    "blue": (52, 95, 200),
    "purple": (128, 72, 172),
    "pink": (242, 145, 185),
    "white": (240, 240, 236),
    "grey": (140, 142, 148),
    "black": (40, 40, 46),
    "brown": (122, 78, 48),
}
HAIR_COLOURS: dict[str, RGB] = {
    "black": (38, 32, 34),
    "brown": (104, 66, 40),
    "blond": (232, 196, 108),
    "red": (192, 66, 30),
    "grey": (160, 160, 164),
    "blue": (60, 105, 205),
    "pink": (238, 130, 180),
}
HAIR_ODDS = (0.24, 0.22, 0.18, 0.18, 0.08, 0.05, 0.05)  # in the order of HAIR_COLOURS
SKIN_TONES: tuple[RGB, ...] = (
    (255, 224, 196),
    (246, 206, 172),
    (234, 188, 150),
    (222, 170, 128),
    (198, 142, 102),
    (166, 112, 76),
    (132, 86, 58),
    (102, 66, 46),
)
EYE_COLOURS: tuple[RGB, ...] = ((82, 52, 34), (50, 90, 160), (52, 120, 80), (90, 96, 104))
HAIR_SHAPES = ("short", "long", "bob", "bun", "ponytail", "curly", "spiky", "bald")
EAR_COVERING = ("long", "bob", "curly")
SHIRT_PATTERNS = ("plain", "striped", "emblem")
LOWER_GARMENTS = ("trousers", "shorts", "skirt")
BACKGROUNDS = ("flat", "gradient", "room", "window", "stripes", "shapes", "noise")


@dataclass(frozen=True)
class Paint:
    """A colour and the word a caption says for it."""

    name: str
    rgb: RGB


@dataclass(frozen=True)
class Background:
    """What stands behind a puppet; never moves."""

    kind: str  # one of BACKGROUNDS
    colours: tuple[RGB, RGB, RGB]
    seed: int  # places the shapes and the noise


@dataclass(frozen=True)
class Puppet:
    """One identity. Lengths and half-widths are in canvas units."""

    skin: RGB
    hair: Paint
    hair_shape: str  # one of HAIR_SHAPES
    parting: float  # slope of the fringe, -1 to 1
    fringe: float  # height of the hairline, in head half-heights above the head's centre
    eyes: RGB
    brow_width: float
    jaw: float  # 0: pointed, 1: square
    glasses: bool
    beard: bool
    shirt: Paint
    shirt_pattern: str  # one of SHIRT_PATTERNS
    shirt_accent: RGB  # of the stripes or the emblem
    sleeve: float  # length as a share of the whole arm: 0.16 a cap, 0.97 long
    lower: Paint
    lower_garment: str  # one of LOWER_GARMENTS
    shoes: RGB
    build: float  # thickness of the limbs, 1 on average
    head: tuple[float, float]  # half-width and half-height
    neck: float
    torso: float  # from the middle of the hips to the middle of the shoulders
    shoulders: float  # half the distance between the shoulder joints
    hips: float  # half the distance between the hip joints
    upper_arm: float
    forearm: float
    hand: float  # from the wrist to the tip of the middle finger
    thigh: float
    shin: float
    background: Background


@dataclass(frozen=True)
class State:
    """How a puppet stands at one moment. Angles in radians; all 0 is standing to attention."""

    root: float  # shift of the whole puppet, in canvas widths
    hop: float  # height of the lower foot above the floor, in canvas heights
    lean: float  # of the torso, positive towards the right of the picture
    sway: float  # tilt of the hips, the left one up when positive
    shrug: float  # tilt of the shoulders against the torso, the left one up when positive
    neck: float  # tilt of the head against the torso, positive towards the right of the picture
    turn: float  # of the head about the vertical, positive towards the right of the picture
    nod: float  # of the head, positive downwards
    shoulder: Pair  # of the upper arm against the torso: 0 hangs, pi/2 points outwards, pi up
    elbow: Pair  # of the forearm against the upper arm, positive onwards in the shoulder's sense
    wrist: Pair  # of the hand against the forearm, same sense
    hip: Pair  # of the thigh against the vertical, positive outwards
    knee: Pair  # of the shin against the thigh, positive back inwards
    foot: Pair  # of the foot, positive toes outwards
    curl: tuple[tuple[float, ...], tuple[float, ...]]  # from the thumb on: 0 straight, 1 a fist
    spread: Pair  # angle between neighbouring fingers
    mouth: float  # 0 closed, 1 wide open
    smile: float  # -1 sad, 1 happy
    blink: float  # 0 open, 1 closed
    brow: float  # -1 lowered, 1 raised
    gaze: tuple[float, float]  # of both pupils, -1 to 1, right and down in the picture
    body_turn: float = 0.0  # of all but the head about the vertical, positive like `turn`


# ---- Who it is ----------------------------------------------------------------------------------


def random_puppet(seed: int) -> Puppet:
    """The puppet number `seed`: same seed, same person."""
    rng = np.random.default_rng(seed)

    def one_of(options, odds=None):
        return options[rng.choice(len(options), p=odds)]

    def jittered(rgb: RGB) -> RGB:
        # little enough for the jittered colour to stay nearest to the word it is called by
        return tuple(int(c) for c in np.clip(np.add(rgb, rng.integers(-11, 12, 3)), 0, 255))

    def paint(colours: dict[str, RGB], odds=None, without: str = "") -> Paint:
        name = one_of([n for n in colours if n != without], odds)
        return Paint(name, jittered(colours[name]))

    skin = jittered(one_of(SKIN_TONES))
    hair = paint(HAIR_COLOURS, HAIR_ODDS)
    hair_shape = one_of(HAIR_SHAPES, (0.22, 0.16, 0.12, 0.11, 0.11, 0.11, 0.11, 0.06))
    shirt = paint(CLOTH_COLOURS)
    lower = paint(CLOTH_COLOURS, without=shirt.name)
    shoes = jittered(one_of(list(CLOTH_COLOURS.values())))
    accents = sorted(CLOTH_COLOURS.values(), key=lambda rgb: _distance(rgb, shirt.rgb))
    size = rng.uniform(0.95, 1.05)
    legs = size * rng.uniform(0.94, 1.06)
    head_height = rng.uniform(0.091, 0.100)
    person = [skin, hair.rgb, shirt.rgb, lower.rgb, shoes]
    return Puppet(
        skin=skin,
        hair=hair,
        hair_shape=hair_shape,
        parting=rng.uniform(-1, 1),
        fringe=rng.uniform(0.42, 0.62),
        eyes=one_of(EYE_COLOURS),
        brow_width=rng.uniform(0.07, 0.12),
        jaw=rng.uniform(0, 1),
        glasses=bool(rng.random() < 0.2),
        beard=bool(rng.random() < (0.5 if hair_shape in ("short", "bald", "spiky") else 0)),
        shirt=shirt,
        shirt_pattern=one_of(SHIRT_PATTERNS, (0.45, 0.3, 0.25)),
        shirt_accent=jittered(one_of(accents[6:])),
        sleeve=one_of((0.16, 0.30, 0.52, 0.97), (0.12, 0.40, 0.13, 0.35)),
        lower=lower,
        lower_garment=one_of(LOWER_GARMENTS, (0.55, 0.25, 0.2)),
        shoes=shoes,
        build=rng.uniform(0.85, 1.2),
        head=(head_height * rng.uniform(0.84, 0.96), head_height),
        neck=rng.uniform(0.014, 0.026),
        torso=0.225 * size * rng.uniform(0.95, 1.06),
        shoulders=rng.uniform(0.072, 0.090),
        hips=rng.uniform(0.040, 0.052),
        upper_arm=0.128 * size * rng.uniform(0.95, 1.06),
        forearm=0.116 * size * rng.uniform(0.95, 1.06),
        hand=rng.uniform(0.104, 0.114),
        thigh=0.168 * legs,
        shin=0.165 * legs,
        background=_random_background(rng, person),
    )


def _random_background(rng: np.random.Generator, person: list[RGB]) -> Background:
    def colour(lightness: float) -> RGB:
        # of a few soft colours the one farthest from everything the puppet wears
        candidates = []
        for _ in range(6):
            tint = rng.uniform(0, 1, 3)
            tint = (tint - tint.mean()) * rng.uniform(20, 110)
            candidates.append(tuple(int(c) for c in np.clip(lightness + tint, 20, 245)))
        return max(candidates, key=lambda rgb: min(_distance(rgb, worn) for worn in person))

    lightness = rng.uniform(75, 225)
    step = rng.uniform(18, 45) * rng.choice((-1, 1))
    return Background(
        kind=BACKGROUNDS[rng.integers(len(BACKGROUNDS))],
        colours=(colour(lightness), colour(lightness + step), colour(lightness - step)),
        seed=int(rng.integers(2**31)),
    )


def _distance(a: RGB, b: RGB) -> float:
    return float(np.linalg.norm(np.subtract(a, b)))


def caption(puppet: Puppet) -> str:
    """What a prompt would say of this puppet: 'a person, red hair, blue striped shirt, ...'."""
    hair = "bald" if puppet.hair_shape == "bald" else f"{puppet.hair.name} hair"
    pattern = "striped " if puppet.shirt_pattern == "striped" else ""
    return (
        f"a person, {hair}, {puppet.shirt.name} {pattern}shirt, {puppet.lower.name} {puppet.lower_garment}"
    )


# ---- How it moves -------------------------------------------------------------------------------

# ranges of (shoulder, elbow): arms held low, wide, high, or swinging through everything
ARM_STYLES = (
    ((-0.05, 1.2), (-1.5, 1.0)),
    ((0.5, 2.1), (-0.5, 1.7)),
    ((1.4, 2.85), (-0.4, 1.4)),
    ((0.1, 2.75), (-0.6, 1.5)),
)

DANCES = ("facing", "turning", "crossed")  # the camera; to the sides; arms over the chest
CROSSED_ARMS = ((0.05, 0.45), (-2.4, -1.7))  # ranges of (shoulder, elbow)


def motion(seed: int, frames: int, fps: float = 12.0, dance: str = "facing") -> list[State]:
    """The first `frames` states of dance number `seed`; a longer one begins like a shorter one.

    A dance of another kind (one of DANCES) is the same but for its body's turn, or its arms.
    """
    rng = np.random.default_rng(seed)
    seconds = np.arange(frames) / fps

    def wave(low: float, high: float) -> np.ndarray:
        """A smooth course (frames,) between `low` and `high`: a slow sinusoid with quicker ones."""
        reach = rng.uniform(0.6, 1.0) * (high - low) / 2
        centre = rng.uniform(low + reach, high - reach)
        hertz = rng.uniform((0.15, 0.35, 0.6), (0.4, 0.7, 1.0))
        phase = rng.uniform(0, 2 * np.pi, 3)
        turns = np.sin(2 * np.pi * hertz * seconds[:, None] + phase)  # (frames, 3)
        return centre + reach * turns @ (0.66, 0.26, 0.08)

    def both(low: float, high: float) -> np.ndarray:
        return np.stack([wave(low, high), wave(low, high)], axis=1)  # (frames, 2)

    arms = [ARM_STYLES[rng.integers(len(ARM_STYLES))] for _ in SIDES]
    shoulder = np.stack([wave(*style[0]) for style in arms], axis=1)
    elbow = np.stack([wave(*style[1]) for style in arms], axis=1)
    if rng.random() < 0.3:  # some dances are mirrored: both arms do nearly the same
        shoulder[:, 1] = shoulder[:, 0] + wave(-0.15, 0.15)
        elbow[:, 1] = elbow[:, 0] + wave(-0.2, 0.2)
    # each hand opens and closes as a whole, with a little of each finger's own
    curl = np.clip(
        np.stack([wave(-0.45, 0.65) for _ in SIDES], axis=1)[:, :, None]
        + np.stack([both(-0.25, 0.25) for _ in range(5)], axis=2),
        0,
        1,
    )  # (F, 2, 5)
    hip = both(-0.02, 0.72)
    knee = 0.55 * hip + both(-0.10, 0.22)  # a thigh that swings out takes the shin back in
    channels = {
        "root": wave(-0.12, 0.12),
        "hop": wave(-0.06, 0.025).clip(0),
        "lean": wave(-0.22, 0.22),
        "sway": wave(-0.12, 0.12),
        "shrug": wave(-0.12, 0.12),
        "neck": wave(-0.28, 0.28),
        "turn": wave(-0.45, 0.45),
        "nod": wave(-0.18, 0.22),
        "shoulder": shoulder,
        "elbow": elbow,
        "wrist": both(-0.5, 0.5),
        "hip": hip,
        "knee": knee,
        "foot": both(0.3, 1.1),
        "curl": curl,
        "spread": both(0.12, 0.28),
        "mouth": wave(-0.3, 1.0).clip(0),
        "smile": wave(-0.4, 1.0),
        # the top of a sinusoid raised to a power: short blinks with long pauses
        "blink": ((wave(-1, 1) + 1) / 2) ** 8,
        "brow": wave(-0.8, 1.0),
        "gaze": both(-0.9, 0.9),
    }
    if dance == "turning":
        channels["body_turn"] = wave(-1.1, 1.1)
        channels["turn"] = 0.5 * channels["turn"] + 0.55 * channels["body_turn"]
    elif dance == "crossed":
        channels["shoulder"], channels["elbow"] = (both(*reach) for reach in CROSSED_ARMS)
    return [State(**{name: _plain(course[f]) for name, course in channels.items()}) for f in range(frames)]


def _plain(value: np.ndarray) -> float | tuple:
    return tuple(_plain(v) for v in value) if np.ndim(value) else float(value)


# ---- Where its points are -----------------------------------------------------------------------


def _down(angle: float) -> np.ndarray:
    """The direction (2,) that straight down becomes when swung by `angle` towards picture right."""
    return np.array([np.sin(angle), np.cos(angle)])


def _across(angle: float) -> np.ndarray:
    """The direction (2,) that picture right becomes when swung along with `_down(angle)`."""
    return np.array([np.cos(angle), -np.sin(angle)])


@dataclass(frozen=True)
class _Skeleton:
    """A puppet in a state: joints as (2,) arrays in canvas units, pairs (right, left)."""

    neck: np.ndarray
    pelvis: np.ndarray
    shoulders: np.ndarray  # (2, 2), as all pairs below
    elbows: np.ndarray
    wrists: np.ndarray
    hips: np.ndarray
    knees: np.ndarray
    ankles: np.ndarray
    toes: np.ndarray
    hands: np.ndarray  # (2, 21, 2)
    head: "_Head"
    body_turn: float

    def far_to_near(self) -> tuple[int, int]:
        """The sides in the order in which they are painted."""
        return (1, 0) if self.body_turn > 0 else (0, 1)


@dataclass(frozen=True)
class _Head:
    """Places points of the head, given in head units, on the canvas.

    In head units the head is about the unit ball: x to picture right, y down, z to the camera.
    """

    centre: np.ndarray  # (2,)
    size: tuple[float, float]  # half-width, half-height
    tilt: float
    turn: float
    nod: float

    def flat(self, points) -> np.ndarray:
        """(N, 2) head units on the head's silhouette, which turning does not move → (N, 2)."""
        x, y = (np.asarray(points, float) * self.size).T
        return self.centre + np.outer(x, _across(-self.tilt)) + np.outer(y, _down(-self.tilt))

    def solid(self, points) -> np.ndarray:
        """(N, 3) head units on the head itself, turned and nodded with it → (N, 2)."""
        x, y, z = np.asarray(points, float).T
        x, z = (
            x * np.cos(self.turn) + z * np.sin(self.turn),
            z * np.cos(self.turn) - x * np.sin(self.turn),
        )
        return self.flat(np.stack([x, y * np.cos(self.nod) + z * np.sin(self.nod)], axis=1))

    def front(self, points) -> np.ndarray:
        """(N, 2) head units on the front of the face, lifted onto the ball → (N, 2)."""
        x, y = np.asarray(points, float).T
        return self.solid(np.stack([x, y, np.sqrt(np.clip(1 - x**2 - 0.6 * y**2, 0, 1))], axis=1))


def _skeleton(puppet: Puppet, state: State) -> _Skeleton:
    hips = np.array([side * puppet.hips * _across(state.sway) for side in SIDES])
    thighs = [_down(side * a) for side, a in zip(SIDES, state.hip)]
    shins = [_down(side * (a - k)) for side, a, k in zip(SIDES, state.hip, state.knee)]
    knees = hips + puppet.thigh * np.array(thighs)
    ankles = knees + puppet.shin * np.array(shins)
    toes = ankles + [
        (side * 0.036 * np.sin(a), 0.012 + 0.008 * np.cos(a)) for side, a in zip(SIDES, state.foot)
    ]
    # the legs decide how high the pelvis is: the lower foot stands on the floor
    pelvis = np.array([0.5 + state.root, FLOOR - 0.030 - state.hop - ankles[:, 1].max()])

    neck = pelvis - puppet.torso * _down(-state.lean)
    across = _across(state.shrug - state.lean)
    shoulders = np.array([neck + side * puppet.shoulders * across for side in SIDES])
    elbows, wrists, hands = [], [], []
    for i, side in enumerate(SIDES):
        angle = side * state.shoulder[i] - state.lean
        elbows.append(shoulders[i] + puppet.upper_arm * _down(angle))
        angle += side * state.elbow[i]
        wrists.append(elbows[i] + puppet.forearm * _down(angle))
        angle += side * state.wrist[i]
        hands.append(_hand(wrists[i], angle, side, puppet.hand, state.curl[i], state.spread[i]))

    def turned(points) -> np.ndarray:
        """A paper puppet that turns about its pelvis only becomes narrower."""
        points = np.array(points)
        points[..., 0] -= (points[..., 0] - pelvis[0]) * (1 - np.cos(state.body_turn))
        return points

    forward = np.array([0.03 * np.sin(state.body_turn), 0.0])  # where toes point that faced us
    tilt = state.lean + state.neck
    centre = neck - puppet.neck * _down(-state.lean) - 0.97 * puppet.head[1] * _down(-tilt)
    return _Skeleton(
        turned(neck),
        pelvis,
        turned(shoulders),
        turned(elbows),
        turned(wrists),
        turned(pelvis + hips),
        turned(pelvis + knees),
        turned(pelvis + ankles),
        turned(pelvis + toes) + forward,
        turned(hands),
        _Head(turned(centre), puppet.head, tilt, state.turn, state.nod),
        state.body_turn,
    )


# fingers from thumb to little: where the base sits (along the hand, towards the thumb) and the
# length of the finger, all as shares of the hand's length
FINGERS = (
    (0.16, 0.16, 0.42),
    (0.48, 0.21, 0.44),
    (0.52, 0.07, 0.48),
    (0.49, -0.07, 0.44),
    (0.43, -0.20, 0.35),
)


def _hand(
    wrist: np.ndarray, angle: float, side: int, length: float, curl: tuple[float, ...], spread: float
) -> np.ndarray:
    """The 21 points (21, 2) of a hand that points along `_down(angle)`, palm to the camera."""
    thumbward = side * _across(angle)
    points = [wrist]
    for finger, (along, beside, reach) in enumerate(FINGERS):
        base = wrist + length * (along * _down(angle) + beside * thumbward)
        # the thumb stands away from the hand; the others fan out around the middle finger
        fan = 0.75 + spread - 0.7 * curl[0] if finger == 0 else (2 - finger) * spread
        along_finger = _down(angle + side * fan)
        points.append(base)
        for joint, share in enumerate((0.45, 0.30, 0.25), start=1):
            # seen from the front a curling finger only becomes shorter, then folds back
            bend = curl[finger] * (0.35, 0.9)[finger > 0] * joint
            base = base + length * reach * share * np.cos(bend) * along_finger
            points.append(base)
    return np.array(points)


def _mouth(state: State) -> tuple[np.ndarray, np.ndarray]:
    """Outer lips (12, 2) and inner lips (8, 2) in head units, in the order of the landmarks."""
    width = 0.31 + 0.07 * state.smile - 0.07 * state.mouth

    def lip(t: np.ndarray, drop: float) -> np.ndarray:
        middle = 0.53 + 0.06 * state.smile + drop - (0.06 * 2 * state.smile + drop) * t**2
        return np.stack([width * t, middle], axis=1)

    outer, inner = np.linspace(-1, 1, 7), np.linspace(-0.8, 0.8, 5)
    gap = 0.27 * state.mouth
    return (
        np.concatenate([lip(outer, -0.075), lip(outer[5:0:-1], gap + 0.095)]),
        np.concatenate([lip(inner, -0.015), lip(inner[3:0:-1], gap + 0.015)]),
    )


def _eye_outline(side: int, blink: float, points: int) -> np.ndarray:
    """(points, 2) head units around one eye, clockwise from the corner at the picture's left."""
    around = np.pi + 2 * np.pi * np.arange(points) / points
    return np.stack(
        [side * 0.39 + 0.20 * np.cos(around), -0.07 + 0.165 * (1 - 0.92 * blink) * np.sin(around)], axis=1
    )


def _face(puppet: Puppet, state: State, head: _Head) -> np.ndarray:
    """The 70 landmarks (70, 2) of the face in canvas units."""
    around = np.pi * np.arange(17) / 16
    wide = np.sign(np.cos(around)) * np.abs(np.cos(around)) ** (1.05 - 0.35 * puppet.jaw)
    jaw = np.stack([-0.95 * wide, -0.06 + 1.04 * np.sin(around), 0.3 * np.sin(around)], axis=1)
    t = np.linspace(-1, 1, 5)
    brow = np.stack([0.23 * t, -0.37 - 0.09 * state.brow - 0.07 * (1 - t**2)], axis=1)
    nose = [(0, -0.08, 1.0), (0, 0.04, 1.06), (0, 0.15, 1.12), (0, 0.25, 1.16)]
    nostrils = [(x, 0.33 - 0.3 * abs(x), 1.02) for x in (-0.14, -0.07, 0, 0.07, 0.14)]
    pupils = [(side * 0.39 + 0.08 * state.gaze[0], -0.06 + 0.04 * state.gaze[1]) for side in SIDES]
    return np.concatenate(
        [
            head.solid(jaw),
            head.front(brow - (0.40, 0)),
            head.front(brow + (0.40, 0)),
            head.solid(nose),
            head.solid(nostrils),
            head.front(_eye_outline(-1, state.blink, 6)),
            head.front(_eye_outline(1, state.blink, 6)),
            *map(head.front, _mouth(state)),
            head.front(pupils),
        ]
    )


def pose_of(puppet: Puppet, state: State) -> Pose:
    """The pose that `render` gives, without the picture."""
    bones = _skeleton(puppet, state)
    return _pose(puppet, state, bones, _face(puppet, state, bones.head))


def _pose(puppet: Puppet, state: State, bones: _Skeleton, face: np.ndarray) -> Pose:
    eyes = bones.head.front([(side * 0.39, -0.07) for side in SIDES])
    ears = bones.head.solid([(side * 0.97, 0.0, -0.1) for side in SIDES])
    limbs = np.stack(
        [bones.shoulders, bones.elbows, bones.wrists, bones.hips, bones.knees, bones.ankles]
    )  # (6, 2, 2): joint, side, xy
    body = np.concatenate(
        [face[30:31], bones.neck[None], limbs[:3, 0], limbs[:3, 1], limbs[3:, 0], limbs[3:, 1], eyes, ears]
    )
    ear_seen = [_ear_seen(puppet, state, side) for side in SIDES]
    return Pose(
        _scored(body, np.concatenate([np.ones(16), ear_seen])),
        _scored(face),
        left_hand=_scored(bones.hands[1]),
        right_hand=_scored(bones.hands[0]),
    )


def _ear_seen(puppet: Puppet, state: State, side: int) -> bool:
    return puppet.hair_shape not in EAR_COVERING and side * state.turn < 0.25


def _scored(points: np.ndarray, score: np.ndarray | float = 1.0) -> np.ndarray:
    scores = np.broadcast_to(score, len(points))
    return np.concatenate([points, scores[:, None]], axis=1).astype(np.float32)


# ---- How it looks -------------------------------------------------------------------------------


def render(puppet: Puppet, state: State, size: int = 128) -> tuple[np.ndarray, Pose, np.ndarray]:
    """Draw a puppet in a state.

    Returns the frame, uint8 (size, size, 3); its pose, where only ears can have score 0; and the
    mask of the puppet's own pixels, bool (size, size). Outside the mask and its soft edge the frame
    is the puppet's background, the same in every state.
    """
    bones = _skeleton(puppet, state)
    face = _face(puppet, state, bones.head)
    # the background is transparent and everything drawn is opaque: the alpha channel is the mask
    canvas = _draw_background(puppet.background, size * SUPERSAMPLE).copy()
    brush = _Brush(canvas)
    far, near = bones.far_to_near()
    behind = abs(state.body_turn) > 0.4  # then the body hides the far arm
    _draw_back_hair(brush, puppet, bones.head)
    if behind:
        _draw_arm(brush, puppet, bones, far)
    _draw_legs(brush, puppet, bones)
    _draw_torso(brush, puppet, bones)
    _draw_head(brush, puppet, state, bones.head, face)
    for i in (near,) if behind else (far, near):
        _draw_arm(brush, puppet, bones, i)
    frame = np.asarray(canvas.convert("RGB").reduce(SUPERSAMPLE))
    mask = np.asarray(canvas.getchannel("A").reduce(SUPERSAMPLE)) >= 128
    return frame, _pose(puppet, state, bones, face), mask


def clip(
    identity_seed: int, motion_seed: int, frames: int, size: int = 128, dance: str = "facing"
) -> tuple[np.ndarray, list[Pose], np.ndarray]:
    """A dancing puppet: frames uint8 (F, size, size, 3), F poses, masks bool (F, size, size)."""
    puppet = random_puppet(identity_seed)
    drawn = [render(puppet, state, size) for state in motion(motion_seed, frames, dance=dance)]
    images, poses, masks = zip(*drawn)
    return np.stack(images), list(poses), np.stack(masks)


class _Brush:
    """Draws opaque shapes, given in canvas units, on an image."""

    def __init__(self, image: Image.Image):
        self.draw = ImageDraw.Draw(image)
        self.scale = image.width

    def polygon(self, points, rgb: RGB) -> None:
        self.draw.polygon((np.asarray(points) * self.scale).ravel().tolist(), fill=(*rgb, 255))

    def dot(self, centre, radius: float, rgb: RGB) -> None:
        (x, y), r = np.asarray(centre) * self.scale, radius * self.scale
        self.draw.ellipse((x - r, y - r, x + r, y + r), fill=(*rgb, 255))

    def stroke(self, points, width: float, rgb: RGB) -> None:
        pixels = max(1, round(width * self.scale))
        self.draw.line(
            (np.asarray(points) * self.scale).ravel().tolist(),
            fill=(*rgb, 255),
            width=pixels,
            joint="curve",
        )

    def limb(self, points, radii, rgb: RGB, outline: float = 0.0) -> None:
        """A round-ended limb through `points`, as thick at each as its radius says."""
        if outline:
            self.limb(points, [r + outline for r in radii], _shade(rgb, 0.68))
        points = np.asarray(points)
        for a, b, ra, rb in zip(points, points[1:], radii, radii[1:]):
            along = (b - a) / (np.hypot(*(b - a)) + 1e-9)
            normal = np.array([-along[1], along[0]])
            self.polygon([a + ra * normal, b + rb * normal, b - rb * normal, a - ra * normal], rgb)
        for point, radius in zip(points, radii):
            self.dot(point, radius, rgb)


def _shade(rgb: RGB, factor: float) -> RGB:
    """Darker for factors below 1, lighter above."""
    return tuple(min(255, int(c * factor)) for c in rgb)


def _mix(a: RGB, b: RGB, share: float) -> RGB:
    return tuple(int(x + share * (y - x)) for x, y in zip(a, b))


LINE = 0.0035  # width of the darker outline that keeps crossing limbs apart


def _draw_legs(brush: _Brush, puppet: Puppet, bones: _Skeleton) -> None:
    thick = puppet.build
    radii = (0.037 * thick, 0.027 * thick, 0.019 * thick)
    trousers = puppet.lower_garment == "trousers"
    for i in bones.far_to_near():
        leg = [bones.hips[i], bones.knees[i], bones.ankles[i]]
        sole = bones.toes[i]
        brush.limb([bones.ankles[i], sole], (0.018, 0.019), puppet.shoes, LINE)
        if trousers:
            brush.limb(leg, (radii[0], radii[1], radii[2] * 1.15), puppet.lower.rgb, LINE)
        else:
            brush.limb(leg, radii, puppet.skin, LINE)
            brush.limb(
                [_between(leg[1], leg[2], 0.80), leg[2]],
                (radii[2] * 1.1, radii[2]),
                _mix(puppet.shoes, (255, 255, 255), 0.6),
            )
        brush.limb([_between(leg[2], sole, 0.45), sole], (0.018, 0.019), puppet.shoes)
    hem = [_between(bones.hips[i], bones.knees[i], 0.72) for i in range(2)]
    if puppet.lower_garment == "shorts":
        for i in range(2):
            brush.limb([bones.hips[i], hem[i]], (radii[0] * 1.05, radii[0] * 1.08), puppet.lower.rgb, LINE)
    if puppet.lower_garment == "skirt":
        flare = np.array([0.052 * thick, 0.0])
        waist = np.array([0.030 * thick, 0.03])
        skirt = np.array(
            [
                bones.hips[0] - waist,
                bones.hips[1] + waist * (1, -1),
                hem[1] + flare,
                (hem[0] + hem[1]) / 2 + (0, 0.018),
                hem[0] - flare,
            ]
        )
        grown = skirt + LINE * np.sign(skirt - skirt.mean(axis=0))
        brush.polygon(grown, _shade(puppet.lower.rgb, 0.68))
        brush.polygon(skirt, puppet.lower.rgb)
    brush.limb(bones.hips, (radii[0], radii[0]), puppet.lower.rgb)


def _between(a: np.ndarray, b: np.ndarray, share: float) -> np.ndarray:
    return a + share * (b - a)


def _draw_torso(brush: _Brush, puppet: Puppet, bones: _Skeleton) -> None:
    shirt, thick = puppet.shirt.rgb, puppet.build
    down = (bones.pelvis - bones.neck) / puppet.torso
    across = np.array([down[1], -down[0]])
    right, left = bones.shoulders
    slim = np.cos(bones.body_turn)
    # A body is half as deep as it is wide.
    depth = np.hypot(slim, 0.5 * np.sin(bones.body_turn)) / slim

    def edge(share: float) -> tuple[np.ndarray, np.ndarray]:
        """The right and left edge of the shirt, `share` of the way from shoulders to hem."""
        top, hem = puppet.shoulders + 0.012 * thick, puppet.hips + 0.032 * thick
        half = top + (hem - top) * share - 0.012 * np.sin(np.pi * share)
        if puppet.lower_garment == "skirt":
            half -= 0.004
        tilt = (left - right) / (2 * puppet.shoulders) * (1 - share) + across * share * slim
        tilt = tilt * depth
        middle = bones.neck + (0.008 + share * (puppet.torso + 0.002)) * down
        return middle - half * tilt, middle + half * tilt

    sides = [edge(s) for s in np.linspace(0, 1, 6)]
    collar = bones.neck - 0.018 * down
    outline = np.array(
        [
            collar - 0.028 * slim * depth * across,
            collar + 0.028 * slim * depth * across,
            *[e[1] for e in sides],
            *[e[0] for e in sides[::-1]],
        ]
    )
    brush.polygon(
        outline + LINE * np.sign(outline - bones.pelvis + 0.5 * puppet.torso * down), _shade(shirt, 0.68)
    )
    brush.polygon(outline, shirt)
    if puppet.shirt_pattern == "striped":
        for share in np.arange(0.10, 0.98, 0.21):
            (a, b), (c, d) = edge(share), edge(share + 0.095)
            brush.polygon([a, b, d, c], puppet.shirt_accent)
    if puppet.shirt_pattern == "emblem":
        emblem = bones.neck + 0.36 * puppet.torso * down
        emblem = emblem + 0.5 * puppet.shoulders * np.sin(bones.body_turn) * across
        brush.dot(emblem, 0.034, puppet.shirt_accent)
        brush.dot(emblem, 0.016, shirt)
    # neck and neckline
    brush.limb([collar + 0.006 * down, collar + 0.022 * down], (0.030, 0.024), puppet.skin)
    brush.limb([bones.head.centre, collar + 0.016 * down], (0.022, 0.022), _shade(puppet.skin, 0.82))


def _draw_head(brush: _Brush, puppet: Puppet, state: State, head: _Head, face: np.ndarray) -> None:
    skin, line = puppet.skin, _shade(puppet.skin, 0.68)
    unit = puppet.head[0]  # head units to canvas units, for widths and radii
    for side in SIDES:  # the far ear of a turned head vanishes behind the skull by itself
        if puppet.hair_shape not in EAR_COVERING:
            ear = head.solid([(side * 0.97, 0.0, -0.1)])[0]
            brush.dot(ear, 0.20 * unit + LINE, line)
            brush.dot(ear, 0.20 * unit, skin)
    around = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    skull = np.stack([0.97 * np.cos(around), -0.12 + 0.88 * np.sin(around)], axis=1)
    brush.polygon(face[:17] + (0, LINE), line)
    brush.polygon(head.flat(skull * (1 + LINE / unit)), line)
    brush.polygon(face[:17], skin)
    brush.polygon(head.flat(skull), skin)
    if puppet.beard:
        lip = head.front([(0.45, 0.42), (0.2, 0.37), (-0.2, 0.37), (-0.45, 0.42)])
        brush.polygon(np.concatenate([face[2:15], lip]), _shade(puppet.hair.rgb, 0.9))
    else:
        for side in SIDES:
            brush.dot(head.front([(side * 0.55, 0.27)])[0], 0.13 * unit, _mix(skin, (225, 90, 80), 0.22))

    for i, side in enumerate(SIDES):
        brush.polygon(head.front(_eye_outline(side, state.blink, 16)), (252, 252, 250))
        pupil = face[68 + i]
        squeeze = np.array([1, min(1, 1.25 * (1 - state.blink))])
        circle = np.stack([np.cos(around), np.sin(around)], axis=1)
        if state.blink < 0.8:
            brush.polygon(pupil + 0.125 * unit * circle * squeeze, puppet.eyes)
            brush.polygon(pupil + 0.065 * unit * circle * squeeze, (15, 12, 14))
        lid = head.front(_eye_outline(side, state.blink, 16)[:9])
        brush.stroke(lid, 0.065 * unit, (46, 32, 30))
    brow = (70, 50, 40) if puppet.hair_shape == "bald" else _shade(puppet.hair.rgb, 0.72)
    for points in (face[17:22], face[22:27]):
        brush.stroke(points, puppet.brow_width * unit * 1.3, brow)
    brush.stroke(face[28:31], 0.05 * unit, _shade(skin, 0.85))
    brush.stroke(face[31:36], 0.08 * unit, _shade(skin, 0.66))

    brush.polygon(face[48:60], _mix(_shade(skin, 0.8), (190, 50, 60), 0.6))
    brush.polygon(face[60:68], (92, 22, 30))
    if state.mouth > 0.15:  # upper teeth
        biting_edge = _between(face[[63, 62, 61]], face[[65, 66, 67]], 0.35)
        teeth = np.concatenate([face[60:65], biting_edge])
        brush.polygon(teeth, (250, 248, 242))
    if puppet.glasses:
        for side in SIDES:
            rim = head.front(
                np.array((side * 0.40, -0.06)) + 0.30 * np.stack([np.cos(around), np.sin(around)], axis=1)
            )
            brush.stroke([*rim, rim[0]], 0.075 * unit, (38, 38, 46))
        brush.stroke(head.front([(-0.12, -0.10), (0.12, -0.10)]), 0.075 * unit, (38, 38, 46))
    if puppet.hair_shape != "bald":
        _draw_front_hair(brush, puppet, head)


def _draw_front_hair(brush: _Brush, puppet: Puppet, head: _Head) -> None:
    """The cap of hair between the crown's silhouette and the hairline."""
    around = np.linspace(np.pi + 0.12, 2 * np.pi - 0.12, 24)  # picture left over the top to right
    thick = 1.12 if puppet.hair_shape in ("curly", "bob", "long") else 1.07
    crown = np.stack([thick * np.cos(around), -0.05 + thick * np.sin(around)], axis=1)
    if puppet.hair_shape == "spiky":
        crown[1:-1:2] *= 1.16
    x = np.linspace(0.92, -0.92, 9)
    hairline = -puppet.fringe + 0.22 * puppet.parting * x + 0.38 * np.abs(x) ** 3
    shape = np.concatenate([head.flat(crown), head.front(np.stack([x, hairline], axis=1))])
    brush.polygon(shape, puppet.hair.rgb)
    if puppet.hair_shape == "curly":
        for angle in np.linspace(np.pi - 0.35, 2 * np.pi + 0.35, 11):
            curl = head.flat([(1.02 * np.cos(angle), -0.10 + 1.02 * np.sin(angle))])[0]
            brush.dot(curl, 0.27 * puppet.head[0], puppet.hair.rgb)
    shine = np.linspace(np.pi * 1.25, np.pi * 1.5, 7)
    brush.stroke(
        head.flat(np.stack([0.82 * np.cos(shine), -0.05 + 0.88 * np.sin(shine)], axis=1)),
        0.07 * puppet.head[0],
        _mix(puppet.hair.rgb, (255, 255, 255), 0.25),
    )


def _draw_back_hair(brush: _Brush, puppet: Puppet, head: _Head) -> None:
    """What hangs behind head and shoulders, or stands above them."""
    hair, dark, unit = puppet.hair.rgb, _shade(puppet.hair.rgb, 0.78), puppet.head[0]
    if puppet.hair_shape in ("long", "bob"):
        length = 2.1 if puppet.hair_shape == "long" else 0.95
        brush.limb(head.flat([(-0.62, -0.1), (-0.78, length)]), (0.62 * unit, 0.46 * unit), dark)
        brush.limb(head.flat([(0.62, -0.1), (0.78, length)]), (0.62 * unit, 0.46 * unit), dark)
        brush.polygon(head.flat([(-0.9, 0), (0.9, 0), (0.9, length), (-0.9, length)]), dark)
    if puppet.hair_shape == "bun":
        bun = head.flat([(-0.15 * np.sin(head.turn), -1.22)])[0]
        brush.dot(bun, 0.44 * unit, dark)
        brush.dot(bun, 0.36 * unit, hair)
    if puppet.hair_shape == "ponytail":
        # tied at the back: it comes out on the side the face turns away from
        side = -np.sin(head.turn) * 0.9 + (0.55 if puppet.parting > 0 else -0.55)
        tail = head.flat([(side * 0.6, -0.75), (side * 2.0, -0.65), (side * 2.7, 0.2), (side * 2.5, 1.1)])
        brush.limb(tail, [r * unit for r in (0.26, 0.34, 0.32, 0.10)], dark)


def _draw_arm(brush: _Brush, puppet: Puppet, bones: _Skeleton, i: int) -> None:
    thick, skin = puppet.build, puppet.skin
    shoulder, elbow, wrist = bones.shoulders[i], bones.elbows[i], bones.wrists[i]
    radii = (0.026 * thick, 0.020 * thick, 0.0145 * thick)
    brush.limb([shoulder, elbow, wrist], radii, skin, LINE)
    _draw_hand(brush, bones.hands[i], skin)
    # the sleeve covers a share of the way from shoulder to wrist
    upper = puppet.upper_arm / (puppet.upper_arm + puppet.forearm)
    if puppet.sleeve <= upper:
        cuff = _between(shoulder, elbow, puppet.sleeve / upper)
        course, sleeve_radii = [shoulder, cuff], (radii[0] * 1.1, radii[0] * 1.08)
    else:
        cuff = _between(elbow, wrist, (puppet.sleeve - upper) / (1 - upper))
        course = [shoulder, elbow, cuff]
        sleeve_radii = (radii[0] * 1.1, radii[1] * 1.15, radii[2] * 1.25)
    brush.limb(course, sleeve_radii, puppet.shirt.rgb, LINE)


def _draw_hand(brush: _Brush, hand: np.ndarray, skin: RGB) -> None:
    line = _shade(skin, 0.68)
    knuckles = hand[[5, 9, 13, 17]]
    palm = np.concatenate([_between(hand[[0]], hand[[1]], 0.6), hand[[1]], knuckles])
    fingers = [hand[[5 + 4 * f, 6 + 4 * f, 7 + 4 * f, 8 + 4 * f]] for f in range(4)]
    fingers.append(hand[[1, 2, 3, 4]])
    for finger in fingers:
        brush.limb(finger, (0.0096, 0.0094, 0.0091, 0.0086), line)
    for point in palm:
        brush.dot(point, 0.0125, line)
    for finger in fingers:
        brush.limb(finger, (0.0073, 0.0071, 0.0068, 0.0063), skin)
    brush.polygon(np.concatenate([hand[[0, 1]], knuckles]), skin)
    for point in palm:
        brush.dot(point, 0.0100, skin)


@lru_cache(maxsize=256)
def _draw_background(background: Background, side: int) -> Image.Image:
    """The transparent (alpha 0) background, RGBA, side x side pixels."""
    rng = np.random.default_rng(background.seed)
    a, b, c = background.colours
    image = Image.new("RGB", (side, side), a)
    draw = ImageDraw.Draw(image)

    def box(left: float, top: float, right: float, bottom: float, rgb: RGB) -> None:
        draw.rectangle([side * v for v in (left, top, right, bottom)], fill=rgb)

    if background.kind == "gradient":
        ramp = np.linspace(0, 1, side)[:, None, None]
        image = Image.fromarray(
            np.broadcast_to(a + ramp * np.subtract(b, a), (side, side, 3)).astype(np.uint8)
        )
    elif background.kind in ("room", "window"):
        floor = rng.uniform(0.70, 0.85)
        box(0, floor, 1, 1, b)
        box(0, floor - 0.012, 1, floor + 0.008, _shade(b, 0.75))
        left = rng.uniform(0.03, 0.62)
        if background.kind == "window":
            box(left, 0.1, left + 0.34, 0.5, _shade(c, 0.7))
            for x in (0.02, 0.18):
                for y in (0.12, 0.31):
                    box(left + x, y, left + x + 0.14, y + 0.17, _mix(c, (190, 225, 250), 0.6))
    elif background.kind == "stripes":
        count, start = rng.integers(4, 9), rng.uniform(0, 0.1)
        slant = rng.uniform(-0.3, 0.3)
        for i in range(-4, 2 * count + 4, 2):
            x, w = start + i / (2 * count), 1 / (2 * count)
            corners = (x, 0, x + w, 0, x + w + slant, 1, x + slant, 1)
            draw.polygon([side * v for v in corners], fill=b)
    elif background.kind == "shapes":
        for rgb in (b, c, b, c, b):
            x, y, r = rng.uniform((0, 0, 0.06), (1, 1, 0.2))
            if rng.random() < 0.5:
                draw.ellipse([side * v for v in (x - r, y - r, x + r, y + r)], fill=rgb)
            else:
                box(x - r, y - r, x + r, y + r, rgb)
    elif background.kind == "noise":
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6), dtype=np.uint8))
        share = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))[..., None] / 255
        image = Image.fromarray((a + share * np.subtract(b, a)).astype(np.uint8))
    image.putalpha(0)
    return image
