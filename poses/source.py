"""The poses to follow, from whatever the user has: a JSON file, footage of anyone, a drawn skeleton."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from poses.pose import Pose, load_poses, place_pose, save_poses
from video import Clip, cover, open_clip, read_frames


@dataclass(frozen=True)
class Driver:
    """A sequence of poses, canvas-normalised, and what its source says beside them."""

    poses: list[Pose]  # of the frames `within`
    within: range
    total: int  # frames in the whole source
    canvas: tuple[int, int]  # (height, width)
    fps: float | None  # frames per second; a JSON file does not say

    def on_canvas(self, height: int, width: int) -> list[Pose]:
        """The poses on another canvas, which theirs covers as `cover` has it."""
        placement = cover(*self.canvas, height, width).placement
        return [place_pose(pose, *placement) for pose in self.poses]


def read_driver(
    path: Path,
    kind: str | None = None,
    within: range | None = None,
    model: str = "sd15",
    device: str = "auto",
    cache: Path | None = None,
    person: int = 1,
    smooth: bool = False,
    whole_bodies: int | None = None,
    canvas: tuple[int, int] | None = None,
    length: int | None = None,
) -> Driver:
    """Reads one person's poses in the frames `within` (default: all) of a JSON file, or of a video or images.

    kind: one of `command.KINDS`; None finds out
    person: who is followed, 1 being the most prominent
    model, device, smooth: for footage, as `load_openpose`, `choose_device` and `find_poses` take them
    cache: the folder that keeps what was found in footage
    whole_bodies: hands and face, which take most of the time, are found in so many frames of footage, uniformly
    canvas: (height, width) in pixels of the video that a JSON file without a canvas of its own was found in
    length: how many frames the source must have, give or take two

    Raises FileNotFoundError, OSError and ValueError, naming the file and what is wrong with it.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; poses are JSON, a video or images")
    # Here and below, not at the top: what is read decides what is needed.
    from poses.openpose_json import is_json, read_people

    if kind == "json" or (kind is None and is_json(path)):
        people, canvas = read_people(path, canvas)
        within = check_range(path, within, len(people), length)
        poses = follow(path, people, canvas, person)[within.start : within.stop]
        return Driver(poses, within, len(people), canvas, None)

    total = len(open_clip(path))
    within = check_range(path, within, total, length)
    clip = open_clip(path, within)
    canvas, fps = clip.shape[1:3], clip.fps
    if kind != "video":
        from poses.drawn import is_drawn, read_drawn_people

        if kind == "drawn" or is_drawn(read_frames(path, within[:: max(1, len(within) // 16)])[0]):
            people = read_drawn_people(path, read_frames(path, within)[0])
            return Driver(follow(path, people, canvas, person), within, total, canvas, fps)

    options = model, device, person, smooth, whole_bodies
    if cache is None:
        return Driver(look_for(path, clip, *options), within, total, canvas, fps)
    asked = (fingerprint(path), str(within), model, person, smooth, whole_bodies)
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]
    found = cache / f"{path.stem}.{digest}.poses.json"
    if not found.exists():
        poses = look_for(path, clip, *options)
        cache.mkdir(parents=True, exist_ok=True)
        save_poses(found, poses, canvas[1], canvas[0])
    return Driver(load_poses(found), within, total, canvas, fps)  # rounded, as the next run will read them


def look_for(
    path: Path, clip: Clip, model: str, device: str, person: int, smooth: bool, whole_bodies: int | None
) -> list[Pose]:
    """One person's poses in footage; the options are `read_driver`'s."""
    from openpose import find_in_footage

    whole = uniform_frames(range(len(clip)), whole_bodies or len(clip))
    return find_in_footage(path, clip, model, device, person, whole, smooth)


def check_range(path: Path, within: range | None, total: int, length: int | None) -> range:
    """The frames `within` (default: all) a source of `total` frames, of which there should be `length`, if given.

    Raises ValueError where it does not have them.
    """
    if length and abs(total - length) > 2:  # decoders do not always agree on a video's last frames
        raise ValueError(f"{path}: has {total} frames of poses, but the clip has {length} frames")
    if within and within.stop > total:
        raise ValueError(f"{path}: has {total} frames, so no frames {within.start}:{within.stop}")
    return within or range(total)


def follow(path: Path, people: list[list[Pose]], canvas: tuple[int, int], person: int) -> list[Pose]:
    """`follow_given`. Errors name the `path`."""
    from poses.people import follow_given

    try:
        return follow_given(people, canvas[1] / canvas[0], person)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def uniform_frames(within: range, number: int) -> list[int]:
    """`number` frames of a range, evenly spaced from its first to its last."""
    return np.linspace(within.start, within.stop - 1, number).round().astype(int).tolist()


def fingerprint(path: Path) -> list:
    """What changes when the file, or a file in the folder, does."""
    files = sorted(path.iterdir()) if path.is_dir() else [path.resolve()]
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
