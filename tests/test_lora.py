"""LoRAs in every spelling, merged as diffusers merges them; and those that do not fit.

diffusers needs peft to merge, which is no dependency of the tests. So its own functions translate a file's names,
and what they say is merged here by the definition: W + weight * alpha / rank * up @ down.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_commands import SAMPLE, TRAIN, main, refusal, workplace  # noqa: F401
from torch import Tensor, nn

from checkpoint import Model, load_model
from clip import TextConfig, TextEncoder, Tokenizer
from command import training_arguments
from controlnet import ControlNet
from demo.save import save_model
from demo.vocabulary import learn_merges
from public.adapters import LoRA, recall_loras, remember_loras
from public.layouts import ldm_unet
from public.lora import spellings
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig
from video import read_frames

RANK = 3
ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT = "text_model.encoder.layers.0.self_attn.out_proj"
LAYERS = {
    "unet": [
        ATTENTION,
        ATTENTION.replace("attn1.to_q", "attn2.to_k"),
        ATTENTION.replace("attn1.to_q", "attn1.to_out.0"),
        ATTENTION.replace("attn1.to_q", "ff.net.0.proj"),
        "mid_block.attentions.0.proj_in",  # a 1x1 convolution
        "up_blocks.1.resnets.2.conv1",  # a 3x3 convolution
        "down_blocks.0.downsamplers.0.conv",
        "mid_block.resnets.0.time_emb_proj",
    ],
    "text_encoder": [TEXT, "text_model.encoder.layers.0.mlp.fc1"],
}
OLD_LAYERS = {
    "unet": [ATTENTION, ATTENTION.replace("attn1.to_q", "attn1.to_out.0")],
    "text_encoder": [TEXT, TEXT.replace("out_proj", "q_proj")],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model with Stable Diffusion's layers per level, of small widths."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(*learn_merges(["a person"], 5), length=8)
    unet = UNetConfig(widths=(8, 16, 16, 16), context_dim=12, heads=2, norm_groups=4)
    text = TextConfig(len(tokenizer.vocab), width=12, heads=2, layers=1, mlp_width=32, length=8)
    vae = VAEConfig(widths=(8, 8, 8, 8), layers_per_block=1, norm_groups=4)
    networks = UNet(unet), ControlNet(unet), VAE(vae), TextEncoder(text)
    path = tmp_path_factory.mktemp("lora") / "model"
    save_model(Model(*networks, tokenizer), path, torch.float32)
    return path


@pytest.fixture(scope="module")
def plain(folder) -> Model:
    return load_model(folder)


def weight_of(model: Model, part: str, layer: str) -> Tensor:
    return getattr(model, part).state_dict()[f"{layer}.weight"]


def matrices(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """A LoRA's two matrices for a weight of this shape: down, up."""
    random = torch.Generator().manual_seed(seed)
    ones = (1,) * (len(shape) - 2)
    down = torch.randn(RANK, *shape[1:], generator=random)
    return down, torch.randn(shape[0], RANK, *ones, generator=random)


def kohya(part: str, layer: str) -> dict[str, str]:
    start = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[part] + layer.replace(".", "_")
    return {"down": start + ".lora_down.weight", "up": start + ".lora_up.weight", "alpha": start + ".alpha"}


def kohya_original(part: str, layer: str) -> dict[str, str]:
    return kohya(part, ldm_unet(layer) if part == "unet" else layer)


def peft(part: str, layer: str) -> dict[str, str]:
    return {kind: f"{part}.{layer}.lora_{letter}.weight" for kind, letter in (("down", "A"), ("up", "B"))}


def diffusers_now(part: str, layer: str) -> dict[str, str]:
    return {kind: f"{part}.{layer}.lora.{kind}.weight" for kind in ("down", "up")}


def diffusers_old(part: str, layer: str) -> dict[str, str]:
    """Those of the attention processors."""
    if part == "unet":
        block, _, name = layer.removesuffix(".0").rpartition(".")
        start = f"unet.{block}.processor.{name}_lora"
    else:
        words = {"q_proj": "to_q_lora", "out_proj": "to_out_lora"}
        block, _, name = layer.rpartition(".")
        start = f"text_encoder.{block}.{words[name]}"
    return {kind: f"{start}.{kind}.weight" for kind in ("down", "up")}


def linear_layer(part: str, layer: str) -> dict[str, str]:
    if part == "unet":
        return diffusers_old(part, layer)
    return {kind: f"{part}.{layer}.lora_linear_layer.{kind}.weight" for kind in ("down", "up")}


def bare(part: str, layer: str) -> dict[str, str]:
    """What a UNet's `save_attn_procs` writes."""
    return {kind: name.removeprefix("unet.") for kind, name in diffusers_old(part, layer).items()}


SPELLINGS = [
    (kohya, LAYERS),
    (kohya_original, LAYERS),
    (peft, LAYERS),
    (diffusers_now, LAYERS),
    (diffusers_old, OLD_LAYERS),
    (linear_layer, OLD_LAYERS),
    (bare, {"unet": OLD_LAYERS["unet"]}),
]


def lora_file(path: Path, model: Model, spell=kohya, layers=LAYERS, alpha: float = 2.0, **changed) -> Path:
    """A LoRA of these layers. alpha: where the spelling has a tensor for it; changed: tensors for its own."""
    tensors = {}
    for part, names in layers.items():
        for seed, layer in enumerate(names):
            spelled = spell(part, layer)
            down, up = matrices(tuple(weight_of(model, part, layer).shape), seed)
            values = {"down": down, "up": up, "alpha": torch.tensor(alpha)}
            tensors |= {name: values[kind].contiguous() for kind, name in spelled.items()}
    save_file({name: tensor for name, tensor in (tensors | changed).items() if tensor is not None}, path)
    return path


def by_definition(weight: Tensor, seed: int, scale: float) -> Tensor:
    down, up = matrices(tuple(weight.shape), seed)
    return weight + scale * (up.flatten(1).double() @ down.flatten(1).double()).view_as(weight).float()


# ---- Merging ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spell", "layers"), SPELLINGS, ids=[spell.__name__ for spell, _ in SPELLINGS])
def test_every_spelling_is_merged_by_the_definition_and_nothing_else_changes(
    folder, plain, tmp_path, spell, layers
):
    path = lora_file(tmp_path / "style.safetensors", plain, spell, layers)
    loaded = load_model(folder, loras=[LoRA(str(path), 0.7)])
    scale = 0.7 * (2 / RANK if "alpha" in spell("unet", ATTENTION) else 1)
    for part in ("unet", "controlnet", "vae", "text_encoder"):
        before, after = (getattr(model, part).state_dict() for model in (plain, loaded))
        for name, tensor in before.items():
            layer, source = name.removesuffix(".weight"), name.replace("attn_temp", "attn1")
            if layer in layers.get(part, ()):
                expected = by_definition(tensor, layers[part].index(layer), scale)
                assert (after[name] - expected).abs().max() < 1e-5
                assert (after[name] - tensor).abs().max() > 0.1
            elif source != name:  # temporal attention starts as the attention that it is copied from
                assert torch.equal(after[name], after[source])
            else:
                assert torch.equal(after[name], tensor)
        assert not any(parameter.requires_grad for parameter in getattr(loaded, part).parameters())


def merged_by_diffusers(path: Path, folder: Path, weight: float) -> dict[str, nn.Module]:
    """A kohya LoRA in diffusers' and transformers' networks, where diffusers' translation of names puts it."""
    diffusers, transformers = (pytest.importorskip(name) for name in ("diffusers", "transformers"))
    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_lora_to_diffusers,
        _maybe_map_sgm_blocks_to_diffusers,
    )
    from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
    from safetensors.torch import load_file

    networks = {
        "unet": diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"),
        "text_encoder": transformers.CLIPTextModel.from_pretrained(folder / "text_encoder"),
    }
    tensors = _maybe_map_sgm_blocks_to_diffusers(load_file(path), networks["unet"].config)
    tensors, alphas = _convert_non_diffusers_lora_to_diffusers(tensors)
    for part, convert in (
        ("unet", convert_unet_state_dict_to_peft),
        ("text_encoder", convert_state_dict_to_peft),
    ):

        def own(named: dict, part: str = part) -> dict:
            start = f"{part}."
            return {n.removeprefix(start): value for n, value in named.items() if n.startswith(start)}

        scales, own_tensors = convert(own(alphas)) if part == "unet" else own(alphas), convert(own(tensors))
        scales = {n.split(".lora")[0].removesuffix(".alpha"): value for n, value in scales.items()}
        for name in [n for n in own_tensors if n.endswith("lora_A.weight")]:
            layer = name.removesuffix(".lora_A.weight")
            down, up = own_tensors[name], own_tensors[f"{layer}.lora_B.weight"]
            network = networks[part]
            flat = part == "text_encoder" and not hasattr(network, "text_model")  # as in transformers 5
            module = network.get_submodule(layer.removeprefix("text_model.") if flat else layer)
            change = (up.flatten(1) @ down.flatten(1)).view_as(module.weight)
            module.weight.data += weight * scales.get(layer, len(down)) / len(down) * change
    return networks


@pytest.mark.parametrize("spell", [kohya, kohya_original])
def test_kohya_s_names_are_found_as_diffusers_finds_them(folder, plain, tmp_path, spell):
    layers = {"unet": LAYERS["unet"][:6], "text_encoder": LAYERS["text_encoder"]}
    path = lora_file(tmp_path / "style.safetensors", plain, spell, layers, alpha=RANK)
    theirs = merged_by_diffusers(path, folder, 0.7)
    loaded = load_model(folder, loras=[LoRA(str(path), 0.7)])
    for part, network in theirs.items():
        ours = {n: t for n, t in getattr(loaded, part).state_dict().items() if "_temp." not in n}
        their = {n: t for n, t in network.state_dict().items() if "position_ids" not in n}
        if part == "text_encoder" and not hasattr(network, "text_model"):
            ours = {n.removeprefix("text_model."): t for n, t in ours.items()}
        assert ours.keys() == their.keys()
        assert all((ours[n] - their[n]).abs().max() < 1e-5 for n in ours)


def test_several_add_up_and_a_weight_may_be_negative(folder, plain, tmp_path):
    path = lora_file(tmp_path / "style.safetensors", plain)
    for weights, total in (((0.5, 0.25), 0.75), ((1.0, -1.0), 0.0)):
        loaded = load_model(folder, loras=[LoRA(str(path), weight) for weight in weights])
        expected = by_definition(weight_of(plain, "unet", ATTENTION), 0, total * 2 / RANK)
        assert (weight_of(loaded, "unet", ATTENTION) - expected).abs().max() < 1e-5


def test_half_precision_files_are_merged_in_float32(folder, plain, tmp_path):
    layers = {"unet": [ATTENTION]}
    down, up = (matrix.half() for matrix in matrices((16, 16), 0))
    names = peft("unet", ATTENTION)
    path = tmp_path / "half.safetensors"
    save_file({names["down"]: down, names["up"]: up}, path)
    before = weight_of(plain, "unet", layers["unet"][0])
    expected = before + up.float() @ down.float()
    assert torch.equal(weight_of(load_model(folder, loras=[LoRA(str(path))]), "unet", ATTENTION), expected)
    half = load_model(folder, dtype=torch.float16, loras=[LoRA(str(path))])
    assert torch.equal(weight_of(half, "unet", ATTENTION), expected.half())


def test_the_alpha_that_newer_versions_of_diffusers_write_beside_the_tensors_counts(
    folder, plain, tmp_path
):
    names, (down, up) = peft("unet", ATTENTION), matrices((16, 16), 0)
    settings = {"unet.r": RANK, "unet.lora_alpha": 6, "unet.alpha_pattern": {}, "unet.use_dora": False}
    path = tmp_path / "style.safetensors"
    tensors = {names["down"]: down, names["up"]: up}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(settings)})
    expected = by_definition(weight_of(plain, "unet", ATTENTION), 0, 6 / RANK)
    loaded = load_model(folder, loras=[LoRA(str(path))])
    assert (weight_of(loaded, "unet", ATTENTION) - expected).abs().max() < 1e-5
    settings["unet.alpha_pattern"] = {"to_q": 1}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(settings)})
    with pytest.raises(ValueError, match=r"is written with unet\.alpha_pattern, which is not read"):
        load_model(folder, loras=[LoRA(str(path))])


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_no_two_layers_of_stable_diffusion_share_a_spelling(part):
    with torch.device("meta"):
        network = UNet(UNetConfig()) if part == "unet" else TextEncoder(TextConfig())
    tensors = network.state_dict().items()
    layers = [n.removesuffix(".weight") for n, t in tensors if t.ndim > 1 and "_temp." not in n]
    spelled = [name for layer in layers for name in spellings(part, layer)]
    assert len(spelled) == len(set(spelled))


# ---- What does not fit --------------------------------------------------------------------------

FIRST = kohya("unet", ATTENTION)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (
            {FIRST["down"]: torch.ones(RANK, 9)},
            f"{FIRST['down']} is 3x9, expected 3x16; it is a LoRA of another",
        ),
        (
            {FIRST["up"]: torch.ones(9, RANK)},
            f"{FIRST['up']} is 9x3, expected 16x3; it is a LoRA of another",
        ),
        ({FIRST["up"]: torch.ones(16, 4)}, f"{FIRST['up']} is 16x4, expected 16x3; it is"),
        ({FIRST["up"]: None}, "but no matrix up; fetch it again"),
        ({FIRST["alpha"]: torch.tensor(torch.nan)}, f"{FIRST['alpha']} is no finite number"),
        ({FIRST["alpha"]: torch.ones(2)}, f"{FIRST['alpha']} is no finite number"),
        (
            {"lora_te2_text_model_x.alpha": torch.ones(())},
            "holds lora_te2_text_model_x.alpha, for which Stable",
        ),
        ({"lora_unet_x.lora_down.weight": torch.ones(3, 3)}, "no place; it is a LoRA of another model"),
        ({peft("unet", ATTENTION)["down"]: torch.ones(RANK, 16)}, "holds both lora_unet_down_blocks_1"),
        ({"lora_unet_x.lora_mid.weight": torch.ones(3, 3)}, "it is a LoRA with a third matrix"),
        (
            {"lora_unet_a.dora_scale": torch.ones(3, 3)},
            "holds lora_unet_a.dora_scale, it is a DoRA; give a plain",
        ),
        ({"lora_unet_a.hada_w1_a": torch.ones(3, 3)}, "it is an adapter of LyCORIS"),
        ({"a.conv.weight": torch.ones(3, 3)}, "holds a.conv.weight, which is no part of a LoRA"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused_with_file_and_tensor(folder, plain, tmp_path, changed, told):
    path = lora_file(tmp_path / "style.safetensors", plain, **changed)
    with pytest.raises(ValueError) as refused:
        load_model(folder, loras=[LoRA(str(path))])
    line = str(refused.value)
    assert line.startswith(f"{path}: ") and told in line and "\n" not in line


def test_a_file_that_is_missing_or_of_no_tensors_is_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="gone: no such file, given as LoRA"):
        remember_loras([LoRA("gone")])
    (tmp_path / "text.safetensors").write_text("nothing at all, but long enough to be a header")
    with pytest.raises(ValueError, match="truncated, corrupt or no file of weights"):
        load_model(folder, loras=[LoRA(str(tmp_path / "text.safetensors"))])


# ---- The command line ---------------------------------------------------------------------------


def test_the_option_takes_a_file_and_a_weight_several_times(tmp_path, capsys):
    def read(*values: str) -> list[LoRA]:
        options = [word for value in values for word in ("--lora", value)]
        return training_arguments(["clip.mp4", *options]).lora

    assert read() == []
    assert read("a.safetensors", "b:0.5", "c:d:-1") == [
        LoRA("a.safetensors"),
        LoRA("b", 0.5),
        LoRA("c:d", -1),
    ]
    odd = tmp_path / "style:v2"
    odd.touch()
    assert read(str(odd)) == [LoRA(str(odd))]
    for wrong in ("a:b", "a:nan", ":1", "", "a:"):
        with pytest.raises(SystemExit) as stopped:
            read(wrong)
        assert stopped.value.code == 2
        assert f"argument --lora: {wrong!r} is not a file and its weight" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_remembers_its_loras_and_sampling_refuses_others(workplace):  # noqa: F811
    plain = load_model(workplace / "model")
    layers = {"unet": [ATTENTION.replace("blocks.1", "blocks.0")], "text_encoder": [TEXT]}
    path = lora_file(workplace / "style.safetensors", plain, layers=layers)
    frames, few = {}, ("--frames", 2)
    for name, options in (("plain", ()), ("styled", ("--lora", "style.safetensors:0.5"))):
        main(workplace, *TRAIN, "--run", f"runs/{name}", *few, *options)
        main(workplace, *SAMPLE, "--run", f"runs/{name}", "--out", f"{name}.mp4")
        frames[name] = read_frames(workplace / f"{name}.mp4")[0]
    assert frames["plain"].shape == frames["styled"].shape
    assert (frames["plain"] != frames["styled"]).any()

    def settings(name: str) -> dict:
        return json.loads((workplace / "runs" / name / "settings.json").read_text())

    (remembered,) = settings("styled")["loras"]
    assert settings("plain")["loras"] is None
    assert (remembered["file"], remembered["weight"]) == ("style.safetensors", 0.5)
    assert len(remembered["sha256"]) == 64

    lora_file(path, plain, layers=layers, alpha=3)
    line = refusal(workplace, *SAMPLE, "--run", "runs/styled")
    assert line.startswith(
        "style.safetensors: is not the LoRA that the run was trained with; put that back"
    )
    path.unlink()
    line = refusal(workplace, *SAMPLE, "--run", "runs/styled")
    assert line == "style.safetensors: no such file, given as LoRA"
    line = refusal(workplace, *TRAIN, "--run", "runs/more", "--lora", "style.safetensors")
    assert line == "style.safetensors: no such file, given as LoRA"
    main(workplace, *SAMPLE, "--run", "runs/plain", "--out", "again.mp4")
    assert (read_frames(workplace / "again.mp4")[0] == frames["plain"]).all()


def test_settings_without_loras_have_none_and_damaged_ones_are_told():
    assert recall_loras({}) == recall_loras({"loras": None}) == []
    for damaged in ([{"file": "a"}], "abc", [3], [{"file": "a", "weight": "x", "sha256": ""}], 3):
        with pytest.raises(ValueError, match="given as loras; train again"):
            recall_loras({"loras": damaged})
