"""The colours of a drawn skeleton: which pixels may be a joint's, a limb's, a finger's or a dot of the face."""

from dataclasses import dataclass

import numpy as np

BLACK = 48  # the brightest level of what counts as black


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
    hue = np.where(
        high == red, from_red % 6, np.where(high == green, from_green + 2, from_blue + 4)
    )  # 0 to 6
    coloured, bright = (high > BLACK) & (chroma > 0.5 * high), high > 0.75 * 255
    body_hue, bone_hue = np.rint(hue * 3).astype(int) % 18, np.rint(hue / 0.3).astype(int) % 20
    return Ink(
        radius,
        margin,
        joint=np.where(coloured & bright, body_hue, -1),
        limb=np.where(coloured & ~bright & (body_hue < 17), body_hue, -1),
        bone=np.where(coloured & bright, bone_hue, -1),
        white=(low > 130) & ~coloured,
        black=high <= BLACK,
    )


def label_components(classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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
