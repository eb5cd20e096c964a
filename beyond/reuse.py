"""Fewer whole steps: what the networks see at their coarser levels is taken from an earlier step.

Between neighbouring steps those maps change little (Ma et al., CVPR 2024, "DeepCache"). So every N-th step is
whole, and the others compute the finest level of ControlNet and UNet alone. This is not exact.
"""

from collections.abc import Callable
from itertools import islice

import torch
from torch import Tensor

import posecrafter
from slicing import Offloaded, by_frames, stored
from unet import Context, clip_norm, prepare_inputs
import torch.nn.functional as F


def reuse_deep_maps(every: int, timesteps: list[int]) -> Callable:
    """A `predict_noise` for sampling at these timesteps, of which every `every`-th is computed whole.

    It keeps one map of the UNet's finest level for the whole clip and each context, in the host's memory where
    skips wait there.
    """
    deep: dict[Context, Tensor | Offloaded] = {}
    whole = posecrafter.predict_noise

    def predict(model, latents: Tensor, timestep: int, context: Context, hints) -> Tensor:
        if timestep in timesteps and timesteps.index(timestep) % every and context in deep:
            return finest_level(model, latents, timestep, context, hints, deep[context])

        def keep(block, inputs, output: Tensor) -> None:
            deep[context] = stored(output.clone())

        hook = model.unet.up_blocks[-2].register_forward_hook(keep)
        try:
            return whole(model, latents, timestep, context, hints)
        finally:
            hook.remove()

    return predict


def finest_level(model, latents, timestep, context, hints, deep) -> Tensor:
    """`predict_noise` by the finest level, given what the decoder's coarser levels made in another step."""
    inputs, unet = posecrafter.network_inputs(model), model.unet
    x = latents.to(**inputs)
    if isinstance(hints, Tensor):
        hints = hints.to(**inputs)
    control = model.controlnet(x, timestep, context, hints)  # computes no more than is asked for
    x, timestep, context = prepare_inputs(x, timestep, context)
    time = unet.time_embedding(timestep)
    x = by_frames(unet.conv_in, x)
    skips = [stored(next(control).add_(x))]
    for x in islice(unet.down_blocks[0](x, time, context), unet.config.layers_per_block):
        skips.append(stored(next(control).add_(x)))
    skips.append(deep[slice(0, len(deep))] if isinstance(deep, Offloaded) else deep)
    x = unet.up_blocks[-1](skips, time, context)
    norm = clip_norm(unet.conv_norm_out, len(time), x)
    return by_frames(lambda x: unet.conv_out(F.silu(norm(x))), x).float()
