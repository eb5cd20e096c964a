"""Poses from whatever the user has: found out, read, found in pixels once, and refused with a reason."""

import tracemalloc

import numpy as np
import pytest
from footage import RATE, make_video, sound_of

from demo.puppet import clip
from openpose import OpenPose
from poses.pose import Pose, draw_pose, save_poses
from poses.source import read_driver, uniform_frames
from poses.waiting import announce
from safe.sound import add_sound, has_sound
from video import open_clip, read_frames, save_image, write_video

SIZE = 128


@pytest.fixture(scope="module")
def puppet() -> tuple[np.ndarray, list[Pose]]:
    frames, poses, _ = clip(identity_seed=1, motion_seed=2, frames=12, size=SIZE)
    return frames, poses


@pytest.fixture
def finder(monkeypatch, puppet):
    """Instead of the networks, which take minutes: knows the puppet's poses, and counts its calls."""
    calls = []

    def find(nets, frames, person=1, whole_bodies=None, smooth=False, progress=False):
        calls.append((len(frames), person, whole_bodies, smooth))
        return puppet[1][: len(frames)]

    monkeypatch.setattr("openpose.load_openpose", lambda name, device: None)
    monkeypatch.setattr("openpose.find_poses", find)
    return calls


def test_a_json_list_and_a_folder_of_json_are_read_as_such(tmp_path, puppet):
    _, poses = puppet
    save_poses(tmp_path / "list.json", poses, 200, 100)
    (tmp_path / "folder").mkdir()
    for i, pose in enumerate(poses):
        save_poses(tmp_path / "folder" / f"{i}.json", [pose], 200, 100)
    for name in ("list.json", "folder"):
        found = read_driver(tmp_path / name, within=range(3, 7))
        assert (found.total, len(found.poses)) == (12, 4)
        assert found.canvas == (100, 200) and found.fps is None
        np.testing.assert_allclose(found.poses[0].body[:14], poses[3].body[:14], atol=1e-4)


def test_a_drawn_skeleton_is_told_from_footage_and_can_be_declared(tmp_path, puppet, finder):
    frames, poses = puppet
    drawn = [draw_pose(pose, 256, 256) for pose in poses]
    write_video(tmp_path / "drawn.mp4", drawn, 12)
    write_video(tmp_path / "footage.mp4", frames, 12)
    read = read_driver(tmp_path / "drawn.mp4")
    assert not finder, "the networks were asked about a drawing"
    assert np.abs(read.poses[5].body[2:8, :2] - poses[5].body[2:8, :2]).max() < 0.02
    assert (read.canvas, read.fps) == ((256, 256), 12)
    read_driver(tmp_path / "footage.mp4")
    assert len(finder) == 1
    read_driver(tmp_path / "drawn.mp4", kind="video")
    assert len(finder) == 2


def test_what_was_found_in_pixels_is_kept_until_anything_changes(tmp_path, puppet, finder):
    frames, poses = puppet
    clip_path, cache = tmp_path / "clip.mp4", tmp_path / "cache"
    write_video(clip_path, frames, 12)
    first = read_driver(clip_path, cache=cache)
    again = read_driver(clip_path, cache=cache)
    assert len(finder) == 1
    assert all(np.array_equal(a.body, b.body) for a, b in zip(first.poses, again.poses))
    np.testing.assert_allclose(first.poses[3].body[:14], poses[3].body[:14], atol=1e-4)
    for n, change in enumerate(({"person": 2}, {"smooth": True}, {"within": range(4)}), start=2):
        read_driver(clip_path, cache=cache, **change)
        assert len(finder) == n
    assert [(person, smooth) for _, person, _, smooth in finder] == [
        (1, False),
        (2, False),
        (1, True),
        (1, False),
    ]
    write_video(clip_path, frames[:9], 12)
    assert len(read_driver(clip_path, cache=cache).poses) == 9
    assert len(finder) == 5


def test_only_the_frames_asked_for_are_looked_at_and_hands_only_where_wanted(tmp_path, puppet, finder):
    (tmp_path / "frames").mkdir()
    for i, frame in enumerate(puppet[0]):
        save_image(tmp_path / "frames" / f"{i}.png", frame)
    found = read_driver(tmp_path / "frames", within=range(2, 11), whole_bodies=3)
    assert finder == [(9, 1, [0, 4, 8], False)]
    assert uniform_frames(found.within, 3) == [2, 6, 10]


def test_a_long_video_is_never_held_whole(tmp_path, monkeypatch, puppet):
    height, width, peaks = 90, 160, []
    body = puppet[1][0].body * (width, height, 1)
    monkeypatch.setattr("openpose.load_openpose", lambda *_: OpenPose(width=0.02, stages=(1, 1, 1)).eval())
    monkeypatch.setattr("openpose.maps.decode_bodies", lambda *_: [body])
    monkeypatch.setattr("openpose.add_parts", lambda nets, frame, pose: pose)
    for count in (20, 60):
        path = tmp_path / f"{count}.mp4"
        write_video(path, (np.full((height, width, 3), 90 + i, np.uint8) for i in range(count)), 30)
        tracemalloc.start()
        assert len(read_driver(path).poses) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 5 * height * width * 3


def test_before_a_long_wait_a_line_says_for_what_and_about_how_long(tmp_path, monkeypatch, capsys):
    looked = []

    def find_bodies(frames):
        looked.append(len(frames))
        return [[Pose()]]

    frames = np.zeros((12, 8, 6, 3), np.uint8)
    announce(tmp_path, frames, 4, find_bodies, lambda frame, pose: pose)
    assert (
        capsys.readouterr().out
        == f"{tmp_path}: looking for people in 12 frames, for hands and faces in 4\n"
    )
    assert not looked
    with monkeypatch.context() as patch:
        clock = iter([0, 2, 2, 22])  # two seconds for a body, twenty for hands and face
        patch.setattr("time.perf_counter", lambda: next(clock))
        announce(tmp_path, np.zeros((400, 8, 6, 3), np.uint8), 10, find_bodies, lambda frame, pose: pose)
    assert capsys.readouterr().out.endswith(
        "in 400 frames, for hands and faces in 10, which takes about 17 minutes\n"
    )
    assert looked == [1, 1]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gone.mp4", "no such file or folder"),
        ("text.mp4", "not a readable video"),
        ("text.json", "not readable as JSON"),
    ],
)
def test_a_source_that_cannot_be_read_is_named(tmp_path, name, words):
    for text in ("text.mp4", "text.json"):
        (tmp_path / text).write_text("hello")
    with pytest.raises((OSError, ValueError), match=words) as refused:
        read_driver(tmp_path / name)
    assert name in str(refused.value)


def test_a_person_who_is_not_there_is_told_whatever_the_poses_come_from(tmp_path, puppet):
    _, poses = puppet
    save_poses(tmp_path / "list.json", poses, 200, 100)
    write_video(tmp_path / "drawn.mp4", [draw_pose(pose, 256, 256) for pose in poses], 12)
    for name in ("list.json", "drawn.mp4"):
        with pytest.raises(ValueError, match=f"{name}: no person 2: 1 found"):
            read_driver(tmp_path / name, person=2)


def test_a_drawing_of_another_length_than_the_clip_is_refused_before_it_is_read(
    tmp_path, puppet, monkeypatch
):
    write_video(tmp_path / "drawn.mp4", [draw_pose(pose, 64, 64) for pose in puppet[1]], 12)
    monkeypatch.setattr("poses.source.read_frames", None)
    with pytest.raises(ValueError, match=r"drawn.mp4: has 12 frames of poses, but the clip has 30"):
        read_driver(tmp_path / "drawn.mp4", kind="drawn", length=30)


def test_frames_outside_the_clip_are_refused(tmp_path, puppet, finder):
    write_video(tmp_path / "clip.mp4", puppet[0], 12)
    with pytest.raises(ValueError, match="has 12 frames, so no frames 5:20"):
        read_driver(tmp_path / "clip.mp4", within=range(5, 20))


def test_nobody_in_the_clip_is_said_with_its_name(tmp_path, monkeypatch):
    landscape = np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), np.uint8)
    write_video(tmp_path / "landscape.mp4", landscape, 12)

    def nobody(*arguments, **options):
        raise ValueError("no person in any of the 3 frames")

    monkeypatch.setattr("openpose.load_openpose", lambda name, device: None)
    monkeypatch.setattr("openpose.find_poses", nobody)
    with pytest.raises(ValueError, match=r"landscape.mp4: no person in any of the 3 frames"):
        read_driver(tmp_path / "landscape.mp4", cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


# ---- Sound --------------------------------------------------------------------------------------


def with_sound(path, frames: np.ndarray) -> None:
    """Writes a video with a second of silence, then of a tone."""
    moments = np.arange(2 * RATE) / RATE
    make_video(path, frames, np.arange(len(frames)) / 6, np.where(moments > 1, np.sin(2764 * moments), 0))


def loudness(path) -> np.ndarray:
    """The mean level of each half second."""
    heard = np.abs(sound_of(path))
    return heard[: len(heard) // (RATE // 2) * (RATE // 2)].reshape(-1, RATE // 2).mean(axis=1)


def test_sound_is_laid_under_a_video_from_where_it_belongs(tmp_path, puppet):
    with_sound(tmp_path / "loud.mp4", puppet[0])
    write_video(tmp_path / "result.mp4", puppet[0][3:9], 6)
    assert has_sound(tmp_path / "loud.mp4") and not has_sound(tmp_path / "result.mp4")
    silent = read_frames(tmp_path / "result.mp4")[0]
    add_sound(tmp_path / "result.mp4", tmp_path / "loud.mp4", start=0.5, seconds=1)
    assert has_sound(tmp_path / "result.mp4") and len(open_clip(tmp_path / "result.mp4")) == 6
    assert np.array_equal(read_frames(tmp_path / "result.mp4")[0], silent)
    before, after = loudness(tmp_path / "result.mp4")[:2]
    assert after > 0.3 > 0.01 > before


def test_sound_that_cannot_be_copied_leaves_the_video_as_it_was(tmp_path, puppet):
    write_video(tmp_path / "result.mp4", puppet[0], 6)
    before = (tmp_path / "result.mp4").read_bytes()
    (tmp_path / "text.mp4").write_text("hello")
    with pytest.raises(OSError, match="sound could not be copied"):
        add_sound(tmp_path / "result.mp4", tmp_path / "text.mp4", 0, 1)
    assert (tmp_path / "result.mp4").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2
