"""Peak memory against the number of frames, measured on the CPU and predicted for a graphics card.

    python bench/memory.py            prints the tables, and draws bench/memory.png

What is measured is a process's resident memory at its peak, one process for each number of frames: one denoising
step (ControlNet and UNet) at Stable Diffusion 1.5's sizes, 512x512 pixels in bfloat16.
"""

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import GIGA, HINTS, MEGA, print_table
from bench.equal import without_weights
from beyond.plan import sampling_peak, training_peak
from command import keep_freed_memory
from posecrafter import sample
from unet import UNetConfig

MEASURED, PREDICTED = (8, 16, 32, 64), (8, 100, 300, 1000)  # frames
SIDE = 64  # of the latents
PAPER = 100, 19.28  # frames, GB: what the paper says its own code takes


def measure(frames: int) -> None:
    """In a process of its own: prints its peak in bytes after one step."""
    keep_freed_memory()
    config, dtype = UNetConfig(), torch.bfloat16
    model = without_weights(config, HINTS)
    for network in (model.unet, model.controlnet):
        network.to(dtype).to_empty(device="cpu").to(memory_format=torch.channels_last)
        for tensor in network.eval().requires_grad_(False).state_dict().values():
            tensor.zero_()
    hints = torch.zeros(frames, config.widths[0], SIDE, SIDE, dtype=dtype)
    hints = hints.contiguous(memory_format=torch.channels_last)
    sample(model, torch.randn(frames, 4, SIDE, SIDE), hints, torch.randn(77, 768).to(dtype), 1)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def measured(frames: int) -> float:
    """The peak in GB of a process of this file."""
    command = [sys.executable, __file__, str(frames)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout) / GIGA


def draw(path: Path, lines: dict[str, dict[int, float]]) -> None:
    """Gigabytes against frames, both axes from zero, each line named at its end."""
    width, height, margin = 900, 520, 70
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    pen.font = ImageFont.load_default(size=15)
    most_frames = max(max(line) for line in lines.values())
    most = 1.1 * max(max(line.values()) for line in lines.values())

    def place(frames: float, gigabytes: float) -> tuple[float, float]:
        x = margin + frames / most_frames * (width - 3 * margin)
        return x, height - margin - gigabytes / most * (height - 2 * margin)

    for tick in np.linspace(0, 1, 6):
        pen.text(place(tick * most_frames, -0.03 * most), f"{tick * most_frames:.0f}", "black", anchor="mt")
        pen.line([place(0, tick * most), place(most_frames, tick * most)], "lightgray")
        pen.text(place(-0.01 * most_frames, tick * most), f"{tick * most:.0f} GB", "black", anchor="rm")
    pen.text((width / 2, height - margin / 3), "frames of 512x512", "black", anchor="mm")
    for (name, line), colour in zip(lines.items(), ("crimson", "navy", "darkgreen")):
        points = [place(*point) for point in line.items()]
        pen.line(points, colour, 3)
        pen.text((points[-1][0] + 5, points[-1][1] - 8), name, colour, anchor="lb")
    x, y = place(*PAPER)
    pen.ellipse([x - 4, y - 4, x + 4, y + 4], "black")
    pen.text((x + 9, y), "the paper's code", "black", anchor="lm")
    image.save(path)


def main() -> None:
    print("Measured on the CPU, one step at 512x512, bfloat16:\n")
    peaks = {frames: measured(frames) for frames in MEASURED}
    print_table(("frames", *peaks), [("peak, GB", *(f"{peak:.2f}" for peak in peaks.values()))])
    slope = np.polyfit(list(peaks), list(peaks.values()), 1)[0] * GIGA / MEGA
    print(f"\n{slope:.1f} MB per extra frame\n")

    print("Predicted for a graphics card, sampling at 512x512, float16, in GB:\n")
    model, lines = without_weights(UNetConfig(), HINTS), {"on the CPU": peaks}
    for name, offload in (("all on the card", "never"), ("skips outside", "always")):
        lines[name] = {n: sampling_peak(model, n, SIDE, SIDE, offload=offload) / GIGA for n in PREDICTED}
    rows = [(name, *(f"{peak:.1f}" for peak in line.values())) for name, line in list(lines.items())[1:]]
    print_table(("frames", *PREDICTED), rows)
    print(f"\nTraining on 8 frames, bfloat16: {training_peak(model, 8, SIDE, SIDE) / GIGA:.1f} GB")
    draw(Path(__file__).with_name("memory.png"), lines)


if __name__ == "__main__":
    measure(int(sys.argv[1])) if len(sys.argv) > 1 else main()
