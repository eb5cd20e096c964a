"""The pictures to show behind poses while they are edited."""

import subprocess
from pathlib import Path

import imageio_ffmpeg

from poses.pose import place_pose, pose_distance
from poses.source import Driver, read_driver
from video import IMAGES, VIDEOS_WRITTEN, by_number, count_frames, cover

WIDEST = 1280  # pixels


def pictures_of(clip: Path, folder: Path) -> list[Path]:
    """The images of a clip; those of a video are put into `folder`. Raises OSError for what shows nothing."""
    count = count_frames(clip)
    if clip.is_dir():
        return sorted((f for f in clip.iterdir() if f.suffix.lower() in IMAGES), key=by_number)
    if clip.suffix.lower() in IMAGES:
        return [clip]
    print(f"{clip}: reading {count} frames ...", flush=True)
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-nostdin",
        "-v",
        "quiet",
        "-i",
        clip.resolve(),
        "-map",
        "0:V:0",
    ]
    smaller = ["-vf", f"scale='min({WIDEST},iw)':-2", "-fps_mode", "passthrough", "-q:v", "3"]
    subprocess.run([*command, *smaller, folder / "%06d.jpg"], check=False)
    return sorted(folder.glob("*.jpg"))


def beside(poses: Path) -> Path | None:
    """The video that poses are of, by their name: dance.poses.json is of dance.mp4."""
    stem = poses.name.removesuffix(".json").removesuffix(".poses")
    videos = (poses.with_name(stem + ending) for ending in VIDEOS_WRITTEN)
    return next((video for video in videos if video.is_file()), None)


def frames_of_run(run: Path, driver: Driver) -> list[Path]:
    """For each pose the training frame that is closest to it, as the paper selects its reference."""
    if not (run / "frames.poses.json").is_file():
        raise FileNotFoundError(f"{run}: no run; make one with: python train.py CLIP")
    known, images = read_driver(run / "frames.poses.json", "json"), pictures_of(run / "frames", run)
    placement = cover(*driver.canvas, *known.canvas).placement
    placed = [place_pose(pose, *placement) for pose in driver.poses]
    closest = (
        min(range(known.total), key=lambda i: pose_distance(known.poses[i], pose)) for pose in placed
    )
    return [images[i] for i in closest]
