"""How long one denoising step takes, ControlNet and UNet, against the public implementations.

    python bench/step.py                          ours and diffusers (2-D: frames as a batch, no temporal layers)
    python bench/step.py --controlvideo FOLDER    and the public ControlVideo code, with --python of a
                                                  environment that it runs in (diffusers 0.11.1)

Each runs in processes of its own, turn by turn, with the same random weights at Stable Diffusion 1.5's sizes: the
peers as they come, and on a CPU with memory kept and huge pages as ours asks for them. On one frame all compute
the same, so their error there, against float32, says what their speed costs. `--device cuda --dtype float16` has
the same on a GPU.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
WIDTHS, HINTS = (320, 640, 1280, 1280), (16, 32, 96, 256)
# What `command.py` says to glibc and torch, from outside.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(256 * 2**20),
    "MALLOC_ARENA_MAX": "1",
    "THP_MEM_ALLOC_ENABLE": "1",
}
OURS, DIFFUSERS, CONTROLVIDEO, EXACT = "ours", "diffusers, 2-D", "ControlVideo", "exact"


# ---- The networks, each as a function of (latents, timestep, context, hints) ---------------------


def random_weights(network: nn.Module, seed: int, dtype: torch.dtype) -> nn.Module:
    """Weights that keep the scale of what goes through; the same for the same names, whoever asks."""
    network = network.to(dtype).to_empty(device="cpu")
    for name, tensor in sorted(network.state_dict().items()):
        random = torch.Generator().manual_seed(seed + sum(name.encode()) * len(name))
        if "_temp." in name or tensor.ndim == 1:
            tensor.fill_(float("norm" in name and name.endswith("weight")))
        else:
            weights = torch.empty(tensor.shape).uniform_(-1, 1, generator=random)
            tensor.copy_((weights * (3 / tensor[0].numel()) ** 0.5).bfloat16())
    return network.eval().requires_grad_(False)


def ours(widths, hints, dtype, device):
    sys.path.insert(0, str(ROOT))
    from command import keep_freed_memory
    from controlnet import ControlNet
    from posecrafter import finest_map
    from slicing import plans, slices
    from unet import Context, UNet, UNetConfig

    keep_freed_memory()
    with torch.device("meta"):
        unet = UNet(UNetConfig(widths=widths))
        controlnet = ControlNet(UNetConfig(widths=widths), hints)
    unet, controlnet = (
        random_weights(network, seed, dtype).to(device, memory_format=torch.channels_last)
        for seed, network in enumerate((unet, controlnet))
    )
    known = {}

    def step(latents: Tensor, timestep: int, context: Tensor, hint: Tensor) -> Tensor:
        if "context" not in known or len(known["hint"]) != len(hint):  # once per run, not per step
            known.update(context=Context(context), hint=controlnet.embed_hint(hint))
        bundle = argparse.Namespace(unet=unet)
        (way, *_) = plans(latents.device, dtype, finest_map(bundle, latents))
        with slices(way):
            control = controlnet(latents, timestep, known["context"], known["hint"])
            return unet(latents, timestep, known["context"], control)

    return step


def exact(widths, hints, dtype, device):
    torch.backends.cudnn.allow_tf32 = False  # of products it is off by default
    return ours(widths, hints, dtype, device)


def diffusers_2d(widths, hints, dtype, device):
    import diffusers

    sizes = {"block_out_channels": widths, "cross_attention_dim": 768, "attention_head_dim": 8}
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
            **sizes,
        )
        controlnet = diffusers.ControlNetModel(
            down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            conditioning_embedding_out_channels=hints,
            **sizes,
        )
    unet, controlnet = (
        random_weights(network, seed, dtype).to(device, memory_format=torch.channels_last)
        for seed, network in enumerate((unet, controlnet))
    )

    def step(latents: Tensor, timestep: int, context: Tensor, hint: Tensor) -> Tensor:
        context = context.expand(len(latents), -1, -1)
        residuals, middle = controlnet(latents, timestep, context, hint, return_dict=False)
        return unet(
            latents,
            timestep,
            context,
            down_block_additional_residuals=residuals,
            mid_block_additional_residual=middle,
        ).sample

    return step


def controlvideo(widths, hints, dtype, device):
    from libs.controlnet3d import ControlNetModel  # of the public code's folder, on the path
    from libs.unet import UNet3DConditionModel

    sizes = {"block_out_channels": widths, "cross_attention_dim": 768, "attention_head_dim": 8}
    with torch.device("meta"):
        unet = UNet3DConditionModel(**sizes)
        controlnet = ControlNetModel(conditioning_embedding_out_channels=hints, **sizes)
    unet, controlnet = (
        random_weights(network, seed, dtype).to(device) for seed, network in enumerate((unet, controlnet))
    )

    def step(latents: Tensor, timestep: int, context: Tensor, hint: Tensor) -> Tensor:
        clip, hint = (x.transpose(0, 1)[None].contiguous() for x in (latents, hint))
        residuals, middle = controlnet(clip, timestep, context[None], hint, return_dict=False)
        predicted = unet(
            clip,
            timestep,
            context[None],
            down_block_additional_residuals=residuals,
            mid_block_additional_residual=middle,
        ).sample
        return predicted[0].transpose(0, 1)

    return step


IMPLEMENTATIONS = {OURS: ours, DIFFUSERS: diffusers_2d, CONTROLVIDEO: controlvideo, EXACT: exact}


# ---- Measuring ----------------------------------------------------------------------------------


@torch.no_grad()
def measure(args: argparse.Namespace) -> None:
    """In a process of its own: saves the seconds of every run, what one frame's noise came out as, and on a GPU
    the most bytes that tensors took there.
    """
    if args.controlvideo:
        sys.path.insert(0, str(args.controlvideo))
    dtype = torch.float32 if args.measure == EXACT else getattr(torch, args.dtype)
    step = IMPLEMENTATIONS[args.measure](tuple(args.widths), HINTS, dtype, args.device)
    on_gpu = torch.device(args.device).type == "cuda"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    random = torch.Generator().manual_seed(0)

    def inputs(frames: int) -> tuple:
        latents = torch.randn(frames, 4, args.size // 8, args.size // 8, generator=random)
        hint = torch.rand(frames, 3, args.size, args.size, generator=random)
        context = torch.randn(77, 768, generator=random)
        there = {"device": args.device, "dtype": dtype}
        return latents.to(**there), 501, context.to(**there), hint.to(**there)

    result = {"frame": step(*inputs(1)).float().cpu().contiguous(), "seconds": []}
    clip = inputs(args.frames)
    for _ in range(0 if args.measure == EXACT else 1 + args.runs):
        wait()
        start = time.perf_counter()
        step(*clip)
        wait()
        result["seconds"].append(time.perf_counter() - start)
    result["peak"] = torch.cuda.max_memory_allocated() if on_gpu else None
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
    peers = [DIFFUSERS, *([CONTROLVIDEO] if args.controlvideo else [])]
    rows = {OURS: (OURS, {})}
    for peer in peers:
        rows[peer] = peer, {}
        if args.device == "cpu":
            rows[f"{peer}, memory kept"] = peer, KEEP_MEMORY
    options = sys.argv[1:]
    reference = run(EXACT, args.python, options, {})["frame"]
    results = {row: [] for row in rows}
    for _ in range(args.processes):
        for row, (name, environment) in rows.items():
            results[row].append(run(name, args.python, options, environment))
            print(row, *(f"{s:.2f}" for s in results[row][-1]["seconds"]), file=sys.stderr)

    table = {}
    for row, found in results.items():
        seconds = [s for result in found for s in result["seconds"][1:]]  # the first warms up
        error = (found[0]["frame"] - reference).norm() / reference.norm()
        table[row] = statistics.median(seconds), min(seconds), max(seconds), error.item()
    print(f"One step, {args.frames} frames of {args.size}x{args.size}, {args.dtype}:\n")
    print("| | seconds | fastest to slowest | against ours | error on one frame |")
    print("| --- | --- | --- | --- | --- |")
    for row, (middle, best, worst, error) in table.items():
        ratio = middle / table[OURS][0]
        print(f"| {row} | {middle:.2f} | {best:.2f} to {worst:.2f} | {ratio:.2f} | {error:.4f} |")
    if args.json:
        args.json.write_text(json.dumps(table, indent=1) + "\n")


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
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--measure", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    measure(args) if args.measure else main(args)
