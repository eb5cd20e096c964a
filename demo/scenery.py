"""Puppets in disguise: other colours, other light, and scenes that look more like the world behind them.

A base model that has only seen flat puppets in a dozen cloth colours maps everything to those. So it also sees
puppets under random colour transforms, shading and grain, in front of landscapes of noise, shapes and lettering.
"""

import colorsys

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LETTERS = "ABCDEFGHIKLMNOPRSTUVWXYZabcdefghiklmnoprstuvwxyz0123456789"


def smooth_field(rng: np.random.Generator, cells: int, size: int) -> np.ndarray:
    """A random field (size, size) in [0, 1] that varies over size / cells pixels."""
    grid = Image.fromarray(rng.random((cells, cells), np.float32))
    return np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC)).clip(0, 1)


def texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """Clouds, foliage or gravel (size, size) around 0: fields of halving scale, rougher or smoother."""
    roughness, octaves = rng.uniform(0.4, 1.0), range(1, rng.integers(3, 7))
    return sum(roughness**i * (smooth_field(rng, 2**i + 1, size) - 0.5) for i in octaves)


def random_colour(rng: np.random.Generator) -> np.ndarray:
    """Any hue, from grey to fully saturated, RGB in [0, 255]."""
    hue, saturation, value = rng.random(), rng.beta(1, 1.2), rng.uniform(0.1, 1)
    return 255 * np.array(colorsys.hsv_to_rgb(hue, saturation, value))


def random_scene(rng: np.random.Generator, size: int) -> np.ndarray:
    """Sky over ground, with shapes and lettering, float RGB (size, size, 3) in [0, 255]."""
    rows = np.linspace(0, 1, size)[:, None, None]
    horizon = rng.uniform(0.3, 1.2)
    sky = random_colour(rng) * (1 - rows) + random_colour(rng) * rows
    ground = random_colour(rng)
    scene = np.where(rows < horizon, sky, ground) * np.ones((size, size, 3))
    for above in (True, False):
        share = (rng.uniform(0, 1.5) * texture(rng, size))[..., None]
        tint = random_colour(rng) - 128
        scene += np.where((rows < horizon) == above, share * tint, 0)
    image = Image.fromarray(scene.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.choice((0, 2, 5, 12))):
        x, y = rng.uniform(0, size, 2)
        w, h = size * rng.lognormal(-2.3, 0.8, 2)
        colour = tuple(random_colour(rng).astype(int))
        kind = rng.integers(4)
        if kind == 0:
            draw.ellipse((x - w, y - h, x + w, y + h), fill=colour)
        elif kind == 1:
            draw.rectangle((x - w, y - h, x + w, y + h), fill=colour)
        elif kind == 2:
            corners = np.array([x, y]) + rng.uniform(-2, 2, (3, 2)) * (w, h)
            draw.polygon(corners.ravel().tolist(), fill=colour)
        else:
            text = "".join(rng.choice(list(LETTERS), rng.integers(2, 8)))
            font = ImageFont.load_default(size=float(size * rng.uniform(0.06, 0.25)))
            draw.text((x - size / 4, y), text, fill=colour, font=font)
    return np.asarray(image, np.float32)


def recolouring(rng: np.random.Generator) -> np.ndarray:
    """A random turn of all hues about the grey axis, with more or less saturation: a matrix (3, 3)."""
    angle, saturation = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 1.6)
    grey = np.ones((3, 3)) / 3
    across = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    turn = np.cos(angle) * (np.eye(3) - grey) + np.sin(angle) * across
    return grey + saturation * turn


def disguise(frames: np.ndarray, masks: np.ndarray, seed: int) -> np.ndarray:
    """One identity's frames uint8 (F, H, W, 3) with person masks bool (F, H, W), in one new look."""
    rng = np.random.default_rng(seed)
    height, width = frames.shape[1:3]
    size = max(height, width)
    looks = frames.astype(np.float32)
    if rng.random() < 0.8:
        looks = looks @ recolouring(rng).T.astype(np.float32)
    if rng.random() < 0.7:
        looks = np.where(masks[..., None], looks, random_scene(rng, size)[:height, :width])
    if rng.random() < 0.7:  # light that falls unevenly
        light = smooth_field(rng, 4, size)[:height, :width, None] - 0.5
        looks = looks * (1 + rng.uniform(0, 0.6) * light)
    contrast, brightness = rng.uniform(0.7, 1.2), rng.uniform(-30, 30)
    looks = (looks - 128) * contrast + 128 + brightness
    looks += rng.uniform(0, 5) * rng.standard_normal(looks.shape, np.float32)
    return looks.clip(0, 255).astype(np.uint8)
