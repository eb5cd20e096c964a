"""What public files call the tensors of our networks, in the diffusers layout and in the original one ("LDM")."""

import re
from collections.abc import Callable
from functools import partial
from operator import methodcaller

from public.formats import TensorFile

# Each row: how one of our names begins, which are the diffusers layout's, and how the original one does, given the
# groups that match. There a UNet's layers are numbered through, three to a level.
KINDS = {"resnets": 0, "attentions": 1}
LDM_UNET = [
    (r"conv_in", lambda: "input_blocks.0.0"),
    (r"time_embedding.linear_(\d)", lambda i: f"time_embed.{2 * i - 2}"),
    (
        r"down_blocks.(\d).(resnets|attentions).(\d)",
        lambda i, k, j: f"input_blocks.{3 * i + j + 1}.{KINDS[k]}",
    ),
    (r"down_blocks.(\d).downsamplers.0.conv", lambda i: f"input_blocks.{3 * i + 3}.0.op"),
    (r"mid_block.resnets.(\d)", lambda i: f"middle_block.{2 * i}"),
    (r"mid_block.attentions.0", lambda: "middle_block.1"),
    (r"up_blocks.(\d).(resnets|attentions).(\d)", lambda i, k, j: f"output_blocks.{3 * i + j}.{KINDS[k]}"),
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


def ldm_vae(name: str) -> str:
    return swap_words(swap_start(name, LDM_VAE), LDM_VAE_LAYERS)


old_vae = partial(swap_words, table=OLD_ATTENTION)
bare = methodcaller("removeprefix", "text_model.")
TEXT = "cond_stage_model.transformer."

# The layouts that a part's tensors come in: a prefix, and what our name is behind it. All other parts, which are
# OpenPose's and the metrics', come under our names.
LAYOUTS = {
    "unet": [("", str), ("model.diffusion_model.", ldm_unet)],
    "controlnet": [("", str), ("control_model.", ldm_unet), ("", ldm_unet)],
    "vae": [("", str), ("", old_vae), ("first_stage_model.", ldm_vae), ("", ldm_vae)],
    "text_encoder": [("text_model.", bare), ("", bare), (TEXT, str), (TEXT, bare)],
}

# What files carry beside the networks: averages, counts and tables of the training, CLIP's other ends, and the
# classifiers behind the features that metrics compare.
IGNORED = re.compile(
    r"model_ema\.|loss\.|.*\.position_ids$|betas$|lvlb_weights$|logvar$|\w*alphas_cumprod\w*$|posterior_\w+$"
    r"|(cond_stage_model\.(transformer\.)?)?(logit_scale|text_projection)"
    r"|.*\.num_batches_tracked$|(fc|classifier\.\d)\.(weight|bias)$"
)

# Tensors that tell another architecture, which would else fail on some less telling detail.
OTHER_MODELS = {
    "Stable Diffusion XL": r"conditioner\.embedders\.|add_embedding\.linear_1\.|diffusion_model\.label_emb\.",
    "Stable Diffusion 2": r"cond_stage_model\.model\.",
    "Stable Diffusion 3 or FLUX": r"joint_blocks\.|double_blocks\.",
    "a LoRA, which changes a model but is none": "lora_",
}


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
    if missing := [stored for stored in layout.values() if stored not in file.shapes]:
        advice = f"give one with --{part}" if part in ("controlnet", "vae") else "use another file"
        count = f"all in all {len(missing)} of the {len(shapes)} tensors of {needed}"
        raise ValueError(f"{file.path}: lacks {missing[0]}, {count}; fetch it again, or {advice}")
    elsewhere = tuple(prefix for other in LAYOUTS.keys() - {part} for prefix, _ in LAYOUTS[other] if prefix)
    rest = file.shapes.keys() - set(layout.values())
    if unknown := [name for name in rest if not name.startswith(elsewhere) and not IGNORED.match(name)]:
        count = f"all in all {len(unknown)} tensors for which {needed} has no place"
        raise ValueError(f"{file.path}: holds {min(unknown)}, {count}; use another file")
    for name, stored in layout.items():
        found, expected = file.shapes[stored], shapes[name]
        # A linear layer may be stored as the 1x1 convolution that it equals, and the other way round.
        if expected not in (found, (*found, 1, 1)) and found != (*expected, 1, 1):
            sizes = ["x".join(map(str, shape)) or "a single number" for shape in (found, expected)]
            told = f"{stored} is {sizes[0]}, expected {sizes[1]}"
            raise ValueError(f"{file.path}: {told}; needed is {needed}")
    return layout
