"""The settings of a run folder: which fields there are, what they may hold, and which program wrote them."""

import hashlib
import re
import reprlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from safe.files import read_json
from safe.provenance import VERSION

LAYOUT = 1  # of run folders; folders without a number are older, and are read where they are complete

# ---- What a field may be ------------------------------------------------------------------------

Field = tuple[str, Callable[[object], bool]]  # in words, and whether a value is that


def text(value: object) -> bool:
    """Whether this can be a file's name or a prompt. File systems know names that are no Unicode, but no NUL."""
    try:
        return isinstance(value, str) and b"\0" not in value.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return False


def or_null(field: Field) -> Field:
    words, fits = field
    return f"{words} or null", lambda value: value is None or fits(value)


def one_of(*words: str) -> Field:
    return f"one of {', '.join(words)}", lambda value: isinstance(value, str) and value in words


def whole(low: int, high: int) -> Field:
    words = f"a whole number from {low} to {high}"
    return words, lambda value: type(value) is int and low <= value <= high


def number(high: float) -> Field:
    words = f"a number above 0 and below {high:g}"
    return words, lambda value: type(value) in (int, float) and 0 < value < high


def rising(value: object) -> bool:
    """Whether this is a list of frame numbers, each above the one before or equal to it."""
    frames = isinstance(value, list) and value and all(type(each) is int and each >= 0 for each in value)
    return bool(frames) and value == sorted(value) and value[-1] < 2**53


def loras(value: object) -> bool:
    """Whether these are the files of LoRAs with their weights and hashes; null for none."""
    kinds = {"file": str, "weight": float, "sha256": str}
    given = value if isinstance(value, list) and value else [] if value is None else [None]
    objects = (each if isinstance(each, dict) else {} for each in given)
    return all({name: type(each[name]) for name in each} == kinds for each in objects)


TEXT: Field = "text", text
SIDE = whole(1, 100_000)

FIELDS: dict[str, Field] = {
    "version": TEXT,
    "layout": whole(1, 1_000_000),
    "clip": TEXT,
    "poses": or_null(TEXT),
    "poses_are": or_null(one_of("json", "drawn", "video")),
    "person": whole(1, 1_000_000),
    "frames": ("a list of frame numbers in rising order", rising),
    "fps": number(1e6),
    "height": SIDE,
    "width": SIDE,
    "model": TEXT,
    "controlnet": or_null(TEXT),
    "vae": or_null(TEXT),
    "loras": ("a list of LoRAs or null", loras),
    "prompt": TEXT,
    "steps": whole(1, 10_000_000),
    "learning_rate": number(1),
    "learning_rate_from": TEXT,
    "seed": whole(-(2**63), 2**63),
    "inputs": ("a SHA-256", lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value)),
}
# All that folders without a layout number must have.
NEEDED_ONCE = {"clip", "poses", "frames", "fps", "model", "controlnet", "vae", "prompt", "learning_rate"}


def read_run_settings(folder: Path) -> dict:
    """What a run was asked for; fields that are not ours are left out.

    Raises OSError, and ValueError, in one line that names the file and the field, for one that is damaged or was
    made by a program that knows more than this one.
    """
    path, advice = folder / "settings.json", f"if it is a run, delete {folder} and train again"
    try:
        found = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; {advice}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: damaged (not an object with the settings); {advice}")
    for name, (words, fits) in FIELDS.items():
        if name in found and not fits(found[name]):
            raise ValueError(f"{path}: {name} is {reprlib.repr(found[name])}, not {words}; {advice}")
        if name == "layout" and found.get(name, 0) > LAYOUT:
            made_by = f"made by PoseCrafter {found.get('version', 'of a later version')}"
            raise ValueError(f"{path}: {made_by}, which this one ({VERSION}) cannot read; use that one")
    needed = FIELDS.keys() if "layout" in found else NEEDED_ONCE
    if missing := [name for name in FIELDS if name in needed and name not in found]:
        raise ValueError(f"{path}: lacks {', '.join(sorted(missing))} ({made_by_whom(found)}); {advice}")
    return {"learning_rate_from": "unknown"} | {name: found[name] for name in FIELDS if name in found}


def refuse_others(folder: Path) -> None:
    """Raises ValueError for a folder of files that are no run's: a run would be mixed with them."""
    names = {path.name for path in folder.iterdir() if path.name[0] != "."}
    if "settings.json" not in names and (others := names - {"poses"}):
        raise ValueError(f"{folder}: holds {min(others)}, so it is no run; choose another with --run")


def made_by_whom(settings: dict) -> str:
    return f"made by PoseCrafter {settings.get('version', 'before 1.0.0')}"


def inputs_of(settings: dict) -> list[Path]:
    """The clip that a run was trained on, and the file of its poses if it had one."""
    return [Path(settings[name]).resolve() for name in ("clip", "poses") if settings.get(name)]


# ---- What the hash is of ------------------------------------------------------------------------


def mark_of(frames: np.ndarray) -> str:
    """Whose proportions poses have, as their `proportions_of` says: a hash of training frames (N, H, W, 3)."""
    return hashlib.sha256(np.ascontiguousarray(frames)).hexdigest()[:12]


def hash_inputs(frames: np.ndarray, poses: bytes) -> str:
    """The SHA-256 of the training frames, uint8 (N, H, W, 3), and of the file of their poses without its marks."""
    digest = hashlib.sha256(np.ascontiguousarray(frames))
    digest.update(poses.replace(f',"proportions_of":"{mark_of(frames)}"'.encode(), b""))
    return digest.hexdigest()


def check_inputs(folder: Path, settings: dict, frames: np.ndarray, poses: Path) -> None:
    """Raises ValueError where frames or poses are not those that the run was trained on."""
    if "layout" in settings and hash_inputs(frames, poses.read_bytes()) != settings["inputs"]:
        changed = "its frames/ or frames.poses.json were changed after training"
        advice = "put back what was there, or delete the folder and train again"
        raise ValueError(f"{folder}: {changed}; {advice}")
