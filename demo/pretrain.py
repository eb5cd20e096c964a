"""Makes the demo base model from nothing: `python demo/pretrain.py`, a few hours on two CPU cores.

Stable Diffusion has seen the world; the demo model has seen paper puppets. It is the same code at small
width, trained in rounds that go on from each other: on puppets as they are, on other puppets of which most
are in disguise (`scenery.py`), and on large ones in upright frames, as people are filmed with telephones,
in turn with those of the round before. A round has four stages, each of which resumes where it stopped:

1. render a pool of puppets, each identity in several poses, with control images and captions;
2. train the VAE on the frames;
3. encode the pool once;
4. train UNet, ControlNet and text encoder together, on short clips of one identity.

What stage 4 has to teach is what Stable Diffusion brings along: that a person's appearance can be read off
frame 0 through key-frame attention, whatever the pose. See `training_batch` for how.

The temporal layers are absent here, as in a 2-D public checkpoint; they come with inflation at loading.
Everything goes to `--work`; the finished weights go to `--out` as a folder in the diffusers layout.
"""

import argparse
import csv
import json
import math
import multiprocessing
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm, trange

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checkpoint import Model, keep_freed_memory, save_model
from clip import TextConfig, TextEncoder, Tokenizer
from controlnet import ControlNet
from demo.puppet import caption, motion, random_puppet, render
from demo.scenery import disguise
from demo.vocabulary import learn_merges
from pose import draw_pose, place_pose
from posecrafter import ALPHAS_CUMPROD, image_tensor
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

SIZE = 128  # pixels; with a factor of 4 the latents are 32x32
POSES = 8  # per identity, drawn from ten seconds of motion
LEARNING_RATE = 0.003  # of fine-tuning on a clip: the paper's; 0.06 dB over 1e-3 on a real clip
HINT_WIDTHS = (16, 32, 96)
UNET = UNetConfig(
    widths=(64, 128, 160, 160), layers_per_block=1, context_dim=64, heads=2, norm_groups=8
)
VAE_CONFIG = VAEConfig(widths=(24, 48, 96), layers_per_block=1, norm_groups=6, scale=1.0)
TEXT = TextConfig(vocab_size=0, width=64, heads=2, layers=2, mlp_width=256, length=24)


@dataclass(frozen=True)
class Round:
    """One round of training: its pool, its numbers of steps and the learning rates they start from."""

    identities: range
    disguised: float  # share of them
    height: int  # of the frames, which are SIZE wide
    crop_steps: int
    whole_steps: int
    whole_lr: float
    steps: int
    lr: float


ROUNDS = (
    Round(range(10_000, 12_500), 0.0, SIZE, 1000, 900, 1.5e-3, 2150, 1e-3),
    Round(range(12_500, 15_000), 0.7, SIZE, 0, 1400, 1.5e-3, 1500, 6e-4),
    Round(range(15_000, 16_000), 0.8, 224, 0, 0, 0.0, 450, 4e-4),
)


# ---- 1. The pool of puppets -------------------------------------------------------------------------


def render_identity(
    seed: int, disguised: float, height: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """Frames (POSES, H, W, 3) uint8, control images alike, masks (POSES, H/4, W/4) uint8, caption."""
    rng = np.random.default_rng((3, seed))
    in_disguise = rng.random() < disguised
    puppet = random_puppet(seed)
    states = motion(seed, POSES * 15)[::15]  # 1.25 s apart
    # The part of the square picture that is shown; some are closer to the camera.
    zoom = rng.uniform(1.05, 1.5) if in_disguise and rng.random() < 0.4 else 1.0
    side, window = (round(height * zoom), (height, SIZE))
    top, left = (int(rng.integers(side - shown + 1)) for shown in window)
    if zoom == 1:
        left = (side - SIZE) // 2
    frames, hints, masks = [], [], []
    for state in states:
        frame, pose, mask = render(puppet, state, side)
        shown = np.s_[top : top + height, left : left + SIZE]
        pose = place_pose(pose, side / SIZE, side / height, -left / SIZE, -top / height)
        frames.append(frame[shown])
        hints.append(draw_pose(pose, height, SIZE))
        masks.append(mask[shown])
    frames, masks = np.stack(frames), np.stack(masks)
    if in_disguise:
        frames = disguise(frames, masks, seed)
    masks = masks.reshape(POSES, height // 4, 4, SIZE // 4, 4).any((2, 4)).astype(np.uint8)
    return frames, np.stack(hints), masks, "a person" if in_disguise else caption(puppet)


def render_pool(work: Path, plan: Round) -> dict[str, np.ndarray]:
    """Renders what is not rendered yet; returns memory-mapped arrays with one row per identity."""
    identities, frame = plan.identities, (plan.height, SIZE, 3)
    shapes = {"frames": frame, "hints": frame, "masks": (plan.height // 4, SIZE // 4)}
    done = work / "captions.json"
    if not done.exists():
        pool = {
            name: np.lib.format.open_memmap(
                work / f"{name}.npy", "w+", np.uint8, (len(identities), POSES, *shape)
            )
            for name, shape in shapes.items()
        }
        captions = []
        with multiprocessing.Pool() as workers:
            draw = partial(render_identity, disguised=plan.disguised, height=plan.height)
            rendered = workers.imap(draw, identities, chunksize=8)
            for i in trange(len(identities), desc="rendering puppets", mininterval=10):
                pool["frames"][i], pool["hints"][i], pool["masks"][i], words = next(rendered)
                captions.append(words)
        for array in pool.values():
            array.flush()
        done.write_text(json.dumps(captions))
    pool = {name: np.load(work / f"{name}.npy", mmap_mode="r") for name in shapes}
    return pool | {"captions": json.loads(done.read_text())}


# ---- Shared by both trainings -----------------------------------------------------------------------


def start_residuals_at_zero(model: nn.Module) -> None:
    """Every residual branch starts as nothing, so that a deep network trains fast from its first step."""
    for module in model.modules():
        for name in ("conv2", "proj_out"):
            if hasattr(module, name):
                nn.init.zeros_(getattr(module, name).weight)
                nn.init.zeros_(getattr(module, name).bias)


def optimise(
    name: str,
    networks: nn.ModuleDict,
    loss_at,
    steps: int,
    peak_lr: float,
    ema_decay: float,
    work: Path,
):
    """Trains `networks` with AdamW on `loss_at(step)`; returns them with averaged weights.

    One cosine from `peak_lr` to 1 % of it after a short warm-up, gradients clipped at 1. A checkpoint is
    written every five minutes, and a batch is a function of its step, so an interrupted run goes on as if
    it had not stopped. The curve goes to `NAME.csv`.
    """
    checkpoint, log = work / f"{name}.pt", work / f"{name}.csv"
    parameters = list(networks.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=peak_lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    average = [p.detach().clone() for p in parameters]
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, mmap=True)
        networks.load_state_dict(state["networks"])
        optimizer.load_state_dict(state["optimizer"])
        torch._foreach_copy_(average, state["average"])
        start = state["step"]
    else:
        log.write_text("step,loss,seconds\n")

    def save(step: int):
        state = {
            "networks": networks.state_dict(),
            "optimizer": optimizer.state_dict(),
            "average": average,
            "step": step,
        }
        torch.save(state, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)

    losses, began, saved = [], time.monotonic(), time.monotonic()
    for step in (
        bar := trange(start, steps, initial=start, total=steps, desc=name, mininterval=10)
    ):
        warm_up, progress = min(1, (step + 1) / 200), step / steps
        optimizer.param_groups[0]["lr"] = (
            peak_lr * warm_up * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)
        )
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        # The average's memory grows with the run: early weights are not worth remembering.
        torch._foreach_lerp_(average, parameters, 1 - min(ema_decay, (1 + step) / (10 + step)))
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            bar.set_postfix(loss=f"{np.mean(losses):.4f}")
            with log.open("a") as file:
                csv.writer(file).writerow(
                    [step + 1, f"{np.mean(losses):.5f}", f"{time.monotonic() - began:.0f}"]
                )
            losses = []
        if time.monotonic() - saved > 300 or step + 1 == steps:
            save(step + 1)
            saved = time.monotonic()
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)
    return networks


# ---- 2. The VAE -------------------------------------------------------------------------------------


def new_vae() -> VAE:
    vae = VAE(VAE_CONFIG).to(memory_format=torch.channels_last)
    start_residuals_at_zero(vae)
    return vae


def train_vae(vae: VAE, pool: dict, work: Path, plan: Round) -> None:
    """First on crops around the person, many and cheap, then on whole frames, as it is used.

    The second stage matters: a group norm over a crop has other statistics than over a frame, and
    colours come out wrong without it. L1 + L2 + gradient loss, the person counting three times, and
    a light pull to N(0, 1).
    """
    frames, masks = pool["frames"], pool["masks"]

    def random_crop(rng, crop: int) -> tuple[np.ndarray, np.ndarray]:
        i, j = rng.integers(len(frames)), rng.integers(POSES)
        rows, columns = np.nonzero(masks[i, j])
        k = rng.integers(len(rows))
        corner = rows[k] - rng.integers(crop // 4), columns[k] - rng.integers(crop // 4)
        top, left = np.clip(corner, 0, (SIZE - crop) // 4)
        window = np.s_[4 * top : 4 * top + crop, 4 * left : 4 * left + crop]
        return frames[i, j][window], np.kron(masks[i, j], np.ones((4, 4), np.float32))[window]

    def loss_at(step: int, stage: int, batch: int, crop: int) -> Tensor:
        rng = np.random.default_rng((stage, step))
        images, person = zip(*(random_crop(rng, crop) for _ in range(batch)))
        images = image_tensor(np.stack(images)) * 2 - 1
        weight = torch.tensor(1 + 2 * np.stack(person))[:, None]
        with torch.autocast("cpu", torch.bfloat16):
            mean, log_variance = vae.encode(images)
            noise = torch.from_numpy(rng.standard_normal(mean.shape, np.float32))
            output = vae.decode(mean + noise * torch.exp(log_variance.clamp(-30, 10) / 2))
        difference, mean, log_variance = output.float() - images, mean.float(), log_variance.float()
        edges = difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()
        divergence = (mean**2 + log_variance.exp() - 1 - log_variance).mean() / 2
        pixels = (weight * (difference.abs() + difference**2)).mean() / weight.mean()
        return pixels + edges + 1e-4 * divergence

    networks = nn.ModuleDict({"vae": vae})
    crops, whole = (
        partial(loss_at, stage=1, batch=32, crop=64),
        partial(loss_at, stage=3, batch=8, crop=SIZE),
    )
    optimise("vae", networks, crops, plan.crop_steps, 2e-3, 0.995, work)
    optimise("vae_whole", networks, whole, plan.whole_steps, plan.whole_lr, 0.995, work)


# ---- 3. The latents ---------------------------------------------------------------------------------


def encode_pool(vae: VAE, pool: dict, work: Path) -> np.ndarray:
    """The pool's latents, as the VAE gives them: (identities, POSES, 4, H/4, W/4)."""
    path = work / "latents.npy"
    if not path.exists():
        latents = []
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            for frames in tqdm(pool["frames"], desc="encoding", mininterval=10):
                latents.append(vae.encode(image_tensor(frames) * 2 - 1)[0].half().numpy())
        np.save(path, np.stack(latents))
    return np.load(path).astype(np.float32)


# ---- 4. UNet, ControlNet and text encoder -----------------------------------------------------------


def prompt_from(rng, words: str) -> str:
    """Often nothing or just "a person", else with some of the attributes, so that each word is learned."""
    draw = rng.random()
    person, *attributes = words.split(", ")
    if draw < 0.15:
        return ""
    return ", ".join([person] + [a for a in attributes if draw > 0.4 and rng.random() < 0.6])


def training_batch(
    rng, pool: dict, latents: np.ndarray, progress: float, clips: int, frames: int
) -> dict:
    """Noisy clips of one identity each, and the noise to predict.

    Three things teach the network to read the appearance off frame 0:

    - Two in three clips share noise as the method's inverted pseudo video does: at the last timestep all
      frames are *equal* to frame 0, so the noise of frame i is frame 0's plus what keeps the sum equal.
      The pose alone then says where things go. The other clips have independent noise, as fine-tuning has.
    - At first, frame 0 is often less noisy than its timestep says, so there is something to look up.
    - The loss weighs the person, and the place where it stood in frame 0, five times.
    """
    identities = rng.integers(len(latents), size=clips)
    order = np.stack([rng.permutation(POSES)[:frames] for _ in range(clips)])  # (clips, frames)
    z = latents[identities[:, None], order]  # (clips, frames, 4, h, w)
    mask = pool["masks"][identities[:, None], order].astype(np.float32)
    hints = np.stack([pool["hints"][i][o] for i, o in zip(identities, order)])

    alphas = ALPHAS_CUMPROD.numpy()
    ratio = math.sqrt(alphas[-1] / (1 - alphas[-1]))
    noise = rng.standard_normal(z.shape, np.float32)
    shared = rng.random(clips) < 0.65
    noise[shared, 1:] = noise[shared, :1] + ratio * (z[shared, :1] - z[shared, 1:])

    timestep = rng.integers(0, 1000, clips)
    alpha = np.repeat(alphas[timestep][:, None], frames, 1)  # (clips, frames)
    early = rng.random(clips) < max(0.0, 0.8 - 3 * progress)
    alpha[early, 0] = alphas[(timestep[early] * rng.random(early.sum())).astype(int)]
    alpha = alpha[:, :, None, None, None]

    weight = 1 + 4 * np.maximum(mask, mask[:, :1])[:, :, None]  # (clips, frames, 1, h, w)
    weight[early, 0] = 0  # frame 0's own noise level is a lie there
    # The error of the *image*, not of the noise, where noise dominates; bounded at both ends (min-SNR).
    a = alphas[timestep]
    weight *= (np.minimum(1 / a, 8) * np.minimum(1, 5 * (1 - a) / a))[:, None, None, None, None]
    flat = {
        "latents": np.sqrt(alpha) * z + np.sqrt(1 - alpha) * noise,
        "noise": noise,
        "weight": weight / weight.mean(),
    }
    flat = {k: torch.from_numpy(v.astype(np.float32)).flatten(0, 1) for k, v in flat.items()}
    prompts = [prompt_from(rng, pool["captions"][i]) for i in identities]
    return flat | {
        "hints": image_tensor(hints),
        "timestep": torch.from_numpy(timestep),
        "prompts": prompts,
    }


def new_networks(tokenizer: Tokenizer) -> nn.ModuleDict:
    text = TextEncoder(TextConfig(**{**TEXT.__dict__, "vocab_size": len(tokenizer.vocab)}))
    unet, controlnet = UNet(UNET), ControlNet(UNET, HINT_WIDTHS)
    for module in unet.modules():
        if hasattr(module, "attn_temp"):
            del module.attn_temp, module.conv_temp
    networks = nn.ModuleDict({"unet": unet, "controlnet": controlnet, "text_encoder": text})
    start_residuals_at_zero(networks)
    return networks.to(memory_format=torch.channels_last)


def train_networks(
    networks: nn.ModuleDict,
    pools: list[tuple[dict, np.ndarray]],
    tokenizer: Tokenizer,
    work: Path,
    plan: Round,
    frames: int = 3,
) -> None:
    """Trains on pools and their latents in turn, on as many clips as make 6 square ones' pixels."""
    unet, controlnet, text = networks["unet"], networks["controlnet"], networks["text_encoder"]
    # A round that goes on from another has learned to look at frame 0 already.
    first_progress = 0.0 if plan is ROUNDS[0] else 0.2

    def loss_at(step: int) -> Tensor:
        progress = first_progress + (1 - first_progress) * step / plan.steps
        rng = np.random.default_rng((2, step))
        pool, latents = pools[step % len(pools)]
        clips = 6 * SIZE // pool["frames"].shape[2]
        batch = training_batch(rng, pool, latents, progress, clips, frames)
        with torch.autocast("cpu", torch.bfloat16):
            context = text(torch.stack([tokenizer(prompt) for prompt in batch["prompts"]]))
            control = controlnet(batch["latents"], batch["timestep"], context, batch["hints"])
            predicted = unet(batch["latents"], batch["timestep"], context, control)
        return (batch["weight"] * (predicted.float() - batch["noise"]) ** 2).mean()

    optimise("networks", networks, loss_at, plan.steps, plan.lr, 0.998, work)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--work", type=Path, default=Path("runs/pretrain"), help="pool, checkpoints and curves"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo/weights"), help="where the finished model goes"
    )
    args = parser.parse_args()

    keep_freed_memory()
    torch.manual_seed(1)
    vae = new_vae()
    for number, plan in enumerate(ROUNDS, start=1):
        work = args.work / f"round{number}"
        work.mkdir(parents=True, exist_ok=True)
        pool = render_pool(work, plan)
        train_vae(vae, pool, work, plan)
        latents = encode_pool(vae, pool, work)
        if plan.whole_steps:  # then latents of rounds before are another VAE's
            pools, scale = [], float(1 / latents.std())
        pools.append((pool, latents * scale))
        if number == 1:
            tokenizer = Tokenizer(*learn_merges(pool["captions"], 200), length=TEXT.length)
            torch.manual_seed(2)
            networks = new_networks(tokenizer)
        train_networks(networks, pools, tokenizer, work, plan)
    vae.config = replace(vae.config, scale=scale)
    model = Model(**networks, vae=vae, tokenizer=tokenizer, size=SIZE, learning_rate=LEARNING_RATE)
    save_model(model, args.out)
    print(
        f"{args.out}: {sum(f.stat().st_size for f in args.out.rglob('*.safetensors')) / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    main()
