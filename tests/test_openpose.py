import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from weights import fill

import openpose
from openpose import OpenPose, add_parts, detect_bodies, find_poses
from poses.maps import (
    LIMBS,
    blurring,
    body_input,
    body_size,
    decode_bodies,
    decode_hands,
    enlarged,
    face_boxes,
    hand_boxes,
    resizing,
    smoothing,
)
from poses.people import INTERPOLATED, fill_gaps, follow_people, smooth_poses
from poses.pose import Pose, absences, has_person, is_seen, load_poses
from video import read_frames, save_image, write_video

SHARED = Path(__file__).parents[2] / "shared"
needs_shared = pytest.mark.skipif(
    not SHARED.exists(), reason=f"what the public port computes is not in {SHARED}"
)
SCENES = ("one", "two", "crowd", "none")
NETS = {"body": "body_pose_model", "hand": "hand_pose_model", "face": "facenet"}


@pytest.fixture(scope="module")
def oracle():
    return load_file(SHARED / "oracle/openpose.safetensors")


@pytest.fixture(scope="module")
def scenes() -> dict:
    return json.loads((SHARED / "oracle/openpose.json").read_text())


# A person from the front, x and y in units of its height, (0, 0) between the feet.
# fmt: off
STANDING = np.array([
    (0, -.92), (0, -.80), (-.10, -.80), (-.13, -.65), (-.14, -.50), (.10, -.80), (.13, -.65), (.14, -.50),
    (-.06, -.50), (-.06, -.27), (-.06, -.04), (.06, -.50), (.06, -.27), (.06, -.04),
    (-.02, -.94), (.02, -.94), (-.04, -.93), (.04, -.93),
])
# fmt: on


def standing(x: float, floor: float, tall: float) -> np.ndarray:
    """A body (18, 3) in pixels."""
    return np.column_stack([STANDING * tall + (x, floor), np.full(18, 0.9)])


def maps_of(bodies: list[np.ndarray], height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a perfect body network would say of bodies in pixels: pafs (38, h, w), heatmaps (19, h, w)."""
    new_height, new_width = body_size(height, width)
    y, x = np.mgrid[: -(-new_height // 8), : -(-new_width // 8)] * 8 + 3.5  # centres of the cells
    heatmaps, pafs = np.zeros((19, *x.shape)), np.zeros((38, *x.shape))
    for body in bodies:
        points = (body[:, :2] + 0.5) * (new_width / width, new_height / height) - 0.5
        for heatmap, (px, py), seen in zip(heatmaps, points, is_seen(body)):
            blob = seen * np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * 7**2))
            np.maximum(heatmap, blob, out=heatmap)
        for start, end, channel in LIMBS:
            if is_seen(body[[start, end]]).all():
                way = points[end] - points[start]
                length = np.hypot(*way)
                dx, dy = x - points[start, 0], y - points[start, 1]
                along = (dx * way[0] + dy * way[1]) / length
                near = (np.abs(dx * way[1] - dy * way[0]) / length < 8) & (-8 < along)
                pafs[channel : channel + 2, near & (along < length + 8)] = (way / length)[:, None]
    heatmaps[18] = 1 - heatmaps.max(axis=0)
    return torch.from_numpy(pafs).float(), torch.from_numpy(heatmaps).float()


class Actors(nn.Module):
    """Stands for a body network that sees the given bodies, frame after frame."""

    def __init__(self, script: list[list[np.ndarray]], height: int, width: int):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.maps = iter([maps_of(bodies, height, width) for bodies in script])

    def forward(self, images):
        pafs, heatmaps = zip(*[next(self.maps) for _ in images])
        return torch.stack(pafs), torch.stack(heatmaps)


class RedFinder(nn.Module):
    """Stands for a hand or face network whose keypoint 8 is wherever the image is red."""

    def __init__(self, maps: int):
        super().__init__()
        self.maps = maps

    def forward(self, images):
        red = (images[:, 2] - images[:, :2].amax(dim=1)).clamp(0)  # BGR
        heatmaps = torch.zeros(len(images), self.maps, *(side // 8 for side in images.shape[2:]))
        heatmaps[:, 8] = nn.functional.avg_pool2d(red[:, None], 8)[:, 0]
        return heatmaps


def acted(script: list[list[np.ndarray]], height: int, width: int) -> OpenPose:
    nets = OpenPose(width=0.01)
    nets.body = Actors(script, height, width)
    nets.hand, nets.face = RedFinder(22), RedFinder(71)
    return nets


def detect(nets: OpenPose, frames: np.ndarray) -> list[list[Pose]]:
    people = detect_bodies(nets, frames)
    return [[add_parts(nets, frame, pose) for pose in found] for frame, found in zip(frames, people)]


def body_only(body: np.ndarray, height: int, width: int) -> Pose:
    return Pose(np.float32(body / (width, height, 1)))


# ---- Networks -----------------------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize("part", NETS)
def test_a_network_computes_what_the_public_one_does_under_the_names_of_its_file(part, oracle):
    manifest = (SHARED / f"checkpoints/{NETS[part]}.tsv").read_text().split()
    shapes = {name: tuple(map(int, shape.split("x"))) for name, shape in zip(manifest[::2], manifest[1::2])}
    with torch.device("meta"):
        net = getattr(OpenPose(), part)
    assert {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()} == shapes

    weights = fill({f"{part}.{name}": shape for name, shape in shapes.items()}, gain=1.4)
    net.load_state_dict({name: weights[f"{part}.{name}"] for name in shapes}, assign=True)
    with torch.inference_mode():
        output = net(oracle["net.input"])
    if part == "body":
        torch.testing.assert_close(output[0], oracle["net.body.pafs"], atol=1e-4, rtol=0)
        torch.testing.assert_close(output[1], oracle["net.body.heatmaps"], atol=1e-4, rtol=0)
    else:
        torch.testing.assert_close(output, oracle[f"net.{part}"], atol=1e-4, rtol=0)


def test_narrow_networks_give_as_many_maps_and_a_loss_on_every_stage_reaches_all_their_layers():
    nets = OpenPose(width=0.05)
    images = torch.rand(2, 3, 32, 24)
    pafs, heatmaps = nets.body(images)
    assert pafs.shape == (2, 38, 4, 3) and heatmaps.shape == (2, 19, 4, 3)
    assert nets.hand(images).shape == (2, 22, 4, 3)
    assert nets.face(images).shape == (2, 71, 4, 3)
    stages = sum(nets.body.stages(images) + nets.hand.stages(images), ())
    assert len(stages) == 6 * 2 + 6
    sum(maps.square().mean() for maps in stages).backward()
    for name, parameter in (*nets.body.named_parameters(), *nets.hand.named_parameters()):
        assert parameter.grad is not None, name


# ---- What the networks are shown, and how maps become pixels ------------------------------------


def noise(*shape: int) -> np.ndarray:
    """Smooth coloured noise, uint8: hard edges would test rounding more than resizing."""
    coarse = np.random.RandomState(0).randint(0, 256, (shape[0] // 8 + 2, shape[1] // 8 + 2, 3))
    image = Image.fromarray(coarse.astype(np.uint8)).resize(shape[1::-1], Image.Resampling.BICUBIC)
    return np.array(image)


@pytest.mark.parametrize("height, width", [(512, 288), (480, 640), (359, 641), (101, 77)])
def test_the_body_network_is_shown_the_frame_that_the_port_would_show_it(height, width):
    cv2 = pytest.importorskip("cv2")
    frame = noise(height, width)
    scale = 0.5 * 368 / height
    small = cv2.resize(
        frame[..., ::-1],
        (int(width * scale), int(height * scale)),
        interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LANCZOS4,
    )
    expected = np.full((-(-small.shape[0] // 8) * 8, -(-small.shape[1] // 8) * 8, 3), 128)
    expected[: small.shape[0], : small.shape[1]] = small
    shown = (body_input(torch.tensor(frame)[None])[0] + 0.5) * 256
    difference = shown.permute(1, 2, 0).numpy() - expected
    assert np.abs(difference).max() <= 1.01 and np.abs(difference).mean() < 0.1


@pytest.mark.parametrize("size, new_size", [(23, 184), (184, 512), (736, 128), (92, 736), (70, 61)])
def test_resizing_is_opencvs(size, new_size):
    cv2 = pytest.importorskip("cv2")
    values = np.random.RandomState(0).rand(size, size).astype(np.float32)
    method = cv2.INTER_AREA if new_size < size else cv2.INTER_LANCZOS4
    expected = cv2.resize(values, (new_size, new_size), interpolation=method)
    matrix = resizing(size, new_size)
    assert np.abs(matrix @ values @ matrix.T - expected).max() < 1e-4


@pytest.mark.parametrize("size", [128, 9])
def test_smoothing_is_scipys_and_the_hands_blur_is_opencvs(size):
    ndimage, cv2 = pytest.importorskip("scipy.ndimage"), pytest.importorskip("cv2")
    values = np.random.RandomState(0).rand(size, size)
    matrix = smoothing(size)
    assert np.abs(matrix @ values @ matrix.T - ndimage.gaussian_filter(values, 3)).max() < 1e-6
    matrix = blurring(size, 0.8, 3, "reflect")
    levels = (255 * values).astype(np.uint8)
    expected = cv2.GaussianBlur(levels, (0, 0), 0.8)
    assert np.abs(matrix @ levels @ matrix.T - expected).max() < 1.5


# ---- Bodies -------------------------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize("scene", SCENES)
def test_the_same_people_are_found_as_by_the_public_port(scene, oracle, scenes):
    truth = scenes[scene]
    bodies = decode_bodies(
        oracle[f"decode.{scene}.heatmaps"], oracle[f"decode.{scene}.pafs"], truth["height"], truth["width"]
    )
    assert len(bodies) == len(truth["people"])
    for body, person in zip(bodies, truth["people"]):
        assert is_seen(body).tolist() == [keypoint is not None for keypoint in person]
        expected = np.array([keypoint or (0, 0, 0) for keypoint in person])
        assert np.abs(body[:, :2] - expected[:, :2]).max() <= 2
        assert np.abs(body[:, 2] - expected[:, 2].clip(max=1)).max() < 0.01


@needs_shared
@pytest.mark.parametrize("scene", SCENES)
def test_hands_and_faces_are_looked_for_where_the_public_port_looks(scene, scenes):
    truth = scenes[scene]
    size = truth["height"], truth["width"]
    hands, faces = [], []
    for person in truth["people"]:
        body = np.array([keypoint or (0, 0, 0) for keypoint in person])
        boxes = hand_boxes(body, *size)
        hands += [(*box, part == "left_hand") for part, box in boxes.items()]
        faces += face_boxes(body, *size).values()
    assert len(hands) == len(truth["hand_boxes"]) and len(faces) == len(truth["face_boxes"])
    for found, expected in zip(hands + faces, truth["hand_boxes"] + truth["face_boxes"]):
        assert np.abs(np.subtract(found[:3], expected[:3])).max() <= 3
        assert found[3:] == tuple(expected[3:])  # which hand


@pytest.mark.parametrize("height, width", [(512, 288), (240, 427), (120, 90)])
def test_people_are_found_where_they_stand_at_any_size_even_cut_by_the_edge(height, width):
    tall = 0.9 * height
    whole = standing(0.4 * width, 0.98 * height, tall)
    half = standing(0.96 * width, 0.95 * height, 0.8 * tall)  # its left side is outside
    outside = half[:, 0] > width - 1
    half[outside] = 0
    pafs, heatmaps = maps_of([whole, half], height, width)
    bodies = sorted(decode_bodies(heatmaps, pafs, height, width), key=lambda body: body[1, 0])
    assert len(bodies) == 2
    for body, expected in zip(bodies, (whole, half)):
        assert (is_seen(body) == is_seen(expected)).all()
        # 2.5 % of the height is half a cell of the network's maps
        assert np.abs(body - expected)[:, :2].max() < 0.025 * height


def test_it_takes_four_joints_to_be_a_person():
    arm = standing(140, 500, 460)
    arm[[0, 1, *range(5, 18)]] = 0
    pafs, heatmaps = maps_of([arm], 512, 288)
    assert decode_bodies(heatmaps, pafs, 512, 288) == []
    arm[1] = standing(140, 500, 460)[1]
    pafs, heatmaps = maps_of([arm], 512, 288)
    (body,) = decode_bodies(heatmaps, pafs, 512, 288)
    assert is_seen(body).sum() == 4


def test_a_weak_field_links_short_limbs_and_not_one_across_half_the_frame():
    person = standing(140, 230, 200)
    person[10, 1] = 490  # an ankle 0.62 of the frame's height under its knee
    pafs, heatmaps = maps_of([person], 512, 288)
    (weak,) = decode_bodies(heatmaps, 0.15 * pafs, 512, 288)
    assert np.flatnonzero(~is_seen(weak)).tolist() == [10]
    (strong,) = decode_bodies(heatmaps, pafs, 512, 288)
    assert is_seen(strong).all()


def test_maps_that_say_yes_everywhere_are_no_people_and_soon_read():
    ones = torch.ones(38, 23, 23)
    assert decode_bodies(ones[:19], ones * 0, 512, 512) == []


# ---- Hands and faces ----------------------------------------------------------------------------


def hand_as_in_the_port(heatmaps: np.ndarray, height: int, width: int) -> np.ndarray:
    """Straight from its description: the maximum in the blob of the largest sum; (0, 0) for none."""
    ndimage = pytest.importorskip("scipy.ndimage")
    points = []
    for heatmap in heatmaps:
        blobs, count = ndimage.label(ndimage.gaussian_filter(heatmap, 3) > 0.05, np.ones((3, 3)))
        if not count:
            points.append((0, 0))
            continue
        largest = 1 + np.argmax(ndimage.sum(heatmap, blobs, range(1, count + 1)))
        y, x = np.unravel_index(np.argmax(np.where(blobs == largest, heatmap, 0)), heatmap.shape)
        points.append((int(x * width / 128), int(y * height / 128)))
    return np.array(points)


def test_a_hands_keypoint_is_the_highest_point_of_the_heaviest_blob():
    random = np.random.RandomState(3)
    y, x = np.mgrid[:128, :128]
    heatmaps = np.full((2, 21, 128, 128), 0.02, np.float32)  # much, but below the threshold
    for hand in range(2):
        for keypoint in range(20):  # the last stays empty
            for _ in range(keypoint % 4 + 1):
                px, py = random.uniform(8, 120, 2)
                wide, high, peak = *random.uniform(2, 12, 2), random.uniform(0.3, 1)
                blob = peak * np.exp(-(((x - px) / wide) ** 2 + ((y - py) / high) ** 2))
                heatmaps[hand, keypoint] += blob
    sizes = [(90, 90), (300, 260)]
    found = decode_hands(torch.from_numpy(heatmaps), sizes)
    for points, maps, size in zip(found, heatmaps, sizes):
        assert (points[:, :2] == hand_as_in_the_port(maps, *size)).all()
        assert is_seen(points).tolist() == [True] * 20 + [False]


def test_hands_and_faces_come_back_in_the_frames_coordinates_on_their_own_side():
    height, width = 360, 480
    body = standing(240, 350, 330)
    frame = np.full((height, width, 3), 90, np.uint8)
    left_box = hand_boxes(body, height, width)["left_hand"]
    face_box = face_boxes(body, height, width)["face"]
    red_hand = np.array(left_box[:2]) + (0.6 * left_box[2], 0.4 * left_box[2])
    red_cheek = np.array(face_box[:2]) + (0.3 * face_box[2], 0.4 * face_box[2])
    for x, y in (red_hand, red_cheek):
        frame[int(y) - 3 : int(y) + 4, int(x) - 3 : int(x) + 4] = (255, 0, 0)

    ((pose,),) = detect(acted([[body]], height, width), frame[None])
    assert np.flatnonzero(is_seen(pose.left_hand)).tolist() == [8]
    assert np.flatnonzero(is_seen(pose.face)).tolist() == [8]  # and in its own place
    assert not is_seen(pose.right_hand).any()
    assert np.abs(pose.left_hand[8, :2] * (width, height) - red_hand).max() < 4
    assert np.abs(pose.face[8, :2] * (width, height) - red_cheek).max() < 4


# ---- Frames to people ---------------------------------------------------------------------------


def test_many_frames_are_found_as_each_alone():
    height, width = 96, 128
    script = [[standing(20 + 4 * i, 90, 80)] * (i % 3 > 0) for i in range(20)]
    frames = np.zeros((20, height, width, 3), np.uint8)
    people = detect_bodies(acted(script, height, width), frames)
    assert [len(in_frame) for in_frame in people] == [len(bodies) for bodies in script]
    for i in range(20):
        (alone,) = detect_bodies(acted(script[i : i + 1], height, width), frames[:1])
        assert all((a.body == b.body).all() for a, b in zip(people[i], alone))


@pytest.mark.parametrize("height, width", [(1, 1), (37, 53), (90, 20), (30, 60)])
def test_an_untrained_network_and_frames_of_any_size_are_survived(height, width):
    torch.manual_seed(0)
    frames = np.random.RandomState(0).randint(0, 256, (2, height, width, 3), np.uint8)
    assert len(detect(OpenPose(width=0.03), frames)) == 2


def test_no_frames_have_no_people():
    assert detect(OpenPose(width=0.01), np.zeros((0, 8, 8, 3), np.uint8)) == []


def test_body_only_needs_no_other_network():
    nets = acted([[standing(64, 90, 80)]], 96, 128)
    del nets.hand, nets.face
    ((pose,),) = detect_bodies(nets, np.zeros((1, 96, 128, 3), np.uint8))
    assert is_seen(pose.body).all() and not is_seen(pose.face).any()


# ---- One person through time --------------------------------------------------------------------


def walk(start: float, end: float, frames: int, tall: float, floor=0.9) -> list[Pose]:
    """Somebody who crosses a square frame, with a detector's jitter and swinging arms."""
    random = np.random.RandomState(int(100 * start))
    poses = []
    for i, x in enumerate(np.linspace(start, end, frames)):
        body = standing(x, floor, tall)
        body[[4, 7], 0] += 0.05 * tall * np.sin(i / 3)
        body[:, :2] += random.normal(0, 0.004, (18, 2))
        poses.append(Pose(np.float32(body)))
    return poses


def position(pose: Pose) -> float:
    return float(pose.body[is_seen(pose.body), 0].mean())


@pytest.mark.parametrize("tall", [0.72, 0.65, 0.5])
@pytest.mark.parametrize("hidden", [0, 6, 12])
def test_two_who_cross_keep_their_identities_though_one_is_hidden_for_a_while(tall, hidden):
    right, left = walk(0.1, 0.9, 60, 0.72), walk(0.9, 0.1, 60, tall)
    people = []
    for i in range(60):
        behind_the_other = abs(i - 29.5) < hidden / 2
        # the detector knows no order
        people.append([right[i]] if behind_the_other else [[right[i], left[i]], [left[i], right[i]]][i % 2])
    tracks = follow_people(people, 1.0)
    assert len(tracks) == 2
    assert tracks[0].frames == list(range(60)) and len(tracks[1].frames) == 60 - hidden
    for frame, pose in zip(tracks[0].frames, tracks[0].people):
        assert pose is right[frame]
    for frame, pose in zip(tracks[1].frames, tracks[1].people):
        assert pose is left[frame]


def test_the_main_person_is_the_large_one_and_who_comes_back_is_the_same():
    main, child = walk(0.3, 0.5, 50, 0.8), walk(0.8, 0.7, 50, 0.3)
    people = [[child[i]] if 15 <= i < 35 else [child[i], main[i]] for i in range(50)]
    tracks = follow_people(people, 1.0)
    assert len(tracks) == 2
    assert tracks[0].frames == [*range(15), *range(35, 50)]
    assert [id(pose) for pose in tracks[1].people] == [id(pose) for pose in child]


def test_somebody_elses_false_limb_does_not_take_the_person_along():
    main = walk(0.3, 0.3, 20, 0.8)
    ghost = Pose(standing(0.9, 0.2, 0.15).astype(np.float32))
    people = [[ghost, main[i]] if i % 4 == 0 else [main[i]] for i in range(20)]
    people[10] = [ghost]
    tracks = follow_people(people, 1.0)
    assert tracks[0].frames == [i for i in range(20) if i != 10]


def test_gaps_of_up_to_five_frames_are_bridged_and_marked():
    poses = walk(0.2, 0.8, 30, 0.7)
    for i in (*range(3), *range(10, 15), *range(20, 26), 29):
        poses[i] = Pose()
    filled = fill_gaps(poses)
    assert absences(filled) == "0-2, 20-25, 29"  # ends and long gaps are not invented
    for i in range(10, 15):
        way = (i - 9) / 6
        expected = (1 - way) * poses[9].body + way * poses[15].body
        assert np.abs(filled[i].body - expected)[:, :2].max() < 1e-6
        assert (filled[i].body[:, 2] == np.float32(INTERPOLATED)).all()
    assert (filled[5].body == poses[5].body).all()


def test_single_keypoints_and_hands_are_bridged_too():
    hands = np.zeros((8, 21, 3), np.float32)
    hands[:, 3] = (0.5, 0.5, 0.8)
    hands[2:4, 3] = 0
    filled = fill_gaps([Pose(left_hand=hand) for hand in hands])
    assert [pose.left_hand[3, 2] for pose in filled] == pytest.approx([0.8, 0.8, 0.04, 0.04] + [0.8] * 4)
    assert not is_seen(filled[3].left_hand[4:]).any()


def test_smoothing_leaves_motion_and_gaps_alone_and_takes_out_jitter():
    frames = np.arange(40)
    path = 0.5 + 0.2 * np.sin(2 * np.pi * frames / 12)  # 2 Hz at 24 frames per second
    jitter = np.random.RandomState(0).normal(0, 0.01, 40)

    def swing(x: np.ndarray) -> list[Pose]:
        bodies = np.zeros((40, 18, 3), np.float32)
        bodies[:, 0] = np.column_stack([x, 1e-4 * frames**2, np.full(40, 0.7)])
        bodies[18, 0] = 0
        return [Pose(body) for body in bodies]

    still = np.stack([pose.body[0] for pose in smooth_poses(swing(path))])
    moved = np.stack([pose.body[0] for pose in smooth_poses(swing(path + jitter))])
    seen = frames != 18
    assert np.abs(still[seen, 0] - path[seen]).max() < 0.012  # of a swing of 0.4
    assert np.abs(still[seen, 1] - 1e-4 * frames[seen] ** 2).max() < 1e-5
    assert (moved - still)[seen, 0].std() < 0.7 * jitter.std()
    assert (still[18] == 0).all() and (still[seen, 2] == np.float32(0.7)).all()


def test_finding_poses_follows_one_and_says_when_there_is_nobody_to_follow():
    height, width = 96, 128
    frames = np.zeros((9, height, width, 3), np.uint8)
    script = [[standing(30, 80, 40), standing(90 + i, 90, 80)] for i in range(9)]
    script[4] = []
    large = find_poses(acted(script, height, width), frames)
    small = find_poses(acted(script, height, width), frames, person=2, whole_bodies=[0], smooth=True)
    assert all(position(pose) > 0.65 for pose in large)
    assert all(position(pose) < 0.35 for pose in small)
    assert (large[4].body[:, 2] == np.float32(INTERPOLATED)).all()
    with pytest.raises(ValueError, match="no person 3: 2 found"):
        find_poses(acted(script, height, width), frames, person=3)
    with pytest.raises(ValueError, match="no person in any of the 9 frames"):
        find_poses(acted([[]] * 9, height, width), frames)


def test_hands_too_small_to_look_at_are_enlarged():
    """In frames of 96 pixels the box around a hand has fewer than the least that is looked at."""
    body = standing(60, 90, 80)
    x, y, side = hand_boxes(body * (4, 4, 1), 384, 512)["left_hand"]
    large = np.full((1, 384, 512, 3), 90, np.uint8)
    large[:, y + side // 2 :, x + side // 2 :][:, :24, :24] = (255, 0, 0)
    frames = np.asarray(Image.fromarray(large[0]).reduce(4))[None]
    nets = acted([[body]], 96, 128)
    assert not detect(nets, frames)[0][0].left_hand.any()
    nets = acted([[body]], 96, 128)
    (pose,) = find_poses(nets, frames)
    middle = np.array([x, y]) + side // 2 + 12
    assert np.abs(pose.left_hand[8, :2] * (512, 384) - middle).max() < 12
    assert enlarged(large[0]).shape == (512, 683, 3)
    assert enlarged(np.zeros((600, 520, 3), np.uint8)).shape == (600, 520, 3)


def test_hands_are_found_where_the_arm_was_only_interpolated():
    height, width = 360, 480
    body = standing(240, 350, 330)
    no_arm = body.copy()
    no_arm[5:8] = 0
    x, y, side = hand_boxes(body, height, width)["left_hand"]
    frames = np.full((3, height, width, 3), 90, np.uint8)
    frames[:, y + side // 2 : y + side // 2 + 7, x + side // 2 : x + side // 2 + 7] = (255, 0, 0)
    poses = find_poses(acted([[body], [no_arm], [body]], height, width), frames)
    assert poses[1].left_hand[8, 2] > INTERPOLATED
    assert poses[0].left_hand.any()
    poses = find_poses(acted([[body], [no_arm], [body]], height, width), frames, whole_bodies=[1])
    assert poses[1].left_hand.any()
    assert not poses[0].left_hand.any() and poses[0].body.any()


# ---- The command line ---------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch):
    """Runs `python openpose.py ...` with networks that see a given script."""

    def run(script: list[list[np.ndarray]], height: int, width: int, *arguments) -> None:
        nets = acted(script, height, width)
        monkeypatch.setattr(openpose, "load_openpose", lambda name, device: nets)
        monkeypatch.setattr("sys.argv", ["openpose.py", *map(str, arguments)])
        openpose.main(openpose.parse_arguments())

    return run


def test_a_clip_gets_its_poses_and_a_preview_beside_it(run, tmp_path, capsys):
    height, width = 98, 132
    clip = tmp_path / "clip.mp4"
    write_video(clip, [np.full((height, width, 3), 200, np.uint8)] * 14, 12)
    script = [[standing(50 + i, 90, 80)] for i in range(14)]
    script[5:12] = [[]] * 7
    run(script, height, width, clip)

    poses = load_poses(tmp_path / "clip.poses.json")
    assert len(poses) == 14 and absences(poses) == "5-11"
    expected = body_only(script[0][0], height, width).body
    assert np.abs(poses[0].body - expected)[:, :2].max() < 0.025
    assert "no person in frames 5-11" in capsys.readouterr().out

    preview, fps = read_frames(tmp_path / "clip.poses.mp4")
    assert preview.shape == (14, height, width, 3) and fps == 12
    skeleton = preview[0].astype(int).max(axis=2) - preview[0].min(axis=2) > 60
    assert skeleton.any() and not (preview[8].max(axis=2) > 130).any()  # nobody drawn there


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_an_image_of_any_kind_gets_its_pose_and_a_picture(run, tmp_path, mode):
    image = Image.new(mode, (57, 101), "white")
    save_image(tmp_path / "photo.png", image)
    run([[standing(28, 95, 90)]], 101, 57, tmp_path / "photo.png", "--body-only", "--smooth")
    (pose,) = load_poses(tmp_path / "photo.poses.json")
    assert has_person(pose)
    assert Image.open(tmp_path / "photo.poses.png").size == (57, 101)


def test_a_folder_of_images_is_a_clip_and_out_says_where_to_write(run, tmp_path):
    (tmp_path / "my.frames").mkdir()
    for i in range(3):
        save_image(tmp_path / f"my.frames/{i}.png", np.zeros((96, 128, 3), np.uint8))
    script = [[standing(60, 90, 80)]] * 3
    run(script, 96, 128, tmp_path / "my.frames")
    assert len(load_poses(tmp_path / "my.frames.poses.json")) == 3
    run(script, 96, 128, tmp_path / "my.frames", "--out", tmp_path / "dance.json")
    assert len(load_poses(tmp_path / "dance.json")) == 3 and (tmp_path / "dance.mp4").exists()


def test_another_person_is_followed_on_request_without_hands_and_face(run, tmp_path):
    (tmp_path / "two").mkdir()
    for i in range(3):
        save_image(tmp_path / f"two/{i}.png", np.full((192, 256, 3), (255, 0, 0), np.uint8))
    script = [[standing(60, 180, 170), standing(200, 180, 110)]] * 3
    run(script, 192, 256, tmp_path / "two", "--person", 2, "--body-only")
    for pose in load_poses(tmp_path / "two.poses.json"):
        seen = pose.body[is_seen(pose.body)]
        assert 0.7 < seen[:, 0].mean() < 0.85
        assert not is_seen(pose.left_hand).any() and not is_seen(pose.face).any()


def test_poses_that_exist_are_replaced_only_where_out_names_them(run, tmp_path):
    save_image(tmp_path / "photo.png", np.zeros((101, 57, 3), np.uint8))
    (tmp_path / "photo.poses.json").write_text("edited by hand")
    with pytest.raises(FileExistsError, match=r"photo\.poses\.json: exists"):
        run([[standing(28, 95, 90)]], 101, 57, tmp_path / "photo.png")
    assert (tmp_path / "photo.poses.json").read_text() == "edited by hand"
    named = "--out", tmp_path / "photo.poses.json"
    run([[standing(28, 95, 90)]], 101, 57, tmp_path / "photo.png", *named)
    assert has_person(load_poses(tmp_path / "photo.poses.json")[0])


def test_the_clip_itself_is_never_overwritten_by_its_preview(run, tmp_path):
    clip = tmp_path / "dance.mp4"
    clip.write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"dance\.json: choose a name .* dance\.mp4 becomes"):
        run([], 96, 128, clip, "--out", tmp_path / "dance.json")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        run([], 96, 128, clip, "--out", tmp_path / "nowhere/poses.json")
    assert clip.read_bytes() == b"precious"


def test_a_landscape_is_refused_with_its_name_and_leaves_nothing(run, tmp_path):
    save_image(tmp_path / "hills.png", noise(96, 128))
    with pytest.raises(ValueError, match=r"hills\.png: no person in any of the 1 frames"):
        run([[]], 96, 128, tmp_path / "hills.png")
    assert [path.name for path in tmp_path.iterdir()] == ["hills.png"]


@pytest.mark.parametrize(("height", "width"), [(4, 2000), (2000, 4)])
def test_strips_are_refused_before_anything_is_looked_for(height, width):
    with torch.device("meta"):
        nets = OpenPose()
    frames = np.zeros((1, height, width, 3), np.uint8)
    with pytest.raises(ValueError, match=f"frames of {width}x{height} pixels are too long and narrow"):
        find_poses(nets, frames)


# ---- The command line ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "told"),
    [([os.devnull], "is neither a file nor a folder"), (["clip.mp4", "--person", "0"], "'0'")],
)
def test_what_cannot_be_a_clip_or_a_person_is_told_at_once(given, told, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["openpose.py", *given])
    with pytest.raises(SystemExit, match="2"):
        openpose.parse_arguments()
    assert told in capsys.readouterr().err
