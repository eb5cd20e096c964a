"""Fine-tunes the model on a few frames of one clip: `python train.py clip.mp4`.

Leaves a run folder that `sample.py` makes new videos from; docs/USAGE.md says what is in it. Given again, the same
command goes on from an interrupted run's last checkpoint, at most two minutes back.
"""

from command import training_arguments
from safe.process import before_torch, refuse_torchrun, run_command, stop_in_one_line

if __name__ == "__main__":  # before the imports below, which take seconds
    stop_in_one_line("train.py")
    refuse_torchrun("train.py")
    args = training_arguments()
    before_torch()

import math
import shlex
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm, trange

from checkpoint import Model, load_model
from device import compute_device, describe
from pictures.pages import run_data, write_page
from posecrafter import (
    embed_hints,
    encode_frames,
    encode_prompt,
    trainable_parameters,
    training_loss,
    training_steps,
    use_gradient_checkpointing,
)
from poses.pose import Pose, has_person, place_pose, poses_text
from poses.source import read_driver, uniform_frames
from public.adapters import remember_loras
from public.places import locate_parts
from run import begin_run, finish_run, name_of, refuse_finished
from safe.files import alone_in, replacing
from safe.provenance import VERSION
from safe.room import require_memory_for_frames, require_space_for_training
from safe.settings import LAYOUT, hash_inputs
from safe.tensors import load_state, not_finite
from video import Clip, fit, fit_frame, open_clip

BATCH = 8  # frames per training step, in order (the paper's "minimal batch size")
SAVE_EVERY = 120  # seconds between the checkpoints of a long run
FIRST_STEPS = 5  # after so many the loss tells whether the learning rate is far too high
FIXED_TIMESTEPS = 125, 375, 625, 875  # of the losses on fixed noises


def choose_frames(args: Namespace, count: int) -> list[int]:
    """The training frames' indices in a clip of `count` frames, uniformly from the range asked for."""
    usable = args.range or range(count)
    if usable.stop > count:
        raise ValueError(f"{args.clip}: frames up to {usable.stop} asked for, but it has {count}")
    if not 1 <= args.frames <= len(usable):
        there = f"{usable.start}:{usable.stop} has {len(usable)}"
        raise ValueError(f"{args.clip}: {args.frames} frames asked for, but {there}")
    return uniform_frames(usable, args.frames)


def read_training_frames(args: Namespace, cache: Path) -> tuple[Clip, list[Pose]]:
    """The training frames, which are read when they are needed, and their poses.

    Without `--poses` they are found in the clip itself, and kept in the folder `cache`. Raises ValueError for too
    few frames, for the poses of another clip, and for a chosen frame without a person.
    """
    clip, source = args.clip, args.poses or args.clip
    count, height, width, _ = open_clip(clip).shape
    choose_frames(args, count)  # before poses are looked for, which takes long
    kind, whole = (args.poses_are, None) if args.poses else ("video", args.frames)
    looking, size = (args.model, args.device, cache, args.person), (height, width)
    driver = read_driver(source, kind, args.range, *looking, whole_bodies=whole, canvas=size, length=count)
    tall, wide = driver.canvas
    if abs(tall / wide / (height / width) - 1) > 0.02:
        sizes = f"poses on a canvas of {wide:g}x{tall:g}, but {clip} has frames of {width}x{height}"
        raise ValueError(f"{source}: {sizes}: another clip's?")
    indices = choose_frames(args, min(count, driver.total))
    poses = [driver.poses[index - driver.within.start] for index in indices]
    if empty := [index for index, pose in zip(indices, poses) if not has_person(pose)]:
        advice = "choose another --range or --frames"
        raise ValueError(f"{clip}: no person in frame {empty[0]} (of its poses); {advice}")
    return open_clip(clip, indices), poses


@torch.no_grad()
def fixed_noise_loss(model: Model, latents: Tensor, hints: Tensor, context: Tensor) -> float:
    """The mean training loss of up to BATCH frames at four timesteps, with the same noises at every call.

    A step's own loss depends mostly on its timestep, and hardly tells whether the model has learned; this does.
    """
    frames = uniform_frames(range(len(latents)), min(BATCH, len(latents)))
    latents, hints, losses = latents[frames], hints[frames], []
    for timestep in FIXED_TIMESTEPS:
        noise = noise_like(latents, torch.Generator().manual_seed(timestep))
        losses.append(autocast_loss(model, latents, hints, context, timestep, noise))
    return torch.stack(losses).mean().item()


def noise_like(latents: Tensor, random: torch.Generator) -> Tensor:
    return torch.randn(latents.shape, generator=random).to(latents)


def autocast_loss(model: Model, latents: Tensor, *rest) -> Tensor:
    """`training_loss` in the precision of the frozen weights, though the trained ones are float32."""
    dtype = model.unet.conv_in.weight.dtype
    with torch.autocast(latents.device.type, dtype, enabled=dtype != torch.float32):
        return training_loss(model, latents, *rest)


@dataclass(frozen=True)
class Training:
    """Training under way, as a checkpoint keeps it, and what it made in the end."""

    parameters: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    losses: list[tuple[int, int | str, float]]  # steps done, timestep, loss, as `loss.csv` has them

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor.detach().cpu().contiguous() for name, tensor in self.parameters.items()}

    @property
    def fixed_losses(self) -> dict[int, float]:
        """The losses on fixed noises, by steps done: before the first, after FIRST_STEPS and after the last."""
        return {step: loss for step, timestep, loss in self.losses if timestep == "fixed"}

    @property
    def worse(self) -> bool:
        before, *_, after = self.fixed_losses.values()
        return after > before

    def note(self, log: Path, step: int, timestep: int | str, loss: float) -> None:
        """Logs a loss. Raises FloatingPointError for one that is not finite."""
        if not math.isfinite(loss):
            if step == 0:
                raise FloatingPointError("the model's own loss is not finite; give another --model")
            self.give_up(f"the loss of step {step}", log.parent)
        self.losses.append((step, timestep, loss))
        rows = [f"{step},{timestep},{loss:.6f}" for step, timestep, loss in self.losses]
        with replacing(log) as unfinished:
            unfinished.write_text("\n".join(["step,timestep,loss", *rows]) + "\n")

    def check_weights(self, step: int, folder: Path) -> None:
        """Raises FloatingPointError, naming it, for a trained weight that is not finite."""
        if name := not_finite(self.parameters):
            self.give_up(f"after step {step}, {name}", folder)

    def give_up(self, found: str, folder: Path) -> None:
        advice = f"train again with a lower rate: --lr {self.optimizer.defaults['lr'] / 10:g}"
        raise FloatingPointError(f"{found} is not finite; delete {folder} and {advice}")

    def save(self, checkpoint: Path, step: int) -> None:
        """Writes what `resume` goes on from, after `step` steps; what is not finite replaces nothing."""
        self.check_weights(step, checkpoint.parent)
        parameters = {name: parameter.data for name, parameter in self.parameters.items()}
        parts = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        with replacing(checkpoint) as unfinished:
            torch.save({"step": step, "parameters": parameters, "losses": self.losses} | parts, unfinished)

    def resume(self, checkpoint: Path, steps: int) -> int:
        """Goes back to a checkpoint: the steps done. Raises ValueError for a damaged one."""
        state = load_state(checkpoint, self.parameters, steps)
        for name, parameter in self.parameters.items():
            parameter.data.copy_(state["parameters"][name])
        # The optimizer takes its moments from the host to the device. Its step counters stay: on the device each
        # step would have to wait for them.
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state["optimizer"]["state"]})
        if state["scaler"]:  # empty unless it was a float16 model
            self.scaler.load_state_dict(state["scaler"])
        self.losses.extend(state["losses"])
        return state["step"]


def train(
    model: Model,
    latents: Tensor,
    hints: Tensor,
    context: Tensor,
    steps: int,
    learning_rate: float,
    seed: int,
    checkpoint: Path,
    log: Path,
) -> Training:
    """The training loop: AdamW at a fixed rate on the loss at random timesteps.

    latents: (N, C, h, w); hints: what `embed_hints` makes of the poses; context: (tokens, context_dim).
    Trained weights are float32. A step's noise depends on the seed and the step alone, so a resumed run is the
    same. Raises ValueError for a damaged checkpoint, and FloatingPointError for what is not finite.
    """
    parameters = trainable_parameters(model)
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    use_gradient_checkpointing(model, latents[:BATCH])
    optimizer = torch.optim.AdamW(parameters.values(), lr=learning_rate)
    # float16 gradients are scaled, so that small ones do not vanish.
    half = model.unet.conv_in.weight.dtype == torch.float16
    scaler = torch.amp.GradScaler(latents.device.type, enabled=half)
    training = Training(parameters, optimizer, scaler, [])
    start = training.resume(checkpoint, steps) if checkpoint.exists() else 0
    if not start:
        training.note(log, 0, "fixed", fixed_noise_loss(model, latents, hints, context))
    saved = time.monotonic()
    for step in (bar := trange(start, steps, initial=start, total=steps, desc="training")):
        random = torch.Generator().manual_seed(seed * 1_000_003 + step)
        frames = torch.randperm(len(latents), generator=random)[:BATCH].sort().values
        timestep = torch.randint(0, 1000, (), generator=random).item()
        noise = noise_like(latents[frames], random)
        loss = autocast_loss(model, latents[frames], hints[frames], context, timestep, noise)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        scaler.step(optimizer)
        scaler.update()

        training.note(log, step + 1, timestep, loss.item())
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if step + 1 in (FIRST_STEPS, steps):
            training.check_weights(step + 1, log.parent)
            training.note(log, step + 1, "fixed", fixed_noise_loss(model, latents, hints, context))
        if time.monotonic() - saved > SAVE_EVERY:
            training.save(checkpoint, step + 1)
            saved = time.monotonic()
    return training


def settings_of(args: Namespace, model: Model, frames: np.ndarray, poses: list[Pose], clip: Clip) -> dict:
    """Everything that a run depends on, as `settings.json` has it; `frames` are those of the clip, on canvas."""
    height, width = frames.shape[1:3]
    paths = {name: getattr(args, name) for name in ("clip", "poses", "controlnet", "vae")}
    options = {name: getattr(args, name) for name in ("poses_are", "person", "model", "prompt", "seed")}
    settings = {
        "frames": clip.indices,
        "fps": clip.fps,
        "version": VERSION,
        "layout": LAYOUT,
        "loras": remember_loras(args.lora),
        "height": height,
        "width": width,
        "steps": args.steps or training_steps(len(frames)),
        "learning_rate": args.lr or model.learning_rate,
        "learning_rate_from": "--lr" if args.lr else "the model's default",
        # Other frames, or poses that were corrected, make another run.
        "inputs": hash_inputs(frames, poses_text(poses, width, height).encode()),
    }
    return {name: path and str(path) for name, path in paths.items()} | options | settings


def main(args: Namespace) -> None:
    folder = args.run or Path("runs") / name_of(args.clip)
    if args.poses_are and not args.poses:
        raise ValueError(f"--poses-are {args.poses_are}: says what --poses is, which is not given")
    with alone_in(folder):
        make_run(args, folder)


def make_run(args: Namespace, folder: Path) -> None:
    refuse_finished(folder)
    remember_loras(args.lora)  # here, before poses are looked for, a missing file is told
    locate_parts(args.model, args.controlnet, args.vae)
    clip, poses = read_training_frames(args, folder / "poses")
    device, dtype = compute_device(args.device, training=True)
    model = load_model(args.model, args.controlnet, args.vae, device, dtype, args.lora)
    # What the UNet's coarsest level can hold: for SD 1.5, multiples of 64 pixels.
    multiple = model.vae.config.factor * 2 ** (len(model.unet.config.widths) - 1)
    placing = fit(*clip.shape[1:3], args.size or model.size, multiple)
    height, width = placing.height, placing.width
    require_memory_for_frames(model, device, dtype, (len(clip), height, width))
    frames = np.stack([fit_frame(image, placing) for image in clip])
    poses = [place_pose(pose, *placing.placement) for pose in poses]
    settings = settings_of(args, model, frames, poses, clip)
    steps, rate = settings["steps"], settings["learning_rate"]
    checkpoint, log = folder / "training_state.pt", folder / "loss.csv"
    require_space_for_training(checkpoint, trainable_parameters(model).values(), frames)
    print(f"learning rate {rate:g} ({settings['learning_rate_from']}), {steps} steps, on {describe(model)}")

    context = encode_prompt(model, args.prompt).clone()
    latents = encode_frames(model, frames).clone()
    hints = embed_hints(model, poses, height, width).to(device, copy=True)
    begin_run(folder, settings, frames, poses)
    training = train(model, latents, hints, context, steps, rate, args.seed, checkpoint, log)
    finish_run(folder, training.tensors, {"fixed_losses": training.fixed_losses, "worse": training.worse})
    write_page(folder / "run.html", run_data(folder, settings, frames, poses, args.command))

    losses = ", ".join(f"{loss:.4f} after {step} steps" for step, loss in training.fixed_losses.items())
    tqdm.write(f"loss on fixed noises: {losses}")
    if training.worse:
        advice = f"train again, into another --run, with --lr {rate / 10:g}"
        tqdm.write(f"TRAINING MADE THE MODEL WORSE: the learning rate {rate:g} is too high; {advice}")
    tqdm.write(f"{folder}: trained on {len(frames)} frames of {width}x{height} in {steps} steps")
    tqdm.write(f"now: python sample.py --run {shlex.quote(str(folder))} --poses POSES.json")


if __name__ == "__main__":
    stopped = "stopped; the same command goes on from the last checkpoint"
    run_command("train.py", main, args, stopped, "give fewer --frames or a smaller --size")
