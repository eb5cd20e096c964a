"""Which device `--device` means, and whether the machine has it."""

import os
import shutil

import torch

CUDA_BUILD = "torch was built without CUDA; install its CUDA build to use this machine's NVIDIA card"
# Why a device can be missing, though somebody asks for it by its name.
MISSING = {
    "cuda": "no CUDA card that this torch can use",
    "mps": "no Apple GPU that this torch can use, which takes a Mac with Apple silicon and macOS 14 or newer",
}


def choose_device(name: str = "auto") -> torch.device:
    """The device that `--device` names, one of `safe.arguments.DEVICES`; "auto": the first of those that is there.

    Raises ValueError for one that is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    other_build = not there["cuda"] and torch.version.cuda is None and shutil.which("nvidia-smi")
    if name == "auto":
        name = next(kind for kind, available in there.items() if available)
        if other_build:
            print(CUDA_BUILD)
    elif not there[name]:
        why = CUDA_BUILD if name == "cuda" and other_build else MISSING[name]
        raise ValueError(f"--device {name}: {why}; leave it out, or give another")
    if name == "cpu":
        return torch.device("cpu")
    # Each of torchrun's processes has a card of its own. The number is given as tensors give theirs.
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else 0)
