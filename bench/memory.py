"""Peak memory against the number of frames, measured on the CPU and predicted for a GPU: `python bench/memory.py`.

What is measured is a process's resident memory at its peak, one process for each number of frames: one denoising
step (ControlNet and UNet) at Stable Diffusion 1.5's sizes, 512x512 pixels in bfloat16.
"""

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import GIGA, HINTS, MEGA, print_table
from bench.equal import without_weights
from beyond.plan import blank_clip, sampling_peak, training_peak
from posecrafter import sample
from safe.process import keep_freed_memory
from unet import UNetConfig

MEASURED, PREDICTED = (8, 16, 32, 64), (8, 100, 300, 1000)  # frames
SIDE = 64  # of the latents


def measure(frames: int) -> None:
    """In a process of its own: prints its peak in bytes after one step."""
    keep_freed_memory()
    device, dtype = torch.device("cpu"), torch.bfloat16
    model = without_weights(UNetConfig(), HINTS)
    for network in (model.unet, model.controlnet):
        network.to(dtype).to_empty(device=device).to(memory_format=torch.channels_last)
        for tensor in network.requires_grad_(False).state_dict().values():
            tensor.zero_()  # else the system would not provide the memory
    latents, hints, context = blank_clip(model, frames, SIDE, SIDE, device, dtype)
    hints = hints.contiguous(memory_format=torch.channels_last)
    sample(model, latents, hints, context, 1)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def measured(frames: int) -> float:
    """The peak in GB of a process of this file."""
    command = [sys.executable, __file__, str(frames)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout) / GIGA


def main() -> None:
    print("Measured on the CPU, one step at 512x512, bfloat16:\n")
    peaks = [measured(frames) for frames in MEASURED]
    print_table(("frames", *MEASURED), [("peak, GB", *(f"{peak:.2f}" for peak in peaks))])
    slope = np.polyfit(MEASURED, peaks, 1)[0] * GIGA / MEGA
    print(f"\n{slope:.1f} MB per extra frame\n")

    print("Predicted for a GPU, sampling at 512x512, float16, in GB:\n")
    model, rows = without_weights(UNetConfig(), HINTS), []
    for name, offload in (("all on the GPU", "never"), ("skips outside", "always")):
        peaks = [sampling_peak(model, frames, SIDE, SIDE, offload=offload) / GIGA for frames in PREDICTED]
        rows.append((name, *(f"{peak:.1f}" for peak in peaks)))
    print_table(("frames", *PREDICTED), rows)
    print(f"\nTraining on 8 frames, bfloat16: {training_peak(model, 8, SIDE, SIDE) / GIGA:.1f} GB")


if __name__ == "__main__":
    measure(int(sys.argv[1])) if len(sys.argv) > 1 else main()
