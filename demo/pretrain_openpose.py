"""Makes the demo's OpenPose from nothing: `python demo/pretrain_openpose.py`, two or three hours on two CPU cores.

CMU's networks have seen people; these have seen paper puppets: whole ones, some larger ones, and those of the
pool that `pretrain.py` renders (or has rendered). They are the same code, narrower and with fewer stages, and
trained on what decoding will show them. The crops and the inputs are made by `openpose.py` itself, and a target
lies where decoding turns it into the true keypoint. A run that is interrupted goes on from its last checkpoint.
The shipped networks went a longer way, told in docs/LOG.md.

    python demo/pretrain_openpose.py --evaluate

says how well the shipped networks find puppets that they have never seen.
"""

import argparse
import multiprocessing
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from command import keep_freed_memory
from demo.motion import motion
from demo.pool import latent_pixels, render_pool, stacked
from demo.pretrain import HEIGHT, IDENTITIES, WIDTH, optimise
from demo.puppet import random_puppet, render
from demo.save import save_openpose
from openpose import OpenPose, detect_bodies, detect_parts, load_openpose
from poses.maps import (
    LEAST_SIDE,
    LIMB_MAPS,
    LIMBS,
    STRIDE,
    body_input,
    body_size,
    enlarged,
    face_boxes,
    face_input,
    hand_boxes,
    hand_input,
)
from poses.pose import Pose, is_seen
from video import replacing

# A crop of a hand in a frame of 128 pixels has 20 to 25 of them, and one of a face 30: they need no
# enlarging to 736 and 384, which would be nine tenths of the work. A second stage cannot say more than
# its 24 channels hold: enough for a body's or a hand's maps, too little for a face's 71.
SIZES = {"width": 0.1875, "stages": (2, 2, 1), "hand_sizes": (184,), "face_size": 192}
SIGMA = 7  # pixels of the input: how far a keypoint's peak reaches, as in OpenPose's training
LIMB_REACH = 8  # pixels of the input: half the width of a limb's field
SIZE, LARGE = 128, 256  # pixels: the sides of the frames that show whole puppets
SEEDS = {SIZE: range(30_000, 42_000), LARGE: range(42_000, 42_600)}
EVALUATED = 200  # puppets, numbered from 0, which neither training has seen
STEPS = {"body": 3000, "hand": 8000, "face": 3000}  # of training
PARTS = {"body": slice(0, 18), "face": slice(18, 88), "hands": slice(88, 130)}


# ---- 1. Puppets and their keypoints -----------------------------------------------------------------


def render_square(seed: int, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A frame (side, side, 3), the puppet's mask (side/4, side/4) and keypoints (130, 3)."""
    frame, pose, mask = render(random_puppet(seed), motion(seed, 1)[0], side)
    return frame, latent_pixels(mask), stacked(pose)


def load_pools(work: Path, pool: Path) -> list[dict[str, np.ndarray]]:
    """Frames (N, H, W, 3), masks (N, H/4, W/4) and keypoints (N, 130, 3): of whole puppets, of larger ones, and of
    the pool of `pretrain.py`, which shows them from the knees up. Renders what is not rendered yet."""
    pools = []
    for side, seeds in SEEDS.items():
        path = work / f"puppets_{side}.npz"
        if not path.exists():
            with multiprocessing.Pool() as workers:
                drawn = workers.imap(partial(render_square, side=side), seeds, chunksize=8)
                columns = zip(*tqdm(drawn, f"puppets of {side} pixels", len(seeds), mininterval=10))
                rendered = dict(zip(("frames", "masks", "keypoints"), map(np.stack, columns)))
            with replacing(path) as unfinished:
                np.savez(unfinished, **rendered)
        pools.append(dict(np.load(path)))
    rows = render_pool(pool, IDENTITIES, HEIGHT, WIDTH)
    columns = {"frames": "frames", "masks": "masks", "keypoints": "poses"}
    flat = {name: rows[key].reshape(-1, *rows[key].shape[2:]) for name, key in columns.items()}
    return [*pools, flat]


# ---- 2. Variety -------------------------------------------------------------------------------------


def varied(rng: np.random.Generator, pool: dict, batch: int) -> tuple[Tensor, np.ndarray]:
    """Frames uint8 (N, H, W, 3) and keypoints (N, 130, 3) in pixels, as clips might show puppets.

    In other places, sizes and colours, a little turned, before other backgrounds, and with the
    colours at half the resolution, as most videos have them. A third stays where it was, and so as
    sharp. What lies outside the frame is not seen. Mirrored puppets would be nothing new: nothing
    about them prefers a side.
    """
    rows = np.sort(rng.choice(len(pool["frames"]), batch, replace=False))
    images = torch.from_numpy(pool["frames"][rows]).permute(0, 3, 1, 2).float()  # (N, 3, H, W)
    mask = torch.from_numpy(pool["masks"][rows]).float()[:, None]
    keypoints = pool["keypoints"][rows].copy()
    size = images.shape[2:]
    upright = np.array([size[1] / size[0], 1.0])  # from half frames to a measure that turns

    def numbers(low: float, high: float, *shape: int) -> Tensor:
        values = rng.uniform(low, high, (batch, *shape, *[1] * (3 - len(shape))))
        return torch.from_numpy(values).float()

    def sometimes(share: float) -> Tensor:
        return (numbers(0, 1) < share).float()

    cells = int(rng.choice((1, 3, 8, 24, 64)))
    texture = F.interpolate(256 * numbers(0, 1, 3, cells, cells)[..., :cells], size)
    elsewhere = sometimes(0.3) * (1 - F.interpolate(mask, size))
    images = images + elsewhere * (texture - images)

    turned = rng.random(batch) < 0.67
    angle = turned * rng.normal(0, 0.12, batch)
    scale = np.exp(turned * rng.uniform(np.log(0.55), np.log(1.25), batch))
    shift = turned[:, None] * rng.uniform(-0.3, 0.3, (batch, 2))  # of half the frame
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    turn = np.stack([np.stack([cos, -sin], axis=1), np.stack([sin, cos], axis=1)], axis=1)
    turn = turn * upright / upright[:, None]
    back = np.linalg.inv(turn)  # from where a pixel is to where it was, in half frames
    back = np.concatenate([back, -back @ shift[:, :, None]], axis=2)
    grid = F.affine_grid(torch.from_numpy(back).float(), list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    before = 2 * keypoints[..., :2] - 1
    after = before @ turn.transpose(0, 2, 1) + shift[:, None]
    keypoints[..., :2] = (after + 1) / 2 * size[::-1]
    keypoints[..., 2] *= (np.abs([before, after]) < 1).all(axis=(0, 3))

    images = images * numbers(0.75, 1.25, 3) * numbers(0.8, 1.2) + numbers(-30, 30)
    grey = images.mean(dim=1, keepdim=True)
    coarse = F.interpolate(F.avg_pool2d(images - grey, 2), size, mode="bilinear")
    images = images + sometimes(0.4) * (grey + coarse - images)
    noise = torch.from_numpy(rng.standard_normal(images.shape, np.float32))
    images = images + sometimes(0.5) * numbers(0, 6) * noise
    return images.round().clamp(0, 255).byte().permute(0, 2, 3, 1), keypoints


# ---- 3. Targets -------------------------------------------------------------------------------------


def heatmaps_at(points: Tensor, height: int, width: int) -> Tensor:
    """Keypoints (N, K, 3) in pixels of the input -> (N, K + 1, h, w): their peaks, the background."""
    x, y, score = points.unbind(dim=-1)
    near = [  # how near the centres of the columns and rows of cells are
        torch.exp(-((STRIDE * torch.arange(n) + 3.5 - at[..., None]) ** 2) / (2 * SIGMA**2))
        for at, n in ((x, width), (y, height))
    ]
    peaks = (score > 0)[..., None, None] * near[1][..., None] * near[0][..., None, :]
    return torch.cat([peaks, 1 - peaks.amax(dim=1, keepdim=True)], dim=1)


def fields_at(points: Tensor, height: int, width: int) -> Tensor:
    """Bodies (N, 18, 3) in pixels of the input -> part affinity fields (N, 38, h, w): along each limb
    its direction."""
    starts, ends, channels = map(list, zip(*LIMBS))
    start, end = points[:, starts, :2], points[:, ends, :2]  # (N, 19, 2)
    length = (end - start).norm(dim=-1, keepdim=True).clamp(min=1e-3)
    way = ((end - start) / length)[..., None, None]  # (N, 19, 2, 1, 1)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    cells = torch.stack([x, y]) * STRIDE + 3.5  # (2, h, w)
    from_start = cells - start[..., None, None]  # (N, 19, 2, h, w)
    along = (from_start * way).sum(dim=2)
    beside = from_start[:, :, 0] * way[:, :, 1] - from_start[:, :, 1] * way[:, :, 0]
    length = length[..., None]
    on = (beside.abs() < LIMB_REACH) & (-LIMB_REACH < along) & (along < length + LIMB_REACH)
    on &= ((points[:, starts, 2] > 0) & (points[:, ends, 2] > 0))[..., None, None]
    fields = torch.zeros(len(points), LIMB_MAPS, height, width)
    for axis in (0, 1):
        fields[:, [channel + axis for channel in channels]] = on * way[:, :, axis]
    return fields


def shown_at(points: np.ndarray, scale: float) -> np.ndarray:
    """Where points of a frame or crop lie once it is resized. Points count from the first pixel's
    centre: decoding gives whole pixels, so a target at the nearest one's centre is on average right."""
    return np.concatenate([(points[..., :2] + 0.5) * scale - 0.5, points[..., 2:]], axis=-1)


def body_batch(frames: Tensor, keypoints: np.ndarray) -> tuple[Tensor, list[Tensor]]:
    """Inputs, and the two targets of every stage."""
    images = body_input(frames)
    height, width = images.shape[2] // STRIDE, images.shape[3] // STRIDE
    scale = body_size(*frames.shape[1:3])[0] / frames.shape[1]
    points = torch.from_numpy(shown_at(keypoints[:, PARTS["body"]], scale)).float()
    return images, [fields_at(points, height, width), heatmaps_at(points, height, width)]


def hand_batch(
    rng: np.random.Generator, frames: Tensor, keypoints: np.ndarray
) -> tuple[Tensor, list[Tensor]]:
    side = SIZES["hand_sizes"][0]
    crops, points = [], []
    for frame, pose in zip(frames, keypoints):
        hands = dict(zip(("left_hand", "right_hand"), np.split(pose[PARTS["hands"]], 2)))
        boxes = hand_boxes(body_as_found(rng, pose, len(frame)), *frame.shape[:2])
        for hand, (x, y, size) in boxes.items():
            crops.append(frame[y : y + size, x : x + size])
            points.append(shown_at(hands[hand] - (x, y, 0), side / size))
    points = torch.from_numpy(np.stack(points)).float()
    return hand_input(crops, side), [heatmaps_at(points, side // STRIDE, side // STRIDE)]


def face_batch(
    rng: np.random.Generator, frames: Tensor, keypoints: np.ndarray
) -> tuple[Tensor, list[Tensor]]:
    side = SIZES["face_size"]
    cells = side // STRIDE
    crops, points = [], []
    for frame, pose in zip(frames, keypoints):
        boxes = face_boxes(body_as_found(rng, pose, len(frame)), *frame.shape[:2])
        for x, y, size in boxes.values():
            crops.append(frame[y : y + size, x : x + size])
            face = pose[PARTS["face"]] - (x, y, 0)
            face[:, :2] *= STRIDE * (cells - 1) / (size - 1)  # decoding joins corner to corner
            points.append(face + (3.5, 3.5, 0))
    points = torch.from_numpy(np.stack(points)).float()
    return face_input(crops, side), [heatmaps_at(points, cells, cells)]


def body_as_found(rng: np.random.Generator, pose: np.ndarray, height: int) -> np.ndarray:
    """The body (18, 3) as the body network might give it: in whole pixels, and not quite right."""
    body = pose[PARTS["body"]].copy()
    body[:, :2] = (body[:, :2] + rng.normal(0, 0.008 * height, (18, 2))).round()
    return body


# ---- 4. Training ------------------------------------------------------------------------------------


def start_lively(net: nn.Module) -> None:
    """Without norms, a signal survives the layers only if each keeps its variance (He et al., 2015).

    Layers that give maps start at zero: most of every map is.
    """
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.zeros_(layer.bias)
            if name.startswith(("Mconv7", "conv5_5_CPM", "conv6_2_CPM")):
                nn.init.zeros_(layer.weight)
            else:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    with torch.no_grad():
        net.get_submodule("conv1_1").weight *= 4  # the input's deviation is about a quarter


def train(
    part: str, net: nn.Module, pools: list[dict], work: Path, steps: int, batch: int, peak_lr: float
) -> None:
    """Squared errors of all stages alike. What is not zero weighs more, as it is one cell in a hundred.

    Body and hand networks learn from all pools: in the last, arms cross and hands lie before hair and cloth.
    Faces are shown as square crops, whatever the frame, and seldom covered.
    """
    shares = {"body": (0.45, 0.15, 0.4), "hand": (0.3, 0.1, 0.6), "face": (0.85, 0.15, 0)}[part]
    make = {"body": lambda rng, *found: body_batch(*found), "hand": hand_batch, "face": face_batch}

    def loss_at(step: int) -> Tensor:
        rng = np.random.default_rng((3, step))
        which = rng.choice(3, p=shares)
        frames, keypoints = varied(rng, pools[which], batch)
        if part != "body":  # as `find_poses` does
            shown = torch.from_numpy(np.stack([enlarged(frame) for frame in frames.numpy()]))
            keypoints[..., :2] *= shown.shape[1] / frames.shape[1]
            frames = shown
        images, targets = make[part](rng, frames, keypoints)
        with torch.autocast("cpu", torch.bfloat16):
            said = net.stages(images.contiguous(memory_format=torch.channels_last))
        loss = 0
        for stage in said:
            for maps, target in zip(stage if part == "body" else [stage], targets):
                errors = (1 + 4 * target.abs()) * (maps.float() - target) ** 2
                loss = loss + errors.sum(dim=1).mean()
        return loss / len(said)

    start_lively(net)
    net.to(memory_format=torch.channels_last)
    optimise(f"openpose_{part}", nn.ModuleDict({part: net}), loss_at, steps, peak_lr, 0.995, work)


# ---- 5. How good they are ---------------------------------------------------------------------------


def offsets(found: Pose, true: Pose) -> dict[str, np.ndarray]:
    """Of each part: how far (n, 2) its keypoints that are in the frame are found from where they are.

    Not a number where they are not found, or too far off: further than 5 % of a body's height, or than 10 % of
    the size of a hand or a face, the longer side of the box of its keypoints.
    """
    found, true = stacked(found), stacked(true)
    shares = {"body": 0.05, "face": 0.1, "hands": 0.1}
    off = {}
    for part, rows in PARTS.items():
        off[part] = []
        for a, b in zip(*(np.split(pose[rows], 1 + (part == "hands")) for pose in (found, true))):
            extent = np.ptp(b[is_seen(b), :2], axis=0)
            reach = shares[part] * (extent[1] if part == "body" else extent.max())
            apart = (a - b)[:, :2]
            right = is_seen(a) & (np.linalg.norm(apart, axis=1) <= reach)
            in_frame = is_seen(b) & (b[:, :2] > 0).all(axis=1) & (b[:, :2] < 1).all(axis=1)
            off[part].append(np.where(right[:, None], apart, np.nan)[in_frame])
        off[part] = np.concatenate(off[part])
    return off


def evaluate(nets: OpenPose, seeds: Sequence[int], side: int = SIZE) -> dict[str, tuple[float, float]]:
    """Of each part, over one frame of each puppet: the share of keypoints that are found, and how far off these
    are in x and in y, root mean square, in pixels.
    """
    off = {part: [] for part in PARTS}
    for seed in tqdm(seeds, "evaluating", mininterval=10):
        frame, true, _ = render(random_puppet(seed), motion(seed, 13)[12], side)
        (people,) = detect_bodies(nets, frame[None])
        people = sorted(people, key=lambda pose: is_seen(pose.body).sum())[-1:]
        (people,) = detect_parts(nets, frame[None], [people], least_side=LEAST_SIDE)
        for part, values in offsets(people[0] if people else Pose(), true).items():
            off[part].append(values)
    found = {part: np.concatenate(values) for part, values in off.items()}
    return {
        part: (float(np.isfinite(each[:, 0]).mean()), side * float(np.nanmean(each**2) ** 0.5))
        for part, each in found.items()
    }


def report(nets: OpenPose) -> None:
    """Prints what `evaluate` says of frames of both sizes."""
    for side in (SIZE, LARGE):
        figures = evaluate(nets.eval(), range(EVALUATED), side)
        print(
            f"{EVALUATED} unseen puppets at {side} pixels; body joints found within 5 % of its height, the others "
            "within 10 % of the part's size, and how far off these are in pixels:"
        )
        for part, (share, off) in figures.items():
            print(f"  {part}: {share:.1%} ({off:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pool", type=Path, default="runs/pretrain/pool", help="of pretrain.py")
    parser.add_argument("--work", type=Path, default="runs/pretrain_openpose", help="checkpoints")
    parser.add_argument(
        "--out", type=Path, default="runs/pretrain_openpose/openpose", help="for the weights"
    )
    parser.add_argument("--evaluate", action="store_true", help="only evaluate the demo's networks")
    args = parser.parse_args()
    keep_freed_memory()
    if args.evaluate:
        return report(load_openpose("demo"))
    args.work.mkdir(parents=True, exist_ok=True)
    pools = load_pools(args.work, args.pool)
    torch.manual_seed(3)
    nets = OpenPose(**SIZES)
    for part, steps in STEPS.items():
        train(part, nets.get_submodule(part), pools, args.work, steps, batch=16, peak_lr=1e-3)
    save_openpose(nets, args.out)
    print(f"{args.out}: written")
    report(nets)


if __name__ == "__main__":
    main()
