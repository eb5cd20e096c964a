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

from safe.process import before_torch, run_command

if __name__ == "__main__":  # before torch is imported
    before_torch()

import sample
from beyond.retarget import retarget
from demo.dance import LENGTHS, compare, make_anew, report, sampling, train_on
from demo.scene import CANDIDATES, Trial, set_scene, unlike
from poses.pose import draw_pose, save_poses
from run import load_run

SIZE = 192  # pixels: whole bodies in square frames, since legs have proportions too


def drive(subject: int, driver: int, run: Path, sample_options: list[str]) -> tuple[dict, dict]:
    """Trains on the subject and samples the driver's dance both ways, in the folder `run`, which is made anew.
    Returns the figures and the sheet's rows. The options go on to `sample.py`."""
    scene = set_scene(Trial(subject, SIZE, **LENGTHS, driver="literal"), number=2 * driver + 1)
    make_anew(run, scene.frames, scene.truth)
    save_poses(run / "poses.source.poses.json", scene.targets, SIZE, SIZE)
    save_poses(run / "clip.poses.json", scene.poses, SIZE, SIZE)
    train_on(run, "--poses", run / "clip.poses.json")

    metrics, rows = {"subject": subject, "driver": driver}, {"truth": scene.truth}
    retargeted_poses = retarget(scene.targets, load_run(run).poses, 1.0)
    for way, poses in (("retargeted", retargeted_poses), ("literal", scene.targets)):
        suffix, option = ("_literal", "--no-retarget") if way == "literal" else ("", "--retarget")
        options = option, "--ddim-steps", 20, *sample_options
        result = sample.main(sampling(run, "poses.source.poses.json", way, *options))
        followed, true = (np.stack([pose.body for pose in each]) for each in (poses, scene.true_poses))
        both = (followed[..., 2] > 0) & (true[..., 2] > 0)
        off = np.linalg.norm((followed - true)[both, :2], axis=1).mean(dtype=float)
        metrics |= compare(result, scene, suffix) | {"pixels_off" + suffix: SIZE * float(off)}
        rows |= {f"{way} pose": [draw_pose(pose, SIZE, SIZE) for pose in poses], way: result}
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
    args, args.sample_options = parser.parse_known_args()
    run_command("drive.py", main, args)
