"""The method: PoseCrafter (Zhong et al., ECCV 2024), from training frames and target poses to a new clip.

`generate` (in `generate_once`, at the end) is the whole pipeline, step by step. The steps are functions of their
own, and stand before it in the order in which it calls them.

`model` is a bundle with the attributes unet, controlnet, vae, text_encoder, tokenizer and guidance_until.
Latents are float32 (F, C, h, w) throughout (the demo model's have 8 channels) and times the VAE's scale; the
networks compute in their own precision.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from poses.parts import Part, face_and_hands
from poses.pose import Pose, draw_pose, pose_distance
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
    try:
        yield network.to(device)
    finally:
        network.to(home)


def image_tensor(frames: np.ndarray) -> Tensor:
    """Frames uint8 (..., H, W, 3) -> float32 (N, 3, H, W) in [0, 1], in channels_last memory."""
    frames = frames.reshape(-1, *frames.shape[-3:])
    return torch.tensor(frames).permute(0, 3, 1, 2).float() / 255


def check_finite(x: Tensor, made_by: str) -> None:
    """Raises FloatingPointError for numbers that no frame can be made of."""
    if not x.isfinite().all():
        raise FloatingPointError(f"{made_by} gave values that are not finite")


def through_vae(vae, code: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`code(x)`, the VAE's encoder or decoder, in its own precision; float32.

    Some public VAEs overflow in float16: then this one goes on in float32.
    """
    dtype = next(vae.parameters()).dtype
    y = code(x.to(dtype)).float()
    if dtype == torch.float16 and not y.isfinite().all():
        tqdm.write("the VAE overflowed in float16; it goes on in float32")
        vae.float()
        y = code(x.float())
    check_finite(y, "the VAE")
    return y


@torch.inference_mode()
def encode_frames(model, frames: np.ndarray) -> Tensor:
    """Frames uint8 (F, H, W, 3) -> latents float32 (F, C, H/s, W/s): the VAE's mean times its scale.

    The mean rather than a sample, so that a frame has one latent.
    """
    latents, device = [], network_inputs(model)["device"]
    with visiting(model.vae, device) as vae:
        # One at a time: full-resolution feature maps are the VAE's whole memory.
        for frame in frames:
            image = image_tensor(frame[None]).to(device, next(vae.parameters()).dtype) * 2 - 1
            latents.append(through_vae(vae, lambda x: vae.encode(x)[0], image) * vae.config.scale)
    return torch.cat(latents)


@torch.inference_mode()
def decode_latents(model, latents: Tensor, slice_size: int = 2) -> Iterator[np.ndarray]:
    """Latents (F, C, h, w) -> frames uint8 (H, W, 3), one after another, decoded a few at a time."""
    device = network_inputs(model)["device"]
    with visiting(model.vae, device) as vae:
        for part in latents.split(slice_size):
            images = through_vae(vae, vae.decode, (part / vae.config.scale).to(device))
            images = ((images + 1) * 127.5).round().clamp(0, 255).byte()
            yield from images.permute(0, 2, 3, 1).cpu().numpy()


@torch.inference_mode()
def encode_prompt(model, prompt: str) -> Tensor:
    """A prompt -> its context (tokens, context_dim), as the UNet wants it."""
    inputs = network_inputs(model)
    with visiting(model.text_encoder, inputs["device"]) as text_encoder:
        return text_encoder(model.tokenizer(prompt).to(inputs["device"])).to(**inputs)


@torch.inference_mode()
def embed_hints(model, poses: Sequence[Pose], height: int, width: int) -> Tensor:
    """What the ControlNet makes of poses, the same in every step: (F, C, h, w), in the host's memory.

    The poses are drawn as control images of height x width pixels, one at a time: an image is larger than its
    embedding.
    """
    images = (image_tensor(draw_pose(pose, height, width)).to(**network_inputs(model)) for pose in poses)
    return torch.cat([model.controlnet.embed_hint(image).cpu() for image in images])


# ---- The diffusion: Stable Diffusion 1.5's schedule and DDIM ------------------------------------

TRAIN_STEPS = 1000
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, TRAIN_STEPS, dtype=torch.float32) ** 2  # "scaled linear"
ALPHAS_CUMPROD = torch.cumprod(1 - BETAS, dim=0)
ALPHAS = ALPHAS_CUMPROD.tolist()


def ddim_timesteps(steps: int) -> list[int]:
    """The timesteps of a run of `steps` steps, from noise to image: 981, 961, ..., 1 for 50.

    Evenly spaced and one above the multiples ("steps offset 1"), as in the public schedulers. Raises ValueError
    outside 1 to 500, and for numbers that would start from half an image (334 steps start at 667).
    """
    if not 1 <= steps <= TRAIN_STEPS // 2 or TRAIN_STEPS % steps > TRAIN_STEPS // 10:
        raise ValueError(f"{steps} DDIM steps: give 1 to 100, or 125, 200, 250 or 500")
    stride = TRAIN_STEPS // steps
    return [i * stride + 1 for i in reversed(range(steps))]


def alpha_cumprod(timestep: int) -> float:
    """The share of the image in the variance at a timestep. DDIM's last step goes below 0, which counts as 0."""
    return ALPHAS[max(timestep, 0)]


def ddim_step(latents: Tensor, noise: Tensor, timestep: int, next_timestep: int) -> Tensor:
    """Moves latents from one timestep to another along the predicted noise, either way (eta 0).

    Song et al. 2021, DDIM, Eq. (12): the image that the noise implies, noised anew to the other timestep.
    """
    a, b = alpha_cumprod(timestep), alpha_cumprod(next_timestep)
    image = (latents - math.sqrt(1 - a) * noise).div_(math.sqrt(a))
    return image.mul_(math.sqrt(b)).add_(noise, alpha=math.sqrt(1 - b))


def add_noise(latents: Tensor, noise: Tensor, timestep: int) -> Tensor:
    """The forward process: what clean latents look like at a timestep."""
    a = alpha_cumprod(timestep)
    return math.sqrt(a) * latents + math.sqrt(1 - a) * noise


def predict_noise(
    model, latents: Tensor, timestep: int, context: Tensor | Context, hints: Tensor | Offloaded
) -> Tensor:
    """The noise that UNet and ControlNet see in latents (F, C, h, w), float32 alike.

    hints: what `embed_hints` makes of the poses; context: (tokens, context_dim).
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


LARGE = 2**22  # numbers in a clip's feature map: above this, train with gradient checkpointing


def use_gradient_checkpointing(model, latents: Tensor) -> None:
    """Turns on gradient checkpointing (Chen et al. 2016) for training on large frames, latents (F, C, h, w).

    Only the inputs of the blocks are kept. A third more is computed, for a fraction of the memory.
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

    Ignores targets without a person. Prefers training frames that can be compared with more targets, then the
    smallest sum. Raises ValueError when no pose can be compared.
    """
    distances = np.array([[pose_distance(one, other) for other in target_poses] for one in training_poses])
    comparable = np.isfinite(distances)
    if not comparable.any():
        raise ValueError("no training frame shares keypoints with a target pose: is a person in them?")
    sums = np.where(comparable, distances, 0).sum(axis=1)
    return int(np.lexsort((sums, -comparable.sum(axis=1)))[0])


# ---- Inversion of a pseudo video ----------------------------------------------------------------


@torch.inference_mode()
def invert(
    model, latent: Tensor, hint: Tensor, context: Tensor, steps: int = 50, fixed_point: int = 0
) -> list[Tensor]:
    """DDIM inversion of the reference frame: its way from image to noise.

    latent: (1, C, h, w), encoded; hint: what `embed_hints` makes of its own pose; context: the source prompt's.
    Returns `steps` + 1 latents: the image, then one per timestep up to the noise.

    The paper inverts a pseudo video that repeats this frame for every target pose. All its frames stay equal on
    the way: they share the key frame, temporal attention over equal tokens gives that token, and equal frames have
    one frame's norm statistics. So one frame is inverted, and the noise repeated.

    fixed_point: beyond the paper. Inversion predicts a step's noise from the latent that the step starts from,
    sampling from the latent that it leads to. Each further iteration predicts it there, which makes the step more
    nearly the inverse of sampling's (Pan et al., 2023, "Accelerated Iterative Diffusion Inversion").
    """
    trajectory, context = [latent], Context(context)
    hint = hint.to(**network_inputs(model))  # once, not in every step
    timesteps = ddim_timesteps(steps)
    stride = TRAIN_STEPS // steps
    for timestep in tqdm(timesteps[::-1], desc="inverting", leave=False):
        start = noisier = trajectory[-1]
        for _ in range(1 + fixed_point):
            noise = predict_noise(model, noisier, timestep, context, hint)
            noisier = ddim_step(start, noise, timestep - stride, timestep)
        trajectory.append(noisier)
    check_finite(trajectory[-1], "inversion")
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
            x_weight, y_weight = (f if d else 1 - f for d, f in zip((dx, dy), fraction.T))
            result = result + latent[:, y, x] * (x_weight * y_weight)
    return result


def move(image: Tensor, other: Tensor, part: Part, opacity: Tensor | None = None) -> bool:
    """Copies a part of the other image (C, H, W) into an image, in place, through the part's affine map.

    What would be read from outside the other image, or where that is not opaque, stays as it was; opacity:
    (1, H, W), from 0 to 1. Returns whether anything was read.
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


# (pose, other pose, height, width) -> the parts, with their maps from the one to the other.
Parts = Callable[[Pose, Pose, int, int], Iterable[Part]]


def edit_latents(
    latents: Tensor,
    reference_latent: Tensor,
    poses: Sequence[Pose],
    reference_pose: Pose,
    parts: Parts = face_and_hands,
) -> Counter[str]:
    """Moves parts of the reference to where each target pose has them, in place.

    latents: (M, C, h, w), one per pose; reference_latent: (C, h, w), of the same timestep; parts: which parts are
    moved. Where a part lies in the target, the latent becomes the reference's, read through the part's map; what
    it would read from outside the reference stays as it was. Returns how many regions were edited of each part.
    """
    height, width = latents.shape[-2:]
    # On the host: many tiny operations, which a graphics card is slow to start.
    reference_latent, edited_latents, edited = reference_latent.cpu(), latents.cpu(), Counter()
    for latent, pose in zip(edited_latents, poses, strict=True):
        moved = parts(pose, reference_pose, height, width)
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
    before_step: Callable[[Tensor, int], None] | None = None,
    slicing: Sequence[Slicing] | None = None,
    guidance_until: int = 0,
    predictor: Callable[..., Tensor] | None = None,
) -> Tensor:
    """DDIM from noise to clean latents, the whole clip at once.

    latents: (F, C, h, w), the noise; hints: what `embed_hints` makes of the poses; context: the target prompt's.
    A guidance scale other than 1 also needs `empty_context`, the empty prompt's, and doubles the cost of the steps
    it counts for: all, as in the paper, or those down to the timestep `guidance_until`, after which the scale is 1
    (Kynkäänniemi et al., 2024, guide in such an interval).
    `before_step(latents, step)` is called before each step, counted from 1, and may change the latents in place.
    `slicing`: ways to fit in memory, the next where one does not; by default those of `slicing.plans`.
    `predictor`: what to call instead of `predict_noise`.
    """
    latents = latents.clone()
    contexts = [Context(context)] + ([Context(empty_context)] if guidance != 1 else [])
    slicing = list(slicing or plans(*network_inputs(model).values(), finest_map(model, latents)))
    inputs, placed, share = network_inputs(model), {}, slicing[0].share

    def place_hints() -> Tensor | Offloaded:
        """The hints where the way that is tried now wants them."""
        outside = slicing[0].offload
        if outside not in placed:
            placed.clear()
            placed[outside] = Offloaded(hints, inputs["device"]) if outside else hints.to(**inputs)
        return placed[outside]

    def predict(timestep: int) -> Tensor:
        own = share.own(latents) if share else latents
        compared = contexts if timestep >= guidance_until else contexts[:1]
        see = predictor or predict_noise
        noise, *unguided = (see(model, own, timestep, each, place_hints()) for each in compared)
        noise = unguided[0].lerp_(noise, guidance) if unguided else noise
        return share.whole(noise) if share else noise

    timesteps = ddim_timesteps(steps)
    stride = TRAIN_STEPS // steps
    for step, timestep in enumerate(tqdm(timesteps, desc="sampling"), start=1):
        if before_step is not None:
            before_step(latents, step)
        noise = frugally(lambda timestep=timestep: predict(timestep), slicing)
        latents = ddim_step(latents, noise, timestep, timestep - stride)
    return latents


def finest_map(model, latents: Tensor) -> tuple[int, int, int, int]:
    """The shape of a clip's feature maps at the UNet's finest level."""
    frames, _, height, width = latents.shape
    return frames, model.unet.config.widths[0], height, width


# ---- The whole pipeline -------------------------------------------------------------------------


class TrainingFrames(Protocol):
    """What `generate` needs of a run: the training frames on canvas, uint8 (N, H, W, 3), and their poses."""

    frames: np.ndarray
    poses: Sequence[Pose]


@dataclass(frozen=True)
class Edits:
    """What happens to the target frames' latents (M, C, h, w) while they are sampled, in place."""

    before_step: Callable[[Tensor, int], None]  # gets the latents and the step, counted from 1
    finish: Callable[[Tensor], None]  # after the last step
    regions: dict[str, int]  # in how many frames each part is edited


NO_EDITS = Edits(lambda latents, step: None, lambda latents: None, {})


@dataclass(frozen=True)
class EditInputs:
    """What an editor plans its edits from."""

    model: object
    run: TrainingFrames
    reference: int  # which training frame was inverted
    targets: Sequence[Pose]
    trajectory: Sequence[Tensor]  # the reference's, from image to noise; see `invert`
    parts: Parts  # which parts are moved
    edit_step: int  # before which sampling step, counted from 1
    seed: int


def edit_once(scene: EditInputs) -> Edits:
    """The paper's editor: parts of the reference are moved into place before one step.

    They come from the latent of its trajectory that is as noisy as the step's input: the noise itself for step 1.
    """
    reference_latent = scene.trajectory[len(scene.trajectory) - scene.edit_step][0]
    places = scene.targets, scene.run.poses[scene.reference], scene.parts
    # Editing blank latents changes nothing, and counts the regions.
    touched = torch.zeros(len(scene.targets), 1, *reference_latent.shape[1:])
    regions = edit_latents(touched, torch.ones_like(touched[0]), *places)

    def before_step(latents: Tensor, step: int) -> None:
        if step == scene.edit_step:
            edit_latents(latents, reference_latent, *places)

    return Edits(before_step, lambda latents: None, regions)


@dataclass(frozen=True)
class Method:
    """One way to sample, as data. `PAPER` is PoseCrafter's; ablations change its fields one at a time."""

    name: str
    parts: Parts | None = face_and_hands  # which parts are edited; None: none
    edit_step: int | None = 1  # before which sampling step; None: after a fifth of the steps
    editor: Callable[[EditInputs], Edits] = edit_once
    insert: bool = True  # the reference leads the clip, as its key frame
    start: str = "inversion"  # or "noise": ControlVideo's start where there is no source video
    # Beyond the paper: the key frame is not sampled, but goes the way back that inversion came.
    replay: bool = False
    fixed_point: int = 0  # further iterations of each inversion step; see `invert`

    def step_of_edit(self, steps: int) -> int:
        """The number of the step, of `steps`, that editing comes before."""
        return 1 + steps // 5 if self.edit_step is None else self.edit_step

    @property
    def needs_inversion(self) -> bool:
        return self.start == "inversion" or self.parts is not None or self.replay


PAPER = Method("paper")


@dataclass(frozen=True)
class Generated:
    """A new clip."""

    latents: Tensor  # (M, C, h, w), clean: one frame for each target pose
    # (1, C, h, w), the reference as sampling gives it back; None if nothing was inserted.
    reconstruction: Tensor | None
    regions: dict[str, int]  # in how many frames each part was edited


def starting_noise(method: Method, trajectory: Sequence[Tensor], frames: int, seed: int) -> Tensor:
    """What sampling starts from, (frames, C, h, w): the reference's noise in every frame, or fresh noise."""
    noise = trajectory[-1].expand(frames, -1, -1, -1)
    if method.start == "inversion":
        return noise
    return torch.randn(noise.shape, generator=torch.Generator().manual_seed(seed)).to(noise)


def generate(model, run: TrainingFrames, *arguments, **options) -> Generated:
    """`generate_once`, in a precision that holds the numbers: where float16 overflows, all is done again wider.

    Raises FloatingPointError where that does not help, and MemoryError where the clip does not fit.
    """
    try:
        return generate_once(model, run, *arguments, **options)
    except FloatingPointError as error:
        if network_inputs(model)["dtype"] != torch.float16:
            raise
        tqdm.write(f"{error}: float16 overflowed; starting again in {widen(model)}")
    # Here the exception is gone, and with it what the first attempt held in memory.
    return generate_once(model, run, *arguments, **options)


@torch.inference_mode()
def generate_once(
    model,
    run: TrainingFrames,
    targets: Sequence[Pose],
    method: Method = PAPER,
    reference: int | None = None,
    steps: int = 50,
    source: str = "a person",
    prompt: str | None = None,
    guidance: float = 1.0,
    seed: int = 0,
    frames_per_slice: int | None = None,
    offload: str = "auto",
    share: Any = None,
    predictor: Callable[..., Tensor] | None = None,
) -> Generated:
    """The person of the training frames in M target poses: the whole method.

    model: fine-tuned on the run's frames; targets: on the run's canvas, with a person in each; reference: the
    training frame to start from (default: by `select_reference`); source: the training prompt; prompt: the
    target's (default: the same); seed: of fresh noise, where a method wants some; frames_per_slice, offload: see
    `slicing.plans`: they do not change the result; share: a `beyond.ranks.Share` of the frames sampled;
    predictor: see `sample`.
    """
    height, width = run.frames.shape[1:3]
    k = select_reference(run.poses, targets) if reference is None else reference
    context = encode_prompt(model, source)
    target_context = context if prompt in (None, source) else encode_prompt(model, prompt)
    empty_context = encode_prompt(model, "") if guidance != 1 else None

    latent = encode_frames(model, run.frames[k : k + 1])
    hint = embed_hints(model, [run.poses[k]], height, width)
    trajectory = [latent]
    if method.needs_inversion:
        trajectory = invert(model, latent, hint, context, steps, method.fixed_point)

    poses = insert_reference(run.poses[k], targets) if method.insert else list(targets)
    hints = embed_hints(model, poses[share.frames] if share else poses, height, width)
    noise = starting_noise(method, trajectory, len(poses), seed)
    inputs = EditInputs(model, run, k, targets, trajectory, method.parts, method.step_of_edit(steps), seed)
    edits = method.editor(inputs) if method.parts else NO_EDITS
    replayed = method.replay and method.insert

    def before_step(latents: Tensor, step: int) -> None:
        check_finite(latents, f"step {step - 1} of sampling")  # it waits for the device: cheap, once a step
        if replayed:
            latents[0] = trajectory[steps - step + 1][0]
        edits.before_step(latents[-len(targets) :], step)

    where = network_inputs(model).values()
    ways = plans(*where, finest_map(model, noise[: len(hints)]), frames_per_slice, offload)
    slicing = [replace(way, share=share) for way in ways]
    options = steps, guidance, empty_context, before_step, slicing, model.guidance_until, predictor
    latents = sample(model, noise, hints, target_context, *options)
    check_finite(latents, f"step {steps} of sampling")
    key_frame, latents = latents[: len(poses) - len(targets)], latents[-len(targets) :]
    edits.finish(latents)
    if replayed:  # a replayed key frame is exact; the reference sampled alone tells how faithful the run is
        key_frame = sample(model, trajectory[-1], hint, context, steps)
    return Generated(latents, key_frame if method.insert else None, edits.regions)


def widen(model) -> str:
    """Gives UNet and ControlNet a precision whose range is float32's; says which.

    bfloat16 where the hardware has it: CPUs, and cards of compute capability 8 on. Else float32, as on all Macs.
    """
    device = network_inputs(model)["device"]
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    dtype = torch.float32 if old or device.type == "mps" else torch.bfloat16
    for network in (model.unet, model.controlnet):
        network.to(dtype)
    return str(dtype).removeprefix("torch.")
