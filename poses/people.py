"""Who is who in a sequence of frames, and what is done about frames in which somebody is not found."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from poses.pose import Pose, has_person, is_seen

LONGEST_GAP = 5  # frames that are interpolated; longer gaps stay
INTERPOLATED = 0.04  # the score of interpolated keypoints: below any that a network gives


@dataclass(eq=False)
class Track:
    """One person as far as followed. Bodies (18, 3) are in units of the frame's height."""

    frames: list[int]
    bodies: list[np.ndarray]
    people: list[Pose]

    def distance(self, body: np.ndarray, frame: int) -> float:
        """How far a body lies from where this one should be, if it goes on as it did, in sizes of this one."""
        recent, frames = self.bodies[-6:], self.frames[-1] - self.frames[-6:][0]
        both, expected = is_seen(recent[-1]) & is_seen(recent[0]), recent[-1].copy()
        if frames and both.any():
            velocity = (recent[-1] - recent[0])[both, :2].mean(axis=0) / frames
            expected[:, :2] += velocity * min(frame - self.frames[-1], 12)
        both = is_seen(body) & is_seen(expected)
        if both.any():
            apart = np.linalg.norm((body - expected)[both, :2], axis=1).mean()
        else:  # of their centres
            centres = (each[is_seen(each), :2].mean(axis=0) for each in (body, expected))
            apart = np.linalg.norm(np.subtract(*centres))
        return apart / max(*map(extent, recent), 1e-3)


def extent(body: np.ndarray) -> float:
    """The longer side of the box around what is seen."""
    return float(np.ptp(body[is_seen(body), :2], axis=0).max())


def follow_people(people: Sequence[Sequence[Pose]], aspect: float) -> list[Track]:
    """Who is who: the people of every frame, linked through time, the most prominent first.

    Whoever is nearest to where a known person is expected is linked first, so two who cross keep their identities.
    Prominent is who has a large body (the area of its box) and a high mean score. `aspect` is width over height.
    """
    tracks: list[Track] = []
    for frame, in_frame in enumerate(people):
        new = [(pose, pose.body * np.float32([aspect, 1, 1])) for pose in in_frame if has_person(pose)]
        pairs = []
        for track in tracks:
            # In sizes of the body: a leap from one frame to the next, then a walk out of sight.
            reach = 0.4 + 0.05 * (frame - track.frames[-1])
            distances = enumerate(track.distance(body, frame) for _, body in new)
            pairs += [(apart, index, track) for index, apart in distances if apart < reach]
        linked: dict[int, Track] = {}
        for _, index, track in sorted(pairs, key=lambda pair: pair[0]):
            if index not in linked and track not in linked.values():
                linked[index] = track
        for index, (pose, body) in enumerate(new):
            if index not in linked:
                tracks.append(linked.setdefault(index, Track([], [], [])))
            track = linked[index]
            track.frames.append(frame)
            track.bodies.append(body)
            track.people.append(pose)

    def prominence(track: Track) -> float:
        seen = [body[is_seen(body)] for body in track.bodies]
        return sum(np.ptp(body[:, :2], axis=0).prod() * body[:, 2].mean() for body in seen)

    return sorted(tracks, key=prominence, reverse=True)


def follow_one(people: Sequence[Sequence[Pose]], aspect: float, person: int = 1) -> list[Pose]:
    """One person's pose in every frame, empty where they are not: the `person`-th of `follow_people`.

    Raises ValueError where there are fewer people.
    """
    tracks = follow_people(people, aspect)
    if not 1 <= person <= len(tracks):
        raise ValueError(f"no person {person}: {len(tracks)} found, 1 being the most prominent")
    seen = dict(zip(tracks[person - 1].frames, tracks[person - 1].people))
    return [seen.get(frame, Pose()) for frame in range(len(people))]


def follow_given(people: Sequence[Sequence[Pose]], aspect: float, person: int = 1) -> list[Pose]:
    """`follow_one` for poses that somebody gave. Short gaps are bridged, what is there stays as it is.

    Where nobody else is there, all are the same person's, however far they leap, as over a cut. Keypoints that are
    missing in a frame with the person stay missing: they may have been taken out on purpose.
    """
    real = [[pose for pose in in_frame if has_person(pose)] for in_frame in people]
    if person == 1 and all(len(in_frame) < 2 for in_frame in real):
        poses = [(known or list(given) or [Pose()])[0] for known, given in zip(real, people)]
    else:
        poses = follow_one(real, aspect, person)
    return [pose if has_person(pose) else between for pose, between in zip(poses, fill_gaps(poses))]


def stacked_parts(poses: Sequence[Pose]) -> list[np.ndarray]:
    """Body, face and hands of all frames, (F, K, 3) each."""
    return [np.stack(parts) for parts in zip(*(vars(pose).values() for pose in poses))]


def fill_gaps(poses: Sequence[Pose]) -> list[Pose]:
    """Interpolates keypoints that are missing for up to `LONGEST_GAP` frames, with the score `INTERPOLATED`."""
    filled = []
    for part in stacked_parts(poses):
        filled.append(part.copy())
        for (keypoint, a), (same, b) in pairwise(np.argwhere(part[..., 2].T > 0)):
            if keypoint == same and 1 < b - a <= LONGEST_GAP + 1:
                way = np.arange(1, b - a)[:, None] / (b - a)
                between = (1 - way) * part[a, keypoint] + way * part[b, keypoint]
                filled[-1][a + 1 : b, keypoint] = between * (1, 1, 0) + (0, 0, INTERPOLATED)
    return [Pose(*parts) for parts in zip(*filled)]


def smooth_poses(poses: Sequence[Pose], reach: int = 3) -> list[Pose]:
    """Takes the jitter out of keypoints: each moves onto the parabola through those up to `reach` frames away.

    That removes 42 % of independent noise and leaves 97 % of a swing of 2 Hz at 24 frames per second (Savitzky and
    Golay, 1964).
    """
    offsets = np.arange(-reach, reach + 1)
    powers = np.stack([np.ones_like(offsets), offsets, offsets**2], axis=1)
    weights = np.zeros((2 ** len(offsets), len(offsets)), np.float32)  # for every pattern of gaps
    for pattern in range(len(weights)):
        seen = (pattern >> np.arange(len(offsets))) % 2 == 1
        if seen[reach]:
            weights[pattern, seen] = np.linalg.pinv(powers[seen])[0]

    smoothed = []
    for part in stacked_parts(poses):
        padded = np.pad(part, ((reach, reach), (0, 0), (0, 0)))
        windows = np.stack([padded[i : i + len(part)] for i in range(len(offsets))])  # (7, F, K, 3)
        patterns = ((windows[..., 2] > 0) << np.arange(len(offsets))[:, None, None]).sum(axis=0)
        points = np.einsum("fkw,wfkc->fkc", weights[patterns], windows[..., :2])
        smoothed.append(np.concatenate([points, part[..., 2:]], axis=2))
    return [Pose(*parts) for parts in zip(*smoothed)]
