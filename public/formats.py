"""Files of tensors, safetensors or PyTorch's own, read without running code that they bring along."""

import io
import pickletools
import re
import zipfile
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from safe.files import mistaken, read_json

BROKEN = "truncated, corrupt or no file of weights; fetch it again"
LIGHTNING = "pytorch_lightning", "lightning.pytorch"
# What a pickle may name. PyTorch allows more, some of which takes any time and memory that a file asks for.
HARMLESS = re.compile(
    r"collections OrderedDict|builtins set|torch(\.storage)? \w+Storage"
    r"|torch (Size|device|Tensor|b?float\d+|u?int\d+)"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|parameter)|torch\.nn\.parameter Parameter"
    rf"|({'|'.join(LIGHTNING)})\.callbacks\.model_checkpoint ModelCheckpoint"
)
MOST_OPERATIONS = 1_000_000  # of a pickle, which are seconds; Stable Diffusion with its averages has 60,000
LARGEST_PICKLE = 64_000_000  # bytes, without the numbers of its tensors
# Bytes of the list of what is in a file, safetensors or archive: that of Stable Diffusion 1.5 has 200,000.
LARGEST_HEADER = 16_000_000


class TensorFile:
    """The named tensors of a file, each read when asked for.

    shapes: {name: shape} of all tensors
    Raises ValueError for a file that is broken, or that would run code on being read.
    """

    def __init__(self, path: Path):
        if not path.is_file():  # a pipe would be waited for
            raise FileNotFoundError(f"{path}: no such file of weights")
        with path.open("rb") as file:
            head = file.read(64)
        zipped = head.startswith(b"PK")
        if not zipped and (told := mistaken(head)):
            raise ValueError(f"{path}: {told}")
        self.path, self.tensors, self.shards = path, None, None
        if path.name.endswith(".json") and ".index." in path.name:
            self.shards = read_shards(path)
            self.shapes = {name: file.shapes[name] for name, file in self.shards.items()}
            return
        # A zip archive, or a pickle as before PyTorch 1.6. Safetensors has the length of its header, then a brace.
        if head.startswith((b"PK", b"\x80")) and head[8:9] != b"{":
            self.tensors = unpickle(path, zipped)
            self.shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        else:
            if LARGEST_HEADER < int.from_bytes(head[:8], "little") <= path.stat().st_size:
                raise ValueError(f"{path}: lists far more than a model's tensors; use another file")
            try:
                with safe_open(path, "pt") as file:
                    self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            except SafetensorError as error:
                raise ValueError(f"{path}: {BROKEN} ({str(error)!r:.200})") from None
        for name in self.shapes:  # some are shown to the user
            if len(name) > 250 or not name.isprintable():
                raise ValueError(f"{path}: {name!r:.60} is no name of a tensor; use another file")

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
UNREAD = [f"{lightning}.callbacks.model_checkpoint.ModelCheckpoint" for lightning in LIGHTNING]


class Unread:
    """Stands for a class that a pickle names and nobody here needs."""


def unpickle(path: Path, zipped: bool) -> dict[str, Tensor]:
    """The tensors of a `.pth`, `.ckpt` or `.bin` file, which may nest them under `state_dict`.

    zipped: whether the file is of the newer kind, whose tensors can be mapped rather than read
    """
    # PyTorch would not believe that a file called .safetensors is one of its own.
    mapped = zipped and path.suffix != ".safetensors"
    try:
        sizes = check_archive(path) if zipped else check_old_pickles(path)
        with path.open("rb") as file:
            source = path if mapped else file
            with torch.serialization.safe_globals([(Unread, name) for name in UNREAD]):
                contents = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except Refused as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle can raise anything
        wanted = re.search(r"GLOBAL ([\w.]+) ", str(error))
        raise ValueError(f"{path}: {would_call(wanted[1]) if wanted else BROKEN}") from None
    for _ in range(3):  # not for ever: a dictionary may hold itself
        if isinstance(contents, dict) and "state_dict" in contents:
            contents = contents["state_dict"]
    contents = contents if isinstance(contents, dict) else {}
    tensors = {name: tensor for name, tensor in contents.items() if isinstance(tensor, Tensor)}
    if not tensors or not all(isinstance(name, str) for name in contents):
        raise ValueError(f"{path}: holds no tensors by name; use another file")
    check_tensors(path, tensors, sizes)
    return tensors


class Refused(ValueError):
    """What a file would do on being read."""


def would_call(name: str) -> str:
    why = "on being read, which is refused because it could run any code; use a .safetensors file of the model"
    return f"wants to call {name:.100} {why}"


class Bounded(io.BufferedReader):
    """A file of which nothing is read that would fill the memory at once, such as a list of millions of names."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path))

    def read(self, size: int = -1) -> bytes:
        if size > LARGEST_HEADER:
            raise Refused(BROKEN)
        return super().read(size)

    def readline(self, size: int = -1) -> bytes:
        line = super().readline(LARGEST_HEADER)
        if len(line) == LARGEST_HEADER:
            raise Refused(BROKEN)
        return line


def check_archive(path: Path) -> set[int]:
    """The sizes of an archive's members. Raises Refused for one that would unfold to more than the file."""
    with Bounded(path) as source, zipfile.ZipFile(source) as archive:
        members = archive.infolist()
        size = sum(member.file_size for member in members)
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            advice = "PyTorch compresses nothing: save the tensors anew, or use a .safetensors file"
            raise Refused(f"a compressed archive of {size / 1e9:.2f} GB, which is not unfolded; {advice}")
        if size > path.stat().st_size:
            raise Refused(BROKEN)
        for member in members:
            if member.filename.endswith(".pkl"):
                with archive.open(member) as file:
                    check_pickle(file, member.file_size)
    return {member.file_size for member in members}


def check_old_pickles(path: Path) -> None:
    """Checks the five pickles that a file from before PyTorch 1.6 begins with."""
    with Bounded(path) as file:
        for _ in range(5):
            check_pickle(file, 0)


def check_pickle(file: IO[bytes], size: int) -> None:
    """Reads one pickle without doing what it says. Raises Refused for what should not be done."""
    far_more = "holds far more than the names of a model's tensors; use a .safetensors file"
    if size > LARGEST_PICKLE:
        raise Refused(far_more)
    for count, (operation, argument, _) in enumerate(pickletools.genops(file)):
        if count == MOST_OPERATIONS:
            raise Refused(far_more)
        if operation.name == "GLOBAL" and not HARMLESS.fullmatch(argument):
            raise Refused(would_call(argument.replace(" ", ".")))


def check_tensors(path: Path, tensors: dict[str, Tensor], sizes: set[int] | None) -> None:
    """Raises ValueError, naming it, for a tensor that is not whole in the file.

    sizes: of what is stored, in bytes; None where PyTorch checks them
    """
    claimed = 0
    for name, tensor in tensors.items():
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
        if not plain or tensor.is_quantized or tensor.device.type != "cpu":
            raise ValueError(f"{path}: {name!r:.100} is no plain tensor; use another file of the model")
        needed, stored = tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes()
        claimed += needed
        elsewhere = sizes and stored and stored not in sizes
        # Twice: two names may mean the same numbers, and do so for tied weights.
        if needed > stored or elsewhere or claimed > 2 * path.stat().st_size:
            raise ValueError(f"{path}: {name!r:.100} claims more numbers than are stored; fetch it again")
