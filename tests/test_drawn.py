import io
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo.puppet import clip
from poses.drawn import is_drawn, read_drawn_people
from poses.ink import hint_at_drawing
from poses.people import extent
from poses.pose import _LIMB_COLOURS, Pose, draw_pose, has_person, is_seen, load_poses, place_pose
from video import read_frames, save_image, write_video

ROOT, SHARED = Path(__file__).parents[1], Path(__file__).parents[2] / "shared"
CLIPS, CASES = SHARED / "clips", SHARED / "cases"
needs_cases = pytest.mark.skipif(
    not CASES.is_dir(), reason="the cases, which are not in this repository, are not here"
)
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


def read_drawn(frames: np.ndarray) -> list[Pose]:
    """The largest person of every frame."""
    people = read_drawn_people(Path("clip.mp4"), frames)
    return [max(each, key=lambda pose: extent(pose.body), default=Pose()) for each in people]


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


def on_ground(frame: np.ndarray, colour: tuple[int, ...]) -> np.ndarray:
    return np.where(frame.any(axis=2, keepdims=True), frame, np.uint8(colour))


def with_border(frame: np.ndarray) -> np.ndarray:
    return np.pad(frame, ((40, 40), (60, 60), (0, 0)), constant_values=128)


@pytest.mark.parametrize(
    ("change", "place", "share"),
    [
        (lambda frame: on_ground(frame, (255, 255, 255)), (1, 1, 0, 0), 0.7),  # white dots hide the head
        (lambda frame: on_ground(frame, (40, 60, 120)), (1, 1, 0, 0), 0.9),
        (lambda frame: through_jpeg(on_ground(frame, (128, 128, 128)), 90), (1, 1, 0, 0), 0.85),
        (with_border, (512 / 632, 512 / 592, 60 / 632, 40 / 592), 0.9),
        (lambda frame: np.asarray(Image.fromarray(frame).reduce(2)), (1, 1, 0, 0), 0.8),
        (lambda frame: through_jpeg(frame, 75), (1, 1, 0, 0), 0.85),
    ],
    ids=["white", "blue", "grey jpeg", "border", "half", "jpeg 75"],
)
def test_drawings_are_read_on_any_plain_ground_and_at_any_scale(change, place, share):
    frames = np.stack([change(frame) for frame in drawing(puppets(2), 512, 512)])
    true = [place_pose(pose, *place) for pose in puppets(2)]
    assert is_drawn(frames)
    distances, found = errors(read_drawn(frames), true, *frames.shape[1:3])
    assert np.median(distances) < 1.2 and found > share


def test_limbs_as_bright_as_openpose_was_sure_are_read(monkeypatch):
    dim = np.random.default_rng(0).uniform(0.5, 1, (18, 1))
    monkeypatch.setattr("poses.pose._LIMB_COLOURS", [tuple(map(int, c)) for c in dim * _LIMB_COLOURS])
    frames = drawing(puppets(2), 512, 512)
    distances, share = errors(read_drawn(frames), puppets(2), 512, 512)
    assert is_drawn(frames) and np.median(distances) < 1 and share > 0.9


def test_everybody_is_read_with_face_and_hands():
    left, right = ([place_pose(pose, 0.5, 1, x, 0) for pose in puppets(1)] for x in (0, 0.5))
    frames = np.maximum(drawing(left, 512, 1024), drawing(right, 512, 1024))
    (people,) = read_drawn_people(Path("clip.mp4"), frames)
    assert len(people) == 2
    for read, true in zip(sorted(people, key=lambda pose: pose.body[1, 0]), (*left, *right)):
        assert np.median(errors([read], [true], 512, 1024)[0]) < 1
        assert (
            is_seen(read.face).sum() > 60
            and is_seen(read.left_hand).any()
            and is_seen(read.right_hand).any()
        )


def test_a_clip_of_nobody_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^empty\.mp4: no drawn skeleton in any of the 3 frames"):
        read_drawn_people(Path("empty.mp4"), np.zeros((3, 256, 256, 3), np.uint8))


def test_a_drawing_that_was_not_recognised_is_hinted_at():
    assert "--poses-are drawn" in hint_at_drawing(drawing(puppets(1), 512, 512)[0])
    noise = np.random.default_rng(0).integers(0, 256, (1, 128, 128, 3), dtype=np.uint8)
    assert hint_at_drawing(noise[0]) == ""


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
    assert len(distances) > 0.95 * count
    assert np.median(distances) < 1 and np.quantile(distances, 0.95) < 4


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


# ---- What is no drawing -------------------------------------------------------------------------


def sparse_noise(height: int, width: int, share: float, size: int = 1) -> np.ndarray:
    """Squares of random colours on black: (1, H, W, 3)."""
    random, shape = np.random.default_rng(0), (1, height // size, width // size)
    colours = random.integers(0, 256, (*shape, 3), dtype=np.uint8)
    return (colours * (random.random((*shape, 1)) < share)).repeat(size, 1).repeat(size, 2)


def half_of_one_colour(colour: tuple[int, ...]) -> np.ndarray:
    frame = np.zeros((1, 1024, 1024, 3), np.uint8)
    frame[:, :, :500] = colour
    return frame


@pytest.mark.parametrize(
    ("frames", "told"),
    [
        (sparse_noise(64, 96, 0.9), "are not its plain ground"),
        (sparse_noise(512, 512, 0.4, 8), "parts of skeletons that do not touch"),
        (sparse_noise(512, 512, 0.4, 3), "pieces of limbs"),
        (half_of_one_colour((255, 0, 0)), "of one colour"),
    ],
)
def test_what_is_no_drawing_is_refused_soon_with_what_to_do(frames, told):
    start = time.monotonic()
    assert not is_drawn(frames)
    with pytest.raises(ValueError, match=told) as error:
        read_drawn(frames)
    assert "give --poses-are video" in str(error.value) and "\n" not in str(error.value)
    assert time.monotonic() - start < 30  # on a busy machine; 3 on an idle one


def limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (2 * 10**9, 2 * 10**9))


def assert_refused_as_driver(drawn: Path, folder: Path, told: str) -> None:
    """By the command line, with 2 GB of memory, within 10 s more than it takes to start."""
    (folder / "frames").mkdir()
    for index, pose in enumerate(puppets(8)):
        save_image(folder / "frames" / f"{index}.png", draw_pose(pose, 64, 64))
    before = sorted(folder.rglob("*"))
    options = ["--poses", drawn, "--poses-are", "drawn", "--model", "demo", "--run", "run"]
    command = [sys.executable, ROOT / "train.py", "frames", *options]
    start = time.monotonic()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, preexec_fn=limit_memory)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and f"{drawn}: " in lines[-1] and told in lines[-1], done.stderr
    assert "Traceback" not in done.stderr and sorted(folder.rglob("*")) == before
    assert time.monotonic() - start < 40  # most of it PyTorch's start, on a busy machine


def test_the_command_line_refuses_noise_as_a_drawing(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 96, 3), dtype=np.uint8)
    write_video(tmp_path / "noise.mp4", noise, 8)
    assert_refused_as_driver(tmp_path / "noise.mp4", tmp_path, "are not its plain ground")


@needs_cases
def test_a_case_of_no_drawing_is_refused():
    frames, _ = read_frames(CASES / "noise_64x96.mp4")
    assert not is_drawn(frames)
    with pytest.raises(ValueError, match="give --poses-are video"):
        read_drawn_people(CASES / "noise_64x96.mp4", frames)


@needs_cases
@pytest.mark.parametrize(
    "name", ["drawn_on_white.png", "drawn_one_blank_frame.mp4", "drawn_shrunk_by_half.mp4"]
)
def test_users_drawings_are_read(name):
    frames, _ = read_frames(CASES / "users" / name)
    assert is_drawn(frames)
    people = read_drawn_people(Path(name), frames)
    assert [index for index, each in enumerate(people) if not each] == ([3] if "blank" in name else [])
    assert np.median([is_seen(pose.body).sum() for each in people for pose in each[:1]]) >= 13
