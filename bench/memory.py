"""Peak memory against the number of frames: measured on this machine, predicted for a graphics card.

    python bench/memory.py            prints a table of each, and draws bench/memory.png
    python bench/memory.py --size 512 --frames 8 16 32 64

What is measured is a process's resident memory at its peak: one denoising step (ControlNet and UNet, random
weights at Stable Diffusion 1.5's sizes, bfloat16), one process for each number of frames.
"""

import argparse
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from checkpoint import keep_freed_memory  # noqa: E402
from controlnet import ControlNet  # noqa: E402
from memory import sampling_peak, training_peak  # noqa: E402
from posecrafter import sample  # noqa: E402
from unet import UNet, UNetConfig  # noqa: E402

PREDICTED = (8, 100, 300, 1000)
MEGA, GIGA = 1e6, 1e9


def measure(args: argparse.Namespace, frames: int) -> None:
    """In a process of its own: prints its peak in bytes after one step."""
    keep_freed_memory()
    config, dtype, side = UNetConfig(widths=tuple(args.widths)), torch.bfloat16, args.size // 8
    torch.set_default_dtype(dtype)
    networks = SimpleNamespace(unet=UNet(config), controlnet=ControlNet(config))
    torch.set_default_dtype(torch.float32)
    for network in vars(networks).values():
        network.to(memory_format=torch.channels_last).eval().requires_grad_(False)
    hints = torch.zeros(frames, config.widths[0], side, side, dtype=dtype)
    hints = hints.contiguous(memory_format=torch.channels_last)
    sample(networks, torch.randn(frames, 4, side, side), hints, torch.randn(77, 768).to(dtype), 1)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def peak(frames: int) -> int:
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", str(frames)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout.split()[-1])


def draw(path: Path, lines: dict[str, dict[int, float]]) -> None:
    """Gigabytes against frames, both axes from zero, each line named at its end."""
    width, height, margin = 900, 520, 70
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    most_frames = max(max(line) for line in lines.values())
    most = max(max(line.values()) for line in lines.values()) * 1.1

    def place(frames: float, gigabytes: float) -> tuple[float, float]:
        x = margin + frames / most_frames * (width - 3 * margin)
        return x, height - margin - gigabytes / most * (height - 2 * margin)

    for tick in np.linspace(0, most_frames, 6):
        pen.text(place(tick, -0.03 * most), f"{tick:.0f}", fill="black", anchor="mt")
    for tick in np.linspace(0, most, 6):
        pen.line([place(0, tick), place(most_frames, tick)], fill="lightgray")
        pen.text(place(-0.01 * most_frames, tick), f"{tick:.0f} GB", fill="black", anchor="rm")
    pen.text((width / 2, height - margin / 3), "frames of 512x512", fill="black", anchor="mm")
    for (name, line), colour in zip(lines.items(), ("crimson", "navy", "darkgreen", "orange")):
        points = [place(*point) for point in sorted(line.items())]
        pen.line(points, fill=colour, width=3)
        pen.text((points[-1][0] + 5, points[-1][1]), name, fill=colour, anchor="lm")
    image.save(path)


def main(args: argparse.Namespace) -> None:
    measured = {frames: peak(frames) for frames in args.frames}
    slope = np.polyfit(list(measured), list(measured.values()), 1)[0]
    print(f"Measured on the CPU, one step at {args.size}x{args.size}, bfloat16:\n")
    print("| frames | " + " | ".join(map(str, measured)) + " |")
    print("| --- |" + " --- |" * len(measured))
    print("| peak, GB | " + " | ".join(f"{p / GIGA:.2f}" for p in measured.values()) + " |")
    print(f"\n{slope / MEGA:.1f} MB per extra frame\n")

    with torch.device("meta"):
        config = UNetConfig(widths=tuple(args.widths))
        model = SimpleNamespace(unet=UNet(config), controlnet=ControlNet(config))
    side = args.size // 8
    print(f"Predicted for a graphics card, sampling at {args.size}x{args.size}, float16, in GB:\n")
    print("| frames | " + " | ".join(map(str, PREDICTED)) + " |")
    print("| --- |" + " --- |" * len(PREDICTED))
    lines = {"on the CPU": {n: p / GIGA for n, p in measured.items()}}
    for name, offload in (("all on the card", "never"), ("skips outside", "always")):
        peaks = {n: sampling_peak(model, n, side, side, offload=offload) / GIGA for n in PREDICTED}
        print(f"| {name} | " + " | ".join(f"{p:.1f}" for p in peaks.values()) + " |")
        lines[name] = peaks
    training = training_peak(model, 8, side, side) / GIGA
    print(f"\nTraining on 8 frames, bfloat16: {training:.1f} GB")
    draw(args.plot, lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--frames", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--size", type=int, default=512, help="pixels")
    parser.add_argument("--widths", type=int, nargs=4, default=UNetConfig().widths)
    parser.add_argument("--plot", type=Path, default=ROOT / "bench" / "memory.png")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    measure(args, args.measure) if args.measure else main(args)
