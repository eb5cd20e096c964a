"""Whose poses are followed as they are, and whose are retargeted."""

import json
from argparse import Namespace
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from beyond.follow import distances, follow, says_whose
from beyond.hands import bring_hands
from demo.motion import motion
from demo.puppet import pose_of, random_puppet
from poses.pose import Pose, load_poses, place_pose, save_poses
from poses.source import read_driver, uniform_frames
from safe.settings import hash_inputs, mark_of

SIZE = 192
HELD_OUT = range(20, 40)  # the bounds were chosen on the puppets 0 to 19


def dance(puppet: int, number: int, frames: int = 36) -> list[Pose]:
    return [pose_of(random_puppet(puppet), state) for state in motion(number, frames)]


def run_of(clip: list[Pose]) -> SimpleNamespace:
    """A run that was trained on 8 frames of a clip with these poses."""
    numbers = uniform_frames(range(len(clip)), 8)
    frames = np.random.default_rng(0).integers(0, 255, (8, SIZE, SIZE, 3), np.uint8)
    settings = {"clip": "clip.mp4", "poses": None, "frames": numbers}
    return SimpleNamespace(frames=frames, poses=[clip[number] for number in numbers], settings=settings)


def followed(path, run, retarget=None, within=None) -> tuple[list[Pose], dict | None]:
    args = Namespace(poses=path, retarget=retarget, poses_are=None, person=1, canvas=None)
    return follow(args, run, read_driver(path, within=within))[:2]


def arm_raised(pose: Pose, by: float = 0.12) -> Pose:
    """The pose as an editor leaves it that moves single points: the left elbow and wrist are higher."""
    body = pose.body.copy()
    body[[6, 7], 1] -= by / 2, by
    return replace(pose, body=body)


def bent(pose: Pose) -> Pose:
    """The pose in other proportions: half as wide."""
    return place_pose(pose, 0.5, 1, 0.25, 0)


def moved(poses: list[Pose], others: list[Pose]) -> np.ndarray:
    """How far keypoints of the body that both show lie apart, in pixels."""
    return np.concatenate([distances(*pair, 1.0) * SIZE for pair in zip(poses, others)])


@pytest.mark.parametrize("kind", ["a result's", "the clip's", "the training frames'"])
def test_edits_of_own_poses_move_nothing_else(tmp_path, capsys, kind):
    clip = dance(0, 0)
    run = run_of(clip)
    # Without its mark the result would be called another puppet's.
    poses = {"a result's": dance(66, 7, 12), "the clip's": clip, "the training frames'": run.poses}[kind]
    said = {"proportions_of": mark_of(run.frames)} if kind != "the clip's" else {}
    edited = [arm_raised(pose) if frame in (3, 4) else pose for frame, pose in enumerate(poses)]
    save_poses(tmp_path / "poses.json", edited, SIZE, SIZE, **said)
    result, ratios = followed(tmp_path / "poses.json", run)
    assert ratios is None and moved(result, edited).max() < 0.01
    assert "retargeted" not in capsys.readouterr().out


def test_the_clips_poses_are_known_in_a_range_without_training_frames(tmp_path):
    clip = dance(66, 7)
    save_poses(tmp_path / "poses.json", clip, SIZE, SIZE)
    run = run_of(clip[:18])
    run.poses = [bent(pose) for pose in run.poses[:3]] + run.poses[3:]  # edited, or another's proportions
    result, ratios = followed(tmp_path / "poses.json", run, within=range(20, 30))
    assert ratios is None and moved(result, clip[20:30]).max() < 0.01


def test_another_puppet_is_retargeted_in_one_line(tmp_path, capsys):
    run, poses = run_of(dance(0, 0)), dance(66, 7, 12)
    for said in ({}, {"proportions_of": "0123456789ab"}):
        save_poses(tmp_path / "poses.json", poses, SIZE, SIZE, **said)
        result, ratios = followed(tmp_path / "poses.json", run)
        assert moved(result, poses).mean() > 2
        told = capsys.readouterr().out
        assert told.count("\n") == 1 and "retargeted to the person's proportions" in told
        assert f"overall x{ratios['scale']:.2f}; --no-retarget follows the poses literally" in told
    result, ratios = followed(tmp_path / "poses.json", run, retarget=False)
    assert ratios is None and moved(result, poses).max() < 0.01 and not capsys.readouterr().out


def test_poses_that_do_not_say_whose_they_are_are_told_by_their_proportions(tmp_path, capsys):
    """Held-out puppets are known again in another dance, though poses are found with errors of 0.6 pixels."""
    random = np.random.default_rng(0)

    def found(*of: int) -> list[Pose]:
        poses = dance(*of)
        for pose in poses:
            for part in vars(pose).values():
                part[:, :2] += random.normal(0, 0.6 / SIZE, (len(part), 2))
        return poses

    literally = {True: 0, False: 0}  # of the same puppet and of others
    for number in HELD_OUT[::5]:
        run = run_of(found(number, number, 36))
        for driver in (number, number + 40):
            save_poses(tmp_path / "poses.json", found(driver, number + 100, 24), SIZE, SIZE)
            literally[driver == number] += not followed(tmp_path / "poses.json", run)[1]
    assert literally[True] == 4 and literally[False] <= 1
    assert "followed literally; --retarget overrules that" in capsys.readouterr().out


def test_own_poses_are_retargeted_where_that_is_asked_for(tmp_path):
    clip = dance(0, 0)
    save_poses(tmp_path / "poses.json", clip, SIZE, SIZE)
    assert followed(tmp_path / "poses.json", run_of(clip), retarget=True)[1]


@pytest.mark.parametrize("wrap", [lambda frames: [frames], lambda frames: {"frames": frames}])
def test_a_mark_counts_in_every_layout_that_is_read(tmp_path, wrap):
    path = tmp_path / "poses.json"
    save_poses(path, dance(0, 0), SIZE, SIZE, proportions_of="0123456789ab")
    path.write_text(json.dumps(wrap(json.loads(path.read_text()))))
    assert says_whose(path) == {"0123456789ab"}


def test_the_mark_changes_no_hash_of_a_run(tmp_path):
    run = run_of(dance(0, 0))
    texts = []
    for said in ({}, {"proportions_of": mark_of(run.frames)}):
        save_poses(tmp_path / "poses.json", run.poses, SIZE, SIZE, **said)
        texts.append((tmp_path / "poses.json").read_bytes())
    assert texts[0] != texts[1] and len({hash_inputs(run.frames, text) for text in texts}) == 1
    assert len(load_poses(tmp_path / "poses.json")) == 8


# ---- Hands --------------------------------------------------------------------------------------


def test_a_hand_comes_along_with_a_wrist_that_was_moved(tmp_path, capsys):
    clip = dance(0, 0)
    edited = [arm_raised(pose, 0.2) if frame in (3, 4) else pose for frame, pose in enumerate(clip)]
    save_poses(tmp_path / "poses.json", edited, SIZE, SIZE)
    result, _ = followed(tmp_path / "poses.json", run_of(clip))
    assert "hands that were not at their wrists are brought there: in frames 3-4" in capsys.readouterr().out
    for frame, (pose, before) in enumerate(zip(result, clip)):
        hand, old = pose.left_hand, before.left_hand
        if frame in (3, 4):
            assert np.abs(hand[0, :2] - pose.body[7, :2]).max() < 1e-3
            sizes = [np.linalg.norm(part[1:, :2] - part[0, :2], axis=1) for part in (hand, old)]
            assert np.allclose(*sizes, atol=1e-4)
        else:
            assert np.abs(hand - old).max() < 1e-4
        assert np.abs(pose.right_hand - before.right_hand).max() < 1e-4


def test_a_hand_turns_with_its_forearm():
    poses = dance(0, 0, 8)
    elbow, wrist = poses[2].body[6, :2], poses[2].body[7, :2]
    body, turn = poses[2].body.copy(), np.array([[0, 1], [-1, 0]])
    body[7, :2] = elbow + (wrist - elbow) @ turn
    brought, frames = bring_hands([*poses[:2], replace(poses[2], body=body), *poses[3:]], 1.0)
    expected = elbow + (poses[2].left_hand[:, :2] - elbow) @ turn
    assert frames == [2] and np.abs(brought[2].left_hand[:, :2] - expected).max() < 1e-4


@pytest.mark.parametrize("off", [0.0, 0.3])
def test_hands_as_detectors_find_them_stay(off):
    poses = dance(0, 0, 8)
    forearm = random_puppet(0).forearm
    poses = [replace(pose, left_hand=pose.left_hand + np.float32([off * forearm, 0, 0])) for pose in poses]
    assert bring_hands(poses, 1.0) == (poses, [])


def test_hands_without_arms_and_arms_without_hands_stay():
    poses = [Pose(left_hand=pose.left_hand) for pose in dance(0, 0, 2)]
    poses += [Pose(body=pose.body) for pose in dance(0, 0, 2)]
    assert bring_hands(poses, 1.0) == (poses, [])
