"""How the demo base model is taught: its pool of puppets, what it learns from, and the whole recipe, tiny."""

from collections import Counter
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

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
def pool() -> dict:
    """Two puppets, not in disguise."""
    rows, captions = zip(*(pools.render_identity(seed, HEIGHT, WIDTH, 0.0) for seed in SEEDS))
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]} | {"captions": captions}


def random_latents(pool: dict, channels: int = 4) -> np.ndarray:
    shape = (*pool["frames"].shape[:2], channels, HEIGHT // 4, WIDTH // 4)
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def test_a_twin_differs_in_what_its_words_say(pool):
    for seed, (words, told, twins) in zip(SEEDS, pool["captions"]):
        assert words == caption(random_puppet(seed))
        twin, mine, other = pools.twin_of(random_puppet(seed), np.random.default_rng(seed))
        assert mine != other and caption(twin) == words.replace(f", {mine}", f", {other}")
        assert f", {told}" in words and f", {twins}" not in words
    first, twin = pool["frames"][:, 0].astype(int), pool["frames"][:, pools.TWIN].astype(int)
    changed = (first != twin).any(-1).mean((1, 2))
    assert (changed > 0).all() and (changed < 0.25).all()
    assert np.array_equal(pool["masks"][:, 0], pool["masks"][:, pools.TWIN])


def test_frames_cut_off_legs_and_no_heads():
    bodies = np.stack([pools.render_identity(16_000 + i, 96, 128)[0]["poses"] for i in range(6)])
    assert (bodies[:, :, 0, 1] > 0).all() and (bodies[:, :, 0, 1] < 0.7).all()  # noses
    assert (bodies[:, :, (10, 13), 1] > 1).all()  # ankles


def test_in_disguise_no_colour_is_told(pool):
    row, words = pools.render_identity(SEEDS[0], HEIGHT, WIDTH, disguised=1.0)
    assert words == ["a person", "", ""]
    assert row["frames"].shape == pool["frames"].shape[1:]
    assert (row["frames"] != pool["frames"][0]).mean() > 0.5


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


def test_a_crop_shows_a_part_of_the_person_and_what_is_small_weighs_most(pool):
    for seed in range(20):
        frame, weight = pools.weighted_frame(np.random.default_rng(seed), pool, 10, 20, crop=32)
        assert frame.shape == (32, 32, 3) and weight.shape == (32, 32)
        assert weight.max() >= 3
    _, weight = pools.weighted_frame(np.random.default_rng(0), pool, 10, 20)
    assert set(np.unique(weight)) == {1, 3, 10, 20}


def test_what_is_moved_moves_alike_at_every_size():
    """A blob's middle in a coarse map and in a fine one."""
    rows, columns = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    blob = torch.exp(-((rows - 50) ** 2 + (columns - 80) ** 2) / 200)[None, None]
    coarse = torch.nn.functional.avg_pool2d(blob, 4)
    middles = []
    for image in pretrain.moved(np.random.default_rng(1), [blob, coarse]):
        image, size = image[0, 0] / image.sum(), image.shape[-1]
        places = (torch.arange(size) + 0.5) / size
        middles.append(((image.sum(1) * places).sum().item(), (image.sum(0) * places).sum().item()))
    assert middles[0] == pytest.approx(middles[1], abs=0.003)
    assert middles[0] != pytest.approx((50.5 / 128, 80.5 / 128), abs=0.03)


def test_the_vae_learns_from_latents_that_moved_as_the_image_did():
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def loss(decode, move: bool) -> float:
        vae = SimpleNamespace(
            encode=lambda images: (images, torch.full_like(images, -60.0)),  # hardly any noise
            decode=decode,
        )
        rng, weight = np.random.default_rng(2), torch.ones(1, 1, 32, 32)
        return pretrain.vae_loss(rng, vae, images, weight, move).item()

    assert loss(lambda latents: latents, move=False) < 0.01
    assert loss(lambda latents: latents, move=True) < 0.01
    assert loss(lambda latents: images, move=False) < 0.01
    assert loss(lambda latents: images, move=True) > 0.1  # what does not move along is wrong


def test_control_images_show_the_poses_of_their_frames(monkeypatch, pool):
    monkeypatch.setattr(pools, "FOUND_WITHIN", 0)
    which = np.arange(2 * (pools.POSES + 1), dtype=np.float32).reshape(2, -1, 1, 1, 1)
    latents = np.broadcast_to(which, (*which.shape[:2], 4, HEIGHT // 4, WIDTH // 4))
    batch = pretrain.training_batch(np.random.default_rng(1), pool, latents, 1, CLIPS)
    a = ALPHAS_CUMPROD[batch["timestep"]].repeat_interleave(FRAMES)[:, None, None, None]
    shown = (batch["latents"] - (1 - a).sqrt() * batch["noise"]) / a.sqrt()
    for index, hint in zip(shown.mean((1, 2, 3)).round().int().tolist(), batch["hints"]):
        keypoints = pool["poses"].reshape(-1, 130, 3)[index].copy()
        keypoints[((keypoints[:, :2] < 0) | (keypoints[:, :2] >= 1)).any(-1)] = 0
        drawn = (255 * hint).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(draw_pose(pools.pose_from(keypoints), HEIGHT, WIDTH), drawn)


def noise_of_a_batch(monkeypatch, pool: dict, latents: np.ndarray):
    """The noise of clips (CLIPS, FRAMES, 4, h, w), and what latent editing did to make some of it."""
    edits = []

    def recorded(starts, reference, poses, reference_pose, parts):
        edit_latents(starts, reference, poses, reference_pose, parts)
        edits.append((parts, reference.clone(), starts.clone()))

    monkeypatch.setattr(pretrain, "edit_latents", recorded)
    batch = pretrain.training_batch(np.random.default_rng(1), pool, latents, 0.5, CLIPS)
    return batch["noise"].unflatten(0, (CLIPS, FRAMES)), edits


def test_most_clips_share_what_is_left_of_the_noise_at_the_last_timestep(monkeypatch, pool):
    """Whichever frames a clip is made of: noise + ratio * image is then the same in all of them."""
    latents = random_latents(pool)
    noise, _ = noise_of_a_batch(monkeypatch, pool, latents)
    ratio = (ALPHAS_CUMPROD[-1] / (1 - ALPHAS_CUMPROD[-1])).sqrt()
    shared = 0
    for clip in noise:
        for identity in torch.from_numpy(latents[:, : pools.POSES]):
            starts = clip[:, None] + ratio * identity  # (FRAMES, POSES, 4, h, w): one of each is true
            same = (starts[0][:, None] - starts[1][None]).abs() < 1e-4
            # all but what has been moved
            shared += bool((same.float().mean((2, 3, 4)) > 0.4).any())
    assert CLIPS / 3 < shared < CLIPS


def test_some_clips_start_from_what_latent_editing_makes(monkeypatch, pool):
    latents = 0 * random_latents(pool)  # then noise is all there is
    noise, edits = noise_of_a_batch(monkeypatch, pool, latents)
    assert {parts for parts, _, _ in edits} == {face_and_hands, body_parts}
    for _, reference, moved in edits:
        clip = next(clip for clip in noise if torch.equal(clip[0], reference))
        assert torch.equal(clip[1:], moved) and not torch.equal(moved[0], reference)


def test_at_first_frame_0_is_less_noisy_and_does_not_count(pool):
    latents = 0 * random_latents(pool)
    for progress, some in ((0.0, True), (0.3, False)):
        batch = pretrain.training_batch(np.random.default_rng(1), pool, latents, progress, CLIPS)
        noisiness = (batch["latents"] / batch["noise"]).nanmedian(-1)[0].nanmedian(-1)[0].median(-1)[0]
        first, other, *_ = noisiness.unflatten(0, (CLIPS, FRAMES)).unbind(1)
        early = (first - other).abs() > 1e-5
        assert early.any() == some and (first <= other + 1e-5).all()
        weight = batch["weight"].unflatten(0, (CLIPS, FRAMES))[:, 0].amax((1, 2, 3))
        assert torch.equal(weight == 0, early)


def test_face_and_hands_weigh_most(pool):
    latents = 0 * random_latents(pool)
    batch = pretrain.training_batch(np.random.default_rng(1), pool, latents, 1, 1)
    weights = np.unique(batch["weight"])
    assert weights / weights[0] == pytest.approx([1, 5, 12, 15, 40])
    # Where they are: the heaviest latent pixels are those of white face points and blue hand points.
    for weight, hint in zip(batch["weight"][:, 0], batch["hints"]):
        heavy = (weight > 11 * weight.min()).numpy()
        drawn = pools.latent_pixels((hint.amin(0) > 0.9).numpy())
        assert drawn.any() and heavy[drawn].mean() > 0.8 and heavy.mean() < 0.3


def test_a_prompt_tells_what_it_must_and_forgets_at_times():
    rng = np.random.default_rng(0)
    words = "a person, red hair, blue shirt, green skirt"
    free = [pretrain.prompt_from(rng, words) for _ in range(300)]
    assert 20 < free.count("") < 80 and "a person" in free
    assert all("blue shirt" in pretrain.prompt_from(rng, words, "blue shirt") for _ in range(50))


def latents_with_twins(pool: dict, difference: float = 1.0) -> np.ndarray:
    """Random, but the twins differ from their puppets in one corner only."""
    latents = random_latents(pool, channels=8)
    latents[:, pools.TWIN] = latents[:, 0]
    latents[:, pools.TWIN, :, :2, :2] += difference
    return latents


def test_pairs_of_a_batch_of_words_differ_in_their_prompts_alone(pool):
    batch = pretrain.words_batch(np.random.default_rng(1), pool, latents_with_twins(pool), 24)
    assert batch["timestep"].min() >= 600
    for name in ("latents", "hints", "timestep"):
        assert torch.equal(batch[name][::2], batch[name][1::2])
    pairs = {(words, twins) for _, words, twins in pool["captions"]}
    same, images = [], batch["images"].unflatten(0, (24, 2))
    for mine, other, (image, others) in zip(batch["prompts"][::2], batch["prompts"][1::2], images):
        changed = set(mine.split(", ")) ^ set(other.split(", "))
        if mine:
            assert any(changed == set(pair) and pair[0] in mine for pair in pairs)
            assert not torch.equal(image, others)
        else:
            assert any(told in other for pair in pairs for told in pair)
            same.append(torch.equal(image, others))
    assert 6 < len(same) < 18 and 2 < sum(same) < len(same) - 2


def test_the_empty_prompt_means_the_image_that_the_noise_remembers(pool):
    """Or the nearer of the two: what lies between them, or beyond, is nobody's."""
    latents = latents_with_twins(pool, difference=1000)  # the twin stands out of any noise
    batch = pretrain.words_batch(np.random.default_rng(1), pool, latents, 60)
    a = ALPHAS_CUMPROD[batch["timestep"]].sqrt()
    shown, remembered = (
        images[:, :, :2, :2].mean((1, 2, 3)) / 1000
        for images in (batch["images"], batch["latents"] / a[:, None, None, None])
    )
    empty = torch.tensor([not prompt for prompt in batch["prompts"]])
    assert empty.sum() > 20
    assert (shown - remembered)[empty].abs().max() < 0.52
    assert remembered.min() < -0.3 and remembered.max() > 1.3


def test_the_loss_of_words_asks_for_the_difference_of_the_images_in_its_place(pool):
    batch = pretrain.words_batch(np.random.default_rng(1), pool, latents_with_twins(pool), 6)
    a = ALPHAS_CUMPROD[batch["timestep"]][:, None, None, None]
    right = (batch["latents"] - a.sqrt() * batch["images"]) / (1 - a).sqrt()
    assert pretrain.words_loss(batch, right) == pytest.approx(0, abs=1e-9)

    difference = right[1::2] - right[::2]
    deaf, misplaced = right.clone(), right.clone()
    deaf[1::2] = right[::2]
    misplaced[1::2] = right[::2] + difference.roll((12, 16), dims=(2, 3))
    ignored, wrong = (pretrain.words_loss(batch, each) for each in (deaf, misplaced))
    assert 0 < ignored < 0.6 * wrong


@pytest.fixture
def rollout(pool) -> tuple[pretrain.Rollout, np.ndarray]:
    """A rollout of CLIPS from inverted noise that nobody inverted, and that noise."""
    random, latents = np.random.default_rng(0), random_latents(pool)
    ways = random.standard_normal((2, pretrain.SAMPLING_STEPS + 1, *latents.shape[2:]), np.float32)
    inverted = {"ways": ways, "found": pool["poses"][:, 0]}
    return pretrain.new_rollout(random, pool, latents, inverted, CLIPS), ways


def test_a_rollout_starts_from_inverted_noise_and_is_edited_on_its_way(monkeypatch, rollout):
    rollout, ways = rollout
    clips = rollout.latents.unflatten(0, (CLIPS, FRAMES)).clone()
    assert all(torch.equal(clip, clip[:1].expand_as(clip)) for clip in clips)
    assert {float(clip[0, 0, 0, 0]) for clip in clips} == {float(way[-1, 0, 0, 0]) for way in ways}
    seen = []

    def recorded(latents, reference, poses, reference_pose, parts):
        way = next(way for way in rollout.ways if (reference.numpy() == way).all((1, 2, 3)).any())
        level = int(np.flatnonzero((reference.numpy() == way).all((1, 2, 3)))[0])
        assert level == pretrain.SAMPLING_STEPS - rollout.step + 1, "as noisy as the step's input"
        assert len(latents) == len(poses) == FRAMES - 1
        seen.append((rollout.step, parts))
        latents += 1000

    monkeypatch.setattr(pretrain, "edit_latents", recorded)
    shown = []

    def networks(latents, *_):
        shown.append(latents.clone().unflatten(0, (CLIPS, FRAMES)).mean((2, 3, 4)))
        return latents

    for step in range(1, pretrain.SAMPLING_STEPS):
        pretrain.rollout_step(rollout, networks)
        moved = (shown[-1][:, 1] - shown[-1][:, 0]) > 500
        assert all(moved[clip] for clip, edit in enumerate(rollout.edits) if edit[0] == step)
    assert Counter(seen) == Counter(edit for edit in rollout.edits if edit[0])
    assert {(1, face_and_hands), (3, body_parts)} <= set(seen)


def test_from_wherever_a_rollout_is_the_true_frames_are_asked_for(rollout):
    rollout, _ = rollout

    def knows(latents, timesteps, *_):
        a = ALPHAS_CUMPROD[timesteps[0]]
        return (latents - a.sqrt() * rollout.images) / (1 - a).sqrt()

    for _ in range(3):
        assert pretrain.rollout_step(rollout, lambda latents, *_: 0.5 * latents) > 0.01
    for _ in range(pretrain.SAMPLING_STEPS - 4):
        assert pretrain.rollout_step(rollout, knows) < 1e-6
    assert (rollout.latents - rollout.images).abs().mean() < 0.1


def test_interrupted_training_goes_on_as_if_it_had_not_stopped(monkeypatch, tmp_path):
    """With a clock of ten seconds a glance, there is a checkpoint every now and then."""

    def train(work: Path, stop_at: int = 200) -> torch.Tensor:
        work.mkdir(exist_ok=True)
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 1)

        def loss_at(step: int) -> torch.Tensor:
            if step == stop_at:
                raise KeyboardInterrupt
            batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            return (layer(batch) - batch.sum(1, keepdim=True)).square().mean()

        clock = count(1000, 10)
        monkeypatch.setattr(pretrain.time, "monotonic", lambda: next(clock))
        pretrain.optimise("layer", torch.nn.ModuleDict({"l": layer}), loss_at, 200, 0.1, 0.9, work)
        return layer.weight

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "again", stop_at=130)
    again, straight = train(tmp_path / "again"), train(tmp_path / "straight")
    assert torch.equal(again, straight)
    rows = [row.split(",") for row in (tmp_path / "again" / "layer.csv").read_text().split()[1:]]
    assert [int(row[0]) for row in rows] == [50, 100, 150, 200]
    seconds = [int(row[2]) for row in rows]
    assert seconds == sorted(seconds) and seconds[1] < seconds[2]


def test_a_gradient_that_is_not_a_number_is_skipped_and_many_are_an_error(tmp_path):
    def train(name: str, bad: range) -> torch.Tensor:
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 1)

        def loss_at(step: int) -> torch.Tensor:
            batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            loss = (layer(batch) - batch.sum(1, keepdim=True)).square().mean()
            return loss * float("nan") if step in bad else loss

        pretrain.optimise(name, torch.nn.ModuleDict({"l": layer}), loss_at, 100, 0.1, 0.9, tmp_path)
        return layer.weight.detach()

    good, mended = train("good", bad=range(0)), train("mended", bad=range(50, 51))
    assert 0 < (mended - good).abs().max() < 0.05
    losses = [row.split(",")[1] for row in (tmp_path / "mended.csv").read_text().split()[1:]]
    assert len(losses) == 2 and all(float(loss) < 10 for loss in losses)
    with pytest.raises(ArithmeticError, match="spoilt: no gradient of 50 steps up to 80 is finite"):
        train("spoilt", bad=range(30, 100))


def test_the_recipe_makes_a_model_from_nothing(monkeypatch, tmp_path):
    """All stages with a few puppets and steps, and once more, when everything is there already."""
    small = {
        "HEIGHT": 64,
        "WIDTH": 64,
        "IDENTITIES": pretrain.IDENTITIES[:4],
        "UNET": replace(pretrain.UNET, widths=(16, 16, 16, 16)),
        "VAE_CONFIG": replace(pretrain.VAE_CONFIG, widths=(6, 6, 6), norm_groups=3),
        "VAE_STEPS": (2, 2, 4),
        "DENOISING_STEPS": 5,  # up to the first step of words
        "ROLLOUT_STEPS": 5,
        "ROLLOUTS": 1,
        "INVERTED": 2,
    }
    for name, value in small.items():
        monkeypatch.setattr(pretrain, name, value)
    rollout_steps = []

    def recorded(rollout, networks, step=pretrain.rollout_step):
        rollout_steps.append(rollout.step)
        return step(rollout, networks)

    monkeypatch.setattr(pretrain, "rollout_step", recorded)
    work, out = tmp_path / "work", tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["pretrain.py", "--work", str(work), "--out", str(out)])
    pretrain.main()
    assert rollout_steps[:2] == [1, 2]
    model, last = load_model(str(out)), work / "rollouts.pt"
    assert model.unet.config.in_channels == model.vae.config.latent_channels == 8
    assert model.vae.config.scale != 1
    latents = np.load(work / "latents.npy").astype(np.float32)
    assert latents.std() == pytest.approx(1, rel=0.01)
    for older, newer in (("denoising", "rollouts"), ("vae_crops", "vae_whole")):
        before, after = (
            torch.load(work / f"{name}.pt", weights_only=True)["average"] for name in (older, newer)
        )
        assert any(not torch.equal(*pair) for pair in zip(before, after))
    written = last.stat().st_mtime
    first = (out / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    pretrain.main()
    assert last.stat().st_mtime == written
    assert (out / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == first


def test_the_decoder_learns_out_of_latents_that_stay(monkeypatch, pool, tmp_path):
    monkeypatch.setattr(pretrain, "VAE_STEPS", (0, 0, 2))
    monkeypatch.setattr(pretrain, "HEIGHT", HEIGHT // 2)  # which makes batches smaller
    torch.manual_seed(0)
    vae = pretrain.VAE(replace(pretrain.VAE_CONFIG, widths=(6, 6, 6), norm_groups=3))
    before = {name: weight.clone() for name, weight in vae.state_dict().items()}
    pretrain.train_vae(vae, pool, tmp_path)
    changed = {n.split(".")[0] for n, w in vae.state_dict().items() if not torch.equal(w, before[n])}
    assert {"decoder", "post_quant_conv"} <= changed
    encoder = [n for n, w in before.items() if n.startswith(("encoder", "quant_conv"))]
    still = [n for n in encoder if torch.equal(vae.state_dict()[n], before[n])]
    assert all("conv2" in n for n in set(encoder) - set(still))  # residuals that start at zero
