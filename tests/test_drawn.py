import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo.puppet import clip
from poses.drawn import is_drawn, read_drawn
from poses.pose import Pose, draw_pose, has_person, is_seen, load_poses, place_pose
from video import read_frames, write_video

CLIPS = Path(__file__).parents[2] / "shared" / "clips"
needs_clips = pytest.mark.skipif(
    not CLIPS.is_dir(), reason="the clips, which are not in this repository, are not here"
)
SIZES = [(512, 512), (640, 384), (256, 256)]


def puppets(frames: int = 3) -> list[Pose]:
    return clip(3, 5, frames, 32)[1]


def drawing(poses: list[Pose], height: int, width: int) -> np.ndarray:
    return np.stack([draw_pose(pose, height, width) for pose in poses])


def through_video(frames: np.ndarray, folder: Path) -> np.ndarray:
    write_video(folder / "drawn.mp4", frames, 24)
    return read_frames(folder / "drawn.mp4")[0]


def through_jpeg(frame: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=quality)  # 4:2:0, as videos have it
    return np.asarray(Image.open(file))


def errors(read: list[Pose], true: list[Pose], height: int, width: int) -> tuple[np.ndarray, float]:
    """Distances in pixels of body keypoints that were read, and the share of those that were."""
    distances, count = [], 0
    for a, b in zip(read, true, strict=True):
        both = is_seen(a.body) & is_seen(b.body)
        distances += list(np.linalg.norm((a.body - b.body)[both, :2] * (width, height), axis=1))
        count += is_seen(b.body).sum()
    return np.array(distances), len(distances) / count


@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("quality", [None, 90], ids=["clean", "jpeg"])
def test_a_drawn_body_is_read_back(height, width, quality):
    frames = drawing(puppets(), height, width)
    if quality:  # loses as much of the colours as a video, and is quicker to write
        frames = np.stack([through_jpeg(frame, quality) for frame in frames])
    assert is_drawn(frames)
    distances, share = errors(read_drawn(frames), puppets(), height, width)
    assert np.median(distances) < 1 and np.quantile(distances, 0.95) < 8 and share > 0.8


@pytest.mark.parametrize("lines", ["scaled", "as thin as ever"])
def test_large_canvases_are_read_whether_their_lines_are_scaled_or_not(lines):
    poses = puppets(2)
    if lines == "scaled":
        frames = drawing(poses, 1024, 1024)
    else:
        frames = np.zeros((2, 1024, 1024, 3), np.uint8)
        frames[:, 256:768, 256:768] = drawing(poses, 512, 512)
        poses = [place_pose(pose, 0.5, 0.5, 0.25, 0.25) for pose in poses]
    assert is_drawn(frames)
    read = read_drawn(frames)
    distances, share = errors(read, poses, 1024, 1024)
    assert np.median(distances) < 1 and share > 0.95
    assert all(is_seen(pose.left_hand).sum() > 12 for pose in read)


def test_a_drawn_body_is_read_back_from_a_video(tmp_path):
    frames = through_video(drawing(puppets(), 256, 256), tmp_path)
    assert is_drawn(frames)
    distances, share = errors(read_drawn(frames), puppets(), 256, 256)
    assert np.median(distances) < 1 and np.quantile(distances, 0.95) < 8 and share > 0.85


def test_what_is_not_drawn_stays_missing():
    poses = puppets()
    for pose in poses:
        pose.body[[4, 9, 10, 13]] = 0  # right wrist, right knee and ankle, left ankle
        pose.face[:] = pose.left_hand[:] = pose.right_hand[:] = 0
    for read, true in zip(read_drawn(drawing(poses, 512, 512)), poses):
        assert not is_seen(read.body)[~is_seen(true.body)].any()
        assert not is_seen(read.face).any()
        assert not is_seen(read.left_hand).any() and not is_seen(read.right_hand).any()


def test_drawn_hands_are_read_back():
    poses = puppets(4)
    distances, count = [], 0
    for read, true in zip(read_drawn(drawing(poses, 512, 512)), poses):
        for a, b in ((read.left_hand, true.left_hand), (read.right_hand, true.right_hand)):
            both = is_seen(a) & is_seen(b)  # also tells left from right: hands are far apart
            distances += list(512 * np.linalg.norm((a - b)[both, :2], axis=1))
            count += is_seen(b).sum()
    assert len(distances) > 0.5 * count
    assert np.median(distances) < 2 and np.quantile(distances, 0.95) < 10


def test_a_hand_that_is_not_drawn_stays_missing():
    poses = puppets()
    for pose in poses:
        pose.left_hand[:] = 0
    read = read_drawn(drawing(poses, 512, 512))
    assert not any(is_seen(pose.left_hand).any() for pose in read)
    assert any(is_seen(pose.right_hand).any() for pose in read)


def test_the_larger_of_two_people_is_read():
    large = [place_pose(pose, 0.7, 0.7, 0.4, 0.2) for pose in puppets()]
    small = [place_pose(pose, 0.4, 0.4, -0.05, 0.3) for pose in puppets()]
    frames = np.maximum(drawing(large, 640, 768), drawing(small, 640, 768))
    distances, share = errors(read_drawn(frames), large, 640, 768)
    assert np.median(distances) < 1.5 and share > 0.8


def test_frames_without_a_person_give_empty_poses():
    frames = drawing([Pose(), *puppets(2), Pose()], 512, 512)
    assert [has_person(pose) for pose in read_drawn(frames)] == [False, True, True, False]
    assert is_drawn(frames)


def test_only_drawn_skeletons_are_drawn():
    puppet = clip(0, 1, 4, 256)[0]
    noise = np.random.default_rng(0).integers(0, 256, (3, 128, 128, 3), dtype=np.uint8)
    ramp = np.linspace(0, 255, 256).astype(np.uint8)
    landscape = np.stack([np.broadcast_to(c, (256, 256)) for c in (ramp, ramp[:, None], ramp[::-1])], -1)
    assert not is_drawn(puppet)
    assert not is_drawn(puppet // 5)  # dark footage
    assert not is_drawn(noise)
    assert not is_drawn(landscape[None])
    assert not is_drawn(np.zeros((3, 256, 256, 3), np.uint8))


@needs_clips
def test_footage_is_not_drawn():
    frames, _ = read_frames(CLIPS / "dance.mp4", range(0, 200, 40))
    assert not is_drawn(frames) and not is_drawn(frames // 4)


@needs_clips
def test_poses_of_footage_are_read_back_from_their_drawing():
    poses = load_poses(CLIPS / "dance.poses.json")[::60]
    distances, share = errors(read_drawn(drawing(poses, 512, 288)), poses, 512, 288)
    assert np.median(distances) < 1 and share > 0.85


@needs_clips
def test_a_shared_skeleton_video_is_redrawn_where_it_was():
    frames, _ = read_frames(CLIPS / "skeleton_drawn.mp4", range(0, 136, 27))
    assert is_drawn(frames)
    overlaps = []
    for frame, pose in zip(frames, read_drawn(frames)):
        again = draw_pose(pose, *frame.shape[:2], hands=False, face=False)
        limbs = [is_limb(image) for image in (frame, again)]
        overlaps.append((limbs[0] & limbs[1]).sum() / (limbs[0] | limbs[1]).sum())
    print("overlap of limbs", np.round(overlaps, 3))
    assert np.mean(overlaps) > 0.7


def is_limb(image: np.ndarray) -> np.ndarray:
    """Saturated pixels at about 60 % brightness."""
    high, low = image.max(axis=2).astype(int), image.min(axis=2).astype(int)
    return (high > 100) & (high < 190) & (high - low > 0.5 * high)
