"""Pictures of figures: curves over frames, and the worst frames."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pictures.sheets import INK, PAPER, contact_sheet

FAINT, LINE = (63, 63, 70), (96, 165, 250)


def plot(curves: dict[str, np.ndarray], width: int = 960, panel: int = 220) -> Image.Image:
    """One panel per curve (F,), under each other: its value over the frame, mean dashed."""
    # Drawn twice as large and averaged down, which smooths the lines.
    width, panel, left, right, top, bottom = (2 * pixels for pixels in (width, panel, 70, 20, 34, 26))
    font, end = ImageFont.load_default(28), width - right
    picture = Image.new("RGB", (width, panel * len(curves)), PAPER)
    ink = ImageDraw.Draw(picture)
    for row, (title, values) in enumerate(curves.items()):
        ceiling, floor = row * panel + top, (row + 1) * panel - bottom
        low, high, mean = values.min(), values.max(), values.mean()
        levels = np.array([low, high, mean, *values])
        share = (levels - low) / (high - low) if high > low else np.full(len(levels), 0.5)
        y_low, y_high, y_mean, *y = (floor - (floor - ceiling) * share).tolist()
        x = (left + (end - left) * np.arange(len(values)) / max(1, len(values) - 1)).tolist()

        ink.text((left, ceiling - top // 2), title, INK, font, anchor="lm")
        ink.text((end, ceiling - top // 2), f"mean {mean:.4g}", INK, font, anchor="rm")
        for height, label in {y_low: f"{low:.4g}", y_high: f"{high:.4g}"}.items():
            ink.line((left, height, end, height), FAINT, 2)
            ink.text((left - 12, height), label, INK, font, anchor="rm")
        for start in range(left, end, 24):
            ink.line((start, y_mean, min(start + 12, end), y_mean), INK, 2)
        ink.line(list(zip(x, y)), LINE, 4, joint="curve")
        for frame in np.unique(np.linspace(0, len(values) - 1, 9).astype(int)).tolist():
            ink.text((x[frame], floor + bottom // 2), str(frame), INK, font, anchor="mm")
    return picture.reduce(2)


def worst_frames(
    result: np.ndarray, truth: np.ndarray, quality: np.ndarray, count: int = 8, height: int = 192
) -> Image.Image:
    """A sheet of the frames of lowest quality (F,), in dB, worst first: truth above, result below."""
    worst = np.argsort(quality, kind="stable")[:count]
    titles = [f"{index}: {quality[index]:.1f} dB" for index in worst]
    return contact_sheet({"truth": truth[worst], "result": result[worst]}, count, height, titles)
