"""What `card.py` measures: each `fill_...` fills in a row of a table."""

import gc
import importlib.util
import os
import resource
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import equal
from bench.report import GIGA, NOT_INSTALLED, Rows, describe
from bench.step import CONTROLVIDEO, HINTS, random_weights, run
from beyond.plan import operations, sampling_peak, training_peak
from controlnet import ControlNet
from posecrafter import decode_latents, encode_frames, invert, predict_noise, recompute_activations, sample
from slicing import Offloaded, plans, slices
from unet import Context, ResnetBlock2D, Transformer2DModel, UNet, UNetConfig
from vae import VAE, VAEConfig

TERA = 1e12
STEPS = 50  # of a whole command
KEPT, OFFLOADED = "never", "always"  # what `plans` calls them
PRODUCT, CONVOLUTION = "matrix product", "convolution"
SHARES = {  # columns of part f, by the row that they compare with
    PRODUCT: "% of the product's rate",
    CONVOLUTION: "% of the convolution's rate",
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of networks, frames and clips."""

    small: UNetConfig  # of part a
    unet: UNetConfig
    vae: VAEConfig
    pixels: int  # sides of a frame
    frames: tuple[int, ...]  # in a denoising step
    whole: int  # frames of the whole command
    matrix: int  # rows and columns

    @property
    def short(self) -> int:  # frames of a training step, and of what is compared with other code
        return self.frames[0]

    @property
    def side(self) -> int:  # of the latents
        return self.pixels // self.vae.factor


FULL = Sizes(
    small=equal.SMALL,
    unet=UNetConfig(),
    vae=VAEConfig(),
    pixels=512,
    frames=(8, 100, 180, 300, 1000),
    whole=100,
    matrix=8192,
)
ONE_LAYER = {"layers_per_block": 1}
TINY = Sizes(
    small=UNetConfig(widths=(16, 32), context_dim=24, heads=2, norm_groups=8, **ONE_LAYER),
    unet=UNetConfig(widths=(32, 32, 64, 64), **ONE_LAYER),
    vae=VAEConfig(widths=(32, 32, 32, 32), **ONE_LAYER),
    pixels=64,
    frames=(2, 3),
    whole=3,
    matrix=256,
)


class Bench:
    """The device, the sizes, the known rows, and the networks that several rows are measured with."""

    def __init__(self, args: Namespace):
        self.args, self.sizes = args, TINY if args.tiny else FULL
        self.device, self.dtype = torch.device(args.device), torch.float16
        self.free = 0
        if self.device.type == "cuda":
            self.device = torch.device("cuda", torch.cuda.current_device())
            self.free = torch.cuda.mem_get_info(self.device)[0]  # by now there is a CUDA context
        self.rows = Rows(args.out, describe(self.device, args.tiny))
        self.networks: SimpleNamespace | None = None

    def model(self) -> SimpleNamespace:
        """Networks with random weights. The VAE waits in the host's memory until it is used."""
        if self.networks is None:
            self.networks = equal.networks(self.sizes.unet, HINTS, self.dtype, self.device)
            with torch.device("meta"):
                vae = VAE(self.sizes.vae)
            vae = random_weights(vae, 2, self.dtype)
            self.networks.vae = vae.to(memory_format=torch.channels_last)
        return self.networks

    def release(self, networks: bool = False) -> None:
        """Gives back the memory that the next row does not need, its networks too if said so."""
        equal.small_model.cache_clear()
        if networks:
            self.networks = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            if hasattr(torch.accelerator, "empty_host_cache"):  # older versions keep pinned memory
                torch.accelerator.empty_host_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def inputs(self, frames: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents and a context on the device; hints, embedded, in the host's memory."""
        there = {"device": self.device, "dtype": self.dtype}
        latents = torch.randn(frames, 4, self.sizes.side, self.sizes.side, device=self.device)
        image = torch.rand(1, 3, self.sizes.pixels, self.sizes.pixels, **there)
        with torch.inference_mode():
            hint = self.model().controlnet.embed_hint(image).cpu()
        hints = torch.cat([hint] * frames)  # in channels_last memory, as `embed_hints` leaves them
        return latents, hints, torch.randn(77, self.sizes.unet.context_dim, **there)

    def memory(self) -> dict[str, float | None]:
        """What was taken since `release`."""
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        taken = {"host, GB": host / GIGA}
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
            taken["allocated, GB"] = torch.cuda.max_memory_allocated(self.device) / GIGA
            taken["reserved, GB"] = torch.cuda.max_memory_reserved(self.device) / GIGA
            taken["taken, GB"] = (self.free - free) / GIGA
        return taken

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def once(self, work: Callable[[], object]) -> float:
        """Seconds of one run."""
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def seconds(self, work: Callable[[], object]) -> float:
        """Median of 3 runs after one to warm up; of 1 run where that takes more than 20 seconds."""
        runs = 3 if self.once(work) < 20 else 1
        return statistics.median(self.once(work) for _ in range(runs))


def predicted(peak: Callable[[], int]) -> float | None:
    """GB. What is measured counts, so it is measured even where it cannot be predicted."""
    try:
        return peak() / GIGA
    except Exception as error:
        print(f"bench/card.py: no prediction: {error!r}", file=sys.stderr)
        return None


# ---- What fills a row ---------------------------------------------------------------------------


def fill_difference(bench: Bench, check: str, row: dict) -> None:
    for dtype in (torch.float32, torch.float16):
        name = str(dtype).removeprefix("torch.")
        row[name] = equal.difference(check, bench.device, dtype, bench.sizes.small)


def step_of(bench: Bench, frames: int, offload: str) -> tuple[Callable[[], Tensor], int]:
    """A denoising step of so many frames, ready to be called; and how many frames its slices have."""
    side, width = bench.sizes.side, bench.sizes.unet.widths[0]
    model, (latents, hints, context) = bench.model(), bench.inputs(frames)
    finest = frames, width, side, side
    way = plans(bench.device, bench.dtype, finest, None, offload)[0]
    # As `sample` has them: hints wait with the skips, and the prompt's keys and values are made once.
    hints = Offloaded(hints, bench.device) if way.offload else hints.to(bench.device)
    context = Context(context)

    def step() -> Tensor:
        with torch.inference_mode(), slices(way):
            return predict_noise(model, latents, 501, context, hints)

    return step, min(frames, way.numbers // (width * side * side))


def fill_step(bench: Bench, frames: int, offload: str, row: dict) -> None:
    """Raises MemoryError, too, where pinned memory would take most of the host's."""
    bench.release()
    sizes, model = bench.sizes, bench.model()
    sides = sizes.side, sizes.side
    options = {"offload": offload, "device": bench.device}
    peak = partial(sampling_peak, model, frames, *sides, bench.dtype, **options)
    row["predicted, GB"] = predicted(peak)
    if offload == OFFLOADED:
        # Skips and hints are 7 times a finest map, and PyTorch rounds pinned buffers up to powers of two.
        pinned = 12 * frames * sizes.unet.widths[0] * sizes.side**2 * bench.dtype.itemsize
        if pinned > 0.8 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
            raise MemoryError
    step, row["frames a slice"] = step_of(bench, frames, offload)
    row["seconds"] = bench.seconds(step)
    row["frames a second"] = frames / row["seconds"]
    row.update(bench.memory())


def step_key(frames: int, offload: str) -> str:
    return f"b {frames} frames, " + ("all kept" if offload == KEPT else "skips offloaded")


def step_seconds(bench: Bench, frames: int) -> float:
    """Of the step with all on the card, from part b. Raises MemoryError where it does not fit."""
    row = bench.rows.measured(step_key(frames, KEPT), partial(fill_step, bench, frames, KEPT))
    if "reason" in row:
        raise MemoryError
    return row["seconds"]


def fill_whole(bench: Bench, row: dict) -> None:
    """Encode, invert, sample and decode, with fewer steps and frames, and the seconds scaled."""
    bench.release()
    model, frames = bench.model(), bench.sizes.whole
    _, hints, context = bench.inputs(frames)
    shape = 1, bench.sizes.pixels, bench.sizes.pixels, 3
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    latent = encode_frames(model, image)
    noise = latent.repeat(frames, 1, 1, 1)
    side = bench.sizes.side
    options = {"offload": "auto", "device": bench.device}
    peak = predicted(partial(sampling_peak, model, frames, side, side, bench.dtype, **options))
    ways = plans(bench.device, bench.dtype, (frames, *hints.shape[1:]))

    def all_steps(work: Callable[[int], object]) -> float:
        """What does not depend on the number of steps counts once."""
        one, three = (bench.seconds(partial(work, steps)) for steps in (1, 3))
        return one + (STEPS - 1) * max(three - one, 0) / 2

    def sampled(steps: int) -> Tensor:
        return sample(model, noise, hints, context, steps, slicing=ways)

    few = noise[:16]
    row["encode, s"] = bench.seconds(lambda: encode_frames(model, image))
    row["invert, s"] = all_steps(lambda steps: invert(model, latent, hints[:1], context, steps))
    row["sample, s"] = all_steps(sampled)
    decoding = bench.seconds(lambda: list(decode_latents(model, few)))
    row["decode, s"] = decoding * frames / len(few)
    row["together, s"] = sum(row.values())  # of seconds alone, so far
    row.update(bench.memory())
    row["predicted, GB"] = peak


def fill_training(bench: Bench, row: dict) -> None:
    """Training changes the networks, so it has its own. They are bfloat16 where the GPU multiplies that."""
    bench.release(networks=True)
    # Before compute capability 8.0 it is only emulated.
    cuda = bench.device.type == "cuda"
    lacking = cuda and torch.cuda.get_device_capability(bench.device) < (8, 0)
    dtype = torch.float16 if lacking else torch.bfloat16
    model = equal.networks(bench.sizes.unet, HINTS, dtype, bench.device)
    side, width = bench.sizes.side, bench.sizes.unet.widths[0]
    row["precision"] = str(dtype).removeprefix("torch.")
    row["predicted, GB"] = predicted(partial(training_peak, model, bench.sizes.short, side, side, dtype))
    there = {"device": bench.device, "dtype": dtype}
    latents, noise = torch.randn(2, bench.sizes.short, 4, side, side, device=bench.device)
    hints = torch.randn(bench.sizes.short, width, side, side, **there)
    context = torch.randn(77, bench.sizes.unet.context_dim, **there)
    parameters = equal.prepare_training(model)
    recompute_activations(model, latents)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    scaler = torch.amp.GradScaler(bench.device.type, enabled=dtype == torch.float16)

    def step() -> None:  # as `train.train` takes it
        with equal.without_cudnn_attention():
            loss = equal.step_loss(model, latents, hints, context, noise)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimizer)
        scaler.update()
        loss.item()

    row["seconds"] = bench.seconds(step)
    row.update(bench.memory())


def fill_ours(bench: Bench, row: dict) -> None:
    """From part b."""
    row["seconds"] = step_seconds(bench, bench.sizes.short)
    row["against ours"] = 1.0
    row["allocated, GB"] = bench.rows.known[step_key(bench.sizes.short, KEPT)].get("allocated, GB")


def fill_peer(bench: Bench, name: str, row: dict) -> None:
    """In a process of its own, by `step.py`. Why that failed is said in one line."""
    args, sizes = bench.args, bench.sizes
    there = args.controlvideo if name == CONTROLVIDEO else importlib.util.find_spec("diffusers")
    if not there:
        row["reason"] = NOT_INSTALLED
        return
    ours = step_seconds(bench, bench.sizes.short)
    bench.release(networks=True)  # so that the card is free for the other process
    asked = {"frames": bench.sizes.short, "size": sizes.pixels, "device": bench.device, "dtype": "float16"}
    options = [f"--{option}={value}" for option, value in asked.items()] + ["--runs=3"]
    options += ["--widths", *map(str, sizes.unet.widths)]
    if name == CONTROLVIDEO:
        options += ["--controlvideo", str(args.controlvideo)]
    try:
        result = run(name, args.python, options, {}, stderr=subprocess.PIPE)
    except subprocess.CalledProcessError as error:
        said = (error.stderr.decode(errors="replace").strip() or f"{error}").splitlines()[-1]
        if "out of memory" in said:
            raise MemoryError from None
        missing = said.startswith(("ModuleNotFoundError", "ImportError"))
        row["reason"] = NOT_INSTALLED if missing else one_line("failed", said)
        return
    row["seconds"] = statistics.median(result["seconds"][1:])  # the first warms up
    row["against ours"] = row["seconds"] / ours
    row["allocated, GB"] = result["peak"] and result["peak"] / GIGA


def one_line(what: str, reason: object) -> str:
    """Short, and without what ends a table's cell."""
    return f"{what}: {reason}".partition("\n")[0].replace("|", "/")[:150]


def fill_compiled(bench: Bench, row: dict) -> None:
    """The blocks compiled one by one, each for its own shapes. Where that fails, the row has the reason."""
    before = step_seconds(bench, bench.sizes.short)
    step, _ = step_of(bench, bench.sizes.short, KEPT)
    expected = step()
    bench.release()
    networks = bench.model().unet, bench.model().controlnet
    kinds = ResnetBlock2D, Transformer2DModel
    blocks = [block for network in networks for block in network.modules() if isinstance(block, kinds)]
    # A CPU's rehearsal leaves out what takes minutes: the kernels.
    backend = "inductor" if bench.device.type == "cuda" else "eager"
    try:
        # Blocks of a kind share their code, and each of its versions counts towards this limit.
        with torch._dynamo.config.patch(recompile_limit=len(blocks)):
            for block in blocks:
                block.forward = torch.compile(block.forward, dynamic=False, backend=backend)
            row["first step, s"] = bench.once(step)
            row["difference"] = ((step() - expected).abs().max() / expected.abs().max()).item()
            row["seconds"] = bench.seconds(step)
        row["against uncompiled"] = row["seconds"] / before
        row.update(bench.memory())
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        row["reason"] = one_line(type(error).__name__, error)
    finally:
        for block in blocks:
            vars(block).pop("forward", None)
        torch._dynamo.reset()


# ---- Plain products -----------------------------------------------------------------------------


def fill_product(bench: Bench, row: dict) -> None:
    n = bench.sizes.matrix
    a, b = torch.randn(2, n, n, device=bench.device, dtype=bench.dtype)
    fill_rate(bench, row, 2 * n**3, lambda: a @ b)


def fill_convolution(bench: Bench, row: dict) -> None:
    width, side = bench.sizes.unet.widths[0], bench.sizes.side
    there = {"device": bench.device, "dtype": bench.dtype}
    x = torch.randn(bench.sizes.short, width, side, side, **there)
    weight = torch.randn(width, width, 3, 3, **there)
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    count = 2 * 9 * width**2 * side**2 * bench.sizes.short
    fill_rate(bench, row, count, lambda: F.conv2d(x, weight, padding=1))


def fill_rate(bench: Bench, row: dict, count: int, work: Callable[[], Tensor]) -> None:
    """10 in a row, so that the GPU does not wait to be told of the next."""
    bench.release()

    def ten() -> None:
        for _ in range(10):
            work()

    row["seconds"] = bench.seconds(ten) / 10
    row["TFLOP"] = count / TERA
    row["TFLOP/s"] = row["TFLOP"] / row["seconds"]


def fill_share(bench: Bench, frames: int, row: dict) -> None:
    sizes = bench.sizes
    with torch.device("meta"):
        model = SimpleNamespace(unet=UNet(sizes.unet), vae=VAE(sizes.vae))
        model.controlnet = ControlNet(sizes.unet, HINTS)
    row["seconds"] = step_seconds(bench, frames)
    row["TFLOP"] = frames * operations(model, sizes.side, sizes.side)[0] / TERA
    row["TFLOP/s"] = row["TFLOP"] / row["seconds"]
    for name, fill in ((PRODUCT, fill_product), (CONVOLUTION, fill_convolution)):
        plain = bench.rows.measured(f"f {name}", partial(fill, bench))
        if "reason" not in plain:
            row[SHARES[name]] = 100 * row["TFLOP/s"] / plain["TFLOP/s"]
