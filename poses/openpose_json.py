"""Pose files: JSON as OpenPose writes it, and as the tools around it do."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mode

import numpy as np

from poses.pose import KEYS, Pose, is_seen, name_frames
from safe.files import read_json
from video import by_number

FARTHEST = 1e5  # pixels: no canvas reaches so far, and what is farther off, or no number, is put there
STRAY = 2.0  # canvases from the middle, beyond which a keypoint counts as not seen
MOST_MISSING = 100_000  # numbers without a file, between the first and the last of a folder
MOST_COMPARED = 200  # poses that tell where a part lies
SIZES = ("canvas_width", "width"), ("canvas_height", "height")  # OpenPose's key, other editors' key


def read_people(
    path: str | Path, canvas: tuple[int, int] | None = None
) -> tuple[list[list[Pose]], tuple[int, int]]:
    """The people of every frame, canvas-normalised, in the file's order, and the (height, width) of their canvas.

    `path`: a JSON list of OpenPose frames (or one frame), or a folder of OpenPose's own files, in the order of the
    numbers in their names; `unfold` says which other layouts are read. A number that is missing is a frame without
    people. Coordinates are pixels, fractions of the canvas, or run from -1 to 1 (`units_of`).
    `canvas`: that of frames that name none.
    Parts with a wrong count of keypoints, and keypoints far off the canvas, count as not seen, and a line says so.
    Raises FileNotFoundError, and ValueError naming the file and the frame that is malformed or lacks a canvas.
    """
    path = Path(path)
    frames = _read_folder(path) if path.is_dir() else _read_file(path)
    people = _read_parts(path, frames)
    named = [_canvas_of(frame, where) for where, frame in frames]
    canvases = [size or canvas for size in named]
    for in_frame, size, (where, _) in zip(people, canvases, frames):
        if in_frame and size is None:
            advice = "give the size of the video that the poses were found in, such as --canvas 1920x1080"
            raise ValueError(f"{where}: no canvas_width and canvas_height: {advice}")
    known = [size for size in named if size] or [size for size in canvases if size]
    if not known:
        raise ValueError(f"{path}: no people in any of its {len(frames)} frames")
    tall, wide = known[0]
    for a, b in known:
        if abs(a * wide / (b * tall) - 1) > 0.02:
            sizes = f"canvases of {wide:g}x{tall:g} and of {b:g}x{a:g}"
            raise ValueError(f"{path}: {sizes}: the frames of a clip need one shape")
    units = units_of(path, people, canvases)

    def in_fractions(pose: Pose, size: tuple[int, int]) -> Pose:
        known = [(name, getattr(pose, name), unit) for name, unit in units.items() if unit]
        return Pose(**{name: _to_fractions(part, unit, size) for name, part, unit in known})

    people = [[in_fractions(pose, size) for pose in in_frame] for in_frame, size in zip(people, canvases)]
    return _without_strays(path, people), known[0]


# ---- Layouts ------------------------------------------------------------------------------------


def is_json(path: Path) -> bool:
    """Whether a file or folder is one of poses, by its name or the names in it."""
    return path.suffix.lower() == ".json" or (path.is_dir() and bool(json_files(path)))


def json_files(folder: Path) -> list[Path]:
    """The .json files of a folder in the order of their numbers, without the hidden ones that macOS adds."""
    return sorted((file for file in folder.glob("*.json") if file.name[0] != "."), key=by_number)


def _read_folder(folder: Path) -> list[tuple[str, dict]]:
    """`_read_file` of all files, with frames without people for the numbers that are missing."""
    files = json_files(folder)
    if not files:
        raise FileNotFoundError(f"{folder}: no .json files of poses in this folder")
    read = [_read_file(file) for file in files]
    if any(len(frames) != 1 for frames in read):
        return [frame for frames in read for frame in frames]
    gaps = missing_numbers(files)
    if sum(gaps) > MOST_MISSING:
        raise ValueError(f"{folder}: {sum(gaps)} numbers are missing in the names of {len(files)} files")
    nobody = (f"{folder}: missing frame", {"people": []})
    return [frame for gap, (own,) in zip(gaps, read) for frame in [*[nobody] * gap, own]]


def missing_numbers(files: Sequence[Path]) -> list[int]:
    """How many frames are missing before each file, by the numbers in their names.

    The usual step, such as 1, or 10 for every tenth frame, is no gap. Numbers do not count frames, and so none are
    missing, where several in a name change or where some step is no multiple of the usual one.
    """
    names = [by_number(file) for file in files]  # texts and numbers in turn
    changing = [values for values in zip(*names) if len(set(values)) > 1]
    if len({len(name) for name in names}) > 1 or len(changing) != 1 or isinstance(changing[0][0], str):
        return [0] * len(files)
    steps = [b - a for a, b in pairwise(changing[0])]
    usual = mode(steps)
    if usual < 1 or any(step < 1 or step % usual for step in steps):
        return [0] * len(files)
    return [0, *(step // usual - 1 for step in steps)]


def _read_file(path: Path) -> list[tuple[str, dict]]:
    """The OpenPose frames of a file, each with the name that errors give it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder of poses")
    frames = unfold(read_json(path))
    if not frames:
        raise ValueError(f"{path}: holds no frames")
    for index, frame in enumerate(frames):
        if not isinstance(frame, dict) or "people" not in frame:
            keys = ", ".join(map(repr, [*frame][:8]))[:100] if isinstance(frame, dict) else "no object"
            told = f'not an OpenPose frame, which has "people", but {keys or "empty"}'
            raise ValueError(f"{path}: frame {index}: {told}")
    return [(f"{path}: frame {index}", frame) for index, frame in enumerate(frames)]


def unfold(content: object) -> list:
    """The frames of a JSON file in OpenPose's layout, from lists of lists and from the layouts of other tools.

    These are {"frames": [...]}, and an editor's {"width": W, "height": H, "keypoints": [...]} with the keypoints
    of one person, or of several; a keypoint is null, [x, y] or [x, y, score].
    """
    for _ in range(3):  # as deep as anybody has nested them
        if isinstance(content, dict) and isinstance(content.get("frames"), list):
            size = {key: content[key] for keys in SIZES for key in keys if key in content}
            content = [size | frame if isinstance(frame, dict) else frame for frame in content["frames"]]
        elif isinstance(content, list):
            inner = (each if isinstance(each, list) else [each] for each in content)
            content = [frame for frames in inner for frame in frames]
    frames = content if isinstance(content, list) else [content]
    for index, frame in enumerate(frames):
        if isinstance(frame, dict) and "people" not in frame and isinstance(frame.get("keypoints"), list):
            points = frame["keypoints"]
            inner = [value for each in points if isinstance(each, list) for value in each]
            several = any(isinstance(value, list) for value in inner)
            people = [{KEYS["body"][0]: each} for each in (points if several else [points])]
            frames[index] = frame | {"people": people}
    return frames


def _canvas_of(frame: dict, where: str) -> tuple[int, int] | None:
    """The (height, width) that a frame names. Raises ValueError for what is no size."""
    width, height = (next((frame[key] for key in keys if frame.get(key)), None) for keys in SIZES)
    if width is None and height is None:
        return None
    if not all(type(side) in (int, float) and 0 < side <= FARTHEST for side in (width, height)):
        raise ValueError(f"{where}: canvas_width and canvas_height must be numbers of pixels")
    return height, width


# ---- Keypoints ----------------------------------------------------------------------------------


def _read_parts(path: Path, frames: Sequence[tuple[str, dict]]) -> list[list[Pose]]:
    """The people of every frame in the file's units. Parts of a wrong length are left out, which is said."""
    people, wrong = [], {}
    for index, (where, frame) in enumerate(frames):
        everybody = frame["people"] or []
        if not isinstance(everybody, list) or not all(isinstance(person, dict) for person in everybody):
            raise ValueError(f'{where}: "people" is not a list of objects with keypoints')
        people.append([])
        for person in everybody:
            parts = {}
            for name, (key, counts) in KEYS.items():
                points = _read_part(person, key, where)
                if points.size not in (0, *(3 * count for count in counts)):
                    sizes = " or ".join(str(3 * count) for count in counts)
                    complaint = f"{key} has {points.size} numbers instead of {sizes} (x, y, score, ...)"
                    wrong.setdefault(name, {}).setdefault(index, complaint)
                    points = points[:0]
                parts[name] = _arrange(points.reshape(-1, 3), counts[0])
            people[-1].append(Pose(**parts))
    for name, complaints in wrong.items():
        (first, complaint), frame_names = next(iter(complaints.items())), name_frames([*complaints])
        if name == "body" and not any(is_seen(pose.body).any() for in_frame in people for pose in in_frame):
            raise ValueError(f"{frames[first][0]}: {complaint}")
        print(f"{path}: {complaint}, and is left out: in frames {frame_names}")
    return people


def _read_part(person: dict, key: str, where: str) -> np.ndarray:
    """The numbers of one part, flat float32, empty where it is null or absent."""
    points = person.get(key) or person.get(key.removesuffix("_2d")) or []  # OpenPose 1.0's key
    try:
        if any(isinstance(point, list) for point in points):  # [x, y] or [x, y, score] or null each
            points = [[0, 0, 0] if point is None else [*point, 1][:3] for point in points]
        return np.array(points, np.float32).ravel()  # null among the numbers becomes nan
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{where}: {key} is not a list of numbers") from None


def _arrange(points: np.ndarray, count: int) -> np.ndarray:
    """Keypoints (K, 3) in the order and number that `Pose` has, zeros where they are not seen."""
    if len(points) == 25:  # BODY_25 has a mid hip at 8 and feet from 19 on
        points = points[[*range(8), *range(9, 19)]]
    part = np.pad(points, ((0, count - len(points)), (0, 0)))
    part[:, 2] = part[:, 2].clip(0, 1)  # some detectors score beyond 1
    part[~is_seen(part)] = 0  # also where the score is no number
    far = {"nan": FARTHEST, "posinf": FARTHEST, "neginf": -FARTHEST}
    return np.nan_to_num(part, **far).clip(-FARTHEST, FARTHEST)


def _without_strays(path: Path, people: list[list[Pose]]) -> list[list[Pose]]:
    """Normalised people; keypoints that cannot be right are not seen, which is said."""
    kept, strays = [], {}
    for frame, in_frame in enumerate(people):
        kept.append([])
        for pose in in_frame:
            parts = {name: part.copy() for name, part in vars(pose).items()}
            for part in parts.values():
                stray = is_seen(part) & (np.abs(part[:, :2] - 0.5) > STRAY).any(axis=1)
                part[stray] = 0
                strays[frame] = strays.get(frame, 0) + int(stray.sum())
            kept[-1].append(Pose(**parts))
    if frames := [frame for frame, count in strays.items() if count]:
        lie = f"{sum(strays.values())} keypoints lie far off the canvas and count as not seen"
        print(f"{path}: {lie}: in frames {name_frames(frames)}")
    return kept


# ---- Units --------------------------------------------------------------------------------------

# Each unit's scale and offset to fractions of the canvas; None is the canvas's own. "-1 to 1" is OpenPose's
# --keypoint_scale 4.
UNITS = {"pixels": None, "fractions": (1, 0), "-1 to 1": (0.5, 0.5)}
BESIDE = {"face": [0, 14, 15, 16, 17], "left_hand": [7], "right_hand": [4]}  # keypoints of the body


def units_of(
    path: Path, people: Sequence[Sequence[Pose]], canvases: Sequence[tuple[int, int] | None]
) -> dict[str, str | None]:
    """The unit of each part of a file, of UNITS, decided over all of its frames.

    The body's is told by the range of its coordinates. Where those of face or hands suggest another, they have the
    unit in which they lie at the head and the wrists. A part that has none is left out, which is said.
    """
    placed = [(pose, size) for in_frame, size in zip(people, canvases) for pose in in_frame]
    bodys = unit_of_range([pose.body for pose, _ in placed])
    units = {"body": bodys or "fractions"}
    if bodys == "-1 to 1":
        print(f"{path}: its coordinates are taken to run from -1 to 1, as with OpenPose's keypoint_scale 4")
    for name in BESIDE:
        seen = [(pose, size) for pose, size in placed if is_seen(getattr(pose, name)).any()]
        seen = seen[:: max(1, len(seen) // MOST_COMPARED)]
        units[name] = unit_of_range([getattr(pose, name) for pose, _ in seen]) or "fractions"
        if units[name] == bodys or bodys is None:
            continue
        likely = ["pixels"] if units[name] == "pixels" else [bodys, *UNITS]
        away = {unit: distance(seen, name, unit, bodys) for unit in likely}
        units[name] = min(away, key=away.get)
        if away[units[name]] > 1:
            units[name] = None
            print(f"{path}: {KEYS[name][0]} lie far from the body in any unit, and are left out")
    return units


def unit_of_range(parts: Sequence[np.ndarray]) -> str | None:
    """The unit that the coordinates of one part (K, 3) over many frames suggest; None where nothing is seen."""
    points = np.concatenate([np.zeros((0, 2)), *(part[is_seen(part), :2] for part in parts)])
    points = points[(np.abs(points) < FARTHEST).all(axis=1)]
    if not len(points):
        return None
    # In pixels few lie within 2 of the corner. In fractions few lie left of the canvas or above it.
    if (np.abs(points) > 2).any(axis=1).mean() >= 0.5:
        return "pixels"
    signed = (np.abs(points) <= 1).all() and (points < 0).any(axis=1).mean() > 0.1
    return "-1 to 1" if signed else "fractions"


def distance(placed: Sequence[tuple[Pose, tuple]], name: str, unit: str, bodys_unit: str) -> float:
    """How far a part usually lies from its joints of the body, in sizes of the body; 0 where nothing tells."""
    apart = []
    for pose, canvas in placed:
        body = _to_fractions(pose.body, bodys_unit, canvas)
        part = _to_fractions(getattr(pose, name), unit, canvas)
        near = body[BESIDE[name]]
        if is_seen(near).any() and is_seen(body).sum() >= 3:
            size = np.ptp(body[is_seen(body), :2], axis=0).max()
            centres = [np.median(each[is_seen(each), :2], axis=0) for each in (part, near)]
            apart.append(np.abs(np.subtract(*centres)).max() / max(size, 1e-6))
    return float(np.median(apart)) if apart else 0.0


def _to_fractions(part: np.ndarray, unit: str, canvas: tuple[int, int]) -> np.ndarray:
    """A part (K, 3) in a unit of UNITS in fractions of the canvas (height, width)."""
    scale, offset = UNITS[unit] or ((1 / canvas[1], 1 / canvas[0]), 0)
    points = (part[:, :2] * scale + offset) * is_seen(part)[:, None]
    return np.concatenate([points, part[:, 2:]], axis=1).astype(np.float32)
