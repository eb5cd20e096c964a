"""Small videos as cameras, phones, browsers and music shops make them, for tests."""

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

CODECS = {".webm": ("libvpx", "libopus")}  # of pictures and sound; else H.264 and AAC
RATE = 48_000  # samples per second


def make_video(
    path: Path,
    frames: Sequence[np.ndarray],
    times: Sequence[float],
    sound: np.ndarray | None = None,
    sound_start: float = 0.0,
    claimed: int = 30,
    pixel_aspect: Fraction | None = None,
    pixels: str = "yuv420p",
    cover: np.ndarray | None = None,
    codec: str | None = None,
    container: str | None = None,
) -> None:
    """Frames, uint8 (H, W, 3), shown at `times` in seconds, and sound, (samples,) in [-1, 1], from its start on.

    `claimed` is the rate that the file states, `cover` a picture (H, W, 3) that is no frame.
    """
    pictures_codec, sound_codec = CODECS.get(path.suffix, ("libx264", "aac"))
    with av.open(str(path), "w", container) as out:
        stream = out.add_stream(codec or pictures_codec, claimed)
        stream.width, stream.height, stream.pix_fmt = frames[0].shape[1], frames[0].shape[0], pixels
        # In milliseconds, as browsers write them, whatever the rate.
        stream.codec_context.time_base = Fraction(1, 1000)
        if pixel_aspect:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if sound is not None:
            heard = out.add_stream(sound_codec, RATE, layout="mono")
        if cover is not None:
            covering = out.add_stream(
                "mjpeg", 1, width=cover.shape[1], height=cover.shape[0], pix_fmt="yuvj420p"
            )
            covering.disposition = av.stream.Disposition.attached_pic
            out.mux(covering.encode(av.VideoFrame.from_ndarray(cover)))
            out.mux(covering.encode())
        packets = []
        for frame, time in zip(frames, times):
            picture = av.VideoFrame.from_ndarray(frame)
            picture.pts, picture.time_base = round(time * 1000), Fraction(1, 1000)
            packets += stream.encode(picture)
        packets += stream.encode()
        if sound is not None:
            samples = av.AudioFrame.from_ndarray(sound[None].astype(np.float32), "fltp", "mono")
            samples.sample_rate, samples.pts = RATE, round(sound_start * RATE)
            samples.time_base = Fraction(1, RATE)
            packets += [*heard.encode(samples), *heard.encode()]
        out.mux(packets)


def turn(path: Path, a: int, b: int, c: int, d: int) -> None:
    """Gives an MP4's pictures the matrix [a b; c d], by which a phone says how it was held."""
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 4 + 40
    content[start : start + 36] = struct.pack(">9i", *(n << 16 for n in (a, b, 0, c, d, 0, 0, 0)), 1 << 30)
    path.write_bytes(content)


def put_cover_first(path: Path) -> None:
    """Moves an MP4's metadata, which hold the cover, before its tracks: it is found as the first stream."""
    content = path.read_bytes()
    start = content.index(b"moov") + 4
    end = start - 8 + int.from_bytes(content[start - 8 : start - 4], "big")
    boxes, at = [], start
    while at < end:
        size = int.from_bytes(content[at : at + 4], "big")
        boxes.append(content[at : at + size])
        at += size
    boxes.sort(key=lambda box: box[4:8] != b"udta")
    path.write_bytes(content[:start] + b"".join(boxes) + content[end:])


def sound_of(path: Path) -> np.ndarray:
    """The sound of a file, (samples,) in [-1, 1], from its time 0 on."""
    heard = np.zeros(0, np.float32)
    with av.open(str(path)) as container:
        resampler = av.AudioResampler("fltp", "mono", RATE)
        for frame in container.decode(audio=0):
            for part in resampler.resample(frame):
                start = max(0, round(part.pts * part.time_base * RATE))
                heard = np.pad(heard, (0, max(0, start + part.samples - len(heard))))
                heard[start : start + part.samples] = part.to_ndarray()[0]
    return heard
