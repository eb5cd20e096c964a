"""The command lines end to end, on a model of a few thousand random weights, and their bad inputs."""

import contextlib
import datetime
import json
import math
import re
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from footage import RATE, make_video
from PIL import Image
from safetensors.torch import load_file, save_file

import sample
import train
from beyond.body import body_parts
from checkpoint import Model
from clip import TextConfig, TextEncoder, Tokenizer
from command import sampling_arguments, training_arguments
from controlnet import ControlNet
from demo.puppet import clip
from demo.save import save_model
from demo.vocabulary import learn_merges
from pictures.pages import read_data
from posecrafter import PAPER, Method, edit_once, training_loss
from poses.parts import face_and_hands
from poses.pose import Pose, load_poses, save_poses
from run import name_of
from safe.provenance import SOURCE_TYPE, SYNTHETIC, VERSION, file_hash, read_manifest
from safe.results import BESIDE, claiming
from safe.sound import has_sound
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig
from video import read_frames, save_image, write_video

ROOT = Path(__file__).parents[1]
SIZE = 64


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Path:
    """A folder with a tiny model, a puppet's clip as a video and as images, and its poses."""
    folder = tmp_path_factory.mktemp("commands")
    torch.manual_seed(0)
    tokenizer = Tokenizer(*learn_merges(["a person, red hair"], 20), length=8)
    unet = UNetConfig(widths=(8, 16, 16, 16), layers_per_block=1, context_dim=16, heads=2, norm_groups=4)
    text = TextConfig(len(tokenizer.vocab), width=16, heads=2, layers=1, mlp_width=32, length=8)
    vae = VAEConfig(widths=(8, 8, 8), layers_per_block=1, norm_groups=4)
    networks = UNet(unet), ControlNet(unet, (4, 4, 4)), VAE(vae), TextEncoder(text)
    model = Model(*networks, tokenizer, size=SIZE, learning_rate=1e-3, method="held")
    save_model(model, folder / "model", torch.float32)

    frames, poses, _ = clip(identity_seed=1, motion_seed=2, frames=12, size=SIZE)
    write_video(folder / "clip.mp4", frames, 10)
    (folder / "images").mkdir()
    for i, frame in enumerate(frames):
        save_image(folder / "images" / f"{i}.png", frame)
    save_poses(folder / "clip.json", poses, SIZE, SIZE)
    # More frames without a person than are bridged.
    save_poses(folder / "gap.json", [*poses[:5], *[Pose()] * 6, *poses[11:]], SIZE, SIZE)
    return folder


def main(workplace: Path, script: str, *arguments: object) -> None:
    """What the command line does, in this process, where torch is loaded already."""
    module, parse = {"train.py": (train, training_arguments), "sample.py": (sample, sampling_arguments)}[
        script
    ]
    parsed = parse([str(argument) for argument in arguments])
    with contextlib.chdir(workplace):
        module.main(parsed)


def refusal(workplace: Path, *command: object) -> str:
    """The one line with which a command refuses its input, having written nothing."""
    before = sorted(workplace.rglob("*"))
    with pytest.raises((OSError, ValueError)) as refused:
        main(workplace, *command)
    assert sorted(workplace.rglob("*")) == before, "something was written"
    line = str(refused.value)
    assert "\n" not in line
    return line


TRAIN = ("train.py", "clip.mp4", "--poses", "clip.json", "--model", "model", "--steps", 3)
SAMPLE = ("sample.py", "--poses", "clip.json", "--range", "2:7", "--ddim-steps", 3)


@pytest.fixture(scope="session")
def trained(workplace) -> Path:
    main(workplace, *TRAIN, "--run", "runs/first", "--frames", 4)
    return workplace / "runs" / "first"


def test_training_leaves_a_complete_run_folder(trained):
    left = {path.name for path in trained.iterdir()}
    wanted = "trained.safetensors frames frames.poses.json settings.json loss.csv preview.png "
    wanted += "training.json run.html"
    assert left == set(wanted.split())
    assert len(list((trained / "frames").iterdir())) == 4
    rows = [row.split(",")[:2] for row in (trained / "loss.csv").read_text().splitlines()]
    assert rows[:2] == [["step", "timestep"], ["0", "fixed"]] and rows[-1] == ["3", "fixed"]
    assert [step for step, timestep in rows if timestep.isdecimal()] == ["1", "2", "3"]
    outcome = json.loads((trained / "training.json").read_text())
    assert outcome["fixed_losses"].keys() == {"0", "3"}
    assert outcome["worse"] == (outcome["fixed_losses"]["3"] > outcome["fixed_losses"]["0"])
    settings = json.loads((trained / "settings.json").read_text())
    assert settings["frames"] == [0, 4, 7, 11]
    assert settings["learning_rate"] == 1e-3
    names = load_file(trained / "trained.safetensors")
    assert all(("attn1.to_out" in n) or ("_temp" in n) for n in names)
    assert any(n.startswith("controlnet.") for n in names)


def test_training_moves_the_weights_and_the_seed_decides_how(workplace, trained):
    same, other = "runs/same", "runs/other"
    main(workplace, *TRAIN, "--run", same, "--frames", 4)
    main(workplace, *TRAIN, "--run", other, "--frames", 4, "--seed", 1)
    first, same, other = (
        load_file(workplace / folder / "trained.safetensors") for folder in (trained, same, other)
    )
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.conv_temp.weight"
    assert first[name].abs().max() > 0  # it starts at zero
    assert all(torch.equal(first[n], same[n]) for n in first)
    assert not torch.equal(first[name], other[name])


def test_one_part_can_come_from_elsewhere_and_sampling_remembers_it(workplace, trained):
    options = ("--vae", "model/vae", "--controlnet", "model/controlnet", "--frames", 4)
    main(workplace, *TRAIN, "--run", "runs/parts", *options)
    parts, whole = (
        load_file(workplace / "runs" / name / "trained.safetensors") for name in ("parts", "first")
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    (workplace / "runs" / "parts" / "settings.json").write_text(
        (workplace / "runs" / "parts" / "settings.json").read_text().replace("model/vae", "gone")
    )
    assert "gone" in refusal(workplace, *SAMPLE, "--run", "runs/parts")


def test_sampling_writes_video_sheet_and_settings(workplace, trained):
    main(workplace, *SAMPLE, "--run", "runs/first", "--out", "out/result.mp4")
    frames, fps = read_frames(workplace / "out" / "result.mp4")
    assert frames.shape == (5, SIZE, SIZE, 3)
    assert fps == 10
    assert (workplace / "out" / "result.png").exists()
    shown = read_data(workplace / "out" / "result.html")
    assert [video["name"] for video in shown["videos"]] == ["result", "truth"]
    assert shown["commands"][0][1].startswith("python sample.py --poses clip.json --range 2:7 ")
    assert shown["first"] == 2 and len(shown["poses"]) == 5 and not shown["remarks"]
    report = json.loads((workplace / "out" / "result.json").read_text())
    assert report["reference"] in (0, 4, 7, 11)
    assert report["frames"] == 5
    assert report["edited_regions"]["torso"] == 5
    followed = load_poses(workplace / "out" / "result.poses.json")
    asked = load_poses(workplace / "clip.json")[2:7]  # the training clip's own: as they are
    assert len(followed) == 5
    assert all(np.allclose(a.body, b.body, atol=1e-4) for a, b in zip(followed, asked))
    main(workplace, *SAMPLE, "--run", "runs/first", "--out", "paper.mp4", "--method", "paper")
    report = json.loads((workplace / "paper.json").read_text())
    main(
        workplace, *SAMPLE, "--run", "runs/first", "--out", "paper.mp4", "--method", "paper", "--no-report"
    )
    assert not (workplace / "paper.html").exists()
    assert report["edited_regions"] == dict.fromkeys(("face", "left_hand", "right_hand"), 5)
    assert report["edit_step"] == 1
    assert (report["method"], report["method_from"]) == ("paper", "--method")
    assert (report["learning_rate"], report["learning_rate_from"]) == (1e-3, "the model's default")


@pytest.mark.slow
def test_a_seed_gives_the_same_video_and_every_option_another(workplace, trained):
    def sampled(name: str, *options: object) -> np.ndarray:
        main(workplace, *SAMPLE, "--run", "runs/first", "--out", f"{name}.mp4", *options)
        return read_frames(workplace / f"{name}.mp4")[0]

    SAMPLE = ("sample.py", "--poses", "clip.json", "--range", "2:4", "--ddim-steps", 3)
    plain = sampled("a")
    assert np.array_equal(plain, sampled("b"))
    assert not np.array_equal(plain, sampled("c", "--no-insert"))
    assert not np.array_equal(plain, sampled("d", "--no-edit"))
    assert not np.array_equal(plain, sampled("j", "--method", "paper"))
    assert not np.array_equal(plain, sampled("l", "--method", "body"))
    assert not np.array_equal(
        sampled("m", "--replay", "--no-edit"), sampled("n", "--no-replay", "--no-edit")
    )
    assert not np.array_equal(sampled("o", "--fixed-point", 0), sampled("p", "--fixed-point", 3))
    assert not np.array_equal(plain, sampled("e", "--edit-step", 2))
    assert not np.array_equal(plain, sampled("f", "--reference", 0))
    assert not np.array_equal(plain, sampled("g", "--prompt", "red hair", "--guidance", 3))
    noise = sampled("h", "--start", "noise")
    assert not np.array_equal(plain, noise)
    assert np.array_equal(noise, sampled("k", "--start", "noise", "--no-edit"))
    assert not np.array_equal(noise, sampled("i", "--start", "noise", "--seed", 1))


@pytest.mark.parametrize(("options", "step"), [((), 2), (("--prompt", "red hair"), 1)])
def test_bodies_move_after_a_fifth_of_the_steps_unless_they_are_to_look_different(
    workplace, trained, options, step
):
    steps = ("--ddim-steps", 5, "--out", "moved.mp4")
    main(workplace, *SAMPLE, "--run", "runs/first", *steps, *options)
    assert json.loads((workplace / "moved.json").read_text())["edit_step"] == step


def test_sampling_is_held_to_the_training_frames_where_that_is_possible_and_wanted(
    workplace, trained, monkeypatch, capsys
):
    def used(*options: object) -> str:
        main(workplace, *SAMPLE, "--run", "runs/first", "--out", "held.mp4", *options)
        return json.loads((workplace / "held.json").read_text())["method"]

    assert used() == used("--edit-step", 1, "--no-insert") == "held"
    assert used("--method", "body") == "body"
    assert "still" not in capsys.readouterr().out
    monkeypatch.setattr(sample, "background_change", lambda *_: 2 * sample.STILL)
    assert used() == "body"
    printed = capsys.readouterr().out
    assert "no still background" in printed and "method body" in printed


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), {"name": "held", "parts": body_parts, "edit_step": None, "replay": True}),
        (("--method", "paper"), {"parts": face_and_hands, "edit_step": 1, "replay": False}),
        (("--method", "paper", "--replay", "--fixed-point", 2), {"replay": True, "fixed_point": 2}),
        (("--prompt", "red hair"), {"name": "body", "edit_step": 1, "editor": edit_once}),
        (("--ddim-steps", 10, "--edit-step", 10), {"name": "body", "editor": edit_once}),
        (("--prompt", "red hair", "--replay"), {"replay": True}),
        (("--start", "noise"), {"start": "noise", "parts": None, "replay": False}),
        (("--start", "noise", "--edit-step", 2), {"parts": body_parts, "editor": edit_once}),
        (("--no-insert", "--no-edit"), {"insert": False, "parts": None, "replay": False}),
    ],
)
def test_options_make_the_method(workplace, trained, options, expected):
    args = sampling_arguments(["--poses", "clip.json", *map(str, options)])
    settings = json.loads((trained / "settings.json").read_text())
    settings["model"] = str(workplace / "model")
    method, chosen_by = sample.choose_method(args, settings, args.prompt or settings["prompt"])
    assert {name: getattr(method, name) for name in expected} == expected
    assert chosen_by == ("--method" if args.method else "the model's default")


def test_public_checkpoints_are_sampled_as_the_paper_says(trained):
    args = sampling_arguments(["--poses", "clip.json"])
    settings = json.loads((trained / "settings.json").read_text()) | {"model": "sd15"}
    assert sample.choose_method(args, settings, "a person") == (PAPER, "the model's default")
    assert PAPER == Method("paper", face_and_hands, 1, edit_once, True, "inversion", False, 0)


def test_a_rate_that_ruins_the_model_is_not_called_a_success(workplace, trained, capsys):
    options = ("--model", "demo", "--size", SIZE, "--frames", 4, "--steps", 6, "--lr", 0.9)
    main(workplace, *TRAIN, "--run", "runs/ruined", *options)
    printed = capsys.readouterr()
    assert "TRAINING MADE THE MODEL WORSE" in printed.out + printed.err
    assert "--lr 0.09" in printed.out + printed.err
    outcome = json.loads((workplace / "runs" / "ruined" / "training.json").read_text())
    assert outcome["worse"] and outcome["fixed_losses"].keys() == {"0", "5", "6"}
    assert "learning rate 0.9 (--lr), 6 steps, on the CPU" in printed.out


def test_a_loss_that_is_not_finite_stops_the_run(workplace, monkeypatch):
    calls = []

    def lost_after(good: int):
        def loss(*inputs):
            calls.append(1)
            return training_loss(*inputs) * (1 if len(calls) <= good else math.nan)

        calls.clear()
        return loss

    probes = len(train.FIXED_TIMESTEPS)
    for good, words in ((probes + 1, r"loss of step 2 is.*--lr 0.0001"), (0, "model's own loss is")):
        monkeypatch.setattr(train, "training_loss", lost_after(good))
        with pytest.raises(FloatingPointError, match=words):
            main(workplace, *TRAIN, "--run", f"runs/lost{good}", "--frames", 4)
        assert not (workplace / "runs" / f"lost{good}" / "trained.safetensors").exists()


def test_a_float16_model_is_trained_with_scaled_gradients(workplace, trained, monkeypatch):
    cpu = torch.device("cpu"), torch.float16
    monkeypatch.setattr(train, "compute_device", lambda name, training: cpu)
    scales = []
    step = torch.amp.GradScaler.step
    monkeypatch.setattr(
        torch.amp.GradScaler,
        "step",
        lambda scaler, optimizer: (scales.append(scaler.get_scale()), step(scaler, optimizer)),
    )
    main(workplace, *TRAIN, "--run", "runs/half", "--frames", 4)
    assert scales == [65536.0] * 3
    half, whole = (
        load_file(workplace / "runs" / name / "trained.safetensors") for name in ("half", "first")
    )
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.conv_temp.weight"
    assert torch.nn.functional.cosine_similarity(half[name], whole[name], dim=0).mean() > 0.9


def test_neither_slices_nor_offloading_change_the_video(workplace, trained, monkeypatch):
    # in float32: rounding to bfloat16 falls differently in slices, and random weights magnify it
    cpu = torch.device("cpu"), torch.float32
    monkeypatch.setattr(sample, "compute_device", lambda name: cpu)

    def sampled(name: str, *options: object) -> np.ndarray:
        main(workplace, *SAMPLE, "--run", "runs/first", "--out", f"{name}.mp4", *options)
        # the sheet and not the video, whose encoder may answer one grey level with ten
        return np.asarray(Image.open(workplace / f"{name}.png")).astype(int)

    plain = sampled("whole", "--slice", 100)
    difference = np.abs(plain - sampled("slices", "--slice", 1, "--offload", "always"))
    assert difference.max() <= 1


@pytest.mark.slow
def test_a_plan_says_how_much_it_is_and_writes_nothing(workplace, trained, capsys):
    before = sorted(workplace.rglob("*"))
    main(workplace, *SAMPLE, "--run", "runs/first", "--plan")
    assert sorted(workplace.rglob("*")) == before
    plan = capsys.readouterr().out
    assert "6 frames of 64x64" in plan
    assert "sampling: " in plan and "cpu, " in plan and "GB at the peak" in plan
    assert re.search(r"about [\d.,]+ minutes", plan)


def test_out_of_memory_says_how_much_would_do(workplace, trained, monkeypatch):
    def refuse(*_, **__):
        raise MemoryError("out of graphics memory")

    monkeypatch.setattr(sample, "generate", refuse)
    with pytest.raises(MemoryError, match=r"out of graphics memory; 6 frames need about \d"):
        main(workplace, *SAMPLE, "--run", "runs/first")


def test_the_newest_run_is_the_default_and_images_are_a_clip_too(workplace, trained):
    main(workplace, "train.py", "images", *TRAIN[2:], "--run", "runs/newest", "--frames", 2)
    main(workplace, *SAMPLE)
    assert (workplace / "runs" / "newest" / "samples" / "clip.mp4").exists()


@pytest.mark.parametrize(
    ("script", "arguments", "busy_with"),
    [
        ("train.py", ["clip.mp4", "--poses", "clip.json"], "poses.source.read_driver"),
        ("sample.py", ["--poses", "clip.json", "--run", "runs/any"], "run.load_run"),
        ("openpose.py", ["clip.mp4", "--out", "found.json"], "video.open_clip"),
        ("evaluate.py", ["clip.mp4", "--truth", "clip.mp4"], "video.read_frames"),
        ("checkpoint.py", ["--download"], "public.hub.try_to_load_from_cache"),
        ("demo/dance.py", ["--run", "runs/stopped"], "demo.scene.rendered"),
    ],
)
def test_control_c_is_no_traceback(workplace, script, arguments, busy_with, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(busy_with, interrupted)
    monkeypatch.setattr("sys.argv", [script, *arguments])
    monkeypatch.chdir(workplace)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert stopped.value.code == 130
    assert re.fullmatch(rf"{Path(script).name}: stopped.*\n", capsys.readouterr().err)


def test_an_interrupted_training_goes_on_as_if_nothing_had_happened(workplace, trained, monkeypatch):
    arguments = (*TRAIN, "--frames", 4, "--run", "runs/interrupted")
    calls = []

    def failing_loss(*inputs):
        calls.append(1)
        if len(calls) == len(train.FIXED_TIMESTEPS) + 3:  # in the third step
            raise KeyboardInterrupt
        return training_loss(*inputs)

    monkeypatch.setattr(train, "SAVE_EVERY", 0)
    monkeypatch.setattr(train, "training_loss", failing_loss)
    with pytest.raises(KeyboardInterrupt):
        main(workplace, *arguments)
    assert "has not finished" in refusal(workplace, *SAMPLE, "--run", "runs/interrupted")
    other = refusal(workplace, *TRAIN, "--frames", 5, "--run", "runs/interrupted")
    assert "unfinished run with other frames, inputs" in other
    poses = load_poses(workplace / "clip.json")
    save_poses(workplace / "corrected.json", poses[::-1], SIZE, SIZE)
    (workplace / "clip.json").rename(workplace / "as_it_was.json")
    (workplace / "corrected.json").rename(workplace / "clip.json")
    assert "unfinished run with other inputs" in refusal(workplace, *arguments)
    (workplace / "as_it_was.json").rename(workplace / "clip.json")
    state = workplace / "runs" / "interrupted" / "training_state.pt"
    shutil.copy(state, workplace / "whole_state.pt")
    state.write_bytes(b"no checkpoint")
    assert "training_state.pt: damaged; delete it" in refusal(workplace, *arguments)
    shutil.move(workplace / "whole_state.pt", state)

    monkeypatch.setattr(train, "training_loss", training_loss)
    main(workplace, *arguments)
    resumed = load_file(workplace / "runs" / "interrupted" / "trained.safetensors")
    straight = load_file(trained / "trained.safetensors")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    logs = ((workplace / "runs" / run / "loss.csv").read_text() for run in ("interrupted", "first"))
    assert len(set(logs)) == 1


def test_poses_are_found_in_pixels_and_footage_brings_its_sound(workplace, trained, monkeypatch, capsys):
    frames, poses, _ = clip(identity_seed=1, motion_seed=2, frames=12, size=SIZE)
    looked_at = []

    def find(nets, frames, person=1, whole_bodies=None, smooth=False, progress=False):
        looked_at.append((whole_bodies, person, smooth))
        return poses[: len(frames)]

    monkeypatch.setattr("openpose.load_openpose", lambda name, device: None)
    monkeypatch.setattr("openpose.find_poses", find)
    options = ("--run", "runs/pixels", "--frames", 4, "--person", 2)
    main(workplace, *TRAIN[:2], *TRAIN[4:], *options)
    assert looked_at == [([0, 4, 7, 11], 2, False)]
    given = load_poses(workplace / "runs" / "first" / "frames.poses.json")
    found = load_poses(workplace / "runs" / "pixels" / "frames.poses.json")
    assert all(np.abs(a.body - b.body).max() < 1e-4 for a, b in zip(given, found, strict=True))

    tone = np.sin(np.arange(RATE) / 17)
    make_video(workplace / "loud.mp4", frames[:6], np.arange(6) / 8, tone)
    command = ("sample.py", "--poses", "loud.mp4", "--run", "runs/pixels", "--ddim-steps", 3)
    command += ("--person", 3, "--smooth")
    main(workplace, *command, "--out", "loud_result.mp4")
    main(workplace, *command, "--out", "silent_result.mp4", "--no-audio")
    assert looked_at[1:] == [(list(range(6)), 3, True)], "not as asked for, or found twice"
    assert has_sound(workplace / "loud_result.mp4")
    assert not has_sound(workplace / "silent_result.mp4")
    assert read_frames(workplace / "loud_result.mp4")[1] == 8, "the driver's speed, not the clip's"
    assert "--canvas is for JSON" in refusal(workplace, *command, "--canvas", "64x64")
    capsys.readouterr()
    for fps, kept in (("8.001", True), ("12", False)):
        main(workplace, *command, "--out", "paced.mp4", "--fps", fps)
        assert has_sound(workplace / "paced.mp4") == kept
        said = "without sound, which would not fit the movements at --fps" in capsys.readouterr().out
        assert said != kept

    def fail(*_):
        raise OSError("loud.mp4: its sound could not be copied (no reason given)")

    monkeypatch.setattr(sample, "add_sound", fail)
    main(workplace, *command, "--out", "unsounded.mp4")
    assert not has_sound(workplace / "unsounded.mp4")
    assert json.loads((workplace / "unsounded.json").read_text())["sound"] is False


def test_a_single_picture_of_an_odd_size_and_kind_can_be_the_driver(workplace, trained, monkeypatch):
    _, (pose,), _ = clip(identity_seed=1, motion_seed=2, frames=1, size=SIZE)
    monkeypatch.setattr("openpose.load_openpose", lambda name, device: None)
    monkeypatch.setattr("openpose.find_poses", lambda nets, frames, *_, **__: [pose] * len(frames))
    transparent = Image.new("RGBA", (37, 91), (200, 90, 40, 128))
    for name, picture in {"grey.png": transparent.convert("L"), "clear.png": transparent}.items():
        picture.save(workplace / name)
        command = ("--poses", name, "--run", "runs/first", "--ddim-steps", 3, "--out", "one.mp4")
        main(workplace, "sample.py", *command)
        assert read_frames(workplace / "one.mp4")[0].shape == (1, SIZE, SIZE, 3)


# ---- Bad inputs: one line, exit code 2, nothing written -----------------------------------------


def test_a_missing_clip_is_named(workplace):
    assert "gone.mp4: no such video" in refusal(workplace, "train.py", "gone.mp4", *TRAIN[2:])


def test_an_unreadable_clip_is_named(workplace):
    (workplace / "broken.mp4").write_bytes(b"not a video" * 100)
    assert "broken.mp4: not a readable" in refusal(workplace, "train.py", "broken.mp4", *TRAIN[2:])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--frames", 13), "13 frames asked for"),
        (("--frames", 0), "0 frames asked for"),
        (("--range", "0:3"), "8 frames asked for, but 0:3 has 3"),
        (("--range", "5:40"), "up to 40"),
        (("--poses", "gap.json", "--frames", 12), "no person in frame 5"),
        (("--poses", "gone.json"), "gone.json: no such file"),
        (("--model", "gone"), "gone: no such model"),
        (("--size", 8), "size of 8"),
        (("--poses", "clip.mp4", "--poses-are", "json"), "not readable as JSON"),
    ],
)
def test_training_refuses(workplace, options, words):
    assert words in refusal(workplace, *TRAIN, "--run", "runs/bad", *options)


def test_what_poses_are_is_said_of_poses_that_are_given(workplace):
    command = ("train.py", "clip.mp4", "--model", "model", "--poses-are", "drawn")
    assert "--poses-are drawn: " in refusal(workplace, *command)


def test_a_run_is_named_after_its_clip(workplace, monkeypatch):
    (workplace / "me.day1").mkdir()
    monkeypatch.chdir(workplace / "me.day1")
    assert name_of(Path(".")) == "me.day1"
    assert name_of(Path("../clip.mp4")) == "clip"


def test_an_empty_prompt_is_a_prompt_and_the_trained_one_is_none_of_its_own(workplace, trained):
    reports = {}
    for prompt in ("", "a person"):
        options = ("--prompt", prompt, "--ddim-steps", 10, "--range", "0:1")
        main(workplace, *SAMPLE, "--run", "runs/first", *options, "--out", "prompted.mp4")
        reports[prompt] = json.loads((workplace / "prompted.json").read_text())
        assert reports[prompt]["prompt"] == prompt
    assert reports[""]["edit_step"] == 1
    assert reports["a person"]["edit_step"] > 1


def test_poses_one_frame_short_do_not_repeat_training_frames(workplace):
    save_poses(workplace / "short.json", load_poses(workplace / "clip.json")[:11], SIZE, SIZE)
    short = (*TRAIN, "--poses", "short.json", "--run", "runs/bad")
    assert "12 frames asked for, but 0:11 has 11" in refusal(workplace, *short, "--frames", 12)


def test_pixel_poses_without_a_canvas(workplace, trained):
    """OpenPose's own files: training knows the clip's size, sampling must be told."""
    (workplace / "openpose").mkdir()
    for i, frame in enumerate(json.loads((workplace / "clip.json").read_text())):
        written = workplace / "openpose" / f"clip_{i:012d}_keypoints.json"
        written.write_text(json.dumps({"version": 1.3, "people": frame["people"]}))
    main(workplace, *TRAIN, "--poses", "openpose", "--run", "runs/openpose", "--frames", 4)
    first, again = (
        load_poses(run / "frames.poses.json") for run in (trained, workplace / "runs" / "openpose")
    )
    assert all(np.allclose(a.body, b.body, atol=1e-4) for a, b in zip(first, again))

    command = (*SAMPLE, "--poses", "openpose", "--run", "runs/openpose", "--out", "openpose.mp4")
    assert "such as --canvas 1920x1080" in refusal(workplace, *command)
    with pytest.raises(SystemExit):
        main(workplace, *command, "--canvas", "64")
    main(workplace, *command, "--canvas", "64x64")
    assert len(load_poses(workplace / "openpose.poses.json")) == 5


def test_a_damaged_run_is_named(workplace, trained):
    shutil.copytree(trained, workplace / "runs" / "damaged")
    tensors = workplace / "runs" / "damaged" / "trained.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:1000])
    assert "trained.safetensors: damaged" in refusal(workplace, *SAMPLE, "--run", "runs/damaged")
    (workplace / "runs" / "damaged" / "frames" / "00004.png").unlink()
    line = refusal(workplace, *SAMPLE, "--run", "runs/damaged")
    assert "3 frames, 4 poses, and settings of 4" in line
    for broken, words in (
        ("{", "not readable as JSON"),
        ("", "not readable as JSON"),
        ("[]", "damaged"),
        ("{}", "lacks clip, contr"),
        ("1", "dam"),
    ):
        (workplace / "runs" / "damaged" / "settings.json").write_text(broken)
        line = refusal(workplace, *SAMPLE, "--run", "runs/damaged")
        assert "settings.json: " + words in line
    shutil.rmtree(workplace / "runs" / "damaged")


def test_poses_of_another_clip_are_refused(workplace):
    _, poses, _ = clip(1, 2, 20, SIZE)
    save_poses(workplace / "long.json", poses, SIZE, SIZE)
    line = refusal(workplace, *TRAIN, "--poses", "long.json", "--run", "runs/bad")
    assert line == "long.json: has 20 frames of poses, but the clip has 12 frames"
    save_poses(workplace / "wide.json", poses[:12], 2 * SIZE, SIZE)
    line = refusal(workplace, *TRAIN, "--poses", "wide.json", "--run", "runs/bad")
    assert "canvas of 128x64, but clip.mp4 has frames of 64x64" in line


def test_a_finished_run_is_not_overwritten(workplace, trained):
    assert "finished run" in refusal(workplace, *TRAIN, "--run", "runs/first")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--run", "runs/gone"), "runs/gone: no such run"),
        (("--poses", "gap.json"), "no person in frames 5-6"),
        (("--range", "5:13"), "has 12 frames"),
        (("--reference", "3"), "one of the training frames, 0, 4, 7, 11"),
        (("--edit-step", 4), "--edit-step 4"),
        (("--ddim-steps", 0), "0 DDIM steps"),
        (("--start", "noise", "--edit-step", 1), "an --edit-step above 1"),
        (("--replay", "--no-insert"), "which --no-insert leaves out"),
        (("--out", "result.gif"), "must end in .mp4"),
        (("--out", "clip.mp4"), "would overwrite clip.json; choose another --out"),
        (("--poses", "gap.json", "--out", "clip.mov"), "/clip.json; choose another --out"),
        (("--poses", "images", "--out", "images/new.mp4"), "would lie among the frames in images"),
        (("--out", "gap.mp4"), "would overwrite gap.json, which is no report"),
        (("--out", "folder.mp4"), "folder.mp4: is a folder"),
        (("--out", "clip.mp4/x.mp4"), "clip.mp4 is a file, not a folder"),
    ],
)
def test_sampling_refuses(workplace, trained, options, words):
    (workplace / "folder.mp4").mkdir(exist_ok=True)
    assert words in refusal(workplace, *SAMPLE, "--run", "runs/first", *options)


@pytest.mark.parametrize(
    ("parse", "option", "value", "words"),
    [
        (training_arguments, "--steps", "0", "'0' is not a whole number above 0"),
        (training_arguments, "--size", "1.5", "'1.5' is not a whole number above 0"),
        (training_arguments, "--lr", "-1", "'-1' is not a number above 0 and below 1"),
        (sampling_arguments, "--slice", "0", "'0' is not a whole number above 0"),
        (sampling_arguments, "--fps", "0", "'0' is not a number above 0"),
        (sampling_arguments, "--fps", "inf", "'inf' is not a number above 0.1 and below 1,000"),
        (sampling_arguments, "--guidance", "nan", "'nan' is not a number"),
        (sampling_arguments, "--guidance", "31", "'31' is not a number above -30 and below 30"),
        (sampling_arguments, "--fixed-point", "-1", "invalid choice: -1"),
        (sampling_arguments, "--canvas", "64", "'64' is not a size such as 1920x1080"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_with_their_option(parse, option, value, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(["clip.mp4" if parse is training_arguments else "--poses=clip.json", option, value])
    assert stopped.value.code == 2
    assert f"argument {option}: {words}" in capsys.readouterr().err


# ---- Results ------------------------------------------------------------------------------------


def shell(workplace: Path, *command: object, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / command[0], *map(str, command[1:])]
    return subprocess.run(command, cwd=workplace, capture_output=True, text=True, **options)


def test_a_result_says_how_it_was_made_and_is_the_same_but_for_its_date(workplace, trained, monkeypatch):
    command = (*SAMPLE[:3], "--range", "2:4", "--ddim-steps", 1, "--run", "runs/first", "--out")
    for name, year in (("dated/a.mp4", 2026), ("dated/b.mp4", 2026), ("dated/c.mp4", 2027)):
        now = datetime.datetime(year, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
        monkeypatch.setattr("safe.results.datetime", SimpleNamespace(now=lambda _, now=now: now))
        main(workplace, *command, name)
    first, same, later = (workplace / "dated" / f"{name}.mp4" for name in "abc")
    assert first.read_bytes() == same.read_bytes() != later.read_bytes()
    assert first.read_bytes().replace(b"2026-01-02", b"2027-01-02") == later.read_bytes()
    assert np.array_equal(read_frames(first)[0], read_frames(later)[0])

    report = json.loads(first.with_suffix(".json").read_text())
    manifest = report["manifest"]
    assert manifest == read_manifest(first) == read_manifest(first.with_suffix(".png"))
    assert manifest["date"] == "2026-01-02T03:04:05+00:00" and manifest["version"] == VERSION
    told = [manifest[name] for name in ("model", "run", "poses", "prompt", "seed", "method", "ddim_steps")]
    assert told == ["model", "first", "clip.json", "a person", 0, "body", 1]
    assert str(workplace) not in json.dumps(manifest), "folders are nobody's business"
    assert manifest["weights"].keys() == {"unet", "controlnet", "vae", "text_encoder", "trained"}
    of_trained = f"trained.safetensors {file_hash(trained / 'trained.safetensors')}"
    assert manifest["weights"]["trained"] == of_trained
    assert report["files"] == {
        name: file_hash(workplace / "dated" / name) for name in ("a.mp4", "a.png", "a.poses.json", "a.html")
    }
    assert shell(workplace, "sample.py", "--verify", "dated/a.png").returncode == 0


@pytest.mark.skipif(not shutil.which("exiftool"), reason="needs exiftool")
def test_exiftool_finds_the_marks_of_a_result_with_sound(workplace, trained, monkeypatch):
    frames, poses, _ = clip(identity_seed=1, motion_seed=2, frames=6, size=SIZE)
    monkeypatch.setattr("openpose.load_openpose", lambda name, device: None)
    monkeypatch.setattr("openpose.find_poses", lambda nets, frames, *_, **__: poses[: len(frames)])
    make_video(workplace / "sounding.mp4", frames, np.arange(6) / 8, np.sin(np.arange(RATE) / 17))
    command = ("sample.py", "--poses", "sounding.mp4", "--run", "runs/first", "--ddim-steps", 3)
    main(workplace, *command, "--out", "sounding_result.mp4")
    result = workplace / "sounding_result.mp4"
    assert has_sound(result)
    for file in (result, result.with_suffix(".png")):
        done = subprocess.run(["exiftool", "-j", file], capture_output=True, text=True, check=True)
        (found,) = json.loads(done.stdout)
        assert found["DigitalSourceType"] == SOURCE_TYPE
        assert found["Comment"].startswith(SYNTHETIC) and '"prompt": "a person"' in found["Comment"]
    assert read_manifest(result)["poses"] == "sounding.mp4"


def test_numbers_that_are_not_finite_make_no_video(workplace, trained):
    shutil.copytree(trained, workplace / "runs" / "burst")
    weights = workplace / "runs" / "burst" / "trained.safetensors"
    save_file({name: tensor * math.inf for name, tensor in load_file(weights).items()}, weights)
    before = sorted(workplace.rglob("*"))
    done = shell(workplace, *SAMPLE, "--run", "runs/burst", "--out", "burst/out.mp4")
    shutil.rmtree(workplace / "runs" / "burst")
    assert done.returncode == 2
    *_, line = done.stderr.splitlines()
    assert line.startswith("sample.py: ") and "not finite" in line
    assert [path for path in before if "burst" not in path.parts] == sorted(workplace.rglob("*"))


def test_sampling_never_replaces_what_a_user_has_made(workplace, trained):
    main(workplace, *SAMPLE, "--run", "runs/first", "--out", "own/out.mp4")
    main(workplace, *SAMPLE, "--run", "runs/first", "--out", "own/out.mp4")  # a result replaces a result
    (workplace / "own" / "out.mp4").write_bytes(b"edited by hand")
    line = refusal(workplace, *SAMPLE, "--run", "runs/first", "--out", "own/out.mp4")
    assert "own/out.mp4, which is not the file that out.json says was written; move it away" in line
    assert (workplace / "own" / "out.mp4").read_bytes() == b"edited by hand"
    (workplace / "own" / "new.png").write_bytes(b"a drawing")
    line = refusal(workplace, *SAMPLE, "--run", "runs/first", "--out", "own/new.mp4")
    assert "would overwrite own/new.png, beside which lies no report new.json" in line


@pytest.mark.slow
def test_twenty_kills_leave_whole_results(workplace, trained):
    """Half at any moment, half while files are written and moved."""
    folder, random = workplace / "killed", np.random.default_rng(0)
    command = [*SAMPLE, "--run", "runs/first", "--out", "killed/out.mp4", "--ddim-steps", 1, "--no-edit"]
    started = time.monotonic()
    assert shell(workplace, *command).returncode == 0
    seconds, outcomes = time.monotonic() - started, set()
    for kill in range(20):
        run = [sys.executable, ROOT / command[0], *map(str, command[1:]), "--seed", str(kill + 1)]
        process = subprocess.Popen(run, cwd=workplace, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if kill % 2:
            while not list(folder.glob(f".out.{process.pid}")) and process.poll() is None:
                time.sleep(0.001)
            time.sleep(random.uniform(0, 1))
        else:
            time.sleep(random.uniform(0, seconds))
        process.kill()
        process.wait()
        with claiming(folder / "out.mp4", (".mp4",), []):  # with which the next run begins
            pass
        report = json.loads((folder / "out.json").read_text())
        assert report["files"] == {name: file_hash(folder / name) for name in report["files"]}
        assert read_manifest(folder / "out.mp4") == read_manifest(folder / "out.png") == report["manifest"]
        outcomes.add(report["seed"] == kill + 1)
    assert shell(workplace, *command).returncode == 0
    assert {path.name for path in folder.iterdir()} == {f"out{ending}" for ending in (".mp4", *BESIDE)}
    print(f"new results after a kill: {sorted(outcomes)}")


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_a_person_at_the_shell_sees_one_line_and_exit_code_2(tmp_path, script):
    arguments = ["gone.mp4"] if script == "train.py" else ["--poses", "gone.json"]
    done = subprocess.run(
        [sys.executable, ROOT / script, *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{script}: ")
    assert "python train.py" in line or "no such video" in line
    assert not list(tmp_path.iterdir())
