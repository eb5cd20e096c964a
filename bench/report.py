"""The tables of `card.py`: known rows in a JSON file, and a section for each GPU in a Markdown file."""

import datetime
import json
import math
import re
import subprocess
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from video import replacing

ROOT = Path(__file__).resolve().parents[1]
GIGA = 1e9
NOT_INSTALLED, DOES_NOT_FIT = "not installed", "does not fit"
CPU = "CPU rehearsal"

HEADER = """# GPUs, measured

`python bench/card.py` wrote this file: a section for each GPU that it ran on. Times are medians of 3 runs (of 1,
where a run takes more than 20 seconds) after one to warm up. GB are 10^9 bytes. Memory:

- predicted: by `memory.py`, without measuring anything;
- allocated: the most bytes of tensors at a time, weights included;
- reserved: the most bytes that PyTorch's allocator held;
- taken: what the free memory of the GPU fell by, so libraries' workspaces count too, but not the CUDA context;
- host: the largest resident memory of the process so far.
"""


@dataclass(frozen=True)
class Table:
    """A part of a section. A row is a dict with these columns, or with a `reason` in place of what it lacks."""

    title: str
    columns: tuple[str, ...]
    fills: dict[
        str, Callable[[dict], None]
    ]  # what measures a row, by its key: the part's letter and a name
    note: str = ""


class Rows:
    """The known rows of one GPU. A file keeps them, beside the Markdown file, with those of other GPUs.

    Rows that were measured under another description, such as another driver, count as unknown.
    """

    def __init__(self, out: Path, about: dict[str, str]):
        self.file, self.about = out.with_suffix(".json"), about
        tiny = ", tiny sizes" if about["sizes"] == "tiny" else ""
        self.title = about["card"] + tiny
        known = self._sections().get(self.title)
        if known is None or known["about"] != about:
            known = {"about": about, "date": f"{datetime.date.today()}", "rows": {}}
        self.date: str = known["date"]
        self.known: dict[str, dict] = known["rows"]

    def measured(self, key: str, fill: Callable[[dict], None]) -> dict:
        """The row of this key; `fill` measures it if it is not known. Running out of memory is a result, too."""
        if key not in self.known:
            row = {}
            try:
                fill(row)
            except (MemoryError, RuntimeError) as error:
                if not isinstance(error, MemoryError) and "out of memory" not in str(error):
                    raise
                row["reason"] = DOES_NOT_FIT
            self.known[key] = row
            self._save()
        return self.known[key]

    def _sections(self) -> dict[str, dict]:
        return json.loads(self.file.read_text()) if self.file.exists() else {}

    def _save(self) -> None:
        """What is not installed may be there next time, and is not kept."""
        kept = {k: row for k, row in self.known.items() if row.get("reason") != NOT_INSTALLED}
        section = {"about": self.about, "date": self.date, "rows": kept}
        with replacing(self.file) as unfinished:
            sections = self._sections() | {self.title: section}
            unfinished.write_text(json.dumps(sections, indent=1) + "\n")


def describe(device: torch.device, tiny: bool) -> dict[str, str]:
    """What figures depend on: the GPU and the software."""
    about = {
        "sizes": "tiny" if tiny else "full",
        "PyTorch": torch.__version__,
        "commit": said_by("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"),
    }
    if device.type != "cuda":
        return {"card": CPU} | about
    card = torch.cuda.get_device_properties(device)
    return {
        "card": card.name,
        "compute capability": f"{card.major}.{card.minor}",
        "memory": f"{card.total_memory / GIGA:.1f} GB",
        "driver": said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "CUDA": str(torch.version.cuda),
        "cuDNN": str(torch.backends.cudnn.version()),
    } | about


def said_by(*command: str) -> str:
    """The first line that a command prints."""
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.partition("\n")[0].strip()


# ---- Markdown -----------------------------------------------------------------------------------


def write_report(out: Path, rows: Rows, tables: list[Table]) -> None:
    """Puts the GPU's section into the file, in place of its older one. Other sections stay as they are."""
    head, *sections = re.split(r"(?m)^(?=## )", out.read_text() if out.exists() else HEADER)
    about = ", ".join(f"{name} {value}" for name, value in rows.about.items() if name != "card")
    parts = [f"## {rows.title}\n", f"{rows.date}; {about}.\n"]
    if rows.about["card"] == CPU:
        parts.append("This is a CPU rehearsal of the code: no figure here is a GPU's.\n")
    parts += [markdown(table, rows.known) for table in tables]
    titles = [section.partition("\n")[0] for section in sections]
    place = titles.index(f"## {rows.title}") if f"## {rows.title}" in titles else len(sections)
    sections[place : place + 1] = ["\n".join(parts)]
    with replacing(out) as unfinished:
        unfinished.write_text("\n".join(text.rstrip() + "\n" for text in (head, *sections)))


def markdown(table: Table, known: dict[str, dict]) -> str:
    part = min(table.fills)[0]
    lines = [f"### {part}: {table.title}\n"]
    lines += [textwrap.fill(table.note, 115) + "\n"] if table.note else []
    lines += ["| | " + " | ".join(table.columns) + " |", "| --- |" + " --- |" * len(table.columns)]
    for key in table.fills:
        row = known.get(key, {"reason": "not measured yet"})
        cells = [written(row.get(column)) for column in table.columns]
        if "reason" in row:
            cells[0] = row["reason"]
        lines.append(f"| {key[2:]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def written(value: float | str | None) -> str:
    """Three digits, and a dash for what there is not."""
    if not isinstance(value, float):
        return "–" if value is None else str(value)
    return f"{value:.0f}" if math.isfinite(value) and abs(value) >= 100 else f"{value:.3g}"
