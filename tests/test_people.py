"""Poses that somebody gave: who is followed through them, in which units and layouts they come."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from demo.puppet import clip
from poses.openpose_json import missing_numbers
from poses.people import INTERPOLATED, follow_given
from poses.pose import KEYS, Pose, absences, is_seen, load_poses, place_pose, poses_text, save_poses
from poses.source import read_driver

WIDTH, HEIGHT, COUNT = 288, 512, 24
CASES = Path(__file__).parents[2] / "shared" / "cases"


@pytest.fixture(scope="module")
def dancer() -> list[Pose]:
    poses = clip(identity_seed=1, motion_seed=2, frames=COUNT, size=64)[1]
    return [place_pose(pose, 1, 1, 0, 0) for pose in poses]  # with zeros for what is not seen


@pytest.fixture(scope="module")
def two(dancer) -> list[list[Pose]]:
    """Two dancers side by side, the left one a little larger."""
    places = (0.5, 0.5, 0.0, 0.1), (0.45, 0.45, 0.5, 0.1)
    return [[place_pose(pose, *place) for place in places] for pose in dancer]


def frames_of(poses: list[Pose], width: int = WIDTH, height: int = HEIGHT) -> list[dict]:
    return json.loads(poses_text(poses, width, height))


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def write_folder(folder: Path, frames: list[dict], numbers: list[int]) -> Path:
    folder.mkdir()
    for number, frame in zip(numbers, frames, strict=True):
        write(folder / f"clip_{number:012d}_keypoints.json", frame)
    return folder


def assert_same(found: list[Pose], poses: list[Pose], tolerance: float = 1e-4) -> None:
    for a, b in zip(found, poses, strict=True):
        for name, part in vars(a).items():
            np.testing.assert_allclose(part, getattr(b, name), atol=tolerance)


# ---- Who is followed ----------------------------------------------------------------------------


@given(orders=st.lists(st.booleans(), min_size=COUNT, max_size=COUNT), person=st.sampled_from([1, 2]))
@settings(max_examples=30, deadline=None)
def test_one_of_two_dancers_is_followed_in_whatever_order_they_come(two, orders, person):
    shuffled = [in_frame[::-1] if turned else in_frame for in_frame, turned in zip(two, orders)]
    followed = follow_given(shuffled, WIDTH / HEIGHT, person)
    assert all(pose is in_frame[person - 1] for pose, in_frame in zip(followed, two))


def test_the_person_asked_for_is_followed_through_json(tmp_path, two):
    frames = frames_of([Pose()] * COUNT)
    people = [[frames_of([pose])[0]["people"][0] for pose in in_frame] for in_frame in two]
    for index, (frame, in_frame) in enumerate(zip(frames, people)):
        frame["people"] = in_frame[:: (-1) ** index]
    path = write(tmp_path / "two.json", frames)
    for person in (1, 2):
        found = read_driver(path, person=person)
        assert_same(found.poses, [in_frame[person - 1] for in_frame in two])
        assert found.canvas == (HEIGHT, WIDTH)
    with pytest.raises(ValueError, match=r"two.json: no person 3: 2 found, 1 being the most prominent"):
        read_driver(path, person=3)


def test_one_person_alone_is_followed_over_cuts_as_they_are(tmp_path, dancer):
    small = [place_pose(pose, 0.3, 0.3, 0.7, 0.7) for pose in dancer]
    cut = [*dancer[:5], *small[5:9], *dancer[9:]]
    save_poses(tmp_path / "cut.json", cut, WIDTH, HEIGHT)
    assert_same(read_driver(tmp_path / "cut.json").poses, cut)


# ---- Gaps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gap", "missing"), [(range(11, 12), ""), (range(7, 12), ""), (range(7, 13), "7-12")]
)
def test_up_to_five_frames_without_the_person_are_bridged_and_more_are_named(
    tmp_path, dancer, gap, missing
):
    frames = frames_of(dancer)
    for index in gap:
        frames[index]["people"] = []
    found = read_driver(write(tmp_path / "gap.json", frames)).poses
    assert absences(found) == missing
    there = [index for index in range(COUNT) if index not in gap]
    assert_same([found[index] for index in there], [dancer[index] for index in there])
    if not missing:
        a, b = dancer[gap.start - 1].body, dancer[gap.stop].body
        way = 1 / (len(gap) + 1)
        both = is_seen(a) & is_seen(b)
        expected = ((1 - way) * a + way * b)[both, :2]
        np.testing.assert_allclose(found[gap.start].body[both, :2], expected, atol=1e-4)
        assert found[gap.start].body[both, 2] == pytest.approx(INTERPOLATED)


def test_keypoints_that_were_taken_out_stay_out_and_poses_of_our_own_are_read_as_they_are(tmp_path, dancer):
    poses = [*dancer[:3], Pose(body=dancer[3].body), Pose(), *dancer[5:8]]
    save_poses(tmp_path / "edited.json", poses, WIDTH, HEIGHT)
    assert_same(load_poses(tmp_path / "edited.json"), poses)
    followed = read_driver(tmp_path / "edited.json").poses
    assert not followed[3].face.any() and is_seen(followed[4].body).any()


@pytest.mark.parametrize(
    ("numbers", "missing"),
    [
        ([0, 1, 2, 6, 7], [0, 0, 0, 3, 0]),
        ([5, 15, 25, 45], [0, 0, 0, 1]),
        ([0, 10], [0, 0]),
        ([3], [0]),
        ([0, 17, 42, 99], [0, 0, 0, 0]),  # picked by hand
        ([0, 33, 67, 100], [0, 0, 0, 0]),  # milliseconds
    ],
)
def test_numbers_in_file_names_tell_which_frames_are_missing(numbers, missing):
    assert missing_numbers([Path(f"clip2_{number}_keypoints.json") for number in numbers]) == missing
    assert missing_numbers([Path(f"clip{number}_{number}.json") for number in numbers]) == [0] * len(
        numbers
    )


def test_a_folder_without_three_of_its_numbers_is_a_clip_with_a_bridged_gap(tmp_path, dancer):
    kept = [index for index in range(COUNT) if index not in (11, 12, 13)]
    folder = write_folder(tmp_path / "poses", [frames_of(dancer)[index] for index in kept], kept)
    (folder / "._clip_000000000000_keypoints.json").write_bytes(b"\x00\x05\x16\x07")
    found = read_driver(folder)
    assert found.total == len(found.poses) == COUNT and not absences(found.poses)
    assert found.poses[12].body[1, 2] == pytest.approx(INTERPOLATED)
    write(folder / "clip_000099999999_keypoints.json", frames_of(dancer)[0])
    with pytest.raises(ValueError, match=r"\d+ numbers are missing in the names of 22 files"):
        read_driver(folder)


def test_poses_of_another_length_than_the_clip_are_refused(tmp_path, dancer):
    save_poses(tmp_path / "poses.json", dancer, WIDTH, HEIGHT)
    assert read_driver(tmp_path / "poses.json", length=COUNT + 2).total == COUNT
    with pytest.raises(ValueError, match="has 24 frames of poses, but the clip has 30 frames"):
        read_driver(tmp_path / "poses.json", length=30)


# ---- Units --------------------------------------------------------------------------------------

FRACTIONS = (1 / WIDTH, 1 / HEIGHT), (0, 0)
SIGNED = (2 / WIDTH, 2 / HEIGHT), (-1, -1)
PIXELS = (1, 1), (0, 0)


def in_units(frames: list[dict], body: tuple, rest: tuple) -> list[dict]:
    """Frames in pixels with the body, and face and hands, in other units, as (scale, offset)."""
    for frame in frames:
        for person in frame["people"]:
            for name, (key, _) in KEYS.items():
                scale, offset = body if name == "body" else rest
                points = np.reshape(person[key], (-1, 3))
                points[:, :2] = (points[:, :2] * scale + offset) * is_seen(points)[:, None]
                person[key] = points.ravel().tolist()
    return frames


@pytest.mark.parametrize(
    ("body", "rest"),
    [
        (FRACTIONS, FRACTIONS),
        (FRACTIONS, PIXELS),
        (PIXELS, FRACTIONS),
        (SIGNED, SIGNED),
        (SIGNED, PIXELS),
        (FRACTIONS, SIGNED),
    ],
)
def test_each_part_is_read_in_the_units_that_make_one_body(tmp_path, dancer, body, rest, capsys):
    path = write(tmp_path / "units.json", in_units(frames_of(dancer), body, rest))
    assert_same(read_driver(path).poses, dancer)
    assert ("run from -1 to 1" in capsys.readouterr().out) == (body is SIGNED)


def test_a_part_that_is_nowhere_at_the_body_is_left_out_and_a_line_says_so(tmp_path, dancer, capsys):
    path = write(tmp_path / "far.json", in_units(frames_of(dancer), FRACTIONS, ((9, 9), (900, 900))))
    found = read_driver(path).poses
    assert_same([Pose(pose.body) for pose in found], [Pose(pose.body) for pose in dancer])
    assert not any(pose.face.any() for pose in found)
    assert (
        "face_keypoints_2d lie far from the body in any unit, and are left out" in capsys.readouterr().out
    )


@pytest.mark.parametrize("units", [PIXELS, FRACTIONS])
def test_without_a_canvas_it_is_asked_for(tmp_path, dancer, units):
    frames = [{"people": frame["people"]} for frame in in_units(frames_of(dancer), units, units)]
    path = write(tmp_path / "bare.json", frames)
    with pytest.raises(
        ValueError, match=r"bare.json: frame 0: no canvas_width .* such as --canvas 1920x1080"
    ):
        read_driver(path)
    assert_same(read_driver(path, canvas=(HEIGHT, WIDTH)).poses, dancer)


def test_canvases_of_two_shapes_are_refused(tmp_path, dancer):
    frames = [*frames_of(dancer[:2]), *frames_of(dancer[2:4], 512, 288)]
    with pytest.raises(ValueError, match="canvases of 288x512 and of 512x288: the frames of a clip need"):
        read_driver(write(tmp_path / "mixed.json", frames))
    assert len(read_driver(write(tmp_path / "large.json", frames_of(dancer[:2], 576, 1024))).poses) == 2


# ---- Layouts ------------------------------------------------------------------------------------


def first_names(frames: list[dict]) -> list[dict]:
    """Frames with the key names of OpenPose 1.0."""
    return json.loads(json.dumps(frames).replace('_keypoints_2d"', '_keypoints"'))


def in_points(frames: list[dict]) -> list[dict]:
    """Frames with a list for every keypoint, and null for those that are not seen."""
    for frame in frames:
        for person in frame["people"]:
            for key, flat in person.items():
                person[key] = [
                    [*point] if point[2] else None for point in np.reshape(flat, (-1, 3)).tolist()
                ]
    return frames


@pytest.mark.parametrize(
    "layout",
    [
        first_names,
        in_points,
        lambda frames: [frames],
        lambda frames: [[frame] for frame in frames],
        lambda frames: {"frames": frames},
        lambda frames: {
            "width": WIDTH,
            "height": HEIGHT,
            "frames": [{"people": frame["people"]} for frame in frames],
        },
    ],
    ids=["OpenPose 1.0", "points", "list in list", "list of lists", "frames", "frames with size"],
)
def test_layouts_of_other_tools_are_read_as_openpose_s(tmp_path, dancer, layout):
    assert_same(read_driver(write(tmp_path / "other.json", layout(frames_of(dancer)))).poses, dancer)


def test_an_editor_s_keypoints_of_one_person_or_of_several_are_bodies(tmp_path, two):
    def keypoints(pose: Pose) -> list:
        points = (pose.body[:, :2] * (WIDTH, HEIGHT)).tolist()
        return [point if seen else None for point, seen in zip(points, is_seen(pose.body))]

    for people in ([keypoints(pose) for pose in two[0]], keypoints(two[0][0])):
        path = write(tmp_path / "edited.json", {"width": WIDTH, "height": HEIGHT, "keypoints": people})
        found = read_driver(path)
        assert found.canvas == (HEIGHT, WIDTH)
        np.testing.assert_allclose(found.poses[0].body[:, :2], two[0][0].body[:, :2], atol=1e-4)


@pytest.mark.parametrize(("part", "size"), [("face", 168), ("left_hand", 62), ("body", 51)])
def test_a_part_of_a_wrong_length_is_left_out_of_its_frame_alone(tmp_path, dancer, part, size, capsys):
    frames, key = frames_of(dancer), KEYS[part][0]
    for index in (3, 9):
        frames[index]["people"][0][key] = [1.0] * size
    found = read_driver(write(tmp_path / "odd.json", frames)).poses
    assert f"{key} has {size} numbers instead of" in (told := capsys.readouterr().out)
    assert "is left out: in frames 3, 9\n" in told and len(told.splitlines()) == 1
    assert_same(found[4:9], dancer[4:9])
    if part == "body":  # the person, with all parts, is bridged
        assert found[3].body[1, 2] == pytest.approx(INTERPOLATED)
    else:
        assert not getattr(found[3], part).any()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"animals": [], "version": 1}, "\"people\", but 'animals', 'version'"),
        ([[{"pose_keypoints_2d": []}]], "\"people\", but 'pose_keypoints_2d'"),
        ([[[[[{"people": []}]]]]], '"people", but no object'),
        ({"keypoints": "none"}, "\"people\", but 'keypoints'"),
        ({"people": [], "frames": 3}, "no people in any of its 1 frames"),
    ],
)
def test_unknown_layouts_are_refused_with_what_was_found(tmp_path, content, words):
    with pytest.raises(ValueError) as refused:
        read_driver(write(tmp_path / "strange.json", content))
    assert words in str(refused.value) and str(refused.value).isprintable()


@pytest.mark.skipif(not CASES.exists(), reason="needs the small inputs that went wrong")
@pytest.mark.parametrize(
    ("name", "count", "missing"),
    [
        ("huge_all", 3, "0-2"),
        ("neg_all", 3, "0-2"),
        ("zero_all", 3, "0-2"),
        ("same", 3, "0-2"),
        ("huge_one", 3, ""),
        ("users/json_body_fractions_face_hands_pixels", COUNT, ""),
        ("users/json_face_of_56_points_in_one_frame", COUNT, ""),
        ("users/json_folder_from_macos_zip", 3, ""),
        ("users/json_folder_missing_numbers", COUNT, ""),
        ("users/json_fractions_without_canvas_portrait", COUNT, ""),
        ("users/json_list_in_list", COUNT, ""),
        ("users/json_one_blank_frame", COUNT, ""),
        ("users/json_openpose_1_0_key_names", COUNT, ""),
        ("users/json_openpose_editor_layout", 1, ""),
        ("users/json_two_people_arbitrary_order", COUNT, ""),
    ],
)
def test_files_that_users_had_are_followed_throughout(name, count, missing):
    (path,) = CASES.glob(f"{name}*")
    found = read_driver(path, canvas=(HEIGHT, WIDTH)).poses
    assert len(found) == count and absences(found) == missing
    noses = np.array([pose.body[0, :2] for pose in found])
    assert missing or np.abs(np.diff(noses, axis=0)).max(initial=0) < 0.1  # nobody leaps or collapses
