"""Contact sheets: several clips in one picture."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PAPER, INK, GAP = (24, 24, 27), (212, 212, 216), 8


def contact_sheet(
    rows: dict[str, Sequence[np.ndarray]], columns: int = 8, height: int = 192, titles: Sequence[str] = ()
) -> Image.Image:
    """A picture of several clips, one under the other, to compare at a glance.

    `rows` maps a label to frames, uint8 RGB (H, W, 3), of any size and number. Each row shows up to `columns` of
    its frames, evenly spaced from first to last, `height` pixels high and under their titles (default: their
    numbers).
    Raises ValueError for a row without frames.
    """
    for label, frames in rows.items():
        if not len(frames):
            raise ValueError(f'contact sheet: the row "{label}" has no frames')
    font = ImageFont.load_default(size=max(12, height // 10))
    line = round(1.5 * font.size)
    margin = 2 * GAP + max(round(font.getlength(label)) for label in rows)
    widths = (round(height * frames[0].shape[1] / frames[0].shape[0]) for frames in rows.values())
    cell_width, longest = max(widths), max(min(columns, len(frames)) for frames in rows.values())
    size = margin + longest * (cell_width + GAP), len(rows) * (line + height) + GAP
    sheet = Image.new("RGB", size, PAPER)
    ink = ImageDraw.Draw(sheet)

    for row, (label, frames) in enumerate(rows.items()):
        top = row * (line + height) + line
        ink.text((GAP, top + height // 2), label, INK, font, anchor="lm")
        shown = np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int)
        for column, index in enumerate(shown):
            frame = Image.fromarray(frames[index])
            width = round(height * frame.width / frame.height)
            centre = margin + column * (cell_width + GAP) + cell_width // 2
            title = titles[index] if titles else str(index)
            ink.text((centre, top - line // 2), title, INK, font, anchor="mm")
            cell = frame.resize((width, height), Image.Resampling.LANCZOS)
            sheet.paste(cell, (centre - width // 2, top))
    return sheet
