"""Fuzzing of everything that reads a file: `python tests/fuzz.py --seconds 3600`.

Each target gets inputs that hypothesis makes up, and valid files with a few bytes changed. A reader may refuse an
input with ValueError or OSError, which the command lines show in one line. Any other exception is an error here,
and so is an input that takes longer than SLOW seconds.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image
from safetensors.torch import save

from beyond.retarget import retarget
from clip import TextEncoder, Tokenizer
from controlnet import ControlNet
from openpose import OpenPose
from poses.drawn import read_drawn_people
from poses.pose import Pose, draw_pose, save_poses
from poses.source import read_driver
from public.configs import read_config, read_openpose_sizes, read_sizes
from public.formats import TensorFile
from public.places import DEMO
from run import read_run_settings
from unet import UNet
from vae import VAE
from video import read_frames, write_video

SLOW = 10  # seconds
REFUSED = (ValueError, OSError)
FOLDER = tempfile.TemporaryDirectory(prefix="fuzz")
WORK = Path(FOLDER.name)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def mutated(valid: bytes) -> SearchStrategy[bytes]:
    """A valid file with up to eight bytes changed, and perhaps its end cut off."""
    edit = st.tuples(st.integers(0, len(valid) - 1), st.integers(0, 255))

    def apply(edits: list[tuple[int, int]], length: int) -> bytes:
        content = bytearray(valid)
        for place, value in edits:
            content[place] = value
        return bytes(content[:length])

    lengths = st.just(len(valid)) | st.integers(0, len(valid))
    return st.builds(apply, st.lists(edit, max_size=8), lengths)


def with_field_replaced(valid: dict) -> SearchStrategy[bytes]:
    """A valid JSON object, one of its fields anything."""
    change = st.tuples(st.sampled_from(sorted(valid)), JSON)
    return change.map(lambda pair: json.dumps(valid | dict([pair])).encode())


def in_file(name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    """`read` of a file with the given contents."""

    def target(content: bytes) -> object:
        path = WORK / name
        path.write_bytes(content)
        return read(path)

    return target


@cache
def tokenizer() -> Callable:
    return Tokenizer.load(DEMO / "tokenizer")


def a_pose() -> Pose:
    random = np.random.default_rng(0)
    parts = {name: random.random(part.shape).astype(np.float32) for name, part in vars(Pose()).items()}
    return Pose(**{name: part.clip(0.2, 0.8) for name, part in parts.items()})


def valid_files() -> dict[str, bytes]:
    """One small valid file of each kind."""
    shutil.copy(DEMO / "tokenizer" / "merges.txt", WORK)
    save_poses(WORK / "poses.json", [a_pose()] * 2, 96, 64)
    frames = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), dtype=np.uint8)
    write_video(WORK / "clip.mp4", frames, 8)
    Image.fromarray(frames[0]).save(WORK / "frame.png")
    torch.save({"state_dict": {"weight": torch.ones(3, 4)}}, WORK / "weights.pth")
    (WORK / "weights.safetensors").write_bytes(save({"weight": torch.ones(3, 4), "bias": torch.ones(4)}))
    names = "poses.json", "clip.mp4", "frame.png", "weights.pth", "weights.safetensors"
    return {name: (WORK / name).read_bytes() for name in names}


def drawing(numbers: tuple[int, int, int, bool]) -> np.ndarray:
    """Frames (2, H, W, 3) of noise, or of a skeleton with noise in some of its pixels."""
    height, width, number, drawn = numbers
    random = np.random.default_rng(number)
    noise = random.integers(0, 255, (2, height, width, 3), dtype=np.uint8)
    picture = draw_pose(a_pose(), height, width) if drawn else noise
    return np.where(random.random((2, height, width, 1)) < random.random() ** 4, noise, picture)


def configs() -> dict[str, dict]:
    """The demo model's sizes, by part."""
    parts = "unet", "controlnet", "vae", "text_encoder", "openpose"
    return {part: json.loads((DEMO / part / "config.json").read_text()) for part in parts}


def read_part_config(part: str, path: Path) -> None:
    """Reads a part's sizes, and builds the part without weights."""
    made = {
        "unet": UNet,
        "vae": VAE,
        "text_encoder": TextEncoder,
        "openpose": lambda sizes: OpenPose(**sizes),
    }
    read = read_openpose_sizes if part == "openpose" else partial(read_sizes, part)
    sizes = read_config(path.parent, read)
    with torch.device("meta"):
        ControlNet(*sizes) if part == "controlnet" else made[part](sizes)


def wild_poses() -> SearchStrategy[list[Pose]]:
    """Up to four poses with keypoints missing, far away, and at one place."""
    number = st.sampled_from([0.0, 0.5, 1.0, -1.5, 2.5, 1e-30]) | st.floats(-1.5, 2.5, width=32)
    body = st.lists(number, min_size=54, max_size=54).map(
        lambda flat: np.reshape(np.float32(flat), (18, 3))
    )
    seen = body.map(lambda part: np.where(part[:, 2:] > 0, part.clip((-2, -2, 0), (3, 3, 1)), 0))
    pose = st.builds(
        lambda part, rest: replace(a_pose() if rest else Pose(), body=part), seen, st.booleans()
    )
    return st.lists(pose, min_size=1, max_size=4)


def targets() -> dict[str, tuple[SearchStrategy, Callable]]:
    """For each reader its inputs and what is called with them."""
    valid = valid_files()
    (frame, _) = json.loads(valid["poses.json"])
    run = {"clip": "clip.mp4", "poses": None, "poses_are": None, "person": 1, "frames": [0, 1], "fps": 8.0}
    run |= {"height": 64, "width": 96, "model": "demo", "controlnet": None, "vae": None, "steps": 50}
    run |= {"prompt": "a person", "learning_rate": 0.001, "learning_rate_from": "--lr", "seed": 0}
    run |= {"inputs": "ab" * 32}
    people = st.lists(st.dictionaries(st.sampled_from(sorted(frame["people"][0])), JSON), max_size=3)
    anything = JSON.map(lambda value: json.dumps(value).encode())
    poses = (
        anything
        | with_field_replaced(frame)
        | people.map(lambda people: json.dumps([frame | {"people": people}]).encode())
        | JSON.map(
            lambda value: json.dumps({"frames": [{"width": 9, "height": 9, "keypoints": value}]}).encode()
        )
        | mutated(valid["poses.json"])
    )
    sides = st.integers(1, 96)
    return {
        "poses": (poses, in_file("fuzzed.json", partial(read_driver, canvas=(64, 96)))),
        "settings": (
            anything | with_field_replaced(run),
            in_file("settings.json", lambda path: read_run_settings(path.parent)),
        ),
        **{
            part: (with_field_replaced(config), in_file("config.json", partial(read_part_config, part)))
            for part, config in configs().items()
        },
        "vocabulary": (
            mutated((DEMO / "tokenizer" / "vocab.json").read_bytes()) | anything,
            in_file("vocab.json", lambda path: Tokenizer.load(path.parent)),
        ),
        "retargeting": (
            st.tuples(wild_poses(), wild_poses(), st.floats(0.1, 10)),
            lambda given_input: retarget(*given_input),
        ),
        "tokenizer": (st.text(), lambda text: tokenizer()(text)),
        "drawings": (
            st.tuples(sides, sides, st.integers(0, 2**32), st.booleans()).map(drawing),
            lambda frames: read_drawn_people(Path("drawing"), frames),
        ),
        "safetensors": (
            mutated(valid["weights.safetensors"]) | st.binary(max_size=200),
            in_file("fuzzed.safetensors", read_all_tensors),
        ),
        "pickles": (
            mutated(valid["weights.pth"]) | st.binary(max_size=200),
            in_file("fuzzed.pth", read_all_tensors),
        ),
        "images": (mutated(valid["frame.png"]), in_file("fuzzed.png", read_frames)),
        "videos": (mutated(valid["clip.mp4"]), in_file("fuzzed.mp4", read_frames)),
    }


def read_all_tensors(path: Path) -> None:
    file = TensorFile(path)
    for name in file.shapes:
        file.read(name)


def attempts(name: str, inputs: SearchStrategy, target: Callable, number: int) -> int:
    """Gives a target fifty inputs; returns how many it got. Raises as `fuzz`."""
    count = 0

    @seed(number)
    @settings(max_examples=50, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(inputs)
    def attempt(given_input: object) -> None:
        nonlocal count
        count += 1
        start = time.process_time()  # busy machines take longer
        with suppress(*REFUSED), redirect_stdout(None), warnings.catch_warnings(action="ignore"):
            target(given_input)
        assert time.process_time() - start < SLOW, f"{name}: took too long"

    attempt()
    return count


def fuzz(seconds: float, first_seed: int = 0, only: str = "") -> dict[str, int]:
    """Gives each target, or one, its share of the time; returns how many inputs each got.

    Raises the first exception that is no refusal, and AssertionError for an input that took too long.
    """
    wanted = {name: each for name, each in targets().items() if only in ("", name)}
    counts, share = dict.fromkeys(wanted, 0), seconds / len(wanted)
    for name, (inputs, target) in wanted.items():
        end, number = time.monotonic() + share, first_seed
        while time.monotonic() < end:
            counts[name] += attempts(name, inputs, target, number)
            number += 1
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="in all (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="other inputs (default: 0)")
    parser.add_argument("--only", default="", help="one target, such as drawings (default: all)")
    args = parser.parse_args()
    for name, count in fuzz(args.seconds, args.seed, args.only).items():
        print(f"{count:8} {name}")
