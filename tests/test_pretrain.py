"""How the demo base model is taught: its pool of puppets, what it learns from, and the whole recipe, tiny."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from beyond.body import body_parts
from checkpoint import load_model
from demo import pool as pools
from demo import pretrain
from demo.puppet import caption, random_puppet
from posecrafter import ALPHAS_CUMPROD, edit_latents
from poses.parts import face_and_hands
from poses.pose import draw_pose

HEIGHT, WIDTH = 96, 128
CLIPS, FRAMES = 24, pretrain.FRAMES
SEEDS = (16_000, 16_001)


@pytest.fixture(scope="module")
def pool() -> np.ndarray:
    """Two puppets, not in disguise."""
    rows = [pools.render_identity(seed, HEIGHT, WIDTH, 0.0) for seed in SEEDS]
    return np.array(rows, pools.row_type(HEIGHT, WIDTH))


@pytest.fixture
def batch_of(monkeypatch, pool):
    """A training batch of CLIPS clips, where these latents (2, POSES + 1, C, h, w) stand for the pool's frames."""
    monkeypatch.setattr(pretrain, "CLIPS", CLIPS)

    def batch(latents: np.ndarray, progress: float = 1.0) -> dict:
        known = {pool["frames"][at].tobytes(): latents[at] for at in np.ndindex(latents.shape[:2])}

        def encode(vae, frames: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.stack([known[frame.tobytes()] for frame in frames]))

        monkeypatch.setattr(pretrain, "encode", encode)
        return pretrain.training_batch(np.random.default_rng(1), pool, None, progress)

    return batch


def random_latents() -> np.ndarray:
    shape = (len(SEEDS), pools.POSES + 1, 4, HEIGHT // 4, WIDTH // 4)
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def test_a_twin_differs_in_what_its_words_say(pool):
    for seed, (words, told) in zip(SEEDS, pool["captions"]):
        assert words == caption(random_puppet(seed)) and f", {told}" in words
        twin, mine = pools.twin_of(random_puppet(seed), np.random.default_rng(seed))
        assert set(words.split(", ")) - set(caption(twin).split(", ")) == {mine}
    first, twin = pool["frames"][:, 0].astype(int), pool["frames"][:, pools.TWIN].astype(int)
    changed = (first != twin).any(-1).mean((1, 2))
    assert (changed > 0).all() and (changed < 0.25).all()
    assert np.array_equal(pool["masks"][:, 0], pool["masks"][:, pools.TWIN])


def test_frames_cut_off_legs_and_no_heads():
    bodies = np.stack([pools.render_identity(16_000 + i, 96, 128)[2] for i in range(6)])
    assert (bodies[:, :, 0, 1] > 0).all() and (bodies[:, :, 0, 1] < 0.7).all()  # noses
    assert (bodies[:, :, (10, 13), 1] > 1).all()  # ankles


def test_in_disguise_no_colour_is_told(pool):
    frames, *_, captions = pools.render_identity(SEEDS[0], HEIGHT, WIDTH, disguised=1.0)
    assert captions == ("a person", "")
    assert frames.shape == pool["frames"].shape[1:]
    assert (frames != pool["frames"][0]).mean() > 0.5


def test_misplaced_poses_are_off_by_as_much_as_is_said(pool):
    rng = np.random.default_rng(0)
    true = pool["poses"][0, :4].copy()
    true[..., :2] = 0.25 + true[..., :2] / 2  # all inside the picture
    clips = [pools.as_found(rng, true, 128, 128) for _ in range(200)]
    off = np.array([[pools.stacked(pose) for pose in clip] for clip in clips]) - true
    off = off[..., :2] * 128
    assert abs(off.mean()) < 0.03
    for part, within in ((np.s_[:18], 1.6), (np.s_[18:88], 1.1), (np.s_[88:], 0.6)):
        assert off[:, :, part].std() == pytest.approx(1.5 / 3**0.5 * within, rel=0.1)
    each = off.std(axis=(1, 2, 3))
    assert each.min() < 0.2 < 1.2 < each.max()


def test_what_is_outside_the_picture_is_not_found(pool):
    true = pool["poses"][0, :2]  # from the knees up
    outside = (true[..., :2] >= 1).any(-1) | (true[..., :2] < 0).any(-1)
    assert 0 < outside[0].sum() < 130
    found = pools.as_found(np.random.default_rng(0), true, HEIGHT, WIDTH)
    found = np.array([pools.stacked(pose) for pose in found])
    assert (found[outside] == 0).all() and np.array_equal(found[~outside][:, 2], true[~outside][:, 2])


def test_control_images_show_the_poses_of_their_frames(monkeypatch, pool, batch_of):
    monkeypatch.setattr(pools, "FOUND_WITHIN", 0)
    which = np.arange(2 * (pools.POSES + 1), dtype=np.float32).reshape(2, -1, 1, 1, 1)
    batch = batch_of(np.broadcast_to(which, (*which.shape[:2], 4, HEIGHT // 4, WIDTH // 4)))
    a = ALPHAS_CUMPROD[batch["timestep"]].repeat_interleave(FRAMES)[:, None, None, None]
    shown = (batch["latents"] - (1 - a).sqrt() * batch["noise"]) / a.sqrt()
    for index, hint in zip(shown.mean((1, 2, 3)).round().int().tolist(), batch["hints"]):
        keypoints = pool["poses"].reshape(-1, 130, 3)[index].copy()
        keypoints[((keypoints[:, :2] < 0) | (keypoints[:, :2] >= 1)).any(-1)] = 0
        drawn = (255 * hint).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(draw_pose(pools.pose_from(keypoints), HEIGHT, WIDTH), drawn)


def test_most_clips_share_what_is_left_of_the_noise_at_the_last_timestep(batch_of):
    """Whichever frames a clip is made of: noise + ratio * image is then the same in all of them."""
    latents = random_latents()
    noise = batch_of(latents)["noise"].unflatten(0, (CLIPS, FRAMES))
    ratio = (ALPHAS_CUMPROD[-1] / (1 - ALPHAS_CUMPROD[-1])).sqrt()
    shared = 0
    for clip in noise:
        for identity in torch.from_numpy(latents[:, : pools.POSES]):
            starts = clip[:, None] + ratio * identity  # (FRAMES, POSES, 4, h, w): one of each is true
            same = (starts[0][:, None] - starts[1][None]).abs() < 1e-4
            # all but what has been moved
            shared += bool((same.float().mean((2, 3, 4)) > 0.4).any())
    assert CLIPS / 3 < shared < CLIPS


def test_some_clips_start_from_what_latent_editing_makes(monkeypatch, batch_of):
    edits = []

    def recorded(starts, reference, poses, reference_pose, parts):
        edit_latents(starts, reference, poses, reference_pose, parts)
        edits.append((parts, reference.clone(), starts.clone()))

    monkeypatch.setattr(pretrain, "edit_latents", recorded)
    noise = batch_of(0 * random_latents())["noise"]  # noise is all there is
    assert {parts for parts, _, _ in edits} == {face_and_hands, body_parts}
    for _, reference, moved in edits:
        clip = next(clip for clip in noise.split(FRAMES) if torch.equal(clip[0], reference))
        assert torch.equal(clip[1:], moved) and not torch.equal(moved[0], reference)


def test_what_noise_of_a_twin_does_not_say_the_prompt_does(pool, batch_of):
    """The twins' latents are ones, and all else is zero, so their share is in the mean of the noise."""
    latents = 0 * random_latents()
    latents[:, pools.TWIN] = 1000
    batch = batch_of(latents)
    of_twin = batch["noise"][::FRAMES].mean((1, 2, 3)) > 1
    assert CLIPS / 10 < of_twin.sum() < CLIPS / 2
    told = set(pool["captions"][:, 1])
    for twin, prompt in zip(of_twin, batch["prompts"]):
        assert not twin or told & set(prompt.split(", "))
    assert any(not told & set(prompt.split(", ")) for prompt in batch["prompts"])


def test_at_first_frame_0_is_less_noisy_and_does_not_count(batch_of):
    for progress, some in ((0.0, True), (0.3, False)):
        batch = batch_of(0 * random_latents(), progress)
        noisiness = (batch["latents"] / batch["noise"]).nanmedian(-1)[0].nanmedian(-1)[0].median(-1)[0]
        first, other, *_ = noisiness.unflatten(0, (CLIPS, FRAMES)).unbind(1)
        early = (first - other).abs() > 1e-5
        assert early.any() == some and (first <= other + 1e-5).all()
        weight = batch["weight"].unflatten(0, (CLIPS, FRAMES))[:, 0].amax((1, 2, 3))
        assert torch.equal(weight == 0, early)


def test_face_and_hands_weigh_most(monkeypatch, batch_of):
    monkeypatch.setattr(pretrain, "CLIPS", 1)
    batch = batch_of(0 * random_latents())
    weights = np.unique(batch["weight"])
    assert weights / weights[0] == pytest.approx([1, 5, 12, 15, 40])
    # Where they are: the heaviest latent pixels are those of white face points and blue hand points.
    for weight, hint in zip(batch["weight"][:, 0], batch["hints"]):
        heavy = (weight > 11 * weight.min()).numpy()
        drawn = torch.nn.functional.max_pool2d((hint.amin(0) > 0.9).float()[None], 4)[0].numpy() > 0
        assert drawn.any() and heavy[drawn].mean() > 0.8 and heavy.mean() < 0.3


def test_a_prompt_tells_what_it_must_and_forgets_at_times():
    rng = np.random.default_rng(0)
    words = "a person, red hair, blue shirt, green skirt"
    free = [pretrain.prompt_from(rng, words) for _ in range(300)]
    assert 20 < free.count("") < 80 and "a person" in free
    assert all("blue shirt" in pretrain.prompt_from(rng, words, "blue shirt") for _ in range(50))


def train_a_layer(name: str, work: Path, stop_at: int = -1, bad: range = range(0)) -> torch.Tensor:
    """Its weight after 150 steps of `optimise`; interrupted at `stop_at`, with gradients that are no numbers at
    the steps in `bad`."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 1)

    def loss_at(step: int) -> torch.Tensor:
        if step == stop_at:
            raise KeyboardInterrupt
        batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        loss = (layer(batch) - batch.sum(1, keepdim=True)).square().mean()
        return loss * float("nan") if step in bad else loss

    pretrain.optimise(name, layer, loss_at, 150, 0.1, work)
    return layer.weight.detach()


def test_interrupted_training_goes_on_as_if_it_had_not_stopped(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train_a_layer("again", tmp_path, stop_at=130)
    again, straight = train_a_layer("again", tmp_path), train_a_layer("straight", tmp_path)
    assert torch.equal(again, straight)
    header, *rows = (tmp_path / "again.csv").read_text().split()
    assert header == "step,loss" and [row.split(",")[0] for row in rows] == ["100", "150"]
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "straight.csv").read_bytes()


def test_a_gradient_that_is_not_a_number_is_skipped_and_many_are_an_error(tmp_path):
    good, mended = train_a_layer("good", tmp_path), train_a_layer("mended", tmp_path, bad=range(50, 51))
    assert 0 < (mended - good).abs().max() < 0.05
    losses = [row.split(",")[1] for row in (tmp_path / "mended.csv").read_text().split()[1:]]
    assert len(losses) == 2 and all(float(loss) < 10 for loss in losses)
    with pytest.raises(ArithmeticError, match="spoilt: no gradient of the steps up to 100 is finite"):
        train_a_layer("spoilt", tmp_path, bad=range(150))


def test_the_recipe_makes_a_model_from_nothing(monkeypatch, tmp_path):
    """All of it with a few puppets and steps, and once more, when everything is there already."""
    small = {
        "HEIGHT": 64,
        "WIDTH": 64,
        "IDENTITIES": pretrain.IDENTITIES[:2],
        "UNET": replace(pretrain.UNET, widths=(8, 8, 8, 8)),
        "HINT_WIDTHS": (4, 4, 4),
        "VAE_CONFIG": replace(pretrain.VAE_CONFIG, widths=(6, 6, 6), norm_groups=3),
        "VAE_STEPS": 1,
        "STEPS": 1,
    }
    for name, value in small.items():
        monkeypatch.setattr(pretrain, name, value)
    work, out = tmp_path / "work", tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["pretrain.py", "--work", str(work), "--out", str(out)])
    pretrain.main()
    model, last = load_model(str(out)), work / "networks.pt"
    assert model.unet.config.in_channels == model.vae.config.latent_channels == 8
    frames = np.load(work / "pool.npy", mmap_mode="r")["frames"]
    assert pretrain.encode(model.vae, frames[:, 0]).std() == pytest.approx(1, rel=0.02)
    written = last.stat().st_mtime
    first = (out / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    pretrain.main()
    assert last.stat().st_mtime == written
    assert (out / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == first
