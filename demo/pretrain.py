"""Makes a base model for the demo from nothing: `python demo/pretrain.py`.

Stable Diffusion has seen the world; the demo model has seen paper puppets. It is the same code at small width.
First the VAE is trained on a pool of puppets (`pool.py`), then UNet, ControlNet and text encoder on short clips.
They have to learn what Stable Diffusion brings along: a person's appearance can be read off frame 0 through
key-frame attention, whatever the pose. `training_batch` says how. The temporal layers are absent, as in a public
2-D checkpoint; loading a model adds them. A run that is interrupted goes on from its last checkpoint.

Nobody has run this recipe whole. The weights in demo/weights took a longer way, which docs/LOG.md tells.
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

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
from controlnet import ControlNet
from demo.pool import FACTOR, POSES, TWIN, as_found, pose_from, render_pool
from demo.save import save_model
from demo.vocabulary import learn_merges
from device import compute_device, has_fast_bfloat16
from posecrafter import ALPHAS_CUMPROD, TRAIN_STEPS, edit_latents, image_tensor
from poses.parts import face_and_hands
from poses.pose import draw_pose
from safe.files import replacing
from safe.process import keep_freed_memory
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

HEIGHT, WIDTH = 192, 256  # pixels: the demo's frames, which show puppets from the knees up
IDENTITIES = range(10_000, 15_000)  # seeds of the pool's puppets; those below are for the demo
VAE_CONFIG = VAEConfig(8, widths=(24, 48, 96), layers_per_block=1, norm_groups=6, scale=1.0)
UNET = UNetConfig(8, 8, (64, 128, 160, 160), layers_per_block=1, context_dim=64, heads=2, norm_groups=8)
HINT_WIDTHS = (16, 32, 96)
TEXT = TextConfig(vocab_size=0, width=64, heads=2, layers=2, mlp_width=256, length=24)
VAE_STEPS, STEPS = 10_000, 20_000  # of training
VAE_FRAMES = 4  # per batch of the VAE
CLIPS, FRAMES = 2, 3  # per batch of the networks, and per clip


def optimise(
    name: str, networks: nn.Module, loss_at: Callable[[int], Tensor], steps: int, peak_lr: float, work: Path
) -> None:
    """Trains `networks` with AdamW on `loss_at(step)`, and leaves them with averaged weights.

    One cosine from `peak_lr` to 1 % of it after a short warm-up, gradients clipped at 1. Every 100 steps the mean
    loss goes to NAME.csv and a checkpoint to NAME.pt. Batches are functions of their step, so an interrupted run
    goes on from there as if it had not stopped; a finished one only loads its weights. Steps whose gradients are
    not finite are skipped. Raises ArithmeticError if all 100 are.
    """
    checkpoint, parameters = work / f"{name}.pt", list(networks.parameters())
    optimizer = torch.optim.AdamW(parameters, peak_lr, (0.9, 0.99), weight_decay=0.01, fused=True)
    average, start, rows, losses = [p.detach().clone() for p in parameters], 0, [], []
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        networks.load_state_dict(state["networks"])
        optimizer.load_state_dict(state["optimizer"])
        torch._foreach_copy_(average, state["average"])
        start, rows = state["step"], state["rows"]

    for step in trange(start, steps, initial=start, total=steps, desc=name, mininterval=10):
        cosine = 0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = peak_lr * min(1, (step + 1) / 200) * cosine
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        if nn.utils.clip_grad_norm_(parameters, 1.0).isfinite():
            optimizer.step()
            losses.append(loss.item())
        # The average's memory grows with the run: early weights are not worth remembering.
        torch._foreach_lerp_(average, parameters, 1 - min(0.998, (1 + step) / (10 + step)))
        if (step + 1) % 100 == 0 or step + 1 == steps:
            if not losses:
                raise ArithmeticError(f"{name}: no gradient of the steps up to {step + 1} is finite")
            rows.append([step + 1, sum(losses) / len(losses)])
            losses = []
            np.savetxt(work / f"{name}.csv", rows, "%g", ",", header="step,loss", comments="")
            state = {"networks": networks.state_dict(), "optimizer": optimizer.state_dict()}
            with replacing(checkpoint) as unfinished:
                torch.save(state | {"average": average, "step": step + 1, "rows": rows}, unfinished)
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)


def in_bfloat16(device: torch.device) -> torch.autocast:
    """Networks compute in bfloat16 in it, where that is fast; their weights stay float32."""
    fast = device.type == "cuda" or has_fast_bfloat16()
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def start_residuals_at_zero(model: nn.Module) -> None:
    """Every residual branch starts as nothing, so that a deep network trains fast from its first step."""
    for name, weight in model.named_parameters():
        if "conv2." in name or "proj_out." in name:
            nn.init.zeros_(weight)


def loss_weights(masks: np.ndarray, keypoints: np.ndarray) -> Tensor:
    """How much latent pixels weigh (F, 1, h, w): 1, 5 where the person is, 12 on the head, 15 on the face, and 40
    on hands, which are smaller, and eyes. masks: (F, h, w); keypoints: (F, 130, 3)."""
    weights, size = 1 + 4 * masks.astype(np.float32), FACTOR * np.array(masks.shape[:0:-1])  # width, height
    for weight, pose in zip(weights, map(pose_from, keypoints)):
        around_face = np.ptp(pose.face[:, 1]) * size[1] / 2  # pixels
        parts = [(pose.face, around_face, 12), (pose.face, 2, 15), (pose.face[36:48], 3, 40)]
        for part, margin, heavy in [*parts, (pose.left_hand, 2, 40), (pose.right_hand, 2, 40)]:
            points = part[:, :2] * size
            left, top = ((points.min(axis=0) - margin).clip(0) // FACTOR).astype(int)
            right, bottom = np.ceil((points.max(axis=0) + margin).clip(0) / FACTOR).astype(int)
            weight[top:bottom, left:right] = heavy
    return torch.from_numpy(weights)[:, None]


# ---- The VAE ----------------------------------------------------------------------------------------


def train_vae(vae: VAE, pool: np.ndarray, work: Path) -> None:
    """By L1 + L2 + gradient loss, with a light pull of the latents to N(0, 1). Sets the scale to their deviation.
    On whole frames: over a crop, a group norm has other statistics, and colours come out wrong. Face and hands
    weigh most, or dark faces come out blank."""
    device = vae.quant_conv.weight.device

    def loss_at(step: int) -> Tensor:
        rng = default_rng((1, step))
        rows = rng.integers(len(pool), size=VAE_FRAMES), rng.integers(POSES, size=VAE_FRAMES)
        images = (image_tensor(pool["frames"][rows]) * 2 - 1).to(device)
        weight = loss_weights(pool["masks"][rows], pool["poses"][rows]).to(device)
        weight = F.interpolate(weight / weight.mean(), images.shape[2:])
        with in_bfloat16(device):
            mean, log_variance = (x.float() for x in vae.encode(images))
            noise = torch.from_numpy(rng.standard_normal(mean.shape, np.float32)).to(device)
            output = vae.decode(mean + noise * torch.exp(log_variance.clamp(-30, 10) / 2))
        difference = output.float() - images
        loss = (weight * (difference.abs() + difference**2)).mean()
        loss = loss + (weight[:, :, 1:] * difference.diff(dim=2).abs()).mean()
        loss = loss + (weight[..., 1:] * difference.diff(dim=3).abs()).mean()
        return loss + 1e-4 * ((mean**2 + log_variance.exp() - 1 - log_variance).mean() / 2)

    start_residuals_at_zero(vae)
    optimise("vae", vae, loss_at, VAE_STEPS, 2e-3, work)
    vae.config = replace(vae.config, scale=1 / encode(vae, pool["frames"][:64, 0]).std().item())


@torch.no_grad()
def encode(vae: VAE, frames: np.ndarray) -> Tensor:
    """Frames uint8 (F, H, W, 3) -> latents (F, 8, h, w), float32, in the host's memory."""
    images = (image_tensor(frames) * 2 - 1).to(vae.quant_conv.weight.device)
    with in_bfloat16(images.device):
        return vae.config.scale * vae.encode(images)[0].float().cpu()


# ---- UNet, ControlNet and text encoder --------------------------------------------------------------


def new_networks(vocab_size: int) -> nn.ModuleDict:
    """Fresh networks without temporal layers."""
    text = TextEncoder(replace(TEXT, vocab_size=vocab_size))
    unet, controlnet = UNet(UNET), ControlNet(UNET, HINT_WIDTHS)
    networks = nn.ModuleDict({"unet": unet, "controlnet": controlnet, "text_encoder": text})
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


def prompt_from(rng: Generator, words: str, told: str = "") -> str:
    """At times nothing or just "a person", else with some or all of the attributes, in any order, so that each
    word is learned, and that a colour belongs to what follows it. The attribute `told` is always there."""
    person, *attributes = words.split(", ")
    share = rng.choice((0.0, 0.6, 1.0), p=(0.3, 0.3, 0.4))
    some = [a for a in attributes if a == told or rng.random() < share]
    return ", ".join([person, *rng.permutation(some)]) if told or rng.random() < 0.85 else ""


def training_batch(rng: Generator, pool: np.ndarray, vae: VAE, progress: float) -> dict:
    """Noisy "latents" (F, 8, h, w) of clips of one identity each, the "noise" to predict in them, its "weight" in
    the loss (F, 1, h, w), which is highest on the person, and what the networks are told.

    - Two in three clips share noise as the method's inverted pseudo video does: at the last timestep all frames
      are *equal* to frame 0. x = sqrt(a) z + sqrt(1 - a) noise shall be the same although the images z differ, so
      noise_i = noise_0 + sqrt(a / (1 - a)) (z_0 - z_i), with a of that last timestep. The pose alone then says
      where things go; or latent editing has moved face and hands, or the whole body, in a third of them each.
      The other clips have independent noise, as fine-tuning has.
    - In half of those that share noise and have a twin, the noise remembers the *twin's* frame 0, and the prompt
      tells what is different: words count more than what the noise remembers.
    - In the first fifth of training (`progress` 0 to 0.2) frame 0 is often less noisy than its timestep says, so
      that there is an appearance to look up. Then it does not count in the loss.
    """
    identities = rng.integers(len(pool), size=CLIPS)
    others = [rng.permutation(range(1, POSES))[: FRAMES - 1] for _ in identities]
    rows = identities.repeat(FRAMES), np.insert(others, 0, 0, axis=1).ravel()  # 0: the twin has this pose
    keypoints, size = pool["poses"][rows], pool["frames"].shape[2:4]
    poses = [as_found(rng, clip, *size) for clip in np.split(keypoints, CLIPS)]

    images = encode(vae, pool["frames"][rows])  # (F, 8, h, w)
    noise = torch.from_numpy(rng.standard_normal(images.shape, np.float32))
    ratio, prompts = (ALPHAS_CUMPROD[-1] / (1 - ALPHAS_CUMPROD[-1])).sqrt(), []
    clips = zip(identities, images.split(FRAMES), noise.split(FRAMES), poses)
    for i, z, clip_noise, (first, *others) in clips:
        words, told = pool["captions"][i]
        share_noise = rng.random() < 0.65
        of_twin = share_noise and told and rng.random() < 0.5
        if share_noise:
            remembered = encode(vae, pool["frames"][i, [TWIN]])[0] if of_twin else z[0]
            starts = (clip_noise[0] + ratio * remembered).repeat(FRAMES, 1, 1, 1)
            if parts := (None, face_and_hands, body_parts)[rng.integers(3)]:
                edit_latents(starts[1:], starts[0], others, first, parts)
            clip_noise.copy_(starts - ratio * z)
        prompts.append(prompt_from(rng, words, told if of_twin else ""))

    timestep = torch.from_numpy(rng.integers(TRAIN_STEPS, size=CLIPS))
    a = ALPHAS_CUMPROD[timestep].repeat_interleave(FRAMES)[:, None, None, None]  # (F, 1, 1, 1)
    # The error of the *image*, not of the noise, where noise dominates; bounded at both ends (min-SNR).
    weight = (1 / a).clamp(max=8) * (5 * (1 - a) / a).clamp(max=1)
    early = torch.from_numpy(rng.random(CLIPS) < 0.8 - 4 * progress)
    less_noisy = ALPHAS_CUMPROD[(timestep * torch.from_numpy(rng.random(CLIPS))).long()]
    a[::FRAMES][early] = less_noisy[early][:, None, None, None]
    weight[::FRAMES][early] = 0  # frame 0's own noise level is a lie there
    masks = pool["masks"][rows] | pool["masks"][identities, 0].repeat(FRAMES, axis=0)
    weight = weight * loss_weights(masks, keypoints)
    return {
        "latents": a.sqrt() * images + (1 - a).sqrt() * noise,
        "noise": noise,
        "weight": weight / weight.mean(),
        "hints": image_tensor(np.stack([draw_pose(pose, *size) for clip in poses for pose in clip])),
        "timestep": timestep,
        "prompts": prompts,
    }


def train_networks(
    networks: nn.ModuleDict, tokenizer: Tokenizer, vae: VAE, pool: np.ndarray, work: Path
) -> None:
    device, tokens_of = networks["unet"].conv_in.weight.device, cache(tokenizer)

    def loss_at(step: int) -> Tensor:
        batch = training_batch(default_rng((2, step)), pool, vae, progress=step / STEPS)
        batch["tokens"] = torch.stack([tokens_of(prompt) for prompt in batch.pop("prompts")])
        batch = {name: x.to(device) for name, x in batch.items()}
        inputs = batch["latents"], batch["timestep"]
        with in_bfloat16(device):
            context = networks["text_encoder"](batch["tokens"])
            hints = networks["controlnet"].embed_hint(batch["hints"])
            control = networks["controlnet"](*inputs, context, hints)
            predicted = networks["unet"](*inputs, context, control)
        return (batch["weight"] * (predicted.float() - batch["noise"]).square()).mean()

    optimise("networks", networks, loss_at, STEPS, 1e-3, work)


def make_model(work: Path, device: torch.device) -> Model:
    """The whole recipe, with what fine-tuning and sampling should know of the model."""
    pool = render_pool(work / "pool.npy", IDENTITIES, HEIGHT, WIDTH)
    torch.manual_seed(1)
    vae = VAE(VAE_CONFIG).to(device, memory_format=torch.channels_last)
    train_vae(vae, pool, work)
    tokenizer = Tokenizer(*learn_merges(pool["captions"][:, 0], 200), length=TEXT.length)
    torch.manual_seed(2)
    networks = new_networks(len(tokenizer.vocab)).to(device, memory_format=torch.channels_last)
    train_networks(networks, tokenizer, vae, pool, work)
    # The paper's learning rate of 0.003 is level in dB; a viewer prefers this one. Colours are settled by timestep
    # 600; guidance after it mostly harms the rest.
    settings = {"size": HEIGHT, "learning_rate": 0.001, "method": "held", "guidance_until": 600}
    return Model(**networks, vae=vae, tokenizer=tokenizer, **settings)


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
