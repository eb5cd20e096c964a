"""What `card.py` measures: its tables, and the functions that fill in a row each."""

import gc
import importlib.util
import os
import resource
import statistics
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import equal
from bench.common import GIGA, HINTS, TERA, seconds
from bench.report import NOT_INSTALLED, Rows, Table, describe
from bench.step import CONTROLVIDEO, DIFFUSERS, run
from beyond.plan import operations, sampling_peak, training_peak
from posecrafter import decode_latents, encode_frames, invert, predict_noise, sample
from slicing import Offloaded, Slicing, plans, slices
from train import train
from unet import Context, ResnetBlock2D, Transformer2DModel, UNetConfig
from vae import VAEConfig

STEPS = 50  # of a whole command
KEPT, OFFLOADED = "never", "always"  # what `plans` calls them
MEMORY = "predicted, GB", "allocated, GB", "taken, GB", "host, GB"


@dataclass(frozen=True)
class Sizes:
    """Sizes of networks, frames and clips."""

    small: UNetConfig  # of part a
    unet: UNetConfig
    vae: VAEConfig
    pixels: int  # sides of a frame
    frames: tuple[int, ...]  # in a denoising step; the first also of a training step, and beside other code
    whole: int  # frames of the whole command
    matrix: int  # rows and columns

    @property
    def short(self) -> int:
        return self.frames[0]

    @property
    def finest(self) -> tuple[int, int, int]:  # channels, height and width of a frame's largest feature map
        side = self.pixels // self.vae.factor
        return self.unet.widths[0], side, side


FULL = Sizes(equal.SMALL, UNetConfig(), VAEConfig(), 512, (8, 100, 180, 300, 1000), whole=100, matrix=8192)
TINY = Sizes(
    UNetConfig(widths=(16, 32), context_dim=24, heads=2, norm_groups=8, layers_per_block=1),
    UNetConfig(widths=(32, 32, 64, 64), layers_per_block=1),
    VAEConfig(widths=(32, 32, 32, 32), layers_per_block=1),
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
        self.on_gpu = self.device.type == "cuda"
        if self.on_gpu:
            self.device = torch.device("cuda", torch.cuda.current_device())
            self.free = torch.cuda.mem_get_info(self.device)[0]  # by now there is a CUDA context
        self.rows = Rows(args.out, describe(self.device, args.tiny))
        self.networks: SimpleNamespace | None = None

    def without_weights(self) -> SimpleNamespace:
        return equal.without_weights(self.sizes.unet, HINTS, self.sizes.vae)

    def model(self) -> SimpleNamespace:
        """Networks with random weights. The VAE waits in the host's memory until it is used."""
        if self.networks is None:
            self.networks = equal.with_random_weights(self.without_weights(), self.dtype, self.device)
            self.networks.vae.to("cpu")
        return self.networks

    def release(self, networks: bool = False) -> None:
        """Gives back the memory that the next row does not need, its networks too if said so."""
        equal.small_model.cache_clear()
        self.networks = None if networks else self.networks
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.accelerator.empty_host_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def inputs(self, frames: int, dtype: torch.dtype = torch.float16) -> tuple[Tensor, Tensor, Tensor]:
        """Latents and a context on the device; hints, embedded, in the host's memory."""
        latents = torch.randn(frames, 4, *self.sizes.finest[1:], device=self.device)
        context = torch.randn(77, self.sizes.unet.context_dim, device=self.device, dtype=dtype)
        hint = torch.randn(1, *self.sizes.finest, dtype=dtype).to(memory_format=torch.channels_last)
        return latents, torch.cat([hint] * frames), context

    def memory(self) -> dict[str, float]:
        """What was taken since `release`."""
        taken = {"host, GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIGA}
        if self.on_gpu:
            taken["allocated, GB"] = torch.cuda.max_memory_allocated(self.device) / GIGA
            taken["taken, GB"] = (self.free - torch.cuda.mem_get_info(self.device)[0]) / GIGA
        return taken

    def seconds(self, work: Callable[[], object]) -> float:
        """Median of 3 runs after one to warm up; of 1 run where that takes more than 20 seconds."""
        runs = 3 if seconds(work, self.device) < 20 else 1
        return statistics.median(seconds(work, self.device) for _ in range(runs))

    def first_and_further(self, work: Callable[[int], object]) -> tuple[float, float]:
        """Seconds of one step, with what is done once, and of every further step."""
        one, three = (self.seconds(partial(work, steps)) for steps in (1, 3))
        return one, max(three - one, 0.0) / 2


def predicted(peak: Callable[..., int], *arguments, **options) -> float | None:
    """GB. What is measured counts, so it is measured even where it cannot be predicted."""
    try:
        return peak(*arguments, **options) / GIGA
    except Exception as error:
        print(f"bench/card.py: no prediction: {error!r}", file=sys.stderr)
        return None


def one_line(said: str) -> str:
    """For a table's cell: the line's beginning, without the character that would end the cell."""
    return said.partition("\n")[0].replace("|", "/")[:150]


def fill_difference(bench: Bench, check: str, row: dict) -> None:
    for name in ("float32", "float16"):
        row[name] = equal.difference(check, bench.device, getattr(torch, name), bench.sizes.small)


def step_of(bench: Bench, frames: int, offload: str) -> tuple[Callable[[], Tensor], Slicing]:
    """A denoising step, and the way in which it is sliced."""
    model, (latents, hints, context) = bench.model(), bench.inputs(frames)
    way = plans(bench.device, bench.dtype, (frames, *bench.sizes.finest), None, offload)[0]
    # As `sample` has them: hints wait with the skips, and the prompt's keys and values are made once.
    hints = Offloaded(hints, bench.device) if way.offload else hints.to(bench.device)
    known = Context(context)

    def step() -> Tensor:
        with torch.inference_mode(), slices(way):
            return predict_noise(model, latents, 501, known, hints)

    return step, way


def fill_step(bench: Bench, frames: int, offload: str, row: dict) -> None:
    """Raises MemoryError, too, where pinned memory would take most of the host's."""
    bench.release()
    width, side, _ = bench.sizes.finest
    where = {"offload": offload, "device": bench.device}
    row["predicted, GB"] = predicted(sampling_peak, bench.model(), frames, side, side, bench.dtype, **where)
    # Skips and hints are 7 times a finest map, and PyTorch rounds pinned buffers up to powers of two.
    pinned = 12 * frames * width * side**2 * bench.dtype.itemsize
    if offload == OFFLOADED and pinned > 0.8 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise MemoryError
    step, way = step_of(bench, frames, offload)
    row["frames a slice"] = min(frames, way.numbers // (width * side**2))
    row["seconds"] = bench.seconds(step)
    row["TFLOP/s"] = frames * operations(bench.without_weights(), side, side)[0] / TERA / row["seconds"]
    row.update(bench.memory())


def step_key(frames: int, offload: str) -> str:
    return f"b {frames} frames, " + ("all kept" if offload == KEPT else "skips offloaded")


def short_step_seconds(bench: Bench) -> float:
    """Of the shortest step, from part b. Raises MemoryError where it does not fit."""
    short = bench.sizes.short
    row = bench.rows.measured(step_key(short, KEPT), partial(fill_step, bench, short, KEPT))
    if "reason" in row:
        raise MemoryError
    return row["seconds"]


def fill_whole(bench: Bench, row: dict) -> None:
    """Encode, invert, sample and decode, with fewer steps and frames, and the seconds scaled."""
    bench.release()
    model, frames, pixels = bench.model(), bench.sizes.whole, bench.sizes.pixels
    _, hints, context = bench.inputs(frames)
    image = np.random.default_rng(0).integers(0, 256, (1, pixels, pixels, 3), dtype=np.uint8)
    latent = encode_frames(model, image)
    noise = latent.repeat(frames, 1, 1, 1)
    few = noise[:16]
    ways = plans(bench.device, bench.dtype, (frames, *bench.sizes.finest))

    def all_steps(work: Callable[[int], object]) -> float:
        """What does not depend on the number of steps counts once."""
        first, further = bench.first_and_further(work)
        return first + (STEPS - 1) * further

    row["encode, s"] = bench.seconds(lambda: encode_frames(model, image))
    row["invert, s"] = all_steps(lambda steps: invert(model, latent, hints[:1], context, steps))
    row["sample, s"] = all_steps(lambda steps: sample(model, noise, hints, context, steps, slicing=ways))
    row["decode, s"] = bench.seconds(lambda: list(decode_latents(model, few))) * frames / len(few)
    row["together, s"] = sum(row.values())  # of seconds alone, so far
    row.update(bench.memory())


def fill_training(bench: Bench, row: dict) -> None:
    """Training changes the networks, so it has its own, in the precision that `compute_device` chooses."""
    bench.release(networks=True)
    emulated = bench.on_gpu and torch.cuda.get_device_capability(bench.device) < (8, 0)
    dtype = torch.float16 if emulated else torch.bfloat16
    model = equal.without_weights(bench.sizes.unet, HINTS)
    short, side = bench.sizes.short, bench.sizes.finest[1]
    row["precision"] = str(dtype).removeprefix("torch.")
    row["predicted, GB"] = predicted(training_peak, model, short, side, side, dtype)
    equal.with_random_weights(model, dtype, bench.device)
    latents, hints, context = bench.inputs(short, dtype)
    clip = latents, hints.to(bench.device), context

    def steps(number: int) -> None:
        with TemporaryDirectory() as folder, equal.without_cudnn_attention():
            files = Path(folder) / "state.pt", Path(folder) / "loss.csv"
            train(model, *clip, number, 1e-6, 0, *files)

    row["seconds"] = bench.first_and_further(steps)[1]
    row.update(bench.memory())


def fill_peer(bench: Bench, name: str, row: dict) -> None:
    """In a process of its own, by `step.py`. Why that failed is said in one line."""
    args, sizes = bench.args, bench.sizes
    there = args.controlvideo if name == CONTROLVIDEO else importlib.util.find_spec("diffusers")
    if not there:
        row["reason"] = NOT_INSTALLED
        return
    ours = short_step_seconds(bench)
    bench.release(networks=True)  # so that the card is free for the other process
    options = [f"--frames={sizes.short}", f"--size={sizes.pixels}", f"--device={bench.device}"]
    options += ["--dtype=float16", "--runs=3", "--widths", *map(str, sizes.unet.widths)]
    options += [f"--controlvideo={there}"] if name == CONTROLVIDEO else []
    try:
        result = run(name, args.python, options, stderr=subprocess.PIPE)
    except subprocess.CalledProcessError as error:
        said = (error.stderr.decode(errors="replace").strip() or f"{error}").splitlines()[-1]
        if "out of memory" in said:
            raise MemoryError from None
        missing = said.startswith(("ModuleNotFoundError", "ImportError"))
        row["reason"] = NOT_INSTALLED if missing else one_line(f"failed: {said}")
        return
    row["seconds"] = statistics.median(result["seconds"][1:])  # the first warms up
    row["against ours"] = row["seconds"] / ours
    row["allocated, GB"] = result["peak"] and result["peak"] / GIGA


def fill_rate(bench: Bench, operation: str, row: dict) -> None:
    """Of a plain operation, 10 in a row, so that the GPU does not wait to be told of the next."""
    bench.release()
    there = {"device": bench.device, "dtype": bench.dtype}
    n, frames, (width, side, _) = bench.sizes.matrix, bench.sizes.short, bench.sizes.finest
    if operation == "convolution":
        shapes = (frames, width, side, side), (width, width, 3, 3)
        x, weight = (torch.randn(shape, **there).to(memory_format=torch.channels_last) for shape in shapes)
        count, work = 2 * 9 * width**2 * side**2 * frames, partial(F.conv2d, x, weight, padding=1)
    else:
        count, work = 2 * n**3, partial(torch.matmul, *torch.randn(2, n, n, **there))

    def ten() -> None:
        for _ in range(10):
            work()

    row["seconds"] = bench.seconds(ten) / 10
    row["TFLOP/s"] = count / TERA / row["seconds"]


def fill_compiled(bench: Bench, row: dict) -> None:
    """The blocks compiled one by one, each for its own shapes. Where that fails, the row has the reason."""
    before = short_step_seconds(bench)
    bench.release()
    step, _ = step_of(bench, bench.sizes.short, KEPT)
    expected, networks = step(), nn.ModuleList([bench.model().unet, bench.model().controlnet])
    blocks = [x for x in networks.modules() if isinstance(x, (ResnetBlock2D, Transformer2DModel))]
    # A CPU's rehearsal leaves out what takes minutes: the kernels.
    backend = "inductor" if bench.on_gpu else "eager"
    try:
        # Blocks of a kind share their code, and each of its versions counts towards this limit.
        with torch._dynamo.config.patch(recompile_limit=len(blocks)):
            for block in blocks:
                block.forward = torch.compile(block.forward, dynamic=False, backend=backend)
            row["first step, s"] = seconds(step, bench.device)
            row["difference"] = ((step() - expected).abs().max() / expected.abs().max()).item()
            row["seconds"] = bench.seconds(step)
        row["against uncompiled"] = row["seconds"] / before
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        row["reason"] = one_line(f"{type(error).__name__}: {error}")
    bench.release(networks=True)


# ---- The tables ---------------------------------------------------------------------------------


def tables(bench: Bench) -> list[Table]:
    sizes = bench.sizes
    at = f"at {sizes.pixels}x{sizes.pixels}"
    beside = f"A denoising step of {sizes.short} frames with"
    steps = [(frames, offload) for offload in (KEPT, OFFLOADED) for frames in sizes.frames]
    return [
        Table(
            "Differences from the CPU in float32",
            ("float32", "float16"),
            {f"a {check}": partial(fill_difference, bench, check) for check in equal.CHECKS},
            "Small networks, 5 frames. The largest difference against the largest number of a result; of "
            "several results, such as gradients, the worst. float32 is without TF32.",
        ),
        Table(
            f"A denoising step {at}",
            ("seconds", "frames a slice", "TFLOP/s", *MEMORY),
            {step_key(*each): partial(fill_step, bench, *each) for each in steps},
            "ControlNet and UNet in float16. Temporal attention is not counted in TFLOP/s.",
        ),
        Table(
            f"A command: {sizes.whole} frames {at} in {STEPS} steps",
            ("encode, s", "invert, s", "sample, s", "decode, s", "together, s", *MEMORY[1:]),
            {f"b {sizes.whole} frames, the command": partial(fill_whole, bench)},
            "Encoding and inversion are of one frame. Measured are runs of 1 and 3 steps, and decoding of at most "
            "16 frames; the rest is scaled. Left out are poses, the text encoder, loading and video files.",
        ),
        Table(
            f"A training step on {sizes.short} frames {at}",
            ("precision", "seconds", *MEMORY),
            {"c a step, AdamW included": partial(fill_training, bench)},
        ),
        Table(
            f"{beside} other code",
            ("seconds", "against ours", "allocated, GB"),
            {f"d {peer}": partial(fill_peer, bench, peer) for peer in (DIFFUSERS, CONTROLVIDEO)},
            "float16, the others as they come; ours is in part b. 2-D: frames as a batch, no temporal layers.",
        ),
        Table(
            "Plain operations, to compare part b's TFLOP/s with",
            ("seconds", "TFLOP/s"),
            {f"e {name}": partial(fill_rate, bench, name) for name in ("matrix product", "convolution")},
            f"float16. The product is of two square matrices of {sizes.matrix} rows. The convolution is 3x3, of "
            f"{sizes.short} of the finest feature maps.",
        ),
        Table(
            f"{beside} torch.compile",
            ("seconds", "against uncompiled", "difference", "first step, s"),
            {"f residual blocks and transformers compiled": partial(fill_compiled, bench)},
            "Only measured: no command compiles. A CPU rehearsal traces the blocks, and compiles no kernels.",
        ),
    ]
