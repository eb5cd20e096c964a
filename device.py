"""Where to compute, and in which precision."""

import shutil
import time
from functools import cache

import torch

from checkpoint import Model


def compute_device(training: bool = False) -> tuple[torch.device, torch.dtype]:
    """Where to compute, and the precision of the networks there.

    On a graphics card float16 to sample. To train bfloat16, whose gradients cannot vanish in a small range; but
    float16 on cards before Ampere (compute capability 8), which have no bfloat16: `train.train` then scales
    gradients. On a CPU bfloat16 where that is the faster, else float32.
    """
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # TF32 for what stays float32
        torch.backends.cudnn.allow_tf32 = True
        # Of cuDNN's attention some gradients are not numbers (pytorch/pytorch#196678); torch has others.
        torch.backends.cuda.enable_cudnn_sdp(not training)
        ampere = torch.cuda.get_device_capability(0) >= (8, 0)
        dtype = torch.bfloat16 if training and ampere else torch.float16
        return torch.device("cuda", 0), dtype
    if torch.version.cuda is None and shutil.which("nvidia-smi"):
        print(
            "this machine has an NVIDIA card, but this PyTorch was built without CUDA: computing on the CPU; "
            "install the CUDA build of torch to use the card"
        )
    return torch.device("cpu"), torch.bfloat16 if has_fast_bfloat16() else torch.float32


def describe(model: Model) -> str:
    """Where a model computes, and how precisely, in words: "the CPU, bfloat16"."""
    weight = model.unet.conv_in.weight
    cuda = weight.device.type == "cuda"
    name = torch.cuda.get_device_name(weight.device) if cuda else f"the {weight.device.type.upper()}"
    return f"{name}, {str(weight.dtype).removeprefix('torch.')}"


@cache
def has_fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices faster than float32 ones: has the instructions
    for it, and was seen to use them."""
    if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return False

    def seconds(dtype: torch.dtype) -> float:
        matrix, times = torch.ones(512, 512, dtype=dtype), []
        for _ in range(5):
            start = time.perf_counter()
            torch.mm(matrix, matrix)
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(torch.bfloat16) < seconds(torch.float32)
