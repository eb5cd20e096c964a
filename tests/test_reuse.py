"""Steps that take the deep map of an earlier one."""

import pytest
import torch

from beyond.reuse import finest_level, reuse_deep_maps
from checkpoint import load_model
from posecrafter import predict_noise, sample
from slicing import Slicing, slices, stored
from unet import Context

SIZE = 64


@pytest.fixture(scope="module")
def model():
    return load_model("demo")


@pytest.fixture(scope="module")
def clip(model):
    """Latents, hints and two contexts of three frames."""
    random = torch.Generator().manual_seed(0)
    config, side = model.unet.config, SIZE // model.vae.config.factor
    shapes = (
        (3, config.in_channels, side, side),
        (3, config.widths[0], side, side),
        (2, 77, config.context_dim),
    )
    return [torch.randn(shape, generator=random) for shape in shapes]


@pytest.mark.parametrize("way", [Slicing(), Slicing(numbers=1), Slicing(numbers=1, offload=True)])
@torch.no_grad()
def test_the_finest_level_with_a_steps_own_deep_map_is_the_whole_step(model, clip, way):
    latents, hints, (context, _) = clip
    context, deep = Context(context), []
    hook = model.unet.up_blocks[-2].register_forward_hook(lambda block, inputs, x: deep.append(stored(x)))
    with slices(way):
        whole = predict_noise(model, latents, 501, context, hints)
        hook.remove()
        torch.testing.assert_close(finest_level(model, latents, 501, context, hints, *deep), whole)


@pytest.mark.parametrize("guidance, whole", [(1, 3), (3, 6)])
def test_one_step_in_so_many_is_whole_and_the_clip_hardly_changes(model, clip, guidance, whole):
    latents, hints, contexts = clip
    context, empty = contexts
    exact = sample(model, latents, hints, context, 5, guidance, empty)
    steps = []
    hook = model.unet.mid_block.register_forward_hook(lambda block, inputs, x: steps.append(len(x)))
    reused = sample(model, latents, hints, context, 5, guidance, empty, predictor=reuse_deep_maps(2, 5))
    hook.remove()
    assert steps == [len(latents)] * whole
    assert 0 < (reused - exact).norm() < 0.2 * exact.norm()
