"""How puppets move: a `State` is one moment, and `motion` gives the moments of a dance.

Angles are in radians. 'Right' is the puppet's own right, which is the left of the picture, and pairs are always
(right, left).
"""

from dataclasses import dataclass
from typing import Annotated, get_origin

import numpy as np

Pair = tuple[float, float]  # (right, left)

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

    arms = [ARM_STYLES[rng.integers(len(ARM_STYLES))] for _ in range(2)]
    shoulder, elbow = (np.stack([wave(*reach) for reach in joint], axis=1) for joint in zip(*arms))
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
    for name in ("hop", "mouth"):
        courses[name] = courses[name].clip(0)
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
