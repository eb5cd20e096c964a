"""The run folder that `train.py` leaves and `sample.py` reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from checkpoint import Model
from pictures.sheets import contact_sheet
from posecrafter import trainable_parameters
from poses.pose import Pose, draw_pose, load_poses, save_poses
from safe.files import replacing, write_json
from safe.settings import LAYOUT, check_inputs, made_by_whom, mark_of, read_run_settings, refuse_others
from safe.tensors import check_values
from video import read_frames, save_image


@dataclass(frozen=True)
class Run:
    """A finished run, as `sample.py` needs it."""

    folder: Path
    settings: dict
    frames: np.ndarray  # (N, H, W, 3) uint8, on canvas
    poses: list[Pose]


def load_run(folder: Path) -> Run:
    """Reads a run folder. Raises FileNotFoundError for one missing or unfinished, ValueError for a damaged one."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such run; make one with: python train.py CLIP")
    if not (folder / "trained.safetensors").exists():
        raise FileNotFoundError(f"{folder}: training has not finished; give its command again to go on")
    settings = read_run_settings(folder)
    frames, _ = read_frames(folder / "frames")
    poses = load_poses(folder / "frames.poses.json")
    if not len(frames) == len(poses) == len(settings["frames"]):
        counts = f"{len(frames)} frames, {len(poses)} poses, and settings of {len(settings['frames'])}"
        raise ValueError(f"{folder}: a damaged run: {counts}; delete it and train again")
    check_inputs(folder, settings, frames, folder / "frames.poses.json")
    return Run(folder, settings, frames, poses)


def begin_run(folder: Path, settings: dict, frames: np.ndarray, poses: Sequence[Pose]) -> None:
    """Writes what a run starts from: settings, frames uint8 (N, H, W, 3), poses, and a preview of both.

    Raises ValueError for a folder with an unfinished run of other settings.
    """
    if (folder / "settings.json").exists():
        begun, advice = read_run_settings(folder), "choose another with --run, or delete it"
        if begun.get("layout") != LAYOUT:
            raise ValueError(f"{folder}: an unfinished run, {made_by_whom(begun)}; {advice}")
        if other := ", ".join(name for name in settings if settings[name] != begun.get(name)):
            raise ValueError(f"{folder}: an unfinished run with other {other}; {advice}")
    (folder / "frames").mkdir(parents=True, exist_ok=True)
    write_json(folder / "settings.json", settings)  # first: what follows is of these settings
    for index, frame in zip(settings["frames"], frames):
        save_image(folder / "frames" / f"{index:05d}.png", frame)
    height, width = frames.shape[1:3]
    save_poses(folder / "frames.poses.json", poses, width, height, proportions_of=mark_of(frames))
    drawn = [draw_pose(pose, height, width) for pose in poses]
    save_image(folder / "preview.png", contact_sheet({"frame": frames, "pose": drawn}))


def finish_run(folder: Path, trained: dict[str, Tensor], outcome: dict) -> None:
    """Writes what training left, the tensors last: a run that has them is finished."""
    write_json(folder / "training.json", outcome)
    with replacing(folder / "trained.safetensors") as unfinished:
        unfinished.write_bytes(save(trained))
    (folder / "training_state.pt").unlink(missing_ok=True)


def refuse_finished(folder: Path) -> None:
    """Raises ValueError for a folder with a finished run, or with other files."""
    refuse_others(folder)
    if (folder / "trained.safetensors").exists():
        (folder / "training_state.pt").unlink(missing_ok=True)  # a process was killed just before this
        advice = "choose another with --run, or delete it"
        raise ValueError(f"{folder}: there is a finished run already; {advice}")


def newest_run(runs: Path = Path("runs")) -> Path:
    """The finished run that was made last. Raises FileNotFoundError when there is none."""
    finished = sorted(runs.glob("*/trained.safetensors"), key=lambda path: path.stat().st_mtime)
    if not finished:
        raise FileNotFoundError(f"{runs}/: no finished run; make one with: python train.py CLIP")
    return finished[-1].parent


def load_trained(model: Model, path: Path) -> None:
    """Copies a run's trained tensors into a model. Raises ValueError, naming the file and what does not fit."""
    try:
        trained = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged ({error}); train again") from None
    check_values(path, trained)
    parameters = trainable_parameters(model)
    found = {(name, tuple(tensor.shape)) for name, tensor in trained.items()}
    wanted = {(name, tuple(parameter.shape)) for name, parameter in parameters.items()}
    for name, shape in sorted(found ^ wanted):
        where = "file" if (name, shape) in found else "model"
        raise ValueError(f"{path}: {name} of shape {shape} is only in the {where}: another model?")
    for name, parameter in parameters.items():
        parameter.data.copy_(trained[name])


def name_of(source: Path) -> str:
    """What is made of a video, file or folder is called by this, without an extension."""
    source = source.resolve()
    return source.name if source.is_dir() else source.stem
