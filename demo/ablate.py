"""What each part of the method is worth, on puppets: `python demo/ablate.py`, a few hours on a laptop.

Trains on puppets that the demo model has never seen and has them dance another dance, with the parts of
the method added one by one, and beside two ways that need no diffusion. Then the method's settings, one
at a time. Poses come from the renderer, so that the method is measured and not the pose finder.

Every run of every puppet, a cell, is kept in `runs/ablate/`: an interrupted command goes on where it
stopped. `demo/RESULTS.md` and the pictures beside it are made of the cells that exist, and of nothing else
(`--only-report`: without computing any).
"""

import argparse
import hashlib
import io
import json
import multiprocessing
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext, redirect_stderr
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checkpoint import (
    DEMO,
    Model,
    compute_device,
    keep_freed_memory,
    load_model,
    load_openpose,
    read_settings,
)
from demo.dance import HELD_OUT, SIZE, TRAINING_FRAMES
from demo.drive import unlike
from demo.puppet import (
    CLOTH_COLOURS,
    HAIR_COLOURS,
    Paint,
    Puppet,
    caption,
    clip,
    motion,
    pose_of,
    random_puppet,
    render,
)
from driver import uniform_frames
from evaluate import (
    FAINT,
    INK,
    LINE,
    PAPER,
    find_and_compare,
    frame_l1,
    frame_psnr,
    frame_ssim,
)
from openpose import OpenPose
from parts import body_parts
from pose import Pose, draw_pose, video_sim
from posecrafter import (
    decode_latents,
    edit_latents,
    embed_hints,
    encode_frames,
    encode_prompt,
    insert_reference,
    invert,
    network_inputs,
    sample,
    sample_bilinear,
    select_reference,
    trainable_parameters,
    training_steps,
)
from retarget import retarget
from train import train
from video import contact_sheet, replacing, save_image

# ---- What is run --------------------------------------------------------------------------------

PROMPT = "a person"
GUIDANCE = 3.0  # where the prompt tells something
LONG_CLIP = 72  # frames, where the number of training frames varies: 36 are too few for 64
ALPHA_STEPS = 50  # DDIM steps of the sweep over the edit step, as in the paper
ALPHAS = (1, 5, 10, 20, 30, 40, 50)
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
DDIM_STEPS = (10, 20, 50)
PARTS = ("main", "harder", "attributes", "alpha", "frames", "rate", "interpolation", "steps")
REPAINTED = ("hair", "shirt", "lower")  # what the prompt changes, by the names of a puppet's fields


@dataclass(frozen=True)
class Cell:
    """One clip of one puppet, and everything that it depends on."""

    identity: int
    seed: int  # of training, of a start from noise, and of both dances
    source: str  # where frames come from: "copy", "warp", or what sampling starts from, "noise" or "inversion"
    training_frames: int
    clip_frames: int  # that the training frames are taken from, uniformly
    training_steps: int  # 0: the base model as it is
    learning_rate: float
    insert: bool
    edit: str  # what latent editing moves: "face,hands", "body" or "none"
    edit_step: int  # 0: never
    interpolation: str  # of latent editing: "bilinear" or "nearest"
    dance: str  # that is followed, one of `puppet.DANCES`; the training clip's is always the first
    driver: str  # whose poses: "own", or another puppet's, "literal" or "retargeted"
    repainted: str  # what should have another colour, one of REPAINTED, or "" for nothing
    told: bool  # whether the prompt says so, with guidance
    ddim_steps: int
    target_frames: int


def full_method(identity: int, seed: int, args: argparse.Namespace) -> Cell:
    return Cell(
        identity=identity,
        seed=seed,
        source="inversion",
        training_frames=8,
        clip_frames=TRAINING_FRAMES,
        training_steps=args.training_steps or training_steps(8),
        learning_rate=read_settings(DEMO / "posecrafter.json")["learning_rate"],
        insert=True,
        edit="face,hands",
        edit_step=1,
        interpolation="bilinear",
        dance="facing",
        driver="own",
        repainted="",
        told=False,
        ddim_steps=args.ddim_steps,
        target_frames=args.target_frames,
    )


COPY, WARP, UNTRAINED = "copy", "warp", "no fine-tuning"
NOISE, INVERSION, INSERTION, FULL, BODY = (
    "noise start",
    "+ selection and inversion",
    "+ insertion",
    "+ latent editing",
    "whole body",
)
ROWS = {
    COPY: "the reference, the training frame that the method selects, repeated",
    WARP: "the reference's latent warped limb by limb to the pose, and decoded: no diffusion",
    UNTRAINED: "the full method with the base weights",
    NOISE: "fine-tuned, sampling from random noise: ControlVideo without true frames to start from",
    INVERSION: "from the inverted reference instead of noise",
    INSERTION: "and the reference in front, as key frame",
    FULL: "and face and hands moved in the first latent: the paper's full method",
    BODY: "the same, but for all parts of the body that are moved",
}
PAIRS = (
    (INVERSION, NOISE),
    (INSERTION, INVERSION),
    (FULL, INSERTION),
    (FULL, COPY),
    (FULL, WARP),
    (FULL, UNTRAINED),
    (BODY, FULL),
    (BODY, COPY),
    (BODY, WARP),
)


def ablation(full: Cell) -> dict[str, Cell]:
    """The rows of the main table, by name. What has no effect is 0, so that equal cells are one."""
    untrained = replace(full, training_steps=0, learning_rate=0.0)
    undrawn = replace(untrained, ddim_steps=0, insert=False, edit="none", edit_step=0)
    unedited = replace(full, edit="none", edit_step=0)
    uninserted = replace(unedited, insert=False)
    return {
        COPY: replace(undrawn, source="copy"),
        WARP: replace(undrawn, source="warp"),
        UNTRAINED: untrained,
        NOISE: replace(uninserted, source="noise"),
        INVERSION: uninserted,
        INSERTION: unedited,
        FULL: full,
        BODY: replace(full, edit="body"),
    }


def harder(full: Cell) -> dict[str, Cell]:
    """Poses unlike any of the training clip's, each with the warp, the paper's method and whole bodies."""
    kinds = {
        "turning": replace(full, dance="turning"),
        "crossed arms": replace(full, dance="crossed"),
        "another's poses": replace(full, driver="literal"),
        "another's, retargeted": replace(full, driver="retargeted"),
    }
    ways = (WARP, FULL, BODY)
    return {
        f"{kind}: {'full' if way == FULL else way}": ablation(cell)[way]
        for kind, cell in kinds.items()
        for way in ways
    }


def repainting(full: Cell) -> dict[str, Cell]:
    """Each of REPAINTED, without and with a prompt that tells the colour it should have."""
    return {
        f"{name}, {'told' if told else 'not told'}": replace(full, repainted=name, told=told)
        for name in REPAINTED
        for told in (False, True)
    }


def plan(args: argparse.Namespace) -> dict[str, list[dict[str, Cell]]]:
    """For each part a list with one entry per puppet and seed: what is compared there, by name."""
    subjects = [
        (identity, seed) for seed in range(args.seeds) for identity in range(args.identities)
    ]
    swept = [full_method(identity, 0, args) for identity in range(args.sweep_identities)]
    moved = [full_method(identity, 0, args) for identity in range(args.identities)]
    haired = [one for one in moved if random_puppet(one.identity).hair_shape != "bald"]

    def trained_on(full: Cell, frames: int) -> Cell:
        steps = args.training_steps or training_steps(frames)
        return replace(full, training_frames=frames, clip_frames=LONG_CLIP, training_steps=steps)

    sweeps = {
        "alpha": lambda full: {
            str(step): replace(full, ddim_steps=ALPHA_STEPS, edit_step=step) for step in ALPHAS
        },
        "frames": lambda full: {str(n): trained_on(full, n) for n in args.training_frames},
        "rate": lambda full: {f"{rate:g}": replace(full, learning_rate=rate) for rate in RATES},
        "interpolation": lambda full: {
            "none": replace(full, edit="none", edit_step=0),
            "nearest": replace(full, interpolation="nearest"),
            "bilinear": full,
        },
        "steps": lambda full: {str(n): replace(full, ddim_steps=n) for n in DDIM_STEPS},
    }
    parts = {
        "main": [ablation(full_method(*subject, args)) for subject in subjects],
        "harder": [harder(full) for full in moved],
        "attributes": [repainting(full) for full in haired],
    }
    parts |= {part: [points(full) for full in swept] for part, points in sweeps.items()}
    return {part: parts[part] for part in PARTS if part in args.parts}


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
    motion: int  # the number of the dance


rendered = lru_cache(maxsize=4)(clip)  # the cells of a puppet follow one another


def set_scene(cell: Cell) -> Scene:
    dance = 1000 * cell.seed + 2 * cell.identity
    frames, poses, _ = rendered(cell.identity, dance, cell.clip_frames, SIZE)
    chosen = uniform_frames(range(cell.clip_frames), cell.training_frames)
    poses = [poses[index] for index in chosen]
    followed = dance + 1, cell.target_frames
    truth, true_poses, person = rendered(cell.identity, *followed, SIZE, cell.dance)
    targets = true_poses
    if cell.driver != "own":
        driver = random_puppet(unlike(cell.identity))
        targets = [pose_of(driver, state) for state in motion(*followed)]
    if cell.driver == "retargeted":
        targets = retarget(targets, poses, 1.0)
    return Scene(frames[chosen], poses, targets, truth, true_poses, person, dance + 1)


def repaint(cell: Cell) -> tuple[Puppet, str]:
    """The cell's puppet with another hair, shirt or lower garment, and the caption's words for it."""
    puppet = random_puppet(cell.identity)
    colours = HAIR_COLOURS if cell.repainted == "hair" else CLOTH_COLOURS
    worn = getattr(puppet, cell.repainted).name
    name = next(colour for colour in ("red", "blue") if colour != worn)
    other = replace(puppet, **{cell.repainted: Paint(name, colours[name])})
    return other, caption(other).split(", ")[1 + REPAINTED.index(cell.repainted)]


# ---- A warp without diffusion -------------------------------------------------------------------


def covered(pose: Pose, other: Pose, height: int, width: int) -> np.ndarray:
    """How much of each latent pixel (height, width) the parts that both poses show cover in the first."""
    weights = [part.weight for part in body_parts(pose, other, height, width)]
    return np.max(weights, axis=0) if weights else np.zeros((height, width))


def warp_body(latent: Tensor, reference_pose: Pose, pose: Pose, behind: Tensor) -> Tensor:
    """The reference's clean latent (4, h, w) with its body moved to another pose.

    What it leaves uncovered becomes `behind` (4, h, w), `without_people` of the training frames.
    """
    was, now = (
        covered(*pair, *latent.shape[-2:])
        for pair in ((reference_pose, pose), (pose, reference_pose))
    )
    left = torch.tensor((was - now).clip(0), dtype=latent.dtype, device=latent.device)
    warped = latent.lerp(behind, left)[None]
    edit_latents(warped, latent, [pose], reference_pose, "body")
    return warped[0]


def without_people(latents: Tensor, poses: Sequence[Pose]) -> Tensor:
    """What clips of a still camera (F, 4, h, w) show behind the person: (4, h, w).

    The mean of the frames where nobody stands at a place; where somebody always does, of all frames.
    """
    height, width = latents.shape[-2:]
    empty = np.ones((len(poses), height, width), bool)
    for free, pose in zip(empty, poses):
        free &= covered(pose, pose, height, width) == 0
    empty[:, ~empty.any(axis=0)] = True
    weight = torch.tensor(empty, dtype=latents.dtype, device=latents.device)[:, None]
    return (latents * weight).sum(dim=0) / weight.sum(dim=0)


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
        trained = train(
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
            save_file(trained, unfinished)
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
        behind = without_people(latents, scene.poses)
        warped = [warp_body(latents[k], scene.poses[k], p, behind) for p in scene.targets]
        return np.stack(list(decode_latents(model, torch.stack(warped))))

    targets = scene.targets
    poses = insert_reference(scene.poses[k], targets) if cell.insert else targets
    first_target = len(poses) - len(targets)
    hints = embed_hints(model, poses, SIZE, SIZE)
    context = encode_prompt(model, PROMPT)
    target, guidance = context, 1.0
    if cell.told:
        target, guidance = encode_prompt(model, f"{PROMPT}, {repaint(cell)[1]}"), GUIDANCE
    reference = encode_frames(model, scene.frames[k : k + 1])
    if cell.source == "noise":
        random = torch.Generator().manual_seed(cell.seed)
        noise = torch.randn(len(poses), *reference.shape[1:], generator=random).to(reference.device)
    else:
        hint = embed_hints(model, [scene.poses[k]], SIZE, SIZE)
        trajectory = invert(model, reference, hint, context, cell.ddim_steps)
        noise = trajectory[-1].expand(len(poses), -1, -1, -1)

    def edit(latents: Tensor, step: int) -> None:
        if step == cell.edit_step:
            reference_latent = trajectory[cell.ddim_steps - step + 1][0]
            poses_of = targets, scene.poses[k]
            edit_latents(latents[first_target:], reference_latent, *poses_of, cell.edit)

    by_nearest = mock.patch("posecrafter.sample_bilinear", nearest)
    with by_nearest if cell.interpolation == "nearest" else nullcontext():
        guided = guidance, encode_prompt(model, "")
        latents = sample(model, noise, hints, target, cell.ddim_steps, *guided, edit)
    return np.stack(list(decode_latents(model, latents[first_target:])))


# ---- Figures ------------------------------------------------------------------------------------

# Each figure's title, how it is printed, and what it is.
FIGURES = {
    "psnr": ("PSNR ↑", ".2f", "of whole frames, in dB"),
    "psnr_person": ("person ↑", ".2f", "PSNR of the true person's pixels"),
    "ssim": ("SSIM ↑", ".4f", "of whole frames"),
    "l1": ("L1 ↓", ".4f", "of whole frames, from 0 to 1"),
    "psnr_face": (
        "face ↑",
        ".2f",
        "PSNR in the box of the true face's landmarks, grown by 3 pixels",
    ),
    "psnr_hands": ("hands ↑", ".2f", "PSNR in the boxes of the true hands' landmarks, grown so"),
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
        "pck": np.array(found),
        "temporal": np.abs(np.subtract(*changes)).mean(axis=(1, 2, 3)) / 255,
    }
    figures = {name: float(np.nanmean(values)) for name, values in by_frame.items()}
    if cell.repainted:
        puppet, states = repaint(cell)[0], motion(scene.motion, cell.target_frames)
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
    content = hashlib.sha256()
    for file in sorted(DEMO.rglob("*.safetensors")):
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
    trained_by = (
        "identity",
        "seed",
        "training_frames",
        "clip_frames",
        "training_steps",
        "learning_rate",
    )
    return (
        f"{cell.identity}-{cell.seed}-{digest({name: getattr(cell, name) for name in trained_by})}"
    )


def shown(frames: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Up to 8 frames, evenly spaced."""
    return [frames[i] for i in uniform_frames(range(len(frames)), min(SHOWN, len(frames)))]


def save_cell(work: Path, cell: Cell, figures: dict[str, float], frames: np.ndarray) -> None:
    """The figures come last: a cell that has them is whole."""
    path = cell_path(work, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(path.with_suffix(".png"), np.concatenate(shown(frames), axis=1))
    with replacing(path) as unfinished:
        unfinished.write_text(
            json.dumps({"figures": figures, "cell": asdict(cell)}, indent=1) + "\n"
        )


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
        workers = [spawn.Process(target=compute_share, args=(s, work, processes)) for s in shares]
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


# ---- The report ---------------------------------------------------------------------------------

# Student's t, 97.5 %, for 1, 2, ... degrees of freedom; more have the last one's, which is on the safe side.
T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The mean of (n,) values and half the width of its 95 % interval; not a number for one value."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return float(values.mean()), float("nan")
    t = T[min(len(values) - 1, len(T)) - 1]
    return float(values.mean()), float(t * values.std(ddof=1) / np.sqrt(len(values)))


Values = dict[str, dict[str, np.ndarray]]  # by name in a part, then by figure: (identities,)


def gather(work: Path, points: Sequence[dict[str, Cell]]) -> tuple[Values, list[dict[str, Cell]]]:
    """The figures of a part, seeds averaged, and which puppets and seeds they are from.

    Only puppets and seeds of which all cells exist: every name's mean is over the same ones.
    """
    done = [cells for cells in points if all(cell_path(work, c).exists() for c in cells.values())]
    values: Values = {}
    for name in done[0] if done else ():
        by_identity: dict[int, list[dict]] = {}
        for cells in done:
            found = load_figures(work, cells[name])
            by_identity.setdefault(cells[name].identity, []).append(found)
        values[name] = {
            figure: np.array(
                [np.mean([f.get(figure, np.nan) for f in each]) for each in by_identity.values()]
            )
            for figure in FIGURES | VIDEO_SIM | REPAINTING
        }
    return values, done


def pairs(values: Values) -> Values:
    """The main table's differences, puppet by puppet."""
    return {
        f"{'full' if a == FULL else a} − {b}": {
            figure: values[a][figure] - values[b][figure] for figure in FIGURES
        }
        for a, b in PAIRS
    }


def markdown_table(values: Values, first: str, figures: dict, signed: bool = False) -> str:
    """Means with 95 % intervals; differences are signed, and bold where the interval excludes 0."""
    lines = [f"| {first} | " + " | ".join(title for title, _, _ in figures.values()) + " |"]
    lines += ["| --- |" + " ---: |" * len(figures)]
    for name, row in values.items():
        entries = []
        for figure, (_, form, _) in figures.items():
            mean, half = interval(row[figure])
            text = f"{mean:{'+' if signed else ''}{form}}"
            text += f" ± {half:{form}}" if np.isfinite(half) else ""
            entries.append(f"**{text}**" if signed and abs(mean) > half else text)
        lines += [f"| {name} | " + " | ".join(entries) + " |"]
    return "\n".join(lines)


def draw(path: Path, values: Values, x_title: str, figures: dict) -> None:
    """One panel per figure, under each other: its mean and 95 % interval at each point, evenly spaced."""
    double, width, panel = 2, 720, 210  # drawn twice as large and averaged down
    font = ImageFont.load_default(size=13 * double)
    left, right, top, bottom = (double * side for side in (70, 30, 36, 34))
    width, panel = width * double, panel * double
    image = Image.new("RGB", (width, panel * len(figures)), PAPER)
    pen = ImageDraw.Draw(image)
    x = np.linspace(left + 20 * double, width - right, len(values))
    for row, (figure, (title, form, _)) in enumerate(figures.items()):
        spans = np.array([interval(point[figure]) for point in values.values()])  # (points, 2)
        means, halves = spans[:, 0], np.nan_to_num(spans[:, 1])
        low, high = (means - halves).min(), (means + halves).max()
        ceiling, floor = row * panel + top, (row + 1) * panel - bottom

        def height(value, low=low, span=(high - low) or 1, ceiling=ceiling, floor=floor):
            return floor - (floor - ceiling) * (value - low) / span

        pen.text((left, ceiling - top // 2), title[:-2], INK, font, anchor="lm")
        for value in (low, high):
            pen.line((left, height(value), width - right, height(value)), FAINT, double)
            pen.text((left - 6 * double, height(value)), f"{value:{form}}", INK, font, anchor="rm")
        for i, name in enumerate(values):
            ends = height(means[i] - halves[i]), height(means[i] + halves[i])
            pen.line((x[i], ends[0], x[i], ends[1]), INK, double)
            pen.text((x[i], floor + bottom // 2), name, INK, font, anchor="mm")
        pen.line(list(zip(x, height(means))), LINE, 2 * double, joint="curve")
        pen.text((width - right, ceiling - top // 2), x_title, INK, font, anchor="rm")
    save_image(path, image.reduce(double))


def draw_sheet(path: Path, work: Path, done: Sequence[dict[str, Cell]]) -> None:
    """Three puppets in their first seed: pose, truth and every row."""
    rows = {}
    for cells in [cells for cells in done if cells[FULL].seed == done[0][FULL].seed][:3]:
        scene, who = set_scene(cells[FULL]), cells[FULL].identity
        drawn = [draw_pose(pose, SIZE, SIZE) for pose in scene.targets]
        rows |= {f"{who}: pose": shown(drawn), f"{who}: truth": shown(scene.truth)}
        rows |= {f"{who}: {name}": load_strip(work, cell) for name, cell in cells.items()}
    save_image(path, contact_sheet(rows, cell_height=SIZE))


SWEEPS = {  # each part's heading, first column, and what was done
    "alpha": (
        "When to edit",
        "edit step",
        f"Latent editing before this one of {ALPHA_STEPS} DDIM steps; later ones take the inversion's "
        "latent of that step.",
    ),
    "frames": (
        "How many training frames",
        "frames",
        f"Uniformly from a clip of {LONG_CLIP} frames, trained for {{steps}} steps. (By the paper's "
        "formula, and never fewer than 50, unless the command above says otherwise.)",
    ),
    "rate": ("Learning rate", "rate", "Of AdamW; the demo model's own is {rate:g}."),
    "interpolation": (
        "How latent editing reads the reference",
        "read",
        "None: no editing. Averaging neighbours, as bilinear reading does, takes variance from noise.",
    ),
    "steps": ("DDIM steps", "steps", "Of inversion and sampling alike."),
}
HARDER = (
    "Dances of which the training clip shows nothing: a body that turns to its sides, arms crossed over the "
    "chest; and the poses of another puppet, of 100 held-out ones the one whose build differs most. It does "
    "the same dance, so the truth is the puppet's own; PCK asks for the poses that were followed."
)
ATTRIBUTES = (
    f"The prompt names another colour, with a guidance scale of {GUIDANCE:g}. The truth is the puppet as it is, "
    "and repainted."
)
PLOTTED = {
    "alpha": ("edit step", ("psnr_person", "ssim", "psnr_face", "psnr_hands", "temporal")),
    "frames": ("training frames", ("psnr", "psnr_person", "video_sim")),
}


def explain(figures: dict) -> str:
    return "\n".join(f"- {title[:-2]}: {meaning}." for title, _, meaning in figures.values())


def listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(set(numbers))))


def describe(done: Sequence[dict[str, Cell]]) -> str:
    """The puppets, seeds and settings of a part's cells."""
    cells = [cell for row in done for cell in row.values()]
    clips = listed(cell.clip_frames for cell in cells)
    counts = {
        "puppets": listed(cell.identity for cell in cells),
        "seeds": listed(cell.seed for cell in cells),
        "target frames": listed(cell.target_frames for cell in cells),
        "training frames": f"{listed(c.training_frames for c in cells)} of {clips}",
        "training steps": listed(c.training_steps for c in cells if c.training_steps),
        "DDIM steps": listed(c.ddim_steps for c in cells if c.ddim_steps),
    }
    text = "; ".join(f"{name} {numbers}" for name, numbers in counts.items())
    return f"Clips in each row: {len(done)} ({text})."


def command(args: argparse.Namespace, parts: Sequence[str]) -> str:
    """The command that computes what is reported."""
    options = ["target_frames", "ddim_steps"]
    options += ["training_steps"] if args.training_steps else []
    swept = set(parts) - {"main", "harder", "attributes"}
    options += ["identities"] if set(parts) - swept else []
    options += ["seeds"] if "main" in parts else []
    options += ["sweep_identities"] if swept else []
    words = [f"--{name.replace('_', '-')} {getattr(args, name)}" for name in options]
    if "frames" in parts:
        words += [f"--training-frames {' '.join(map(str, args.training_frames))}"]
    return f"python demo/ablate.py {' '.join(words)} --parts {' '.join(parts)}"


def report(args: argparse.Namespace) -> None:
    """Writes RESULTS.md and its pictures from the cells that exist, and says so where none do."""
    gathered = {part: gather(args.work, points) for part, points in plan(args).items()}
    gathered = {part: found for part, found in gathered.items() if found[1]}
    if not gathered:
        print(f"{args.work}: no puppet has all cells of a part yet, so there is nothing to report")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    text = [
        "# What each part of the method is worth, on puppets",
        "Written by `demo/ablate.py`, from its own runs alone. The puppets are new to the demo model, "
        f"which was trained on those from {HELD_OUT:,} on. The poses asked for are those of another dance "
        "than the training clip's, and come from the renderer. A seed changes training, noise and both "
        "dances. Means are over puppets, seeds averaged first, with 95 % intervals (Student's t over "
        "puppets).",
        f"    {command(args, list(gathered))}",
        "Figures (↑: higher is better, ↓: lower is better):\n\n" + explain(FIGURES),
    ]
    if "main" in gathered:
        values, done = gathered["main"]
        draw_sheet(args.out / "results_sheet.png", args.work, done)
        rows = "\n".join(f"- `{name}`: {meaning}." for name, meaning in ROWS.items())
        text += [
            "## The method, part by part",
            describe(done),
            rows,
            markdown_table(values, "", FIGURES),
            "Paired differences, puppet by puppet; bold where the interval excludes 0:",
            markdown_table(pairs(values), "", FIGURES, signed=True),
            "![Pose, truth and every row of three puppets](results_sheet.png)",
            f"Up to {SHOWN} frames of each clip, evenly spaced; the numbers count them.",
        ]
    if "harder" in gathered:
        values, done = gathered["harder"]
        kinds = dict.fromkeys(name.split(":")[0] for name in values)
        gains = {
            f"{kind}: whole body − full": {
                figure: values[f"{kind}: {BODY}"][figure] - values[f"{kind}: full"][figure]
                for figure in FIGURES
            }
            for kind in kinds
        }
        text += ["## Harder poses", HARDER, describe(done), markdown_table(values, "", FIGURES)]
        text += ["Paired differences:", markdown_table(gains, "", FIGURES, signed=True)]
    if "attributes" in gathered:
        values, done = gathered["attributes"]
        text += ["## Words", ATTRIBUTES, describe(done), explain(REPAINTING)]
        text += [markdown_table(values, "", REPAINTING)]
    for part, (heading, first, meaning) in SWEEPS.items():
        if part not in gathered:
            continue
        values, done = gathered[part]
        figures = FIGURES | VIDEO_SIM if part == "frames" else FIGURES
        steps = ", ".join(str(cell.training_steps) for cell in done[0].values())
        rate = read_settings(DEMO / "posecrafter.json")["learning_rate"]
        text += [f"## {heading}", meaning.format(steps=steps, rate=rate), describe(done)]
        text += [explain(VIDEO_SIM)] if part == "frames" else []
        text += [markdown_table(values, first, figures)]
        if part in PLOTTED:
            x_title, names = PLOTTED[part]
            picture = f"results_{part}.png"
            draw(args.out / picture, values, x_title, {name: figures[name] for name in names})
            text += [f"![Means and 95 % intervals over the {x_title}]({picture})"]
    with replacing(args.out / "RESULTS.md") as unfinished:
        unfinished.write_text("\n\n".join(text) + "\n")
    print(f"Look at {args.out / 'RESULTS.md'}; the pictures are beside it.")


# ---- The command line ---------------------------------------------------------------------------


def parse_arguments(
    command: list[str] | None = None,
) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--identities", type=int, default=8, help="puppets 0, 1, ... (default: 8)")
    parser.add_argument("--seeds", type=int, default=3, help="of each (default: 3)")
    parser.add_argument("--sweep-identities", type=int, default=4, help="of sweeps (default: 4)")
    parser.add_argument("--target-frames", type=int, default=24, help="(default: 24)")
    parser.add_argument("--ddim-steps", type=int, default=20, help="(default: 20)")
    parser.add_argument(
        "--training-steps", type=int, help="(default: the paper's, 100 for 8 frames)"
    )
    parser.add_argument(
        "--training-frames",
        type=int,
        nargs="+",
        default=[2, 4, 8, 16, 32],
        help=f"of the frames sweep, up to {LONG_CLIP} (default: 2 4 8 16 32)",
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="(default: all)")
    parser.add_argument("--processes", type=int, default=1, help="that share the work (default: 1)")
    parser.add_argument(
        "--only-report", action="store_true", help="compute nothing; report what there is"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/ablate"), help="default: %(default)s"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent,
        help="folder of the report (default: demo)",
    )
    return parser, parser.parse_args(command)


def main(args: argparse.Namespace) -> None:
    if not 1 <= args.identities <= 500 or not 1 <= args.sweep_identities <= 500:
        raise ValueError("1 to 500 puppets: more would dance the next seed's dances")
    if args.seeds < 1 or args.target_frames < 2 or args.ddim_steps < 1:
        raise ValueError("give 1 or more --seeds and --ddim-steps, and 2 or more --target-frames")
    if not all(1 <= frames <= LONG_CLIP for frames in args.training_frames):
        raise ValueError(f"--training-frames: there are {LONG_CLIP} to choose from")
    wanted = [cell for rows in plan(args).values() for row in rows for cell in row.values()]
    missing = [c for c in dict.fromkeys(wanted) if not cell_path(args.work, c).exists()]
    if missing and not args.only_report:
        compute(missing, args.work, args.processes)
    report(args)


if __name__ == "__main__":
    parser, args = parse_arguments()
    try:
        main(args)
    except (OSError, ValueError) as error:
        parser.exit(2, f"ablate.py: {error}\n")
