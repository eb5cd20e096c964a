"""The networks whose features metrics compare: AlexNet for LPIPS, Inception for FID, I3D for FVD.

Each is said as the table that it is, under the names of its public file. They read pictures in [-1, 1], of any
size, and are frozen. CLIP's image encoder, for CLIP-I and CLIP-T, is in `metrics/clip_images.py`.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from hashlib import sha256
from pathlib import Path
from typing import TypeVar
from urllib.request import urlopen

import torch
import torch.nn.functional as F
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import HTTPError
from torch import Tensor, nn

from checkpoint import fill
from metrics.clip_images import ImageEncoder
from public.hub import PublicFile
from safe.files import replacing

Network = TypeVar("Network", bound=nn.Module)

# ---- LPIPS --------------------------------------------------------------------------------------


class LPIPS(nn.Module):
    """How different two pictures look (Zhang et al. 2018, version 0.1): 0 for equal ones.

    `net` and `lins` come from two public files: AlexNet's (Krizhevsky 2014, as in torchvision) and LPIPS's, a
    weight per channel.
    """

    def __init__(self):
        super().__init__()
        # fmt: off
        self.net = nn.ModuleDict({"features": nn.Sequential(
            nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, 1, 1), nn.ReLU(),
            nn.Conv2d(384, 256, 3, 1, 1), nn.ReLU(),
            nn.Conv2d(256, 256, 3, 1, 1), nn.ReLU(),
        )})
        # fmt: on
        weights = [nn.Conv2d(channels, 1, 1, bias=False) for channels in (64, 192, 384, 256, 256)]
        models = [nn.ModuleDict({"model": nn.Sequential(nn.Identity(), each)}) for each in weights]
        self.lins = nn.ModuleDict({f"lin{index}": model for index, model in enumerate(models)})

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] and as many others -> distances (N,)."""
        maps = zip(self.lins.values(), self.directions(a), self.directions(b))
        return sum(lin.model((ours - theirs) ** 2).mean(dim=(1, 2, 3)) for lin, ours, theirs in maps)

    def directions(self, x: Tensor) -> list[Tensor]:
        """AlexNet's maps after each ReLU, each pixel's channels divided by their length."""
        shift, scale = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # LPIPS's own, per colour
        shift, scale = (x.new_tensor(levels)[:, None, None] for levels in (shift, scale))
        x, maps = (x - shift) / scale, []
        for layer in self.net.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                maps.append(x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10))
        return maps


# ---- Networks said as tables --------------------------------------------------------------------


class BatchNorm(nn.Module):
    """A batch norm that has done learning: a scale and a shift per channel, which a file fills."""

    def __init__(self, channels: int, epsilon: float):
        super().__init__()
        self.epsilon = epsilon
        for name in ("running_mean", "running_var", "weight", "bias"):
            self.register_buffer(name, torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, *self.buffers(), eps=self.epsilon)


class Table(nn.Module):
    """Chains of layers side by side, whose outputs are stacked along the channels.

    A step of a chain is a function, a convolution (name, channels, kernel) with its stride if it is not 1, a block
    (name, table), or a table without a name, whose layers are named with ours. `convolution(inputs, channels,
    kernel, ...)` makes the layer.
    """

    def __init__(self, table: list[list], inputs: int, convolution: Callable[..., nn.Module]):
        super().__init__()
        self.convolution = convolution
        self.run, self.channels = self.side_by_side(table, inputs)

    def side_by_side(self, table: list[list], inputs: int) -> tuple[Callable[[Tensor], Tensor], int]:
        chains, channels = zip(*(self.chain(steps, inputs) for steps in table))

        def run(x: Tensor) -> Tensor:
            return torch.cat([reduce(lambda y, layer: layer(y), layers, x) for layers in chains], dim=1)

        return run, sum(channels)

    def chain(self, steps: list, channels: int) -> tuple[list[Callable[[Tensor], Tensor]], int]:
        layers = []
        for step in steps:
            match step:
                case list():
                    layer, channels = self.side_by_side(step, channels)
                case (name, list(table)):
                    layer = Table(table, channels, self.convolution)
                    channels = layer.channels
                case (name, *sizes):
                    layer, channels = self.convolution(channels, *sizes), sizes[0]
                case layer:
                    pass
            layers.append(layer)
            if isinstance(layer, nn.Module):
                self.add_module(name, layer)
        return layers, channels

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


# ---- Inception, for FID -------------------------------------------------------------------------

SHRINK = partial(F.max_pool2d, kernel_size=3, stride=2)
# As TensorFlow averages: what lies beyond the edge does not count.
AVERAGE = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
MAXIMUM = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)


def numbered(name: str, *layers: tuple) -> list[tuple]:
    """Convolutions (channels, kernel, ...) in a row, named "name_1", "name_2" and so on."""
    return [(f"{name}_{number}", *layer) for number, layer in enumerate(layers, start=1)]


def block(width: int, pooled: int, pool: Callable[[Tensor], Tensor], *branches: list) -> list[list]:
    """What all blocks of one size have, a 1x1 convolution and a pool, around what they differ in."""
    return [[("branch1x1", width, 1)], *branches, [pool, ("branch_pool", pooled, 1)]]


# fmt: off
def mixed_5(pooled: int) -> list[list]:
    return block(64, pooled, AVERAGE,
                 numbered("branch5x5", (48, 1), (64, 5)),
                 numbered("branch3x3dbl", (64, 1), (96, 3), (96, 3)))


def mixed_6(width: int) -> list[list]:
    row, column = (1, 7), (7, 1)
    double = (width, 1), (width, column), (width, row), (width, column), (192, row)
    return block(192, 192, AVERAGE,
                 numbered("branch7x7", (width, 1), (width, row), (192, column)),
                 numbered("branch7x7dbl", *double))


def mixed_7(pool: Callable[[Tensor], Tensor]) -> list[list]:
    def fork(name: str) -> list[list]:
        return [[(f"{name}a", 384, (1, 3))], [(f"{name}b", 384, (3, 1))]]

    return block(320, 192, pool,
                 [*numbered("branch3x3", (384, 1)), fork("branch3x3_2")],
                 [*numbered("branch3x3dbl", (448, 1), (384, 3)), fork("branch3x3dbl_3")])


MIXED_6A = [[("branch3x3", 384, 3, 2)], numbered("branch3x3dbl", (64, 1), (96, 3), (96, 3, 2)), [SHRINK]]
MIXED_7A = [
    numbered("branch3x3", (192, 1), (320, 3, 2)),
    numbered("branch7x7x3", (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)),
    [SHRINK],
]
INCEPTION = [[
    ("Conv2d_1a_3x3", 32, 3, 2), ("Conv2d_2a_3x3", 32, 3, 1), ("Conv2d_2b_3x3", 64, 3), SHRINK,
    ("Conv2d_3b_1x1", 80, 1), ("Conv2d_4a_3x3", 192, 3, 1), SHRINK,
    ("Mixed_5b", mixed_5(32)), ("Mixed_5c", mixed_5(64)), ("Mixed_5d", mixed_5(64)),
    ("Mixed_6a", MIXED_6A), ("Mixed_6b", mixed_6(128)), ("Mixed_6c", mixed_6(160)),
    ("Mixed_6d", mixed_6(160)), ("Mixed_6e", mixed_6(192)),
    # The last one's maximum is a slip of the network that FID was defined with, and so part of it.
    ("Mixed_7a", MIXED_7A), ("Mixed_7b", mixed_7(AVERAGE)), ("Mixed_7c", mixed_7(MAXIMUM)),
]]
# fmt: on


def conv2d(inputs: int, channels: int, kernel: int | tuple, stride: int | None = None) -> nn.Module:
    """Convolution, batch norm, ReLU; nothing is padded where a stride is given, even that of 1."""
    padding = "valid" if stride else "same"
    conv = nn.Conv2d(inputs, channels, kernel, stride or 1, padding, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=BatchNorm(channels, 1e-3), relu=nn.ReLU(inplace=True)))


class Inception(Table):
    """Inception v3 as FID uses it (Heusel et al. 2017): the features before its classifier."""

    def __init__(self):
        super().__init__(INCEPTION, 3, conv2d)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] -> features (N, 2048)."""
        x = F.interpolate(images, size=(299, 299), mode="bilinear", align_corners=False)
        return super().forward(x).mean(dim=(2, 3))


# ---- I3D, for FVD -------------------------------------------------------------------------------


def pad_same(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Zeros around (..., T, H, W), as TensorFlow's SAME: the odd one behind."""
    padding = []
    for size, k, s in reversed(list(zip(x.shape[-3:], kernel, stride))):
        excess = max(0, k - (size % s or s))
        padding += [excess // 2, excess - excess // 2]
    return F.pad(x, padding)


def shrink(kernel: tuple[int, ...], stride: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    # Zeros are no more than what ReLUs give, so the padding never is the maximum.
    return lambda x: F.max_pool3d(pad_same(x, kernel, stride), kernel, stride)


# fmt: off
def mixed(b0: int, b1a: int, b1b: int, b2a: int, b2b: int, b3b: int) -> list[list]:
    return [
        [("b0", b0, 1)],
        [("b1a", b1a, 1), ("b1b", b1b, 3)],
        [("b2a", b2a, 1), ("b2b", b2b, 3)],
        [shrink((3, 3, 3), (1, 1, 1)), ("b3b", b3b, 1)],
    ]


INFLATED_INCEPTION = [[
    ("Conv3d_1a_7x7", 64, 7, 2), shrink((1, 3, 3), (1, 2, 2)),
    ("Conv3d_2b_1x1", 64, 1), ("Conv3d_2c_3x3", 192, 3), shrink((1, 3, 3), (1, 2, 2)),
    ("Mixed_3b", mixed(64, 96, 128, 16, 32, 32)),
    ("Mixed_3c", mixed(128, 128, 192, 32, 96, 64)), shrink((3, 3, 3), (2, 2, 2)),
    ("Mixed_4b", mixed(192, 96, 208, 16, 48, 64)), ("Mixed_4c", mixed(160, 112, 224, 24, 64, 64)),
    ("Mixed_4d", mixed(128, 128, 256, 24, 64, 64)), ("Mixed_4e", mixed(112, 144, 288, 32, 64, 64)),
    ("Mixed_4f", mixed(256, 160, 320, 32, 128, 128)), shrink((2, 2, 2), (2, 2, 2)),
    ("Mixed_5b", mixed(256, 160, 320, 32, 128, 128)),
    ("Mixed_5c", mixed(384, 192, 384, 48, 128, 128)),
]]
# fmt: on


class SameConv3d(nn.Conv3d):
    """A convolution with TensorFlow's padding."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(pad_same(x, self.kernel_size, self.stride))


def conv3d(inputs: int, channels: int, kernel: int, stride: int = 1) -> nn.Module:
    """Convolution, batch norm, ReLU; the kernel is a cube."""
    conv = SameConv3d(inputs, channels, kernel, stride, bias=False)
    return nn.Sequential(OrderedDict(conv3d=conv, bn=BatchNorm(channels, 1e-5), relu=nn.ReLU(inplace=True)))


class I3D(Table):
    """Inflated Inception on Kinetics-400 (Carreira & Zisserman 2017), as FVD uses it: its logits."""

    SHORTEST = 9  # frames: fewer leave less than the two steps in time that are averaged

    def __init__(self):
        super().__init__(INFLATED_INCEPTION, 3, conv3d)
        self.logits = nn.ModuleDict({"conv3d": nn.Conv3d(self.channels, 400, 1)})

    def forward(self, clips: Tensor) -> Tensor:
        """Clips (N, T, 3, H, W) in [-1, 1] -> logits (N, 400), averaged over time.

        Raises ValueError for fewer than 9 frames.
        """
        if clips.shape[1] < self.SHORTEST:
            raise ValueError(f"I3D needs {self.SHORTEST} frames or more, not {clips.shape[1]}")
        frames = F.interpolate(clips.flatten(0, 1), size=(224, 224), mode="bilinear", align_corners=False)
        x = super().forward(frames.unflatten(0, clips.shape[:2]).transpose(1, 2))
        x = F.avg_pool3d(x, (2, 7, 7), stride=1)
        return self.logits.conv3d(x).mean(dim=(2, 3, 4))


# ---- Where their weights come from --------------------------------------------------------------


@dataclass(frozen=True)
class WebFile:
    """A public file that is not on the Hugging Face hub, kept where torch.hub keeps such files."""

    url: str
    megabytes: int
    sha256: str = ""  # as many digits of it as the publisher tells

    @property
    def path(self) -> str:
        return self.url.rpartition("/")[2]

    def cached(self) -> Path | None:
        kept = Path(torch.hub.get_dir(), "checkpoints", self.path)
        return kept if kept.is_file() else None

    def fetch(self) -> Path:
        """Raises OSError when it does not come whole; then nothing of it is kept."""
        kept = Path(torch.hub.get_dir(), "checkpoints", self.path)
        kept.parent.mkdir(parents=True, exist_ok=True)
        with urlopen(self.url, timeout=30) as source:
            content = b"".join(iter(partial(source.read, 2**20), b""))
            size = int(source.headers.get("Content-Length") or 0)
        if len(content) < size or not sha256(content).hexdigest().startswith(self.sha256):
            raise OSError(f"{len(content)} bytes came, which are not the published file")
        with replacing(kept) as unfinished:
            unfinished.write_bytes(content)
        return kept


LINS_SHA256 = "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0"
GITHUB = "https://github.com/"
FID_WEIGHTS = GITHUB + "mseitzer/pytorch-fid/releases/download/fid_weights/"
LPIPS_WEIGHTS = GITHUB + "richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/"
FILES = {
    "alexnet": WebFile("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", 244, "7be5be79"),
    "lpips": WebFile(LPIPS_WEIGHTS + "alex.pth", 1, LINS_SHA256),
    "inception": WebFile(FID_WEIGHTS + "pt_inception-2015-12-05-6726825d.pth", 96, "6726825d"),
    # VideoGPT's and TATS's. The better known i3d_torchscript.pt is a program, which we do not run.
    "i3d": WebFile(GITHUB + "songweige/TATS/raw/main/tats/fvd/i3d_pretrained_400.pt", 51),
    "image_encoder": PublicFile("CLIP", "openai/clip-vit-large-patch14", "model.safetensors", 1711),
}
# The files that a network is filled from, and which part of it.
PARTS = {
    LPIPS: {"alexnet": "net", "lpips": "lins"},
    Inception: {"inception": ""},
    I3D: {"i3d": ""},
    ImageEncoder: {"image_encoder": ""},
}


def find_weights(part: str, folder: Path | None) -> Path:
    """A part's public file: in `folder` under its public name, kept from before, or downloaded.

    Raises OSError, in one line, when it is not here and cannot be downloaded.
    """
    file = FILES[part]
    if folder and (folder / file.path).is_file():
        return folder / file.path
    of_web = isinstance(file, WebFile)
    try:
        return file.cached() or (file.fetch() if of_web else Path(hf_hub_download(file.repo, file.path)))
    except (OSError, RuntimeError, HTTPError) as error:  # the second is hf_xet's
        home = file.url if of_web else f"{constants.ENDPOINT}/{file.repo}"
        reason = str(error).strip().split("\n")[0]
        told = (
            f"{file.path} ({file.megabytes} MB) is not here and could not be fetched from {home} ({reason})"
        )
        raise OSError(f"{told}; put it into a folder and give that as --weights") from None


def load_network(
    kind: type[Network], folder: Path | None = None, device: str | torch.device = "cpu"
) -> Network:
    """LPIPS, Inception, I3D or CLIP's image encoder with its public weights, frozen, in float32.

    Raises OSError for a file that is neither in `folder` nor to be had, and ValueError for one that does not fit.
    """
    paths = {part: find_weights(part, folder) for part in PARTS[kind]}
    with torch.device("meta"):
        network = kind()
    for part, within in PARTS[kind].items():
        fill(network.get_submodule(within), part, paths[part], device, torch.float32)
    return network
