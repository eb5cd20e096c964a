"""The networks, held against the public implementations: ControlVideo, diffusers and transformers.

The full-size comparisons are marked `parity` and left out by default: `python -m pytest -m parity`.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from weights import fill

from attention import attend_in_blocks
from clip import TextConfig, TextEncoder
from controlnet import ControlNet
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

SHARED = Path(__file__).parents[2] / "shared"
SMALL = UNetConfig(widths=(32, 64, 64, 64), context_dim=24, heads=4)
SMALL_HINTS = (8, 8, 16, 32)


def filled(network: nn.Module, prefix: str = "") -> nn.Module:
    """The network with the deterministic weights of `prefix` + its tensors' names."""
    shapes = {prefix + name: tensor.shape for name, tensor in network.state_dict().items()}
    weights = {name.removeprefix(prefix): tensor for name, tensor in fill(shapes).items()}
    network.load_state_dict(weights, assign=True)
    return network.eval().requires_grad_(False)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def worst(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


# ---- ControlVideo -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle() -> dict[str, Tensor]:
    """What the public ControlVideo code computes: clips (F, C, H, W), contexts (tokens, dim)."""
    path = SHARED / "oracle" / "controlvideo.safetensors"
    if not path.exists():
        pytest.skip(f"the outputs of the public ControlVideo code are not at {path}")
    return {
        name: tensor[0].transpose(0, 1) if tensor.ndim == 5 else tensor
        for name, tensor in load_file(path).items()
    }


@pytest.fixture(scope="module")
def inflated() -> tuple[UNet, ControlNet]:
    controlnet = ControlNet(SMALL, SMALL_HINTS)
    return filled(UNet(SMALL), "unet."), filled(controlnet, "controlnet.")


@torch.no_grad()
def predict(networks, latents, timestep, context, hint, scale=1.0) -> Tensor:
    unet, controlnet = networks
    control = controlnet(latents, timestep, context, controlnet.embed_hint(hint), scale)
    return unet(latents, timestep, context, control)


@pytest.mark.parametrize("timestep", [1, 501, 981])
def test_the_predicted_noise_is_controlvideo_s(oracle, inflated, timestep):
    inputs = oracle["latents"], timestep, oracle["context"][0], oracle["hint"]
    assert worst(predict(inflated, *inputs), oracle[f"eps.{timestep}"]) < 1e-4


def test_a_control_scale_weakens_the_control_as_in_controlvideo(oracle, inflated):
    inputs = oracle["latents"], 501, oracle["context"][0], oracle["hint"]
    assert worst(predict(inflated, *inputs, scale=0.5), oracle["eps.501.scale0.5"]) < 1e-4


def test_a_clip_of_one_frame_is_controlvideo_s(oracle, inflated):
    inputs = oracle["latents"][:1], 501, oracle["context"][0], oracle["hint"][:1]
    assert worst(predict(inflated, *inputs), oracle["eps.501.frame0_alone"]) < 1e-4


@torch.no_grad()
def test_the_controlnet_s_residuals_are_controlvideo_s(oracle, inflated):
    hint = inflated[1].embed_hint(oracle["hint"])
    *residuals, middle = inflated[1](oracle["latents"], 501, oracle["context"][0], hint)
    assert len(residuals) == 12
    for i, residual in enumerate(residuals):
        assert worst(residual, oracle[f"control.{i}"]) < 1e-4
    assert worst(middle, oracle["control.mid"]) < 1e-4


def test_several_clips_at_once_are_each_as_alone(inflated):
    """Three clips of two frames, each with its own context and timestep."""
    latents, hints = random(6, 4, 8, 8), random(6, 3, 64, 64).sigmoid()
    timesteps, contexts = torch.tensor([3, 400, 999]), random(3, 7, 24)
    together = predict(inflated, latents, timesteps, contexts, hints)
    for i in range(3):
        clip = slice(2 * i, 2 * i + 2)
        alone = predict(inflated, latents[clip], timesteps[i].item(), contexts[i], hints[clip])
        assert worst(together[clip], alone) < 1e-5


def test_every_frame_depends_on_the_key_frame_and_through_time_on_each_other(inflated):
    latents, hints = random(3, 4, 8, 8), random(3, 3, 64, 64).sigmoid()
    before = predict(inflated, latents, 500, random(7, 24), hints)
    for changed in range(3):
        other = latents.clone()
        other[changed] = random(4, 8, 8, seed=1)
        after = predict(inflated, other, 500, random(7, 24), hints)
        assert ((after - before).abs().amax((1, 2, 3)) > 1e-3).all()


# ---- diffusers ----------------------------------------------------------------------------------


def without_time(unet: UNet) -> UNet:
    """With its temporal layers at zero, where they start: an inflated UNet is then a plain one."""
    for module in unet.modules():
        if hasattr(module, "conv_temp"):
            nn.init.zeros_(module.conv_temp.weight)
            nn.init.zeros_(module.conv_temp.bias)
    return unet


def spatial_weights(network: nn.Module) -> dict[str, Tensor]:
    tensors = network.state_dict().items()
    return {name: tensor for name, tensor in tensors if "_temp." not in name}


def their_unet(unet: UNet) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    config = unet.config
    levels = len(config.widths)
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(
            block_out_channels=config.widths,
            layers_per_block=config.layers_per_block,
            cross_attention_dim=config.context_dim,
            attention_head_dim=config.heads,
            norm_num_groups=config.norm_groups,
            down_block_types=["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"],
            up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (levels - 1),
        )
    theirs.load_state_dict(spatial_weights(unet), assign=True)
    return theirs.eval()


def their_controlnet(controlnet: ControlNet, hint_widths: tuple[int, ...]) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    config = controlnet.config
    levels = len(config.widths)
    with torch.device("meta"):
        theirs = diffusers.ControlNetModel(
            block_out_channels=config.widths,
            layers_per_block=config.layers_per_block,
            cross_attention_dim=config.context_dim,
            attention_head_dim=config.heads,
            norm_num_groups=config.norm_groups,
            down_block_types=["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"],
            conditioning_embedding_out_channels=hint_widths,
        )
    theirs.load_state_dict(controlnet.state_dict(), assign=True)
    return theirs.eval()


def their_vae(vae: VAE) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    config = vae.config
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKL(
            block_out_channels=config.widths,
            layers_per_block=config.layers_per_block,
            latent_channels=config.latent_channels,
            norm_num_groups=config.norm_groups,
            down_block_types=["DownEncoderBlock2D"] * len(config.widths),
            up_block_types=["UpDecoderBlock2D"] * len(config.widths),
        )
    theirs.load_state_dict(vae.state_dict(), assign=True)
    return theirs.eval()


@torch.no_grad()
def compare_unets(unet: UNet, height: int, width: int) -> float:
    """The worst difference from diffusers on one frame with control."""
    latents, context = random(1, 4, height, width), random(77, unet.config.context_dim)
    channels, h, w = unet.config.widths, height, width
    shapes = [(channels[0], h, w)]
    for level, c in enumerate(channels):
        shapes += [(c, h, w)] * unet.config.layers_per_block
        if level < len(channels) - 1:
            h, w = (h + 1) // 2, (w + 1) // 2
            shapes.append((c, h, w))
    *control, middle = [random(1, *shape, seed=i) for i, shape in enumerate([*shapes, shapes[-1]])]
    expected = their_unet(unet)(
        latents,
        637,
        context[None],
        down_block_additional_residuals=control,
        mid_block_additional_residual=middle,
    ).sample
    return worst(unet(latents, 637, context, [*control, middle]), expected)


@torch.no_grad()
def compare_controlnets(controlnet: ControlNet, hint_widths, height: int, width: int) -> float:
    factor = 2 ** (len(hint_widths) - 1)
    latents, context = random(1, 4, height, width), random(77, controlnet.config.context_dim)
    hint = random(1, 3, factor * height, factor * width).sigmoid()
    residuals, middle = their_controlnet(controlnet, hint_widths)(
        latents, 637, context[None], hint, conditioning_scale=0.7, return_dict=False
    )
    ours = controlnet(latents, 637, context, controlnet.embed_hint(hint), 0.7)
    return max(worst(a, b) for a, b in zip(ours, [*residuals, middle], strict=True))


@torch.no_grad()
def compare_vaes(vae: VAE, height: int, width: int) -> tuple[float, float, float]:
    """The worst differences from diffusers in the latents' mean and log-variance, and the image."""
    theirs, factor = their_vae(vae), vae.config.factor
    images = random(1, 3, factor * height, factor * width).clamp(-1, 1)
    mean, log_variance = vae.encode(images)
    # Not from their distribution, which clamps the log-variance.
    their_mean, their_log_variance = theirs.quant_conv(theirs.encoder(images)).chunk(2, dim=1)
    latents = random(1, vae.config.latent_channels, height, width)
    return (
        worst(mean, their_mean),
        worst(log_variance, their_log_variance),
        worst(vae.decode(latents), theirs.decode(latents).sample),
    )


# Stable Diffusion's proportions, and others: one layer per block, fewer levels, odd sizes.
@pytest.mark.parametrize("height, width", [(8, 8), (16, 24), (9, 13)])
@pytest.mark.parametrize(
    "config",
    [
        UNetConfig(widths=(32, 64, 64, 64), context_dim=24, heads=4),
        UNetConfig(widths=(16, 32, 48), layers_per_block=1, context_dim=20, heads=2, norm_groups=8),
    ],
)
def test_the_unet_on_one_frame_is_diffusers(config, height, width):
    assert compare_unets(without_time(filled(UNet(config))), height, width) < 1e-4


@pytest.mark.parametrize("height, width", [(8, 8), (16, 24)])
@pytest.mark.parametrize(
    "config, hint_widths",
    [
        (UNetConfig(widths=(32, 64, 64, 64), context_dim=24, heads=4), (8, 8, 16, 32)),
        (UNetConfig(widths=(16, 32), layers_per_block=1, heads=2, norm_groups=8), (8, 16, 24)),
    ],
)
def test_the_controlnet_on_one_frame_is_diffusers(config, hint_widths, height, width):
    controlnet = filled(ControlNet(config, hint_widths))
    assert compare_controlnets(controlnet, hint_widths, height, width) < 1e-4


@pytest.mark.parametrize(
    "config",
    [VAEConfig(widths=(32, 64, 64, 64)), VAEConfig(widths=(24, 48, 96), layers_per_block=1, norm_groups=6)],
)
def test_the_vae_is_diffusers(config):
    assert max(compare_vaes(filled(VAE(config)), 6, 4)) < 1e-4


# ---- Stable Diffusion 1.5's sizes ---------------------------------------------------------------


def full_size() -> dict[str, nn.Module]:
    """All networks at Stable Diffusion 1.5's sizes, on the meta device."""
    with torch.device("meta"):
        return {
            "unet": UNet(UNetConfig()),
            "controlnet": ControlNet(UNetConfig()),
            "vae": VAE(VAEConfig()),
            "text_encoder": TextEncoder(TextConfig()),
        }


@pytest.mark.parametrize(
    "part, name", [("unet", "unet"), ("controlnet", "controlnet_openpose"), ("vae", "vae")]
)
def test_names_and_shapes_are_the_public_checkpoints(part, name):
    path = SHARED / "checkpoints" / f"{name}.tsv"
    if not path.exists():
        pytest.skip(f"no list of the public checkpoint's tensors at {path}")
    public = dict(line.split("\t") for line in path.read_text().splitlines())
    weights = spatial_weights(full_size()[part])
    assert {name: "x".join(map(str, tensor.shape)) for name, tensor in weights.items()} == public


def test_inflation_adds_temporal_layers_to_all_transformers_but_the_middle_one_s():
    tensors = full_size()["unet"].state_dict()
    blocks = [name.removesuffix(".attn1.to_q.weight") for name in tensors if "attn1.to_q" in name]
    layers = ["attn_temp.to_q.weight", "attn_temp.to_k.weight", "attn_temp.to_v.weight"]
    layers += ["attn_temp.to_out.0.weight", "attn_temp.to_out.0.bias"]
    layers += ["conv_temp.weight", "conv_temp.bias"]
    added = {f"{block}.{layer}" for block in blocks if "mid" not in block for layer in layers}
    assert {name for name in tensors if "_temp." in name} == added and len(added) == 15 * 7


@pytest.mark.parametrize("spread", [0.1, 1, 20])  # of the scores: from all alike to one that takes all
@pytest.mark.parametrize("shape", [(1, 2, 300, 256, 40), (2, 3, 1300, 700, 16), (40, 2, 5, 90, 24)])
def test_attention_in_blocks_is_no_less_exact_than_torch_s(shape, spread):
    clips, heads, queries, keys, dim = shape
    random = torch.Generator().manual_seed(0)
    q, k, v = (  # seen as the networks see them: heads between tokens and channels
        torch.randn(clips, n, heads, dim, generator=random).bfloat16().transpose(1, 2)
        for n in (queries, keys, keys)
    )
    q = q * spread
    exact = nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    torch_s = nn.functional.scaled_dot_product_attention(q, k, v)
    precision = torch.backends.mkldnn.matmul.fp32_precision
    ours = attend_in_blocks(q, k, v)
    assert torch.backends.mkldnn.matmul.fp32_precision == precision
    assert (ours - exact).norm() < 1.2 * (torch_s - exact).norm()


def test_the_model_has_as_many_parameters_as_the_paper_says():
    networks = full_size().values()
    assert sum(p.numel() for network in networks for p in network.parameters()) == 1_481_296_827


@pytest.mark.parity
def test_the_full_size_unet_is_diffusers():
    difference = compare_unets(without_time(filled(full_size()["unet"])), 64, 64)
    print(f"worst difference {difference:.1e}")
    assert difference < 1e-3


@pytest.mark.parity
def test_the_full_size_controlnet_is_diffusers():
    controlnet = filled(full_size()["controlnet"])
    difference = compare_controlnets(controlnet, (16, 32, 96, 256), 64, 64)
    print(f"worst difference {difference:.1e}")
    assert difference < 1e-3


@pytest.mark.parity
def test_the_full_size_vae_is_diffusers():
    differences = compare_vaes(filled(full_size()["vae"]), 64, 64)
    print("worst differences: mean {:.1e}, log-variance {:.1e}, image {:.1e}".format(*differences))
    assert max(differences) < 1e-3


@pytest.mark.parity
def test_the_full_size_text_encoder_is_transformers():
    transformers = pytest.importorskip("transformers")
    config, ours = TextConfig(), filled(full_size()["text_encoder"])
    theirs = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            num_attention_heads=config.heads,
            num_hidden_layers=config.layers,
            intermediate_size=config.mlp_width,
            max_position_embeddings=config.length,
        )
    ).eval()
    tensors = ours.state_dict().items()
    theirs.load_state_dict({name.removeprefix("text_model."): t for name, t in tensors})
    tokens = torch.randint(49408, (2, 77), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = worst(ours(tokens), theirs(tokens).last_hidden_state)
    print(f"worst difference {difference:.1e}")
    assert difference < 1e-3
