"""The same model, wider: a network with every hidden channel several times that predicts the same noise.

What a learning rate does depends on a network's width. A small model that is widened so can be fine-tuned at the
width of a large one whose weights are not at hand. The idea is Net2Net's (Chen et al. 2016).
"""

from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor

from controlnet import ControlNet
from unet import UNet


def copied(channels: int, times: int, together: int = 1) -> Tensor:
    """Which channel each channel of a wider network is a copy of: (channels * times,).

    Copies stand beside each other, so the groups of a group norm stay together. Heads are copied whole:
    `together` is then a head's number of channels.
    """
    return torch.arange(channels).view(-1, together).repeat_interleave(times, dim=0).flatten()


def share_out(weight: Tensor, times: int, together: int, random: torch.Generator) -> Tensor:
    """Weights (out, in, ...) for inputs of which each comes `times` times: (out, in * times, ...).

    The weights of an input's copies sum to the original. They are shared out unevenly, so that no two copies get
    the same gradient. Their variance is the one that layers with so many inputs usually have.
    """
    outputs, inputs = weight.shape[:2]
    spread = torch.randn(outputs, inputs // together, times, together, generator=random)
    spread = times**0.5 * (spread - spread.mean(dim=2, keepdim=True))
    shares = (1 + spread) / times
    weight = weight.reshape(outputs, inputs // together, 1, together, -1) * shares[..., None]
    return weight.flatten(1, 3)


def widened_tensor(
    name: str, tensor: Tensor, shape: torch.Size, times: int, heads: int, random: torch.Generator
) -> Tensor:
    """What a tensor becomes in a network `times` as wide, where it has this shape."""
    if len(tensor) != shape[0]:
        of_heads = name.endswith(("to_q.weight", "to_k.weight", "to_v.weight"))
        tensor = tensor[copied(len(tensor), times, len(tensor) // heads if of_heads else 1)]
    if tensor.shape == shape:
        return tensor.clone()
    if "time_embedding.linear_1" in name:  # every `times`-th sinusoid is one of the original's
        wide = torch.zeros(shape)
        wide[:, ::times] = tensor
        return wide
    together = tensor.shape[1] // heads if ".to_out." in name else 1
    return share_out(tensor, times, together, random).view(shape)


def widen(model, times: int, seed: int = 0) -> SimpleNamespace:
    """A model whose UNet and ControlNet are `times` as wide, have as many more heads, and compute the same.

    model: `unet` and `controlnet` have the same config and float32 weights; both models share all other parts. The
    new networks are frozen.
    """
    config, random = model.unet.config, torch.Generator().manual_seed(seed)
    widths = tuple(times * width for width in config.widths)
    wide = replace(config, widths=widths, heads=times * config.heads)
    with torch.device("meta"):
        hint_widths = model.controlnet.controlnet_cond_embedding.widths
        networks = {"unet": UNet(wide), "controlnet": ControlNet(wide, hint_widths)}
    for part, network in networks.items():
        tensors = getattr(model, part).state_dict()
        for name, tensor in network.state_dict().items():
            shape = tensor.shape
            tensors[name] = widened_tensor(name, tensors[name], shape, times, config.heads, random)
        network.load_state_dict(tensors, assign=True)
        start_temporal_attention(network)
        network.eval().requires_grad_(False)
    return SimpleNamespace(**vars(model) | networks)


def start_temporal_attention(network: UNet | ControlNet) -> None:
    """Makes it what fine-tuning finds in a new model: a copy of the key-frame attention beside it."""
    tensors = network.state_dict()
    for name, tensor in tensors.items():
        if ".attn_temp." in name:
            tensor.copy_(tensors[name.replace(".attn_temp.", ".attn1.")])
