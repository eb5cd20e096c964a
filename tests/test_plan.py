"""What a run is predicted to take of a graphics card that is not here, and that it runs there at all."""

from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import posecrafter
from beyond import plan
from beyond.plan import (
    CUDA,
    LiveMemory,
    networks_without_data,
    operations,
    part_of,
    sampling_peak,
    training_peak,
    without_data,
)
from controlnet import ControlNet
from posecrafter import invert, predict_noise
from slicing import Slicing, slices
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

GB = 1e9


@pytest.fixture(scope="module")
def full_size() -> SimpleNamespace:
    """Stable Diffusion 1.5's sizes, without weights."""
    with torch.device("meta"):
        return SimpleNamespace(
            unet=UNet(UNetConfig()), controlnet=ControlNet(UNetConfig()), vae=VAE(VAEConfig())
        )


def test_live_memory_counts_storages_once_and_forgets_the_dead():
    with LiveMemory(torch.device("cpu")) as watched:
        x = torch.zeros(1000)
        view = x[:500].view(10, 50)
        assert watched.live == 4000
        del x
        assert watched.live == 4000
        y = view + 1
        del view
        assert watched.live == 2000
        del y
    assert watched.live == 0
    assert watched.peak == 6000


@pytest.mark.parametrize("index", [0, None, slice(1, 3), (slice(None), 2), (slice(None), None, 1)])
def test_part_of_is_indexing(index):
    x = torch.arange(20).view(5, 4)
    assert torch.equal(part_of(x, index), x[index])


def test_mixed_devices_fail_as_on_a_card():
    with without_data(CUDA), pytest.raises(RuntimeError, match="device"):
        torch.empty(3, device=CUDA) + torch.empty(3)


@pytest.mark.slow
def test_sampling_at_512_fits_the_promised_memory(full_size):
    """The whole of `sample`, on tensors of a graphics card without data."""
    hundred = sampling_peak(full_size, 100, 64, 64)
    thousand = sampling_peak(full_size, 1000, 64, 64)
    outside = sampling_peak(full_size, 1000, 64, 64, offload="always")
    print(f"100 frames {hundred / GB:.2f} GB, 1000 {thousand / GB:.2f}, offloaded {outside / GB:.2f}")
    assert hundred <= 6 * GB
    assert thousand <= 24 * GB
    assert outside <= 12 * GB
    assert (thousand - hundred) / 900 <= 22e6


class NothingFromTheHost(TorchFunctionMode):
    """Fails where the host would wait for the card: in a copy between the two, lists made tensors included.

    (Reading a number off the card fails by itself where there is no data.)
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.tensor, torch.as_tensor, torch.scalar_tensor)
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        assert all(x.device == CUDA for x in tensors), function
        return result


@torch.inference_mode()
def test_the_host_never_waits_for_the_card_within_a_step(full_size):
    half, frame = {"device": CUDA, "dtype": torch.float16}, (320, 8, 8)
    with without_data(CUDA):
        networks = networks_without_data(full_size, **half)
        latents, context = torch.empty(5, 4, 8, 8, device=CUDA), torch.empty(77, 768, **half)
        hints = torch.empty(5, *frame, **half)
        with slices(Slicing(2 * 320 * 8 * 8)), NothingFromTheHost():
            noise = predict_noise(networks, latents, 501, context, hints)
        assert noise.shape == latents.shape and noise.device == CUDA
        with pytest.raises(AssertionError), NothingFromTheHost():
            torch.tensor([0.5], device=CUDA)


@torch.inference_mode()
def test_what_is_around_sampling_runs_on_a_card_too(full_size):
    """Encoding the reference, inverting it, decoding the result."""
    half = {"device": CUDA, "dtype": torch.float16}
    with without_data(CUDA) as memory:
        networks = networks_without_data(full_size, **half)
        with torch.device("meta"):
            vae = VAE(VAEConfig())
        weights = {name: torch.empty(t.shape, **half) for name, t in vae.state_dict().items()}
        vae.load_state_dict(weights, assign=True)
        vae.requires_grad_(False)
        mean, _ = vae.encode(torch.empty(1, 3, 512, 512, **half))
        hint, context = torch.empty(1, 320, 64, 64), torch.empty(77, 768, **half)
        with patch("posecrafter.check_finite"):  # which looks at numbers, and there are none
            trajectory = invert(networks, mean.float(), hint, context, 2)
        frames = vae.decode(trajectory[-1].to(**half).expand(2, -1, -1, -1))
        assert [x.device for x in (*trajectory, frames)] == 4 * [CUDA]
        assert frames.shape == (2, 3, 512, 512)
    assert memory.peak < 6 * GB


@pytest.mark.slow
def test_guidance_takes_hardly_more_memory(full_size):
    plain, guided = (sampling_peak(full_size, 8, 64, 64, guidance=g) for g in (1.0, 3.0))
    assert guided - plain < 0.05 * GB


def test_training_on_eight_frames_at_512_fits_the_promised_memory(full_size):
    peak = training_peak(full_size, 8, 64, 64)
    print(f"training {peak / GB:.2f} GB")
    assert peak <= 10 * GB


@pytest.mark.slow
def test_memory_is_a_constant_and_so_much_per_frame(full_size):
    """What predictions of long clips rest on."""
    few, more, most = (sampling_peak(full_size, n, 16, 16) for n in (16, 32, 48))
    assert most - more == pytest.approx(more - few, rel=0.02)


@pytest.mark.slow
def test_long_clips_are_predicted_as_if_all_of_their_frames_were_counted(full_size, monkeypatch):
    options = {"frames_per_slice": 12, "device": torch.device("cpu")}
    predicted = sampling_peak(full_size, 80, 8, 8, torch.float32, **options)
    monkeypatch.setattr(plan, "SLICES", 1000)  # so that no clip is long
    counted = sampling_peak(full_size, 80, 8, 8, torch.float32, **options)
    assert predicted == pytest.approx(counted, rel=0.02)


def test_a_long_clip_is_predicted_in_its_own_way(full_size, monkeypatch):
    """A card with little free memory takes other slices of long clips than of short ones."""
    ways = []
    monkeypatch.setattr(plan, "plans", lambda *args: [Slicing(8 * 320 * 64, args[2][0] > 100)])
    monkeypatch.setattr(plan, "sample", lambda *_, slicing, **__: ways.extend(slicing))
    sampling_peak(full_size, 400, 8, 8)
    assert ways and all(way.offload for way in ways)


@pytest.mark.slow
def test_training_on_small_frames_keeps_what_it_computed(full_size, monkeypatch):
    kept = training_peak(full_size, 2, 16, 16)
    monkeypatch.setattr(posecrafter, "LARGE", 0)
    assert kept - training_peak(full_size, 2, 16, 16) > 0.05 * GB


def test_operations_are_stable_diffusion_s(full_size):
    step, encoding, decoding = operations(full_size, 64, 64)
    assert step == pytest.approx(1.15e12, rel=0.02)
    assert encoding == pytest.approx(1.12e12, rel=0.02)
    assert decoding == pytest.approx(2.51e12, rel=0.02)


def test_predictions_leave_nothing_behind(full_size):
    sampling_peak(full_size, 2, 8, 8)
    assert torch.get_default_dtype() == torch.float32
    assert plan.torch.zeros(2)[None].shape == (1, 2)
