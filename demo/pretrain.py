"""Makes a base model for the demo from nothing: `python demo/pretrain.py`.

Stable Diffusion has seen the world; the demo model has seen paper puppets. It is the same code at small width.

1. Render a pool of puppets in the demo's frames, some in disguise, with keypoints and captions (`pool.py`).
2. Train the VAE, and last its decoder alone, on mouths and fingers. Then encode the pool.
3. Train UNet, ControlNet and text encoder on short clips by the denoising loss.
4. Train them on their own mistakes, along the steps that sampling takes.

Stage 3 has to teach what Stable Diffusion brings along: a person's appearance can be read off frame 0 through
key-frame attention, whatever the pose. `training_batch` says how. The temporal layers are absent, as in a public
2-D checkpoint; loading a model adds them. A run that is interrupted goes on from its last checkpoint.

The shipped weights in demo/weights went a longer way, told in docs/LOG.md; most settings come from its last part.
demo/curves/README.md lists what this script no longer does. Nobody has run it whole: that takes about a day on
two CPU cores, by the time of the longer way's steps.
"""

import argparse
import copy
import csv
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator, default_rng
from torch import Tensor, nn
from tqdm import trange

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from beyond.body import body_parts
from checkpoint import Model
from clip import TextConfig, TextEncoder, Tokenizer
from command import keep_freed_memory
from controlnet import ControlNet
from demo.pool import (
    POSES,
    TWIN,
    as_found,
    details,
    latent_pixels,
    near,
    pose_from,
    render_pool,
    stacked,
    weighted_frame,
)
from demo.save import save_model
from demo.vocabulary import learn_merges
from device import compute_device
from posecrafter import (
    ALPHAS_CUMPROD,
    TRAIN_STEPS,
    Parts,
    alpha_cumprod,
    ddim_step,
    ddim_timesteps,
    edit_latents,
    image_tensor,
    invert,
)
from poses.parts import face_and_hands
from poses.pose import Pose, draw_pose
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig
from video import replacing

HEIGHT, WIDTH = 192, 256  # pixels: the demo's frames, which show puppets from the knees up
IDENTITIES = range(10_000, 15_000)  # seeds of the pool's puppets; those below are for the demo
VAE_CONFIG = VAEConfig(8, widths=(24, 48, 96), layers_per_block=1, norm_groups=6, scale=1.0)
VAE_STEPS = (3000, 5000, 2500)  # on crops, on whole frames, of the decoder alone
UNET = UNetConfig(8, 8, (64, 128, 160, 160), layers_per_block=1, context_dim=64, heads=2, norm_groups=8)
HINT_WIDTHS = (16, 32, 96)
TEXT = TextConfig(vocab_size=0, width=64, heads=2, layers=2, mlp_width=256, length=24)
DENOISING_STEPS, ROLLOUT_STEPS = 14_000, 6000  # of training
WORDS_EVERY = 5  # one step in so many is on pairs of prompts, see `words_batch`
CLIPS, FRAMES = 2, 3  # per batch, and per clip
SAMPLING_STEPS = 10  # of a rollout, as many as the demo takes
ROLLOUTS = 8  # under way at a time, so that steps that follow each other are not of the same clips
INVERTED = 1000  # puppets whose first frames are inverted to start rollouts


# ---- Shared by all trainings ------------------------------------------------------------------------


def start_residuals_at_zero(model: nn.Module) -> None:
    """Every residual branch starts as nothing, so that a deep network trains fast from its first step."""
    for module in model.modules():
        for name in ("conv2", "proj_out"):
            if hasattr(module, name):
                nn.init.zeros_(getattr(module, name).weight)
                nn.init.zeros_(getattr(module, name).bias)


def device_of(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def in_bfloat16(device: torch.device) -> torch.autocast:
    """Networks compute in bfloat16 in it; their weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16)


def optimise(
    name: str,
    networks: nn.Module,
    loss_at: Callable[[int], Tensor],
    steps: int,
    peak_lr: float,
    ema_decay: float,
    work: Path,
    saved_every: float = 300,
) -> None:
    """Trains `networks` with AdamW on `loss_at(step)`, and leaves them with averaged weights.

    One cosine from `peak_lr` to 1 % of it after a short warm-up, gradients clipped at 1. A checkpoint, NAME.pt, is
    written every `saved_every` seconds. Where a batch is a function of its step, an interrupted run goes on as if
    it had not stopped. A finished run only loads its weights. The curve goes to NAME.csv.

    Steps whose gradients are not finite are skipped. Raises ArithmeticError if 50 in a row are.
    """
    checkpoint, log = work / f"{name}.pt", work / f"{name}.csv"
    parameters, by_boost = list(networks.parameters()), {1: [], 4: []}
    for key, weight in networks.named_parameters():
        # Words rarely decide anything, so what reads them learns slowly: it takes larger steps.
        by_boost[4 if "attn2" in key or "text_encoder" in key else 1].append(weight)
    groups = [{"params": some, "boost": boost} for boost, some in by_boost.items() if some]
    optimizer = torch.optim.AdamW(groups, peak_lr, (0.9, 0.99), weight_decay=0.01, fused=True)
    average = [p.detach().clone() for p in parameters]
    start, rows, began = 0, [], time.monotonic()
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        networks.load_state_dict(state["networks"])
        optimizer.load_state_dict(state["optimizer"])
        torch._foreach_copy_(average, state["average"])
        start, rows = state["step"], state["rows"]
        began -= rows[-1][2] if rows else 0

    losses, skipped, saved = [], 0, time.monotonic()
    bar = trange(start, steps, initial=start, total=steps, desc=name, mininterval=10)
    for step in bar:
        cosine = 0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = group["boost"] * peak_lr * min(1, (step + 1) / 200) * cosine
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        if nn.utils.clip_grad_norm_(parameters, 1.0).isfinite():
            optimizer.step()
            losses.append(loss.item())
            skipped = 0
        elif (skipped := skipped + 1) == 50:
            raise ArithmeticError(f"{name}: no gradient of 50 steps up to {step + 1} is finite")
        # The average's memory grows with the run: early weights are not worth remembering.
        torch._foreach_lerp_(average, parameters, 1 - min(ema_decay, (1 + step) / (10 + step)))
        if (step + 1) % 50 == 0 and losses:
            seconds = int(time.monotonic() - began)
            rows.append([step + 1, round(sum(losses) / len(losses), 5), seconds])
            bar.set_postfix(loss=f"{rows[-1][1]:.4f}")
            with log.open("w", newline="") as file:
                csv.writer(file).writerows([("step", "loss", "seconds"), *rows])
            losses = []
        if time.monotonic() - saved > saved_every or step + 1 == steps:
            state = {"networks": networks.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"average": average, "step": step + 1, "rows": rows}
            with replacing(checkpoint) as unfinished:
                torch.save(state, unfinished)
            saved = time.monotonic()
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)


# ---- 2. The VAE -------------------------------------------------------------------------------------


def moved(rng: Generator, maps: list[Tensor]) -> list[Tensor]:
    """Square maps (N, C, n, n) of the same scene, of any size, all turned, shifted and scaled alike."""
    angle, size = rng.uniform(-0.6, 0.6), math.exp(rng.uniform(-0.15, 0.15))
    cosine, sine = size * math.cos(angle), size * math.sin(angle)
    down, right = rng.uniform(-0.1, 0.1, 2)
    affine = torch.tensor([[cosine, -sine, right], [sine, cosine, down]], dtype=torch.float32)
    moved_maps = []
    for x in maps:
        grid = F.affine_grid(affine.expand(len(x), 2, 3).to(x), x.shape, align_corners=False)
        moved_maps.append(F.grid_sample(x, grid, padding_mode="border", align_corners=False))
    return moved_maps


def vae_loss(rng: Generator, vae: VAE, images: Tensor, weight: Tensor, move: bool) -> Tensor:
    """L1 + L2 + gradient loss of images (N, 3, H, W) in [-1, 1] with weights (N, 1, H, W), and a light pull of
    their latents to N(0, 1). With `move` the latents are turned, shifted and scaled between encoder and decoder,
    since that is what latent editing does to them."""
    targets = images
    with in_bfloat16(images.device):
        mean, log_variance = (x.float() for x in vae.encode(images))
        noise = torch.from_numpy(rng.standard_normal(mean.shape, np.float32)).to(images.device)
        latents = mean + noise * torch.exp(log_variance.clamp(-30, 10) / 2)
        if move:
            latents, targets, weight = moved(rng, [latents, images, weight])
        output = vae.decode(latents)
    difference = output.float() - targets
    edges = (weight[:, :, 1:] * difference.diff(dim=2).abs()).mean()
    edges = edges + (weight[..., 1:] * difference.diff(dim=3).abs()).mean()
    divergence = (mean**2 + log_variance.exp() - 1 - log_variance).mean() / 2
    return (weight * (difference.abs() + difference**2)).mean() + edges + 1e-4 * divergence


def train_vae(vae: VAE, pool: dict, work: Path) -> None:
    """First on crops around the person, many and cheap, then on whole frames, as it is used. Last the decoder
    alone learns to read mouths and fingers out of latents that stay, two in three batches on crops.

    Whole frames matter: a group norm over a crop has other statistics than over a frame, and without them colours
    come out wrong. Face and hands weigh most, or dark faces come out blank. One batch of crops in four is moved.
    """

    def loss_at(step: int, stage: int, of_face: float, of_hands: float) -> Tensor:
        rng = default_rng((1, stage, step))
        crop = 64 if stage == 0 or (stage == 2 and step % 3) else 0
        count = round(3 * HEIGHT * WIDTH / crop**2) if crop else 3  # about as many pixels
        some = [weighted_frame(rng, pool, of_face, of_hands, crop) for _ in range(count)]
        frames, weight = map(np.stack, zip(*some))
        images = (image_tensor(frames) * 2 - 1).to(device_of(vae))
        weight = torch.from_numpy(weight / weight.mean())[:, None].to(images)
        return vae_loss(rng, vae, images, weight, move=crop and step % 4 == 3)

    def train(name: str, networks: dict, stage: int, peak_lr: float, *weights: float) -> None:
        loss = partial(loss_at, stage=stage, of_face=weights[0], of_hands=weights[1])
        optimise(name, nn.ModuleDict(networks), loss, VAE_STEPS[stage], peak_lr, 0.995, work)

    start_residuals_at_zero(vae)
    train("vae_crops", {"vae": vae}, 0, 2e-3, 10, 10)
    train("vae_whole", {"vae": vae}, 1, 1.5e-3, 12, 20)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    decoder = {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}
    train("vae_decoder", decoder, 2, 8e-4, 15, 40)


@torch.inference_mode()
def encode_pool(vae: VAE, pool: dict, work: Path) -> np.ndarray:
    """The pool's latents (identities, POSES + 1, 8, H/4, W/4), float16, memory-mapped. Sets the VAE's scale so
    that they have about unit variance."""

    def encode(frames: np.ndarray) -> Tensor:
        images = (image_tensor(frames) * 2 - 1).to(device_of(vae))
        with in_bfloat16(images.device):
            return vae.encode(images)[0].float().cpu()

    path, frames = work / "latents.npy", pool["frames"]
    some = torch.cat([encode(row) for row in frames[:64]])
    vae.config = replace(vae.config, scale=1 / some.std().item())
    if not path.exists():
        shape = (*frames.shape[:2], *some.shape[1:])
        with replacing(path) as unfinished:
            latents = np.lib.format.open_memmap(unfinished, "w+", np.float16, shape)
            for i in trange(len(frames), desc="encoding", mininterval=10):
                latents[i] = (encode(frames[i]) * vae.config.scale).numpy()
            latents.flush()
    return np.load(path, mmap_mode="r")


# ---- 3. UNet, ControlNet and text encoder: the denoising loss ---------------------------------------


def prompt_from(rng: Generator, words: str, told: str = "") -> str:
    """At times nothing or just "a person", else with some or all of the attributes, in any order, so that each
    word is learned, and that a colour belongs to what follows it. The attribute `told` is always there."""
    person, *attributes = words.split(", ")
    if rng.random() < 0.15 and not told:
        return ""
    share = rng.choice((0.0, 0.6, 1.0), p=(0.3, 0.3, 0.4))
    some = [a for a in attributes if a == told or rng.random() < share]
    return ", ".join([person, *rng.permutation(some)])


def loss_weights(mask: np.ndarray, keypoints: np.ndarray, height: int, width: int) -> np.ndarray:
    """The loss's weights (clips, frames, 1, h, w): 1, 5 for the person and where it stood in frame 0, 12 for the
    head, 15 for the face in it, and 40 for hands, which are smaller, and eyes."""
    weight = 1 + 4 * np.maximum(mask, mask[:, :1])[:, :, None].astype(np.float32)
    for clip, frame in np.ndindex(*mask.shape[:2]):
        face, left, right = details(pose_from(keypoints[clip, frame]))
        parts = [(face, np.ptp(face[:, 1]) * height / 2, 12), (face, 2, 15), (face[36:48], 3, 40)]
        for part, margin, heavy in [*parts, (left, 2, 40), (right, 2, 40)]:
            weight[clip, frame, 0][latent_pixels(near(part, height, width, margin))] = heavy
    return weight


def take_clips(
    rng: Generator, pool: dict, latents: np.ndarray, rows: tuple, references: np.ndarray | None = None
) -> SimpleNamespace:
    """Clips of the pool, and what the networks are told of them.

    rows: which identities (clips, 1), and which of their frames (clips, FRAMES). references: keypoints
    (clips, 130, 3) with which first frames have been found; else they are found anew.
    """
    keypoints = pool["poses"][rows]
    height, width = pool["frames"].shape[2:4]
    poses = [as_found(rng, each, height, width) for each in keypoints]
    if references is not None:
        poses = [[pose_from(first), *rest] for first, (_, *rest) in zip(references, poses)]
    hints = np.stack([draw_pose(pose, height, width) for clip in poses for pose in clip])
    return SimpleNamespace(
        images=latents[rows].astype(np.float32),  # (clips, FRAMES, 8, h, w)
        weight=loss_weights(pool["masks"][rows], keypoints, height, width),
        hints=image_tensor(hints),  # (clips * FRAMES, 3, H, W)
        poses=poses,
        prompts=[prompt_from(rng, pool["captions"][i][0]) for i in rows[0][:, 0]],
    )


def flat(maps: np.ndarray) -> Tensor:
    """Maps (clips, frames, ...) as one batch (clips * frames, ...), float32."""
    return torch.from_numpy(maps.astype(np.float32)).flatten(0, 1)


def training_batch(
    rng: Generator, pool: dict, latents: np.ndarray, progress: float, clips: int = CLIPS
) -> dict:
    """Noisy clips of one identity each, and the noise to predict.

    Three things teach the network to read the appearance off frame 0:

    - Two in three clips share noise as the method's inverted pseudo video does: at the last timestep all
      frames are *equal* to frame 0. x = sqrt(a) z + sqrt(1 - a) noise shall be the same although the images
      z differ, so noise_i = noise_0 + sqrt(a / (1 - a)) (z_0 - z_i), with a of that last timestep.
      The pose alone then says where things go; or latent editing has moved face and hands, or the whole
      body, in a third of them each. The other clips have independent noise, as fine-tuning has.
    - In the first quarter of training (`progress` 0 to 0.27) frame 0 is often less noisy than its timestep
      says, so that there is something to look up.
    - The loss weighs the person, and most what is small in it, see `loss_weights`.
    """
    identities = rng.integers(len(latents), size=clips)
    order = np.stack([rng.permutation(POSES)[:FRAMES] for _ in range(clips)])
    taken = take_clips(rng, pool, latents, (identities[:, None], order))
    z, weight, alphas = taken.images, taken.weight, ALPHAS_CUMPROD.numpy()
    ratio = math.sqrt(alphas[-1] / (1 - alphas[-1]))
    noise = rng.standard_normal(z.shape, np.float32)
    for clip in np.flatnonzero(rng.random(clips) < 0.65):
        start = torch.from_numpy(noise[clip, 0] + ratio * z[clip, 0])
        starts = start.repeat(FRAMES, 1, 1, 1)
        if parts := (None, face_and_hands, body_parts)[rng.integers(3)]:
            edit_latents(starts[1:], start, taken.poses[clip][1:], taken.poses[clip][0], parts)
        noise[clip] = starts.numpy() - ratio * z[clip]

    timestep = rng.integers(TRAIN_STEPS, size=clips)
    alpha = np.repeat(alphas[timestep][:, None], FRAMES, 1)
    early = rng.random(clips) < max(0.0, 0.8 - 3 * progress)
    alpha[early, 0] = alphas[(timestep[early] * rng.random(early.sum())).astype(int)]
    alpha = alpha[:, :, None, None, None]
    weight[early, 0] = 0  # frame 0's own noise level is a lie there
    a = alphas[timestep][:, None, None, None, None]
    # The error of the *image*, not of the noise, where noise dominates; bounded at both ends (min-SNR).
    weight = weight * np.minimum(1 / a, 8) * np.minimum(1, 5 * (1 - a) / a)
    return {
        "latents": flat(np.sqrt(alpha) * z + np.sqrt(1 - alpha) * noise),
        "noise": flat(noise),
        "weight": flat(weight / weight.mean()),
        "hints": taken.hints,
        "timestep": torch.from_numpy(timestep),  # (clips,)
        "prompts": taken.prompts,
    }


def words_batch(rng: Generator, pool: dict, latents: np.ndarray, pairs: int) -> dict:
    """Single noisy frames in pairs. Both have the *same* noisy latents; only their prompts differ.

    So the difference between the two predictions is what the words did, and it should be the difference of the
    two images: in the hair if the words are of hair, and nothing elsewhere. What the network cannot know of an
    image in so much noise hides what words do in the usual loss; here it is the same in both.

    The images are of a puppet and its twin, and the noise remembers one of them, or something between, or
    beyond, as guidance overshoots. In half of the pairs each prompt tells the colour of its own image. In the
    others one prompt is empty, as guidance compares, which means the image that the noise remembers; the other
    tells either colour, and so perhaps nothing new.
    """
    captions = pool["captions"]
    identities = rng.choice([i for i, (_, told, _) in enumerate(captions) if told], pairs)
    images = latents[identities][:, (0, TWIN)].astype(np.float32)  # (pairs, 2, 8, h, w)
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

    timestep = rng.integers(600, TRAIN_STEPS, size=pairs)  # where colours are still open
    a = ALPHAS_CUMPROD.numpy()[timestep][:, None, None, None]
    noise = rng.standard_normal(remembered.shape, np.float32)
    noisy = torch.from_numpy(np.sqrt(a) * remembered + np.sqrt(1 - a) * noise)
    height, width = pool["frames"].shape[2:4]
    hints = np.stack([draw_pose(pose_from(pool["poses"][i, 0]), height, width) for i in identities])
    return {
        "latents": noisy.repeat_interleave(2, 0),
        "images": flat(images),
        "hints": image_tensor(hints).repeat_interleave(2, 0),
        "timestep": torch.from_numpy(timestep).repeat_interleave(2),
        "prompts": [prompt for pair in prompts for prompt in pair],
    }


def words_loss(batch: dict, predicted: Tensor) -> Tensor:
    """The error of the images that predictions for a `words_batch` imply, and that of the pairs' differences,
    which are what words did. The first gets half the weight or less: in so much noise no network can know most
    of an image."""
    latents, images = (batch[name].to(predicted.device) for name in ("latents", "images"))
    a = ALPHAS_CUMPROD[batch["timestep"]].to(predicted.device)[:, None, None, None]
    # The error of the predicted images; bounded, since next to nothing is left of them at the end.
    scale = ((1 - a) / a).sqrt().clamp(max=8)
    error = scale * (predicted - (latents - a.sqrt() * images) / (1 - a).sqrt())
    of_difference = (error[::2] - error[1::2]).square().mean((1, 2, 3))
    # As a share of what there is to change, or hair, which is small, would count for little next to a shirt.
    there_is = (images[::2] - images[1::2]).square().mean((1, 2, 3)) + 0.05
    return (of_difference / there_is).mean() / 8 + error.square().mean() / 16


class Networks(nn.ModuleDict):
    """UNet, ControlNet and text encoder: latents (F, 8, h, w), timestep (clips,), prompts (clips) and control
    images (F, 3, 4 h, 4 w) -> the noise (F, 8, h, w). Computes in bfloat16; the weights stay float32."""

    def __init__(self, networks: dict[str, nn.Module], tokenizer: Tokenizer):
        super().__init__(networks)
        self.tokens_of = cache(tokenizer)

    def forward(self, latents: Tensor, timestep: Tensor, prompts: list[str], hints: Tensor) -> Tensor:
        inputs = (latents, timestep, torch.stack([self.tokens_of(prompt) for prompt in prompts]), hints)
        latents, timestep, tokens, hints = (x.to(device_of(self)) for x in inputs)
        with in_bfloat16(latents.device):
            context = self["text_encoder"](tokens)
            control = self["controlnet"](latents, timestep, context, hints)
            return self["unet"](latents, timestep, context, control).float()


def new_networks(tokenizer: Tokenizer) -> Networks:
    """Fresh networks without temporal layers."""
    text = TextEncoder(replace(TEXT, vocab_size=len(tokenizer.vocab)))
    unet, controlnet = UNet(UNET), ControlNet(UNET, HINT_WIDTHS)
    parts = {"unet": unet, "controlnet": controlnet, "text_encoder": text}
    networks = Networks(parts, tokenizer)
    start_residuals_at_zero(networks)
    for name, module in networks.named_modules():
        if hasattr(module, "attn_temp"):
            del module.attn_temp, module.conv_temp
        # Attention to the prompt starts sharp: as torch would have it, it averages over all 24 tokens, and the one
        # that tells a colour is too faint to learn from. Values are six times as strong and read a sixth as much,
        # so that only their gradients change: what reads them learns faster.
        if name.endswith("attn2"):
            for layer, factor in (("to_q", 3), ("to_k", 3), ("to_v", 6), ("to_out.0", 1 / 6)):
                module.get_submodule(layer).weight.data.mul_(factor)
    return networks


# ---- 4. Their own mistakes --------------------------------------------------------------------------


@torch.inference_mode()
def invert_pool(networks: Networks, pool: dict, latents: np.ndarray, path: Path) -> dict[str, np.ndarray]:
    """The first frames of INVERTED puppets, inverted by the networks as they are; read from `path` if it exists.

    "ways": (puppets, SAMPLING_STEPS + 1, 8, h, w), from image to noise, see `posecrafter.invert`; "found": the
    keypoints (puppets, 130, 3) that they were inverted with.
    """
    if not path.exists():
        device, rng = device_of(networks), default_rng(13)
        height, width = pool["frames"].shape[2:4]
        model = SimpleNamespace(**copy.deepcopy(networks).to(torch.bfloat16))
        context = model.text_encoder(networks.tokens_of("a person")[None].to(device))
        ways, found = [], []
        for i in trange(min(INVERTED, len(latents)), desc="inverting", mininterval=10):
            (pose,) = as_found(rng, pool["poses"][i, :1], height, width)
            hint = image_tensor(draw_pose(pose, height, width)[None])
            image = torch.from_numpy(latents[i, :1].astype(np.float32)).to(device)
            way = invert(model, image, hint, context, SAMPLING_STEPS)
            ways.append(torch.cat(way).half().cpu().numpy())
            found.append(stacked(pose))
        with replacing(path) as unfinished:
            np.savez(unfinished, ways=np.stack(ways), found=np.stack(found))
    return dict(np.load(path))


@dataclass
class Rollout:
    """Clips of one identity each on their way from noise to images, as sampling goes it. F = clips * frames."""

    latents: Tensor  # (F, 8, h, w), as noisy as the next step's input
    images: Tensor  # (F, 8, h, w), where they shall end
    weight: Tensor  # (F, 1, h, w), see `loss_weights`
    hints: Tensor  # (F, 3, H, W)
    prompts: list[str]
    ways: np.ndarray  # (clips, SAMPLING_STEPS + 1, 8, h, w), of the references, from image to noise
    poses: list[list[Pose]]  # of each clip, the reference's first
    edits: list[tuple[int, Parts | None]]  # of each clip: before which step what is moved
    step: int = 1


def new_rollout(
    rng: Generator, pool: dict, latents: np.ndarray, inverted: dict, clips: int = CLIPS
) -> Rollout:
    """A rollout of identities whose first frame is inverted, see `invert_pool`.

    All frames start from its noise, as in the method, and will be edited as in the method: most clips' bodies
    around a fifth of the way, others' face and hands at the start.
    """
    identities = rng.integers(len(inverted["ways"]), size=clips)
    order = np.array([[0, *1 + rng.permutation(POSES - 1)[: FRAMES - 1]] for _ in range(clips)])
    ways, found = inverted["ways"][identities].astype(np.float32), inverted["found"][identities]
    taken = take_clips(rng, pool, latents, (identities[:, None], order), found)
    edits = [(0, None), (1, face_and_hands), *((step, body_parts) for step in (2, 3, 3, 3, 4, 4))]
    return Rollout(
        latents=flat(ways[:, -1:].repeat(FRAMES, axis=1)),
        images=flat(taken.images),
        weight=flat(taken.weight / taken.weight.mean()),
        hints=taken.hints,
        prompts=taken.prompts,
        ways=ways,
        poses=taken.poses,
        edits=[edits[rng.integers(len(edits))] for _ in identities],
    )


def rollout_step(rollout: Rollout, networks: Callable[..., Tensor]) -> Tensor:
    """Takes one step of sampling, and returns how far from its images the step leads.

    What a network sees in `training_batch` is true frames with noise, and it learns to trust what they show. What
    it sees in sampling is what it made of the steps before, and what editing has moved: from there, too, it has to
    find the way to the true frames (as in Ross et al., 2011, "A Reduction of Imitation Learning").
    """
    clips = rollout.latents.unflatten(0, (len(rollout.poses), -1))
    for clip, (step, parts) in enumerate(rollout.edits):
        if step == rollout.step:
            reference = torch.from_numpy(rollout.ways[clip, SAMPLING_STEPS - step + 1])
            first, *others = rollout.poses[clip]
            edit_latents(clips[clip, 1:], reference, others, first, parts)
    timestep = ddim_timesteps(SAMPLING_STEPS)[rollout.step - 1]
    timesteps = torch.full((len(rollout.poses),), timestep)
    noise = networks(rollout.latents, timesteps, rollout.prompts, rollout.hints)
    latents, images, weight = (
        x.to(noise.device) for x in (rollout.latents, rollout.images, rollout.weight)
    )
    a = alpha_cumprod(timestep)
    guess = (latents - math.sqrt(1 - a) * noise) / math.sqrt(a)
    next_timestep = timestep - TRAIN_STEPS // SAMPLING_STEPS
    rollout.latents = ddim_step(latents, noise.detach(), timestep, next_timestep).cpu()
    rollout.step += 1
    # Little is kept of the images that the first steps see.
    return min(1, 8 * a / (1 - a)) * (weight * (guess - images).square()).mean()


# ---- All stages -------------------------------------------------------------------------------------


def train_networks(
    networks: Networks, pool: dict, latents: np.ndarray, work: Path, inverted: dict | None = None
) -> None:
    """On noisy clips and words; with `inverted` frames, see `invert_pool`, four in five steps on clips are on
    rollouts. Checkpoints lack those: a resumed run begins new ones."""
    under_way: list[Rollout | None] = [None] * ROLLOUTS

    def loss_at(step: int) -> Tensor:
        rng = default_rng((2, step, bool(inverted)))
        of_words = step % WORDS_EVERY == WORDS_EVERY - 1
        if inverted and not of_words and rng.random() < 0.8:
            which = rng.integers(ROLLOUTS)
            # A rollout's last step could change next to nothing: it has none.
            if under_way[which] is None or under_way[which].step == SAMPLING_STEPS:
                under_way[which] = new_rollout(rng, pool, latents, inverted)
            return rollout_step(under_way[which], networks)
        if of_words:
            batch = words_batch(rng, pool, latents, pairs=CLIPS * FRAMES // 2)
        else:
            progress = 1 if inverted else step / DENOISING_STEPS
            batch = training_batch(rng, pool, latents, progress)
        inputs = (batch[name] for name in ("latents", "timestep", "prompts", "hints"))
        predicted = networks(*inputs)
        if of_words:
            return words_loss(batch, predicted)
        noise, weight = (batch[name].to(predicted.device) for name in ("noise", "weight"))
        return (weight * (predicted - noise) ** 2).mean()

    if inverted:
        optimise("rollouts", networks, loss_at, ROLLOUT_STEPS, 4e-4, 0.998, work)
    else:
        optimise("denoising", networks, loss_at, DENOISING_STEPS, 1e-3, 0.998, work)


def make_model(work: Path, device: torch.device) -> Model:
    """The whole recipe, with what fine-tuning and sampling should know of the model."""
    pool = render_pool(work / "pool", IDENTITIES, HEIGHT, WIDTH)
    torch.manual_seed(1)
    vae = VAE(VAE_CONFIG).to(device, memory_format=torch.channels_last)
    train_vae(vae, pool, work)
    latents = encode_pool(vae, pool, work)
    captions = (words for words, *_ in pool["captions"])
    tokenizer = Tokenizer(*learn_merges(captions, 200), length=TEXT.length)
    torch.manual_seed(2)
    networks = new_networks(tokenizer).to(device, memory_format=torch.channels_last)
    train_networks(networks, pool, latents, work)
    inverted = invert_pool(networks, pool, latents, work / "inverted.npz")
    train_networks(networks, pool, latents, work, inverted)
    return Model(
        **networks,
        vae=vae,
        tokenizer=tokenizer,
        size=HEIGHT,
        learning_rate=0.001,  # the paper's 0.003 is level in dB; a viewer prefers this
        guidance_until=600,  # colours are settled by then; later guidance mostly harms the rest
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default="runs/pretrain", help="pool and checkpoints")
    parser.add_argument("--out", type=Path, default="runs/pretrain/model", help="for the weights")
    args = parser.parse_args()
    keep_freed_memory()
    save_model(make_model(args.work, compute_device(training=True)[0]), args.out)
    print(f"{args.out}: written")


if __name__ == "__main__":
    main()
