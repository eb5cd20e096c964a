"""What processes that share a clip send each other in a step, and what sharing costs: `python bench/ranks.py`.

The bytes are counted on tensors without data, at Stable Diffusion 1.5's sizes and 512x512 pixels in float16.
What they take is predicted from the speed of a link. `--cpu` measures two processes of one thread against one, on
small networks; their processor time says what sharing costs even where the processors have other work.
"""

import statistics
import sys
import time
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import GIGA, HINTS, MEGA, print_table
from bench.equal import SMALL, with_random_weights, without_weights
from beyond.plan import blank_clip
from beyond.ranks import Share, evenly
from posecrafter import finest_map, predict_noise, sample
from slicing import Slicing, plans, slices
from unet import UNetConfig

SIDE, FRAMES = 64, 100
LINKS = {"NVLink, 300 GB/s": 300, "PCIe 4, 25 GB/s": 25}  # each way, of one card


def bytes_sent(ranks: int) -> dict[str, int]:
    """What the first process sends in one step, by operation; the others send less, as they broadcast nothing."""
    sent, counts = {}, tuple(evenly(FRAMES, ranks))

    def count(operation, *arguments) -> None:
        tensor = arguments[0 if operation is dist.broadcast else 1]
        numbers = tensor.numel() * (ranks - 1 if operation is dist.all_gather else 1)
        if operation is dist.all_to_all_single:
            numbers -= arguments[3][0]  # its own part stays
        sent[operation.__name__] = sent.get(operation.__name__, 0) + numbers * tensor.element_size()

    model, meta = without_weights(UNetConfig(), HINTS), torch.device("meta")
    for network in (model.unet, model.controlnet):
        network.half()
    latents, hints, context = blank_clip(model, FRAMES, SIDE, SIDE, meta, torch.float16)
    share = Share(counts, 0)
    slicing = Slicing(8 * 320 * SIDE**2, share=share)
    with torch.no_grad(), slices(slicing), patch("beyond.ranks.exchange", count):
        own = share.own(latents)
        share.whole(predict_noise(model, own, 1, context, hints[share.frames]))
    return sent


def small_clip(share: Share | None, frames: int, side: int, steps: int) -> tuple[float, float]:
    """Seconds, on the wall and of this processor, for so many steps."""
    model = with_random_weights(without_weights(SMALL, (8, 8, 16, 32)), torch.float32, torch.device("cpu"))
    latents, hints, context = blank_clip(model, frames, side, side, torch.device("cpu"))
    hints = hints[share.frames] if share else hints
    (way,) = plans(torch.device("cpu"), torch.float32, finest_map(model, latents))
    start = time.perf_counter(), time.process_time()
    sample(model, latents, hints, context, steps, slicing=[Slicing(way.numbers, share=share)])
    return time.perf_counter() - start[0], time.process_time() - start[1]


def take_part(rank: int, ranks: int, port: int, results, *sizes: int) -> None:
    torch.set_num_threads(1)
    share = None
    if ranks > 1:
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks)
        share = Share(tuple(evenly(sizes[0], ranks)), rank)
    results.put(small_clip(share, *sizes))


def measure(rounds: int = 5, frames: int = 16, side: int = 32, steps: int = 2) -> None:
    """Two processes against one, in turn; medians."""
    ratios = []
    for i in range(rounds):
        walls, processors = [], []
        for ranks in (1, 2):
            results = multiprocessing.get_context("spawn").SimpleQueue()
            arguments = ranks, 29600 + i, results, frames, side, steps
            multiprocessing.spawn(take_part, arguments, ranks)
            found = [results.get() for _ in range(ranks)]
            walls.append(max(wall for wall, _ in found))
            processors.append(sum(processor for _, processor in found))
        ratios.append((walls[0] / walls[1], processors[1] / processors[0]))
        took = f"{walls[0]:.1f} s alone, {walls[1]:.1f} s of two"
        print(f"{took}; processor time {ratios[-1][1]:.2f} times", flush=True)
    faster, more = (statistics.median(each) for each in zip(*ratios))
    print(f"medians: {faster:.2f} times as fast, {more:.2f} times the processor time")


def main() -> None:
    rows = []
    for ranks in (2, 4, 8):
        sent = bytes_sent(ranks)
        total, own = sum(sent.values()), evenly(FRAMES, ranks)[0]
        per_frame = total / own / MEGA
        times = [f"{total / GIGA / speed * 1000:.0f}" for speed in LINKS.values()]
        parts = [f"{sent[name] / MEGA:.0f}" for name in sorted(sent)]
        rows.append((ranks, *parts, f"{total / GIGA:.2f}", f"{per_frame:.1f}", *times))
    names = [name.removesuffix("_single") for name in sorted(sent)]
    links = [f"ms on {link}" for link in LINKS]
    print(f"{FRAMES} frames, sent by the first process in a step:\n")
    print_table(("processes", *(f"{name}, MB" for name in names), "GB", "MB per own frame", *links), rows)


if __name__ == "__main__":
    measure() if "--cpu" in sys.argv else main()
