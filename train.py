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


def read_training_frames(
    clip: Path, frames: int, within: range | None, poses_path: Path | None, **finding
) -> tuple[np.ndarray, list[Pose], list[int], float]:
    """N frames uniformly from a range of the clip, with their poses, indices and frame rate.

    Without `poses_path` the poses are found in the clip itself; `finding` goes on to `read_driver`.
    Raises ValueError when the range holds fewer frames, the poses are another clip's, or a chosen
    frame has no person.
    """
    count = count_frames(clip)
    asked = within or range(count)
    if asked.stop > count:
        raise ValueError(f"{clip}: frames up to {asked.stop} asked for, but it has {count}")

    def enough(usable: range) -> None:
        if frames < 1 or len(usable) < frames:
            raise ValueError(
                f"{clip}: {frames} frames asked for, but {usable.start}:{usable.stop} has {len(usable)}"
            )

    enough(asked)
    if poses_path is None:
        finding |= {"kind": "video", "whole_bodies": frames}
    canvas = read_frames(clip, [asked.start])[0].shape[1:3]
    driver = read_driver(poses_path or clip, within=within, canvas=canvas, **finding)
    if abs(count - driver.total) > 2:  # decoders do not always agree on a video's last frames
        raise ValueError(f"{poses_path}: has {driver.total} poses, but {clip} has {count} frames")
    first = driver.within.start
    usable = range(first, min(driver.within.stop, count))
    enough(usable)
    indices = uniform_frames(usable, frames)
    poses = [driver.poses[index - first] for index in indices]
    for index, pose in zip(indices, poses):
        if not has_person(pose):
            advice = "choose another --range or --frames"
            raise ValueError(f"{clip}: no person in frame {index} (of its poses); {advice}")
    images, fps = read_frames(clip, indices)
    height, width = images.shape[1:3]
    canvas = driver.canvas or (height, width)
    if abs(canvas[0] / canvas[1] / (height / width) - 1) > 0.02:
        raise ValueError(
            f"{poses_path}: poses on a canvas of {canvas[1]:g}x{canvas[0]:g}, "
            f"but {clip} has frames of {width}x{height}: another clip's?"
        )
    return images, poses, indices, fps


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
    """The training loss on up to BATCH frames, the mean over four timesteps, with the same noises at every call.

    The loss of a training step depends mostly on its timestep, so a run's own losses hardly tell whether the model
    has learned; this does.
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
    Frozen weights keep their precision; the trained ones and their optimizer state are float32, and their
    gradients are clipped to norm 1. Those of a float16 model are scaled, so that small ones do not vanish. The
    noise of a step depends on the seed and the step alone, so a run that resumes from `checkpoint` is the same.
    Raises ValueError for a damaged checkpoint, and FloatingPointError for a loss that is not finite.
    """
    parameters = trainable_parameters(model)
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    recompute_activations(model, latents[:BATCH])
    optimizer = torch.optim.AdamW(parameters.values(), lr=learning_rate)
    dtype = model.unet.conv_in.weight.dtype
    scaler = torch.amp.GradScaler(latents.device.type, enabled=dtype == torch.float16)
    start, fixed_losses = 0, {}
    if checkpoint.exists():
        start, fixed_losses = resume(checkpoint, parameters, optimizer, scaler)
    rows = ["step,timestep,loss"]
    if start:  # what was logged after the checkpoint comes again
        rows += [row for row in log.read_text().splitlines()[1:] if int(row.split(",")[0]) <= start]
    log.write_text("\n".join(rows) + "\n")

    def note(step: int, timestep: int | str, loss: float) -> None:
        with log.open("a") as file:
            file.write(f"{step},{timestep},{loss:.6f}\n")

    def note_fixed_loss(step: int) -> None:
        fixed_losses[step] = fixed_noise_loss(model, latents, hints, context)
        note(step, "fixed", fixed_losses[step])

    if not fixed_losses:
        note_fixed_loss(0)
    saved = time.monotonic()
    for step in (bar := trange(start, steps, initial=start, total=steps, desc="training")):
        random = torch.Generator().manual_seed(seed * 1_000_003 + step)
        frames = torch.randperm(len(latents), generator=random)[:BATCH].sort().values
        timestep = torch.randint(0, 1000, (), generator=random).item()
        noise = torch.randn(latents[frames].shape, generator=random).to(latents)
        loss = autocast_loss(model, latents[frames], hints[frames], context, timestep, noise)
        if not loss.isfinite():
            raise FloatingPointError(not_finite(step, dtype, checkpoint.parent, learning_rate))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        scaler.step(optimizer)
        scaler.update()

        note(step + 1, timestep, loss.item())
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if step + 1 in (FIRST_STEPS, steps):
            note_fixed_loss(step + 1)
        if time.monotonic() - saved > SAVE_EVERY:
            state = {
                "step": step + 1,
                "parameters": {name: parameter.data for name, parameter in parameters.items()},
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "fixed_losses": fixed_losses,
            }
            with replacing(checkpoint) as unfinished:
                torch.save(state, unfinished)
            saved = time.monotonic()
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in parameters.items()}
    return Tuned(tensors, fixed_losses)


def not_finite(step: int, dtype: torch.dtype, folder: Path, learning_rate: float) -> str:
    """What to say of a loss that is no finite number, after `step` steps."""
    if step == 0:
        precision = str(dtype).removeprefix("torch.")
        return f"the model's own loss is not finite in {precision}, before any training: another --model?"
    return (
        f"the loss of step {step + 1} is not finite; delete {folder} and train again with a lower rate: "
        f"--lr {learning_rate / 10:g}"
    )


def resume(
    checkpoint: Path,
    parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> tuple[int, dict[int, float]]:
    """Goes back to a checkpoint of `train`: the steps done, and the losses on fixed noises so far.

    Raises ValueError for a damaged one.
    """
    try:
        # To the host: the optimizer takes its moments from there to the device. Its step counters stay: on the
        # device each step would have to wait for them.
        state = torch.load(checkpoint, weights_only=True, map_location="cpu")
        for name, parameter in parameters.items():
            parameter.data.copy_(state["parameters"][name])
        optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty unless it was a float16 model
            scaler.load_state_dict(state["scaler"])
        return state["step"], state["fixed_losses"]
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a damaged pickle can raise anything
        raise ValueError(f"{checkpoint}: damaged; delete it to begin anew") from None


def describe_losses(tuned: Tuned, learning_rate: float) -> str:
    """What training did to the loss on fixed noises, and what to do if that was no good."""
    (_, before), *rest = tuned.fixed_losses.items()
    after = ", ".join(f"{loss:.4f} after {step} steps" for step, loss in rest)
    text = f"loss on fixed noises: {before:.4f} before training, {after}"
    if tuned.worse:
        text += (
            f"\nTRAINING MADE THE MODEL WORSE: the learning rate {learning_rate:g} is too high for it; train "
            f"again, into another --run, with --lr {learning_rate / 10:g}"
        )
    return text


# ---- The command line ---------------------------------------------------------------------------


def check_arguments(args: argparse.Namespace, folder: Path) -> None:
    """Raises FileNotFoundError or ValueError for what cannot be done, before anything is read."""
    if not args.clip.exists():
        raise FileNotFoundError(f"{args.clip}: no such clip")
    if args.poses_are and not args.poses:
        raise ValueError(f"--poses-are {args.poses_are}: says what --poses is, which is not given")
    if (folder / "trained.safetensors").exists():
        raise ValueError(
            f"{folder}: there is a finished run already; choose another with --run, or delete it"
        )
    if args.steps is not None and args.steps < 1:
        raise ValueError(f"--steps {args.steps}: give a number above 0")
    if args.lr is not None and not 0 < args.lr < 1:
        raise ValueError(f"--lr {args.lr:g}: give a number between 0 and 1")
    if args.size is not None and args.size < 1:
        raise ValueError(f"--size {args.size}: give a number above 0")


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
    args: argparse.Namespace,
    model: Model,
    frames: np.ndarray,
    poses: list[Pose],
    indices: list[int],
    fps: float,
) -> dict:
    """Everything that a run depends on, as `settings.json` has it."""
    keypoints = np.stack([np.concatenate(list(vars(pose).values())) for pose in poses])
    paths = {name: getattr(args, name) for name in ("clip", "poses", "controlnet", "vae")}
    return {name: path and str(path) for name, path in paths.items()} | {
        "poses_are": args.poses_are,
        "person": args.person,
        "frames": indices,
        "fps": fps,
        "height": frames.shape[1],
        "width": frames.shape[2],
        "model": args.model,
        "prompt": args.prompt,
        "steps": args.steps or training_steps(len(frames)),
        "learning_rate": args.lr or model.learning_rate,
        "learning_rate_from": "--lr" if args.lr else "the model's default",
        "seed": args.seed,
        # Other frames, or poses that were corrected, make another run.
        "inputs": hashlib.sha256(frames.tobytes() + keypoints.tobytes()).hexdigest(),
    }


def main(args: argparse.Namespace) -> None:
    folder = args.run or Path("runs") / name_of(args.clip)
    check_arguments(args, folder)
    images, poses, indices, fps = read_training_frames(
        args.clip,
        args.frames,
        args.range,
        args.poses,
        kind=args.poses_are,
        model=args.model,
        cache=folder / "poses",
        person=args.person,
    )
    device, dtype = compute_device(training=True)
    model = load_model(args.model, args.controlnet, args.vae, device, dtype)
    frames, poses = place_on_canvas(images, poses, args.size or model.size, model)
    settings = settings_of(args, model, frames, poses, indices, fps)
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
