"""Before a long wait, a line says what is waited for, and about how long."""

import time
from collections.abc import Callable, Iterable, Sized
from itertools import islice
from pathlib import Path

import numpy as np

from poses.pose import Pose

LONG = 300  # frames; for fewer the progress bar will do
PARTS_COST = 30  # times as long as for the body takes looking for hands and face


def announce(
    path: Path,
    frames: Iterable[np.ndarray] | Sized,
    whole: int,
    find_bodies: Callable[[np.ndarray], list[list[Pose]]],
    find_parts: Callable[[np.ndarray, Pose], Pose],
) -> None:
    """Prints in how many frames OpenPose will look for people, and in how many for hands and faces, `whole`.

    For a long clip it looks at the first frame, uint8 RGB (H, W, 3), to say about how long all will take.
    """
    told = f"{path}: looking for people in {len(frames)} frames, for hands and faces in {whole}"
    if len(frames) > LONG:
        (frame,) = islice(frames, 1)
        find_bodies(frame[None])  # the first time is longer than the others
        (people,), body = timed(find_bodies, frame[None])
        parts = timed(find_parts, frame, people[0])[1] if people and whole else PARTS_COST * body
        told += f", which takes {in_time(len(frames) * body + whole * parts)}"
    print(told, flush=True)


def timed(function: Callable, *arguments: object) -> tuple:
    """What a function returns, and the seconds that it takes."""
    start = time.perf_counter()
    return function(*arguments), time.perf_counter() - start


def in_time(seconds: float) -> str:
    if seconds > 5400:
        return f"about {seconds / 3600:.1f} hours"
    return f"about {max(1, round(seconds / 60))} minutes"
