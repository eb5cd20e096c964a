"""Writes videos with libav, whose errors become OSErrors."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Colorspace

from safe.footage import converter, decode, open_video


def write_h264(path: Path, frames: Iterable[np.ndarray], fps: float, comment: str) -> None:
    """Writes frames, uint8 RGB (H, W, 3) each and at least one, as H.264 with a comment. Raises OSError."""
    rate, written = Fraction(fps).limit_denominator(2**16), 0
    with opened_for_writing(path) as out:
        out.metadata["comment"] = comment
        for written, frame in enumerate(frames, start=1):
            height, width = frame.shape[:2]
            even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            picture = av.VideoFrame.from_ndarray(even)
            if written == 1:
                size = {"width": picture.width, "height": picture.height}
                to_yuv = converter(picture, "yuv420p", **size)
                stream = out.add_stream("libx264", rate, {"crf": "16"}, **size)
                # The colour matrix is named in the file, because players guess it otherwise.
                stream.codec_context.colorspace = Colorspace.ITU709
                stream.codec_context.thread_type = "AUTO"  # frames side by side: slices would cost quality
            picture = to_yuv(picture)
            picture.pts, picture.time_base = written - 1, 1 / rate
            out.mux(stream.encode(picture))
        out.mux(stream.encode())
    # libav says nothing when the disk fills up at the very end.
    with open_video(path) as (container, stream):
        arrived = sum(1 for _ in decode(container, stream, True, []))
    if arrived != written:
        raise OSError(f"{path}: could not be written whole; is the disk full?")


@contextmanager
def opened_for_writing(path: Path) -> Iterator[av.container.OutputContainer]:
    """An MP4 or MOV file whose index will stand in front. Raises OSError, with the system's number if any."""
    try:
        with av.open(str(path.resolve()), "w", options={"movflags": "faststart"}) as out:
            yield out
    except av.FFmpegError as error:
        if isinstance(error, OSError):
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from None
        raise OSError(f"{path}: could not be written ({error.strerror})") from None
