"""CLIP: a prompt becomes tokens, tokens become the context that the UNet attends to; a picture
becomes an embedding, which tells how alike two pictures are.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision".
Stable Diffusion 1.5 uses the text tower of ViT-L/14, frozen, up to its last layer norm; the metrics
CLIP-I and CLIP-T use the image tower of the same, whole.
"""

import json
import re
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

# ---------------------------------------------------------------- prompt -> tokens

START, END = "<|startoftext|>", "<|endoftext|>"
SPECIAL = re.compile(f"({re.escape(START)}|{re.escape(END)})")

# A word is a contraction's tail, a run of letters, a single digit, or a run of anything else but
# spaces. Written for ASCII: `split_words` shows it an ASCII stand-in for all other characters.
WORD = re.compile(rf"{SPECIAL.pattern}|'(?:s|t|re|ve|m|ll|d)|[a-z]+|[0-9]|[^\sa-z0-9]+", re.ASCII)

# Merges work on bytes, each written as one visible character: itself where Latin-1 has a glyph
# for it, else the next code point from 256 on. Vocabularies count their ids in this order.
_VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]
BYTE_SYMBOLS = {b: chr(b) for b in _VISIBLE} | {b: chr(256 + i) for i, b in enumerate(_HIDDEN)}
SYMBOL_BYTES = {symbol: byte for byte, symbol in BYTE_SYMBOLS.items()}
WORD_END = "</w>"


def split_words(text: str) -> list[str]:
    """Normalise (NFC), lower-case and cut a text into the words that are encoded on their own."""
    # One character at a time, because str.lower() knows about the Greek final sigma, and CLIP not.
    text = "".join(char.lower() for char in unicodedata.normalize("NFC", text))
    stand_in = "".join(map(_ascii_stand_in, text))
    words = []
    for match in WORD.finditer(stand_in):
        word = text[match.start() : match.end()]
        # A special token's name in capitals is mere text, yet keeps apart from its neighbours.
        words += ["<|", word[2:-2], "|>"] if word in (START, END) else [word]
    return words


def _ascii_stand_in(char: str) -> str:
    if char.isascii():
        return char
    if char.isspace():
        return " "
    return {"L": "a", "N": "0"}.get(unicodedata.category(char)[0], "!")


def word_symbols(word: str) -> list[str]:
    """The symbols that merging starts from: one per byte, the last one marked as the word's end."""
    symbols = [BYTE_SYMBOLS[byte] for byte in word.encode()]
    return [*symbols[:-1], symbols[-1] + WORD_END]


def merge_pair(symbols: Sequence[str], pair: tuple[str, str]) -> list[str]:
    """Join every occurrence of two neighbouring symbols, from the left."""
    merged, i = [], 0
    while i < len(symbols):
        joins = tuple(symbols[i : i + 2]) == pair
        merged.append("".join(pair) if joins else symbols[i])
        i += 2 if joins else 1
    return merged


class Tokenizer:
    """CLIP's byte-pair encoding: `tokenizer("a person")` -> token ids (77,) int64.

    Any Unicode text has an encoding, the same as that of transformers' CLIPTokenizer. What counts
    as a letter is asked of Python's Unicode tables, so the two can part on characters that are
    younger than one of them, and on the order of stacked combining marks younger than Unicode 9.

    vocab: the id of every token: 256 byte symbols, the same as word ends, the merges, two specials
    merges: pairs of symbols, the earliest learned first
    length: tokens per prompt, start and end included
    Raises ValueError when the vocabulary lacks a token that a text could need.
    """

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], length: int = 77):
        alphabet = [symbol + end for end in ("", WORD_END) for symbol in SYMBOL_BYTES]
        needed = [*alphabet, *map("".join, merges), START, END]
        missing = [token for token in needed if token not in vocab]
        if missing:
            lack = f"{len(missing)} of the {len(needed)} tokens needed, such as {missing[0]!r}"
            raise ValueError(f"the vocabulary lacks {lack}")
        self.vocab, self.merges, self.length = vocab, merges, length
        self.tokens = {index: token for token, index in vocab.items()}
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}

    def __call__(self, prompt: str) -> Tensor:
        """Start token, the prompt's tokens, then end tokens up to the length: (length,) int64.

        A prompt that is too long loses its end, with a warning that names what was dropped.
        """
        ids, room = self.encode(prompt), self.length - 2
        if len(ids) > room:
            excess, words = len(ids) - room, self.decode(ids[room:])
            warnings.warn(f"prompt is {excess} tokens too long, dropped: {words}", stacklevel=2)
        ids = [self.vocab[START], *ids[:room]]
        return torch.tensor(ids + [self.vocab[END]] * (self.length - len(ids)))

    def encode(self, text: str) -> list[int]:
        """The token ids of a text of any length, without start, end and padding.

        Raises UnicodeEncodeError for one half of a surrogate pair, which is no character.
        """
        ids = []
        for part in SPECIAL.split(text):
            if part in (START, END):
                ids.append(self.vocab[part])
                continue
            for word in split_words(part):
                ids += [self.vocab[token] for token in self._merge(word)]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The lower-case text of token ids, one space after each word."""
        symbols = "".join(self.tokens[int(index)] for index in ids)
        symbols = symbols.replace(WORD_END, BYTE_SYMBOLS[ord(" ")])
        return bytes(map(SYMBOL_BYTES.__getitem__, symbols)).decode(errors="replace").strip()

    def _merge(self, word: str) -> list[str]:
        symbols = word_symbols(word)
        while known := [pair for pair in pairwise(symbols) if pair in self.ranks]:
            symbols = merge_pair(symbols, min(known, key=self.ranks.__getitem__))
        return symbols

    @classmethod
    def load(cls, folder: str | Path, length: int = 77) -> "Tokenizer":
        """Read `vocab.json` and `merges.txt`, as in the `tokenizer` folder of SD 1.5."""
        vocab = json.loads(Path(folder, "vocab.json").read_text(encoding="utf-8"))
        lines = Path(folder, "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
        return cls(vocab, merges, length)

    def save(self, folder: str | Path) -> None:
        """Write `vocab.json` and `merges.txt` into a folder, which is made if need be."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        vocab = json.dumps(self.vocab, ensure_ascii=False)
        lines = ["#version: 0.2", *map(" ".join, self.merges)]
        Path(folder, "vocab.json").write_text(vocab + "\n", encoding="utf-8")
        Path(folder, "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


# ---------------------------------------------------------------- tokens -> context


@dataclass(frozen=True)
class TextConfig:
    """Sizes of the text encoder; the defaults are CLIP ViT-L/14's, 123,060,480 parameters."""

    vocab_size: int = 49408
    width: int = 768
    heads: int = 12
    layers: int = 12
    mlp_width: int = 3072
    length: int = 77  # the longest token sequence there is a position for


class Attention(nn.Module):
    """Multi-head self-attention; with `causal`, no token sees those after it."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (  # each (..., heads, T, width / heads)
            project(x).unflatten(-1, (self.heads, -1)).transpose(-3, -2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(x.transpose(-3, -2).flatten(-2))  # (..., T, width)


class MLP(nn.Module):
    """Two linear layers on every token by itself."""

    def __init__(self, width: int, mlp_width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))  # CLIP was trained with this "quick" GELU


class Layer(nn.Module):
    """Attention, then an MLP, each added to what it reads through a layer norm."""

    def __init__(self, width: int, heads: int, mlp_width: int, causal: bool):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(width)
        self.self_attn = Attention(width, heads, causal)
        self.layer_norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, mlp_width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Transformer(nn.Module):
    """A stack of layers, (..., T, width) -> (..., T, width): causal for text, not so for images."""

    def __init__(self, width: int, heads: int, layers: int, mlp_width: int, causal: bool):
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, heads, mlp_width, causal) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def embedding(rows: int, width: int) -> nn.Embedding:
    """`nn.Embedding`, except that nothing is drawn on the meta device.

    A normal distribution there is written in Python, and importing it brings in PyTorch's compiler: seconds.
    """
    weight = torch.empty(rows, width)
    if weight.is_meta:
        return nn.Embedding.from_pretrained(weight, freeze=False)
    return nn.Embedding(rows, width)


class TextEncoder(nn.Module):
    """Tokens (T,) int64 -> context (T, width); a batch of them (B, T) -> (B, T, width).

    The context is the last hidden state after the final layer norm: one vector per token.
    """

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        embeddings = nn.ModuleDict(
            {
                "token_embedding": embedding(config.vocab_size, config.width),
                "position_embedding": embedding(config.length, config.width),
            }
        )
        if not embeddings.token_embedding.weight.is_meta:
            # The spreads that CLIP starts from: PyTorch's own, 1, would drown what the layers add.
            nn.init.normal_(embeddings.token_embedding.weight, std=0.02)
            nn.init.normal_(embeddings.position_embedding.weight, std=0.01)
        self.text_model = nn.ModuleDict(
            {
                "embeddings": embeddings,
                "encoder": Transformer(
                    config.width, config.heads, config.layers, config.mlp_width, causal=True
                ),
                "final_layer_norm": nn.LayerNorm(config.width),
            }
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Raises ValueError when there are more tokens than positions."""
        count, length = tokens.shape[-1], self.config.length
        if count > length:
            raise ValueError(f"{count} tokens, but the text encoder reads {length} at most")
        model = self.text_model
        x = model.embeddings.token_embedding(tokens)  # (..., T, width)
        x = x + model.embeddings.position_embedding.weight[:count]
        return model.final_layer_norm(model.encoder(x))


# ---------------------------------------------------------------- picture -> embedding

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
        self.vision_model = nn.ModuleDict(
            {
                "embeddings": PatchEmbedding(config),
                "pre_layrnorm": nn.LayerNorm(config.width),  # spelled so in the public file
                "encoder": Transformer(
                    config.width, config.heads, config.layers, config.mlp_width, causal=False
                ),
                "post_layernorm": nn.LayerNorm(config.width),
            }
        )
        self.visual_projection = nn.Linear(config.width, config.embedding, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        model = self.vision_model
        x = model.encoder(model.pre_layrnorm(model.embeddings(images)))
        return self.visual_projection(model.post_layernorm(x[:, 0]))


def prepare_images(frames: np.ndarray, size: int) -> Tensor:
    """Frames uint8 RGB (F, H, W, 3) -> what CLIP was trained to see, (F, 3, size, size).

    As transformers' processor does it with PIL: the short side resized to `size`, bicubic, then the
    middle of the long one.
    """
    height, width = frames.shape[1:3]
    short = min(height, width)
    new_height, new_width = size * height // short, size * width // short
    top, left = (new_height - size) // 2, (new_width - size) // 2
    pictures = [
        Image.fromarray(frame)
        .resize((new_width, new_height), Image.Resampling.BICUBIC)
        .crop((left, top, left + size, top + size))
        for frame in frames
    ]
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255
    mean, deviation = (x.new_tensor(v)[:, None, None] for v in (COLOUR_MEAN, COLOUR_DEVIATION))
    return (x - mean) / deviation
