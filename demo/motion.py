"""How puppets are built, stand and move: a `State` is one moment, and `motion` gives the moments of a dance.

Lengths are in canvas units: 1 is the side of the square canvas, x runs right and y runs down. Angles are in
radians. 'Right' is the puppet's own right, which is the left of the picture, and pairs are always (right, left).
"""

from dataclasses import dataclass
from typing import Annotated, NamedTuple, get_origin

import numpy as np

Pair = tuple[float, float]  # (right, left)

FLOOR = 0.955  # where the soles stand, in canvas units from the top
SIDES = np.array((-1, 1))  # the direction of the picture in which the right and the left side lie
# Ranges of (shoulder, elbow): arms held low, wide, high, or swinging through everything.
ARM_STYLES = (
    ((-0.05, 1.2), (-1.5, 1.0)),
    ((0.5, 2.1), (-0.5, 1.7)),
    ((1.4, 2.85), (-0.4, 1.4)),
    ((0.1, 2.75), (-0.6, 1.5)),
)
CROSSED_ARMS = ((0.05, 0.45), (-2.4, -1.7))  # the same
DANCES = ("facing", "turning", "crossed")  # the camera; to the sides; arms over the chest


@dataclass(frozen=True)
class Build:
    """The lengths of a puppet, with the ranges that `random_puppet` draws them from."""

    build: Annotated[float, 0.85, 1.2]  # thickness of the limbs, 1 on average
    head: Pair  # half-width and half-height
    neck: Annotated[float, 0.014, 0.026]
    # The ranges of torso and arms are shares of the average.
    torso: Annotated[float, 0.95, 1.06]  # from the middle of the hips to the middle of the shoulders
    shoulders: Annotated[float, 0.072, 0.090]  # half the distance between the shoulder joints
    hips: Annotated[float, 0.040, 0.052]  # half the distance between the hip joints
    upper_arm: Annotated[float, 0.95, 1.06]
    forearm: Annotated[float, 0.95, 1.06]
    hand: Annotated[float, 0.104, 0.114]  # from the wrist to the tip of the middle finger
    thigh: float
    shin: float


@dataclass(frozen=True)
class State:
    """How a puppet stands at one moment; all 0 is standing to attention. Dances keep within the ranges."""

    root: Annotated[float, -0.12, 0.12]  # shift of the whole puppet, in canvas widths
    hop: Annotated[float, -0.06, 0.025]  # height of the lower foot above the floor, in canvas heights
    lean: Annotated[float, -0.22, 0.22]  # of the torso, positive towards the right of the picture
    sway: Annotated[float, -0.12, 0.12]  # tilt of the hips, the left one up when positive
    shrug: Annotated[float, -0.12, 0.12]  # tilt of the shoulders against the torso, the same sense
    neck: Annotated[float, -0.28, 0.28]  # tilt of the head against the torso, positive like `lean`
    turn: Annotated[float, -0.45, 0.45]  # of the head about the vertical, positive like `lean`
    nod: Annotated[float, -0.18, 0.22]  # of the head, positive downwards
    shoulder: Pair  # of the upper arm against the torso: 0 hangs, pi/2 points outwards, pi up
    elbow: Pair  # of the forearm against the upper arm, positive onwards in the shoulder's sense
    wrist: Annotated[Pair, -0.5, 0.5]  # of the hand against the forearm, in the same sense
    hip: Pair  # of the thigh against the vertical, positive outwards
    knee: Pair  # of the shin against the thigh, positive back inwards
    foot: Annotated[Pair, 0.3, 1.1]  # of the foot, positive toes outwards
    curl: tuple[tuple[float, ...], tuple[float, ...]]  # from the thumb on: 0 straight, 1 a fist
    spread: Annotated[Pair, 0.12, 0.28]  # angle between neighbouring fingers
    mouth: Annotated[float, -0.3, 1.0]  # 0 closed, 1 wide open
    smile: Annotated[float, -0.4, 1.0]  # -1 sad, 1 happy
    blink: Annotated[float, -1, 1]  # 0 open, 1 closed; see `motion`
    brow: Annotated[float, -0.8, 1.0]  # -1 lowered, 1 raised
    gaze: Annotated[Pair, -0.9, 0.9]  # of both pupils, -1 to 1, right and down in the picture
    body_turn: float = 0.0  # of all but the head about the vertical, positive like `turn`


def motion(seed: int, frames: int, fps: float = 12.0, dance: str = "facing") -> list[State]:
    """The first `frames` states of dance number `seed`; a longer one begins like a shorter one. A dance of another
    kind (one of DANCES) is the same but for its body's turn, or its arms."""
    rng = np.random.default_rng(seed)
    seconds = np.arange(frames) / fps

    def wave(low: float, high: float) -> np.ndarray:
        """A smooth course (frames,) between `low` and `high`: a slow sinusoid with quicker ones."""
        reach = rng.uniform(0.6, 1.0) * (high - low) / 2
        centre = rng.uniform(low + reach, high - reach)
        hertz, phase = rng.uniform((0.15, 0.35, 0.6), (0.4, 0.7, 1.0)), rng.uniform(0, 2 * np.pi, 3)
        turns = np.sin(2 * np.pi * hertz * seconds[:, None] + phase)  # (frames, 3)
        return centre + reach * turns @ (0.66, 0.26, 0.08)

    def waves(*ranges: Pair) -> np.ndarray:
        return np.stack([wave(*each) for each in ranges], axis=1)  # (frames, ranges)

    def both(*reach: float) -> np.ndarray:
        return waves(reach, reach)

    arms = [ARM_STYLES[rng.integers(len(ARM_STYLES))] for _ in range(2)]
    shoulder, elbow = (waves(*joint) for joint in zip(*arms))
    if rng.random() < 0.3:  # some dances are mirrored: both arms do nearly the same
        shoulder[:, 1] = shoulder[:, 0] + wave(-0.15, 0.15)
        elbow[:, 1] = elbow[:, 0] + wave(-0.2, 0.2)
    # Each hand opens and closes as a whole, with a little of each finger's own: (frames, 2, 5).
    curl = both(-0.45, 0.65)[..., None] + np.stack([both(-0.25, 0.25) for _ in range(5)], axis=2)
    hip = both(-0.02, 0.72)
    knee = 0.55 * hip + both(-0.10, 0.22)  # a thigh that swings out takes the shin back in
    courses = {"shoulder": shoulder, "elbow": elbow, "curl": curl.clip(0, 1), "hip": hip, "knee": knee}
    for name, kind in State.__annotations__.items():
        if get_origin(kind) is Annotated:
            courses[name] = (wave if kind.__origin__ is float else both)(*kind.__metadata__)
    courses |= {name: courses[name].clip(0) for name in ("hop", "mouth")}
    # The top of a sinusoid raised to a power: short blinks with long pauses.
    courses["blink"] = ((courses["blink"] + 1) / 2) ** 8
    if dance == "turning":
        courses["body_turn"] = wave(-1.1, 1.1)
        courses["turn"] = 0.5 * courses["turn"] + 0.55 * courses["body_turn"]
    elif dance == "crossed":
        courses["shoulder"], courses["elbow"] = (both(*reach) for reach in CROSSED_ARMS)
    return [State(**{name: _plain(course[f]) for name, course in courses.items()}) for f in range(frames)]


def _plain(value: np.ndarray) -> float | tuple:
    return tuple(_plain(v) for v in value) if np.ndim(value) else float(value)


def down(angle: float | np.ndarray) -> np.ndarray:
    """The direction (..., 2) that straight down becomes when swung by `angle` towards picture right."""
    return np.stack([np.sin(angle), np.cos(angle)], axis=-1)


def across(angle: float | np.ndarray) -> np.ndarray:
    """The direction (..., 2) that picture right becomes when swung along with `down(angle)`."""
    return np.stack([np.cos(angle), -np.sin(angle)], axis=-1)


class Head(NamedTuple):
    """Places points of the head on the canvas. In their units, head units, it is about the unit ball: x to picture
    right, y down, z to the camera."""

    centre: np.ndarray  # (2,)
    size: Pair  # half-width, half-height
    tilt: float
    turn: float
    nod: float

    def flat(self, points) -> np.ndarray:
        """(N, 2) head units on the head's silhouette, which turning does not move -> (N, 2)."""
        x, y = (np.asarray(points, float) * self.size).T
        return self.centre + np.outer(x, across(-self.tilt)) + np.outer(y, down(-self.tilt))

    def solid(self, points) -> np.ndarray:
        """(N, 3) head units on the head itself, turned and nodded with it -> (N, 2); also (N, 2) head units on the
        front of the face, which are lifted onto the ball."""
        x, y, *depth = np.asarray(points, float).T
        z = depth[0] if depth else np.sqrt(np.clip(1 - x**2 - 0.6 * y**2, 0, 1))
        aside = x * np.cos(self.turn) + z * np.sin(self.turn)
        z = z * np.cos(self.turn) - x * np.sin(self.turn)
        return self.flat(np.stack([aside, y * np.cos(self.nod) + z * np.sin(self.nod)], axis=1))


class Skeleton(NamedTuple):
    """The points of a puppet in a state, in canvas units."""

    pelvis: np.ndarray  # (2,)
    body: np.ndarray  # (18, 2), as in a `Pose`
    toes: np.ndarray  # (2, 2)
    hands: np.ndarray  # (2, 21, 2): right, left
    face: np.ndarray  # (70, 2)
    head: Head


def skeleton(puppet: Build, jaw: float, state: State) -> Skeleton:
    """Where the points of a puppet are; `jaw` runs from 0, pointed, to 1, square."""
    sides = SIDES[:, None]
    hips = sides * puppet.hips * across(state.sway)
    knees = hips + puppet.thigh * down(SIDES * state.hip)
    ankles = knees + puppet.shin * down(SIDES * np.subtract(state.hip, state.knee))
    toes = ankles + ((0, 0.012) + (0.036, 0.008) * down(SIDES * state.foot))
    # The legs decide how high the pelvis is: the lower foot stands on the floor.
    pelvis = np.array([0.5 + state.root, FLOOR - 0.030 - state.hop - ankles[:, 1].max()])

    neck = pelvis - puppet.torso * down(-state.lean)
    shoulders = neck + sides * puppet.shoulders * across(state.shrug - state.lean)
    angle = SIDES * state.shoulder - state.lean
    elbows = shoulders + puppet.upper_arm * down(angle)
    angle = angle + SIDES * state.elbow
    wrists = elbows + puppet.forearm * down(angle)
    hands = hands_of(wrists, angle + SIDES * state.wrist, puppet.hand, state)
    tilt = state.lean + state.neck
    centre = neck - puppet.neck * down(-state.lean) - 0.97 * puppet.head[1] * down(-tilt)

    def turned(points) -> np.ndarray:
        """A paper puppet that turns about its pelvis only becomes narrower."""
        return points - (points - pelvis) * (1 - np.cos(state.body_turn), 0)

    head = Head(turned(centre), puppet.head, tilt, state.turn, state.nod)
    face = _face(jaw, state, head)
    arms, legs = np.stack([shoulders, elbows, wrists], axis=1), np.stack([hips, knees, ankles], axis=1)
    limbs = turned(np.concatenate([[neck], *arms, *(pelvis + legs)]))
    eyes, ears = [(side * 0.39, -0.07) for side in SIDES], [(side * 0.97, 0.0, -0.1) for side in SIDES]
    body = np.concatenate([face[30:31], limbs, head.solid(eyes), head.solid(ears)])
    toes = turned(pelvis + toes) + (0.03 * np.sin(state.body_turn), 0)  # they point forward
    return Skeleton(pelvis, body, toes, turned(hands), face, head)


# Of the fingers from thumb to little: how far along the hand and how far towards the thumb the base sits, and the
# length, all as shares of the hand's length.
ALONG = np.array((0.16, 0.48, 0.52, 0.49, 0.43))
BESIDE = np.array((0.16, 0.21, 0.07, -0.07, -0.20))
LENGTH = np.array((0.42, 0.44, 0.48, 0.44, 0.35))


def hands_of(wrists: np.ndarray, angle: np.ndarray, length: float, state: State) -> np.ndarray:
    """The points (2, 21, 2) of hands that point along `down(angle)`, palms to the camera; angles are (2,)."""
    curl, spread, sides = np.array(state.curl), np.array(state.spread)[:, None], SIDES[:, None]
    towards_thumb = sides * across(angle)
    bases = ALONG[:, None] * down(angle)[:, None] + BESIDE[:, None] * towards_thumb[:, None]  # (2, 5, 2)
    # The thumb stands away from the hand; the others fan out around the middle finger.
    fan = (2 - np.arange(5)) * spread
    fan[:, 0] = 0.75 + spread[:, 0] - 0.7 * curl[:, 0]
    # Seen from the front a curling finger only becomes shorter, then folds back.
    share, joint = np.array((0.45, 0.30, 0.25))[:, None, None], np.arange(1, 4)[:, None, None]
    bones = length * LENGTH * share * np.cos(curl * (0.35, 0.9, 0.9, 0.9, 0.9) * joint)  # (3, 2, 5)
    bones = bones[..., None] * down(angle[:, None] + sides * fan)
    fingers = np.cumsum([wrists[:, None] + length * bases, *bones], axis=0)  # (4, 2, 5, 2)
    return np.concatenate([wrists[:, None], np.moveaxis(fingers, 0, 2).reshape(2, 20, 2)], axis=1)


def eye_outline(side: int, blink: float, points: int) -> np.ndarray:
    """(points, 2) head units around one eye, clockwise from the corner at the picture's left."""
    around = np.pi + 2 * np.pi * np.arange(points) / points
    x, y = side * 0.39 + 0.20 * np.cos(around), -0.07 + 0.165 * (1 - 0.92 * blink) * np.sin(around)
    return np.stack([x, y], axis=1)


def _face(jaw: float, state: State, head: Head) -> np.ndarray:
    """The 70 landmarks (70, 2) of the face in canvas units."""
    around = np.pi * np.arange(17) / 16
    wide = np.sign(np.cos(around)) * np.abs(np.cos(around)) ** (1.05 - 0.35 * jaw)
    chin = np.stack([-0.95 * wide, -0.06 + 1.04 * np.sin(around), 0.3 * np.sin(around)], axis=1)
    t = np.linspace(-1, 1, 5)
    brow = np.stack([0.23 * t, -0.37 - 0.09 * state.brow - 0.07 * (1 - t**2)], axis=1)
    nose = [(0, -0.08, 1.0), (0, 0.04, 1.06), (0, 0.15, 1.12), (0, 0.25, 1.16)]
    nostrils = [(x, 0.33 - 0.3 * abs(x), 1.02) for x in (-0.14, -0.07, 0, 0.07, 0.14)]
    eyes = [eye_outline(side, state.blink, 6) for side in SIDES]
    pupils = [(side * 0.39 + 0.08 * state.gaze[0], -0.06 + 0.04 * state.gaze[1]) for side in SIDES]

    def lip(t: np.ndarray, drop: float) -> np.ndarray:
        width = 0.31 + 0.07 * state.smile - 0.07 * state.mouth
        middle = 0.53 + 0.06 * state.smile + drop - (0.06 * 2 * state.smile + drop) * t**2
        return np.stack([width * t, middle], axis=1)

    outer, inner, gap = np.linspace(-1, 1, 7), np.linspace(-0.8, 0.8, 5), 0.27 * state.mouth
    lips = [lip(outer, -0.075), lip(outer[5:0:-1], gap + 0.095)]
    lips += [lip(inner, -0.015), lip(inner[3:0:-1], gap + 0.015)]
    parts = (chin, brow - (0.40, 0), brow + (0.40, 0), nose, nostrils, *eyes, *lips, pupils)
    return np.concatenate([head.solid(part) for part in parts])
