"""Where to compute, and in which precision."""

import timeit
from functools import cache

import torch

from checkpoint import Model
from safe.devices import choose_device


def compute_device(name: str = "auto", training: bool = False) -> tuple[torch.device, torch.dtype]:
    """Where to compute, as `choose_device` says or refuses, and the precision of the networks there.

    A graphics card samples in float16. It trains in bfloat16, whose gradients cannot vanish in a small range, from
    Ampere (compute capability 8) on; older ones train in float16, where `train.train` scales the gradients.
    Apple's MPS samples in float16 and trains in float32: autocast has half precisions there, which nobody tried.
    """
    if (device := choose_device(name)).type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what stays float32
        torch.backends.cudnn.allow_tf32 = True
        # Some gradients of cuDNN's attention are not numbers (pytorch/pytorch#196678); torch has other kinds.
        torch.backends.cuda.enable_cudnn_sdp(not training)
        ampere = torch.cuda.get_device_capability(0) >= (8, 0)
        return device, torch.bfloat16 if training and ampere else torch.float16
    if device.type == "mps":
        return device, torch.float32 if training else torch.float16
    return device, torch.bfloat16 if has_fast_bfloat16() else torch.float32


def describe(model: Model) -> str:
    """Where a model computes, and how precisely, in words: "the CPU, bfloat16"."""
    weight = model.unet.conv_in.weight
    cuda = weight.device.type == "cuda"
    name = torch.cuda.get_device_name(weight.device) if cuda else f"the {weight.device.type.upper()}"
    return f"{name}, {str(weight.dtype).removeprefix('torch.')}"


@cache
def has_fast_bfloat16() -> bool:
    """Whether this processor has instructions for bfloat16, and they multiply matrices faster than in float32."""
    if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return False
    half, single = (torch.ones(512, 512, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    times = [min(timeit.repeat(lambda x=x: x @ x, number=1, repeat=5)) for x in (half, single)]
    return times[0] < times[1]
