"""Poses from pixels: OpenPose's body, hand and face networks, and one person followed.

    python openpose.py clip.mp4

writes `clip.poses.json` and `clip.poses.mp4`, the clip with its skeleton. The networks are CMU's (Cao et al.,
"OpenPose", TPAMI 2019; Simon et al., "Hand Keypoint Detection in Single Images", CVPR 2017) under the names of the
public files. `poses/maps.py` has what they are shown and how their maps are read.
"""

from safe.process import before_torch, run_command

if __name__ == "__main__":
    before_torch()

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm, trange

from checkpoint import fill
from poses import maps
from poses.ink import hint_at_drawing
from poses.people import fill_gaps, follow_one, smooth_poses
from poses.pose import Pose, absences, draw_pose, has_person, is_seen, save_poses
from public.configs import read_config, read_openpose_sizes
from public.hub import public_files
from public.places import model_path
from safe.arguments import DEVICE, path, whole
from safe.devices import choose_device
from video import IMAGES, Clip, open_clip, save_image, write_video

# ---- The networks -------------------------------------------------------------------------------

# fmt: off
# Tables of convolutions: (name, channels, kernel). {} is the stage and branch; 0 channels are the branch's maps.
POOL = ("pool", 0, 0)
VGG = [  # the first ten convolutions of VGG-19
    ("conv1_1", 64, 3), ("conv1_2", 64, 3), POOL,
    ("conv2_1", 128, 3), ("conv2_2", 128, 3), POOL,
    ("conv3_1", 256, 3), ("conv3_2", 256, 3), ("conv3_3", 256, 3), ("conv3_4", 256, 3), POOL,
    ("conv4_1", 512, 3), ("conv4_2", 512, 3),
]
BODY_FEATURES = [*VGG, ("conv4_3_CPM", 256, 3), ("conv4_4_CPM", 128, 3)]
BODY_STAGE_1 = [(f"conv5_{n}_CPM{{}}", 128, 3) for n in (1, 2, 3)]
BODY_STAGE_1 += [("conv5_4_CPM{}", 512, 1), ("conv5_5_CPM{}", 0, 1)]
PART_FEATURES = [*VGG, *((f"conv{n}", 512, 3) for n in ("4_3", "4_4", "5_1", "5_2")), ("conv5_3_CPM", 128, 3)]
PART_STAGE_1 = [("conv6_1_CPM{}", 512, 1), ("conv6_2_CPM{}", 0, 1)]
LATER_STAGE = [(f"Mconv{n}{{}}", 128, 7) for n in (1, 2, 3, 4, 5)] + [("Mconv6{}", 128, 1), ("Mconv7{}", 0, 1)]
# fmt: on


class PoseMachine(nn.Module):
    """Convolutions under the public files' flat names, in chains with ReLUs between them.

    The chains of the first stage see the features, those of a later one also what the stage before said. `width`
    multiplies the public networks' channels; `branches` names a stage's chains and says how many maps each gives.
    """

    def __init__(self, features: list, first: list, branches: dict[str, int], width: float, stages: int):
        super().__init__()
        self.width = width
        self.features = self.add(features)
        channels = self.get_submodule(self.features[-1]).out_channels
        self.chains = [[self.add(first, name, channels, given) for name, given in branches.items()]]
        inputs = sum(branches.values()) + channels
        for stage in range(2, stages + 1):
            named = [(f"_stage{stage}{name}", inputs, given) for name, given in branches.items()]
            self.chains.append([self.add(LATER_STAGE, *chain) for chain in named])

    def add(self, table: list, name: str = "", inputs: int = 3, given: int = 0) -> list[str]:
        """Makes a table's layers, on an input of `inputs` channels; their names are for `run`."""
        layers = [template.format(name) for template, _, _ in table]
        for layer, (_, channels, kernel) in zip(layers, table):
            if layer != POOL[0]:
                channels = max(1, round(channels * self.width)) if channels else given
                self.add_module(layer, nn.Conv2d(inputs, channels, kernel, padding=kernel // 2))
                inputs = channels
        return layers

    def run(self, layers: list[str], x: Tensor) -> Tensor:
        for index, name in enumerate(layers):
            if name == POOL[0]:
                x = F.max_pool2d(x, 2)  # before the ReLU, which gives the same on fewer pixels
            else:
                x = self.get_submodule(name)(F.relu(x, inplace=True) if index else x)
        return x

    def stages(self, images: Tensor) -> list[tuple[Tensor, ...]]:
        """The maps of each stage, as in `forward`; training puts a loss on every one."""
        features = x = F.relu(self.run(self.features, images))
        said = []
        for chains in self.chains:
            said.append(tuple(self.run(layers, x) for layers in chains))
            x = torch.cat([*said[-1], features], dim=1)
        return said


class BodyNet(PoseMachine):
    """Where 18 keypoints are, and along which directions limbs join them (`body_pose_model`)."""

    def __init__(self, width: float = 1.0, stages: int = 6):
        branches = {"_L1": maps.LIMB_MAPS, "_L2": maps.BODY_MAPS}
        super().__init__(BODY_FEATURES, BODY_STAGE_1, branches, width, stages)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, 3, 8h, 8w), BGR in [-0.5, 0.5] -> part affinity fields (N, 38, h, w), where x and y of a limb
        follow each other, and heatmaps (N, 19, h, w), the last the background.
        """
        pafs, heatmaps = self.stages(images)[-1]
        return pafs, F.relu(heatmaps)  # the port's last stage has a ReLU here, and only here


class PartNet(PoseMachine):
    """Where the keypoints of one hand (21, `hand_pose_model`) or one face (70, `facenet`) are."""

    def __init__(self, keypoints: int, width: float = 1.0, stages: int = 6):
        super().__init__(PART_FEATURES, PART_STAGE_1, {"": keypoints + 1}, width, stages)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, 8h, 8w), BGR in [-0.5, 0.5] -> heatmaps (N, keypoints + 1, h, w), background last."""
        (heatmaps,) = self.stages(images)[-1]
        return heatmaps


class OpenPose(nn.Module):
    """The three networks, by default of the public files' sizes; `OpenPose(**config)` is its twin."""

    def __init__(
        self,
        width: float = 1.0,  # multiplies the public networks' channels
        stages: Sequence[int] = (6, 6, 6),  # of body, hand and face
        hand_sizes: Sequence[int] = (184, 368, 552, 736),  # pixels; the maps are averaged over them
        face_size: int = 384,  # pixels
    ):
        super().__init__()
        shown = {"hand_sizes": tuple(hand_sizes), "face_size": face_size}
        self.config = {"width": width, "stages": tuple(stages), **shown}
        self.body = BodyNet(width, stages[0])
        self.hand = PartNet(21, width, stages[1])
        self.face = PartNet(70, width, stages[2])


OPENPOSE_PARTS = ("body", "hand", "face")


def load_openpose(name: str | Path = "sd15", device: str | torch.device = "cpu") -> OpenPose:
    """The networks in float32: a model's own if it has any, else the public ones. Raises as `load_model` does."""
    folder = model_path(name) / "openpose"
    with torch.device("meta"):
        openpose = read_config(folder, lambda config: OpenPose(**read_openpose_sizes(config))) or OpenPose()
    own = {part: folder / f"{part}.safetensors" for part in OPENPOSE_PARTS}
    files = own if folder.is_dir() else public_files(OPENPOSE_PARTS, half=False)
    for part, file in files.items():
        fill(openpose.get_submodule(part), part, file, device, torch.float32)
    return openpose.eval()


# ---- Frames to people ---------------------------------------------------------------------------

AT_ONCE = 16  # frames: the body network sees them small, so that many need half a gigabyte


@torch.inference_mode()
def detect_bodies(nets: OpenPose, frames: np.ndarray | Clip, progress: bool = False) -> list[list[Pose]]:
    """Frames uint8 RGB (F, H, W, 3) -> the bodies in each, in canvas-normalised coordinates."""
    height, width = frames.shape[1:3]
    device = next(nets.body.parameters()).device
    people, coming = [], iter(frames)
    for _ in trange(0, len(frames), AT_ONCE, desc="bodies", unit="batch", disable=not progress):
        batch = (torch.tensor(frame[None], device=device) for frame in islice(coming, AT_ONCE))
        small = [maps.body_input(frame) for frame in batch]
        pafs, heatmaps = nets.body(torch.cat(small))
        for of_frame in zip(heatmaps, pafs):
            bodies = maps.decode_bodies(*of_frame, height, width)
            people.append([Pose(np.float32(body / (width, height, 1))) for body in bodies])
    return people


@torch.inference_mode()
def add_parts(nets: OpenPose, frame: np.ndarray, pose: Pose) -> Pose:
    """The pose with the hands and the face that are found in its frame, uint8 (H, W, 3)."""
    height, width = frame.shape[:2]
    canvas, device = np.array([width, height, 1]), next(nets.body.parameters()).device
    body = (pose.body * canvas).round(3)  # rounded to get back what was found, exactly
    looks = [
        (maps.hand_boxes, maps.find_hands, nets.hand, nets.config["hand_sizes"]),
        (maps.face_boxes, maps.find_faces, nets.face, nets.config["face_size"]),
    ]
    for boxes, find, net, sizes in looks:
        found = boxes(body, height, width)
        crops = [torch.tensor(frame[y : y + n, x : x + n], device=device) for x, y, n in found.values()]
        for (part, (x, y, _)), points in zip(found.items(), find(net, crops, sizes) if crops else ()):
            points = (points + is_seen(points)[:, None] * (x, y, 0)) / canvas
            pose = replace(pose, **{part: points.astype(np.float32)})
    return pose


def find_poses(
    nets: OpenPose,
    frames: np.ndarray | Clip,
    person: int = 1,
    whole_bodies: Sequence[int] | None = None,
    smooth: bool = False,
    progress: bool = False,
) -> list[Pose]:
    """One person's pose in every frame, uint8 RGB (F, H, W, 3), empty where they are not found.

    `person` counts from 1, the most prominent. Short gaps are interpolated (`fill_gaps`). Hands and face are
    looked for too, in all frames or in those that `whole_bodies` names; small frames are `enlarged` for that.
    Raises ValueError when nobody is found, or fewer people than `person`.
    """
    people = detect_bodies(nets, frames, progress)
    if not any(has_person(pose) for in_frame in people for pose in in_frame):
        few = "it takes at least four joints of somebody who is not too small"
        raise ValueError(f"no person in any of the {len(frames)} frames; {few}")
    poses = fill_gaps(follow_one(people, frames.shape[2] / frames.shape[1], person))
    whole = range(len(frames)) if whole_bodies is None else whole_bodies
    number = max(whole, default=-1) + 1
    looked_at = tqdm(zip(range(number), frames), "hands and faces", number, disable=not progress)
    for index, frame in looked_at:
        if index in whole:
            poses[index] = add_parts(nets, maps.enlarged(frame), poses[index])
    poses = fill_gaps(poses)
    return smooth_poses(poses) if smooth else poses


def find_in_footage(path: Path, clip: Clip, model: str, device: str, *choices) -> list[Pose]:
    """`find_poses` with the networks of `model`, where `choose_device` says. Errors name the clip's `path`."""
    nets = load_openpose(model, choose_device(device))
    from poses.waiting import announce

    _, whole, *_ = choices
    number = len(clip if whole is None else whole)
    announce(path, clip, number, partial(detect_bodies, nets), partial(add_parts, nets))
    try:
        return find_poses(nets, clip, *choices, progress=True)
    except ValueError as error:
        raise ValueError(f"{path}: {error}{hint_at_drawing(next(iter(clip)))}") from None


# ---- The command line ---------------------------------------------------------------------------


def overlay(frame: np.ndarray, pose: Pose) -> np.ndarray:
    """The frame, uint8 (H, W, 3), darkened under its skeleton."""
    skeleton = draw_pose(pose, *frame.shape[:2])
    return np.where(skeleton.any(axis=2, keepdims=True), skeleton, frame // 2)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("clip", type=path, help="video, image or folder of images")
    add("--out", type=path, help="the JSON to write (default: CLIP.poses.json, beside the clip)")
    add("--person", type=whole, default=1, help="1: the most prominent (default), ...")
    add("--body-only", action="store_true", help="no hands and face: some thirty times faster")
    add("--smooth", action="store_true", help="take the jitter out of the keypoints")
    add("--model", default="sd15", help="whose networks: sd15, demo or a folder (default: sd15)")
    add("--device", **DEVICE)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    clip = args.clip.resolve()
    out = args.out or clip.with_name(f"{clip.name if clip.is_dir() else clip.stem}.poses.json")
    is_image = clip.suffix.lower() in IMAGES
    preview = out.with_suffix(".png" if is_image else ".mp4")
    if out.suffix.lower() != ".json" or preview.resolve() == clip:
        its = f"is not the clip's, for {preview.name} becomes the preview"
        raise ValueError(f"{out}: choose a name that ends in .json and {its}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out}: the folder {out.parent} does not exist")
    if not args.out and out.exists():  # perhaps a run's own poses, or edited by hand
        raise FileExistsError(f"{out}: exists; give it as --out to replace it, or another name")
    frames = open_clip(args.clip)
    choices = args.person, [] if args.body_only else None, args.smooth
    poses = find_in_footage(args.clip, frames, args.model, args.device, *choices)
    save_poses(out, poses, *frames.shape[2:0:-1])
    if is_image:
        save_image(preview, overlay(next(iter(frames)), poses[0]))
    else:
        write_video(preview, map(overlay, frames, poses), frames.fps)
    print(f"{out}: {len(poses)} frames, preview in {preview.name}")
    if missing := absences(poses):
        print(f"no person in frames {missing}: leave them out with --range, or see who --person 2 is")


if __name__ == "__main__":
    run_command("openpose.py", main, parse_arguments())
