"""Fine-tunes the model on a few frames of one clip: `python train.py clip.mp4`.

Leaves a run folder that `sample.py` makes new videos from:

    trained.safetensors   the trained tensors only
    frames/               the training frames, on canvas
    frames.poses.json     their poses
    settings.json         everything needed to do it again
    loss.csv              step, timestep, loss; timestep "fixed": the loss on the same noises each time
    training.json         those losses on fixed noises, and whether training made the model worse
    preview.png           the frames and their control images, to check that the poses fit
    poses/                what was found in pixels, to be found only once

An interrupted run goes on from its last checkpoint, at most two minutes back, when the same command is given
again.
"""

from command import keep_freed_memory, run_command, training_arguments

if __name__ == "__main__":  # before the imports below, which take seconds
    args = training_arguments()
    keep_freed_memory()

import argparse
import hashlib
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm, trange

from checkpoint import Model, load_model
from device import compute_device, describe
from posecrafter import (
    embed_hints,
    encode_frames,
    encode_prompt,
    recompute_activations,
    trainable_parameters,
    training_loss,
    training_steps,
)
from poses.pose import Pose, has_person, place_pose
from poses.source import read_driver, uniform_frames
from run import begin_run, finish_run, name_of
from video import count_frames, fit, fit_frame, read_frames, replacing

BATCH = 8  # frames per training step, in order (the paper's "minimal batch size")
SAVE_EVERY = 120  # seconds between the checkpoints of a long run


# ---- What goes in -------------------------------------------------------------------------------


def choose_frames(clip: Path, usable: range, frames: int) -> list[int]:
    """The training frames' indices, uniformly from a range. Raises ValueError when it holds fewer."""
    if not 1 <= frames <= len(usable):
        there = f"{usable.start}:{usable.stop} has {len(usable)}"
        raise ValueError(f"{clip}: {frames} frames asked for, but {there}")
    return uniform_frames(usable, frames)


def read_training_frames(args: argparse.Namespace, cache: Path) -> tuple[np.ndarray, list[Pose], dict]:
    """The training frames uint8 (N, H, W, 3), their poses, and as settings their indices and frame rate.

    Without `--poses` they are found in the clip itself, and kept in the folder `cache`. Raises ValueError for too
    few frames, for the poses of another clip, and for a chosen frame without a person.
    """
    clip, source, count = args.clip, args.poses or args.clip, count_frames(args.clip)
    asked = args.range or range(count)
    if asked.stop > count:
        raise ValueError(f"{clip}: frames up to {asked.stop} asked for, but it has {count}")
    choose_frames(clip, asked, args.frames)  # before poses are looked for, which takes long
    canvas = read_frames(clip, [asked.start])[0].shape[1:3]
    kind, whole = (args.poses_are, None) if args.poses else ("video", args.frames)
    looking = args.model, cache, args.person
    driver = read_driver(source, kind, args.range, *looking, whole_bodies=whole, canvas=canvas)
    if abs(count - driver.total) > 2:  # decoders do not always agree on a video's last frames
        raise ValueError(f"{source}: has {driver.total} poses, but {clip} has {count} frames")
    first = driver.within.start
    indices = choose_frames(clip, range(first, min(driver.within.stop, count)), args.frames)
    poses = [driver.poses[index - first] for index in indices]
    if empty := [index for index, pose in zip(indices, poses) if not has_person(pose)]:
        advice = "choose another --range or --frames"
        raise ValueError(f"{clip}: no person in frame {empty[0]} (of its poses); {advice}")
    images, fps = read_frames(clip, indices)
    height, width = images.shape[1:3]
    tall, wide = driver.canvas or (height, width)
    if abs(tall / wide / (height / width) - 1) > 0.02:
        sizes = f"poses on a canvas of {wide:g}x{tall:g}, but {clip} has frames of {width}x{height}"
        raise ValueError(f"{source}: {sizes}: another clip's?")
    return images, poses, {"frames": indices, "fps": fps}


# ---- Training -----------------------------------------------------------------------------------

FIRST_STEPS = 5  # after so many the loss tells whether the learning rate is far too high
FIXED_TIMESTEPS = 125, 375, 625, 875


@dataclass(frozen=True)
class Tuned:
    """What training made, and what it did to the loss."""

    tensors: dict[str, Tensor]
    # On the same noises each time, by steps trained: before the first, after FIRST_STEPS, after the last.
    fixed_losses: dict[int, float]

    @property
    def worse(self) -> bool:
        # Written this way, a loss that is not a number counts as worse.
        return not self.fixed_losses[max(self.fixed_losses)] <= self.fixed_losses[0]


@torch.no_grad()
def fixed_noise_loss(model: Model, latents: Tensor, hints: Tensor, context: Tensor) -> float:
    """The mean training loss of up to BATCH frames at four timesteps, with the same noises at every call.

    A step's own loss depends mostly on its timestep, and hardly tells whether the model has learned; this does.
    """
    losses, frames = [], uniform_frames(range(len(latents)), min(BATCH, len(latents)))
    for timestep in FIXED_TIMESTEPS:
        random = torch.Generator().manual_seed(timestep)
        noise = torch.randn(latents[frames].shape, generator=random).to(latents)
        losses.append(autocast_loss(model, latents[frames], hints[frames], context, timestep, noise))
    return torch.stack(losses).mean().item()


def autocast_loss(model: Model, latents: Tensor, *rest) -> Tensor:
    """`training_loss` in the precision of the frozen weights, though the trained ones are float32."""
    dtype = model.unet.conv_in.weight.dtype
    with torch.autocast(latents.device.type, dtype, enabled=dtype != torch.float32):
        return training_loss(model, latents, *rest)


@dataclass(frozen=True)
class State:
    """What a checkpoint keeps of a training under way."""

    parameters: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    fixed_losses: dict[int, float]  # so far; see `Tuned`

    def save(self, checkpoint: Path, step: int) -> None:
        """Writes what `resume` goes on from, after `step` steps."""
        parts = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        parameters = {name: parameter.data for name, parameter in self.parameters.items()}
        state = {"step": step, "parameters": parameters, "fixed_losses": self.fixed_losses}
        with replacing(checkpoint) as unfinished:
            torch.save(state | parts, unfinished)

    def resume(self, checkpoint: Path) -> int:
        """Goes back to a checkpoint: the steps done. Raises ValueError for a damaged one."""
        try:
            # To the host: the optimizer takes its moments from there to the device. Its step counters stay: on the
            # device each step would have to wait for them.
            state = torch.load(checkpoint, weights_only=True, map_location="cpu")
            for name, parameter in self.parameters.items():
                parameter.data.copy_(state["parameters"][name])
            self.optimizer.load_state_dict(state["optimizer"])
            if state["scaler"]:  # empty unless it was a float16 model
                self.scaler.load_state_dict(state["scaler"])
            self.fixed_losses.update(state["fixed_losses"])
            return state["step"]
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a damaged pickle can raise anything
            raise ValueError(f"{checkpoint}: damaged; delete it to begin anew") from None


def begin_log(log: Path, step: int) -> None:
    """Begins `loss.csv`, or goes on with it after a step: what was logged later comes again."""
    rows = log.read_text().splitlines()[1:] if step else []
    kept = [row for row in rows if int(row.split(",")[0]) <= step]
    log.write_text("\n".join(["step,timestep,loss", *kept]) + "\n")


def note(log: Path, step: int, timestep: int | str, loss: float) -> None:
    with log.open("a") as file:
        file.write(f"{step},{timestep},{loss:.6f}\n")


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
) -> Tuned:
    """The training loop: AdamW at a fixed rate on the loss at random timesteps.

    latents: (N, C, h, w); hints: what `embed_hints` makes of the poses; context: (tokens, context_dim).
    Trained weights are float32. A step's noise depends on the seed and the step alone, so a resumed run is the
    same. Raises ValueError for a damaged checkpoint, and FloatingPointError for a loss that is not finite.
    """
    parameters = trainable_parameters(model)
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    recompute_activations(model, latents[:BATCH])
    optimizer = torch.optim.AdamW(parameters.values(), lr=learning_rate)
    dtype = model.unet.conv_in.weight.dtype
    # float16 gradients are scaled, so that small ones do not vanish.
    scaler = torch.amp.GradScaler(latents.device.type, enabled=dtype == torch.float16)
    state = State(parameters, optimizer, scaler, {})
    start = state.resume(checkpoint) if checkpoint.exists() else 0
    begin_log(log, start)

    def note_fixed_loss(step: int) -> None:
        state.fixed_losses[step] = fixed_noise_loss(model, latents, hints, context)
        note(log, step, "fixed", state.fixed_losses[step])

    if not start:
        note_fixed_loss(0)
    saved = time.monotonic()
    for step in (bar := trange(start, steps, initial=start, total=steps, desc="training")):
        random = torch.Generator().manual_seed(seed * 1_000_003 + step)
        frames = torch.randperm(len(latents), generator=random)[:BATCH].sort().values
        timestep = torch.randint(0, 1000, (), generator=random).item()
        noise = torch.randn(latents[frames].shape, generator=random).to(latents)
        loss = autocast_loss(model, latents[frames], hints[frames], context, timestep, noise)
        check_loss(loss, step, dtype, checkpoint.parent, learning_rate)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        scaler.step(optimizer)
        scaler.update()

        note(log, step + 1, timestep, loss.item())
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if step + 1 in (FIRST_STEPS, steps):
            note_fixed_loss(step + 1)
        if time.monotonic() - saved > SAVE_EVERY:
            state.save(checkpoint, step + 1)
            saved = time.monotonic()
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in parameters.items()}
    return Tuned(tensors, state.fixed_losses)


def check_loss(loss: Tensor, step: int, dtype: torch.dtype, folder: Path, learning_rate: float) -> None:
    """Raises FloatingPointError for a loss that is no finite number, after `step` steps."""
    if loss.isfinite():
        return
    if step == 0:
        where = f"in {str(dtype).removeprefix('torch.')}, before any training"
        raise FloatingPointError(f"the model's own loss is not finite {where}: another --model?")
    advice = f"delete {folder} and train again with a lower rate: --lr {learning_rate / 10:g}"
    raise FloatingPointError(f"the loss of step {step + 1} is not finite; {advice}")


def describe_losses(tuned: Tuned, learning_rate: float) -> str:
    """What training did to the loss on fixed noises, and what to do if that was no good."""
    (_, before), *rest = tuned.fixed_losses.items()
    after = ", ".join(f"{loss:.4f} after {step} steps" for step, loss in rest)
    text = f"loss on fixed noises: {before:.4f} before training, {after}"
    if not tuned.worse:
        return text
    advice = f"train again, into another --run, with --lr {learning_rate / 10:g}"
    worse = f"TRAINING MADE THE MODEL WORSE: the learning rate {learning_rate:g} is too high for it"
    return f"{text}\n{worse}; {advice}"


# ---- The command line ---------------------------------------------------------------------------


def check_arguments(args: argparse.Namespace, folder: Path) -> None:
    """Raises FileNotFoundError or ValueError for what cannot be done, before anything is read."""
    if not args.clip.exists():
        raise FileNotFoundError(f"{args.clip}: no such clip")
    if args.poses_are and not args.poses:
        raise ValueError(f"--poses-are {args.poses_are}: says what --poses is, which is not given")
    if (folder / "trained.safetensors").exists():
        advice = "choose another with --run, or delete it"
        raise ValueError(f"{folder}: there is a finished run already; {advice}")
    if args.lr is not None and not 0 < args.lr < 1:
        raise ValueError(f"--lr {args.lr:g}: give a number between 0 and 1")
    for name in ("steps", "size"):
        if (number := getattr(args, name)) is not None and number < 1:
            raise ValueError(f"--{name} {number}: give a number above 0")


def place_on_canvas(
    images: np.ndarray, poses: list[Pose], size: int, model: Model
) -> tuple[np.ndarray, list[Pose]]:
    """The frames (N, H, W, 3) and their poses, scaled to a short side of `size` pixels, and to what the UNet's
    coarsest level can hold: multiples of 64 pixels for SD 1.5.
    """
    multiple = model.vae.config.factor * 2 ** (len(model.unet.config.widths) - 1)
    placing = fit(*images.shape[1:3], size, multiple)
    frames = np.stack([fit_frame(image, placing) for image in images])
    return frames, [place_pose(pose, *placing.placement) for pose in poses]


def settings_of(
    args: argparse.Namespace, model: Model, frames: np.ndarray, poses: list[Pose], clip: dict
) -> dict:
    """Everything that a run depends on, as `settings.json` has it; clip: see `read_training_frames`."""
    keypoints = np.stack([np.concatenate(list(vars(pose).values())) for pose in poses])
    paths = {name: getattr(args, name) for name in ("clip", "poses", "controlnet", "vae")}
    paths = {name: path and str(path) for name, path in paths.items()}
    options = {name: getattr(args, name) for name in ("poses_are", "person", "model", "prompt", "seed")}
    settings = {
        "height": frames.shape[1],
        "width": frames.shape[2],
        "steps": args.steps or training_steps(len(frames)),
        "learning_rate": args.lr or model.learning_rate,
        "learning_rate_from": "--lr" if args.lr else "the model's default",
        # Other frames, or poses that were corrected, make another run.
        "inputs": hashlib.sha256(frames.tobytes() + keypoints.tobytes()).hexdigest(),
    }
    return paths | options | clip | settings


def main(args: argparse.Namespace) -> None:
    folder = args.run or Path("runs") / name_of(args.clip)
    check_arguments(args, folder)
    images, poses, clip = read_training_frames(args, folder / "poses")
    device, dtype = compute_device(training=True)
    model = load_model(args.model, args.controlnet, args.vae, device, dtype)
    frames, poses = place_on_canvas(images, poses, args.size or model.size, model)
    settings = settings_of(args, model, frames, poses, clip)
    steps, rate = settings["steps"], settings["learning_rate"]
    print(f"learning rate {rate:g} ({settings['learning_rate_from']}), {steps} steps, on {describe(model)}")

    context = encode_prompt(model, args.prompt).clone()
    latents = encode_frames(model, frames).clone()
    hints = embed_hints(model, poses, *frames.shape[1:3]).to(device, copy=True)
    begin_run(folder, settings, frames, poses)
    state, log = folder / "training_state.pt", folder / "loss.csv"
    tuned = train(model, latents, hints, context, steps, rate, args.seed, state, log)
    finish_run(folder, tuned.tensors, {"fixed_losses": tuned.fixed_losses, "worse": tuned.worse})

    height, width = frames.shape[1:3]
    tqdm.write(describe_losses(tuned, rate))
    tqdm.write(f"{folder}: trained on {len(frames)} frames of {width}x{height} in {steps} steps")
    tqdm.write(f"now: python sample.py --run {shlex.quote(str(folder))} --poses POSES.json")


if __name__ == "__main__":
    run_command(
        "train.py",
        main,
        args,
        stopped="stopped; the same command goes on from the last checkpoint",
        out_of_memory="give fewer --frames or a smaller --size",
    )
