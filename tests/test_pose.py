import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metrics.figures import video_sim
from poses.openpose_json import read_people
from poses.pose import (
    Pose,
    absences,
    draw_pose,
    has_person,
    is_seen,
    load_poses,
    place_pose,
    pose_distance,
    save_poses,
)

SHARED = Path(__file__).parents[2] / "shared"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(),
    reason="the reference drawings and clips, which are not in this repository, are not here",
)

NOSE = 0


def body(**points) -> Pose:
    """A pose with the body keypoints k0=(x, y), k5=(x, y, score), ..."""
    part = np.zeros((18, 3), np.float32)
    for name, point in points.items():
        part[int(name[1:])] = (*point, 1)[:3]
    return Pose(body=part)


def person(*points, parts=()) -> dict:
    """One person of an OpenPose file, with the first body keypoints as (x, y, score)."""
    flat = [number for point in points for number in point]
    return {"pose_keypoints_2d": flat + [0] * (54 - len(flat)), **dict(parts)}


def write(path: Path, content) -> Path:
    path.write_text(json.dumps(content))
    return path


def read(path: Path, width: int | None = None, height: int | None = None) -> list[Pose]:
    """The first person of every frame; `width` and `height` are those of `--canvas`."""
    people, _ = read_people(path, width and (height, width))
    return [in_frame[0] if in_frame else Pose() for in_frame in people]


def somebody(seed=0) -> Pose:
    """A pose with every keypoint seen, somewhere on the canvas."""
    random = np.random.default_rng(seed)
    return Pose(*(random.uniform(0.1, 0.9, (count, 3)).astype(np.float32) for count in (18, 70, 21, 21)))


# ------------------------------------------------------------------------------------------ files


def test_pixels_become_fractions_of_the_canvas(tmp_path):
    frame = {"people": [person((32, 16, 0.5))], "canvas_width": 64, "canvas_height": 128}
    (pose,) = load_poses(write(tmp_path / "one.json", [frame]))
    assert pose.body[NOSE].tolist() == [0.5, 0.125, 0.5]
    assert is_seen(pose.body).tolist() == [True] + [False] * 17
    assert pose.body.dtype == np.float32


def test_a_single_frame_object_is_one_frame(tmp_path):
    frame = {"people": [person((32, 16, 1))], "canvas_width": 64, "canvas_height": 64}
    assert len(load_poses(write(tmp_path / "one.json", frame))) == 1


def test_normalised_coordinates_stay_as_they_are_even_beside_a_canvas_size(tmp_path):
    # the second person stands partly outside the canvas
    frames = [
        {"people": [person((0.25, 0.75, 1))], "canvas_width": 64, "canvas_height": 64},
        {"people": [person((1.25, -0.5, 1))], "canvas_width": 64, "canvas_height": 64},
    ]
    first, second = load_poses(write(tmp_path / "poses.json", frames))
    assert first.body[NOSE].tolist() == [0.25, 0.75, 1]
    assert second.body[NOSE].tolist() == [1.25, -0.5, 1]


def test_one_frame_in_the_corner_does_not_make_a_pixel_file_normalised(tmp_path):
    frames = [{"people": [person((1, 1, 1))]}, {"people": [person((50, 50, 1))]}]
    first, _ = read(write(tmp_path / "poses.json", frames), width=100, height=50)
    np.testing.assert_allclose(first.body[NOSE], [0.01, 0.02, 1], rtol=1e-6)


def test_the_files_own_canvas_comes_before_the_arguments(tmp_path):
    path = write(
        tmp_path / "poses.json",
        [{"people": [person((50, 50, 1))], "canvas_width": 100, "canvas_height": 200}],
    )
    assert read(path, width=1, height=1)[0].body[NOSE].tolist() == [0.5, 0.25, 1]


def test_pixels_without_a_canvas_size_are_an_error_that_says_what_to_give(tmp_path):
    path = write(tmp_path / "poses.json", [{"people": []}, {"people": [person((50, 50, 1))]}])
    with pytest.raises(ValueError, match=r"poses\.json: frame 1: .*--canvas"):
        load_poses(path)


def test_a_folder_is_read_in_the_order_of_its_numbers(tmp_path):
    for number in (10, 9, 1, 100):
        write(
            tmp_path / f"clip_{number}_keypoints.json", {"version": 1.3, "people": [person((number, 5, 1))]}
        )
    poses = read(tmp_path, width=100, height=100)
    assert [round(100 * pose.body[NOSE, 0]) for pose in poses] == [1, 9, 10, 100]


def test_body_25_becomes_coco_18(tmp_path):
    points = [number for index in range(25) for number in (10 * index, 1, 1)]
    frame = {"people": [{"pose_keypoints_2d": points}], "canvas_width": 1000, "canvas_height": 100}
    (pose,) = load_poses(write(tmp_path / "poses.json", frame))
    # BODY_25 puts the mid hip at 8, before right hip 9, and the feet after left ear 18
    expected = [0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]
    assert (100 * pose.body[:, 0]).round().astype(int).tolist() == expected


def test_a_face_of_68_points_lacks_only_the_pupils(tmp_path):
    face = {"face_keypoints_2d": [10, 20, 1] * 68}
    frame = {"people": [person((50, 50, 1), parts=face)], "canvas_width": 100, "canvas_height": 100}
    (pose,) = load_poses(write(tmp_path / "poses.json", frame))
    assert is_seen(pose.face).tolist() == [True] * 68 + [False] * 2


@pytest.mark.parametrize("nothing", [None, [], [0] * 63], ids=["null", "empty", "zeros"])
def test_a_missing_hand_is_zeros(tmp_path, nothing):
    parts = {"hand_left_keypoints_2d": nothing, "face_keypoints_2d": None}
    people = [person((50, 50, 1), parts=parts)]
    frame = {"people": people, "canvas_width": 100, "canvas_height": 100}
    (pose,) = load_poses(write(tmp_path / "poses.json", frame))
    assert not pose.left_hand.any() and pose.left_hand.shape == (21, 3)
    assert not pose.right_hand.any() and not pose.face.any()


def test_a_null_or_unseen_point_is_missing_wherever_it_claims_to_be(tmp_path):
    points = [(50, 50, 1), (None, None, None), (70, 70, 0)]
    frame = {"people": [person(*points)], "canvas_width": 100, "canvas_height": 100}
    (pose,) = load_poses(write(tmp_path / "poses.json", frame))
    assert is_seen(pose.body).sum() == 1 and not pose.body[1:].any()


def test_a_frame_without_people_is_an_empty_pose(tmp_path):
    frames = [{"people": []}, {"people": [person((5, 5, 1), (9, 9, 1), (7, 2, 1))]}]
    nobody, one = read(write(tmp_path / "poses.json", frames), width=10, height=10)
    assert not has_person(nobody) and has_person(one)
    assert not draw_pose(nobody, 64, 64).any()


@pytest.mark.parametrize(
    "frame, complaint",
    [
        (
            {"people": [{"pose_keypoints_2d": [1, 2, 3]}]},
            "pose_keypoints_2d has 3 numbers instead of 54 or 75",
        ),
        ({"people": [{"face_keypoints_2d": ["a"] * 210}]}, "face_keypoints_2d is not a list of num"),
        ({"people": [[1, 2, 3]]}, '"people" is not a list of objects'),
        ({"bodies": [], "\x1b": 1}, "not an OpenPose frame, which has \"people\", but 'bodies', '\\x1b'"),
        ([1, 2], "not an OpenPose frame"),
        (
            {"people": [person((50, 50, 1))], "canvas_width": "big", "canvas_height": 9},
            "must be numbers of pixels",
        ),
    ],
)
def test_a_malformed_frame_is_named(tmp_path, frame, complaint):
    path = write(tmp_path / "poses.json", [{"people": []}, frame])
    with pytest.raises(ValueError) as error:
        load_poses(path)
    message = str(error.value)
    assert message.startswith(f"{path}: frame 1: ") and complaint in message
    assert "\n" not in message


def test_what_is_not_a_file_of_poses_is_named(tmp_path):
    (tmp_path / "half.json").write_text('[{"people": [')
    (tmp_path / "binary.json").write_bytes(bytes(range(128, 256)))
    write(tmp_path / "empty.json", [])
    (tmp_path / "folder").mkdir()
    for name, complaint in [
        ("half.json", "not readable as JSON"),
        ("binary.json", "not readable as JSON"),
        ("empty.json", "no frames"),
        ("folder", "no .json files"),
        ("absent.json", "no such file"),
    ]:
        with pytest.raises((OSError, ValueError)) as error:
            load_poses(tmp_path / name)
        message = str(error.value)
        assert message.startswith(f"{tmp_path / name}: ") and complaint in message
        assert "\n" not in message


def test_saved_poses_load_as_they_were(tmp_path):
    poses = [somebody(0), Pose(), body(k0=(0.5, 0.5), k17=(-0.1, 1.2, 0.25)), somebody(1)]
    save_poses(tmp_path / "poses.json", poses, width=1920, height=1080)
    loaded = load_poses(tmp_path / "poses.json")
    assert len(loaded) == 4
    for before, after in zip(poses, loaded):
        for name, part in vars(before).items():
            difference = np.abs(getattr(after, name) - part) * (1920, 1080, 1)
            assert difference.max() < 0.01


def test_saving_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    save_poses(tmp_path / "poses.json", [somebody()], 64, 64)
    before = (tmp_path / "poses.json").read_bytes()

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space left"):
        save_poses(tmp_path / "poses.json", [Pose()], 64, 64)
    assert (tmp_path / "poses.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["poses.json"]


@needs_shared
def test_the_dance_clip_loads_and_round_trips(tmp_path):
    poses = load_poses(SHARED / "clips" / "dance.poses.json")
    assert len(poses) == 288 and all(has_person(pose) for pose in poses)
    np.testing.assert_allclose(poses[0].body[NOSE], [147.95 / 288, 81.02 / 512, 1], rtol=1e-5)
    save_poses(tmp_path / "again.json", poses, 288, 512)
    for before, after in zip(poses, load_poses(tmp_path / "again.json")):
        assert np.abs((before.body - after.body) * (288, 512, 1)).max() < 0.01
        assert np.array_equal(is_seen(before.left_hand), is_seen(after.left_hand))


# -------------------------------------------------------------------------- people and distances


def test_two_keypoints_are_not_a_person():
    assert not has_person(body(k0=(0.5, 0.5), k1=(0.5, 0.6)))
    assert has_person(body(k0=(0.5, 0.5), k1=(0.5, 0.6), k2=(0.4, 0.6)))


def test_placing_moves_what_is_seen_and_leaves_the_rest_missing():
    placed = place_pose(body(k3=(0.5, 0.25, 0.75)), 2, 4, -0.5, 1)
    assert placed.body[3].tolist() == [0.5, 2, 0.75]
    assert not np.delete(placed.body, 3, axis=0).any() and not placed.face.any()


def test_the_distance_is_the_mean_square_over_keypoints_seen_in_both():
    a = body(k0=(0.5, 0.5), k1=(0.25, 0.5), k2=(0.9, 0.9))
    b = body(k0=(0.5, 0.25), k1=(0.75, 0.5), k3=(0.1, 0.1))
    assert pose_distance(a, b) == pytest.approx((0.25**2 + 0.5**2) / 2)
    assert pose_distance(a, b) == pose_distance(b, a)
    assert pose_distance(a, a) == 0


def test_poses_with_nothing_in_common_are_infinitely_far_apart():
    assert pose_distance(body(k0=(0.5, 0.5)), body(k1=(0.5, 0.5))) == math.inf
    assert pose_distance(Pose(), Pose()) == math.inf


def test_video_sim_sums_over_targets_the_distance_to_the_nearest_training_pose():
    training = [body(k0=(0, 0)), body(k0=(1, 0))]
    targets = [body(k0=(0.1, 0)), body(k0=(1, 0.2)), body(k0=(0.5, 0))]
    assert video_sim(targets, training) == pytest.approx(0.01 + 0.04 + 0.25)
    assert video_sim([Pose()], training) == math.inf


# ---------------------------------------------------------------------------------------- drawing


def oracle_pose() -> tuple[Pose, int, int]:
    drawn = json.loads((SHARED / "oracle" / "openpose.json").read_text())["drawn"]
    parts = [
        np.float32([(*point, 1) if point else (0, 0, 0) for point in part])
        for part in (drawn["body"], drawn["faces"][0], *drawn["hands"])
    ]
    return Pose(*parts), drawn["height"], drawn["width"]


@needs_shared
@pytest.mark.parametrize(
    "name, parts",
    [("openpose_drawn.png", {}), ("openpose_drawn_body.png", {"hands": False, "face": False})],
)
def test_the_drawing_is_the_public_annotators(name, parts):
    with Image.open(SHARED / "oracle" / name) as image:
        expected = np.asarray(image.convert("RGB")).astype(int)
    drawn = draw_pose(*oracle_pose(), **parts)
    assert drawn.shape == expected.shape and drawn.dtype == np.uint8
    different = np.abs(drawn - expected).max(axis=2) > 32
    assert different.mean() < 0.005
    # What differs is single pixels along the edges of limbs: no 2x2 block of it stands together.
    blocks = different[1:, 1:] & different[:-1, 1:] & different[1:, :-1] & different[:-1, :-1]
    assert blocks.sum() < 10


def test_every_limb_and_joint_has_openpose_s_colour_and_place():
    """The joints on a ring in index order, one limb at a time."""
    turn = np.linspace(0, 2 * np.pi, 18, endpoint=False)
    ring = np.stack([0.5 + 0.4 * np.cos(turn), 0.5 + 0.4 * np.sin(turn), np.ones(18)], 1)
    rainbow = [
        (255, 0, 0),
        (255, 85, 0),
        (255, 170, 0),
        (255, 255, 0),
        (170, 255, 0),
        (85, 255, 0),
        (0, 255, 0),
        (0, 255, 85),
        (0, 255, 170),
        (0, 255, 255),
        (0, 170, 255),
        (0, 85, 255),
        (0, 0, 255),
        (85, 0, 255),
        (170, 0, 255),
        (255, 0, 255),
        (255, 0, 170),
        (255, 0, 85),
    ]
    limbs = [
        (1, 2),
        (1, 5),
        (2, 3),
        (3, 4),
        (5, 6),
        (6, 7),
        (1, 8),
        (8, 9),
        (9, 10),
        (1, 11),
        (11, 12),
        (12, 13),
        (1, 0),
        (0, 14),
        (14, 16),
        (0, 15),
        (15, 17),
    ]
    for limb, (start, end) in enumerate(limbs):
        part = np.zeros((18, 3), np.float32)
        part[[start, end]] = ring[[start, end]]
        image = draw_pose(Pose(body=part), 512, 512)
        for joint in (start, end):
            x, y = (512 * part[joint, :2]).astype(int)
            assert tuple(image[y, x]) == rainbow[joint]
        x, y = (512 * part[[start, end], :2].mean(axis=0)).astype(int)
        assert np.abs(image[y, x] - 0.6 * np.array(rainbow[limb])).max() <= 1


def test_hands_and_face_can_be_left_out():
    pose = somebody()
    without = draw_pose(pose, 128, 128, hands=False, face=False)
    assert np.array_equal(without, draw_pose(Pose(body=pose.body), 128, 128))
    assert not np.array_equal(without, draw_pose(pose, 128, 128, face=False))
    assert not np.array_equal(without, draw_pose(pose, 128, 128, hands=False))


def test_small_canvases_show_the_large_drawing_reduced():
    pose = somebody()
    large = draw_pose(pose, 512, 512).reshape(128, 4, 128, 4, 3).mean(axis=(1, 3))
    assert np.abs(draw_pose(pose, 128, 128) - large).max() <= 1


def test_lines_grow_with_canvases_whose_short_side_is_above_512():
    pose = body(k1=(0.5, 0.2), k8=(0.5, 0.8))
    widths = {size: int(draw_pose(pose, size, size)[size // 2].any(axis=1).sum()) for size in (512, 1024)}
    assert 7 <= widths[512] <= 9 and 14 <= widths[1024] <= 18


def test_points_outside_the_canvas_are_cut_off_and_not_moved_in():
    inside = body(k0=(0.5, 0.5), k1=(0.5, 0.9))
    outside = body(k0=(0.5, 0.5), k1=(0.5, 0.9), k16=(1.5, 0.5), k17=(0.5, -3))
    assert np.array_equal(draw_pose(inside, 96, 160), draw_pose(outside, 96, 160))
    far = Pose(*(part * np.float32([1e30, -1e30, 1]) for part in vars(somebody()).values()))
    assert draw_pose(far, 64, 64).shape == (64, 64, 3)


def test_the_bones_of_a_hand_are_as_wide_as_opencv_draws_them():
    cv2 = pytest.importorskip("cv2")
    hand = np.zeros((21, 3), np.float32)
    hand[[0, 1]] = (0.25, 0.25, 1), (0.75, 0.5, 1)
    drawn = draw_pose(Pose(left_hand=hand), 512, 512)
    expected = np.zeros((512, 512, 3), np.uint8)
    cv2.line(expected, (128, 128), (384, 256), (255, 0, 0), 2)
    for joint in ((128, 128), (384, 256)):
        cv2.circle(expected, joint, 4, (0, 0, 255), -1)
    different = (drawn != expected).any(axis=2).sum()
    assert different < 0.15 * expected.any(axis=2).sum()


def test_a_hand_half_off_the_canvas_is_drawn_where_it_is_on_it():
    hand = np.stack([np.linspace(0.8, 1.2, 21), np.full(21, 0.5), np.ones(21)], axis=1)
    image = draw_pose(Pose(left_hand=hand.astype(np.float32)), 512, 512)
    assert image[256, 412].any() and not image[:, :380].any()


def test_drawing_a_small_canvas_takes_milliseconds():
    pose = somebody()
    draw_pose(pose, 128, 128)
    best = math.inf
    for _ in range(10):
        start = time.perf_counter()
        draw_pose(pose, 128, 128)
        best = min(best, time.perf_counter() - start)
    assert best < 0.008


CASES = Path(__file__).parents[2] / "shared" / "cases"


@pytest.mark.skipif(not CASES.exists(), reason="needs the small inputs that went wrong")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("deep100k.json", "nested too deep"),
        ("deep_in_people.json", "nested too deep"),
        ("canvas_1e400.json", "must be numbers of pixels"),
        ("canvas_true.json", "must be numbers of pixels"),
        ("esc.json", "is not a list of numbers"),
    ],
)
def test_files_that_no_detector_writes_are_refused_in_one_line(name, words):
    with pytest.raises(ValueError, match=rf"{name}: .*{words}") as refused:
        read(CASES / name, 512, 512)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 200


@pytest.mark.parametrize("value", [1e30, -1e30, math.inf, math.nan, 99_999])
def test_one_wild_point_is_not_seen_and_a_line_says_so(tmp_path, capsys, value):
    pose = Pose(body=np.array([(0.1 + 0.04 * i, 0.5, 1) for i in range(18)], np.float32))
    save_poses(tmp_path / "poses.json", [pose] * 3, 100, 100)
    frames = json.loads((tmp_path / "poses.json").read_text())
    frames[1]["people"][0]["pose_keypoints_2d"][3 * 4] = value
    (tmp_path / "poses.json").write_text(json.dumps(frames))
    loaded = load_poses(tmp_path / "poses.json")
    assert [int(is_seen(pose.body).sum()) for pose in loaded] == [18, 17, 18]
    assert (
        "1 keypoints lie far off the canvas and count as not seen: in frames 1" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "points", [np.full((18, 2), 1e30), np.full((18, 2), -500), np.zeros((18, 2)), np.full((18, 2), 0.4)]
)
def test_points_that_make_no_body_are_nobody(tmp_path, points):
    body = np.concatenate([points, np.ones((18, 1))], axis=1)
    person = {"pose_keypoints_2d": body.ravel().tolist()}
    (tmp_path / "poses.json").write_text(json.dumps([{"people": [person]}] * 2))
    assert absences(read(tmp_path / "poses.json", 512, 512)) == "0-1"
