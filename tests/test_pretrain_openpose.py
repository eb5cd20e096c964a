"""The demo's OpenPose: it is trained towards what decoding reads, and it finds unseen puppets."""

import numpy as np
import pytest
import torch

from checkpoint import DEMO
from demo import pretrain_openpose
from demo.motion import motion
from demo.pool import stacked
from demo.pretrain_openpose import PARTS, SIZES, body_batch, evaluate, face_batch, hand_batch, varied
from demo.puppet import pose_of, random_puppet, render
from openpose import OpenPose, load_openpose
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
    true = keypoints[0, PARTS["body"]]
    assert (is_seen(body) == is_seen(true)).all()
    assert np.abs(body - true)[is_seen(true), :2].max() < 1


def test_hand_targets_decode_to_the_hands(puppet):
    frames, keypoints = puppet
    images, (maps,) = hand_batch(Exactly(), frames, keypoints)
    to_map = cells_to_pixels(maps.shape[-1], images.shape[-1], HAND_MAP)
    boxes = hand_boxes(keypoints[0, PARTS["body"]].round(), 128, 128)
    assert list(boxes) == ["left_hand", "right_hand"]
    sizes = [(side, side) for _, _, side in boxes.values()]
    hands = decode_hands(separable(to_map, maps[:, :21], to_map), sizes)
    for hand, true, (x, y, _) in zip(hands, np.split(keypoints[0, PARTS["hands"]], 2), boxes.values()):
        assert is_seen(hand).all()
        assert np.abs(hand + (x, y, 0) - true)[:, :2].max() < 1


def test_face_targets_decode_to_the_face(puppet):
    frames, keypoints = puppet
    _, (maps,) = face_batch(Exactly(), frames, keypoints)
    nets = OpenPose(**{**SIZES, "width": 0.01})
    nets.face = Says(maps)
    x, y, side = face_boxes(keypoints[0, PARTS["body"]].round(), 128, 128)["face"]
    (face,) = find_faces(nets.face, [frames[0, y : y + side, x : x + side]], SIZES["face_size"])
    assert is_seen(face).all()
    cell = side / (maps.shape[-1] - 1)  # a face's points are read in whole cells
    assert np.abs(face + (x, y, 0) - keypoints[0, PARTS["face"]])[:, :2].max() < 1 + cell / 2


@pytest.mark.parametrize("height", [256, 192])
def test_keypoints_stay_on_the_puppet_when_it_is_varied(height):
    """White puppets with black keypoints: wherever they go, it is black there, or they are out of sight."""
    pose = stacked(pose_of(random_puppet(5), motion(5, 1)[0]))
    frame = np.full((256, 256, 3), 255, np.uint8)
    for x, y, _ in pose[:14]:
        x, y = int(x * 256), int(y * 256)
        frame[y - 3 : y + 4, x - 3 : x + 4] = 0
    pose[:, 1] *= 256 / height
    pool = {
        "frames": np.stack([frame[:height]] * 8),
        "masks": np.ones((8, height // 4, 64), bool),
        "keypoints": np.stack([pose] * 8),
    }
    frames, keypoints = varied(np.random.default_rng(0), pool, 8)
    assert len({tuple(points[0]) for points in keypoints}) > 4
    assert keypoints[:, :14, 2].mean() > 0.6
    for image, points in zip(frames.numpy(), keypoints[:, :14]):
        for x, y, seen in points:
            if seen:
                assert 0 <= x < 256 and 0 <= y < height
                assert image[int(y), int(x)].mean() < image.mean() / 2


def test_networks_learn_from_whole_puppets_larger_ones_and_the_demos(monkeypatch, tmp_path):
    for name, value in {"IDENTITIES": range(2), "HEIGHT": 96, "WIDTH": 128}.items():
        monkeypatch.setattr(pretrain_openpose, name, value)
    monkeypatch.setattr(pretrain_openpose, "SEEDS", {128: range(3), 256: range(2)})
    for _ in range(2):  # rendered, then read
        pools = pretrain_openpose.load_pools(tmp_path, tmp_path / "pool")
    shapes = [(3, 128, 128, 3), (2, 256, 256, 3), (2 * 9, 96, 128, 3)]
    assert [pool["frames"].shape for pool in pools] == shapes
    for pool in pools:
        _, height, width, _ = pool["frames"].shape
        for mask, pose in zip(pool["masks"], pool["keypoints"]):
            x, y = (pose[0, :2] * (width // 4, height // 4)).astype(int)  # the nose
            assert mask[y, x]
    torch.manual_seed(0)
    hand = OpenPose(**{**SIZES, "width": 0.01}).hand
    twice = [pool | {name: np.repeat(pool[name], 2, 0) for name in pool} for pool in pools]
    pretrain_openpose.train("hand", hand, twice, tmp_path, steps=2, batch=2, peak_lr=1e-3)
    last = [weight for name, weight in hand.named_parameters() if "Mconv7" in name or "6_2" in name]
    assert last and any(weight.any() for weight in last), "they start at zero"
    assert (tmp_path / "openpose_hand.pt").exists()


def test_the_shipped_networks_are_small_and_find_unseen_puppets():
    assert sum(file.stat().st_size for file in (DEMO / "openpose").iterdir()) < 4.5e6
    figures = evaluate(load_openpose("demo"), range(20))
    shares, off = ({part: figures[part][i] for part in PARTS} for i in range(2))
    assert shares["body"] >= 0.95 and shares["hands"] >= 0.9 and shares["face"] >= 0.97
    assert off["body"] < 1.2 and off["hands"] < 0.5 and off["face"] < 0.75
