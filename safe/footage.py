"""Reads pictures and surveys videos without trust: says what is wrong before anything is made of them."""

import re
import subprocess
import warnings
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageOps

LONGEST_ASPECT = 16  # beyond it pictures show nobody, and enlarged for a network they take for ever
UNEVEN = 1.5  # times the shortest gap between two frames is more than jitter


@dataclass(frozen=True)
class Survey:
    count: int  # frames that can be decoded
    remarks: list[str]  # what a user should know before these are taken for the whole


def survey(path: Path) -> Survey:
    """Decodes a video once and counts its frames. Raises OSError for what cannot be decoded."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-hide_banner", "-v", "level+info"]
    # ffmpeg would take what stands before a colon in a relative path for a protocol.
    command += ["-i", path.resolve(), "-map", "0:v:0", "-fps_mode", "passthrough"]
    command += ["-enc_time_base", "demux", "-f", "framecrc", "-"]  # a line for each frame, with its time
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, errors="replace")
    lines = done.stdout.splitlines()
    times = sorted(int(line.split(",")[2]) for line in lines if line[0] != "#")
    if not times:
        raise OSError(f"{path}: not a readable video, or one without frames")
    remarks, rate = [], re.search(r"Output #0.*? ([\d.]+)(k?) fps", done.stderr, re.S)
    if re.search(r"^\[[^]]*\] \[error\]", done.stderr, re.M):  # in the middle it may be the file's name
        stated = re.search(r"Duration: (\d+):(\d+):([\d.]+)", done.stderr)
        missing = 0
        if stated and rate:
            hours, minutes, seconds = map(float, stated.groups())
            fps = float(rate[1]) * (1000 if rate[2] else 1)
            missing = round((3600 * hours + 60 * minutes + seconds) * fps) - len(times)
        those = f"about {missing} frames are missing" if missing > 0 else "some may be missing"
        advice = "get a whole copy, or go on with these"
        remarks.append(f"{path}: cut off or damaged: {len(times)} frames can be read, {those}; {advice}")
    elif len(times) > 2:
        gaps = [after - before for before, after in pairwise(times)]
        if max(gaps) > UNEVEN * min(gaps) + 1:  # in units that may be coarse, so one more is rounding
            remarks.append(
                f"{path}: its frames are not evenly spaced in time; they are taken as if they were"
            )
    return Survey(len(times), remarks)


def check_aspect(path: Path, width: int, height: int) -> None:
    """Raises ValueError for a picture that is far longer one way than the other."""
    if max(width, height) > LONGEST_ASPECT * min(width, height):
        raise ValueError(
            f"{path}: {width}x{height} pixels are too long and narrow to show a person; crop it"
        )


def read_image(path: Path) -> np.ndarray:
    """One image as uint8 RGB (H, W, 3), upright."""
    bomb = Image.DecompressionBombWarning
    try:
        with warnings.catch_warnings(action="error", category=bomb), Image.open(path) as image:
            check_aspect(path, *image.size)
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip, not scale
                image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
            image = image.convert("RGBA")
    # SyntaxError is PIL's word for a broken PNG.
    except (OSError, SyntaxError, bomb, Image.DecompressionBombError) as error:
        raise OSError(f"{path}: not a readable image ({error})") from None
    black = Image.new("RGBA", image.size, "black")
    return np.asarray(Image.alpha_composite(black, image).convert("RGB"))
