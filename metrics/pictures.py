"""Pictures of figures: curves over frames, and the worst frames."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PAPER, INK, FAINT, LINE = (24, 24, 27), (212, 212, 216), (63, 63, 70), (96, 165, 250)


def plot(curves: dict[str, np.ndarray], width: int = 960, panel: int = 220) -> Image.Image:
    """One panel per curve (F,), under each other: its value over the frame, mean dashed."""
    double = 2  # drawn twice as large and averaged down, which smooths the lines
    font = ImageFont.load_default(size=14 * double)
    left, right, top, bottom = 70 * double, 20 * double, 34 * double, 26 * double
    width, panel = width * double, panel * double
    picture = Image.new("RGB", (width, panel * len(curves)), PAPER)
    ink = ImageDraw.Draw(picture)
    for row, (title, values) in enumerate(curves.items()):
        low, mean, high = values.min(), values.mean(), values.max()
        x = left + (width - left - right) * np.arange(len(values)) / max(1, len(values) - 1)
        ceiling, floor = row * panel + top, (row + 1) * panel - bottom

        def height(value: np.ndarray, low=low, span=high - low, ceiling=ceiling, floor=floor):
            return floor - (floor - ceiling) * ((value - low) / span if span else 0 * value + 0.5)

        ink.text((left, ceiling - top // 2), title, INK, font, anchor="lm")
        labels = {float(height(v)): f"{v:.4g}" for v in (low, high)}
        for y, label in labels.items():
            ink.line((left, y, width - right, y), FAINT, double)
            ink.text((left - 6 * double, y), label, INK, font, anchor="rm")
        y = float(height(mean))
        for start in range(left, width - right, 12 * double):
            ink.line((start, y, min(start + 6 * double, width - right), y), INK, double)
        ink.text((width - right, ceiling - top // 2), f"mean {mean:.4g}", INK, font, anchor="rm")
        points = np.stack([x, height(values)], axis=1)
        ink.line([tuple(point) for point in points.tolist()], LINE, 2 * double, joint="curve")
        for frame in np.unique(np.linspace(0, len(values) - 1, 9).astype(int)).tolist():
            ink.text((x[frame], floor + bottom // 2), str(frame), INK, font, anchor="mm")
    return picture.reduce(double)


def worst_frames(
    result: np.ndarray, truth: np.ndarray, quality: np.ndarray, count: int = 8, height: int = 192
) -> Image.Image:
    """A strip of the frames of lowest quality (F,), in dB, worst first: truth above, result below."""
    font = ImageFont.load_default(size=max(12, height // 12))
    gap, line = 8, round(1.6 * font.size)
    width = round(height * truth.shape[2] / truth.shape[1])
    worst = np.argsort(quality, kind="stable")[:count].tolist()
    margin = gap + round(font.getlength("result")) + gap
    size = margin + len(worst) * (width + gap), line + 2 * (height + gap)
    strip = Image.new("RGB", size, PAPER)
    ink = ImageDraw.Draw(strip)
    for row, label in enumerate(("truth", "result")):
        y = line + row * (height + gap) + height // 2
        ink.text((gap, y), label, INK, font, anchor="lm")
    for column, index in enumerate(worst):
        left = margin + column * (width + gap)
        title = f"{index}: {quality[index]:.1f} dB"
        ink.text((left + width // 2, line // 2), title, INK, font, anchor="mm")
        for row, frames in enumerate((truth, result)):
            frame = Image.fromarray(frames[index]).resize((width, height), Image.Resampling.LANCZOS)
            strip.paste(frame, (left, line + row * (height + gap)))
    return strip
