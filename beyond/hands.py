"""Hands hang on wrists: where an arm was moved by hand, the hand comes along."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from poses.pose import Pose, is_seen

ARMS = {"left_hand": (6, 7), "right_hand": (3, 4)}  # elbow and wrist of the body
# How far a hand may lie from its wrist. Of 322 hands that OpenPose found in a real dance, all but two are nearer
# than 0.4 forearms; an arm that was moved leaves its hand further behind.
FORGOTTEN = 0.6  # of the forearm's usual length
LIKELY = 0.6, 1.6  # of the forearm's length: how long it may have been when the hand was at its end


def bring_hands(poses: Sequence[Pose], aspect: float) -> tuple[list[Pose], list[int]]:
    """The poses with hands at their wrists, turned as their forearms were, and the frames where one was not.

    aspect: width over height of the canvas. Hands that are a little off, as detectors find them, stay as they are.
    """
    unit, brought = np.array([aspect, 1j]), set()
    poses = list(poses)
    for name, arm in ARMS.items():
        bodies = np.stack([pose.body for pose in poses])[:, arm]
        hands = np.stack([getattr(pose, name) for pose in poses])
        elbows, wrists = (bodies[..., :2] @ unit).T  # complex numbers, x + iy in canvas heights
        seen = (bodies[..., 2] > 0).all(axis=1)
        if not seen.any():
            continue
        usual = np.median(np.abs(wrists - elbows)[seen])
        roots = hands[:, 0, :2] @ unit
        forgotten = seen & (hands[:, 0, 2] > 0) & (np.abs(roots - wrists) > FORGOTTEN * usual)
        for frame in np.flatnonzero(forgotten):
            forearm, old = wrists[frame] - elbows[frame], roots[frame] - elbows[frame]
            likely = LIKELY[0] * abs(forearm) < abs(old) < LIKELY[1] * abs(forearm)
            turn = forearm / old * abs(old / forearm) if likely else 1
            hand = hands[frame].copy()
            points = wrists[frame] + turn * (hand[:, :2] @ unit - roots[frame])
            hand[:, :2] = np.stack([points.real / aspect, points.imag], axis=1)
            hand[~is_seen(hand)] = 0
            poses[frame] = replace(poses[frame], **{name: hand})
            brought.add(int(frame))
    return poses, sorted(brought)
