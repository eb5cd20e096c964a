"""How good a result is, by the paper's metrics: `python evaluate.py result.mp4 --truth truth.mp4`.

Prints a table and adds its figures to those beside the result (`.metrics.json`); the same inputs again replace
their own. With a truth, pictures show the quality of each frame (`.metrics.1.png` for measurement 1) and the worst
frames under the true ones (`.worst.1.png`). Metrics that cannot be computed are listed with the reason.
"""

from safe.process import before_torch, run_command

if __name__ == "__main__":
    before_torch()

import argparse
from pathlib import Path

import numpy as np
import torch

from device import compute_device
from metrics import figures as metric
from metrics.clip_images import ImageEncoder
from metrics.flicker import frame_flicker, frame_warp_error
from metrics.measurements import beside, number_of, picture_paths, read_measurements, write_measurement
from metrics.networks import I3D, LPIPS, Inception, load_network
from metrics.pictures import plot, worst_frames
from openpose import load_openpose
from pictures.pages import add_figures
from poses.pose import Pose
from poses.source import read_driver
from public.places import model_path
from safe.arguments import DEVICE, parse_canvas, parse_range, path
from video import cover, fit_frame, read_frames, save_image

# Each metric's title, which way is better, how it is printed, and what it needs.
METRICS = {
    "l1": ("L1", "lower", ".4f", "--truth"),
    "psnr": ("PSNR, dB", "higher", ".2f", "--truth"),
    "ssim": ("SSIM", "higher", ".4f", "--truth"),
    "flicker": ("flicker", "lower", ".4f", "--truth, and 2 frames or more"),
    "warp_error": ("warp error", "lower", ".4f", "--poses of a body, and 2 frames or more"),
    "lpips": ("LPIPS", "lower", ".4f", "--truth and --full"),
    "fid": ("FID", "lower", ".2f", "--truth and --full"),
    "fvd": ("FVD", "lower", ".2f", "--truth and --full"),
    "clip_i": ("CLIP-I", "higher", ".4f", "--train and --full"),
    "clip_t": ("CLIP-T", "higher", ".4f", "--full"),
    "pck": ("PCK", "higher", ".4f", "--poses, and --full or a --model with its own OpenPose"),
    "pose_error": ("pose error", "lower", ".4f", "what PCK needs, and somebody to be found"),
    "video_sim": ("Video-SIM", "lower", ".4f", "--poses, and --train with its poses beside it"),
}


def read_truth(args: argparse.Namespace, result: np.ndarray) -> np.ndarray:
    """The true frames uint8 (F, H, W, 3). Raises ValueError if their number or size is not the result's."""
    truth, _ = read_frames(args.truth, args.range)
    check_count(args.truth, len(truth), "frames", args.result, len(result))
    height, width = result.shape[1:3]
    if args.fit:
        placing = cover(*truth.shape[1:3], height, width)
        truth = np.stack([fit_frame(frame, placing) for frame in truth])
    if truth.shape != result.shape:
        sizes = f"{truth.shape[2]}x{truth.shape[1]} pixels, but {args.result} has {width}x{height}"
        raise ValueError(f"{args.truth}: {sizes}; --fit scales and crops the truth as train.py does a clip")
    return truth


def check_count(path: Path, count: int, what: str, result: Path, frames: int) -> None:
    if count != frames:
        counts = f"{count} {what}, but {result} has {frames} frames"
        raise ValueError(f"{path}: {counts}; say with --range A:B which of them it shows")


def read_poses(args: argparse.Namespace, frames: int, *size: int) -> tuple[list[Pose], list[Pose]]:
    """The poses asked for and those of the training frames, if given, on a canvas of `size`, (height, width)."""

    def placed(path: Path, within: range | None, canvas: tuple[int, int] | None) -> list[Pose]:
        """canvas: the (height, width) of the video that they were found in, for a file that does not say."""
        return read_driver(path, "json", within, canvas=canvas).on_canvas(*size)

    asked = trained = []
    if args.poses:
        # What sample.py wrote beside the result holds the poses of its frames alone.
        own = args.poses.resolve() == beside(args.result, ".poses.json").resolve()
        asked = placed(args.poses, None if own else args.range, args.canvas)
        check_count(args.poses, len(asked), "poses", args.result, frames)
    if args.train and (known := beside(args.train, ".poses.json")).is_file():
        trained = placed(known, None, None)
    return asked, trained


def network_figures(
    result: np.ndarray,
    truth: np.ndarray | None,
    training: np.ndarray | None,
    folder: Path | None,
    device: torch.device,
) -> tuple[dict[str, float], dict[str, str]]:
    """The metrics of the public networks, and for those that must be left out the reason."""
    torch.backends.cudnn.allow_tf32 = False  # TF32 would cost the fourth digit
    torch.set_float32_matmul_precision("highest")
    figures, left_out = {}, {}
    for name, fewest in {"fid": 2, "fvd": metric.CLIP_FRAMES + metric.CLIP_STEP, "clip_t": 2}.items():
        if len(result) < fewest:
            left_out[name] = f"needs {fewest} frames or more, there are {len(result)}"

    def load(kind: type, *names: str) -> torch.nn.Module | None:
        names = [name for name in names if name not in left_out]
        try:
            return load_network(kind, folder, device) if names else None
        except OSError as error:
            left_out.update(dict.fromkeys(names, str(error)))

    if truth is not None:
        if network := load(LPIPS, "lpips"):
            figures["lpips"] = float(metric.frame_lpips(network, result, truth).mean())
        distances = {"fid": (Inception, metric.inception_features), "fvd": (I3D, metric.i3d_features)}
        for name, (kind, features) in distances.items():
            if network := load(kind, name):
                figures[name] = metric.frechet_distance(features(network, result), features(network, truth))
    if network := load(ImageEncoder, "clip_t", *([] if training is None else ["clip_i"])):
        ours = metric.clip_embeddings(network, result)
        if len(ours) > 1:
            figures["clip_t"] = metric.clip_t(ours)
        if training is not None:
            figures["clip_i"] = metric.clip_i(ours, metric.clip_embeddings(network, training))
    return figures, left_out


def parse_arguments(command: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("result", type=path, help="video or folder of frames")
    add("--truth", type=path, help="the true frames, a video or a folder")
    add("--train", type=path, help="the training frames, such as runs/NAME/frames, or a clip")
    add("--poses", type=path, help="the poses asked for, such as the .poses.json that sample.py wrote")
    add("--canvas", type=parse_canvas, metavar="WxH", help="size of the video that the poses were found in")
    add("--range", type=parse_range, metavar="A:B", help="frames of truth and poses that the result shows")
    add("--fit", action="store_true", help="scale and crop the truth to the result's size")
    add("--full", action="store_true", help="also metrics by public networks, downloaded once (2.1 GB)")
    add("--weights", type=path, help="folder to look for the public networks' files in")
    add("--model", default="sd15", help="whose OpenPose finds the result's poses (default: sd15)")
    add("--device", **DEVICE)
    return parser.parse_args(command)


def frame_figures(result: np.ndarray, truth: np.ndarray | None, asked: list[Pose]) -> dict[str, np.ndarray]:
    """The metrics that need no network, of each frame (F,), or of each but the first (F - 1,)."""
    by_frame = {}
    if truth is not None:
        measures = {"l1": metric.frame_l1, "psnr": metric.frame_psnr, "ssim": metric.frame_ssim}
        measures["flicker"] = frame_flicker
        by_frame = {name: measure(result, truth) for name, measure in measures.items()}
    if asked:
        by_frame["warp_error"] = frame_warp_error(result, asked)
    return {name: values for name, values in by_frame.items() if np.isfinite(values).any()}


def inputs_of(args: argparse.Namespace) -> dict[str, str | bool]:
    """What a result is compared with, and how, as far as it was said."""
    files = {name: getattr(args, name) for name in ("truth", "train", "poses")}
    inputs = {name: str(file.resolve()) for name, file in files.items() if file}
    if args.range:
        inputs["range"] = f"{args.range.start}:{args.range.stop}"
    if args.canvas:
        inputs["canvas"] = "x".join(map(str, args.canvas[::-1]))
    return inputs | {name: getattr(args, name) for name in ("fit", "full", "model") if getattr(args, name)}


def main(args: argparse.Namespace) -> dict[str, float]:
    """Does what the command line says; returns the figures by their names in `METRICS`.

    Raises ValueError where nothing can be measured.
    """
    device, _ = compute_device(args.device)
    result, _ = read_frames(args.result)
    measured = read_measurements(args.result, result)
    truth = read_truth(args, result) if args.truth else None
    asked, trained = read_poses(args, *result.shape[:3])
    training = read_frames(args.train)[0] if args.train else None
    if args.weights and not args.weights.is_dir():
        raise FileNotFoundError(f"{args.weights}: no such folder, given as --weights")

    by_frame, left_out = frame_figures(result, truth, asked), {}
    figures = {name: float(np.nanmean(values)) for name, values in by_frame.items()}
    if args.full:
        found, left_out = network_figures(result, truth, training, args.weights, device)
        figures |= found
    if asked and trained:
        figures["video_sim"] = metric.video_sim(asked, trained)
    if asked and (args.full or (model_path(args.model) / "openpose").is_dir()):
        try:
            openpose = load_openpose(args.model, device)
            figures["pck"], figures["pose_error"] = metric.find_and_compare(openpose, result, asked)
        except OSError as error:
            left_out["pck"] = str(error)
    # A distance without any pair, and the infinite one of poses that share no keypoint, are none.
    figures = {name: figures[name] for name in METRICS if np.isfinite(figures.get(name, np.nan))}
    missing = {name: f"needs {needs}" for name, (*_, needs) in METRICS.items() if name not in figures}
    left_out = missing | left_out
    for name, (title, better, form, _) in METRICS.items():
        figure = f"{figures[name]:10{form}}   {better} is better" if name in figures else ""
        print(f"{title:>12} {figure or '  left out: ' + left_out[name]}")
    if not figures:
        raise ValueError(f"{args.result}: nothing was measured; give --truth, --poses, --train or --full")

    number = number_of(inputs := inputs_of(args), measured)
    pictures = picture_paths(args.result, number) if truth is not None else []
    if pictures:
        save_image(pictures[0], plot({METRICS[name][0]: by_frame[name] for name in ("psnr", "ssim")}))
        save_image(pictures[1], worst_frames(result, truth, by_frame["psnr"]))
    series = {name: np.where(np.isfinite(each), each, None).tolist() for name, each in by_frame.items()}
    measurement = {"number": number, "inputs": inputs, "metrics": figures, "left_out": left_out}
    measurement |= {"by_frame": series, "pictures": [picture.name for picture in pictures]}
    written = write_measurement(args.result, result, measured, measurement)
    titles = {name: f"{title} ({better} is better)" for name, (title, better, *_) in METRICS.items()}
    page = add_figures(args.result, titles, truth)
    print(f"Written: {', '.join(map(str, [written, *pictures, *filter(None, [page])]))}")
    return figures


if __name__ == "__main__":
    run_command("evaluate.py", main, parse_arguments(), out_of_memory="compare shorter videos")
