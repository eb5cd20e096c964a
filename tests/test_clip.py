"""The text encoder, the tokenizer and the image encoder, held against the public implementations."""

import gzip
import random
import subprocess
import sys
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from weights import fill

from clip import BYTE_SYMBOLS, END, START, WORD_END, TextConfig, TextEncoder, Tokenizer
from demo.save import write_tokenizer
from demo.vocabulary import learn_merges
from metrics.clip_images import ImageConfig, ImageEncoder, prepare_images
from metrics.figures import clip_embeddings, clip_i, clip_t

SHARED = Path(__file__).parents[2] / "shared"
SMALL = TextConfig(vocab_size=600, width=32, heads=4, layers=3, mlp_width=80, length=20)
CAPTIONS = ["a puppet in a red shirt waving", "a tall puppet in a blue shirt jumping", "the puppet's hat"]
PROMPTS = [
    "",
    " ",
    "a person is dancing",
    "A Person, RED hair!!",
    "a\tb\r\nc\vd\fe\x1cf\x85g\u2028h\u3000i\u200bj\u180ek",
    "it's they're I've I'm we'll he'd 's'S'RE''s don'tstop rock'n'roll l'été ’s",
    "1234 3.14 ½ ² Ⅷ ٣ 一二三",
    "Ünïcödé cafe\u0301 caf\u00e9 ﬁ ﬀ Å \u212b A\u030a e\u0323\u0302 e\u0302\u0323",
    "İstanbul ıI ΑΣ ΟΔΥΣΣΕΥΣ ẞß Ǆ \u212a",
    "👩‍🚀👨‍👩‍👧‍👦 🇫🇷 👍🏽 ❤️ ☃",
    "日本語の文章 한국어 中文，标点。",
    "ภาษาไทยน้ำ हिन्दी क्षि العربية مَرْحَبًا עִבְרִית",
    "\x00\x01\x7f\x9f\ufeff\ufffd\ufffe\U0010ffff",
    f"a{START}b{END} c <|startoftext |> </w> <|",
    f"!{START.upper()}!{END.upper()}|>",
    f"{END}\u0338 e{START}\u0301",
    "_under-score_ a_b C++ #1 @x",
]


@pytest.fixture(scope="session")
def demo_tokenizer():
    return Tokenizer(*learn_merges(CAPTIONS, 25), length=20)


@pytest.fixture(scope="session")
def clip_tokenizer():
    """CLIP's own tokenizer, its vocabulary spelled out from OpenAI's published list of merges."""
    path = SHARED / "tokenizer" / "bpe_simple_vocab_16e6.txt.gz"
    if not path.exists():
        pytest.skip(f"CLIP's vocabulary is not at {path}")
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    symbols = list(BYTE_SYMBOLS.values())
    tokens = [*symbols, *(s + WORD_END for s in symbols), *map("".join, merges), START, END]
    return Tokenizer({token: index for index, token in enumerate(tokens)}, merges)


@pytest.fixture(params=["clip_tokenizer", "demo_tokenizer"])
def tokenizers(request, tmp_path):
    """One of our tokenizers, and transformers' own made from the two files that ours has saved."""
    transformers = pytest.importorskip("transformers")
    ours = request.getfixturevalue(request.param)
    write_tokenizer(ours, tmp_path)
    return ours, transformers.CLIPTokenizer.from_pretrained(tmp_path)


def same_encoding(ours, theirs, texts):
    expected = theirs(texts, add_special_tokens=False).input_ids
    differing = [text for text, ids in zip(texts, expected) if ours.encode(text) != ids]
    assert not differing, f"{len(differing)} of {len(texts)} differ, such as {differing[:5]!a}"


# ---------------------------------------------------------------- text encoder


def small_encoder() -> TextEncoder:
    encoder = TextEncoder(SMALL)
    shapes = {name: value.shape for name, value in encoder.state_dict().items()}
    encoder.load_state_dict(fill(shapes))
    return encoder


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(SMALL.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def test_the_text_encoder_computes_what_transformers_computes():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=SMALL.vocab_size, hidden_size=SMALL.width, num_attention_heads=SMALL.heads,
        num_hidden_layers=SMALL.layers, intermediate_size=SMALL.mlp_width,
        max_position_embeddings=SMALL.length, bos_token_id=598, eos_token_id=599,
    )).eval()  # fmt: skip
    ours = small_encoder()
    tensors = ours.state_dict().items()
    theirs.load_state_dict({name.removeprefix("text_model."): value for name, value in tensors})
    for tokens in random_tokens(2, 20), random_tokens(1, 7):
        with torch.no_grad():
            expected = theirs(tokens).last_hidden_state
            torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=1e-4)


def test_one_prompt_is_encoded_as_in_a_batch():
    encoder, tokens = small_encoder(), random_tokens(3, 20)
    assert encoder(tokens[0]).shape == (20, 32)
    torch.testing.assert_close(torch.stack([encoder(prompt) for prompt in tokens]), encoder(tokens))


def test_a_token_does_not_see_those_after_it():
    encoder, tokens = small_encoder(), random_tokens(20)
    torch.testing.assert_close(encoder(tokens)[:9], encoder(tokens[:9]))


def test_names_and_shapes_are_the_public_checkpoints():
    manifest = SHARED / "checkpoints" / "text_encoder.tsv"
    if not manifest.exists():
        pytest.skip(f"no list of the public checkpoint's tensors at {manifest}")
    expected = dict(line.split("\t") for line in manifest.read_text().splitlines())
    del expected["text_model.embeddings.position_ids"]  # a buffer that only older files carry
    with torch.device("meta"):
        encoder = TextEncoder(TextConfig())
    tensors = encoder.state_dict().items()
    assert {name: "x".join(map(str, tensor.shape)) for name, tensor in tensors} == expected


def test_the_full_size_has_the_papers_number_of_parameters():
    with torch.device("meta"):
        encoder = TextEncoder(TextConfig())
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 123_060_480


def test_without_weights_the_text_encoder_is_there_without_pytorch_s_compiler():
    """Importing that takes seconds, which every command would pay as it starts."""
    code = "import sys, torch, clip; torch.set_default_device('meta')\n"
    code += "clip.TextEncoder(clip.TextConfig()); sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)


# ---------------------------------------------------------------- tokenizer


def test_hand_picked_prompts_are_tokenized_as_by_transformers(tokenizers):
    same_encoding(*tokenizers, PROMPTS)


def characters(*ranges: tuple[int, int]) -> list[str]:
    """The characters of some ranges of code points, without unassigned ones and surrogates."""
    chars = (chr(code) for first, last in ranges for code in range(first, last + 1))
    return [char for char in chars if unicodedata.category(char) not in ("Cn", "Cs")]


EVERYTHING = (0, sys.maxunicode)
ALPHABETS = {
    "ascii": characters((0x20, 0x7E)),
    "spaces and controls": characters((0, 0x20), (0x7F, 0xA0), (0x2000, 0x200F), (0x2028, 0x202F)),
    "accents": characters((0x41, 0x5A), (0xC0, 0x24F), (0x1E00, 0x1EFF)),
    "greek and cyrillic": characters((0x370, 0x52F), (0x1F00, 0x1FFF)),
    "combining marks": characters((0x300, 0x36F), (0x61, 0x7A), (0x1DC4, 0x1DCF)),
    "emoji": characters((0x1F300, 0x1F64F), (0x1F1E6, 0x1F1FF)) + ["\u200d", "\ufe0f", "❤"] * 99,
    "chinese": characters((0x3000, 0x303F), (0x4E00, 0x9FFF), (0xFF00, 0xFFEF)),
    "japanese": characters((0x3000, 0x30FF), (0x4E00, 0x4FFF)),
    "korean": characters((0x1100, 0x11FF), (0xAC00, 0xD7A3)),
    "thai": characters((0xE00, 0xE7F)),
    # Without U+09FE, U+0C3C, U+0D3B and U+0D3C: marks whose order transformers' Unicode 9 leaves.
    "indic": characters((0x900, 0x9FD), (0xA00, 0xC3B), (0xC3D, 0xD3A), (0xD3D, 0xD7F)),
    "arabic and hebrew": characters((0x590, 0x6FF)),
    "symbols and digits": characters((0x2070, 0x218F), (0x2460, 0x24FF), (0x30, 0x39)),
    "special tokens": [START, END, START.upper(), "<|", "|>", "startoftext", "a", " ", "\u0338"],
    "contractions": [*"'’'sStdDm", "re", "VE", "ll", " ", "é", "5", "!"],
    "prompts": [
        word + mark
        for word in ("person", "Puppet", "HDR", "8k", "trending on ArtStation", "Élodie", "straße")
        for mark in (" ", ", ", " - ", "; ", " (", ") ", "'s ", "!!! ", ": 1.", "\n")
    ],
    "everything": characters(EVERYTHING),
}


def test_every_single_character_is_tokenized_as_by_transformers(tokenizers):
    # Of scripts with thousands of like letters and of private use, every 16th character will do.
    chars = [
        char
        for char in characters(EVERYTHING)
        if ord(char) < 0x3400 or ord(char) % 16 == 0 or unicodedata.category(char) not in ("Lo", "Co")
    ]
    # After a letter and before a mark, each kind of character cuts another way.
    same_encoding(*tokenizers, [f"a{char}!" for char in chars])


def test_random_texts_are_tokenized_as_by_transformers(tokenizers):
    rng = random.Random(0)
    mixture = [char for alphabet in ALPHABETS.values() for char in rng.choices(alphabet, k=500)]
    texts = [
        "".join(rng.choices(alphabet, k=rng.randint(1, 24)))
        for alphabet in [*ALPHABETS.values(), mixture]
        for _ in range(1500)
    ]
    same_encoding(*tokenizers, texts)


def test_a_prompt_is_padded_and_cut_as_by_transformers(tokenizers):
    ours, theirs = tokenizers
    prompts = PROMPTS + ["a very long prompt, " * 30]
    expected = theirs(prompts, padding="max_length", max_length=ours.length, truncation=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert [ours(prompt).tolist() for prompt in prompts] == expected.input_ids


def test_an_empty_prompt_is_a_start_and_end_tokens(demo_tokenizer):
    start, end = demo_tokenizer.vocab[START], demo_tokenizer.vocab[END]
    tokens = demo_tokenizer("")
    assert tokens.dtype == torch.int64 and tokens.tolist() == [start] + [end] * 19


def test_a_too_long_prompt_warns_and_names_the_dropped_words(demo_tokenizer):
    prompt = "a puppet " * 10
    with pytest.warns(UserWarning, match="2 tokens too long, dropped: a puppet$"):
        tokens = demo_tokenizer(prompt)
    assert tokens.tolist() == demo_tokenizer("a puppet " * 9).tolist()


def test_a_prompt_that_just_fits_does_not_warn(demo_tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens = demo_tokenizer("a puppet " * 9)
    assert len(tokens) == demo_tokenizer.length


def test_decoding_gives_the_words_back(demo_tokenizer):
    ids = demo_tokenizer.encode("A  Café, 日本 👍🏽")
    assert demo_tokenizer.decode(ids) == "a café , 日本 👍🏽"


def test_a_vocabulary_that_lacks_a_token_is_refused():
    vocab, merges = learn_merges(CAPTIONS, 10)
    del vocab["".join(merges[3])]
    with pytest.raises(ValueError, match="lacks 1 of the"):
        Tokenizer(vocab, merges)


# ---------------------------------------------------------------- demo vocabulary


def test_the_demo_vocabulary_is_ordered_as_clips_is():
    vocab, merges = learn_merges(CAPTIONS, 25)
    assert list(vocab.values()) == list(range(512 + 25 + 2))
    assert list(vocab)[:2] == ["!", '"'] and list(vocab)[256] == "!</w>"
    assert list(vocab)[512:] == [*map("".join, merges), START, END]


def test_the_demo_vocabulary_makes_a_token_of_each_word_of_its_captions():
    tokenizer = Tokenizer(*learn_merges(CAPTIONS, 1000))
    assert len(tokenizer.encode("the puppet's blue hat")) == 5


def test_the_demo_vocabulary_does_not_depend_on_the_order_of_the_captions():
    assert learn_merges(CAPTIONS, 25) == learn_merges(CAPTIONS[::-1], 25)


def test_saving_and_loading_gives_the_same_tokenizer(demo_tokenizer, tmp_path):
    write_tokenizer(demo_tokenizer, tmp_path)
    loaded = Tokenizer.load(tmp_path, length=20)
    assert (loaded.vocab, loaded.merges) == (demo_tokenizer.vocab, demo_tokenizer.merges)
    assert loaded("a puppet").tolist() == demo_tokenizer("a puppet").tolist()


# ---------------------------------------------------------------- image encoder

SMALL_IMAGES = ImageConfig(28, 7, width=32, heads=4, layers=3, mlp_width=80, embedding=24)


def small_image_encoder() -> ImageEncoder:
    encoder = ImageEncoder(SMALL_IMAGES)
    encoder.load_state_dict(fill({n: value.shape for n, value in encoder.state_dict().items()}))
    return encoder.eval()


def public_image_encoder(ours: ImageEncoder):
    """transformers' image tower with the same weights."""
    transformers = pytest.importorskip("transformers")
    config = ours.config
    theirs = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(
        hidden_size=config.width, intermediate_size=config.mlp_width,
        projection_dim=config.embedding, num_hidden_layers=config.layers,
        num_attention_heads=config.heads, image_size=config.size, patch_size=config.patch,
    )).eval()  # fmt: skip
    theirs.load_state_dict(ours.state_dict())
    return theirs


def public_preparation(frames: np.ndarray, size: int) -> torch.Tensor:
    """What transformers' own processor makes of frames, by way of PIL."""
    transformers = pytest.importorskip("transformers")
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    return processor(list(frames), return_tensors="pt").pixel_values


def frames_of(height: int, width: int, seed: int = 0, count: int = 3) -> np.ndarray:
    random = np.random.RandomState(seed)
    coarse = random.randint(0, 200, (count, 6, 6, 3)).repeat(height // 6 + 1, axis=1)
    coarse = coarse.repeat(width // 6 + 1, axis=2)[:, :height, :width]
    return (coarse + random.randint(0, 56, coarse.shape)).astype(np.uint8)


# larger and smaller than the encoder's 224, wide, tall and with an odd pixel to crop
@pytest.mark.parametrize("height, width", [(240, 427), (301, 256), (64, 64), (97, 50)])
def test_frames_are_prepared_as_by_transformers(height, width):
    frames = frames_of(height, width, count=2)
    torch.testing.assert_close(
        prepare_images(frames, 224), public_preparation(frames, 224), rtol=0, atol=1e-5
    )


def test_clip_i_and_clip_t_are_those_of_transformers():
    ours = small_image_encoder()
    theirs = public_image_encoder(ours)
    result, training = frames_of(60, 80, seed=1, count=5), frames_of(60, 80, seed=2)
    with torch.no_grad():
        a, b = (
            torch.nn.functional.normalize(theirs(public_preparation(frames, 28)).image_embeds)
            for frames in (result, training)
        )
    found, known = (clip_embeddings(ours, frames) for frames in (result, training))
    np.testing.assert_allclose(found, a, rtol=0, atol=1e-5)
    assert clip_i(found, known) == pytest.approx((a @ b.T).mean().item(), rel=1e-4)
    expected = torch.cosine_similarity(a[:-1], a[1:]).mean().item()
    assert clip_t(found) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parity
def test_the_full_size_image_encoder_computes_what_transformers_computes():
    ours = ImageEncoder()
    ours.load_state_dict(fill({n: value.shape for n, value in ours.state_dict().items()}))
    images = prepare_images(frames_of(240, 427, count=1), 224)
    with torch.no_grad():
        expected = public_image_encoder(ours)(images).image_embeds
        assert (ours(images) - expected).abs().max() < 1e-4 * expected.abs().max()
