"""What public files call the tensors of our networks, in the diffusers layout and in the original one ("LDM")."""

import re
from collections.abc import Callable
from functools import partial
from operator import methodcaller

from public.formats import TensorFile

# Each row: how one of our names begins, which are the diffusers layout's, and how the original one does, given the
# groups that match. There a UNet's layers are numbered through, three to a level.
KINDS, KIND = {"resnets": 0, "attentions": 1}, "(resnets|attentions)"
LDM_UNET = [
    (r"conv_in", lambda: "input_blocks.0.0"),
    (r"time_embedding.linear_(\d)", lambda i: f"time_embed.{2 * i - 2}"),
    (rf"down_blocks.(\d).{KIND}.(\d)", lambda i, k, j: f"input_blocks.{3 * i + j + 1}.{KINDS[k]}"),
    (r"down_blocks.(\d).downsamplers.0.conv", lambda i: f"input_blocks.{3 * i + 3}.0.op"),
    (r"mid_block.resnets.(\d)", lambda i: f"middle_block.{2 * i}"),
    (r"mid_block.attentions.0", lambda: "middle_block.1"),
    (rf"up_blocks.(\d).{KIND}.(\d)", lambda i, k, j: f"output_blocks.{3 * i + j}.{KINDS[k]}"),
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
LDM_VAE = [
    (r"encoder.down_blocks.(\d).resnets.(\d)", lambda i, j: f"encoder.down.{i}.block.{j}"),
    (r"encoder.down_blocks.(\d).downsamplers.0", lambda i: f"encoder.down.{i}.downsample"),
    # The decoder's levels are numbered from fine to coarse, against the order of computation.
    (r"decoder.up_blocks.(\d).resnets.(\d)", lambda i, j: f"decoder.up.{3 - i}.block.{j}"),
    (r"decoder.up_blocks.(\d).upsamplers.0", lambda i: f"decoder.up.{3 - i}.upsample"),
    (r"(\w+).mid_block.resnets.(\d)", lambda half, i: f"{half}.mid.block_{i + 1}"),
    (r"(\w+).mid_block.attentions.0", lambda half: f"{half}.mid.attn_1"),
    (r"(\w+).conv_norm_out", lambda half: f"{half}.norm_out"),
]
# fmt: off
# The layers of a residual block or an attention, by our names and by another layout's.
LDM_UNET_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}
LDM_VAE_LAYERS = {
    "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
    "group_norm": "norm", "conv_shortcut": "nin_shortcut",
}
# Some tools write a VAE's attention by its newer names into the original layout.
LDM_VAE_NEWER = {"group_norm": "norm", "conv_shortcut": "nin_shortcut"}
OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
# fmt: on


def swap_start(name: str, table: list[tuple[str, Callable[..., str]]]) -> str:
    for start, other in table:
        if match := re.match(start, name):
            groups = (int(group) if group.isdigit() else group for group in match.groups())
            return other(*groups) + name[match.end() :]
    return name


def swap_words(name: str, table: dict[str, str]) -> str:
    return re.sub("|".join(map(re.escape, table)), lambda match: table[match[0]], name)


def ldm_unet(name: str) -> str:
    return swap_start(swap_words(name, LDM_UNET_RESNET) if ".resnets." in name else name, LDM_UNET)


def ldm_vae(name: str, layers: dict[str, str] = LDM_VAE_LAYERS) -> str:
    return swap_words(swap_start(name, LDM_VAE), layers)


newer_vae = partial(ldm_vae, layers=LDM_VAE_NEWER)
old_vae = partial(swap_words, table=OLD_ATTENTION)
bare = methodcaller("removeprefix", "text_model.")
TEXT, VAE = "cond_stage_model.transformer.", "first_stage_model."

# The layouts that a part's tensors come in: a prefix, and what our name is behind it. All other parts, which are
# OpenPose's and the metrics', come under our names.
LAYOUTS = {
    "unet": [("", str), ("model.diffusion_model.", ldm_unet), ("", ldm_unet)],
    "controlnet": [("", str), ("control_model.", ldm_unet), ("", ldm_unet)],
    "vae": [(start, name) for start in ("", VAE) for name in (str, old_vae, ldm_vae, newer_vae)],
    "text_encoder": [("text_model.", bare), ("", bare), (TEXT, str), (TEXT, bare)],
}

# What files carry beside the networks: averages, losses, counts and tables of the training, what merging tools
# leave, CLIP's other ends, and the classifiers behind the features that metrics compare.
IGNORED = re.compile(
    r"(.*\.)?(\w*_ema|loss)\.|(embedding_manager|denoiser)\.|.*\.position_ids$"
    r"|(model\.)?betas$|lvlb_weights$|logvar$|\w*alphas_cumprod\w*$|posterior_\w+$|scale_factor$"
    r"|(cond_stage_model\.(transformer\.)?)?(logit_scale|text_projection|visual_projection|vision_model\.)"
    r"|.*\.num_batches_tracked$|(fc|classifier\.\d)\.(weight|bias)$"
)

# Tensors that tell another architecture, which would else fail on some less telling detail.
OTHER_MODELS = {
    "Stable Diffusion XL": r"conditioner\.embedders\.|add_embedding\.linear_1\.|diffusion_model\.label_emb\.",
    "Stable Diffusion 2": r"cond_stage_model\.model\.",
    "Stable Diffusion 3 or FLUX": r"joint_blocks\.|double_blocks\.",
    "a ControlNet stored as its difference from a model": r"^difference$",
    "a LoRA or another adapter, which changes a model but is none (a LoRA is given with --lora)": (
        r"(^|[._])(lora|hada|lokr|b?oft|glora|ia3)(_|[AB]?\.)|\.dora_scale$|\.diff(_b)?$|^(image_proj|ip_adapter)\."
    ),
    "a textual inversion, which adds a word to a model but is none": "^(emb_params|clip_[lg])$",
}
# What a file may hold instead of the part that was looked for, by its tensors.
HELD = {
    "a UNet": r"(model\.diffusion_model\.)?(input_blocks|down_blocks)\.",
    "a ControlNet": r"(control_model\.)?(input_hint_block|controlnet_\w+)\.",
    "a VAE": r"(first_stage_model\.)?(encoder\.(conv_in|down|mid)\w*|decoder)\.",
    "a text encoder": r"(cond_stage_model\.transformer\.)?(text_model\.)?(encoder\.layers|embeddings)\.",
    "the averages of a training": r"model_ema\.",
}
LATENT_SCALE = 0.18215  # of Stable Diffusion 1.5's VAE


def stored_names(shapes: dict[str, tuple[int, ...]], part: str, file: TensorFile) -> dict[str, str]:
    """Our names -> those in the file, in the layout under which the file has the most of them.

    shapes: of the tensors that the part needs, by our names
    Raises ValueError when one is missing or has another shape, and when the file holds something unknown.
    """
    needed = f"the {part} of Stable Diffusion 1.5" if part in LAYOUTS else f"the {part} network"
    for model, pattern in OTHER_MODELS.items():
        if any(re.search(pattern, name) for name in file.shapes):
            raise ValueError(f"{file.path}: is {model}, needed is {needed}")
    layouts = [{n: prefix + rename(n) for n in shapes} for prefix, rename in LAYOUTS.get(part, [("", str)])]
    layout = max(layouts, key=lambda layout: len(file.shapes.keys() & layout.values()))
    check_that_all_are_there(layout, part, file, needed)
    elsewhere = tuple(prefix for other in LAYOUTS.keys() - {part} for prefix, _ in LAYOUTS[other] if prefix)
    rest = file.shapes.keys() - set(layout.values())
    if unknown := [name for name in rest if not name.startswith(elsewhere) and not IGNORED.match(name)]:
        count = f"all in all {len(unknown)} tensors for which {needed} has no place"
        raise ValueError(f"{file.path}: holds {min(unknown)}, {count}; use another file")
    for name, stored in layout.items():
        if told := misfit(file.shapes[stored], shapes[name]):
            raise ValueError(f"{file.path}: {stored} is {told}; needed is {needed}")
    if part == "vae" and file.shapes.get("scale_factor") == ():
        check_latent_scale(f"{file.path}: scale_factor", file.read("scale_factor").item())
    return layout


def check_that_all_are_there(layout: dict[str, str], part: str, file: TensorFile, needed: str) -> None:
    """Raises ValueError, naming the first tensor that is missing, or what the file holds instead of the part."""
    missing = [stored for stored in layout.values() if stored not in file.shapes]
    if not missing:
        return
    held = [what for what, pattern in HELD.items() if any(re.match(pattern, name) for name in file.shapes)]
    whole = part == "text_encoder" or held == ["a UNet"]
    advice = f"give one with --{part}" if part in ("controlnet", "vae") else "use another file"
    if len(missing) == len(layout) and held:
        advice = "give a file of a whole model, or a folder in the diffusers layout" if whole else advice
        raise ValueError(f"{file.path}: holds {' and '.join(held)}, but not {needed}; {advice}")
    count = f"all in all {len(missing)} of the {len(layout)} tensors of {needed}"
    raise ValueError(f"{file.path}: lacks {missing[0]}, {count}; fetch it again, or {advice}")


def misfit(found: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """Two shapes in words where a stored tensor does not fit; else "".

    A linear layer may be stored as the 1x1 convolution that it equals, and the other way round.
    """
    if expected in (found, (*found, 1, 1)) or found == (*expected, 1, 1):
        return ""
    sizes = ["x".join(map(str, shape)) or "a single number" for shape in (found, expected)]
    return f"{sizes[0]}, expected {sizes[1]}"


def check_latent_scale(where: str, found: float, expected: float = LATENT_SCALE) -> None:
    """Raises ValueError for a VAE whose latents are not those that the model's UNet was trained on."""
    if abs(found / expected - 1) > 0.01:
        told = f"a VAE of another latent scale, {found:.5g}, but the model's latents have {expected:.5g}"
        raise ValueError(f"{where}: {told}; SDXL's VAE, for one, does not go with Stable Diffusion 1.5")
