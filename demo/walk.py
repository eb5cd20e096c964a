"""One run of the method on one puppet, with all that is made on the way; `walkthrough.py` draws it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoint import Model
from demo.puppet import clip
from posecrafter import (
    alpha_cumprod,
    ddim_timesteps,
    edit_latents,
    embed_hints,
    encode_frames,
    encode_prompt,
    insert_reference,
    invert,
    network_inputs,
    predict_noise,
    sample,
    select_reference,
)
from poses.pose import Pose, place_pose
from poses.source import uniform_frames
from train import train
from unet import Attention, BasicTransformerBlock
from video import replacing

PROMPT = "a person"
PUPPET = 14  # below 10,000, and so new to the demo model
TRAINING_CLIP, TRAINING_FRAMES = 36, 8

# ---- What goes in, and fine-tuning --------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """The training frames and the dance to follow. Frames are uint8 (F, H, W, 3)."""

    frames: np.ndarray
    poses: Sequence[Pose]
    targets: Sequence[Pose]
    truth: np.ndarray


def set_scene(width: int, target_frames: int) -> Scene:
    """A puppet from the knees up, in frames whose height is three quarters of their width."""

    def film(motion: int, length: int, chosen: Sequence[int]) -> tuple[np.ndarray, list[Pose]]:
        frames, poses, _ = clip(PUPPET, motion, length, width)
        upper = [place_pose(poses[i], 1, 4 / 3, 0, 0) for i in chosen]
        return frames[chosen, : width * 3 // 4], upper

    training = film(2 * PUPPET, TRAINING_CLIP, uniform_frames(range(TRAINING_CLIP), TRAINING_FRAMES))
    targets = list(range(0, 6 * target_frames, 6))  # half a second apart
    truth, poses = film(2 * PUPPET + 1, targets[-1] + 1, targets)
    return Scene(*training, poses, truth)


def fine_tune(model: Model, scene: Scene, steps: int, path: Path) -> None:
    """Trains on the scene and writes the trained tensors to `path`. The model is of no use afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = scene.frames.shape[1:3]
    tuned = train(
        model,
        encode_frames(model, scene.frames).clone(),
        embed_hints(model, scene.poses, height, width).to(**network_inputs(model), copy=True),
        encode_prompt(model, PROMPT).clone(),
        steps,
        model.learning_rate,
        0,
        path.with_suffix(".pt"),
        path.with_suffix(".csv"),
    )
    with replacing(path) as unfinished:
        save_file(tuned.tensors, unfinished)
    path.with_suffix(".pt").unlink(missing_ok=True)


@dataclass(frozen=True)
class Walk:
    """All that is made on the way from training frames to a new clip."""

    reference: int  # which training frame
    trajectory: list[Tensor]  # of the reference, from image to noise, (1, C, h, w) each
    poses: list[Pose]  # of the M + 1 frames, the reference's first
    noise: Tensor  # (M + 1, C, h, w), before latent editing
    edited: Tensor  # the same, after
    latents: list[Tensor]  # before each sampling step, and after the last


@torch.inference_mode()
def walk(model: Model, scene: Scene, steps: int) -> Walk:
    """What `posecrafter.generate` does, with nothing thrown away."""
    height, width = scene.frames.shape[1:3]
    context = encode_prompt(model, PROMPT)
    k = select_reference(scene.poses, scene.targets)
    image = encode_frames(model, scene.frames[k : k + 1])
    hint = embed_hints(model, [scene.poses[k]], height, width)
    trajectory = invert(model, image, hint, context, steps)
    poses = insert_reference(scene.poses[k], scene.targets)
    noise = trajectory[-1].repeat(len(poses), 1, 1, 1)
    edited = noise.clone()
    edit_latents(edited[1:], noise[0], poses[1:], poses[0])
    hints, latents = embed_hints(model, poses, height, width), []

    def keep(before: Tensor, step: int) -> None:
        latents.append(before.clone())

    latents.append(sample(model, edited, hints, context, steps, before_step=keep))
    return Walk(k, trajectory, poses, noise, edited, latents)


@torch.inference_mode()
def noise_seen(model: Model, scene: Scene, way: Walk, step: int) -> Tensor:
    """The noise that the model predicts in a walk's latents at a sampling step, counted from 1."""
    timestep = ddim_timesteps(len(way.latents) - 1)[step - 1]
    hints = embed_hints(model, way.poses, *scene.frames.shape[1:3])
    return predict_noise(model, way.latents[step - 1], timestep, encode_prompt(model, PROMPT), hints)


def predicted_images(model: Model, scene: Scene, way: Walk, step: int) -> Tensor:
    """The clean latents (M + 1, C, h, w) that a step's noise implies."""
    a = alpha_cumprod(ddim_timesteps(len(way.latents) - 1)[step - 1])
    noise = noise_seen(model, scene, way, step)
    return (way.latents[step - 1] - math.sqrt(1 - a) * noise) / math.sqrt(a)


def decoder_block(model: Model, number: int) -> BasicTransformerBlock:
    """The first (0) or the second (1) transformer block of the decoder's finest level."""
    return model.unet.up_blocks[-1].attentions[number].transformer_blocks[0]


def attention_tokens(model: Model, scene: Scene, way: Walk, number: int) -> Tensor:
    """What that block's key-frame and temporal attention read at half of the steps: (M + 1, h * w, C)."""
    parts = []
    hook = decoder_block(model, number).attn1.register_forward_pre_hook(
        lambda _, inputs: parts.append(inputs[0][0].clone())
    )
    try:
        noise_seen(model, scene, way, 1 + (len(way.latents) - 1) // 2)
    finally:
        hook.remove()
    return torch.cat(parts, dim=1)  # long clips come a few locations at a time


@torch.inference_mode()
def attention_weights(attention: Attention, asking: Tensor, asked: Tensor) -> np.ndarray:
    """How much each head of a token (C,) looks at each of other tokens (S, C): (heads, S), of sum 1 over S."""
    q = attention.split_heads(attention.to_q(asking[None, None])).float()  # (1, heads, 1, d)
    k = attention.split_heads(attention.to_k(asked[None])).float()  # (1, heads, S, d)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    return scores.softmax(-1)[0, :, 0].cpu().numpy()
