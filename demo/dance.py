"""The whole road on a puppet, where the truth is known: `python demo/dance.py`, a few minutes on a laptop.

Renders a clip of a puppet that the demo model has never seen, trains on 8 of its first 36 frames, and
has it dance another dance. Leaves in `runs/demo/` the result, the true video, the poses, a contact sheet
and the figures.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sample  # noqa: E402
import train  # noqa: E402
from demo.puppet import clip  # noqa: E402
from evaluate import psnr, ssim  # noqa: E402
from pose import draw_pose, save_poses  # noqa: E402
from video import contact_sheet, save_image, write_video  # noqa: E402

SIZE, FPS = 128, 12.0
TRAINING_FRAMES, TARGET_FRAMES = 36, 48
HELD_OUT = 10_000  # the model was trained on puppets numbered from here; those below are new to it


def write_clip(folder: Path, frames: np.ndarray, poses: list) -> None:
    """A clip as PNG frames, which lose nothing, and its poses beside them."""
    folder.mkdir(parents=True)
    for i, frame in enumerate(frames):
        save_image(folder / f"{i:04d}.png", frame)
    save_poses(folder.with_suffix(".poses.json"), poses, SIZE, SIZE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--identity", type=int, default=0, help=f"a puppet, 0 to {HELD_OUT - 1} (default: 0)"
    )
    parser.add_argument(
        "--run", type=Path, default=Path("runs/demo"), help="made anew (default: runs/demo)"
    )
    args, sample_options = parser.parse_known_args()
    if not 0 <= args.identity < HELD_OUT:
        parser.error(
            f"--identity {args.identity}: the puppets that the model has not seen are 0 to {HELD_OUT - 1}"
        )
    shutil.rmtree(args.run, ignore_errors=True)

    frames, poses, _ = clip(args.identity, 2 * args.identity, TRAINING_FRAMES, SIZE)
    truth, target_poses, person = clip(args.identity, 2 * args.identity + 1, TARGET_FRAMES, SIZE)
    write_clip(args.run / "clip", frames, poses)
    write_video(args.run / "truth.mp4", truth, FPS)
    save_poses(args.run / "poses.json", target_poses, SIZE, SIZE)

    train_command = [str(args.run / "clip"), "--poses", str(args.run / "clip.poses.json")]
    train_command += ["--model", "demo", "--run", str(args.run)]
    train.main(train.parse_arguments(train_command)[1])
    sample_command = ["--poses", str(args.run / "poses.json"), "--run", str(args.run)]
    sample_command += ["--fps", str(FPS), "--out", str(args.run / "result.mp4"), *sample_options]
    result = sample.main(sample.parse_arguments(sample_command)[1])

    reference = json.loads((args.run / "result.json").read_text())["reference"]
    copied = np.repeat(frames[reference][None], len(truth), axis=0)
    metrics = {
        "identity": args.identity,
        "psnr": psnr(result, truth),
        "ssim": ssim(result, truth),
        "psnr_person": psnr(result, truth, person),
        "psnr_copy_reference": psnr(copied, truth),
        "ssim_copy_reference": ssim(copied, truth),
        "psnr_person_copy_reference": psnr(copied, truth, person),
    }
    (args.run / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    drawn = [draw_pose(pose, SIZE, SIZE) for pose in target_poses]
    rows = {"pose": drawn, "truth": truth, "result": result}
    save_image(args.run / "contact_sheet.png", contact_sheet(rows))

    print(f"\n{'':24}{'result':>8}  {'copying the reference frame':>8}")
    for name in ("psnr", "psnr_person", "ssim"):
        print(f"{name:24}{metrics[name]:8.3f}  {metrics[name + '_copy_reference']:8.3f}")
    print(
        f"\nLook at {args.run}/contact_sheet.png and {args.run}/result.mp4 (the truth: truth.mp4)"
    )


if __name__ == "__main__":
    main()
