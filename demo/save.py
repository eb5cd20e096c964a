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
from clip import END, START, TextEncoder, Tokenizer
from controlnet import ControlNet
from openpose import OPENPOSE_PARTS, OpenPose
from public.configs import level_types
from public.places import WEIGHT_FILES, variants
from unet import UNet
from vae import VAE


def save_model(model: Model, folder: str | Path, dtype: torch.dtype = torch.float16) -> None:
    """Writes a model as a folder in the diffusers layout, which `load_model` and diffusers read.

    The temporal layers are left out, as in a public model: loading starts them anew. A part's weights of other
    names and precisions, which would be older ones, are removed.
    """
    folder = Path(folder)
    configs = {
        "unet": unet_config(model.unet),
        "controlnet": controlnet_config(model.controlnet),
        "vae": vae_config(model.vae),
        "text_encoder": text_config(model.text_encoder, model.tokenizer),
    }
    stems = dict.fromkeys(configs, "diffusion_pytorch_model") | {"text_encoder": "model"}
    with replaced_folder(folder) as new:
        for part, config in configs.items():
            write_json(new / part / "config.json", config)
            write_tensors(new / part / f"{stems[part]}.safetensors", getattr(model, part), dtype)
        save_tokenizer(model.tokenizer, new / "tokenizer")
        write_json(new / "posecrafter.json", {name: getattr(model, name) for name in SETTINGS})
    known = {name for each in WEIGHT_FILES for name in variants(each)}
    for part, stem in stems.items():
        for name in known - {f"{stem}.safetensors"}:
            (folder / part / name).unlink(missing_ok=True)


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


def unet_config(unet: UNet | ControlNet) -> dict:
    config = unet.config
    down_types, up_types = level_types(len(config.widths))
    return {
        "_class_name": "UNet2DConditionModel",
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": config.widths,
        "down_block_types": down_types,
        "up_block_types": up_types,
        "layers_per_block": config.layers_per_block,
        "cross_attention_dim": config.context_dim,
        "attention_head_dim": config.heads,  # diffusers' name for the number of heads
        "norm_num_groups": config.norm_groups,
    }


def controlnet_config(controlnet: ControlNet) -> dict:
    config = unet_config(controlnet) | {"_class_name": "ControlNetModel"}
    del config["out_channels"], config["up_block_types"]
    return config | {"conditioning_embedding_out_channels": controlnet.controlnet_cond_embedding.widths}


def vae_config(vae: VAE) -> dict:
    config = vae.config
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": config.latent_channels,
        "block_out_channels": config.widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(config.widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(config.widths),
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_groups,
        "scaling_factor": config.scale,
    }


def text_config(text_encoder: TextEncoder, tokenizer: Tokenizer) -> dict:
    config = text_encoder.config
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "max_position_embeddings": config.length,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": tokenizer.vocab[START],
        "eos_token_id": tokenizer.vocab[END],
        "pad_token_id": tokenizer.vocab[END],
    }


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    tokenizer.save(folder)
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    write_json(folder / "special_tokens_map.json", special)
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": tokenizer.length}
    write_json(folder / "tokenizer_config.json", special | settings)
