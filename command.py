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

    Networks free and ask for buffers hundreds of times a second, and on a CPU mapping them anew costs more than
    the arithmetic: a training step of the demo model takes a quarter of the time with this. Buffers of 32 MB and
    more are given back all the same, or the gaps between them would add up, but are mapped in huge pages, which
    costs little. To be called before torch is imported. Does nothing where there is another C library.
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
    whom = "whom to follow in footage, 1 being the most prominent (default)"
    parser.add_argument("--person", type=int, default=1, help=whom)


def training_arguments(command: list[str] | None = None) -> argparse.Namespace:
    """The arguments of `train.py`."""
    about = "Fine-tunes the model on a few frames of one clip."
    parser = argparse.ArgumentParser(prog="train.py", description=about)
    add = parser.add_argument
    add("clip", type=Path, help="video, or folder of images, of one person")
    add(
        "--poses", type=Path, help="the clip's poses, OpenPose JSON or drawn (default: found in its pixels)"
    )
    add_pose_arguments(parser)
    add("--model", default="sd15", help="sd15, demo, or a folder or file of weights (default: sd15)")
    add("--controlnet", type=Path, help="take the ControlNet from this file or folder")
    add("--vae", type=Path, help="take the VAE from this file or folder")
    add("--frames", type=int, default=8, help="training frames, taken uniformly (default: 8)")
    add("--range", type=parse_range, metavar="A:B", help="from these frames of the clip (default: all)")
    add("--prompt", default="a person", help="what the clip shows (default: %(default)r)")
    add("--steps", type=int, help="training steps (default: the paper's, 100 for 8 frames)")
    rates = "the model's; 0.0001 for public checkpoints, the paper states 0.003"
    add("--lr", type=float, help=f"learning rate (default: {rates})")
    add("--size", type=int, help="short side of the canvas (default: the model's; 512 for SD 1.5)")
    add("--run", type=Path, help="the folder to make (default: runs/ and the clip's name)")
    add("--seed", type=int, default=0, help="of the noise and the timesteps (default: 0)")
    return parser.parse_args(command)


def sampling_arguments(command: list[str] | None = None) -> argparse.Namespace:
    """The arguments of `sample.py`."""
    about = "Makes a video of the person of a run, following any poses."
    parser = argparse.ArgumentParser(prog="sample.py", description=about)
    add, yes_or_no = parser.add_argument, argparse.BooleanOptionalAction
    sources = "OpenPose JSON, or a video or images of anyone, or of a drawn skeleton"
    add("--poses", type=Path, required=True, help=f"what to follow: {sources}")
    add_pose_arguments(parser)
    size = "size of the video that poses in pixels were found in, if their JSON does not say"
    add("--canvas", type=parse_canvas, metavar="WxH", help=size)
    add("--smooth", action="store_true", help="take the jitter out of poses found in footage")
    add("--range", type=parse_range, metavar="A:B", help="only these frames of the poses")
    add(
        "--retarget",
        action=yes_or_no,
        help="give the poses the proportions of the person of the run, and their place on the ground "
        "(default: unless they are the training clip's own)",
    )
    add("--run", type=Path, help="run folder that train.py made (default: the newest)")
    add("--prompt", help="target prompt, such as 'a person, red hair' (default: the training prompt)")
    add("--guidance", type=float, default=1.0, help="guidance scale; 3 to change attributes (default: 1)")
    add("--ddim-steps", type=int, default=50, help="sampling steps (default: 50)")
    add(
        "--method",
        choices=METHOD_NAMES,
        help="paper: face and hands edited at step 1; body: all parts of the body; held: sampling held to a "
        "pseudo video that moves (default: the model's; paper for public checkpoints)",
    )
    replay = "the key frame goes the way back that inversion came (default: the method's)"
    add("--replay", action=yes_or_no, help=f"beyond the paper: {replay}")
    iterations = "further iterations of each inversion step (default: the method's)"
    add("--fixed-point", type=int, metavar="N", help=f"beyond the paper: {iterations}")
    add("--reference", default="auto", help="number of the training frame to start from (default: auto)")
    add("--seed", type=int, default=0, help="of fresh noise, as --start noise has it (default: 0)")
    at_a_time = "frames that a layer takes at a time; the result does not depend on it"
    add("--slice", type=int, metavar="N", help=at_a_time)
    add(
        "--offload",
        choices=("auto", "always", "never"),
        default="auto",
        help="keep what waits for the decoder outside the graphics card (default: auto, if need be)",
    )
    add(
        "--plan",
        action="store_true",
        help="load no weights but OpenPose's, if poses must be found; print how much there is to compute, "
        "the memory and the time it takes",
    )
    add("--fps", type=float, help="of the result (default: the driver's, or the training clip's for JSON)")
    add("--no-audio", action="store_true", help="leave the driver's sound out")
    add("--out", type=Path, help="the video to write (default: in the run's samples/)")

    knobs = parser.add_argument_group("the paper's ablations, one part of the method at a time")
    add = knobs.add_argument
    add("--no-insert", action="store_true", help="do not put the reference in front as key frame")
    add(
        "--start",
        choices=("inversion", "noise"),
        default="inversion",
        help="where sampling starts from (default: inversion); noise is not edited, unless by --edit-step",
    )
    add("--no-edit", action="store_true", help="leave the latents unedited")
    add(
        "--edit-step",
        type=int,
        metavar="N",
        help="edit before this step (default: the method's; 1 with a --prompt of its own, whose new looks "
        "later steps would undo)",
    )
    return parser.parse_args(command)
