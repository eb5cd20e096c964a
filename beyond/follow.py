"""The poses that are followed: the person's own as they are, anybody else's in the person's proportions.

Poses say whose they are: JSON that this program writes has `proportions_of` in each frame, a hash of the training
frames. Of files that do not say, the poses themselves tell.
"""

import io
from argparse import Namespace
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np

from beyond.hands import bring_hands
from beyond.retarget import proportions, retarget
from poses.pose import Pose, is_seen, name_frames
from poses.source import Driver, read_driver
from safe.files import read_json
from safe.settings import inputs_of, mark_of

SAME = 0.005  # canvas heights: how far keypoints of one frame lie apart when they come from one search for poses
# What two clips of one puppet differ by, found with errors of 0.6 of 192 pixels: the root mean square of the
# ratios, as a factor, and how far retargeting would move keypoints on average, in canvas heights.
NOISE, NOISE_OF_PLACE = 1.04, 0.01


def follow(args: Namespace, run, driver: Driver) -> tuple[list[Pose], dict[str, float] | None, list[str]]:
    """The poses, on a `Run`'s canvas, as they will be followed; the ratios if they were retargeted; remarks.

    Prints the remarks, which say what was done. Raises ValueError where targets cannot be retargeted.
    """
    remarks: list[str] = []

    def remark(text: str) -> None:
        print(f"{args.poses}: {text}")
        remarks.append(text)

    height, width = run.frames.shape[1:3]
    targets, brought = bring_hands(driver.on_canvas(height, width), width / height)
    if brought:
        frames = name_frames([driver.within.start + frame for frame in brought])
        remark(f"hands that were not at their wrists are brought there: in frames {frames}")
    if args.retarget is False or (args.retarget is None and is_own(args, run, driver)):
        return targets, None, remarks
    try:
        ratios = proportions(targets, run.poses, width / height)
        moved = retarget(targets, run.poses, width / height)
    except ValueError as error:
        raise ValueError(f"{args.poses}: {error}; --no-retarget follows it literally") from None
    if args.retarget is None and is_noise(ratios, targets, moved, width / height):
        own = "these are the person's proportions, as far as can be measured"
        remark(f"{own}: followed literally; --retarget overrules that")
        return targets, None, remarks
    told = f"retargeted to the person's proportions: {in_words(ratios)}"
    remark(f"{told}; --no-retarget follows the poses literally")
    return moved, ratios, remarks


def in_words(ratios: dict[str, float]) -> str:
    """By how much: the ratios that are furthest from 1, such as "thigh x1.21, head x0.90, overall x1.02"."""
    furthest = sorted(ratios.keys() - {"scale"}, key=lambda name: (-abs(np.log(ratios[name])), name))
    told = [f"{name} x{ratios[name]:.2f}" for name in furthest[:2]]
    return ", ".join([*told, f"overall x{ratios['scale']:.2f}"])


def is_own(args: Namespace, run, driver: Driver) -> bool:
    """Whether poses are of the run's clip or of a result of it, or were edited from one of these."""
    path = args.poses
    if path.resolve() in inputs_of(run.settings) or says_whose(path) == {mark_of(run.frames)}:
        return True
    if driver.fps is None and len(driver.poses) < driver.total:  # JSON: what is not followed can tell, too
        with redirect_stdout(io.StringIO()):  # all remarks were made already
            driver = read_driver(path, args.poses_are, person=args.person, canvas=args.canvas)
    # In the training frames they have the training poses, but for some that were edited.
    height, width = run.frames.shape[1:3]
    poses = driver.on_canvas(height, width)
    numbered = zip(run.settings["frames"], run.poses)
    there = [(poses[n - driver.within.start], pose) for n, pose in numbered if n in driver.within]
    apart = [distances(*pair, width / height) for pair in there]
    same = [len(each) > 2 and np.median(each) < SAME for each in apart]
    return len(same) > 1 and 2 * sum(same) >= len(same)


def says_whose(path: Path) -> set[str]:
    """What the frames of a JSON file that was read already say of their proportions, "None" for nothing."""
    if path.suffix.lower() != ".json" or not path.is_file():
        return set()
    from poses.openpose_json import unfold  # as in `read_driver`

    return {str(frame.get("proportions_of")) for frame in unfold(read_json(path))}


def distances(a: Pose, b: Pose, aspect: float) -> np.ndarray:
    """How far the body's keypoints that both poses show lie apart (K,), in canvas heights."""
    both = is_seen(a.body) & is_seen(b.body)
    return np.linalg.norm((a.body - b.body)[both, :2] * (aspect, 1), axis=1)


def is_noise(ratios: dict[str, float], poses: Sequence[Pose], moved: Sequence[Pose], aspect: float) -> bool:
    """Whether retargeting found only what two clips of one person differ by."""
    logs = np.log([ratio for name, ratio in ratios.items() if name != "scale"])
    apart = np.concatenate([distances(*pair, aspect) for pair in zip(poses, moved)])
    return bool(np.sqrt((logs**2).mean()) <= np.log(NOISE) and apart.mean() <= NOISE_OF_PLACE)
