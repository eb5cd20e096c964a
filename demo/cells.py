"""The cells of the ablation: trials, carried out and measured, each kept in a file of its own."""

import io
import json
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, replace
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import posecrafter
from beyond.body import body_parts, covered
from beyond.pseudo import moved_person, without_people
from checkpoint import Model
from demo.scene import PROMPT, Scene, Trial, fine_tune, load_demo, set_scene
from metrics.figures import find_and_compare, frame_l1, frame_psnr, frame_ssim, video_sim
from metrics.flicker import frame_flicker
from openpose import OpenPose, load_openpose
from posecrafter import Method, decode_latents, edit_latents, encode_frames, sample_bilinear
from poses.pose import Pose
from public.places import DEMO
from run import load_trained
from safe.files import replacing

# ---- Ways to make a clip ------------------------------------------------------------------------


def repeat_reference(model: Model, scene: Scene, k: int) -> np.ndarray:
    return np.repeat(scene.frames[[k]], len(scene.targets), axis=0)


def warp_body(latent: Tensor, reference_pose: Pose, pose: Pose, background: Tensor) -> Tensor:
    """The reference's clean latent (C, h, w) with its body moved to another pose before the background."""
    was, now = (covered(each, *latent.shape[-2:]) for each in (reference_pose, pose))
    warped = latent.lerp(background, torch.tensor((was - now).clip(0)).to(latent))[None]
    edit_latents(warped, latent, [pose], reference_pose, body_parts)
    return warped[0]


def warp_reference(model: Model, scene: Scene, k: int) -> np.ndarray:
    latents = encode_frames(model, scene.frames)
    background, _ = without_people(latents, scene.poses)
    warped = [warp_body(latents[k], scene.poses[k], pose, background) for pose in scene.targets]
    return np.stack(list(decode_latents(model, torch.stack(warped))))


def move_person(model: Model, scene: Scene, k: int) -> np.ndarray:
    return moved_person(model, scene, k, scene.targets)[0]


def edit_by_nearest(scene: posecrafter.EditInputs) -> posecrafter.Edits:
    """The paper's editor, reading the nearest pixel: no noise is averaged with its neighbours."""
    edits = posecrafter.edit_once(scene)
    nearest = mock.patch("posecrafter.sample_bilinear", lambda x, at: sample_bilinear(x, at.round()))
    return replace(edits, before_step=nearest(edits.before_step))


def make_clip(model: Model, trial: Trial, scene: Scene) -> np.ndarray:
    """A trial's frames, uint8 (F, H, W, 3), of a fine-tuned model."""
    k = posecrafter.select_reference(scene.poses, scene.targets)
    if not isinstance(trial.way, Method):
        return trial.way(model, scene, k)
    model = replace(model, guidance_until=trial.guidance_until)
    prompt, guidance = (scene.prompt, trial.guidance) if trial.guidance else (PROMPT, 1.0)
    arguments = trial.way, k, trial.ddim_steps, PROMPT, prompt, guidance
    made = posecrafter.generate(model, scene, scene.targets, *arguments)
    return np.stack(list(decode_latents(model, made.latents)))


# ---- Figures ------------------------------------------------------------------------------------

FIGURES = {  # each figure's title, how it is printed, and what it is
    "psnr": ("PSNR ↑", ".2f", "of whole frames, in dB"),
    "psnr_person": ("person ↑", ".2f", "PSNR of the true person's pixels"),
    "ssim": ("SSIM ↑", ".4f", "of whole frames"),
    "l1": ("L1 ↓", ".4f", "of whole frames, from 0 to 1"),
    "psnr_face": ("face ↑", ".2f", "PSNR in the box of the true face's landmarks, grown by 3 pixels"),
    "psnr_hands": ("hands ↑", ".2f", "PSNR in the boxes of the true hands' landmarks, grown so"),
    "psnr_background": ("background ↑", ".2f", "PSNR of all but the true person's pixels"),
    "pck": ("PCK ↑", ".3f", "PCK@0.1 of the body joints that OpenPose finds, in every 4th frame"),
    "temporal": ("temporal ↓", ".4f", "mean absolute error of the change between frames, from 0 to 1"),
    "video_sim": ("Video-SIM ↓", ".4f", "distance of target to training poses: the paper's Eq. (2)"),
    "colour": ("colour ↓", ".0f", "distance of the part's mean colour to the one told, in RGB 0 to 255"),
    "psnr_elsewhere": ("elsewhere ↑", ".2f", "PSNR of all other pixels"),
}
MARGIN = 3  # pixels
FOUND_EVERY = 4  # frames between those that OpenPose looks at, which is slow


def boxes(poses: Sequence[Pose], parts: Sequence[str], size: int) -> np.ndarray:
    """The grown boxes around parts of whole poses, as booleans (F, size, size)."""
    masks = np.zeros((len(poses), size, size), bool)
    for mask, pose in zip(masks, poses):
        for part in parts:
            points = getattr(pose, part)[:, :2] * size
            left, top = (points.min(axis=0) - MARGIN).clip(0).astype(int)
            right, bottom = np.ceil(points.max(axis=0) + MARGIN).clip(0).astype(int)
            mask[top:bottom, left:right] = True
    return masks


def measure(openpose: OpenPose, result: np.ndarray, scene: Scene) -> dict[str, float]:
    """The FIGURES of frames uint8 (F, size, size, 3); the last two only where something is repainted."""
    truth = scene.truth
    of_part = partial(boxes, scene.true_poses, size=truth.shape[1])
    # One frame at a time: whom OpenPose loses between frames so far apart is no fault of the method's.
    looked_at = [slice(i, i + 1) for i in range(0, len(result), FOUND_EVERY)]
    values = {
        "psnr": frame_psnr(result, truth),
        "psnr_person": frame_psnr(result, truth, scene.person),
        "ssim": frame_ssim(result, truth),
        "l1": frame_l1(result, truth),
        "psnr_face": frame_psnr(result, truth, of_part(["face"])),
        "psnr_hands": frame_psnr(result, truth, of_part(["left_hand", "right_hand"])),
        "psnr_background": frame_psnr(result, truth, ~scene.person),
        "pck": [find_and_compare(openpose, result[i], scene.targets[i])[0] for i in looked_at],
        "temporal": frame_flicker(result, truth),
        "video_sim": video_sim(scene.targets, scene.poses),
    }
    part = (scene.repainted != truth).any(axis=-1)
    if part.any():
        values["colour"] = np.linalg.norm(result[part].mean(axis=0) - scene.repainted[part].mean(axis=0))
        values["psnr_elsewhere"] = frame_psnr(result, truth, ~part)
    return {name: float(np.nanmean(value)) for name, value in values.items()}


# ---- Cells on disk ------------------------------------------------------------------------------

# The fields of trials that are sampled from the same trained tensors where these agree.
TRAINED_BY = ("identity", "training_frames", "clip_frames", "training_steps", "learning_rate")


@cache
def weights_digest() -> str:
    return sha256(b"".join(file.read_bytes() for file in sorted(DEMO.rglob("*.safetensors")))).hexdigest()


def kept(folder: Path, *settings) -> Path:
    """What is made with these settings and the demo's weights; functions count by their names."""
    text = json.dumps([settings, weights_digest()], default=lambda function: function.__name__)
    return folder / sha256(text.encode()).hexdigest()[:16]


def cell_path(work: Path, trial: Trial) -> Path:
    return kept(work / "cells", asdict(trial)).with_suffix(".npz")


def shown(frames: np.ndarray) -> np.ndarray:
    """Up to 8 frames, evenly spaced, for the report's sheets."""
    return frames[:: -(-len(frames) // 8)]


def save_cell(work: Path, trial: Trial, figures: dict[str, float], frames: np.ndarray) -> None:
    path = cell_path(work, trial)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        np.savez_compressed(unfinished, frames=shown(frames), **figures)


def load_figures(work: Path, trial: Trial) -> np.ndarray:
    """All FIGURES, (figures,); not a number for those that were not measured."""
    cell = np.load(cell_path(work, trial))
    return np.array([cell[name] if name in cell else np.nan for name in FIGURES])


def compute(trials: Iterable[Trial], work: Path) -> None:
    """Makes clips and measures them; what has been trained is not trained again."""
    base, tuned = load_demo(), load_demo()
    openpose = load_openpose("demo", posecrafter.network_inputs(base)["device"])
    for trial in tqdm(trials, unit="clip"):
        with redirect_stderr(io.StringIO()):  # where the bars within a trial go
            scene, model = set_scene(trial), base
            if trial.training_steps != 0:
                trained_by = [getattr(trial, name) for name in TRAINED_BY]
                path = kept(work / "trained", trained_by).with_suffix(".safetensors")
                fine_tune(trial, scene, path)
                load_trained(tuned, path)
                model = tuned
            frames = make_clip(model, trial, scene)
            save_cell(work, trial, measure(openpose, frames, scene), frames)
