"""One cell of the ablation: a puppet, a dance to follow and a way to do it; its frames and its figures.

A cell says everything that its clip depends on. `compute` trains what is not trained yet, makes the clips,
measures them against the true frames and keeps both, so that nothing is done twice.
"""

import hashlib
import io
import json
import multiprocessing
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from beyond.body import body_parts, covered
from beyond.pseudo import hold_to_pseudo_video, moved_person, without_people
from beyond.retarget import retarget
from checkpoint import DEMO, Model, load_model
from command import keep_freed_memory
from demo.drive import unlike
from demo.motion import motion
from demo.puppet import (
    CLOTH_COLOURS,
    HAIR_COLOURS,
    Paint,
    Puppet,
    caption,
    clip,
    pose_of,
    random_puppet,
    render,
)
from device import compute_device
from metrics.figures import find_and_compare, frame_l1, frame_psnr, frame_ssim
from openpose import OpenPose, load_openpose
from posecrafter import (
    Method,
    decode_latents,
    edit_latents,
    edit_once,
    embed_hints,
    encode_frames,
    encode_prompt,
    generate,
    network_inputs,
    sample_bilinear,
    select_reference,
    trainable_parameters,
)
from poses.parts import face_and_hands
from poses.pose import Pose, video_sim
from poses.source import uniform_frames
from train import train
from video import replacing, save_image

SIZE = 128  # pixels: smaller than the demo's, since there are hundreds of clips
PROMPT = "a person"
REPAINTED = ("hair", "shirt", "lower")  # what the prompt changes, by the names of a puppet's fields


@dataclass(frozen=True)
class Cell:
    """One clip of one puppet, and everything that it depends on."""

    identity: int
    seed: int  # of training, of a start from noise, and of both dances
    # Where frames come from: "copy", "warp", "moved", or what sampling starts from, "noise" or "inversion".
    source: str
    training_frames: int
    clip_frames: int  # that the training frames are taken from, uniformly
    training_steps: int  # 0: the base model as it is
    learning_rate: float
    insert: bool
    edit: str  # what latent editing moves: "face,hands", "body" or "none"
    edit_step: int  # 0: never
    hold: bool  # to the pseudo video that moves; see `beyond.pseudo.hold_to_pseudo_video`
    replay: bool  # the key frame goes the way back that inversion came
    fixed_point: int  # further iterations of each inversion step
    interpolation: str  # of latent editing: "bilinear" or "nearest"
    dance: str  # that is followed, one of `puppet.DANCES`; the training clip's is always the first
    driver: str  # whose poses: "own", or another puppet's, "literal" or "retargeted"
    repainted: str  # what should have another colour, one of REPAINTED, or "" for nothing
    guidance: float  # of a prompt that says so; 0: it does not say
    guidance_until: int  # timestep
    ddim_steps: int
    target_frames: int
    target_every: int  # so many frames of the dance lie between two that are asked for


# ---- What a cell sees ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """The training frames and the dance to follow. Frames are uint8 (F, 128, 128, 3)."""

    frames: np.ndarray
    poses: list[Pose]
    targets: list[Pose]  # the poses to follow
    truth: np.ndarray
    true_poses: list[Pose]  # the same as `targets` unless another puppet leads
    person: np.ndarray  # the true person's pixels, booleans (F, 128, 128)
    states: list  # what the true puppet does in each frame, `puppet.State`


rendered = lru_cache(maxsize=4)(clip)  # the cells of a puppet follow one another


def set_scene(cell: Cell) -> Scene:
    dance = 1000 * cell.seed + 2 * cell.identity
    frames, poses, _ = rendered(cell.identity, dance, cell.clip_frames, SIZE)
    chosen = uniform_frames(range(cell.clip_frames), cell.training_frames)
    poses = [poses[index] for index in chosen]
    every = cell.target_every
    followed = dance + 1, every * (cell.target_frames - 1) + 1
    truth, true_poses, person = rendered(cell.identity, *followed, SIZE, cell.dance)
    truth, true_poses, person = truth[::every], true_poses[::every], person[::every]
    targets = true_poses
    states = motion(*followed)[::every]
    if cell.driver != "own":
        driver = random_puppet(unlike(cell.identity))
        targets = [pose_of(driver, state) for state in states]
    if cell.driver == "retargeted":
        targets = retarget(targets, poses, 1.0)
    return Scene(frames[chosen], poses, targets, truth, true_poses, person, states)


def repaint(cell: Cell) -> tuple[Puppet, str]:
    """The cell's puppet with another hair, shirt or lower garment, and the caption's words for it."""
    puppet = random_puppet(cell.identity)
    colours = HAIR_COLOURS if cell.repainted == "hair" else CLOTH_COLOURS
    worn = getattr(puppet, cell.repainted).name
    name = next(colour for colour in ("red", "blue") if colour != worn)
    other = replace(puppet, **{cell.repainted: Paint(name, colours[name])})
    return other, caption(other).split(", ")[1 + REPAINTED.index(cell.repainted)]


# ---- A warp without diffusion -------------------------------------------------------------------


def warp_body(latent: Tensor, reference_pose: Pose, pose: Pose, background: Tensor) -> Tensor:
    """The reference's clean latent (C, h, w) with its body moved to another pose.

    What it leaves uncovered becomes the background, `without_people` of the training frames.
    """
    was, now = (covered(each, *latent.shape[-2:]) for each in (reference_pose, pose))
    left = torch.tensor((was - now).clip(0), dtype=latent.dtype, device=latent.device)
    warped = latent.lerp(background, left)[None]
    edit_latents(warped, latent, [pose], reference_pose, body_parts)
    return warped[0]


# ---- From a cell to frames ----------------------------------------------------------------------


def put(model: Model, tensors: dict[str, Tensor]) -> None:
    """Gives the model these trained tensors, and makes it one to sample with."""
    for name, parameter in trainable_parameters(model).items():
        parameter.requires_grad_(False)
        parameter.grad = None
        parameter.data = tensors[name].to(**network_inputs(model), copy=True)


def fine_tune(model: Model, base: dict[str, Tensor], cell: Cell, scene: Scene, work: Path) -> None:
    """Puts the cell's trained tensors into the model, from `work` if they have been trained before."""
    put(model, base)
    if not cell.training_steps:
        return
    path = work / "trained" / f"{tuning_name(cell)}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        tuned = train(
            model,
            encode_frames(model, scene.frames).clone(),
            embed_hints(model, scene.poses, SIZE, SIZE).to(**network_inputs(model), copy=True),
            encode_prompt(model, PROMPT).clone(),
            cell.training_steps,
            cell.learning_rate,
            cell.seed,
            path.with_suffix(".pt"),
            path.with_suffix(".csv"),
        )
        with replacing(path) as unfinished:
            save_file(tuned.tensors, unfinished)
        path.with_suffix(".pt").unlink(missing_ok=True)
    put(model, load_file(path))


def nearest(latent: Tensor, points: np.ndarray) -> Tensor:
    """`sample_bilinear` at the nearest pixels: no pixel of the noise is averaged with its neighbours."""
    return sample_bilinear(latent, points.round())


def make_clip(model: Model, cell: Cell, scene: Scene) -> np.ndarray:
    """The cell's frames, uint8 (F, 128, 128, 3), of a model that holds its weights; as `sample.py` does."""
    k = select_reference(scene.poses, scene.targets)
    if cell.source == "copy":
        return np.repeat(scene.frames[k : k + 1], cell.target_frames, axis=0)
    if cell.source == "warp":
        latents = encode_frames(model, scene.frames)
        background, _ = without_people(latents, scene.poses)
        warped = [warp_body(latents[k], scene.poses[k], p, background) for p in scene.targets]
        return np.stack(list(decode_latents(model, torch.stack(warped))))
    if cell.source == "moved":
        return moved_person(model, scene, k, scene.targets)[0]

    method = Method(
        "cell",
        parts={"face,hands": face_and_hands, "body": body_parts, "none": None}[cell.edit],
        edit_step=cell.edit_step,
        editor=hold_to_pseudo_video if cell.hold else edit_once,
        insert=cell.insert,
        start=cell.source,
        replay=cell.replay,
        fixed_point=cell.fixed_point,
    )
    by_nearest = mock.patch("posecrafter.sample_bilinear", nearest)
    with by_nearest if cell.interpolation == "nearest" else nullcontext():
        made = generate(
            replace(model, guidance_until=cell.guidance_until),
            scene,
            scene.targets,
            method,
            k,
            cell.ddim_steps,
            PROMPT,
            f"{PROMPT}, {repaint(cell)[1]}" if cell.guidance else PROMPT,
            cell.guidance or 1.0,
            cell.seed,
        )
    return np.stack(list(decode_latents(model, made.latents)))


# ---- Figures ------------------------------------------------------------------------------------

# Each figure's title, how it is printed, and what it is.
FIGURES = {
    "psnr": ("PSNR ↑", ".2f", "of whole frames, in dB"),
    "psnr_person": ("person ↑", ".2f", "PSNR of the true person's pixels"),
    "ssim": ("SSIM ↑", ".4f", "of whole frames"),
    "l1": ("L1 ↓", ".4f", "of whole frames, from 0 to 1"),
    "psnr_face": ("face ↑", ".2f", "PSNR in the box of the true face's landmarks, grown by 3 pixels"),
    "psnr_hands": ("hands ↑", ".2f", "PSNR in the boxes of the true hands' landmarks, grown so"),
    "psnr_background": ("background ↑", ".2f", "PSNR of all but the true person's pixels"),
    "pck": (
        "PCK ↑",
        ".3f",
        "share of the body joints asked for that the demo's OpenPose finds within 0.1 of the body's "
        "longer side, in every 4th frame",
    ),
    "temporal": (
        "temporal ↓",
        ".4f",
        "mean absolute error of the change from frame to frame, against the true frames' change, from 0 "
        "to 1; it does not see what is wrong in all frames alike, and copying changes nothing at all",
    ),
}
VIDEO_SIM = {
    "video_sim": (
        "Video-SIM ↓",
        ".4f",
        "the paper's Eq. (2): how far the poses asked for lie from the training poses, summed over frames",
    )
}
MARGIN = 3  # pixels
FOUND_EVERY = 4  # frames between those that OpenPose looks at, which is slow


REPAINTING = {
    "colour": (
        "colour ↓",
        ".0f",
        "distance of the part's mean colour to the one asked for, in RGB 0 to 255",
    ),
    "psnr_elsewhere": ("elsewhere ↑", ".2f", "PSNR of all other pixels against the true frames"),
}


def boxes(poses: Sequence[Pose], parts: Sequence[str]) -> np.ndarray:
    """The grown boxes around parts of whole poses, as booleans (F, 128, 128)."""
    masks = np.zeros((len(poses), SIZE, SIZE), bool)
    for mask, pose in zip(masks, poses):
        for part in parts:
            points = getattr(pose, part)[:, :2] * SIZE
            left, top = (points.min(axis=0) - MARGIN).clip(0, SIZE).astype(int)
            right, bottom = np.ceil(points.max(axis=0) + MARGIN).clip(0, SIZE).astype(int)
            mask[top:bottom, left:right] = True
    return masks


def measure(openpose: OpenPose, result: np.ndarray, cell: Cell, scene: Scene) -> dict[str, float]:
    truth = scene.truth
    changes = (np.diff(frames.astype(np.float64), axis=0) for frames in (result, truth))
    # One frame at a time: whom OpenPose loses between frames so far apart is no fault of the method's.
    found = [
        find_and_compare(openpose, result[i : i + 1], scene.targets[i : i + 1])[0]
        for i in range(0, len(result), FOUND_EVERY)
    ]
    face = boxes(scene.true_poses, ["face"])
    hands = boxes(scene.true_poses, ["left_hand", "right_hand"])
    by_frame = {
        "psnr": frame_psnr(result, truth),
        "psnr_person": frame_psnr(result, truth, scene.person),
        "ssim": frame_ssim(result, truth),
        "l1": frame_l1(result, truth),
        "psnr_face": frame_psnr(result, truth, face),
        "psnr_hands": frame_psnr(result, truth, hands),
        "psnr_background": frame_psnr(result, truth, ~scene.person),
        "pck": np.array(found),
        "temporal": np.abs(np.subtract(*changes)).mean(axis=(1, 2, 3)) / 255,
    }
    figures = {name: float(np.nanmean(values)) for name, values in by_frame.items()}
    if cell.repainted:
        puppet, states = repaint(cell)[0], scene.states
        wanted = np.stack([render(puppet, state, SIZE)[0] for state in states])
        part = (wanted != truth).any(axis=-1)
        off = result[part].mean(axis=0) - wanted[part].mean(axis=0)
        figures["colour"] = float(np.linalg.norm(off))
        figures["psnr_elsewhere"] = float(np.mean(frame_psnr(result, truth, ~part)))
    return figures | {"video_sim": video_sim(scene.targets, scene.poses)}


# ---- Cells on disk ------------------------------------------------------------------------------

SHOWN = 8  # frames of each cell that are kept for the contact sheet


@lru_cache
def weights_digest() -> str:
    """Of all weights but those that find faces and hands, which no cell looks for."""
    content = hashlib.sha256()
    idle = {DEMO / "openpose" / f"{part}.safetensors" for part in ("face", "hand")}
    for file in sorted(set(DEMO.rglob("*.safetensors")) - idle):
        content.update(file.read_bytes())
    return content.hexdigest()[:12]


def digest(settings: dict) -> str:
    """A short name for settings and the weights they are used with."""
    text = json.dumps(settings | {"weights": weights_digest()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def cell_path(work: Path, cell: Cell) -> Path:
    return work / "cells" / f"{cell.identity}-{cell.seed}-{cell.source}-{digest(asdict(cell))}.json"


def tuning_name(cell: Cell) -> str:
    """One name for the cells that are sampled from the same trained tensors."""
    trained_by = ("identity", "seed", "training_frames", "clip_frames", "training_steps", "learning_rate")
    return f"{cell.identity}-{cell.seed}-{digest({name: getattr(cell, name) for name in trained_by})}"


def shown(frames: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Up to 8 frames, evenly spaced."""
    return [frames[i] for i in uniform_frames(range(len(frames)), min(SHOWN, len(frames)))]


def save_cell(work: Path, cell: Cell, figures: dict[str, float], frames: np.ndarray) -> None:
    """The figures come last: a cell that has them is whole."""
    path = cell_path(work, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(path.with_suffix(".png"), np.concatenate(shown(frames), axis=1))
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps({"figures": figures, "cell": asdict(cell)}, indent=1) + "\n")


def load_figures(work: Path, cell: Cell) -> dict[str, float]:
    return json.loads(cell_path(work, cell).read_text())["figures"]


def load_strip(work: Path, cell: Cell) -> list[np.ndarray]:
    strip = np.asarray(Image.open(cell_path(work, cell).with_suffix(".png")))
    return np.split(strip, strip.shape[1] // SIZE, axis=1)


def compute(cells: Sequence[Cell], work: Path, processes: int = 1) -> None:
    """Makes the clips of these cells and measures them, a puppet's all in the same process."""
    if processes > 1:
        spawn = multiprocessing.get_context("spawn")
        shares = [[c for c in cells if c.identity % processes == i] for i in range(processes)]
        # Daemons, so that they end with this process.
        workers = [
            spawn.Process(target=compute_share, args=(s, work, processes), daemon=True) for s in shares
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if any(worker.exitcode for worker in workers):
            raise ValueError("a process stopped early; what is finished is kept")
        return
    keep_freed_memory()
    device, dtype = compute_device(training=True)  # one model for both, so one precision for both
    model = load_model("demo", None, None, device, dtype)
    openpose = load_openpose("demo", device)
    base = {name: tensor.detach().clone() for name, tensor in trainable_parameters(model).items()}
    with tqdm(cells, unit="clip") as bar:
        for cell in bar:
            bar.set_description(f"puppet {cell.identity}, seed {cell.seed}, {cell.source}")
            with redirect_stderr(io.StringIO()):  # where the bars within a cell go
                scene = set_scene(cell)
                fine_tune(model, base, cell, scene, work)
                frames = make_clip(model, cell, scene)
                figures = measure(openpose, frames, cell, scene)
            save_cell(work, cell, figures, frames)


def compute_share(cells: Sequence[Cell], work: Path, processes: int) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    compute(cells, work)
