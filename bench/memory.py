"""Peak memory, and for long clips time, against the number of frames; and what is predicted for a graphics card.

    python bench/memory.py            prints the tables, and draws bench/memory.png
    python bench/memory.py --size 512 --frames 8 16 32 64

What is measured is a process's resident memory at its peak, one process for each number of frames: one
denoising step (ControlNet and UNet) at Stable Diffusion 1.5's sizes in bfloat16, and two steps of the demo
model on clips of up to 2,000 frames of 128x128 pixels.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from beyond.plan import sampling_peak, training_peak
from checkpoint import load_model
from command import keep_freed_memory
from controlnet import ControlNet
from device import compute_device
from posecrafter import encode_prompt, sample
from unet import UNet, UNetConfig

PREDICTED = (8, 100, 300, 1000)
PAPER = 100, 19.28  # frames, GB: what the paper says its own code takes
MEGA, GIGA = 1e6, 1e9


def measure(args: argparse.Namespace, frames: int) -> None:
    """In a process of its own: prints its peak in bytes after one step."""
    keep_freed_memory()
    config, dtype, side = UNetConfig(widths=tuple(args.widths)), torch.bfloat16, args.size // 8
    with torch.device("meta"):
        networks = SimpleNamespace(unet=UNet(config), controlnet=ControlNet(config))
    for network in vars(networks).values():
        network.to(dtype).to_empty(device="cpu").to(memory_format=torch.channels_last)
        network.eval().requires_grad_(False)
        for tensor in network.state_dict().values():
            tensor.zero_()
    hints = torch.zeros(frames, config.widths[0], side, side, dtype=dtype)
    hints = hints.contiguous(memory_format=torch.channels_last)
    sample(networks, torch.randn(frames, 4, side, side), hints, torch.randn(77, 768).to(dtype), 1)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def measure_demo(frames: int) -> None:
    """In a process of its own: prints its peak in bytes and the seconds of a step of the demo model."""
    keep_freed_memory()
    device, dtype = compute_device()
    model = load_model("demo", None, None, device, dtype)
    side, width = 128 // model.vae.config.factor, model.unet.config.widths[0]
    context = encode_prompt(model, "a person")

    def steps(frames: int, count: int) -> float:
        hints = torch.zeros(frames, width, side, side, dtype=dtype)
        start = time.perf_counter()
        noise = torch.randn(frames, model.unet.config.in_channels, side, side)
        sample(model, noise, hints, context, count)
        return (time.perf_counter() - start) / count

    steps(32, 1)  # warms up
    seconds = steps(frames, 2)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, seconds)


def measured(what: str, frames: int) -> list[float]:
    command = [sys.executable, __file__, *sys.argv[1:], f"--{what}", str(frames)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return [float(word) for word in done.stdout.split()]


def slope(peaks: dict[int, float]) -> float:
    """Megabytes per extra frame."""
    return np.polyfit(list(peaks), list(peaks.values()), 1)[0] / MEGA


def draw(path: Path, lines: dict[str, dict[int, float]]) -> None:
    """Gigabytes against frames, both axes from zero, each line named at its end."""
    width, height, margin = 900, 520, 70
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    pen.font = ImageFont.load_default(size=15)
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
        pen.text((points[-1][0] + 5, points[-1][1] - 8), name, fill=colour, anchor="lb")
    x, y = place(*PAPER)
    pen.ellipse([x - 4, y - 4, x + 4, y + 4], fill="black")
    pen.text((x + 9, y), "the paper's code", fill="black", anchor="lm")
    image.save(path)


def main(args: argparse.Namespace) -> None:
    peaks = {frames: measured("measure", frames)[0] for frames in args.frames}
    print(f"Measured on the CPU, one step at {args.size}x{args.size}, bfloat16:\n")
    print("| frames | " + " | ".join(map(str, peaks)) + " |")
    print("| --- |" + " --- |" * len(peaks))
    print("| peak, GB | " + " | ".join(f"{p / GIGA:.2f}" for p in peaks.values()) + " |")
    print(f"\n{slope(peaks):.1f} MB per extra frame\n")

    long = {frames: measured("measure-demo", frames) for frames in args.demo_frames}
    print("Measured on the CPU, the demo model at 128x128:\n")
    print("| frames | " + " | ".join(map(str, long)) + " |")
    print("| --- |" + " --- |" * len(long))
    print("| peak, GB | " + " | ".join(f"{p / GIGA:.2f}" for p, _ in long.values()) + " |")
    print("| a step, s | " + " | ".join(f"{s:.1f}" for _, s in long.values()) + " |")
    each = " | ".join(f"{1000 * s / n:.1f}" for n, (_, s) in long.items())
    print(f"| of it per frame, ms | {each} |")
    print(f"\n{slope({n: p for n, (p, _) in long.items()}):.2f} MB per extra frame\n")

    with torch.device("meta"):
        config = UNetConfig(widths=tuple(args.widths))
        model = SimpleNamespace(unet=UNet(config), controlnet=ControlNet(config))
    side = args.size // 8
    print(f"Predicted for a graphics card, sampling at {args.size}x{args.size}, float16, in GB:\n")
    print("| frames | " + " | ".join(map(str, PREDICTED)) + " |")
    print("| --- |" + " --- |" * len(PREDICTED))
    lines = {"on the CPU": {n: p / GIGA for n, p in peaks.items()}}
    for name, offload in (("all on the card", "never"), ("skips outside", "always")):
        lines[name] = {n: sampling_peak(model, n, side, side, offload=offload) / GIGA for n in PREDICTED}
        print(f"| {name} | " + " | ".join(f"{p:.1f}" for p in lines[name].values()) + " |")
    training = training_peak(model, 8, side, side) / GIGA
    print(f"\nTraining on 8 frames, bfloat16: {training:.1f} GB")
    draw(args.plot, lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--frames", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--size", type=int, default=512, help="pixels")
    parser.add_argument("--widths", type=int, nargs=4, default=UNetConfig().widths)
    parser.add_argument("--demo-frames", type=int, nargs="+", default=[250, 500, 1000, 2000])
    parser.add_argument("--plot", type=Path, default=Path(__file__).with_name("memory.png"))
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--measure-demo", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args, args.measure)
    elif args.measure_demo:
        measure_demo(args.measure_demo)
    else:
        main(args)
