"""The pose ControlNet: a copy of the UNet's encoder that reads the control image and corrects the UNet's skips.

Inflated like the UNet, key-frame attention and clip-wide norms included, but without temporal attention.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from slicing import Offloaded, by_frames
from unet import Context, DownBlock, MidBlock, TimestepEmbedding, UNetConfig, prepare_inputs


class HintEmbedding(nn.Module):
    """Brings the control image down to the latents' size and the UNet's width: (N, 3, s*H, s*W) -> (N, C, H, W).

    Each width but the first halves the resolution, so `hint_widths` also says the factor s: 8 for SD 1.5.
    """

    def __init__(self, hint_widths: tuple[int, ...], out_channels: int):
        super().__init__()
        self.widths, self.factor = hint_widths, 2 ** (len(hint_widths) - 1)
        self.conv_in = nn.Conv2d(3, hint_widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for width, next_width in pairwise(hint_widths):
            self.blocks.append(nn.Conv2d(width, width, 3, padding=1))
            self.blocks.append(nn.Conv2d(width, next_width, 3, padding=1, stride=2))
        self.conv_out = nn.Conv2d(hint_widths[-1], out_channels, 3, padding=1)

    def forward(self, hint: Tensor) -> Tensor:
        x = F.silu(self.conv_in(hint))
        for block in self.blocks:
            x = F.silu(block(x))
        return self.conv_out(x)


class ControlNet(nn.Module):
    """Residuals that make the UNet follow the control images.

    `ControlNet(config, hint_widths)(latents, timestep, context, hint, scale=1)`: the UNet's own inputs, and
    - hint: (F, C, H, W), what `embed_hint` made of the drawn poses, once for all steps;
    - scale: the control scale, a factor on every residual.

    Yields one residual for each of the UNet's skips, fine to coarse (12 in SD 1.5), and the middle's last.
    Each is computed when it is asked for, so the two networks walk down their encoders side by side, and
    no residual is in memory before the UNet gets to it.
    Attribute names are the public checkpoint's.
    """

    def __init__(self, config: UNetConfig, hint_widths: tuple[int, ...] = (16, 32, 96, 256)):
        super().__init__()
        self.config = config
        widths = config.widths
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.controlnet_cond_embedding = HintEmbedding(hint_widths, widths[0])
        self.time_embedding = TimestepEmbedding(widths[0])
        blocks = (DownBlock(config, level, temporal=False) for level in range(len(widths)))
        self.down_blocks = nn.ModuleList(blocks)
        self.mid_block = MidBlock(config)

        # One skip is conv_in's; then each level has its blocks' and its downsampler's, which the coarsest lacks.
        per_level = config.layers_per_block + 1
        skip_widths = [widths[0], *(width for width in widths for _ in range(per_level))][:-1]
        self.controlnet_down_blocks = nn.ModuleList(nn.Conv2d(width, width, 1) for width in skip_widths)
        self.controlnet_mid_block = nn.Conv2d(widths[-1], widths[-1], 1)

    def forward(
        self,
        latents: Tensor,
        timestep: int | Tensor,
        context: Tensor | Context,
        hint: Tensor | Offloaded,
        scale: float = 1.0,
    ) -> Iterator[Tensor]:
        x, timestep, context = prepare_inputs(latents, timestep, context)
        time = self.time_embedding(timestep)
        residual_convs = iter(self.controlnet_down_blocks)

        def residual(x: Tensor, conv: nn.Conv2d) -> Tensor:
            return by_frames(lambda x: conv(x) * scale, x)

        x = by_frames(lambda x, hint: self.conv_in(x) + hint, x, hint)
        yield residual(x, next(residual_convs))
        for block in self.down_blocks:
            for feature_map in block(x, time, context):
                x = feature_map
                yield residual(x, next(residual_convs))
        yield residual(self.mid_block(x, time, context), self.controlnet_mid_block)

    def embed_hint(self, hint: Tensor) -> Tensor:
        """Control images (F, 3, s*H, s*W), RGB in [0, 1] -> what is added to the first map: (F, C, H, W)."""
        return by_frames(self.controlnet_cond_embedding, hint)
