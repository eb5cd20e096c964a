"""Small networks on any device and in any precision, against the CPU in float32: for `card.py` and the tests."""

import copy
from collections.abc import Callable
from functools import cache, partial
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.common import random_weights
from controlnet import ControlNet
from posecrafter import invert, predict_noise, sample, trainable_parameters
from slicing import Slicing, slices
from train import autocast_loss
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

# Heads are 40, 80 and 160 wide, as in Stable Diffusion 1.5, so a GPU takes the same kernels.
SMALL = UNetConfig(widths=(80, 160, 320, 320), context_dim=24, heads=2, norm_groups=8)
WHOLE = Slicing(2**40)  # the clip in one slice
SLICED, OFFLOADED = Slicing(2**13), Slicing(2**13, offload=True)  # one frame of the finest maps
LOSS_SCALE = 1024  # keeps float16 gradients above the smallest numbers; exact, as a power of two
# For training, as `compute_device` has it: some gradients of cuDNN's attention are not numbers. The backward pass
# belongs inside, because activations that it recomputes must be those of the forward pass.
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
without_cudnn_attention = partial(sdpa_kernel, KERNELS)


def without_weights(
    config: UNetConfig, hint_widths: tuple[int, ...], vae: VAEConfig | None = None
) -> SimpleNamespace:
    """UNet, ControlNet, and a VAE if its config is given, on the meta device."""
    with torch.device("meta"):
        model = SimpleNamespace(unet=UNet(config), controlnet=ControlNet(config, hint_widths))
        return SimpleNamespace(**vars(model), vae=VAE(vae)) if vae else model


def with_random_weights(model, dtype: torch.dtype, device: torch.device) -> SimpleNamespace:
    """Fills a model that is on the meta device: with the same weights on every device."""
    for seed, network in enumerate(vars(model).values()):
        random_weights(network, seed, dtype).to(device, memory_format=torch.channels_last)
    return model


def prepare_training(model) -> dict[str, nn.Parameter]:
    """The trained parameters by name, in float32 and requiring gradients, as `train.train` has them."""
    trained = trainable_parameters(model)
    for parameter in trained.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return trained


@cache
def small_model(config: UNetConfig, device: torch.device, dtype: torch.dtype) -> SimpleNamespace:
    """Small networks in which every layer counts: `random_weights` leaves the temporal ones at zero."""
    model = with_random_weights(without_weights(config, (8, 8, 16, 32)), dtype, device)
    random = torch.Generator().manual_seed(0)
    for parameter in trainable_parameters(model).values():
        scale = 0.5 * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        parameter.data.copy_(scale * torch.randn(parameter.shape, generator=random))
    return model


@torch.no_grad()
def small_inputs(model) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents and noise (5, 4, 16, 12), context (7, C), and hints, embedded and in the host's memory."""
    random = torch.Generator().manual_seed(1)
    weight = model.unet.conv_in.weight
    latents, noise = torch.randn(2, 5, 4, 16, 12, generator=random).to(weight.device)
    context = torch.randn(7, model.unet.config.context_dim, generator=random).to(weight)
    images = torch.rand(5, 3, 128, 96, generator=random).to(weight)
    return latents, noise, context, model.controlnet.embed_hint(images).cpu()


def one_noise(model, way: Slicing) -> list[Tensor]:
    latents, _, context, hints = small_inputs(model)
    with torch.inference_mode(), slices(way):
        return [predict_noise(model, latents, 501, context, hints)]


def one_clip(model, way: Slicing) -> list[Tensor]:
    latents, _, context, hints = small_inputs(model)
    with slices(way):
        noise = invert(model, latents[:1], hints[:1], context, 4)[-1]
    return [noise, sample(model, noise.repeat(5, 1, 1, 1), hints, context, 4, slicing=[way])]


def loss_and_gradients(model, way: Slicing) -> list[Tensor]:
    """The way plays no part: where gradients are recorded, there is one slice."""
    model = copy.deepcopy(model)
    latents, noise, context, hints = small_inputs(model)
    parameters = prepare_training(model).values()
    with without_cudnn_attention():
        loss = autocast_loss(model, latents, hints, context, 501, noise)
        (LOSS_SCALE * loss).backward()
    return [loss.detach(), *(p.grad / LOSS_SCALE for p in parameters)]


CHECKS: dict[str, tuple[Callable[..., list[Tensor]], Slicing]] = {
    "one noise prediction": (one_noise, WHOLE),
    "the same in slices": (one_noise, SLICED),
    "the same in slices, skips offloaded": (one_noise, OFFLOADED),
    "inversion and sampling, 4 steps": (one_clip, WHOLE),
    "the same in slices, skips and hints offloaded": (one_clip, OFFLOADED),
    "training loss and gradients": (loss_and_gradients, WHOLE),
}


@cache
def reference(compute: Callable[..., list[Tensor]], config: UNetConfig) -> list[Tensor]:
    """The results on the CPU in float32, the clip in one slice."""
    return compute(small_model(config, torch.device("cpu"), torch.float32), WHOLE)


def difference(check: str, device: torch.device, dtype: torch.dtype, config: UNetConfig = SMALL) -> float:
    """The largest difference of a check's results from those of the CPU in float32; NaN if there is a NaN.

    Relative to the largest number of each result. Of several results, such as gradients, the worst counts.
    From then on float32 is multiplied without TF32, which would round it to 10 bits.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    compute, way = CHECKS[check]
    found, exact = compute(small_model(config, device, dtype), way), reference(compute, config)
    pairs = ((ours.float().cpu(), theirs) for ours, theirs in zip(found, exact, strict=True))
    differences = [(ours - theirs).abs().max() / theirs.abs().max() for ours, theirs in pairs]
    return torch.stack(differences).max().item()
