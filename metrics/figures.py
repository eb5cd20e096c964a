"""The paper's metrics, frame by frame, by features and by poses."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from metrics.clip_images import ImageEncoder, prepare_images
from metrics.networks import I3D, LPIPS, Inception
from openpose import OpenPose, find_poses
from poses.people import INTERPOLATED
from poses.pose import Pose, is_seen, pose_distance

# ---- Frame by frame -----------------------------------------------------------------------------


def pairs(result: np.ndarray, truth: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each frame with its true one, in float64: in uint8, 1 - 2 would be 255."""
    if result.shape != truth.shape:
        raise ValueError(f"cannot compare frames {result.shape} with {truth.shape}")
    return ((a.astype(np.float64), b.astype(np.float64)) for a, b in zip(result, truth))


def frame_l1(result: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Mean absolute difference of frames uint8 (F, H, W, 3), from 0 to 1, of each: (F,)."""
    return np.array([np.abs(a - b).mean() / 255 for a, b in pairs(result, truth)])


def frame_psnr(result: np.ndarray, truth: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of frames uint8 (F, H, W, 3), of each: (F,), 100 for equal ones.

    `mask`, booleans (F, H, W), limits it to some pixels; not a number for frames where it is empty.
    """
    masks = [...] * len(result) if mask is None else mask
    errors = (((a - b) ** 2 / 255**2)[each] for (a, b), each in zip(pairs(result, truth), masks))
    return np.array([-10 * np.log10(max(e.mean(), 1e-10)) if e.size else np.nan for e in errors])


def psnr(result: np.ndarray, truth: np.ndarray, mask: np.ndarray | None = None) -> float:
    """The mean of `frame_psnr`; frames where the mask is empty do not count."""
    return float(np.nanmean(frame_psnr(result, truth, mask)))


def frame_ssim(result: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Structural similarity of frames uint8 (F, H, W, 3), of each: (F,), up to 1 for equal ones.

    Wang et al. 2004: a Gaussian window of 11x11 with deviation 1.5, on each colour channel in the range [0, 1],
    where the window fits; averaged over channels and pixels. Raises ValueError for frames below 11 pixels.
    """
    if min(truth.shape[1:3]) < 11:
        raise ValueError(f"frames of {truth.shape[2]}x{truth.shape[1]} pixels are below SSIM's 11x11")
    bell = torch.exp(-(torch.arange(-5, 6, dtype=torch.float64) ** 2) / (2 * 1.5**2))
    window = torch.outer(bell, bell)[None, None] / bell.sum() ** 2
    blur, c1, c2 = partial(F.conv2d, weight=window), 0.01**2, 0.03**2
    values = []
    for pair in pairs(result, truth):  # channels as a batch: (3, 1, H, W)
        a, b = (torch.from_numpy(x).permute(2, 0, 1)[:, None] / 255 for x in pair)
        mean_a, mean_b = blur(a), blur(b)
        var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
        covariance = blur(a * b) - mean_a * mean_b
        similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
        values.append((similarity / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean().item())
    return np.array(values)


def ssim(result: np.ndarray, truth: np.ndarray) -> float:
    """The mean of `frame_ssim`."""
    return float(frame_ssim(result, truth).mean())


# ---- By features --------------------------------------------------------------------------------

CLIP_FRAMES, CLIP_STEP = 16, 4  # FVD's clips are 16 frames long; one begins at every 4th


def pictures(frames: np.ndarray, device: torch.device) -> Tensor:
    """Frames uint8 (..., H, W, 3) -> (..., 3, H, W) in [-1, 1]."""
    return torch.from_numpy(frames).to(device).movedim(-1, -3).float() / 127.5 - 1


@torch.inference_mode()
def outputs(
    network: nn.Module,
    title: str,
    *inputs: Sequence[np.ndarray],
    prepare: Callable[[np.ndarray, torch.device], Tensor] = pictures,
    at_once: int = 8,
) -> Tensor:
    """What a network makes of its inputs, frames or clips, `at_once` of them at a time."""
    device, found = next(network.parameters()).device, []
    for start in tqdm(range(0, len(inputs[0]), at_once), desc=title, leave=False):
        batch = (prepare(np.asarray(each[start : start + at_once]), device) for each in inputs)
        found.append(network(*batch).cpu())
    return torch.cat(found)


def frame_lpips(network: LPIPS, result: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """LPIPS of frames uint8 (F, H, W, 3), of each: (F,)."""
    return outputs(network, "LPIPS", result, truth).double().numpy()


def inception_features(network: Inception, frames: np.ndarray) -> np.ndarray:
    """Frames uint8 (F, H, W, 3) -> (F, 2048)."""
    return outputs(network, "FID", frames).numpy()


def i3d_features(network: I3D, frames: np.ndarray) -> np.ndarray:
    """Frames uint8 (F, H, W, 3) -> (clips, 400), of all clips of 16 frames that begin at a 4th one."""
    starts = range(0, len(frames) - CLIP_FRAMES + 1, CLIP_STEP)
    return outputs(network, "FVD", [frames[i : i + CLIP_FRAMES] for i in starts], at_once=1).numpy()


def clip_embeddings(network: ImageEncoder, frames: np.ndarray) -> np.ndarray:
    """Frames uint8 (F, H, W, 3) -> (F, 768), each of length 1."""

    def prepare(some: np.ndarray, device: torch.device) -> Tensor:
        return prepare_images(some, network.config.size).to(device)

    return F.normalize(outputs(network, "CLIP", frames, prepare=prepare).double(), dim=1).numpy()


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Between Gaussians fitted to features (N, D) and (M, D), which makes FID and FVD.

    |mean a - mean b|^2 + trace(A + B - 2 (A B)^(1/2)) with the covariances A and B. As A is x'x for the centred
    features x / (N - 1)^(1/2), and B likewise y'y, the root's trace is the sum of the singular values of x y'.
    Where there are fewer features than D, this has smaller rounding errors than a root of the D x D matrix.
    Raises ValueError for fewer than 2 features.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError("a distance of distributions needs 2 features or more of each")
    shift = a.mean(axis=0, dtype=np.float64) - b.mean(axis=0, dtype=np.float64)
    x, y = ((f - f.mean(axis=0, dtype=np.float64)) / np.sqrt(len(f) - 1) for f in (a, b))
    root = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return float(shift @ shift + (x**2).sum() + (y**2).sum() - 2 * root)


def clip_i(result: np.ndarray, training: np.ndarray) -> float:
    """Faithfulness: the mean cosine of all pairs of a result's and a training frame's embedding."""
    return float(result.mean(axis=0) @ training.mean(axis=0))


def clip_t(result: np.ndarray) -> float:
    """Consistency: the mean cosine of the embeddings of each frame and the next."""
    return float((result[:-1] * result[1:]).sum(axis=1).mean())


# ---- By poses -----------------------------------------------------------------------------------

NEAR = 0.1  # of the longer side of the person's box: the usual PCK@0.1


def pose_fidelity(
    found: Sequence[Pose], asked: Sequence[Pose], height: int, width: int
) -> tuple[float, float]:
    """How well the poses found in frames of height x width follow those asked for: (PCK, error).

    PCK is the share of the body keypoints asked for that were found within 0.1 of the longer side of the asked
    body's box (Yang & Ramanan 2013); one not found is a miss, and so is one that was only interpolated. The error
    is the mean distance of those found, in units of that side; not a number when there are none.
    """
    count, distances = 0, []
    for ours, theirs in zip(found, asked):
        wanted = is_seen(theirs.body)
        if wanted.any():
            a, b = (pose.body[:, :2].astype(np.float64) * (width, height) for pose in (ours, theirs))
            side = max(np.ptp(b[wanted], axis=0).max(), 1)  # one pixel, where the box is a point
            both = wanted & (ours.body[:, 2] > INTERPOLATED)
            distances += (np.linalg.norm(a[both] - b[both], axis=1) / side).tolist()
            count += int(wanted.sum())
    hits = sum(distance <= NEAR for distance in distances)
    return hits / count if count else np.nan, float(np.mean(distances)) if distances else np.nan


def find_and_compare(nets: OpenPose, frames: np.ndarray, asked: Sequence[Pose]) -> tuple[float, float]:
    """`pose_fidelity` of what OpenPose finds in frames uint8 (F, H, W, 3), which may be nobody."""
    try:
        found = find_poses(nets, frames, whole_bodies=[], progress=True)
    except ValueError:
        found = [Pose()] * len(frames)
    return pose_fidelity(found, asked, *frames.shape[1:3])


def video_sim(targets: Sequence[Pose], training: Sequence[Pose]) -> float:
    """The paper's Video-SIM (supplement, Eq. 2): how far target poses lie from training poses.

    The sum over target frames of `pose_distance` to the nearest training frame: lower is closer.
    """
    return sum(min(pose_distance(target, pose) for pose in training) for target in targets)
