"""A pseudo video that moves: beyond the paper, whose supplement calls a better one an open question.

The paper starts from a video that repeats one training frame. Here the person's parts, cut out of the training
frames of a still camera, are put before their background as each target pose has them (`pseudo_video`). Sampling
is held to that (`hold_to_pseudo_video`), and the networks make what is neither part nor background.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from beyond.body import NAMES, body_parts, covered, may_cover
from posecrafter import (
    PAPER,
    EditInputs,
    Edits,
    Method,
    TrainingFrames,
    add_noise,
    alpha_cumprod,
    ddim_timesteps,
    decode_latents,
    edit_latents,
    edit_once,
    encode_frames,
    image_tensor,
    move,
)
from poses.parts import fit_affine, point_pairs
from poses.pose import Pose, is_seen

# ---- What is behind the person ------------------------------------------------------------------


def bodies(poses: Sequence[Pose], height: int, width: int) -> Tensor:
    """Where people may be, see `may_cover`: booleans (F, 1, height, width), in latent pixels."""
    return torch.from_numpy(np.stack([may_cover(pose, height, width) for pose in poses]))[:, None]


def empty_places(people: Tensor) -> Tensor:
    """Where `bodies` (F, 1, h, w) have no people within two pixels, which latents show too, and hair may reach."""
    return max_around(people.float(), 2) == 0


def max_around(images: Tensor, reach: int) -> Tensor:
    """The maximum over the square of 2 * reach + 1 pixels around each pixel of images (..., C, H, W)."""
    rows = F.max_pool2d(images, (1, 2 * reach + 1), 1, (0, reach))
    return F.max_pool2d(rows, (2 * reach + 1, 1), 1, (reach, 0))


def mean_of_empty(images: Tensor, poses: Sequence[Pose]) -> tuple[Tensor, Tensor, Tensor]:
    """Where images (F, C, h, w) are empty (F, 1, h, w), in how many frames (1, h, w), and their mean (C, h, w)."""
    empty = empty_places(bodies(poses, *images.shape[-2:])).to(images)
    count = empty.sum(dim=0)
    return empty, count, (images * empty).sum(dim=0) / count.clamp(min=1)


# The largest `background_change` of a still camera. A dancer's before a tripod is .002 at most, that of a camera
# which trembles by a quarter of a latent pixel .006 to .04, less where there is nothing to blur.
STILL = 0.004


def background_change(frames: np.ndarray, poses: Sequence[Pose], factor: int) -> float:
    """How much what is behind the person changes from frame to frame, uint8 (F, H, W, 3): 0 for a still camera.

    The variance over frames where nobody stands, as a share of the images' own, of squares of `factor` pixels.
    Infinite where no place can be compared.
    """
    images = F.avg_pool2d(image_tensor(frames), factor)
    empty, count, mean = mean_of_empty(images, poses)
    compared = count[0] > 1
    if not compared.any():
        return math.inf
    variance = ((images - mean).square() * empty).sum(dim=0) / (count - 1).clamp(min=1)
    own = images.var(dim=(0, 2, 3)).mean().clamp(min=1e-6)
    return (variance[:, compared].mean() / own).item()


def without_people(latents: Tensor, poses: Sequence[Pose]) -> tuple[Tensor, Tensor]:
    """What clips of a still camera (F, C, h, w) show behind the person, (C, h, w), and where, booleans (1, h, w).

    Where somebody always stands it is a guess, continued from all sides. Raises ValueError if that is everywhere.
    """
    _, count, behind = mean_of_empty(latents, poses)
    known = (count > 0).to(latents)
    if not known.any():
        raise ValueError("people, or where they may be, fill all frames: there is no background")
    while not known.all():
        share = F.avg_pool2d(known, 3, 1, 1)
        around = F.avg_pool2d(behind, 3, 1, 1) / share.clamp(min=1 / 9)
        behind, known = torch.where(known > 0, behind, around), (share > 0).to(latents)
    return behind, count > 0


def uncovered(poses: Sequence[Pose], reference_pose: Pose, known: Tensor) -> Tensor:
    """Where poses leave the background to be seen: booleans (M, 1, h, w), in latent pixels.

    That is where it is `known`, (1, h, w), and empty; and, known or not, what only the reference's body covers.
    """
    height, width = known.shape[1:]
    people = bodies(poses, height, width).to(known)
    left = torch.from_numpy(covered(reference_pose, height, width) > 0).to(known) & ~people
    return left | (empty_places(people) & known)


# ---- The person, moved --------------------------------------------------------------------------

# What any training frame may lend: some parts, the landmarks that tell how alike they look, and the parts they
# are joined to, and so always partly behind or before.
LENT = {
    "head": ({"hair", "head"}, "face", {"torso"}),
    "face": ({"face"}, "face", {"hair", "head", "torso"}),
    "left_hand": ({"left_hand", "left_fingers"}, "left_hand", {"left_forearm"}),
    "right_hand": ({"right_hand", "right_fingers"}, "right_hand", {"right_forearm"}),
}
# How much a pixel differs from the background (white is 1): below, it is not the person; above, it surely is.
DIFFERENCE = 0.03, 0.09

Masks = Mapping[str, np.ndarray]


def part_masks(pose: Pose, height: int, width: int) -> Masks:
    """The pixels of a body's parts by name: booleans (height, width), all False for a part that is not there."""
    masks = {name: np.zeros((height, width), bool) for name in NAMES}
    for part in body_parts(pose, pose, height, width):
        x, y = part.pixels[part.weight > 0.5].T
        masks[part.name][y, x] = True
    return masks


def union(masks: Masks, names: Iterable[str]) -> np.ndarray:
    """The pixels of any of the parts of these names: booleans (height, width)."""
    return np.logical_or.reduce([masks[name] for name in names])


def cut_out(image: Tensor, behind: Tensor, known: Tensor, masks: Masks) -> Tensor:
    """How much of each pixel is the person, from 0 to 1: (1, H, W), of an image (3, H, W) in [0, 1].

    behind: the background, a like image; masks: the pose's `part_masks`. Where the background is `known`,
    (1, H, W), the person is all that differs from it; elsewhere, what has rather the colours of the body's inside.
    """
    height, width = image.shape[1:]
    difference = F.avg_pool2d((image - behind).square().mean(dim=0).sqrt()[None], 3, 1, 1)
    low, high = DIFFERENCE
    differs = ((difference - low) / (high - low)).clamp(0, 1)
    body = torch.from_numpy(union(masks, NAMES - {"hair"}))  # hair's is wide
    inside = 1 - max_around(1 - body.float()[None], max(height, width) // 32)

    bins = (image * 15.99).long()
    bins = (bins[0] * 16 + bins[1]) * 16 + bins[2]

    def frequency(chosen: Tensor) -> Tensor:
        """Of each pixel's colour, and the like, among those of the chosen pixels, (1, H, W): (H, W)."""
        counts = torch.bincount(bins[chosen[0]], minlength=16**3).float().view(1, 1, 16, 16, 16)
        return F.avg_pool3d(counts / counts.sum().clamp(min=1), 3, 1, 1).view(-1)[bins]

    persons, grounds = frequency(inside > 0.5), frequency(known & (differs == 0))
    likely = (persons + 1e-6) / (persons + grounds + 1e-6)  # colours of neither are the person's
    return torch.where(known, differs, likely).maximum(inside)


def hidden(pose: Pose, masks: Masks) -> dict[str, float]:
    """By keys of LENT: the share of pixels under other parts, and that of landmarks outside; 1 if not seen."""
    shares = dict.fromkeys(LENT, 1.0)
    for lent, (names, told_by, joined) in LENT.items():
        own, others = union(masks, names), union(masks, NAMES - names - joined)
        landmarks = getattr(pose, told_by)
        points = landmarks[is_seen(landmarks), :2]
        if own.any() and len(points):
            outside = ((points < 0) | (points > 1)).any(axis=1)
            shares[lent] = (own & others).sum() / own.sum() + outside.mean()
    return shares


def unlikeness(landmarks: np.ndarray, other: np.ndarray, height: int, width: int) -> float:
    """How far landmarks (K, 3) are from others after the best affine map, as a share of their size, and the share
    of them that the others lack. Infinite without a map.
    """
    here, there, both = point_pairs(landmarks, other, height, width)
    here, there = here[both], there[both]
    to_here = fit_affine(there, here)
    if to_here is None:
        return math.inf
    off = there @ to_here[:, :2].T + to_here[:, 2] - here
    missing = (is_seen(landmarks).sum() - both.sum()) / len(landmarks)
    return float(np.sqrt((off**2).sum(axis=1).mean()) / np.ptp(here, axis=0).max() + missing)


def lenders(
    target: Pose, poses: Sequence[Pose], costs: Sequence[Mapping[str, float]], height: int, width: int
) -> dict[str, int]:
    """The training frame that lends each part, by name: the most alike, with the least `hidden` as its cost."""
    frames = {}
    for lent, (names, told_by, _) in LENT.items():
        pairs = ((getattr(target, told_by), getattr(pose, told_by)) for pose in poses)
        sums = [unlikeness(*pair, height, width) + cost[lent] for pair, cost in zip(pairs, costs)]
        if np.isfinite(sums).any():
            frames |= dict.fromkeys(names, int(np.argmin(sums)))
    return frames


def pseudo_video(
    frames: np.ndarray,
    poses: Sequence[Pose],
    reference: int,
    targets: Sequence[Pose],
    behind: np.ndarray,
    known: Tensor,
) -> tuple[np.ndarray, Tensor]:
    """The person of the training frames, uint8 (N, H, W, 3), in M target poses: uint8 (M, H, W, 3); and where that
    is no guess, booleans (M, 1, h, w).

    All parts are the `reference` frame's, but for head and hands, see `lenders`. behind: the background, uint8
    (H, W, 3); known: where it is no guess, booleans (1, h, w), of latent pixels.
    """
    size = behind.shape[:2]
    background, ones = image_tensor(behind)[0], torch.ones(1, *size)
    shown, latent_size = known.repeat(len(targets), 1, 1, 1), known.shape[1:]
    known = F.interpolate(known[None].float().cpu(), size)[0] > 0

    @cache
    def cut(frame: int) -> tuple[Tensor, Tensor, Tensor]:
        """A frame with a channel of ones (4, H, W), the person in it, and the head alone."""
        image, masks = image_tensor(frames[frame])[0], part_masks(poses[frame], *size)
        person = cut_out(image, background, known, masks)
        rest = torch.from_numpy(union(masks, NAMES - {"hair", "head", "face"}))
        return torch.cat([image, ones]), person, person.masked_fill(rest, 0)

    costs = [hidden(pose, part_masks(pose, *size)) for pose in poses]
    video = np.empty((len(targets), *size, 3), np.uint8)
    for i, target in enumerate(tqdm(targets, desc="moving parts", leave=False)):
        frame_of = lenders(target, poses, costs, *size)
        lending = {reference, *frame_of.values()}
        moved = {frame: list(body_parts(target, poses[frame], *size)) for frame in lending}
        canvas = torch.cat([background, 0 * ones])
        names = [part.name for part in body_parts(target, target, *size)]  # from far to near
        for name in dict.fromkeys(names):
            for frame in dict.fromkeys((frame_of.get(name, reference), reference)):
                image, person, head = cut(frame)
                parts = [part for part in moved[frame] if part.name == name]
                for part in parts:
                    move(canvas, image, part, head if name in ("hair", "head") else person)
                if parts:  # else no map takes the part from there
                    break
        video[i] = (canvas[:3] * 255).round().byte().permute(1, 2, 0).numpy()
        shown[i] |= (F.adaptive_max_pool2d(canvas[3:], latent_size) > 0.5).to(shown)
    return video, shown


def moved_person(
    model, run: TrainingFrames, reference: int, targets: Sequence[Pose]
) -> tuple[np.ndarray, Tensor, Tensor]:
    """`pseudo_video` before the background that the training frames show, and where that is known: (1, h, w)."""
    behind, known = without_people(encode_frames(model, run.frames), run.poses)
    (background,) = decode_latents(model, behind[None])
    return *pseudo_video(run.frames, run.poses, reference, targets, background, known), known


# ---- What sampling is held to -------------------------------------------------------------------

# Latents are held before steps from timesteps no lower than this: the last steps close the seams. Where the pseudo
# video shows but a guess, beside hair, they are held until networks no longer put the reference's hair there.
HELD_UNTIL, GUESS_HELD_UNTIL = 100, 500
# Distances of finished latents from the pseudo video's, where their own variance is about 1: below the first, they
# become the pseudo video's; above the second, they stay.
ALIKE = 0.3, 0.5


def restore(latents: Tensor, pseudo: Tensor, share: Tensor) -> None:
    """Where finished latents (M, C, h, w) are nearly the pseudo video's (see ALIKE), makes them so, in place.

    share: (M, 1, h, w), how far, from 0 to 1. The distance is a root mean square over channels and 3x3 pixels.
    """
    squares = (latents.float() - pseudo.float()).square().mean(dim=1, keepdim=True)
    distance = F.avg_pool2d(squares, 3, 1, 1, count_include_pad=False).sqrt()
    near, far = ALIKE
    latents.lerp_(pseudo, ((far - distance) / (far - near)).clamp(0, 1) * share)


def hold_to_pseudo_video(scene: EditInputs) -> Edits:
    """The editor of HELD: target frames are held to a pseudo video that moves, made of the training frames.

    From the edit step on, before each step down to HELD_UNTIL, latents become the pseudo video's, as noisy, where
    a part was moved to or the background is `uncovered`: all frames look at the reference, whose limbs are
    elsewhere. After the last step comes `restore`. If the edit step is too late, parts are moved once.
    """
    timesteps = ddim_timesteps(len(scene.trajectory) - 1)
    if timesteps[scene.edit_step - 1] < HELD_UNTIL:
        return edit_once(scene)
    places = scene.targets, scene.run.poses[scene.reference], scene.parts
    video, shown, known = moved_person(scene.model, scene.run, scene.reference, scene.targets)
    pseudo = encode_frames(scene.model, video)

    # The noise of the reference goes with its parts: networks that see another in a shirt make a pattern of it.
    a = alpha_cumprod(timesteps[scene.edit_step - 1])
    reference_latent = scene.trajectory[len(scene.trajectory) - scene.edit_step][0]
    own_noise = (reference_latent - math.sqrt(a) * scene.trajectory[0][0]) / math.sqrt(1 - a)
    random = torch.Generator().manual_seed(scene.seed)
    noise = torch.randn(own_noise.shape, generator=random).to(own_noise).repeat(len(scene.targets), 1, 1, 1)
    edit_latents(noise, own_noise, *places)
    body = torch.zeros_like(pseudo[:, :1])
    regions = edit_latents(body, torch.ones_like(body[0]), *places)
    sure = body * shown
    seen = uncovered(*places[:2], known).to(body)
    outside = np.stack([1 - covered(pose, *body.shape[-2:]) for pose in scene.targets])
    outside = max_around(torch.from_numpy(outside[:, None]).to(body), 2)  # and two pixels in

    def before_step(latents: Tensor, step: int) -> None:
        if step >= scene.edit_step and (timestep := timesteps[step - 1]) >= HELD_UNTIL:
            moved = body if timestep >= GUESS_HELD_UNTIL else sure
            latents.lerp_(add_noise(pseudo, noise, timestep), moved.maximum(seen))

    def finish(latents: Tensor) -> None:
        restore(latents, pseudo, sure.maximum(outside * known))

    return Edits(before_step, finish, regions)


# The body's parts moved once, after a fifth of the steps, which scores best on puppets. The key frame is replayed,
# which scores better too (docs/BEYOND.md).
BODY = Method("body", parts=body_parts, edit_step=None, replay=True)
HELD = Method("held", parts=body_parts, edit_step=None, editor=hold_to_pseudo_video, replay=True)
METHODS = {method.name: method for method in (PAPER, BODY, HELD)}
