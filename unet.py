"""The UNet: Stable Diffusion 1.5's noise predictor, inflated from images to clips as ControlVideo does.

Frames come first: a clip of F frames is an ordinary batch (F, C, H, W), and every 2-D layer sees it as
one. Only three things look across frames:

- the group norms of the residual blocks and of the output, whose statistics span the whole clip;
- key-frame attention (`attn1`): every frame asks, frame 0 alone answers;
- temporal attention (`attn_temp`): every location attends over all frames.

Attribute names are the public checkpoint's (diffusers layout), so its tensors load as they are.

Several clips of equal length can go through at once, one after another along the frame axis: then the
context is (clips, tokens, context_dim) and the timestep (clips,). Shapes below write B for the number of
clips (1 when sampling or fine-tuning), F for frames per clip, N = B * F for all frames.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class UNetConfig:
    """The sizes that tell one UNet from another. The defaults are Stable Diffusion 1.5."""

    in_channels: int = 4
    out_channels: int = 4
    widths: tuple[int, ...] = (320, 640, 1280, 1280)  # channels at each level, from fine to coarse
    layers_per_block: int = 2
    context_dim: int = 768
    heads: int = 8  # in every attention, so a head is 40 to 160 wide in SD 1.5
    norm_groups: int = 32


def timestep_embedding(timestep: Tensor, dim: int) -> Tensor:
    """Timesteps (B,) in [0, 1000) -> (B, dim) float32: cosines, then sines, of `dim / 2` frequencies."""
    frequencies = torch.exp(
        -math.log(10000) * torch.arange(dim // 2, device=timestep.device) / (dim // 2)
    )
    angles = timestep.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """Two linear layers that turn the sinusoids into what the residual blocks add."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim
        self.linear_1 = nn.Linear(dim, 4 * dim)
        self.linear_2 = nn.Linear(4 * dim, 4 * dim)

    def forward(self, timestep: Tensor) -> Tensor:  # (B,) -> (B, 4 * dim)
        sinusoids = timestep_embedding(timestep, self.dim).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(sinusoids)))


def clip_norm(norm: nn.GroupNorm, x: Tensor, clips: int) -> Tensor:
    """Group norm with one mean and variance per group for a whole clip, not per frame: (N, C, H, W) -> same.

    A clip is laid out as one tall image (its frames below each other), whose ordinary group norm is just
    that. In channels_last memory this is a view, no copy.
    """
    n, c, h, w = x.shape
    tall = (
        x.permute(0, 2, 3, 1).reshape(clips, n // clips * h, w, c).permute(0, 3, 1, 2)
    )  # (B, C, F*H, W)
    return norm(tall).permute(0, 2, 3, 1).reshape(n, h, w, c).permute(0, 3, 1, 2)


class ResnetBlock2D(nn.Module):
    """norm, SiLU, convolution, twice, with the timestep added in between, around a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, time_dim: int, norm_groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, in_channels, eps=1e-5)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, out_channels)
        self.norm2 = nn.GroupNorm(norm_groups, out_channels, eps=1e-5)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:  # (N, C, H, W), (B, time_dim)
        clips = len(time)
        h = self.conv1(F.silu(clip_norm(self.norm1, x, clips)))
        shift = self.time_emb_proj(F.silu(time)).repeat_interleave(
            len(x) // clips, dim=0
        )  # (N, C')
        h = h + shift[:, :, None, None]
        h = self.conv2(F.silu(clip_norm(self.norm2, h, clips)))
        return (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x) + h


class Attention(nn.Module):
    """Multi-head attention: queries from `x`, keys and values from `context`."""

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.ModuleList(
            [nn.Linear(dim, dim)]
        )  # a list because the checkpoint says to_out.0

    def forward(
        self, x: Tensor, context: Tensor
    ) -> Tensor:  # (B, L, dim), (B, S, context_dim) -> (B, L, dim)
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, L or S, dim / heads)
            for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """A linear layer whose one half is gated by the GELU of the other."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * out_dim)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        # The checkpoint counts a dropout as net.1; it does nothing here.
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Key-frame attention (+ temporal attention beside it), cross attention to the text, feed-forward.

    A clip's tokens are one sequence, frame after frame: (B, F*H*W, C). The queries of all frames can then
    share one set of keys and values: frame 0's in `attn1`, the text's in `attn2`.
    """

    def __init__(self, dim: int, context_dim: int, heads: int, temporal: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, context_dim, heads)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)
        if temporal:
            self.attn_temp = Attention(dim, dim, heads)
            self.conv_temp = nn.Conv2d(dim, dim, 1)
            nn.init.zeros_(self.conv_temp.weight)
            nn.init.zeros_(self.conv_temp.bias)

    def forward(
        self, x: Tensor, context: Tensor, frames: int
    ) -> Tensor:  # (B, F*H*W, C), (B, S, context_dim)
        h = self.norm1(x)
        key_frame = h[:, : h.shape[1] // frames]  # (B, H*W, C)
        x = x + self.attn1(h, key_frame)
        if hasattr(self, "attn_temp"):
            x = x + self.temporal_attention(h, frames)
        h = self.norm2(x)
        x = x + self.attn2(h, context)
        return x + self.ff(self.norm3(x))

    def temporal_attention(self, h: Tensor, frames: int) -> Tensor:  # (B, F*H*W, C) -> same
        by_location = h.unflatten(1, (frames, -1)).transpose(1, 2)  # (B, H*W, F, C)
        tracks = by_location.flatten(0, 1)  # (B*H*W, F, C)
        tracks = self.attn_temp(tracks, tracks)
        tracks = F.linear(
            tracks, self.conv_temp.weight[:, :, 0, 0], self.conv_temp.bias
        )  # a 1x1 convolution
        return tracks.view_as(by_location).transpose(1, 2).flatten(1, 2)


class Transformer2DModel(nn.Module):
    """A transformer block on the pixels of the feature maps, between two 1x1 convolutions."""

    def __init__(self, dim: int, context_dim: int, heads: int, norm_groups: int, temporal: bool):
        super().__init__()
        self.norm = nn.GroupNorm(
            norm_groups, dim, eps=1e-6
        )  # per frame, unlike the residual blocks' norms
        self.proj_in = nn.Conv2d(dim, dim, 1)
        self.transformer_blocks = nn.ModuleList(
            [BasicTransformerBlock(dim, context_dim, heads, temporal)]
        )
        self.proj_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:  # (N, C, H, W), (B, S, context_dim)
        n, c, h, w = x.shape
        clips = len(context)
        tokens = (
            self.proj_in(self.norm(x)).permute(0, 2, 3, 1).reshape(clips, -1, c)
        )  # (B, F*H*W, C)
        tokens = self.transformer_blocks[0](tokens, context, n // clips)
        return x + self.proj_out(tokens.reshape(n, h, w, c).permute(0, 3, 1, 2))


class Downsample2D(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C, ceil(H/2), ceil(W/2))
        return self.conv(x)


class Upsample2D(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        # The skip's size rather than twice ours: odd sizes were rounded up on the way down.
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class DownBlock(nn.Module):
    """One level of the encoder: residual blocks, each with a transformer if the level has attention."""

    def __init__(self, config: UNetConfig, level: int, temporal: bool):
        super().__init__()
        out_channels = config.widths[level]
        in_channels = config.widths[max(level - 1, 0)]
        last = level == len(config.widths) - 1
        self.resnets = nn.ModuleList(
            ResnetBlock2D(
                in_channels if i == 0 else out_channels,
                out_channels,
                4 * config.widths[0],
                config.norm_groups,
            )
            for i in range(config.layers_per_block)
        )
        if not last:  # the coarsest level has no attention
            self.attentions = nn.ModuleList(
                Transformer2DModel(
                    out_channels, config.context_dim, config.heads, config.norm_groups, temporal
                )
                for _ in range(config.layers_per_block)
            )
            self.downsamplers = nn.ModuleList([Downsample2D(out_channels)])

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> list[Tensor]:
        """(N, C, H, W) -> the block's feature maps, each of them a skip; the last goes on to the next level."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if hasattr(self, "attentions"):
                x = self.attentions[i](x, context)
            skips.append(x)
        if hasattr(self, "downsamplers"):
            skips.append(self.downsamplers[0](x))
        return skips


class MidBlock(nn.Module):
    """residual, transformer, residual at the coarsest level; never with temporal attention."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        width = config.widths[-1]
        self.resnets = nn.ModuleList(
            ResnetBlock2D(width, width, 4 * config.widths[0], config.norm_groups) for _ in range(2)
        )
        self.attentions = nn.ModuleList(
            [
                Transformer2DModel(
                    width, config.context_dim, config.heads, config.norm_groups, temporal=False
                )
            ]
        )

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[0](x, time)
        return self.resnets[1](self.attentions[0](x, context), time)


class UpBlock(nn.Module):
    """One level of the decoder: each residual block eats a skip, and there is one block more than going down."""

    def __init__(self, config: UNetConfig, level: int):
        super().__init__()
        widths = config.widths
        width = widths[level]
        below = widths[min(level + 1, len(widths) - 1)]  # what comes up from the coarser level
        above = widths[max(level - 1, 0)]  # the last skip was made by the finer level
        layers = config.layers_per_block + 1
        self.resnets = nn.ModuleList(
            ResnetBlock2D(
                (below if i == 0 else width) + (above if i == layers - 1 else width),
                width,
                4 * widths[0],
                config.norm_groups,
            )
            for i in range(layers)
        )
        if level < len(widths) - 1:
            self.attentions = nn.ModuleList(
                Transformer2DModel(
                    width, config.context_dim, config.heads, config.norm_groups, temporal=True
                )
                for _ in range(layers)
            )
        if level > 0:
            self.upsamplers = nn.ModuleList([Upsample2D(width)])

    def forward(self, x: Tensor, skips: list[Tensor], time: Tensor, context: Tensor) -> Tensor:
        """`skips` is the whole stack that the encoder left; this block takes its share off the end."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), time)
            if hasattr(self, "attentions"):
                x = self.attentions[i](x, context)
        if hasattr(self, "upsamplers"):
            x = self.upsamplers[0](x, size=skips[-1].shape[-2:])
        return x


def prepare_inputs(
    latents: Tensor, timestep: int | Tensor, context: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Brings a network's inputs to one form: channels_last latents, timestep (B,), context (B, S, dim)."""
    timestep = torch.as_tensor(timestep, device=latents.device).reshape(-1)
    context = context if context.ndim == 3 else context[None]
    return latents.contiguous(memory_format=torch.channels_last), timestep, context


class UNet(nn.Module):
    """Predicts the noise in the latents of a clip.

    `UNet(config)(latents, timestep, context, control=None)`:
    - latents: (F, in_channels, H, W), noisy at `timestep`;
    - timestep: an int in [0, 1000), one for the whole clip;
    - context: (tokens, context_dim), the prompt's text embedding, shared by all frames;
    - control: the ControlNet's residuals, fine to coarse, the middle one last; added to the skips and the middle.

    Returns the predicted noise (F, out_channels, H, W). For several clips at once see the top of this file.
    Inflation as in the public ControlVideo code (Zhao et al., 2023).
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        levels = range(len(config.widths))
        self.conv_in = nn.Conv2d(config.in_channels, config.widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(config.widths[0])
        self.down_blocks = nn.ModuleList(
            DownBlock(config, level, temporal=True) for level in levels
        )
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList(UpBlock(config, level) for level in reversed(levels))
        self.conv_norm_out = nn.GroupNorm(config.norm_groups, config.widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(config.widths[0], config.out_channels, 3, padding=1)

    def forward(
        self,
        latents: Tensor,
        timestep: int | Tensor,
        context: Tensor,
        control: list[Tensor] | None = None,
    ) -> Tensor:
        x, timestep, context = prepare_inputs(latents, timestep, context)
        time = self.time_embedding(timestep)

        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            skips += block(skips[-1], time, context)
        x = self.mid_block(skips[-1], time, context)

        if control is not None:
            *residuals, mid_residual = control
            skips = [skip + residual for skip, residual in zip(skips, residuals, strict=True)]
            x = x + mid_residual

        for block in self.up_blocks:
            x = block(x, skips, time, context)
        return self.conv_out(F.silu(clip_norm(self.conv_norm_out, x, len(time))))
