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

from bench.common import GIGA, ROOT, table
from safe.files import replacing, write_json

NOT_INSTALLED, DOES_NOT_FIT, CPU = "not installed", "does not fit", "CPU rehearsal"
HEADER = """# GPUs, measured

`python bench/card.py` wrote this file: a section for each GPU that it ran on. Times are medians of 3 runs (of 1,
where a run takes more than 20 seconds) after one to warm up. GB are 10^9 bytes. Memory:

- predicted: by `sample.py --plan`'s code, without measuring anything;
- allocated: the most bytes of tensors at a time, weights included;
- taken: what the free memory of the GPU fell by, so libraries' workspaces count too, but not the CUDA context;
- host: the largest resident memory of the process so far.
"""


@dataclass(frozen=True)
class Table:
    """A part of a section. A row is a dict with these columns, or with a `reason` in place of what it lacks."""

    title: str
    columns: tuple[str, ...]
    fills: dict[str, Callable[[dict], None]]  # measure a row each, by its key: the part's letter and a name
    note: str = ""

    def markdown(self, known: dict[str, dict]) -> str:
        def cells(key: str) -> list[str]:
            row = known.get(key, {"reason": "not measured yet"})
            first, *rest = (written(row.get(column)) for column in self.columns)
            return [key[2:], row.get("reason", first), *rest]

        title = f"### {min(self.fills)[0]}: {self.title}"
        lines = "\n".join(table(("", *self.columns), map(cells, self.fills)))
        return "\n\n".join(filter(None, [title, textwrap.fill(self.note, 115), lines])) + "\n"


def written(value: float | str | None) -> str:
    """Three digits, and a dash for what there is not."""
    if not isinstance(value, float):
        return "–" if value is None else str(value)
    return f"{value:.0f}" if math.isfinite(value) and abs(value) >= 100 else f"{value:.3g}"


class Rows:
    """The known rows of one GPU. A file keeps them, beside the Markdown file, with those of other GPUs.

    Rows that were measured under another description, such as another driver, count as unknown.
    """

    def __init__(self, out: Path, about: dict[str, str]):
        self.out, self.file = out, out.with_suffix(".json")
        self.title = about["card"] + (", tiny sizes" if about["sizes"] == "tiny" else "")
        new = {"about": about, "date": f"{datetime.date.today()}", "rows": {}}
        stored = self._sections().get(self.title, new)
        self.section = stored if stored["about"] == about else new
        self.known: dict[str, dict] = self.section["rows"]

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
        kept = {key: row for key, row in self.known.items() if row.get("reason") != NOT_INSTALLED}
        sections = self._sections() | {self.title: self.section | {"rows": kept}}
        write_json(self.file, sections)

    def write_report(self, tables: list[Table]) -> None:
        """Puts the GPU's section into the Markdown file, in place of its older one. Other sections stay."""
        text = self.out.read_text() if self.out.exists() else HEADER
        head, *parts = re.split(r"(?m)^## (.*)\n", text)
        sections, about = dict(zip(parts[::2], parts[1::2])), self.section["about"]
        software = ", ".join(f"{name} {value}" for name, value in about.items() if name != "card")
        said = [f"\n{self.section['date']}; {software}.\n"]
        if about["card"] == CPU:
            said.append("This is a CPU rehearsal of the code: no figure here is a GPU's.\n")
        sections[self.title] = "\n".join(said + [each.markdown(self.known) for each in tables])
        texts = [head, *(f"## {title}\n{body}" for title, body in sections.items())]
        with replacing(self.out) as unfinished:
            unfinished.write_text("\n".join(text.rstrip() + "\n" for text in texts))


def describe(device: torch.device, tiny: bool) -> dict[str, str]:
    """What figures depend on: the GPU and the software."""
    commit = said_by("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    about = {"sizes": "tiny" if tiny else "full", "PyTorch": torch.__version__, "commit": commit}
    if device.type != "cuda":
        return {"card": CPU} | about
    card = torch.cuda.get_device_properties(device)
    return about | {
        "card": card.name,
        "memory": f"{card.total_memory / GIGA:.1f} GB",
        "driver": said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "CUDA": str(torch.version.cuda),
        "cuDNN": str(torch.backends.cudnn.version()),
    }


def said_by(*command: str) -> str:
    """The first line that a command prints."""
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.partition("\n")[0].strip()
