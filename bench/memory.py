"""Peak memory, and for long clips time, against the number of frames; and what is predicted for a graphics card.

    python bench/memory.py            prints the tables, and draws bench/memory.png

What is measured is a process's resident memory at its peak, one process for each number of frames: one
denoising step (ControlNet and UNet) at Stable Diffusion 1.5's sizes, 512x512 pixels in bfloat16, and two steps of
the demo model on clips of up to 2,000 frames of 128x128 pixels.
"""

import argparse
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import GIGA, HINTS, MEGA, print_table, seconds
from bench.equal import without_weights
from checkpoint import load_model
from command import keep_freed_memory
from device import compute_device
from memory import sampling_peak, training_peak
from posecrafter import encode_prompt, sample
from unet import UNetConfig

MEASURED, DEMO, PREDICTED = (8, 16, 32, 64), (250, 500, 1000, 2000), (8, 100, 300, 1000)  # frames
SIDE = 64  # of the latents
PAPER = 100, 19.28  # frames, GB: what the paper says its own code takes


def measure(demo: bool, frames: int) -> None:
    """In a process of its own: prints its peak in bytes, and the seconds of a step."""
    keep_freed_memory()
    if demo:
        device, dtype = compute_device()
        model = load_model("demo", None, None, device, dtype)
        side, context = 128 // model.vae.config.factor, encode_prompt(model, "a person")
    else:
        dtype, side = torch.bfloat16, SIDE
        model = without_weights(UNetConfig(), HINTS)
        for network in (model.unet, model.controlnet):
            network.to(dtype).to_empty(device="cpu").to(memory_format=torch.channels_last)
            for tensor in network.eval().requires_grad_(False).state_dict().values():
                tensor.zero_()
        context = torch.randn(77, 768, dtype=dtype)
    config = model.unet.config

    def steps(frames: int, count: int) -> float:
        hints = torch.zeros(frames, config.widths[0], side, side, dtype=dtype)
        hints = hints.contiguous(memory_format=torch.channels_last)
        noise = torch.randn(frames, config.in_channels, side, side)
        return seconds(lambda: sample(model, noise, hints, context, count)) / count

    if demo:
        steps(32, 1)  # warms up
    took = steps(frames, 2 if demo else 1)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, took)


def measured(what: str, counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Peak bytes and seconds a step for each number of frames; says what an extra frame takes."""
    commands = [[sys.executable, __file__, what, str(frames)] for frames in counts]
    printed = [subprocess.run(c, check=True, stdout=subprocess.PIPE, text=True).stdout for c in commands]
    peaks, took = np.array([line.split() for line in printed], float).T
    print(f"{np.polyfit(counts, peaks, 1)[0] / MEGA:.2f} MB per extra frame.\n")
    return peaks, took


def draw(path: Path, lines: dict[str, tuple[tuple[int, ...], np.ndarray]]) -> None:
    """Gigabytes against frames, both axes from zero, each line named at its end."""
    width, height, margin = 900, 520, 70
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    pen.font = ImageFont.load_default(size=15)
    most_frames = max(max(counts) for counts, _ in lines.values())
    most = 1.1 * max(peaks.max() for _, peaks in lines.values())

    def place(frames: float, gigabytes: float) -> tuple[float, float]:
        x = margin + frames / most_frames * (width - 3 * margin)
        return x, height - margin - gigabytes / most * (height - 2 * margin)

    for tick in np.linspace(0, 1, 6):
        pen.text(place(tick * most_frames, -0.03 * most), f"{tick * most_frames:.0f}", "black", anchor="mt")
        pen.line([place(0, tick * most), place(most_frames, tick * most)], "lightgray")
        pen.text(place(-0.01 * most_frames, tick * most), f"{tick * most:.0f} GB", "black", anchor="rm")
    pen.text((width / 2, height - margin / 3), "frames of 512x512", "black", anchor="mm")
    for (name, (counts, peaks)), colour in zip(lines.items(), ("crimson", "navy", "darkgreen")):
        points = [place(*point) for point in zip(counts, peaks)]
        pen.line(points, colour, 3)
        pen.text((points[-1][0] + 5, points[-1][1] - 8), name, colour, anchor="lb")
    x, y = place(*PAPER)
    pen.ellipse([x - 4, y - 4, x + 4, y + 4], "black")
    pen.text((x + 9, y), "the paper's code", "black", anchor="lm")
    image.save(path)


def main() -> None:
    print("Measured on the CPU, one step at 512x512, bfloat16:", end=" ")
    peaks, _ = measured("full", MEASURED)
    lines = {"on the CPU": (MEASURED, peaks / GIGA)}
    print_table(("frames", *MEASURED), [("peak, GB", *(f"{peak / GIGA:.2f}" for peak in peaks))])

    print("\nMeasured on the CPU, the demo model at 128x128:", end=" ")
    peaks, took = measured("demo", DEMO)
    rows = {"peak, GB": peaks / GIGA, "a step, s": took, "of it per frame, ms": 1000 * took / DEMO}
    print_table(("frames", *DEMO), [(name, *(f"{v:.3g}" for v in values)) for name, values in rows.items()])

    print("\nPredicted for a graphics card, sampling at 512x512, float16, in GB:\n")
    model = without_weights(UNetConfig(), HINTS)
    for name, offload in (("all on the card", "never"), ("skips outside", "always")):
        peaks = [sampling_peak(model, n, SIDE, SIDE, offload=offload) / GIGA for n in PREDICTED]
        lines[name] = PREDICTED, np.array(peaks)
    predicted = list(lines.items())[1:]
    print_table(
        ("frames", *PREDICTED), [(name, *(f"{p:.1f}" for p in line)) for name, (_, line) in predicted]
    )
    print(f"\nTraining on 8 frames, bfloat16: {training_peak(model, 8, SIDE, SIDE) / GIGA:.1f} GB")
    draw(Path(__file__).with_name("memory.png"), lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("measure", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure[0] == "demo", int(args.measure[1]))
    else:
        main()
