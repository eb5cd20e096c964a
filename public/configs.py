"""The sizes of public models, as the `config.json` beside their weights says them."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

from clip import TextConfig
from safe import files
from unet import UNetConfig
from vae import VAEConfig

Config = TypeVar("Config")

CONFIGS = {"unet": UNetConfig, "vae": VAEConfig, "text_encoder": TextConfig}
# fmt: off
# The names of our sizes in a config.json, where they are not ours.
NAMES = {
    "unet": {
        "widths": "block_out_channels", "norm_groups": "norm_num_groups", "context_dim": "cross_attention_dim",
        "heads": "attention_head_dim",  # despite its name, the number of heads
    },
    "vae": {"widths": "block_out_channels", "norm_groups": "norm_num_groups", "scale": "scaling_factor"},
    "text_encoder": {
        "width": "hidden_size", "heads": "num_attention_heads", "layers": "num_hidden_layers",
        "mlp_width": "intermediate_size", "length": "max_position_embeddings",
    },
}
# What our networks are written for: a setting may be left out, but not be another.
REQUIRED = {
    "unet": {
        "addition_embed_type": None, "class_embed_type": None, "use_linear_projection": False, "norm_eps": 1e-5,
        "transformer_layers_per_block": 1, "only_cross_attention": False, "num_attention_heads": None,
        "act_fn": "silu", "freq_shift": 0, "flip_sin_to_cos": True, "controlnet_conditioning_channel_order": "rgb",
    },
    "vae": {
        "in_channels": 3, "out_channels": 3, "act_fn": "silu", "use_quant_conv": True, "use_post_quant_conv": True,
        "mid_block_add_attention": True, "shift_factor": None,
    },
    "text_encoder": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
}
# fmt: on


# No model that is read here has larger settings. What is built is checked against the tensors of the file, but
# even to build a network without weights may take too long.
LARGEST, MOST_LAYERS, MOST_LEVELS = 2**20, {"layers_per_block": 16, "num_hidden_layers": 100}, 8
LARGEST_CONFIG = 10_000_000  # bytes


def read_json(path: Path) -> dict:
    content = files.read_json(path, LARGEST_CONFIG)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {content!r:.40}, an object with settings is needed")
    return content


def read_config(source: Path, read: Callable[[dict], Config]) -> Config | None:
    """What `read` makes of the `config.json` in a folder; None for a file, which has no config."""
    if not source.is_dir():
        return None
    path = source / "config.json"
    content = read_json(path)
    try:
        return read(content)
    except (KeyError, TypeError, ValueError) as error:
        told = f"does not say {error.args[0]}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: {told}") from None


def read_size(config: dict, key: str, kind: type) -> int | float | tuple[int, ...]:
    """A setting as a number above 0, or as a tuple of them. Raises ValueError if it is anything else."""
    several = kind == tuple[int, ...]
    value = tuple(config[key]) if several else config[key]
    numbers, most = value if several else (value,), MOST_LAYERS.get(key, LARGEST)
    right = all(type(number) in (int, kind) and 0 < number <= most for number in numbers)
    if not right or not 0 < len(numbers) <= MOST_LEVELS:
        raise ValueError(f"{config[key]!r:.80} given as {key}")
    return value


def read_sizes(part: str, config: dict) -> UNetConfig | VAEConfig | TextConfig | tuple:
    """The sizes of a part that its config.json tells of; of a ControlNet, its UNet's and the widths for the hint.

    Raises ValueError for settings that our networks do not have, KeyError for a size that is not said.
    """
    if part == "controlnet":
        hint_widths = read_size(config, "conditioning_embedding_out_channels", tuple[int, ...])
        return read_sizes("unet", config), hint_widths
    required = REQUIRED[part]
    if part == "unet":
        config = {"out_channels": config["in_channels"]} | config  # a ControlNet has none
        levels = level_types(len(config["block_out_channels"]))[0]
        required = {"in_channels": config["out_channels"], "down_block_types": levels} | required
    for key, value in required.items():
        if config.get(key, value) != value:
            told = f"{key} is {config[key]!r:.80}, expected {value!r:.200}"
            raise ValueError(f"{told}; a Stable Diffusion 1.5 model is needed")
    config = {"scaling_factor": VAEConfig.scale} | config  # which older configs do not say
    names = {field: NAMES[part].get(field.name, field.name) for field in fields(CONFIGS[part])}
    sizes = {field.name: read_size(config, name, field.type) for field, name in names.items()}
    for name in sizes.keys() & {"norm_groups", "heads"}:
        widths = sizes.get("widths") or (sizes["width"],)
        if any(width % sizes[name] for width in widths):
            raise ValueError(f"{sizes[name]} {name} do not divide widths of {widths}")
    return CONFIGS[part](**sizes)


def level_types(levels: int) -> tuple[list[str], list[str]]:
    """diffusers' names for a UNet's levels, going down and up: the coarsest has no attention."""
    down = ["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"]
    return down, ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (levels - 1)


MOST_OPENPOSE = {"width": (0, 4), "stages": (1, 12), "hand_sizes": (8, 2048), "face_size": (8, 2048)}


def read_openpose_sizes(config: dict) -> dict:
    """What an `openpose.OpenPose` is made of. Raises ValueError for what none has."""
    for name, value in config.items():
        low, high = MOST_OPENPOSE.get(name, (1, 0))
        several, kinds = name in ("stages", "hand_sizes"), (int, float) if name == "width" else (int,)
        numbers = value if several and isinstance(value, list) and len(value) <= 8 else [value]
        right = all(type(number) in kinds and low <= number <= high for number in numbers)
        if not right or several != isinstance(value, list) or (name == "stages" and len(value) != 3):
            raise ValueError(f"{value!r:.80} given as {name!r:.80}")
    return config
