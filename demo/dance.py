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
from safe.process import before_torch, run_command

if __name__ == "__main__":  # before torch is imported
    before_torch()

import sample
import train
from demo.scene import Scene, Trial, from_the_knees_up, set_scene
from metrics.figures import psnr, ssim
from pictures.sheets import contact_sheet
from poses.pose import draw_pose, save_poses
from poses.source import read_driver
from video import save_image, write_video

WIDTH, FPS = 256, 12
LENGTHS = {"training_frames": 36, "target_frames": 48}  # `train.py` takes 8 of the 36
METRICS = ("psnr", "psnr_person", "ssim")
HELD_OUT = 10_000  # the model was trained on puppets numbered from here; those below are new to it


def train_on(run: Path, *options: object) -> None:
    """Fine-tunes the demo model on the clip in a dance's folder; the options go on to `train.py`."""
    command = [run / "clip", "--model", "demo", "--run", run, *options]
    train.main(training_arguments(list(map(str, command))))


def sampling(run: Path, poses: str, name: str, *options: object) -> argparse.Namespace:
    """The arguments of `sample.py` that make the video `name` of a dance's folder."""
    command = ["--run", run, "--poses", run / poses, "--out", run / f"{name}.mp4", "--fps", FPS, *options]
    return sampling_arguments(list(map(str, command)))


def compare(video: np.ndarray, scene: Scene, suffix: str = "") -> dict[str, float]:
    """The METRICS of frames uint8 (F, H, W, 3) beside the true ones, their names with the suffix."""
    values = psnr(video, scene.truth), psnr(video, scene.truth, scene.person), ssim(video, scene.truth)
    return {name + suffix: value for name, value in zip(METRICS, values)}


def dance(identity: int, run: Path, sample_options: list[str]) -> tuple[dict, dict]:
    """Trains on a puppet's clip and samples another dance, in the folder `run`, which is made anew. Returns the
    figures and the sheet's rows. The options go on to `sample.py`."""
    # It is the same puppet, not to be retargeted: proportions that differ would be mistakes of measuring.
    # As many steps as the demo model learned to take. More are slower; docs/RESULTS.md compares.
    options = "--no-retarget", "--ddim-steps", 10, *sample_options
    arguments = sampling(run, "poses.json", "result", *options)
    # From the knees up, so that face and fingers are large enough to see.
    scene = from_the_knees_up(set_scene(Trial(identity, WIDTH, **LENGTHS)))
    make_anew(run, scene.frames, scene.truth)
    train_on(run)
    # Poses are all that the true video is looked at for.
    target_poses = read_driver(run / "truth.mp4", model="demo", smooth=True).poses
    height, width = scene.truth.shape[1:3]
    save_poses(run / "poses.json", target_poses, width, height)
    result = sample.main(arguments)

    reference = json.loads((run / "result.json").read_text())["reference"]
    copied = np.repeat(scene.frames[[reference]], len(result), axis=0)
    metrics = {"identity": identity} | compare(result, scene) | compare(copied, scene, "_copy_reference")
    drawn = [draw_pose(pose, height, width) for pose in target_poses]
    return metrics, {"pose": drawn, "truth": scene.truth, "result": result}


def make_anew(run: Path, frames: np.ndarray, truth: np.ndarray) -> None:
    """A folder of the clip's frames and the true video, in place of an earlier one. A note in it says that it may
    be replaced. Raises ValueError for a folder without such a note."""
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
    """Writes the contact sheet of `rows` and the metrics of all dances, and prints these. `every` has a dance's
    metrics under its name. The metric beside each of `figures` has a column of its own, which `beside` gives a
    title; it is called like the figure, with a suffix."""
    title, suffix = beside
    each = list(every.values())
    names = [name for name, value in each[0].items() if isinstance(value, float)]
    mean = {name: float(np.mean([metrics[name] for metrics in each])) for name in names}
    metrics = {"mean": mean, "each": each} if len(each) > 1 else each[0]
    (run / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    save_image(run / "contact_sheet.png", contact_sheet(rows))
    print(f"\n{'':>8}" + "".join(f"{name:>14}{title:>8}" for name in figures))
    for label, metrics in (every | {"mean": mean} if len(each) > 1 else every).items():
        pairs = [f"{metrics[name]:14.3f}{metrics[name + suffix]:8.3f}" for name in figures]
        print(f"{label:>8}" + "".join(pairs))


def main(args: argparse.Namespace) -> None:
    if not all(0 <= identity < HELD_OUT for identity in args.identity):
        raise ValueError(f"--identity: the puppets that the model has not seen are 0 to {HELD_OUT - 1}")
    every, rows, several = {}, {}, len(args.identity) > 1
    for identity in args.identity:
        run = args.run / str(identity) if several else args.run
        every[f"puppet {identity}"], clips = dance(identity, run, args.sample_options)
        rows |= {f"{name} {identity}" if several else name: clip for name, clip in clips.items()}
    report(args.run, every, rows, METRICS, ("copied", "_copy_reference"))
    print("(copied: the reference frame in place of the result)")
    print(f"Look at {args.run}/contact_sheet.png; result.mp4 and truth.mp4 are beside it.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--identity", type=int, nargs="+", default=[0], help="puppets (default: 0)")
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="default: %(default)s")
    args, args.sample_options = parser.parse_known_args()
    run_command("dance.py", main, args)
