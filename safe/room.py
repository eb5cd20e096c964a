"""Whether memory and disk can hold what is asked for, before it is begun."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from safe.files import require_space


def free_memory(device: torch.device) -> float:
    """Bytes that this process may still take on a device; infinite where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [float("inf")]
    with suppress(OSError, StopIteration):  # Linux
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable"))
        limits.append(1024 * int(available.split()[1]))
    with suppress(OSError, ValueError):  # a container; "max" where it has no limit
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    with suppress(AttributeError, ValueError):  # other Unix
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(ImportError):  # `ulimit -v`
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        limits.append(limit if limit != resource.RLIM_INFINITY else float("inf"))
    return min(limits)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a graphics card had too little memory: for PyTorch, or for the libraries and the driver below it."""
    signs = (
        "CUDA error: out of memory",
        "MPS backend out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_ALLOC_FAILED",
        "unable to find an engine",  # cuDNN, after none of its ways to convolve got the memory it wants
    )
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)


def require_memory(device: torch.device, needed: float, frames: str, instead: str) -> None:
    """Raises MemoryError where a device has fewer bytes free than these frames need."""
    if needed > (free := free_memory(device)):
        sizes = f"at least {needed / 1e9:.1f} GB of memory, but only {free / 1e9:.1f} GB are free"
        raise MemoryError(f"{frames} need {sizes}; give {instead}")


def require_memory_for_frames(model, device: torch.device, dtype: torch.dtype, shape: tuple) -> None:
    """Raises MemoryError where so many frames, (N, H, W), cannot be encoded on a device with what is free."""
    number, height, width = shape
    # The VAE takes one frame at a time; the least that it holds are two maps of full resolution.
    needed = height * width * (3 * number + 2 * model.vae.config.widths[0] * dtype.itemsize)
    require_memory(device, needed, f"{number} frames of {width}x{height}", "a smaller --size")


def require_space_for_training(checkpoint: Path, trained: Iterable[Tensor], frames: np.ndarray) -> None:
    """Raises OSError where the disk cannot hold what training writes beside its checkpoint."""
    # Each trained number and its two moments, in float32; the next checkpoint is written beside the last.
    state = 3 * 4 * sum(tensor.numel() for tensor in trained)
    require_space(checkpoint.parent, (1 if checkpoint.exists() else 2) * state + 2 * frames.nbytes)


def require_memory_for_footage(path: Path, shape: tuple) -> None:
    """Raises MemoryError where frames of this shape, (F, H, W, 3) in uint8, cannot be read with what is free."""
    number, height, width, _ = shape
    # While it decodes, libav holds four frames at the least, most in 1.5 bytes a pixel.
    needed = height * width * (3 * number + 4 * 1.5)
    frames = f"{path}: {number} frames of {width}x{height}"
    require_memory(torch.device("cpu"), needed, frames, "a shorter --range")
