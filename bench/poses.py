"""Poses from pixels, frames per second beside the public port: `python bench/poses.py PORT`.

PORT is a checkout of lllyasviel/ControlNet-v1-1-nightly; its OpenPose is run as it is, on the same frame,
with the same random weights at full size. Nobody would be found by those, so after the body network has
run, its maps are replaced by those of a person who stands there: then both sides crop and look at two hands
and a face. Frames alternate between the two, in one process. Needs the test requirements (OpenCV, SciPy).
"""

import argparse
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.ndimage
import torch
from torch import Tensor, nn
from tqdm import trange

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from command import keep_freed_memory
from demo.pretrain_openpose import fields_at, heatmaps_at, shown_at
from demo.puppet import clip
from openpose import OpenPose, detect, detect_bodies
from poses.maps import STRIDE, body_input, body_size

SIZE = 512


class Directed(nn.Module):
    """Runs a body network, and says what it is told to."""

    def __init__(self, net: nn.Module, pafs: Tensor, heatmaps: Tensor):
        super().__init__()
        self.net, self.maps = net, (pafs, heatmaps)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.net(images)
        return self.maps


def import_port(checkout: Path) -> tuple:
    """The port's Body, Hand and Face classes and its `util`.

    What they import and do not need here is replaced by empty modules, scikit-image's connected
    components by SciPy's.
    """

    def module(name: str, **contents) -> types.ModuleType:
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(contents)
        return sys.modules[name]

    def label(image: np.ndarray, return_num: bool, connectivity: int) -> tuple[np.ndarray, int]:
        return scipy.ndimage.label(image, np.ones((3, 3)))

    module("matplotlib", pyplot=module("matplotlib.pyplot"))
    transforms = module("torchvision.transforms", ToTensor=object, ToPILImage=object)
    module("torchvision", transforms=transforms)
    module("skimage", measure=module("skimage.measure", label=label))
    module("scipy.ndimage.filters", gaussian_filter=scipy.ndimage.gaussian_filter)
    sys.path.insert(0, str(checkout))
    from annotator.openpose import util
    from annotator.openpose.body import Body
    from annotator.openpose.face import Face
    from annotator.openpose.hand import Hand

    return Body, Hand, Face, util


def around(cls: type, net: nn.Module):
    """One of the port's detectors with our network in it: the layers are the same, as tests show."""
    detector = cls.__new__(cls)
    detector.model = net
    return detector


class OneStage(nn.Module):
    """The port's face network returns a list of stages."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.net(images)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("port", type=Path, help="checkout of ControlNet-v1-1-nightly")
    parser.add_argument("--frames", type=int, default=5, help="how often each is timed (default: 5)")
    args = parser.parse_args()
    if not (args.port / "annotator" / "openpose").is_dir():
        parser.error(f"{args.port}: no annotator/openpose in it")
    keep_freed_memory()

    frames, (pose,), _ = clip(identity_seed=1, motion_seed=1, frames=1, size=SIZE)
    torch.manual_seed(0)
    nets = OpenPose().eval()
    height, width = (side // STRIDE for side in body_input(torch.from_numpy(frames)).shape[2:])
    points = shown_at(pose.body * (SIZE, SIZE, 1), body_size(SIZE, SIZE)[0] / SIZE)[None]
    points = torch.from_numpy(points).float()
    nets.body = Directed(nets.body, fields_at(points, height, width), heatmaps_at(points, height, width))
    Body, Hand, Face, util = import_port(args.port)
    body, hand, face = (around(Body, nets.body), around(Hand, nets.hand), around(Face, OneStage(nets.face)))
    bgr = frames[0, :, :, ::-1].copy()

    def port_body() -> tuple:
        return body(bgr)

    def port_whole() -> None:
        found = port_body()
        hands, faces = util.handDetect(*found, bgr), util.faceDetect(*found, bgr)
        assert len(hands) == 2 and len(faces) == 1
        for x, y, side, _ in hands:
            hand(bgr[y : y + side, x : x + side])
        for x, y, side in faces:
            face.compute_peaks_from_heatmaps(face(bgr[y : y + side, x : x + side]))

    sides: dict[str, tuple[Callable, Callable]] = {
        "body only": (port_body, lambda: detect_bodies(nets, frames)),
        "whole body": (port_whole, lambda: detect(nets, frames)),
    }
    print(f"{torch.get_num_threads()} threads, {SIZE}x{SIZE}, one frame at a time, medians\n")
    print("| | port, frames/s | ours, frames/s | ratio |\n| --- | --- | --- | --- |")
    with torch.inference_mode():
        for name, both in sides.items():
            seconds = np.zeros((args.frames + 1, 2))
            for repeat in trange(args.frames + 1, desc=name, leave=False):
                for side, run in enumerate(both):
                    began = time.perf_counter()
                    run()
                    seconds[repeat, side] = time.perf_counter() - began
            port, ours = np.median(seconds[1:], axis=0)  # the first warms up
            print(f"| {name} | {1 / port:.3f} | {1 / ours:.3f} | {port / ours:.2f} |")


if __name__ == "__main__":
    main()
