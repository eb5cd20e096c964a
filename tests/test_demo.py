"""The shipped demo model: whole, small enough, readable by others, and able to do its work."""

import numpy as np
import pytest
import torch

import sample
import train
from checkpoint import load_model
from command import sampling_arguments, training_arguments
from demo.dance import dance, make_anew
from demo.puppet import clip
from metrics.figures import psnr
from posecrafter import decode_latents, embed_hints, encode_frames, encode_prompt, invert
from poses.pose import save_poses
from public.places import DEMO
from video import save_image


@pytest.fixture(scope="module")
def model():
    return load_model("demo")


def test_the_demo_weights_are_small_enough_to_ship():
    assert sum(file.stat().st_size for file in DEMO.rglob("*")) < 40e6


def test_diffusers_reads_the_demo_unet_and_agrees_on_a_frame(model):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.UNet2DConditionModel.from_pretrained(DEMO / "unet").float()
    latents = torch.randn(1, 8, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        context = encode_prompt(model, "a person, red hair")
        ours = model.unet(latents, 501, context)
        assert (ours - theirs(latents, 501, context[None]).sample).abs().max() < 1e-4


def test_the_vae_gives_a_puppet_back(model):
    frames, _, person = clip(identity_seed=5, motion_seed=5, frames=1)
    decoded = np.stack(list(decode_latents(model, encode_frames(model, frames))))
    assert psnr(decoded, frames) > 22
    assert psnr(decoded, frames, person) > 19


def test_an_inverted_puppet_is_noise_that_remembers_it(model):
    """What the method starts from: calmer than fresh noise, which the last rounds of pretraining have learned to
    start from, and not independent of the frame."""
    frames, poses, _ = clip(identity_seed=5, motion_seed=5, frames=1)
    latents = encode_frames(model, frames)
    noise = invert(model, latents, embed_hints(model, poses, 128, 128), encode_prompt(model, ""), 20)[-1]
    assert 0.4 < noise.std() < 1.3
    assert abs(noise.mean()) < 0.3
    assert abs(np.corrcoef(noise.flatten(), latents.flatten())[0, 1]) > 0.02


def test_the_demo_deletes_no_folder_but_its_own(tmp_path):
    (tmp_path / "truth.mp4").touch()
    with pytest.raises(ValueError, match="not a dance"):
        dance(0, tmp_path, [])
    assert (tmp_path / "truth.mp4").exists()
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    for _ in range(2):  # what it made it replaces, though it was stopped early
        make_anew(tmp_path / "demo", frames, frames)
    with pytest.raises(SystemExit):
        dance(0, tmp_path / "demo", ["--guidanse", "3"])
    assert (tmp_path / "demo" / "clip").exists()


@pytest.mark.slow
def test_a_new_puppet_dances_better_than_a_copied_frame_would(tmp_path):
    """The command lines on the real thing, cut short: 10 training and 10 sampling steps."""
    frames, poses, _ = clip(identity_seed=3, motion_seed=6, frames=8)
    truth, targets, person = clip(identity_seed=3, motion_seed=7, frames=48)
    truth, targets, person = truth[::12], targets[::12], person[::12]
    (tmp_path / "clip").mkdir()
    for i, frame in enumerate(frames):
        save_image(tmp_path / "clip" / f"{i}.png", frame)
    save_poses(tmp_path / "clip.json", poses, 128, 128)
    save_poses(tmp_path / "dance.json", targets, 128, 128)

    command = [tmp_path / "clip", "--poses", tmp_path / "clip.json", "--model", "demo"]
    command += ["--steps", 10, "--size", 128, "--run", tmp_path / "run"]
    train.main(training_arguments(list(map(str, command))))
    command = ["--poses", tmp_path / "dance.json", "--run", tmp_path / "run", "--ddim-steps", 10]
    result = sample.main(sampling_arguments(list(map(str, command))))

    copies = [np.repeat(frame[None], len(truth), axis=0) for frame in frames]
    assert psnr(result, truth) > max(psnr(copy, truth) for copy in copies) + 1
    assert psnr(result, truth, person) > max(psnr(copy, truth, person) for copy in copies) + 1
