"""Retargeting against following literally, where the truth is known: `python demo/drive.py`.

Trains on puppets that the demo model has never seen, and has each do what a puppet of another build does.
The truth is the subject itself in the driver's states. Leaves in `runs/drive/` a folder for each pair, a
contact sheet and the figures of all of them. `--joints 40` trains nothing: it measures the retargeted joints
of 40 pairs alone, in seconds.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from safe.process import before_torch, run_command

if __name__ == "__main__":  # before torch is imported
    before_torch()

import sample
from beyond.retarget import proportions, retarget
from demo.dance import LENGTHS, compare, make_anew, report, sampling, train_on
from demo.motion import motion
from demo.puppet import pose_of, random_puppet
from demo.scene import CANDIDATES, Trial, set_scene, unlike
from poses.pose import Pose, draw_pose, is_seen, save_poses
from poses.source import uniform_frames
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
        metrics |= compare(result, scene, suffix)
        metrics["pixels_off" + suffix] = joints_off(poses, scene.true_poses)
        rows |= {f"{way} pose": [draw_pose(pose, SIZE, SIZE) for pose in poses], way: result}
    return metrics, rows


# ---- Joints alone -------------------------------------------------------------------------------

SUBJECTS, DRIVERS = range(1000, 2000), range(2000, 2100)  # no threshold of retargeting was chosen on these
BONES = ("shoulders", "upper_arm", "forearm", "torso", "thigh", "shin")  # fields of a puppet
AT_CAMERA = {"forearms": [(3, 4), (6, 7)], "arms": [(2, 3), (3, 4), (5, 6), (6, 7)]}


def joints_off(poses: Sequence[Pose], truth: Sequence[Pose]) -> float:
    """The mean distance, in pixels of SIZE, of the body's joints that both have."""
    followed, true = (np.stack([pose.body for pose in each]) for each in (poses, truth))
    both = is_seen(followed.reshape(-1, 3)) & is_seen(true.reshape(-1, 3))
    apart = np.linalg.norm((followed - true).reshape(-1, 3)[both, :2], axis=1)
    return SIZE * float(apart.mean(dtype=float))


def trembling(poses: Sequence[Pose], pixels: float, seed: int) -> list[Pose]:
    """The poses with normal noise of so many pixels of SIZE in x and in y of each point."""
    random = np.random.default_rng(seed)

    def moved(part: np.ndarray) -> np.ndarray:
        return (part + random.normal(0, pixels / SIZE, part.shape) * (1, 1, 0)).astype(np.float32)

    return [Pose(*map(moved, vars(pose).values())) for pose in poses]


def shortened(poses: Sequence[Pose], bones: Sequence[tuple[int, int]], share: float) -> list[Pose]:
    """The poses with bones at 0.3 of their length in this share of frames, as if they pointed at the camera."""
    result = []
    for frame, pose in enumerate(poses):
        body = pose.body.copy()
        for start, end in bones if frame < share * len(poses) else ():
            moved = body[start, :2] - pose.body[start, :2]
            body[end, :2] = pose.body[end, :2] + moved - 0.7 * (pose.body[end] - pose.body[start])[:2]
        result.append(replace(pose, body=body))
    return result


def measure_joints(subject: int, driver: int) -> dict[str, float]:
    """How far retargeted joints are from the subject's own in the driver's states, in pixels; and which factor the
    worst ratio of bones is off, where some bones look short in 80 % or all of the driver's frames."""
    who, other = random_puppet(subject), random_puppet(driver)
    clip = [pose_of(who, state) for state in motion(2 * subject, LENGTHS["training_frames"])]
    trained = [clip[frame] for frame in uniform_frames(range(len(clip)), 8)]
    figures = {}
    for dance, pixels in (("facing", 0), ("turning", 0), ("facing", 0.6)):
        states = motion(2 * driver + 1, LENGTHS["target_frames"], dance=dance)
        followed, truth = ([pose_of(puppet, state) for state in states] for puppet in (other, who))
        tremble = (trembling(poses, pixels, driver) for poses in (followed, trained))
        figures[dance + ", trembling" * (pixels > 0)] = joints_off(retarget(*tremble, 1.0), truth)
    for share, (name, bones) in product((0.8, 1.0), AT_CAMERA.items()):
        ratios = proportions(shortened(followed, bones, share), trained, 1.0)
        true = [getattr(who, bone) / getattr(other, bone) for bone in BONES]
        off = np.log([ratios[bone.rstrip("s").replace("_", " ")] for bone in BONES]) - np.log(true)
        figures[f"{name} short in {share:.0%}"] = float(np.exp(np.abs(off).max()))
    return figures


def report_joints(pairs: int) -> None:
    each = [measure_joints(subject, unlike(subject, DRIVERS)) for subject in SUBJECTS[:pairs]]
    print(f"{'':>24}    mean   worst, of {len(each)} pairs")
    for name in each[0]:
        values = [figures[name] for figures in each]
        print(f"{name:>24}{np.mean(values):8.2f}{max(values):8.2f}")
    print(f"(pixels of {SIZE}; short: the factor by which the worst ratio of bones is off)")


def main(args: argparse.Namespace) -> None:
    if not 1 <= args.pairs <= CANDIDATES:
        raise ValueError(f"--pairs {args.pairs}: give 1 to {CANDIDATES}")
    if args.joints:
        report_joints(args.joints)
        return
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
    told = "only measure retargeted joints, of so many pairs that no threshold was chosen on"
    parser.add_argument("--joints", type=int, metavar="PAIRS", help=told)
    args, args.sample_options = parser.parse_known_args()
    run_command("drive.py", main, args)
