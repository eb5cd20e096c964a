"""Measures a GPU: whether results equal the CPU's, and how much time and memory they take.

    python bench/card.py                           everything, in about 10 minutes, written to bench/CARDS.md
    python bench/card.py --minutes 4 --parts abf   stops after 4 minutes; the same command goes on
    python bench/card.py --device cpu --tiny --out rehearsal.md    rehearses the code on a CPU, in tiny sizes

No weights are needed: the networks have Stable Diffusion 1.5's sizes and random weights. The parts:

    a  differences from the CPU in float32      d  diffusers and the public ControlVideo code
    b  denoising steps, and a whole command     e  the step with torch.compile, which no command uses
    c  training steps                           f  the step beside plain matrix products and convolutions

Each row is stored as soon as it is known, in CARDS.json beside the output. Rows of another commit, PyTorch or
driver are measured again. To measure again, delete a row there, or the file.
"""

import argparse
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.equal import CHECKS  # noqa: E402
from bench.measure import (  # noqa: E402
    CONVOLUTION,
    KEPT,
    OFFLOADED,
    PRODUCT,
    SHARES,
    STEPS,
    Bench,
    fill_compiled,
    fill_convolution,
    fill_difference,
    fill_ours,
    fill_peer,
    fill_product,
    fill_share,
    fill_step,
    fill_training,
    fill_whole,
    step_key,
)
from bench.report import NOT_INSTALLED, Table, write_report, written  # noqa: E402
from bench.step import CONTROLVIDEO, DIFFUSERS  # noqa: E402

MEMORY = "predicted, GB", "allocated, GB", "reserved, GB", "taken, GB", "host, GB"
PARTS = "abcdef"


def tables(bench: Bench) -> list[Table]:
    sizes = bench.sizes
    frame = f"{sizes.pixels}x{sizes.pixels}"
    steps = {
        step_key(frames, offload): partial(fill_step, bench, frames, offload)
        for offload in (KEPT, OFFLOADED)
        for frames in sizes.frames
    }
    return [
        Table(
            "Differences from the CPU in float32",
            ("float32", "float16"),
            {f"a {check}": partial(fill_difference, bench, check) for check in CHECKS},
            "Small networks, 5 frames. The largest difference against the largest number of a result; of "
            "several results, such as gradients, the worst. float32 is without TF32.",
        ),
        Table(
            f"A denoising step at {frame}",
            ("seconds", "frames a second", "frames a slice", *MEMORY),
            steps,
            "ControlNet and UNet in float16.",
        ),
        Table(
            f"A command: {sizes.whole} frames at {frame} in {STEPS} steps",
            ("encode, s", "invert, s", "sample, s", "decode, s", "together, s", *MEMORY),
            {f"b {sizes.whole} frames, the command": partial(fill_whole, bench)},
            "Encoding and inversion are of one frame. Measured are runs of 1 and 3 steps, and decoding of at most "
            "16 frames; the rest is scaled. Left out are poses, the text encoder, loading and video files.",
        ),
        Table(
            f"A training step on {sizes.short} frames at {frame}",
            ("precision", "seconds", *MEMORY),
            {"c a step, AdamW included": partial(fill_training, bench)},
        ),
        Table(
            f"A denoising step of {sizes.short} frames beside other code",
            ("seconds", "against ours", "allocated, GB"),
            {
                "d ours": partial(fill_ours, bench),
                **{f"d {peer}": partial(fill_peer, bench, peer) for peer in (DIFFUSERS, CONTROLVIDEO)},
            },
            "float16, the others as they come. 2-D: frames as a batch, and no temporal layers.",
        ),
        Table(
            f"A denoising step of {sizes.short} frames with torch.compile",
            ("seconds", "against uncompiled", "difference", "first step, s", *MEMORY[1:]),
            {"e residual blocks and transformers compiled": partial(fill_compiled, bench)},
            "Only measured: no command compiles. A CPU rehearsal traces the blocks, and compiles no kernels.",
        ),
        Table(
            "A denoising step beside plain operations",
            ("TFLOP", "seconds", "TFLOP/s", *SHARES.values()),
            {
                f"f {PRODUCT}": partial(fill_product, bench),
                f"f {CONVOLUTION}": partial(fill_convolution, bench),
                **{
                    f"f a step of {frames} frames": partial(fill_share, bench, frames)
                    for frames in sizes.frames[:2]
                },
            },
            f"float16. The product is of two square matrices of {sizes.matrix} rows. The convolution is 3x3, of "
            f"{sizes.short} of the finest feature maps. A percentage is the share of the step's time that its "
            "products would take at that rate. Temporal attention is not counted.",
        ),
    ]


def main(args: argparse.Namespace) -> None:
    start = time.monotonic()
    bench = Bench(args)
    every = tables(bench)
    asked = [item for table in every for item in table.fills.items() if item[0][0] in args.parts]
    left = [(key, fill) for key, fill in asked if key not in bench.rows.known]
    print(f"{bench.rows.title}: {len(left)} of {len(asked)} rows to measure", flush=True)
    for count, (key, fill) in enumerate(left, start=1):
        row = bench.rows.measured(key, fill)
        print(f"{key}: " + ", ".join(f"{name} {written(value)}" for name, value in row.items()))
        write_report(args.out, bench.rows, every)
        over = args.minutes is not None and time.monotonic() - start >= 60 * args.minutes
        # What is not installed is found out in no time, and not kept.
        if over and count < len(left) and row.get("reason") != NOT_INSTALLED:
            print(f"Stopped after {args.minutes:g} minutes; the same command goes on.")
            return
    write_report(args.out, bench.rows, every)
    print(f"All of it is in {args.out}")


def parse_arguments(command: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", default=PARTS, help=f"which of {PARTS} (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "CARDS.md")
    parser.add_argument("--minutes", type=float, help="stop after the row that ends later than this")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to rehearse with --tiny")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the code out")
    parser.add_argument("--controlvideo", type=Path, help="folder of the public ControlVideo code")
    parser.add_argument("--python", default=sys.executable, help="interpreter for --controlvideo")
    args = parser.parse_args(command)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"--parts {args.parts}: there is no part {min(unknown)}, only {PARTS}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU; to rehearse without one, give --device cpu --tiny")
    if args.device != "cuda" and not args.tiny:
        parser.error(f"--device {args.device}: give --tiny too, or it takes hours")
    if not args.out.parent.is_dir():
        parser.error(f"--out {args.out}: there is no folder {args.out.parent}")
    if not shutil.which(args.python):
        parser.error(f"--python {args.python}: no such program")
    if args.controlvideo and not args.controlvideo.is_dir():
        parser.error(f"--controlvideo {args.controlvideo}: no such folder")
    return args


if __name__ == "__main__":
    main(parse_arguments())
