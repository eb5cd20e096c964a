"""Where weights come from: found, told apart, read safely, written.

    python checkpoint.py              lists the public files: which are here, which are missing
    python checkpoint.py --download   fetches the missing ones

`load_model` takes the name of a model, a folder in the diffusers layout, or one file that holds it
all, and gives a `Model`. Whatever a file's layout, tensors end up under the names of our modules,
which are the diffusers layout's. Nothing here runs code that a file brings along, and no tensor is
left out, left over or bent into shape: the first that does not fit is an error that names it.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TypeVar

import torch
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from clip import TextConfig, TextEncoder, Tokenizer
from command import METHOD_NAMES
from controlnet import ControlNet
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

DEMO = Path(__file__).resolve().parent / "demo" / "weights"
PARTS = ("unet", "controlnet", "vae", "text_encoder")


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


# ---- The public files ---------------------------------------------------------------------------


@dataclass(frozen=True)
class PublicFile:
    """A file on the Hugging Face hub. Of the files of one part, any one will do."""

    part: str
    repo: str
    path: str
    megabytes: int

    @property
    def half(self) -> bool:
        return ".fp16." in self.path

    def cached(self) -> Path | None:
        """Where the file lies on this machine, if it has been downloaded."""
        found = try_to_load_from_cache(self.repo, self.path)
        return Path(found) if isinstance(found, str) else None


SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
OPENPOSE_CONTROL = "lllyasviel/control_v11p_sd15_openpose"
PUBLIC_FILES = [
    PublicFile("unet", SD15, "unet/diffusion_pytorch_model.fp16.safetensors", 1719),
    PublicFile("unet", SD15, "unet/diffusion_pytorch_model.safetensors", 3438),
    PublicFile("controlnet", OPENPOSE_CONTROL, "diffusion_pytorch_model.fp16.safetensors", 723),
    PublicFile("controlnet", OPENPOSE_CONTROL, "diffusion_pytorch_model.safetensors", 1445),
    PublicFile("controlnet", "lllyasviel/ControlNet-v1-1", "control_v11p_sd15_openpose.pth", 1445),
    PublicFile("vae", "stabilityai/sd-vae-ft-mse", "diffusion_pytorch_model.safetensors", 335),
    PublicFile("text_encoder", SD15, "text_encoder/model.fp16.safetensors", 246),
    PublicFile("text_encoder", SD15, "text_encoder/model.safetensors", 492),
    PublicFile("vocab", SD15, "tokenizer/vocab.json", 1),
    PublicFile("merges", SD15, "tokenizer/merges.txt", 1),
    PublicFile("body", "lllyasviel/Annotators", "body_pose_model.pth", 209),
    PublicFile("hand", "lllyasviel/Annotators", "hand_pose_model.pth", 147),
    PublicFile("face", "lllyasviel/Annotators", "facenet.pth", 154),
]


def choices(part: str, half: bool) -> list[PublicFile]:
    """The public files of a part: the one to use, then what would do in its place.

    What is here already comes first; then the files of the wanted precision.
    """
    files = [file for file in PUBLIC_FILES if file.part == part]
    return sorted(files, key=lambda file: (not file.cached(), file.half != half))


def public_files(parts: Iterable[str], half: bool) -> dict[str, Path]:
    """The public file of each part, downloaded if it is not here yet.

    half: whether half-precision files are preferred, where there are any.
    Raises OSError, in one line that names all the files still missing, when a download fails.
    """
    wanted = {part: choices(part, half) for part in parts}
    found = {part: files[0].cached() for part, files in wanted.items()}
    for part, files in wanted.items():
        if not found[part]:
            missing = [wanted[other][0] for other in wanted if not found[other]]
            found[part] = download(files, missing)
    return found


def download(files: list[PublicFile], missing: list[PublicFile]) -> Path:
    """Fetches the first of the files that the hub has; `missing` is for the message if it fails."""
    for file in files:
        try:
            return Path(hf_hub_download(file.repo, file.path))
        except LocalEntryNotFoundError:
            names = ", ".join(f"{each.repo}/{each.path}" for each in missing)
            raise OSError(
                f"no connection to {constants.ENDPOINT}, and not downloaded yet: {names} "
                f"({size_of(missing)}, to be cached in {constants.HF_HUB_CACHE}); fetch them "
                "with `python checkpoint.py --download` where there is a connection, and copy that "
                "folder here; `--model demo` works without"
            ) from None
        except EntryNotFoundError:
            continue  # a mirror may lack the half-precision files
        except (OSError, RuntimeError, HTTPError) as error:  # the second is hf_xet's
            reason = " ".join(str(error).split())
            raise OSError(
                f"{file.repo}/{file.path}: download failed, run the same command again ({reason})"
            ) from None
    raise FileNotFoundError(
        f"{files[0].repo}/{files[0].path}: not at {constants.ENDPOINT}; if you have it elsewhere, "
        "give its path"
    )


def size_of(files: Iterable[PublicFile]) -> str:
    megabytes = sum(file.megabytes for file in files)
    return f"{megabytes / 1000:.2f} GB" if megabytes > 99 else f"{megabytes} MB"


# ---- Loading a model ----------------------------------------------------------------------------


def load_model(
    name: str | Path,
    controlnet: str | Path | None = None,
    vae: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Model:
    """Loads all parts of a model, frozen.

    name: `sd15` (the public files, downloaded at first use), `demo`, a folder in the diffusers
        layout, or a single-file Stable Diffusion 1.5 checkpoint
    controlnet, vae: a file or folder to take that part from instead. A model that brings no
        ControlNet along takes the public one.

    Raises ValueError or OSError with one line that says which file, which tensor and what to do.
    """
    half = dtype != torch.float32
    sources = locate_parts(name, controlnet, vae)
    needed = [*PARTS, *(() if "tokenizer" in sources else ("vocab", "merges"))]
    sources |= public_files([part for part in needed if part not in sources], half)

    networks = networks_without_weights(sources)
    tokenizer = read_tokenizer(
        sources["tokenizer"] if "tokenizer" in sources else sources["vocab"].parent,
        networks["text_encoder"].config,
    )
    check_that_parts_fit(**networks)
    for part, network in networks.items():
        fill(network, part, weight_file(sources[part], half), device, dtype)
    return Model(**networks, tokenizer=tokenizer, **read_settings(sources))


def locate_parts(
    name: str | Path, controlnet: str | Path | None = None, vae: str | Path | None = None
) -> dict[str, Path]:
    """`locate`, with ControlNet and VAE from elsewhere if given."""
    sources = locate(name)
    for part, path in (("controlnet", controlnet), ("vae", vae)):
        if path:
            if not Path(path).exists():
                raise FileNotFoundError(f"{path}: no such file or folder, given as {part}")
            sources[part] = Path(path)
    return sources


def networks_without_weights(sources: dict[str, Path]) -> dict[str, nn.Module]:
    """The four networks on the meta device, in the sizes that the sources say; else Stable Diffusion 1.5's."""

    def config(part: str, read: Callable[[dict], Config]) -> Config | None:
        return read_config(sources[part], read) if part in sources else None

    unet_config = config("unet", read_unet_config) or UNetConfig()
    control = config("controlnet", read_controlnet_config) or (unet_config,)
    with torch.device("meta"):
        return {
            "unet": UNet(unet_config),
            "controlnet": ControlNet(*control),
            "vae": VAE(config("vae", read_vae_config) or VAEConfig()),
            "text_encoder": TextEncoder(config("text_encoder", read_text_config) or TextConfig()),
        }


def locate(name: str | Path) -> dict[str, Path]:
    """Where the parts that a model brings along lie: each in a folder with its `config.json`, or in
    a file, which then is of Stable Diffusion 1.5's sizes."""
    if str(name) == "sd15":
        return {}
    path = model_path(name)
    if path.is_file():
        return dict.fromkeys(("unet", "vae", "text_encoder"), path)
    found = {part: path / part for part in (*PARTS, "tokenizer") if (path / part).is_dir()}
    for part in ("unet", "vae", "text_encoder", "tokenizer"):
        if part not in found:
            raise FileNotFoundError(f"{path}: no model in the diffusers layout, has no {part}/")
    if (path / "posecrafter.json").is_file():
        found["settings"] = path / "posecrafter.json"
    scheduler = path / "scheduler" / "scheduler_config.json"
    if scheduler.is_file() and read_json(scheduler).get("prediction_type") == "v_prediction":
        raise ValueError(f"{scheduler}: this model predicts velocities, only noise is supported")
    return found


def model_path(name: str | Path) -> Path:
    """Where a model lies; that of sd15 need not exist."""
    path = DEMO if str(name) == "demo" else Path(name)
    if str(name) != "sd15" and not path.exists():
        raise FileNotFoundError(
            f"{path}: no such model; give sd15, demo, a folder in the diffusers layout or a "
            "single-file Stable Diffusion 1.5 checkpoint"
        )
    return path


WEIGHT_FILES = [
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
]


def variants(name: str) -> tuple[str, str]:
    """What a file of weights is called in half precision, and in full."""
    stem, _, extension = name.rpartition(".")
    return f"{stem}.fp16.{extension}", name


def weight_file(source: Path, half: bool) -> Path:
    """The file with the tensors: the source itself, or the one in that folder that suits best.

    Raises FileNotFoundError for a folder without any.
    """
    if not source.is_dir():
        return source
    for name in WEIGHT_FILES:
        for each in variants(name) if half else reversed(variants(name)):
            if (source / each).is_file():
                return source / each
    raise FileNotFoundError(f"{source}: holds no weights; looked for {', '.join(WEIGHT_FILES)}")


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


# ---- Sizes, from config.json --------------------------------------------------------------------

Config = TypeVar("Config")


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds no settings by name")
    return content


def read_config(source: Path, read: Callable[[dict], Config]) -> Config | None:
    """What `read` makes of the `config.json` in a folder; None for a file, which has no config."""
    if not source.is_dir():
        return None
    path = source / "config.json"
    config = read_json(path)
    try:
        sizes = read(config)
        if is_dataclass(sizes):
            check_sizes(sizes)
        return sizes
    except KeyError as error:
        raise ValueError(f"{path}: does not say {error.args[0]}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def are_sizes(numbers: tuple) -> bool:
    """Whether there are any, and all are whole numbers above 0."""
    return bool(numbers) and all(type(number) is int and number > 0 for number in numbers)


def check_sizes(config: UNetConfig | VAEConfig | TextConfig) -> None:
    """Raises ValueError for a size of another type than its default, and for channels that cannot be split."""
    for field in fields(config):
        value = getattr(config, field.name)
        if field.type is float:
            fits = type(value) in (int, float) and value > 0
        else:
            fits = are_sizes(value if field.type == tuple[int, ...] else (value,))
        if not fits:
            raise ValueError(f"{value!r} given as {field.name}")
    widths = getattr(config, "widths", None) or (config.width,)
    for name in ("norm_groups", "heads"):
        if any(width % getattr(config, name, 1) for width in widths):
            raise ValueError(f"{getattr(config, name)} {name} do not divide widths of {widths}")


# What it means when a setting is not the one that this program is written for.
MEANINGS = {
    "addition_embed_type": "this is Stable Diffusion XL; ",
    "use_linear_projection": "this is Stable Diffusion 2; ",
    "in_channels": "this is an inpainting or editing model; ",
    "hidden_act": "this is another model's text encoder; ",
}


def require(config: dict, **expected: object) -> None:
    """Raises ValueError for a setting that is there and not as expected."""
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise ValueError(
                f"{key} is {config[key]!r}, expected {value!r}; {MEANINGS.get(key, '')}a Stable "
                "Diffusion 1.5 model is needed"
            )


def read_unet_config(config: dict) -> UNetConfig:
    out_channels = config.get("out_channels", config["in_channels"])  # a ControlNet has none
    require(
        config,
        addition_embed_type=None,
        class_embed_type=None,
        use_linear_projection=False,
        in_channels=out_channels,
        transformer_layers_per_block=1,
        only_cross_attention=False,
        num_attention_heads=None,
        down_block_types=level_types(len(config["block_out_channels"]))[0],
        act_fn="silu",
        norm_eps=1e-5,
        freq_shift=0,
        flip_sin_to_cos=True,
        controlnet_conditioning_channel_order="rgb",
    )
    return UNetConfig(
        in_channels=config["in_channels"],
        out_channels=out_channels,
        widths=tuple(config["block_out_channels"]),
        layers_per_block=config["layers_per_block"],
        context_dim=config["cross_attention_dim"],
        heads=config["attention_head_dim"],  # despite its name, the number of heads
        norm_groups=config["norm_num_groups"],
    )


def level_types(levels: int) -> tuple[list[str], list[str]]:
    """diffusers' names for a UNet's levels, going down and up: the coarsest has no attention."""
    down = ["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"]
    return down, ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (levels - 1)


def read_controlnet_config(config: dict) -> tuple[UNetConfig, tuple[int, ...]]:
    sizes, hint_widths = read_unet_config(config), config["conditioning_embedding_out_channels"]
    check_sizes(sizes)
    if not are_sizes(tuple(hint_widths)):
        raise ValueError(f"{hint_widths!r} given as conditioning_embedding_out_channels")
    return sizes, tuple(hint_widths)


def read_vae_config(config: dict) -> VAEConfig:
    require(
        config,
        in_channels=3,
        out_channels=3,
        act_fn="silu",
        use_quant_conv=True,
        use_post_quant_conv=True,
        mid_block_add_attention=True,
        shift_factor=None,
    )
    return VAEConfig(
        latent_channels=config["latent_channels"],
        widths=tuple(config["block_out_channels"]),
        layers_per_block=config["layers_per_block"],
        norm_groups=config["norm_num_groups"],
        scale=config.get("scaling_factor", VAEConfig().scale),  # older configs do not say it
    )


def read_text_config(config: dict) -> TextConfig:
    require(config, hidden_act="quick_gelu", layer_norm_eps=1e-5)
    return TextConfig(
        vocab_size=config["vocab_size"],
        width=config["hidden_size"],
        heads=config["num_attention_heads"],
        layers=config["num_hidden_layers"],
        mlp_width=config["intermediate_size"],
        length=config["max_position_embeddings"],
    )


def read_tokenizer(folder: Path, config: TextConfig) -> Tokenizer:
    """From `vocab.json` and `merges.txt`, or the `tokenizer.json` that transformers 5 writes."""
    try:
        if (folder / "vocab.json").is_file():
            tokenizer = Tokenizer.load(folder, config.length)
        else:
            content = read_json(folder / "tokenizer.json")
            vocab = content["model"]["vocab"]
            vocab |= {token["content"]: token["id"] for token in content["added_tokens"]}
            merges = [tuple(m.split() if isinstance(m, str) else m) for m in content["model"]["merges"]]
            tokenizer = Tokenizer(vocab, merges, config.length)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: no CLIP tokenizer ({error})") from None
    if (tokens := 1 + max(tokenizer.vocab.values())) > config.vocab_size:
        raise ValueError(f"{folder}: {tokens} tokens, the text encoder knows {config.vocab_size}")
    return tokenizer


SETTINGS = ("size", "learning_rate", "method", "guidance_until")


def read_settings(sources: dict[str, Path]) -> dict:
    """Those of `Model`'s settings that are not the defaults; `sources` are what `locate` found."""
    if "settings" not in sources:
        return {}
    settings = read_json(sources["settings"])
    if unknown := settings.keys() - set(SETTINGS):
        raise ValueError(f"{sources['settings']}: unknown setting {min(unknown)}")
    for name, value in settings.items():
        default = getattr(Model, name)
        kinds = (str,) if isinstance(default, str) else (int, type(default))
        if type(value) not in kinds or (value not in METHOD_NAMES if name == "method" else value < 0):
            raise ValueError(f"{sources['settings']}: {value!r} given as {name}")
    return settings


# ---- Files of tensors ---------------------------------------------------------------------------

# What weights are mistaken for, by how the file begins.
NOT_WEIGHTS = {
    b"version https://git-lfs": "a Git LFS pointer: get the file itself with `git lfs pull`",
    b"<!doctype html": "a web page: download the file itself",
    b"<html": "a web page: download the file itself",
}


class TensorFile:
    """The named tensors of a file, each read when asked for: safetensors, or PyTorch's own format.

    shapes: {name: shape} of all tensors
    Raises ValueError for a file that is broken, or that would run code on being read.
    """

    def __init__(self, path: Path):
        with path.open("rb") as file:
            head = file.read(32)
        if not head:
            raise ValueError(f"{path}: an empty file")
        for start, what in NOT_WEIGHTS.items():
            if head.lower().startswith(start):
                raise ValueError(f"{path}: {what}")
        self.path, self.tensors = path, None
        # A zip archive, or a pickle as before PyTorch 1.6. Safetensors has the length of its header
        # first, which may begin like either, and then always a brace.
        if head.startswith((b"PK", b"\x80")) and head[8:9] != b"{":
            self.tensors = unpickle(path, zipped=head.startswith(b"PK"))
            self.shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
            return
        try:
            with safe_open(path, "pt") as file:
                names = list(file.keys())
                self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        except SafetensorError as error:
            raise ValueError(
                f"{path}: truncated, corrupt or no file of weights ({error}); fetch it again"
            ) from None

    def read(self, name: str) -> Tensor:
        """One tensor, mapped from the file where its format allows, so valid while that stays."""
        if self.tensors is not None:
            return self.tensors[name]
        # Opened anew for every tensor, because what has been read of a mapping counts as this
        # program's memory until the mapping is closed.
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(name)


def unpickle(path: Path, zipped: bool) -> dict[str, Tensor]:
    """The tensors of a `.pth`, `.ckpt` or `.bin` file, which may nest them under `state_dict`.

    zipped: whether the file is of the newer kind, whose tensors can be mapped rather than read
    """
    try:
        with path.open("rb") as file:
            # PyTorch would not believe that a file called .safetensors is one of its own.
            mapped = zipped and path.suffix != ".safetensors"
            contents = torch.load(
                path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped
            )
    except Exception as error:  # a damaged pickle can raise anything
        if wanted := re.search(r"GLOBAL ([\w.]+) ", str(error)):
            raise ValueError(
                f"{path}: wants to call {wanted[1]} on being read, which is refused because it "
                "could run any code; use a .safetensors file of the model"
            ) from None
        raise ValueError(f"{path}: truncated, corrupt or no file of weights; fetch it again") from None
    while isinstance(contents, dict) and "state_dict" in contents:
        contents = contents["state_dict"]
    if not isinstance(contents, dict):
        raise ValueError(f"{path}: holds no named tensors")
    named = {name: tensor for name, tensor in contents.items() if isinstance(tensor, Tensor)}
    if not all(isinstance(name, str) for name in named):
        raise ValueError(f"{path}: holds tensors without names")
    return named


# ---- Layouts: names in the files ----------------------------------------------------------------

# Each row: how one of our names begins, and how the same tensor's name begins in the original
# (latent diffusion) layout, given the numbers in ours. There a UNet's layers are numbered through:
# three to a level, the first two of them (decoder: all three) a residual block and a transformer.
LDM_UNET = [
    (r"conv_in", lambda: "input_blocks.0.0"),
    (r"time_embedding.linear_(\d)", lambda i: f"time_embed.{2 * i - 2}"),
    (r"down_blocks.(\d).resnets.(\d)", lambda i, j: f"input_blocks.{3 * i + j + 1}.0"),
    (r"down_blocks.(\d).attentions.(\d)", lambda i, j: f"input_blocks.{3 * i + j + 1}.1"),
    (r"down_blocks.(\d).downsamplers.0.conv", lambda i: f"input_blocks.{3 * i + 3}.0.op"),
    (r"mid_block.resnets.(\d)", lambda i: f"middle_block.{2 * i}"),
    (r"mid_block.attentions.0", lambda: "middle_block.1"),
    (r"up_blocks.(\d).resnets.(\d)", lambda i, j: f"output_blocks.{3 * i + j}.0"),
    (r"up_blocks.(\d).attentions.(\d)", lambda i, j: f"output_blocks.{3 * i + j}.1"),
    (r"up_blocks.0.upsamplers.0", lambda: "output_blocks.2.1"),  # this level has no transformer
    (r"up_blocks.(\d).upsamplers.0", lambda i: f"output_blocks.{3 * i + 2}.2"),
    (r"conv_norm_out", lambda: "out.0"),
    (r"conv_out", lambda: "out.2"),
    (r"controlnet_cond_embedding.conv_in", lambda: "input_hint_block.0"),
    (r"controlnet_cond_embedding.blocks.(\d)", lambda i: f"input_hint_block.{2 * i + 2}"),
    (r"controlnet_cond_embedding.conv_out", lambda: "input_hint_block.14"),
    (r"controlnet_down_blocks.(\d+)", lambda i: f"zero_convs.{i}.0"),
    (r"controlnet_mid_block", lambda: "middle_block_out.0"),
]
LDM_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
LDM_VAE = [
    (r"encoder.down_blocks.(\d).resnets.(\d)", lambda i, j: f"encoder.down.{i}.block.{j}"),
    (r"encoder.down_blocks.(\d).downsamplers.0", lambda i: f"encoder.down.{i}.downsample"),
    # The decoder's levels are numbered from fine to coarse, against the order of computation.
    (r"decoder.up_blocks.(\d).resnets.(\d)", lambda i, j: f"decoder.up.{3 - i}.block.{j}"),
    (r"decoder.up_blocks.(\d).upsamplers.0", lambda i: f"decoder.up.{3 - i}.upsample"),
    (r"encoder.mid_block.resnets.(\d)", lambda i: f"encoder.mid.block_{i + 1}"),
    (r"decoder.mid_block.resnets.(\d)", lambda i: f"decoder.mid.block_{i + 1}"),
    (r"encoder.mid_block.attentions.0", lambda: "encoder.mid.attn_1"),
    (r"decoder.mid_block.attentions.0", lambda: "decoder.mid.attn_1"),
    (r"encoder.conv_norm_out", lambda: "encoder.norm_out"),
    (r"decoder.conv_norm_out", lambda: "decoder.norm_out"),
]
LDM_VAE_LAYERS = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "conv_shortcut": "nin_shortcut",
}
OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def swap_start(name: str, table: list[tuple[str, Callable[..., str]]]) -> str:
    for start, other in table:
        if match := re.match(start, name):
            return other(*map(int, match.groups())) + name[match.end() :]
    return name


def swap_words(name: str, table: dict[str, str]) -> str:
    return re.sub("|".join(map(re.escape, table)), lambda match: table[match[0]], name)


def ldm_unet(name: str) -> str:
    if ".resnets." in name:
        name = swap_words(name, LDM_UNET_RESNET)
    return swap_start(name, LDM_UNET)


def ldm_vae(name: str) -> str:
    return swap_words(swap_start(name, LDM_VAE), LDM_VAE_LAYERS)


def old_vae(name: str) -> str:
    return swap_words(name, OLD_ATTENTION)


def bare_text(name: str) -> str:
    return name.removeprefix("text_model.")


# For each part, the layouts that its tensors come in: a prefix, and what our name is behind it.
LAYOUTS = {
    "unet": [("", str), ("model.diffusion_model.", ldm_unet)],
    "controlnet": [("", str), ("control_model.", ldm_unet), ("", ldm_unet)],
    "vae": [("", str), ("", old_vae), ("first_stage_model.", ldm_vae), ("", ldm_vae)],
    "text_encoder": [
        ("text_model.", bare_text),
        ("", bare_text),
        ("cond_stage_model.transformer.", str),
        ("cond_stage_model.transformer.", bare_text),
    ],
    "body": [("", str)],
    "hand": [("", str)],
    "face": [("", str)],
    "alexnet": [("", str)],
    "lpips": [("", str)],
    "inception": [("", str)],
    "i3d": [("", str)],
    "image_encoder": [("", str)],
}
TITLES = {
    "unet": "UNet of Stable Diffusion 1.5",
    "controlnet": "ControlNet for Stable Diffusion 1.5",
    "vae": "VAE of Stable Diffusion 1.5",
    "text_encoder": "text encoder of Stable Diffusion 1.5",
    "body": "body network of OpenPose",
    "hand": "hand network of OpenPose",
    "face": "face network of OpenPose",
    "alexnet": "AlexNet of LPIPS",
    "lpips": "weights of LPIPS 0.1 on AlexNet",
    "inception": "Inception network of FID",
    "i3d": "I3D network of FVD",
    "image_encoder": "image encoder of CLIP ViT-L/14",
}

# What files carry beside the networks: averages, counts and tables of the training, CLIP's other
# ends, the classifiers behind the features that metrics compare.
IGNORED = re.compile(
    r"model_ema\.|loss\.|.*\.position_ids$|betas$|lvlb_weights$|logvar$"
    r"|(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?$"
    r"|posterior_(variance|log_variance_clipped|mean_coef[12])$"
    r"|(cond_stage_model\.(transformer\.)?)?(logit_scale|text_projection)"
    r"|.*\.num_batches_tracked$|(fc|classifier\.\d)\.(weight|bias)$"
)

# Tensors that tell another architecture, which would else fail on some less telling detail.
OTHER_MODELS = {
    "conditioner.embedders.": "Stable Diffusion XL",
    "add_embedding.linear_1.": "Stable Diffusion XL",
    "diffusion_model.label_emb.": "Stable Diffusion XL",
    "cond_stage_model.model.": "Stable Diffusion 2",
    "joint_blocks.": "Stable Diffusion 3",
    "double_blocks.": "FLUX",
    "lora_": "a LoRA, which changes a model but is none",
}


# ---- Filling a network --------------------------------------------------------------------------

TEMPORAL = re.compile(r"(.*)\.(attn_temp|conv_temp)\.(.*)")  # what inflation adds to a public UNet


def fill(network: nn.Module, part: str, path: Path, device: str | torch.device, dtype: torch.dtype) -> None:
    """Fills a network that was built on the meta device, one tensor at a time, and freezes it.

    Temporal attention starts as a copy of the key-frame attention beside it, and the convolution
    behind it at zero. All other tensors must be in the file, and nothing else but what is known to
    be of no use. Convolutions come out in channels_last memory.
    """
    file = TensorFile(path)
    for fragment, model in OTHER_MODELS.items():
        if any(fragment in name for name in file.shapes):
            raise ValueError(f"{path}: is {model}, needed is the {TITLES[part]}")
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    names = stored_names([name for name in shapes if not TEMPORAL.match(name)], part, file)
    for name, stored in names.items():
        check_shape(file, stored, shapes[name], part)

    tensors = {}
    for name, shape in shapes.items():
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        tensors[name] = torch.empty(shape, device=device, dtype=dtype, memory_format=layout)
        if name in names:
            source = file.read(names[name])
            if not source.is_floating_point():
                raise ValueError(f"{path}: {names[name]} is {source.dtype}, floats are needed")
            tensors[name].copy_(source.reshape(shape))
    for name in shapes.keys() - names.keys():
        block, layer, rest = TEMPORAL.match(name).groups()
        if layer == "attn_temp":
            tensors[name].copy_(tensors[f"{block}.attn1.{rest}"])
        else:
            tensors[name].zero_()
    network.load_state_dict(tensors, assign=True)
    network.eval().requires_grad_(False)


def stored_names(names: list[str], part: str, file: TensorFile) -> dict[str, str]:
    """Our names -> those in the file, in the layout under which the file has the most of them.

    Raises ValueError when one is missing, or when the file holds something unknown.
    """
    layouts = [{n: prefix + rename(n) for n in names} for prefix, rename in LAYOUTS[part]]
    layout = max(layouts, key=lambda layout: len(file.shapes.keys() & layout.values()))
    missing = [stored for stored in layout.values() if stored not in file.shapes]
    if len(missing) == len(names):
        advice = f"give one with --{part}" if part in ("controlnet", "vae") else "use another file"
        raise ValueError(f"{file.path}: holds no {TITLES[part]}; {advice}")
    if missing:
        raise ValueError(
            f"{file.path}: lacks {missing[0]}, all in all {len(missing)} of the {len(names)} "
            f"tensors of the {TITLES[part]}; fetch it again, or use another file"
        )
    others = [prefix for other in LAYOUTS.keys() - {part} for prefix, _ in LAYOUTS[other]]
    elsewhere = tuple(prefix for prefix in others if prefix)
    unknown = [
        name
        for name in file.shapes.keys() - set(layout.values())
        if not name.startswith(elsewhere) and not IGNORED.match(name)
    ]
    if unknown:
        raise ValueError(
            f"{file.path}: holds {min(unknown)}, all in all {len(unknown)} tensors for which "
            f"the {TITLES[part]} has no place; use another file"
        )
    return layout


def check_shape(file: TensorFile, name: str, expected: tuple[int, ...], part: str) -> None:
    """A linear layer may be stored as the 1x1 convolution that it equals, and the other way round."""
    found = file.shapes[name]
    if expected in (found, (*found, 1, 1)) or found == (*expected, 1, 1):
        return
    sizes = ["x".join(map(str, shape)) or "a single number" for shape in (found, expected)]
    what = ""
    if name.endswith(("conv_in.weight", "input_blocks.0.0.weight")) and found[1:2] == (9,):
        what = "this is an inpainting model, "
    elif ".attn2." in name and found[-1:] in ((1024,), (2048,)):
        what = f"this is Stable Diffusion {'2' if found[-1] == 1024 else 'XL'}, "
    raise ValueError(
        f"{file.path}: {name} is {sizes[0]}, expected {sizes[1]}; {what}needed is the {TITLES[part]}"
    )


# ---- The command line ---------------------------------------------------------------------------


def list_public_files() -> list[PublicFile]:
    """Prints which public files are here and which are missing; returns the missing ones."""
    wanted = [choices(part, half=True)[0] for part in dict.fromkeys(f.part for f in PUBLIC_FILES)]
    missing = [file for file in wanted if not file.cached()]
    print(f"Public files, cached in {constants.HF_HUB_CACHE}:")
    for file in wanted:
        state = "missing" if file in missing else "here"
        print(f"  {state:7}  {size_of([file]):>7}  {file.part:12}  {file.repo}/{file.path}")
    return missing


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
    try:
        main(parser.parse_args())
    except (OSError, ValueError) as error:
        parser.exit(2, f"checkpoint.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "checkpoint.py: stopped; --download goes on from what it has\n")
