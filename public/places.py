"""Where the parts of a model lie on this machine."""

from pathlib import Path

from public.configs import read_json

DEMO = Path(__file__).resolve().parents[1] / "demo" / "weights"
PARTS = ("unet", "controlnet", "vae", "text_encoder")


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


def weight_file(source: Path, half: bool) -> Path:
    """The file with the tensors: the source itself, or the one in that folder that suits best."""
    if not source.is_dir():
        return source
    for name in WEIGHT_FILES:
        for each in variants(name) if half else reversed(variants(name)):
            if (source / each).is_file():
                return source / each
    raise FileNotFoundError(f"{source}: holds no weights; looked for {', '.join(WEIGHT_FILES)}")
