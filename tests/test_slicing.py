"""A clip in slices is the clip at once: any frames, sizes, slices, and wherever the skips wait."""

import random as dice
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from test_networks import SHARED, SMALL, SMALL_HINTS, filled, random, worst
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import posecrafter
import slicing
from controlnet import ControlNet
from slicing import (
    Offloaded,
    Slicing,
    by_frames,
    by_locations,
    channel_moments,
    finish_fetching,
    frugally,
    plans,
    slices,
)
from unet import Context, UNet, UNetConfig

WHOLE = 2**40  # numbers in a slice that no clip here has


@pytest.fixture(scope="module")
def networks() -> tuple[UNet, ControlNet]:
    controlnet = ControlNet(SMALL, SMALL_HINTS)
    return filled(UNet(SMALL), "unet."), filled(controlnet, "controlnet.")


@torch.no_grad()
def predict(networks, latents, timestep, context, hint, **settings) -> Tensor:
    unet, controlnet = networks
    """The noise; the hint is a control image."""
    with slices(Slicing(**settings)):
        hint = controlnet.embed_hint(hint)
        return unet(latents, timestep, context, controlnet(latents, timestep, context, hint))


def predict_with_gradients(networks, *inputs) -> Tensor:
    """The path that training takes: the clip at once, and plain group norms."""
    unet, controlnet = networks
    with torch.enable_grad():
        return unet(*inputs[:3], controlnet(*inputs[:3], controlnet.embed_hint(inputs[3]))).detach()


# ---- The same result ----------------------------------------------------------------------------


@pytest.mark.parametrize("numbers", [1, 5000, 20000, WHOLE])
@pytest.mark.parametrize("offload", [False, True])
def test_in_slices_the_noise_is_controlvideo_s(networks, numbers, offload):
    path = SHARED / "oracle" / "controlvideo.safetensors"
    if not path.exists():
        pytest.skip(f"no {path}")
    from safetensors.torch import load_file

    oracle = load_file(path)
    latents, hint, expected = (oracle[name][0].transpose(0, 1) for name in ("latents", "hint", "eps.501"))
    inputs = latents, 501, oracle["context"][0], hint
    sliced = predict(networks, *inputs, numbers=numbers, offload=offload)
    assert worst(sliced, predict_with_gradients(networks, *inputs)) < 1e-5
    assert worst(sliced, expected) < 1e-4


@pytest.mark.parametrize("seed", range(12))
def test_slices_change_nothing_whatever_the_network_the_clip_and_their_size(seed):
    dice.seed(seed)
    levels = dice.choice([2, 3])
    config = UNetConfig(
        widths=tuple(dice.choice([16, 24, 32]) for _ in range(levels)),
        layers_per_block=dice.choice([1, 2]),
        context_dim=12,
        heads=dice.choice([1, 2, 4]),
        norm_groups=dice.choice([2, 4, 8]),
    )
    networks = filled(UNet(config), "unet."), filled(ControlNet(config, (4, 8)), "controlnet.")
    frames, height, width = dice.randint(1, 7), dice.randint(3, 9), dice.randint(3, 9)
    latents, context = random(frames, 4, height, width, seed=seed), random(5, 12, seed=seed + 1)
    inputs = latents, dice.randrange(1000), context, random(frames, 3, 2 * height, 2 * width)
    expected = predict_with_gradients(networks, *inputs)
    for _ in range(3):
        settings = {"numbers": dice.randint(1, 8000), "offload": dice.random() < 0.3}
        assert worst(predict(networks, *inputs, **settings), expected) < 1e-5, settings


def test_several_clips_in_slices_are_each_as_alone(networks):
    latents, hints, contexts = random(6, 4, 8, 8), random(6, 3, 64, 64), random(3, 7, 24)
    timesteps = torch.tensor([3, 400, 999])
    together = predict(networks, latents, timesteps, contexts, hints, numbers=1000)
    for i in range(3):
        clip = slice(2 * i, 2 * i + 2)
        alone = predict(networks, latents[clip], timesteps[i].item(), contexts[i], hints[clip])
        assert worst(together[clip], alone) < 1e-5


@pytest.mark.parametrize("offload", [False, True])
def test_several_clips_at_one_timestep_are_each_as_alone(networks, offload):
    latents, hints, contexts = random(4, 4, 8, 8), random(4, 3, 64, 64), random(2, 7, 24)
    together = predict(networks, latents, 501, contexts, hints, numbers=1000, offload=offload)
    for i in range(2):
        clip = slice(2 * i, 2 * i + 2)
        alone = predict(networks, latents[clip], 501, contexts[i], hints[clip])
        assert worst(together[clip], alone) < 1e-5


def test_half_precision_keeps_its_precision_in_slices(networks):
    """bfloat16 in slices is as close to float32 as bfloat16 at once."""
    inputs = random(5, 4, 8, 8), 501, random(7, 24), random(5, 3, 64, 64).sigmoid()
    exact = predict(networks, *inputs)
    short = [x.bfloat16() if isinstance(x, Tensor) else x for x in inputs]
    for network in networks:
        network.bfloat16()
    at_once = (predict_with_gradients(networks, *short).float() - exact).square().mean().sqrt()
    in_slices = (predict(networks, *short, numbers=9000).float() - exact).square().mean().sqrt()
    for network in networks:
        network.float()
    assert in_slices < 1.1 * at_once


def test_without_control_the_skips_are_the_encoder_s_own_maps(networks):
    unet, inputs = networks[0], (random(3, 4, 8, 8), 501, random(7, 24))
    with torch.enable_grad():
        expected = unet(*inputs).detach()
    with torch.no_grad(), slices(Slicing(3000)):
        assert worst(unet(*inputs), expected) < 1e-5


def test_what_goes_in_stays_as_it_was(networks):
    (unet, controlnet), image = networks, random(4, 3, 64, 64)
    inputs = random(4, 4, 8, 8), random(7, 24), controlnet.embed_hint(image).detach()
    before = [x.clone() for x in (*inputs, image)]
    predict(networks, inputs[0], 501, inputs[1], image, numbers=3000)
    with torch.no_grad(), slices(Slicing(3000)):
        unet(inputs[0], 501, inputs[1], controlnet(inputs[0], 501, *inputs[1:]))
    assert all(map(torch.equal, before, (*inputs, image)))


# ---- Computed once ------------------------------------------------------------------------------


def test_a_known_context_gives_the_same_noise(networks):
    inputs = random(4, 4, 8, 8), 501, random(7, 24), random(4, 3, 64, 64)
    expected, context = predict(networks, *inputs), Context(inputs[2])
    for timestep in (7, 501):  # the second time with keys and values that are known
        noise = predict(networks, inputs[0], timestep, context, inputs[3])
    assert worst(noise, expected) < 1e-6
    assert len(context.known) == 16 + 7  # one per transformer block, UNet and ControlNet


def test_a_context_remembers_nothing_of_a_training_step(networks):
    context = Context(random(7, 24))
    predict_with_gradients(networks, random(2, 4, 8, 8), 1, context, random(2, 3, 64, 64))
    assert not context.known


# ---- The helper ---------------------------------------------------------------------------------


class Watch(nn.Module):
    """Remembers how many frames it was given at a time."""

    def __init__(self):
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        return 2 * x


@torch.no_grad()
def test_a_slice_is_as_many_frames_as_there_is_room_for():
    x = random(10, 4, 5, 5)
    watch = Watch()
    with slices(Slicing(399)):
        assert worst(by_frames(watch, x), 2 * x) == 0
    assert watch.seen == [3, 3, 3, 1]
    with slices(Slicing(1)):
        assert worst(by_frames(watch, x, into=x.clone()), 2 * x) == 0
    assert watch.seen[4:] == [1] * 10


def test_with_gradients_there_is_one_slice():
    watch, x = Watch(), random(10, 4, 5, 5).requires_grad_()
    with slices(Slicing(1)):
        by_frames(watch, x).sum().backward()
    assert watch.seen == [10]
    assert (x.grad == 2).all()


@torch.no_grad()
def test_locations_keep_all_their_frames():
    tokens = random(2, 6, 9, 4)
    seen = []

    def layer(x: Tensor) -> Tensor:
        seen.append(x.shape[2])
        return x.cumsum(1)

    with slices(Slicing(100)):
        result = by_locations(layer, tokens.clone())
    assert worst(result, tokens.cumsum(1)) == 0
    assert seen == [2, 2, 2, 2, 1]


@torch.no_grad()
def test_moments_from_slices_survive_a_large_mean():
    x = random(7, 3, 8, 8) + 1e4
    with slices(Slicing(3 * 8 * 8 * 2)):
        mean, variance = channel_moments(x)
    variances, means = torch.var_mean(x.double(), dim=(0, 2, 3), correction=0)
    assert worst(mean.double(), means) < 1e-2
    assert ((variance / variances - 1).abs() < 1e-3).all()


def test_an_offloaded_map_comes_back_in_any_order():
    x = random(7, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    offloaded = Offloaded(x)
    for frames in (slice(0, 2), slice(2, 4), slice(0, 2), slice(4, 7), slice(6, 7), slice(0, 7)):
        assert torch.equal(offloaded[frames], x[frames])


def test_settings_end_with_their_block():
    before = slicing.current
    with pytest.raises(KeyError), slices(Slicing(3)):
        assert slicing.current.numbers == 3
        raise KeyError
    assert slicing.current == before


# ---- Copies beside the computation --------------------------------------------------------------


class LateCard(TorchFunctionMode):
    """Plays both streams of a card, on the CPU: a copy beside the computation is done when that waits for it.

    New memory holds NaN, so what is read before it was copied is seen. Fails when a copy was started that did not
    wait for the computation, or when the memory of one under way was given back.
    """

    def __init__(self, can_pin: bool = True):
        super().__init__()
        self.can_pin, self.beside, self.waited = can_pin, False, False
        self.late: list[tuple] = []
        self.put_off = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.empty_like:
            if kwargs.pop("pin_memory", False) and not self.can_pin:
                raise RuntimeError("CUDA error: out of memory")
            return function(*args, **kwargs).fill_(torch.nan)
        if function is Tensor.copy_ and self.beside and kwargs.get("non_blocking"):
            assert self.waited
            target, source = args
            memory = weakref.ref(target.untyped_storage())
            place = target.storage_offset(), target.shape, target.stride()
            self.late.append((memory, place, source))
            self.put_off += 1
            return target
        return function(*args, **kwargs)

    @contextmanager
    def second(self, stream) -> Iterator[None]:
        self.beside = True
        yield
        self.beside = self.waited = False

    def wait_stream(self, stream) -> None:
        self.waited = True

    def record_event(self) -> int:
        return self.put_off

    def wait_event(self, event: int) -> None:
        for memory, place, source in self.late:
            assert memory() is not None, "the memory of a copy under way was given back"
            torch.empty(0, dtype=source.dtype).set_(memory(), *place).copy_(source)
        self.late.clear()


@contextmanager
def late_card(**options) -> Iterator[LateCard]:
    card = LateCard(**options)
    with (
        patch("slicing.copying", return_value=card),
        patch("torch.cuda.current_stream", return_value=card),
        patch("torch.cuda.stream", card.second),
        patch("slicing._can_pin", True),
        patch("slicing._in_flight", None),
        card,
    ):
        yield card


def test_a_card_that_is_late_with_its_copies_gives_the_same_noise(networks):
    (unet, controlnet), image = networks, random(5, 3, 64, 64)
    inputs = random(5, 4, 8, 8), 501, random(7, 24)
    expected = predict(networks, *inputs, image, numbers=5000)
    with torch.no_grad(), slices(Slicing(5000, offload=True)), late_card() as card:
        hint = Offloaded(controlnet.embed_hint(image))
        noise = unet(*inputs, controlnet(*inputs, hint))
    assert worst(noise, expected) < 1e-6
    assert card.put_off > 50


def test_frames_in_any_order_are_waited_for():
    x = random(7, 3, 4, 4)
    with late_card():
        offloaded, other = Offloaded(x), Offloaded(-x)
        for frames in (slice(0, 2), slice(2, 4), slice(0, 2), slice(4, 7), slice(0, 7)):
            assert torch.equal(offloaded[frames], x[frames])
            assert torch.equal(other[frames], -x[frames])


def test_the_memory_of_a_copy_is_held_while_it_is_under_way_and_no_longer():
    with late_card() as card:
        offloaded = Offloaded(random(6, 3, 4, 4))
        offloaded[0:2]
        del offloaded  # as an error does, while frames 2 and 3 are on their way
        ((memory, *_),) = card.late
        finish_fetching()
        assert memory() is None


def test_maps_wait_in_ordinary_memory_once_no_more_can_be_pinned(capsys):
    x = random(6, 3, 4, 4)
    with late_card(can_pin=False) as card:
        for offloaded in (Offloaded(x), Offloaded(x)):
            assert torch.equal(offloaded[0:4], x[0:4])
            assert torch.equal(offloaded[4:6], x[4:6])
    assert not card.put_off  # the host waits for each copy
    assert capsys.readouterr().out.count("no more memory can be pinned") == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a graphics card")
@pytest.mark.parametrize("offload", [False, True])
def test_on_a_card_the_host_never_waits_and_the_noise_is_the_same(networks, offload):
    inputs = random(5, 4, 8, 8), 501, random(7, 24), random(5, 3, 64, 64)
    expected = predict(networks, *inputs)
    with torch.no_grad():
        moved = [x.cuda() if isinstance(x, Tensor) else x for x in inputs]
        on_card = [network.cuda() for network in networks]
    predict(on_card, *moved, numbers=5000, offload=offload)  # libraries may wait when they start
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        noise = predict(on_card, *moved, numbers=5000, offload=offload)
    finally:
        torch.cuda.set_sync_debug_mode(before)
        for network in networks:
            network.cpu()
    assert worst(noise.cpu(), expected) < 1e-2  # convolutions may be in TF32


# ---- When memory runs out -----------------------------------------------------------------------


def test_hints_wait_outside_as_soon_as_a_way_says_so(networks, monkeypatch):
    seen = []

    def predict_noise(model, latents, timestep, context, hints):
        seen.append(type(hints))
        if len(seen) == 1:
            raise torch.OutOfMemoryError
        return latents

    monkeypatch.setattr(posecrafter, "predict_noise", predict_noise)
    model = SimpleNamespace(unet=networks[0], controlnet=networks[1])
    inputs = random(2, 4, 8, 8), random(2, 32, 8, 8), random(7, 24)
    ways = [Slicing(1000), Slicing(1000, offload=True)]
    posecrafter.sample(model, *inputs, steps=2, slicing=ways)
    assert seen == [Tensor, Offloaded, Offloaded]


def test_the_next_way_is_taken_where_one_does_not_fit():
    ways = [Slicing(8), Slicing(4), Slicing(2), Slicing(1)]

    def compute() -> int:
        if slicing.current.numbers > 2:
            raise torch.OutOfMemoryError
        return slicing.current.numbers

    assert frugally(compute, ways) == 2
    assert ways == [Slicing(2), Slicing(1)]  # what did not fit once is not tried again


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be reported later",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "FIND was unable to find an engine to execute this computation",
    ],
)
def test_a_library_that_gets_no_memory_is_answered_alike(words):
    ways = [Slicing(2), Slicing(1)]

    def compute() -> int:
        if slicing.current.numbers > 1:
            raise RuntimeError(words)
        return slicing.current.numbers

    assert frugally(compute, ways) == 1
    with pytest.raises(MemoryError, match="give fewer frames"):
        frugally(compute, [Slicing(2)])


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    ways = [Slicing(2), Slicing(1)]

    def compute():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        frugally(compute, ways)
    assert len(ways) == 2


def test_memory_that_earlier_work_left_cached_counts_as_free(monkeypatch):
    free = [0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.append(10**9))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[-1], 10**9))
    first = plans(torch.device("cuda"), torch.float16, (4, 8, 8, 8))[0]
    assert first == Slicing(8 * 8**3)  # the fastest way


def test_when_nothing_fits_the_message_says_what_to_do():
    def compute():
        raise torch.OutOfMemoryError

    with pytest.raises(MemoryError, match="give fewer frames"):
        frugally(compute, [Slicing(2), Slicing(1)])
