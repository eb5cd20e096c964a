"""CLIP: a prompt becomes tokens, and tokens become the context that the UNet attends to.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision".
Stable Diffusion 1.5 uses the text encoder of ViT-L/14, frozen, up to its last layer norm. The image encoder of the
same model, which only metrics use, is in `metrics/clip_images.py`.
"""

import re
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safe.arguments import LONGEST_PROMPT
from safe.files import read_json, read_text

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
LARGEST_FILE = 20_000_000  # bytes: CLIP's own have 4 MB


def split_words(text: str) -> list[str]:
    """Normalise (NFC), lower-case and cut a text into the words that are encoded on their own."""
    # One character at a time, because str.lower() knows about the Greek final sigma, and CLIP not.
    text = "".join(char.lower() for char in unicodedata.normalize("NFC", text))
    words = []
    for match in WORD.finditer("".join(map(_ascii_stand_in, text))):
        word = text[match.start() : match.end()]
        # A special token's name in capitals is mere text, yet keeps apart from its neighbours.
        words += ["<|", word[2:-2], "|>"] if word in (START, END) else [word]
    return words


def _ascii_stand_in(char: str) -> str:
    if char.isascii():
        return char
    return " " if char.isspace() else {"L": "a", "N": "0"}.get(unicodedata.category(char)[0], "!")


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

    Any Unicode text is encoded as by transformers' CLIPTokenizer, except for characters that only one
    of the two Unicode tables knows, and for the order of combining marks younger than Unicode 9.

    vocab: the id of every token: 256 byte symbols, the same as word ends, the merges, two specials
    merges: pairs of symbols, the earliest learned first
    length: tokens per prompt, start and end included
    Raises ValueError when the vocabulary lacks a token that a text could need.
    """

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], length: int = 77):
        alphabet = [symbol + end for end in ("", WORD_END) for symbol in SYMBOL_BYTES]
        needed = [*alphabet, *map("".join, merges), START, END]
        if missing := [token for token in needed if token not in vocab]:
            count = f"{len(missing)} of the {len(needed)} tokens needed"
            raise ValueError(f"the vocabulary lacks {count}, such as {missing[0]!r:.80}")
        if any(type(index) is not int or not 0 <= index < 2**31 for index in vocab.values()):
            raise ValueError("the vocabulary has ids that are no whole numbers")
        self.vocab, self.merges, self.length = vocab, merges, length
        self.tokens = {index: token for token, index in vocab.items()}
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}

    def __call__(self, prompt: str) -> Tensor:
        """Start token, the prompt's tokens, then end tokens up to the length: (length,) int64.

        A prompt that is too long loses its end, with a warning that names what was dropped. Raises ValueError
        for one of more than `LONGEST_PROMPT` characters.
        """
        if len(prompt) > LONGEST_PROMPT:
            raise ValueError(f"a prompt of {len(prompt)} characters: at most {LONGEST_PROMPT} are read")
        ids, room = self.encode(prompt), self.length - 2
        if excess := ids[room:]:
            message = f"prompt is {len(excess)} tokens too long, dropped: {self.decode(excess)}"
            warnings.warn(message, stacklevel=2)
        ids = [self.vocab[START], *ids[:room]]
        return torch.tensor(ids + [self.vocab[END]] * (self.length - len(ids)))

    def encode(self, text: str) -> list[int]:
        """The token ids of a text of any length, without start, end and padding.

        Raises UnicodeEncodeError for one half of a surrogate pair, which is no character.
        """
        tokens = []
        for part in SPECIAL.split(text):
            if part in (START, END):
                tokens.append(part)
                continue
            for word in split_words(part):
                symbols = word_symbols(word)
                while known := [pair for pair in pairwise(symbols) if pair in self.ranks]:
                    symbols = merge_pair(symbols, min(known, key=self.ranks.__getitem__))
                tokens += symbols
        return [self.vocab[token] for token in tokens]

    def decode(self, ids: Iterable[int]) -> str:
        """The lower-case text of token ids, one space after each word."""
        symbols = "".join(self.tokens[index] for index in ids).replace(WORD_END, BYTE_SYMBOLS[ord(" ")])
        return bytes(map(SYMBOL_BYTES.__getitem__, symbols)).decode(errors="replace").strip()

    @classmethod
    def load(cls, folder: str | Path, length: int = 77) -> "Tokenizer":
        """Read `vocab.json` and `merges.txt`, or the `tokenizer.json` that transformers 5 writes.

        Raises FileNotFoundError when there is none, and ValueError for another kind of tokenizer.
        """
        try:
            if Path(folder, "vocab.json").is_file():
                vocab = read_json(Path(folder, "vocab.json"), LARGEST_FILE)
                lines = read_text(Path(folder, "merges.txt"), LARGEST_FILE).split("\n")
                merges = [line for line in lines if line and not line.startswith("#version")]
            else:
                content = read_json(Path(folder, "tokenizer.json"), LARGEST_FILE)
                added = {token["content"]: token["id"] for token in content["added_tokens"]}
                vocab, merges = content["model"]["vocab"] | added, content["model"]["merges"]
            pairs = [tuple(pair.split() if isinstance(pair, str) else pair) for pair in merges]
            return cls(vocab, pairs, length)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder}: no CLIP tokenizer ({error})") from None


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
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (  # each (..., heads, T, width / heads)
            project(x).unflatten(-1, (self.heads, -1)).transpose(-3, -2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(x.transpose(-3, -2).flatten(-2))  # (..., T, width)


class Layer(nn.Module):
    """Attention, then two linear layers on every token by itself, each added to what it reads through a norm."""

    def __init__(self, width: int, heads: int, mlp_width: int, causal: bool):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(width)
        self.self_attn = Attention(width, heads, causal)
        self.layer_norm2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, mlp_width), "fc2": nn.Linear(mlp_width, width)})

    def forward(self, x: Tensor) -> Tensor:  # (..., T, width), as is what it returns
        x = x + self.self_attn(self.layer_norm1(x))
        h = self.mlp.fc1(self.layer_norm2(x))
        return x + self.mlp.fc2(h * torch.sigmoid(1.702 * h))  # CLIP was trained with this "quick" GELU


def transformer(width: int, heads: int, layers: int, mlp_width: int, causal: bool) -> nn.ModuleDict:
    """A stack of layers, under the checkpoint's name `layers`: causal for text, not so for pictures."""
    stack = nn.Sequential(*(Layer(width, heads, mlp_width, causal) for _ in range(layers)))
    return nn.ModuleDict({"layers": stack})


def embedding(rows: int, width: int) -> nn.Embedding:
    """`nn.Embedding`, except that nothing is drawn on the meta device.

    A normal distribution there is written in Python, and importing it brings in PyTorch's compiler: seconds.
    """
    weight = torch.empty(rows, width)
    meta = weight.is_meta
    return nn.Embedding.from_pretrained(weight, freeze=False) if meta else nn.Embedding(rows, width)


class TextEncoder(nn.Module):
    """Tokens (T,) int64 -> context (T, width); a batch of them (B, T) -> (B, T, width).

    The context is the last hidden state after the final layer norm: one vector per token.
    """

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        token_embedding = embedding(config.vocab_size, config.width)
        position_embedding = embedding(config.length, config.width)
        # The spreads that CLIP starts from: PyTorch's own, 1, would drown what the layers add.
        for module, std in ((token_embedding, 0.02), (position_embedding, 0.01)):
            if not module.weight.is_meta:
                nn.init.normal_(module.weight, std=std)
        embeddings = {"token_embedding": token_embedding, "position_embedding": position_embedding}
        sizes = config.width, config.heads, config.layers, config.mlp_width
        parts = {
            "embeddings": nn.ModuleDict(embeddings),
            "encoder": transformer(*sizes, causal=True),
            "final_layer_norm": nn.LayerNorm(config.width),
        }
        self.text_model = nn.ModuleDict(parts)

    def forward(self, tokens: Tensor) -> Tensor:
        model = self.text_model
        x = model.embeddings.token_embedding(tokens)  # (..., T, width)
        x = x + model.embeddings.position_embedding.weight[: tokens.shape[-1]]
        return model.final_layer_norm(model.encoder.layers(x))
