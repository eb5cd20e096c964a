"""The measurements of a result, kept apart in one JSON file beside it, `.metrics.json`.

{"result": "dance.mp4", "frames": 48, "frames_sha256": "...", "measurements": [
    {"number": 1, "inputs": {"truth": "/clips/truth.mp4", "range": "0:48"}, "metrics": {"psnr": 27.7},
     "left_out": {"lpips": "needs --truth and --full"}, "by_frame": {"psnr": [27.9, null]},
     "pictures": ["dance.metrics.1.png", "dance.worst.1.png"]}]}

`by_frame` has a value for each frame, null where there is none; flicker and warp error have none for the first.
"""

import hashlib
from pathlib import Path

import numpy as np

from safe.files import read_json, write_json

PICTURES = "metrics", "worst"  # the quality of each frame, and the worst frames


def beside(clip: Path, end: str) -> Path:
    """A file named after a video, or after a folder of frames, whose name may have dots."""
    return clip.with_name((clip.name if clip.is_dir() else clip.stem) + end)


def picture_paths(result: Path, number: int) -> list[Path]:
    """Where the PICTURES of measurement `number` lie."""
    return [beside(result, f".{picture}.{number}.png") for picture in PICTURES]


def read_measurements(result: Path, frames: np.ndarray) -> list[dict]:
    """What was measured of a result with these very frames, uint8 (F, H, W, 3); earlier ones do not count.

    Raises ValueError where something else lies in the place of `.metrics.json`.
    """
    path = beside(result, ".metrics.json")
    if not path.exists():
        return []
    read = read_json(path)
    entries = read.get("measurements") if isinstance(read, dict) else None
    numbered = enumerate(entries, 1) if isinstance(entries, list) else [(1, None)]
    if not all(isinstance(each, dict) and each.get("number") == number for number, each in numbered):
        raise ValueError(f"{path}: holds no measurements as evaluate.py writes them; move it away")
    return entries if read.get("frames_sha256") == hash_of(frames) else []


def number_of(inputs: dict, measured: list[dict]) -> int:
    """The number of the measurement with the same inputs, else the next one, counted from 1."""
    same = [each["number"] for each in measured if each.get("inputs") == inputs]
    return same[0] if same else len(measured) + 1


def write_measurement(result: Path, frames: np.ndarray, measured: list[dict], measurement: dict) -> Path:
    """Writes what was `measured`, with this measurement in its place, by its number. Returns the file's path.

    Pictures of measurements that are in it no longer, because the result is another one, are removed.
    """
    by_number = {each["number"]: each for each in (*measured, measurement)}
    path = beside(result, ".metrics.json")
    about = {"result": result.name, "frames": len(frames), "frames_sha256": hash_of(frames)}
    write_json(path, about | {"measurements": [by_number[number] for number in sorted(by_number)]})
    number = len(by_number) + 1
    while any(each.exists() for each in picture_paths(result, number)):
        for each in picture_paths(result, number):
            each.unlink(missing_ok=True)
        number += 1
    return path


def hash_of(frames: np.ndarray) -> str:
    """The SHA-256 of frames, uint8 (F, H, W, 3)."""
    return hashlib.sha256(np.ascontiguousarray(frames)).hexdigest()
