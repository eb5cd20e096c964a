"""The sound of a video that is followed, laid under the one that is made."""

import subprocess
from pathlib import Path

import imageio_ffmpeg

from safe.files import replacing


def has_sound(path: str | Path) -> bool:
    """Whether this is a video with a sound track."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-i", str(Path(path).resolve())]
    command += ["-map", "0:a:0", "-c", "copy", "-t", "0", "-f", "null", "-"]
    return Path(path).is_file() and not subprocess.run(command, capture_output=True).returncode


def add_sound(path: str | Path, source: str | Path, start: float, seconds: float) -> None:
    """Lays `seconds` of another video's sound, from `start` on, under a silent video, in place.

    Raises OSError when ffmpeg cannot, and then leaves the video as it was.
    """
    silent, source_file = (Path(file).resolve() for file in (path, source))
    with replacing(Path(path)) as unfinished:
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", "-i", silent]
        command += ["-ss", start, "-i", source_file, "-map", "0:v", "-map", "1:a:0", "-t", seconds]
        command += ["-c:v", "copy", "-c:a", "aac", "-movflags", "+faststart", unfinished]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.splitlines() or ["no reason given"])[-1]
            raise OSError(f"{source}: its sound could not be copied ({reason})")
