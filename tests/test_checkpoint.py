"""Loading, saving and downloading weights: every public layout, at small widths.

The manifests, which lie beside the repository, list the names and shapes of the public files. Most tests write
files of those names with all widths shrunk; those marked `parity` write them at full size.
"""

import contextlib
import copy
import ctypes
import dataclasses
import json
import os
import pickle
import random
import resource
import shutil
import socket
import struct
import subprocess
import sys
import time
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from functools import cache, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from weights import fill

import checkpoint
from checkpoint import Model, load_model
from clip import BYTE_SYMBOLS, END, START, WORD_END, TextConfig, TextEncoder, Tokenizer
from controlnet import ControlNet
from demo.puppet import clip as puppet_clip
from demo.save import save_model, save_openpose
from openpose import OpenPose, load_openpose
from poses.pose import save_poses
from public import layouts
from public.configs import read_openpose_sizes, read_sizes
from public.formats import TensorFile
from public.hub import OPENPOSE_CONTROL, PUBLIC_FILES, SD15, public_files
from public.places import DEMO
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig
from video import save_image

ROOT = Path(__file__).parents[1]
CASES = Path(__file__).parents[2] / "shared" / "cases"
needs_cases = pytest.mark.skipif(
    not CASES.is_dir(), reason="the cases, which are not in this repository, are not here"
)

ROOT = Path(__file__).parents[1]
SHARED = Path(__file__).parents[2] / "shared"

# Stable Diffusion 1.5 with widths 20 times smaller, its VAE 8 times, its text encoder 32 times.
UNET = {"widths": (16, 32, 64, 64), "context_dim": 24, "heads": 4, "norm_groups": 8}
VAE_SIZES = {"widths": (16, 32, 64, 64), "norm_groups": 8}
TEXT = {"vocab_size": 520, "width": 24, "heads": 4, "mlp_width": 96}


def shrunk(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if "text_model" in name:
        return tuple({49408: 520, 768: 24, 3072: 96}.get(size, size) for size in shape)
    if name.startswith(("first_stage_model", "encoder", "decoder", "quant", "post_quant")):
        return tuple(size // 8 if size >= 128 else size for size in shape)
    return tuple(24 if size == 768 else size // 20 if size % 320 == 0 else size for size in shape)


def public_shapes(manifest: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a public file's tensors, at full size."""
    path = SHARED / "checkpoints" / f"{manifest}.tsv"
    if not path.exists():
        pytest.skip(f"no list of the public file's tensors at {path}")
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    return {name: tuple(map(int, shape.split("x"))) for name, shape in lines}


@cache
def shrunk_tensors(manifest: str) -> dict[str, Tensor]:
    shapes = public_shapes(manifest)
    tensors = fill({name: shrunk(name, shape) for name, shape in shapes.items()})
    for name in tensors:
        if name.endswith("position_ids"):
            tensors[name] = torch.arange(77)[None]
    return tensors


def public_tensors(manifest: str) -> dict[str, Tensor]:
    """A public file's tensors with shrunk shapes, all different from each other."""
    return dict(shrunk_tensors(manifest))


def single_file() -> dict[str, Tensor]:
    """A community checkpoint: all networks in one file, with what training has left there."""
    tensors = public_tensors("sd15_single_file.ldm")
    extra = ["alphas_cumprod", "alphas_cumprod_prev", "betas", "log_one_minus_alphas_cumprod"]
    extra += ["posterior_variance", "posterior_mean_coef1", "posterior_log_variance_clipped"]
    extra += ["sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "logvar"]
    extra += ["sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"]
    tensors |= fill({name: (1000,) for name in extra})
    name = "model_ema.diffusion_modelinput_blocks00weight"
    return tensors | fill({name: (16, 4, 3, 3)}) | {"model_ema.decay": torch.tensor(0.9999)}


def write(path: Path, tensors: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return path


def weights(network: nn.Module) -> dict[str, Tensor]:
    """What a public file would hold of a network: all tensors but those of the temporal layers."""
    tensors = network.state_dict().items()
    return {name: tensor for name, tensor in tensors if "_temp." not in name}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    symbols = list(BYTE_SYMBOLS.values())
    merges = [("r", "e"), ("re", "d</w>"), ("a", "t</w>")]
    tokens = [*symbols, *(s + WORD_END for s in symbols), *map("".join, merges), START, END]
    return Tokenizer({token: index for index, token in enumerate(tokens)}, merges)


@pytest.fixture
def small(monkeypatch):
    """Takes the shrunk sizes for those of Stable Diffusion 1.5."""
    monkeypatch.setattr(checkpoint, "UNetConfig", partial(UNetConfig, **UNET))
    monkeypatch.setattr(checkpoint, "VAEConfig", partial(VAEConfig, **VAE_SIZES))
    monkeypatch.setattr(checkpoint, "TextConfig", partial(TextConfig, **TEXT))


@pytest.fixture(scope="module")
def model(tokenizer) -> Model:
    networks = {
        "unet": UNet(UNetConfig(**UNET)),
        "controlnet": ControlNet(UNetConfig(**UNET)),
        "vae": VAE(VAEConfig(**VAE_SIZES)),
        "text_encoder": TextEncoder(TextConfig(**TEXT)),
    }
    for part, network in networks.items():
        shapes = {f"{part}.{n}": tensor.shape for n, tensor in network.state_dict().items()}
        tensors = {n.removeprefix(f"{part}."): tensor for n, tensor in fill(shapes).items()}
        network.load_state_dict(tensors)
    settings = {"size": 256, "learning_rate": 1e-3, "method": "held", "guidance_until": 700}
    return Model(**networks, tokenizer=tokenizer, **settings)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_model(model, folder, torch.float32)
    return folder


@pytest.fixture
def offline(monkeypatch, tmp_path, saved):
    """No hub, but the tokenizer and the ControlNet in its cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for repo, path, source in [
        (SD15, "tokenizer/vocab.json", saved / "tokenizer/vocab.json"),
        (SD15, "tokenizer/merges.txt", saved / "tokenizer/merges.txt"),
        (
            OPENPOSE_CONTROL,
            "diffusion_pytorch_model.safetensors",
            saved / "controlnet/diffusion_pytorch_model.safetensors",
        ),
    ]:
        folder = tmp_path / "cache" / f"models--{repo.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / "main").write_text("c0ffee")
        target = folder / "snapshots" / "c0ffee" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source)


# ---- Saving and loading -------------------------------------------------------------------------


def test_a_saved_model_comes_back(model, saved):
    loaded = load_model(saved)
    for part in checkpoint.PARTS:
        ours, theirs = getattr(loaded, part), getattr(model, part)
        assert ours.config == theirs.config and same(weights(ours), weights(theirs))
    assert loaded.tokenizer.vocab == model.tokenizer.vocab
    assert loaded.tokenizer.merges == model.tokenizer.merges
    assert (loaded.size, loaded.learning_rate, loaded.guidance_until) == (256, 1e-3, 700)
    assert loaded.method == "held"


def test_temporal_layers_start_from_key_frame_attention_and_at_zero(saved):
    tensors = load_model(saved).unet.state_dict()
    temporal = [name for name in tensors if "_temp." in name]
    assert len(temporal) == 15 * 7
    for name in temporal:
        if "conv_temp" in name:
            assert not tensors[name].any()
        else:
            source = tensors[name.replace("attn_temp", "attn1")]
            assert torch.equal(tensors[name], source)
            assert tensors[name].data_ptr() != source.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_loaded_model_is_frozen_and_in_the_wanted_dtype_and_memory_format(saved, dtype):
    loaded = load_model(saved, dtype=dtype)
    for network in (getattr(loaded, part) for part in checkpoint.PARTS):
        assert not network.training
        for tensor in network.state_dict().values():
            assert tensor.dtype == dtype and tensor.device.type == "cpu"
            if tensor.ndim == 4:
                assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert not any(parameter.requires_grad for parameter in network.parameters())


def test_a_loaded_model_no_longer_needs_its_files(saved, tmp_path):
    folder = tmp_path / "copy"
    subprocess.run(["cp", "-r", saved, folder], check=True)
    loaded = load_model(folder)
    before = {name: tensor.clone() for name, tensor in loaded.unet.state_dict().items()}
    for path in folder.rglob("*.safetensors"):
        with path.open("r+b") as file:
            file.write(bytes(path.stat().st_size))
    assert same(loaded.unet.state_dict(), before)


def test_a_model_is_saved_in_half_precision_by_default(model, tmp_path):
    save_model(model, tmp_path / "half")
    tensors = load_file(tmp_path / "half" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert same(tensors, {name: t.half() for name, t in weights(model.unet).items()})


def test_a_unet_without_temporal_layers_can_be_saved(model, saved, tmp_path):
    plain = UNet(UNetConfig(**UNET))
    for module in plain.modules():
        if hasattr(module, "attn_temp"):
            del module.attn_temp, module.conv_temp
    plain.load_state_dict(weights(model.unet))
    save_model(Model(**{**model.__dict__, "unet": plain}), tmp_path / "plain", torch.float32)
    files = [folder / "unet/diffusion_pytorch_model.safetensors" for folder in (tmp_path / "plain", saved)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_failed_save_leaves_what_was_there(model, tmp_path):
    save_model(model, tmp_path / "model")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        with pytest.raises(OSError):
            save_model(model, tmp_path / "model", torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path for path in tmp_path.rglob("*")} == before.keys()
    assert all(path.stat().st_mtime_ns == before[path] for path in before if path.is_file())


@torch.no_grad()
def test_diffusers_and_transformers_read_a_saved_model(model, saved):
    diffusers, transformers = (pytest.importorskip(n) for n in ("diffusers", "transformers"))
    loaded = load_model(saved)
    tokens = loaded.tokenizer("a red hat")
    context = loaded.text_encoder(tokens)
    latents, hint = torch.randn(1, 4, 8, 8), torch.rand(1, 3, 64, 64)
    control = list(loaded.controlnet(latents, 501, context, loaded.controlnet.embed_hint(hint)))

    tokenizer = transformers.CLIPTokenizer.from_pretrained(saved / "tokenizer")
    encoded = tokenizer("a red hat", padding="max_length", return_tensors="pt").input_ids
    assert encoded[0].tolist() == tokens.tolist() and tokenizer.model_max_length == 77
    text_encoder = transformers.CLIPTextModel.from_pretrained(saved / "text_encoder")
    assert (text_encoder(encoded).last_hidden_state[0] - context).abs().max() < 1e-4

    unet = diffusers.UNet2DConditionModel.from_pretrained(saved / "unet")
    controlnet = diffusers.ControlNetModel.from_pretrained(saved / "controlnet")
    *residuals, middle = control
    theirs, their_middle = controlnet(latents, 501, context[None], hint, return_dict=False)
    for ours, their in zip(control, [*theirs, their_middle], strict=True):
        assert (ours - their).abs().max() < 1e-4
    noise = unet(
        latents,
        501,
        context[None],
        down_block_additional_residuals=residuals,
        mid_block_additional_residual=middle,
    ).sample
    assert (loaded.unet(latents, 501, context, control) - noise).abs().max() < 1e-4

    vae = diffusers.AutoencoderKL.from_pretrained(saved / "vae")
    assert vae.config.scaling_factor == model.vae.config.scale
    assert (loaded.vae.decode(latents) - vae.decode(latents).sample).abs().max() < 1e-4


def test_a_folder_that_diffusers_and_transformers_wrote_is_read(model, saved, tmp_path):
    diffusers, transformers = (pytest.importorskip(n) for n in ("diffusers", "transformers"))
    for part, theirs in [
        ("unet", diffusers.UNet2DConditionModel),
        ("controlnet", diffusers.ControlNetModel),
        ("vae", diffusers.AutoencoderKL),
        ("text_encoder", transformers.CLIPTextModel),
        ("tokenizer", transformers.CLIPTokenizer),
    ]:
        theirs.from_pretrained(saved / part).save_pretrained(tmp_path / part)
    loaded = load_model(tmp_path)
    for part in checkpoint.PARTS:
        assert same(weights(getattr(loaded, part)), weights(getattr(model, part)))
    assert loaded.tokenizer("a red hat").tolist() == model.tokenizer("a red hat").tolist()
    assert (loaded.size, loaded.learning_rate, loaded.method) == (512, 1e-4, "paper")  # it does not say


def test_half_precision_files_are_preferred_in_half_precision_only(saved, tmp_path):
    subprocess.run(["cp", "-r", saved, tmp_path / "model"], check=True)
    full = tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    halves = {name: tensor.half() + 1 for name, tensor in load_file(full).items()}
    write(full.with_name("diffusion_pytorch_model.fp16.safetensors"), halves)
    name = "encoder.conv_in.bias"
    in_half = load_model(tmp_path / "model", dtype=torch.float16).vae.state_dict()[name]
    assert torch.equal(in_half, halves[name])
    in_full = load_model(tmp_path / "model").vae.state_dict()[name]
    assert torch.equal(in_full, load_file(full)[name])
    full.unlink()
    assert torch.equal(load_model(tmp_path / "model").vae.state_dict()[name], halves[name].float())


def test_saving_over_a_model_leaves_none_of_its_older_weights(model, tmp_path):
    save_model(model, tmp_path, torch.float32)
    part = tmp_path / "vae"
    (part / "diffusion_pytorch_model.safetensors").rename(part / "diffusion_pytorch_model.fp16.safetensors")
    newer = copy.deepcopy(model.vae)
    newer.quant_conv.bias.data += 1
    save_model(dataclasses.replace(model, vae=newer), tmp_path, torch.float32)
    loaded = load_model(tmp_path, dtype=torch.float16).vae
    assert torch.equal(loaded.quant_conv.bias, newer.quant_conv.bias.half())


def test_a_model_s_own_openpose_is_saved_and_loaded(model, tmp_path):
    openpose = OpenPose(0.05, stages=(3, 2, 1), hand_sizes=(40, 80), face_size=64)
    path = tmp_path / "model"
    save_model(model, path)
    save_openpose(openpose, path / "openpose", torch.float32)
    loaded = load_openpose(path)
    assert loaded.config == openpose.config and not loaded.training
    assert same(loaded.state_dict(), openpose.state_dict())


def test_a_mistyped_model_is_not_taken_for_the_public_one():
    with pytest.raises(FileNotFoundError, match="demmo: no such model; give sd15, demo"):
        load_openpose("demmo")


# ---- Layouts ------------------------------------------------------------------------------------


def test_no_two_tensors_of_the_test_files_are_equal():
    """Else the tests of layouts would not see that two of the same shape are mistaken."""
    for manifest in ("sd15_single_file.ldm", "controlnet_openpose.ldm"):
        tensors = public_tensors(manifest)
        assert len({tensor.numpy().tobytes() for tensor in tensors.values()}) == len(tensors)


def as_diffusers_reads_it(part: str, tensors: dict[str, Tensor], saved: Path) -> dict[str, Tensor]:
    """The tensors of a part by diffusers' own names, as its own reader of single files finds them."""
    diffusers = pytest.importorskip("diffusers")
    reader = {
        "unet": diffusers.UNet2DConditionModel,
        "controlnet": diffusers.ControlNetModel,
        "vae": diffusers.AutoencoderKL,
    }[part]
    network = reader.from_single_file(dict(tensors), config=str(saved / part), local_files_only=True)
    return network.state_dict()


@pytest.mark.parametrize("extension", ["safetensors", "ckpt"])
def test_a_single_file_is_read_as_diffusers_reads_it(small, offline, saved, tmp_path, extension):
    tensors = single_file()
    contents = tensors if extension == "safetensors" else {"state_dict": tensors, "epoch": 3}
    loaded = load_model(write(tmp_path / f"community.{extension}", contents))
    for part in ("unet", "vae"):
        expected = as_diffusers_reads_it(part, tensors, saved)
        assert same(weights(getattr(loaded, part)), expected)
    prefix = "cond_stage_model.transformer."
    for name, tensor in loaded.text_encoder.state_dict().items():
        assert torch.equal(tensor, tensors[prefix + name])


def test_a_single_file_without_the_text_model_s_prefix_is_read(small, offline, tmp_path):
    """As old versions of transformers and some merging tools leave it."""
    tensors = single_file()
    old = {name.replace("transformer.text_model.", "transformer."): t for name, t in tensors.items()}
    loaded = load_model(write(tmp_path / "old.safetensors", old))
    expected = load_model(write(tmp_path / "new.safetensors", tensors))
    assert same(weights(loaded.text_encoder), weights(expected.text_encoder))


@pytest.mark.parametrize("prefix", ["control_model.", ""])
@pytest.mark.parametrize("nested", [False, True])
def test_a_controlnet_pth_is_read_as_diffusers_reads_it(saved, offline, small, tmp_path, prefix, nested):
    tensors = public_tensors("controlnet_openpose.ldm")
    expected = as_diffusers_reads_it("controlnet", tensors, saved)
    renamed = {prefix + name.removeprefix("control_model."): t for name, t in tensors.items()}
    path = write(tmp_path / "control.pth", {"state_dict": renamed} if nested else renamed)
    assert same(load_model(saved, controlnet=path).controlnet.state_dict(), expected)


def load_vae(path: Path) -> dict[str, Tensor]:
    """The tensors of a VAE with shrunk widths, as `load_model` loads it."""
    with torch.device("meta"):
        vae = VAE(VAEConfig(**VAE_SIZES))
    checkpoint.fill(vae, "vae", path, "cpu", torch.float32)
    return vae.state_dict()


@pytest.mark.parametrize("shape", ["linear", "convolution"])
def test_a_vae_with_the_old_attention_names_is_read(tmp_path, shape):
    expected = public_tensors("vae")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in expected.items():
        for new_word, old_word in old.items():
            name = name.replace(new_word, old_word)
        if shape == "convolution" and "attentions" in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        tensors[name] = tensor
    assert {name: t.squeeze().shape for name, t in tensors.items()} == {
        name: torch.Size(size for size in shrunk(name, shape) if size != 1)
        for name, shape in public_shapes("vae.old_attention_names").items()
    }
    assert same(load_vae(write(tmp_path / "vae.safetensors", tensors)), expected)


@pytest.mark.parametrize("prefix", ["first_stage_model.", ""])
def test_a_vae_in_the_original_layout_is_read(small, saved, tmp_path, prefix):
    """The VAEs that people share for the single-file layout, on their own or in a whole model."""
    whole = single_file()
    vae = {name: tensor for name, tensor in whole.items() if name.startswith("first_stage_model.")}
    renamed = {prefix + name.removeprefix("first_stage_model."): t for name, t in vae.items()}
    renamed["loss.logvar"] = torch.zeros(())
    expected = as_diffusers_reads_it("vae", whole, saved)
    assert same(load_vae(write(tmp_path / "vae.ckpt", {"state_dict": renamed})), expected)
    whole = write(tmp_path / "whole.safetensors", whole)
    assert same(load_model(saved, vae=whole).vae.state_dict(), expected)


def test_a_text_encoder_with_position_ids_is_read(small, saved, tmp_path):
    subprocess.run(["cp", "-r", saved, tmp_path / "model"], check=True)
    tensors = public_tensors("text_encoder")
    write(tmp_path / "model" / "text_encoder" / "model.safetensors", tensors)
    loaded = load_model(tmp_path / "model").text_encoder.state_dict()
    del tensors["text_model.embeddings.position_ids"]
    assert same(loaded, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["vae.safetensors", "vae.pt", "vae.ckpt"])
def test_files_of_every_precision_are_read(tmp_path, name, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in public_tensors("vae").items()}
    loaded = load_vae(write(tmp_path / name, tensors))
    assert same(loaded, {name: tensor.float() for name, tensor in tensors.items()})


def test_a_pickle_from_before_pytorch_1_6_is_read(tmp_path):
    tensors = public_tensors("vae")
    torch.save(tensors, tmp_path / "vae.pth", _use_new_zipfile_serialization=False)
    assert same(load_vae(tmp_path / "vae.pth"), tensors)


def test_a_file_s_name_says_nothing_about_what_it_holds(tmp_path):
    tensors = public_tensors("vae")
    write(tmp_path / "a.safetensors", tensors).rename(tmp_path / "vae.ckpt")
    write(tmp_path / "b.ckpt", tensors).rename(tmp_path / "vae.safetensors")
    assert same(load_vae(tmp_path / "vae.ckpt"), tensors)
    assert same(load_vae(tmp_path / "vae.safetensors"), tensors)


@pytest.mark.parametrize("start", [b"PK", b"\x80\x02", b"\x80\x04"])
def test_a_safetensors_header_as_long_as_makes_it_look_like_a_pickle_is_no_matter(tmp_path, start):
    tensors = public_tensors("vae")
    path = write(tmp_path / "vae.safetensors", tensors)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    padded = int.from_bytes(start, "little")
    while padded < length:
        padded += 2**16
    header = content[8 : 8 + length].ljust(padded)
    path.write_bytes(padded.to_bytes(8, "little") + header + content[8 + length :])
    assert path.read_bytes().startswith(start)
    assert same(load_vae(path), tensors)


@pytest.mark.parametrize(
    "table, one, other",
    [
        ("LDM_VAE_LAYERS", "to_q", "to_k"),
        ("LDM_UNET_RESNET", "norm2", "conv2"),
        ("LDM_UNET_RESNET", "conv1", "conv2"),
        ("OLD_ATTENTION", "to_v", "to_out.0"),
    ],
)
def test_a_wrong_mapping_of_two_tensors_does_not_go_unnoticed(
    small, saved, tmp_path, monkeypatch, table, one, other
):
    """That is, the comparisons above fail, or loading does, when two names are exchanged."""
    tensors = single_file()
    path = write(tmp_path / "model.safetensors", tensors)
    names = getattr(layouts, table)
    exchanged = {one: names[other], other: names[one]}
    for name in exchanged:
        monkeypatch.setitem(names, name, exchanged[name])
    if table == "OLD_ATTENTION":
        with pytest.raises(AssertionError):
            test_a_vae_with_the_old_attention_names_is_read(tmp_path, "linear")
        return
    part, network = ("vae", VAE(VAEConfig(**VAE_SIZES)))
    if table == "LDM_UNET_RESNET":
        part, network = ("unet", UNet(UNetConfig(**UNET)))
    try:
        checkpoint.fill(network, part, path, "cpu", torch.float32)
    except ValueError as error:
        assert "expected" in str(error)
    else:
        assert not same(weights(network), as_diffusers_reads_it(part, tensors, saved))


# ---- Files that do not fit ----------------------------------------------------------------------


def error_of(call: Callable, *args, **kwargs) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_tensor_is_named(tmp_path):
    tensors = public_tensors("vae")
    del tensors["decoder.conv_in.bias"]
    error = error_of(load_vae, write(tmp_path / "vae.safetensors", tensors))
    assert error.startswith(f"{tmp_path}/vae.safetensors: lacks decoder.conv_in.bias, ")


def test_an_unknown_tensor_is_named(tmp_path):
    tensors = public_tensors("vae") | {"decoder.extra": torch.zeros(3)}
    error = error_of(load_vae, write(tmp_path / "vae.safetensors", tensors))
    assert error.startswith(f"{tmp_path}/vae.safetensors: holds decoder.extra, ")


def test_an_unknown_tensor_of_a_single_file_is_named(small, offline, tmp_path):
    path = write(tmp_path / "model.safetensors", single_file() | {"v_pred": torch.zeros(3)})
    assert "holds v_pred" in error_of(load_model, path)


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(tmp_path):
    tensors = public_tensors("vae") | {"decoder.conv_in.bias": torch.zeros(7)}
    error = error_of(load_vae, write(tmp_path / "vae.safetensors", tensors))
    assert f"{tmp_path}/vae.safetensors: decoder.conv_in.bias is 7, expected 64" in error


def test_whole_numbers_are_no_weights(tmp_path):
    tensors = {name: tensor.to(torch.int8) for name, tensor in public_tensors("vae").items()}
    error = error_of(load_vae, write(tmp_path / "vae.safetensors", tensors))
    assert "torch.int8" in error


def test_a_model_for_inpainting_is_told(small, offline, tmp_path):
    name = "model.diffusion_model.input_blocks.0.0.weight"
    path = write(tmp_path / "model.safetensors", single_file() | {name: torch.zeros(16, 9, 3, 3)})
    error = error_of(load_model, path)
    assert (
        f"{path}: {name} is 16x9x3x3, expected 16x4x3x3; needed is the unet of Stable Diffusion 1.5"
        in error
    )


def test_a_unet_of_stable_diffusion_2_is_told(small, saved, tmp_path):
    subprocess.run(["cp", "-r", saved, tmp_path / "model"], check=True)
    tensors = public_tensors("unet")
    for name in tensors:
        if "attn2.to_k" in name or "attn2.to_v" in name:
            tensors[name] = torch.zeros(len(tensors[name]), 1024)
    write(tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors", tensors)
    error = error_of(load_model, tmp_path / "model")
    assert "attn2.to_k.weight is 16x1024, expected 16x24" in error


@pytest.mark.parametrize(
    "name, told",
    [
        ("conditioner.embedders.1.model.ln_final.weight", "Stable Diffusion XL"),
        ("model.diffusion_model.label_emb.0.0.weight", "Stable Diffusion XL"),
        ("cond_stage_model.model.ln_final.weight", "Stable Diffusion 2"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "a LoRA"),
    ],
)
def test_files_of_other_models_are_told_by_a_tensor(small, offline, tmp_path, name, told):
    path = write(tmp_path / "model.safetensors", {name: torch.zeros(3)})
    assert error_of(load_model, path).startswith(f"{path}: is {told}")


@pytest.mark.parametrize(
    "key, value, told",
    [
        ("in_channels", 9, "in_channels is 9, expected 4; a Stable Diffusion 1.5 model is needed"),
        ("use_linear_projection", True, "use_linear_projection is True, expected False"),
        ("addition_embed_type", "text_time", "addition_embed_type is 'text_time', expected None"),
        ("cross_attention_dim", 32, "text encoder's width: 24"),
        ("norm_num_groups", 4, "ControlNet's norm_groups: 8"),
    ],
)
def test_folders_of_other_models_are_told_by_their_config(saved, tmp_path, key, value, told):
    subprocess.run(["cp", "-r", saved, tmp_path / "model"], check=True)
    path = tmp_path / "model" / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    assert told in error_of(load_model, tmp_path / "model")


@pytest.mark.parametrize(
    "file, key, value",
    [
        ("unet/config.json", "layers_per_block", [1, 1, 1, 1]),
        ("unet/config.json", "attention_head_dim", [2, 2, 2, 2]),
        ("unet/config.json", "cross_attention_dim", [24]),
        ("unet/config.json", "norm_num_groups", 7),
        ("unet/config.json", "block_out_channels", []),
        ("controlnet/config.json", "norm_num_groups", 7),
        ("controlnet/config.json", "conditioning_embedding_out_channels", "abcd"),
        ("controlnet/config.json", "conditioning_embedding_out_channels", 5),
        ("vae/config.json", "layers_per_block", "2"),
        ("vae/config.json", "norm_num_groups", None),
        ("vae/config.json", "block_out_channels", "abcd"),
        ("vae/config.json", "scaling_factor", "x"),
        ("text_encoder/config.json", "hidden_size", None),
        ("posecrafter.json", "size", "big"),
        ("posecrafter.json", "learning_rate", None),
        ("posecrafter.json", "method", "magic"),
    ],
)
def test_a_setting_that_cannot_be_is_named_with_its_file(saved, tmp_path, file, key, value):
    subprocess.run(["cp", "-r", saved, tmp_path / "model"], check=True)
    path = tmp_path / "model" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    assert error_of(load_model, tmp_path / "model").startswith(f"{path}: ")


def test_another_model_s_tokenizer_is_named(saved, tmp_path):
    subprocess.run(["cp", "-r", saved, tmp_path / "model"], check=True)
    folder = tmp_path / "model" / "tokenizer"
    (folder / "vocab.json").unlink()
    unigram = {"model": {"type": "Unigram", "vocab": [["a", -1.0]]}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(unigram))
    assert error_of(load_model, tmp_path / "model").startswith(f"{folder}: no CLIP tokenizer")


def test_a_model_that_predicts_velocities_is_refused(saved, tmp_path):
    subprocess.run(["cp", "-r", saved, tmp_path / "model"], check=True)
    (tmp_path / "model" / "scheduler").mkdir()
    scheduler = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    scheduler.write_text('{"prediction_type": "v_prediction"}')
    assert "velocities" in error_of(load_model, tmp_path / "model")


def test_a_config_that_does_not_say_enough_is_named(saved, tmp_path):
    subprocess.run(["cp", "-r", saved, tmp_path / "model"], check=True)
    path = tmp_path / "model" / "vae" / "config.json"
    path.write_text("{}")
    assert error_of(load_model, tmp_path / "model") == f"{path}: does not say latent_channels"
    path.write_text("{")
    assert error_of(load_model, tmp_path / "model").startswith(f"{path}: not readable as JSON")


@pytest.mark.parametrize("name", ["vae/config.json", "posecrafter.json", "scheduler/scheduler_config.json"])
def test_a_json_file_that_is_no_object_is_named(saved, tmp_path, name):
    subprocess.run(["cp", "-r", saved, tmp_path / "model"], check=True)
    path = tmp_path / "model" / name
    path.parent.mkdir(exist_ok=True)
    for content in ("[]", "null", '"text"', "3"):
        path.write_text(content)
        told = error_of(load_model, tmp_path / "model")
        assert told.startswith(f"{path}: holds ") and told.endswith("an object with settings is needed")


def test_what_is_no_model_is_named(tmp_path):
    assert "absent: no such model; give sd15, demo" in error_of(load_model, tmp_path / "absent")
    assert "has no unet/" in error_of(load_model, tmp_path)


@pytest.mark.parametrize("name", ["vae.safetensors", "vae.ckpt", "old.ckpt"])
def test_truncated_files_are_told(tmp_path, name):
    path, tensors = tmp_path / name, public_tensors("vae")
    write(path, tensors)
    if name == "old.ckpt":
        torch.save(tensors, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 1000, 40):
        path.write_bytes(whole[:length])
        assert error_of(load_vae, path).startswith(f"{path}: truncated, corrupt or")


def test_corrupt_files_are_told(tmp_path):
    noise = torch.randint(256, (9999,), generator=torch.Generator().manual_seed(0)).tolist()
    for start in (b"", b"PK\x03\x04", b"\x80\x02", b"{"):
        path = tmp_path / "vae.safetensors"
        path.write_bytes(start + bytes(noise))
        assert error_of(load_vae, path).startswith(f"{path}: truncated, corrupt or")


def test_flipped_bits_in_a_pickle_are_told_too(tmp_path):
    """They can raise nearly anything on being read."""
    path, dice = tmp_path / "vae.pth", random.Random(0)
    torch.save(public_tensors("vae"), path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for _ in range(100):
        flipped = bytearray(whole)
        flipped[dice.randrange(2000)] ^= 1 << dice.randrange(8)
        path.write_bytes(flipped)
        with contextlib.suppress(ValueError):  # where it changes a number, nothing is wrong
            load_vae(path)
    torch.save({0: torch.zeros(2)}, path)
    assert "holds no tensors by name" in error_of(load_vae, path)


def test_what_is_no_file_of_weights_is_told(tmp_path):
    path = tmp_path / "vae.safetensors"
    for content, told in [
        ("", "the file is empty"),
        ("<!DOCTYPE html><html>Sign in</html>", "a web page"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
        ("just some text, long enough to be a header of safetensors", "truncated, corrupt or no"),
    ]:
        path.write_text(content)
        assert error_of(load_vae, path).startswith(f"{path}: {told}")


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("form", ["zip", "old", "bare", "bare protocol 4", "nested"])
def test_a_pickle_that_would_run_code_is_refused_and_did_not_run(tmp_path, form):
    path, harm = tmp_path / "vae.ckpt", tmp_path / "harm"
    contents = public_tensors("vae") | {"harm": Malicious(harm)}
    if form.startswith("bare"):
        path.write_bytes(pickle.dumps(contents["harm"], protocol=4 if "4" in form else 2))
    elif form == "nested":
        torch.save({"state_dict": {"state_dict": contents}}, path)
    else:
        torch.save(contents, path, _use_new_zipfile_serialization=form == "zip")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, of a protocol that it does not know
        error = error_of(load_vae, path)
    assert error.startswith(f"{path}: ") and not harm.exists()
    if form != "bare protocol 4":
        assert "wants to call posix.system on being read, which is refused" in error
    pickle.loads(pickle.dumps(Malicious(harm)))
    assert harm.exists()  # so the test would have seen it


# ---- Files that would keep a reader busy ----


def cyclic(path: Path) -> None:
    content = {}
    content["state_dict"] = content
    torch.save(content, path)


def claiming(path: Path) -> None:
    torch.save({"a": torch.ones(1).as_strided((10**6, 10**6), (0, 0))}, path)


def aliasing(path: Path) -> None:
    one = torch.ones(10**5)
    torch.save({str(index): one.view(100, 1000) for index in range(50)}, path)


def compressed(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("vae/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("vae/version", "3")
        archive.writestr("vae/data/0", bytes(10**8))


def filling_memory(path: Path) -> None:
    """Makes 100 GB of zeros when it is read as weights."""
    call = b"\x80\x02cbuiltins\nbytearray\n\x8a\x05" + (10**11).to_bytes(5, "little") + b"\x85R."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("vae/data.pkl", call)
        archive.writestr("vae/version", "3")


def endless(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("vae/data.pkl", b"\x80\x02" + b"]0" * 2 * 10**6 + b"}.")
        archive.writestr("vae/version", "3")


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (cyclic, "holds no tensors by name"),
        (claiming, "'a' claims more numbers than are stored"),
        (aliasing, "'1' claims more numbers than are stored"),
        (compressed, "a compressed archive of 0.10 GB, which is not unfolded"),
        (filling_memory, "wants to call builtins.bytearray on being read, which is refused"),
        (endless, "holds far more than the names of a model's tensors"),
        (
            lambda path: torch.save({"a": torch.ones(2, device="meta")}, path),
            "_rebuild_meta_tensor_no_storage",
        ),
        (lambda path: torch.save({"a": torch.ones(2).to_sparse()}, path), "_rebuild_sparse_tensor"),
        (lambda path: torch.save({"a\033[2J": torch.ones(2)}, path), "'a\\x1b[2J' is no name of a tensor"),
    ],
)
def test_a_file_that_claims_more_than_it_holds_is_refused_at_once(tmp_path, make, told):
    path = tmp_path / "vae.pth"
    make(path)
    start = time.monotonic()
    error = error_of(load_vae, path)
    told = told.replace("'1'", "'2'") if make is aliasing else told  # the file may hold two of them
    assert error.startswith(f"{path}: ") and told in error
    assert time.monotonic() - start < 10


@needs_cases
@pytest.mark.parametrize("name", ["cyclic.pth", "stride.pth"])
def test_a_case_of_weights_is_refused(name):
    assert error_of(load_vae, CASES / name).startswith(f"{CASES / name}: ")


def test_a_tensor_that_is_not_finite_is_named(tmp_path):
    tensors = public_tensors("vae")
    tensors["decoder.conv_in.bias"][0] = float("nan")
    error = error_of(load_vae, write(tmp_path / "vae.safetensors", tensors))
    assert "decoder.conv_in.bias has numbers that are not finite" in error


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("unet", {"block_out_channels": [2**30, 2**30]}),
        ("unet", {"block_out_channels": [32] * 10**5, "down_block_types": None}),
        ("vae", {"layers_per_block": 10**7}),
        ("vae", {"scaling_factor": float("inf")}),
        ("text_encoder", {"num_hidden_layers": 10**7}),
        ("text_encoder", {"vocab_size": 10**400}),
        ("openpose", {"stages": [10**7, 1, 1]}),
        ("openpose", {"stages": []}),
        ("openpose", {"face_size": 10**6}),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_built(part, change):
    if part == "openpose":
        read, config = read_openpose_sizes, {}
    else:
        read, config = partial(read_sizes, part), json.loads((DEMO / part / "config.json").read_text())
    start = time.monotonic()
    error = error_of(read, config | change)
    assert len(error) < 500 and time.monotonic() - start < 5


@pytest.mark.parametrize(
    "name",
    ["unet/config.json", "tokenizer/vocab.json", "scheduler/scheduler_config.json", "posecrafter.json"],
)
def test_a_json_file_that_is_nested_too_deep_is_named(saved, tmp_path, name):
    subprocess.run(["cp", "-r", saved, tmp_path / "model"], check=True)
    path = tmp_path / "model" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("[" * 10**5 + "]" * 10**5)
    assert f"{path}: not readable as JSON (nested too deep)" in error_of(load_model, tmp_path / "model")


def test_a_vocabulary_with_ids_that_are_no_numbers_is_refused(saved, tmp_path):
    subprocess.run(["cp", "-r", saved / "tokenizer", tmp_path], check=True)
    path = tmp_path / "tokenizer" / "vocab.json"
    path.write_text(json.dumps(dict.fromkeys(json.loads(path.read_text()), "1")))
    assert "ids that are no whole numbers" in error_of(Tokenizer.load, path.parent)


def test_the_command_line_refuses_weights_that_hold_themselves(tmp_path):
    """In one line, with exit code 2, and makes no folder for the run."""
    shutil.copytree(DEMO, tmp_path / "model")
    for file in (tmp_path / "model" / "vae").glob("*.safetensors"):
        file.unlink()
    weights = tmp_path / "model" / "vae" / "diffusion_pytorch_model.bin"
    cyclic(weights)
    frames, poses, _ = puppet_clip(3, 5, 8, 64)
    (tmp_path / "frames").mkdir()
    for index, frame in enumerate(frames):
        save_image(tmp_path / "frames" / f"{index}.png", frame)
    save_poses(tmp_path / "poses.json", poses, 64, 64)
    before = sorted(tmp_path.rglob("*"))
    command = ["train.py", "frames", "--poses", "poses.json", "--model", "model", "--run", "run"]
    done = subprocess.run(
        [sys.executable, ROOT / command[0], *command[1:]], cwd=tmp_path, capture_output=True, text=True
    )
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and "holds no tensors by name" in lines[-1], done.stderr
    assert "Traceback" not in done.stderr and sorted(tmp_path.rglob("*")) == before


# ---- Memory -------------------------------------------------------------------------------------


def peak_memory_of(call: Callable) -> tuple[float, object]:
    """By how many bytes the memory of this process rose above what it was, files it maps included."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("memory is measured on Linux only")

    def kilobytes(key: str) -> int:
        return int(next(line.split()[1] for line in status.open() if line.startswith(key)))

    ctypes.CDLL(None).malloc_trim(0)  # else memory freed before would be taken again, unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = kilobytes("VmRSS:")
    result = call()
    return (kilobytes("VmHWM:") - before) * 1024, result


def test_loading_takes_little_more_memory_than_the_weights(tmp_path):
    config = TextConfig(vocab_size=600, width=512, heads=8, layers=32, mlp_width=1024, length=20)
    with torch.device("meta"):
        network = TextEncoder(config)
    tensors = {name: torch.ones(t.shape) for name, t in network.state_dict().items()}
    path = write(tmp_path / "model.safetensors", tensors)
    loaded_bytes = sum(tensor.nbytes for tensor in tensors.values())
    assert loaded_bytes > 2.5e8
    del tensors
    load = partial(checkpoint.fill, network, "text_encoder", path, "cpu", torch.float32)
    peak, _ = peak_memory_of(load)
    print(f"{peak / loaded_bytes:.3f} times the weights")
    assert 0.9 < peak / loaded_bytes < 1.15


# ---- Downloads ----------------------------------------------------------------------------------


class Hub:
    """A hub on loopback that serves files by repository, and can be told to fail."""

    def __init__(self):
        self.files: dict[str, bytes] = {}  # "owner/name/path" -> content
        self.drop: set[str] = set()  # break the connection halfway through these, once
        self.cut: set[str] = set()  # serve only the first half of these, as if that were all
        self.requests: list[tuple[str, str, str | None]] = []  # method, file, range
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                self.answer()

            def do_GET(self):
                self.answer()

            def answer(self):
                name = self.path.split("?")[0].strip("/").replace("/resolve/main/", "/")
                wanted = self.headers.get("Range")
                hub.requests.append((self.command, name, wanted))
                content = hub.files.get(name)
                if content is None:
                    self.send_response(404)
                    self.send_header("X-Error-Code", "EntryNotFound")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                etag = f'"{hash(content) & 0xFFFFFFFFFFFF:x}"'
                if self.command == "GET" and name in hub.cut:
                    content = content[: len(content) // 2]
                start = int(wanted.split("=")[1].split("-")[0]) if wanted else 0
                self.send_response(206 if wanted else 200)
                self.send_header("X-Repo-Commit", "c0ffee")
                self.send_header("ETag", etag)
                self.send_header("Content-Length", str(len(content) - start))
                if wanted:
                    last = len(content) - 1
                    self.send_header("Content-Range", f"bytes {start}-{last}/{len(content)}")
                self.end_headers()
                if self.command == "GET" and name in hub.drop:
                    hub.drop.remove(name)
                    content = content[: len(content) // 2]
                    self.close_connection = True
                if self.command == "GET":
                    self.wfile.write(content[start:])

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def stop(self):
        self.server.shutdown()
        self.server.server_close()

    def fetched(self) -> list[str]:
        """Which files have been asked for, with the client's other questions left out."""
        return [name for method, name, _ in self.requests if method == "GET" and name in self.files]


@pytest.fixture
def hub(monkeypatch, tmp_path, saved):
    """A hub with small files of the public names in full precision, and an empty cache."""
    hub = Hub()
    for part in ("unet", "text_encoder", "vae", "controlnet"):
        file = next(f for f in PUBLIC_FILES if f.part == part and ".fp16." not in f.path)
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        content = (saved / part / f"{stem}.safetensors").read_bytes()
        hub.files[f"{file.repo}/{file.path}"] = content
    for name in ("vocab.json", "merges.txt"):
        content = (saved / "tokenizer" / name).read_bytes()
        hub.files[f"{SD15}/tokenizer/{name}"] = content
    for name in ("body_pose_model", "hand_pose_model", "facenet"):
        hub.files[f"lllyasviel/Annotators/{name}.pth"] = name.encode()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield hub
    hub.stop()


def test_sd15_is_downloaded_once(hub, small, model):
    loaded = load_model("sd15")
    for part in checkpoint.PARTS:
        assert same(weights(getattr(loaded, part)), weights(getattr(model, part)))
    assert (loaded.size, loaded.learning_rate, loaded.method) == (512, 1e-4, "paper")
    assert len(hub.fetched()) == 6 and not any("Annotators" in name for name in hub.fetched())
    hub.stop()
    hub.requests.clear()
    assert same(weights(load_model("sd15").unet), weights(model.unet))
    assert not hub.requests


def test_the_public_openpose_is_downloaded(hub, monkeypatch, tmp_path):
    networks = OpenPose(width=0.05)
    monkeypatch.setattr("openpose.OpenPose", lambda: OpenPose(width=0.05))
    for part, name in [("body", "body_pose_model"), ("hand", "hand_pose_model"), ("face", "facenet")]:
        path = tmp_path / f"{name}.pth"  # as old as these files are
        tensors = networks.get_submodule(part).state_dict()
        torch.save(tensors, path, _use_new_zipfile_serialization=False)
        hub.files[f"lllyasviel/Annotators/{name}.pth"] = path.read_bytes()
    assert same(load_openpose().state_dict(), networks.state_dict())
    assert len(hub.fetched()) == 3


def test_half_precision_files_are_fetched_for_half_precision(hub, small):
    for name in [name for name in hub.files if name.endswith("model.safetensors")]:
        hub.files[name.replace("model.safetensors", "model.fp16.safetensors")] = hub.files[name]
    load_model("sd15", dtype=torch.float16)
    halves = [name for name in hub.fetched() if ".fp16." in name]
    assert len(halves) == 3  # of the VAE there is none
    hub.requests.clear()
    load_model("sd15")  # what is here will do
    assert not hub.fetched()


def test_full_precision_files_stand_in_for_absent_half_precision_files(hub, small):
    load_model("sd15", dtype=torch.bfloat16)
    assert len(hub.fetched()) == 6


def test_parts_that_are_given_are_not_downloaded(hub, small, saved):
    load_model("sd15", controlnet=saved / "controlnet", vae=saved / "vae")
    assert not any("control" in name or "vae" in name for name in hub.fetched())


def test_an_interrupted_download_goes_on_where_it_stopped(hub, small, model, monkeypatch):
    name = f"{SD15}/unet/diffusion_pytorch_model.safetensors"
    half = len(hub.files[name]) // 2
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", half // 4)  # what is kept, 10 MB else
    hub.drop.add(name)
    assert same(weights(load_model("sd15").unet), weights(model.unet))
    ranges = [wanted for method, file, wanted in hub.requests if (method, file) == ("GET", name)]
    assert ranges == [None, f"bytes={half // 4 * 4}-"]


def test_a_download_that_comes_short_is_an_error_and_is_not_kept(hub, small, model):
    name = "stabilityai/sd-vae-ft-mse/diffusion_pytorch_model.safetensors"
    hub.cut.add(name)
    error = error_of(load_model, "sd15")
    assert error.startswith(f"{name}: download failed, run the same command again")
    hub.cut.clear()
    assert same(load_model("sd15").vae.state_dict(), model.vae.state_dict())


def test_a_file_that_the_hub_does_not_have_is_named(hub, small):
    name = "stabilityai/sd-vae-ft-mse/diffusion_pytorch_model.safetensors"
    del hub.files[name]
    assert error_of(load_model, "sd15").startswith(f"{name}: not at {hub.url}")


def test_a_cached_file_that_was_cut_is_told(hub, small, tmp_path):
    load_model("sd15")
    path = public_files(["vae"], half=False)["vae"]
    os.truncate(path, path.stat().st_size // 2)
    assert error_of(load_model, "sd15").startswith(f"{path}: truncated")


def test_without_a_connection_the_error_says_what_is_missing_and_what_to_do(hub, monkeypatch, tmp_path):
    public_files(["vae", "vocab", "merges"], half=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = error_of(load_model, "sd15", dtype=torch.float16)
    assert f"{SD15}/unet/diffusion_pytorch_model.fp16.safetensors" in error
    assert f"{SD15}/text_encoder/model.fp16.safetensors" in error
    assert f"{OPENPOSE_CONTROL}/diffusion_pytorch_model.fp16.safetensors" in error
    assert "sd-vae-ft-mse" not in error and "vocab" not in error
    assert "2.69 GB" in error and str(tmp_path / "hub") in error
    assert "python checkpoint.py --download" in error and "--model demo" in error


@pytest.mark.parametrize("silent", [True, False])
def test_a_hub_that_does_not_answer_is_told_soon(monkeypatch, tmp_path, silent):
    """Where a firewall drops what is sent, and where nothing listens; the client alone would try for long."""
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    if not silent:
        listening.close()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    started = time.monotonic()
    with pytest.raises(
        OSError, match=r"no connection to .*not downloaded yet: \S*hand_pose_model.pth \("
    ) as error:
        public_files(["hand"], half=False)
    assert time.monotonic() - started < 5 and "\n" not in str(error.value)
    listening.close()


def run_checkpoint(*args: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, checkpoint.__file__, *args]
    environment = {**os.environ, "NO_PROXY": "127.0.0.1", **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_the_command_line_lists_and_fetches_the_public_files(hub, tmp_path):
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    result = run_checkpoint("--download", **environment)
    assert result.returncode == 0, result.stderr
    assert "All are here." in result.stdout and len(hub.fetched()) == 9
    hub.stop()
    listed = run_checkpoint(**environment).stdout.splitlines()
    assert listed[0] == f"Public files, cached in {tmp_path}/home/hub:"
    assert [line.split()[0] for line in listed[1:]] == ["here"] * 9


def test_the_command_line_says_what_is_missing_and_how_it_fails(tmp_path):
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = run_checkpoint("--download", **environment)
    assert result.returncode == 2 and result.stderr.startswith("checkpoint.py: no connection to")
    assert result.stderr.count("\n") == 1
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["missing"] * 9
    assert "1.72 GB  unet" in lines[1]


# ---- Full size ----------------------------------------------------------------------------------

FULL = {
    "unet": partial(UNet, UNetConfig()),
    "controlnet": partial(ControlNet, UNetConfig()),
    "vae": partial(VAE, VAEConfig()),
    "text_encoder": partial(TextEncoder, TextConfig()),
    "body": lambda: OpenPose().body,
    "hand": lambda: OpenPose().hand,
    "face": lambda: OpenPose().face,
}


def full_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Weights that differ from tensor to tensor, quickly made: a slope at the height of its name."""
    if name.endswith("position_ids"):
        return torch.arange(77)[None]
    start = sum(ord(char) * (i + 1) for i, char in enumerate(name)) % 9973 / 9973
    count = torch.Size(shape).numel()
    return torch.linspace(start, start + 1, count).reshape(shape).to(dtype)


@pytest.mark.parametrize(
    "manifest, part",
    [
        ("sd15_single_file.ldm", "unet"),
        ("sd15_single_file.ldm", "vae"),
        ("sd15_single_file.ldm", "text_encoder"),
        ("controlnet_openpose.ldm", "controlnet"),
        ("vae.old_attention_names", "vae"),
    ],
)
def test_all_names_of_the_public_files_stand_for_what_diffusers_takes_them_for(manifest, part):
    shapes = public_shapes(manifest)
    with torch.device("meta"):
        needed = {name: tuple(tensor.shape) for name, tensor in weights(FULL[part]()).items()}
    ours = layouts.stored_names(needed, part, SimpleNamespace(shapes=shapes, path=manifest))
    theirs = their_names(part, {n: torch.full((1,), float(i)) for i, n in enumerate(shapes)})
    assert ours == {name: list(shapes)[int(number)] for name, number in theirs.items()}


@pytest.mark.parity
@pytest.mark.parametrize(
    "manifest, parts, name, dtype",
    [
        ("unet", ["unet"], "unet.safetensors", torch.float32),
        ("unet", ["unet"], "unet.safetensors", torch.float16),
        ("controlnet_openpose", ["controlnet"], "control.safetensors", torch.float32),
        ("controlnet_openpose.ldm", ["controlnet"], "control.pth", torch.float32),
        ("body_pose_model", ["body"], "body.pth", torch.float32),
        ("hand_pose_model", ["hand"], "hand.pth", torch.float32),
        ("facenet", ["face"], "face.pth", torch.float32),
        ("vae", ["vae"], "vae.safetensors", torch.float32),
        ("vae.old_attention_names", ["vae"], "vae.safetensors", torch.float32),
        ("text_encoder", ["text_encoder"], "text.safetensors", torch.float32),
        ("text_encoder", ["text_encoder"], "text.safetensors", torch.float16),
        ("sd15_single_file.ldm", ["unet", "vae", "text_encoder"], "model.safetensors", torch.float16),
        ("sd15_single_file.ldm", ["unet", "vae", "text_encoder"], "model.ckpt", torch.bfloat16),
    ],
)
def test_every_public_file_is_read_at_full_size(tmp_path, manifest, parts, name, dtype):
    """Nothing missing, nothing left over, and every value where diffusers' own reader puts it."""
    shapes = public_shapes(manifest)
    path = write(tmp_path / name, {n: full_tensor(n, s, dtype) for n, s in shapes.items()})
    small_numbers = {n: torch.full((1,), float(i)) for i, n in enumerate(shapes)}
    for part in parts:
        with torch.device("meta"):
            network = FULL[part]()
        began = time.monotonic()
        peak, _ = peak_memory_of(partial(checkpoint.fill, network, part, path, "cpu", torch.float32))
        size = sum(tensor.nbytes for tensor in network.state_dict().values())
        print(f"{part}: {peak / size:.3f} times the weights, {time.monotonic() - began:.1f} s")
        names = their_names(part, small_numbers)
        assert names.keys() == weights(network).keys()
        for ours, tensor in weights(network).items():
            stored = list(shapes)[int(names[ours])]
            expected = full_tensor(stored, shapes[stored], dtype).float()
            assert torch.equal(tensor, expected.reshape(tensor.shape))
        del network
    path.unlink()


def their_names(part: str, numbers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our name -> the number of that tensor in a public file, by diffusers' functions."""
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    if part == "text_encoder":
        names = {name.removeprefix("cond_stage_model.transformer."): n for name, n in numbers.items()}
        return {n: i for n, i in names.items() if n.startswith("text_") and "position_ids" not in n}
    if part == "unet" and "conv_in.weight" not in numbers:
        return utils.convert_ldm_unet_checkpoint(numbers, {"layers_per_block": 2})
    if part == "controlnet" and "conv_in.weight" not in numbers:
        return utils.convert_controlnet_checkpoint(numbers, {"layers_per_block": 2})
    if part == "vae" and "encoder.conv_in.weight" not in numbers:
        levels = {"down_block_types": [None] * 4, "up_block_types": [None] * 4}
        return utils.convert_ldm_vae_checkpoint(numbers, levels)
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    words = [(f".{a}.", f".{b}.") for a, b in old.items()]
    renamed = {}
    for name, number in numbers.items():
        for one, other in words if part == "vae" else ():
            name = name.replace(one, other)
        renamed[name] = number
    return renamed


@pytest.mark.parity
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_all_of_sd15_takes_little_more_memory_than_its_weights(
    tmp_path, monkeypatch, tokenizer, dtype
):
    """From files in half precision as most people have them; the memory includes mapped files."""
    monkeypatch.setattr(Tokenizer, "load", lambda *_: tokenizer)
    files = {}
    for part, manifest in [
        ("unet", "unet"),
        ("controlnet", "controlnet_openpose"),
        ("vae", "vae.old_attention_names"),
        ("text_encoder", "text_encoder"),
    ]:
        shapes = public_shapes(manifest).items()
        tensors = {name: full_tensor(name, shape, torch.float16) for name, shape in shapes}
        files[part] = write(tmp_path / f"{part}.safetensors", tensors)
        del tensors
    files |= {"vocab": tmp_path / "vocab.json", "merges": tmp_path / "merges.txt"}
    monkeypatch.setattr(
        checkpoint, "public_files", lambda parts, half: {part: files[part] for part in parts}
    )
    began = time.monotonic()
    peak, loaded = peak_memory_of(partial(load_model, "sd15", dtype=dtype))
    took = time.monotonic() - began
    networks = [getattr(loaded, part) for part in checkpoint.PARTS]
    size = sum(p.nbytes for network in networks for p in network.parameters())
    assert sum(p.numel() for network in networks for p in network.parameters()) == 1_481_296_827
    print(f"{size / 1e9:.2f} GB of weights in {took:.1f} s, peak {peak / size:.3f} times that")
    assert peak / size < 1.15


# ---- Files that list far more than a model has ------------------------------------------------------


def many_members(path: Path) -> None:
    """A zip archive whose directory has 400,000 entries of one name."""
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", *[0] * 6, 0, 0, 0, 1, *[0] * 4, 0, 0) + b"a"
    directory = entry * 400_000
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535, len(directory), 0, 0)
    path.write_bytes(directory + end)


def many_tensors(path: Path) -> None:
    """A safetensors file with a header of 18 MB."""
    each = b'"%07d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = b"{" + b",".join(each % number for number in range(300_000)) + b"}"
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def long_line(path: Path) -> None:
    """A pickle as before PyTorch 1.6 with a number of 40 million digits."""
    path.write_bytes(b"\x80\x02I" + b"1" * 40_000_000)


def one_member_in_many(path: Path) -> None:
    """A zip archive whose entries all mean the same megabyte."""
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings(action="ignore"):
        archive.writestr("data.pkl", bytes(1_000_000))
        archive.filelist *= 100


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (many_members, "truncated, corrupt or no file of weights"),
        (many_tensors, "lists far more than a model's tensors; use another file"),
        (long_line, "truncated, corrupt or no file of weights"),
        (one_member_in_many, "truncated, corrupt or no file of weights"),
    ],
)
def test_a_file_that_lists_far_more_than_it_holds_is_refused_soon(tmp_path, make, words):
    path = tmp_path / "weights.bin"
    make(path)
    tracemalloc.start()
    started = time.process_time()
    with pytest.raises(ValueError, match=f"weights.bin: {words}"):
        TensorFile(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60_000_000 and time.process_time() - started < 5
