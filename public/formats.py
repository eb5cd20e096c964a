"""Files of tensors, safetensors or PyTorch's own, read without running code that they bring along."""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

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
        self.path, self.tensors = path, None
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
        if self.tensors is not None:
            return self.tensors[name]
        # Opened anew for every tensor, because what has been read of a mapping counts as this program's memory
        # until the mapping is closed.
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(name)


def unpickle(path: Path, zipped: bool) -> dict[str, Tensor]:
    """The tensors of a `.pth`, `.ckpt` or `.bin` file, which may nest them under `state_dict`.

    zipped: whether the file is of the newer kind, whose tensors can be mapped rather than read
    """
    # PyTorch would not believe that a file called .safetensors is one of its own.
    mapped = zipped and path.suffix != ".safetensors"
    try:
        with path.open("rb") as file:
            source = path if mapped else file
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
