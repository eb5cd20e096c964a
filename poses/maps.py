"""How the maps of OpenPose's networks become keypoints, and what the networks are shown.

All is as in the port in lllyasviel's ControlNet 1.1, because the pose ControlNet was trained on what that finds.
Where this differs on purpose, a comment says so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from poses.pose import is_seen

# ---- Resizing and smoothing, as matrices --------------------------------------------------------
# A sequence of resizings and blurrings is one matrix per axis: rows @ maps @ columns.T goes from a network's cells
# to smoothed pixels. The kernels are OpenCV's and SciPy's, as in the port, so keypoints fall on its pixels.


@lru_cache(64)
def resizing(size: int, new_size: int) -> np.ndarray:
    """Matrix (new_size, size) of OpenCV's area means when shrinking, its Lanczos-4 otherwise."""
    if new_size < size:
        edges, cells = np.linspace(0, size, new_size + 1)[:, None], np.arange(size)
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
    blurred = np.zeros((size, size))
    for i, weight in enumerate(weights / weights.sum()):  # one by one: for 4K, all would take 3 GB
        blurred += weight * padded[i : i + size]
    return blurred


def smoothing(size: int) -> np.ndarray:
    """Matrix (size, size) of SciPy's `gaussian_filter` with sigma 3, which cuts off at 4 sigma."""
    return blurring(size, 3.0, 12, "symmetric")


def separable(rows: np.ndarray, images: Tensor, columns: np.ndarray) -> Tensor:
    """rows (H, h), images (..., h, w), columns (W, w) -> (..., H, W)."""
    rows, columns = (torch.from_numpy(m).float().to(images.device) for m in (rows, columns))
    return rows @ images @ columns.T


# ---- What the networks are shown ----------------------------------------------------------------

LEAST_SIDE = 512  # pixels: the resolution at which ControlNet 1.1's annotators look at pictures


def enlarged(frame: np.ndarray, least_side: int = LEAST_SIDE) -> np.ndarray:
    """A frame, uint8 (H, W, 3), with a shorter side of at least so many pixels: keypoints are whole pixels."""
    scale = least_side / min(frame.shape[:2])
    if scale <= 1:
        return frame
    size = round(frame.shape[1] * scale), round(frame.shape[0] * scale)
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))


def grey_levels(images: Tensor) -> Tensor:
    """RGB uint8 images (..., H, W, 3) -> BGR, the networks' order, (..., 3, H, W) in [0, 255]."""
    return images.flip(-1).movedim(-1, -3).float()


def network_input(levels: Tensor, height: int, width: int) -> Tensor:
    """Grey levels (..., H, W), resized to whole levels as the port does -> [-0.5, 0.5)."""
    rows, columns = resizing(levels.shape[-2], height), resizing(levels.shape[-1], width)
    return separable(rows, levels, columns).round().clamp(0, 255) / 256 - 0.5


# ---- Bodies -------------------------------------------------------------------------------------

LIMB_MAPS, BODY_MAPS = 2 * 19, 18 + 1  # x and y of 19 limbs' fields; 18 keypoints and background
STRIDE = 8  # pixels per cell of the networks' maps
MOST_ELONGATED = 10  # times as long as wide
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
    """The size, in pixels, at which the body network sees a frame, before it is padded.

    Raises ValueError for a strip, which would become as wide as it is narrow, or far larger than it is for hands.
    """
    if max(height, width) > MOST_ELONGATED * min(height, width):
        told = f"frames of {width}x{height} pixels are too long and narrow to look for people in"
        raise ValueError(f"{told}; cut out where the person is")
    scale = BODY_HEIGHT / height
    return max(1, int(height * scale)), max(1, int(width * scale))


def body_input(images: Tensor) -> Tensor:
    """Frames uint8 (F, H, W, 3) -> (F, 3, 8h, 8w), padded with grey at the right and the bottom."""
    height, width = body_size(*images.shape[1:3])
    small = network_input(grey_levels(images), height, width)
    return F.pad(small, (0, -width % STRIDE, 0, -height % STRIDE))  # with 0, which is level 128


@lru_cache(64)
def cells_to_pixels(cells: int, kept: int, pixels: int) -> np.ndarray:
    """Matrix (pixels, cells) of a map enlarged 8 times, its padding cut off after `kept` pixels, then resized."""
    return resizing(kept, pixels) @ resizing(cells, cells * STRIDE)[:kept]


def decode_bodies(heatmaps: Tensor, pafs: Tensor, height: int, width: int) -> list[np.ndarray]:
    """Maps of a frame, (19, h, w) and (38, h, w) -> its people, (18, 3) each: x, y in pixels, score, or zeros."""
    new_height, new_width = body_size(height, width)
    rows = cells_to_pixels(heatmaps.shape[1], new_height, height)
    columns = cells_to_pixels(heatmaps.shape[2], new_width, width)
    where = find_peaks(separable(smoothing(height) @ rows, heatmaps[:18], smoothing(width) @ columns))
    heatmaps, pafs = heatmaps.cpu().numpy(), pafs.cpu().numpy()
    scores = [read_at(heatmap, rows, columns, places) for heatmap, places in zip(heatmaps, where)]
    peaks = [np.stack([*places, score], axis=1) for places, score in zip(where, scores)]
    fields = [pafs[channel : channel + 2] for *_, channel in LIMBS]
    ends = [(peaks[start], peaks[end]) for start, end, _ in LIMBS]
    return assemble(peaks, [match_limb(*pair, field, rows, columns) for pair, field in zip(ends, fields)])


def find_peaks(smoothed: Tensor, least: float = 0.1, most: int = 127) -> list[np.ndarray]:
    """Local maxima of maps (K, H, W): of each map, integers (2, N), x and y of its peaks.

    Of more than `most` (OpenPose's own limit on people) the highest: a plateau is a peak in every pixel, and an
    untrained network may give nothing else.
    """
    padded = F.pad(smoothed, (1, 1, 1, 1))
    is_peak = smoothed > least
    for slid in (padded[:, :-2, 1:-1], padded[:, 2:, 1:-1], padded[:, 1:-1, :-2], padded[:, 1:-1, 2:]):
        is_peak &= smoothed >= slid
    peaks = []
    for heatmap, found in zip(smoothed, is_peak):
        at = found.nonzero()
        if len(at) > most:
            at = at[heatmap[found].topk(most).indices.sort().values]
        peaks.append(at.T.flip(0).cpu().numpy())
    return peaks


def read_at(maps: np.ndarray, rows: np.ndarray, columns: np.ndarray, at: np.ndarray) -> np.ndarray:
    """rows @ maps (..., h, w) @ columns.T at integer pixels only, `at` (2, P), x and y -> (..., P)."""
    return ((rows[at[1]] @ maps) * columns[at[0]]).sum(axis=-1)


def match_limb(
    starts: np.ndarray, ends: np.ndarray, field: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> list[tuple[int, int, float]]:
    """Matches the peaks at the two ends of a limb, (A, 3) and (B, 3), best first: (a, b, score).

    The score is the mean of the limb's field (2, h, w) along the line, less a penalty beyond half a frame.
    """
    if 0 in (len(starts), len(ends)):
        return []
    vectors = ends[None, :, :2] - starts[:, None, :2]  # (A, B, 2)
    lengths = np.linalg.norm(vectors, axis=-1).clip(0.001)
    line = np.linspace(*np.broadcast_arrays(starts[:, None, :2], ends[None, :, :2]), 10)
    at = line.round().astype(int).reshape(-1, 2).T
    field = read_at(field, rows, columns, at).reshape(2, 10, *lengths.shape)
    along = (field * vectors.transpose(2, 0, 1)[:, None] / lengths).sum(axis=0)  # (10, A, B)
    scores = along.mean(axis=0) + np.minimum(0.5 * len(rows) / lengths - 1, 0)
    good = ((along > 0.05).sum(axis=0) > 0.8 * 10) & (scores > 0)

    links = []
    for a, b in sorted(np.argwhere(good).tolist(), key=lambda pair: -scores[*pair]):
        if all(a != taken[0] and b != taken[1] for taken in links):
            links.append((a, b, float(scores[a, b])))
    return links


@dataclass(eq=False)
class Person:
    """A person being put together."""

    joints: dict[int, int]  # keypoint -> which of its peaks
    count: int  # of joints, as the port counts: a joint that is replaced counts again
    score: float  # of joints and limbs


def assemble(peaks: list[np.ndarray], links: list[list[tuple[int, int, float]]]) -> list[np.ndarray]:
    """Peaks of the 18 keypoints, (N, 3) each, and links of the 19 limbs -> people, (18, 3) each.

    Every link extends the person who has one of its ends, joins two people who have nothing in common but it, or
    founds a new one. People of fewer than 4 joints or a mean score under 0.4 are dropped.
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
            found = np.array([peaks[keypoint][peak] for keypoint, peak in person.joints.items()])
            found[:, 2] = found[:, 2].clip(LEAST_SCORE, 1)
            bodies.append(np.zeros((18, 3)))
            bodies[-1][list(person.joints)] = found
    return bodies


# ---- Hands and faces ----------------------------------------------------------------------------

Box = tuple[int, int, int]  # left, top and side of a square, in pixels

LEAST_BOX = 20  # pixels: smaller hands and faces are not looked for
HAND_MAP = 128  # pixels: the size at which the maps of all sizes are averaged and read
NOSE, RIGHT_ARM, LEFT_ARM = 0, slice(2, 5), slice(5, 8)  # of an arm shoulder, elbow, wrist


def hand_boxes(body: np.ndarray, height: int, width: int) -> dict[str, Box]:
    """Where to look for the hands of a body (18, 3) in pixels, if all three joints of the arm are there.

    A square around a third of the forearm beyond the wrist, 1.5 times as long as it, or as 0.9 of the upper arm.
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

    A square around the nose that reaches 3 times as far as the further eye, or 1.5 times as the further ear.
    """
    nose, seen = body[NOSE, :2], is_seen(body)
    times = np.array([3.0, 3.0, 1.5, 1.5]) * seen[14:]  # eyes and ears
    if not seen[NOSE] or not times.any():
        return {}
    reach = (times * np.abs(body[14:, :2] - nose).max(axis=1)).max()
    x, y = (nose - reach).clip(0)
    within = [end - start for start, end in ((x, width), (y, height)) if start + reach > end]
    side = min([2 * reach, *within])
    return {"face": (int(x), int(y), int(side))} if side >= LEAST_BOX else {}


def hand_input(crops: Sequence[Tensor], side: int) -> Tensor:
    """Crops uint8 (h, w, 3), of any sizes -> (N, 3, side, side), blurred a little first."""
    blurs = [[blurring(size, 0.8, 3, "reflect") for size in crop.shape[:2]] for crop in crops]
    levels = [separable(rows, grey_levels(crop), columns) for crop, (rows, columns) in zip(crops, blurs)]
    return torch.stack([network_input(each.round(), side, side) for each in levels])


def find_hands(net: Callable, crops: Sequence[Tensor], sides: Sequence[int]) -> np.ndarray:
    """Crops of one hand each, uint8 (h, w, 3) -> (N, 21, 3): x, y in the crop's pixels, score.

    The network sees them at each of the `sides`, in pixels, and its maps are averaged.
    """
    heatmaps = 0
    for side in sides:
        cells = net(hand_input(crops, side))[:, :21]
        to_map = cells_to_pixels(cells.shape[-1], side, HAND_MAP)
        heatmaps += separable(to_map, cells, to_map) / len(sides)
    return decode_hands(heatmaps, [crop.shape[:2] for crop in crops])


def decode_hands(heatmaps: Tensor, sizes: Sequence[tuple[int, int]]) -> np.ndarray:
    """Heatmaps (N, 21, 128, 128) and the crops' heights and widths -> keypoints (N, 21, 3).

    A keypoint is the highest pixel of the blob that holds most, of those where the smoothed map is high enough.
    """
    smoothed = separable(smoothing(HAND_MAP), heatmaps, smoothing(HAND_MAP))
    blobs = label_blobs(smoothed > LEAST_SCORE).flatten(2)
    values = heatmaps.flatten(2)
    held = torch.zeros(*blobs.shape[:2], HAND_MAP**2 + 1, device=values.device)
    held.scatter_add_(2, blobs, values)
    held[..., 0] = 0  # what lies in no blob
    largest = held.argmax(dim=2, keepdim=True)
    chosen = values.where((blobs == largest) & (blobs > 0), 0.0).view_as(heatmaps)
    return np.stack([highest_pixels(maps, height, width) for maps, (height, width) in zip(chosen, sizes)])


def label_blobs(mask: Tensor) -> Tensor:
    """Masks (N, K, H, W) -> integers: 0 outside, and of each 8-connected blob a number above 0."""
    numbers = torch.arange(1.0, mask[0, 0].numel() + 1, device=mask.device)
    labels = numbers.view(mask.shape[2:]) * mask
    while True:  # the highest number spreads by a pixel a turn
        spread = F.max_pool2d(labels, 3, stride=1, padding=1) * mask
        if spread.equal(labels):
            return labels.long()
        labels = spread


def highest_pixels(maps: Tensor, height: int, width: int) -> np.ndarray:
    """The highest pixel of each map (K, H, W) -> (K, 3): x, y scaled to height and width, score.

    Zero where nothing reaches the threshold, and in the first row and column, which mean the same in the port.
    """
    scores, indices = (found.cpu().numpy() for found in maps.flatten(1).max(dim=1))
    y = indices // maps.shape[2] * height // maps.shape[1]
    x = indices % maps.shape[2] * width // maps.shape[2]
    points = np.stack([x, y, scores.clip(LEAST_SCORE, 1)], axis=1)
    points[(scores <= LEAST_SCORE) | (x == 0) | (y == 0)] = 0
    return points


def find_faces(net: Callable, crops: Sequence[Tensor], side: int) -> np.ndarray:
    """Crops of one face each, uint8 (h, w, 3) -> (N, 70, 3): x, y in the crop's pixels, score.

    The port also returns the background's highest pixel and closes the gaps of missing points; we do not.
    """
    seen = torch.stack([network_input(grey_levels(crop), side, side) for crop in crops])
    sizes = [crop.shape[:2] for crop in crops]
    resize = partial(F.interpolate, mode="bilinear", align_corners=True)
    maps = [resize(each, size)[0] for each, size in zip(net(seen)[:, None, :70], sizes)]
    return np.stack([highest_pixels(each, *size) for each, size in zip(maps, sizes)])
