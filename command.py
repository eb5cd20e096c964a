"""What the command lines need before torch is loaded, which takes seconds: arguments, memory, errors for people.

Nothing in this file imports torch, so that `--help` and a mistyped option answer at once.
"""

import argparse
import ctypes
import os
from collections.abc import Callable
from pathlib import Path

METHOD_NAMES = ("paper", "body", "held")  # of `beyond.pseudo.METHODS`
KINDS = ("json", "drawn", "video")  # what poses come from; see `poses.source`


def run_command(
    script: str,
    main: Callable[[argparse.Namespace], object],
    args: argparse.Namespace,
    stopped: str = "stopped",
    out_of_memory: str = "give smaller or fewer frames",
) -> None:
    """`main(args)`; what goes wrong becomes one line, and exit code 2, or 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(prog=script)
    try:
        main(args)
    except (ArithmeticError, MemoryError, OSError, ValueError) as error:
        parser.exit(2, f"{script}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{script}: {stopped}\n")
    except RuntimeError as error:
        from slicing import is_out_of_memory  # not above: it imports torch

        if not is_out_of_memory(error):
            raise
        parser.exit(2, f"{script}: out of graphics memory: {out_of_memory}\n")


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory for the next buffer instead of giving it back to the system.

    A network's buffers are freed and asked for again hundreds of times a second. On a CPU, mapping
    them anew costs more than the arithmetic: a training step of the demo model takes a quarter of
    the time with this. Those of 32 MB and more are given back all the same, or the gaps between
    them would add up, but are mapped in huge pages, which costs little. To be called before torch
    is imported, or at least before large buffers are made. Does nothing where the C library is another one.
    """
    # torch reads this when it makes its first tensor.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, top_pad, mmap_threshold, arena_max = -1, -2, -3, -8  # malloc.h
    mallopt(mmap_threshold, 32 * 2**20)  # the highest there is
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 256 * 2**20)
    mallopt(arena_max, 1)


# ---- Arguments ----------------------------------------------------------------------------------


def parse_range(text: str) -> range:
    """ "0:36" -> range(0, 36)."""
    try:
        start, stop = map(int, text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a range such as 0:36") from None
    if not 0 <= start < stop:
        raise argparse.ArgumentTypeError(f"{text!r} is an empty range")
    return range(start, stop)


def parse_canvas(text: str) -> tuple[int, int]:
    """ "1920x1080" -> (1080, 1920), height and width."""
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 1920x1080")
    return int(sides[1]), int(sides[0])


def add_pose_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `read_driver` that both command lines have."""
    parser.add_argument("--poses-are", choices=KINDS, help="what --poses is (default: found out)")
    parser.add_argument(
        "--person",
        type=int,
        default=1,
        help="whom to follow in footage, 1 being the most prominent (default)",
    )


def training_arguments(command: list[str] | None = None) -> argparse.Namespace:
    """The arguments of `train.py`."""
    parser = argparse.ArgumentParser(
        prog="train.py", description="Fine-tunes the model on a few frames of one clip."
    )
    parser.add_argument("clip", type=Path, help="video, or folder of images, of one person")
    parser.add_argument(
        "--poses",
        type=Path,
        help="the clip's poses, OpenPose JSON or a drawn skeleton (default: found in its pixels)",
    )
    add_pose_arguments(parser)
    parser.add_argument(
        "--model", default="sd15", help="sd15, demo, or a folder or file of weights (default: sd15)"
    )
    parser.add_argument("--controlnet", type=Path, help="take the ControlNet from this file or folder")
    parser.add_argument("--vae", type=Path, help="take the VAE from this file or folder")
    parser.add_argument(
        "--frames", type=int, default=8, help="training frames, taken uniformly (default: 8)"
    )
    parser.add_argument(
        "--range", type=parse_range, metavar="A:B", help="from these frames of the clip (default: all)"
    )
    parser.add_argument("--prompt", default="a person", help="what the clip shows (default: %(default)r)")
    parser.add_argument("--steps", type=int, help="training steps (default: the paper's, 100 for 8 frames)")
    parser.add_argument(
        "--lr",
        type=float,
        help="learning rate (default: the model's; 0.0001 for public checkpoints, the paper states 0.003)",
    )
    parser.add_argument(
        "--size", type=int, help="short side of the canvas (default: the model's; 512 for SD 1.5)"
    )
    parser.add_argument("--run", type=Path, help="the folder to make (default: runs/ and the clip's name)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise and the timesteps (default: 0)")
    return parser.parse_args(command)


def sampling_arguments(command: list[str] | None = None) -> argparse.Namespace:
    """The arguments of `sample.py`."""
    parser = argparse.ArgumentParser(
        prog="sample.py", description="Makes a video of the person of a run, following any poses."
    )
    parser.add_argument(
        "--poses",
        type=Path,
        required=True,
        help="what to follow: OpenPose JSON, or a video or images of anyone, or of a drawn skeleton",
    )
    add_pose_arguments(parser)
    parser.add_argument(
        "--canvas",
        type=parse_canvas,
        metavar="WxH",
        help="size of the video that poses in pixels were found in, if their JSON does not say",
    )
    parser.add_argument(
        "--smooth", action="store_true", help="take the jitter out of poses found in footage"
    )
    parser.add_argument("--range", type=parse_range, metavar="A:B", help="only these frames of the poses")
    parser.add_argument(
        "--retarget",
        action=argparse.BooleanOptionalAction,
        help="give the poses the proportions of the person of the run, and their place on the ground "
        "(default: unless they are the training clip's own)",
    )
    parser.add_argument("--run", type=Path, help="run folder that train.py made (default: the newest)")
    parser.add_argument(
        "--prompt", help="target prompt, such as 'a person, red hair' (default: the training prompt)"
    )
    parser.add_argument(
        "--guidance", type=float, default=1.0, help="guidance scale; 3 to change attributes (default: 1)"
    )
    parser.add_argument("--ddim-steps", type=int, default=50, help="sampling steps (default: 50)")
    parser.add_argument(
        "--method",
        choices=METHOD_NAMES,
        help="paper: face and hands edited at step 1; body: all parts of the body; held: sampling held to a "
        "pseudo video that moves (default: the model's; paper for public checkpoints)",
    )
    parser.add_argument(
        "--replay",
        action=argparse.BooleanOptionalAction,
        help="beyond the paper: the key frame goes the way back that inversion came (default: the method's)",
    )
    parser.add_argument(
        "--fixed-point",
        type=int,
        metavar="N",
        help="beyond the paper: further iterations of each inversion step (default: the method's)",
    )
    parser.add_argument(
        "--reference", default="auto", help="number of the training frame to start from (default: auto)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of fresh noise, as --start noise has it (default: 0)"
    )
    parser.add_argument(
        "--slice",
        type=int,
        metavar="N",
        help="frames that a layer takes at a time; the result does not depend on it",
    )
    parser.add_argument(
        "--offload",
        choices=("auto", "always", "never"),
        default="auto",
        help="keep what waits for the decoder outside the graphics card (default: auto, if need be)",
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="load no weights but OpenPose's, if poses must be found; print how much there is to compute, "
        "the memory and the time it takes",
    )
    parser.add_argument(
        "--fps",
        type=float,
        help="of the result (default: the driver's, or the training clip's if the driver is JSON)",
    )
    parser.add_argument("--no-audio", action="store_true", help="leave the driver's sound out")
    parser.add_argument("--out", type=Path, help="the video to write (default: in the run's samples/)")
    knobs = parser.add_argument_group("the paper's ablations, one part of the method at a time")
    knobs.add_argument(
        "--no-insert", action="store_true", help="do not put the reference in front as key frame"
    )
    knobs.add_argument(
        "--start",
        choices=("inversion", "noise"),
        default="inversion",
        help="where sampling starts from (default: inversion); noise is not edited, unless by --edit-step",
    )
    knobs.add_argument("--no-edit", action="store_true", help="leave the latents unedited")
    knobs.add_argument(
        "--edit-step",
        type=int,
        metavar="N",
        help="edit before this step (default: the method's; 1 with a --prompt of its own, whose new looks "
        "later steps would undo)",
    )
    return parser.parse_args(command)
