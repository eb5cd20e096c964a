"""The run folder that `train.py` leaves and `sample.py` reads."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file

from checkpoint import Model
from posecrafter import trainable_parameters
from poses.pose import Pose, load_poses
from video import read_frames

# ---- The run folder -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A finished run, as `sample.py` needs it."""

    folder: Path
    settings: dict
    frames: np.ndarray  # (N, H, W, 3) uint8, on canvas
    poses: list[Pose]


def load_run(folder: Path) -> Run:
    """Reads a run folder. Raises FileNotFoundError when there is none, or it is not finished, and ValueError
    for a damaged one.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such run; make one with: python train.py CLIP")
    if not (folder / "trained.safetensors").exists():
        raise FileNotFoundError(
            f"{folder}: training has not finished; give its command again to go on"
        )
    settings = read_run_settings(folder)
    frames, _ = read_frames(folder / "frames")
    poses = load_poses(folder / "frames.poses.json")
    if not len(frames) == len(poses) == len(settings["frames"]):
        counts = (
            f"{len(frames)} frames, {len(poses)} poses, and settings of {len(settings['frames'])}"
        )
        raise ValueError(f"{folder}: a damaged run: {counts}; delete it and train again")
    return Run(folder, settings, frames, poses)


def read_run_settings(folder: Path) -> dict:
    """What a run was asked for. Raises ValueError, naming the file, when it is damaged."""
    path = folder / "settings.json"
    try:
        settings = json.loads(path.read_text())
        missing = {"clip", "poses", "frames", "fps", "model", "controlnet", "vae", "prompt"} - {
            *settings
        }
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({error}); delete {folder} and train again") from None
    if missing:
        lacks = ", ".join(sorted(missing))
        raise ValueError(f"{path}: lacks {lacks}; delete {folder} and train again")
    return settings


def newest_run(runs: Path = Path("runs")) -> Path:
    """The finished run that was made last. Raises FileNotFoundError when there is none."""
    finished = sorted(runs.glob("*/trained.safetensors"), key=lambda path: path.stat().st_mtime)
    if not finished:
        raise FileNotFoundError(f"{runs}/: no finished run; make one with: python train.py CLIP")
    return finished[-1].parent


def load_trained(model: Model, path: Path) -> None:
    """Copies a run's trained tensors into a model.

    Raises ValueError for a damaged file, and naming a tensor that does not fit.
    """
    try:
        trained = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged ({error}); train again") from None
    parameters = trainable_parameters(model)
    for name in sorted(trained.keys() ^ parameters.keys()):
        raise ValueError(
            f"{path}: {name} is only in the {'file' if name in trained else 'model'}: another model?"
        )
    for name, parameter in parameters.items():
        if trained[name].shape != parameter.shape:
            shapes = f"{tuple(trained[name].shape)} instead of {tuple(parameter.shape)}"
            raise ValueError(f"{path}: {name} is {shapes}: trained with another model?")
        parameter.data.copy_(trained[name])


def name_of(source: Path) -> str:
    """What is made of a video, file or folder is called by this, without an extension."""
    source = source.resolve()
    return source.name if source.is_dir() else source.stem
