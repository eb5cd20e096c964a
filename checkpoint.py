"""Where weights come from: a model is found, its parts are checked against each other and filled.

    python checkpoint.py              lists the public files: which are here, which are missing
    python checkpoint.py --download   fetches the missing ones

`load_model` takes the name of a model, a folder in the diffusers layout, or one file that holds it all.
Whatever a file's layout, tensors end up under the names of our modules, which are the diffusers layout's.
Nothing here runs code that a file brings along, and no tensor is left out, left over or bent into shape: the first
that does not fit is an error that names it. How public files are fetched and read is in `public/`.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn

from clip import TextConfig, TextEncoder, Tokenizer
from command import METHOD_NAMES
from controlnet import ControlNet
from public.adapters import LoRA
from public.configs import read_config, read_json, read_sizes
from public.formats import TensorFile
from public.hub import list_public_files, public_files, size_of
from public.layouts import stored_names
from public.lora import Change, merged, read_loras
from public.places import PARTS, locate_parts, weight_file
from safe.process import run_command
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig


@dataclass(frozen=True)
class Model:
    """Everything that turns poses into a video. What finds poses in pixels is apart: see `load_openpose`."""

    unet: UNet
    controlnet: ControlNet
    vae: VAE
    text_encoder: TextEncoder
    tokenizer: Tokenizer
    size: int = 512  # pixels of the shorter side that the model was trained for
    learning_rate: float = 1e-4  # not the paper's 0.003: docs/LEARNING_RATE.md says why
    method: str = "paper"  # one of `beyond.pseudo.METHODS`, by default; it alone is measured on this model
    guidance_until: int = 0  # the last timestep where a guidance scale counts; 0: all do


def load_model(
    name: str | Path,
    controlnet: str | Path | None = None,
    vae: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    loras: Sequence[LoRA] = (),
) -> Model:
    """Loads all parts of a model, frozen.

    name: `sd15` (the public files, downloaded at first use), `demo`, a folder in the diffusers layout, or a
        single-file Stable Diffusion 1.5 checkpoint
    controlnet, vae: a file or folder to take that part from. A model without a ControlNet takes the public one.
    loras: are merged into the UNet and the text encoder
    Raises ValueError or OSError with one line that says which file, which tensor and what to do.
    """
    half = dtype != torch.float32
    sources = find_parts(name, controlnet, vae, half)
    networks = networks_without_weights(sources)
    folder, text = sources.get("tokenizer") or sources["vocab"].parent, networks["text_encoder"].config
    tokenizer = Tokenizer.load(folder, text.length)
    if (tokens := 1 + max(tokenizer.vocab.values())) > text.vocab_size:
        raise ValueError(f"{folder}: {tokens} tokens, the text encoder knows {text.vocab_size}")
    check_that_parts_fit(**networks)
    changes = read_loras(loras, networks)
    for part, network in networks.items():
        fill(network, part, weight_file(sources[part], half), device, dtype, changes[part])
    return Model(**networks, tokenizer=tokenizer, **read_settings(sources))


def find_parts(
    name: str | Path, controlnet: str | Path | None, vae: str | Path | None, half: bool
) -> dict[str, Path]:
    """Where all parts of a model lie, after the public ones were downloaded."""
    sources = locate_parts(name, controlnet, vae)
    needed = PARTS if "tokenizer" in sources else (*PARTS, "vocab", "merges")
    return sources | public_files([part for part in needed if part not in sources], half)


def networks_without_weights(sources: dict[str, Path]) -> dict[str, nn.Module]:
    """The four networks on the meta device, in the sizes that the sources say; else Stable Diffusion 1.5's."""
    places = {part: sources[part] for part in PARTS if part in sources}
    configs = {part: read_config(path, partial(read_sizes, part)) for part, path in places.items()}
    unet_config = configs.get("unet") or UNetConfig()
    with torch.device("meta"):
        return {
            "unet": UNet(unet_config),
            "controlnet": ControlNet(*(configs.get("controlnet") or (unet_config,))),
            "vae": VAE(configs.get("vae") or VAEConfig()),
            "text_encoder": TextEncoder(configs.get("text_encoder") or TextConfig()),
        }


def check_that_parts_fit(unet: UNet, controlnet: ControlNet, vae: VAE, text_encoder: TextEncoder) -> None:
    """Raises ValueError, naming both sizes, for networks that are of different models."""
    hint_factor = controlnet.controlnet_cond_embedding.factor
    pairs = [
        ("the VAE's latent channels", vae.config.latent_channels, unet.config.in_channels),
        ("the text encoder's width", text_encoder.config.width, unet.config.context_dim),
        ("the factor from the ControlNet's hint to the latents", hint_factor, vae.config.factor),
    ]
    found, expected = asdict(controlnet.config), asdict(unet.config)
    pairs += [(f"the ControlNet's {name}", found[name], expected[name]) for name in expected]
    for what, found, expected in pairs:
        if found != expected:
            raise ValueError(f"{what}: {found}, but the rest of the model needs {expected}")


SETTINGS = ("size", "learning_rate", "method", "guidance_until")


def read_settings(sources: dict[str, Path]) -> dict:
    """Those of `Model`'s settings that are not the defaults; `sources` are what `locate` found."""
    if "settings" not in sources:
        return {}
    settings = read_json(sources["settings"])
    if unknown := settings.keys() - set(SETTINGS):
        raise ValueError(f"{sources['settings']}: unknown setting {min(unknown)!r:.80}")
    for name, value in settings.items():
        kinds = (int, type(getattr(Model, name)))
        right = type(value) in kinds and (value in METHOD_NAMES if name == "method" else 0 <= value <= 1e6)
        if not right:
            raise ValueError(f"{sources['settings']}: {value!r:.80} given as {name}")
    return settings


TEMPORAL = re.compile(r"(.*)\.(attn_temp|conv_temp)\.(.*)")  # what inflation adds to a public UNet


def fill(
    network: nn.Module,
    part: str,
    path: Path,
    device: str | torch.device,
    dtype: torch.dtype,
    changes: Mapping[str, Sequence[Change]] = MappingProxyType({}),
) -> None:
    """Fills a network that was built on the meta device, one tensor at a time, and freezes it.

    Temporal attention starts as a copy of the key-frame attention beside it, the convolution behind it at zero;
    what LoRAs change in the one (`changes`, by our names) is therefore in the other too.
    All other tensors must be in the file, and nothing else but what is known to be of no use. Convolutions come
    out in channels_last memory.
    """
    file = TensorFile(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    names = stored_names({n: s for n, s in shapes.items() if not TEMPORAL.match(n)}, part, file)
    tensors = {}
    for name, shape in shapes.items():
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        tensors[name] = torch.empty(shape, device=device, dtype=dtype, memory_format=layout)
        if name in names:
            source = file.read(names[name])
            if not source.is_floating_point():
                raise ValueError(f"{path}: {names[name]} is {source.dtype}, floats are needed")
            tensors[name].copy_(merged(source.reshape(shape), changes.get(name, ())))
            if not tensors[name].sum(dtype=torch.float32).isfinite():  # one pass, which is cheap
                raise ValueError(f"{path}: {names[name]} has numbers that are not finite; fetch it again")
    for name in shapes.keys() - names.keys():
        block, layer, rest = TEMPORAL.match(name).groups()
        if layer == "attn_temp":
            tensors[name].copy_(tensors[f"{block}.attn1.{rest}"])
        else:
            tensors[name].zero_()
    network.load_state_dict(tensors, assign=True)
    network.eval().requires_grad_(False)


def main(args: argparse.Namespace) -> None:
    missing = list_public_files()
    if args.download:
        public_files((file.part for file in missing), half=True)
        print("All are here.")
    elif missing:
        print(f"Missing {size_of(missing)}; fetch with: python checkpoint.py --download")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Lists the public files of --model sd15.")
    parser.add_argument("--download", action="store_true", help="fetch those that are missing")
    run_command("checkpoint.py", main, parser.parse_args(), "stopped; --download goes on from what it has")
