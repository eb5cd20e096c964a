"""The colours of a drawn skeleton: its ground, and which pixels may be joint, limb, finger or face."""

from dataclasses import dataclass

import numpy as np

BLACK = 48  # the brightest level of what counts as black
ALIKE = 32  # levels by which a compressed ground may differ from its colour


def sampled(frames: np.ndarray) -> np.ndarray:
    """Eight to fifteen frames of a clip, or all of a shorter one, which tell how all of it is drawn."""
    return frames[:: max(1, len(frames) // 8)]


def find_ground(frames: np.ndarray) -> tuple[np.ndarray, tuple[slice, slice]]:
    """What a clip, uint8 RGB (F, H, W, 3), is drawn on: the colour (3,), and the box inside bars or a border."""
    edge = np.median(frames[:, [0, 0, -1, -1], [0, -1, 0, -1]], axis=(0, 1))
    differs = np.mean([is_unlike(frame, edge) for frame in frames], axis=0)
    # Bars are as straight as rows and columns; around a skeleton the rest of the row is ground.
    rows, columns = (np.flatnonzero(differs.mean(axis=axis) > 0.2) for axis in (1, 0))
    if len(rows) > 4 + len(differs) // 4 and len(columns) > 4 + len(differs[0]) // 4:
        # Within soft edges.
        top, bottom, left, right = rows[0] + 2, rows[-1] - 1, columns[0] + 2, columns[-1] - 1
        box = frames[:, top:bottom, left:right]
        sides = np.concatenate([box[:, 0], box[:, -1], box[:, :, 0], box[:, :, -1]], axis=1)
        ground = np.median(sides, axis=(0, 1))
        if np.abs(ground - edge).max() > ALIKE:
            return ground, (slice(top, bottom), slice(left, right))
    return edge, (slice(None), slice(None))


def is_unlike(frame: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Which pixels of a frame, uint8 (H, W, 3), are clearly of another colour (3,): bool (H, W)."""
    return np.abs(frame - colour.astype(np.int16)).max(axis=2) > ALIKE


def put_on_black(frame: np.ndarray, ground: np.ndarray, box: tuple[slice, slice]) -> np.ndarray:
    """The frame, uint8 (H, W, 3), with its ground painted black, and what lies outside the box.

    A grey or white ground is taken out of soft edges too: as all inks but white lack red, green or blue, the
    least of the three tells how much of the ground shines through.
    """
    if ground.max() <= BLACK and box == (slice(None), slice(None)):
        return frame
    picture, grey = frame[box].astype(np.float32), ground.mean()
    if np.ptp(ground) <= ALIKE / 2:
        low = picture.min(axis=2, keepdims=True)
        through = low.clip(max=grey)
        picture += (low - through) * grey / max(255 - grey, 1) - through  # white stays white
    else:
        picture[~is_unlike(frame[box], ground)] = 0
    on_black = np.zeros_like(frame)
    on_black[box] = picture.clip(0, 255)
    return on_black


@dataclass(frozen=True)
class Ink:
    """What is drawn on one frame: maps (H, W) of what the pixels may be, with a margin on each side."""

    radius: float  # pixels: of the discs of joints, and half the width of limbs
    margin: int  # pixels, so that neighbours can be looked up
    joint: np.ndarray  # 0 to 17: as bright as the disc of that body keypoint, or -1
    limb: np.ndarray  # 0 to 16: as dark as that limb, or -1
    bone: np.ndarray  # 0 to 19: as bright as that bone of a hand, or -1
    white: np.ndarray  # bool
    black: np.ndarray  # bool


def read_ink(frame: np.ndarray, radius: float) -> Ink:
    """Sorts the pixels of a frame, uint8 (H, W, 3), by their colours."""
    margin = int(5 * radius) + 2
    rgb = np.pad(frame, ((margin, margin), (margin, margin), (0, 0))).astype(np.float32)
    (red, green, blue), high, low = np.moveaxis(rgb, 2, 0), rgb.max(axis=2), rgb.min(axis=2)
    chroma = (high - low).clip(1)
    from_red, from_green, from_blue = (green - blue) / chroma, (blue - red) / chroma, (red - green) / chroma
    hue = np.where(high == green, from_green + 2, from_blue + 4)
    hue = np.where(high == red, from_red % 6, hue)  # 0 to 6
    coloured, bright = (high > BLACK) & (chroma > 0.5 * high), high > 0.75 * 255
    body_hue, bone_hue = np.rint(hue * 3).astype(int) % 18, np.rint(hue / 0.3).astype(int) % 20
    joint, bone = (np.where(coloured & bright, each, -1) for each in (body_hue, bone_hue))
    limb = np.where(coloured & ~bright & (body_hue < 17), body_hue, -1)
    return Ink(radius, margin, joint, limb, bone, white=(low > 130) & ~coloured, black=high <= BLACK)


def components(classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (N, 2), as (x, y), of the classes of a map (H, W) whose border is -1, no class; and labels (N,) that
    those share which are connected, each to those of its 8 neighbours that have its class.
    """
    y, x = np.nonzero(classes >= 0)
    label, number = np.arange(len(y)), np.full(classes.shape, -1)
    number[y, x] = label
    beside = [(y + dy, x + dx) for dy, dx in ((0, 1), (1, -1), (1, 0), (1, 1))]
    alike = [np.stack([label, number[at]])[:, classes[y, x] == classes[at]] for at in beside]
    first, second = np.concatenate(alike, axis=1)
    while (label[first] != label[second]).any():
        np.minimum.at(label, label[first], label[second])
        np.minimum.at(label, label[second], label[first])
        label = label[label]
    return np.stack([x, y], axis=1), label


def has_colours(frame: np.ndarray) -> bool:
    """Whether a frame (H, W, 3) is mostly black and the rest has the colours of a drawing."""
    ink, bright = read_ink(frame, 1), (frame.max(axis=2) > BLACK).sum()
    limbs = (ink.limb >= 0).sum()
    in_colour = ((ink.joint >= 0) | ink.white).sum() + limbs
    return bright <= 0.35 * frame[..., 0].size and in_colour >= 0.75 * bright and limbs >= 0.2 * bright


def hint_at_drawing(frame: np.ndarray) -> str:
    """What to say where nobody is found in a clip with this frame, uint8 RGB (H, W, 3), that may be drawn, or "".

    Footage has shades everywhere; drawings are flat, and what is not their ground is saturated.
    """
    frame = put_on_black(frame, *find_ground(frame[None])).astype(np.int16)
    steps, high = np.abs(np.diff(frame, axis=1)).max(axis=2), frame.max(axis=2)
    saturated = (np.ptp(frame, axis=2) > 0.5 * high)[high > BLACK]
    is_flat = (steps <= 4).mean() > 0.8 and len(saturated) and saturated.mean() > 0.4
    return "; if these are drawn skeletons, add --poses-are drawn" if is_flat else ""
