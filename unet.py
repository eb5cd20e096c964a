"""The UNet: Stable Diffusion 1.5's noise predictor, inflated from images to clips as ControlVideo does.

Frames come first: a clip of F frames is an ordinary batch (F, C, H, W), and every 2-D layer sees it as
one. Only three things look across frames:

- the group norms of the residual blocks and of the output, whose statistics span the whole clip;
- key-frame attention (`attn1`): queries from every frame, keys and values from frame 0 alone;
- temporal attention (`attn_temp`): every location attends over all frames.

Attribute names are the public checkpoint's (diffusers layout), so its tensors load as they are.

`by_frames(layer, x)` and `by_locations(layer, x)` are `layer(x)`, done a few frames or locations at a time
so that a clip of any length fits in memory (`slicing.py`); read them as that.

Several clips of equal length can go through at once, one after another along the frame axis: then the
context is (clips, tokens, context_dim) and the timestep (clips,). Shapes below write B for the number of
clips (1 when sampling or fine-tuning), F for frames per clip, N = B * F for all frames.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from attention import attend
from slicing import Offloaded, by_frames, by_locations, channel_moments, key_frame, merge_moments, stored


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
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=timestep.device) / (dim // 2))
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


def clip_norm(norm: nn.GroupNorm, clips: int, *maps: Tensor | Offloaded) -> Callable[[Tensor], Tensor]:
    """Group norm with one mean and variance per group for a whole clip, not per frame: (N, C, H, W) -> same.

    maps: what is to be normed, or maps whose channels make it up. The norm comes back as a function that
    any frames of the clip can be given to.
    """
    if clips > 1 or torch.is_grad_enabled():
        return lambda x: tall_norm(norm, x, clips)
    mean, variance = (torch.cat(moments) for moments in zip(*map(channel_moments, maps)))  # (C,)
    size = len(mean) // norm.num_groups
    moments = merge_moments(mean.view(-1, size).T, variance.view(-1, size).T, 1 / size)  # (groups,)
    mean, variance = (moment.repeat_interleave(size) for moment in moments)
    weight, bias = norm.weight.float(), norm.bias.float()
    # Once its statistics are known, a group norm does what a batch norm does in evaluation.
    return lambda x: F.batch_norm(x, mean, variance, weight, bias, eps=norm.eps)


def tall_norm(norm: nn.GroupNorm, x: Tensor, clips: int) -> Tensor:
    """The same in one go: a clip, its frames below each other, is one tall image with an ordinary group norm.

    In channels_last memory this is a view, no copy.
    """
    n, c, h, w = x.shape
    tall = x.permute(0, 2, 3, 1).reshape(clips, n // clips * h, w, c)
    tall = norm(tall.permute(0, 3, 1, 2))  # (B, C, F*H, W)
    return tall.permute(0, 2, 3, 1).reshape(n, h, w, c).permute(0, 3, 1, 2)


class ResnetBlock2D(nn.Module):
    """norm, SiLU, convolution, twice, with the timestep added in between, around a shortcut.

    In the decoder it also reads a skip: its input is `x` and `skip`, channel beside channel.
    """

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(config.norm_groups, in_channels, eps=1e-5)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(4 * config.widths[0], out_channels)
        self.norm2 = nn.GroupNorm(config.norm_groups, out_channels, eps=1e-5)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor, *skip: Tensor | Offloaded) -> Tensor:
        """(N, C, H, W), (B, time_dim) -> (N, C', H, W), which may take the place of `x` in memory."""
        clips = len(time)
        shift = self.time_emb_proj(F.silu(time)).repeat_interleave(len(x) // clips, dim=0)
        shift = shift[:, :, None, None]  # (N, C', 1, 1)

        norm1 = clip_norm(self.norm1, clips, x, *skip)
        h = by_frames(
            lambda shift, *x: self.conv1(F.silu(norm1(beside(*x)))) + shift,
            *(shift, x, *skip),
            whole=clips > 1,
        )
        norm2 = clip_norm(self.norm2, clips, h)
        return by_frames(
            lambda h, *x: self.shortcut(beside(*x)) + self.conv2(F.silu(norm2(h))),
            *(h, x, *skip),
            into=h if hasattr(self, "conv_shortcut") else x,
            whole=clips > 1,
        )

    def shortcut(self, x: Tensor) -> Tensor:
        return self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x


def beside(*maps: Tensor) -> Tensor:
    """Maps with their channels side by side."""
    return torch.cat(maps, dim=1) if len(maps) > 1 else maps[0]


class Attention(nn.Module):
    """Multi-head attention. Keys and values are made apart from it, since many queries share them."""

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        # A list because the checkpoint says to_out.0.
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, context_dim) -> (B, heads, S, dim / heads) twice."""
        return self.split_heads(self.to_k(context)), self.split_heads(self.to_v(context))

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor]) -> Tensor:
        """(B, ..., dim) -> same: all tokens of a batch entry attend to the same keys and values."""
        q = self.split_heads(self.to_q(x.flatten(1, -2)))  # (B, heads, L, dim / heads)
        h = attend(q, *keys_values)
        return self.to_out[0](h.transpose(1, 2).reshape(x.shape))

    def split_heads(self, x: Tensor) -> Tensor:  # (B, L, dim) -> (B, heads, L, dim / heads)
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Context:
    """A prompt's embedding, with the keys and values that every cross attention makes of it.

    Those do not change over the steps of a run, so a run makes one `Context` and gives it to all steps.
    """

    def __init__(self, embedding: Tensor):  # (S, context_dim), or (B, S, context_dim)
        self.embedding = embedding if embedding.ndim == 3 else embedding[None]
        self.known: dict[Attention, tuple[Tensor, Tensor]] = {}

    def keys_values(self, attention: Attention) -> tuple[Tensor, Tensor]:
        if attention in self.known:
            return self.known[attention]
        keys_values = attention.keys_values(self.embedding)
        if not torch.is_grad_enabled():
            self.known[attention] = keys_values
        return keys_values


class GEGLU(nn.Module):
    """A linear layer whose one half is gated by the GELU of the other: (..., dim) -> (..., out_dim)."""

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

    Once the key frame's and the text's keys and values are there, each location, over all frames, is independent
    of the others: the rest is done a few locations at a time.
    """

    def __init__(self, config: UNetConfig, dim: int, temporal: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, dim, config.heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, config.context_dim, config.heads)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)
        if temporal:
            self.attn_temp = Attention(dim, dim, config.heads)
            self.conv_temp = nn.Conv2d(dim, dim, 1)
            nn.init.zeros_(self.conv_temp.weight)
            nn.init.zeros_(self.conv_temp.bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Tokens (B, F, H*W, C) -> same, and in the same memory outside autograd."""
        key_frame_kv = self.attn1.keys_values(self.norm1(key_frame(x)))
        text_kv = context.keys_values(self.attn2)

        def layers(x: Tensor) -> Tensor:  # (B, F, L, C), L of the H*W locations
            h = self.norm1(x)
            x = x + self.attn1(h, key_frame_kv)
            if hasattr(self, "attn_temp"):
                x = x + self.temporal_attention(h)
            x = x + self.attn2(self.norm2(x), text_kv)
            return x + self.ff(self.norm3(x))

        return by_locations(layers, x, tracks=hasattr(self, "attn_temp"))

    def temporal_attention(self, h: Tensor) -> Tensor:  # (B, F, L, C) -> same
        attention = self.attn_temp
        q, k, v = (  # (B, L, heads, F, dim / heads): each location's track is a sequence
            to(h).unflatten(-1, (attention.heads, -1)).permute(0, 2, 3, 1, 4)
            for to in (attention.to_q, attention.to_k, attention.to_v)
        )
        tracks = attend(*(x.flatten(0, 1) for x in (q, k, v)))
        h = attention.to_out[0](tracks.unflatten(0, q.shape[:2]).permute(0, 3, 1, 2, 4).flatten(3))
        # A 1x1 convolution.
        return F.linear(h, self.conv_temp.weight[:, :, 0, 0], self.conv_temp.bias)


class Transformer2DModel(nn.Module):
    """A transformer block on the pixels of the feature maps, between two 1x1 convolutions."""

    def __init__(self, config: UNetConfig, dim: int, temporal: bool = True):
        super().__init__()
        # Per frame, unlike the residual blocks' norms.
        self.norm = nn.GroupNorm(config.norm_groups, dim, eps=1e-6)
        self.proj_in = nn.Conv2d(dim, dim, 1)
        self.transformer_blocks = nn.ModuleList([BasicTransformerBlock(config, dim, temporal)])
        self.proj_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(N, C, H, W) -> same, and in the same memory outside autograd."""
        n, c, h, w = x.shape
        clips = len(context.embedding)
        tokens = by_frames(lambda x: self.proj_in(self.norm(x)), x)
        tokens = tokens.permute(0, 2, 3, 1).reshape(clips, n // clips, h * w, c)  # (B, F, H*W, C)
        tokens = self.transformer_blocks[0](tokens, context)
        tokens = tokens.reshape(n, h, w, c).permute(0, 3, 1, 2)
        return by_frames(lambda tokens, x: x + self.proj_out(tokens), tokens, x, into=x)


class Downsample2D(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C, ceil(H/2), ceil(W/2))
        return by_frames(self.conv, x)


class Upsample2D(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:  # (N, C, H, W) -> (N, C, *size)
        # The skip's size rather than twice ours: odd sizes were rounded up on the way down.
        return by_frames(lambda x: self.conv(F.interpolate(x, size=size, mode="nearest")), x)


class DownBlock(nn.Module):
    """One level of the encoder: residual blocks, each with a transformer if the level has attention."""

    def __init__(self, config: UNetConfig, level: int, temporal: bool):
        super().__init__()
        width, layers = config.widths[level], config.layers_per_block
        above = config.widths[max(level - 1, 0)]
        inputs = [above] + [width] * (layers - 1)
        self.resnets = nn.ModuleList(ResnetBlock2D(config, channels, width) for channels in inputs)
        if level < len(config.widths) - 1:  # the coarsest level has no attention
            self.attentions = nn.ModuleList(
                Transformer2DModel(config, width, temporal) for _ in range(layers)
            )
            self.downsamplers = nn.ModuleList([Downsample2D(width)])

    def forward(self, x: Tensor, time: Tensor, context: Context) -> Iterator[Tensor]:
        """(N, C, H, W) -> the block's feature maps, one after another; the last goes on to the next level.

        Each may be overwritten by the next.
        """
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if hasattr(self, "attentions"):
                x = self.attentions[i](x, context)
            yield x
        if hasattr(self, "downsamplers"):
            yield self.downsamplers[0](x)


class MidBlock(nn.Module):
    """residual, transformer, residual at the coarsest level; never with temporal attention."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        width = config.widths[-1]
        self.resnets = nn.ModuleList(ResnetBlock2D(config, width, width) for _ in range(2))
        self.attentions = nn.ModuleList([Transformer2DModel(config, width, temporal=False)])

    def forward(self, x: Tensor, time: Tensor, context: Context) -> Tensor:
        x = self.resnets[0](x, time)
        return self.resnets[1](self.attentions[0](x, context), time)


class UpBlock(nn.Module):
    """One level of the decoder: each residual block reads a skip, and there is one block more than going down."""

    def __init__(self, config: UNetConfig, level: int):
        super().__init__()
        widths, layers = config.widths, config.layers_per_block + 1
        width = widths[level]
        below = widths[min(level + 1, len(widths) - 1)]  # what comes up from the coarser level
        above = widths[max(level - 1, 0)]  # the last skip was made by the finer level
        inputs = [below] + [width] * (layers - 1)
        skips = [width] * (layers - 1) + [above]
        resnets = (ResnetBlock2D(config, x + skip, width) for x, skip in zip(inputs, skips))
        self.resnets = nn.ModuleList(resnets)
        if level < len(widths) - 1:
            self.attentions = nn.ModuleList(Transformer2DModel(config, width) for _ in range(layers))
        if level > 0:
            self.upsamplers = nn.ModuleList([Upsample2D(width)])

    def forward(self, skips: list[Tensor | Offloaded], time: Tensor, context: Context) -> Tensor:
        """`skips` is the whole stack that the encoder left, with what comes from below on top of it.

        This block takes its share off the end. (Nobody else may hold them, or they would stay in memory.)
        """
        x = skips.pop()
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, time, skips.pop())
            if hasattr(self, "attentions"):
                x = self.attentions[i](x, context)
        if hasattr(self, "upsamplers"):
            x = self.upsamplers[0](x, size=skips[-1].shape[-2:])
        return x


def prepare_inputs(
    latents: Tensor, timestep: int | Tensor, context: Tensor | Context
) -> tuple[Tensor, Tensor, Context]:
    """Brings a network's inputs to one form: channels_last latents, timestep (B,), and a `Context`."""
    context = context if isinstance(context, Context) else Context(context)
    clips = len(context.embedding)
    if isinstance(timestep, Tensor):
        timestep = timestep.to(latents.device).reshape(-1).expand(clips)
    else:  # filled by the device itself: a copy from the host would wait for all that the device has to do
        timestep = torch.full((clips,), timestep, device=latents.device)
    return latents.contiguous(memory_format=torch.channels_last), timestep, context


class UNet(nn.Module):
    """Predicts the noise in the latents of a clip.

    `UNet(config)(latents, timestep, context, control=None)`:
    - latents: (F, in_channels, H, W), noisy at `timestep`;
    - timestep: an int in [0, 1000), one for the whole clip;
    - context: (tokens, context_dim), the prompt's text embedding, shared by all frames; or its `Context`;
    - control: the ControlNet's residuals, fine to coarse, the middle one last. They are asked for one by one
      on the way down, and each becomes a skip: the encoder's map is added to it in place.

    Returns the predicted noise (F, out_channels, H, W). For several clips at once see the top of this file.
    Inflation as in the public ControlVideo code (Zhao et al., 2023).
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        levels = range(len(config.widths))
        self.conv_in = nn.Conv2d(config.in_channels, config.widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(config.widths[0])
        self.down_blocks = nn.ModuleList(DownBlock(config, level, temporal=True) for level in levels)
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList(UpBlock(config, level) for level in reversed(levels))
        self.conv_norm_out = nn.GroupNorm(config.norm_groups, config.widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(config.widths[0], config.out_channels, 3, padding=1)

    def forward(
        self,
        latents: Tensor,
        timestep: int | Tensor,
        context: Tensor | Context,
        control: Iterable[Tensor] | None = None,
    ) -> Tensor:
        x, timestep, context = prepare_inputs(latents, timestep, context)
        time = self.time_embedding(timestep)

        residuals = iter(control) if control is not None else None

        def skip(x: Tensor) -> Tensor | Offloaded:
            return stored(next(residuals).add_(x) if residuals else x.clone())

        x = by_frames(self.conv_in, x)
        skips = [skip(x)]
        for block in self.down_blocks:
            for feature_map in block(x, time, context):
                x = feature_map
                skips.append(skip(x))
        x = self.mid_block(x, time, context)
        skips.append(next(residuals).add_(x) if residuals else x)

        for block in self.up_blocks:
            skips.append(block(skips, time, context))
        (x,) = skips
        norm = clip_norm(self.conv_norm_out, len(time), x)
        return by_frames(lambda x: self.conv_out(F.silu(norm(x))), x, whole=len(time) > 1)
