"""Fuzzing of everything that reads a file: `python tests/fuzz.py --seconds 3600`.

Each target gets inputs that hypothesis makes up, and valid files with a few bytes changed. A reader may refuse an
input with ValueError or OSError, which the command lines show in one line. Any other exception is an error here,
and so is an input that takes longer than SLOW seconds or more than MOST_MEMORY bytes. A line is printed for each
target when its time is over or Ctrl-C comes, and the errors at the end. The exit code is 1 where there were any.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field, replace
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
from clip import TextConfig, TextEncoder, Tokenizer
from command import sampling_arguments
from controlnet import ControlNet
from openpose import OpenPose
from poses.drawn import read_drawn_people
from poses.pose import Pose, draw_pose, save_poses
from poses.source import read_driver
from public.adapters import LoRA
from public.configs import read_config, read_openpose_sizes, read_sizes
from public.formats import TensorFile
from public.lora import merged, read_loras
from public.places import DEMO
from safe.provenance import mark_video, png_marks, read_manifest
from safe.results import read_hashes
from safe.settings import read_run_settings
from safe.tensors import load_state
from unet import UNet, UNetConfig
from vae import VAE
from video import read_frames, write_video

SLOW = 10  # seconds
MOST_MEMORY = 6_000_000_000  # bytes of addresses; some three of them are the libraries'
MOST_ERRORS = 3  # of one target, which is then left
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
    for ending in ("png", "jpg", "webp"):
        Image.fromarray(frames[0]).save(WORK / f"frame.{ending}")
    manifest = {"version": "1", "weights": {"unet": "a"}}
    shutil.copy(WORK / "clip.mp4", WORK / "marked.mp4")
    mark_video(WORK / "marked.mp4", manifest)
    Image.fromarray(frames[0]).save(WORK / "marked.png", pnginfo=png_marks(manifest))
    torch.save({"state_dict": {"weight": torch.ones(3, 4)}}, WORK / "weights.pth")
    (WORK / "weights.safetensors").write_bytes(save({"weight": torch.ones(3, 4), "bias": torch.ones(4)}))
    names = "poses.json clip.mp4 frame.png frame.jpg frame.webp marked.mp4 marked.png weights.pth".split()
    names.append("weights.safetensors")
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
    sides, shard = st.integers(1, 96), st.just("weights.safetensors")
    options = "--range --canvas --seed --fps --guidance --slice --lora --out --reference --person".split()
    words = st.builds("{}={}".format, st.sampled_from(options), st.text() | st.floats() | st.integers())
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
        "loras": (loras(), in_file("lora.safetensors", read_lora)),
        "shards": (
            st.dictionaries(st.sampled_from(["weight", "bias", "other"]), JSON | shard, max_size=3).map(
                lambda places: json.dumps({"weight_map": places}).encode()
            )
            | anything,
            in_file("fuzzed.safetensors.index.json", read_all_tensors),
        ),
        "states": (states(), check_state),
        "reports": (
            anything | with_field_replaced({"files": {"a.mp4": "ab"}, "sha256": "ab"}),
            in_file("report.json", read_hashes),
        ),
        "marks": (mutated(valid["marked.mp4"]), in_file("marked_fuzzed.mp4", read_manifest)),
        "marks in PNG": (mutated(valid["marked.png"]), in_file("marked_fuzzed.png", read_manifest)),
        "arguments": (st.lists(words, max_size=4).map(lambda words: ["--poses", "a", *words]), parse),
        "images": (mutated(valid["frame.png"]), in_file("fuzzed.png", read_frames)),
        "JPEG": (mutated(valid["frame.jpg"]), in_file("fuzzed.jpg", read_frames)),
        "WebP": (mutated(valid["frame.webp"]), in_file("fuzzed.webp", read_frames)),
        "videos": (mutated(valid["clip.mp4"]), in_file("fuzzed.mp4", read_frames)),
    }


def read_all_tensors(path: Path) -> None:
    file = TensorFile(path)
    for name in file.shapes:
        file.read(name)


@cache
def tiny_networks() -> dict[str, torch.nn.Module]:
    """A UNet and a text encoder without weights, for LoRAs to change."""
    with torch.device("meta"):
        unet = UNet(UNetConfig(widths=(8, 16), layers_per_block=1, context_dim=8, heads=2, norm_groups=4))
        return {"unet": unet, "text_encoder": TextEncoder(TextConfig(20, 8, 2, 1, 16, 8))}


LORA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def loras() -> SearchStrategy[bytes]:
    """Files of LoRAs: matrices of any shapes under names that are known, nearly known or unknown."""
    ends = ".lora_down.weight", ".lora_up.weight", ".alpha", ".lora_mid.weight", ".dora_scale", ""
    names = st.sampled_from([layer + end for layer in (LORA, "lora_te_x", "unet.a") for end in ends])
    shapes = st.sampled_from([(), (1,), (0,), (2, 8), (8, 2), (0, 8), (8, 0), (2, 8, 1, 1), (3, 8)])
    numbers = st.sampled_from([1.0, 0.0, float("nan"), float("inf")])
    tensors = st.builds(torch.full, shapes, numbers)
    settings_of = JSON.map(lambda value: {"lora_adapter_metadata": json.dumps(value)}) | st.none()
    valid = {LORA + ends[0]: torch.ones(2, 8), LORA + ends[1]: torch.ones(8, 2)}
    wild = st.dictionaries(names, tensors, max_size=4).map(lambda more: valid | more)
    return st.builds(save, wild, settings_of) | mutated(save(valid))


def read_lora(path: Path) -> None:
    changes = read_loras([LoRA(str(path), 0.5)], tiny_networks())
    for name, shape in ((n, t.shape) for n, t in tiny_networks()["unet"].state_dict().items()):
        merged(torch.zeros(shape), changes["unet"].get(name, ()))


def check_state(state: object) -> None:
    """As a checkpoint of an unfinished training, with one parameter."""
    torch.save(state, WORK / "state.pt")
    load_state(WORK / "state.pt", {"w": torch.ones(2)}, 3)


def states() -> SearchStrategy[object]:
    """Checkpoints with one of their fields, or of the fields within, anything."""
    moments = {"step": torch.tensor(1.0), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
    valid = {"step": 1, "parameters": {"w": torch.ones(2)}, "losses": [(0, "fixed", 0.5), (1, 7, 0.5)]}
    valid |= {"optimizer": {"state": {0: moments}}, "scaler": {}}
    outer = st.tuples(st.sampled_from(sorted(valid)), JSON).map(lambda pair: valid | dict([pair]))
    inner = st.tuples(st.sampled_from(sorted(moments)), JSON).map(lambda pair: moments | dict([pair]))
    return outer | inner.map(lambda each: valid | {"optimizer": {"state": {0: each}}}) | JSON


def parse(words: list[str]) -> None:
    """A command line of `sample.py`; wrong ones end the program with exit code 2, as argparse does."""
    with redirect_stderr(None), suppress(SystemExit):
        sampling_arguments(words)


@dataclass
class Found:
    """What became of a target."""

    count: int = 0  # inputs that it got
    errors: list[str] = field(default_factory=list)


def too_long(*_: object) -> None:
    raise AssertionError(f"took more than {SLOW} seconds")


def attempts(found: Found, inputs: SearchStrategy, target: Callable, number: int) -> None:
    """Gives a target fifty inputs. Raises what is no refusal, with the smallest input that leads to it."""

    @seed(number)
    @settings(
        max_examples=50,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def attempt(given_input: object) -> None:
        found.count += 1
        # Of this process's own time, because busy machines take longer; also where it would never end.
        signal.setitimer(signal.ITIMER_VIRTUAL, SLOW)
        started = sum(os.times()[:4])  # that of its own children counts too
        try:
            with suppress(*REFUSED), redirect_stdout(None), warnings.catch_warnings(action="ignore"):
                target(given_input)
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        if sum(os.times()[:4]) - started > SLOW:
            too_long()

    attempt()


def fuzz(seconds: float, first_seed: int = 0, only: str = "", tell: Callable = print) -> dict[str, Found]:
    """Gives each target, or one, its share of the time, and tells what came of it; Ctrl-C ends it earlier."""
    wanted = {name: each for name, each in targets().items() if only in ("", name)}
    signal.signal(signal.SIGVTALRM, too_long)
    all_found = {}
    for name, (inputs, target) in wanted.items():
        found = all_found[name] = Found()
        end, number = time.monotonic() + seconds / len(wanted), first_seed
        try:
            while time.monotonic() < end and len(found.errors) < MOST_ERRORS:
                try:
                    attempts(found, inputs, target, number)
                except Exception as error:  # of any kind: that is what is looked for
                    notes = getattr(error, "__notes__", [])
                    found.errors.append("".join([*traceback.format_exception(error)[-6:], *notes]))
                number += 1
        except KeyboardInterrupt:
            break
        finally:
            tell(f"{found.count:8} {name:14} {len(found.errors) or 'no'} errors")
    return all_found


def main(args: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(ImportError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    found = fuzz(args.seconds, args.seed, args.only, partial(print, flush=True))
    errors = [f"---- {name}\n{error}" for name, each in found.items() for error in each.errors]
    print(
        "\n".join([*errors, f"{sum(each.count for each in found.values())} inputs, {len(errors)} errors"])
    )
    return bool(errors)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="in all (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="other inputs (default: 0)")
    parser.add_argument("--only", default="", help="one target, such as drawings (default: all)")
    sys.exit(main(parser.parse_args()))
