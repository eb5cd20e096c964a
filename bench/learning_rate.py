"""Which learning rate is safe at Stable Diffusion's widths? Three measurements, told in docs/LEARNING_RATE.md.

    python bench/learning_rate.py --parts a    what the public code's gradient clipping makes of a rate
    python bench/learning_rate.py --parts b    how far one step moves networks of several widths
    python bench/learning_rate.py --parts c    fine-tuning the demo model at its own width, twice and four times it

Each part prints a table. Every result is kept in `runs/learning_rate/`, so the same command goes on where it was
stopped. No weights of Stable Diffusion are needed: (b) draws random ones, and (c) widens the demo model.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import posecrafter as method
from bench.step import random_weights
from bench.widen import start_temporal_attention, widen
from checkpoint import load_model
from command import keep_freed_memory
from controlnet import ControlNet
from demo.puppet import clip
from device import compute_device
from metrics.figures import psnr
from poses.pose import Pose
from poses.source import uniform_frames
from unet import BasicTransformerBlock, UNet, UNetConfig
from video import replacing

WORK = Path(__file__).resolve().parents[1] / "runs" / "learning_rate"
PUPPETS = (12, 13)  # that no other table uses
SIZE = 96  # pixels
TARGET_FRAMES, DDIM_STEPS = 6, 10
# Times the demo model's. 4 times are 256, 512, 640 and 640 with 8 heads, near Stable Diffusion's.
WIDTHS = (1, 2, 4)
PUBLIC_RATES = (3e-5, 3e-3)
CLEAN_RATES = (3e-5, 7e-5, 1e-4, 2e-4, 3e-4, 1e-3, 3e-3)
STEP_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
TUNING_RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
LOSS_TIMESTEPS = (100, 300, 500, 700, 900)
SCALE = 65536  # torch.amp.GradScaler's first scale, which it keeps for 2000 steps if nothing overflows


def kept(name: str, compute: Callable[[], dict]) -> dict:
    """A result from `runs/learning_rate/`, computed only if it is not there."""
    path = WORK / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        result = compute()
        with replacing(path) as unfinished:
            unfinished.write_text(json.dumps(result, indent=1) + "\n")
    return json.loads(path.read_text())


# ---- The models, and what they see --------------------------------------------------------------


def to_precision(model, dtype: torch.dtype) -> SimpleNamespace:
    for network in (model.unet, model.controlnet):
        network.to(dtype=dtype, memory_format=torch.channels_last)
    return model


@lru_cache(maxsize=1)  # one width at a time
def demo_model(times: int, dtype: torch.dtype) -> SimpleNamespace:
    """The demo model, widened."""
    model = SimpleNamespace(**vars(load_model("demo")))
    if times > 1:
        model = widen(model, times)
    for network in (model.vae, model.text_encoder):
        network.to(dtype)
    return to_precision(model, dtype)


def stable_diffusion_sized() -> SimpleNamespace:
    """UNet and ControlNet of Stable Diffusion 1.5's sizes with random weights in float32."""
    with torch.device("meta"):
        networks = {"unet": UNet(UNetConfig()), "controlnet": ControlNet(UNetConfig())}
    for seed, network in enumerate(networks.values()):
        random_weights(network, seed, torch.float32)
        start_temporal_attention(network)
    return to_precision(SimpleNamespace(**networks), torch.float32)


@lru_cache
def scene(puppet: int, frames: int) -> SimpleNamespace:
    """So many frames uint8 (F, SIZE, SIZE, 3) to train on, and another dance with the person's masks."""
    filmed, poses, _ = clip(puppet, 2 * puppet, 36, SIZE)
    chosen = uniform_frames(range(36), frames)
    truth, targets, person = clip(puppet, 2 * puppet + 1, 48, SIZE)
    asked = uniform_frames(range(48), TARGET_FRAMES)
    return SimpleNamespace(
        frames=filmed[chosen],
        poses=[poses[i] for i in chosen],
        truth=truth[asked],
        targets=[targets[i] for i in asked],
        person=person[asked],
    )


Inputs = tuple[Tensor, Tensor, Tensor]  # latents (F, C, h, w), embedded hints, context


def inputs_of(model, frames: np.ndarray, poses: Sequence[Pose]) -> Inputs:
    hints = method.embed_hints(model, poses, SIZE, SIZE)
    context = method.encode_prompt(model, "a person")
    # Clones, because autograd takes no inference tensors.
    return method.encode_frames(model, frames).clone(), hints.clone(), context.clone()


def random_inputs(model, frames: int = 3, size: int = 128) -> Inputs:
    random = torch.Generator().manual_seed(0)
    images = torch.rand(frames, 3, size, size, generator=random).to(**method.network_inputs(model))
    latents = torch.randn(frames, 4, size // 8, size // 8, generator=random)
    context = torch.randn(77, 768, generator=random).to(images.dtype)
    with torch.no_grad():
        return latents, model.controlnet.embed_hint(images), context


# ---- A fine-tuning and what comes of it ---------------------------------------------------------


def loss_at(model, inputs: Inputs, timestep: int, seed: int) -> Tensor:
    latents, hints, context = inputs
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    dtype = method.network_inputs(model)["dtype"]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return method.training_loss(model, latents, hints, context, timestep, noise)


@torch.no_grad()
def fixed_loss(model, inputs: Inputs) -> float:
    """The mean over the same five timesteps and noises every time."""
    losses = [loss_at(model, inputs, t, seed=1_000_000 + t).item() for t in LOSS_TIMESTEPS]
    return statistics.mean(losses)


def prepare(model) -> dict[str, nn.Parameter]:
    """The trained parameters by name, in float32, with gradients to come."""
    trained = method.trainable_parameters(model)
    for parameter in trained.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return trained


def taken(model) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in method.trainable_parameters(model).items()}


def put(model, tensors: dict[str, Tensor]) -> None:
    """Gives the model these trained tensors, in its own precision, frozen."""
    for name, parameter in method.trainable_parameters(model).items():
        parameter.requires_grad_(False)
        parameter.grad = None
        parameter.data = tensors[name].to(**method.network_inputs(model), copy=True)


def clip_as_the_public_code(trained: Iterable[nn.Parameter], frozen: Iterable[nn.Parameter]) -> None:
    """Scales the trained gradients as ControlVideo's `train.py` does, to a norm of 1 over ALL parameters.

    There the gradient scaler has multiplied all gradients, and divides only the optimizer's before the norm is
    taken. Here none is scaled, so the frozen ones count `SCALE` times.
    """
    trained = list(trained)
    norms = [parameter.grad.norm() for parameter in trained]
    norms += [SCALE * p.grad.norm(dtype=torch.float32) for p in frozen if p.grad is not None]
    factor = (1 / (torch.stack(norms).norm() + 1e-6)).clamp(max=1)
    for parameter in trained:
        parameter.grad.mul_(factor)


def mean_size(tensors: Iterable[Tensor]) -> float:
    """Mean absolute value of all elements."""
    tensors = list(tensors)
    return sum(t.abs().sum().item() for t in tensors) / sum(t.numel() for t in tensors)


def fine_tune(model, inputs: Inputs, steps: int, rate: float, public: bool = False) -> dict[str, float]:
    """Fine-tunes in place as `train.train` does, with gradients clipped to norm 1 over the trained tensors.

    public: clip them as the public code does. Returns the mean size of the gradients' elements after clipping, in
    the median step, and how far weights moved in the mean.
    """
    trained, start = prepare(model), taken(model)
    networks = nn.ModuleList([model.unet, model.controlnet])
    ours = set(map(id, trained.values()))
    frozen = [parameter for parameter in networks.parameters() if id(parameter) not in ours]
    for parameter in frozen:
        parameter.requires_grad_(public)
    optimizer = torch.optim.AdamW(trained.values(), lr=rate)
    sizes = []
    for step in tqdm(range(steps), desc=f"rate {rate:g}", leave=False):
        timestep = torch.randint(0, 1000, (), generator=torch.Generator().manual_seed(step)).item()
        networks.zero_grad()
        loss_at(model, inputs, timestep, seed=step).backward()
        if public:
            clip_as_the_public_code(trained.values(), frozen)
        else:
            nn.utils.clip_grad_norm_(trained.values(), 1.0)
        sizes.append(mean_size(parameter.grad for parameter in trained.values()))
        optimizer.step()
    networks.zero_grad()
    networks.requires_grad_(False)
    moved = mean_size(parameter - start[name] for name, parameter in trained.items())
    return {"gradient": statistics.median(sizes), "moved": moved}


def new_dance(model, of: SimpleNamespace) -> np.ndarray:
    """The frames uint8 (TARGET_FRAMES, SIZE, SIZE, 3) of the dance that is asked for, by the paper's method."""
    k = method.select_reference(of.poses, of.targets)
    latents, hint, context = inputs_of(model, of.frames[k : k + 1], [of.poses[k]])
    trajectory = method.invert(model, latents, hint, context, DDIM_STEPS)
    poses = method.insert_reference(of.poses[k], of.targets)
    noise = trajectory[-1].repeat(len(poses), 1, 1, 1)
    method.edit_latents(noise[1:], noise[0], poses[1:], poses[0])
    hints = method.embed_hints(model, poses, SIZE, SIZE)
    latents = method.sample(model, noise, hints, context, DDIM_STEPS)
    return np.stack(list(method.decode_latents(model, latents[1:])))


def tuning(times: int, puppet: int, rate: float, frames: int, public: bool = False) -> dict[str, float]:
    """Loss and PSNR of the demo model, widened, after fine-tuning; at rate 0 of the model as it is."""

    def compute() -> dict[str, float]:
        _, dtype = compute_device(training=True)
        model, of, figures = demo_model(times, dtype), scene(puppet, frames), {}
        inputs, base = inputs_of(model, of.frames, of.poses), taken(model)
        try:
            if rate:
                steps = method.training_steps(frames)
                figures = fine_tune(model, inputs, steps, rate, public)
            figures["loss"] = fixed_loss(model, inputs)
            put(model, taken(model))
            result = new_dance(model, of)
        finally:
            put(model, base)
        figures["person"] = psnr(result, of.truth, of.person)
        figures["background"] = psnr(result, of.truth, ~of.person)
        return figures | {"whole": psnr(result, of.truth)}

    name = f"x{times}-puppet{puppet}-{frames}frames-{rate:g}{'-public' if public else ''}"
    return kept(name, compute)


# ---- (a) The public code's clipping -------------------------------------------------------------


def part_a(frames: int, puppet: int = PUPPETS[0]) -> None:
    before = tuning(1, puppet, 0, frames)["loss"]
    print(f"The loss is {before:.4f} before.\n")
    print("| gradients | rate | element of the gradient | weights moved | loss after | person, dB |")
    print("| --- | --- | --- | --- | --- | --- |")
    rows = [("as the public code clips", rate, True) for rate in PUBLIC_RATES]
    rows += [("clipped over what is trained", rate, False) for rate in CLEAN_RATES]
    for how, rate, public in rows:
        row = tuning(1, puppet, rate, frames, public)
        print(
            f"| {how} | {rate:g} | {row['gradient']:.1e} | {row['moved']:.1e} "
            f"| {row['loss']:.4f} | {row['person']:.2f} |"
        )


# ---- (b) One step -------------------------------------------------------------------------------


def contributions(model, compute: Callable[[], Tensor]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The loss, and for each key-frame attention its output and the residual stream that this is added to."""
    found, streams, handles = [], [], []
    for block in nn.ModuleList([model.unet, model.controlnet]).modules():
        if isinstance(block, BasicTransformerBlock):
            enter = block.register_forward_pre_hook(lambda _, args: streams.append(args[0].detach()))
            leave = block.attn1.register_forward_hook(
                lambda _, args, out: found.append((out.detach().float(), streams[-1].float()))
            )
            handles += [enter, leave]
    loss = compute()  # under autograd, where every layer gets all frames at once
    for handle in handles:
        handle.remove()
    return loss, found


def first_step(model, inputs: Inputs) -> dict[str, dict[str, float]]:
    """One AdamW step from the same weights at each of the rates.

    model: in float32, because one step is often less than bfloat16 can add to a weight.
    """
    trained, start = prepare(model), taken(model)

    def compute() -> Tensor:
        return loss_at(model, inputs, timestep=500, seed=0)

    loss, before = contributions(model, compute)
    loss.backward()
    nn.utils.clip_grad_norm_(trained.values(), 1.0)
    results = {}
    for rate in STEP_RATES:
        for name, parameter in trained.items():
            parameter.data.copy_(start[name])
        torch.optim.AdamW(trained.values(), lr=rate).step()
        loss_after, after = contributions(model, compute)
        changes = [
            ((new - old).norm() / stream.norm()).item()
            for (new, _), (old, stream) in zip(after, before, strict=True)
        ]
        losses = {"before": loss.item(), "after": loss_after.item()}
        results[f"{rate:g}"] = losses | {"change": statistics.mean(changes)}
    put(model, start)
    return results


def part_b(widths: Sequence[int], frames: int, puppet: int = PUPPETS[0]) -> None:
    def of_demo(times: int) -> dict:
        model, of = demo_model(times, torch.float32), scene(puppet, frames)
        return first_step(model, inputs_of(model, of.frames, of.poses))

    def of_random_weights() -> dict:
        model = stable_diffusion_sized()
        return first_step(model, random_inputs(model))

    rows = {f"demo model, width times {r}": (f"b-x{r}", lambda r=r: of_demo(r)) for r in widths}
    rows["Stable Diffusion 1.5's sizes, random weights"] = "b-sd", of_random_weights
    print(f"| model | {' | '.join(f'{rate:g}' for rate in STEP_RATES)} |")
    print(f"| --- |{' --- |' * len(STEP_RATES)}")
    for row, (name, compute) in rows.items():
        cells = [
            f"{cell['change']:.3f} ({cell['before']:.3f} → {cell['after']:.3f})"
            for cell in kept(name, compute).values()
        ]
        print(f"| {row} | {' | '.join(cells)} |")


# ---- (c) Fine-tuning at several widths ----------------------------------------------------------


def part_c(widths: Sequence[int], puppets: Sequence[int], rates: Sequence[float], frames: int) -> None:
    rows = {"not tuned": (0, False)} | {f"{rate:g}": (rate, False) for rate in rates}
    rows["0.003, clipped as the public code does"] = 3e-3, True
    print("| width | puppet | rate | loss | person, dB | background, dB | whole frame, dB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for times, puppet, row in product(widths, puppets, rows):
        rate, public = rows[row]
        found = tuning(times, puppet, rate, frames, public)
        figures = " | ".join(f"{found[name]:.2f}" for name in ("person", "background", "whole"))
        print(f"| {times} | {puppet} | {row} | {found['loss']:.4f} | {figures} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices="abc", default=list("abc"))
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS, help="of parts b and c")
    parser.add_argument("--puppets", nargs="+", type=int, default=PUPPETS, help="of part c")
    parser.add_argument("--rates", nargs="*", type=float, default=TUNING_RATES, help="of part c")
    parser.add_argument("--frames", type=int, default=4, help="training frames (default: 4)")
    args = parser.parse_args()
    keep_freed_memory()
    for part in args.parts:
        print(f"\n({part})\n")
        if part == "a":
            part_a(args.frames)
        elif part == "b":
            part_b(args.widths, args.frames)
        else:
            part_c(args.widths, args.puppets, args.rates, args.frames)


if __name__ == "__main__":
    main()
