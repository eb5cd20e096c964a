"""Which LoRAs a model is changed by: as the command line says it, and as a run remembers it. Imports no torch."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from safe.provenance import file_hash


@dataclass(frozen=True)
class LoRA:
    """A file of small matrices that are added to a model's weights."""

    file: str
    weight: float = 1.0  # how strongly
    sha256: str = ""  # of the file; empty: any will do


def parse_lora(text: str) -> LoRA:
    """ "style.safetensors:0.7" -> that file at weight 0.7; without a weight, 1."""
    file, colon, weight = text.rpartition(":")
    try:
        if not (file and math.isfinite(float(weight))):
            raise ValueError
        return LoRA(file, float(weight))
    except ValueError:
        # A colon may belong to the file's name.
        if text and (not colon or Path(text).is_file()):
            return LoRA(text)
    told = "is not a file and its weight, such as style.safetensors:0.7"
    raise argparse.ArgumentTypeError(f"{text!r} {told}")


def digest(lora: LoRA) -> str:
    if not Path(lora.file).is_file():
        raise FileNotFoundError(f"{lora.file}: no such file, given as LoRA")
    return file_hash(Path(lora.file))


def remember_loras(loras: Sequence[LoRA]) -> list[dict] | None:
    """What a run's settings say of its LoRAs; None without any. Raises FileNotFoundError for a missing one."""
    return [asdict(replace(lora, sha256=digest(lora))) for lora in loras] or None


def recall_loras(settings: dict) -> list[LoRA]:
    """The LoRAs of a run. Raises OSError or ValueError where one is missing, or no longer what it was."""
    remembered = settings.get("loras") or []
    try:
        loras = [LoRA(str(each["file"]), float(each["weight"]), str(each["sha256"])) for each in remembered]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"the run's settings: {remembered!r:.60} given as loras; train again") from None
    for lora in loras:
        if digest(lora) != lora.sha256:
            told = "is not the LoRA that the run was trained with"
            raise ValueError(f"{lora.file}: {told}; put that back, or train again")
    return loras
