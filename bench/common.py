"""What the measurements share: random weights, timing and tables.

Imports nothing else of this project, because `step.py` also runs it with the public code's interpreter.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
MEGA, GIGA, TERA = 1e6, 1e9, 1e12
WIDTHS, HINTS = (320, 640, 1280, 1280), (16, 32, 96, 256)  # Stable Diffusion 1.5's


def random_weights(network: nn.Module, seed: int, dtype: torch.dtype) -> nn.Module:
    """Fills a network, in place, with weights that keep the scale of its signals: the same for the same names."""
    network = network.to(dtype).to_empty(device="cpu")
    for name, tensor in sorted(network.state_dict().items()):
        random = torch.Generator().manual_seed(seed + sum(name.encode()) * len(name))
        if "_temp." in name or tensor.ndim == 1:
            tensor.fill_(float("norm" in name and name.endswith("weight")))
        else:
            weights = torch.empty(tensor.shape).uniform_(-1, 1, generator=random)
            tensor.copy_((weights * (3 / tensor[0].numel()) ** 0.5).bfloat16())
    return network.eval().requires_grad_(False)


def seconds(work: Callable[[], object], device: str | torch.device = "cpu") -> float:
    """How long one call takes, until the device has finished it."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    """The lines of a Markdown table, each as soon as its row is known."""
    for cells in chain([head, ["---"] * len(head)], rows):
        yield f"| {' | '.join(map(str, cells))} |"


def print_table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> None:
    for line in table(head, rows):
        print(line, flush=True)
