"""The whole road on puppets, where the truth is known: `python demo/dance.py`, some ten minutes on a laptop.

Renders a clip of a puppet that the demo model has never seen, finds its poses in the pixels, trains on 8
of its 36 frames, and has it dance another dance. Leaves in `runs/demo/` the result, the true video, the
poses, a contact sheet and the figures. Several puppets get a folder each, and a sheet and figures of all.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from command import sampling_arguments, training_arguments
from safe.process import keep_freed_memory, run_command

if __name__ == "__main__":  # before torch is imported
    keep_freed_memory()

import sample
import train
from demo.puppet import clip
from metrics.figures import psnr, ssim
from pictures.sheets import contact_sheet
from poses.pose import draw_pose, save_poses
from poses.source import read_driver
from video import save_image, write_video

HEIGHT, WIDTH, FPS = 192, 256, 12
TRAINING_FRAMES, TARGET_FRAMES = 36, 48
HELD_OUT = 10_000  # the model was trained on puppets numbered from here; those below are new to it


def film(identity: int, motion: int, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """A dancing puppet from the knees up, so that its face and its fingers are large enough to see.

    Frames uint8 (F, HEIGHT, WIDTH, 3) and masks bool (F, HEIGHT, WIDTH): the upper part of the square picture.
    """
    images, _, person = clip(identity, motion, frames, WIDTH)
    return images[:, :HEIGHT], person[:, :HEIGHT]


def dance(identity: int, run: Path, sample_options: list[str]) -> tuple[dict, dict]:
    """Trains on a puppet's clip and samples another dance, in the folder `run`, which is made anew.

    Returns the figures and the sheet's rows. The options go on to `sample.py`.
    """
    # It is the same puppet, not to be retargeted: proportions that differ would be mistakes of measuring.
    command = ["--poses", run / "poses.json", "--run", run, "--fps", FPS, "--no-retarget"]
    # As many steps as the demo model learned to take. More are slower; docs/RESULTS.md compares.
    command += ["--ddim-steps", 10, "--out", run / "result.mp4", *sample_options]
    sample_arguments = sampling_arguments(list(map(str, command)))

    truth, person = film(identity, 2 * identity + 1, TARGET_FRAMES)
    frames, _ = film(identity, 2 * identity, TRAINING_FRAMES)
    make_anew(run, frames, truth)
    train.main(training_arguments([str(run / "clip"), "--model", "demo", "--run", str(run)]))
    # Poses are all that the true video is looked at for.
    target_poses = read_driver(run / "truth.mp4", model="demo", smooth=True).poses
    save_poses(run / "poses.json", target_poses, WIDTH, HEIGHT)
    result = sample.main(sample_arguments)

    reference = frames[json.loads((run / "result.json").read_text())["reference"]]
    copied = np.repeat(reference[None], len(truth), axis=0)
    metrics = {"identity": identity}
    for suffix, video in (("", result), ("_copy_reference", copied)):
        metrics["psnr" + suffix] = psnr(video, truth)
        metrics["psnr_person" + suffix] = psnr(video, truth, person)
        metrics["ssim" + suffix] = ssim(video, truth)
    drawn = [draw_pose(pose, HEIGHT, WIDTH) for pose in target_poses]
    return metrics, {"pose": drawn, "truth": truth, "result": result}


def make_anew(run: Path, frames: np.ndarray, truth: np.ndarray) -> None:
    """A folder of the clip's frames and the true video, in place of an earlier one.

    A note in it says that it may be replaced. Raises ValueError for a folder without such a note.
    """
    note = run / "made_by_the_demo.txt"
    if run.exists() and any(run.iterdir()) and not note.exists():
        raise ValueError(f"{run}: holds something that is not a dance; choose another --run")
    shutil.rmtree(run, ignore_errors=True)
    (run / "clip").mkdir(parents=True)
    note.write_text("The next run of the demo replaces this folder.\n")
    for i, frame in enumerate(frames):  # as PNG, which loses nothing
        save_image(run / "clip" / f"{i:04d}.png", frame)
    write_video(run / "truth.mp4", truth, FPS)


def report(run: Path, every: dict, rows: dict, figures: Sequence[str], beside: tuple[str, str]) -> None:
    """Writes the contact sheet of `rows` and the metrics of all dances, and prints these.

    `every` has a dance's metrics under its name. The metric beside each of `figures` has a column of its own,
    which `beside` gives a title; it is called like the figure, with a suffix.
    """
    title, suffix = beside
    names = [name for name, value in next(iter(every.values())).items() if isinstance(value, float)]
    mean = {name: float(np.mean([metrics[name] for metrics in every.values()])) for name in names}
    each = list(every.values())
    metrics = {"mean": mean, "each": each} if len(each) > 1 else each[0]
    (run / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    save_image(run / "contact_sheet.png", contact_sheet(rows))
    print(f"\n{'':>8}" + "".join(f"{name:>14}{title:>8}" for name in figures))
    for label, metrics in (every | {"mean": mean} if len(each) > 1 else every).items():
        pairs = ((metrics[name], metrics[name + suffix]) for name in figures)
        print(f"{label:>8}" + "".join(f"{ours:14.3f}{other:8.3f}" for ours, other in pairs))


def main(args: argparse.Namespace) -> None:
    if not all(0 <= identity < HELD_OUT for identity in args.identity):
        raise ValueError(f"--identity: the puppets that the model has not seen are 0 to {HELD_OUT - 1}")
    every, rows, several = {}, {}, len(args.identity) > 1
    for identity in args.identity:
        run = args.run / str(identity) if several else args.run
        every[f"puppet {identity}"], clips = dance(identity, run, args.sample_options)
        rows |= {f"{name} {identity}" if several else name: clips[name] for name in clips}
    report(args.run, every, rows, ("psnr", "psnr_person", "ssim"), ("copied", "_copy_reference"))
    print("(copied: the reference frame in place of the result)")
    print(f"Look at {args.run}/contact_sheet.png; result.mp4 and truth.mp4 are beside it.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--identity", type=int, nargs="+", default=[0], help="puppets (default: 0)")
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="default: %(default)s")
    args, sample_options = parser.parse_known_args()
    run_command("dance.py", main, argparse.Namespace(**vars(args), sample_options=sample_options))
