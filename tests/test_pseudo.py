"""The pseudo video: what is behind people, cutting them out, moving them, and holding sampling to it."""

import math
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_parts import standing

from beyond.body import body_parts, covered, may_cover
from beyond.pseudo import (
    ALIKE,
    STILL,
    background_change,
    bodies,
    cut_out,
    empty_places,
    hidden,
    hold_to_pseudo_video,
    max_around,
    part_masks,
    pseudo_video,
    restore,
    uncovered,
    unlikeness,
    without_people,
)
from demo.motion import motion
from demo.puppet import clip, pose_of, random_puppet, render
from metrics.figures import psnr
from posecrafter import ALPHAS_CUMPROD, EditInputs, Edits, edit_once, image_tensor, move
from poses.parts import latent_points
from poses.pose import Pose, place_pose

# ---- What is behind the person


@pytest.mark.parametrize("reach", [0, 2, 16])
def test_a_maximum_along_rows_and_columns_is_that_over_squares(reach):
    images = torch.randn(2, 1, 33, 47)
    squares = torch.nn.functional.max_pool2d(images, 2 * reach + 1, 1, reach)
    assert torch.equal(max_around(images, reach), squares)
    assert torch.equal(max_around(images[0], reach), squares[0])


def test_the_background_is_what_is_seen_where_nobody_stands():
    _, (pose,), _ = clip(3, 6, 1)
    person = torch.from_numpy(covered(pose, 32, 32) > 0)
    latents = torch.arange(32.0).expand(2, 4, 32, 32).clone()  # brighter from left to right
    background = latents[0].clone()
    grown = torch.nn.functional.max_pool2d(person[None] * 1.0, 5, 1, 2)[0] > 0
    latents[0][:, grown] = 700  # hair reaches further than keypoints tell
    behind, known = without_people(latents, [pose, Pose()])
    assert torch.equal(behind, background) and known.all()

    behind, known = without_people(latents[:1], [pose])  # somebody who never moves
    assert torch.equal(known[0], ~grown)
    assert torch.equal(behind[:, ~grown], background[:, ~grown])
    left, right = grown.any(0).nonzero()[[0, -1], 0].tolist()
    inside = behind[:, grown]  # continued from around
    assert inside.min() >= left - 1 and inside.max() <= right + 1
    unseen = deepcopy(pose)
    unseen.body[2] = 0  # without a shoulder they may be anywhere
    with pytest.raises(ValueError, match="no background"):
        without_people(latents[:1], [unseen])


def test_a_camera_that_trembles_is_told_from_one_that_is_still():
    frames, poses, _ = clip(1, 2, 24)
    frames, poses = frames[::4], poses[::4]
    height, width = frames.shape[1:3]
    shifts = [(0, 0), (1, 0), (0, 1), (1, 1), (-1, 0), (0, -1)]
    shaken = np.stack([np.roll(frame, shift, (0, 1)) for frame, shift in zip(frames, shifts)])
    moved = [place_pose(p, 1, 1, dx / width, dy / height) for p, (dy, dx) in zip(poses, shifts)]
    assert background_change(frames, poses, 4) < STILL < background_change(shaken, moved, 4)
    grey = np.full_like(frames, 99)
    assert background_change(grey, poses, 4) == 0
    assert background_change(frames[:1], poses[:1], 4) == math.inf  # nothing to compare with


def test_where_nobody_is_and_what_the_reference_leaves_shows_the_background():
    down, outwards = standing((0.3, 0.75)), standing((0.05, 0.5))
    anywhere = torch.ones(1, 32, 32, dtype=torch.bool)
    seen = uncovered([outwards, down], down, anywhere)
    assert seen.shape == (2, 1, 32, 32)
    assert torch.equal(
        seen[1], empty_places(bodies([down], 32, 32))[0]
    )  # in its own pose it leaves nothing
    assert seen[:, 0, 0, 0].all()
    beside = seen[0] & ~empty_places(bodies([outwards], 32, 32))[0]
    assert beside.any() and not (beside & torch.from_numpy(may_cover(outwards, 32, 32))).any()
    assert torch.from_numpy(covered(down, 32, 32) > 0)[beside[0]].all()
    x, y = latent_points(down.body, 32, 32)[[3, 4]].mean(axis=0).round().astype(int)  # of the forearm
    assert seen[0, 0, y, x]
    nowhere = uncovered([outwards, down], down, ~anywhere)
    assert nowhere[0, 0, y, x] and not nowhere[1].any()  # there a guess is better than a forearm

    turned = deepcopy(down)  # seen from behind: no part of the reference moves there by any map, and yet
    turned.body[[2, 3, 4, 5, 6, 7]] = turned.body[[5, 6, 7, 2, 3, 4]]
    turned.body[[8, 9, 10, 11, 12, 13]] = turned.body[[11, 12, 13, 8, 9, 10]]
    assert not uncovered([turned], down, anywhere)[
        0, covered(down, 32, 32)[None] > 0
    ].any()  # a body is there
    unseen = deepcopy(outwards)
    unseen.body[[9, 10, 12, 13]] = 0  # its legs may be anywhere below the hips
    floor = latent_points(down.body, 32, 32)[[8, 11], 1].max()
    up = standing((0.3, 0.2))
    rows = uncovered([unseen], up, anywhere).nonzero()[:, 2]
    assert len(rows) and rows.max() < floor
    assert uncovered([outwards], down, anywhere).nonzero()[:, 2].max() > floor
    unseen.body[2] = 0  # and without a shoulder it may be anywhere at all
    assert not uncovered([unseen], up, anywhere).any()


# ---- The person, moved

SIDE = 256


def scene(identity: int = 0, **changes) -> tuple[np.ndarray, Pose, np.ndarray]:
    """A puppet's picture, its pose and which pixels it covers, in the first pose of a dance or a changed one."""
    puppet = random_puppet(identity)
    state = replace(motion(2 * identity, 1)[0], **changes)
    image, person = render(puppet, state, SIDE)[::2]
    return image, pose_of(puppet, state), person


def empty_room(identity: int = 0) -> np.ndarray:
    """The puppet's background: the median of many frames, in each of which it stands elsewhere."""
    steps = np.linspace(-0.45, 0.45, 9)
    return np.median([scene(identity, root=float(step))[0] for step in steps], axis=0).astype(np.uint8)


EVERYWHERE = torch.ones(1, SIDE // 4, SIDE // 4, dtype=torch.bool)  # in latent pixels


def test_the_person_is_cut_out_along_the_edge():
    image, pose, person = scene()
    seen, room = image_tensor(image)[0], image_tensor(empty_room())[0]
    known = torch.ones(1, SIDE, SIDE, dtype=torch.bool)
    masks = part_masks(pose, SIDE, SIDE)
    opacity = cut_out(seen, room, known, masks)[0].numpy()
    assert opacity[person].mean() > 0.99 and opacity[~person].mean() < 0.04
    # where the room is a bad guess, as it may be near somebody who never goes away, colours tell
    known[:, :, SIDE // 4 : -SIDE // 4] = False
    guess = torch.where(known, room, 1 - room)
    opacity = cut_out(seen, guess, known, masks)[0].numpy()
    assert opacity[person].mean() > 0.95 and opacity[~person].mean() < 0.1
    # before a wall that looks the same only what is well inside is known to be the person
    flat = torch.full((3, SIDE, SIDE), 0.5)
    inside = cut_out(flat, flat, torch.ones_like(known), masks)[0].numpy()
    assert inside[~person].mean() < 0.01 and inside[person].mean() > 0.1


def test_a_person_moved_part_by_part_is_nearly_the_true_one():
    image, pose, _ = scene()
    bend = {"shoulder": (1.2, 1.9), "elbow": (0.3, 0.5), "neck": 0.15, "root": 0.1}
    truth, target, person = scene(**bend)
    room = empty_room()
    (moved, still), _ = pseudo_video(image[None], [pose], 0, [target, pose], room, EVERYWHERE)
    assert psnr(still[None], image[None]) > 35, "where nothing moves it is the frame itself"
    whole, before = (psnr(each[None], truth[None], person[None]) for each in (moved, image))
    assert whole > 19 and whole > before + 6
    away = ~person & ~scene()[2]
    assert psnr(moved[None], truth[None], away[None]) > 35
    (nobody,), shown = pseudo_video(image[None], [pose], 0, [Pose()], room, ~EVERYWHERE)
    assert np.array_equal(nobody, room) and not shown.any()
    _, shown = pseudo_video(image[None], [pose], 0, [pose], room, ~EVERYWHERE)
    mask = scene()[2].reshape(SIDE // 4, 4, SIDE // 4, 4)
    assert shown[0, 0].numpy()[mask.all((1, 3))].mean() > 0.99, "all that covers the person is"
    assert shown[0, 0].numpy()[~mask.any((1, 3))].mean() < 0.15


def test_head_and_hands_come_from_the_frame_where_they_look_most_alike():
    shut, shut_pose, _ = scene(mouth=0.0, curl=((1.1,) * 5,) * 2)
    gaping, open_pose, _ = scene(mouth=1.0, curl=((0.1,) * 5,) * 2)
    truth, target, _ = scene(mouth=0.9, curl=((0.15,) * 5,) * 2, root=0.08)
    room = empty_room()
    both, _ = pseudo_video(np.stack([shut, gaping]), [shut_pose, open_pose], 0, [target], room, EVERYWHERE)
    one, _ = pseudo_video(shut[None], [shut_pose], 0, [target], room, EVERYWHERE)
    for name in ("face", "left_hand", "right_hand"):
        x, y = latent_points(getattr(target, name), SIDE, SIDE).round().astype(int).T
        box = np.zeros((1, SIDE, SIDE), bool)
        box[0, y.min() : y.max() + 1, x.min() : x.max() + 1] = True
        assert psnr(both, truth[None], box) > psnr(one, truth[None], box) + 1, name


def test_what_no_map_takes_from_the_lender_is_the_references():
    image, pose, person = scene()
    shoulderless = deepcopy(pose)
    shoulderless.body[2] = 0  # its face and hands alone could be moved
    frames, room = np.stack([image, image]), empty_room()
    for k, poses in enumerate(([pose, shoulderless], [shoulderless, pose])):
        (moved,), _ = pseudo_video(frames, poses, k, [pose], room, EVERYWHERE)
        assert psnr(moved[None], image[None], person[None]) > 30


def test_each_pose_is_searched_for_its_parts_once_however_many_frames_lend(monkeypatch):
    poses, calls = [scene()[1], scene(mouth=1.0)[1]], []
    monkeypatch.setattr("beyond.pseudo.part_masks", lambda *a: calls.append(a[0]) or part_masks(*a))
    frames = np.stack([scene()[0], scene(mouth=1.0)[0]])
    pseudo_video(frames, poses, 0, poses * 3, empty_room(), EVERYWHERE)
    assert 2 <= len(calls) <= 4, "once to choose lenders, and once to cut out each that lends"


def test_a_part_moves_as_far_as_it_is_opaque():
    pose = standing()
    (forearm,) = (part for part in body_parts(pose, pose, 32, 32) if part.name == "right_forearm")
    opacity = torch.zeros(1, 32, 32)
    opacity[:, 20:] = 0.5
    image, other = torch.zeros(3, 32, 32), torch.full((3, 32, 32), 4.0)
    assert move(image, other, forearm, opacity)
    x, y = forearm.pixels.T
    expected = torch.zeros(32, 32)
    expected[y, x] = 4 * torch.from_numpy(forearm.weight).float() * opacity[0, y, x]
    assert expected[:20].max() == 0 < expected.max()
    assert torch.allclose(image, expected.expand(3, -1, -1), atol=1e-5)
    before = image.clone()
    assert move(image, other, forearm, 0 * opacity), "it is read, and transparent"
    assert torch.equal(image, before)


def test_landmarks_are_compared_by_their_shape():
    _, pose, _ = scene()
    elsewhere = place_pose(pose, 0.5, 0.5, 0.3, 0.1)
    assert unlikeness(pose.face, elsewhere.face, SIDE, SIDE) < 1e-6
    _, gaping, _ = scene(mouth=1.0)
    assert unlikeness(pose.face, gaping.face, SIDE, SIDE) > 0.01
    partly = deepcopy(gaping.face)
    partly[:7] = 0
    assert unlikeness(pose.face, partly, SIDE, SIDE) > 0.1, "seven landmarks are missing"
    assert unlikeness(pose.face, np.zeros((70, 3), np.float32), SIDE, SIDE) == math.inf


def test_a_hand_before_the_body_or_outside_the_frame_is_hidden():
    def how_hidden(pose: Pose, lent: str) -> float:
        return hidden(pose, part_masks(pose, SIDE, SIDE))[lent]

    _, pose, _ = scene()
    aside = how_hidden(pose, "left_hand")
    before = deepcopy(pose)
    chest = pose.body[[2, 5, 8, 11], :2].mean(axis=0)
    before.left_hand[:, :2] += chest - before.left_hand[:, :2].mean(axis=0)
    outside = deepcopy(pose)
    outside.left_hand[:, 0] += 1
    assert aside < 0.3 < 0.9 < how_hidden(before, "left_hand")
    assert how_hidden(outside, "left_hand") == 1 == how_hidden(Pose(), "face")
    raised = deepcopy(pose)
    raised.body[6:8, :2] = raised.body[0, :2] + ((0.2, 0.1), (0, -0.05))  # a forearm before the head
    assert how_hidden(pose, "head") < how_hidden(raised, "head")


# ---- What sampling is held to


def test_what_is_nearly_the_pseudo_video_becomes_it():
    pseudo = torch.randn(2, 4, 32, 32)
    finished = pseudo + 0.1
    finished[:, :, :8, :8] = pseudo[:, :, :8, :8] + 1.5  # something else, which networks made
    where = torch.ones(2, 1, 32, 32)
    where[:, :, -3:] = 0
    restored = finished.clone()
    restore(restored, pseudo, where)
    assert torch.equal(restored[:, :, :7, :7], finished[:, :, :7, :7])
    assert torch.equal(restored[:, :, -3:], finished[:, :, -3:])
    assert torch.allclose(restored[:, :, 10:-3, 10:], pseudo[:, :, 10:-3, 10:])
    half = pseudo + sum(ALIKE) / 2
    restore(half, pseudo, torch.ones(2, 1, 32, 32))
    assert torch.allclose(half - pseudo, torch.tensor(sum(ALIKE) / 4), atol=1e-3)


DOWN, OUTWARDS = standing((0.3, 0.75)), standing((0.05, 0.5))
OLD, NEW = (latent_points(p.body, 32, 32)[[3, 4]].mean(0).round().astype(int) for p in (DOWN, OUTWARDS))


def forearm(edits, step: int | None) -> tuple[float, float]:
    """What is at its old and its new place before a step of a clip of -9; None: after the last."""
    latents = torch.full((1, 4, 32, 32), -9.0)
    if step is None:
        edits.finish(latents)
    else:
        edits.before_step(latents, step)
    return tuple(latents[0, 0, y, x].item() for x, y in (OLD, NEW))


def trajectory(noise: float) -> list[torch.Tensor]:
    """Of 4 steps, at 751 to 1: an image of ones, and the same noise everywhere."""
    levels = ALPHAS_CUMPROD[[1, 251, 501, 751]].tolist()
    noisy = [torch.full((1, 4, 32, 32), a**0.5 + noise * (1 - a) ** 0.5) for a in levels]
    return [torch.ones(1, 4, 32, 32), *noisy]


def a_scene(reference_pose: Pose = DOWN, edit_step: int = 2, steps=None) -> EditInputs:
    run = SimpleNamespace(frames=None, poses=[reference_pose])
    return EditInputs(None, run, 0, [OUTWARDS], steps or trajectory(0.5), body_parts, edit_step, 3)


def held(monkeypatch, scene: EditInputs, pseudo: torch.Tensor, known: bool = True) -> Edits:
    """The edits that hold sampling to a pseudo video of these latents, (1, 4, 32, 32)."""
    where = torch.full((1, 32, 32), known)
    monkeypatch.setattr("beyond.pseudo.moved_person", lambda *_: (None, where[None], where))
    monkeypatch.setattr("beyond.pseudo.encode_frames", lambda *_: pseudo)
    return hold_to_pseudo_video(scene)


def test_without_a_pseudo_video_the_body_moves_once():
    steps = [torch.full((1, 4, 32, 32), float(i)) for i in range(5)]
    edits = edit_once(a_scene(steps=steps))
    assert edits.regions["right_forearm"] == 1
    assert forearm(edits, 1) == (-9, -9)
    assert forearm(edits, 2) == (-9, pytest.approx(3))
    assert forearm(edits, 3) == forearm(edits, None) == (-9, -9)


def test_sampling_is_held_to_the_pseudo_video_and_the_references_noise(monkeypatch):
    pseudo = torch.full((1, 4, 32, 32), 20.0)
    edits = held(monkeypatch, a_scene(), pseudo)
    assert edits.regions["right_forearm"] == 1
    assert forearm(edits, 1) == (-9, -9)
    for step, timestep in ((2, 501), (3, 251)):
        background, arrived = forearm(edits, step)
        a = ALPHAS_CUMPROD[timestep].item()
        assert arrived == pytest.approx(20 * a**0.5 + 0.5 * (1 - a) ** 0.5, abs=1e-3)
        assert abs(background - 20 * a**0.5) < 4 * (1 - a) ** 0.5
        assert forearm(edits, step) == (background, arrived), "the same noise each time"
    assert forearm(edits, 4) == (-9, -9), "the last steps are the networks' own"
    assert forearm(edits, None) == (-9, -9), "finished, it is nothing like the pseudo video"
    pseudo.fill_(-9.1)
    assert forearm(edits, None) == (pytest.approx(-9.1),) * 2, "or nearly, and becomes it"


def test_a_limb_that_no_map_moves_is_left_to_the_networks(monkeypatch):
    lost = deepcopy(DOWN)
    lost.body[4] = 0  # the reference shows no wrist
    edits = held(monkeypatch, a_scene(lost), torch.full((1, 4, 32, 32), 20.0))
    assert "right_forearm" not in edits.regions and edits.regions["torso"] == 1
    assert forearm(edits, 2)[1] == -9


def test_a_guess_is_held_through_the_first_steps_only(monkeypatch):
    pseudo = torch.full((1, 4, 32, 32), 20.0)
    edits = held(monkeypatch, a_scene(), pseudo, known=False)
    assert forearm(edits, 2)[1] > 0, "at 501"
    assert forearm(edits, 3)[1] == -9, "at 251"
    pseudo.fill_(-9.1)
    assert forearm(edits, None) == (-9, -9), "nor restored"


def test_what_would_never_be_held_is_moved_once(monkeypatch):
    edits = held(monkeypatch, a_scene(edit_step=4), torch.full((1, 4, 32, 32), 20.0))
    assert forearm(edits, 4)[1] == pytest.approx(trajectory(0.5)[1][0, 0, 0, 0].item(), abs=1e-3)
    assert edits.regions["right_forearm"] == 1 and forearm(edits, None) == (-9, -9)
