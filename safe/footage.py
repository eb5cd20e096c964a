"""Reads pictures and videos without trust: says what is wrong before anything is made of them."""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition
from PIL import Image, ImageOps

from safe.files import mistaken

LONGEST_ASPECT = 16  # beyond it pictures show nobody, and enlarged for a network they take for ever
MOST_PIXELS = 2**26  # of a video's frame: twice 8K
DECODING_THREADS = 4  # each holds a frame of its own
NO_VIDEO = "not a readable video, or one without pictures"
NO_FOOTAGE = ("tty", "concat", "hls", "dash")  # texts, which libav would paint or follow to other files
# By default libav rounds down and repeats colour samples between YUV and RGB: a frame that is written and read
# would come back one grey level darker, with coloured edges off by many.
EXACT_COLOUR = "bicubic+accurate_rnd+full_chroma_int"

# ---- What is in a video, and when ---------------------------------------------------------------

COMMON_RATES = (24, 25, 30, 50, 60, 24000 / 1001, 30000 / 1001, 60000 / 1001)  # frames per second
UNEVEN = 0.75  # frames that are stored farther from their even times, in frames, are not taken as they are
ENDS_EARLY = 0.25  # seconds by which whole files are shorter than they say
STATES_LENGTH = ("mov", "matroska", "avi")  # of other containers libav guesses how long they should be


@dataclass(frozen=True)
class Survey:
    """What can be read of a video."""

    height: int  # upright, of square pixels
    width: int
    turned: bool  # rows are stored as columns
    flips: tuple[int, ...]  # axes that are then turned round
    fps: float
    picks: Sequence[int]  # for each frame that is read, which of the stored frames it is
    start: float  # seconds in the file's own time at which the first frame is shown
    whole: bool  # nothing in it is damaged
    remarks: tuple[str, ...]  # what a user should know before these frames are taken for the whole


def survey(path: Path) -> Survey:
    """Decodes a video, unless that was done before, and says what can be read of it.

    Raises OSError for what cannot be decoded, and ValueError for frames that are too large or too narrow.
    """
    about = os.stat(path)
    return _survey(path, about.st_size, about.st_mtime_ns)


@lru_cache(16)
def _survey(path: Path, *version: int, whole: bool = True) -> Survey:
    times, faults = [], []
    with open_video(path) as (container, stream):
        check_size(path, stream.height, stream.width)  # before a decoder takes memory for it
        for frame in decode(container, stream, whole, faults):
            if not times:
                turned, flips = orientation(frame)
                height, width = shown_size(stream, frame)[:: -1 if turned else 1]
                check_size(path, height, width)
            times.append(frame.pts)
        if not times:
            raise OSError(f"{path}: {NO_VIDEO}")
        unit, stated = stream.time_base, stated_end(container, stream)
        claimed, last = float(stream.average_rate or 0), float(frame.duration * unit)
    if None in times:  # as in raw streams
        times, stated = range(len(times)), None
    seconds = np.maximum.accumulate([float(time * unit) for time in times])
    fps, picks = even_out(seconds - seconds[0], last, claimed)
    remarks = []
    short = stated and (stated - seconds[-1]) * fps >= 1.5 and stated - last_moment(path) > ENDS_EARLY
    if faults or short:
        if whole:  # as was supposed
            return _survey(path, *version, whole=False)
        rate = claimed if 0 < claimed <= 240 else fps
        missing = round((stated - seconds[0]) * rate) - len(times) if stated else 0
        those = f"about {missing} frames are missing" if missing > 0 else "some may be missing"
        advice = "get a whole copy, or go on with these"
        remarks.append(f"{path}: cut off or damaged: {len(times)} frames can be read, {those}; {advice}")
    if picks is None:
        picks = range(len(times))
    else:
        at = f"they are read by their times, at {fps:g} frames per second, which is their average"
        remarks.append(f"{path}: its frames are not evenly spaced in time; {at}")
    return Survey(height, width, turned, flips, fps, picks, float(seconds[0]), whole, tuple(remarks))


def even_out(seconds: np.ndarray, last: float, claimed: float) -> tuple[float, Sequence[int] | None]:
    """The rate of frames stored at times (F,) from 0 on, and which of them to take to have it; None for each once.

    The last frame is shown for `last` seconds, 0 if the file does not say. The rate that a file claims, or a
    common one, is believed where it puts the last frame within a quarter of a frame of its time. The frames of an
    uneven video are those that are shown in the middle of each frame of the average rate.
    """
    count, span = len(seconds), seconds[-1]
    measured = (count - 1) / span if span else 0
    if not 0.1 <= measured <= 1000:  # one frame, or times that cannot be
        return claimed if 0.1 <= claimed <= 240 else 24.0, None
    off = {rate: abs(rate * span - count + 1) for rate in (claimed, *COMMON_RATES)}
    fps = min(off, key=lambda rate: round(off[rate], 1))
    fps = fps if off[fps] < 0.25 else measured
    if np.abs(seconds * fps - np.arange(count)).max() <= UNEVEN:
        return float(fps), None
    span += last if 0 < last < span else 1 / measured
    near = (rate for rate in COMMON_RATES if abs(rate * span / count - 1) < 0.01)
    fps = next(near, round(count / span, 2))
    middles = (np.arange(max(1, round(span * fps))) + 0.5) / fps
    return float(fps), (np.searchsorted(seconds, middles, side="right") - 1).tolist()


def stated_end(container, stream) -> float | None:
    """When a stream should end, in seconds of the file's time, by what the file says; None where it does not."""
    if not container.format.name.startswith(STATES_LENGTH):
        return None
    if stream.duration:
        return float(((stream.start_time or 0) + stream.duration) * stream.time_base)
    return ((container.start_time or 0) + container.duration) / av.time_base if container.duration else None


def last_moment(path: Path) -> float:
    """When the last of all streams ends, in seconds of the file's time."""
    end = 0.0
    with open_video(path) as (container, _), suppress(av.FFmpegError):
        for packet in container.demux():
            if packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
    return end


# ---- Decoding -----------------------------------------------------------------------------------


@contextmanager
def open_video(path: Path) -> Iterator[tuple]:
    """A video's container and its stream of pictures, which is no cover. Raises OSError for what is no video."""
    with path.open("rb") as file:
        if what := mistaken(file.read(64)):
            raise OSError(f"{path}: not a readable video ({what})")
    # A relative path might have a colon, before which libav would see a protocol; and a playlist that is called
    # a video must not lead into the network.
    options = {"protocol_whitelist": "file"}
    try:
        with av.open(str(path.resolve()), options=options, metadata_errors="replace") as container:
            streams = [stream for stream in container.streams.video if stream.codec_context]
            pictures = [stream for stream in streams if not stream.disposition & Disposition.attached_pic]
            if not pictures or container.format.name in NO_FOOTAGE:
                raise OSError(f"{path}: {NO_VIDEO}")
            yield container, pictures[0]
    except av.FFmpegError:
        raise OSError(f"{path}: {NO_VIDEO}") from None


def decode(container, stream, whole: bool, faults: list) -> Iterator[av.VideoFrame]:
    """All frames that can be decoded, in the order in which they are shown. Damage is noted in `faults`.

    Frames are decoded side by side where the file is known to be `whole`: damage to one would cost the others.
    """
    context = stream.codec_context
    context.thread_type, context.thread_count = "AUTO" if whole else "SLICE", DECODING_THREADS
    context.options = {"max_pixels": str(MOST_PIXELS)}  # a frame may be larger than the file's header says
    packets, packet = container.demux(stream), True
    while packet:
        try:
            packet = next((each for each in packets if each.size), None)
        except av.FFmpegError as error:
            packet = faults.append(error)
        try:
            yield from stream.decode(packet)  # without a packet, what the decoder still holds
        except av.FFmpegError as error:
            faults.append(error)


def read_video(path: Path, indices: Sequence[int]) -> Iterator[np.ndarray]:
    """The frames at ascending `indices`, uint8 RGB (H, W, 3), one at a time; none after the last is decoded."""
    found, layout, done = survey(path), None, 0
    with open_video(path) as (container, stream):
        for stored, frame in enumerate(decode(container, stream, found.whole, [])):
            rgb = None
            while done < len(indices) and found.picks[indices[done]] == stored:
                if layout != (layout := (frame.format.name, frame.width, frame.height)):
                    size = (found.height, found.width)[:: 1 if found.turned else -1]
                    to_rgb = converter(frame, "rgb24", *size)
                if rgb is None:
                    rgb = to_rgb(frame).to_ndarray()
                    rgb = rgb.swapaxes(0, 1) if found.turned else rgb
                    rgb = np.ascontiguousarray(np.flip(rgb, found.flips))
                yield rgb
                done += 1
            if done == len(indices):
                return
    raise OSError(f"{path}: frame {indices[done]} can no longer be read; has the file changed?")


def converter(frame: av.VideoFrame, pixels: str, width: int, height: int) -> Callable:
    """Scales frames like this one to a size and a pixel format; YUV comes out in the colour matrix BT.709."""
    graph, like = av.filter.Graph(), {"width": frame.width, "height": frame.height, "format": frame.format}
    nodes = [
        graph.add_buffer(**like, time_base=Fraction(1, 1000)),  # times are not looked at
        graph.add("scale", f"{width}:{height}:out_color_matrix=bt709:flags={EXACT_COLOUR}"),
        graph.add("format", pixels),
        graph.add("buffersink"),
    ]
    graph.link_nodes(*nodes).configure()

    def convert(frame: av.VideoFrame) -> av.VideoFrame:
        graph.push(frame)
        return graph.pull()

    return convert


def shown_size(stream, frame: av.VideoFrame) -> tuple[int, int]:
    """The height and width of a stored frame in square pixels."""
    aspect = float(stream.sample_aspect_ratio or 1)  # of a pixel, width over height
    return round(frame.height / min(aspect, 1)), round(frame.width * max(aspect, 1))


def orientation(frame: av.VideoFrame) -> tuple[bool, tuple[int, ...]]:
    """How a stored frame becomes upright: whether its axes are exchanged, and which are then turned round.

    For one frame of a video: PyAV frees a frame that was asked for its side data late, when garbage is collected.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, ()
    # [a b u; c d v; x y w], where x' = a x + c y and y' = b x + d y (ISO 14496-12, 6.2.2).
    a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32).tolist()
    turned = abs(b) > abs(a)
    x, y = (c, b) if turned else (a, d)
    return turned, tuple(axis for axis, scale in ((0, y), (1, x)) if scale < 0)


# ---- Pictures -----------------------------------------------------------------------------------


def check_size(path: Path, height: int, width: int) -> None:
    """Raises ValueError for a frame that is too large, or far longer one way than the other."""
    if height * width > MOST_PIXELS:
        raise ValueError(f"{path}: frames of {width}x{height} pixels are too large; scale it down")
    if height and width:  # else the frames themselves will say
        check_aspect(path, width, height)


def check_aspect(path: Path, width: int, height: int) -> None:
    """Raises ValueError for a picture that is far longer one way than the other."""
    if max(width, height) > LONGEST_ASPECT * min(width, height):
        told = f"{width}x{height} pixels are too long and narrow to show a person"
        raise ValueError(f"{path}: {told}; crop it")


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
