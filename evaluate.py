"""How good a result is, by the paper's metrics: `python evaluate.py result.mp4 --truth truth.mp4`.

Prints a table and writes beside the result its figures (`.metrics.json`), the quality of each frame
(`.metrics.png`) and the worst frames under the true ones (`.worst.png`). What a metric lacks is said
in its place: a number that is there was computed.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from checkpoint import compute_device, load_openpose, model_path
from clip import ImageEncoder, prepare_images
from features import I3D, LPIPS, Inception, load_network
from openpose import INTERPOLATED, OpenPose, find_poses
from pose import Pose, is_seen, load_poses, place_pose, read_canvas, video_sim
from train import parse_canvas, parse_range
from video import cover, fit_frame, read_frames, replacing, save_image

# Each metric's title, which way is better, how it is printed, and what it needs.
METRICS = {
    "l1": ("L1", "lower", ".4f", "--truth"),
    "psnr": ("PSNR, dB", "higher", ".2f", "--truth"),
    "ssim": ("SSIM", "higher", ".4f", "--truth"),
    "lpips": ("LPIPS", "lower", ".4f", "--truth and --full"),
    "fid": ("FID", "lower", ".2f", "--truth and --full"),
    "fvd": ("FVD", "lower", ".2f", "--truth and --full"),
    "clip_i": ("CLIP-I", "higher", ".4f", "--train and --full"),
    "clip_t": ("CLIP-T", "higher", ".4f", "--full"),
    "pck": ("PCK", "higher", ".4f", "--poses, and --full or a --model with its own OpenPose"),
    "pose_error": ("pose error", "lower", ".4f", "what PCK needs, and somebody to be found"),
    "video_sim": ("Video-SIM", "lower", ".4f", "--poses, and --train with its poses beside it"),
}

OUTPUTS = (".metrics.json", ".metrics.png", ".worst.png")  # behind the result's name

# ---- Frame by frame -----------------------------------------------------------------------------


def check_shapes(result: np.ndarray, truth: np.ndarray) -> None:
    if result.shape != truth.shape:
        raise ValueError(f"cannot compare frames {result.shape} with {truth.shape}")


def frame_l1(result: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Mean absolute difference of frames uint8 (F, H, W, 3), from 0 to 1, of each: (F,)."""
    check_shapes(result, truth)
    return np.array([np.abs(a.astype(np.float64) - b).mean() / 255 for a, b in zip(result, truth)])


def frame_psnr(result: np.ndarray, truth: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of frames uint8 (F, H, W, 3), of each: (F,), 100 for equal ones.

    `mask`, booleans (F, H, W), limits it to some pixels; not a number for frames where it is empty.
    """
    check_shapes(result, truth)
    values = []
    for index, (a, b) in enumerate(zip(result, truth)):
        # As floats: a difference of uint8 wraps around, and 1 - 2 would count as 255.
        error = (a.astype(np.float64) - b) ** 2 / 255**2
        error = error if mask is None else error[mask[index]]
        values.append(-10 * np.log10(max(error.mean(), 1e-10)) if error.size else np.nan)
    return np.array(values)


def psnr(result: np.ndarray, truth: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Peak signal-to-noise ratio in dB of frames uint8 (F, H, W, 3), per frame, then averaged.

    `mask`, booleans (F, H, W), limits it to some pixels; frames where it is empty do not count.
    Equal frames are given 100 dB. Raises ValueError for shapes that differ.
    """
    return float(np.nanmean(frame_psnr(result, truth, mask)))


def frame_ssim(result: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Structural similarity of frames uint8 (F, H, W, 3), of each: (F,), up to 1 for equal ones.

    Wang et al. 2004: a Gaussian window of 11x11 with deviation 1.5, on each colour channel in the
    range [0, 1], where the window fits; averaged over channels and pixels. Raises ValueError for
    shapes that differ or frames below 11 pixels.
    """
    check_shapes(result, truth)
    if min(truth.shape[1:3]) < 11:
        raise ValueError(
            f"frames of {truth.shape[2]}x{truth.shape[1]} pixels are below SSIM's 11x11"
        )
    bell = torch.exp(-(torch.arange(-5, 6, dtype=torch.float64) ** 2) / (2 * 1.5**2))
    window = torch.outer(bell, bell)[None, None] / bell.sum() ** 2

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(x, window)

    values = []
    for a, b in zip(result, truth):  # channels as a batch: (3, 1, H, W)
        a, b = (torch.tensor(x).permute(2, 0, 1)[:, None].double() / 255 for x in (a, b))
        mean_a, mean_b = blur(a), blur(b)
        var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
        covariance = blur(a * b) - mean_a * mean_b
        c1, c2 = 0.01**2, 0.03**2
        similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
        values.append(
            (similarity / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean().item()
        )
    return np.array(values)


def ssim(result: np.ndarray, truth: np.ndarray) -> float:
    """Structural similarity of frames uint8 (F, H, W, 3), per frame, then averaged: `frame_ssim`."""
    return float(frame_ssim(result, truth).mean())


# ---- By features --------------------------------------------------------------------------------

AT_ONCE = 8  # pictures that a network sees at a time
CLIP_FRAMES, CLIP_STEP = 16, 4  # FVD's clips are 16 frames long; one begins at every 4th


def pictures(frames: np.ndarray, network: torch.nn.Module) -> Tensor:
    """Frames uint8 (..., H, W, 3) -> (..., 3, H, W) in [-1, 1], where the network is."""
    device = next(network.parameters()).device
    return torch.from_numpy(frames).to(device).movedim(-1, -3).float() / 127.5 - 1


def batches(count: int, title: str) -> Iterator[slice]:
    for start in tqdm(range(0, count, AT_ONCE), desc=title, leave=False):
        yield slice(start, start + AT_ONCE)


@torch.inference_mode()
def frame_lpips(network: LPIPS, result: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """LPIPS of frames uint8 (F, H, W, 3), of each: (F,)."""
    check_shapes(result, truth)
    values = [
        network(pictures(result[part], network), pictures(truth[part], network)).cpu()
        for part in batches(len(result), "LPIPS")
    ]
    return torch.cat(values).double().numpy()


@torch.inference_mode()
def inception_features(network: Inception, frames: np.ndarray) -> np.ndarray:
    """Frames uint8 (F, H, W, 3) -> (F, 2048)."""
    parts = batches(len(frames), "FID")
    return torch.cat([network(pictures(frames[part], network)).cpu() for part in parts]).numpy()


@torch.inference_mode()
def i3d_features(network: I3D, frames: np.ndarray) -> np.ndarray:
    """Frames uint8 (F, H, W, 3) -> (clips, 400), of all clips of 16 frames that begin at a 4th one."""
    starts = range(0, len(frames) - CLIP_FRAMES + 1, CLIP_STEP)
    clips = (frames[start : start + CLIP_FRAMES] for start in tqdm(starts, "FVD", leave=False))
    return torch.cat([network(pictures(clip[None], network)).cpu() for clip in clips]).numpy()


@torch.inference_mode()
def clip_embeddings(network: ImageEncoder, frames: np.ndarray) -> np.ndarray:
    """Frames uint8 (F, H, W, 3) -> (F, 768), each of length 1."""
    device, size = network.visual_projection.weight.device, network.config.size
    parts = batches(len(frames), "CLIP")
    found = [network(prepare_images(frames[part], size).to(device)).cpu() for part in parts]
    return F.normalize(torch.cat(found).double(), dim=1).numpy()


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Between Gaussians fitted to features (N, D) and (M, D), which makes FID and FVD.

    |mean a - mean b|^2 + trace(A + B - 2 (A B)^(1/2)) with the covariances A and B. As A is x'x for
    the centred features x / (N - 1)^(1/2), and B likewise y'y, the root's trace is the sum of the
    singular values of x y': the same number as by a root of the D x D matrix, without its rounding
    errors where there are fewer features than D. Raises ValueError for fewer than 2 features.
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

    PCK is the share of the body keypoints asked for that were found within 0.1 of the longer side of
    the asked body's box (Yang & Ramanan 2013); one not found is a miss, and so is one that was only
    interpolated. The error is the mean distance of those found, in units of that side; not a number
    when there are none.
    """
    hits, count, distances = 0, 0, []
    for ours, theirs in zip(found, asked):
        wanted = is_seen(theirs.body)
        if not wanted.any():
            continue
        a, b = (pose.body[:, :2].astype(np.float64) * (width, height) for pose in (ours, theirs))
        side = max(np.ptp(b[wanted], axis=0).max(), 1)  # one pixel, where the box is a point
        both = wanted & (ours.body[:, 2] > INTERPOLATED)
        distance = np.linalg.norm(a[both] - b[both], axis=1) / side
        count += wanted.sum()
        hits += (distance <= NEAR).sum()
        distances += distance.tolist()
    error = float(np.mean(distances)) if distances else float("nan")
    return (float(hits / count) if count else float("nan")), error


def find_and_compare(
    nets: OpenPose, frames: np.ndarray, asked: Sequence[Pose]
) -> tuple[float, float]:
    """`pose_fidelity` of what OpenPose finds in frames uint8 (F, H, W, 3), which may be nobody."""
    try:
        found = find_poses(nets, frames, whole_bodies=[], progress=True)
    except ValueError:
        found = [Pose()] * len(frames)
    return pose_fidelity(found, asked, *frames.shape[1:3])


# ---- Pictures -----------------------------------------------------------------------------------

PAPER, INK, FAINT, LINE = (24, 24, 27), (212, 212, 216), (63, 63, 70), (96, 165, 250)


def plot(curves: dict[str, np.ndarray], width: int = 960, panel: int = 220) -> Image.Image:
    """One panel per curve (F,), under each other: its value over the frame, mean dashed."""
    double = 2  # drawn twice as large and averaged down, which smooths the lines
    font = ImageFont.load_default(size=14 * double)
    left, right, top, bottom = 70 * double, 20 * double, 34 * double, 26 * double
    width, panel = width * double, panel * double
    picture = Image.new("RGB", (width, panel * len(curves)), PAPER)
    ink = ImageDraw.Draw(picture)
    for row, (title, values) in enumerate(curves.items()):
        low, mean, high = values.min(), values.mean(), values.max()
        x = left + (width - left - right) * np.arange(len(values)) / max(1, len(values) - 1)
        ceiling, floor = row * panel + top, (row + 1) * panel - bottom

        def height(value: np.ndarray, low=low, span=high - low, ceiling=ceiling, floor=floor):
            return floor - (floor - ceiling) * ((value - low) / span if span else 0 * value + 0.5)

        ink.text((left, ceiling - top // 2), title, INK, font, anchor="lm")
        labels = {float(height(v)): f"{v:.4g}" for v in (low, high)}
        for y, label in labels.items():
            ink.line((left, y, width - right, y), FAINT, double)
            ink.text((left - 6 * double, y), label, INK, font, anchor="rm")
        y = float(height(mean))
        for start in range(left, width - right, 12 * double):
            ink.line((start, y, min(start + 6 * double, width - right), y), INK, double)
        ink.text((width - right, ceiling - top // 2), f"mean {mean:.4g}", INK, font, anchor="rm")
        points = np.stack([x, height(values)], axis=1)
        ink.line([tuple(point) for point in points.tolist()], LINE, 2 * double, joint="curve")
        for frame in np.unique(np.linspace(0, len(values) - 1, 9).astype(int)).tolist():
            ink.text((x[frame], floor + bottom // 2), str(frame), INK, font, anchor="mm")
    return picture.reduce(double)


def worst_frames(
    result: np.ndarray, truth: np.ndarray, quality: np.ndarray, count: int = 8, height: int = 192
) -> Image.Image:
    """A strip of the frames of lowest quality (F,), in dB, worst first: truth above, result below."""
    font = ImageFont.load_default(size=max(12, height // 12))
    gap, line = 8, round(1.6 * font.size)
    width = round(height * truth.shape[2] / truth.shape[1])
    worst = np.argsort(quality, kind="stable")[:count].tolist()
    margin = gap + round(font.getlength("result")) + gap
    size = margin + len(worst) * (width + gap), line + 2 * (height + gap)
    strip = Image.new("RGB", size, PAPER)
    ink = ImageDraw.Draw(strip)
    for row, label in enumerate(("truth", "result")):
        y = line + row * (height + gap) + height // 2
        ink.text((gap, y), label, INK, font, anchor="lm")
    for column, index in enumerate(worst):
        left = margin + column * (width + gap)
        title = f"{index}: {quality[index]:.1f} dB"
        ink.text((left + width // 2, line // 2), title, INK, font, anchor="mm")
        for row, frames in enumerate((truth, result)):
            frame = Image.fromarray(frames[index]).resize((width, height), Image.Resampling.LANCZOS)
            strip.paste(frame, (left, line + row * (height + gap)))
    return strip


# ---- The command line ---------------------------------------------------------------------------


def read_truth(
    path: Path, within: range | None, fitted: bool, result: np.ndarray, name: Path
) -> np.ndarray:
    """The true frames of the result `name`, uint8 (F, H, W, 3), as many as it has and as large.

    Raises ValueError that says what to do when they are not.
    """
    truth, _ = read_frames(path, within)
    check_count(path, len(truth), "frames", name, len(result))
    height, width = result.shape[1:3]
    if fitted:
        placing = cover(*truth.shape[1:3], height, width)
        truth = np.stack([fit_frame(frame, placing) for frame in truth])
    if truth.shape != result.shape:
        raise ValueError(
            f"{path}: {truth.shape[2]}x{truth.shape[1]} pixels, but {name} has {width}x{height}; "
            "--fit scales and crops the truth as train.py does a clip"
        )
    return truth


def check_count(path: Path, count: int, what: str, name: Path, frames: int) -> None:
    if count != frames:
        raise ValueError(
            f"{path}: {count} {what}, but {name} has {frames} frames; say with --range A:B which of "
            "them it shows"
        )


def read_placed_poses(
    path: Path,
    within: range | None,
    height: int,
    width: int,
    canvas: tuple[int, int] | None = None,
) -> list[Pose]:
    """Poses on a canvas of the result's size, which they cover as frames do.

    canvas: the (height, width) of the video that they were found in, for a file that does not say.
    """
    poses = load_poses(path, *(canvas or (None, None))[::-1])
    if within and within.stop > len(poses):
        raise ValueError(
            f"{path}: {len(poses)} poses, so none for --range {within.start}:{within.stop}"
        )
    placing = cover(*(read_canvas(path) or canvas or (height, width)), height, width).placement
    return [place_pose(pose, *placing) for pose in (poses[i] for i in within or range(len(poses)))]


def network_figures(
    result: np.ndarray, truth: np.ndarray | None, training: np.ndarray | None, folder: Path | None
) -> tuple[dict[str, float], dict[str, str]]:
    """The metrics of the public networks, and for those that must be left out the reason."""
    device, _ = compute_device()
    # TF32 would cost the fourth digit.
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    fewest = {"fid": 2, "fvd": CLIP_FRAMES + CLIP_STEP, "clip_t": 2}
    figures = {}
    left_out = {
        name: f"needs {count} frames or more, there are {len(result)}"
        for name, count in fewest.items()
        if len(result) < count
    }

    def load(kind: type, *names: str) -> torch.nn.Module | None:
        names = [name for name in names if name not in left_out]
        try:
            return load_network(kind, folder, device) if names else None
        except OSError as error:
            left_out.update(dict.fromkeys(names, str(error)))

    if truth is not None:
        if network := load(LPIPS, "lpips"):
            figures["lpips"] = float(frame_lpips(network, result, truth).mean())
        for name, kind, features in (
            ("fid", Inception, inception_features),
            ("fvd", I3D, i3d_features),
        ):
            if network := load(kind, name):
                ours, theirs = (features(network, frames) for frames in (result, truth))
                figures[name] = frechet_distance(ours, theirs)
    wanted = ["clip_t"] if training is None else ["clip_t", "clip_i"]
    if network := load(ImageEncoder, *wanted):
        ours = clip_embeddings(network, result)
        if len(ours) > 1:
            figures["clip_t"] = clip_t(ours)
        if training is not None:
            figures["clip_i"] = clip_i(ours, clip_embeddings(network, training))
    return figures, left_out


def print_table(figures: dict[str, float], left_out: dict[str, str]) -> None:
    for name, (title, better, form, _) in METRICS.items():
        if name in figures:
            print(f"{title:>12} {figures[name]:10{form}}   {better} is better")
    if left_out:
        print("Left out:")
    for name, reason in left_out.items():
        print(f"{METRICS[name][0]:>12}   {reason}")


def parse_arguments(
    command: list[str] | None = None,
) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("result", type=Path, help="video or folder of frames")
    parser.add_argument("--truth", type=Path, help="the true frames, a video or a folder")
    parser.add_argument(
        "--train", type=Path, help="the training frames, such as runs/NAME/frames, or a clip"
    )
    parser.add_argument(
        "--poses",
        type=Path,
        help="the poses that were asked for, such as the .poses.json that sample.py wrote",
    )
    parser.add_argument(
        "--canvas",
        type=parse_canvas,
        metavar="WxH",
        help="size of the video that poses in pixels were found in, if their JSON does not say",
    )
    parser.add_argument(
        "--range",
        type=parse_range,
        metavar="A:B",
        help="the frames of the truth and of the poses that the result shows (default: all)",
    )
    parser.add_argument(
        "--fit", action="store_true", help="scale and crop the truth to the result's size"
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="also the metrics that take public networks, downloaded at first use (2.1 GB)",
    )
    parser.add_argument(
        "--weights", type=Path, help="folder to look for the public networks' files in"
    )
    parser.add_argument(
        "--model", default="sd15", help="whose OpenPose finds the result's poses (default: sd15)"
    )
    return parser, parser.parse_args(command)


def beside(clip: Path, end: str) -> Path:
    """A file named after a video, or after a folder of frames, whose name may have dots."""
    return clip.with_name((clip.name if clip.is_dir() else clip.stem) + end)


def main(args: argparse.Namespace) -> dict[str, float]:
    """Does what the command line says; returns the figures by their names in `METRICS`."""
    result, _ = read_frames(args.result)
    height, width = result.shape[1:3]
    truth = training = asked = trained = None
    if args.truth:
        truth = read_truth(args.truth, args.range, args.fit, result, args.result)
    if args.poses:
        # What sample.py wrote beside the result holds the poses of its frames alone.
        own = args.poses.resolve() == beside(args.result, ".poses.json").resolve()
        within = None if own else args.range
        asked = read_placed_poses(args.poses, within, height, width, args.canvas)
        check_count(args.poses, len(asked), "poses", args.result, len(result))
    if args.train:
        training, _ = read_frames(args.train)
        known = beside(args.train, ".poses.json")
        trained = read_placed_poses(known, None, height, width) if known.is_file() else None
    if args.weights and not args.weights.is_dir():
        raise FileNotFoundError(f"{args.weights}: no such folder, given as --weights")

    figures, left_out, by_frame = {}, {}, {}
    if truth is not None:
        measures = {"l1": frame_l1, "psnr": frame_psnr, "ssim": frame_ssim}
        by_frame = {name: measure(result, truth) for name, measure in measures.items()}
        figures = {name: float(values.mean()) for name, values in by_frame.items()}
    if args.full:
        measured, left_out = network_figures(result, truth, training, args.weights)
        figures |= measured
    if asked and trained:
        figures["video_sim"] = video_sim(asked, trained)
    if asked and (args.full or (model_path(args.model) / "openpose").is_dir()):
        try:
            openpose = load_openpose(args.model, compute_device()[0])
            figures["pck"], figures["pose_error"] = find_and_compare(openpose, result, asked)
        except OSError as error:
            left_out["pck"] = str(error)
    # A distance without any pair, and the infinite one of poses that share no keypoint, are none.
    figures = {name: figures[name] for name in METRICS if np.isfinite(figures.get(name, np.nan))}
    left_out |= {
        name: f"needs {needs}"
        for name, (*_, needs) in METRICS.items()
        if name not in figures and name not in left_out
    }

    outputs = [beside(args.result, end) for end in OUTPUTS]
    if truth is not None:
        curves = {METRICS[name][0]: by_frame[name] for name in ("psnr", "ssim")}
        save_image(outputs[1], plot(curves))
        save_image(outputs[2], worst_frames(result, truth, by_frame["psnr"]))
    report = {
        "result": str(args.result),
        "truth": args.truth and str(args.truth),
        "frames": len(result),
        "metrics": figures,
        "left_out": left_out,
        "by_frame": {name: values.tolist() for name, values in by_frame.items()},
    }
    with replacing(outputs[0]) as unfinished:
        unfinished.write_text(json.dumps(report, indent=1) + "\n")
    print_table(figures, left_out)
    print(f"Written: {', '.join(map(str, outputs if truth is not None else outputs[:1]))}")
    return figures


if __name__ == "__main__":
    parser, args = parse_arguments()
    try:
        main(args)
    except (OSError, ValueError) as error:
        parser.exit(2, f"evaluate.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "evaluate.py: stopped\n")
    except torch.OutOfMemoryError:
        parser.exit(2, "evaluate.py: out of graphics memory: compare shorter videos\n")
