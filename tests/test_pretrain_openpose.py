"""The demo's OpenPose: it is trained towards what decoding reads, and it finds unseen puppets."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from demo import pretrain, pretrain_openpose
from demo.motion import motion
from demo.pool import stacked
from demo.pretrain_openpose import SIZES, body_batch, crops_batch, evaluate, varied
from demo.puppet import pose_of, random_puppet, render
from openpose import load_openpose
from poses.maps import (
    HAND_MAP,
    cells_to_pixels,
    decode_bodies,
    decode_hands,
    face_boxes,
    find_faces,
    hand_boxes,
    separable,
)
from poses.pose import is_seen
from public.places import DEMO


@pytest.fixture
def puppet() -> tuple[torch.Tensor, np.ndarray]:
    """A frame uint8 (1, 128, 128, 3) and its keypoints (1, 130, 3) in pixels."""
    frame, pose, _ = render(random_puppet(5), motion(5, 1)[0])
    return torch.tensor(frame)[None], stacked(pose)[None] * (128, 128, 1)


class Exactly:
    """In place of a random generator, for bodies that are found without an error."""

    def normal(self, mean: float, deviation: float, shape: tuple) -> np.ndarray:
        return np.zeros(shape)


class Says(torch.nn.Module):
    """Stands for a network that gives its targets."""

    def __init__(self, maps: torch.Tensor):
        super().__init__()
        self.maps = maps

    def forward(self, images):
        return self.maps


def test_a_pose_is_what_render_gives():
    puppet, state = random_puppet(3), motion(4, 1)[0]
    assert (stacked(pose_of(puppet, state)) == stacked(render(puppet, state)[1])).all()


def test_body_targets_decode_to_the_body(puppet):
    frames, keypoints = puppet
    _, (fields, heatmaps) = body_batch(frames, keypoints)
    (body,) = decode_bodies(heatmaps[0], fields[0], 128, 128)
    true = keypoints[0, :18]
    assert (is_seen(body) == is_seen(true)).all()
    assert np.abs(body - true)[is_seen(true), :2].max() < 1


def test_hand_targets_decode_to_the_hands(puppet):
    frames, keypoints = puppet
    images, (maps,) = crops_batch("hand", Exactly(), frames, keypoints)
    to_map = cells_to_pixels(maps.shape[-1], images.shape[-1], HAND_MAP)
    boxes = hand_boxes(keypoints[0, :18].round(), 128, 128)
    assert list(boxes) == ["left_hand", "right_hand"]
    sizes = [(side, side) for _, _, side in boxes.values()]
    hands = decode_hands(separable(to_map, maps[:, :21], to_map), sizes)
    for hand, true, (x, y, _) in zip(hands, np.split(keypoints[0, 88:], 2), boxes.values()):
        assert is_seen(hand).all()
        assert np.abs(hand + (x, y, 0) - true)[:, :2].max() < 1


def test_face_targets_decode_to_the_face(puppet):
    frames, keypoints = puppet
    _, (maps,) = crops_batch("face", Exactly(), frames, keypoints)
    x, y, side = face_boxes(keypoints[0, :18].round(), 128, 128)["face"]
    (face,) = find_faces(Says(maps), [frames[0, y : y + side, x : x + side]], SIZES["face_size"])
    assert is_seen(face).all()
    cell = side / (maps.shape[-1] - 1)  # a face's points are read in whole cells
    assert np.abs(face + (x, y, 0) - keypoints[0, 18:88])[:, :2].max() < 1 + cell / 2


@pytest.mark.parametrize("height", [256, 192])
def test_keypoints_stay_on_the_puppet_when_it_is_varied(height):
    """White puppets with black keypoints: wherever they go, it is black there, or they are out of sight."""
    pose = stacked(pose_of(random_puppet(5), motion(5, 1)[0]))
    frame = np.full((256, 256, 3), 255, np.uint8)
    for x, y, _ in pose[:14]:
        x, y = int(x * 256), int(y * 256)
        frame[y - 3 : y + 4, x - 3 : x + 4] = 0
    pose[:, 1] *= 256 / height
    pool = {"frames": np.stack([frame[:height]] * 8)[:, None], "poses": np.stack([pose] * 8)[:, None]}
    frames, keypoints = varied(np.random.default_rng(1), pool, 8)
    assert len({tuple(points[0]) for points in keypoints}) > 4
    assert keypoints[:, :14, 2].mean() > 0.6
    for image, points in zip(frames.numpy(), keypoints[:, :14]):
        for x, y, seen in points:
            if seen:
                assert 0 <= x < 256 and 0 <= y < height
                assert image[int(y), int(x)].mean() < image.mean() / 2


@pytest.mark.filterwarnings("ignore:Mean of empty slice")  # nobody is found after one step
def test_the_networks_are_made_from_whole_puppets_and_the_demos(monkeypatch, tmp_path):
    """All of it, tiny, and once more, when everything is there already."""
    for name, value in {"IDENTITIES": range(10_000, 10_002), "HEIGHT": 96, "WIDTH": 128}.items():
        monkeypatch.setattr(pretrain, name, value)
    small = {
        "IDENTITIES": range(30_000, 30_002),
        "SIZES": SIZES | {"width": 0.01},
        "STEPS": {"body": 1, "hand": 1, "face": 1},
        "BATCH": 2,
        "EVALUATED": 1,
    }
    for name, value in small.items():
        monkeypatch.setattr(pretrain_openpose, name, value)
    work, out, pool = (tmp_path / name for name in ("work", "out", "pool.npy"))
    command = ["pretrain_openpose.py", "--work", work, "--out", out, "--pool", pool]
    monkeypatch.setattr("sys.argv", list(map(str, command)))
    pretrain_openpose.main()
    first = (out / "hand.safetensors").read_bytes()
    for path, height in ((work / "pool.npy", 128), (pool, 96)):
        rows = np.load(path)
        assert rows["frames"].shape == (2, 9, height, 128, 3)
        for mask, pose in zip(rows["masks"][:, 0], rows["poses"][:, 0]):
            x, y = (pose[0, :2] * (32, height // 4)).astype(int)  # the nose
            assert mask[y, x]
    written = (work / "openpose_hand.pt").stat().st_mtime
    maps = [weight for name, weight in load_file(out / "hand.safetensors").items() if "Mconv7" in name]
    assert maps and any(weight.any() for weight in maps), "they start at zero"
    pretrain_openpose.main()
    assert (out / "hand.safetensors").read_bytes() == first
    assert (work / "openpose_hand.pt").stat().st_mtime == written


@pytest.mark.slow
def test_the_shipped_networks_are_small_and_find_unseen_puppets():
    assert sum(file.stat().st_size for file in (DEMO / "openpose").iterdir()) < 4.5e6
    figures = evaluate(load_openpose("demo"), range(20))
    (body, body_off), (face, face_off), (hand, hand_off) = figures.values()
    assert body >= 0.95 and hand >= 0.9 and face >= 0.97
    assert body_off < 1.2 and hand_off < 0.5 and face_off < 0.75
