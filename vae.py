"""The autoencoder: images to latents and back, Stable Diffusion's KL VAE, each frame on its own.

Attribute names are the public checkpoint's (diffusers layout).
"""

from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of a VAE. The defaults are Stable Diffusion 1.5's (`sd-vae-ft-mse`)."""

    latent_channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512)  # channels at each level; all but the last halve
    layers_per_block: int = 2
    norm_groups: int = 32
    scale: float = 0.18215  # latents times this have about unit variance, which the diffusion works on

    @property
    def factor(self) -> int:
        """How many pixels a latent pixel is wide: 8 for SD 1.5."""
        return 2 ** (len(self.widths) - 1)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x) + h


class AttentionBlock(nn.Module):
    """Single-head attention over the pixels of the coarsest feature map."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W)
        tokens = self.group_norm(x).permute(0, 2, 3, 1).flatten(1, 2)[:, None]  # (N, 1, H*W, C)
        h = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        h = self.to_out[0](h[:, 0])  # (N, H*W, C)
        return x + h.unflatten(1, x.shape[-2:]).permute(0, 3, 1, 2)


def downsample(channels: int) -> nn.Sequential:
    """Halves the resolution. The public VAE pads on the right and bottom only."""
    conv = nn.Conv2d(channels, channels, 3, stride=2)
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=conv))


def upsample(channels: int) -> nn.Sequential:
    """Doubles the resolution."""
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    return nn.Sequential(OrderedDict(nearest=nn.Upsample(scale_factor=2), conv=conv))


def level(in_channels: int, channels: int, layers: int, groups: int) -> nn.Sequential:
    """Residual blocks at one width. What resamples them is appended under the checkpoint's name for it."""
    widths = (in_channels, *[channels] * layers)
    resnets = (ResnetBlock(*pair, groups) for pair in pairwise(widths))
    return nn.Sequential(OrderedDict(resnets=nn.Sequential(*resnets)))


class MidBlock(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([AttentionBlock(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.widths, config.norm_groups
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.Sequential()
        for i, width in enumerate(widths):
            self.down_blocks.append(level(widths[max(i - 1, 0)], width, config.layers_per_block, groups))
            if i < len(widths) - 1:
                self.down_blocks[i].downsamplers = nn.Sequential(downsample(width))
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, s*H, s*W) -> (N, 2 * latent_channels, H, W)
        x = self.mid_block(self.down_blocks(self.conv_in(x)))
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.widths[::-1], config.norm_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.Sequential()
        for i, width in enumerate(widths):
            self.up_blocks.append(level(widths[max(i - 1, 0)], width, config.layers_per_block + 1, groups))
            if i < len(widths) - 1:
                self.up_blocks[i].upsamplers = nn.Sequential(upsample(width))
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (N, latent_channels, H, W) -> (N, 3, s*H, s*W)
        x = self.up_blocks(self.mid_block(self.conv_in(x)))
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """The KL autoencoder. Latents here are unscaled; `config.scale` is the diffusion's business."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, 3, s*H, s*W) in [-1, 1] -> mean and log-variance of the latents, each (N, C, H, W)."""
        return self.quant_conv(self.encoder(images)).chunk(2, dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (N, C, H, W), unscaled -> images (N, 3, s*H, s*W), about [-1, 1] but not clamped."""
        return self.decoder(self.post_quant_conv(latents))
