"""Where the parts of a model lie on this machine."""

import re
from pathlib import Path

from public.configs import read_json
from public.formats import TensorFile
from public.layouts import LATENT_SCALE, check_latent_scale

DEMO = Path(__file__).resolve().parents[1] / "demo" / "weights"
PARTS = ("unet", "controlnet", "vae", "text_encoder")


def locate_parts(
    name: str | Path, controlnet: str | Path | None = None, vae: str | Path | None = None
) -> dict[str, Path]:
    """`locate`, with ControlNet and VAE from elsewhere if given. Raises as `TensorFile` for other files."""
    sources = locate(name)
    for part, path in (("controlnet", controlnet), ("vae", vae)):
        if path:
            if not Path(path).exists():
                raise FileNotFoundError(f"{path}: no such file or folder, given as {part}")
            if part == "vae" and Path(path).is_dir():
                expected = latent_scale(sources["vae"]) if part in sources else LATENT_SCALE
                check_latent_scale(f"{path}/config.json", latent_scale(Path(path)), expected)
            sources[part] = Path(path)
    for path in {sources[part] for part in PARTS if part in sources and sources[part].is_file()}:
        TensorFile(path)  # here, before anything is downloaded, a file without weights is told
    return sources


def latent_scale(vae: Path) -> float:
    """What a VAE's latents are multiplied by. Older configs do not say it, and files cannot."""
    config = read_json(vae / "config.json") if vae.is_dir() else {}
    scale = config.get("scaling_factor", LATENT_SCALE)
    return scale if type(scale) is float else LATENT_SCALE  # what cannot be one is told when sizes are read


def locate(name: str | Path) -> dict[str, Path]:
    """Where a model's parts lie: each in a folder with its `config.json`, or in a file, then in SD 1.5's sizes."""
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
        told = "give sd15, demo, a folder in the diffusers layout or a single-file Stable Diffusion 1.5 checkpoint"
        raise FileNotFoundError(f"{path}: no such model; {told}")
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


def index_of(name: str) -> str:
    """What the list of the files is called that hold these weights in shards."""
    stem, variant, extension = re.fullmatch(r"([^.]+)(\.fp16)?\.(\w+)", name).groups()
    return f"{stem}.{extension}.index{variant or ''}.json"


def weight_file(source: Path, half: bool) -> Path:
    """The file with the tensors, or the index of their shards: the source itself, or what suits best in it."""
    if not source.is_dir():
        return source
    for name in WEIGHT_FILES:
        for each in variants(name) if half else reversed(variants(name)):
            for file in (source / each, source / index_of(each)):
                if file.is_file():
                    return file
    others = [path.name for kind in ("safetensors", "bin") for path in sorted(source.glob(f"*.{kind}"))]
    told = f"holds {others[0]}, which is not read" if others else "holds no weights"
    raise FileNotFoundError(f"{source}: {told}; looked for {', '.join(WEIGHT_FILES)}")
