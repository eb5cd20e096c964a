"""How long one denoising step takes, ControlNet and UNet, against the public implementations.

    python bench/step.py                          ours and diffusers (2-D: frames as a batch, no temporal layers)
    python bench/step.py --controlvideo FOLDER    and the public ControlVideo code, with --python of an
                                                  environment that it runs in (diffusers 0.11.1)

Each runs in processes of its own, turn by turn, with the same random weights at Stable Diffusion 1.5's sizes: the
peers as they come, and on a CPU with memory kept and huge pages as ours asks for them. On one frame all compute
the same, so their error there, against float32, says what their speed costs. `--device cuda --dtype float16` has
the same on a GPU.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import HINTS, WIDTHS, print_table, random_weights, seconds

# What `command.keep_freed_memory` asks of glibc and torch, said from outside.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(256 * 2**20),
    "MALLOC_ARENA_MAX": "1",
    "THP_MEM_ALLOC_ENABLE": "1",
}
OURS, DIFFUSERS, CONTROLVIDEO, EXACT = "ours", "diffusers, 2-D", "ControlVideo", "exact"

# ---- The implementations: UNet and ControlNet on the meta device, and the step that calls them ---

# latents, timestep, context and hints -> noise
Implementation = tuple[nn.Module, nn.Module, Callable[[Tensor, int, Tensor, Tensor], Tensor]]


def ours(widths: tuple[int, ...]) -> Implementation:
    from command import keep_freed_memory
    from controlnet import ControlNet
    from posecrafter import finest_map, network_inputs, predict_noise
    from slicing import plans, slices
    from unet import Context, UNet, UNetConfig

    keep_freed_memory()
    config, known = UNetConfig(widths=widths), {}
    with torch.device("meta"):
        model = SimpleNamespace(unet=UNet(config), controlnet=ControlNet(config, HINTS))

    def step(latents: Tensor, timestep: int, context: Tensor, hint: Tensor) -> Tensor:
        if "context" not in known or len(known["hint"]) != len(hint):  # once per run, not per step
            known.update(context=Context(context), hint=model.controlnet.embed_hint(hint))
        with slices(plans(*network_inputs(model).values(), finest_map(model, latents))[0]):
            return predict_noise(model, latents, timestep, known["context"], known["hint"])

    return model.unet, model.controlnet, step


def predicted(
    unet: nn.Module, controlnet: nn.Module, x: Tensor, timestep: int, context: Tensor, hint: Tensor
):
    """The noise, by networks with the interface of diffusers."""
    residuals, middle = controlnet(x, timestep, context, hint, return_dict=False)
    added = {"down_block_additional_residuals": residuals, "mid_block_additional_residual": middle}
    return unet(x, timestep, context, **added).sample


def diffusers_2d(widths: tuple[int, ...]) -> Implementation:
    import diffusers

    sizes = {"block_out_channels": widths, "cross_attention_dim": 768, "attention_head_dim": 8}
    sizes["down_block_types"] = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, **sizes
        )
        controlnet = diffusers.ControlNetModel(conditioning_embedding_out_channels=HINTS, **sizes)

    def step(latents: Tensor, timestep: int, context: Tensor, hint: Tensor) -> Tensor:
        return predicted(unet, controlnet, latents, timestep, context.expand(len(latents), -1, -1), hint)

    return unet, controlnet, step


def controlvideo(widths: tuple[int, ...]) -> Implementation:
    from libs.controlnet3d import ControlNetModel  # of the public code's folder, on the path
    from libs.unet import UNet3DConditionModel

    sizes = {"block_out_channels": widths, "cross_attention_dim": 768, "attention_head_dim": 8}
    with torch.device("meta"):
        unet = UNet3DConditionModel(**sizes)
        controlnet = ControlNetModel(conditioning_embedding_out_channels=HINTS, **sizes)

    def step(latents: Tensor, timestep: int, context: Tensor, hint: Tensor) -> Tensor:
        clip, hint = (x.transpose(0, 1)[None].contiguous() for x in (latents, hint))
        return predicted(unet, controlnet, clip, timestep, context[None], hint)[0].transpose(0, 1)

    return unet, controlnet, step


IMPLEMENTATIONS = {OURS: ours, DIFFUSERS: diffusers_2d, CONTROLVIDEO: controlvideo, EXACT: ours}


# ---- Measuring ----------------------------------------------------------------------------------


@torch.no_grad()
def measure(args: argparse.Namespace) -> None:
    """In a process of its own: saves the seconds of every run, the noise predicted for one frame, and on a GPU
    the most bytes that tensors took there.
    """
    if args.controlvideo:
        sys.path.insert(0, str(args.controlvideo))
    name, exact = args.measure, args.measure == EXACT
    dtype = torch.float32 if exact else getattr(torch, args.dtype)
    *networks, step = IMPLEMENTATIONS[name](tuple(args.widths))
    for seed, network in enumerate(networks):
        random_weights(network, seed, dtype).to(args.device)
        if name != CONTROLVIDEO:
            network.to(memory_format=torch.channels_last)
    if exact:
        torch.backends.cudnn.allow_tf32 = False  # of products it is off by default
    random = torch.Generator().manual_seed(0)

    def inputs(frames: int) -> tuple:
        latents = torch.randn(frames, 4, args.size // 8, args.size // 8, generator=random)
        hint = torch.rand(frames, 3, args.size, args.size, generator=random)
        context = torch.randn(77, 768, generator=random)
        there = {"device": args.device, "dtype": dtype}
        return latents.to(**there), 501, context.to(**there), hint.to(**there)

    result = {"frame": step(*inputs(1)).float().cpu().contiguous()}
    clip = inputs(args.frames)
    runs = 0 if exact else 1 + args.runs
    result["seconds"] = [seconds(lambda: step(*clip), args.device) for _ in range(runs)]
    result["peak"] = torch.cuda.max_memory_allocated() if "cuda" in args.device else None
    torch.save(result, args.out)


def run(
    name: str, python: str, options: list[str], environment: dict[str, str], stderr: int | None = None
) -> dict:
    """What `measure` saves, in a process of this file with such options.

    Raises subprocess.CalledProcessError where that fails; with what it said, if `stderr` is subprocess.PIPE.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.pt"
        python = python if name == CONTROLVIDEO else sys.executable
        command = [python, __file__, *options, "--measure", name, "--out", str(out)]
        subprocess.run(command, check=True, env=os.environ | environment, stderr=stderr)
        return torch.load(out, weights_only=True)


def main(args: argparse.Namespace) -> None:
    rows = {OURS: (OURS, {})}
    for peer in (DIFFUSERS, CONTROLVIDEO) if args.controlvideo else (DIFFUSERS,):
        rows[peer] = peer, {}
        if args.device == "cpu":
            rows[f"{peer}, memory kept"] = peer, KEEP_MEMORY
    exact = run(EXACT, args.python, sys.argv[1:], {})["frame"]
    results = {row: [] for row in rows}
    for _ in range(args.processes):
        for row, (name, environment) in rows.items():
            results[row].append(run(name, args.python, sys.argv[1:], environment))

    def cells(row: str, took: list[float]) -> tuple[str, ...]:
        middle, frame = statistics.median(took), results[row][0]["frame"]
        error = (frame - exact).norm() / exact.norm()
        spread = f"{min(took):.2f} to {max(took):.2f}"
        return row, f"{middle:.2f}", spread, f"{middle / ours_took:.2f}", f"{error:.4f}"

    # The first run of each process warms up.
    took = {row: [s for each in found for s in each["seconds"][1:]] for row, found in results.items()}
    ours_took = statistics.median(took[OURS])
    print(f"One step, {args.frames} frames of {args.size}x{args.size}, {args.dtype}:\n")
    head = "", "seconds", "fastest to slowest", "against ours", "error on one frame"
    print_table(head, (cells(row, found) for row, found in took.items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", type=int, default=512, help="pixels")
    parser.add_argument("--widths", type=int, nargs=4, default=WIDTHS)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for a GPU")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16 or float16")
    parser.add_argument("--runs", type=int, default=2, help="per process, after one to warm up")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--controlvideo", type=Path, help="folder of the public ControlVideo code")
    parser.add_argument("--python", default=sys.executable, help="interpreter for --controlvideo")
    parser.add_argument("--measure", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    measure(args) if args.measure else main(args)
