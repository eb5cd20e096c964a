"""Retargeting against following literally, where the truth is known: `python demo/drive.py`.

Trains on puppets that the demo model has never seen, and has each do what a puppet of another build does.
The truth is the subject itself in the driver's states. Leaves in `runs/drive/` a folder for each pair, a
contact sheet and the figures of all of them.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from command import sampling_arguments, training_arguments
from safe.process import keep_freed_memory, run_command

if __name__ == "__main__":  # before torch is imported
    keep_freed_memory()

import sample
import train
from beyond.retarget import retarget
from demo.dance import FPS, TARGET_FRAMES, TRAINING_FRAMES, make_anew, report
from demo.motion import motion
from demo.puppet import Puppet, clip, pose_of, random_puppet, render
from metrics.figures import psnr
from poses.pose import draw_pose, is_seen, save_poses
from run import load_run

SIZE = 192  # pixels: whole bodies in square frames, since legs have proportions too
CANDIDATES = 100  # puppets among which a subject's driver is looked for


def unlike(subject: int) -> int:
    """The puppet whose build differs most from the subject's, which is nobody the model knows."""

    def build(puppet: Puppet) -> np.ndarray:
        arm, leg = (puppet.upper_arm, puppet.forearm, puppet.hand), (puppet.thigh, puppet.shin)
        return np.log([*puppet.head, puppet.torso, puppet.shoulders, puppet.hips, *arm, *leg])

    own = build(random_puppet(subject))
    return max(range(CANDIDATES), key=lambda other: np.linalg.norm(build(random_puppet(other)) - own))


def drive(subject: int, driver: int, run: Path, sample_options: list[str]) -> tuple[dict, dict]:
    """Trains on the subject and samples the driver's dance both ways, in the folder `run`, which is made anew.

    Returns the figures and the sheet's rows. The options go on to `sample.py`.
    """
    frames, poses, _ = clip(subject, 2 * subject, TRAINING_FRAMES, SIZE)
    states = motion(2 * driver + 1, TARGET_FRAMES)
    truth, true_poses, person = zip(*(render(random_puppet(subject), s, SIZE) for s in states))
    truth, person = np.stack(truth), np.stack(person)
    make_anew(run, frames, truth)
    driver_poses = [pose_of(random_puppet(driver), state) for state in states]
    save_poses(run / "poses.source.poses.json", driver_poses, SIZE, SIZE)
    save_poses(run / "clip.poses.json", poses, SIZE, SIZE)

    command = [run / "clip", "--poses", run / "clip.poses.json", "--model", "demo", "--run", run]
    train.main(training_arguments(list(map(str, command))))
    retargeted_poses = retarget(driver_poses, load_run(run).poses, 1.0)

    metrics, rows = {"subject": subject, "driver": driver}, {"truth": truth}
    for way, followed in (("retargeted", retargeted_poses), ("literal", driver_poses)):
        suffix, option = ("_literal", "--no-retarget") if way == "literal" else ("", "--retarget")
        command = ["--poses", run / "poses.source.poses.json", "--run", run, "--fps", FPS, option]
        command += ["--ddim-steps", 20, "--out", run / f"{way}.mp4", *sample_options]
        result = sample.main(sampling_arguments(list(map(str, command))))
        seen = (is_seen(a.body) & is_seen(b.body) for a, b in zip(followed, true_poses))
        off = np.concatenate(
            [(a.body - b.body)[both, :2] for a, b, both in zip(followed, true_poses, seen)]
        )
        metrics["psnr" + suffix] = psnr(result, truth)
        metrics["psnr_person" + suffix] = psnr(result, truth, person)
        metrics["pixels_off" + suffix] = SIZE * float(np.linalg.norm(off, axis=1).mean(dtype=float))
        rows |= {f"{way} pose": [draw_pose(pose, SIZE, SIZE) for pose in followed], way: result}
    return metrics, rows


def main(args: argparse.Namespace) -> None:
    if not 1 <= args.pairs <= CANDIDATES:
        raise ValueError(f"--pairs {args.pairs}: give 1 to {CANDIDATES}")
    every, rows = {}, {}
    for subject in range(args.pairs):
        driver = unlike(subject)
        run = args.run / f"{subject}-{driver}"
        every[f"{subject} as {driver}"], clips = drive(subject, driver, run, args.sample_options)
        rows |= {f"{name} {subject}": clip for name, clip in clips.items()}
    report(args.run, every, rows, ("psnr", "psnr_person", "pixels_off"), ("literal", "_literal"))
    print("(pixels_off: how far the joints that were followed are from the true ones)")
    print(f"Look at {args.run}/contact_sheet.png; the videos are in the folders of the pairs.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=4, help="subjects 0, 1, ... (default: 4)")
    parser.add_argument("--run", type=Path, default=Path("runs/drive"), help="default: %(default)s")
    args, sample_options = parser.parse_known_args()
    run_command("drive.py", main, argparse.Namespace(**vars(args), sample_options=sample_options))
