"""The method: against the public ControlVideo code, and what must hold for any weights."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from weights import fill

import posecrafter
from beyond.body import body_parts
from controlnet import ControlNet
from demo.puppet import clip
from posecrafter import (
    add_noise,
    ddim_step,
    ddim_timesteps,
    edit_latents,
    insert_reference,
    invert,
    predict_noise,
    sample,
    select_reference,
    trainable_parameters,
    training_loss,
    training_steps,
)
from poses.parts import latent_points, near_hull
from poses.pose import Pose, place_pose
from unet import UNet, UNetConfig

ORACLE = Path(__file__).parents[2] / "shared" / "oracle" / "controlvideo.safetensors"
needs_oracle = pytest.mark.skipif(not ORACLE.exists(), reason=f"no oracle file {ORACLE}")
CONFIG = UNetConfig(widths=(32, 64, 64, 64), context_dim=24, heads=4)


def filled(network: torch.nn.Module, prefix: str) -> torch.nn.Module:
    names = network.state_dict()
    values = fill({prefix + name: tensor.shape for name, tensor in names.items()})
    network.load_state_dict({name: values[prefix + name] for name in names})
    return network.eval()


@pytest.fixture(scope="module")
def model() -> SimpleNamespace:
    controlnet = filled(ControlNet(CONFIG, (8, 8, 16, 32)), "controlnet.")
    return SimpleNamespace(unet=filled(UNet(CONFIG), "unet."), controlnet=controlnet)


@pytest.fixture(scope="module")
def oracle(model) -> dict[str, torch.Tensor]:
    tensors = load_file(ORACLE)
    clip = {name: t[0].transpose(0, 1) for name, t in tensors.items() if t.ndim == 5}
    clip["hint"] = model.controlnet.embed_hint(clip["hint"]).detach()
    return tensors | clip | {name: tensors[name][0] for name in ("context", "uncond")}


def a_clip(frames: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, hints and a context for the small model."""
    random = torch.Generator().manual_seed(seed)
    latents = torch.randn(frames, 4, 8, 8, generator=random)
    hints = torch.randn(frames, 32, 8, 8, generator=random)
    return latents, hints, torch.randn(7, 24, generator=random)


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


# ---- Parity with the public ControlVideo code ---------------------------------------------------


@needs_oracle
def test_the_schedule_is_the_public_one(oracle):
    assert ddim_timesteps(10) == oracle["ddim.timesteps"].tolist()
    assert worst(posecrafter.ALPHAS_CUMPROD, oracle["ddim.alphas_cumprod"]) < 1e-7


@needs_oracle
def test_inversion_equals_the_public_code(model, oracle):
    trajectory = invert(model, oracle["latents"], oracle["hint"], oracle["context"], 10)
    assert len(trajectory) == 11
    assert worst(trajectory[1], oracle["inverted.1"]) < 1e-4
    assert worst(trajectory[10], oracle["inverted.10"]) < 1e-4


@needs_oracle
def test_sampling_equals_the_public_code_without_and_with_guidance(model, oracle):
    noise, hint, context = oracle["noise"], oracle["hint"], oracle["context"]
    plain = sample(model, noise, hint, context, 10)
    assert worst(plain, oracle["sampled.guidance1"]) < 1e-4
    guided = sample(model, noise, hint, context, 10, 3.0, oracle["uncond"])
    assert worst(guided, oracle["sampled.guidance3"]) < 1e-4


@needs_oracle
def test_training_loss_and_every_gradient_equal_the_public_code(model, oracle):
    parameters = trainable_parameters(model)
    norms = {n.removeprefix("train.grad_norm."): v for n, v in oracle.items() if "grad_norm" in n}
    assert parameters.keys() == norms.keys()
    for network in (model.unet, model.controlnet):
        network.zero_grad()
    loss = training_loss(model, oracle["latents"], oracle["hint"], oracle["context"], 637, oracle["noise"])
    loss.backward()
    assert abs(loss.item() - oracle["train.loss"].item()) < 1e-4
    for name, norm in norms.items():
        assert parameters[name].grad.norm().item() == pytest.approx(norm.item(), rel=1e-4), name
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn_temp.to_q.weight"
    assert worst(parameters[name].grad, oracle[f"train.grad.{name}"]) < 1e-4


# ---- Diffusion ----------------------------------------------------------------------------------


def test_fifty_steps_run_from_981_to_1():
    assert ddim_timesteps(50)[:2] == [981, 961]
    assert ddim_timesteps(50)[-1] == 1
    for steps in (0, 334, 600, 1000):  # 334 would start at 667, where half of the image is left
        with pytest.raises(ValueError, match=f"{steps} DDIM steps: give 1 to 100"):
            ddim_timesteps(steps)
    for steps in (*range(1, 101), 125, 200, 250, 500):
        assert 1000 - ddim_timesteps(steps)[0] < 1000 / steps + 100


def test_a_ddim_step_with_the_true_noise_lands_on_the_other_timestep():
    image, noise = torch.randn(2, 2, 4, 8, 8)
    moved = ddim_step(add_noise(image, noise, 700), noise, 700, 300)
    assert worst(moved, add_noise(image, noise, 300)) < 1e-5


def test_a_ddim_step_there_and_back_is_nothing():
    latents, noise = torch.randn(2, 2, 4, 8, 8)
    assert worst(ddim_step(ddim_step(latents, noise, 41, 61), noise, 61, 41), latents) < 1e-5


def test_the_step_formula_is_the_papers():
    assert [training_steps(n) for n in (8, 16, 32, 100)] == [100, 265, 596, 2000]
    assert training_steps(2) == 50


def test_inverting_one_frame_equals_inverting_the_whole_pseudo_video(model):
    latents, hints, context = a_clip(1)
    alone = invert(model, latents, hints, context, 5)
    repeated = invert(model, latents.expand(4, -1, -1, -1), hints.expand(4, -1, -1, -1), context, 5)
    for one, all_frames in zip(alone, repeated):
        assert worst(one.expand(4, -1, -1, -1), all_frames) < 1e-4


def test_inverting_then_sampling_gives_the_frame_back_the_better_the_more_steps(model):
    """A DDIM step is not its own inverse: the noise is asked for at two slightly different latents."""
    gentle = SimpleNamespace(unet=gentle_copy(model.unet), controlnet=model.controlnet)
    latents, hints, context = a_clip(1)
    errors = []
    for steps in (10, 50, 200):
        noise = invert(gentle, latents, hints, context, steps)[-1]
        errors.append(worst(sample(gentle, noise, hints, context, steps), latents))
    print("worst error of a frame with 10, 50 and 200 steps:", errors)
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.05


def test_a_fixed_point_makes_inversion_nearly_exact(model):
    """In 10 steps, on random weights: each step asks for the noise at the latent that it leads to."""
    gentle = SimpleNamespace(unet=gentle_copy(model.unet), controlnet=model.controlnet)
    latents, hints, context = a_clip(1)
    errors = []
    for iterations in (0, 1, 2):
        noise = invert(gentle, latents, hints, context, 10, iterations)[-1]
        errors.append((sample(gentle, noise, hints, context, 10) - latents).abs().mean().item())
    print("mean error of a frame with 0, 1 and 2 iterations:", errors)
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < errors[0] / 3


def gentle_copy(unet: UNet) -> UNet:
    """With a weaker output: random weights predict noise that changes wildly along the way."""
    copy = UNet(CONFIG)
    copy.load_state_dict(unet.state_dict())
    for parameter in copy.conv_out.parameters():
        parameter.data *= 0.1
    return copy


def test_frames_follow_the_key_frame_and_not_their_order(model):
    """What frame 2 becomes depends on the set of frames and on frame 0, not on where it stands."""
    latents, hints, context = a_clip(4)
    order = [0, 2, 1, 3]
    straight = predict_noise(model, latents, 501, context, hints)
    swapped = predict_noise(model, latents[order], 501, context, hints[order])
    assert worst(straight[order], swapped) < 1e-4
    other_key = [1, 0, 2, 3]
    moved = predict_noise(model, latents[other_key], 501, context, hints[other_key])
    assert worst(straight[other_key], moved) > 1e-2


def test_latents_may_be_changed_before_each_step(model):
    latents, hints, context = a_clip(2)
    calls = []

    def edit(latents: torch.Tensor, step: int) -> None:
        calls.append(step)
        if step == 2:
            latents.zero_()

    edited = sample(model, latents, hints, context, 3, before_step=edit)
    assert calls == [1, 2, 3]
    assert worst(edited, sample(model, latents, hints, context, 3)) > 1e-2


def test_guidance_counts_down_to_its_timestep(model):
    latents, hints, context = a_clip(2)
    empty, seen = a_clip(2, seed=1)[2], {}

    def remember(latents: torch.Tensor, step: int) -> None:
        seen[step] = latents.clone()

    sample(model, latents, hints, context, 4, 3.0, empty, remember)

    def recall(latents: torch.Tensor, step: int) -> None:
        if step == 3:
            latents.copy_(seen[3])

    expected = sample(model, latents, hints, context, 4, before_step=recall)
    until = ddim_timesteps(4)[1]
    guided = sample(model, latents, hints, context, 4, 3.0, empty, guidance_until=until)
    assert worst(guided, expected) < 1e-6
    assert worst(guided, sample(model, latents, hints, context, 4, 3.0, empty)) > 1e-2


def test_sampling_leaves_the_noise_it_was_given_alone(model):
    latents, hints, context = a_clip(2)
    before = latents.clone()
    sample(model, latents, hints, context, 2, before_step=lambda latents, step: latents.zero_())
    assert torch.equal(latents, before)


# ---- Reference selection ------------------------------------------------------------------------


def body(*points: tuple[float, float] | None) -> Pose:
    keypoints = np.zeros((18, 3), np.float32)
    for i, point in enumerate(points):
        if point is not None:
            keypoints[i] = (*point, 1)
    return Pose(body=keypoints)


def test_the_reference_is_the_training_frame_nearest_to_all_targets():
    training = [body((0.1, 0.1)), body((0.5, 0.5)), body((0.9, 0.9))]
    assert select_reference(training, [body((0.85, 0.9)), body((0.95, 0.8))]) == 2
    # squared distances: one far target outweighs two near ones
    targets = [body((0.1, 0.1)), body((0.1, 0.1)), body((1.0, 1.0))]
    assert select_reference(training, targets) == 1


def test_missing_keypoints_neither_help_nor_hurt():
    complete = body((0.2, 0.2), (0.4, 0.4))
    partial = body((0.3, 0.3), None)
    target = body((0.3, 0.3), (0.9, 0.9))
    assert select_reference([complete, partial], [target]) == 1
    assert select_reference([partial, complete], [body(None, (0.4, 0.4)), target]) == 1


def test_targets_without_a_person_do_not_vote_and_none_at_all_is_an_error():
    training = [body((0.1, 0.1)), body((0.5, 0.5))]
    assert select_reference(training, [Pose(), body((0.5, 0.5))]) == 1
    with pytest.raises(ValueError, match="person"):
        select_reference([Pose()], [body((0.5, 0.5))])


def test_a_target_that_shows_other_keypoints_does_not_stop_the_run():
    training = [body((0.1, 0.1)), body((0.5, 0.5)), body((0.9, 0.9), (0.9, 0.9))]
    targets = [body((0.5, 0.5)), body((0.4, 0.5))]
    assert select_reference(training[:2], [*targets, body(None, (0.2, 0.2))]) == 1
    assert select_reference(training, [*targets, body(None, (0.2, 0.2))]) == 2, "sees them all"


def test_the_reference_leads_the_clip():
    poses = [body((i / 10, 0)) for i in range(4)]
    assert insert_reference(poses[3], poses[:3]) == [poses[3], *poses[:3]]


# ---- Latent editing -----------------------------------------------------------------------------


def hand_at(x: float, y: float, width: float = 0.25, angle: float = 0.0) -> np.ndarray:
    """21 keypoints of a hand-like fan around (x, y), canvas-normalised."""
    random = np.random.default_rng(3)
    fan = random.uniform(-0.5, 0.5, (21, 2)) * width
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return np.hstack([fan @ turn.T + (x, y), np.ones((21, 1))]).astype(np.float32)


def within(points: np.ndarray, reach: float) -> torch.Tensor:
    """Booleans (32, 32): the pixels within `reach` of the hull of points."""
    region = torch.zeros(32, 32, dtype=torch.bool)
    x, y = near_hull(points, reach, 32, 32)[0].T
    region[y, x] = True
    return region


def test_editing_moves_a_patch_to_where_the_affine_map_says_and_touches_nothing_else():
    reference_pose = Pose(left_hand=hand_at(0.25, 0.25))
    target_pose = Pose(left_hand=hand_at(0.25 + 12 / 32, 0.25 + 10 / 32))  # 12 right, 10 down
    reference = torch.randn(4, 32, 32)
    before = torch.randn(1, 4, 32, 32)
    after = before.clone()
    counts = edit_latents(after, reference, [target_pose], reference_pose)
    assert counts == {"left_hand": 1}

    landmarks = latent_points(target_pose.left_hand, 32, 32)
    region = within(landmarks, 1.0)
    assert 30 < region.sum() < 150
    moved = torch.roll(reference, (10, 12), dims=(1, 2))
    assert worst(after[0][:, region], moved[:, region]) < 1e-4
    assert torch.equal(after[0][:, ~region], before[0][:, ~region])


def test_editing_follows_rotation_and_scale():
    """A latent whose value is its own position shows where each pixel was read from."""
    reference_pose = Pose(face=np.vstack([hand_at(0.5, 0.5)] * 4)[:70])
    target_pose = Pose(face=np.vstack([hand_at(0.4, 0.6, 0.25 * 1.5, math.pi / 2)] * 4)[:70])
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    reference = torch.stack([columns, rows, columns, rows])
    latents = torch.full((1, 4, 32, 32), -100.0)
    assert edit_latents(latents, reference, [target_pose], reference_pose)["face"] == 1

    y, x = np.nonzero((latents[0, 0] > -50).numpy())
    offset = np.stack([x, y], 1) + 0.5 - (0.4 * 32, 0.6 * 32)
    turned_back = np.stack([offset[:, 1], -offset[:, 0]], 1) / 1.5  # a quarter turn the other way
    expected = turned_back + (16, 16) - 0.5
    read = latents[0, :2, y, x].T.numpy()
    assert np.abs(read - expected).max() < 1e-3


def test_a_pose_that_equals_the_reference_leaves_its_latent_unchanged():
    pose = Pose(face=np.vstack([hand_at(0.5, 0.3)] * 4)[:70], right_hand=hand_at(0.2, 0.7))
    reference = torch.randn(4, 32, 32)
    latents = reference.repeat(2, 1, 1, 1)
    assert edit_latents(latents, reference, [pose, pose], pose)["right_hand"] == 2
    assert worst(latents[0], reference) < 1e-4


def test_parts_that_are_not_seen_in_both_are_left_alone():
    latents = torch.randn(1, 4, 32, 32)
    before = latents.clone()
    seen, unseen = Pose(left_hand=hand_at(0.5, 0.5)), Pose()
    for target, reference in ((seen, unseen), (unseen, seen)):
        assert not any(edit_latents(latents, torch.randn(4, 32, 32), [target], reference).values())
    assert torch.equal(latents, before)


def test_a_region_that_would_be_read_from_outside_the_reference_is_left_alone():
    reference_pose = Pose(left_hand=hand_at(0.0, 0.5))  # half of it outside the canvas
    target_pose = Pose(left_hand=hand_at(0.5, 0.5))
    latents = torch.full((1, 4, 32, 32), -100.0)
    edit_latents(latents, torch.zeros(4, 32, 32), [target_pose], reference_pose)
    assert (latents[0, :, :, :15] == -100).all()
    assert (latents[0, :, 16, 16:18] == 0).all()


def test_the_whole_body_of_a_pose_that_equals_the_reference_stays_as_it_is():
    _, (pose,), _ = clip(3, 6, 1)
    reference = torch.randn(4, 32, 32)
    latents = reference.repeat(2, 1, 1, 1)
    counts = edit_latents(latents, reference, [pose, pose], pose, body_parts)
    assert counts["torso"] == counts["left_hand"] == counts["right_shin"] == 2
    assert worst(latents[0], reference) < 1e-4


def test_a_whole_body_that_moves_takes_its_latent_along_and_leaves_the_rest():
    _, (pose,), mask = clip(3, 6, 1)
    moved_pose = place_pose(pose, 1, 1, 3 / 32, -1 / 32)  # 3 to the right, 1 up
    reference, before = torch.randn(4, 32, 32), torch.full((1, 4, 32, 32), -100.0)
    after = before.clone()
    edit_latents(after, reference, [moved_pose], pose, body_parts)
    person = torch.tensor(mask.reshape(32, 4, 32, 4).all((1, 3))).roll((-1, 3), (0, 1))
    assert person.sum() > 50
    assert worst(after[0][:, person], reference.roll((-1, 3), (1, 2))[:, person]) < 1e-3
    far = ~within(latent_points(moved_pose.body, 32, 32), 6.0)
    assert far.sum() > 100 and torch.equal(after[0][:, far], before[0][:, far])
