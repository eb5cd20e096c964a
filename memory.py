"""How much memory a run will take: the real code on tensors without data, with an eye on what lives when.

PyTorch's fake tensors have shapes, types and devices but no memory, so this predicts a graphics card's peak
on a machine that has none, and an operation that mixes devices fails here as it would there. Left out are the
VAE's work before and after, which takes one or two frames at a time (and may need more than the denoising of a
very short clip), and what no code of ours asks for: the CUDA context (about half a gigabyte), the workspaces of
cuDNN, fragmentation.
"""

import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from math import prod
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from controlnet import ControlNet
from posecrafter import predict_noise, recompute_activations, sample, trainable_parameters, training_loss
from slicing import plans, slices
from unet import UNet

CUDA = torch.device("cuda", 0)
SLICES = 3  # in the shorter of the clips that longer ones are predicted from


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all tensors on a device that are alive, and the most there were: `peak`."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.live, self.peak = device, 0, 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device == self.device:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


class WithoutCUDA(TorchFunctionMode):
    """Says in other words what a PyTorch that was built without CUDA refuses even to tensors without data."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is Tensor.__getitem__:
            return part_of(*args)
        if function is Tensor.__setitem__:
            return write(part_of(*args[:2]), args[2])
        if function is Tensor.copy_:
            return write(*args[:2])
        if function is Tensor.contiguous and not args[0].is_contiguous(**kwargs):
            return torch.empty_like(args[0], **kwargs)
        if function is F.interpolate:
            times = kwargs.get("scale_factor")
            size = [int(times * side) for side in args[0].shape[2:]] if times else kwargs["size"]
            resized = args[0].new_empty(*args[0].shape[:2], *size)
            return torch.empty_like(resized, memory_format=torch.channels_last)
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            here = function(*args, **kwargs | {"device": "cpu"})
            return torch.empty(here.shape, dtype=here.dtype, device=kwargs["device"])
        if function is Tensor.to:
            wanted = {key: value for key, value in kwargs.items() if key != "copy"}
            device, dtype, *_ = torch._C._nn._parse_to(*args[1:], **wanted)
            if device is not None and device != args[0].device:
                return torch.empty_like(args[0], device=device, dtype=dtype)
        return function(*args, **kwargs)


def part_of(x: Tensor, index) -> Tensor:
    """`x[index]` for numbers, slices and None."""
    dim = 0
    for each in index if isinstance(index, tuple) else (index,):
        if isinstance(each, int):
            x = x.select(dim, each)
            continue
        x = x.unsqueeze(dim) if each is None else torch.ops.aten.slice(x, dim, each.start, each.stop)
        dim += 1
    return x


def write(target: Tensor, source: Tensor) -> Tensor:
    """What is left of `target.copy_(source)` where there is no data."""
    assert source.expand(target.shape).dtype == target.dtype
    return target


@contextmanager
def without_data(device: torch.device) -> Iterator[LiveMemory]:
    """Within it, tensors have no data, and attention is the kind that makes no full matrix, as on a card."""
    attention = sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
    stand_ins = nullcontext() if torch.backends.cuda.is_built() else WithoutCUDA()
    one_stream = patch("slicing.copying", return_value=None)  # others cannot be waited for without data
    with FakeTensorMode(), attention, LiveMemory(device) as memory, stand_ins, one_stream:
        yield memory


def networks_without_data(model, device: torch.device, dtype: torch.dtype) -> SimpleNamespace:
    """UNet and ControlNet of a model's sizes. To be called in `without_data`.

    `model` may be a `Model`, or anything with these networks, on the meta device too.
    """
    hint_widths = model.controlnet.controlnet_cond_embedding.widths
    with torch.device("meta"):
        unet, controlnet = UNet(model.unet.config), ControlNet(model.unet.config, hint_widths)
    for network in (unet, controlnet):
        tensors = network.state_dict().items()
        weights = {name: torch.empty(t.shape, device=device, dtype=dtype) for name, t in tensors}
        network.load_state_dict(weights, assign=True)
        network.requires_grad_(False)
    return SimpleNamespace(unet=unet, controlnet=controlnet)


def operations(model, height: int, width: int) -> tuple[int, int, int]:
    """Operations, a multiply-add counted as two, for one frame: of a denoising step, encoding, and decoding.

    height and width are in latent pixels. Temporal attention grows with the clip, but is little.
    """
    latents = torch.empty(1, model.unet.config.in_channels, height, width, device="meta")
    factor = model.controlnet.controlnet_cond_embedding.factor
    hint = torch.empty(1, 3, factor * height, factor * width, device="meta")
    context = torch.empty(77, model.unet.config.context_dim, device="meta")
    with torch.no_grad():
        hint = model.controlnet.embed_hint(hint)
        with FlopCounterMode(display=False) as step:
            model.unet(latents, 1, context, model.controlnet(latents, 1, context, hint))
        with FlopCounterMode(display=False) as encoding:
            factor = model.vae.config.factor
            model.vae.encode(torch.empty(1, 3, factor * height, factor * width, device="meta"))
        with FlopCounterMode(display=False) as decoding:
            model.vae.decode(latents)
    return tuple(counter.get_total_flops() for counter in (step, encoding, decoding))


def seconds_per_frame(
    model,
    height: int,
    width: int,
    device: torch.device,
    dtype: torch.dtype,
    frames_per_slice: int | None = None,
) -> float:
    """How long a denoising step takes for one frame, from a trial with one slice and weights of zero.

    `model` has UNet and ControlNet on the meta device, and keeps those weights.
    """
    for network in (model.unet, model.controlnet):
        network.to(dtype).to_empty(device=device).to(memory_format=torch.channels_last)
        for tensor in network.state_dict().values():
            tensor.zero_()
    config = model.unet.config
    frame = (config.widths[0], height, width)
    way = plans(device, dtype, (1, *frame), frames_per_slice)[0]
    frames = max(1, way.numbers // prod(frame))
    latents = torch.zeros(frames, config.in_channels, height, width, device=device)
    hints = torch.zeros(frames, *frame, device=device, dtype=dtype)
    context = torch.zeros(77, config.context_dim, device=device, dtype=dtype)
    seconds = []
    with torch.inference_mode(), slices(way):
        for _ in range(3):  # the first warms up
            start = time.perf_counter()
            predict_noise(model, latents, 1, context, hints).cpu()
            seconds.append((time.perf_counter() - start) / frames)
    return min(seconds)


def sampling_peak(
    model,
    frames: int,
    height: int,
    width: int,
    dtype: torch.dtype = torch.float16,
    guidance: float = 1.0,
    frames_per_slice: int | None = None,
    offload: str = "never",
    device: torch.device = CUDA,
) -> int:
    """The most bytes on the device while a clip is sampled; height and width in latent pixels.

    Memory is a constant plus so much per frame, so long clips are predicted from two shorter ones, in the way in
    which the long one is sampled.
    """
    config = model.unet.config
    frame = config.widths[0], height, width
    way = plans(device, dtype, (frames, *frame), frames_per_slice, offload)[0]
    if dtype == torch.bfloat16:
        dtype = torch.float16  # as large, and its attention never looks at the numbers, which are not there

    def peak(frames: int) -> int:
        with without_data(device) as memory:
            networks = networks_without_data(model, device, dtype)
            latents = torch.empty(frames, config.in_channels, height, width, device=device)
            hints = torch.empty(frames, *frame, dtype=dtype)
            hints = hints.contiguous(memory_format=torch.channels_last)
            context = torch.empty(77, config.context_dim, device=device, dtype=dtype)
            memory.peak = memory.live
            sample(networks, latents, hints, context, 1, guidance, context, slicing=[way])
        return memory.peak

    many = SLICES * max(1, way.numbers // prod(frame))
    if frames <= 2 * many:
        return peak(frames)
    few, more = peak(many), peak(2 * many)
    return more + (more - few) * (frames - 2 * many) // many


def training_peak(model, frames: int, height: int, width: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """The most bytes on the device in a training step of that many frames, AdamW's state included.

    On a card autocast keeps float32 copies for the norms, which this run on the CPU does not count.
    """
    device = torch.device("cpu")  # without a card, gradients exist for fake tensors of the CPU only
    with without_data(device) as memory:
        networks = networks_without_data(model, device, dtype)
        parameters = trainable_parameters(networks)
        for parameter in parameters.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        config = model.unet.config
        latents, noise = torch.empty(2, frames, config.in_channels, height, width)
        recompute_activations(networks, latents)
        hints = torch.empty(frames, config.widths[0], height, width, dtype=dtype)
        context = torch.empty(77, config.context_dim, dtype=dtype)
        # AdamW: two moments of each trained tensor, and as much again while it steps.
        optimizer = [torch.empty_like(p) for p in parameters.values() for _ in range(3)]
        with torch.autocast(device.type, dtype):
            loss = training_loss(networks, latents, hints, context, 500, noise)
        loss.backward()
        del optimizer
    return memory.peak
