"""Frames in and out: read from video and images, fitted to a canvas, written."""

import logging
import re
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from PIL import Image

from safe.files import replacing
from safe.footage import check_aspect, read_image, survey

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
VIDEOS_WRITTEN = (".mp4", ".mov")
# By default ffmpeg rounds down and repeats colour samples between YUV and RGB: a frame that is written and read
# would come back one grey level darker, with coloured edges off by many.
EXACT_COLOUR = "bicubic+accurate_rnd+full_chroma_int"


# ---------------------------------------------------------------------------------------- reading


def read_frames(path: str | Path, indices: Sequence[int] | None = None) -> tuple[np.ndarray, float]:
    """The frames of a video, a folder of images (in the order of their numbers) or one image.

    Returns uint8 RGB (F, H, W, 3), the frames at `indices` in that order or all of them, and the frames per second
    (24 for images, and for videos that do not say). Transparency is laid over black. Only the frames asked for are
    held in memory, and none after them is decoded. Raises FileNotFoundError, OSError for what cannot be decoded,
    and ValueError for an index outside the clip, images of different sizes or far longer one way than the other.
    """
    path = Path(path)
    files = _images(path)
    if files is None:
        if indices is None:
            count_frames(path)  # which says what is wrong with it
        return _read_video(path, indices)
    if indices is not None:
        _check_indices(path, indices, len(files))
        files = [files[index] for index in indices]
    frames = [read_image(file) for file in files]
    sizes = [f"{frame.shape[1]}x{frame.shape[0]}" for frame in frames]
    for file, size in zip(files, sizes):
        if size != sizes[0]:
            differs = f"{size} pixels, but {files[0].name} has {sizes[0]}"
            raise ValueError(f"{file}: {differs}: the frames of a clip need one size")
    return np.stack(frames), 24.0


def count_frames(path: str | Path) -> int:
    """How many frames `read_frames` would read. Raises FileNotFoundError and OSError as it does.

    Prints a line for a video that is cut off or uneven in time.
    """
    path = Path(path)
    if (files := _images(path)) is not None:
        return len(files)
    found = survey(path)
    for remark in found.remarks:
        print_once(remark)
    return found.count


print_once = cache(print)


def _images(path: Path) -> list[Path] | None:
    """The image files that a clip consists of; None for a video. Raises FileNotFoundError if nothing is there."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such video, image or folder")
    if not path.is_dir():
        return [path] if path.suffix.lower() in IMAGES else None
    images = (file for file in path.iterdir() if file.suffix.lower() in IMAGES and file.name[0] != ".")
    files = sorted(images, key=by_number)
    if not files:
        raise FileNotFoundError(f"{path}: no images ({', '.join(IMAGES)}) in this folder")
    return files


def _read_video(path: Path, indices: Sequence[int] | None) -> tuple[np.ndarray, float]:
    frames, count, missing = [], 0, set(() if indices is None else indices)
    # Every stored frame once, also where they are not evenly spaced in time, as phones film.
    exactly = ["-sws_flags", EXACT_COLOUR, "-fps_mode", "passthrough"]
    logging.getLogger("imageio_ffmpeg").disabled = True  # it would warn of videos that are to be turned
    try:
        # ffmpeg would take what stands before a colon in a relative path for a protocol.
        with closing(imageio_ffmpeg.read_frames(path.resolve(), output_params=exactly)) as reader:
            about = next(reader)
            check_aspect(path, *about["size"])
            shape = (*about["size"][::-1], 3)
            if indices is not None:
                frames = np.empty((len(indices), *shape), np.uint8)
            for count, pixels in enumerate(reader, start=1):
                frame = np.frombuffer(pixels, np.uint8).reshape(shape)
                if indices is None:
                    frames.append(frame)
                elif count - 1 in missing:
                    frames[np.equal(indices, count - 1)] = frame
                    missing.remove(count - 1)
                    if not missing:
                        break
    except (OSError, RuntimeError, KeyError):
        raise OSError(f"{path}: not a readable video") from None
    if not count:
        raise OSError(f"{path}: a video without frames")
    _check_indices(path, sorted(missing), count)
    return np.asarray(frames), float(about["fps"]) or 24.0  # some streams do not say


def _check_indices(path: Path, indices: Sequence[int], count: int) -> None:
    for index in indices:
        if not 0 <= index < count:
            raise ValueError(f"{path}: has {count} frames (0 to {count - 1}), so no frame {index}")


def by_number(path: Path) -> list:
    """A sorting key for file names that puts frame10 after frame9."""
    texts_and_numbers = re.split(r"([0-9]+)", path.name)
    return [int(part) if index % 2 else part for index, part in enumerate(texts_and_numbers)]


# ---------------------------------------------------------------------------------------- fitting


@dataclass(frozen=True)
class Fit:
    """How frames of one size cover a canvas: a part at their centre is scaled to it."""

    height: int  # of the canvas, in pixels
    width: int
    kept: tuple[float, float, float, float]  # the part's left, top, right and bottom, in source pixels
    # (scale_x, scale_y, left, top) for `pose.place_pose`, from source- to canvas-normalised coordinates:
    # x' = scale_x * x + left, y' = scale_y * y + top
    placement: tuple[float, float, float, float]


def fit(height: int, width: int, size: int, multiple: int) -> Fit:
    """Plans how source frames of height x width cover a canvas whose short side is about `size`.

    Both sides are multiples of `multiple`: the short one nearest to `size`, the long one nearest to the aspect.
    A strip at the edges is lost: black bars would be learned as part of the picture.
    Raises ValueError when `size` is below `multiple`.
    """
    if size < multiple:
        raise ValueError(f"a size of {size} pixels is too small: the least is {multiple}")
    short = round(size / multiple) * multiple
    aspect = max(height, width) / min(height, width)
    long = round(short * aspect / multiple) * multiple
    return cover(height, width, *((long, short) if height > width else (short, long)))


def cover(height: int, width: int, canvas_height: int, canvas_width: int) -> Fit:
    """Plans how source frames of height x width cover a given canvas, all in pixels."""
    scale = max(canvas_height / height, canvas_width / width)
    left = max(0.0, (width - canvas_width / scale) / 2)
    top = max(0.0, (height - canvas_height / scale) / 2)
    kept = left, top, min(width, left + canvas_width / scale), min(height, top + canvas_height / scale)
    x, y = scale / canvas_width, scale / canvas_height
    return Fit(canvas_height, canvas_width, kept, (x * width, y * height, -x * left, -y * top))


def fit_frame(frame: np.ndarray, fit: Fit) -> np.ndarray:
    """The source frame, uint8 (H, W, 3), on canvas: (height, width, 3)."""
    size = fit.width, fit.height
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS, fit.kept))


# ---------------------------------------------------------------------------------------- writing


def write_video(path: str | Path, frames: Iterable[np.ndarray], fps: float, comment: str = "") -> None:
    """Writes frames, uint8 RGB (H, W, 3) each and of one size, as an H.264 video, each as soon as it comes.

    `path` appears, or is replaced, when all are written; else it stays as it was. Odd sizes get their last row or
    column twice: the pixel format that every player knows needs even ones. Raises ValueError for frames of another
    size or type, an unknown extension or no frames at all, and OSError when the file cannot be written.
    """
    path, frames = Path(path), iter(frames)
    if path.suffix.lower() not in VIDEOS_WRITTEN:
        raise ValueError(f"{path}: a video's name must end in {' or '.join(VIDEOS_WRITTEN)}")
    if (first := next(frames, None)) is None:
        raise ValueError(f"{path}: no frames to write")

    (height, width), written, arrived = first.shape[:2], 0, 0
    colour = f"scale=out_color_matrix=bt709:flags={EXACT_COLOUR}"
    with replacing(path) as unfinished:
        writer = imageio_ffmpeg.write_frames(
            unfinished,
            (width + width % 2, height + height % 2),
            fps=fps,
            codec="libx264",
            quality=None,
            macro_block_size=1,
            ffmpeg_log_level="quiet",  # it writes to the screen
            # The colour matrix is named in the file, because players guess it otherwise.
            output_params=["-crf", "16", "-movflags", "+faststart", "-vf", colour]
            + ["-metadata", f"comment={comment}"],
        )
        with closing(writer):
            writer.send(None)  # which starts ffmpeg
            for frame in chain([first], frames):
                if frame.shape != (height, width, 3) or frame.dtype != np.uint8:
                    wanted = f"uint8 ({height}, {width}, 3)"
                    raise ValueError(f"{path}: frames must be {wanted}, not {frame.dtype} {frame.shape}")
                even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
                try:
                    writer.send(even)
                except OSError:
                    raise OSError(
                        f"{path}: could not be written: ffmpeg stopped; is the disk full?"
                    ) from None
                written += 1
        with suppress(OSError):  # ffmpeg says nothing when the disk fills up as it closes the file
            arrived = survey(unfinished).count
        if arrived != written:
            raise OSError(f"{path}: could not be written whole; is the disk full?")


def save_image(path: str | Path, image: Image.Image | np.ndarray, **options) -> None:
    """Writes a picture, PIL or uint8 RGB (H, W, 3), in the format that the extension names, as PIL does."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    with replacing(Path(path)) as unfinished:
        image.save(unfinished, **options)
