"""Retargeting against following literally, where the truth is known: `python demo/drive.py`.

Trains on puppets that the demo model has never seen, and has each do what a puppet of another build does.
The truth is the subject itself in the driver's states. Leaves in `runs/drive/` a folder for each pair, a
contact sheet and the figures of all of them.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from command import keep_freed_memory, sampling_arguments, training_arguments

if __name__ == "__main__":  # before torch is imported
    keep_freed_memory()

import sample
import train
from beyond.retarget import retarget
from demo.dance import FPS, TARGET_FRAMES, TRAINING_FRAMES, make_anew
from demo.puppet import Puppet, clip, motion, random_puppet, render
from metrics.figures import psnr
from poses.pose import Pose, draw_pose, is_seen, save_poses
from run import load_run
from video import contact_sheet, save_image, write_video

SIZE = 192  # pixels: whole bodies in square frames, since legs have proportions too
CANDIDATES = 100  # puppets among which a subject's driver is looked for
FIGURES = {"psnr": "PSNR", "psnr_person": "person's", "pixels_off": "pose, pixels off"}


def unlike(subject: int) -> int:
    """The puppet whose build differs most from the subject's, which is nobody the model knows."""

    def build(puppet: Puppet) -> np.ndarray:
        arm, leg = (puppet.upper_arm, puppet.forearm, puppet.hand), (puppet.thigh, puppet.shin)
        return np.log([*puppet.head, puppet.torso, puppet.shoulders, puppet.hips, *arm, *leg])

    own = build(random_puppet(subject))
    return max(range(CANDIDATES), key=lambda other: np.linalg.norm(build(random_puppet(other)) - own))


def drive(subject: int, driver: int, run: Path, sample_options: list[str]) -> tuple[dict, dict]:
    """Trains on the subject and samples the driver's dance both ways; the figures and the sheet's rows.

    Writes everything to `run`; an earlier pair there is replaced. Raises ValueError for a folder that
    holds anything else.
    """
    make_anew(run)
    (run / "clip").mkdir()
    frames, poses, _ = clip(subject, 2 * subject, TRAINING_FRAMES, SIZE)
    _, driver_poses, _ = clip(driver, 2 * driver + 1, TARGET_FRAMES, SIZE)
    states = motion(2 * driver + 1, TARGET_FRAMES)
    truth, true_poses, person = zip(*(render(random_puppet(subject), s, SIZE) for s in states))
    truth, person = np.stack(truth), np.stack(person)
    save_poses(run / "poses.source.poses.json", driver_poses, SIZE, SIZE)
    save_poses(run / "clip.poses.json", poses, SIZE, SIZE)
    for i, frame in enumerate(frames):  # as PNG, which loses nothing
        save_image(run / "clip" / f"{i:04d}.png", frame)
    write_video(run / "truth.mp4", truth, FPS)

    command = [run / "clip", "--poses", run / "clip.poses.json", "--model", "demo", "--run", run]
    train.main(training_arguments(list(map(str, command))))
    retargeted_poses = retarget(driver_poses, load_run(run).poses, 1.0)

    metrics: dict = {"subject": subject, "driver": driver}
    results = {}
    for way, followed in (("literal", driver_poses), ("retargeted", retargeted_poses)):
        option = "--retarget" if way == "retargeted" else "--no-retarget"
        command = ["--poses", run / "poses.source.poses.json", "--run", run, "--fps", FPS, option]
        command += ["--ddim-steps", 20, "--out", run / f"{way}.mp4", *sample_options]
        results[way] = sample.main(sampling_arguments(list(map(str, command))))
        metrics[way] = {
            "psnr": psnr(results[way], truth),
            "psnr_person": psnr(results[way], truth, person),
            "pixels_off": SIZE * mean_distance(followed, true_poses),
        }

    def drawn(poses: list[Pose]) -> list[np.ndarray]:
        return [draw_pose(pose, SIZE, SIZE) for pose in poses]

    return metrics, {
        "literal pose": drawn(driver_poses),
        "retargeted pose": drawn(retargeted_poses),
        "truth": truth,
        "literal": results["literal"],
        "retargeted": results["retargeted"],
    }


def mean_distance(poses: list[Pose], truth: list[Pose]) -> float:
    """How far the body keypoints are from the true ones, in canvas widths."""
    distances = []
    for pose, true in zip(poses, truth):
        both = is_seen(pose.body) & is_seen(true.body)
        distances += np.linalg.norm(pose.body[both, :2] - true.body[both, :2], axis=1).tolist()
    return float(np.mean(distances))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=4, help="subjects 0, 1, ... (default: 4)")
    parser.add_argument("--run", type=Path, default=Path("runs/drive"), help="default: %(default)s")
    args, sample_options = parser.parse_known_args()
    if not 1 <= args.pairs <= CANDIDATES:
        parser.error(f"--pairs {args.pairs}: give 1 to {CANDIDATES}")

    every, rows = [], {}
    for subject in range(args.pairs):
        driver = unlike(subject)
        metrics, clips = drive(subject, driver, args.run / f"{subject}-{driver}", sample_options)
        every.append(metrics)
        rows |= {f"{name} {subject}": clip for name, clip in clips.items()}
    mean = {
        way: {key: float(np.mean([pair[way][key] for pair in every])) for key in FIGURES}
        for way in ("literal", "retargeted")
    }
    (args.run / "metrics.json").write_text(json.dumps({"mean": mean, "each": every}, indent=1) + "\n")
    save_image(args.run / "contact_sheet.png", contact_sheet(rows))

    print("\nliteral, retargeted" + "".join(f"{title:>20}" for title in FIGURES.values()))
    for pair in [*every, mean]:
        name = "mean" if pair is mean else f"{pair['subject']} as {pair['driver']}"
        values = (f"{pair['literal'][key]:13.2f}{pair['retargeted'][key]:7.2f}" for key in FIGURES)
        print(f"{name:>19}" + "".join(values))
    print(f"Look at {args.run}/contact_sheet.png; the videos are in the folders of the pairs.")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        print(f"drive.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("drive.py: stopped", file=sys.stderr)
        sys.exit(130)
