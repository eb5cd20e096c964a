"""The method in pictures, from one run on one puppet: `python demo/walkthrough.py`, some minutes on a laptop.

Trains on a puppet that the demo model has never seen, walks through the method step by step, and draws what each
step did into `docs/pictures/`. `docs/METHOD.md` explains the pictures. The trained tensors are kept in
`runs/walkthrough/`, so that the next call only samples.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import posecrafter
from checkpoint import Model
from demo.drawing import captioned, crossed, false_colours, framed, heated, number, outlined, sheet, shrunk
from demo.scene import PROMPT, Scene, Trial, fine_tune, from_the_knees_up, load_demo, set_scene
from metrics.figures import frame_psnr
from pictures.sheets import PAPER as BACKGROUND
from posecrafter import PAPER, ddim_timesteps, decode_latents, embed_hints, encode_prompt, generate
from poses.parts import convex_hull, face_and_hands, latent_points
from poses.pose import Pose, draw_pose, is_seen, pose_distance
from poses.source import uniform_frames
from run import load_trained
from safe.process import keep_freed_memory
from unet import Attention, BasicTransformerBlock
from video import save_image

PUPPET = 14
BEFORE, AFTER = "before fine-tuning", "after fine-tuning"

# ---- One run, with nothing thrown away ----------------------------------------------------------


@dataclass(frozen=True)
class Walk:
    """All that is made on the way from training frames to a new clip."""

    models: dict[str, Model]  # BEFORE and AFTER fine-tuning
    scene: Scene
    reference: int  # which training frame
    trajectory: list[Tensor]  # of the reference, from image to noise, (1, C, h, w) each
    # (M + 1, C, h, w) each: before every sampling step, after editing; and after the last step.
    latents: list[Tensor]
    poses: list[Pose]  # of the M + 1 frames, the reference's first
    timesteps: list[int]  # of the sampling steps

    def decode(self, latents: Tensor) -> list[np.ndarray]:
        return list(decode_latents(self.models[AFTER], latents))

    def decoded(self, latents: Tensor, width: int = 192) -> list[Image.Image]:
        return [shrunk(frame, width) for frame in self.decode(latents)]

    def controls(self, poses: Sequence[Pose], width: int = 192) -> list[Image.Image]:
        return [shrunk(draw_pose(pose, *self.scene.frames.shape[1:3]), width) for pose in poses]


def walk(models: dict[str, Model], scene: Scene, steps: int) -> Walk:
    """Makes a clip with `generate` and keeps what the UNet reads: inversion's latents, then sampling's."""
    k, read = posecrafter.select_reference(scene.poses, scene.targets), []
    hook = models[AFTER].unet.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].float()))
    made = generate(models[AFTER], scene, scene.targets, PAPER, k, steps, PROMPT)
    hook.remove()
    trajectory = [*read[:steps], read[steps][:1]]  # sampling starts from the end of inversion
    latents = [*read[steps:], torch.cat([made.reconstruction, made.latents])]
    poses = [scene.poses[k], *scene.targets]
    return Walk(models, scene, k, trajectory, latents, poses, ddim_timesteps(steps))


@torch.inference_mode()
def noise_seen(way: Walk, step: int, when: str = AFTER) -> Tensor:
    """The noise that a model predicts in a walk's latents at a sampling step, counted from 1."""
    model = way.models[when]
    hints = embed_hints(model, way.poses, *way.scene.frames.shape[1:3])
    context = encode_prompt(model, PROMPT)
    return posecrafter.predict_noise(model, way.latents[step - 1], way.timesteps[step - 1], context, hints)


def images_expected(way: Walk, step: int) -> Tensor:
    """The clean latents (M + 1, C, h, w) that a step's noise implies."""
    a = posecrafter.alpha_cumprod(way.timesteps[step - 1])
    return (way.latents[step - 1] - math.sqrt(1 - a) * noise_seen(way, step)) / math.sqrt(a)


def decoder_block(model: Model, number: int) -> BasicTransformerBlock:
    """The first (0) or the second (1) transformer block of the decoder's finest level."""
    return model.unet.up_blocks[-1].attentions[number].transformer_blocks[0]


def attention_tokens(way: Walk, number: int, when: str = AFTER) -> Tensor:
    """What that block's key-frame and temporal attention read at half of the steps: (M + 1, h * w, C)."""
    parts, attention = [], decoder_block(way.models[when], number).attn1
    hook = attention.register_forward_pre_hook(lambda _, inputs: parts.append(inputs[0][0].clone()))
    noise_seen(way, 1 + len(way.timesteps) // 2, when)
    hook.remove()
    return torch.cat(parts, dim=1)  # long clips come a few locations at a time


@torch.inference_mode()
def attention_weights(attention: Attention, asking: Tensor, asked: Tensor) -> np.ndarray:
    """How much each head of a token (C,) looks at each of other tokens (S, C): (heads, S), of sum 1 over S."""
    q = attention.split_heads(attention.to_q(asking[None, None])).float()  # (1, heads, 1, d)
    k = attention.split_heads(attention.to_k(asked[None])).float()  # (1, heads, S, d)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    return scores.softmax(-1)[0, :, 0].cpu().numpy()


# ---- The pictures -------------------------------------------------------------------------------


def training_frames(way: Walk) -> Image.Image:
    frames = [captioned(f"frame {i}", shrunk(frame)) for i, frame in enumerate(way.scene.frames)]
    rows = frames, way.controls(way.scene.poses)
    return sheet([("", row[i : i + 4]) for i in range(0, len(frames), 4) for row in rows])


def selection(way: Walk) -> Image.Image:
    """Distances of all target poses to all training poses, in thousandths, and their sums."""
    scene, width = way.scene, 104
    distances = 1000 * np.array([[pose_distance(t, p) for p in scene.poses] for t in scene.targets])
    frames, sums = [shrunk(frame, width) for frame in scene.frames], distances.sum(axis=0)
    empty = Image.new("RGB", frames[0].size, BACKGROUND)
    bars = [[number(d, d / distances.max(), *empty.size) for d in row] for row in distances]
    totals = [number(value, value / sums.max(), *empty.size) for value in sums]
    for row in (frames, totals):
        row[way.reference] = framed(row[way.reference])
    rows = [("", [pose, *row]) for pose, row in zip(way.controls(scene.targets, width), bars)]
    rows[0] = ("target poses, and their distance to each training pose, in thousandths", rows[0][1])
    first = ("training frames; the chosen one is framed", [empty, *frames])
    return sheet([first, *rows, ("sums", [empty, *totals])])


def inversion(way: Walk) -> Image.Image:
    steps = uniform_frames(range(len(way.trajectory)), min(5, len(way.trajectory)))
    times, latents = [0, *way.timesteps[::-1]], [way.trajectory[i] for i in steps]
    titles = [f"t = {times[i]}, std {z.std():.2f}" for i, z in zip(steps, latents)]
    colours = [captioned(title, false_colours(z[0])) for title, z in zip(titles, latents)]
    return sheet([("three channels of the latent", colours), ("decoded", way.decoded(torch.cat(latents)))])


def insertion(way: Walk) -> Image.Image:
    reference, *targets = way.controls(way.poses)
    cells = [captioned("frame 0: the reference", framed(reference))]
    cells += [captioned(f"frame {i}", target) for i, target in enumerate(targets, start=1)]
    return sheet([("", cells[i : i + 5]) for i in range(0, len(cells), 5)])


ASKED = {  # points of a pose that the pictures of attention ask from
    "the nose": lambda pose: pose.body[0, :2],
    "the shirt": lambda pose: pose.body[[2, 5, 8, 11], :2].mean(axis=0),
    "a hand": lambda pose: pose.right_hand[9, :2],
}


def token_at(point: np.ndarray, shape: tuple[int, int]) -> int:
    """The number of the location of a feature map (h, w) that a canvas-normalised point (x, y) lies in."""
    x, y = (point * shape[::-1]).astype(int).clip(0, np.subtract(shape[::-1], 1))
    return y * shape[1] + x


def key_frame_attention(way: Walk) -> Image.Image:
    """How much three locations of a target frame look at each location of frame 0."""
    result, frame, shape = way.decode(way.latents[-1]), len(way.poses) // 2, way.latents[0].shape[-2:]
    tokens, rows = {when: attention_tokens(way, 0, when) for when in way.models}, []
    for name, point in ASKED.items():
        place = point(way.poses[frame])
        row = [captioned(f"{name} of frame {frame} asks", crossed(shrunk(result[frame], 320), place))]
        for when, model in way.models.items():
            asking = tokens[when][frame, token_at(place, shape)]
            weights = attention_weights(decoder_block(model, 0).attn1, asking, tokens[when][0]).mean(axis=0)
            row.append(captioned(f"frame 0, {when}", heated(result[0], weights.reshape(shape), 320)))
        rows.append(("", row))
    return sheet(rows)


def temporal_attention(way: Walk) -> Image.Image:
    """How much one location of a target frame looks at the same location of all frames."""
    frame, width = len(way.poses) // 2, 104
    place = ASKED["the nose"](way.poses[frame])
    pictures = [crossed(picture, place) for picture in way.decoded(way.latents[-1], width)]
    pictures[frame] = framed(pictures[frame])
    numbered = [captioned(f"frame {i}", picture) for i, picture in enumerate(pictures)]
    rows = [(f"one location in all frames; frame {frame} asks", numbered)]
    for when, model in way.models.items():
        track = attention_tokens(way, 1, when)[:, token_at(place, way.latents[0].shape[-2:])]
        weights = attention_weights(decoder_block(model, 1).attn_temp, track[frame], track).mean(axis=0)
        rows.append((f"weights {when}", [number(w, w, width, 72) for w in weights]))
    return sheet(rows)


def editing(way: Walk) -> Image.Image:
    """The noise with the parts' hulls: where they are, and in the reference where their maps lead."""
    rows, noise, shape = [], way.trajectory[-1][0], way.latents[0].shape[-2:]
    for frame in (1, len(way.poses) - 1):
        here, there = {}, {}
        for part in face_and_hands(way.poses[frame], way.poses[0], *shape):
            landmarks = getattr(way.poses[frame], part.name)
            here[part.name] = hull = convex_hull(latent_points(landmarks[is_seen(landmarks)], *shape))
            there[part.name] = hull @ part.to_other[:, :2].T + part.to_other[:, 2]
        cells = {
            "the reference's noise": (noise, there),
            f"frame {frame}, before": (noise, here),
            f"frame {frame}, after": (way.latents[0][frame], here),
        }
        rows.append(("", [captioned(name, outlined(*cell, 320)) for name, cell in cells.items()]))
    return sheet(rows)


def predicted_images(way: Walk) -> Image.Image:
    """The clean images that the latents of some steps and the noise predicted in them imply."""
    steps, frames = len(way.timesteps), (1, len(way.poses) - 1)
    picked = sorted({1, math.ceil(0.3 * steps), math.ceil(0.5 * steps), steps})
    columns = [[shrunk(way.scene.truth[frame - 1]) for frame in frames]]
    columns[:0] = (way.decoded(images_expected(way, step)[list(frames)]) for step in picked)
    titles = [*(f"step {step}, t = {way.timesteps[step - 1]}" for step in picked), "truth"]
    rows = {frame: map(captioned, titles, row) for frame, row in zip(frames, zip(*columns))}
    return sheet([(f"frame {frame}", list(row)) for frame, row in rows.items()])


LEFT_OUT = {
    "the paper's method": (AFTER, PAPER),
    "without latent editing": (AFTER, replace(PAPER, parts=None)),
    "without insertion": (AFTER, replace(PAPER, insert=False)),
    "without inversion, from random noise": (AFTER, replace(PAPER, start="noise")),
    "without fine-tuning": (BEFORE, PAPER),
}


def left_out(way: Walk) -> Image.Image:
    scene, steps = way.scene, len(way.timesteps)
    chosen = uniform_frames(range(len(scene.truth)), min(4, len(scene.truth)))
    rows = [("truth", [shrunk(scene.truth[i]) for i in chosen])]
    for name, (when, method) in LEFT_OUT.items():
        made = generate(way.models[when], scene, scene.targets, method, steps=steps, source=PROMPT)
        frames = np.stack(way.decode(made.latents))
        title = f"{name}: {frame_psnr(frames, scene.truth).mean():.1f} dB"
        rows.append((title, [shrunk(frames[i]) for i in chosen]))
    return sheet(rows)


DRAWN = (training_frames, selection, inversion, insertion, key_frame_attention, temporal_attention, editing)
DRAWN += (predicted_images, left_out)
PICTURES = {f"{i}_{draw.__name__}.png": draw for i, draw in enumerate(DRAWN, start=1)}


def parse_arguments(command: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=192, help="of frames (default: 192)")
    parser.add_argument("--target-frames", type=int, default=8, help="default: 8")
    parser.add_argument("--training-steps", type=int, default=100, help="default: 100, as in the paper")
    parser.add_argument("--ddim-steps", type=int, default=10, help="default: 10")
    parser.add_argument("--work", type=Path, default=Path("runs/walkthrough"))
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    return parser.parse_args(command)


def main(args: argparse.Namespace) -> None:
    keep_freed_memory()
    # Target poses are half a second apart.
    frames = {"target_frames": args.target_frames, "target_every": 6}
    trial = Trial(PUPPET, args.width, training_steps=args.training_steps, **frames)
    scene = from_the_knees_up(set_scene(trial))
    trained = args.work / f"{PUPPET}-{args.width}-{args.training_steps}.safetensors"
    fine_tune(trial, scene, trained)
    models = {BEFORE: load_demo(), AFTER: load_demo()}
    load_trained(models[AFTER], trained)
    way = walk(models, scene, args.ddim_steps)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        save_image(args.out / name, draw(way).quantize(256))  # a third of the bytes
        print(args.out / name)


if __name__ == "__main__":
    main(parse_arguments())
