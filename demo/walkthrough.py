"""The method in pictures, from one run on one puppet: `python demo/walkthrough.py`, some minutes on a laptop.

Trains on a puppet that the demo model has never seen, walks through the method step by step, and draws what each
step did into `docs/pictures/`. `docs/METHOD.md` explains the pictures. The trained tensors are kept in
`runs/walkthrough/`, so that the next call only samples.
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checkpoint import Model, load_model
from command import keep_freed_memory
from demo.drawing import (
    blank,
    crossed,
    false_colours,
    framed,
    heated,
    in_rows,
    number,
    outlined,
    sheet,
    shrunk,
)
from demo.walk import (
    PROMPT,
    PUPPET,
    TRAINING_FRAMES,
    Scene,
    Walk,
    attention_tokens,
    attention_weights,
    decoder_block,
    fine_tune,
    predicted_images,
    set_scene,
    walk,
)
from device import compute_device
from metrics.figures import frame_psnr
from posecrafter import PAPER, ddim_timesteps, decode_latents, generate, training_steps
from poses.parts import convex_hull, face_and_hands, latent_points
from poses.pose import Pose, draw_pose, is_seen, pose_distance
from poses.source import uniform_frames
from run import load_trained
from video import save_image

# ---- The pictures -------------------------------------------------------------------------------


BEFORE, AFTER = "before fine-tuning", "after fine-tuning"


@dataclass(frozen=True)
class Story:
    """What the pictures are drawn from."""

    models: dict[str, Model]  # BEFORE and AFTER fine-tuning
    scene: Scene
    way: Walk  # of the tuned model

    @property
    def steps(self) -> int:
        return len(self.way.latents) - 1

    @property
    def asking(self) -> int:
        """The frame that the pictures of attention ask from."""
        return len(self.way.poses) // 2

    @property
    def result(self) -> list[np.ndarray]:
        """The M + 1 frames, the reference's first."""
        return list(decode_latents(self.models[AFTER], self.way.latents[-1]))

    def control(self, pose: Pose) -> np.ndarray:
        return draw_pose(pose, *self.scene.frames.shape[1:3])


def training_frames(story: Story) -> Image.Image:
    frames = [(f"frame {i}", shrunk(frame)) for i, frame in enumerate(story.scene.frames)]
    poses = [("", shrunk(story.control(pose))) for pose in story.scene.poses]
    return sheet([("", row[i : i + 4]) for i in range(0, len(frames), 4) for row in (frames, poses)])


def selection(story: Story) -> Image.Image:
    """Distances of all target poses to all training poses, in thousandths, and their sums."""
    scene, k, width = story.scene, story.way.reference, 104
    height = shrunk(scene.frames[0], width).height
    distances = 1000 * np.array([[pose_distance(t, p) for p in scene.poses] for t in scene.targets])
    frames = [("", shrunk(frame, width)) for frame in scene.frames]
    empty = ("", blank(width, height))

    def numbers(values: np.ndarray, high: float) -> list[tuple[str, Image.Image]]:
        return [("", number(value, value / high, width, height)) for value in values]

    rows = [
        [("", shrunk(story.control(pose), width)), *numbers(row, distances.max())]
        for pose, row in zip(scene.targets, distances)
    ]
    sums = distances.sum(axis=0)
    rows = [[empty, *frames], *rows, [empty, *numbers(sums, sums.max())]]
    for row in (rows[0], rows[-1]):
        row[1 + k] = ("", framed(row[1 + k][1]))
    titles = ["training frames; the chosen one is framed"]
    titles += ["target poses, and their distance to each training pose, in thousandths"]
    titles += [""] * (len(rows) - 3) + ["sums"]
    return sheet(list(zip(titles, rows)))


def inversion(story: Story) -> Image.Image:
    trajectory = story.way.trajectory
    timesteps = [0, *ddim_timesteps(story.steps)[::-1]]
    chosen = uniform_frames(range(len(trajectory)), min(5, len(trajectory)))
    picked = torch.cat([trajectory[i] for i in chosen])
    colours = [
        (f"t = {timesteps[i]}, std {trajectory[i].std():.2f}", false_colours(trajectory[i][0]))
        for i in chosen
    ]
    decoded = [("", shrunk(frame)) for frame in decode_latents(story.models[AFTER], picked)]
    return sheet([("three channels of the latent", colours), ("decoded", decoded)])


def insertion(story: Story) -> Image.Image:
    poses = [shrunk(story.control(pose)) for pose in story.way.poses]
    cells = [("frame 0: the reference", framed(poses[0]))]
    cells += [(f"frame {i}", pose) for i, pose in enumerate(poses[1:], start=1)]
    return sheet(in_rows(cells, 5))


ASKED = {  # points of a pose that the pictures of attention ask from
    "the nose": lambda pose: pose.body[0, :2],
    "the shirt": lambda pose: pose.body[[2, 5, 8, 11], :2].mean(axis=0),
    "a hand": lambda pose: pose.right_hand[9, :2],
}


def token_at(point: np.ndarray, shape: tuple[int, int]) -> int:
    """The number of the location of a feature map (h, w) that a canvas-normalised point (x, y) lies in."""
    x, y = (point * shape[::-1]).astype(int).clip(0, np.subtract(shape[::-1], 1))
    return y * shape[1] + x


def key_frame_attention(story: Story) -> Image.Image:
    """How much three locations of a target frame look at each location of frame 0."""
    way, result, frame = story.way, story.result, story.asking
    shape = way.noise.shape[-2:]
    places = {name: point(way.poses[frame]) for name, point in ASKED.items()}
    rows = {
        name: [(f"{name} of frame {frame} asks", crossed(shrunk(result[frame], 320), place))]
        for name, place in places.items()
    }
    for when, model in story.models.items():
        tokens = attention_tokens(model, story.scene, way, 0)
        attention = decoder_block(model, 0).attn1
        for name, place in places.items():
            asking = tokens[frame, token_at(place, shape)]
            weights = attention_weights(attention, asking, tokens[0]).mean(axis=0)
            rows[name].append((f"frame 0, {when}", heated(result[0], weights.reshape(shape), 320)))
    return sheet([("", cells) for cells in rows.values()])


def temporal_attention(story: Story) -> Image.Image:
    """How much one location of a target frame looks at the same location of all frames."""
    way, frame, width = story.way, story.asking, 104
    place = ASKED["the nose"](way.poses[frame])
    token = token_at(place, way.noise.shape[-2:])
    frames = [crossed(shrunk(one, width), place) for one in story.result]
    frames[frame] = framed(frames[frame])
    numbered = [(f"frame {i}", picture) for i, picture in enumerate(frames)]
    rows = [(f"one location in all frames; frame {frame} asks", numbered)]
    for when, model in story.models.items():
        track = attention_tokens(model, story.scene, way, 1)[:, token]
        attention = decoder_block(model, 1).attn_temp
        weights = attention_weights(attention, track[frame], track).mean(axis=0)
        bars = [("", number(w, w, width, 72)) for w in weights]
        rows.append((f"weights {when}", bars))
    return sheet(rows)


def editing(story: Story) -> Image.Image:
    """The noise with the parts' hulls: where they are, and in the reference where their maps lead."""
    way, rows = story.way, []
    shape = way.noise.shape[-2:]
    for frame in (1, len(way.poses) - 1):
        here, there = {}, {}
        for part in face_and_hands(way.poses[frame], way.poses[0], *shape):
            landmarks = getattr(way.poses[frame], part.name)
            hull = convex_hull(latent_points(landmarks[is_seen(landmarks)], *shape))
            here[part.name] = hull
            there[part.name] = hull @ part.to_other[:, :2].T + part.to_other[:, 2]
        cells = [
            ("the reference's noise", outlined(way.noise[0], there, 320)),
            (f"frame {frame}, before", outlined(way.noise[frame], here, 320)),
            (f"frame {frame}, after", outlined(way.edited[frame], here, 320)),
        ]
        rows.append(("", cells))
    return sheet(rows)


def predictions(story: Story) -> Image.Image:
    """The clean images that the latents of some steps and the noise predicted in them imply."""
    steps, timesteps = story.steps, ddim_timesteps(story.steps)
    shown = [1, len(story.way.poses) - 1]
    rows = {frame: [] for frame in shown}
    for step in sorted({1, math.ceil(0.3 * steps), math.ceil(0.5 * steps), steps}):
        latents = predicted_images(story.models[AFTER], story.scene, story.way, step)[shown]
        for frame, image in zip(shown, decode_latents(story.models[AFTER], latents)):
            rows[frame].append((f"step {step}, t = {timesteps[step - 1]}", shrunk(image)))
    for frame, cells in rows.items():
        cells.append(("truth", shrunk(story.scene.truth[frame - 1])))
    return sheet([(f"frame {frame}", cells) for frame, cells in rows.items()])


LEFT_OUT = {
    "the paper's method": PAPER,
    "without latent editing": replace(PAPER, parts=None),
    "without insertion": replace(PAPER, insert=False),
    "without inversion, from random noise": replace(PAPER, start="noise"),
}


def left_out(story: Story) -> Image.Image:
    scene = story.scene
    ways = [(name, story.models[AFTER], method) for name, method in LEFT_OUT.items()]
    ways.append(("without fine-tuning", story.models[BEFORE], PAPER))
    chosen = uniform_frames(range(len(scene.truth)), min(4, len(scene.truth)))
    rows = [("truth", [("", shrunk(scene.truth[i])) for i in chosen])]
    for name, model, method in ways:
        made = generate(model, scene, scene.targets, method, steps=story.steps, source=PROMPT)
        frames = np.stack(list(decode_latents(model, made.latents)))
        score = frame_psnr(frames, scene.truth).mean()
        cells = [("", shrunk(frames[i])) for i in chosen]
        rows.append((f"{name}: {score:.1f} dB", cells))
    return sheet(rows)


PICTURES: dict[str, Callable[[Story], Image.Image]] = {
    "1_training_frames.png": training_frames,
    "2_selection.png": selection,
    "3_inversion.png": inversion,
    "4_insertion.png": insertion,
    "5_key_frame_attention.png": key_frame_attention,
    "6_temporal_attention.png": temporal_attention,
    "7_editing.png": editing,
    "8_predicted_images.png": predictions,
    "9_left_out.png": left_out,
}


def parse_arguments(command: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=192, help="of frames (default: 192)")
    parser.add_argument("--target-frames", type=int, default=8, help="default: 8")
    parser.add_argument("--training-steps", type=int, default=training_steps(TRAINING_FRAMES))
    parser.add_argument("--ddim-steps", type=int, default=10, help="default: 10")
    parser.add_argument("--work", type=Path, default=Path("runs/walkthrough"))
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    return parser.parse_args(command)


def main(args: argparse.Namespace) -> None:
    keep_freed_memory()
    device, dtype = compute_device(training=True)
    scene = set_scene(args.width, args.target_frames)
    trained = args.work / f"{PUPPET}-{args.width}-{args.training_steps}.safetensors"

    def load() -> Model:
        return load_model("demo", None, None, device, dtype)

    if not trained.exists():
        fine_tune(load(), scene, args.training_steps, trained)
    models = {BEFORE: load(), AFTER: load()}
    load_trained(models[AFTER], trained)
    story = Story(models, scene, walk(models[AFTER], scene, args.ddim_steps))
    args.out.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        save_image(args.out / name, draw(story).quantize(256))  # a third of the bytes
        print(args.out / name)


if __name__ == "__main__":
    main(parse_arguments())
