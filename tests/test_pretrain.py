"""How the demo base model is taught: its pool of puppets, and the noisy clips that it learns from."""

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.func import functional_call

from checkpoint import load_model
from clip import Tokenizer
from demo import pretrain
from demo.puppet import caption, random_puppet
from posecrafter import ALPHAS_CUMPROD, ddim_timesteps, edit_latents
from poses.pose import draw_pose

ROUND = replace(pretrain.ROUNDS[3], disguised=0.0)
CLIPS, FRAMES = 24, 3


@pytest.fixture(scope="module")
def pool() -> dict:
    rows, captions = zip(*(pretrain.render_identity(seed, ROUND) for seed in (16_000, 16_001)))
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]} | {
        "captions": captions
    }


def test_a_twin_differs_in_what_its_words_say(pool):
    for seed, (words, told, twins) in zip((16_000, 16_001), pool["captions"]):
        assert words == caption(random_puppet(seed))
        twin, mine, other = pretrain.twin_of(random_puppet(seed), np.random.default_rng(seed))
        assert mine != other and caption(twin) == words.replace(f", {mine}", f", {other}")
        assert f", {told}" in words and f", {twins}" not in words
    first, twin = pool["frames"][:, 0].astype(int), pool["frames"][:, pretrain.TWIN].astype(int)
    changed = (first != twin).any(-1).mean((1, 2))
    assert (changed > 0).all() and (changed < 0.15).all()
    assert np.array_equal(pool["masks"][:, 0], pool["masks"][:, pretrain.TWIN])


def test_misplaced_poses_are_off_by_as_much_as_is_said(pool):
    rng = np.random.default_rng(0)
    true = pool["poses"][0, :4]
    within = pretrain.FOUND_WITHIN
    clips = [pretrain.as_found(rng, true, 128, 128, within) for _ in range(200)]
    found = np.array(
        [[np.concatenate(list(vars(pose).values())) for pose in clip] for clip in clips]
    )
    off = (found - true)[..., :2] * 128
    assert (found[..., 2] == true[:, :, 2]).all() and abs(off.mean()) < 0.02
    for part, within in ((np.s_[:18], 0.8), (np.s_[18:88], 0.55), (np.s_[88:], 0.3)):
        assert off[:, :, part].std() == pytest.approx(1.5 / 3**0.5 * within, rel=0.1)
    each = off.std(axis=(1, 2, 3))
    assert each.min() < 0.1 < 0.6 < each.max()


def test_what_is_outside_the_picture_is_not_found(pool):
    true = pool["poses"][0, :2].copy()
    true[0, :, 1] += 0.3  # its legs now lie below the picture
    outside = true[..., 1] >= 1
    assert 0 < outside[0].sum() < 130
    clip = pretrain.as_found(np.random.default_rng(0), true, 128, 128, pretrain.FOUND_WITHIN)
    found = np.array([np.concatenate(list(vars(pose).values())) for pose in clip])
    assert (found[outside] == 0).all() and np.array_equal(found[~outside][:, 2], true[~outside][:, 2])


def test_wide_frames_cut_off_legs_and_no_heads():
    plan = replace(ROUND, height=96, width=128)
    rows = [pretrain.render_identity(seed, plan)[0] for seed in range(16_000, 16_008)]
    bodies = np.stack([row["poses"] for row in rows])[..., :18, :]
    assert {row["frames"].shape[1:] for row in rows} == {(96, 128, 3)}
    assert (bodies[:, :, 0, 1] > 0).all() and (bodies[:, :, 0, 1] < 0.7).all()  # noses
    assert (bodies[:, :, (10, 13), 1] > 1).all()  # ankles
    disguised = pretrain.render_identity(16_000, replace(plan, disguised=1.0))[0]
    assert disguised["frames"].shape == rows[0]["frames"].shape


def test_control_images_show_the_poses_of_their_frames(monkeypatch, pool):
    monkeypatch.setattr(pretrain, "FOUND_WITHIN", 0)
    which = np.arange(2 * (pretrain.POSES + 1), dtype=np.float32).reshape(2, -1, 1, 1, 1)
    latents = np.broadcast_to(which, (*which.shape[:2], 8, 32, 32))
    batch = pretrain.training_batch(np.random.default_rng(1), pool, latents, 1, CLIPS, FRAMES)
    a = ALPHAS_CUMPROD[batch["timestep"]].repeat_interleave(FRAMES)[:, None, None, None]
    shown = (batch["latents"] - (1 - a).sqrt() * batch["noise"]) / a.sqrt()
    for index, hint in zip(shown.mean((1, 2, 3)).round().int().tolist(), batch["hints"]):
        pose = pretrain.pose_from(pool["poses"].reshape(-1, 130, 3)[index])
        drawn = (255 * hint).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(draw_pose(pose, 128, 128), drawn)


def test_close_ups_show_the_same_square_in_everything(monkeypatch):
    """Latents that tell where they are, beside control images and weights."""
    plan = replace(ROUND, height=192, width=256)
    row, words = pretrain.render_identity(16_000, plan)
    pool = {name: array[None] for name, array in row.items()} | {"captions": [words]}
    monkeypatch.setattr(pretrain, "FOUND_WITHIN", 0)
    frame, y, x = np.indices((pretrain.POSES + 1, 48, 64), np.float32)
    latents = np.stack([frame, y, x], axis=1)[None]
    rng = np.random.default_rng(1)
    batch = pretrain.training_batch(rng, pool, latents, 1, CLIPS, FRAMES, close=True)
    a = ALPHAS_CUMPROD[batch["timestep"]].repeat_interleave(FRAMES)[:, None, None, None]
    shown = ((batch["latents"] - (1 - a).sqrt() * batch["noise"]) / a.sqrt()).round().int().numpy()
    size = pretrain.CLOSE // 4
    assert shown.shape[2:] == (size, size) and batch["hints"].shape[2:] == (4 * size, 4 * size)
    corners, parts_seen = set(), 0
    for z, hint, weight in zip(shown, batch["hints"], batch["weight"]):
        (index,), top, left = np.unique(z[0]), z[1, 0, 0], z[2, 0, 0]
        assert np.array_equal(z[1:], np.indices((size, size)) + [[[top]], [[left]]])
        corners.add((int(top), int(left)))
        keypoints = row["poses"][index].copy()
        keypoints[((keypoints[:, :2] < 0) | (keypoints[:, :2] >= 1)).any(-1)] = 0
        # Lines as wide as the whole frame's: a canvas as small as the square has thinner ones.
        whole = draw_pose(pretrain.pose_from(keypoints), 192, 256)
        drawn = (255 * hint).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(whole[4 * top :, 4 * left :][: 4 * size, : 4 * size], drawn)
        person = row["masks"][index, top : top + size, left : left + size] > 0
        lightest = weight[0].numpy()[person].min() if person.any() else np.inf
        assert lightest > 1.6 * weight.min()  # a twin's frame differs everywhere here, and weighs 5 more
        parts = pretrain.details(pretrain.pose_from(row["poses"][index]))
        centres = np.array([part[:, 1::-1].mean(0) for part in parts]).clip(0, 1) * (48, 64)
        beside = centres - (top, left)
        parts_seen += ((beside >= 0) & (beside <= size)).all(1).any()
    assert len(corners) > CLIPS / 3 and parts_seen == len(shown)


def noise_of_a_batch(monkeypatch, pool, latents: np.ndarray):
    """The noise of clips (CLIPS, FRAMES, 4, 32, 32), and what latent editing did to make some of it."""
    edits = []

    def recorded(starts, reference, poses, reference_pose, parts):
        edit_latents(starts, reference, poses, reference_pose, parts)
        edits.append((parts, reference.clone(), starts.clone()))

    monkeypatch.setattr(pretrain, "edit_latents", recorded)
    batch = pretrain.training_batch(np.random.default_rng(1), pool, latents, 0.5, CLIPS, FRAMES)
    return batch["noise"].unflatten(0, (CLIPS, FRAMES)), edits


def test_most_clips_share_what_is_left_of_the_noise_at_the_last_timestep(monkeypatch, pool):
    """Whichever frames a clip is made of: noise + ratio * image is then the same in all of them."""
    random = np.random.default_rng(1)
    latents = random.standard_normal((2, pretrain.POSES + 1, 4, 32, 32), np.float32)
    noise, _ = noise_of_a_batch(monkeypatch, pool, latents)
    ratio = (ALPHAS_CUMPROD[-1] / (1 - ALPHAS_CUMPROD[-1])).sqrt()
    shared = 0
    for clip in noise:
        for identity in torch.from_numpy(latents[:, : pretrain.POSES]):
            starts = (
                clip[:, None] + ratio * identity
            )  # (FRAMES, POSES, 4, 32, 32), whichever they are
            same = (starts[0][:, None] - starts[1][None]).abs() < 1e-4
            shared += bool(
                (same.float().mean((2, 3, 4)) > 0.5).any()
            )  # all but what has been moved
    assert CLIPS / 3 < shared < CLIPS


def test_some_clips_start_from_what_latent_editing_makes(monkeypatch, pool):
    latents = np.zeros((2, pretrain.POSES + 1, 4, 32, 32), np.float32)  # then noise is all there is
    noise, edits = noise_of_a_batch(monkeypatch, pool, latents)
    assert {parts for parts, _, _ in edits} == {"face,hands", "body"}
    for _, reference, moved in edits:
        clip = next(clip for clip in noise if torch.equal(clip[0], reference))
        assert torch.equal(clip[1:], moved) and not torch.equal(moved[0], reference)


def test_face_and_hands_weigh_most(pool):
    latents = np.zeros((2, pretrain.POSES + 1, 8, 32, 32), np.float32)
    batch = pretrain.training_batch(np.random.default_rng(1), pool, latents, 1, 1, FRAMES)
    weights = np.unique(batch["weight"])
    assert weights / weights[0] == pytest.approx([1, 5, 12, 15, 40])
    # Where they are: the heaviest latent pixels are those of white face points and blue hand points.
    for weight, hint in zip(batch["weight"][:, 0], batch["hints"]):
        heavy = (weight > 14 * weight.min()).numpy()
        drawn = pretrain.latent_pixels((hint.amin(0) > 0.9).numpy())
        assert drawn.any() and heavy[drawn].all() and heavy.mean() < 0.2


@pytest.fixture
def rollout(pool) -> tuple[pretrain.Rollout, np.ndarray]:
    """A rollout of CLIPS from inverted noise that nobody inverted, and that noise."""
    random = np.random.default_rng(0)
    latents = random.standard_normal((2, pretrain.POSES + 1, 8, 32, 32), np.float32)
    ways = random.standard_normal((2, pretrain.ROLLOUT_STEPS + 1, 8, 32, 32), np.float32)
    inverted = {"ways": ways, "found": pool["poses"][:, 0]}
    return pretrain.new_rollout(random, pool, latents, inverted, CLIPS, FRAMES, False), ways


def test_a_close_rollout_sees_each_frames_own_square():
    """Latents and inverted noise that tell where they are: both are cut where the control image is."""
    plan = replace(ROUND, height=192, width=256)
    row, words = pretrain.render_identity(16_000, plan)
    pool = {name: array[None] for name, array in row.items()} | {"captions": [words]}
    y, x = np.indices((48, 64), np.float32)
    latents = np.broadcast_to(np.stack([y, x]), (1, pretrain.POSES + 1, 2, 48, 64)).copy()
    ways = np.broadcast_to(np.stack([y, x]), (1, pretrain.ROLLOUT_STEPS + 1, 2, 48, 64))
    inverted = {"ways": ways, "found": row["poses"][None, 0]}
    random = np.random.default_rng(0)
    rollout = pretrain.new_rollout(random, pool, latents, inverted, CLIPS, FRAMES, close=True)
    assert torch.equal(rollout.latents, rollout.images)
    size = pretrain.CLOSE // 4
    assert rollout.images.shape == (CLIPS * FRAMES, 2, size, size)
    first = rollout.images.unflatten(0, (CLIPS, FRAMES))[:, 0].numpy()
    assert all((way == image).all() for way, image in zip(rollout.ways, first))
    whole = draw_pose(pretrain.pose_from(row["poses"][0]), 192, 256)  # a reference, as it was inverted
    for image, clip, hint in zip(first, rollout.poses, rollout.hints[::FRAMES]):
        top, left = (4 * image[:, 0, 0]).astype(int)
        drawn = (255 * hint).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(whole[top : top + 4 * size, left : left + 4 * size], drawn)
        nose = clip[0].body[0, :2] * 4 * size + (left, top)  # what editing will move it by
        assert nose == pytest.approx(row["poses"][0, 0, :2] * (256, 192), abs=1e-2)


def test_a_rollout_starts_from_inverted_noise_and_is_edited_on_its_way(monkeypatch, rollout):
    rollout, ways = rollout
    clips = rollout.latents.unflatten(0, (CLIPS, FRAMES)).clone()
    assert all(torch.equal(clip, clip[:1].expand_as(clip)) for clip in clips)
    assert {float(clip[0, 0, 0, 0]) for clip in clips} == {float(way[-1, 0, 0, 0]) for way in ways}
    seen = []

    def recorded(latents, reference, poses, reference_pose, parts):
        way = next(way for way in rollout.ways if (reference.numpy() == way).all((1, 2, 3)).any())
        level = int(np.flatnonzero((reference.numpy() == way).all((1, 2, 3)))[0])
        seen.append((rollout.step, parts))
        assert level == pretrain.ROLLOUT_STEPS - rollout.step + 1, "as noisy as the step's input"

    monkeypatch.setattr(pretrain, "edit_latents", recorded)
    for _ in range(pretrain.ROLLOUT_STEPS - 1):
        pretrain.rollout_step(rollout, lambda latents, *_: latents)
    assert Counter(seen) == Counter(edit for edit in rollout.edits if edit[0])
    assert {(1, "face,hands"), (3, "body")} <= set(seen)


def test_from_wherever_a_rollout_is_the_true_frames_are_asked_for(rollout):
    rollout, _ = rollout

    def knows(latents, timesteps, *_):
        a = ALPHAS_CUMPROD[timesteps[0]]
        return (latents - a.sqrt() * rollout.images) / (1 - a).sqrt()

    for _ in range(3):
        assert pretrain.rollout_step(rollout, lambda latents, *_: 0.5 * latents) > 0.01
    for _ in range(pretrain.ROLLOUT_STEPS - 4):
        assert pretrain.rollout_step(rollout, knows) < 1e-6
    assert (rollout.latents - rollout.images).abs().mean() < 0.1


def test_a_critic_pulls_smears_towards_what_is_true(monkeypatch):
    """Stripes lie at one of two places, and the least squared error is half of each."""
    monkeypatch.setattr(pretrain, "CRITIC_LEARNS", 40)
    torch.manual_seed(0)
    critic = pretrain.Critic(0.5)
    stripes = torch.zeros(16, 8, 12, 12)
    stripes[..., ::4] = stripes[..., 1::4] = 2
    shift = torch.arange(16) % 2 * 2
    truth = torch.stack([stripe.roll(int(by), -1) for stripe, by in zip(stripes, shift)])
    network = torch.ones_like(truth).requires_grad_()  # the mean
    hints, weight = torch.zeros(16, 3, 48, 48), torch.ones(16, 1, 12, 12)

    def judge() -> tuple[torch.Tensor, torch.Tensor]:
        guess = network * 1
        loss = (guess - truth).square().mean()
        return loss, critic.criticise(loss, guess, truth, weight, hints)

    for _ in range(20):
        assert judge()[1] == 0, "it has to learn first"
    before = critic(network.detach(), hints).mean()
    assert before < critic(truth, hints).mean() - 1
    loss, added = judge()
    pulls = [torch.autograd.grad(each, network, retain_graph=True)[0] for each in (loss, added)]
    strengths = [pull.norm().item() for pull in pulls]
    assert strengths[1] == pytest.approx(0.5 * strengths[0], rel=0.01)
    assert critic((network - pulls[1] / pulls[1].std()).detach(), hints).mean() > before
    critic.optimizer.zero_grad()
    added.backward()
    assert all(p.grad is None for p in critic.parameters()), "only the networks learn from it"

    again = pretrain.Critic(0.5)
    again.load_state_dict(copy.deepcopy(critic.state_dict()))
    for each in (critic, again):
        each.learn(network.detach(), truth, weight, hints)
    assert again.updates == critic.updates > 40
    assert torch.equal(again(truth, hints), critic(truth, hints)), "it goes on where it stopped"


def test_a_critic_has_its_say_once_there_is_an_image(rollout):
    rollout, _ = rollout
    asked = []

    def criticise(loss, guess, images, weight, hints):
        assert guess.shape == images.shape and len(weight) == len(hints) == len(guess)
        asked.append(rollout.step - 1)
        return loss * 0 + 100

    losses = [
        pretrain.rollout_step(rollout, lambda latents, *_: latents, criticise)
        for _ in range(pretrain.ROLLOUT_STEPS - 1)
    ]
    timesteps = ddim_timesteps(pretrain.ROLLOUT_STEPS)
    late = [step for step in range(1, 10) if timesteps[step - 1] <= pretrain.CRITICAL]
    assert asked == late and 1 not in late
    assert [loss > 100 for loss in losses] == [step in late for step in range(1, 10)]


def test_a_prompt_tells_what_it_must_and_forgets_at_times():
    rng = np.random.default_rng(0)
    words = "a person, red hair, blue shirt, green skirt"
    free = [pretrain.prompt_from(rng, words) for _ in range(300)]
    assert 20 < free.count("") < 80 and "a person" in free
    assert all("blue shirt" in pretrain.prompt_from(rng, words, "blue shirt") for _ in range(50))


def test_what_is_moved_moves_alike_at_every_size():
    """A blob's middle in a coarse map and in a fine one, upright as telephones film."""
    rows, columns = torch.meshgrid(torch.arange(224.0), torch.arange(128.0), indexing="ij")
    blob = torch.exp(-((rows - 90) ** 2 + (columns - 50) ** 2) / 400)[None, None]
    coarse = torch.nn.functional.avg_pool2d(blob, 4)
    middles = []
    for image in pretrain.moved(np.random.default_rng(1), [blob, coarse]):
        height, width = image.shape[2:]
        total = image.sum()
        y = (image[0, 0].sum(1) * (torch.arange(height) + 0.5)).sum() / total / height
        x = (image[0, 0].sum(0) * (torch.arange(width) + 0.5)).sum() / total / width
        middles.append((y.item(), x.item()))
    assert middles[0] == pytest.approx(middles[1], abs=0.003)
    assert middles[0] != pytest.approx((90.5 / 224, 50.5 / 128), abs=0.03)


def test_the_vae_learns_from_latents_that_moved_as_the_image_did(pool):
    frames = [pretrain.frame_from(np.random.default_rng(1), pool, 10, 10)]
    image = torch.from_numpy(frames[0][0]).permute(2, 0, 1)[None] / 127.5 - 1

    def loss(decode, move: bool) -> float:
        vae = SimpleNamespace(
            encode=lambda images: (images, torch.full_like(images, -60.0)),  # hardly any noise
            decode=decode,
        )
        return pretrain.vae_loss(np.random.default_rng(2), vae, frames, move)[0].item()

    assert loss(lambda latents: latents, move=False) < 0.01
    assert loss(lambda latents: latents, move=True) < 0.01
    assert loss(lambda latents: image, move=False) < 0.01
    assert loss(lambda latents: image, move=True) > 0.1  # what does not move along is wrong


def test_a_round_repeats_what_was_learned_before_and_teaches_words_where_there_are_twins():
    first, fourth, fifth = (pretrain.ROUNDS[i] for i in (0, 3, 4))
    assert {pretrain.lesson(step, first, [False]) for step in range(20)} == {(0, False)}
    lessons = [pretrain.lesson(step, fourth, [False] * 3 + [True]) for step in range(120)]
    assert lessons[1::2] == [(3, True)] * 60  # every other one
    assert Counter(pool for pool, words in lessons if not words) == {3: 30, 0: 10, 1: 10, 2: 10}
    lessons = Counter(pretrain.lesson(step, fifth, [False] * 3 + [True] * 2) for step in range(200))
    assert lessons == {(4, False): 120, (4, True): 20, (3, True): 20} | {(i, False): 10 for i in range(4)}


def latents_with_twins() -> np.ndarray:
    """Random, but the twins differ from their puppets in one corner only."""
    shape = 2, pretrain.POSES + 1, 8, 32, 32
    latents = np.random.default_rng(1).standard_normal(shape, np.float32)
    latents[:, pretrain.TWIN] = latents[:, 0]
    latents[:, pretrain.TWIN, :, :2, :2] += 1
    return latents


def test_pairs_of_a_batch_of_words_differ_in_their_prompts_alone(pool):
    batch = pretrain.words_batch(np.random.default_rng(1), pool, latents_with_twins(), 24)
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
    latents = latents_with_twins()
    latents[:, pretrain.TWIN, :, :2, :2] += 1000  # the twin stands out of any noise
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
    batch = pretrain.words_batch(np.random.default_rng(1), pool, latents_with_twins(), 6)
    a = ALPHAS_CUMPROD[batch["timestep"]][:, None, None, None]
    right = (batch["latents"] - a.sqrt() * batch["images"]) / (1 - a).sqrt()
    assert pretrain.words_loss(batch, right) == pytest.approx(0, abs=1e-9)

    difference = right[1::2] - right[::2]
    deaf, misplaced = right.clone(), right.clone()
    deaf[1::2] = right[::2]
    misplaced[1::2] = right[::2] + difference.roll((16, 16), dims=(2, 3))
    ignored, wrong = (pretrain.words_loss(batch, each) for each in (deaf, misplaced))
    assert 0 < ignored < 0.6 * wrong


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


def test_a_gradient_that_is_not_a_number_is_forgotten(tmp_path):
    def train(name: str, bad: Sequence[int]) -> torch.Tensor:
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 1)

        def loss_at(step: int) -> torch.Tensor:
            batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            loss = (layer(batch) - batch.sum(1, keepdim=True)).square().mean()
            return loss * float("nan") if step in bad else loss

        pretrain.optimise(name, torch.nn.ModuleDict({"l": layer}), loss_at, 100, 0.1, 0.9, tmp_path)
        return layer.weight.detach()

    good, mended = train("good", bad=[]), train("mended", bad=[50])
    assert 0 < (mended - good).abs().max() < 0.05
    losses = [row.split(",")[1] for row in (tmp_path / "mended.csv").read_text().split()[1:]]
    assert len(losses) == 2 and all(float(loss) < 10 for loss in losses)
    with pytest.raises(ArithmeticError, match=r"49 of the 50 steps up to 50.*lower rate"):
        train("spoilt", bad=range(1, 100))


@pytest.fixture
def small(monkeypatch) -> tuple[pretrain.Networks, Tokenizer]:
    monkeypatch.setattr(pretrain, "UNET", replace(pretrain.UNET, widths=(16, 16, 16, 16)))
    torch.manual_seed(0)
    tokenizer = load_model("demo").tokenizer
    networks = pretrain.new_networks(tokenizer)
    with torch.no_grad():  # which start with residuals of zero
        for weight in networks.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    return networks, tokenizer


def test_packed_weights_are_the_same_weights(small):
    networks, tokenizer = small
    weights = pretrain.pack_weights(networks)
    views = pretrain.unpack_weights(networks, *weights.values())
    assert all(torch.equal(views[name], weight) for name, weight in networks.named_parameters())
    random = torch.Generator().manual_seed(0)
    latents, hints = (torch.randn(4, *s, generator=random) for s in ((8, 8, 8), (3, 32, 32)))
    tokens = torch.stack([tokenizer("a person"), tokenizer("a person, red hair")])
    inputs = latents, torch.tensor([100, 900]), tokens, hints
    inputs = tuple(x.to(pretrain.DEVICE) for x in inputs)
    expected = networks(*inputs)
    assert torch.allclose(functional_call(networks, views, inputs), expected, atol=1e-5)
    expected.square().mean().backward()
    functional_call(networks, views, inputs).square().mean().backward()
    gradients = pretrain.unpack_weights(networks, *(each.grad for each in weights.values()))
    for name, weight in networks.named_parameters():
        assert torch.allclose(gradients[name], weight.grad, rtol=1e-3, atol=1e-6), name


def test_a_rollout_begins_where_the_one_before_has_ended():
    plan, twins, steps = pretrain.ROUNDS[-1], [True, True], range(40, 400)
    begin, taken = pretrain.beginnings(steps, plan, twins), {}
    for step in steps:
        which = pretrain.rollout_of(step, plan, twins)
        if step in begin:
            assert taken.get(which, pretrain.ROLLOUT_STEPS - 1) == pretrain.ROLLOUT_STEPS - 1
            taken[which] = 0
        if which is not None:
            taken[which] += 1
    assert len(taken) == pretrain.ROLLOUTS and max(taken.values()) == pretrain.ROLLOUT_STEPS - 1


@pytest.fixture
def lessons(monkeypatch, pool) -> tuple[list[tuple[dict, np.ndarray]], pretrain.Round]:
    """A pool with its latents, which are random, and a plan for a few steps of every kind."""
    monkeypatch.setattr(pretrain, "SIZE", 64)
    monkeypatch.setattr(pretrain, "CRITIC_LEARNS", 4)
    plan = replace(pretrain.ROUNDS[-1], inverted=2, steps=16, words_every=6, critic=1.0)
    return [(pool, latents_with_twins())], plan


@pytest.mark.skipif(torch.cuda.is_available(), reason="no two sums of a graphics card are the same")
def test_helpers_change_nothing(monkeypatch, tmp_path, small, lessons):
    networks, tokenizer = small
    pools, plan = lessons
    trained = []
    for helpers in (0, 2):
        monkeypatch.setattr(pretrain, "HELPERS", helpers)
        work = tmp_path / str(helpers)
        work.mkdir()
        torch.manual_seed(0)
        each = copy.deepcopy(networks)
        pretrain.train_networks(each, pools, tokenizer, work, plan)
        trained.append(pretrain.pack_weights(each)["rest"])
    assert torch.equal(*trained)
    assert not torch.equal(trained[0], pretrain.pack_weights(networks)["rest"])


def test_a_recording_is_made_for_every_lesson_and_no_other(monkeypatch, small, lessons):
    networks, _ = small
    pools, plan = lessons
    pool, latents = pools[0]
    untwinned = {"frames": pool["frames"][:, :-1, :96], "masks": pool["masks"][:, :-1, :24]}
    untwinned["captions"] = [(words, "", "") for words, *_ in pool["captions"]]
    untwinned["poses"] = pool["poses"]
    pools = [(untwinned, latents[:, :-1, :, :24]), *pools]
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda compute, sample: compute)
    weights = pretrain.pack_weights(networks)
    recorded = pretrain.record(None, weights, networks, pools, plan, FRAMES)
    steps = range(60)
    begin = pretrain.beginnings(steps, plan, pretrain.with_twins(pools))
    ways = np.zeros((2, pretrain.ROLLOUT_STEPS + 1, *latents.shape[2:]), np.float32)
    inverted = {"ways": ways, "found": pool["poses"][:, 0]}
    asked = set()
    for step in steps:
        made = pretrain.Lessons(pools, inverted, plan, FRAMES, begin)[step]
        if isinstance(made, pretrain.Rollout):
            asked.add((made.latents.shape, len(made.poses)))
        elif made:
            asked.add((made["latents"].shape, len(made["timestep"])))
    assert asked == set(recorded) and len(asked) == 4  # another pool; whole, of words and close up


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no graphics card")
def test_recordings_do_what_they_were_recorded_of(small, lessons):
    networks, _ = small
    networks.to("cuda")
    weights = pretrain.pack_weights(networks)

    def compute(of_words, rest, *inputs):
        return functional_call(networks, pretrain.unpack_weights(networks, of_words, rest), inputs)

    recorded = pretrain.record(compute, weights, networks, *lessons, FRAMES)
    assert len(recorded) == 3  # whole, of words, and close up
    for (shape, clips), replayed in recorded.items():
        hints = torch.rand(shape[0], 3, 4 * shape[2], 4 * shape[3], device="cuda")
        tokens = torch.randint(20, (clips, networks["text_encoder"].config.length), device="cuda")
        inputs = torch.randn(shape, device="cuda"), torch.full((clips,), 500, device="cuda"), tokens
        results = []
        for each in (compute, replayed):
            weights.zero_grad()
            output = each(*weights.values(), *inputs, hints)
            output.square().mean().backward()
            results.append((output.clone(), *(each.grad.clone() for each in weights.values())))
        for one, other in zip(*results):
            assert (one - other).norm() < 0.01 * one.norm()


def test_the_script_makes_a_model_from_nothing(monkeypatch, tmp_path):
    """All stages with a few puppets and steps, and once more, when everything is there already."""
    rounds = [  # up to the first step of words, where there are any
        replace(
            plan,
            identities=plan.identities[:4],
            steps=plan.words_every or 2,
            moving=0.5,
            inverted=min(plan.inverted, 4),
        )
        for plan in pretrain.ROUNDS
    ]
    monkeypatch.setattr(pretrain, "ROUNDS", tuple(rounds))
    monkeypatch.setattr(pretrain, "SIZE", pretrain.SIZE // 2)  # which makes batches a fourth as large
    monkeypatch.setattr(pretrain, "VAE_STEPS", (4, 4, 4, 4))
    work, out = tmp_path / "work", tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["pretrain.py", "--work", str(work), "--out", str(out)])
    pretrain.main()
    last = work / f"round{len(rounds)}" / "networks.pt"
    model, written = load_model(str(out)), last.stat().st_mtime
    assert model.unet.config.in_channels == model.vae.config.latent_channels == 8
    assert model.vae.config.scale != 1
    first = (out / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    pretrain.main()
    assert last.stat().st_mtime == written
    assert (out / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == first

    # And the last round once more, which goes on from what there is.
    again = tmp_path / "again"
    arguments = ["--base", str(out), "--work", str(tmp_path / "base"), "--out", str(again)]
    monkeypatch.setattr("sys.argv", ["pretrain.py", *arguments])
    pretrain.main()
    new = load_model(str(again))
    assert new.vae.config == model.vae.config
    difference = new.unet.conv_in.weight.float() - model.unet.conv_in.weight.float()
    assert 0 < difference.abs().max() < 0.01
    for other in (["--base", "demo", *arguments[2:]], arguments[:2], ["--work", arguments[3]]):
        monkeypatch.setattr("sys.argv", ["pretrain.py", *other])
        with pytest.raises((ValueError, SystemExit)):  # another's work would be taken for its own
            pretrain.main()
