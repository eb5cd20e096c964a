"""The method: PoseCrafter (Zhong et al., ECCV 2024), from encoded frames and poses to new frames.

The paper's new clip is made by calling these one after another (`sample.py --edit face,hands`; by default what
happens to the latents is that of `pseudo.py`, between the steps of `sample`):

    context = encode_prompt(model, "a person")
    k = select_reference(training_poses, target_poses)         # the training frame to start from
    hint = embed_hints(model, [training_poses[k]], height, width)
    trajectory = invert(model, latents[k : k + 1], hint, context)  # its way to noise
    poses = insert_reference(training_poses[k], target_poses)  # it leads the clip as key frame
    noise = trajectory[-1].repeat(len(poses), 1, 1, 1)         # all frames start from its noise,
    edit_latents(noise[1:], noise[0], poses[1:], poses[0])     # with face and hands moved in place
    hints = embed_hints(model, poses, height, width)           # what the ControlNet makes of the poses
    latents = sample(model, noise, hints, context)
    frames = decode_latents(model, latents)

`model` is a bundle of networks with the attributes unet, controlnet, vae, text_encoder and tokenizer.
Latents are float32 (F, 4, H, W) throughout (the demo model's have 8 channels) and times the VAE's scale; the
networks compute in their own precision.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from parts import PARTS, Part
from pose import Pose, draw_pose, pose_distance
from slicing import Offloaded, Slicing, frugally, plans
from unet import Context, ResnetBlock2D, Transformer2DModel

# ---- Images, prompts and poses become what the networks read ------------------------------------


def network_inputs(model) -> dict:
    """The device and dtype that the networks want their inputs in, as keywords for `Tensor.to`."""
    weight = model.unet.conv_in.weight
    return {"device": weight.device, "dtype": weight.dtype}


@contextmanager
def visiting(network: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """A network on `device` while it is used; then back where it lives, which may be the host's memory."""
    home = next(network.parameters()).device
    if home == device:
        yield network
        return
    network.to(device)
    try:
        yield network
    finally:
        network.to(home)


def image_tensor(frames: np.ndarray) -> Tensor:
    """Frames uint8 (..., H, W, 3) -> float32 (N, 3, H, W) in [0, 1], in channels_last memory."""
    frames = frames.reshape(-1, *frames.shape[-3:])
    return torch.tensor(frames).permute(0, 3, 1, 2).float() / 255


@torch.inference_mode()
def encode_frames(model, frames: np.ndarray) -> Tensor:
    """Frames uint8 (F, H, W, 3) -> latents float32 (F, C, H/s, W/s): the VAE's mean times its scale.

    The mean rather than a sample, so that a frame has one latent.
    """
    latents = []
    with visiting(model.vae, network_inputs(model)["device"]) as vae:
        # One at a time: full-resolution feature maps are the VAE's whole memory.
        for frame in frames:
            image = image_tensor(frame[None]).to(**network_inputs(model)) * 2 - 1
            mean, _ = vae.encode(image)
            latents.append(mean.float() * vae.config.scale)
    return torch.cat(latents)


@torch.inference_mode()
def decode_latents(model, latents: Tensor, slice_size: int = 2) -> Iterator[np.ndarray]:
    """Latents (F, C, h, w) -> frames uint8 (H, W, 3), one after another, decoded a few at a time."""
    with visiting(model.vae, network_inputs(model)["device"]) as vae:
        for part in latents.split(slice_size):
            images = vae.decode((part / vae.config.scale).to(**network_inputs(model))).float()
            images = ((images + 1) * 127.5).round().clamp(0, 255).byte()
            yield from images.permute(0, 2, 3, 1).cpu().numpy()


@torch.inference_mode()
def encode_prompt(model, prompt: str) -> Tensor:
    """A prompt -> its context (tokens, context_dim)."""
    device = network_inputs(model)["device"]
    with visiting(model.text_encoder, device) as text_encoder:
        return text_encoder(model.tokenizer(prompt).to(device))


def draw_hints(poses: Sequence[Pose], height: int, width: int) -> Tensor:
    """The poses' control images for frames of height x width pixels: (F, 3, H, W) in [0, 1]."""
    return image_tensor(np.stack([draw_pose(pose, height, width) for pose in poses]))


@torch.inference_mode()
def embed_hints(model, poses: Sequence[Pose], height: int, width: int) -> Tensor:
    """What the ControlNet makes of the poses' control images, the same in every step: (F, C, h, w).

    In the networks' precision, in the host's memory, and from one image at a time, which is larger than
    its embedding.
    """
    images = (draw_hints([pose], height, width).to(**network_inputs(model)) for pose in poses)
    return torch.cat([model.controlnet.embed_hint(image).cpu() for image in images])


# ---- The diffusion: Stable Diffusion 1.5's schedule and DDIM ------------------------------------

TRAIN_STEPS = 1000
# "Scaled linear".
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, TRAIN_STEPS, dtype=torch.float32) ** 2
ALPHAS_CUMPROD = torch.cumprod(1 - BETAS, dim=0)
ALPHAS = ALPHAS_CUMPROD.tolist()


def ddim_timesteps(steps: int) -> list[int]:
    """The timesteps of a run of `steps` steps, from noise to image: 981, 961, ..., 1 for 50.

    Evenly spaced and one above the multiples ("steps offset 1"), as in the public schedulers, where numbers that
    do not divide 1000 start somewhat later. Raises ValueError for those that would start from half an image
    (334 steps: at 667), and outside 1 to 500.
    """
    if not 1 <= steps <= TRAIN_STEPS // 2 or TRAIN_STEPS % steps > TRAIN_STEPS // 10:
        raise ValueError(f"{steps} DDIM steps: give 1 to 100, or 125, 200, 250 or 500")
    stride = TRAIN_STEPS // steps
    return [i * stride + 1 for i in reversed(range(steps))]


def alpha_cumprod(timestep: int) -> float:
    """How much of the variance is image at a timestep; below 0, at the end of the run, as at 0."""
    return ALPHAS[max(timestep, 0)]


def ddim_step(latents: Tensor, noise: Tensor, timestep: int, next_timestep: int) -> Tensor:
    """Moves latents from one timestep to another along the predicted noise, either way (eta 0).

    Song et al. 2021, "Denoising Diffusion Implicit Models", Eq. (12): the image that the noise implies,
    noised anew to the other timestep.
    """
    a, b = alpha_cumprod(timestep), alpha_cumprod(next_timestep)
    image = (latents - math.sqrt(1 - a) * noise).div_(math.sqrt(a))
    return image.mul_(math.sqrt(b)).add_(noise, alpha=math.sqrt(1 - b))


def add_noise(latents: Tensor, noise: Tensor, timestep: int) -> Tensor:
    """The forward process: what clean latents look like at a timestep."""
    a = alpha_cumprod(timestep)
    return math.sqrt(a) * latents + math.sqrt(1 - a) * noise


def predict_noise(
    model,
    latents: Tensor,
    timestep: int,
    context: Tensor | Context,
    hints: Tensor | Offloaded,
) -> Tensor:
    """The noise that UNet and ControlNet see in latents (F, C, h, w), float32 alike.

    hints: control images (F, 3, H, W) in [0, 1], or their embeddings; context: (tokens, context_dim).
    """
    x = latents.to(**network_inputs(model))
    if isinstance(hints, Tensor):
        hints = hints.to(**network_inputs(model))
    control = model.controlnet(x, timestep, context, hints)
    return model.unet(x, timestep, context, control).float()


# ---- Fine-tuning --------------------------------------------------------------------------------


def trainable_parameters(model) -> dict[str, nn.Parameter]:
    """What fine-tuning trains, by name: the temporal layers and the outputs of key-frame attention.

    `attn1.to_out`, `attn_temp` and `conv_temp` of the UNet, `attn1.to_out` of the ControlNet, as in the
    public ControlVideo code. Names start with the network's: "unet." or "controlnet.".
    """
    trained = (".attn1.to_out.", ".attn_temp.", ".conv_temp.")
    return {
        f"{network}.{name}": parameter
        for network in ("unet", "controlnet")
        for name, parameter in getattr(model, network).named_parameters()
        if any(part in name for part in trained)
    }


# Numbers in a clip's feature map, from which on training would keep tens of gigabytes of them.
LARGE = 2**22


def recompute_activations(model, latents: Tensor) -> None:
    """Prepares for training on clips of large frames, latents (F, C, h, w): from now on only the inputs of the
    blocks are kept, and the rest is computed again going backwards. Of small frames all is kept.

    A third more to compute, for a fraction of the memory (gradient checkpointing, Chen et al. 2016).
    """
    if math.prod(finest_map(model, latents)) <= LARGE:
        return
    for network in (model.unet, model.controlnet):
        for block in network.modules():
            if isinstance(block, (ResnetBlock2D, Transformer2DModel)):
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def training_steps(frames: int) -> int:
    """The paper's number of training steps for N frames (supplement, Eq. 1): 100 for 8, 2000 for 100.

    Below 8 frames, where the paper does not go, the line falls towards zero: 50 at least.
    """
    return max(50, round(475 / 23 * frames - 1500 / 23))


def training_loss(
    model, latents: Tensor, hints: Tensor, context: Tensor, timestep: int, noise: Tensor
) -> Tensor:
    """Mean squared error of the noise predicted in a clip that was noised to one timestep."""
    predicted = predict_noise(model, add_noise(latents, noise, timestep), timestep, context, hints)
    return F.mse_loss(predicted, noise)


# ---- Reference selection ------------------------------------------------------------------------


def select_reference(training_poses: Sequence[Pose], target_poses: Sequence[Pose]) -> int:
    """The training frame whose pose is closest to all target poses: i* = argmin_i sum_l ||p_l - p_i||^2.

    Target frames without a person do not vote. Of training frames that share no keypoints with some of the
    targets, those that can be compared with the most come first. Raises ValueError when no pose can be compared.
    """
    distances = np.array(
        [[pose_distance(one, other) for other in target_poses] for one in training_poses]
    )
    comparable = np.isfinite(distances)
    if not comparable.any():
        raise ValueError(
            "no training frame shares body keypoints with a target pose: is there a person in them?"
        )
    sums = np.where(comparable, distances, 0).sum(axis=1)
    return int(np.lexsort((sums, -comparable.sum(axis=1)))[0])


# ---- Inversion of a pseudo video ----------------------------------------------------------------


@torch.inference_mode()
def invert(model, latent: Tensor, hint: Tensor, context: Tensor, steps: int = 50) -> list[Tensor]:
    """DDIM inversion of the reference frame: its way from image to noise.

    latent: (1, C, h, w), encoded; hint: its own control image (1, 3, H, W), or what `embed_hints` made of
    it; context: the source prompt's.
    Returns `steps` + 1 latents: the image, then one per timestep up to the noise.

    The paper inverts a pseudo video that repeats this frame for every target pose. All its frames stay
    equal on the way: they share the key frame, attention over equal tokens gives one of them, and equal
    frames have one frame's norm statistics. So one frame is inverted, and the noise repeated.
    A clip (F, C, h, w) is inverted as a clip.
    """
    trajectory, context = [latent], Context(context)
    timesteps = ddim_timesteps(steps)
    stride = TRAIN_STEPS // steps
    for timestep in tqdm(timesteps[::-1], desc="inverting", leave=False):
        # The noise is wanted at the level of the *next* timestep but predicted from this one's latents.
        noise = predict_noise(model, trajectory[-1], timestep, context, hint)
        trajectory.append(ddim_step(trajectory[-1], noise, timestep - stride, timestep))
    return trajectory


# ---- Insertion of the reference -----------------------------------------------------------------


def insert_reference(reference_pose: Pose, target_poses: Sequence[Pose]) -> list[Pose]:
    """The reference pose in front of the M target poses: frame 0 is what all frames attend to.

    Its own sampled frame is no part of the result, but tells how faithful the run is.
    """
    return [reference_pose, *target_poses]


# ---- Latent editing -----------------------------------------------------------------------------


def sample_bilinear(latent: Tensor, points: np.ndarray) -> Tensor:
    """Reads a latent (C, H, W) at K points (K, 2) in pixels, between pixel centres: (C, K)."""
    height, width = latent.shape[-2:]
    corner = np.floor(points).astype(int)
    fraction = torch.tensor(points - corner, dtype=latent.dtype, device=latent.device)
    result = 0
    for dx in (0, 1):
        for dy in (0, 1):
            x, y = (corner[:, 0] + dx).clip(0, width - 1), (corner[:, 1] + dy).clip(0, height - 1)
            weight = (fraction[:, 0] if dx else 1 - fraction[:, 0]) * (
                fraction[:, 1] if dy else 1 - fraction[:, 1]
            )
            result = result + latent[:, y, x] * weight
    return result


def move(image: Tensor, other: Tensor, part: Part, opacity: Tensor | None = None) -> bool:
    """Makes a part of an image (C, H, W) the other image's, read through the part's map, in place.

    What would be read from outside the other image stays as it was, and so does what is not opaque there: opacity
    is (1, H, W), from 0 to 1. Says whether anything was read.
    """
    height, width = image.shape[-2:]
    source = part.pixels @ part.to_other[:, :2].T + part.to_other[:, 2]
    inside = ((source >= -0.5) & (source <= (width - 0.5, height - 0.5))).all(1)
    pixels, source = part.pixels[inside], source[inside]
    weight = torch.tensor(part.weight[inside], dtype=image.dtype)
    if opacity is not None:
        weight *= sample_bilinear(opacity, source)[0]
        opaque = weight.numpy() > 0
        pixels, source, weight = pixels[opaque], source[opaque], weight[opaque]
    x, y = pixels.T
    image[:, y, x] = image[:, y, x].lerp(sample_bilinear(other, source), weight)
    return bool(inside.any())


def edit_latents(
    latents: Tensor,
    reference_latent: Tensor,
    poses: Sequence[Pose],
    reference_pose: Pose,
    parts: str = "face,hands",
) -> Counter[str]:
    """Moves parts of the reference to where each target pose has them, in place.

    latents: (M, C, h, w), one per pose; reference_latent: (C, h, w), of the same timestep; parts: a key of
    `parts.PARTS`, "face,hands" as in the paper, or "body" for all of it. Where a part lies in the target, the
    latent becomes the reference's, read through the part's map; what it would read from outside the
    reference stays as it was. Returns how many regions were edited of each part.
    """
    height, width = latents.shape[-2:]
    # On the host: many tiny operations, which a graphics card is slow to start.
    reference_latent, edited_latents, edited = reference_latent.cpu(), latents.cpu(), Counter()
    for latent, pose in zip(edited_latents, poses, strict=True):
        moved = PARTS[parts](pose, reference_pose, height, width)
        edited.update({part.name for part in moved if move(latent, reference_latent, part)})
    latents.copy_(edited_latents)
    return edited


# ---- Sampling -----------------------------------------------------------------------------------


@torch.inference_mode()
def sample(
    model,
    latents: Tensor,
    hints: Tensor,
    context: Tensor,
    steps: int = 50,
    guidance: float = 1.0,
    empty_context: Tensor | None = None,
    edit: Callable[[Tensor, int], None] | None = None,
    slicing: Sequence[Slicing] | None = None,
    guidance_until: int = 0,
) -> Tensor:
    """DDIM from noise to clean latents, the whole clip at once.

    latents: (F, C, h, w), the noise; hints: control images (F, 3, H, W), or what `embed_hints` made of them;
    context: the target prompt's. A guidance scale other than 1 also needs `empty_context`, the empty
    prompt's, and doubles the cost of the steps it counts for: all, as in the paper, or those down to the timestep
    `guidance_until`, after which the scale is 1 (Kynkäänniemi et al., 2024, guide in such an interval).
    `edit(latents, step)` is called before each step, counted from 1, and once more after the last, with the next
    number, and may change the latents in place.
    `slicing`: ways to fit in memory, the next where one does not; by default those of `slicing.plans`.
    """
    latents = latents.clone()
    contexts = [Context(context)] + ([Context(empty_context)] if guidance != 1 else [])
    slicing = list(slicing or plans(*network_inputs(model).values(), finest_map(model, latents)))
    inputs, placed = network_inputs(model), {}

    def place_hints() -> Tensor | Offloaded:
        """The hints where the way that is tried now wants them."""
        outside = slicing[0].offload and hints.shape[1] != 3
        if outside not in placed:
            placed.clear()
            placed[outside] = Offloaded(hints, inputs["device"]) if outside else hints.to(**inputs)
        return placed[outside]

    def predict(timestep: int) -> Tensor:
        compared = contexts if timestep >= guidance_until else contexts[:1]
        noises = (predict_noise(model, latents, timestep, c, place_hints()) for c in compared)
        noise, *unguided = noises
        return unguided[0].lerp_(noise, guidance) if unguided else noise

    timesteps = ddim_timesteps(steps)
    stride = TRAIN_STEPS // steps
    for step, timestep in enumerate(tqdm(timesteps, desc="sampling"), start=1):
        if edit is not None:
            edit(latents, step)
        noise = frugally(lambda timestep=timestep: predict(timestep), slicing)
        latents = ddim_step(latents, noise, timestep, timestep - stride)
    if edit is not None:
        edit(latents, steps + 1)
    return latents


def finest_map(model, latents: Tensor) -> tuple[int, int, int, int]:
    """The shape of a clip's feature maps at the UNet's finest level."""
    frames, _, height, width = latents.shape
    return frames, model.unet.config.widths[0], height, width
