"""How long one denoising step takes, ControlNet and UNet, against the public implementations.

    python bench/step.py                          ours and diffusers (2-D: frames as a batch, no temporal layers)
    python bench/step.py --controlvideo FOLDER    and the public ControlVideo code, with --python of an
                                                  environment that it runs in (diffusers 0.11.1)

Each runs in processes of its own, turn by turn, with the same random weights at Stable Diffusion 1.5's sizes: the
peers as they come, and on a CPU with memory kept as ours asks for it (`keep_freed_memory`). On one frame all
compute the same, so their error there, against float32, says what their speed costs.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import HINTS, WIDTHS, print_table, random_weights, seconds
from safe.process import keep_freed_memory

OURS, DIFFUSERS, CONTROLVIDEO, EXACT = "ours", "diffusers, 2-D", "ControlVideo", "exact"

# UNet and ControlNet on the meta device, and the step that calls them: latents, timestep, context, hints -> noise
Implementation = tuple[nn.Module, nn.Module, Callable[[Tensor, int, Tensor, Tensor], Tensor]]


def our_code(widths: tuple[int, ...]) -> Implementation:
    from controlnet import ControlNet
    from posecrafter import finest_map, network_inputs, predict_noise
    from slicing import plans, slices
    from unet import Context, UNet, UNetConfig

    config, known = UNetConfig(widths=widths), {}
    with torch.device("meta"):
        model = SimpleNamespace(unet=UNet(config), controlnet=ControlNet(config, HINTS))

    def step(latents: Tensor, timestep: int, context: Tensor, hint: Tensor) -> Tensor:
        if "context" not in known or len(known["hint"]) != len(hint):  # once per run, not per step
            known.update(context=Context(context), hint=model.controlnet.embed_hint(hint))
        with slices(plans(*network_inputs(model).values(), finest_map(model, latents))[0]):
            return predict_noise(model, latents, timestep, known["context"], known["hint"])

    return model.unet, model.controlnet, step


def public_code(widths: tuple[int, ...], video: bool) -> Implementation:
    """The public ControlVideo code, whose clips are (1, 4, F, h, w), or diffusers, whose batches are frames."""
    if video:
        from libs.controlnet3d import ControlNetModel  # of the public code's folder, on the path
        from libs.unet import UNet3DConditionModel as UNet
    else:
        from diffusers import ControlNetModel
        from diffusers import UNet2DConditionModel as UNet

    sizes = {"block_out_channels": widths, "cross_attention_dim": 768, "attention_head_dim": 8}
    with torch.device("meta"):
        unet = UNet(**sizes)
        controlnet = ControlNetModel(conditioning_embedding_out_channels=HINTS, **sizes)

    def step(x: Tensor, timestep: int, context: Tensor, hint: Tensor) -> Tensor:
        context = context.expand(1 if video else len(x), -1, -1)
        if video:
            x, hint = (frames.transpose(0, 1)[None].contiguous() for frames in (x, hint))
        residuals, middle = controlnet(x, timestep, context, hint, return_dict=False)
        added = {"down_block_additional_residuals": residuals, "mid_block_additional_residual": middle}
        noise = unet(x, timestep, context, **added).sample
        return noise[0].transpose(0, 1) if video else noise

    return unet, controlnet, step


IMPLEMENTATIONS = {
    OURS: our_code,
    EXACT: our_code,
    DIFFUSERS: partial(public_code, video=False),
    CONTROLVIDEO: partial(public_code, video=True),
}


@torch.no_grad()
def measure(args: argparse.Namespace) -> None:
    """In a process of its own: saves the seconds of every run, the noise predicted for one frame, and on a GPU
    the most bytes that tensors took there.
    """
    if args.controlvideo:
        sys.path.insert(0, str(args.controlvideo))
    name, exact = args.measure, args.measure == EXACT
    if args.memory_kept or name == OURS:
        keep_freed_memory()
    there = {"device": args.device, "dtype": torch.float32 if exact else getattr(torch, args.dtype)}
    *networks, step = IMPLEMENTATIONS[name](tuple(args.widths))
    for seed, network in enumerate(networks):
        random_weights(network, seed, there["dtype"]).to(args.device)
        if name != CONTROLVIDEO:
            network.to(memory_format=torch.channels_last)
    if exact:
        torch.backends.cudnn.allow_tf32 = False  # of products it is off by default
    random = torch.Generator().manual_seed(0)

    def inputs(frames: int) -> tuple:
        latents = torch.randn(frames, 4, args.size // 8, args.size // 8, generator=random)
        hint = torch.rand(frames, 3, args.size, args.size, generator=random)
        context = torch.randn(77, 768, generator=random)
        return latents.to(**there), 501, context.to(**there), hint.to(**there)

    result = {"frame": step(*inputs(1)).float().cpu().contiguous()}
    clip, runs = inputs(args.frames), 0 if exact else 1 + args.runs
    result["seconds"] = [seconds(lambda: step(*clip), args.device) for _ in range(runs)]
    result["peak"] = torch.cuda.max_memory_allocated() if "cuda" in args.device else None
    torch.save(result, args.out)


def run(name: str, python: str, options: list[str], stderr: int | None = None) -> dict:
    """What `measure` saves, in a process of this file with such options.

    Raises subprocess.CalledProcessError where that fails; with what it said, if `stderr` is subprocess.PIPE.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.pt"
        python = python if name == CONTROLVIDEO else sys.executable
        command = [python, __file__, *options, "--measure", name, "--out", str(out)]
        subprocess.run(command, check=True, stderr=stderr)
        return torch.load(out, weights_only=True)


def main(args: argparse.Namespace) -> None:
    given, rows = sys.argv[1:], {OURS: (OURS, [])}
    for peer in (DIFFUSERS, CONTROLVIDEO) if args.controlvideo else (DIFFUSERS,):
        rows[peer] = peer, []
        if args.device == "cpu":
            rows[f"{peer}, memory kept"] = peer, ["--memory-kept"]
    exact = run(EXACT, args.python, given)["frame"]
    results = {row: [] for row in rows}
    for _ in range(args.processes):
        for row, (name, option) in rows.items():
            results[row].append(run(name, args.python, given + option))
    # The first run of each process warms up.
    took = {row: [s for each in found for s in each["seconds"][1:]] for row, found in results.items()}
    ours = statistics.median(took[OURS])

    def cells(row: str) -> tuple[str, ...]:
        middle, spread = statistics.median(took[row]), f"{min(took[row]):.2f} to {max(took[row]):.2f}"
        error = (results[row][0]["frame"] - exact).norm() / exact.norm()
        return row, f"{middle:.2f}", spread, f"{middle / ours:.2f}", f"{error:.4f}"

    print(f"One step, {args.frames} frames of {args.size}x{args.size}, {args.dtype}:\n")
    head = "", "seconds", "fastest to slowest", "against ours", "error on one frame"
    print_table(head, map(cells, rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--frames", type=int, default=8)
    add("--size", type=int, default=512, help="pixels")
    add("--widths", type=int, nargs=4, default=WIDTHS)
    add("--device", default="cpu", help="cpu, or cuda for a GPU")
    add("--dtype", default="bfloat16", help="bfloat16 or float16")
    add("--runs", type=int, default=2, help="per process, after one to warm up")
    add("--processes", type=int, default=2)
    add("--controlvideo", type=Path, help="folder of the public ControlVideo code")
    add("--python", default=sys.executable, help="interpreter for --controlvideo")
    add("--measure", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    add("--memory-kept", action="store_true", help=argparse.SUPPRESS)
    add("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    measure(args) if args.measure else main(args)
