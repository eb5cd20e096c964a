"""The bench of learning rates: wider networks compute the same, and the public code's clipping is emulated."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from weights import fill

from bench.learning_rate import SCALE, clip_as_the_public_code
from bench.widen import share_out, start_temporal_attention, widen
from controlnet import ControlNet
from posecrafter import predict_noise, trainable_parameters, training_loss
from unet import UNet, UNetConfig

CONFIG = UNetConfig(widths=(16, 32, 32, 48), layers_per_block=1, context_dim=24, heads=4, norm_groups=8)


@pytest.fixture
def model() -> SimpleNamespace:
    """Small networks in which nothing is zero, the convolutions behind temporal attention included."""
    networks = {"unet": UNet(CONFIG), "controlnet": ControlNet(CONFIG, (8, 16, 24))}
    for network in networks.values():
        network.load_state_dict(fill({n: t.shape for n, t in network.state_dict().items()}))
        start_temporal_attention(network)
        network.eval().requires_grad_(False)
    return SimpleNamespace(**networks, name="small")


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, control images and a context."""
    random = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 4, 16, 16, generator=random)
    hints = torch.rand(3, 3, 64, 64, generator=random)
    return latents, hints, torch.randn(7, 24, generator=random)


@pytest.mark.parametrize("times", [2, 3])
@torch.no_grad()
def test_a_widened_model_predicts_the_same_noise(model, inputs, times):
    latents, images, context = inputs
    wide = widen(model, times)
    assert wide.unet.config.widths == tuple(times * width for width in CONFIG.widths)
    assert wide.name == model.name
    expected = predict_noise(model, latents, 481, context, model.controlnet.embed_hint(images))
    predicted = predict_noise(wide, latents, 481, context, wide.controlnet.embed_hint(images))
    torch.testing.assert_close(predicted, expected, rtol=0, atol=1e-4)


def test_shared_out_weights_sum_to_the_original_and_keep_a_layers_usual_variance():
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 32, generator=random)
    wide = share_out(weight, 4, 8, random)
    sums = wide.view(64, 4, 4, 8).sum(dim=2).flatten(1)  # (out, heads, copies, channels of a head)
    torch.testing.assert_close(sums, weight, rtol=0, atol=1e-5)
    assert wide.square().mean().item() == pytest.approx(weight.square().mean().item() / 4, rel=0.1)


def test_copies_of_a_channel_get_different_gradients(model, inputs):
    latents, images, context = inputs
    wide = widen(model, 2)
    hints = wide.controlnet.embed_hint(images)
    weight = wide.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_out[0].weight
    weight.requires_grad_(True)
    training_loss(wide, latents, hints, context, 481, torch.ones_like(latents)).backward()
    first, second = weight.grad[0::2], weight.grad[1::2]
    assert (first - second).norm() > 0.3 * first.norm()


def test_clipping_as_the_public_code_is_scaling_all_and_unscaling_what_is_trained(model, inputs):
    latents, images, context = inputs
    trained = list(trainable_parameters(model).values())
    every = list(nn.ModuleList([model.unet, model.controlnet]).requires_grad_(True).parameters())
    frozen = [parameter for parameter in every if not any(parameter is p for p in trained)]
    hints = model.controlnet.embed_hint(images)
    training_loss(model, latents, hints, context, 481, torch.ones_like(latents)).backward()
    clean = [parameter.grad.clone() for parameter in trained]
    clip_as_the_public_code(trained, frozen)
    emulated = [parameter.grad.clone() for parameter in trained]

    for parameter, gradient in zip(trained, clean):  # the real thing, with what is unscaled
        parameter.grad = gradient.clone()
    for parameter in frozen:
        parameter.grad *= SCALE
    nn.utils.clip_grad_norm_(every, 1.0)
    for parameter, gradient, original in zip(trained, emulated, clean):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=0)
        assert gradient.norm() < 10 * original.norm() / SCALE
