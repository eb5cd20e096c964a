"""Makes the demo's OpenPose from nothing: `python demo/pretrain_openpose.py`, two or three hours on two CPU cores.

CMU's networks have seen people; these see paper puppets: whole ones, and those of the pool of `pretrain.py`. They
are the same code, narrower and with fewer stages. `poses/maps.py` makes the crops and the inputs. A target lies
where decoding turns it into the true keypoint. A run that is interrupted goes on from its last checkpoint. The
shipped networks took a longer way, told in docs/LOG.md; `--evaluate` says how well they find unseen puppets.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import openpose
from demo import pretrain
from demo.motion import motion
from demo.pool import pose_from, render_pool
from demo.puppet import random_puppet, render
from demo.save import save_openpose
from openpose import OpenPose
from poses import maps
from poses.maps import LIMB_MAPS, LIMBS, STRIDE
from poses.pose import Pose, is_seen
from safe.process import keep_freed_memory

# A crop of a hand in a frame of 128 pixels has 20 to 25 of them, and one of a face 30: they need no enlarging to
# 736 and 384, which would be nine tenths of the work. A second stage cannot say more than its 24 channels hold:
# enough for a body's or a hand's maps, too little for a face's 71.
SIZES = {"width": 0.1875, "stages": (2, 2, 1), "hand_sizes": (184,), "face_size": 192}
SIGMA = 7  # pixels of the input: how far a keypoint's peak reaches, as in OpenPose's training
LIMB_REACH = 8  # pixels of the input: half the width of a limb's field
SIDE, IDENTITIES = 128, range(30_000, 31_500)  # pixels, and seeds, of the frames that show whole puppets
EVALUATED = 200  # puppets, numbered from 0, which neither training has seen
STEPS = {"body": 3000, "hand": 8000, "face": 3000}  # of training
BATCH = 16  # frames


def varied(rng: np.random.Generator, pool: np.ndarray, batch: int) -> tuple[Tensor, np.ndarray]:
    """Frames uint8 (N, H, W, 3) and keypoints (N, 130, 3) in pixels, of other sizes, in other places, and a little
    turned. A third stays where it was, and so as sharp. What lies outside the frame is not seen."""
    rows = rng.integers(len(pool["frames"]), size=batch), rng.integers(pool["frames"].shape[1], size=batch)
    images = torch.from_numpy(pool["frames"][rows]).permute(0, 3, 1, 2).float()  # (N, 3, H, W)
    keypoints, size = pool["poses"][rows], images.shape[2:]
    turned = rng.random(batch) < 0.67
    angle = turned * rng.normal(0, 0.12, batch)
    scale = np.exp(turned * rng.uniform(np.log(0.55), np.log(1.25), batch))
    shift = turned[:, None] * rng.uniform(-0.3, 0.3, (batch, 2))  # of half the frame
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    upright = np.array([size[1] / size[0], 1.0])  # from half frames to a measure that turns
    turn = turn.transpose(2, 0, 1) * upright / upright[:, None]
    back = np.linalg.inv(turn)  # from where a pixel is to where it was, in half frames
    back = torch.from_numpy(np.concatenate([back, -back @ shift[:, :, None]], axis=2)).float()
    grid = F.affine_grid(back, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    before = 2 * keypoints[..., :2] - 1
    after = before @ turn.transpose(0, 2, 1) + shift[:, None]
    keypoints[..., :2] = (after + 1) / 2 * size[::-1]
    keypoints[..., 2] *= (np.abs([before, after]) < 1).all(axis=(0, 3))
    return images.round().byte().permute(0, 2, 3, 1), keypoints


# ---- Targets ----------------------------------------------------------------------------------------

Batch = tuple[Tensor, tuple[Tensor, ...]]  # inputs, and the targets of every stage


def heatmaps_at(points: Tensor, height: int, width: int) -> Tensor:
    """Keypoints (N, K, 3) in pixels of the input -> (N, K + 1, h, w): their peaks, the background."""
    centres = STRIDE * torch.arange(max(height, width)) + 3.5  # of the cells of a row or a column
    near = torch.exp(-((centres - points[..., :2, None]) ** 2) / (2 * SIGMA**2))  # (N, K, 2, cells)
    peaks = (
        (points[..., 2] > 0)[..., None, None] * near[:, :, 1, :height, None] * near[:, :, 0, None, :width]
    )
    return torch.cat([peaks, 1 - peaks.amax(dim=1, keepdim=True)], dim=1)


def fields_at(points: Tensor, height: int, width: int) -> Tensor:
    """Bodies (N, 18, 3) in pixels of the input -> part affinity fields (N, 38, h, w): along each limb its
    direction."""
    starts, ends, channels = map(list, zip(*LIMBS))
    start, end = points[:, starts, :2], points[:, ends, :2]  # (N, 19, 2)
    length = (end - start).norm(dim=-1, keepdim=True).clamp(min=1e-3)
    way = ((end - start) / length)[..., None, None]  # (N, 19, 2, 1, 1)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    cells = torch.stack([x, y]) * STRIDE + 3.5  # (2, h, w)
    from_start = cells - start[..., None, None]  # (N, 19, 2, h, w)
    along = (from_start * way).sum(dim=2)
    beside = from_start[:, :, 0] * way[:, :, 1] - from_start[:, :, 1] * way[:, :, 0]
    on = (beside.abs() < LIMB_REACH) & (-LIMB_REACH < along) & (along < length[..., None] + LIMB_REACH)
    on &= ((points[:, starts, 2] > 0) & (points[:, ends, 2] > 0))[..., None, None]
    fields = torch.zeros(len(points), LIMB_MAPS, height, width)
    for axis in (0, 1):
        fields[:, np.add(channels, axis)] = on * way[:, :, axis]
    return fields


def shown_at(points: np.ndarray, scale: float) -> np.ndarray:
    """Where points of a frame or crop lie once it is resized. Points count from the first pixel's centre: decoding
    gives whole pixels, so a target at the nearest one's centre is on average right."""
    return np.concatenate([(points[..., :2] + 0.5) * scale - 0.5, points[..., 2:]], axis=-1)


def body_batch(frames: Tensor, keypoints: np.ndarray) -> Batch:
    """Inputs, and the two targets of every stage."""
    images = maps.body_input(frames)
    height, width = images.shape[2] // STRIDE, images.shape[3] // STRIDE
    scale = maps.body_size(*frames.shape[1:3])[0] / frames.shape[1]
    points = torch.from_numpy(shown_at(keypoints[:, :18], scale)).float()
    return images, (fields_at(points, height, width), heatmaps_at(points, height, width))


def face_input(crops: Sequence[Tensor], side: int) -> Tensor:
    """Crops uint8 (h, w, 3), of any sizes -> (N, 3, side, side), as decoding shows faces to their network."""
    return torch.stack([maps.network_input(maps.grey_levels(crop), side, side) for crop in crops])


def crops_batch(part: str, rng: np.random.Generator, frames: Tensor, keypoints: np.ndarray) -> Batch:
    """Inputs that show hands or faces as decoding crops them, and the target of every stage."""
    boxes_of, to_input = getattr(maps, f"{part}_boxes"), maps.hand_input if part == "hand" else face_input
    side = SIZES["face_size"] if part == "face" else SIZES["hand_sizes"][0]
    cells, crops, points = side // STRIDE, [], []
    for frame, pose in zip(frames, map(pose_from, keypoints)):
        # The body as its network might give it: in whole pixels, and not quite right.
        error = rng.normal(0, 0.008 * len(frame), (18, 2))
        body = np.concatenate([(pose.body[:, :2] + error).round(), pose.body[:, 2:]], axis=1)
        for name, (x, y, size) in boxes_of(body, *frame.shape[:2]).items():
            crops.append(frame[y : y + size, x : x + size])
            true = getattr(pose, name) - (x, y, 0)
            scale = STRIDE * (cells - 1) / (size - 1)  # of a face, whose decoding joins corner to corner
            in_face = true * (scale, scale, 1) + (3.5, 3.5, 0)
            points.append(in_face if part == "face" else shown_at(true, side / size))
    points = torch.from_numpy(np.stack(points)).float()
    return to_input(crops, side), (heatmaps_at(points, cells, cells),)


# ---- Training ---------------------------------------------------------------------------------------


def start_lively(net: nn.Module) -> None:
    """Without norms, a signal survives the layers only if each keeps its variance (He et al., 2015). Layers that
    give maps start at zero: most of every map is."""
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.zeros_(layer.bias)
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if name.startswith(("Mconv7", "conv5_5_CPM", "conv6_2_CPM")):
                nn.init.zeros_(layer.weight)
    net.conv1_1.weight.data *= 4  # the input's deviation is about a quarter


def train(part: str, net: nn.Module, pools: Sequence[np.ndarray], work: Path) -> None:
    """Squared errors of all stages alike. What is not zero weighs more, as it is one cell in a hundred."""

    def loss_at(step: int) -> Tensor:
        rng = np.random.default_rng((3, step))
        frames, keypoints = varied(rng, pools[rng.integers(len(pools))], BATCH)
        if part == "body":
            images, targets = body_batch(frames, keypoints)
        else:  # in enlarged frames, as `find_poses` does
            shown = np.stack([maps.enlarged(frame) for frame in frames.numpy()])
            keypoints[..., :2] *= shown.shape[1] / frames.shape[1]
            images, targets = crops_batch(part, rng, torch.from_numpy(shown), keypoints)
        with pretrain.in_bfloat16(images.device):
            stages = net.stages(images.contiguous(memory_format=torch.channels_last))
        loss = 0
        for stage in stages:
            for said, target in zip(stage, targets):
                errors = (1 + 4 * target.abs()) * (said.float() - target) ** 2
                loss = loss + errors.sum(dim=1).mean() / len(stages)
        return loss

    start_lively(net)
    net.to(memory_format=torch.channels_last)
    pretrain.optimise(f"openpose_{part}", net, loss_at, STEPS[part], 1e-3, work)


def evaluate(nets: OpenPose, seeds: Sequence[int], side: int = SIDE) -> dict[str, tuple[float, float]]:
    """Of body, face and hands, over one frame of each puppet: the share of keypoints in the frame that are found,
    and how far off these are in x and in y, root mean square, in pixels. Not found is what lies too far off:
    further than 5 % of a body's height, or than 10 % of the size of a hand or a face, the longer side of the box
    of its keypoints."""
    off = {"body": [], "face": [], "hand": []}
    for seed in tqdm(seeds, "evaluating", mininterval=10):
        frame, true, _ = render(random_puppet(seed), motion(seed, 13)[12], side)
        (people,) = openpose.detect_bodies(nets, frame[None])
        people = sorted(people, key=lambda pose: is_seen(pose.body).sum())[-1:]
        people = [openpose.add_parts(nets, maps.enlarged(frame), pose) for pose in people]
        for name, there in vars(true).items():
            found = getattr(people[0] if people else Pose(), name)
            extent = np.ptp(there[is_seen(there), :2], axis=0)
            reach = 0.05 * extent[1] if name == "body" else 0.1 * extent.max()
            apart = (found - there)[:, :2]
            right = is_seen(found) & (np.linalg.norm(apart, axis=1) <= reach)
            in_frame = is_seen(there) & ((there[:, :2] > 0) & (there[:, :2] < 1)).all(axis=1)
            off[name.split("_")[-1]].append(np.where(right[:, None], apart, np.nan)[in_frame])
    figures = {}
    for part, each in off.items():
        apart = np.concatenate(each)
        figures[part] = float(np.isfinite(apart[:, 0]).mean()), side * float(np.nanmean(apart**2) ** 0.5)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pool", type=Path, default="runs/pretrain/pool.npy", help="of pretrain.py")
    parser.add_argument("--work", type=Path, default="runs/pretrain_openpose", help="pool and checkpoints")
    parser.add_argument("--out", type=Path, default="runs/pretrain_openpose/openpose", help="weights")
    parser.add_argument("--evaluate", action="store_true", help="only evaluate the demo's networks")
    args = parser.parse_args()
    keep_freed_memory()
    if args.evaluate:
        nets = openpose.load_openpose("demo")
    else:
        pools = [render_pool(args.work / "pool.npy", IDENTITIES, SIDE, SIDE)]
        pools.append(render_pool(args.pool, pretrain.IDENTITIES, pretrain.HEIGHT, pretrain.WIDTH))
        torch.manual_seed(3)
        nets = OpenPose(**SIZES).eval()
        for part in STEPS:
            train(part, nets.get_submodule(part), pools, args.work)
        save_openpose(nets, args.out)
        print(f"{args.out}: written")
    for part, (share, error) in evaluate(nets, range(EVALUATED)).items():
        print(f"{part}: {share:.1%} found, {error:.2f} pixels off, in {EVALUATED} frames of {SIDE} pixels")


if __name__ == "__main__":
    main()
