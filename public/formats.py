"""Files of tensors, safetensors or PyTorch's own, read without running code that they bring along."""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from safe.files import read_json

BROKEN = "truncated, corrupt or no file of weights; fetch it again"
# What weights are mistaken for, by how the file begins.
NOT_WEIGHTS = {
    (b"version https://git-lfs",): "a Git LFS pointer: get the file itself with `git lfs pull`",
    (b"<!doctype html", b"<html"): "a web page: download the file itself",
}


class TensorFile:
    """The named tensors of a file, each read when asked for.

    shapes: {name: shape} of all tensors
    Raises ValueError for a file that is broken, or that would run code on being read.
    """

    def __init__(self, path: Path):
        with path.open("rb") as file:
            head = file.read(32)
        for starts, what in NOT_WEIGHTS.items():
            if head.lower().startswith(starts):
                raise ValueError(f"{path}: {what}")
        self.path, self.tensors, self.shards = path, None, None
        if path.name.endswith(".json") and ".index." in path.name:
            self.shards = read_shards(path)
            self.shapes = {name: file.shapes[name] for name, file in self.shards.items()}
            return
        # A zip archive, or a pickle as before PyTorch 1.6. Safetensors has the length of its header, then a brace.
        if head.startswith((b"PK", b"\x80")) and head[8:9] != b"{":
            self.tensors = unpickle(path, zipped=head.startswith(b"PK"))
            self.shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
            return
        try:
            with safe_open(path, "pt") as file:
                self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path}: {BROKEN} ({error})") from None

    def read(self, name: str) -> Tensor:
        """One tensor, mapped from the file where its format allows, so valid while that stays."""
        if self.shards is not None:
            return self.shards[name].read(name)
        if self.tensors is not None:
            return self.tensors[name]
        # Opened anew for every tensor, because what has been read of a mapping counts as this program's memory
        # until the mapping is closed.
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(name)


def read_shards(index: Path) -> dict[str, TensorFile]:
    """The files beside an index that hold its tensors: {name of a tensor: file}.

    Raises FileNotFoundError for a missing one, ValueError where index and files do not agree.
    """
    places = read_json(index)
    places = places.get("weight_map") if isinstance(places, dict) else None
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise ValueError(f"{index}: does not say which file holds which tensor; fetch it again")
    files = {}
    for place in sorted(set(places.values())):
        path = index.parent / place
        if Path(place).name != place or not path.is_file():
            raise FileNotFoundError(f"{path}: is missing, but {index.name} lists it; fetch it again")
        files[place] = TensorFile(path)
    shards = {name: files[place] for name, place in places.items()}
    unlisted = {name for file in files.values() for name in file.shapes} ^ shards.keys()
    unlisted |= {name for name, file in shards.items() if name not in file.shapes}
    if unlisted:
        raise ValueError(f"{index}: {min(unlisted)} is not where the index says; fetch the model again")
    return shards


# What Lightning writes beside the tensors, as in the public v1-5-pruned.ckpt: read as a name, never called.
HARMLESS = ["pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"]
HARMLESS += [name.replace("pytorch_lightning", "lightning.pytorch") for name in HARMLESS]


class Unread:
    """Stands for a class that a pickle names and nobody here needs."""


def unpickle(path: Path, zipped: bool) -> dict[str, Tensor]:
    """The tensors of a `.pth`, `.ckpt` or `.bin` file, which may nest them under `state_dict`.

    zipped: whether the file is of the newer kind, whose tensors can be mapped rather than read
    """
    # PyTorch would not believe that a file called .safetensors is one of its own.
    mapped = zipped and path.suffix != ".safetensors"
    try:
        with path.open("rb") as file:
            source = path if mapped else file
            with torch.serialization.safe_globals([(Unread, name) for name in HARMLESS]):
                contents = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged pickle can raise anything
        wanted = re.search(r"GLOBAL ([\w.]+) ", str(error))
        why = "on being read, which is refused because it could run any code; use a .safetensors file of the model"
        raise ValueError(f"{path}: {f'wants to call {wanted[1]} {why}' if wanted else BROKEN}") from None
    while isinstance(contents, dict) and "state_dict" in contents:
        contents = contents["state_dict"]
    if not isinstance(contents, dict) or not all(isinstance(name, str) for name in contents):
        raise ValueError(f"{path}: holds no tensors by name")
    return {name: tensor for name, tensor in contents.items() if isinstance(tensor, Tensor)}
