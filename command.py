"""The arguments of the command lines, and what they may be.

Nothing in this file imports torch, which takes seconds, so that `--help` and a mistyped option answer at once.
"""

import argparse
import shlex
import sys
from functools import partial

from public.adapters import parse_lora
from safe.arguments import DEVICE, number, parse_canvas, parse_range, path, prompt, whole
from safe.results import Verify

METHOD_NAMES = ("paper", "body", "held")  # of `beyond.pseudo.METHODS`
KINDS = ("json", "drawn", "video")  # what poses come from; see `poses.source`


def parser_of_both(usage: str, about: str, command: list[str] | None) -> argparse.ArgumentParser:
    """A parser with the options that both command lines have; it keeps the line itself as `command`."""
    parser = argparse.ArgumentParser(prog=usage.split()[0], usage=usage, description=about)
    words = sys.argv[1:] if command is None else command
    parser.set_defaults(command=shlex.join(["python", parser.prog, *words]))
    add = parser.add_argument
    add("--poses-are", choices=KINDS, help="what --poses is (default: found out)")
    add("--person", type=whole, default=1, help="whom to follow (default: 1, the most prominent)")
    add("--range", type=parse_range, metavar="A:B", help="only these frames (default: all)")
    seed = partial(number, kind=int, low=-(10**12), high=10**12)  # training makes millions of seeds of it
    add("--seed", type=seed, default=0, help="of all random noise (default: 0)")
    add("--device", **DEVICE)
    return parser


def training_arguments(command: list[str] | None = None) -> argparse.Namespace:
    """The arguments of `train.py`."""
    about = "Fine-tunes the model on a few frames of one clip."
    parser = parser_of_both("train.py CLIP [options]", about, command)
    add = parser.add_argument
    add("clip", type=path, help="video, or folder of images, of one person")
    add("--poses", type=path, help="the clip's poses, JSON or drawn (default: found in its pixels)")
    add("--model", default="sd15", help="sd15, demo, or a folder or file of weights (default: sd15)")
    add("--controlnet", type=path, help="take the ControlNet from this file or folder")
    add("--vae", type=path, help="take the VAE from this file or folder")
    lora = {"type": parse_lora, "action": "append", "default": [], "metavar": "FILE[:WEIGHT]"}
    add("--lora", **lora, help="merge this LoRA into the model; several are added up (default weight: 1)")
    add("--frames", type=int, default=8, help="training frames, taken uniformly (default: 8)")
    add("--prompt", type=prompt, default="a person", help="what the clip shows (default: %(default)r)")
    add("--steps", type=whole, help="training steps (default: the paper's, 100 for 8 frames)")
    rate = partial(number, kind=float, high=1)
    add("--lr", type=rate, help="learning rate (default: the model's; the paper states 0.003)")
    add("--size", type=whole, help="short side of the canvas (default: the model's; 512 for SD 1.5)")
    add("--run", type=path, help="the folder to make (default: runs/ and the clip's name)")
    return parser.parse_args(command)


def sampling_arguments(command: list[str] | None = None) -> argparse.Namespace:
    """The arguments of `sample.py`."""
    about = "Makes a video of the person of a run, following any poses."
    parser = parser_of_both("sample.py --poses POSES [options]", about, command)
    add, yes_or_no = parser.add_argument, argparse.BooleanOptionalAction
    add("--poses", type=path, required=True, help="what to follow: JSON, drawn skeletons or footage")
    add("--canvas", type=parse_canvas, metavar="WxH", help="size of the video that JSON was found in")
    add("--smooth", action="store_true", help="take the jitter out of poses found in footage")
    build = "give the poses the proportions and the place on the ground of the run's person"
    add("--retarget", action=yes_or_no, help=f"{build} (default: unless they are the person's own)")
    add("--run", type=path, help="run folder that train.py made (default: the newest)")
    add("--prompt", type=prompt, help="such as 'a person, red hair' (default: the training prompt)")
    scale = partial(number, kind=float, low=-30, high=30)  # farther out, nothing is left of the person
    add("--guidance", type=scale, default=1.0, help="guidance scale; 3 to change attributes (default: 1)")
    add("--ddim-steps", type=int, default=50, help="sampling steps (default: 50)")
    edited = "paper: face and hands; body: all parts; held: all, held to a moving pseudo video"
    add("--method", choices=METHOD_NAMES, help=f"what is edited (default: the model's): {edited}")
    add("--replay", action=yes_or_no, help="sample the key frame as inverted (default: the method's)")
    iterations = "further iterations of each inversion step (default: the method's)"
    add("--fixed-point", type=int, choices=range(21), metavar="N", help=iterations)
    every = "compute only every N-th step whole: faster, not exact (default: all)"
    add("--reuse", type=partial(number, kind=int, low=1, high=11), metavar="N", help=every)
    add("--reference", default="auto", help="number of the training frame to start from (default: auto)")
    add("--slice", type=whole, metavar="N", help="frames that a layer takes at a time; changes no result")
    where = "keep what waits for the decoder outside the GPU (default: auto, if need be)"
    add("--offload", choices=("auto", "always", "never"), default="auto", help=where)
    add("--plan", action="store_true", help="only predict computation, memory and time")
    fps = partial(number, kind=float, low=0.1, high=1000)
    add("--fps", type=fps, help="frames per second (default: the driver's, or the clip's for JSON)")
    add("--no-audio", action="store_true", help="leave the driver's sound out")
    add("--no-report", action="store_true", help="leave out the page (.html) that shows the result")
    add("--out", type=path, help="the video to write (default: in the run's samples/)")
    told = "only print how this video or sheet was made, and whether it is as it was written"
    add("--verify", type=path, metavar="FILE", action=Verify, help=told)

    add = parser.add_argument_group("the paper's ablations, one part of the method at a time").add_argument
    add("--no-insert", action="store_true", help="do not put the reference in front as key frame")
    start = "start from inversion (default), or from noise, which is edited only with --edit-step"
    add("--start", choices=("inversion", "noise"), default="inversion", help=start)
    add("--no-edit", action="store_true", help="leave the latents unedited")
    step = "edit before this step (default: the method's; 1 with a --prompt of its own)"
    add("--edit-step", type=int, metavar="N", help=step)
    return parser.parse_args(command)
