"""`--reuse N`: only every N-th step is computed whole; the others take the deep map from the last whole one.

From one step to the next, what the networks see at their coarser levels changes little (Ma et al., CVPR 2024,
"DeepCache"). So between whole steps only the finest level of ControlNet and UNet is computed, and the decoder's
finest level reads what the coarser ones made before. It is not exact; docs/BEYOND.md has what it costs and saves.
"""

from collections.abc import Callable
from itertools import islice
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.nn import functional as F

from posecrafter import ddim_timesteps, network_inputs, predict_noise
from slicing import Offloaded, by_frames, stored
from unet import Context, clip_norm, prepare_inputs


def reuse_deep_maps(every: int, steps: int) -> Callable[..., Tensor]:
    """A `predict_noise` for `sample` with so many steps: the first and every `every`-th after it are whole.

    For each context it keeps one map of the clip, (F, widths[1], h, w), in the host's memory where skips wait.
    """
    deep: WeakKeyDictionary[Context, Tensor | Offloaded] = WeakKeyDictionary()
    whole = set(ddim_timesteps(steps)[::every])

    def predict(model, latents: Tensor, timestep: int, context: Context, hints) -> Tensor:
        if timestep not in whole and context in deep:
            return finest_level(model, latents, timestep, context, hints, deep[context])

        def keep(block, inputs: tuple, made: Tensor) -> None:
            deep[context] = stored(made)

        deep.pop(context, None)  # before there is another
        hook = model.unet.up_blocks[-2].register_forward_hook(keep)
        try:
            return predict_noise(model, latents, timestep, context, hints)
        finally:
            hook.remove()

    return predict


Map = Tensor | Offloaded


def finest_level(model, latents: Tensor, timestep: int, context: Context, hints: Map, deep: Map) -> Tensor:
    """`predict_noise`, given the map `deep` that the decoder's finest level gets from below."""
    unet, x = model.unet, latents.to(**network_inputs(model))
    if isinstance(hints, Tensor):
        hints = hints.to(**network_inputs(model))
    residuals = model.controlnet(x, timestep, context, hints)  # computes no more than is asked for
    x, timestep, context = prepare_inputs(x, timestep, context)
    time = unet.time_embedding(timestep)

    x = by_frames(unet.conv_in, x)
    skips = [stored(next(residuals).add_(x))]
    for feature_map in islice(unet.down_blocks[0](x, time, context), unet.config.layers_per_block):
        skips.append(stored(next(residuals).add_(feature_map)))
    skips.append(deep)
    x = unet.up_blocks[-1](skips, time, context)
    norm = clip_norm(unet.conv_norm_out, len(time), x)
    return by_frames(lambda x: unet.conv_out(F.silu(norm(x))), x).float()
