"""Makes the demo base model from nothing: `python demo/pretrain.py`, about eighteen hours on two CPU cores.

Stable Diffusion has seen the world; the demo model has seen paper puppets. It is the same code at small
width, in five stages. A finished one is not done again, and training resumes from its last checkpoint:

1. render pools of puppets, each identity in several poses, with keypoints and captions;
2. train the VAE on them;
3. encode them once;
4. train UNet, ControlNet and text encoder together, on short clips of one identity;
5. train the VAE on, for small things in large frames, without moving its latents.

The pools, and stage 4, come in rounds that go on from each other: puppets as they are, other puppets of which
most are in disguise (`scenery.py`), large ones in upright frames, as people are filmed with telephones, then
puppets that turn and cross their arms, which also teach that words count (`TWIN`), such ones in larger frames,
and in wide frames that show them from the knees up, as the demo does. The last five rounds show such frames
again, also from close up, and have the network learn from its own mistakes (`rollout_step`), the last two
before a critic (`Critic`).

What stage 4 has to teach is what Stable Diffusion brings along: that a person's appearance can be read off
frame 0 through key-frame attention, whatever the pose. See `training_batch` for how.

It computes on a graphics card where there is one, in batches several times as large, which the CPU's cores make
ahead. With `--base MODEL` only the last round is done, once more, for a finished model: so it has been grown, a
round at a time, and so can be tried what another round would bring.

The temporal layers are absent here, as in a 2-D public checkpoint; they come with inflation at loading.
Everything goes to `--work`; the finished weights go to `--out` as a folder in the diffusers layout.
"""

import argparse
import copy
import csv
import hashlib
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm
from tqdm import trange

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checkpoint import Model, load_model, model_path
from clip import TextConfig, TextEncoder, Tokenizer
from command import keep_freed_memory
from controlnet import ControlNet
from demo.puppet import (
    CLOTH_COLOURS,
    DANCES,
    HAIR_COLOURS,
    Paint,
    Puppet,
    caption,
    motion,
    random_puppet,
    render,
)
from demo.save import save_model
from demo.scenery import disguise
from demo.vocabulary import learn_merges
from device import compute_device
from posecrafter import (
    ALPHAS_CUMPROD,
    TRAIN_STEPS,
    alpha_cumprod,
    ddim_step,
    ddim_timesteps,
    edit_latents,
    image_tensor,
    invert,
)
from poses.pose import Pose, draw_pose, place_pose
from slicing import Slicing, slices
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig
from video import replacing

SIZE = 128  # pixels; with a factor of 4 the latents are 32x32
LAST_SIZE = 192  # of the last rounds: where fingers and mouths are more than a pixel wide
CLOSE = 96  # pixels, of what is seen from close up
POSES = 8  # per identity, drawn from ten seconds of motion
# Where a round has twins, one more frame: the first once more, but with hair or a garment in another colour.
TWIN = POSES
LEARNING_RATE = 0.001  # of fine-tuning on a clip; the paper's 0.003 is level in dB, a viewer prefers this
GUIDANCE_UNTIL = 600  # timestep: colours are settled by then; later guidance mostly harms the rest
HINT_WIDTHS = (16, 32, 96)
UNET = UNetConfig(
    in_channels=8,
    out_channels=8,
    widths=(64, 128, 160, 160),
    layers_per_block=1,
    context_dim=64,
    heads=2,
    norm_groups=8,
)
VAE_CONFIG = VAEConfig(8, widths=(24, 48, 96), layers_per_block=1, norm_groups=6, scale=1.0)
VAE_STEPS = (2500, 3000, 2400, 1500)  # on crops, on whole frames, on details, of the decoder alone
TEXT = TextConfig(vocab_size=0, width=64, heads=2, layers=2, mlp_width=256, length=24)


@dataclass(frozen=True)
class Round:
    """One round of training: its pool, its numbers of steps and the learning rates they start from."""

    identities: range
    disguised: float  # share of them
    moving: float  # share that turns or crosses its arms
    twins: bool
    height: int  # of the frames, in pixels
    width: int
    steps: int
    lr: float
    words_every: int | None = None  # one step in so many is of words
    older_every: int = 2  # and of the others, one in so many is on a pool of a round before
    close_ups: float = 0.0  # share of those on its own pool that see squares of CLOSE only, see `close_ups`
    rollouts: float = 0.0  # share of those on its own pool that learn from the network's own mistakes
    critic: float = 0.0  # pull towards what also looks true, as a share of the squared error's, see `Critic`
    inverted: int = 0  # identities of its pool whose first frames are inverted for that


ROUNDS = (
    Round(range(10_000, 12_500), 0.0, 0.0, False, SIZE, SIZE, 2150, 1e-3),
    Round(range(12_500, 15_000), 0.7, 0.0, False, SIZE, SIZE, 1500, 6e-4),
    Round(range(15_000, 16_000), 0.8, 0.0, False, 224, SIZE, 450, 4e-4),
    Round(range(16_000, 20_000), 0.2, 0.5, True, SIZE, SIZE, 4600, 6e-4, 2),
    Round(range(20_000, 23_200), 0.2, 0.4, True, LAST_SIZE, LAST_SIZE, 3200, 4e-4, 5, 4),
    Round(range(23_200, 24_800), 0.15, 0.35, True, LAST_SIZE, LAST_SIZE * 4 // 3, 2000, 4e-4, 6, 5),
    Round(
        range(24_800, 26_400), 0.15, 0.35, True, LAST_SIZE, LAST_SIZE * 4 // 3, 2400, 4e-4, 10, 4,
        close_ups=0.6, rollouts=0.75, inverted=480,
    ),
    Round(
        range(26_400, 27_360), 0.1, 0.35, True, LAST_SIZE, LAST_SIZE * 4 // 3, 1800, 4e-4, 12, 5,
        close_ups=0.6, rollouts=0.8, inverted=480,
    ),
    Round(
        range(27_360, 28_160), 0.1, 0.35, True, LAST_SIZE, LAST_SIZE * 4 // 3, 1600, 4e-4, 12, 3,
        close_ups=0.6, rollouts=0.8, inverted=400,
    ),
    Round(
        range(28_160, 28_960), 0.1, 0.35, True, LAST_SIZE, LAST_SIZE * 4 // 3, 1100, 4e-4, 5, 4,
        close_ups=0.6, rollouts=0.9, critic=0.5, inverted=400,
    ),
    Round(
        range(28_960, 29_760), 0.1, 0.35, True, LAST_SIZE, LAST_SIZE * 4 // 3, 1300, 4e-4, 7, 5,
        close_ups=0.6, rollouts=0.9, critic=1.0, inverted=300,
    ),
)


# ---- 1. The pool of puppets -------------------------------------------------------------------------


def latent_pixels(pixels: np.ndarray) -> np.ndarray:
    """Those latent pixels that hold any of these pixels: booleans (..., H, W) to (..., H/4, W/4)."""
    *rest, height, width = pixels.shape
    return pixels.reshape(*rest, height // 4, 4, width // 4, 4).any((-3, -1))


def twin_of(puppet: Puppet, rng: np.random.Generator) -> tuple[Puppet, str, str]:
    """The same person with hair, shirt or lower garment in another colour, and the captions' words for
    what differs: the puppet's, and the twin's."""
    which = rng.integers(puppet.hair_shape == "bald", 3)
    name, colours = (("hair", HAIR_COLOURS), ("shirt", CLOTH_COLOURS), ("lower", CLOTH_COLOURS))[
        which
    ]
    others = [colour for colour in colours if colour != getattr(puppet, name).name]
    colour = str(rng.choice(others))
    twin = replace(puppet, **{name: Paint(colour, colours[colour])})
    words, twins_words = (caption(who).split(", ")[1 + which] for who in (puppet, twin))
    return twin, words, twins_words


def render_identity(seed: int, plan: Round) -> tuple[dict[str, np.ndarray], list[str]]:
    """A row of the pool; and the caption, its words for what the twin changes, and the twin's words for it
    (nothing where there is no twin).

    The row: frames (F, H, W, 3) uint8, masks (F, H/4, W/4) uint8, and poses (F, 130, 3), all keypoints. F is
    POSES, and one more with a twin.
    """
    rng = np.random.default_rng((3, seed))
    height, width = plan.height, plan.width
    in_disguise = rng.random() < plan.disguised
    # The part of the square picture that is shown; some are closer to the camera.
    zoom = rng.uniform(1.05, 1.5) if in_disguise and rng.random() < 0.4 else 1.0
    side = round(max(height, width) * zoom)
    spare_top, spare_left = side - height, side - width
    if width > height:  # these cut off legs, not heads
        spare_top = min(spare_top, side // 10)
    top, left = (int(rng.integers(spare + 1)) for spare in (spare_top, spare_left))
    if zoom == 1:
        left = (side - width) // 2
    dance = rng.choice(DANCES[1:]) if rng.random() < plan.moving else DANCES[0]
    puppet = random_puppet(seed)
    drawn = [
        (puppet, state) for state in motion(seed, POSES * 15, dance=dance)[::15]
    ]  # 1.25 s apart
    told = "", ""
    if plan.twins:
        twin, *told = twin_of(puppet, rng)
        drawn.append((twin, drawn[0][1]))
    frames, poses, masks = [], [], []
    for who, state in drawn:
        frame, pose, mask = render(who, state, side)
        shown = np.s_[top : top + height, left : left + width]
        frames.append(frame[shown])
        poses.append(place_pose(pose, side / width, side / height, -left / width, -top / height))
        masks.append(mask[shown])
    frames, masks = np.stack(frames), np.stack(masks)
    if in_disguise:
        frames = disguise(frames, masks, seed)
    masks = latent_pixels(masks).astype(np.uint8)
    # In disguise no colour is what it is called.
    words = ["a person", "", ""] if in_disguise else [caption(puppet), *told]
    row = {
        "frames": frames,
        "masks": masks,
        "poses": np.stack([np.concatenate(list(vars(pose).values())) for pose in poses]),
    }
    return row, words


def pose_from(keypoints: np.ndarray) -> Pose:
    """The pose of a pool's row: all keypoints (130, 3) in the order of Pose's fields."""
    return Pose(*np.split(keypoints, (18, 18 + 70, 18 + 70 + 21)))


def render_pool(work: Path, plan: Round) -> dict[str, np.ndarray]:
    """Renders what is not rendered yet; returns memory-mapped arrays with one row per identity."""
    identities, count = plan.identities, POSES + plan.twins
    shapes = {
        "frames": (np.uint8, (count, plan.height, plan.width, 3)),
        "masks": (np.uint8, (count, plan.height // 4, plan.width // 4)),
        "poses": (np.float32, (count, 130, 3)),
    }
    done = work / "captions.json"
    if not done.exists():
        pool = {
            name: np.lib.format.open_memmap(
                work / f"{name}.npy", "w+", dtype, (len(identities), *shape)
            )
            for name, (dtype, shape) in shapes.items()
        }
        captions = []
        with multiprocessing.Pool() as workers:
            rendered = workers.imap(partial(render_identity, plan=plan), identities, chunksize=8)
            for i in trange(len(identities), desc="rendering puppets", mininterval=10):
                row, words = next(rendered)
                for name, array in row.items():
                    pool[name][i] = array
                captions.append(words)
        for array in pool.values():
            array.flush()
        done.write_text(json.dumps(captions))
    pool = {name: np.load(work / f"{name}.npy", mmap_mode="r") for name in shapes}
    return pool | {"captions": json.loads(done.read_text())}


# ---- Shared by both trainings -----------------------------------------------------------------------

DEVICE, _ = compute_device(training=True)
SAVED_EVERY = 300  # seconds
# Processes that make batches ahead and edit clips, and how many times larger batches are: with a graphics card,
# which leaves the CPU the time, one for each 8 GB of its memory; beyond six they would only take longer.
HELPERS, BATCH = 0, 1
if DEVICE.type == "cuda":
    BATCH = max(1, min(6, torch.cuda.get_device_properties(DEVICE).total_memory // 2**33))
    if "fork" in multiprocessing.get_all_start_methods():
        HELPERS = max(1, (os.cpu_count() or 1) - 2)


def to_device(x: Tensor) -> Tensor:
    """Without waiting for what the graphics card is doing."""
    return x.to(DEVICE, non_blocking=True)


def in_bfloat16() -> torch.autocast:
    """Where networks compute in bfloat16; their weights stay float32."""
    return torch.autocast(DEVICE.type, torch.bfloat16)


def details(pose: Pose) -> tuple[np.ndarray, ...]:
    """The keypoints (K, 3) of what is small and what people look at."""
    return pose.face, pose.left_hand, pose.right_hand


def near(keypoints: np.ndarray, height: int, width: int, margin: float = 2.0) -> np.ndarray:
    """The box of keypoints (K, 3), canvas-normalised, grown by `margin` pixels: booleans (height, width)."""
    mask = np.zeros((height, width), bool)
    points = keypoints[:, :2] * (width, height)
    left, top = (points.min(axis=0) - margin).clip(0).astype(int)
    right, bottom = np.ceil(points.max(axis=0) + margin).clip(0).astype(int)
    mask[top:bottom, left:right] = True
    return mask


def start_residuals_at_zero(model: nn.Module) -> None:
    """Every residual branch starts as nothing, so that a deep network trains fast from its first step."""
    for module in model.modules():
        for name in ("conv2", "proj_out"):
            if hasattr(module, name):
                nn.init.zeros_(getattr(module, name).weight)
                nn.init.zeros_(getattr(module, name).bias)


def forget_unless_finite(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Sets all gradients to zero if any is not a number, which would be the end of all weights. Returns whether
    all are: on the device, so that a graphics card is not waited for."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    finite = torch.stack([gradient.isfinite().all() for gradient in gradients]).all()
    for gradient in gradients:
        gradient.nan_to_num_(0, 0, 0).mul_(finite)
    return finite


def optimise(
    name: str,
    networks: nn.Module,
    loss_at,
    steps: int,
    peak_lr: float,
    ema_decay: float,
    work: Path,
    critic: nn.Module | None = None,
) -> None:
    """Trains `networks` with AdamW on `loss_at(step)`, and leaves them with averaged weights.

    One cosine from `peak_lr` to 1 % of it after a short warm-up, gradients clipped at 1. A checkpoint is
    written every five minutes, and a batch is a function of its step, so an interrupted run goes on as if
    it had not stopped (but rollouts, which begin anew). The curve goes to `NAME.csv`.
    """
    checkpoint, log = work / f"{name}.pt", work / f"{name}.csv"
    named, parameters = list(networks.named_parameters()), list(networks.parameters())
    # Words are rarely what decides, so what reads them learns slowly: it takes larger steps (see `pack_weights`).
    groups = [
        {"params": [p for name, p in named if (name == "reads_words") == words], "boost": boost}
        for words, boost in ((False, 1), (True, 4))
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(
        groups, lr=peak_lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    average = [p.detach().clone() for p in parameters]
    start, began = 0, time.monotonic()
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        networks.load_state_dict(state["networks"])
        optimizer.load_state_dict(state["optimizer"])
        torch._foreach_copy_(average, state["average"])
        if critic:
            critic.load_state_dict(state["critic"])
        start = state["step"]
        rows = [row.split(",") for row in log.read_text().splitlines()[1:]]
        rows = [row for row in rows if int(row[0]) <= start]  # later ones will be written again
        began -= int(rows[-1][2]) if rows else 0
        log.write_text("\n".join(["step,loss,seconds", *map(",".join, rows)]) + "\n")
    else:
        log.write_text("step,loss,seconds\n")

    def save(step: int):
        state = {
            "networks": networks.state_dict(),
            "optimizer": optimizer.state_dict(),
            "average": average,
            "step": step,
        }
        if critic:
            state["critic"] = critic.state_dict()
        torch.save(state, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)

    losses, finite, saved = [], [], time.monotonic()
    for step in (
        bar := trange(start, steps, initial=start, total=steps, desc=name, mininterval=10)
    ):
        warm_up, progress = min(1, (step + 1) / 200), step / steps
        lr = peak_lr * warm_up * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = group["boost"] * lr
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        finite.append(forget_unless_finite(parameters))
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        # The average's memory grows with the run: early weights are not worth remembering.
        torch._foreach_lerp_(average, parameters, 1 - min(ema_decay, (1 + step) / (10 + step)))
        losses.append(loss.detach())
        if (step + 1) % 50 == 0:
            # So seldom, as a graphics card is waited for.
            mean, forgotten = torch.stack(losses).nanmean().item(), (~torch.stack(finite)).sum().item()
            if forgotten > 5:
                raise ArithmeticError(
                    f"{name}: {forgotten} of the 50 steps up to {step + 1} had gradients that are not finite; "
                    f"delete {checkpoint} and train at a lower rate"
                )
            bar.set_postfix(loss=f"{mean:.4f}")
            with log.open("a") as file:
                csv.writer(file).writerow(
                    [step + 1, f"{mean:.5f}", f"{time.monotonic() - began:.0f}"]
                )
            losses, finite = [], []
        if time.monotonic() - saved > SAVED_EVERY or step + 1 == steps:
            save(step + 1)
            saved = time.monotonic()
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)


# ---- 2. The VAE -------------------------------------------------------------------------------------


def new_vae() -> VAE:
    vae = VAE(VAE_CONFIG).to(DEVICE, memory_format=torch.channels_last)
    start_residuals_at_zero(vae)
    return vae


def moved(rng, maps: list[Tensor]) -> list[Tensor]:
    """Maps (N, C, h, w) of the same scene, of any size, all turned, shifted and scaled alike, bilinearly."""
    height, width = maps[0].shape[2:]
    angle, size = rng.uniform(-0.6, 0.6), math.exp(rng.uniform(-0.15, 0.15))
    cosine, sine = size * math.cos(angle), size * math.sin(angle)
    rows = [[cosine, -sine * height / width, 0], [sine * width / height, cosine, 0]]
    affine = torch.tensor(rows)
    affine[:, 2] = torch.from_numpy(rng.uniform(-0.1, 0.1, 2))
    return [
        F.grid_sample(
            x,
            F.affine_grid(affine.expand(len(x), 2, 3).to(x), x.shape, align_corners=False),
            padding_mode="border",
            align_corners=False,
        )
        for x in maps
    ]


def frame_from(
    rng, pool: dict, of_face: float, of_hands: float, crop: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """A frame of the pool, or a square of `crop` pixels around some part of the person, and its pixels' weights:
    1, 3 on the person, and those of face and hands in their boxes."""
    i, j = rng.integers(len(pool["frames"])), rng.integers(POSES)
    frame, mask = pool["frames"][i, j], pool["masks"][i, j]
    height, width = frame.shape[:2]
    parts = details(pose_from(pool["poses"][i, j]))
    weight = 1 + 2 * np.kron(mask, np.ones((4, 4), np.float32))
    for part, heavy in zip(parts, (of_face, of_hands, of_hands)):
        weight[near(part, height, width)] = heavy
    if not crop:
        return frame, weight
    if rng.random() < 0.3:
        centre = 4 * rng.choice(np.argwhere(mask))
    else:
        centre = parts[rng.integers(3)][:, 1::-1].mean(axis=0) * (height, width)
    corner = (centre - crop * rng.uniform(0.2, 0.8, 2)).astype(int) // 4 * 4
    top, left = np.clip(corner, 0, (height - crop, width - crop))
    window = np.s_[top : top + crop, left : left + crop]
    return frame[window], weight[window]


def vae_loss(
    rng, vae: VAE, frames: list[tuple[np.ndarray, np.ndarray]], move: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of frames with their weights; the images (N, 3, H, W) in [-1, 1]; the means of their latents.

    L1 + L2 + gradient loss and a light pull to N(0, 1). With `move` the latents are turned, shifted and scaled
    between encoder and decoder, since that is what latent editing does to them.
    """
    images, weight = map(np.stack, zip(*frames))
    images = targets = (image_tensor(images) * 2 - 1).to(DEVICE)
    weight = torch.from_numpy(weight / weight.mean())[:, None].to(DEVICE)
    with in_bfloat16():
        mean, log_variance = (x.float() for x in vae.encode(images))
        noise = torch.from_numpy(rng.standard_normal(mean.shape, np.float32)).to(DEVICE)
        latents = mean + noise * torch.exp(log_variance.clamp(-30, 10) / 2)
        if move:
            latents, targets, weight = moved(rng, [latents, images, weight])
        output = vae.decode(latents)
    difference = output.float() - targets
    edges = sum(
        (weight.narrow(dim, 1, weight.shape[dim] - 1) * difference.diff(dim=dim).abs()).mean()
        for dim in (2, 3)
    )
    divergence = (mean**2 + log_variance.exp() - 1 - log_variance).mean() / 2
    loss = (weight * (difference.abs() + difference**2)).mean() + edges + 1e-4 * divergence
    return loss, images, mean


def train_vae(vae: VAE, pools: list[dict], work: Path) -> None:
    """First on crops around the person, many and cheap, then on whole frames, as it is used.

    The second stage matters: a group norm over a crop has other statistics than over a frame, and
    colours come out wrong without it. The person counts three times, face and hands ten times: small, detailed,
    and what people look at. Every fourth batch is moved.
    """

    def loss_at(step: int, stage: int, crop: int) -> Tensor:
        rng = np.random.default_rng((stage, step))
        pool = pools[step % len(pools)]
        count = 8 * SIZE**2 // (crop**2 or math.prod(pool["frames"].shape[2:4]))
        frames = [frame_from(rng, pool, 10, 10, crop) for _ in range(count)]
        return vae_loss(rng, vae, frames, move=step // len(pools) % 4 == 3)[0]

    networks = nn.ModuleDict({"vae": vae})
    crops, whole = (partial(loss_at, stage=stage, crop=crop) for stage, crop in ((1, 64), (3, 0)))
    optimise("vae", networks, crops, VAE_STEPS[0], 2e-3, 0.995, work)
    optimise("vae_whole", networks, whole, VAE_STEPS[1], 1.5e-3, 0.995, work)


def sharpen_vae(vae: VAE, pools: list[dict], scale: float, work: Path) -> None:
    """A last stage for mouths, eyes and fingers: every other batch is of the last pool's large frames, and hands
    weigh more. The latents are held where they are, so that the networks that were trained on them fit as before:
    1 to 2 dB come from reading the same latents better. Then the decoder alone goes on, two of three batches on
    squares around face and hands, where fingers are a good part of what there is to see: 2 dB more for hands.
    """
    before = copy.deepcopy(vae).requires_grad_(False)
    *older, large = pools

    def batch_of(rng, pool: dict, of_face: float, of_hands: float, crop: int = 0) -> list:
        count = max(1, round(8 * SIZE**2 / (crop**2 or math.prod(pool["frames"].shape[2:4]))))
        return [frame_from(rng, pool, of_face, of_hands, crop) for _ in range(count)]

    def loss_at(step: int) -> Tensor:
        rng = np.random.default_rng((11, step))
        pool = large if step % 2 else older[step // 2 % len(older)]
        frames = batch_of(rng, pool, of_face=12, of_hands=20)
        loss, images, mean = vae_loss(rng, vae, frames, move=step // 10 % 4 == 3)
        with torch.no_grad(), in_bfloat16():
            held, _ = before.encode(images)
        return loss + ((mean - held.float()) * scale).square().mean()

    def decoders_loss_at(step: int) -> Tensor:
        rng = np.random.default_rng((12, step))
        turn = step // 3
        pool = large if turn % 2 else older[turn // 2 % len(older)]
        frames = batch_of(rng, pool, of_face=15, of_hands=40, crop=64 if step % 3 else 0)
        return vae_loss(rng, vae, frames, move=step % 10 == 9)[0]

    networks = nn.ModuleDict({"vae": vae})
    optimise("vae_details", networks, loss_at, VAE_STEPS[2], 8e-4, 0.995, work)
    vae.requires_grad_(False)
    decoder = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    decoder.requires_grad_(True)
    optimise("vae_fingers", decoder, decoders_loss_at, VAE_STEPS[3], 8e-4, 0.995, work)


# ---- 3. The latents ---------------------------------------------------------------------------------


def encode_pool(vae: VAE, pool: dict, work: Path) -> np.ndarray:
    """The pool's latents, as the VAE gives them: (identities, F, 8, H/4, W/4)."""
    path = work / "latents.npy"
    if not path.exists():
        latents, at_once = [], 8 if DEVICE.type == "cuda" else 1
        with torch.inference_mode(), in_bfloat16():
            for start in trange(0, len(pool["frames"]), at_once, desc="encoding", mininterval=10):
                # Made floats there: that takes the CPU longer than encoding takes a graphics card.
                frames = torch.tensor(pool["frames"][start : start + at_once]).to(DEVICE)
                images = frames.flatten(0, 1).permute(0, 3, 1, 2).float() / 127.5 - 1
                mean = vae.encode(images)[0].unflatten(0, frames.shape[:2])
                latents.append(mean.half().cpu().numpy())
        with replacing(path) as unfinished:
            np.save(unfinished, np.concatenate(latents))
    return np.load(path).astype(np.float32)


# ---- 4. UNet, ControlNet and text encoder -----------------------------------------------------------

# Of rollouts, in which the network learns from where its own steps lead: see `new_rollout`.
ROLLOUT_STEPS = 10
ROLLOUTS = 8  # under way at a time, so that steps that follow each other are not of the same clips
CRITICAL = 501  # timestep: from here on they look like images, and a critic has its say, see `Critic`
CRITIC_LEARNS = 120  # updates, before it says anything

# How far from the truth keypoints are found, in SIZEths of the frame's longer side: standard deviations, of x
# and of y. `pretrain_openpose.py --evaluate` says how far the demo's own networks are off.
FOUND_WITHIN = np.repeat((0.8, 0.55, 0.3), (18, 70, 2 * 21))[:, None]  # body, face, hands


def as_found(rng, keypoints: np.ndarray, height: int, width: int, within: np.ndarray) -> list[Pose]:
    """The poses of a clip, from all keypoints (F, 130, 3), as they might have been found `within` so many pixels.

    Those outside of the picture are not. Some clips' are found almost exactly, some rather badly: a network that
    has only seen a renderer's own keypoints takes every misplaced pixel of a lip at its word.
    """
    error = rng.normal(0, rng.uniform(0, 1.5) * within, (*keypoints.shape[:2], 2))
    found = keypoints.copy()
    found[..., :2] += error / (width, height)
    found[((keypoints[..., :2] < 0) | (keypoints[..., :2] >= 1)).any(axis=-1)] = 0
    return [pose_from(each) for each in found]


def close_ups(rng, keypoints: np.ndarray, height: int, width: int) -> np.ndarray:
    """Where squares of CLOSE pixels around the face or one of the hands begin, the same part in all of a clip's
    frames: pixels (clips, F, 2), y and x, multiples of 4.

    keypoints: (clips, F, 130, 3). What is small is learned faster so: attention costs the square of a frame's
    pixels, and in a frame that shows the whole person most of them are of what has been learned long ago.

    Everything is made of whole frames and cut out last (`cut`): `draw_pose` draws thinner on a smaller canvas.
    """
    corners = np.empty((*keypoints.shape[:2], 2), int)
    for clip, frames in enumerate(keypoints):
        part, offset = rng.integers(3), CLOSE * rng.uniform(0.3, 0.7, 2)
        for frame, each in enumerate(frames):
            centre = details(pose_from(each))[part][:, 1::-1].mean(axis=0) * (height, width)
            corners[clip, frame] = (centre - offset).astype(int) // 4 * 4
    return corners.clip(0, (height - CLOSE, width - CLOSE))


def cut(maps: np.ndarray, corners: np.ndarray, factor: int = 4) -> np.ndarray:
    """The squares of maps (clips, F, ..., height/factor, width/factor) that begin there, see `close_ups`."""
    side = CLOSE // factor
    squares = np.empty((*maps.shape[:-2], side, side), maps.dtype)
    for clip, frame in np.ndindex(*corners.shape[:2]):
        top, left = corners[clip, frame] // factor
        squares[clip, frame] = maps[clip, frame, ..., top : top + side, left : left + side]
    return squares


def draw_poses(poses: list[list[Pose]], height: int, width: int) -> np.ndarray:
    """The control images of clips, uint8 (clips, F, 3, height, width)."""
    hints = np.stack([[draw_pose(pose, height, width) for pose in clip] for clip in poses])
    return np.moveaxis(hints, -1, 2)


def prompt_from(rng, words: str, told: str = "") -> str:
    """At times nothing or just "a person", else with some or all of the attributes, in any order, so that each
    word is learned, and that a colour belongs to what follows it.

    What has to be `told` is told.
    """
    person, *attributes = words.split(", ")
    if rng.random() < 0.15 and not told:
        return ""
    share = rng.choice((0.0, 0.6, 1.0), p=(0.3, 0.3, 0.4))
    some = [a for a in attributes if a == told or rng.random() < share]
    return ", ".join([person, *rng.permutation(some)])


def what_counts(mask: np.ndarray, keypoints: np.ndarray, height: int, width: int) -> np.ndarray:
    """The loss's weights (clips, frames, 1, h, w): 1, 5 for the person and where it stood in frame 0, 12 for the
    head, 15 for the face in it, and for hands, which are smaller, and eyes 40."""
    weight = 1 + 4 * np.maximum(mask, mask[:, :1])[:, :, None]
    for clip, frame in np.ndindex(*mask.shape[:2]):
        face, *hands = details(pose_from(keypoints[clip, frame]))
        hair = np.ptp(face[:, 1]) * height / 2
        parts = ((face, hair, 12), (face, 2, 15), (face[36:48], 3, 40), *((hand, 2, 40) for hand in hands))
        for part, margin, heavy in parts:
            weight[clip, frame, 0][latent_pixels(near(part, height, width, margin))] = heavy
    return weight


def training_batch(
    rng,
    pool: dict,
    latents: np.ndarray,
    progress: float,
    clips: int,
    frames: int,
    close: bool = False,
) -> dict:
    """Noisy clips of one identity each, or close-ups of them, and the noise to predict.

    Three things teach the network to read the appearance off frame 0:

    - Two in three clips share noise as the method's inverted pseudo video does: at the last timestep all
      frames are *equal* to frame 0. x = sqrt(a) z + sqrt(1 - a) noise shall be the same although the images
      z differ, so noise_i = noise_0 + sqrt(a / (1 - a)) (z_0 - z_i), with a of that last timestep.
      The pose alone then says where things go; or latent editing has moved face and hands, or the whole
      body, in a third of them each. The other clips have independent noise, as fine-tuning has.
    - At first, frame 0 is often less noisy than its timestep says, so there is something to look up.
    - The loss weighs the person, and most what is small in it, see `what_counts`.

    The poses are as one would find them in footage, see `as_found`.

    Many clips that share noise and have a twin start from the *twin's* frame 0, and the prompt tells what is
    different: words count more than what the noise remembers. What differs weighs five more there.
    """
    identities = rng.integers(len(latents), size=clips)
    order = np.stack([rng.permutation(POSES)[:frames] for _ in range(clips)])  # (clips, frames)
    shared = rng.random(clips) < 0.65
    told = [pool["captions"][i][1] for i in identities]
    from_twin = shared & (np.array(told) != "") & (rng.random(clips) < 0.5)
    order[from_twin] = (order - order[:, :1])[from_twin] % POSES  # frame 0 first: the twin's pose
    z = latents[identities[:, None], order]  # (clips, frames, 8, h, w)
    mask = pool["masks"][identities[:, None], order].astype(np.float32)
    keypoints = pool["poses"][identities[:, None], order]  # (clips, frames, 130, 3)
    inverted = latents[identities, np.where(from_twin, TWIN, order[:, 0])]
    height, width = pool["frames"].shape[2:4]
    within = FOUND_WITHIN * max(height, width) / SIZE
    found = [as_found(rng, each, height, width, within) for each in keypoints]
    hints = draw_poses(found, height, width)

    alphas = ALPHAS_CUMPROD.numpy()
    ratio = math.sqrt(alphas[-1] / (1 - alphas[-1]))
    noise = rng.standard_normal(z.shape, np.float32)
    edited = rng.integers(3, size=clips)
    for clip in np.flatnonzero(shared):
        start = torch.from_numpy(noise[clip, 0] + ratio * inverted[clip])
        starts = start.repeat(frames, 1, 1, 1)
        if edited[clip]:
            parts = ("face,hands", "body")[edited[clip] - 1]
            edit_latents(starts[1:], start, found[clip][1:], found[clip][0], parts)
        noise[clip] = starts.numpy() - ratio * z[clip]

    timestep = rng.integers(1000, size=clips)
    alpha = np.repeat(alphas[timestep][:, None], frames, 1)  # (clips, frames)
    early = rng.random(clips) < max(0.0, 0.8 - 3 * progress)
    alpha[early, 0] = alphas[(timestep[early] * rng.random(early.sum())).astype(int)]
    alpha = alpha[:, :, None, None, None]

    weight = what_counts(mask, keypoints, height, width)
    differs = (
        np.abs(inverted - z[:, 0]).max(axis=1, keepdims=True) > 0.3 * z.std()
    )  # (clips, 1, h, w)
    weight[from_twin, 0] += 5 * differs[from_twin]
    weight[early, 0] = 0  # frame 0's own noise level is a lie there
    a = alphas[timestep][:, None, None, None, None]
    # The error of the *image*, not of the noise, where noise dominates; bounded at both ends (min-SNR).
    weight *= np.minimum(1 / a, 8) * np.minimum(1, 5 * (1 - a) / a)
    maps = {
        "latents": np.sqrt(alpha) * z + np.sqrt(1 - alpha) * noise,
        "noise": noise,
        "weight": weight,
    }
    if close:
        corners = close_ups(rng, keypoints, height, width)
        maps = {name: cut(each, corners) for name, each in maps.items()}
        hints = cut(hints, corners, 1)
    maps["weight"] /= maps["weight"].mean()
    flat = {k: torch.from_numpy(v.astype(np.float32)).flatten(0, 1) for k, v in maps.items()}
    prompts = [
        prompt_from(rng, pool["captions"][i][0], words if twin else "")
        for i, words, twin in zip(identities, told, from_twin)
    ]
    return flat | {
        "hints": torch.from_numpy(hints).flatten(0, 1) / 255,
        "timestep": torch.from_numpy(timestep),
        "prompts": prompts,
    }


@dataclass
class Rollout:
    """Clips of one identity each on their way from noise to images, as sampling goes it. F = clips * frames."""

    latents: Tensor  # (F, 8, h, w), as noisy as the next step's input
    images: Tensor  # (F, 8, h, w), where they shall end
    weight: Tensor  # (F, 1, h, w), see `what_counts`
    hints: Tensor  # (F, 3, H, W)
    prompts: list[str]
    ways: np.ndarray  # (clips, ROLLOUT_STEPS + 1, 8, h, w), of the references, from image to noise
    poses: list[list[Pose]]  # of each clip, the reference's first
    edits: list[tuple[int, str]]  # of each clip: before which step what is moved
    step: int = 1

    def pin_memory(self) -> "Rollout":  # which a loader calls
        return self.each(Tensor.pin_memory)

    def each(self, function: Callable[[Tensor], Tensor]) -> "Rollout":
        """With the tensors that `function` makes of these: all but what editing needs, which the CPU does."""
        names = ("latents", "images", "weight", "hints")
        return replace(self, **{name: function(getattr(self, name)) for name in names})


def new_rollout(
    rng, pool: dict, latents: np.ndarray, inverted: dict, clips: int, frames: int, close: bool
) -> Rollout:
    """A rollout of identities whose first frame is inverted, see `invert_pool`.

    All frames start from its noise, as in the method, and will be edited as in the method: most clips' bodies
    around a fifth of the way, others' face and hands at the start.
    """
    identities = rng.integers(len(inverted["ways"]), size=clips)
    others = [1 + rng.permutation(POSES - 1)[: frames - 1] for _ in range(clips)]
    order = np.array([[0, *each] for each in others])
    z = latents[identities[:, None], order]
    mask = pool["masks"][identities[:, None], order].astype(np.float32)
    keypoints = pool["poses"][identities[:, None], order]
    ways, found = (inverted[name][identities].astype(np.float32) for name in ("ways", "found"))
    height, width = pool["frames"].shape[2:4]
    within = FOUND_WITHIN * max(height, width) / SIZE
    poses = [  # the references' as they were inverted with
        [pose_from(reference), *as_found(rng, each[1:], height, width, within)]
        for reference, each in zip(found, keypoints)
    ]
    hints = draw_poses(poses, height, width)
    weight = what_counts(mask, keypoints, height, width)
    starts = ways[:, -1:].repeat(frames, axis=1)
    if close:
        corners = close_ups(rng, keypoints, height, width)
        z, weight, starts = (cut(each, corners) for each in (z, weight, starts))
        hints, ways = cut(hints, corners, 1), cut(ways[:, None], corners[:, :1])[:, 0]
        size = np.array((height, width)) / CLOSE
        poses = [
            [place_pose(pose, *size[::-1], *-corner[::-1] / CLOSE) for pose, corner in zip(*clip)]
            for clip in zip(poses, corners)
        ]
    edits = [(0, ""), (1, "face,hands"), *((step, "body") for step in (2, 3, 3, 3, 4, 4))]
    return Rollout(
        latents=torch.from_numpy(starts).flatten(0, 1),
        images=torch.from_numpy(z).flatten(0, 1),
        weight=torch.from_numpy(weight / weight.mean()).flatten(0, 1),
        hints=torch.from_numpy(hints).flatten(0, 1) / 255,
        prompts=[prompt_from(rng, pool["captions"][i][0]) for i in identities],
        ways=ways,
        poses=poses,
        edits=[edits[rng.integers(len(edits))] for _ in identities],
    )


def edit_clip(task: tuple[np.ndarray, np.ndarray, list[Pose], str]) -> np.ndarray:
    """A clip's latents (frames, 8, h, w) with parts moved to where its poses have them.

    task: its latents; the reference's (8, h, w), as noisy; the poses, the reference's first; the parts to move.
    """
    clip, reference, poses, parts = task
    latents = torch.from_numpy(clip)
    edit_latents(latents[1:], torch.from_numpy(reference), poses[1:], poses[0], parts)
    return latents.numpy()


def rollout_step(
    rollout: Rollout,
    predict: Callable[..., Tensor],
    criticise: Callable[..., Tensor] | None = None,
    spread: Callable = map,
) -> Tensor:
    """Takes one step of sampling, and returns how far from its images the step leads.

    What a network sees in `training_batch` is true frames with noise, and it learns to trust what they show. What
    it sees in sampling is what it made of the steps before, and what editing has moved: from there, too, it has to
    find the way to the true frames (as in Ross et al., 2011, "A Reduction of Imitation Learning").

    predict(latents, timesteps (clips,), prompts, hints) -> the noise (F, 8, h, w). From CRITICAL on, what
    `criticise` says of the images that the step leads to is added, see `Critic`. Clips are edited by `spread`, a
    `map` that may do several at a time.
    """
    clips = rollout.latents.unflatten(0, (len(rollout.poses), -1))
    edited = [clip for clip, (step, _) in enumerate(rollout.edits) if step == rollout.step]
    if edited:
        parts = (rollout.edits[clip][1] for clip in edited)
        references = rollout.ways[edited, ROLLOUT_STEPS - rollout.step + 1]
        poses = (rollout.poses[clip] for clip in edited)
        tasks = zip(clips[edited].cpu().numpy(), references, poses, parts)
        clips[edited] = torch.from_numpy(np.stack(list(spread(edit_clip, tasks)))).to(clips)
    timestep = ddim_timesteps(ROLLOUT_STEPS)[rollout.step - 1]
    timesteps = torch.full((len(rollout.poses),), timestep)
    noise = predict(rollout.latents, timesteps, rollout.prompts, rollout.hints)
    latents, images, weight = rollout.latents, rollout.images, rollout.weight
    a = alpha_cumprod(timestep)
    guess = (latents - math.sqrt(1 - a) * noise) / math.sqrt(a)
    next_timestep = timestep - TRAIN_STEPS // ROLLOUT_STEPS
    rollout.latents = ddim_step(latents, noise.detach(), timestep, next_timestep)
    rollout.step += 1
    # Little is kept of the images that the first steps see.
    loss = min(1, 8 * a / (1 - a)) * (weight * (guess - images).square()).mean()
    if criticise is None or timestep > CRITICAL:
        return loss
    return loss + criticise(loss, guess, images, weight, rollout.hints)


class Critic(nn.Module):
    """Tells true latents from those that the networks make, patch by patch, for the pose they are asked to show.

    Where a finger or a lock of hair may be here or a pixel further, the least squared error is a smear: half of
    each. A smear is easily told from anything true, so who has to convince a critic draws one or the other
    (Goodfellow et al., 2014; of patches as Isola et al., 2017). It looks at 9 latent pixels, or 36 of the image,
    at a time; its loss is the hinge, its layers' largest gain 1 (Miyato et al., 2018).
    """

    def __init__(self, share: float):
        super().__init__()
        self.share = share
        widths = (8 + 3 * 4**2, 48, 64, 96, 96)
        layers = []
        for before, after in pairwise(widths):
            layers += [spectral_norm(nn.Conv2d(before, after, 3, padding=1)), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, spectral_norm(nn.Conv2d(widths[-1], 1, 1)))
        self.updates = 0
        self.to(DEVICE, memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3, betas=(0.5, 0.99))

    def get_extra_state(self) -> dict:
        return {"optimizer": self.optimizer.state_dict(), "updates": self.updates}

    def set_extra_state(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates = state["updates"]

    def forward(self, latents: Tensor, hints: Tensor) -> Tensor:
        """Latents (F, 8, h, w) and control images (F, 3, 4 h, 4 w) to (F, 1, h, w): the higher the truer."""
        with in_bfloat16():
            return self.layers(torch.cat([latents, F.pixel_unshuffle(hints, 4)], 1)).float()

    def learn(self, guess: Tensor, images: Tensor, weight: Tensor, hints: Tensor) -> None:
        """Two updates on the networks' guess and on the truth."""
        for _ in range(2):
            of_guess, of_truth = self(torch.cat([guess, images]), hints.repeat(2, 1, 1, 1)).chunk(2)
            loss = (weight * (F.relu(1 + of_guess) + F.relu(1 - of_truth))).mean()
            self.optimizer.zero_grad()
            loss.backward()
            forget_unless_finite(self.parameters())
            self.optimizer.step()
            self.updates += 1

    def criticise(self, loss: Tensor, guess: Tensor, *rest: Tensor) -> Tensor:
        """What is to be added to the networks' loss: 0 until it has learned enough to say anything.

        guess (F, 8, h, w), with its gradient; rest: images, weight and hints, see `Rollout`. Its pull is
        `share` of the loss's, however large either is (as in Esser et al., 2021, "Taming Transformers").
        """
        images, weight, hints = rest
        self.learn(guess.detach(), images, weight, hints)
        if self.updates <= CRITIC_LEARNS:
            return torch.zeros_like(loss)
        self.requires_grad_(False)
        judged = -(weight * self(guess, hints)).mean()
        self.requires_grad_(True)
        pulls = [torch.autograd.grad(each, guess, retain_graph=True)[0].norm() for each in (loss, judged)]
        return self.share * pulls[0] / (pulls[1] + 1e-12) * judged


def words_batch(rng, pool: dict, latents: np.ndarray, pairs: int) -> dict:
    """Single noisy frames in pairs. Both have the *same* noisy latents; only their prompts differ.

    So the difference between the two predictions is what the words did, and it should be the difference of the
    two images: in the hair if the words are of hair, and nothing elsewhere. All that the network cannot know
    of an image in so much noise, which hides what words do in the usual loss, is the same in both.

    The images are of a puppet and its twin, and the noise remembers one of them, or something between, or
    beyond, as guidance overshoots. In half of the pairs each prompt tells the colour of its own image. In the
    others one prompt is empty, as guidance compares, which means the image that the noise remembers; the other
    tells either colour, and so perhaps nothing new.
    """
    captions = pool["captions"]
    identities = rng.choice([i for i, (_, told, _) in enumerate(captions) if told], pairs)
    images = latents[identities][:, (0, TWIN)]  # (pairs, 2, 8, h, w)
    prompts = []
    for i in identities:
        words, told, twins = captions[i]
        prompt = prompt_from(rng, words, told)
        prompts.append([prompt, prompt.replace(told, twins)])
    way = rng.uniform(-0.5, 1.5, pairs).astype(np.float32)  # from the puppet to its twin
    remembered = images[:, 0] + way[:, None, None, None] * (images[:, 1] - images[:, 0])
    for pair in np.flatnonzero(rng.random(pairs) < 0.5):
        told = rng.integers(2)
        images[pair] = images[pair, [int(way[pair] > 0.5), told]]
        prompts[pair] = ["", prompts[pair][told]]

    timestep = rng.integers(600, 1000, size=pairs)  # where colours are still open
    a = ALPHAS_CUMPROD.numpy()[timestep][:, None, None, None]
    noise = rng.standard_normal(remembered.shape, np.float32)
    noisy = np.sqrt(a) * remembered + np.sqrt(1 - a) * noise
    height, width = pool["frames"].shape[2:4]
    hints = np.stack([draw_pose(pose_from(pool["poses"][i, 0]), height, width) for i in identities])
    return {
        "latents": torch.from_numpy(noisy.astype(np.float32)).repeat_interleave(2, 0),
        "images": torch.from_numpy(images).flatten(0, 1),
        "hints": image_tensor(hints).repeat_interleave(2, 0),
        "timestep": torch.from_numpy(timestep).repeat_interleave(2),
        "prompts": [prompt for pair in prompts for prompt in pair],
    }


def words_loss(batch: dict, predicted: Tensor) -> Tensor:
    """The error of the images that predictions for a `words_batch` imply, and that of the pairs' differences.

    The second, what words did, matters more: next to it the first, most of which no network can know in so
    much noise, gets half the weight or less.
    """
    a = ALPHAS_CUMPROD.to(predicted.device)[batch["timestep"]][:, None, None, None]
    # The error of the predicted images; bounded, since next to nothing is left of them at the end.
    scale = ((1 - a) / a).sqrt().clamp(max=8)
    noise = (batch["latents"] - a.sqrt() * batch["images"]) / (1 - a).sqrt()
    error = scale * (predicted.float() - noise)
    of_difference = (error[::2] - error[1::2]).square().mean((1, 2, 3))
    # As a share of what there is to change, or hair, which is small, would count for little next to a shirt.
    there_is = (batch["images"][::2] - batch["images"][1::2]).square().mean((1, 2, 3)) + 0.05
    return (of_difference / there_is).mean() / 8 + error.square().mean() / 16


@torch.no_grad()
def heed_single_words(networks: nn.ModuleDict) -> None:
    """Attention to the prompt starts sharp: as torch would have it, it averages over all 24 tokens, and the one
    that tells a colour is too faint to learn from. Values are six times as strong and read a sixth as much, so
    that only their gradients change: what reads them learns faster."""
    for name, module in networks.named_modules():
        if name.endswith("attn2"):
            for layer, factor in (("to_q", 3), ("to_k", 3), ("to_v", 6), ("to_out.0", 1 / 6)):
                module.get_submodule(layer).weight.mul_(factor)


class Networks(nn.ModuleDict):
    """UNet, ControlNet and text encoder: `networks(latents, timestep, tokens, hints)` -> the noise (F, 8, h, w).

    latents (F, 8, h, w), timestep (clips,), tokens (clips, T), hints (F, 3, 4 h, 4 w).
    """

    def forward(self, latents: Tensor, timestep: Tensor, tokens: Tensor, hints: Tensor) -> Tensor:
        context = self["text_encoder"](tokens)
        control = self["controlnet"](latents, timestep, context, hints)
        return self["unet"](latents, timestep, context, control)


def without_time(networks: Networks) -> Networks:
    """Takes out the temporal layers, which loading has put in."""
    for module in networks.modules():
        if hasattr(module, "attn_temp"):
            del module.attn_temp, module.conv_temp
    return networks


def new_networks(tokenizer: Tokenizer) -> Networks:
    text = TextEncoder(TextConfig(**{**TEXT.__dict__, "vocab_size": len(tokenizer.vocab)}))
    unet, controlnet = UNet(UNET), ControlNet(UNET, HINT_WIDTHS)
    networks = Networks({"unet": unet, "controlnet": controlnet, "text_encoder": text})
    without_time(networks)
    start_residuals_at_zero(networks)
    heed_single_words(networks)
    return networks.to(DEVICE, memory_format=torch.channels_last)


def invert_pool(
    networks: Networks,
    pool: dict,
    latents: np.ndarray,
    tokenizer: Tokenizer,
    work: Path,
    plan: Round,
) -> dict[str, np.ndarray]:
    """The first frames of the plan's first identities, inverted by the networks as the round finds them.

    "ways": (identities, ROLLOUT_STEPS + 1, 8, h, w), see `posecrafter.invert`; "found": the keypoints
    (identities, 130, 3) that they were inverted with. Nothing where the plan asks for none.
    """
    path = work / "inverted.npz"
    if plan.inverted and not path.exists():
        model = copy.deepcopy(networks).to(torch.bfloat16)
        height, width = pool["frames"].shape[2:4]
        within = FOUND_WITHIN * max(height, width) / SIZE
        ways, poses = [], []
        with torch.inference_mode(), slices(Slicing(Slicing.numbers * BATCH)):
            context = model["text_encoder"](tokenizer("a person")[None].to(DEVICE))
            model = SimpleNamespace(unet=model["unet"], controlnet=model["controlnet"])
            identities, at_once = range(plan.inverted), 16 * BATCH
            for start in trange(0, plan.inverted, at_once, desc="inverting", mininterval=10):
                some = identities[start : start + at_once]
                found = [
                    as_found(np.random.default_rng((13, i)), pool["poses"][i, :1], height, width, within)
                    for i in some
                ]
                hints = torch.from_numpy(draw_poses(found, height, width)).flatten(0, 1) / 255
                # Each is a clip of one frame.
                way = invert(
                    model,
                    torch.from_numpy(latents[some.start : some.stop, 0]).to(DEVICE),
                    hints,
                    context.repeat(len(some), 1, 1),
                    ROLLOUT_STEPS,
                )
                ways.append(torch.stack(way, dim=1).half().cpu().numpy())
                poses += [np.concatenate(list(vars(pose).values())) for (pose,) in found]
        with replacing(path) as unfinished:
            np.savez(unfinished, ways=np.concatenate(ways), found=np.stack(poses))
    return dict(np.load(path)) if plan.inverted else {}


def lesson(step: int, plan: Round, twins: list[bool]) -> tuple[int, bool]:
    """Which pool a step learns from, and whether it learns words there.

    twins: which of the pools so far have any; the last is the plan's own.
    """
    words_before = step // plan.words_every if plan.words_every else 0
    if plan.words_every and step % plan.words_every == plan.words_every - 1:
        teaching = np.flatnonzero(twins)
        return int(teaching[-1 - words_before % len(teaching)]), True
    last = len(twins) - 1
    turns, turn = divmod(step - words_before, plan.older_every)
    if last and turn == plan.older_every - 1:
        return turns % last, False
    return last, False


def rollout_of(step: int, plan: Round, twins: list[bool]) -> int | None:
    """Which of the rollouts under way a step goes on with, None for a step that learns otherwise."""
    rng = np.random.default_rng((2, step))
    which, of_words = lesson(step, plan, twins)
    own = which == len(twins) - 1 and not of_words
    return int(rng.integers(ROLLOUTS)) if own and rng.random() < plan.rollouts else None


def beginnings(steps: range, plan: Round, twins: list[bool]) -> set[int]:
    """Those of the steps at which a rollout begins. Its last step could change next to nothing: it has none."""
    begin, left = set(), [0] * ROLLOUTS
    for step in steps:
        rollout = rollout_of(step, plan, twins)
        if rollout is not None:
            if not left[rollout]:
                begin.add(step)
                left[rollout] = ROLLOUT_STEPS - 1
            left[rollout] -= 1
    return begin


def clips_of(close: bool, pool: dict) -> int:
    """How many clips a batch has: about as many pixels as 6 of SIZE, times BATCH."""
    pixels = CLOSE**2 if close else math.prod(pool["frames"].shape[2:4])
    return max(1, round(BATCH * 6 * SIZE**2 / pixels))


@dataclass
class Lessons(torch.utils.data.Dataset):
    """What each step learns from, as far as it can be made ahead: a batch, the rollout that begins there, or None
    for a step that goes on with one."""

    pools: list[tuple[dict, np.ndarray]]
    inverted: dict[str, np.ndarray]
    plan: Round
    frames: int
    begin: set[int]  # see `beginnings`

    def __getitem__(self, step: int) -> dict | Rollout | None:
        plan, rng = self.plan, np.random.default_rng((2, step, 1))
        twins = with_twins(self.pools)
        which, of_words = lesson(step, plan, twins)
        pool, latents = self.pools[which]
        close = which == len(self.pools) - 1 and not of_words and rng.random() < plan.close_ups
        clips, frames = clips_of(close, pool), self.frames
        if of_words:
            return words_batch(rng, pool, latents, pairs=clips * frames // 2)
        if rollout_of(step, plan, twins) is None:
            # A round that goes on from another has learned to look at frame 0 already.
            first = 0.0 if len(self.pools) == 1 else 0.2
            progress = first + (1 - first) * step / plan.steps
            return training_batch(rng, pool, latents, progress, clips, frames, close)
        if step in self.begin:
            return new_rollout(rng, pool, latents, self.inverted, clips, frames, close)


def with_twins(pools: list[tuple[dict, np.ndarray]]) -> list[bool]:
    """Which of the pools have twins, see `TWIN`."""
    return [pool["frames"].shape[1] > TWIN for pool, _ in pools]


def reads_words(name: str) -> bool:
    return "attn2" in name or "text_encoder" in name


def pack_weights(networks: nn.Module) -> nn.ParameterDict:
    """All weights in two vectors, of what reads words and of the rest: a handful of operations updates them all,
    where a graphics card would take longer to be told of hundreds than to do them."""
    vectors = {"reads_words": [], "rest": []}
    for name, weight in networks.named_parameters():
        # Convolutions' with the channels last, as convolutions like them.
        vector = weight.detach().permute(0, 2, 3, 1) if weight.ndim == 4 else weight.detach()
        vectors["reads_words" if reads_words(name) else "rest"].append(vector.flatten())
    return nn.ParameterDict({name: torch.cat(each) for name, each in vectors.items()})


def unpack_weights(networks: nn.Module, of_words: Tensor, rest: Tensor) -> dict[str, Tensor]:
    """Views of the two vectors by the weights' names, see `pack_weights`."""
    views = {}
    for vector, words in ((of_words, True), (rest, False)):
        some = {name: w for name, w in networks.named_parameters() if reads_words(name) == words}
        pieces = vector.split([weight.numel() for weight in some.values()])
        for (name, weight), piece in zip(some.items(), pieces):
            if weight.ndim == 4:
                out, into, height, width = weight.shape
                views[name] = piece.view(out, height, width, into).permute(0, 3, 1, 2)
            else:
                views[name] = piece.view_as(weight)
    return views


def record(
    compute: Callable[..., Tensor],
    weights: nn.ParameterDict,
    networks: Networks,
    pools: list[tuple[dict, np.ndarray]],
    plan: Round,
    frames: int,
) -> dict[tuple[torch.Size, int], Callable[..., Tensor]]:
    """`compute` with its gradient, recorded once for each shape of latents and number of clips that batches have.

    Small networks are thousands of small operations, which a graphics card does faster than it is told of them;
    a recording is told of at once ("CUDA graph").
    """
    channels, length = networks["unet"].config.in_channels, networks["text_encoder"].config.length
    recorded = {}
    kinds = [(pool, False, False) for pool, _ in pools]
    if plan.words_every:
        kinds += [(pool, False, True) for (pool, _), twins in zip(pools, with_twins(pools)) if twins]
    if plan.close_ups:
        kinds += [(pools[-1][0], True, False)]
    for pool, close, words in kinds:
        height, width = (CLOSE, CLOSE) if close else pool["frames"].shape[2:4]
        clips = clips_of(close, pool)
        clips, images = [clips * frames // 2 * 2] * 2 if words else (clips, clips * frames)
        shape = torch.Size((images, channels, height // 4, width // 4))
        if (shape, clips) in recorded:
            continue
        inputs = (
            torch.zeros(shape, device=DEVICE),
            torch.zeros(clips, dtype=torch.long, device=DEVICE),
            torch.zeros(clips, length, dtype=torch.long, device=DEVICE),
            torch.zeros(images, 3, height, width, device=DEVICE),
        )
        sample = weights["reads_words"], weights["rest"], *inputs
        recorded[shape, clips] = torch.cuda.make_graphed_callables(compute, sample)
    return recorded


def train_networks(
    networks: Networks,
    pools: list[tuple[dict, np.ndarray]],
    tokenizer: Tokenizer,
    work: Path,
    plan: Round,
    frames: int = 3,
) -> None:
    """Trains on pools and their latents: on the last, at times on those before it in turn, and on words where
    there are twins, all as the plan says.
    """
    twins = with_twins(pools)
    inverted = invert_pool(networks, *pools[-1], tokenizer, work, plan)
    under_way: list[Rollout | None] = [None] * ROLLOUTS
    critic = Critic(plan.critic) if plan.critic else None
    weights, tokens_of, ahead = pack_weights(networks), cache(tokenizer), None
    fork = multiprocessing.get_context("fork") if HELPERS else None

    def noise_in(of_words: Tensor, rest: Tensor, *inputs: Tensor) -> Tensor:
        """The noise, with float32 weights and inputs cast to bfloat16; inputs: see `Networks`."""
        views = unpack_weights(networks, of_words.bfloat16(), rest.bfloat16())
        inputs = (x.bfloat16() if x.is_floating_point() else x for x in inputs)
        return functional_call(networks, views, tuple(inputs)).float()

    on_card = DEVICE.type == "cuda"
    recorded = record(noise_in, weights, networks, pools, plan, frames) if on_card else {}

    def predict(latents: Tensor, timestep: Tensor, prompts: list[str], hints: Tensor) -> Tensor:
        tokens = torch.stack([tokens_of(prompt) for prompt in prompts])
        inputs = [to_device(x) for x in (latents, timestep, tokens, hints)]
        compute = recorded[latents.shape, len(timestep)] if on_card else noise_in
        return compute(weights["reads_words"], weights["rest"], *inputs)

    def make_ahead(steps: range) -> Iterator:
        lessons = Lessons(pools, inverted, plan, frames, beginnings(steps, plan, twins))
        return iter(
            torch.utils.data.DataLoader(
                lessons,
                batch_size=None,
                sampler=steps,
                num_workers=HELPERS,
                pin_memory=on_card,
                multiprocessing_context=fork,
            )
        )

    def loss_at(step: int) -> Tensor:
        nonlocal ahead
        ahead = ahead or make_ahead(range(step, plan.steps))
        made = next(ahead)
        which = rollout_of(step, plan, twins)
        if which is not None:
            if made:
                under_way[which] = made.each(to_device)
            return rollout_step(under_way[which], predict, critic and critic.criticise, spread)
        predicted = predict(*(made[name] for name in ("latents", "timestep", "prompts", "hints")))
        batch = {name: to_device(x) for name, x in made.items() if name != "prompts"}
        if "images" in batch:
            return words_loss(batch, predicted)
        return (batch["weight"] * (predicted - batch["noise"]) ** 2).mean()

    with fork.Pool(HELPERS, torch.set_num_threads, (1,)) if fork else nullcontext() as editors:
        spread = editors.imap if editors else map
        optimise("networks", weights, loss_at, plan.steps, plan.lr, 0.998, work, critic)
    views = unpack_weights(networks, weights["reads_words"].detach(), weights["rest"].detach())
    networks.load_state_dict(views)


# ---- All stages -------------------------------------------------------------------------------------


def encoded_pools(
    vae: VAE, pools: list[dict], scale: float | None, works: list[Path]
) -> tuple[list[tuple[dict, np.ndarray]], float]:
    """Pools with their latents, scaled to unit variance, and the scale: without one, what the first pool needs."""
    latents = [encode_pool(vae, pool, work) for pool, work in zip(pools, works)]
    scale = scale or float(1 / latents[0].std())
    for encoded in latents:
        encoded *= scale
    return list(zip(pools, latents)), scale


def from_nothing(work: Path) -> Model:
    """All stages."""
    works = [work / f"round{number}" for number in range(1, len(ROUNDS) + 1)]
    pools = [render_pool(work, plan) for work, plan in zip(works, ROUNDS)]
    torch.manual_seed(1)
    vae = new_vae()
    train_vae(vae, pools[:-1], work)
    known, scale = encoded_pools(vae, pools, None, works)
    captions = (words for words, *_ in pools[0]["captions"])
    tokenizer = Tokenizer(*learn_merges(captions, 200), length=TEXT.length)
    torch.manual_seed(2)
    networks = new_networks(tokenizer)
    for number, (plan, of_round) in enumerate(zip(ROUNDS, works), start=1):
        train_networks(networks, known[:number], tokenizer, of_round, plan)
    sharpen_vae(vae, pools, scale, work)
    vae.config = replace(vae.config, scale=scale)
    return finished(networks, vae, tokenizer)


def gone_on(base: str, work: Path) -> Model:
    """The last round alone, of a model that has been through those before it; of their pools it repeats the first
    few puppets. Raises ValueError for a folder with the work of another model, or of none."""
    note, weights = work / "base.txt", model_path(base) / "unet" / "diffusion_pytorch_model.safetensors"
    name = hashlib.sha256(weights.read_bytes()).hexdigest()
    if any(work.rglob("*.npy")) and not (note.exists() and note.read_text() == name):
        raise ValueError(f"{work}: has another model's work in it; give a --work of its own")
    note.write_text(name)
    plans = [replace(plan, identities=plan.identities[:200]) for plan in ROUNDS[:-1]] + [ROUNDS[-1]]
    works = [work / f"round{number}" for number in range(1, len(ROUNDS) + 1)]
    pools = [render_pool(work, plan) for work, plan in zip(works, plans)]
    torch.manual_seed(2)
    model = load_model(base)
    vae = model.vae.to(DEVICE, torch.float32, memory_format=torch.channels_last)
    known, _ = encoded_pools(vae, pools, vae.config.scale, works)
    names = ("unet", "controlnet", "text_encoder")
    networks = without_time(Networks({name: getattr(model, name) for name in names}))
    networks.to(DEVICE, torch.float32, memory_format=torch.channels_last).requires_grad_(True)
    train_networks(networks, known, model.tokenizer, works[-1], ROUNDS[-1])
    return finished(networks, vae, model.tokenizer)


def finished(networks: Networks, vae: VAE, tokenizer: Tokenizer) -> Model:
    """With what fine-tuning and sampling should know of it."""
    settings = {"learning_rate": LEARNING_RATE, "guidance_until": GUIDANCE_UNTIL}
    return Model(**networks, vae=vae, tokenizer=tokenizer, size=LAST_SIZE, **settings)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--work", type=Path, default=Path("runs/pretrain"), help="pool, checkpoints and curves"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo/weights"), help="where the finished model goes"
    )
    parser.add_argument(
        "--base", metavar="MODEL", help="a finished model, for which to do the last round once more"
    )
    args = parser.parse_args()
    if args.base and {args.work, args.out} & {parser.get_default(name) for name in ("work", "out")}:
        parser.error("--base needs a --work and an --out of its own: pools and weights would be overwritten")
    if not args.base and (args.work / "base.txt").exists():
        parser.error(f"--work {args.work}: holds the work of a run with --base; give another")

    keep_freed_memory()
    for number in range(1, len(ROUNDS) + 1):
        (args.work / f"round{number}").mkdir(parents=True, exist_ok=True)
    model = gone_on(args.base, args.work) if args.base else from_nothing(args.work)
    save_model(model, args.out)
    print(
        f"{args.out}: {sum(f.stat().st_size for f in args.out.rglob('*.safetensors')) / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    try:
        main()
    except (ArithmeticError, OSError, ValueError) as error:
        print(f"pretrain.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("pretrain.py: stopped; the same command goes on from its last checkpoint", file=sys.stderr)
        sys.exit(130)
