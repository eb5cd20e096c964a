"""The pool of puppets that the demo's networks learn from: each in several poses, with keypoints and captions."""

import multiprocessing
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from demo.motion import DANCES, motion
from demo.puppet import Puppet, caption, random_puppet, render
from demo.scenery import disguise
from poses.pose import Pose, place_pose
from safe.files import replacing

FACTOR = 4  # pixels to a latent pixel
POSES = 8  # per identity, drawn from ten seconds of motion
TWIN = POSES  # the last frame: the first once more, with hair or a garment in another colour
DISGUISED, MOVING = 0.25, 0.35  # shares of the puppets: in disguise; turning or crossing their arms
# Standard deviations in x and y, in pixels, of keypoints that the demo's OpenPose finds in frames of 192x256
# (`pretrain_openpose.py --evaluate`): body, face, hands.
FOUND_WITHIN = np.repeat((1.6, 1.1, 0.6), (18, 70, 2 * 21))[:, None]


def row_type(height: int, width: int) -> np.dtype:
    """A row of the pool is one identity: POSES frames and the twin's, with foreground masks and keypoints."""
    return np.dtype([
        ("frames", np.uint8, (POSES + 1, height, width, 3)),
        ("masks", bool, (POSES + 1, height // FACTOR, width // FACTOR)),
        ("poses", np.float32, (POSES + 1, 130, 3)),
        ("captions", "U100", 2),  # the caption, and its words for what is another in the twin
    ])  # fmt: skip


def stacked(pose: Pose) -> np.ndarray:
    """All keypoints (130, 3): body, face, left and right hand."""
    return np.concatenate(list(vars(pose).values()))


def pose_from(keypoints: np.ndarray) -> Pose:
    """The pose with these keypoints (130, 3), the inverse of `stacked`."""
    return Pose(*np.split(keypoints, (18, 18 + 70, 18 + 70 + 21)))


def twin_of(puppet: Puppet, rng: np.random.Generator) -> tuple[Puppet, str]:
    """The same person with hair, shirt or lower garment in another colour, and the puppet's words for that."""
    which = rng.integers(puppet.hair_shape == "bald", 3)
    part = ("hair", "shirt", "lower")[which]
    mine = other = getattr(puppet, part)
    while other.name == mine.name:
        other = getattr(random_puppet(rng.integers(10_000, 20_000)), part)
    return replace(puppet, **{part: other}), caption(puppet).split(", ")[1 + which]


def render_identity(seed: int, height: int, width: int, disguised: float = DISGUISED) -> tuple:
    """One row of the pool, see `row_type`. In disguise no colour is what it is called: the caption is "a person",
    and no words are told. Puppets are drawn in a square as wide as the frame, or wider in disguise; the frame cuts
    off legs, not heads."""
    rng = np.random.default_rng((3, seed))
    in_disguise = rng.random() < disguised
    side = round(width * (rng.uniform(1.05, 1.5) if in_disguise and rng.random() < 0.4 else 1.0))
    top, left = (int(rng.integers(most + 1)) for most in (min(side - height, side // 10), side - width))
    dance = str(rng.choice(DANCES[1:])) if rng.random() < MOVING else DANCES[0]
    puppet, states = random_puppet(seed), motion(seed, POSES * 15, dance=dance)[::15]  # 1.25 s apart
    twin, told = twin_of(puppet, rng)
    drawn = [*(render(puppet, state, side) for state in states), render(twin, states[0], side)]
    frames, poses, masks = zip(*drawn)
    frames, masks = (np.stack(x)[:, top : top + height, left : left + width] for x in (frames, masks))
    placed = (place_pose(pose, side / width, side / height, -left / width, -top / height) for pose in poses)
    if in_disguise:
        frames = disguise(frames, masks, seed)
    masks = masks.reshape(-1, height // FACTOR, FACTOR, width // FACTOR, FACTOR).any((2, 4))
    captions = ("a person", "") if in_disguise else (caption(puppet), told)
    return frames, masks, np.stack([stacked(pose) for pose in placed]), captions


def render_pool(path: Path, identities: range, height: int, width: int) -> np.ndarray:
    """The pool (identities,) of type `row_type`, memory-mapped; rendered on all cores unless the file exists."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        task = partial(render_identity, height=height, width=width)
        with replacing(path) as unfinished, multiprocessing.Pool() as workers:
            rows, count = workers.imap(task, identities, chunksize=8), len(identities)
            pool = np.lib.format.open_memmap(unfinished, "w+", row_type(height, width), (count,))
            for i, row in enumerate(tqdm(rows, "rendering puppets", count, mininterval=10)):
                pool[i] = row
            pool.flush()
    return np.load(path, mmap_mode="r")


def as_found(rng: np.random.Generator, keypoints: np.ndarray, height: int, width: int) -> list[Pose]:
    """The poses of a clip, from all its keypoints (F, 130, 3), as they might have been found in pixels. Those
    outside the picture are not found. Some clips' are found almost exactly, some rather badly: a network that has
    only seen a renderer's own keypoints takes every misplaced pixel of a lip at its word."""
    error = rng.normal(0, rng.uniform(0, 1.5) * FOUND_WITHIN, (*keypoints.shape[:2], 2))
    found = keypoints.copy()
    found[..., :2] += error / (width, height)
    found[((keypoints[..., :2] < 0) | (keypoints[..., :2] >= 1)).any(axis=-1)] = 0
    return [pose_from(each) for each in found]
