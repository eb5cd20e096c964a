"""How good a result is, by the paper's metrics: `python evaluate.py result.mp4 --truth truth.mp4`.

Prints a table and writes beside the result its figures (`.metrics.json`), the quality of each frame
(`.metrics.png`) and the worst frames under the true ones (`.worst.png`). What a metric lacks is said
in its place: a number that is there was computed.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from checkpoint import model_path
from command import parse_canvas, parse_range
from device import compute_device
from metrics.clip_images import ImageEncoder
from metrics.figures import (
    CLIP_FRAMES,
    CLIP_STEP,
    clip_embeddings,
    clip_i,
    clip_t,
    find_and_compare,
    frame_l1,
    frame_lpips,
    frame_psnr,
    frame_ssim,
    frechet_distance,
    i3d_features,
    inception_features,
)
from metrics.networks import I3D, LPIPS, Inception, load_network
from metrics.pictures import plot, worst_frames
from openpose import load_openpose
from poses.pose import Pose, load_poses, place_pose, read_canvas, video_sim
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
    path: Path, within: range | None, height: int, width: int, canvas: tuple[int, int] | None = None
) -> list[Pose]:
    """Poses on a canvas of the result's size, which they cover as frames do.

    canvas: the (height, width) of the video that they were found in, for a file that does not say.
    """
    poses = load_poses(path, *(canvas or (None, None))[::-1])
    if within and within.stop > len(poses):
        raise ValueError(f"{path}: {len(poses)} poses, so none for --range {within.start}:{within.stop}")
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
        for name, kind, features in (("fid", Inception, inception_features), ("fvd", I3D, i3d_features)):
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


def parse_arguments(command: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
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
    parser.add_argument("--fit", action="store_true", help="scale and crop the truth to the result's size")
    parser.add_argument(
        "--full",
        action="store_true",
        help="also the metrics that take public networks, downloaded at first use (2.1 GB)",
    )
    parser.add_argument("--weights", type=Path, help="folder to look for the public networks' files in")
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
