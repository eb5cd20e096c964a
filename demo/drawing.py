"""How the walkthrough draws: sheets of pictures, latents in false colours, weights as bars and as light."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from metrics.pictures import FAINT, LINE
from pictures.sheets import GAP, INK
from pictures.sheets import PAPER as BACKGROUND

CELL, TITLE, CAPTION = 192, 30, 22  # pixels: a picture's width, and the heights of what is written above
HEAT = (250, 204, 21)
PARTS = {"face": HEAT, "left_hand": (96, 165, 250), "right_hand": (248, 113, 113)}


def sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """Rows of pictures, with a title above each row that has one."""
    width = GAP + max(sum(picture.width + GAP for picture in row) for _, row in rows)
    heights = [TITLE * bool(title) + max(picture.height for picture in row) + GAP for title, row in rows]
    page, y = Image.new("RGB", (width, GAP + sum(heights)), BACKGROUND), GAP
    for (title, row), height in zip(rows, heights):
        ImageDraw.Draw(page).text((GAP, y + 15), title, INK, ImageFont.load_default(19), anchor="lm")
        x = GAP
        for picture in row:
            page.paste(picture, (x, y + TITLE * bool(title)))
            x += picture.width + GAP
        y += height
    return page


def captioned(caption: str, picture: Image.Image) -> Image.Image:
    taller = Image.new("RGB", (picture.width, picture.height + CAPTION), BACKGROUND)
    taller.paste(picture, (0, CAPTION))
    middle = picture.width // 2, CAPTION // 2
    ImageDraw.Draw(taller).text(middle, caption, INK, ImageFont.load_default(16), anchor="mm")
    return taller


def shrunk(frame: np.ndarray, width: int = CELL) -> Image.Image:
    """A frame uint8 (H, W, 3) as a picture of this width."""
    size = width, round(width * frame.shape[0] / frame.shape[1])
    return Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)


def false_colours(latent: Tensor, width: int = CELL) -> Image.Image:
    """Three channels of a latent (C, h, w) as red, green and blue, from -2 to 2; pixels stay squares."""
    colours = ((latent[:3].float() / 4 + 0.5) * 255).clamp(0, 255).byte().permute(1, 2, 0)
    size = width, round(width * colours.shape[0] / colours.shape[1])
    return Image.fromarray(colours.cpu().numpy()).resize(size, Image.Resampling.NEAREST)


def framed(picture: Image.Image) -> Image.Image:
    """With a border, which says that this is the chosen one."""
    picture = picture.copy()
    corners = 0, 0, picture.width - 1, picture.height - 1
    ImageDraw.Draw(picture).rectangle(corners, outline=HEAT, width=4)
    return picture


def crossed(picture: Image.Image, point: np.ndarray) -> Image.Image:
    """With a ring around a point (x, y), canvas-normalised."""
    picture, (x, y) = picture.copy(), point * picture.size
    radius, pen = max(8, picture.width // 32), ImageDraw.Draw(picture)
    for r, colour, line in ((radius + 1, BACKGROUND, 4), (radius, HEAT, 2)):
        pen.ellipse((x - r, y - r, x + r, y + r), outline=colour, width=line)
    return picture


def number(value: float, share: float, width: int, height: int) -> Image.Image:
    """A number on a bar that fills a share of the picture, from 0 to 1."""
    picture = Image.new("RGB", (width, height), FAINT)
    pen, middle = ImageDraw.Draw(picture), (width // 2, height // 2)
    pen.rectangle((0, round(height * (1 - share)), width, height), fill=LINE)
    text, font = f"{value:.2f}" if value < 100 else f"{value:.0f}", ImageFont.load_default(17)
    pen.text(middle, text, "white", font, anchor="mm", stroke_width=2, stroke_fill=BACKGROUND)
    return picture


def heated(frame: np.ndarray, weights: np.ndarray, width: int) -> Image.Image:
    """Weights (h, w) as light on a dark grey frame (H, W, 3)."""
    grey = np.asarray(Image.fromarray(frame).convert("L").convert("RGB")) * 0.4
    light = Image.fromarray((weights / np.quantile(weights, 0.995)).clip(0, 1).astype(np.float32))
    light = np.asarray(light.resize(frame.shape[1::-1], Image.Resampling.NEAREST))[..., None]
    return shrunk((grey * (1 - light) + np.array(HEAT) * light).astype(np.uint8), width)


def outlined(latent: Tensor, hulls: dict[str, np.ndarray], width: int) -> Image.Image:
    """A latent (C, h, w) in false colours, with the outline of each part's hull (K, 2), in latent pixels."""
    picture = false_colours(latent, width)
    for name, hull in hulls.items():
        corners = list(map(tuple, ((hull + 0.5) * width / latent.shape[-1]).tolist()))
        for colour, line in ((BACKGROUND, 7), (PARTS[name], 3)):
            outline = [*corners, *corners[:2]]
            ImageDraw.Draw(picture).line(outline, fill=colour, width=line, joint="curve")
    return picture
