"""Poses from pixels: OpenPose's body, hand and face networks, decoded, and one person followed.

    python openpose.py clip.mp4

writes `clip.poses.json` and `clip.poses.mp4`, the clip with its skeleton. The networks are CMU's
(Cao et al., "OpenPose", TPAMI 2019; Simon et al., "Hand Keypoint Detection in Single Images", CVPR
2017) under the names of the public files. What they are shown and how their maps are read is as in
the port in lllyasviel's ControlNet 1.1, because the pose ControlNet was trained on what that finds;
where this differs on purpose, a comment says so.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import fill, model_path
from poses.people import fill_gaps, follow_people, smooth_poses
from poses.pose import Pose, absences, draw_pose, is_seen, save_poses
from public.configs import read_config
from public.hub import public_files

# ---- The networks -------------------------------------------------------------------------------

# Tables of convolutions: (name, channels, kernel). {} is the stage and branch, and a layer of 0
# channels gives the stage's maps.
# fmt: off
POOL = ("pool", 0, 0)
VGG = [  # the first ten convolutions of VGG-19
    ("conv1_1", 64, 3), ("conv1_2", 64, 3), POOL,
    ("conv2_1", 128, 3), ("conv2_2", 128, 3), POOL,
    ("conv3_1", 256, 3), ("conv3_2", 256, 3), ("conv3_3", 256, 3), ("conv3_4", 256, 3), POOL,
    ("conv4_1", 512, 3), ("conv4_2", 512, 3),
]
BODY_FEATURES = [*VGG, ("conv4_3_CPM", 256, 3), ("conv4_4_CPM", 128, 3)]
BODY_STAGE_1 = [
    ("conv5_1_CPM_{}", 128, 3), ("conv5_2_CPM_{}", 128, 3), ("conv5_3_CPM_{}", 128, 3),
    ("conv5_4_CPM_{}", 512, 1), ("conv5_5_CPM_{}", 0, 1),
]
PART_FEATURES = [
    *VGG, ("conv4_3", 512, 3), ("conv4_4", 512, 3),
    ("conv5_1", 512, 3), ("conv5_2", 512, 3), ("conv5_3_CPM", 128, 3),
]
PART_STAGE_1 = [("conv6_1_CPM", 512, 1), ("conv6_2_CPM", 0, 1)]
LATER_STAGE = [
    ("Mconv1_{}", 128, 7), ("Mconv2_{}", 128, 7), ("Mconv3_{}", 128, 7), ("Mconv4_{}", 128, 7),
    ("Mconv5_{}", 128, 7), ("Mconv6_{}", 128, 1), ("Mconv7_{}", 0, 1),
]
# fmt: on
LIMB_MAPS, BODY_MAPS = 2 * 19, 18 + 1  # x and y of 19 limbs' fields; 18 keypoints and background


class PoseMachine(nn.Module):
    """Convolutions under flat names, as in the public files, run in chains with ReLUs between them.

    `width` multiplies the public networks' channels; the maps that come out stay as many.
    """

    def __init__(self, width: float):
        super().__init__()
        self.width = width

    def add(self, table: list, name: str = "", inputs: int = 3, maps: int = 0) -> list[str]:
        """Makes a table's layers, on an input of `inputs` channels; their names are for `run`."""
        layers = []
        for template, channels, kernel in table:
            layers.append(template.format(name))
            if template != POOL[0]:
                channels = max(1, round(channels * self.width)) if channels else maps
                layer = nn.Conv2d(inputs, channels, kernel, padding=kernel // 2)
                self.add_module(layers[-1], layer)
                inputs = channels
        return layers

    def run(self, layers: list[str], x: Tensor) -> Tensor:
        for index, name in enumerate(layers):
            if name == POOL[0]:
                x = F.max_pool2d(x, 2)  # before the ReLU, which gives the same on fewer pixels
            else:
                x = self.get_submodule(name)(F.relu(x, inplace=True) if index else x)
        return x


class BodyNet(PoseMachine):
    """Where 18 keypoints are, and along which directions limbs join them (`body_pose_model`)."""

    def __init__(self, width: float = 1.0, stages: int = 6):
        super().__init__(width)
        self.features = self.add(BODY_FEATURES)
        channels = self.get_submodule(self.features[-1]).out_channels
        inputs = LIMB_MAPS + BODY_MAPS + channels
        limbs = self.add(BODY_STAGE_1, "L1", channels, LIMB_MAPS)
        keypoints = self.add(BODY_STAGE_1, "L2", channels, BODY_MAPS)
        self.branches = [(limbs, keypoints)]
        for stage in range(2, stages + 1):  # these see what the last one said beside the features
            limbs = self.add(LATER_STAGE, f"stage{stage}_L1", inputs, LIMB_MAPS)
            keypoints = self.add(LATER_STAGE, f"stage{stage}_L2", inputs, BODY_MAPS)
            self.branches.append((limbs, keypoints))

    def stages(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What each stage says, as `forward`; training puts a loss on every one."""
        features = x = F.relu(self.run(self.features, images))
        said = []
        for limbs, keypoints in self.branches:
            said.append((self.run(limbs, x), self.run(keypoints, x)))
            x = torch.cat([*said[-1], features], dim=1)
        return said

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, 3, 8h, 8w), BGR in [-0.5, 0.5] -> part affinity fields (N, 38, h, w), where
        x and y of a limb follow each other, and heatmaps (N, 19, h, w), the last the background.
        """
        pafs, heatmaps = self.stages(images)[-1]
        return pafs, F.relu(heatmaps)  # the port's last stage has a ReLU here, and only here


class PartNet(PoseMachine):
    """Where the keypoints of one hand (21, `hand_pose_model`) or one face (70, `facenet`) are."""

    def __init__(self, keypoints: int, width: float = 1.0, stages: int = 6):
        super().__init__(width)
        maps = keypoints + 1
        self.features = self.add(PART_FEATURES)
        channels = self.get_submodule(self.features[-1]).out_channels
        self.chains = [self.add(PART_STAGE_1, inputs=channels, maps=maps)]
        for stage in range(2, stages + 1):
            self.chains.append(self.add(LATER_STAGE, f"stage{stage}", maps + channels, maps))

    def stages(self, images: Tensor) -> list[Tensor]:
        """What each stage says, as `forward`; training puts a loss on every one."""
        features = x = F.relu(self.run(self.features, images))
        said = []
        for layers in self.chains:
            said.append(self.run(layers, x))
            x = torch.cat([said[-1], features], dim=1)
        return said

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, 8h, 8w), BGR in [-0.5, 0.5] -> heatmaps (N, keypoints + 1, h, w), the last
        the background.
        """
        return self.stages(images)[-1]


HAND_SIZES = (184, 368, 552, 736)  # pixels: 0.5, 1, 1.5 and 2 times 368
FACE_SIZE = 384  # pixels


class OpenPose(nn.Module):
    """The three networks, by default of the public files' sizes; `OpenPose(**config)` is its twin.

    width: multiplies the public networks' channels
    stages: of body, hand and face
    hand_sizes: in pixels, at which a hand is shown; the maps are averaged over them
    face_size: in pixels, at which a face is shown
    """

    def __init__(
        self,
        width: float = 1.0,
        stages: Sequence[int] = (6, 6, 6),
        hand_sizes: Sequence[int] = HAND_SIZES,
        face_size: int = FACE_SIZE,
    ):
        super().__init__()
        self.config = {
            "width": width,
            "stages": tuple(stages),
            "hand_sizes": tuple(hand_sizes),
            "face_size": face_size,
        }
        body, hand, face = stages
        self.body = BodyNet(width, body)
        self.hand = PartNet(21, width, hand)
        self.face = PartNet(70, width, face)


OPENPOSE_PARTS = ("body", "hand", "face")


def read_openpose_config(config: dict) -> dict:
    return {
        "width": float(config["width"]),
        "stages": [int(stages) for stages in config["stages"]],
        "hand_sizes": [int(side) for side in config["hand_sizes"]],
        "face_size": int(config["face_size"]),
    }


def load_openpose(name: str | Path = "sd15", device: str | torch.device = "cpu") -> OpenPose:
    """The networks that find people, in float32: a model folder's own, if it has an `openpose/`,
    else the public ones. Raises as `load_model` does.
    """
    folder = model_path(name) / "openpose"
    sizes = read_config(folder, read_openpose_config) or {}
    if folder.is_dir():
        files = {part: folder / f"{part}.safetensors" for part in OPENPOSE_PARTS}
    else:
        files = public_files(OPENPOSE_PARTS, half=False)
    with torch.device("meta"):
        openpose = OpenPose(**sizes)
    for part, path in files.items():
        fill(openpose.get_submodule(part), part, path, device, torch.float32)
    return openpose.eval()


def run_in_batches(net: nn.Module, images: Tensor) -> Tensor | tuple[Tensor, ...]:
    """net(images), a few at a time: a million pixels need about half a gigabyte at full width."""
    few = max(1, 2**20 // (images.shape[-2] * images.shape[-1]))
    outputs = [net(part) for part in images.split(few)]
    if isinstance(outputs[0], tuple):
        return tuple(torch.cat(maps) for maps in zip(*outputs))
    return torch.cat(outputs)


# ---- Resizing and smoothing, as matrices --------------------------------------------------------
# Resizing and blurring are linear along each axis, so a whole sequence of them is one small matrix
# per axis: rows @ maps @ columns.T goes from a network's cells to smoothed pixels at once. OpenCV's
# and SciPy's kernels, which the port uses, are what makes keypoints fall on the same pixels.


@lru_cache(64)
def resizing(size: int, new_size: int) -> np.ndarray:
    """Matrix (new_size, size) of OpenCV's area means when shrinking, its Lanczos-4 otherwise."""
    if new_size < size:
        edges = np.linspace(0, size, new_size + 1)[:, None]
        cells = np.arange(size)
        overlap = np.minimum(edges[1:], cells + 1) - np.maximum(edges[:-1], cells)
        return overlap.clip(0) * (new_size / size)
    centres = (np.arange(new_size)[:, None] + 0.5) * (size / new_size) - 0.5
    taps = np.floor(centres) + np.arange(-3, 5)
    weights = np.sinc(centres - taps) * np.sinc((centres - taps) / 4)
    weights /= weights.sum(axis=1, keepdims=True)
    matrix = np.zeros((new_size, size))
    np.add.at(matrix, (np.arange(new_size)[:, None], taps.clip(0, size - 1).astype(int)), weights)
    return matrix


@lru_cache(64)
def blurring(size: int, sigma: float, radius: int, border: str) -> np.ndarray:
    """Matrix (size, size) of a Gaussian cut off at `radius`, with a border mode of `np.pad`."""
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    padded = np.pad(np.eye(size), ((radius, radius), (0, 0)), mode=border)
    shifted = [weight * padded[i : i + size] for i, weight in enumerate(weights / weights.sum())]
    return np.sum(shifted, axis=0)


def smoothing(size: int) -> np.ndarray:
    """Matrix (size, size) of SciPy's `gaussian_filter` with sigma 3, which cuts off at 4 sigma."""
    return blurring(size, 3.0, 12, "symmetric")


def separable(rows: np.ndarray, images: Tensor, columns: np.ndarray) -> Tensor:
    """rows (H, h), images (..., h, w), columns (W, w) -> (..., H, W)."""
    rows, columns = (torch.from_numpy(m).float().to(images.device) for m in (rows, columns))
    return rows @ images @ columns.T


def grey_levels(images: Tensor) -> Tensor:
    """RGB uint8 images (..., H, W, 3) -> BGR, the networks' order, (..., 3, H, W) in [0, 255]."""
    return images.flip(-1).movedim(-1, -3).float()


def network_input(levels: Tensor, height: int, width: int) -> Tensor:
    """Grey levels (..., H, W), resized to whole levels as the port does -> [-0.5, 0.5)."""
    rows, columns = resizing(levels.shape[-2], height), resizing(levels.shape[-1], width)
    return separable(rows, levels, columns).round().clamp(0, 255) / 256 - 0.5


# ---- Bodies -------------------------------------------------------------------------------------

STRIDE = 8  # pixels per cell of the networks' maps
BODY_HEIGHT = 0.5 * 368  # pixels: the port's only scale, 0.5, of its box
LEAST_SCORE = 0.05  # the least that the port takes for a keypoint, in any of the networks

# (from, to, channel) of the 19 limbs: COCO-18 keypoints, and which map holds the x of the field.
# fmt: off
LIMBS = [
    (1, 2, 12), (1, 5, 20), (2, 3, 14), (3, 4, 16), (5, 6, 22), (6, 7, 24),  # arms
    (1, 8, 0), (8, 9, 2), (9, 10, 4), (1, 11, 6), (11, 12, 8), (12, 13, 10),  # legs
    (1, 0, 28), (0, 14, 30), (14, 16, 34), (0, 15, 32), (15, 17, 36), (2, 16, 18), (5, 17, 26),
]
# fmt: on
FOUNDING_LIMBS = 17  # the last two, from shoulder to ear, only ever join a person that is there


def body_size(height: int, width: int) -> tuple[int, int]:
    """The size, in pixels, at which the body network sees a frame, before it is padded."""
    scale = BODY_HEIGHT / height
    return max(1, int(height * scale)), max(1, int(width * scale))


def body_input(images: Tensor) -> Tensor:
    """Frames uint8 (F, H, W, 3) -> (F, 3, 8h, 8w), padded with grey at the right and the bottom."""
    height, width = body_size(*images.shape[1:3])
    small = network_input(grey_levels(images), height, width)
    return F.pad(small, (0, -width % STRIDE, 0, -height % STRIDE))  # with 0, which is level 128


@lru_cache(64)
def cells_to_pixels(cells: int, kept: int, pixels: int) -> np.ndarray:
    """Matrix (pixels, cells) from a map's cells to the frame: enlarged 8 times, the padding cut off
    after `kept` pixels, then resized.
    """
    return resizing(kept, pixels) @ resizing(cells, cells * STRIDE)[:kept]


def decode_bodies(heatmaps: Tensor, pafs: Tensor, height: int, width: int) -> list[np.ndarray]:
    """The body network's maps of one frame -> its people, (18, 3) each: x, y in pixels, score.

    heatmaps: (19, h, w); pafs: (38, h, w). Missing keypoints are zero.
    """
    new_height, new_width = body_size(height, width)
    rows = cells_to_pixels(heatmaps.shape[1], new_height, height)
    columns = cells_to_pixels(heatmaps.shape[2], new_width, width)
    where = find_peaks(separable(smoothing(height) @ rows, heatmaps[:18], smoothing(width) @ columns))
    heatmaps, pafs = heatmaps.cpu().numpy(), pafs.cpu().numpy()
    peaks = []
    for heatmap, (x, y) in zip(heatmaps, where):
        (scores,) = read_at(heatmap[None], rows, columns, x, y)
        peaks.append(np.stack([x, y, scores], axis=1))
    links = [
        match_limb(peaks[start], peaks[end], pafs[channel : channel + 2], rows, columns)
        for start, end, channel in LIMBS
    ]
    return assemble(peaks, links)


def find_peaks(smoothed: Tensor, least: float = 0.1, most: int = 127) -> list[np.ndarray]:
    """Local maxima of maps (K, H, W): of each map, integers (2, N), x and y of its peaks.

    Of more than `most` (OpenPose's own limit on people) the highest: a plateau is a peak in every
    pixel, and an untrained network may give nothing else.
    """
    padded = F.pad(smoothed, (1, 1, 1, 1))
    is_peak = smoothed > least
    for slid in (padded[:, :-2, 1:-1], padded[:, 2:, 1:-1], padded[:, 1:-1, :-2], padded[:, 1:-1, 2:]):
        is_peak &= smoothed >= slid
    peaks = []
    for heatmap, found in zip(smoothed, is_peak):
        y, x = found.nonzero(as_tuple=True)
        if len(x) > most:
            highest = heatmap[y, x].topk(most).indices.sort().values
            y, x = y[highest], x[highest]
        peaks.append(torch.stack([x, y]).cpu().numpy())
    return peaks


def read_at(
    maps: np.ndarray, rows: np.ndarray, columns: np.ndarray, x: np.ndarray, y: np.ndarray
) -> np.ndarray:
    """rows @ maps (C, h, w) @ columns.T at integer pixels x, y (P,) only -> (C, P)."""
    return ((rows[y] @ maps) * columns[x]).sum(axis=-1)


def match_limb(
    starts: np.ndarray, ends: np.ndarray, field: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> list[tuple[int, int, float]]:
    """Matches the peaks at the two ends of a limb, (A, 3) and (B, 3), best first: (a, b, score).

    A pair's score is the mean of the limb's field (2, h, w) along the line between them, less a
    penalty for lines longer than half the frame's height.
    """
    if not len(starts) or not len(ends):
        return []
    vectors = ends[None, :, :2] - starts[:, None, :2]  # (A, B, 2)
    lengths = np.linalg.norm(vectors, axis=-1).clip(0.001)
    line = np.linspace(*np.broadcast_arrays(starts[:, None, :2], ends[None, :, :2]), 10)
    x, y = line.round().astype(int).reshape(-1, 2).T
    field = read_at(field, rows, columns, x, y).reshape(2, 10, *lengths.shape)
    along = (field * vectors.transpose(2, 0, 1)[:, None] / lengths).sum(axis=0)  # (10, A, B)
    scores = along.mean(axis=0) + np.minimum(0.5 * len(rows) / lengths - 1, 0)
    good = ((along > 0.05).sum(axis=0) > 0.8 * 10) & (scores > 0)

    links, taken_a, taken_b = [], set(), set()
    for a, b in sorted(np.argwhere(good).tolist(), key=lambda pair: -scores[*pair]):
        if a not in taken_a and b not in taken_b:
            links.append((a, b, float(scores[a, b])))
            taken_a.add(a)
            taken_b.add(b)
    return links


@dataclass(eq=False)
class Person:
    """A person being put together."""

    joints: dict[int, int]  # keypoint -> which of its peaks
    count: int  # of joints, as the port counts: a joint that is replaced counts again
    score: float  # of joints and limbs


def assemble(peaks: list[np.ndarray], links: list[list[tuple[int, int, float]]]) -> list[np.ndarray]:
    """Peaks of the 18 keypoints, (N, 3) each, and links of the 19 limbs -> people, (18, 3) each.

    Limb by limb, every link extends the person who has one of its ends, joins two people who have
    nothing in common but it, or founds a new one. People of fewer than 4 joints or a mean score
    under 0.4 are dropped.
    """
    people: list[Person] = []
    for index, ((start, end, _), limb_links) in enumerate(zip(LIMBS, links)):
        for a, b, score in limb_links:
            holders = [p for p in people if p.joints.get(start) == a or p.joints.get(end) == b]
            first, second = (*holders, None, None)[:2]
            if second and not first.joints.keys() & second.joints.keys():
                first.joints |= second.joints
                first.count += second.count
                first.score += second.score + score
                people.remove(second)
            elif first and (second or first.joints.get(end) != b):
                first.joints[end] = b
                first.count += 1
                first.score += peaks[end][b, 2] + score
            elif not first and index < FOUNDING_LIMBS:
                score += peaks[start][a, 2] + peaks[end][b, 2]
                people.append(Person({start: a, end: b}, 2, score))

    bodies = []
    for person in people:
        if person.count >= 4 and person.score / person.count >= 0.4:
            body = np.zeros((18, 3))
            for keypoint, peak in person.joints.items():
                body[keypoint] = peaks[keypoint][peak]
                body[keypoint, 2] = body[keypoint, 2].clip(LEAST_SCORE, 1)
            bodies.append(body)
    return bodies


# ---- Hands and faces ----------------------------------------------------------------------------

Box = tuple[int, int, int]  # left, top and side of a square, in pixels

LEAST_BOX = 20  # pixels: smaller hands and faces are not looked for
HAND_MAP = 128  # pixels: the size at which the maps of all sizes are averaged and read
NOSE, RIGHT_ARM, LEFT_ARM = 0, slice(2, 5), slice(5, 8)  # of an arm shoulder, elbow, wrist


def hand_boxes(body: np.ndarray, height: int, width: int) -> dict[str, Box]:
    """Where to look for a body's hands, if all three joints of the arm are there.

    body: (18, 3) in pixels. A square around a point a third of the forearm beyond the wrist, half
    as long again as the forearm, or as nine tenths of the upper arm where that is longer.
    """
    boxes = {}
    for hand, arm in (("left_hand", LEFT_ARM), ("right_hand", RIGHT_ARM)):
        if is_seen(body[arm]).all():
            shoulder, elbow, wrist = body[arm, :2]
            forearm, upper_arm = np.linalg.norm([wrist - elbow, elbow - shoulder], axis=1)
            side = 1.5 * max(forearm, 0.9 * upper_arm)
            x, y = (wrist + 0.33 * (wrist - elbow) - side / 2).clip(0)
            side = min(side, width - x, height - y)
            if side >= LEAST_BOX:
                boxes[hand] = int(x), int(y), int(side)
    return boxes


def face_boxes(body: np.ndarray, height: int, width: int) -> dict[str, Box]:
    """Where to look for a body's face, if the nose and an eye or ear are there.

    A square around the nose that reaches to each side three times as far as the further eye, or
    half as far again as the further ear. It may leave the frame at the right and the bottom.
    """
    nose, seen = body[NOSE, :2], is_seen(body)
    reaches = [
        times * np.abs(body[keypoint, :2] - nose).max()
        for keypoint, times in ((14, 3.0), (15, 3.0), (16, 1.5), (17, 1.5))  # eyes and ears
        if seen[keypoint]
    ]
    if not seen[NOSE] or not reaches:
        return {}
    reach = max(reaches)
    x, y = (nose - reach).clip(0)
    side = min(
        width - x if x + reach > width else 2 * reach, height - y if y + reach > height else 2 * reach
    )
    return {"face": (int(x), int(y), int(side))} if side >= LEAST_BOX else {}


def hand_input(crops: Sequence[Tensor], side: int) -> Tensor:
    """Crops uint8 (h, w, 3), of any sizes -> (N, 3, side, side), blurred a little first."""
    images = []
    for crop in crops:
        rows, columns = (blurring(size, 0.8, 3, "reflect") for size in crop.shape[:2])
        blurred = separable(rows, grey_levels(crop), columns).round()
        images.append(network_input(blurred, side, side))
    return torch.stack(images)


def face_input(crops: Sequence[Tensor], side: int) -> Tensor:
    """Crops uint8 (h, w, 3), of any sizes -> (N, 3, side, side)."""
    return torch.stack([network_input(grey_levels(crop), side, side) for crop in crops])


def find_hands(nets: OpenPose, crops: Sequence[Tensor]) -> np.ndarray:
    """Crops of one hand each, uint8 (h, w, 3) -> (N, 21, 3): x, y in the crop's pixels, score."""
    heatmaps, sides = 0, nets.config["hand_sizes"]
    for side in sides:
        maps = run_in_batches(nets.hand, hand_input(crops, side))[:, :21]
        to_map = cells_to_pixels(maps.shape[-1], side, HAND_MAP)
        heatmaps += separable(to_map, maps, to_map) / len(sides)
    return decode_hands(heatmaps, [crop.shape[:2] for crop in crops])


def decode_hands(heatmaps: Tensor, sizes: Sequence[tuple[int, int]]) -> np.ndarray:
    """Heatmaps (N, 21, 128, 128) and the crops' heights and widths -> keypoints (N, 21, 3).

    A keypoint is the highest pixel of the blob that holds most, of those that the smoothed map
    leaves above the threshold.
    """
    smoothed = separable(smoothing(HAND_MAP), heatmaps, smoothing(HAND_MAP))
    blobs = label_blobs(smoothed > LEAST_SCORE).flatten(2)
    values = heatmaps.flatten(2)
    held = torch.zeros(*blobs.shape[:2], HAND_MAP**2 + 1, device=values.device)
    held.scatter_add_(2, blobs, values)
    held[..., 0] = 0  # what lies in no blob
    largest = held.argmax(dim=2, keepdim=True)
    chosen = values.where((blobs == largest) & (blobs > 0), 0.0).unflatten(2, (HAND_MAP, HAND_MAP))
    return np.stack([highest_pixels(maps, height, width) for maps, (height, width) in zip(chosen, sizes)])


def label_blobs(mask: Tensor) -> Tensor:
    """Masks (N, K, H, W) -> integers: 0 outside, and of each 8-connected blob a number above 0."""
    pixels = torch.arange(1, mask[0, 0].numel() + 1, device=mask.device, dtype=torch.float32)
    labels = pixels.view(mask.shape[2:]) * mask
    while True:  # the highest number spreads by a pixel a turn
        spread = F.max_pool2d(labels, 3, stride=1, padding=1) * mask
        if spread.equal(labels):
            return labels.long()
        labels = spread


def highest_pixels(maps: Tensor, height: int, width: int) -> np.ndarray:
    """The highest pixel of each map (K, H, W) -> (K, 3): x, y scaled to height and width, score.

    Zero where nothing reaches the threshold, and for pixels of the first row or column, which in
    the port mean the same.
    """
    scores, indices = maps.flatten(1).max(dim=1)
    indices, scores = indices.cpu().numpy(), scores.cpu().numpy()
    y = indices // maps.shape[2] * height // maps.shape[1]
    x = indices % maps.shape[2] * width // maps.shape[2]
    points = np.stack([x, y, scores.clip(LEAST_SCORE, 1)], axis=1)
    points[(scores <= LEAST_SCORE) | (x == 0) | (y == 0)] = 0
    return points


def find_faces(nets: OpenPose, crops: Sequence[Tensor]) -> np.ndarray:
    """Crops of one face each, uint8 (h, w, 3) -> (N, 70, 3): x, y in the crop's pixels, score.

    The port also returns the background's highest pixel as a 71st point, and closes the gaps that
    missing points leave. Ours stay in their places.
    """
    images = face_input(crops, nets.config["face_size"])
    faces = []
    for maps, crop in zip(run_in_batches(nets.face, images)[:, :70], crops):
        height, width = crop.shape[:2]
        maps = F.interpolate(maps[None], (height, width), mode="bilinear", align_corners=True)[0]
        faces.append(highest_pixels(maps, height, width))
    return np.stack(faces)


# ---- Frames to people ---------------------------------------------------------------------------

FRAMES_AT_ONCE = CROPS_AT_ONCE = 16  # what is on the device at once; `run_in_batches` splits further


def detect(
    nets: OpenPose, frames: np.ndarray, hands: bool = True, face: bool = True, progress: bool = False
) -> list[list[Pose]]:
    """Frames uint8 RGB (F, H, W, 3) -> the people in each, in canvas-normalised coordinates.

    Computes where `nets` are. Without hands or face, that network is not touched. Raises ValueError
    for frames of another shape or type.
    """
    people = detect_bodies(nets, frames, progress)
    return detect_parts(nets, frames, people, hands, face, progress=progress)


@torch.inference_mode()
def detect_bodies(nets: OpenPose, frames: np.ndarray, progress: bool = False) -> list[list[Pose]]:
    """`detect` without hands and face."""
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames must be uint8 (F, H, W, 3), not {frames.dtype} {frames.shape}")
    height, width = frames.shape[1:3]
    device = next(nets.body.parameters()).device
    people = []
    with tqdm(desc="bodies", total=len(frames), unit="frame", disable=not progress) as bar:
        for start in range(0, len(frames), FRAMES_AT_ONCE):
            images = torch.tensor(frames[start : start + FRAMES_AT_ONCE], device=device)
            pafs, heatmaps = run_in_batches(nets.body, body_input(images))
            for maps in zip(heatmaps, pafs):
                bodies = decode_bodies(*maps, height, width)
                people.append([Pose(np.float32(body / (width, height, 1))) for body in bodies])
            bar.update(len(images))
    return people


LEAST_SIDE = 512  # pixels: the resolution at which ControlNet 1.1's annotators look at pictures


def enlarged_size(height: int, width: int, least_side: int) -> tuple[int, int]:
    scale = max(1, least_side / min(height, width))
    return round(height * scale), round(width * scale)


def enlarged(frame: np.ndarray, least_side: int = LEAST_SIDE) -> np.ndarray:
    """A frame, uint8 (H, W, 3), with a shorter side of at least so many pixels.

    Keypoints are whole pixels, and in frames of 128 a hand is eight of them.
    """
    height, width = enlarged_size(*frame.shape[:2], least_side)
    if height == len(frame):
        return frame
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS))


@torch.inference_mode()
def detect_parts(
    nets: OpenPose,
    frames: np.ndarray,
    people: Sequence[Sequence[Pose]],
    hands: bool = True,
    face: bool = True,
    least_side: int = 0,
    progress: bool = False,
) -> list[list[Pose]]:
    """The same people, found in the same frames, `enlarged` if small, with their hands and faces."""
    device = next(nets.body.parameters()).device
    look_at = lru_cache(1)(lambda frame: enlarged(frames[frame], least_side))  # jobs are in order
    height, width = enlarged_size(*frames.shape[1:3], least_side)
    size = np.array([width, height, 1])
    looks = [("hands", hand_boxes, find_hands)] if hands else []
    looks += [("faces", face_boxes, find_faces)] if face else []
    people = [list(in_frame) for in_frame in people]
    for label, boxes, find in looks:
        jobs = [
            (frame, index, part, box)
            for frame, in_frame in enumerate(people)
            for index, pose in enumerate(in_frame)  # rounded to get back what was found, exactly
            for part, box in boxes((pose.body * size).round(3), height, width).items()
        ]
        with tqdm(desc=label, total=len(jobs), unit="crop", disable=not progress) as bar:
            for start in range(0, len(jobs), CROPS_AT_ONCE):
                few = jobs[start : start + CROPS_AT_ONCE]
                crops = [
                    torch.tensor(look_at(frame)[y : y + side, x : x + side], device=device)
                    for frame, _, _, (x, y, side) in few
                ]
                for (frame, index, part, (x, y, _)), points in zip(few, find(nets, crops)):
                    points = (points + is_seen(points)[:, None] * (x, y, 0)) / size
                    found = {part: points.astype(np.float32)}
                    people[frame][index] = replace(people[frame][index], **found)
                bar.update(len(few))
    return people


# ---- One person through time --------------------------------------------------------------------


def find_poses(
    nets: OpenPose,
    frames: np.ndarray,
    person: int = 1,
    whole_bodies: Sequence[int] | None = None,
    smooth: bool = False,
    progress: bool = False,
) -> list[Pose]:
    """One person's pose in every frame, uint8 RGB (F, H, W, 3), empty where they are not found.

    `person` counts from 1, the most prominent. Short gaps are interpolated, see `fill_gaps`, and
    hands and face are looked for there too, in all frames or in those that `whole_bodies` names.
    Small frames are `enlarged` for that; bodies are found as well without.
    Raises ValueError when nobody is found, or fewer people than `person`.
    """
    people = detect_bodies(nets, frames, progress)
    tracks = follow_people(people, frames.shape[2] / frames.shape[1])
    if not tracks:
        raise ValueError(
            f"no person in any of the {len(frames)} frames; it takes at least four joints of "
            "somebody who is not too small"
        )
    if not 1 <= person <= len(tracks):
        raise ValueError(f"no person {person}: {len(tracks)} found, 1 being the most prominent")
    poses = [Pose()] * len(frames)
    for frame, pose in zip(tracks[person - 1].frames, tracks[person - 1].people):
        poses[frame] = pose
    poses = fill_gaps(poses)
    whole_bodies = set(range(len(frames)) if whole_bodies is None else whole_bodies)
    alone = [[pose] if i in whole_bodies else [] for i, pose in enumerate(poses)]
    with_parts = detect_parts(nets, frames, alone, least_side=LEAST_SIDE, progress=progress)
    for frame, found in enumerate(with_parts):
        if found:
            (poses[frame],) = found
    poses = fill_gaps(poses)
    return smooth_poses(poses) if smooth else poses


# ---- The command line ---------------------------------------------------------------------------


def overlay(frame: np.ndarray, pose: Pose) -> np.ndarray:
    """The frame, uint8 (H, W, 3), darkened under its skeleton."""
    skeleton = draw_pose(pose, *frame.shape[:2])
    return np.where(skeleton.any(axis=2, keepdims=True), skeleton, frame // 2)


def parse_arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("clip", type=Path, help="video, image or folder of images")
    parser.add_argument(
        "--out", type=Path, help="the JSON to write (default: CLIP.poses.json, beside the clip)"
    )
    parser.add_argument("--person", type=int, default=1, help="1: the most prominent (default), ...")
    parser.add_argument(
        "--body-only", action="store_true", help="no hands and face: some thirty times faster"
    )
    parser.add_argument("--smooth", action="store_true", help="take the jitter out of the keypoints")
    parser.add_argument(
        "--model", default="sd15", help="whose networks: sd15, demo or a folder (default: sd15)"
    )
    return parser, parser.parse_args()


def main(args: argparse.Namespace) -> None:
    # Not at the top: these know of networks and files, of which the rest of this file is free.
    from command import keep_freed_memory
    from video import IMAGES, open_video, read_frames, save_image

    clip = args.clip.resolve()
    out = args.out or clip.with_name(f"{clip.name if clip.is_dir() else clip.stem}.poses.json")
    is_image = clip.suffix.lower() in IMAGES
    preview = out.with_suffix(".png" if is_image else ".mp4")
    if out.suffix.lower() != ".json" or preview.resolve() == clip:
        raise ValueError(
            f"{out}: choose a name that ends in .json and is not the clip's, "
            f"for {preview.name} becomes the preview"
        )
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out}: the folder {out.parent} does not exist")
    if not args.out and out.exists():  # perhaps a run's own poses, or edited by hand
        raise FileExistsError(f"{out}: exists; give it as --out to replace it, or another name")
    frames, fps = read_frames(args.clip)
    height, width = frames.shape[1:3]
    keep_freed_memory()
    nets = load_openpose(args.model, "cuda" if torch.cuda.is_available() else "cpu")
    whole_bodies = [] if args.body_only else None
    try:
        poses = find_poses(nets, frames, args.person, whole_bodies, args.smooth, progress=True)
    except ValueError as error:
        raise ValueError(f"{args.clip}: {error}") from None

    save_poses(out, poses, width, height)
    if is_image:
        save_image(preview, overlay(frames[0], poses[0]))
    else:
        with open_video(preview, fps, height, width) as write:
            for frame, pose in zip(frames, poses):
                write(overlay(frame, pose))
    print(f"{out}: {len(poses)} frames, preview in {preview.name}")
    if missing := absences(poses):
        print(
            f"no person in frames {missing}: leave them out with --range, or cut the clip; "
            "if somebody is there, see whether --person 2 is the same person"
        )


if __name__ == "__main__":
    parser, args = parse_arguments()
    try:
        main(args)
    except (OSError, ValueError) as error:
        parser.exit(2, f"openpose.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "openpose.py: stopped\n")
