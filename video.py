"""Frames in and out: read from video and images, fitted to a canvas, written."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image

from safe.encoding import write_h264
from safe.files import replacing
from safe.footage import read_image, read_video, survey

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
VIDEOS_WRITTEN = (".mp4", ".mov")


# ---------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Clip:
    """Frames of a video or of images that are read anew, one at a time, whenever they are iterated over."""

    path: Path
    indices: Sequence[int]  # ascending
    shape: tuple[int, int, int, int]  # (F, H, W, 3), as the array of all frames would have
    fps: float

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[np.ndarray]:
        """The frames, uint8 RGB (H, W, 3). Raises OSError, and ValueError for an image of another size."""
        files = _images(self.path)
        if files is None:
            yield from read_video(self.path, self.indices)
            return
        for index in self.indices:
            frame = read_image(files[index])
            if frame.shape != self.shape[1:]:
                first = f"{files[0].name} has {self.shape[2]}x{self.shape[1]}"
                differs = f"{frame.shape[1]}x{frame.shape[0]} pixels, but {first}"
                raise ValueError(f"{files[index]}: {differs}: the frames of a clip need one size")
            yield frame


def open_clip(path: str | Path, indices: Sequence[int] | None = None) -> Clip:
    """The frames at ascending `indices`, or all, of a video, a folder of images (by their numbers) or one image.

    Videos are read upright, in square pixels and at an even rate. Images have 24 frames per second, and are black
    where they are transparent. Prints a line for a video that is cut off or uneven in time.
    Raises FileNotFoundError, OSError for what cannot be decoded, and ValueError for an index outside the clip and
    for frames that are too large or far longer one way than the other.
    """
    path = Path(path)
    if files := _images(path):
        count, (height, width), fps = len(files), read_image(files[0]).shape[:2], 24.0
    else:
        found = survey(path)
        for remark in found.remarks:
            print_once(remark)
        count, height, width, fps = len(found.picks), found.height, found.width, found.fps
    indices = range(count) if indices is None else indices
    for index in indices:
        if not 0 <= index < count:
            raise ValueError(f"{path}: has {count} frames (0 to {count - 1}), so no frame {index}")
    return Clip(path, indices, (len(indices), height, width, 3), fps)


def read_frames(path: str | Path, indices: Sequence[int] | None = None) -> tuple[np.ndarray, float]:
    """Frames as one array, uint8 RGB (F, H, W, 3), at `indices` in any order or all, and frames per second.

    Raises what `open_clip` and `Clip` raise, and MemoryError for more frames than there is memory for.
    """
    clip = open_clip(path, None if indices is None else sorted(set(indices)))
    indices = clip.indices if indices is None else indices
    # Not at the top: it imports torch, which takes seconds.
    from safe.room import require_memory_for_footage

    require_memory_for_footage(clip.path, shape := (len(indices), *clip.shape[1:]))
    frames = np.empty(shape, np.uint8)
    for index, frame in zip(clip.indices, clip):
        frames[np.equal(indices, index)] = frame
    return frames, clip.fps


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

    def checked() -> Iterator[np.ndarray]:
        for frame in chain([first], frames):
            if frame.shape != (*first.shape[:2], 3) or frame.dtype != np.uint8:
                wanted = f"uint8 {(*first.shape[:2], 3)}"
                raise ValueError(f"{path}: frames must be {wanted}, not {frame.dtype} {frame.shape}")
            yield frame

    with replacing(path) as unfinished:
        write_h264(unfinished, checked(), fps, comment)


def save_image(path: str | Path, image: Image.Image | np.ndarray, **options) -> None:
    """Writes a picture, PIL or uint8 RGB (H, W, 3), in the format that the extension names, as PIL does."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    with replacing(Path(path)) as unfinished:
        image.save(unfinished, **options)
