"""The pool of puppets that the demo's networks learn from: each in several poses, with keypoints and captions."""

import json
import multiprocessing
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import trange

from demo.motion import DANCES, motion
from demo.puppet import CLOTH_COLOURS, HAIR_COLOURS, Paint, Puppet, caption, random_puppet, render
from demo.scenery import disguise
from poses.pose import Pose, place_pose

FACTOR = 4  # pixels to a latent pixel
POSES = 8  # per identity, drawn from ten seconds of motion
TWIN = POSES  # the last frame: the first once more, with hair or a garment in another colour
DISGUISED, MOVING = 0.25, 0.35  # shares of the puppets: in disguise; turning or crossing their arms
# Standard deviations in x and y, in pixels, of keypoints that the demo's OpenPose finds in frames of 192x256
# (`pretrain_openpose.py --evaluate`): body, face, hands.
FOUND_WITHIN = np.repeat((1.6, 1.1, 0.6), (18, 70, 2 * 21))[:, None]


def twin_of(puppet: Puppet, rng: np.random.Generator) -> tuple[Puppet, str, str]:
    """The same person with hair, shirt or lower garment in another colour, and the captions' words for
    what differs: the puppet's, and the twin's."""
    which = rng.integers(puppet.hair_shape == "bald", 3)
    name, colours = (("hair", HAIR_COLOURS), ("shirt", CLOTH_COLOURS), ("lower", CLOTH_COLOURS))[which]
    others = [colour for colour in colours if colour != getattr(puppet, name).name]
    colour = str(rng.choice(others))
    twin = replace(puppet, **{name: Paint(colour, colours[colour])})
    words, twins_words = (caption(who).split(", ")[1 + which] for who in (puppet, twin))
    return twin, words, twins_words


def latent_pixels(pixels: np.ndarray) -> np.ndarray:
    """Latent pixels that hold any of these pixels: booleans (..., H, W) to (..., H/4, W/4)."""
    *rest, height, width = pixels.shape
    return pixels.reshape(*rest, height // FACTOR, FACTOR, width // FACTOR, FACTOR).any((-3, -1))


def stacked(pose: Pose) -> np.ndarray:
    """All keypoints (130, 3): body, face, left and right hand."""
    return np.concatenate(list(vars(pose).values()))


def pose_from(keypoints: np.ndarray) -> Pose:
    """The pose with these keypoints (130, 3), see `stacked`."""
    return Pose(*np.split(keypoints, (18, 18 + 70, 18 + 70 + 21)))


def details(pose: Pose) -> tuple[np.ndarray, ...]:
    """The keypoints (K, 3) of what is small and what people look at."""
    return pose.face, pose.left_hand, pose.right_hand


def near(keypoints: np.ndarray, height: int, width: int, margin: float = 2.0) -> np.ndarray:
    """The box of keypoints (K, 3), canvas-normalised, grown by `margin` pixels: booleans (height, width)."""
    mask = np.zeros((height, width), bool)
    points = keypoints[:, :2] * (width, height)
    left, top = (points.min(axis=0) - margin).clip(0).astype(int)
    right, bottom = np.ceil(points.max(axis=0) + margin).clip(0).astype(int)
    mask[top:bottom, left:right] = True
    return mask


def render_identity(
    seed: int, height: int, width: int, disguised: float = DISGUISED
) -> tuple[dict[str, np.ndarray], list[str]]:
    """A row of the pool, and three texts: the caption, its words for what the twin changes, the twin's words for
    it. In disguise no colour is what it is called: the caption is "a person", and the others are empty.

    The row: frames (POSES + 1, H, W, 3) uint8, masks (POSES + 1, H/4, W/4) uint8, poses (POSES + 1, 130, 3).
    Puppets are drawn in a square as wide as the frame, or wider in disguise; the frame cuts off legs, not heads.
    """
    rng = np.random.default_rng((3, seed))
    in_disguise = rng.random() < disguised
    zoom = rng.uniform(1.05, 1.5) if in_disguise and rng.random() < 0.4 else 1.0
    side = round(width * zoom)
    top = int(rng.integers(min(side - height, side // 10) + 1))
    left = int(rng.integers(side - width + 1))
    dance = str(rng.choice(DANCES[1:])) if rng.random() < MOVING else DANCES[0]
    puppet = random_puppet(seed)
    states = motion(seed, POSES * 15, dance=dance)[::15]  # 1.25 s apart
    twin, *told = twin_of(puppet, rng)
    frames, poses, masks = [], [], []
    for who, state in [*((puppet, state) for state in states), (twin, states[0])]:
        frame, pose, mask = render(who, state, side)
        shown = np.s_[top : top + height, left : left + width]
        frames.append(frame[shown])
        masks.append(mask[shown])
        poses.append(stacked(place_pose(pose, side / width, side / height, -left / width, -top / height)))
    frames, masks = np.stack(frames), np.stack(masks)
    if in_disguise:
        frames = disguise(frames, masks, seed)
    words = ["a person", "", ""] if in_disguise else [caption(puppet), *told]
    masks = latent_pixels(masks).astype(np.uint8)
    return {"frames": frames, "masks": masks, "poses": np.stack(poses)}, words


def render_pool(work: Path, identities: range, height: int, width: int) -> dict:
    """The pool, rendered unless it is there: memory-mapped arrays with one row per identity, and "captions"."""
    work.mkdir(parents=True, exist_ok=True)
    rows, frames = len(identities), POSES + 1
    shapes = {
        "frames": (np.uint8, (rows, frames, height, width, 3)),
        "masks": (np.uint8, (rows, frames, height // FACTOR, width // FACTOR)),
        "poses": (np.float32, (rows, frames, 130, 3)),
    }
    done = work / "captions.json"
    if not done.exists():
        pool = {
            name: np.lib.format.open_memmap(work / f"{name}.npy", "w+", dtype, shape)
            for name, (dtype, shape) in shapes.items()
        }
        captions = []
        with multiprocessing.Pool() as workers:
            task = partial(render_identity, height=height, width=width)
            rendered = workers.imap(task, identities, chunksize=8)
            for i in trange(rows, desc="rendering puppets", mininterval=10):
                row, words = next(rendered)
                for name, array in row.items():
                    pool[name][i] = array
                captions.append(words)
        for array in pool.values():
            array.flush()
        done.write_text(json.dumps(captions))
    pool = {name: np.load(work / f"{name}.npy", mmap_mode="r") for name in shapes}
    return pool | {"captions": json.loads(done.read_text())}


def as_found(rng: np.random.Generator, keypoints: np.ndarray, height: int, width: int) -> list[Pose]:
    """The poses of a clip, from all its keypoints (F, 130, 3), as they might have been found in pixels.

    Those outside the picture are not found. Some clips' are found almost exactly, some rather badly: a network
    that has only seen a renderer's own keypoints takes every misplaced pixel of a lip at its word.
    """
    error = rng.normal(0, rng.uniform(0, 1.5) * FOUND_WITHIN, (*keypoints.shape[:2], 2))
    found = keypoints.copy()
    found[..., :2] += error / (width, height)
    found[((keypoints[..., :2] < 0) | (keypoints[..., :2] >= 1)).any(axis=-1)] = 0
    return [pose_from(each) for each in found]


def weighted_frame(
    rng: np.random.Generator, pool: dict, of_face: float, of_hands: float, crop: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """A frame of the pool, or a square of `crop` pixels around a part of the person, and its pixels' weights:
    1, 3 on the person, and those of face and hands in their boxes."""
    i, j = rng.integers(len(pool["frames"])), rng.integers(POSES)
    frame, mask = pool["frames"][i, j], pool["masks"][i, j]
    height, width = frame.shape[:2]
    parts = details(pose_from(pool["poses"][i, j]))
    weight = 1 + 2 * np.kron(mask, np.ones((FACTOR, FACTOR), np.float32))
    for part, heavy in zip(parts, (of_face, of_hands, of_hands)):
        weight[near(part, height, width)] = heavy
    if not crop:
        return frame, weight
    if rng.random() < 0.3:
        centre = FACTOR * rng.choice(np.argwhere(mask))
    else:
        centre = parts[rng.integers(3)][:, 1::-1].mean(axis=0) * (height, width)
    corner = (centre - crop * rng.uniform(0.2, 0.8, 2)).astype(int) // FACTOR * FACTOR
    top, left = np.clip(corner, 0, (height - crop, width - crop))
    window = np.s_[top : top + crop, left : left + crop]
    return frame[window], weight[window]
