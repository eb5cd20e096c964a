"""How much memory and time a run will take, predicted without weights and without a graphics card.

The real code runs on PyTorch's fake tensors, which have shapes, types and devices but no data, while `LiveMemory`
watches what is alive. Left out are the VAE, which may need more than the denoising of a very short clip; the CUDA
context, about half a gigabyte; the workspaces of cuDNN; and fragmentation.
"""

import timeit
import weakref
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
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

from beyond.pseudo import hold_to_pseudo_video
from checkpoint import networks_without_weights, read_settings
from controlnet import ControlNet
from device import compute_device
from posecrafter import (
    Method,
    ddim_timesteps,
    predict_noise,
    sample,
    trainable_parameters,
    training_loss,
    use_gradient_checkpointing,
)
from public.places import locate_parts
from run import Run
from slicing import plans
from unet import UNet

CUDA = torch.device("cuda", 0)
SLICES = 3  # in the shorter of the clips that longer ones are predicted from

# ---- Tensors without data -----------------------------------------------------------------------


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all tensors on a device that are alive, and the most there were: `peak`."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.live, self.peak = device, 0, 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for storage in (tensor.untyped_storage() for tensor in tensors if tensor.device == self.device):
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return result

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


class WithoutCUDA(TorchFunctionMode):
    """Emulates CUDA-only operations on fake tensors in CPU builds of PyTorch."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is Tensor.__getitem__:
            return part_of(*args)
        if function in (Tensor.__setitem__, Tensor.copy_):  # without data, only the checks are left
            target = part_of(*args[:2]) if function is Tensor.__setitem__ else args[0]
            assert args[-1].expand(target.shape).dtype == target.dtype
            return target
        if function is Tensor.contiguous and not args[0].is_contiguous(**kwargs):
            return torch.empty_like(args[0], **kwargs)
        if function is F.interpolate:
            times = kwargs.get("scale_factor")
            size = [int(times * side) for side in args[0].shape[2:]] if times else kwargs["size"]
            resized = args[0].new_empty(*args[0].shape[:2], *size)
            return torch.empty_like(resized, memory_format=torch.channels_last)
        return function(*args, **kwargs)


def part_of(x: Tensor, index) -> Tensor:
    """`x[index]` for numbers, slices and None."""
    dim = 0
    for each in index if isinstance(index, tuple) else (index,):
        if isinstance(each, slice):
            x = torch.ops.aten.slice(x, dim, each.start, each.stop)
        else:
            x = x.unsqueeze(dim) if each is None else x.select(dim, each)
        dim += not isinstance(each, int)
    return x


@contextmanager
def without_data(device: torch.device) -> Iterator[LiveMemory]:
    """Within it, tensors have no data, and attention makes no full matrix, as on a card."""
    attention = sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
    stand_ins = nullcontext() if torch.backends.cuda.is_built() else WithoutCUDA()
    one_stream = patch("slicing.copying", return_value=None)  # others cannot be waited for without data
    with FakeTensorMode(), attention, LiveMemory(device) as memory, stand_ins, one_stream:
        yield memory


def networks_without_data(model, device: torch.device, dtype: torch.dtype) -> SimpleNamespace:
    """UNet and ControlNet of the sizes of a model's, with weights of zero, or of nothing in `without_data`."""
    hint_widths, on = model.controlnet.controlnet_cond_embedding.widths, {"device": device, "dtype": dtype}
    with torch.device("meta"):
        unet, controlnet = UNet(model.unet.config), ControlNet(model.unet.config, hint_widths)
    for network in (unet, controlnet):
        weights = {name: torch.zeros(t.shape, **on) for name, t in network.state_dict().items()}
        network.load_state_dict(weights, assign=True)
        network.requires_grad_(False)
    return SimpleNamespace(unet=unet, controlnet=controlnet)


def blank_clip(
    model, frames: int, height: int, width: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros: latents (F, C, h, w) in float32, embedded hints (F, widths[0], h, w), context (77, context_dim)."""
    config, on = model.unet.config, {"device": device, "dtype": dtype}
    latents = torch.zeros(frames, config.in_channels, height, width, device=device)
    hints = torch.zeros(frames, config.widths[0], height, width, **on)
    return latents, hints, torch.zeros(77, config.context_dim, **on)


# ---- Predictions: height and width are in latent pixels -----------------------------------------


@torch.no_grad()
def operations(model, height: int, width: int) -> tuple[int, int, int]:
    """Operations for one frame, multiplications and additions: of a denoising step, encoding, and decoding.

    `model` is on the meta device. Temporal attention grows with the clip, but is little.
    """
    factor, meta = model.vae.config.factor, torch.device("meta")
    image = torch.empty(1, 3, factor * height, factor * width, device=meta)
    latents, hint, context = blank_clip(model, 1, height, width, meta)

    def count(compute: Callable, *inputs) -> int:
        with FlopCounterMode(display=False) as counter:
            compute(*inputs)
        return counter.get_total_flops()

    step = count(predict_noise, model, latents, 1, context, hint)
    return step, count(model.vae.encode, image), count(model.vae.decode, latents)


def seconds_per_frame(
    model, height: int, width: int, device: torch.device, dtype: torch.dtype, frames_per_slice: int | None
) -> float:
    """How long a denoising step takes for one frame, from a trial with one slice and weights of zero."""
    networks = networks_without_data(model, device, dtype)
    for network in vars(networks).values():
        network.to(memory_format=torch.channels_last)
    frame = model.unet.config.widths[0], height, width
    way = plans(device, dtype, (1, *frame), frames_per_slice)[0]
    frames = max(1, way.numbers // prod(frame))
    clip = blank_clip(model, frames, height, width, device, dtype)
    step = partial(sample, networks, *clip, 1, slicing=[way])
    return min(timeit.repeat(lambda: step().cpu(), number=1, repeat=3)) / frames  # the first warms up


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
    """The most bytes on the device while a clip is sampled.

    Memory is a constant plus so much per frame, so a long clip is predicted from two that are shorter.
    """
    frame = model.unet.config.widths[0], height, width
    way = plans(device, dtype, (frames, *frame), frames_per_slice, offload)[0]
    if dtype == torch.bfloat16:
        dtype = torch.float16  # as large, and its attention never looks at the numbers, which are not there

    def peak(frames: int) -> int:
        with without_data(device) as memory:
            networks = networks_without_data(model, device, dtype)
            latents, hints, context = blank_clip(model, frames, height, width, device, dtype)
            # In the host's memory, as `embed_hints` leaves them.
            hints = torch.empty(hints.shape, dtype=dtype, memory_format=torch.channels_last)
            memory.peak = memory.live
            sample(networks, latents, hints, context, 1, guidance, context, slicing=[way])
        return memory.peak

    many = SLICES * max(1, way.numbers // prod(frame))
    if frames <= 2 * many:
        return peak(frames)
    few, more = peak(many), peak(2 * many)
    return more + (more - few) * (frames - 2 * many) // many


def training_peak(model, frames: int, height: int, width: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """The most bytes on the device in a training step, AdamW's state included, without the float32 copies that
    autocast keeps for the norms on a card.
    """
    device = torch.device("cpu")  # without a card, gradients exist for fake tensors of the CPU only
    with without_data(device) as memory:
        networks = networks_without_data(model, device, dtype)
        parameters = trainable_parameters(networks).values()
        for parameter in parameters:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        latents, hints, context = blank_clip(model, frames, height, width, device, dtype)
        use_gradient_checkpointing(networks, latents)
        # AdamW: two moments of each trained tensor, and as much again while it steps.
        optimizer = [torch.empty_like(parameter) for parameter in parameters for _ in range(3)]
        with torch.autocast(device.type, dtype):
            loss = training_loss(networks, latents, hints, context, 500, torch.empty_like(latents))
        loss.backward()
        del optimizer
    return memory.peak


# ---- What `sample.py --plan` prints -------------------------------------------------------------


def print_plan(run: Run, method: Method, targets: int, args: Namespace) -> None:
    """Prints the size of a task of `targets` frames, its memory and its time; args: of `sample.py`."""
    steps, guidance, sliced, offload = args.ddim_steps, args.guidance, args.slice, args.offload
    settings, frames = run.settings, targets + method.insert
    sources = locate_parts(settings["model"], settings["controlnet"], settings["vae"])
    model = SimpleNamespace(**networks_without_weights(sources))
    parameters = sum(p.numel() for network in vars(model).values() for p in network.parameters())
    print(f"{frames} frames of {run.frames.shape[2]}x{run.frames.shape[1]}, {parameters:,} parameters")

    height, width = (side // model.vae.config.factor for side in run.frames.shape[1:3])
    step, encoding, decoding = operations(model, height, width)
    held = method.parts and method.editor is hold_to_pseudo_video
    until = read_settings(sources).get("guidance_until", 0)
    guided = sum(timestep >= until for timestep in ddim_timesteps(steps)) if guidance != 1 else 0
    work = {
        # The pseudo video is encoded, and so are the training frames that it is made of.
        "encoding": encoding * (1 + len(run.frames) + targets if held else 1),
        "inversion": step * steps * (1 + method.fixed_point) * method.needs_inversion,
        # A guided step predicts twice. Where the key frame is replayed, the reference is also sampled alone.
        "sampling": step * ((steps + guided) * frames + steps * method.replay),
        "decoding": decoding * frames,
    }
    for name, count in work.items():
        print(f"{name}: {count / 1e12:,.1f} TFLOP")

    device, dtype = compute_device(args.device)
    ways = ("never", "always") if offload == "auto" else (offload,)
    places = [(device.type, device, dtype, ways[0])]
    places += [(f"graphics card, --offload {way}", CUDA, torch.float16, way) for way in ways]
    for name, where, precision, way in places:
        peak = sampling_peak(model, frames, height, width, precision, guidance, sliced, way, where)
        print(f"{name}, {str(precision).removeprefix('torch.')}: {peak / 1e9:.1f} GB at the peak")
    seconds = seconds_per_frame(model, height, width, device, dtype, sliced)
    minutes = seconds * sum(work.values()) / step / 60
    if args.reuse:
        print("what --reuse saves is not counted")
    print(f"on this machine's {device.type}: about {minutes:,.1f} minutes, from a trial of one slice")
