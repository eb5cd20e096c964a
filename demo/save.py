"""Writes models in the public layouts: what the training scripts of the demo leave."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from checkpoint import SETTINGS, TEMPORAL, Model
from clip import END, START, Tokenizer
from openpose import OPENPOSE_PARTS, OpenPose
from public.configs import NAMES, REQUIRED, level_types
from public.places import PARTS, WEIGHT_FILES, variants

# What a part's config.json says beside its sizes.
KINDS = {
    "unet": {"_class_name": "UNet2DConditionModel"},
    "controlnet": {"_class_name": "ControlNetModel"},
    "vae": {"_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3},
    "text_encoder": {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"},
}
TOKENS = {"bos": START, "eos": END, "pad": END}


def save_model(model: Model, folder: str | Path, dtype: torch.dtype = torch.float16) -> None:
    """Writes a model as a folder in the diffusers layout, which `load_model` and diffusers read. The temporal
    layers are left out, as in a public model: loading starts them anew. A part's weights of other names and
    precisions, which would be older ones, are removed."""
    folder = Path(folder)
    files = dict.fromkeys(PARTS, "diffusion_pytorch_model.safetensors")
    files["text_encoder"] = "model.safetensors"
    with replaced_folder(folder) as new:
        for part, file in files.items():
            write_json(new / part / "config.json", config_of(model, part))
            write_tensors(new / part / file, getattr(model, part), dtype)
        write_tokenizer(model.tokenizer, new / "tokenizer")
        special = {f"{name}_token": token for name, token in (TOKENS | {"unk": END}).items()}
        settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": model.tokenizer.length}
        write_json(new / "tokenizer" / "special_tokens_map.json", special)
        write_json(new / "tokenizer" / "tokenizer_config.json", special | settings)
        write_json(new / "posecrafter.json", {name: getattr(model, name) for name in SETTINGS})
    known = {name for each in WEIGHT_FILES for name in variants(each)}
    for part, file in files.items():
        for name in known - {file}:
            (folder / part / name).unlink(missing_ok=True)


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    merges = ["#version: 0.2", *map(" ".join, tokenizer.merges)]
    vocab = json.dumps(tokenizer.vocab, ensure_ascii=False)
    (folder / "vocab.json").write_text(vocab + "\n", encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")


def config_of(model: Model, part: str) -> dict:
    """What a part's config.json says."""
    network, names = getattr(model, part), NAMES["unet" if part == "controlnet" else part]
    config = {names.get(name, name): value for name, value in vars(network.config).items()} | KINDS[part]
    if part in ("unet", "controlnet"):
        config["down_block_types"], config["up_block_types"] = level_types(len(network.config.widths))
    if part == "controlnet":
        del config["out_channels"], config["up_block_types"]
        config["conditioning_embedding_out_channels"] = network.controlnet_cond_embedding.widths
    if part == "vae":
        for way, name in (("down", "DownEncoderBlock2D"), ("up", "UpDecoderBlock2D")):
            config[f"{way}_block_types"] = [name] * len(network.config.widths)
    if part == "text_encoder":
        config |= REQUIRED[part]
        config |= {f"{name}_token_id": model.tokenizer.vocab[token] for name, token in TOKENS.items()}
    return config


def save_openpose(openpose: OpenPose, folder: str | Path, dtype: torch.dtype = torch.float16) -> None:
    """Writes the `openpose/` of a model's folder."""
    with replaced_folder(Path(folder)) as new:
        write_json(new / "config.json", openpose.config)
        for part in OPENPOSE_PARTS:
            write_tensors(new / f"{part}.safetensors", openpose.get_submodule(part), dtype)


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A new folder whose files, once all are written, replace those of the same names in `folder`: a full disk
    leaves what was there before."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        new = Path(temporary)
        yield new
        for path in filter(Path.is_file, new.rglob("*")):
            target = folder / path.relative_to(new)
            target.parent.mkdir(exist_ok=True)
            os.replace(path, target)


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_tensors(path: Path, network: nn.Module, dtype: torch.dtype) -> None:
    weights = network.state_dict().items()
    tensors = {name: x.to(dtype).contiguous() for name, x in weights if not TEMPORAL.match(name)}
    try:
        save_file(tensors, path, {"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path}: could not be written ({error})") from None
