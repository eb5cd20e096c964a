"""LoRAs are merged into a model's weights as these are read: W + weight * alpha / rank * up @ down.

A file names the layers that it changes in one of these spellings, with dots or with underscores:

    lora_unet_down_blocks_0_..., lora_te_text_model_...     kohya's, by the diffusers layout's names
    lora_unet_input_blocks_1_1_...                          kohya's, by the original layout's names
    unet.down_blocks.0..., text_encoder.text_model....      diffusers' and peft's
    ....attn1.processor.to_q_lora, ....self_attn.to_q_lora  older ones of diffusers, which name attentions only
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from public.adapters import LoRA
from public.formats import TensorFile
from public.layouts import bare, ldm_unet, misfit

# The end of a tensor's name: which of a layer's tensors it is. A is what comes down, B what goes up.
MATRIX = re.compile(
    r"(.+?)(?:\.lora_(down|up|A|B)(?:\.default)?|[._]lora(?:_linear_layer)?\.(down|up))\.weight|"
    r"(.+?)(?:[._]lora)?\.(alpha)"
)
KINDS = {"A": "down", "B": "up"}
# Names for what other adapters than plain LoRAs hold.
OTHER_KINDS = {
    "dora_scale|lora_magnitude": "a DoRA",
    "lora_mid": "a LoRA with a third matrix (Tucker decomposition)",
    "hada_|lokr_|oft_|boft_|glora|ia3|on_input|[._]diff(_b)?$|[ab][12]\\.weight$": "an adapter of LyCORIS",
    "emb_params|string_to_param": "a textual inversion",
    "image_proj|ip_adapter": "an IP-Adapter",
}
TEXT_ATTENTION = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


@dataclass(frozen=True)
class Change:
    """What one LoRA adds to one tensor of a network."""

    file: TensorFile
    down: str  # (rank, in, ...) as the file calls it
    up: str  # (out, rank, ...)
    scale: float

    def __call__(self, weight: Tensor) -> Tensor:  # (out, in, ...) -> same, float32
        down, up = (self.file.read(name).float().flatten(1) for name in (self.down, self.up))
        return weight.float() + self.scale * (up @ down).reshape(weight.shape)


def merged(weight: Tensor, changes: Iterable[Change]) -> Tensor:
    """A tensor with what LoRAs add to it: the tensor itself where there are none."""
    for change in changes:
        weight = change(weight)
    return weight


def spellings(part: str, layer: str) -> set[str]:
    """What files may call a layer of a part, with underscores for dots."""
    if part == "unet":
        prefixes = "lora_unet_", "unet_", ""
        names = {layer, layer.replace("to_out.0", "to_out"), ldm_unet(layer)}
    else:
        prefixes = "lora_te_", "text_encoder_"
        old = re.sub("|".join(TEXT_ATTENTION), lambda match: TEXT_ATTENTION[match[0]], layer)
        names = {layer, bare(layer), old, bare(old)}
    return {prefix + name.replace(".", "_") for prefix in prefixes for name in names}


def read_loras(loras: Sequence[LoRA], networks: dict[str, nn.Module]) -> dict[str, dict[str, list[Change]]]:
    """What LoRAs change: {part: {name of a tensor: changes}}, of the UNet and the text encoder.

    networks: those parts among others, perhaps on the meta device
    Raises OSError or ValueError, in one line that names file and tensor, for one that is not of this model.
    """
    changes = {part: defaultdict(list) for part in networks}
    if not loras:
        return changes
    places, shapes = {}, {}
    for part in ("unet", "text_encoder"):
        for name, tensor in networks[part].state_dict().items():
            if name.endswith(".weight") and tensor.ndim > 1 and "_temp." not in name:
                shapes[part, name] = tuple(tensor.shape)
                layer = name.removesuffix(".weight")
                places |= dict.fromkeys(spellings(part, layer), (part, name))
    for lora in loras:
        for (part, name), change in changes_of(lora, places, shapes):
            changes[part][name].append(change)
    return changes


Place = tuple[str, str]  # part, name of a tensor


def changes_of(
    lora: LoRA, places: dict[str, Place], shapes: dict[Place, tuple[int, ...]]
) -> Iterator[tuple[Place, Change]]:
    """The changes that a file holds. places: spelling -> place; shapes: of the tensors there."""
    path = Path(lora.file)
    file, alphas = TensorFile(path), adapter_alphas(path)
    layers = defaultdict(dict)
    for stored in sorted(file.shapes):
        match = MATRIX.fullmatch(stored)
        if not match:
            told = next((what for words, what in OTHER_KINDS.items() if re.search(words, stored)), None)
            told = f"it is {told}" if told else "which is no part of a LoRA"
            raise ValueError(f"{path}: holds {stored}, {told}; give a plain LoRA of Stable Diffusion 1.5")
        layer, kind = (group for group in match.groups() if group)
        layer = layer.removeprefix("base_model.model.").replace(".processor.", ".")
        place = places.get(layer.replace(".", "_"))
        if not place:
            told = "for which Stable Diffusion 1.5 has no place"
            raise ValueError(f"{path}: holds {stored}, {told}; it is a LoRA of another model")
        kind = KINDS.get(kind, kind)
        if kind in layers[place]:
            raise ValueError(f"{path}: holds both {layers[place][kind]} and {stored}; use another file")
        layers[place][kind] = stored
    if not layers:
        raise ValueError(f"{path}: holds no tensors; use another file")
    for place, names in layers.items():
        yield place, change_of(lora, file, names, shapes[place], alphas.get(place[0]))


def change_of(
    lora: LoRA, file: TensorFile, names: dict[str, str], shape: tuple[int, ...], alpha: float | None
) -> Change:
    """One layer's change. names: its tensors in the file; shape: of the weight; alpha: if no tensor says it."""
    if missing := {"down", "up"} - names.keys():
        other = next(iter(names.values()))
        raise ValueError(f"{file.path}: holds {other}, but no matrix {min(missing)}; fetch it again")
    rank = (file.shapes[names["down"]] or (0,))[0]
    expected = {"down": (rank, *shape[1:]), "up": (shape[0], rank, *(1 for _ in shape[2:]))}
    for kind, sizes in expected.items():
        if told := misfit(file.shapes[names[kind]], sizes):
            raise ValueError(f"{file.path}: {names[kind]} is {told}; it is a LoRA of another model")
    if not rank:
        raise ValueError(f"{file.path}: {names['down']} is empty; fetch it again")
    if "alpha" in names:
        tensor = file.read(names["alpha"])
        if tensor.numel() != 1 or not math.isfinite(tensor.item()):
            raise ValueError(f"{file.path}: {names['alpha']} is no finite number; fetch it again")
        alpha = tensor.item()
    scale = lora.weight * (rank if alpha is None else alpha) / rank
    return Change(file, names["down"], names["up"], scale)


def adapter_alphas(path: Path) -> dict[str, float]:
    """The alphas that newer versions of diffusers write beside the tensors, by part; else a file's are its ranks.

    Raises ValueError for an adapter that is scaled in another way.
    """
    try:
        with safe_open(path, "pt") as file:
            settings = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
        if not isinstance(settings, dict):
            raise ValueError("no settings by name")
    except SafetensorError:  # a pickle, which says nothing of the kind
        return {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its adapter's settings are damaged ({error}); fetch it again") from None
    for name in settings:
        if name.endswith((".alpha_pattern", ".use_rslora", ".use_dora")) and settings[name]:
            raise ValueError(f"{path}: is written with {name}, which is not read; give a plain LoRA")
    alphas = {part: settings.get(f"{part}.lora_alpha") for part in ("unet", "text_encoder")}
    return {part: alpha for part, alpha in alphas.items() if isinstance(alpha, (int, float))}
