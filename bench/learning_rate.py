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
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import posecrafter as method
from bench.common import HINTS, ROOT, print_table
from bench.equal import prepare_training, with_random_weights, without_weights
from bench.widen import start_temporal_attention, widen
from checkpoint import load_model
from demo.puppet import clip
from device import compute_device
from metrics.figures import psnr
from poses.source import uniform_frames
from safe.files import write_json
from safe.process import keep_freed_memory
from train import autocast_loss
from unet import BasicTransformerBlock, UNetConfig

WORK = ROOT / "runs" / "learning_rate"
PUPPETS = (12, 13)  # that no other table uses
SIZE = 96  # pixels
TRAINING_FRAMES, TARGET_FRAMES, DDIM_STEPS = 4, 6, 10
# Times the demo model's. 4 times are 256, 512, 640 and 640 with 8 heads, near Stable Diffusion's.
WIDTHS = (1, 2, 4)
PUBLIC, PUBLIC_RATES = "clipped as the public code does", (3e-5, 3e-3)
CLEAN_RATES = (3e-5, 7e-5, 1e-4, 2e-4, 3e-4, 1e-3, 3e-3)
STEP_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
TUNING_RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
LOSS_TIMESTEPS = (100, 300, 500, 700, 900)
SCALE = 65536  # torch.amp.GradScaler's first scale, which it keeps for 2000 steps if nothing overflows

Inputs = tuple[Tensor, Tensor, Tensor]  # latents (F, C, h, w), embedded hints, context


def kept(name: str, compute: Callable[[], dict]) -> dict:
    """A result from `runs/learning_rate/`, computed only if it is not there."""
    path = WORK / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, compute())
    return json.loads(path.read_text())


# ---- The models, and what they see --------------------------------------------------------------


def demo_model(times: int, dtype: torch.dtype) -> SimpleNamespace:
    """The demo model, widened."""
    model = load_model("demo")
    return cast_and_freeze(widen(model, times) if times > 1 else model, dtype)


def cast_and_freeze(model, dtype: torch.dtype) -> SimpleNamespace:
    for network in (model.unet, model.controlnet, model.vae, model.text_encoder):
        network.to(dtype=dtype, memory_format=torch.channels_last).requires_grad_(False)
    return model


@lru_cache
def scene(puppet: int) -> SimpleNamespace:
    """Frames uint8 (F, SIZE, SIZE, 3) and poses to train on, and another dance with the person's masks."""
    filmed, poses, _ = clip(puppet, 2 * puppet, 36, SIZE)
    truth, targets, person = clip(puppet, 2 * puppet + 1, 48, SIZE)
    chosen, asked = uniform_frames(range(36), TRAINING_FRAMES), uniform_frames(range(48), TARGET_FRAMES)
    training = {"frames": filmed[chosen], "poses": [poses[i] for i in chosen]}
    dance = {"truth": truth[asked], "targets": [targets[i] for i in asked], "person": person[asked]}
    return SimpleNamespace(**training, **dance)


def training_inputs(model, of: SimpleNamespace) -> Inputs:
    latents = method.encode_frames(model, of.frames)
    hints = method.embed_hints(model, of.poses, SIZE, SIZE)
    # Clones, because autograd takes no inference tensors.
    return latents.clone(), hints.clone(), method.encode_prompt(model, "a person").clone()


# ---- A fine-tuning and what comes of it ---------------------------------------------------------


def loss_at(model, inputs: Inputs, timestep: int, seed: int) -> Tensor:
    noise = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(seed))
    return autocast_loss(model, *inputs, timestep, noise)


@torch.no_grad()
def fixed_loss(model, inputs: Inputs) -> float:
    """The mean over the same five timesteps and noises every time."""
    return statistics.mean(loss_at(model, inputs, t, seed=1_000_000 + t).item() for t in LOSS_TIMESTEPS)


def clip_as_the_public_code(trained: Sequence[nn.Parameter], frozen: Iterable[nn.Parameter]) -> None:
    """Scales the trained gradients as ControlVideo's `train.py` does, to a norm of 1 over ALL parameters.

    There the gradient scaler has multiplied all gradients, and divides only the optimizer's before the norm is
    taken. Here none is scaled, so the frozen ones count `SCALE` times.
    """
    norms = [parameter.grad.norm() for parameter in trained]
    norms += [SCALE * p.grad.norm(dtype=torch.float32) for p in frozen if p.grad is not None]
    factor = (1 / (torch.stack(norms).norm() + 1e-6)).clamp(max=1)
    for parameter in trained:
        parameter.grad.mul_(factor)


def mean_size(tensors: Iterable[Tensor]) -> float:
    """Mean absolute value of all elements."""
    return torch.cat([t.detach().abs().flatten() for t in tensors]).mean(dtype=torch.float64).item()


def fine_tune(model, inputs: Inputs, rate: float, public: bool) -> dict[str, float]:
    """Fine-tunes in place as `train.train` does, with gradients clipped to norm 1 over the trained tensors.

    public: clip them as the public code does. Returns the mean size of the gradients' elements after clipping, in
    the median step, and how far weights moved in the mean.
    """
    trained = list(prepare_training(model).values())
    start = [parameter.detach().clone() for parameter in trained]
    both, ours = nn.ModuleList([model.unet, model.controlnet]), set(map(id, trained))
    others = (parameter for parameter in both.parameters() if id(parameter) not in ours)
    frozen = [parameter.requires_grad_(public) for parameter in others]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    sizes = []
    for step in tqdm(range(method.training_steps(TRAINING_FRAMES)), desc=f"rate {rate:g}", leave=False):
        timestep = torch.randint(0, 1000, (), generator=torch.Generator().manual_seed(step)).item()
        both.zero_grad()
        loss_at(model, inputs, timestep, seed=step).backward()
        if public:
            clip_as_the_public_code(trained, frozen)
        else:
            nn.utils.clip_grad_norm_(trained, 1.0)
        sizes.append(mean_size(parameter.grad for parameter in trained))
        optimizer.step()
    both.zero_grad()
    moved = mean_size(now - before for now, before in zip(trained, start))
    return {"gradient": statistics.median(sizes), "moved": moved}


def tuning(times: int, puppet: int, rate: float, public: bool) -> dict[str, float]:
    """Loss and PSNR of the demo model, widened, after fine-tuning; at rate 0 of the model as it is."""

    def compute() -> dict[str, float]:
        dtype, of = compute_device(training=True)[1], scene(puppet)
        model = demo_model(times, dtype)
        inputs = training_inputs(model, of)
        figures = fine_tune(model, inputs, rate, public) if rate else {}
        figures["loss"] = fixed_loss(model, inputs)
        cast_and_freeze(model, dtype)
        latents = method.generate(model, of, of.targets, steps=DDIM_STEPS).latents
        result = np.stack(list(method.decode_latents(model, latents)))
        masks = {"person": of.person, "background": ~of.person, "whole": None}
        return figures | {name: psnr(result, of.truth, mask) for name, mask in masks.items()}

    name = f"x{times}-puppet{puppet}-{TRAINING_FRAMES}frames-{rate:g}{'-public' if public else ''}"
    return kept(name, compute)


# ---- One step -----------------------------------------------------------------------------------


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
    trained = list(prepare_training(model).values())
    start = [parameter.detach().clone() for parameter in trained]
    compute = partial(loss_at, model, inputs, timestep=500, seed=0)
    loss, before = contributions(model, compute)
    loss.backward()
    nn.utils.clip_grad_norm_(trained, 1.0)
    results = {}
    for rate in STEP_RATES:
        for parameter, weights in zip(trained, start):
            parameter.data.copy_(weights)
        torch.optim.AdamW(trained, lr=rate).step()
        loss_after, after = contributions(model, compute)
        pairs = zip(after, before, strict=True)
        changes = [((new - old).norm() / stream.norm()).item() for (new, _), (old, stream) in pairs]
        losses = {"before": loss.item(), "after": loss_after.item()}
        results[f"{rate:g}"] = losses | {"change": statistics.mean(changes)}
    return results


def first_step_of_demo(times: int) -> dict:
    model = demo_model(times, torch.float32)
    return first_step(model, training_inputs(model, scene(PUPPETS[0])))


def first_step_of_random_weights() -> dict:
    """At Stable Diffusion 1.5's sizes, on 3 frames of 128x128."""
    blank, random = without_weights(UNetConfig(), HINTS), torch.Generator().manual_seed(0)
    model = with_random_weights(blank, torch.float32, torch.device("cpu"))
    for network in (model.unet, model.controlnet):
        start_temporal_attention(network)
    images = torch.rand(3, 3, 128, 128, generator=random)
    latents, context = (torch.randn(shape, generator=random) for shape in ((3, 4, 16, 16), (77, 768)))
    with torch.no_grad():
        hints = model.controlnet.embed_hint(images)
    return first_step(model, (latents, hints, context))


# ---- The tables ---------------------------------------------------------------------------------


def print_tunings(
    widths: Sequence[int], puppets: Sequence[int], clean: Sequence[float], public: Sequence[float]
) -> None:
    """A table with a row for the model as it is, and for each fine-tuning at these rates, clipped in two ways."""
    ways = [(0, "not tuned"), *((rate, "clipped over what is trained") for rate in clean)]
    ways += [(rate, PUBLIC) for rate in public]
    figures = {"gradient": ".1e", "moved": ".1e", "loss": ".4f"}
    figures |= dict.fromkeys(("person", "background", "whole"), ".2f")

    def cells(times: int, puppet: int, rate: float, how: str) -> tuple:
        found = tuning(times, puppet, rate, how == PUBLIC)
        written = (format(found[name], form) if name in found else "–" for name, form in figures.items())
        return times, puppet, how, rate, *written

    head = "width", "puppet", "gradients", "rate", "element of the gradient", "weights moved", "loss"
    rows = (cells(times, puppet, *way) for times, puppet, way in product(widths, puppets, ways))
    print_table((*head, "person, dB", "background, dB", "whole frame, dB"), rows)


def print_first_steps(widths: Sequence[int]) -> None:
    models = {f"demo model, width times {r}": (f"b-x{r}", partial(first_step_of_demo, r)) for r in widths}
    models["Stable Diffusion 1.5's sizes, random weights"] = "b-sd", first_step_of_random_weights
    cell = "{change:.3f} ({before:.3f} → {after:.3f})"
    rows = ((title, *(cell.format(**at) for at in kept(*of).values())) for title, of in models.items())
    print_table(("model", *(f"{rate:g}" for rate in STEP_RATES)), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices="abc", default=list("abc"))
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS, help="of parts b and c")
    args = parser.parse_args()
    keep_freed_memory()
    parts = {
        "a": partial(print_tunings, WIDTHS[:1], PUPPETS[:1], CLEAN_RATES, PUBLIC_RATES),
        "b": partial(print_first_steps, args.widths),
        "c": partial(print_tunings, args.widths, PUPPETS, TUNING_RATES, PUBLIC_RATES[1:]),
    }
    for part in args.parts:
        print(f"\n({part})\n")
        parts[part]()


if __name__ == "__main__":
    main()
