"""How long moving body parts takes: seconds of one core a frame of `beyond.pseudo.pseudo_video`.

    python bench/parts.py                       a portrait of 896x512 pixels (height x width), as phones film
    python bench/parts.py --size 512x896 --puppets 1 2 3

A puppet dances in a training clip, and its parts are moved to the poses of another dance. Frames are rendered as
squares of the larger side and cut down to size. The background is the mean of what the training frames show of it.
All of `pseudo_video` is measured, in process time on one thread, and divided by the number of target frames.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from beyond.pseudo import pseudo_video
from demo.puppet import clip
from posecrafter import select_reference
from poses.pose import Pose, place_pose

LATENT = 8  # pixels along the side of a latent pixel, in Stable Diffusion


def cut(
    who: int, dance: int, frames: int, height: int, width: int
) -> tuple[np.ndarray, list[Pose], np.ndarray]:
    """A puppet's dance: frames uint8 (F, height, width, 3), F poses, masks of the puppet (F, height, width).

    The middle of the square's width is kept, and its upper end.
    """
    side = max(height, width)
    left = (side - width) // 2
    images, poses, masks = clip(who, dance, frames, side)
    kept = slice(height), slice(left, left + width)
    placement = side / width, side / height, -left / width, 0
    poses = [place_pose(pose, *placement) for pose in poses]
    return images[:, *kept], poses, masks[:, *kept]


def background(frames: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, torch.Tensor]:
    """The mean of frames where nobody stands, uint8 (H, W, 3), and where any shows it, booleans (1, h, w)."""
    empty = ~masks
    count = empty.sum(axis=0)[..., None]
    mean = (frames * empty[..., None]).sum(axis=0) / count.clip(1)
    height, width = (side // LATENT for side in empty.shape[1:])
    blocks = (count > 0).reshape(height, LATENT, width, LATENT)
    return mean.round().astype(np.uint8), torch.from_numpy(blocks.all(axis=(1, 3)))[None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="896x512", help="height x width (default: 896x512)")
    parser.add_argument("--puppets", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--frames", type=int, default=8, help="of the training clip (default: 8)")
    parser.add_argument("--targets", type=int, default=12, help="target poses (default: 12)")
    args = parser.parse_args()
    height, width = map(int, args.size.split("x"))
    torch.set_num_threads(1)

    print(f"{height}x{width}, {args.frames} training frames, {args.targets} targets")
    for who in args.puppets:
        frames, poses, masks = cut(who, 2 * who, args.frames, height, width)
        _, targets, _ = cut(who, 2 * who + 1, args.targets, height, width)
        place = poses, select_reference(poses, targets), targets
        behind = background(frames, masks)
        began = time.process_time()
        pseudo_video(frames, *place, *behind)
        seconds = (time.process_time() - began) / args.targets
        print(f"puppet {who}: {seconds:.2f} seconds of one core a frame")


if __name__ == "__main__":
    main()
