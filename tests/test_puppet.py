"""The demo's puppets: what they promise to whoever trains or tests on them."""

from dataclasses import replace

import numpy as np
import pytest

from demo.motion import DANCES, State, motion
from demo.puppet import CLOTH_COLOURS, HAIR_COLOURS, caption, clip, random_puppet, render

# arms out, mouth shut, looking straight ahead
STAR = State(
    root=0,
    hop=0,
    lean=0,
    sway=0,
    shrug=0,
    neck=0,
    turn=0,
    nod=0,
    shoulder=(1.3, 1.3),
    elbow=(0, 0),
    wrist=(0, 0),
    hip=(0.2, 0.2),
    knee=(0, 0),
    foot=(0.5, 0.5),
    curl=((0.0,) * 5, (0.0,) * 5),
    spread=(0.2, 0.2),
    mouth=0,
    smile=0,
    blink=0,
    brow=0,
    gaze=(0, 0),
)
NECK, RIGHT_WRIST, LEFT_WRIST, RIGHT_HIP, LEFT_HIP, RIGHT_EAR = 1, 4, 7, 8, 11, 16
BONES = ((1, 2), (2, 3), (3, 4), (1, 5), (5, 6), (6, 7), (8, 9), (9, 10), (11, 12), (12, 13), (8, 11))


def pixels(array, points):
    """The values of an (S, S, ...) array under canvas-normalised points (N, >=2)."""
    columns, rows = np.clip((points[:, :2] * len(array)).astype(int), 0, len(array) - 1).T
    return array[rows, columns]


def nearest_word(rgb, colours):
    return min(colours, key=lambda word: np.linalg.norm(np.subtract(colours[word], rgb)))


def test_the_same_seeds_give_the_same_clip_and_other_seeds_another():
    frames, poses, masks = clip(3, 5, 4)
    again, _, _ = clip(3, 5, 4)
    assert frames.shape == (4, 128, 128, 3) and frames.dtype == np.uint8
    assert masks.shape == (4, 128, 128) and masks.dtype == bool and len(poses) == 4
    assert np.array_equal(frames, again)
    assert not np.array_equal(frames, clip(4, 5, 4)[0])
    assert not np.array_equal(frames, clip(3, 6, 4)[0])


def test_a_longer_dance_begins_like_a_shorter_one():
    assert motion(8, 20)[:6] == motion(8, 6)


def test_the_pose_has_all_points_in_their_places_and_only_ears_can_be_unseen():
    for seed in range(12):
        _, pose, _ = render(random_puppet(seed), motion(seed, 3)[2])
        assert [len(p) for p in (pose.body, pose.face, pose.left_hand, pose.right_hand)] == [18, 70, 21, 21]
        assert all(p.dtype == np.float32 for p in (pose.body, pose.face, pose.left_hand))
        assert (pose.body[:RIGHT_EAR, 2] == 1).all() and (pose.face[:, 2] == 1).all()
        assert (pose.left_hand[:, 2] == 1).all() and (pose.right_hand[:, 2] == 1).all()


def test_the_right_side_of_the_puppet_is_the_left_of_the_picture():
    _, pose, _ = render(random_puppet(1), STAR)
    assert pose.body[RIGHT_WRIST, 0] < pose.body[NECK, 0] < pose.body[LEFT_WRIST, 0]
    assert np.array_equal(pose.right_hand[0], pose.body[RIGHT_WRIST])
    assert np.array_equal(pose.left_hand[0], pose.body[LEFT_WRIST])
    assert (np.diff(pose.face[:17, 0]) > 0).all()  # the jaw from the right ear to the left
    assert pose.face[68, 0] < pose.face[30, 0] < pose.face[69, 0]  # right pupil, nose, left pupil
    # palms face the camera, so with arms out the thumbs point up
    assert pose.right_hand[4, 1] < pose.right_hand[20, 1]
    assert pose.left_hand[4, 1] < pose.left_hand[20, 1]


@pytest.mark.parametrize("seed", range(8))
def test_every_keypoint_lies_on_the_puppets_own_pixels(seed):
    for state in motion(seed, 40)[::13]:
        _, pose, mask = render(random_puppet(seed), state, size=256)
        for part in (pose.body, pose.left_hand, pose.right_hand, pose.face[17:]):
            inside = (part[:, 2] > 0) & (part[:, :2] > 0).all(1) & (part[:, :2] < 1).all(1)
            assert pixels(mask, part[inside]).all()


def test_fingers_are_skin_pupils_are_dark_and_the_mask_covers_no_background():
    for seed in range(6):
        puppet = replace(random_puppet(seed), glasses=False)
        frame, pose, mask = render(puppet, STAR, size=512)
        for hand in (pose.left_hand, pose.right_hand):
            off = np.abs(pixels(frame, hand[1:]).astype(int) - puppet.skin).max(1)
            assert np.mean(off <= 8) > 0.9
        assert pixels(frame, pose.face[68:]).max() < 60
        assert not mask[:, :3].any() and 0.08 < mask.mean() < 0.3


def test_outside_the_puppet_nothing_ever_changes():
    frames, _, masks = clip(11, 11, 12)
    near = np.any([np.roll(masks, (dy, dx), (1, 2)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)], 0)
    for frame, covered in zip(frames[1:], near[1:]):
        free = ~(covered | near[0])
        assert free.mean() > 0.5
        assert np.array_equal(frame[free], frames[0][free])


def test_the_caption_tells_the_true_colours():
    for seed in range(40):
        puppet = replace(random_puppet(seed), shirt_pattern="plain")
        frame, pose, _ = render(puppet, STAR)
        hips = pose.body[[RIGHT_HIP, LEFT_HIP], :2]
        chest = 0.5 * pose.body[NECK, :2] + 0.5 * hips.mean(0)
        knee_ward = hips + 0.3 * (pose.body[[9, 12], :2] - hips)
        words = caption(puppet)
        shirt = nearest_word(pixels(frame, chest[None])[0], CLOTH_COLOURS)
        lower = nearest_word(pixels(frame, knee_ward)[0], CLOTH_COLOURS)
        assert f", {shirt} shirt," in words
        assert f", {lower} {puppet.lower_garment}" in words
        hair = nearest_word(puppet.hair.rgb, HAIR_COLOURS)
        assert f", {hair} hair," in words or (puppet.hair_shape == "bald" and ", bald," in words)


def test_a_striped_shirt_is_called_striped():
    puppet = replace(random_puppet(0), shirt_pattern="striped")
    assert caption(puppet).count("striped shirt") == 1
    assert "striped" not in caption(replace(puppet, shirt_pattern="emblem"))


def test_bones_keep_their_lengths_while_the_puppet_dances():
    _, poses, _ = clip(2, 9, 24)
    body = np.stack([pose.body[:, :2] for pose in poses])
    for a, b in BONES:
        length = np.linalg.norm(body[:, a] - body[:, b], axis=1)
        assert np.ptp(length) < 1e-5 and length[0] > 0.03


def test_dances_are_large_and_smooth():
    travel = []
    for seed in range(16):
        puppet = random_puppet(seed)
        poses = [render(puppet, state, size=8)[1] for state in motion(seed, 36)]
        body = np.stack([pose.body[:, :2] for pose in poses])
        assert np.linalg.norm(np.diff(body, axis=0), axis=-1).max() < 0.1
        travel.append(np.ptp(body[:, [RIGHT_WRIST, LEFT_WRIST]], axis=0).max(-1).mean())
    assert np.mean(travel) > 0.2  # within three seconds a wrist crosses a fifth of the canvas


def test_the_lower_foot_stands_on_the_floor_and_the_whole_puppet_fits():
    for seed in range(20):
        _, _, mask = render(random_puppet(seed), STAR)
        rows = np.flatnonzero(mask.any(1))
        assert 0.72 < np.ptp(rows) / 128 < 0.92 and rows[0] > 0 and rows[-1] < 127
        assert abs(rows[-1] / 128 - 0.955) < 0.02


def test_the_face_follows_its_state():
    puppet = random_puppet(6)

    def face(**changes):
        return render(puppet, replace(STAR, **changes), size=8)[1].face

    def mouth_gap(points):
        return points[66, 1] - points[62, 1]

    def eye_gap(points):
        return points[41, 1] - points[37, 1]

    assert mouth_gap(face(mouth=1.0)) > 3 * mouth_gap(face())
    assert eye_gap(face(blink=1.0)) < 0.2 * eye_gap(face())
    assert face(turn=0.4)[30, 0] > face()[30, 0] > face(turn=-0.4)[30, 0]
    assert face(smile=1.0)[48, 1] < face(smile=-0.4)[48, 1]  # its corner of the mouth is higher
    assert (face(brow=1.0)[17:27, 1] < face()[17:27, 1]).all()
    assert face(gaze=(0.9, 0))[68, 0] > face()[68, 0]


def test_a_pose_does_not_depend_on_the_size_of_the_picture():
    puppet, state = random_puppet(7), motion(7, 5)[4]
    assert np.array_equal(render(puppet, state, 64)[1].face, render(puppet, state, 128)[1].face)


def test_other_dances_are_the_same_but_for_the_turn_or_the_arms():
    facing, turning, crossed = (motion(4, 24, dance=dance) for dance in DANCES)
    for a, b, c in zip(facing, turning, crossed):
        assert replace(b, turn=a.turn, body_turn=0.0) == a
        assert replace(c, shoulder=a.shoulder, elbow=a.elbow) == a
    assert np.ptp([state.body_turn for state in turning]) > 0.8


def test_a_turned_puppet_is_slimmer_and_hides_its_far_arm():
    puppet = replace(random_puppet(4), sleeve=0.16)
    akimbo = replace(STAR, shoulder=(0.3, 0.3), elbow=(-1.4, -1.4))  # forearms over the belly
    _, front, _ = render(puppet, akimbo)
    for turn in (1.0, -1.0):
        frame, pose, _ = render(puppet, replace(akimbo, body_turn=turn), 256)
        width = abs(pose.body[2, 0] - pose.body[5, 0])
        facing = abs(front.body[2, 0] - front.body[5, 0])
        assert width == pytest.approx(np.cos(turn) * facing, rel=1e-3)
        assert np.allclose(pose.body[2:14, 1], front.body[2:14, 1], atol=1e-6)
        hands = [pose.right_hand, pose.left_hand]  # a puppet turned to our right has the right one near
        near, far = hands if turn > 0 else hands[::-1]
        off = [np.abs(pixels(frame, hand).astype(int) - puppet.skin).max(1) for hand in (near, far)]
        assert np.mean(off[0]) < 20 < 30 < np.mean(off[1])
