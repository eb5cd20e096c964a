"""What stands behind puppets, and puppets in disguise.

A base model that has only seen flat puppets in a dozen cloth colours maps everything to those. So it also sees
puppets under random colour transforms, shading and grain, in front of landscapes of noise, shapes and lettering.
"""

import colorsys
import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
from PIL import Image, ImageDraw, ImageFont

RGB = tuple[int, int, int]
LETTERS = "ABCDEFGHIKLMNOPRSTUVWXYZabcdefghiklmnoprstuvwxyz0123456789"
BACKGROUNDS = ("flat", "gradient", "room", "window", "stripes", "shapes", "noise")


@dataclass(frozen=True)
class Background:
    """What stands behind a puppet; never moves."""

    kind: str  # one of BACKGROUNDS
    colours: tuple[RGB, RGB, RGB]
    seed: int  # places the shapes and the noise


def random_background(rng: np.random.Generator, worn: list[RGB]) -> Background:
    def colour(lightness: float) -> RGB:
        """Of a few soft colours the one farthest from everything the puppet wears."""
        draws = rng.uniform((0, 0, 0, 20), (1, 1, 1, 110), (6, 4))
        tints = (draws[:, :3] - draws[:, :3].mean(axis=1, keepdims=True)) * draws[:, 3:]
        candidates = np.clip(lightness + tints, 20, 245).astype(int).tolist()
        return tuple(max(candidates, key=lambda rgb: min(math.dist(rgb, other) for other in worn)))

    lightness, step = rng.uniform(75, 225), rng.uniform(18, 45) * rng.choice((-1, 1))
    kind = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    colours = tuple(colour(lightness + difference) for difference in (0, step, -step))
    return Background(kind, colours, seed=int(rng.integers(2**31)))


@lru_cache(maxsize=256)
def draw_background(background: Background, side: int) -> Image.Image:
    """The transparent (alpha 0) background, RGBA, side x side pixels."""
    rng = np.random.default_rng(background.seed)
    kind, (a, b, c) = background.kind, background.colours
    share = np.zeros((side, side, 1))  # of colour b against colour a
    if kind == "gradient":
        share += np.linspace(0, 1, side)[:, None, None]
    if kind == "noise":
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6), dtype=np.uint8))
        share += np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))[..., None] / 255
    image = Image.fromarray((a + share * np.subtract(b, a)).astype(np.uint8))
    draw = ImageDraw.Draw(image)

    def scaled(*corners: float) -> list[float]:
        return [side * corner for corner in corners]

    if kind in ("room", "window"):
        floor, left = rng.uniform(0.70, 0.85), rng.uniform(0.03, 0.62)
        draw.rectangle(scaled(0, floor, 1, 1), b)
        draw.rectangle(scaled(0, floor - 0.012, 1, floor + 0.008), shade(b, 0.75))
        if kind == "window":
            draw.rectangle(scaled(left, 0.1, left + 0.34, 0.5), shade(c, 0.7))
            for x, y in product((left + 0.02, left + 0.18), (0.12, 0.31)):
                draw.rectangle(scaled(x, y, x + 0.14, y + 0.17), mix(c, (190, 225, 250), 0.6))
    elif kind == "stripes":
        count, start, slant = rng.integers(4, 9), rng.uniform(0, 0.1), rng.uniform(-0.3, 0.3)
        for i in range(-4, 2 * count + 4, 2):
            x, w = start + i / (2 * count), 1 / (2 * count)
            draw.polygon(scaled(x, 0, x + w, 0, x + w + slant, 1, x + slant, 1), b)
    elif kind == "shapes":
        for rgb in (b, c, b, c, b):
            x, y, r = rng.uniform((0, 0, 0.06), (1, 1, 0.2))
            shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
            shape(scaled(x - r, y - r, x + r, y + r), rgb)
    image.putalpha(0)
    return image


def shade(rgb: RGB, factor: float) -> RGB:
    """Darker for factors below 1, lighter above."""
    return tuple(min(255, int(c * factor)) for c in rgb)


def mix(a: RGB, b: RGB, share: float) -> RGB:
    return tuple(int(x + share * (y - x)) for x, y in zip(a, b))


# ---- Disguise -----------------------------------------------------------------------------------


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
    rows, horizon = np.linspace(0, 1, size)[:, None, None], rng.uniform(0.3, 1.2)
    sky = random_colour(rng) * (1 - rows) + random_colour(rng) * rows
    scene = np.where(rows < horizon, sky, random_colour(rng)) * np.ones((size, size, 3))
    for above in (True, False):
        share = (rng.uniform(0, 1.5) * texture(rng, size))[..., None]
        scene += np.where((rows < horizon) == above, share * (random_colour(rng) - 128), 0)
    image = Image.fromarray(scene.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.choice((0, 2, 5, 12))):
        (x, y), (w, h) = rng.uniform(0, size, 2), size * rng.lognormal(-2.3, 0.8, 2)
        colour, kind = tuple(random_colour(rng).astype(int)), rng.integers(4)
        if kind < 2:
            shape = draw.rectangle if kind else draw.ellipse
            shape((x - w, y - h, x + w, y + h), colour)
        elif kind == 2:
            corners = (x, y) + rng.uniform(-2, 2, (3, 2)) * (w, h)
            draw.polygon(corners.ravel().tolist(), colour)
        else:
            text = "".join(rng.choice(list(LETTERS), rng.integers(2, 8)))
            font = ImageFont.load_default(float(size * rng.uniform(0.06, 0.25)))
            draw.text((x - size / 4, y), text, colour, font)
    return np.asarray(image, np.float32)


def recolouring(rng: np.random.Generator) -> np.ndarray:
    """A random turn of all hues about the grey axis, with more or less saturation: a matrix (3, 3)."""
    angle, saturation = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 1.6)
    grey, across = np.ones((3, 3)) / 3, np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    return grey + saturation * (np.cos(angle) * (np.eye(3) - grey) + np.sin(angle) * across)


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
