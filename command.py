"""What the command lines need before torch is loaded, which takes seconds: arguments, memory, errors for people.

Nothing in this file imports torch, so that `--help` and a mistyped option answer at once.
"""

import argparse
import ctypes
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from public.adapters import parse_lora

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
    """Tells glibc, before torch is imported, to keep freed memory for the next buffer.

    Networks ask for buffers hundreds of times a second, and on a CPU mapping them anew costs more than the
    arithmetic: the demo model trains four times as fast with this. Buffers of 32 MB and more are given back (the
    gaps between them would add up), but are mapped in huge pages. Other C libraries are left alone.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads this when it makes its first tensor
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    # malloc.h calls these M_MMAP_THRESHOLD (32 MB is the most), M_TRIM_THRESHOLD, M_TOP_PAD and M_ARENA_MAX.
    for option, value in {-3: 32 * 2**20, -1: 2**31 - 1, -2: 256 * 2**20, -8: 1}.items():
        mallopt(option, value)


# ---- Arguments ----------------------------------------------------------------------------------


def number(text: str, kind: type, low: float = 0, high: float = math.inf) -> float:
    """ "8" -> 8, an int or a float as `kind` says, above `low` and below `high`."""
    try:
        if low < (value := kind(text)) < high:
            return value
    except ValueError:
        pass
    wanted = "a whole number" if kind is int else "a number"
    raise argparse.ArgumentTypeError(f"{text!r} is not {wanted} above {low:g} and below {high:g}")


whole = partial(number, kind=int)


def parse_range(text: str) -> range:
    """ "0:36" -> range(0, 36)."""
    start, _, stop = text.partition(":")
    if not (start.isdecimal() and stop.isdecimal() and int(start) < int(stop)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a range such as 0:36")
    return range(int(start), int(stop))


def parse_canvas(text: str) -> tuple[int, int]:
    """ "1920x1080" -> (1080, 1920), height and width."""
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 1920x1080")
    return int(sides[1]), int(sides[0])


def parser_of_both(usage: str, about: str) -> argparse.ArgumentParser:
    """A parser with the options that both command lines have."""
    parser = argparse.ArgumentParser(prog=usage.split()[0], usage=usage, description=about)
    add = parser.add_argument
    add("--poses-are", choices=KINDS, help="what --poses is (default: found out)")
    add("--person", type=int, default=1, help="whom to follow in footage (default: 1, the most prominent)")
    add("--range", type=parse_range, metavar="A:B", help="only these frames (default: all)")
    add("--seed", type=int, default=0, help="of all random noise (default: 0)")
    return parser


def training_arguments(command: list[str] | None = None) -> argparse.Namespace:
    """The arguments of `train.py`."""
    parser = parser_of_both("train.py CLIP [options]", "Fine-tunes the model on a few frames of one clip.")
    add = parser.add_argument
    add("clip", type=Path, help="video, or folder of images, of one person")
    add("--poses", type=Path, help="the clip's poses, JSON or drawn (default: found in its pixels)")
    add("--model", default="sd15", help="sd15, demo, or a folder or file of weights (default: sd15)")
    add("--controlnet", type=Path, help="take the ControlNet from this file or folder")
    add("--vae", type=Path, help="take the VAE from this file or folder")
    lora = {"type": parse_lora, "action": "append", "default": [], "metavar": "FILE[:WEIGHT]"}
    add("--lora", **lora, help="merge this LoRA into the model; several are added up (default weight: 1)")
    add("--frames", type=int, default=8, help="training frames, taken uniformly (default: 8)")
    add("--prompt", default="a person", help="what the clip shows (default: %(default)r)")
    add("--steps", type=whole, help="training steps (default: the paper's, 100 for 8 frames)")
    rate = partial(number, kind=float, high=1)
    add("--lr", type=rate, help="learning rate (default: the model's; the paper states 0.003)")
    add("--size", type=whole, help="short side of the canvas (default: the model's; 512 for SD 1.5)")
    add("--run", type=Path, help="the folder to make (default: runs/ and the clip's name)")
    return parser.parse_args(command)


def sampling_arguments(command: list[str] | None = None) -> argparse.Namespace:
    """The arguments of `sample.py`."""
    about = "Makes a video of the person of a run, following any poses."
    parser = parser_of_both("sample.py --poses POSES [options]", about)
    add, yes_or_no = parser.add_argument, argparse.BooleanOptionalAction
    add("--poses", type=Path, required=True, help="what to follow: JSON, drawn skeletons or footage")
    add("--canvas", type=parse_canvas, metavar="WxH", help="size of the video that JSON in pixels is of")
    add("--smooth", action="store_true", help="take the jitter out of poses found in footage")
    build = "give the poses the proportions and the place on the ground of the run's person"
    add("--retarget", action=yes_or_no, help=f"{build} (default: unless they are the training clip's)")
    add("--run", type=Path, help="run folder that train.py made (default: the newest)")
    add("--prompt", help="target prompt, such as 'a person, red hair' (default: the training prompt)")
    finite = partial(number, kind=float, low=-math.inf)
    add("--guidance", type=finite, default=1.0, help="guidance scale; 3 to change attributes (default: 1)")
    add("--ddim-steps", type=int, default=50, help="sampling steps (default: 50)")
    edited = "paper: face and hands; body: all parts; held: all, held to a moving pseudo video"
    add("--method", choices=METHOD_NAMES, help=f"what is edited (default: the model's): {edited}")
    add(
        "--replay", action=yes_or_no, help="sample the key frame as it was inverted (default: the method's)"
    )
    iterations = "further iterations of each inversion step (default: the method's)"
    add("--fixed-point", type=int, choices=range(21), metavar="N", help=iterations)
    add("--reference", default="auto", help="number of the training frame to start from (default: auto)")
    add("--slice", type=whole, metavar="N", help="frames that a layer takes at a time; changes no result")
    where = "keep what waits for the decoder outside the graphics card (default: auto, if need be)"
    add("--offload", choices=("auto", "always", "never"), default="auto", help=where)
    add("--plan", action="store_true", help="only predict computation, memory and time")
    fps = partial(number, kind=float)
    add("--fps", type=fps, help="frames per second (default: the driver's, or the clip's for JSON)")
    add("--no-audio", action="store_true", help="leave the driver's sound out")
    add("--out", type=Path, help="the video to write (default: in the run's samples/)")

    add = parser.add_argument_group("the paper's ablations, one part of the method at a time").add_argument
    add("--no-insert", action="store_true", help="do not put the reference in front as key frame")
    start = "start from inversion (default), or from noise, which is edited only with --edit-step"
    add("--start", choices=("inversion", "noise"), default="inversion", help=start)
    add("--no-edit", action="store_true", help="leave the latents unedited")
    step = "edit before this step (default: the method's; 1 with a --prompt of its own)"
    add("--edit-step", type=int, metavar="N", help=step)
    return parser.parse_args(command)
