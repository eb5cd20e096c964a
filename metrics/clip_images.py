"""CLIP's image encoder, ViT-L/14: a picture becomes an embedding, which tells how alike two pictures are."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from clip import transformer

# What CLIP's training took for the mean and deviation of red, green and blue.
COLOUR_MEAN = (0.48145466, 0.4578275, 0.40821073)
COLOUR_DEVIATION = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ImageConfig:
    """Sizes of the image encoder; the defaults are CLIP ViT-L/14's, 303,966,208 parameters."""

    size: int = 224  # pixels of each side
    patch: int = 14  # pixels of each side of what becomes one token
    width: int = 1024
    heads: int = 16
    layers: int = 24
    mlp_width: int = 4096
    embedding: int = 768


class PatchEmbedding(nn.Module):
    """Images (N, 3, H, W) -> tokens (N, 1 + patches, width), the first one for the whole."""

    def __init__(self, config: ImageConfig):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(config.width) * config.width**-0.5)
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch, config.patch, bias=False)
        tokens = 1 + (config.size // config.patch) ** 2
        self.position_embedding = nn.Embedding(tokens, config.width)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)
        whole = self.class_embedding.expand(len(images), 1, -1)
        return torch.cat([whole, patches], dim=1) + self.position_embedding.weight


class ImageEncoder(nn.Module):
    """What `prepare_images` gives, (N, 3, size, size) -> embeddings (N, embedding)."""

    def __init__(self, config: ImageConfig = ImageConfig()):
        super().__init__()
        self.config = config
        width, sizes = config.width, (config.heads, config.layers, config.mlp_width)
        self.vision_model = nn.ModuleDict(
            {
                "embeddings": PatchEmbedding(config),
                "pre_layrnorm": nn.LayerNorm(width),  # spelled so in the public file
                "encoder": transformer(width, *sizes, causal=False),
                "post_layernorm": nn.LayerNorm(width),
            }
        )
        self.visual_projection = nn.Linear(config.width, config.embedding, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        model = self.vision_model
        x = model.encoder.layers(model.pre_layrnorm(model.embeddings(images)))
        return self.visual_projection(model.post_layernorm(x[:, 0]))


def prepare_images(frames: np.ndarray, size: int) -> Tensor:
    """Frames uint8 RGB (F, H, W, 3) -> what CLIP was trained to see, (F, 3, size, size).

    PIL resizes the short side to `size`, bicubic, and the middle of the long one is kept, as transformers does.
    """
    height, width = (size * side // min(frames.shape[1:3]) for side in frames.shape[1:3])
    resized = [Image.fromarray(f).resize((width, height), Image.Resampling.BICUBIC) for f in frames]
    top, left = (height - size) // 2, (width - size) // 2
    cropped = np.stack(resized)[:, top : top + size, left : left + size]
    x = torch.from_numpy(cropped).permute(0, 3, 1, 2) / 255
    mean, deviation = (x.new_tensor(levels)[:, None, None] for levels in (COLOUR_MEAN, COLOUR_DEVIATION))
    return (x - mean) / deviation
