"""The method in pictures: all are drawn, and the page beside them speaks of what exists."""

import re
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from checkpoint import load_model
from demo import walkthrough
from demo.scene import PROMPT, Scene, Trial, set_scene
from posecrafter import alpha_cumprod, edit_latents, embed_hints, encode_frames, encode_prompt, invert

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "METHOD.md").read_text()
SHOWN = re.findall(r"!\[[^]]+\]\(pictures/([^)]+)\)", PAGE)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("walkthrough")
    sizes = "--width 64 --target-frames 2 --training-steps 1 --ddim-steps 2".split()
    folders = ["--work", str(folder / "work"), "--out", str(folder)]
    walkthrough.main(walkthrough.parse_arguments([*sizes, *folders]))
    return folder


def test_the_page_shows_every_picture_once_and_no_other():
    assert sorted(SHOWN) == sorted(walkthrough.PICTURES)


@pytest.mark.parametrize("name", SHOWN)
def test_a_picture_is_drawn_and_shows_something(pictures, name):
    pixels = np.asarray(Image.open(pictures / name).convert("RGB"))
    assert pixels.shape[1] > 300
    assert pixels.std() > 10


@pytest.mark.parametrize("name", SHOWN)
def test_a_shipped_picture_is_small_enough_for_a_page(name):
    file = ROOT / "docs" / "pictures" / name
    assert file.stat().st_size < 250e3
    assert Image.open(file).width < 1100


def test_the_page_names_only_what_exists():
    """`name` is posecrafter's, `module.name` a module's; paths have a slash or an ending, commands a space."""
    for name in re.findall(r"`([^`]+)`", PAGE):
        words = name.split()
        for path in [word for word in words if "/" in word or word.endswith(".py")]:
            assert (ROOT / path).exists(), name
        if len(words) == 1 and "/" not in name and not name.endswith(".py"):
            module, _, attribute = name.rpartition(".")
            assert hasattr(import_module(module or "posecrafter"), attribute), name


def test_the_page_names_the_steps_of_the_method_in_their_order():
    steps = (
        "trainable_parameters",
        "select_reference",
        "invert",
        "insert_reference",
        "edit_latents",
        "sample",
    )
    places = [PAGE.index(f"`{step}`") for step in steps]
    assert places == sorted(places)
    assert len(PAGE.split()) < 1500


@pytest.fixture(scope="module")
def model():
    return load_model("demo")


@pytest.fixture(scope="module")
def scene() -> Scene:
    return walkthrough.from_the_knees_up(set_scene(Trial(14, size=64, target_frames=2, target_every=6)))


@pytest.fixture(scope="module")
def way(model, scene) -> walkthrough.Walk:
    return walkthrough.walk({walkthrough.AFTER: model}, scene, 2)


def test_the_latents_kept_are_those_of_the_method(model, scene, way):
    hint = embed_hints(model, way.poses[:1], *scene.frames.shape[1:3])
    image = encode_frames(model, scene.frames[way.reference][None])
    trajectory = invert(model, image, hint, encode_prompt(model, PROMPT), 2)
    assert all(torch.equal(a, b) for a, b in zip(way.trajectory, trajectory, strict=True))
    edited = trajectory[-1].repeat(3, 1, 1, 1)
    edit_latents(edited[1:], edited[0].clone(), way.poses[1:], way.poses[0])
    assert torch.equal(way.latents[0], edited)


def test_the_last_step_takes_the_image_that_it_predicts(way):
    """Its noise level is not quite 0, so what is left of the noise is small."""
    predicted = walkthrough.images_expected(way, 2)
    a, left = alpha_cumprod(0), way.latents[-1]
    noise = walkthrough.noise_seen(way, 2)
    assert torch.allclose(a**0.5 * predicted + (1 - a) ** 0.5 * noise, left, atol=1e-4)


@torch.inference_mode()
def test_the_weights_drawn_are_those_that_the_layer_uses(model, way):
    attention = walkthrough.decoder_block(model, 0).attn1
    tokens = walkthrough.attention_tokens(way, 0)
    assert tokens.shape[:2] == (3, way.latents[0][0, 0].numel())
    keys_values = attention.keys_values(tokens[:1])
    weights = walkthrough.attention_weights(attention, tokens[2, 5], tokens[0])
    looked_up = torch.from_numpy(weights)[:, None] @ keys_values[1][0]  # (heads, 1, d)
    expected = attention(tokens[2:3, 5:6], keys_values)[0, 0]
    assert torch.allclose(attention.to_out[0](looked_up.flatten()), expected, atol=1e-4)
