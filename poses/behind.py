"""The pictures to show behind poses while they are edited."""

from pathlib import Path

from PIL import Image

from poses.pose import pose_distance
from poses.source import Driver, read_driver
from video import VIDEOS_WRITTEN, open_clip

LARGEST = 1280  # pixels of the longer side


def draw_pictures(clip: Path, folder: Path) -> list[Path]:
    """Writes the frames of a clip into a folder, as JPEGs. Raises what reading a clip raises."""
    frames = open_clip(clip)
    files = [folder / f"{number:06d}.jpg" for number in range(len(frames))]
    print(f"{clip}: reading {len(frames)} frames ...", flush=True)
    for file, frame in zip(files, frames):
        image = Image.fromarray(frame)
        image.thumbnail((LARGEST, LARGEST))
        image.save(file, quality=88)
    return files


def beside(poses: Path) -> Path | None:
    """The video that poses are of, by their name: dance.poses.json is of dance.mp4."""
    stem = poses.name.removesuffix(".json").removesuffix(".poses")
    videos = (poses.with_name(stem + ending) for ending in VIDEOS_WRITTEN)
    return next((video for video in videos if video.is_file()), None)


def closest_frames(run: Path, driver: Driver) -> list[int]:
    """For each pose the training frame that is closest to it, counted from 0: the reference that it would have."""
    if not (run / "frames.poses.json").is_file():
        raise FileNotFoundError(f"{run}: no run; make one with: python train.py CLIP")
    known = read_driver(run / "frames.poses.json", "json")
    placed = driver.on_canvas(*known.canvas)
    return [min(range(known.total), key=lambda i: pose_distance(known.poses[i], pose)) for pose in placed]
