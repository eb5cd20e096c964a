"""The odd layouts that weights are shared in: each is read as the plain one, or refused with the reason."""

import json
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import (  # noqa: F401
    error_of,
    model,
    public_tensors,
    same,
    saved,
    single_file,
    tokenizer,
    weights,
    write,
)
from torch import Tensor

from checkpoint import load_model
from public.formats import TensorFile
from public.layouts import stored_names
from public.places import weight_file

VAE = "first_stage_model."
NEWER = {".q.": ".to_q.", ".k.": ".to_k.", ".v.": ".to_v.", ".proj_out.": ".to_out.0."}


def read(part: str, path: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """A part's tensors by our names, as `checkpoint.fill` reads them from a file. expected: for the shapes."""
    file = TensorFile(path)
    names = stored_names({name: tuple(tensor.shape) for name, tensor in expected.items()}, part, file)
    # One by one, as in `fill`, takes seconds for a whole model.
    tensor_of = load_file(path).get if path.suffix == ".safetensors" else file.read
    return {name: tensor_of(stored).reshape(expected[name].shape) for name, stored in names.items()}


@pytest.fixture(scope="module")
def plain(model, tmp_path_factory) -> dict[str, dict[str, Tensor]]:  # noqa: F811
    """The parts of the single file of these tests, by our names."""
    path = write(tmp_path_factory.mktemp("plain") / "plain.safetensors", single_file())
    return {
        part: read(part, path, weights(getattr(model, part))) for part in ("unet", "vae", "text_encoder")
    }


def is_read(plain: dict, path: Path) -> bool:
    return all(same(read(part, path, expected), expected) for part, expected in plain.items())


def told(plain: dict, path: Path) -> str:
    """The line with which one of the parts is refused."""
    line = error_of(is_read, plain, path)
    assert line.startswith(f"{path}: ")
    return line


def without(*starts: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in single_file().items() if not name.startswith(starts)}


def newer_attention(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A VAE's attention in the original layout, but its layers by diffusers' names, and linear."""
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith(VAE) and ".attn_1." in name:
            for old, new in NEWER.items():
                name = name.replace(old, new)
            tensor = tensor[:, :, 0, 0].contiguous() if tensor.ndim == 4 else tensor
        renamed[name] = tensor
    return renamed


def test_a_single_file_with_the_newer_names_of_the_vae_s_attention_is_read(plain, tmp_path):
    path = write(tmp_path / "newer.safetensors", newer_attention(single_file()))
    assert VAE + "decoder.mid.attn_1.to_out.0.weight" in TensorFile(path).shapes
    assert is_read(plain, path)


def test_a_single_file_with_diffusers_names_for_the_vae_is_read(plain, tmp_path):
    vae = {VAE + name: tensor for name, tensor in plain["vae"].items()}
    assert is_read(plain, write(tmp_path / "mixed.safetensors", without(VAE) | vae))


LEFTOVERS = [
    "embedding_manager.embedder.transformer.text_model.embeddings.position_ids",
    "embedding_manager.embedder.transformer.text_model.final_layer_norm.weight",
    "denoiser.sigmas",
    "first_stage_model.model_ema.decay",
    "first_stage_model.loss.discriminator.main.0.weight",
    "model.diffusion_model_ema.x",
    "cond_stage_model.logit_scale",
    "cond_stage_model.transformer.vision_model.post_layernorm.weight",
    "sqrt_one_minus_alphas_cumprod",
    "model_ema.num_updates",
    "model.betas",
    "control_model.time_embed.0.weight",
]


def test_what_training_and_merging_tools_leave_in_a_file_is_ignored(plain, tmp_path):
    left = {name: torch.ones(3) for name in LEFTOVERS}
    assert is_read(plain, write(tmp_path / "left.safetensors", single_file() | left))


@pytest.mark.parametrize(
    "name",
    [
        "cond_stage_model.transformer.text_model.embeddings.position_ids_extra",
        "denoise.sigmas",
        "lossy.weight",
        "model.diffusion_model.schema.weight",
    ],
)
def test_what_only_resembles_such_leftovers_is_refused(plain, tmp_path, name):
    path = write(tmp_path / "extra.safetensors", single_file() | {name: torch.ones(3)})
    assert f"holds {name}, all in all 1 tensors for which " in told(plain, path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int64])
def test_position_ids_may_be_of_any_type(plain, tmp_path, dtype):
    tensors = single_file()
    (name,) = [name for name in tensors if name.endswith("position_ids")]
    path = write(tmp_path / "ids.safetensors", tensors | {name: torch.arange(77)[None].to(dtype)})
    assert is_read(plain, path)


def test_a_checkpoint_that_lightning_wrote_is_read_without_lightning(plain, tmp_path):
    """As the public v1-5-pruned.ckpt: it names the class of a callback, which is not called."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    parents = ("pytorch_lightning", "pytorch_lightning.callbacks")
    sys.modules |= {parent: types.ModuleType(parent) for parent in parents} | {name: module}
    try:
        callbacks = {module.ModelCheckpoint: {"best_model_score": None, "best_model_path": "x"}}
        write(tmp_path / "pruned.ckpt", {"state_dict": single_file(), "callbacks": callbacks, "epoch": 0})
    finally:
        for added in (*parents, name):
            del sys.modules[added]
    assert is_read(plain, tmp_path / "pruned.ckpt")


def averages_only() -> dict[str, Tensor]:
    unet = "model.diffusion_model."
    renamed = {n: "model_ema." + n.removeprefix("model.").replace(".", "") for n in single_file()}
    return {renamed[n] if n.startswith(unet) else n: tensor for n, tensor in single_file().items()}


def unet_only(prefix: str) -> dict[str, Tensor]:
    start = "model.diffusion_model."
    return {prefix + n.removeprefix(start): t for n, t in single_file().items() if n.startswith(start)}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (lambda: without(VAE), "a UNet and a text encoder and the averages of a training, but not the vae"),
        (
            averages_only,
            "holds a VAE and a text encoder and the averages of a training, but not the unet of",
        ),
        (
            lambda: unet_only("model.diffusion_model."),
            "holds a UNet, but not the vae of Stable Diffusion 1.5; ",
        ),
        (
            lambda: unet_only(""),
            "but not the vae of Stable Diffusion 1.5; give a file of a whole model, or a",
        ),
        (
            lambda: without("cond_stage_model."),
            "but not the text_encoder of Stable Diffusion 1.5; give a file",
        ),
    ],
)
def test_a_file_without_a_part_is_told_with_what_it_holds_instead(plain, tmp_path, tensors, words):
    assert words in told(plain, write(tmp_path / "part.safetensors", tensors()))


def test_a_file_without_a_vae_advises_to_give_one(plain, tmp_path):
    path = write(tmp_path / "no_vae.safetensors", without(VAE))
    assert told(plain, path).endswith("but not the vae of Stable Diffusion 1.5; give one with --vae")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "a LoRA or another adapter"),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight", "a LoRA or"),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora.down.weight", "a LoRA or"),
        ("down_blocks.0.attentions.0.attn1.processor.to_q_lora.down.weight", "a LoRA or"),
        ("text_encoder.text_model.encoder.layers.0.q_proj.lora_linear_layer.up.weight", "a LoRA or"),
        ("unet_x.hada_w1_a", "a LoRA or another adapter"),
        ("unet_x.lokr_w2", "a LoRA or another adapter"),
        ("base_model.model.unet.x.oft_blocks", "a LoRA or another adapter"),
        ("unet_x.dora_scale", "a LoRA or another adapter"),
        ("unet_x.diff", "a LoRA or another adapter"),
        ("ip_adapter.1.to_k_ip.weight", "a LoRA or another adapter"),
        ("emb_params", "a textual inversion"),
        ("difference", "a ControlNet stored as its difference from a model"),
    ],
)
def test_adapters_are_named_as_such(plain, tmp_path, name, what):
    path = write(tmp_path / "adapter.safetensors", {name: torch.ones(3, 3)})
    assert told(plain, path).startswith(f"{path}: is {what}")


def test_a_model_and_a_controlnet_in_one_file_are_both_read(plain, model, tmp_path):  # noqa: F811
    control = public_tensors("controlnet_openpose.ldm")
    control = {"control_model." + n.removeprefix("control_model."): t for n, t in control.items()}
    alone, both = (
        write(tmp_path / n, t) for n, t in (("c.pth", control), ("b.pth", single_file() | control))
    )
    assert is_read(plain, both)
    expected = model.controlnet.state_dict()
    assert same(read("controlnet", both, expected), read("controlnet", alone, expected))


# ---- The latents' scale -------------------------------------------------------------------------


def test_a_vae_of_another_latent_scale_is_refused(saved, tmp_path):  # noqa: F811
    """SDXL's VAE has the same tensors as Stable Diffusion 1.5's, so that nothing else would tell."""
    shutil.copytree(saved / "vae", tmp_path / "vae")
    path = tmp_path / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scaling_factor": 0.13025}))
    wanted = (
        "a VAE of another latent scale, 0.13025, but the model's latents have 0.18215; SDXL's VAE, for one"
    )
    assert error_of(load_model, saved, vae=tmp_path / "vae").startswith(f"{path}: {wanted}")
    assert error_of(load_model, "sd15", vae=tmp_path / "vae").startswith(f"{path}: {wanted}")


def test_the_scale_that_a_single_file_tells_counts(plain, tmp_path):
    for scale, fits in ((0.18215, True), (0.13025, False)):
        tensors = single_file() | {"scale_factor": torch.tensor(scale)}
        path = write(tmp_path / "scale.safetensors", tensors)
        if fits:
            assert is_read(plain, path)
        else:
            assert "scale_factor: a VAE of another latent scale, 0.13025" in told(plain, path)


# ---- Shards -------------------------------------------------------------------------------------


def in_shards(
    source: Path, folder: Path, variant: str = "", change: Callable = lambda index: index
) -> Path:
    """A file of weights as two, with the index that diffusers writes."""
    tensors = load_file(source / "diffusion_pytorch_model.safetensors")
    folder.mkdir()
    index, names = {}, sorted(tensors)
    for number, some in ((1, names[::2]), (2, names[1::2])):
        file = f"diffusion_pytorch_model{variant}-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in some}, folder / file)
        index |= dict.fromkeys(some, file)
    path = folder / f"diffusion_pytorch_model.safetensors.index{variant}.json"
    path.write_text(json.dumps(change({"metadata": {}, "weight_map": index})))
    return path


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_a_folder_of_shards_is_read(model, saved, tmp_path, variant):  # noqa: F811
    index = in_shards(saved / "vae", tmp_path / "vae", variant)
    assert weight_file(tmp_path / "vae", half=False) == weight_file(tmp_path / "vae", half=True) == index
    expected = weights(model.vae)
    assert same(read("vae", index, expected), expected)


def test_a_model_with_a_sharded_unet_is_loaded(model, saved, tmp_path):  # noqa: F811
    shutil.copytree(saved, tmp_path / "model", ignore=shutil.ignore_patterns("unet"))
    in_shards(saved / "unet", tmp_path / "model" / "unet")
    shutil.copy(saved / "unet" / "config.json", tmp_path / "model" / "unet")
    assert same(weights(load_model(tmp_path / "model").unet), weights(model.unet))


def test_shards_that_do_not_agree_with_their_index_are_told(saved, tmp_path):  # noqa: F811
    path = in_shards(saved / "vae", tmp_path / "vae")
    whole = json.loads(path.read_text())
    name, first = next(iter(whole["weight_map"].items()))
    second = first.replace("00001-of", "00002-of")
    for wrong, line in [
        (
            {"weight_map": whole["weight_map"] | {name: second}},
            f"{path}: {name} is not where the index says",
        ),
        ({"weight_map": whole["weight_map"] | {"x": first}}, f"{path}: x is not where the index says"),
        ({"weight_map": whole["weight_map"] | {name: "../x"}}, f"{path.parent}/../x: is missing, but"),
        ({"weight_map": [1]}, f"{path}: does not say which file holds which tensor"),
        ([], f"{path}: does not say which file holds which tensor"),
    ]:
        path.write_text(json.dumps(wrong))
        assert error_of(TensorFile, path).startswith(line)
    path.write_text(json.dumps(whole))
    (path.parent / first).unlink()
    assert error_of(TensorFile, path).startswith(
        f"{path.parent / first}: is missing, but {path.name} lists it"
    )


def test_a_folder_with_weights_under_another_name_is_told_with_it(saved, tmp_path):  # noqa: F811
    name = "diffusion_pytorch_model.non_ema.safetensors"
    shutil.copy(saved / "vae" / "diffusion_pytorch_model.safetensors", tmp_path / name)
    line = error_of(weight_file, tmp_path, False)
    assert line.startswith(
        f"{tmp_path}: holds {name}, which is not read; looked for diffusion_pytorch_model"
    )
