"""The poses to follow, from whatever the user has: a JSON file, footage of anyone, a drawn skeleton."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from poses.pose import Pose, load_poses, read_canvas, save_poses
from video import count_frames, open_clip, read_frames


@dataclass(frozen=True)
class Driver:
    """A sequence of poses, canvas-normalised, and what its source says beside them."""

    poses: list[Pose]  # of the frames `within`
    within: range
    total: int  # frames in the whole source
    canvas: tuple[int, int] | None  # (height, width); a JSON file may not say
    fps: float | None  # frames per second; a JSON file does not say


def read_driver(
    path: Path,
    kind: str | None = None,
    within: range | None = None,
    model: str = "sd15",
    cache: Path | None = None,
    person: int = 1,
    smooth: bool = False,
    whole_bodies: int | None = None,
    canvas: tuple[int, int] | None = None,
) -> Driver:
    """Reads the poses of the frames `within` (default: all) of a JSON file, or of a video or images.

    kind: one of `command.KINDS`; None finds out
    model, person, smooth: for footage, as `load_openpose` and `find_poses` take them
    cache: the folder that keeps what was found in footage
    whole_bodies: hands and face, which take most of the time, are found in so many frames of footage, uniformly
    canvas: (height, width) in pixels of the video that a JSON file without a canvas of its own was found in

    Raises FileNotFoundError, OSError and ValueError, naming the file and what is wrong with it.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; poses are JSON, a video or images")
    if kind is None and (path.suffix.lower() == ".json" or (path.is_dir() and any(path.glob("*.json")))):
        kind = "json"
    poses = load_poses(path, *(canvas or (None, None))[::-1]) if kind == "json" else None
    total = count_frames(path) if poses is None else len(poses)
    within = within or range(total)
    if within.stop > total:
        raise ValueError(f"{path}: has {total} frames, so no frames {within.start}:{within.stop}")
    if poses is not None:
        refuse_choice(path, kind, person)
        return Driver(poses[within.start : within.stop], within, total, read_canvas(path) or canvas, None)

    frames = open_clip(path, within)
    canvas, fps = frames.shape[1:3], frames.fps
    if kind != "video":
        # Not at the top: whoever follows JSON, the shortest road, needs neither this nor torch and `openpose`.
        from poses.drawn import is_drawn, read_drawn_clip

        if kind == "drawn" or is_drawn(read_frames(path, within[:: max(1, len(within) // 16)])[0]):
            refuse_choice(path, "drawn", person)
            return Driver(read_drawn_clip(path, read_frames(path, within)[0]), within, total, canvas, fps)

    asked = (fingerprint(path), str(within), model, person, smooth, whole_bodies)
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]
    found = cache and cache / f"{path.stem}.{digest}.poses.json"
    if found and found.exists():
        return Driver(load_poses(found), within, total, canvas, fps)
    from openpose import find_in_footage

    whole = uniform_frames(range(len(frames)), whole_bodies or len(frames))
    poses = find_in_footage(path, frames, model, person, whole, smooth)
    if found:
        cache.mkdir(parents=True, exist_ok=True)
        save_poses(found, poses, canvas[1], canvas[0])
        poses = load_poses(found)  # rounded, as the next run will read them
    return Driver(poses, within, total, canvas, fps)


def refuse_choice(path: Path, kind: str, person: int) -> None:
    if person != 1:
        taken = f"of {kind} poses the most prominent person is taken, so leave only those you mean"
        raise ValueError(f"{path}: --person {person} chooses between people in footage; {taken}")


def uniform_frames(within: range, number: int) -> list[int]:
    """`number` frames of a range, evenly spaced from its first to its last."""
    return np.linspace(within.start, within.stop - 1, number).round().astype(int).tolist()


def fingerprint(path: Path) -> list:
    """What changes when the file, or a file in the folder, does."""
    files = sorted(path.iterdir()) if path.is_dir() else [path.resolve()]
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
