"""Measures a GPU: whether results equal the CPU's, and how much time and memory they take.

    python bench/card.py                           everything, in about 10 minutes, written to bench/CARDS.md
    python bench/card.py --minutes 4 --parts abe   stops after 4 minutes; the same command goes on
    python bench/card.py --device cpu --tiny --out rehearsal.md    rehearses the code on a CPU, in tiny sizes

No weights are needed: the networks have Stable Diffusion 1.5's sizes and random weights. The parts:

    a  differences from the CPU in float32      d  denoising steps of diffusers and the public ControlVideo code
    b  denoising steps, and a whole command     e  plain matrix products and convolutions
    c  training steps                           f  denoising steps with torch.compile, which no command uses

Each row is stored as soon as it is known, in CARDS.json beside the output. Rows of another commit, PyTorch or
driver are measured again. To measure again, delete a row there, or the file.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.measure import Bench, tables
from bench.report import NOT_INSTALLED, written

PARTS = "abcdef"


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
        bench.rows.write_report(every)
        over = args.minutes is not None and time.monotonic() - start >= 60 * args.minutes
        # What is not installed is found out in no time, and not kept.
        if over and count < len(left) and row.get("reason") != NOT_INSTALLED:
            print(f"Stopped after {args.minutes:g} minutes; the same command goes on.")
            return
    bench.rows.write_report(every)
    print(f"All of it is in {args.out}")


def parse_arguments(command: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add, error = parser.add_argument, parser.error
    add("--parts", default=PARTS, help=f"which of {PARTS} (default: all)")
    add("--out", type=Path, default=Path(__file__).with_name("CARDS.md"))
    add("--minutes", type=float, help="stop after the row that ends later than this")
    add("--device", default="cuda", help="cuda, or cpu to rehearse with --tiny")
    add("--tiny", action="store_true", help="tiny sizes, to try the code out")
    add("--controlvideo", type=Path, help="folder of the public ControlVideo code")
    add("--python", default=sys.executable, help="interpreter for --controlvideo")
    args = parser.parse_args(command)
    if unknown := set(args.parts) - set(PARTS):
        error(f"--parts {args.parts}: there is no part {min(unknown)}, only {PARTS}")
    if args.device == "cuda" and not torch.cuda.is_available():
        error("PyTorch finds no GPU; to rehearse without one, give --device cpu --tiny")
    if args.device != "cuda" and not args.tiny:
        error(f"--device {args.device}: give --tiny too, or it takes hours")
    if not args.out.parent.is_dir():
        error(f"--out {args.out}: there is no folder {args.out.parent}")
    if not shutil.which(args.python):
        error(f"--python {args.python}: no such program")
    if args.controlvideo and not args.controlvideo.is_dir():
        error(f"--controlvideo {args.controlvideo}: no such folder")
    return args


if __name__ == "__main__":
    main(parse_arguments())
