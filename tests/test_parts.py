"""The parts of a body: regions, maps from pose to pose, what is left out, what covers what."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from beyond.body import body_parts, far_arm, fit_rotation, may_cover
from demo.motion import motion
from demo.puppet import clip, pose_of, random_puppet
from poses.parts import fit_affine, near_hull
from poses.pose import Pose, place_pose

SIDE = 64  # latent pixels
ARM = ("upper_arm", "forearm", "hand", "fingers")


def standing(wrist: tuple[float, float] = (0.3, 0.75)) -> Pose:
    """Somebody with the right forearm from (0.3, 0.5) to `wrist`, and arms and legs that hang."""
    joints = {1: (0.5, 0.25), 2: (0.4, 0.25), 3: (0.3, 0.5), 4: wrist}
    joints |= {5: (0.6, 0.25), 6: (0.65, 0.4), 7: (0.7, 0.55)}
    joints |= {8: (0.45, 0.55), 9: (0.45, 0.7), 10: (0.45, 0.9)}
    joints |= {11: (0.55, 0.55), 12: (0.55, 0.7), 13: (0.55, 0.9)}
    pose = Pose()
    for joint, (x, y) in joints.items():
        pose.body[joint] = x, y, 1
    return pose


HAND = np.random.default_rng(3).uniform(12, 20, (21, 2))  # in latent pixels


def parts_of(pose: Pose, other: Pose) -> dict:
    return {part.name: part for part in body_parts(pose, other, SIDE, SIDE)}


def mapped(part, x: float, y: float) -> np.ndarray:
    """Where the part's map takes a canvas-normalised point, canvas-normalised."""
    point = np.array([x, y]) * SIDE - 0.5
    return (part.to_other[:, :2] @ point + part.to_other[:, 2] + 0.5) / SIDE


def weight_at(part, x: float, y: float) -> float:
    here = (part.pixels == np.round(np.array([x, y]) * SIDE - 0.5)).all(axis=1)
    return float(part.weight[here].sum())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("two points", lambda p: p[:2]),
        ("points on a line", lambda p: p * (1, 0)),
        ("one point", lambda p: p * 0),
        ("a mirrored hand", lambda p: p * (-1, 1)),
        ("a hand five times the area", lambda p: p * math.sqrt(5)),
        ("a hand a fifth of the area", lambda p: p / math.sqrt(5)),
    ],
)
def test_no_map_is_fitted_to(name, change):
    target = change(HAND)
    assert fit_affine(HAND[: len(target)], target) is None


def test_the_region_is_the_hull_grown_by_one_latent_pixel():
    square = np.array([[10, 10], [20, 10], [20, 20], [10, 20], [15, 15], [15, 10]], float)
    region = np.zeros((32, 32), bool)
    x, y = near_hull(square, 1.0, 32, 32)[0].T
    region[y, x] = True
    assert region[10:21, 10:21].all()
    assert region[9, 15] and region[21, 15] and region[15, 9] and region[15, 21]
    assert not region[9, 9]  # a corner's neighbour is sqrt(2) away
    assert not region[8, 15] and not region[15, 22]
    assert region.sum() == 11 * 11 + 4 * 11


def test_the_region_of_a_point_is_a_disc_and_of_a_line_ends_with_it():
    around = near_hull(np.array([[15, 15]], float), 2.0, 32, 32)[0]
    assert sorted(np.hypot(*(around - 15).T).round(2).tolist())[-1] == 2 and len(around) == 13
    pixels, distance = near_hull(np.array([[10, 15], [20, 15]], float), 2.0, 32, 32)
    (beyond,) = distance[(pixels == (22, 15)).all(axis=1)]
    assert beyond == 2


def plain_distance(pixels: np.ndarray, points: np.ndarray) -> np.ndarray:
    """From pixels to the convex hull of points: 0 inside any triangle of these, else to the nearest segment."""

    def cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]

    distance = np.full(len(pixels), np.inf)
    for a, b in itertools.product(points, repeat=2):
        along = ((pixels - a) @ (b - a) / max((b - a) @ (b - a), 1e-12)).clip(0, 1)
        to_segment = np.linalg.norm(pixels - a - along[:, None] * (b - a), axis=1)
        distance = np.minimum(distance, to_segment)
    for a, b, c in itertools.combinations(points, 3):
        sides = np.array([cross(q - p, pixels - p) for p, q in ((a, b), (b, c), (c, a))])
        if abs(cross(b - a, c - a)) > 1e-9:
            distance[(sides >= 0).all(axis=0) | (sides <= 0).all(axis=0)] = 0
    return distance


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("a hull", lambda p: p),
        ("a triangle", lambda p: p[:3]),
        ("a line", lambda p: p * (1, 0) + (0, 9.3)),
        ("two points", lambda p: p[:2]),
        ("one point, given twice", lambda p: p[[0, 0]]),
        ("a hull partly outside the frame", lambda p: p + (-8, 12)),
        ("a hull outside the frame, but within reach of it", lambda p: p * 0.1 + (21, 10)),
        ("a hull far outside the frame", lambda p: p + 200),
    ],
)
def test_distances_are_those_of_a_plain_search(name, change):
    height, width, reach = 18, 20, 3.3
    for seed in range(4):
        points = change(np.random.default_rng(seed).uniform(3, 16, (7, 2)))
        pixels = np.array([(x, y) for y in range(height) for x in range(width)])
        distance = plain_distance(pixels, points)
        near = distance <= reach
        assert near.any() != (name == "a hull far outside the frame")
        found = near_hull(points, reach, height, width)
        assert np.array_equal(found[0], pixels[near]), "row by row"
        assert np.allclose(found[1], distance[near], atol=1e-9)


def test_parts_that_are_not_asked_for_their_pixels_take_no_search(monkeypatch):
    searched = []
    monkeypatch.setattr("poses.parts.near_hull", lambda *a: searched.append(1) or near_hull(*a))
    pose = standing()
    forearm = parts_of(pose, pose)["right_forearm"]
    assert not searched
    assert len(forearm.pixels) == len(forearm.weight) and len(searched) == 1


def test_no_part_moves_between_equal_poses():
    _, (pose,), _ = clip(3, 6, 1)
    parts = parts_of(pose, pose)
    assert len(parts) == 5 + 2 * (4 + 2)  # hair, head, face, torso, hips; four of an arm, two of a leg
    for part in parts.values():
        assert np.abs(part.to_other - np.eye(2, 3)).max() < 1e-9
        assert 0 <= part.weight.min() and part.weight.max() == 1


def test_a_forearm_that_turns_about_its_elbow_takes_every_point_along():
    down, outwards = standing((0.3, 0.75)), standing((0.05, 0.5))
    forearm = parts_of(outwards, down)["right_forearm"]
    assert np.allclose(mapped(forearm, 0.05, 0.5), (0.3, 0.75))  # the wrist
    assert np.allclose(mapped(forearm, 0.175, 0.5), (0.3, 0.625))  # halfway
    assert np.allclose(mapped(forearm, 0.175, 0.48), (0.28, 0.625))  # above it is outside, hanging
    assert weight_at(forearm, 0.175, 0.5) == 1 and weight_at(forearm, 0.175, 0.6) == 0


def test_a_longer_bone_is_stretched_along_and_keeps_its_width():
    short, long = standing((0.3, 0.6)), standing((0.3, 0.8))
    forearm = parts_of(long, short)["right_forearm"]
    assert np.allclose(mapped(forearm, 0.3, 0.65), (0.3, 0.55))
    assert np.allclose(mapped(forearm, 0.32, 0.65), (0.32, 0.55))


def test_a_rotation_keeps_the_size_it_is_given_and_refuses_a_mirror():
    turned = HAND @ np.array([[0.6, 0.8], [-0.8, 0.6]]) + (5, -3)
    to_turned = fit_rotation(HAND, turned, 1.0)
    assert np.allclose(HAND @ to_turned[:, :2].T + to_turned[:, 2], turned)
    larger = fit_rotation(HAND, turned, 2.0)
    assert np.linalg.det(larger[:, :2]) == pytest.approx(4)
    assert np.allclose(larger[:, :2] @ HAND.mean(axis=0) + larger[:, 2], turned.mean(axis=0))
    jaw = np.array([[-3, 0], [-2, 2], [0, 3], [2, 2], [3, 0]], float)
    assert fit_rotation(jaw, jaw * (-1, 1), 1.0) is None and fit_rotation(jaw[:1], jaw[:1], 1.0) is None


def test_hair_goes_with_the_outline_of_the_head_and_the_face_with_its_landmarks():
    """A head that turns: its silhouette stays, eyes and mouth move to the side."""
    who, state = random_puppet(3), replace(motion(3, 1)[0], turn=0.0, body_turn=0.0)
    ahead, aside = (pose_of(who, replace(state, turn=turn)) for turn in (0.0, 0.4))
    parts = parts_of(aside, ahead)
    crown = 2 * ahead.face[[0, 16], :2].mean(axis=0) - ahead.face[8, :2]
    moved = np.linalg.norm((mapped(parts["hair"], *crown) - crown) * SIDE)
    nose = np.linalg.norm((mapped(parts["face"], *aside.face[30, :2]) - aside.face[30, :2]) * SIDE)
    assert moved < 1 < 1.5 < nose
    assert np.linalg.det(parts["hair"].to_other[:, :2]) == pytest.approx(1, abs=0.01)


def test_fingers_move_one_by_one():
    who, state = random_puppet(3), motion(3, 1)[0]
    flat, curled = ((0.1,) * 5,) * 2, ((0.1, 0.1, 0.4, 0.1, 0.1),) * 2
    straight, bent = (pose_of(who, replace(state, curl=curl)) for curl in (flat, curled))
    moved = [part for part in body_parts(bent, straight, SIDE, SIDE) if part.name == "left_fingers"]
    assert len(moved) == 15
    for joint, part in zip([j for first in (1, 5, 9, 13, 17) for j in range(first, first + 3)], moved):
        assert np.allclose(
            mapped(part, *bent.left_hand[joint, :2]), straight.left_hand[joint, :2], atol=1e-6
        )


def test_what_a_pose_lacks_or_foreshortens_is_left_out():
    whole, armless, shortened = standing(), standing(), standing((0.3, 0.55))
    armless.body[4] = 0
    assert parts_of(whole, whole).keys() - parts_of(whole, armless).keys() == {"right_forearm"}
    assert "right_forearm" not in parts_of(whole, shortened)  # a fifth of its length
    assert not parts_of(whole, Pose())


def test_a_speaker_filmed_to_the_waist_is_moved_as_far_as_seen():
    _, (pose,), _ = clip(3, 6, 1)
    pose.body[8:14] = 0
    whole = {"hair", "head", "face", *(f"{side}_{part}" for side in ("left", "right") for part in ARM)}
    assert parts_of(pose, pose).keys() == whole
    pose.body[2] = 0  # nor a shoulder
    assert parts_of(pose, pose).keys() == {"face", "left_hand", "right_hand"}


def test_a_hand_that_is_not_seen_goes_along_with_its_forearm():
    """Body keypoints alone are what most pose files have."""
    down, outwards = standing((0.3, 0.75)), standing((0.05, 0.5))
    forearm = parts_of(down, outwards)["right_forearm"]
    assert weight_at(forearm, 0.3, 0.87) == 1 and np.allclose(mapped(forearm, 0.3, 0.85), (-0.05, 0.5))
    _, (pose,), _ = clip(3, 6, 1)
    before = parts_of(pose, pose)
    pose.left_hand[:] = 0
    after = parts_of(pose, pose)
    assert before.keys() - after.keys() == {"left_hand", "left_fingers"}
    assert len(after["left_forearm"].pixels) > len(before["left_forearm"].pixels)
    assert len(after["right_forearm"].pixels) == len(before["right_forearm"].pixels)


def test_a_body_may_be_where_its_keypoints_do_not_tell():
    def rows(pose: Pose) -> np.ndarray:
        return may_cover(pose, SIDE, SIDE).mean(axis=1)

    whole, waist, one_knee, profile = standing(), standing(), standing(), standing()
    assert 0 < rows(whole).max() < 0.6 and rows(Pose()).max() == 0
    waist.body[[9, 10, 12, 13]] = 0
    assert rows(waist)[int(0.55 * SIDE) :].min() == 1 and rows(waist)[: SIDE // 2].max() < 0.6
    one_knee.body[[9, 10, 13]] = 0  # of the other leg more is seen
    assert rows(one_knee)[int(0.55 * SIDE) :].min() == 1
    profile.body[5] = 0
    assert rows(profile).min() == 1


def test_sizes_are_the_bodys_own():
    _, (pose,), _ = clip(3, 6, 1)
    small = place_pose(pose, 0.5, 0.5, 0.25, 0.25)
    whole, half = (list(body_parts(each, each, 512, 512)) for each in (pose, small))
    for large, part in zip(whole, half, strict=True):
        assert large.name == part.name
        assert 0.2 < part.weight.sum() / large.weight.sum() < 0.45, part.name  # a quarter, and soft edges


def test_arms_cover_the_body_and_a_turned_body_covers_its_far_arm():
    who = random_puppet(3)
    state = replace(motion(3, 1)[0], turn=0.0, body_turn=0.0)
    facing, right, left = (
        pose_of(who, replace(state, body_turn=turn, turn=turn / 2)) for turn in (0.0, 1.0, -1.0)
    )

    def order(pose: Pose) -> list[str]:
        return [part.name for part in body_parts(pose, pose, SIDE, SIDE)]

    assert order(facing).index("torso") < min(map(order(facing).index, ("right_hand", "left_hand")))
    assert order(right).index("left_hand") < order(right).index("torso") < order(right).index("right_hand")
    assert order(left).index("right_hand") < order(left).index("torso") < order(left).index("left_hand")
    assert far_arm(facing, 0.7) is None and far_arm(right, 0.3) == "left"
