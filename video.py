"""Frames in and out: read from video and images, fitted to a canvas, written, put on sheets."""

import os
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
VIDEOS_WRITTEN = (".mp4", ".mov")
# By default ffmpeg rounds down and repeats colour samples between YUV and RGB: a frame that is written and read
# would come back one grey level darker, with coloured edges off by many.
EXACT_COLOUR = "bicubic+accurate_rnd+full_chroma_int"


# ---------------------------------------------------------------------------------------- reading


def read_frames(path: str | Path, indices: Sequence[int] | None = None) -> tuple[np.ndarray, float]:
    """The frames of a video, a folder of images (in the order of their numbers) or one image.

    Returns uint8 RGB (F, H, W, 3), the frames at `indices` in that order or all of them, and the frames per second
    (24 for images, and for videos that do not say). Transparency is laid over black. What ffmpeg can decode is a
    video. Only the frames asked for are held in memory, and nothing after the last of them is decoded.
    Raises FileNotFoundError, OSError for what cannot be decoded, and ValueError for an index outside the clip, for
    no indices at all or for images of different sizes.
    """
    path = Path(path)
    if indices is not None and not len(indices):
        raise ValueError(f"{path}: an empty list of frames was asked for")
    files = _images(path)
    if files is None:
        return _read_video(path, indices)
    if indices is not None:
        _check_indices(path, indices, len(files))
        files = [files[index] for index in indices]
    frames = [_read_image(file) for file in files]
    for file, frame in zip(files, frames):
        if frame.shape != frames[0].shape:
            sizes = f"{_size(frame)} pixels, but {files[0].name} has {_size(frames[0])}"
            raise ValueError(f"{file}: {sizes}: the frames of a clip need one size")
    return np.stack(frames), 24.0


def count_frames(path: str | Path) -> int:
    """How many frames `read_frames` would read. Raises FileNotFoundError and OSError as it does."""
    path = Path(path)
    files = _images(path)
    if files is not None:
        return len(files)
    try:
        return imageio_ffmpeg.count_frames_and_secs(path.resolve())[0]
    except RuntimeError:
        raise OSError(f"{path}: not a readable video") from None


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


def _read_image(path: Path) -> np.ndarray:
    """One image as uint8 RGB (H, W, 3), upright."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip, not scale
                image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
            image = image.convert("RGBA")
    # SyntaxError is PIL's word for a broken PNG
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise OSError(f"{path}: not a readable image ({error})") from None
    black = Image.new("RGBA", image.size, "black")
    return np.asarray(Image.alpha_composite(black, image).convert("RGB"))


def _read_video(path: Path, indices: Sequence[int] | None) -> tuple[np.ndarray, float]:
    frames, count, missing = [], 0, set(() if indices is None else indices)
    # Every stored frame once, also where they are not evenly spaced in time, as phones film.
    exactly = ["-sws_flags", EXACT_COLOUR, "-fps_mode", "passthrough"]
    try:
        # ffmpeg would take what stands before a colon in a relative path for a protocol.
        with closing(imageio_ffmpeg.read_frames(path.resolve(), output_params=exactly)) as reader:
            about = next(reader)
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


def _size(frame: np.ndarray) -> str:
    return f"{frame.shape[1]}x{frame.shape[0]}"


# ---------------------------------------------------------------------------------------- fitting


@dataclass(frozen=True)
class Fit:
    """How frames of one size cover a canvas: scaled, then cropped at the centre."""

    height: int  # of the canvas, in pixels
    width: int
    source_height: int
    source_width: int
    scale: float  # canvas pixels per source pixel, the same along both axes
    left: float  # of the part that is kept, in source pixels
    top: float

    @property
    def placement(self) -> tuple[float, float, float, float]:
        """(scale_x, scale_y, left, top) for `pose.place_pose`: x' = scale_x * x + left, y' = scale_y * y + top.

        They lead from source- to canvas-normalised coordinates.
        """
        x, y = self.scale / self.width, self.scale / self.height
        return x * self.source_width, y * self.source_height, -x * self.left, -y * self.top


def fit(height: int, width: int, size: int, multiple: int) -> Fit:
    """Plans how source frames of height x width cover a canvas whose short side is about `size`.

    Both sides are multiples of `multiple`: the short one nearest to `size`, the long one nearest to the aspect.
    The frame covers the canvas and loses a strip at its edges: black bars would be learned as part of the picture.
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
    return Fit(canvas_height, canvas_width, height, width, scale, left, top)


def fit_frame(frame: np.ndarray, fit: Fit) -> np.ndarray:
    """The source frame, uint8 (source_height, source_width, 3), on canvas: (height, width, 3)."""
    if frame.shape[:2] != (fit.source_height, fit.source_width):
        source = f"{fit.source_width}x{fit.source_height}"
        raise ValueError(f"a frame of {_size(frame)} pixels does not go with a fit for {source}")
    right = min(fit.source_width, fit.left + fit.width / fit.scale)
    bottom = min(fit.source_height, fit.top + fit.height / fit.scale)
    kept, size = (fit.left, fit.top, right, bottom), (fit.width, fit.height)
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS, kept))


# ---------------------------------------------------------------------------------------- writing


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path`, with the same extension, that takes its place if all goes well."""
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def open_video(path: str | Path, fps: float, height: int, width: int) -> Iterator[Callable]:
    """Opens an H.264 video, and gives a function that writes frames, uint8 (height, width, 3) or (F, ...).

    `path` appears, or is replaced, when the block ends well; else it stays as it was. Odd sizes get their last row
    or column twice: the pixel format that every player knows needs even ones. Raises ValueError for frames of
    another size or type, an unknown extension or no frames at all, and OSError when the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in VIDEOS_WRITTEN:
        raise ValueError(f"{path}: a video's name must end in {' or '.join(VIDEOS_WRITTEN)}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist")
    if not fps > 0:
        raise ValueError(f"{path}: {fps} frames per second; give a number above 0")

    written, arrived = 0, 0
    colour = f"scale=out_color_matrix=bt709:flags={EXACT_COLOUR}"
    with replacing(path) as unfinished:
        writer = imageio.get_writer(
            unfinished,
            format="FFMPEG",
            fps=fps,
            codec="libx264",
            pixelformat="yuv420p",
            quality=None,
            macro_block_size=1,
            ffmpeg_log_level="error",
            # The colour matrix is named in the file, because players guess it otherwise.
            output_params=["-crf", "16", "-movflags", "+faststart", "-vf", colour],
        )

        def write(frames: np.ndarray) -> None:
            nonlocal written
            if frames.shape[-3:] != (height, width, 3) or frames.dtype != np.uint8:
                wanted = f"uint8 ({height}, {width}, 3)"
                raise ValueError(f"{path}: frames must be {wanted}, not {frames.dtype} {frames.shape}")
            for frame in frames.reshape(-1, height, width, 3):
                even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
                try:
                    writer.append_data(even)
                except OSError as error:
                    raise OSError(f"{path}: ffmpeg stopped: {str(error).splitlines()[0]}") from None
                written += 1

        with closing(writer):  # as imageio's own `with` leaves ffmpeg running after an exception
            yield write
        if not written:
            raise ValueError(f"{path}: no frames to write")
        with suppress(OSError):  # ffmpeg says nothing when the disk fills up as it closes the file
            arrived = count_frames(unfinished)
        if arrived != written:
            raise OSError(f"{path}: could not be written whole; is the disk full?")


def write_video(path: str | Path, frames: Iterable[np.ndarray], fps: float) -> None:
    """Writes frames, uint8 RGB (H, W, 3) each and of one size, as a video. Raises what `open_video` raises."""
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise ValueError(f"{path}: no frames to write")
    with open_video(path, fps, *first.shape[:2]) as write:
        for frame in chain([first], frames):
            write(frame)


def save_image(path: str | Path, image: Image.Image | np.ndarray) -> None:
    """Writes a picture, PIL or uint8 RGB (H, W, 3), in the format that the extension names."""
    path = Path(path)
    if path.suffix.lower() not in IMAGES:
        raise ValueError(f"{path}: an image's name must end in one of {', '.join(IMAGES)}")
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    with replacing(path) as unfinished:
        image.save(unfinished)


def has_sound(path: str | Path) -> bool:
    """Whether this is a video with a sound track."""
    path = Path(path)
    if _images(path) is not None:
        return False
    with closing(imageio_ffmpeg.read_frames(path.resolve())) as reader:
        return "audio_codec" in next(reader)


def add_sound(path: str | Path, source: str | Path, start: float, seconds: float) -> None:
    """Lays `seconds` of another video's sound, from `start` on, under a silent video, in place.

    Raises OSError when ffmpeg cannot, and then leaves the video as it was.
    """
    with replacing(Path(path)) as unfinished:
        silent, source_file = (Path(file).resolve() for file in (path, source))
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", "-i", silent]
        command += ["-ss", start, "-i", source_file, "-map", "0:v", "-map", "1:a:0", "-t", seconds]
        command += ["-c:v", "copy", "-c:a", "aac", "-movflags", "+faststart", unfinished]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.splitlines() or ["no reason given"])[-1]
            raise OSError(f"{source}: its sound could not be copied ({reason})")


# ----------------------------------------------------------------------------------------- sheets

_PAPER, _INK, _GAP = (24, 24, 27), (212, 212, 216), 8


def contact_sheet(
    rows: dict[str, Sequence[np.ndarray]], columns: int = 8, cell_height: int = 192
) -> Image.Image:
    """A picture of several clips, one under the other, to compare at a glance.

    `rows` maps a label to frames, uint8 RGB (H, W, 3), of any size and number. Each row shows up to `columns` of
    its frames, evenly spaced from first to last, `cell_height` pixels high and under their numbers.
    Raises ValueError for a row without frames.
    """
    for label, frames in rows.items():
        if not len(frames):
            raise ValueError(f'contact sheet: the row "{label}" has no frames')
    font = ImageFont.load_default(size=max(12, cell_height // 10))
    line = round(1.5 * font.size)
    margin = 2 * _GAP + max(round(font.getlength(label)) for label in rows)
    widths = (round(cell_height * frames[0].shape[1] / frames[0].shape[0]) for frames in rows.values())
    cell_width, longest = max(widths), max(min(columns, len(frames)) for frames in rows.values())
    size = margin + longest * (cell_width + _GAP), len(rows) * (line + cell_height) + _GAP
    sheet = Image.new("RGB", size, _PAPER)
    ink = ImageDraw.Draw(sheet)

    for row, (label, frames) in enumerate(rows.items()):
        top = row * (line + cell_height) + line
        ink.text((_GAP, top + cell_height // 2), label, _INK, font, anchor="lm")
        shown = np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int)
        for column, index in enumerate(shown):
            frame = Image.fromarray(frames[index])
            width = round(cell_height * frame.width / frame.height)
            centre = margin + column * (cell_width + _GAP) + cell_width // 2
            ink.text((centre, top - line // 2), str(index), _INK, font, anchor="mm")
            cell = frame.resize((width, cell_height), Image.Resampling.LANCZOS)
            sheet.paste(cell, (centre - width // 2, top))
    return sheet
